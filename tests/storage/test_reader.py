"""Reading a store: the numbers are zarr-python's, what is missing says why, and nothing damaged or stale is ever a number."""

import contextlib
import functools
import json
import multiprocessing
import os
import pickle
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import s3fs
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import storage.spec
from pipelines.executors import InlineExecutor
from pipelines.extraction.run import extract
from storage import metadata
from storage.ledger import SCHEMA as LEDGER_SCHEMA
from storage.ledger import Ledger, SampleRecord
from storage.paths import Folder, StorageError, UnknownName
from storage.samples import PART_ROWS, Source, part_name, table_bytes, write_index
from storage.spec import FeatureSpec, Layout, Level
from storage.store import FeatureStore, MissingRows, NotAStore
from storage.tars import SCHEMA as INDEX_SCHEMA
from storage.totals import Totals
from tests.conftest import jpeg, write_tar
from tests.stops import dying_at_task

ROWS, BLOCK = 21, 8
"""Of most stores here: two whole blocks and a tail of five rows."""

X1 = Level(name="x1", method="backbone", grid=(4, 6), channels=5, start=(8.0, 8.0), step=(16.0, 16.0))
X2 = Level(name="x2", method="bilinear", grid=(8, 12), channels=5, dtype="float32", start=(4.0, 4.0), step=(8.0, 8.0))
HALF = Level(name="x0.5", method="average", grid=(2, 3), channels=5, dtype="int8", start=(16.0, 16.0), step=(32.0, 32.0))
POOLED = Level(name="pooled", method="cls", grid=None, channels=5)
LEVELS = (X1, X2, HALF, POOLED)
NAMES = ["x1", "x2", "x0.5", "pooled"]
FAILED = [4, 13, 14, 20]


def spec_of(levels: Sequence[Level] = LEVELS, **changes: Any) -> FeatureSpec:
    settings = {
        "model": "by-hand",
        "weights": "0" * 64,
        "weights_source": "random",
        "layers": (11,),
        "facet": "token",
        "norm": True,
        "stride": 16,
        "pos_embed": "timm",
        "input_size": (64, 96),
        "geometry": "squash",
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "precision": "fp32",
        "jpeg_draft": False,
        "levels": tuple(levels),
    }
    return FeatureSpec(**{**settings, **changes})


def key(row: int) -> str:
    """Keys of stores made here; their order is not that of the rows."""
    return f"{row * 7919 % 1000003:07d}/image-{row}"


def features(level: Level, row: int) -> np.ndarray:
    return np.random.default_rng([row, *level.name.encode()]).normal(size=level.row_shape).astype(np.float32)


@functools.cache
def index_table(n_rows: int) -> pa.Table:
    rows = np.arange(n_rows)
    columns = {
        "key": [key(row) for row in range(n_rows)],
        "source": np.zeros(n_rows, np.int32),
        "member": pa.repeat("jpg", n_rows),
        "offset": rows * 1024,
        "size": np.full(n_rows, 900),
        "problem": pa.nulls(n_rows, pa.string()),
    }
    return pa.table(columns, schema=INDEX_SCHEMA)


SOURCE = Source(url="s3://photos/a.tar", size=10**6, etag="e", digest="d")


def record(row: int, *, failed: bool = False) -> SampleRecord:
    common = {"row": row, "key": key(row), "source": SOURCE.url, "member": "jpg", "offset": row * 1024, "size": 900}
    if failed:
        reason = {"stage": "decode", "error": "ImageRefused", "message": "not an image"}
        return SampleRecord(**common, status="failed", **reason)
    place = {"x_scale": 96 / 192, "x_offset": 0.0, "y_scale": 64 / 256, "y_offset": 0.0}
    return SampleRecord(**common, width=192, height=256, **place)


def write_block(
    store: FeatureStore, block: int, failed: Sequence[int] = (), values: Callable[..., np.ndarray] = features
) -> None:
    """Write and commit one task with `values(level, row)`, but for the rows in `failed`."""
    task = store.layout.task(block)
    writer = store.writer(task)
    for row in set(range(task.first, task.last)) - set(failed):
        for level in store.spec.levels:
            writer.put(level, row - task.first, values(level, row))
    objects = writer.write()
    writer.commit([record(row, failed=row in failed) for row in range(task.first, task.last)], objects)


def make_store(
    url: str,
    options: Mapping[str, Any] | None = None,
    *,
    n_rows: int = ROWS,
    block_rows: int = BLOCK,
    levels: Sequence[Level] = LEVELS,
    failed: Sequence[int] = (),
    blocks: Sequence[int] | None = None,
    values: Callable[..., np.ndarray] = features,
) -> FeatureStore:
    """A store made by hand, complete unless only some `blocks` are written; opened anew."""
    folder = Folder(url, options)
    index = write_index(folder, index_table(n_rows), [SOURCE])
    layout = Layout(n_rows=n_rows, block_rows=block_rows, index=index.digest)
    store = FeatureStore.create(url, spec_of(levels), layout, provenance={}, storage_options=options)
    for block in range(layout.n_blocks) if blocks is None else blocks:
        write_block(store, block, failed, values)
    if blocks is None:
        store.finalize()
    return FeatureStore.open(url, options)


