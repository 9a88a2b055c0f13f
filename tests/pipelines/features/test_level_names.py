"""Levels with names of their own: several methods at one scale in one store, from one pass of the backbone, read by name."""

import json

import numpy as np
import pytest
import torch

from jobs.extract import run
from jobs.show import run as show
from operators.backbone import TimmBackbone
from pipelines.config import ConfigError
from pipelines.evaluation import correspondence
from pipelines.evaluation import readouts as probe
from pipelines.evaluation.readouts import ProbeConfig
from pipelines.executors import InlineExecutor
from pipelines.extraction.run import extract
from pipelines.feature_datasets import FeatureDataset, FeatureStream
from pipelines.features.bundle import load_bundle
from pipelines.features.config import FeatureConfig
from pipelines.features.levels import LevelChoice, level_name, parse_levels
from pipelines.features.sources import resolve_source
from storage.documents import DamagedObject
from storage.paths import Folder
from storage.spec import InvalidSpec, Level
from storage.store import FeatureStore
from tests.pipelines.evaluation import test_evaluation as evaluations
from tests.pipelines.extraction.test_s3 import tree
from tests.pipelines.features.test_learned import checkpoint
from tests.readout_runs import TINY, held_out, train, training
from tests.readout_runs import extract as extract_images

JAFAR = {"method": "jafar", "channels": 64, "patch": 16, "qk_dim": 32}


@pytest.fixture
def named(tmp_path) -> tuple[str, ...]:
    """Six levels of two scales, and two vectors."""
    lift, jafar = checkpoint(tmp_path / "lift"), checkpoint(tmp_path / "jafar", JAFAR)
    return (
        "x1", "raw:x1@float32-raw", "x2", f"sharp:x2=lift:{lift}", f"sharp.2:8x8=jafar:{jafar}@float32", "codes:x2=bicubic@int8",
        "pooled", "mean:pooled=mean",
    )  # fmt: skip


@pytest.fixture
def stored(make_tars, tiny, tmp_path, named) -> FeatureStore:
    """A store with them."""
    extract(tiny(make_tars(count=1, each=6), facet="key", levels=named, carry=("cls",)), InlineExecutor())
    return FeatureStore.open(str(tmp_path / "out.zarr"))


# --- extraction -------------------------------------------------------------------------------------------------------


def test_one_run_equals_separate_ones_byte_for_byte_and_shares_the_backbones_pass(make_tars, tiny, tmp_path, named, monkeypatch):
    data, passes = make_tars(count=1, each=6), []
    forward = TimmBackbone.__call__
    monkeypatch.setattr(TimmBackbone, "__call__", lambda *given: (passes.append(given[1].shape[0]), forward(*given))[1])

    def levels_of(out: str, *levels: str) -> tuple[dict[str, bytes], int]:
        passes.clear()
        extract(tiny(data, facet="key", out=str(tmp_path / out), levels=levels), InlineExecutor())
        return tree(Folder(str(tmp_path / out))), len(passes)

    together, count = levels_of("all.zarr", *named)

    for number, level in enumerate(named):
        name, plain = level_name(level), level.partition(":")[2] if level_name(level) not in ("x1", "x2", "pooled") else level
        alone, of_one = levels_of(f"{number}.zarr", plain)
        as_plain = level_name(plain)
        objects = {path.removeprefix(f"{as_plain}/"): each for path, each in alone.items() if path.startswith(f"{as_plain}/")}
        arrays = {path: each for path, each in objects.items() if "/c/" in path}
        assert arrays
        assert {path: together[f"{name}/{path}"] for path in arrays} == arrays
        assert of_one == count


def test_the_plan_and_the_root_say_names_and_scales(make_tars, tmp_path, named, capsys):
    data, out = make_tars(count=1, each=6), tmp_path / "out.zarr"
    argv = ["--data", data, "--out", str(out), "--executor", "inline", "--facet", "key", "--model", "test_vit.r160_in1k"]
    argv += ["--weights", "random", "--size", "64", "--precision", "fp32", "--levels", *named]

    assert run([*argv, "--plan"]) == 0
    said = capsys.readouterr().out
    assert run(argv) == 0

    for line in ("sharp   8 x 8 x 64         float16  lift", "sharp.2 8 x 8 x 64         float32  jafar", "x1      4 x 4 x 64"):
        assert line in said
    spec = json.loads((out / "zarr.json").read_text())["attributes"]["raylift"]["spec"]["levels"]
    assert [(each["name"], each.get("scale")) for each in spec] == [
        ("x1", None), ("raw", "x1"), ("x2", None), ("sharp", "x2"), ("sharp.2", "8x8"), ("codes", "x2"), ("pooled", None),
        ("mean", "pooled"),
    ]  # fmt: skip
    assert run(argv) == 0  # nothing to do, and no other store


