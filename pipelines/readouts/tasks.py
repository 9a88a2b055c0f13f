"""What readouts are trained and judged on: targets from labels, losses, scores that merge exactly, pictures.

A task is plain data and travels to workers. Targets are placed as the images are, and have the side of the readout's output.
A record is what judging one image gave, as JSON values; scores are taken from all records at once (specs/evaluation.md 14).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, TypeAlias

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from operators.image import Geometry, fit
from operators.metrics.boundaries import BoundarySums, boundary_sums, merge
from operators.metrics.depth import (
    NYU_SIZE,
    DepthMetrics,
    SquaredError,
    average,
    eigen_crop,
    pooled_rmse,
    score_depth,
)
from operators.metrics.detection import DEAP, ImageDetections, ImageTruth, coco_scores
from operators.metrics.instances import cluster_pixels, instance_ari
from operators.metrics.segmentation import Segmentation, confusion
from operators.objectives.dense import (
    WARM_UP_CALLS,
    GradientForm,
    LossSum,
    boundary_loss,
    cross_entropy,
    deap_depth_loss,
    instance_loss,
    vit_up_depth_loss,
)
from operators.objectives.targets import boundary_target, instance_ids
from operators.readouts import Readout
from operators.readouts.centernet import centernet_boxes, centernet_loss, centernet_targets
from operators.visual import heat
from pipelines.config import ConfigError
from storage.datasets.classes import VOID
from storage.datasets.instances import InstanceArrays
from storage.datasets.labels import LabelledImage
from storage.datasets.registry import DatasetKind

Record: TypeAlias = dict[str, Any]

Placement: TypeAlias = Literal["crop", "squash"]
"""How images and labels become square: the centre, or with other proportions."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A readout's job; abstract."""

    placement: Placement = "crop"
    side: int = 224
    "of targets and outputs, in pixels"

    name: ClassVar[str]
    label: ClassVar[Literal["classes", "depth", "instances"]]
    "what a data set must have"
    split: ClassVar[tuple[int, ...]] = ()
    "outputs of several readouts, where one isn't enough"
    judges_label: ClassVar[bool] = False
    "whether `judge` needs the label as it was read, beside the targets"
    has_held_out_loss: ClassVar[bool] = True
    "whether the loss can be had of images that weren't trained on"
    target_names: ClassVar[tuple[str, ...]]
    "of the arrays that `targets` gives"
    better: ClassVar[str]
    "the score that tables are about"
    shares: ClassVar[tuple[str, ...]] = ()
    "scores that tables show in percent"

    @classmethod
    def of(cls, settings: Any, kind: DatasetKind, train: Sequence[LabelledImage]) -> "Task":
        """From a training run's settings, for a data set's images. Raises `ConfigError`."""
        raise NotImplementedError

    def told(self) -> dict[str, Any]:
        """Its settings, as JSON values."""
        return asdict(self)

    def judged(self, items: Sequence[LabelledImage]) -> Sequence[LabelledImage]:
        """Those of the held-out images that scores are about. Raises `ConfigError` where there is none."""
        return items

    @property
    def outputs(self) -> int:
        """Channels of the readout."""
        raise NotImplementedError

    def targets(self, label: Any, item: int) -> dict[str, np.ndarray]:
        """Arrays [..., side, side] of one image, from what its label's `read` gave; `item` is its number in the data set."""
        raise NotImplementedError

    def network(self, readout: Readout, seed: int) -> Readout:  # noqa: ARG002
        """What is trained: the readout, with what its loss needs beside it."""
        return readout

    def loss(self, net: Readout, outputs_BCHW: Tensor, targets: Mapping[str, Tensor], step: int) -> LossSum:
        """Of a micro-batch of optimiser step `step`, from 0; `net` as `network` made it."""
        raise NotImplementedError

    def judge(self, output_CHW: Tensor, targets: Mapping[str, np.ndarray], label: Any) -> Record:
        """What one image says of the score."""
        raise NotImplementedError

    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        """Over all images. Raises `ValueError` where nothing could be judged."""
        raise NotImplementedError

    def pictures(self, output_CHW: Tensor, targets: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The prediction and the truth, uint8 [side, side, 3]."""
        raise NotImplementedError

    def geometry(self, **changes: Any) -> Geometry:
        """How a label comes to `side`; `changes` for other sizes."""
        plain = Geometry(mode=self.placement, height=self.side, width=self.side, interpolation="nearest")
        return replace(plain, **changes)

    def placed(self, values_HW: np.ndarray) -> np.ndarray:
        """A map [H, W] (uint8, int32 or float32) as the image is placed, by the nearest pixel: [side, side]."""
        return fit(Image.fromarray(values_HW), self.geometry())

    def photo(self, pixels_HW3: np.ndarray) -> np.ndarray:
        """The image, for people: uint8 [side, side, 3]."""
        return fit(Image.fromarray(pixels_HW3), self.geometry(interpolation="bilinear"))


# --- classes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SegmentationTask(Task):
    """A class for each pixel; 255 is void."""

    classes: int
    extra_outputs: int = 0
    "that no label has: DeAP's COCO-Stuff readout has 200 for 182"
    background: bool = False
    "whether class 0 is no class: how well all others together are told from it is a score, too"

    name: ClassVar[str] = "segmentation"
    label: ClassVar[Literal["classes"]] = "classes"
    target_names: ClassVar[tuple[str, ...]] = ("classes",)
    better: ClassVar[str] = "miou"
    shares: ClassVar[tuple[str, ...]] = ("miou", "pixel_accuracy", "mean_accuracy", "foreground_iou")

    @classmethod
    def of(cls, settings: Any, kind: DatasetKind, train: Sequence[LabelledImage]) -> "SegmentationTask":  # noqa: ARG003
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

    def judge(self, output_CHW: Tensor, targets: Mapping[str, np.ndarray], label: Any) -> Record:  # noqa: ARG002
        found = confusion(output_CHW.argmax(0).cpu().numpy(), targets["classes"], self.outputs)
        rows, columns = np.nonzero(found)
        # Most pairs of classes never meet.
        return {"pairs": np.stack([rows, columns, found[rows, columns]], axis=1).tolist()}

    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        matrix = np.zeros((self.outputs, self.outputs), np.int64)
        for record in records:
            for row, column, count in record["pairs"]:
                matrix[row, column] += count
        found = Segmentation.of(matrix)
        values = {"miou": found.mean_iou, "pixel_accuracy": found.pixel_accuracy, "mean_accuracy": found.mean_accuracy}
        if self.background and (union := matrix.sum() - matrix[0, 0]):
            values["foreground_iou"] = float(matrix[1:, 1:].sum() / union)
        return values

    def pictures(self, output_CHW: Tensor, targets: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return class_colours(output_CHW.argmax(0).cpu().numpy()), class_colours(targets["classes"])


def class_colours(classes_HW: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3]; 0 is black, void white, neighbouring numbers get different colours."""
    numbers = np.arange(256)
    hues = (numbers * 0.618034) % 1.0  # the golden ratio spreads any first few evenly
    table = (matplotlib.colormaps["hsv"](hues)[:, :3] * (0.6 + 0.4 * (numbers % 2))[:, None] * 255).astype(np.uint8)
    table[0], table[VOID] = 0, 255
    return table[np.asarray(classes_HW, np.uint8)]


# --- depth ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DepthTask(Task):
    """Metres for each pixel; 0 where none were measured."""

    objective: Literal["deap", "vit-up"] = "deap"
    gradient: GradientForm = "released"
    "vit-up: the form of the gradient loss"

    name: ClassVar[str] = "depth"
    label: ClassVar[Literal["depth"]] = "depth"
    judges_label: ClassVar[bool] = True
    target_names: ClassVar[tuple[str, ...]] = ("depth",)
    better: ClassVar[str] = "rmse_pooled"
    shares: ClassVar[tuple[str, ...]] = ("d1", "d2", "d3")

    @classmethod
    def of(cls, settings: Any, kind: DatasetKind, train: Sequence[LabelledImage]) -> "DepthTask":  # noqa: ARG003
        return cls(
            placement=settings.placement,
            side=settings.side,
            objective=settings.depth_loss,
            gradient=settings.gradient_loss,
        )

    @property
    def outputs(self) -> int:
        return 1

    def targets(self, label: np.ndarray, item: int) -> dict[str, np.ndarray]:  # noqa: ARG002
        return {"depth": self.placed(label)}

    def loss(self, net: Readout, outputs_BCHW: Tensor, targets: Mapping[str, Tensor], step: int) -> LossSum:  # noqa: ARG002
        if self.objective == "deap":
            return deap_depth_loss(outputs_BCHW, targets["depth"])
        return vit_up_depth_loss(outputs_BCHW, targets["depth"], warm=step < WARM_UP_CALLS, form=self.gradient)

    def judge(self, output_CHW: Tensor, targets: Mapping[str, np.ndarray], label: np.ndarray) -> Record:
        """On the label's own pixels where the image was squashed (of NYU's, the Eigen crop), else on the square's."""
        truth, found = targets["depth"], output_CHW
        if self.placement == "squash":
            truth = label
            found = F.interpolate(output_CHW[None], size=label.shape, mode="bilinear", align_corners=False)[0]
            if truth.shape == NYU_SIZE:
                truth, found = eigen_crop(truth), eigen_crop(found)
        predicted = found[0].clamp(min=0).cpu().numpy()
        metrics = score_depth(predicted, truth)
        return {"error": asdict(SquaredError.of(predicted, truth)), "metrics": metrics and asdict(metrics)}

    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        means = average(DepthMetrics(**record["metrics"]) for record in records if record["metrics"])
        return {"rmse_pooled": pooled_rmse(SquaredError(**record["error"]) for record in records), **asdict(means)}

    def pictures(self, output_CHW: Tensor, targets: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        truth = targets["depth"]
        high = float(truth.max())
        return heat(output_CHW[0].cpu().numpy(), 0, high), heat(truth, 0, high)


# --- instances --------------------------------------------------------------------------------------------------------


class _InstanceTask(Task):
    """What tasks on instances share."""

    label: ClassVar[Literal["instances"]] = "instances"

    @classmethod
    def of(cls, settings: Any, kind: DatasetKind, train: Sequence[LabelledImage]) -> "Task":  # noqa: ARG003
        return cls(placement=settings.placement, side=settings.side)

    def ids(self, label: InstanceArrays) -> np.ndarray:
        """Int32 [side, side]: 0 for background, n + 1 for annotation n."""
        return self.placed(instance_ids(label.masks))


@dataclass(frozen=True, kw_only=True)
class BoundaryTask(_InstanceTask):
    """Whether a pixel lies on the outline of an object."""

    name: ClassVar[str] = "boundaries"
    target_names: ClassVar[tuple[str, ...]] = ("boundary",)
    better: ClassVar[str] = "iou"
    shares: ClassVar[tuple[str, ...]] = ("iou",)

    @property
    def outputs(self) -> int:
        return 1

    def targets(self, label: InstanceArrays, item: int) -> dict[str, np.ndarray]:  # noqa: ARG002
        return {"boundary": boundary_target(self.ids(label))}

    def loss(self, net: Readout, outputs_BCHW: Tensor, targets: Mapping[str, Tensor], step: int) -> LossSum:  # noqa: ARG002
        return boundary_loss(outputs_BCHW, targets["boundary"])

    def judge(self, output_CHW: Tensor, targets: Mapping[str, np.ndarray], label: Any) -> Record:  # noqa: ARG002
        return asdict(boundary_sums(output_CHW.cpu(), torch.from_numpy(targets["boundary"])[None]))

    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        found = merge(BoundarySums(**record) for record in records)
        return {"iou": found.iou, "cross_entropy": found.cross_entropy}

    def pictures(self, output_CHW: Tensor, targets: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return heat(output_CHW[0].sigmoid().cpu().numpy(), 0, 1), heat(targets["boundary"], 0, 1)


@dataclass(frozen=True, kw_only=True)
class DetectionTask(_InstanceTask):
    """Centres and sizes of objects of no class: DeAP's CenterNet."""

    name: ClassVar[str] = "detection"
    split: ClassVar[tuple[int, ...]] = (1, 2)
    judges_label: ClassVar[bool] = True
    target_names: ClassVar[tuple[str, ...]] = ("heat", "sizes")
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

    def judge(self, output_CHW: Tensor, targets: Mapping[str, np.ndarray], label: InstanceArrays) -> Record:  # noqa: ARG002
        (found,) = centernet_boxes(output_CHW[None, :1], output_CHW[None, 1:])
        return {
            "boxes": found.boxes_N4.cpu().numpy().round(3).tolist(),
            "scores": found.scores_N.cpu().numpy().astype(float).round(7).tolist(),
            "truth": self.boxes(label).round(3).tolist(),
        }

    def boxes(self, label: InstanceArrays) -> np.ndarray:
        """The annotated boxes in pixels of the square, cut off at its sides; those outside are left out. Float64 [N, 4]."""
        height, width = label.masks.shape[1:]
        place = self.geometry().place(width, height)
        scale = np.array([place.x_scale, place.y_scale] * 2)
        boxes = label.boxes.astype(np.float64) * scale + np.array([place.x_offset, place.y_offset] * 2)
        boxes = boxes.clip(0, self.side)
        return boxes[(boxes[:, 2:] > boxes[:, :2]).all(axis=1)]

    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        """With boxes of 448 px: `large` is above 96^2 px there, whatever the side."""
        scale = 448 / self.side
        truth = [ImageTruth.of(i, scale * _boxes(record["truth"])) for i, record in enumerate(records)]
        found = [ImageDetections.of(i, scale * _boxes(r["boxes"]), r["scores"]) for i, r in enumerate(records)]
        scores = coco_scores(truth, found, DEAP)
        return {name: getattr(scores, name) for name in ("ap_large", "ap", "ap_50", "ar_100")}

    def pictures(self, output_CHW: Tensor, targets: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return heat(output_CHW[0].sigmoid().cpu().numpy(), 0, 1), heat(targets["heat"], 0, 1)


def _boxes(boxes: Any) -> np.ndarray:
    return np.array(boxes, np.float64).reshape(-1, 4)


CLASSIFIER = "classifier"
"""The module that a loss needs and nobody else."""

LATENTS = 32
"""Channels in which instances are told apart."""


@dataclass(frozen=True, kw_only=True)
class InstanceTask(_InstanceTask):
    """Every object of the training images is a class of its own; others' are told apart by clustering the latents."""

    first_ids: tuple[int, ...] = ()
    "of each training image, less one; the last is the number of all instances"
    samples: int = 1024
    "pixels of an image that the loss looks at"
    large_area: float = 15_000.0
    "in pixels of the original; images are judged that have more than `many` annotations above it (12.3)"
    many: int = 2

    name: ClassVar[str] = "instances"
    has_held_out_loss: ClassVar[bool] = False
    target_names: ClassVar[tuple[str, ...]] = ("ids",)
    better: ClassVar[str] = "ari"

    @classmethod
    def of(cls, settings: Any, kind: DatasetKind, train: Sequence[LabelledImage]) -> "InstanceTask":  # noqa: ARG003
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

    def told(self) -> dict[str, Any]:
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

    def judge(self, output_CHW: Tensor, targets: Mapping[str, np.ndarray], label: Any) -> Record:  # noqa: ARG002
        return {"ari": instance_ari(output_CHW.cpu().numpy(), targets["ids"])}

    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        found = [record["ari"] for record in records if record["ari"] is not None]
        if not found:
            raise ValueError("no image has an object left after it was placed")
        return {"ari": 100 * math.fsum(found) / len(found), "images": float(len(found))}

    def pictures(self, output_CHW: Tensor, targets: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Clusters, on the truth's foreground."""
        ids, foreground = targets["ids"], targets["ids"] > 0
        clusters = np.zeros(ids.shape, np.int64)
        if foreground.any():
            latents = output_CHW.cpu().numpy()[:, foreground].T
            clusters[foreground] = 1 + cluster_pixels(latents, len(np.unique(ids[foreground])))
        _, numbers = np.unique(ids, return_inverse=True)
        return class_colours(clusters), class_colours(numbers.reshape(ids.shape) + (0 if (ids == 0).any() else 1))


TASKS: Mapping[str, type[Task]] = {
    each.name: each for each in (SegmentationTask, DepthTask, BoundaryTask, DetectionTask, InstanceTask)
}
"""By name."""


def parse_task(told: Mapping[str, Any]) -> Task:
    """From `told` and the `name`, as a checkpoint has them. Raises `ValueError`, `KeyError` or `TypeError`."""
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    return TASKS[settings.pop("name")](**settings)
