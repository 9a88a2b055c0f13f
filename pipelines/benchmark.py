"""Speed and memory of extraction, beside the parts it's made of and the loop a competent user would write instead.

`measure_extract` and `measure_index` return plain data; jobs/benchmark.py makes the input and prints. What is measured runs
in fresh processes, one thing at a time, so that start-up is whole and memory is its own. CPUs only.
"""

import contextlib
import functools
import io
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
import zarr
from numcodecs.zstd import Zstd
from PIL import Image
from torch import Tensor

from cluster.session import connect
from operators.backbone import autocast, cast_matmul_weights, normalise
from pipelines.executors import RayExecutor
from pipelines.extract import run_prepared
from pipelines.models import ConfigError, WeightsChoice, load_model
from pipelines.plan import ExtractConfig, geometry_of, prepare
from storage.samples import read_images
from storage.spec import FeatureSpec
from storage.store import FeatureStore

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
GROUPS = ("driver", "workers", "ray")
"""The measured program; its worker processes (Ray's, or the DataLoader's); Ray's own daemons."""
STAGES = ("read", "decode", "forward", "upsample", "encode", "write")
MIN_STEADY_TASKS = 8
"""Below this the steady window opens when the first task begins, since little would be left of it."""


class BenchmarkFailed(RuntimeError):
    """A measured process died, or results that must agree don't."""


# --- fresh processes and what they take -------------------------------------------------------------------------------


class Usage:
    """Watches the processes `pids` and all below them, twice a second: memory, and CPU time by group."""

    def __init__(self, pids: Sequence[int]):
        self._roots = [psutil.Process(pid) for pid in pids]
        self._stop, self._thread = threading.Event(), threading.Thread(target=self._watch, daemon=True)
        self._times: list[float] = []
        self._cpu: dict[str, list[float]] = {group: [] for group in (*GROUPS, "machine")}
        self._seen: dict[int, tuple[str, float]] = {}
        self._next_pss = 0.0
        self.peak = dict.fromkeys((*GROUPS, "largest_worker", "rss", "pss"), 0)

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
            self._next_pss = now + 100 * (time.monotonic() - now)

    def _processes(self) -> Iterator[psutil.Process]:
        for root in self._roots:
            with contextlib.suppress(psutil.Error):
                yield from (root, *root.children(recursive=True))

    def _group(self, process: psutil.Process) -> str:
        if process in self._roots:
            return "driver"
        command = " ".join(process.cmdline())
        if "ray::" in command or "default_worker.py" in command:
            return "workers"
        return "ray" if "/ray/" in command else "workers"

    def cpu_between(self, start: float, stop: float) -> dict[str, float]:
        """CPU seconds by group, read between samples by interpolation; `other` is the rest of the machine's."""
        spent = {
            name: float(np.diff(np.interp([start, stop], self._times, values))[0]) for name, values in self._cpu.items()
        }
        machine = spent.pop("machine")
        return {**spent, "other": max(0.0, machine - sum(spent.values()))}


