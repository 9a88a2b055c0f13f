"""How busy extraction keeps a device: the real pipeline (driver, worker, schedule, markers, shards, commits) round a device and a
storage that sleep. Proves the schedule where there is no GPU.

A simulated device has three streams, as a GPU that copies while it computes: to it, computing, and back. Loading, encoding and
writes sleep for the times that are given, too, so that two cores suffice.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from cluster.metrics import TaskReport
from cluster.progress import size_text
from cluster.resources import WorkerPool, WorkerRequest
from pipelines.benchmarks.data import write_tiny_tars
from pipelines.config import ConfigError, require_at_least
from pipelines.costs.clocks import Machine, NumbersFile
from pipelines.costs.process import BenchmarkFailed
from pipelines.executors import How, InlineExecutor, Loaded, MakeWorker
from pipelines.extraction.attempts import ledger_records
from pipelines.extraction.config import ExtractConfig
from pipelines.extraction.host import HostRows
from pipelines.extraction.prepare import prepare, resolve
from pipelines.extraction.run import run_prepared
from pipelines.extraction.schedule import Lanes, lanes_for
from pipelines.extraction.setup import WorkerSetup
from pipelines.extraction.worker import ShardWorker
from pipelines.features.model import Timings
from pipelines.results import number_lines, table_lines
from storage.spec import Level, ShardTask
from storage.store import FeatureStore
from storage.writer import BlockWriter


@dataclass(frozen=True, kw_only=True)
class DeviceBenchmark:
    """The share of time in which a simulated device is busy. Times are of a batch."""

    forward_ms: float = 45.0
    """What the model takes on the device."""
    up_ms: float = 3.0
    """The copy of the images to it."""
    down_ms: float = 12.0
    """The copy of the rows back."""
    encode_ms: float = 10.0
    """Compressing the rows."""
    put_ms: float = 200.0
    """Writing them to the storage."""
    load_ms: float = 30.0
    """Reading and decoding the images."""
    batch: int = 64
    """Images."""
    block_rows: int = 256
    """Images per task, a power of two."""
    block_mb: float = 154.0
    """Megabytes of a task's rows, which decide how many tasks may be written at once; 128 images of ViT-B at 448 px have 154."""
    tasks: int = 40
    """Tasks of a run."""
    json: NumbersFile = ""

    def __post_init__(self) -> None:
        require_at_least(0, self, "forward_ms", "up_ms", "down_ms", "encode_ms", "put_ms", "load_ms")
        require_at_least(1, self, "batch", "tasks", "block_rows", "block_mb")
        if self.block_rows & (self.block_rows - 1):
            raise ConfigError(f"--block-rows {self.block_rows}: must be a power of two")
        if not self.forward_ms:
            raise ConfigError("--forward-ms 0: a device that takes no time can't be busy; give what a batch takes")

    @property
    def block_bytes(self) -> int:
        return int(self.block_mb * 1e6)


# No network. 2 CPU cores: about 15 seconds, of which most are imports.
DEBUG = DeviceBenchmark(tasks=6)


# --- what sleeps ------------------------------------------------------------------------------------------------------


class Stream:
    """A queue of a device's work, of which one piece is done at a time."""

    def __init__(self) -> None:
        self.free_at = self.busy_s = 0.0

    def add(self, seconds: float, not_before: float) -> float:
        """When a piece of work ends that takes so long, and can't begin earlier than that; on the monotonic clock."""
        begun = max(self.free_at, not_before)
        self.free_at = begun + seconds
        self.busy_s += seconds
        return self.free_at


@dataclass(frozen=True)
class Moment:
    """A time on the monotonic clock, as something to wait for."""

    at: float

    def synchronize(self) -> None:
        time.sleep(max(0.0, self.at - time.monotonic()))


