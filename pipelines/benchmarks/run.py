"""The benchmarks of `jobs/benchmark.py`: what each measures, and how it is told."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pipelines.benchmarks.autoscale import AUTOSCALE_PRESETS, autoscale_report, measure_autoscaling
from pipelines.benchmarks.chaos import CHAOS_PRESETS, chaos_report, measure_chaos, require_nothing_lost
from pipelines.benchmarks.evaluation import EVALUATE_PRESETS, evaluate_report, measure_evaluate
from pipelines.benchmarks.extract import EXTRACT_PRESETS, measure_extract
from pipelines.benchmarks.extract_report import extract_report
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
from pipelines.costs.vit_up import VIT_UP_PRESETS, measure_vit_up
from pipelines.costs.vit_up_report import vit_up_report

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
Result = TypeVar("Result", bound="DataclassInstance")


@dataclass(frozen=True, kw_only=True)
class Benchmark(Generic[Config, Result]):
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

    def run(self, config: Config) -> Iterator[str]:
        """Measure, tell line by line, and write all numbers. Raises `BenchmarkFailed`, and what the settings are refused with."""
        with _folder(getattr(config, "out", ""), keep=self.keeps) as folder:
            result = self.measure(config, folder)
        here = machine()
        yield from self.report(config, result, here)
        if path := getattr(config, "json", ""):
            numbers = {"settings": _public(config), **_public(result), "machine": asdict(here)}
            Path(path).write_text(json.dumps(numbers, indent=1))
        self.judge(result)


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


def _public(one: "DataclassInstance") -> dict[str, object]:
    """All fields by name, as JSON has them; where there is a method `public`, what that gives."""
    public = getattr(one, "public", None)
    return public() if public else asdict(one)


def _fileless(measure: Callable[[Config], Result]) -> Callable[[Config, Path], Result]:
    return lambda config, _: measure(config)


BENCHMARKS: Mapping[str, Benchmark[Any, Any]] = {
    "extract": Benchmark(presets=EXTRACT_PRESETS, measure=measure_extract, report=extract_report, keeps=True),
    "precision": Benchmark(presets=PRECISION_PRESETS, measure=measure_precision, report=precision_report),
    "index": Benchmark(presets=INDEX_PRESETS, measure=measure_index, report=index_report),
    "read": Benchmark(presets=READ_PRESETS, measure=measure_read, report=read_report),
    "cost": Benchmark(presets=COST_PRESETS, measure=_fileless(measure_cost), report=cost_report),
    # With settings of their own, for they have little in common with those of x2.
    "cost --vit-up": Benchmark(presets=VIT_UP_PRESETS, measure=_fileless(measure_vit_up), report=vit_up_report),
    "cost --deap": Benchmark(presets=DEAP_PRESETS, measure=_fileless(measure_deap), report=deap_report),
    "train": Benchmark(presets=TRAIN_PRESETS, measure=measure_training, report=train_report),
    "readout": Benchmark(presets=READOUT_PRESETS, measure=measure_readouts, report=readout_report),
    "evaluate": Benchmark(presets=EVALUATE_PRESETS, measure=_fileless(measure_evaluate), report=evaluate_report),
    "scale": Benchmark(presets=SCALE_PRESETS, measure=measure_scale, report=scale_report),
    "chaos": Benchmark(presets=CHAOS_PRESETS, measure=measure_chaos, report=chaos_report, judge=require_nothing_lost),
    "autoscale": Benchmark(presets=AUTOSCALE_PRESETS, measure=measure_autoscaling, report=autoscale_report, keeps=True),
}
