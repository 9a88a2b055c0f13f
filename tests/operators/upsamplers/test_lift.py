"""LiFT and resize-convolution: the official code's numbers, at its sizes and beyond; what runs is what was loaded."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from operators.backbone import PatchFeatures, TimmBackbone
from operators.timm_models import create_model, state_arrays, weights_digest
from operators.upsamplers import UpsamplerError, build_net, find_method, learned_upsampler
from operators.upsamplers.lift import LiftNet
from operators.upsamplers.resize_conv import ResizeConvNet
from tests.goldens import GOLDEN, hash_tensor, under
from tests.goldens import tensor_golden as golden

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # LiFT's, of README_lift_vitup.md: float32 noise is 4e-6
EXACT = {"rtol": 0, "atol": 0}


def maps_of(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    return tokens.transpose(1, 2).unflatten(2, grid)


def tokens_of(maps: torch.Tensor) -> torch.Tensor:
    return maps.flatten(2).transpose(1, 2)


def features(maps: torch.Tensor, stride: int) -> PatchFeatures:
    return PatchFeatures(layers={0: maps}, prefix={0: maps.new_zeros(len(maps), 0, maps.shape[1])}, stride=stride)


def random_like(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(config: dict[str, object], seed: int = 0) -> torch.nn.Module:
    """A network whose BatchNorms have statistics of their own, as after training; in eval mode."""
    net = build_net(config, seed).eval()
    with torch.no_grad():
        for i, (key, value) in enumerate(net.state_dict().items()):
            if key.endswith(("running_mean", "bias")):
                value.copy_(0.2 * random_like(*value.shape, seed=i))
            elif key.endswith("running_var"):
                value.copy_(0.5 + random_like(*value.shape, seed=i).abs())
    return net


# --- LiFT's numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lift_forward_p8_rect", "lift_forward_p16_rect", "lift_forward_p16_ragged_66x84"])
def test_a_step_is_that_of_the_official_module(name):
    tensors, config = golden(name)
    net = LiftNet(config["in_channels"], config["patch_size"]).eval()
    net.load_state_dict(under(tensors, "sd/"), strict=True)

    out = net(tensors["in/image"], tensors["in/feats_bchw"])

    torch.testing.assert_close(out, tensors["out/feats_bchw"], **TOLERANCE)
    torch.testing.assert_close(tokens_of(out), tensors["out/tokens_btc"], **TOLERANCE)
    torch.testing.assert_close(net.image_convs_1(tensors["in/image"]), tensors["mid/image_convs_1"], **TOLERANCE)


@pytest.mark.parametrize("model", ["vits16", "vits8", "vitb16", "vitb8"])
def test_published_sizes_give_the_official_tokens(model):
    tensors, config = golden(f"lift_full_dino_{model}")
    settings = {"method": "lift", "channels": config["in_channels"], "patch": config["patch_size"]}
    keys = sorted((key, value.shape) for key, value in build_net(settings).state_dict().items())
    state = {f"module.{key}": hash_tensor(key, config["k0"] + k, tuple(shape)) for k, (key, shape) in enumerate(keys)}
    grid = (config["H"] // config["patch_size"], config["W"] // config["patch_size"])
    maps = maps_of(tensors["in/feats_btc"], grid)

    upsampler = learned_upsampler(settings, state)
    out = upsampler(tensors["in/image"], features(maps, config["patch_size"]), (0,), (2 * grid[0], 2 * grid[1]))

    torch.testing.assert_close(tokens_of(out), tensors["out/tokens_btc"], **TOLERANCE)


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_recursion_gives_what_the_official_script_gives_pass_by_pass(passes):
    tensors, config = golden("lift_recursive_p16")
    settings = {"method": "lift", "channels": config["dim"], "patch": config["patch"]}
    maps = maps_of(tensors["out/back"], (4, 6))

    upsampler = learned_upsampler(settings, under(tensors, "sd/"))
    out = upsampler(tensors["in/image"], features(maps, 16), (0,), (4 * 2**passes, 6 * 2**passes))

    torch.testing.assert_close(tokens_of(out), tensors[f"out/lift_{passes}"], **TOLERANCE)


def test_head_major_maps_go_in_and_come_out_where_the_weights_are_head_minor():
    tensors, config = golden("lift_recursive_p16")
    settings = {"method": "lift", "channels": 24, "patch": 16, "heads": config["heads"]}
    maps, expected = (
        maps_of(tensors[key], grid).unflatten(1, (-1, 3)).transpose(1, 2).flatten(1, 2)
        for key, grid in (("out/back", (4, 6)), ("out/lift_2", (16, 24)))
    )

    out = learned_upsampler(settings, under(tensors, "sd/"))(tensors["in/image"], features(maps, 16), (0,), (16, 24))

    torch.testing.assert_close(out, expected, **TOLERANCE)


def test_sizes_that_the_official_code_takes_are_taken_as_they_are():
    rows = json.loads((GOLDEN / "lift_size_table.json").read_text())

    taken = [LiftNet(8, row["patch"])._fits(row["size"], row["tokens_side"]) for row in rows]

    assert taken == [row["ok"] for row in rows]


@pytest.mark.parametrize(("model", "channels", "patch"), [("vits16", 384, 16), ("vitb8", 768, 8)])
def test_state_dict_has_the_official_names_shapes_and_parameters(model, channels, patch):
    official = json.loads((GOLDEN / f"lift_state_dict_keys_dino_{model}.json").read_text())
    net = LiftNet(channels, patch)

    found = {key: {"shape": list(v.shape), "dtype": str(v.dtype)[6:]} for key, v in net.state_dict().items()}

    assert found == official["keys"]
    assert list(found) == list(official["keys"])
    assert sum(p.numel() for p in net.parameters()) == official["trainable_params"]


@pytest.mark.parametrize(
    ("channels", "patch", "side", "giga_macs"),
    [(384, 16, 224, 0.752), (384, 16, 448, 3.010), (384, 8, 224, 2.891), (768, 16, 224, 2.735), (768, 8, 224, 10.819)],
)
def test_a_step_costs_the_true_number_of_multiply_adds(channels, patch, side, giga_macs):
    with torch.device("meta"):
        net = LiftNet(channels, patch).eval()
        image, maps = torch.empty(1, 3, side, side), torch.empty(1, channels, side // patch, side // patch)

    with FlopCounterMode(display=False) as counter:
        net(image, maps)

    assert counter.get_total_flops() / 2e9 == pytest.approx(giga_macs, abs=6e-4)


PARAMETERS = {
    (32, 0): 4_417_296, (32, 1): 4_426_608, (64, 0): 4_744_096, (64, 1): 4_781_152, (128, 0): 5_520_576, (128, 1): 5_668_416,
    (192, 0): 6_460_896, (192, 1): 6_793_248, (200, 0): 6_589_956, (200, 1): 6_950_556, (208, 0): 6_721_576,
    (208, 1): 7_111_576, (224, 0): 6_992_496, (224, 1): 7_444_752,
}  # fmt: skip
"""Of the official module for 768 channels, whose image encoder has so many channels and so many further convolutions."""


def test_wider_and_imageless_variants_have_the_parameters_we_say():
    with torch.device("meta"):
        found = {each: LiftNet(768, 16, image_width=each[0], image_convs=each[1]) for each in PARAMETERS}
        imageless = LiftNet(384, 16, image_branch=False)

    assert {each: sum(p.numel() for p in net.parameters()) for each, net in found.items()} == PARAMETERS
    assert found[200, 1].image_convs_1[6].weight.shape == (200, 200, 3, 3)
    assert not any("image" in key for key in imageless.state_dict())


@pytest.mark.parametrize(
    "encoder", [{"image_width": 8, "image_convs": 2}, {"image_width": 8}, {"image_convs": 1}, {"wide": True}]
)
def test_official_files_tell_their_encoder_by_their_shapes(encoder):
    lift, backbone = find_method("lift"), TimmBackbone(create_model("test_vit.r160_in1k", (160, 160), None, 0))
    made = lift.parse({"method": "lift", "channels": 64, "patch": 16, **encoder})

    settings, state = lift.read(lift.initialised(made, 3).state_dict(), None, backbone)

    assert settings == made
    assert state.keys() == lift.initialised(made).state_dict().keys()


def test_documents_say_wide_where_the_first_ones_did():
    lift = find_method("lift")
    plain, wide, seven, spelled = (
        lift.parse({"channels": 64, "patch": 16, **encoder})
        for encoder in ({}, {"wide": True}, {"image_width": 20, "image_convs": 1}, {"image_width": 16, "image_convs": 1})
    )

    assert wide == spelled
    assert lift.to_json(wide) == {**lift.to_json(plain), "wide": True}
    assert lift.identity(wide) == {**lift.identity(plain), "wide": True}
    assert lift.to_json(seven) == {**lift.to_json(plain), "image_width": 20, "image_convs": 1}
    for each in (plain, wide, seven):
        assert lift.parse(lift.to_json(each)) == each


@pytest.mark.parametrize(
    ("encoder", "said"),
    [
        ({"wide": True, "image_width": 200}, "wide says what image_width is, too"),
        ({"image_width": 0}, "image_width must be a whole number of at least 1, got 0"),
        ({"image_convs": -1}, "image_convs must be a whole number of at least 0, got -1"),
    ],
)
def test_encoders_that_make_no_sense_are_refused(encoder, said):
    with pytest.raises(UpsamplerError, match=said):
        find_method("lift").parse({"channels": 64, "patch": 16, **encoder})


# --- a start as the enlargement ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", [{}, {"image_branch": False}, {"image_width": 8, "image_convs": 1}], ids=str)
def test_a_start_as_the_enlargement_enlarges_what_its_channels_hold(encoder):
    """Maps of 12 components of unequal variances among 32 channels, whose mean isn't zero; 16 can be held."""
    net = build_net({"method": "lift", "channels": 32, "patch": 16, **encoder})
    mixed = random_like(12, 32, seed=1) * torch.linspace(3, 0.3, 12)[:, None]
    maps = 4 * random_like(32, 1, 1, seed=2) + torch.einsum("bkyx,kc->bcyx", random_like(24, 12, 6, 7, seed=3), mixed)
    images = random_like(24, 3, 96, 112, seed=4)

    net.start_enlarging(images, maps)

    wanted = F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False)[..., 1:-1, 1:-1]
    deviation = wanted - wanted.mean(dim=(0, 2, 3), keepdim=True)
    for made in (net(images, maps), net.eval()(images, maps), net(-images, maps)):
        missed = (made.detach()[..., 1:-1, 1:-1] - wanted).square().mean() / deviation.square().mean()
        assert missed < 0.01


