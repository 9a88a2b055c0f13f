"""Training detectors: what they begin from, that runs are the same in any number of parts and processes, what is refused."""

import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from operators.upsamplers import build_net
from operators.vitdet.augment import LargeScaleJitter, Objects
from operators.vitdet.settings import DetectorError
from pipelines.config import ConfigError
from pipelines.features.detectors import load_detector
from pipelines.training.lift import X2Config
from pipelines.training.loop import TrainFailed
from pipelines.training.objects import packed, unpacked
from pipelines.training.run import main, plan_lines
from pipelines.training.vitdet import ViTDetTraining
from storage.datasets.files import DatasetError
from storage.errors import RayliftError
from storage.paths import Folder
from storage.runs import read_checkpoint, read_last, read_pointers
from tests.as_on_ray import train_in_processes
from tests.forks import Fork, forks
from tests.readout_runs import continued, held_out, losses, prepared, train

SMALL: Mapping[str, object] = {
    "executor": "inline", "device": "cpu", "size": 64, "model": "tiny", "depth": 2, "global_blocks": (1,), "drop_path": 0.5,
    "dim": 32, "heads": 2, "channels": 16, "fc": 16, "batch": 4, "micro_batch": 2, "epochs": 2, "lr": 1e-3, "warmup_steps": 2,
    "anchors": 32, "proposals": 16, "layer_decay": 0.8, "log_every": 1, "checkpoint_every": 1, "validate_every": 2,
}  # fmt: skip


def detector(sets: Path, out: Path | str, **changes: object) -> ViTDetTraining:
    """A run of 6 images in 2 epochs of 2 steps, at 64 px; everything is drawn: jitter, anchors, proposals, depth."""
    values = {**SMALL, "data": str(sets / "coco"), "out": str(out), **changes}
    return ViTDetTraining.of(**{name: value for name, value in values.items() if value is not None})


OWN = dict.fromkeys(("model", "dim", "depth", "heads", "global_blocks", "channels", "fc", "drop_path"))
"""Left out where a run begins from a detector."""


@pytest.fixture(scope="module")
def trained(sets, tmp_path_factory) -> str:
    config = detector(sets, tmp_path_factory.mktemp("trained") / "run")
    train(config)
    return config.out


@pytest.fixture(scope="module")
def lift(tmp_path_factory) -> str:
    """A LiFT of 32 channels."""
    return write_lift(tmp_path_factory.mktemp("lift"), 32)


def write_lift(folder: Path, channels: int) -> str:
    settings = {"method": "lift", "channels": channels, "patch": 16}
    net = build_net(settings, 0)
    folder.mkdir(exist_ok=True)
    arrays = {name: value.numpy() for name, value in net.state_dict().items()}
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"upsampler": settings, "backbone": {}}))
    return f"lift:{folder}"


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_writes_a_detector_that_says_what_it_finds(trained):
    found = load_detector(trained)

    assert found.categories == ((1, "red"), (2, "blue"))
    assert (found.settings.classes, found.settings.square_pad, found.settings.cascade) == (2, 64, False)
    net = found.build().eval()
    arrays = {name: value.numpy() for name, value in net.state_dict().items()}
    pointers = read_pointers(Folder(trained))
    for name, array in read_checkpoint(Folder(trained), pointers.best).model.items():
        np.testing.assert_array_equal(arrays[name], array)
    assert net.detect(torch.zeros(1, 3, 64, 64), [(64, 48)], [(128, 96)])[0].boxes_N4.shape[1] == 4
    names = ("loss", "rpn_cls", "rpn_loc", "cls", "box_reg", "mask")
    assert {f"val_{name}" for name in names} <= {name if name.startswith("val_") else f"val_{name}" for name in held_out(trained)}


@pytest.mark.parametrize("method", ["mask_rcnn", "cascade"])
def test_a_continued_run_is_the_uninterrupted_one_bit_for_bit(sets, tmp_path, method):
    whole, broken = (detector(sets, tmp_path / name, method=method) for name in ("whole", "broken"))

    continued(whole, broken, (1, 3))

    assert held_out(broken.out) == held_out(whole.out)


