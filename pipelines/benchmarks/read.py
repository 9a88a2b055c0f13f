"""Speed of reading features back, at random and whole epochs, beside zarr-python, a memmap, and whole shards in order.

The stores are made here, through the real writer. Each place
(a local disk, an S3 server) is measured in a fresh process, one contender after another, each with objects of its own.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import multiprocessing
import resource
import shutil
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import fsspec
import numpy as np
import psutil
import pyarrow as pa
import zarr
from torch.utils.data import DataLoader

from pipelines.benchmarks.processes import run_fresh
from pipelines.config import ConfigError, parse_options
from pipelines.costs.clocks import BenchmarkFailed
from pipelines.feature_datasets import FeatureDataset, FeatureStream
from storage.ledger import SCHEMA as LEDGER_SCHEMA
from storage.ledger import SampleRecord
from storage.paths import Folder, filesystem, public_options, redact
from storage.samples import PART_ROWS, Source, part_name, table_bytes, write_index
from storage.spec import FeatureSpec, Layout, Level, ShardTask, choose_block_rows
from storage.store import FeatureStore
from storage.tars import SCHEMA as INDEX_SCHEMA

logger = logging.getLogger(__name__)

LEVEL = "x1"
BATCH = 64
"""Rows of a batch, where a contender reads batches."""


@dataclass(frozen=True, kw_only=True)
class ReadBenchmark:
    """Reading rows at random, and shuffled epochs, from a local store and over S3."""

    rows: int = 8192
    """Rows of the local store, and of the .npy file beside it: random normal float16."""
    grid: tuple[int, int] = (14, 14)
    """Rows and columns of cells."""
    channels: int = 384
    """Values of a cell."""
    s3: str = "moto"
    """`moto` starts a simulator of S3 on loopback; s3://bucket/prefix is any other server; `none` leaves S3 out."""
    storage_options: str | None = None
    """JSON for that server, for example '{"endpoint_url": "http://host:9000"}'."""
    s3_rows: int = 2048
    """Rows of the store on S3: the first of the local one's."""
    reads: int = 100_000
    """Rows to read at random, the same ones in the same order for every contender."""
    seconds: float = 60.0
    """A contender that isn't done after this long is stopped, and its rate is that of what it has read."""
    repeat: int = 3
    """Epochs of each contender, as far as they fit in --seconds; the best is shown."""
    workers: int = 2
    """DataLoader workers of the stream that has any."""
    big_rows: int = 1_000_000
    """Rows of a local store whose opening is timed: whole index and ledger, hardly any features. 0 leaves it out."""
    out: str = ""
    """Folder in which a temporary one is made (300 KB a row) and deleted; default: the system's."""
    json: str = ""
    """Write all numbers to this file."""

    def __post_init__(self) -> None:
        if min(*self.grid, self.channels, self.s3_rows, self.reads, self.repeat, self.workers, self.seconds) <= 0:
            raise ConfigError("all sizes, counts and times but --big-rows must be above 0")
        if self.s3_rows > self.rows or self.big_rows < 0:
            raise ConfigError("--s3-rows must be at most --rows, and --big-rows at least 0")
        if self.s3 not in ("moto", "none") and not self.s3.startswith("s3://"):
            raise ConfigError(f"--s3 {redact(self.s3)}: use moto, none, or s3://bucket/prefix")
        parse_options(self.storage_options)

    def public(self) -> dict[str, Any]:
        """All settings without credentials."""
        options = parse_options(self.storage_options)
        return asdict(self) | {"s3": redact(self.s3, options), "storage_options": public_options(options)}


