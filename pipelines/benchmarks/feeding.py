"""Whether loaders keep a fast device fed: the real training loop, order and loaders round a network that sleeps, beside what the
CPUs decode when they do nothing else.

What is measured runs in new processes, one thing at a time. Rates by the clock say little where others use the machine; what an
image costs in CPU time, in all processes, does.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cluster.session import connect
from operators.image import limit_pillow
from pipelines.benchmarks.processes import SPAWN, in_new_processes
from pipelines.costs.process import CORES
from pipelines.executors import AHEAD, Executor, InlineExecutor, RayExecutor
from pipelines.results import number_lines
from pipelines.training.config import Validation
from pipelines.training.data import ImageSource, Loaded
from pipelines.training.images import ImageSetup
from pipelines.training.lift import X2Config
from pipelines.training.loop import Group, Trainer
from storage.sample_images import read_images

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
    "how long the CPUs decode alone, each time"
    size: int
    model: str


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """The CPUs that only decode: a process each, of images that they hold in memory."""

    images_per_s: float
    cpu_ms: float
    "CPU time of an image"

    @classmethod
    def mean(cls, several: "Sequence[Decoding]") -> "Decoding":
        """Of measurements at several times: a machine's speed isn't always the same."""
        rates, costs = zip(*((each.images_per_s, each.cpu_ms) for each in several), strict=True)
        return cls(images_per_s=sum(rates) / len(rates), cpu_ms=sum(costs) / len(costs))


@dataclass(frozen=True, kw_only=True)
class FedLoop:
    """The loop with its loaders."""

    images_per_s: float
    cpu_ms: Mapping[str, float]
    "of an image, by group of processes; `other` are the machine's other programs"
    bare: Decoding
    "mean of before and after it, which it is held against: a busy machine is slower"

    @property
    def own_cpu_ms(self) -> float | None:
        """Of all processes of the run; None of a run so short that nothing was seen of it."""
        return sum(ms for group, ms in self.cpu_ms.items() if group != "other") or None


@dataclass(frozen=True, kw_only=True)
class Fed:
    """All that is compared, measured one after another."""

    loops: Mapping[str, FedLoop]
    "by where the loaders are"
    bare: Decoding
    "mean of `bare_each`"
    bare_each: Sequence[Decoding]
    "before and after each loop"


class Sleeping:
    """An objective that takes `FORWARD_S`, and notes when it was given each micro-batch."""

    def __init__(self) -> None:
        self.net, self.beside, self.clipped = nn.Linear(1, 1), nn.Module(), 0
        self.given: list[float] = []

    def accumulate(self, loaded: Loaded) -> tuple[Tensor, float]:
        self.given.append(time.monotonic())
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
    """The loop with loaders in threads and, with `ray`, in the processes of a Ray of its own; the CPUs alone before and after
    each."""
    setup = _setup(config, str(folder / "bare"), photos, InlineExecutor())
    bare, loops = [_bare(config, setup)], dict[str, FedLoop]()
    for name, on_ray in {"threads": False, **({"Ray's processes": True} if ray else {})}.items():
        rate, cpu_ms = _measured(config, str(folder / f"ray-{on_ray}"), photos, on_ray)
        bare.append(_bare(config, setup))
        loops[name] = FedLoop(images_per_s=rate, cpu_ms=cpu_ms, bare=Decoding.mean(bare[-2:]))
    return Fed(loops=loops, bare=Decoding.mean(bare), bare_each=bare)


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


def _measured(config: Feeding, out: str, photos: str, on_ray: bool) -> tuple[float, dict[str, float]]:
    """Images per second of the loop, and the CPU milliseconds of an image by group of processes."""
    [(start, stop, images)], usage = in_new_processes(_loop, (config, out, photos, on_ray))
    spent = usage.cpu_between(start, stop)
    return images / (stop - start), {group: 1e3 * s / images for group, s in spent.items()}


def _loop(config: Feeding, out: str, photos: str, on_ray: bool) -> tuple[float, float, int]:
    """When the steps that are counted begin and end, by the monotonic clock, and how many images they have."""
    with connect("local", num_cpus=CORES, num_gpus=0) if on_ray else nullcontext():
        executor = RayExecutor() if on_ray else InlineExecutor()
        setup = _setup(config, out, photos, executor)
        trainer = Trainer(setup, Group(), torch.device("cpu"))
        trainer.run(executor)
    assert isinstance(trainer.objective, Sleeping)
    first, last = _steps(config)
    given = trainer.objective.given
    return given[first], given[last], sum(len(setup.order.rows(step)) for step in range(first, last))


_HELD = 256
"""Images that a process decodes again and again."""


def _bare(config: Feeding, setup: ImageSetup) -> Decoding:
    barrier = SPAWN.Barrier(CORES)
    calls = [(setup.images, setup.order.n_rows, core, config.bare_s, barrier) for core in range(CORES)]
    found, _ = in_new_processes(_decode, *calls)
    return Decoding(images_per_s=sum(rate for rate, _ in found), cpu_ms=sum(ms for _, ms in found) / len(found))


def _decode(source: ImageSource, n_rows: int, core: int, seconds: float, barrier: Barrier) -> tuple[float, float]:
    """Images per second of one process, which makes training's examples of files in memory, and their CPU milliseconds."""
    rows = [(core + CORES * i) % n_rows for i in range(min(_HELD, n_rows))]
    blobs = [blob or b"" for blob in read_images(source.index.take(np.array(rows)), source.urls, source.options)]
    limit_pillow(source.max_image_pixels)

    def one(i: int) -> None:
        at = i % len(rows)
        source.view(blobs[at], np.random.default_rng([source.seed, 0, rows[at]]), source.max_image_pixels)

    one(0)
    barrier.wait()
    begun, used, done = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - begun < seconds:
        one(done)
        done += 1
    return done / (time.perf_counter() - begun), 1e3 * (time.process_time() - used) / done


_GROUPS = {"driver": "the loop's process", "workers": "loaders' processes", "ray": "Ray's own", "other": "other programs"}


def feeding_report(config: Feeding, fed: Fed) -> Iterator[str]:
    """The numbers as Markdown, line by line."""
    yield f"\n### {config.loaders} loaders feed a network that sleeps {1e3 * FORWARD_S:g} ms a batch of {config.batch}"
    rates = {"images/s": ".1f", "of what the CPUs decode": ".2f", "the same by CPU time": ".2f"}
    rows, costs = list[list[object]](), list[list[object]]()
    for name, loop in fed.loops.items():
        own = loop.own_cpu_ms
        rows.append([name, loop.images_per_s, loop.images_per_s / loop.bare.images_per_s, own and loop.bare.cpu_ms / own])
        costs.append([name, *(loop.cpu_ms[group] for group in _GROUPS), own and own - loop.bare.cpu_ms])
    yield from number_lines(
        {"loaders in": "", **rates}, [*rows, [f"(CPUs alone, {CORES} processes)", fed.bare.images_per_s, 1.0, 1.0]]
    )
    yield "\nCPU milliseconds of an image:"
    columns = {"loaders in": "", **dict.fromkeys(_GROUPS.values(), ".2f"), "above decoding alone": "+.2f"}
    yield from number_lines(columns, costs)
    bounds = ", ".join(f"{each.images_per_s:.1f} ({each.cpu_ms:.2f} ms)" for each in fed.bare_each)
    yield f"""
- The CPUs alone make training's examples of files in memory. Before and after each loop: {bounds}; a loop is held against
  the two beside it.
- The loop's process has the loaders that are threads."""
