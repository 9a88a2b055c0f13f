"""Detections of annotated objects, image by image, and what they come to: the work of pipelines/evaluation/detection.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import pycocotools.mask as coco_mask

from operators.metrics.detection import ClassScores, CocoEntry, coco_scores_by_class
from operators.vitdet.detector import Detections
from pipelines.config import ConfigError
from pipelines.evaluation.run import Piece, Record, cut, records_of
from pipelines.features.detectors import DetectorWeights, RunningDetectors
from pipelines.features.photos import upright_pixels
from pipelines.results import Taken
from storage.datasets.classes import COCO_CATEGORIES
from storage.datasets.coco import CocoSet
from storage.datasets.files import DatasetError, RawObject
from storage.datasets.frames import LabelFrame, OrientedImage, label_turn
from storage.datasets.images import orientation_of
from storage.datasets.instances import Instances
from storage.datasets.labels import LabelledImage
from storage.orientation import Orientation
from storage.paths import Folder

PIECE_IMAGES = 16

Overlap: TypeAlias = Literal["bbox", "segm"]
"""Of boxes, or of masks."""


@dataclass(frozen=True, kw_only=True)
class ObjectDetection:
    """Annotated images, and what their objects are called."""

    images: tuple[LabelledImage, ...]
    numbers: tuple[int, ...]
    "COCO's ids of the images"
    names: Mapping[int, str]
    "of categories, by id"
    classes: tuple[int, ...]
    "the detectors' classes as categories' ids"
    masks: bool
    "whether annotations have masks to be scored by"
    without_mask: int
    "annotations that have a box alone"
    without_area: int = 0
    "objects whose masks cover no pixel"
    frame: LabelFrame | None = None
    "of labels, where their size doesn't tell"
    pictured: tuple[int, ...] = ()
    taken: tuple[Taken, ...] = ()

    def pieces(self) -> list[Piece]:
        return cut(range(len(self.images)), PIECE_IMAGES, "{start:07d}")

    def run(self, piece: Piece, source: RunningDetectors, folder: Folder) -> list[Record]:  # noqa: ARG002
        return records_of(piece.items, lambda number: self._image(number, source))

    def _image(self, number: int, source: RunningDetectors) -> list[Record]:
        item = self.images[number]
        data, displayed = item.image.data(), item.image.displayed
        pixels = upright_pixels(item.image, data)
        truth = self.truth_of(item, OrientedImage(displayed, orientation_of(data, displayed)))
        detected = source.detect(pixels, displayed)
        return [
            {
                "image": number,
                "height": pixels.shape[0],
                "width": pixels.shape[1],
                "truth": truth,
                "found": {name: self._found(each.found) for name, each in detected.items()},
                "seconds": {name: dict(each.seconds) for name, each in detected.items()},
            }
        ]

    def truth_of(self, item: LabelledImage, image: OrientedImage) -> list[CocoEntry]:
        """The annotated objects of the upright image."""
        label = item.label
        assert isinstance(label, Instances)
        turn = label_turn(image, (label.width, label.height), self.frame)
        notes = label.objects()
        masks = label.read().turned(turn).masks if self.masks else [None] * len(notes)
        return [_annotation(note, turn, mask) for note, mask in zip(notes, masks, strict=True)]

    def _found(self, found: Detections) -> list[CocoEntry]:
        boxes = found.boxes_N4.numpy().astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        scores, kinds = found.scores_N.numpy().astype(np.float64), found.classes_N.tolist()
        places = zip(boxes.round(3).tolist(), scores.round(7).tolist(), kinds, found.masks_NHW.numpy(), strict=True)
        return [
            {"category_id": self.classes[kind], "bbox": box, "score": score, "segmentation": _runs(mask)}
            for box, score, kind, mask in places
        ]


def _annotation(note: RawObject, turn: Orientation, mask_HW: np.ndarray | None) -> CocoEntry:
    """An annotation of the stored pixels as one of the upright image's."""
    box = note["bbox"]
    if turn.exif != 1:
        x1, y1, x2, y2 = turn.boxes(np.array([[box[0], box[1], box[0] + box[2], box[1] + box[3]]]))[0].tolist()
        box = [x1, y1, x2 - x1, y2 - y1]
    entry: CocoEntry = {"category_id": note["category_id"], "bbox": box, "area": note["area"], "iscrowd": note["iscrowd"]}
    return entry if mask_HW is None else {**entry, "segmentation": _runs(mask_HW)}


