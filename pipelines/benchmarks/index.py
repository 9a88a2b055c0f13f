"""Time and memory of indexing many samples that hold almost nothing: what is done before the first feature."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.session import connect
from pipelines.benchmarks.data import write_tiny_tars
from pipelines.benchmarks.processes import durations, in_new_processes
from pipelines.config import ConfigError
from pipelines.costs.clocks import Machine, NumbersFile
from pipelines.costs.process import CORES
from pipelines.executors import RayExecutor
from pipelines.extraction.config import ExtractConfig
from pipelines.extraction.prepare import prepare, resolve
from pipelines.results import table_lines


@dataclass(frozen=True, kw_only=True)
class IndexBenchmark:
    """Index and task list of many samples that hold almost nothing."""

    samples: int = 1_000_000
    """Samples, one tiny JPEG each."""
    tars: int = 1000
    """Tars that they are spread over."""
    out: str = ""
    """Folder in which a temporary one is made (1 KB a sample) and deleted; default: the system's."""
    json: NumbersFile = ""

    def __post_init__(self) -> None:
        if not 1 <= self.tars <= self.samples <= 10**9:
            raise ConfigError("--tars must be at least 1 and at most --samples, and those at most 10^9")


DEBUG = IndexBenchmark(samples=2000, tars=4)


@dataclass(frozen=True, kw_only=True)
class IndexResult:
    """What indexing took."""

    seconds: Mapping[str, float]
    "by step"
    rows: int
    "of the index"
    sources: int
    tasks: int
    parquet_bytes: int
    memory: Mapping[str, int]
    "peaks in bytes, by group of processes"


def measure_index(config: IndexBenchmark, folder: Path) -> IndexResult:
    """Index the input, list the tasks, and validate the index again, on a local Ray; no features are computed."""
    pattern = write_tiny_tars(folder / "tars", config.samples, config.tars)
    run = ExtractConfig.of(data=(pattern,), out=str(folder / "feats.zarr"), weights="random", executor="ray")
    [(rows, sources, tasks, marks)], usage = in_new_processes(_index, (run,))
    parquet = (Path(run.out) / "index").rglob("*.parquet")
    return IndexResult(
        rows=rows,
        sources=sources,
        tasks=tasks,
        seconds=durations(usage.started, marks),
        parquet_bytes=sum(path.stat().st_size for path in parquet),
        memory=usage.peak,
    )


def _index(config: ExtractConfig) -> tuple[int, int, int, dict[str, float]]:
    """How many rows, sources and tasks there are, and when each step was done."""
    marks = {"imports": time.monotonic()}
    resolved = resolve(config)
    marks["input list and model"] = time.monotonic()
    with connect("local", num_cpus=CORES, num_gpus=0):
        marks["ray"] = time.monotonic()
        prepared = prepare(resolved, RayExecutor())
        prepared.keep_index()
        marks["index"] = time.monotonic()
        tasks = prepared.layout.tasks()
        marks["tasks"] = time.monotonic()
        prepare(resolved, RayExecutor())
        marks["index again"] = time.monotonic()
    return prepared.index.n_rows, len(prepared.index.sources), len(tasks), marks


def index_report(_: IndexBenchmark, result: IndexResult, machine: Machine) -> Iterator[str]:
    """The numbers as Markdown, line by line."""
    memory, seconds = result.memory, result.seconds
    yield f"## index: {result.rows:,} samples in {result.sources:,} tars, {machine.cores} cores, {result.tasks:,} tasks"
    rows = [[f"{name}, s", f"{value:.1f}"] for name, value in seconds.items()]
    rows += [["index and tasks, s", f"{seconds['index'] + seconds['tasks']:.1f}"]]
    rows += [
        [f"peak RSS of {name.replace('_', ' ')}, MB", f"{memory[name] / 2**20:,.0f}"]
        for name in ("driver", "workers", "largest_worker", "ray")
    ]
    rows += [["peak PSS of all, MB", f"{memory['pss'] / 2**20:,.0f}"]]
    rows += [["Parquet, MB", f"{result.parquet_bytes / 1e6:.1f}"]]
    yield from table_lines(["", ""], rows)