def test_more_components_than_channels_hold_leave_the_smallest_out():
    net = build_net({"method": "lift", "channels": 8, "patch": 16})
    scales = torch.tensor([8.0, 7, 6, 5, 1, 1, 1, 1])[:, None, None]
    maps, images = scales * random_like(16, 8, 8, 8), random_like(16, 3, 128, 128)

    net.start_enlarging(images, maps)

    wanted = F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False)[..., 1:-1, 1:-1]
    missed = (net(images, maps)[..., 1:-1, 1:-1] - wanted).square().mean(dim=(0, 2, 3)) / wanted.square().mean(dim=(0, 2, 3))
    assert missed[:4].max() < 0.05
    assert missed[4:].min() > 0.5


def test_what_starts_as_the_enlargement_learns_from_the_image():
    net = build_net({"method": "lift", "channels": 16, "patch": 16})
    images, maps = random_like(4, 3, 64, 64), random_like(4, 16, 4, 4)
    net.start_enlarging(images, maps)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)

    for _ in range(2):  # the encoder's turn comes when what sees it has weights
        optimiser.zero_grad()
        net(images, maps).square().mean().backward()
        optimiser.step()

    assert all(each.grad.abs().max() > 0 for name, each in net.named_parameters() if name.endswith("weight"))


# --- sizes that the official code refuses -----------------------------------------------------------------------------


