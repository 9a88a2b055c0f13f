"""Labelled data sets in their official layouts, as lists of small records: SPair-71k, DAVIS-2017, VOC, COCO20k, plain images.

Everything is read through `storage.paths.Folder`, so that a path and any fsspec URL work. What is missing or malformed ends
in a `DatasetError` that names the file. Nothing is evaluated here. Layouts: specs/evaluation.md sections 1.3, 2.3, 3.2.
"""

import hashlib
import json
import posixpath
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, Protocol

import numpy as np
from PIL import Image

from storage.datasets.coco import CocoImage, coco_corners, read_coco
from storage.datasets.pictures import Box, DatasetError, ImageFile, Point, decoded, parsed, read, require_inside
from storage.inputs import IMAGE_EXTENSIONS, expand_inputs
from storage.left_out import log_left_out
from storage.orientation import Orientation
from storage.paths import Folder


def read_labels(folder: Folder, name: str) -> np.ndarray:
    """A label image's indices, uint8 [H, W]; palettes are not turned into colours. Raises `DatasetError`."""

    def indices(image: Image.Image) -> Image.Image:
        if image.mode not in ("P", "L"):
            raise DatasetError(
                f"{folder.shown}/{name} is a {image.mode} image; labels are 8-bit indices, with a palette (P) or grey (L)"
            )
        image.load()
        return image

    return np.array(decoded(read(folder, name), f"{folder.shown}/{name}", indices))


def digest(records: Iterable[Any]) -> str:
    """sha256 of what the records say, wherever they lie."""
    found = hashlib.sha256()
    for record in records:
        found.update(json.dumps(_without_folders(record), sort_keys=True).encode())
    return found.hexdigest()


