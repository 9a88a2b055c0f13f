"""Bytes of shards, their layout, and what other tools read in a written store."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import xarray
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec
from zarr.storage import MemoryStore

from pipelines.executors import InlineExecutor
from pipelines.extraction.run import extract
from storage.paths import StorageError
from storage.shards import IndexLocation, compress, encode_row, encode_shard
from storage.spec import FeatureSpec, Layout, Level, choose_block_rows, fingerprint
from storage.store import FeatureStore
from tests.conftest import jpeg, write_tar

RNG = np.random.default_rng(5)
ZSTD = ZstdCodec(level=1, checksum=True)


def array(
    store: MemoryStore,
    shape: tuple[int, ...],
    rows: int,
    dtype: str,
    location: IndexLocation = "end",
    last: BytesBytesCodec = ZSTD,
    **options: object,
) -> zarr.Array:
    """A Zarr array as the store's design says: a chunk a row, `rows` a shard, zstd 1 with checksum unless `last` is another."""
    inner = (1, *shape[1:])
    codecs = [BytesCodec(endian="little"), last]
    return zarr.create_array(
        store,
        shape=shape,
        chunks=(rows, *shape[1:]),
        dtype=dtype,
        fill_value=0 if dtype == "int8" else np.nan,
        serializer=ShardingCodec(chunk_shape=inner, codecs=codecs, index_location=location),
        compressors=None,
        filters=None,
        **options,
    )


def features(dtype: str, rows: int = 8) -> np.ndarray:
    values = RNG.normal(size=(rows, 5, 3, 7)) * 20
    return values.astype(dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("location", ["start", "end"])
@pytest.mark.parametrize(("compression", "codec"), [("zstd", ZSTD), ("none", Crc32cCodec())])
def test_shard_has_the_bytes_that_zarr_writes(dtype, rows, location, compression, codec):
    values, store = features(dtype, rows), MemoryStore()
    array(store, values.shape, rows, dtype, location, codec)[:] = values

    shard = encode_shard([compress(row[None], compression) for row in values], location)

    assert shard == store._store_dict["c/0/0/0/0"].to_bytes()


@pytest.mark.parametrize("location", ["start", "end"])
def test_shard_with_missing_rows_has_the_bytes_that_zarr_writes(location):
    values, store = features("float16"), MemoryStore()
    values[[0, 3, 7]] = np.nan
    array(store, values.shape, 8, "float16", location, config={"write_empty_chunks": False})[:] = values

    shard = encode_shard([None if np.isnan(row).all() else compress(row[None]) for row in values], location)

    assert shard == store._store_dict["c/0/0/0/0"].to_bytes()


def test_missing_rows_read_as_nan():
    values, store = features("float16"), MemoryStore()
    target = array(store, values.shape, 8, "float16")

    put(store, encode_shard([None if i in (2, 5) else compress(row) for i, row in enumerate(values)]))

    values[[2, 5]] = np.nan
    np.testing.assert_array_equal(target[:], values)


def test_shard_of_missing_rows_only_reads_as_nan():
    store = MemoryStore()
    target = array(store, (8, 5, 3, 7), 8, "float16")

    put(store, encode_shard([None] * 8))

    assert np.isnan(target[:]).all()


def test_rows_past_the_end_of_the_array_are_not_there():
    values, store = features("float16"), MemoryStore()
    target = array(store, (13, 5, 3, 7), 8, "float16")

    put(store, encode_shard([compress(row) for row in values]))
    put(store, encode_shard([compress(row) for row in values[:5]] + [None] * 3), "c/1/0/0/0")

    np.testing.assert_array_equal(target[:], np.concatenate([values, values[:5]]))
    np.testing.assert_array_equal(target[12], values[4])


def put(store: MemoryStore, data: bytes, name: str = "c/0/0/0/0") -> None:
    store._store_dict[name] = zarr.core.buffer.cpu.Buffer.from_bytes(data)


def test_no_flipped_bit_changes_a_number_unnoticed():
    values, store = RNG.normal(size=(2, 2, 2, 4)).astype(np.float16), MemoryStore()
    target = array(store, values.shape, 2, "float16")
    shard = encode_shard([compress(row) for row in values])
    wrong, noticed = [], 0
    for bit in range(len(shard) * 8):
        flipped = bytearray(shard)
        flipped[bit // 8] ^= 1 << bit % 8
        put(store, bytes(flipped))
        try:
            if not np.array_equal(target[:], values):
                wrong.append(bit)
        except (ValueError, RuntimeError, OSError):
            noticed += 1

    assert wrong == []
    # The rest is zstd's unused header bits, which change nothing.
    assert noticed >= 0.99 * len(shard) * 8


# --- encodings ------------------------------------------------------------------------------------------------------------


def test_float16_rounds_and_clamps_and_counts_what_it_clamped():
    values = np.array([[1.0, 65504.0, 65505.0, -1e6], [np.inf, -np.inf, 0.1, 65519.0]], np.float32)

    stored, scale, clipped = encode_row(values, "float16")

    assert stored.dtype == np.float16
    np.testing.assert_array_equal(
        stored.astype(np.float64), [[1, 65504, 65504, -65504], [65504, -65504, float(np.float16(0.1)), 65504]]
    )
    assert (scale, clipped) == (None, 5)


def test_float16_from_the_device_counts_what_overflowed_there():
    stored, _, clipped = encode_row(np.array([1, np.inf, -np.inf], np.float16), "float16")

    assert stored.tolist() == [1, 65504, -65504]
    assert clipped == 2


def test_float32_is_stored_as_it_is():
    values = np.array([[1e30, -1e-30, 65505.0]], np.float32)

    stored, scale, clipped = encode_row(values, "float32")

    np.testing.assert_array_equal(stored, values)
    assert (stored.dtype, scale, clipped) == (np.float32, None, 0)


@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e6))
def test_int8_is_off_by_at_most_half_a_step_of_its_channel(seed, size):
    values = (np.random.default_rng(seed).normal(size=(6, 5, 4)) * size * [1, 10, 0.01, 100]).astype(np.float32)

    stored, scale, _ = encode_row(values, "int8")

    assert (stored.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (4,))
    assert np.abs(stored).max() == 127
    error = np.abs(stored.astype(np.float64) * scale - values)
    assert (error <= 0.5001 * scale).all()


