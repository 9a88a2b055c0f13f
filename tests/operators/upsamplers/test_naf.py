"""NAF: its own code's inner maps and outputs, its file, and grids in tiles within a memory."""

import itertools
import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from operators.backbone import PatchFeatures, TimmBackbone
from operators.upsamplers import UpsamplerError, find_method
from operators.upsamplers.naf import Naf, NafNet, capped_size
from operators.upsamplers.neighbourhood import nearest_exact, neighbours
from tests.contracts.upsampler import small_vit
from tests.goldens import golden_file, tensor_golden, under

CLOSE = {"rtol": 0, "atol": 5e-5}
SMALL = ["naf_small_integer_ratio", "naf_small_noninteger_ratio", "naf_small_image_over_4x"]
FILES = [*SMALL, "naf_published_x2", "naf_published_noninteger"]


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, object], NafNet]:
    tensors, config = tensor_golden(name)
    tensors = {key: tensor.float() for key, tensor in tensors.items()}
    net = NafNet(**config).eval()
    net.load_state_dict(under(tensors, "w."), strict=True)
    return tensors, config, net


def features(maps: torch.Tensor, stride: int = 16) -> PatchFeatures:
    return PatchFeatures(layers={0: maps}, prefix={0: maps.new_zeros(len(maps), 0, maps.shape[1])}, stride=stride)


def channels_first(x_BNHWD: torch.Tensor) -> torch.Tensor:
    return x_BNHWD.permute(0, 1, 4, 2, 3).flatten(1, 2)


@pytest.mark.parametrize("mode", ["eval", "gradients", "train"])
@pytest.mark.parametrize("name", FILES)
def test_inner_maps_and_output_are_those_of_the_official_module(name, mode):
    tensors, _, net = golden(name)
    image, maps, expected = tensors["in.image"], tensors["in.features"], tensors["out.features"]
    grid = tuple(expected.shape[2:])
    net.train(mode == "train")

    with torch.set_grad_enabled(mode == "gradients"):
        prepared = net.prepare(image, maps, grid)
        out = net(image, maps, grid)

    torch.testing.assert_close(channels_first(prepared.keys), tensors["mid.keys_pooled"], **CLOSE)
    if (queries := tensors.get("mid.queries_after_pool_and_rope")) is not None:
        torch.testing.assert_close(channels_first(prepared.queries), queries, **CLOSE)
    torch.testing.assert_close(out, expected, **CLOSE)
    assert out.requires_grad == (mode == "gradients")


