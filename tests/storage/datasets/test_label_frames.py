"""Labels of photographs that their EXIF turns: the same scores and targets as of the upright photographs, live and stored.

The turned data sets are made by Pillow from the upright ones, labels included: key points are found again as marked pixels,
boxes as the outlines of filled rectangles. Images are PNGs under their official names, so that both hold the same pixels.
"""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from operators.image import open_rgb
from pipelines.config import ConfigError
from pipelines.demo_datasets import scene, write_demo
from pipelines.evaluation import correspondence, discovery, sharpness, video
from pipelines.evaluation import readouts as probe
from pipelines.evaluation.correspondence import CorrespondenceConfig
from pipelines.evaluation.discovery import DiscoveryConfig
from pipelines.evaluation.readouts import ProbeConfig
from pipelines.evaluation.sharpness import SharpnessConfig
from pipelines.evaluation.video import VideoConfig
from pipelines.features.join import FeaturesMissing, PlacedRow
from storage.datasets.files import DatasetError
from storage.datasets.labels import label_png
from storage.orientation import Orientation
from tests.pipelines.evaluation.test_evaluation import evaluate
from tests.readout_runs import TINY, extract, prepared, train, training, write_nyu

TO_STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""What makes stored pixels of upright ones, by EXIF orientation."""


def stored(values: np.ndarray, exif: int) -> np.ndarray:
    """Upright pixels or labels as a file of that orientation stores them."""
    image = Image.fromarray(values)
    return np.array(image if exif == 1 else image.transpose(TO_STORED[exif]))


def png(pixels: np.ndarray, exif: int, kind: str = "PNG") -> bytes:
    """Upright pixels as a file of that orientation."""
    tags, data = Image.Exif(), io.BytesIO()
    tags[0x0112] = exif
    Image.fromarray(stored(pixels, exif)).save(data, kind, exif=tags)
    return data.getvalue()


def point(xy: tuple[int, int], size: tuple[int, int], exif: int) -> list[int]:
    """A pixel of an upright image of `size`, (width, height), in the stored one."""
    marked = np.zeros(size[::-1], np.uint8)
    marked[xy[1], xy[0]] = 1
    ((y, x),) = np.argwhere(stored(marked, exif))
    return [int(x), int(y)]


def box(corners: tuple[int, int, int, int], size: tuple[int, int], exif: int) -> list[int]:
    """x1, y1, x2, y2, the last two exclusive, in the stored image."""
    x1, y1, x2, y2 = corners
    filled = np.zeros(size[::-1], np.uint8)
    filled[y1:y2, x1:x2] = 1
    where = np.argwhere(stored(filled, exif))
    (top, left), (bottom, right) = where.min(0), where.max(0) + 1
    return [int(left), int(top), int(right), int(bottom)]


def save(path: Path, data: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())


def results(config) -> dict:
    return json.loads((Path(config.out) / "results.json").read_text())


# --- pixels, points, boxes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("exif", range(1, 9))
def test_pixels_and_labels_are_turned_as_pillow_turns_them(exif, kind):
    upright = np.random.default_rng(exif).integers(0, 255, (5, 7, 3), np.uint8)
    data = png(upright, exif, kind)

    found = Orientation.of(Image.open(io.BytesIO(data)))

    np.testing.assert_array_equal(np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))), upright)
    np.testing.assert_array_equal(np.array(open_rgb(data, max_pixels=99)[0]), upright)
    kept = stored(upright, exif)
    assert (found.exif, found.stored_size, found.upright_size) == (exif, kept.shape[1::-1], (7, 5))
    np.testing.assert_array_equal(found.array(kept), upright)
    np.testing.assert_array_equal(found.undone(upright), kept)
    np.testing.assert_array_equal(found.array(kept[None], axis=1)[0], upright)
    np.testing.assert_array_equal(found.points(np.array([point((5, 1), (7, 5), exif)])), [[5, 1]])
    np.testing.assert_array_equal(found.boxes(np.array([box((1, 2, 6, 4), (7, 5), exif)])), [[1, 2, 6, 4]])


# --- key points -------------------------------------------------------------------------------------------------------

POINTS = ((10, 12), (38, 12), (10, 40), (39, 41))


def make_spair(root: Path, orientations: tuple[int, ...], size: tuple[int, int] = (80, 60), frame="stored") -> Path:
    """A category of one image per orientation, each with the next as a pair; labels are of the stored or upright pixels."""
    of_label = [exif if frame == "stored" else 1 for exif in orientations]
    for i, exif in enumerate(orientations):
        pixels = scene(*size, [(10 + i, 12, 40 + i, 42)], i)
        save(root / f"JPEGImages/cat/{i}.jpg", png(pixels, exif))
    for i in range(len(orientations)):
        j = (i + 1) % len(orientations)
        pair = {"category": "cat", "trg_bndbox": box((10 + j, 12, 40 + j, 42), size, of_label[j])}
        for side, n in (("src", i), ("trg", j)):
            width, height = np.zeros(size[::-1]).shape[::-1] if of_label[n] < 5 else size[::-1]
            pair |= {f"{side}_imname": f"{n}.jpg", f"{side}_imsize": [int(width), int(height), 3]}
            pair[f"{side}_kps"] = [point((x + n, y), size, of_label[n]) for x, y in POINTS]
        save(root / f"PairAnnotation/test/{i:06d}-{i}-{j}:cat.json", pair)
    return root


def spair_config(data: Path, out: Path, **changes: object) -> CorrespondenceConfig:
    settings = {"data": str(data), "out": str(out), "sizes": (64,), "pairs_per_category": 0, "pictures": 1, **TINY}
    return CorrespondenceConfig.of(**{**settings, **changes})


def test_key_points_score_as_those_of_the_upright_images(tmp_path, tiny):
    upright, turned = make_spair(tmp_path / "u", (1,) * 8), make_spair(tmp_path / "t", (1, 2, 3, 4, 5, 6, 7, 8))
    store = extract(tiny, tmp_path / "t.zarr", turned / "JPEGImages", geometry="pad", levels=("x1", "x2"))
    known = {"label_frame": "stored"}

    expected, _ = evaluate(correspondence, spair_config(upright, tmp_path / "0", drawing="extract"))
    live, _ = evaluate(correspondence, spair_config(turned, tmp_path / "1", drawing="extract", **known))
    from_store, found = evaluate(correspondence, spair_config(turned, tmp_path / "2", sizes=(), stores=(store,), **known))
    as_paper, _ = evaluate(correspondence, spair_config(turned, tmp_path / "3", **known))

    assert sum(record["points"] for record in expected) == 8 * 4 * 2
    assert live == expected
    assert from_store == expected
    assert as_paper == evaluate(correspondence, spair_config(upright, tmp_path / "4"))[0]
    assert found.items.left_out == ()
    assert "else stored" in found.choices["turned photographs"]


def test_labels_of_the_upright_image_are_known_by_their_size(tmp_path, tiny):
    upright = make_spair(tmp_path / "u", (1,) * 4)
    turned = make_spair(tmp_path / "t", (5, 6, 7, 8), frame="upright")
    store = extract(tiny, tmp_path / "t.zarr", turned / "JPEGImages", geometry="pad", levels=("x1", "x2"))

    expected, _ = evaluate(correspondence, spair_config(upright, tmp_path / "0", drawing="extract"))

    assert evaluate(correspondence, spair_config(turned, tmp_path / "1", drawing="extract"))[0] == expected
    assert evaluate(correspondence, spair_config(turned, tmp_path / "2", sizes=(), stores=(store,)))[0] == expected


@pytest.mark.parametrize("from_store", [False, True])
def test_what_no_size_tells_is_left_out_and_counted(tmp_path, tiny, from_store):
    """Image 2 is turned by half: the pairs 1-2 and 2-3 are left out, two are scored."""
    data = make_spair(tmp_path / "t", (1, 6, 3, 1))
    changes: dict[str, object] = {"drawing": "extract", "sizes": (48, 64)}
    if from_store:
        store = extract(tiny, tmp_path / "t.zarr", data / "JPEGImages", geometry="pad", levels=("x1", "x2"))
        changes = {"sizes": (), "stores": (store,)}
    config = spair_config(data, tmp_path / "out", **changes)

    records, findings = evaluate(correspondence, config)

    assert {record["pair"] for record in records if "pair" in record} == {"000000-0-1:cat", "000003-3-0:cat"}
    assert [line.values[-1] for line in findings.tables[0].lines] == [2] * len(findings.tables[0].lines)
    (left_out,) = results(config)["left_out"]
    assert left_out["count"] == 2
    assert left_out["first"].partition(" ")[0].endswith("cat/2.jpg")
    assert results(config)["items"] == {
        "scored": {"pairs": 2, "key points": findings.items.scored["key points"]},
        "taken": [],
        "left_out": [left_out],
        "left_out_count": 2,
    }
    assert "**over 2 pairs, " in (tmp_path / "out/results.md").read_text()
    assert "; 2 left out: its EXIF turns it" in (tmp_path / "out/results.md").read_text()


def test_a_set_of_which_nothing_can_be_scored_is_refused(tmp_path):
    data = make_spair(tmp_path / "t", (6, 8), size=(64, 64))

    with pytest.raises(DatasetError, match=r"nothing is left to be scored: 2 left out: .*--label-frame"):
        evaluate(correspondence, spair_config(data, tmp_path / "out"))


def test_a_store_of_other_pixels_is_refused(tmp_path, tiny, monkeypatch):
    """Copies of another size; and photographs whose orientation was corrected since. Where there are no digests, too."""
    data = make_spair(tmp_path / "t", (1, 6))
    small = tmp_path / "small/cat"
    for n in range(2):
        save(small / f"{n}.jpg", png(scene(64, 64, [(10, 12, 40, 42)], n), 1))
    copies = extract(tiny, tmp_path / "small.zarr", small.parent, geometry="pad", levels=("x1", "x2"))
    store = extract(tiny, tmp_path / "t.zarr", data / "JPEGImages", geometry="pad", levels=("x1", "x2"))

    def refused(message: str, url: str) -> None:
        with pytest.raises(FeaturesMissing, match=message):
            evaluate(correspondence, spair_config(data, tmp_path / "out", sizes=(), stores=(url,)))

    refused(r"2 of 2 images have another image's row .* row 0 was made of an image of 64 x 64 pixels", copies)
    save(data / "JPEGImages/cat/1.jpg", png(scene(80, 60, [(11, 12, 41, 42)], 1), 1))
    refused(r"1 of 2 images have another image's row", store)
    without_digests(monkeypatch)
    refused(r"2 of 2 images have another image's row", copies)
    with pytest.raises(FeaturesMissing, match=r"its EXIF turned to 80 x 60 .* orientation 1 and 80 x 60. Extract"):
        evaluate(correspondence, spair_config(data, tmp_path / "b", sizes=(), stores=(store,)))


def without_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores are as the first versions wrote them."""
    read = PlacedRow.read.__func__
    monkeypatch.setattr(PlacedRow, "read", classmethod(lambda *args: [replace(row, digest=None) for row in read(*args)]))


