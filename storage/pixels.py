"""Where points of an image lie in its features: original pixels, pixels of the model's input, cells.

Coordinates are (x, y) and continuous: pixel i covers [i, i + 1), so the centre of the image's first pixel is (0.5, 0.5).
"""

from dataclasses import dataclass

import numpy as np

from storage.spec import Level


@dataclass(frozen=True, kw_only=True)
class PixelMap:
    """How one upright image of `width` x `height` pixels was placed in the model's input (crop, squash, or pad)."""

    width: int
    height: int
    x_scale: float
    x_offset: float
    y_scale: float
    y_offset: float

    def to_input(self, points_xy: np.ndarray) -> np.ndarray:
        """Points [..., 2] of the original in pixels of the model's input, float64 [..., 2]."""
        return np.asarray(points_xy, np.float64) * self._scale + self._offset

    def to_original(self, points_xy: np.ndarray) -> np.ndarray:
        """Points [..., 2] of the model's input in pixels of the original, float64 [..., 2]."""
        return (np.asarray(points_xy, np.float64) - self._offset) / self._scale

    @property
    def _scale(self) -> np.ndarray:
        return np.array([self.x_scale, self.y_scale])

    @property
    def _offset(self) -> np.ndarray:
        return np.array([self.x_offset, self.y_offset])


def cell_centres(level: Level) -> np.ndarray:
    """Centres of a level's cells in pixels of the model's input, float64 [rows, columns, 2]."""
    (start_y, start_x), (step_y, step_x), (rows, columns) = _placement(level)
    x, y = np.meshgrid(start_x + np.arange(columns) * step_x, start_y + np.arange(rows) * step_y)
    return np.stack([x, y], axis=-1)


def cell_edges(level: Level, input_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Where a level's columns and rows part, in pixels of the model's input (height, width): float64 [columns + 1], [rows + 1].

    Half-way between centres; the first and the last reach to the input's border.
    """
    start, step, (rows, columns) = _placement(level)
    edges = []
    for axis, count in ((1, columns), (0, rows)):
        inner = start[axis] + (np.arange(1, count) - 0.5) * step[axis]
        edges.append(np.concatenate([[0.0], inner, [float(input_size[axis])]]))
    return edges[0], edges[1]


def to_cells(level: Level, input_xy: np.ndarray) -> np.ndarray:
    """Points [..., 2] of the model's input as (column, row) of the level, float64 [..., 2]: whole numbers are centres."""
    (start_y, start_x), (step_y, step_x), _ = _placement(level)
    return (np.asarray(input_xy, np.float64) - [start_x, start_y]) / [step_x, step_y]


def bilinear(features: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Bilinear values of `features` [rows, columns, C] at `cells` [P, 2] (column, row), float32 [P, C].

    Beyond the outermost centres the border's values hold, as in `torch.nn.functional.grid_sample` with
    `padding_mode="border", align_corners=False`.
    """
    limits = np.array([features.shape[1] - 1, features.shape[0] - 1])
    at = np.clip(cells, 0, limits)
    low = np.minimum(np.floor(at).astype(np.int64), np.maximum(limits - 1, 0))
    high = np.minimum(low + 1, limits)
    (fx, fy), (x0, y0), (x1, y1) = (at - low).astype(np.float32).T[..., None], low.T, high.T
    f = np.asarray(features, np.float32)
    top = f[y0, x0] * (1 - fx) + f[y0, x1] * fx
    bottom = f[y1, x0] * (1 - fx) + f[y1, x1] * fx
    return top * (1 - fy) + bottom * fy


def _placement(level: Level) -> tuple[tuple[float, float], tuple[float, float], tuple[int, int]]:
    if level.grid is None or level.start is None or level.step is None:
        raise ValueError(f"level {level.name} is one vector per image: it has no cells; name a dense level")
    return level.start, level.step, level.grid
