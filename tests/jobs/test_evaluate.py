"""The command line of evaluations: presets, mistakes, and what is printed and written."""

import contextlib
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from jobs import evaluate, train
from pipelines.config import ConfigError
from pipelines.demo_datasets import write_demo
from tests.conftest import unreadable
from tests.goldens import golden_file
from tests.pipelines.evaluation.test_evaluation import make_davis


@pytest.mark.parametrize("task", [task for task in evaluate.TASKS if task != "probe"])
def test_debug_evaluates_and_goes_on(task, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    assert evaluate.run([task, "debug"]) == 0
    printed = capsys.readouterr().out
    assert "| low-res" in printed
    assert "| bilinear x2" in printed
    out = tmp_path / evaluate.PRESETS[task]["debug"].out
    found = json.loads((out / "results.json").read_text())
    assert found["task"] == task
    assert found["config"].get("model") == (None if task == "detection" else "test_vit.r160_in1k")
    assert (out / "results.md").read_text() in printed
    before = {path.name: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}

    assert evaluate.run([task, "debug", "--pictures", "0"]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (out / "parts").iterdir()} == before
    other = ("--size", "96") if task == "detection" else ("--facet", "key")
    assert evaluate.run([task, "debug", *other]) == 2
    assert "was begun with other settings" in capsys.readouterr().err


def test_debug_probes_what_debug_readout_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    assert evaluate.run(["probe", "debug"]) == 2
    assert "no weights at" in capsys.readouterr().err
    assert train.run(["debug-readout"]) == 0
    assert evaluate.run(["probe", "debug"]) == 0
    assert "| train-readout on low-res" in capsys.readouterr().out
    assert (tmp_path / "demo/eval-probe/pictures/predictions.png").exists()

    before = sorted(tmp_path.glob("demo/eval-probe/**"))
    assert train.run(["debug", "--out", "demo/eval-probe"]) == 2
    assert "was begun as another kind of run (evaluation); give this training its own folder" in capsys.readouterr().err
    assert sorted(tmp_path.glob("demo/eval-probe/**")) == before
    assert evaluate.run(["probe", "debug", "--out", "demo/train-readout"]) == 2
    assert "was begun as another kind of run (training); give this evaluation its own folder" in capsys.readouterr().err


READ_IMAGES = {
    "correspondence": "JPEGImages/cat/2008_000001.jpg",
    "video": "JPEGImages/480p/clip-a/00003.jpg",
    "discovery": "VOCdevkit/VOC2007/JPEGImages/*.jpg",
    "cka": "JPEGImages/cat/2008_000001.jpg",
    "similarity": "JPEGImages/cat/2008_000001.jpg",
    "fidelity": "JPEGImages/cat/2008_000001.jpg",
    "sharpness": "VOCdevkit/VOC2012/JPEGImages/000006.jpg",
    "probe": "VOCdevkit/VOC2012/JPEGImages/*.jpg",
    "detection": "val2017/*.jpg",
    "navi": "navi_v1/*/wild_set/images/downsampled_000.jpg",
}
"""An image below the data of every evaluation that reads some."""


def test_every_evaluation_of_images_is_tried_without_one():
    assert READ_IMAGES.keys() == evaluate.TASKS.keys() - {"runtime"} | {"navi"}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The data of every evaluation, and a readout; by task, words after which --data and --out are given."""
    root = tmp_path_factory.mktemp("evaluated")
    write_demo(str(root))
    with tarfile.open(golden_file("navi_mini.tar")) as tar:
        tar.extractall(root / "NAVI", filter="data")
    debug = "--model test_vit.r160_in1k --weights random --precision fp32 --executor inline --device cpu"
    words = {
        task: (root / Path(presets["debug"].data).name, [task, "debug"])
        for task, presets in evaluate.PRESETS.items()
        if task in READ_IMAGES
    }
    navi = ["--protocol", "navi", "--levels", "x1", "28x28=bilinear", "--sizes", "112", "--every", "1", "--matches", "50"]
    words["navi"] = root / "NAVI", ["correspondence", *navi, *debug.split()]
    words["video"] = make_davis(root / "two-clips"), ["video", "debug"]
    with contextlib.chdir(root):
        assert train.run(["debug-readout", "--max-steps", "4"]) == 0
    data, probe = words["probe"]
    words["probe"] = data, [*probe, "--readouts", str(root / "demo/train-readout"), "--split", "train"]
    return words


HELD_APART = ("correspondence", "video", "discovery", "cka", "similarity")
"""Of whose modules tests/pipelines/evaluation/test_faults.py holds the same."""


@pytest.mark.parametrize(
    ("task", "fault"),
    [
        *(pytest.param(task, "no image", marks=[pytest.mark.soak] * (task in HELD_APART)) for task in READ_IMAGES),
        ("probe", "no permission"),
        ("navi", "no permission"),
    ],
)
def test_an_image_that_can_not_be_read_costs_its_own_items_alone(task, fault, evaluated, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data, words = evaluated[task]
    shutil.copytree(data, tmp_path / "data")
    image = min((tmp_path / "data").glob(READ_IMAGES[task]))
    if fault == "no image":
        image.write_text("no image")
    else:
        unreadable(monkeypatch, str(image))

    assert evaluate.run([*words, "--data", str(tmp_path / "data"), "--out", "out"]) == 0

    found = json.loads(Path("out/results.json").read_text())["items"]
    (left_out,) = [each for each in found["left_out"] if image.name in each["first"]]
    assert left_out["reason"].startswith(
        {"no image": "can't be read as an image", "no permission": "can't be read: Permission"}[fault]
    )
    assert all(count > 0 for count in found["scored"].values())
    assert left_out["reason"] in capsys.readouterr().out


def test_mistakes_end_in_one_line(tmp_path, capsys):
    assert evaluate.run(["video"]) == 2
    assert "no data: give --data" in capsys.readouterr().err
    data, out = str(tmp_path / "nothing"), str(tmp_path / "out")
    settings = ["--model", "test_vit.r160_in1k", "--weights", "random", "--data", data, "--out", out]
    for task in ("correspondence", "video", "discovery"):
        assert evaluate.run([task, *settings, "--executor", "inline"]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("DatasetError: ")
        assert data in error
    assert not (tmp_path / "out").exists()


def test_published_settings():
    call = evaluate.program.parse(["correspondence", "lift-spair", "--sizes", "224"])
    preset, config = call.preset, call.config

    assert call.command is evaluate.program.commands["correspondence"]
    assert (preset, config.sizes, config.features.facet) == ("lift-spair", (224,), "key")
    assert (config.draws, config.annotation, config.rules.strict) == (100, "pairs", True)
    config = evaluate.program.parse(["correspondence", "vit-up-spair"]).config
    assert (config.draws, config.annotation, config.rules.strict) == (0, "images", False)
    assert evaluate.program.parse(["video", "dino-davis"]).config.features.facet == "token"
    assert evaluate.program.parse(["discovery", "lift-coco20k"]).config.settings.tau == 0.3
    assert evaluate.program.parse(["cka", "--batch", "8"]).config.batch == 8


def test_unknown_words_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'video'"):
        evaluate.program.parse(["vidio"])
    with pytest.raises(ConfigError, match="no preset of correspondence is called 'lift-spare'. Did you mean 'lift-spair'"):
        evaluate.program.parse(["correspondence", "lift-spare"])


def test_no_word_prints_what_there_is(capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.program.parse([])
    assert end.value.code == 2
    assert "correspondence: debug, lift-spair, known-points, vit-up-spair" in capsys.readouterr().out
