"""Dilated neighbourhood attention as NATTEN defines it, in plain PyTorch: NAF's, and AnyUp's NATTEN variant; other windows, too.

Along an axis of N positions, with an odd kernel k and a dilation d, position i belongs to the group of those that leave the
same remainder g when divided by d, of which there are L = ceil((N - g) / d). It attends to k neighbours in its group, itself in
their middle; near a border the window is shifted, so that it stays full. A query's neighbourhood is a window of rows times one of
columns.

The two methods attend from a fine grid to a map of h w cells that is enlarged to the grid (nearest-exact), with the dilation
floor(Ho / h), floor(Wo / w). Nothing is enlarged here. A position of the enlarged map is a cell of the map, so that a query's
window is a few cells in a row, of which some may count twice or, where sizes don't divide, one within may not count at all.
Queries are taken in blocks whose windows all but coincide: a block attends to the cells that any of its queries does, by one
product of matrices, to which the logarithm is added of how often each query counts each of them.

Shapes: B batch, N heads, D channels of a query or key, E of a value, h w cells of the map, Ho Wo positions of the grid,
I J those of a tile, S cells that a block attends to, Q queries of a block.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from operators.transfer import to_device
from operators.upsamplers.protocol import UpsamplerError

_QUERIES = 64
"""Blocks have at least so many: each costs a copy of its window, and the larger it is, the more cells most queries don't count.
Fastest or next to it for ratios of 2 to 16 and kernels of 3 to 13 (one CPU core, float32), by up to 3 times."""

_AT_ONCE = {"cpu": 2**22}
_MANY_AT_ONCE = 2**28
"""Logits, or values of the result, that are made at once; many where each operation costs a launch. Measured on a CPU: above 2^23
values the system hands out new pages each time, and the same takes twice as long."""


def neighbours(positions: int, kernel: int, dilation: int) -> np.ndarray:
    """NATTEN's rule for one axis: the positions that each attends to, [positions, kernel].

    Raises `UpsamplerError` unless the kernel is odd, and the axis is at least kernel x dilation long.
    """
    if kernel < 1 or kernel % 2 == 0 or dilation < 1:
        raise UpsamplerError(
            f"neighbourhoods need an odd kernel and a dilation of at least 1, not {kernel} with dilation {dilation}"
        )
    if positions < kernel * dilation:
        raise UpsamplerError(
            f"a neighbourhood of {kernel} with dilation {dilation} takes {kernel * dilation} positions a side, not {positions}"
        )
    at = np.arange(positions)
    group, index = at % dilation, at // dilation
    members = -(-(positions - group) // dilation)
    first = np.clip(index - kernel // 2, 0, members - kernel)
    return group[:, None] + dilation * (first[:, None] + np.arange(kernel))


def nearest_exact(cells: int, positions: int) -> np.ndarray:
    """The cell that each of so many positions shows, [positions], in single precision as `F.interpolate` has it.

    That decides where a centre lies on the border of two cells; there torch's own choice varies with the other axes (2 to 83).
    """
    scale = np.float32(cells) / np.float32(positions)
    centre = scale * (np.arange(positions).astype(np.float32) + np.float32(0.5)) - np.float32(0.5)
    return np.minimum(np.floor(centre + np.float32(0.5)).astype(np.int64), cells - 1)


def neighbour_counts(cells: int, positions: int, kernel: int, dilation: int) -> np.ndarray:
    """How often each position of an axis counts each of a map's cells by NATTEN's rule, [positions, cells]."""
    attended = nearest_exact(cells, positions)[neighbours(positions, kernel, dilation)]
    counts = np.zeros((positions, cells), dtype=np.int64)
    np.add.at(counts, (np.arange(positions)[:, None], attended), 1)
    return counts


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """The windows of one axis, by blocks of queries that follow each other; the last block may be longer than the grid."""

    block: int
    "queries of a block"
    span: int
    "cells of a block's window"
    first: Tensor
    "of each block: [blocks]"
    counts: Tensor | None
    "logarithms of how often each query counts each cell of its block's window, [blocks, span, block]; None where that is once"

    @classmethod
    def of(cls, counts: np.ndarray, block: int, device: torch.device) -> Self:
        """`counts`: how often each position counts each cell, [positions, cells]; each must count one."""
        positions, cells = counts.shape
        blocks = np.concatenate([counts, np.repeat(counts[-1:], -positions % block, axis=0)]).reshape(-1, block, cells)
        seen = blocks.max(1) > 0
        low, high = seen.argmax(1), cells - 1 - seen[:, ::-1].argmax(1)
        span = int((high - low).max()) + 1
        first = np.minimum(low, cells - span)
        within = np.take_along_axis(blocks, (first[:, None] + np.arange(span))[:, None], axis=2)
        with np.errstate(divide="ignore"):
            logarithms = np.log(within.swapaxes(1, 2))
        return cls(
            block=block,
            span=span,
            first=to_device(torch.tensor(first.tolist()), device),
            counts=None if (within == 1).all() else to_device(torch.tensor(logarithms.tolist()), device),
        )

    def blocks(self, part: slice) -> slice:
        """Those that hold these queries."""
        return slice(part.start // self.block, -(-part.stop // self.block))

    def cells(self, part: slice) -> Tensor:
        """Of the windows of these blocks, [blocks, span]."""
        return self.first[part, None] + torch.arange(self.span, device=self.first.device)


@dataclass(frozen=True, kw_only=True)
class Neighbourhoods:
    """From a grid to the cells of a map: made once for both, then asked for tiles of the grid."""

    rows: _Axis
    columns: _Axis

    @classmethod
    def of(
        cls,
        cells: tuple[int, int],
        grid: tuple[int, int],
        kernel: tuple[int, int],
        device: torch.device,
        dilation: tuple[int, int] | None = None,
    ) -> Self:
        """`dilation`: by default the whole number of times that the map goes into the grid, by axis, at least 1."""
        steps = dilation or enlargement(cells, grid)
        rows, columns = (neighbour_counts(*each) for each in zip(cells, grid, kernel, steps, strict=True))
        return cls.counted(rows, columns, steps, device)

    @classmethod
    def counted(cls, rows: np.ndarray, columns: np.ndarray, dilation: tuple[int, int], device: torch.device) -> Self:
        """Of any windows: how often rows of the grid count rows of the map, [positions, cells], and columns likewise."""
        tall, wide = block_of(dilation)
        return cls(rows=_Axis.of(rows, tall, device), columns=_Axis.of(columns, wide, device))

    def attend(self, queries_BNIJD: Tensor, keys_BNhwD: Tensor, values_BMhwE: Tensor, rows: slice, columns: slice) -> Tensor:
        """Cells of a tile, `rows` times `columns` of the grid, whose queries are given: [B, I, J, M * E] of the values' type.

        Either each head has values of its own (M = N), or all share one's (M = 1), and the heads' weights are averaged.
        Logits are products times D ** -0.5 in the precision of queries and keys, whatever autocast says; weights are float32.
        """
        batch, heads, height, width, _ = queries_BNIJD.shape
        with torch.autocast(queries_BNIJD.device.type, enabled=False):
            cells = self.rows.span * self.columns.span
            limit = _AT_ONCE.get(queries_BNIJD.device.type, _MANY_AT_ONCE)
            fit = limit // (batch * max(heads * cells, values_BMhwE.shape[1] * values_BMhwE.shape[-1]))
            down = max(1, fit // (self.rows.block * width)) * self.rows.block
            across = max(1, fit // (down * self.columns.block)) * self.columns.block
            out = values_BMhwE.new_empty(batch, height, width, values_BMhwE.shape[1] * values_BMhwE.shape[-1])
            for down_part, across_part in itertools.product(_parts(rows, down), _parts(columns, across)):
                i, j = (
                    slice(part.start - start, part.stop - start)
                    for part, start in ((down_part, rows.start), (across_part, columns.start))
                )
                out[:, i, j] = self._piece(queries_BNIJD[:, :, i, j], keys_BNhwD, values_BMhwE, down_part, across_part)
            return out

    def _piece(self, queries_BNIJD: Tensor, keys_BNhwD: Tensor, values_BMhwE: Tensor, rows: slice, columns: slice) -> Tensor:
        batch, heads, height, width, depth = queries_BNIJD.shape
        groups = values_BMhwE.shape[1]
        tall, wide = self.rows.blocks(rows), self.columns.blocks(columns)
        block = self.rows.block, self.columns.block
        above, left = rows.start - tall.start * block[0], columns.start - wide.start * block[1]
        down, across = tall.stop - tall.start, wide.stop - wide.start
        padding = (0, 0, left, across * block[1] - left - width, above, down * block[0] - above - height)
        if any(padding):
            queries_BNIJD = F.pad(queries_BNIJD, padding)
        blocks = queries_BNIJD.unflatten(3, (across, block[1])).unflatten(2, (down, block[0]))
        queries = blocks.transpose(3, 4).reshape(batch * heads * down * across, -1, depth)
        cells = self.rows.cells(tall)[:, None, :, None] * keys_BNhwD.shape[3] + self.columns.cells(wide)[None, :, None, :]
        # Keys first, so that the softmax, of few and odd numbers of keys, is of many queries at a time.
        weights = torch.bmm(_windows(keys_BNhwD, cells), queries.transpose(1, 2)).float().mul_(depth**-0.5)
        by_block = weights.view(batch, heads, down, across, self.rows.span, self.columns.span, *block)
        if self.rows.counts is not None:
            by_block.add_(self.rows.counts[tall, None, :, None, :, None])
        if self.columns.counts is not None:
            by_block.add_(self.columns.counts[wide, None, :, None, :])
        weights.sub_(weights.detach().amax(1, keepdim=True)).exp_()
        total = weights.sum(1)[..., None]
        windows = _windows(values_BMhwE, cells)
        if groups == heads:
            out = torch.bmm(weights.to(windows.dtype).transpose(1, 2), windows).div_(total)
        else:
            mean = weights.div_(total.transpose(1, 2)).unflatten(0, (batch, heads, -1)).mean(1).flatten(0, 1)
            out = torch.bmm(mean.to(windows.dtype).transpose(1, 2), windows)
        out = out.view(batch, groups, down, across, *block, -1).permute(0, 2, 4, 3, 5, 1, 6)
        out = out.reshape(batch, down * block[0], across * block[1], -1)
        return out[:, above : above + height, left : left + width]


def enlargement(cells: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """The dilation that NAF and AnyUp take."""
    return max(1, grid[0] // cells[0]), max(1, grid[1] // cells[1])


def block_of(dilation: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the grid that are one block: multiples of the dilation."""
    times = max(1, math.ceil(math.sqrt(_QUERIES / math.prod(dilation))))
    return dilation[0] * times, dilation[1] * times


