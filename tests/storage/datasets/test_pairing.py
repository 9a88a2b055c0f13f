"""Data sets in which nothing tells which label is of which image, that lack a part, or that are others than was asked for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.demo_datasets import write_demo
from storage.datasets.coco import load_coco_stuff
from storage.datasets.davis import load_davis
from storage.datasets.files import DatasetError
from storage.datasets.pairing import pairs_of_stems
from storage.datasets.photos_open import load_photos_open
from storage.datasets.registry import BOXES
from storage.datasets.spair import load_spair
from storage.datasets.voc import load_voc, load_voc_seg
from storage.paths import Folder
from tests.conftest import jpeg, write_tar


@pytest.fixture
def demo(tmp_path) -> Path:
    write_demo(str(tmp_path))
    return tmp_path


def save_mask(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((24, 32), np.uint8)).save(path)


# --- two files of one name --------------------------------------------------------------------------------------------


def write_photos(root: Path, keys: tuple[str, str]) -> Folder:
    """Two tars of a photograph each, with masks and objects."""
    for number, key in enumerate(keys):
        write_tar(root / f"{number}.tar", [(f"{key}.jpg", jpeg(number, 32, 24))])
        save_mask(root / f"seg/{key}.png")
    images = [{"id": n, "file_name": f"{key}.jpg", "width": 32, "height": 24} for n, key in enumerate(dict.fromkeys(keys))]
    (root / "instances.json").write_text(json.dumps({"images": images, "annotations": []}))
    return Folder(str(root))


@pytest.mark.parametrize("label", ["classes", "instances"])
def test_a_photograph_that_two_tars_have_under_one_key_has_no_label(tmp_path, label):
    assert len(load_photos_open(write_photos(tmp_path / "told", ("000000", "000001")), "train", label=label)) == 1

    folder = write_photos(tmp_path / "not", ("000000", "000000"))

    with pytest.raises(DatasetError, match=r"has 000000 twice, as 0\.tar: 000000\.jpg and as 1\.tar: 000000\.jpg"):
        load_photos_open(folder, "train", label=label)


def test_two_annotated_images_that_differ_in_their_extension_only_are_refused(tmp_path):
    folder = write_photos(tmp_path, ("000000", "000001"))
    notes = json.loads(folder.read("instances.json"))
    notes["images"].append({"id": 7, "file_name": "000000.png", "width": 99, "height": 99})
    folder.write("instances.json", json.dumps(notes).encode())

    with pytest.raises(DatasetError, match=r"000000 twice, as instances\.json: 000000\.jpg and as instances\.json: 000000\.png"):
        load_photos_open(folder, "train", label="instances")


def test_two_images_that_differ_in_their_extension_only_are_refused(tmp_path):
    for name in ("images/a.jpg", "labels/a.png"):
        save_mask(tmp_path / name)
    assert pairs_of_stems(Folder(str(tmp_path)), "images", "labels") == [("images/a.jpg", "labels/a.png")]

    save_mask(tmp_path / "images/a.png")

    with pytest.raises(DatasetError, match=r"has a twice, as images/a\.jpg and as images/a\.png"):
        pairs_of_stems(Folder(str(tmp_path)), "images", "labels")


def test_a_pair_in_both_spellings_must_say_the_same(demo):
    folder, pairs = Folder(str(demo / "SPair-71k")), demo / "SPair-71k/PairAnnotation/test"
    first = next(path for path in sorted(pairs.iterdir()) if ":cat" in path.name)
    other = first.with_name(first.name.replace(":", "_"))
    shutil.copy(first, other)
    assert len(load_spair(folder)) == 8

    said = json.loads(other.read_text())
    other.write_text(json.dumps({**said, "trg_kps": said["trg_kps"][::-1]}))

    with pytest.raises(DatasetError, match="in both spellings.*say different things"):
        load_spair(folder)


# --- parts that lack --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2])
def test_a_clip_that_lacks_a_frame_is_refused(demo, step):
    root = demo / "DAVIS"
    assert len(load_davis(Folder(str(root)), step=step)[0].frames) == 6 // step

    (root / "JPEGImages/480p/blocks/00003.jpg").unlink()

    with pytest.raises(DatasetError, match=r"480p/blocks/00003\.png has no frame in JPEGImages/480p/blocks"):
        load_davis(Folder(str(root)), step=step)


def test_a_frame_that_is_there_twice_is_refused(demo):
    frames = demo / "DAVIS/JPEGImages/480p/blocks"
    shutil.copy(frames / "00003.jpg", frames / "00002.jpeg")

    with pytest.raises(DatasetError, match=r"00002 twice, as \S+/00002\.jpeg and as \S+/00002\.jpg"):
        load_davis(Folder(str(demo / "DAVIS")))


def test_images_of_coco_stuff_without_a_label_are_not_left_out_in_silence(tmp_path):
    for name in ("val2017/a.jpg", "stuffthingmaps/val2017/a.png"):
        save_mask(tmp_path / name)
    assert len(load_coco_stuff(Folder(str(tmp_path)), "val2017", layout="deap", groups="fine")) == 1

    save_mask(tmp_path / "val2017/b.jpg")

    with pytest.raises(DatasetError, match=r"val2017/b\.jpg has no label in stuffthingmaps/val2017"):
        load_coco_stuff(Folder(str(tmp_path)), "val2017", layout="deap", groups="fine")


# --- VOC of another year ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: BOXES["voc12"](folder, "trainval"),
        lambda folder: load_voc(folder, "2012"),
        lambda folder: load_voc_seg(folder, "trainval"),
    ],
)
def test_a_folder_that_is_called_another_year_is_refused(demo, load: Callable[[Folder], object]):
    root = demo / "VOC2007/VOCdevkit/VOC2007"
    (root / "ImageSets/Segmentation").mkdir()
    shutil.copy(root / "ImageSets/Main/trainval.txt", root / "ImageSets/Segmentation/trainval.txt")

    assert len(load_voc(Folder(str(root)), "2007")) == 3
    with pytest.raises(DatasetError, match=r"VOC2007 isn't VOC2012: its folder's name says so.*ask for the year that it is"):
        load(Folder(f"{root}/"))


def test_annotations_of_another_year_are_refused_whatever_their_folder_is_called(demo):
    root = demo / "VOC2007/VOCdevkit/VOC2007"
    for path in (root / "Annotations").iterdir():
        path.write_text(path.read_text().replace("<annotation>", "<annotation><folder>VOC2007</folder>"))
    moved = root.rename(demo / "voc")

    assert len(load_voc(Folder(str(moved)), "2007")) == 3
    with pytest.raises(DatasetError, match=r"voc isn't VOC2012: its annotations say VOC2007"):
        load_voc(Folder(str(moved)), "2012")
