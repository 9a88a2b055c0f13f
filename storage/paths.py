"""Files at fsspec URLs: the only module that parses a URL, opens a filesystem, or knows a credential.

Two things live here: `Folder` (whole-object reads and atomic writes below one URL), and `redact` (no secret leaves this
module in a message). Retries are left to the filesystem.
"""

import contextlib
import errno
import functools
import logging
import os
import re
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Concatenate, ParamSpec, TypeVar

import aiohttp
import botocore.exceptions
import fsspec
from fsspec.implementations.local import LocalFileSystem

from storage.errors import StorageError as StorageError
from storage.local_files import put_file, read_ranges_of_files, remove_partial_files
from storage.reachable import why_endpoint_unreachable
from storage.redirects import PUBLIC_HEADERS, get_client

logger = logging.getLogger(__name__)

StorageOptions = Mapping[str, object]
"""fsspec's options for opening a URL, or such options by scheme (`{"s3": {...}, "https": {...}}`)."""

_PUBLIC_PARAMETERS = frozenset({
    "alt", "delimiter", "dl", "download", "expires", "format", "generation", "limit", "list-type", "offset", "page", "partnumber",
    "prefix", "raw", "ref", "rev", "revision", "se", "sp", "spr", "sr", "srt", "ss", "st", "sv", "version", "versionid",
    "x-amz-algorithm", "x-amz-date", "x-amz-expires", "x-amz-signedheaders", "x-goog-algorithm", "x-goog-date", "x-goog-expires",
    "x-goog-signedheaders",
})  # fmt: skip
"""Parameters of URLs whose values are shown; those of all others are blanked, for nobody can list what secrets are called."""

_PUBLIC_OPTIONS = PUBLIC_HEADERS | frozenset({
    "access", "account_name", "addressing_style", "anon", "asynchronous", "auto_mkdir", "block_size", "cache_regions",
    "cache_type", "connect_timeout", "consistency", "default_block_size", "default_cache_type", "default_fill_cache",
    "default_location", "encoded", "endpoint_url", "host", "listings_expiry_time", "max_attempts", "max_concurrency", "max_paths",
    "max_pool_connections", "mode", "payload_signing_enabled", "port", "profile", "project", "protocol", "read_timeout", "region",
    "region_name", "requester_pays", "retries", "same_names", "signature_version", "simple_links", "skip_instance_cache",
    "timeout", "total", "use_accelerate_endpoint", "use_dualstack_endpoint", "use_listings_cache", "use_ssl", "username",
    "verify", "version_aware",
})  # fmt: skip
"""The same for storage options, and for the names that are grouped below them."""

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


class UnknownName(StorageError, KeyError):
    """There is no key, level or column of that name."""

    __str__ = Exception.__str__  # KeyError's puts the message in quotes


