"""What readouts are trained with: DeAP's losses and those of ViT-Up's linear probes.

Every loss gives a `LossSum`, (total, weight), and the published loss of a batch is total / weight. Where the published loss is
a mean over pixels (`cross_entropy`, `boundary_loss`, `instance_loss`), total is a sum over pixels and weight their number:
over micro-batches or workers, sum(total) / sum(weight) is exactly the loss of the whole batch. A mean over images of each
one's mean would be another loss wherever images differ in void pixels.

Depth losses can't be split like that: a variance, and its square root, are of all pixels of a batch at once. Their total is the
micro-batch's loss times its images, so that sum(total) / sum(weight) is the images' mean of the micro-batches' losses, and
the published one for a batch taken whole only.

Whatever counts no pixel gives total 0 with gradient 0, and weight 0. Losses are computed in float32 under autocast, too.

Shapes: B images, C channels, H W pixels, N sampled pixels of all images.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from operators.metrics.depth import MAX_DEPTH, MIN_DEPTH
from operators.transfer import to_device
from storage.datasets.classes import VOID

EPS = 0.001
"""Metres, added to depths before their logarithm."""

MEAN_SHARE = 0.15
"""What the squared mean counts beside the variance."""

WARM_UP_CALLS = 100
"""So many calls of ViT-Up's loss, counted from the start of training, are `warm`."""

GRADIENT_WEIGHT = 0.5
"""What the gradient loss counts beside SigLoss in ViT-Up's."""

_STEPS = (1, 2, 4, 6)
"""Scales of the gradient loss: each takes every first, second, fourth or sixth row and column."""

_BYTES_PER_LOGIT = 16
"""Logits, their log-softmax and the gradients of both."""

GradientForm = Literal["released", "spatial"]
"""`released`: differences between images of the batch, as ViT-Up's code has them; `spatial`: between pixels, as probe3d's."""


class LossSum(NamedTuple):
    """A loss before its division."""

    total: Tensor
    "scalar, float32; to be differentiated"
    weight: float
    "what to divide the total by; weights of micro-batches are summed first"

    @property
    def mean(self) -> Tensor:
        """The batch's published loss; 0 where nothing counts."""
        return self.total / self.weight if self.weight else self.total


# --- classes ----------------------------------------------------------------------------------------------------------


def cross_entropy(logits_BCHW: Tensor, labels_BHW: Tensor, void: int = VOID) -> LossSum:
    """Cross-entropy summed over the pixels whose label isn't `void`, and their number.

    Raises `ValueError` where shapes differ, a label is none of the C classes, or `void` is one of them.
    """
    classes = logits_BCHW.shape[1]
    if 0 <= void < classes:
        raise ValueError(f"void {void} is one of the {classes} classes; give another number to void pixels")
    _require_pixels(logits_BCHW, labels_BHW)
    labels = labels_BHW.long()
    counted = labels != void
    _require_labels(labels.where(counted, 0), classes, "label")
    total = F.cross_entropy(logits_BCHW.float(), labels, ignore_index=void, reduction="sum")
    return LossSum(total, float(counted.sum()))


def boundary_loss(logits_B1HW: Tensor, boundary_BHW: Tensor) -> LossSum:
    """Binary cross-entropy summed over pixels, and their number. Raises `ValueError` where shapes differ."""
    _require_pixels(logits_B1HW, boundary_BHW, channels=1)
    target = boundary_BHW.to(torch.float32)
    total = F.binary_cross_entropy_with_logits(logits_B1HW[:, 0].float(), target, reduction="sum")
    return LossSum(total, float(target.numel()))


# --- instances --------------------------------------------------------------------------------------------------------