def by_zarr(url: str | Path, level: str) -> np.ndarray:
    """A level as plain zarr-python has it; int8 times its scale."""
    group = zarr.open_group(url, mode="r")[level]
    values = group["features"][:]
    return values * group["scale"][:][:, None, None] if "scale" in group else values


@pytest.fixture(scope="module")
def bucket(s3_server) -> dict[str, Any]:
    """A bucket for all tests here: the start of its URL, and options."""
    options = {"key": "test-access", "secret": "test-secret-value", "endpoint_url": s3_server}
    name = f"reader-{uuid.uuid4().hex}"
    s3fs.S3FileSystem(**options).mkdir(name)
    return {"url": f"s3://{name}", "options": options}


@pytest.fixture(scope="module")
def stores(tmp_path_factory, bucket) -> Iterator[dict[str, FeatureStore]]:
    """The same complete stores in three places; in those named `failed ...`, some rows did."""
    name = uuid.uuid4().hex
    places = {
        "local": (str(tmp_path_factory.mktemp("reader")), None),
        "memory": (f"memory://{name}", None),
        "s3": (bucket["url"], bucket["options"]),
    }
    made = {where: make_store(f"{url}/a.zarr", options) for where, (url, options) in places.items()}
    for where, (url, options) in places.items():
        made[f"failed {where}"] = make_store(f"{url}/f.zarr", options, failed=FAILED)
    yield made
    fsspec.filesystem("memory").rm(f"/{name}", recursive=True)


@pytest.fixture(params=["local", "memory", "s3"])
def store(request, stores) -> FeatureStore:
    """Nothing failed; just opened."""
    return reopened(stores[request.param])


@pytest.fixture
def local(stores) -> FeatureStore:
    return reopened(stores["local"])


@pytest.fixture(scope="module")
def numbers(stores) -> dict[str, np.ndarray]:
    """Every level as zarr-python reads it."""
    return {level: by_zarr(stores["local"].folder.url, level) for level in NAMES}


@pytest.fixture
def own(tmp_path) -> FeatureStore:
    """A store for one test to damage."""
    return make_store(str(tmp_path / "own.zarr"))


def reopened(store: FeatureStore) -> FeatureStore:
    return FeatureStore.open(store.folder.url, store.folder.options)


def mask(*rows: int) -> np.ndarray:
    return np.isin(np.arange(ROWS), rows)


# --- numbers ----------------------------------------------------------------------------------------------------------


SELECTIONS = [
    (slice(None), list(range(21))),
    (slice(3, 18, 5), [3, 8, 13]),
    (slice(None, None, -4), [20, 16, 12, 8, 4, 0]),
    (slice(-2, None), [19, 20]),
    ([5, 20, 5, 0, 5], [5, 20, 5, 0, 5]),
    ([-1, -21, 3], [20, 0, 3]),
    (range(6, 10), [6, 7, 8, 9]),
    (np.array([7, 8], np.uint8), [7, 8]),
    (np.array([-3], np.int16), [18]),
    ([key(9), key(2), key(9)], [9, 2, 9]),
    (np.array([key(20)]), [20]),
    (mask(0, 7, 8, 16), [0, 7, 8, 16]),
    (mask(11).tolist(), [11]),
]


@pytest.mark.parametrize("level", NAMES)
def test_read_gives_the_numbers_of_zarr_python_for_any_selection(store, numbers, level):
    found = [store.read(selection, level) for selection, _ in SELECTIONS]

    for values, (_, rows) in zip(found, SELECTIONS, strict=True):
        np.testing.assert_array_equal(values, numbers[level][rows], strict=True)


@pytest.mark.parametrize(
    ("level", "dtype", "shape"),
    [
        ("x1", np.float16, (4, 6, 5)),
        ("x2", np.float32, (8, 12, 5)),
        ("x0.5", np.float32, (2, 3, 5)),
        ("pooled", np.float16, (5,)),
    ],
)
def test_one_row_has_no_row_axis_and_several_have(store, numbers, level, dtype, shape):
    for one in (16, -5, np.int64(16), np.uint8(16), key(16), np.str_(key(16))):
        values = store.read(one, level)

        assert (values.dtype, values.shape) == (dtype, shape)
        np.testing.assert_array_equal(values, numbers[level][16])
    assert store.read([16], level).shape == (1, *shape)
    assert store.read(slice(16, 17), level).shape == (1, *shape)


