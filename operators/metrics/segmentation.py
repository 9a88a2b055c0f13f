"""Scores of semantic segmentation from confusion matrices.

A worker returns one matrix of whole numbers for all its images; matrices are summed, and scores taken from the sum only.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from storage.datasets.classes import VOID


def class_pairs(predicted_HW: Tensor | np.ndarray, labels_HW: Tensor | np.ndarray, classes: int) -> Tensor:
    """How often each class was predicted as each, of those that were: int64 [n, 3] of label, prediction and count, sorted,
    where the predictions are.

    Pixels whose label is `VOID` don't count, whatever was predicted there. Raises `ValueError` where shapes differ, either
    isn't of whole numbers, a label or prediction is none of 0 to `classes` - 1, or `VOID` is one of the classes.
    """
    if classes > VOID:
        raise ValueError(f"void {VOID} is one of the {classes} classes; give another number to void pixels")
    predicted, labels = torch.as_tensor(predicted_HW), torch.as_tensor(labels_HW)
    if predicted.shape != labels.shape:
        raise ValueError(f"predictions {tuple(predicted.shape)} and labels {tuple(labels.shape)} must be of one shape")
    counted = labels != VOID
    of_prediction = _classes("prediction", predicted[counted], classes)
    of_label = _classes("label", labels[counted], classes)
    pairs, counts = (of_label * classes + of_prediction).unique(return_counts=True)
    return torch.stack([pairs // classes, pairs % classes, counts], dim=1)


def matrix_of(pairs: Iterable[Sequence[int]], classes: int) -> np.ndarray:
    """The sum of images' `class_pairs` as a confusion matrix on the host: how often each class (row) was predicted as each
    (column), int64 [classes, classes]."""
    matrix = np.zeros((classes, classes), np.int64)
    for label, prediction, count in pairs:
        matrix[label, prediction] += count
    return matrix


def _classes(what: str, values: Tensor, classes: int) -> Tensor:
    if values.is_floating_point():
        raise ValueError(f"{what}s must be whole numbers, got {str(values.dtype).removeprefix('torch.')}")
    whole = values.long()
    for value in torch.stack(whole.aminmax()).tolist() if whole.numel() else ():
        if not 0 <= value < classes:
            raise ValueError(f"{what} {value} is none of the {classes} classes 0 to {classes - 1}")
    return whole


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
        """From the sum of all images' confusion matrices. Raises `ValueError` where it isn't square, or no pixel counts."""
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


def pair_sums(images: Sequence[Sequence[Sequence[int]]], classes: int) -> np.ndarray:
    """What each image's `class_pairs` add to the sums of scores, float64 [n, 3 * classes + 1]: of each class the right, the
    labelled and the predicted pixels, and those that are another class than 0 by label and prediction."""
    sums = np.zeros((len(images), 3 * classes + 1))
    for of_image, pairs in zip(sums, images, strict=True):
        for label, prediction, count in pairs:
            of_image[label] += count if label == prediction else 0
            of_image[classes + label] += count
            of_image[2 * classes + prediction] += count
            of_image[-1] += count if label and prediction else 0
    return sums


def scores_of_sums(sums_Bk: np.ndarray) -> dict[str, np.ndarray]:
    """Mean IoU, accuracy of pixels, of classes, and IoU of all classes but 0 as one, each [B], of sums of `pair_sums`."""
    right, labelled, predicted = np.split(sums_Bk[:, :-1], 3, axis=1)
    total, union = labelled.sum(axis=1), labelled + predicted - right
    foreground = total - right[:, 0]
    return {
        "miou": _mean_share(right, union),
        "pixel_accuracy": _share(right.sum(axis=1), total),
        "mean_accuracy": _mean_share(right, labelled),
        "foreground_iou": _share(sums_Bk[:, -1], foreground),
    }


def _share(part: np.ndarray, of: np.ndarray) -> np.ndarray:
    return np.divide(part, of, out=np.full_like(part, np.nan), where=of > 0)


def _mean_share(part_BC: np.ndarray, of_BC: np.ndarray) -> np.ndarray:
    """Over the classes that there are any of."""
    shares = np.divide(part_BC, of_BC, out=np.zeros_like(part_BC), where=of_BC > 0)
    return _share(shares.sum(axis=1), (of_BC > 0).sum(axis=1).astype(np.float64))
