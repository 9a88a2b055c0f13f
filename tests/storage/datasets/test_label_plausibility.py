"""Labels that can't be right: depth by another scale, ids that are there twice, boxes and points outside their images."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.config import ConfigError
from pipelines.demo_datasets import scene, write_demo
from pipelines.evaluation.video import VideoConfig, prepare
from pipelines.training.readout import ReadoutTraining
from storage.datasets.coco import load_coco20k, load_coco_instances
from storage.datasets.files import DatasetError, digest
from storage.datasets.labels import ClassMask
from storage.datasets.registry import LabelReading, load_labelled
from storage.datasets.spair import load_spair
from storage.datasets.voc import load_voc
from storage.paths import Folder
from tests.labelled import read_labelled
from tests.readout_runs import TINY


def save(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        Image.fromarray(content).save(path)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


# --- depth ------------------------------------------------------------------------------------------------------------

METRES = np.tile(np.linspace(1.2, 6.4, 64), (48, 1))
"""Of a room; 0.24 to 1.28 m where millimetres are read as 5,000 a metre."""


def write_depth(root: Path, place: str, per_metre: float, dtype: type = np.uint16, count: int = 3) -> Path:
    for n in range(count):
        save(root / f"images/{n}.png", scene(64, 48, [(4, 4, 30, 20)], n))
        values = np.roll(METRES, 7 * n, axis=1) * per_metre
        values[0, 0] = 0
        save(root / f"{place}/{n}.png", values.round().clip(0, np.iinfo(dtype).max).astype(dtype))
    return root


@pytest.mark.parametrize(("place", "per_metre"), [("depth", 5000), ("annotations", 1000)])
def test_depth_of_rooms_is_read_by_the_layouts_scale(tmp_path, place, per_metre):
    (first, *_) = load_labelled("nyu", str(write_depth(tmp_path, place, per_metre)), "all")

    np.testing.assert_allclose(read_labelled(first)[1][1:], METRES[1:], atol=0.001)


@pytest.mark.parametrize(
    ("place", "per_metre", "told"),
    [
        ("depth", 1000, r"value / 5000, depth has a median of 0\.752 m.*millimetres \(value / 1000\) 3\.76 m"),
        ("annotations", 5000, r"value / 1000, depth has a median of 18\.8 m.*TUM's \(value / 5000\) 3\.76 m"),
        ("depth", 256, r"KITTI's \(value / 256\) 3\.76 m"),
        ("annotations", 256, r"KITTI's \(value / 256\) 3\.76 m"),
        ("depth", 10000, r"tenths of a millimetre \(value / 10000\) 3\.76 m"),
        ("annotations", 6553.5, r"16 bits for 10 m \(value / 6553\.5\) 3\.76 m"),
        ("depth", 100, r"5% above 0\.123 m"),
    ],
)
def test_depth_by_another_scale_is_refused_and_read_when_it_is_said(tmp_path, place, per_metre, told):
    data = str(write_depth(tmp_path, place, per_metre))

    with pytest.raises(DatasetError, match=f"(?s){told}.*--depth-scale"):
        load_labelled("nyu", data, "all")
    found = load_labelled("nyu", data, "all", reading=LabelReading(depth_scale=per_metre))
    np.testing.assert_allclose(read_labelled(found[0])[1][1:], METRES[1:], atol=0.02)


def test_depth_of_8_bits_is_read_when_its_scale_is_said(tmp_path):
    data = str(write_depth(tmp_path, "depth", 25.5, np.uint8))

    with pytest.raises(DatasetError, match=r"is a L image; depth is 16-bit grey.*--depth-scale 25\.5"):
        load_labelled("nyu", data, "all")
    found = load_labelled("nyu", data, "all", reading=LabelReading(depth_scale=25.5))
    np.testing.assert_allclose(read_labelled(found[0])[1][1:], METRES[1:], atol=0.02)


def test_a_damaged_map_of_the_sample_does_not_end_it(tmp_path):
    data = write_depth(tmp_path, "depth", 5000)
    (data / "depth/1.png").write_bytes(b"no image")

    assert len(load_labelled("nyu", str(data), "all")) == 3


def test_scales_are_for_depth_and_above_0():
    with pytest.raises(ConfigError, match=r"--depth-scale: voc has classes, no depth"):
        ReadoutTraining.of(out="x", dataset="voc", depth_scale=1000)
    with pytest.raises(ConfigError, match=r"--depth-scale 0: must be above 0"):
        ReadoutTraining.of(out="x", dataset="nyu", task="depth", depth_scale=0)


def test_a_scale_that_is_said_counts_in_the_digest(tmp_path):
    data = str(write_depth(tmp_path, "depth", 5000))

    plain, same, other = (
        digest(load_labelled("nyu", data, "all", reading=LabelReading(depth_scale=scale))) for scale in (None, 5000, 1000)
    )

    assert plain == same != other


# --- COCO -------------------------------------------------------------------------------------------------------------


def notes() -> dict:
    """Two images with an object each, of different sizes and places."""
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 80, "height": 60} for n in (3, 7)]
    objects = [(1, 3, [30, 20, 40, 24]), (2, 7, [5, 30, 20, 20])]
    annotations = [
        {"id": n, "image_id": image, "category_id": 1, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
        | {"segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
        for n, image, (x, y, w, h) in objects
    ]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}


def write_coco(root: Path, data: dict) -> Folder:
    for n in (3, 7):
        save(root / f"val2017/{n}.jpg", scene(80, 60, [(30, 20, 70, 44)], n))
        save(root / f"train2014/{n}.jpg", scene(80, 60, [(30, 20, 70, 44)], n))
    save(root / "annotations/instances_val2017.json", data)
    save(root / "annotations/instances_train2014.json", data)
    save(root / "coco_20k_filenames.txt", "3.jpg\n7.jpg\n")
    return Folder(str(root))


LOADERS = {"instances": lambda folder: load_coco_instances(folder, "val2017"), "coco20k": load_coco20k}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["images"][1].update(id=3), "the image id 3 is there twice, for 3.jpg and for 7.jpg"),
        (lambda d: d["images"][1].update(file_name="3.jpg"), "the file name '3.jpg' is there twice, for image 3 and for image 7"),
        (lambda d: d["annotations"][1].update(id=1), "the annotation id 1 is there twice, for 3.jpg and for 7.jpg"),
        (lambda d: d["annotations"][1].update(image_id=5), "annotation 2 is of image 5, which isn't among the images"),
        (
            lambda d: d["annotations"][1].update(category_id=9),
            "annotation 2 has the category 9, which isn't among the categories",
        ),
        (lambda d: d["categories"].append({"id": 1, "name": "dog"}), "the category id 1 is there twice, for cat and for dog"),
        (lambda d: d["annotations"][0].update(bbox=[30, 20, -4, 24]), r"annotation 1 has the box .* negative extent"),
        (
            lambda d: d["annotations"][0].update(bbox=[30, 20, 70, 44]),
            r"annotation 1 has the box \[30, 20, 70, 44\]; as x, y, width, height it reaches x = 100",
        ),
        (lambda d: d["annotations"][0].update(bbox=[-30, 0, 40, 24]), "reaches x = -30, y = 0, outside the image of 80 x 60"),
    ],
)
def test_what_contradicts_itself_in_coco_is_refused_by_both_readers(tmp_path, loader, change, message):
    data = notes()
    LOADERS[loader](write_coco(tmp_path / "right", data))
    change(data)

    with pytest.raises(DatasetError, match=message):
        LOADERS[loader](write_coco(tmp_path / "wrong", data))


@pytest.mark.parametrize("area", [-1, 80 * 60 * 2, float("nan"), float("inf")])
def test_areas_that_no_object_of_the_image_has_are_refused(tmp_path, area):
    data = notes()
    data["annotations"][1]["area"] = area

    with pytest.raises(DatasetError, match=r"annotation 2 has the area .*, of an image of 80 x 60 pixels"):
        load_coco_instances(write_coco(tmp_path, data), "val2017")


def test_corners_that_stay_inside_the_image_are_told_by_the_mask(tmp_path):
    data = notes()
    data["annotations"][1]["bbox"] = [5, 30, 25, 29]
    assert read_labelled(load_coco_instances(write_coco(tmp_path / "near", data), "val2017")[1])[1].masks.sum() == 400
    data["annotations"][1].update(bbox=[5, 10, 25, 50], segmentation=[[5, 10, 25, 10, 25, 25, 5, 25]])

    found = load_coco_instances(write_coco(tmp_path / "wrong", data), "val2017")

    with pytest.raises(DatasetError, match=r"annotation 2: .* reaches from x, y = 5, 10 to 25, 25, which its box \[5.0, 10"):
        read_labelled(found[1])


def test_empty_boxes_and_files_without_categories_are_taken(tmp_path):
    data = notes()
    data["annotations"][0].update(bbox=[30, 20, 40, 0], segmentation=[[30, 20, 70, 20]])
    del data["categories"]

    found = load_coco_instances(write_coco(tmp_path, data), "val2017")

    np.testing.assert_array_equal(read_labelled(found[0])[1].boxes, [[30, 20, 70, 20]])


# --- points, boxes and masks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key_points", ["pairs", "images"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kps": [[10, 12], [88, 12]]}, "reaches x = 88, y = 12, outside the image of 80 x 60"),
        ({"bndbox": [40, 12, 28, 30]}, "ends before it begins"),
        ({"bndbox": [40, 12, 120, 30]}, "reaches x = 120"),
        ({"size": [60, 80, 3]}, None),
    ],
)
def test_points_and_boxes_outside_of_their_image_are_refused(tmp_path, key_points, change, message):
    kps, size = change.get("kps", [[10, 12], [40, 42]]), change.get("size", [80, 60, 3])
    right = {"kps": [[10, 12], [40, 42]], "bndbox": [10, 12, 40, 42], "size": [80, 60, 3]}
    of_pair = right | (change if key_points == "pairs" or "size" in change else {})
    for n, noted in enumerate((right, right | change)):
        save(tmp_path / f"JPEGImages/cat/{n}.jpg", scene(80, 60, [(10, 12, 40, 42)], n))
        points = dict(enumerate(kps if n else right["kps"]))
        note = {"kps": points, "bndbox": noted["bndbox"], "image_width": 80, "image_height": 60}
        save(tmp_path / f"ImageAnnotation/cat/{n}.json", note)
    pair = {"category": "cat", "src_imname": "0.jpg", "src_imsize": [80, 60, 3], "src_kps": right["kps"]}
    pair |= {"trg_imname": "1.jpg", "trg_imsize": of_pair["size"], "trg_kps": of_pair["kps"], "trg_bndbox": of_pair["bndbox"]}
    save(tmp_path / "PairAnnotation/test/0-0-1:cat.json", pair)
    if size != [80, 60, 3]:
        message = "the image is 80 x 60 here, and 60 x 80 in its pairs" if key_points == "images" else None
    if message is None:
        assert len(load_spair(Folder(str(tmp_path)), key_points=key_points)) == 1
        return

    with pytest.raises(DatasetError, match=message):
        load_spair(Folder(str(tmp_path)), key_points=key_points)


@pytest.mark.parametrize(
    ("corners", "message"),
    [((60, 20, 30, 24), "ends before it begins"), ((60, 20, 96, 50), None), ((60, 20, 130, 50), "reaches x = 130")],
)
def test_boxes_of_voc_are_corners_inside_their_image(tmp_path, corners, message):
    write_demo(str(tmp_path))
    path = tmp_path / "VOC2007/VOCdevkit/VOC2007/Annotations/000000.xml"
    names = ("xmin", "ymin", "xmax", "ymax")
    box = "".join(f"<{name}>{value}</{name}>" for name, value in zip(names, corners, strict=True))
    size = "<size><width>96</width><height>64</height></size>"
    path.write_text(f"<annotation>{size}<object><bndbox>{box}</bndbox></object></annotation>")
    folder = Folder(str(tmp_path / "VOC2007"))
    if message is None:
        assert load_voc(folder, "2007")[0].boxes == ((59, 19, 96, 50),)
        return

    with pytest.raises(DatasetError, match=rf"000000.xml is malformed: .*{message}"):
        load_voc(folder, "2007")


@pytest.mark.parametrize("table", ["coco_stuff", "coco_stuff27"])
def test_ids_that_no_label_of_coco_stuff_has_are_refused(tmp_path, table):
    """66 numbers the desks that COCO doesn't annotate from 1 on; here, from 0, it is 'mirror' that is at 65."""
    save(tmp_path / "a.png", np.array([[0, 66], [181, 255]], np.uint8))
    save(tmp_path / "b.png", np.array([[0, 65], [181, 255]], np.uint8))

    assert ClassMask(folder=Folder(str(tmp_path)), name="a.png", table=table).read().shape == (2, 2)
    with pytest.raises(DatasetError, match=f"holds the value 65, which labels of {table} don't have"):
        ClassMask(folder=Folder(str(tmp_path)), name="b.png", table=table).read()


def test_grey_levels_are_no_numbers_of_objects(tmp_path):
    write_demo(str(tmp_path))
    for path in (tmp_path / "DAVIS/Annotations/480p/blocks").iterdir():
        Image.open(path).convert("RGB").convert("L").save(path)
    config = VideoConfig.of(data=str(tmp_path / "DAVIS"), out=str(tmp_path / "out"), sizes=(64,), **TINY)
    task, recipe, folder = prepare(config)

    with pytest.raises(DatasetError, match="values are numbers of objects from 1, not grey levels"):
        task.run(task.pieces()[0], recipe.open("cpu"), folder)
