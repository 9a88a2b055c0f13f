"""Training readouts: every task learns, stored features train as computed ones, a stopped run continues as if it hadn't."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from operators.readouts import ReadoutConfig, build_readout
from pipelines.config import ConfigError
from pipelines.features.join import FeaturesMissing
from pipelines.features.photos import upright_pixels
from pipelines.features.weights import WeightsUnavailable
from pipelines.readouts.checkpoints import load_readout
from pipelines.readouts.instances import CLASSIFIER
from pipelines.showing.training import training_lines
from pipelines.training.labelled import stored_array
from pipelines.training.loop import TrainFailed, read_metrics
from pipelines.training.readout import ReadoutTraining
from storage.paths import Folder
from storage.runs import read_last
from tests.as_on_ray import train_in_processes
from tests.readout_runs import OF_TASK, continued, extract, featup_file, held_out, losses, prepared, train, training, write_nyu

IMAGES = "VOCdevkit/VOC2012/JPEGImages"


@pytest.fixture(scope="module")
def finished(sets, tmp_path_factory):
    config = training(sets, tmp_path_factory.mktemp("finished") / "run", max_steps=2)
    train(config)
    return config


@pytest.fixture
def trained(finished, tmp_path):
    """A run of its own, to be damaged."""
    shutil.copytree(finished.out, tmp_path / "run")
    return replace(finished, out=str(tmp_path / "run"))


def weights(out: object) -> dict[str, np.ndarray]:
    return dict(read_last(Folder(str(out))).model)


def void_most(sets: Path, folder: Path) -> Path:
    """A copy of VOC whose images have ever more void pixels, the last training image nothing else."""
    shutil.copytree(sets / "VOC2012", folder)
    for path in sorted((folder / "VOCdevkit/VOC2012/SegmentationClass").iterdir())[:6]:
        labels = np.array(Image.open(path))
        labels[: int(path.stem) * len(labels) // 5] = 255
        Image.fromarray(labels).save(path)
    return folder


# --- every task -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", OF_TASK)
def test_every_task_learns_and_scores_held_out_images(sets, tmp_path, task):
    config = training(sets, tmp_path / "run", task, epochs=10, checkpoint_every=20, validate_every=20)

    summary = train(config)

    found = losses(config.out)
    assert len(found) == 20
    assert np.mean(found[-4:]) < 0.6 * np.mean(found[:4])
    assert summary.failed == {}
    first, last = (line for line in read_metrics(Folder(config.out)) if "val_loss" in line)
    assert (first["step"], last["step"]) == (0, 20)
    # How well instances cluster is no loss: latents that nobody trained may cluster well.
    assert task == "instances" or last["val_loss"] < first["val_loss"]
    assert np.isfinite([value for name, value in last.items() if name.startswith("val_")]).all()
    assert len(Folder(config.out).sizes("pictures")) == 2


@pytest.mark.parametrize("method", ["bicubic", "transposed", "strided", "linear"])
def test_other_readouts_learn_by_the_same_command(sets, tmp_path, method):
    config = training(sets, tmp_path / "run", method=method, epochs=6, checkpoint_every=12, validate_every=12)

    train(config)

    assert np.mean(losses(config.out)[-4:]) < 0.6 * np.mean(losses(config.out)[:4])
    assert load_readout(config.out).config.method == method


def test_featup_learns_on_the_map_that_its_file_enlarges(sets, tmp_path):
    level = f"x16=featup:{featup_file(tmp_path / 'test_jbu_stack.ckpt')}"
    config = training(sets, tmp_path / "run", method="featup", level=level, epochs=6, checkpoint_every=12, validate_every=12)

    train(config)

    assert np.mean(losses(config.out)[-4:]) < 0.6 * np.mean(losses(config.out)[:4])
    readout = load_readout(config.out)
    assert (readout.config.method, readout.features["level"]["method"]) == ("featup", "featup")
    assert {name: tuple(value.shape) for name, value in readout.state.items()} == {
        "decoder.weight": (21, 64, 1, 1), "decoder.bias": (21,)
    }  # fmt: skip


def test_featup_refuses_maps_that_featup_has_not_enlarged(sets, tmp_path):
    for level, named in (("x1", "x1 is backbone"), ("x2=bicubic", "x2 is bicubic")):
        with pytest.raises(
            ConfigError, match=f"reads a map that featup has enlarged, and --level {named}'s; give --level x16=featup"
        ):
            training(sets, tmp_path / "run", method="featup", level=level).resolve()


def test_mirrored_batches_mirror_image_and_label(sets, tmp_path):
    """With a batch that is always mirrored, a probe learns as it does from mirrored files."""
    mirrored = tmp_path / "mirrored"
    shutil.copytree(sets / "VOC2012", mirrored)
    for folder, ending in ((IMAGES, "png"), ("VOCdevkit/VOC2012/SegmentationClass", "png")):
        for path in (mirrored / folder).iterdir():
            flipped = Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            # As a JPEG, it would be another image; Pillow goes by the content.
            flipped.save(path, ending)
    settings = {"method": "linear", "epochs": 1, "max_steps": 1, "batch": 6, "drawing": "extract"}
    # The size of the images is the input's, so that nothing is resampled, which isn't symmetric to the last digit.
    seed = next(s for s in range(99) if np.random.default_rng([s, 0]).random() < 0.5)
    train(training(sets, tmp_path / "a", flip=True, seed=seed, **settings))
    train(training(sets, tmp_path / "b", data=str(mirrored), seed=seed, **settings))
    train(training(sets, tmp_path / "c", seed=seed, **settings))

    a, b, c = (losses(str(tmp_path / name))[0] for name in "abc")
    assert a == pytest.approx(b, rel=2e-3)
    assert abs(a - c) > 4 * abs(a - b)


def test_images_that_can_not_be_scored_do_not_end_a_run(sets, tmp_path):
    data = tmp_path / "void"
    shutil.copytree(sets / "VOC2012", data)
    for i in range(6, 10):
        path = data / f"VOCdevkit/VOC2012/SegmentationClass/{i:06d}.png"
        Image.fromarray(np.full_like(np.array(Image.open(path)), 255)).save(path)

    summary = train(training(sets, tmp_path / "run", data=str(data)))

    assert (summary.step, summary.best) == (6, None)
    scores = {name: value for name, value in summary.metrics.items() if name.startswith("val_")}
    assert scores == {"val_images": 0, "val_left_out": 0, "val_empty": 4, "val_seen": 0}


def test_damaged_images_are_left_out_and_counted(sets, tmp_path):
    data = tmp_path / "damaged"
    shutil.copytree(sets / "VOC2012", data)
    (data / IMAGES / "000002.jpg").write_bytes(b"no image")
    (data / IMAGES / "000008.jpg").write_bytes(b"no image")
    config = training(sets, tmp_path / "run", data=str(data), max_failed_fraction=0.3)

    summary = train(config)

    assert list(summary.failed) == ["2"]
    assert list(summary.held_out) == ["2"]
    assert "000008.jpg can't be read as an image" in summary.held_out["2"]
    assert (summary.metrics["val_images"], summary.metrics["val_left_out"]) == (3, 1)
    assert "000002.jpg can't be read as an image" in summary.failed["2"]
    assert (summary.metrics["images"], summary.metrics["failed"]) == (15, 3)
    assert summary.metrics["val_miou"] > 0
    with pytest.raises(TrainFailed, match="1 of 4 held-out images could not be read"):
        train(training(sets, tmp_path / "strict", data=str(data), max_failed_fraction=0.2))


def test_held_out_labels_that_cannot_be_read_are_counted_and_void_ones_apart(sets, tmp_path):
    data = tmp_path / "damaged"
    shutil.copytree(sets / "VOC2012", data)
    labels = data / "VOCdevkit/VOC2012/SegmentationClass"
    (labels / "000006.png").write_bytes(b"no mask")
    Image.fromarray(np.full_like(np.array(Image.open(labels / "000009.png")), 255)).save(labels / "000009.png")
    config = training(sets, tmp_path / "run", data=str(data), max_steps=1, max_failed_fraction=0.25)

    summary = train(config)

    assert list(summary.held_out) == ["0"]
    assert "000006.png" in summary.held_out["0"]
    counts = [summary.metrics[name] for name in ("val_images", "val_left_out", "val_empty")]
    assert counts == [2, 1, 1]
    table = "\n".join(training_lines([Folder(config.out)]))
    assert "- run, last: over 2 of 4 held-out images, 1 left out, 1 with nothing to judge in their labels." in table
    assert "val_left_out" not in table


def test_images_that_are_trained_and_held_out_are_refused_unless_that_is_asked_for(sets, tmp_path, caplog):
    data = tmp_path / "copies"
    shutil.copytree(sets / "VOC2012", data)
    shutil.copyfile(data / IMAGES / "000003.jpg", data / IMAGES / "000006.jpg")

    with pytest.raises(
        ConfigError,
        match=r"1 of the 4 held-out images is among those to train on, .*: .*000006.jpg is .*000003.jpg\. .*--val-split",
    ):
        prepared(training(sets, tmp_path / "run", data=str(data)))
    with pytest.raises(ConfigError, match="6 of the 6 held-out images are among those to train on"):
        prepared(training(sets, tmp_path / "run", val_split="train"))
    assert not (tmp_path / "run").exists()
    caplog.set_level("INFO")
    summary = train(training(sets, tmp_path / "run", data=str(data), max_steps=1, overlap=True, limit=7))

    assert "a limit of 7: train of voc has 6 images, of which all are taken" in caplog.messages
    assert summary.metrics["val_seen"] == 1
    assert summary.notes == ("1 of the 4 held-out images is among those to train on: scores on them say nothing of others.",)


# --- from a store -----------------------------------------------------------------------------------------------------


@pytest.fixture
def store(sets, tiny, tmp_path):
    def make(**changes: object) -> str:
        return extract(tiny, tmp_path / "store.zarr", sets / "VOC2012" / IMAGES, **changes)

    return make


def test_a_store_trains_as_the_live_model(sets, tmp_path, store):
    train(training(sets, tmp_path / "live", drawing="extract"))
    stored = training(sets, tmp_path / "stored", store=store(), size=None)

    summary = train(stored)

    np.testing.assert_allclose(losses(stored.out), losses(str(tmp_path / "live")), rtol=2e-4)
    found, expected = held_out(stored.out), held_out(str(tmp_path / "live"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=5e-3), name
    assert summary.failed == {}
    trained = load_readout(stored.out)
    assert trained.features["model"] == "test_vit.r160_in1k"
    assert trained.features["drawing"] == "extract"


def test_live_maps_are_the_stores(sets, tmp_path, store):
    """What is trained on, not what becomes of it: float16 of both, equal but for how many images a forward has."""
    live = prepared(training(sets, tmp_path / "live", drawing="extract"))
    stored = prepared(training(sets, tmp_path / "stored", store=store(), size=None))
    model = live.bundle.build("cpu")

    maps = model(live.images.load([4], None).arrays["pixels"]).levels["x1"]

    np.testing.assert_array_equal(stored.images.load([1, 4], None).arrays[stored_array("x1")][1:], maps)


def test_training_and_validation_may_have_a_store_each(sets, tmp_path, tiny):
    """Of COCO, whose parts are folders of their own."""
    first = extract(tiny, tmp_path / "train.zarr", sets / "coco/train2017")
    second = extract(tiny, tmp_path / "val.zarr", sets / "coco/val2017")
    settings = {"task": "boundaries", "store": first, "size": None}

    train(training(sets, tmp_path / "run", val_store=second, **settings))

    assert held_out(str(tmp_path / "run"))["iou"] >= 0
    with pytest.raises(FeaturesMissing, match=r"4 of 4 images are not in it; the first: .*000000000006.jpg"):
        prepared(training(sets, tmp_path / "one", **settings))
    other = extract(tiny, tmp_path / "other.zarr", sets / "coco/val2017", facet="key")
    with pytest.raises(ConfigError, match="--val-store .* holds other features than --store"):
        prepared(training(sets, tmp_path / "two", val_store=other, **settings))


def test_images_without_finite_features_are_left_out(sets, tmp_path, store, monkeypatch):
    from storage.store import FeatureStore

    read = FeatureStore.read_present
    url = store()
    keys = FeatureStore.open(url).index.find(["000001", "000003", "000007"])

    def holey(self, rows, level):
        """NaN in one row, and another that isn't there."""
        values, there = (each.copy() for each in read(self, rows, level))
        values[rows == keys["000001"], 0, 0, 0] = np.nan
        there[rows == keys["000003"]] = False
        values[rows == keys["000007"], -1, -1, -1] = np.inf
        return values, there

    monkeypatch.setattr(FeatureStore, "read_present", holey)
    config = training(sets, tmp_path / "run", store=url, size=None, max_failed_fraction=0.5)

    summary = train(config)

    assert sorted(summary.failed) == ["1", "3"]
    assert list(summary.held_out) == ["1"]
    assert (summary.metrics["val_images"], summary.metrics["val_left_out"]) == (3, 1)
    assert all("not there, or not finite" in reason for reason in (*summary.failed.values(), *summary.held_out.values()))
    assert (summary.metrics["images"], summary.metrics["failed"]) == (12, 6)
    assert np.isfinite(losses(config.out)).all()


