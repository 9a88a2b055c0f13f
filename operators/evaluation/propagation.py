"""Label propagation over a clip's feature maps: the protocol of DINO, which LiFT shares (specs/evaluation.md section 2.1).

Each cell of a frame takes the labels of the cells most like it among the first frame and the latest few. Affinities are
computed tile by tile, each tile with the part of the context that its window reaches, so that memory is bounded and cells
outside of the window cost nothing. Only the largest affinities are exponentiated.

Shapes: C channels, h w cells of a map, O objects with the background as number 0, T context frames, N cells of a tile.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


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


class Propagator:
    """Carries labels from frame to frame. Holds `context` + 1 maps of unit features and soft labels, float32."""

    def __init__(
        self, features_hwC: Tensor, labels_Ohw: Tensor, settings: Propagation, *, max_bytes: int = 2**26
    ) -> None:
        """Begin with the first frame's map and its labels (`one_hot`). What a tile needs stays at about `max_bytes`, or it
        is a single cell. Raises `ValueError` for maps of other cells than the labels', NaN or infinity."""
        self.settings, self.max_bytes = settings, max_bytes
        if labels_Ohw.ndim != 3 or not len(labels_Ohw) or labels_Ohw.shape[1:] != features_hwC.shape[:2]:
            raise ValueError(f"labels {tuple(labels_Ohw.shape)} don't fit a map {tuple(features_hwC.shape)}")
        self._shape, self._steps = features_hwC.shape, 0
        unit = self._unit(features_hwC)
        # The first frame, and a ring of the latest ones.
        self._features = unit.new_empty((settings.context + 1, *unit.shape))
        self._labels = unit.new_empty((settings.context + 1, *labels_Ohw.shape))
        self._features[0], self._labels[0] = unit, labels_Ohw

    def step(self, features_hwC: Tensor) -> Tensor:
        """Soft labels float32 [O, h, w] of the next frame; they sum to 1 per cell if the first frame's do."""
        target = self._unit(features_hwC)
        frames = 1 + min(self._steps, self.settings.context)
        soft = torch.empty_like(self._labels[0])
        for rows, columns in self._tiles(frames):
            soft[:, rows, columns] = self._tile(target, self._features[:frames], self._labels[:frames], rows, columns)
        if self.settings.context:
            slot = 1 + self._steps % self.settings.context
            self._features[slot], self._labels[slot] = target, soft
        self._steps += 1
        return soft

    def _unit(self, features: Tensor) -> Tensor:
        if features.shape != self._shape:
            raise ValueError(f"a map {tuple(features.shape)} follows one of {tuple(self._shape)}")
        if not features.isfinite().all():
            raise ValueError("a frame's features hold NaN or infinity; frames that failed in a store are NaN")
        return F.normalize(features.float(), dim=-1)

    def _tiles(self, frames: int) -> Iterator[tuple[slice, slice]]:
        h, w, _ = self._shape
        side = self._tile_side(frames)
        for y in range(0, h, side):
            for x in range(0, w, side):
                yield slice(y, min(y + side, h)), slice(x, min(x + side, w))

    def _tile_side(self, frames: int) -> int:
        h, w, _ = self._shape
        # Smaller tiles waste less of their window, larger ones make for faster products; on small maps all cells see most.
        side = max(8, self.settings.radius)
        if not self.settings.radius or max(h, w) <= 3 * self.settings.radius:
            side = max(h, w)
        while side > 1 and self._tile_bytes(side, frames) > self.max_bytes:
            side -= 1
        return side

    def _tile_bytes(self, side: int, frames: int) -> int:
        h, w, channels = self._shape
        reach = 2 * self.settings.radius + side if self.settings.radius else max(h, w)
        sources = frames * min(reach, h) * min(reach, w)
        # Affinities, which cells see which (bytes and floats, for one frame), and the context's features in one piece.
        cells = min(side, h) * min(side, w)
        return 4 * sources * (cells + channels) + 6 * sources // frames * cells

    def _tile(self, target: Tensor, features: Tensor, labels: Tensor, rows: slice, columns: slice) -> Tensor:
        """Soft labels [O, rows, columns]."""
        around = (slice(None), *(self._reach(part, n) for part, n in zip((rows, columns), self._shape, strict=False)))
        sources = features[around]
        cells = target[rows, columns]
        affinity = cells.flatten(0, 1) @ sources.flatten(0, 2).t()
        if self.settings.radius:
            far = self._far(rows, around[1], affinity.device), self._far(columns, around[2], affinity.device)
            # [rows, columns] of the tile x [rows, columns] of the sources, the same for each frame.
            outside = far[0][:, None, :, None] | far[1][None, :, None, :]
            barred = torch.zeros_like(outside, dtype=affinity.dtype).masked_fill_(outside, -math.inf)
            affinity.view(len(affinity), len(sources), -1).add_(barred.view(len(affinity), 1, -1))
        known = labels[:, :, around[1], around[2]].permute(0, 2, 3, 1).flatten(0, 2)
        soft = _weighted(affinity, known, self.settings)
        return soft.t().unflatten(1, cells.shape[:2])

    def _reach(self, part: slice, cells: int) -> slice:
        radius = self.settings.radius or cells
        return slice(max(0, part.start - radius), min(cells, part.stop + radius))

    def _far(self, part: slice, window: slice, device: torch.device) -> Tensor:
        """Which of a tile's rows (or columns) see which of the sources' not."""
        here = torch.arange(part.start, part.stop, device=device)
        there = torch.arange(window.start, window.stop, device=device)
        return (here[:, None] - there).abs() > self.settings.radius


