"""Measure Raylift on this machine, beside what it is to be compared with.

    python jobs/benchmark.py extract                      # this pipeline, its bare stages, and a user's own loop
    python jobs/benchmark.py extract debug                # the same in under a minute, to see that it works
    python jobs/benchmark.py index --samples 1000000 --tars 1000
    python jobs/benchmark.py precision --data photos.tar --model vit_tiny_patch16_224.augreg_in21k_ft_in1k
    python jobs/benchmark.py read                         # random rows and whole epochs, from disk and over S3
    python jobs/benchmark.py cost                         # operations, time and memory of upsamplers beside the backbone
    python jobs/benchmark.py cost --vit-up                # ViT-Up for several output grids and chunks of queries
    python jobs/benchmark.py cost --deap                  # DeAP's published parameter counts, and readouts' operations
    python jobs/benchmark.py train                        # images per second, beside a plain loop
    python jobs/benchmark.py scale                        # what one driver feeds: tens of actors that sleep
    python jobs/benchmark.py chaos                        # 15 minutes of machines that die: is anything lost?
    python jobs/benchmark.py autoscale                    # nodes that come and go, with Ray's own autoscaler
    python jobs/benchmark.py readout                      # readouts trained from a store, beside the live backbone
    python jobs/benchmark.py evaluate                     # matching and label propagation beside the plainest code

Prints Markdown; --json PATH writes all numbers. Run it while nothing else does. Exit codes: 0 measured, 1 not, 2 wrong settings.
"""

import contextlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import tyro

from cluster.session import connect
from pipelines.benchmarks.autoscale import (
    AUTOSCALE_PRESETS,
    AutoscaleBenchmark,
    autoscale_report,
    draw,
    measure_autoscaling,
)
from pipelines.benchmarks.chaos import CHAOS_PRESETS, ChaosBenchmark, chaos_report, measure_chaos, require_nothing_lost
from pipelines.benchmarks.cost import COST_PRESETS, CostBenchmark, cost_report, measure_cost, table
from pipelines.benchmarks.data import write_photos, write_tiny_tars
from pipelines.benchmarks.evaluation import EVALUATE_PRESETS, EvaluateBenchmark, evaluate_report, measure_evaluate
from pipelines.benchmarks.extract import measure_extract, measure_index, summarise
from pipelines.benchmarks.precision import measure_precision
from pipelines.benchmarks.processes import CORES, BenchmarkFailed
from pipelines.benchmarks.read import BY_ROW, IN_ORDER, ReadBenchmark, measure_read
from pipelines.benchmarks.readout import READOUT_PRESETS, ReadoutBenchmark, measure_readouts, readout_report
from pipelines.benchmarks.scale import SCALE_PRESETS, ScaleBenchmark, measure_scale, scale_report
from pipelines.benchmarks.train import TRAIN_PRESETS, TrainBenchmark, measure_training, train_report
from pipelines.benchmarks.vit_up import VIT_UP_PRESETS, ViTUpBenchmark, measure_vit_up, vit_up_report
from pipelines.config import ConfigError, ExtractConfig, log_to_stderr, pick_word
from pipelines.executors import InlineExecutor
from pipelines.models import LevelChoice
from pipelines.prepare import USER_ERRORS
from pipelines.readouts.cost import DEAP_PRESETS, DeapCost, deap_report, measure_deap


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


@dataclass(frozen=True, kw_only=True)
class IndexBenchmark:
    """Index and task list of many samples that hold almost nothing."""

    samples: int = 1_000_000
    """Samples, one tiny JPEG each."""
    tars: int = 1000
    """Tars that they are spread over."""
    out: str = ""
    """Folder in which a temporary one is made (1 KB a sample) and deleted; default: the system's."""
    json: str = ""
    """Write all numbers to this file."""

    def __post_init__(self) -> None:
        if not 1 <= self.tars <= self.samples <= 10**9:
            raise ConfigError("--tars must be at least 1 and at most --samples, and those at most 10^9")


@dataclass(frozen=True, kw_only=True)
class PrecisionBenchmark:
    """What encodings, autocast and reduced-scale JPEG decoding cost in accuracy, against float32."""

    data: tuple[str, ...] = ("demo/photos-{000..001}.tar",)
    """As for jobs/extract.py; at most the first 1,024 images are used."""
    model: str = "vit_small_patch16_224.dino"
    """timm name."""
    weights: str = "pretrained"
    """As for jobs/extract.py. Random weights have none of the outlier channels that make int8 hard."""
    size: str | None = None
    """As for jobs/extract.py."""
    json: str = ""
    """Write all numbers to this file."""


# --- extract ----------------------------------------------------------------------------------------------------------