def instance_loss(
    latents_BCHW: Tensor,
    ids_BHW: Tensor,
    classifier: nn.Linear,
    samples_per_image: int,
    generator: torch.Generator,
    *,
    max_bytes: int = 2**28,
) -> LossSum:
    """Cross-entropy of random pixels of each image against all instances of the data set (0 is background), and their number.

    `classifier` makes a logit for each of, say, 60,000 ids from a latent. Pixels are drawn from `generator` without
    replacement; all are taken where an image has no more. Logits are made again in the backward pass, for as many pixels at
    a time as keep them and what is derived from them below `max_bytes` (or one pixel's, if that is more): gradients are
    exact, and the same for any bound up to rounding. Raises `ValueError` where sizes differ or an id has no logit.
    """
    if samples_per_image < 1:
        raise ValueError(f"samples_per_image must be at least 1, got {samples_per_image}")
    _require_pixels(latents_BCHW, ids_BHW)
    _require_labels(ids_BHW, classifier.out_features, "instance id")
    latents_NC, ids_N = _sampled(latents_BCHW, ids_BHW, samples_per_image, generator)
    step = max(1, max_bytes // (_BYTES_PER_LOGIT * classifier.out_features))
    total = latents_NC.new_zeros((), dtype=torch.float32)
    for part in zip(latents_NC.split(step), ids_N.split(step), strict=True):
        total = total + checkpoint(_instance_sum, classifier, *part, use_reentrant=False, preserve_rng_state=False)
    return LossSum(total, float(len(ids_N)))


def _instance_sum(classifier: nn.Linear, latents_NC: Tensor, ids_N: Tensor) -> Tensor:
    return F.cross_entropy(classifier(latents_NC).float(), ids_N, reduction="sum")


def _sampled(latents: Tensor, ids: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Latents [N, C] and ids int64 [N] of `count` pixels of each image."""
    latents_BCP, ids_BP = latents.flatten(2), ids.flatten(1).long()
    pixels = ids_BP.shape[1]
    if count < pixels:
        drawn = [torch.randperm(pixels, generator=generator, device=generator.device)[:count] for _ in ids_BP]
        index_BP = to_device(torch.stack(drawn), ids_BP.device)
        latents_BCP = latents_BCP.gather(2, index_BP[:, None].expand(-1, latents.shape[1], -1))
        ids_BP = ids_BP.gather(1, index_BP)
    return latents_BCP.transpose(1, 2).flatten(0, 1), ids_BP.flatten()


# --- depth ------------------------------------------------------------------------------------------------------------


def deap_depth_loss(predicted_B1HW: Tensor, depth_BHW: Tensor) -> LossSum:
    """DeAP's: `sig_loss` after warm-up on 0.001 < depth <= 10; per batch, with its images as weight."""
    return sig_loss(predicted_B1HW, depth_BHW, warm=False, above=MIN_DEPTH)


def sig_loss(predicted_B1HW: Tensor, depth_BHW: Tensor, *, warm: bool, above: float = 0.0) -> LossSum:
    """SigLoss: sqrt(var(g) + 0.15 mean(g)^2), g the difference of logarithms, on `above` < depth <= 10; per batch.

    `warm`: without the variance, for the first `WARM_UP_CALLS` calls. The variance is the sample's (n - 1). Negative
    predictions count as 0. A perfect prediction gives 1e-6 and no gradient. Fewer than two pixels count as none.
    Raises `ValueError` where shapes differ.
    """
    _require_pixels(predicted_B1HW, depth_BHW, channels=1)
    valid = _valid(depth_BHW, above)
    ratio = _log_ratio(predicted_B1HW[:, 0][valid], depth_BHW[valid])
    if len(ratio) < 2:
        return LossSum(ratio.sum() * 0, 0.0)
    square = MEAN_SHARE * ratio.mean().square() + (0 if warm else ratio.var())
    # At 0 the root's gradient would be NaN.
    return LossSum(square.clamp(min=1e-12).sqrt() * len(depth_BHW), float(len(depth_BHW)))


def gradient_loss(predicted_B1HW: Tensor, depth_BHW: Tensor, *, form: GradientForm = "released") -> LossSum:
    """Absolute differences of g (see `sig_loss`) two steps apart, over the number of valid pixels, summed over four scales;
    per batch, with its images as weight.

    ViT-Up's `released` code takes differences along the batch: of images i and i + 2, so that a batch below three has none,
    and their order matters. (It takes them along the channels, too, of which there is one.) `spatial` takes rows and
    columns. Raises `ValueError` where shapes differ.
    """
    if form not in ("released", "spatial"):
        raise ValueError(f"the gradient loss has the forms 'released' and 'spatial', not {form!r}")
    _require_pixels(predicted_B1HW, depth_BHW, channels=1)
    valid = _valid(depth_BHW, above=0.0)
    # Where depth is missing its logarithm mustn't be NaN: NaN times 0 is NaN.
    ratio = _log_ratio(predicted_B1HW[:, 0], depth_BHW.where(valid, 1)).where(valid, 0)
    total = ratio.new_zeros(())
    for step in _STEPS:
        of_scale = ratio[:, ::step, ::step], valid[:, ::step, ::step]
        changes = sum(_changes(*of_scale, axis) for axis in ((0,) if form == "released" else (1, 2)))
        total = total + changes / of_scale[1].sum().clamp(min=1)
    images = len(depth_BHW) if valid.any() else 0
    return LossSum(total * images, float(images))


def vit_up_depth_loss(predicted_B1HW: Tensor, depth_BHW: Tensor, *, warm: bool, form: GradientForm = "released") -> LossSum:
    """ViT-Up's: `sig_loss` and half of `gradient_loss`; per batch, with its images as weight."""
    total, weight = sig_loss(predicted_B1HW, depth_BHW, warm=warm)
    return LossSum(total + GRADIENT_WEIGHT * gradient_loss(predicted_B1HW, depth_BHW, form=form).total, weight)


def _valid(depth: Tensor, above: float) -> Tensor:
    return (depth > above) & (depth <= MAX_DEPTH)


def _log_ratio(predicted: Tensor, depth: Tensor) -> Tensor:
    return (predicted.float().relu() + EPS).log() - (depth.float() + EPS).log()


def _changes(ratio: Tensor, valid: Tensor, axis: int) -> Tensor:
    """Sum of absolute differences between places two apart along `axis`, where both are valid."""
    length = ratio.shape[axis]
    count = max(0, length - 2)
    first, second = ratio.narrow(axis, 0, count), ratio.narrow(axis, length - count, count)
    both = valid.narrow(axis, 0, count) & valid.narrow(axis, length - count, count)
    return ((first - second).abs() * both).sum()


# --- checks -----------------------------------------------------------------------------------------------------------


def _require_pixels(predicted: Tensor, target: Tensor, channels: int | None = None) -> None:
    batch, height, width = target.shape if target.ndim == 3 else (None, None, None)
    expected = (batch, channels or predicted.shape[1], height, width)
    if tuple(predicted.shape) != expected:
        raise ValueError(
            f"predictions {tuple(predicted.shape)} must be [B, {channels or 'C'}, H, W] for targets [B, H, W], "
            f"got {tuple(target.shape)}; resize one to the other first"
        )


def _require_labels(labels: Tensor, classes: int, what: str) -> None:
    """On a GPU a label without a class would end the process."""
    for value in torch.stack(labels.aminmax()).tolist():
        if not 0 <= value < classes:
            raise ValueError(f"{what} {value} is none of the {classes} classes 0 to {classes - 1}")
