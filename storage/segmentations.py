"""COCO's segmentations, polygons or runs of pixels, and which pixels they cover."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask


def decode_mask(segmentation: Mapping[str, Any] | Sequence[object], height: int, width: int) -> np.ndarray:
    """A COCO segmentation (polygons, or runs as a list or as text) as bool [height, width].

    Polygons of one or two corners, which annotations do have, cover nothing; pycocotools takes four numbers for a box. Where
    runs are too few, it gives memory that isn't its own, so they are added up first.
    Raises `ValueError`, `TypeError`, `KeyError` or `OverflowError` with what is wrong.
    """
    if isinstance(segmentation, Mapping):
        return _of_runs(segmentation, height, width)
    polygons = polygons_of(segmentation, height, width)
    if not polygons:
        return np.zeros((height, width), bool)
    runs = coco_mask.merge(coco_mask.frPyObjects([each.tolist() for each in polygons], height, width))
    return coco_mask.decode(runs).astype(bool)


def polygons_of(segmentation: Sequence[object], height: int, width: int) -> list[np.ndarray]:
    """The polygons of three corners or more, each float64 [2 * corners] of x, y, x, y, ... Raises `ValueError` where there are no
    polygons, where one is no list of numbers, and where a corner lies far outside the image."""
    if not isinstance(segmentation, list | tuple):
        raise ValueError(f"it is {textwrap.shorten(repr(segmentation), 40)}, neither a list of polygons nor runs")
    if not segmentation:
        raise ValueError("there are no polygons")
    limit = 4 * max(height, width)
    return [polygon for each in segmentation if len(polygon := _polygon(each, limit)) >= 6]


def _polygon(given: object, limit: int) -> np.ndarray:
    try:
        corners = np.asarray(given, np.float64)
    except (ValueError, TypeError):
        corners = np.zeros(0)
    if corners.ndim != 1 or not len(corners) or len(corners) % 2:
        raise ValueError(f"a polygon is a list x, y, x, y, ..., not {str(given)[:80]}")
    # Its memory is as long as the outline; corners lie inside the image, or nearly.
    if not (np.abs(corners) <= limit).all():
        raise ValueError(f"a polygon has a corner beyond {limit} pixels, far outside the image: {str(given)[:80]}")
    return corners


def _of_runs(segmentation: Mapping[str, Any], height: int, width: int) -> np.ndarray:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list | tuple | np.ndarray) or list(size) != [height, width]:
        raise ValueError(f"its size is {size}, the image's {[height, width]}")
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts  # pycocotools gives bytes, JSON files text
    if not isinstance(text, str | list | tuple | np.ndarray):
        raise ValueError(f"its runs (counts) are {textwrap.shorten(repr(counts), 40)}, neither a list nor text")
    runs = runs_of_text(text) if isinstance(text, str) else [int(count) for count in text]
    if min(runs, default=0) < 0 or (not isinstance(text, str) and runs != list(text)):
        raise ValueError("its runs aren't all whole numbers of at least 0")
    if sum(runs) != height * width:
        raise ValueError(f"its runs cover {sum(runs)} pixels, the image has {height * width}")
    runs_of_pixels = coco_mask.frPyObjects({"counts": runs, "size": [height, width]}, height, width)
    return coco_mask.decode(runs_of_pixels).astype(bool)


def runs_of_text(text: str) -> list[int]:
    """COCO's compressed runs: five bits a character from 48 on, 32 = more follow; from the fourth on, each is the difference
    to the last but one."""
    runs: list[int] = []
    value = shift = 0
    for character in text.encode():
        bits = character - 48
        if not 0 <= bits < 64:
            raise ValueError(f"its text of runs holds the character {chr(character)!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("its text of runs ends within a number")
    return runs
