"""Average precision as COCO defines it, by pycocotools: for LiFT's detection on COCO, and DeAP's CenterNet task.

Nothing can be averaged before the end: workers give the raw detections of their images, and `coco_scores` takes all at once.

Shapes: N objects or detections of one image; boxes are x1, y1, x2, y2 in pixels.
"""

import contextlib
import io
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypedDict, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from pycocotools.coco import COCO as CocoIndex
from pycocotools.cocoeval import COCOeval

T = TypeVar("T", bool, int, float)


class Rle(TypedDict):
    """A mask as `pycocotools.mask.encode` gives it: run lengths down the columns."""

    size: Sequence[int]
    "height, width"
    counts: bytes | str


class _Entry(TypedDict, total=False):
    """An annotation or a result, as in COCO's JSON files."""

    image_id: int
    category_id: int
    bbox: list[float]
    "x, y, width, height"
    area: float
    iscrowd: int
    segmentation: Rle
    score: float


@dataclass(frozen=True, kw_only=True)
class ApProtocol:
    """What counts as found."""

    overlap: Literal["boxes", "masks"] = "boxes"
    "whose IoU decides"
    class_agnostic: bool = False
    "all categories are one"
    area: Literal["annotation", "box"] = "annotation"
    "what decides whether an object is small, medium or large: its annotation's `area` (of its mask), or its box"
    crowd: Literal["ignore", "object", "drop"] = "ignore"
    "detections in a crowd are neither right nor wrong; or a crowd is to be found like any object; or it isn't there at all"


COCO = ApProtocol()
"""The official box AP; `ApProtocol(overlap="masks")` is mask AP, for which the area of a detection is its box's all the same
(pycocotools has it so where results have boxes)."""

DEAP = ApProtocol(class_agnostic=True, area="box", crowd="object")
"""DeAP's CenterNet task, on boxes of the 448 px crop: AP_large is of objects above 96^2 px there. DINOv2: 0.2666."""


@dataclass(frozen=True, kw_only=True)
class ImageTruth:
    """The annotated objects of one image. Images without any belong into an evaluation, too."""

    image_id: int
    boxes: Sequence[Sequence[float]]
    categories: Sequence[int]
    areas: Sequence[float]
    "in pixels"
    crowd: Sequence[bool]
    masks: Sequence[Rle] = ()
    "needed for `overlap=masks`"

    @classmethod
    def of(
        cls,
        image_id: int,
        boxes_N4: ArrayLike,
        *,
        categories_N: ArrayLike | None = None,
        areas_N: ArrayLike | None = None,
        crowd_N: ArrayLike | None = None,
        masks: Sequence[Rle] = (),
    ) -> "ImageTruth":
        """From arrays or CPU tensors. Without categories all are 1, without areas they are the boxes', without crowds there
        is none."""
        boxes = _boxes(boxes_N4)
        ones = np.ones(len(boxes), int)
        return cls(
            image_id=int(image_id),
            boxes=tuple(map(tuple, boxes.tolist())),
            categories=_tuple(ones if categories_N is None else categories_N, int),
            areas=_tuple((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) if areas_N is None else areas_N, float),
            crowd=_tuple(0 * ones if crowd_N is None else crowd_N, bool),
            masks=tuple(masks),
        )

    def __post_init__(self) -> None:
        _require_complete(self)


@dataclass(frozen=True, kw_only=True)
class ImageDetections:
    """What was found in one image. Among equal scores, the order decides; the best 100 (per category) count."""

    image_id: int
    boxes: Sequence[Sequence[float]]
    scores: Sequence[float]
    categories: Sequence[int]
    masks: Sequence[Rle] = ()
    "needed for `overlap=masks`"

    @classmethod
    def of(
        cls,
        image_id: int,
        boxes_N4: ArrayLike,
        scores_N: ArrayLike,
        *,
        categories_N: ArrayLike | None = None,
        masks: Sequence[Rle] = (),
    ) -> "ImageDetections":
        """From arrays or CPU tensors. Without categories all are 1."""
        boxes = _boxes(boxes_N4)
        return cls(
            image_id=int(image_id),
            boxes=tuple(map(tuple, boxes.tolist())),
            scores=_tuple(scores_N, float),
            categories=_tuple(np.ones(len(boxes), int) if categories_N is None else categories_N, int),
            masks=tuple(masks),
        )

    def __post_init__(self) -> None:
        _require_complete(self)


@dataclass(frozen=True, kw_only=True)
class CocoScores:
    """COCO's twelve numbers, 0 to 1; NaN where no object counts.

    AP is averaged over IoU 0.5, 0.55, ..., 0.95; small is an area up to 32^2 pixels, large from 96^2 on. AR is the recall
    with so many detections per image.
    """

    ap: float
    ap_50: float
    ap_75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar_1: float
    ar_10: float
    ar_100: float
    ar_small: float
    ar_medium: float
    ar_large: float


