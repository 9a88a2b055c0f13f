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
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import tyro

from jobs.program import pick_word, run_program
from pipelines.benchmarks.autoscale import AUTOSCALE_PRESETS, autoscale_report, measure_autoscaling
from pipelines.benchmarks.chaos import CHAOS_PRESETS, chaos_report, measure_chaos, require_nothing_lost
from pipelines.benchmarks.evaluation import EVALUATE_PRESETS, evaluate_report, measure_evaluate
from pipelines.benchmarks.extract import EXTRACT_PRESETS, extract_report, measure_extract
from pipelines.benchmarks.index import INDEX_PRESETS, index_report, measure_index
from pipelines.benchmarks.read import READ_PRESETS, measure_read
from pipelines.benchmarks.read_report import read_report
from pipelines.benchmarks.readout import READOUT_PRESETS, measure_readouts, readout_report
from pipelines.benchmarks.scale import SCALE_PRESETS, measure_scale, scale_report
from pipelines.benchmarks.train import TRAIN_PRESETS, measure_training, train_report
from pipelines.costs.clocks import Machine, machine
from pipelines.costs.precision import PRECISION_PRESETS, measure_precision, precision_report
from pipelines.costs.readouts import DEAP_PRESETS, deap_report, measure_deap
from pipelines.costs.upsamplers import COST_PRESETS, cost_report, measure_cost
from pipelines.costs.vit_up import VIT_UP_PRESETS, measure_vit_up, vit_up_report

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
Result = TypeVar("Result", bound="DataclassInstance")


@dataclass(frozen=True, kw_only=True)
class Command(Generic[Config, Result]):
    """A benchmark."""

    presets: Mapping[str, Config]
    measure: Callable[[Config, Path], Result]
    "takes settings and a folder for files"
    report: Callable[[Config, Result, Machine], Iterator[str]]
    "the numbers as Markdown, line by line"
    keeps: bool = False
    "--out is that folder, rather than where a temporary one is made"
    judge: Callable[[Result], None] = lambda _: None
    "raises `BenchmarkFailed` where numbers, once they are shown and written, are none to be proud of"

    def run(self, config: Config) -> None:
        """Measure, print, and write all numbers. Raises `BenchmarkFailed`, and what the settings are refused with."""
        with _folder(getattr(config, "out", ""), keep=self.keeps) as folder:
            result = self.measure(config, folder)
        here = machine()
        print("\n".join(self.report(config, result, here)))
        if path := getattr(config, "json", ""):
            numbers = {"settings": _public(config), **_public(result), "machine": asdict(here)}
            Path(path).write_text(json.dumps(numbers, indent=1))
        self.judge(result)


def _public(one: "DataclassInstance") -> dict[str, object]:
    """All fields by name, as JSON has them; where there is a method `public`, what that gives."""
    if isinstance(one, dict):  # of the measurements in costs/, as yet
        return one
    public = getattr(one, "public", None)
    return public() if public else asdict(one)


def _fileless(measure: Callable[[Config], Result]) -> Callable[[Config, Path], Result]:
    return lambda config, _: measure(config)


_VIT_UP, _DEAP = "--vit-up", "--deap"
"with `cost`: commands of their own, for their settings have little in common with those of x2"

COMMANDS: Mapping[str, Command] = {
    "extract": Command(presets=EXTRACT_PRESETS, measure=measure_extract, report=extract_report, keeps=True),
    "precision": Command(presets=PRECISION_PRESETS, measure=measure_precision, report=precision_report),
    "index": Command(presets=INDEX_PRESETS, measure=measure_index, report=index_report),
    "read": Command(presets=READ_PRESETS, measure=measure_read, report=read_report),
    "cost": Command(presets=COST_PRESETS, measure=_fileless(measure_cost), report=cost_report),
    f"cost {_VIT_UP}": Command(presets=VIT_UP_PRESETS, measure=_fileless(measure_vit_up), report=vit_up_report),
    f"cost {_DEAP}": Command(presets=DEAP_PRESETS, measure=_fileless(measure_deap), report=deap_report),
    "train": Command(presets=TRAIN_PRESETS, measure=measure_training, report=train_report),
    "readout": Command(presets=READOUT_PRESETS, measure=measure_readouts, report=readout_report),
    "evaluate": Command(presets=EVALUATE_PRESETS, measure=_fileless(measure_evaluate), report=evaluate_report),
    "scale": Command(presets=SCALE_PRESETS, measure=measure_scale, report=scale_report),
    "chaos": Command(presets=CHAOS_PRESETS, measure=measure_chaos, report=chaos_report, judge=require_nothing_lost),
    "autoscale": Command(presets=AUTOSCALE_PRESETS, measure=measure_autoscaling, report=autoscale_report, keeps=True),
}


def parse(argv: Sequence[str]) -> tuple[Command, "DataclassInstance"]:
    """The command and its settings. Exits with a suggestion on unknown names and flags."""
    args = list(argv)
    name = pick_word(args, COMMANDS)
    for other in (_VIT_UP, _DEAP):
        if name == "cost" and other in args:
            args.remove(other)
            name = f"cost {other}"
    if name is None:
        print(f"{__doc__}\nCommands: {', '.join(COMMANDS)}; each with --help")
        raise SystemExit(0 if "--help" in args or "-h" in args else 2)
    command = COMMANDS[name]
    preset = pick_word(args, command.presets) or "default"
    prog = f"python jobs/benchmark.py {name} [{' | '.join(command.presets)}]"
    default = command.presets[preset]
    return command, tyro.cli(type(default), default=default, args=args, prog=prog)


@contextlib.contextmanager
def _folder(out: str, *, keep: bool) -> Iterator[Path]:
    if keep and out:
        Path(out).mkdir(parents=True, exist_ok=True)
        yield Path(out).absolute()
        return
    folder = Path(tempfile.mkdtemp(prefix="raylift-benchmark-", dir=out or None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def run(argv: Sequence[str]) -> int:
    """The exit code of a command line."""
    stopped = "stopped; nothing was measured"
    return run_program(argv, parse, Command.run, stopped=stopped)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
