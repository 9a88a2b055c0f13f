"""JAFAR: its own code's inner maps and outputs, its files, and grids in tiles."""

import json

import pytest
import torch

from operators.backbone import PatchFeatures, TimmBackbone
from operators.upsamplers import UpsamplerError, find_method
from operators.upsamplers.jafar import Jafar, JafarNet
from operators.upsamplers.pixels import average
from operators.upsamplers.queried import Tile
from tests.contracts.upsampler import small_vit
from tests.goldens import golden_file, tensor_golden, under

CLOSE = {"rtol": 0, "atol": 5e-5}
FILES = ["jafar_small", "jafar_published_dim384"]


def golden(name: str) -> tuple[dict[str, torch.Tensor], JafarNet]:
    tensors, config = tensor_golden(name)
    tensors = {key: tensor.float() for key, tensor in tensors.items()}
    net = JafarNet(config["v_dim"], config["qk_dim"], config["num_heads"], config["kernel_size"]).eval()
    net.load_state_dict(under(tensors, "w."), strict=True)
    return tensors, net


def features(maps: torch.Tensor) -> PatchFeatures:
    return PatchFeatures(layers={0: maps}, prefix={0: maps.new_zeros(len(maps), 0, maps.shape[1])}, stride=14)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_inner_maps_and_output_are_those_of_the_official_module(name, gradients):
    tensors, net = golden(name)
    image, maps, expected = tensors["in.image"], tensors["in.features"], tensors["out.features"]
    grid = tuple(expected.shape[2:])

    with torch.set_grad_enabled(gradients):
        pixels = net.pixels(image)
        found = {"rope_image": pixels.clone()}
        found["queries_pooled_gn"] = net.queries(pixels, grid)
        found["queries_conv3x3"] = net.cross_decode.conv2d(found["queries_pooled_gn"])
        found["keys_sft"] = net.keys(pixels, maps)
        prepared = net.prepare(image, maps, grid)
        queries = net.cross_decode.queries(prepared.queries, Tile(rows=slice(0, grid[0]), columns=slice(0, grid[1])))
        # Values that are one for a cell each give the weights.
        ones = torch.eye(prepared.keys.shape[2]).expand(len(image), -1, -1)
        found["attn_mean_over_heads"] = average(queries, prepared.keys, ones)
        out = net(image, maps, grid)

    for key, value in found.items():
        if f"mid.{key}" in tensors:
            torch.testing.assert_close(value, tensors[f"mid.{key}"], **CLOSE, msg=lambda text, key=key: f"{key}: {text}")
    torch.testing.assert_close(out, expected, **CLOSE)
    assert out.requires_grad == gradients


@pytest.mark.parametrize("name", FILES)
def test_half_precision_is_close_to_the_official_output(name):
    tensors, net = golden(name)
    method, maps = Jafar("jafar"), tensors["in.features"]
    settings = method.parse({"channels": maps.shape[1], "patch": 14, "qk_dim": net.width})
    upsampler = method.build(settings, net.state_dict(), "bf16", lambda: small_vit(8))

    out = upsampler(tensors["in.image"], features(maps), (0,), tuple(tensors["out.features"].shape[2:]))

    assert not torch.equal(out, tensors["out.features"])
    torch.testing.assert_close(out, tensors["out.features"], rtol=0, atol=2e-2)


@pytest.mark.parametrize(("name", "channels"), [("qk128_v384", 384), ("qk128_v768", 768)])
def test_names_shapes_and_count_are_those_of_the_published_files(name, channels):
    published = json.loads(golden_file("jafar_state_dict_keys.json").read_text())[name]
    net = JafarNet(channels)

    assert {key: [list(value.shape), "float32"] for key, value in net.state_dict().items()} == published["state_dict"]
    assert sum(parameter.numel() for parameter in net.parameters()) == published["params"]


@pytest.mark.parametrize(("channels", "parameters"), [(512, 661376), (1024, 792960), (1280, 858752)])
def test_counts_of_the_other_published_sizes(channels, parameters):
    assert sum(parameter.numel() for parameter in JafarNet(channels).parameters()) == parameters