def test_56_pixels_at_patch_16_lose_two_pixels_a_border_where_asked():
    net = trained({"method": "lift", "channels": 8, "patch": 16, "border_crop": True})
    images, maps = random_like(1, 3, 56, 56), random_like(1, 8, 3, 3)

    out = net(images, maps)

    assert out.shape == (1, 8, 6, 6)
    torch.testing.assert_close(out, net(images[..., 2:-2, 2:-2], maps), **EXACT)


@pytest.mark.parametrize(
    ("patch", "size", "grid", "pixels"),
    [
        (16, (56, 56), (3, 3), (48, 48)),
        (16, (224, 112), (27, 13), (432, 208)),
        (8, (36, 44), (4, 5), (32, 40)),
        (14, (70, 98), (5, 7), (80, 112)),
        (32, (64, 96), (2, 3), (64, 96)),
        (4, (20, 12), (5, 3), (40, 24)),
    ],
)
def test_other_images_are_brought_to_the_size_that_fits(patch, size, grid, pixels):
    net = trained({"method": "lift", "channels": 8, "patch": patch})
    images, maps = random_like(2, 3, *size), random_like(2, 8, *grid)
    resized = F.interpolate(images, size=pixels, mode="bilinear", align_corners=False)

    out = net(images, maps)

    assert out.shape == (2, 8, 2 * grid[0], 2 * grid[1])
    torch.testing.assert_close(out, net(resized, maps), **EXACT)


