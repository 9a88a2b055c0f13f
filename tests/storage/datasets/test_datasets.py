"""Labelled data sets: official layouts drawn small, the real files where they are, and what is wrong with others."""

import contextlib
import io
import json
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import scipy.io
from PIL import Image

from pipelines.demo_datasets import scene
from pipelines.features.photos import upright_pixels
from storage.datasets.ade20k import load_ade20k
from storage.datasets.cityscapes import load_cityscapes
from storage.datasets.classes import TABLES
from storage.datasets.coco import load_coco, load_coco_instances, load_coco_stuff
from storage.datasets.files import DatasetError, digest, listed_names
from storage.datasets.images import TarImage, tar_members
from storage.datasets.instances import InstanceArrays
from storage.datasets.labels import ClassMask
from storage.datasets.nyu import load_nyu
from storage.datasets.photos_open import load_photos_open
from storage.datasets.registry import DATASETS, load_labelled
from storage.datasets.voc import load_voc_seg
from storage.paths import Folder
from storage.segmentations import decode_mask
from tests.conftest import jpeg, write_tar
from tests.labelled import read_labelled


def save(path: Path, pixels: np.ndarray) -> Path:
    """JPEG or PNG, by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def save_text(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))


def photo(width: int, height: int, seed: int = 0) -> np.ndarray:
    return scene(width, height, [(4, 4, width // 2, height // 2)], seed)


def save_palette(path: Path, labels: np.ndarray) -> None:
    """As VOC's: indices, whose colours are something else."""
    image = Image.fromarray(labels)
    image.putpalette([(7 * i) % 256 for i in range(768)])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


SIZES = ((64, 48), (53, 80), (48, 48), (81, 54))


def blocks(width: int, height: int, *values: int) -> np.ndarray:
    """uint8 [height, width] of the values side by side."""
    return np.array(values, np.uint8)[np.arange(width) * len(values) // width][None].repeat(height, 0)


# --- VOC --------------------------------------------------------------------------------------------------------------


def make_voc(root: Path) -> Path:
    """Two images to train on, two to evaluate: rims of 255, class 20, one without background; ids not in order."""
    for i, (width, height) in enumerate(SIZES):
        labels = blocks(width, height, *((0, 255, 8, 255, 0), (255, 12), (0, 20, 255), (0, 15))[i])
        save(root / f"JPEGImages/2007_00000{i}.jpg", photo(width, height, i))
        save_palette(root / f"SegmentationClass/2007_00000{i}.png", labels)
    save_text(root / "ImageSets/Segmentation/train.txt", "2007_000003\n2007_000001\n")
    save_text(root / "ImageSets/Segmentation/val.txt", "2007_000002\n2007_000000\n")
    return root


@pytest.mark.parametrize("above", ["", "VOC2012", "VOCdevkit/VOC2012", "VOC2012/VOCdevkit/VOC2012"])
def test_voc_is_read_in_the_lists_order_with_palette_indices_as_classes(tmp_path, above):
    make_voc(tmp_path / above)

    found = load_voc_seg(Folder(str(tmp_path)), "val")

    assert [each.image.keys[-1] for each in found] == ["2007_000002", "2007_000000"]
    assert found[0].image.keys[0] == f"{above}/JPEGImages/2007_000002".lstrip("/")
    pixels, labels = read_labelled(found[0])
    assert pixels.shape == (48, 48, 3)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, blocks(48, 48, 0, 20, 255))


def test_records_are_small_and_pickle_to_themselves(tmp_path):
    found = load_voc_seg(Folder(str(make_voc(tmp_path))), "train", 1)
    sent = pickle.dumps(found)

    assert len(sent) < 1000
    again = pickle.loads(sent)
    assert again[0].image.name == "JPEGImages/2007_000003.jpg"
    np.testing.assert_array_equal(read_labelled(again[0])[1], blocks(81, 54, 0, 15))


def test_a_digest_is_of_what_records_say_wherever_they_lie(tmp_path):
    here, there = (load_voc_seg(Folder(str(make_voc(tmp_path / name))), "val") for name in "ab")

    assert digest(here) == digest(there)
    assert digest(here) != digest(here[:1])


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("JPEGImages/2007_000000.jpg", r"2007_000000\.jpg is missing, but it is listed"),
        ("SegmentationClass/2007_000000.png", r"2007_000000\.png is missing, but its image is listed"),
        ("ImageSets/Segmentation/val.txt", r"has no VOCdevkit/VOC2012/ImageSets/Segmentation/val\.txt"),
    ],
)
def test_a_missing_file_is_named_before_anything_is_read(tmp_path, gone, message):
    (make_voc(tmp_path) / gone).unlink()

    with pytest.raises(DatasetError, match=message):
        load_voc_seg(Folder(str(tmp_path)), "val")


def test_a_list_cannot_lead_out_of_its_folder(tmp_path):
    save_text(make_voc(tmp_path) / "ImageSets/Segmentation/val.txt", "../../secret\n")

    with pytest.raises(DatasetError, match="no plain name"):
        load_voc_seg(Folder(str(tmp_path)), "val")


def test_image_and_label_of_two_sizes_are_refused(tmp_path):
    save_palette(make_voc(tmp_path) / "SegmentationClass/2007_000002.png", blocks(40, 48, 0, 3))

    with pytest.raises(DatasetError, match=r"2007_000002\.jpg has 48 x 48 pixels, but its label .* has 40 x 48"):
        read_labelled(load_voc_seg(Folder(str(tmp_path)), "val")[0])