@pytest.mark.parametrize(
    ("levels", "said"),
    [
        (("x1", "x2", "x2=bicubic"), "x2 and x2 have one name; give one of them a name of its own, as in other:x2"),
        (("x1", "a:x2", "a:x4"), "a:x2 and a:x4 have one name"),
        (("x1", "a:x2", "b:x2", "b:x4", "a:x4"), "b:x2 and b:x4 have one name"),
        (("x1", "Sharp:x2", "sharp:x4"), "Sharp:x2 and sharp:x4 have one name"),
        (("x4:x2",), "a level of scale x2 can't be called 'x4'"),
        (("X4:x2",), "a level of scale x2 can't be called 'X4'"),
        (("8x8:x2",), "can't be called '8x8'"),
        (("pooled:x2",), "can't be called 'pooled'"),
        (("../a:x2",), r"can't be called '\.\./a'"),
        (("a/b:x2",), "can't be called 'a/b'"),
        ((".a:x2",), r"can't be called '\.a'"),
        ((":x2",), "can't be called ''"),
        (("a b:x2",), "can't be called 'a b'"),
        (("a:b:x2",), "can't be called 'a:b'"),
        ((f"{'a' * 101}:x2",), "can't be called"),
        *(
            ((f"{name}:x2",), f"can't be called '{name}'")
            for name in ("index", "Ledger", "runs", "views", "zarr.json", "key", "row")
        ),
        (("sharp",), "'sharp' is no scale; use x1, .* as in sharp:x2"),
        (("sharp=lift:/url",), "'sharp' is no scale"),
        (("x2:sharp",), "'sharp' is no scale"),
        (("a:x2=lift",), "learned methods .* take the URL of a checkpoint"),
        (("a:pooled=bicubic",), "--levels a:pooled=bicubic: use mean, or cls"),
        (("a:x0.3",), "--levels a:x0.3: 4x4 cells times 0.3 are not whole"),
        ((), "--levels must be at least one"),
    ],
)
def test_names_that_are_none_are_refused_before_anything_is_written(make_tars, tiny, tmp_path, levels, said):
    with pytest.raises(ConfigError, match=said):
        extract(tiny(make_tars(count=1, each=6), levels=levels), InlineExecutor())

    assert not (tmp_path / "out.zarr").exists()


def test_a_scale_before_itself_is_the_scale_alone():
    assert LevelChoice.parse("x2:x2", "float16") == LevelChoice.parse("x2", "float16")
    assert [choice.displayed for choice in parse_levels(("x2:x2", "a:x2@int8"), "float16")] == ["x2", "a:x2"]


def test_a_forged_scale_is_no_store(stored):
    root = stored.folder.read("zarr.json")

    stored.folder.write("zarr.json", root.replace(b'"scale": "x2"', b'"scale": "../x"'))

    with pytest.raises(DamagedObject):
        FeatureStore.open(stored.folder.url)
    with pytest.raises(InvalidSpec, match="can't be called 'x4'"):
        Level(name="x4", scale="x2", method="mean", grid=None, channels=3)


# --- by name everywhere -----------------------------------------------------------------------------------------------


def test_readers_and_data_sets_take_names(stored):
    keys = stored.index.keys(0, 6).to_pylist()

    exact, rounded, other = (stored.read(keys, name) for name in ("raw", "x1", "sharp"))

    assert (exact.dtype, rounded.dtype, other.shape) == (np.float32, np.float16, (6, 8, 8, 64))
    np.testing.assert_array_equal(exact.astype(np.float16), rounded)
    assert np.abs(other - stored.read(keys, "x2")).max() > 0.01
    assert stored.sample(keys[0], [(3, 4)], "sharp.2").shape == (1, 64)
    assert stored.pool(keys[0], [(0, 0, 20, 20)], "sharp.2").shape == (1, 64)
    with pytest.raises(KeyError, match=r"no level 'x8'; it has x1, raw, x2, sharp, sharp\.2, codes, pooled, mean"):
        stored.read(keys, "x8")
    batch = FeatureDataset(stored, ["sharp", "mean"], columns=["cls"])[2]
    assert set(batch) == {"row", "key", "sharp", "mean", "cls"}
    torch.testing.assert_close(batch["sharp"], torch.from_numpy(other[2]))
    assert {sample["row"] for sample in FeatureStream(stored.folder.url, ["sharp.2"], shuffle=False)} == set(range(6))


def test_pictures_tables_and_exports_take_names(stored, tmp_path, capsys):
    url, key, pixels = stored.folder.url, stored.index.keys(0, 1)[0].as_py(), stored.pixels(0)
    point = ("--key", key, "--point", str(pixels.width / 2), str(pixels.height / 2))

    def shown(*argv: str) -> str:
        assert show([argv[0], url, *argv[1:]]) == 0
        return capsys.readouterr().out

    assert "sharp.2  8 x 8 x 64" in shown("rows")
    assert "complete" in shown("status")
    shown("view", "--levels", "x1", "sharp", "sharp.2", "--out", str(tmp_path / "view.png"))
    shown("similar", *point, "--out", str(tmp_path / "similar.png"))
    assert "cosine" in shown("nearest", *point, "--level", "sharp", "--out", str(tmp_path / "near.png"))
    assert "6 rows compared" in shown("compare", url, "--level", "x2", "--other-level", "sharp")
    assert "6 vectors of 64" in shown("export", "--level", "mean", "--out", str(tmp_path / "vectors"))
    shown("report", "--out", str(tmp_path / "report.html"))
    assert "sharp.2" in (tmp_path / "report.html").read_text()
    assert all((tmp_path / name).stat().st_size for name in ("view.png", "similar.png", "near.png"))


