"""Rows of one level, straight from the shards: cached shard indexes, concurrent ranged reads, zstd into one array.

Faster than indexing the array with zarr-python, which reads a shard's index again for every row (measured by
`python jobs/benchmark.py read`); tests/storage/test_reader.py holds the two equal. What is there and what isn't is known
from the shard's index, so that an absent row costs nothing and is never a guess from its numbers.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from storage.kept import Kept
from storage.paths import Folder, StorageError
from storage.ranges import merge_ranges
from storage.shards import DamagedChunk, IndexLocation, decode_index, decompress, index_bytes
from storage.spec import Layout, Level

T = TypeVar("T")

CACHE_BYTES = 2**26
"""What one level keeps: indexes of shards (16 bytes a row), or whole chunks of vectors."""

WINDOW_BYTES = 2**27
"""Compressed bytes that one call holds at a time, beside its result."""

_THREADS = min(8, os.cpu_count() or 1)


class _Stale(StorageError):
    """A shard isn't what its index, read before, says."""


class LevelReader:
    """Reads rows of `level`, whose shards have their index at `location`, also from several threads at once.

    `grows`: the store is being written, so that rows may come to a shard that was read before: its last one, where it has grown.
    """

    def __init__(self, folder: Folder, layout: Layout, level: Level, location: IndexLocation, *, grows: bool = False):
        self.folder, self.layout, self.level, self.location, self.grows = folder, layout, level, location, grows
        self.name = f"{level.name}/features"
        self.shard_rows = layout.shard_rows(level)
        self.dtype = np.dtype("float32" if level.dtype == "int8" else level.dtype)
        self._indexes = _kept()
        self._vectors = {"features": _kept(), "scale": _kept()}

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of any order and number: values [n, *row_shape] (int8 undone to float32), and which are there, bool [n].

        Rows that aren't there are NaN. Raises `StorageError` on damaged chunks.
        """
        unique, back = np.unique(np.asarray(rows, np.int64), return_inverse=True)
        try:
            values, there = self._read(unique)
        except _Stale:
            values, there = self._read(unique)  # by the index as it is now; a second time it's damage
        in_order = np.array_equal(back, np.arange(len(unique)))
        return (values, there) if in_order else (values[back], there[back])

    def _read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`read` for sorted rows, each once."""
        if self.level.grid is None:
            values = self._read_vectors("features", rows).astype(self.dtype, copy=False)
            return values, np.logical_not(np.isnan(values).all(axis=1))
        values, there = self._read_maps(rows)
        if self.level.dtype == "int8":
            scale = self._read_vectors("scale", rows)
            there &= ~np.isnan(scale).all(axis=1)
            values = np.where(there[:, None, None, None], values * scale[:, None, None], np.float32(np.nan))
        return values, there

    # --- maps: a chunk per row, shards ------------------------------------------------------------------------------

    def _read_maps(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        unset = 0 if self.level.dtype == "int8" else np.nan
        values = np.full((len(rows), *self.level.row_shape), unset, self.level.dtype)
        there = np.zeros(len(rows), bool)
        groups = _positions_by(rows, self.shard_rows)
        # A shard of which half is wanted is read whole, index included; of the others, indexes first.
        parts = []
        for shard, at in groups:
            if 2 * len(at) >= self._rows_in(shard):
                there[at] = self._read_whole(shard, rows[at] % self.shard_rows, values, at)
            else:
                parts.append((shard, at))
        for some in _batches(parts, 1024):
            indexes = {
                shard: index
                for shard, at in some
                if (index := self._indexes.get(shard)) is not None
                and not (self.grows and (index[rows[at] % self.shard_rows, 1] == 0).any())
            }
            indexes |= self._fetch_indexes([shard for shard, _ in some if shard not in indexes])
            suspects = self._read_parts(some, indexes, rows, values, there)
            self._refuse_rewritten(suspects, indexes)
        return values, there

    def _shard_name(self, shard: int) -> str:
        return f"{self.name}/c/{shard}/0/0/0"

    def _read_whole(self, shard: int, positions: np.ndarray, values: np.ndarray, at: np.ndarray) -> np.ndarray:
        # More than a whole shard can take, so that no request for its size comes first.
        bound = index_bytes(self.shard_rows) + self.shard_rows * (2 * self.level.row_bytes + 1024)
        data = self.folder.read_ranges([(self._shard_name(shard), 0, bound)])[0]
        if data is None:
            return np.zeros(len(at), bool)
        index = self._decode_index(shard, data)
        there = index[positions, 1] > 0
        jobs = [(data[slice(*index[p])], values[i], shard) for p, i, ok in zip(positions, at, there, strict=True) if ok]
        self._decode(jobs)
        return there

    def _fetch_indexes(self, shards: Sequence[int]) -> dict[int, np.ndarray]:
        """The indexes of those shards that exist, as they are now, for the cache."""
        size, names = index_bytes(self.shard_rows), [self._shard_name(shard) for shard in shards]
        at_start = self.location == "start"
        found = self.folder.read_ranges([(name, 0, size) for name in names]) if at_start else self.folder.read_ends(names, size)
        # A shard that isn't there may be, next time.
        fetched = {s: self._decode_index(s, data) for s, data in zip(shards, found, strict=True) if data is not None}
        for shard, index in fetched.items():
            self._indexes.put(shard, index)
        return fetched

    def _refuse_rewritten(self, suspects: Sequence[int], indexes: Mapping[int, np.ndarray]) -> None:
        """Raise `_Stale` if a shard is no longer the one of its index, now that chunks were read by it."""
        now = self._fetch_indexes(suspects)
        for shard in suspects:
            if not np.array_equal(indexes[shard], now.get(shard, ())):
                raise _Stale(f"{self._shown(shard)} was rewritten while it was read; read it again")

    def _could_be_another(self, index: np.ndarray, positions: np.ndarray) -> bool:
        """Whether other chunks may lie in these chunks' places by now, without a checksum telling.

        Only absent rows can come to a shard (--retry-failed), and they move what follows back. In the place of a chunk that
        follows an absent row then lies that row; in another's, a chunk before it, if both are equally long.
        """
        length = index[:, 1] - index[:, 0]
        holes = np.count_nonzero(length == 0)
        present = np.flatnonzero(length)
        for rank in np.searchsorted(present, positions) if holes else ():
            before = present[max(0, rank - holes) : rank]
            follows_hole = present[rank] > (present[rank - 1] + 1 if rank else 0)
            if follows_hole or (length[before] == length[present[rank]]).any():
                return True
        return False

    def _rows_in(self, shard: int) -> int:
        return min(self.shard_rows, self.layout.n_rows - shard * self.shard_rows)

    def _decode_index(self, shard: int, data: bytes) -> np.ndarray:
        try:
            return decode_index(data, self.shard_rows, self.location)
        except DamagedChunk as error:
            raise StorageError(f"{self._shown(shard)} is damaged: {error}") from None

    def _read_parts(
        self,
        groups: Iterable[tuple[int, np.ndarray]],
        indexes: Mapping[int, np.ndarray],
        rows: np.ndarray,
        values: np.ndarray,
        there: np.ndarray,
    ) -> list[int]:
        """Read chunks by their ranges, a window of bytes at a time; returns shards whose index must be looked at again."""
        wanted: list[tuple[int, int, int, int]] = []  # shard, start, stop, position in `rows`
        suspects = []
        for shard, at in groups:
            if shard not in indexes:
                continue
            index = indexes[shard][: self._rows_in(shard)]
            spans = index[rows[at] % self.shard_rows]
            there[at] = spans[:, 1] > 0
            if self._could_be_another(index, rows[at[there[at]]] % self.shard_rows):
                suspects.append(shard)
            wanted += [(shard, int(a), int(b), int(i)) for (a, b), i in zip(spans, at, strict=True) if b]
        for window in _windows(wanted):
            ranges = [(self._shard_name(shard), a, b - a) for shard, a, b, _ in window]
            merged = merge_ranges(ranges)
            requests = [(ranges[i][0], ranges[i][1], ranges[j][1] + ranges[j][2] - ranges[i][1]) for i, j in merged]
            blobs = self.folder.read_ranges(requests)
            jobs = []
            for (i, j), (_, first, _), blob in zip(merged, requests, blobs, strict=True):
                data = memoryview(blob or b"")
                jobs += [(data[a - first : b - first], values[at], shard) for shard, a, b, at in window[i : j + 1]]
            self._decode(jobs)
        return suspects

    def _decode(self, jobs: Sequence[tuple[bytes | memoryview, np.ndarray, int]]) -> None:
        if len(jobs) < 8:
            for job in jobs:
                self._decode_one(*job)
            return
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(self._decode_one, *zip(*jobs, strict=True)))

    def _decode_one(self, chunk: bytes | memoryview, out: np.ndarray, shard: int) -> None:
        try:
            decompress(chunk, out, self.level.compression)
        except DamagedChunk as error:
            # Also what a shard looks like that was rewritten (--retry-failed) since its index was read.
            self._indexes.drop(shard)
            raise _Stale(
                f"{self._shown(shard)} is damaged, or was rewritten while it was read: {error}. If the error stays, delete the "
                "task's record in ledger/commits and continue the extraction"
            ) from None

    def _shown(self, shard: int) -> str:
        return f"{self.folder.displayed}/{self._shard_name(shard)}"

    # --- vectors: a chunk per block -----------------------------------------------------------------------------------

    def _read_vectors(self, array: str, rows: np.ndarray) -> np.ndarray:
        size = self.layout.block_rows
        dtype = "float32" if array == "scale" else self.level.dtype
        out = np.full((len(rows), self.level.channels), np.nan, dtype)
        groups = dict(_positions_by(rows, size))
        for some in _batches(list(groups), 256):
            for block, chunk in self._vector_chunks(array, some, dtype).items():
                out[groups[block]] = chunk[rows[groups[block]] % size]
        return out

    def _vector_chunks(self, array: str, blocks: Sequence[int], dtype: str) -> dict[int, np.ndarray]:
        """Decoded chunks [block_rows, C] by block, those that exist."""
        cache, shape = self._vectors[array], (self.layout.block_rows, self.level.channels)
        chunks = {block: chunk for block in blocks if (chunk := cache.get(block)) is not None}
        missing = [block for block in blocks if block not in chunks]
        names = [f"{self.level.name}/{array}/c/{block}/0" for block in missing]
        bound = 2 * int(np.prod(shape)) * np.dtype(dtype).itemsize + 1024
        found = self.folder.read_ranges([(name, 0, bound) for name in names])
        for block, name, data in zip(missing, names, found, strict=True):
            if data is None:
                continue
            chunks[block] = np.empty(shape, dtype)
            try:
                decompress(data, chunks[block], "zstd" if array == "scale" else self.level.compression)
            except DamagedChunk as error:
                raise StorageError(f"{self.folder.displayed}/{name} is damaged: {error}") from None
            # One with absent rows may be filled by --retry-failed.
            if not np.isnan(chunks[block][: self.layout.task(block).n_rows, 0]).any():
                cache.put(block, chunks[block])
        return chunks


def _kept() -> Kept[int, np.ndarray]:
    return Kept(CACHE_BYTES, lambda array: array.nbytes)


def _batches(items: Sequence[T], size: int) -> Iterable[Sequence[T]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _positions_by(rows: np.ndarray, size: int) -> list[tuple[int, np.ndarray]]:
    """Positions in `rows`, grouped by `row // size`, within a group by row."""
    order = np.argsort(rows, kind="stable")
    groups = rows[order] // size
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    parts = zip(starts, np.split(order, starts[1:]), strict=True) if len(rows) else ()
    return [(int(groups[a]), at) for a, at in parts]


def _windows(wanted: Sequence[tuple[int, int, int, int]]) -> Iterable[Sequence[tuple[int, int, int, int]]]:
    """Runs of chunks with at most WINDOW_BYTES together."""
    first, held = 0, 0
    for i, (_, start, stop, _) in enumerate(wanted):
        if i > first and held + stop - start > WINDOW_BYTES:
            yield wanted[first:i]
            first, held = i, 0
        held += stop - start
    if first < len(wanted):
        yield wanted[first:]
