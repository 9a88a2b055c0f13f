"""Speed and memory of extraction, beside the parts it's made of and the loop a competent user would write instead.

What is measured runs in new processes, one thing at a time, so that start-up is whole and memory is its own. CPUs only.
"""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import zarr

from cluster.metrics import TaskReport
from pipelines.benchmarks.baselines import STAGES, BaselineJob, bare_stages, user_loop
from pipelines.benchmarks.data import require_fresh, write_photos
from pipelines.benchmarks.processes import SPAWN, Usage, durations, in_new_processes
from pipelines.benchmarks.watched import timed_extraction
from pipelines.config import ConfigError, require_at_least
from pipelines.costs.clocks import NumbersFile
from pipelines.costs.process import CORES, BenchmarkFailed
from pipelines.executors import InlineExecutor
from pipelines.extraction.config import ExtractConfig
from pipelines.extraction.prepare import default_batch, prepare, resolve
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
    stage_s: float = 4.0
    """Seconds for which each bare stage is measured, three times a round: before, between and after the contenders."""
    out: str = ""
    """Folder that keeps the photos and the last round's stores; default: a temporary one that is deleted."""
    json: NumbersFile = ""

    def __post_init__(self) -> None:
        require_at_least(1, self, "images", "loop_batch", "repeat")
        if any(LevelChoice.parse(level, "float16").encoding not in ("float16", "float32") for level in self.levels):
            raise ConfigError("the user's loop has no int8 levels, and compresses all others; use @float16 or @float32")


# No network. 2 CPU cores: about 40 seconds; the numbers mean nothing at this size.
DEBUG = ExtractBenchmark(images=32, model="test_vit.r160_in1k", size=64, precision="fp32", stage_s=0.2)


@dataclass(frozen=True, kw_only=True)
class WholeRun:
    """A program from its start, interpreter and imports included."""

    images: int
    seconds: float
    "to the finished store"
    images_per_s: float
    start_up_s: float
    "to the end of the first task or batch"
    start_up_parts_s: Mapping[str, float]
    start_up_cpu_s: Mapping[str, float]
    "CPU seconds in that time, by group of processes"
    memory: Mapping[str, int]
    "peaks in bytes, by group of processes"

    @classmethod
    def of(cls, images: int, marks: Mapping[str, float], done: float, usage: Usage) -> "WholeRun":
        """`marks` and `done` are readings of the monotonic clock."""
        return cls(
            images=images,
            seconds=done - usage.started,
            images_per_s=images / (done - usage.started),
            start_up_s=max(marks.values()) - usage.started,
            start_up_parts_s=durations(usage.started, marks),
            start_up_cpu_s=usage.cpu_between(usage.started, max(marks.values())),
            memory=usage.peak,
        )


@dataclass(frozen=True, kw_only=True)
class LoopRun(WholeRun):
    """The user's loop."""

    steady_images_per_s: float
    stage_ms: Mapping[str, float]
    "milliseconds per image in the main process"
    cosine: Mapping[str, float]
    "the smallest between its features and the pipeline's, by level"


@dataclass(frozen=True, kw_only=True)
class PipelineRun(WholeRun):
    """This pipeline."""

    steady_images_per_s: float
    steady_s: float
    steady_from: Literal["begin", "end"]
    "of the first task"
    steady_cpu_ms: Mapping[str, float]
    "CPU milliseconds per image, by group of processes"
    stage_ms: Mapping[str, float]
    "milliseconds per image on workers' clocks"
    wrap_up_s: float
    "after the last task"
    bytes_written: int
    batch: int
    tasks: int


