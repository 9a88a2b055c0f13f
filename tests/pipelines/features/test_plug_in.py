"""The upsamplers of operators/DESIGN.md, "Your own upsampler", are a user's module, and taken wherever one of ours is."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs import benchmark, evaluate, extract, train
from operators.upsamplers import Upsampler, WithoutWeights
from pipelines.demo_datasets import write_demo
from storage.store import FeatureStore

PAGE = (Path(__file__).parents[3] / "operators/DESIGN.md").read_text().partition("## Your own upsampler")[2]
MODULE, CONTRACT = re.findall(r"```python\n(.*?)```", PAGE.partition("\n## ")[0], re.DOTALL)

TINY = ["--model", "test_vit.r160_in1k", "--weights", "random", "--precision", "fp32", "--executor", "inline"]

pytestmark = pytest.mark.usefixtures("my_module", "one_thread")


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
        assert train.run(["debug", "--method", "my_module:Guided", "--out", "guided", "--max-steps", "2"]) == 0
    return out / "guided"


def test_extraction_takes_them(trained, make_tars, tmp_path):
    levels = ["x1", "x2=my_module:Toy", f"x4=my_module:Guided:{trained}@float32"]
    data = ["--data", make_tars(count=1, each=3), "--facet", "key", "--size", "64"]

    assert extract.run([*data, "--out", str(tmp_path / "out.zarr"), "--levels", *levels, *TINY]) == 0

    store = FeatureStore.open(str(tmp_path / "out.zarr"))
    assert [level.method for level in store.spec.levels] == ["backbone", "my_module:Toy", "my_module:Guided"]
    assert [bool(level.digest) for level in store.spec.levels] == [False, False, True]
    low, fine, finest = (store.read(slice(None), name).astype(np.float32) for name in ("x1", "x2", "x4"))
    np.testing.assert_allclose(fine.mean(axis=(1, 2)), low.mean(axis=(1, 2)), atol=0.01)
    assert finest.shape == (3, 16, 16, 64)


def test_a_checkpoint_says_which_method_it_is_of(trained, make_tars, tmp_path, capsys):
    steps = sorted((trained / "steps").iterdir())
    config = json.loads((steps[-1] / "config.json").read_text())
    data = ["--data", make_tars(count=1, each=3), "--facet", "key", "--size", "64", "--out", str(tmp_path / "out.zarr")]

    assert extract.run([*data, "--levels", "x1", f"x2=lift:{trained}", *TINY]) == 2

    assert config["upsampler"] == {"method": "my_module:Guided", "channels": 64, "patch": 16, "hidden": 16}
    assert "holds a my_module:Guided, not a lift" in capsys.readouterr().err


def test_evaluations_take_them(trained, tmp_path):
    write_demo(str(tmp_path / "demo"))
    levels = ["x1", "x2=my_module:Toy", f"x4=my_module:Guided:{trained}"]
    places = ["--data", str(tmp_path / "demo/SPair-71k"), "--out", str(tmp_path / "eval")]

    assert evaluate.run(["correspondence", "debug", "--facet", "key", "--levels", *levels, *places]) == 0

    rows = json.loads((tmp_path / "eval/results.json").read_text())["tables"][0]["lines"]
    assert {"my_module:Toy x2", "my_module:Guided x4"} <= {row["features"] for row in rows}


def test_cost_tables_take_them(trained, tmp_path):
    methods = ["--methods", "my_module:Toy", f"my_module:Guided:{trained}"]
    flags = ["--facet", "key", "--grids", "8", "--repeat", "1", "--out", str(tmp_path / "runtime")]

    assert evaluate.run(["runtime", "debug", *methods, *flags]) == 0
    cost = ["cost", "debug", "--upsamplers", "my_module:Toy", "my_module:Guided", "--precisions", "fp32", "--repeat", "1"]
    assert benchmark.run([*cost, "--json", str(tmp_path / "cost.json")]) == 0

    parameters = 16 * (9 * (64 + 3) + 1) + 64 * (16 + 1)
    timed = json.loads((tmp_path / "runtime/results.json").read_text())["tables"]
    counted = {line["features"]: line["values"][0] for line in timed[1]["lines"]}
    assert counted["my_module:Guided x2"] == pytest.approx(parameters / 1e6)
    rows = json.loads((tmp_path / "cost.json").read_text())["measured"][0]["rows"]
    assert [(row["name"], row["parameters"]) for row in rows[1:]] == [("my_module:Toy", 0), ("my_module:Guided", parameters)]


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
    monkeypatch.setattr(sys.modules["my_module"], "FurtherLayers", FurtherLayers, raising=False)
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
        ("x2=my_module:Toy:weights.pth", "others take none"),
        ("x2=my_module:Guided", "take the URL of a checkpoint"),
    ],
)
def test_what_is_none_of_them_is_refused(level, message, make_tars, tmp_path, capsys):
    data = ["--data", make_tars(count=1, each=3), "--size", "64", "--out", str(tmp_path / "out.zarr")]

    assert extract.run([*data, "--levels", "x1", level, *TINY]) == 2

    assert message in capsys.readouterr().err


def test_a_method_that_lifts_objective_does_not_train_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.run(["debug", "--method", "my_module:Toy", "--out", str(tmp_path / "out")])

    assert "my_module:Toy isn't trained by LiFT's" in capsys.readouterr().err