@pytest.mark.soak
@pytest.mark.parametrize("upsampler", ["", "lift"])
def test_a_run_that_is_killed_at_random_five_times_trains_the_same_bits(sets, tmp_path, upsampler):
    """The process itself, by SIGKILL, wherever it is just then, one to three steps after it went on."""
    seed = int.from_bytes(os.urandom(4))
    rng = np.random.default_rng(seed)
    values = {
        **SMALL,
        "data": str(sets / "coco"),
        "epochs": 12,
        "validate_every": 20,
        **({"upsampler": upsampler} if upsampler else {}),
    }

    def program(name: str) -> Fork:
        flags = [(f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,)))
                 for key, value in (values | {"out": str(tmp_path / name)}).items()]  # fmt: skip
        argv = ["vitdet", *itertools.chain(*flags)]
        return Fork(program="train", argv=argv, place=str(tmp_path / name), log=str(tmp_path / f"{name}.log"))

    def step() -> int:
        pointers = read_pointers(Folder(str(tmp_path / "broken")))
        return pointers.last_step if pointers else 0

    with forks() as processes:
        assert processes.run(program("whole")) == 0, (tmp_path / "whole.log").read_text()
        for _ in range(5):
            there, more = step(), rng.integers(1, 4)
            process = processes.start(program("broken"))
            while step() == there:
                time.sleep(0.005)
            began = time.monotonic()
            while step() < there + more:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, (time.monotonic() - began) / max(1, more - 1)))
            os.kill(process, signal.SIGKILL)
            assert processes.wait(process) == -signal.SIGKILL, f"it was done before it was killed (seed {seed})"
        assert processes.run(program("broken")) == 0, (tmp_path / "broken.log").read_text()

    there, here = (read_last(Folder(str(tmp_path / name))) for name in ("whole", "broken"))
    assert there.step == here.step == 24
    for expected, found in ((there.model, here.model), (there.resume, here.resume)):
        assert expected.keys() == found.keys()
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=f"{name}, seed {seed}")
    assert losses(str(tmp_path / "broken")) == losses(str(tmp_path / "whole"))


@pytest.mark.parametrize("upsampler", ["", "lift"])
def test_two_processes_take_the_steps_of_one(parent, sets, tmp_path, upsampler):
    one, two = (detector(sets, tmp_path / name, upsampler=upsampler or None, **settings)
                for name, settings in (("one", {}), ("two", {"workers": 2, "executor": "ray", "loaders": 1})))  # fmt: skip
    train(one)

    summary = train_in_processes(parent, two, tmp_path / "processes")

    assert summary.step == 4
    np.testing.assert_allclose(losses(two.out), losses(one.out), rtol=1e-5)
    if not upsampler:  # the running statistics of LiFT's norms are of what worker 0 has seen
        assert held_out(two.out) == pytest.approx(held_out(one.out), rel=1e-5)


def test_what_is_drawn_for_an_image_depends_neither_on_other_images_nor_on_micro_batches(sets, tmp_path):
    """With a forward for each image, losses are means over images; so they are the same in any order of a batch."""
    config = detector(sets, tmp_path / "run", micro_batch=1, epochs=1)
    setup = prepared(config)
    objective = setup.objective(torch.device("cpu"))
    items = list(setup.order.micro_batches(0))[:4]

    def loss(item):
        loaded = next(iter(_loaded(setup, [item])))
        return objective.accumulate(loaded)[0].item()

    alone = {item.rows: loss(item) for item in items}
    assert {item.rows: loss(item) for item in reversed(items)} == alone
    assert len({round(each, 4) for each in alone.values()}) == len(alone)


def _loaded(setup, items):
    from pipelines.training.data import Loaded

    return [Loaded(item=item, example=setup.images.load(item.rows, item.epoch)) for item in items]


def test_a_run_that_diverges_ends_with_a_sentence(sets, tmp_path):
    with pytest.raises(TrainFailed, match="the loss became (nan|inf) at step"):
        train(detector(sets, tmp_path / "run", lr=1e30, schedule="constant", warmup_steps=0, epochs=4))


# --- beginnings -------------------------------------------------------------------------------------------------------


def test_a_run_begins_from_a_detector(sets, tmp_path, trained):
    begun = detector(sets, tmp_path / "run", weights=trained, **OWN)
    setup = prepared(begun)

    assert setup.beginning.settings.drop_path == 0.5
    for name, array in load_detector(trained).arrays.items():
        np.testing.assert_array_equal(setup.beginning.arrays[name], array)


