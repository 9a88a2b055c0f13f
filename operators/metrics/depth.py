"""Scores of depth maps: ViT-Up's means over images, with probe3d's scale-and-shift fit, and DeAP's pooled RMSE.

A worker returns a record for each image. Averages are taken once, over all of them, and don't depend on their order.
Depths are metres, or whatever unit the truth has.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np

MIN_DEPTH, MAX_DEPTH = 0.001, 10.0
"""Pixels count where the truth lies between these, both exclusive; what is missing is 0 or NaN."""

NYU_SIZE = (480, 640)


@dataclass(frozen=True, kw_only=True)
class DepthMetrics:
    """Of one image, or means over images."""

    d1: float
    "share of pixels whose ratio to the truth, or its inverse, is below 1.25"
    d2: float
    "below 1.25^2"
    d3: float
    "below 1.25^3"
    abs_rel: float
    "mean of |error| / truth"
    sq_rel: float
    "mean of error^2 / truth, in the unit of depth"
    rmse: float
    "in the unit of depth"
    rmse_log: float
    "of natural logarithms"
    log10: float
    "mean absolute difference of decimal logarithms"
    silog: float
    "100 times the standard deviation of the difference of natural logarithms"


def score_depth(predicted_HW: np.ndarray, depth_HW: np.ndarray, *, fit: bool = False) -> DepthMetrics | None:
    """Metrics of one image in float64, or None where the truth has no pixel that counts: such an image is left out.

    `fit` first brings the prediction to the truth by the best scale and shift (`scale_and_shift`). Predictions below
    `MIN_DEPTH` are raised to it, so that ratios and logarithms exist; the published head gives none. Raises `ValueError`
    where shapes differ or a prediction that counts isn't finite.
    """
    predicted, depth = _counted(predicted_HW, depth_HW)
    if not depth.size:
        return None
    if fit:
        scale, shift = scale_and_shift(predicted, depth)
        predicted = scale * predicted + shift
    predicted = predicted.clip(MIN_DEPTH)
    # Not |error| / truth: twice and half the depth are equally wrong.
    ratio = np.maximum(predicted / depth, depth / predicted)
    error, log_error = predicted - depth, np.log(predicted) - np.log(depth)
    values = {
        "d1": ratio < 1.25,
        "d2": ratio < 1.25**2,
        "d3": ratio < 1.25**3,
        "abs_rel": np.abs(error) / depth,
        "sq_rel": error**2 / depth,
        "log10": np.abs(log_error) / math.log(10),
    }
    return DepthMetrics(
        **{name: float(each.mean()) for name, each in values.items()},
        rmse=math.sqrt((error**2).mean()),
        rmse_log=math.sqrt((log_error**2).mean()),
        silog=100 * float(log_error.std()),
    )


def scale_and_shift(predicted: np.ndarray, depth: np.ndarray) -> tuple[float, float]:
    """The least-squares fit scale * predicted + shift ~ depth of arrays of one shape; scale 0 where predictions are all alike."""
    mean_predicted, mean_depth = predicted.mean(), depth.mean()
    deviation = predicted - mean_predicted
    spread = float((deviation**2).sum())
    scale = float((deviation * (depth - mean_depth)).sum()) / spread if spread else 0.0
    return scale, float(mean_depth - scale * mean_predicted)


def average(images: Iterable[DepthMetrics]) -> DepthMetrics:
    """The mean over images of each metric. Raises `ValueError` without images."""
    images = list(images)
    if not images:
        raise ValueError("there is no image with depth to average")
    # fsum rounds once, so that the order doesn't matter.
    names = [field.name for field in fields(DepthMetrics)]
    return DepthMetrics(**{name: math.fsum(getattr(image, name) for image in images) / len(images) for name in names})


@dataclass(frozen=True, kw_only=True)
class SquaredError:
    """Of one image: the sum of squared errors over the pixels that count, and their number (0 is fine)."""

    squares: float
    pixels: int

    @classmethod
    def of(cls, predicted_HW: np.ndarray, depth_HW: np.ndarray) -> "SquaredError":
        """Raises `ValueError` where shapes differ or a prediction that counts isn't finite."""
        predicted, depth = _counted(predicted_HW, depth_HW)
        return cls(squares=float(((predicted - depth) ** 2).sum()), pixels=depth.size)


def pooled_rmse(images: Iterable[SquaredError]) -> float:
    """DeAP's RMSE over all pixels of all images: an image with more valid pixels counts more.

    The published one is of NYU's `eigen_crop`. Raises `ValueError` without a pixel.
    """
    images = list(images)
    pixels = sum(image.pixels for image in images)
    if not pixels:
        raise ValueError("no pixel with depth was evaluated")
    return math.sqrt(math.fsum(image.squares for image in images) / pixels)


def eigen_crop(map_HW: np.ndarray) -> np.ndarray:
    """The part of a map [..., 480, 640] that NYUv2 is scored on: rows 45 to 470, columns 41 to 600, both inclusive.

    Raises `ValueError` for another size.
    """
    if map_HW.shape[-2:] != NYU_SIZE:
        raise ValueError(f"the Eigen crop is one of {NYU_SIZE} pixels, got {map_HW.shape}; enlarge predictions first")
    return map_HW[..., 45:471, 41:601]


def _counted(predicted: np.ndarray, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and truth, float64, where the truth counts."""
    predicted, depth = np.asarray(predicted), np.asarray(depth)
    if predicted.shape != depth.shape:
        raise ValueError(f"predicted {predicted.shape} and true depth {depth.shape} must be of one shape")
    counts = (depth > MIN_DEPTH) & (depth < MAX_DEPTH)
    predicted, depth = predicted[counts].astype(np.float64), depth[counts].astype(np.float64)
    if not np.isfinite(predicted).all():
        raise ValueError(f"{(~np.isfinite(predicted)).sum()} predicted depths are NaN or infinite")
    return predicted, depth
