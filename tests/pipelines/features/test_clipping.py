"""Features beyond float16's range, of a real model: what extraction clamps is said by everything that reads it."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import extract, show
from pipelines.evaluation import similarity
from pipelines.evaluation.run import evaluate
from pipelines.evaluation.similarity import SimilarityConfig
from pipelines.feature_datasets import FeatureDataset, FeatureStream
from pipelines.training.config import TrainConfig
from pipelines.training.lift import X2Config
from pipelines.training.loop import Progress, read_metrics
from pipelines.training.run import main
from storage.documents import decode_known, parse_json
from storage.paths import Folder, StorageError
from storage.runs import read_last
from storage.store import FeatureStore
from storage.totals import Clipped
from tests import readout_runs
from tests.conftest import jpeg, loud_weights
from tests.readout_runs import TINY, losses, train, training
from tests.stops import Died, dies_after

IMAGES = "VOCdevkit/VOC2012/JPEGImages"
LIVE = ("--model", "test_vit.r160_in1k", "--precision", "fp32")
INLINE = ("--executor", "inline")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return loud_weights(tmp_path_factory.mktemp("weights") / "w.safetensors")


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.jpg").write_bytes(jpeg(i, 80, 60))
    Image.open(folder / "0.jpg").convert("L").save(folder / "grey.png")
    return folder


def extracted(photos: Path, weights: Path, out: Path, *more: str) -> FeatureStore:
    settings = ["--data", str(photos), "--weights", str(weights), "--out", str(out), "--size", "64", "--block-rows", "2"]
    assert extract.run([*LIVE, *INLINE, "--geometry", "squash", *settings, *more]) == 0
    return FeatureStore.open(str(out))


def clipped_values(photos: Path, weights: Path, out: Path) -> dict[str, int]:
    """Values beyond 65504 by key, counted in the same features as float32."""
    exact = extracted(photos, weights, out, "--encoding", "float32")
    levels = [exact.read(slice(None), name).reshape(len(exact), -1) for name in exact.levels]
    # What is rounded to 65504 isn't clamped.
    over = np.concatenate(levels, axis=1)
    with np.errstate(over="ignore"):
        counts = np.isinf(over.astype(np.float16)).sum(axis=1)
    return dict(zip(exact.index.take(np.arange(len(exact)), ["key"])["key"].to_pylist(), counts.tolist(), strict=True))


def test_extract_status_and_report_say_what_was_clamped_and_converted(photos, weights, tmp_path, capsys, caplog):
    store = extracted(photos, weights, tmp_path / "s.zarr", "--levels", "x1", "pooled")
    said = capsys.readouterr().out
    expected = clipped_values(photos, weights, tmp_path / "exact.zarr")

    assert sum(expected.values()) > 0.3 * 6 * 17 * 64
    words = (
        f"6 of 6 images have values beyond float16's range: {sum(expected.values()):,} of their {6 * 17 * 64:,} float16 values"
    )
    assert words in said
    assert "--levels x1@float32 pooled@float32" in said
    assert "converted: 1 x grey->rgb" in said
    # While it runs: once, of the first task.
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [text for text in warned if "2 of the 2 images of task 0 have values beyond float16's range" in text]
    assert len([text for text in warned if "beyond float16's range" in text]) == 1
    assert store.records(slice(None), ["clipped"])["clipped"].to_pylist() == list(expected.values())
    assert show.run(["status", store.folder.url]) == 0
    status = capsys.readouterr().out
    assert words in status
    assert "converted 1 x grey->rgb" in status
    assert show.run(["status", store.folder.url, "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["clipped"] == {"rows": 6, "values": sum(expected.values()), "first": list(expected)[:3]}
    assert numbers["conversions"] == {"grey->rgb": 1}
    assert show.run(["report", store.folder.url, "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert words.replace("'", "&#39;") in page
    assert "1 x grey-&gt;rgb" in page
    assert show.run(["rows", store.folder.url]) == 0
    assert f"0  ({expected['0']:,} values clamped)" in capsys.readouterr().out
    for command in (["export", "--out", str(tmp_path / "vectors")], ["compare", store.folder.url]):
        assert show.run([command[0], store.folder.url, *command[1:]]) == 0
        assert capsys.readouterr().out.count(words) == 1, command


def test_what_float16_holds_is_not_talked_about(photos, tmp_path, capsys, caplog):
    store = extracted(photos, "random", tmp_path / "s.zarr")
    FeatureStream(store, ["x1"])
    show.run(["status", store.folder.url])

    assert "float16's range" not in capsys.readouterr().out + caplog.text
    assert store.root.clipped == Clipped()


def test_a_store_that_an_earlier_version_completed_is_counted_by_its_ledger(photos, weights, tmp_path, capsys, monkeypatch):
    store = extracted(photos, weights, tmp_path / "s.zarr")
    known = store.root.clipped
    root = tmp_path / "s.zarr/zarr.json"
    document = json.loads(root.read_text())
    for name in ("clipped", "conversions"):
        del document["attributes"]["raylift"][name]
    root.write_text(json.dumps(document))
    capsys.readouterr()

    older = FeatureStore.open(store.folder.url)
    assert older.root.fingerprint == store.root.fingerprint
    assert older.root.clipped is None
    show.run(["status", store.folder.url])
    status = capsys.readouterr().out
    assert f"6 of 6 images have values beyond float16's range: {known.values:,} of" in status
    assert "converted 1 x grey->rgb" in status
    # Of a sample, about; and a sample that has none doesn't speak for the others.
    monkeypatch.setattr("pipelines.showing.status.MAX_RECORDS", 2)
    show.run(["status", store.folder.url])
    assert "about 6 of 6 images have values beyond float16's range: about " in capsys.readouterr().out
    assert extract.run([*LIVE, *INLINE, f"--from={store.folder.url}"]) == 0
    assert "weren't counted when the store was completed" in capsys.readouterr().out


def test_a_sample_without_clamped_values_does_not_speak_for_the_others(photos, tmp_path, capsys, monkeypatch):
    store = extracted(photos, "random", tmp_path / "s.zarr")
    root = tmp_path / "s.zarr/zarr.json"
    document = json.loads(root.read_text())
    del document["attributes"]["raylift"]["clipped"]
    root.write_text(json.dumps(document))
    capsys.readouterr()
    monkeypatch.setattr("pipelines.showing.status.MAX_RECORDS", 2)

    show.run(["status", store.folder.url])

    assert "no value beyond float16's range in a sample of 2 tasks; of the others it isn't known" in capsys.readouterr().out


def test_data_sets_warn_where_a_float16_level_is_read(photos, weights, tmp_path, caplog):
    store = extracted(photos, weights, tmp_path / "s.zarr", "--levels", "x1@float32", "pooled")
    caplog.clear()

    FeatureDataset(store, ["x1"])
    assert not caplog.records
    FeatureDataset(store, ["pooled"])
    assert "6 of 6 images have values beyond float16's range" in caplog.text
    caplog.clear()
    FeatureStream(store.folder.url, ["x1", "pooled"])
    assert "6 of 6 images have values beyond float16's range" in caplog.text


# --- evaluation -------------------------------------------------------------------------------------------------------


def evaluated(photos: Path, out: Path, **settings: object) -> dict:
    common = {"data": str(photos), "out": str(out), "executor": "inline", "device": "cpu", "limit": None, "pictures": 0}
    evaluate("similarity", similarity, SimilarityConfig.of(**common, **settings))
    return parse_json((out / "results.json").read_bytes())


def live(weights: Path | str, **settings: object) -> dict[str, object]:
    model = {"model": "test_vit.r160_in1k", "weights": str(weights), "precision": "fp32", "levels": ("x1",), "sizes": (64,)}
    return {**model, "drawing": "extract", **settings}


def test_evaluations_live_and_from_a_store_clamp_alike_and_say_so(photos, weights, tmp_path, caplog):
    store = extracted(photos, weights, tmp_path / "s.zarr", "--levels", "x1")
    caplog.clear()

    stored = evaluated(photos, tmp_path / "stored", stores=(store.folder.url,))
    from_store = caplog.text
    caplog.clear()
    found = evaluated(photos, tmp_path / "live", **live(weights))

    assert found["tables"] == stored["tables"]
    assert found["clipped"] == stored["clipped"]
    assert found["clipped"] | {"first": ""} == {"images": 6, "values": store.root.clipped.values, "of": 6 * 16 * 64, "first": ""}
    for out, log in (("stored", from_store), ("live", caplog.text)):
        words = (
            f"6 images have values beyond float16's range: {store.root.clipped.values:,} of their {6 * 16 * 64:,} float16 values"
        )
        assert words in (tmp_path / out / "results.md").read_text()
        assert words in log
    # As float32 they are other features, with nothing to be said.
    exact = evaluated(photos, tmp_path / "exact", **live(weights, encoding="float32"))
    assert exact["tables"] != found["tables"]
    assert exact["clipped"] == {"images": 0, "values": 0, "of": 0, "first": None}
    assert "float16" not in (tmp_path / "exact/results.md").read_text()


def test_an_evaluation_that_goes_on_knows_what_was_clamped_before(photos, weights, tmp_path):
    whole = evaluated(photos, tmp_path / "whole", **live(weights))
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    for name in ("00001", "00004"):
        (tmp_path / f"half/parts/{name}.jsonl").unlink()
        (tmp_path / f"half/clipped/{name}.jsonl").unlink()

    again = evaluated(photos, tmp_path / "half", **live(weights))

    assert again["clipped"] == whole["clipped"]


def test_a_live_model_that_gives_no_numbers_is_not_taken_for_clamped(photos, tmp_path):
    path = loud_weights(tmp_path / "w.safetensors", float("inf"))

    with pytest.raises(StorageError, match="the model gave NaN or infinity in fp32"):
        evaluated(photos, tmp_path / "out", **live(path))


# --- training ---------------------------------------------------------------------------------------------------------


def test_readouts_live_and_from_a_store_train_on_the_same_clamped_features(sets, weights, tiny, tmp_path, caplog, capsys):
    """A model's infinities would make the readout NaN: before they were clamped, the live run ended at its first step."""
    images = sets / "VOC2012" / IMAGES
    store = readout_runs.extract(tiny, tmp_path / "store.zarr", images, weights=str(weights))
    caplog.clear()

    stored = training(sets, tmp_path / "stored", store=store, size=None, weights=str(weights), lr=1e-6)
    train_main(stored)
    from_store = caplog.text
    caplog.clear()
    live = training(sets, tmp_path / "live", drawing="extract", weights=str(weights), lr=1e-6)
    train_main(live)

    np.testing.assert_allclose(losses(stored.out), losses(live.out), rtol=2e-4)
    for out in (stored.out, live.out):
        assert [line["clipped"] for line in read_metrics(Folder(out)) if "loss" in line] == [4, 6, 10, 12, 16, 18]
        assert decode_known(Progress, read_last(Folder(out)).progress).clipped == 18
    printed = capsys.readouterr().out
    assert (
        printed.count("clamped    18 of 18 images, each as often as it was trained on, have features beyond float16's range") == 2
    )
    assert "6 of 6 images have values beyond float16's range" in from_store
    for log in (from_store, caplog.text):
        assert log.count("4 of the 4 images of step 1 have features beyond float16's range") == 1


