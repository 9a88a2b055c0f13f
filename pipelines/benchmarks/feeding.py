"""Whether loaders keep a fast device fed: the real training loop, order and loaders round a network that sleeps, beside what the
CPUs decode when they do nothing else.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pipelines.benchmarks.processes import in_new_processes
from pipelines.costs.process import CORES
from pipelines.executors import AHEAD, Executor, InlineExecutor, RayExecutor
from pipelines.results import number_lines
from pipelines.training.config import Validation
from pipelines.training.data import ImageSource, Loaded
from pipelines.training.images import ImageSetup
from pipelines.training.lift import X2Config
from pipelines.training.loop import Group, Trainer

FORWARD_S = 0.005
"""What the network takes for a micro-batch."""


@dataclass(frozen=True, kw_only=True)
class Feeding:
    """What is asked for."""

    loaders: int
    batch: int
    steps: int
    "that are counted"
    bare_s: float
    "how long the CPUs decode alone, twice"
    size: int
    model: str


@dataclass(frozen=True, kw_only=True)
class Fed:
    """Images per second."""

    rates: dict[str, float]
    "of the loop, by where its loaders are"
    bare: float
    "of the CPUs that only decode: the mean of before and after"


class Sleeping:
    """An objective that takes `FORWARD_S`, and notes when it was given each micro-batch."""

    def __init__(self) -> None:
        self.net, self.beside, self.clipped = nn.Linear(1, 1), nn.Module(), 0
        self.given: list[float] = []

    def accumulate(self, loaded: Loaded) -> tuple[Tensor, float]:
        self.given.append(time.perf_counter())
        time.sleep(FORWARD_S)
        loss = self.net(torch.ones(1, 1)).sum()
        loss.backward()
        return loss.detach(), len(loaded)

    def measure(self, step: int) -> Validation:  # noqa: ARG002
        return Validation()


@dataclass(frozen=True, kw_only=True)
class FedConfig(X2Config):
    """LiFT's images, without LiFT."""

    def objective(self, setup: ImageSetup, device: torch.device) -> Sleeping:  # type: ignore[override]  # noqa: ARG002
        return Sleeping()


def measure_feeding(config: Feeding, folder: Path, photos: str, *, ray: bool) -> Fed:
    """The loop with loaders in threads and, with `ray`, in Ray's processes; the CPUs alone before and after."""
    setup = _setup(config, str(folder / "inline"), photos, InlineExecutor())
    before = _bare(config, setup)
    rates = {"threads": _rate(config, setup, InlineExecutor())}
    if ray:
        executor = RayExecutor()
        rates["Ray's processes"] = _rate(config, _setup(config, str(folder / "ray"), photos, executor), executor)
    return Fed(rates=rates, bare=(before + _bare(config, setup)) / 2)


def _setup(config: Feeding, out: str, photos: str, executor: Executor) -> ImageSetup:
    run = FedConfig.of(
        data=(photos,), out=out, val_rows=1, model=config.model, weights="random", size=config.size, precision="fp32",
        batch=config.batch, epochs=10**6, max_steps=_steps(config)[1] + AHEAD * config.loaders, log_every=10**6,
        checkpoint_every=10**6, validate_every=10**6, loaders=config.loaders, device="cpu",
    )  # fmt: skip
    return run.resolve().prepare(executor)


def _steps(config: Feeding) -> tuple[int, int]:
    """The first and the last step that are counted: loaders are as far ahead at both."""
    first = 2 * AHEAD * config.loaders
    return first, first + config.steps


def _rate(config: Feeding, setup: ImageSetup, executor: Executor) -> float:
    trainer = Trainer(setup, Group(), torch.device("cpu"))
    trainer.run(executor)
    assert isinstance(trainer.objective, Sleeping)
    first, last = _steps(config)
    given, rows = trainer.objective.given, [len(setup.order.rows(step)) for step in range(first, last)]
    return sum(rows) / (given[last] - given[first])


def _bare(config: Feeding, setup: ImageSetup) -> float:
    calls = [(setup.images, setup.order.n_rows, core, config.bare_s) for core in range(CORES)]
    return sum(in_new_processes(_decode, *calls)[0])


def _decode(source: ImageSource, n_rows: int, core: int, seconds: float) -> float:
    """Images per second of one process, which decodes some of them after another."""
    source.load([core % n_rows], 0)
    begun, done = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        source.load([(core + CORES * done) % n_rows], 0)
        done += 1
    return done / (time.perf_counter() - begun)


def feeding_report(config: Feeding, fed: Fed) -> Iterator[str]:
    """The numbers as Markdown, line by line."""
    yield f"\n### {config.loaders} loaders feed a network that sleeps {1e3 * FORWARD_S:g} ms a batch of {config.batch}"
    columns = {"loaders in": "", "images/s": ".1f", "of what the CPUs decode": ".2f"}
    rows: list[list[object]] = [[name, rate, rate / fed.bare] for name, rate in fed.rates.items()]
    yield from number_lines(columns, [*rows, [f"(CPUs alone, {CORES} processes)", fed.bare, 1.0]])