EMPTY = [[], (), slice(5, 5), slice(30, 40), np.zeros(0, np.int64), np.zeros(ROWS, bool)]


@pytest.mark.parametrize(
    ("level", "dtype", "shape"), [("x1", np.float16, (4, 6, 5)), ("x0.5", np.float32, (2, 3, 5)), ("pooled", "f2", (5,))]
)
def test_empty_selection_gives_no_rows(store, level, dtype, shape):
    for empty in EMPTY:
        values = store.read(empty, level)

        assert (values.dtype, values.shape) == (np.dtype(dtype), (0, *shape))


def test_empty_selection_has_no_records_and_is_valid_nowhere(stores):
    store = reopened(stores["failed local"])

    for empty in EMPTY:
        assert store.records(empty, ["row", "status"]).num_rows == 0
        assert store.valid(empty).shape == (0,)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.integers(-ROWS, ROWS - 1), max_size=60), level=st.sampled_from(NAMES))
def test_any_rows_in_any_order_are_those_of_zarr_python(stores, numbers, rows, level):
    np.testing.assert_array_equal(stores["local"].read(rows, level), numbers[level][np.array(rows, np.int64)])


@settings(max_examples=60, deadline=None)
@given(rows=st.slices(ROWS), level=st.sampled_from(NAMES))
def test_any_slice_is_that_of_zarr_python(stores, numbers, rows, level):
    np.testing.assert_array_equal(stores["local"].read(rows, level), numbers[level][rows])


def test_shards_smaller_than_a_block_read_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.spec, "MAX_SHARD_BYTES", 2 * X2.row_bytes)
    monkeypatch.setattr(metadata, "_level_documents", metadata._level_documents.__wrapped__)  # others' are of other shards
    store = make_store(str(tmp_path / "small.zarr"))

    assert [store.layout.shard_rows(level) for level in LEVELS[:2]] == [8, 2]
    np.testing.assert_array_equal(store.read([20, 3, 2, 9, 3], "x2"), by_zarr(store.folder.url, "x2")[[20, 3, 2, 9, 3]])


def test_more_bytes_than_a_window_read_the_same(local, numbers, monkeypatch):
    monkeypatch.setattr("storage.reader.WINDOW_BYTES", 3000)

    np.testing.assert_array_equal(local.read([20, 1, 9, 18, 2], "x2"), numbers["x2"][[20, 1, 9, 18, 2]])


def test_cache_that_holds_next_to_nothing_reads_the_same(local, numbers, monkeypatch):
    monkeypatch.setattr("storage.reader.CACHE_BYTES", 1)

    for level in NAMES:
        for rows in ([0, 9, 17], [17, 1, 8]):
            np.testing.assert_array_equal(local.read(rows, level), numbers[level][rows])


def test_what_is_read_belongs_to_the_caller(local, numbers):
    for level in NAMES:
        local.read([3], level)[:] = 99
        local.read(slice(None), level)[:] = 99

        np.testing.assert_array_equal(local.read(3, level), numbers[level][3])


# --- rows and keys ----------------------------------------------------------------------------------------------------


def test_row_numbers_of_every_kind_of_selection(local):
    found = [local.rows(selection) for selection, _ in SELECTIONS]

    for rows, (_, expected) in zip(found, SELECTIONS, strict=True):
        assert (rows.dtype, rows.tolist()) == (np.int64, expected)
    assert local.row(key(13)) == 13


def test_small_integer_types_reach_every_row_of_a_larger_store(tmp_path):
    store = make_store(str(tmp_path / "n.zarr"), n_rows=300, block_rows=64, levels=(POOLED,))

    assert store.rows(np.array([7, 255], np.uint8)).tolist() == [7, 255]
    assert store.rows(np.array([-1, 5, 127], np.int8)).tolist() == [299, 5, 127]


@pytest.mark.parametrize(("row", "named"), [(21, "row 21"), (-22, "row -22"), ([0, 5, 10**12], "row 1000000000000")])
def test_row_that_is_not_there_is_an_index_error(local, row, named):
    with pytest.raises(IndexError, match=f"a.zarr has 21 rows, there is no {named}$"):
        local.read(row, "x1")


@pytest.mark.parametrize("wrong", ["nobody", [key(3), "nobody", key(4)], "", "zzz"])
def test_key_that_is_not_there_is_a_key_error_that_names_it_and_the_store(local, wrong):
    name = wrong if isinstance(wrong, str) else "nobody"

    for ask in (local.rows, lambda k: local.read(k, "x1"), local.records, local.valid):
        with pytest.raises(KeyError, match=rf"a.zarr has no sample {name!r}; keys look like '\d{{7}}/image-\d+'"):
            ask(wrong)


