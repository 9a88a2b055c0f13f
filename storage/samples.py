"""The input: which samples there are, and their image bytes.

`write_index` writes one row per sample of the scanned sources (storage/tars.py) as Parquet beside the output;
`SampleIndex` reads rows of it back, from the driver or any worker. Decoding images is not done here.
"""

import bisect
import hashlib
import itertools
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.documents import (
    DamagedObject,
    Document,
    MissingObject,
    decode,
    parquet_table,
    require_columns,
    rows_as,
    with_columns,
)
from storage.gathered import KEYS_SCHEMA, GatheredRows, cut
from storage.inputs import InputFile
from storage.kept import Kept
from storage.left_out import LeftOut, left_out_json, merge_left_out, parse_left_out
from storage.paths import Folder, UnknownName
from storage.sample_images import are_frames
from storage.scans import DuplicateKeys as DuplicateKeys
from storage.sources import Source, gone_and_new, other_input, pair, rules_text, sources_left_out
from storage.spec import MAX_BLOCK_ROWS
from storage.tars import AT, SCHEMA, MemberRules, index_schema

logger = logging.getLogger(__name__)

T = TypeVar("T")

PART_ROWS = MAX_BLOCK_ROWS
"""Rows of one Parquet file of the index; a multiple of every block size, so that no task spans two parts."""

OPEN_PARTS = 64
"""Parts of a table that stay open: the footer of each is a megabyte in memory."""

INDEX = "index"
"""Folder of an index below the output."""

ROW_GROUP_ROWS = 2**13
"""Rows of one Parquet row group: what a worker reads to learn about its task."""

KeptGroups: TypeAlias = Kept[tuple[int, int, tuple[str, ...]], pa.Table]
"""Row groups by part, number and columns."""


