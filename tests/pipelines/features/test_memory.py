"""Upsamplers take as much at once as a GPU's free memory lets them, and on a CPU always the same."""

from dataclasses import replace

import pytest
import torch

from operators.backbone import PatchFeatures
from operators.upsamplers import Upsampler, find_method
from operators.upsamplers.protocol import WORKING_BYTES
from operators.upsamplers.vit_up.head import ViTUpHead
from pipelines.features.memory import allow_within, free_bytes
from pipelines.features.model_bundle import ModelBundle
from pipelines.features.upsamplers import UpsamplerWeights
from tests.operators.test_backbone import described, photos
from tests.pretended_gpu import pretended_gpu, shapes_on_a_gpu


class Greedy(Upsampler):
    """Takes all that it's allowed, up to what all of its work takes."""

    def __init__(self, all_of_it: int):
        self.all_of_it, self.allowed = all_of_it, 0

    def allow(self, working_bytes):
        self.allowed = working_bytes

    @property
    def bytes(self) -> int:
        return min(self.allowed, self.all_of_it)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (0, WORKING_BYTES),  # there must be something
        (2**28, 2**28),
        (2**28 + 12345678, 2**28),  # the same where a little more is free
        (2**40, 2**30),  # all at once: more is of no use
    ],
)
def test_the_allowance_is_a_power_of_two_of_use(limit, expected):
    upsampler = Greedy(2**30 - 5)

    assert allow_within([upsampler], lambda: upsampler.bytes, limit) == expected
    assert upsampler.allowed == expected


# --- ViT-Up on a GPU --------------------------------------------------------------------------------------------------

SIZE = (448, 448)
GB = 10**9


@pytest.fixture(scope="module")
def published() -> ModelBundle:
    """ViT-Up of its published size, for a grid of pixels."""
    bundle, model = described(SIZE, model="vit_small_plus_patch16_dinov3", levels=("448x448",), precision="bf16")
    method = find_method("vit_up")
    weights = UpsamplerWeights.of(method, *method.untrained(model.backbone, 384, 448, bundle.reload))
    (level,) = bundle.spec.levels
    spec = replace(bundle.spec, levels=(replace(level, method="vit_up", digest="random"),))
    return replace(bundle, spec=spec, upsamplers={level.name: weights})


@pytest.mark.parametrize(("free", "most"), [(8 * GB, 4), (24 * GB, 1), (80 * GB, 1), (140 * GB, 1)])
def test_vit_up_needs_few_launches_for_an_image_on_a_gpu(published, free, most, monkeypatch):
    launches, query = [], ViTUpHead.query
    monkeypatch.setattr(ViTUpHead, "query", lambda *given: (launches.append(given[2].shape[1]), query(*given))[1])
    model = published.build("cpu")
    (upsampler,) = model.upsamplers.values()

    with shapes_on_a_gpu(free):
        model.device = torch.device("cuda")
        batch = model.fit_batch(64)
        found = upsampler(torch.empty(1, 3, *SIZE, device="cuda"), features(1), (11,), SIZE)

    assert found.shape == (1, 384, *SIZE)
    assert model.peak_bytes(batch) <= 0.6 * free
    assert len(launches) <= most
    assert sum(launches) == SIZE[0] * SIZE[1]


def features(batch: int) -> PatchFeatures:
    return PatchFeatures(layers={11: torch.empty(batch, 384, 28, 28, device="cuda")}, prefix={}, stride=16)


def test_a_gpu_is_asked_for_its_memory_once_and_for_larger_batches_again(monkeypatch):
    bundle, asked = described(levels=("x1", "x2"))[0], []
    monkeypatch.setattr("pipelines.features.model.allow_within", lambda *_: asked.append(len(asked)) or WORKING_BYTES)
    with pretended_gpu():
        model = bundle.build("cuda")
        counts = [(model(photos(batch)), len(asked))[1] for batch in (2, 1, 2, 3)]
    model = bundle.build("cpu")
    model(photos(2))

    assert counts == [1, 1, 1, 2]
    assert len(asked) == 2  # on a CPU nothing depends on what else the machine does


def test_the_bound_counts_what_each_upsampler_keeps_while_others_work(published):
    one = published.build("cpu")
    (level,) = published.spec.levels
    others = replace(published.spec, levels=(level, replace(level, name="224x224", grid=(224, 224))))
    shared = replace(published, spec=others, upsamplers=dict.fromkeys(("448x448", "224x224"), published.upsamplers[level.name]))
    again = replace(shared, upsamplers={**shared.upsamplers, "224x224": replace(published.upsamplers[level.name])})
    (upsampler,) = one.upsamplers.values()
    rows = 2 * 224 * 224 * 384 * 2

    assert shared.build("cpu").peak_bytes(1) - one.peak_bytes(1) == rows
    assert again.build("cpu").peak_bytes(1) - one.peak_bytes(1) == rows + upsampler.kept_bytes(1)


@pytest.mark.parametrize(
    ("free", "taken", "expected"),
    [
        (80 * GB, 0, 40 * GB),  # two actors that start at once
        (60 * GB, 0, 40 * GB),  # one that is started anew beside the other has what it had before
        (30 * GB, 0, 30 * GB),
        (75 * GB, 5 * GB, 35 * GB),
    ],
)
def test_actors_on_one_gpu_share_its_memory(free, taken, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: taken)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: taken)

    assert free_bytes(torch.device("cuda"), 0.5) == expected
    assert free_bytes(torch.device("cuda")) == free


def test_half_a_gpu_takes_half_the_batch(published):
    models, batches = [published.build("cpu", share) for share in (1.0, 0.5)], []
    with shapes_on_a_gpu(24 * GB):
        for model in models:
            model.device = torch.device("cuda")
            batches.append(model.fit_batch(512))

    assert batches[1] == batches[0] // 2