@pytest.mark.parametrize("wrong", [1.5, [0.0, 1.0], None, [[0, 1]], np.ones(ROWS - 1, bool), [True, False], b"x", {}, [None]])
def test_selection_of_another_kind_is_a_type_error(local, wrong):
    with pytest.raises(TypeError, match="rows are a slice, row numbers, keys, or a mask of 21; got"):
        local.read(wrong, "x1")


def test_unknown_level_is_a_key_error_that_lists_the_levels(local):
    for ask in (lambda n: local.read(0, n), lambda n: local.sample(0, [(1, 1)], n), local.coords, local.level):
        with pytest.raises(KeyError, match=r"a.zarr has no level 'x4'; it has x1, x2, x0.5, pooled"):
            ask("x4")


def test_url_without_a_store_says_how_to_make_one(tmp_path):
    with pytest.raises(NotAStore, match=r"no feature store at .*nothing; make one with jobs/extract.py --out"):
        FeatureStore.open(str(tmp_path / "nothing"))


# --- what is missing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", NAMES)
@pytest.mark.parametrize("where", ["local", "memory", "s3"])
def test_failed_rows_raise_with_the_reason_or_are_nan(stores, where, level):
    store = reopened(stores[f"failed {where}"])

    with pytest.raises(MissingRows, match=rf"no features: row 13, '{key(13)}', which failed: decode: ImageRefused: not an"):
        store.read(13, level)
    with pytest.raises(MissingRows, match=r"2 of the rows have no features; the first is row 20, "):
        store.read([3, 20, 5, 4], level)
    values = store.read([3, 4, 20, 13, 12], level, missing="nan")
    everything = store.read(slice(None), level, missing="nan")

    assert np.isnan(values).reshape(5, -1).all(axis=1).tolist() == [False, True, True, True, False]
    np.testing.assert_array_equal(values, everything[[3, 4, 20, 13, 12]])
    assert np.flatnonzero(np.isnan(everything).reshape(ROWS, -1).all(axis=1)).tolist() == [4, 13, 14, 20]
    assert np.isnan(store.read(4, level, missing="nan")).all()


@pytest.mark.parametrize("level", NAMES)
def test_store_with_failed_rows_has_the_numbers_of_zarr_python(stores, level):
    store = reopened(stores["failed local"])

    for rows in (slice(None), [5, 4, 3, 20], [13]):
        found = store.read(rows, level, missing="nan")

        np.testing.assert_array_equal(found, by_zarr(store.folder.url, level)[rows])


@pytest.mark.parametrize("where", ["local", "memory", "s3"])
def test_valid_tells_the_rows_that_have_features(stores, where):
    store = reopened(stores[f"failed {where}"])

    assert store.valid([3, 4, 20, 13, 12]).tolist() == [True, False, False, False, True]
    assert store.valid(key(13)).tolist() == [False]
    assert np.flatnonzero(~store.valid()).tolist() == [4, 13, 14, 20]
    assert store.valid().dtype == bool


def test_valid_of_a_store_in_which_nothing_failed_takes_no_request(stores, api_calls):
    store = reopened(stores["s3"])
    api_calls.clear()

    assert store.valid([3, 4]).tolist() == [True, True]
    assert api_calls == []


def test_corrupt_photograph_raises_with_key_stage_and_reason(tmp_path, tiny):
    members = [(f"{n}.jpg", jpeg(n)[:700] if n == 2 else jpeg(n)) for n in range(5)]
    levels = ("x1", "x2@int8", "pooled")
    config = tiny(str(write_tar(tmp_path / "in/a.tar", members)), levels=levels, max_failed_fraction=1.0)
    extract(config, InlineExecutor())
    store = FeatureStore.open(config.out)

    for level in ("x1", "x2", "pooled"):
        with pytest.raises(MissingRows, match=r"row 2, '2', which failed: decode: OSError: image file is truncated"):
            store.read("2", level)
        assert np.isnan(store.read(slice(None), level, missing="nan")[2]).all()
    with pytest.raises(MissingRows, match="'2', which failed: decode"):
        store.sample("2", [(1, 1)], "x1")
    with pytest.raises(MissingRows, match="'2', which failed: decode"):
        store.coords("x1", "2")
    assert store.valid().tolist() == [True, True, False, True, True]


@pytest.fixture(params=["writing", "complete"])
def labelled(request, tiny, tmp_path) -> FeatureStore:
    """Nine images with their class carried along, the second unreadable; while it is written, the last task is missing."""
    members = [
        (f"{n}.{kind}", data)
        for n in range(9)
        for kind, data in (("jpg", b"junk" if n == 1 else jpeg(n)), ("cls", f"class {n}".encode()))
    ]
    data = str(write_tar(tmp_path / "labelled.tar", members))
    config = tiny(data, levels=("pooled",), carry=("cls",), max_failed_fraction=0.5)
    with dying_at_task(2) if request.param == "writing" else contextlib.nullcontext():
        extract(config, InlineExecutor())
    store = FeatureStore.open(config.out)
    assert store.status == request.param
    return store


