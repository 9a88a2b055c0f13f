"""Files at fsspec URLs: the only module that opens a filesystem.

`Folder` reads whole objects below one URL, and writes them atomically. Retries are left to the filesystem.
"""

import base64
import contextlib
import errno
import functools
import os
import re
import socket
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Concatenate, ParamSpec, TypeGuard, TypeVar

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from storage.errors import StorageError as StorageError
from storage.local_files import put_file, read_ends_of_files, read_ranges_of_files, remove_partial_files
from storage.reachable import why_endpoint_unreachable
from storage.redaction import redact

StorageOptions = Mapping[str, object]
"""fsspec's options for opening a URL, or such options by scheme (`{"s3": {...}, "https": {...}}`)."""

_S3_CONFIG = {
    # One connection per request in flight: the default of 10 serialises ranged reads (s3fs #873).
    "max_pool_connections": 64,
    # The one retry layer for object storage; a stalled connection counts as failed after read_timeout.
    "retries": {"mode": "standard", "max_attempts": 8},
    "connect_timeout": 10,
    "read_timeout": 30,
}

_S3_OPTIONS = {
    # Another worker may have written since a listing was made.
    "use_listings_cache": False,
    # Above 1, s3fs asks for every object's size before it reads the whole of it.
    "max_concurrency": 1,
}

P = ParamSpec("P")
T = TypeVar("T")


class InputError(StorageError, ValueError):
    """The input named by the user is empty, missing, or not what it should be."""


class ServerFailed(StorageError, OSError):
    """An object store answered with an error of its own, also when it was asked again."""


class UnknownName(StorageError, KeyError):
    """There is no key, level or column of that name."""

    __str__ = Exception.__str__  # KeyError's puts the message in quotes


@dataclass(frozen=True, slots=True)
class Stat:
    """What a listing says of an object."""

    size: int
    md5: str = ""
    "hex, of stores that say it of what they hold; empty where they don't, or the object was sent in parts"

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "Stat":
        """Of what fsspec lists. S3's ETag is the content's MD5 but where keys of a service encrypt it: then it's no content's."""
        tag = str(entry.get("ETag") or entry.get("etag") or "").strip('"')
        if in_base64 := entry.get("md5Hash"):  # Google's
            tag = base64.b64decode(in_base64).hex()
        return cls(size=entry["size"], md5=tag if re.fullmatch("[0-9a-f]{32}", tag) else "")


def filesystem(url: str, storage_options: StorageOptions | None = None) -> tuple[fsspec.AbstractFileSystem, str]:
    """Open the filesystem of `url`; returns it and the path inside it.

    Raises `InputError` for an unknown scheme, a URL that isn't whole and options that don't fit, and `StorageError` where opening
    asks a server in vain.
    """
    require_whole(url)
    if url.startswith("pipe:") or _is_chained(url):
        raise InputError(f"{redact(url)}: pipes and chained URLs are not opened; give an fsspec URL such as s3://, http://")
    options = _options_for(url, storage_options or {})
    try:
        if url.startswith(("s3://", "s3a://")):
            options = {**_S3_OPTIONS, **options}
            options["config_kwargs"] = {**_S3_CONFIG, **_below(options, "config_kwargs")}
        elif is_web(url):
            from storage.redirects import get_client

            options = {"get_client": get_client, **options}
        if "::" in url:
            return _unchained(url, options)
        with reaching(redact(url, options)):
            fs, path = fsspec.core.url_to_fs(url, **options)
    except (ValueError, ImportError, TypeError) as error:
        raise _unopened(url, options, error) from None
    return fs, path


def _unopened(url: str, options: StorageOptions, error: Exception) -> InputError:
    return InputError(f"cannot open {redact(url, options)}: {redact(str(error), options)}; check the URL, and --storage-options")


_WITH_PLACE = ("s3", "s3a", "gs", "gcs", "http", "https", "abfs", "abfss", "az", "adl", "oci", "oss")
"""Schemes whose URLs begin with a host or a bucket."""