READ_PRESETS = {
    "default": ReadBenchmark(),
    # No network. 2 CPU cores: about 40 seconds; the numbers mean nothing at this size.
    "debug": ReadBenchmark(rows=96, grid=(4, 4), channels=64, s3_rows=48, reads=100, repeat=1, big_rows=2000),
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """A store, and what it takes to measure how it is read."""

    name: str
    url: str
    npy: str
    "a local file of the same rows, and maybe more: the truth"
    options: Mapping[str, Any] = field(default_factory=dict)
    server: int | None = None
    "the process that serves it, where it is one of ours"

    def store(self) -> FeatureStore:
        return FeatureStore.open(self.url, self.options)

    def memmap(self) -> np.ndarray:
        return np.load(self.npy, mmap_mode="r")


# --- contenders: opened at once, then (row numbers, their features) one after another ---------------------------------

Parts: TypeAlias = Iterator[tuple[np.ndarray, Any]]
Contender: TypeAlias = Callable[[Place, np.ndarray], Parts]
Read: TypeAlias = Callable[[Any], Any]


def _store(place: Place) -> Read:
    store = place.store()
    return lambda rows: store.read(rows, LEVEL)


def _zarr(place: Place) -> Read:
    options = dict(place.options) or None
    return zarr.open_array(f"{place.url}/{LEVEL}/features", mode="r", storage_options=options).__getitem__


def _memmap(place: Place) -> Read:
    array = place.memmap()
    return lambda row: np.array(array[row])


def _by_row(read: Read, order: np.ndarray) -> Parts:
    return ((order[i : i + 1], read(int(order[i]))) for i in range(len(order)))


def _by_batch(read: Read, order: np.ndarray) -> Parts:
    return ((order[i : i + BATCH], read(order[i : i + BATCH])) for i in range(0, len(order), BATCH))


def _in_order(place: Place, read: Read, order: np.ndarray) -> Parts:
    store, rows = place.store(), np.sort(order)
    size = store.layout.shard_rows(store.level(LEVEL))
    return ((rows[i : i + size], read(slice(i, min(i + size, len(rows))))) for i in range(0, len(rows), size))


def _loaded(loader: Iterable[dict[str, Any]]) -> Parts:
    """Samples or batches; workers and threads start with the first of them."""
    for one in loader:
        yield np.atleast_1d(one["row"]), one[LEVEL]


def _dataset(place: Place, order: np.ndarray) -> Parts:
    dataset = FeatureDataset(place.url, [LEVEL], storage_options=place.options)
    return _loaded(DataLoader(dataset, BATCH, sampler=order.tolist()))


def _stream(place: Place) -> FeatureStream:
    return FeatureStream(place.url, [LEVEL], storage_options=place.options)


def _stream_batches(place: Place, workers: int) -> Parts:
    # The platform's default, as in a script; in this process it is `spawn`, which would import torch anew in every worker.
    context = multiprocessing.get_all_start_methods()[0] if workers else None
    return _loaded(DataLoader(_stream(place), BATCH, num_workers=workers, multiprocessing_context=context))


BY_ROW = "zarr-python, `array[row]`"
IN_ORDER = ("`store.read`, whole shards in order", "zarr-python, whole shards in order")
STREAM = "`FeatureStream`"
LOADER = f"DataLoader of {BATCH}"
MEMMAP: dict[str, Contender] = {"memmap, `np.array(m[row])`": lambda place, order: _by_row(_memmap(place), order)}
READS: dict[str, Contender] = {
    "`store.read`, a row": lambda place, order: _by_row(_store(place), order),
    f"`store.read`, {BATCH} rows": lambda place, order: _by_batch(_store(place), order),
    f"`FeatureDataset`, {LOADER}": _dataset,
    BY_ROW: lambda place, order: _by_row(_zarr(place), order),
}


def epoch_contenders(workers: int) -> dict[str, Contender]:
    """What gives every row once: shuffled, or, to compare with, in order."""
    return {
        STREAM: lambda place, _: _loaded(_stream(place)),
        f"{STREAM}, {LOADER}": lambda place, _: _stream_batches(place, 0),
        f"{STREAM}, {LOADER}, {workers} workers": lambda place, _: _stream_batches(place, workers),
        BY_ROW: READS[BY_ROW],
        IN_ORDER[0]: lambda place, order: _in_order(place, _store(place), order),
        IN_ORDER[1]: lambda place, order: _in_order(place, _zarr(place), order),
    }


# --- measuring --------------------------------------------------------------------------------------------------------


def measure_place(place: Place, config: ReadBenchmark, also: Sequence[Place]) -> dict[str, Any]:
    """How long opening takes, here and of `also`; then epochs and random reads by every contender, one after another."""
    openings = [step for one in (place, *also) for step in _opening(one)]
    n, extra = len(place.store()), MEMMAP if place.name == "local" else {}
    order, epochs = np.random.default_rng(2).permutation(n), {}
    # Epochs first, and streams first among them: forked workers complain about zarr-python's open connections.
    for name, contender in (epoch_contenders(config.workers) | extra).items():
        tries = [_timed(place, contender, order, config.seconds)]
        while len(tries) < config.repeat and tries[0]["seconds"] * (len(tries) + 1) < config.seconds:
            tries.append(_timed(place, contender, order, config.seconds))
        epochs[name] = max(tries, key=lambda t: t["rows_per_s"]) | {"all": [t["rows_per_s"] for t in tries]}
    order = np.random.default_rng(1).integers(n, size=config.reads)
    reads = {name: _timed(place, one, order, config.seconds) for name, one in (READS | extra).items()}
    return {"rows": n, "reads": reads, "epochs": epochs, "openings": openings}


def _timed(place: Place, contender: Contender, order: np.ndarray, seconds: float) -> dict[str, Any]:
    """Run a contender until it is done or the time is up; what it gave is compared with the truth after the clock."""
    parts, given, kept, done = contender(place, order), list[np.ndarray](), [], False
    cpu, start = _cpu(place), time.perf_counter()
    for rows, values in parts:
        given.append(rows)
        if not len(given) & (len(given) - 1):  # the 1st, 2nd, 4th, 8th, ...
            kept.append((rows, values))
        if time.perf_counter() - start > seconds:
            break
    else:
        done = True
    parts.close()  # ends workers: their CPU time counts from then on
    took, count = time.perf_counter() - start, sum(map(len, given))
    own, served = (1e3 * (after - before) / count for before, after in zip(cpu, _cpu(place), strict=True))
    truth, times = place.memmap(), np.bincount(np.concatenate(given), minlength=len(place.store()))
    return {
        "rows": count,
        "seconds": took,
        "rows_per_s": count / took,
        "mb_per_s": count * truth[0].nbytes / took / 1e6,
        "cpu_s_per_1000": own,
        "server_cpu_s_per_1000": served if place.server else None,
        "done": done,
        "times": [int(times.min()), int(times.max())],
        "equal": all(np.array_equal(np.reshape(v, truth[r].shape), truth[r]) for r, v in kept),
    }


def _cpu(place: Place) -> tuple[float, float]:
    """CPU seconds of this process and its ended children, and of the server."""
    server = psutil.Process(place.server).cpu_times() if place.server else None
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in own), server.user + server.system if server else 0.0


