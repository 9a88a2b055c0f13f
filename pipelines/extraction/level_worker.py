"""A task of a level that is added to a finished store: its rows, made of stored maps or of the backbone's."""

from dataclasses import dataclass, replace

import numpy as np

from cluster.metrics import TaskReport
from pipelines.executors import Loaded
from pipelines.extraction.host import Device, HostRows, ModelDevice
from pipelines.extraction.setup import WorkerSetup
from pipelines.extraction.worker import ShardWorker
from storage.added import LevelAddition
from storage.ledger import SampleRecord
from storage.paths import Folder, StorageError
from storage.root import require_same_store
from storage.spec import Level, ShardTask
from storage.store import FeatureStore


@dataclass(frozen=True, kw_only=True)
class Way:
    """What the rows of a level are made of."""

    base: Level | None
    "the backbone's map as it is stored; None: the backbone runs"
    photographs: bool
    "whether they are read"
    exact: bool
    "nothing is rounded in between: rows are those that one run gives"

    @property
    def made_from(self) -> str:
        """As `Level` says it."""
        return self.base.name if self.base and not self.exact else ""

    def __str__(self) -> str:
        if self.base is None:
            return "the backbone's maps, computed again of the photographs"
        return f"{self.base.name} as stored ({self.base.encoding}){' and the photographs' if self.photographs else ''}"


@dataclass(frozen=True, kw_only=True)
class LevelSetup(WorkerSetup):
    """What every worker of such a run gets; its bundle is of that level alone."""

    way: Way

    def __call__(self, *, model: bool = True) -> "LevelWorker":
        return LevelWorker(self, self.model_device() if model else None)

    def open_store(self) -> LevelAddition:
        folder = Folder(self.config.out, self.config.options)
        (level,) = self.bundle.spec.levels
        return LevelAddition(folder, require_same_store(folder, self.fingerprint, self.input_digest), level)


class LevelWorker(ShardWorker):
    """Does such tasks. Rows that failed stay without features; all others have them, or the task isn't done."""

    def __init__(self, setup: LevelSetup, device: ModelDevice | None):
        super().__init__(setup, device)
        self._way, self._model = setup.way, device
        self._whole = FeatureStore(self.store.folder, self.store.attributes)

    def _load(self, task: ShardTask, *, apart: bool) -> Loaded:
        record = self._whole.ledger.record(task.block)
        before = [replace(SampleRecord(**row), clipped=0) for row in record.to_pylist()]
        if not self._way.photographs:
            return Loaded(np.zeros((task.n_rows, 0, 0, 3), np.uint8), before, {})
        loaded = super()._load(task, apart=apart)
        for found, known in zip(loaded.records, before, strict=True):
            if known.status == "ok":
                _require_same_image(found, known)
        loaded.records = before
        return loaded

    def compute(self, task: ShardTask, loaded: Loaded) -> TaskReport:
        if self._way.base is not None:
            rows = np.arange(task.first, task.last)
            loaded.maps, there = self._whole.read_present(rows, self._way.base.name)
            ok = np.array([record.status == "ok" for record in loaded.records])
            if (ok & ~there).any():
                lacking = rows[ok & ~there][0]
                raise StorageError(f"row {lacking} has no {self._way.base.name}, though the ledger says ok: shards are missing")
        return super().compute(task, loaded)

    def _begin(self, device: Device, loaded: Loaded, some: slice, batch: int) -> HostRows:
        if loaded.maps is None or self._model is None:
            return super()._begin(device, loaded, some, batch)
        return self._model.begin_stored(loaded.maps[some], loaded.pixels[some] if self._way.photographs else None)


def _require_same_image(found: SampleRecord, known: SampleRecord) -> None:
    """Raise `StorageError` where the photograph of a row with features can't be read any more, or is another one."""
    if found.status != "ok":
        raise StorageError(
            f"{known.key!r} ({known.source}): its photograph, which the level needs, can't be read any more: {found.stage}: "
            f"{found.error}: {found.message}"
        )
    if known.digest not in (None, found.digest):
        raise StorageError(
            f"{known.key!r} ({known.source}): its photograph, which the level needs, is another one than the store was made of; "
            "restore it, or extract it again first (--replace-changed)"
        )