def require_whole(url: str) -> None:
    """Raise `InputError` for a path that is empty, and a URL without a bucket or host, as of a variable that isn't set, or with
    one slash too few: what is left would be this folder, or the name of one in it."""
    if not url.strip():
        raise InputError("an empty path, as of a variable that isn't set; this folder is called .")
    scheme, colon, rest = url.partition(":")
    if colon and scheme in _WITH_PLACE and not re.match("//[^/]", rest):
        raise InputError(f"{redact(url)} is no whole URL, as of a variable that isn't set; write {scheme}://PLACE/PATH")


def _is_chained(url: str) -> bool:
    """Whether `::` joins URLs, as fsspec has it; it may be part of a file's name, too."""
    first, *others = url.split("::")
    return any("://" in part for part in others) or (bool(others) and first in fsspec.available_protocols())


def _unchained(url: str, options: Mapping[str, object]) -> tuple[fsspec.AbstractFileSystem, str]:
    """`fsspec.core.url_to_fs`, but for what that makes of `::`."""
    kind = fsspec.get_filesystem_class(url.split("://", 1)[0] if "://" in url else "file")
    return kind(**{**kind._get_kwargs_from_urls(url), **options}), kind._strip_protocol(url)


def opened(url: str, storage_options: StorageOptions | None = None) -> tuple[fsspec.AbstractFileSystem, str]:
    """`filesystem` of a server that answers. Raises `StorageError` for one that doesn't within seconds: botocore alone would try
    for minutes, in silence."""
    fs, path = filesystem(url, storage_options)
    if not is_web(url) and not url.startswith(("s3://", "s3a://")):
        return fs, path
    with reaching(redact(url, storage_options)):
        try:
            # Here s3fs looks at its options for the first time.
            endpoint = url if is_web(url) else fs.s3.meta.endpoint_url
            reason = why_endpoint_unreachable(endpoint)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise _unopened(url, storage_options or {}, error) from None
    if reason:
        raise StorageError(f"{redact(url, storage_options)} can't be reached: {reason}; check the URL, and `endpoint_url`")
    return fs, path


def _options_for(url: str, options: StorageOptions) -> dict[str, object]:
    """The options for `url`: those under its scheme where the keys are schemes, else all of them unless it is local."""
    scheme = url.split("://", 1)[0] if "://" in url else "file"
    if options and set(options) <= set(fsspec.available_protocols()):
        return _below(options, scheme)
    # A run may read from a local disk and write to S3 under one set of options, which the local filesystem would refuse.
    return {} if scheme in ("file", "local", "memory") else dict(options)


def _below(options: StorageOptions, name: str) -> dict[str, object]:
    """The options that are grouped under `name`. Raises `InputError`."""
    found = options.get(name, {})
    if not isinstance(found, Mapping):
        raise InputError(f"the storage option {name!r} must hold options by name, not {type(found).__name__}")
    return dict(found)


def is_web(url: str) -> bool:
    """Whether a web server has what is at a URL."""
    return url.startswith(("http://", "https://"))


def is_memory(url: str) -> bool:
    """True for `memory://`, which only the process that wrote it can read."""
    return url.startswith("memory://")


@contextlib.contextmanager
def reaching(displayed: str) -> Iterator[None]:
    """Turn the network's own exceptions, once retries are used up, into a `StorageError` that names the place."""
    try:
        yield
    except FileNotFoundError as error:
        _require_bucket(error, displayed)
        raise
    except Exception as error:
        if isinstance(error, OSError) and is_of(error.__cause__, _S3_REFUSAL):  # as s3fs has them
            if isinstance(error, FileExistsError):
                raise
            if isinstance(error, PermissionError):
                raise PermissionError(
                    f"{displayed}: access is refused ({redact(str(error))}); check the credentials, and what they are allowed"
                ) from None
            raise ServerFailed(f"{displayed}: the server answers with an error, again and again: {redact(str(error))}") from None
        if not _is_of_network(error):
            raise
        raise StorageError(f"{displayed} can't be reached: {type(error).__name__}: {redact(str(error))}") from None


