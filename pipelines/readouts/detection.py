"""Detection of objects without classes, as DeAP does it by CenterNet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from operators.metrics.detection import ClassScores, class_agnostic_scores
from operators.objectives.dense import LossSum
from operators.readouts import Readout
from operators.readouts.centernet import centernet_boxes, centernet_loss, centernet_targets
from operators.visual import heat
from pipelines.readouts.instances import ObjectsTask
from pipelines.readouts.task import Scored
from storage.datasets.instances import InstanceArrays

SCORES = ("ap_large", "ap", "ap_50", "ar_100")
"""Of COCO's numbers, the main one first."""


@dataclass(frozen=True, kw_only=True)
class FoundBoxes:
    """Of one image: boxes x1, y1, x2, y2 in pixels of the square, with their scores, and the annotated ones."""

    boxes: tuple[tuple[float, ...], ...]
    scores: tuple[float, ...]
    truth: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class DetectionTask(ObjectsTask[FoundBoxes]):
    """Centres and sizes of objects of no class: DeAP's CenterNet."""

    name: ClassVar[str] = "detection"
    split: ClassVar[tuple[int, ...]] = (1, 2)
    judges_label: ClassVar[bool] = True
    target_names: ClassVar[tuple[str, ...]] = ("heat", "sizes")
    record: ClassVar[type[FoundBoxes]] = FoundBoxes
    better: ClassVar[str] = "ap_large"

    @property
    def outputs(self) -> int:
        return 3

    def targets(self, label: InstanceArrays, item: int) -> dict[str, np.ndarray]:  # noqa: ARG002
        found = centernet_targets(torch.from_numpy(self.ids(label)))
        return {"heat": found.heat_HW.numpy(), "sizes": found.sizes_2HW.numpy()}

    def loss(self, net: Readout, outputs_BCHW: Tensor, targets: Mapping[str, Tensor], step: int) -> LossSum:  # noqa: ARG002
        """The two terms' means, counted by pixels: a micro-batch's own mean, as where a batch is taken whole."""
        found = centernet_loss(outputs_BCHW[:, :1], outputs_BCHW[:, 1:], targets["heat"], targets["sizes"])
        return LossSum(found.mean * found.heat.weight, found.heat.weight)

    def judge(self, output_CHW: Tensor, targets: Mapping[str, Tensor], label: InstanceArrays | None) -> FoundBoxes:  # noqa: ARG002
        (found,) = centernet_boxes(output_CHW[None, :1], output_CHW[None, 1:])
        return FoundBoxes(
            boxes=_tuples(found.boxes_N4.cpu().numpy().round(3)),
            scores=tuple(found.scores_N.cpu().numpy().astype(float).round(7).tolist()),
            truth=_tuples(self.boxes(label).round(3)),
        )

    def boxes(self, label: InstanceArrays) -> np.ndarray:
        """The annotated boxes in pixels of the square, cut off at its sides; those outside are left out. Float64 [N, 4]."""
        height, width = label.masks.shape[1:]
        place = self.geometry().place(width, height)
        scale = np.array([place.x_scale, place.y_scale] * 2)
        boxes = label.boxes.astype(np.float64) * scale + np.array([place.x_offset, place.y_offset] * 2)
        boxes = boxes.clip(0, self.side)
        return boxes[(boxes[:, 2:] > boxes[:, :2]).all(axis=1)]

    def scores(self, records: Sequence[FoundBoxes]) -> dict[str, float]:
        return _numbers(self._compared(records))

    def scored(self, records: Sequence[FoundBoxes]) -> Scored:
        compared = self._compared(records)  # once: matching takes the most of it
        return Scored(scores=_numbers(compared), names=SCORES, drawn=compared.drawn(SCORES))

    def _compared(self, records: Sequence[FoundBoxes]) -> ClassScores:
        """With boxes of 448 px: `large` is above 96^2 px there, whatever the side."""
        scale = 448 / self.side
        truth = [scale * _boxes(record.truth) for record in records]
        boxes = [scale * _boxes(record.boxes) for record in records]
        return class_agnostic_scores(truth, boxes, [record.scores for record in records])

    def pictures(self, output_CHW: Tensor, targets: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
        return heat(output_CHW[0].sigmoid().cpu().numpy(), 0, 1), heat(targets["heat"].cpu().numpy(), 0, 1)


def _numbers(found: ClassScores) -> dict[str, float]:
    return {name: getattr(found.total, name) for name in SCORES}


def _tuples(boxes_N4: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, boxes_N4.tolist()))


def _boxes(boxes: Sequence[Sequence[float]]) -> np.ndarray:
    """Float64 [N, 4], also of none."""
    return np.array(boxes, np.float64).reshape(-1, 4)
