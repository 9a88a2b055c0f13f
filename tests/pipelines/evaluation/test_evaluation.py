"""Evaluations end to end: official layouts, live and stored features, one process and several, stopped and continued."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import get_args, get_type_hints

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from operators.metrics.cka import cka, gram, terms_of_grams
from operators.metrics.correspondence import LIFT, VIT_UP, Pck
from operators.metrics.discovery import CorLoc
from operators.metrics.propagation import nearest
from pipelines import actors
from pipelines.config import ConfigError
from pipelines.demo_datasets import scene, write_demo
from pipelines.evaluation import cka as cka_job
from pipelines.evaluation import correspondence, discovery, fidelity, run, similarity, video
from pipelines.evaluation.cka import CkaConfig
from pipelines.evaluation.correspondence import Correspondence, CorrespondenceConfig
from pipelines.evaluation.discovery import DiscoveryConfig
from pipelines.evaluation.fidelity import FidelityConfig
from pipelines.evaluation.run import run_pieces
from pipelines.evaluation.similarity import SimilarityConfig
from pipelines.evaluation.video import VideoConfig
from pipelines.executors import InlineExecutor
from pipelines.extraction.prepare import prepare, resolve
from pipelines.extraction.run import run_prepared
from pipelines.features.join import FeaturesMissing
from pipelines.features.photos import upright_pixels
from pipelines.features.pictures import Squash
from pipelines.features.rows import Row
from pipelines.features.sources import resolve_source
from pipelines.results import write_results
from storage.datasets.coco import load_coco20k
from storage.datasets.davis import load_davis
from storage.datasets.files import DatasetError
from storage.datasets.frames import OrientedImage
from storage.datasets.images import ImageFile, load_images
from storage.datasets.labels import label_png, read_labels
from storage.datasets.registry import BOXES
from storage.datasets.spair import Pair, load_spair
from storage.datasets.voc import load_voc
from storage.orientation import Orientation
from storage.paths import Folder

TINY = {"model": "test_vit.r160_in1k", "weights": "random", "precision": "fp32", "executor": "inline", "device": "cpu"}
SIZES = {"cat": ((80, 60), (53, 80), (64, 64), (81, 54)), "tvmonitor": ((80, 60), (53, 80), (64, 64), (81, 54))}
SLOTS = {"cat": 30, "tvmonitor": 16}


def save(path: Path, data: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))


def save_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def make_spair(root: Path, categories: tuple[str, ...] = ("tvmonitor", "cat"), separator: str = ":") -> Path:
    """Four images and three test pairs a category: an id that only the source has, a point on the border, odd boxes."""
    for category in categories:
        c = sorted(SIZES).index(category)
        notes = []
        for i, (width, height) in enumerate(SIZES[category]):
            name, box = f"2008_00{c}00{i}", [9 + i, 11, 40 + i, 44 + c]
            x1, y1, x2, y2 = box
            points = {str(k): None for k in range(SLOTS[category])}
            points |= {"0": [x1, y1], "3": [x2, y2], "5": [(x1 + x2) // 2, y1], "7": [width - 1, height - 1]}
            if i == 0:
                points["9"] = [x1 + 2, y2]
            if c == 1:
                points["5"] = None
            save_image(root / f"JPEGImages/{category}/{name}.jpg", scene(width, height, [tuple(box)], 10 * c + i))
            notes.append((name, width, height, box, points))
            save(
                root / f"ImageAnnotation/{category}/{name}.json",
                {"filename": f"{name}.jpg", "image_width": width, "image_height": height, "bndbox": box, "kps": points},
            )
        for number, (a, b) in enumerate(((0, 1), (1, 2), (3, 0))):
            (source, *_, points_a), (target, *_, points_b) = notes[a], notes[b]
            both = [key for key in points_a if points_a[key] and points_b[key]]
            stem = f"{number:06d}-{source}-{target}"
            pair = {"category": category, "kps_ids": both, "filename": f"{stem}:{category}", "mirror": 0}
            for prefix, (name, width, height, box, points) in (("src", notes[a]), ("trg", notes[b])):
                pair |= {f"{prefix}_imname": f"{name}.jpg", f"{prefix}_imsize": [width, height, 3], f"{prefix}_bndbox": box}
                pair[f"{prefix}_kps"] = [points[key] for key in both]
            save(root / f"PairAnnotation/test/{stem}{separator}{category}.json", pair)
    return root


def spair_config(data: object, out: Path, **changes: object) -> CorrespondenceConfig:
    settings = {"data": str(data), "out": str(out), "sizes": (48, 64), "pairs_per_category": 0, **TINY, **changes}
    return CorrespondenceConfig.of(**settings)


def evaluate(module, config, executor=None):
    """All of it; returns the records and what was found."""
    task, recipe, folder = module.prepare(config)
    records = run_pieces(config, task, recipe, folder, executor or InlineExecutor())
    findings = module.find(config, task, recipe, records)
    write_results(folder, "task", config.public(), recipe.described(), findings)
    return records, findings


def extract(tmp_path: Path, name: str, data: object, tiny, **changes: object) -> str:
    """A store of a folder of images, one image a forward, as evaluations have them."""
    url = str(tmp_path / f"{name}.zarr")
    config = tiny(str(data), **{"out": url, "size": "64", "levels": ("x1", "x2"), "batch": 1, **changes})
    run_prepared(prepare(resolve(config), InlineExecutor()), InlineExecutor())
    return url


# --- layouts ----------------------------------------------------------------------------------------------------------


def described(pairs: list[Pair]) -> list[tuple]:
    return [(p.name, p.category, p.source.name, p.target.name, p.source_xy, p.target_xy, p.box) for p in pairs]


def test_both_separators_and_any_order_of_folders_give_the_same_pairs(tmp_path):
    colon = load_spair(Folder(str(make_spair(tmp_path / "a"))))
    underscore = load_spair(Folder(str(make_spair(tmp_path / "b", ("cat", "tvmonitor"), "_"))))
    make_spair(tmp_path / "a", separator="_")
    both = load_spair(Folder(str(tmp_path / "a")))

    assert len(colon) == 6
    assert colon[0].name == "000000-2008_000000-2008_000001:cat"
    assert described(colon) == described(underscore) == described(both)


def test_key_points_of_pairs_and_of_images(tmp_path):
    folder = Folder(str(make_spair(tmp_path)))

    of_pairs, of_images = (load_spair(folder, key_points=which) for which in ("pairs", "images"))

    # Id 9 is in the source only, nulls are in neither; category 1 lacks id 5.
    assert [len(pair.source_xy) for pair in of_pairs] == [4, 3, 4, 3, 4, 3]
    assert described(of_pairs) == described(of_images)
    changed = json.loads((tmp_path / "ImageAnnotation/cat/2008_000001.json").read_text())
    changed["kps"]["3"] = None
    save(tmp_path / "ImageAnnotation/cat/2008_000001.json", changed)
    assert [len(pair.source_xy) for pair in load_spair(folder, key_points="images")] == [3, 3, 3, 3, 4, 3]


def test_real_spair_texts_parse(shared_data):
    root = shared_data / "labelled/spair71k_annotations_only/SPair-71k"
    if not root.is_dir():
        pytest.skip("no SPair-71k texts")

    # There are no images: all has been read, and both pairs' files are as expected, when they are missed.
    with pytest.raises(DatasetError, match=r"JPEGImages/aeroplane/2008_002719.jpg is missing"):
        load_spair(Folder(str(root)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("PairAnnotation/test", None, r"PairAnnotation/test is missing"),
        ("JPEGImages/cat/2008_000001.jpg", None, r"JPEGImages/cat/2008_000001.jpg is missing"),
        ("PairAnnotation/test/000000-2008_000000-2008_000001:cat.json", "{", r"2008_000001:cat.json is malformed: JSON"),
        ("PairAnnotation/test/000000-2008_000000-2008_000001:cat.json", "{}", r":cat.json has no field 'category'"),
        ("PairAnnotation/test/000000-2008_000000-2008_000001:cat.json", "[1]", r":cat.json is malformed"),
        ("PairAnnotation/test/000000-2008_000000-2008_000001:cat.json", {"trg_kps": [[1, 2]]}, "4 key points in the source, 1"),
        ("PairAnnotation/test/000000-2008_000000-2008_000001:cat.json", {"trg_bndbox": [5, 5, 5, 5]}, "has no extent"),
        ("PairAnnotation/test/000000-2008_000000-2008_000001:cat.json", {"src_kps": [[1, "a"]] * 4}, "is malformed: ValueError"),
    ],
)
def test_what_is_missing_or_malformed_is_named(tmp_path, name, content, message):
    path = make_spair(tmp_path) / name
    if content is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif isinstance(content, dict):
        save(path, {**json.loads(path.read_text()), **content})
    else:
        path.write_text(content)

    with pytest.raises(DatasetError, match=message):
        load_spair(Folder(str(tmp_path)))


def test_images_are_held_against_their_annotations(tmp_path):
    path = make_spair(tmp_path) / "JPEGImages/cat/2008_000001.jpg"
    image = load_spair(Folder(str(tmp_path)))[0].target

    save_image(path, scene(40, 30, [], 0))
    with pytest.raises(DatasetError, match=r"2008_000001.jpg has 40 x 30 pixels, its annotation says 53 x 80"):
        upright_pixels(image)
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(DatasetError, match=r"2008_000001.jpg can't be read as an image: OSError"):
        upright_pixels(image)
    Image.new("L", (53, 80), 7).save(path)
    assert upright_pixels(image).shape == (80, 53, 3)


def test_images_of_a_folder_are_found_below_it(tmp_path):
    make_spair(tmp_path)

    images = load_images(str(tmp_path))

    assert [image.name for image in images][:2] == ["cat/2008_000000.jpg", "cat/2008_000001.jpg"]
    assert images[0].keys == ("JPEGImages/cat/2008_000000", "cat/2008_000000", "2008_000000")
    assert upright_pixels(images[0]).shape == (60, 80, 3)


def make_davis(root: Path) -> Path:
    """clip-a: object 1 moves, 2 is absent in one frame, 3 is tiny with the highest id, two rows are void; clip-b: one object."""
    for name, (width, height), n in (("clip-b", (96, 64), 5), ("clip-a", (107, 60), 6)):
        for t in range(n):
            boxes = [(8 + 5 * t, 18, 40 + 5 * t, 50)] + ([(78, 8, 100, 34)] if name == "clip-a" else [])
            labels = np.zeros((height, width), np.uint8)
            for number, (x1, y1, x2, y2) in enumerate(boxes, 1):
                labels[y1:y2, x1:x2] = number if number == 1 or t != 3 else 0
            if name == "clip-a":
                labels[-3:, -3:] = 3
                labels[:2] = 255
            save_image(root / f"JPEGImages/480p/{name}/{t:05d}.jpg", scene(width, height, boxes, t))
            path = root / f"Annotations/480p/{name}/{t:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(label_png(labels))
    save(root / "ImageSets/2017/val.txt", "clip-a\nclip-b\n")
    return root


def video_config(data: object, out: Path, **changes: object) -> VideoConfig:
    return VideoConfig.of(**{"data": str(data), "out": str(out), "sizes": (64,), **TINY, **changes})


def test_clips_are_read_with_their_indices(tmp_path):
    clips = load_davis(Folder(str(make_davis(tmp_path))))

    assert [(clip.name, len(clip.frames)) for clip in clips] == [("clip-a", 6), ("clip-b", 5)]
    labels = read_labels(Folder(str(tmp_path)), clips[0].masks[0])
    assert (labels.shape, np.unique(labels).tolist()) == ((60, 107), [0, 1, 2, 3, 255])
    assert clips[0].frames[1].keys[-1] == "clip-a/00001"
    assert len(load_davis(Folder(str(tmp_path)), step=2)[0].frames) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ImageSets/2017/val.txt", None, r"ImageSets/2017/val.txt is missing"),
        ("ImageSets/2017/val.txt", "", r"val.txt lists nothing"),
        ("ImageSets/2017/val.txt", "../clip-a", r"val.txt names '../clip-a', which is no plain name"),
        ("ImageSets/2017/val.txt", "other", r"JPEGImages/480p/other is missing"),
        ("Annotations/480p/clip-a/00004.png", None, r"clip-a/00004.png is missing, but its frame is not"),
        ("Annotations/480p/clip-a/00000.png", "RGB", r"clip-a/00000.png is a RGB image; labels are 8-bit indices"),
        ("Annotations/480p/clip-a/00000.png", "void", r"clip-a/00000.png shows no object"),
        ("Annotations/480p/clip-a/00002.png", "small", r"clip-a/00002.png has 10 x 10 pixels, the clip's first mask 107 x 60"),
    ],
)
def test_clips_with_what_is_missing_or_malformed_are_named(tmp_path, name, content, message):
    path = make_davis(tmp_path / "d") / name
    images = {"RGB": Image.new("RGB", (107, 60)), "void": Image.new("L", (107, 60), 255), "small": Image.new("L", (10, 10))}
    if content is None:
        path.unlink()
    elif content in images:
        images[content].save(path)
    else:
        path.write_text(content)

    with pytest.raises(DatasetError, match=message):
        evaluate(video, video_config(tmp_path / "d", tmp_path / "out"))


def make_voc(root: Path, year: str = "2007") -> Path:
    """Four images: a box touching (1, 1) and one touching (W, H), two objects, one that is truncated and difficult."""
    within = root / f"VOCdevkit/VOC{year}"
    sizes = ((96, 64), (64, 96), (80, 80), (81, 53))
    boxes = ([(24, 17, 75, 56)], [(1, 1, 30, 40), (40, 50, 64, 96)], [(20, 20, 60, 61)], [(5, 9, 33, 41)])
    for i, ((width, height), objects) in enumerate(zip(sizes, boxes, strict=True)):
        notes = "".join(
            f"<object><name>cat</name><truncated>{i == 3:d}</truncated><difficult>{i == 3:d}</difficult><bndbox>"
            f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for x1, y1, x2, y2 in objects
        )
        size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        save(within / f"Annotations/{i + 1:06d}.xml", f"<annotation>{size}{notes}</annotation>")
        save_image(within / f"JPEGImages/{i + 1:06d}.jpg", scene(width, height, objects, i))
    save(within / "ImageSets/Main/trainval.txt", "".join(f"{i + 1:06d} -1\n" for i in range(4)))
    return root


def make_coco(root: Path) -> Path:
    """Images in the list's order, which is neither the annotations' nor sorted; a crowd; one without objects."""
    numbers = (113588, 9, 581921, 25)
    names = [f"COCO_train2014_{number:012d}.jpg" for number in numbers]
    save(root / "coco_20k_filenames.txt", "".join(f"train2014/{name}\n" for name in names))
    images = [{"id": n, "file_name": name, "width": 80, "height": 60} for n, name in zip(numbers, names, strict=True)]
    boxes = {113588: [[9, 6, 45, 33], [40.2, 23.7, 35.9, 30.4]], 9: [[1, 2, 30, 30]], 581921: [[0, 0, 80, 60]]}
    notes = [{"image_id": n, "bbox": box, "iscrowd": 0} for n, each in boxes.items() for box in each]
    notes.append({"image_id": 25, "bbox": [5, 5, 20, 20], "iscrowd": 1})
    save(root / "COCO/annotations/instances_train2014.json", {"images": images[::-1], "annotations": notes})
    for name in names:
        save_image(root / f"COCO/images/train2014/{name}", scene(80, 60, [(9, 6, 54, 39)], 3))
    return root


@pytest.mark.parametrize("above", ["", "VOCdevkit", "VOCdevkit/VOC2007"])
def test_voc_is_found_from_any_of_its_folders(tmp_path, above):
    found = load_voc(Folder(str(make_voc(tmp_path) / above)), "2007")

    assert found[0].boxes == ((23, 16, 75, 56),)
    assert found[1].boxes == ((0, 0, 30, 40), (39, 49, 64, 96))
    assert [each.image_size for each in found] == [(96, 64), (64, 96), (80, 80), (81, 53)]
    assert upright_pixels(found[0].image).shape == (64, 96, 3)


def test_voc_as_tokencut_wants_it(tmp_path):
    make_voc(tmp_path / "VOC2012", "2012")

    assert len(load_voc(Folder(str(tmp_path)), "2012")) == 4


def test_coco20k_is_found_by_name_and_in_the_lists_order(tmp_path):
    found = load_coco20k(Folder(str(make_coco(tmp_path))))

    assert [each.image.keys[-1][-6:] for each in found] == ["113588", "000009", "581921", "000025"]
    assert found[0].boxes == ((9, 6, 54, 39), (40, 24, 76, 54))
    assert found[3].boxes == ()


def test_real_voc_annotations_parse(shared_data):
    root = shared_data / "labelled/voc"
    if not root.is_dir():
        pytest.skip("no VOC photographs")

    found = load_voc(Folder(str(root)), "2007")

    assert found[0].boxes[0] == (138, 199, 207, 301)
    assert all(upright_pixels(each.image).shape[:2] == each.image_size[::-1] for each in found)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("VOCdevkit/VOC2007/ImageSets/Main/trainval.txt", None, r"has no VOCdevkit/VOC2007/ImageSets/Main/trainval.txt"),
        ("VOCdevkit/VOC2007/Annotations/000002.xml", None, r"Annotations/000002.xml does not exist, but .*trainval.txt lists it"),
        ("VOCdevkit/VOC2007/JPEGImages/000003.jpg", None, r"JPEGImages/000003.jpg is missing"),
        ("VOCdevkit/VOC2007/Annotations/000001.xml", "<annotation>", r"000001.xml is malformed: no element found"),
        (
            "VOCdevkit/VOC2007/Annotations/000001.xml",
            "<annotation/>",
            r"000001.xml is malformed: <annotation> has no <size/width>",
        ),
        ("VOCdevkit/VOC2007/Annotations/000001.xml", '<!DOCTYPE a [<!ENTITY b "c">]><a/>', r"000001.xml declares entities"),
    ],
)
def test_voc_files_that_are_missing_or_malformed_are_named(tmp_path, name, content, message):
    path = make_voc(tmp_path) / name
    path.unlink() if content is None else path.write_text(content)

    with pytest.raises(DatasetError, match=message):
        load_voc(Folder(str(tmp_path)), "2007")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("coco_20k_filenames.txt", None, r"coco_20k_filenames.txt is missing"),
        ("COCO/annotations/instances_train2014.json", None, r"has none of instances_train2014_sel20k.json"),
        ("COCO/annotations/instances_train2014.json", "{}", r"instances_train2014.json has no field 'images'"),
        ("COCO/annotations/instances_train2014.json", '{"images": [', r"instances_train2014.json is malformed: JSON"),
        ("COCO/images/train2014/COCO_train2014_000000000025.jpg", None, r"000000000025.jpg is missing"),
        ("coco_20k_filenames.txt", "train2014/COCO_train2014_000000000009.jpg other.jpg\nnot.jpg", r"has no image not.jpg"),
    ],
)
def test_coco_files_that_are_missing_or_malformed_are_named(tmp_path, name, content, message):
    path = make_coco(tmp_path) / name
    path.unlink() if content is None else path.write_text(content)

    with pytest.raises(DatasetError, match=message):
        load_coco20k(Folder(str(tmp_path)))


# --- correspondence ---------------------------------------------------------------------------------------------------


class Upright:
    """What sources of tests share: images that no EXIF turns."""

    def oriented(self, image, size):
        if not image.width:
            return OrientedImage(image.displayed, image.orientation())
        return OrientedImage(image.displayed, Orientation(width=image.width, height=image.height))


class Coded(Upright):
    """A source whose cells say where they are relative to the object; `shift` cells further in targets."""

    def __init__(self, shift: int):
        self.shift = shift

    def rows(self, size):
        return (Row(name="low-res", method="backbone", level="x1", grid=(16, 16), stride=4),)

    def maps(self, picture):
        moved = self.shift if picture.image.name == "target" else 0
        places = torch.cartesian_prod(torch.arange(16.0), torch.arange(16.0)).view(16, 16, 2) - moved
        # Neighbours are alike, and no two cells are the same.
        angles = places[..., None] * torch.tensor([0.05, 0.1, 0.2])
        return {"low-res": torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(2)}


@pytest.mark.parametrize("rules", [LIFT, VIT_UP], ids=["lift", "vit-up"])
@pytest.mark.parametrize(("moved_by", "found"), [(12, 1.0), (24, 0.0)])
def test_perfect_features_find_every_point_and_no_wrong_one(rules, moved_by, found):
    images = [ImageFile(folder=Folder("."), name=name, keys=(), width=64, height=64) for name in ("source", "target")]
    points = ((10.0, 12.0), (22.0, 30.0), (35.5, 20.25))
    pair = Pair(
        name="p",
        category="c",
        source=images[0],
        target=images[1],
        source_xy=points,
        target_xy=tuple((x + moved_by, y + moved_by) for x, y in points),
        box=(10.0, 10.0, 50.0, 41.0),
    )
    task = Correspondence(pairs=(pair,), times=(2,), sizes=(64,), rules=rules, alphas=(0.1,), pictured=frozenset())

    records = task.run(task.pieces()[0], Coded(3), Folder("."))

    pck = correspondence.scores(records)["low-res", 64]
    assert pck.mean() == (found,)
    assert pck.categories["c"].points == 6  # the pair was drawn twice


def test_draws_depend_on_seed_and_category_alone(tmp_path):
    pairs = load_spair(Folder(str(make_spair(tmp_path))))

    drawn = correspondence.draw_pairs(pairs, 10, seed=0)

    assert sum(drawn.values()) == 20
    assert sum(times for number, times in drawn.items() if pairs[number].category == "cat") == 10
    alone = correspondence.draw_pairs([pair for pair in pairs if pair.category == "tvmonitor"], 10, seed=0)
    names = {pairs[number].name: times for number, times in drawn.items() if pairs[number].category == "tvmonitor"}
    tvs = [pair.name for pair in pairs if pair.category == "tvmonitor"]
    assert {tvs[number]: times for number, times in alone.items()} == names
    assert correspondence.draw_pairs(pairs, 10, seed=1) != drawn
    assert correspondence.draw_pairs(pairs, 0, seed=0) == dict.fromkeys(range(6), 1)


def test_a_table_has_low_res_and_bilinear_rows_with_pixels_stride_and_grid(tmp_path):
    config = spair_config(make_spair(tmp_path / "d"), tmp_path / "out", pictures=2, levels=("x1", "x2=bicubic", "x4"))

    records, findings = evaluate(correspondence, config)

    lines = findings.tables[0].lines
    assert [(line.features, line.input_px, line.stride, line.grid) for line in lines] == [
        ("low-res", "48", 16, "3x3"),
        ("bilinear x4", "48", 16, "12x12"),
        ("bilinear x2", "48", 16, "6x6"),
        ("bicubic x2", "48", 16, "6x6"),
        ("low-res", "64", 16, "4x4"),
        ("bilinear x4", "64", 16, "16x16"),
        ("bilinear x2", "64", 16, "8x8"),
        ("bicubic x2", "64", 16, "8x8"),
    ]
    assert {record["points"] for record in records} == {3, 4}
    saved = json.loads((tmp_path / "out/results.json").read_text())
    assert saved["details"]["low-res at 48 px"]["key_points"] == {"cat": 12, "tvmonitor": 9}
    low, bilinear = saved["tables"][0]["lines"][:2]
    assert [each and each["against"] for each in low["estimates"]] == ["bilinear x4"] * 3 + [None]  # pairs are a count
    differences = [each and each["difference"] for each in low["estimates"][:3]]
    assert differences == pytest.approx([a - b for a, b in zip(low["values"][:3], bilinear["values"], strict=False)], abs=1e-6)
    assert saved["tables"][0]["drawn"] == "6 pairs"
    assert len(saved["features"]["model"]["weights"]) == 64
    assert saved["versions"]["torch"] in torch.__version__
    assert saved["choices"]["threshold"] == "error < alpha x longer side of the target's box"
    assert "| bicubic x2" in (tmp_path / "out/results.md").read_text()
    with Image.open(tmp_path / "out/pictures/matches.png") as picture:
        assert min(picture.size) > 400


def test_published_rows_stand_below_the_measured_ones(tmp_path):
    config = spair_config(make_spair(tmp_path / "d"), tmp_path / "out", sizes=(56,), ragged=True, paper=True)

    (table,) = evaluate(correspondence, config)[1].tables

    lines = table.lines
    assert [line.published for line in lines] == [False, True, False, True]
    assert lines[1].values == (2.04, 0.51, 0.01, None)
    assert lines[3].values == (3.81, 1.01, 0.02, None)
    assert lines[1].features == "LiFT Table 1, DINO ViT-S/16, of other settings"
    (note,) = table.notes
    for difference in (
        "model published 'vit_small_patch16_224.dino', here 'test_vit.r160_in1k'",
        "weights published 'pretrained', here 'random'",
    ):
        assert difference in note
    assert "pairs_per_category published 100, here 0" in note
    assert "items published 12234, here 6" in note
    assert "split" not in note
    assert note in (tmp_path / "out/results.md").read_text()


@pytest.mark.parametrize(
    ("alphas", "published"),
    [((0.01, 0.05, 0.1), (0.01, 0.51, 2.04, None)), ((0.2, 0.1), (None, 2.04, None)), ((0.05,), (0.51, None)), ((0.2,), None)],
)
def test_published_numbers_stand_below_their_own_alpha(tmp_path, alphas, published):
    data = make_spair(tmp_path / "d", categories=("cat",))
    config = spair_config(data, tmp_path / "out", sizes=(56,), ragged=True, paper=True, alphas=alphas, levels=("x1",))

    (table,) = evaluate(correspondence, config)[1].tables

    assert [line.values for line in table.lines if line.published][:1] == ([published] if published else [])
    nothing = "LiFT Table 1, DINO ViT-S/16 has nothing of low-res at 56 px, bilinear x2 at 56 px"
    assert (nothing in table.notes) == (published is None)


def test_published_numbers_are_of_twice_the_grid_and_of_their_size_alone(tmp_path):
    data = make_spair(tmp_path / "d", categories=("cat",))
    levels = ("x1", "x2=bilinear", "x4=bilinear")
    config = spair_config(data, tmp_path / "out", sizes=(56, 64), ragged=True, paper=True, levels=levels)

    (table,) = evaluate(correspondence, config)[1].tables

    named = [(a.features, a.input_px) for a, b in itertools.pairwise(table.lines) if b.published]
    assert named == [("low-res", "56"), ("bilinear x2", "56")]
    assert "has nothing of bilinear x4 at 56 px, low-res at 64 px, bilinear x2 at 64 px, bilinear x4 at 64 px" in table.notes[-1]


def test_pairs_that_are_scored_left_out_and_not_asked_for_are_counted(tmp_path):
    data = make_spair(tmp_path / "d")
    path = sorted((data / "PairAnnotation/test").glob("*cat.json"))[1]
    save(path, {**json.loads(path.read_text()), "src_kps": [], "trg_kps": []})

    found = evaluate(correspondence, spair_config(data, tmp_path / "out", limit=5))[1].items
    drawn = evaluate(correspondence, spair_config(data, tmp_path / "drawn", pairs_per_category=1))[1].items

    (left_out,), (taken,) = found.left_out, found.taken
    assert (left_out.reason, left_out.count, left_out.first) == (correspondence.NO_POINTS, 1, path.stem)
    assert str(taken) == "the first 5 of 6 pairs (--limit)"
    assert found.scored == {"pairs": 4, "key points": 4 * 3 + 2}
    saved = json.loads((tmp_path / "out/results.json").read_text())
    assert saved["items"]["left_out_count"] == 1
    assert saved["items"]["taken"][0] | {"count": 5, "of": 6} == saved["items"]["taken"][0]
    assert (
        "**over 4 pairs, 14 key points; the first 5 of 6 pairs (--limit); 1 left out: its images have no key point"
        in (tmp_path / "out/results.md").read_text()
    )
    assert str(drawn.taken[0]) == "drawn 2 of 6 pairs (--pairs-per-category 1)"


def test_pairs_of_which_none_has_key_points_are_no_result(tmp_path):
    data = make_spair(tmp_path / "d", categories=("cat",))
    for path in (data / "PairAnnotation/test").iterdir():
        save(path, {**json.loads(path.read_text()), "src_kps": [], "trg_kps": []})

    with pytest.raises(DatasetError, match="no pair can be scored: 3 left out: its images have no key point in common"):
        evaluate(correspondence, spair_config(data, tmp_path / "out"))


def test_alphas_of_one_name_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--alphas 0.1 0.1000001: give each once"):
        spair_config(tmp_path, tmp_path, alphas=(0.1, 0.1000001))


def test_errors_of_workers_are_those_of_one_process(monkeypatch):
    import ray

    failed = ray.exceptions.RayTaskError("run", "a traceback", DatasetError("a.jpg is missing")).as_instanceof_cause()
    lost = ray.exceptions.ActorDiedError()

    for error, expected in ((failed, DatasetError), (lost, actors.WorkersLost)):
        monkeypatch.setattr(ray, "get", lambda _, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(expected):
            actors.fetched(None)


def test_what_was_stopped_goes_on_and_other_settings_are_refused(tmp_path, monkeypatch):
    data, whole = make_spair(tmp_path / "d"), tmp_path / "whole"
    expected, findings = evaluate(correspondence, spair_config(data, whole))
    out, did, plain = tmp_path / "out", [], run.Work.run

    def stops(self, piece, source):
        if did:
            raise KeyboardInterrupt
        did.append(piece.name)
        return plain(self, piece, source)

    monkeypatch.setattr(run.Work, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate(correspondence, spair_config(data, out))
    assert did == ["48-00000"]
    did.clear()
    monkeypatch.setattr(run.Work, "run", lambda self, piece, source: did.append(piece.name) or plain(self, piece, source))
    records, found = evaluate(correspondence, spair_config(data, out))

    assert did == ["64-00000"]
    assert (records, found.tables) == (expected, findings.tables)
    for changes, message in [
        ({"threshold": "image"}, "threshold        run 'box'   now 'image'"),
        ({"weights": "random:1"}, "model.weights    run"),
        ({"limit": 2}, "data             run"),
    ]:
        with pytest.raises(ConfigError, match=message):
            evaluate(correspondence, spair_config(data, out, **changes))
    did.clear()
    moved = shutil.move(data, tmp_path / "elsewhere")
    assert evaluate(correspondence, spair_config(moved, out, pictures=1))[0] == expected
    assert did == []


def test_a_store_and_a_model_give_the_same_score(tmp_path, tiny):
    data = make_spair(tmp_path / "d")
    store = extract(tmp_path, "pad", data / "JPEGImages", tiny, geometry="pad")
    live = spair_config(data, tmp_path / "live", sizes=(64,), drawing="extract")

    records, findings = evaluate(correspondence, live)
    stored, found = evaluate(correspondence, spair_config(data, tmp_path / "stored", sizes=(), stores=(store,)))

    assert stored == records
    assert found.tables == findings.tables
    assert found.choices["canvas"] == "fit_then_pad, drawn as extract"


def test_stores_that_cannot_serve_a_protocol_say_how_to_extract_one(tmp_path, tiny):
    data = make_spair(tmp_path / "d")
    squashed = extract(tmp_path, "squash", data / "JPEGImages", tiny, geometry="squash")
    padded = extract(tmp_path, "pad", data / "JPEGImages/cat", tiny, geometry="pad")
    only_x2 = extract(tmp_path, "x2", data / "JPEGImages", tiny, geometry="pad", levels=("x2",))

    def attempt(store: str, **changes: object) -> None:
        evaluate(correspondence, spair_config(data, tmp_path / Path(store).stem, stores=(store,), **changes))

    with pytest.raises(ConfigError, match=r"Extract with --geometry pad --size 64x64"):
        attempt(squashed, sizes=(64,))
    with pytest.raises(ConfigError, match=r"none was extracted at 48x48 px, but at 64x64; extract with --size 48x48"):
        attempt(padded, sizes=(48, 64))
    with pytest.raises(ConfigError, match=r"no store can serve this protocol"):
        attempt(padded, sizes=(64,), protocol="vit-up")
    with pytest.raises(ConfigError, match=r"add x1 to --levels"):
        attempt(only_x2, sizes=(64,))
    with pytest.raises(
        FeaturesMissing, match=r"images are not in it; the first: .*tvmonitor/2008_001000.jpg: none of its keys is"
    ):
        attempt(padded, sizes=(64,))
    with pytest.raises(ConfigError, match="--drawing paper needs a model"):
        attempt(padded, drawing="paper")


def test_data_and_results_may_be_at_any_url(tmp_path):
    make_spair(tmp_path / "d")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "d"), "/spair-mini", recursive=True)
    expected, _ = evaluate(correspondence, spair_config(tmp_path / "d", tmp_path / "out"))

    records, _ = evaluate(correspondence, spair_config("memory://spair-mini", "memory://spair-out", executor="auto", pictures=1))

    assert [record["correct"] for record in records] == [record["correct"] for record in expected]
    assert memory.exists("/spair-out/results.json")


def test_sizes_that_patches_do_not_fill_are_asked_for(tmp_path):
    data = make_spair(tmp_path / "d")

    with pytest.raises(ConfigError, match=r"56x56 px aren't filled by patches of 16; use another size, or --ragged"):
        resolve_source(spair_config(data, tmp_path / "out").source, [(48, 48), (56, 56)], "pad")
    recipe, _ = resolve_source(spair_config(data, tmp_path / "out", ragged=True).source, [(48, 48), (56, 56)], "pad")
    assert [row.grid for row in recipe.rows((56, 56))] == [(3, 3), (6, 6)]
    absolute, _ = resolve_source(spair_config(data, tmp_path / "out", levels=("x1", "24x24")).source, [(48, 48), (64, 64)], "pad")
    assert [row.grid for row in absolute.rows((64, 64))] == [(4, 4), (24, 24)]


def test_settings_that_contradict_each_other():
    with pytest.raises(ConfigError, match="int8"):
        CorrespondenceConfig.of(levels=("x1@int8",))
    with pytest.raises(ConfigError, match=r"--alphas"):
        CorrespondenceConfig.of(alphas=(0.1, 0.0))
    with pytest.raises(ConfigError, match="no data: give --data"):
        correspondence.prepare(CorrespondenceConfig.of())
    with pytest.raises(ConfigError, match="memory:// can be seen by one process only"):
        CorrespondenceConfig.of(out="memory://a", executor="ray")


# --- video ------------------------------------------------------------------------------------------------------------


class OneHot(Upright):
    """A source whose cells say which object is there, by the frame's own truth."""

    def __init__(self, root: Path):
        self.folder = Folder(str(root))

    def rows(self, size):
        return (Row(name="low-res", method="backbone", level="x1", grid=(20, 20), stride=4),)

    def maps(self, picture):
        name = picture.image.name.replace("JPEGImages", "Annotations").replace(".jpg", ".png")
        labels = read_labels(self.folder, name)
        cells = torch.from_numpy(nearest(np.where(labels == 255, 0, labels), (20, 20)).astype(np.int64))
        return {"low-res": torch.nn.functional.one_hot(cells, 4).float()}


