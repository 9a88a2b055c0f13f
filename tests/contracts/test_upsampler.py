"""What every upsampler promises. A new one is covered by being in `UPSAMPLERS` or, with its settings, in `LEARNED`; ViT-Up, whose
maps come from images, keeps the promises that aren't about the maps it is given."""

import copy
import itertools
import math

import pytest
import timm
import torch
from torch.profiler import ProfilerActivity, profile

from operators.backbone import PatchFeatures
from operators.upsamplers import (
    UPSAMPLERS,
    Upsampler,
    UpsamplerError,
    build_net,
    create_upsampler,
    learned_upsampler,
)
from operators.upsamplers.vit_up import Lora, ViTUp, ViTUpConfig, ViTUpHead

FACTOR = {"average": 0.5, "lift x4": 4, "jbu x4": 4, "jbu stack x4": 4, "resize_conv x4": 4}
LEARNED = {
    "lift": {"method": "lift"},
    "lift without image": {"method": "lift", "image_branch": False},
    "lift patch 14": {"method": "lift", "patch": 14},
    "lift x4": {"method": "lift"},
    "resize_conv": {"method": "resize_conv", "kernel": 3},
    "resize_conv x4": {"method": "resize_conv"},
    "jbu": {"method": "jbu"},
    "jbu x4": {"method": "jbu", "radius": 2},
    "jbu stack x4": {"method": "jbu", "stages": 2},
}
NAMES = [*UPSAMPLERS, *LEARNED, "vit_up"]


def make(name: str, channels: int, weights: str = "random") -> Upsampler:
    """The upsampler, learned ones for so many channels, with random weights, or with "plain" ones that add nothing learned."""
    if name in UPSAMPLERS:
        return create_upsampler(name)
    if name == "vit_up":
        return vit_up(channels)
    config = {"patch": 16, "channels": channels, **LEARNED[name]}
    state = build_net(config).state_dict()
    plain = {key: value if key.endswith("sigma_spatial") else value * 0 for key, value in state.items()}
    return learned_upsampler(config, plain if weights == "plain" else state)


def vit_up(channels: int) -> ViTUp:
    """A small one of six blocks, of which it reads two."""
    torch.manual_seed(0)
    options = {"embed_dim": channels, "depth": 6, "num_heads": 2, "img_size": 64, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **options).eval()
    config = ViTUpConfig(channels=channels, heads=2, layers=(0, 3, 6), hidden_size=64, query_size=128, rank=2)
    lora = Lora(copy.deepcopy(model), rank=config.rank)
    return ViTUp(config, model, ViTUpHead(config).state_dict(), lora.peft_state())


def features(batch: int, channels: int, grid: tuple[int, int], seed: int = 0) -> PatchFeatures:
    maps = torch.randn(batch, channels, *grid, generator=torch.Generator().manual_seed(seed))
    return PatchFeatures(layers={5: maps}, prefix={5: maps.new_zeros(batch, 0, channels)}, stride=16)