def test_labels_that_are_broken_coloured_or_of_another_data_set_are_refused(tmp_path):
    make_voc(tmp_path)
    path = tmp_path / "SegmentationClass/2007_000002.png"
    mask = load_voc_seg(Folder(str(tmp_path)), "val")[0].label

    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DatasetError, match=r"2007_000002\.png can't be read as an image"):
        mask.read()
    save(path, photo(48, 48))
    with pytest.raises(DatasetError, match="is a RGB image; labels are 8-bit indices"):
        mask.read()
    save_palette(path, blocks(48, 48, 0, 21))
    with pytest.raises(DatasetError, match="holds the value 21, which labels of voc don't have"):
        mask.read()


# --- COCO-Stuff -------------------------------------------------------------------------------------------------------

STUFF = {9: (0, 17, 255), 25: (89, 105), 139: (155, 181, 255), 785: (3, 90, 91)}


def make_stuff(root: Path) -> Path:
    """ViT-Up's layout; the list lacks the last image and is not in order."""
    for number, values in STUFF.items():
        save(root / f"dataset/images/val2017/{number:012d}.jpg", photo(64, 48, number))
        save(root / f"dataset/annotations/val2017/{number:012d}.png", blocks(64, 48, *values))
    save_text(root / "curated/val2017/Coco164kFull_Stuff_Coarse.txt", "000000000139\n000000000009\n000000000025\n")
    return root


@pytest.mark.parametrize("above", ["", "COCOStuff"])
def test_the_curated_list_decides_and_classes_become_groups(tmp_path, above):
    make_stuff(tmp_path / above)

    found = load_coco_stuff(Folder(str(tmp_path)), "val2017")

    assert [each.image.keys[-1] for each in found] == ["000000000139", "000000000009", "000000000025"]
    # shelf (155) is furniture, wood (181) a solid; person, dog; toothbrush (89) is indoor, clouds (105) are sky
    np.testing.assert_array_equal(found[0].label.read(), blocks(64, 48, 15, 24, 255))
    np.testing.assert_array_equal(found[1].label.read(), blocks(64, 48, 9, 7, 255))
    np.testing.assert_array_equal(found[2].label.read(), blocks(64, 48, 4, 23))


def test_deaps_layout_has_every_png_and_fine_classes(tmp_path):
    for number, values in STUFF.items():
        save(tmp_path / f"coco/val2017/{number:012d}.jpg", photo(64, 48, number))
        save(tmp_path / f"cocostuff_deap/trainval2017/val2017/{number:012d}.png", blocks(64, 48, *values))

    found = load_coco_stuff(Folder(str(tmp_path)), "val2017", 3, layout="deap", groups="fine")

    assert [each.image.name for each in found] == [f"coco/val2017/{n:012d}.jpg" for n in (9, 25, 139)]
    np.testing.assert_array_equal(found[2].label.read(), blocks(64, 48, 155, 181, 255))


@pytest.mark.parametrize("table", ["coco_stuff", "coco_stuff27"])
def test_values_between_the_last_class_and_void_are_no_labels(tmp_path, table):
    save(tmp_path / "a.png", blocks(64, 48, 0, 200))

    with pytest.raises(DatasetError, match="holds the value 200"):
        ClassMask(folder=Folder(str(tmp_path)), name="a.png", table=table).read()


def test_without_the_curated_list_both_places_are_named(tmp_path):
    with pytest.raises(DatasetError, match=r"none of curated/val2017/\S+, COCOStuff/curated"):
        load_coco_stuff(Folder(str(tmp_path)), "val2017")


# --- ADE20K -----------------------------------------------------------------------------------------------------------


def make_ade(root: Path) -> Path:
    for i, values in enumerate(((0, 4, 150), (0, 1, 5), (6, 0))):
        width, height = SIZES[i]
        save(root / f"images/training/ADE_train_{i:08d}.jpg", photo(width, height, i))
        save(root / f"annotations/training/ADE_train_{i:08d}.png", blocks(width, height, *values))
    return root


@pytest.mark.parametrize("above", ["", "ADEChallengeData2016"])
def test_ade_keeps_0_as_a_class(tmp_path, above):
    make_ade(tmp_path / above)

    found = load_ade20k(Folder(str(tmp_path)), "training")

    assert [each.image.keys[-1] for each in found] == [f"ADE_train_{i:08d}" for i in range(3)]
    np.testing.assert_array_equal(found[0].label.read(), blocks(64, 48, 0, 4, 150))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("images/training/ADE_train_00000000b.jpg", "ADE_train_00000000b.jpg has no label in annotations/training"),
        ("annotations/training/ADE_train_00000000b.png", "ADE_train_00000000b.png has no image in images/training"),
    ],
)
def test_a_file_too_many_is_an_error_not_a_shift(tmp_path, extra, message):
    save(make_ade(tmp_path) / extra, blocks(64, 48, 1))

    with pytest.raises(DatasetError, match=message):
        load_ade20k(Folder(str(tmp_path)), "training")


def test_ade_has_no_void(tmp_path):
    save(make_ade(tmp_path) / "annotations/training/ADE_train_00000000.png", blocks(64, 48, 0, 255))

    with pytest.raises(DatasetError, match="holds the value 255"):
        read_labelled(load_ade20k(Folder(str(tmp_path)), "training")[0])


# --- Cityscapes -------------------------------------------------------------------------------------------------------