def test_overlapping_patches_are_given_the_pixels_that_their_cells_tile():
    config = {"method": "lift", "channels": 8, "patch": 16}
    net = trained(config)
    images, maps = random_like(1, 3, 64, 48), random_like(1, 8, 7, 5)
    tiled = F.interpolate(images[..., 4:60, 4:44], size=(112, 80), mode="bilinear", align_corners=False)

    out = learned_upsampler(config, net.state_dict())(images, features(maps, 8), (0,), (14, 10))

    torch.testing.assert_close(out, net(tiled, maps), **TOLERANCE)


@pytest.mark.parametrize("patch", [8, 14, 16])
def test_cells_tile_the_area_of_the_source(patch):
    """Weights that pass one channel through give nearest-neighbour: each cell becomes 2x2 cells in its own place."""
    config = {"method": "lift", "channels": 2, "patch": patch}
    state = {key: value * 0 for key, value in build_net(config).state_dict().items()}
    state["up1.up.weight"][0, 0] = state["outc.weight"][0, 0] = 1
    for i in (0, 3):
        state[f"up1.conv_1.double_conv.{i}.weight"][0, 0, 1, 1] = 1
        state[f"up1.conv_1.double_conv.{i + 1}.weight"][:] = 1
        state[f"up1.conv_1.double_conv.{i + 1}.running_var"][:] = 1
    maps = random_like(1, 2, 3, 5).abs()

    out = learned_upsampler(config, state)(random_like(1, 3, 48, 80), features(maps, 16), (0,), (12, 20))

    nearest = maps[:, :1].repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    torch.testing.assert_close(out[:, :1], nearest, **TOLERANCE)


# --- what runs is what was loaded -------------------------------------------------------------------------------------

