"""AnyUp: its own code's windows, inner maps and outputs in both variants, its files, and grids in tiles."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from operators.backbone import PatchFeatures, TimmBackbone
from operators.upsamplers import UpsamplerError, find_method
from operators.upsamplers.anyup import AnyUp, AnyUpNet, Unification, window_counts, windows
from operators.upsamplers.pixels import average, encode
from operators.upsamplers.queried import Tile
from tests.contracts.upsampler import small_vit
from tests.goldens import golden_file, tensor_golden, under

CLOSE = {"rtol": 0, "atol": 5e-5}
MASKED = ["anyup_small", "anyup_published"]
NATTEN = ["anyup_natten_small", "anyup_natten_published"]


def golden(name: str, *, natten: bool = False) -> tuple[dict[str, torch.Tensor], AnyUpNet]:
    tensors, config = tensor_golden(name)
    tensors = {key: tensor.float() for key, tensor in tensors.items()}
    net = AnyUpNet(**config, natten=natten).eval()
    net.load_state_dict(under(tensors, "w."), strict=True)
    return tensors, net


def features(maps: torch.Tensor) -> PatchFeatures:
    return PatchFeatures(layers={0: maps}, prefix={0: maps.new_zeros(len(maps), 0, maps.shape[1])}, stride=16)


def whole(grid: tuple[int, int]) -> Tile:
    return Tile(rows=slice(0, grid[0]), columns=slice(0, grid[1]))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", MASKED)
def test_the_masked_variant_is_the_official_module(name, gradients):
    tensors, net = golden(name)
    image, maps, expected = tensors["in.image"], tensors["in.features"], tensors["out.features"]

    with torch.set_grad_enabled(gradients):
        out = net(image, maps, tuple(expected.shape[2:]))

    torch.testing.assert_close(out, expected, **CLOSE)
    assert out.requires_grad == gradients
    torch.testing.assert_close((weights(net, image, maps, tuple(expected.shape[2:]))[0] > 0).float(), tensors["mid.allowed_mask"])


def test_inner_maps_are_those_of_the_official_module():
    tensors, net = golden("anyup_small")
    image, grid = tensors["in.image"], tuple(tensors["out.features"].shape[2:])
    # What the file has of features was recorded in a later run, of the same channels in another order.
    maps = tensors["in.features"][:, [6, 4, 5, 1, 2, 3, 0]]

    with torch.no_grad():
        pixels = net.rope(encode(net.image_encoder, image, 2**20), 2**20)
        torch.testing.assert_close(pixels, tensors["mid.rope_image"], **CLOSE)
        torch.testing.assert_close(net.key_features_encoder[0](F.normalize(maps, dim=1), 2**20), tensors["mid.lfu"], **CLOSE)
        torch.testing.assert_close(net.keys(pixels, maps), tensors["mid.keys_aggregated"], **CLOSE)
        queries = net.cross_decode.conv2d(net.prepare(image, maps, grid).queries)
    torch.testing.assert_close(queries, tensors["mid.queries_conv3x3"], **CLOSE)
    torch.testing.assert_close(weights(net, image, maps, grid), tensors["mid.attn_mean_over_heads"], **CLOSE)


def weights(net: AnyUpNet, image: torch.Tensor, maps: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Of each cell of the grid for each of the map, [B, Q, K]: what comes of values that are one at a cell each."""
    with torch.no_grad():
        prepared = replace(net.prepare(image, maps, grid), values=torch.eye(maps[0, 0].numel()).expand(len(maps), -1, -1))
        return net.query(prepared, whole(grid)).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("name", NATTEN)
@pytest.mark.parametrize(("natten", "key"), [(True, "out.features"), (False, "out.masked_variant_same_weights")])
def test_both_variants_take_the_same_weights(name, natten, key):
    tensors, net = golden(name, natten=natten)

    with torch.no_grad():
        out = net(tensors["in.image"], tensors["in.features"], tuple(tensors[key].shape[2:]))

    torch.testing.assert_close(out, tensors[key], **CLOSE)


