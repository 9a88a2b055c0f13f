"""Training losses of the proposal network, of Mask R-CNN's and Cascade R-CNN's boxes, and of masks.

They are the published ones: L1 distances without a smooth part; the proposal network's sums are divided by 256 for each image,
however many anchors were sampled, the boxes' by the number of sampled proposals, and the masks' loss is the mean over pixels.
"Of a batch" is of one forward, as upstream it is of one GPU's images.

What is sampled is drawn from a generator of each image's own, so that it depends neither on the other images nor on the device.

Shapes: G objects of an image, A anchors of all levels, R proposals, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from operators.vitdet.boxes import PROPOSAL_CODER, STAGE_CODERS, clipped, decoded, matched, nonempty
from operators.vitdet.detector import Detector
from operators.vitdet.heads import BOX_SIDE, MASK_SIDE, STAGE_IOUS, Heads
from operators.vitdet.masks import ObjectMasks
from operators.vitdet.proposals import Predicted
from operators.vitdet.settings import Size

PROPOSAL_IOUS = (0.3, 0.7)
"""Anchors are background below the first overlap, and objects from the second on."""

_ANCHORS, _PROPOSALS = 1, 2
"""What is drawn for an image."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How many of what is labelled a loss is of."""

    anchors: int = 256
    "of an image; what the proposal network's losses are divided by"
    positive_anchors: float = 0.5
    "the largest part that are objects"
    proposals: int = 512
    "of an image"
    positive_proposals: float = 0.25

    def generator(self, seed: Sequence[int], purpose: int) -> np.random.Generator:
        """Of one image."""
        return np.random.default_rng(np.random.SeedSequence(list(seed), spawn_key=(purpose,)))


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The annotated objects of an image; none are background alone."""

    boxes_G4: Tensor
    "float32, in pixels of the frame of the heads, on the device"
    classes_G: Tensor
    "int64, from 0"
    masks: ObjectMasks
    "in pixels of the padded image"
    seed: tuple[int, ...] = (0,)
    "whole numbers of at least 0 that what is sampled is drawn from, for example (seed, step, row)"


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Boxes of an image held against its objects."""

    boxes_R4: Tensor
    classes_R: Tensor
    "int64, K for background"
    objects_R: Tensor
    "int64, the object of the largest overlap; 0 for background"

    def taken(self, which: Tensor) -> "Labelled":
        return Labelled(boxes_R4=self.boxes_R4[which], classes_R=self.classes_R[which], objects_R=self.objects_R[which])


