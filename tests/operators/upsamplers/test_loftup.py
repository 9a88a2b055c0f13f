"""LoftUp: its own code's inner maps and outputs, its files, and grids in tiles."""

import itertools
import json
import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from operators.backbone import PatchFeatures, TimmBackbone
from operators.upsamplers import UpsamplerError, find_method
from operators.upsamplers.loftup import LoftUp, LoftUpNet, LoftUpSettings
from operators.upsamplers.queried import QueriedUpsampler, Tile
from tests.contracts.upsampler import small_vit
from tests.goldens import golden_file, tensor_golden, under

CLOSE = {"rtol": 0, "atol": 5e-5}
FILES = ["loftup_small_learnable", "loftup_small_sine"]


def golden(name: str) -> tuple[dict[str, torch.Tensor], LoftUpSettings]:
    tensors, config = tensor_golden(name)
    settings = LoftUpSettings(
        channels=config["dim"],
        patch=16,
        frequencies=config["n_freqs"],
        heads=config["num_heads"],
        blocks=config["num_layers"],
        position=config["lr_pe_type"],
        table=config["lr_size"],
    )
    return tensors, settings


def network(tensors: dict[str, torch.Tensor], settings: LoftUpSettings) -> LoftUpNet:
    return LoftUp("loftup").loaded(settings, under(tensors, "w.")).eval()


def features(maps: torch.Tensor) -> PatchFeatures:
    return PatchFeatures(layers={0: maps}, prefix={0: maps.new_zeros(len(maps), 0, maps.shape[1])}, stride=16)


def upsampler(settings: LoftUpSettings, state: dict[str, torch.Tensor] | None = None, precision="fp32") -> QueriedUpsampler:
    method = LoftUp("loftup")
    return method.build(settings, state or method.initialised(settings).state_dict(), precision, lambda: None)