def make_cityscapes(root: Path) -> Path:
    for split, city in (("train", "bochum"), ("train", "aachen"), ("val", "frankfurt")):
        for i in range(2):
            name = f"{city}_{i:06d}_000019"
            save(root / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png", photo(128, 64, i))
            ids = blocks(128, 64, 7, 1, 11, 29, 26, 3, 33, 0)
            save(root / f"gtFine/{split}/{city}/{name}_gtFine_labelIds.png", ids)
            save(root / f"gtFine/{split}/{city}/{name}_gtFine_instanceIds.png", ids.astype(np.uint16))
    return root


@pytest.mark.parametrize("above", ["", "cityscapes"])
def test_label_ids_become_train_ids_and_the_others_void(tmp_path, above):
    make_cityscapes(tmp_path / above)

    found = load_cityscapes(Folder(str(tmp_path)), "train")

    assert [each.image.keys[-1] for each in found] == [
        f"{city}_{i:06d}_000019_leftImg8bit" for city in ("aachen", "bochum") for i in range(2)
    ]
    np.testing.assert_array_equal(read_labelled(found[0])[1], blocks(128, 64, 0, 255, 2, 255, 13, 255, 18, 255))
    assert len(load_cityscapes(Folder(str(tmp_path)), "train", 3)) == 3


def test_a_stray_255_in_label_ids_is_refused(tmp_path):
    make_cityscapes(tmp_path)
    save(tmp_path / "gtFine/val/frankfurt/frankfurt_000000_000019_gtFine_labelIds.png", blocks(128, 64, 7, 255))

    with pytest.raises(DatasetError, match="holds the value 255, which labels of cityscapes don't have"):
        load_cityscapes(Folder(str(tmp_path)), "val")[0].label.read()


def test_a_city_without_labels_is_an_error(tmp_path):
    make_cityscapes(tmp_path)
    (tmp_path / "gtFine/val/frankfurt/frankfurt_000001_000019_gtFine_labelIds.png").unlink()

    with pytest.raises(DatasetError, match=r"frankfurt_000001\S+ has no label in gtFine/val/frankfurt"):
        load_cityscapes(Folder(str(tmp_path)), "val")
    with pytest.raises(DatasetError, match="has no leftImg8bit/test/<city>"):
        load_cityscapes(Folder(str(tmp_path)), "test")


# --- NYUv2 ------------------------------------------------------------------------------------------------------------


def make_depth(root: Path, place: str, depth: np.ndarray) -> Path:
    save(root / "images/000433.png", photo(64, 48))
    save(root / f"{place}/000433.png", depth)
    return root


@pytest.mark.parametrize(("place", "per_metre"), [("depth", 5000), ("annotations", 1000)])
def test_depth_pngs_are_metres_by_their_layouts_unit_and_0_is_none(tmp_path, place, per_metre):
    stored = np.zeros((48, 64), np.uint16)
    stored[:, 32:] = 3 * per_metre
    make_depth(tmp_path, place, stored)

    _, depth = read_labelled(load_nyu(Folder(str(tmp_path)), "all")[0])

    assert depth.dtype == np.float32
    np.testing.assert_array_equal(depth, np.where(stored, np.float32(3), np.float32(0)))
    with pytest.raises(DatasetError, match="isn't divided into splits; ask for the split all"):
        load_nyu(Folder(str(tmp_path)), "train")


def test_depth_pngs_in_folders_of_splits_are_read_by_split(tmp_path):
    for split, metres in (("train", 2), ("test", 4)):
        save(tmp_path / f"images/{split}/a.png", photo(64, 48))
        save(tmp_path / f"annotations/{split}/a.png", np.full((48, 64), 1000 * metres, np.uint16))

    assert read_labelled(load_nyu(Folder(str(tmp_path)), "test")[0])[1].max() == 4


def test_depth_of_8_bits_is_refused(tmp_path):
    make_depth(tmp_path, "depth", np.full((48, 64), 7, np.uint8))

    with pytest.raises(DatasetError, match="is a L image; depth is 16-bit grey"):
        load_nyu(Folder(str(tmp_path)), "all")[0].label.read()


@pytest.fixture
def h5py_of_npz(monkeypatch):
    """Stands for h5py, which nothing depends on: it reads .npz, so that conventions can be tested, not the format."""

    def file(stream, mode):
        try:
            return contextlib.nullcontext(dict(np.load(stream)))
        except ValueError as error:
            raise OSError(str(error)) from None

    monkeypatch.setitem(sys.modules, "h5py", types.SimpleNamespace(File=file))


def npz(**arrays: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def make_shards(root: Path) -> Path:
    """Two shards to train on, one to evaluate: rgb [3, H, W], depth with a hole of 0 and one of NaN."""
    for shard, (split, count) in {"train-000000": ("train", 2), "train-000001": ("train", 1), "val-000000": ("val", 1)}.items():
        members = []
        for i in range(count):
            depth = np.full((48, 64), 1.5 + i, np.float32)
            depth[0], depth[1] = 0, np.nan
            rgb = photo(64, 48, i).transpose(2, 0, 1)
            members.append((f"{split}/scene_{shard[-1]}/{2 - i:05d}.h5", npz(rgb=rgb, depth=depth)))
        write_tar(root / f"data/{shard}.tar", members)
    return root


def test_shards_are_read_in_order_of_their_members(tmp_path, h5py_of_npz):
    folder = Folder(str(make_shards(tmp_path)))
    found = load_nyu(folder, "train")

    keys = ["train/scene_0/00002", "train/scene_0/00001", "train/scene_1/00002"]
    assert [each.image.keys[0] for each in found] == keys
    pixels, depth = read_labelled(found[1])
    np.testing.assert_array_equal(pixels, photo(64, 48, 1))
    assert (depth[:2] == 0).all()
    assert (depth[2:] == 2.5).all()
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(found[1].image.data()))), pixels)
    assert [each.image.keys[0] for each in load_nyu(folder, "train", 2)] == keys[:2]
    assert len(load_nyu(folder, "val")) == 1
    assert digest(found) != digest(found[:2])