def extract(config: ExtractBenchmark) -> dict[str, Any]:
    """Measure, print, and return all numbers."""
    with _folder(config.out, keep=bool(config.out)) as folder:
        run = ExtractConfig(
            data=config.data or (write_photos(folder / "photos", config.images),),
            model=config.model,
            weights=config.weights,
            size=str(config.size),
            precision=config.precision,
            levels=config.levels,
            executor="ray",
            device="cpu",
        )
        rounds = measure_extract(
            run, folder, loop_batch=config.loop_batch, repeat=config.repeat, stage_s=config.stage_s
        )
    result = {"machine": machine(), "settings": asdict(config), **summarise(rounds), "rounds": rounds}
    print("\n".join(extract_report(config, result)))
    return result


def extract_report(config: ExtractBenchmark, result: dict[str, Any]) -> Iterator[str]:
    """The numbers as Markdown, line by line."""
    best, found = result["best"], result["machine"]
    pipeline, loop, bare = best["pipeline"], best["loop"], best["bare"]
    yield f"## extract: {pipeline['images']:,} images, {config.model} at {config.size} px, {config.precision}"
    yield (
        f"\n{found['cpu']}, {CORES} cores, torch {found['torch']}; levels {' '.join(config.levels)}; best of {config.repeat}."
        f" Load average when it ended: {found['load']:.1f}."
    )
    if config.precision == "bf16" and not found["native_bf16"]:
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


# --- index ------------------------------------------------------------------------------------------------------------


def index(config: IndexBenchmark) -> dict[str, Any]:
    """Measure, print, and return all numbers."""
    with _folder(config.out, keep=False) as folder:
        pattern = write_tiny_tars(folder / "tars", config.samples, config.tars)
        run = ExtractConfig(data=(pattern,), out=str(folder / "feats.zarr"), weights="random", executor="ray")
        found = measure_index(run)
    result = {"machine": machine(), "settings": asdict(config), **found}
    memory, seconds = found["memory"], found["seconds"]
    print(f"## index: {found['rows']:,} samples in {found['sources']:,} tars, {CORES} cores, {found['tasks']:,} tasks")
    rows = [[f"{name}, s", f"{value:.1f}"] for name, value in seconds.items()]
    rows += [["index and tasks, s", f"{seconds['index'] + seconds['tasks']:.1f}"]]
    rows += [
        [f"peak RSS of {name.replace('_', ' ')}, MB", f"{memory[name] / 2**20:,.0f}"]
        for name in ("driver", "workers", "largest_worker", "ray")
    ]
    rows += [["peak PSS of all, MB", f"{memory['pss'] / 2**20:,.0f}"]]
    rows += [["Parquet, MB", f"{found['parquet_bytes'] / 1e6:.1f}"]]
    print("\n".join(table(["", ""], rows)))
    return result


# --- precision --------------------------------------------------------------------------------------------------------


def precision(config: PrecisionBenchmark) -> dict[str, Any]:
    """Measure, print, and return all numbers."""
    with _folder("", keep=False) as folder:
        run = ExtractConfig(
            data=config.data,
            out=str(folder / "feats.zarr"),
            model=config.model,
            weights=config.weights,
            size=config.size,
            executor="inline",
        )
        rows = measure_precision(run, InlineExecutor())
    print(f"## precision: {config.model}, weights {config.weights}")
    head = ["choice", "bytes a value", "relative L2", "1 - cosine, mean", "1 - cosine, worst cell"]
    names = ("bytes_per_value", "relative_l2", "mean_1_minus_cosine", "worst_1_minus_cosine")
    lines = [
        [f"{row['kind']} {row['name']}", *(f"{row[name]:.2g}" if name in row else "" for name in names)] for row in rows
    ]
    print("\n".join(table(head, lines)))
    return {"machine": machine(), "settings": asdict(config), "rows": rows}


# --- read -------------------------------------------------------------------------------------------------------------


def read(config: ReadBenchmark) -> dict[str, Any]:
    """Measure, print, and return all numbers."""
    with _folder(config.out, keep=False) as folder:
        found = measure_read(folder, config)
    result = {"machine": machine(), "settings": config.public(), **found}
    print("\n".join(read_report(config, result)))
    return result


