"""Label propagation over a clip's feature maps, which DAVIS scores: the protocol of DINO's code, which LiFT's shares.

Each cell of a frame takes the labels of the cells most like it among the first frame and the latest few. Affinities are
computed tile by tile, each tile with the rows and columns of the context that its windows reach, so that memory is bounded
and most cells outside of them cost nothing. The k largest lie at the k places whose largest affinity over all frames is
largest; so all but one pass work on one map instead of the whole context. Only the largest affinities are exponentiated.

Shapes: C channels, h w cells of a map, N of them in all, O objects with the background as number 0; for a tile M cells, P
places that it reaches, S sources: those places in each context frame.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

TILE_CELLS = 100
"""About so many cells make a tile, in whole rows. Few enough that its affinities stay in a core's cache, enough for fast matrix
products: the best of several sizes on 28 x 28 and 56 x 56 cells."""


@dataclass(frozen=True, kw_only=True)
class Propagation:
    """Settings of the propagation; the defaults are DINO's and LiFT's. Raises `ValueError` where they make no sense."""

    context: int = 7
    "latest frames that are looked at, with their soft labels; the first frame always is, too"
    top_k: int = 5
    "affinities that count per cell; those equal to the k-th count, too"
    radius: int = 12
    "of the square window around a cell, in cells; 0 for none. LiFT keeps 12 on its doubled grid, which halves the window"
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if self.context < 0 or self.top_k < 1 or self.radius < 0 or not self.temperature > 0:
            raise ValueError(f"impossible settings: {self}")


@dataclass(frozen=True, kw_only=True)
class _Tile:
    """Cells that follow each other in one block of columns, and the places that their windows reach."""

    cells: slice
    places_P: Tensor
    "numbers of the places' cells, block by block"
    rows: slice
    blocks: range
    window: tuple[Tensor, Tensor]
    "0 for rows [., M] and columns [., M] that a cell sees, -inf for others"

    def to(self, device: torch.device) -> "_Tile":
        rows, columns = self.window
        return replace(self, places_P=self.places_P.to(device), window=(rows.to(device), columns.to(device)))


class Propagator:
    """Carries labels from frame to frame. Holds `context` + 1 maps of unit features and soft labels, float32."""

    def __init__(self, features_hwC: Tensor, labels_Ohw: Tensor, settings: Propagation, *, max_bytes: int = 2**26) -> None:
        """Begin with the first frame's map and its labels (`one_hot`). What a tile needs stays at about `max_bytes`, or it
        is a single cell. Raises `ValueError` for maps of other cells than the labels', NaN or infinity."""
        self.settings = settings
        if labels_Ohw.ndim != 3 or not len(labels_Ohw) or labels_Ohw.shape[1:] != features_hwC.shape[:2]:
            raise ValueError(f"labels {tuple(labels_Ohw.shape)} don't fit a map {tuple(features_hwC.shape)}")
        self._shape, self._steps = features_hwC.shape, 0
        (h, w, channels), device = self._shape, features_hwC.device
        # Blocks of columns, each by itself in memory: products read the rows that a tile reaches without a copy. On narrow
        # maps most cells see most columns, and there is one block. Here, cells are numbered block by block.
        self._width = settings.radius if settings.radius and w > 3 * settings.radius else w
        numbers = torch.arange(h * w).view(h, w)
        order = torch.cat([block.flatten() for block in numbers.split(self._width, dim=1)])
        self._order = order.to(device)
        # The first frame, and a ring of the latest ones.
        maps = settings.context + 1
        self._features = [
            torch.empty(maps, h, min(self._width, w - x), channels, device=device) for x in range(0, w, self._width)
        ]
        self._labels = torch.empty(maps, h * w, len(labels_Ohw), device=device)
        self._keep(0, self._unit(features_hwC), labels_Ohw.to(device).flatten(1).t()[self._order])
        cells = max(1, round(TILE_CELLS / self._width)) * self._width
        while cells > 1 and 4 * self._affinities(cells) > max_bytes:
            cells //= 2
        self._scratch = torch.empty(self._affinities(cells), device=device)
        # What tiles are depends on sizes alone, and is found out on the host.
        self._tiles = [tile.to(device) for tile in self._cut(order, cells)]

    def step(self, features_hwC: Tensor) -> Tensor:
        """Soft labels float32 [O, h, w] of the next frame; they sum to 1 per cell if the first frame's do."""
        target = self._unit(features_hwC)
        target_CN = target.t().contiguous()
        frames = 1 + min(self._steps, self.settings.context)
        soft = torch.empty_like(self._labels[0])
        for tile in self._tiles:
            soft[tile.cells] = self._carried(tile, target_CN[:, tile.cells].contiguous(), frames)
        if self.settings.context:
            self._keep(1 + self._steps % self.settings.context, target, soft)
        self._steps += 1
        return torch.empty_like(soft).index_copy_(0, self._order, soft).t().reshape(-1, *self._shape[:2])

    def _unit(self, features: Tensor) -> Tensor:
        """Unit features [N, C], float32."""
        if features.shape != self._shape:
            raise ValueError(f"a map {tuple(features.shape)} follows one of {tuple(self._shape)}")
        # Not isfinite() of all, which takes longer than the rest.
        if not all(extreme.isfinite() for extreme in features.aminmax()):
            raise ValueError("a frame's features hold NaN or infinity; frames that failed in a store are NaN")
        return F.normalize(features.detach().float().flatten(0, 1)[self._order], dim=-1)

    def _keep(self, slot: int, unit_NC: Tensor, labels_NO: Tensor) -> None:
        blocks = unit_NC.split([block[slot].shape[:2].numel() for block in self._features])
        for block, unit in zip(self._features, blocks, strict=True):
            block[slot] = unit.view(block[slot].shape)
        self._labels[slot] = labels_NO

    def _affinities(self, cells: int) -> int:
        """How many a tile of so many cells has at most."""
        (h, w, _), radius = self._shape, self.settings.radius
        rows = min(h, 2 * radius + (cells - 1) // self._width + 2) if radius else h
        return len(self._labels) * rows * min(w, 3 * self._width) * cells

    def _cut(self, order_N: Tensor, count: int) -> Iterator[_Tile]:
        """Tiles of at most `count` cells."""
        (h, w, _), radius = self._shape, self.settings.radius or max(self._shape[:2])
        numbers, start = order_N.argsort().view(h, w), 0
        for block in range(len(self._features)):
            blocks = range(max(0, block - 1), min(len(self._features), block + 2))
            first = blocks.start * self._width
            seen = numbers[:, first : blocks.stop * self._width]
            columns = torch.arange(first, first + seen.shape[1])
            for cells in order_N[start : start + self._features[block][0, ..., 0].numel()].split(count):
                y, x = cells // w, cells % w
                rows = range(max(0, int(y[0]) - radius), min(h, int(y[-1]) + radius + 1))
                places = [part.flatten() for part in seen[rows.start : rows.stop].split(self._width, dim=1)]
                down = torch.arange(rows.start, rows.stop)
                yield _Tile(
                    cells=slice(start, start + len(cells)),
                    places_P=torch.cat(places),
                    rows=slice(rows.start, rows.stop),
                    blocks=blocks,
                    window=(_window(down[:, None] - y, radius), _window(columns[:, None] - x, radius)),
                )
                start += len(cells)

    def _carried(self, tile: _Tile, cells_CM: Tensor, frames: int) -> Tensor:
        """Soft labels [M, O] of a tile's cells."""
        affinity, best = self._compared(tile, cells_CM, frames)
        k, labels = self.settings.top_k, self._labels.flatten(0, 1)
        # The largest affinities lie where the largest of all frames do.
        peaks, places = best.topk(min(k + 1, len(best)), dim=0)
        frame = torch.arange(frames, device=places.device)[:, None, None] * len(self._order)
        # The lesser of an affinity and its place's largest: itself, or -inf outside of the window.
        candidates = torch.minimum(affinity.gather(1, places.expand(frames, -1, -1)), peaks)
        numbers = (tile.places_P[places] + frame).flatten(0, 1).t()
        values, index = candidates.flatten(0, 1).t().topk(min(k + 1, frames * len(places)), dim=1)
        weights = self._softmax(values[:, :k])
        soft = F.embedding_bag(numbers.gather(1, index[:, :k]), labels, per_sample_weights=weights, mode="sum")
        if values.shape[1] > k:
            tied = (values[:, k] == values[:, k - 1]) & values[:, k].isfinite()
            if tied.any():
                counted = torch.minimum(affinity[:, :, tied], best[:, tied])
                counted.masked_fill_(counted < values[tied, k], -math.inf)
                known = labels[(tile.places_P + frame[:, 0]).flatten()]
                soft[tied] = self._softmax(counted.flatten(0, 1).t()) @ known
        return soft

    def _compared(self, tile: _Tile, cells_CM: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """Affinities [T, P, M] of a tile's cells with the places that it reaches in each frame; and the largest of all
        frames [P, M], -inf outside of a cell's window, which is the same in each frame."""
        count = cells_CM.shape[1]
        shape = (frames, len(tile.places_P), count)
        affinity = self._scratch[: math.prod(shape)].view(shape)
        start = 0
        for block in tile.blocks:
            sources = self._features[block][:frames, tile.rows].flatten(1, 2)
            part = affinity[:, start : start + sources.shape[1]]
            torch.bmm(sources, cells_CM.expand(frames, -1, -1), out=part)
            start += sources.shape[1]
        best = affinity.amax(dim=0)
        if self.settings.radius:
            rows, columns = tile.window[0], tile.window[1].split(self._width)
            parts = best.split([len(rows) * len(each) for each in columns])
            for part, each in zip(parts, columns, strict=True):
                part.view(len(rows), *each.shape).add_(rows[:, None]).add_(each)
        return affinity, best

    def _softmax(self, affinity: Tensor) -> Tensor:
        # Without subtracting the largest value first the exponential would overflow for temperatures below 0.012.
        return (affinity / self.settings.temperature).softmax(dim=1)


def _window(distance: Tensor, radius: int) -> Tensor:
    return torch.zeros(distance.shape).masked_fill_(distance.abs() > radius, -math.inf)


def one_hot(labels_HW: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """Float32 [O, h, w] of a label image (0 background) brought to `grid` by nearest neighbour, as Pillow does it.

    O is the largest id that is left, plus 1: an object too small for the grid keeps an all-zero channel, or with the highest
    id none at all. Both are the official code's, and both score 0.
    """
    labels = torch.from_numpy(nearest(np.asarray(labels_HW, np.uint8), grid).astype(np.int64))
    return F.one_hot(labels).permute(2, 0, 1).float()


def nearest(labels_HW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label image uint8 at `size` (H, W) by Pillow's nearest neighbour, whose rounding is not easily had otherwise."""
    return np.array(Image.fromarray(labels_HW).resize((size[1], size[0]), Image.Resampling.NEAREST))


def label_image(soft_Ohw: Tensor, factor: int, size: tuple[int, int]) -> np.ndarray:
    """The hard labels uint8 [*size] of soft ones [O, h, w].

    These are enlarged `factor` times (the patch size, with LiFT's doubled grid, too), each object's map is stretched to
    0..1, the largest object wins, and the image is brought to `size` by nearest neighbour. In the official code a map
    that is constant and positive becomes NaN, and wins everywhere; here it does, too, as infinity. Of objects that are equal
    the first wins; float64, for in float32 rounding decides between maps that are multiples of each other.
    """
    soft = soft_Ohw[None].double()
    enlarged = F.interpolate(soft, scale_factor=factor, mode="bilinear", align_corners=False)[0]
    low, high = enlarged.amin(dim=(1, 2), keepdim=True), enlarged.amax(dim=(1, 2), keepdim=True)
    stretched = torch.where(high > 0, (enlarged - low) / (high - low), enlarged).nan_to_num(nan=math.inf)
    return nearest(stretched.argmax(dim=0).to(torch.uint8).cpu().numpy(), size)