def test_a_member_that_is_no_hdf5_is_named(tmp_path, h5py_of_npz):
    write_tar(tmp_path / "data/train-000000.tar", [("train/a/00001.h5", b"nothing")])

    with pytest.raises(DatasetError, match=r"train-000000\.tar, byte 512: depth can't be read"):
        load_nyu(Folder(str(tmp_path)), "train")[0].label.read()


@pytest.mark.parametrize(
    ("rgb", "depth", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), np.full((8, 8), -1.0), "depth holds -1 m; depth can't be negative"),
        (np.zeros((3, 8, 8), np.uint8), np.ones((1, 8, 8)), r"depth has the shape \(1, 8, 8\)"),
        (np.zeros((3, 8, 8), np.float32), np.ones((8, 8)), r"rgb is float32 \(8, 8, 3\), which is no image"),
        (np.zeros((8, 8), np.uint8), np.ones((8, 8)), r"rgb is uint8 \(8, 8\), which is no image"),
        (np.zeros((3, 8, 9), np.uint8), np.ones((8, 8)), "has 9 x 8 pixels, but its label .* has 8 x 8"),
    ],
)
def test_arrays_that_are_no_image_or_no_depth_are_refused(tmp_path, h5py_of_npz, rgb, depth, message):
    write_tar(tmp_path / "train-000000.tar", [("train/a/00001.h5", npz(rgb=rgb, depth=depth))])

    with pytest.raises(DatasetError, match=message):
        read_labelled(load_nyu(Folder(str(tmp_path)), "train")[0])


def make_mat(root: Path) -> Path:
    """Three images as h5py shows Matlab's arrays: axes in reverse."""
    images = np.stack([photo(64, 48, i).T for i in range(3)])
    depths = np.stack([np.arange(64)[:, None] + np.full((64, 48), 1.0 + i, np.float32) for i in range(3)])
    (root / "nyu_depth_v2_labeled.mat").write_bytes(npz(images=images, depths=depths))
    scipy.io.savemat(root / "splits.mat", {"trainNdxs": np.array([[3], [1]]), "testNdxs": np.array([[2]])})
    return root


def test_matlabs_file_is_turned_round_and_split_by_splits_mat(tmp_path, h5py_of_npz):
    folder = Folder(str(make_mat(tmp_path)))

    train, (test,) = load_nyu(folder, "train"), load_nyu(folder, "test")

    assert [each.image.keys[0] for each in train] == ["000003", "000001"]
    pixels, depth = read_labelled(test)
    np.testing.assert_array_equal(pixels, photo(64, 48, 1))
    np.testing.assert_array_equal(depth[5], np.arange(64) + 2)
    assert len(load_nyu(folder, "all")) == 3
    with pytest.raises(DatasetError, match="has no valNdxs; its splits are train and test"):
        load_nyu(folder, "val")
    (tmp_path / "splits.mat").write_bytes(b"nothing at all, but long enough " * 8)
    with pytest.raises(DatasetError, match=r"splits\.mat can't be read"):
        load_nyu(folder, "train")


@pytest.mark.parametrize("make", [make_shards, make_mat])
def test_without_h5py_the_message_says_what_to_install(tmp_path, monkeypatch, make):
    monkeypatch.setitem(sys.modules, "h5py", None)
    make(tmp_path)

    with pytest.raises(DatasetError, match="pip install h5py"):
        load_nyu(Folder(str(tmp_path)), "train")


def test_a_folder_without_any_layout_lists_them(tmp_path):
    with pytest.raises(DatasetError, match=r"none of nyu_depth_v2_labeled\.mat"):
        load_nyu(Folder(str(tmp_path)), "train")


# --- COCO -------------------------------------------------------------------------------------------------------------


def rectangle(x1: float, y1: float, x2: float, y2: float) -> list[float]:
    return [x1, y1, x2, y1, x2, y2, x1, y2]


CROWD = {"size": [48, 64], "counts": [48 * 60, 24, 24, 24, 24 + 48 * 2]}
"""The upper half of column 60, and of 61."""


def coco_notes() -> dict:
    """Image ids neither in order nor consecutive, category ids with gaps, overlaps, a crowd, an image without objects."""
    sizes = {785: (64, 48), 139: (53, 80), 1000: (48, 48)}
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": width, "height": height} for i, (width, height) in sizes.items()]
    objects = [
        (785, 18, [rectangle(4, 6, 20, 16)], [4, 6, 16, 10], 160.0, 0),
        (785, 1, CROWD, [60, 0, 2, 24], 48.0, 1),
        (139, 90, [rectangle(2.5, 3.5, 10.25, 9.75), rectangle(30, 30, 40, 50)], [2.5, 3.5, 37.5, 46.5], 248.4, 0),
        (785, 1, [rectangle(10, 8, 30, 40)], [10, 8, 20, 32], 640.0, 0),
    ]
    annotations = [
        {"id": n, "image_id": i, "category_id": c, "segmentation": s, "bbox": box, "area": area, "iscrowd": crowd}
        for n, (i, c, s, box, area, crowd) in enumerate(objects)
    ]
    return {"images": images, "annotations": annotations, "categories": [{"id": c, "name": str(c)} for c in (1, 18, 90)]}


