"""The region proposal network: one head for all levels of the pyramid, and the choice of an image's proposals.

Shapes: B images, A anchors of a cell, h w cells of a level, N anchors of all levels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from operators.vitdet.boxes import PROPOSAL_CODER, clipped, decoded, level_anchors, nonempty
from operators.vitdet.layers import normal_
from operators.vitdet.settings import DetectorError, DetectorSettings, Size


class Predicted(NamedTuple):
    """What the network says of all anchors, by level, each in the order of `boxes.anchors`; float32."""

    anchors: list[Tensor]
    "of each level, [h w A, 4]"
    logits: list[Tensor]
    "of being an object, [B, h w A]"
    deltas: list[Tensor]
    "by `PROPOSAL_CODER`, [B, h w A, 4]"


class Proposals(NamedTuple):
    """Of one image, best first."""

    boxes_N4: Tensor
    logits_N: Tensor


class ProposalHead(nn.Module):
    """Two 3x3 convolutions with ReLU, then logits [B, A, h, w] and deltas [B, 4 A, h, w]."""

    def __init__(self, channels: int, anchors: int):
        super().__init__()
        self.conv = nn.Sequential()
        for i in range(2):
            self.conv.add_module(f"conv{i}", nn.Conv2d(channels, channels, 3, padding=1))
        self.objectness_logits = nn.Conv2d(channels, anchors, 1)
        self.anchor_deltas = nn.Conv2d(channels, 4 * anchors, 1)
        for layer in (*self.conv, self.objectness_logits, self.anchor_deltas):
            normal_(layer, 0.01)

    def forward(self, level_BChw: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.conv:
            level_BChw = F.relu(layer(level_BChw), inplace=True)
        return self.objectness_logits(level_BChw), self.anchor_deltas(level_BChw)


class ProposalNetwork(nn.Module):
    """The pyramid's levels, p2 to p6, to what is said of their anchors; `proposals` chooses among these."""

    def __init__(self, settings: DetectorSettings):
        super().__init__()
        self.settings = settings
        self.rpn_head = ProposalHead(settings.channels, settings.anchors_per_cell)

    def forward(self, levels: Sequence[Tensor]) -> Predicted:
        maps = [self.rpn_head(level) for level in levels]
        return Predicted(
            anchors=level_anchors(self.settings, levels),
            logits=[logits.permute(0, 2, 3, 1).flatten(1).float() for logits, _ in maps],
            deltas=[deltas.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)).float() for _, deltas in maps],
        )

    @torch.no_grad()
    def proposals(self, predicted: Predicted, sizes: Sequence[Size], *, training: bool = False) -> list[Proposals]:
        """The best of each image, whose size is given without padding, by the numbers for training or for inference.

        Where a logit or a box is NaN or infinite, inference leaves it out, and training raises `DetectorError`.
        """
        s = self.settings
        before, after = (topk[0 if training else 1] for topk in (s.pre_topk, s.post_topk))
        boxes, logits, numbers = [], [], []
        for i, (anchors, level_logits, deltas) in enumerate(zip(*predicted, strict=True)):
            top, places = level_logits.topk(min(before, level_logits.shape[1]), dim=1)
            chosen = deltas.gather(1, places[..., None].expand(-1, -1, 4))
            boxes.append(decoded(PROPOSAL_CODER, chosen.flatten(0, 1), anchors[places].flatten(0, 1)).unflatten(0, places.shape))
            logits.append(top)
            numbers.append(torch.full_like(places[0], i))
        all_boxes, all_logits, all_numbers = torch.cat(boxes, dim=1), torch.cat(logits, dim=1), torch.cat(numbers)
        return [
            _kept(boxes_N4, logits_N, all_numbers, size, s.proposal_nms, after, training=training)
            for boxes_N4, logits_N, size in zip(all_boxes, all_logits, sizes, strict=True)
        ]


def _kept(
    boxes_N4: Tensor, logits_N: Tensor, levels_N: Tensor, size: Size, overlap: float, count: int, *, training: bool
) -> Proposals:
    """The `count` best that NMS by level leaves of an image's boxes."""
    finite = boxes_N4.isfinite().all(dim=1) & logits_N.isfinite()
    if training and not finite.all():
        raise DetectorError("proposals are NaN or infinite: training has diverged; lower the learning rate")
    boxes_N4 = clipped(boxes_N4, size)
    taken = finite & nonempty(boxes_N4)
    boxes, logits, levels = boxes_N4[taken], logits_N[taken], levels_N[taken]
    kept = batched_nms(boxes, logits, levels, overlap)[:count]
    return Proposals(boxes[kept], logits[kept])
