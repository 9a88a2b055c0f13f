"""What every upsampler promises: of a subclass of `UpsamplerContract`, each of its `cases` is held to it.

A user's method is held to the same (operators/DESIGN.md, "Your own upsampler").
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from operators.backbone import PatchFeatures, TimmBackbone
from operators.upsamplers import AnyMethod, Settings, Upsampler, UpsamplerError, find_method
from tests.pretended_gpu import pretended_gpu


@dataclass(frozen=True, kw_only=True)
class Case:
    """A method, with settings of its own, and what more it promises."""

    method: str
    "a name of `UPSAMPLERS`, or `module:Class`"
    settings: dict[str, Any] = field(default_factory=dict)
    factor: float = 2
    "cells of the grids that are asked for to one of the maps', a side"
    residual: bool = False
    "with weights of zero it is an interpolation, which it adds to; so are those without weights"
    convex: bool = False
    "whatever its weights are, a cell is a weighted mean of the map's"
    smallest: int = 1
    "cells a side that its maps have at least, up to 3"
    smooth: bool = True
    "that interpolation is no step function"

    def __str__(self) -> str:
        return " ".join([self.method, *(f"{name}={value}" for name, value in self.settings.items()), f"x{self.factor:g}"])

    def target(self, grid: tuple[int, int]) -> tuple[int, int]:
        return int(grid[0] * self.factor), int(grid[1] * self.factor)

    def weights(self, channels: int) -> tuple[AnyMethod, Settings, dict[str, Tensor]]:
        """The method, its settings for so many channels, and a state of random weights."""
        method, reload = find_method(self.method), partial(small_vit, max(channels, 8))
        settings, state = method.untrained(TimmBackbone(reload()), channels, 64, reload)
        if self.settings:
            settings = method.parse({**method.to_json(settings), **self.settings})
            state = method.initialised(settings).state_dict()
        return method, settings, state

    def make(self, channels: int, *, plain: bool = False) -> Upsampler:
        """The upsampler; `plain`: with weights that add nothing learned."""
        method, settings, state = self.weights(channels)
        if plain:
            # Joint bilateral filters divide by the width of their Gaussian.
            state = {key: value if key.endswith("sigma_spatial") else value * 0 for key, value in state.items()}
        return method.build(settings, state, "fp32", partial(small_vit, max(channels, 8)))


def small_vit(channels: int) -> nn.Module:
    """Six blocks at patch 16, for images of 64 pixels and others."""
    torch.manual_seed(0)
    options = {"embed_dim": channels, "depth": 6, "num_heads": 2, "img_size": 64, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **options).eval()


def features(batch: int, channels: int, grid: tuple[int, int], seed: int = 0) -> PatchFeatures:
    return features_of(torch.randn(batch, channels, *grid, generator=torch.Generator().manual_seed(seed)))


def features_of(maps: Tensor) -> PatchFeatures:
    return PatchFeatures(layers={5: maps}, prefix={5: maps.new_zeros(len(maps), 0, maps.shape[1])}, stride=16)


def images(batch: int, grid: tuple[int, int], seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, grid[0] * 16, grid[1] * 16, generator=torch.Generator().manual_seed(seed))


def allow_part(upsampler: Upsampler, batch: int, channels: int, grid: tuple[int, int], target: tuple[int, int]) -> None:
    """Let it take a sixteenth of what it takes for all cells at once, but never next to nothing."""
    upsampler.allow(2**40)
    whole = upsampler.call_bytes(batch, channels, grid, (16 * grid[0], 16 * grid[1]), target)
    upsampler.allow(max(2**14, whole // 16))


class UpsamplerContract:
    cases: ClassVar[Sequence[Case]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        metafunc.parametrize("case", self.cases, ids=str)

    @pytest.mark.parametrize("grid", [(4, 6), (8, 2), (3, 5)])
    def test_gives_the_asked_grid_as_float32(self, case, grid):
        if case.factor < 1 and grid == (3, 5):
            pytest.skip("odd sides don't halve")
        grid = max(grid[0], case.smallest), max(grid[1], case.smallest)

        out = case.make(8)(images(2, grid), features(2, 8, grid), (5,), case.target(grid))

        assert out.shape == (2, 8, *case.target(grid))
        assert out.dtype == torch.float32

    def test_takes_half_precision_maps(self, case):
        half = features_of(features(1, 8, (4, 4)).layers[5].bfloat16())

        out = case.make(8)(images(1, (4, 4)), half, (5,), case.target((4, 4)))

        assert out.dtype == torch.float32
        assert torch.isfinite(out).all()

    def test_is_deterministic_and_does_not_depend_on_the_batch(self, case):
        grid = (4, 6)
        upsampler, target = case.make(8), case.target(grid)
        batch, pictures = features(3, 8, grid), images(3, grid)
        alone = features_of(batch.layers[5][1:2])

        together = upsampler(pictures, batch, (5,), target)

        torch.testing.assert_close(together, upsampler(pictures, batch, (5,), target), rtol=0, atol=0)
        torch.testing.assert_close(together[1:2], upsampler(pictures[1:2], alone, (5,), target), rtol=1e-5, atol=1e-5)

    def test_reads_what_it_says_it_needs(self, case):
        needs, grid = find_method(case.method).needs, (4, 6)
        upsampler, target = case.make(8), case.target(grid)
        out = upsampler(images(1, grid), features(1, 8, grid), (5,), target)

        with_other_image = upsampler(images(1, grid, seed=2), features(1, 8, grid), (5,), target)
        with_other_maps = upsampler(images(1, grid), features(1, 8, grid, seed=3), (5,), target)

        assert torch.equal(out, with_other_maps) == ("maps" not in needs)
        if "image" not in needs:
            assert torch.equal(out, with_other_image)

    def test_constant_maps_stay_constant(self, case):
        if find_method(case.method).learned and not case.residual and not case.convex:
            pytest.skip("nothing bypasses its weights")

        flat = features_of(torch.full((1, 4, 6, 6), 2.5))
        out = case.make(4, plain=not case.convex)(images(1, (6, 6)), flat, (5,), case.target((6, 6)))

        torch.testing.assert_close(out, torch.full_like(out, 2.5))

    def test_cells_tile_the_area_of_the_source(self, case):
        """A map that grows by 1 per cell has, at a cell centre c of any grid, the value c in source cells."""
        if not case.smooth or (find_method(case.method).learned and not case.residual):
            pytest.skip("it interpolates nothing smoothly, or only beside its weights")
        source, target = features_of(torch.arange(12.0).expand(1, 1, 12, 12)), case.target((12, 12))

        # An image without edges guides to nothing.
        out = case.make(1, plain=True)(torch.zeros_like(images(1, (12, 12))), source, (5,), target)

        centres = (torch.arange(target[1]) + 0.5) * 12 / target[1] - 0.5
        inside = slice(target[1] // 4, -target[1] // 4)
        # A grid that is off by half a cell would be off by 0.25; bicubic with a = -0.75 bends a ramp by 0.02.
        torch.testing.assert_close(out[0, 0, target[0] // 2, inside], centres[inside], rtol=0, atol=0.05)

    def test_several_layers_are_stacked_along_the_channels(self, case):
        if "maps" not in find_method(case.method).needs:
            pytest.skip("it makes layers of its own")
        other, last = (features(1, 4, (6, 6), seed=seed).layers[5] for seed in (2, 0))
        two = PatchFeatures(layers={2: other, 5: last}, prefix={2: torch.zeros(1, 0, 4), 5: torch.zeros(1, 0, 4)}, stride=16)
        one = features_of(two.stacked((5, 2)))
        upsampler, target = case.make(8), case.target((6, 6))

        out = upsampler(images(1, (6, 6)), two, (5, 2), target)

        assert torch.equal(out, upsampler(images(1, (6, 6)), one, (5,), target))
        assert not torch.equal(out, upsampler(images(1, (6, 6)), two, (2, 5), target))

    @pytest.mark.parametrize("together", [True, False])
    def test_memory_stays_under_peak_bytes(self, case, together):
        grid = (8, 8)
        upsampler, target = case.make(64), case.target(grid)
        if not together:
            allow_part(upsampler, 2, 64, grid, target)
        source, pictures = features(2, 64, grid), images(2, grid)
        upsampler(pictures, source, (5,), target)

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            out = upsampler(pictures, source, (5,), target)

        changes = [event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
        peak = max(itertools.accumulate(changes))
        bound = upsampler.call_bytes(2, 64, grid, (128, 128), target)
        assert math.prod(out.shape) * 4 <= peak <= bound <= upsampler.peak_bytes(2, 64, target)
        assert upsampler.kept_bytes(2) < bound

    def test_what_it_takes_at_once_changes_nothing(self, case):
        grid = (4, 6)
        upsampler, given = case.make(8), (images(3, grid), features(3, 8, grid), (5,), case.target(grid))
        upsampler.allow(2**40)
        whole = upsampler(*given)

        allow_part(upsampler, 3, 8, grid, case.target(grid))

        torch.testing.assert_close(upsampler(*given), whole, rtol=1e-5, atol=1e-5)

    def test_on_a_gpu_all_is_there_and_no_part_of_a_grid_is_waited_for(self, case):
        """A GPU without a driver (`pretended_gpu`): other devices' tensors are refused, and the host's waiting is counted."""
        grid = (4, 6)
        upsampler, pictures, source, target = case.make(8), images(2, grid), features(2, 8, grid), case.target(grid)
        with sdpa_kernel(SDPBackend.MATH):
            expected = case.make(8)(pictures, source, (5,), target)

        with pretended_gpu() as gpu:
            there = pictures.to("cuda"), features_of(source.layers[5].to("cuda")), (5,), target
            found = upsampler(*there)  # which brings the weights
            waits = []
            for in_parts in (False, True):
                upsampler.forget()
                upsampler.allow(2**40)
                if in_parts:
                    allow_part(upsampler, 2, 8, grid, target)
                before = gpu.waits
                gpu.where.clear()
                upsampler(*there)
                waits.append(gpu.waits - before)

        assert found.device.type == "cuda"
        torch.testing.assert_close(found.held, expected, rtol=1e-5, atol=1e-5)
        assert gpu.to_host == []
        assert waits == [0, 0], gpu.where

    def test_what_it_forgets_it_makes_again(self, case):
        upsampler, given = case.make(8), (images(1, (4, 4)), features(1, 8, (4, 4)), (5,), case.target((4, 4)))
        before = upsampler(*given)

        upsampler.forget()

        assert torch.equal(upsampler(*given), before)

    def test_a_checkpoint_of_it_is_read_as_it_was_written(self, case):
        method, settings, state = case.weights(8)
        saved = json.loads(json.dumps(method.to_json(settings)))

        if not method.learned:
            assert not state
            return
        again, loaded = method.read(state, saved, TimmBackbone(small_vit(8)))

        assert saved["method"] == method.name == case.method
        assert again == settings
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], state[name]) for name in state)
        with pytest.raises(UpsamplerError):
            method.read({}, saved, TimmBackbone(small_vit(8)))