def _without_folders(value: Any) -> Any:
    if hasattr(value, "told"):
        return _without_folders(value.told())
    if is_dataclass(value) and not isinstance(value, type):
        return {name: _without_folders(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {name: _without_folders(each) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return [_without_folders(each) for each in value]
    return value


def names_in(folder: Folder, name: str, extensions: Sequence[str]) -> list[str]:
    """Sorted names of the files of these types in a folder. Raises `DatasetError` if there is none."""
    names = sorted(each for each in folder.sizes(name) if each.rsplit(".", 1)[-1].lower() in extensions)
    if not names:
        raise DatasetError(f"{folder.shown}/{name} is missing, or holds no {' or '.join(extensions)}; check --data")
    return names


def require_plain(name: str, where: str) -> None:
    """Raises `DatasetError` for a name that would lead elsewhere as part of a path."""
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise DatasetError(f"{where} names {name!r}, which is no plain name")


def lines(folder: Folder, name: str) -> list[str]:
    """First words of a text file's lines."""
    try:
        text = read(folder, name).decode()
    except UnicodeDecodeError as error:
        raise DatasetError(f"{folder.shown}/{name} is no text: {error}") from None
    found = [line.split()[0] for line in text.splitlines() if line.strip()]
    if not found:
        raise DatasetError(f"{folder.shown}/{name} lists nothing")
    return found


class _Located(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def shown(self) -> str: ...


def require_images(folder: Folder, images: Iterable[_Located], why: str = "but an annotation names it") -> None:
    """Raises `DatasetError` naming the first file that isn't there; one listing per folder, nothing is read."""
    listed: dict[str, set[str]] = {}
    for image in images:
        parent, name = posixpath.split(image.name)
        if parent not in listed:
            listed[parent] = set(folder.sizes(parent))
        if name not in listed[parent]:
            raise DatasetError(f"{image.shown} is missing, {why}")


# --- SPair-71k --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two images of a category, and the key points that both have; x, y in pixels of the images."""

    name: str
    "of its file, without extension, the category after a colon"
    category: str
    source: ImageFile
    target: ImageFile
    source_xy: tuple[Point, ...]
    target_xy: tuple[Point, ...]
    box: Box
    "the target's: x1, y1, x2, y2"

    def turned(self, source: Orientation, target: Orientation) -> "Pair":
        """The pair of upright images; what is given turns the labels of each."""
        return replace(
            self,
            source=_of_size(self.source, source.upright_size),
            target=_of_size(self.target, target.upright_size),
            source_xy=_points(source.points(np.array(self.source_xy).reshape(-1, 2))),
            target_xy=_points(target.points(np.array(self.target_xy).reshape(-1, 2))),
            box=tuple(target.boxes(np.array([self.box]))[0].tolist()),
        )


def _of_size(image: ImageFile, size: tuple[int, int]) -> ImageFile:
    return replace(image, width=size[0], height=size[1])


def load_spair(folder: Folder, split: str = "test", key_points: str = "pairs") -> list[Pair]:
    """The pairs of a split, sorted by name, each once.

    File names separate the category by a colon, or by an underscore where colons aren't allowed; where a pair is there in
    both spellings, it is one. `key_points`: of the `pairs`' own files (LiFT), or of the `images`' (ViT-Up: those that both
    images have, whatever the pair file says). Raises `DatasetError`.
    """
    root = f"PairAnnotation/{split}"
    names = names_in(folder, root, ("json",))
    files = folder.read_many([f"{root}/{name}" for name in names])
    found = {}
    for name, data in zip(names, files, strict=True):
        pair = parsed(folder, f"{root}/{name}", data, lambda d, name=name: _pair(folder, name.removesuffix(".json"), d))
        found.setdefault(pair.name, pair)
    pairs = [found[name] for name in sorted(found)]
    require_images(folder, (image for pair in pairs for image in (pair.source, pair.target)))
    return _with_image_points(folder, pairs) if key_points == "images" else pairs


def _pair(folder: Folder, stem: str, data: Mapping[str, Any]) -> Pair:
    category = str(data["category"])
    canonical = re.sub(rf"[:_]{re.escape(category)}$", f":{category}", stem)
    source_xy, target_xy = (_points(data[name]) for name in ("src_kps", "trg_kps"))
    if len(source_xy) != len(target_xy):
        raise ValueError(f"{len(source_xy)} key points in the source, {len(target_xy)} in the target")
    source, target = (
        _spair_image(folder, category, data[f"{side}_imname"], data[f"{side}_imsize"]) for side in ("src", "trg")
    )
    require_inside(source_xy, source.width, source.height, f"a key point of {source.name}")
    require_inside(target_xy, target.width, target.height, f"a key point of {target.name}")
    return Pair(
        name=canonical,
        category=category,
        source=source,
        target=target,
        source_xy=source_xy,
        target_xy=target_xy,
        box=_box(data["trg_bndbox"], target.width, target.height),
    )


def _spair_image(folder: Folder, category: str, name: str, size: Sequence[int]) -> ImageFile:
    for part in (category, name):
        require_plain(part, f"{folder.shown}: a pair")
    stem = name.rsplit(".", 1)[0]
    keys = (f"JPEGImages/{category}/{stem}", f"{category}/{stem}", stem)
    return ImageFile(
        folder=folder, name=f"JPEGImages/{category}/{name}", keys=keys, width=int(size[0]), height=int(size[1])
    )


def _points(values: Iterable[Sequence[float]]) -> tuple[Point, ...]:
    points = tuple((float(x), float(y)) for x, y in values)
    if not np.isfinite(np.array(points)).all():
        raise ValueError(f"key points hold NaN or infinity: {points}")
    return points


def _box(values: Sequence[float], width: int, height: int) -> Box:
    """x1, y1, x2, y2, as VOC and SPair-71k have them. Raises `ValueError` for what can't be the corners of a box."""
    x1, y1, x2, y2 = (float(value) for value in values)
    if x1 > x2 or y1 > y2:
        raise ValueError(
            f"the box {list(values)} ends before it begins; it should be x1, y1, x2, y2, not a width and a height"
        )
    if x1 == x2 and y1 == y2:
        raise ValueError(f"the box {list(values)} has no extent")
    require_inside([(x1, y1), (x2, y2)], width, height, f"the box {list(values)}")
    return x1, y1, x2, y2


def _with_image_points(folder: Folder, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with the key points and boxes of their images' annotations."""
    names = sorted({_annotation(image) for pair in pairs for image in (pair.source, pair.target)})
    try:
        files = folder.read_many(names)
    except FileNotFoundError as error:
        raise DatasetError(f"{error}; the key points of images (ViT-Up) need it, those of pairs don't") from None
    sizes = {_annotation(image): (image.width, image.height) for pair in pairs for image in (pair.source, pair.target)}
    found = {
        name: parsed(folder, name, data, lambda d, name=name: _image_points(d, *sizes[name]))
        for name, data in zip(names, files, strict=True)
    }
    out = []
    for pair in pairs:
        source, (target, box) = found[_annotation(pair.source)][0], found[_annotation(pair.target)]
        both = [key for key in source if key in target]
        points = {"source_xy": tuple(source[key] for key in both), "target_xy": tuple(target[key] for key in both)}
        out.append(
            Pair(name=pair.name, category=pair.category, source=pair.source, target=pair.target, box=box, **points)
        )
    return out


def _annotation(image: ImageFile) -> str:
    return image.name.replace("JPEGImages/", "ImageAnnotation/", 1).rsplit(".", 1)[0] + ".json"


def _image_points(data: Mapping[str, Any], width: int, height: int) -> tuple[dict[str, Point], Box]:
    """Key points by id, those that the image has, and its box; `width` and `height` are what pairs say of the image."""
    says = data.get("image_width", width), data.get("image_height", height)
    if says != (width, height):
        raise ValueError(f"the image is {says[0]} x {says[1]} here, and {width} x {height} in its pairs")
    there = {key: _points([point])[0] for key, point in data["kps"].items() if point is not None}
    require_inside(there.values(), width, height, "a key point")
    return there, _box(data["bndbox"], width, height)


# --- DAVIS ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A video: its frames, and the label image of each."""

    name: str
    frames: tuple[ImageFile, ...]
    masks: tuple[str, ...]
    "paths inside the frames' folder"


def load_davis(folder: Folder, split: str = "val", resolution: str = "480p", step: int = 1) -> list[Clip]:
    """The clips of `ImageSets/2017/<split>.txt`, every `step`-th frame. Raises `DatasetError`, also where a mask is missing."""
    clips = []
    for name in dict.fromkeys(lines(folder, f"ImageSets/2017/{split}.txt")):
        require_plain(name, f"{folder.shown}/ImageSets/2017/{split}.txt")
        frames = names_in(folder, f"JPEGImages/{resolution}/{name}", ("jpg", "jpeg"))
        masks = set(folder.sizes(f"Annotations/{resolution}/{name}"))
        stems = [frame.rsplit(".", 1)[0] for frame in frames][::step]
        for stem in stems:
            if f"{stem}.png" not in masks:
                raise DatasetError(
                    f"{folder.shown}/Annotations/{resolution}/{name}/{stem}.png is missing, but its frame is not"
                )
        images = tuple(
            ImageFile(
                folder=folder,
                name=f"JPEGImages/{resolution}/{name}/{frame}",
                keys=tuple(f"{head}{name}/{stem}" for head in (f"JPEGImages/{resolution}/", f"{resolution}/", "")),
            )
            for frame, stem in zip(frames[::step], stems, strict=True)
        )
        clips.append(
            Clip(name=name, frames=images, masks=tuple(f"Annotations/{resolution}/{name}/{stem}.png" for stem in stems))
        )
    return clips


# --- object discovery -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BoxedImage:
    """An image with the boxes of its objects: x1, y1, x2, y2 in pixels, x2 and y2 exclusive."""

    image: ImageFile
    boxes: tuple[Box, ...]

    def turned(self, by: Orientation) -> "BoxedImage":
        """The upright image with its boxes."""
        boxes = by.boxes(np.array(self.boxes).reshape(-1, 4)).tolist()
        return BoxedImage(image=_of_size(self.image, by.upright_size), boxes=tuple(tuple(box) for box in boxes))

    @property
    def image_size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.image.width, self.image.height


def load_voc(folder: Folder, year: str, split: str = "trainval") -> list[BoxedImage]:
    """A VOC detection split. The folder may be the one above VOCdevkit (TokenCut's, with or without VOC<year>/), VOCdevkit
    itself, or the year's. Difficult and truncated objects count, as in TokenCut's. Raises `DatasetError`."""
    listed = f"ImageSets/Main/{split}.txt"
    root = voc_root(folder, year, listed)
    # Lists of single classes have -1 in a second column; the ids are what is wanted.
    ids = list(dict.fromkeys(lines(folder, root + listed)))
    names = [f"{root}Annotations/{each}.xml" for each in ids]
    try:
        files = folder.read_many(names)
    except FileNotFoundError as error:
        raise DatasetError(f"{error}, but {listed} lists it") from None
    found = []
    for each, name, data in zip(ids, names, files, strict=True):
        width, height, boxes = _voc_objects(f"{folder.shown}/{name}", data)
        path, keys = f"{root}JPEGImages/{each}.jpg", (f"{root}JPEGImages/{each}", f"JPEGImages/{each}", each)
        found.append(
            BoxedImage(image=ImageFile(folder=folder, name=path, keys=keys, width=width, height=height), boxes=boxes)
        )
    require_images(folder, (each.image for each in found))
    return found


def voc_root(folder: Folder, year: str, listed: str) -> str:
    """Where a VOC year with the file `listed` begins inside the folder: "" or a path that ends in /. Raises `DatasetError`."""
    places = [f"VOC{year}/VOCdevkit/VOC{year}", f"VOCdevkit/VOC{year}", f"VOC{year}", ""]
    root = next(
        (f"{place}/" if place else "" for place in places if folder.exists(f"{place}/{listed}".lstrip("/"))), None
    )
    if root is None:
        raise DatasetError(
            f"{folder.shown} has no VOCdevkit/VOC{year}/{listed}, nor VOC{year}/VOCdevkit/...; check --data"
        )
    return root


def _voc_objects(shown: str, data: bytes) -> tuple[int, int, tuple[Box, ...]]:
    """Width, height and boxes of an XML annotation; boxes are 1-based and inclusive there."""
    try:
        if b"<!ENTITY" in data:
            raise DatasetError(f"{shown} declares entities, which annotations have no use for; it is not read")
        root = ET.fromstring(data)
        width, height = _number(root, "size/width"), _number(root, "size/height")
        return width, height, tuple(_voc_box(each, width, height) for each in root.iter("object"))
    except (ET.ParseError, ValueError) as error:
        raise DatasetError(f"{shown} is malformed: {error}") from None


def _voc_box(node: ET.Element, width: int, height: int) -> Box:
    names = ("xmin", "ymin", "xmax", "ymax")
    x1, y1, x2, y2 = (_number(node, f"bndbox/{name}") for name in names)
    return _box((x1 - 1, y1 - 1, x2, y2), width, height)


def _number(node: ET.Element, path: str) -> int:
    text = node.findtext(path)
    if text is None:
        raise ValueError(f"<{node.tag}> has no <{path}>")
    return round(float(text))


COCO_ANNOTATIONS = (
    "instances_train2014_sel20k.json",
    "annotations/instances_train2014_sel20k.json",
    "COCO/annotations/instances_train2014.json",
    "annotations/instances_train2014.json",
)
"""Where COCO20k's boxes may be; the first that is there. Images are found by name in any of them, not by position."""

COCO_IMAGES = ("COCO/images/train2014", "images/train2014", "train2014", "COCO/train2014")


def load_coco20k(folder: Folder) -> list[BoxedImage]:
    """The images of coco_20k_filenames.txt, in its order, with their boxes; crowds don't count. Raises `DatasetError`."""
    wanted = [posixpath.basename(line) for line in lines(folder, "coco_20k_filenames.txt")]
    where = next((name for name in COCO_ANNOTATIONS if folder.exists(name)), None)
    if where is None:
        raise DatasetError(f"{folder.shown} has none of {', '.join(COCO_ANNOTATIONS)}; check --data")
    images = {each.file_name: each for each in read_coco(folder, where)}
    place = next((name for name in COCO_IMAGES if f"{wanted[0]}" in folder.sizes(name)), None)
    if place is None:
        raise DatasetError(f"{folder.shown} has no {wanted[0]} in any of {', '.join(COCO_IMAGES)}; check --data")
    found = []
    for name in dict.fromkeys(wanted):
        if name not in images:
            raise DatasetError(f"{folder.shown}/{where} has no image {name}, but coco_20k_filenames.txt lists it")
        noted, stem = images[name], name.rsplit(".", 1)[0]
        keys = (f"{place}/{stem}", f"train2014/{stem}", stem)
        image = ImageFile(folder=folder, name=f"{place}/{name}", keys=keys, width=noted.width, height=noted.height)
        found.append(BoxedImage(image=image, boxes=_rounded_boxes(f"{folder.shown}/{where}: {name}", noted)))
    require_images(folder, (each.image for each in found))
    return found


def _rounded_boxes(shown: str, image: CocoImage) -> tuple[Box, ...]:
    """Corners on whole pixels, as TokenCut has them."""
    objects = [each for each in image.objects if not each.get("iscrowd")]
    try:
        boxes = [coco_corners(each, image.width, image.height) for each in objects]
    except (KeyError, ValueError, TypeError) as error:
        raise DatasetError(f"{shown}: an annotation is malformed: {error}") from None
    return tuple(tuple(float(round(value)) for value in box) for box in boxes)


# --- plain images -----------------------------------------------------------------------------------------------------


def load_images(url: str, options: Mapping[str, Any] | None = None) -> list[ImageFile]:
    """The images of a folder and those below it, sorted; of a data set in SPair's layout, those in JPEGImages.

    Raises `DatasetError`, `InputError`.
    """
    folder = Folder(url, options)
    if folder.folders("JPEGImages") or folder.sizes("JPEGImages"):
        folder = Folder(f"{folder.url}/JPEGImages", options)
    files = expand_inputs([folder.url], options)
    log_left_out(files.left_out)
    if not all(file.is_image for file in files):
        raise DatasetError(f"{folder.shown} holds tars; give a folder of images ({', '.join(IMAGE_EXTENSIONS)})")
    return [_plain_image(folder, file.url[len(file.base) :].lstrip("/")) for file in files]


def _plain_image(folder: Folder, name: str) -> ImageFile:
    stem = name.rsplit(".", 1)[0]
    return ImageFile(
        folder=folder, name=name, keys=tuple(dict.fromkeys((f"JPEGImages/{stem}", stem, posixpath.basename(stem))))
    )
