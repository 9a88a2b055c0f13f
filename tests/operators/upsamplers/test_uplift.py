"""UPLiFT: its own code's steps, its files, grids of any size, and stripes within a memory."""

import itertools
import json
import math

import pytest
import safetensors
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from operators.backbone import PatchFeatures, TimmBackbone
from operators.upsamplers import UpsamplerError, find_method
from operators.upsamplers.queried import QueriedUpsampler
from operators.upsamplers.uplift import Attender, Uplift, UpliftNet, UpliftSettings, planned
from tests.contracts.upsampler import small_vit
from tests.goldens import golden_file, tensor_golden, under

CLOSE = {"rtol": 0, "atol": 2e-4}
FILES = ["uplift_small_p14_iters4", "uplift_small_p16_iters3", "uplift_published_dinov2s14", "uplift_published_dinov3splus16"]


def golden(name: str) -> tuple[dict[str, torch.Tensor], UpliftSettings]:
    tensors, _ = tensor_golden(name)
    with safetensors.safe_open(golden_file(f"{name}.safetensors"), "pt") as file:
        said = file.metadata()
    config = json.loads(said["uplift_cfg"])
    encoder, decoder = config["encoder"], config["decoder"]
    settings = UpliftSettings(
        channels=int(said["in_channels"]),
        patch=int(said["patch_size"]),
        widths=tuple(encoder[f"block_{i}"]["hc"][0] for i in range(encoder["down_steps"] + 1)),
        decoder=tuple(decoder[f"block_{i}"]["hc"][0] for i in range(2)),
        neighbours=config["attender"],
    )
    return {key: tensor.float() for key, tensor in tensors.items()}, settings


def network(tensors: dict[str, torch.Tensor], settings: UpliftSettings) -> UpliftNet:
    return Uplift("uplift").loaded(settings, under(tensors, "w.")).eval()


def features(maps: torch.Tensor, stride: int) -> PatchFeatures:
    return PatchFeatures(layers={0: maps}, prefix={0: maps.new_zeros(len(maps), 0, maps.shape[1])}, stride=stride)


def upsampler(settings: UpliftSettings, state: dict[str, torch.Tensor] | None = None, precision="fp32") -> QueriedUpsampler:
    method = Uplift("uplift")
    return method.build(settings, state or method.initialised(settings).state_dict(), precision, lambda: None)


def random_input(grid: tuple[int, int], channels: int, patch: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, grid[0] * patch, grid[1] * patch, generator=generator)
    return image, torch.randn(1, channels, *grid, generator=generator)


@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_every_step_is_the_official_modules(name):
    tensors, settings = golden(name)
    image, maps, net = tensors["in.image"], tensors["in.features"], network(*golden(name))
    steps = [key for key in tensors if key.startswith("out.")]

    assert len(steps) >= 2
    for key in steps:
        grid = tuple(tensors[key].shape[2:])
        torch.testing.assert_close(net(image, maps, grid), tensors[key], **CLOSE, msg=lambda text, key=key: f"{key}: {text}")
    if settings.patch == 14:
        size = tuple(tensors["mid.encoder_input"].shape[2:])
        given = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
        torch.testing.assert_close(given, tensors["mid.encoder_input"], rtol=0, atol=1e-6)
        assert planned(tuple(maps.shape[2:]), size, grid).image == net._encoder_size(tuple(image.shape[2:]))


@torch.no_grad()
def test_the_encoders_last_map_is_the_official_modules():
    tensors, _ = golden("uplift_small_p14_iters4")
    net, expected = network(*golden("uplift_small_p14_iters4")), tensors["mid.encoder_last"]
    size = tuple(expected.shape[2:])
    plan = planned(size, size, (2 * size[0], 2 * size[1]))  # a first step that reads every pixel

    found, _ = net.encoded(tensors["mid.encoder_input"], plan, *net._axes(plan, expected.device))

    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("count", [5, 9, 13, 17, 25])
