"""Scores of semantic segmentation from confusion matrices.

A worker returns one matrix of whole numbers for all its images; matrices are summed, and scores taken from the sum only.
"""

from dataclasses import dataclass

import numpy as np

from storage.datasets.classes import VOID, whole_numbers


def confusion(predicted_HW: np.ndarray, labels_HW: np.ndarray, classes: int, void: int = VOID) -> np.ndarray:
    """How often each class (row) was predicted as each (column): int64 [classes, classes].

    Pixels whose label is `void` don't count, whatever was predicted there. Raises `ValueError` where shapes differ, either
    isn't of whole numbers, a label or prediction is none of 0 to `classes` - 1, or `void` is one of the classes.
    """
    if 0 <= void < classes:
        raise ValueError(f"void {void} is one of the {classes} classes; give another number to void pixels")
    predicted, labels = whole_numbers("predictions", predicted_HW), whole_numbers("labels", labels_HW)
    if predicted.shape != labels.shape:
        raise ValueError(f"predictions {predicted.shape} and labels {labels.shape} must be of one shape")
    counted = labels != void
    predicted, labels = predicted[counted], labels[counted]
    _require_classes("prediction", predicted, classes)
    _require_classes("label", labels, classes)
    pairs = labels.astype(np.int64) * classes + predicted.astype(np.int64)
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def _require_classes(what: str, values: np.ndarray, classes: int) -> None:
    if not values.size:
        return
    for value in (values.min(), values.max()):
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