def check(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `BenchmarkFailed` unless every contender gave right features, and every whole epoch each row once."""
    for kind in ("reads", "epochs"):
        for name, one in found[kind].items():
            if not one["equal"]:
                raise BenchmarkFailed(f"{name} ({kind}) gave other features than were written")
            fewest, most = one["times"]
            if kind == "epochs" and (most > 1 or (one["done"] and fewest < 1)):
                raise BenchmarkFailed(f"{name}: an epoch gave rows {fewest} to {most} times, not once")


def _opening(place: Place, again: int = 5) -> list[dict[str, Any]]:
    """Each step's milliseconds, the first time and the median of later ones, and the S3 requests of one time."""
    found: dict[str, list[tuple[float, dict[str, int]]]] = {}
    with _counted_requests() as requests:
        for _ in range(1 + again):
            fsspec.get_filesystem_class("s3").clear_instance_cache()
            start = time.perf_counter()
            for step in _opening_steps(place):
                found.setdefault(step, []).append((1e3 * (time.perf_counter() - start), dict(requests)))
                requests.clear()
                start = time.perf_counter()
    steps = []
    for step, one in found.items():
        ms = [milliseconds for milliseconds, _ in one]
        steps.append({"step": step, "first_ms": ms[0], "ms": float(np.median(ms[1:])), "requests": one[-1][1]})
    return steps


def _opening_steps(place: Place) -> Iterator[str]:
    store = place.store()
    yield f"{place.name}: open the store"
    store.read(key_of(1), LEVEL)
    yield f"{place.name}: read a row by its key"
    store.records(key_of(1))
    yield f"{place.name}: its ledger row"


@contextlib.contextmanager
def _counted_requests() -> Iterator[Counter[str]]:
    """This process's S3 requests by operation."""
    from aiobotocore.client import AioBaseClient

    requests, call = Counter[str](), AioBaseClient._make_api_call

    def counting(client: Any, operation: str, *args: Any) -> Any:
        requests[operation] += 1
        return call(client, operation, *args)

    AioBaseClient._make_api_call = counting
    try:
        yield requests
    finally:
        AioBaseClient._make_api_call = call


# --- stores and servers -----------------------------------------------------------------------------------------------

_SPEC = """{"model": "made up", "weights": "", "weights_source": "random", "layers": [0], "facet": "token", "norm": true,
"stride": 16, "pos_embed": "timm", "geometry": "squash", "crop_pct": 1.0, "interpolation": "bicubic", "precision": "fp32",
"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "jpeg_draft": false}"""


def make_spec(grid: tuple[int, int], channels: int) -> FeatureSpec:
    """A dense level and a pooled vector."""
    dense = Level(name=LEVEL, method="backbone", grid=grid, channels=channels, start=(8.0, 8.0), step=(16.0, 16.0))
    levels = (dense, Level(name="pooled", method="mean", grid=None, channels=channels))
    shape = {"input_size": [16 * side for side in grid], "levels": [asdict(level) for level in levels]}
    return FeatureSpec.from_json(json.loads(_SPEC) | shape)


def write_npy(path: str, config: ReadBenchmark) -> None:
    """Random normal float16 rows, the same ones every time."""
    shape = (config.rows, *config.grid, config.channels)
    out, rng = np.lib.format.open_memmap(path, "w+", np.float16, shape), np.random.default_rng(0)
    for first in range(0, config.rows, 64):
        part = out[first : first + 64]
        part[...] = rng.standard_normal(part.shape, np.float32)
    out.flush()


def write_store(place: Place, config: ReadBenchmark, rows: int) -> None:
    """The first rows of `place.npy`, as an extraction writes them; in blocks of the local store's size, wherever it is."""
    features, spec = place.memmap(), make_spec(config.grid, config.channels)
    store = _create(place, spec, rows, choose_block_rows(config.rows, spec))
    for task in store.layout.tasks():
        _write_task(store, task, features)
    store.finalize()


def write_big_store(place: Place, rows: int) -> None:
    """Index and ledger of all rows, and the features of the first task."""
    spec = make_spec((1, 1), 8)
    store = _create(place, spec, rows, choose_block_rows(rows, spec))
    _write_task(store, store.layout.task(0), np.ones((store.layout.block_rows, 1, 1, 8), np.float16))
    for part, first in enumerate(range(0, rows, PART_ROWS)):
        table = _rows_table(LEDGER_SCHEMA, first, min(PART_ROWS, rows - first), status="ok", width=640, height=480)
        store.folder.write(part_name("ledger/samples", part), table_bytes(table))
    root = json.loads(store.folder.read("zarr.json"))
    root["attributes"]["raylift"] |= {"status": "complete", "counts": {"ok": rows}}
    store.folder.write("zarr.json", json.dumps(root).encode())


def key_of(row: int) -> str:
    """Keys that aren't in the order of the rows."""
    return f"{(row + 1) * 7_368_787 % 10**9:09d}"


def _rows_table(schema: pa.Schema, first: int, count: int, **constants: Any) -> pa.Table:
    """Rows of an index or a ledger that differ in number and key; the other columns are constant, or null."""
    columns: dict[str, Any] = {f.name: pa.repeat(pa.scalar(constants.get(f.name), f.type), count) for f in schema}
    numbers = np.arange(first, first + count)
    own = {"key": [key_of(row) for row in numbers.tolist()], "row": numbers}
    return pa.table({name: own.get(name, column) for name, column in columns.items()}, schema=schema)


def _create(place: Place, spec: FeatureSpec, rows: int, block_rows: int) -> FeatureStore:
    table = _rows_table(INDEX_SCHEMA, 0, rows, source=0, member="jpg", offset=0, size=0)
    index = write_index(Folder(place.url, place.options), table, [Source(url="made up", size=0, etag="", digest="")])
    layout = Layout(n_rows=rows, block_rows=block_rows, index=index.digest)
    return FeatureStore.create(place.url, spec, layout, provenance={}, storage_options=place.options)


def _write_task(store: FeatureStore, task: ShardTask, features: np.ndarray) -> None:
    dense, pooled = store.spec.levels
    writer, records = store.writer(task), []
    for position, row in enumerate(range(task.first, task.last)):
        writer.put(dense, position, features[row])
        writer.put(pooled, position, features[row].mean(axis=(0, 1), dtype=np.float32))
        records.append(SampleRecord(row=row, key=key_of(row), source="made up", member="jpg", offset=0, size=0))
    writer.commit(records, writer.write())


@contextlib.contextmanager
def s3_place(config: ReadBenchmark, npy: str) -> Iterator[Place | None]:
    """A store on the S3 server that is asked for, deleted at the end; None if there is to be none."""
    if config.s3 == "none":
        yield None
        return
    base, options, server = config.s3, parse_options(config.storage_options), None
    with contextlib.ExitStack() as stack:
        if base == "moto":
            base, (options, server) = "s3://benchmark", stack.enter_context(moto_server())
        url = f"{base.rstrip('/')}/raylift-benchmark-{uuid.uuid4().hex[:8]}.zarr"
        place = Place(name="S3", url=url, npy=npy, options=options.get("s3", options), server=server)
        Folder(url, place.options).exists("zarr.json")  # a server that can't be reached is a readable error here
        fs, path = filesystem(url, place.options)
        if not fs.exists(path.split("/")[0]):
            fs.mkdir(path.split("/")[0])
        stack.callback(lambda: fs.exists(path) and fs.rm(path, recursive=True))
        write_store(place, config, config.s3_rows)
        yield place


_MOTO = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel("ERROR")
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # until the parent ends, however it does
"""


@contextlib.contextmanager
def moto_server() -> Iterator[tuple[dict[str, Any], int]]:
    """A simulator of S3 in a process of its own: storage options and process id."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", _MOTO], text=True, **pipes) as process:
        try:
            port = process.stdout.readline().strip() if process.stdout else ""
            if not port:
                raise BenchmarkFailed("moto's server did not start; see what `python -m moto.server` says")
            options = {"endpoint_url": f"http://127.0.0.1:{port}", "key": "moto-access", "secret": "moto-secret"}
            yield options, process.pid
        finally:
            process.terminate()


