"""Speed and memory of extraction, beside the parts it's made of and the loop a competent user would write instead.

What is measured runs in fresh processes, one thing at a time, so that start-up is whole and memory is its own. CPUs only.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr

from cluster.session import connect
from pipelines.benchmarks.baselines import STAGES, BaselineJob, bare_stages, user_loop
from pipelines.benchmarks.data import write_photos
from pipelines.benchmarks.processes import SPAWN, Usage, durations, run_fresh
from pipelines.config import ConfigError
from pipelines.costs.clocks import CORES, BenchmarkFailed, Machine, table
from pipelines.executors import RayExecutor
from pipelines.extraction.config import ExtractConfig
from pipelines.extraction.prepare import prepare, resolve
from pipelines.extraction.run import run_prepared
from pipelines.features.levels import LevelChoice
from storage.store import FeatureStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExtractBenchmark:
    """This pipeline, the loop a competent user would write, the bare forward, and the bound of the bare stages."""

    images: int = 1000
    """Photos to generate: crops of scikit-image's photographs, about 500 x 375 pixels, JPEG quality 90."""
    data: tuple[str, ...] = ()
    """Local WebDataset tars (braces and globs allowed) to use instead, with all their samples."""
    model: str = "vit_small_patch16_224.dino"
    """timm name of a plain ViT."""
    weights: str = "random"
    """As for jobs/extract.py."""
    size: int = 224
    """Side of the square input in pixels."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Autocast of the forward, in everything that is compared."""
    levels: tuple[str, ...] = ("x1", "pooled")
    """As for jobs/extract.py, without learned methods and int8."""
    loop_batch: int = 64
    """Images per forward of the user's loop; the pipeline takes its own default."""
    repeat: int = 1
    """Rounds of pipeline, loop and bare stages, one after another; the best of each and all are reported."""
    stage_s: float = 10.0
    """Seconds for which each bare stage is measured."""
    out: str = ""
    """Folder that keeps the photos and the last round's stores; default: a temporary one that is deleted."""
    json: str = ""
    """Write all numbers to this file."""

    def __post_init__(self) -> None:
        if min(self.images, self.loop_batch, self.repeat) < 1:
            raise ConfigError("--images, --loop-batch and --repeat must be at least 1")
        if any(LevelChoice.parse(level, "float16").dtype == "int8" for level in self.levels):
            raise ConfigError("int8 levels have no counterpart in the user's loop; use @float16 or @float32")


EXTRACT_PRESETS = {
    "default": ExtractBenchmark(),
    # No network. 2 CPU cores: about 40 seconds; the numbers mean nothing at this size.
    "debug": ExtractBenchmark(images=32, model="test_vit.r160_in1k", size=64, precision="fp32", stage_s=0.2),
}

MIN_STEADY_TASKS = 8
"""Below this the steady window opens when the first task begins, since little would be left of it."""


@dataclass
class _Clocked:
    """A worker, or what makes one, whose reports say when their task began and ended."""

    inner: Any

    def __call__(self, **options: Any) -> "_Clocked":
        return _Clocked(self.inner(**options))

    def load(self, task: Any) -> Any:
        return self.inner.load(task)

    def run(self, task: Any, loaded: Any = None) -> dict[str, Any]:
        began = time.monotonic()
        report = self.inner.run(task, loaded)
        return {**report, "began": began, "ended": time.monotonic()}


class _ClockedExecutor:
    """Ray's executor, with the reports kept."""

    def __init__(self) -> None:
        self._ray = RayExecutor()
        self.scan, self.pool = self._ray.scan, self._ray.pool
        self.reports: list[dict[str, Any]] = []

    def run(self, make_worker: Callable[..., Any], *args: Any, **options: Any) -> Iterator[dict[str, Any]]:
        for report in self._ray.run(_Clocked(make_worker), *args, **options):
            self.reports.append(report)
            yield report


