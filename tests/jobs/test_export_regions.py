"""`jobs/show.py export --regions`: a vector for each annotation, each from the row of its own image, turned as the image was."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.show import run
from pipelines.executors import InlineExecutor
from pipelines.extraction.run import extract
from storage.paths import Folder
from storage.store import FeatureStore
from tests.conftest import jpeg

BOXES = {"a": [10.0, 8.0, 40.0, 30.0], "turned": [4.0, 50.0, 30.0, 20.0], "b": [60.0, 40.0, 36.0, 32.0]}
"""x, y, width, height of an object of each image, as it is stored."""


def turned_jpeg(seed: int) -> bytes:
    """96 x 72 pixels are stored, and seen as 72 x 96: by a quarter turn to the right."""
    image, out = Image.open(io.BytesIO(jpeg(seed))), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(out, "JPEG", exif=exif)
    return out.getvalue()


def polygon(box: list[float]) -> list[list[float]]:
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def annotated(path: Path, names: dict[str, list[float]], **change: object) -> str:
    """COCO's annotations: an image of 96 x 72 stored pixels with an object for each name."""
    images = [{"id": i, "file_name": f"{name}.jpg", "width": 96, "height": 72} for i, name in enumerate(names)]
    notes = [
        {"id": 100 + i, "image_id": i, "category_id": 3, "iscrowd": 0, "bbox": box, "area": 9.0, "segmentation": polygon(box)}
        for i, box in enumerate(names.values())
    ]
    for note in notes:
        note.update(change)
    path.write_text(json.dumps({"images": images, "annotations": notes, "categories": [{"id": 3, "name": "dog"}]}))
    return str(path)


@pytest.fixture
def store(tmp_path, tiny) -> FeatureStore:
    (tmp_path / "photos").mkdir()
    for seed, name in enumerate(BOXES):
        data = turned_jpeg(seed) if name == "turned" else jpeg(seed)
        (tmp_path / "photos" / f"{name}.jpg").write_bytes(data)
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no image")
    config = tiny(str(tmp_path / "photos"), geometry="squash", max_failed_fraction=1.0)
    extract(config, InlineExecutor())
    return FeatureStore.open(config.out)


@pytest.mark.parametrize("boxes", [False, True])
def test_each_annotation_has_the_vector_of_its_region(store, tmp_path, capsys, boxes):
    notes = annotated(tmp_path / "coco.json", {**BOXES, "broken": [0, 0, 9, 9], "elsewhere": [0, 0, 9, 9]})

    assert run(["export", store.folder.url, "--regions", notes, "--out", str(tmp_path / "out"), *["--boxes"][:boxes]]) == 0

    table = pq.read_table(tmp_path / "out").sort_by("annotation")
    assert table["annotation"].to_pylist() == [100, 101, 102]
    assert table["key"].to_pylist() == list(BOXES)
    assert table["category"].to_pylist() == [3, 3, 3]
    np.testing.assert_allclose(table["seen"].to_numpy(), 1, atol=1e-6)
    # Stored (x, y) of an image that is turned to the right is seen at (72 - y, x).
    upright = {"a": [10, 8, 50, 38], "turned": [2, 4, 22, 34], "b": [60, 40, 96, 72]}
    expected = [store.pool(name, [box], "x1")[0] for name, box in upright.items()]
    np.testing.assert_allclose(np.stack(table["vector"].to_numpy()), expected, rtol=1e-5, atol=1e-6)
    said = capsys.readouterr().out
    assert "3 vectors of 64 from x1" in said
    assert "1 annotations left out: the image isn't in the store" in said
    assert "1 annotations left out: the image has no features" in said


def test_a_turned_image_that_is_gone_costs_its_own_annotations(store, tmp_path, capsys):
    (tmp_path / "photos" / "turned.jpg").write_bytes(jpeg(9))

    assert (
        run(["export", store.folder.url, "--regions", annotated(tmp_path / "c.json", BOXES), "--out", str(tmp_path / "o")]) == 0
    )

    assert pq.read_table(tmp_path / "o")["key"].to_pylist() == ["a", "b"]
    assert "1 annotations left out: its EXIF turns it, and its source" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "names", "change", "said"),
    [
        (["--level", "pooled"], BOXES, {}, "has no maps among pooled"),
        ([], {"elsewhere": [0, 0, 9, 9]}, {}, "has none of the 1 annotated images"),
        ([], {"a": BOXES["a"]}, {"segmentation": []}, "has no segmentation; --boxes takes the boxes"),
        ([], {"a": BOXES["a"]}, {"segmentation": {"size": [72, 96], "counts": [5]}}, "its runs cover 5 pixels"),
        (["--boxes"], {"a": BOXES["a"]}, {"bbox": [0, 0, 500, 9]}, "outside the image"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(store, tmp_path, capsys, flags, names, change, said):
    notes = annotated(tmp_path / "coco.json", names, **change)

    assert run(["export", store.folder.url, "--regions", notes, "--out", str(tmp_path / "out"), *flags]) == 2

    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_was_written_before_a_malformed_annotation_is_removed(store, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("storage.export.PART_BYTES", 4 * 64)  # a vector in each file
    notes = json.loads(Path(annotated(tmp_path / "c.json", BOXES)).read_text())
    notes["annotations"][1]["segmentation"] = {"size": [72, 96], "counts": [5]}  # of the last row
    (tmp_path / "c.json").write_text(json.dumps(notes))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").touch()
    written = []
    write = Folder.write
    monkeypatch.setattr(Folder, "write", lambda self, name, data: written.append(name) or write(self, name, data))

    assert run(["export", store.folder.url, "--regions", str(tmp_path / "c.json"), "--out", str(tmp_path / "out")]) == 2

    assert "turned.jpg, annotation 101: its segmentation is malformed" in capsys.readouterr().err
    assert written
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("flags", [[], ["--boxes"]])
def test_annotations_without_a_category_are_named(store, tmp_path, capsys, flags):
    notes = json.loads(Path(annotated(tmp_path / "c.json", BOXES)).read_text())
    del notes["categories"], notes["annotations"][1]["category_id"]
    (tmp_path / "c.json").write_text(json.dumps(notes))

    assert run(["export", store.folder.url, "--regions", str(tmp_path / "c.json"), "--out", str(tmp_path / "o"), *flags]) == 2

    assert "turned.jpg: an annotation has no field 'category_id'" in capsys.readouterr().err


def test_annotations_of_an_image_of_another_size_are_refused(store, tmp_path, capsys):
    notes = json.loads(Path(annotated(tmp_path / "c.json", BOXES)).read_text())
    notes["images"][0].update(width=200, height=100)
    (tmp_path / "c.json").write_text(json.dumps(notes))

    assert run(["export", store.folder.url, "--regions", str(tmp_path / "c.json"), "--out", str(tmp_path / "out")]) == 2

    assert "1 of 3 images have another image's row under their names" in capsys.readouterr().err


def test_flags_about_annotations_need_some(store, tmp_path, capsys):
    assert run(["export", store.folder.url, "--boxes", "--out", str(tmp_path / "out")]) == 2

    assert "name these with --regions" in capsys.readouterr().err
