"""What reading labelled data sets has in common: files of a folder by name, lists, JSON, and the digest of what was found.

Everything is read through `storage.paths.Folder`, so that a path and any fsspec URL work. What is missing or malformed ends
in a `DatasetError` that names the file.
"""

import errno
import hashlib
import json
import logging
import posixpath
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any, TypeAlias, TypeVar, overload

from storage.left_out import LeftOut
from storage.paths import Folder, StorageError

logger = logging.getLogger(__name__)

T = TypeVar("T")
Item = TypeVar("Item")

RawObject: TypeAlias = Mapping[str, Any]
"""An object of a data set's JSON as it was parsed: any field may lack, or be something else."""


class DatasetError(StorageError):
    """A file of a data set is missing, malformed, or contradicts another one."""


class ItemLeftOut(DatasetError):
    """An item of the data set can't be trained on or scored; the others can."""

    def __init__(self, displayed: str, reason: str):
        super().__init__(f"{displayed}: {reason}")
        self.displayed, self.reason = displayed, reason

    def __reduce__(self) -> tuple[type["ItemLeftOut"], tuple[str, str]]:
        return type(self), (self.displayed, self.reason)


@dataclass(frozen=True)
class Listed(Sequence[Item]):
    """The items of a data set that were asked for, and what there is beside them."""

    items: tuple[Item, ...]
    of: int | None = None
    "items that there are, asked for or not; None where listing ended with the last that was asked for"
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)
    "what there is and is no item, by reason"

    @classmethod
    def first(cls, items: Sequence[Item], limit: int | None) -> "Listed[Item]":
        """The first `limit` of all items."""
        return cls(tuple(items[:limit]), len(items))

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Item, ...]: ...
    def __getitem__(self, index: int | slice) -> Item | tuple[Item, ...]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True, kw_only=True)
class DatasetFile:
    """A file of a data set."""

    folder: Folder
    name: str
    "path inside the folder"

    @property
    def displayed(self) -> str:
        """Its URL as it may be printed."""
        return f"{self.folder.displayed}/{self.name}"

    def data(self) -> bytes:
        """Its bytes. Raises `DatasetError`."""
        return read(self.folder, self.name)

    def content(self) -> bytes:
        """What `content_digests` counts. Raises `DatasetError`."""
        return self.data()


def read(folder: Folder, name: str) -> bytes:
    """An object's bytes. Raises `DatasetError` with its URL where it is missing, `ItemLeftOut` where it is a disk's file that
    this user may not read, or that the disk itself can't: object stores refuse all alike, which costs no item alone."""
    try:
        return folder.read(name)
    except (FileNotFoundError, IsADirectoryError):
        raise missing(folder, name) from None
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EIO) or not folder.is_local:
            raise
        raise ItemLeftOut(f"{folder.displayed}/{name}", f"can't be read: {error.strerror}") from None


def missing(folder: Folder, name: str) -> DatasetError:
    """The error to raise for an object that isn't there."""
    return DatasetError(f"{folder.displayed}/{name} is missing; check --data, and that the data set is whole")


def parsed(folder: Folder, name: str, data: bytes, parse: Callable[[RawObject], T]) -> T:
    """`parse` of a JSON file's content. Raises `DatasetError` with what is wrong with it."""
    try:
        return parse(json.loads(data))
    except KeyError as error:
        raise DatasetError(f"{folder.displayed}/{name} has no field {error}") from None
    except (ValueError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise DatasetError(f"{folder.displayed}/{name} is malformed: {type(error).__name__}: {error}") from None


def lines(folder: Folder, name: str) -> list[str]:
    """First words of a text file's lines. Raises `DatasetError` where there is none."""
    try:
        # Editors on Windows put a byte order mark before UTF-8, which would be part of the first name.
        text = read(folder, name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{folder.displayed}/{name} is no text: {error}") from None
    found = [line.split()[0] for line in text.splitlines() if line.strip()]
    if not found:
        raise DatasetError(f"{folder.displayed}/{name} lists nothing")
    return found


def listed_names(folder: Folder, name: str) -> list[str]:
    """The names that a list has, each once. Raises `DatasetError`, also for one that would lead elsewhere in a path."""
    found = each_once(f"{folder.displayed}/{name}", lines(folder, name))
    for each in found:
        require_plain(each, f"{folder.displayed}/{name}")
    return found


def each_once(displayed: str, names: Sequence[str]) -> list[str]:
    """The names that a list has, each once: what is listed again is no further item, and the log says so."""
    found = list(dict.fromkeys(names))
    if len(found) < len(names):
        logger.warning("%s lists %d names more than once; each counts once", displayed, len(names) - len(found))
    return found


def names_in(folder: Folder, name: str, extensions: Sequence[str]) -> list[str]:
    """Sorted names of the files of these types in a folder. Raises `DatasetError` if there is none."""
    names = sorted(each for each in folder.sizes(name) if each.rsplit(".", 1)[-1].lower() in extensions)
    if not names:
        raise DatasetError(f"{folder.displayed}/{name} is missing, or holds no {' or '.join(extensions)}; check --data")
    return names


def require_plain(name: str, where: str) -> None:
    """Raises `DatasetError` for a name that would lead elsewhere as part of a path."""
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise DatasetError(f"{where} names {name!r}, which is no plain name")


def require_files(folder: Folder, files: Iterable[DatasetFile], why: str = "but an annotation names it") -> None:
    """Raises `DatasetError` naming the first file that isn't there; one listing per folder, nothing is read."""
    listed: dict[str, set[str]] = {}
    for file in files:
        parent, name = posixpath.split(file.name)
        if parent not in listed:
            listed[parent] = set(folder.sizes(parent))
        if name not in listed[parent]:
            raise DatasetError(f"{file.displayed} is missing, {why}")


def digest(records: Iterable[object]) -> str:
    """sha256 of what the records say, wherever they lie: of their `identity()` where they have one, else of their fields."""
    found = hashlib.sha256()
    for record in records:
        found.update(json.dumps(_without_folders(record), sort_keys=True).encode())
    return found.hexdigest()


def _without_folders(value: object) -> object:
    if hasattr(value, "identity"):
        return _without_folders(value.identity())
    if is_dataclass(value) and not isinstance(value, type):
        return {name: _without_folders(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {name: _without_folders(each) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return [_without_folders(each) for each in value]
    return value
