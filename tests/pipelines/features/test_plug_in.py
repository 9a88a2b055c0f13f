"""The upsamplers of operators/DESIGN.md, "Your own upsampler", are a user's module, and taken wherever one of ours is."""

import json
import re
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs import benchmark, evaluate, extract, train
from operators.upsamplers import Upsampler, WithoutWeights
from operators.upsamplers.protocol import tiled_area
from pipelines.demo_datasets import write_demo
from storage.store import FeatureStore

PAGE = (Path(__file__).parents[3] / "operators/DESIGN.md").read_text().partition("## Your own upsampler")[2]
MODULE, CONTRACT = re.findall(r"```python\n(.*?)```", PAGE.partition("\n## ")[0], re.DOTALL)

TINY = ["--model", "test_vit.r160_in1k", "--weights", "random", "--precision", "fp32", "--executor", "inline"]

pytestmark = pytest.mark.usefixtures("my_module")


@pytest.fixture(scope="module")
def my_module(tmp_path_factory):
    """The page's module, in a folder of the import path."""
    folder = tmp_path_factory.mktemp("plug_in")
    (folder / "my_module.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    sys.modules.pop("my_module", None)


found: dict[str, type] = {}
exec(CONTRACT, found)  # what the page says to write
TestMine = found["TestMine"]


@pytest.fixture(scope="module")
def trained(my_module, tmp_path_factory):
    """A run of one epoch on the demo's photos."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        assert train.run(["debug", "--method", "my_module:LearnedGuide", "--out", "guided", "--max-steps", "2"]) == 0
    return out / "guided"


def test_the_filter_is_the_published_one():
    """Per window, by NumPy: least squares with a penalty, and every window's line averaged at each cell."""
    random, cells, eps = np.random.default_rng(0), (5, 7), 0.1
    guide, maps = random.normal(size=(3, *cells)), random.normal(size=(4, *cells))
    slopes, offsets = np.zeros((3, 4, *cells)), np.zeros((4, *cells))
    windows = {(y, x): np.s_[:, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2] for y in range(cells[0]) for x in range(cells[1])}
    for (y, x), window in windows.items():
        colours, values = guide[window].reshape(3, -1), maps[window].reshape(4, -1)
        centred = colours - colours.mean(axis=1, keepdims=True)
        slope = np.linalg.solve(centred @ centred.T + eps * colours.shape[1] * np.eye(3), centred @ values.T)
        slopes[:, :, y, x], offsets[:, y, x] = slope, values.mean(axis=1) - colours.mean(axis=1) @ slope
    expected = np.empty_like(maps)
    for (y, x), window in windows.items():
        line = slopes[:, *window].mean(axis=(2, 3))
        expected[:, y, x] = guide[:, y, x] @ line + offsets[window].mean(axis=(1, 2))

    made = import_module("my_module").filtered(torch.tensor(guide)[None], torch.tensor(maps)[None], eps)

    np.testing.assert_allclose(made[0], expected, atol=1e-6)


def test_what_is_linear_in_the_image_has_its_edges():
    """A map whose cells are the image's means over them comes back as sharp as the image, which interpolation doesn't give."""
    image = torch.zeros(1, 3, 64, 64)
    image[..., 21:] = 1  # an edge within a cell of 16 pixels
    maps = torch.nn.functional.adaptive_avg_pool2d(image, 4)
    filtered = import_module("my_module").filtered

    sharp, blurred = (filtered(image, maps, eps)[0, 0, 32] for eps in (1e-6, 1e6))

    assert (sharp[:21].max(), sharp[21:].min()) == pytest.approx((0, 1), abs=0.02)
    assert blurred[20] > 0.2


def test_extraction_takes_them(trained, make_tars, tmp_path):
    levels = ["x1", "x2=my_module:Guided", "7x10=my_module:Guided", f"x4=my_module:LearnedGuide:{trained}@float32"]
    data = ["--data", make_tars(count=1, each=3), "--facet", "key", "--size", "64"]

    assert extract.run([*data, "--out", str(tmp_path / "out.zarr"), "--levels", *levels, *TINY]) == 0

    store = FeatureStore.open(str(tmp_path / "out.zarr"))
    methods = ["backbone", "my_module:Guided", "my_module:Guided", "my_module:LearnedGuide"]
    assert [level.method for level in store.spec.levels] == methods
    assert [bool(level.digest) for level in store.spec.levels] == [False, False, False, True]
    low, fine, finest = (store.read(slice(None), name).astype(np.float32) for name in ("x1", "x2", "x4"))
    assert np.abs(fine.mean(axis=(1, 2)) - low.mean(axis=(1, 2))).max() < 0.1 < low.std()
    assert finest.shape == (3, 16, 16, 64)
    assert store.read(slice(None), "7x10").shape == (3, 7, 10, 64)


def test_overlapping_patches_are_guided_by_the_part_of_the_image_that_they_tile(make_tars, tmp_path):
    """The patches of 16 pixels, 8 apart, of an image of 64 have 7 x 8 pixels' worth of cells in its middle."""
    data = ["--data", make_tars(count=1, each=2), "--size", "64", "--stride", "8", "--out", str(tmp_path / "out.zarr")]
    seen = []
    filtered = import_module("my_module").filtered

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("my_module"), "filtered", lambda *given: seen.append(given[0]) or filtered(*given))
        patch.setattr(import_module("my_module"), "tiled_area", lambda *given: seen.append(tiled_area(*given)) or seen[-1])
        assert extract.run([*data, "--levels", "x1", "x2=my_module:Guided", *TINY]) == 0

    assert {tuple(guide.shape[-2:]) for guide in seen[::2]} == {(56, 56)}
    assert {tuple(guide.shape[-2:]) for guide in seen[1::2]} == {(14, 14)}


