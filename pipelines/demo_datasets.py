"""What the demo and the debug presets run on, without downloads: photographs that are already on the machine, and small drawn
data sets in the official layouts, from which there is nothing to learn."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from storage.datasets.labels import label_png

COLOURS = ((210, 60, 50), (60, 90, 220))


def scene(width: int, height: int, boxes: list[tuple[int, int, int, int]], seed: int) -> np.ndarray:
    """uint8 [height, width, 3]: a smooth gradient, a striped rectangle per box (x1, y1, x2, y2), mild noise."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([90 + 90 * x / width, 90 + 90 * y / height, np.full((height, width), 110.0)], axis=2)
    for (x1, y1, x2, y2), colour in zip(boxes, COLOURS, strict=False):
        stripes = 1 - 0.35 * ((x[y1:y2, x1:x2] - x1) * 4 // max(1, x2 - x1) % 2)
        image[y1:y2, x1:x2] = np.array(colour) * stripes[..., None]
    return (image + random.normal(0, 4, image.shape)).clip(0, 255).astype(np.uint8)


def write_demo(folder: str) -> None:
    """Write `SPair-71k`, `DAVIS`, `VOC2007`, `VOC2012` and `coco` into `folder`; the same bytes every time."""
    root = Path(folder)
    _write_spair(root / "SPair-71k")
    _write_davis(root / "DAVIS")
    _write_voc(root / "VOC2007")
    _write_masks(root / "VOC2012", root / "coco")


def _write_spair(root: Path) -> None:
    """Two categories of three images, four pairs each; key points are the corners of one rectangle."""
    for c, category in enumerate(("cat", "tvmonitor")):
        images = {}
        for i, (width, height) in enumerate(((80, 60), (64, 64), (54, 81))):
            box = (10 + 4 * i, 12 + 3 * c, 38 + 3 * i, 40 + 4 * i)
            name = f"2008_00{c}00{i}"
            images[name] = (width, height, box)
            _save(root / f"JPEGImages/{category}/{name}.jpg", _jpeg(scene(width, height, [box], 10 * c + i)))
            points = {str(k): point for k, point in enumerate(_corners(box))}
            note = {"filename": f"{name}.jpg", "category": category, "bndbox": box, "kps": points}
            note |= {"image_width": width, "image_height": height, "image_depth": 3}
            _save(root / f"ImageAnnotation/{category}/{name}.json", json.dumps(note).encode())
        names = list(images)
        for number, (source, target) in enumerate(((0, 1), (1, 2), (2, 0), (1, 0))):
            stem = f"{number:06d}-{names[source]}-{names[target]}:{category}"
            pair = {"filename": stem, "category": category, "kps_ids": ["0", "1", "2", "3"]}
            for prefix, name in (("src", names[source]), ("trg", names[target])):
                width, height, box = images[name]
                pair |= {f"{prefix}_imname": f"{name}.jpg", f"{prefix}_imsize": [width, height, 3]}
                pair |= {f"{prefix}_bndbox": box, f"{prefix}_kps": _corners(box)}
            _save(root / f"PairAnnotation/test/{stem}.json", json.dumps(pair).encode())


def _corners(box: tuple[int, int, int, int]) -> list[list[int]]:
    x1, y1, x2, y2 = box
    return [[x1, y1], [x2, y1], [x1, y2], [x2, y2]]


def _write_davis(root: Path) -> None:
    """One clip of six frames, in which two rectangles move."""
    for t in range(6):
        boxes = [(8 + 4 * t, 20, 40 + 4 * t, 52), (76, 6 + 2 * t, 98, 30 + 2 * t)]
        _save(root / f"JPEGImages/480p/blocks/{t:05d}.jpg", _jpeg(scene(107, 64, boxes, t)))
        _save(root / f"Annotations/480p/blocks/{t:05d}.png", label_png(_labels(107, 64, boxes)))
    _save(root / "ImageSets/2017/val.txt", b"blocks\n")


def _labels(width: int, height: int, boxes: list[tuple[int, int, int, int]]) -> np.ndarray:
    labels = np.zeros((height, width), np.uint8)
    for number, (x1, y1, x2, y2) in enumerate(boxes, 1):
        labels[y1:y2, x1:x2] = number
    return labels


def _write_voc(root: Path) -> None:
    """Three images with one or two objects."""
    within = root / "VOCdevkit/VOC2007"
    sizes = ((96, 64), (64, 96), (80, 80))
    for i, (width, height) in enumerate(sizes):
        boxes = [(10 + 5 * i, 12, 40 + 5 * i, 44), (2, 50, 20, 60)][: 1 + i % 2]
        objects = "".join(
            f"<object><name>cat</name><difficult>0</difficult><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin>"
            f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for x1, y1, x2, y2 in boxes
        )
        size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        _save(within / f"Annotations/{i:06d}.xml", f"<annotation>{size}{objects}</annotation>".encode())
        _save(within / f"JPEGImages/{i:06d}.jpg", _jpeg(scene(width, height, boxes, 50 + i)))
    _save(within / "ImageSets/Main/trainval.txt", "".join(f"{i:06d}\n" for i in range(len(sizes))).encode())


def _write_masks(voc: Path, coco: Path) -> None:
    """Six images to train on and four others, with rectangles of two classes: as VOC's masks, and as COCO's polygons."""
    within = voc / "VOCdevkit/VOC2012"
    for split, numbers in (("train", range(6)), ("val", range(6, 10))):
        images, notes = [], []
        for i in numbers:
            width, height = ((96, 72), (72, 96), (80, 80))[i % 3]
            boxes = [(6 + 3 * i, 8, 36 + 3 * i, 50), (4, 54, 30, 70)][: 1 + i % 2]
            for number, (x1, y1, x2, y2) in enumerate(boxes, 1):
                polygon = [x1, y1, x2, y1, x2, y2, x1, y2]
                note = {"id": 10 * i + number, "image_id": i, "category_id": number, "iscrowd": 0}
                note |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "segmentation": [polygon]}
                notes.append(note)
            photo = _jpeg(scene(width, height, boxes, 80 + i))
            _save(within / f"JPEGImages/{i:06d}.jpg", photo)
            _save(within / f"SegmentationClass/{i:06d}.png", label_png(_labels(width, height, boxes)))
            _save(coco / f"{split}2017/{i:012d}.jpg", photo)
            images.append({"id": i, "file_name": f"{i:012d}.jpg", "width": width, "height": height})
        categories = [{"id": number, "name": name} for number, name in ((1, "red"), (2, "blue"))]
        found = {"images": images, "annotations": notes, "categories": categories}
        _save(coco / f"annotations/instances_{split}2017.json", json.dumps(found).encode())
        listed = "".join(f"{i:06d}\n" for i in numbers)
        _save(within / f"ImageSets/Segmentation/{split}.txt", listed.encode())


def _jpeg(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=95)
    return data.getvalue()


def _save(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


PHOTOS = (
    "astronaut", "chelsea", "coffee", "rocket", "camera", "coins",
    "moon", "motorcycle_left", "grass", "gravel", "brick", "hubble_deep_field",
)  # fmt: skip
"""Photographs inside the scikit-image wheel."""


def write_photos(folder: str) -> None:
    """Write `photos-000.tar` and `photos-001.tar` into `folder`; the same bytes every time."""
    import skimage

    Path(folder).mkdir(parents=True, exist_ok=True)
    source = Path(skimage.__file__).parent / "data"
    for shard in (0, 1):
        path = Path(folder) / f"photos-{shard:03d}.tar"
        if path.exists():
            continue
        partial = path.with_suffix(".partial")
        with tarfile.open(partial, "w") as tar:
            for name in PHOTOS[shard::2]:
                file = next(p for p in source.glob(f"{name}.*") if p.suffix in (".png", ".jpg"))
                for member, data in ((f"{name}{file.suffix}", file.read_bytes()), (f"{name}.txt", name.encode())):
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        partial.rename(path)
