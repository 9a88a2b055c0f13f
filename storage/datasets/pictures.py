"""Images of labelled data sets: their bytes, their pixels upright, and which pixels their labels are of.

An image whose file has an EXIF orientation is stored otherwise than it is seen. Extraction turns it, and so does everything
here; its labels are turned with it, unless they are of the upright image already. That is told by their size.
"""

import io
import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from PIL import Image

from operators.image import ImageRefused, open_rgb
from storage.orientation import Orientation
from storage.paths import Folder, StorageError

T = TypeVar("T")

Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""x1, y1, x2, y2."""

LabelFrame = Literal["stored", "upright"]
"""The pixels that a label is of: the file's, or those that are seen."""

_UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
"""What Pillow raises where bytes are no image."""

MAX_PIXELS = 2**40
"""Of a data set's image: Pillow's own limit holds."""


class DatasetError(StorageError):
    """A file of a data set is missing, malformed, or contradicts another one."""


@dataclass(frozen=True, kw_only=True)
class FolderImage(ABC):
    """An image of a data set whose bytes lie in a folder, in a file of their own or in a tar."""

    folder: Folder
    keys: tuple[str, ...]
    "what a store may call it, the surest first"
    width: int = 0
    "in pixels, as the annotation has it; 0 where none says"
    height: int = 0

    @property
    @abstractmethod
    def shown(self) -> str:
        """Its place as it may be printed."""

    @abstractmethod
    def data(self) -> bytes:
        """Its bytes. Raises `DatasetError`."""

    def orientation(self) -> Orientation:
        """How the image is turned until it is upright. Raises `DatasetError`."""
        return orientation_of(self.data(), self.shown)

    def pixels(self) -> np.ndarray:
        """uint8 [height, width, 3], upright, as extraction has it. Raises `DatasetError`."""
        return upright_pixels(self, self.data())


@dataclass(frozen=True, kw_only=True)
class ImageFile(FolderImage):
    """An image of a data set, a file by itself."""

    name: str
    "path inside the folder"

    @property
    def shown(self) -> str:
        """Its URL as it may be printed."""
        return f"{self.folder.shown}/{self.name}"

    def data(self) -> bytes:
        """Its bytes. Raises `DatasetError`."""
        return read(self.folder, self.name)

    def told(self) -> Any:
        """What `digest` counts."""
        return [self.name, self.width, self.height]


class EncodedImage(Protocol):
    """What is common to images of data sets, wherever their bytes lie."""

    @property
    def shown(self) -> str: ...
    @property
    def keys(self) -> tuple[str, ...]: ...
    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    def data(self) -> bytes: ...
    def orientation(self) -> Orientation: ...


def orientation_of(data: bytes, shown: str) -> Orientation:
    """How the image file in `data` is turned until it is upright. Raises `DatasetError`."""
    try:
        return Orientation.of(Image.open(io.BytesIO(data)))
    except _UNREADABLE as error:
        raise unreadable(shown, error) from None


def upright_pixels(image: EncodedImage, data: bytes) -> np.ndarray:
    """The image whose bytes are `data`, as `ImageFile.pixels`."""
    if image.width:
        require_size(image.shown, orientation_of(data, image.shown), (image.width, image.height))
    try:
        pixels, _, _ = open_rgb(data, max_pixels=MAX_PIXELS)
    except ImageRefused as error:
        raise unreadable(image.shown, error) from None
    return np.array(pixels)


def require_size(shown: str, image: Orientation, size: tuple[int, int], says: str = "its annotation says") -> None:
    """Raises `DatasetError` unless a label of `size` = (width, height) is of the image, as stored or upright."""
    if size in (image.stored_size, image.upright_size):
        return
    (width, height), upright = image.stored_size, image.upright_size
    turned = "" if upright == image.stored_size else f" ({upright[0]} x {upright[1]} upright)"
    raise DatasetError(
        f"{shown} has {width} x {height} pixels{turned}, {says} {size[0]} x {size[1]}; check that they are of one data set"
    )


def require_inside(points_xy: Iterable[Sequence[float]], width: int, height: int, what: str) -> None:
    """Raises `ValueError` for points beyond the image by more than two pixels and a twentieth of its longer side."""
    slack = max(2.0, max(width, height) / 20)
    for x, y in points_xy:
        if not (-slack <= x <= width + slack and -slack <= y <= height + slack):
            raise ValueError(f"{what} reaches x = {x:g}, y = {y:g}, outside the image of {width} x {height} pixels")


def read(folder: Folder, name: str) -> bytes:
    """An object's bytes. Raises `DatasetError` with its URL where it is missing."""
    try:
        return folder.read(name)
    except (FileNotFoundError, IsADirectoryError):
        raise DatasetError(f"{folder.shown}/{name} is missing; check --data, and that the data set is whole") from None


def decoded(data: bytes, shown: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The image in `data`, converted. Raises `DatasetError` for what is none."""
    try:
        return convert(Image.open(io.BytesIO(data)))
    except _UNREADABLE as error:
        raise unreadable(shown, error) from None


def unreadable(shown: str, error: BaseException) -> DatasetError:
    return DatasetError(f"{shown} can't be read as an image: {type(error).__name__}: {error}")


def parsed(folder: Folder, name: str, data: bytes, parse: Callable[[Any], T]) -> T:
    """`parse` of a JSON file's content. Raises `DatasetError` with what is wrong with it."""
    try:
        return parse(json.loads(data))
    except KeyError as error:
        raise DatasetError(f"{folder.shown}/{name} has no field {error}") from None
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        raise DatasetError(f"{folder.shown}/{name} is malformed: {type(error).__name__}: {error}") from None


# --- labels of turned images ------------------------------------------------------------------------------------------

CANNOT_TELL = (
    "its EXIF turns it, and its size doesn't tell whether labels are of the stored or of the upright image; say which with "
    "--label-frame"
)


class FrameUnknown(DatasetError):
    """A label may be of the image as stored or as seen. `shown` is the image."""

    def __init__(self, shown: str):
        super().__init__(f"{shown}: {CANNOT_TELL}")
        self.shown = shown


class OrientedImage(NamedTuple):
    """An image as its pixels, or its features, were had: in words for messages, and how it was turned."""

    shown: str
    orientation: Orientation


def label_turn(
    image: OrientedImage, size: tuple[int, int], frame: LabelFrame | None, says: str = "its annotation says"
) -> Orientation:
    """How labels of an image of `size` = (width, height) are turned onto the upright image.

    Quarter turns exchange the sides, so that the size tells whether the label is of the stored pixels or of the upright ones.
    It doesn't where the image is mirrored, turned by half, or square: then `frame` does. Raises `DatasetError` for a size that
    is neither, and `FrameUnknown` where nothing tells.
    """
    shown, turn = image
    require_size(shown, turn, size, says)
    upright = Orientation(width=turn.upright_size[0], height=turn.upright_size[1])
    if turn.exif == 1 or turn.stored_size != turn.upright_size:
        return turn if size == turn.stored_size else upright
    if frame is None:
        raise FrameUnknown(shown)
    return turn if frame == "stored" else upright