def test_int8_keeps_a_channel_of_zeros():
    stored, scale, _ = encode_row(np.array([[0.0, 2.0], [0.0, -1.0]]), "int8")

    assert stored.tolist() == [[0, 127], [0, -64]]
    assert scale.tolist() == [0, pytest.approx(2 / 127)]


# --- layout -----------------------------------------------------------------------------------------------------------------

LEVELS = (
    Level(name="x1", method="backbone", grid=(14, 14), channels=384, start=(8, 8), step=(16, 16)),
    Level(name="x16", method="bilinear", grid=(224, 224), channels=384, start=(0.5, 0.5), step=(1, 1)),
    Level(name="8x9", method="average", grid=(8, 9), channels=3, dtype="int8", start=(8, 8), step=(16, 16)),
    Level(name="huge", method="bicubic", grid=(512, 512), channels=1024, dtype="float32", start=(1, 1), step=(1, 1)),
    Level(name="pooled", method="cls", grid=None, channels=384),
)
SPEC = FeatureSpec(
    model="vit_small_patch16_224.dino",
    weights="0" * 64,
    weights_source="pretrained",
    layers=(11,),
    facet="token",
    norm=True,
    stride=16,
    pos_embed="timm",
    input_size=(224, 224),
    geometry="crop",
    crop_pct=1.0,
    interpolation="bicubic",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    precision="bf16",
    jpeg_draft=False,
    levels=LEVELS,
)
LAYOUT = Layout(n_rows=1000, block_rows=16, index="1" * 64)


@given(st.integers(1, 5000), st.integers(0, 8).map(lambda n: 2**n), st.sampled_from(LEVELS))
def test_every_row_is_in_one_task_and_every_shard_in_one_block(n_rows, block_rows, level):
    layout = Layout(n_rows=n_rows, block_rows=block_rows, index="")

    tasks = layout.tasks()
    rows = [row for task in tasks for row in range(task.first, task.last)]
    shard_rows = layout.shard_rows(level)
    shards = [range(first, min(first + shard_rows, n_rows)) for first in range(0, n_rows, shard_rows)]

    assert rows == list(range(n_rows))
    assert [task.block for task in tasks] == list(range(layout.n_blocks))
    assert all(shard[0] // block_rows == shard[-1] // block_rows for shard in shards)
    assert shard_rows * level.row_bytes <= 96 * 2**20 or shard_rows == 1


def test_shards_are_as_large_as_they_may_be():
    layout = Layout(n_rows=10_000, block_rows=256, index="")

    assert [layout.shard_rows(level) for level in LEVELS[:4]] == [256, 2, 256, 1]


@pytest.mark.parametrize(
    ("n_rows", "levels", "expected"),
    [
        (1, LEVELS[:1], 16),
        (1024, LEVELS[:1], 16),
        (2048, LEVELS[:1], 32),
        (16_383, LEVELS[:1], 128),
        (16_384, LEVELS[:1], 256),
        (2**25, LEVELS[:1], 256),
        (10**8, LEVELS[:1], 1024),
        (10**9, LEVELS[:1], 1024),
        (10**9, LEVELS[:2], 4),
        (10**9, LEVELS, 1),
    ],
)
@pytest.mark.parametrize("cpus", [1, 512])
def test_rows_of_a_task_follow_from_the_data_on_any_machine(n_rows, levels, expected, cpus, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))

    assert choose_block_rows(n_rows, replace(SPEC, levels=levels)) == expected