def make_coco(folder: Folder, notes: dict | None = None) -> Folder:
    for each in coco_notes()["images"]:
        folder.write(f"val2017/{each['file_name']}", jpeg(each["id"], each["width"], each["height"]))
    folder.write("annotations/instances_val2017.json", json.dumps(notes or coco_notes()).encode())
    return folder


@pytest.mark.parametrize("url", ["local", "memory://readouts-coco"])
def test_objects_come_in_the_files_order_and_images_by_id(tmp_path, url):
    folder = make_coco(Folder(str(tmp_path) if url == "local" else url))

    found = load_coco_instances(folder, "val2017")

    assert [each.image.keys for each in found] == [(f"val2017/{n:012d}", f"{n:012d}") for n in (139, 785, 1000)]
    assert (found[1].image.width, found[1].image.height) == (64, 48)
    pixels, label = read_labelled(found[1])
    assert isinstance(label, InstanceArrays)
    assert pixels.shape == (48, 64, 3)
    assert label.masks.shape == (3, 48, 64)
    assert label.masks.dtype == bool
    np.testing.assert_array_equal(label.categories, [18, 1, 1])
    np.testing.assert_array_equal(label.crowd, [False, True, False])
    np.testing.assert_array_equal(label.boxes, np.float32([[4, 6, 20, 16], [60, 0, 62, 24], [10, 8, 30, 40]]))
    np.testing.assert_array_equal(label.areas, [160, 48, 640])
    np.testing.assert_array_equal(found[1].label.areas(), [160, 48, 640])
    inside = np.zeros((48, 64), bool)
    inside[6:16, 4:20] = True
    np.testing.assert_array_equal(label.masks[0], inside)
    crowd = np.zeros((48, 64), bool)
    crowd[:24, 60:62] = True
    np.testing.assert_array_equal(label.masks[1], crowd)


def test_an_image_without_objects_has_empty_arrays(tmp_path):
    found = load_coco_instances(make_coco(Folder(str(tmp_path / "coco"))), "val2017")

    label = read_labelled(found[2])[1]
    assert label.masks.shape == (0, 48, 48)
    assert label.boxes.shape == (0, 4)
    above = load_coco_instances(Folder(str(tmp_path)), "val2017", 2)
    assert [each.image.name for each in above] == ["coco/val2017/000000000139.jpg", "coco/val2017/000000000785.jpg"]


def test_a_split_says_its_categories_and_the_ids_of_its_images(tmp_path):
    notes = coco_notes()
    notes["categories"] = [{"id": n, "name": name} for n, name in ((90, "toothbrush"), (1, "person"), (18, "dog"))]

    found = load_coco(make_coco(Folder(str(tmp_path)), notes), "val2017", 2)

    assert list(found.categories.items()) == [(1, "person"), (18, "dog"), (90, "toothbrush")]
    assert found.numbers == (139, 785)
    assert (len(found.images), found.images.of, found.without_mask) == (2, 3, 0)


def test_annotations_may_lack_their_mask_where_that_is_said(tmp_path):
    notes = coco_notes()
    del notes["annotations"][0]["segmentation"]
    notes["annotations"][2]["segmentation"] = []
    folder = make_coco(Folder(str(tmp_path)), notes)

    found = load_coco(folder, "val2017", boxes_alone=True)

    assert found.without_mask == 2
    assert ["segmentation" in each for each in found.images[1].label.objects()] == [False, True, True]
    with pytest.raises(DatasetError, match="an annotation has no field 'segmentation'"):
        load_coco_instances(folder, "val2017")


def test_polygons_with_corners_between_pixels_are_joined():
    polygons = [rectangle(2.5, 3.5, 10.25, 9.75), rectangle(30, 30, 40, 50)]

    mask = decode_mask(polygons, 80, 53)

    assert mask[40, 35]
    assert mask[6, 6]
    assert not mask[6, 35]
    assert abs(int(mask.sum()) - (200 + 48.4)) < 8


