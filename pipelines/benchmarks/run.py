"""The benchmarks of `jobs/benchmark.py`: what each measures, and how it is reported."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pipelines.benchmarks import autoscale, chaos, device, evaluation, extract, gpu, index, nearest, read, readout, scale, train
from pipelines.benchmarks import upsamplers as upsampler_ways
from pipelines.benchmarks.evaluation import evaluate_report, measure_evaluate
from pipelines.benchmarks.extract_report import extract_report
from pipelines.config import ConfigError
from pipelines.costs import precision, readouts, upsamplers, vit_up
from pipelines.costs.clocks import Machine, machine
from pipelines.costs.vit_up_report import vit_up_report

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
Result = TypeVar("Result", bound="DataclassInstance")


@dataclass(frozen=True)
class Benchmark(Generic[Config, Result]):
    """A benchmark."""

    debug: Config
    "settings with which it takes seconds; the defaults are those of their class"
    measure: Callable[[Config, Path], Result]
    "takes a folder for files, too"
    report: Callable[[Config, Result, Machine], Iterator[str]]
    "the numbers as Markdown, line by line"
    keeps: bool = False
    "--out is that folder, rather than where a temporary one is made"
    judge: Callable[[Result], None] = lambda _: None
    "raises `BenchmarkFailed` where numbers, once they are shown and written, are none to be proud of"

    @property
    def presets(self) -> Mapping[str, Config]:
        """Settings to start from, by name."""
        return {"default": type(self.debug)(), "debug": self.debug}

    def run(self, config: Config) -> Iterator[str]:
        """Measure, tell line by line, and write all numbers. Raises `BenchmarkFailed`, and what the settings are refused with."""
        if path := getattr(config, "json", ""):
            _require_writable(Path(path))
        with _folder(getattr(config, "out", ""), keep=self.keeps) as folder:
            result = self.measure(config, folder)
        here = machine()
        yield from self.report(config, result, here)
        if path:
            numbers = {"settings": _public(config), **_public(result), "machine": asdict(here)}
            Path(path).write_text(json.dumps(numbers, indent=1))
        self.judge(result)


def _require_writable(path: Path) -> None:
    """Raise `ConfigError` where numbers that take minutes to measure couldn't be written."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"--json {path} can't be written; give a file in a folder that is there")


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


BENCHMARKS: Mapping[str, Benchmark[Any, Any]] = {
    "extract": Benchmark(extract.DEBUG, extract.measure_extract, extract_report, keeps=True),
    "precision": Benchmark(precision.DEBUG, precision.measure_precision, precision.precision_report),
    "index": Benchmark(index.DEBUG, index.measure_index, index.index_report),
    "read": Benchmark(read.DEBUG, read.measure_read, read.read_report),
    "nearest": Benchmark(nearest.DEBUG, nearest.measure_nearest, nearest.nearest_report),
    "cost": Benchmark(upsamplers.DEBUG, lambda config, _: upsamplers.measure_cost(config), upsamplers.cost_report),
    # With settings of their own, for they have little in common with those of upsamplers.
    "cost --vit-up": Benchmark(vit_up.DEBUG, lambda config, _: vit_up.measure_vit_up(config), vit_up_report),
    "cost --deap": Benchmark(readouts.DEBUG, lambda config, _: readouts.measure_deap(config), readouts.deap_report),
    "upsamplers": Benchmark(
        upsampler_ways.DEBUG,
        lambda config, _: upsampler_ways.measure_upsamplers(config),
        upsampler_ways.upsamplers_report,
        judge=upsampler_ways.require_agreement,
    ),
    "train": Benchmark(train.DEBUG, train.measure_training, train.train_report),
    "readout": Benchmark(readout.DEBUG, readout.measure_readouts, readout.readout_report),
    "evaluate": Benchmark(evaluation.DEBUG, lambda config, _: measure_evaluate(config), evaluate_report),
    "scale": Benchmark(scale.DEBUG, scale.measure_scale, scale.scale_report),
    "device": Benchmark(device.DEBUG, device.measure_device, device.device_report),
    "gpu": Benchmark(gpu.DEBUG, gpu.measure_gpu, gpu.gpu_report, judge=gpu.require_kept),
    "chaos": Benchmark(chaos.DEBUG, chaos.measure_chaos, chaos.chaos_report, judge=chaos.require_nothing_lost),
    "autoscale": Benchmark(autoscale.DEBUG, autoscale.measure_autoscaling, autoscale.autoscale_report, keeps=True),
}
