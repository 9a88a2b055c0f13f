"""Speed of reading features back, at random and whole epochs, beside zarr-python, a memmap, and whole shards in order.

Each place (a local disk, an S3 server) is measured in a new process, one contender after another, each with objects of its
own.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import multiprocessing
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import fsspec
import numpy as np
import psutil
import zarr
from torch.utils.data import DataLoader

from pipelines.benchmarks.processes import in_new_processes
from pipelines.benchmarks.stores import LEVEL, Place, key_of, s3_place, write_big_store, write_npy, write_store
from pipelines.config import ConfigError, parse_options, require_at_least
from pipelines.costs.clocks import Machine, NumbersFile
from pipelines.costs.process import BenchmarkFailed
from pipelines.feature_datasets import FeatureDataset, FeatureStream, Sample
from pipelines.results import number_lines
from storage.redaction import public_options, redact

logger = logging.getLogger(__name__)

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
    json: NumbersFile = ""

    def __post_init__(self) -> None:
        require_at_least(1, self, "grid", "channels", "s3_rows", "reads", "repeat", "workers")
        require_at_least(0, self, "big_rows")
        if self.s3_rows > self.rows or self.seconds <= 0:
            raise ConfigError("--s3-rows must be at most --rows, and --seconds above 0")
        if self.s3 not in ("moto", "none") and not self.s3.startswith("s3://"):
            raise ConfigError(f"--s3 {redact(self.s3)}: use moto, none, or s3://bucket/prefix")
        parse_options(self.storage_options)

    def public(self) -> dict[str, object]:
        """All settings without credentials."""
        options = parse_options(self.storage_options)
        return asdict(self) | {"s3": redact(self.s3, options), "storage_options": public_options(options)}


# No network. 2 CPU cores: about 40 seconds; the numbers mean nothing at this size.
DEBUG = ReadBenchmark(rows=96, grid=(4, 4), channels=64, s3_rows=48, reads=100, repeat=1, big_rows=2000)


# --- contenders: opened at once, then (row numbers, their features) one after another ---------------------------------

Parts: TypeAlias = Generator[tuple[np.ndarray, np.ndarray]]
Contender: TypeAlias = Callable[[Place, np.ndarray], Parts]
Read: TypeAlias = Callable[[int | slice | np.ndarray], np.ndarray]


def _store(place: Place) -> Read:
    store = place.store()
    return lambda rows: store.read(rows, LEVEL)


def _zarr(place: Place) -> Read:
    """As fast as the installed zarr-python goes: newer ones have a pipeline that is not their default."""
    if hasattr(zarr.core.codec_pipeline, "FusedCodecPipeline"):
        zarr.config.set({"codec_pipeline.path": "zarr.core.codec_pipeline.FusedCodecPipeline"})
    options = dict(place.options) or None
    array = zarr.open_array(f"{place.url}/{LEVEL}/features", mode="r", storage_options=options)
    return lambda rows: np.asarray(array[rows])


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


def _loaded(loader: Iterable[Sample]) -> Parts:
    """Samples or batches; workers and threads start with the first of them."""
    for one in loader:
        yield np.atleast_1d(np.asarray(one["row"])), np.asarray(one[LEVEL])


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


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What one contender read, and how fast. CPU time is for 1,000 rows."""

    rows: int
    seconds: float
    rows_per_s: float
    mb_per_s: float
    cpu_s_per_1000: float
    server_cpu_s_per_1000: float | None
    done: bool
    "False: the time was up before"
    times: tuple[int, int]
    "how often the rows were given that were given least and most often"
    equal: bool
    "what was given is what was written"


@dataclass(frozen=True, kw_only=True)
class BestRate(Rate):
    """Of several tries."""

    all: tuple[float, ...]
    "rows per second of every try"


@dataclass(frozen=True, kw_only=True)
class Opening:
    """A step on the way to the first row."""

    step: str
    first_ms: float
    ms: float
    "median of later times"
    requests: Mapping[str, int]
    "S3 requests of one time, by operation"


@dataclass(frozen=True, kw_only=True)
class PlaceRead:
    """What was measured of a store."""

    rows: int
    reads: Mapping[str, Rate]
    epochs: Mapping[str, BestRate]
    "by contender, as `reads`"
    openings: tuple[Opening, ...]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Shuffled epochs as parts of another reader's rate."""

    ratio: str
    target: str
    "what is aimed at; empty: nothing"
    found: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class ReadResult:
    """All that was measured."""

    places: Mapping[str, PlaceRead]
    server: str
    ratios: tuple[Ratio, ...]


