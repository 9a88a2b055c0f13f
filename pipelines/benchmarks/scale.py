"""How far one driver goes: the real pipeline round workers that sleep where a model would compute.

Index, plan, Ray Data, attempt markers, shards, commit records and the final merge are those of `jobs/extract.py`. Only a
worker's reading, decoding and forward are left out: it writes zeros. So tens of actors fit on a few cores.
"""

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.session import connect
from pipelines.benchmarks.data import write_tiny_tars
from pipelines.benchmarks.processes import run_fresh
from pipelines.benchmarks.simulated import SimulatedExecutor, driver_use
from pipelines.config import ConfigError
from pipelines.costs.clocks import CORES, BenchmarkFailed, table
from pipelines.executors import WINDOW_TASKS
from pipelines.extraction.config import ExtractConfig
from pipelines.extraction.prepare import prepare, resolve
from pipelines.extraction.run import run_prepared

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
    out: str = ""
    """Folder in which a temporary one is made (1 KB an image) and deleted; default: the system's."""
    json: str = ""
    """Write all numbers to this file."""

    def __post_init__(self) -> None:
        if min(*self.actors, self.tasks_each, self.feed_tasks, self.feed_actors, self.rows) < 1:
            raise ConfigError("--actors, --tasks-each, --feed-tasks, --feed-actors and --rows must be at least 1")
        if self.block_rows & (self.block_rows - 1):
            raise ConfigError(f"--block-rows {self.block_rows}: must be a power of two")
        if min(self.forward_s, self.long_forward_s) < 0:
            raise ConfigError("--forward-s and --long-forward-s must not be negative")


SCALE_PRESETS = {
    # No network. 2 CPU cores: about 10 minutes, 6 GB of memory, 3 GB of disk.
    "default": ScaleBenchmark(),
    # 2 CPU cores: about 50 seconds; the numbers mean nothing at this size.
    "debug": ScaleBenchmark(
        actors=(1, 3), forward_s=0.1, tasks_each=5, block_rows=16, feed_tasks=20, feed_actors=2, rows=2000
    ),
}


def measure_scale(config: ScaleBenchmark, folder: Path) -> dict[str, Any]:
    """Every run of the benchmark, one after another, each in a process of its own."""
    runs = []
    for actors in config.actors:
        rows = actors * config.tasks_each * config.block_rows
        runs.append(_logged(measure_run(folder / "run", rows, config.block_rows, actors, config.forward_s)))
    fed = measure_run(folder / "run", config.feed_tasks * config.block_rows, config.block_rows, config.feed_actors, 0.0)
    _logged(fed)
    long = measure_run(folder / "run", config.rows, config.block_rows, config.feed_actors, config.long_forward_s)
    return {"runs": runs, "fed": fed, "long": _logged(long)}


def _logged(run: dict[str, Any]) -> dict[str, Any]:
    logger.info("%d actors: %d tasks, %.1f tasks/s", run["actors"], run["tasks"], run["fed_per_s"])
    return run


# --- one run ----------------------------------------------------------------------------------------------------------


def _drive(folder: str, rows: int, block_rows: int, actors: int, forward_s: float) -> dict[str, Any]:
    """One extraction with simulated workers, as a process of its own: when what happened, and what the driver used."""
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
    resolved = resolve(config)
    with connect("local", num_cpus=actors + 1, num_gpus=0):
        executor = SimulatedExecutor(forward_s)
        marks = {"start": driver_use()}
        prepared = prepare(resolved, executor)
        marks["indexed"] = driver_use()
        summary = run_prepared(prepared, executor)
        marks |= executor.marks | {"finished": driver_use()}
    if summary.ok != rows:
        raise BenchmarkFailed(f"{summary.ok} of {rows} rows are in the store")
    return {"rows": summary.ok, "tasks": prepared.layout.n_blocks, "marks": marks, "reports": executor.reports}