def test_a_checkpoint_says_which_method_it_is_of(trained, make_tars, tmp_path, capsys):
    steps = sorted((trained / "steps").iterdir())
    config = json.loads((steps[-1] / "config.json").read_text())
    data = ["--data", make_tars(count=1, each=3), "--facet", "key", "--size", "64", "--out", str(tmp_path / "out.zarr")]

    assert extract.run([*data, "--levels", "x1", f"x2=lift:{trained}", *TINY]) == 2

    assert config["upsampler"] == {"method": "my_module:LearnedGuide", "channels": 64, "patch": 16, "hidden": 16}
    assert "holds a my_module:LearnedGuide, not a lift" in capsys.readouterr().err


def test_evaluations_take_them_live_and_from_a_store(trained, tmp_path):
    """From extraction to PCK: a store scores as the model that made it."""
    write_demo(str(tmp_path / "demo"))
    data, levels = tmp_path / "demo/SPair-71k", ["x1", "x2=my_module:Guided", f"x4=my_module:LearnedGuide:{trained}"]
    made = ["--facet", "key", "--levels", *(f"{level}@float32" for level in levels), *TINY]
    pad = ["--geometry", "pad", "--size", "64", "--out", str(tmp_path / "pad.zarr")]
    assert extract.run(["--data", str(data / "JPEGImages"), *pad, *made]) == 0
    rules = ["correspondence", "--data", str(data), "--pictures", "0", "--executor", "inline"]
    live = ["--sizes", "64", "--drawing", "extract", *made]

    assert evaluate.run([*rules, *live, "--out", str(tmp_path / "live")]) == 0
    assert evaluate.run([*rules, "--stores", str(tmp_path / "pad.zarr"), "--out", str(tmp_path / "stored")]) == 0

    lines, again = (json.loads((tmp_path / out / "results.json").read_text())["tables"][0]["lines"] for out in ("live", "stored"))
    assert lines == again
    scores = {line["features"]: line["values"][0] for line in lines}
    assert scores.keys() >= {"low-res", "bilinear x2", "my_module:Guided x2", "my_module:LearnedGuide x4"}
    assert len({*scores.values()}) > 1


