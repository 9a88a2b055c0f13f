"""Sharpness at outlines, from class masks and photographs to tables and pictures."""

from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from PIL import Image

from operators.metrics.sharpness import image_sums
from pipelines.config import ConfigError
from pipelines.demo_datasets import scene
from pipelines.evaluation import sharpness
from pipelines.evaluation.sharpness import SharpnessConfig
from storage.datasets.files import DatasetError
from storage.datasets.labels import label_png
from storage.datasets.registry import DATASETS
from storage.pixels import cell_centres
from storage.store import FeatureStore
from tests.pipelines.evaluation.test_evaluation import TINY, evaluate, extract, save_image

SIZES = ((96, 64), (64, 96), (80, 80), (96, 72), (107, 53))
BOX = (30, 12, 50, 44)
SMALL = (18, 34, 23, 39)
"""Around the centre of one cell of 8 px, and of none of 16 px."""


def make_voc(root: Path, plain: tuple[int, ...] = (2,), void: tuple[int, ...] = (3,)) -> Path:
    """Photographs with an object in a void seam; `plain` have none, `void` are void altogether."""
    within = root / "VOCdevkit/VOC2012"
    (within / "SegmentationClass").mkdir(parents=True)
    for i, (width, height) in enumerate(SIZES):
        x1, y1, x2, y2 = box = SMALL if i == 1 else BOX
        labels = np.full((height, width), 255 if i in void else 0, np.uint8)
        if i not in (*plain, *void):
            labels[y1 - 1 : y2 + 1, x1 - 1 : x2 + 1] = 255
            labels[y1:y2, x1 : x2 + 1] = 7  # no seam at its right side
        save_image(within / f"JPEGImages/{i:06d}.jpg", scene(width, height, [box], i))
        (within / f"SegmentationClass/{i:06d}.png").write_bytes(label_png(labels))
    (within / "ImageSets/Segmentation").mkdir(parents=True)
    (within / "ImageSets/Segmentation/val.txt").write_text("".join(f"{i:06d}\n" for i in range(len(SIZES))))
    return root


def config_of(data: Path, out: Path, **changes: object) -> SharpnessConfig:
    return SharpnessConfig.of(**{"data": str(data), "out": str(out), "sizes": (64,), "levels": ("x1", "x4"), **TINY, **changes})


IMAGES = "VOCdevkit/VOC2012/JPEGImages"


