"""Cross-attention of continuous queries to an image's tokens, to all of them or to a window.

The published model attends to all tokens in every published setting. A window is a block of K x K tokens round the token
nearest to the query, shifted inward at the borders; on a raster lattice of queries that is NATTEN's neighbourhood attention.
It belongs to the query alone, so that results don't depend on which queries are sent together.

Shapes: B images, N queries, S = h * w tokens, H heads of d channels, D = H * d.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators.upsamplers.vit_up.geometry import Rope

_DENSE = 16
"""Queries a window from which a call for each window is cheaper than a mask over all tokens.

Measured on 2 cores over 28 x 28 tokens, 3 and 6 heads: windows of 3 to 9 break even at 8 on one thread and at 8 to 32 on two,
which stand in each other's way in small calls; windows of 17 at 32 or more. A grid of 8 x 8 queries a token has 64.
"""


Groups: TypeAlias = tuple[tuple[Tensor, tuple[tuple[int, int, int], ...]], ...]
"""For each image the queries' order by window, and (row, column, queries) of each."""


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The window of each query: its first row and column, int64 [B, N], and what all share."""

    rows: Tensor
    columns: Tensor
    sides: tuple[int, int]
    "rows and columns of tokens that a query sees"
    grid: tuple[int, int]
    groups: Groups | None
    "None: attend with a mask"

    @classmethod
    def around(cls, nearest_BN2: Tensor, grid: tuple[int, int], window: int | None) -> "Windows | None":
        """Windows round the nearest tokens (column, row); None where a window holds all tokens."""
        odd = max(grid) if window is None else 2 * (window // 2) + 1
        sides = min(odd, grid[0]), min(odd, grid[1])
        if sides == tuple(grid):
            return None
        rows, columns = (
            (nearest_BN2[..., axis] - side // 2).clamp(0, tokens - side)
            for axis, side, tokens in ((1, sides[0], grid[0]), (0, sides[1], grid[1]))
        )
        # On an accelerator many small calls cost more than masked tokens, and grouping waits for the device.
        groups = _grouped(rows, columns, grid) if nearest_BN2.device.type == "cpu" else None
        return cls(rows=rows, columns=columns, sides=sides, grid=grid, groups=groups)

    def mask(self) -> Tensor:
        """True where a query sees a token, [B, 1, N, S]."""
        (rows, columns), (h, w) = self.sides, self.grid
        row = torch.arange(h, device=self.rows.device) - self.rows[..., None]
        column = torch.arange(w, device=self.rows.device) - self.columns[..., None]
        seen = ((row >= 0) & (row < rows))[..., :, None] & ((column >= 0) & (column < columns))[..., None, :]
        return seen.flatten(-2).unsqueeze(1)


def _grouped(rows: Tensor, columns: Tensor, grid: tuple[int, int]) -> Groups | None:
    """Each image's queries by window, or None where there are few of each."""
    groups = []
    for window in rows * grid[1] + columns:
        sorted_windows, order = window.sort(stable=True)
        found, counts = sorted_windows.unique_consecutive(return_counts=True)
        if len(found) * _DENSE > len(window):
            return None
        at = [(*divmod(number, grid[1]), count) for number, count in zip(found.tolist(), counts.tolist(), strict=True)]
        groups.append((order, tuple(at)))
    return tuple(groups)


def attend(queries_BHNd: Tensor, keys_BHSd: Tensor, values_BHSd: Tensor, windows: Windows | None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over all tokens, or over each query's window: [B, H, N, d].

    Keys and values are never copied for a query: queries of one window share a slice of the tokens, or a mask hides the rest.
    """
    if windows is None:
        return F.scaled_dot_product_attention(queries_BHNd, keys_BHSd, values_BHSd)
    if windows.groups is None:
        return F.scaled_dot_product_attention(queries_BHNd, keys_BHSd, values_BHSd, attn_mask=windows.mask())
    return torch.stack([_attend_by_window(*of_image, windows, i) for i, of_image in enumerate(
        zip(queries_BHNd, keys_BHSd, values_BHSd, strict=True)
    )])  # fmt: skip


def _attend_by_window(
    queries_HNd: Tensor, keys_HSd: Tensor, values_HSd: Tensor, windows: Windows, image: int
) -> Tensor:
    assert windows.groups is not None, "without groups, one mask serves all images"
    order, groups = windows.groups[image]
    keys, values = keys_HSd.unflatten(1, windows.grid), values_HSd.unflatten(1, windows.grid)
    parts = queries_HNd[:, order].split([count for _, _, count in groups], dim=1)
    out = []
    for part, (row, column, _) in zip(parts, groups, strict=True):
        window = (slice(None), slice(row, row + windows.sides[0]), slice(column, column + windows.sides[1]))
        # A batch of one: torch has no fast path for three dimensions on a CPU.
        tokens = (keys[window].flatten(1, 2)[None], values[window].flatten(1, 2)[None])
        out.append(F.scaled_dot_product_attention(part[None], *tokens)[0])
    return torch.cat(out, dim=1)[:, order.argsort()]


class CrossAttention(nn.Module):
    """Linears round `attend`. Keys and values depend on the image alone: `keys_values` once, `forward` for each chunk."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)

    def keys_values(self, tokens_BSD: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Turned keys, and values, both [B, H, S, d]."""
        values = self._split(self.v_proj(tokens_BSD)).contiguous()
        return rope.rotate(self._split(self.k_proj(tokens_BSD))), values

    def forward(
        self, x_BND: Tensor, keys_BHSd: Tensor, values_BHSd: Tensor, rope: Rope, windows: Windows | None
    ) -> Tensor:
        queries = rope.rotate(self._split(self.q_proj(x_BND)))
        return self.out_proj(attend(queries, keys_BHSd, values_BHSd, windows).transpose(1, 2).flatten(-2))

    def _split(self, x_BND: Tensor) -> Tensor:
        return x_BND.unflatten(-1, (self.heads, -1)).transpose(1, 2)
