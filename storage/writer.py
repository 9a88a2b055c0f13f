"""The shards of one task, written whole and then committed."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from storage.begun import Begun, vector_arrays
from storage.documents import DamagedObject
from storage.ledger import SampleRecord
from storage.paths import StorageError
from storage.shards import compress, encode_row, encode_shard
from storage.spec import Level, ShardTask

if TYPE_CHECKING:
    from storage.store import FeatureStore


class BlockWriter:
    """Collects one task's rows as encoded bytes, then writes whole shards. Memory: about the compressed block.

    Rows that were done before the store grew are there from the start: `begun`, where they were read already.
    """

    def __init__(self, store: "FeatureStore", task: ShardTask, begun: Begun | None = None):
        self.store, self.task, self.begun = store, task, Begun.of(store, task) if begun is None else begun
        self.clipped = np.zeros(task.n_rows, np.int64)
        self._chunks: dict[str, list[bytes | None]] = {}
        self._vectors: dict[str, np.ndarray] = {}
        for level in store.spec.levels:
            if level.grid:
                before = self.begun.chunks.get(level.name, ())
                self._chunks[level.name] = [*before, *[None] * (task.n_rows - len(before))]
            for array in vector_arrays(level):
                self._vectors[array.name] = np.full((store.layout.block_rows, array.channels), np.nan, array.dtype)
                if self.begun:
                    self._vectors[array.name][: len(self.begun)] = self.begun.vectors[array.name]

    def put(self, level: Level, position: int, values: np.ndarray, scale: np.ndarray | None = None) -> None:
        """Encode one row's features (`level.row_shape`, float) at `position` in the task. Rows never put stay NaN.

        `scale` [C]: `values` are int8 already, as `encode_row` gives both.
        """
        if values.shape != level.row_shape:
            raise StorageError(f"level {level.name} takes rows of shape {level.row_shape}, got {values.shape}")
        stored, clipped = values, 0
        if scale is None:
            stored, scale, clipped = encode_row(values, level.dtype)
        self.clipped[position] += clipped
        if level.grid:
            self._chunks[level.name][position] = compress(stored, level.compression)
        else:
            self._vectors[f"{level.name}/features"][position] = stored
        if scale is not None:
            self._vectors[f"{level.name}/scale"][position] = scale

    def write(self) -> dict[str, int]:
        """Write every shard of the task whole; returns object names and sizes in bytes for the commit.

        Raises `StoreReplaced`.
        """
        self.store.require_in_place()
        written: dict[str, int] = {}
        for level in self.store.spec.levels:
            names = self.store.layout.shard_names(level, self.task.block)
            for name, data in zip(names, self.objects(level), strict=True):
                self.store.put(name, data)
                written[name] = len(data)
        return written

    def objects(self, level: Level) -> Iterator[bytes]:
        """The bytes of the level's objects, in the order of their names."""
        if level.grid:
            rows, chunks = self.store.layout.shard_rows(level), self._chunks[level.name]
            location = self.store.root.index_location
            for start in range(0, len(chunks), rows):
                shard = chunks[start : start + rows]
                yield encode_shard(shard + [None] * (rows - len(shard)), location)
        else:
            yield compress(self._vectors[f"{level.name}/features"], level.compression)
        if level.dtype == "int8":
            yield compress(self._vectors[f"{level.name}/scale"])

    def commit(self, records: Sequence[SampleRecord], objects: Mapping[str, int]) -> bool:
        """Declare the task done; False if another worker did before. Raises `StoreReplaced`."""
        self.store.require_in_place()
        ledger = self.store.ledger
        if ledger.commit(self.task, records, objects):
            return True
        try:
            if len(ledger.record(self.task.block)) == self.task.n_rows:
                return False
        except DamagedObject:  # no worker of this store wrote it
            pass
        # So it is where the store grew: the record is of the rows that the task had before.
        self.store.require_in_place()
        ledger.replace(self.task, records, objects)
        return True
