"""What measurements are made of: clocks, memory, and the machine they hold for."""

import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import tyro
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipelines.config import ConfigError
from pipelines.costs.process import CORES, peak_rss
from storage.paths import Folder
from storage.runs import read_metrics

NumbersFile = Annotated[str, tyro.conf.arg(help="Write all numbers to this file.")]

WARM_UP = 2
"""Steps of each training that aren't counted."""


def rated_steps(folder: Folder) -> list[dict[str, float]]:
    """The numbers that a training logged of each step that was timed, in order. Raises `CheckpointError`."""
    lines = [line for line in read_metrics(folder) if "images_per_s" in line]
    return [{name: value for name, value in line.items() if isinstance(value, int | float)} for line in lines]


def steady_rate(lines: Sequence[Mapping[str, float]]) -> float:
    """Images per second after the warm-up, of a training that logged every step."""
    steps = lines[WARM_UP - 1 :]
    images = [b["images"] - a["images"] for a, b in itertools.pairwise(steps)]
    seconds = [n / line["images_per_s"] for n, line in zip(images, steps[1:], strict=True)]
    return sum(images) / sum(seconds)


def timed(runs: Sequence[Callable[[], object]], repeat: int, row_s: float, device: torch.device) -> list[list[float]]:
    """Seconds of each in `repeat` rounds of all, each of which begins with another one.

    One that would come beyond `row_s` is left out of further rounds.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    for number in range(repeat):
        for turn in range(len(runs)):
            run, times = runs[at := (number + turn) % len(runs)], seconds[at]
            if number == 0 or (len(times) == number and sum(times) * (number + 1) / number <= row_s):
                times.append(seconds_of(run, device))
    return seconds


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Of one call, until the device is done with it."""
    finish(device)
    start = time.perf_counter()
    run()
    finish(device)
    return time.perf_counter() - start


def median_ratio(times: Sequence[float], of: Sequence[float]) -> float:
    """Median over the rounds that both ran: what else the machine did then was much the same for both."""
    return statistics.median(a / b for a, b in zip(times, of, strict=False))


def device_of(name: str) -> torch.device:
    """The one that a setting asks for; `auto` is a GPU where there is one. Raises `ConfigError` for a GPU that isn't there."""
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ConfigError("--device cuda: torch finds no GPU here; use cpu")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def require_device(name: str) -> None:
    """Raises `ConfigError` for a GPU that isn't there. No driver is asked for other names, since defaults are made when a program
    starts."""
    if name == "cuda":
        device_of(name)


def device_name(device: torch.device) -> str:
    """What times hold for."""
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def processor_of(device: torch.device) -> str:
    """Which CPU times on it hold for, as times that are kept must say; empty for a GPU, whose name says it."""
    return "" if device.type == "cuda" else cpu_name()


def finish(device: torch.device) -> None:
    """Wait for what an accelerator still computes."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(run: Callable[[], object], device: torch.device, *, warm_up: bool = True) -> int:
    """The most memory that torch's allocator holds at once during a call, beyond what it held before: no weights, no input."""
    if warm_up:
        run()
    if device.type == "cuda":
        finish(device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        finish(device)
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes lines to stderr at every start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    changes = [event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


class Live(TorchDispatchMode):
    """The most bytes that tensors made within it held at once. Also counts what `FakeTensorMode` only pretends to make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no types
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.held = {key: each for key, each in self.held.items() if not each[0].expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in given:
                self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return out


def needed_bytes(run: Callable[[], object]) -> int:
    """What `peak_bytes` would come to, without computing or allocating anything, but for what operations hold by themselves
    while they run, which can be as much again."""
    with FakeTensorMode(allow_non_fake_inputs=True), Live() as live:
        run()
    return live.peak


def held_bytes(run: Callable[[], object], device: torch.device) -> tuple[int, int | None]:
    """Bytes before a call, weights above all, and at most during it, with those before; None where the system doesn't tell.

    On a GPU what torch's allocator holds, on a CPU this process's resident memory, interpreter and torch included.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        return before, before + peak_bytes(run, device, warm_up=False)
    return psutil.Process().memory_info().rss, peak_rss(run)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the numbers hold for."""

    cpu: str
    cores: int
    memory_bytes: int
    torch: str
    native_bf16: bool
    load: float
    "the load average of the last minute"

    def line(self, *also: str) -> str:
        """The first lines below a report's title: the CPU, and what else is said of how it was measured."""
        return f"\n{', '.join([self.cpu, *also])}. Load average when it ended: {self.load:.1f}."

    def usual_line(self, *, device: str = "") -> str:
        """`line` of the cores, or the `device`, and torch."""
        return self.line(device or f"{self.cores} cores", f"torch {self.torch}")


def machine() -> Machine:
    """This one, now."""
    capabilities: Mapping[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return Machine(
        cpu=cpu_name(),
        cores=CORES,
        memory_bytes=psutil.virtual_memory().total,
        torch=torch.__version__,
        # oneDNN's own check is true for emulation, too.
        native_bf16=any(value for flag, value in capabilities.items() if "bf16" in flag),
        load=os.getloadavg()[0],
    )


def cpu_name() -> str:
    """Of this machine, as the system calls it."""
    name = next((line for line in _cpuinfo() if line.startswith("model name")), platform.processor())
    return name.split(":")[-1].strip() or platform.machine()


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
