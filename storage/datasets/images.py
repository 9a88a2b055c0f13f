"""Images of labelled data sets, wherever their bytes lie: files, members of tars, entries of HDF5 arrays.

Nothing is decoded when a data set is listed (but in warped.py, which makes its own), and nothing here decodes an image file to
pixels: extraction's decoder does (`upright_pixels` in pipelines/features/photos.py). HDF5 is read here, as raw arrays, and so
are labels that lie in it.
"""

import io
import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from storage.datasets.files import DatasetError, DatasetFile, ItemLeftOut, Listed, missing
from storage.inputs import IMAGE_EXTENSIONS, InputFile, expand_inputs
from storage.left_out import log_left_out
from storage.orientation import Orientation
from storage.paths import Folder, InputError, StorageOptions
from storage.tars import MemberRules, scan_source, split_name
from storage.videos import named_frame

I = TypeVar("I", bound="EncodedImage")  # noqa: E741
T = TypeVar("T")

_UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
"""What Pillow raises where bytes are no image."""


@dataclass(frozen=True, kw_only=True)
class EncodedImage(ABC):
    """An image of a data set."""

    keys: tuple[str, ...]
    "what a store may call it, the surest first"
    width: int = 0
    "in pixels, as the annotation has it; 0 where none says"
    height: int = 0

    @property
    @abstractmethod
    def displayed(self) -> str:
        """Its place as it may be printed."""

    @abstractmethod
    def data(self) -> bytes:
        """Its bytes, of an image file. Raises `DatasetError`."""

    def content(self) -> bytes:
        """What `content_digests` counts. Raises `DatasetError`."""
        return self.data()

    @abstractmethod
    def identity(self) -> object:
        """What `digest` counts, wherever the data set lies."""

    def orientation(self) -> Orientation:
        """How the image is turned until it is upright. Raises `DatasetError`."""
        return orientation_of(self.data(), self.displayed)

    def sized(self: I, size: tuple[int, int]) -> I:
        """The same image, (width, height) being what its annotation says."""
        return replace(self, width=size[0], height=size[1])


@dataclass(frozen=True, kw_only=True)
class ImageFile(DatasetFile, EncodedImage):
    """An image that is a file by itself."""

    @classmethod
    def at(cls, folder: Folder, name: str, width: int = 0, height: int = 0) -> "ImageFile":
        """The file, called in stores as `keys_of` says."""
        return cls(folder=folder, name=name, keys=keys_of(name), width=width, height=height)

    def identity(self) -> object:
        return [self.name, self.width, self.height]


def keys_of(name: str) -> tuple[str, ...]:
    """What a store calls the file at this path: without extension, extracted from here, or from any folder further down. Of a
    file that is called as a frame of a video is, that frame's names come first."""
    frame, split = named_frame(name), split_name(name)
    paths = [frame] if frame else []
    paths.append(split[0] if split else name)
    return tuple("/".join(parts[i:]) for parts in (path.split("/") for path in paths) for i in range(len(parts)))


def load_images(url: str, options: StorageOptions | None = None) -> Listed[ImageFile]:
    """The images of a folder and those below it, sorted; of a data set in SPair's layout, those in JPEGImages.

    Raises `DatasetError`, `InputError`.
    """
    folder = Folder(url, options)
    if folder.folders("JPEGImages") or folder.sizes("JPEGImages"):
        folder = Folder(f"{folder.url}/JPEGImages", options)
    files = expand_inputs([folder.url], options)
    log_left_out(files.left_out)
    if not all(file.is_image for file in files):
        raise DatasetError(f"{folder.displayed} holds tars; give a folder of images ({', '.join(IMAGE_EXTENSIONS)})")
    names = [file.url[len(file.base) :].lstrip("/") for file in files]
    found = tuple(ImageFile(folder=folder, name=name, keys=keys_of(f"JPEGImages/{name}")) for name in names)
    return Listed(found, len(found), files.left_out)


# --- what Pillow says of bytes ----------------------------------------------------------------------------------------


def orientation_of(data: bytes, displayed: str) -> Orientation:
    """How the image file in `data` is turned until it is upright. Raises `DatasetError`."""
    return decoded(data, displayed, Orientation.of)


def decoded(data: bytes, displayed: str, convert: Callable[[Image.Image], T]) -> T:
    """What `convert` gives of the image in `data`. Raises `DatasetError` where it's none."""
    try:
        return convert(Image.open(io.BytesIO(data)))
    except _UNREADABLE as error:
        raise unreadable(displayed, error) from None


class ImageUnreadable(ItemLeftOut):
    """The bytes of an image, or of labels that are one, can't be read as an image."""

    def __init__(self, displayed: str, reason: str):
        super().__init__(displayed, reason)
        self.args = (f"{displayed} {reason}",)


def unreadable(displayed: str, error: BaseException) -> ImageUnreadable:
    """The error to raise for bytes that are no image."""
    # Pillow names the buffer by its address, which is another one in every run: reasons are kept beside results.
    why = re.sub(r" <_io\.BytesIO object at 0x[0-9a-f]+>", "", str(error))
    return ImageUnreadable(displayed, f"can't be read as an image: {type(error).__name__}: {why}")


# --- tars -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Span:
    """Where a member of a tar lies in it, in bytes."""

    offset: int
    size: int


@dataclass(frozen=True, kw_only=True)
class TarMember:
    """A file in a tar."""

    tar: str
    "the tar's path inside the folder"
    key: str
    "of the sample, as WebDataset has it"
    extension: str
    span: Span


