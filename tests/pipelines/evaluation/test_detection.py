"""Detection on COCO's layout: numbers of pycocotools by hand, rows, whatever annotations and checkpoints are like."""

import contextlib
import io
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import safetensors.numpy
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from jobs.evaluate import run
from operators.timm_models import state_arrays
from operators.vitdet.checkpoint import build, described, doubling_net
from operators.vitdet.detector import Detections, Detector
from operators.vitdet.settings import DetectorSettings
from pipelines.demo_datasets import write_demo
from pipelines.evaluation import detection
from pipelines.evaluation.detection import DetectionConfig
from pipelines.evaluation.run import evaluate
from pipelines.features.detectors import RANDOM, STAGES, Detected, RunningDetectors, load_detector
from storage.datasets.classes import COCO_CATEGORIES
from storage.datasets.frames import OrientedImage
from storage.errors import RayliftError
from storage.orientation import Orientation
from tests.as_on_ray import Travelling
from tests.goldens import golden_file

NOTES = "annotations/instances_val2017.json"

LIFT = {"method": "lift", "channels": RANDOM.dim, "patch": 16, "image_width": 8}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("drawn")
    write_demo(str(root))
    return root / "coco"


@pytest.fixture
def data(drawn, tmp_path) -> Path:
    """Four drawn images, two categories, and a copy of their annotations to be changed."""
    (tmp_path / "coco/annotations").mkdir(parents=True)
    (tmp_path / "coco/val2017").symlink_to(drawn / "val2017")
    (tmp_path / "coco" / NOTES).write_bytes((drawn / NOTES).read_bytes())
    return tmp_path / "coco"


def changed(data: Path, change: Callable[[dict], object]) -> None:
    notes = json.loads((data / NOTES).read_text())
    change(notes)
    (data / NOTES).write_text(json.dumps(notes))


def save(folder: Path, settings: DetectorSettings, upsampler: dict | None = None, seed: int = 0, **said: object) -> str:
    """A checkpoint with random weights, those of the detector the same with and without an upsampler."""
    folder.mkdir(parents=True)
    arrays = {**state_arrays(build(described(settings, upsampler), seed)), **state_arrays(build(described(settings), seed))}
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**described(settings, upsampler), **said}))
    return str(folder)