def redact(text: str, storage_options: StorageOptions | None = None) -> str:
    """Blank credentials in `text`: user info of URLs and the values of their parameters, but for those that are known to be
    harmless, and every value of `storage_options` that isn't."""
    text = re.sub(r"(\w+://)[^/\s?#]*@", r"\1***@", text)
    text = re.sub(r"([?&#]([^=&#\s?'\"]+)=)[^&#\s'\"]+", _blank_parameter, text)
    for secret in sorted(_secret_texts(storage_options or {}), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def _blank_parameter(found: re.Match[str]) -> str:
    return found[0] if found[2].lower() in _PUBLIC_PARAMETERS else f"{found[1]}***"


def public_options(options: StorageOptions) -> dict[str, object]:
    """`options` with the values of all that aren't known to be harmless replaced by `***`, for files and logs."""
    return {name: _public_value(name, value) for name, value in options.items()}


def _public_value(name: str, value: object) -> object:
    if isinstance(value, Mapping):
        return public_options(value)
    if value is None or isinstance(value, bool):
        return value
    if name.lower() not in _PUBLIC_OPTIONS:
        return "***"
    if isinstance(value, list | tuple):
        return [_public_value(name, each) for each in value]
    return redact(value) if isinstance(value, str) else value


def _secret_texts(options: StorageOptions) -> Iterator[str]:
    """Values that must not be shown, as messages may have them. Shorter ones than 4 characters are parts of words."""
    for value in _secret_values(options):
        text = str(value)
        if len(text) >= 4:
            yield from {text, urllib.parse.quote(text, safe="")}


def _secret_values(options: StorageOptions) -> Iterator[object]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _secret_values(value)
        elif not isinstance(value, bool) and value is not None and name.lower() not in _PUBLIC_OPTIONS:
            yield from _each(value)


def _each(value: object) -> Iterator[object]:
    """A value, or all those in lists and mappings."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            yield from _each(each)
    else:
        yield value


def filesystem(url: str, storage_options: StorageOptions | None = None) -> tuple[fsspec.AbstractFileSystem, str]:
    """Open the filesystem of `url`; returns it and the path inside it.

    Raises `InputError` for an unknown scheme.
    """
    if url.startswith("pipe:") or _is_chained(url):
        raise InputError(f"{redact(url)}: pipes and chained URLs are not opened; give an fsspec URL such as s3://, http://")
    options = _options_for(url, storage_options or {})
    try:
        if url.startswith(("s3://", "s3a://")):
            options = {**_S3_OPTIONS, **options}
            options["config_kwargs"] = {**_S3_CONFIG, **_below(options, "config_kwargs")}
        elif url.startswith(("http://", "https://")):
            options = {"get_client": get_client, **options}
        if "::" in url:
            return _unchained(url, options)
        fs, path = fsspec.core.url_to_fs(url, **options)
    except (ValueError, ImportError, TypeError) as error:
        raise InputError(f"cannot open {redact(url, options)}: {redact(str(error), options)}") from None
    return fs, path


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
    if url.startswith(("http://", "https://")):
        endpoint = url
    elif url.startswith(("s3://", "s3a://")):
        with reaching(redact(url, storage_options)):
            endpoint = fs.s3.meta.endpoint_url
    else:
        return fs, path
    if reason := why_endpoint_unreachable(endpoint):
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


def is_memory(url: str) -> bool:
    """True for `memory://`, which only the process that wrote it can read."""
    return url.startswith("memory://")


@contextlib.contextmanager
def reaching(displayed: str) -> Iterator[None]:
    """Turn the HTTP libraries' own exceptions, once their retries are used up, into a `StorageError` that names the place."""
    try:
        yield
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, aiohttp.ClientError) as error:
        raise StorageError(f"{displayed} can't be reached: {type(error).__name__}: {redact(str(error))}") from None
    except FileNotFoundError as error:
        _require_bucket(error, displayed)
        raise


def _require_bucket(error: OSError, displayed: str) -> None:
    """Raise `StorageError` where what isn't there is the whole bucket, which no run makes."""
    cause = error.__cause__
    if isinstance(cause, botocore.exceptions.ClientError) and cause.response.get("Error", {}).get("Code") == "NoSuchBucket":
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
    def folders(self, name: str) -> list[str]:
        """Sorted names of the folders directly inside `name`; empty if there is none."""
        found = (e["name"] for e in self._inside(name) if e["type"] == "directory")
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)

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
        """Delete objects; those that are already gone are fine."""
        fs, root = self._fs()
        for name in names:
            self._require_inside(name)
            try:
                fs.rm_file(f"{root}/{name}")
            except (FileNotFoundError, NotADirectoryError):
                continue

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


def _range_or_none(data: bytes | BaseException, size: int) -> bytes | None:
    if isinstance(data, FileNotFoundError):
        return None
    if isinstance(data, OSError) and data.errno == errno.EINVAL and "range is not satisfiable" in str(data):
        return b""  # the range starts at the object's end or beyond; s3fs's form of a 416
    if isinstance(data, BaseException):
        raise data
    return data[:size]


# --- inputs ---------------------------------------------------------------------------------------------------------


def read_ranges(
    ranges: Sequence[tuple[str, int, int]],
    storage_options: StorageOptions | None,
    *,
    max_gap: int = 2**18,
    max_bytes: int = 2**25,
) -> list[bytes]:
    """Read `(url, offset, size)` ranges, neighbours merged into one request when at most `max_gap` bytes lie between.

    Returns the bytes of each range in order; shorter than asked where the file ends. Raises what the filesystem raises
    once its own retries are used up.
    """
    found = try_ranges(ranges, storage_options, max_gap=max_gap, max_bytes=max_bytes)
    blobs = [blob for blob in found if isinstance(blob, bytes)]
    if len(blobs) < len(found):
        raise next(error for error in found if not isinstance(error, bytes))
    return blobs