@pytest.mark.parametrize("name", SMALL)
def test_weights_are_the_softmax_of_the_official_logits(name):
    """Values that are one for a cell each give the weights."""
    tensors, config, net = golden(name)
    maps, logits = tensors["in.features"], tensors["mid.attn_logits_scaled"]
    base, grid = maps.shape[2:], logits.shape[2:4]
    cells = [
        torch.from_numpy(nearest_exact(h, n)[neighbours(n, config["kernel_size"], n // h)])
        for h, n in zip(base, grid, strict=True)
    ]
    index = (cells[0][:, None, :, None] * base[1] + cells[1][None, :, None, :]).flatten(2)
    expected = torch.zeros(*logits.shape[:4], base.numel())
    expected.scatter_add_(4, index.expand(logits.shape), logits.softmax(-1))
    ones = torch.eye(base.numel()).repeat(net.heads, 1).unflatten(1, base).expand(len(maps), -1, -1, -1)

    out = net(tensors["in.image"], ones, tuple(grid))

    torch.testing.assert_close(out.unflatten(1, (net.heads, -1)).permute(0, 1, 3, 4, 2), expected, **CLOSE)


@pytest.mark.parametrize("name", FILES)
def test_half_precision_is_close_to_the_official_output(name):
    tensors, config, net = golden(name)
    method = Naf("naf")
    upsampler = method.build(method.parse({"patch": 16, **config}), net.state_dict(), "bf16", lambda: small_vit(8))

    out = upsampler(tensors["in.image"], features(tensors["in.features"]), (0,), tuple(tensors["out.features"].shape[2:]))

    assert not torch.equal(out, tensors["out.features"])
    torch.testing.assert_close(out, tensors["out.features"], rtol=0, atol=2e-2)


def test_names_shapes_and_count_are_those_of_the_published_file():
    published = json.loads(golden_file("naf_state_dict_keys.json").read_text())["published"]
    net = NafNet()

    assert {key: [list(value.shape), "float32"] for key, value in net.state_dict().items()} == published["state_dict"]
    assert sum(parameter.numel() for parameter in net.parameters()) == published["params"] == 662528


@pytest.mark.parametrize(
    ("image", "grid", "size"),
    [
        ((60, 90), (10, 12), (40, 40)),  # both bounds hold for both sides
        ((40, 48), (10, 12), (40, 48)),
        ((30, 90), (10, 12), (30, 40)),
        ((448, 448), (448, 448), (448, 448)),
    ],
)
def test_images_above_4_times_the_grid_are_squashed_as_published(image, grid, size):
    assert capped_size(image, grid) == size


def made(channels: int = 12, **settings: object):
    """An upsampler whose attention is sharp."""
    method = Naf("naf")
    parsed = method.parse({"patch": 14, "kernel_size": 5, "dim": 32, **settings})
    net = method.initialised(parsed)
    for parameter in net.parameters():
        parameter.data *= 2
    return method.build(parsed, net.state_dict(), "fp32", lambda: small_vit(8))


def given(batch: int, channels: int, base: tuple[int, int], patch: int) -> tuple[torch.Tensor, PatchFeatures]:
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, patch * base[0], patch * base[1], generator=draw)
    return images, features(torch.randn(batch, channels, *base, generator=draw), patch)


@pytest.mark.parametrize("cells", [1, 64, 300])
@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize("grid", [(5, 7), (13, 22), (20, 28)])
def test_tiles_and_strips_of_any_size_give_the_same(cells, patch, grid):
    upsampler, (images, maps) = made(patch=patch), given(2, 12, (5, 7), patch)
    together = upsampler(images, maps, (0,), grid)

    upsampler.take_at_once(cells)
    upsampler.net.values_at_once = 5 * 2 * 16 * 7 * patch * 3  # three rows of pixels a strip
    in_tiles = upsampler(images, maps, (0,), grid)

    torch.testing.assert_close(in_tiles, together, rtol=0, atol=1e-5)


def test_images_of_a_batch_do_not_touch_each_other():
    upsampler, (images, maps) = made(), given(3, 12, (5, 7), 14)

    together = upsampler(images, maps, (0,), (12, 15))

    for i in range(3):
        alone = upsampler(images[i : i + 1], features(maps.layers[0][i : i + 1], 14), (0,), (12, 15))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "base", "patch", "grid"),
    [(384, 28, 16, 448), (768, 28, 16, 448), (16, 128, 16, 256), (384, 14, 16, 28), (8, 37, 14, 100)],
)
def test_memory_stays_below_what_it_declares(channels, base, patch, grid):
    """Few encoder channels, so that the test takes seconds; queries, maps and results are as large as they are."""
    method = Naf("naf")
    settings = method.parse({"patch": patch, "dim": 64, "img_layers": 1})
    upsampler = method.build(settings, method.initialised(settings).state_dict(), "fp32", lambda: small_vit(8))
    images, maps = given(1, channels, (base, base), patch)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        upsampler(images, maps, (0,), (grid, grid))

    changes = [event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    bound = upsampler.call_bytes(1, channels, (base, base), (patch * base, patch * base), (grid, grid))
    assert bound / 8 < max(itertools.accumulate(changes)) <= bound


def backbone(channels: int = 12) -> TimmBackbone:
    return TimmBackbone(small_vit(channels))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_official_file_is_for_any_backbone(prefix):
    state = {prefix + key: value for key, value in NafNet().state_dict().items()}

    settings, loaded = find_method("naf").read(state, None, backbone())

    assert settings == find_method("naf").parse({"patch": 16, "mean": settings.mean, "std": settings.std})
    assert settings.mean == backbone().mean
    assert loaded.keys() == NafNet().state_dict().keys()


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (NafNet(dim=32).state_dict(), "of another shape: image_encoder.encoder.0.weight"),
        (NafNet(img_layers=1).state_dict(), "16 missing: image_encoder.encoder.2"),
        ({"up.weight": torch.zeros(1)}, "aren't understood as an official file of naf"),
    ],
)
def test_other_files_are_refused(state, words):
    with pytest.raises(UpsamplerError, match=words):
        find_method("naf").read(state, None, backbone())


def test_channels_that_the_heads_do_not_share_are_refused():
    words = "4 heads share a map's channels, which must be a multiple of 4: these are 10"
    with pytest.raises(UpsamplerError, match=words):
        find_method("naf").read(NafNet().state_dict(), None, backbone(10))
    images, maps = given(1, 10, (5, 7), 14)
    with pytest.raises(UpsamplerError, match=words):
        made()(images, maps, (0,), (10, 14))


@pytest.mark.parametrize(
    ("base", "grid", "words"),
    [
        (
            (7, 7),
            (14, 14),
            r"9x9 cells, and a map of 7x7 is smaller: .*at least 144 pixels a side \(at patch 16\).*kernel_size to 7",
        ),
        ((10, 8), (20, 16), "a map of 10x8 is smaller: .*kernel_size to 7 or less"),
        ((14, 14), (13, 28), "grids of at least the backbone's 14x14 cells, not 13x28; use average"),
    ],
)
def test_grids_that_there_are_not_are_refused(base, grid, words):
    method = find_method("naf")
    with pytest.raises(UpsamplerError, match=words):
        method.require_grid(method.parse({"patch": 16}), base, grid)


def test_a_smaller_neighbourhood_takes_smaller_maps():
    method = find_method("naf")
    method.require_grid(method.parse({"patch": 16, "kernel_size": 7}), (7, 7), (112, 112))
    upsampler, (images, maps) = made(kernel_size=1), given(1, 12, (2, 3), 14)

    out = upsampler(images, maps, (0,), (4, 6))

    torch.testing.assert_close(out, maps.layers[0].repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"kernel_size": 0}, "kernel_size must be a whole number of at least 1, got 0"),
        ({"dim": 40}, "dim must be a multiple of 16, of heads_attn .4. and of 4 x heads_rope .16., got 40"),
        ({"kernel": 5}, "no such .* settings: kernel; there are: .*kernel_size"),
    ],
)
def test_settings_that_there_are_not_are_refused(settings, words):
    with pytest.raises(UpsamplerError, match=words):
        find_method("naf").parse({"patch": 16, **settings})
