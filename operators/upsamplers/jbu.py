"""FeatUp's learnable joint bilateral upsampler: per-pixel filters from the image, the same for all channels.

State dicts of FeatUp's modules (arXiv 2403.10516) load as they are. FeatUp's per-pixel filter is a CUDA kernel; here it is a sum
over shifted views, which holds one more map instead of one per tap, forward and backward.

Shapes: B batch, C channels, H W pixels of the guidance, h w cells of the given map, T = (2 radius + 1)^2 taps, row by row.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators.upsamplers.protocol import UpsamplerError, require_counts
from operators.upsamplers.recursive import DOUBLED_BESIDE, DoublingSettings, OfLiftsPaper, StripedNet, doubled, near


@dataclass(frozen=True, kw_only=True)
class JbuSettings(DoublingSettings):
    """What a state dict doesn't tell about joint bilateral filters."""

    radius: int = 3
    "of its filters, in cells"
    stages: int = 1
    "a stack of so many x2 steps with weights of their own; FeatUp's have 4"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "radius", "stages")


class Jbu(OfLiftsPaper[JbuSettings]):
    """One joint bilateral filter, or FeatUp's stack of them."""

    settings = JbuSettings

    def network(self, settings: JbuSettings) -> "JointBilateral | JointBilateralStack":
        if settings.stages > 1:
            return JointBilateralStack(settings.channels, settings.radius, settings.stages)
        return JointBilateral(settings.radius)

    def passes(self, settings: JbuSettings, base: tuple[int, int], grid: tuple[int, int]) -> int:
        passes = super().passes(settings, base, grid)
        if 2 * min(base) <= settings.radius:
            raise UpsamplerError(f"{self.name} of radius {settings.radius} needs more cells than {base[0]}x{base[1]}")
        return passes


