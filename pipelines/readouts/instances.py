"""Tasks on objects: their outlines, and telling them apart (DeAP)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from operators.metrics.boundaries import BoundarySums, boundary_sums, merge
from operators.metrics.instances import cluster_pixels, foreground_pixels, instance_ari
from operators.objectives.dense import LossSum, boundary_loss, instance_loss
from operators.objectives.targets import boundary_target, instance_ids
from operators.readouts import Readout
from operators.visual import heat
from pipelines.config import ConfigError
from pipelines.readouts.segmentation import class_colours
from pipelines.readouts.task import Label, Record, Task, TaskSettings
from storage.datasets.instances import InstanceArrays
from storage.datasets.labels import LabelledImage
from storage.datasets.registry import DatasetKind
from storage.documents import JsonValue


class ObjectsTask(Task[Record]):
    """What tasks on instances share."""

    label: ClassVar[Literal["instances"]] = "instances"

    def ids(self, label: InstanceArrays) -> np.ndarray:
        """Int32 [side, side]: 0 for background, n + 1 for annotation n."""
        return self.placed(instance_ids(label.masks))


@dataclass(frozen=True, kw_only=True)
class BoundaryTask(ObjectsTask[BoundarySums]):
    """Whether a pixel lies on the outline of an object."""

    name: ClassVar[str] = "boundaries"
    target_names: ClassVar[tuple[str, ...]] = ("boundary",)
    record: ClassVar[type[BoundarySums]] = BoundarySums
    better: ClassVar[str] = "iou"
    shares: ClassVar[tuple[str, ...]] = ("iou",)

    @property
    def outputs(self) -> int:
        return 1

    def targets(self, label: InstanceArrays, item: int) -> dict[str, np.ndarray]:  # noqa: ARG002
        return {"boundary": boundary_target(self.ids(label))}

    def loss(self, net: Readout, outputs_BCHW: Tensor, targets: Mapping[str, Tensor], step: int) -> LossSum:  # noqa: ARG002
        return boundary_loss(outputs_BCHW, targets["boundary"])

    def judge(self, output_CHW: Tensor, targets: Mapping[str, Tensor], label: Label | None) -> BoundarySums:  # noqa: ARG002
        return boundary_sums(output_CHW, targets["boundary"][None])

    def scores(self, records: Sequence[BoundarySums]) -> dict[str, float]:
        found = merge(records)
        return {"iou": found.iou, "cross_entropy": found.cross_entropy}

    def sums(self, records: Sequence[BoundarySums]) -> np.ndarray:
        return np.array([(each.intersection, each.union, each.bce, each.batches) for each in records], np.float64)

    def of_sums(self, sums_Bk: np.ndarray) -> dict[str, np.ndarray]:
        intersection, union, bce, batches = sums_Bk.T
        return {
            "iou": np.divide(intersection, union, out=np.zeros_like(union), where=union > 0),
            "cross_entropy": np.divide(bce, batches, out=np.full_like(bce, np.nan), where=batches > 0),
        }

    def pictures(self, output_CHW: Tensor, targets: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
        return heat(output_CHW[0].sigmoid().cpu().numpy(), 0, 1), heat(targets["boundary"].cpu().numpy(), 0, 1)


CLASSIFIER = "classifier"
"""The module that a loss needs and nobody else."""

LATENTS = 32
"""Channels in which instances are told apart."""


@dataclass(frozen=True, kw_only=True)
class InstanceRecord:
    """Of one image."""

    ari: float | None
    "None: no object is left of it"


@dataclass(frozen=True, kw_only=True)
class InstanceTask(ObjectsTask[InstanceRecord]):
    """Every object of the training images is a class of its own; others' are told apart by clustering the latents."""

    first_ids: tuple[int, ...] = ()
    "of each training image, less one; the last is the number of all instances"
    samples: int = 1024
    "pixels of an image that the loss looks at"
    large_area: float = 15_000.0
    "in pixels of the original; images are judged that have more than `many` annotations above it"
    many: int = 2

    name: ClassVar[str] = "instances"
    has_held_out_loss: ClassVar[bool] = False
    target_names: ClassVar[tuple[str, ...]] = ("ids",)
    record: ClassVar[type[InstanceRecord]] = InstanceRecord
    empty: ClassVar[str] = "no object is left of it once it is placed"
    better: ClassVar[str] = "ari"

    @classmethod
    def of(cls, settings: TaskSettings, kind: DatasetKind, train: Sequence[LabelledImage]) -> "InstanceTask":  # noqa: ARG003
        counts = [len(each.label.areas()) for each in train]
        first = tuple(np.concatenate([[0], np.cumsum(counts)]).astype(int).tolist())
        return cls(
            placement=settings.placement,
            side=settings.side,
            samples=settings.samples,
            first_ids=first,
            large_area=settings.large_area,
            many=settings.many,
        )

    def judged(self, items: Sequence[LabelledImage]) -> Sequence[LabelledImage]:
        found = [each for each in items if (each.label.areas() > self.large_area).sum() > self.many]
        if not found:
            raise ConfigError(
                f"none of {len(items)} images has more than {self.many} objects of above {self.large_area:,.0f} px, which "
                "are judged; lower --many or --large-area, or give more images"
            )
        return found

    @property
    def judged_only(self) -> str:
        return f"it hasn't more than {self.many} objects of above {self.large_area:,.0f} px, which are judged"

    def as_json(self) -> dict[str, JsonValue]:
        return {**asdict(self), "first_ids": []}

    @property
    def outputs(self) -> int:
        return LATENTS

    def network(self, readout: Readout, seed: int) -> Readout:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            readout.add_module(CLASSIFIER, nn.Linear(LATENTS, 1 + self.first_ids[-1]))
        return readout

    def targets(self, label: InstanceArrays, item: int) -> dict[str, np.ndarray]:
        ids = self.ids(label)
        # Held-out images have numbers, too; what an id is doesn't matter there.
        first = self.first_ids[item] if item < len(self.first_ids) else 0
        return {"ids": np.where(ids > 0, ids + first, 0).astype(np.int32)}

    def loss(self, net: Readout, outputs_BCHW: Tensor, targets: Mapping[str, Tensor], step: int) -> LossSum:  # noqa: ARG002
        classifier = net.get_submodule(CLASSIFIER)
        return instance_loss(outputs_BCHW, targets["ids"], classifier, self.samples, torch.default_generator)

    def judge(self, output_CHW: Tensor, targets: Mapping[str, Tensor], label: Label | None) -> InstanceRecord:  # noqa: ARG002
        return InstanceRecord(ari=instance_ari(output_CHW, targets["ids"]))

    def is_empty(self, record: InstanceRecord) -> bool:
        return record.ari is None

    def scores(self, records: Sequence[InstanceRecord]) -> dict[str, float]:
        found = [record.ari for record in records if record.ari is not None]
        if not found:
            raise ValueError("no image has an object left after it was placed")
        return {"ari": 100 * math.fsum(found) / len(found), "images": float(len(found))}

    def sums(self, records: Sequence[InstanceRecord]) -> np.ndarray:
        return np.array([(each.ari or 0.0, each.ari is not None) for each in records], np.float64)

    def of_sums(self, sums_Bk: np.ndarray) -> dict[str, np.ndarray]:
        ari, images = sums_Bk.T
        return {"ari": 100 * np.divide(ari, images, out=np.full_like(ari, np.nan), where=images > 0)}

    def pictures(self, output_CHW: Tensor, targets: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Clusters, on the truth's foreground."""
        latents_NC, ids_N = foreground_pixels(output_CHW, targets["ids"])
        ids = targets["ids"].cpu().numpy()
        clusters = np.zeros(ids.shape, np.int64)
        if len(ids_N):
            clusters[ids > 0] = 1 + cluster_pixels(latents_NC, len(np.unique(ids_N)))
        _, numbers = np.unique(ids, return_inverse=True)
        return class_colours(clusters), class_colours(numbers.reshape(ids.shape) + (0 if (ids == 0).any() else 1))
