"""Points and boxes of annotations, held against their image, and images with the boxes of their objects."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from storage.datasets.files import RawObject
from storage.datasets.images import ImageFile
from storage.orientation import Orientation

Point: TypeAlias = tuple[float, float]
"""x, y in pixels."""

Box: TypeAlias = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels."""


@dataclass(frozen=True, kw_only=True)
class BoxedImage:
    """An image with the boxes of its objects; x2 and y2 are exclusive."""

    image: ImageFile
    boxes: tuple[Box, ...]

    def turned(self, by: Orientation) -> "BoxedImage":
        """The upright image with its boxes."""
        return BoxedImage(image=self.image.sized(by.upright_size), boxes=turned_boxes(self.boxes, by))

    @property
    def image_size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.image.width, self.image.height


def turned_boxes(boxes: Sequence[Box], by: Orientation) -> tuple[Box, ...]:
    """The boxes on the upright image."""
    return tuple((x1, y1, x2, y2) for x1, y1, x2, y2 in by.boxes(np.array(boxes).reshape(-1, 4)).tolist())


def require_inside(points_xy: Iterable[Sequence[float]], width: int, height: int, what: str) -> None:
    """Raises `ValueError` for points beyond the image by more than two pixels and a twentieth of its longer side."""
    slack = max(2.0, max(width, height) / 20)
    for x, y in points_xy:
        if not (-slack <= x <= width + slack and -slack <= y <= height + slack):
            raise ValueError(f"{what} reaches x = {x:g}, y = {y:g}, outside the image of {width} x {height} pixels")


def corner_box(values: Sequence[float], width: int, height: int) -> Box:
    """x1, y1, x2, y2, as VOC and SPair-71k have them. Raises `ValueError` for what can't be the corners of a box."""
    x1, y1, x2, y2 = (float(value) for value in values)
    if x1 > x2 or y1 > y2:
        raise ValueError(f"the box {list(values)} ends before it begins; it should be x1, y1, x2, y2, not a width and a height")
    if x1 == x2 and y1 == y2:
        raise ValueError(f"the box {list(values)} has no extent")
    require_inside([(x1, y1), (x2, y2)], width, height, f"the box {list(values)}")
    return x1, y1, x2, y2


def as_number(value: object) -> float:
    """A number of an annotation, also as text; NaN for what is none."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def coco_box(note: RawObject, width: int, height: int) -> Box:
    """x1, y1, x2, y2 of the box of a COCO annotation of a `width` x `height` image; it may be empty, as some of COCO's are.

    Raises `KeyError`, or `ValueError` where it can't be x, y, width, height of a box inside the image.
    """
    given = note["bbox"]
    numbers = [as_number(value) for value in given] if isinstance(given, list | tuple) else []
    what = f"annotation {note.get('id', '')} has the box {textwrap.shorten(str(given), 80)}"
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{what}; it should be four numbers, x, y, width, height")
    x, y, across, down = numbers
    if across < 0 or down < 0:
        raise ValueError(f"{what}, with a negative extent; it should be x, y, width, height")
    corners = (x, y, x + across, y + down)
    require_inside([corners[:2], corners[2:]], width, height, f"{what}; as x, y, width, height it")
    return corners
