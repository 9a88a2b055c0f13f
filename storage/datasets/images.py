"""Images of data sets that are no files of their own: members of tars, entries of HDF5 arrays.

They have what `storage.datasets.pictures.ImageFile` has, so that whoever takes one takes the others. Labels that lie in
HDF5 are read here, too. Nothing is decoded when a data set is listed.
"""

import io
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from storage.datasets.pictures import DatasetError, FolderImage, ImageFile
from storage.inputs import InputFile
from storage.left_out import log_left_out
from storage.orientation import Orientation
from storage.paths import Folder, InputError
from storage.tars import MemberRules, scan_source

T = TypeVar("T")


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
class TarImage(FolderImage):
    """An image in a tar."""

    member: TarMember

    @property
    def shown(self) -> str:
        """Its place as it may be printed."""
        return f"{self.folder.shown}/{self.member.tar}: {self.member.key}.{self.member.extension}"

    def data(self) -> bytes:
        """Its bytes. Raises `DatasetError`."""
        return read_span(self.folder, self.member.tar, self.member.span)

    def told(self) -> Any:
        """What `digest` counts: the member's name and the image's size, not where the tar has it."""
        return [self.member.key, self.member.extension, self.width, self.height]


def tar_members(folder: Folder, tars: Iterable[str], extension: str | None = None) -> list[TarMember]:
    """The images (or the members of another extension) of tars, in order; one for each sample.

    Reads every header, and nothing else. Raises `DatasetError` for a tar that is missing or damaged, and for a sample without.
    """
    found = []
    for tar in tars:
        size = folder.size(tar)
        if size is None:
            raise DatasetError(f"{folder.shown}/{tar} is missing; check --data, and that the data set is whole")
        file = InputFile(url=f"{folder.url}/{tar}", size=size, etag="")
        try:
            scan = scan_source(file, MemberRules(image=extension), folder.options)
        except InputError as error:
            raise DatasetError(str(error)) from None
        for row in scan.rows.to_pylist():
            if row["problem"]:
                raise DatasetError(f"{folder.shown}/{tar}, {row['key']}: {row['problem']}; fetch the tar again")
            span = Span(offset=row["offset"], size=row["size"])
            found.append(TarMember(tar=tar, key=row["key"], extension=row["member"], span=span))
        if scan.problems:
            raise DatasetError(f"{folder.shown}/{tar}: {'; '.join(scan.problems)}; fetch the tar again")
        log_left_out(scan.left_out)
    return found


def read_span(folder: Folder, name: str, span: Span) -> bytes:
    """A part of an object. Raises `DatasetError` where the object is missing or too short."""
    (data,) = folder.read_ranges([(name, span.offset, span.size)])
    if data is None:
        raise DatasetError(f"{folder.shown}/{name} is missing; check --data, and that the data set is whole")
    if len(data) < span.size:
        raise DatasetError(
            f"{folder.shown}/{name} ends within bytes {span.offset} to {span.offset + span.size}; fetch it again"
        )
    return data


# --- HDF5 -------------------------------------------------------------------------------------------------------------


def require_h5py() -> Any:
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
    def shown(self) -> str:
        """Its place as it may be printed."""
        where = "" if self.span is None else f", byte {self.span.offset}"
        which = "" if self.entry is None else f"[{self.entry}]"
        return f"{self.folder.shown}/{self.name}{where}: {self.array}{which}"

    def read(self) -> np.ndarray:
        """The array as it is stored; of Matlab's, the entry with its axes turned round: [H, W] or [H, W, C].

        Raises `DatasetError`.
        """
        return self._of(lambda array: array[()] if self.entry is None else np.ascontiguousarray(array[self.entry].T))

    def entries(self) -> int:
        """How long its first axis is. Raises `DatasetError`."""
        return self._of(lambda array: int(array.shape[0]))

    def told(self) -> Any:
        """What `digest` counts; a member's place in its tar stands for its name."""
        return [self.name, self.array, self.span and self.span.offset, self.entry]

    def _of(self, take: Callable[[Any], T]) -> T:
        h5py = require_h5py()
        try:
            with self._opened() as stream, h5py.File(stream, "r") as file:
                return take(file[self.array])
        except FileNotFoundError:
            raise DatasetError(f"{self.folder.shown}/{self.name} is missing; check --data") from None
        except (OSError, KeyError, ValueError, IndexError) as error:
            raise DatasetError(f"{self.shown} can't be read: {type(error).__name__}: {error}") from None

    @contextmanager
    def _opened(self) -> Any:
        if self.span is not None:
            yield io.BytesIO(read_span(self.folder, self.name, self.span))
            return
        with self.folder.open(self.name) as stream:
            yield stream


@dataclass(frozen=True, kw_only=True)
class H5Image:
    """An image in HDF5: uint8 [3, H, W], or an entry of Matlab's."""

    array: H5Array
    keys: tuple[str, ...]
    "what a store may call it once it is an image file: jobs/extract.py doesn't read HDF5"
    width: int = 0
    height: int = 0

    @property
    def shown(self) -> str:
        """Its place as it may be printed."""
        return self.array.shown

    def data(self) -> bytes:
        """The image as a PNG. Raises `DatasetError`."""
        out = io.BytesIO()
        Image.fromarray(self.pixels()).save(out, "PNG", compress_level=1)
        return out.getvalue()

    def orientation(self) -> Orientation:
        """Upright: HDF5 has no EXIF. Raises `DatasetError`."""
        height, width = self.pixels().shape[:2]
        return Orientation(width=width, height=height)

    def pixels(self) -> np.ndarray:
        """uint8 [height, width, 3]. Raises `DatasetError`."""
        pixels = self.array.read()
        if self.array.entry is None and pixels.ndim == 3:
            pixels = np.ascontiguousarray(np.moveaxis(pixels, 0, -1))
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            raise DatasetError(f"{self.shown} is {pixels.dtype} {pixels.shape}, which is no image of three channels")
        return pixels

    def told(self) -> Any:
        """What `digest` counts."""
        return self.array.told()


AnyImage = ImageFile | TarImage | H5Image
