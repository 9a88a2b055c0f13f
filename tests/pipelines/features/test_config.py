"""What makes features is declared once, and says of each of its fields whether results depend on it; who holds other features
is refused: a store, an upsampler, a readout, a run that was begun with others.
"""

import importlib
import inspect
import json
import pkgutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace

import pytest
import safetensors.torch

import pipelines
from operators.upsamplers import UpsamplerError, build_net
from pipelines.config import ClusterConfig, ConfigError, Identity, JobConfig, SessionConfig, settings_of
from pipelines.evaluation import readouts as probe
from pipelines.evaluation.readouts import ProbeConfig
from pipelines.executors import InlineExecutor
from pipelines.extraction.prepare import prepare, resolve
from pipelines.extraction.run import extract
from pipelines.features.bundle import load_bundle
from pipelines.features.config import BackboneConfig, FeatureConfig, completed
from pipelines.features.upsamplers import load_upsampler
from pipelines.training.lift import X2Config
from storage.paths import Folder
from storage.spec import FeatureSpec, FingerprintMismatch, Use
from tests.readout_runs import TINY, train, training

COUNTS, FOUND, FREE = Identity.COUNTS, Identity.FOUND, Identity.FREE

FEATURES = {
    "model": COUNTS, "weights": FOUND, "revision": FOUND, "precision": COUNTS, "layers": COUNTS, "facet": COUNTS,
    "norm": COUNTS, "pos_embed": COUNTS, "stride": COUNTS, "ragged": COUNTS, "force_upsampler": COUNTS, "encoding": COUNTS,
    "levels": COUNTS, "size": COUNTS, "geometry": COUNTS, "crop_pct": COUNTS, "jpeg_draft": COUNTS,
    "jpeg_decoder": COUNTS,
}  # fmt: skip
WHERE = ("storage_options", "executor", "ray_address", "device", "actors", "actor_cpus", "actor_gpus", "accelerator")
CLUSTER = dict.fromkeys(WHERE, FREE)
SPEC = {
    "model": Use.LEARNED, "weights": Use.LEARNED, "weights_source": Use.NUMBERS, "layers": Use.LEARNED,
    "facet": Use.LEARNED, "norm": Use.LEARNED, "stride": Use.LEARNED_LATER, "pos_embed": Use.LEARNED_LATER,
    "input_size": Use.PLACED, "geometry": Use.PLACED, "crop_pct": Use.PLACED, "interpolation": Use.NUMBERS,
    "mean": Use.LEARNED_LATER, "std": Use.LEARNED_LATER, "precision": Use.NUMBERS, "jpeg_draft": Use.PLACED,
    "levels": Use.NUMBERS, "model_args": Use.LEARNED_LATER, "compiled": Use.NUMBERS, "jpeg_decoder": Use.NUMBERS,
}  # fmt: skip

OTHERS: dict[str, object] = {
    "model": "test_vit2.r160_in1k", "weights": "random:5", "precision": "bf16", "layers": (2,), "facet": "key", "norm": False,
    "pos_embed": "dino", "stride": 8, "encoding": "float32", "levels": ("x1", "x2=bicubic", "pooled"), "size": "96",
    "geometry": "squash", "crop_pct": 0.5, "jpeg_draft": True, "jpeg_decoder": "nvjpeg",
}  # fmt: skip
"""Another value of each field that changes what features of 64 px by test_vit are."""

SAME: dict[str, object] = {"ragged": True, "force_upsampler": True}
"""Fields that allow for something, or choose among what isn't there: alone, they change no feature of these."""

LEARNED = ("model", "weights", "layers", "facet", "norm", "pos_embed", "stride")
"""Those of OTHERS that who learned from features depends on."""


def classes() -> Iterator[type]:
    """Every dataclass of pipelines/ that is, or may be held by, the settings of a job."""
    for module in pkgutil.walk_packages(pipelines.__path__, "pipelines."):
        for found in vars(importlib.import_module(module.name)).values():
            if is_dataclass(found) and isinstance(found, type) and found.__module__ == module.name:
                yield found