TWO = replace(RANDOM, classes=2, score_threshold=0.0)
"""What the drawn images have, and detections whatever their scores are."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("plain") / "run", TWO, categories=[[1, "red"], [2, "blue"]])


@pytest.fixture(scope="module")
def lifted(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("lifted") / "run", TWO, LIFT, categories=[[1, "red"], [2, "blue"]])


def config_of(data: Path, out: Path, **settings: object) -> DetectionConfig:
    given = {"size": 64, "pictures": 0, "executor": "inline", "device": "cpu", "data": str(data), "out": str(out), **settings}
    return DetectionConfig.of(**given)


def results(config: DetectionConfig) -> dict:
    evaluate("detection", detection, config)
    return json.loads((Path(config.out) / "results.json").read_text())


def refusal(config: DetectionConfig) -> str:
    """The sentence that an evaluation ends with."""
    with pytest.raises(RayliftError) as caught:
        results(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def by_hand(data: Path, out: Path, row: str, kind: str) -> list[float]:
    """COCO's twelve numbers by its own tool, from the annotations and what an evaluation wrote."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(data / NOTES))
        evaluation = COCOeval(truth, truth.loadRes(str(out / f"detections/{row}.{kind}.json")), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [None if value < 0 else 100 * value for value in evaluation.stats]


def twelve(found: dict, row: str, kind: str) -> list[float]:
    (table,) = [each for each in found["tables"] if each["title"].startswith(f"COCO's twelve numbers of {kind}")]
    return next(line["values"] for line in table["lines"] if line["features"] == row)


def require_by_hand(found: dict, data: Path, out: Path, rows: tuple[str, ...]) -> None:
    for row in rows:
        for kind, word in (("bbox", "boxes"), ("segm", "masks")):
            ours, theirs = twelve(found, row, word), by_hand(data, out, row.replace(",", "-").replace(" ", "-"), kind)
            assert [each is None for each in ours] == [each is None for each in theirs]
            np.testing.assert_allclose(*([each or 0 for each in values] for values in (ours, theirs)), rtol=0, atol=1e-9)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_numbers_of_each_row_are_those_of_cocos_tool_with_crowds_and_images_without_objects(data, plain, lifted, tmp_path):
    def change(notes: dict) -> None:
        first, *_, last = notes["images"]
        notes["annotations"] = [each for each in notes["annotations"] if each["image_id"] != last["id"]]
        runs = [0, first["height"] * 20, first["height"] * (first["width"] - 20)]
        crowd = {"size": [first["height"], first["width"]], "counts": runs}
        notes["annotations"].append(
            {"id": 999, "image_id": first["id"], "category_id": 1, "iscrowd": 1, "segmentation": crowd}
            | {"bbox": [0, 0, 20, first["height"]], "area": 20 * first["height"]}
        )

    changed(data, change)
    config = config_of(data, tmp_path / "out", detector=plain, upsamplers=("lift",), finetuned=(lifted,), per_class=True)

    found = results(config)

    rows = ("low-res", "bilinear x2", "lift x2", "lift x2, finetuned")
    assert [line["features"] for line in found["tables"][0]["lines"]] == list(rows)
    assert [line["grid"] for line in found["tables"][0]["lines"]] == ["4x4", "8x8", "8x8", "8x8"]
    require_by_hand(found, data, tmp_path / "out", rows)
    assert found["items"]["scored"]["images"] == 4
    assert found["items"]["scored"]["objects"] == len(json.loads((data / NOTES).read_text())["annotations"]) - 1
    by_class = {(line["features"], line["values"][0]): line["values"][2] for line in found["tables"][3]["lines"]}
    for row in rows:
        mean = np.mean([by_class[row, name] for name in ("red", "blue")])
        assert mean == pytest.approx(twelve(found, row, "boxes")[0])
    (times,) = found["times"]
    assert times["columns"][: len(STAGES)] == list(STAGES)
    assert all(min(line["values"][0], *line["values"][2:6]) > 0 for line in times["lines"])


def golden_coco(root: Path) -> dict:
    """The images of the golden file's annotations, drawn; and what it holds."""
    stored = json.loads(golden_file("eval_coco_ap.json").read_text())
    for image in stored["ground_truth"]["images"]:
        path = root / "val2017" / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (image["width"], image["height"])).save(path)
    (root / "annotations").mkdir()
    (root / NOTES).write_text(json.dumps(stored["ground_truth"]))
    return stored