@dataclass
class Parts:
    """A table in Parquet parts of `PART_ROWS` rows, of which only the row groups that are asked for are read.

    Parts are opened once in each process: a file that was inherited shares its position. Reading raises `DamagedObject` where
    a part isn't of `n_rows` rows in all, and of the columns of `schema`; those of `optional` are null where it lacks them.
    Each part names the `index` that it belongs to, where one is given. One thread reads at a time: two in one ParquetFile end
    in errors or a crash. What `take` reads stays in `kept`, where there is one: whoever takes a few rows anywhere, again and
    again, would read 8,192 for each.
    """

    folder: Folder
    prefix: str
    n_rows: int
    schema: pa.Schema
    optional: Sequence[str] = ()
    index: str | None = None
    kept: KeptGroups | None = None
    _open: dict[tuple[int, int], pq.ParquetFile] = field(default_factory=dict, init=False)
    _locks: dict[int, threading.Lock] = field(default_factory=dict, init=False)

    def read_groups(self, part: int, groups: Sequence[int] | None, columns: Sequence[str] | None = None) -> pa.Table:
        """Some row groups of a part, or all. Raises `UnknownName` for columns that the table hasn't."""
        wanted = self.schema if columns is None else pa.schema([self._field(name) for name in columns])
        with self._locks.setdefault(os.getpid(), threading.Lock()), self._document(part).parsing():
            file = self._file(part)
            there = [name for name in wanted.names if name in file.schema_arrow.names]
            groups = range(file.num_row_groups) if groups is None else groups
            return with_columns(file.read_row_groups(list(groups), columns=there), wanted)

    def read(self, first: int, last: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows `first` to `last` (exclusive), in order; they must lie within one part."""
        part = first // PART_ROWS
        start = first - part * PART_ROWS
        groups = range(start // ROW_GROUP_ROWS, -(-(last - part * PART_ROWS) // ROW_GROUP_ROWS))
        table = self.read_groups(part, groups, columns)
        return table.slice(start - groups[0] * ROW_GROUP_ROWS, last - first)

    def take(self, rows: np.ndarray, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows whose numbers are in `rows`, in that order."""
        # Each row group is read once, however rows repeat and in whatever order they are asked for.
        unique, positions = np.unique(rows, return_inverse=True)
        if not len(unique):
            return self.read(0, 1, columns).slice(0, 0)  # an empty table of the right columns
        tables = []
        for part in np.unique(unique // PART_ROWS):
            within = unique[unique // PART_ROWS == part] - part * PART_ROWS
            groups, group = np.unique(within // ROW_GROUP_ROWS, return_inverse=True)
            if self.kept is None:
                table = self.read_groups(int(part), groups.tolist(), columns)
                tables.append(table.take(group * ROW_GROUP_ROWS + within % ROW_GROUP_ROWS))
            else:
                there = self._kept_groups(self.kept, int(part), groups.tolist(), columns)
                tables += [table.take(within[group == i] % ROW_GROUP_ROWS) for i, table in enumerate(there)]
        return pa.concat_tables(tables).take(positions)

    def _kept_groups(self, kept: KeptGroups, part: int, groups: Sequence[int], columns: Sequence[str] | None) -> list[pa.Table]:
        """Row groups of a part, of which those that aren't kept are read at once."""
        names = tuple(self.schema.names if columns is None else columns)
        found = {group: kept.get((part, group, names)) for group in groups}
        missing = [group for group, table in found.items() if table is None]
        if missing:
            read = self.read_groups(part, missing, names)
            for i, group in enumerate(missing):
                rows = read.slice(i * ROW_GROUP_ROWS, ROW_GROUP_ROWS)
                # A slice would keep all that was read with it.
                found[group] = rows.take(np.arange(len(rows)))
                kept.put((part, group, names), found[group])
        return [table for table in found.values() if table is not None]

    def _field(self, name: str) -> pa.Field:
        if name not in self.schema.names:
            names = ", ".join(self.schema.names)
            raise UnknownName(f"{self._document(0).displayed} has no column {name!r}; it has {names}")
        return self.schema.field(name)

    def metadata(self, part: int) -> pq.FileMetaData:
        with self._locks.setdefault(os.getpid(), threading.Lock()), self._document(part).parsing():
            return self._file(part).metadata

    def _document(self, part: int) -> Document:
        return Document(self.folder, part_name(self.prefix, part))

    def _file(self, part: int) -> pq.ParquetFile:
        name = (os.getpid(), part)  # a forked child opens its own: the parent's file would move under it
        if name in self._open:
            self._open[name] = self._open.pop(name)  # the last used comes last
        else:
            try:
                source = self.folder.open(part_name(self.prefix, part))
            except FileNotFoundError:
                raise self._document(part).missing() from None
            except IsADirectoryError:
                raise self._document(part).damaged("is a folder where a file must be") from None
            file = pq.ParquetFile(source, pre_buffer=True, page_checksum_verification=True)
            self._require_whole(file, part)
            if len(self._open) >= OPEN_PARTS:
                del self._open[next(iter(self._open))]
            self._open[name] = file
        return self._open[name]

    def _require_whole(self, file: pq.ParquetFile, part: int) -> None:
        """Raise `ValueError` unless the file has the part's columns and rows, in groups where they are looked for."""
        require_columns(file.schema_arrow, self.schema, self.optional)
        # Two runs may have written an index here: a part of another one would put other images on the rows.
        if self.index is not None and (file.schema_arrow.metadata or {}).get(b"index", b"").decode() != self.index:
            raise ValueError("it is a part of another index")
        rows = min(PART_ROWS, self.n_rows - part * PART_ROWS)
        groups = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        if groups != [min(ROW_GROUP_ROWS, rows - start) for start in range(0, rows, ROW_GROUP_ROWS)]:
            raise ValueError(f"it has {sum(groups)} rows in {len(groups)} groups; {rows} were expected")


class SampleIndex:
    """The rows of an input, saved under `<out>/index/`: `samples/part-*.parquet`, `keys/part-*.parquet` (keys in order, with
    their rows) and `sources.parquet`.

    Row numbers are positions: sources in the order in which they were first given, samples in the order of the archive.
    Input that was repaired keeps the rows it has, and its index lies in a folder of its own (`prefix`); samples that came
    with the repair are the last ones.
    """

    def __init__(
        self, folder: Folder, prefix: str = INDEX, later: "Callable[[], SampleIndex | None] | None" = None, *, kept_bytes: int = 0
    ):
        """`later`: gives the index that took this one's place, if one did, with the same rows and further ones. `kept_bytes`: how
        much of what `take` reads stays in memory."""
        self.folder, self.prefix, self._later = folder, prefix, later
        self.displayed = folder.displayed
        "what messages call that which was made from it"
        document = Document(folder, f"{prefix}/sources.parquet", "the same extraction writes it, where its input is as it was")
        data = document.bytes()
        with document.parsing():
            self._parse(parquet_table(data))
        schema = index_schema(self.carried, with_frames=bool(self.fps))
        self.columns: list[str] = schema.names
        # Earlier versions, whose indexes have no `order`, didn't name the index in its parts.
        named = None if self.order is None else self.digest
        kept = KeptGroups(kept_bytes, lambda table: table.nbytes) if kept_bytes else None
        self._table = Parts(folder, f"{prefix}/samples", self.n_rows, schema, index=named, kept=kept)
        self._keys = Parts(folder, f"{prefix}/keys", self.n_rows, KEYS_SCHEMA, index=named)
        self._now = self

    def _parse(self, table: pa.Table) -> None:
        """Take what index/sources.parquet says. Raises one of what `Document.parsing` knows where that can't be."""
        meta = table.schema.metadata or {}
        self.sources = rows_as(Source, table)
        self.n_rows = int(meta[b"n_rows"])
        self.digest = meta[b"digest"].decode()
        self.order = meta[b"order"].decode() if b"order" in meta else None
        "of the rows, empty where they are in the order of the sources; see `index_digest`"
        self.n_unreadable = int(meta[b"n_unreadable"])
        "rows whose `problem` is not null"
        self.is_cut = meta[b"is_cut"] == b"True"
        "by a limit: the sources may hold more samples"
        self.rules = meta[b"rules"].decode()
        self.carried: list[str] = list(decode(tuple[str, ...], json.loads(meta[b"carried"]), "carried"))
        "columns that `--carry` took from the samples' text members"
        self.fps = meta.get(b"fps", b"").decode()
        "the rate at which frames of videos were taken, as `Sampling` says it; empty where none were"
        self.first_keys: list[str] = list(decode(tuple[str, ...], json.loads(meta[b"first_keys"]), "first_keys"))
        self.left_out: dict[str, LeftOut] = parse_left_out(meta.get(b"left_out", b"").decode())
        "what the input held that is no row, when it was indexed; empty in indexes that did not count it"
        if self.digest != index_digest(self.n_rows, self.sources, self.order or ""):
            raise ValueError("its digest isn't that of the sources it lists")
        if not 0 <= self.n_unreadable <= self.n_rows or len(self.first_keys) != -(-self.n_rows // PART_ROWS):
            raise ValueError(f"its counts don't fit {self.n_rows} rows")

    @staticmethod
    def exists(folder: Folder, prefix: str = INDEX) -> bool:
        return folder.exists(f"{prefix}/sources.parquet")

    def is_whole(self) -> bool:
        """Whether every part is there and belongs to this index: a killed run, or another one, may have left a mixture."""
        try:
            for part in range(-(-self.n_rows // PART_ROWS)):
                self.read(part * PART_ROWS, part * PART_ROWS + 1)
                self._keys.metadata(part)
        except DamagedObject:
            return False
        return True

    def urls(self, files: Sequence[InputFile]) -> tuple[str, ...]:
        """URLs to read the sources from, in the order of the sources: with credentials, as `files` have them.

        Raises `InputError` for sources that aren't among the files.
        """
        paired, _ = pair(self.sources, files)
        gone = gone_and_new(self.sources, paired)
        if gone:
            raise other_input(self, gone)
        return tuple(file.url for file in paired if file)

    def rows_of(self, sources: Sequence[int]) -> pa.Table:
        """All rows of some sources (positions), in order, with their numbers in the column `row`."""
        wanted, tables = pa.array(sources, pa.int32()), []
        for first in range(0, self.n_rows, PART_ROWS):
            table = self.read(first, min(first + PART_ROWS, self.n_rows))
            table = table.append_column("row", pa.array(np.arange(first, first + len(table))))
            tables.append(table.filter(pc.is_in(table["source"], wanted)))
        return pa.concat_tables(tables)

    def read(self, first: int, last: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows `first` to `last` (exclusive); they must lie within one part."""
        return self._ask(lambda index: index._within(index._table.read(first, last, columns)))

    def take(self, rows: np.ndarray, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows whose numbers are in `rows`, in that order."""
        return self._ask(lambda index: index._within(index._table.take(rows, columns)))

    def _ask(self, ask: "Callable[[SampleIndex], T]") -> T:
        """What `ask` gets from this index, or, where that is gone, from the one that took its place."""
        try:
            return ask(self._now)
        except (DamagedObject, OSError):
            later = self._later() if self._later else None
            if later is None:
                raise
            self._now = later
            return ask(later)

    def _within(self, table: pa.Table) -> pa.Table:
        """`table`, whose rows lie in sources that there are. Raises `DamagedObject` otherwise."""
        # A source that there isn't would be an `IndexError` deep in a worker; null and negative offsets, reads of other bytes.
        for name, end in (("source", len(self.sources)), ("offset", 2**63), ("size", 2**63)):
            if name in table.column_names and len(table):
                bounds = pc.min_max(table[name])
                if table[name].null_count or bounds["min"].as_py() < 0 or bounds["max"].as_py() >= end:
                    raise Document(self.folder, f"{self.prefix}/samples").damaged(f"has rows whose {name} can't be")
        return table

    def keys(self, first: int, last: int) -> pa.ChunkedArray:
        """Keys of rows `first` to `last` (exclusive); they must lie within one part."""
        return self._ask(lambda index: index._table.read(first, last, ["key"])["key"])

    def sizes(self, first: int, last: int) -> np.ndarray:
        """Bytes that are read of the images of rows `first` to `last` (exclusive), int64; they must lie within one part. 0 of
        frames, which are read a few at a time (`sample_images.FRAME_BYTES`)."""
        columns = ["size", *([AT.name] if self.fps else [])]
        table = self._ask(lambda index: index._table.read(first, last, columns))
        return np.where(are_frames(table), 0, table["size"].to_numpy())

    def videos(self) -> tuple[int, int]:
        """How many videos there are that can be read, and how many rows are frames of theirs."""
        videos = frames = 0
        for first in range(0, self.n_rows if self.fps else 0, PART_ROWS):
            at = self._table.read(first, min(first + PART_ROWS, self.n_rows), [AT.name])[AT.name]
            videos += pc.sum(pc.equal(at, 0)).as_py() or 0
            frames += len(at) - at.null_count
        return videos, frames

    def names(self, rows: Sequence[int]) -> list[str]:
        """What people know some rows by: their source and key."""
        table = self.take(np.array(rows, np.int64), ["source", "key"])
        return [f"{self.sources[row['source']].url}: {row['key']}" for row in table.to_pylist()]

    def largest_block_bytes(self, block_rows: int, largest_image: int) -> int:
        """Bytes of the images of that block of `block_rows` rows which has most; images above `largest_image` don't count."""
        most = 0
        for first in range(0, self.n_rows, PART_ROWS):
            last = min(first + PART_ROWS, self.n_rows)
            sizes = self.sizes(first, last)
            sizes = np.where(sizes <= largest_image, sizes, 0)
            most = max(most, int(np.add.reduceat(sizes, np.arange(0, len(sizes), block_rows)).max()))
        return most

    def rows(self, keys: Sequence[str]) -> np.ndarray:
        """Row numbers (int64) of `keys`, in that order. Raises `UnknownName` with the first that there is none of."""
        found = self.find(keys)
        missing = next((key for key in keys if key not in found), None)
        if missing is not None:
            raise UnknownName(f"{self.folder.displayed} has no sample {missing!r}; keys look like {self.first_keys[0]!r}")
        return np.array([found[key] for key in keys], np.int64)

    def find(self, keys: Sequence[str]) -> dict[str, int]:
        """Row numbers of those of `keys` that there are."""
        return self._ask(lambda index: index._find_all(keys))

    def _find_all(self, keys: Sequence[str]) -> dict[str, int]:
        wanted = sorted(set(keys))
        found: dict[str, int] = {}
        for part, group in itertools.groupby(wanted, lambda key: max(0, bisect.bisect_right(self.first_keys, key) - 1)):
            found |= self._find(part, list(group))
        return found

    def _find(self, part: int, keys: Sequence[str]) -> dict[str, int]:
        """Those of the sorted `keys` that are in the part; reads the row groups that may hold one."""
        metadata = self._keys.metadata(part)
        # Keys lie in order, so that the smallest and largest of a group, in the file's footer, tell which groups to read.
        groups = [g for g in range(metadata.num_row_groups) if _may_hold(metadata.row_group(g).column(0), keys)]
        if not groups:
            return {}
        table = self._keys.read_groups(part, groups)
        table = table.filter(pc.is_in(table["key"], pa.array(keys, table["key"].type)))
        rows = table["row"].to_pylist()
        if rows and not 0 <= min(rows) <= max(rows) < self.n_rows:
            raise Document(self.folder, part_name(f"{self.prefix}/keys", part)).damaged("names rows that there aren't")
        return dict(zip(table["key"].to_pylist(), rows, strict=True))


def _may_hold(column: pq.ColumnChunkMetaData, keys: Sequence[str]) -> bool:
    """Whether one of the sorted `keys` lies between the smallest and the largest value of a column chunk."""
    statistics = column.statistics
    if statistics is None or not statistics.has_min_max:  # keys of many kilobytes have none
        return True
    at = bisect.bisect_left(keys, statistics.min)
    return at < len(keys) and keys[at] <= statistics.max


def part_name(prefix: str, part: int) -> str:
    """Name of the Parquet file that holds rows `part * PART_ROWS` and on."""
    return f"{prefix}/part-{part:05d}.parquet"


def table_bytes(table: pa.Table, metadata: Mapping[str, str] | None = None) -> bytes:
    """`table` as one Parquet file; the same table gives the same bytes."""
    if metadata is not None:
        table = table.replace_schema_metadata(metadata)
    sink = BytesIO()
    # With checksums, so that a flipped bit is an error, not another row.
    pq.write_table(table, sink, row_group_size=ROW_GROUP_ROWS, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def part_files(tables: Iterable[pa.Table], metadata: Mapping[str, str] | None = None) -> Iterator[tuple[bytes, str]]:
    """Parquet files of `PART_ROWS` rows each, but for the last one, as `table_bytes` gives them, made a row group at a time; and
    the key of each one's first row."""
    groups = cut(tables, ROW_GROUP_ROWS)
    for first in groups:
        sink = BytesIO()
        described = first.replace_schema_metadata(metadata)
        with pq.ParquetWriter(sink, described.schema, compression="zstd", write_page_checksum=True) as writer:
            for group in itertools.chain([first], itertools.islice(groups, PART_ROWS // ROW_GROUP_ROWS - 1)):
                writer.write_table(group.replace_schema_metadata(metadata), ROW_GROUP_ROWS)
        yield sink.getvalue(), first["key"][0].as_py()


def write_index(
    folder: Folder,
    rows: GatheredRows | pa.Table,
    sources: Sequence[Source],
    *,
    rules: MemberRules | None = None,
    limit: int | None = None,
    left_out: Mapping[str, LeftOut] | None = None,
    order: str = "",
    prefix: str = INDEX,
) -> SampleIndex:
    """Save the index under `folder`; the sources file goes last and makes it exist. A part's row group is in memory at a time,
    and its file.

    `left_out` is what lay beside the sources. `order`: see `index_digest`.
    """
    if isinstance(rows, pa.Table):
        rows = GatheredRows.of(rows)
    meta = {"index": index_digest(len(rows), sources, order)}
    for part, (data, _) in enumerate(part_files(rows.chunks(), meta)):
        folder.write(part_name(f"{prefix}/samples", part), data)
    first_keys = []
    for part, (data, first) in enumerate(part_files(rows.keys(), meta)):
        folder.write(part_name(f"{prefix}/keys", part), data)
        first_keys.append(first)
    settings = {
        "n_rows": str(len(rows)),
        "n_unreadable": str(len(rows) - rows.null_counts["problem"]),
        "digest": meta["index"],
        "order": order,
        "is_cut": str(len(rows) == limit),
        "rules": rules_text(rules),
        "carried": json.dumps([name for name in rows.null_counts if name not in (*SCHEMA.names, AT.name)]),
        "first_keys": json.dumps(first_keys),
        "left_out": left_out_json(merge_left_out(left_out or {}, sources_left_out(sources))),
    }
    if rules and rules.frames:  # stores of photographs keep the bytes that they have had from the beginning
        settings["fps"] = str(rules.frames)
    folder.write(f"{prefix}/sources.parquet", _sources_bytes(sources, settings))
    return SampleIndex(folder, prefix)


def move_index(index: SampleIndex, folder: Folder, put: Callable[[str, bytes], None] | None = None) -> None:
    """Write an index to another folder, the sources file last, and drop the original; `put` writes where it's a store's.

    Nothing is done where it was moved before.
    """
    if SampleIndex.exists(index.folder, index.prefix):
        kinds, parts = ("samples", "keys"), range(-(-index.n_rows // PART_ROWS))
        names = [part_name(f"{index.prefix}/{kind}", i) for kind in kinds for i in parts]
        names.append(f"{index.prefix}/sources.parquet")
        for name in names:
            (put or folder.write)(name, index.folder.read(name))
        # Only once all is written: whoever is killed before finds the original, and moves it again.
        index.folder.remove(names)


def remove_indexes(folder: Folder, but: str) -> None:
    """Drop the indexes of a folder other than the one at prefix `but`, also what a killed run left of them."""
    # Each repair of the input writes an index beside the one before, so that a killed run leaves the store a whole one.
    generations = [f"{INDEX}/{name}" for name in folder.folders(INDEX) if re.fullmatch("[0-9a-f]{12}", name)]
    for prefix in {INDEX, *generations} - {but}:
        parts = [f"{prefix}/{kind}/{name}" for kind in ("samples", "keys") for name in folder.sizes(f"{prefix}/{kind}")]
        folder.remove([*(name for name in parts if name.endswith(".parquet")), f"{prefix}/sources.parquet"])


def update_sources(index: SampleIndex, sources: Sequence[Source]) -> SampleIndex:
    """Save how the sources are named and stamped now; the rows stay as they are."""
    name = f"{index.prefix}/sources.parquet"
    meta = parquet_table(index.folder.read(name)).schema.metadata or {}
    index.folder.write(name, _sources_bytes(sources, {key.decode(): value.decode() for key, value in meta.items()}))
    return SampleIndex(index.folder, index.prefix)


def index_digest(n_rows: int, sources: Sequence[Source], order: str = "") -> str:
    """sha256 of what the rows are: independent of where the sources lie.

    `order` is a digest of which sample is on which row, empty where rows are in the order of the sources.
    """
    text = [str(n_rows), *(source.digest for source in sources), *([order] if order else [])]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def _sources_bytes(sources: Sequence[Source], meta: Mapping[str, str]) -> bytes:
    return table_bytes(pa.Table.from_pylist([vars(source) for source in sources]), meta)


def kept_index(folder: Folder) -> SampleIndex | None:
    """The index below `folder`; None where there is none, or what there is of it is damaged."""
    try:
        index = SampleIndex(folder)
    except MissingObject:
        return None
    except DamagedObject as error:
        logger.warning("the input is scanned again: %s", error)
        return None
    return index if index.is_whole() else None
