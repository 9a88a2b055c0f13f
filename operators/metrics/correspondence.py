"""Key-point correspondence on SPair-71k's layout: LiFT's protocol and ViT-Up's, and PCK (the share of correct key points).

A protocol says where an image and its key points lie on a square canvas, how similarities are taken, in which coordinates a
prediction is compared with the truth and how near it must be. Results are whole numbers per pair, so that sums over any
split of the pairs are exact.

Shapes: K key points, x then y in pixels; C channels, h w cells of a map of the whole canvas.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from operators.metrics.canvas import Canvas, CanvasMode
from operators.metrics.matching import Normalise, best_pixels, pixel_features

ALPHAS = (0.1, 0.05, 0.01)
"""Of the published tables."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How key points are matched and judged."""

    canvas: CanvasMode
    normalise: Normalise
    "LiFT: cells, before the enlargement only; ViT-Up: cosine of enlarged features"
    strict: bool
    "an error equal to the threshold is wrong"
    candidates: Literal["pixels", "cells"] = "pixels"
    "the map enlarged to the canvas, or as it is (the other reading of ViT-Up's bilinear row)"
    threshold: Literal["box", "image"] = "box"
    "alpha times the longer side of the target's bounding box, or of the target image (PF-PASCAL)"

    def place(self, width: int, height: int, side: int) -> Canvas:
        """The canvas of a `width` x `height` image at `side` pixels."""
        return Canvas(mode=self.canvas, width=width, height=height, side=side)


LIFT = Protocol(canvas="fit_then_pad", normalise="cells", strict=True)
"""LiFT's eval_spair: Table 1 has 5.05 / 17.72 / 28.68 / 31.38 % PCK@0.1 at 56 / 112 / 224 / 448 px for DINO ViT-S/16."""

VIT_UP = Protocol(canvas="pad_then_resize", normalise="pixels", strict=False)
"""ViT-Up's correspondence kit at 448 px: 55.44 / 39.07 / 7.30 % PCK@0.1 / 0.05 / 0.01 for DINOv3-S+."""


@dataclass(frozen=True, kw_only=True)
class View:
    """One image of a pair: the map of its canvas, `features` [h, w, C], and where it lies on it."""

    features: Tensor
    canvas: Canvas


def match(source: View, target: View, source_xy: np.ndarray, protocol: Protocol, *, max_bytes: int = 2**26) -> np.ndarray:
    """Predicted key points float64 [K, 2] in the target's `Canvas.compared` coordinates, for `source_xy` [K, 2] in pixels
    of the source image. Raises `ValueError` for maps that aren't square or hold NaN, as `best_pixels` does."""
    points = _points(source_xy)
    if not len(points):
        return np.zeros((0, 2))
    grids = [_grid(view, protocol) for view in (source, target)]
    xy = torch.from_numpy(source.canvas.pixels(points, grids[0]))
    # Only the key points' own features are enlarged; `best_pixels` does without the target's enlarged map.
    queries = pixel_features(source.features, (grids[0],) * 2, xy, normalise=protocol.normalise)
    found = best_pixels(queries, target.features, (grids[1],) * 2, normalise=protocol.normalise, max_bytes=max_bytes)
    return target.canvas.predicted(found.xy_K2.cpu().numpy(), grids[1])


def _grid(view: View, protocol: Protocol) -> int:
    """Candidates along a side."""
    h, w = view.features.shape[:2]
    if h != w:
        raise ValueError(f"the map of a square canvas is square, got {h} x {w} cells")
    return view.canvas.side if protocol.candidates == "pixels" else h


def _points(xy: np.ndarray) -> np.ndarray:
    points = np.asarray(xy, np.float64).reshape(-1, 2)
    if not np.isfinite(points).all():
        raise ValueError(f"key points hold NaN or infinity: {points.tolist()}")
    return points


@dataclass(frozen=True, kw_only=True)
class PairScore:
    """One pair's key points: how many there are, and per alpha how many were found.

    `nearest` counts those found that also lie nearest to their own key point of all key points of the pair (PCK+).
    """

    category: str
    points: int
    correct: tuple[int, ...]
    nearest: tuple[int, ...]


def score_pair(
    predicted_K2: np.ndarray,
    truth_xy: np.ndarray,
    canvas: Canvas,
    box: Sequence[float],
    protocol: Protocol,
    *,
    category: str,
    alphas: Sequence[float] = ALPHAS,
) -> PairScore:
    """Judge predictions of `match` by key points `truth_xy` [K, 2] in pixels of the target image.

    `box` is the target's bounding box x1, y1, x2, y2 in image pixels. Key points that one of the images lacks are left out
    by the caller, from both. Raises `ValueError` for a box without extent (of `threshold="box"`).
    """
    predicted, truth = _points(predicted_K2), canvas.compared(_points(truth_xy))
    if len(predicted) != len(truth):
        raise ValueError(f"{len(predicted)} predictions for {len(truth)} key points")
    _extent(canvas, box, protocol)  # raises where there is none
    if not len(truth):
        return PairScore(category=category, points=0, correct=(0,) * len(alphas), nearest=(0,) * len(alphas))
    distances = np.linalg.norm(predicted[:, None] - truth[None], axis=2)
    own, own_is_nearest = distances.diagonal(), distances.argmin(axis=1) == np.arange(len(truth))
    right = [are_right(own, alpha, canvas, box, protocol) for alpha in alphas]
    correct = tuple(int(hits.sum()) for hits in right)
    nearest = tuple(int((hits & own_is_nearest).sum()) for hits in right)
    return PairScore(category=category, points=len(truth), correct=correct, nearest=nearest)