class SimulatedDevice:
    """Takes the times of `config`, and gives zeros. `pageable`: a copy to it waits until all that it was given is done, as
    CUDA's copies from memory that isn't pinned do."""

    def __init__(self, config: DeviceBenchmark, levels: Sequence[Level], *, pageable: bool = False):
        self._config, self._levels, self._pageable = config, levels, pageable
        self.up, self.computing, self.down = Stream(), Stream(), Stream()
        self.begun_at = 0.0

    def begin(self, images: np.ndarray, batch: int) -> HostRows:  # noqa: ARG002
        now, config = time.monotonic(), self._config
        there = self.up.add(config.up_ms / 1e3, max(now, self.computing.free_at) if self._pageable else now)
        self.begun_at = self.begun_at or there
        made = self.computing.add(config.forward_ms / 1e3, there)
        arrived = self.down.add(config.down_ms / 1e3, made)
        if self._pageable:
            Moment(there).synchronize()
        return HostRows(
            levels={level.name: np.zeros((len(images), *level.row_shape), np.float16) for level in self._levels},
            scales={},
            bad=np.zeros(len(images), np.bool_),
            seconds=Timings(begun=0.0, forwarded=config.forward_ms / 1e3, ended=config.forward_ms / 1e3),
            arrived=Moment(arrived),
        )

    def fit_batch(self, batch: int) -> int:
        return batch

    def restrain(self) -> bool:
        return False

    def is_lost(self) -> bool:
        return False


class SimulatedStore(FeatureStore):
    """Its writes take the time of `put_s` beside what they really take."""

    put_s = 0.0

    def put(self, name: str, data: bytes) -> None:
        time.sleep(self.put_s)
        super().put(name, data)


class SleepingWorker(ShardWorker):
    """The real worker, but for what sleeps: it decodes no image, and a task's only object takes the time of all its batches."""

    def __init__(self, setup: WorkerSetup, device: SimulatedDevice, config: DeviceBenchmark):
        super().__init__(setup, device)
        self._times = config
        self.store = SimulatedStore(self.store.folder, self.store.attributes)
        self.store.put_s = config.put_ms / 1e3 * config.block_rows / config.batch

    def _load(self, task: ShardTask, *, apart: bool) -> Loaded:  # noqa: ARG002
        t0 = time.perf_counter()
        with self._index_lock:
            records = ledger_records(self.index, task, self.index.read(task.first, task.last))
        time.sleep(self._times.load_ms / 1e3 * task.n_rows / self._times.batch)
        return Loaded(np.zeros((task.n_rows, 1, 1, 3), np.uint8), records, {"load": time.perf_counter() - t0})

    def _encode(self, writer: BlockWriter, loaded: Loaded, batch: tuple[int, HostRows]) -> dict[str, float]:
        seconds = super()._encode(writer, loaded, batch)
        time.sleep(self._times.encode_ms / 1e3)
        return {**seconds, "encode": seconds["encode"] + self._times.encode_ms / 1e3}


class SleepingExecutor(InlineExecutor):
    """Runs the tasks of an extraction in a `SleepingWorker`, as an actor with a GPU runs them."""

    def __init__(self, config: DeviceBenchmark, way: "Way"):
        self._config, self._way = config, way
        self.reports: list[TaskReport] = []

    def pool(self, request: WorkerRequest) -> WorkerPool:  # noqa: ARG002
        return WorkerPool(device="cuda", size=1, cpus=4, gpus=1)

    def stream(
        self, make_worker: MakeWorker, tasks: Sequence[ShardTask], pool: WorkerPool, how: How = "actor"
    ) -> Iterator[TaskReport]:
        setup = replace(cast("WorkerSetup", make_worker), lanes=self._way.lanes, batch=self._config.batch)
        self.device = SimulatedDevice(self._config, setup.bundle.spec.levels, pageable=self._way.pageable)
        self.worker = SleepingWorker(setup, self.device, self._config)
        for report in super().stream(self._made, tasks, replace(pool, calls=self._way.lanes.calls), how):
            self.reports.append(report)
            yield report

    def _made(self, *, model: bool = True) -> SleepingWorker:  # noqa: ARG002
        return self.worker


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a worker works."""

    lanes: Lanes
    pageable: bool = False


BEFORE = Way(lanes=Lanes(), pageable=True)
"""Two tasks at a time, each from its images to its commit, and copies from memory that isn't pinned: what extraction did before
it had a schedule."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a run's work of one kind took."""

    places: int
    "pieces of work that may be under way at once"
    seconds: float
    "of all of them together"
    share: float
    "of the time of all places, while the device had work to do or waited for some"