def test_perfect_features_carry_labels_through_a_clip(tmp_path):
    config = video_config(make_davis(tmp_path / "d"), tmp_path / "out", sizes=(80,))
    task, _, folder = video.prepare(config)

    records = [record for piece in task.pieces() for record in task.run(piece, OneHot(tmp_path / "d"), folder)]

    j = {(record["clip"], record["object_id"]): record["j"] for record in records}
    assert set(j) == {("clip-a", 1), ("clip-a", 2), ("clip-a", 3), ("clip-b", 1)}
    # As good as cells of 4 pixels allow; the object of 3 x 3 pixels is one cell.
    assert min(*j["clip-a", 1], *j["clip-b", 1]) > 0.8
    assert j["clip-a", 2][3] == j["clip-a", 2][0] > 0.7
    assert j["clip-a", 3][3] == j["clip-a", 3][0] > 0.6
    # Where object 2 is absent its faintest trace is stretched to 1, as in the official code; the one cell loses to it.
    assert j["clip-a", 2][2] == j["clip-a", 3][2] == 0
    written = read_labels(folder, "masks/80/low-res/clip-a/00000.png")
    assert np.unique(written).tolist() == [0, 1, 2, 3]


def test_clips_are_scored_by_object_and_drawn(tmp_path):
    config = video_config(make_davis(tmp_path / "d"), tmp_path / "out", sizes=(48, 64), pictures=1)

    records, findings = evaluate(video, config)

    lines = findings.tables[0].lines
    assert [(line.features, line.input_px, line.grid) for line in lines] == [
        ("low-res", "48", "3x3"),
        ("bilinear x2", "48", "6x6"),
        ("low-res", "64", "4x4"),
        ("bilinear x2", "64", "8x8"),
    ]
    assert {line.values[-1] for line in lines} == {4}
    assert len(records) == 16
    # The first and last frame aren't scored, void is background, and what isn't found scores nothing.
    assert {(record["clip"], len(record["j"])) for record in records} == {("clip-a", 4), ("clip-b", 3)}
    assert {tuple(record["j"]) for record in records if record["object_id"] == 3} == {(0.0, 0.0, 0.0, 0.0)}
    with Image.open(tmp_path / "out/pictures/clip-a.webp") as animation:
        assert animation.n_frames == 6
    assert (tmp_path / "out/pictures/clip-a.png").stat().st_size > 1000
    assert not (tmp_path / "out/pictures/clip-b.png").exists()