def query_values(
    cells: tuple[int, int], grid: tuple[int, int], kernel: tuple[int, int], heads: int, depth: int, width: int, shared: bool
) -> int:
    """Upper bound on the values that `Neighbourhoods.attend` holds at once for each query of a tile, its result included.

    `width`: channels of a value (E); `shared`: all heads have the same values.
    """
    steps = enlargement(cells, grid)
    block = block_of(steps)
    # A block of whole groups sees `kernel` cells for each of its groups but the first, and one more where sizes don't divide.
    span = [min(c, b // d + k + (n % c > 0)) for c, b, d, k, n in zip(cells, block, steps, kernel, grid, strict=True)]
    seen, queries = math.prod(span), math.prod(block)
    groups = 1 if shared else heads
    kept = math.ceil(seen * (heads * depth + groups * width + 2) / queries)
    each = 2 * heads * depth + (heads + 1 if shared else heads) * seen * 2 + 3 * groups * width
    # The last blocks may be longer than the grid.
    padded = math.prod(math.ceil(n / b) * b / n for n, b in zip(grid, block, strict=True))
    return math.ceil((kept + each) * padded)


def neighbourhood_attention(
    queries_BNHWD: Tensor, keys_BNHWD: Tensor, values_BNHWE: Tensor, kernel: tuple[int, int], dilation: tuple[int, int] = (1, 1)
) -> Tensor:
    """Attention of a grid to itself, [B, N, H, W, E]: what `natten.na2d` gives in its order of axes."""
    out = values_BNHWE.new_empty(*queries_BNHWD.shape[:-1], values_BNHWE.shape[-1])
    for group in np.ndindex(dilation):
        part = (slice(None), slice(None), slice(group[0], None, dilation[0]), slice(group[1], None, dilation[1]))
        queries = queries_BNHWD[part]
        size = queries.shape[2], queries.shape[3]
        near = Neighbourhoods.of(size, size, kernel, queries.device)
        found = near.attend(queries, keys_BNHWD[part], values_BNHWE[part], slice(0, size[0]), slice(0, size[1]))
        out[part] = found.unflatten(3, values_BNHWE.shape[1::3]).movedim(3, 1)
    return out


def _parts(whole: slice, size: int) -> Iterator[slice]:
    """Of so many positions, beginning at multiples of them."""
    for start in range(whole.start - whole.start % size, whole.stop, size):
        yield slice(max(start, whole.start), min(start + size, whole.stop))


def _windows(map_BNhwD: Tensor, cells: Tensor) -> Tensor:
    """The cells that blocks attend to, [B * N * blocks, S, D]; `cells`: their numbers in the map, [..., S] by blocks."""
    taken = map_BNhwD.flatten(2, 3).index_select(2, cells.flatten())
    return taken.view(-1, math.prod(cells.shape[-2:]), map_BNhwD.shape[-1])