def coco_scores(
    truth: Iterable[ImageTruth], detections: Iterable[ImageDetections], protocol: ApProtocol = COCO
) -> CocoScores:
    """The twelve numbers over all images of `truth`, in whatever order images come.

    An image without detections may be left out of `detections`. Raises `ValueError` where an image is there twice, has
    detections but no truth, or masks lack that the protocol needs, and where there is no image.
    """
    truth = sorted(truth, key=lambda image: image.image_id)
    detections = sorted(detections, key=lambda image: image.image_id)
    _require_matching([image.image_id for image in truth], [image.image_id for image in detections])
    annotations = [entry for image in truth for entry in _entries(image, protocol)]
    results = [entry for image in detections for entry in _entries(image, protocol)]
    sizes = {
        entry["image_id"]: entry["segmentation"]["size"] for entry in annotations + results if "segmentation" in entry
    }
    images = [_image(image.image_id, sizes.get(image.image_id, (0, 0))) for image in truth]
    categories = sorted({entry["category_id"] for entry in annotations})
    # pycocotools writes its progress to standard output.
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(
            *(_index(images, categories, entries) for entries in (annotations, results)),
            {"boxes": "bbox", "masks": "segm"}[protocol.overlap],
        )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = [float(value) if value >= 0 else math.nan for value in evaluation.stats]
    return CocoScores(**dict(zip((field.name for field in fields(CocoScores)), stats, strict=True)))


def _entries(image: ImageTruth | ImageDetections, protocol: ApProtocol) -> list[_Entry]:
    """As in COCO's JSON files, without ids."""
    if protocol.overlap == "masks" and len(image.masks) < len(image.boxes):
        raise ValueError(f"image {image.image_id}: {len(image.boxes)} boxes, but {len(image.masks)} masks to compare")
    entries: list[_Entry] = []
    for n, (x1, y1, x2, y2) in enumerate(image.boxes):
        if protocol.crowd == "drop" and isinstance(image, ImageTruth) and image.crowd[n]:
            continue
        entry: _Entry = {
            "image_id": image.image_id,
            "category_id": 1 if protocol.class_agnostic else image.categories[n],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
            "iscrowd": 0,
        }
        if protocol.overlap == "masks":
            entry["segmentation"] = {**image.masks[n]}
        entries.append({**entry, **_own(image, n, protocol)})
    return entries


def _own(image: ImageTruth | ImageDetections, n: int, protocol: ApProtocol) -> _Entry:
    """What an annotation says beyond its place; what a result does."""
    if isinstance(image, ImageDetections):
        return {"score": image.scores[n]}
    own: _Entry = {"iscrowd": int(image.crowd[n] and protocol.crowd == "ignore")}
    if protocol.area == "annotation":
        own["area"] = image.areas[n]
    return own


def _image(image_id: int, size: Sequence[int]) -> dict[str, int]:
    return {"id": image_id, "height": size[0], "width": size[1]}


def _index(images: list[dict[str, int]], categories: list[int], entries: list[_Entry]) -> CocoIndex:
    index = CocoIndex()
    index.dataset = {
        "images": images,
        "categories": [{"id": each} for each in categories],
        # From 1 on: pycocotools takes a match with id 0 for none.
        "annotations": [{**entry, "id": n} for n, entry in enumerate(entries, start=1)],
    }
    index.createIndex()
    return index


def _boxes(boxes_N4: ArrayLike) -> np.ndarray:
    return np.asarray(boxes_N4, np.float64).reshape(-1, 4)


def _tuple(values: ArrayLike, kind: type[T]) -> tuple[T, ...]:
    return tuple(np.asarray(values).astype(kind).tolist())


def _require_complete(image: ImageTruth | ImageDetections) -> None:
    where, count = f"image {image.image_id}", len(image.boxes)
    for field in fields(image)[2:]:
        given = len(getattr(image, field.name))
        if given != count and (given or field.name != "masks"):
            raise ValueError(f"{where}: {given} {field.name} for {count} boxes")
    for box in image.boxes:
        # Not the other way round: NaN is neither.
        if not (len(box) == 4 and -math.inf < box[0] <= box[2] < math.inf and -math.inf < box[1] <= box[3] < math.inf):
            raise ValueError(f"{where}: a box must be x1, y1, x2, y2 with x1 <= x2 and y1 <= y2, got {list(box)}")
    if not all(map(math.isfinite, getattr(image, "scores", ()))):
        raise ValueError(f"{where}: scores hold NaN or infinity")


def _require_matching(truth: list[int], detections: list[int]) -> None:
    """Of sorted ids."""
    for what, ids in (("truth", truth), ("detections", detections)):
        if twice := [first for first, second in itertools.pairwise(ids) if first == second]:
            raise ValueError(f"the {what} of image {twice[0]} is there twice; each image must be there once")
    if unknown := sorted(set(detections) - set(truth)):
        raise ValueError(f"{len(unknown)} images have detections but no truth: {unknown[:5]}")
    if not truth:
        raise ValueError("there is no image to score")