@pytest.mark.parametrize("name", MASKED + NATTEN)
def test_half_precision_is_close_to_the_official_output(name):
    tensors, net = golden(name, natten=name in NATTEN)
    method, maps = AnyUp("anyup"), tensors["in.features"]
    settings = method.parse(
        {"patch": 16, "qk_dim": net.width, "num_heads": net.heads, "window_ratio": net.window_ratio, "natten": net.natten}
    )
    upsampler = method.build(settings, net.state_dict(), "bf16", lambda: small_vit(8))

    out = upsampler(tensors["in.image"], features(maps), (0,), tuple(tensors["out.features"].shape[2:]))

    assert not torch.equal(out, tensors["out.features"])
    torch.testing.assert_close(out, tensors["out.features"], rtol=0, atol=2e-2)


@pytest.mark.parametrize("number", ["0", "1"])
@pytest.mark.parametrize("at_once", [1, 2**30])
def test_features_are_unified_as_the_released_code_does_and_not_as_the_paper_says(number, at_once):
    tensors = under(tensor_golden("anyup_feature_unification")[0], f"{number}.")
    layer = Unification(len(tensors["basis"]), tensors["basis"].shape[-1])
    layer.basis.data = tensors["basis"]

    out = layer(tensors["in"], at_once)

    torch.testing.assert_close(out, tensors["out"], rtol=0, atol=1e-6)
    assert (out - tensors["NOT_official_paper_reading"]).abs().max() > 0.01


def test_windows_have_the_official_bounds():
    tensors, _ = tensor_golden("anyup_window_bounds")
    assert len(tensors) == 5
    for name, bounds in tensors.items():
        (low, high, ratio) = name.removeprefix("lo").replace("_hi", " ").replace("_r", " ").split()
        cells, grid = (tuple(map(int, text.split("x"))) for text in (low, high))
        for axis, seen in enumerate(windows(cells, grid, float(ratio))):
            start, stop = seen.argmax(1), seen.shape[1] - seen[:, ::-1].argmax(1)
            of_axis = bounds.select(1 - axis, 0)[:, 2 * axis : 2 * axis + 2].numpy()
            np.testing.assert_array_equal(np.stack([start, stop], axis=1), of_axis, err_msg=name)
            np.testing.assert_array_equal(seen.sum(1), stop - start, err_msg=name)


def test_windows_are_reckoned_in_single_precision_as_the_official_code_does():
    differs = 0
    for cells, positions, ratio in [
        (n, m, r) for n in (7, 14, 20, 28, 37) for m in (56, 70, 224, 441) for r in (0.05, 0.1, 0.25)
    ]:
        centres = (torch.arange(positions, dtype=torch.float32) + 0.5) / positions
        low = ((centres - ratio).clamp(0, 1) * cells).floor()
        high = ((centres + ratio).clamp(0, 1) * cells).ceil()
        expected = (torch.arange(cells) >= low[:, None]) & (torch.arange(cells) < high[:, None])
        found = window_counts(cells, positions, ratio)
        np.testing.assert_array_equal(found, expected.long().numpy())
        exact = (np.arange(positions) + 0.5) / positions
        floor = np.floor(np.clip(exact - ratio, 0, 1) * cells)
        differs += int((found.argmax(1) != floor).sum())
    assert differs, "no size tells single from double precision"


def dense(net: AnyUpNet, prepared, grid: tuple[int, int], seen) -> torch.Tensor:
    """As published: logits of all cells, those outside the windows masked."""
    queries = net.cross_decode.queries(prepared.queries, whole(grid))
    logits = queries @ prepared.keys.transpose(2, 3) * queries.shape[-1] ** -0.5
    rows, columns = (torch.from_numpy(each) > 0 for each in seen)
    allowed = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)
    weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1).mean(1)
    return (weights @ prepared.values).transpose(1, 2).unflatten(2, grid)


def sharp(**settings: object) -> AnyUpNet:
    torch.manual_seed(0)
    net = AnyUpNet(32, **settings).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.data *= 1.5
    return net


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.3, 1.0])
@pytest.mark.parametrize(("base", "grid"), [((6, 9), (24, 36)), ((7, 5), (17, 23)), ((8, 6), (8, 30)), ((2, 3), (40, 9))])
def test_windows_without_dense_logits_equal_dense_ones(base, grid, ratio):
    net = sharp(window_ratio=ratio)
    image, maps = torch.randn(2, 3, 40, 56), torch.randn(2, 11, *base)
    prepared = net.prepare(image, maps, grid)

    out = net.query(prepared, whole(grid))

    torch.testing.assert_close(out, dense(net, prepared, grid, windows(base, grid, ratio)), rtol=0, atol=1e-5)
    with_all = average(net.cross_decode.queries(prepared.queries, whole(grid)), prepared.keys, prepared.values)
    assert torch.allclose(out.flatten(2).transpose(1, 2), with_all, atol=1e-4) == (ratio == 1)


