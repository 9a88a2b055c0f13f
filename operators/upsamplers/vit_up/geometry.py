"""Where queries are: coordinates, their nearest tokens, offset encoding and rotary tables.

Everything here is float32 whatever the autocast: in bfloat16, which the official wrapper takes, the 448
coordinates of an axis are 353 different ones, and angles are off by up to 0.9.

Shapes: B images, N queries, h w the token grid's rows and columns, d channels of a head. A coordinate is (x, y) in [0, 1] from
the image's left and top edge.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BANDS = 16
ENCODING = 2 + 4 * BANDS
"""Values of an offset's encoding."""
_ROPE_BASE = 100.0


def grid_coordinates(
    grid: tuple[int, int], box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0), device: torch.device | str | None = None
) -> Tensor:
    """Centres of the cells of a grid over `box` = (left, top, right, bottom), row by row: float32 [rows * columns, 2]."""
    rows, columns = grid
    left, top, right, bottom = box
    # Times 1 / n as the official code does, not over n: where centres lie on tokens' borders, the last bit decides.
    y = (torch.arange(rows, device=device, dtype=torch.float32) + 0.5) * (1 / rows) * (bottom - top) + top
    x = (torch.arange(columns, device=device, dtype=torch.float32) + 0.5) * (1 / columns) * (right - left) + left
    return torch.stack([x.repeat(rows), y.repeat_interleave(columns)], dim=-1)


def nearest_tokens(coords_BN2: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Column and row of the token nearest to each query, int64 [B, N, 2], and the offset to its centre in tokens, [B, N, 2].

    Rounding is half-to-even, which decides for every query on a border of two tokens. Queries outside the image take the
    border's token and have offsets beyond 0.5.
    """
    sides = _sides(grid, coords_BN2)
    nearest = (coords_BN2 * sides - 0.5).round().clamp(min=torch.zeros_like(sides), max=sides - 1)
    return nearest.long(), (coords_BN2 - (nearest + 0.5) / sides) * sides


def offset_frequencies() -> Tensor:
    """The offset encoding's frequencies, log-linear from 1 to 10: float32 [16]."""
    return 10.0 ** (torch.arange(BANDS, dtype=torch.float32) / (BANDS - 1))


def encode_offsets(offsets_BN2: Tensor, frequencies: Tensor) -> Tensor:
    """[B, N, 66]: the offset itself, then sines of x and y, then cosines of x and y (the paper says 64 values)."""
    angles = (math.pi * frequencies.float() * offsets_BN2.float()[..., None]).flatten(-2)
    return torch.cat([offsets_BN2.float(), angles.sin(), angles.cos()], dim=-1)


def rope_frequencies(bands: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """The rotary bands' frequencies of an axis, in turns per token, log-linear from 1 to nearly 1 / 100: [bands]."""
    return _ROPE_BASE ** (-torch.arange(bands, dtype=dtype, device=device) / bands)


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Continuous 2-D rotary embeddings: by how much each channel pair turns, the same for every head."""

    turns: Tensor
    "cos + i sin, complex64 [B or 1, 1, N, d / 2]"

    @classmethod
    def of_points(cls, points_BN2: Tensor, head_dim: int) -> "Rope":
        """For points in tokens: a query's (x * w, y * h). The first half of the channels turns with x, the second with y."""
        frequencies = rope_frequencies(head_dim // 4, device=points_BN2.device)
        angles = (2 * math.pi * points_BN2.float()[..., None] * frequencies).flatten(-2).unsqueeze(1)
        return cls(turns=torch.complex(angles.cos(), angles.sin()))

    @classmethod
    def of_queries(cls, coords_BN2: Tensor, grid: tuple[int, int], head_dim: int) -> "Rope":
        return cls.of_points(coords_BN2 * _sides(grid, coords_BN2), head_dim)

    @classmethod
    def of_tokens(cls, grid: tuple[int, int], head_dim: int, device: torch.device) -> "Rope":
        rows, columns = torch.meshgrid(*(torch.arange(side, device=device) for side in grid), indexing="ij")
        centres = torch.stack([columns, rows], dim=-1).flatten(0, 1).float() + 0.5
        return cls.of_points(centres[None], head_dim)

    def rotate(self, x_BHNd: Tensor) -> Tensor:
        """Turn the channel pairs (0, 1), (2, 3), ... in float32; the result has the dtype of `x_BHNd`."""
        pairs = torch.view_as_complex(x_BHNd.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self.turns).flatten(-2).to(x_BHNd.dtype)


def _sides(grid: tuple[int, int], like: Tensor) -> Tensor:
    """The grid's (columns, rows), in the order of coordinates."""
    # Filled in on the device: a copy from the host would wait for the GPU.
    sides = torch.full((2,), float(grid[0]), device=like.device)
    sides[:1].fill_(grid[1])
    return sides