JOBS = [each for each in classes() if issubclass(each, JobConfig) and each is not JobConfig]


def test_table_of_all_fields():
    assert {name: setting.identity for name, setting in settings_of(FeatureConfig).items()} == FEATURES
    assert {name: setting.identity for name, setting in settings_of(ClusterConfig).items()} == CLUSTER
    assert {f.name: use for f in fields(FeatureSpec) for use in Use if f.name in FeatureSpec.names(use)} == SPEC
    assert OTHERS.keys() | SAME.keys() | {"revision"} == FEATURES.keys()  # of the hub, which no test asks


@pytest.mark.parametrize("kind", JOBS, ids=lambda kind: kind.__name__)
def test_every_setting_of_a_job_says_whether_it_counts(kind):
    known = settings_of(kind)

    assert [name for name, setting in known.items() if setting.identity is None] == []
    assert len(known) > len(CLUSTER) / 2
    for name, setting in known.items():
        if setting.path[0] in ("features", "cluster"):
            assert setting.identity is (FEATURES | CLUSTER)[name]


def test_no_field_is_declared_twice():
    """Neither by its attribute nor, among the settings of jobs, by its flag. Of a job that makes no features, a flag of the same
    name says something else: ViTDet's --model is a size, and --weights is what its training starts from."""
    groups = [each for each in classes() if issubclass(each, SessionConfig | BackboneConfig | JobConfig)]
    parts = {base for each in groups for base in each.__mro__ if is_dataclass(base)}
    featureless = {kind for kind in JOBS if "features" not in {each.name for each in fields(kind)}}
    declared = Counter(
        name
        for part in parts
        for name in inspect.get_annotations(part)
        if name in CLUSTER or not any(issubclass(kind, part) for kind in featureless)
    )

    assert len(parts) > 20
    assert {name: declared[name] for name in FEATURES | CLUSTER} == dict.fromkeys(FEATURES | CLUSTER, 1)


def test_a_flag_names_one_setting():
    for kind in JOBS:
        paths = [setting.path for setting in settings_of(kind).values()]
        own = [f for f in fields(kind) if f.name != "given"]
        held = [f for f in own if f.name in ("features", "cluster", "input")]
        groups = sum(len(settings_of(type(f.default))) for f in held)
        assert len(set(paths)) == len(paths) == len(own) - len(held) + groups


def test_settings_are_given_and_saved_flat():
    config = X2Config.of(model="a", size=64, executor="inline", features="stored", jitter=0.0)

    assert (config.features.model, config.features.size, config.features.facet) == ("a", 64, "key")
    assert (config.cluster.executor, config.stored) == ("inline", "stored")
    assert config.changed(model="b").public() == config.public() | {"model": "b"}
    assert config.public()["features"] == "stored"
    with pytest.raises(TypeError, match="X2Config has no setting levels"):
        X2Config.of(levels=("x1",))


# --- who holds other features is refused --------------------------------------------------------------------------------


@pytest.fixture
def store(make_tars, tiny):
    config = tiny(make_tars(1, 4), levels=("x1", "x2", "pooled"))
    extract(config, InlineExecutor())
    return config


def test_a_store_is_refused(store):
    for name, value in OTHERS.items():
        with pytest.raises(FingerprintMismatch, match=r"different features .*\n  \S+ +store .* run "):
            prepare(resolve(store.changed(**{name: value})), InlineExecutor())
    for name, value in SAME.items():
        prepare(resolve(store.changed(**{name: value})), InlineExecutor())


BASE = FeatureConfig(model="test_vit.r160_in1k", weights="random", size="64", precision="fp32", levels=("x1",))