def test_inputs_of_the_two_video_protocols():
    assert video.input_size("lift", 224, 480, 854) == (224, 224)
    assert video.input_size("dino", 480, 480, 854) == (480, 832)
    assert video.input_size("dino", 480, 854, 480) == (832, 480)
    low, fine = (Row(name="r", method="m", level=None, grid=(n, n), stride=16) for n in (14, 224))
    # LiFT's label images are twice as large as the input, and those of finer grids no larger.
    assert video.enlargement(low, low) == 16
    assert video.enlargement(dataclasses.replace(low, grid=(28, 28)), low) == 16
    assert video.enlargement(fine, low) == 2


def test_clips_of_other_shapes_have_other_inputs(tmp_path):
    config = video_config(make_davis(tmp_path / "d"), tmp_path / "out", protocol="dino", sizes=(160,), pictures=0, levels=("x1",))

    line = evaluate(video, config)[1].tables[0].lines[0]

    assert (line.input_px, line.grid) == ("160x256, ...", "10x16, ...")


def test_clips_from_a_store_score_as_from_a_model(tmp_path, tiny):
    data = make_davis(tmp_path / "d")
    store = extract(tmp_path, "squash", data / "JPEGImages/480p", tiny, geometry="squash")

    records, findings = evaluate(video, video_config(data, tmp_path / "live", drawing="extract"))
    stored, found = evaluate(video, video_config(data, tmp_path / "stored", sizes=(), stores=(store,)))

    assert stored == records
    assert found.tables == findings.tables


