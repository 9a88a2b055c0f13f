"""A written store in other tools: Zarr, xarray, dask and TensorStore have the numbers that FeatureStore.read has."""

import base64
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import pytest
import tensorstore
import xarray
import zarr

from pipelines.executors import InlineExecutor
from pipelines.extraction.run import extract
from storage.paths import Folder
from storage.store import FeatureStore
from tests.conftest import jpeg, write_tar
from tests.pipelines.extraction.test_s3 import tree

ROOT = Path(__file__).resolve().parent.parent
LEVELS = ("x1", "x2@float32", "x0.5@int8", "5x3=bicubic", "pooled")
FAILED = 3
FLOATS = ["x1", "x2", "5x3", "pooled"]
MAPS = ["x1", "x2", "x0.5", "5x3"]
LEVELS_BY_NAME = ["x1", "x2", "x0.5", "5x3", "pooled"]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FeatureStore:
    """Seven images at 64 x 96 pixels in shards of four, the fourth unreadable."""
    from pipelines.extraction.config import ExtractConfig

    folder = tmp_path_factory.mktemp("ecosystem")
    members = [(f"{n}.jpg", b"junk" if n == FAILED else jpeg(n, 80 + n, 60)) for n in range(7)]
    config = ExtractConfig.of(
        data=(str(write_tar(folder / "in/a.tar", members)),),
        out=str(folder / "feats.zarr"),
        model="test_vit.r160_in1k",
        weights="random",
        size="64x96",
        levels=LEVELS,
        precision="fp32",
        executor="inline",
        block_rows=4,
        max_failed_fraction=0.5,
    )
    extract(config, InlineExecutor())
    return FeatureStore.open(config.out)


@pytest.fixture
def url(store) -> str:
    return store.folder.url


@pytest.fixture
def on_s3(store, s3_options) -> dict[str, Any]:
    """The same bytes in a bucket: arguments for readers that take a URL and storage options."""
    url = f"s3://{s3_options['bucket']}/feats.zarr"
    remote = Folder(url, s3_options["options"])
    for name, data in tree(store.folder).items():
        remote.write(name, data)
    return {"store": url, "storage_options": s3_options["options"]}


def everything(store: FeatureStore, level: str) -> np.ndarray:
    return store.read(slice(None), level, missing="nan")


# --- zarr -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", FLOATS)
def test_zarr_has_the_numbers_of_the_reader(store, url, level):
    array = zarr.open_group(url, mode="r")[f"{level}/features"]

    np.testing.assert_array_equal(array[:], everything(store, level))
    np.testing.assert_array_equal(array[5], store.read("5", level))
    np.testing.assert_array_equal(array.oindex[[6, 0, 2]], store.read([6, 0, 2], level))
    assert np.isnan(array[FAILED]).all()


def test_int8_times_its_scale_is_what_the_reader_gives(store, url):
    level = zarr.open_group(url, mode="r")["x0.5"]

    values = level["features"][:] * level["scale"][:][:, None, None]

    np.testing.assert_array_equal(values, everything(store, "x0.5"))
    assert np.isnan(values[FAILED]).all()
    assert level["features"].attrs["scale"].startswith("features * scale, per row and channel")


@pytest.mark.parametrize("use_consolidated", [True, False])
def test_consolidated_metadata_is_there_and_says_what_the_arrays_say(url, use_consolidated):
    group = zarr.open_group(url, mode="r", use_consolidated=use_consolidated)

    shapes = {name: array.shape for name in ("x1", "x2", "x0.5", "5x3", "pooled") for array in [group[name]["features"]]}

    assert (group.metadata.consolidated_metadata is not None) is use_consolidated
    assert shapes == {"x1": (7, 4, 6, 64), "x2": (7, 8, 12, 64), "x0.5": (7, 2, 3, 64), "5x3": (7, 5, 3, 64), "pooled": (7, 64)}
    assert group["x1/features"].shards == (4, 4, 6, 64)
    assert group["x1/features"].chunks == (1, 4, 6, 64)