@dataclass(frozen=True, kw_only=True)
class TarImage(EncodedImage):
    """An image in a tar."""

    folder: Folder
    member: TarMember

    @property
    def displayed(self) -> str:
        return f"{self.folder.displayed}/{self.member.tar}: {self.member.key}.{self.member.extension}"

    def data(self) -> bytes:
        return read_span(self.folder, self.member.tar, self.member.span)

    def identity(self) -> object:
        """The member's name and the image's size, not where the tar has it."""
        return [self.member.key, self.member.extension, self.width, self.height]


def tar_members(folder: Folder, tars: Iterable[str], extension: str | None = None) -> list[TarMember]:
    """The images (or the members of another extension) of tars, in order; one for each sample.

    Reads every header, and nothing else. Raises `DatasetError` for a tar that is missing or damaged, and for a sample without.
    """
    found = []
    for tar in tars:
        size = folder.size(tar)
        if size is None:
            raise missing(folder, tar)
        file = InputFile(url=f"{folder.url}/{tar}", size=size, etag="")
        try:
            scan = scan_source(file, MemberRules(image=extension), folder.options)
        except InputError as error:
            raise DatasetError(str(error)) from None
        for row in scan.rows.to_pylist():
            if row["problem"]:
                raise DatasetError(f"{folder.displayed}/{tar}, {row['key']}: {row['problem']}; fetch the tar again")
            span = Span(offset=row["offset"], size=row["size"])
            found.append(TarMember(tar=tar, key=row["key"], extension=row["member"], span=span))
        if scan.problems:
            raise DatasetError(f"{folder.displayed}/{tar}: {'; '.join(scan.problems)}; fetch the tar again")
        log_left_out(scan.left_out)
    return found


def read_span(folder: Folder, name: str, span: Span) -> bytes:
    """A part of an object. Raises `DatasetError` where the object is missing or too short."""
    (data,) = folder.read_ranges([(name, span.offset, span.size)])
    if data is None:
        raise missing(folder, name)
    if len(data) < span.size:
        raise DatasetError(
            f"{folder.displayed}/{name} ends within bytes {span.offset} to {span.offset + span.size}; fetch it again"
        )
    return data


# --- HDF5 -------------------------------------------------------------------------------------------------------------


def require_h5py() -> ModuleType:
    """The h5py package, which nothing else needs. Raises `DatasetError` where it isn't installed."""
    try:
        import h5py
    except ImportError:
        raise DatasetError(
            "this data set is HDF5 (.h5, .mat), for which h5py is needed: pip install h5py; or use a layout of PNGs"
        ) from None
    return h5py


@dataclass(frozen=True, kw_only=True)
class H5Array:
    """An array of an HDF5 file, or one entry of it."""

    folder: Folder
    name: str
    "path of the file, or of the tar that holds it, inside the folder"
    array: str
    span: Span | None = None
    "of the file in the tar"
    entry: int | None = None
    "along the first axis, of a file that Matlab wrote: there the other axes are in reverse, (channel,) column, row"

    @property
    def displayed(self) -> str:
        """Its place as it may be printed."""
        where = "" if self.span is None else f", byte {self.span.offset}"
        which = "" if self.entry is None else f"[{self.entry}]"
        return f"{self.folder.displayed}/{self.name}{where}: {self.array}{which}"

    def read(self) -> np.ndarray:
        """The array as it is stored; of Matlab's, the entry with its axes turned round: [H, W] or [H, W, C].

        Raises `DatasetError`.
        """
        return self._of(lambda array: array[()] if self.entry is None else np.ascontiguousarray(array[self.entry].T))

    def entries(self) -> int:
        """How long its first axis is. Raises `DatasetError`."""
        return self._of(lambda array: int(array.shape[0]))

    def content(self) -> bytes:
        """What `content_digests` counts. Raises `DatasetError`."""
        return self.read().tobytes()

    def identity(self) -> object:
        """A member's place in its tar stands for its name."""
        return [self.name, self.array, self.span and self.span.offset, self.entry]

    def _of(self, take: Callable[[Any], T]) -> T:
        h5py = require_h5py()
        try:
            in_tar = None if self.span is None else io.BytesIO(read_span(self.folder, self.name, self.span))
            with in_tar or self.folder.open(self.name) as stream, h5py.File(stream, "r") as file:
                return take(file[self.array])
        except FileNotFoundError:
            raise DatasetError(f"{self.folder.displayed}/{self.name} is missing; check --data") from None
        except (OSError, KeyError, ValueError, IndexError) as error:
            raise DatasetError(f"{self.displayed} can't be read: {type(error).__name__}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class H5Image(EncodedImage):
    """An image in HDF5: uint8 [3, H, W], or an entry of Matlab's. Its keys are what a store may call it once it is an image
    file, since jobs/extract.py doesn't read HDF5."""

    array: H5Array

    @property
    def displayed(self) -> str:
        return self.array.displayed

    def data(self) -> bytes:
        """The image as a PNG. Raises `DatasetError`."""
        out = io.BytesIO()
        Image.fromarray(self._pixels()).save(out, "PNG", compress_level=1)
        return out.getvalue()

    def content(self) -> bytes:
        return self.array.content()

    def identity(self) -> object:
        return self.array.identity()

    def orientation(self) -> Orientation:
        """Upright: HDF5 has no EXIF. Raises `DatasetError`."""
        height, width = self._pixels().shape[:2]
        return Orientation(width=width, height=height)

    def _pixels(self) -> np.ndarray:
        """uint8 [height, width, 3]. Raises `DatasetError`."""
        pixels = self.array.read()
        if self.array.entry is None and pixels.ndim == 3:
            pixels = np.ascontiguousarray(np.moveaxis(pixels, 0, -1))
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            raise DatasetError(f"{self.displayed} is {pixels.dtype} {pixels.shape}, which is no image of three channels")
        return pixels
