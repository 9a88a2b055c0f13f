"""One task, anywhere: read, decode, forward, upsample, encode, write, commit.

A task's features never leave the process that computed them, except as whole shards in the output.
"""

import logging
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from operators.image import decode
from pipelines.models import ModelBundle
from pipelines.photos import geometry_of
from storage.ledger import SampleRecord
from storage.paths import redact
from storage.samples import read_images
from storage.spec import ShardTask
from storage.store import FeatureStore

logger = logging.getLogger(__name__)

MAX_STARTS = 3
"""Starts of a task, within one run, after which it's set aside: its worker keeps dying, or its neighbours' workers do."""

MAX_SOLO_STARTS = 3
"""Further starts when it's alone in a worker; then its rows are recorded as failed."""


@dataclass
class Loaded:
    """A task's images: `pixels` uint8 [rows, H, W, 3], zero where `records` say `failed`."""

    pixels: np.ndarray
    records: list[SampleRecord]
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_read: int = 0

    def notes(self) -> dict[str, Any]:
        """All but the pixels, as JSON values."""
        return {
            "records": [asdict(record) for record in self.records],
            "seconds": self.seconds,
            "bytes_read": self.bytes_read,
        }

    @classmethod
    def from_notes(cls, pixels: np.ndarray, notes: Mapping[str, Any]) -> "Loaded":
        records = [SampleRecord(**record) for record in notes["records"]]
        return cls(pixels, records, dict(notes["seconds"]), notes["bytes_read"])


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """What every worker of a run gets; travels once per node."""

    bundle: ModelBundle
    out: str
    options: Mapping[str, Any]
    urls: tuple[str, ...]
    run_id: str
    device: str
    threads: int
    batch: int
    batch_is_fixed: bool
    "the user named it: not reduced where memory is short"
    max_image_pixels: int
    solo: bool = False

    def __call__(self, *, model: bool = True) -> "ShardWorker":
        return ShardWorker(self, model=model)