def test_a_column_asked_for_by_name_is_given(labelled):
    row_2 = {"cls": "class 2", "status": "ok", "row": 2, "width": 96}
    records = labelled.records(["8", "2", "8"], list(row_2))

    assert records.column_names == list(row_2)
    assert records.to_pylist()[1] == row_2
    last = {"status": "ok", "width": 96} if labelled.status == "complete" else {"status": None, "width": None}
    assert records.to_pylist()[0] == records.to_pylist()[2] == {"cls": "class 8", "row": 8, **last}
    assert labelled.records([2, 0], ["cls"]).to_pydict() == {"cls": ["class 2", "class 0"]}
    assert labelled.records([]).column_names == labelled.records([0]).column_names == LEDGER_SCHEMA.names
    assert labelled.failures(["cls", "key", "stage"]).to_pylist() == [{"cls": "class 1", "key": "1", "stage": "decode"}]
    assert labelled.failures().to_pylist() == labelled.records([1]).to_pylist()


def test_a_column_that_there_isnt_is_an_error_that_names_those_there_are(labelled):
    for ask in (lambda names: labelled.records([0], names), labelled.failures):
        with pytest.raises(UnknownName, match=r"out\.zarr has no column 'label'; it has row, key, .*, cls$"):
            ask(["cls", "label", "status"])


def test_open_reader_of_a_growing_store_sees_rows_as_they_are_written(make_tars, tiny):
    config = tiny(make_tars(), levels=("x1", "x2@int8", "pooled"))
    with dying_at_task(3):
        extract(config, InlineExecutor())
    store = FeatureStore.open(config.out)

    assert store.status == "writing"
    for level in ("x1", "x2", "pooled"):
        assert np.isfinite(store.read(slice(0, 12), level)).all()
        assert np.isnan(store.read([11, 12], level, missing="nan")[1]).all()
        with pytest.raises(MissingRows, match="1 of the rows|no features: row 12, which is not written yet"):
            store.read([12], level)
        with pytest.raises(MissingRows, match="which is not written yet"):
            store.read("00019", level)
    with pytest.raises(MissingRows, match="row 12, which is not written yet"):
        store.sample("00012", [(1, 1)], "x1")
    assert store.valid([0, 19, 11, 12]).tolist() == [True, False, True, False]
    assert store.records([12, 11], ["row", "key"]).to_pylist() == [{"row": 12, "key": None}, {"row": 11, "key": "00011"}]

    extract(config, InlineExecutor())

    for level in ("x1", "x2", "pooled"):
        np.testing.assert_array_equal(store.read(slice(None), level), FeatureStore.open(config.out).read(slice(None), level))
        assert np.isfinite(store.read("00012", level)).all()
    assert store.valid().all()
    assert store.sample("00012", [(1, 1)], "x1").shape == (1, 64)


@pytest.mark.parametrize(
    ("level", "name"),
    [
        ("x1", "x1/features/c/1/0/0/0"),
        ("x0.5", "x0.5/features/c/1/0/0/0"),
        ("x0.5", "x0.5/scale/c/1/0"),
        ("pooled", "pooled/features/c/1/0"),
    ],
)
def test_lost_shard_of_a_complete_store_is_said_to_be_missing(own, level, name):
    (Path(own.folder.url) / name).unlink()

    for rows in (9, [9, 10], slice(8, 16), slice(None)):
        with pytest.raises(MissingRows, match=r"the ledger says ok: shards are missing; delete the task.s record"):
            own.read(rows, level)
    assert np.isnan(own.read(slice(8, 16), level, missing="nan")).all()
    assert np.isfinite(own.read([7, 16], level)).all()


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def damage() -> Iterator[Callable[..., FeatureStore]]:
    """Change an object of a store until the test's end; returns the store, just opened."""
    before = []

    def change(store: FeatureStore, name: str, how: Callable[[bytes], bytes]) -> FeatureStore:
        before.append((store.folder, name, store.folder.read(name)))
        store.folder.write(name, how(before[-1][2]))
        return reopened(store)

    yield change
    for folder, name, data in before:
        folder.write(name, data)


def flipped(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]


