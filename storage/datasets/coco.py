"""COCO's annotation files: every image with its objects, checked as a whole.

Ids tie annotations to images, so that an id which is there twice gives an image another one's objects; COCO's own tools keep
the last of both and say nothing. Here it is an error.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from storage.datasets.pictures import Box, parsed, read, require_inside
from storage.paths import Folder

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, kw_only=True)
class CocoImage:
    """An image of COCO's annotations, and its objects in the file's order."""

    number: int
    file_name: str
    width: int
    height: int
    objects: list[Mapping[str, Any]]


def read_coco(folder: Folder, name: str) -> list[CocoImage]:
    """A file's images, by id. Raises `DatasetError`: also for ids and file names that are there twice, and for annotations of
    images or categories that aren't."""
    return parsed(folder, name, read(folder, name), _images)


def coco_corners(note: Mapping[str, Any], width: int, height: int) -> Box:
    """x1, y1, x2, y2 of the box of an annotation of a `width` x `height` image; it may be empty, as some of COCO's are.

    Raises `KeyError`, or `ValueError` where it can't be x, y, width, height of a box inside the image.
    """
    numbers = [float(value) for value in note["bbox"]]
    what = f"annotation {note.get('id', '')} has the box {note['bbox']}"
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        raise ValueError(what)
    x, y, across, down = numbers
    if across < 0 or down < 0:
        raise ValueError(f"{what}, with a negative extent; it should be x, y, width, height")
    corners = (x, y, x + across, y + down)
    require_inside([corners[:2], corners[2:]], width, height, f"{what}; as x, y, width, height it")
    return corners


def _images(data: Mapping[str, Any]) -> list[CocoImage]:
    images = [_image(each) for each in data["images"]]
    by_id = _unique({}, ((each.number, each) for each in images), "image id", lambda each: each.file_name)
    _unique({}, ((each.file_name, each) for each in images), "file name", lambda each: f"image {each.number}")
    categories: dict[Any, str] = {}
    _unique(
        categories, ((each["id"], str(each.get("name"))) for each in data.get("categories") or ()), "category id", str
    )
    _give_objects(by_id, categories, data["annotations"])
    return [by_id[number] for number in sorted(by_id)]


def _image(entry: Mapping[str, Any]) -> CocoImage:
    width, height = int(entry["width"]), int(entry["height"])
    return CocoImage(number=int(entry["id"]), file_name=str(entry["file_name"]), width=width, height=height, objects=[])


def _unique(found: dict[K, V], pairs: Iterable[tuple[K, V]], what: str, shown: Callable[[V], str]) -> dict[K, V]:
    """The pairs added to `found`. Raises `ValueError` for a key that is there twice, with what both are of."""
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the {what} {key!r} is there twice, for {shown(found[key])} and for {shown(value)}")
        found[key] = value
    return found


def _give_objects(
    images: Mapping[int, CocoImage], categories: Mapping[Any, str], notes: Iterable[Mapping[str, Any]]
) -> None:
    """Adds annotations to their images; ids and categories are held against each other where the file has them."""
    seen: dict[Any, str] = {}
    for note in notes:
        image = images.get(int(note["image_id"]))
        if image is None:
            raise ValueError(
                f"annotation {note.get('id', '')} is of image {note['image_id']}, which isn't among the images"
            )
        if categories and note["category_id"] not in categories:
            raise ValueError(
                f"annotation {note.get('id', '')} has the category {note['category_id']}, which isn't among the categories"
            )
        if "id" in note:
            _unique(seen, [(note["id"], image.file_name)], "annotation id", str)
        image.objects.append(note)