# --- the whole of it --------------------------------------------------------------------------------------------------


def measure_read(config: ReadBenchmark, folder: Path) -> dict[str, Any]:
    """All of it, in `folder`. Raises `BenchmarkFailed` if a contender gives wrong features, or an epoch not every row once."""
    _refuse_unfit(folder, config)
    npy = str(folder / "rows.npy")
    local = Place(name="local", url=str(folder / "feats.zarr"), npy=npy)
    big = Place(name=f"local, {config.big_rows:,} rows", url=str(folder / "big.zarr"), npy=npy)
    logger.info("writing %s rows", f"{config.rows:,}")
    write_npy(npy, config)
    write_store(local, config, config.rows)
    if config.big_rows:
        logger.info("writing the index and the ledger of %s rows", f"{config.big_rows:,}")
        write_big_store(big, config.big_rows)
    with s3_place(config, npy) as remote:
        places = {"local": _measure(local, config, [big] if config.big_rows else [])}
        if remote:
            places["S3"] = _measure(remote, config, [])
        server = _describe(remote)
    return {"places": places, "server": server, "ratios": list(ratios(places))}


def _measure(place: Place, config: ReadBenchmark, also: Sequence[Place]) -> dict[str, Any]:
    logger.info("%s: opening, epochs, random reads", place.name)
    [found], _ = run_fresh(measure_place, (place, config, also))
    check(found)
    return found