@pytest.fixture(scope="module")
def upsampler(tmp_path_factory) -> str:
    """A LiFT that says of which features it learned."""
    spec, folder = load_bundle(BASE)[0].spec, Folder(str(tmp_path_factory.mktemp("lift")))
    settings = {"method": "lift", "channels": 64, "patch": 16}
    folder.write("model.safetensors", safetensors.torch.save(build_net(settings).state_dict()))
    saved = {"upsampler": settings, "backbone": spec.learned()}
    folder.write("config.json", json.dumps(saved).encode())
    return folder.url


def test_an_upsampler_is_refused(upsampler):
    level = f"x2=lift:{upsampler}"
    for name, value in OTHERS.items():
        features = replace(BASE, **{name: value}) if name != "levels" else replace(BASE, levels=("x1", "x4=bicubic"))
        features = replace(features, levels=(*features.levels, level))
        if name not in LEARNED:
            assert load_bundle(features)[0].spec.levels[-1].digest
            continue
        with pytest.raises(UpsamplerError, match=rf"  {name} +trained on .* used with (.*\n)+.*--force-upsampler"):
            load_bundle(features)


def test_an_upsampler_is_refused_by_all_that_the_spec_knows(upsampler):
    bundle, model = load_bundle(BASE)
    others = {"mean": (0.1, 0.1, 0.1), "std": (0.2, 0.2, 0.2), "model_args": {"num_heads": 4}, "stride": 8}
    for name, value in others.items():
        with pytest.raises(UpsamplerError, match=rf"  {name}.* +trained on .* used with "):
            load_upsampler("lift", upsampler, model.backbone, replace(bundle.spec, **{name: value}))


def test_a_readout_and_its_run_are_refused(sets, tmp_path):
    config = training(sets, tmp_path / "run", max_steps=1, epochs=1)
    train(config)
    for name in LEARNED:
        asked = {**TINY, name: OTHERS[name]}
        judged = ProbeConfig.of(data=f"{sets}/VOC2012", out=str(tmp_path / "out"), readouts=(config.out,), **asked)
        with pytest.raises(ConfigError, match=rf"trained on other features:\n(.*\n)*  {name} +trained on .* now "):
            probe.prepare(judged)
    for name, setting in settings_of(type(config)).items():
        if setting.path[0] == "features" and name not in ("size", "revision"):
            other = OTHERS.get(name, SAME.get(name))
            with pytest.raises(ConfigError, match=rf"other settings:\n(.*\n)*  (features\.)?{name} +run .* now "):
                config.changed(**{name: other}).resolve().prepare(InlineExecutor())


def test_a_run_that_learns_features_is_refused(make_tars, tmp_path):
    settings = {"data": (make_tars(1, 4),), "val_rows": 1, "size": 64, "batch": 1, **TINY}
    config = X2Config.of(method="resize_conv", out=str(tmp_path / "run"), **settings)
    config.resolve().prepare(InlineExecutor())
    others = {**OTHERS, "size": 128, "facet": "query", "geometry": "pad"}
    for name, setting in settings_of(X2Config).items():
        if setting.path[0] == "features" and name != "revision":
            with pytest.raises(ConfigError, match=rf"other settings:\n(.*\n)*  (backbone\.)?{name} +run .* now "):
                config.changed(**{name: others[name]}).resolve().prepare(InlineExecutor())
    config.changed(device="auto", loaders=1).resolve().prepare(InlineExecutor())


def test_parts_are_completed_with_the_defaults_of_the_rest():
    part = X2Config.features

    whole = completed(part, size=str(part.size), levels=("x1",))

    assert (whole.facet, whole.geometry, whole.size, whole.levels) == ("key", "squash", "448", ("x1",))
    assert (whole.stride, whole.encoding, whole.crop_pct) == (None, "float16", 1.0)


def test_what_crop_pct_would_not_change_is_refused():
    with pytest.raises(ConfigError, match=r"--crop-pct 0.875 is for --geometry crop; --geometry squash shows the whole image"):
        FeatureConfig(geometry="squash", crop_pct=0.875)