def test_a_live_model_and_a_store_give_evaluations_the_same_rows(tmp_path, tiny):
    data = evaluations.make_spair(tmp_path / "d")
    levels = ("x1", "x2", "soft:x2=bicubic", "x4", "near:x4=nearest")
    store = evaluations.extract(tmp_path, "s64", data / "JPEGImages", tiny, geometry="pad", levels=levels)
    live = evaluations.spair_config(data, tmp_path / "live", sizes=(64,), levels=levels, drawing="extract")
    held = evaluations.spair_config(data, tmp_path / "held", sizes=(), stores=(store,))

    (of_live, table), (of_store, _) = (evaluations.evaluate(correspondence, each) for each in (live, held))

    assert of_live == of_store
    lines = [line.features for line in table.tables[0].lines]
    assert lines == ["low-res", "bilinear x2", "bilinear x4", "bicubic soft", "nearest near"]
    # Some of a store's levels: tables have those, and the low-resolution map.
    some = held.changed(levels=("soft", "x4"), out=str(tmp_path / "some"))
    recipe, (size,) = resolve_source(some.source, (), "pad")
    assert [row.name for row in recipe.rows(size)] == ["low-res", "bilinear x4", "bilinear x2", "bicubic soft"]
    everything, _ = resolve_source(held.source, (), "pad")
    named, _ = resolve_source(held.changed(levels=levels).source, (), "pad")
    assert everything.identity() == named.identity() != recipe.identity()
    for asked, said in (("near:x2", "near .* store 'x4=nearest@float16' .* asked 'near:x2'"), ("other", "asked 'other'")):
        with pytest.raises(ConfigError, match=said):
            resolve_source(held.changed(levels=("x1", asked)).source, (), "pad")


def test_a_named_level_keeps_its_factor_at_other_sizes_and_tells_evaluations_apart(tmp_path):
    def recipe(*levels: str):
        return resolve_source(
            evaluations.spair_config("d", tmp_path, levels=("x1", *levels)).source, [(48, 48), (64, 64)], "pad"
        )[0]

    found = recipe("xylo:x2", "fixed:24x24")

    assert [row.grid for row in found.rows((48, 48))] == [(3, 3), (6, 6), (24, 24)]
    assert [row.grid for row in found.rows((64, 64))] == [(4, 4), (8, 8), (24, 24)]
    assert recipe("a:x2").identity() != recipe("a:x4").identity()
    assert recipe("x2").identity()["model"]["levels"][1] == ["x2", "bilinear", "float16", ""]


def test_lines_of_the_bilinear_map_are_called_by_the_scale(tmp_path):
    lift = checkpoint(tmp_path / "lift")
    config = FeatureConfig(
        model="test_vit.r160_in1k",
        weights="random",
        size="64",
        facet="key",
        precision="fp32",
        levels=("x1", f"best:x2=lift:{lift}"),
    )
    bundle, _ = load_bundle(config)
    from pipelines.features.rows import rows_of

    assert [row.name for row in rows_of(bundle.spec.levels, 16, "")] == ["low-res", "bilinear x2", "lift best"]


def test_readouts_are_trained_on_names_and_find_their_maps_under_others(sets, tiny, tmp_path):
    images = sets / "VOC2012/VOCdevkit/VOC2012/JPEGImages"
    plain = extract_images(tiny, tmp_path / "plain.zarr", images, levels=("x1", "x2=nearest"))
    both = extract_images(tiny, tmp_path / "both.zarr", images, levels=("x1", "x2", "depth:x2=nearest"))
    short = {"batch": 2, "micro_batch": 1, "epochs": 1, "max_steps": 2, "checkpoint_every": 2, "validate_every": 2}
    runs = {}
    for name, store, level in (("plain", plain, "x2"), ("named", both, "depth")):
        config = training(sets, tmp_path / name, store=store, level=level, **short)
        train(config)
        runs[name] = config.out

    assert held_out(runs["plain"]) == held_out(runs["named"])
    common = {"data": str(sets / "VOC2012"), "pictures": 0, **TINY}
    for name, url in runs.items():
        config = ProbeConfig.of(readouts=(url,), stores=(both,), out=str(tmp_path / f"probe-{name}"), **common)
        evaluation, _, _ = probe.prepare(config)
        assert [row.level for row in evaluation.rows.values()] == ["depth"]
    config = ProbeConfig.of(readouts=(runs["named"],), stores=(both,), levels=("x1", "x2"), out=str(tmp_path / "p"), **common)
    with pytest.raises(ConfigError, match="was trained on other features|isn't among --levels"):
        probe.prepare(config)