@pytest.mark.parametrize("settings", [{}, {"natten": True}, {"window_ratio": 0.0}])
@pytest.mark.parametrize("cells", [1, 7, 64, 300])
@pytest.mark.parametrize("grid", [(5, 7), (13, 22), (20, 7)])
def test_tiles_of_any_size_give_the_same(cells, grid, settings):
    method = AnyUp("anyup")
    parsed = method.parse({"patch": 14, "qk_dim": 32, **settings})
    upsampler = method.build(parsed, sharp(**settings).state_dict(), "fp32", lambda: small_vit(8))
    images, maps = torch.randn(2, 3, 70, 98), features(torch.randn(2, 9, 5, 7))
    together = upsampler(images, maps, (0,), grid)

    upsampler.take_at_once(cells)
    upsampler.net.values_at_once = 5 * 32 * 98 * 3  # three rows of pixels a strip
    in_tiles = upsampler(images, maps, (0,), grid)

    torch.testing.assert_close(in_tiles, together, rtol=0, atol=1e-5)


def test_images_are_seen_by_imagenets_statistics_whatever_the_backbones_are():
    method, net = AnyUp("anyup"), sharp()
    pixels, maps = torch.rand(1, 3, 64, 64), torch.randn(1, 5, 4, 4)
    clip = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    backbone = TimmBackbone(small_vit(8), mean=clip[0], std=clip[1])
    settings = method.with_backbone(method.parse({"patch": 16, "qk_dim": 32}), backbone)

    def normalised(mean, std):
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    out = method.build(settings, net.state_dict(), "fp32", lambda: small_vit(8))(normalised(*clip), features(maps), (0,), (8, 8))

    expected = net(normalised((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), maps, (8, 8))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(out, net(normalised(*clip), maps, (8, 8)), atol=1e-3)


def test_names_shapes_and_count_are_those_of_the_published_files():
    published = json.loads(golden_file("anyup_state_dict_keys.json").read_text())["published"]
    net = AnyUpNet()

    assert {key: [list(value.shape), "float32"] for key, value in net.state_dict().items()} == published["state_dict"]
    assert sum(parameter.numel() for parameter in net.parameters()) == published["params"] == 878080


def test_an_official_file_tells_its_sizes_and_fits_any_backbone():
    state = AnyUpNet(32, kernel_size=3, kernel_size_lfu=3).state_dict()

    for backbone in (TimmBackbone(small_vit(12), facet="key"), TimmBackbone(small_vit(8), norm=False)):
        settings, loaded = find_method("anyup").read(state, None, backbone)
        assert (settings.qk_dim, settings.kernel_size, settings.kernel_size_lfu, settings.window_ratio) == (32, 3, 3, 0.1)
        assert loaded.keys() == state.keys()


@pytest.mark.parametrize(
    ("settings", "base", "grid", "words"),
    [
        ({}, (1, 4), (2, 8), "at least 2x2 cells, not 1x4"),
        ({}, (4, 4), (3, 8), "at least the backbone's 4x4 cells, not 3x8"),
        (
            {"window_ratio": 1e-12},
            (2, 2),
            (3, 3),
            "a window of 1e-12 of 2 cells holds none at some of 3 positions; give a larger",
        ),
        ({"natten": True}, (2, 4), (4, 8), "anyup: a neighbourhood of 3 with dilation 2 takes 6 positions a side, not 4"),
    ],
)
def test_grids_that_cannot_be_are_refused(settings, base, grid, words):
    method = find_method("anyup")

    with pytest.raises(UpsamplerError, match=words):
        method.require_grid(method.parse({"patch": 16, **settings}), base, grid)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kernel_size_lfu": 4}, "kernel_size_lfu must be odd, got 4"),
        ({"window_ratio": "0.1"}, "window_ratio must be a number, got '0.1'"),
        ({"natten": 1}, "natten must be true or false, got 1"),
        ({"channels": 384}, "no such upsampler settings: channels"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(UpsamplerError, match=words):
        find_method("anyup").parse({"patch": 16, **settings})
