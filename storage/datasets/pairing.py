"""Where in a folder a data set's images and labels lie, and which label is of which image."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from storage.datasets.files import DatasetError, Listed, names_in, require_files
from storage.datasets.images import ImageFile
from storage.datasets.labels import ClassMask, LabelledImage
from storage.paths import Folder

IMAGE_TYPES = ("jpg", "jpeg", "png")

V = TypeVar("V")


def by_name(folder: Folder, named: Iterable[tuple[str, V]], displayed: Callable[[V], str]) -> dict[str, V]:
    """What is called by each name; `displayed` is its place inside the folder. Raises `DatasetError` where two things have one
    name: nothing would tell which of them a label is of."""
    found: dict[str, V] = {}
    for name, value in named:
        if name in found:
            raise DatasetError(
                f"{folder.displayed} has {name} twice, as {displayed(found[name])} and as {displayed(value)}: which of them a "
                "label is of can't be told. Remove or rename one"
            )
        found[name] = value
    return found


def joined(*parts: str) -> str:
    """A path of the parts that aren't empty."""
    return "/".join(part for part in parts if part)


def first_place(folder: Folder, places: Iterable[str], file: str = "") -> str | None:
    """The first of `places` that holds `file`, or any file; None where none does."""
    for place in places:
        path = joined(place, file)
        if folder.exists(path) if file else folder.sizes(path):
            return place
    return None


def require_place(folder: Folder, places: Sequence[str], file: str = "") -> str:
    """As `first_place`. Raises `DatasetError` naming all places."""
    found = first_place(folder, places, file)
    if found is None:
        tried = ", ".join(joined(place, file) for place in places)
        raise DatasetError(f"{folder.displayed} has none of {tried}; check --data and the split")
    return found


def masked_images(
    folder: Folder, pairs: Sequence[tuple[str, str]], table: str, limit: int | None = None
) -> Listed[LabelledImage]:
    """The first `limit` images with class masks, both by path, whose values are those of `table`. Raises `DatasetError` unless
    both are there."""
    images, masks = [], []
    for image, mask in pairs[:limit]:
        images.append(ImageFile.at(folder, image))
        masks.append(ClassMask(folder=folder, name=mask, table=table))
    require_files(folder, images, "but it is listed, or has a label")
    require_files(folder, masks, "but its image is listed, or there")
    found = tuple(LabelledImage(image=image, label=mask) for image, mask in zip(images, masks, strict=True))
    return Listed(found, len(pairs))


def pairs_of_stems(folder: Folder, images: str, labels: str, endings: tuple[str, str] = ("", "")) -> list[tuple[str, str]]:
    """Paths of images and label PNGs in two folders, sorted, paired by what their names have before `endings`.

    Raises `DatasetError` for one without the other; official readers pair by position, so one file too many shifts them.
    """
    image_of = by_stem(folder, images, IMAGE_TYPES, endings[0])
    label_of = by_stem(folder, labels, ("png",), endings[1])
    for here, there, what in ((image_of, label_of, f"label in {labels}"), (label_of, image_of, f"image in {images}")):
        alone = sorted(here.keys() - there.keys())
        if alone:
            raise DatasetError(
                f"{folder.displayed}/{here[alone[0]]} has no {what}, nor have {len(alone) - 1} others; complete the folders, "
                "or remove what doesn't belong there"
            )
    return [(image_of[stem], label_of[stem]) for stem in sorted(image_of)]


def by_stem(folder: Folder, place: str, extensions: Sequence[str], ending: str = "") -> dict[str, str]:
    """Paths of a folder's files by their names without `ending` and extension, in the order of the files' names; those that
    end otherwise are left out.

    Raises `DatasetError`, also for two files that differ in their extension only."""
    stems = [(name.rpartition(".")[0], name) for name in names_in(folder, place, extensions)]
    named = ((stem.removesuffix(ending), f"{place}/{name}") for stem, name in stems if stem.endswith(ending))
    return by_name(folder, named, str)