def test_cost_tables_take_them(trained, tmp_path):
    methods = ["--methods", "my_module:Guided", f"my_module:LearnedGuide:{trained}"]
    flags = ["--facet", "key", "--grids", "8", "--repeat", "1", "--out", str(tmp_path / "runtime")]

    assert evaluate.run(["runtime", "debug", *methods, *flags]) == 0
    cost = [
        "cost",
        "debug",
        "--upsamplers",
        "my_module:Guided",
        "my_module:LearnedGuide",
        "--precisions",
        "fp32",
        "--repeat",
        "1",
    ]
    assert benchmark.run([*cost, "--json", str(tmp_path / "cost.json")]) == 0

    parameters = 16 * (9 * 3 + 1) + 3 * (16 + 1)
    timed = json.loads((tmp_path / "runtime/results.json").read_text())["tables"]
    counted = {line["features"]: line["values"][0] for line in timed[1]["lines"]}
    assert counted["my_module:LearnedGuide x2"] == pytest.approx(parameters / 1e6)
    rows = json.loads((tmp_path / "cost.json").read_text())["measured"][0]["rows"]
    assert [(row["name"], row["parameters"]) for row in rows[1:]] == [
        ("my_module:Guided", 0),
        ("my_module:LearnedGuide", parameters),
    ]


class Difference(Upsampler):
    """The last block's map less the first's, enlarged: it reads a block that isn't stored."""

    layers = (0,)

    def __call__(self, images_BCHW, features, layers, grid):
        less = features.stacked(layers) - features.layers[0]
        return torch.nn.functional.interpolate(less, grid, mode="bilinear")

    def peak_bytes(self, batch, channels, grid):
        return 4 * 4 * batch * channels * grid[0] * grid[1]


class FurtherLayers(WithoutWeights):
    def make(self):
        return Difference()


def test_further_layers_are_asked_of_the_backbone(make_tars, tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("my_module"), "FurtherLayers", FurtherLayers, raising=False)
    flags = ["--data", make_tars(count=1, each=3), "--size", "64", "--norm", "False", *TINY]
    outs = {"one": ["x1", "4x4=my_module:FurtherLayers"], "two": ["x1"]}
    layers = {"one": ["-1"], "two": ["0", "-1"]}

    for name, levels in outs.items():
        out = str(tmp_path / f"{name}.zarr")
        assert extract.run([*flags, "--out", out, "--levels", *levels, "--layers", *layers[name]]) == 0

    made = FeatureStore.open(str(tmp_path / "one.zarr")).read(slice(None), "4x4").astype(np.float32)
    both = FeatureStore.open(str(tmp_path / "two.zarr")).read(slice(None), "x1").astype(np.float32)
    np.testing.assert_allclose(made, both[..., 64:] - both[..., :64], atol=0.02)


@pytest.mark.parametrize(
    ("level", "message"),
    [
        ("x2=my_module:Nothing", "my_module has no class Nothing that is a Method"),
        ("x2=no_such_module:Toy", "no_such_module can't be imported here"),
        ("x2=my_module:Guided:weights.pth", "others take none"),
        ("x2=my_module:LearnedGuide", "take the URL of a checkpoint"),
        ("2x2=my_module:Guided", "my_module:Guided gives at least the backbone's 4x4 cells, not 2x2"),
    ],
)
def test_what_is_none_of_them_is_refused(level, message, make_tars, tmp_path, capsys):
    data = ["--data", make_tars(count=1, each=3), "--size", "64", "--out", str(tmp_path / "out.zarr")]

    assert extract.run([*data, "--levels", "x1", level, *TINY]) == 2

    assert message in capsys.readouterr().err


def test_a_method_that_lifts_objective_does_not_train_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.run(["debug", "--method", "my_module:Guided", "--out", str(tmp_path / "out")])

    assert "my_module:Guided isn't trained by LiFT's" in capsys.readouterr().err