def measure_run(folder: Path, rows: int, block_rows: int, actors: int, forward_s: float) -> dict[str, Any]:
    """`_drive` in a fresh process, what it took, and the sizes of what it wrote; the folder is removed."""
    folder.mkdir()
    try:
        [found], usage = run_fresh(_drive, (str(folder), rows, block_rows, actors, forward_s))
        sizes = {
            name: _size(folder / "out.zarr" / name) for name in ("index", "ledger/commits", "ledger/samples", "runs")
        }
    finally:
        shutil.rmtree(folder)
    marks, reports = found["marks"], found["reports"]
    began, ended = marks["first task"]["wall_s"], marks["last task"]["wall_s"]
    return {
        "actors": actors,
        "forward_s": forward_s,
        "rows": found["rows"],
        "tasks": found["tasks"],
        "sizes": sizes,
        "phases": {
            "index": _between(marks, "start", "indexed"),
            "start": _between(marks, "ready", "first task"),
            "stream": _between(marks, "first task", "last task"),
            "finish": _between(marks, "last task", "finished"),
        },
        "cpu_s": usage.cpu_between(began, ended),
        "memory": usage.peak,
        **_steady(reports, actors, forward_s),
    }


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _between(marks: Mapping[str, Mapping[str, float]], first: str, last: str) -> dict[str, float]:
    """Wall and CPU seconds of the driver between two marks, and its memory before, after, and at most so far."""
    a, b = marks[first], marks[last]
    return {
        "wall_s": b["wall_s"] - a["wall_s"],
        "cpu_s": b["cpu_s"] - a["cpu_s"],
        "rss_before": a["rss_bytes"],
        "rss_after": b["rss_bytes"],
        "peak_bytes": b["peak_bytes"],
        "new_peak": b["peak_bytes"] > a["peak_bytes"],
    }


def _steady(reports: Sequence[Mapping[str, Any]], actors: int, forward_s: float) -> dict[str, Any]:
    """Tasks per second over the longest time in which `actors` actors were there, each from its first task to its last one.

    `linear`: the part of that time in which the models were busy, as they should be; `actors` of them all the time are 1.
    """
    by_process: dict[int, list[Mapping[str, Any]]] = {}
    for report in reports:
        by_process.setdefault(report["process"], []).append(report)
    spans = [(min(r["begun"] for r in mine), max(r["ended"] for r in mine)) for mine in by_process.values()]
    begun, ended = _longest(spans, actors)
    seconds = ended - begun
    shares = [(min(r["ended"], ended) - max(r["begun"], begun)) / max(r["ended"] - r["begun"], 1e-9) for r in reports]
    count = sum(max(0.0, share) for share in shares)
    return {
        "processes": len(by_process),
        "steady_s": seconds,
        "tasks_per_s": count / seconds if seconds else None,
        "linear": count * forward_s / (seconds * actors) if seconds and forward_s else None,
        "fed_per_s": (len(reports) - 1) / max(1e-9, reports[-1]["arrived"] - reports[0]["arrived"]),
        "report_delay_s": float(np.median([r["arrived"] - r["ended"] for r in reports])),
    }


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


# --- what it says -----------------------------------------------------------------------------------------------------

TARGET_ROWS = 100_000_000
"""What the report extrapolates to."""


def scale_report(config: ScaleBenchmark, result: dict[str, Any]) -> Iterator[str]:
    """The numbers as Markdown, line by line."""
    found = result["machine"]
    yield f"## scale: simulated actors, {config.forward_s:g} s a task of {config.block_rows} images"
    yield f"\n{found['cpu']}, {CORES} cores. Load average when it ended: {found['load']:.1f}."
    rows = [
        [
            f"{run['actors']}",
            f"{run['fed_per_s']:.2f}",
            _number(run["tasks_per_s"]),
            _number(run["linear"], 3),
            f"{_driver_ms(run):.1f}",
            f"{run['cpu_s']['driver'] / run['phases']['stream']['wall_s']:.1%}",
            f"{1e3 * run['report_delay_s']:.0f}",
            f"{run['phases']['start']['wall_s']:.1f}",
        ]
        for run in result["runs"]
    ]
    head = ["actors", "tasks/s, all", "steady", "of linear", "driver CPU, ms/task", "of a core", "report late, ms"]
    yield from table([*head, "start, s"], rows)
    yield from _fed_report(config, result["fed"])
    yield from _long_report(result["long"])
    if result["long"]["rows"] >= 100_000:  # of fewer, what doesn't grow with them is the larger part
        yield from _extrapolation(config, result["long"])
    yield """
- Steady: the longest time in which all actors were there, each from its first task to its last one. Linear: every model busy all
  that time. Start: until the first report; other actors come later. A report is late by writing, committing, and its way.
- Driver CPU is that of its process, from the first report to the actors' end; what it has to do once weighs on few tasks.
- The index's wall time is that of scanning on these cores; the driver waits for it.
- What isn't simulated shares the cores: workers read the index, encode zeros, and write shards and commits to a local disk."""


