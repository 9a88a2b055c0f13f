"""Masks of annotated objects as training needs them: outlines or pixels, and what of them lies in a box, on a small grid.

COCO's objects are polygons, which are drawn anew inside each box, as Mask R-CNN's target. Objects whose annotation is runs of
pixels are sampled from these.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pycocotools.mask as coco_mask
import torch
from torchvision.ops import roi_align

from storage.datasets.instances import Outline

SMALLEST_SIDE = 0.1
"""Of a box, in pixels, as polygons are scaled into it."""


@dataclass(frozen=True, kw_only=True)
class ObjectMasks:
    """Of the N objects of an image."""

    outlines: Sequence[Outline] = ()

    def __len__(self) -> int:
        return len(self.outlines)

    def targets(self, which_K: np.ndarray, boxes_K4: np.ndarray, side: int) -> torch.Tensor:
        """What of the objects `which` lies in boxes x1, y1, x2, y2, a box for each: bool [K, side, side]."""
        found = np.zeros((len(which_K), side, side), bool)
        for target, number, box in zip(found, which_K.tolist(), boxes_K4, strict=True):
            outline = self.outlines[number]
            target[:] = _drawn(outline, box, side) if isinstance(outline, tuple) else _sampled(outline, box, side)
        return torch.from_numpy(found)


def _drawn(polygons: Sequence[np.ndarray], box: np.ndarray, side: int) -> np.ndarray:
    """Polygons shifted and scaled so that the box is `side` pixels wide and high: bool [side, side]."""
    scale = side / np.maximum(box[2:] - box[:2], SMALLEST_SIDE)
    flat = [((corners - box[:2]) * scale).ravel().tolist() for corners in polygons]
    if not flat:
        return np.zeros((side, side), bool)
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(flat, side, side))).astype(bool)


def _sampled(pixels_HW: np.ndarray, box: np.ndarray, side: int) -> np.ndarray:
    """Pixels averaged over the cells of the box, of which half must be covered: bool [side, side]."""
    pixels = torch.from_numpy(np.ascontiguousarray(pixels_HW, np.float32))[None, None]
    boxes = torch.from_numpy(np.asarray(box, np.float32))[None]
    return (roi_align(pixels, [boxes], (side, side), 1.0, 0, aligned=True)[0, 0] >= 0.5).numpy()


def outline_box(outline: Outline) -> np.ndarray:
    """x1, y1, x2, y2 round all of an object, float32 [4]; zeros where nothing is left of it."""
    if isinstance(outline, tuple):
        corners = np.concatenate([np.zeros((0, 2)), *outline])
        return (
            np.concatenate([corners.min(axis=0), corners.max(axis=0)]).astype(np.float32)
            if len(corners)
            else np.zeros(4, np.float32)
        )
    rows, columns = np.flatnonzero(outline.any(axis=1)), np.flatnonzero(outline.any(axis=0))
    if not len(rows):
        return np.zeros(4, np.float32)
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def is_empty(outline: Outline) -> bool:
    """Whether nothing is left of an object."""
    return not len(outline) if isinstance(outline, tuple) else not outline.any()