def test_numbers_are_the_goldens_of_its_detections(tmp_path, monkeypatch):
    root = tmp_path / "coco"
    stored = golden_coco(root)
    categories = [each["id"] for each in stored["ground_truth"]["categories"]]
    numbers = {image["file_name"]: image["id"] for image in stored["ground_truth"]["images"]}

    def detect(self: RunningDetectors, pixels_HW3: np.ndarray, displayed: str) -> dict[str, Detected]:
        entries = [each for each in stored["detections"] if each["image_id"] == numbers[displayed.rsplit("/", 1)[-1]]]
        boxes = np.array([each["bbox"] for each in entries], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = [coco_mask.decode(each["segmentation"]).astype(bool) for each in entries]
        found = Detections(
            boxes_N4=torch.from_numpy(boxes),
            scores_N=torch.tensor([each["score"] for each in entries], dtype=torch.float64),
            classes_N=torch.tensor([categories.index(each["category_id"]) for each in entries], dtype=torch.int64),
            masks_NHW=torch.from_numpy(np.array(masks, bool).reshape(-1, *pixels_HW3.shape[:2])),
        )
        return {row.row.name: Detected(found=found, seconds=dict.fromkeys(STAGES, 1.0)) for row in self.recipe.rows}

    monkeypatch.setattr(RunningDetectors, "detect", detect)
    found = results(config_of(root, tmp_path / "out", detector="random"))

    boxes, masks = (np.array(twelve(found, "low-res", kind)) / 100 for kind in ("boxes", "masks"))
    np.testing.assert_allclose(boxes, stored["expected"]["bbox"], rtol=0, atol=1e-6)
    # By size, the golden file's masks have the areas of their boxes.
    whole = [0, 1, 2, 6, 7, 8]
    np.testing.assert_allclose(masks[whole], np.array(stored["expected"]["segm"])[whole], rtol=0, atol=1e-6)
    require_by_hand(found, root, tmp_path / "out", ("low-res",))


def test_two_workers_and_a_stopped_evaluation_come_to_the_same(data, plain, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.evaluation.objects.PIECE_IMAGES", 1)
    settings = {"detector": plain, "upsamplers": ("lift",)}
    first = results(config_of(data, tmp_path / "inline", **settings))
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.evaluation.run.executor_for", lambda _: contextlib.nullcontext(Travelling()))
        shared_out = results(config_of(data, tmp_path / "two", **settings))
    for part in sorted((tmp_path / "inline/parts").iterdir())[1:]:
        part.unlink()

    again = results(config_of(data, tmp_path / "inline", **settings))

    for found in (shared_out, again):
        assert [found[part] for part in ("tables", "items", "details")] == [
            first[part] for part in ("tables", "items", "details")
        ]


def test_papers_numbers_stand_below_their_rows_with_what_they_are_of(data, plain, lifted, tmp_path):
    found = results(config_of(data, tmp_path / "out", detector=plain, finetuned=(lifted,), paper=True))

    table = found["tables"][0]
    assert [line["features"].split(",")[0] for line in table["lines"]] == [
        *("low-res", "LiFT Table 4", "bilinear x2", "lift x2", "LiFT Table 4")
    ]
    assert table["lines"][1]["values"][2:] == [39.50, 61.56, 42.23, 37.81, 60.47, 39.97]
    assert table["lines"][4]["values"][2:] == [45.98, 66.41, 49.87, 40.78, 63.34, 43.57]
    assert "channels published 768, here 48" in table["notes"][0]


# --- rows and checkpoints ---------------------------------------------------------------------------------------------


def test_a_detector_with_an_upsampler_gives_its_low_resolution_row_and_bilinear_one_too(data, lifted, tmp_path):
    found = results(config_of(data, tmp_path / "out", detector=lifted))

    assert [line["features"] for line in found["tables"][0]["lines"]] == ["low-res", "bilinear x2", "lift x2"]
    assert found["choices"]["heads"] == "low-res: trained with lift; bilinear x2: trained with lift; lift x2: trained with lift"


def test_rows_that_share_a_backbone_run_it_once(data, plain, lifted, tmp_path, monkeypatch):
    counted = []
    features = Detector.features
    monkeypatch.setattr(Detector, "features", lambda self, images: counted.append(1) or features(self, images))
    results(config_of(data, tmp_path / "out", detector=plain, upsamplers=("lift",), finetuned=(lifted,)))

    assert len(counted) == 4  # images


def test_an_official_file_tells_its_settings_and_has_cocos_categories(tmp_path):
    settings = replace(RANDOM, classes=80)
    arrays = state_arrays(build(described(settings)))
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "test"}))

    found = load_detector(str(path))

    assert (found.head, found.settings.dim, found.settings.window, found.categories) == ("mask_rcnn", RANDOM.dim, 4, ())
    assert detection.class_ids([found], dict(list(COCO_CATEGORIES.items())[:5])) == tuple(COCO_CATEGORIES)


