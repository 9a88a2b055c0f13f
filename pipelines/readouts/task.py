"""A readout's task: what it is trained and judged on. Tasks are a module each; `tasks.TASKS` has them by name.

A task is plain data and travels to workers. Targets are placed as the images are, and have the side of the readout's output.
They are made on the host, from label files, and go where the readout's outputs are: losses and scores are computed there.
A record is what judging one image gave, on the host; scores are taken from all records at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
from PIL import Image
from torch import Tensor

from operators.image import Geometry, fit
from operators.metrics.bootstrap import Drawn, of_sums
from operators.objectives.dense import GradientForm, LossSum
from operators.readouts import Readout
from pipelines.features.pictures import Picture
from pipelines.features.rows import Size
from storage.datasets.images import EncodedImage
from storage.datasets.instances import InstanceArrays
from storage.datasets.labels import LabelledImage
from storage.datasets.registry import DatasetKind
from storage.documents import JsonValue

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")
"""What a task's `judge` says of one image: a dataclass of JSON values."""

Label: TypeAlias = np.ndarray | InstanceArrays
"""What `read` of an image's label gives: classes or metres [H, W], or instances."""

Placement: TypeAlias = Literal["crop", "squash"]
"""How images and labels become square: the centre, or with other proportions."""


class TaskSettings(Protocol):
    """What a training run says of its task (pipelines/training/readout.py, where each is documented)."""

    dataset: str
    placement: Placement
    side: int
    outputs: int | None
    depth_loss: Literal["deap", "vit-up"]
    gradient_loss: GradientForm
    samples: int
    large_area: float
    many: int


@dataclass(frozen=True, kw_only=True)
class Square:
    """Draws images as DeAP's code does: at the task's side, bilinearly, then at the model's by the nearest pixel."""

    geometry: Geometry
    size: Size

    def __call__(self, pixels_HW3: np.ndarray) -> np.ndarray:
        small = Image.fromarray(fit(Image.fromarray(pixels_HW3), self.geometry))
        return np.array(small.resize((self.size[1], self.size[0]), Image.Resampling.NEAREST))


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Scores of all images, and how they are drawn."""

    scores: Mapping[str, float]
    names: Sequence[str]
    "of those that are drawn"
    drawn: Drawn
    "NaN where they are of nothing"


@dataclass(frozen=True, kw_only=True)
class Task(Generic[Record]):
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
    record: ClassVar[type["DataclassInstance"]]
    "what `judge` gives: `Record`"
    empty: ClassVar[str] = ""
    "what is said of an image that `is_empty`"
    better: ClassVar[str]
    "the score that tables are about"
    shares: ClassVar[tuple[str, ...]] = ()
    "scores that tables show in percent"

    @classmethod
    def of(cls, settings: TaskSettings, kind: DatasetKind, train: Sequence[LabelledImage]) -> "Task[Record]":  # noqa: ARG003
        """From a training run's settings, for a data set's images. Raises `ConfigError`."""
        return cls(placement=settings.placement, side=settings.side)

    def as_json(self) -> dict[str, JsonValue]:
        """Its settings, as JSON values."""
        return asdict(self)

    def judged(self, items: Sequence[LabelledImage]) -> Sequence[LabelledImage]:
        """Those of the held-out images that scores are about. Raises `ConfigError` where there is none."""
        return items

    @property
    def judged_only(self) -> str:
        """Of the images that `judged` doesn't take: why."""
        return ""

    @property
    def outputs(self) -> int:
        """Channels of the readout."""
        raise NotImplementedError

    def targets(self, label: Label, item: int) -> dict[str, np.ndarray]:
        """Arrays [..., side, side] of one image, from what its label's `read` gave; `item` is its number in the data set."""
        raise NotImplementedError

    def network(self, readout: Readout, seed: int) -> Readout:  # noqa: ARG002
        """What is trained: the readout, with what its loss needs beside it."""
        return readout

    def loss(self, net: Readout, outputs_BCHW: Tensor, targets: Mapping[str, Tensor], step: int) -> LossSum:
        """Of a micro-batch of optimiser step `step`, from 0; `net` as `network` made it."""
        raise NotImplementedError

    def judge(self, output_CHW: Tensor, targets: Mapping[str, Tensor], label: Label | None) -> Record:
        """What one image says of the score: its output, and its targets on the same device; `label` where `judges_label`."""
        raise NotImplementedError

    def is_empty(self, record: Record) -> bool:  # noqa: ARG002
        """Whether an image's label held nothing to be judged, so that it counts in no score."""
        return False

    def scores(self, records: Sequence[Record]) -> dict[str, float]:
        """Over all images. Raises `ValueError` where nothing could be judged."""
        raise NotImplementedError

    def scored(self, records: Sequence[Record]) -> Scored:
        """`scores`, and what they are in draws of the images. Raises `ValueError` likewise."""
        scores, sums_nk = self.scores(records), self.sums(records)
        drawn = of_sums(sums_nk, lambda each: np.stack([*self.of_sums(each).values()], axis=1))
        return Scored(scores=scores, names=tuple(self.of_sums(sums_nk[:1])), drawn=drawn)

    def sums(self, records: Sequence[Record]) -> np.ndarray:
        """What each image adds to the sums that `scores` are taken from, float64 [n, k]; of tasks without a `scored` of their
        own."""
        raise NotImplementedError

    def of_sums(self, sums_Bk: np.ndarray) -> dict[str, np.ndarray]:
        """`scores` [B] of sums of `sums`, NaN where they are of nothing."""
        raise NotImplementedError

    def pictures(self, output_CHW: Tensor, targets: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """The prediction and the truth, uint8 [side, side, 3]."""
        raise NotImplementedError

    def legend(self, pictures: Sequence[np.ndarray], names: Sequence[str]) -> list[tuple[str, tuple[int, int, int]]]:  # noqa: ARG002
        """What the colours in some of its `pictures` mean; `names` are the data set's classes, where they're known."""
        return []

    def geometry(self, interpolation: Literal["nearest", "bilinear"] = "nearest") -> Geometry:
        """How a label comes to `side`, or an image."""
        return Geometry(mode=self.placement, height=self.side, width=self.side, interpolation=interpolation)

    def placed(self, values_HW: np.ndarray) -> np.ndarray:
        """A map [H, W] (uint8, int32 or float32) as the image is placed, by the nearest pixel: [side, side]."""
        return fit(Image.fromarray(values_HW), self.geometry())

    def input_picture(self, image: EncodedImage, size: Size) -> Picture:
        """The image as the task places it, `size` (height, width) being the model's input."""
        draws = Square(geometry=self.geometry("bilinear"), size=size)
        return Picture(image=image, size=size, draw=draws, geometry=self.placement)

    def photo(self, pixels_HW3: np.ndarray) -> np.ndarray:
        """The image, for people: uint8 [side, side, 3]."""
        return fit(Image.fromarray(pixels_HW3), self.geometry("bilinear"))
