"""What many rows cost the driver of an extraction, stage by stage, where what workers do takes no time.

Listing, index, plan, commit records, merge and root are those of `jobs/extract.py`. Scans of tars come as they would from other
processes, but are made up; so are the commit records and shards of an earlier run, which was stopped just before its end.
"""

import functools
import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from cluster.metrics import TaskReport
from cluster.resources import WorkerPool, WorkerRequest
from pipelines.benchmarks.data import tiny_jpeg, write_tiny_tars
from pipelines.benchmarks.processes import in_new_processes
from pipelines.benchmarks.simulated import DriverUse
from pipelines.costs.process import CORES
from pipelines.executors import How, InlineExecutor, MakeWorker
from pipelines.extraction.config import ExtractConfig
from pipelines.indexing import SMALL_INPUT
from pipelines.results import number_lines
from storage.inputs import InputFile
from storage.ledger import SCHEMA
from storage.samples import PART_ROWS, ROW_GROUP_ROWS
from storage.spec import ShardTask
from storage.store import FeatureStore
from storage.tars import SCHEMA as ROWS_SCHEMA
from storage.tars import SourceScan

Item = TypeVar("Item")
Result = TypeVar("Result")

TAR_ROWS = 10_000
"""Images of a tar."""

LEFT_TASKS = 8
"""Tasks that the stopped run left."""