def _pipeline(config: ExtractConfig) -> dict[str, Any]:
    """One extraction, end to end."""
    marks = {"imports": time.monotonic()}
    resolved = resolve(config)
    marks["model"] = time.monotonic()
    with connect("local", num_cpus=CORES, num_gpus=0):
        marks["ray"] = time.monotonic()
        executor = _ClockedExecutor()
        prepared = prepare(resolved, executor)
        marks["index"] = time.monotonic()
        summary = run_prepared(prepared, executor)
        done = time.monotonic()
    if summary.failed:
        raise BenchmarkFailed(f"{summary.failed} images failed, so speeds can't be compared: {summary.reasons}")
    reports = executor.reports
    marks["first task"] = min(report["ended"] for report in reports)
    return {
        "images": summary.ok,
        "marks": marks,
        "done": done,
        "wrap_up_s": done - max(report["ended"] for report in reports),
        "stage_ms": {s: 1e3 * sum(r["seconds"].get(s, 0.0) for r in reports) / summary.ok for s in STAGES},
        "bytes_written": summary.bytes_written,
        "batch": max(report["batch"] for report in reports),
        **_steady(reports),
    }


def _steady(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Images and seconds from the end of the first finished task to the end of the last.

    Tasks under way when that window opens count by the part of their stage time that lies in it: read and decode are
    taken to run from a task's beginning, the other stages up to its end (between them it may wait for the model).
    """
    whole = len(reports) < MIN_STEADY_TASKS
    first, last = min(r["began" if whole else "ended"] for r in reports), max(r["ended"] for r in reports)
    images = 0.0
    for r in reports:
        total = sum(r["seconds"].values())
        load = r["seconds"].get("read", 0.0) + r["seconds"].get("decode", 0.0)
        parts = ((r["began"], load), (r["ended"] - (total - load), total - load))
        inside = sum(min(length, max(0.0, start + length - first)) for start, length in parts)
        images += r["ok"] * inside / total
    return {
        "steady": {"start": first, "stop": last, "images": images, "from": "begin" if whole else "end"},
        "steady_images_per_s": images / (last - first),
        "tasks": len(reports),
    }


def measure_extract(config: ExtractBenchmark, folder: Path) -> dict[str, Any]:
    """Rounds of pipeline, loop and bare stages, with their stores in `folder`; the best of each.

    Raises `BenchmarkFailed` if one fails, or if the loop's features differ from the pipeline's, and what `resolve` raises.
    """
    run = ExtractConfig.of(
        data=config.data or (write_photos(folder / "photos", config.images),),
        model=config.model,
        weights=config.weights,
        size=str(config.size),
        precision=config.precision,
        levels=config.levels,
        executor="ray",
        device="cpu",
    )
    rounds = _rounds(run, folder, loop_batch=config.loop_batch, repeat=config.repeat, stage_s=config.stage_s)
    return {**_summarise(rounds), "rounds": rounds}


def _rounds(
    config: ExtractConfig, folder: Path, *, loop_batch: int, repeat: int, stage_s: float
) -> list[dict[str, Any]]:
    _refuse_unfit(config, folder)
    rounds = []
    for n in range(repeat):
        run = replace(config, out=str(folder / f"pipeline-{n}.zarr"))
        logger.info("round %d of %d: the pipeline", n + 1, repeat)
        pipeline = _measure_pipeline(run)
        store = FeatureStore.open(run.out)
        job = BaselineJob(
            spec=store.spec,
            store=run.out,
            urls=tuple(source.url for source in store.index.sources),
            weights=run.features.weights,
            out=str(folder / f"loop-{n}.zarr"),
            batch=loop_batch,
            stage_s=stage_s,
        )
        logger.info("round %d of %d: the user's loop", n + 1, repeat)
        [loop], usage = run_fresh(user_loop, (job,))
        loop = _from_start(loop, usage)
        loop["cosine"] = _agreement(store, job.out, loop.pop("keys"))
        logger.info("round %d of %d: bare stages", n + 1, repeat)
        bare = _measure_bare(replace(job, batch=pipeline["batch"], out=str(folder)))
        rounds.append({"pipeline": pipeline, "loop": loop, "bare": bare})
        if n + 1 < repeat:
            shutil.rmtree(run.out)
            shutil.rmtree(job.out)
    return rounds


def _refuse_unfit(config: ExtractConfig, folder: Path) -> None:
    """Raise `ConfigError` for what the loop and the bare stages have no counterpart of."""
    resolved = resolve(replace(config, out=str(folder / "pipeline-0.zarr")))
    if (folder / "pipeline-0.zarr").exists():
        raise ConfigError(
            f"{folder} holds an earlier benchmark's stores, which a run would continue; give another --out"
        )
    if any(file.is_image or not file.url.startswith("file://") for file in resolved.files):
        raise ConfigError("the benchmark reads local tars only")
    if resolved.model.backbone.is_hierarchical:
        raise ConfigError(
            f"{config.features.model} is hierarchical; the loop that it would be compared with is one for plain ViTs"
        )


def _measure_pipeline(config: ExtractConfig) -> dict[str, Any]:
    [result], usage = run_fresh(_pipeline, (config,))
    window = result.pop("steady")
    cpu = usage.cpu_between(window["start"], window["stop"])
    cpu["idle"] = CORES * (window["stop"] - window["start"]) - sum(cpu.values())
    return _from_start(result, usage) | {
        "steady_s": window["stop"] - window["start"],
        "steady_from": window["from"],
        "steady_cpu_ms": {name: 1e3 * seconds / window["images"] for name, seconds in cpu.items()},
    }


def _from_start(result: dict[str, Any], usage: Usage) -> dict[str, Any]:
    """Absolute times of a result as seconds since its process was started, interpreter and imports included."""
    marks, done = result.pop("marks"), result.pop("done")
    return result | {
        "seconds": done - usage.started,
        "images_per_s": result["images"] / (done - usage.started),
        "start_up_s": max(marks.values()) - usage.started,
        "start_up_parts_s": durations(usage.started, marks),
        "memory": usage.peak,
    }


def _measure_bare(job: BaselineJob) -> dict[str, Any]:
    barrier = SPAWN.Barrier(CORES)
    results, _ = run_fresh(bare_stages, *((job, rank, barrier) for rank in range(CORES)))
    stage_ms = {name: sum(ms[name] for ms in results) / CORES for name in STAGES}
    return {
        "stage_ms": stage_ms,
        "bound_images_per_s": 1e3 * CORES / sum(stage_ms.values()),
        "forward_processes_images_per_s": sum(1e3 / ms["tokens"] for ms in results),
        "forward_threads_images_per_s": 1e3 / results[0]["tokens, all threads"],
        "batch": results[0]["batch"],
    }


def _agreement(store: FeatureStore, loop_url: str, keys: Sequence[str]) -> dict[str, float]:
    """The smallest cosine, over a few rows, between the pipeline's and the loop's features of each level."""
    own = store.index.read(0, min(store.layout.n_rows, len(keys)))["key"].to_pylist()
    if sorted(own) != sorted(keys):
        raise BenchmarkFailed(f"the loop saw {len(keys)} samples, the pipeline {store.layout.n_rows}, or other ones")
    cosines = {}
    a, b = zarr.open_group(store.folder.url, mode="r"), zarr.open_group(loop_url, mode="r")
    for level in store.spec.levels:
        pairs = [
            (a[f"{level.name}/features"][row].ravel(), b[level.name][keys.index(own[row])].ravel())
            for row in range(0, len(own), -(-len(own) // 8))
        ]
        cosines[level.name] = min(_cosine(x.astype(np.float64), y.astype(np.float64)) for x, y in pairs)
    if not min(cosines.values()) > 0.999:
        raise BenchmarkFailed(f"the loop's features are not the pipeline's: cosines {cosines}")
    return cosines


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def _summarise(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The best of each over all rounds, the ratios that have targets, and what lies between the bound and the rate."""
    pipeline, loop = (
        max((r[name] for r in rounds), key=lambda m: m["steady_images_per_s"]) for name in ("pipeline", "loop")
    )
    stage_ms = {stage: min(r["bare"]["stage_ms"][stage] for r in rounds) for stage in STAGES}
    bare = {"stage_ms": stage_ms, "bound_images_per_s": 1e3 * CORES / sum(stage_ms.values())}
    bare["batch"] = rounds[-1]["bare"]["batch"]
    for name in ("forward_processes_images_per_s", "forward_threads_images_per_s"):
        bare[name] = max(r["bare"][name] for r in rounds)
    best = {"pipeline": pipeline, "loop": loop, "bare": bare}
    steady = "steady_images_per_s"
    ratios = {
        "(a) steady / (c) bound": (0.9, ("pipeline", steady), ("bare", "bound_images_per_s")),
        "(a) steady / (d) steady": (1.2, ("pipeline", steady), ("loop", steady)),
        "(a) / (d), whole runs": (None, ("pipeline", "images_per_s"), ("loop", "images_per_s")),
    }
    return {
        "best": best,
        "ratios": {
            name: {"target": target, "best": best[a][x] / best[b][y], "all": [r[a][x] / r[b][y] for r in rounds]}
            for name, (target, (a, x), (b, y)) in ratios.items()
        },
        "gap": _gap(pipeline, stage_ms),
    }


def _gap(pipeline: Mapping[str, Any], bare_ms: Mapping[str, float]) -> dict[str, Any]:
    """Core milliseconds per image of the steady window, by stage and outside the stages."""
    cpu, clock = dict(pipeline["steady_cpu_ms"]), pipeline["stage_ms"]
    total, share = sum(cpu.values()), cpu.pop("workers") / sum(clock.values())
    stages = [
        {
            "stage": s,
            "bare": bare_ms[s],
            "clock": clock[s],
            "cpu": clock[s] * share,
            "gap": clock[s] * share - bare_ms[s],
        }
        for s in STAGES
    ]
    stages.sort(key=lambda stage: -stage["gap"])
    return {"stages": stages, "outside": cpu, "bare": sum(bare_ms.values()), "total": total}


# --- report -----------------------------------------------------------------------------------------------------------


def extract_report(config: ExtractBenchmark, result: dict[str, Any], machine: Machine) -> Iterator[str]:
    """The numbers as Markdown, line by line."""
    best = result["best"]
    pipeline, loop, bare = best["pipeline"], best["loop"], best["bare"]
    yield f"## extract: {pipeline['images']:,} images, {config.model} at {config.size} px, {config.precision}"
    measured = f"torch {machine.torch}; levels {' '.join(config.levels)}; best of {config.repeat}"
    yield machine.line(f"{machine.cores} cores", measured)
    if config.precision == "bf16" and not machine.native_bf16:
        yield "\n**This CPU has no bf16 instructions: bf16 is emulated here, and slow; --precision fp32 is likely faster.**"
    bound = bare["bound_images_per_s"]
    yield from table(
        ["", "images/s", "of the bound"],
        [
            [name, f"{rate:.2f}", f"{rate / bound:.2f}"]
            for name, rate in (
                ("(a) this pipeline, steady", pipeline["steady_images_per_s"]),
                ("(a) this pipeline, whole run", pipeline["images_per_s"]),
                (f"(b) bare forward, {CORES} processes of 1 thread", bare["forward_processes_images_per_s"]),
                (f"(b) bare forward, 1 process of {CORES} threads", bare["forward_threads_images_per_s"]),
                ("(c) bound: cores / sum of bare stages", bound),
                ("(d) the user's loop, steady", loop["steady_images_per_s"]),
                ("(d) the user's loop, whole run", loop["images_per_s"]),
            )
        ],
    )
    rows = []
    for name, r in result["ratios"].items():
        target = f"{r['target']:.2f}" if r["target"] else ""
        rows.append([name, target, f"{r['best']:.2f}", " ".join(f"{x:.2f}" for x in r["all"])])
    yield from table(["ratio", "target", "best", "by round"], rows)
    yield from _gap_report(result["gap"])
    yield from _process_report(pipeline, loop)
    yield from _notes(pipeline, loop, bare)


def _gap_report(gap: dict[str, Any]) -> Iterator[str]:
    """Where the time between the bound and the steady rate goes."""
    rows = [
        [s["stage"], f"{s['bare']:.2f}", f"{s['clock']:.2f}", f"{s['cpu']:.2f}", f"{s['gap']:+.2f}"]
        for s in gap["stages"]
    ]
    rows += [[name, "", "", f"{value:.2f}", f"{value:+.2f}"] for name, value in gap["outside"].items()]
    rows += [["all", f"{gap['bare']:.2f}", "", f"{gap['total']:.2f}", f"{gap['total'] - gap['bare']:+.2f}"]]
    yield "\nWhere it goes, in core milliseconds per image (largest gap first within the stages):"
    yield from table(["", "bare", "stage clock", "in the run", "gap"], rows)


def _process_report(pipeline: dict[str, Any], loop: dict[str, Any]) -> Iterator[str]:
    def megabytes(value: float) -> str:
        return f"{value / 2**20:,.0f} MB" if value else "-"

    rows = [
        ["start-up", f"{pipeline['start_up_s']:.1f} s", f"{loop['start_up_s']:.1f} s"],
        ["whole run", f"{pipeline['seconds']:.1f} s", f"{loop['seconds']:.1f} s"],
    ]
    names = {"pss": "peak memory (PSS)", "rss": "peak memory (RSS)", "driver": "of it the main process"}
    names |= {"workers": "of it workers", "largest_worker": "largest worker", "ray": "of it Ray's daemons"}
    for name, title in names.items():
        rows.append([title, megabytes(pipeline["memory"][name]), megabytes(loop["memory"][name])])
    yield from table(["", "pipeline", "user's loop"], rows)


def _notes(pipeline: dict[str, Any], loop: dict[str, Any], bare: dict[str, Any]) -> Iterator[str]:
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in pipeline["start_up_parts_s"].items())
    waits = ", ".join(f"{name} {ms:.1f}" for name, ms in loop["stage_ms"].items())
    cosines = ", ".join(f"{name} {value:.6f}" for name, value in loop["cosine"].items())
    samples = [str(run["memory"]["pss_samples"]) for run in (pipeline, loop)]
    opens = "first finished task's end" if pipeline["steady_from"] == "end" else "first task's beginning (few tasks)"
    yield f"""
- Whole run: from the process's start (interpreter and imports included) to the finished store; Ray's shutdown is left out.
- (a) start-up, seconds: {parts}; after the last task {pipeline["wrap_up_s"]:.1f}. Tasks: {pipeline["tasks"]}.
- (a) steady: {pipeline["steady_s"]:.1f} s from the {opens} to the last one's end; tasks under way when that opens
  count by the part of their stage time that lies in it.
- (d) steady: all images, from the first batch's arrival at the model to the end. ms per image in its main process:
  {waits}.
- (b), (c): {CORES} single-threaded processes at once, batches of {bare["batch"]}. Writes without fsync (the pipeline syncs).
- "stage clock" is workers' wall time; two tasks share a worker, so clocks overlap. "in the run" shares the workers' CPU time
  out by it. "idle" includes waiting for the disk; "other" is the machine's other programs.
- PSS counts shared pages once; sampled {" and ".join(samples)} times, as often as takes 1 % of a core.
- RSS counts them in every process; sampled every 0.5 s.
- Smallest cosine between (a)'s and (d)'s features, a few rows: {cosines}."""