def test_published_rows_of_davis_and_settings_of_propagation(tmp_path):
    config = video_config(make_davis(tmp_path / "d"), tmp_path / "out", sizes=(112,), paper=True, pictures=0)

    findings = evaluate(video, config)[1]

    (table,) = findings.tables
    assert table.lines[1].values == (17.5, 21.9, 13.1, None, None, None, None, None)
    assert "frame_step" not in table.notes[0]
    assert list(findings.items.scored) == ["clips", "objects", "frames"]
    thinned = video_config(tmp_path / "d", tmp_path / "thin", sizes=(112,), paper=True, pictures=0, frame_step=2, limit=1)
    found = evaluate(video, thinned)[1]
    assert "frame_step published 1, here 2" in found.tables[0].notes[0]
    assert "limit published None, here 1" in found.tables[0].notes[0]
    assert "items published 30, here 2" in found.tables[0].notes[0]
    assert (found.items.scored["clips"], found.items.taken[0].count) == (1, 1)
    dino = video_config(tmp_path / "d", tmp_path / "dino", protocol="dino", sizes=(64,), paper=True, pictures=0, limit=1)
    assert evaluate(video, dino)[1].tables[0].notes == ("no paper has numbers of --protocol dino here",)
    with pytest.raises(DatasetError, match=r"2 frames of the clip \S+ are looked at, and the first and the last of them aren't"):
        evaluate(video, dataclasses.replace(thinned, out=str(tmp_path / "few"), frame_step=5))
    with pytest.raises(ConfigError, match="impossible settings"):
        video_config(tmp_path / "d", tmp_path / "out", top_k=0)
    with pytest.raises(ConfigError, match="--frame-step 0"):
        video_config(tmp_path / "d", tmp_path / "out", frame_step=0)


