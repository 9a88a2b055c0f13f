"""Where work runs: in this process, or on Ray. The only seam between the pipeline and Ray Data.

Both executors give the same bytes (tests/test_pipelines_ray.py). Ray settings were found by experiment with 2.60; each
has its reason beside it.
"""

import functools
import gc
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np

from cluster.resources import WorkerPool
from cluster.session import connect
from storage.inputs import InputFile
from storage.spec import ShardTask
from storage.tars import MemberRules, SourceScan, scan_source

logger = logging.getLogger(__name__)

WINDOW_TASKS = 20_000
"""Tasks of one Ray Dataset: its driver spends about 1 ms on each before the first one starts."""

NO_PROGRESS_S = 900
"""A run in which no task ends for this long is stuck (a node that can't start, storage that hangs) and is ended."""


class Worker(Protocol):
    """What an executor drives; made once per actor."""

    def load(self, task: ShardTask) -> Any:
        """A task's images and what is known of them: `pixels` uint8 [rows, H, W, 3] and `notes()`, JSON values."""

    def run(self, task: ShardTask, loaded: tuple[np.ndarray, Mapping[str, Any]] | None = None) -> dict[str, Any]:
        """Do a task, loading it first where it comes without `loaded` (pixels, notes); returns its report."""


class InlineExecutor:
    """Everything in this process, one task after another."""

    def scan(self, files: Sequence[InputFile], rules: MemberRules, options: Mapping[str, Any]) -> Iterator[SourceScan]:
        """Scan sources in order, a few at once."""
        with ThreadPoolExecutor(4) as pool:
            for start in range(0, len(files), 16):
                yield from pool.map(lambda file: scan_source(file, rules, options), files[start : start + 16])

    def pool(self, device: str, actors: int | None, cpus: int | None, gpus: float | None, **how: Any) -> WorkerPool:
        import torch

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return WorkerPool(device=device, size=1, cpus=cpus or torch.get_num_threads(), gpus=gpus or 0)

    def run(
        self,
        make_worker: Callable[[], Worker],
        tasks: Sequence[ShardTask],
        pool: WorkerPool,
        *,
        decode_on: str = "actor",
        solo: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """Reports of finished tasks."""
        worker = make_worker()
        for task in tasks:
            yield worker.run(task)


class RayExecutor:
    """Ray tasks for scanning, Ray Data over an actor pool for tasks. Needs a connected session."""

    def scan(self, files: Sequence[InputFile], rules: MemberRules, options: Mapping[str, Any]) -> Iterator[SourceScan]:
        """Scan sources in order; at most a few hundred are under way, so a limit costs little."""
        import ray

        if all(file.is_image for file in files):  # nothing is read to index plain files
            yield from (scan_source(file, rules, options) for file in files)
            return
        per_task = max(1, min(16, len(files) // 64))
        scan = ray.remote(num_cpus=1, max_retries=3)(_scan_group)
        groups = [files[i : i + per_task] for i in range(0, len(files), per_task)]
        ahead = max(2, int(ray.cluster_resources().get("CPU", 1)) * 2)
        futures = [scan.remote(group, rules, options) for group in groups[:ahead]]
        for i in range(len(groups)):
            yield from ray.get(futures[i])
            futures[i] = None
            if len(futures) < len(groups):
                futures.append(scan.remote(groups[len(futures)], rules, options))

    def pool(self, device: str, actors: int | None, cpus: int | None, gpus: float | None, **how: Any) -> WorkerPool:
        from cluster.resources import choose_pool

        return choose_pool(device, actors, cpus, gpus, **how)

    def run(
        self,
        make_worker: Callable[[], Worker],
        tasks: Sequence[ShardTask],
        pool: WorkerPool,
        *,
        decode_on: str = "actor",
        solo: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """Reports of finished tasks, in the order in which they finish. `solo`: one task at a time in one actor."""
        for start in range(0, len(tasks), WINDOW_TASKS):
            yield from self._run_window(make_worker, tasks[start : start + WINDOW_TASKS], pool, decode_on, solo)

    def _run_window(
        self,
        make_worker: Callable[[], Worker],
        tasks: Sequence[ShardTask],
        pool: WorkerPool,
        decode_on: str,
        solo: bool,
    ) -> Iterator[dict[str, Any]]:
        import ray
        import ray.data

        context = ray.data.DataContext.get_current()
        # One input row is one task is one block; splitting blocks would cut that. Must be set before the Dataset is made.
        context.target_max_block_size = None
        context.max_consecutive_actor_init_deaths = 3
        context.execution_no_progress_timeout_s = NO_PROGRESS_S
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
        # Weights cross the network once per node, through the object store, and are shared by its actors.
        factory = ray.put(make_worker)
        items = [asdict(task) for task in tasks]
        dataset = ray.data.from_items(items, override_num_blocks=len(items))
        if decode_on == "cluster":
            load = functools.partial(_load_task, factory=factory)
            dataset = dataset.map_batches(load, batch_size=1, batch_format="numpy", num_cpus=1)
        concurrency = 1 if solo else 2
        dataset = dataset.map_batches(
            _Actor,
            batch_size=1,
            batch_format="numpy",
            fn_constructor_kwargs={"factory": factory},
            **pool.placement,
            # Two calls overlap in an actor, with a lock round the model: one reads and writes while the other computes.
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                max_size=1 if solo else min(pool.size, len(tasks)),
                initial_size=1 if solo else min(pool.size, len(tasks)),
                max_concurrent_calls_per_actor=concurrency,
                enable_true_multi_threading=True,
            ),
        )
        try:
            for row in dataset.iter_rows():
                yield json.loads(row["report"])
        finally:
            # Without this an actor that restarted keeps its GPU and starves the next Dataset (seen in 2.60).
            del dataset
            gc.collect()


def _scan_group(files: Sequence[InputFile], rules: MemberRules, options: Mapping[str, Any]) -> list[SourceScan]:
    return [scan_source(file, rules, options) for file in files]


def _task_of(batch: Mapping[str, np.ndarray]) -> ShardTask:
    return ShardTask(**{name: int(batch[name][0]) for name in ("block", "first", "last")})


_workers: dict[Any, Worker] = {}
"""Loading workers of this process, by factory: reading a store's metadata once per process, not once per task."""


def _load_task(batch: dict[str, np.ndarray], factory: Any) -> dict[str, Any]:
    """Ray Data function of the separate decode stage: uint8 pixels and small records cross the object store."""
    import ray

    if factory not in _workers:
        _workers[factory] = ray.get(factory)(model=False)
    loaded = _workers[factory].load(_task_of(batch))
    return {**batch, "pixels": loaded.pixels[None], "notes": [json.dumps(loaded.notes())]}


class _Actor:
    """Ray Data's view of a worker: one call per task, returning one small row."""

    def __init__(self, factory: Any):
        import ray

        from cluster.metrics import WorkerMetrics

        self._worker = ray.get(factory)()
        self._metrics = WorkerMetrics()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        task = _task_of(batch)
        loaded = (batch["pixels"][0], json.loads(batch["notes"][0])) if "pixels" in batch else None
        report = self._worker.run(task, loaded)
        self._metrics.count(report)
        return {"report": [json.dumps(report)]}


@contextmanager
def executor_for(*, inline: bool, address: str | None, device: str) -> Iterator[InlineExecutor | RayExecutor]:
    """The executor that settings ask for, with a Ray session round it where it needs one. Raises `ClusterError`."""
    if inline:
        yield InlineExecutor()
        return
    with connect(address, num_gpus=0 if device == "cpu" else None):
        yield RayExecutor()
