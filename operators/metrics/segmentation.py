"""Scores of semantic segmentation from confusion matrices, and COCO-Stuff's 27 coarse groups.

A worker returns one matrix of whole numbers for all its images; matrices are summed, and scores taken from the sum only.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

VOID = 255
"""Label of pixels that aren't scored."""

COARSE_CLASSES = 27
"""COCO-Stuff's coarse groups: 12 of things, then 15 of stuff."""

_THINGS = ((0, 9), (8, 11), (14, 8), (24, 7), (32, 6), (42, 10), (50, 5), (60, 2), (70, 3), (76, 0), (82, 1), (90, 4))
"""(last fine label, group): each range begins where the one before ends."""

_STUFF = """
17 17 22 20 20 22 15 25 16 13 12 12 17 17 23 15 15 17 15 21 15 25 13 13 13 13 13 22 26 14 14 15 22 21 21 24 20 22 15 17 16 15
22 24 21 17 25 16 21 17 22 16 21 21 25 21 26 21 24 20 17 14 21 26 15 23 20 21 24 15 24 22 25 15 20 17 17 22 14 18 18 18 18 18
18 18 26 26 19 19 24
"""
"""Groups of the fine labels 91 to 181."""


def _coarse_table() -> np.ndarray:
    table = np.full(256, VOID, np.uint8)
    first = 0
    for last, group in _THINGS:
        table[first : last + 1] = group
        first = last + 1
    stuff = [int(group) for group in _STUFF.split()]
    table[first : first + len(stuff)] = stuff
    table.setflags(write=False)
    return table


COARSE_OF_FINE = _coarse_table()
"""uint8 [256]: the coarse group of each label of COCO-Stuff's PNGs (category id - 1). 255 stays void, and 182 to 254, which no
file should have, become void: `coarse_labels` refuses them."""


def coarse_labels(fine_HW: np.ndarray) -> np.ndarray:
    """Coarse groups uint8 [H, W] of fine labels 0 to 181 or 255 (void). Raises `ValueError` for other labels."""
    fine = np.asarray(fine_HW)
    if fine.dtype.kind not in "iub":
        raise ValueError(f"fine labels must be whole numbers, got {fine.dtype}")
    wrong = fine[((fine < 0) | (fine > 181)) & (fine != VOID)]
    if wrong.size:
        raise ValueError(f"COCO-Stuff's labels are 0 to 181, and {VOID} for void; got {wrong[0]}")
    return COARSE_OF_FINE[fine]


def class_pairs(
    predicted_HW: Tensor | np.ndarray, labels_HW: Tensor | np.ndarray, classes: int, void: int = VOID
) -> Tensor:
    """How often each class was predicted as each, of those that were: int64 [n, 3] of label, prediction and count, sorted,
    where the predictions are.

    Pixels whose label is `void` don't count, whatever was predicted there. Raises `ValueError` where shapes differ, either
    isn't of whole numbers, a label or prediction is none of 0 to `classes` - 1, or `void` is one of the classes.
    """
    if 0 <= void < classes:
        raise ValueError(f"void {void} is one of the {classes} classes; give another number to void pixels")
    predicted, labels = torch.as_tensor(predicted_HW), torch.as_tensor(labels_HW)
    if predicted.shape != labels.shape:
        raise ValueError(f"predictions {tuple(predicted.shape)} and labels {tuple(labels.shape)} must be of one shape")
    counted = labels != void
    of_label, of_prediction = (
        _whole(what, values)[counted] for what, values in (("labels", labels), ("predictions", predicted))
    )
    _require_classes("prediction", of_prediction, classes)
    _require_classes("label", of_label, classes)
    pairs, counts = (of_label * classes + of_prediction).unique(return_counts=True)
    return torch.stack([pairs // classes, pairs % classes, counts], dim=1)


def confusion(
    predicted_HW: Tensor | np.ndarray, labels_HW: Tensor | np.ndarray, classes: int, void: int = VOID
) -> np.ndarray:
    """`class_pairs` as a matrix on the host: how often each class (row) was predicted as each (column), int64
    [classes, classes]."""
    return matrix_of(class_pairs(predicted_HW, labels_HW, classes, void).tolist(), classes)


def matrix_of(pairs: Iterable[Sequence[int]], classes: int) -> np.ndarray:
    """The sum of images' `class_pairs` as a confusion matrix, int64 [classes, classes]."""
    matrix = np.zeros((classes, classes), np.int64)
    for label, prediction, count in pairs:
        matrix[label, prediction] += count
    return matrix


def _whole(what: str, values: Tensor) -> Tensor:
    if values.is_floating_point():
        raise ValueError(f"{what} must be whole numbers, got {str(values.dtype).removeprefix('torch.')}")
    return values.long()


def _require_classes(what: str, values: Tensor, classes: int) -> None:
    if not values.numel():
        return
    for value in torch.stack(values.aminmax()).tolist():
        if not 0 <= value < classes:
            raise ValueError(f"{what} {value} is none of the {classes} classes 0 to {classes - 1}")


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """Scores over all counted pixels of a data set."""

    iou: np.ndarray
    "float64 [classes]: intersection over union; NaN for a class neither labelled nor predicted"
    mean_iou: float
    "over the classes that occur in labels or predictions; one that is only predicted counts as 0"
    pixel_accuracy: float
    mean_accuracy: float
    "share of right pixels of each labelled class, averaged over those classes"

    @classmethod
    def of(cls, matrix_CC: np.ndarray) -> "Segmentation":
        """From the sum of all images' `confusion`. Raises `ValueError` where it isn't square, or no pixel counts."""
        matrix = np.asarray(matrix_CC)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"a confusion matrix must be square, got {matrix.shape}")
        right, labelled, total = matrix.diagonal(), matrix.sum(axis=1), matrix.sum()
        if not total:
            raise ValueError("no pixel was scored: all labels are void, or there is no image")
        union = labelled + matrix.sum(axis=0) - right
        iou = np.divide(right, union, out=np.full(len(matrix), np.nan), where=union > 0)
        return cls(
            iou=iou,
            mean_iou=float(np.nanmean(iou)),
            pixel_accuracy=float(right.sum() / total),
            mean_accuracy=float((right[labelled > 0] / labelled[labelled > 0]).mean()),
        )