def measure_place(place: Place, config: ReadBenchmark, also: Sequence[Place]) -> PlaceRead:
    """How long opening takes, here and of `also`; then epochs and random reads by every contender, one after another."""
    openings = tuple(step for one in (place, *also) for step in _opening(one))
    n, extra = len(place.store()), MEMMAP if place.name == "local" else {}
    order, epochs = np.random.default_rng(2).permutation(n), dict[str, BestRate]()
    # Epochs first, and streams first among them: forked workers complain about zarr-python's open connections.
    for name, contender in (epoch_contenders(config.workers) | extra).items():
        tries = [_timed(place, contender, order, config.seconds)]
        while len(tries) < config.repeat and tries[0].seconds * (len(tries) + 1) < config.seconds:
            tries.append(_timed(place, contender, order, config.seconds))
        rates = tuple(each.rows_per_s for each in tries)
        epochs[name] = BestRate(**vars(max(tries, key=lambda each: each.rows_per_s)), all=rates)
    order = np.random.default_rng(1).integers(n, size=config.reads)
    reads = {name: _timed(place, one, order, config.seconds) for name, one in (READS | extra).items()}
    return PlaceRead(rows=n, reads=reads, epochs=epochs, openings=openings)


def _timed(place: Place, contender: Contender, order: np.ndarray, seconds: float) -> Rate:
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
    return Rate(
        rows=count,
        seconds=took,
        rows_per_s=count / took,
        mb_per_s=count * truth[0].nbytes / took / 1e6,
        cpu_s_per_1000=own,
        server_cpu_s_per_1000=served if place.server else None,
        done=done,
        times=(int(times.min()), int(times.max())),
        equal=all(np.array_equal(np.reshape(v, truth[r].shape), truth[r]) for r, v in kept),
    )


def _cpu(place: Place) -> tuple[float, float]:
    """CPU seconds of this process and its ended children, and of the server."""
    server = psutil.Process(place.server).cpu_times() if place.server else None
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in own), server.user + server.system if server else 0.0


def check(found: PlaceRead) -> None:
    """Raise `BenchmarkFailed` unless every contender gave right features, and every whole epoch each row once."""
    for kind, rates in (("reads", found.reads), ("epochs", found.epochs)):
        for name, one in rates.items():
            if not one.equal:
                raise BenchmarkFailed(f"{name} ({kind}) gave other features than were written")
            fewest, most = one.times
            if kind == "epochs" and (most > 1 or (one.done and fewest < 1)):
                raise BenchmarkFailed(f"{name}: an epoch gave rows {fewest} to {most} times, not once")


def _opening(place: Place, again: int = 5) -> Iterator[Opening]:
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
    for step, one in found.items():
        first_ms, *later_ms = [milliseconds for milliseconds, _ in one]
        yield Opening(step=step, first_ms=first_ms, ms=float(np.median(later_ms)), requests=one[-1][1])


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

    def counting(client: object, operation: str, *args: object) -> object:
        requests[operation] += 1
        return call(client, operation, *args)

    AioBaseClient._make_api_call = counting
    try:
        yield requests
    finally:
        AioBaseClient._make_api_call = call


def measure_read(config: ReadBenchmark, folder: Path) -> ReadResult:
    """All of it, in `folder`. Raises `BenchmarkFailed` if a contender gives wrong features, or an epoch not every row once."""
    _refuse_unfit(folder, config)
    npy = str(folder / "rows.npy")
    local = Place(name="local", url=str(folder / "feats.zarr"), npy=npy)
    big = Place(name=f"local, {config.big_rows:,} rows", url=str(folder / "big.zarr"), npy=npy)
    logger.info("writing %s rows", f"{config.rows:,}")
    write_npy(npy, (config.rows, *config.grid, config.channels))
    write_store(local, config.rows)
    if config.big_rows:
        logger.info("writing the index and the ledger of %s rows", f"{config.big_rows:,}")
        write_big_store(big, config.big_rows)
    with s3_place(config.s3, parse_options(config.storage_options), npy, config.s3_rows) as remote:
        places = {"local": _measure(local, config, [big] if config.big_rows else [])}
        if remote:
            places["S3"] = _measure(remote, config, [])
        return ReadResult(places=places, server=_describe(remote), ratios=tuple(ratios(places)))


def _measure(place: Place, config: ReadBenchmark, also: Sequence[Place]) -> PlaceRead:
    logger.info("%s: opening, epochs, random reads", place.name)
    [found], _ = in_new_processes(measure_place, (place, config, also))
    check(found)
    return found


