"""How far one driver goes: the real pipeline round workers that sleep where a model would compute.

Index, plan, Ray Data, attempt markers, shards, commit records and the final merge are those of `jobs/extract.py`. Only a
worker's reading, decoding and forward are left out: it writes zeros. So tens of actors fit on a few cores.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from cluster.metrics import TaskReport
from pipelines.benchmarks.data import write_tiny_tars
from pipelines.benchmarks.processes import in_new_processes
from pipelines.benchmarks.simulated import DriverUse, simulated
from pipelines.benchmarks.stages import StagesRun, measure_stages, stages_report
from pipelines.benchmarks.watched import Watched, watched
from pipelines.config import ConfigError, require_at_least
from pipelines.costs.clocks import Machine, NumbersFile
from pipelines.costs.process import BenchmarkFailed
from pipelines.executors import WINDOW_TASKS
from pipelines.extraction.config import ExtractConfig
from pipelines.results import number_lines, table_lines

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ScaleBenchmark:
    """Throughput against the number of simulated actors, what one driver can feed, and what 10^6 rows cost it."""

    actors: tuple[int, ...] = (1, 4, 8, 16, 24)
    """Numbers of actors; each is a Ray worker process of 150 MB and 2 s of CPU time to start."""
    forward_s: float = 2.0
    """Seconds that the model is busy with a task, in the runs over numbers of actors."""
    tasks_each: int = 20
    """Tasks per actor in those runs."""
    block_rows: int = 256
    """Images per task, a power of two."""
    feed_tasks: int = 1500
    """Tasks that take no time, to find what one driver can feed."""
    feed_actors: int = 8
    """Actors of that run, and of the long one."""
    rows: int = 1_000_000
    """Images of the long run, which shows what grows with them."""
    long_forward_s: float = 0.1
    """Seconds that the model is busy with a task in the long run."""
    stage_rows: tuple[int, ...] = (1_000_000, 3_000_000, 10_000_000)
    """Images of the runs whose driver is measured stage by stage, the smallest number first."""
    stage_block_rows: int = 1024
    """Images per task of those: what 10^8 have."""
    stages_only: bool = False
    """Only those."""
    out: str = ""
    """Folder in which a temporary one is made (1 KB an image) and deleted; default: the system's."""
    json: NumbersFile = ""

    def __post_init__(self) -> None:
        require_at_least(1, self, "actors", "tasks_each", "feed_tasks", "feed_actors", "rows", "stage_rows")
        if sorted(self.stage_rows) != list(self.stage_rows):
            raise ConfigError(f"--stage-rows {' '.join(map(str, self.stage_rows))}: the smallest must come first")
        require_at_least(0, self, "forward_s", "long_forward_s")
        for name in ("block_rows", "stage_block_rows"):
            if (number := getattr(self, name)) & (number - 1):
                raise ConfigError(f"--{name.replace('_', '-')} {number}: must be a power of two")


# No network. 2 CPU cores: about a minute, and the numbers mean nothing at this size. The defaults take about 20 minutes, 6 GB
# of memory and 3 GB of disk.
DEBUG = ScaleBenchmark(
    actors=(1, 3),
    forward_s=0.1,
    tasks_each=5,
    block_rows=16,
    feed_tasks=20,
    feed_actors=2,
    rows=2000,
    stage_rows=(1000, 10_000),
    stage_block_rows=16,
)


@dataclass(frozen=True, kw_only=True)
class Steady:
    """Throughput while all actors were there."""

    processes: int
    "that did tasks"
    steady_s: float
    tasks_per_s: float | None
    linear: float | None
    "the part of that time in which the models were busy, as they should be: 1 for all of them all the time"
    fed_per_s: float
    "tasks per second of all the run"
    report_delay_s: float


@dataclass(frozen=True, kw_only=True)
class Run(Steady):
    """One extraction with simulated workers."""

    actors: int
    forward_s: float
    rows: int
    tasks: int
    sizes: Mapping[str, int]
    "bytes in the store, by folder"
    phases: Mapping[str, Mapping[str, float]]
    "as `_phase`, by name"
    cpu_s: Mapping[str, float]
    "from the first report to the actors' end, by group of processes"
    memory: Mapping[str, int]
    "peaks in bytes, by group of processes"

    @property
    def driver_ms(self) -> float:
        """CPU time of the driver for a task."""
        return 1e3 * self.phases["stream"]["cpu_s"] / self.tasks


@dataclass(frozen=True, kw_only=True)
class ScaleResult:
    """All runs."""

    runs: Sequence[Run] = ()
    "by number of actors"
    fed: Run | None = None
    "of tasks that take no time"
    long: Run | None = None
    stages: Sequence[StagesRun] = ()
    "by number of rows"