# --- masks of clips ---------------------------------------------------------------------------------------------------


def make_davis(root: Path, orientations: tuple[int, ...]) -> Path:
    for t, exif in enumerate(orientations):
        boxes = [(8 + 4 * t, 20, 40 + 4 * t, 52), (70, 6 + 2 * t, 90, 30 + 2 * t)]
        labels = np.zeros((64, 96), np.uint8)
        for number, (x1, y1, x2, y2) in enumerate(boxes, 1):
            labels[y1:y2, x1:x2] = number
        save(root / f"JPEGImages/480p/clip/{t:05d}.jpg", png(scene(96, 64, boxes, t), exif))
        save(root / f"Annotations/480p/clip/{t:05d}.png", label_png(stored(labels, exif)))
    save(root / "ImageSets/2017/val.txt", b"clip\n")
    return root


def test_clips_score_as_their_upright_frames(tmp_path, tiny):
    turned = make_davis(tmp_path / "t", (6, 2, 3, 4, 5, 1, 7, 8))
    store = extract(tiny, tmp_path / "t.zarr", turned / "JPEGImages/480p", geometry="squash", levels=("x1", "x2"))
    settings = {"pictures": 1, **TINY}

    def run(data: Path, name: str, **changes: object):
        return evaluate(video, VideoConfig.of(data=str(data), out=str(tmp_path / name), **{**settings, **changes}))

    expected, _ = run(make_davis(tmp_path / "u", (1,) * 8), "0", sizes=(64,), drawing="extract")
    live, _ = run(turned, "1", sizes=(64,), drawing="extract", label_frame="stored")
    from_store, _ = run(turned, "2", stores=(store,), label_frame="stored")

    assert live == expected
    assert from_store == expected
    # What is written is as the data set's own label images are.
    for t, size in ((0, (64, 96)), (1, (96, 64))):
        with Image.open(tmp_path / f"2/masks/64/low-res/clip/{t:05d}.png") as written:
            assert written.size == size
    first = Image.open(turned / "Annotations/480p/clip/00000.png")
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "2/masks/64/low-res/clip/00000.png")), np.array(first))
    with pytest.raises(DatasetError, match="nothing is left to be scored: 1 left out"):
        run(turned, "3", sizes=(64,))


