"""Nearest neighbours of points among the pixels of a bilinearly enlarged map, without making that map.

Bilinear enlargement is linear, so it may be applied to the similarities instead of the features: dot products are taken with
the h x w cells and then enlarged. The length of an enlarged feature is a quadratic form in its four cells' dot products with
each other. No work per pixel depends on the number of channels, and nothing of size H x W x C exists.

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
    rows, columns = (
        _candidates(cells, pixels, ends_only=normalise == "cells") for cells, pixels in zip(grid, size, strict=True)
    )
    columns = columns.to(device)
    best = torch.full((len(queries),), -torch.inf, dtype=torch.float64, device=device)
    index = torch.zeros((len(queries), 2), dtype=torch.int64, device=device)
    for band in rows.bands(_rows_at_once(queries, map_hwC, rows, columns, max_bytes)):
        start, stop = int(band.lower[0]), int(band.upper[-1]) + 1
        band = band.to(device)
        similarity = _similarities(queries, map_hwC[start:stop], band, start, columns, normalise, _VANISHED * peak**2)
        score, flat = similarity.flatten(1).max(dim=1)
        found = torch.stack([columns.pixel[flat % len(columns)], band.pixel[flat // len(columns)]], dim=1)
        better = score > best
        best, index = torch.where(better, score, best), torch.where(better[:, None], found, index)
    return Matches(xy_K2=index, score_K=best)


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
        raise ValueError(
            f"queries [K, C] and a map [h, w, C] are needed, got {tuple(queries.shape)} and {tuple(features.shape)}"
        )
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


def _similarities(
    queries: Tensor, band_hwC: Tensor, rows: _Axis, start: int, columns: _Axis, normalise: Normalise, vanished: float
) -> Tensor:
    """Float64 [K, rows, columns] for the map's rows from `start` on that `rows` lie between; `vanished` is the squared length
    that counts as none."""
    cells = band_hwC.double()
    if normalise == "cells":
        cells = F.normalize(cells, dim=-1)
    dots = (queries @ cells.flatten(0, 1).t()).unflatten(1, cells.shape[:2])
    across = torch.lerp(dots[..., columns.lower], dots[..., columns.upper], columns.weight)
    similarity = torch.lerp(across[:, rows.lower - start], across[:, rows.upper - start], rows.weight[:, None])
    if normalise == "cells":
        return similarity
    squared = _squared_lengths(cells, rows, columns, start)
    return similarity * torch.where(squared > vanished, squared.rsqrt(), 0.0)


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
        left.square() * same[:, columns.lower]
        + left * right * mixed[:, columns.lower]
        + right.square() * same[:, columns.upper]
    )
