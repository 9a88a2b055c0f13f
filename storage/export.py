"""Vectors and keys as plain Parquet, for vector indexes and viewers that know nothing of this store."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from storage.paths import Folder, StorageError, StorageOptions
from storage.root import ROOT
from storage.samples import part_name, table_bytes
from storage.store import FeatureStore

PART_BYTES = 2**28
"""Vectors in one Parquet file, which is made in memory."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written: rows, those left out because they have no features, and files."""

    rows: int
    left_out: int
    files: int


def export_vectors(store: FeatureStore, level: str, target: str, storage_options: StorageOptions | None = None) -> Export:
    """Write one vector per image to `<target>/part-*.parquet`; maps are averaged over their cells.

    Columns: row, key, source (URL), vector (fixed-size list of float32), and what `--carry` kept. Rows without features are
    left out and counted. Each file says under `raylift` in its metadata what made the vectors: store, fingerprint, level and
    features. Raises `StorageError` if `target` already holds parts: half of another export must not remain.
    """
    folder = empty_target(target, storage_options)
    rows, files = write_parts(folder, _blocks(store, level), made_of(store, level), store.level(level).channels)
    return Export(rows=rows, left_out=len(store) - rows, files=files)


def empty_target(target: str, storage_options: StorageOptions | None) -> Folder:
    """The folder to export to. Raises `StorageError` if it holds Parquet already, or is a store."""
    folder = Folder(target, storage_options)
    if folder.size(ROOT) is not None:
        raise StorageError(f"{folder.displayed} is a Zarr store; give what is exported a folder of its own")
    if any(name.endswith(".parquet") for name in folder.sizes("")):
        raise StorageError(f"{folder.displayed} holds Parquet files already; choose another folder, or empty this one")
    return folder


def made_of(store: FeatureStore, level: str) -> dict[str, str]:
    """What a file says of vectors from a level: store, fingerprint, level and features."""
    spec = store.spec.to_json()
    del spec["levels"]
    about = {"store": store.folder.displayed, "fingerprint": store.root.fingerprint, "level": store.level(level).to_json()}
    return {"raylift": json.dumps({**about, "features": spec})}


def write_parts(folder: Folder, tables: Iterable[pa.Table], about: Mapping[str, str], channels: int) -> tuple[int, int]:
    """Write tables with vectors of so many channels as Parquet files of up to `PART_BYTES` of them; returns rows and files.

    Where anything ends it, what it wrote is removed again, so that half of an export is never taken for the whole.
    """
    rows = files = 0
    try:
        for held in _parts(tables, max(1, PART_BYTES // (4 * channels))):
            files, rows = files + 1, rows + _write(folder, files, held, about)
    except BaseException:
        folder.remove(_part_name(part) for part in range(files + 1))
        if files:
            folder.remove_empty("")
        raise
    return rows, files


def _parts(tables: Iterable[pa.Table], part_rows: int) -> Iterator[list[pa.Table]]:
    """Tables in groups of up to so many rows, or of one."""
    held: list[pa.Table] = []
    for table in tables:
        if held and sum(map(len, held)) + len(table) > part_rows:
            yield held
            held = []
        held.append(table)
    if held:
        yield held


def _part_name(part: int) -> str:
    return part_name("", part).lstrip("/")


def vector_column(vectors: np.ndarray) -> pa.Array:
    """Vectors [n, C] as fixed-size lists of float32."""
    return pa.FixedSizeListArray.from_arrays(
        pa.array(vectors.astype(np.float32, copy=False).ravel(), pa.float32()), vectors.shape[1]
    )


def _blocks(store: FeatureStore, level: str) -> Iterator[pa.Table]:
    urls = pa.array([source.url for source in store.index.sources])
    columns = ["key", "source", *store.index.carried]
    for task in store.layout.tasks():
        rows = np.arange(task.first, task.last)
        values, there = store.read_present(rows, level)
        if not there.any():
            continue
        vectors = values.astype(np.float32).reshape(len(rows), -1, values.shape[-1]).mean(axis=1)[there]
        known = store.index.take(rows[there], columns)
        sources = urls.take(known["source"].combine_chunks())
        table = pa.table({"row": rows[there], "key": known["key"], "source": sources})
        table = table.append_column("vector", vector_column(vectors))
        for name in store.index.carried:
            table = table.append_column(name, known[name])
        yield table


def _write(folder: Folder, part: int, tables: list[pa.Table], about: Mapping[str, str]) -> int:
    table = pa.concat_tables(tables)
    folder.write(_part_name(part), table_bytes(table, about))
    return len(table)