# --- boxes ------------------------------------------------------------------------------------------------------------


def make_voc(root: Path, orientations: tuple[int, ...]) -> Path:
    within = root / "VOCdevkit/VOC2007"
    for i, exif in enumerate(orientations):
        size = (96, 64) if i % 2 else (64, 96)
        corners = (10 + 3 * i, 12, 40 + 3 * i, 44)
        x1, y1, x2, y2 = box(corners, size, exif)
        width, height = size if exif < 5 else size[::-1]
        note = f"<size><width>{width}</width><height>{height}</height></size><object><bndbox><xmin>{x1 + 1}</xmin>"
        note += f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        save(within / f"Annotations/{i}.xml", f"<annotation>{note}</annotation>".encode())
        save(within / f"JPEGImages/{i}.jpg", png(scene(*size, [corners], i), exif))
    save(within / "ImageSets/Main/trainval.txt", "".join(f"{i}\n" for i in range(len(orientations))).encode())
    return root


def test_objects_score_as_in_the_upright_images(tmp_path, tiny):
    upright, turned = make_voc(tmp_path / "u", (1,) * 8), make_voc(tmp_path / "t", tuple(range(1, 9)))
    images = turned / "VOCdevkit/VOC2007/JPEGImages"
    store = extract(tiny, tmp_path / "t.zarr", images, geometry="squash", levels=("x1", "x2"))

    def run(data: Path, name: str, **changes: object):
        settings = {"data": str(data), "out": str(tmp_path / name), "pictures": 2, "label_frame": "stored", **TINY}
        return evaluate(discovery, DiscoveryConfig.of(**{**settings, **changes}))[0]

    expected = run(upright, "0", sizes=(64,), drawing="extract")
    assert run(turned, "1", sizes=(64,), drawing="extract") == expected
    assert run(turned, "2", stores=(store,)) == expected
    assert run(turned, "3", protocol="tokencut") == run(upright, "4", protocol="tokencut")
    left_out = [record for record in run(turned, "5", sizes=(64,), label_frame=None) if "left_out" in record]
    assert len(left_out) == 3


