"""Stores made up through the real writer, to measure how they are read; and a simulator of S3 that serves them."""

import contextlib
import json
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa

from pipelines.costs.process import BenchmarkFailed
from storage.ledger import SCHEMA as LEDGER_SCHEMA
from storage.ledger import SampleRecord
from storage.paths import Folder, StorageOptions, filesystem
from storage.samples import PART_ROWS, part_name, table_bytes, write_index
from storage.sources import Source
from storage.spec import FeatureSpec, Layout, Level, ShardTask, choose_block_rows
from storage.store import FeatureStore
from storage.tars import SCHEMA as INDEX_SCHEMA

LEVEL = "x1"


@dataclass(frozen=True, kw_only=True)
class Place:
    """A store, and what it takes to measure how it is read."""

    name: str
    url: str
    npy: str
    "a local file of the same rows, and maybe more: the truth"
    options: StorageOptions = field(default_factory=dict)
    server: int | None = None
    "the process that serves it, where it is one of ours"

    def store(self) -> FeatureStore:
        return FeatureStore.open(self.url, self.options)

    def memmap(self) -> np.ndarray:
        return np.load(self.npy, mmap_mode="r")


_SPEC = """{"model": "made up", "weights": "", "weights_source": "random", "layers": [0], "facet": "token", "norm": true,
"stride": 16, "pos_embed": "timm", "geometry": "squash", "crop_pct": 1.0, "interpolation": "bicubic", "precision": "fp32",
"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "jpeg_draft": false}"""


def make_spec(grid: tuple[int, int], channels: int) -> FeatureSpec:
    """A dense level and a pooled vector."""
    dense = Level(name=LEVEL, method="backbone", grid=grid, channels=channels, start=(8.0, 8.0), step=(16.0, 16.0))
    levels = (dense, Level(name="pooled", method="mean", grid=None, channels=channels))
    shape = {"input_size": [16 * side for side in grid], "levels": [asdict(level) for level in levels]}
    return FeatureSpec.from_json(json.loads(_SPEC) | shape)


def write_npy(path: str, shape: tuple[int, int, int, int]) -> None:
    """Random normal float16 values of `shape` = (rows, grid rows, grid columns, channels), the same ones every time."""
    out, rng = np.lib.format.open_memmap(path, "w+", np.float16, shape), np.random.default_rng(0)
    for first in range(0, shape[0], 64):
        part = out[first : first + 64]
        part[...] = rng.standard_normal(part.shape, np.float32)
    out.flush()


def write_store(place: Place, rows: int) -> None:
    """The first rows of `place.npy`, as an extraction writes them; in blocks of a store of all its rows, wherever it is."""
    features = place.memmap()
    spec = make_spec(features.shape[1:3], features.shape[3])
    store = _create(place, spec, rows, choose_block_rows(len(features), spec))
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


def _rows_table(schema: pa.Schema, first: int, count: int, **constants: object) -> pa.Table:
    """Rows of an index or a ledger that differ in number and key; the other columns are constant, or null."""
    columns = {f.name: pa.repeat(pa.scalar(constants.get(f.name), f.type), count) for f in schema}
    keys = pa.array([key_of(row) for row in range(first, first + count)])
    return pa.table(columns | {"key": keys, "row": pa.array(range(first, first + count))}, schema=schema)


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
def s3_place(base: str, options: StorageOptions, npy: str, rows: int) -> Iterator[Place | None]:
    """A store of the first `rows` of `npy` below `base` on an S3 server, deleted at the end. `moto` starts a server; with
    `none` there is no store."""
    if base == "none":
        yield None
        return
    server = None
    with contextlib.ExitStack() as stack:
        if base == "moto":
            base, (options, server) = "s3://benchmark", stack.enter_context(moto_server())
        url = f"{base.rstrip('/')}/raylift-benchmark-{uuid.uuid4().hex[:8]}.zarr"
        own = options.get("s3")
        place = Place(name="S3", url=url, npy=npy, options=own if isinstance(own, Mapping) else options, server=server)
        Folder(url, place.options).exists("zarr.json")  # a server that can't be reached is a readable error here
        fs, path = filesystem(url, place.options)
        if not fs.exists(path.split("/")[0]):
            fs.mkdir(path.split("/")[0])
        stack.callback(lambda: fs.exists(path) and fs.rm(path, recursive=True))
        write_store(place, rows)
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
def moto_server() -> Iterator[tuple[StorageOptions, int]]:
    """A simulator of S3 in a process of its own: storage options and process id."""
    command, pipe = [sys.executable, "-c", _MOTO], subprocess.PIPE
    with subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
        try:
            port = process.stdout.readline().strip() if process.stdout else ""
            if not port:
                raise BenchmarkFailed("moto's server did not start; see what `python -m moto.server` says")
            options = {"endpoint_url": f"http://127.0.0.1:{port}", "key": "moto-access", "secret": "moto-secret"}
            yield options, process.pid
        finally:
            process.terminate()
