"""Average precision as COCO defines it, by pycocotools: of boxes and masks with classes, and for DeAP's CenterNet task without.

Nothing can be averaged before the end: workers give the raw detections of their images, and all are scored at once.

Shapes: N objects or detections of one image; boxes are x1, y1, x2, y2 in pixels.
"""

import contextlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, TypedDict

import numpy as np
import pycocotools.mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


class CocoEntry(TypedDict, total=False):
    """An annotation or a result, as in COCO's JSON files. Where an area lacks, it is the box's, or without a box the mask's."""

    image_id: int
    category_id: int
    bbox: Sequence[float]
    "x, y, width, height"
    area: float
    iscrowd: int
    segmentation: Mapping[str, object]
    "a mask as `pycocotools.mask.encode` gives it, or polygons"
    score: float


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


class ClassScores(NamedTuple):
    """COCO's numbers over all categories, and of each that has an object, by its id."""

    total: CocoScores
    by_category: dict[int, CocoScores]


def class_agnostic_scores(
    truth: Sequence[np.ndarray], boxes: Sequence[np.ndarray], scores: Sequence[Sequence[float]]
) -> CocoScores:
    """DeAP's protocol: objects are of one class, crowds among them, and small, medium or large by their boxes.

    Of each image, in one order: annotated boxes [N, 4], found boxes [N, 4] and the scores of those. The best 100 of an image
    count. AP_large is published on boxes of the 448 px crop (DINOv2: 0.2666). Raises `ValueError` where there is no image, and
    for boxes without x1 <= x2 and y1 <= y2, NaN and infinity.
    """
    annotations = [entry for i, each in enumerate(truth) for entry in _entries(i, each)]
    results = [entry for i, each in enumerate(zip(boxes, scores, strict=True)) for entry in _entries(i, *each)]
    return coco_scores([{"id": i} for i in range(len(truth))], annotations, results)


def _entries(image: int, boxes_N4: np.ndarray, scores: Sequence[float] | None = None) -> list[CocoEntry]:
    if not (np.isfinite(boxes_N4).all() and (boxes_N4[:, :2] <= boxes_N4[:, 2:]).all()):
        raise ValueError(f"image {image}: boxes must be x1, y1, x2, y2 with x1 <= x2 and y1 <= y2, got {boxes_N4.tolist()}")
    scores = [0.0] * len(boxes_N4) if scores is None else scores
    if len(scores) != len(boxes_N4):
        raise ValueError(f"image {image}: {len(scores)} scores for {len(boxes_N4)} boxes")
    if not np.isfinite(scores).all():
        raise ValueError(f"image {image}: scores hold NaN or infinity")
    places = np.concatenate([boxes_N4[:, :2], boxes_N4[:, 2:] - boxes_N4[:, :2]], axis=1).tolist()
    return [
        {"image_id": image, "category_id": 1, "bbox": place, "iscrowd": 0, "score": score}
        for place, score in zip(places, scores, strict=True)
    ]


def coco_scores(
    images: Sequence[Mapping[str, int]],
    annotations: Iterable[CocoEntry],
    results: Iterable[CocoEntry],
    overlap: Literal["bbox", "segm"] = "bbox",
) -> CocoScores:
    """The twelve numbers over all `images`, those without annotations or results included. `overlap`: whose IoU decides.

    All are as COCO's JSON files have them; among equal scores, the order decides. Raises `ValueError` where there is no image.
    """
    return coco_scores_by_class(images, annotations, results, overlap).total


def coco_scores_by_class(
    images: Sequence[Mapping[str, int]],
    annotations: Iterable[CocoEntry],
    results: Iterable[CocoEntry],
    overlap: Literal["bbox", "segm"] = "bbox",
) -> ClassScores:
    """As `coco_scores`. Categories without an object say nothing: results of them count nowhere. Images have `id`, and with
    "segm" `height` and `width`."""
    if not images:
        raise ValueError("there is no image to score")
    annotations = list(annotations)
    categories = sorted({entry["category_id"] for entry in annotations})
    # pycocotools writes its progress to standard output.
    with contextlib.redirect_stdout(io.StringIO()):
        indexes = (_index(images, categories, entries) for entries in (annotations, results))
        evaluation = COCOeval(*indexes, overlap)
        evaluation.evaluate()
        evaluation.accumulate()
    precision_TRKAM, recall_TKAM = evaluation.eval["precision"], evaluation.eval["recall"]
    total = _numbers(precision_TRKAM, recall_TKAM)
    of_each = (_numbers(precision_TRKAM[:, :, k : k + 1], recall_TKAM[:, k : k + 1]) for k in range(len(categories)))
    return ClassScores(total, dict(zip(categories, of_each, strict=True)))


_IOUS: Mapping[float | None, int | slice] = {None: slice(None), 0.5: 0, 0.75: 5}
"""Places of overlaps among pycocotools' ten."""


def _numbers(precision_TRKAM: np.ndarray, recall_TKAM: np.ndarray) -> CocoScores:
    """COCO's summary of what pycocotools accumulates: T overlaps, R recalls, K categories, A areas (all, small, medium, large), M
    numbers of detections (1, 10, 100); -1 where no object counts."""
    precisions = [(None, 0), (0.5, 0), (0.75, 0), *((None, area) for area in (1, 2, 3))]
    recalls = [*((0, most) for most in (0, 1, 2)), *((area, 2) for area in (1, 2, 3))]
    found = [
        *(precision_TRKAM[_IOUS[iou]][..., area, 2] for iou, area in precisions),
        *(recall_TKAM[..., area, most] for area, most in recalls),
    ]
    names = (field.name for field in fields(CocoScores))
    return CocoScores(**{name: _mean_of_known(values) for name, values in zip(names, found, strict=True)})


def _mean_of_known(values: np.ndarray) -> float:
    known = values[values > -1]
    return float(np.mean(known)) if known.size else math.nan


def _area(entry: CocoEntry) -> float:
    """As pycocotools has it of results that don't say theirs."""
    if "bbox" in entry:
        return entry["bbox"][2] * entry["bbox"][3]
    return float(coco_mask.area(entry["segmentation"]))


def _index(images: Sequence[Mapping[str, int]], categories: Sequence[int], entries: Iterable[CocoEntry]) -> COCO:
    index = COCO()
    index.dataset = {
        "images": images,
        "categories": [{"id": each} for each in categories],
        # From 1 on: pycocotools takes a match with id 0 for none.
        "annotations": [{"area": _area(entry), **entry, "id": n} for n, entry in enumerate(entries, start=1)],
    }
    index.createIndex()
    return index
