"""Nearest neighbours of points among the pixels of a bilinearly enlarged map, without making that map.

Bilinear enlargement is linear, so it may be applied to the similarities instead of the features: dot products are taken with
the h x w cells and then enlarged. The length of an enlarged feature is a quadratic form in its four cells' dot products with
each other. No work per pixel depends on the number of channels, and nothing of size H x W x C exists.

Most pixels aren't looked at. Between four cells, a similarity is at most the largest of theirs, divided by the shortest length
there; where that is below the best that is known, no pixel can be better. Of a map that isn't enlarged, only those cells are
taken in float64 that float32 leaves within its rounding of the best one.

Of tied pixels the first in raster order is taken; those that the border repeats are looked at once. All other arithmetic is
float64, so that rounding decides only between similarities that agree in some 15 digits.

Shapes: K points, C channels, h w cells of a map, H W pixels it is enlarged to.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Normalise = Literal["cells", "pixels"]
"""Where features are brought to length 1: in the map, and not again after its enlargement, or in the enlarged map (cosine)."""

_VANISHED = 1e-13
"""Squared lengths below this share of the largest squared value are cancellation: such pixels have similarity 0."""


@dataclass(frozen=True, kw_only=True)
class Matches:
    """Best pixels `xy_K2` (column, row; int64) and their similarities `score_K` (float64)."""

    xy_K2: Tensor
    score_K: Tensor


def best_pixels(
    queries_KC: Tensor, map_hwC: Tensor, size: tuple[int, int], *, normalise: Normalise, max_bytes: int = 2**26
) -> Matches:
    """The pixel of `map_hwC`, enlarged to `size` (H, W), that is most similar to each query.

    Enlarged as `F.interpolate(mode="bilinear", align_corners=False)` does it; with `size` equal to the map's grid nothing is
    enlarged. Similarity is the dot product with features of length 1 (`cells`: of cells, so pixels between unlike cells are
    shorter) or the cosine (`pixels`). Rows of pixels are taken together as far as their working memory stays below
    `max_bytes`, one at least. Raises `ValueError` on shapes that don't fit, empty ones, NaN or infinity.
    """
    peak = _check(queries_KC, map_hwC, size)
    grid, device = (map_hwC.shape[0], map_hwC.shape[1]), map_hwC.device
    queries = queries_KC.to(device, torch.float64)
    if normalise == "pixels":
        queries = F.normalize(queries, dim=1)
    if tuple(size) == grid:
        normalise = "cells"  # the same where cells are pixels, and cheaper
    # Between neighbouring cells the similarity is linear along each axis, and best at an end; a cosine may peak within.
    # Which pixels these are depends on sizes alone: that is found out on the host, where nobody waits for it.
    rows, columns = (_candidates(cells, pixels, ends_only=normalise == "cells") for cells, pixels in zip(grid, size, strict=True))
    best = _Best(queries, size)
    for band in rows.bands(_rows_at_once(queries, map_hwC, rows, columns, max_bytes)):
        start, stop = int(band.lower[0]), int(band.upper[-1]) + 1
        if tuple(size) == grid and _LEAST < peak < _MOST:
            _look_at_cells(best, queries, map_hwC[start:stop], start)
            continue
        cells = map_hwC[start:stop].double()
        lengths = None
        if normalise == "cells":
            cells = F.normalize(cells, dim=-1)
        else:
            squared = _squared_lengths(cells, band.to(device), columns.to(device), start)
            lengths = torch.where(squared > _VANISHED * peak**2, squared.rsqrt(), 0.0)
        dots = (queries @ cells.flatten(0, 1).t()).unflatten(1, cells.shape[:2])
        _look_between_cells(best, _Between(dots, band.moved(-start), columns, lengths), max_bytes)
    return Matches(xy_K2=torch.stack([best.pixel_K % size[1], best.pixel_K // size[1]], dim=1), score_K=best.score_K)


class _Best:
    """Of each query, the best similarity so far, and the number of its pixel in raster order."""

    def __init__(self, queries_KC: Tensor, size: tuple[int, int]) -> None:
        self.score_K = torch.full((len(queries_KC),), -torch.inf, dtype=torch.float64, device=queries_KC.device)
        self.pixel_K = torch.full_like(self.score_K, size[0] * size[1], dtype=torch.int64)
        self.width = size[1]

    def add(self, query_P: Tensor, score_P: Tensor, pixel_P: Tensor) -> None:
        """Similarities of some queries, of which each may be there several times."""
        score = self.score_K.scatter_reduce(0, query_P, score_P, "amax")
        tied = score_P == score[query_P]
        known = torch.where(self.score_K == score, self.pixel_K, self.pixel_K.max().clamp(min=int(pixel_P.max())))
        self.pixel_K = known.scatter_reduce(0, query_P[tied], pixel_P[tied], "amin")
        self.score_K = score


def pixel_features(map_hwC: Tensor, size: tuple[int, int], xy_K2: Tensor, *, normalise: Normalise) -> Tensor:
    """Features float64 [K, C] of pixels (column, row) of `map_hwC` enlarged to `size`; lengths are as `normalise` leaves them.

    Raises `ValueError` where a pixel lies outside of `size`.
    """
    _check(map_hwC.new_zeros(1, map_hwC.shape[-1]), map_hwC, size)
    xy = xy_K2.to(map_hwC.device, torch.int64)
    limits = torch.tensor([size[1], size[0]], device=xy.device)
    if ((xy < 0) | (xy >= limits)).any():
        raise ValueError(f"pixels {xy.tolist()} (x, y) reach outside of {size[1]} x {size[0]} pixels")
    rows, columns = (_axis(xy[:, 1 - i], map_hwC.shape[i], size[i]) for i in (0, 1))

    def cells(row: Tensor, column: Tensor) -> Tensor:
        found = map_hwC[row, column].double()
        return F.normalize(found, dim=1) if normalise == "cells" else found

    upper, lower = (
        torch.lerp(cells(row, columns.lower), cells(row, columns.upper), columns.weight[:, None])
        for row in (rows.lower, rows.upper)
    )
    features = torch.lerp(upper, lower, rows.weight[:, None])
    return F.normalize(features, dim=1) if normalise == "pixels" else features


def _check(queries: Tensor, features: Tensor, size: tuple[int, int]) -> float:
    """The map's largest absolute value."""
    if features.ndim != 3 or queries.ndim != 2 or queries.shape[1] != features.shape[2]:
        raise ValueError(f"queries [K, C] and a map [h, w, C] are needed, got {tuple(queries.shape)} and {tuple(features.shape)}")
    if 0 in features.shape or min(size) < 1:
        raise ValueError(f"a map {tuple(features.shape)} can't be enlarged to {tuple(size)} pixels")
    # Not isfinite(), whose result would be as large as the map.
    peak = max(float(value.abs()) for value in features.aminmax())
    if not queries.isfinite().all() or not math.isfinite(peak):
        raise ValueError("features hold NaN or infinity; rows of failed samples in a store are NaN: leave them out")
    return peak