def try_ranges(
    ranges: Sequence[tuple[str, int, int]],
    storage_options: StorageOptions | None,
    *,
    max_gap: int = 2**18,
    max_bytes: int = 2**25,
) -> list[bytes | OSError]:
    """`read_ranges`, with the error in the place of bytes where it may be one object's own (`is_of_one_object`): whoever asks
    knows whether the storage answers for others. Raises what else the filesystem raises."""
    merged = merge_ranges(ranges, max_gap=max_gap, max_bytes=max_bytes)
    requests = [(ranges[a][0], ranges[a][1], ranges[b][1] + ranges[b][2]) for a, b in merged]
    with ThreadPoolExecutor(min(8, max(1, len(requests)))) as pool:
        blobs = list(pool.map(functools.partial(_try_range, storage_options), *zip(*requests, strict=True)))
    out: list[bytes | OSError] = []
    for (a, b), (_, start, _), blob in zip(merged, requests, blobs, strict=True):
        these = ranges[a : b + 1]
        if isinstance(blob, bytes):
            out += [blob[offset - start : offset - start + size] for _, offset, size in these]
        elif isinstance(blob, _NO_ACCESS):
            out += [blob] * len(these)
        else:  # part of the file can't be read: which, each range says for itself
            out += [_try_range(storage_options, url, offset, offset + size) for url, offset, size in these]
    return out


_NO_ACCESS = (PermissionError, FileNotFoundError, IsADirectoryError, NotADirectoryError)

_OF_ONE_FILE = (errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ELOOP, errno.ENAMETOOLONG)
"""Of a local disk: a bad sector, a checksum of the filesystem that is wrong, a name that leads nowhere."""

_NOT_FOR_US = (401, 403, 410, 451)
"""Answers of web servers that are about one file, beside 404, which fsspec knows."""


def is_of_one_object(error: OSError) -> bool:
    """Whether the fault may be of the object that was asked for, and others be readable. Whoever gets no answer, or is told to
    come back later, once the retries are used up, knows nothing of the object."""
    return isinstance(error, _NO_ACCESS) or error.errno in _OF_ONE_FILE


def can_be_read(url: str, storage_options: StorageOptions | None) -> bool:
    """Whether there is a byte at `url` to be had."""
    try:
        return len(_read_range(storage_options, url, 0, 1)) == 1
    except (OSError, StorageError):
        return False


def merge_ranges(
    ranges: Sequence[tuple[str, int, int]], *, max_gap: int = 2**18, max_bytes: int = 2**25
) -> list[tuple[int, int]]:
    """Which consecutive `(url, offset, size)` ranges to read as one: (first, last) positions, last included.

    They are of one file, at most `max_gap` bytes apart, and at most `max_bytes` together.
    """
    merged: list[tuple[int, int]] = []
    for i, (url, offset, size) in enumerate(ranges):
        if merged:
            first_url, first_offset, _ = ranges[merged[-1][0]]
            _, last_offset, last_size = ranges[merged[-1][1]]
            gap = offset - (last_offset + last_size)
            if url == first_url and 0 <= gap <= max_gap and offset + size - first_offset <= max_bytes:
                merged[-1] = (merged[-1][0], i)
                continue
        merged.append((i, i))
    return merged


def _read_range(options: StorageOptions | None, url: str, start: int, end: int) -> bytes:
    if start == end:
        return b""
    fs, path = filesystem(url, options)
    displayed = redact(url, options)
    with reaching(displayed):
        try:
            data = fs.cat_file(path, start=start, end=end)
        except aiohttp.ClientResponseError as error:
            if error.status not in _NOT_FOR_US:
                raise
            raise PermissionError(f"{displayed}: the server answers {error.status} {error.message}") from None
    # A web server without Range support (Python's http.server, say) answers with the whole file.
    return data[start:end] if len(data) > end - start else data


def _try_range(options: StorageOptions | None, url: str, start: int, end: int) -> bytes | OSError:
    try:
        return _read_range(options, url, start, end)
    except OSError as error:
        if not is_of_one_object(error):
            raise
        return error


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
    """What stands behind the last dot of the file's name, in lower case; a signed URL's query is no part of the name."""
    has_query = "://" in url and not url.startswith("file://")
    name = (url.partition("?")[0] if has_query else url).rsplit("/", 1)[-1]
    return name.rpartition(".")[2].lower() if "." in name else ""


def has_extension(url: str, *extensions: str) -> bool:
    """Whether the file's name ends in one of `extensions` (without the dot)."""
    return extension(url) in extensions


def query_free(url: str) -> str:
    """`url` as it may be stored: credentials redacted, the query of a signed web URL dropped."""
    if url.startswith(("http://", "https://")):
        parts = urllib.parse.urlsplit(url)
        url = urllib.parse.urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))
    return redact(url)