DAMAGES = {
    "a bit of the index": lambda data: flipped(len(data) - 16 * BLOCK)(data),
    "a bit of the last chunk": lambda data: flipped(len(data) - 16 * BLOCK - 4 - 9)(data),
    "half of it lost": lambda data: data[: len(data) // 2],
    "all but the index lost": lambda data: data[-16 * BLOCK - 4 :],
    "half of the index lost": lambda data: data[:50],
    "all bytes lost": lambda _: b"",
}


@pytest.mark.parametrize("where", ["local", "memory", "s3"])
@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_shard_is_an_error_that_names_it(stores, damage, where, what):
    store = damage(stores[where], "x2/features/c/1/0/0/0", DAMAGES[what])

    for rows in (15, [8, 15], slice(8, 16), slice(None)):
        with pytest.raises(StorageError, match=r"a\.zarr/x2/features/c/1/0/0/0 is damaged"):
            store.read(rows, "x2")
        with pytest.raises(StorageError, match=r"a\.zarr/x2/features/c/1/0/0/0 is damaged"):
            store.read(rows, "x2", missing="nan")
    assert np.isfinite(store.read([0, 20], "x2")).all()


@pytest.mark.parametrize("where", ["local", "memory", "s3"])
@pytest.mark.parametrize("name", ["pooled/features/c/1/0", "x0.5/scale/c/1/0"])
@pytest.mark.parametrize("change", [lambda d: flipped(len(d) - 6)(d), lambda d: d[:-7], lambda _: b""])
def test_damaged_chunk_of_vectors_is_an_error_that_names_it(stores, damage, where, name, change):
    store = damage(stores[where], name, change)

    with pytest.raises(StorageError, match=rf"a\.zarr/{name} is damaged"):
        store.read([9, 1], name.split("/")[0])


@pytest.mark.parametrize("level", ["x1", "x2", "x0.5", "pooled"])
def test_no_flipped_bit_of_a_shard_becomes_a_number(tmp_path, level):
    store = make_store(str(tmp_path / "b.zarr"), n_rows=4, block_rows=4)
    name = f"{level}/features/c/0/0" + ("" if level == "pooled" else "/0/0")
    whole, expected = store.folder.read(name), store.read(slice(None), level)
    wrong = []
    for bit in range(0, len(whole) * 8, len(whole) // 12):
        at = bit // 8
        (Path(store.folder.url) / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit % 8]) + whole[at + 1 :])
        for rows in ([0], [3], slice(None)):
            try:
                wrong += [bit] * (not np.array_equal(reopened(store).read(rows, level), expected[rows]))
            except StorageError:
                continue

    assert wrong == []


def read_again(store: FeatureStore, row: int, level: str) -> np.ndarray:
    """A row, read a second time where the first ends in an error."""
    try:
        return store.read(row, level)
    except StorageError:
        return store.read(row, level)


@pytest.mark.parametrize("level", NAMES)
def test_shard_rewritten_behind_a_cached_index_gives_its_new_numbers_or_an_error_first(tmp_path, level):
    """--retry-failed on another device: a row more, and every number and size is another."""
    store = make_store(str(tmp_path / "r.zarr"), failed=[13])
    store.read([9], level)
    store.ledger.revoke([1])
    write_block(store, 1, values=lambda level, row: features(level, row + 1000) * (row % 3 > 0))

    found = [read_again(store, row, level) for row in range(8, 16)]

    np.testing.assert_array_equal(np.stack(found), by_zarr(store.folder.url, level)[8:16])


@pytest.mark.parametrize("level", NAMES)
def test_row_that_a_retry_filled_never_stands_in_for_its_neighbour(tmp_path, level):
    """Noise compresses to chunks of one size, so that each row of the new shard lies exactly where its neighbour lay."""
    store = make_store(str(tmp_path / "retried.zarr"), failed=[8])
    expected = np.stack([store.read(row, level) for row in range(9, 16)])
    store.ledger.revoke([1])
    write_block(store, 1)

    found = [read_again(store, row, level) for row in range(9, 16)]

    np.testing.assert_array_equal(np.stack(found), expected)
    assert np.isfinite(store.read(8, level)).all()


@pytest.mark.parametrize("level", ["x1", "x2"])
def test_shard_without_holes_that_lost_its_end_behind_a_cached_index_is_an_error(own, level):
    own.read([9], level)
    shard = Path(own.folder.url) / f"{level}/features/c/1/0/0/0"
    shard.write_bytes(shard.read_bytes()[: -16 * BLOCK - 4 - 1])

    with pytest.raises(StorageError, match="is damaged"):
        own.read(15, level)


# --- threads and processes --------------------------------------------------------------------------------------------


