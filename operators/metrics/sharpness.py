"""Sharpness at outlines: how many times as far apart neighbouring cells of a map are where an outline of labels passes.

Our own measure; no paper has it. A cell's neighbours are those to its right and below, their distance is 1 - cosine. An outline
passes between two cells whose labels differ; of a pair with a void label nothing is known.

Shapes: h w cells of a map, H W cells of labels, at least as many; C channels; n images, k sums, B draws.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from operators.metrics.similarity import finite_map
from storage.datasets.classes import VOID


@dataclass(frozen=True, kw_only=True)
class OutlineSums:
    """What the pairs of one image's cells add up to."""

    apart: float
    "distances of the pairs between which an outline passes"
    pairs: int
    "such pairs"
    apart_elsewhere: float
    pairs_elsewhere: int
    "without an outline between them, nor void on either side"


def neighbour_distances(map_hwC: Tensor | np.ndarray, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """1 - cosine of each cell with that to its right, float32 [H, W - 1], and with that below it [H - 1, W], on the map's device.

    The map is brought to `grid` (H, W) by its nearest cells, so that the same pairs are asked of maps of any grid: within a
    repeated cell the distance is 0, exactly. A vector of zeros has no direction: its distance to others is 1/2. Raises
    `ValueError` for an empty map, NaN or infinity.
    """
    # Halved squares of what lies between vectors of length 1: unlike 1 less a sum of products, 0 for the same ones.
    units = F.normalize(finite_map(map_hwC), dim=-1)
    rows, columns = ((torch.arange(n) * 2 + 1) * of // (2 * n) for n, of in zip(grid, units.shape[:2], strict=True))
    cells = units[rows.to(units.device)][:, columns.to(units.device)]
    right, below = cells[:, 1:] - cells[:, :-1], cells[1:] - cells[:-1]
    return right.square().sum(-1) / 2, below.square().sum(-1) / 2


def outlines(labels_HW: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """Of the pairs as `neighbour_distances` has them, to the right and below: those between which an outline passes, and those
    between which none does; bool. Labels are whole numbers; a pair with a void one (255) is neither."""
    found = []
    for one, other in ((labels_HW[:, 1:], labels_HW[:, :-1]), (labels_HW[1:], labels_HW[:-1])):
        known = (one != VOID) & (other != VOID)
        found.append((known & (one != other), known & (one == other)))
    return tuple(found)


def outline_sums(distances: tuple[Tensor, Tensor], labels_HW: Tensor) -> OutlineSums:
    """Of an image's `neighbour_distances` on the grid of its labels, on one device. Raises `ValueError` where grids differ."""
    sums = torch.zeros(4, dtype=torch.float64, device=labels_HW.device)
    for apart, pairs in zip(distances, outlines(labels_HW), strict=True):
        if apart.shape != pairs[0].shape:
            raise ValueError(f"distances {tuple(apart.shape)} aren't of the pairs of labels {tuple(labels_HW.shape)}")
        sums = sums + torch.stack([each.double().sum() for of in pairs for each in (apart * of, of)])
    apart_at, pairs_at, apart_elsewhere, pairs_elsewhere = sums.tolist()
    return OutlineSums(apart=apart_at, pairs=int(pairs_at), apart_elsewhere=apart_elsewhere, pairs_elsewhere=int(pairs_elsewhere))


def image_sums(images: Sequence[OutlineSums]) -> np.ndarray:
    """Float64 [n, 4], in the order of the fields: what `sharpness` is taken from."""
    return np.array([astuple(each) for each in images], np.float64).reshape(-1, 4)


def sharpness(sums_Bk: np.ndarray) -> np.ndarray:
    """Of sums over images of `image_sums`, [B, 3]: the mean distance at outlines over that elsewhere, then both means. NaN where
    there are no such pairs, or, of the first, where all neighbours elsewhere are alike: there is nothing to measure by."""
    apart, pairs, apart_elsewhere, pairs_elsewhere = sums_Bk.T
    at, elsewhere = _mean(apart, pairs), _mean(apart_elsewhere, pairs_elsewhere)
    return np.stack([_mean(at, elsewhere), at, elsewhere], axis=1)


def _mean(total_B: np.ndarray, of_B: np.ndarray) -> np.ndarray:
    return np.divide(total_B, of_B, out=np.full(len(total_B), np.nan), where=of_B > 0)
