"""FeatUp's learnable joint bilateral upsampler: per-pixel filters from the image, the same for all channels.

State dicts of FeatUp's modules (arXiv 2403.10516) load as they are. FeatUp's per-pixel filter is a CUDA kernel; here it is a sum
over shifted views, which holds one more map instead of one per tap, forward and backward.

Shapes: B batch, C channels, H W pixels of the guidance, h w cells of the given map, T = (2 radius + 1)^2 taps, row by row.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators.upsamplers.protocol import UpsamplerError, require_counts
from operators.upsamplers.recursive import DoublingNet, DoublingSettings, OfLiftsPaper


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
    telling = "range_temp"

    def network(self, settings: JbuSettings) -> "JointBilateral | JointBilateralStack":
        if settings.stages > 1:
            return JointBilateralStack(settings.channels, settings.radius, settings.stages)
        return JointBilateral(settings.radius)

    def passes(self, settings: JbuSettings, base: tuple[int, int], grid: tuple[int, int]) -> int:
        passes = super().passes(settings, base, grid)
        if 2 * min(base) <= settings.radius:
            raise UpsamplerError(f"{self.name} of radius {settings.radius} needs more cells than {base[0]}x{base[1]}")
        return passes


class JointBilateral(DoublingNet):
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

    def forward(self, images_BCHW: Tensor, maps_BChw: Tensor) -> Tensor:
        h, w = maps_BChw.shape[-2:]
        return self.filter(F.adaptive_avg_pool2d(images_BCHW, (2 * h, 2 * w)), maps_BChw)

    def filter(self, guidance_BCHW: Tensor, maps_BChw: Tensor) -> Tensor:
        """Bring the maps to the size of the guidance: bicubic, then filtered, [B, C, H, W] float32."""
        height, width = guidance_BCHW.shape[-2:]
        if min(height, width) <= self.radius:
            raise ValueError(f"joint bilateral filters of radius {self.radius} need more than {height}x{width} cells")
        kernel = self.kernel(guidance_BCHW)
        maps = F.interpolate(maps_BChw.float(), size=(height, width), mode="bicubic", align_corners=False)
        views = self._shifted(maps)
        out = kernel[:, :1] * next(views)
        for tap, view in enumerate(views, start=1):
            out.addcmul_(kernel[:, tap : tap + 1], view)  # keeps no copy for the backward pass: views and kernels only
        return out

    def kernel(self, guidance_BCHW: Tensor) -> Tensor:
        """The filter of each pixel, [B, T, H, W] float32: range x spatial, normalised, plus a learned correction."""
        kernel = self.range_kernel(guidance_BCHW) * self.spatial_kernel()
        kernel = kernel / kernel.sum(dim=1, keepdim=True).clamp(min=1e-7)
        return kernel + 0.1 * self.fixup_proj(torch.cat([kernel, guidance_BCHW], dim=1)).float()

    def range_kernel(self, guidance_BCHW: Tensor) -> Tensor:
        """Softmax over taps of the dot product of a pixel's key with its neighbour's, [B, T, H, W]."""
        keys = self.range_proj(guidance_BCHW).float()
        similarity = torch.stack([(keys * view).sum(dim=1) for view in self._shifted(keys)], dim=1)
        return (similarity * self.range_temp.exp().clamp(1e-4, 1e4)).softmax(dim=1)

    def spatial_kernel(self) -> Tensor:
        """A Gaussian over [-1, 1]^2, whatever the radius, [1, T, 1, 1]."""
        axis = torch.linspace(-1, 1, 2 * self.radius + 1, device=self.sigma_spatial.device)
        distance = axis[:, None].square() + axis[None].square()
        return torch.exp(-distance / (2 * self.sigma_spatial**2)).reshape(1, -1, 1, 1)

    def _shifted(self, maps: Tensor) -> Iterator[Tensor]:
        """The maps moved by each tap's offset, as views of one reflect-padded copy."""
        height, width = maps.shape[-2:]
        padded = F.pad(maps, [self.radius] * 4, mode="reflect")
        for dy, dx in itertools.product(range(2 * self.radius + 1), repeat=2):
            yield padded[..., dy : dy + height, dx : dx + width]

    def working_values(self, grid: tuple[int, int], channels: int) -> int:
        taps, keys = self.taps, self.key_dim
        padded = (grid[0] + 2 * self.radius) * (grid[1] + 2 * self.radius)
        # Kernels: stacked, scaled, softmax, product, with guidance, two projections. Maps: bicubic, result.
        return grid[0] * grid[1] * (7 * taps + 3 * keys + 9 + 2 * channels) + padded * max(channels, keys)


class JointBilateralStack(DoublingNet):
    """`stages` joint bilateral steps and a 1x1 correction: [B, C, h, w] to [B, C, 2^n h, 2^n w], n = `steps` of `stages`.

    Four stages are FeatUp's published `jbu_stack`; with fewer `steps` the same correction follows (as in NAF's copy).
    """

    def __init__(self, channels: int, radius: int = 3, stages: int = 4):
        super().__init__()
        self.stages = stages
        for i in range(1, stages + 1):
            setattr(self, f"up{i}", JointBilateral(radius))
        self.fixup_proj = nn.Sequential(nn.Dropout2d(0.2), nn.Conv2d(channels, channels, 1))

    def forward(self, images_BCHW: Tensor, maps_BChw: Tensor, steps: int | None = None) -> Tensor:
        maps = maps_BChw
        for i in range(1, (steps or self.stages) + 1):
            maps = getattr(self, f"up{i}")(images_BCHW, maps)
        return maps + 0.1 * self.fixup_proj(maps)

    def working_values(self, grid: tuple[int, int], channels: int) -> int:
        return cast(JointBilateral, self.up1).working_values(grid, channels) + grid[0] * grid[1] * channels


def _pointwise(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 1), nn.GELU(), nn.Dropout2d(0.1), nn.Conv2d(width, width, 1))