@pytest.mark.parametrize(
    ("extracted", "changes", "message"),
    [
        ({"geometry": "squash"}, {}, "--geometry crop"),
        ({"crop_pct": 0.9}, {}, "--crop-pct 0.9"),
        ({}, {"placement": "squash"}, "--geometry squash"),
        ({}, {"size": 96}, "size             store '64x64'   asked 96"),
        ({}, {"level": "x2"}, "--level x2: .*store.zarr has the maps x1"),
        ({"limit": 5}, {}, "1 of 6 images are not in it; the first: .*000005.jpg"),
        (
            {"levels": ("x1", "pooled=mean")},
            {"task": "depth", "method": "depth_bins", **OF_TASK["depth"], "placement": "crop"},
            "depth_bins reads the CLS vector, which .*store.zarr doesn't have",
        ),
    ],
)
def test_stores_that_do_not_fit_are_refused(sets, tmp_path, store, extracted, changes, message):
    url = store(**extracted)

    with pytest.raises((ConfigError, FeaturesMissing), match=message):
        prepared(training(sets, tmp_path / "run", **{"store": url, "size": None, **changes}))
    assert not (tmp_path / "run").exists()


# --- stopped and continued --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["segmentation", "instances"])
def test_a_continued_run_is_the_uninterrupted_one_bit_for_bit(sets, tmp_path, task):
    """Instances draw pixels at random, and train a classifier beside the readout."""
    whole, broken = (training(sets, tmp_path / name, task, flip=True) for name in ("whole", "broken"))

    continued(whole, broken, (1, 3))

    assert held_out(broken.out) == held_out(whole.out)