def test_zarr_over_s3_has_the_numbers_of_the_reader(store, on_s3):
    group = zarr.open_group(**on_s3, mode="r")

    for level in FLOATS:
        np.testing.assert_array_equal(group[f"{level}/features"][:], everything(store, level))


def test_the_reader_over_s3_has_the_numbers_of_the_local_one(store, on_s3):
    remote = FeatureStore.open(on_s3["store"], on_s3["storage_options"])

    for level in (*FLOATS, "x0.5"):
        np.testing.assert_array_equal(everything(remote, level), everything(store, level))
    np.testing.assert_array_equal(remote.sample("6", [(40, 20)], "x2"), store.sample("6", [(40, 20)], "x2"))


# --- xarray ---------------------------------------------------------------------------------------------------------


def is_lazy(variable: xarray.DataArray) -> bool:
    return not variable.variable._in_memory


def test_xarray_opens_a_level_lazily_and_reads_the_rows_that_are_asked_for(store, url):
    level = xarray.open_zarr(url, group="x1", chunks=None)
    features = level["features"]

    part = features.isel(sample=slice(4, 6), y=1)

    assert is_lazy(features)
    assert is_lazy(part)
    np.testing.assert_array_equal(part.values, store.read([4, 5], "x1")[:, 1])
    assert is_lazy(features)
    assert dict(features.sizes) == {"sample": 7, "y": 4, "x": 6, "channel": 64}
    assert features.dtype == np.float16


def test_xarray_has_the_numbers_of_the_reader_at_every_level(store, url):
    for level in FLOATS:
        values = xarray.open_zarr(url, group=level, chunks=None)["features"].values

        np.testing.assert_array_equal(values, everything(store, level))


def test_int8_level_in_xarray_is_one_product_away(store, url):
    level = xarray.open_zarr(url, group="x0.5", chunks=None)

    product = level["features"] * level["scale"]

    assert (level["features"].dtype, level["scale"].dims) == (np.int8, ("sample", "channel"))
    values = product.transpose("sample", "y", "x", "channel").values
    np.testing.assert_array_equal(values, everything(store, "x0.5"))
    # The numbers alone aren't features, and say so where other tools show what they are.
    assert (
        level["features"].attrs["long_name"].startswith("int8 codes of dense features of test_vit.r160_in1k: multiply by scale")
    )
    floats = xarray.open_zarr(url, group="x1", chunks=None)["features"]
    assert floats.attrs["long_name"] == "dense features of test_vit.r160_in1k"


def test_coordinates_are_cell_centres_in_pixels_of_the_models_input(store, url):
    x1 = xarray.open_zarr(url, group="x1", chunks=None)
    half = xarray.open_zarr(url, group="x0.5", chunks=None)

    assert x1["y"].values.tolist() == [8, 24, 40, 56]
    assert x1["x"].values.tolist() == [8, 24, 40, 56, 72, 88]
    assert half["y"].values.tolist() == [16, 48]
    assert half["x"].values.tolist() == [16, 48, 80]
    assert "features" not in x1.coords
    assert store.spec.input_size == (64, 96)


@pytest.mark.parametrize("level", MAPS)
def test_nearest_cell_of_xarray_is_the_rounded_one_of_the_store(store, url, level):
    dataset = xarray.open_zarr(url, group=level, chunks=None)
    points = np.random.default_rng(1).uniform(0, (96, 64), (50, 2))
    height, width = store.levels[level].grid
    cells = np.clip(np.round(store.cells(points, level)), 0, (width - 1, height - 1)).astype(int)
    x, y = (xarray.DataArray(values, dims="point") for values in points.T)

    found = dataset["features"].isel(sample=5).sel(x=x, y=y, method="nearest")

    np.testing.assert_array_equal(found.values, dataset["features"].values[5][cells[:, 1], cells[:, 0]])