def test_runs_as_text_equal_runs_as_numbers():
    random = np.random.default_rng(0)
    for size in ((48, 64), (81, 53), (1, 1)):
        mask = np.kron(random.random((size[0] // 4 + 1, size[1] // 4 + 1)) > 0.6, np.ones((4, 4), bool))
        mask = mask[: size[0], : size[1]]
        text = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()

        np.testing.assert_array_equal(decode_mask({"size": list(size), "counts": text}, *size), mask)


def test_polygons_of_two_corners_cover_nothing():
    # photos_open has such ones, of area 0; pycocotools would take four numbers for x, y, width, height.
    assert not decode_mask([[10.0, 10.0, 20.0, 20.0]], 48, 64).any()


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], "there are no polygons"),
        ([[1, 2, 3, 4, 5, 6, 7]], "a polygon is a list x, y"),
        ([["a", 2, 3, 4, 5, 6]], "a polygon is a list x, y"),
        ([[1, 2, 3, 4, 5, float("nan")]], "far outside the image"),
        ([[1, 2, 3, 4, 5, 1e9]], "far outside the image"),
        ({"size": [64, 48], "counts": [3072]}, r"its size is \[64, 48\], the image's \[48, 64\]"),
        ({"size": [48, 64], "counts": [1, 2]}, "its runs cover 3 pixels, the image has 3072"),
        ({"size": [48, 64], "counts": [-1, 3073]}, "its runs aren't all whole numbers"),
        ({"size": [48, 64], "counts": [0.5, 3072]}, "its runs aren't all whole numbers"),
        ({"size": [48, 64], "counts": None}, r"its runs \(counts\) are None"),
        ({"size": None, "counts": [3072]}, "its size is None"),
        ({"size": [48, 64], "counts": "03"}, "its runs cover 3 pixels"),
        ({"size": [48, 64], "counts": "o"}, "ends within a number"),
        ({"size": [48, 64], "counts": "é"}, "holds the character"),
        ({"size": [48, 64]}, "counts"),
        (7, "it is 7, neither a list of polygons nor runs"),
        ("5", "it is '5', neither a list of polygons nor runs"),
    ],
)
def test_a_malformed_segmentation_is_named_with_its_annotation(tmp_path, segmentation, message):
    notes = coco_notes()
    notes["annotations"][0]["segmentation"] = segmentation
    found = load_coco_instances(make_coco(Folder(str(tmp_path)), notes), "val2017")

    with pytest.raises(DatasetError, match=rf"(?s)000000000785\.jpg, annotation 0: .*malformed.*{message}"):
        read_labelled(found[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(images=None), "its images are no list of objects"),
        (lambda d: d.update(annotations={"a": 1}), "its annotations are no list of objects"),
        (lambda d: d["annotations"].append(5), "its annotations are no list of objects"),
        (lambda d: d.update(categories=["dog"]), "its categories are no list of objects"),
        (lambda d: d["annotations"][0].update(iscrowd="yes"), "has iscrowd 'yes', which is neither 0 nor 1"),
        (lambda d: d["annotations"][0].pop("bbox"), "an annotation has no field 'bbox'"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, 3]), r"annotation 0 has the box \[1, 2, 3\]"),
        (lambda d: d["annotations"][0].update(area="big"), "an annotation is malformed: annotation 0 has the area big"),
        (lambda d: d["annotations"][0].update(image_id=5), "is of image 5, which isn't among the images"),
        (lambda d: d["images"][0].pop("width"), "has no field 'width'"),
        (lambda d: d["images"][0].update(file_name="../x.jpg"), "no plain name"),
        (lambda d: d["images"][0].update(file_name="x.jpg"), r"x\.jpg is missing"),
        (lambda d: d["images"][0].update(file_name="\ud800.jpg"), r"the file name of image .*ud800"),
        (lambda d: d["images"][0].update(file_name=None), "the file name of image .* is None"),
        (lambda d: d["images"][0].update(width=0), "image .* is 0 x "),
        (lambda d: d["images"][0].update(width=float("nan")), "image .* is nan x "),
        (lambda d: d["images"][0].update(height=10**12), "image .* is .* x 10{12} pixels"),
        (lambda d: d["annotations"][0].update(bbox="1 2 3 4"), "the box 1 2 3 4; it should be four numbers, x, y, width, height"),
        (lambda d: d["annotations"][0].update(bbox=[1, 2, 3]), "it should be four numbers"),
        (lambda d: d["annotations"][0].update(bbox=[float("nan")] * 4), "it should be four numbers"),
        (lambda d: d["annotations"][0].update(bbox=None), "the box None; it should be four numbers"),
        (lambda d: d["annotations"][0].update(area="big"), "the area big"),
        (lambda d: d["annotations"][0].update(id=float("inf")), "the id of annotation inf inf is no whole number"),
        (lambda d: d.pop("images"), "has no field 'images'"),
    ],
)
def test_malformed_annotations_are_an_error_when_listed(tmp_path, change, message):
    notes = coco_notes()
    change(notes)

    with pytest.raises(DatasetError, match=message):
        load_coco_instances(make_coco(Folder(str(tmp_path)), notes), "val2017")


def test_ids_that_are_text_of_digits_are_numbers(tmp_path):
    notes, text = coco_notes(), coco_notes()
    for each in text["images"]:
        each["id"] = str(each["id"])
    for each in text["annotations"]:
        each.update(image_id=str(each["image_id"]), category_id=str(each["category_id"]))

    numbers = load_coco_instances(make_coco(Folder(str(tmp_path / "numbers")), notes), "val2017")
    found = load_coco_instances(make_coco(Folder(str(tmp_path / "text")), text), "val2017")

    assert digest(found.items) == digest(numbers.items)


@pytest.mark.parametrize("value", ["a3f9", 3.5, True, None, "1" * 5000, 10**30, float("inf"), float("nan")])
def test_ids_that_are_no_numbers_are_named(tmp_path, value):
    notes = coco_notes()
    notes["images"][0]["id"] = value

    with pytest.raises(DatasetError, match=r"instances_val2017\.json is malformed.*the image id .* is no whole number"):
        load_coco_instances(make_coco(Folder(str(tmp_path)), notes), "val2017")


def test_a_byte_order_mark_is_no_part_of_a_lists_first_name(tmp_path):
    folder = Folder(str(tmp_path))
    folder.write("val.txt", "\ufeff2007_000033\r\n2007_000042\r\n".encode())

    assert listed_names(folder, "val.txt") == ["2007_000033", "2007_000042"]