@dataclass(frozen=True)
class _Axis:
    """Pixels along one axis, the two cells that each lies between, and the second one's weight."""

    pixel: Tensor
    lower: Tensor
    upper: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.pixel)

    def __getitem__(self, part: slice | Tensor) -> "_Axis":
        return _Axis(self.pixel[part], self.lower[part], self.upper[part], self.weight[part])

    def to(self, device: torch.device) -> "_Axis":
        return _Axis(*(each.to(device) for each in (self.pixel, self.lower, self.upper, self.weight)))

    def moved(self, cells: int) -> "_Axis":
        """Between cells of numbers that are larger by `cells`."""
        return _Axis(self.pixel, self.lower + cells, self.upper + cells, self.weight)

    def bands(self, step: int) -> Iterator["_Axis"]:
        for i in range(0, len(self), step):
            yield self[i : i + step]


def _axis(pixel: Tensor, cells: int, pixels: int) -> _Axis:
    """For some pixels of an axis where `cells` are enlarged to `pixels`; outside of the outer cells' centres these repeat."""
    centre = ((pixel.double() + 0.5) * cells / pixels - 0.5).clamp(0, cells - 1)
    lower = centre.floor().long()
    return _Axis(pixel, lower, (lower + 1).clamp(max=cells - 1), centre - lower)