def test_a_pretrained_model_follows_the_swan(tmp_path, shared_data):
    data, weights = shared_data / "labelled/davis/DAVIS", shared_data / "weights"
    if not data.is_dir() or not weights.is_dir():
        pytest.skip("no DAVIS clips, or no weights")
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    common = {"model": name, "sizes": (224,), "pictures": 0, "levels": ("x1",), "frame_step": 4, "limit": 1}

    def found(weights: object) -> float:
        config = video_config(data, tmp_path / str(weights)[:6].strip("/"), weights=str(weights), **common)
        return video.scores(evaluate(video, config)[0])["low-res", 224].j.mean

    assert found(weights / name) > 0.6
    assert found("random") < 0.5


def test_a_pretrained_model_finds_points_that_a_random_one_does_not(tmp_path, shared_data):
    data, weights = shared_data / "labelled/spair_layout/SPair-71k", shared_data / "weights"
    if not data.is_dir() or not weights.is_dir():
        pytest.skip("no photographs in SPair's layout, or no weights")
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    common = {"model": name, "sizes": (224,), "pictures": 0, "levels": ("x1",), "limit": 40}

    def found(weights: object) -> Pck:
        config = spair_config(data, tmp_path / str(weights)[:6].strip("/"), weights=str(weights), **common)
        return correspondence.scores(evaluate(correspondence, config)[0])["low-res", 224]

    assert found(weights / name).per_point()[0] > 0.15
    assert found("random").per_point()[0] < 0.08