def _driver_ms(run: Mapping[str, Any]) -> float:
    return 1e3 * run["phases"]["stream"]["cpu_s"] / run["tasks"]


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _fed_report(config: ScaleBenchmark, run: Mapping[str, Any]) -> Iterator[str]:
    bound, per_task = 1e3 / _driver_ms(run), 1e3 / run["tasks"]
    yield f"\n### What one driver feeds: {run['tasks']:,} tasks that take no time, {run['actors']} actors"
    yield from table(
        [
            "tasks/s",
            "images/s",
            "driver CPU, ms/task",
            "bound by it, tasks/s",
            "workers' CPU, ms/task",
            "actors fed at 10 s",
        ],
        [
            [
                f"{run['fed_per_s']:.0f}",
                f"{run['fed_per_s'] * config.block_rows:,.0f}",
                f"{_driver_ms(run):.1f}",
                f"{bound:.0f}",
                f"{run['cpu_s']['workers'] * per_task:.1f}",
                f"{bound * 10:,.0f}",
            ]
        ],
    )


def _long_report(run: Mapping[str, Any]) -> Iterator[str]:
    millions = run["rows"] / 1e6
    yield f"\n### For 10^6 images (measured over {run['rows']:,}, {run['tasks']:,} tasks, {run['actors']} actors)"
    rows = [
        [
            name,
            f"{phase['wall_s'] / millions:.1f}",
            f"{phase['cpu_s'] / millions:.1f}",
            f"{_grown(phase) / millions / 2**20:.0f}",
        ]
        for name, phase in run["phases"].items()
    ]
    yield from table(["driver", "wall, s", "CPU, s", "memory grows by at most, MiB"], rows)
    yield from table(
        ["kept in the store", "MB"], [[name, f"{size / millions / 1e6:.1f}"] for name, size in run["sizes"].items()]
    )


def _grown(phase: Mapping[str, float]) -> float:
    """Bytes above what the driver had when the phase began; its peak, where that was a new one."""
    return max(phase["rss_after"], phase["peak_bytes"] if phase["new_peak"] else 0) - phase["rss_before"]


def _extrapolation(config: ScaleBenchmark, run: Mapping[str, Any]) -> Iterator[str]:
    """What `TARGET_ROWS` would take if all grew with the rows."""
    times, tasks = TARGET_ROWS / run["rows"], TARGET_ROWS // config.block_rows
    phases, sizes = run["phases"], run["sizes"]
    yield f"\n### {TARGET_ROWS:,} images, were all to grow with the rows: {tasks:,} tasks"
    yield from table(
        ["", ""],
        [
            ["index: scanned on these cores, min", f"{phases['index']['wall_s'] * times / 60:.0f}"],
            ["index: driver's memory, GiB", f"{_grown(phases['index']) * times / 2**30:.1f}"],
            ["stream: driver CPU, h", f"{phases['stream']['cpu_s'] * times / 3600:.1f}"],
            ["stream: windows of tasks, each with actors of its own", f"{-(-tasks // WINDOW_TASKS)}"],
            ["finish: driver, min", f"{phases['finish']['wall_s'] * times / 60:.0f}"],
            ["objects under ledger/commits", f"{tasks:,}"],
            ["commit records, GB", f"{sizes['ledger/commits'] * times / 1e9:.1f}"],
            ["index and merged ledger, GB", f"{(sizes['index'] + sizes['ledger/samples']) * times / 1e9:.1f}"],
        ],
    )