def test_micro_batches_add_up_to_the_batch(sets, tmp_path):
    """Images have unequal numbers of labelled pixels, one has none."""
    data = str(void_most(sets, tmp_path / "void"))
    train(training(sets, tmp_path / "whole", data=data))
    train(training(sets, tmp_path / "single", data=data, micro_batch=1))

    np.testing.assert_allclose(losses(str(tmp_path / "single")), losses(str(tmp_path / "whole")), rtol=1e-4)
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "single")
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=2e-3, err_msg=name)


def test_two_processes_take_the_steps_of_one(parent, sets, tmp_path):
    data = str(void_most(sets, tmp_path / "void"))
    train(training(sets, tmp_path / "one", data=data, micro_batch=2))

    two = training(sets, tmp_path / "two", data=data, micro_batch=2, workers=2, executor="ray", loaders=1)
    summary = train_in_processes(parent, two, tmp_path / "processes")

    assert summary.step == 6
    np.testing.assert_allclose(losses(two.out), losses(str(tmp_path / "one")), rtol=1e-4)
    assert held_out(two.out)["miou"] == pytest.approx(held_out(str(tmp_path / "one"))["miou"], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.5}, "lr               run 0.01   now 0.5"),
        ({"drawing": "extract"}, "drawing          run 'paper'   now 'extract'"),
        ({"limit": 5}, "images           run"),
        ({"val_limit": 3}, "held_out         run"),
        ({"size": 96}, "features.level.grid run"),
        ({"task": "boundaries", **OF_TASK["boundaries"]}, "task             run 'segmentation'"),
    ],
)
def test_a_run_is_not_continued_with_other_settings(sets, tmp_path, trained, changes, message):
    with pytest.raises(ConfigError) as error:
        prepared(training(sets, trained.out, **changes))
    assert message in str(error.value)


