"""Scores of video object segmentation: region J and boundary F as DAVIS-2017's semi-supervised evaluation has them.

Masks in, numbers out. A distributed evaluation collects each object's curve over its clip's frames; `summarise` is the only
place where objects are averaged.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from skimage.morphology import isotropic_dilation

from storage.datasets.classes import VOID


def region_j(truth_HW: np.ndarray, predicted_HW: np.ndarray, void_HW: np.ndarray | None = None) -> float:
    """Intersection over union of two masks; 1 where both are empty. Pixels of `void_HW` don't count."""
    truth, predicted = _masks(truth_HW, predicted_HW, void_HW)
    union = int((truth | predicted).sum())
    return int((truth & predicted).sum()) / union if union else 1.0


def boundary_f(
    truth_HW: np.ndarray, predicted_HW: np.ndarray, void_HW: np.ndarray | None = None, *, tolerance: float = 0.008
) -> float:
    """Harmonic mean of the shares of either boundary that lie near the other one.

    Near: within `tolerance_pixels`. One mask empty: 0; both: 1.
    """
    truth, predicted = (boundary(mask) for mask in _masks(truth_HW, predicted_HW, void_HW))
    n_truth, n_predicted = int(truth.sum()), int(predicted.sum())
    if not n_truth or not n_predicted:
        # A mask of the whole image has no boundary either.
        return float(n_truth == n_predicted)
    radius = tolerance_pixels(truth.shape, tolerance)
    # Everything that matters lies within a radius of either boundary.
    window = _window(truth | predicted)
    truth, predicted = truth[window], predicted[window]
    precision = int((predicted & isotropic_dilation(truth, radius)).sum()) / n_predicted
    recall = int((truth & isotropic_dilation(predicted, radius)).sum()) / n_truth
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def tolerance_pixels(shape: tuple[int, int], tolerance: float = 0.008) -> int:
    """Radius in pixels: `tolerance` times the image's diagonal, rounded up; from 1 on it is in pixels already."""
    return math.ceil(tolerance if tolerance >= 1 else tolerance * math.hypot(*shape))


def boundary(mask_HW: np.ndarray) -> np.ndarray:
    """Pixels that differ from their right, lower or lower right neighbour; those outside of the image are as the pixel."""
    mask = np.asarray(mask_HW, bool)
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, diagonal = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask != right) | (mask != below) | (mask != diagonal)