@dataclass(frozen=True, kw_only=True)
class BareStages:
    """Each stage alone, in a process per core."""

    stage_ms: Mapping[str, float]
    bound_images_per_s: float
    "cores by the sum of the stages"
    forward_processes_images_per_s: float
    forward_threads_images_per_s: float
    batch: int

    @classmethod
    def mean(cls, several: "Sequence[BareStages]") -> "BareStages":
        """Of measurements at several times: a machine's speed isn't always the same."""
        stage_ms = {stage: sum(each.stage_ms[stage] for each in several) / len(several) for stage in STAGES}
        return cls(
            stage_ms=stage_ms,
            bound_images_per_s=_bound(stage_ms),
            forward_processes_images_per_s=sum(each.forward_processes_images_per_s for each in several) / len(several),
            forward_threads_images_per_s=sum(each.forward_threads_images_per_s for each in several) / len(several),
            batch=several[0].batch,
        )


@dataclass(frozen=True, kw_only=True)
class Round:
    """All that is compared, measured one after another."""

    pipeline: PipelineRun
    loop: LoopRun
    "that makes the same features"
    bare: BareStages
    "mean of `bare_each`"
    bare_each: Sequence[BareStages]
    "before the pipeline, between it and the loop, after the loop"


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One rate by another."""

    target: float | None
    best: float
    all: Sequence[float]
    "by round"


@dataclass(frozen=True, kw_only=True)
class StageGap:
    """Core milliseconds per image of one stage."""

    stage: str
    bare: float
    clock: float
    cpu: float
    "in the run: the workers' CPU time, shared out by their clocks"
    gap: float


@dataclass(frozen=True, kw_only=True)
class Gap:
    """What lies between the bound and the steady rate, in core milliseconds per image."""

    stages: Sequence[StageGap]
    "largest gap first"
    outside: Mapping[str, float]
    "of processes other than the workers"
    bare: float
    total: float


@dataclass(frozen=True, kw_only=True)
class ExtractResult:
    """All rounds, and the best of each part."""

    best: Round
    ratios: Mapping[str, Ratio]
    gap: Gap
    rounds: Sequence[Round]


@dataclass(frozen=True, kw_only=True)
class SteadyWindow:
    """From the end of the first finished task to the end of the last; of few tasks, from the beginning of the first."""

    start: float
    stop: float
    images: float
    opens: Literal["begin", "end"]

    @property
    def seconds(self) -> float:
        return self.stop - self.start


MIN_STEADY_TASKS = 8
"""Below this the steady window opens when the first task begins, since little would be left of it."""


def _steady(tasks: Sequence[TaskReport]) -> SteadyWindow:
    """Tasks under way when the window opens count by the part of their stage time that lies in it: read and decode are taken to
    run from a task's beginning, the other stages up to its end (between them it may wait for the model)."""
    whole, marks = len(tasks) < MIN_STEADY_TASKS, [task.marks for task in tasks]
    first, last = min(one["began" if whole else "ended"] for one in marks), max(one["ended"] for one in marks)
    images = 0.0
    for task in tasks:
        total = sum(task.seconds.values())
        load = task.seconds.get("read", 0.0) + task.seconds.get("decode", 0.0)
        parts = ((task.marks["began"], load), (task.marks["ended"] - (total - load), total - load))
        inside = sum(min(length, max(0.0, start + length - first)) for start, length in parts)
        images += task.ok * inside / total
    return SteadyWindow(start=first, stop=last, images=images, opens="begin" if whole else "end")


def _measure_pipeline(config: ExtractConfig) -> PipelineRun:
    [found], usage = in_new_processes(timed_extraction, (config, CORES))
    if failed := found.summary.failed:
        raise BenchmarkFailed(f"{failed} images failed, so speeds can't be compared: {found.summary.reasons}")
    images, tasks, done = found.summary.ok, found.reports, found.marks["finished"].wall_s
    marks = {name: found.marks[name].wall_s for name in ("settings", "input list", "Ray and imports", "model", "index", "ready")}
    marks["first task"] = min(task.marks["ended"] for task in tasks)
    window = _steady(tasks)
    cpu = usage.cpu_between(window.start, window.stop)
    cpu["idle"] = CORES * window.seconds - sum(cpu.values())
    return PipelineRun(
        **vars(WholeRun.of(images, marks, done, usage)),
        steady_images_per_s=window.images / window.seconds,
        steady_s=window.seconds,
        steady_from=window.opens,
        steady_cpu_ms={name: 1e3 * seconds / window.images for name, seconds in cpu.items()},
        stage_ms={s: 1e3 * sum(task.seconds.get(s, 0.0) for task in tasks) / images for s in STAGES},
        wrap_up_s=done - max(task.marks["ended"] for task in tasks),
        bytes_written=found.summary.bytes_written,
        batch=max(task.batch for task in tasks),
        tasks=len(tasks),
    )