def test_a_live_run_is_not_continued_on_a_store_drawn_otherwise(sets, tmp_path, store):
    train(training(sets, tmp_path / "run", max_steps=1, size=None, model="test_vit.r160_in1k"))

    with pytest.raises(ConfigError, match="drawing +run 'paper' +now 'extract'"):
        prepared(training(sets, tmp_path / "run", size=None, store=store(size="160")))


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_loaded_readout_is_the_trained_one(trained):
    readout = load_readout(trained.out)

    setup = prepared(trained)
    net = build_readout(setup.readout, 0)
    net.load_state_dict({name: torch.from_numpy(array) for name, array in weights(trained.out).items()})
    features = torch.randn(2, 64, 4, 4)
    with torch.no_grad():
        expected = net.eval()(features, (64, 64))
    torch.testing.assert_close(readout.build()(features, (64, 64)), expected, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in readout.build().parameters())
    assert readout.task == setup.images.task
    assert (readout.dataset, readout.config) == ("voc", setup.readout)
    assert readout.features == json.loads(json.dumps({**setup.description["features"]}))
    assert load_readout(f"{trained.out}/steps/00000002").digest == readout.digest


def test_instances_classifier_stays_out(sets, tmp_path):
    config = training(sets, tmp_path / "run", "instances", max_steps=1)
    train(config)

    assert f"{CLASSIFIER}.weight" in weights(config.out)
    readout = load_readout(config.out)
    assert not any(name.startswith(CLASSIFIER) for name in readout.state)
    assert readout.build().parameter_count() == build_readout(readout.config).parameter_count()


