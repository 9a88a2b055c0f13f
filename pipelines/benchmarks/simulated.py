"""Workers that sleep where a model would compute, in the real pipeline: index, Ray Data, markers, commits, merge.

Needs no torch: a worker process takes 150 MB and 2 s of CPU time, so that tens of them fit on a few cores.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import psutil

from cluster.metrics import TaskReport
from cluster.resources import WorkerPool
from pipelines.costs.process import high_water
from pipelines.executors import How, Loaded, MakeWorker, RayExecutor
from pipelines.extraction.attempts import attempt, ledger_records, write_and_commit
from pipelines.extraction.setup import WorkerSetup
from storage.paths import StorageOptions
from storage.spec import ShardTask
from storage.store import FeatureStore


@dataclass(frozen=True, kw_only=True)
class SimulatedSetup:
    """What every simulated worker of a run gets. Holds no model, so that workers load no torch."""

    out: str
    options: StorageOptions
    run_id: str
    forward_s: float

    def __call__(self, *, model: bool = True) -> "SimulatedWorker":  # noqa: ARG002
        return SimulatedWorker(self)


class SimulatedWorker:
    """Does tasks as `pipelines.extraction.worker.ShardWorker` does, but sleeps instead of computing and writes zeros."""

    def __init__(self, setup: SimulatedSetup):
        self.setup = setup
        self.store = FeatureStore.open(setup.out, setup.options)
        self._index_lock, self._device_lock = threading.Lock(), threading.Lock()

    def load(self, task: ShardTask) -> Loaded:
        """What is known of the task's images, without their pixels."""
        with self._index_lock:
            rows = self.store.index.read(task.first, task.last)
        return Loaded(np.empty(0, np.uint8), ledger_records(self.store.index, task, rows))

    def run(self, task: ShardTask, loaded: Loaded | None = None) -> TaskReport:  # noqa: ARG002
        """Do one task to its commit record; the report says which process did it and when the model was busy."""
        with attempt(self.store.folder, self.setup.run_id, task):
            found = self.load(task)
            with self._device_lock:
                begun = time.monotonic()
                time.sleep(self.setup.forward_s)
                ended = time.monotonic()
            found.seconds["forward"] = ended - begun
            writer = self.store.writer(task)
            for level in self.store.spec.levels:
                zeros = np.zeros(level.row_shape, np.float32)
                for i in range(task.n_rows):
                    writer.put(level, i, zeros)
            report = write_and_commit(task, writer, found)
        return replace(report, marks={"process": os.getpid(), "begun": begun, "ended": ended})


def simulated(make_worker: MakeWorker, forward_s: float) -> SimulatedSetup:
    """What makes simulated workers for the store that the real ones would fill."""
    of = cast(WorkerSetup, make_worker)
    return SimulatedSetup(out=of.config.out, options=of.config.options, run_id=of.run_id, forward_s=forward_s)


@dataclass(frozen=True, kw_only=True)
class DriverUse:
    """What a process has used so far."""

    wall_s: float
    "on the monotonic clock"
    cpu_s: float
    rss_bytes: int
    peak_bytes: int

    @classmethod
    def now(cls) -> "DriverUse":
        """Of this process."""
        return cls(
            wall_s=time.monotonic(),
            cpu_s=time.process_time(),
            rss_bytes=psutil.Process().memory_info().rss,
            peak_bytes=high_water() or 0,
        )


class WatchedExecutor(RayExecutor):
    """Has `instead` make the workers, of what would have made them; keeps the reports, and when each came as their mark
    `arrived`, in seconds of the monotonic clock."""

    def __init__(self, instead: Callable[[MakeWorker], MakeWorker], *, as_cluster: bool = False):
        super().__init__(as_cluster=as_cluster)
        self._instead = instead
        self.reports: list[TaskReport] = []
        self.marks: dict[str, DriverUse] = {}
        "when the workers are asked for, and when the first and the last report came"

    def stream(
        self, make_worker: MakeWorker, tasks: Sequence[ShardTask], pool: WorkerPool, how: How = "actor"
    ) -> Iterator[TaskReport]:
        self.marks["ready"] = DriverUse.now()
        for report in super().stream(self._instead(make_worker), tasks, pool, how):
            if not self.reports:
                self.marks["first task"] = DriverUse.now()
            self.reports.append(replace(report, marks={**report.marks, "arrived": time.monotonic()}))
            yield report
        self.marks["last task"] = DriverUse.now()
