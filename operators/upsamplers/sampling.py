"""Bilinear sampling of some cells of an axis at a time, by torch's numbers for the whole."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """An axis of `size` lines, bilinearly brought to `cells`, any of them at a time; torch's numbers."""

    size: int
    cells: int
    antialias: bool

    @property
    def scale(self) -> float:
        return self.size / self.cells

    @property
    def reach(self) -> float:
        """Lines beyond this distance from a cell's centre aren't read."""
        return max(1.0, self.scale) if self.antialias else 1.0

    def read(self, made: slice) -> tuple[int, int]:
        """First line that cells are made from, and the one after the last."""
        if self.size == self.cells:
            return made.start, made.stop
        first, last = ((cell + 0.5) * self.scale for cell in (made.start, made.stop - 1))
        return max(0, math.floor(first - self.reach)), min(self.size, math.ceil(last + self.reach) + 1)

    def applied(self, maps: Tensor, dim: int, first: int, made: slice) -> Tensor:
        """Cells from `maps`, whose lines along `dim` begin with the axis's line `first`."""
        if self.size == self.cells:
            return maps.narrow(dim, made.start - first, made.stop - made.start)
        cells = torch.arange(made.start, made.stop, dtype=torch.float64, device=maps.device)
        centres = (cells + 0.5) * self.scale
        lines = (centres - self.reach + 0.5).floor() + torch.arange(2 * math.ceil(self.reach) + 1, device=maps.device)[:, None]
        weights = (1 - (lines + 0.5 - centres).abs() / self.reach).clamp(min=0) * ((lines >= 0) & (lines < self.size))
        weights = (weights / weights.sum(dim=0)).to(maps.dtype).view(len(lines), -1, *[1] * (maps.ndim - 1 - dim))
        places = (lines.long() - first).clamp(0, maps.shape[dim] - 1)
        out = weights[0] * maps.index_select(dim, places[0])
        for weight, place in zip(weights[1:], places[1:], strict=True):
            out.addcmul_(weight, maps.index_select(dim, place))
        return out
