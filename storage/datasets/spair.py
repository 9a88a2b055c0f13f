"""SPair-71k: pairs of images of one category and the key points that both have.

`PairAnnotation/<split>/<number>-<source>-<target>:<category>.json`, `ImageAnnotation/<category>/<id>.json` and
`JPEGImages/<category>/<id>.jpg`; the splits are trn, val and test.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from storage.datasets.boxes import Box, Point, corner_box, require_inside, turned_boxes
from storage.datasets.files import DatasetError, Listed, RawObject, names_in, parsed, require_files, require_plain
from storage.datasets.images import EncodedImage, ImageFile
from storage.orientation import Orientation
from storage.paths import Folder


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two images of a category, and the key points that both have; x, y in pixels of the images."""

    name: str
    "of its file, without extension, the category after a colon"
    category: str
    source: EncodedImage
    target: EncodedImage
    source_xy: tuple[Point, ...]
    target_xy: tuple[Point, ...]
    box: Box
    "the target's: x1, y1, x2, y2"

    def turned(self, source: Orientation, target: Orientation) -> "Pair":
        """The pair of upright images; what is given turns the labels of each."""
        return replace(
            self,
            source=self.source.sized(source.upright_size),
            target=self.target.sized(target.upright_size),
            source_xy=_points(source.points(np.array(self.source_xy).reshape(-1, 2))),
            target_xy=_points(target.points(np.array(self.target_xy).reshape(-1, 2))),
            box=turned_boxes([self.box], target)[0],
        )


def load_spair(folder: Folder, split: str = "test", key_points: str = "pairs") -> Listed[Pair]:
    """The pairs of a split, sorted by name, each once.

    File names separate the category by a colon, or by an underscore where colons aren't allowed; a pair that is there in both
    spellings is one, and must say the same. `key_points`: of the `pairs`' own files (LiFT), or of the `images`' (ViT-Up: those
    that both images have, whatever the pair file says). Raises `DatasetError`.
    """
    root = f"PairAnnotation/{split}"
    names = names_in(folder, root, ("json",))
    files = folder.read_many([f"{root}/{name}" for name in names])
    found: dict[str, Pair] = {}
    for name, data in zip(names, files, strict=True):
        pair = parsed(folder, f"{root}/{name}", data, partial(_pair, folder, name.removesuffix(".json")))
        if found.setdefault(pair.name, pair) != pair:
            raise DatasetError(
                f"{folder.displayed}/{root} has the pair {pair.name} in both spellings, with a colon and with an underscore, and "
                "they say different things; remove the one that isn't SPair-71k's"
            )
    pairs = [found[name] for name in sorted(found)]
    require_files(folder, (file for pair in pairs for file in _files(pair)))
    return Listed.first(_with_image_points(folder, pairs) if key_points == "images" else pairs, None)


def _pair(folder: Folder, stem: str, data: RawObject) -> Pair:
    category = str(data["category"])
    canonical = re.sub(rf"[:_]{re.escape(category)}$", f":{category}", stem)
    source_xy, target_xy = (_points(data[name]) for name in ("src_kps", "trg_kps"))
    if len(source_xy) != len(target_xy):
        raise ValueError(f"{len(source_xy)} key points in the source, {len(target_xy)} in the target")
    source, target = (_spair_image(folder, category, data[f"{side}_imname"], data[f"{side}_imsize"]) for side in ("src", "trg"))
    for image, points in ((source, source_xy), (target, target_xy)):
        require_inside(points, image.width, image.height, f"a key point of {image.name}")
    box = corner_box(data["trg_bndbox"], target.width, target.height)
    images = {"source": source, "target": target}
    return Pair(name=canonical, category=category, **images, source_xy=source_xy, target_xy=target_xy, box=box)


def _spair_image(folder: Folder, category: str, name: str, size: Sequence[int]) -> ImageFile:
    for part in (category, name):
        require_plain(part, f"{folder.displayed}: a pair")
    return ImageFile.at(folder, f"JPEGImages/{category}/{name}", int(size[0]), int(size[1]))


def _points(values: Iterable[Sequence[float]]) -> tuple[Point, ...]:
    points = tuple((float(x), float(y)) for x, y in values)
    if not np.isfinite(np.array(points)).all():
        raise ValueError(f"key points hold NaN or infinity: {points}")
    return points


def _with_image_points(folder: Folder, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with the key points and boxes of their images' annotations."""
    sizes = {_annotation(image): (image.width, image.height) for pair in pairs for image in _files(pair)}
    names = sorted(sizes)
    try:
        files = folder.read_many(names)
    except FileNotFoundError as error:
        raise DatasetError(f"{error}; the key points of images (ViT-Up) need it, those of pairs don't") from None
    found = {
        name: parsed(folder, name, data, partial(_image_points, *sizes[name])) for name, data in zip(names, files, strict=True)
    }
    out = []
    for pair in pairs:
        (source, _), (target, box) = (found[_annotation(image)] for image in _files(pair))
        both = [key for key in source if key in target]
        source_xy, target_xy = (tuple(points[key] for key in both) for points in (source, target))
        out.append(replace(pair, source_xy=source_xy, target_xy=target_xy, box=box))
    return out


def _files(pair: Pair) -> list[ImageFile]:
    """Source and target, which lie in files here."""
    return [image for image in (pair.source, pair.target) if isinstance(image, ImageFile)]


def _annotation(image: ImageFile) -> str:
    return image.name.replace("JPEGImages/", "ImageAnnotation/", 1).rsplit(".", 1)[0] + ".json"


def _image_points(width: int, height: int, data: RawObject) -> tuple[dict[str, Point], Box]:
    """Key points by id, those that the image has, and its box; `width` and `height` are what pairs say of the image."""
    says = data.get("image_width", width), data.get("image_height", height)
    if says != (width, height):
        raise ValueError(f"the image is {says[0]} x {says[1]} here, and {width} x {height} in its pairs")
    there = {key: _points([point])[0] for key, point in data["kps"].items() if point is not None}
    require_inside(there.values(), width, height, "a key point")
    return there, corner_box(data["bndbox"], width, height)