def test_maps_as_wide_as_queries_have_fused_projections_as_in_the_official_module():
    net = JafarNet(16, 16).eval()
    assert net.state_dict()["cross_decode.cross_attn.attention.in_proj_weight"].shape == (48, 16)

    with torch.no_grad():
        out = net(torch.randn(1, 3, 28, 42), torch.randn(1, 16, 2, 3), (5, 7))

    assert torch.isfinite(out).all()


def made(channels: int = 12, **settings: object) -> tuple[object, torch.Tensor, PatchFeatures]:
    """An upsampler whose attention is sharp, images and maps."""
    method = Jafar("jafar")
    parsed = method.parse({"channels": channels, "patch": 14, "qk_dim": 32, **settings})
    net = method.initialised(parsed)
    for parameter in net.parameters():
        parameter.data *= 2
    draw = torch.Generator().manual_seed(0)
    images, maps = torch.randn(2, 3, 70, 98, generator=draw), torch.randn(2, channels, 5, 7, generator=draw)
    return method.build(parsed, net.state_dict(), "fp32", lambda: small_vit(8)), images, features(maps)


@pytest.mark.parametrize("cells", [1, 7, 64, 300])
@pytest.mark.parametrize("grid", [(5, 7), (13, 22), (20, 7)])
def test_tiles_of_any_size_give_the_same(cells, grid):
    upsampler, images, maps = made()
    together = upsampler(images, maps, (0,), grid)

    upsampler.take_at_once(cells)
    upsampler.net.values_at_once = 5 * 32 * 98 * 3  # three rows of pixels a strip
    in_tiles = upsampler(images, maps, (0,), grid)

    torch.testing.assert_close(in_tiles, together, rtol=0, atol=1e-5)


def test_a_cell_is_a_mean_of_the_map():
    upsampler, images, maps = made()

    out = upsampler(images, maps, (0,), (11, 14))

    for image, cells in zip(out, maps.layers[0], strict=True):
        assert (image.amax((1, 2)) <= cells.amax((1, 2)) + 1e-5).all()
        assert (image.amin((1, 2)) >= cells.amin((1, 2)) - 1e-5).all()
    assert out.std() > 0.01


def backbone(channels: int = 12, **options: object) -> TimmBackbone:
    return TimmBackbone(small_vit(channels), **options)


def test_an_official_file_tells_its_sizes():
    state = JafarNet(12, 32, kernel_size=3).state_dict()

    settings, loaded = find_method("jafar").read(state, None, backbone())

    assert (settings.channels, settings.qk_dim, settings.kernel_size, settings.num_heads, settings.patch) == (12, 32, 3, 4, 16)
    assert loaded.keys() == state.keys()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channels": 8}, "made for a backbone of 12 channels; this one has 8"),
        ({"facet": "key"}, "after its final norm: use --facet token, and no --norm False"),
        ({"norm": False}, "after its final norm: use --facet token, and no --norm False"),
    ],
)
def test_an_official_file_is_refused_for_features_that_it_is_not_made_for(options, words):
    with pytest.raises(UpsamplerError, match=words):
        find_method("jafar").read(JafarNet(12, 32).state_dict(), None, backbone(**options))


def test_a_file_that_lacks_or_has_more_tensors_is_refused_with_their_names():
    state = JafarNet(12, 32).state_dict()
    del state["rope.freqs"]

    with pytest.raises(UpsamplerError, match=r"1 missing: rope.freqs; 1 unexpected: more"):
        find_method("jafar").read({**state, "more": torch.zeros(1)}, None, backbone())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"qk_dim": 12}, "qk_dim must be a multiple of 8"),
        ({"num_heads": 3}, r"of num_heads \(3\)"),
        ({"kernel_size": 2}, "kernel_size must be odd, got 2"),
        ({"channels": 0}, "channels must be a whole number of at least 1"),
        ({"v_dim": 3}, "no such upsampler settings: v_dim"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(UpsamplerError, match=words):
        find_method("jafar").parse({"channels": 8, "patch": 16, **settings})


def test_coarser_grids_and_other_channels_are_refused():
    upsampler, images, maps = made()

    with pytest.raises(UpsamplerError, match="at least the backbone's 5x7 cells, not 4x7"):
        upsampler(images, maps, (0,), (4, 7))
    with pytest.raises(UpsamplerError, match="made for maps of 12 channels; layers \\(0,\\) have 3"):
        upsampler(images, features(maps.layers[0][:, :3]), (0,), (5, 7))