# --- readouts ---------------------------------------------------------------------------------------------------------


def make_sets(root: Path, turned: bool) -> Path:
    """The demo's VOC and COCO and an NYUv2, all losslessly; each image with another orientation where they are turned."""
    write_demo(str(root / "demo"))
    voc, coco = root / "demo/VOC2012/VOCdevkit/VOC2012", root / "demo/coco"
    for i, (width, height) in enumerate([(96, 72), (72, 96), (80, 60)] * 2):
        y, _ = np.mgrid[0:height, 0:width]
        write_nyu(root / "demo/NYU", "train", f"{i}", scene(width, height, [(9, 9, 40, 40)], i), 2 + 2 * y / height)
        write_nyu(root / "demo/NYU", "val", f"{i}", scene(width, height, [(9, 9, 40, 40)], i), 2 + 2 * y / height)
    for path in sorted(root.rglob("*.jpg")):
        # By the number in the name, which says the place in the folder.
        exif = 1 + int(re.sub(r"\D", "", path.stem)) % 8 if turned else 1
        with Image.open(path) as image:
            pixels = np.array(image)
        path.write_bytes(png(pixels, exif))
        if exif == 1:
            continue
        for label in (
            voc / f"SegmentationClass/{path.stem}.png",
            Path(str(path).replace("NYU/images", "NYU/depth")).with_suffix(".png"),
        ):
            if label.is_file() and (path.parent.parent == voc or "NYU" in str(path)):
                with Image.open(label) as image:
                    values = np.array(image)
                Image.fromarray(stored(values, exif)).save(label)
        if coco in path.parents:
            turn_notes(coco / f"annotations/instances_{path.parent.name}.json", int(path.stem), exif)
    return root / "demo"


