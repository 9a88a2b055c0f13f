"""COCO: boxes of its 20k subset (object discovery), COCO-Stuff's class masks, and instances.

Annotation files are checked as a whole. Ids tie annotations to images, so that an id which is there twice gives an image
another one's objects; COCO's own tools keep the last of both and say nothing. Here it is an error.
"""

import posixpath
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

from storage.datasets.boxes import Box, BoxedImage, as_number, coco_box
from storage.datasets.files import (
    DatasetError,
    Listed,
    RawObject,
    each_once,
    lines,
    listed_names,
    parsed,
    read,
    require_files,
    require_plain,
)
from storage.datasets.images import ImageFile
from storage.datasets.instances import Instances, has_area, has_mask
from storage.datasets.labels import LabelledImage
from storage.datasets.pairing import joined, masked_images, pairs_of_stems, require_place
from storage.paths import Folder

K = TypeVar("K")
V = TypeVar("V")

COCO20K_ANNOTATIONS = (
    "instances_train2014_sel20k.json",
    "annotations/instances_train2014_sel20k.json",
    "COCO/annotations/instances_train2014.json",
    "annotations/instances_train2014.json",
)
"""Where COCO20k's boxes may be; the first that is there. Images are found by name in any of them, not by position."""

COCO20K_IMAGES = ("COCO/images/train2014", "images/train2014", "train2014", "COCO/train2014")


# --- instances and boxes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CocoSet:
    """A split of COCO's instances, for those who need its categories and ids as well."""

    images: Listed[LabelledImage]
    numbers: tuple[int, ...]
    "the images' ids, in their order"
    categories: Mapping[int, str]
    "names by id, ascending; where the file lists none, those of its annotations, named by their ids"
    without_mask: int
    "annotations of these images that have a box alone"
    without_area: int
    "objects of these images whose masks cover no pixel"


def load_coco_instances(folder: Folder, split: str, limit: int | None = None) -> Listed[LabelledImage]:
    """COCO's images of `annotations/instances_<split>.json` by id, those without objects included, and crowds.

    The folder may be the one above `coco`. The whole JSON is read: train2017's takes gigabytes meanwhile. Raises `DatasetError`.
    """
    return load_coco(folder, split, limit).images


def load_coco(folder: Folder, split: str, limit: int | None = None, *, boxes_alone: bool = False) -> CocoSet:
    """As `load_coco_instances`, with categories and ids. `boxes_alone`: annotations may lack masks. Raises `DatasetError`."""
    require_plain(split, "the split")
    notes = f"annotations/instances_{split}.json"
    root = require_place(folder, ("", "coco"), notes)
    place = require_place(folder, [joined(root, inside, split) for inside in ("", "images")])
    where, files, found = joined(root, notes), [], []
    annotated = read_annotations(folder, where)
    listed = Listed.first(annotated.images, limit)
    for each in listed:
        require_plain(each.file_name, f"{folder.displayed}/{where}")
        files.append(ImageFile.at(folder, f"{place}/{each.file_name}", each.width, each.height))
        found.append(LabelledImage(image=files[-1], label=instances_of(folder, where, each, boxes_alone=boxes_alone)))
    require_files(folder, files)
    return CocoSet(
        images=Listed(tuple(found), listed.of),
        numbers=tuple(each.number for each in listed),
        categories=annotated.categories,
        without_mask=sum(not has_mask(note) for each in listed for note in each.objects),
        without_area=sum(not (note.get("iscrowd") or has_area(note)) for each in listed for note in each.objects),
    )


def load_coco20k(folder: Folder) -> list[BoxedImage]:
    """The images of coco_20k_filenames.txt, in its order, with their boxes; crowds don't count. Raises `DatasetError`."""
    listed = [posixpath.basename(line) for line in lines(folder, "coco_20k_filenames.txt")]
    wanted = each_once(f"{folder.displayed}/coco_20k_filenames.txt", listed)
    where = next((name for name in COCO20K_ANNOTATIONS if folder.exists(name)), None)
    if where is None:
        raise DatasetError(f"{folder.displayed} has none of {', '.join(COCO20K_ANNOTATIONS)}; check --data")
    images = {each.file_name: each for each in read_coco(folder, where)}
    place = require_place(folder, COCO20K_IMAGES, wanted[0])
    found = []
    for name in wanted:
        if name not in images:
            raise DatasetError(f"{folder.displayed}/{where} has no image {name}, but coco_20k_filenames.txt lists it")
        image = ImageFile.at(folder, f"{place}/{name}", images[name].width, images[name].height)
        found.append(BoxedImage(image=image, boxes=_rounded_boxes(folder, where, images[name])))
    require_files(folder, (each.image for each in found))
    return found