def test_threads_read_one_store_at_once(store, numbers):
    def read_some(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        level, rows = NAMES[seed % 4], rng.integers(0, ROWS, 1 + seed % 7)
        return np.array_equal(store.read(rows, level), numbers[level][rows])

    with ThreadPoolExecutor(8) as pool:
        same = list(pool.map(read_some, range(80)))

    assert same == [True] * 80


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> FeatureStore:
    """40,000 rows, of which nothing is written but index and ledger: several Parquet row groups."""
    url = str(tmp_path_factory.mktemp("many") / "m.zarr")
    return completed(make_store(url, n_rows=40_000, block_rows=2**15, levels=(POOLED,), blocks=[]))


ASK = {
    "keys": lambda store, rows: store.rows([key(row) for row in rows]).tolist() == rows.tolist(),
    "records": lambda store, rows: store.records(rows, ["row"])["row"].to_pylist() == rows.tolist(),
    "pixels": lambda store, rows: [store.pixels(key(row)).width for row in rows] == [192] * 4,
}
"""Whether the index and the ledger say of some rows what they should."""


@pytest.mark.parametrize("ask", ASK)
def test_threads_ask_one_store_for_keys_and_records_at_once(many, ask):
    store = reopened(many)
    rows = np.random.default_rng(0).integers(0, 40_000, (60, 4))

    with ThreadPoolExecutor(8) as pool:
        right = list(pool.map(lambda some: ASK[ask](store, some), rows))

    assert right == [True] * 60


@pytest.mark.parametrize("ask", ASK)
def test_children_ask_for_keys_and_records_while_their_parent_does(many, ask):
    """A file that was opened before a fork has one position for all of them."""
    store = reopened(many)
    rows = np.random.default_rng(0).integers(0, 40_000, (60, 4))
    assert ASK[ask](store, rows[0])
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=exit_if_wrong, args=(store, ask, rows), daemon=True) for _ in range(2)]
    for child in children:
        child.start()

    here = [ASK[ask](store, some) for some in rows]
    for child in children:
        child.join(60)

    assert here == [True] * 60
    assert [child.exitcode for child in children] == [0, 0]


def exit_if_wrong(store: FeatureStore, ask: str, rows: np.ndarray) -> None:
    os._exit(0 if all(ASK[ask](store, some) for some in rows) else 1)


def completed(store: FeatureStore) -> FeatureStore:
    """The store marked complete, with a merged ledger that was written directly."""
    n = len(store)
    columns = {name: pa.nulls(n, LEDGER_SCHEMA.field(name).type) for name in ("stage", "error", "message", "conversion")}
    columns |= {"row": np.arange(n), "key": index_table(n)["key"], "source": pa.repeat(SOURCE.url, n)}
    first = record(0)
    for field in LEDGER_SCHEMA:
        if field.name not in columns:
            columns[field.name] = pa.repeat(pa.scalar(getattr(first, field.name), field.type), n)
    table = pa.table(columns, schema=LEDGER_SCHEMA)
    for part, start in enumerate(range(0, n, PART_ROWS)):
        store.folder.write(part_name("ledger/samples", part), table_bytes(table.slice(start, PART_ROWS)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureStore, "pending", lambda _: [])
        patch.setattr(Ledger, "merge", lambda *_: Totals(counts={"ok": n}))
        store.finalize()
    return reopened(store)


def test_store_pickles_to_its_url_and_reads_on(store, numbers):
    store.read(3, "x1")
    store.row(key(5))

    again = pickle.loads(pickle.dumps(store))

    assert len(pickle.dumps(store)) < 10_000
    assert (again.spec, again.layout, len(again), again.status) == (store.spec, store.layout, 21, "complete")
    np.testing.assert_array_equal(again.read(key(3), "x1"), numbers["x1"][3])


def read_everything(store: FeatureStore) -> list[bytes]:
    """By number, by key, and at a point: index, ledger and features."""
    values = [store.read(slice(None), level) for level in NAMES]
    values += [store.read(key(17), "x2"), store.sample(key(3), [(50, 60)], "x1"), store.rows([key(20), key(1)])]
    return [value.tobytes() for value in values]


@pytest.mark.parametrize("where", ["local", "s3"])
def test_forked_child_reads_what_its_parent_reads(stores, where):
    store = reopened(stores[where])
    expected = read_everything(store)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=lambda: there.send(read_everything(store)), daemon=True)

    child.start()
    received = here.recv() if here.poll(30) else "nothing within 30 s"
    child.kill()

    assert received == expected


@pytest.mark.parametrize("where", ["local", "s3"])
def test_spawned_process_reads_what_this_one_reads(stores, numbers, where):
    store = reopened(stores[where])
    store.read(key(3), "x0.5")

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        values = pool.submit(store.read, [key(17), key(2)], "x0.5").result(timeout=60)

    np.testing.assert_array_equal(values, numbers["x0.5"][[17, 2]])


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(bucket) -> tuple[str, dict[str, Any]]:
    """A store of four shards of 64 rows on S3: its URL and options."""
    url = f"{bucket['url']}/wide.zarr"
    make_store(url, bucket["options"], n_rows=256, block_rows=64, levels=(X1, POOLED))
    return url, bucket["options"]


def test_opening_is_one_request(wide, api_calls):
    FeatureStore.open(*wide)

    assert [call.split()[0] for call in api_calls] == ["GetObject"]


def test_one_row_by_key_from_a_cold_start_takes_at_most_eight_requests(wide, api_calls):
    values = FeatureStore.open(*wide).read(key(201), "x1")

    np.testing.assert_array_equal(values, features(X1, 201).astype(np.float16))
    assert len(api_calls) <= 8, api_calls