def _runs(mask_HW: np.ndarray) -> dict[str, object]:
    """A mask of the whole image as COCO's compressed runs."""
    runs = coco_mask.encode(np.asfortranarray(mask_HW.astype(np.uint8)))
    return {"size": [int(side) for side in runs["size"]], "counts": runs["counts"].decode()}


# --- classes ----------------------------------------------------------------------------------------------------------


def class_ids(detectors: Sequence[DetectorWeights], annotated: Mapping[int, str]) -> tuple[int, ...]:
    """The categories' ids of the detectors' classes. Raises `ConfigError` where nothing tells them, or they are others'."""
    plain, *others = detectors
    said = next((each for each in detectors if each.categories), None)
    if said is None:
        return _usual_ids(plain, annotated)
    for each in others:
        if each.categories not in ((), said.categories):
            raise ConfigError(f"{each.displayed} was trained on other categories than {said.displayed}; evaluate each by itself")
    if len(said.categories) != said.settings.classes:
        raise ConfigError(f"{said.displayed} says {len(said.categories)} categories and has {said.settings.classes} classes")
    for number, name in said.categories:
        if number in annotated and annotated[number] not in (name, str(number)):  # named by its id where the file lists none
            raise ConfigError(
                f"category {number} is {annotated[number]!r} in the annotations, and {name!r} to {said.displayed}: they are of "
                "other data sets"
            )
    return tuple(number for number, _ in said.categories)


def _usual_ids(detector: DetectorWeights, annotated: Mapping[int, str]) -> tuple[int, ...]:
    """Of a detector whose file says no categories: those of the annotations, or COCO's own, in ascending order."""
    classes = detector.settings.classes
    if len(annotated) == classes:
        return tuple(annotated)
    unsaid = {number: str(number) for number in COCO_CATEGORIES}
    if classes == len(COCO_CATEGORIES) and (annotated.items() <= COCO_CATEGORIES.items() or annotated.items() <= unsaid.items()):
        return tuple(COCO_CATEGORIES)
    raise ConfigError(
        f"{detector.displayed} has {classes} classes and doesn't say which; the annotations have {len(annotated)} categories. "
        "Give annotations that list the categories it was trained on"
    )


def require_known(data: CocoSet, classes: Sequence[int], detector: DetectorWeights) -> None:
    """Raises `ConfigError` where objects are annotated that no class of the detector is, `DatasetError` where there are none."""
    labels = [item.label for item in data.images if isinstance(item.label, Instances)]
    objects = 0
    for label in labels:
        for note in label.objects():
            objects += not note["iscrowd"]
            if (number := note["category_id"]) not in classes:
                raise ConfigError(
                    f"{label.displayed}: annotation {note['id']} is of category {number} ({data.categories[number]}), which "
                    f"isn't among the {len(classes)} of {detector.displayed}; evaluate it on annotations of those"
                )
    if not objects:
        raise DatasetError(
            f"none of {len(labels):,} images has an annotated object beside crowds, so that nothing can be scored; check --split"
        )


# --- scores -----------------------------------------------------------------------------------------------------------


def kinds_of(task: ObjectDetection) -> tuple[Overlap, ...]:
    return ("bbox", "segm") if task.masks else ("bbox",)


def results_of(task: ObjectDetection, records: Sequence[Record], row: str) -> dict[Overlap, list[CocoEntry]]:
    """What a row found, as COCO's server takes boxes and masks: an entry of masks has no box, so that its area is the mask's."""
    found = [(task.numbers[record["image"]], entry) for record in records for entry in record["found"][row]]

    def entries(what: str) -> list[CocoEntry]:
        return [{"image_id": image, "category_id": e["category_id"], "score": e["score"], what: e[what]} for image, e in found]

    return {"bbox": entries("bbox"), "segm": entries("segmentation")}


def scores_of(
    task: ObjectDetection, records: Sequence[Record], results: Mapping[Overlap, Sequence[CocoEntry]]
) -> dict[Overlap, ClassScores]:
    images = [{"id": task.numbers[record["image"]], "height": record["height"], "width": record["width"]} for record in records]
    truth = [{"image_id": task.numbers[record["image"]], **note} for record in records for note in record["truth"]]
    return {kind: coco_scores_by_class(images, truth, results[kind], kind) for kind in kinds_of(task)}
