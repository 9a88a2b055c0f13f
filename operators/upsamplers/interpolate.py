"""Parameter-free resampling of feature maps: the baselines that learned upsamplers are held against.

torch's interpolation with an explicit target size, align_corners=False, no antialias: cell centres sample the map, the
border is clamped. Bicubic is the Keys kernel with a = -0.75.
"""

import torch.nn.functional as F
from torch import Tensor

from operators.backbone import PatchFeatures
from operators.upsamplers.protocol import Need, Settings, Upsampler, UpsamplerError, WithoutWeights


class Interpolation(WithoutWeights):
    """torch's mode of the method's own name, to any grid; `nearest` is the cell in which a finer cell's centre lies."""

    needs = frozenset[Need]({"maps"})

    def make(self) -> Upsampler:
        return Interpolate("nearest-exact" if self.name == "nearest" else self.name)


class Average(Interpolation):
    """Means of whole cells, to a coarser grid whose sides divide the map's."""

    enlarges = False

    def make(self) -> Upsampler:
        return AveragePool()

    def require_grid(self, settings: Settings, base: tuple[int, int], grid: tuple[int, int]) -> None:
        if base[0] % grid[0] or base[1] % grid[1]:
            raise UpsamplerError(f"{base[0]}x{base[1]} cells don't divide into {grid[0]}x{grid[1]}")


class Interpolate(Upsampler):
    """By torch, to any grid."""

    def __init__(self, mode: str):
        self.mode = mode

    def __call__(
        self, images_BCHW: Tensor, features: PatchFeatures, layers: tuple[int, ...], grid: tuple[int, int]
    ) -> Tensor:
        maps = features.stacked(layers).float()
        corners = {} if self.mode == "nearest-exact" else {"align_corners": False}
        return F.interpolate(maps, size=grid, mode=self.mode, **corners)

    def peak_bytes(self, batch: int, channels: int, grid: tuple[int, int]) -> int:
        # The result, torch's copy of it in another memory order, and the float32 copies of a source that is at most as large.
        return 3 * 4 * batch * channels * grid[0] * grid[1]


class AveragePool(Upsampler):
    """The mean over the cells of the backbone's map that fall into each coarser cell."""

    def __call__(
        self, images_BCHW: Tensor, features: PatchFeatures, layers: tuple[int, ...], grid: tuple[int, int]
    ) -> Tensor:
        h, w = features.grid
        return F.avg_pool2d(features.stacked(layers).float(), (h // grid[0], w // grid[1]))

    def peak_bytes(self, batch: int, channels: int, grid: tuple[int, int]) -> int:
        # Its float32 copy of the source may be larger than the result: at most 16 cells a side go into one.
        return 4 * batch * channels * grid[0] * grid[1] * (1 + 16**2)
