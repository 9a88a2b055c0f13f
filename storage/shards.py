"""Bytes of Zarr chunks: encodings by name, and the `sharding_indexed` codec for whole shards.

Written here rather than through zarr-python because a whole shard is all we ever write: no read of the old shard first, one
PUT, rows encoded while the next ones are computed, and 2 to 3 times less CPU than zarr 3.1 (measured by
`python jobs/benchmark.py extract`). tests/storage/test_shards.py holds the bytes equal to zarr-python's own.
"""

from collections.abc import Sequence
from typing import Literal

import google_crc32c
import numpy as np
from numcodecs.zstd import Zstd

from storage.errors import RayliftError
from storage.spec import Compression

FLOAT16_MAX = 65504.0

IndexLocation = Literal["start", "end"]
"""Where the index of a shard lies, as the array's metadata calls it."""

_MAX_BITS = np.float16(FLOAT16_MAX).view(np.uint16)

_ABSENT = np.uint64(2**64 - 1)

# The checksum turns a flipped bit from silently wrong numbers into an error, for 4 bytes a chunk.
_ZSTD = Zstd(level=1, checksum=True)


class DamagedChunk(RayliftError, ValueError):
    """Bytes that aren't what was written: their length or their checksum is wrong."""


def compress(data: np.ndarray, compression: Compression = "zstd") -> bytes:
    """One Zarr chunk: the array's bytes, zstd level 1 with checksum, without the GIL; or as they are, with their crc32c."""
    data = np.ascontiguousarray(data)
    if compression == "none":
        raw = data.tobytes()
        return raw + _crc32c(raw)
    return _ZSTD.encode(data)


def decompress(chunk: bytes | memoryview, out: np.ndarray, compression: Compression = "zstd") -> None:
    """Fill `out` from the chunk that `compress` made of such an array. Raises `DamagedChunk`."""
    if compression == "none":
        data, checksum = chunk[:-4], bytes(chunk[-4:])
        if _crc32c(bytes(data)) != checksum:
            raise DamagedChunk(f"the checksum of its {len(data)} bytes is wrong")
    else:
        try:
            data = _ZSTD.decode(chunk)
        except RuntimeError as error:
            raise DamagedChunk(str(error)) from None
    if len(data) != out.nbytes:
        raise DamagedChunk(f"{len(data)} bytes where {out.nbytes} were expected")
    out[...] = np.frombuffer(data, out.dtype).reshape(out.shape)


def _crc32c(data: bytes) -> bytes:
    """As Zarr's codec of that name has it behind the bytes: little-endian."""
    return google_crc32c.value(data).to_bytes(4, "little")


def encode_row(values: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray | None, int]:
    """Float features [..., C] in the stored dtype, their scale [C] (int8 only), and how many values were clamped.

    float16 clamps what it can't hold to its largest value.
    int8 keeps one float32 scale per channel, max|x| / 127 over the row's cells: x ~ scale * q (symmetric, no zero point).
    """
    if dtype == "float32":
        return np.asarray(values, np.float32), None, 0
    if dtype == "float16":
        # What was cast to float16 on the device is infinite where it overflowed.
        over = np.isinf(values) if values.dtype == np.float16 else np.abs(values) > FLOAT16_MAX
        clipped = int(np.count_nonzero(over))
        if clipped:
            values = np.clip(values, -FLOAT16_MAX, FLOAT16_MAX)
        return values.astype(np.float16, copy=False), None, clipped
    values = np.asarray(values, np.float32)
    scale = np.abs(values).reshape(-1, values.shape[-1]).max(axis=0) / 127
    quantised = np.rint(values / np.where(scale > 0, scale, 1)).astype(np.int8)
    return quantised, scale.astype(np.float32), 0


def count_clipped(values: np.ndarray) -> np.ndarray:
    """How many values of each row, [n, ...] as they are read from a store, have float16's largest value, int64 [n]: those that
    it couldn't hold, and the few that are rounded to it."""
    if values.dtype != np.float16:
        return np.zeros(len(values), np.int64)
    # Their bits but for the sign: NumPy computes with float16 in software.
    bits = np.ascontiguousarray(values).view(np.uint16).reshape(len(values), -1)
    return np.count_nonzero(bits & 0x7FFF == _MAX_BITS, axis=1)


def encode_shard(chunks: Sequence[bytes | None], location: IndexLocation = "end") -> bytes:
    """A Zarr v3 shard (`sharding_indexed`, crc32c) from its encoded inner chunks, its index at `location`.

    None is a missing chunk: readers see the array's fill value there.
    """
    index = np.full((len(chunks), 2), _ABSENT, "<u8")
    offset = index_bytes(len(chunks)) if location == "start" else 0
    for i, chunk in enumerate(chunks):
        if chunk is not None:
            index[i] = offset, len(chunk)
            offset += len(chunk)
    entries = index.tobytes()
    there = [chunk for chunk in chunks if chunk is not None]
    return b"".join([entries, _crc32c(entries), *there] if location == "start" else [*there, entries, _crc32c(entries)])


def index_bytes(rows: int) -> int:
    """Size of the index of a shard of `rows` chunks."""
    return 16 * rows + 4


def decode_index(shard: bytes, rows: int, location: IndexLocation) -> np.ndarray:
    """The index at the `location` of a shard, or of a part of it that holds it: int64 [rows, 2], where each chunk starts and
    ends; (0, 0) for absent ones.

    Raises `DamagedChunk`.
    """
    size = index_bytes(rows)
    if len(shard) < size:
        raise DamagedChunk(f"{len(shard)} bytes, and its index alone has {size}")
    index_part = shard[:size] if location == "start" else shard[-size:]
    entries = index_part[:-4]
    if _crc32c(entries) != index_part[-4:]:
        raise DamagedChunk("the checksum of its index is wrong")
    index = np.frombuffer(entries, "<u8").reshape(rows, 2)
    there = index[:, 0] != _ABSENT
    start, length = np.where(there[:, None], index, 0).astype(np.int64).T
    return np.stack([start, start + length], axis=1)