_S3_REFUSAL = "botocore.exceptions.ClientError"


def is_of(error: object, kind: str) -> TypeGuard[Any]:
    """Whether it's an exception of a class that is named with its module, which needn't be imported for the question: to whoever
    uses no web server, aiohttp is 0.2 s of imports in each process."""
    module, _, name = kind.rpartition(".")
    return module in sys.modules and isinstance(error, getattr(sys.modules[module], name))


_OF_NETWORK = ("botocore", "aiohttp", "requests", "httpx", "httpx2", "urllib3", "ftplib", "paramiko", "gcsfs", "google", "azure")
"""Libraries that talk to servers, whose filesystems hand their exceptions on."""


def _is_of_network(error: Exception) -> bool:
    """Whether it's what a server said, or that none answered. Libraries are told by name: few of them are installed."""
    if isinstance(error, ConnectionError | TimeoutError | socket.gaierror):
        return True
    return any(kind.__module__.partition(".")[0] in _OF_NETWORK for kind in type(error).__mro__)


def _require_bucket(error: OSError, displayed: str) -> None:
    """Raise `StorageError` where what isn't there is the whole bucket, which no run makes."""
    cause = error.__cause__
    if is_of(cause, _S3_REFUSAL) and cause.response.get("Error", {}).get("Code") == "NoSuchBucket":
        raise StorageError(f"{displayed}: there is no such bucket; create it, or correct the URL or `endpoint_url`") from None


def _guarded(method: Callable[Concatenate["Folder", P], T]) -> Callable[Concatenate["Folder", P], T]:
    @functools.wraps(method)
    def call(self: "Folder", /, *args: P.args, **kwargs: P.kwargs) -> T:
        with reaching(self.displayed):
            return method(self, *args, **kwargs)

    return call


