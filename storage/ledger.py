"""Who succeeded and who did not: one commit record per task, one row per sample.

A task is done when its commit record exists; the record is written last and create-only, so of two workers on one task
exactly one counts. Records hold nothing that depends on when or where a task ran: they are the same bytes in every run.
`merge` joins them into `ledger/samples/part-*.parquet`, sorted by row, which is what people read.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.paths import Folder, StorageError
from storage.samples import PART_ROWS, RowTable, part_name, table_bytes
from storage.spec import Layout, ShardTask

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("key", pa.string()),
        ("source", pa.string()),
        ("member", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("status", pa.string()),
        ("stage", pa.string()),
        ("error", pa.string()),
        ("message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("x_scale", pa.float64()),
        ("x_offset", pa.float64()),
        ("y_scale", pa.float64()),
        ("y_offset", pa.float64()),
        ("conversion", pa.string()),
        ("clipped", pa.int64()),
        ("digest", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class SampleRecord:
    """One ledger row.

    `width`, `height`: the upright image in pixels. A pixel (x, y) of it lies at (x_scale * x + x_offset,
    y_scale * y + y_offset) in the model's input, where pixel i covers [i, i + 1).
    """

    row: int
    key: str
    source: str
    member: str
    offset: int
    size: int
    status: str = "ok"
    "`ok` or `failed`"
    stage: str | None = None
    "where it failed: index, read, decode, forward or worker"
    error: str | None = None
    "type of the error"
    message: str | None = None
    width: int | None = None
    height: int | None = None
    x_scale: float | None = None
    x_offset: float | None = None
    y_scale: float | None = None
    y_offset: float | None = None
    conversion: str | None = None
    "what was done to the image beyond decoding, for example `exif-rotate, grey->rgb`"
    clipped: int = 0
    "feature values beyond float16's range, clamped"
    digest: str | None = None
    "`image_digest` of the bytes that were read; None where none were"


def image_digest(data: bytes) -> str:
    """What identifies an image's bytes: the first 32 hex digits of their sha256."""
    return hashlib.sha256(data).hexdigest()[:32]


