"""Semantic segmentation: a class for each pixel."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import matplotlib
import numpy as np
from torch import Tensor

from operators.metrics.segmentation import Segmentation, class_pairs, matrix_of, pair_sums, scores_of_sums
from operators.objectives.dense import LossSum, cross_entropy
from operators.readouts import Readout
from pipelines.config import ConfigError
from pipelines.readouts.task import Label, Task, TaskSettings
from storage.datasets.classes import VOID
from storage.datasets.labels import LabelledImage
from storage.datasets.registry import DatasetKind


@dataclass(frozen=True, kw_only=True)
class ClassPairs:
    """Of one image: (label, prediction, how many pixels) where there are any; most pairs of classes never meet."""

    pairs: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, kw_only=True)
class SegmentationTask(Task[ClassPairs]):
    """A class for each pixel; 255 is void."""

    classes: int
    extra_outputs: int = 0
    "that no label has: DeAP's COCO-Stuff readout has 200 for 182"
    background: bool = False
    "whether class 0 is no class: how well all others together are told from it is a score, too"

    name: ClassVar[str] = "segmentation"
    label: ClassVar[Literal["classes"]] = "classes"
    target_names: ClassVar[tuple[str, ...]] = ("classes",)
    record: ClassVar[type[ClassPairs]] = ClassPairs
    empty: ClassVar[str] = "all of it is void"
    better: ClassVar[str] = "miou"
    shares: ClassVar[tuple[str, ...]] = ("miou", "pixel_accuracy", "mean_accuracy", "foreground_iou")

    @classmethod
    def of(cls, settings: TaskSettings, kind: DatasetKind, train: Sequence[LabelledImage]) -> "SegmentationTask":  # noqa: ARG003
        extra = 0 if settings.outputs is None else settings.outputs - kind.classes
        if extra < 0:
            raise ConfigError(f"--outputs {settings.outputs}: {settings.dataset} has {kind.classes} classes")
        return cls(
            placement=settings.placement,
            side=settings.side,
            classes=kind.classes,
            extra_outputs=extra,
            background=kind.names[:1] == ("background",),
        )

    @property
    def outputs(self) -> int:
        return self.classes + self.extra_outputs

    def targets(self, label: np.ndarray, item: int) -> dict[str, np.ndarray]:  # noqa: ARG002
        return {"classes": self.placed(label)}

    def loss(self, net: Readout, outputs_BCHW: Tensor, targets: Mapping[str, Tensor], step: int) -> LossSum:  # noqa: ARG002
        return cross_entropy(outputs_BCHW, targets["classes"])

    def judge(self, output_CHW: Tensor, targets: Mapping[str, Tensor], label: Label | None) -> ClassPairs:  # noqa: ARG002
        found = class_pairs(output_CHW.argmax(0), targets["classes"], self.outputs)
        return ClassPairs(pairs=tuple(map(tuple, found.tolist())))

    def is_empty(self, record: ClassPairs) -> bool:
        return not record.pairs

    def scores(self, records: Sequence[ClassPairs]) -> dict[str, float]:
        matrix = matrix_of((pair for record in records for pair in record.pairs), self.outputs)
        found = Segmentation.of(matrix)
        values = {"miou": found.mean_iou, "pixel_accuracy": found.pixel_accuracy, "mean_accuracy": found.mean_accuracy}
        if self.background and (union := matrix.sum() - matrix[0, 0]):
            values["foreground_iou"] = float(matrix[1:, 1:].sum() / union)
        return values

    def sums(self, records: Sequence[ClassPairs]) -> np.ndarray:
        return pair_sums([record.pairs for record in records], self.outputs)

    def of_sums(self, sums_Bk: np.ndarray) -> dict[str, np.ndarray]:
        return scores_of_sums(sums_Bk)

    def pictures(self, output_CHW: Tensor, targets: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
        return class_colours(output_CHW.argmax(0).cpu().numpy()), class_colours(targets["classes"].cpu().numpy())

    def legend(self, pictures: Sequence[np.ndarray], names: Sequence[str]) -> list[tuple[str, tuple[int, int, int]]]:
        # As one number for a colour: unique rows take far longer.
        packed = (np.unique(each @ np.array([1 << 16, 1 << 8, 1])) for each in pictures)
        drawn = {(number >> 16, number >> 8 & 255, number & 255) for each in packed for number in each.tolist()}
        words = {number: names[number] if number < len(names) else f"class {number}" for number in range(self.outputs)}
        meanings: dict[tuple[int, int, int], list[str]] = {}  # of more than some fifty classes, two may have one colour
        for number, word in {**words, VOID: "void"}.items():
            red, green, blue = class_colours(np.array(number)).tolist()
            meanings.setdefault((red, green, blue), []).append(word)
        return [(" or ".join(each), colour) for colour, each in meanings.items() if colour in drawn]


def class_colours(classes_HW: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3]; 0 is black, void white, neighbouring numbers get different colours."""
    return _colours()[np.asarray(classes_HW, np.uint8)]


@functools.cache
def _colours() -> np.ndarray:
    numbers = np.arange(256)
    hues = (numbers * 0.618034) % 1.0  # the golden ratio spreads any first few evenly
    table = (matplotlib.colormaps["hsv"](hues)[:, :3] * (0.6 + 0.4 * (numbers % 2))[:, None] * 255).astype(np.uint8)
    table[0], table[VOID] = 0, 255
    return table