def _window(mask: np.ndarray) -> tuple[slice, slice]:
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _masks(truth: np.ndarray, predicted: np.ndarray, void: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    truth, predicted = np.asarray(truth, bool), np.asarray(predicted, bool)
    if truth.shape != predicted.shape or truth.ndim != 2 or not truth.size:
        raise ValueError(f"two masks [H, W] of one size are needed, got {truth.shape} and {predicted.shape}")
    if void is None:
        return truth, predicted
    counts = ~np.asarray(void, bool)
    return truth & counts, predicted & counts


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of one measure over an object's frames: the mean, the share above 0.5, and the first quarter's mean minus the last's."""

    mean: float
    recall: float
    decay: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Statistics":
        """Quarters share their end frames. Raises `ValueError` without values."""
        if not len(values):
            raise ValueError("an object without scored frames has no statistics")
        curve = np.asarray(values, np.float64)
        # The official code's five ends of quarters, numbered from 1, halves rounded up.
        ends = np.round(np.linspace(1, len(curve), 5) + 1e-10).astype(int) - 1
        quarters = [curve[ends[i] : ends[i + 1] + 1] for i in (0, 3)]
        return cls(
            mean=float(curve.mean()), recall=float((curve > 0.5).mean()), decay=float(quarters[0].mean() - quarters[1].mean())
        )


@dataclass(frozen=True, kw_only=True)
class ObjectCurves:
    """J and F of one object in each scored frame of its clip."""

    clip: str
    object_id: int
    j: tuple[float, ...]
    f: tuple[float, ...]


def score_clip(
    clip: str, truth_THW: Sequence[np.ndarray], predicted_THW: Sequence[np.ndarray], *, ends: int = 1, tolerance: float = 0.008
) -> list[ObjectCurves]:
    """Curves of each object of a clip's label images (0 background; in the truth `VOID`, which annotators left open, too).

    Objects are the ids 1 to the largest of the first frame's truth. The official evaluation leaves out the first and last
    `ends` = 1 frames. An object that the prediction lacks is scored as empty. Raises `ValueError` where the clip has no
    frame to score or no object, where frames differ in number or size, and for predicted ids that are no object's.
    """
    if len(truth_THW) != len(predicted_THW):
        raise ValueError(f"clip {clip}: {len(predicted_THW)} predicted frames for {len(truth_THW)}")
    if len(truth_THW) <= 2 * ends:
        raise ValueError(f"clip {clip}: {len(truth_THW)} frames, and {2 * ends} of them aren't scored")
    first = np.asarray(truth_THW[0])
    objects = int(np.where(first == VOID, 0, first).max(initial=0))
    if not objects:
        raise ValueError(f"clip {clip}: the first frame's mask shows no object")
    curves: dict[int, list[tuple[float, float]]] = {i: [] for i in range(1, objects + 1)}
    for t in range(ends, len(truth_THW) - ends):
        truth, predicted = np.asarray(truth_THW[t]), np.asarray(predicted_THW[t])
        _check_labels(f"clip {clip}, frame {t}", truth, predicted, objects)
        for i, values in curves.items():
            pair = truth == i, predicted == i
            values.append((region_j(*pair), boundary_f(*pair, tolerance=tolerance)))
    return [
        ObjectCurves(clip=clip, object_id=i, j=tuple(j for j, _ in values), f=tuple(f for _, f in values))
        for i, values in curves.items()
    ]


def _check_labels(where: str, truth: np.ndarray, predicted: np.ndarray, objects: int) -> None:
    if truth.shape != predicted.shape:
        raise ValueError(f"{where}: the prediction is {predicted.shape}, the truth {truth.shape}")
    if (largest := int(predicted.max(initial=0))) > objects:
        hint = "; 255 is void, set it to 0" if largest == VOID else ""
        raise ValueError(f"{where}: the prediction has id {largest}, but the clip has {objects} objects{hint}")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Statistics of J and F, averaged over all objects of all clips, and `j_and_f`, the mean of the two means."""

    j: Statistics
    f: Statistics
    j_and_f: float
    objects: int


def summarise(curves: Iterable[ObjectCurves]) -> Summary:
    """The published numbers, whatever order the objects come in: each counts once, however long its clip is.

    Raises `ValueError` without objects, or where one is there twice.
    """
    curves = list(curves)
    names = [(curve.clip, curve.object_id) for curve in curves]
    if not names or len(set(names)) < len(names):
        raise ValueError("each object must be there once" if names else "there is no object to average")
    j, f = (_mean_statistics([Statistics.of(getattr(curve, name)) for curve in curves]) for name in ("j", "f"))
    return Summary(j=j, f=f, j_and_f=(j.mean + f.mean) / 2, objects=len(curves))


def clip_sums(curves: Sequence[ObjectCurves]) -> np.ndarray:
    """What each clip adds to the sums of `summarise`, float64 [n, 7] in the order of the clips: of its objects the means of J and
    F, the recalls and the decays; and how many objects there are."""
    clips: dict[str, np.ndarray] = {}
    for curve in curves:
        j, f = Statistics.of(curve.j), Statistics.of(curve.f)
        of_object = np.array([j.mean, f.mean, j.recall, f.recall, j.decay, f.decay, 1.0])
        clips[curve.clip] = clips.get(curve.clip, 0) + of_object
    return np.stack(list(clips.values()))


def figures_of_clips(sums_B7: np.ndarray) -> np.ndarray:
    """J&F, and J, F, both recalls and both decays [B, 7], of sums of `clip_sums`: means over objects."""
    means = sums_B7[:, :6] / sums_B7[:, 6:]
    return np.concatenate([means[:, :2].mean(axis=1, keepdims=True), means], axis=1)


def _mean_statistics(statistics: list[Statistics]) -> Statistics:
    # fsum rounds once, so that the order doesn't matter.
    names = ("mean", "recall", "decay")
    return Statistics(**{name: math.fsum(getattr(each, name) for each in statistics) / len(statistics) for name in names})