class JointBilateral(StripedNet):
    """Features [B, C, h, w] and their normalised images [B, 3, H, W] to [B, C, 2h, 2w]; any C.

    The image is average-pooled to 2h x 2w, which must exceed the radius. Raises `ValueError` where it doesn't.
    """

    def __init__(self, radius: int = 3, key_dim: int = 32):
        super().__init__()
        self.radius, self.key_dim, self.taps = radius, key_dim, (2 * radius + 1) ** 2
        self.range_temp = nn.Parameter(torch.tensor(0.0))
        self.sigma_spatial = nn.Parameter(torch.tensor(1.0))
        self.range_proj = _pointwise(3, key_dim)
        self.fixup_proj = _pointwise(self.taps + 3, self.taps)

    def guidance(self, images_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
        return F.adaptive_avg_pool2d(images_BCHW, grid)

    def rows(self, step: int, guidance_BCHW: Tensor, maps_BChw: Tensor, rows: slice) -> Tensor:
        seen = near(rows, self.radius, guidance_BCHW.shape[-2])
        return self._filtered(guidance_BCHW, doubled(maps_BChw.float(), seen, "bicubic"), rows)

    def filter(self, guidance_BCHW: Tensor, maps_BChw: Tensor) -> Tensor:
        """Bring the maps to the size of the guidance, whatever it is: bicubic, then filtered, [B, C, H, W] float32."""
        height, width = guidance_BCHW.shape[-2:]
        maps = F.interpolate(maps_BChw.float(), size=(height, width), mode="bicubic", align_corners=False)
        return self._filtered(guidance_BCHW, maps, slice(0, height))

    def _filtered(self, guidance: Tensor, near_maps: Tensor, rows: slice) -> Tensor:
        """Rows of the result, from those within the radius of the enlarged maps."""
        height, width = guidance.shape[-2:]
        if min(height, width) <= self.radius:
            raise ValueError(f"joint bilateral filters of radius {self.radius} need more than {height}x{width} cells")
        return cast(Tensor, _Filtered.apply(self._padded(near_maps, rows, height), self.kernel(guidance, rows)))

    def kernel(self, guidance_BCHW: Tensor, rows: slice | None = None) -> Tensor:
        """The filter of each pixel (of these rows), [B, T, H, W] float32: range x spatial, normalised, and a correction."""
        rows = rows or slice(0, guidance_BCHW.shape[-2])
        kernel = self.range_kernel(guidance_BCHW, rows) * self.spatial_kernel()
        kernel = kernel / kernel.sum(dim=1, keepdim=True).clamp(min=1e-7)
        return kernel + 0.1 * self.fixup_proj(torch.cat([kernel, guidance_BCHW[:, :, rows]], dim=1)).float()

    def range_kernel(self, guidance_BCHW: Tensor, rows: slice | None = None) -> Tensor:
        """Softmax over taps of the dot product of a pixel's key with its neighbour's, [B, T, H, W] (of these rows)."""
        height = guidance_BCHW.shape[-2]
        rows = rows or slice(0, height)
        seen = near(rows, self.radius, height)
        near_keys = self.range_proj(guidance_BCHW[:, :, seen]).float()
        keys = near_keys[:, :, rows.start - seen.start : rows.stop - seen.start]
        views = _shifted(self._padded(near_keys, rows, height), self.taps)
        similarity = torch.stack([(keys * view).sum(dim=1) for view in views], dim=1)
        return (similarity * self.range_temp.exp().clamp(1e-4, 1e4)).softmax(dim=1)

    def spatial_kernel(self) -> Tensor:
        """A Gaussian over [-1, 1]^2, whatever the radius, [1, T, 1, 1]."""
        axis = torch.linspace(-1, 1, 2 * self.radius + 1, device=self.sigma_spatial.device)
        distance = axis[:, None].square() + axis[None].square()
        return torch.exp(-distance / (2 * self.sigma_spatial**2)).reshape(1, -1, 1, 1)

    def _padded(self, near_maps: Tensor, rows: slice, height: int) -> Tensor:
        """These rows of the maps, of which those within the radius are given, and what lies within the radius of them: reflected
        where the maps end."""
        radius, seen = self.radius, near(rows, self.radius, height)
        beyond = radius - (rows.start - seen.start), radius - (seen.stop - rows.stop)
        return F.pad(near_maps, [radius, radius, *beyond], mode="reflect")

    def summed_macs(self, grid: tuple[int, int], channels: int) -> int:
        return grid[0] * grid[1] * self.taps * (self.key_dim + channels)

    def stripe_values(self, rows: int, width: int, channels: int) -> int:
        taps, keys, seen, wide = self.taps, self.key_dim, rows + 2 * self.radius, width + 2 * self.radius
        # Kernels: stacked, scaled, softmax, product, with guidance, two projections. Keys: projected, activated, padded.
        kernels = rows * width * (7 * taps + keys + 9) + seen * (3 * width * keys + wide * keys)
        # Maps: the given rows, enlarged, padded, and the result before and after it is finished.
        return kernels + channels * (width * (seen + DOUBLED_BESIDE) * 5 // 4 + wide * seen + 2 * width * rows)


class _Filtered(torch.autograd.Function):
    """Each pixel's weighted sum over its neighbours, from padded maps [B, C, H + 2r, W + 2r] and kernels [B, T, H, W].

    Autograd alone would make a gradient of the size of all kernels, and one of all maps, for every tap.
    """

    @staticmethod
    def forward(ctx: Any, padded: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(padded, kernel)
        views = _shifted(padded, kernel.shape[1])
        out = kernel[:, :1] * next(views)
        for tap, view in enumerate(views, start=1):
            out.addcmul_(kernel[:, tap : tap + 1], view)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        padded, kernel = ctx.saved_tensors
        (gradient,) = gradients
        of_maps = torch.zeros_like(padded) if ctx.needs_input_grad[0] else None
        of_kernel = torch.empty_like(kernel) if ctx.needs_input_grad[1] else None
        taps = kernel.shape[1]
        if of_maps is not None:
            for tap, view in enumerate(_shifted(of_maps, taps)):
                view.addcmul_(kernel[:, tap : tap + 1], gradient)
        if of_kernel is not None:
            products = torch.empty_like(gradient)
            for tap, view in enumerate(_shifted(padded, taps)):
                torch.sum(torch.mul(gradient, view, out=products), dim=1, out=of_kernel[:, tap])
        return of_maps, of_kernel


def _shifted(padded: Tensor, taps: int) -> Iterator[Tensor]:
    """Maps moved by each tap's offset, as views of the padded ones."""
    side = math.isqrt(taps)
    height, width = (n - side + 1 for n in padded.shape[-2:])
    for dy, dx in itertools.product(range(side), repeat=2):
        yield padded[..., dy : dy + height, dx : dx + width]


class JointBilateralStack(StripedNet):
    """`stages` joint bilateral steps and a 1x1 correction: [B, C, h, w] to [B, C, 2^n h, 2^n w], n = `steps` of `stages`.

    Four stages are FeatUp's published `jbu_stack`; with fewer `steps` the same correction follows (as in NAF's copy).
    """

    def __init__(self, channels: int, radius: int = 3, stages: int = 4, key_dim: int = 32):
        super().__init__()
        self.stages = stages
        for i in range(1, stages + 1):
            setattr(self, f"up{i}", JointBilateral(radius, key_dim))
        self.fixup_proj = nn.Sequential(nn.Dropout2d(0.2), nn.Conv2d(channels, channels, 1))

    def guidance(self, images_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
        return self._filter(1).guidance(images_BCHW, grid)

    def rows(self, step: int, guidance_BCHW: Tensor, maps_BChw: Tensor, rows: slice) -> Tensor:
        return self._filter(step).rows(1, guidance_BCHW, maps_BChw, rows)

    def finished(self, maps_BChw: Tensor) -> Tensor:
        return maps_BChw + 0.1 * self.fixup_proj(maps_BChw)

    def summed_macs(self, grid: tuple[int, int], channels: int) -> int:
        return self._filter(1).summed_macs(grid, channels)

    def stripe_values(self, rows: int, width: int, channels: int) -> int:
        return self._filter(1).stripe_values(rows, width, channels) + rows * width * channels

    def _filter(self, step: int) -> JointBilateral:
        return cast(JointBilateral, self.get_submodule(f"up{step}"))


def _pointwise(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 1), nn.GELU(), nn.Dropout2d(0.1), nn.Conv2d(width, width, 1))