def turn_notes(path: Path, number: int, exif: int) -> None:
    """The annotations of a COCO image, in its stored pixels."""
    data = json.loads(path.read_text())
    (image,) = [each for each in data["images"] if each["id"] == number]
    size = (image["width"], image["height"])
    image["width"], image["height"] = size if exif < 5 else size[::-1]
    for note in data["annotations"]:
        if note["image_id"] == number:
            x, y, width, height = note["bbox"]
            x1, y1, x2, y2 = box((x, y, x + width, y + height), size, exif)
            note["bbox"], note["segmentation"] = [x1, y1, x2 - x1, y2 - y1], [[x1, y1, x2, y1, x2, y2, x1, y2]]
    path.write_text(json.dumps(data))


@pytest.fixture(scope="module")
def both_sets(tmp_path_factory) -> tuple[Path, Path]:
    return tuple(make_sets(tmp_path_factory.mktemp(name), name == "turned") for name in ("upright", "turned"))


IMAGES = {
    "segmentation": "VOC2012/VOCdevkit/VOC2012/JPEGImages",
    "depth": "NYU/images/train",
    "boundaries": "coco/train2017",
    "detection": "coco/train2017",
    "instances": "coco/train2017",
}


@pytest.mark.parametrize("task", IMAGES)
def test_targets_are_those_of_the_upright_images(both_sets, tmp_path, tiny, task):
    upright, turned = both_sets
    geometry = "squash" if task == "depth" else "crop"
    store = extract(tiny, tmp_path / "t.zarr", turned / IMAGES[task], geometry=geometry)

    def source(sets: Path, name: str, **changes: object):
        changes = {"label_frame": "stored", "overlap": True, **changes}  # both parts of its depth are the same pictures
        if "store" in changes:  # of the images trained on only
            changes |= {"val_split": "train2017" if "coco" in IMAGES[task] else "train", "size": None}
        return prepared(training(sets, tmp_path / name, task, **changes)).images

    expected, found = (source(sets, sets.parent.name, drawing="extract") for sets in (upright, turned))
    from_store = source(turned, "stored", store=store)
    rows = range(len(expected.items))
    wanted, live, kept = (each.load(rows, None) for each in (expected, found, from_store))

    assert (wanted.failed, live.failed, kept.failed) == ({}, {}, {})
    assert len(wanted.arrays["pixels"]) == 6
    for name, values in wanted.arrays.items():
        np.testing.assert_array_equal(live.arrays[name], values)
        if name != "pixels":
            np.testing.assert_array_equal(kept.arrays[name], values)
    as_paper = [source(sets, f"paper-{sets.parent.name}").load(rows, None).arrays for sets in (upright, turned)]
    np.testing.assert_array_equal(as_paper[0]["pixels"], as_paper[1]["pixels"])
    if task == "detection":
        for row in rows:
            boxes = [each.task.boxes(each.label(row)) for each in (expected, found, from_store)]
            np.testing.assert_allclose(boxes[1], boxes[0], atol=1e-4)
            np.testing.assert_allclose(boxes[2], boxes[0], atol=1e-4)


