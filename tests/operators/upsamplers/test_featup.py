"""FeatUp: the official code's outputs from official files, any grid up to x16, rows made some at a time, files that don't fit."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from operators.backbone import PatchFeatures, TimmBackbone
from operators.upsamplers import Upsampler, UpsamplerError, find_method
from operators.upsamplers.featup import FeatUpNet
from operators.upsamplers.recursive import DoublingNet
from tests.contracts.upsampler import small_vit
from tests.goldens import tensor_golden, under

STACK = {"rtol": 2e-4, "atol": 2e-4}
FEATUP = find_method("featup")


def features(maps: torch.Tensor) -> PatchFeatures:
    return PatchFeatures(layers={0: maps}, prefix={0: maps.new_zeros(len(maps), 0, maps.shape[1])}, stride=16)


def lightning(stack: dict[str, torch.Tensor], *, norm: bool = True) -> dict[str, torch.Tensor]:
    """As official files have it: the upsampler, the backbone beside it, and what training alone had."""
    model, channels = "model.0.model" if norm else "model.model", len(stack["fixup_proj.1.bias"])
    beside = {
        f"{model}.patch_embed.proj.weight": torch.zeros(8, 3, 16, 16),
        f"{model}.blocks.0.mlp.fc1.bias": torch.zeros(8),
        "downsampler.blur.weight": torch.zeros(1),
        "scale_net.net.weight": torch.zeros(1),
    }
    norms = {"model.1.norm.weight": torch.ones(channels), "model.1.norm.bias": torch.zeros(channels)} if norm else {}
    return {**{f"upsampler.{name}": value for name, value in stack.items()}, **beside, **norms}


def backbone(**given: object) -> TimmBackbone:
    return TimmBackbone(small_vit(8), **given)


def read(state: dict[str, torch.Tensor]) -> tuple[object, Upsampler]:
    settings, weights = FEATUP.read(state, None, backbone())
    return settings, FEATUP.build(settings, weights, "fp32", lambda: small_vit(8))


def untrained(channels: int, name: str = "featup", **given: object) -> tuple[DoublingNet, Upsampler]:
    method = find_method(name)
    settings = method.parse({"channels": channels, "patch": 16, **given})
    net = method.initialised(settings).eval()
    return net, method.build(settings, net.state_dict(), "fp32", lambda: small_vit(8))


# --- official files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["jbu_stack_small", "jbu_stack_published_dim384"])
def test_a_file_without_norm_gives_what_the_official_code_gives(name):
    tensors, config = tensor_golden(name)
    stack = {key: value.float() for key, value in under(tensors, "w.").items()}
    h, w = tensors["in.features"].shape[-2:]

    settings, upsampler = read(lightning(stack, norm=False))
    out = upsampler(tensors["in.image"], features(tensors["in.features"]), (0,), (16 * h, 16 * w))

    assert (settings.channels, settings.norm, settings.stages, settings.radius) == (config["feat_dim"], False, 4, 3)
    torch.testing.assert_close(out, tensors["out.features"], **STACK)


def test_a_file_with_norm_gives_what_the_official_code_gives():
    tensors, _ = tensor_golden("deap_featup_readout")
    state = {key: value for key, value in under(tensors, "sd/").items() if not key.startswith("decoder.")}
    maps = tensors["in/backbone_map"]

    settings, upsampler = read(state | {"model.0.model.blocks.0.mlp.fc1.bias": torch.zeros(8)})
    net = FEATUP.loaded(settings, FEATUP.read(state, None, backbone())[1])
    out = upsampler(tensors["mid/normalised_image"], features(maps), (0,), (80, 80))

    assert settings.norm
    torch.testing.assert_close(net.begun(maps), tensors["mid/channel_normed"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, tensors["out/hr_features"], **STACK)


def test_published_sizes_have_their_parameters():
    counts = [sum(p.numel() for p in FeatUpNet(384, norm=norm).parameters()) for norm in (False, True)]

    assert counts == [172_772, 172_772 + 768]


@pytest.mark.parametrize(("radius", "key_dim", "stages"), [(1, 16, 4), (2, 32, 3), (3, 8, 1)])
def test_the_shapes_of_a_file_tell_its_settings(radius, key_dim, stages):
    stack = FeatUpNet(8, radius, stages, key_dim, norm=False).state_dict()

    settings, _ = read(lightning(stack))

    assert (settings.radius, settings.key_dim, settings.stages, settings.norm) == (radius, key_dim, stages, True)


def test_a_bare_stack_has_no_norm():
    settings, _ = read(FeatUpNet(8, norm=False).state_dict())

    assert not settings.norm


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"head.weight": torch.zeros(1)},
            r"1 weights are neither upsampler\.\* .* nor the backbone's model\.0\.\*: head\.weight",
        ),
        ({"model.2.weight": torch.zeros(1)}, r"nor the backbone's model\.0\.\*: model\.2\.weight"),
        ({"upsampler.up5.weight": torch.zeros(1)}, r"1 unexpected: up5\.weight"),
        ({"upsampler.up3.range_temp": None}, r"1 missing: up3\.range_temp"),
        ({"upsampler.fixup_proj.1.weight": None}, "no whole stack of joint bilateral filters: 'fixup_proj.1.weight' is missing"),
        ({"model.1.norm.bias": None}, r"1 missing: norm\.bias"),
        ({"model.1.norm.weight": torch.ones(4)}, r"norm\.weight \(4,\) instead of \(8,\)"),
        (
            {"model.0.model.patch_embed.proj.weight": torch.zeros(8, 3, 14, 14)},
            "featup was trained with a backbone of patch 14, not 16: use that",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(change, message):
    state = lightning(FeatUpNet(8, norm=False).state_dict()) | change

    with pytest.raises(UpsamplerError, match=message):
        FEATUP.read({name: value for name, value in state.items() if value is not None}, None, backbone())


@pytest.mark.parametrize("given", [{"facet": "key"}, {"norm": False}])
def test_maps_before_the_final_norm_are_refused(given):
    with pytest.raises(UpsamplerError, match="featup takes what the model gives after its final norm: use --facet token"):
        FEATUP.read(lightning(FeatUpNet(8, norm=False).state_dict()), None, backbone(**given))


# --- grids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_it_stops_early_and_corrects_what_it_has(steps):
    tensors, _ = tensor_golden("jbu_stack_small")
    _, upsampler = read(under(tensors, "w."))
    stage = tensors[f"mid.up{steps}"]

    out = upsampler(tensors["in.image"], features(tensors["in.features"]), (0,), tuple(stage.shape[-2:]))

    torch.testing.assert_close(out, stage + 0.1 * upsampler.net.fixup_proj(stage), **STACK)


@pytest.mark.parametrize(("grid", "steps"), [((56, 84), 4), ((54, 82), 4), ((33, 50), 4), ((9, 13), 2), ((5, 8), 1)])
@pytest.mark.parametrize("allowed", [2**28, 1])
def test_a_grid_between_two_steps_is_the_finer_one_resampled_bilinearly(grid, steps, allowed):
    net, upsampler = untrained(6)
    images, maps = torch.randn(2, 3, 56, 84), torch.randn(2, 6, 4, 6)
    upsampler.allow(allowed)

    out = upsampler(images, features(maps), (0,), grid)

    expected = F.interpolate(net(images, maps, steps), size=grid, mode="bilinear", align_corners=False)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("base", "grid", "message"),
    [
        ((4, 4), (4, 4), "more than the backbone's 4x4 cells, up to 16 times as many a side, not 4x4"),
        ((4, 4), (65, 64), "up to 16 times as many a side, not 65x64"),
        ((4, 4), (2, 8), "more than the backbone's 4x4 cells"),
        ((4, 4), (64, 8), "enlarges both sides alike; 64x8 has another shape than the backbone's 4x4 cells"),
        ((1, 4), (16, 64), "featup of radius 3 needs more cells than 1x4"),
    ],
)
def test_grids_that_can_not_be_had_are_refused(base, grid, message):
    _, upsampler = untrained(4)

    with pytest.raises(UpsamplerError, match=message):
        upsampler(torch.randn(1, 3, 16 * base[0], 16 * base[1]), features(torch.randn(1, 4, *base)), (0,), grid)


# --- rows some at a time ----------------------------------------------------------------------------------------------

STRIPED = [
    ("featup", {}, 16),
    ("featup", {"radius": 5, "norm": False}, 4),
    ("jbu", {"radius": 2}, 8),
    ("jbu", {"stages": 3}, 8),
    ("resize_conv", {"kernel": 5}, 4),
    ("resize_conv", {"stages": 2}, 4),
    ("resize_conv", {"kernel": 3, "stages": 2}, 4),
]


@pytest.mark.parametrize(("name", "given", "factor"), STRIPED)
@pytest.mark.parametrize("allowed", [1, 150_000, 400_000])
def test_rows_made_some_at_a_time_are_those_of_the_whole(name, given, factor, allowed):
    net, upsampler = untrained(8, name, **given)
    images, maps = torch.randn(2, 3, 80, 64), torch.randn(2, 8, 5, 4)
    grid = (5 * factor, 4 * factor)
    whole = upsampler(images, features(maps), (0,), grid)
    upsampler.allow(allowed)

    out = upsampler(images, features(maps), (0,), grid)

    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-5)
    if net.stages > 1:
        torch.testing.assert_close(whole, net(images, maps, factor.bit_length() - 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "given", "factor", "allowed"),
    [
        *((*each, 1) for each in (*STRIPED, ("featup", {}, 9))),
        *((*each, 2**20) for each in (STRIPED[1], STRIPED[3], STRIPED[6])),  # a method each
    ],
)
def test_a_call_keeps_to_what_it_declares_which_is_less_where_less_is_allowed(name, given, factor, allowed):
    _, upsampler = untrained(64, name, **given)
    h, w = base = (8, 10) if factor < 8 else (4, 5)  # later steps take most of the time
    images, maps, grid = torch.randn(2, 3, 16 * h, 16 * w), torch.randn(2, 64, h, w), (factor * h, factor * w)
    upsampler.allow(allowed)
    upsampler(images, features(maps), (0,), grid)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        out = upsampler(images, features(maps), (0,), grid)

    changes = [event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    declared = upsampler.call_bytes(2, 64, base, (16 * h, 16 * w), grid)
    assert out.nbytes <= max(itertools.accumulate(changes)) <= declared <= upsampler.peak_bytes(2, 64, grid)
    upsampler.allow(2**40)
    assert declared < upsampler.call_bytes(2, 64, base, (16 * h, 16 * w), grid)
