"""Extractions as they are measured. Imports no torch before the measured run would."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster.metrics import TaskReport
from cluster.session import connect
from pipelines.benchmarks.simulated import DriverUse, WatchedExecutor
from pipelines.executors import Loaded, MakeWorker, Worker, side_by_side
from pipelines.extraction.config import ExtractConfig
from pipelines.extraction.first_look import find_input
from pipelines.extraction.start import import_driver, import_lean_driver, likely_tasks, workers_ahead
from storage.spec import ShardTask

if TYPE_CHECKING:  # it imports torch
    from pipelines.extraction.run import Summary


@dataclass(frozen=True, kw_only=True)
class Watched:
    """An extraction that was run on a Ray of its own."""

    summary: "Summary"
    tasks: int
    marks: Mapping[str, DriverUse]
    "what the driver had used when each step was done"
    reports: Sequence[TaskReport]
    "of all tasks"


def watched(
    config: ExtractConfig, instead: Callable[[MakeWorker], MakeWorker], cpus: int, *, as_cluster: bool = False
) -> Watched:
    """Run an extraction with other workers, as `WatchedExecutor`; its steps are those of `extraction.start.main`. `as_cluster`:
    on a Ray of this machine's own that is used as any other."""
    marks = {"settings": DriverUse.now()}
    files = find_input(config)
    marks["input list"] = DriverUse.now()
    executor, ahead = WatchedExecutor(instead, as_cluster=as_cluster), workers_ahead(config, likely_tasks(config, files))
    with ExitStack() as stack:

        def session() -> None:
            stack.enter_context(connect("local", num_cpus=cpus, num_gpus=0))
            ahead(executor)

        side_by_side(session, import_driver if as_cluster else import_lean_driver)
        from pipelines.extraction.prepare import prepare, resolve
        from pipelines.extraction.run import run_prepared

        marks["Ray and imports"] = DriverUse.now()
        resolved = resolve(config, files, executor)
        marks["model"] = DriverUse.now()
        prepared = prepare(resolved, executor)
        marks["index"] = DriverUse.now()
        summary = run_prepared(prepared, executor)
        marks |= executor.marks | {"finished": DriverUse.now()}
    return Watched(summary=summary, tasks=prepared.layout.n_blocks, marks=marks, reports=executor.reports)


@dataclass
class Clocked:
    """A worker whose reports say when their task began and ended."""

    inner: Worker

    def load(self, task: ShardTask) -> Loaded:
        return self.inner.load(task)

    def run(self, task: ShardTask, loaded: Loaded | None = None) -> TaskReport:
        began = time.monotonic()
        report = self.inner.run(task, loaded)
        return replace(report, marks={"began": began, "ended": time.monotonic()})


def clocked(make_worker: MakeWorker, *, model: bool = True) -> Clocked:
    return Clocked(make_worker(model=model))


def timed_extraction(config: ExtractConfig, cpus: int) -> Watched:
    """One extraction, end to end, with the times of its tasks."""
    return watched(config, lambda make_worker: functools.partial(clocked, make_worker), cpus)