def test_a_run_begins_from_a_backbone_by_its_names(sets, tmp_path):
    plain = prepared(detector(sets, tmp_path / "plain")).beginning.arrays
    prefix, relative = "backbone.net.", "rel_pos"
    state = {
        name.removeprefix(prefix): torch.from_numpy(np.array(array)) + 1
        for name, array in plain.items()
        if name.startswith(prefix) and relative not in name
    }
    extra = {"cls_token": torch.zeros(1, 1, 32), "norm.weight": torch.ones(32), "norm.bias": torch.ones(32)}
    torch.save({"model": {**state, **extra}}, tmp_path / "mae.pth")

    found = prepared(detector(sets, tmp_path / "run", weights=str(tmp_path / "mae.pth"))).beginning.arrays

    for name, array in plain.items():
        is_taken = name.startswith(prefix) and relative not in name
        np.testing.assert_array_equal(found[name], array + 1 if is_taken else array, err_msg=name)


def test_with_an_upsampler_pyramid_and_heads_alone_are_trained(sets, tmp_path, trained, lift):
    config = detector(sets, tmp_path / "run", weights=trained, upsampler=lift, layer_decay=None, **OWN)

    train(config)

    before, after = prepared(config).beginning, prepared(detector(sets, tmp_path / "next", weights=config.out, **OWN)).beginning
    assert after.upsampler == before.upsampler == {"method": "lift", "channels": 32, "patch": 16}
    for name, array in after.arrays.items():
        is_frozen = name.startswith(("backbone.net.", "lift."))
        assert np.array_equal(array, before.arrays[name]) == is_frozen, name


def test_an_upsampler_that_is_drawn_anew_is_trained_with_all_the_rest(sets, tmp_path, trained):
    config = detector(sets, tmp_path / "run", upsampler="lift", epochs=1)
    before = prepared(config).beginning

    train(config)

    after = read_last(Folder(config.out)).model
    assert before.upsampler == {"method": "lift", "channels": 32, "patch": 16}
    moved = {name for name, array in after.items() if not np.array_equal(array, before.arrays[name])}
    assert {"lift.outc.weight", "backbone.net.blocks.0.attn.qkv.weight", "roi_heads.mask_head.deconv.weight"} <= moved
    begun = prepared(detector(sets, tmp_path / "next", weights=trained, upsampler="lift", **OWN)).beginning
    assert not begun.keeps_maps


def test_a_detector_with_an_upsampler_is_trained_on_with_it(sets, tmp_path, trained, lift):
    first = detector(sets, tmp_path / "first", weights=trained, upsampler=lift, layer_decay=None, epochs=1, **OWN)
    train(first)
    second = detector(sets, tmp_path / "second", weights=first.out, layer_decay=None, epochs=1, **OWN)
    train(second)

    before, after = load_detector(first.out), load_detector(second.out)
    for name in before.arrays:
        assert np.array_equal(after.arrays[name], before.arrays[name]) == name.startswith("backbone.net."), name
    for name, array in before.upsampler.arrays.items():
        np.testing.assert_array_equal(after.upsampler.arrays[name], array)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "cascade"}, "--method cascade: --weights .* is a mask_rcnn; give --method mask_rcnn"),
        ({"dim": 64}, "--dim 64 would change nothing: the detector of --weights .* has its own sizes"),
    ],
)
def test_a_detector_that_is_another_is_refused(sets, tmp_path, trained, changes, said):
    with pytest.raises(ConfigError, match=said):
        detector(sets, tmp_path / "run", weights=trained, **(OWN | changes)).resolve()


def test_an_upsampler_of_another_backbone_is_refused(sets, tmp_path, trained, make_tars):
    """LiFT is trained on the very detector."""
    values = {"method": "lift", "lower": "resized", "model": "vitdet_base", "weights": trained, "size": 64, "geometry": "corner"}
    values |= {"data": (make_tars(count=1, each=5),), "out": str(tmp_path / "lift"), "val_rows": 2, "batch": 3, "max_steps": 1}
    values |= {"facet": "token", "precision": "fp32", "executor": "inline", "device": "cpu"}
    train(X2Config.of(**values))
    lift = f"lift:{tmp_path / 'lift'}"

    assert prepared(
        detector(sets, tmp_path / "run", weights=trained, upsampler=lift, layer_decay=None, **OWN)
    ).beginning.keeps_maps
    other = detector(sets, tmp_path / "other", seed=1, weights="random:1", max_steps=1)
    train(other)
    with pytest.raises(DetectorError, match="was trained on other maps than those of .* other weights"):
        detector(sets, tmp_path / "next", weights=other.out, upsampler=lift, layer_decay=None, **OWN).resolve()