def sampled(
    positive_N: Tensor, negative_N: Tensor, count: int, largest_part: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Numbers of at most `count` of N, those that are positive, of which there are at most so large a part, and others."""
    positives, negatives = (each.nonzero()[:, 0] for each in (positive_N, negative_N))
    n_positive = min(len(positives), int(count * largest_part))
    n_negative = min(len(negatives), count - n_positive)
    first, second = (
        torch.from_numpy(rng.permutation(len(each))[:wanted]).to(each.device)
        for each, wanted in ((positives, n_positive), (negatives, n_negative))
    )
    return positives[first], negatives[second]


# --- the proposal network ---------------------------------------------------------------------------------------------


def proposal_losses(predicted: Predicted, truths: Sequence[Truth], sampling: Sampling) -> dict[str, Tensor]:
    """Cross-entropy of being an object, and L1 of the deltas of those that are: sums, divided by the anchors that an image has
    to be sampled."""
    anchors_A4 = torch.cat(predicted.anchors)
    logits_BA, deltas_BA4 = torch.cat(predicted.logits, dim=1), torch.cat(predicted.deltas, dim=1)
    entropy, distance = logits_BA.sum() * 0, deltas_BA4.sum() * 0
    for logits_A, deltas_A4, truth in zip(logits_BA, deltas_BA4, truths, strict=True):
        match = matched(box_iou(truth.boxes_G4, anchors_A4), *PROPOSAL_IOUS, best_for_each=True)
        rng = sampling.generator(truth.seed, _ANCHORS)
        positive, negative = sampled(match.labels_N == 1, match.labels_N == 0, sampling.anchors, sampling.positive_anchors, rng)
        logits = torch.cat([logits_A[positive], logits_A[negative]])
        is_object = (torch.arange(len(logits), device=logits.device) < len(positive)).to(logits.dtype)
        entropy = entropy + F.binary_cross_entropy_with_logits(logits, is_object, reduction="sum")
        if len(positive):
            wanted = PROPOSAL_CODER.encode_single(truth.boxes_G4[match.indices_N[positive]], anchors_A4[positive])
            distance = distance + (deltas_A4[positive] - wanted).abs().sum()
    divisor = sampling.anchors * len(truths)
    return {"loss_rpn_cls": entropy / divisor, "loss_rpn_loc": distance / divisor}


# --- boxes ------------------------------------------------------------------------------------------------------------


def labelled(boxes_R4: Tensor, truth: Truth, iou: float, classes: int) -> Labelled:
    """Boxes as the objects that they overlap with by `iou` or more, or as background."""
    match = matched(box_iou(truth.boxes_G4, boxes_R4), iou, iou)
    if not len(truth.classes_G):
        return Labelled(boxes_R4=boxes_R4, classes_R=torch.full_like(match.indices_N, classes), objects_R=match.indices_N)
    found = torch.where(match.labels_N == 1, truth.classes_G[match.indices_N], classes)
    return Labelled(boxes_R4=boxes_R4, classes_R=found, objects_R=match.indices_N)


def sampled_proposals(proposals_R4: Tensor, truth: Truth, classes: int, sampling: Sampling) -> Labelled:
    """Those of an image that its losses are of, objects first; the annotated boxes are among the proposals."""
    found = labelled(torch.cat([proposals_R4, truth.boxes_G4]), truth, STAGE_IOUS[0], classes)
    is_object = found.classes_R < classes
    rng = sampling.generator(truth.seed, _PROPOSALS)
    both = sampled(is_object, ~is_object, sampling.proposals, sampling.positive_proposals, rng)
    return found.taken(torch.cat(both))


def box_losses(
    logits_RK1: Tensor, deltas_RD: Tensor, samples: Sequence[Labelled], truths: Sequence[Truth], coder: Any
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the classes, and L1 of the deltas of objects, divided by the number of all boxes.

    Deltas [R, 4], or [R, 4 K] of which those of the true class count.
    """
    classes_R = torch.cat([each.classes_R for each in samples])
    if not len(classes_R):
        return logits_RK1.sum() * 0, deltas_RD.sum() * 0
    entropy = F.cross_entropy(logits_RK1, classes_R)
    classes = logits_RK1.shape[1] - 1
    is_object = (classes_R < classes).nonzero()[:, 0]
    boxes = torch.cat([each.boxes_R4 for each in samples])[is_object]
    true_boxes = torch.cat([_objects(each, truth) for each, truth in zip(samples, truths, strict=True)])[is_object]
    deltas_R_4 = deltas_RD.unflatten(1, (-1, 4))[is_object]
    which = classes_R[is_object] if deltas_R_4.shape[1] > 1 else torch.zeros_like(is_object)
    deltas = deltas_R_4[torch.arange(len(which), device=which.device), which]
    distance = (deltas - coder.encode_single(true_boxes, boxes)).abs().sum()
    return entropy, distance / len(classes_R)


def _objects(sample: Labelled, truth: Truth) -> Tensor:
    """The box of the object of each sampled one; zeros where there are no objects."""
    return truth.boxes_G4[sample.objects_R] if len(truth.boxes_G4) else torch.zeros_like(sample.boxes_R4)


class _ScaledGradient(torch.autograd.Function):
    """The values as they are, their gradient times a number."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None


def stage_losses(
    heads: Heads, levels: Sequence[Tensor], samples: Sequence[Labelled], truths: Sequence[Truth], sizes: Sequence[Size]
) -> dict[str, Tensor]:
    """Of Mask R-CNN's stage, or of Cascade R-CNN's three, each of which takes the boxes that the one before has made of its own.

    These are labelled anew, and all of them count. A pooled map's gradient is divided by the number of stages.
    """
    losses: dict[str, Tensor] = {}
    boxes = [each.boxes_R4 for each in samples]
    for number in range(heads.stages):
        if number:
            cut = [clipped(each, size) for each, size in zip(boxes, sizes, strict=True)]
            boxes = [each[nonempty(each)] for each in cut]
            iou, classes = STAGE_IOUS[number], heads.settings.classes
            samples = [labelled(each, truth, iou, classes) for each, truth in zip(boxes, truths, strict=True)]
        pooled = heads.pooled(levels, boxes, BOX_SIDE)
        if heads.stages > 1:
            pooled = _ScaledGradient.apply(pooled, 1 / heads.stages)
        logits, deltas = heads.stage(number, pooled)
        entropy, distance = box_losses(logits, deltas, samples, truths, STAGE_CODERS[number])
        suffix = f"_stage{number}" if heads.stages > 1 else ""
        losses |= {f"loss_cls{suffix}": entropy, f"loss_box_reg{suffix}": distance}
        if number + 1 < heads.stages:
            made = decoded(STAGE_CODERS[number], deltas.detach(), torch.cat(boxes))
            boxes = list(made.split([len(each) for each in boxes]))
    return losses


# --- masks ------------------------------------------------------------------------------------------------------------


def mask_loss(
    heads: Heads, levels: Sequence[Tensor], samples: Sequence[Labelled], truths: Sequence[Truth], scale: float
) -> Tensor:
    """Mean cross-entropy of the pixels of the true class' mask, over the sampled boxes of objects; 0 where there are none.

    The heads' frame has `scale` times the image's pixels a side.
    """
    objects = [each.taken(each.classes_R < heads.settings.classes) for each in samples]
    logits_RKSS = heads.mask_head(heads.pooled(levels, [each.boxes_R4 for each in objects], MASK_SIDE))
    if not len(logits_RKSS):
        return logits_RKSS.sum() * 0
    classes_R = torch.cat([each.classes_R for each in objects])
    logits_RSS = logits_RKSS[torch.arange(len(classes_R), device=classes_R.device), classes_R]
    side = logits_RSS.shape[-1]
    targets = [
        truth.masks.targets(each.objects_R.cpu().numpy(), (each.boxes_R4 / scale).cpu().numpy(), side)
        for each, truth in zip(objects, truths, strict=True)
    ]
    return F.binary_cross_entropy_with_logits(logits_RSS, torch.cat(targets).to(logits_RSS))


# --- all of them ------------------------------------------------------------------------------------------------------


def detector_losses(
    detector: Detector, levels: Sequence[Tensor], sizes: Sequence[Size], truths: Sequence[Truth], sampling: Sampling = Sampling()
) -> dict[str, Tensor]:
    """Every loss of images whose pyramid is given, each of weight 1, by its published name; `sizes` are (height, width) of the
    images without their padding. Raises `DetectorError` where proposals aren't finite."""
    frame_sizes = detector.in_frame(sizes)
    predicted = detector.predict(levels)
    losses = proposal_losses(predicted, truths, sampling)
    found = detector.proposal_generator.proposals(predicted, frame_sizes, training=True)
    heads, classes = detector.roi_heads, detector.settings.classes
    samples = [sampled_proposals(each.boxes_N4, truth, classes, sampling) for each, truth in zip(found, truths, strict=True)]
    losses |= stage_losses(heads, levels, samples, truths, frame_sizes)
    scale = frame_sizes[0][0] / sizes[0][0]
    return {**losses, "loss_mask": mask_loss(heads, levels, samples, truths, scale)}