@pytest.mark.parametrize("level", ["x1", "x2", "5x3"])
def test_interpolation_of_xarray_is_the_stores_sample(store, url, level):
    """Between the outermost centres, where xarray's needs no extrapolation."""
    dataset = xarray.open_zarr(url, group=level, chunks=None)
    step_y, step_x = store.levels[level].step
    inside = np.random.default_rng(2).uniform((step_x / 2, step_y / 2), (96 - step_x / 2, 64 - step_y / 2), (40, 2))
    points = store.pixels("6").to_original(inside)
    keep = ((points >= 0) & (points <= (86, 60))).all(axis=1)
    x, y = (xarray.DataArray(values, dims="point") for values in inside[keep].T)

    found = dataset["features"].isel(sample=6).astype(np.float64).interp(x=x, y=y).transpose("point", "channel")

    assert keep.sum() >= 30
    # The coordinates are float32.
    np.testing.assert_allclose(found.values, store.sample("6", points[keep], level), rtol=1e-3, atol=1e-4)


def test_datatree_holds_every_level_with_its_own_coordinates(store, url):
    opened = xarray.open_datatree(url, engine="zarr", chunks=None)

    for level in FLOATS:
        assert is_lazy(opened[level]["features"])
        np.testing.assert_array_equal(opened[level]["features"].values, everything(store, level))
    assert opened["x1"]["x"].shape == (6,)
    assert opened["x2"]["x"].shape == (12,)
    assert {name for name in opened.children if opened[name].data_vars} == {*LEVELS_BY_NAME, "index"}
    assert opened.attrs["raylift"]["status"] == "complete"


def test_xarray_selects_rows_by_key_and_masks_those_that_failed(store, url):
    samples = xarray.open_zarr(url, group="index", chunks=None)
    level = xarray.open_zarr(url, group="x2", chunks=None).assign_coords(samples.coords)

    assert list(samples.coords) == ["key"]
    assert is_lazy(samples["key"])
    assert samples["key"].values.tolist() == [str(n) for n in range(7)]
    assert samples["valid"].values.tolist() == store.valid().tolist() == [n != FAILED for n in range(7)]
    by_key = level.set_index(sample="key")["features"].sel(sample=["6", "0"])
    np.testing.assert_array_equal(by_key.values, store.read(["6", "0"], "x2"))
    assert level["features"].where(samples["valid"], drop=True).sizes["sample"] == 6


def test_xarray_over_s3_has_the_numbers_of_the_reader(store, on_s3):
    for level in FLOATS:
        opened = xarray.open_zarr(**on_s3, group=level, chunks=None)

        assert is_lazy(opened["features"])
        np.testing.assert_array_equal(opened["features"].values, everything(store, level))


