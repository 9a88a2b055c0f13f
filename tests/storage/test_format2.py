"""Stores and training runs that format 2's code wrote (tests/data/format2) are read and continued."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.executors import InlineExecutor
from pipelines.extraction.config import ExtractConfig
from pipelines.extraction.run import extract
from pipelines.showing.status import read_status, status_lines
from pipelines.training.lift import X2Config
from pipelines.training.run import train
from storage.documents import DamagedObject
from storage.paths import Folder
from storage.runs import read_last, read_pointers
from storage.store import FeatureStore
from tests.pipelines.extraction.test_s3 import tree

DATA = Path(__file__).parents[1] / "data/format2"
MODIFIED_NS = 1_700_000_000 * 10**9


@pytest.fixture
def old(tmp_path):
    """A copy of what lies in `DATA`; the tars as old as they were."""
    for path in DATA.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    for path in tmp_path.glob("*.tar"):
        os.utime(path, ns=(MODIFIED_NS, MODIFIED_NS))
    return tmp_path


def settings(old: Path, out: str, **changes: object) -> ExtractConfig:
    """The settings that the stores were made with."""
    values: dict[str, object] = {
        "data": (str(old / "s-{0..1}.tar"),),
        "out": str(old / out),
        "model": "test_vit.r160_in1k",
        "weights": "random",
        "size": "64",
        "levels": ("x1", "pooled"),
        "precision": "fp32",
        "executor": "inline",
        "device": "cpu",
        "block_rows": 2,
        "max_failed_fraction": 0.2,
    }
    return ExtractConfig.of(**{**values, **changes})


def attributes(out: Path) -> dict[str, object]:
    return json.loads((out / "zarr.json").read_text())["attributes"]["raylift"]


def test_finished_store_is_read_and_stays_as_it_is(old):
    before = tree(Folder(str(old / "finished.zarr")))
    store = FeatureStore.open(str(old / "finished.zarr"))

    assert store.valid().tolist() == [True, True, True, True, True, False, True, True]
    assert np.isfinite(store.read([0, 7], "x1")).all()
    assert store.records(slice(None), ["key", "digest"]).to_pylist()[6] == {"key": "00006", "digest": None}
    assert store.records(slice(None), ["digest"])["digest"].null_count == 8
    assert store.failures()["key"].to_pylist() == ["00005"]
    assert store.row("00003") == 3
    assert "complete" in "\n".join(status_lines(read_status(store)))
    assert extract(settings(old, "finished.zarr"), InlineExecutor()).this_run == 0

    after = tree(Folder(str(old / "finished.zarr")))
    # The tars lie elsewhere now, which the list of sources says.
    assert {name for name in before if after[name] != before[name]} <= {"index/sources.parquet"}
    assert after.keys() == before.keys()
    assert attributes(old / "finished.zarr")["format"] == 2


def test_half_finished_store_is_read_and_continued_in_todays_format(old):
    finished, half = FeatureStore.open(str(old / "finished.zarr")), old / "half.zarr"
    unfinished = FeatureStore.open(str(half))
    assert unfinished.records([0, 2, 4]).column("status").to_pylist() == ["ok", None, "ok"]
    kept = {n: (half / f"ledger/commits/{n:08d}.parquet").read_bytes() for n in (0, 2)}

    summary = extract(settings(old, "half.zarr"), InlineExecutor())

    assert (summary.ok, summary.failed, summary.this_run) == (7, 1, 4)
    totals = {"clipped": {"rows": 0, "values": 0, "first": []}, "conversions": {}}  # which format 2 hadn't
    assert attributes(half) == {**attributes(old / "finished.zarr"), "format": 3, "upgraded_from": 2, **totals}
    assert {n: (half / f"ledger/commits/{n:08d}.parquet").read_bytes() for n in (0, 2)} == kept
    store = FeatureStore.open(str(half))
    for level, tolerance in (("x1", 2e-3), ("pooled", 2e-3)):
        found, expected = (each.read(slice(None), level, missing="nan") for each in (store, finished))
        np.testing.assert_array_equal(found[[0, 1, 4, 5]], expected[[0, 1, 4, 5]])
        np.testing.assert_allclose(found, expected, atol=tolerance, rtol=0, equal_nan=True)
    assert store.records(slice(None), ["key", "status"]) == finished.records(slice(None), ["key", "status"])
    new = pq.read_schema(half / "ledger/commits/00000001.parquet").metadata
    assert new[b"fingerprint"].decode() == attributes(half)["fingerprint"]


def test_failed_rows_of_a_finished_store_are_tried_again_in_todays_format(old):
    summary = extract(settings(old, "finished.zarr", retry_failed=True), InlineExecutor())

    assert (summary.ok, summary.failed, summary.this_run) == (7, 1, 2)
    assert attributes(old / "finished.zarr")["upgraded_from"] == 2
    assert FeatureStore.open(str(old / "finished.zarr")).valid().sum() == 7


def test_records_without_fingerprint_count_in_no_other_store(old, tmp_path):
    extract(settings(old, "new.zarr"), InlineExecutor())
    new = old / "new.zarr/ledger/commits/00000000.parquet"
    new.write_bytes((DATA / "finished.zarr/ledger/commits/00000000.parquet").read_bytes())

    with pytest.raises(DamagedObject, match=r"ledger/commits/00000000.parquet .*has no column digest"):
        FeatureStore.open(str(old / "new.zarr")).ledger.record(0)


def test_training_run_is_continued(old):
    config = X2Config.of(
        method="resize_conv",
        data=(str(old / "s-{0..1}.tar"),),
        out=str(old / "train"),
        val_rows=2,
        model="test_vit.r160_in1k",
        weights="random",
        size=64,
        precision="fp32",
        batch=2,
        epochs=2,
        log_every=1,
        checkpoint_every=2,
        validate_every=4,
        executor="inline",
        device="cpu",
        max_failed_fraction=0.5,
    )
    assert read_last(Folder(config.out)).progress["seconds"] > 0

    summary = train(config)

    assert summary.step == 6
    assert read_pointers(Folder(config.out)).last == "steps/00000006"
    assert summary.metrics["images"] == 10
    assert summary.metrics["seconds"] > 0.061, "what the checkpoint says of the time before"