def _pss(pid: int) -> int:
    """Bytes of a process with shared pages divided among their users; 0 where the kernel doesn't say."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def run_fresh(function: Callable[..., Any], *args: Any, count: int = 1) -> tuple[list[Any], Usage]:
    """`function(started, rank, barrier, *args)` in `count` new processes at once; what they return, and what they took."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(count)
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    started = time.monotonic()
    processes = [
        context.Process(target=_send, args=(pipes[rank][1], function, started, rank, barrier, *args))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for _, send in pipes:
        send.close()
    with Usage([process.pid for process in processes if process.pid]) as usage:
        try:
            results = [receive.recv() for receive, _ in pipes]
        except EOFError:
            for process in processes:
                process.terminate()
            raise BenchmarkFailed(f"{function.__name__} did not finish; its error is above") from None
        finally:
            for process in processes:
                process.join()
    return results, usage


def _send(pipe: Any, function: Callable[..., Any], *args: Any) -> None:
    pipe.send(function(*args))


# --- (a) this pipeline ------------------------------------------------------------------------------------------------


@dataclass
class _Clocked:
    """A worker, or what makes one, whose reports say when their task began and ended."""

    inner: Any

    def __call__(self, **options: Any) -> "_Clocked":
        return _Clocked(self.inner(**options))

    def load(self, task: Any) -> Any:
        return self.inner.load(task)

    def run(self, task: Any, loaded: Any = None) -> dict[str, Any]:
        began = time.monotonic()
        report = self.inner.run(task, loaded)
        return {**report, "began": began, "ended": time.monotonic()}


class _ClockedExecutor:
    """Ray's executor, with the reports kept."""

    def __init__(self) -> None:
        self._ray = RayExecutor()
        self.scan, self.pool = self._ray.scan, self._ray.pool
        self.reports: list[dict[str, Any]] = []

    def run(self, make_worker: Callable[..., Any], *args: Any, **options: Any) -> Iterator[dict[str, Any]]:
        for report in self._ray.run(_Clocked(make_worker), *args, **options):
            self.reports.append(report)
            yield report


def _pipeline(started: float, rank: int, barrier: Any, config: ExtractConfig) -> dict[str, Any]:
    """One extraction, end to end."""
    marks = {"imports": time.monotonic()}
    with connect("local", num_cpus=CORES, num_gpus=0):
        marks["ray"] = time.monotonic()
        executor = _ClockedExecutor()
        prepared = prepare(config, executor)
        marks["index and model"] = time.monotonic()
        summary = run_prepared(prepared, executor)
        done = time.monotonic()
    if summary.failed:
        raise BenchmarkFailed(f"{summary.failed} images failed, so speeds can't be compared: {summary.reasons}")
    reports = executor.reports
    marks["first task"] = min(report["ended"] for report in reports)
    times = [started, *marks.values()]
    return {
        "images": summary.ok,
        "seconds": done - started,
        "start_up_s": marks["first task"] - started,
        "start_up_parts_s": {name: b - a for name, a, b in zip(marks, times, times[1:], strict=False)},
        "wrap_up_s": done - max(report["ended"] for report in reports),
        "stage_ms": {s: 1e3 * sum(r["seconds"].get(s, 0.0) for r in reports) / summary.ok for s in STAGES},
        "bytes_written": summary.bytes_written,
        "batch": max(report["batch"] for report in reports),
        **_steady(reports),
    }


def _steady(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Images and seconds from the end of the first finished task to the end of the last.

    Tasks under way when that window opens count by the part of their stage time that lies in it: read and decode are
    taken to run from a task's beginning, the other stages up to its end (between them it may wait for the model).
    """
    whole = len(reports) < MIN_STEADY_TASKS
    first, last = min(r["began" if whole else "ended"] for r in reports), max(r["ended"] for r in reports)
    images = 0.0
    for r in reports:
        total = sum(r["seconds"].values())
        load = r["seconds"].get("read", 0.0) + r["seconds"].get("decode", 0.0)
        parts = ((r["began"], load), (r["ended"] - (total - load), total - load))
        inside = sum(min(length, max(0.0, start + length - first)) for start, length in parts)
        images += r["ok"] * inside / total
    return {
        "steady": {"start": first, "stop": last, "images": images, "from": "begin" if whole else "end"},
        "steady_images_per_s": images / (last - first),
        "tasks": len(reports),
    }


# --- (d) the loop a competent user would write ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BaselineJob:
    """What the loop and the bare stages need to make the same features as a store."""

    spec: FeatureSpec
    store: str
    urls: tuple[str, ...]
    weights: str
    out: str
    batch: int
    stage_s: float

    def model(self) -> torch.nn.Module:
        """The timm model, its position embedding brought to the input's size once."""
        model = load_model(self.spec.model, self.spec.input_size, WeightsChoice.parse(self.weights), None, None)
        if hasattr(model, "set_input_size"):
            model.set_input_size(img_size=self.spec.input_size)
        return model


def _level_rows(tokens: Tensor, prefix: int, spec: FeatureSpec) -> dict[str, np.ndarray]:
    """Final tokens [B, T + h*w, C] to the rows of every level, as stored."""
    grid = tuple(side // spec.stride for side in spec.input_size)
    maps = tokens[:, prefix:].transpose(1, 2).unflatten(2, grid)
    out = {}
    for level in spec.levels:
        if level.grid is None:
            rows = tokens[:, 0] if level.method == "cls" else tokens[:, prefix:].mean(dim=1)
        elif level.method == "backbone":
            rows = maps.permute(0, 2, 3, 1)
        elif level.method == "average":
            rows = F.adaptive_avg_pool2d(maps.float(), level.grid).permute(0, 2, 3, 1)
        else:
            mode = {"nearest": "nearest-exact"}.get(level.method, level.method)
            rows = F.interpolate(maps.float(), size=level.grid, mode=mode).permute(0, 2, 3, 1)
        out[level.name] = rows.to(getattr(torch, level.dtype)).contiguous().numpy()
    return out


def _loop(started: float, rank: int, barrier: Any, job: BaselineJob) -> dict[str, Any]:
    """WebDataset and DataLoader workers, timm under autocast with torch's default threads, whole shards to zarr-python."""
    import webdataset as wds
    from torchvision import transforms

    spec, seconds = job.spec, dict.fromkeys(("wait for data", "forward", "upsample", "write"), 0.0)
    bicubic = transforms.InterpolationMode(spec.interpolation)
    transform = transforms.Compose(
        [
            transforms.Resize(spec.input_size[0], bicubic),
            transforms.CenterCrop(spec.input_size),
            transforms.ToTensor(),
            transforms.Normalize(spec.mean, spec.std),
        ]
    )
    dataset = wds.WebDataset(list(job.urls), shardshuffle=False).decode("pil").to_tuple("__key__", "jpg;jpeg;png;webp")
    dataset = dataset.map_tuple(str, transform).batched(job.batch)
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=min(CORES, len(job.urls)))
    model = job.model()
    writer = _LoopWriter(job)
    keys: list[str] = []
    arrived, first_done = 0.0, 0.0
    with torch.inference_mode():
        clock = time.monotonic()
        for batch_keys, images in loader:
            t0 = time.monotonic()
            arrived = arrived or t0
            with autocast(torch.device("cpu"), spec.precision):
                tokens = model.forward_features(images)
            t1 = time.monotonic()
            rows = _level_rows(tokens, model.num_prefix_tokens, spec)
            t2 = time.monotonic()
            writer.add(rows)
            keys += batch_keys
            t3 = time.monotonic()
            for name, spent in zip(seconds, (t0 - clock, t1 - t0, t2 - t1, t3 - t2), strict=True):
                seconds[name] += spent
            clock, first_done = t3, first_done or t3
        writer.flush()
    done = time.monotonic()
    return {
        "images": len(keys),
        "seconds": done - started,
        "start_up_s": first_done - started,
        # Kinder to the loop than opening the window at the end of its first batch: the first images' decoding is left out.
        "steady_images_per_s": len(keys) / (done - arrived),
        "stage_ms": {name: 1e3 * spent / len(keys) for name, spent in seconds.items()},
        "keys": keys,
    }