@torch.no_grad()
def test_neighbours_and_their_mean_are_the_official_modules(count):
    tensors = under(tensor_golden("uplift_local_attender")[0], f"n{count}.")
    attender = Attender(tensors["guide"].shape[1], count)
    attender.load_state_dict(under(tensors, "conv1.") and {k: v for k, v in tensors.items() if k.startswith("conv1.")})

    assert attender.offsets == [tuple(each) for each in tensors["offsets_dy_dx"].tolist()]
    torch.testing.assert_close(attender(tensors["guide"], tensors["value"]), tensors["out"], rtol=0, atol=5e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", FILES)
def test_half_precision_is_close_to_the_official_output(name, precision):
    tensors, settings = golden(name)
    last = max(key for key in tensors if key.startswith("out.step"))
    grid = tuple(tensors[last].shape[2:])

    found = upsampler(settings, under(tensors, "w."), precision)(
        tensors["in.image"], features(tensors["in.features"], settings.patch), (0,), grid
    )

    torch.testing.assert_close(found, tensors[last], rtol=0, atol=2e-2)


def test_the_published_network_has_the_published_names_and_parameters():
    listed = json.loads(golden_file("uplift_state_dict_keys.json").read_text())
    net = Uplift("uplift").initialised(UpliftSettings(channels=384, patch=14))

    assert {len(each["state_dict"]) for each in listed.values()} == {72}
    for each in listed.values():
        assert each["params"] == sum(parameter.numel() for parameter in net.parameters()) == 789_521
        assert {name: list(t.shape) for name, t in net.state_dict().items()} == {n: s for n, (s, _) in each["state_dict"].items()}


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("grid", [(13, 17), (12, 31), (9, 8)])
def test_other_grids_are_the_next_power_of_two_resized(grid, antialias):
    base = (4, 8) if grid != (9, 8) else (5, 4)
    settings = UpliftSettings(channels=6, patch=16, antialias=antialias)
    image, maps = random_input(base, 6)
    large = 2 ** math.ceil(math.log2(max(to / of for of, to in zip(base, grid, strict=True))))
    made = upsampler(settings)

    found = made(image, features(maps, 16), (0,), grid)

    whole = made(image, features(maps, 16), (0,), (base[0] * large, base[1] * large))
    expected = F.interpolate(whole, size=grid, mode="bilinear", align_corners=False, antialias=antialias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("base", "grid", "pixels"),
    [((12, 9), (48, 36), 16), ((12, 9), (31, 30), 16), ((9, 14), (36, 56), 14), ((11, 7), (44, 28), 13), ((5, 6), (80, 96), 5)],
)
def test_stripes_give_what_the_whole_gives(base, grid, pixels):
    """13 and 5 pixels a cell: what `nearest` reads is unevenly spaced, and a pixel is read more than once."""
    settings = UpliftSettings(channels=20, patch=14 if pixels == 14 else 16)
    image, maps = random_input(base, 20, pixels)
    whole, striped = upsampler(settings), upsampler(settings)
    whole.allow(2**32)
    striped.allow(1)

    found = striped(image, features(maps, pixels), (0,), grid)

    torch.testing.assert_close(found, whole(image, features(maps, pixels), (0,), grid), rtol=1e-5, atol=1e-5)


SMALL = {"widths": (4, 4, 4, 8, 8), "decoder": (8, 8)}


@pytest.mark.parametrize(
    ("base", "grid", "settings", "pixels", "allowed"),
    [
        ((28, 28), (448, 448), {"channels": 384, **SMALL}, 16, 2**26),
        ((28, 28), (448, 448), {"channels": 768, **SMALL}, 16, 2**28),
        ((28, 14), (112, 56), {"channels": 384}, 16, 1),
        ((10, 14), (40, 50), {"channels": 384, "patch": 14}, 14, 2**24),
        ((128, 128), (192, 192), {"channels": 48, **SMALL}, 16, 2**24),
        ((14, 14), (112, 112), {"channels": 64}, 13, 2**24),
    ],
    ids=["S to 448", "B to 448", "smallest stripes", "patch 14", "2048 px", "uneven"],
)
def test_memory_stays_under_what_is_declared(base, grid, settings, pixels, allowed):
    """The narrow encoders keep the time short; what they'd take is measured beside them."""
    settings = UpliftSettings(**{"patch": 16, **settings})
    made, (image, maps) = upsampler(settings), random_input(base, settings.channels, pixels)
    made.allow(allowed)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        out = made(image, features(maps, pixels), (0,), grid)

    changes = [event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak, declared = max(itertools.accumulate(changes)), made.call_bytes(1, settings.channels, base, tuple(image.shape[2:]), grid)
    assert math.prod(out.shape) * 4 <= peak <= declared
    assert declared < 8 * peak


def official() -> tuple[dict[str, torch.Tensor], TimmBackbone]:
    """A file as it is published, and a backbone of as many channels."""
    tensors, settings = golden("uplift_small_p16_iters3")
    return under(tensors, "w."), TimmBackbone(small_vit(settings.channels))


def test_an_official_file_tells_its_settings():
    (state, backbone), (_, settings) = official(), golden("uplift_small_p16_iters3")

    found, loaded = Uplift("uplift").read(state, None, backbone)

    assert found == settings
    assert all(torch.equal(loaded[name], state[name]) for name in loaded if not name.endswith("tracked"))


def test_wrong_files_and_features_are_refused():
    method, (state, backbone) = find_method("uplift"), official()

    with pytest.raises(UpsamplerError, match="diffusion model's VAE"):
        method.read({**state, "refiner.conv.weight": torch.zeros(1)}, None, backbone)
    with pytest.raises(UpsamplerError, match="final norm: use --facet token"):
        method.read(state, None, TimmBackbone(backbone.model, facet="key"))
    with pytest.raises(UpsamplerError, match="made for a backbone of [0-9]+ channels; this one has 8"):
        method.read(state, None, TimmBackbone(small_vit(8)))
    with pytest.raises(UpsamplerError, match="1 missing: decoder.up_1.up.bias"):
        method.read({name: t for name, t in state.items() if name != "decoder.up_1.up.bias"}, None, backbone)
    with pytest.raises(UpsamplerError, match="neighbours must be one of 5, 9, 13, 17, 25, got 7"):
        UpliftSettings(channels=4, patch=16, neighbours=7)
    with pytest.raises(UpsamplerError, match="widths must be at least 2 numbers of channels"):
        UpliftSettings(channels=4, patch=16, widths=(16,))


def test_wrong_maps_and_grids_are_refused():
    settings = UpliftSettings(channels=6, patch=16)
    image, maps = random_input((4, 4), 5)

    with pytest.raises(UpsamplerError, match="made for maps of 6 channels"):
        upsampler(settings)(image, features(maps, 16), (0,), (8, 8))
    with pytest.raises(UpsamplerError, match="grids of at least the backbone's 4x4 cells, not 8x3"):
        upsampler(settings)(image, features(maps[:, :1].expand(-1, 6, -1, -1), 16), (0,), (8, 3))