def read_report(config: ReadBenchmark, result: dict[str, Any]) -> Iterator[str]:
    """The numbers as Markdown, line by line."""
    found, places, ratios = result["machine"], result["places"], result["ratios"]
    shape = f"{config.grid[0]} x {config.grid[1]} x {config.channels} float16"
    yield f"## read: rows of {shape}: " + ", ".join(f"{one['rows']:,} {place}" for place, one in places.items())
    yield f"\n{found['cpu']}, {CORES} cores, torch {found['torch']}. Load average when it ended: {found['load']:.1f}."
    for place, one in places.items():
        yield from _rates(f"{place}: random rows", one["reads"], {"of zarr by row": BY_ROW})
        yield from _rates(f"{place}: an epoch", one["epochs"], {"of zarr by row": BY_ROW, "of in order": IN_ORDER[0]})
    rows = [[r["ratio"], r["target"], *(f"{value:.2f}" for value in r["found"].values())] for r in ratios]
    yield from table(["ratio", "target", *ratios[0]["found"]], rows)
    steps = [step for one in places.values() for step in one["openings"]]
    rows = [[s["step"], f"{s['first_ms']:.1f}", f"{s['ms']:.1f}", f"{sum(s['requests'].values())}"] for s in steps]
    yield from table(["new objects and connections", "first, ms", "again (median), ms", "S3 requests"], rows)
    yield f"""
- MB as decoded. CPU is the client's, with its workers. Epochs: the best of up to {config.repeat}.
- "stopped": not done after {config.seconds:g} s; its rate, also for an epoch, is that of the rows it had read by then.
- What every contender read was compared with what was written, and every whole epoch had each row once.
- Local reads come from the page cache. {result["server"]}"""


def _rates(title: str, contenders: dict[str, Any], bases: dict[str, str]) -> Iterator[str]:
    columns = {"rows/s": "rows_per_s", "MB/s": "mb_per_s", "CPU s / 1,000 rows": "cpu_s_per_1000"}
    if any(one["server_cpu_s_per_1000"] is not None for one in contenders.values()):
        columns["server's"] = "server_cpu_s_per_1000"
    rows = []
    for name, one in contenders.items():
        numbers = [f"{one[column]:,.{2 if '1000' in column else 0}f}" for column in columns.values()]
        ratios = [f"{one['rows_per_s'] / contenders[base]['rows_per_s']:.2f}" for base in bases.values()]
        rows.append([name, *numbers, f"{one['rows']:,}{'' if one['done'] else ' (stopped)'}", *ratios])
    yield from table([title, *columns, "rows read", *bases], rows)


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(config: CostBenchmark) -> dict[str, Any]:
    """Measure, print, and return all numbers."""
    result = {"settings": asdict(config), **measure_cost(config), "machine": machine()}
    print("\n".join(cost_report(config, result)))
    return result


def vit_up(config: ViTUpBenchmark) -> dict[str, Any]:
    """Measure, print, and return all numbers."""
    result = {"settings": asdict(config), **measure_vit_up(config), "machine": machine()}
    print("\n".join(vit_up_report(config, result)))
    return result


def deap(config: DeapCost) -> dict[str, Any]:
    """Count, print, and return all numbers."""
    result = {"settings": asdict(config), **measure_deap(config)}
    print("\n".join(deap_report(config, result)))
    return result


# --- train ------------------------------------------------------------------------------------------------------------


def train(config: TrainBenchmark) -> dict[str, Any]:
    """Measure, print, and return all numbers."""
    with _folder("", keep=False) as folder:
        photos = write_photos(folder / "photos", config.images)
        with connect(None, num_gpus=0) if config.ray else contextlib.nullcontext():
            found = measure_training(config, folder, photos)
    result = {"settings": asdict(config), **found, "machine": machine()}
    print("\n".join(train_report(config, result)))
    return result


# --- readout ----------------------------------------------------------------------------------------------------------


def readout(config: ReadoutBenchmark) -> dict[str, Any]:
    """Measure, print, and return all numbers."""
    with _folder("", keep=False) as folder:
        result = {"settings": asdict(config), **measure_readouts(config, folder), "machine": machine()}
    print("\n".join(readout_report(config, result)))
    return result


# --- evaluate ---------------------------------------------------------------------------------------------------------


def evaluate(config: EvaluateBenchmark) -> dict[str, Any]:
    """Measure, print, and return all numbers."""
    result = {"settings": asdict(config), **measure_evaluate(config), "machine": machine()}
    print("\n".join(evaluate_report(config, result)))
    return result


# --- scale ------------------------------------------------------------------------------------------------------------


def scale(config: ScaleBenchmark) -> dict[str, Any]:
    """Measure, print, and return all numbers."""
    with _folder(config.out, keep=False) as folder:
        result = {"settings": asdict(config), **measure_scale(config, folder), "machine": machine()}
    print("\n".join(scale_report(config, result)))
    return result


# --- chaos ------------------------------------------------------------------------------------------------------------


