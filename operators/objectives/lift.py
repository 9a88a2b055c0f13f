"""Losses between feature maps, and LiFT's multi-scale self-supervision (arXiv 2403.14625, eq. 1)."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def cosine_loss(predicted_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """1 - cosine, averaged over cells: `CosineEmbeddingLoss` with target +1, whose eps enters the squared norms."""
    dot = (predicted_BCHW * target_BCHW).sum(dim=1)
    norms = (predicted_BCHW.square().sum(dim=1) + 1e-12) * (target_BCHW.square().sum(dim=1) + 1e-12)
    return (1 - dot / norms.sqrt()).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": cosine_loss, "l1": F.l1_loss, "l2": F.mse_loss}
"""Between maps of one shape [B, C, H, W]; the last two are means over all elements, channels included."""


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
) -> Tensor:
    """LiFT's eq. 1: the x2 network's output from the half and the quarter image against the backbone's own, summed.

    `features` are the backbone's maps F1, F2, F4 [B, C, ., .] of the images and of `smaller(images, 2)` and `smaller(images, 4)`.
    Two calls of the network, half scale first: in train mode each has batch statistics of its own and updates the running
    ones. Raises `ValueError` where a map isn't twice the next one.
    """
    full, half, quarter = features
    losses = []
    for factor, given, target in ((2, half, full), (4, quarter, half)):
        predicted = net(smaller(images_BCHW, factor), given)
        if predicted.shape != target.shape:
            raise ValueError(
                f"predicted {tuple(predicted.shape)} and target {tuple(target.shape)} must be of one shape"
            )
        losses.append(LOSSES[kind](predicted, target))
    return losses[0] + losses[1]
