"""Who succeeded and who did not: one commit record per task, one row per sample.

A task is done when its commit record exists; the record is written last and create-only, so of two workers on one task
exactly one counts. Records hold nothing that depends on when or where a task ran: they are the same bytes in every run.
`merge` joins them into `ledger/samples/part-*.parquet`, sorted by row, which is what people read.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.commits import Commits, Held, Packing, Packs, Put
from storage.documents import DamagedObject, decode, parse_json, schema_of, with_columns
from storage.gathered import Spool, cut
from storage.paths import Folder, StorageError
from storage.sample_arrays import sample_chunks
from storage.samples import PART_ROWS, ROW_GROUP_ROWS, Parts, SampleIndex, part_files, part_name, table_bytes
from storage.sources import Source
from storage.spec import Layout, Level, ShardTask
from storage.totals import Totals
from storage.videos import Frame

logger = logging.getLogger(__name__)

COMMITS = "ledger/commits"
"""Where the records of a store's tasks lie."""


def commits_of(level: str) -> str:
    """Where those of a level lie that was added later."""
    return f"ledger/added/{level}"


T = TypeVar("T")


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
    "feature values beyond float16's range, of all levels, that were clamped"
    digest: str | None = None
    "`image_digest` of the bytes that were read; None where none were"
    time: float | None = None
    "of a frame of a video: its presentation time in seconds, as the file has it"


SCHEMA = schema_of(SampleRecord, width=pa.int32(), height=pa.int32())
"""Columns of the ledger: the fields of `SampleRecord`."""

_LATER = ("digest",)
"""Columns that format 2 hasn't."""

_PLACES = ("source", "member", "offset", "size")
"""Columns of an index that say where an image lies."""

_OF_FRAMES = ("time",)
"""Columns of tables that have frames of videos, and no others."""


def image_digest(data: bytes) -> str:
    """What identifies an image's bytes: the first 32 hex digits of their sha256. A frame's are those it was decoded from, which
    other versions of a decoder don't change."""
    return data.digest if isinstance(data, Frame) else hashlib.sha256(data).hexdigest()[:32]


def _unsaid(table: pa.Table) -> set[str]:
    """Columns of a table of `SCHEMA` that no row of it has use for; they are left out where it is written."""
    return {name for name in _OF_FRAMES if table[name].null_count == len(table)}