def measure_scale(config: ScaleBenchmark, folder: Path) -> ScaleResult:
    """Every run of the benchmark, one after another, each in a process of its own."""

    def run(rows: int, actors: int, forward_s: float) -> Run:
        found = measure_run(folder / "run", rows, config.block_rows, actors, forward_s)
        logger.info("%d actors: %d tasks, %.1f tasks/s", actors, found.tasks, found.fed_per_s)
        return found

    stages = []
    for rows in config.stage_rows:
        (folder / f"{rows}").mkdir()
        stages.append(measure_stages(folder / f"{rows}", rows, config.stage_block_rows))
        shutil.rmtree(folder / f"{rows}")
    if config.stages_only:
        return ScaleResult(stages=stages)
    return ScaleResult(
        stages=stages,
        runs=[run(n * config.tasks_each * config.block_rows, n, config.forward_s) for n in config.actors],
        fed=run(config.feed_tasks * config.block_rows, config.feed_actors, 0.0),
        long=run(config.rows, config.feed_actors, config.long_forward_s),
    )


def _drive(folder: str, rows: int, block_rows: int, actors: int, forward_s: float) -> Watched:
    """One extraction with simulated workers, as a process of its own."""
    tars = write_tiny_tars(Path(folder) / "tars", rows, max(1, rows // 10_000))
    config = ExtractConfig.of(
        data=(tars,),
        out=f"{folder}/out.zarr",
        model="test_vit.r160_in1k",
        weights="random",
        levels=("pooled",),
        block_rows=block_rows,
        device="cpu",
        actors=actors,
        actor_cpus=1,
    )
    found = watched(config, partial(simulated, forward_s=forward_s), actors + 1, as_cluster=True)
    if found.summary.ok != rows:
        raise BenchmarkFailed(f"{found.summary.ok} of {rows} rows are in the store")
    return found


PHASES = {
    "index": ("model", "index"),
    "start": ("ready", "first task"),
    "stream": ("first task", "last task"),
    "finish": ("last task", "finished"),
}
"""Between which of the driver's marks they lie."""


def measure_run(folder: Path, rows: int, block_rows: int, actors: int, forward_s: float) -> Run:
    """`_drive` in a new process, what it took, and the sizes of what it wrote; the folder is removed."""
    folder.mkdir()
    try:
        [found], usage = in_new_processes(_drive, (str(folder), rows, block_rows, actors, forward_s))
        kept = ("index", "ledger/commits", "ledger/samples", "runs")
        sizes = {name: _size(folder / "out.zarr" / name) for name in kept}
    finally:
        shutil.rmtree(folder)
    return Run(
        **vars(_steady(found.reports, actors, forward_s)),
        actors=actors,
        forward_s=forward_s,
        rows=rows,
        tasks=found.tasks,
        sizes=sizes,
        phases={name: _phase(found.marks[first], found.marks[last]) for name, (first, last) in PHASES.items()},
        cpu_s=usage.cpu_between(found.marks["first task"].wall_s, found.marks["last task"].wall_s),
        memory=usage.peak,
    )


def _phase(a: DriverUse, b: DriverUse) -> dict[str, float]:
    """What the driver used from `a` to `b`, and the most resident memory so far: `new_peak` if it was reached between them."""
    spent = {"wall_s": b.wall_s - a.wall_s, "cpu_s": b.cpu_s - a.cpu_s, "rss_before": a.rss_bytes, "rss_after": b.rss_bytes}
    return {**spent, "peak_bytes": b.peak_bytes, "new_peak": b.peak_bytes > a.peak_bytes}


def _grown(phase: Mapping[str, float]) -> float:
    """Bytes above what the driver had when the phase began; its peak, where that was a new one."""
    return max(phase["rss_after"], phase["peak_bytes"] * phase["new_peak"]) - phase["rss_before"]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _steady(reports: Sequence[TaskReport], actors: int, forward_s: float) -> Steady:
    """Over the longest time in which `actors` actors were there, each from its first task to its last one."""
    marks = [report.marks for report in reports]
    by_process: dict[float, list[Mapping[str, float]]] = {}
    for one in marks:
        by_process.setdefault(one["process"], []).append(one)
    spans = [(min(one["begun"] for one in mine), max(one["ended"] for one in mine)) for mine in by_process.values()]
    begun, ended = _longest(spans, actors)
    seconds = ended - begun
    shares = [(min(m["ended"], ended) - max(m["begun"], begun)) / max(m["ended"] - m["begun"], 1e-9) for m in marks]
    count = sum(max(0.0, share) for share in shares)
    return Steady(
        processes=len(by_process),
        steady_s=seconds,
        tasks_per_s=count / seconds if seconds else None,
        linear=count * forward_s / (seconds * actors) if seconds and forward_s else None,
        fed_per_s=(len(marks) - 1) / max(1e-9, marks[-1]["arrived"] - marks[0]["arrived"]),
        report_delay_s=float(np.median([one["arrived"] - one["ended"] for one in marks])),
    )


def _longest(spans: Sequence[tuple[float, float]], least: int) -> tuple[float, float]:
    """The longest stretch of time that at least so many of the spans cover throughout; of no length if there is none."""
    events = sorted([(begun, 1) for begun, _ in spans] + [(ended, -1) for _, ended in spans])
    best, since, there = (0.0, 0.0), 0.0, 0
    for at, change in events:
        if change < 0 and there == least and at - since > best[1] - best[0]:
            best = (since, at)
        there += change
        if change > 0 and there == least:
            since = at
    return best


TARGET_ROWS = 100_000_000
"""What the report extrapolates to."""


def scale_report(config: ScaleBenchmark, result: ScaleResult, machine: Machine) -> Iterator[str]:
    """The numbers as Markdown, line by line."""
    yield f"## scale: simulated actors, {config.forward_s:g} s a task of {config.block_rows} images"
    yield machine.line(f"{machine.cores} cores")
    if result.runs:
        yield from _actors_report(result.runs)
    if result.fed:
        yield from _fed_report(config, result.fed)
    if result.long:
        yield from _long_report(result.long)
        if result.long.rows >= 100_000:  # of fewer, what doesn't grow with them is the larger part
            yield from _extrapolation(config, result.long)
    if result.stages:
        yield from stages_report(result.stages, TARGET_ROWS)
    yield """
- Steady: the longest time in which all actors were there, each from its first task to its last one. Linear: every model busy all
  that time. Start: until the first report; other actors come later. A report is late by writing, committing, and its way.
- Driver CPU is that of its process, from the first report to the actors' end; what it has to do once weighs on few tasks.
- The index's wall time is that of scanning on these cores; the driver waits for it.
- What isn't simulated shares the cores: workers read the index, encode zeros, and write shards and commits to a local disk.
- Stage by stage, scans are made up, and so is what an earlier run did. Continue: from the command to the first task. Memory is
  that of the driver's process, torch and the model included."""


def _actors_report(runs: Sequence[Run]) -> Iterator[str]:
    columns = {"actors": "", "tasks/s, all": ".2f", "steady": ".2f", "of linear": ".3f", "driver CPU, ms/task": ".1f"}
    columns |= {"of a core": ".1%", "report late, ms": ".0f", "start, s": ".1f"}
    rows = []
    for run in runs:
        rates = [run.actors, run.fed_per_s, run.tasks_per_s, run.linear, run.driver_ms]
        core = run.cpu_s["driver"] / run.phases["stream"]["wall_s"]
        rows.append([*rates, core, 1e3 * run.report_delay_s, run.phases["start"]["wall_s"]])
    yield from number_lines(columns, rows)


def _fed_report(config: ScaleBenchmark, run: Run) -> Iterator[str]:
    bound = 1e3 / run.driver_ms
    yield f"\n### What one driver feeds: {run.tasks:,} tasks that take no time, {run.actors} actors"
    columns = {"tasks/s": ".0f", "images/s": ",.0f", "driver CPU, ms/task": ".1f", "bound by it, tasks/s": ".0f"}
    columns |= {"workers' CPU, ms/task": ".1f", "actors fed at 10 s": ",.0f"}
    rates, workers = [run.fed_per_s, run.fed_per_s * config.block_rows], 1e3 * run.cpu_s["workers"] / run.tasks
    yield from number_lines(columns, [[*rates, run.driver_ms, bound, workers, bound * 10]])


def _long_report(run: Run) -> Iterator[str]:
    millions = run.rows / 1e6
    yield f"\n### For 10^6 images (measured over {run.rows:,}, {run.tasks:,} tasks, {run.actors} actors)"
    columns = {"driver": "", "wall, s": ".1f", "CPU, s": ".1f", "memory grows by at most, MiB": ".0f"}
    phases = [(name, one["wall_s"], one["cpu_s"], _grown(one) / 2**20) for name, one in run.phases.items()]
    yield from number_lines(columns, [[name, *(value / millions for value in values)] for name, *values in phases])
    sizes = [[name, size / millions / 1e6] for name, size in run.sizes.items()]
    yield from number_lines({"kept in the store": "", "MB": ".1f"}, sizes)


def _extrapolation(config: ScaleBenchmark, run: Run) -> Iterator[str]:
    """What `TARGET_ROWS` would take if all grew with the rows."""
    times, tasks = TARGET_ROWS / run.rows, TARGET_ROWS // config.block_rows
    phases, sizes = run.phases, run.sizes
    yield f"\n### {TARGET_ROWS:,} images, were all to grow with the rows: {tasks:,} tasks"
    rows = [
        ["index: scanned on these cores, min", f"{phases['index']['wall_s'] * times / 60:.0f}"],
        ["index: driver's memory, GiB", f"{_grown(phases['index']) * times / 2**30:.1f}"],
        ["stream: driver CPU, h", f"{phases['stream']['cpu_s'] * times / 3600:.1f}"],
        ["stream: windows of tasks, each with actors of its own", f"{-(-tasks // WINDOW_TASKS)}"],
        ["finish: driver, min", f"{phases['finish']['wall_s'] * times / 60:.0f}"],
        ["objects under ledger/commits", f"{tasks:,}"],
        ["commit records, GB", f"{sizes['ledger/commits'] * times / 1e9:.1f}"],
        ["index and merged ledger, GB", f"{(sizes['index'] + sizes['ledger/samples']) * times / 1e9:.1f}"],
    ]
    yield from table_lines(["", ""], rows)