def images(batch: int, grid: tuple[int, int]) -> torch.Tensor:
    return torch.randn(batch, 3, grid[0] * 16, grid[1] * 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
class TestUpsampler:
    def target(self, name: str, grid: tuple[int, int]) -> tuple[int, int]:
        return int(grid[0] * FACTOR.get(name, 2)), int(grid[1] * FACTOR.get(name, 2))

    @pytest.mark.parametrize("grid", [(4, 4), (6, 10), (14, 2), (3, 5)])
    def test_gives_the_asked_grid_as_float32(self, name, grid):
        if name == "average" and grid == (3, 5):
            pytest.skip("odd sides don't halve")
        target = self.target(name, grid)

        out = make(name, 8)(images(2, grid), features(2, 8, grid), (5,), target)

        assert out.shape == (2, 8, *target)
        assert out.dtype == torch.float32

    def test_takes_half_precision_maps(self, name):
        half = features(1, 8, (4, 4))
        half = PatchFeatures(layers={5: half.layers[5].bfloat16()}, prefix=half.prefix, stride=16)

        out = make(name, 8)(images(1, (4, 4)), half, (5,), self.target(name, (4, 4)))

        assert out.dtype == torch.float32
        assert torch.isfinite(out).all()

    def test_is_deterministic_and_does_not_depend_on_the_batch(self, name):
        grid = (6, 10)
        upsampler, target = make(name, 8), self.target(name, grid)
        batch, pictures = features(3, 8, grid), images(3, grid)
        alone = PatchFeatures(layers={5: batch.layers[5][1:2]}, prefix={5: batch.prefix[5][1:2]}, stride=16)

        together = upsampler(pictures, batch, (5,), target)

        torch.testing.assert_close(together, upsampler(pictures, batch, (5,), target), rtol=0, atol=0)
        torch.testing.assert_close(together[1:2], upsampler(pictures[1:2], alone, (5,), target), rtol=1e-5, atol=1e-5)

    def test_constant_maps_stay_constant(self, name):
        if name.startswith(("lift", "vit_up")):
            pytest.skip("its convolutions see zeros beyond the border; nothing bypasses them")
        flat = PatchFeatures(layers={5: torch.full((1, 4, 6, 6), 2.5)}, prefix={5: torch.zeros(1, 0, 4)}, stride=16)

        out = make(name, 4, "plain")(images(1, (6, 6)), flat, (5,), self.target(name, (6, 6)))

        torch.testing.assert_close(out, torch.full_like(out, 2.5))

    def test_cells_tile_the_area_of_the_source(self, name):
        """A map that grows by 1 per cell has, at a cell centre c of any grid, the value c in source cells."""
        if name == "nearest" or name.startswith(("lift", "vit_up")):
            pytest.skip("a step function by definition, as is LiFT with plain weights (tests/test_operators_lift.py)")
        ramp = torch.arange(12.0).expand(1, 1, 12, 12)
        source = PatchFeatures(layers={5: ramp}, prefix={5: torch.zeros(1, 0, 1)}, stride=16)
        target = self.target(name, (12, 12))

        out = make(name, 1, "plain")(images(1, (12, 12)), source, (5,), target)

        centres = (torch.arange(target[1]) + 0.5) * 12 / target[1] - 0.5
        inside = slice(target[1] // 4, -target[1] // 4)
        # A grid that is off by half a cell would be off by 0.25; bicubic with a = -0.75 bends a ramp by 0.02.
        torch.testing.assert_close(out[0, 0, target[0] // 2, inside], centres[inside], rtol=0, atol=0.05)

    def test_several_layers_are_stacked_along_the_channels(self, name):
        if name == "vit_up":
            pytest.skip("it has a decoder for each layer (tests/test_operators_vit_up.py)")
        two = PatchFeatures(
            layers={2: features(1, 4, (6, 6), seed=2).layers[5], 5: features(1, 4, (6, 6)).layers[5]},
            prefix={2: torch.zeros(1, 0, 4), 5: torch.zeros(1, 0, 4)},
            stride=16,
        )
        one = PatchFeatures(layers={0: two.stacked((5, 2))}, prefix={0: torch.zeros(1, 0, 8)}, stride=16)
        upsampler, target = make(name, 8), self.target(name, (6, 6))

        out = upsampler(images(1, (6, 6)), two, (5, 2), target)

        assert torch.equal(out, upsampler(images(1, (6, 6)), one, (0,), target))
        assert not torch.equal(out, upsampler(images(1, (6, 6)), two, (2, 5), target))

    @pytest.mark.parametrize("together", [True, False])
    def test_memory_stays_under_peak_bytes(self, name, together, monkeypatch):
        if not together:
            monkeypatch.setattr("operators.upsamplers.recursive.LearnedUpsampler.working_bytes", 1)
        grid = (16, 16)
        upsampler, target = make(name, 64), self.target(name, grid)
        source, pictures = features(4, 64, grid), images(4, grid)
        upsampler(pictures, source, (5,), target)

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            out = upsampler(pictures, source, (5,), target)

        changes = [event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
        peak = max(itertools.accumulate(changes))
        assert math.prod(out.shape) * 4 <= peak <= upsampler.peak_bytes(4, 64, target)


def test_unknown_name_is_answered_with_those_there_are():
    with pytest.raises(UpsamplerError, match="no upsampler is called 'bilinaer'; there are: bilinear, bicubic"):
        create_upsampler("bilinaer")
