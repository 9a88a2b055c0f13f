"""The files of the input: what a user's `--data` matches, and reading one from its start to its end."""

import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import braceexpand
import fsspec
from fsspec.implementations.local import LocalFileSystem

from storage.paths import InputError, filesystem, is_memory, query_free, reaching, redact

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")
"""Members that are taken for the image of a sample; of several, the first in this order."""


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One tar or image file of the input."""

    url: str
    "fsspec URL, credentials included; `redact` it before it is shown or stored"
    size: int
    "bytes"
    etag: str
    "the store's ETag, or `mtime:<ns>,ctime:<ns>` for files, which have none; empty where neither is known"
    base: str = ""
    "for a file of a plain folder: the folder's URL; keys are relative to it"

    @property
    def is_image(self) -> bool:
        return self.url.rsplit(".", 1)[-1].lower() in IMAGE_EXTENSIONS


def expand_inputs(patterns: Sequence[str], storage_options: Mapping[str, Any] | None = None) -> list[InputFile]:
    """List what `patterns` match: tar files, or the images of plain folders, in the order given, globs sorted.

    A pattern is a URL with braces (`{000..127}`) and globs; a folder stands for its tars, or, where it has none, for
    the images below it. Raises `InputError` if a pattern matches nothing or names a file that does not exist.
    """
    if not patterns:
        raise InputError(
            "no input: give --data one or more URLs of tars (braces and globs allowed) or folders of images"
        )
    files: list[InputFile] = []
    for pattern in patterns:
        files += _expand_pattern(pattern, storage_options)
    return files


def _expand_pattern(pattern: str, options: Mapping[str, Any] | None) -> list[InputFile]:
    try:
        urls = list(braceexpand.braceexpand(pattern))
    except braceexpand.UnbalancedBracesError:
        raise InputError(f"{redact(pattern, options)}: unbalanced braces") from None
    with ThreadPoolExecutor(min(16, len(urls))) as pool:
        found = list(pool.map(lambda url: _expand_url(url, options), urls))
    missing = [url for url, files in zip(urls, found, strict=True) if files is None]
    if missing:
        listed = ", ".join(redact(url, options) for url in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise InputError(f"{redact(pattern, options)}: {len(missing)} of {len(urls)} do not exist: {listed}")
    files = [file for group in found for file in group or []]
    if not files:
        raise InputError(
            f"{redact(pattern, options)} matches no tar and no image ({', '.join(IMAGE_EXTENSIONS)}); check the path"
        )
    return files


def _expand_url(url: str, options: Mapping[str, Any] | None) -> list[InputFile] | None:
    """The files of one URL without braces; None if it names nothing that exists."""
    with reaching(redact(url, options)):
        return _list_url(url, options)


def _list_url(url: str, options: Mapping[str, Any] | None) -> list[InputFile] | None:
    fs, path = filesystem(url, options)
    http = url.startswith(("http://", "https://"))
    if not http and any(c in path for c in "*?["):
        entries = fs.glob(path, detail=True)
        return [_input_file(fs, entries[name]) for name in sorted(entries) if entries[name]["type"] == "file"]
    try:
        info = fs.info(path)
    except FileNotFoundError:
        return None
    if info["type"] != "directory":
        if info.get("size") is None:
            raise InputError(
                f"{redact(url, options)}: the server does not tell the file's size, which ranged reads need"
            )
        return [_input_file(fs, info)]
    entries = [e for e in fs.find(path, detail=True).values() if not _is_hidden(e["name"], path)]
    depth = path.rstrip("/").count("/") + 1
    tars = [e for e in entries if e["name"].endswith(".tar") and e["name"].count("/") == depth]
    images = [e for e in entries if e["name"].rsplit(".", 1)[-1].lower() in IMAGE_EXTENSIONS]
    files = [_input_file(fs, e, base="" if tars else url) for e in tars or images]
    return sorted(files, key=lambda file: file.url)


def _is_hidden(name: str, folder: str) -> bool:
    return any(part.startswith(".") for part in name[len(folder) :].split("/"))


def _input_file(fs: fsspec.AbstractFileSystem, info: Mapping[str, Any], base: str = "") -> InputFile:
    etag = info.get("ETag") or info.get("etag") or ""
    if not etag and info.get("mtime"):
        etag = f"mtime:{int(info['mtime'] * 1e9)}"
        # The other time can't be set: it tells a file that was replaced under its old time.
        etag += f",ctime:{int(info['created'] * 1e9)}" if "created" in info else ""
    return InputFile(
        url=_full_url(fs, info["name"]),
        size=int(info["size"]),
        etag=str(etag).strip('"'),
        base=base and _full_url(fs, base),
    )


def _full_url(fs: fsspec.AbstractFileSystem, name: str) -> str:
    """The URL of a path on `fs`; local ones absolute and without `..`."""
    if isinstance(fs, LocalFileSystem):
        return fs.unstrip_protocol(os.path.normpath(fs._strip_protocol(name)))
    return name if name.startswith(("http://", "https://")) else fs.unstrip_protocol(fs._strip_protocol(name))


@contextlib.contextmanager
def open_sequential(file: InputFile, storage_options: Mapping[str, Any] | None) -> Iterator[Any]:
    """A binary file that is cheap to read and skip forward: 8 MiB read-ahead on object storage."""
    fs, path = filesystem(file.url, storage_options)
    ahead = {} if isinstance(fs, LocalFileSystem) else {"block_size": 2**23, "cache_type": "readahead"}
    with reaching(query_free(file.url)):
        if is_memory(file.url) or file.url.startswith(("http://", "https://")):
            yield io.BytesIO(fs.cat_file(path))
            return
        with fs.open(path, "rb", **ahead) as stream:
            yield stream
