"""The readouts that DeAP was compared with: a map resampled to the query grid, then the same
convolutions (Fig. 4 of DeAP's paper).

Shapes: B batch, C backbone channels, D query channels, h w cells of the given map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators.readouts.readout import (
    CODE,
    PixelDecoder,
    Readout,
    ReadoutError,
    feed_forward,
    position_code,
    query_grid,
    resized,
)

_Size = tuple[int, int]


class Bicubic(Readout):
    """Projected to D channels, sampled bicubically with aligned corners, then DeAP's feed-forward and convolutions."""

    settings = frozenset({"dim", "output_bias"})

    def __init__(self, channels: int, outputs: int, width: int, *, dim: int, output_bias: float):
        super().__init__(channels, outputs)
        self.proj = nn.Conv2d(channels, dim, 1)
        self.ffn = feed_forward(dim, dim)
        self.decoder = PixelDecoder(dim, outputs, width, output_bias)

    def _predict(self, features_BChw: Tensor, size: tuple[int, int], _pooled_BC: Tensor | None) -> Tensor:
        grid = query_grid(size)
        projected = self.proj(features_BChw).float()
        # Aligned corners, as in the release: the grid's outer queries lie on the outer cells' centres.
        queries = F.interpolate(projected, size=grid, mode="bicubic", align_corners=True)
        return self.decoder(self.ffn(queries.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class TransposedConv(Readout):
    """The paper's baseline: one transposed convolution to the query grid, then the convolutions.

    The paper says no more. Ours has kernel = stride, as large as `grid` (cells of the map that it is trained on) needs to
    reach the queries of `output` pixels; where it overshoots, or other sizes are asked for, bilinear resizing follows.
    """

    settings = frozenset({"output", "grid", "dim", "output_bias"})

    def __init__(
        self, channels: int, outputs: int, width: int, *, output: _Size, grid: _Size, dim: int, output_bias: float
    ):
        super().__init__(channels, outputs)
        rows, columns = query_grid(output)
        stride = (-(-rows // grid[0]), -(-columns // grid[1]))
        self.up = nn.ConvTranspose2d(channels, dim, stride, stride=stride)
        self.decoder = PixelDecoder(dim, outputs, width, output_bias)

    def _predict(self, features_BChw: Tensor, size: tuple[int, int], _pooled_BC: Tensor | None) -> Tensor:
        return self.decoder(resized(self.up(features_BChw).float(), query_grid(size)))


class StridedConv(Readout):
    """What the release runs as "transposed": normalised, projected, a strided convolution, resized to the query grid.

    Learned position channels for the queries of `output` pixels are appended; for other sizes they are resized. How they
    begin isn't known: as DeAP's position codes, here. `grid` are the cells of the map that it is trained on.
    """

    settings = TransposedConv.settings
    appended = CODE
    channel_groups = 16

    def __init__(
        self, channels: int, outputs: int, width: int, *, output: _Size, grid: _Size, dim: int, output_bias: float
    ):
        super().__init__(channels, outputs)
        queries = query_grid(output)
        stride = (max(1, grid[0] // queries[0]), max(1, grid[1] // queries[1]))
        code = position_code(queries).t().unflatten(1, queries).contiguous()
        self.norm = nn.GroupNorm(16, channels)
        self.proj = nn.Conv2d(channels, dim, 1)
        self.down = nn.Conv2d(dim, dim, stride, stride=stride)
        self.positions = nn.Parameter(code)
        self.query_norm = nn.GroupNorm(8, dim + CODE)
        self.decoder = PixelDecoder(dim + CODE, outputs, width, output_bias)

    @classmethod
    def dim_groups(cls, heads: int) -> int:  # noqa: ARG003
        return 8

    def _predict(self, features_BChw: Tensor, size: tuple[int, int], _pooled_BC: Tensor | None) -> Tensor:
        kernel, given = self.down.kernel_size, features_BChw.shape[-2:]
        if given[0] < kernel[0] or given[1] < kernel[1]:
            raise ReadoutError(
                f"a map of {given[0]}x{given[1]} cells is smaller than this readout's strided convolution, "
                f"{kernel[0]}x{kernel[1]}; give `grid` as its maps are"
            )
        grid = query_grid(size)
        reduced = self.down(self.proj(self.norm(features_BChw))).float()
        # The release's trilinear resizing leaves the third axis, the channels, as it is.
        positions = resized(self.positions[None], grid).expand(len(reduced), -1, -1, -1)
        queries = torch.cat([resized(reduced, grid), positions], dim=1)
        return self.decoder(self.query_norm(queries))
