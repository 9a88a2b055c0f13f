"""How a call is cut into parts is what `Upsampler.parts` says."""

import pytest

from operators.upsamplers import Upsampler
from tests.contracts.upsampler import Case, features, images

BATCH, BASE, CHANNELS = 3, (8, 8), 16
GRID = (32, 32)

METHODS = [
    *(Case(method=name) for name in ("lift", "resize_conv", "jbu", "featup", "jafar", "anyup", "uplift", "loftup", "vit_up")),
    Case(method="naf", settings={"kernel_size": 7}),
]


def counted(upsampler: Upsampler) -> tuple[int, int]:
    """How often a call prepares images, and how often it makes a part of their grids."""
    times = {"begun": 0, "made": 0}

    def counting(owner: object, name: str, key: str) -> None:
        real = getattr(owner, name)

        def call(*args: object, **kwargs: object) -> object:
            times[key] += 1
            return real(*args, **kwargs)

        owner.__dict__[name] = call

    net = getattr(upsampler, "net", None)
    if net is None:  # ViT-Up
        counting(upsampler, "_prepare", "begun")
        counting(upsampler._head, "query", "made")
    elif hasattr(net, "query"):
        counting(net, "prepare", "begun")
        counting(net, "query", "made")
    elif hasattr(net, "rows"):
        counting(net, "begun", "begun")
        counting(net, "finished", "made")  # of the last pass
    else:
        counting(upsampler, "_enlarged", "begun")
        counting(upsampler, "_enlarged", "made")
    upsampler(images(BATCH, BASE), features(BATCH, CHANNELS, BASE), (5,), GRID)
    return times["begun"], times["made"]


@pytest.mark.parametrize("working_bytes", [2**17, 2**22, 2**40])
@pytest.mark.parametrize("case", METHODS, ids=str)
def test_a_call_is_cut_as_it_is_said_to_be(case, working_bytes):
    upsampler = case.make(CHANNELS)
    upsampler.allow(working_bytes)

    together, parts = upsampler.parts(BATCH, CHANNELS, BASE, (16 * BASE[0], 16 * BASE[1]), GRID)

    groups = -(-BATCH // together)
    begun, made = counted(upsampler)
    assert begun == groups
    assert (groups - 1) * parts < made <= groups * parts
    if working_bytes == 2**40:
        assert (together, parts) == (1 if case.method in ("anyup", "vit_up") else BATCH, 1)
