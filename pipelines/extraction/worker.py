"""One task, anywhere: read, decode, forward, upsample, encode, write, commit.

A task's features never leave the process that computed them, except as whole shards in the output.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from cluster.metrics import TaskReport
from operators.codecs.memory import DecodeMemory
from operators.codecs.refusal import ImageRefused
from operators.image import DecodedImage, decode, limit_pillow
from operators.nvjpeg import Nvjpeg
from pipelines.executors import Loaded, WorkerBroken
from pipelines.extraction.attempts import attempt, failed, ledger_records, write_and_commit
from pipelines.extraction.decoding import DecodeStuck, DecodeThreads
from pipelines.extraction.host import Device, HostRows
from pipelines.extraction.sandbox import DECODE_SECONDS, DecoderDied, Sandbox
from pipelines.extraction.schedule import Schedule
from pipelines.features.model import not_finite
from pipelines.features.photos import geometry_of
from storage.begun import Begun, begun_records
from storage.ledger import SampleRecord, image_digest
from storage.paths import StorageError
from storage.redaction import redact
from storage.root import StoreReplaced
from storage.sample_images import Blob, Unread, try_some
from storage.spec import Level, ShardTask
from storage.videos import Frame
from storage.writer import BlockWriter

if TYPE_CHECKING:  # it imports this module
    from pipelines.extraction.setup import WorkerSetup

logger = logging.getLogger(__name__)

_Blobs = Mapping[int, Blob]
"""The bytes of images by their position in the task."""

MAX_STARTS = 3
"""Starts of a task, within one run, after which it's set aside: its worker keeps dying, or its neighbours' workers do."""

MAX_SOLO_STARTS = 3
"""Further starts when it's alone in a worker; then its rows are recorded as failed."""


