"""The bytes of samples' images, and frames of videos, by their rows in an index."""

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from storage.paths import StorageOptions
from storage.ranges import can_be_read, is_of_one_object, read_ranges, try_ranges
from storage.redaction import redact
from storage.spread import spread
from storage.tars import AT
from storage.videos import MAX_PIXELS, Frame, Place, VideoRefused, exact_seconds, opened_video


@dataclass(frozen=True)
class Unread:
    """Why an image can't be read, while the storage answers for others."""

    error: str
    "the exception's name"
    message: str
    stage: str = "read"
    "as the ledger has it: `decode` for a frame of a video that can be read"


Blob = bytes | Unread | None
"""An image's bytes, a `Frame` where it's one of a video; why it can't be read; None where the index says that there is none."""

FRAME_BYTES = 2**26
"""Of frames that are held at once, but for the last of them."""


def read_images(rows: pa.Table, urls: Sequence[str], storage_options: StorageOptions | None = None) -> list[bytes | None]:
    """The image bytes of index rows, in order; None where the index says that there is no image.

    `urls` are the sources' URLs, credentials included. Bytes may be shorter than the index says if the file shrank.
    Raises what the filesystem raises, and `VideoRefused` for a frame that can't be had.
    """
    images, frames = _with_image(rows)
    blobs: list[bytes | None] = [None] * len(rows)
    for i, blob in zip(images, read_ranges(_image_ranges(rows, urls, images), storage_options), strict=True):
        blobs[i] = blob
    for i, frame in _frames(rows, urls, frames, storage_options):
        if isinstance(frame, Exception):
            raise frame
        blobs[i] = frame
    return blobs


ASKED = 8
"""Other sources of an input that are asked for a byte, where none of the images of a task can be read."""


MAX_IMAGE_BYTES = 2**29
"""Largest image that is read where nothing says another limit."""


def try_images(
    rows: pa.Table, urls: Sequence[str], storage_options: StorageOptions | None = None, *, max_bytes: int = MAX_IMAGE_BYTES
) -> list[Blob]:
    """`read_images`, but for images that can't be read while the input's storage answers: those are `Unread`. So are images of
    more than `max_bytes`, of which nothing is read.

    Raises what the filesystem raises where no other image of these rows can be read either, nor one of `ASKED` other sources:
    then it's the storage (its credentials, a mount that is gone), which may be well again tomorrow.
    """
    blobs: list[Blob] = [None] * len(rows)
    for some in try_some(rows, urls, storage_options, max_bytes=max_bytes):
        for i, blob in some.items():
            blobs[i] = blob
    return blobs


def try_some(
    rows: pa.Table,
    urls: Sequence[str],
    storage_options: StorageOptions | None = None,
    *,
    max_bytes: int = MAX_IMAGE_BYTES,
    max_pixels: int = MAX_PIXELS,
    threads: int = 1,
) -> Iterator[dict[int, Blob]]:
    """`try_images` by position: all images at once, then frames as they are decoded, by so many threads, about `FRAME_BYTES` of
    them at a time. A video with frames of more than `max_pixels` isn't decoded; the size of its file has no limit."""
    images, frames = _with_image(rows)
    if images or not frames:
        found = _try_images(rows, urls, images, storage_options, max_bytes)
        yield {i: found.get(i) for i in sorted({*range(len(rows))} - {*frames})}
    some: dict[int, Blob] = {}
    size = 0
    for i, frame in _frames(rows, urls, frames, storage_options, max_pixels=max_pixels, threads=threads):
        if isinstance(frame, OSError):
            _require_answers(frame, [_image_ranges(rows, urls, [i])[0][0]], urls, storage_options)
        some[i] = _unread(frame, storage_options) if isinstance(frame, Exception) else frame
        size += len(frame) if isinstance(frame, bytes) else 0
        if size > FRAME_BYTES:
            yield some
            some, size = {}, 0
    if some:
        yield some


def _try_images(
    rows: pa.Table, urls: Sequence[str], wanted: Sequence[int], options: StorageOptions | None, max_bytes: int
) -> dict[int, Blob]:
    """The images of some rows, by position, as `try_images` has them."""
    sizes = rows["size"].to_pylist()
    blobs: dict[int, Blob] = {}
    for i in wanted:
        if sizes[i] > max_bytes:
            why = f"{sizes[i]} bytes are more than max_image_bytes = {max_bytes}; raise --max-image-bytes if it's an image"
            blobs[i] = Unread("TooLarge", why)
    wanted = [i for i in wanted if i not in blobs]
    ranges = _image_ranges(rows, urls, wanted)
    found = try_ranges(ranges, options)
    errors = {url: blob for (url, _, _), blob in zip(ranges, found, strict=True) if isinstance(blob, OSError)}
    if errors and not any(isinstance(blob, bytes) and blob for blob in found):
        _require_answers(next(iter(errors.values())), errors, urls, options)
    for i, blob in zip(wanted, found, strict=True):
        blobs[i] = blob if isinstance(blob, bytes) else _unread(blob, options)
    return blobs


def _require_answers(error: OSError, failed: Collection[str], urls: Sequence[str], options: StorageOptions | None) -> None:
    """Raise `error` of sources that failed where none of some others can be read."""
    others = [url for url in dict.fromkeys(urls) if url not in failed]
    if not any(can_be_read(others[i], options) for i in spread(len(others), ASKED)):
        raise error


def _unread(error: Exception, options: StorageOptions | None) -> Unread:
    if isinstance(error, VideoRefused):
        return Unread(error.kind, str(error), "decode")
    return Unread(type(error).__name__, redact(str(error), options))


def _with_image(rows: pa.Table) -> tuple[list[int], list[int]]:
    """Positions of the rows that have an image, and of those that have a frame."""
    readable = rows["problem"].is_null().to_numpy()
    frames = are_frames(rows)
    return np.flatnonzero(readable & ~frames).tolist(), np.flatnonzero(readable & frames).tolist()


def are_frames(rows: pa.Table) -> np.ndarray:
    """Which rows are frames of videos."""
    return rows[AT.name].is_valid().to_numpy() if AT.name in rows.column_names else np.zeros(len(rows), bool)


def _image_ranges(rows: pa.Table, urls: Sequence[str], wanted: Sequence[int]) -> list[tuple[str, int, int]]:
    """Where the images of some rows (positions) lie, or their videos: (url, offset, size)."""
    source, offset, size = (rows[name].to_pylist() for name in ("source", "offset", "size"))
    return [(urls[source[i]], offset[i], size[i]) for i in wanted]


def _frames(
    rows: pa.Table,
    urls: Sequence[str],
    wanted: Sequence[int],
    options: StorageOptions | None,
    *,
    max_pixels: int = MAX_PIXELS,
    threads: int = 1,
) -> Iterator[tuple[int, Frame | VideoRefused | OSError]]:
    """The frames of some rows with their positions: each video is opened once, and its frames come in order of time."""
    if not wanted:
        return
    at = rows[AT.name].to_pylist()
    places = dict(zip(wanted, _image_ranges(rows, urls, wanted), strict=True))
    order = sorted(wanted, key=lambda i: (places[i], at[i]))
    for place, same in itertools.groupby(order, places.__getitem__):
        left = list(same)
        try:
            with opened_video(Place(*place), options, threads=threads, max_pixels=max_pixels) as video:
                for frame in video.frames([exact_seconds(at[i]) for i in left]):
                    yield left.pop(0), frame
        except (VideoRefused, OSError) as error:
            if isinstance(error, OSError) and not is_of_one_object(error):
                raise
            yield from ((i, error) for i in left)