def test_the_demo_has_all_layouts(tmp_path):
    write_demo(str(tmp_path))

    assert len(load_spair(Folder(str(tmp_path / "SPair-71k")))) == 8
    assert dataclasses.is_dataclass(load_spair(Folder(str(tmp_path / "SPair-71k")), key_points="images")[0])


# --- discovery --------------------------------------------------------------------------------------------------------


def discovery_config(data: object, out: Path, **changes: object) -> DiscoveryConfig:
    return DiscoveryConfig.of(**{"data": str(data), "out": str(out), "sizes": (64,), **TINY, **changes})


class Inside(Upright):
    """A source whose cells say whether they are inside of the first object, on 12 x 12 cells."""

    def __init__(self, task):
        self.boxes = {each.image.name: np.array(each.boxes[0]) / [*each.image_size * 2] for each in task.images}

    def maps(self, picture):
        x1, y1, x2, y2 = (round(12 * edge) for edge in self.boxes[picture.image.name])
        features = torch.tensor([1.0, 0.0]).repeat(12, 12, 1)
        features[y1:y2, x1:x2] = torch.tensor([0.0, 1.0])
        return {"low-res": features}


def test_perfect_features_discover_every_object(tmp_path):
    task, _, folder = discovery.prepare(discovery_config(make_voc(tmp_path / "d"), tmp_path / "out", sizes=(96,)))

    records = [record for piece in task.pieces() for record in task.run(piece, Inside(task), folder)]

    assert discovery.scores(records)["low-res", 96] == CorLoc(hits=4, images=4)
    assert records[1]["box"] == (0, 0, 48, 40)  # 30 of 64 pixels are 6 of 12 cells, 40 of 96 are 5


