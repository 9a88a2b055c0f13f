"""The first rows of a task that was done before its store grew, as they are stored: they are copied, not computed again."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from storage.ledger import SampleRecord
from storage.shards import DamagedChunk, decode_index, decompress
from storage.spec import Compression, Dtype, Level, ShardTask

if TYPE_CHECKING:
    from storage.store import FeatureStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Begun:
    """Rows that keep their bytes; none where the task wasn't done before, or what there is of it is damaged."""

    records: tuple[SampleRecord, ...] = ()
    chunks: Mapping[str, Sequence[bytes | None]] = field(default_factory=dict)
    "by level with a grid; None for rows that failed"
    vectors: Mapping[str, np.ndarray] = field(default_factory=dict)
    "[rows, C] by array: of pooled levels, and scales of int8"

    def __len__(self) -> int:
        return len(self.records)

    @classmethod
    def of(cls, store: "FeatureStore", task: ShardTask) -> "Begun":
        """What there is of a task. Every chunk is decoded once, so that damage isn't copied: then the task is done anew."""
        records = begun_records(store, task)
        if not records:
            return cls()
        there = np.array([each.status == "ok" for each in records])
        maps = [level for level in store.spec.levels if level.grid]
        arrays = [array for level in store.spec.levels for array in vector_arrays(level)]
        try:
            chunks = {level.name: _chunks(store, level, task, there) for level in maps}
            vectors = {array.name: _vectors(store, array, task, there) for array in arrays}
        except (DamagedChunk, FileNotFoundError) as error:
            said = "task %d is done anew, with the rows that it had before the store grew, since those are damaged: %s"
            logger.warning(said, task.block, error)
            return cls()
        return cls(records, chunks, vectors)


def begun_records(store: "FeatureStore", task: ShardTask) -> tuple[SampleRecord, ...]:
    """The ledger rows of a task that was done before the store grew; whether the chunks are whole isn't looked at."""
    record = store.ledger.begun(task.block)
    return () if record is None else tuple(SampleRecord(**row) for row in record.to_pylist())


class VectorArray(NamedTuple):
    """An array [rows, channels] of which a chunk is a block."""

    name: str
    "below the store"
    channels: int
    dtype: Dtype
    compression: Compression


def vector_arrays(level: Level) -> list[VectorArray]:
    """Those of a level: pooled features, and the scales of int8."""
    pooled = VectorArray(f"{level.name}/features", level.channels, level.dtype, level.compression)
    scales = VectorArray(f"{level.name}/scale", level.channels, "float32", "zstd")
    return [*([] if level.grid else [pooled]), *([scales] if level.dtype == "int8" else [])]


def _chunks(store: "FeatureStore", level: Level, task: ShardTask, there: np.ndarray) -> list[bytes | None]:
    """The encoded chunks of a task's first rows that are `there`. Raises `DamagedChunk` and `FileNotFoundError`."""
    size, checked = store.layout.shard_rows(level), np.empty(level.row_shape, level.dtype)
    found: list[bytes | None] = []
    # The task may have more shards by now than it had.
    for name, first in zip(store.layout.shard_names(level, task.block), range(0, len(there), size), strict=False):
        shard = store.folder.read(name)
        for (start, stop), wanted in zip(
            decode_index(shard, size, store.root.index_location), there[first : first + size], strict=False
        ):
            chunk = shard[start:stop] if wanted else None
            if chunk is not None:
                decompress(chunk, checked, level.compression)
            found.append(chunk)
    return found


def _vectors(store: "FeatureStore", array: VectorArray, task: ShardTask, there: np.ndarray) -> np.ndarray:
    """A task's first rows of an array. Raises `DamagedChunk` and `FileNotFoundError`."""
    block = np.empty((store.layout.block_rows, array.channels), array.dtype)
    decompress(store.folder.read(f"{array.name}/c/{task.block}/0"), block, array.compression)
    rows = block[: len(there)]
    if array.dtype != "int8" and np.isnan(rows[there]).all(axis=1).any():
        raise DamagedChunk(f"rows of {array.name} are empty that the ledger calls ok")
    return rows
