"""Checkpoints of upsamplers beside a backbone: digests, which are in stores' fingerprints, and what doesn't fit."""

import hashlib
import json
import re
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import safetensors.torch
import torch

from jobs.extract import run
from operators.timm_models import create_model, state_arrays, weights_digest
from operators.upsamplers import UpsamplerError, split_settings
from operators.upsamplers.vit_up.head import ViTUpConfig
from operators.upsamplers.vit_up.lora import Lora
from operators.upsamplers.vit_up.method import random_head
from pipelines.config import ConfigError
from pipelines.executors import InlineExecutor
from pipelines.extraction.plan import make_plan
from pipelines.extraction.prepare import prepare, resolve
from pipelines.extraction.run import extract
from pipelines.features.bundle import load_bundle
from pipelines.features.config import FeatureConfig
from pipelines.features.levels import LevelChoice
from pipelines.features.sources import resolve_source
from pipelines.features.upsamplers import UpsamplerWeights
from pipelines.showing.card import render_card
from storage.paths import Folder
from storage.spec import FeatureSpec, FingerprintMismatch, Use
from storage.store import FeatureStore
from tests.conftest import jpeg, write_tar
from tests.pipelines.evaluation import test_evaluation as evaluations
from tests.pipelines.features.test_learned import checkpoint

NAME, SIZE = "test_vit.r160_in1k", (64, 64)
SETTINGS = ViTUpConfig(channels=64, heads=2, layers=(0, 2, 4, 6), hidden_size=64, query_size=64)


@pytest.fixture
def adapted() -> UpsamplerWeights:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lora = Lora(create_model(NAME, SIZE, None, 0), rank=SETTINGS.rank, alpha=SETTINGS.alpha)
    adapter = {name: tensor.numpy() for name, tensor in lora.peft_state().items()}
    return UpsamplerWeights(method="vit_up", settings=asdict(SETTINGS), arrays={**state_arrays(random_head(SETTINGS)), **adapter})


def test_digest_of_vit_up_is_that_of_what_runs(adapted):
    chosen = {f.name: getattr(SETTINGS, f.name) for f in fields(SETTINGS) if getattr(SETTINGS, f.name) != f.default}
    assert set(chosen) >= {"channels", "heads", "layers", "hidden_size", "query_size"}
    expected = hashlib.sha256(f"{weights_digest(adapted.arrays)} {json.dumps(chosen, sort_keys=True)}".encode()).hexdigest()
    assert adapted.digest == expected
    changed = {name: np.where(name == "decoder_mlp.0.mlp.1.bias", array + 1, array) for name, array in adapted.arrays.items()}
    assert replace(adapted, arrays=changed).digest != expected


def spec(**settings: object) -> FeatureSpec:
    return load_bundle(FeatureConfig(model=NAME, size="64", precision="fp32", levels=("x1",), **settings))[0].spec


def save(weights: UpsamplerWeights, url: str, **settings: object) -> None:
    folder = Folder(url)
    folder.write("model.safetensors", safetensors.torch.save({k: torch.from_numpy(v) for k, v in weights.arrays.items()}))
    chosen = {**weights.settings, **settings}
    described = spec(weights="random").learned()
    folder.write("config.json", json.dumps({"upsampler": {"method": "vit_up", **chosen}, "backbone": described}).encode())


def test_vit_up_deeper_than_its_backbone_is_refused(adapted, tmp_path):
    good, deep = str(tmp_path / "good"), str(tmp_path / "deep")
    save(adapted, good)
    save(adapted, deep, layers=(0, 4, 8, 12))
    config = {"model": NAME, "weights": "random", "size": "64", "precision": "fp32"}

    bundle, _ = load_bundle(FeatureConfig(**config, levels=("x1", f"x4=vit_up:{good}")))
    assert bundle.spec.levels[1].digest == adapted.digest
    with pytest.raises(UpsamplerError, match="doesn't fit a backbone of 64 channels and 6 blocks"):
        load_bundle(FeatureConfig(**config, levels=("x1", f"x4=vit_up:{deep}")))


def test_what_an_upsampler_was_trained_on():
    arrays = state_arrays(create_model(NAME, SIZE, None, 3))

    found = spec(weights="random:3", facet="key", norm=False, layers=(-1, 0)).learned()

    assert json.loads(json.dumps(found)) == found
    first = {"model": NAME, "weights": weights_digest(arrays), "layers": [5, 0], "facet": "key", "norm": False}
    assert {name: found.pop(name) for name in FeatureSpec.names(Use.LEARNED)} == first
    assert found == {
        "stride": 16, "pos_embed": "timm", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "model_args": {}
    }  # fmt: skip


# --- settings that are changed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "method", "settings"),
    [
        ("vit_up:runs/a", "vit_up:runs/a", {}),
        ("vit_up,hidden_size=128:runs/a,b=c:d", "vit_up:runs/a,b=c:d", {"hidden_size": 128}),
        ("vit-up,a=1,b=word,c=[1]:s3://x/y?z=1", "vit-up:s3://x/y?z=1", {"a": 1, "b": "word", "c": [1]}),
        ("lift:runs,a=1", "lift:runs,a=1", {}),
        ("my.module:Class,a=1:runs/a", "my.module:Class:runs/a", {"a": 1}),
        ("my.module:Class:runs,a=1", "my.module:Class:runs,a=1", {}),
        ("bilinear", "bilinear", {}),
        ("", "", {}),
    ],
)
def test_settings_stand_between_a_method_and_its_checkpoint(text, method, settings):
    assert split_settings(text) == (method, settings)