class ShardWorker:
    """Does tasks: read, decode, forward, upsample, encode, write, commit. Two calls may overlap; the model is locked."""

    def __init__(self, setup: WorkerSetup, *, model: bool = True):
        self.setup = setup
        self.store = FeatureStore.open(setup.out, setup.options)
        self.index = self.store.index
        self.geometry = geometry_of(self.store.spec)
        self.batch = setup.batch
        self._device_lock, self._index_lock = threading.Lock(), threading.Lock()
        # These only decode and compress, and are idle when a call has returned.
        self._pool = ThreadPoolExecutor(setup.threads)
        # Pillow's own guard, which by default only warns up to twice its limit.
        Image.MAX_IMAGE_PIXELS = setup.max_image_pixels
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if model:
            torch.set_num_threads(setup.threads)
            self.model = setup.bundle.build(setup.device)
            self.batch = setup.batch if setup.batch_is_fixed else self.model.fit_batch(setup.batch)

    def run(self, task: ShardTask, loaded: tuple[np.ndarray, Mapping[str, Any]] | None = None) -> dict[str, Any]:
        """Do one task to its commit record, from its images or from what a separate stage `loaded`; returns a report.

        A fault of the infrastructure (storage that stays unreachable after its own retries, say) makes the report carry
        `error` and leaves the task pending; so does a bug, and the driver stops when such reports mount up.
        """
        try:
            with self._attempt(task) as starts:
                given_up = self._give_up(task, starts)
                return given_up or self.compute(task, Loaded.from_notes(*loaded) if loaded else self.load(task))
        except Exception as error:  # the task boundary: the driver counts these and raises RunFailed
            message = redact(f"{type(error).__name__}: {error}", self.setup.options)
            logger.warning("task %d did not finish: %s", task.block, message, exc_info=not isinstance(error, OSError))
            return {"block": task.block, "error": message, "node": socket.gethostname()}

    # --- attempts -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _attempt(self, task: ShardTask) -> Iterator[int]:
        """Leave a marker while the task runs; yields how many starts of it ended without removing theirs, this one included.

        Markers belong to one run: a killed driver's tasks start afresh in the next one.
        """
        folder = f"runs/{self.setup.run_id}/attempts/{task.block:08d}"
        name = f"{folder}/{uuid.uuid4().hex}"
        self.store.folder.write(name, b"")
        try:
            yield len(self.store.folder.sizes(folder))
        finally:
            self.store.folder.remove([name])

    def _give_up(self, task: ShardTask, starts: int) -> dict[str, Any] | None:
        if not self.setup.solo:
            return {"block": task.block, "set_aside": starts} if starts > MAX_STARTS else None
        if starts <= MAX_STARTS + MAX_SOLO_STARTS:
            return None
        with self._index_lock:
            rows = self.index.read(task.first, task.last).to_pylist()
        message = f"the worker died {starts - 1} times while on this task: out of memory, or a crash in native code"
        records = [
            record if record.status == "failed" else _failed(record, "worker", "WorkerDied", message)
            for record in self._records(task, rows)
        ]
        return self._write(task, self.store.writer(task), Loaded(np.empty(0), records))

    # --- load ---------------------------------------------------------------------------------------------------------

    def load(self, task: ShardTask) -> Loaded:
        """Read and decode the task's images."""
        t0 = time.perf_counter()
        with self._index_lock:
            table = self.index.read(task.first, task.last)
        blobs = read_images(table, self.setup.urls, self.setup.options)
        t1 = time.perf_counter()
        records = self._records(task, table.to_pylist())
        h, w = self.store.spec.input_size
        pixels = np.zeros((task.n_rows, h, w, 3), np.uint8)
        for i, record in enumerate(self._pool.map(self._decode, records, blobs, pixels)):
            records[i] = record
        seconds = {"read": t1 - t0, "decode": time.perf_counter() - t1}
        return Loaded(pixels, records, seconds, sum(len(blob) for blob in blobs if blob))

    def _records(self, task: ShardTask, rows: Sequence[Mapping[str, Any]]) -> list[SampleRecord]:
        """Ledger rows of a task before its images are read; those without a readable image already failed."""
        records = []
        for number, row in enumerate(rows, task.first):
            source = self.index.sources[row["source"]].url
            record = SampleRecord(
                row=number, key=row["key"], source=source, member=row["member"], offset=row["offset"], size=row["size"]
            )
            records.append(_failed(record, "index", "Unreadable", row["problem"]) if row["problem"] else record)
        return records

    def _decode(self, record: SampleRecord, blob: bytes | None, out: np.ndarray) -> SampleRecord:
        """Decode one image into `out` [H, W, 3]; the record says how it went."""
        if blob is None:
            return record
        if len(blob) < record.size:
            return _failed(
                record,
                "read",
                "ShortRead",
                f"{len(blob)} of {record.size} bytes: the source is shorter than when indexed",
            )
        try:
            image = decode(
                blob, self.geometry, max_pixels=self.setup.max_image_pixels, draft=self.store.spec.jpeg_draft
            )
        except Exception as error:  # noqa: BLE001 - the sample boundary: Pillow raises a dozen types on damaged files
            return _failed(record, "decode", type(error).__name__, str(error))
        out[:] = image.pixels
        place = image.placement
        return SampleRecord(
            **{
                **asdict(record),
                "width": image.width,
                "height": image.height,
                "x_scale": place.x_scale,
                "x_offset": place.x_offset,
                "y_scale": place.y_scale,
                "y_offset": place.y_offset,
                "conversion": image.conversion or None,
            }
        )

    # --- compute ------------------------------------------------------------------------------------------------------

    def compute(self, task: ShardTask, loaded: Loaded) -> dict[str, Any]:
        """Features of the loaded images, written and committed."""
        writer = self.store.writer(task)
        batch, start, halved = self.batch, 0, False
        while start < task.n_rows:
            stop = min(start + batch, task.n_rows)
            ok = [i for i in range(start, stop) if loaded.records[i].status == "ok"]
            if ok:
                try:
                    with self._device_lock:
                        # Failed images stay in the batch as zeros: the others' numbers don't depend on who failed.
                        levels, bad = self.model(loaded.pixels[start:stop], loaded.seconds)
                except torch.OutOfMemoryError:
                    if halved or batch == 1:
                        raise
                    logger.warning("out of GPU memory with batches of %d; going on with %d", batch, batch // 2)
                    torch.cuda.empty_cache()
                    batch, halved = batch // 2, True
                    self.batch = min(self.batch, batch)
                    continue
                self._encode(writer, loaded, levels, bad, ok, start)
            start = stop
        report = self._write(task, writer, loaded)
        return {**report, "batch": batch, "halved": halved}

    def _encode(
        self,
        writer: Any,
        loaded: Loaded,
        levels: Mapping[str, np.ndarray],
        bad: np.ndarray,
        ok: Sequence[int],
        start: int,
    ) -> None:
        t0 = time.perf_counter()
        for i in ok:
            if bad[i - start]:
                message = f"the model gave NaN or infinity in {self.store.spec.precision}; try --precision fp32"
                loaded.records[i] = _failed(loaded.records[i], "forward", "NonFinite", message)
        jobs = [
            (level, i, levels[level.name][i - start])
            for i in ok
            if not bad[i - start]
            for level in self.store.spec.levels
        ]
        for _ in self._pool.map(lambda job: writer.put(*job), jobs):
            pass
        loaded.seconds["encode"] = loaded.seconds.get("encode", 0.0) + time.perf_counter() - t0

    def _write(self, task: ShardTask, writer: Any, loaded: Loaded) -> dict[str, Any]:
        t0 = time.perf_counter()
        records = [
            SampleRecord(**{**asdict(record), "clipped": int(writer.clipped[i])}) if writer.clipped[i] else record
            for i, record in enumerate(loaded.records)
        ]
        objects = writer.write()
        first = writer.commit(records, objects)
        loaded.seconds["write"] = time.perf_counter() - t0
        failed = [record for record in records if record.status == "failed"]
        return {
            "block": task.block,
            "ok": len(records) - len(failed),
            "failed": len(failed),
            "reasons": [[r.stage, r.error, r.message, r.key] for r in failed[:20]],
            "seconds": loaded.seconds,
            "bytes_read": loaded.bytes_read,
            "bytes_written": sum(objects.values()),
            "repeated": not first,
            "node": socket.gethostname(),
        }


def _failed(record: SampleRecord, stage: str, error: str, message: str) -> SampleRecord:
    return SampleRecord(
        **{**asdict(record), "status": "failed", "stage": stage, "error": error, "message": message[:500]}
    )