class Ledger:
    """The records of one store: of its layout and levels, under its fingerprint.

    `unmarked`: records without a fingerprint count too, which format 2 wrote. `sample_arrays`: `merge` writes those, too.
    `sizes`: how many rows the store had when it grew; a block that wasn't full then may have a record of those rows yet.
    `commits`: the folder of the records; `packs`: whether they may lie in packs. `added`: ledgers of levels that were added
    later, whose records may lie apart: of blocks that were done before.
    What is read is checked; what isn't as it must be raises `DamagedObject`, which names it.
    """

    def __init__(
        self,
        folder: Folder,
        layout: Layout,
        levels: Sequence[Level],
        fingerprint: str,
        *,
        unmarked: bool = False,
        sample_arrays: bool = False,
        sizes: Iterable[int] = (),
        commits: str = COMMITS,
        packs: Packs = "none",
        added: Sequence["Ledger"] = (),
    ):
        self.folder, self.layout, self.levels = folder, layout, levels
        self.fingerprint, self.unmarked, self.sample_arrays = fingerprint, unmarked, sample_arrays
        self.commits, self.added = Commits(folder, commits, layout, packs), tuple(added)
        self._merged = Parts(folder, "ledger/samples", layout.n_rows, SCHEMA, optional=(*_LATER, *_OF_FRAMES))
        self._ends: dict[int, set[int]] = {}
        "where blocks ended before they grew, by block"
        for n_rows in sizes:
            block = n_rows // layout.block_rows
            if n_rows % layout.block_rows and n_rows < layout.task(block).last:
                self._ends.setdefault(block, set()).add(n_rows)

    def commit(self, task: ShardTask, records: Sequence[SampleRecord], objects: Mapping[str, int]) -> bool:
        """Declare `task` done; False if there is a record of it, which another worker wrote.

        `objects` are the names and sizes in bytes of the shards written for it, in the store's folder.
        """
        if [record.row for record in records] != list(range(task.first, task.last)):
            raise StorageError(f"task {task.block} must commit rows {task.first} to {task.last}, each once and in order")
        # Create-only: the slower of two workers on one task must not put its record over the other's, whose shards may be read.
        return self.folder.write_new(self.commits.name(task.block), self._record_bytes(task, records, objects))

    def replace(self, task: ShardTask, records: Sequence[SampleRecord], objects: Mapping[str, int]) -> None:
        """Put `task`'s record over one that isn't this store's, or is of the fewer rows that it had before the store grew."""
        self.folder.write(self.commits.name(task.block), self._record_bytes(task, records, objects))

    def _record_bytes(self, task: ShardTask, records: Sequence[SampleRecord], objects: Mapping[str, int]) -> bytes:
        return self.record_bytes(task, pa.Table.from_pylist([asdict(record) for record in records], schema=SCHEMA), objects)

    def record_bytes(self, task: ShardTask, table: pa.Table, objects: Mapping[str, int]) -> bytes:
        """What `commit` writes, of rows as a table of `SCHEMA`."""
        metadata = {
            "task": json.dumps(asdict(task)),
            # Sorted, so that the record's bytes don't depend on the order in which shards were written.
            "objects": json.dumps(dict(sorted(objects.items()))),
            "fingerprint": self.fingerprint,
        }
        return table_bytes(table.drop_columns(list(_unsaid(table))), metadata)

    def done(self, listed: set[int] | None = None) -> set[int]:
        """Blocks whose commit record exists, of all their rows; of those that are `listed`, where somebody asked."""
        listed = self.listed() if listed is None else listed
        return listed - {block for block in listed.intersection(self._ends) if self.begun(block) is not None}

    def begun(self, block: int) -> pa.Table | None:
        """The record of a block as it was before the store grew, where there is none of all its rows yet; None where there is
        one, or none at all."""
        if block not in self._ends:
            return None
        try:
            record = self.record(block)
        except DamagedObject:
            return None
        return record if len(record) < self.layout.task(block).n_rows else None

    def begun_rows(self) -> int:
        """How many rows such records hold."""
        return sum(len(record) for block in self._ends if (record := self.begun(block)) is not None)

    def listed(self) -> set[int]:
        """Blocks whose commit record exists, also of some of their rows only: those that there were before the store grew."""
        return self.commits.listed()

    def revoke(self, blocks: Collection[int], put: Put | None = None) -> None:
        """Remove the records of tasks, which makes them pending again. `put` writes packs anew that had some of them."""
        # Those apart come last: alone, they say nothing.
        for ledger in (self, *self.added):
            ledger.commits.revoke(blocks, put or self.folder.write)

    def remove_packed(self, look: Callable[[], None]) -> None:
        """Remove the records that lie in packs, too, of a finished store. `look` raises where it isn't this store any more."""
        for ledger in (self, *self.added):
            ledger.commits.remove_packed(look)

    def records(self, blocks: Sequence[int]) -> Iterator[tuple[int, pa.Table]]:
        """Commit records of `blocks`, read concurrently: (block, table)."""
        return self._each(blocks, self.record)

    def _each(self, blocks: Sequence[int], ask: Callable[[int, Held], T]) -> Iterator[tuple[int, T]]:
        """What `ask` says of every block, of which it's given what was read already, many at once, in order."""
        for window, found, _ in self._windows(blocks, ask, [self]):
            yield from zip(window, found, strict=True)

    @staticmethod
    def _windows(
        blocks: Sequence[int], ask: Callable[[int, Held], T], ledgers: Sequence["Ledger"]
    ) -> Iterator[tuple[Sequence[int], list[T], Packing]]:
        """The same in windows, since a pool given all blocks at once would read ahead and hold every record in memory; and the
        records of each that were read, to be packed where the blocks are all that there are. `ledgers`: whose records `ask`
        will read."""
        commits = [each.commits for each in ledgers]
        alone, size = [each.known_alone() for each in commits], commits[0].per_pack
        with ThreadPoolExecutor(16) as pool:
            for start in range(0, len(blocks), size):
                window, held = blocks[start : start + size], Held()
                for each, some in zip(commits, alone, strict=True):
                    held |= each.packed(window, some)
                yield window, list(pool.map(ask, window, itertools.repeat(held))), Packing(start // size, commits, alone, held)

    def record(self, block: int, held: Held | None = None) -> pa.Table:
        """The commit record of a block: `SCHEMA`, and the objects among its metadata. It's of the block's first rows where the
        store grew since. `held`: records that were read, to which this one comes. Raises `DamagedObject`."""
        document, data = self.commits.read(block, {} if held is None else held)
        table = document.table(SCHEMA, optional=(*_OF_FRAMES, *(_LATER if self.unmarked else ())), data=data)
        with document.parsing():
            self._require_own(block, table)
        return table

    def _require_own(self, block: int, table: pa.Table) -> None:
        """Raise `ValueError` unless `table` is this store's record of `block`."""
        metadata, task = table.schema.metadata or {}, self.layout.task(block)
        if task.first + len(table) in self._ends.get(block, ()):
            task = replace(task, last=task.first + len(table))
        made_by = metadata.get(b"fingerprint", b"").decode()
        if made_by != self.fingerprint and (made_by or not self.unmarked):
            raise ValueError(f"it belongs to another store, of fingerprint {made_by or 'unknown'}")
        if parse_json(metadata[b"task"]) != asdict(task) or not _is_of_rows(table, task.first, task.last):
            raise ValueError(f"it isn't of rows {task.first} to {task.last}")
        if table["key"].null_count or not set(table["status"].unique().to_pylist()) <= {"ok", "failed"}:
            raise ValueError("it has rows without a key, or of a status other than ok and failed")
        objects = decode(dict[str, int], parse_json(metadata[b"objects"]), "objects")
        layout = replace(self.layout, n_rows=min(self.layout.n_rows, task.last))
        wanted = {level.name: set(layout.shard_names(level, block)) for level in self.levels}
        apart = {level.name for ledger in self.added for level in ledger.levels if wanted[level.name].isdisjoint(objects)}
        if set(objects) != {name for level, names in wanted.items() if level not in apart for name in names}:
            raise ValueError("the objects it lists aren't its task's")

    def apart(self, block: int, record: pa.Table, held: Held | None = None) -> list[pa.Table]:
        """The records of levels that were added after a block's `record`; `held` as there. Raises `DamagedObject`."""
        if not self.added:
            return []
        objects = committed_objects(record).keys()
        later = [each for each in self.added if objects.isdisjoint(self.layout.shard_names(each.levels[0], block))]
        return [each.record(block, held) for each in later]

    def objects(self, block: int, record: pa.Table) -> dict[str, int]:
        """Names and sizes in bytes of all objects of a block with that `record`. Raises `DamagedObject`."""
        return _all_objects([record, *self.apart(block, record)])

    def torn(self, blocks: Collection[int]) -> dict[int, str]:
        """Blocks that aren't done for all that their records say, and why: a record that is damaged or another store's, a shard
        that is missing or has another size than was committed."""
        sizes = _ShardSizes(self.folder, self.layout, self.levels, blocks)

        def ask(block: int, held: Held) -> str:
            try:
                record = self.record(block, held)
                return sizes.why_torn(block, [record, *self.apart(block, record, held)])
            except DamagedObject as error:
                return str(error)

        windows = self._windows(sorted(blocks), ask, [self, *self.added])
        return {block: why for window, found, _ in windows for block, why in zip(window, found, strict=True) if why}

    def merge(self, index: SampleIndex, put: Put, earlier: Collection[int] = ()) -> Totals:
        """Join all commit records into `ledger/samples/part-*.parquet`, and pack them; returns their totals. In memory are the
        records of a pack's tasks at a time, however many rows there are.

        `put` writes an object of the store. Where the images lie is taken from the index: a source may have moved, or been
        repaired, since a task was done. `earlier`: blocks that an earlier run did, whose shards are held against the sizes that
        were committed. Raises `TornTasks` for those and for records that can't be read, once all were looked at, and
        `StorageError` unless every row of the layout has exactly one record, of its key in the index.
        """
        totals, layout, torn = Totals(), self.layout, dict[int, str]()
        sizes = _ShardSizes(self.folder, layout, self.levels, earlier)

        def ask(block: int, held: Held) -> pa.Table | str:
            try:
                records = [record := self.record(block, held), *self.apart(block, record, held)]
                return sizes.why_torn(block, records) or _clipped_in_all(records)
            except DamagedObject as error:
                return str(error)

        windows = self._windows(range(layout.n_blocks), ask, [self, *self.added])
        for part, some in itertools.groupby(windows, lambda window: window[0][0] * layout.block_rows // PART_ROWS):
            rows, unsaid = Spool(), set(_OF_FRAMES)
            for window, found, packing in some:
                torn |= {block: each for block, each in zip(window, found, strict=True) if isinstance(each, str)}
                if torn.keys().isdisjoint(window):
                    packing.put(put)
                if not torn:
                    table = self._checked(window, pa.concat_tables(cast(list[pa.Table], found)), index)
                    totals += Totals.of(table)
                    unsaid &= _unsaid(table)
                    for group in cut([table], ROW_GROUP_ROWS):
                        rows.append(group)
            if not torn:
                self._put_part(part, rows, unsaid, put)
        if torn:
            raise TornTasks(self.folder, torn)
        return totals

    def _checked(self, blocks: Sequence[int], table: pa.Table, index: SampleIndex) -> pa.Table:
        """The rows of blocks that follow each other, with the places that the index says. Raises `StorageError` unless they are
        all in `table`."""
        first, last = self.layout.task(blocks[0]).first, self.layout.task(blocks[-1]).last
        if not _is_of_rows(table, first, last):
            raise StorageError(
                f"{self.folder.displayed}: the ledger's rows don't add up from {first} to {last}; keep the store, report this"
            )
        places = index.read(first, last, ("key", *_PLACES))
        self._require_keys(table, places["key"])
        return _placed(table, places, index.sources)

    def _put_part(self, part: int, rows: Spool, unsaid: Collection[str], put: Put) -> None:
        """Write the rows of a part, without columns that are `unsaid`."""
        [(data, _)] = part_files(table.drop_columns(list(unsaid)) for table in rows)
        put(part_name("ledger/samples", part), data)
        for name, chunk in sample_chunks(part * PART_ROWS, rows) if self.sample_arrays else ():
            put(name, chunk)

    def _require_keys(self, table: pa.Table, keys: pa.ChunkedArray) -> None:
        other = pc.index(pc.not_equal(table["key"], keys), True).as_py()
        if other >= 0:
            row = table["row"][other].as_py()
            raise self.commits.document(row // self.layout.block_rows).damaged(
                f"calls row {row} {table['key'][other].as_py()!r}, which the index calls {keys[other].as_py()!r}"
            )

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The merged ledger. Raises `FileNotFoundError` before the first run has finished."""
        return pa.concat_tables(self.parts(columns))

    def parts(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The same, a part at a time."""
        if not self.folder.exists(part_name("ledger/samples", 0)):
            raise FileNotFoundError(f"{self.folder.displayed} has no merged ledger yet: its first run has not finished")
        for part in range(-(-self.layout.n_rows // PART_ROWS)):
            yield self._merged.read_groups(part, None, columns)

    def take(self, rows: np.ndarray, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of the merged ledger by their numbers, in that order; reads only the row groups that hold them."""
        return self._merged.take(rows, columns)

    def take_committed(self, rows: np.ndarray, columns: Sequence[str] | None = None) -> pa.Table:
        """The same from the commit records, for a store that is being written: null but for `row` where there is none yet."""
        layout = self.layout
        blocks, at = np.unique(rows // layout.block_rows, return_inverse=True)
        there = self.listed()  # one listing costs less than a failed request for each block that isn't there
        known = dict(self.records([int(b) for b in blocks if int(b) in there]))
        tables = []
        for i, block in enumerate(blocks.tolist()):
            mine = rows[at == i]
            task, record = layout.task(block), known.get(block, SCHEMA.empty_table())
            unwritten = pa.table({"row": np.arange(task.first + len(record), task.last)})
            record = pa.concat_tables([record.replace_schema_metadata(None), with_columns(unwritten, SCHEMA)])
            tables.append(record.take(mine - task.first))
        # `tables` hold the rows block after block; the inverse of that permutation brings them into the order asked.
        order = np.argsort(np.argsort(at, kind="stable"), kind="stable")
        table = pa.concat_tables(tables).take(order) if tables else SCHEMA.empty_table()
        return table if columns is None else table.select(columns)

    def failed(self, blocks: Sequence[int] | None = None, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Failed rows, some at a time: of committed `blocks`, from their records, or of the merged ledger."""
        names = list(SCHEMA.names if columns is None else columns)
        tables = self.parts([*dict.fromkeys([*names, "status"])]) if blocks is None else (t for _, t in self.records(blocks))
        for table in tables:
            failed = table.filter(pc.equal(table["status"], "failed"))
            if len(failed):
                yield failed.select(names).replace_schema_metadata(None)

    def unfinished(self, blocks: Sequence[int]) -> set[int]:
        """Those of committed `blocks` that have failed rows, or a record that can't be read."""

        def ask(block: int, held: Held) -> bool:
            try:
                return pc.any(pc.equal(self.record(block, held)["status"], "failed")).as_py()
            except DamagedObject as error:
                logger.warning("a finished task is damaged; it runs again: %s", error)
                return True

        return {block for block, found in self._each(blocks, ask) if found}


class TornTasks(StorageError):
    """Tasks aren't done, though there are records of them."""

    def __init__(self, folder: Folder, reasons: Mapping[int, str]):
        self.folder, self.reasons = folder, reasons
        "in words, by block"
        super().__init__(f"{len(reasons)} finished tasks are damaged; they run again:\n  " + "\n  ".join([*reasons.values()][:5]))


class _ShardSizes:
    """Sizes of the shards of some blocks, as they are now: of a local disk looked at one by one, elsewhere listed at once."""

    def __init__(self, folder: Folder, layout: Layout, levels: Sequence[Level], blocks: Collection[int]):
        self.folder, self.blocks = folder, blocks
        self._listed: dict[str, np.ndarray] = {}
        if not blocks or folder.is_local:
            return
        last: dict[str, str] = {}
        for level in levels:
            for name in layout.shard_names(level, layout.n_blocks - 1):
                array, _, place = name.partition("/c/")
                last[array] = place
        for array, place in last.items():
            number, _, rest = place.partition("/")
            self._listed[array] = folder.sizes_by_number(f"{array}/c", rest, int(number) + 1)

    def why_torn(self, block: int, records: Sequence[pa.Table]) -> str:
        """In words, which shard isn't as a block's records say; empty where all are, or where nobody asked."""
        if block not in self.blocks:
            return ""
        short = next((name for name, size in _all_objects(records).items() if self._size(name) != size), None)
        return f"{self.folder.displayed}/{short} is missing, or shorter or longer than was committed" if short else ""

    def _size(self, name: str) -> int | None:
        array, _, place = name.partition("/c/")
        if array not in self._listed:
            return self.folder.size(name)
        return int(self._listed[array][int(place.partition("/")[0])])


def _is_of_rows(table: pa.Table, first: int, last: int) -> bool:
    """Whether a table holds the rows from `first` up to `last`, which isn't among them, in order."""
    rows = table["row"].combine_chunks()
    if len(rows) != last - first or rows.null_count:
        return False
    # Not `to_numpy`, which imports pandas: half a second of `show status`.
    return np.array_equal(np.frombuffer(rows.buffers()[1], np.int64, len(rows), 8 * rows.offset), np.arange(first, last))


def _all_objects(records: Sequence[pa.Table]) -> dict[str, int]:
    """`committed_objects` of all records of a block."""
    return {name: size for each in records for name, size in committed_objects(each).items()}


def _clipped_in_all(records: Sequence[pa.Table]) -> pa.Table:
    """A block's rows, with the values that were clamped in levels that were added since; without the record's metadata, of which
    joined tables would keep one task's."""
    table = records[0].replace_schema_metadata(None)
    for later in records[1:]:
        total = pc.add(table["clipped"], later["clipped"])
        table = table.set_column(table.column_names.index("clipped"), SCHEMA.field("clipped"), total)
    return table


def committed_objects(record: pa.Table) -> dict[str, int]:
    """Names and sizes in bytes of the objects that a commit record lists."""
    return json.loads(record.schema.metadata[b"objects"])


def _placed(table: pa.Table, places: pa.Table, sources: Sequence[Source]) -> pa.Table:
    """Ledger rows with the sources, offsets and sizes of the same rows of an index."""
    urls = pa.array([source.url for source in sources], pa.string())
    columns = {**{name: places[name] for name in _PLACES}, "source": urls.take(places["source"])}
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), SCHEMA.field(name), values)
    return table
