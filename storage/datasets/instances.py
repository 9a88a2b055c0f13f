"""Objects of an image in COCO's annotations: small records that workers read, and the masks that they decode to."""

import json
import textwrap
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from storage.datasets.boxes import as_number, coco_box
from storage.datasets.files import DatasetError, RawObject
from storage.orientation import Orientation
from storage.segmentations import decode_mask, polygons_of, runs_of_text


@dataclass(frozen=True, kw_only=True, eq=False)
class InstanceArrays:
    """The N annotated objects of an image, in the order of the annotation file."""

    masks: np.ndarray
    "bool [N, H, W]"
    boxes: np.ndarray
    "float32 [N, 4]: x1, y1, x2, y2 in pixels, as annotated"
    categories: np.ndarray
    "int64 [N], the data set's ids, which may have gaps"
    areas: np.ndarray
    "float64 [N] in pixels, as annotated; a mask's own number may differ"
    crowd: np.ndarray
    "bool [N]: groups that aren't told apart"

    def turned(self, by: Orientation) -> "InstanceArrays":
        """The objects on the upright image."""
        return replace(self, masks=by.array(self.masks, axis=1), boxes=by.boxes(self.boxes).astype(np.float32))


Outline: TypeAlias = tuple[np.ndarray, ...] | np.ndarray
"""An object: polygons, each float64 [corners, 2] of x and y in pixels, or its pixels, bool [H, W]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OutlinedObjects:
    """The N objects of an image that are told apart, as they were annotated, in the order of the annotation file."""

    height: int
    width: int
    outlines: tuple[Outline, ...]
    categories: np.ndarray
    "int64 [N], the data set's ids"

    def turned(self, by: Orientation) -> "OutlinedObjects":
        """The objects on the upright image."""
        turned = (tuple(map(by.edges, each)) if isinstance(each, tuple) else by.array(each) for each in self.outlines)
        width, height = by.upright_size
        return replace(self, height=height, width=width, outlines=tuple(turned))


@dataclass(frozen=True, kw_only=True)
class Instances:
    """An image's objects in COCO's annotations. Every record carries its own, so that no worker reads the whole file."""

    displayed: str
    "annotation file and image, as they may be printed"
    width: int
    height: int
    packed: bytes
    "zlib of the annotations' JSON"

    @classmethod
    def pack(
        cls, objects: Sequence[RawObject], displayed: str, width: int, height: int, *, boxes_alone: bool = False
    ) -> "Instances":
        """Raises `KeyError`, `ValueError` or `TypeError` where a field lacks or isn't what it should be. `boxes_alone`: objects
        may lack their mask, and have no `segmentation` then."""
        kept = [_kept(each, width, height, boxes_alone=boxes_alone) for each in objects]
        packed = zlib.compress(json.dumps(kept, separators=(",", ":")).encode(), level=1)
        return cls(displayed=displayed, width=width, height=height, packed=packed)

    def objects(self) -> list[RawObject]:
        """COCO's annotations: `id`, `category_id`, `bbox`, `area`, `iscrowd`, and `segmentation` of those that have one."""
        return json.loads(zlib.decompress(self.packed))

    def areas(self) -> np.ndarray:
        """As `InstanceArrays.areas`, without decoding masks: for choosing images."""
        return np.array([each["area"] for each in self.objects()], np.float64)

    def read(self) -> InstanceArrays:
        """Raises `DatasetError` for a segmentation that is none, or isn't, roughly, its box's."""
        objects = self.objects()
        boxes = np.array([each["bbox"] for each in objects], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = decode_masks(objects, self.height, self.width, self.displayed)
        for mask, each in zip(masks, objects, strict=True):
            with _segmentation_errors(self.displayed, each):
                _require_box_of(mask, each["bbox"])
        return InstanceArrays(
            masks=masks,
            boxes=boxes.astype(np.float32),
            categories=np.array([each["category_id"] for each in objects], np.int64),
            areas=np.array([each["area"] for each in objects], np.float64),
            crowd=np.array([each["iscrowd"] for each in objects], bool),
        )

    def outlined(self) -> OutlinedObjects:
        """Without crowds, and without objects that have no area (`has_area`). Raises `DatasetError` for a segmentation that is
        none."""
        found: list[tuple[int, Outline]] = []
        for each in self.objects():
            with _segmentation_errors(self.displayed, each):
                outline = () if each["iscrowd"] else _outline(each, self.height, self.width)
            if len(outline):
                found.append((each["category_id"], outline))
        return OutlinedObjects(
            height=self.height,
            width=self.width,
            outlines=tuple(outline for _, outline in found),
            categories=np.array([category for category, _ in found], np.int64),
        )

    def content(self) -> bytes:
        """What `content_digests` counts; `identity` has all of it, too."""
        return self.packed

    def identity(self) -> object:
        """What `digest` counts."""
        return self.objects()


def has_mask(note: RawObject) -> bool:
    """Whether an annotation says which pixels its object covers; some files have boxes alone."""
    return note.get("segmentation") not in (None, [], {})


def has_area(note: RawObject) -> bool:
    """Whether an annotation's mask can cover a pixel: it's false where all polygons are points or lines of two corners, or
    where runs cover nothing. What is malformed isn't told here."""
    segmentation = note.get("segmentation")
    if isinstance(segmentation, Mapping):
        counts = segmentation.get("counts")
        if isinstance(counts, str):  # a mask without pixels is one number, and short; others are too many to be read for this
            return len(counts) > _ONE_RUN or not _is_run_of_nothing(counts)
        return not isinstance(counts, list) or any(counts[1::2]) or not counts
    if not isinstance(segmentation, list) or not segmentation:
        return True
    return not all(isinstance(polygon, list) and len(polygon) in (2, 4) for polygon in segmentation)


_ONE_RUN = 8
"""Characters of compressed runs, of five bits each, that any image's number of pixels fits into."""


def _is_run_of_nothing(text: str) -> bool:
    try:
        return not any(runs_of_text(text)[1::2])
    except ValueError:
        return False


def _kept(note: RawObject, width: int, height: int, *, boxes_alone: bool) -> RawObject:
    """What of an annotation is used; its numbers are checked, its segmentation isn't yet."""
    coco_box(note, width, height)
    box, area = [float(value) for value in note["bbox"]], as_number(note["area"])
    if not 0 <= area <= 1.1 * width * height:  # not of NaN, either
        raise ValueError(f"annotation {note['id']} has the area {note['area']}, of an image of {width} x {height} pixels")
    kept = {"id": int(note["id"]), "category_id": int(note["category_id"]), "bbox": box, "area": area}
    crowd = note.get("iscrowd") or 0
    if as_number(crowd) not in (0, 1):
        raise ValueError(f"annotation {note['id']} has iscrowd {textwrap.shorten(repr(crowd), 40)}, which is neither 0 nor 1")
    kept |= {"iscrowd": int(crowd)}
    return kept if boxes_alone and not has_mask(note) else kept | {"segmentation": note["segmentation"]}


def _require_box_of(mask_HW: np.ndarray, box: Sequence[float]) -> None:
    """Raises `ValueError` where x, y, width, height are not, roughly, those of the mask; an empty mask says nothing."""
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    if not len(rows):
        return
    _require_box(np.array([columns[0], rows[0]]), np.array([columns[-1] + 1, rows[-1] + 1]), box)


def _require_box(first_xy: np.ndarray, last_xy: np.ndarray, box: Sequence[float]) -> None:
    """Raises `ValueError` where x, y, width, height are not, roughly, what reaches from the one corner to the other."""
    (x1, y1), (x2, y2) = first_xy.tolist(), last_xy.tolist()
    x, y, width, height = box
    far = np.abs(np.subtract([x, y, x + width, y + height], [x1, y1, x2, y2])).max()
    if far > 4 + max(x2 - x1, y2 - y1) / 4:
        raise ValueError(
            f"it reaches from x, y = {x1:g}, {y1:g} to {x2:g}, {y2:g}, which its box {list(box)} doesn't fit as x, y, width, "
            "height"
        )


def _outline(note: RawObject, height: int, width: int) -> Outline:
    """An annotation's polygons of three corners or more, or its pixels. Raises as `decode_mask`, and where its box is another."""
    segmentation = note["segmentation"]
    if isinstance(segmentation, Mapping):
        mask = decode_mask(segmentation, height, width)
        _require_box_of(mask, note["bbox"])
        return mask
    polygons = tuple(each.reshape(-1, 2) for each in polygons_of(segmentation, height, width))
    if polygons:
        corners = np.concatenate(polygons)
        _require_box(corners.min(axis=0), corners.max(axis=0), note["bbox"])
    return polygons


def decode_masks(objects: Sequence[RawObject], height: int, width: int, displayed: str) -> np.ndarray:
    """The masks of an image's annotations, bool [N, height, width]; `displayed` is file and image. Raises `DatasetError` for a
    segmentation that is none."""
    masks = np.zeros((len(objects), height, width), bool)
    for mask, each in zip(masks, objects, strict=True):
        with _segmentation_errors(displayed, each):
            mask[:] = decode_mask(each["segmentation"], height, width)
    return masks


@contextmanager
def _segmentation_errors(displayed: str, note: RawObject) -> Iterator[None]:
    """What is wrong with an annotation's segmentation becomes a `DatasetError`."""
    try:
        yield
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        where = f"{displayed}, annotation {note.get('id', '')}"
        raise DatasetError(f"{where}: its segmentation is malformed: {error}") from None