def are_right(distances_K: np.ndarray, alpha: float, canvas: Canvas, box: Sequence[float], protocol: Protocol) -> np.ndarray:
    """Which predictions are near enough, bool [K]: `distances_K` are in the target's `Canvas.compared` coordinates.

    Raises `ValueError` for a box without extent (of `threshold="box"`).
    """
    limit = alpha * canvas.length(_extent(canvas, box, protocol))
    return distances_K < limit if protocol.strict else distances_K <= limit


def _extent(canvas: Canvas, box: Sequence[float], protocol: Protocol) -> float:
    extent = max(box[2] - box[0], box[3] - box[1]) if protocol.threshold == "box" else canvas.long_side
    if not extent > 0:
        raise ValueError(f"the target's bounding box {list(box)} has no extent")
    return extent


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Sums over pairs. `pair_mean` sums each pair's share of correct key points, exactly."""

    pairs: int
    points: int
    correct: tuple[int, ...]
    nearest: tuple[int, ...]
    pair_mean: tuple[Fraction, ...]

    @classmethod
    def of(cls, score: PairScore) -> "Counts":
        """Of one pair that has key points."""
        share = tuple(Fraction(hits, score.points) for hits in score.correct)
        return cls(pairs=1, points=score.points, correct=score.correct, nearest=score.nearest, pair_mean=share)

    def __add__(self, other: "Counts") -> "Counts":
        if len(self.correct) != len(other.correct):
            raise ValueError(f"counts for {len(self.correct)} and {len(other.correct)} alphas can't be added")
        sums = {
            name: tuple(a + b for a, b in zip(getattr(self, name), getattr(other, name), strict=True))
            for name in ("correct", "nearest", "pair_mean")
        }
        return Counts(pairs=self.pairs + other.pairs, points=self.points + other.points, **sums)


@dataclass(frozen=True, kw_only=True)
class Pck:
    """Counts per category, and the averages that papers report; shares, not percent. Merged exactly with `+`.

    Averages raise `ValueError` where there is no key point.
    """

    categories: Mapping[str, Counts] = field(default_factory=dict)

    @classmethod
    def of(cls, scores: Iterable[PairScore]) -> "Pck":
        """Of pairs in any order; pairs without common key points count nowhere."""
        return cls()._with((score.category, Counts.of(score)) for score in scores if score.points)

    def __add__(self, other: "Pck") -> "Pck":
        return self._with(other.categories.items())

    def _with(self, further: Iterable[tuple[str, Counts]]) -> "Pck":
        both = {**self.categories}
        for name, counts in further:
            both[name] = both[name] + counts if name in both else counts
        return Pck(categories=dict(sorted(both.items())))

    def by_category(self) -> dict[str, tuple[float, ...]]:
        """Per category, the share of its key points that were found, per alpha."""
        return {name: _shares(counts.correct, counts.points) for name, counts in self.categories.items()}

    def mean(self) -> tuple[float, ...]:
        """The published number of both protocols: the unweighted mean of the categories."""
        self._total()  # raises where there is none
        rows = self.by_category().values()
        return tuple(math.fsum(column) / len(rows) for column in zip(*rows, strict=True))

    def per_point(self) -> tuple[float, ...]:
        """All key points pooled."""
        total = self._total()
        return _shares(total.correct, total.points)

    def per_pair(self) -> tuple[float, ...]:
        """The mean over pairs of each pair's share."""
        total = self._total()
        return tuple(float(share / total.pairs) for share in total.pair_mean)

    def plus(self) -> tuple[float, ...]:
        """PCK+, all key points pooled."""
        total = self._total()
        return _shares(total.nearest, total.points)

    def _total(self) -> Counts:
        if not self.categories:
            raise ValueError("no pair has a key point in both of its images: there is nothing to average")
        first, *others = self.categories.values()
        return sum(others, start=first)


def category_sums(scores: Sequence[PairScore], times: Sequence[int]) -> np.ndarray:
    """What each pair adds to the sums of `Pck.mean`, float64 [n, G * (1 + A)]: of each of G categories, key points and how
    many of them are right by each alpha. `times`: how often each pair counts."""
    categories = {name: number for number, name in enumerate(sorted({score.category for score in scores}))}
    sums = np.zeros((len(scores), len(categories), 1 + len(scores[0].correct)))
    for of_pair, score, count in zip(sums, scores, times, strict=True):
        of_pair[categories[score.category]] = np.multiply(count, (score.points, *score.correct))
    return sums.reshape(len(scores), -1)


def mean_of_categories(sums_Bk: np.ndarray, alphas: int) -> np.ndarray:
    """`Pck.mean` [B, A] of sums of `category_sums`: over the categories that have key points in them."""
    sums = sums_Bk.reshape(len(sums_Bk), -1, 1 + alphas)
    points, correct = sums[..., :1], sums[..., 1:]
    shares = np.divide(correct, points, out=np.zeros_like(correct), where=points > 0)
    return shares.sum(axis=1) / (points > 0).sum(axis=1)


def _shares(hits: Sequence[int], points: int) -> tuple[float, ...]:
    return tuple(count / points for count in hits)