VARIANTS = [
    {"method": "lift"},
    {"method": "lift", "image_branch": False},
    {"method": "lift", "wide": True},
    {"method": "lift", "image_width": 20, "image_convs": 2},
    {"method": "lift", "channels": 31},
    {"method": "resize_conv", "kernel": 3},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_folded_copy_gives_what_the_network_gives(variant):
    config = {"channels": 32, "patch": 16, **variant}
    net = trained(config)
    images, maps = random_like(3, 3, 80, 48), random_like(3, config["channels"], 5, 3)

    out = learned_upsampler(config, net.state_dict())(images, features(maps, 16), (0,), (10, 6))

    torch.testing.assert_close(out, net(images, maps), rtol=1e-4, atol=1e-5)


def test_bf16_stays_within_its_rounding_and_comes_out_as_float32():
    config = {"method": "lift", "channels": 32, "patch": 16}
    net = trained(config)
    images, maps = random_like(2, 3, 64, 64), random_like(2, 32, 4, 4)

    out = learned_upsampler(config, net.state_dict(), "bf16")(images, features(maps.bfloat16(), 16), (0,), (16, 16))
    exact = learned_upsampler(config, net.state_dict())(images, features(maps, 16), (0,), (16, 16))

    assert out.dtype == torch.float32
    assert (out - exact).norm() / exact.norm() < 0.02  # 8 bits, seven layers deep, two passes


@pytest.mark.parametrize("method", ["lift", "resize_conv", "jbu"])
def test_weights_are_loaded_as_they_are(method):
    config = {"method": method, "channels": 8, "patch": 16}
    net = build_net(config, seed=3)

    loaded = digest_of(config, net.state_dict())

    assert loaded == weights_digest(state_arrays(net))
    assert learned_upsampler(config, net.state_dict()).layers == ()
    assert loaded != digest_of(config, build_net(config, seed=4).state_dict())


def digest_of(config: dict, state: dict[str, torch.Tensor]) -> str:
    """Of the weights as they are loaded."""
    method = find_method(config["method"])
    return weights_digest(state_arrays(method.loaded(method.parse(config), state)))


def test_images_are_split_where_their_activations_would_be_too_many(monkeypatch):
    config = {"method": "lift", "channels": 8, "patch": 16}
    upsampler = learned_upsampler(config, trained(config).state_dict())
    images, maps = random_like(5, 3, 64, 64), random_like(5, 8, 4, 4)
    together, bound = upsampler(images, features(maps, 16), (0,), (8, 8)), upsampler.peak_bytes(5, 8, (8, 8))

    monkeypatch.setattr(type(upsampler), "working_bytes", 2 * upsampler._bytes_per_image((8, 8)))
    split = upsampler(images, features(maps, 16), (0,), (8, 8))

    torch.testing.assert_close(split, together, rtol=1e-5, atol=1e-5)
    assert upsampler.peak_bytes(5, 8, (8, 8)) < bound


def test_building_is_seeded_and_leaves_the_global_generator_alone():
    config = {"method": "lift", "channels": 8, "patch": 16}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)

    first, again, other = build_net(config, 1), build_net(config, 1), build_net(config, 2)

    assert torch.rand(1) == expected
    assert torch.equal(first.outc.weight, again.outc.weight)
    assert not torch.equal(first.outc.weight, other.outc.weight)
    assert first.training


# --- what is refused --------------------------------------------------------------------------------------------------


def upsampler_and_input(**config: object) -> tuple[object, torch.Tensor, PatchFeatures]:
    settings = {"method": "lift", "channels": 8, "patch": 16, **config}
    upsampler = learned_upsampler(settings, build_net(settings).state_dict())
    return upsampler, random_like(1, 3, 64, 64), features(random_like(1, 8, 4, 4), 16)


@pytest.mark.parametrize("grid", [(4, 4), (2, 2), (12, 12), (8, 16), (9, 8), (28, 28)])
def test_only_powers_of_two_of_the_grid_are_given(grid):
    upsampler, images, maps = upsampler_and_input()

    with pytest.raises(UpsamplerError, match=f"4x4 cells, not {grid[0]}x{grid[1]}"):
        upsampler(images, maps, (0,), grid)