def test_the_input_is_512_px_or_what_the_detector_was_trained_at(data, plain, tmp_path):
    small = detection.prepare(config_of(data, tmp_path / "a", detector=plain, size=None))[1]
    large = save(tmp_path / "large", replace(TWO, square_pad=1024))

    assert small.size == TWO.square_pad
    assert detection.prepare(config_of(data, tmp_path / "b", detector=large, size=None))[1].size == 512


# --- bad input --------------------------------------------------------------------------------------------------------


def test_without_masks_boxes_are_scored_and_masks_said_to_be_missing(data, plain, tmp_path):
    changed(data, lambda notes: notes["annotations"][0].pop("segmentation"))

    found = results(config_of(data, tmp_path / "out", detector=plain, pictures=2))

    assert "masks aren't scored: 1 annotations have a box alone" in found["tables"][0]["notes"]
    assert found["tables"][0]["lines"][0]["values"][2] is not None
    assert found["tables"][0]["lines"][0]["values"][5:] == [None, None, None]
    assert [table["title"] for table in found["tables"][1:]] == ["COCO's twelve numbers of boxes, %"]
    ours, theirs = twelve(found, "low-res", "boxes"), by_hand(data, tmp_path / "out", "low-res", "bbox")
    assert ours == pytest.approx(theirs)


def test_objects_whose_masks_cover_no_pixel_are_said_to_count_as_not_found(data, plain, tmp_path):
    changed(data, lambda notes: notes["annotations"][0].update(segmentation=[[10, 10, 20, 20]]))

    found = results(config_of(data, tmp_path / "out", detector=plain))

    (note,) = found["tables"][0]["notes"]
    assert note.startswith("the masks of 1 annotated objects cover no pixel (polygons of two corners, empty runs), and count as")


def test_annotations_that_list_no_categories_are_told_by_their_ids(data, plain, tmp_path):
    changed(data, lambda notes: notes.pop("categories"))

    task, *_ = detection.prepare(config_of(data, tmp_path / "out", detector=plain))

    assert task.classes == (1, 2)
    of_coco = replace(load_detector(plain), categories=(), settings=replace(TWO, classes=80))
    assert detection.class_ids([of_coco], {1: "1", 90: "90"}) == tuple(COCO_CATEGORIES)


def test_an_image_that_cannot_be_read_costs_itself_alone(data, drawn, plain, tmp_path):
    (data / "val2017").unlink()
    (data / "val2017").mkdir()
    for path in (drawn / "val2017").iterdir():
        (data / "val2017" / path.name).write_bytes(path.read_bytes())
    broken = sorted((data / "val2017").iterdir())[1]
    broken.write_bytes(b"no image")

    found = results(config_of(data, tmp_path / "out", detector=plain))

    assert found["items"]["scored"]["images"] == 3
    (left_out,) = found["items"]["left_out"]
    assert (left_out["count"], left_out["first"].endswith(broken.name)) == (1, True)
    assert "can't be read as an image" in left_out["reason"]


@pytest.mark.parametrize("exif", [3, 6, 8])
def test_objects_of_photographs_that_exif_turns_lie_on_the_upright_image(data, plain, tmp_path, exif):
    task = detection.prepare(config_of(data, tmp_path / "out", detector=plain, label_frame="stored"))[0]
    item = task.images[0]
    turn = Orientation(width=item.image.width, height=item.image.height, exif=exif)

    for note in task.truth_of(item, OrientedImage(item.image.displayed, turn)):
        assert note["segmentation"]["size"] == [turn.upright_size[1], turn.upright_size[0]]
        np.testing.assert_allclose(coco_mask.toBbox(note["segmentation"]), note["bbox"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: n["annotations"][0].update(bbox=[5000, 0, 10, 10]), "outside the image"),
        (lambda n: n["annotations"][0].update(segmentation=[[1, 2, 3]]), "its segmentation is malformed: a polygon is a list"),
        (
            lambda n: (n["categories"].append({"id": 7, "name": "green"}), n["annotations"][0].update(category_id=7)),
            r"is of category 7 (green), which isn't among the 2 of",
        ),
        (lambda n: n["categories"][0].update(name="dog"), "category 1 is 'dog' in the annotations, and 'red' to"),
        (lambda n: n["annotations"][0].pop("area"), "an annotation has no field 'area'"),
        (lambda n: n.update(annotations=[]), "none of 4 images has an annotated object beside crowds"),
        (
            lambda n: [each.update(iscrowd=1) for each in n["annotations"]],
            "none of 4 images has an annotated object beside crowds",
        ),
    ],
)
def test_annotations_that_cannot_be_right_end_it_in_a_sentence(data, plain, tmp_path, change, message):
    changed(data, change)

    assert message in refusal(config_of(data, tmp_path / "out", detector=plain))


