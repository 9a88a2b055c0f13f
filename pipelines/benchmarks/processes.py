"""New processes to measure in, and what they take: memory, and CPU time by group. For benchmarks only."""

import contextlib
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import numpy as np
import psutil

from pipelines.costs.process import BenchmarkFailed

Found = TypeVar("Found")

SPAWN = multiprocessing.get_context("spawn")
GROUPS = ("driver", "workers", "ray")
"""The measured program; its worker processes (Ray's, or the DataLoader's); Ray's own: daemons, and actors that Ray Data makes for
itself."""

_RAYS_OWN = ("DashboardAgent", "RuntimeEnvAgent", "_StatsActor", "_AutoscalingCoordinatorActor", "ActorLocationTracker")


class Usage:
    """Watches the processes `pids` and all below them, twice a second: memory, and CPU time by group."""

    def __init__(self, pids: Sequence[int], started: float):
        self.started = started
        self._roots = [psutil.Process(pid) for pid in pids]
        self._stop, self._thread = threading.Event(), threading.Thread(target=self._watch, daemon=True)
        self._times: list[float] = []
        self._cpu: dict[str, list[float]] = {group: [] for group in (*GROUPS, "machine")}
        self._seen: dict[int, tuple[str, float]] = {}
        self._next_pss = 0.0
        self.peak = dict.fromkeys((*GROUPS, "largest_worker", "rss", "pss", "pss_samples"), 0)

    def __enter__(self) -> "Usage":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._sample()
            self._stop.wait(0.5)

    def _sample(self) -> None:
        rss, pids = dict.fromkeys((*GROUPS, "largest_worker"), 0), []
        for process in self._processes():
            with contextlib.suppress(psutil.Error, OSError):
                group, used, cpu = self._group(process), process.memory_info().rss, process.cpu_times()
                self._seen[process.pid] = (group, cpu.user + cpu.system)
                rss[group] += used
                if group == "workers":
                    rss["largest_worker"] = max(rss["largest_worker"], used)
                pids.append(process.pid)
        now, machine = time.monotonic(), psutil.cpu_times()
        self._times.append(now)
        for group in GROUPS:
            self._cpu[group].append(sum(cpu for name, cpu in self._seen.values() if name == group))
        # /proc/stat counts guests within user, too.
        busy = sum(machine) - machine.idle - getattr(machine, "iowait", 0) - getattr(machine, "guest", 0)
        self._cpu["machine"].append(busy)
        for name, value in {**rss, "rss": sum(rss[group] for group in GROUPS)}.items():
            self.peak[name] = max(self.peak[name], value)
        # The kernel walks page tables for this one: as rarely as takes at most 1 % of a core.
        if now >= self._next_pss:
            self.peak["pss"] = max(self.peak["pss"], sum(_pss(pid) for pid in pids))
            self.peak["pss_samples"] += 1
            self._next_pss = now + 100 * (time.monotonic() - now)

    def _processes(self) -> Iterator[psutil.Process]:
        for root in self._roots:
            with contextlib.suppress(psutil.Error):
                yield from (root, *root.children(recursive=True))

    def _group(self, process: psutil.Process) -> str:
        if process in self._roots:
            return "driver"
        command = " ".join(process.cmdline())
        if any(f"ray::{name}" in command for name in _RAYS_OWN):
            return "ray"
        if "ray::" in command or "default_worker.py" in command:
            return "workers"
        return "ray" if "/ray/" in command else "workers"

    def cpu_between(self, start: float, stop: float) -> dict[str, float]:
        """CPU seconds by group, read between samples by interpolation; `other` is the rest of the machine's."""
        spent = {name: float(np.diff(np.interp([start, stop], self._times, values))[0]) for name, values in self._cpu.items()}
        machine = spent.pop("machine")
        return {**spent, "other": max(0.0, machine - sum(spent.values()))}


def _pss(pid: int) -> int:
    """Bytes of a process with shared pages divided among their users; 0 where the kernel doesn't say."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def in_new_processes(function: Callable[..., Found], *calls: tuple[object, ...]) -> tuple[list[Found], Usage]:
    """`function(*call)` for every call, each in a new process, all at once; what they return, and what they took."""
    pipes = [SPAWN.Pipe(duplex=False) for _ in calls]
    started = time.monotonic()
    processes = [SPAWN.Process(target=_send, args=(send, function, call)) for (_, send), call in zip(pipes, calls, strict=True)]
    with _nameless_program():
        for process in processes:
            process.start()
    for _, send in pipes:
        send.close()
    results: dict[Connection, Found] = {}
    with Usage([process.pid for process in processes if process.pid], started) as usage:
        try:
            while waiting := [receive for receive, _ in pipes if receive not in results]:
                ready = wait(waiting)
                results |= {receive: receive.recv() for receive in waiting if receive in ready}
        except EOFError:
            for process in processes:
                process.terminate()
            raise BenchmarkFailed(f"{function.__name__} did not finish; its error is above") from None
        finally:
            for process in processes:
                process.join()
    return [results[receive] for receive, _ in pipes], usage


@contextlib.contextmanager
def _nameless_program() -> Iterator[None]:
    """New processes import the program that starts them, unless it has no file: what is measured shouldn't begin with the imports
    of all benchmarks."""
    program = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program


def _send(pipe: Connection, function: Callable[..., object], call: tuple[object, ...]) -> None:
    pipe.send(function(*call))


def durations(started: float, marks: Mapping[str, float]) -> dict[str, float]:
    """Seconds from each mark to the one before it."""
    return {name: b - a for (name, b), a in zip(marks.items(), [started, *marks.values()], strict=False)}
