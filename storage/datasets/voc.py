"""Pascal VOC's detection and segmentation.

The folder may be the one above VOCdevkit (TokenCut's, with or without VOC<year>/), VOCdevkit itself, or the year's; in it are
`ImageSets/{Main,Segmentation}/<split>.txt`, `JPEGImages/<id>.jpg`, `Annotations/<id>.xml` and `SegmentationClass/<id>.png`.
"""

import re
import xml.etree.ElementTree as ET

from storage.datasets.boxes import Box, BoxedImage, corner_box
from storage.datasets.files import DatasetError, Listed, listed_names, require_files, require_plain
from storage.datasets.images import ImageFile
from storage.datasets.labels import LabelledImage
from storage.datasets.pairing import first_place, masked_images
from storage.paths import Folder


def load_voc_seg(folder: Folder, split: str, limit: int | None = None) -> Listed[LabelledImage]:
    """Class masks of the images that `ImageSets/Segmentation/<split>.txt` lists, in its order. Raises `DatasetError`."""
    require_plain(split, "the split")
    root, ids = _listed(folder, "2012", f"ImageSets/Segmentation/{split}.txt")
    pairs = [(f"{root}JPEGImages/{each}.jpg", f"{root}SegmentationClass/{each}.png") for each in ids]
    return masked_images(folder, pairs, "voc", limit)


def load_voc(folder: Folder, year: str, split: str = "trainval") -> list[BoxedImage]:
    """Boxes of the images that `ImageSets/Main/<split>.txt` lists, in its order. Difficult and truncated objects count, as in
    TokenCut's code. Raises `DatasetError`."""
    listed = f"ImageSets/Main/{split}.txt"
    root, ids = _listed(folder, year, listed)
    names = [f"{root}Annotations/{each}.xml" for each in ids]
    try:
        files = folder.read_many(names)
    except FileNotFoundError as error:
        raise DatasetError(f"{error}, but {listed} lists it") from None
    found, years = [], set[str]()
    for each, name, data in zip(ids, names, files, strict=True):
        (width, height, boxes), said = _objects(f"{folder.displayed}/{name}", data)
        years |= said
        image = ImageFile.at(folder, f"{root}JPEGImages/{each}.jpg", width, height)
        found.append(BoxedImage(image=image, boxes=boxes))
    if years and year not in years:
        raise _other_year(folder, root, year, f"its annotations say VOC{', VOC'.join(sorted(years))}")
    require_files(folder, (each.image for each in found))
    return found


def _other_year(folder: Folder, root: str, year: str, why: str) -> DatasetError:
    """The error for a folder of another year than the one that was asked for."""
    place = f"{folder.displayed}/{root}".rstrip("/")
    return DatasetError(f"{place} isn't VOC{year}: {why}. Give --data VOC{year}'s folder, or ask for the year that it is")


def _listed(folder: Folder, year: str, listed: str) -> tuple[str, list[str]]:
    """Where a VOC year with the file `listed` begins inside the folder, "" or a path that ends in /; and the ids listed.

    Raises `DatasetError`.
    """
    place = first_place(folder, (f"VOC{year}/VOCdevkit/VOC{year}", f"VOCdevkit/VOC{year}", f"VOC{year}", ""), listed)
    if place is None:
        raise DatasetError(f"{folder.displayed} has no VOCdevkit/VOC{year}/{listed}, nor VOC{year}/VOCdevkit/...; check --data")
    root = f"{place}/" if place else ""
    named = re.fullmatch(r"VOC(\d{4})", folder.url.rstrip("/").rsplit("/", 1)[-1])
    if not root and named and named[1] != year:
        raise _other_year(folder, root, year, "its folder's name says so")
    # Lists of single classes have -1 in a second column; the ids are what is wanted.
    return root, listed_names(folder, root + listed)


def _objects(displayed: str, data: bytes) -> tuple[tuple[int, int, tuple[Box, ...]], set[str]]:
    """Width, height and boxes of an XML annotation, and the year that it says it is of, if any; boxes are 1-based and inclusive
    there."""
    try:
        if b"<!ENTITY" in data:
            raise DatasetError(f"{displayed} declares entities, which annotations have no use for; it is not read")
        root = ET.fromstring(data)
        width, height = _number(root, "size/width"), _number(root, "size/height")
        names = ("xmin", "ymin", "xmax", "ymax")
        found = [[_number(each, f"bndbox/{name}") for name in names] for each in root.iter("object")]
        boxes = tuple(corner_box((x1 - 1, y1 - 1, x2, y2), width, height) for x1, y1, x2, y2 in found)
        return (width, height, boxes), set(re.findall(r"^VOC(\d{4})$", (root.findtext("folder") or "").strip()))
    except (ET.ParseError, ValueError) as error:
        raise DatasetError(f"{displayed} is malformed: {error}") from None


def _number(node: ET.Element, path: str) -> int:
    text = node.findtext(path)
    if text is None:
        raise ValueError(f"<{node.tag}> has no <{path}>")
    return round(float(text))