def damage(out: str, change) -> None:
    path = Path(out) / "steps/00000002/config.json"
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop("readout"), "has no settings of a readout; it has task, features"),
        (lambda found: found["readout"].pop("channels"), "channels"),
        (lambda found: found["readout"].update(width="wide"), "width"),
        (lambda found: found["readout"].update(outputs=5), "size mismatch"),
        (lambda found: found["task"].update(name="poetry"), "KeyError: 'poetry'"),
        (lambda found: found["task"].update(colour=3), "colour"),
        (lambda found: found["task"].pop("dataset"), "KeyError: 'dataset'"),
        (lambda found: found["features"].pop("input_size"), "KeyError: 'input_size'"),
        (lambda found: found["features"].pop("level"), "KeyError: 'level'"),
        (lambda found: found["features"].update(level="x1"), "TypeError"),
        (lambda found: found.update(readout="deap"), "is no trained readout"),
    ],
)
def test_descriptions_that_are_damaged_are_refused(trained, change, message):
    damage(trained.out, change)

    with pytest.raises(WeightsUnavailable, match=message) as error:
        load_readout(trained.out)
    assert f"{trained.out}/steps/00000002" in str(error.value)


def test_what_is_no_readout_is_refused_with_its_place(trained, tmp_path):
    step = Path(trained.out) / "steps/00000002"

    with pytest.raises(WeightsUnavailable, match=f"no weights at {tmp_path}/nowhere"):
        load_readout(str(tmp_path / "nowhere"))
    with pytest.raises(WeightsUnavailable, match=r"config.json"):
        load_readout(str(step / "model.safetensors"))
    state = safetensors.torch.load_file(step / "model.safetensors")
    name = next(iter(state))
    (step / "model.safetensors").write_bytes(safetensors.torch.save({n: t for n, t in state.items() if n != name}))
    with pytest.raises(WeightsUnavailable, match=f"{step} is no trained readout: (?s:.*){name}"):
        load_readout(trained.out)
    (step / "config.json").write_text("{")
    with pytest.raises(WeightsUnavailable, match=f"{step} is no trained readout: JSONDecodeError"):
        load_readout(trained.out)
    (step / "config.json").unlink()
    with pytest.raises(WeightsUnavailable, match=r"has weights but no config.json"):
        load_readout(trained.out)
    (step / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsUnavailable, match="no whole safetensors file"):
        load_readout(trained.out)


