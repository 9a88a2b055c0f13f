"""Vectors and keys as plain Parquet, for vector indexes and viewers that know nothing of this store."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from storage.paths import Folder, StorageError, StorageOptions
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
    folder = Folder(target, storage_options)
    if any(name.endswith(".parquet") for name in folder.sizes("")):
        raise StorageError(f"{folder.displayed} holds Parquet files already; choose another folder, or empty this one")
    block_rows = store.layout.block_rows
    part_rows = max(1, PART_BYTES // (4 * store.level(level).channels * block_rows)) * block_rows
    spec = store.spec.to_json()
    del spec["levels"]
    made_of = {"store": store.folder.displayed, "fingerprint": store.root.fingerprint, "level": asdict(store.level(level))}
    about = {"raylift": json.dumps({**made_of, "features": spec})}
    tables: list[pa.Table] = []
    rows = files = 0
    for table in _blocks(store, level):
        tables.append(table)
        if sum(len(t) for t in tables) + block_rows > part_rows:
            files, rows, tables = files + 1, rows + _write(folder, files, tables, about), []
    if tables:
        files, rows = files + 1, rows + _write(folder, files, tables, about)
    return Export(rows=rows, left_out=len(store) - rows, files=files)


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
        flat = pa.array(vectors.ravel(), pa.float32())
        table = table.append_column("vector", pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]))
        for name in store.index.carried:
            table = table.append_column(name, known[name])
        yield table


def _write(folder: Folder, part: int, tables: list[pa.Table], about: Mapping[str, str]) -> int:
    table = pa.concat_tables(tables)
    folder.write(part_name("", part).lstrip("/"), table_bytes(table, about))
    return len(table)