# --- dask and tensorstore -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", FLOATS)
def test_dask_has_the_numbers_of_the_reader(store, url, level):
    array = dask.array.from_zarr(url, component=f"{level}/features")

    np.testing.assert_array_equal(array.compute(scheduler="synchronous"), everything(store, level))
    mean = dask.array.nanmean(array.astype("f8"), axis=0).compute(scheduler="synchronous")
    np.testing.assert_allclose(mean, np.nanmean(everything(store, level).astype("f8"), axis=0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("level", FLOATS)
def test_tensorstore_has_the_numbers_of_the_reader(store, url, level):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{url}/{level}/features"}}
    array = tensorstore.open(spec, open=True, read=True).result()

    np.testing.assert_array_equal(array.read().result(), everything(store, level))
    np.testing.assert_array_equal(array[5].read().result(), store.read(5, level))
    expected = ("sample", "channel") if level == "pooled" else ("sample", "y", "x", "channel")
    assert array.domain.labels == expected


def test_tensorstore_has_the_int8_level_and_its_scale(store, url):
    arrays = []
    for name in ("features", "scale"):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{url}/x0.5/{name}"}}
        arrays.append(tensorstore.open(spec, open=True, read=True).result().read().result())

    np.testing.assert_array_equal(arrays[0] * arrays[1][:, None, None], everything(store, "x0.5"))


# --- a reader's machine ---------------------------------------------------------------------------------------------


@pytest.fixture
def moved(store, tmp_path) -> Path:
    """The store where nothing else of the run is."""
    target = tmp_path / "moved.zarr"
    shutil.copytree(store.folder.url, target)
    return target


def test_reading_needs_neither_torch_nor_ray_nor_the_input(store, moved):
    program = f"""
        import sys
        for name in ("torch", "torchvision", "timm", "ray", "xarray", "dask"):
            sys.modules[name] = None
        from storage.store import FeatureStore

        store = FeatureStore.open({str(moved)!r})
        rows = store.read(["5", "0"], "x2")
        points = store.sample("6", [(40, 20), (0, 0)], "x1")
        print(len(store), rows.dtype, rows.sum().item(), points.sum().item(), store.valid().tolist(), store.coords("x1").shape)
    """

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.stderr == ""
    rows, points = store.read(["5", "0"], "x2").sum().item(), store.sample("6", [(40, 20), (0, 0)], "x1").sum().item()
    valid = [n != FAILED for n in range(7)]
    assert done.stdout == f"7 float32 {rows} {points} {valid} (4, 6, 2)\n"


# --- zarrita --------------------------------------------------------------------------------------------------------

READ_WITH_ZARRITA = """
// Node before 24 has no float16: their bits then, of which there are as many.
globalThis.Float16Array ??= Uint16Array;
const zarr = await import("zarrita");
const { default: FileSystemStore } = await import("@zarrita/storage/fs");
const [, url, ...names] = process.argv;
const root = zarr.root(new FileSystemStore(url));
const found = {};
for (const name of names) {
    const array = await zarr.open(root.resolve(name), { kind: "array" });
    const { data, shape } = await zarr.get(array);
    const plain = typeof data[Symbol.iterator] === "function" ? [...data] : data;
    const bytes = ArrayBuffer.isView(data) ? Buffer.from(data.buffer, data.byteOffset, data.byteLength) : null;
    found[name] = { shape, dtype: array.dtype, values: bytes ? bytes.toString("base64") : plain };
}
console.log(JSON.stringify(found));
"""


@pytest.fixture(scope="module")
def zarrita() -> Path:
    """A folder in which `npm install zarrita` was run: RAYLIFT_ZARRITA, or that of global packages."""
    if shutil.which("node") is None:
        pytest.skip("node is not here")
    folder = os.environ.get("RAYLIFT_ZARRITA")
    if folder is None and shutil.which("npm"):
        where = subprocess.run(["npm", "root", "-g"], capture_output=True, text=True, check=True).stdout.strip()
        folder = str(Path(where).parent)
    for modules in ("node_modules", "lib/node_modules"):
        if folder and Path(folder, modules, "zarrita").is_dir():
            return Path(folder)
    pytest.skip("zarrita is not here: run npm install zarrita in a folder, and set RAYLIFT_ZARRITA to it")


def test_zarrita_has_the_numbers_keys_and_validity(store, url, zarrita):
    names = ["x1/features", "x2/features", "5x3/features", "x0.5/features", "x0.5/scale", "pooled/features", "x1/y"]
    command = ["node", "--input-type=module", "-e", READ_WITH_ZARRITA, url, *names, "index/key", "index/valid"]

    done = subprocess.run(command, cwd=zarrita, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr
    found, group = json.loads(done.stdout), zarr.open_group(url, mode="r")
    rows = [n for n in range(7) if n != FAILED]
    for name in names:
        array = group[name][:]
        values = np.frombuffer(base64.b64decode(found[name]["values"]), array.dtype).reshape(found[name]["shape"])
        assert found[name]["dtype"] == array.dtype
        # Bits in a float16's place have no NaN to fill the failed row with.
        which = rows if array.dtype == np.float16 and name != "pooled/features" else slice(None)
        np.testing.assert_array_equal(values[which], array[which], err_msg=name)
    assert found["index/key"] == {"shape": [7], "dtype": "string", "values": [str(n) for n in range(7)]}
    assert found["index/valid"]["values"] == [n != FAILED for n in range(7)]
