"""Self-similarity of feature maps, as LiFT's Fig. 5 and 6 show it."""

import numpy as np

from operators.visual import cosine_map


def centre_cell(grid: tuple[int, int]) -> tuple[int, int]:
    """(row, column) of the cell whose similarities LiFT shows: half the cells a side, right and below of the true centre."""
    return grid[0] // 2, grid[1] // 2


def self_similarity(map_hwC: np.ndarray, cell: tuple[int, int] | None = None) -> np.ndarray:
    """Cosines of one cell (default: `centre_cell`) with all of a map [h, w, C], stretched to 0..1; float32 [h, w].

    Stretched per map, so that values of different maps can't be compared; a constant map becomes zeros. Raises `ValueError`
    for an empty map, NaN or infinity, `IndexError` for a cell outside of it.
    """
    if map_hwC.ndim != 3 or not map_hwC.size:
        raise ValueError(f"a map [h, w, C] is needed, got {map_hwC.shape}")
    if not np.isfinite(map_hwC).all():
        raise ValueError("features hold NaN or infinity; rows of failed samples in a store are NaN: leave them out")
    row, column = centre_cell(map_hwC.shape[:2]) if cell is None else cell
    if not (0 <= row < map_hwC.shape[0] and 0 <= column < map_hwC.shape[1]):
        raise IndexError(f"cell {(row, column)} is outside of {map_hwC.shape[0]} x {map_hwC.shape[1]} cells")
    similarity = cosine_map(map_hwC[row, column], map_hwC)
    low, high = similarity.min(), similarity.max()
    return (similarity - low) / (high - low) if high > low else np.zeros_like(similarity)