def instances_of(folder: Folder, where: str, image: "CocoImage", *, boxes_alone: bool = False) -> Instances:
    """The objects of an image of the annotation file `where`. Raises `DatasetError`."""
    with annotation_errors(folder, where, image) as displayed:
        return Instances.pack(image.objects, displayed, image.width, image.height, boxes_alone=boxes_alone)


def _rounded_boxes(folder: Folder, where: str, image: "CocoImage") -> tuple[Box, ...]:
    """Corners on whole pixels, as TokenCut has them."""
    objects = [each for each in image.objects if not each.get("iscrowd")]
    with annotation_errors(folder, where, image):
        boxes = [coco_box(each, image.width, image.height) for each in objects]
    return tuple((float(round(x1)), float(round(y1)), float(round(x2)), float(round(y2))) for x1, y1, x2, y2 in boxes)


@contextmanager
def annotation_errors(folder: Folder, where: str, image: "CocoImage") -> Iterator[str]:
    """Gives the name of file and image for messages; what is wrong with an annotation within becomes a `DatasetError`."""
    displayed = f"{folder.displayed}/{where}: {image.file_name}"
    try:
        yield displayed
    except KeyError as error:
        raise DatasetError(f"{displayed}: an annotation has no field {error}") from None
    except (ValueError, TypeError) as error:
        raise DatasetError(f"{displayed}: an annotation is malformed: {error}") from None


# --- COCO-Stuff -------------------------------------------------------------------------------------------------------


def load_coco_stuff(
    folder: Folder,
    split: str,
    limit: int | None = None,
    layout: Literal["vit_up", "deap"] = "vit_up",
    groups: Literal["coarse", "fine"] = "coarse",
) -> Listed[LabelledImage]:
    """COCO-Stuff's 182 classes or their 27 groups, split `train2017` or `val2017`.

    `vit_up`: the images of `curated/<split>/Coco164kFull_Stuff_Coarse.txt`, which are fewer than the folder's. `deap`: every
    PNG of `<any>/trainval2017/<split>` (or of `annotations/<split>`), sorted. The folder may be the one above.

    Raises `DatasetError`.
    """
    require_plain(split, "the split")
    table = "coco_stuff27" if groups == "coarse" else "coco_stuff"
    pairs = (_curated_stuff if layout == "vit_up" else _all_stuff)(folder, split)
    return masked_images(folder, pairs, table, limit)


def _curated_stuff(folder: Folder, split: str) -> list[tuple[str, str]]:
    listed = f"curated/{split}/Coco164kFull_Stuff_Coarse.txt"
    root = require_place(folder, ("", "COCOStuff"), listed)
    inside = joined(root, "dataset")
    return [
        (f"{inside}/images/{split}/{each}.jpg", f"{inside}/annotations/{split}/{each}.png")
        for each in listed_names(folder, joined(root, listed))
    ]


def _all_stuff(folder: Folder, split: str) -> list[tuple[str, str]]:
    places = ["trainval2017", *(f"{name}/trainval2017" for name in folder.folders(""))]
    places += ["annotations", "dataset/annotations", "stuffthingmaps"]
    labels = require_place(folder, [f"{place}/{split}" for place in places])
    images = require_place(folder, [joined(place, split) for place in ("coco", "images", "dataset/images", "", "coco/images")])
    return pairs_of_stems(folder, images, labels)


# --- annotation files -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CocoImage:
    """An image of COCO's annotations, and its objects in the file's order."""

    number: int
    file_name: str
    width: int
    height: int
    objects: list[RawObject]


@dataclass(frozen=True, kw_only=True)
class CocoAnnotations:
    """What an annotation file holds."""

    images: list[CocoImage]
    "by id"
    categories: Mapping[int, str]
    "names by id, ascending"


def read_annotations(folder: Folder, name: str) -> CocoAnnotations:
    """A file of annotations. Raises `DatasetError`: also for ids and file names that are there twice, and for annotations of
    images or categories that aren't."""
    return parsed(folder, name, read(folder, name), _annotations)


