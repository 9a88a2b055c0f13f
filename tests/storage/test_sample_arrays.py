"""Keys and validity as Zarr arrays: of the store's rows whenever they are there."""

from pathlib import Path

import numpy as np
import pytest
import xarray
import zarr

from storage import sample_arrays
from storage.sample_arrays import SAMPLE_DOCUMENTS
from storage.store import FeatureStore
from tests.storage.test_reader import POOLED, X1, key, make_store, write_block

FAILED = [3, 8, 20]


def arrays(url: str) -> tuple[list[str], list[bool]]:
    group = zarr.open_group(url, mode="r")
    return group["index/key"][:].tolist(), group["index/valid"][:].tolist()


def shown(url: str, *, use_consolidated: bool) -> bool:
    group = zarr.open_group(url, mode="r", use_consolidated=use_consolidated)
    return "index/key" in group or "index/valid" in group


@pytest.mark.parametrize("chunk_rows", [4, 8, 64])
def test_every_row_has_its_key_and_whether_it_failed(tmp_path, monkeypatch, chunk_rows):
    monkeypatch.setattr(sample_arrays, "CHUNK_ROWS", chunk_rows)

    store = make_store(str(tmp_path / "a.zarr"), n_rows=21, levels=(POOLED,), failed=FAILED)

    keys, valid = arrays(store.folder.url)
    assert keys == [key(row) for row in range(21)]
    assert valid == store.valid().tolist() == [row not in FAILED for row in range(21)]
    assert len(store.folder.sizes("index/key/c")) == -(-21 // chunk_rows)


def test_a_key_of_any_characters_is_found(tmp_path, monkeypatch):
    odd = ["a/b", "ü", "日本", "x" * 300, "with space", "'\"\\", "e\u0301", "7"]
    monkeypatch.setattr("tests.storage.test_reader.key", lambda row: odd[row])
    store = make_store(str(tmp_path / "a.zarr"), n_rows=8, levels=(POOLED,))

    samples = xarray.open_zarr(store.folder.url, group="index", chunks=None)
    level = xarray.open_zarr(store.folder.url, group="pooled", chunks=None).assign_coords(samples.coords).set_index(sample="key")

    for row, name in enumerate(odd):
        np.testing.assert_array_equal(level["features"].sel(sample=name).values, store.read(row, "pooled"))


def test_an_unfinished_store_has_none(tmp_path):
    store = make_store(str(tmp_path / "a.zarr"), levels=(POOLED,), blocks=[0])

    assert not shown(store.folder.url, use_consolidated=False)


def test_they_go_while_rows_are_done_again_and_are_of_the_new_rows_then(tmp_path):
    url = str(tmp_path / "a.zarr")
    store = make_store(url, n_rows=21, levels=(POOLED,), failed=FAILED)
    assert shown(url, use_consolidated=True)

    store.set_writing()
    store.revoke([1])
    assert not any(shown(url, use_consolidated=each) for each in (False, None))
    write_block(store, 1, [])
    store.finalize()

    assert arrays(url)[1] == FeatureStore.open(url).valid().tolist() == [row not in (3, 20) for row in range(21)]


@pytest.mark.parametrize("killed_before", ["the documents went", "the root says complete"])
def test_what_a_killed_run_left_is_removed_before_rows_change(tmp_path, killed_before):
    url = str(tmp_path / "a.zarr")
    store = make_store(url, n_rows=21, levels=(POOLED,), failed=FAILED)
    documents = {name: store.folder.read(name) for name in SAMPLE_DOCUMENTS}
    store.set_writing()
    for name, data in documents.items():
        store.folder.write(name, data)
    if killed_before == "the root says complete":
        store.folder.write("index/valid/c/0", b"of another finish")

    again = FeatureStore.create(url, store.spec, store.layout, provenance={})
    assert not shown(url, use_consolidated=False)
    again.finalize()

    assert arrays(url) == ([key(row) for row in range(21)], [row not in FAILED for row in range(21)])


@pytest.mark.parametrize(("number", "location"), [(3, "start"), (4, "end")])
def test_a_store_is_what_its_format_says(tmp_path, monkeypatch, number, location):
    monkeypatch.setattr("storage.store.FORMAT", number)
    url = str(tmp_path / "a.zarr")
    make_store(url, n_rows=21, levels=(X1,), failed=FAILED, blocks=[0, 2])
    monkeypatch.undo()

    # Whoever continues it.
    store = FeatureStore.open(url)
    write_block(store, 1, FAILED)
    store = FeatureStore.create(url, store.spec, store.layout, provenance={})
    store.set_writing()
    store.finalize()

    assert FeatureStore.open(url).root.format == number
    array = zarr.open_array(f"{url}/x1/features", mode="r")
    assert array.metadata.codecs[0].index_location.value == location
    np.testing.assert_array_equal(array[:], store.read(slice(None), "x1", missing="nan"))
    np.testing.assert_array_equal(array[15], store.read(15, "x1"))
    assert np.isfinite(store.read([0, 9, 19], "x1")).all()
    assert Path(url, "index/key").exists() is (number == 4)
