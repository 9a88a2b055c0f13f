"""Evaluating trained readouts: the scores that training printed, from wherever features are, and nothing where they can't be."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import evaluate as evaluate_job
from jobs import train as train_job
from pipelines.config import ConfigError
from pipelines.evaluation import readouts as probe
from pipelines.evaluation import run
from pipelines.evaluation.readouts import ProbeConfig
from pipelines.evaluation.run import main, run_pieces
from pipelines.executors import InlineExecutor
from pipelines.features.feature_source import CachedSource
from pipelines.features.join import FeaturesMissing
from pipelines.features.live_source import LiveSource
from pipelines.features.model import FeatureModel
from pipelines.features.photos import upright_pixels
from pipelines.features.weights import WeightsUnavailable
from pipelines.readouts.segmentation import SegmentationTask, class_colours
from storage.datasets.files import DatasetError
from storage.documents import decode
from storage.paths import Folder
from storage.runs import read_pointers
from tests.as_on_ray import Travelling
from tests.pipelines.evaluation.test_evaluation import evaluate
from tests.readout_runs import OF_TASK, TINY, extract, featup_file, held_out, train, training

SHORT = {"batch": 2, "micro_batch": 1, "epochs": 10, "max_steps": 24, "checkpoint_every": 24, "validate_every": 24}
IMAGES = "VOC2012/VOCdevkit/VOC2012/JPEGImages"


@pytest.fixture(scope="module")
def trained(sets, tmp_path_factory):
    """A run with these settings, once a module; its folder. Its held-out images go through the readout one by one.

    After fewer steps, all is background, and nothing is found: scores that say nothing.
    """
    root, runs = tmp_path_factory.mktemp("runs"), {}

    def make(task: str = "segmentation", **changes: object) -> str:
        name = json.dumps([task, changes])
        if name not in runs:
            settings = {**SHORT, **changes}
            config = training(sets, root / f"{task}-{len(runs)}", task, **settings)
            train(config)
            runs[name] = config.out
        return runs[name]

    return make


@pytest.fixture
def config_of(sets, tmp_path):
    def make(*readouts: str, task: str = "segmentation", **changes: object) -> ProbeConfig:
        data = str(sets / str(OF_TASK[task]["data"]))
        settings = {"data": data, "out": str(tmp_path / "out"), "readouts": readouts, "pictures": 0, **TINY, **changes}
        return ProbeConfig.of(**settings)

    return make


def scores(config: ProbeConfig) -> list[dict[str, float]]:
    return list(evaluate(probe, config)[1].details["scores"].values())


def expected(run_folder: str) -> dict[str, float]:
    """What training printed, but for the loss and the counts; over how many images it is, is a score of instances."""
    found = held_out(run_folder)
    others = {"loss", "left_out", "empty", "seen"} | (set() if "ari" in found else {"images"})
    return {name: value for name, value in found.items() if name not in others}


# --- the scores of training -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", OF_TASK)
def test_scores_are_those_that_training_printed(trained, config_of, task):
    url = trained(task)

    assert scores(config_of(url, task=task)) == [expected(url)]


@pytest.mark.parametrize("task", OF_TASK)
def test_figures_of_all_images_are_the_scores(trained, config_of, task):
    config = config_of(trained(task), task=task)
    evaluation, recipe, folder = probe.prepare(config)
    records = run_pieces(config, evaluation, recipe, folder, InlineExecutor())
    judged = [decode(evaluation.task.record, record["judged"]) for record in records]

    figures = evaluation.task.scored(judged)
    (line,) = probe.find(config, evaluation, recipe, records).tables[0].lines

    scores = {name: value for name, value in evaluation.task.scores(judged).items() if name != "images"}
    found = dict(zip(figures.names, figures.drawn(np.ones((len(judged), 1)))[0], strict=True))
    assert {name: found[name] for name in scores} == pytest.approx(scores, nan_ok=True)
    measured = [value for value in scores.values() if np.isfinite(value)]
    assert sum(bool(each and each.interval) for each in line.estimates) == len(measured) > 0


def test_two_workers_give_the_scores_of_one(trained, config_of, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "PIECE_IMAGES", 1)
    url = trained()
    alone = evaluate(probe, config_of(url, out=str(tmp_path / "alone")))

    both = evaluate(probe, config_of(url, out=str(tmp_path / "both")), Travelling())

    assert both[0] == alone[0]
    assert both[1].tables == alone[1].tables
    assert list(both[1].details["scores"].values()) == [expected(url)]


@pytest.mark.parametrize("task", ["segmentation", "depth", "detection"])
def test_the_order_of_images_changes_no_score(trained, config_of, task):
    config = config_of(trained(task), task=task)
    evaluation, recipe, folder = probe.prepare(config)
    records = run_pieces(config, evaluation, recipe, folder, InlineExecutor())

    found = probe.find(config, evaluation, recipe, records[::-1]).details

    assert found == probe.find(config, evaluation, recipe, records).details


def test_a_store_gives_the_scores_of_the_run_that_read_it(sets, trained, config_of, tiny, tmp_path):
    store = extract(tiny, tmp_path / "voc.zarr", sets / IMAGES)
    train(training(sets, tmp_path / "run", store=store, size=None, **SHORT))
    url = str(tmp_path / "run")

    assert scores(config_of(url, stores=(store,))) == [expected(url)]
    # Images are drawn for a live model as they were in training, where nothing else is said.
    assert scores(config_of(url, out=str(tmp_path / "live"))) == [expected(url)]
    other = evaluate(probe, config_of(url, out=str(tmp_path / "paper"), drawing="paper"))[1]
    assert other.details["scores"] != {"run": expected(url)}
    assert other.choices["images"] == "as the paper's code draws them; run trained on images drawn otherwise"


def test_depth_bins_are_given_the_pooled_vector(sets, trained, config_of, tiny, tmp_path):
    settings = {"method": "depth_bins", "depth_loss": "vit-up"}
    url = trained("depth", drawing="extract", **settings)
    store = extract(tiny, tmp_path / "nyu.zarr", sets / "NYU/images", geometry="squash", levels=("x1", "pooled"))

    assert scores(config_of(url, task="depth")) == [expected(url)]
    (stored,) = scores(config_of(url, task="depth", stores=(store,), out=str(tmp_path / "stored")))
    for name, value in expected(url).items():
        assert stored[name] == pytest.approx(value, rel=1e-3), name
    plain = extract(tiny, tmp_path / "plain.zarr", sets / "NYU/images", geometry="squash")
    with pytest.raises(ConfigError, match=r"reads the CLS vector, .* --levels pooled=cls"):
        probe.prepare(config_of(url, task="depth", stores=(plain,), out=str(tmp_path / "plain")))


def test_a_run_without_normalisation_is_evaluated_without(trained, config_of):
    url = trained(normalise=False)

    assert scores(config_of(url)) == [expected(url)]
    assert expected(url) != expected(trained())


def test_maps_are_read_by_name(trained, config_of, tmp_path):
    url = trained(level="x2", method="linear")

    with pytest.raises(ConfigError, match=r"reads x2 \(bilinear\), which isn't among --levels"):
        probe.prepare(config_of(url))
    assert scores(config_of(url, levels=("x1", "x2"))) == [expected(url)]


def test_featup_is_judged_on_the_map_that_its_file_enlarges(trained, config_of, tmp_path):
    level = f"x4=featup:{featup_file(tmp_path / 'test_jbu_stack.ckpt')}"
    url = trained(level=level, method="featup")

    with pytest.raises(ConfigError, match=r"reads x4 \(featup\), which isn't among --levels"):
        probe.prepare(config_of(url))
    assert scores(config_of(url, levels=("x1", level))) == [expected(url)]


# --- sources ----------------------------------------------------------------------------------------------------------


def test_the_pooled_vector_comes_from_the_forward_of_the_maps(trained, config_of, monkeypatch):
    evaluation, recipe, _ = probe.prepare(config_of(trained("depth", method="depth_bins"), task="depth"))
    calls, forward = [], FeatureModel.__call__

    def counted(self, images):
        calls.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(FeatureModel, "__call__", counted)
    pictures = [evaluation.drawn.input_picture(item.image, evaluation.size) for item in evaluation.images[:2]]
    cached = CachedSource(recipe.open("cpu"))
    first, second = ((cached.maps(picture), cached.pooled(picture))[1] for picture in pictures)
    assert (calls, first.shape, str(first.dtype)) == ([1, 1], (64,), "torch.float32")

    # Long after its maps, it is made anew.
    cached.maps(pictures[0])
    assert cached.pooled(pictures[0]).equal(first)
    assert not first.equal(second)
    assert len(calls) == 3


def test_models_without_that_level_have_no_pooled_vector(trained, config_of):
    evaluation, recipe, _ = probe.prepare(config_of(trained()))
    picture = evaluation.drawn.input_picture(evaluation.images[0].image, evaluation.size)

    assert LiveSource(recipe, "cpu").pooled(picture) is None


# --- what is written --------------------------------------------------------------------------------------------------


def test_readouts_are_rows_with_their_pictures(trained, config_of, tmp_path):
    urls = trained(), trained(method="linear")

    _, findings = evaluate(probe, config_of(*urls, pictures=2))

    (table,) = findings.tables
    names = [Path(url).name for url in urls]
    assert [line.features for line in table.lines] == [f"{name} on low-res" for name in names]
    assert [line.values[0] for line in table.lines] == ["deap", "linear"]
    assert table.lines[1].values[1] == 64 * 21 + 21
    assert [findings.details["scores"][name] for name in names] == [expected(url) for url in urls]
    said = "step 24, the best by its held-out loss of a run that is at step 24"
    assert findings.choices["readouts"] == f"{names[0]}: {said}; {names[1]}: {said}"
    for name in (*names, "truth"):
        assert len(list((tmp_path / "out/predictions" / name).iterdir())) == 2
    with Image.open(tmp_path / "out/pictures/predictions.png") as picture:
        assert picture.width > 3 * 200
    document = json.loads((tmp_path / "out/results.json").read_text())
    assert document["details"]["trained on"][names[0]]["input_size"] == [64, 64]
    assert f"| {names[1]} on low-res" in (tmp_path / "out/results.md").read_text()


def test_readouts_may_be_compared_with_the_mean_of_others(trained, config_of):
    urls = trained(), trained(method="linear")
    first, second = (Path(url).name for url in urls)
    config = config_of(*urls)
    _, plain = evaluate(probe, config)

    _, findings = evaluate(probe, config.changed(means=(f"both={first},{second}",), against="both"))

    (before,), (table,) = plain.tables, findings.tables
    *lines, both = table.lines
    assert [line.values for line in lines] == [line.values for line in before.lines]
    at = table.columns.index("miou, %")
    values = [line.values[at] for line in lines]
    assert both.values[:2] == (None, None)  # other readouts, of other sizes
    assert both.values[at] == pytest.approx(sum(values) / 2)
    for line in lines:
        assert line.estimates[at].against == "both"
        assert line.estimates[at].difference == pytest.approx(line.values[at] - both.values[at], abs=1e-6)
    assert both.estimates[at].difference is None
    assert f"both is the mean of {first}, {second}" in table.notes
    with pytest.raises(ConfigError, match=f"--against low-res: no line is called so; there are {first}, {second}"):
        evaluate(probe, config.changed(against="low-res"))


@pytest.mark.parametrize("task", OF_TASK)
def test_outputs_may_be_twice_as_large(trained, config_of, tmp_path, task):
    """DeAP is asked more queries; features are the same, so that images are drawn as they were."""
    url = trained(task)
    side = 2 * int(OF_TASK[task].get("side", 64))

    evaluation, recipe, folder = probe.prepare(config := config_of(url, task=task, side=side, pictures=1))
    records = run_pieces(config, evaluation, recipe, folder, InlineExecutor())
    (found,) = probe.find(config, evaluation, recipe, records).details["scores"].values()

    assert found.keys() == expected(url).keys()
    assert np.isfinite(list(found.values())).all()
    assert found != expected(url)
    plain, _, _ = probe.prepare(config_of(url, task=task, out=str(tmp_path / "plain")))
    image = evaluation.images[0].image
    drawn = [each.drawn.input_picture(image, each.size).draw(upright_pixels(image)) for each in (plain, evaluation)]
    np.testing.assert_array_equal(*drawn)
    (prediction,) = (tmp_path / "out/predictions/truth").iterdir()
    with Image.open(prediction) as picture:
        assert picture.size == (side, side)


def test_pictures_asked_for_later_are_left_out(trained, config_of, tmp_path):
    url = trained()
    evaluate(probe, config_of(url, pictures=1))

    _, findings = evaluate(probe, config_of(url, pictures=4))
    assert list(findings.pictures) == ["predictions.png"]
    none = config_of(url, out=str(tmp_path / "none"))
    evaluate(probe, none)
    assert evaluate(probe, replace(none, pictures=4))[1].pictures == {}

    *_, where = main("probe", probe, replace(none, pictures=4))

    assert where.startswith("written to")
    assert (
        "- pictures: --pictures 4: none, since an earlier start scored these items" in (tmp_path / "none/results.md").read_text()
    )
    list(main("probe", probe, none))
    assert "--pictures" not in (tmp_path / "none/results.md").read_text()


def test_names_are_made_different(trained, config_of, tmp_path):
    for folder in ("a/truth", "b/truth"):
        shutil.copytree(trained(), tmp_path / folder)
    best = read_pointers(Folder(trained())).best
    urls = (str(tmp_path / "a/truth"), f"{tmp_path}/b/truth/{best}")

    _, findings = evaluate(probe, config_of(*urls, pictures=1))

    assert list(findings.details["scores"]) == ["truth'", "truth''"]


def test_what_was_stopped_goes_on(trained, config_of, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "PIECE_IMAGES", 1)
    config, did, plain = config_of(trained(), pictures=4), [], run.Work.run

    def stops(self, piece, source):
        if len(did) == 2:
            raise KeyboardInterrupt
        did.append(piece.name)
        return plain(self, piece, source)

    monkeypatch.setattr(run.Work, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate(probe, config)
    parts = tmp_path / "out/parts"
    assert sorted(path.name for path in parts.iterdir()) == ["0000000.jsonl", "0000001.jsonl"]
    before = {path.name: path.stat().st_mtime_ns for path in parts.iterdir()}
    monkeypatch.setattr(run.Work, "run", plain)

    _, findings = evaluate(probe, config)

    assert list(findings.details["scores"].values()) == [expected(trained())]
    assert {path.name: path.stat().st_mtime_ns for path in parts.iterdir() if path.name in before} == before
    with pytest.raises(ConfigError, match="was begun with other settings"):
        probe.prepare(replace(config, side=128))
    with pytest.raises(ConfigError, match="was begun with other settings"):
        probe.prepare(replace(config, readouts=(trained(seed=1),)))


def test_credentials_in_urls_of_readouts_are_not_stored():
    config = ProbeConfig.of(readouts=("https://user:secret-word@host/run",), data="x", out="y")

    assert "secret-word" not in json.dumps(config.public())


# --- what can't be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"facet": "key"}, "facet            trained on 'token'   now 'key'"),
        ({"weights": "random:5"}, "weights          trained on "),
        ({"layers": (2,)}, r"layers           trained on \[5\]   now \[2\]"),
        ({"stride": 8}, "stride           trained on 16   now 8"),
        ({"model": "test_vit2.r160_in1k"}, "model            trained on 'test_vit.r160_in1k'"),
        ({"dataset": "nyu"}, "--dataset nyu has depth, but .* was trained for 21 classes, on voc"),
        ({"dataset": "ade20k"}, "--dataset ade20k has 151 classes, but .* was trained for 21 classes, on voc"),
        ({"dataset": "poetry"}, "--dataset poetry: there are voc"),
        ({"readouts": ()}, "no readouts: give --readouts"),
        ({"data": ""}, "no data"),
        ({"out": ""}, "no output"),
    ],
)
def test_what_does_not_fit_the_readout_is_refused(trained, config_of, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        probe.prepare(config_of(*changes.get("readouts", (trained(),)), **{k: v for k, v in changes.items() if k != "readouts"}))
    assert not (tmp_path / "out").exists()


def test_readouts_of_different_tasks_or_sides_are_refused(trained, config_of, tmp_path):
    with pytest.raises(ConfigError, match=r"was trained for BoundaryTask.*evaluate each alone"):
        probe.prepare(config_of(trained(), trained("boundaries")))
    other = trained(side=128)
    with pytest.raises(ConfigError, match="--side 128, .* with --side 64; say by which all are judged with --side"):
        probe.prepare(config_of(trained(), other))
    with pytest.raises(ConfigError, match="drawn at 128 px, .* at 64 px"):
        probe.prepare(config_of(trained(), other, side=64))
    either = {"drawing": "extract", "side": 128}
    one_way = scores(config_of(trained(), other, out=str(tmp_path / "one"), **either))
    assert one_way == scores(config_of(other, trained(), out=str(tmp_path / "other"), **either))[::-1]
    drawn = trained(drawing="extract")
    with pytest.raises(
        ConfigError, match="--drawing extract, .* with --drawing paper; say by which all are judged with --drawing"
    ):
        probe.prepare(config_of(trained(), drawn))


def test_stores_that_do_not_fit_are_refused(sets, trained, config_of, tiny, tmp_path):
    url = trained()
    for name, changes, message in (
        ("squash", {"geometry": "squash"}, "--geometry crop"),
        ("large", {"size": "96"}, "none was extracted at 64x64 px"),
        ("key", {"facet": "key"}, "facet            trained on 'token'   now 'key'"),
    ):
        store = extract(tiny, tmp_path / f"{name}.zarr", sets / IMAGES, **changes)
        with pytest.raises(ConfigError, match=message):
            probe.prepare(config_of(url, stores=(store,)))
    few = extract(tiny, tmp_path / "few.zarr", sets / IMAGES, limit=8)
    with pytest.raises(FeaturesMissing, match=r"2 of 4 images are not in it; the first: .*000008.jpg"):
        evaluate(probe, config_of(url, stores=(few,)))


def test_what_is_no_readout_is_refused(config_of, tmp_path):
    with pytest.raises(WeightsUnavailable, match=f"no weights at {tmp_path}/nowhere"):
        probe.prepare(config_of(str(tmp_path / "nowhere")))


def test_labels_that_nothing_can_be_told_from_are_named(sets, trained, config_of, tmp_path):
    data = tmp_path / "void"
    shutil.copytree(sets / "VOC2012", data)
    for path in (data / "VOCdevkit/VOC2012/SegmentationClass").iterdir():
        Image.fromarray(np.full_like(np.array(Image.open(path)), 255)).save(path)

    with pytest.raises(DatasetError, match="none of 4 images can be scored: no pixel was scored"):
        evaluate(probe, config_of(trained(), data=str(data)))


# --- the programs -----------------------------------------------------------------------------------------------------


def test_a_readout_is_trained_and_evaluated_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = ["--epochs", "2", "--checkpoint-every", "4", "--validate-every", "4"]

    assert train_job.run(["debug-readout", "--backbone", "test_vit.r160_in1k", *short]) == 0
    printed = capsys.readouterr().out
    assert "4 steps, 12 images, 0 left out" in printed
    assert f"try next   python jobs/evaluate.py probe --readouts {tmp_path}/demo/train-readout/steps/" in printed
    assert train_job.run(["debug-readout", "--backbone=test_vit2.r160_in1k", *short]) == 2
    assert "model" in capsys.readouterr().err

    assert evaluate_job.run(["probe", "debug"]) == 0
    assert "| train-readout on low-res" in capsys.readouterr().out
    found = json.loads(Path("demo/eval-probe/results.json").read_text())["details"]["scores"]["train-readout"]
    for name, value in expected("demo/train-readout").items():
        assert found[name] == pytest.approx(value, rel=1e-3), name
    assert evaluate_job.run(["probe", "debug", "--facet", "key", "--out", "other"]) == 2
    assert "facet            trained on 'token'   now 'key'" in capsys.readouterr().err


def test_published_settings_of_readouts_parse():
    presets = [name for name in train_job.PRESETS if name.startswith(("deap", "probe"))]
    assert len(presets) >= 11
    for name in presets:
        config = train_job.program.parse([name, "--data", "x", "--out", "y", "--backbone", "vit_base_patch16_224.mae"]).config
        assert config.features.model == "vit_base_patch16_224.mae"
    deap = train_job.program.parse(["deap-voc"]).config
    assert (deap.side, deap.placement, deap.lr, deap.weight_decay, deap.batch) == (224, "squash", 1e-3, 0.01, 32)
    depth = train_job.program.parse(["probe-depth"]).config
    assert (depth.method, depth.depth_loss, depth.normalise, depth.side) == ("depth_bins", "vit-up", False, 448)
    linear = train_job.program.parse(["probe", "--dataset", "ade20k"]).config
    assert (linear.method, linear.batch, linear.flip, linear.schedule, linear.lr) == ("linear", 4, True, "cosine", 2e-3)


def test_a_segmentations_legend_names_the_classes_that_are_drawn():
    task = SegmentationTask(placement="squash", side=4, classes=4)
    drawn = class_colours(np.array([[0, 2], [3, 255]]))

    legend = dict(task.legend([drawn], ("background", "cat", "dog")))

    assert list(legend) == ["background", "dog", "class 3", "void"]
    assert list(legend.values()) == [tuple(colour) for colour in drawn.reshape(-1, 3).tolist()]