def _describe(place: Place | None) -> str:
    """Which server it was, for a reader of the numbers."""
    if place is None:
        return "No S3."
    if place.server is None:
        options = json.dumps(public_options(place.options))
        return f"S3: {place.store().folder.shown}, options {options}; on the same cores if it runs on this machine."
    version, memory = importlib.metadata.version("moto"), psutil.Process(place.server).memory_info().rss
    return (
        f"S3: moto {version}, {memory / 1e6:,.0f} MB of memory, on the same cores. For each range of an object it reads all of"
        "\n  it, so that single rows cost more than with other servers."
    )


def ratios(places: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Shuffled epochs by what they are held against: the faster reader of whole shards, and zarr-python row by row."""
    for name, place in places.items():
        rates = {contender: one["rows_per_s"] for contender, one in place["epochs"].items()}
        bases = {"whole shards in order": max(rates[one] for one in IN_ORDER), BY_ROW: rates[BY_ROW]}
        for base, rate in bases.items():
            target = "5.0" if (name, base) == ("S3", BY_ROW) else "0.5" if base != BY_ROW else ""
            found = {one: value / rate for one, value in rates.items() if one.startswith(STREAM)}
            yield {"ratio": f"{name}: shuffled / {base}", "target": target, "found": found}


def _refuse_unfit(folder: Path, config: ReadBenchmark) -> None:
    """Raise `ConfigError` for what isn't there: a package, or room on the disk."""
    if config.s3 == "moto" and not all(importlib.util.find_spec(name) for name in ("moto", "flask")):
        raise ConfigError("--s3 moto needs a package: pip install 'moto[server]'; or leave S3 out with --s3 none")
    row = 2 * config.grid[0] * config.grid[1] * config.channels
    need, free = row * (2 * config.rows + config.s3_rows) + 300 * config.big_rows, shutil.disk_usage(folder).free
    if need > free:
        text = f"{free / 1e9:.1f} GB free, this takes {need / 1e9:.1f} GB"
        raise ConfigError(f"{folder.parent} has {text}; give --out another folder, or ask for fewer --rows")