def measure_extract(config: ExtractBenchmark, folder: Path) -> ExtractResult:
    """Rounds of pipeline, loop and bare stages, with their stores in `folder`; the best of each.

    Raises `BenchmarkFailed` if one fails, or if the loop's features differ from the pipeline's, and what `resolve` raises.
    """
    # One that was stopped half way would be continued, and all of its images counted as done in the rest of the time.
    require_fresh(folder, "bare.zarr", "pipeline-*.zarr", "loop-*.zarr", *([] if config.data else ["photos"]))
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
    empty = _store_without_features(run, folder)
    rounds: list[Round] = []
    for n in range(config.repeat):
        logger.info("round %d of %d: bare stages, the pipeline, these again, the user's loop, these again", n + 1, config.repeat)
        out, loop_out = str(folder / f"pipeline-{n}.zarr"), str(folder / f"loop-{n}.zarr")
        rounds.append(_round(replace(run, out=out), loop_out, empty, config))
        if n + 1 < config.repeat:
            shutil.rmtree(out)
            shutil.rmtree(loop_out)
    return _summarise(rounds)


def _round(run: ExtractConfig, loop_out: str, empty: FeatureStore, config: ExtractBenchmark) -> Round:
    # The batch that the pipeline will take.
    batch = default_batch(run, empty.layout, "cpu")
    bare_job = BaselineJob(
        spec=empty.spec,
        store=empty.folder.url,
        urls=tuple(source.url for source in empty.index.sources),
        weights=run.features.weights,
        out=str(Path(run.out).parent),
        batch=batch,
        stage_s=config.stage_s,
    )
    before = _measure_bare(bare_job)
    pipeline = _measure_pipeline(run)
    between = _measure_bare(bare_job)
    job = replace(bare_job, store=run.out, out=loop_out, batch=config.loop_batch)
    [found], usage = in_new_processes(user_loop, (job,))
    loop = LoopRun(
        **vars(WholeRun.of(len(found.keys), {"first batch": found.first_batch}, found.done, usage)),
        steady_images_per_s=found.steady_images_per_s,
        stage_ms=found.stage_ms,
        cosine=_agreement(FeatureStore.open(run.out), loop_out, found.keys),
    )
    bare = [before, between, _measure_bare(bare_job)]
    return Round(pipeline=pipeline, loop=loop, bare=BareStages.mean(bare), bare_each=bare)


def _store_without_features(run: ExtractConfig, folder: Path) -> FeatureStore:
    """A store of the input, of which nothing is computed: its index and its spec are what the bare stages need.

    Raises `ConfigError` for what the loop and the bare stages have no counterpart of.
    """
    resolved = resolve(replace(run, out=str(folder / "bare.zarr")))
    if any(file.is_image or not file.url.startswith("file://") for file in resolved.files):
        raise ConfigError("the benchmark reads local tars only")
    if resolved.model.backbone.is_hierarchical:
        raise ConfigError(f"{run.features.model} is hierarchical; the loop that it would be compared with is one for plain ViTs")
    return prepare(resolved, InlineExecutor()).create_store()


