"""LiFT on the backbone of a detector: squares whose upper left shows the image, and nothing learned of the rest."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from operators.backbone import BackboneError
from operators.objectives.shown import ShownBatchNorm2d
from operators.upsamplers import UpsamplerError
from operators.vitdet.checkpoint import described
from operators.vitdet.detector import Detector
from operators.vitdet.settings import DetectorError
from pipelines.config import ConfigError
from pipelines.executors import InlineExecutor
from pipelines.extraction.config import ExtractConfig
from pipelines.extraction.run import extract
from pipelines.features.bundle import load_bundle
from pipelines.features.detectors import load_detector, load_upsampler_net
from pipelines.training.data import Example, Loaded
from pipelines.training.jafar import JafarTraining
from pipelines.training.lift import X2Config
from pipelines.training.loop import Group, Trainer
from pipelines.training.run import main, train_inline
from storage.paths import Folder
from storage.runs import Checkpoint, write_checkpoint
from storage.spec import FeatureSpec
from storage.store import FeatureStore
from tests.readout_runs import prepared
from tests.vitdet_goldens import TINY


def detector(seed: int) -> dict[str, np.ndarray]:
    torch.manual_seed(seed)
    return {name: value.numpy() for name, value in Detector(TINY).state_dict().items()}


@pytest.fixture
def official(tmp_path) -> Path:
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": detector(0), "__author__": "a test"}))
    return path


@pytest.fixture
def on_detector(tmp_path, make_tars, official):
    """Training of LiFT for ViTDet on images of 96 x 64 px."""
    data = make_tars(count=1, each=7)

    def make(**changes: object) -> X2Config:
        values: dict[str, object] = {
            "method": "lift", "image_width": 8, "image_convs": 1, "pairs": 1, "lower": "resized", "data": (data,),
            "out": str(tmp_path / "lift"), "val_rows": 2, "model": "vitdet_base", "weights": str(official), "size": 64,
            "geometry": "corner", "facet": "token", "precision": "fp32", "batch": 3, "epochs": 1, "checkpoint_every": 1,
            "validate_every": 2, "executor": "inline", "device": "cpu",
        }  # fmt: skip
        return X2Config.of(**{**values, **changes})

    return make


def test_padding_changes_neither_the_loss_nor_what_is_learned(on_detector):
    setup = prepared(on_detector())
    item = next(setup.order.micro_batches(0))
    arrays = setup.images.load(item.rows, 0).arrays
    heights, widths = arrays["shown"].T
    assert (np.minimum(heights, widths) < 64).all()
    noisy = arrays["pixels"].copy()
    for pixels, height, width in zip(noisy, heights, widths, strict=True):
        pixels[height:], pixels[:, width:] = 7, 250

    found = []
    for pixels in (arrays["pixels"], noisy):
        objective = setup.objective(torch.device("cpu"))
        objective.net.train()
        example = Example(arrays={**arrays, "pixels": pixels}, failed={})
        total, n = objective.accumulate(Loaded(item=item, example=example))
        statistics = {name: value for name, value in objective.net.state_dict().items() if "running" in name}
        found.append((total / n, statistics, [each.grad for each in objective.net.parameters()]))

    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert 0 < found[0][0] < 2
    assert any(isinstance(layer, ShownBatchNorm2d) for layer in objective.net.modules())


def test_a_trained_lift_goes_on_and_is_used_with_that_detector_alone(on_detector, make_tars, official, tmp_path):
    config = on_detector()
    said = "\n".join(main(config.changed(out=str(tmp_path / "whole"))))
    assert f"vitdet-lift-coco --weights {official} --upsampler lift:{tmp_path}/whole/steps/00000002" in said
    Trainer(prepared(config.changed(max_steps=1)), Group(), torch.device("cpu")).run(InlineExecutor())
    train_inline(prepared(config))
    data, name = config.data, "steps/00000002/model.safetensors"
    assert (tmp_path / "lift" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    def store(weights: Path, out: str) -> ExtractConfig:
        levels = ("x1", f"x2=lift:{config.out}")
        return ExtractConfig.of(
            data=data, out=str(tmp_path / out), model="vitdet_base", weights=str(weights), size="64", geometry="corner",
            levels=levels, precision="fp32", executor="inline",
        )  # fmt: skip

    assert extract(store(official, "feats.zarr"), InlineExecutor()).ok == 7
    spec = FeatureStore.open(str(tmp_path / "feats.zarr")).spec
    assert [level.grid for level in spec.levels] == [(4, 4), (8, 8)]
    assert (spec.geometry, spec.interpolation, spec.norm) == ("corner", "bilinear", False)

    other = tmp_path / "other.pkl"
    other.write_bytes(pickle.dumps(detector(1)))
    with pytest.raises(UpsamplerError, match=r"(?s)trained on other features.*weights"):
        extract(store(other, "other.zarr"), InlineExecutor())
    assert load_upsampler_net(f"lift:{config.out}", load_detector(str(official))).method == "lift"
    with pytest.raises(DetectorError, match=r"trained on other maps .* whose backbone has other weights; give"):
        load_upsampler_net(f"lift:{config.out}", load_detector(str(other)))


def test_the_folder_of_a_detectors_training_stands_for_its_best_checkpoint(tmp_path):
    """The same features as those of its published form; and those of a detector whose tensors don't tell its windows."""
    for name, settings in (("run", TINY), ("one_size", replace(TINY, window=4))):
        torch.manual_seed(0)
        model = {name: value.numpy() for name, value in Detector(settings).state_dict().items()}
        checkpoint = Checkpoint(step=1, model=model, resume={}, progress={}, config=described(settings))
        write_checkpoint(Folder(str(tmp_path / name)), checkpoint, 1.0)
    published = tmp_path / "published.pkl"
    published.write_bytes(pickle.dumps(detector(0)))

    def loaded(weights: Path, model: str = "vitdet_base") -> FeatureSpec:
        config = ExtractConfig.of(model=model, weights=str(weights), size="64", levels=("x1",), precision="fp32")
        return load_bundle(config.features)[0].spec

    assert loaded(tmp_path / "run") == loaded(published)
    assert loaded(tmp_path / "one_size").model_args["window"] == 4
    with pytest.raises(BackboneError, match=r"is a detector's, whose backbone is a ViTDet; --model is test_vit"):
        loaded(tmp_path / "run/steps/00000001", "test_vit.r160_in1k")


def test_objectives_that_would_learn_padding_refuse_corners():
    with pytest.raises(ConfigError, match=r"--geometry corner: .* doesn't leave padding out of its loss"):
        JafarTraining.of(method="jafar", geometry="corner")
