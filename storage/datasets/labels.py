"""Labels of images as small records that workers read: class masks, depth maps, instances.

A record says where a label lies and what its numbers mean; nothing is decoded before `read`. Sources: specs/evaluation.md
sections 7, 8, 12.3 and 13.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask

from operators.metrics.segmentation import COARSE_OF_FINE, VOID
from pipelines.readouts.depth import DepthMap
from storage.datasets.coco import coco_corners
from storage.datasets.files import read_labels
from storage.datasets.images import AnyImage
from storage.datasets.pictures import DatasetError, LabelFrame, OrientedImage, label_turn
from storage.orientation import Orientation
from storage.paths import Folder

CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The labelIds that are trained and scored, in the order of their train ids 0..18; the others of 0..33 are void."""


def _as_they_are(classes: int, *, void: bool) -> np.ndarray:
    """A table of `classes` ids that stay, and of 255 as void where the data set has it."""
    table = np.full(256, -1, np.int16)
    table[:classes] = np.arange(classes)
    if void:
        table[VOID] = VOID
    return table


def _coco_groups() -> np.ndarray:
    fine = _as_they_are(182, void=True)
    return np.where(fine < 0, -1, COARSE_OF_FINE.astype(np.int16))


def _cityscapes() -> np.ndarray:
    table = np.full(256, -1, np.int16)
    table[:34] = VOID
    table[list(CITYSCAPES_IDS)] = np.arange(len(CITYSCAPES_IDS))
    return table


TABLES: Mapping[str, np.ndarray] = {
    "voc": _as_they_are(21, void=True),
    "coco_stuff": _as_they_are(182, void=True),
    "coco_stuff27": _coco_groups(),
    # 0, "other", is a class like any other in ViT-Up's protocol; there is no void.
    "ade20k": _as_they_are(151, void=False),
    "cityscapes": _cityscapes(),
    "photos_open": _as_they_are(18, void=False),
}
"""What a PNG's values are: int16 [256] of class, 255 = void, or -1 where the data set has no such value."""

_NOT_IN_COCO = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
NEVER: Mapping[str, tuple[int, ...]] = {"coco_stuff": _NOT_IN_COCO, "coco_stuff27": _NOT_IN_COCO}
"""Values that have a class, and that no label file has (COCO numbers a street sign, a hat, a shoe, ... and annotates none):
masks with one of them are of other ids, COCO-Stuff's 171 without gaps or its ids from 1 on."""


@dataclass(frozen=True, kw_only=True)
class ClassMask:
    """A PNG of class ids."""

    folder: Folder
    name: str
    "path inside the folder"
    table: str
    "of `TABLES`"

    @property
    def shown(self) -> str:
        """Its URL as it may be printed."""
        return f"{self.folder.shown}/{self.name}"

    def read(self) -> np.ndarray:
        """Class of each pixel, uint8 [H, W], 255 = void. Raises `DatasetError`, also for a value that the table hasn't."""
        values = read_labels(self.folder, self.name)
        classes = TABLES[self.table][values]
        wrong = (classes < 0) | np.isin(values, NEVER.get(self.table, ()))
        if wrong.any():
            raise DatasetError(
                f"{self.shown} holds the value {values[wrong][0]}, which labels of {self.table} don't have; "
                "check that it is this data set's label file"
            )
        return classes.astype(np.uint8)

    def told(self) -> Any:
        """What `digest` counts."""
        return [self.name, self.table]


