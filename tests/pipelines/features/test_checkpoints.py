"""Checkpoints of upsamplers beside a backbone: digests, which are in stores' fingerprints, and what doesn't fit."""

import hashlib
import json
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import safetensors.torch
import torch

from operators.timm_models import create_model, state_arrays, weights_digest
from operators.upsamplers import UpsamplerError
from operators.upsamplers.vit_up.head import ViTUpConfig
from operators.upsamplers.vit_up.lora import Lora
from operators.upsamplers.vit_up.method import random_head
from pipelines.features.bundle import load_bundle
from pipelines.features.config import FeatureConfig
from pipelines.features.upsamplers import UpsamplerWeights
from storage.paths import Folder
from storage.spec import FeatureSpec, Use

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