@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_inner_maps_and_output_are_those_of_the_official_module(name):
    """Of a whole batch, whose colours are scaled together, as there."""
    tensors, net = golden(name)[0], network(*golden(name))
    image, maps, expected = tensors["in.image"], tensors["in.features"], tensors["out.features"]
    grid = tuple(expected.shape[2:])
    prepared, whole = net.prepare(image, maps, grid), Tile(rows=slice(0, grid[0]), columns=slice(0, grid[1]))

    found = {
        "mid.first_conv": net.upsampler.asked(prepared.colours, whole),
        "mid.kv_tokens": net.upsampler.tokens(net.channelnorm(maps)),
        "out.features": net(image, maps, grid),
    }
    asked = found["mid.first_conv"].permute(0, 2, 3, 1).flatten(1, 2)
    found["mid.transformer"] = net.upsampler.ca_transformer(asked, prepared.kept)

    for key, value in found.items():
        torch.testing.assert_close(value, tensors[key], **CLOSE, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", FILES)
def test_an_upsampler_scales_each_images_colours_alone(name, precision):
    tensors, settings = golden(name)
    image, maps, net = tensors["in.image"], tensors["in.features"], network(*golden(name))
    grid = tuple(tensors["out.features"].shape[2:])

    found = upsampler(settings, under(tensors, "w."), precision)(image, features(maps), (0,), grid)

    for i in range(len(maps)):
        with torch.no_grad():
            alone = net(image[i : i + 1], maps[i : i + 1], grid)
        torch.testing.assert_close(found[i : i + 1], alone, **CLOSE if precision == "fp32" else {"rtol": 0, "atol": 2e-2})


@pytest.mark.parametrize(("channels", "parameters"), [(384, 4_303_894), (512, 7_165_462), (768, 15_051_286)])
def test_published_networks_have_the_published_names_and_parameters(channels, parameters):
    listed = json.loads(golden_file("loftup_state_dict_keys.json").read_text())
    with torch.device("meta"):
        net = LoftUpNet(LoftUpSettings(channels=channels, patch=14))

    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    if each := listed.get(f"dim{channels}_sine"):
        assert each["params"] == parameters
        assert {name: list(t.shape) for name, t in net.state_dict().items()} == {n: s for n, (s, _) in each["state_dict"].items()}


@pytest.mark.parametrize("position", ["sine", "learnable"])
@pytest.mark.parametrize("grid", [(30, 75), (61, 40)])
def test_tiles_give_what_the_whole_gives(position, grid):
    settings = LoftUpSettings(channels=12, patch=16, position=position)
    generator = torch.Generator().manual_seed(0)
    image, maps = torch.randn(2, 3, 80, 96, generator=generator), torch.randn(2, 12, 5, 6, generator=generator)
    whole, tiled = upsampler(settings), upsampler(settings)
    whole.allow(2**32)
    tiled.allow(1)

    found = tiled(image, features(maps), (0,), grid)

    torch.testing.assert_close(found, whole(image, features(maps), (0,), grid), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("base", "grid", "settings", "allowed"),
    [
        ((28, 28), (448, 448), {"channels": 20, "frequencies": 2}, 2**24),
        ((4, 4), (64, 64), {"channels": 384}, 2**24),
        ((4, 4), (56, 56), {"channels": 768}, 1),
        ((16, 16), (1024, 128), {"channels": 12, "frequencies": 1}, 2**20),
    ],
    ids=["to 448", "S", "B in the smallest tiles", "tall"],
)
def test_memory_stays_under_what_is_declared(base, grid, settings, allowed):
    settings = LoftUpSettings(patch=16, **settings)
    made, generator = upsampler(settings), torch.Generator().manual_seed(0)
    made.allow(allowed)
    image = torch.randn(1, 3, 16 * base[0], 16 * base[1], generator=generator)
    maps = torch.randn(1, settings.channels, *base, generator=generator)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        out = made(image, features(maps), (0,), grid)

    changes = [event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak, declared = max(itertools.accumulate(changes)), made.call_bytes(1, settings.channels, base, tuple(image.shape[2:]), grid)
    assert math.prod(out.shape) * 4 <= peak <= declared


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_an_official_file_tells_its_settings(name, older):
    tensors, settings = golden(name)
    backbone = TimmBackbone(small_vit(settings.channels))
    state = under(tensors, "w.")
    if older:
        state = {key.replace("channelnorm.norm.", "model.1.norm."): tensor for key, tensor in state.items()}
        state["model.0.model.cls_token"] = torch.zeros(1, 1, 8)

    found, loaded = LoftUp("loftup").read(state, None, backbone)

    assert found == (settings if settings.position == "learnable" else LoftUpSettings(channels=12, patch=16))
    assert torch.equal(loaded["channelnorm.norm.weight"], tensors["w.channelnorm.norm.weight"])


def test_wrong_files_features_and_settings_are_refused():
    method, state = find_method("loftup"), under(golden("loftup_small_learnable")[0], "w.")

    for options in ({"facet": "key"}, {"norm": False}):
        with pytest.raises(UpsamplerError, match="after its final norm: use --facet token, and no --norm False"):
            method.read(state, None, TimmBackbone(small_vit(16), **options))
    with pytest.raises(UpsamplerError, match="made for a backbone of 16 channels; this one has 8"):
        method.read(state, None, TimmBackbone(small_vit(8)))
    with pytest.raises(UpsamplerError, match="1 unexpected: upsampler.more"):
        method.read({**state, "upsampler.more": torch.zeros(1)}, None, TimmBackbone(small_vit(16)))
    with pytest.raises(UpsamplerError, match="width of 30 for maps of 10 channels must divide into its 4 heads"):
        LoftUpSettings(channels=10, patch=16)
    with pytest.raises(UpsamplerError, match="made for maps of 12 channels"):
        upsampler(LoftUpSettings(channels=12, patch=16))(
            torch.zeros(1, 3, 32, 32), features(torch.zeros(1, 8, 2, 2)), (0,), (4, 4)
        )
