"""Self-similarity of feature maps, as LiFT's Fig. 5 and 6 show it."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def centre_cell(grid: tuple[int, int]) -> tuple[int, int]:
    """(row, column) of the cell whose similarities LiFT shows: half the cells a side, right and below of the true centre."""
    return grid[0] // 2, grid[1] // 2


def finite_map(map_hwC: Tensor | np.ndarray) -> Tensor:
    """A map [h, w, C] as float32, where it is. Raises `ValueError` for an empty one, NaN or infinity."""
    features = torch.as_tensor(map_hwC, dtype=torch.float32)
    if features.ndim != 3 or not features.numel():
        raise ValueError(f"a map [h, w, C] is needed, got {tuple(features.shape)}")
    if not torch.stack(features.aminmax()).isfinite().all():
        raise ValueError("features hold NaN or infinity; rows of failed samples in a store are NaN: leave them out")
    return features


def self_similarity(map_hwC: Tensor | np.ndarray, cell: tuple[int, int] | None = None) -> Tensor:
    """Cosines of one cell (default: `centre_cell`) with all of a map [h, w, C], stretched to 0..1; float32 [h, w] on its device.

    Stretched per map, so that values of different maps can't be compared; a constant map becomes zeros. Raises `ValueError`
    for an empty map, NaN or infinity, `IndexError` for a cell outside of it.
    """
    features = finite_map(map_hwC)
    h, w, _ = features.shape
    row, column = centre_cell((h, w)) if cell is None else cell
    if not (0 <= row < h and 0 <= column < w):
        raise IndexError(f"cell {(row, column)} is outside of {h} x {w} cells")
    similarity = F.cosine_similarity(features, features[row, column], dim=-1)
    low, high = similarity.aminmax()
    return torch.where(high > low, (similarity - low) / (high - low), 0.0)