def test_other_channels_than_it_was_made_for_are_refused():
    upsampler, images, maps = upsampler_and_input()
    twice = PatchFeatures(layers={0: maps.layers[0], 1: maps.layers[0]}, prefix={}, stride=16)

    with pytest.raises(UpsamplerError, match=r"made for maps of 8 channels; layers \(0, 1\) have 16"):
        upsampler(images, twice, (0, 1), (8, 8))


def test_a_stack_is_not_repeated():
    upsampler, images, maps = upsampler_and_input(method="resize_conv", stages=2)

    with pytest.raises(UpsamplerError, match="has 2 stages: x4 at most"):
        upsampler(images, maps, (0,), (32, 32))


def test_weights_that_do_not_fit_are_named():
    config = {"method": "lift", "channels": 8, "patch": 16}
    state = build_net(config).state_dict()
    state["outc.wait"] = state.pop("outc.weight")
    state["up1.up.bias"] = torch.zeros(3)

    with pytest.raises(UpsamplerError) as error:
        learned_upsampler(config, state)

    assert "1 missing: outc.weight" in str(error.value)
    assert "1 unexpected: outc.wait" in str(error.value)
    assert "1 of another shape: up1.up.bias (3,) instead of (20,)" in str(error.value)


def test_batchnorm_counters_may_be_missing():
    config = {"method": "lift", "channels": 8, "patch": 16}
    state = build_net(config).state_dict()
    without = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}

    assert digest_of(config, without) == digest_of(config, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"method": "lfit"},
            "no upsampler is called 'lfit'; there are: bilinear, bicubic, nearest, average, lift, resize_conv, jbu",
        ),
        ({"patch": None}, "lack patch"),
        ({"stride": 8}, "no such upsampler settings: stride; there are: channels, patch"),
        ({"radius": 5}, "radius=5 is no setting of lift"),
        ({"method": "jbu", "heads": 6}, "heads=6 is no setting of jbu"),
        ({"heads": 5}, "8 channels don't divide into 5 heads"),
        ({"channels": 0}, "channels must be a whole number of at least 1, got 0"),
        ({"channels": "8"}, "channels must be a whole number of at least 1, got '8'"),
        ({"channels": 1}, "at least 2 channels"),
        ({"method": "resize_conv", "kernel": 2}, "kernel must be odd, got 2"),
    ],
)
def test_settings_that_make_no_network_are_refused(change, message):
    with pytest.raises(UpsamplerError, match=message):
        build_net({"method": "lift", "channels": 8, "patch": 16, **change})


# --- resize-convolution -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3])
def test_resize_convolution_is_that_of_featup(kernel):
    tensors, config = golden(f"rc_featup_resize_conv_k{kernel}")
    settings = {"method": "resize_conv", "channels": config["dim"], "patch": 16, "kernel": kernel, "stages": 4}
    maps = tensors["in.features"]
    h, w = maps.shape[-2:]

    upsampler = learned_upsampler(settings, under(tensors, "w."))
    once, full = (upsampler(tensors["in.image"], features(maps, 16), (0,), (h * n, w * n)) for n in (2, 16))

    torch.testing.assert_close(once, tensors["mid.x2"], rtol=5e-5, atol=5e-5)
    torch.testing.assert_close(full, tensors["out.features"], rtol=5e-5, atol=5e-5)


def test_published_resize_convolution_has_its_parameters():
    official = json.loads((GOLDEN / "jbu_state_dict_keys.json").read_text())["resize_conv_dim384_k1"]
    net = ResizeConvNet(384, 1, 4)

    found = {key: [list(v.shape), str(v.dtype)[6:]] for key, v in net.state_dict().items()}

    assert found == official["state_dict"]
    assert sum(p.numel() for p in net.parameters()) == official["params"] == 595_968
