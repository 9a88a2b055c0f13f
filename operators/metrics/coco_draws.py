"""COCO's average precision of draws of images: what its intervals are taken from (operators/metrics/bootstrap.py).

A detection is right or wrong by its own image alone. So draws need no matching anew: detections keep their order by score, and
each counts as often as its image was drawn. Of draws that have an image more than once, this is what COCO's tools give of so many
copies of it.

Shapes: n images, B draws, T overlaps (0.5, 0.55, ..., 0.95), D detections of a category in all images, P those that are right.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_RECALLS = np.linspace(0, 1, 101)
"""At which precision is averaged."""

_NEXT_TO_0 = np.spacing(1)
"""COCO's tools add it to the divisors of precisions."""


@dataclass(frozen=True, kw_only=True)
class Matches:
    """Detections and objects of one category within one range of areas; better scores first, equal ones by their images."""

    images_D: np.ndarray
    "int64: numbers of the images that detections are in"
    ranks_D: np.ndarray
    "int64: how many of the image's are better"
    right_TD: np.ndarray
    "bool: matched with an object that counts"
    counted_TD: np.ndarray
    "bool: right or wrong; the others are of crowds, or of other areas"
    objects_n: np.ndarray
    "int64: objects that count, of each image"

    @classmethod
    def of(cls, images: Sequence[Mapping[str, Any] | None], overlaps: int) -> "Matches":
        """From pycocotools' `evalImgs` of each image; None: nothing was annotated or found in it."""
        found = [(number, each) for number, each in enumerate(images) if each is not None]
        counts = [len(each["dtScores"]) for _, each in found]
        scores = np.concatenate([np.zeros(0), *(each["dtScores"] for _, each in found)])
        order = np.argsort(-scores, kind="stable")
        nothing = np.zeros((overlaps, 0), bool)
        matched = np.concatenate([nothing, *(np.asarray(each["dtMatches"]) > 0 for _, each in found)], axis=1)
        ignored = np.concatenate([nothing, *(np.asarray(each["dtIgnore"], bool) for _, each in found)], axis=1)
        objects = np.zeros(len(images), np.int64)
        for number, each in found:
            objects[number] = np.count_nonzero(np.asarray(each["gtIgnore"]) == 0)
        return cls(
            images_D=np.repeat(np.array([number for number, _ in found], np.int64), counts)[order],
            ranks_D=np.concatenate([np.zeros(0, np.int64), *map(np.arange, counts)])[order],
            right_TD=(matched & ~ignored)[:, order],
            counted_TD=~ignored[:, order],
            objects_n=objects,
        )

    def mean_precision(self, times_nB: np.ndarray) -> np.ndarray:
        """Interpolated precision, averaged over recalls, of draws that have each image so many times: float64 [T, B]; NaN where
        no object counts."""
        times_DB = times_nB.astype(np.int32)[self.images_D]
        objects_B = self._objects(times_nB)
        found = np.zeros((len(self.right_TD), times_nB.shape[1]))
        seen: dict[bytes, np.ndarray] = {}  # overlaps differ in what they ignore only where there are crowds
        for to, right, counted in zip(found, self.right_TD, self.counted_TD, strict=True):
            key = counted.tobytes()
            if key not in seen:
                seen = {key: np.cumsum(times_DB * counted[:, None], axis=0, dtype=np.int32)}
            right_PB = np.cumsum(times_DB[right], axis=0, dtype=np.int32)
            precision_PB = right_PB / (seen[key][right] + _NEXT_TO_0)
            best_PB = np.maximum.accumulate(precision_PB[::-1], axis=0)[::-1]  # with that recall or more
            # A recall's precision is that of the first detection which reaches it.
            reached_PB = np.searchsorted(_RECALLS, right_PB / objects_B, side="right")
            to[:] = (best_PB * np.diff(reached_PB, axis=0, prepend=0)).sum(axis=0) / len(_RECALLS)
        return np.where(np.isnan(objects_B), np.nan, found)

    def recall(self, times_nB: np.ndarray, most: int) -> np.ndarray:
        """The share of objects that an image's `most` best detections find, of such draws: float64 [T, B]; NaN as above."""
        within = self.ranks_D < most
        found_Tn = [
            np.bincount(self.images_D[within & right], minlength=len(self.objects_n)).astype(np.float64)
            for right in self.right_TD
        ]
        return (np.array(found_Tn) @ times_nB) / self._objects(times_nB)

    def _objects(self, times_nB: np.ndarray) -> np.ndarray:
        """Those that count, [B]; NaN instead of 0."""
        objects_B = self.objects_n @ times_nB
        return np.where(objects_B > 0, objects_B, np.nan)


def mean_of_known(values_mB: np.ndarray) -> np.ndarray:
    """Means of the values that are no NaN, [B]; NaN where all are."""
    known = ~np.isnan(values_mB)
    total, count = np.where(known, values_mB, 0).sum(axis=0), known.sum(axis=0)
    return np.divide(total, count, out=np.full(values_mB.shape[1], np.nan), where=count > 0)
