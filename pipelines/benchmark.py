"""Speed and memory of extraction, beside the parts it's made of and the loop a competent user would write instead.

`measure_extract` and `measure_index` return plain data; jobs/benchmark.py makes the input and prints. What is measured runs
in fresh processes, one thing at a time, so that start-up is whole and memory is its own. CPUs only.
"""

import contextlib
import io
import logging
import multiprocessing
import multiprocessing.connection
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from zarr.codecs import ZstdCodec

from cluster.session import connect
from operators.backbone import autocast, cast_matmul_weights, normalise
from operators.image import Geometry
from pipelines.config import ConfigError, ExtractConfig
from pipelines.executors import RayExecutor
from pipelines.extract import run_prepared
from pipelines.models import WeightsChoice, load_model
from pipelines.prepare import geometry_of, prepare, resolve
from storage.spec import FeatureSpec
from storage.store import FeatureStore

logger = logging.getLogger(__name__)

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_SPAWN = multiprocessing.get_context("spawn")
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


def run_fresh(function: Callable[..., Any], *calls: tuple[Any, ...]) -> tuple[list[Any], Usage]:
    """`function(*call)` for every call, each in a new process, all at once; what they return, and what they took."""
    pipes = [_SPAWN.Pipe(duplex=False) for _ in calls]
    started = time.monotonic()
    processes = [
        _SPAWN.Process(target=_send, args=(send, function, call)) for (_, send), call in zip(pipes, calls, strict=True)
    ]
    for process in processes:
        process.start()
    for _, send in pipes:
        send.close()
    results: dict[Any, Any] = {}
    with Usage([process.pid for process in processes if process.pid], started) as usage:
        try:
            while waiting := [receive for receive, _ in pipes if receive not in results]:
                for receive in multiprocessing.connection.wait(waiting):
                    results[receive] = receive.recv()
        except EOFError:
            for process in processes:
                process.terminate()
            raise BenchmarkFailed(f"{function.__name__} did not finish; its error is above") from None
        finally:
            for process in processes:
                process.join()
    return [results[receive] for receive, _ in pipes], usage


def _send(pipe: Any, function: Callable[..., Any], call: tuple[Any, ...]) -> None:
    pipe.send(function(*call))


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


def _pipeline(config: ExtractConfig) -> dict[str, Any]:
    """One extraction, end to end."""
    marks = {"imports": time.monotonic()}
    resolved = resolve(config)
    marks["model"] = time.monotonic()
    with connect("local", num_cpus=CORES, num_gpus=0):
        marks["ray"] = time.monotonic()
        executor = _ClockedExecutor()
        prepared = prepare(resolved, executor)
        marks["index"] = time.monotonic()
        summary = run_prepared(prepared, executor)
        done = time.monotonic()
    if summary.failed:
        raise BenchmarkFailed(f"{summary.failed} images failed, so speeds can't be compared: {summary.reasons}")
    reports = executor.reports
    marks["first task"] = min(report["ended"] for report in reports)
    return {
        "images": summary.ok,
        "marks": marks,
        "done": done,
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


def _loop_data(job: BaselineJob) -> Any:
    """Batches (keys, normalised images), decoded by a DataLoader worker per core."""
    import webdataset as wds
    from torchvision import transforms

    spec = job.spec
    transform = transforms.Compose(
        [
            transforms.Resize(spec.input_size[0], transforms.InterpolationMode(spec.interpolation)),
            transforms.CenterCrop(spec.input_size),
            transforms.ToTensor(),
            transforms.Normalize(spec.mean, spec.std),
        ]
    )
    dataset = wds.WebDataset(list(job.urls), shardshuffle=False).decode("pil").to_tuple("__key__", "jpg;jpeg;png;webp")
    dataset = dataset.map_tuple(str, transform).batched(job.batch)
    # The platform's default, as in a script; in this process it is `spawn`, which would import torch anew in every worker.
    start_method = multiprocessing.get_all_start_methods()[0]
    workers = min(CORES, len(job.urls))
    return wds.WebLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=start_method)