class Folder:
    """Whole objects below one URL. Writes are atomic: a reader sees the old object, the new one, or none.

    Pickles to URL and options; a filesystem is opened on first use in each process.
    """

    def __init__(self, url: str, storage_options: StorageOptions | None = None):
        self.url = url.rstrip("/") or url[:1]  # the disk's root stays one
        self.options = dict(storage_options or {})
        self._open: tuple[int, fsspec.AbstractFileSystem, str] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"url": self.url, "options": self.options, "_open": None}

    def __repr__(self) -> str:
        return f"Folder({self.displayed!r})"

    @property
    def displayed(self) -> str:
        """The URL as it may be printed."""
        return redact(self.url, self.options)

    @property
    def is_local(self) -> bool:
        """Whether it is on a disk, where each file has permissions and faults of its own."""
        return isinstance(self._fs()[0], LocalFileSystem)

    def is_file(self) -> bool:
        """Whether a file of a local disk is where the folder would be."""
        fs, root = self._fs()
        return isinstance(fs, LocalFileSystem) and os.path.isfile(root)  # noqa: PTH113 - of no access: no

    def _fs(self) -> tuple[fsspec.AbstractFileSystem, str]:
        # Reopened after a fork: s3fs sessions of the parent hang or fail in the child.
        if self._open is None or self._open[0] != os.getpid():
            fs, root = opened(self.url, self.options)
            self._open = (os.getpid(), fs, root.rstrip("/"))
        return self._open[1], self._open[2]

    @_guarded
    def read(self, name: str) -> bytes:
        """The object's bytes. Raises `FileNotFoundError` naming the full URL."""
        fs, root = self._fs()
        try:
            return fs.cat_file(f"{root}/{name}")
        except (FileNotFoundError, NotADirectoryError) as error:
            _require_bucket(error, self.displayed)
            raise FileNotFoundError(f"{self.displayed}/{name} does not exist") from None

    def read_many(self, names: Sequence[str], workers: int = 32) -> list[bytes]:
        """Several objects at once, in the order of `names`."""
        if len(names) <= 1:
            return [self.read(name) for name in names]
        self._fs()
        with ThreadPoolExecutor(min(workers, len(names))) as pool:
            return list(pool.map(self.read, names))

    @_guarded
    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes | None]:
        """Read `(name, offset, size)` ranges concurrently; None for objects that don't exist.

        A range may reach beyond the object's end; what is there comes back. One request for each range: `merge_ranges`
        says which are worth joining first.
        """
        fs, root = self._fs()
        paths = [f"{root}/{name}" for name, _, _ in ranges]
        bounds = [(offset, offset + size) for _, offset, size in ranges]
        if isinstance(fs, LocalFileSystem):
            return read_ranges_of_files(paths, bounds)
        found = fs.cat_ranges(paths, [start for start, _ in bounds], [end for _, end in bounds], on_error="return")
        return [_range_or_none(data, end - start) for data, (start, end) in zip(found, bounds, strict=True)]

    @_guarded
    def read_ends(self, names: Sequence[str], size: int) -> list[bytes | None]:
        """The last `size` bytes of objects, concurrently; all of shorter ones, None for those that don't exist.

        One request each. Where the storage can't be asked for an object's end (Azure), or a web server doesn't answer that,
        its size is asked for first.
        """
        fs, root = self._fs()
        paths = [f"{root}/{name}" for name in names]
        if isinstance(fs, LocalFileSystem):
            return read_ends_of_files(paths, size)
        found: list[bytes | BaseException | None] = [None] * len(paths)
        if _knows_ends(fs):
            found = fs.cat_ranges(paths, [-size] * len(paths), [None] * len(paths), on_error="return")
        by_size = [i for i, data in enumerate(found) if data is None or _refuses_ends(data)]
        with ThreadPoolExecutor(32) as pool:
            sizes = list(pool.map(self.size, [names[i] for i in by_size]))
        ranges = [(names[i], max(0, total - size), size) for i, total in zip(by_size, sizes, strict=True) if total is not None]
        ends = dict(zip([name for name, _, _ in ranges], self.read_ranges(ranges), strict=True)) if ranges else {}
        asked = set(by_size)
        return [
            ends.get(name) if i in asked else _end_or_none(data, size)
            for i, (name, data) in enumerate(zip(names, found, strict=True))
        ]

    @_guarded
    def open(self, name: str) -> BinaryIO:
        """A seekable binary file, for readers that need part of a large object: each read is one request."""
        fs, root = self._fs()
        options = {} if isinstance(fs, LocalFileSystem) else {"cache_type": "none"}
        return fs.open(f"{root}/{name}", "rb", **options)

    @_guarded
    def write(self, name: str, data: bytes, *, look: Callable[[], object] | None = None) -> None:
        """Put the whole object, replacing an older one. Raises `StorageError` for names that lead out of the folder.

        `look` is called as late as can be, and raises where the object isn't to be put any more.
        """
        self._require_inside(name)
        fs, root = self._fs()

        def put(partial: Path, target: Path) -> None:
            if look is not None:
                look()
            partial.replace(target)

        if isinstance(fs, LocalFileSystem):
            put_file(root, name, data, put)
            return
        if look is not None:
            look()
        fs.pipe_file(f"{root}/{name}", data)

    @_guarded
    def write_new(self, name: str, data: bytes) -> bool:
        """Put the object only if none of that name exists; False if one does. Atomic between writers."""
        self._require_inside(name)
        fs, root = self._fs()
        if isinstance(fs, LocalFileSystem):
            try:
                put_file(root, name, data, os.link)
            except FileExistsError:
                return False
            return True
        try:
            fs.pipe_file(f"{root}/{name}", data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            # Ceph's gateway answers a lost race with a bare 412, which s3fs maps to EINVAL.
            if error.errno == errno.EINVAL and self.exists(name):
                return False
            raise
        return True

    def _require_inside(self, name: str) -> None:
        if not name or any(part in ("", ".", "..") for part in name.split("/")):
            raise StorageError(f"{name!r} is no name of an object in {self.displayed}")

    def check_create_only(self, prefix: str) -> None:
        """Raise `StorageError` unless this storage refuses to overwrite in `write_new`; the commit protocol rests on it.

        What is tried is called `<prefix>-<random>`: one that a killed process left must not look like this one's own.
        """
        name = f"{prefix}-{uuid.uuid4().hex}"
        try:
            first, second = self.write_new(name, b"1"), self.write_new(name, b"2")
        finally:
            self.remove([name])
        if not first or second:
            raise StorageError(
                f"{self.displayed}: this storage ignores create-only writes (If-None-Match), so two workers could both believe "
                "that they finished a task; use S3, Ceph RGW, MinIO, GCS, Azure, or a local disk"
            )

    @_guarded
    def exists(self, name: str) -> bool:
        fs, root = self._fs()
        fs.invalidate_cache()
        return fs.exists(f"{root}/{name}")

    @_guarded
    def sizes(self, name: str) -> dict[str, int]:
        """Names and sizes in bytes of the objects directly inside the subfolder `name`; empty if there is none."""
        return {e["name"].rsplit("/", 1)[-1]: e["size"] for e in self._inside(name) if e["type"] == "file"}

    @_guarded
    def names(self, name: str) -> list[str]:
        """Names of the objects directly inside the subfolder `name`, in any order: of a local disk without a look at each."""
        fs, root = self._fs()
        if not isinstance(fs, LocalFileSystem):
            return list(self.sizes(name))
        try:
            with os.scandir(f"{root}/{name}") as entries:
                return [entry.name for entry in entries if entry.is_file()]
        except (FileNotFoundError, NotADirectoryError):
            return []

    @_guarded
    def sizes_by_number(self, name: str, rest: str, count: int) -> np.ndarray:
        """Sizes in bytes of the objects `<name>/<number>/<rest>` with numbers below `count`, int64 [count]; -1 where there is
        none. Object storage gives a thousand with each request."""
        fs, root = self._fs()
        fs.invalidate_cache()
        sizes = np.full(count, -1, np.int64)
        path = f"{root}/{name}"
        for prefix in [""] if _FIND_PREFIXES.isdisjoint(_protocols(fs)) else _number_prefixes(count):
            for full, entry in fs.find(path, detail=True, **({"prefix": prefix} if prefix else {})).items():
                number, _, further = full.partition(f"{path}/")[2].partition("/")
                # Whatever is called otherwise is nothing of ours.
                if further == rest and number.isdecimal() and str(int(number)) == number and int(number) < count:
                    sizes[int(number)] = entry["size"]
        return sizes

    @_guarded
    def folders(self, name: str) -> list[str]:
        """Sorted names of the folders directly inside `name`; empty if there is none."""
        found = (e["name"] for e in self._inside(name) if e["type"] == "directory")
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)

    @_guarded
    def below(self, name: str) -> "dict[str, Stat]":
        """All objects below the subfolder `name`, by their names in this folder; with no name, all that there are.

        Found in one listing, in memory: some 200 bytes each."""
        fs, root = self._fs()
        fs.invalidate_cache()
        try:
            found = fs.find(f"{root}/{name}" if name else root, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        start = len(root) + 1
        return {path[start:]: Stat.of(entry) for path, entry in found.items() if entry["type"] == "file"}

    def _inside(self, name: str) -> list[dict[str, Any]]:
        fs, root = self._fs()
        fs.invalidate_cache()
        try:
            return fs.ls(f"{root}/{name}", detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []

    @_guarded
    def size(self, name: str) -> int | None:
        """Size in bytes, or None if there is no such object."""
        fs, root = self._fs()
        try:
            return fs.info(f"{root}/{name}")["size"]
        except (FileNotFoundError, NotADirectoryError):
            return None

    @_guarded
    def remove(self, names: Iterable[str]) -> None:
        """Delete objects, one after another; those that are already gone are fine."""
        fs, root = self._fs()
        for name in names:
            self._require_inside(name)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                fs.rm_file(f"{root}/{name}")

    def remove_many(self, names: Sequence[str]) -> None:
        """The same in any order: of a remote storage, many at once."""
        if len(names) <= 1 or self.is_local:
            self.remove(names)
            return
        with ThreadPoolExecutor(min(32, len(names))) as pool:
            list(pool.map(lambda name: self.remove([name]), names))

    @_guarded
    def remove_empty(self, name: str) -> None:
        """Remove the subfolder `name` of a local disk if nothing is in it; object storage has no empty ones."""
        fs, root = self._fs()
        if isinstance(fs, LocalFileSystem):
            with contextlib.suppress(OSError):
                Path(f"{root}/{name}").rmdir()

    def remove_partial(self) -> None:
        """Drop what killed writers left behind. Whoever writes still writes that object once more."""
        fs, root = self._fs()
        if isinstance(fs, LocalFileSystem):
            remove_partial_files(root)


_KNOW_ENDS = {"s3", "s3a", "gs", "gcs", "http", "https", "memory"}
"""Protocols whose filesystems give an object's end in one request."""


_FIND_PREFIXES = {"s3", "s3a", "gs", "gcs"}
"""Protocols whose filesystems list objects by how their names begin."""


def _protocols(fs: fsspec.AbstractFileSystem) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def _knows_ends(fs: fsspec.AbstractFileSystem) -> bool:
    return not _protocols(fs).isdisjoint(_KNOW_ENDS)


def _number_prefixes(count: int) -> list[str]:
    """How names that begin with a number below `count` and a slash begin: all in one listing, or, of many, in a hundred, of which
    each takes little memory."""
    return [""] if count <= 10_000 else [*(f"{n}/" for n in range(10)), *map(str, range(10, 100))]


def _refuses_ends(data: bytes | BaseException) -> bool:
    """Whether it's a web server's word, or its silence, about a range counted from the end. A suffix is optional in HTTP."""
    return is_of(data, "aiohttp.ClientError")


def _range_or_none(data: bytes | BaseException, size: int) -> bytes | None:
    found = _found_or_none(data)
    return found if found is None else found[:size]


def _end_or_none(data: bytes | BaseException | None, size: int) -> bytes | None:
    found = _found_or_none(data)
    return found if found is None else found[-size:]  # a web server without ranges answers with the whole


def _found_or_none(data: bytes | BaseException | None) -> bytes | None:
    if data is None or isinstance(data, FileNotFoundError):
        return None
    if isinstance(data, OSError) and data.errno == errno.EINVAL and "range is not satisfiable" in str(data):
        return b""  # the range starts at the object's end or beyond; s3fs's form of a 416
    if isinstance(data, BaseException):
        raise data
    return data


def read_file(url: str, storage_options: StorageOptions | None = None) -> bytes:
    """All bytes of one file at any URL. Raises `FileNotFoundError`."""
    folder, name = folder_of(url, storage_options)
    return folder.read(name)


def folder_of(url: str, storage_options: StorageOptions | None = None) -> tuple[Folder, str]:
    """The folder that the file at `url` lies in, and its name there."""
    path, mark, query = url.partition("?") if "://" in url else (url, "", "")
    folder, slash, name = path.rpartition("/")
    return Folder(folder or slash or ".", storage_options), f"{name}{mark}{query}"


def extension(url: str) -> str:
    """What stands behind the last dot of the file's name, in lower case."""
    name = file_name(url)
    return name.rpartition(".")[2].lower() if "." in name else ""


def file_name(url: str) -> str:
    """What stands behind the last slash; a signed URL's query is no part of the name."""
    has_query = "://" in url and not url.startswith("file://")
    return (url.partition("?")[0] if has_query else url).rsplit("/", 1)[-1]


def has_extension(url: str, *extensions: str) -> bool:
    """Whether the file's name ends in one of `extensions` (without the first dot: `gz`, `tar.gz`)."""
    return file_name(url).lower().endswith(tuple(f".{each}" for each in extensions))