def test_upsamplers_of_other_maps_are_refused(sets, tmp_path, trained, lift):
    other = write_lift(tmp_path / "other", 64)
    with pytest.raises(DetectorError, match="is for maps of 64 channels; the backbone's have 32"):
        detector(sets, tmp_path / "run", weights=trained, upsampler=other, layer_decay=None, **OWN).resolve()
    with pytest.raises(ConfigError, match="--upsampler needs as --weights the detector"):
        detector(sets, tmp_path / "run", upsampler=lift, layer_decay=None, drop_path=None).resolve()
    with pytest.raises(ConfigError, match="--layer-decay 0.8 would change nothing"):
        detector(sets, tmp_path / "run", weights=trained, upsampler=lift, **OWN).resolve()


# --- data -------------------------------------------------------------------------------------------------------------


def changed(sets: Path, folder: Path, change) -> Path:
    """A copy of the sets whose training annotations were changed."""
    shutil.copytree(sets / "coco", folder / "coco")
    path = folder / "coco/annotations/instances_train2017.json"
    notes = json.loads(path.read_text())
    change(notes)
    path.write_text(json.dumps(notes))
    return folder


def test_crowds_and_images_without_objects_are_left_out_and_counted(sets, tmp_path):
    def change(notes):
        notes["annotations"][0] |= {"iscrowd": 1, "segmentation": {"size": [72, 96], "counts": [72 * 96]}}
        notes["annotations"][0]["bbox"], notes["annotations"][0]["area"] = [0, 0, 96, 72], 0
        notes["annotations"] = [each for each in notes["annotations"] if each["image_id"] != 2]

    config = detector(changed(sets, tmp_path, change), tmp_path / "run")

    setup = prepared(config)
    assert len(setup.images.items) == 4
    assert "left out: 2 of train2017's 6 images have no annotated object beside crowds" in setup.notes
    assert "left out: 1 crowds of train2017 are no objects" in setup.notes
    assert any("2 of train2017's 6 images" in line for line in plan_lines(config))


def test_objects_that_cover_no_pixel_are_counted_and_named(sets, tmp_path):
    def change(notes):
        alone = [each for each in notes["annotations"] if each["image_id"] == 2]
        for each in (*alone, notes["annotations"][0]):
            each["segmentation"] = [[10, 10, 20, 20]]
        notes["expected"] = len(alone) + 1

    folder = changed(sets, tmp_path, change)
    expected = json.loads((folder / "coco/annotations/instances_train2017.json").read_text())["expected"]

    setup = prepared(detector(folder, tmp_path / "run"))

    assert len(setup.images.items) == 4
    assert "left out: 2 of train2017's 6 images have no annotated object beside crowds and objects without an area" in setup.notes
    (said,) = [note for note in setup.notes if "cover no pixel" in note]
    assert said.startswith(f"left out: {expected} objects of train2017 cover no pixel: polygons of two corners, empty runs (")
    assert said.endswith("annotation 1)")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda notes: [each.pop("segmentation") for each in notes["annotations"]], "no field 'segmentation'"),
        (lambda notes: notes["annotations"][0].update(bbox=[90, 60, 40, 40]), "outside the image"),
        (lambda notes: notes["annotations"][0].update(category_id=7), "has the category 7, which isn't among the categories"),
        (
            lambda notes: [each.update(segmentation=[[1, 1, 2, 2]]) for each in notes["annotations"]],
            "none of the 6 images of train2017 has an annotated object beside crowds and objects without an area",
        ),
        (lambda notes: notes["annotations"].clear(), "none of the 6 images of train2017 has an annotated object beside crowds"),
        (lambda notes: notes["categories"].append({"id": 3, "name": "green"}), "have other categories"),
    ],
)
def test_annotations_that_cannot_be_trained_on_are_refused(sets, tmp_path, change, said):
    with pytest.raises(DatasetError, match=said):
        detector(changed(sets, tmp_path, change), tmp_path / "run").resolve()


def test_a_mask_that_cannot_be_read_costs_its_image_alone(sets, tmp_path):
    def change(notes):
        notes["annotations"][0]["segmentation"] = [[1, 2, 3]]

    config = detector(changed(sets, tmp_path, change), tmp_path / "run", max_failed_fraction=0.5, max_steps=2)

    summary = train(config)

    (reason,) = summary.failed.values()
    assert "annotation 1: its segmentation is malformed: a polygon is a list x, y, x, y" in reason


