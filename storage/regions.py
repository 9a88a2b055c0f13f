"""Vectors of regions: a level's cells, weighted by how much of each a mask or a box covers.

Regions are in pixels of the upright original, whatever crop, squash or padding the image went through; coordinates are
continuous, as in `storage.pixels`. A region counts by its area: a cell that it covers by half weighs half.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from storage.paths import StorageError
from storage.pixels import PixelMap, cell_edges
from storage.spec import Level

Runs: TypeAlias = Mapping[str, object]
"""A mask as COCO's run lengths: `size` [height, width], `counts` as text, bytes or a list."""

Regions: TypeAlias = ArrayLike | Runs | Sequence[Runs]
"""Masks bool [N, height, width] or one of them, run lengths, or boxes [N, 4]."""


ROUNDING = 1e-7
"""Areas of masks below this, in pixels, are what differences of sums leave where there is nothing."""


class RegionError(StorageError, ValueError):
    """What was given is no region of the image."""


def region_areas(regions: Regions, level: Level, pixels: PixelMap, input_size: tuple[int, int]) -> np.ndarray:
    """How much of each region lies in each cell, in square pixels of the original: float64 [N, rows, columns].

    `input_size`: (height, width) of the model's input in pixels. What the crop cut away lies in no cell. Cells at the border
    of the input reach to it, also where patches don't fill it. Raises `RegionError` for what isn't a region of the image, and
    `ValueError` for a level without cells.
    """
    edges_x, edges_y = cell_edges(level, input_size)
    x = np.clip((edges_x - pixels.x_offset) / pixels.x_scale, 0, pixels.width)
    y = np.clip((edges_y - pixels.y_offset) / pixels.y_scale, 0, pixels.height)
    masks = _masks_of(regions, pixels)
    if masks is not None:
        found = [_within(_within(mask, y, axis=0), x, axis=1) for mask in masks]
        areas = np.array(found, np.float64).reshape(len(masks), len(y) - 1, len(x) - 1)
        return np.where(areas < ROUNDING, 0, areas)
    x1, y1, x2, y2 = _boxes_of(regions, pixels).T[..., None]
    across = np.clip(np.minimum(x2, x[1:]) - np.maximum(x1, x[:-1]), 0, None)
    down = np.clip(np.minimum(y2, y[1:]) - np.maximum(y1, y[:-1]), 0, None)
    return down[:, :, None] * across[:, None, :]


def pooled(map_HWC: np.ndarray, areas_NHW: np.ndarray) -> np.ndarray:
    """The map's mean under each region's areas, float32 [N, C]; NaN where a region covers no cell."""
    areas = areas_NHW.reshape(len(areas_NHW), map_HWC.shape[0] * map_HWC.shape[1])
    totals = areas.sum(axis=1, keepdims=True)
    weights = np.divide(areas, totals, out=np.full_like(areas, np.nan), where=totals > 0)
    return (weights @ map_HWC.reshape(-1, map_HWC.shape[-1]).astype(np.float64)).astype(np.float32)


def is_points(regions: Regions) -> bool:
    """Whether these are points [N, 2] rather than regions."""
    return not _runs_among(regions) and (array := np.asarray(regions)).ndim == 2 and array.dtype != bool and array.shape[1] == 2


def _masks_of(regions: Regions, pixels: PixelMap) -> Sequence[np.ndarray] | None:
    """Masks [height, width] of the image's size; None where these are boxes."""
    runs = _runs_among(regions)
    if runs:
        return [_decoded(each, pixels) for each in runs]
    array = np.asarray(regions)
    if array.dtype != bool and array.ndim != 3:
        return None
    masks = array[None] if array.ndim == 2 else array
    if masks.ndim != 3 or masks.shape[1:] != (pixels.height, pixels.width):
        raise RegionError(
            f"masks have the shape {array.shape}, the image has {pixels.height} rows and {pixels.width} columns of pixels; "
            "masks are [height, width] of the upright original, or several of them"
        )
    if masks.dtype != bool and not np.isin(masks, (0, 1)).all():
        raise RegionError("masks hold 0 and 1, or False and True; these hold other numbers")
    return list(masks)


def _runs_among(regions: Regions) -> list[Runs]:
    """The run lengths, where these are some."""
    if isinstance(regions, Mapping):
        return [regions]
    found = [each for each in regions if isinstance(each, Mapping)] if isinstance(regions, Sequence) else []
    return found if isinstance(regions, Sequence) and len(found) == len(regions) else []


def _decoded(runs: Runs, pixels: PixelMap) -> np.ndarray:
    # pycocotools is only needed by those who have run lengths.
    from storage.segmentations import decode_mask

    try:
        return decode_mask(runs, pixels.height, pixels.width)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise RegionError(f"run lengths that are none of this image's: {type(error).__name__}: {error}") from None


def _boxes_of(regions: Regions, pixels: PixelMap) -> np.ndarray:
    """Boxes float64 [N, 4], cut to the image."""
    boxes = np.asarray(regions, np.float64)
    boxes = boxes.reshape(0, 4) if not boxes.size else boxes
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise RegionError(
            "regions are masks [N, height, width] of bool, run lengths, boxes [N, 4] (x1, y1, x2, y2) or points [N, 2] (x, y); "
            f"got an array of shape {boxes.shape}"
        )
    wrong = ~(np.isfinite(boxes).all(axis=1) & (boxes[:, 0] <= boxes[:, 2]) & (boxes[:, 1] <= boxes[:, 3]))
    if wrong.any():
        raise RegionError(f"the box {boxes[wrong][0].tolist()} is none; boxes are x1, y1, x2, y2, not a width and a height")
    sides = [pixels.width, pixels.height]
    beside = ((boxes[:, 2:] < 0) | (boxes[:, :2] > sides)).any(axis=1)
    if beside.any():
        size = f"{pixels.width} x {pixels.height} pixels"
        raise RegionError(f"the box {boxes[beside][0].tolist()} lies outside the image of {size}; boxes are x1, y1, x2, y2")
    return np.clip(boxes, 0, [*sides, *sides])


def _within(values: np.ndarray, edges: np.ndarray, axis: int) -> np.ndarray:
    """Sums of `values` between consecutive `edges`, rising positions along `axis`; a value is spread over its unit."""
    sums = np.cumsum(values, axis=axis, dtype=np.float64)
    sums = np.concatenate([np.zeros_like(sums.take([0], axis)), sums], axis)
    low = np.minimum(edges.astype(np.int64), values.shape[axis] - 1)
    share = np.expand_dims(edges - low, 1 - axis)
    upto = sums.take(low, axis) * (1 - share) + sums.take(low + 1, axis) * share
    return np.diff(upto, axis=axis)
