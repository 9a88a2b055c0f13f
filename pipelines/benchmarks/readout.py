"""Readouts trained from a store beside the live backbone: images per second of each, and whether their losses agree."""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pipelines.benchmarks.data import write_masks
from pipelines.config import require_at_least
from pipelines.costs.clocks import WARM_UP, Machine, NumbersFile, rated_steps, steady_rate
from pipelines.executors import InlineExecutor
from pipelines.extraction.config import ExtractConfig
from pipelines.extraction.run import extract
from pipelines.results import number_lines
from pipelines.training.readout import ReadoutTraining
from pipelines.training.run import train_inline
from storage.paths import Folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReadoutBenchmark:
    """Images per second of training readouts, live and from a store, in this process."""

    images: int = 64
    """Photos to generate, with masks of rectangles."""
    model: str = "vit_small_patch16_224.dino"
    """timm name; its weights are random."""
    size: int = 224
    """Side of the model's input in pixels."""
    side: int = 224
    """Of outputs and labels."""
    methods: tuple[Literal["deap", "bicubic", "transposed", "strided", "linear"], ...] = ("deap", "linear")
    """Readouts."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """Autocast of the backbone's forward."""
    batch: int = 8
    """Images per step."""
    steps: int = 16
    """Of each run; the first two aren't counted."""
    repeat: int = 2
    """Rounds; each runs everything once. Rates are the best of them."""
    json: NumbersFile = ""

    def __post_init__(self) -> None:
        require_at_least(1, self, "images", "batch", "repeat")
        require_at_least(WARM_UP + 1, self, "steps")


# No network. 2 CPU cores: about 15 seconds, and the numbers mean nothing at this size; the defaults take about 5 minutes.
DEBUG = ReadoutBenchmark(images=8, model="test_vit.r160_in1k", size=64, side=64, batch=4, steps=4, repeat=1)


@dataclass(frozen=True, kw_only=True)
class ReadoutResult:
    """Images per second by readout and source of features (`live`, `store`), in every round."""

    rates: Mapping[str, Mapping[str, Sequence[float]]]
    apart: float
    "largest difference between the losses of the two sources"

    def public(self) -> dict[str, object]:
        """As it is written."""
        return {"rates": self.rates, "largest difference of losses": self.apart}


def measure_readouts(config: ReadoutBenchmark, folder: Path) -> ReadoutResult:
    """Train every readout from both sources, in rounds."""
    data = write_masks(folder / "voc", config.images)
    store = str(folder / "store.zarr")
    _extract(config, data, store)
    rates: dict[str, dict[str, list[float]]] = {name: {"live": [], "store": []} for name in config.methods}
    apart = 0.0
    for n, method in itertools.product(range(config.repeat), config.methods):
        losses = {}
        for source in ("live", "store"):
            settings = _settings(config, method, data, str(folder / f"{n}-{method}-{source}"))
            run = replace(settings, store=store) if source == "store" else settings
            train_inline(run.resolve().prepare(InlineExecutor()))
            steps = rated_steps(Folder(run.out))
            losses[source], rate = [step["loss"] for step in steps], steady_rate(steps)
            rates[method][source].append(rate)
            logger.info("round %d of %d: %s, %s, %.2f images/s", n + 1, config.repeat, method, source, rate)
        apart = max(apart, *(abs(a - b) for a, b in zip(losses["live"], losses["store"], strict=True)))
    return ReadoutResult(rates=rates, apart=apart)


def _settings(config: ReadoutBenchmark, method: str, data: str, out: str) -> ReadoutTraining:
    return ReadoutTraining.of(
        method=method,
        data=data,
        out=out,
        val_limit=1,
        overlap=True,  # nothing is said of scores
        size=config.size,
        side=config.side,
        model=config.model,
        weights="random",
        precision=config.precision,
        drawing="extract",
        batch=config.batch,
        epochs=config.steps,  # more than enough
        max_steps=config.steps,
        log_every=1,
        executor="inline",
        device="cpu",
    )


def _extract(config: ReadoutBenchmark, data: str, store: str) -> None:
    settings = ExtractConfig.of(
        data=(f"{data}/VOCdevkit/VOC2012/JPEGImages",),
        out=store,
        model=config.model,
        weights="random",
        size=str(config.size),
        precision=config.precision,
        levels=("x1",),
        batch=config.batch,
        executor="inline",
        device="cpu",
    )
    extract(settings, InlineExecutor())


def readout_report(config: ReadoutBenchmark, result: ReadoutResult, machine: Machine) -> Iterator[str]:
    """The numbers as Markdown, line by line."""
    yield f"## readout: {config.model} at {config.size} px, {config.precision}"
    yield f"\nOutputs of {config.side} px, batches of {config.batch}."
    yield machine.usual_line()
    rows = []
    for method, by_source in result.rates.items():
        live, store = (max(by_source[source]) for source in ("live", "store"))
        rows.append([method, live, store, store / live])
    columns = {"readout": "", "live, images/s": ".2f", "from a store, images/s": ".2f", "times": ".1f"}
    yield from number_lines(columns, rows)
    yield f"""
- After {WARM_UP} steps; reading, decoding and targets count, checkpoints and validation don't.
- Largest difference between the losses of the two, over all steps: {result.apart:.2g}."""