def _candidates(cells: int, pixels: int, *, ends_only: bool) -> _Axis:
    """An axis' pixels that differ from the one before, or only the first and the last one between each two cells."""
    axis = _axis(torch.arange(pixels), cells, pixels)
    begins = torch.ones(pixels + 1, dtype=torch.bool)
    begins[1:-1] = axis.lower[1:] != axis.lower[:-1]
    if ends_only:
        return axis[begins[:-1] | begins[1:]]
    begins[1:-1] |= axis.weight[1:] != axis.weight[:-1]
    return axis[begins[:-1]]


def _rows_at_once(queries: Tensor, features: Tensor, rows: _Axis, columns: _Axis, max_bytes: int) -> int:
    h, w, channels = features.shape
    # Similarities and two intermediates; of the cells, a copy and two products.
    per_row = 3 * 8 * (len(queries) + 2) * len(columns) + 3 * 8 * w * channels * h / len(rows)
    return max(1, int(max_bytes / per_row))


_FEW = 4
"""Pixels between four cells, of which a bound saves nothing."""

_LEAST, _MOST = 1e-6, 1e15
"""Largest values of maps whose cells' lengths float32 can hold, but for those of cells that are far shorter than the longest."""


def _look_at_cells(best: _Best, queries_KC: Tensor, band_hwC: Tensor, start: int) -> None:
    """Of a map that isn't enlarged, the rows from `start` on: float32 says which cells may be the best, float64 which one is."""
    cells = band_hwC.flatten(0, 1)
    rough, of_queries = cells.float(), queries_KC.norm(dim=1)
    lengths = rough.norm(dim=1)
    similarity = (queries_KC.float() @ rough.t()) / lengths
    # Sums of C products are off by C roundings at most; a cell that is too short for float32 is looked at in any case.
    margin = 4 * cells.shape[1] * 2.0**-24 * of_queries
    similarity = torch.where(lengths > 1e-15, similarity, torch.inf)
    known = torch.where(lengths > 1e-15, similarity, -torch.inf).amax(dim=1).double()
    query, cell = (similarity >= (torch.maximum(known - margin, best.score_K) - margin)[:, None]).nonzero(as_tuple=True)
    if len(query):
        exact = torch.linalg.vecdot(F.normalize(cells[cell].double(), dim=1), queries_KC[query])
        best.add(query, exact, cell + start * best.width)


@dataclass(frozen=True)
class _Between:
    """Similarities before their enlargement: `dots` float64 [K, h, w] with cells, the axes that enlarge them, and one by the
    length of each enlarged feature [H, W], or None where lengths don't count."""

    dots: Tensor
    rows: _Axis
    columns: _Axis
    lengths: Tensor | None

    def everywhere(self) -> Tensor:
        """Similarities [K, rows, columns]."""
        across = torch.lerp(self.dots[..., self.columns.lower], self.dots[..., self.columns.upper], self.columns.weight)
        found = torch.lerp(across[:, self.rows.lower], across[:, self.rows.upper], self.rows.weight[:, None])
        return found if self.lengths is None else found * self.lengths

    def at(self, query: Tensor, row_Ps: Tensor, column_Pt: Tensor) -> Tensor:
        """Similarities [P, s, t] of `query` [P] with pixels at numbers of rows [P, s] and columns [P, t] of one cell's each."""
        first_row, first_column = row_Ps[:, :1], column_Pt[:, :1]
        upper, lower = (
            torch.lerp(
                self.dots[query[:, None], row, self.columns.lower[first_column]],
                self.dots[query[:, None], row, self.columns.upper[first_column]],
                self.columns.weight[column_Pt],
            )
            for row in (self.rows.lower[first_row], self.rows.upper[first_row])
        )
        found = torch.lerp(upper[:, None], lower[:, None], self.rows.weight[row_Ps][..., None])
        return found if self.lengths is None else found * self.lengths[row_Ps[..., None], column_Pt[:, None]]