def read_coco(folder: Folder, name: str) -> list[CocoImage]:
    """A file's images, by id. Raises as `read_annotations`."""
    return read_annotations(folder, name).images


def _annotations(data: RawObject) -> CocoAnnotations:
    images = [_coco_image(each) for each in _entries(data, "images")]
    by_id = _unique({}, ((each.number, each) for each in images), "image id", lambda each: each.file_name)
    _unique({}, ((each.file_name, each) for each in images), "file name", lambda each: f"image {each.number}")
    categories: dict[int, str] = {}
    named = (
        (_id(each["id"], "category id"), str(each.get("name")))
        for each in _entries({**data, "categories": data.get("categories") or []}, "categories")
    )
    _give_objects(by_id, _unique(categories, named, "category id", str), _entries(data, "annotations"))
    if not categories:
        # Boxes alone may have none.
        given = (note["category_id"] for each in images for note in each.objects if "category_id" in note)
        categories = {number: str(number) for number in given}
    return CocoAnnotations(
        images=[by_id[number] for number in sorted(by_id)],
        categories={number: categories[number] for number in sorted(categories)},
    )


def _entries(data: RawObject, name: str) -> Sequence[RawObject]:
    """A list of a file's objects. Raises `KeyError`, or `ValueError` where it is none."""
    if not isinstance(data, Mapping):
        raise ValueError("it is no object with images, annotations and categories")
    found = data[name]
    if not isinstance(found, list) or not all(isinstance(each, Mapping) for each in found):
        raise ValueError(f"its {name} are no list of objects")
    return found


_LARGEST_SIDE = 2**20
"""Of an image, in pixels; far more than JPEG can hold."""


def _coco_image(entry: RawObject) -> CocoImage:
    number, name = _id(entry["id"], "image id"), entry["file_name"]
    width, height = (as_number(entry[side]) for side in ("width", "height"))
    if not (0 < width < _LARGEST_SIDE and 0 < height < _LARGEST_SIDE):
        raise ValueError(f"image {number} is {entry['width']} x {entry['height']} pixels")
    # JSON can spell halves of characters, which no file name has.
    if not isinstance(name, str) or not name or any("\ud800" <= character <= "\udfff" for character in name):
        raise ValueError(f"the file name of image {number} is {textwrap.shorten(repr(name), 80)}")
    return CocoImage(number=number, file_name=name, width=int(width), height=int(height), objects=[])


def _unique(found: dict[K, V], pairs: Iterable[tuple[K, V]], what: str, name: Callable[[V], str]) -> dict[K, V]:
    """The pairs added to `found`. Raises `ValueError` for a key that is there twice, with what both are of."""
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the {what} {key!r} is there twice, for {name(found[key])} and for {name(value)}")
        found[key] = value
    return found


def _id(value: object, what: str) -> int:
    """An id as the format has it; text of digits, as some converters write it, is the same number."""
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value):
        return int(value)
    # NaN, infinity and what no 64 bits hold are no ids, either.
    is_id = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63 and value == int(value)
    if not is_id:
        raise ValueError(f"the {what} {textwrap.shorten(repr(value), 40)} is no whole number; number them, as COCO does")
    return int(value)  # type: ignore[call-overload]


def _give_objects(images: Mapping[int, CocoImage], kinds: Mapping[int, str], notes: Iterable[RawObject]) -> None:
    """Adds annotations to their images; ids and categories are held against each other where the file has them."""
    seen: dict[int, str] = {}
    for given in notes:
        what = f"annotation {given.get('id', '')}"
        ids = {name: _id(given[name], f"{name} of {what}") for name in ("id", "image_id", "category_id") if name in given}
        # Copied only where it says something else: there are millions.
        note = given if all(given[name] is value for name, value in ids.items()) else {**given, **ids}
        image = images.get(note["image_id"])
        if image is None:
            raise ValueError(f"{what} is of image {note['image_id']}, which isn't among the images")
        if kinds and note["category_id"] not in kinds:
            raise ValueError(f"{what} has the category {note['category_id']}, which isn't among the categories")
        if "id" in note:
            _unique(seen, [(note["id"], image.file_name)], "annotation id", str)
        image.objects.append(note)