def test_boxes_are_scored_and_drawn(tmp_path):
    config = discovery_config(make_voc(tmp_path / "d"), tmp_path / "out", sizes=(48, 64), paper=True, pictures=2)

    records, findings = evaluate(discovery, config)

    assert [line.values[1] for line in findings.tables[0].lines] == [4, 4, 4, 4]
    beside_voc = evaluate(
        discovery, discovery_config(tmp_path / "d", tmp_path / "56", sizes=(56,), ragged=True, paper=True, pictures=0)
    )[1]
    assert "items published 5011, here 4" in beside_voc.tables[0].notes[0]
    assert len(records) == 16
    assert sum("eigenvector" in record for record in records) == 8
    assert findings.choices["tokencut"] == "TokenCut(tau=0.2, weighted=False, solver='official')"
    with Image.open(tmp_path / "out/pictures/boxes.png") as picture:
        assert picture.width > 4 * 200


def test_images_without_objects_do_not_count_and_coco_has_a_tau_of_its_own(tmp_path):
    config = discovery_config(make_coco(tmp_path / "d"), tmp_path / "out", dataset="coco20k", levels=("x1",))

    _, findings = evaluate(discovery, config)

    assert {line.values[1] for line in findings.tables[0].lines} == {3}
    (left_out,) = findings.items.left_out
    assert (left_out.count, left_out.first[-10:]) == (1, "000025.jpg")
    assert findings.items.scored == {"images": 3, "objects": 4}
    first = evaluate(discovery, dataclasses.replace(config, out=str(tmp_path / "2"), limit=2))[1].items
    assert (first.scored, first.left_out) == ({"images": 2, "objects": 3}, ())
    assert str(first.taken[0]) == "the first 2 of 4 images (--limit)"
    assert "tau=0.3" in findings.choices["tokencut"]
    assert DiscoveryConfig.of(dataset="coco20k", protocol="tokencut").settings.tau == 0.2
    with pytest.raises(ConfigError, match="--split val: coco20k is one list"):
        DiscoveryConfig.of(dataset="coco20k", split="val")


def test_tokencuts_own_protocol_pads_images_to_whole_patches(tmp_path):
    config = discovery_config(make_voc(tmp_path / "d"), tmp_path / "out", sizes=(), protocol="tokencut")

    task, _, _ = discovery.prepare(config)
    records, findings = evaluate(discovery, config)

    assert [task.size(i, 0) for i in range(4)] == [(64, 96), (96, 64), (80, 80), (64, 96)]
    drawn = discovery.PadToPatches(size=(64, 96), colour=(1, 2, 3))(np.zeros((53, 81, 3), np.uint8))
    assert (drawn[53, 0].tolist(), drawn[52, 81].tolist(), drawn[52, 80].tolist()) == ([1, 2, 3], [1, 2, 3], [0, 0, 0])
    assert all(record["box"][2] <= 81 and record["box"][3] <= 53 for record in records if record["image"] == 3)
    assert findings.tables[0].lines[0].input_px == "original"
    with pytest.raises(ConfigError, match="sizes are for --protocol lift"):
        discovery_config(tmp_path, tmp_path, protocol="tokencut")
    with pytest.raises(ConfigError, match="--drawing extract"):
        evaluate(discovery, dataclasses.replace(config, drawing="extract"))


def test_objects_from_a_store_are_those_from_a_model(tmp_path, tiny):
    data = make_voc(tmp_path / "d")
    store = extract(tmp_path, "squash", data / "VOCdevkit/VOC2007/JPEGImages", tiny, geometry="squash")

    records, _ = evaluate(discovery, discovery_config(data, tmp_path / "live", drawing="extract"))
    stored, _ = evaluate(discovery, discovery_config(data, tmp_path / "stored", sizes=(), stores=(store,)))

    assert stored == records


def test_every_data_set_of_boxes_can_be_chosen():
    assert get_args(get_type_hints(DiscoveryConfig)["dataset"]) == tuple(BOXES)


# --- CKA and self-similarity ------------------------------------------------------------------------------------------


def cka_config(data: object, out: Path, **changes: object) -> CkaConfig:
    return CkaConfig.of(**{"data": str(data), "out": str(out), "sizes": (32, 48, 64), "batch": 5, **TINY, **changes})