def test_images_whose_labels_can_not_be_placed_are_left_out_of_training_and_counted(both_sets, tmp_path):
    """Of six images, those of the orientations 2, 3 and 4, and the square one."""
    config = training(both_sets[1], tmp_path / "run", epochs=1, max_failed_fraction=1.0)

    summary = train(config)

    assert len(summary.failed) == 4
    assert all("--label-frame" in reason for reason in summary.failed.values())


def test_outlines_of_turned_photographs_are_those_of_upright_ones(both_sets, tmp_path):
    upright, turned = (
        evaluate(
            sharpness,
            SharpnessConfig.of(
                data=str(each / "VOC2012"), out=str(tmp_path / name), split="train", label_frame="stored", sizes=(64,), **TINY
            ),
        )
        for name, each in zip(("upright", "turned"), both_sets, strict=True)
    )

    assert turned[0] == upright[0]
    assert any(record["pairs"] for record in upright[0])
    assert turned[1].tables == upright[1].tables


def test_a_readout_scores_turned_photographs_as_upright_ones(both_sets, tmp_path, tiny):
    upright, turned = both_sets
    train(training(upright, tmp_path / "run", drawing="extract", epochs=1))
    store = extract(tiny, tmp_path / "t.zarr", turned / IMAGES["segmentation"])

    def judged(sets: Path, name: str, **changes: object):
        data = str(sets / "VOC2012")
        settings = {"data": data, "out": str(tmp_path / name), "readouts": (str(tmp_path / "run"),), **TINY}
        settings |= {"split": "train", "label_frame": "stored", "pictures": 1}
        return evaluate(probe, ProbeConfig.of(**{**settings, **changes}))

    expected, _ = judged(upright, "0")
    live, _ = judged(turned, "1")
    from_store, _ = judged(turned, "2", stores=(store,))
    without, findings = judged(turned, "3", label_frame=None)

    assert live == expected
    assert from_store == expected
    assert sum("left_out" in record for record in without) == findings.items.left_out[0].count == 4
    assert findings.items.scored == {"images": 2}
    assert "2 images" in findings.tables[0].title


def test_a_store_of_squashed_copies_has_no_labels_of_the_originals(both_sets, tmp_path, tiny):
    images, copies = both_sets[0] / IMAGES["segmentation"], tmp_path / "copies"
    for path in images.iterdir():
        with Image.open(path) as image:
            save(copies / path.name, png(np.array(image.resize((64, 64))), 1))
    store = extract(tiny, tmp_path / "c.zarr", copies)

    with pytest.raises(FeaturesMissing, match=r"6 of 6 images have another image's row .*000000.jpg: row 0 .* 64 x 64 pixels"):
        prepared(training(both_sets[0], tmp_path / "run", store=store, size=None))


def test_a_frame_is_remembered_by_the_run_only_where_it_is_given(both_sets, tmp_path):
    before = prepared(training(both_sets[0], tmp_path / "run"))
    assert prepared(training(both_sets[0], tmp_path / "run")).folder.url == before.folder.url

    with pytest.raises(ConfigError, match="label_frame"):
        prepared(training(both_sets[0], tmp_path / "run", label_frame="upright"))