def test_a_checkpoint_of_other_heads_or_classes_is_refused(data, plain, lifted, tmp_path):
    cascade = save(tmp_path / "cascade", replace(TWO, cascade=True), LIFT)
    three = save(tmp_path / "three", replace(TWO, classes=3), LIFT)
    unsaid = save(tmp_path / "unsaid", replace(TWO, classes=5))
    wide = save(tmp_path / "wide", replace(TWO, dim=96), {**LIFT, "channels": 96})
    others, out = tmp_path / "others", tmp_path / "out"
    others.mkdir()
    safetensors.numpy.save_file(state_arrays(doubling_net(LIFT, TWO)), others / "model.safetensors")
    backbone = {"model": "vitdet_base", "weights": "0123" * 16}
    (others / "config.json").write_text(json.dumps({"upsampler": LIFT, "backbone": backbone}))

    for settings, message in (
        ({"detector": plain, "head": "cascade"}, "has the heads of --head mask_rcnn, not of cascade"),
        ({"detector": plain, "finetuned": (cascade,)}, "has the heads of --head cascade, not of mask_rcnn"),
        ({"detector": plain, "finetuned": (three,)}, "has 3 classes"),
        ({"detector": unsaid}, "has 5 classes and doesn't say which; the annotations have 2 categories"),
        ({"detector": plain, "finetuned": (wide,)}, "has a backbone of 96 channels"),
        ({"detector": plain, "finetuned": (plain,)}, "has no upsampler: it's a plain detector; evaluate it as --detector"),
        ({"detector": lifted, "finetuned": (lifted, plain)}, "has no upsampler: it's a plain detector"),
        ({"detector": plain, "upsamplers": ("vit_up",)}, "vit_up can't stand in a detector"),
        ({"detector": plain, "upsamplers": ("lift:" + plain,)}, "is no trained upsampler"),
        ({"detector": plain, "upsamplers": (f"lift:{others}",)}, "was trained on other maps than those of"),
        ({"detector": str(data)}, "no weights at"),
        ({}, "no detector: give --detector"),
        ({"detector": plain, "shown_from": 0.2}, "--shown-from 0.2 would change nothing"),
    ):
        assert message in refusal(config_of(data, out, **settings))
    assert not out.exists()


def test_weights_that_went_astray_end_it_in_a_sentence(data, tmp_path):
    folder = Path(save(tmp_path / "nan", TWO))
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    arrays["backbone.net.pos_embed"][:] = np.nan
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")

    assert "gives NaN or infinity" in refusal(config_of(data, tmp_path / "out", detector=str(folder)))


def test_plan_says_what_rows_are_made_of_and_what_memory_they_take_and_begins_nothing(data, plain, tmp_path, capsys):
    out = tmp_path / "out"
    code = run(["detection", "debug", "--data", str(data), "--detector", plain, "--out", str(out), "--plan"])

    printed = capsys.readouterr().out
    assert code == 0
    assert "lift x2" in printed
    assert "memory     about 1.0 GB a process on a CPU, an image of 64 px at a time" in printed
    assert not out.exists()
