"""Large-scale jitter, ViTDet's augmentation: mirrored, resized between a tenth and twice the size, cropped; objects with it.

Sizes and offsets are rounded as published. Outlines are cut off at the crop's sides into the pieces that are left, and boxes are
what these reach. The published code asks GEOS for that, which first takes polygons that cross themselves apart, and may lose
parts of them; here all of what a polygon covers is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from operators.vitdet.masks import is_empty, outline_box
from storage.datasets.instances import Outline

SMALLEST_BOX = 1e-5
"""Sides of boxes that are smaller have no extent, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Objects:
    """The N annotated objects of an image."""

    classes: np.ndarray
    "int64 [N], from 0"
    outlines: Sequence[Outline]

    @property
    def boxes(self) -> np.ndarray:
        """What they reach: x1, y1, x2, y2, float32 [N, 4]."""
        return np.array([outline_box(each) for each in self.outlines], np.float32).reshape(-1, 4)

    def with_extent(self) -> "Objects":
        """Without those of which nothing, or no box with an extent, is left."""
        sides = self.boxes[:, 2:] - self.boxes[:, :2]
        kept = [
            number
            for number, outline in enumerate(self.outlines)
            if not is_empty(outline) and (sides[number] > SMALLEST_BOX).all()
        ]
        return Objects(classes=self.classes[kept], outlines=[self.outlines[number] for number in kept])


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """What is drawn for an image."""

    mirrored: bool
    scale: float
    "of the size at which the image just fits its square"
    place: float
    "0 to 1: of the crop, in both directions"


@dataclass(frozen=True, kw_only=True)
class LargeScaleJitter:
    """What is drawn from, for images that are put into squares of `side` pixels."""

    side: int
    scales: tuple[float, float] = (0.1, 2.0)
    mirror: float = 0.5
    "how often an image is mirrored"

    def draw(self, rng: np.random.Generator) -> Jitter:
        """Of one image."""
        mirrored, scale, place = rng.random() < self.mirror, rng.uniform(*self.scales), rng.random()
        return Jitter(mirrored=bool(mirrored), scale=float(scale), place=float(place))

    def __call__(self, pixels_HW3: np.ndarray, objects: Objects, drawn: Jitter) -> tuple[np.ndarray, Objects]:
        """The image as uint8 [h, w, 3] with sides of at most `side` pixels, and what is left of its objects there."""
        height, width = pixels_HW3.shape[:2]
        outlines = list(objects.outlines)
        if drawn.mirrored:
            pixels_HW3 = np.ascontiguousarray(pixels_HW3[:, ::-1])
            outlines = [mirrored(each, width) for each in outlines]
        size = resized_size((height, width), drawn.scale, self.side)
        image = Image.fromarray(pixels_HW3).resize((size[1], size[0]), Image.Resampling.BILINEAR)
        top, left = crop_offset(size, drawn.place, self.side)
        bottom, right = min(size[0], top + self.side), min(size[1], left + self.side)
        outlines = [resized(each, (height, width), size) for each in outlines]
        outlines = [cropped(each, left, top, right, bottom) for each in outlines]
        left_over = Objects(classes=objects.classes, outlines=outlines).with_extent()
        return np.asarray(image)[top:bottom, left:right], left_over


def resized_size(size: tuple[int, int], scale: float, side: int) -> tuple[int, int]:
    """Height and width of an image of `size` that is `scale` times as large as what just fits a square; halves to even."""
    factor = min(side * scale / size[0], side * scale / size[1])
    height, width = np.round(np.multiply(size, factor)).astype(int).tolist()
    return max(height, 1), max(width, 1)


def crop_offset(size: tuple[int, int], place: float, side: int) -> tuple[int, int]:
    """Top and left of the crop of an image of `size` (height, width), by one number from 0 to 1 for both; halves to even."""
    top, left = np.round(np.maximum(np.subtract(size, side), 0) * place).astype(int).tolist()
    return top, left


# --- outlines ---------------------------------------------------------------------------------------------------------


def mirrored(outline: Outline, width: int) -> Outline:
    """Left and right exchanged, in an image of `width` pixels."""
    if isinstance(outline, tuple):
        return tuple(np.stack([width - corners[:, 0], corners[:, 1]], axis=1) for corners in outline)
    return np.ascontiguousarray(outline[:, ::-1])


