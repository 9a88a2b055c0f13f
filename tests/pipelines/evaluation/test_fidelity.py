"""Fidelity: from photographs to tables and pictures."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from operators.metrics.fidelity import cell_cosines, fidelity_of
from pipelines.config import ConfigError
from pipelines.evaluation import fidelity
from pipelines.evaluation.fidelity import FidelityConfig
from storage.store import FeatureStore
from tests.pipelines.evaluation.test_evaluation import TINY, evaluate, extract, make_spair


def config_of(data: Path, out: Path, **changes: object) -> FidelityConfig:
    settings = {"data": str(data), "out": str(out), "sizes": (64, 32, 128), "levels": ("x1", "x2", "x4"), **TINY, **changes}
    return FidelityConfig.of(**settings)


def test_each_level_is_held_against_the_own_map_of_the_size_that_has_its_grid(tmp_path):
    data = make_spair(tmp_path / "d")

    records, findings = evaluate(fidelity, config_of(data, tmp_path / "out", limit=5, paper=True, pictures=2))

    (table,) = findings.tables
    held = [(line.features, line.input_px, line.values[2]) for line in table.lines]
    assert held == [
        ("low-res", "32", "64 px"),
        ("bilinear x2", "32", "64 px"),
        ("bilinear x4", "32", "128 px"),
        ("low-res", "64", "128 px"),
        ("bilinear x2", "64", "128 px"),
    ]
    values = {(each["row"], each["side"]): [] for each in records}
    for each in records:
        values[each["row"], each["side"]].append([100 * each["cosine"], 100 * each["centred"]])
    for line in table.lines:
        assert line.values[:2] == pytest.approx(np.mean(values[line.features, int(line.input_px)], axis=0))
        first = line.estimates[0]
        assert first.interval.low <= line.values[0] <= first.interval.high
    assert [line.estimates[0].against for line in table.lines] == ["bilinear x2", "", "", "bilinear x2", ""]
    assert table.drawn == "5 images"
    assert (findings.items.scored, findings.items.taken[0].count) == ({"images": 5}, 5)
    assert findings.choices["held against nothing"] == "bilinear x4 of 64 px: no larger size has their grid"
    assert table.notes == ("no paper has numbers of this measure",)
    with Image.open(tmp_path / "out/maps/bilinear x2/0000004.png") as heat:
        assert heat.size == (8, 8)
    with Image.open(tmp_path / "out/pictures/fidelity.png") as picture:
        assert picture.width > 3 * 200


def test_stores_give_what_a_model_gives_and_what_their_arrays_say(tmp_path, tiny):
    data = make_spair(tmp_path / "d")
    sizes = {
        size: extract(tmp_path, f"s{size}", data / "JPEGImages", tiny, geometry="squash", size=str(size)) for size in (32, 64)
    }

    live, _ = evaluate(
        fidelity, config_of(data, tmp_path / "live", sizes=tuple(sizes), levels=("x1", "x2"), drawing="extract", pictures=0)
    )
    stored, _ = evaluate(
        fidelity, config_of(data, tmp_path / "stored", sizes=(), levels=(), stores=tuple(sizes.values()), pictures=0)
    )

    assert stored == live
    small, large = (FeatureStore.open(url) for url in sizes.values())
    made, own = small.read(slice(None), "x2"), large.read(slice(None), "x1")
    expected = [fidelity_of(cell_cosines(*pair)) for pair in zip(made, own, strict=True)]
    found = sorted([each["cosine"], each["centred"]] for each in live if each["row"] == "bilinear x2")
    np.testing.assert_allclose(found, sorted([each.cosine, each.centred] for each in expected))


def test_a_size_that_is_of_no_use_is_said(tmp_path):
    config = config_of(make_spair(tmp_path / "d"), tmp_path / "out", sizes=(32, 48, 64), levels=("x1", "x2"), limit=1, pictures=0)

    _, findings = evaluate(fidelity, config)

    assert [line.input_px for line in findings.tables[0].lines] == ["32", "32"]
    assert "low-res of 48 px, bilinear x2 of 48 px: no" in findings.choices["held against nothing"]


def test_what_can_not_be_compared_is_named(tmp_path, tiny):
    data = make_spair(tmp_path / "d")

    with pytest.raises(
        ConfigError, match=r"no level has the grid .* \(32 px: low-res 2x2, bilinear x2 4x4; 48 px: .*--sizes 224 448"
    ):
        fidelity.prepare(config_of(data, tmp_path / "1", sizes=(48, 32), levels=("x1", "x2")))
    # Two cells of 40 px cover 32 of them, which is no more of the image than it looks.
    with pytest.raises(ConfigError, match="no level has the grid"):
        fidelity.prepare(config_of(data, tmp_path / "2", sizes=(40, 64), levels=("x1", "x2"), ragged=True))
    wide = extract(tmp_path, "wide", data / "JPEGImages", tiny, size="48x64", geometry="squash")
    with pytest.raises(ConfigError, match="square inputs"):
        fidelity.prepare(config_of(data, tmp_path / "3", sizes=(), levels=(), stores=(wide,)))


def test_the_models_own_size_and_twice_that_are_taken_where_none_is_given(tmp_path):
    task, _, _ = fidelity.prepare(config_of(make_spair(tmp_path / "d"), tmp_path / "out", sizes=(), levels=("x1", "x2")))

    assert task.sides == (160, 320)
