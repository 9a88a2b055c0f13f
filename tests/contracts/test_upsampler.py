"""What every upsampler promises. A new one is covered by being in `UPSAMPLERS`."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from operators.backbone import PatchFeatures
from operators.upsamplers import UPSAMPLERS, UpsamplerError, create_upsampler

COARSER = {"average"}


def features(batch: int, channels: int, grid: tuple[int, int], seed: int = 0) -> PatchFeatures:
    maps = torch.randn(batch, channels, *grid, generator=torch.Generator().manual_seed(seed))
    return PatchFeatures(layers={5: maps}, prefix={5: maps.new_zeros(batch, 0, channels)}, stride=16)


def images(batch: int, grid: tuple[int, int]) -> torch.Tensor:
    return torch.randn(batch, 3, grid[0] * 16, grid[1] * 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", UPSAMPLERS)
class TestUpsampler:
    def target(self, name: str, grid: tuple[int, int]) -> tuple[int, int]:
        return (grid[0] // 2, grid[1] // 2) if name in COARSER else (grid[0] * 2, grid[1] * 2)

    @pytest.mark.parametrize("grid", [(4, 4), (6, 10), (14, 2)])
    def test_gives_the_asked_grid_as_float32(self, name, grid):
        target = self.target(name, grid)

        out = create_upsampler(name)(images(2, grid), features(2, 8, grid), (5,), target)

        assert out.shape == (2, 8, *target)
        assert out.dtype == torch.float32

    def test_takes_half_precision_maps(self, name):
        half = features(1, 8, (4, 4))
        half = PatchFeatures(layers={5: half.layers[5].bfloat16()}, prefix=half.prefix, stride=16)

        out = create_upsampler(name)(images(1, (4, 4)), half, (5,), self.target(name, (4, 4)))

        assert out.dtype == torch.float32
        assert torch.isfinite(out).all()

    def test_is_deterministic_and_does_not_depend_on_the_batch(self, name):
        grid = (6, 10)
        upsampler, target = create_upsampler(name), self.target(name, grid)
        batch, pictures = features(3, 8, grid), images(3, grid)
        alone = PatchFeatures(layers={5: batch.layers[5][1:2]}, prefix={5: batch.prefix[5][1:2]}, stride=16)

        together = upsampler(pictures, batch, (5,), target)

        torch.testing.assert_close(together, upsampler(pictures, batch, (5,), target), rtol=0, atol=0)
        torch.testing.assert_close(together[1:2], upsampler(pictures[1:2], alone, (5,), target), rtol=1e-5, atol=1e-5)

    def test_constant_maps_stay_constant(self, name):
        flat = PatchFeatures(layers={5: torch.full((1, 4, 6, 6), 2.5)}, prefix={5: torch.zeros(1, 0, 4)}, stride=16)

        out = create_upsampler(name)(images(1, (6, 6)), flat, (5,), self.target(name, (6, 6)))

        torch.testing.assert_close(out, torch.full_like(out, 2.5))

    def test_cells_tile_the_area_of_the_source(self, name):
        """A map that grows by 1 per cell has, at a cell centre c of any grid, the value c in source cells."""
        if name == "nearest":
            pytest.skip("a step function by definition")
        ramp = torch.arange(12.0).expand(1, 1, 12, 12)
        source = PatchFeatures(layers={5: ramp}, prefix={5: torch.zeros(1, 0, 1)}, stride=16)
        target = self.target(name, (12, 12))

        out = create_upsampler(name)(images(1, (12, 12)), source, (5,), target)

        centres = (torch.arange(target[1]) + 0.5) * 12 / target[1] - 0.5
        inside = slice(target[1] // 4, -target[1] // 4)
        # A grid that is off by half a cell would be off by 0.25; bicubic with a = -0.75 bends a ramp by 0.02.
        torch.testing.assert_close(out[0, 0, target[0] // 2, inside], centres[inside], rtol=0, atol=0.05)

    def test_several_layers_are_stacked_along_the_channels(self, name):
        two = PatchFeatures(
            layers={2: torch.zeros(1, 4, 6, 6), 5: torch.ones(1, 4, 6, 6)},
            prefix={2: torch.zeros(1, 0, 4), 5: torch.zeros(1, 0, 4)},
            stride=16,
        )

        out = create_upsampler(name)(images(1, (6, 6)), two, (5, 2), self.target(name, (6, 6)))

        assert out.shape[1] == 8
        assert out[0, :4].min() == 1
        assert out[0, 4:].max() == 0

    def test_memory_stays_under_peak_bytes(self, name):
        grid = (16, 16)
        upsampler, target = create_upsampler(name), self.target(name, grid)
        source, pictures = features(4, 64, grid), images(4, grid)
        upsampler(pictures, source, (5,), target)

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            out = upsampler(pictures, source, (5,), target)
        allocated = sum(max(0, event.self_cpu_memory_usage) for event in record.key_averages())

        assert out.numel() * 4 <= allocated <= upsampler.peak_bytes(4, 64, target)


def test_unknown_name_is_answered_with_those_there_are():
    with pytest.raises(UpsamplerError, match="no upsampler is called 'bilinaer'; there are: bilinear, bicubic"):
        create_upsampler("bilinaer")