def _measure_bare(job: BaselineJob) -> BareStages:
    barrier = SPAWN.Barrier(CORES)
    results, _ = in_new_processes(bare_stages, *((job, rank, barrier) for rank in range(CORES)))
    stage_ms = {name: sum(one.stage_ms[name] for one in results) / CORES for name in STAGES}
    return BareStages(
        stage_ms=stage_ms,
        bound_images_per_s=_bound(stage_ms),
        forward_processes_images_per_s=sum(1e3 / one.tokens_ms for one in results),
        forward_threads_images_per_s=1e3 / results[0].tokens_all_threads_ms,
        batch=results[0].batch,
    )


def _bound(stage_ms: Mapping[str, float]) -> float:
    return 1e3 * CORES / sum(stage_ms.values())


def _agreement(store: FeatureStore, loop_url: str, keys: Sequence[str]) -> dict[str, float]:
    """The smallest cosine, over a few rows, between the pipeline's and the loop's features of each level."""
    own = store.index.read(0, min(store.layout.n_rows, len(keys)))["key"].to_pylist()
    if sorted(own) != sorted(keys):
        raise BenchmarkFailed(f"the loop saw {len(keys)} samples, the pipeline {store.layout.n_rows}, or other ones")
    cosines = {}
    for level in store.spec.levels:
        a = zarr.open_array(f"{store.folder.url}/{level.name}/features", mode="r")
        b = zarr.open_array(f"{loop_url}/{level.name}", mode="r")
        rows = range(0, len(own), -(-len(own) // 8))
        cosines[level.name] = min(_cosine(np.asarray(a[row]), np.asarray(b[keys.index(own[row])])) for row in rows)
    if not min(cosines.values()) > 0.999:
        raise BenchmarkFailed(f"the loop's features are not the pipeline's: cosines {cosines}")
    return cosines


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


RATIOS: Mapping[str, tuple[float | None, Callable[[Round], float]]] = {
    "(a) steady / (c) bound": (0.9, lambda one: one.pipeline.steady_images_per_s / one.bare.bound_images_per_s),
    "(a) steady / (d) steady": (1.2, lambda one: one.pipeline.steady_images_per_s / one.loop.steady_images_per_s),
    "(a) / (d), whole runs": (None, lambda one: one.pipeline.images_per_s / one.loop.images_per_s),
}
"""With their targets."""


def _summarise(rounds: Sequence[Round]) -> ExtractResult:
    stage_ms = {stage: min(one.bare.stage_ms[stage] for one in rounds) for stage in STAGES}
    best = Round(
        bare_each=[each for one in rounds for each in one.bare_each],
        pipeline=max((one.pipeline for one in rounds), key=lambda run: run.steady_images_per_s),
        loop=max((one.loop for one in rounds), key=lambda run: run.steady_images_per_s),
        bare=BareStages(
            stage_ms=stage_ms,
            bound_images_per_s=_bound(stage_ms),
            forward_processes_images_per_s=max(one.bare.forward_processes_images_per_s for one in rounds),
            forward_threads_images_per_s=max(one.bare.forward_threads_images_per_s for one in rounds),
            batch=rounds[-1].bare.batch,
        ),
    )
    ratios = {name: Ratio(target=target, best=of(best), all=[of(one) for one in rounds]) for name, (target, of) in RATIOS.items()}
    return ExtractResult(best=best, ratios=ratios, gap=_gap(best.pipeline, stage_ms), rounds=rounds)


def _gap(pipeline: PipelineRun, bare_ms: Mapping[str, float]) -> Gap:
    cpu, clock = dict(pipeline.steady_cpu_ms), pipeline.stage_ms
    total, share = sum(cpu.values()), cpu.pop("workers") / sum(clock.values())
    stages = [
        StageGap(stage=stage, bare=bare, clock=clock[stage], cpu=clock[stage] * share, gap=clock[stage] * share - bare)
        for stage, bare in bare_ms.items()
    ]
    stages.sort(key=lambda stage: -stage.gap)
    return Gap(stages=stages, outside=cpu, bare=sum(bare_ms.values()), total=total)
