"""Ranges of files at URLs, read many at once; which errors of reading one are its own, and which the storage's."""

import errno
import functools
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from storage.paths import StorageError, StorageOptions, filesystem, is_of, reaching
from storage.redaction import redact


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
        return len(read_range(storage_options, url, 0, 1)) == 1
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


def read_range(options: StorageOptions | None, url: str, start: int, end: int, or_all: bool = False) -> bytes:
    """The bytes of a file from `start` up to `end`, fewer where it ends before. `or_all`: all of the file where its server gives
    no less. Raises what the filesystem raises."""
    if start == end:
        return b""
    fs, path = filesystem(url, options)
    displayed = redact(url, options)
    with reaching(displayed):
        try:
            data = fs.cat_file(path, start=start, end=end)
        except Exception as error:
            if not is_of(error, "aiohttp.ClientResponseError") or error.status not in _NOT_FOR_US:
                raise
            raise PermissionError(f"{displayed}: the server answers {error.status} {error.message}") from None
    # A web server without Range support (Python's http.server, say) answers with the whole file.
    return data[start:end] if len(data) > end - start and not or_all else data


def _try_range(options: StorageOptions | None, url: str, start: int, end: int) -> bytes | OSError:
    try:
        return read_range(options, url, start, end)
    except OSError as error:
        if not is_of_one_object(error):
            raise
        return error


class RangedFile(io.RawIOBase):
    """A stretch of a file at a URL, as a file that is read by ranges: larger ones while reading goes straight on. A few are kept.
    Of a server that gives whole files only, the stretch is kept, so that it's asked once.

    `error` is what the filesystem raised last: what reads through C may not hand it on.
    """

    FIRST, LARGEST, KEPT = 2**18, 2**22, 4
    "bytes of the first range, and of the largest; how many are kept"

    def __init__(self, url: str, offset: int, size: int, options: StorageOptions | None):
        self.url, self.size = url, size
        self.error: Exception | None = None
        self._offset, self._options = offset, options
        self._at, self._step = 0, self.FIRST
        self._ranges: list[tuple[int, bytes]] = []
        "where each begins within the stretch; the last one read comes last"

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence])
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = self.size - self._at if size < 0 else min(size, self.size - self._at)
        parts = []
        while left > 0:
            start, data = self._range()
            part = data[self._at - start :][:left]
            if not part:  # the file is shorter than it was
                break
            parts.append(part)
            self._at += len(part)
            left -= len(part)
        return b"".join(parts)

    def _range(self) -> tuple[int, bytes]:
        """The range that the next byte lies in."""
        for each in self._ranges:
            if each[0] <= self._at < each[0] + len(each[1]):
                return each
        goes_on = self._ranges and self._at == self._ranges[-1][0] + len(self._ranges[-1][1])
        self._step = min(2 * self._step, self.LARGEST) if goes_on else self.FIRST
        first, last = self._offset + self._at, self._offset + min(self._at + self._step, self.size)
        try:
            data = read_range(self._options, self.url, first, last, True)
        except Exception as error:
            self.error = error
            raise
        if len(data) > last - first:
            self._ranges = [(0, data[self._offset : self._offset + self.size])]
            return self._range() if self._at < len(self._ranges[0][1]) else (self._at, b"")
        self._ranges = [*self._ranges[1 - self.KEPT :], (self._at, data)]
        return self._ranges[-1]
