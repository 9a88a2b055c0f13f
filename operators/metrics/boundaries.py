"""Scores of predicted boundaries: DeAP's pooled IoU and its cross-entropy.

Shapes: B images, H W pixels.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BoundarySums:
    """What a batch, or many, contribute. Fix the batching: cross-entropy is a mean over batches, whatever their sizes."""

    intersection: int
    "pixels that are boundary and were predicted to be"
    union: int
    "pixels that are either"
    bce: float
    "sum over batches of each one's mean binary cross-entropy, in nats"
    batches: int

    @property
    def iou(self) -> float:
        """Over all pixels of all images at once; 0 where nothing is or was predicted to be boundary."""
        return self.intersection / self.union if self.union else 0.0

    @property
    def cross_entropy(self) -> float:
        """DeAP's CE. Raises `ValueError` without batches."""
        if not self.batches:
            raise ValueError("there is no batch to average")
        return self.bce / self.batches


def boundary_sums(logits_BHW: Tensor, boundary_BHW: Tensor) -> BoundarySums:
    """Of one batch; a pixel is predicted where its probability is above 0.5.

    `boundary_BHW` is bool. Raises `ValueError` where shapes differ or logits hold NaN or infinity.
    """
    if logits_BHW.shape != boundary_BHW.shape or not logits_BHW.numel():
        raise ValueError(
            f"logits {tuple(logits_BHW.shape)} and boundaries {tuple(boundary_BHW.shape)} must be of one shape; resize the logits"
        )
    logits, target = logits_BHW.float(), boundary_BHW.bool()
    if not logits.isfinite().all():
        raise ValueError("logits hold NaN or infinity; the readout that made them has diverged")
    predicted = logits.sigmoid() > 0.5
    return BoundarySums(
        intersection=int((predicted & target).sum()),
        union=int((predicted | target).sum()),
        bce=float(F.binary_cross_entropy_with_logits(logits, target.float())),
        batches=1,
    )


def merge(parts: Iterable[BoundarySums]) -> BoundarySums:
    """The sums of all parts. The same to the last digit in whatever order batches come, if all are merged at once."""
    parts = list(parts)
    return BoundarySums(
        intersection=sum(part.intersection for part in parts),
        union=sum(part.union for part in parts),
        # fsum rounds once, so that the order doesn't matter.
        bce=math.fsum(part.bce for part in parts),
        batches=sum(part.batches for part in parts),
    )