def chaos(config: ChaosBenchmark) -> dict[str, Any]:
    """Measure, print, and return all numbers. Raises `BenchmarkFailed` where anything was lost, once they're written."""
    with _folder("", keep=False) as folder:
        found = measure_chaos(config, folder)
    result = {"settings": asdict(config), **found, "machine": machine()}
    print("\n".join(chaos_report(config, result)))
    if config.json:
        Path(config.json).write_text(json.dumps(result, indent=1))
    require_nothing_lost(result)
    return result


# --- autoscale --------------------------------------------------------------------------------------------------------


def autoscale(config: AutoscaleBenchmark) -> dict[str, Any]:
    """Measure, print, draw, and return all numbers."""
    with _folder(config.out, keep=bool(config.out)) as folder:
        result = {"settings": asdict(config), **measure_autoscaling(config, folder), "machine": machine()}
    if config.picture:
        draw(config, result["samples"], config.picture)
    print("\n".join(autoscale_report(config, result)))
    return {**result, "samples": [asdict(sample) for sample in result["samples"]]}


# --- the program ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _folder(out: str, *, keep: bool) -> Iterator[Path]:
    if keep:
        Path(out).mkdir(parents=True, exist_ok=True)
        yield Path(out).absolute()
        return
    folder = Path(tempfile.mkdtemp(prefix="raylift-benchmark-", dir=out or None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def machine() -> dict[str, Any]:
    """What the numbers hold for."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    name = next((line for line in _cpuinfo() if line.startswith("model name")), platform.processor())
    return {
        "cpu": name.split(":")[-1].strip() or platform.machine(),
        "cores": CORES,
        "memory_bytes": psutil.virtual_memory().total,
        "torch": torch.__version__,
        # oneDNN's own check is true for emulation, too.
        "native_bf16": any(value for flag, value in capabilities.items() if "bf16" in flag),
        "load": os.getloadavg()[0],
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


_VIT_UP, _DEAP = "--vit-up", "--deap"
"with `cost`: commands of their own, for their settings have little in common with those of x2"

COMMANDS: dict[str, tuple[dict[str, Any], Callable[..., dict[str, Any]]]] = {
    "extract": (
        {
            "default": ExtractBenchmark(),
            # No network. 2 CPU cores: about 40 seconds; the numbers mean nothing at this size.
            "debug": ExtractBenchmark(images=32, model="test_vit.r160_in1k", size=64, precision="fp32", stage_s=0.2),
        },
        extract,
    ),
    "precision": (
        {
            "default": PrecisionBenchmark(),
            "debug": PrecisionBenchmark(model="test_vit.r160_in1k", weights="random", size="64"),
        },
        precision,
    ),
    "index": ({"default": IndexBenchmark(), "debug": IndexBenchmark(samples=2000, tars=4)}, index),
    "read": (
        {
            "default": ReadBenchmark(),
            # As above: about 40 seconds.
            "debug": ReadBenchmark(rows=96, grid=(4, 4), channels=64, s3_rows=48, reads=100, repeat=1, big_rows=2000),
        },
        read,
    ),
    "cost": (COST_PRESETS, cost),
    f"cost {_VIT_UP}": (VIT_UP_PRESETS, vit_up),
    f"cost {_DEAP}": (DEAP_PRESETS, deap),
    "train": (TRAIN_PRESETS, train),
    "chaos": (CHAOS_PRESETS, chaos),
    "readout": (READOUT_PRESETS, readout),
    "scale": (SCALE_PRESETS, scale),
    "autoscale": (AUTOSCALE_PRESETS, autoscale),
    "evaluate": (EVALUATE_PRESETS, evaluate),
}
"""By name: presets, and what runs them."""


def parse(argv: Sequence[str]) -> tuple[Callable[..., dict[str, Any]], Any]:
    """The command and its settings. Exits with a suggestion on unknown names and flags."""
    args = list(argv)
    command = pick_word(args, COMMANDS)
    for other in (_VIT_UP, _DEAP):
        if command == "cost" and other in args:
            args.remove(other)
            command = f"cost {other}"
    if command is None:
        print(f"{__doc__}\nCommands: {', '.join(COMMANDS)}; each with --help")
        raise SystemExit(0 if "--help" in args or "-h" in args else 2)
    presets, run = COMMANDS[command]
    preset = pick_word(args, presets) or "default"
    prog = f"python jobs/benchmark.py {command} [{' | '.join(presets)}]"
    return run, tyro.cli(type(presets[preset]), default=presets[preset], args=args, prog=prog)


def run(argv: Sequence[str]) -> int:
    """Parse, run, and turn errors that a person can act on into one message and an exit code."""
    log_to_stderr()
    try:
        command, config = parse(argv)
        result = command(config)
    except (*USER_ERRORS, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except BenchmarkFailed as error:
        print(f"BenchmarkFailed: {error}", file=sys.stderr)
        return 1
    if config.json:
        Path(config.json).write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