def test_a_detector_of_other_classes_is_refused(sets, tmp_path, trained):
    def change(notes):
        notes["categories"] = [{"id": number, "name": str(number)} for number in (1, 2, 3)]

    folder = changed(sets, tmp_path, change)
    shutil.copy(folder / "coco/annotations/instances_train2017.json", folder / "coco/annotations/instances_val2017.json")
    for path in (folder / "coco/train2017").iterdir():
        shutil.copy(path, folder / "coco/val2017")
    with pytest.raises(DetectorError, match="finds 2 classes, and the annotations have 3 categories"):
        detector(folder, tmp_path / "run", weights=trained, overlap=True, **OWN).resolve()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scales": (0.0, 1.0)}, "--scales 0 1: two sizes above 0"),
        ({"mirror": 2.0}, "--mirror 2: must lie between 0 and 1"),
        ({"layer_decay": 0.0}, "--layer-decay 0: must be above 0"),
        ({"weights": "pretrained"}, "--weights pretrained: give the file"),
        ({"size": 100}, "multiple of 16 pixels, got 100"),
        ({"data": ""}, "no data: give --data"),
        ({"weights": "nowhere"}, "no weights at nowhere"),
        ({"upsampler": "vit_up"}, "vit_up can't stand in a detector: it takes a network that doubles a map"),
        ({"upsampler": "foo"}, "no upsampler is called 'foo'"),
    ],
)
def test_settings_that_make_no_run_are_refused(sets, tmp_path, changes, said):
    with pytest.raises(RayliftError, match=said):
        detector(sets, tmp_path / "run", **changes).resolve()


def test_objects_travel_as_arrays():
    rng = np.random.default_rng(0)
    triangle, square = np.array([[1, 1], [5, 1], [5, 6.5]]), np.array([[0, 0], [4, 0], [4, 4], [0, 4.0]])
    mask = rng.random((7, 9)) < 0.5
    given = [
        (rng.integers(0, 255, (7, 9, 3), np.uint8), Objects(classes=np.array([3, 0]), outlines=[(triangle, square), mask])),
        (rng.integers(0, 255, (8, 5, 3), np.uint8), Objects(classes=np.zeros(0, int), outlines=[])),
        (rng.integers(0, 255, (8, 8, 3), np.uint8), Objects(classes=np.array([1]), outlines=[(square,)])),
    ]

    found = unpacked(packed(given, 9))

    assert len(found) == 3
    for (pixels, objects), (expected, theirs) in zip(found, given, strict=True):
        np.testing.assert_array_equal(pixels, expected)
        assert objects.classes.tolist() == theirs.classes.tolist()
        for one, other in zip(objects.outlines, theirs.outlines, strict=True):
            assert isinstance(one, tuple) == isinstance(other, tuple)
            for a, b in zip(one, other, strict=True):
                np.testing.assert_array_equal(a, b)


def test_jitter_is_drawn_by_seed_epoch_and_row(sets, tmp_path):
    source = prepared(detector(sets, tmp_path / "run")).images

    first, again, later = source.load([1, 4], 0), source.load([4, 1], 0), source.load([1, 4], 1)

    np.testing.assert_array_equal(first.arrays["pixels"], again.arrays["pixels"][::-1])
    assert (first.arrays["pixels"] != later.arrays["pixels"]).any()
    assert isinstance(source.jitter, LargeScaleJitter)


@pytest.mark.parametrize("upsampler", ["", "lift", "trained"])
def test_a_finished_run_says_how_it_is_judged(sets, tmp_path, trained, lift, upsampler):
    """Where the backbone was trained, too, there is no plain detector that its heads belong to."""
    begun = {"weights": trained, "layer_decay": None, **OWN} if upsampler == "trained" else {}
    asked = {"": {}, "lift": {"upsampler": "lift"}, "trained": {"upsampler": lift, **begun}}[upsampler]

    lines = list(main(detector(sets, tmp_path / "run", max_steps=1, **asked)))

    best = f"{tmp_path}/run/steps/00000001"
    said = f"--detector {trained} --finetuned {best}" if upsampler == "trained" else f"--detector {best}"
    assert any(line.endswith(f"jobs/evaluate.py detection {said} --data ... --out ...") for line in lines)
