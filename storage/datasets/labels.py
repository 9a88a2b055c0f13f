"""Labels of images as small records that workers read, and images with their label. Nothing is decoded before `read`."""

import io
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from PIL import Image

from storage.datasets.classes import NEVER, TABLES
from storage.datasets.depth import DepthMap
from storage.datasets.files import DatasetError, DatasetFile, read
from storage.datasets.frames import LabelFrame, OrientedImage, label_turn
from storage.datasets.images import EncodedImage, decoded
from storage.datasets.instances import InstanceArrays, Instances, OutlinedObjects
from storage.paths import Folder

COLOURS = np.array([[0, 0, 0], [240, 70, 60], [60, 200, 90], [70, 120, 250], [240, 200, 40], [200, 80, 220], [60, 210, 220]])
"""Of objects in pictures, used again from the 7th on."""


def read_labels(folder: Folder, name: str) -> np.ndarray:
    """A label image's indices, uint8 [H, W]; palettes are not turned into colours. Raises `DatasetError`."""

    def indices(image: Image.Image) -> Image.Image:
        if image.mode not in ("P", "L"):
            raise DatasetError(
                f"{folder.displayed}/{name} is a {image.mode} image; labels are 8-bit indices, with a palette (P) or grey (L)"
            )
        image.load()
        return image

    return np.array(decoded(read(folder, name), f"{folder.displayed}/{name}", indices))


def label_png(labels_HW: np.ndarray) -> bytes:
    """Indices uint8 [H, W] as a PNG with a palette of `COLOURS`."""
    image = Image.fromarray(labels_HW)
    colours = np.concatenate([COLOURS, np.resize(COLOURS[1:], (256 - len(COLOURS), 3))])
    image.putpalette(colours.astype(np.uint8).ravel().tolist())
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


@dataclass(frozen=True, kw_only=True)
class ClassMask(DatasetFile):
    """A PNG of class ids."""

    table: str
    "of `storage.datasets.classes.TABLES`: what the values mean"

    def read(self) -> np.ndarray:
        """Class of each pixel, uint8 [H, W], 255 = void. Raises `DatasetError`, also for a value that the table hasn't."""
        values = read_labels(self.folder, self.name)
        classes = TABLES[self.table][values]
        wrong = (classes < 0) | np.isin(values, NEVER.get(self.table, ()))
        if wrong.any():
            raise DatasetError(
                f"{self.displayed} holds the value {values[wrong][0]}, which labels of {self.table} don't have; "
                "check that it is this data set's label file"
            )
        return classes.astype(np.uint8)

    def identity(self) -> object:
        """What `digest` counts."""
        return [self.name, self.table]


Label: TypeAlias = ClassMask | DepthMap | Instances


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """An image and what is known of it."""

    image: EncodedImage
    label: Label
    frame: LabelFrame | None = None
    "which pixels the label is of, where its size doesn't tell"

    def upright_label(self, image: OrientedImage | None = None) -> np.ndarray | InstanceArrays:
        """The label turned onto the upright image: [H, W], or the arrays of its objects.

        `image` says how the image was turned where its features come from a store; None: by its file's EXIF. Raises
        `DatasetError`, also where both differ in size, and `FrameUnknown`.
        """
        image = image or OrientedImage(self.image.displayed, self.image.orientation())
        label = self.label.read()
        height, width = label.masks.shape[1:] if isinstance(label, InstanceArrays) else label.shape
        turn = label_turn(image, (width, height), self.frame, f"but its label {self.label.displayed} has")
        return label.turned(turn) if isinstance(label, InstanceArrays) else turn.array(label)

    def upright_outlines(self, image: OrientedImage) -> OutlinedObjects:
        """The objects that are told apart, of a label of instances, turned onto the upright image. Raises as `upright_label`."""
        if not isinstance(self.label, Instances):
            raise DatasetError(f"{self.image.displayed} has no annotated objects")
        found = self.label.outlined()
        turn = label_turn(image, (found.width, found.height), self.frame, f"but its label {self.label.displayed} has")
        return found.turned(turn)

    def identity(self) -> object:
        """What `digest` counts."""
        return {"image": self.image, "label": self.label} | ({"frame": self.frame} if self.frame else {})