def test_next_row_of_a_shard_is_one_request(wide, api_calls):
    store = FeatureStore.open(*wide)
    store.read([3], "x1")
    api_calls.clear()

    store.read([40], "x1")

    assert len(api_calls) == 1
    assert api_calls[0].startswith("GetObject wide.zarr/x1/features/c/0/0/0/0 bytes=")


@pytest.mark.parametrize(("level", "name"), [("x1", "x1/features/c/1/0/0/0"), ("pooled", "pooled/features/c/1/0")])
def test_whole_block_is_one_request_for_each_shard(wide, api_calls, level, name):
    store = FeatureStore.open(*wide)
    api_calls.clear()

    store.read(slice(64, 128), level)

    assert [call.rsplit(" ", 1)[0] for call in api_calls] == [f"GetObject wide.zarr/{name}"]


def test_scattered_rows_are_an_index_for_each_shard_and_at_most_a_request_for_each_row(wide, api_calls):
    store = FeatureStore.open(*wide)
    rows = np.random.default_rng(0).permutation(256)[:32]
    api_calls.clear()

    values = store.read(rows, "x1")

    np.testing.assert_array_equal(values[0], features(X1, int(rows[0])).astype(np.float16))
    assert len([call for call in api_calls if call.endswith("bytes=-1028")]) == 4
    assert len(api_calls) <= 4 + 32
    assert {call.split()[0] for call in api_calls} == {"GetObject"}


def test_rows_far_apart_are_a_request_each_and_a_repeated_row_is_one(wide, api_calls, monkeypatch):
    monkeypatch.setattr("storage.reader.merge_ranges", lambda ranges: [(i, i) for i in range(len(ranges))])
    store = FeatureStore.open(*wide)
    store.read([5, 70], "x1")
    api_calls.clear()

    values = store.read([9, 66, 9, 9, 30, 66], "x1")

    assert len(api_calls) == 3
    np.testing.assert_array_equal(values[[0, 2, 3]], np.stack([features(X1, 9).astype(np.float16)] * 3))


# --- many rows --------------------------------------------------------------------------------------------------------


TINY = Level(name="x1", method="backbone", grid=(2, 2), channels=4, start=(16.0, 24.0), step=(32.0, 48.0))


def test_one_row_of_a_million_by_key_takes_few_requests_and_few_bytes(bucket, api_calls):
    n, url, options = 10**6, f"{bucket['url']}/million.zarr", bucket["options"]
    blocks = [0, 2077, n // 256]
    completed(make_store(url, options, n_rows=n, block_rows=256, levels=(TINY,), blocks=blocks))
    api_calls.clear()

    store = FeatureStore.open(url, options)
    values = store.read(key(531_900), "x1")
    by_key = len(api_calls)
    point = store.sample(key(999_999), [(96, 128)], "x1")

    assert (len(store), store.status) == (1_000_000, "complete")
    np.testing.assert_array_equal(values, features(TINY, 531_900).astype(np.float16))
    centre = features(TINY, 999_999).astype(np.float16).astype(np.float32).mean(axis=(0, 1))
    np.testing.assert_allclose(point, [centre], rtol=1e-5)
    assert by_key <= 8, api_calls
    assert len(api_calls) <= 20, api_calls
    assert api_calls.bytes < 2 * 2**20


@pytest.mark.parametrize(("version", "advice"), [(1, "extract it again"), (99, "update Raylift")])
def test_store_of_another_format_is_refused_with_advice(own, version, advice):
    root = Path(own.folder.url) / "zarr.json"
    document = json.loads(root.read_text())
    document["attributes"]["raylift"]["format"] = version
    root.write_text(json.dumps(document))

    with pytest.raises(StorageError, match=f"has format {version}, this version reads 2, 3, 4 and 5; {advice}"):
        FeatureStore.open(own.folder.url)


def test_notebook_shows_what_a_store_holds_and_no_markup_of_names(tmp_path):
    url = str(tmp_path / "<b>a&b.zarr")
    failed = make_store(url, n_rows=21, failed=[4, 9])
    shown = FeatureStore.open(url)._repr_html_()
    unfinished = make_store(str(tmp_path / "half.zarr"), blocks=[0])._repr_html_()

    parsed = ElementTree.fromstring(shown.replace("<br>", "<br/>"))
    facts, levels = ([[cell.text for cell in row] for row in table] for table in parsed.iter("table"))
    assert parsed.find("code").text == url
    assert ["status", "complete"] in facts
    assert ["rows", "21, 2 failed, 19 ok"] in facts
    assert levels[1][:5] == ["x1", "backbone", "4 x 6", "5", "float16"]
    assert [row[0] for row in levels[1:]] == list(failed.levels)
    assert "still being written" in unfinished
