"""Small training runs, of readouts above all, for tests of training and evaluation: drawn data sets, timm's test_vit, no Ray."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from operators.upsamplers.featup import FeatUpNet
from pipelines.demo_datasets import scene, write_demo
from pipelines.executors import InlineExecutor
from pipelines.extraction.prepare import prepare, resolve
from pipelines.extraction.run import run_prepared
from pipelines.training.config import TrainConfig
from pipelines.training.loop import read_metrics
from pipelines.training.readout import ReadoutTraining
from pipelines.training.run import TrainSummary, train_inline
from storage.paths import Folder
from storage.runs import Checkpoint, read_last
from tests.stops import Died, dies_after

TINY = {"model": "test_vit.r160_in1k", "weights": "random", "precision": "fp32", "executor": "inline", "device": "cpu"}

OF_TASK: dict[str, dict[str, object]] = {
    "segmentation": {"dataset": "voc", "data": "VOC2012"},
    "depth": {"dataset": "nyu", "data": "NYU", "placement": "squash"},
    "boundaries": {"dataset": "coco", "data": "coco"},
    # Objects are found where boxes are large; the demo's images show one or two.
    "detection": {"dataset": "coco", "data": "coco", "side": 112},
    "instances": {"dataset": "coco", "data": "coco", "samples": 256, "large_area": 100.0, "many": 1},
}
"""Settings that go with a task; `data` lies in the folder of `write_sets`."""


def write_sets(root: Path) -> Path:
    """The demo's data sets, and two splits of an NYUv2 of PNGs."""
    write_demo(str(root))
    sizes = {"train": ((96, 72), (72, 96), (80, 80), (81, 53), (96, 64)), "val": ((640, 480), (80, 60), (64, 81))}
    for split, of_split in sizes.items():
        for i, (width, height) in enumerate(of_split):
            box = (width // 4 + i, height // 5, width // 2 + 3 * i, height // 2 + 2 * i)
            write_nyu(root / "NYU", split, f"{i:05d}", scene(width, height, [box], i), depth_of(width, height, box))
    return root


def write_nyu(root: Path, split: str, name: str, pixels: np.ndarray, metres: np.ndarray) -> None:
    """One frame: a JPEG, and a PNG of 16 bits, 5,000 a metre."""
    for folder in ("images", "depth"):
        (root / folder / split).mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(root / f"images/{split}/{name}.jpg", quality=95)
    Image.fromarray((metres * 5000).astype(np.uint16)).save(root / f"depth/{split}/{name}.png")


def depth_of(width: int, height: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """Metres [height, width]: a slope from 2 to 5 with a nearer box, a band of none, and a corner beyond the limit of 10."""
    y, _ = np.mgrid[0:height, 0:width]
    depth = 5 - 3 * y / height
    x1, y1, x2, y2 = box
    depth[y1:y2, x1:x2] = 1.0
    depth[height // 2 : height // 2 + height // 10] = 0
    depth[-height // 8 :, : width // 8] = 12
    return depth


def training(sets: Path, out: Path | str, task: str = "segmentation", **changes: object) -> ReadoutTraining:
    """A run of 6 images (depth: 5) in 3 epochs of 2 steps, at 64 px."""
    values: dict[str, object] = {
        **TINY,
        "task": task,
        "out": str(out),
        "side": 64,
        "size": 64,
        "batch": 4,
        "epochs": 3,
        "lr": 1e-2,
        "log_every": 1,
        "checkpoint_every": 2,
        "validate_every": 4,
        **OF_TASK[task],
        **changes,
    }
    values["data"] = str(sets / str(values["data"]))
    return ReadoutTraining.of(**values)


def prepared(config: TrainConfig, on_step=None):
    return replace(config.resolve().prepare(InlineExecutor()), on_step=on_step)


def train(config: TrainConfig, on_step=None) -> TrainSummary:
    return train_inline(prepared(config, on_step))


def continued(whole: TrainConfig, broken: TrainConfig, stops: Sequence[int]) -> Checkpoint:
    """The last checkpoint of a run that is killed after each of `stops`, and continued; the same as the uninterrupted one's, bit
    for bit, what it resumes from included."""
    train(whole)
    for step in stops:
        with pytest.raises(Died):
            train(broken, dies_after(step))
    train(broken)

    expected, found = read_last(Folder(whole.out)), read_last(Folder(broken.out))
    assert expected is not None
    assert found is not None
    for there, here in ((expected.model, found.model), (expected.resume, found.resume)):
        assert there.keys() == here.keys()
        for name in there:
            np.testing.assert_array_equal(there[name], here[name], err_msg=name)
    assert losses(broken.out) == losses(whole.out)
    return found


def losses(out: str) -> list[float]:
    return [line["loss"] for line in read_metrics(Folder(out)) if "loss" in line]


def held_out(out: str) -> dict[str, float]:
    """The last scores of the held-out images."""
    lines = [line for line in read_metrics(Folder(out)) if "val_loss" in line]
    return {name.removeprefix("val_"): value for name, value in lines[-1].items() if name.startswith("val_")}


def extract(tiny, url: Path, images: Path, **changes: object) -> str:
    """A store of a folder of images, one image a forward."""
    settings = {"size": "64", "geometry": "crop", "crop_pct": 1.0, "levels": ("x1",), "batch": 1, **changes}
    config = tiny(str(images), out=str(url), **settings)
    run_prepared(prepare(resolve(config), InlineExecutor()), InlineExecutor())
    return str(url)


def featup_file(path: Path) -> Path:
    """As FeatUp's training leaves it, for test_vit."""
    net = FeatUpNet(64, norm=False)
    state = {f"upsampler.{name}": value for name, value in net.state_dict().items()}
    state |= {"model.1.norm.weight": torch.ones(64), "model.1.norm.bias": torch.zeros(64)}
    state |= {"model.0.model.blocks.0.mlp.fc1.bias": torch.zeros(8), "scale_net.net.bias": torch.zeros(1)}
    beside = {
        "epoch": 1,
        "pytorch-lightning_version": "2.1.2",
        "callbacks": {},
        "hyper_parameters": {"lr": 1e-3},
        "lr_schedulers": [],
    }
    torch.save({**beside, "state_dict": state}, path)
    return path