class ShardWorker:
    """Does tasks: read, decode, forward, upsample, encode, write, commit. Calls may overlap, as the schedule has it."""

    def __init__(self, setup: "WorkerSetup", device: Device | None):
        """`device` computes; None where the worker only loads."""
        self.setup, self.config = setup, setup.config
        self.store = setup.open_store()
        self.index = self.store.index
        self.geometry = geometry_of(self.store.spec)
        self._device = device
        # What the user named is not reduced where memory is short.
        self.batch = setup.batch if self.config.batch or device is None else device.fit_batch(setup.batch)
        self.schedule = Schedule(setup.lanes)
        self._index_lock = threading.Lock()
        # These only compress, and are idle when a call has returned.
        self._pool = ThreadPoolExecutor(setup.threads)
        self._decoders = DecodeThreads(setup.threads)
        self._memory = DecodeMemory(self.config.max_image_pixels)
        self._gpu = setup.device if self.store.spec.jpeg_decoder == "nvjpeg" else ""
        self._nvjpeg = Nvjpeg(self._gpu) if self._gpu else None
        limit_pillow(self.config.max_image_pixels)

    def run(self, task: ShardTask, loaded: Loaded | None = None) -> TaskReport:
        """Do one task to its commit record, from its images or from what a separate stage `loaded`; returns a report.

        A fault of the infrastructure (storage that stays unreachable after its own retries, say) gives a report of an error
        and leaves the task pending; so does a bug, and the driver stops when such reports mount up. Raises `WorkerBroken`.
        """
        try:
            with self.schedule.call(), attempt(self.store.folder, self.setup.run_id, task) as starts:
                if given_up := self._give_up(task, starts):
                    return given_up
                ready = loaded or self._load_or_set_aside(task, starts)
                return TaskReport(block=task.block, outcome="set_aside") if ready.aside else self.compute(task, ready)
        except WorkerBroken:
            raise
        except StoreReplaced as error:
            return TaskReport(block=task.block, outcome="replaced", error=str(error))
        except Exception as error:  # the task boundary: the driver counts these and raises RunFailed
            message = redact(f"{type(error).__name__}: {error}", self.config.options)
            is_known = isinstance(error, OSError | StorageError | torch.OutOfMemoryError)
            logger.warning("task %d did not finish: %s", task.block, message, exc_info=not is_known)
            return TaskReport(block=task.block, outcome="error", error=message)

    # --- attempts -----------------------------------------------------------------------------------------------------

    def _give_up(self, task: ShardTask, starts: int) -> TaskReport | None:
        if not self.setup.solo:
            return TaskReport(block=task.block, outcome="set_aside") if starts > MAX_STARTS else None
        if starts <= MAX_STARTS + MAX_SOLO_STARTS:
            return None
        with self._index_lock:
            rows = self.index.read(task.first, task.last)
        message = f"the worker died {starts - 1} times while on this task: out of memory, or a crash in native code"
        records = [
            record if record.status == "failed" else failed(record, "worker", "WorkerDied", message)
            for record in ledger_records(self.index, task, rows)
        ]
        return write_and_commit(task, self.store.writer(task), Loaded(np.empty(0), records))

    # --- load ---------------------------------------------------------------------------------------------------------

    def load(self, task: ShardTask) -> Loaded:
        """Read and decode the task's images, for `run` in another process."""
        with attempt(self.store.folder, self.setup.run_id, task) as starts:
            return Loaded.set_aside() if starts > MAX_STARTS else self._load_or_set_aside(task, starts)

    def _load_or_set_aside(self, task: ShardTask, starts: int) -> Loaded:
        # Where somebody died over the task, one of its images may be why: each is decoded where it can do no harm.
        apart = self.setup.solo or starts > 1 or task.block in self.setup.suspects
        try:
            return self._load(task, apart=apart)
        except (DecodeStuck, MemoryError) as error:
            if self.setup.solo:
                raise
            logger.warning("task %d runs again, alone: %s: %s", task.block, type(error).__name__, error)
            return Loaded.set_aside()

    def _load(self, task: ShardTask, *, apart: bool) -> Loaded:
        """Raises `DecodeStuck`, and `MemoryError` where there is too little for one image while others run."""
        t0 = time.perf_counter()
        with self._index_lock:
            table = self.index.read(task.first, task.last)
        # Who only loads leaves the chunks to the one that writes them.
        kept = Begun.of(self.store, task) if self._device else None
        begun = begun_records(self.store, task) if kept is None else kept.records
        records = ledger_records(self.index, task, table)
        records[: len(begun)] = begun
        readable = [i for i, record in enumerate(records) if record.status == "ok" and i >= len(begun)]
        chosen = table.take(pa.array(readable, pa.int64()))
        found = try_some(
            chosen,
            self.setup.urls,
            self.config.options,
            max_bytes=self.config.max_image_bytes,
            max_pixels=self.config.max_image_pixels,
            threads=self.setup.threads,
        )
        h, w = self.store.spec.input_size
        pixels = np.zeros((task.n_rows, h, w, 3), np.uint8)
        decode_all = self._decode_apart if apart else self._decode_in_threads
        seconds, bytes_read = {"read": 0.0, "decode": 0.0}, 0
        for some in found:
            blobs = {readable[i]: blob for i, blob in some.items()}
            t1 = time.perf_counter()
            decode_all(records, blobs, pixels)
            t2 = time.perf_counter()
            # Of a video, reading is the least.
            seconds["decode" if any(isinstance(blob, Frame) for blob in blobs.values()) else "read"] += t1 - t0
            seconds["decode"] += t2 - t1
            bytes_read += sum(len(blob) for blob in blobs.values() if isinstance(blob, bytes))
            t0 = t2
        return Loaded(pixels, records, seconds, bytes_read, begun=len(begun), kept=kept)

    def _decode_in_threads(self, records: list[SampleRecord], blobs: _Blobs, pixels: np.ndarray) -> None:
        def here(data: bytes) -> DecodedImage:
            limit, draft = self.config.max_image_pixels, self.store.spec.jpeg_draft
            return decode(data, self.geometry, max_pixels=limit, draft=draft, gpu=self._nvjpeg, memory=self._memory)

        def one(i: int) -> SampleRecord | None:
            try:
                return _decoded(records[i], blobs[i], pixels[i], here)
            except MemoryError:
                return None

        done = self._decoders.map(one, list(blobs), DECODE_SECONDS)
        for i, record in zip(blobs, done, strict=True):
            # Memory that others hold is no fault of the image: again, without those.
            records[i] = record or _decoded(records[i], blobs[i], pixels[i], here)

    def _decode_apart(self, records: list[SampleRecord], blobs: _Blobs, pixels: np.ndarray) -> None:
        limit, draft = self.config.max_image_pixels, self.store.spec.jpeg_draft
        with Sandbox(self.geometry, max_pixels=limit, draft=draft, gpu=self._gpu) as sandbox:
            for i, blob in blobs.items():
                try:
                    records[i] = _decoded(records[i], blob, pixels[i], sandbox.decode)
                except MemoryError:
                    if not self.setup.solo:
                        raise
                    message = "alone in its process, decoding it takes more memory than there is"
                    records[i] = failed(records[i], "decode", "MemoryError", message)

    # --- compute ------------------------------------------------------------------------------------------------------

    def compute(self, task: ShardTask, loaded: Loaded) -> TaskReport:
        """Features of the loaded images, written and committed. Raises `WorkerBroken`."""
        writer, pace = self.store.writer(task, loaded.kept), _Pace(self.batch)
        if len(writer.begun) != loaded.begun:
            # Another process loaded it, which didn't see that the chunks of its first rows are damaged.
            loaded = self._load(task, apart=False)
            writer = self.store.writer(task, loaded.kept)
        try:
            batches = self._batches(task, loaded, pace)
            encoded = self.schedule.compute(batches, lambda batch: batch[1].wait(), partial(self._encode, writer, loaded))
        except RuntimeError as error:
            if self._device is None or not self._device.is_lost():
                raise
            raise WorkerBroken(
                f"the GPU can't be used by this process any more, after task {task.block} ({error}); the same command goes on"
            ) from error
        for seconds in encoded:
            for stage, value in seconds.items():
                loaded.took(stage, value)
        return replace(write_and_commit(task, writer, loaded), batch=pace.batch)

    def _batches(self, task: ShardTask, loaded: Loaded, pace: "_Pace") -> Iterator[tuple[int, HostRows]]:
        """Rows of the task's images, and where they start. Batches without an image to compute are left out."""
        assert self._device, "made to load, and not to compute"
        start = 0
        while start < task.n_rows:
            stop = min(start + pace.batch, task.n_rows)
            if any(record.status == "ok" for record in loaded.records[max(start, loaded.begun) : stop]):
                try:
                    # Failed images are in the batch, as zeros: the others' numbers don't depend on who failed. So are rows
                    # that were done before.
                    rows = self._begin(self._device, loaded, slice(start, stop), pace.batch)
                except torch.OutOfMemoryError as error:
                    self._take_less(task, pace, error)
                    continue
                yield start, rows
            start = stop
        loaded.pixels, loaded.maps, loaded.kept = np.empty(0, np.uint8), None, None

    def _begin(self, device: Device, loaded: Loaded, some: slice, batch: int) -> HostRows:
        """Give some of a task's rows to the device."""
        return device.begin(loaded.pixels[some], batch)

    def _take_less(self, task: ShardTask, pace: "_Pace", error: torch.OutOfMemoryError) -> None:
        """Halve the batch, and have upsamplers take as little at once as they can. Raises `OutOfMemoryError` after that."""
        assert self._device
        restrained, before = self._device.restrain(), pace.batch
        if before == 1 and not restrained:
            raise torch.OutOfMemoryError(
                f"{error} That is with one image at a time: use fewer actors on a GPU (--actor-gpus), a smaller --size, or "
                "coarser levels"
            ) from None
        pace.batch = max(1, before // 2)
        self.batch = min(self.batch, pace.batch)
        less = ", and with upsamplers that take less at once" if restrained else ""
        logger.warning("task %d: out of memory with batches of %d; going on with %d%s", task.block, before, pace.batch, less)
        torch.cuda.empty_cache()

    def _encode(self, writer: BlockWriter, loaded: Loaded, batch: tuple[int, HostRows]) -> dict[str, float]:
        """Encode a batch's rows, which are there; returns seconds by stage."""
        t0 = time.perf_counter()
        start, rows = batch
        good = []
        # While later batches are computed, too, but each has records of its own.
        for at, record in enumerate(loaded.records[start : start + len(rows.bad)]):
            if start + at < loaded.begun:
                continue
            if record.status == "ok" and rows.bad[at]:
                loaded.records[start + at] = failed(record, "forward", "NonFinite", not_finite(self.store.spec))
            elif record.status == "ok":
                good.append(at)

        def put(job: tuple[int, Level]) -> None:
            at, level = job
            scale = rows.scales[level.name][at] if level.name in rows.scales else None
            writer.put(level, start + at, rows.levels[level.name][at], scale)

        for _ in self._pool.map(put, [(at, level) for at in good for level in self.store.spec.levels]):
            pass
        encoding = time.perf_counter() - t0
        return {"forward": rows.seconds.forward, "upsample": rows.seconds.upsample, "encode": encoding}


@dataclass
class _Pace:
    """How many images of a task are computed at once."""

    batch: int


def _decoded(record: SampleRecord, blob: Blob, out: np.ndarray, decoder: Callable[[bytes], DecodedImage]) -> SampleRecord:
    """Decode one image into `out` [H, W, 3]; the record says how it went. Raises `MemoryError`, which isn't the image's."""
    if blob is None:
        return record
    if isinstance(blob, Unread):
        return failed(record, blob.stage, blob.error, blob.message)
    if isinstance(blob, Frame):
        record = replace(record, time=blob.time)
    elif len(blob) < record.size:
        message = f"{len(blob)} of {record.size} bytes: the source is shorter than when indexed"
        return failed(record, "read", "ShortRead", message)
    record = replace(record, digest=image_digest(blob))
    try:
        image = decoder(blob)
    except MemoryError:
        raise
    except DecoderDied as error:
        return failed(record, "worker", "WorkerDied", str(error))
    except ImageRefused as error:
        return failed(record, "decode", error.kind, str(error))
    except Exception as error:  # noqa: BLE001 - the sample boundary: a bug in a decoder costs its image
        return failed(record, "decode", type(error).__name__, str(error))
    out[:] = image.pixels
    place = image.placement
    scales = {name: getattr(place, name) for name in ("x_scale", "x_offset", "y_scale", "y_offset")}
    conversion = image.conversion or (blob.conversion if isinstance(blob, Frame) else "") or None
    return replace(record, width=image.width, height=image.height, conversion=conversion, **scales)