def _weighted(affinity_NS: Tensor, labels_SO: Tensor, settings: Propagation) -> Tensor:
    """Labels [N, O] of N cells: those of their most similar sources, weighted by exp(similarity / temperature)."""
    k = settings.top_k
    if affinity_NS.shape[1] <= k:
        return _softmax(affinity_NS, settings) @ labels_SO
    values, index = _largest(affinity_NS, k + 1)
    weights = _softmax(values[:, :k], settings)
    soft = torch.einsum("nk,nko->no", weights, labels_SO[index[:, :k]])
    tied = (values[:, k] == values[:, k - 1]) & values[:, k].isfinite()
    if tied.any():
        counted = affinity_NS[tied]
        counted.masked_fill_(counted < values[tied, k - 1 : k], -math.inf)
        soft[tied] = _softmax(counted, settings) @ labels_SO
    return soft


def _softmax(affinity: Tensor, settings: Propagation) -> Tensor:
    # Without subtracting the largest value first the exponential would overflow for temperatures below 0.012.
    return (affinity / settings.temperature).softmax(dim=1)


def _largest(values_NS: Tensor, k: int, group: int = 32) -> tuple[Tensor, Tensor]:
    """The k largest values of each row and their indices, in falling order.

    They lie in the k groups of columns with the largest maxima; taking maxima is much faster than sorting.
    """
    n, width = values_NS.shape
    groups = width // group
    if groups <= k:
        return values_NS.topk(k, dim=1)
    head = values_NS[:, : groups * group].unflatten(1, (groups, group))
    chosen = head.amax(dim=2).topk(k, dim=1, sorted=False).indices
    inside = torch.arange(group, device=values_NS.device)
    tail = torch.arange(groups * group, width, device=values_NS.device)
    index = torch.cat([(chosen[:, :, None] * group + inside).flatten(1), tail.expand(n, -1)], dim=1)
    best = values_NS.gather(1, index).topk(k, dim=1)
    return best.values, index.gather(1, best.indices)


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
    that is constant and positive becomes NaN, and wins everywhere; here it does, too, as infinity.
    """
    enlarged = F.interpolate(soft_Ohw[None], scale_factor=factor, mode="bilinear", align_corners=False)[0]
    low, high = enlarged.amin(dim=(1, 2), keepdim=True), enlarged.amax(dim=(1, 2), keepdim=True)
    stretched = torch.where(high > 0, (enlarged - low) / (high - low), enlarged).nan_to_num(nan=math.inf)
    return nearest(stretched.argmax(dim=0).to(torch.uint8).cpu().numpy(), size)