def _describe(place: Place | None) -> str:
    """Which server it was, for a reader of the numbers."""
    if place is None:
        return "No S3."
    if place.server is None:
        options = json.dumps(public_options(place.options))
        return f"S3: {place.store().folder.displayed}, options {options}; on the same cores if it runs on this machine."
    version, memory = importlib.metadata.version("moto"), psutil.Process(place.server).memory_info().rss
    return (
        f"S3: moto {version}, {memory / 1e6:,.0f} MB of memory, on the same cores. For each range of an object it reads all of"
        "\n  it, so that single rows cost more than with other servers."
    )


def ratios(places: Mapping[str, PlaceRead]) -> Iterator[Ratio]:
    """Shuffled epochs by what they are held against: the faster reader of whole shards, and zarr-python row by row."""
    for name, place in places.items():
        rates = {contender: one.rows_per_s for contender, one in place.epochs.items()}
        bases = {"whole shards in order": max(rates[one] for one in IN_ORDER), BY_ROW: rates[BY_ROW]}
        for base, rate in bases.items():
            target = "5.0" if (name, base) == ("S3", BY_ROW) else "0.5" if base != BY_ROW else ""
            found = {one: value / rate for one, value in rates.items() if one.startswith(STREAM)}
            yield Ratio(ratio=f"{name}: shuffled / {base}", target=target, found=found)


def _refuse_unfit(folder: Path, config: ReadBenchmark) -> None:
    """Raise `ConfigError` for what isn't there: a package, or room on the disk."""
    if config.s3 == "moto" and not all(importlib.util.find_spec(name) for name in ("moto", "flask")):
        raise ConfigError("--s3 moto needs a package: pip install 'moto[server]'; or leave S3 out with --s3 none")
    row = 2 * config.grid[0] * config.grid[1] * config.channels
    need, free = row * (2 * config.rows + config.s3_rows) + 300 * config.big_rows, shutil.disk_usage(folder).free
    if need > free:
        text = f"{free / 1e9:.1f} GB free, this takes {need / 1e9:.1f} GB"
        raise ConfigError(f"{folder.parent} has {text}; give --out another folder, or ask for fewer --rows")


def read_report(config: ReadBenchmark, result: ReadResult, machine: Machine) -> Iterator[str]:
    """The numbers as Markdown, line by line."""
    places, ratios = result.places, result.ratios
    shape = f"{config.grid[0]} x {config.grid[1]} x {config.channels} float16"
    yield f"## read: rows of {shape}: " + ", ".join(f"{one.rows:,} {place}" for place, one in places.items())
    yield machine.usual_line()
    for place, one in places.items():
        yield from _rates(f"{place}: random rows", one.reads, {"of zarr by row": BY_ROW})
        yield from _rates(f"{place}: an epoch", one.epochs, {"of zarr by row": BY_ROW, "of in order": IN_ORDER[0]})
    columns = {"ratio": "", "target": "", **dict.fromkeys(ratios[0].found, ".2f")}
    yield from number_lines(columns, [[r.ratio, r.target, *r.found.values()] for r in ratios])
    steps = [step for one in places.values() for step in one.openings]
    columns = {"new objects and connections": "", "first, ms": ".1f", "again (median), ms": ".1f", "S3 requests": ""}
    yield from number_lines(columns, [[s.step, s.first_ms, s.ms, sum(s.requests.values())] for s in steps])
    yield f"""
- MB as decoded. CPU is the client's, with its workers. Epochs: the best of up to {config.repeat}.
- "stopped": not done after {config.seconds:g} s; its rate, also for an epoch, is that of the rows it had read by then.
- What every contender read was compared with what was written, and every whole epoch had each row once.
- Local reads come from the page cache. {result.server}"""


def _rates(title: str, contenders: Mapping[str, Rate], bases: Mapping[str, str]) -> Iterator[str]:
    is_served = any(one.server_cpu_s_per_1000 is not None for one in contenders.values())
    columns = {title: "", "rows/s": ",.0f", "MB/s": ",.0f", "CPU s / 1,000 rows": ",.2f"}
    columns |= {"server's": ",.2f"} if is_served else {}
    rows = []
    for name, one in contenders.items():
        served = [one.server_cpu_s_per_1000 or 0.0] if is_served else []
        ratios = [one.rows_per_s / contenders[base].rows_per_s for base in bases.values()]
        count = f"{one.rows:,}{'' if one.done else ' (stopped)'}"
        rows.append([name, one.rows_per_s, one.mb_per_s, one.cpu_s_per_1000, *served, count, *ratios])
    return number_lines({**columns, "rows read": "", **dict.fromkeys(bases, ".2f")}, rows)