def by_script(store: FeatureStore, key: str, mask_HW: np.ndarray, level: str, finest: str) -> list[float]:
    """An image's sums, of a store's rows and where it says that its cells lie."""
    x, y = np.moveaxis(store.pixels(key).to_original(cell_centres(store.level(finest))), -1, 0).astype(int)
    labels, (cells,) = mask_HW[y, x], store.read([key], level).astype(np.float64)
    for axis, count in enumerate(labels.shape):
        cells = cells.repeat(count // cells.shape[axis], axis)
    cells /= np.linalg.norm(cells, axis=-1, keepdims=True)
    sums = np.zeros(4)
    for ours, theirs in ((cells, labels), (cells.swapaxes(0, 1), labels.T)):
        apart, known = 1 - (ours[1:] * ours[:-1]).sum(-1), (theirs[1:] != 255) & (theirs[:-1] != 255)
        for at, pairs in enumerate((known & (theirs[1:] != theirs[:-1]), known & (theirs[1:] == theirs[:-1]))):
            sums[2 * at : 2 * at + 2] += apart[pairs].sum(), pairs.sum()
    return sums.tolist()


@pytest.mark.parametrize("placement", ["crop", "squash"])
def test_a_store_gives_what_a_model_gives_and_what_its_own_geometry_says(tmp_path, tiny, placement):
    data = make_voc(tmp_path / "d")
    url = extract(tmp_path, "s", data / IMAGES, tiny, geometry=placement, levels=("x1", "x4"))
    settings = {"placement": placement, "pictures": 0}

    live, _ = evaluate(sharpness, config_of(data, tmp_path / "live", drawing="extract", **settings))
    stored, _ = evaluate(sharpness, config_of(data, tmp_path / "stored", sizes=(), levels=(), stores=(url,), **settings))

    assert stored == live
    store = FeatureStore.open(url)
    names = {
        key.rsplit("/", 1)[-1].split(".")[0]: key for key in store.index.take(np.arange(len(store)), ["key"])["key"].to_pylist()
    }
    rows = {"low-res": "x1", "bilinear x4": "x4"}
    for record in live:
        name = f"{record['image']:06d}"
        mask = np.array(Image.open(data / f"VOCdevkit/VOC2012/SegmentationClass/{name}.png"))
        expected = by_script(store, names[name], mask, rows[record["row"]], "x4")
        found = [record[each] for each in ("apart", "pairs", "apart_elsewhere", "pairs_elsewhere")]
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_images_without_an_outline_are_left_out_and_the_others_drawn(tmp_path):
    data = make_voc(tmp_path / "d")

    records, findings = evaluate(sharpness, config_of(data, tmp_path / "out", paper=True, pictures=2))

    (table,) = findings.tables
    assert [(line.features, line.grid) for line in table.lines] == [("low-res", "4x4"), ("bilinear x4", "16x16")]
    kept = [record for record in records if record["row"] == "bilinear x4" and record["image"] in (0, 1, 4)]
    apart, pairs, elsewhere, of = np.sum(
        [[each[name] for name in ("apart", "pairs", "apart_elsewhere", "pairs_elsewhere")] for each in kept], axis=0
    )
    assert table.lines[1].values == (
        pytest.approx((apart / pairs) / (elsewhere / of)),
        f"{apart / pairs:.4f}",
        f"{elsewhere / of:.4f}",
    )
    low, bilinear = (line.estimates[0] for line in table.lines)
    assert low.against == "bilinear x4"
    assert low.difference == pytest.approx(table.lines[0].values[0] - table.lines[1].values[0], abs=1e-5)
    assert bilinear.interval.low <= table.lines[1].values[0] <= bilinear.interval.high
    assert table.drawn == "3 images"
    assert findings.items.scored == {"images": 3}
    (left_out,) = findings.items.left_out
    assert (left_out.count, left_out.reason, left_out.first[-10:]) == (2, sharpness.NO_OUTLINE, "000002.jpg")
    assert "of 16 x 16, the finest row's" in findings.choices["pairs"]
    assert table.notes == ("no paper has numbers of this measure",)
    with Image.open(tmp_path / "out/pictures/outlines.png") as picture:
        assert picture.width > 3 * 200
        assert picture.height > 2 * 200
    # The object's right side, which the photograph alone has in red; the map's colours begin at dark blue.
    with Image.open(tmp_path / "out/maps/photo/0000000.png") as photo:
        red = (np.array(photo) == sharpness.WRONG).all(-1)
    assert photo.size == (64, 64)
    assert np.flatnonzero(red.any(axis=0)).tolist() == [BOX[2] - 16]
    with Image.open(tmp_path / "out/maps/bilinear x4/0000000.png") as heat:
        assert heat.size == (16, 16)


def test_lines_of_all_sizes_are_of_the_same_images(tmp_path):
    """What lies between the cells of 32 px is seen at 64 px alone."""
    data = make_voc(tmp_path / "d")

    records, findings = evaluate(sharpness, config_of(data, tmp_path / "out", sizes=(32, 64), levels=("x1",), pictures=0))

    with_outlines = {side: {each["image"] for each in records if each["side"] == side and each["pairs"]} for side in (32, 64)}
    assert with_outlines == {32: {0, 4}, 64: {0, 1, 4}}
    assert findings.items.scored == {"images": 2}
    assert [each.count for each in findings.items.left_out] == [3]
    assert [line.input_px for line in findings.tables[0].lines] == ["32", "32", "64", "64"]


def test_what_can_not_be_measured_is_named(tmp_path, tiny):
    data = make_voc(tmp_path / "d", plain=(0, 1, 2), void=(3, 4))

    with pytest.raises(DatasetError, match="none of 5 images can be scored: no outline passes"):
        evaluate(sharpness, config_of(data, tmp_path / "out"))
    store = extract(tmp_path, "squash", data / IMAGES, tiny, geometry="squash")
    with pytest.raises(ConfigError, match=r"as --geometry crop does"):
        sharpness.prepare(config_of(data, tmp_path / "2", sizes=(), levels=(), stores=(store,)))
    wide = extract(tmp_path, "wide", data / IMAGES, tiny, size="48x64", geometry="crop", crop_pct=1.0)
    with pytest.raises(ConfigError, match="square inputs"):
        sharpness.prepare(config_of(data, tmp_path / "3", sizes=(), levels=(), stores=(wide,)))


def test_every_data_set_of_class_masks_can_be_chosen():
    names = {name for name, kind in DATASETS.items() if kind.label == "classes"}

    assert set(get_args(get_type_hints(SharpnessConfig)["dataset"])) == names
    assert image_sums([]).shape == (0, 4)
