"""What is said of each proposal: its class, a better box, a mask; by Mask R-CNN's one stage or Cascade R-CNN's three.

Shapes: R proposals of all images, K classes, C channels.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators.vitdet.boxes import STAGE_CODERS, Selected, clipped, decoded, pooled, select
from operators.vitdet.layers import NormedConv, kaiming_, normal_
from operators.vitdet.settings import DetectorSettings, Size

BOX_SIDE = 7
"""Cells a side that boxes are pooled to."""

MASK_SIDE = 14
"""Cells a side that masks are pooled to; they are drawn with twice as many."""

STAGE_IOUS = (0.5, 0.6, 0.7)
"""By stage: from which overlap on a box is an object in training."""

CONVS = 4
"""3x3 convolutions of a head."""


class BoxHead(nn.Module):
    """Pooled features [R, C, 7, 7] to vectors [R, fc]."""

    def __init__(self, channels: int, fc: int):
        super().__init__()
        for i in range(1, CONVS + 1):
            self.add_module(f"conv{i}", NormedConv(channels, channels, 3, active=True))
        self.fc1 = nn.Linear(channels * BOX_SIDE**2, fc)
        for name, layer in self.named_children():
            if name != "fc1":
                kaiming_(cast(NormedConv, layer))
        nn.init.kaiming_uniform_(self.fc1.weight, a=1)
        nn.init.zeros_(self.fc1.bias)

    def forward(self, pooled_RCSS: Tensor) -> Tensor:
        for i in range(1, CONVS + 1):
            pooled_RCSS = self.get_submodule(f"conv{i}")(pooled_RCSS)
        return F.relu(self.fc1(pooled_RCSS.flatten(1)))


class BoxPredictor(nn.Module):
    """Vectors to logits [R, K + 1], background last, and deltas [R, 4 K], or [R, 4] where they don't depend on the class."""

    def __init__(self, fc: int, classes: int, *, by_class: bool):
        super().__init__()
        self.cls_score = nn.Linear(fc, classes + 1)
        self.bbox_pred = nn.Linear(fc, 4 * classes if by_class else 4)
        normal_(self.cls_score, 0.01)
        normal_(self.bbox_pred, 0.001)

    def forward(self, vectors_RD: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(vectors_RD).float(), self.bbox_pred(vectors_RD).float()


class MaskHead(nn.Module):
    """Pooled features [R, C, 14, 14] to logits [R, K, 28, 28]."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        for i in range(1, CONVS + 1):
            self.add_module(f"mask_fcn{i}", NormedConv(channels, channels, 3, active=True))
        self.deconv = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        for layer in self.children():
            kaiming_(cast(NormedConv, layer))
        self.predictor = nn.Conv2d(channels, classes, 1)
        normal_(self.predictor, 0.001)

    def forward(self, pooled_RCSS: Tensor) -> Tensor:
        for i in range(1, CONVS + 1):
            pooled_RCSS = self.get_submodule(f"mask_fcn{i}")(pooled_RCSS)
        return cast(Tensor, self.predictor(F.relu(self.deconv(pooled_RCSS)))).float()


class Found(NamedTuple):
    """Detections of one image in the frame of the pyramid, best first, as `Selected`, with masks' probabilities."""

    boxes_N4: Tensor
    scores_N: Tensor
    classes_N: Tensor
    masks_NSS: Tensor
    "float32 [N, 28, 28], over the box"


class Heads(nn.Module):
    """Box heads and predictors, of each stage, and the mask head.

    With Cascade R-CNN a stage takes the boxes that the one before has made of its own, and classes are the stages' mean.
    """

    def __init__(self, settings: DetectorSettings):
        super().__init__()
        s = self.settings = settings
        heads = [BoxHead(s.channels, s.fc) for _ in range(self.stages)]
        predictors = [BoxPredictor(s.fc, s.classes, by_class=not s.cascade) for _ in range(self.stages)]
        self.box_head = nn.ModuleList(heads) if s.cascade else heads[0]
        self.box_predictor = nn.ModuleList(predictors) if s.cascade else predictors[0]
        self.mask_head = MaskHead(s.channels, s.classes)

    @property
    def stages(self) -> int:
        return len(STAGE_CODERS) if self.settings.cascade else 1

    def pooled(self, levels: Sequence[Tensor], boxes: Sequence[Tensor], side: int = BOX_SIDE) -> Tensor:
        """Of each image's boxes, [R, C, side, side]; `MASK_SIDE` for masks."""
        return pooled(levels, boxes, side, self.settings.canonical_size)

    def stage(self, number: int, pooled_RCSS: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [R, K + 1], background last, and deltas by `STAGE_CODERS[number]`, [R, 4 K] or [R, 4]; float32."""
        head, predictor = (
            each[number] if isinstance(each, nn.ModuleList) else each for each in (self.box_head, self.box_predictor)
        )
        return cast(tuple[Tensor, Tensor], predictor(head(pooled_RCSS)))

    def classified(self, levels: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[Size]) -> list[Selected]:
        """Detections of each image, whose size is given without padding, from its proposals [N, 4]; masks are still lacking."""
        counts, boxes, scores = [len(each) for each in proposals], list(proposals), []
        for number, coder in enumerate(STAGE_CODERS[: self.stages]):
            if number:
                boxes = [clipped(each, size) for each, size in zip(boxes, sizes, strict=True)]
            logits, deltas = self.stage(number, self.pooled(levels, boxes))
            scores.append(logits.softmax(dim=-1))
            boxes = list(decoded(coder, deltas, torch.cat(boxes)).split(counts))
        mean = torch.stack(scores).mean(dim=0) if len(scores) > 1 else scores[0]
        return [select(*each, self.settings) for each in zip(boxes, mean.split(counts), sizes, strict=True)]

    def masked(self, levels: Sequence[Tensor], selected: Sequence[Selected]) -> list[Found]:
        """The detections with their masks' probabilities."""
        logits = self.mask_head(self.pooled(levels, [each.boxes_N4 for each in selected], MASK_SIDE))
        classes = torch.cat([each.classes_N for each in selected])
        masks = logits[torch.arange(len(logits), device=logits.device), classes].sigmoid()
        parts = masks.split([len(each.boxes_N4) for each in selected])
        return [Found(*each[:3], part) for each, part in zip(selected, parts, strict=True)]

    def forward(self, levels: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[Size]) -> list[Found]:
        return self.masked(levels, self.classified(levels, proposals, sizes))