@pytest.mark.parametrize("value", [b"[" * 100_000 + b"]" * 100_000, b"1" * 6000], ids=["nested", "digits"])
def test_json_that_python_cannot_read_is_named(tmp_path, value):
    make_coco(Folder(str(tmp_path))).write("annotations/instances_val2017.json", b'{"images": ' + value + b"}")

    with pytest.raises(DatasetError, match=r"instances_val2017\.json is malformed: (RecursionError|ValueError)"):
        load_coco_instances(Folder(str(tmp_path)), "val2017")


def test_json_that_is_cut_short_is_named(tmp_path):
    make_coco(Folder(str(tmp_path))).write("annotations/instances_val2017.json", b'{"images": [')

    with pytest.raises(DatasetError, match=r"instances_val2017\.json is malformed"):
        load_coco_instances(Folder(str(tmp_path)), "val2017")


def test_an_image_of_another_size_than_annotated_is_refused(tmp_path):
    folder = make_coco(Folder(str(tmp_path)))
    folder.write("val2017/000000000785.jpg", jpeg(1, 48, 64))

    with pytest.raises(DatasetError, match="has 48 x 64 pixels, its annotation says 64 x 48"):
        read_labelled(load_coco_instances(folder, "val2017")[1])


# --- photos in tars ---------------------------------------------------------------------------------------------------


def make_photos(root: Path) -> Path:
    """Two tars of three photos; the second of each has no label."""
    for t in range(2):
        members = []
        for i in range(3):
            members += [(f"{3 * t + i:03d}_cat.jpg", jpeg(3 * t + i, 64, 48)), (f"{3 * t + i:03d}_cat.cls", b"6")]
        write_tar(root / f"photos-open-00000{t}.tar", members)
    for number in (0, 2, 3, 5):
        save_palette(root / f"seg/{number:03d}_cat.png", blocks(64, 48, 0, 7))
    images = [{"id": n + 1, "file_name": f"{n:03d}_cat.jpg", "width": 64, "height": 48} for n in (0, 2, 3, 5)]
    notes = [
        {"id": n, "image_id": n + 1, "category_id": 6, "bbox": [8, 8, 16, 16], "area": 256.0, "iscrowd": 0}
        | {"segmentation": [rectangle(8, 8, 24, 24)]}
        for n in (0, 2, 3, 5)
    ]
    save_text(root / "instances.json", {"images": images, "annotations": notes, "categories": []})
    return root


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_photos_are_read_out_of_their_tars(tmp_path, scheme):
    folder = Folder(str(make_photos(tmp_path)))
    if scheme == "memory":
        folder = Folder("memory://readouts-photos")
        for path in tmp_path.rglob("*.*"):
            folder.write(str(path.relative_to(tmp_path)), path.read_bytes())

    found = load_photos_open(folder, "all")

    assert [each.image.keys for each in found] == [(f"{n:03d}_cat",) for n in (0, 2, 3, 5)]
    assert found[2].image.data() == jpeg(3, 64, 48)
    pixels, labels = read_labelled(found[2])
    np.testing.assert_array_equal(pixels, np.array(Image.open(io.BytesIO(jpeg(3, 64, 48)))))
    np.testing.assert_array_equal(labels, blocks(64, 48, 0, 7))
    assert found[2].image.displayed.endswith("photos-open-000001.tar: 003_cat.jpg")
    (without,) = found.left_out.values()
    assert (found.of, without.count) == (4, 2)


def test_the_first_tar_is_for_training_and_instances_go_with_images_in_tars(tmp_path):
    folder = Folder(str(make_photos(tmp_path)))

    train, val = (load_photos_open(folder, split, label="instances") for split in ("train", "val"))

    assert [each.image.keys[0] for each in (*train, *val)] == ["000_cat", "002_cat", "003_cat", "005_cat"]
    pixels, label = read_labelled(pickle.loads(pickle.dumps(val))[0])
    assert pixels.shape == (48, 64, 3)
    assert label.masks[0, 8:24, 8:24].all()
    assert label.masks.sum() == 256
    assert digest(train) != digest(val)


def test_a_label_without_a_photo_and_a_split_without_tars_are_errors(tmp_path):
    folder = Folder(str(make_photos(tmp_path)))
    save_palette(tmp_path / "seg/009_dog.png", blocks(64, 48, 0))

    with pytest.raises(DatasetError, match="seg has a label for 009_dog, but no tar there has such an image"):
        load_photos_open(folder, "train")
    with pytest.raises(DatasetError, match="no tars of the split test"):
        load_photos_open(folder, "test")


def test_a_tar_that_is_damaged_or_was_cut_since_is_an_error(tmp_path):
    folder = Folder(str(make_photos(tmp_path)))
    found, tar = load_photos_open(folder, "train"), tmp_path / "photos-open-000000.tar"
    whole = tar.read_bytes()

    tar.write_bytes(whole[:700])
    with pytest.raises(DatasetError, match="ends within bytes 512 to"):
        found[0].image.data()
    with pytest.raises(DatasetError, match="the tar is cut short"):
        load_photos_open(folder, "train")
    tar.write_bytes(b"no tar" * 200)
    with pytest.raises(DatasetError, match="is not a tar archive"):
        load_photos_open(folder, "train")
    tar.unlink()
    with pytest.raises(DatasetError, match=r"photos-open-000000\.tar is missing"):
        found[0].image.data()