# --- depth bins -------------------------------------------------------------------------------------------------------


def test_depth_bins_learn_live_and_from_a_store(sets, tmp_path, tiny):
    """The head reads the CLS vector beside the map."""
    settings = {"method": "depth_bins", "depth_loss": "vit-up", "epochs": 4}
    live = training(sets, tmp_path / "live", "depth", drawing="extract", **settings)
    url = extract(tiny, tmp_path / "nyu.zarr", sets / "NYU/images", geometry="squash", levels=("x1", "pooled"))
    stored = training(sets, tmp_path / "stored", "depth", store=url, size=None, **settings)
    train(live)
    train(stored)

    found = losses(live.out)
    assert np.mean(found[-2:]) < np.mean(found[:2])
    np.testing.assert_allclose(losses(stored.out), found, rtol=2e-3)
    example = prepared(stored).images.load([0, 1], None)
    assert example.arrays[stored_array("pooled")].shape == (2, 64)


def test_images_may_be_given_without_normalisation(sets, tmp_path):
    setup = prepared(training(sets, tmp_path / "run", normalise=False))

    assert (setup.bundle.spec.mean, setup.bundle.spec.std) == ((0, 0, 0), (1, 1, 1))
    assert setup.description["features"]["mean"] == [0, 0, 0]


# --- images and targets -----------------------------------------------------------------------------------------------


def test_papers_drawing_is_small_first_then_enlarged_by_the_nearest_pixel(sets, tmp_path):
    setup = prepared(training(sets, tmp_path / "run", side=32, size=64))
    source = setup.images

    pixels = source.load([0], None).arrays["pixels"][0]

    np.testing.assert_array_equal(pixels[::2, ::2], pixels[1::2, 1::2])
    np.testing.assert_array_equal(pixels[::2, ::2], source.photo(0))
    picture = source.task.input_picture(source.items[0].image, (64, 64))
    np.testing.assert_array_equal(picture.draw(upright_pixels(source.items[0].image)), pixels)


def test_depth_is_judged_on_the_labels_own_pixels_and_nyus_in_the_eigen_crop(tmp_path):
    """Wrong depth outside the crop, or beyond 10 m, changes nothing; inside, it does."""
    from operators.metrics.depth import eigen_crop
    from pipelines.readouts.depth import DepthTask

    task = DepthTask(placement="squash", side=96)
    label = np.full((480, 640), 2.0, np.float32)
    outside = np.ones((480, 640), bool)
    eigen_crop(outside)[:] = False
    assert 0 < outside.mean() < 0.5
    found = torch.full((1, 96, 96), 2.0)
    record = task.judge(found, {"depth": torch.from_numpy(task.placed(label))}, np.where(outside, 7.0, label).astype(np.float32))
    assert record.metrics.rmse == 0
    assert record.error.pixels == (~outside).sum()
    label[240, 320] = 4.0
    assert task.judge(found, {"depth": torch.from_numpy(task.placed(label))}, label).metrics.rmse > 0