def _loop(job: BaselineJob) -> dict[str, Any]:
    """WebDataset and DataLoader workers, timm under autocast with torch's default threads, whole shards to zarr-python."""
    loader, model, writer = _loop_data(job), job.model(), _LoopWriter(job)
    seconds = dict.fromkeys(("wait for data", "forward", "upsample", "write"), 0.0)
    keys: list[str] = []
    arrived, first_done = 0.0, 0.0
    with torch.inference_mode():
        clock = time.monotonic()
        for batch_keys, images in loader:
            t0 = time.monotonic()
            arrived = arrived or t0
            with autocast(torch.device("cpu"), job.spec.precision):
                tokens = model.forward_features(images)
            t1 = time.monotonic()
            rows = _level_rows(tokens, model.num_prefix_tokens, job.spec)
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
        "marks": {"first batch": first_done},
        "done": done,
        # Kinder to the loop than opening the window at the end of its first batch: the first images' decoding is left out.
        "steady_images_per_s": len(keys) / (done - arrived),
        "stage_ms": {name: 1e3 * spent / len(keys) for name, spent in seconds.items()},
        "keys": keys,
    }


class _LoopWriter:
    """Arrays as the pipeline's store has them, written by zarr-python a whole number of shards at a time."""

    def __init__(self, job: BaselineJob):
        layout = FeatureStore.open(job.store).layout
        self._block, self._done, self._rows = layout.block_rows, 0, dict[str, list[np.ndarray]]()
        group, self._arrays = zarr.create_group(job.out), dict[str, zarr.Array]()
        for level in job.spec.levels:
            chunks = (1 if level.grid else self._block, *level.row_shape)
            self._arrays[level.name] = group.create_array(
                level.name,
                shape=(layout.n_rows, *level.row_shape),
                chunks=chunks,
                shards=(layout.shard_rows(level), *level.row_shape) if level.grid else None,
                dtype=level.dtype,
                compressors=ZstdCodec(level=1, checksum=True),
                fill_value=np.nan,
            )
            self._rows[level.name] = []

    def add(self, rows: Mapping[str, np.ndarray]) -> None:
        """Take the rows of a batch; write what fills whole shards."""
        for name, part in rows.items():
            self._rows[name].append(part)
        held = sum(len(part) for part in next(iter(self._rows.values())))
        self._write(held // self._block * self._block)

    def flush(self) -> None:
        """Write the rest."""
        self._write(sum(len(part) for part in next(iter(self._rows.values()))))

    def _write(self, count: int) -> None:
        for name, parts in self._rows.items():
            joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
            if count:
                self._arrays[name][self._done : self._done + count] = joined[:count]
            self._rows[name] = [joined[count:]]
        self._done += count


# --- (b, c) bare stages -----------------------------------------------------------------------------------------------


class _Bare:
    """The stages with the least code that does the work: each takes what the one before it gives, for one batch."""

    def __init__(self, job: BaselineJob, scratch: Path):
        self.spec, self.geometry, self.zstd = job.spec, geometry_of(job.spec), Zstd(level=1, checksum=True)
        self.model, self.scratch = job.model(), scratch
        cast_matmul_weights(self.model, job.spec.precision)
        self.files = [os.open(url.removeprefix("file://"), os.O_RDONLY) for url in job.urls]

    def read(self, rows: list[dict[str, Any]]) -> list[bytes]:
        return [os.pread(self.files[row["source"]], row["size"], row["offset"]) for row in rows]

    def decode(self, blobs: list[bytes]) -> np.ndarray:
        return np.stack([_bare_decode(blob, self.geometry) for blob in blobs])

    def tensor(self, pixels: np.ndarray) -> Tensor:
        return normalise(torch.from_numpy(pixels), self.spec.mean, self.spec.std)

    def tokens(self, images: Tensor) -> Tensor:
        with autocast(torch.device("cpu"), self.spec.precision):
            return self.model.forward_features(images)

    def forward(self, pixels: np.ndarray) -> Tensor:
        return self.tokens(self.tensor(pixels))

    def upsample(self, tokens: Tensor) -> dict[str, np.ndarray]:
        return _level_rows(tokens, self.model.num_prefix_tokens, self.spec)

    def encode(self, levels: dict[str, np.ndarray]) -> list[bytes]:
        parts = [part for rows in levels.values() for part in (rows if rows.ndim > 2 else [rows])]
        return [self.zstd.encode(part) for part in parts]

    def write(self, chunks: list[bytes]) -> None:
        self.scratch.write_bytes(b"".join(chunks))


@torch.inference_mode()
def _bare(job: BaselineJob, rank: int, barrier: Any) -> dict[str, float]:
    """Milliseconds per image of each stage, alone, in one of several single-threaded processes that run it together."""
    torch.set_num_threads(1)
    bare, store = _Bare(job, Path(job.out, f"{rank}.bin")), FeatureStore.open(job.store)
    n = store.layout.n_rows
    batch = max(1, min(job.batch, n // CORES))
    units = max(1, min(4, n // (CORES * batch)))
    first = rank * units * batch % n
    rows = store.index.read(first, first + units * batch).to_pylist()
    items: list[Any] = [rows[unit * batch : (unit + 1) * batch] for unit in range(units)]
    ms: dict[str, float] = {"batch": batch}
    for name in STAGES:
        if name == "forward":
            images = [bare.tensor(pixels) for pixels in items]
            ms["tokens"] = _timed(bare.tokens, images, batch, job.stage_s, barrier.wait)
        stage = getattr(bare, name)
        ms[name] = _timed(stage, items, batch, job.stage_s, barrier.wait)
        items = [stage(item) for item in items]
    barrier.wait()
    if rank == 0:
        torch.set_num_threads(CORES)
        ms["tokens, all threads"] = _timed(bare.tokens, images, batch, job.stage_s, lambda: None)
    return ms


def _timed(
    stage: Callable[[Any], Any], items: Sequence[Any], batch: int, stage_s: float, wait: Callable[[], Any]
) -> float:
    """Milliseconds per image of `stage` over `items`, again and again for `stage_s`, after one warm-up."""
    stage(items[0])
    wait()
    start, count = time.perf_counter(), 0
    # At most 2048 images: what the fast stages read and write then stays small beside the page cache.
    while not count or (time.perf_counter() - start < stage_s and count * batch < 2048):
        stage(items[count % len(items)])
        count += 1
    return 1e3 * (time.perf_counter() - start) / (count * batch)


def _bare_decode(blob: bytes, geometry: Geometry) -> np.ndarray:
    image = Image.open(io.BytesIO(blob)).convert("RGB")
    place = geometry.place(*image.size)
    (x, y), method = place.corner, Image.Resampling[geometry.interpolation.upper()]
    return np.asarray(image.resize(place.resized, method).crop((-x, -y, geometry.width - x, geometry.height - y)))


# --- all of it --------------------------------------------------------------------------------------------------------


def measure_extract(
    config: ExtractConfig, folder: Path, *, loop_batch: int, repeat: int, stage_s: float
) -> list[dict[str, Any]]:
    """`repeat` rounds of pipeline, loop and bare stages over `config.data`, with their stores in `folder`.

    Raises `BenchmarkFailed` if one fails, or if the loop's features differ from the pipeline's, and what `resolve` raises.
    """
    _refuse_unfit(config, folder)
    rounds = []
    for n in range(repeat):
        run = replace(config, out=str(folder / f"pipeline-{n}.zarr"))
        logger.info("round %d of %d: the pipeline", n + 1, repeat)
        pipeline = _measure_pipeline(run)
        store = FeatureStore.open(run.out)
        job = BaselineJob(
            spec=store.spec,
            store=run.out,
            urls=tuple(source.url for source in store.index.sources),
            weights=run.weights,
            out=str(folder / f"loop-{n}.zarr"),
            batch=loop_batch,
            stage_s=stage_s,
        )
        logger.info("round %d of %d: the user's loop", n + 1, repeat)
        [loop], usage = run_fresh(_loop, (job,))
        loop = _from_start(loop, usage)
        loop["cosine"] = _agreement(store, job.out, loop.pop("keys"))
        logger.info("round %d of %d: bare stages", n + 1, repeat)
        bare = _measure_bare(replace(job, batch=pipeline["batch"], out=str(folder)))
        rounds.append({"pipeline": pipeline, "loop": loop, "bare": bare})
        if n + 1 < repeat:
            shutil.rmtree(run.out)
            shutil.rmtree(job.out)
    return rounds


def _refuse_unfit(config: ExtractConfig, folder: Path) -> None:
    """Raise `ConfigError` for what the loop and the bare stages have no counterpart of."""
    resolved = resolve(replace(config, out=str(folder / "pipeline-0.zarr")))
    if (folder / "pipeline-0.zarr").exists():
        raise ConfigError(
            f"{folder} holds an earlier benchmark's stores, which a run would continue; give another --out"
        )
    if any(file.is_image or not file.url.startswith("file://") for file in resolved.files):
        raise ConfigError("the benchmark reads local tars only")
    if resolved.model.backbone.is_hierarchical:
        raise ConfigError(
            f"{config.model} is hierarchical; the loop that it would be compared with is one for plain ViTs"
        )


def _measure_pipeline(config: ExtractConfig) -> dict[str, Any]:
    [result], usage = run_fresh(_pipeline, (config,))
    window = result.pop("steady")
    cpu = usage.cpu_between(window["start"], window["stop"])
    cpu["idle"] = CORES * (window["stop"] - window["start"]) - sum(cpu.values())
    return _from_start(result, usage) | {
        "steady_s": window["stop"] - window["start"],
        "steady_from": window["from"],
        "steady_cpu_ms": {name: 1e3 * seconds / window["images"] for name, seconds in cpu.items()},
    }


def _from_start(result: dict[str, Any], usage: Usage) -> dict[str, Any]:
    """Absolute times of a result as seconds since its process was started, interpreter and imports included."""
    marks, done = result.pop("marks"), result.pop("done")
    return result | {
        "seconds": done - usage.started,
        "images_per_s": result["images"] / (done - usage.started),
        "start_up_s": max(marks.values()) - usage.started,
        "start_up_parts_s": _durations(usage.started, marks),
        "memory": usage.peak,
    }


def _durations(started: float, marks: Mapping[str, float]) -> dict[str, float]:
    """Seconds from each mark to the one before it."""
    return {name: b - a for (name, b), a in zip(marks.items(), [started, *marks.values()], strict=False)}


def _measure_bare(job: BaselineJob) -> dict[str, Any]:
    barrier = _SPAWN.Barrier(CORES)
    results, _ = run_fresh(_bare, *((job, rank, barrier) for rank in range(CORES)))
    stage_ms = {name: sum(ms[name] for ms in results) / CORES for name in STAGES}
    return {
        "stage_ms": stage_ms,
        "bound_images_per_s": 1e3 * CORES / sum(stage_ms.values()),
        "forward_processes_images_per_s": sum(1e3 / ms["tokens"] for ms in results),
        "forward_threads_images_per_s": 1e3 / results[0]["tokens, all threads"],
        "batch": results[0]["batch"],
    }


def _agreement(store: FeatureStore, loop_url: str, keys: Sequence[str]) -> dict[str, float]:
    """The smallest cosine, over a few rows, between the pipeline's and the loop's features of each level."""
    own = store.index.read(0, min(store.layout.n_rows, len(keys)))["key"].to_pylist()
    if sorted(own) != sorted(keys):
        raise BenchmarkFailed(f"the loop saw {len(keys)} samples, the pipeline {store.layout.n_rows}, or other ones")
    cosines = {}
    a, b = zarr.open_group(store.folder.url, mode="r"), zarr.open_group(loop_url, mode="r")
    for level in store.spec.levels:
        pairs = [
            (a[f"{level.name}/features"][row].ravel(), b[level.name][keys.index(own[row])].ravel())
            for row in range(0, len(own), -(-len(own) // 8))
        ]
        cosines[level.name] = min(_cosine(x.astype(np.float64), y.astype(np.float64)) for x, y in pairs)
    if not min(cosines.values()) > 0.999:
        raise BenchmarkFailed(f"the loop's features are not the pipeline's: cosines {cosines}")
    return cosines


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def summarise(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The best of each over all rounds, the ratios that have targets, and what lies between the bound and the rate."""
    pipeline, loop = (
        max((r[name] for r in rounds), key=lambda m: m["steady_images_per_s"]) for name in ("pipeline", "loop")
    )
    stage_ms = {stage: min(r["bare"]["stage_ms"][stage] for r in rounds) for stage in STAGES}
    bare = {"stage_ms": stage_ms, "bound_images_per_s": 1e3 * CORES / sum(stage_ms.values())}
    bare["batch"] = rounds[-1]["bare"]["batch"]
    for name in ("forward_processes_images_per_s", "forward_threads_images_per_s"):
        bare[name] = max(r["bare"][name] for r in rounds)
    best = {"pipeline": pipeline, "loop": loop, "bare": bare}
    steady = "steady_images_per_s"
    ratios = {
        "(a) steady / (c) bound": (0.9, ("pipeline", steady), ("bare", "bound_images_per_s")),
        "(a) steady / (d) steady": (1.2, ("pipeline", steady), ("loop", steady)),
        "(a) / (d), whole runs": (None, ("pipeline", "images_per_s"), ("loop", "images_per_s")),
    }
    return {
        "best": best,
        "ratios": {
            name: {"target": target, "best": best[a][x] / best[b][y], "all": [r[a][x] / r[b][y] for r in rounds]}
            for name, (target, (a, x), (b, y)) in ratios.items()
        },
        "gap": _gap(pipeline, stage_ms),
    }


def _gap(pipeline: Mapping[str, Any], bare_ms: Mapping[str, float]) -> dict[str, Any]:
    """Core milliseconds per image of the steady window, by stage and outside the stages."""
    cpu, clock = dict(pipeline["steady_cpu_ms"]), pipeline["stage_ms"]
    total, share = sum(cpu.values()), cpu.pop("workers") / sum(clock.values())
    stages = [
        {
            "stage": s,
            "bare": bare_ms[s],
            "clock": clock[s],
            "cpu": clock[s] * share,
            "gap": clock[s] * share - bare_ms[s],
        }
        for s in STAGES
    ]
    stages.sort(key=lambda stage: -stage["gap"])
    return {"stages": stages, "outside": cpu, "bare": sum(bare_ms.values()), "total": total}


# --- the index --------------------------------------------------------------------------------------------------------


def measure_index(config: ExtractConfig) -> dict[str, Any]:
    """Index the input, list the tasks, and validate the index again, on a local Ray; no features are computed."""
    [result], usage = run_fresh(_index, (config,))
    sizes = [path.stat().st_size for path in (Path(config.out) / "index").rglob("*.parquet")]
    seconds = _durations(usage.started, result.pop("marks"))
    return result | {"seconds": seconds, "parquet_bytes": sum(sizes), "memory": usage.peak}


def _index(config: ExtractConfig) -> dict[str, Any]:
    marks = {"imports": time.monotonic()}
    resolved = resolve(config)
    marks["input list and model"] = time.monotonic()
    with connect("local", num_cpus=CORES, num_gpus=0):
        marks["ray"] = time.monotonic()
        prepared = prepare(resolved, RayExecutor())
        marks["index"] = time.monotonic()
        tasks = prepared.layout.tasks()
        marks["tasks"] = time.monotonic()
        prepare(resolved, RayExecutor())
        marks["index again"] = time.monotonic()
    return {
        "rows": prepared.index.n_rows,
        "sources": len(prepared.index.sources),
        "tasks": len(tasks),
        "marks": marks,
    }
