"""Rows of an input, gathered as they come and put in order by their keys: any number of them, in bounded memory.

What is gathered lies in temporary files that have no name on the disk, so that a killed process leaves none; small ones stay
in memory.
"""

import bisect
import heapq
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.paths import StorageError
from storage.words import what_the_disk_says

CHUNK_ROWS = 2**13
"""Rows that are kept, and read again, together."""

RUN_ROWS = 2**20
"""Keys that are sorted at once, and that are merged at once, about."""

MEMORY_BYTES = 2**24
"""Bytes of a temporary file above which it lies on the disk."""

KEYS_SCHEMA = pa.schema([("key", pa.string()), ("row", pa.int64())])
"""Keys in order, each with its row."""

SHOWN_KEYS, SHOWN_ROWS = 5, 4
"""Of keys that repeat, and of the rows of each, so many are kept: those that come first."""


class Spool:
    """Tables in a temporary file, compressed, by their numbers."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=MEMORY_BYTES)  # noqa: SIM115 - it goes with the spool
        self._bounds: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._bounds)

    def append(self, table: pa.Table) -> None:
        """Raises `StorageError` for a disk that takes nothing more."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
            writer.write_table(table)
        data = sink.getvalue()
        try:
            start = self._file.seek(0, os.SEEK_END)
            self._file.write(memoryview(data))
        except OSError as error:
            raise StorageError(
                f"{tempfile.gettempdir()}: {what_the_disk_says(error)}; rows wait there to be written in order (TMPDIR names "
                "another folder)"
            ) from None
        self._bounds.append((start, data.size))

    def __getitem__(self, number: int) -> pa.Table:
        start, size = self._bounds[number]
        self._file.seek(start)
        return pa.ipc.open_stream(self._file.read(size)).read_all()

    def __iter__(self) -> Iterator[pa.Table]:
        return (self[number] for number in range(len(self)))


