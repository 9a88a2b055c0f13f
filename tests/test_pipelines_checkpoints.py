"""Checkpoints of upsamplers beside a backbone: digests, which are in stores' fingerprints, and what doesn't fit."""

import hashlib
import json
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import safetensors.torch
import torch

from operators.backbone import TimmBackbone, create_model, state_arrays, weights_digest
from operators.upsamplers import UpsamplerError
from operators.upsamplers.vit_up import Lora, ViTUpConfig, random_head
from pipelines.features.bundle import load_described
from pipelines.features.config import FeatureConfig
from pipelines.features.upsamplers import TRAINED_ON, UpsamplerWeights, trained_on
from storage.paths import Folder

NAME, SIZE = "test_vit.r160_in1k", (64, 64)
SETTINGS = ViTUpConfig(channels=64, heads=2, layers=(0, 2, 4, 6), hidden_size=64, query_size=64)


@pytest.fixture
def adapted() -> UpsamplerWeights:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lora = Lora(create_model(NAME, SIZE, None, 0), rank=SETTINGS.rank, alpha=SETTINGS.alpha)
    adapter = {name: tensor.numpy() for name, tensor in lora.peft_state().items()}
    return UpsamplerWeights(
        method="vit_up", settings=asdict(SETTINGS), arrays={**state_arrays(random_head(SETTINGS)), **adapter}
    )


def test_digest_of_vit_up_is_that_of_what_runs(adapted):
    chosen = {f.name: getattr(SETTINGS, f.name) for f in fields(SETTINGS) if getattr(SETTINGS, f.name) != f.default}
    assert set(chosen) >= {"channels", "heads", "layers", "hidden_size", "query_size"}
    expected = hashlib.sha256(
        f"{weights_digest(adapted.arrays)} {json.dumps(chosen, sort_keys=True)}".encode()
    ).hexdigest()
    assert adapted.digest == expected
    changed = {
        name: np.where(name == "decoder_mlp.0.mlp.1.bias", array + 1, array) for name, array in adapted.arrays.items()
    }
    assert replace(adapted, arrays=changed).digest != expected


def save(weights: UpsamplerWeights, url: str, **settings: object) -> None:
    folder = Folder(url)
    folder.write(
        "model.safetensors", safetensors.torch.save({k: torch.from_numpy(v) for k, v in weights.arrays.items()})
    )
    chosen = {**weights.settings, **settings}
    backbone = TimmBackbone(create_model(NAME, SIZE, None, 0), facet="token")
    described = trained_on(NAME, state_arrays(create_model(NAME, SIZE, None, 0)), backbone, (-1,))
    folder.write(
        "config.json", json.dumps({"upsampler": {"method": "vit_up", **chosen}, "backbone": described}).encode()
    )


def test_vit_up_deeper_than_its_backbone_is_refused(adapted, tmp_path):
    good, deep = str(tmp_path / "good"), str(tmp_path / "deep")
    save(adapted, good)
    save(adapted, deep, layers=(0, 4, 8, 12))
    config = {"model": NAME, "weights": "random", "size": "64", "precision": "fp32"}

    bundle, _ = load_described(FeatureConfig(**config, levels=("x1", f"x4=vit_up:{good}")))
    assert bundle.spec.levels[1].digest == adapted.digest
    with pytest.raises(UpsamplerError, match="doesn't fit a backbone of 64 channels and 6 blocks"):
        load_described(FeatureConfig(**config, levels=("x1", f"x4=vit_up:{deep}")))


def test_what_an_upsampler_was_trained_on():
    model = create_model(NAME, SIZE, None, 3)
    arrays = {name: value.copy() for name, value in state_arrays(model).items()}

    found = trained_on(NAME, arrays, TimmBackbone(model, facet="key", norm=False), (-1, 0))

    assert tuple(found) == TRAINED_ON
    assert json.loads(json.dumps(found)) == found
    assert found == {"model": NAME, "weights": weights_digest(arrays), "layers": [5, 0], "facet": "key", "norm": False}