def _look_between_cells(best: _Best, between: _Between, max_bytes: int) -> None:
    """First where the bound is highest, then wherever it isn't below what that found; everywhere, where bounds save nothing."""
    rows, columns = (_parts(axis).to(between.dots.device) for axis in (between.rows, between.columns))
    between = _Between(between.dots, between.rows.to(rows.device), between.columns.to(rows.device), between.lengths)
    if rows.shape[1] * columns.shape[1] <= _FEW:
        score, flat = between.everywhere().flatten(1).max(dim=1)
        y, x = between.rows.pixel[flat // len(between.columns)], between.columns.pixel[flat % len(between.columns)]
        best.add(torch.arange(len(score), device=score.device), score, y * best.width + x)
        return
    bound = _bounds(between, rows, columns).flatten(1)
    highest = bound.argmax(dim=1)
    _look(best, between, torch.arange(len(bound), device=rows.device), highest, rows, columns)
    bound = bound.scatter(1, highest[:, None], -torch.inf)
    # Enlarging rounds, so that a similarity may be above its bound by some 1e-16 of it.
    query, part = (bound >= (best.score_K - 1e-12 * best.score_K.abs())[:, None]).nonzero(as_tuple=True)
    step = max(1, max_bytes // (64 * rows.shape[1] * columns.shape[1]))
    for i in range(0, len(query), step):
        _look(best, between, query[i : i + step], part[i : i + step], rows, columns)


def _parts(axis: _Axis) -> Tensor:
    """Numbers of the pixels [n, s] between the same two cells, in order; the last one of fewer than s is repeated."""
    _, counts = axis.lower.unique_consecutive(return_counts=True)
    offsets = torch.arange(int(counts.max()), device=counts.device)
    return (counts.cumsum(0) - counts)[:, None] + torch.minimum(offsets, counts[:, None] - 1)


def _bounds(between: _Between, rows: Tensor, columns: Tensor) -> Tensor:
    """What no similarity between four cells exceeds, [K, row parts, column parts]."""
    above, below = (between.dots[:, each[rows[:, 0]]] for each in (between.rows.lower, between.rows.upper))
    of_rows = torch.maximum(above, below)
    left, right = (of_rows[..., each[columns[:, 0]]] for each in (between.columns.lower, between.columns.upper))
    highest = torch.maximum(left, right)
    if between.lengths is None:
        return highest
    by_rows = [getattr(torch, f"a{end}")(between.lengths[rows], dim=1) for end in ("min", "max")]
    least, most = (getattr(torch, f"a{end}")(each[:, columns], dim=2) for end, each in zip(("min", "max"), by_rows, strict=True))
    return highest * torch.where(highest > 0, most, least)


def _look(best: _Best, between: _Between, query: Tensor, part: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Similarities of queries with all pixels of a part each."""
    row_Ps, column_Pt = rows[part // len(columns)], columns[part % len(columns)]
    score, flat = between.at(query, row_Ps, column_Pt).flatten(1).max(dim=1)
    row, column = flat // column_Pt.shape[1], flat % column_Pt.shape[1]
    y, x = (
        axis.pixel[each.gather(1, at[:, None])[:, 0]]
        for axis, each, at in ((between.rows, row_Ps, row), (between.columns, column_Pt, column))
    )
    best.add(query, score, y * best.width + x)


def _squared_lengths(cells: Tensor, rows: _Axis, columns: _Axis, start: int) -> Tensor:
    """Of each enlarged feature, [rows, columns]; rounding may leave a negative one where cells cancel out."""
    along = _enlarged_products(cells, cells, columns)
    between = _enlarged_products(cells[:-1], cells[1:], columns)
    # The last cell row has none below it; where it is asked for, its weight is 0.
    between = torch.cat([between, torch.zeros_like(along[:1])])
    upper, lower, below = rows.lower - start, rows.upper - start, rows.weight[:, None]
    above = 1 - below
    return above.square() * along[upper] + 2 * above * below * between[upper] + below.square() * along[lower]


def _enlarged_products(a: Tensor, b: Tensor, columns: _Axis) -> Tensor:
    """Dot products [rows, columns] of `a`'s and `b`'s rows of cells, both enlarged along their columns."""
    dot = torch.linalg.vecdot
    same = dot(a, b)
    mixed = F.pad(dot(a[:, :-1], b[:, 1:]) + dot(a[:, 1:], b[:, :-1]), (0, 1))
    right = columns.weight
    left = 1 - right
    return (
        left.square() * same[:, columns.lower] + left * right * mixed[:, columns.lower] + right.square() * same[:, columns.upper]
    )
