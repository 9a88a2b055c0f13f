"""Levels that are added to a finished store: what they hold, what stays as it is, and what goes on afterwards."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from jobs.extract import run
from jobs.show import run as show
from pipelines.config import ConfigError
from pipelines.executors import InlineExecutor
from pipelines.extraction import adding
from pipelines.extraction.adding import lines as add_lines
from pipelines.extraction.run import RunFailed, extract
from pipelines.feature_datasets import FeatureDataset
from pipelines.features.bundle import load_bundle
from pipelines.features.model import FeatureModel
from storage.added import BegunOtherwise
from storage.paths import Folder
from storage.store import FeatureStore, MissingRows
from tests.conftest import jpeg, write_tar
from tests.pipelines.extraction.test_s3 import tree
from tests.pipelines.features.test_learned import checkpoint
from tests.stops import dying_at_task

JAFAR = {"method": "jafar", "channels": 64, "patch": 16, "qk_dim": 32}


@pytest.fixture
def images(tmp_path) -> str:
    """A tar of seven samples, of which one is no image."""
    members = [(f"{i}.jpg", jpeg(i, 48, 40) if i != 2 else b"not an image") for i in range(7)]
    return str(write_tar(tmp_path / "in" / "a.tar", members))


@pytest.fixture
def make(tiny, images):
    """A finished store of these in two tasks, and how more is done with it."""

    def make(*levels: str, **changes: object):
        config = tiny(images, facet="key", levels=levels, max_failed_fraction=0.5, **changes)
        extract(config, InlineExecutor())
        return config

    return make


def add(config, *levels: str, **changes: object) -> list[str]:
    return list(add_lines(config.changed(add_level=levels, **changes), InlineExecutor()))


def arrays(config, *levels: str) -> dict[str, bytes]:
    """The objects of some levels."""
    found = tree(Folder(config.out))
    return {name: data for name, data in found.items() if name.split("/")[0] in levels}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_of_float32_maps_they_are_what_one_run_gives_without_the_backbone(make, tmp_path, precision, monkeypatch):
    lift, jafar = checkpoint(tmp_path / "lift"), checkpoint(tmp_path / "jafar", JAFAR)
    added = ("x2", f"sharp:x2=lift:{lift}@float32", f"fine:8x8=jafar:{jafar}", "codes:x4=bicubic@int8", "mean:pooled=mean")
    config = make("x1@float32", "pooled", precision=precision)
    before, reader = tree(Folder(config.out)), FeatureStore.open(config.out)
    data = FeatureDataset(config.out, ["x1"])
    whole = make("x1@float32", "pooled", *added, out=str(tmp_path / "whole.zarr"), precision=precision)
    monkeypatch.setattr(FeatureModel, "__call__", _no_pass)
    loaded: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        adding, "load_bundle", lambda features, options: (loaded.append(features.levels), load_bundle(features, options))[1]
    )

    add(config, "x1", *added)

    assert loaded == [added]  # one backbone for all of them
    # Means of half-precision maps are rounded otherwise.
    names = ("x2", "sharp", "fine", "codes", *(("mean",) if precision == "fp32" else ()))
    assert arrays(config, *names) == arrays(whole, *names)
    after, store, at_once = tree(Folder(config.out)), FeatureStore.open(config.out), FeatureStore.open(whole.out)
    assert {name: after[name] for name in before if name != "zarr.json"} == {n: d for n, d in before.items() if n != "zarr.json"}
    assert (store.root.fingerprint == at_once.root.fingerprint) == (precision == "fp32")
    assert store.root.counts == at_once.root.counts
    rounded = ["", "", "", *(["", "", "", ""] if precision == "fp32" else ["x1", "x1", "", "x1"])]
    assert [level.made_from for level in store.spec.levels] == rounded
    assert [each.made_of for each in store.root.added][:2] == [
        "x1 as stored (float32)",
        "x1 as stored (float32) and the photographs",
    ]
    with pytest.raises(MissingRows):
        store.read("2", "x2")
    # Who opened it before goes on, and data sets, too.
    np.testing.assert_array_equal(reader.read([0, 1, 6], "x1"), store.read([0, 1, 6], "x1"))
    assert set(data[0]) == {"row", "key", "x1"}


def _no_pass(*_: object) -> None:
    raise AssertionError("the backbone ran")


def test_of_float16_maps_they_are_made_of_the_rounded_numbers_also_when_a_task_runs_again(make, tmp_path, capsys):
    lift = checkpoint(tmp_path / "lift")
    config = make("x1", "pooled")
    add(config, "x2@float32", f"sharp:x2=lift:{lift}", added_from="stored")
    add(config, "exact:x2@float32", added_from="backbone")

    store = FeatureStore.open(config.out)
    assert [level.made_from for level in store.spec.levels] == ["", "", "x1", "x1", ""]
    there = store.valid()
    maps = torch.from_numpy(store.read(np.flatnonzero(there), "x1")).float().permute(0, 3, 1, 2)
    expected = F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(store.read(np.flatnonzero(there), "x2"), expected)
    exact = store.read(np.flatnonzero(there), "exact")
    assert 0 < np.abs(exact - expected).max() < 0.01
    # The command that began the store goes on with it: a task that runs again makes the same of all levels.
    before = tree(Folder(config.out))
    Folder(config.out).remove(["ledger/commits/00000001.parquet"])
    extract(config, InlineExecutor())
    after = tree(Folder(config.out))
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {"ledger/commits/00000001.parquet"}  # which lists all levels now
    extract(config, InlineExecutor())
    assert show(["status", config.out]) == 0
    said = capsys.readouterr().out
    assert "added    level x2 was added, made of x1 as stored (float16)" in said
    assert "added    level exact was added, made of the backbone's maps, computed again of the photographs" in said
    assert show(["rows", config.out]) == 0


def test_a_run_that_died_goes_on_and_readers_see_the_level_once_it_is_whole(make, capsys):
    config = make("x1", "pooled")
    with dying_at_task(1):
        add(config, "x2")

    store = FeatureStore.open(config.out)
    assert (store.status, list(store.levels)) == ("complete", ["x1", "pooled"])
    assert show(["status", config.out]) == 0
    assert "level x2 is being added: 1 of 2 tasks done; readers see it once it is whole" in capsys.readouterr().out
    shard = (Path(config.out) / "x2/features/c/0/0/0/0").read_bytes()
    with pytest.raises(BegunOtherwise, match="bicubic"):
        add(config, "x2=bicubic")
    (first, *_) = add(config, "x2")
    assert "level x2 is added, made of x1 as stored (float16)" in first
    assert (Path(config.out) / "x2/features/c/0/0/0/0").read_bytes() == shard
    assert add(config, "x2") == [f"{config.out}: level x2 is there already"]


def test_a_store_grows_with_levels_that_were_added(make, tmp_path, images):
    lift = checkpoint(tmp_path / "lift")
    config = make("x1", "pooled")
    add(config, "x2@float32", f"sharp:x2=lift:{lift}")
    before, reader = tree(Folder(config.out)), FeatureStore.open(config.out)
    more = write_tar(tmp_path / "in" / "b.tar", [(f"b{i}.jpg", jpeg(30 + i, 48, 40)) for i in range(3)])

    extract(config.changed(data=(images, str(more))), InlineExecutor())

    store, after = FeatureStore.open(config.out), tree(Folder(config.out))
    rows = np.flatnonzero(store.valid())
    assert (len(store), len(rows), store.status) == (10, 9, "complete")
    maps = torch.from_numpy(store.read(rows, "x1")).float().permute(0, 3, 1, 2)
    expected = F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(store.read(rows, "x2"), expected)
    assert np.isfinite(store.read(rows, "sharp")).all()
    first = [name for name in before if name.endswith(("/c/0/0/0/0", "/c/0/0", "00000000.parquet"))]
    assert {name: after[name] for name in first} == {name: before[name] for name in first}
    np.testing.assert_array_equal(reader.read([0, 6], "sharp"), store.read([0, 6], "sharp"))
    assert add(config, "x2") == [f"{config.out}: level x2 is there already"]
    add(config, "exact:x2", added_from="backbone")
    assert len(FeatureStore.open(config.out).valid()) == 10


def test_what_can_not_be_added_is_refused_by_name(make, tmp_path, images):
    config = make("x1", "codes:x1@int8", "pooled")
    for asked, said in (
        ("x1=bicubic", "has another level of that name"),
        ("codes:x2", "has another level of that name"),
        ("x4:x2", "can't be called 'x4'"),
        ("index:x2", "can't be called 'index'"),
        ("x0.3", "are not whole"),
    ):
        with pytest.raises(ConfigError, match=said):
            add(config, asked)
    with pytest.raises(ConfigError, match="holds other features than these settings make"):
        add(config, "x2", facet="query")
    write_tar(Path(images), [(f"{i}.jpg", jpeg(i + 20, 48, 40) if i != 2 else b"not an image") for i in range(7)])
    with pytest.raises(RunFailed, match="its photograph, which the level needs, (is another one|can't be read)"):
        add(config, "x2", added_from="backbone")
    assert list(FeatureStore.open(config.out).levels) == ["x1", "codes", "pooled"]


def test_the_program_plans_adds_and_refuses(make, tmp_path, capsys):
    config = make("x1", "pooled")
    argv = ["--out", config.out, "--add-level", "x2", "--executor", "inline"]

    assert run([*argv, "--plan"]) == 0
    assert "made of    x1 as stored (float16)" in capsys.readouterr().out
    assert run([*argv, "--plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["pending"] == 2
    assert list(FeatureStore.open(config.out).levels) == ["x1", "pooled"]
    assert run(["--from", config.out, *argv]) == 0
    assert "level x2 is added" in capsys.readouterr().out
    for more, said in (
        (["--retry-failed"], "--add-level leaves the levels that are there as they are"),
        (["--out", str(tmp_path / "no.zarr")], "there is no feature store at"),
    ):
        assert run([*argv, *more]) == 2
        assert said in capsys.readouterr().err