def test_cka_is_that_of_fixed_batches(tmp_path):
    config = cka_config(make_spair(tmp_path / "d"), tmp_path / "out", paper=True)
    (tmp_path / "d/JPEGImages/cat/notes.doc").write_text("no image")

    task, recipe, _ = cka_job.prepare(config)
    records, findings = evaluate(cka_job, config)

    # Eight images: a batch of five, and three that are too few.
    assert [piece.items for piece in task.pieces()] == [(0, 1, 2, 3, 4)]
    source = recipe.open("cpu")
    maps = [
        torch.stack([source.maps(Squash(size=(s, s), interpolation="bicubic").of(i))["low-res"] for i in task.images[:5]])
        for s in (32, 48, 64)
    ]
    expected = cka([terms_of_grams(0, [gram(each) for each in maps])]).numpy()
    np.testing.assert_allclose(cka_job.scores(records)["low-res"], expected, rtol=0, atol=1e-12)
    lines = findings.tables[0].lines
    assert [(line.features, line.input_px, line.grid) for line in lines[:3]] == [
        ("low-res", "32", "2x2"),
        ("low-res", "48", "3x3"),
        ("low-res", "64", "4x4"),
    ]
    assert lines[3].features == "bilinear x2"
    assert lines[1].values == pytest.approx(expected[1])
    assert findings.choices["images"].startswith("5 of 8")
    assert findings.items.scored == {"images": 5, "batches": 1}
    assert [(each.count, each.first.rsplit("/", 1)[-1]) for each in findings.items.left_out] == [
        (1, "notes.doc"),
        (3, task.images[5].name.rsplit("/", 1)[-1]),
    ]
    assert findings.tables[0].notes == ("LiFT's Fig. 4 has curves, no numbers to print",)
    with Image.open(tmp_path / "out/pictures/cka.png") as picture:
        assert picture.width > 1000


def test_cka_needs_sizes_and_images(tmp_path):
    data = make_spair(tmp_path / "d")

    with pytest.raises(ConfigError, match="at least two square sizes"):
        cka_job.prepare(cka_config(data, tmp_path / "out", sizes=(64,)))
    with pytest.raises(ConfigError, match="same rows"):
        cka_job.prepare(cka_config(data, tmp_path / "out", levels=("x1", "4x4")))
    with pytest.raises(DatasetError, match="has 3 images"):
        cka_job.prepare(cka_config(data, tmp_path / "out", limit=3))
    with pytest.raises(ConfigError, match="--batch 3"):
        cka_config(data, tmp_path / "out", batch=3)


def test_cka_of_stores_is_that_of_a_model(tmp_path, tiny):
    data = make_spair(tmp_path / "d")
    stores = tuple(
        extract(tmp_path, f"s{size}", data / "JPEGImages", tiny, geometry="squash", size=str(size)) for size in (48, 64)
    )

    live, _ = evaluate(cka_job, cka_config(data, tmp_path / "live", sizes=(48, 64), drawing="extract"))
    stored, _ = evaluate(cka_job, cka_config(data, tmp_path / "stored", sizes=(), stores=stores))

    assert stored == live


@pytest.mark.parametrize("task", [correspondence, cka_job, similarity, fidelity])
def test_lines_may_be_compared_with_the_mean_of_others(tmp_path, task):
    data = make_spair(tmp_path / "d")
    kind = {correspondence: CorrespondenceConfig, cka_job: CkaConfig, similarity: SimilarityConfig, fidelity: FidelityConfig}
    settings = {"data": str(data), "out": str(tmp_path / "out"), "sizes": (32, 64), "pictures": 0, **TINY}
    if task is cka_job:
        settings["batch"] = 4
    config = kind[task].of(**settings)
    _, plain = evaluate(task, config)

    _, findings = evaluate(task, config.changed(means=("both=low-res,bilinear x2",), against="both"))

    lines = {(line.features, line.input_px): line for line in findings.tables[0].lines}
    expected = {(line.features, line.input_px): line.values for line in plain.tables[0].lines}
    means = [px for name, px in lines if name == "both"]
    assert {at: line.values for at, line in lines.items() if at[0] != "both"} == expected
    assert means
    assert len(set(means)) == len(means)
    for px in means:
        both, low, fine = (lines[name, px] for name in ("both", "low-res", "bilinear x2"))
        assert both.values[0] == pytest.approx((low.values[0] + fine.values[0]) / 2)
        assert both.grid == ""
        for line in (low, fine):
            assert line.estimates[0].against == "both"
            assert line.estimates[0].difference == pytest.approx(line.values[0] - both.values[0], abs=1e-5)
    assert "both is the mean of low-res, bilinear x2" in findings.tables[0].notes


def test_stores_are_held_against_what_was_said_of_them_and_recorded(tmp_path, tiny):
    data = make_spair(tmp_path / "d")
    store = extract(tmp_path, "s64", data / "JPEGImages", tiny, geometry="squash", size="64", levels=("x1", "x2=nearest"))
    silent = SimilarityConfig.of(
        data=str(data), out=str(tmp_path / "out"), stores=(store,), limit=1, pictures=0, executor="inline", device="cpu"
    )
    for name, value, message in (
        ("model", "vit_small_patch16_224.dino", "model            store 'test_vit.r160_in1k'   asked 'vit_small_patch16_224"),
        ("facet", "key", "facet            store 'token'   asked 'key'"),
        ("levels", ("x1", "x4"), "levels           store ['x1', 'x2']   asked 'x4'"),
        ("levels", ("x2=bilinear",), "x2               store 'nearest@float16'   asked 'x2=bilinear'"),
        ("encoding", "float32", "x1.encoding      store 'float16'   asked 'float32'"),
    ):
        with pytest.raises(ConfigError, match="--stores .* holds other features than were asked for") as error:
            similarity.prepare(silent.changed(**{name: value}))
        assert message in str(error.value)

    run.evaluate("similarity", similarity, silent.changed(levels=("x1",), layers=(-1,)))

    documents = [json.loads((tmp_path / "out" / name).read_text())["config"] for name in ("results.json", "run.json")]
    assert [(each["model"], each["layers"], each["precision"]) for each in documents] == [("test_vit.r160_in1k", [5], "fp32")] * 2
    assert documents[0]["levels"] == ["x1", "x2=nearest"]


def test_panels_of_self_similarity(tmp_path):
    config = SimilarityConfig.of(
        data=str(make_spair(tmp_path / "d")), out=str(tmp_path / "out"), sizes=(64, 128), limit=3, **TINY
    )

    records, findings = evaluate(similarity, config)

    # All maps of the small size, and of the large one the low-resolution map.
    lines = findings.tables[0].lines
    assert [(line.features, line.input_px, line.grid, line.values[1]) for line in lines] == [
        ("low-res", "64", "4x4", 3),
        ("bilinear x2", "64", "8x8", 3),
        ("low-res", "128", "8x8", 3),
    ]
    assert findings.items.scored == {"images": 3}
    assert str(findings.items.taken[0]) == "the first 3 of 8 images (--limit)"
    maps = [np.array(record["map"]) for record in records]
    assert all((each.min(), each.max()) == (0, 1) for each in maps)
    assert maps[0][2, 2] == 1
    with Image.open(tmp_path / "out/pictures/similarity.png") as picture:
        assert picture.width > 4 * 160
