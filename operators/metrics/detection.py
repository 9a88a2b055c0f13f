"""Average precision as COCO defines it, by pycocotools: of boxes and masks with classes, and for DeAP's CenterNet task without.

Nothing can be averaged before the end: workers give the raw detections of their images, and all are scored at once.

Shapes: N objects or detections of one image; boxes are x1, y1, x2, y2 in pixels.
"""

import contextlib
import functools
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict

import numpy as np
import pycocotools.mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from operators.metrics.bootstrap import Drawn
from operators.metrics.coco_draws import Matches, mean_of_known


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
    evaluation: COCOeval
    "whose matches they are of"

    def drawn(self, names: Sequence[str]) -> Drawn:
        """These numbers of draws of the images, which are in the order of their ids; equal to those of COCO's tools if they were
        given the drawn images, each as often as it was drawn."""
        areas = {_PRECISIONS[name][1] if name in _PRECISIONS else _RECALLS[name][0] for name in names}
        matches = {area: _matches(self.evaluation, area) for area in areas}

        def figures(times_nB: np.ndarray) -> np.ndarray:
            precisions = functools.cache(lambda area: [each.mean_precision(times_nB) for each in matches[area]])

            def values_TB(name: str) -> list[np.ndarray]:
                if name in _PRECISIONS:
                    iou, area = _PRECISIONS[name]
                    return [each[_IOUS[iou]] for each in precisions(area)]
                area, most = _RECALLS[name]
                return [each.recall(times_nB, _MOST[most]) for each in matches[area]]

            nothing = np.zeros((0, times_nB.shape[1]))
            return np.stack([mean_of_known(np.concatenate([nothing, *values_TB(name)])) for name in names], axis=1)

        return figures


def class_agnostic_scores(
    truth: Sequence[np.ndarray], boxes: Sequence[np.ndarray], scores: Sequence[Sequence[float]]
) -> ClassScores:
    """DeAP's protocol: objects are of one class, crowds among them, and small, medium or large by their boxes.

    Of each image, in one order: annotated boxes [N, 4], found boxes [N, 4] and the scores of those. The best 100 of an image
    count. AP_large is published on boxes of the 448 px crop (DINOv2: 0.2666). Raises `ValueError` where there is no image, and
    for boxes without x1 <= x2 and y1 <= y2, NaN and infinity.
    """
    annotations = [entry for i, each in enumerate(truth) for entry in _entries(i, each)]
    results = [entry for i, each in enumerate(zip(boxes, scores, strict=True)) for entry in _entries(i, *each)]
    return coco_scores_by_class([{"id": i} for i in range(len(truth))], annotations, results)


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
    return ClassScores(total, dict(zip(categories, of_each, strict=True)), evaluation)


_IOUS: Mapping[float | None, slice] = {None: slice(None), 0.5: slice(0, 1), 0.75: slice(5, 6)}
"""Places of overlaps among pycocotools' ten."""

_MOST = (1, 10, 100)
"""Detections of an image and a category."""

_PRECISIONS: Mapping[str, tuple[float | None, int]] = {
    "ap": (None, 0), "ap_50": (0.5, 0), "ap_75": (0.75, 0), "ap_small": (None, 1), "ap_medium": (None, 2), "ap_large": (None, 3),
}  # fmt: skip
"""Overlap (None: all ten) and range of areas (all, small, medium, large), with the most detections."""

_RECALLS: Mapping[str, tuple[int, int]] = {
    "ar_1": (0, 0), "ar_10": (0, 1), "ar_100": (0, 2), "ar_small": (1, 2), "ar_medium": (2, 2), "ar_large": (3, 2),
}  # fmt: skip
"""Range of areas and place of the number of detections, over all overlaps."""


def _numbers(precision_TRKAM: np.ndarray, recall_TKAM: np.ndarray) -> CocoScores:
    """COCO's summary of what pycocotools accumulates: T overlaps, R recalls, K categories, A areas, M numbers of detections; -1
    where no object counts."""
    precisions = {name: precision_TRKAM[_IOUS[iou], ..., area, -1] for name, (iou, area) in _PRECISIONS.items()}
    recalls = {name: recall_TKAM[..., area, most] for name, (area, most) in _RECALLS.items()}
    return CocoScores(**{name: _mean_of_known(values) for name, values in (precisions | recalls).items()})


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


def _matches(evaluation: COCOeval, area: int) -> list[Matches]:
    """Within a range of areas, of each category."""
    settings = evaluation.params
    images = len(settings.imgIds)
    kept = [evaluation.evalImgs[first : first + images] for first in range(area * images, len(evaluation.evalImgs), 4 * images)]
    return [Matches.of(of_category, len(settings.iouThrs)) for of_category in kept]