def resized(outline: Outline, before: tuple[int, int], after: tuple[int, int]) -> Outline:
    """In an image that was of size (height, width) `before`; pixels by the nearest one."""
    if isinstance(outline, tuple):
        scale = np.array([after[1] / before[1], after[0] / before[0]])
        return tuple(corners * scale for corners in outline)
    small = Image.fromarray(outline.astype(np.uint8)).resize((after[1], after[0]), Image.Resampling.NEAREST)
    return np.asarray(small).astype(bool)


def cropped(outline: Outline, left: int, top: int, right: int, bottom: int) -> Outline:
    """What of it lies in a crop, from whose top left corner it is measured then."""
    if not isinstance(outline, tuple):
        return outline[top:bottom, left:right]
    pieces = list(outline)
    for axis, sign, limit in ((0, 1, left), (0, -1, right), (1, 1, top), (1, -1, bottom)):
        pieces = [piece for corners in pieces for piece in _beyond(corners, axis, sign, limit)]
    return tuple(piece - (left, top) for piece in pieces)


def _beyond(corners_P2: np.ndarray, axis: int, sign: int, limit: float) -> list[np.ndarray]:
    """The pieces of a polygon on one side of a line: where `axis` (0: x) is at least `limit`, or at most with `sign` -1.

    Along the line, a polygon's inside begins and ends in turn. So the parts of its outline that lie on the right side are joined
    from every end to the neighbour of that end on the line, which leaves pieces that don't touch apart.
    """
    inside = sign * (corners_P2[:, axis] - limit) >= 0
    if inside.all():
        return [corners_P2]
    if not inside.any():
        return []
    paths = _paths(corners_P2, inside, axis, limit)
    other = 1 - axis
    # Of each path its beginning (2 i) and its end (2 i + 1), by their places on the line.
    places = np.array([path[end][other] for path in paths for end in (0, -1)])
    by_place = np.argsort(places, kind="stable").tolist()
    partner = {a: b for one, two in zip(by_place[::2], by_place[1::2], strict=True) for a, b in ((one, two), (two, one))}
    return [piece for piece in _joined(paths, partner) if _has_area(piece)]


def _paths(corners_P2: np.ndarray, inside: np.ndarray, axis: int, limit: float) -> list[np.ndarray]:
    """The parts of an outline within, each from where it comes in to where it goes out."""
    count = len(corners_P2)
    entries = [i for i in range(count) if inside[i] and not inside[i - 1]]
    paths = []
    for first in entries:
        last = first
        while inside[(last + 1) % count]:
            last += 1
        within = corners_P2[np.arange(first, last + 1) % count]
        begin = _crossing(corners_P2[first - 1], corners_P2[first], axis, limit)
        end = _crossing(corners_P2[(last + 1) % count], corners_P2[last % count], axis, limit)
        paths.append(np.concatenate([begin[None], within, end[None]]))
    return paths


def _crossing(outer: np.ndarray, inner: np.ndarray, axis: int, limit: float) -> np.ndarray:
    """Where the side from a corner without to one within meets the line."""
    part = (limit - outer[axis]) / (inner[axis] - outer[axis])
    point = outer + part * (inner - outer)
    point[axis] = limit
    return point


def _joined(paths: list[np.ndarray], partner: dict[int, int]) -> list[np.ndarray]:
    """Paths joined end to end by pairs of ends, 2 i being the beginning of path i and 2 i + 1 its end: closed outlines."""
    left, found = set(range(len(paths))), []
    while left:
        at = 2 * min(left)
        piece = []
        while at // 2 in left:
            left.remove(at // 2)
            piece.append(paths[at // 2] if at % 2 == 0 else paths[at // 2][::-1])
            at = partner[at ^ 1]
        found.append(_distinct(np.concatenate(piece)))
    return found


def _distinct(corners_P2: np.ndarray) -> np.ndarray:
    """Without corners that repeat the one before them."""
    return corners_P2[(corners_P2 != np.roll(corners_P2, 1, axis=0)).any(axis=1)]


def _has_area(corners_P2: np.ndarray) -> bool:
    """Whether it is more than points or a line along the cut."""
    return len(corners_P2) >= 3 and bool((np.ptp(corners_P2, axis=0) > 0).all())