def cut(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of `rows`, the last of which may have fewer, each in one chunk."""
    waiting: list[pa.Table] = []
    count = 0
    for table in tables:
        waiting.append(table)
        count += len(table)
        if count >= rows:
            joined = pa.concat_tables(waiting)
            whole = count - count % rows
            yield from (joined.slice(start, rows).combine_chunks() for start in range(0, whole, rows))
            waiting, count = [joined.slice(whole)], count - whole
    if count:
        yield pa.concat_tables(waiting).combine_chunks()


class GatheredRows:
    """Rows of an index in the order in which they are appended, with their keys in order. Once the order was asked for, no rows
    are appended any more."""

    def __init__(self) -> None:
        self.null_counts: dict[str, int] = {}
        "by column"
        self._rows, self._keys = Spool(), _SortedRuns()
        self._waiting: list[pa.Table] = []
        self._count = self._n_waiting = 0

    @classmethod
    def of(cls, table: pa.Table) -> "GatheredRows":
        rows = cls()
        rows.append(table)
        return rows

    def __len__(self) -> int:
        return self._count

    def append(self, table: pa.Table) -> None:
        for name in table.column_names:
            self.null_counts[name] = self.null_counts.get(name, 0) + table[name].null_count
        self._keys.append(table["key"])
        self._waiting.append(table)
        self._count += len(table)
        self._n_waiting += len(table)
        if self._n_waiting >= CHUNK_ROWS:
            joined = pa.concat_tables(self._waiting)
            whole = len(joined) - len(joined) % CHUNK_ROWS
            for chunk in cut([joined.slice(0, whole)], CHUNK_ROWS):
                self._rows.append(chunk)
            self._waiting, self._n_waiting = [joined.slice(whole)], len(joined) - whole

    def chunks(self) -> Iterator[pa.Table]:
        """All rows, in order."""
        yield from self._rows
        if self._n_waiting or not len(self._rows):
            yield pa.concat_tables(self._waiting)

    def table(self) -> pa.Table:
        """All rows, for inputs that are known to be small."""
        return pa.concat_tables(self.chunks())

    def take(self, numbers: Sequence[int]) -> pa.Table:
        """A few rows."""
        found = []
        for number in numbers:
            chunk, at = divmod(number, CHUNK_ROWS)
            table = self._rows[chunk] if chunk < len(self._rows) else pa.concat_tables(self._waiting)
            found.append(table.slice(at, 1))
        return pa.concat_tables(found)

    def keys(self) -> Iterator[pa.Table]:
        """All keys in order, each with its row (`KEYS_SCHEMA`)."""
        return iter(self._keys.merged)

    def repeated(self) -> tuple[int, list[list[int]]]:
        """How many keys belong to several rows; the first few rows of those few of them that come first."""
        _ = self._keys.merged
        return self._keys.n_repeated, [rows for _, rows in sorted((-first, rows) for first, rows in self._keys.repeated)]


class _SortedRuns:
    """Keys in stretches that are sorted each, and merged when all are there."""

    def __init__(self) -> None:
        self._spool = Spool()
        self._runs: list[tuple[int, list[str]]] = []
        "the number of each run's first chunk, and the first keys of its chunks"
        self._waiting: list[pa.ChunkedArray] = []
        self._count = self._n_waiting = 0
        self._merged: Spool | None = None
        self.n_repeated = 0
        self.repeated: list[tuple[int, list[int]]] = []
        "a heap of rows of one key each, with the first of them, negative"

    def append(self, keys: pa.ChunkedArray) -> None:
        assert self._merged is None, "the order was asked for already"
        self._waiting.append(keys)
        self._n_waiting += len(keys)
        if self._n_waiting >= RUN_ROWS:
            self._sort()

    def _sort(self) -> None:
        rows = np.arange(self._count, self._count + self._n_waiting)
        # As `string`, what is sorted could hold 2 GB of keys at most.
        keys = pa.chunked_array([chunk for keys in self._waiting for chunk in keys.chunks], pa.string()).cast(pa.large_string())
        table = _in_order(pa.table({"key": keys.combine_chunks(), "row": rows}))
        first = len(self._spool)
        for chunk in cut([table], CHUNK_ROWS):
            self._spool.append(chunk)
        firsts = [table["key"][start].as_py() for start in range(0, len(table), CHUNK_ROWS)]
        self._runs.append((first, firsts))
        self._count += self._n_waiting
        self._waiting, self._n_waiting = [], 0

    @property
    def merged(self) -> Spool:
        """All keys, in order."""
        if self._merged is None:
            if self._n_waiting:
                self._sort()
            self._merged = Spool()
            for table in cut(self._stretches(), CHUNK_ROWS):
                self._merged.append(table.cast(KEYS_SCHEMA))
            self._spool = Spool()  # what is merged isn't kept twice
        return self._merged

    def _stretches(self) -> Iterator[pa.Table]:
        """All keys in order, in tables of about `RUN_ROWS`; those of one key are in one table."""
        firsts = sorted(key for _, firsts in self._runs for key in firsts)
        # A stretch has as many chunks as begin in it, and parts of one more of each run.
        bounds = sorted(set(firsts[:: RUN_ROWS // CHUNK_ROWS]))
        for low, high in zip(bounds, [*bounds[1:], None], strict=True):
            found = [table for run in self._runs if len(table := self._between(run, low, high))]
            table = _in_order(pa.concat_tables(found)) if len(found) > 1 else found[0]
            self._count_repeated(table)
            yield table

    def _between(self, run: tuple[int, list[str]], low: str, high: str | None) -> pa.Table:
        """The keys of a run from `low` up to `high`, which isn't among them; None: to the end."""
        number, firsts = run
        # A chunk ends where the next one begins, which may be with the key that it ends with.
        start = max(0, bisect.bisect_left(firsts, low) - 1)
        stop = len(firsts) if high is None else bisect.bisect_left(firsts, high)
        tables = [self._spool[number + i] for i in range(start, stop)]
        if not tables:
            return pa.table({"key": pa.array([], pa.large_string()), "row": pa.array([], pa.int64())})
        table = pa.concat_tables(tables)
        inside = pc.greater_equal(table["key"], pa.scalar(low, pa.large_string()))
        if high is not None:
            inside = pc.and_(inside, pc.less(table["key"], pa.scalar(high, pa.large_string())))
        return table.filter(inside)

    def _count_repeated(self, table: pa.Table) -> None:
        keys = table["key"].combine_chunks()
        same = pc.equal(keys.slice(1), keys.slice(0, max(0, len(keys) - 1))).to_numpy(zero_copy_only=False)
        if not same.any():
            return
        # Where a stretch of equal keys begins, and where it ends.
        edges = np.diff(np.concatenate([[False], same, [False]]).astype(np.int8))
        begins, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        self.n_repeated += len(begins)
        rows = table["row"].to_numpy()
        for begin, end in zip(begins, ends, strict=True):
            some = np.sort(rows[begin : end + 1])[:SHOWN_ROWS].tolist()
            push = heapq.heappush if len(self.repeated) < SHOWN_KEYS else heapq.heappushpop
            push(self.repeated, (-some[0], some))


def _in_order(table: pa.Table) -> pa.Table:
    table = table.combine_chunks()
    return table.take(pc.sort_indices(table["key"]))