OTHER_SPEC = {
    "compiled": True,
    "model_args": {"init_values": 1e-5},
    "model": "vit_small_patch16_224.augreg_in1k",
    "weights": "2" * 64,
    "weights_source": "file",
    "layers": (10,),
    "facet": "key",
    "norm": False,
    "stride": 8,
    "pos_embed": "dino",
    "input_size": (224, 240),
    "geometry": "pad",
    "crop_pct": 0.9,
    "interpolation": "bilinear",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "precision": "fp32",
    "jpeg_draft": True,
    "jpeg_decoder": "nvjpeg",
    "levels": LEVELS[:2],
}
OTHER_LEVEL = {
    "scale": "x1",
    "made_from": "x1@float16",
    "name": "x2",
    "method": "bicubic",
    "grid": (14, 15),
    "channels": 768,
    "dtype": "float32",
    "start": (4.0, 8.0),
    "step": (8.0, 16.0),
    "digest": "3" * 64,
    "compression": "none",
}
OTHER_LAYOUT = {"n_rows": 1001, "block_rows": 32, "index": "4" * 64}


def test_fingerprint_changes_with_every_field():
    changed = [replace(SPEC, **{name: value}) for name, value in OTHER_SPEC.items()]
    own = {"scale": {"name": "sharp"}}  # a level is called by its scale, or has a name of its own
    others = [replace(LEVELS[0], **{k: v, **own.get(k, {})}) for k, v in OTHER_LEVEL.items()]
    changed += [replace(SPEC, levels=(other, *LEVELS[1:])) for other in others]
    layouts = [replace(LAYOUT, **{name: value}) for name, value in OTHER_LAYOUT.items()]

    prints = {fingerprint(SPEC, LAYOUT)}
    prints |= {fingerprint(spec, LAYOUT) for spec in changed} | {fingerprint(SPEC, layout) for layout in layouts}

    assert len(prints) == 1 + len(OTHER_SPEC) + len(OTHER_LEVEL) + len(OTHER_LAYOUT)
    assert set(OTHER_SPEC) == {f.name for f in fields(FeatureSpec)}
    assert set(OTHER_LEVEL) == {f.name for f in fields(Level)}
    assert set(OTHER_LAYOUT) == {f.name for f in fields(Layout)}


def test_spec_survives_json():
    assert FeatureSpec.from_json(SPEC.to_json()) == SPEC
    assert fingerprint(FeatureSpec.from_json(SPEC.to_json()), LAYOUT) == fingerprint(SPEC, LAYOUT)


# --- a written store, read by others ------------------------------------------------------------------------------------------


WRITTEN = ("x1", "x2@float32", "x0.5@int8", "5x3=bicubic", "pooled")


@pytest.fixture
def seven(tmp_path, tiny) -> Callable[..., Path]:
    """Writes stores of seven images, the fourth unreadable; shards of four rows, so that the last one is clipped."""
    members = [(f"{n}.jpg", b"junk" if n == 3 else jpeg(n)) for n in range(7)]
    data = str(write_tar(tmp_path / "in/a.tar", members))

    def write(name: str = "out.zarr", levels: Sequence[str] = WRITTEN) -> Path:
        config = tiny(data, out=str(tmp_path / name), levels=tuple(levels), max_failed_fraction=0.5)
        extract(config, InlineExecutor())
        return Path(config.out)

    return write


@pytest.fixture
def written(seven) -> Path:
    return seven()


NAMES = ("x1/features", "x2/features", "x0.5/features", "x0.5/scale", "5x3/features", "pooled/features")


def test_zarr_and_tensorstore_read_the_same_numbers(written):
    group = zarr.open_group(written, mode="r")
    for name in NAMES:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(written / name)}}
        numbers = tensorstore.open(spec, open=True, read=True).result().read().result()

        np.testing.assert_array_equal(group[name][:], numbers)


def test_levels_without_compression_hold_the_same_numbers_in_every_tool(seven, written):
    raw = seven("raw.zarr", [f"{level}-raw" if "@" in level else f"{level}@float16-raw" for level in WRITTEN])
    group, plain = zarr.open_group(raw, mode="r"), zarr.open_group(written, mode="r")
    store, other = FeatureStore.open(str(raw)), FeatureStore.open(str(written))

    for name in NAMES:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(raw / name)}}
        np.testing.assert_array_equal(group[name][:], plain[name][:])
        np.testing.assert_array_equal(tensorstore.open(spec, open=True, read=True).result().read().result(), plain[name][:])
    for level in store.spec.levels:
        for rows in (slice(None), [6, 1]):  # whole shards, and chunks by their ranges
            wanted = other.read(rows, level.name, missing="nan")
            np.testing.assert_array_equal(store.read(rows, level.name, missing="nan"), wanted)
    assert [level.encoding for level in store.spec.levels[:3]] == ["float16-raw", "float32-raw", "int8-raw"]
    assert store.spec.numbers(["x1", "x0.5"]) == other.spec.numbers(["x1", "x0.5"])