def test_an_image_without_any_depth_counts_for_nothing(sets, tmp_path):
    data = tmp_path / "nyu"
    shutil.copytree(sets / "NYU", data)
    empty = np.zeros((60, 80))
    write_nyu(data, "train", "zz", np.zeros((60, 80, 3), np.uint8), empty)
    write_nyu(data, "val", "zz", np.full((60, 80, 3), 9, np.uint8), empty)
    with_empty = training(sets, tmp_path / "with", "depth", data=str(data), micro_batch=1, batch=6, epochs=1)
    without = training(sets, tmp_path / "without", "depth", micro_batch=1, batch=6, epochs=1)

    train(with_empty)
    train(without)

    assert held_out(with_empty.out).keys() == held_out(without.out).keys()
    assert losses(with_empty.out)[0] == pytest.approx(losses(without.out)[0], rel=1e-5)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extracted", "changes", "message"),
    [
        ({}, {"model": "test_vit2.r160_in1k"}, "model            store 'test_vit.r160_in1k'   asked 'test_vit2.r160_in1k'"),
        ({}, {"weights": "random:7"}, "weights          store 'random "),
        ({}, {"weights": "pretrained"}, "weights          store 'random'   asked 'pretrained'"),
        ({}, {"weights": "nowhere.safetensors"}, "no weights at nowhere.safetensors"),
        ({}, {"layers": (0, -1)}, "layers           store [5]   asked [0, -1]"),
        ({"facet": "key"}, {"facet": "token"}, "facet            store 'key'   asked 'token'"),  # the default, but said
        ({}, {"norm": False}, "norm             store True   asked False"),
        ({"norm": False}, {"norm": None}, "norm             store False   asked True"),  # what suits the model
        ({}, {"stride": 8}, "stride           store 16   asked 8"),
        ({}, {"pos_embed": "dino"}, "pos_embed        store 'timm'   asked 'dino'"),
        ({}, {"precision": "bf16"}, "precision        store 'fp32'   asked 'bf16'"),
        ({}, {"encoding": "float32"}, "x1.encoding      store 'float16'   asked 'float32'"),
        ({}, {"level": "x1@float32"}, "x1               store 'backbone@float16'   asked 'x1@float32'"),
        ({"levels": ("x1", "x2")}, {"level": "x2=nearest"}, "x2               store 'bilinear@float16'   asked 'x2=nearest'"),
        ({}, {"revision": "v2", "weights": "pretrained"}, "--revision beside --store"),
        ({}, {"force_upsampler": True}, "--force-upsampler beside --store"),
    ],
)
def test_settings_that_contradict_the_store_are_refused(sets, tmp_path, store, extracted, changes, message):
    config = training(sets, tmp_path / "run", **{"store": store(**extracted), "size": None, **changes})

    with pytest.raises((ConfigError, WeightsUnavailable)) as error:
        prepared(config)

    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_stores_settings_are_recorded_and_what_agrees_with_them_may_be_said(sets, tmp_path, store):
    url = store(facet="key", layers=(-2,), levels=("x1", "x2"), weights="random:3")
    silent = ReadoutTraining.of(
        dataset="voc", data=str(sets / "VOC2012"), store=url, side=64, batch=4, out=str(tmp_path / "run"), executor="inline"
    )
    agreeing = silent.changed(model="test_vit.r160_in1k", weights="random:3", layers=(-2,), facet="key", norm=None, size=64)

    first = prepared(silent)
    prepared(agreeing)  # goes on with it

    found = json.loads((tmp_path / "run/run.json").read_text())["config"]
    assert (found["model"], found["weights"], found["layers"], found["facet"]) == ("test_vit.r160_in1k", "random:3", [4], "key")
    assert (found["precision"], found["size"], found["norm"], found["store"]) == ("fp32", 64, False, url)
    assert agreeing.changed(level="x1=backbone@float16").resolve().features == first.features