@dataclass(frozen=True, kw_only=True)
class Busy:
    """One run."""

    seconds: float
    "from the device's first batch to the end of its last one"
    run_s: float
    "of the whole run, the last writes and the ledger's merge included"
    stages: Mapping[str, Stage]
    most_images: int
    "tasks that held images at once"
    most_rows: int
    "tasks that held rows at once"
    lanes: Lanes

    @property
    def device(self) -> float:
        """The share of time in which the device computed."""
        return self.stages[DEVICE].share

    @property
    def bound(self) -> str:
        """The stage that is used most."""
        return max(self.stages, key=lambda name: self.stages[name].share)


DEVICE = "device"


@dataclass(frozen=True, kw_only=True)
class DeviceResult:
    """A run of the schedule, and one as it was before."""

    now: Busy
    before: Busy


def measure_device(config: DeviceBenchmark, folder: Path) -> DeviceResult:
    """Both runs, one after the other."""
    data = write_tiny_tars(folder / "tars", config.tasks * config.block_rows, 1)
    now = Way(lanes=lanes_for("cuda", config.block_bytes))
    return DeviceResult(
        now=_run(config, data, str(folder / "now.zarr"), now), before=_run(config, data, str(folder / "before.zarr"), BEFORE)
    )


def _run(config: DeviceBenchmark, data: str, out: str, way: Way) -> Busy:
    settings = ExtractConfig.of(
        data=(data,), out=out, model="test_vit.r160_in1k", weights="random", levels=("pooled",), block_rows=config.block_rows
    )
    executor = SleepingExecutor(config, way)
    prepared = prepare(resolve(settings), executor)
    t0 = time.monotonic()
    summary = run_prepared(prepared, executor)
    run_s = time.monotonic() - t0
    if summary.ok != config.tasks * config.block_rows:
        raise BenchmarkFailed(f"{summary.ok} of {config.tasks * config.block_rows} rows are in the store")
    device, schedule = executor.device, executor.worker.schedule
    seconds = device.computing.free_at - device.begun_at

    def stage(busy_s: float, places: int) -> Stage:
        return Stage(places=places, seconds=busy_s, share=busy_s / (seconds * places))

    def spent(name: str) -> float:
        return sum(report.seconds[name] for report in executor.reports)

    return Busy(
        seconds=seconds,
        run_s=run_s,
        stages={
            "loading": stage(spent("load"), min(way.lanes.images, way.lanes.calls)),
            "copies to it": stage(device.up.busy_s, 1),
            DEVICE: stage(device.computing.busy_s, 1),
            "copies from it": stage(device.down.busy_s, 1),
            "encoding": stage(spent("encode"), way.lanes.encoding),
            "writing": stage(spent("write"), min(way.lanes.rows, way.lanes.calls)),
        },
        most_images=schedule.images.most,
        most_rows=schedule.rows.most,
        lanes=way.lanes,
    )


def device_report(config: DeviceBenchmark, result: DeviceResult, machine: Machine) -> Iterator[str]:
    """The numbers as Markdown, line by line."""
    yield f"## device: {config.tasks} tasks of {config.block_rows} images in batches of {config.batch}, on a device that sleeps"
    yield machine.line(f"{machine.cores} cores")
    times = ("load", "up", "forward", "down", "encode", "put")
    yield "ms a batch: " + ", ".join(f"{name} {getattr(config, f'{name}_ms'):g}" for name in times)
    columns = {"": "", "device busy": ".3f", "images/s": ".0f", "bound by": "", "tasks with rows at once": ""}
    columns |= {"their bytes, at most": "", "whole run, s": ".1f"}
    images, rows = config.tasks * config.block_rows, []
    for name, busy in (("the schedule", result.now), ("as before it", result.before)):
        held = f"{busy.most_rows} of {busy.lanes.rows}"
        declared = size_text(busy.lanes.rows * config.block_bytes)
        rows.append([name, busy.device, images / busy.seconds, busy.bound, held, declared, busy.run_s])
    yield from number_lines(columns, rows)
    yield "\nHow much of each stage's places was in use:"
    used = [
        [name, *(f"{stage.share:.2f} of {stage.places}" for stage in busy.stages.values())]
        for name, busy in (("the schedule", result.now), ("as before it", result.before))
    ]
    yield from table_lines(["", *result.now.stages], used)
    yield """
- Driver, worker, schedule, markers, shards and commits are those of jobs/extract.py. Loading, the device and its copies, encoding
  and storage sleep. Busy: of the time from the device's first batch to the end of its last one.
- As before it: two tasks at a time, each from its images to its commit, and copies from memory that isn't pinned."""