def test_a_training_that_goes_on_knows_what_was_clamped_before(sets, weights, tmp_path):
    whole = training(sets, tmp_path / "whole", weights=str(weights), lr=1e-6)
    train(whole)
    half = training(sets, tmp_path / "half", weights=str(weights), lr=1e-6)
    with pytest.raises(Died):
        train(half, dies_after(3))

    train(half)

    assert read_last(Folder(half.out)).progress == read_last(Folder(whole.out)).progress


def test_readouts_of_float32_have_nothing_clamped(sets, weights, tmp_path, caplog):
    config = training(sets, tmp_path / "exact", weights=str(weights), encoding="float32", lr=1e-6)

    train(config)

    assert "float16" not in caplog.text
    assert "clipped" not in read_last(Folder(config.out)).progress


def test_upsamplers_trained_on_clamped_features_say_so(weights, tiny, make_tars, tmp_path, caplog):
    data = make_tars(count=1, each=6)
    store = readout_runs.extract(tiny, tmp_path / "store.zarr", data, weights=str(weights))
    caplog.clear()
    settings = {"method": "resize_conv", "data": (data,), "out": str(tmp_path / "run"), "val_rows": 2, "batch": 2, "epochs": 1}
    features = {"size": 64, "facet": "token", "geometry": "crop", "weights": str(weights), "interpolation": "bicubic"}
    config = X2Config.of(**{**TINY, **settings, **features}, features=store, jitter=0.0)

    train(config)

    assert "6 of 6 images have values beyond float16's range" in caplog.text
    assert "2 of the 2 images of step 1 have features beyond float16's range" in caplog.text
    assert decode_known(Progress, read_last(Folder(config.out)).progress).clipped == 4


def train_main(config: TrainConfig) -> None:
    print(*main(config), sep="\n")