STAGES = ("index", "plan", "continue", "finish")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage took of its driver."""

    wall_s: float
    cpu_s: float
    "of its process, threads included"
    rss_before: int
    "bytes of resident memory when it began, with torch and the model"
    peak_bytes: int
    "of resident memory, of the process so far"


@dataclass(frozen=True, kw_only=True)
class StagesRun:
    """The stages of an extraction of so many rows."""

    rows: int
    tasks: int
    stages: Mapping[str, Stage]
    objects: int
    "of the finished store, below `index/` and `ledger/`"


class MadeUp(InlineExecutor):
    """An executor whose workers are done at once: scans say what `rows` images in tars of `TAR_ROWS` would, tasks are committed
    without being computed."""

    def __init__(self, rows: int):
        self._rows, self._size = rows, len(tiny_jpeg())
        self.marks: dict[str, DriverUse] = {}

    def pool(self, request: WorkerRequest) -> WorkerPool:  # noqa: ARG002
        return WorkerPool(device="cpu", size=1, cpus=1, gpus=0)

    def map(
        self,
        do: Callable[[Item], Result],  # noqa: ARG002 - a scan; nothing else is asked of it
        items: Iterable[Item],
        *,
        loaders: int | None = None,  # noqa: ARG002
    ) -> Generator[Result, None, None]:
        for files in items:
            assert isinstance(files, Sequence)
            yield [self._scan(file) for file in files]  # type: ignore[misc]

    def _scan(self, file: InputFile) -> SourceScan:
        first = int(file.name.removesuffix(".tar").rpartition("-")[2]) * TAR_ROWS
        n = min(TAR_ROWS, self._rows - first)
        # Keys in no order, each once: a prime is no divisor of a power of ten.
        numbers = np.arange(first, first + n) * 48_271 % self._rows
        digits = (numbers[:, None] // 10 ** np.arange(8, -1, -1) % 10 + ord("0")).astype(np.uint8)
        offsets = pa.py_buffer(np.arange(0, 9 * n + 1, 9, dtype=np.int32))
        columns = {
            "key": pa.StringArray.from_buffers(n, offsets, pa.py_buffer(digits.tobytes())),
            "source": pa.array(np.zeros(n, np.int32)),
            "member": pa.array(["jpg"] * n),
            "offset": pa.array(np.arange(n) * 1024 + 512),
            "size": pa.array(np.full(n, self._size)),
            "problem": pa.nulls(n, pa.string()),
        }
        return SourceScan(pa.table(columns, schema=ROWS_SCHEMA), hashlib.sha256(file.name.encode()).hexdigest())

    def stream(
        self,
        make_worker: MakeWorker,
        tasks: Sequence[ShardTask],
        pool: WorkerPool,  # noqa: ARG002
        how: How = "actor",  # noqa: ARG002
    ) -> Iterator[TaskReport]:
        self.marks["continue"] = DriverUse.now()
        config = make_worker.config  # type: ignore[attr-defined]
        commit(config.out, [task.block for task in tasks])
        for task in tasks:
            yield TaskReport(block=task.block, ok=task.n_rows)
        self.marks["stream"] = DriverUse.now()


def write_tars(folder: Path, rows: int) -> str:
    """Tars of `TAR_ROWS` images; returns their pattern. Where there are many, all but the first are holes: nobody reads them."""
    if rows * 1024 <= SMALL_INPUT:  # which the driver scans itself
        return write_tiny_tars(folder, rows, -(-rows // TAR_ROWS))
    pattern = write_tiny_tars(folder, TAR_ROWS, 1)
    for number in range(1, -(-rows // TAR_ROWS)):
        with (folder / f"tiny-{number:06d}.tar").open("wb") as tar:
            tar.truncate(min(TAR_ROWS, rows - number * TAR_ROWS) * 1024 + 1024)
    return pattern


def commit(out: str, blocks: Sequence[int]) -> None:
    """Shards of zeros and commit records of some tasks, as fast as they can be written: not synced, in no order."""
    store, folder = FeatureStore.open(out), Path(out)
    names = {field.name for field in SCHEMA}
    group = functools.lru_cache(1)(lambda first: store.index.read(first, min(first + ROW_GROUP_ROWS, len(store))))
    for block in blocks:
        task, writer = store.layout.task(block), store.writer(store.layout.task(block))
        objects = {}
        for level in store.spec.levels:
            for name, data in zip(store.layout.shard_names(level, block), writer.objects(level), strict=True):
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                objects[name] = len(data)
        first, n = task.first - task.first % ROW_GROUP_ROWS, task.n_rows
        rows = group(first).slice(task.first - first, n)
        same = {"status": "ok", "width": 1, "height": 1, "x_scale": 1.0, "x_offset": 0.0, "y_scale": 1.0, "y_offset": 0.0}
        same |= {"conversion": "grey->rgb", "clipped": 0, "source": store.index.sources[rows["source"][0].as_py()].url}
        columns = {
            **{name: pa.repeat(pa.scalar(value, SCHEMA.field(name).type), n) for name, value in same.items()},
            **{name: rows[name] for name in rows.column_names if name in names and name not in same},
            "row": pa.array(np.arange(task.first, task.last)),
            "digest": pa.array([f"{row:032x}" for row in range(task.first, task.last)]),
        }
        table = pa.table([columns.get(name, pa.nulls(n, SCHEMA.field(name).type)) for name in SCHEMA.names], schema=SCHEMA)
        record = folder / store.ledger.commits.name(block)
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_bytes(store.ledger.record_bytes(task, table, objects))


def measure_stages(folder: Path, rows: int, block_rows: int) -> StagesRun:
    """All stages of an extraction of so many rows, the drivers' in new processes, one after another."""
    config = ExtractConfig.of(
        data=(write_tars(folder / "tars", rows),),
        out=f"{folder}/out.zarr",
        model="test_vit.r160_in1k",
        weights="random",
        levels=("pooled",),
        block_rows=block_rows,
        executor="inline",
        device="cpu",
        max_failed_fraction=1.0,
    )
    [index], _ = in_new_processes(_index, (config, rows))
    [plan], _ = in_new_processes(_plan, (config, rows))
    tasks = -(-rows // block_rows)
    per_part = PART_ROWS // block_rows
    # In pieces of whole parts of the index, of which each process opens few.
    done = [range(first, min(first + per_part, tasks - LEFT_TASKS)) for first in range(0, tasks - LEFT_TASKS, per_part)]
    in_new_processes(_commit, *((config.out, done[i::CORES]) for i in range(min(CORES, len(done)))))
    [(carry_on, finish)], _ = in_new_processes(_continue, (config, rows))
    stages = dict(zip(STAGES, (index, plan, carry_on, finish), strict=True))
    objects = sum(path.is_file() for name in ("index", "ledger") for path in Path(config.out, name).rglob("*"))
    return StagesRun(rows=rows, tasks=tasks, stages=stages, objects=objects)


def _commit(out: str, pieces: Sequence[range]) -> None:
    for blocks in pieces:
        commit(out, blocks)


def _index(config: ExtractConfig, rows: int) -> Stage:
    from pipelines.extraction.prepare import prepare, resolve

    resolved = resolve(config)
    begun = DriverUse.now()
    prepare(resolved, MadeUp(rows)).create_store()
    return _between(begun, DriverUse.now())


def _plan(config: ExtractConfig, rows: int) -> Stage:
    from pipelines.extraction.plan import make_plan
    from pipelines.extraction.prepare import prepare, resolve

    resolved = resolve(config)
    begun = DriverUse.now()
    make_plan(prepare(resolved, MadeUp(rows)))
    return _between(begun, DriverUse.now())


def _continue(config: ExtractConfig, rows: int) -> tuple[Stage, Stage]:
    """From the command to its first task, and from its last one to its end."""
    from pipelines.extraction.prepare import prepare, resolve
    from pipelines.extraction.run import run_prepared

    executor = MadeUp(rows)
    resolved = resolve(config)
    begun = DriverUse.now()
    summary = run_prepared(prepare(resolved, executor), executor)
    ended = DriverUse.now()
    assert summary.ok == rows, f"{summary.ok} of {rows} rows are in the store"
    return _between(begun, executor.marks["continue"]), _between(executor.marks["stream"], ended)


def _between(begun: DriverUse, ended: DriverUse) -> Stage:
    return Stage(
        wall_s=ended.wall_s - begun.wall_s,
        cpu_s=ended.cpu_s - begun.cpu_s,
        rss_before=begun.rss_bytes,
        peak_bytes=ended.peak_bytes,
    )


def stages_report(runs: Sequence[StagesRun], target: int) -> Iterator[str]:
    """The numbers as Markdown, line by line, and what `target` rows come to on the line through the smallest and the largest."""
    small, large = runs[0], runs[-1]
    numbers = ", ".join(f"{run.rows:,}" for run in runs)
    yield f"\n### The driver, stage by stage: {numbers} rows, scans and tasks that take no time"
    columns = {"rows": ",", "stage": "", "wall, s": ".1f", "CPU, s": ".1f", "CPU, µs a row": ".1f"}
    columns |= {"memory before, MiB": ".0f", "peak, MiB": ".0f"}
    rows: list[list[object]] = []
    for run in runs:
        for name, stage in run.stages.items():
            memory = (stage.rss_before / 2**20, stage.peak_bytes / 2**20)
            rows.append([run.rows, name, stage.wall_s, stage.cpu_s, 1e6 * stage.cpu_s / run.rows, *memory])
    yield from number_lines(columns, rows)
    kept = ", ".join(f"{run.objects:,} of {run.rows:,} rows in {run.tasks:,} tasks" for run in runs)
    yield f"\nObjects below index/ and ledger/ of the finished store: {kept}"
    if large.rows < 2 * small.rows:
        return
    yield f"\nOn the line through {small.rows:,} and {large.rows:,} rows, {target:,} come to"
    lines = []
    for name in STAGES:
        a, b = small.stages[name], large.stages[name]
        times = (target - small.rows) / (large.rows - small.rows)
        cpu, peak = a.cpu_s + times * (b.cpu_s - a.cpu_s), a.peak_bytes + times * (b.peak_bytes - a.peak_bytes)
        lines.append([name, (b.cpu_s / large.rows) / (a.cpu_s / small.rows), cpu / 60, peak / 2**20])
    of_small = f"CPU a row at {large.rows:,}, of that at {small.rows:,}"
    yield from number_lines({"stage": "", of_small: ".2f", "CPU, min": ".1f", "peak, MiB": ".0f"}, lines)