class Ledger:
    """The records of one store."""

    def __init__(self, folder: Folder):
        self.folder = folder
        self._merged = RowTable(folder, "ledger/samples")

    @staticmethod
    def commit_name(block: int) -> str:
        return f"ledger/commits/{block:08d}.parquet"

    def commit(self, task: ShardTask, records: Sequence[SampleRecord], objects: Mapping[str, int]) -> bool:
        """Declare `task` done; False if another worker did so before.

        `objects` are the names and sizes in bytes of the shards written for it, in the store's folder.
        """
        if [record.row for record in records] != list(range(task.first, task.last)):
            raise StorageError(
                f"task {task.block} must commit rows {task.first} to {task.last}, each once and in order"
            )
        table = pa.Table.from_pylist([asdict(record) for record in records], schema=SCHEMA)
        metadata = {"task": json.dumps(asdict(task)), "objects": json.dumps(dict(sorted(objects.items())))}
        return self.folder.write_new(self.commit_name(task.block), table_bytes(table, metadata))

    def done(self) -> set[int]:
        """Blocks whose commit record exists."""
        return {int(name.split(".")[0]) for name in self.folder.sizes("ledger/commits")}

    def revoke(self, blocks: Iterable[int]) -> None:
        """Make tasks pending again, to retry their failed rows."""
        self.folder.remove(self.commit_name(block) for block in blocks)

    def records(self, blocks: Sequence[int]) -> Iterator[tuple[int, pa.Table]]:
        """Commit records of `blocks`, read concurrently: (block, table)."""
        return self._each(blocks, self._read_commit)

    @staticmethod
    def _each(blocks: Sequence[int], ask: Callable[[int], Any]) -> Iterator[tuple[int, Any]]:
        """What `ask` says of every block, many at once, in order."""
        with ThreadPoolExecutor(16) as pool:
            for start in range(0, len(blocks), 256):
                window = blocks[start : start + 256]
                yield from zip(window, pool.map(ask, window), strict=True)

    def _read_commit(self, block: int) -> pa.Table:
        return pq.read_table(pa.BufferReader(self.folder.read(self.commit_name(block))))

    def torn(self, blocks: Sequence[int]) -> list[int]:
        """Blocks of which a shard is missing or has another size than was committed."""
        return [block for block, intact in self._each(blocks, self._is_intact) if not intact]

    def _is_intact(self, block: int) -> bool:
        objects = json.loads((self._read_commit(block).schema.metadata or {})[b"objects"])
        return all(self.folder.size(name) == size for name, size in objects.items())

    def merge(self, layout: Layout) -> dict[str, int]:
        """Join all commit records into `ledger/samples/part-*.parquet`; returns counts by status.

        Raises `StorageError` unless every row of the layout has exactly one record.
        """
        counts: dict[str, int] = {}
        blocks_per_part = PART_ROWS // layout.block_rows
        for part, first in enumerate(range(0, layout.n_blocks, blocks_per_part)):
            blocks = list(range(first, min(first + blocks_per_part, layout.n_blocks)))
            table = pa.concat_tables([t.replace_schema_metadata(None) for _, t in self.records(blocks)])
            expected = range(part * PART_ROWS, min((part + 1) * PART_ROWS, layout.n_rows))
            if len(table) != len(expected) or table["row"].to_pylist() != list(expected):
                raise StorageError(
                    f"{self.folder.shown}: the ledger's rows don't add up in part {part}; keep the store, report this"
                )
            for item in pc.value_counts(table["status"]).to_pylist():
                counts[item["values"]] = counts.get(item["values"], 0) + item["counts"]
            self.folder.write(part_name("ledger/samples", part), table_bytes(table))
        return counts

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The merged ledger. Raises `FileNotFoundError` before the first run has finished."""
        names = sorted(name for name in self.folder.sizes("ledger/samples") if name.endswith(".parquet"))
        if not names:
            raise FileNotFoundError(f"{self.folder.shown} has no merged ledger yet: its first run has not finished")
        data = self.folder.read_many([f"ledger/samples/{name}" for name in names])
        return pa.concat_tables([pq.read_table(pa.BufferReader(d), columns=columns) for d in data])

    def take(self, rows: np.ndarray, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of the merged ledger by their numbers, in that order; reads only the row groups that hold them."""
        return self._merged.take(rows, columns)

    def take_committed(self, rows: np.ndarray, layout: Layout, columns: Sequence[str] | None = None) -> pa.Table:
        """The same from the commit records, for a store that is being written: null but for `row` where there is none yet."""
        blocks, at = np.unique(rows // layout.block_rows, return_inverse=True)
        done = self.done()
        known = dict(self.records([int(b) for b in blocks if int(b) in done]))
        tables = []
        for i, block in enumerate(blocks.tolist()):
            mine = rows[at == i]
            if block in known:
                tables.append(known[block].replace_schema_metadata(None).take(mine - layout.task(block).first))
            else:
                tables.append(pa.Table.from_pylist([{"row": row} for row in mine.tolist()], schema=SCHEMA))
        order = np.argsort(np.argsort(at, kind="stable"), kind="stable")
        table = pa.concat_tables(tables).take(order) if tables else SCHEMA.empty_table()
        return table.select(columns) if columns else table

    def failed(self, blocks: Sequence[int]) -> pa.Table:
        """Failed rows of committed `blocks`, from their records."""
        tables = [table.filter(pc.equal(table["status"], "failed")) for _, table in self.records(blocks)]
        tables = [table.replace_schema_metadata(None) for table in tables]
        return pa.concat_tables(tables) if tables else SCHEMA.empty_table()


@dataclass(frozen=True, kw_only=True)
class FailureGroup:
    """Failed rows of one reason: messages that differ in numbers or quoted text only are one."""

    stage: str
    error: str
    message: str
    "of the first of them"
    count: int
    keys: tuple[str, ...]
    "the first few"

    def __str__(self) -> str:
        return f"{self.count:,} x {self.stage}: {self.error}: {self.message} (e.g. {self.keys[0]!r})"


REASON_COLUMNS = ("key", "stage", "error", "message")
"""What `group_failures` needs of a ledger row."""


def group_failures(failed: pa.Table) -> list[FailureGroup]:
    """The reasons of failed rows, the commonest first."""
    groups: dict[str, list[dict[str, str]]] = {}
    for row in failed.select(REASON_COLUMNS).to_pylist():
        kind = re.sub(r"\d+|'.*?'|b\".*?\"", "#", f"{row['stage']}: {row['error']}: {row['message']}")
        groups.setdefault(kind, []).append(row)
    return [
        FailureGroup(
            **{name: rows[0][name] for name in ("stage", "error", "message")},
            count=len(rows),
            keys=tuple(row["key"] for row in rows[:5]),
        )
        for rows in sorted(groups.values(), key=len, reverse=True)
    ]


def commonest_reasons(failed: pa.Table, top: int = 5) -> list[str]:
    """The `top` reasons of failed rows, in words, with an example key each."""
    return [str(group) for group in group_failures(failed)[:top]]