def test_a_flipped_bit_without_compression_is_an_error(seven):
    raw = seven("raw.zarr", ["x1@float16-raw"])
    shard = raw / "x1/features/c/0/0/0/0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    for rows in (slice(0, 3), 0):
        with pytest.raises(StorageError, match=r"damaged.*checksum"):
            FeatureStore.open(str(raw)).read(rows, "x1")


def test_stores_from_before_there_was_a_choice_keep_their_fingerprint(written):
    spec = FeatureStore.open(str(written)).spec
    assert all("compression" not in level for level in spec.to_json()["levels"])
    assert FeatureSpec.from_json(spec.to_json()) == spec


def test_xarray_reads_the_same_numbers_with_names_and_pixel_coordinates(written):
    group = zarr.open_group(written, mode="r")

    x2 = xarray.open_zarr(written, group="x2")
    odd = xarray.open_zarr(written, group="5x3")
    pooled = xarray.open_zarr(written, group="pooled")

    assert x2["features"].dims == ("sample", "y", "x", "channel")
    assert x2["y"].values.tolist() == x2["x"].values.tolist() == [4, 12, 20, 28, 36, 44, 52, 60]
    assert x2["y"].attrs["units"] == "px"
    np.testing.assert_allclose(odd["y"], [6.4, 19.2, 32, 44.8, 57.6], rtol=1e-6)
    np.testing.assert_allclose(odd["x"], [32 / 3, 32, 160 / 3], rtol=1e-6)
    assert pooled["features"].dims == ("sample", "channel")
    np.testing.assert_array_equal(x2["features"], group["x2/features"][:])
    np.testing.assert_array_equal(odd["features"], group["5x3/features"][:])
    np.testing.assert_array_equal(pooled["features"], group["pooled/features"][:])


def test_failed_row_is_nan_at_every_level_and_the_others_are_not(written):
    group = zarr.open_group(written, mode="r")

    for name in ("x1/features", "x2/features", "x0.5/scale", "5x3/features", "pooled/features"):
        missing = np.isnan(group[name][:]).reshape(7, -1)
        assert missing.all(axis=1).tolist() == missing.any(axis=1).tolist() == [n == 3 for n in range(7)]
    assert not group["x0.5/features"][3].any()


def test_int8_level_is_the_average_of_the_native_one_within_its_step(written):
    group = zarr.open_group(written, mode="r")
    rows = [0, 1, 2, 4, 5, 6]
    native = group["x1/features"][:][rows].astype(np.float32)

    coarse = group["x0.5/features"][:][rows] * group["x0.5/scale"][:][rows][:, None, None]

    expected = native.reshape(6, 2, 2, 2, 2, 64).mean(axis=(2, 4))
    step = group["x0.5/scale"][:][rows][:, None, None]
    assert (np.abs(coarse - expected) <= 0.5 * step + 2e-3).all()


def test_listing_the_store_meets_no_unknown_object(written, recwarn):
    root = [name for name, _ in zarr.open_group(written, mode="r", use_consolidated=False).members()]
    everything = [name for name, _ in zarr.open_group(written, mode="r").members(max_depth=None)]

    groups = {"5x3", "index", "ledger", "pooled", "runs", "views", "x0.5", "x1", "x2"}
    axes = {f"{level}/{axis}" for level in ("5x3", "x0.5", "x1", "x2") for axis in "yx"}
    assert set(root) == groups
    assert set(everything) == groups | axes | set(NAMES) | {"index/key", "index/valid"}
    assert [str(w.message) for w in recwarn if "recognized" in str(w.message)] == []


def test_multiscales_place_every_map_relative_to_the_native_one(written):
    layout = zarr.open_group(written, mode="r").attrs["multiscales"]["layout"]

    assert [entry["asset"] for entry in layout] == [f"{name}/features" for name in ("x1", "x2", "x0.5", "5x3")]
    assert layout[1]["transform"] == {"scale": [1, 0.5, 0.5, 1], "translation": [0, -0.25, -0.25, 0]}
    assert layout[2]["transform"] == {"scale": [1, 2, 2, 1], "translation": [0, 0.5, 0.5, 0]}
    np.testing.assert_allclose(layout[3]["transform"]["scale"], [1, 0.8, 4 / 3, 1])
    assert math.isclose(layout[3]["transform"]["translation"][2], (32 / 3 - 8) / 16)
