"""Losses between feature maps, and LiFT's multi-scale self-supervision (arXiv 2403.14625, eq. 1)."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators.objectives.shown import Shown, loss_of
from operators.objectives.vit_up import relational_kl


def cosine_loss(predicted_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """1 - cosine, averaged over cells: `CosineEmbeddingLoss` with target +1, whose eps enters the squared norms."""
    dot = (predicted_BCHW * target_BCHW).sum(dim=1)
    norms = (predicted_BCHW.square().sum(dim=1) + 1e-12) * (target_BCHW.square().sum(dim=1) + 1e-12)
    return (1 - dot / norms.sqrt()).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": cosine_loss, "l1": F.l1_loss, "l2": F.mse_loss}
"""Between maps of one shape [B, C, H, W]; the last two are means over all elements, channels included."""


@dataclass(frozen=True, kw_only=True)
class Relations:
    """A further loss, which the paper hasn't: ViT-Up's, between what cells are like, each seeing itself, too.

    A distance to the larger image's map is mostly one to what all cells share; which cells are alike says the rest. A cell's
    own 1 among its cosines says how unlike the others are, where softmax would forget what they have in common.
    """

    weight: float
    tau: float
    "what cosines are divided by: the smaller, the more the nearest cells count"
    images: int = 1
    "whose cells see each other: features are compared between images, too"
    cells: int | None = None
    "so many of such a group, at places that stay the same; all if None"

    def loss(self, predicted_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        """`relational_kl` of the maps' cells [B, C, h, w], times its weight; the mean over groups of images."""
        total = predicted_BCHW.new_zeros(())
        pairs = zip(predicted_BCHW.split(self.images), target_BCHW.split(self.images), strict=True)
        for pair in pairs:
            predicted, target = (self._chosen(each.permute(0, 2, 3, 1).flatten(0, 2))[None] for each in pair)
            total = total + len(pair[0]) * relational_kl(predicted, target, self.tau, itself=True)
        return self.weight * total / len(predicted_BCHW)

    def _chosen(self, cells_sC: Tensor) -> Tensor:
        if self.cells is None or len(cells_sC) <= self.cells:
            return cells_sC
        # The same at each step: the network treats all places alike, and a step that is done again sees what it saw before.
        order = torch.randperm(len(cells_sC), generator=torch.Generator().manual_seed(len(cells_sC)))
        return cells_sC[order[: self.cells].to(cells_sC.device)]


def lower(images_BCHW: Tensor, factor: int) -> Tensor:
    """Every `factor`-th pixel from the top left, a view: LiFT's low-resolution images, aliased as its code has them."""
    return images_BCHW[..., ::factor, ::factor]


def averaged(images_BCHW: Tensor, factor: int) -> Tensor:
    """Means over `factor` x `factor` pixels: low-resolution images without aliasing, as LiFT's text ("resized") may mean."""
    return images_BCHW if factor == 1 else F.avg_pool2d(images_BCHW, factor)


def multi_scale_loss(
    net: nn.Module,
    images_BCHW: Tensor,
    features: Sequence[Tensor],
    kind: str = "cosine",
    smaller: Callable[[Tensor, int], Tensor] = lower,
    shown: Shown | None = None,
    relations: Relations | None = None,
) -> Tensor:
    """LiFT's eq. 1: the x2 network's output from the half and the quarter image against the backbone's own, summed.

    `features` are the backbone's maps F1, F2, F4 [B, C, ., .] of the images and of `smaller(images, 2)` and `smaller(images, 4)`;
    without the last, its part of the loss is left out. Two calls of the network, half scale first: in train mode each has batch
    statistics of its own and updates the running ones. Cells that hold nothing of what is `shown` aren't judged. `relations` are
    added at each scale. Raises `ValueError` where a map isn't twice the next one.
    """
    total = images_BCHW.new_zeros(())
    for number, (target, given) in enumerate(itertools.pairwise(features), 1):
        predicted = net(smaller(images_BCHW, 2**number), given)
        if predicted.shape != target.shape:
            raise ValueError(f"predicted {tuple(predicted.shape)} and target {tuple(target.shape)} must be of one shape")
        total = total + loss_of(LOSSES[kind], predicted, target, shown)
        if relations is not None:
            total = total + loss_of(relations.loss, predicted, target, shown)
    return total