def test_a_run_on_a_store_that_an_earlier_version_began_goes_on(sets, tmp_path, store):
    """Its identity has settings of features that nothing used."""
    config = training(sets, tmp_path / "run", store=store(), size=None)
    prepared(config)
    path = tmp_path / "run/run.json"
    document = json.loads(path.read_text())
    assert "model" not in document["identity"]
    document["identity"] |= {"model": "vit_small_patch16_224.dino", "layers": [-1], "precision": "bf16", "size": None}
    path.write_text(json.dumps(document))

    prepared(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip": True, "store": "x"}, "--flip would change nothing: features of a store aren't those of the mirrored image"),
        ({"normalise": False, "store": "x"}, "--no-normalise would change nothing: the images of a store were normalised"),
        ({"val_store": "x"}, "--val-store x would change nothing: it is used with --store only. "),
        (
            {"method": "linear", "dim": 16},
            "with --method deap, bicubic, transposed or strided only. Leave it out; where a preset",
        ),
        ({"method": "linear", "width": 16}, "--width 16 would change nothing"),
        ({"method": "bicubic", "mask": "none"}, "--mask none would change nothing: it is used with --method deap only"),
        ({"method": "linear", "only_mask": True}, "where a preset sets it, say --no-only-mask"),
        ({"method": "linear", "shared_sigma": True}, "--shared-sigma would change nothing"),
        ({"depth_loss": "vit-up"}, "--depth-loss vit-up would change nothing: it is used with --task depth only"),
        ({"task": "depth", **OF_TASK["depth"], "gradient_loss": "spatial"}, "depth and with --depth-loss vit-up only"),
        ({"task": "depth", **OF_TASK["depth"], "outputs": 3}, "--outputs 3 would change nothing"),
        ({"samples": 5}, "--samples 5 would change nothing: it is used with --task instances only"),
        ({"large_area": 5.0}, "--large-area 5.0 would"),
        ({"many": 5}, "--many 5 would"),
        ({"final_lr": 1e-3}, "--final-lr 0.001 would change nothing: it is used with --schedule cosine only"),
        ({"revision": "v2"}, "--revision v2 would change nothing: it is used with --weights pretrained only"),
    ],
)
def test_settings_that_nothing_would_use_are_refused(sets, tmp_path, changes, message):
    with pytest.raises(ConfigError) as error:
        prepared(training(sets, tmp_path / "run", **changes))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "depth", "dataset": "voc"}, "--task depth needs depth; --dataset voc has classes. Use nyu"),
        ({"task": "boundaries", "dataset": "nyu"}, "--task boundaries needs instances; --dataset nyu"),
        ({"dataset": "vocc"}, "--dataset vocc: there are voc, "),
        ({"drawing": "paper", "store": "x"}, "--drawing paper"),
        ({"limit": 0}, "--limit 0"),
        ({"val_limit": 0}, "--val-limit 0"),
        ({"side": 0}, "--side 0"),
        ({"samples": 0}, "--samples 0"),
        ({"method": "depth_bins"}, "--method depth_bins predicts depth"),
        ({"store": "memory://x", "executor": "ray"}, "one process only"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(sets, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        training(sets, tmp_path / "run", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": 20}, "--outputs 20: voc has 21 classes"),
        ({"level": "x2=lift:nowhere"}, "nowhere"),
        ({"level": "x3.3"}, "x3.3"),
        ({"level": "pooled"}, "--level pooled: .* has the maps x1"),
        ({"dim": 12}, "dim must be a multiple of 8"),
        ({"size": 70}, "70x70 px .*--ragged"),
        ({"task": "instances", **OF_TASK["instances"], "many": 9}, "none of 4 images has more than 9 objects .*lower --many"),
    ],
)
def test_settings_that_do_not_fit_model_or_data_are_refused(sets, tmp_path, changes, message):
    config = training(sets, tmp_path / "run", **changes)

    with pytest.raises((ConfigError, WeightsUnavailable), match=message):
        prepared(config)
    assert not (tmp_path / "run").exists()


def test_a_run_needs_a_place_and_data(sets, tmp_path):
    with pytest.raises(ConfigError, match="no output"):
        prepared(training(sets, ""))
    with pytest.raises(ConfigError, match="no data: give --data"):
        prepared(replace(training(sets, tmp_path / "run"), data=""))


def test_more_outputs_than_classes_and_maps_by_name(sets, tmp_path):
    config = training(sets, tmp_path / "run", outputs=30, level="x2@float32", max_steps=1)

    train(config)

    readout = load_readout(config.out)
    assert readout.config == ReadoutConfig(method="deap", channels=64, outputs=30, output=(64, 64))
    assert readout.features["level"]["grid"] == [8, 8]
    assert held_out(config.out)["miou"] >= 0