def test_a_photo_in_a_tar_of_another_size_than_annotated_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [("x.jpg", jpeg(0, 64, 48))])
    folder = Folder(str(tmp_path))
    (member,) = tar_members(folder, ["a.tar"])

    with pytest.raises(DatasetError, match="a.tar: x.jpg has 64 x 48 pixels, its annotation says 10 x 10"):
        upright_pixels(TarImage(folder=folder, member=member, keys=("x",), width=10, height=10))


# --- by name ----------------------------------------------------------------------------------------------------------


def test_names_go_with_classes_and_tables():
    for name, kind in DATASETS.items():
        assert kind.label == "classes" or kind.classes is None
        if kind.classes:
            assert len(kind.names) in (0, kind.classes)
            table = TABLES[name]
            assert sorted(set(table[(table >= 0) & (table < 255)].tolist())) == list(range(kind.classes))


def test_a_data_set_is_loaded_by_name_and_mistakes_are_explained(tmp_path):
    make_voc(tmp_path)

    assert len(load_labelled("voc", str(tmp_path), "train", limit=1)) == 1
    with pytest.raises(DatasetError, match=r"no data set 'ade20'; did you mean ade20k\?"):
        load_labelled("ade20", str(tmp_path), "train")
    with pytest.raises(DatasetError, match="there are voc, coco_stuff27"):
        load_labelled("xyz", str(tmp_path), "train")
    with pytest.raises(DatasetError, match="a limit of 0"):
        load_labelled("voc", str(tmp_path), "train", limit=0)
    with pytest.raises(DatasetError, match="no plain name"):
        load_labelled("voc", str(tmp_path), "../train")


# --- the real files ---------------------------------------------------------------------------------------------------

REAL = [
    ("voc", "labelled/voc", "val", 5),
    ("coco_stuff", "labelled/cocostuff", "val2017", 8),
    ("coco_stuff", "labelled/cocostuff", "train2017", 13),
    ("ade20k", "labelled/ade20k", "validation", 3),
    ("cityscapes", "labelled/cityscapes", "val", 1),
    ("nyu", "labelled/nyuv2/seg40_depth", "all", 2),
    ("nyu", "labelled/nyuv2/mmseg_pseudo_nyu_dataset", "all", 1),
    ("coco", "labelled/coco", "val2017", 80),
    ("photos_open", "photos_open", "train", 23),
    ("photos_open", "photos_open", "val", 17),
    ("photos_open_instances", "photos_open", "all", 40),
]


@pytest.mark.parametrize(("name", "place", "split", "count"), REAL)
def test_real_images_and_labels_agree(shared_data, name, place, split, count):
    found = load_labelled(name, str(shared_data / place), split)

    assert len(found) == count
    for each in found[:6]:
        pixels, label = read_labelled(each)
        assert pixels.ndim == 3
        assert isinstance(label, InstanceArrays) or label.shape == pixels.shape[:2]


def test_real_depth_is_that_of_rooms(shared_data):
    nyuv2 = shared_data / "labelled/nyuv2"
    for place in ("seg40_depth", "mmseg_pseudo_nyu_dataset"):
        for each in load_nyu(Folder(str(nyuv2 / place)), "all"):
            depth = each.label.read()
            assert 1 < np.median(depth[depth > 0]) < 6


def test_real_label_ids_become_the_data_sets_own_train_ids(shared_data):
    place = shared_data / "labelled/cityscapes"
    files = [place / f"gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_{name}.png" for name in ("labelIds", "labelTrainIds")]
    raw, official = (np.array(Image.open(file)) for file in files)

    ours = load_cityscapes(Folder(str(place)), "val")[0].label.read()

    # The frame was shrunk, and its two label images apart: at 77 borders' pixels they are of different objects.
    assert (ours != official).sum() == 77
    for value in np.unique(raw):
        assert ours[raw == value][0] == np.bincount(official[raw == value]).argmax()


def test_real_masks_have_the_annotated_areas(shared_data):
    objects = crowds = 0
    for each in load_coco_instances(Folder(str(shared_data / "labelled/coco")), "val2017"):
        label = each.label.read()
        pixels, alone = label.masks.sum((1, 2)), ~label.crowd
        # Areas are of polygons, masks of pixels. Crowds' areas are not those of their runs, which are counted instead.
        np.testing.assert_allclose(pixels[alone], label.areas[alone], rtol=0.1, atol=60)
        runs = [note["segmentation"]["counts"][1::2] for note in each.label.objects() if note["iscrowd"]]
        assert pixels[label.crowd].tolist() == [sum(counts) for counts in runs]
        objects, crowds = objects + len(pixels), crowds + len(runs)

    assert (objects, crowds) == (815, 11)


def test_real_masks_and_instances_of_the_photos_say_the_same(shared_data):
    folder = Folder(str(shared_data / "photos_open"))
    classes = DATASETS["photos_open"].names

    assert list(classes) == (shared_data / "photos_open/seg_classes.txt").read_text().split()
    pairs = zip(load_photos_open(folder, "all"), load_photos_open(folder, "all", label="instances"), strict=True)
    for mask, objects in pairs:
        assert mask.image.keys == objects.image.keys
        labels, arrays = mask.label.read(), objects.label.read()
        both = (labels > 0) == arrays.masks.any(0)
        assert both.mean() > 0.98
        assert set(np.unique(labels[labels > 0])) <= set(arrays.categories + 1)