@pytest.mark.parametrize("text", ["vit_up,:a", "vit_up,x:a", "vit_up,x=:a", "vit_up,=1:a", "vit_up,x=1,x=2:a"])
def test_settings_that_are_not_said_as_such_are_refused(text):
    with pytest.raises(UpsamplerError, match="are said once each, as SETTING=VALUE"):
        split_settings(text)
    with pytest.raises(ConfigError, match="^--levels x2=vit_up,.*: settings of vit_up are said once each"):
        LevelChoice.parse(f"x2={text}", "float16")


def features(*levels: str) -> FeatureConfig:
    return FeatureConfig(model=NAME, weights="random", size="64", precision="fp32", levels=levels)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("hidden_size=120", "hidden_size 120: must be a multiple of the backbone's patch of 16 px"),
        ("hidden_size=128,query_size=100", "query_size 100: must be a multiple of the backbone's patch of 16 px"),
        ("hidden_size=0", "hidden_size must be a whole number of at least 1, got 0"),
        ("hidden_size=large", "hidden_size must be a whole number of at least 1, got 'large'"),
        ("heads=1", "heads of a trained vit_up can't be changed: those that can are hidden_size, query_size"),
        ("size=64", "size of a trained vit_up can't be changed: those that can are hidden_size, query_size"),
    ],
)
def test_settings_that_a_checkpoint_can_not_take_are_refused(settings, words, adapted, tmp_path):
    save(adapted, str(tmp_path / "good"))

    with pytest.raises(UpsamplerError, match=f"good: {re.escape(words)}"):
        load_bundle(features(f"x4=vit_up,{settings}:{tmp_path}/good"))


def test_other_methods_have_none(tmp_path):
    lift = checkpoint(tmp_path / "lift")

    with pytest.raises(UpsamplerError, match="channels of a trained lift can't be changed: it has none that can"):
        load_bundle(replace(features(f"x2=lift,channels=64:{lift}"), facet="key"))
    with pytest.raises(ConfigError, match="--levels x2=bilinear,size=3: bilinear has no settings"):
        load_bundle(features("x2=bilinear,size=3"))


def test_changed_settings_are_those_of_a_checkpoint_that_says_them(adapted, tmp_path, make_tars, tiny):
    good, copied = str(tmp_path / "good"), str(tmp_path / "copied")
    save(adapted, good)
    save(adapted, copied, hidden_size=128, query_size=128)
    config = tiny(make_tars(count=1, each=2), levels=("x1", f"x4=vit_up,hidden_size=128:{good}@float32"))
    other = config.changed(levels=("x1", f"x4=vit_up:{copied}@float32"), out=config.out + "-copied")
    plain = config.changed(levels=("x1", f"x4=vit_up:{good}@float32"), out=config.out + "-plain")
    for each in (config, other, plain):
        extract(each, InlineExecutor())

    found, expected, without = (FeatureStore.open(each.out) for each in (config, other, plain))

    note = "other settings than its checkpoint was trained with: hidden_size 128, not 64, query_size 128, not 64"
    assert [each for each in found.root.notes or () if note in each] == [f"x4: its upsampler has {note}"]
    assert not [each for each in (*(without.root.notes or ()), *(expected.root.notes or ())) if "other settings" in each]
    assert found.root.config["levels"][1] == config.features.levels[1]
    assert note in render_card(found, count=0).text.replace("\\", "")
    assert found.spec == expected.spec != without.spec
    np.testing.assert_array_equal(found.read(slice(None), "x4"), expected.read(slice(None), "x4"))
    assert np.abs(found.read(slice(None), "x4") - without.read(slice(None), "x4")).max() > 1e-3
    assert note in make_plan(prepare(resolve(config.changed(out=config.out + "-new")), InlineExecutor())).describe()
    with pytest.raises(FingerprintMismatch, match=r"levels.*digest|x4"):
        extract(config.changed(levels=plain.features.levels), InlineExecutor())


def test_changed_settings_of_a_level_that_is_added(adapted, tmp_path, make_tars, tiny, capsys):
    save(adapted, str(tmp_path / "good"))
    config = tiny(make_tars(count=1, each=2), levels=("x1",))
    extract(config, InlineExecutor())
    argv = ["--out", config.out, "--executor", "inline", "--add-level"]
    level = f"x4=vit_up,hidden_size=128:{tmp_path}/good"

    assert run([*argv, level, "--plan"]) == 0
    assert "hidden_size 128, not 64" in capsys.readouterr().out
    assert run([*argv, level]) == 0
    [added] = FeatureStore.open(config.out).root.added
    assert added.asked == f"{level}@float16"
    assert run([*argv, level]) == 0
    assert "is there already" in capsys.readouterr().out
    assert run([*argv, level.replace(",hidden_size=128", "")]) == 2
    assert "has another level of that name" in capsys.readouterr().err
    extract(config.changed(data=(*config.data, str(write_tar(tmp_path / "more.tar", [("a.jpg", jpeg(7))])))), InlineExecutor())
    assert FeatureStore.open(config.out).read(slice(None), "x4").shape == (3, 16, 16, 64)


def test_changed_settings_in_an_evaluation(adapted, tmp_path):
    save(adapted, str(tmp_path / "good"))

    def recipe(settings: str):
        level = f"x4=vit_up{settings}:{tmp_path}/good"
        return resolve_source(evaluations.spair_config("d", tmp_path, levels=("x1", level)).source, [(64, 64)], "pad")[0]

    changed, plain = recipe(",hidden_size=128"), recipe("")

    assert "hidden_size 128, not 64" in changed.said()["upsamplers"]
    assert "other settings" not in plain.said().get("upsamplers", "")
    assert changed.identity() != plain.identity()