# --- instances --------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True, kw_only=True)
class Instances:
    """An image's objects in COCO's annotations. Every record carries its own, so that no worker reads the whole file."""

    shown: str
    "annotation file and image, as they may be printed"
    width: int
    height: int
    packed: bytes
    "zlib of the annotations' JSON"

    @classmethod
    def pack(cls, objects: Sequence[Mapping[str, Any]], shown: str, width: int, height: int) -> "Instances":
        """Raises `KeyError`, `ValueError` or `TypeError` where a field lacks or isn't what it should be."""
        kept = [_kept(each, width, height) for each in objects]
        packed = zlib.compress(json.dumps(kept, separators=(",", ":")).encode(), level=1)
        return cls(shown=shown, width=width, height=height, packed=packed)

    def objects(self) -> list[dict[str, Any]]:
        """COCO's annotations: `id`, `category_id`, `bbox`, `area`, `iscrowd`, `segmentation`."""
        return json.loads(zlib.decompress(self.packed))

    def areas(self) -> np.ndarray:
        """As `InstanceArrays.areas`, without decoding masks: for choosing images."""
        return np.array([each["area"] for each in self.objects()], np.float64)

    def read(self) -> InstanceArrays:
        """Raises `DatasetError` for a segmentation that is none."""
        objects = self.objects()
        boxes = np.array([each["bbox"] for each in objects], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = np.zeros((len(objects), self.height, self.width), bool)
        for mask, each in zip(masks, objects, strict=True):
            try:
                mask[:] = decode_mask(each["segmentation"], self.height, self.width)
                _require_box_of(mask, each["bbox"])
            except (ValueError, TypeError, KeyError, OverflowError) as error:
                raise DatasetError(
                    f"{self.shown}, annotation {each['id']}: its segmentation is malformed: {error}"
                ) from None
        return InstanceArrays(
            masks=masks,
            boxes=boxes.astype(np.float32),
            categories=np.array([each["category_id"] for each in objects], np.int64),
            areas=np.array([each["area"] for each in objects], np.float64),
            crowd=np.array([each["iscrowd"] for each in objects], bool),
        )

    def told(self) -> Any:
        """What `digest` counts."""
        return self.objects()


def _kept(note: Mapping[str, Any], width: int, height: int) -> dict[str, Any]:
    """What of an annotation is used; its numbers are checked, its segmentation isn't yet."""
    coco_corners(note, width, height)
    box, area = [float(value) for value in note["bbox"]], float(note["area"])
    if not 0 <= area <= 1.1 * width * height:  # not of NaN, either
        raise ValueError(
            f"annotation {note['id']} has the area {note['area']}, of an image of {width} x {height} pixels"
        )
    kept = {"id": int(note["id"]), "category_id": int(note["category_id"]), "bbox": box, "area": area}
    return kept | {"iscrowd": int(note.get("iscrowd", 0)), "segmentation": note["segmentation"]}


def _require_box_of(mask_HW: np.ndarray, box: Sequence[float]) -> None:
    """Raises `ValueError` where x, y, width, height are not, roughly, those of the mask; an empty mask says nothing."""
    rows, columns = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    if not len(rows):
        return
    x1, y1, x2, y2 = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    x, y, width, height = box
    far = np.abs(np.subtract([x, y, x + width, y + height], [x1, y1, x2, y2])).max()
    if far > 4 + max(x2 - x1, y2 - y1) / 4:
        raise ValueError(
            f"it reaches from x, y = {x1}, {y1} to {x2}, {y2}, which its box {list(box)} doesn't fit as x, y, width, height"
        )


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A COCO segmentation (polygons, or runs as a list or as text) as bool [height, width].

    Polygons of one or two corners, which annotations do have, cover nothing; pycocotools takes four numbers for a box. Where
    runs are too few, it gives memory that isn't its own, so they are added up first.
    Raises `ValueError`, `TypeError`, `KeyError` or `OverflowError` with what is wrong.
    """
    if isinstance(segmentation, Mapping):
        return _of_runs(segmentation, height, width)
    if not segmentation:
        raise ValueError("there are no polygons")
    areas = [polygon for polygon in segmentation if _encloses(polygon, 4 * max(height, width))]
    if not areas:
        return np.zeros((height, width), bool)
    runs = coco_mask.merge(coco_mask.frPyObjects(areas, height, width))
    return coco_mask.decode(runs).astype(bool)


def _encloses(polygon: Any, limit: int) -> bool:
    """Whether a polygon has three corners or more. Raises `ValueError` where it's no list of x, y, or goes beyond `limit`."""
    corners = np.asarray(polygon, np.float64)
    if corners.ndim != 1 or not len(corners) or len(corners) % 2:
        raise ValueError(f"a polygon is a list x, y, x, y, ..., not {str(polygon)[:80]}")
    # Its memory is as long as the outline; corners lie inside the image, or nearly.
    if not (np.abs(corners) <= limit).all():
        raise ValueError(f"a polygon has a corner beyond {limit} pixels, far outside the image: {str(polygon)[:80]}")
    return len(corners) >= 6


def _of_runs(segmentation: Mapping[str, Any], height: int, width: int) -> np.ndarray:
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"its size is {segmentation['size']}, the image's {[height, width]}")
    counts = segmentation["counts"]
    runs = _runs_of_text(counts) if isinstance(counts, str) else [int(count) for count in counts]
    if min(runs, default=-1) < 0 or sum(runs) != height * width:
        raise ValueError(f"its runs cover {sum(runs)} pixels, the image has {height * width}")
    runs_of_pixels = coco_mask.frPyObjects({"counts": runs, "size": [height, width]}, height, width)
    return coco_mask.decode(runs_of_pixels).astype(bool)


def _runs_of_text(text: str) -> list[int]:
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


# --- images and labels ------------------------------------------------------------------------------------------------

Label = ClassMask | DepthMap | Instances


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """An image and what is known of it."""

    image: AnyImage
    label: Label
    frame: LabelFrame | None = None
    "which pixels the label is of, where its size doesn't tell"

    def read(self) -> tuple[np.ndarray, np.ndarray | InstanceArrays]:
        """The image's pixels (uint8 [H, W, 3]) and its label, both upright. Raises `DatasetError`, also where they differ in
        size, and `FrameUnknown`."""
        pixels = self.image.pixels()
        return pixels, self.upright_label(OrientedImage(self.image.shown, self.image.orientation()))

    def upright_label(self, image: OrientedImage) -> np.ndarray | InstanceArrays:
        """The label turned onto the image, which is upright then. Raises as `read`."""
        label = self.label.read()
        height, width = (label.masks.shape[1:] if isinstance(label, InstanceArrays) else label.shape)[:2]
        says = f"but its label {self.label.shown} has"
        return turned(label, label_turn(image, (width, height), self.frame, says))

    def told(self) -> Any:
        """What `digest` counts."""
        return {"image": self.image, "label": self.label} | ({"frame": self.frame} if self.frame else {})


def turned(label: np.ndarray | InstanceArrays, by: Orientation) -> np.ndarray | InstanceArrays:
    """A label [H, W], or one of instances, on the upright image."""
    if not isinstance(label, InstanceArrays):
        return by.array(label)
    boxes = by.boxes(label.boxes).astype(np.float32)
    return replace(label, masks=by.array(label.masks, axis=1), boxes=boxes)
