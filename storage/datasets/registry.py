"""Labelled data sets in their official layouts, as lists of `LabelledImage`; `load_labelled` finds them by name.

Listing looks at folders, lists and annotations only. Order is the official one: a list's where there is one, COCO's by image
id, else sorted names; so index ranges of papers hold. What is missing or contradictory ends in a `DatasetError`.
Layouts: specs/evaluation.md sections 7, 12.3, 13; specs/mini_datasets.md sections 3 to 9.
"""

import difflib
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import scipy.io
from scipy.io.matlab import MatReadError

from pipelines.config import ConfigError
from pipelines.readouts.depth import DepthMap, DepthPng, require_plausible
from storage.datasets.coco import CocoImage, read_coco
from storage.datasets.files import lines, names_in, require_images, require_plain, voc_root
from storage.datasets.images import AnyImage, H5Array, H5Image, TarImage, TarMember, require_h5py, tar_members
from storage.datasets.labels import ClassMask, Instances, LabelledImage
from storage.datasets.pictures import DatasetError, ImageFile, LabelFrame, read
from storage.paths import Folder
from storage.tars import split_name

IMAGE_TYPES = ("jpg", "jpeg", "png")


def keys_of(name: str) -> tuple[str, ...]:
    """What a store calls the file at this path: without extension, extracted from here, or from any folder further down."""
    split = split_name(name)
    parts = (split[0] if split else name).split("/")
    return tuple("/".join(parts[i:]) for i in range(len(parts)))


def _image(folder: Folder, name: str, width: int = 0, height: int = 0) -> ImageFile:
    return ImageFile(folder=folder, name=name, keys=keys_of(name), width=width, height=height)


def _place(folder: Folder, places: Sequence[str], file: str = "") -> str:
    """The first of `places` that holds `file`, or anything. Raises `DatasetError` naming all."""
    for place in places:
        path = f"{place}/{file}".strip("/")
        if folder.exists(path) if file else folder.sizes(path):
            return place
    tried = ", ".join(f"{place}/{file}".strip("/") for place in places)
    raise DatasetError(f"{folder.shown} has none of {tried}; check --data and the split")


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _masked(folder: Folder, pairs: Iterable[tuple[str, str]], table: str) -> list[LabelledImage]:
    """Images with class masks, both by path; both must be there."""
    found = [
        LabelledImage(image=_image(folder, image), label=ClassMask(folder=folder, name=mask, table=table))
        for image, mask in pairs
    ]
    require_images(folder, (each.image for each in found), "but it is listed, or has a label")
    require_images(folder, (each.label for each in found), "but its image is listed, or there")
    return found


def _pairs_of_stems(
    folder: Folder, images: str, labels: str, endings: tuple[str, str] = ("", "")
) -> list[tuple[str, str]]:
    """Paths of images and label PNGs in two folders, sorted, paired by what their names have before `endings`.

    Raises `DatasetError` for one without the other; official readers pair by position, so one file too many shifts them.
    """
    image_of = _by_stem(folder, images, IMAGE_TYPES, endings[0])
    label_of = _by_stem(folder, labels, ("png",), endings[1])
    for here, there, what in ((image_of, label_of, f"label in {labels}"), (label_of, image_of, f"image in {images}")):
        alone = sorted(here.keys() - there.keys())
        if alone:
            raise DatasetError(
                f"{folder.shown}/{here[alone[0]]} has no {what}, nor have {len(alone) - 1} others; complete the folders, "
                "or remove what doesn't belong there"
            )
    return [(image_of[stem], label_of[stem]) for stem in sorted(image_of)]


def _by_stem(folder: Folder, place: str, extensions: Sequence[str], ending: str) -> dict[str, str]:
    """Paths of a folder's files by their names without `ending` and extension; those that end otherwise are left out."""
    stems = [(name.rpartition(".")[0], name) for name in names_in(folder, place, extensions)]
    return {stem.removesuffix(ending): f"{place}/{name}" for stem, name in stems if stem.endswith(ending)}


# --- class masks ------------------------------------------------------------------------------------------------------


def load_voc_seg(folder: Folder, split: str, limit: int | None = None, year: str = "2012") -> list[LabelledImage]:
    """VOC's segmentation: `ImageSets/Segmentation/<split>.txt`, in its order. The folder as for `load_voc`.

    Raises `DatasetError`.
    """
    require_plain(split, "the split")
    listed = f"ImageSets/Segmentation/{split}.txt"
    root = voc_root(folder, year, listed)
    ids = list(dict.fromkeys(lines(folder, root + listed)))[:limit]
    for each in ids:
        require_plain(each, f"{folder.shown}/{root}{listed}")
    pairs = ((f"{root}JPEGImages/{each}.jpg", f"{root}SegmentationClass/{each}.png") for each in ids)
    return _masked(folder, pairs, "voc")


def load_coco_stuff(
    folder: Folder,
    split: str,
    limit: int | None = None,
    layout: Literal["vit_up", "deap"] = "vit_up",
    groups: Literal["coarse", "fine"] = "coarse",
) -> list[LabelledImage]:
    """COCO-Stuff's 182 classes or their 27 groups, split `train2017` or `val2017`.

    `vit_up`: the images of `curated/<split>/Coco164kFull_Stuff_Coarse.txt`, which are fewer than the folder's. `deap`: every
    PNG of `<any>/trainval2017/<split>` (or of `annotations/<split>`), sorted. The folder may be the one above.

    Raises `DatasetError`.
    """
    require_plain(split, "the split")
    table = "coco_stuff27" if groups == "coarse" else "coco_stuff"
    pairs = (_curated_stuff if layout == "vit_up" else _all_stuff)(folder, split)
    return _masked(folder, pairs[:limit], table)


def _curated_stuff(folder: Folder, split: str) -> list[tuple[str, str]]:
    listed = f"curated/{split}/Coco164kFull_Stuff_Coarse.txt"
    root = _place(folder, ("", "COCOStuff"), listed)
    ids = list(dict.fromkeys(lines(folder, _join(root, listed))))
    for each in ids:
        require_plain(each, f"{folder.shown}/{_join(root, listed)}")
    inside = _join(root, "dataset")
    return [(f"{inside}/images/{split}/{each}.jpg", f"{inside}/annotations/{split}/{each}.png") for each in ids]


def _all_stuff(folder: Folder, split: str) -> list[tuple[str, str]]:
    places = ["trainval2017", *(f"{name}/trainval2017" for name in folder.folders(""))]
    labels = _place(
        folder, [f"{place}/{split}" for place in (*places, "annotations", "dataset/annotations", "stuffthingmaps")]
    )
    images = _place(folder, [_join(place, split) for place in ("coco", "images", "dataset/images", "", "coco/images")])
    stems = [name.rsplit(".", 1)[0] for name in names_in(folder, labels, ("png",))]
    return [(f"{images}/{stem}.jpg", f"{labels}/{stem}.png") for stem in stems]


def load_ade20k(folder: Folder, split: str, limit: int | None = None) -> list[LabelledImage]:
    """ADE20K's 150 classes and 0 for others, split `training` or `validation`; the folder may be the one above
    ADEChallengeData2016. Images and masks must match by name. Raises `DatasetError`."""
    require_plain(split, "the split")
    images = _place(folder, [f"{place}images/{split}" for place in ("", "ADEChallengeData2016/")])
    pairs = _pairs_of_stems(folder, images, images.replace("images/", "annotations/"))
    return _masked(folder, pairs[:limit], "ade20k")


def load_cityscapes(folder: Folder, split: str, limit: int | None = None) -> list[LabelledImage]:
    """Cityscapes' 19 train ids, made of labelIds; cities and images sorted. The folder may be the one above `cityscapes`.

    instanceIds, which official readers open, too, aren't asked for. Raises `DatasetError`.
    """
    require_plain(split, "the split")
    images = next((p for p in ("leftImg8bit", "cityscapes/leftImg8bit") if folder.folders(f"{p}/{split}")), None)
    if images is None:
        raise DatasetError(f"{folder.shown} has no leftImg8bit/{split}/<city>; check --data and the split")
    labels = images.replace("leftImg8bit", "gtFine")
    endings = ("_leftImg8bit", "_gtFine_labelIds")
    pairs: list[tuple[str, str]] = []
    for city in folder.folders(f"{images}/{split}"):
        pairs += _pairs_of_stems(folder, f"{images}/{split}/{city}", f"{labels}/{split}/{city}", endings)
        if limit is not None and len(pairs) >= limit:
            break
    return _masked(folder, pairs[:limit], "cityscapes")


# --- depth ------------------------------------------------------------------------------------------------------------

NYU_PNGS: Mapping[str, float] = {"depth": 5000.0, "annotations": 1000.0}
"""Folders of NYUv2's depth PNGs, and values per metre: multi-task-refinenet's, mmsegmentation's."""

NYU_TARS: Mapping[str, str] = {"train": "train", "val": "val", "validation": "val", "test": "val"}
"""The Hugging Face repository's shards of a split; its validation is the official test set of 654 images."""


def load_nyu(folder: Folder, split: str, limit: int | None = None) -> list[LabelledImage]:
    """NYUv2 with depth in metres, in whichever layout the folder has.

    `nyu_depth_v2_labeled.mat` with `splits.mat` beside it (`train`, `test`; `all` needs no splits.mat); shards
    `data/{train,val}-*.tar` of .h5, members in order; `images/` with `depth/` (value / 5000) or `annotations/` (mm), each with
    a folder for the split, or without, and then `all` is the only one. The first two need h5py. Raises `DatasetError`.
    """
    require_plain(split, "the split")
    if folder.exists("nyu_depth_v2_labeled.mat"):
        return _nyu_mat(folder, "nyu_depth_v2_labeled.mat", split, limit)
    for place in ("data", ""):
        tars = sorted(name for name in folder.sizes(place) if name.endswith(".tar"))
        if tars:
            return _nyu_tars(folder, [_join(place, tar) for tar in tars], split, limit)
    for place, per_metre in NYU_PNGS.items():
        if folder.sizes(place) or folder.folders(place):
            return _nyu_pngs(folder, place, per_metre, split, limit)
    raise DatasetError(
        f"{folder.shown} has none of nyu_depth_v2_labeled.mat, data/{split}-*.tar, images/ with depth/ or annotations/; "
        "check --data"
    )


def _nyu_pngs(folder: Folder, place: str, per_metre: float, split: str, limit: int | None) -> list[LabelledImage]:
    inside = [f"{name}/{split}" for name in ("images", place)]
    if folder.sizes(place):
        if split != "all":
            raise DatasetError(f"{folder.shown}/{place} isn't divided into splits; ask for the split all")
        inside = ["images", place]
    found = []
    for image, depth in _pairs_of_stems(folder, *inside)[:limit]:
        label = DepthMap(source=DepthPng(folder=folder, name=depth, per_metre=per_metre))
        found.append(LabelledImage(image=_image(folder, image), label=label))
    return found


def _nyu_tars(folder: Folder, tars: Sequence[str], split: str, limit: int | None) -> list[LabelledImage]:
    require_h5py()
    prefix = NYU_TARS.get(split)
    wanted = [tar for tar in tars if tar.rsplit("/", 1)[-1].startswith(f"{prefix}-")]
    if prefix is None or not wanted:
        raise DatasetError(
            f"{folder.shown} has no shards of the split {split}, only {', '.join(tars[:3])}, ...; check it"
        )
    found: list[LabelledImage] = []
    for tar in wanted:
        for member in tar_members(folder, [tar], "h5"):
            rgb, depth = (H5Array(folder=folder, name=tar, array=name, span=member.span) for name in ("rgb", "depth"))
            image = H5Image(array=rgb, keys=keys_of(member.key))
            found.append(LabelledImage(image=image, label=DepthMap(source=depth)))
        if limit is not None and len(found) >= limit:
            break
    return found[:limit]


def _nyu_mat(folder: Folder, name: str, split: str, limit: int | None) -> list[LabelledImage]:
    images, depths = (H5Array(folder=folder, name=name, array=array) for array in ("images", "depths"))
    count = images.entries()
    found = []
    for number in _mat_numbers(folder, split, count)[:limit]:
        image, depth = (
            H5Array(folder=folder, name=name, array=each.array, entry=number - 1) for each in (images, depths)
        )
        keys = (f"{number:06d}", str(number))
        found.append(LabelledImage(image=H5Image(array=image, keys=keys), label=DepthMap(source=depth)))
    return found


def _mat_numbers(folder: Folder, split: str, count: int) -> list[int]:
    """Matlab's numbers (from 1) of a split's images."""
    if split == "all":
        return list(range(1, count + 1))
    where = f"{folder.shown}/splits.mat"
    try:
        numbers = scipy.io.loadmat(io.BytesIO(read(folder, "splits.mat")))[f"{split}Ndxs"].ravel().tolist()
    except KeyError:
        raise DatasetError(f"{where} has no {split}Ndxs; its splits are train and test") from None
    except (MatReadError, ValueError, TypeError, NotImplementedError) as error:
        raise DatasetError(f"{where} can't be read: {type(error).__name__}: {error}") from None
    if not numbers or min(numbers) < 1 or max(numbers) > count:
        raise DatasetError(f"{where} names images beyond the {count} that there are; fetch both files again")
    return [int(number) for number in numbers]


# --- instances --------------------------------------------------------------------------------------------------------


def load_coco_instances(folder: Folder, split: str, limit: int | None = None) -> list[LabelledImage]:
    """COCO's images of `annotations/instances_<split>.json` by id, those without objects included, and crowds.

    The folder may be the one above `coco`. The whole JSON is read: train2017's takes gigabytes meanwhile. Raises `DatasetError`.
    """
    require_plain(split, "the split")
    listed = f"annotations/instances_{split}.json"
    root = _place(folder, ("", "coco"), listed)
    place = _place(folder, [_join(root, inside, split) for inside in ("", "images")])
    where, found = _join(root, listed), []
    for each in read_coco(folder, where)[:limit]:
        require_plain(each.file_name, f"{folder.shown}/{where}")
        image = _image(folder, f"{place}/{each.file_name}", each.width, each.height)
        found.append(LabelledImage(image=image, label=_instances(folder, where, each)))
    require_images(folder, (each.image for each in found))
    return found


def _instances(folder: Folder, where: str, image: CocoImage) -> Instances:
    shown = f"{folder.shown}/{where}: {image.file_name}"
    try:
        return Instances.pack(image.objects, shown, image.width, image.height)
    except KeyError as error:
        raise DatasetError(f"{shown}: an annotation has no field {error}") from None
    except (ValueError, TypeError) as error:
        raise DatasetError(f"{shown}: an annotation is malformed: {error}") from None


# --- photos in tars ---------------------------------------------------------------------------------------------------

PHOTOS_SPLITS: Mapping[str, slice] = {"all": slice(None), "train": slice(0, 1), "val": slice(1, None)}
"""Of the tars: photos_open has no official splits, so the first is for training."""


def load_photos_open(
    folder: Folder, split: str, limit: int | None = None, label: Literal["classes", "instances"] = "classes"
) -> list[LabelledImage]:
    """The photographs in `*.tar` that have a mask in `seg/`, or objects in `instances.json`; sorted by key.

    Raises `DatasetError`.
    """
    tars = sorted(name for name in folder.sizes("") if name.endswith(".tar"))
    if split not in PHOTOS_SPLITS or not tars[PHOTOS_SPLITS[split]]:
        raise DatasetError(
            f"{folder.shown} has no tars of the split {split}: {len(tars)} tars, the splits {', '.join(PHOTOS_SPLITS)}; "
            "check --data and the split"
        )
    photos = {member.key: member for member in tar_members(folder, tars)}
    if label == "classes":
        labels = {name.removesuffix(".png"): name for name in names_in(folder, "seg", ("png",))}
        chosen = _photos_with(folder, photos, labels, "seg", tars[PHOTOS_SPLITS[split]])[:limit]
        masks = [ClassMask(folder=folder, name=f"seg/{labels[each.key]}", table="photos_open") for each in chosen]
        return [
            LabelledImage(image=_in_tar(folder, each), label=mask) for each, mask in zip(chosen, masks, strict=True)
        ]
    notes = {keys_of(each.file_name)[0]: each for each in read_coco(folder, "instances.json")}
    found = []
    for member in _photos_with(folder, photos, notes, "instances.json", tars[PHOTOS_SPLITS[split]])[:limit]:
        note = notes[member.key]
        image = _in_tar(folder, member, note.width, note.height)
        found.append(LabelledImage(image=image, label=_instances(folder, "instances.json", note)))
    return found


def _photos_with(
    folder: Folder, photos: Mapping[str, TarMember], labels: Iterable[str], where: str, tars: Sequence[str]
) -> list[TarMember]:
    """Members of `tars` that have a label; every label must have an image in some tar."""
    for key in labels:
        if key not in photos:
            raise DatasetError(f"{folder.shown}/{where} has a label for {key}, but no tar there has such an image")
    return [photos[key] for key in sorted(labels) if photos[key].tar in tars]


def _in_tar(folder: Folder, member: TarMember, width: int = 0, height: int = 0) -> AnyImage:
    return TarImage(folder=folder, member=member, keys=(member.key,), width=width, height=height)


# --- by name ----------------------------------------------------------------------------------------------------------

_VOC = """background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person
pottedplant sheep sofa train tvmonitor"""
_COCO_GROUPS = """electronic appliance food furniture indoor kitchen accessory animal outdoor person sports vehicle
ceiling floor food-stuff furniture-stuff raw-material textile wall window building ground plant sky solid structural water"""
_CITYSCAPES = """road sidewalk building wall fence pole traffic-light traffic-sign vegetation terrain sky person rider
car truck bus train motorcycle bicycle"""
_PHOTOS = """background Apple Bag Banana Bicycle Bottle Car Cat Clock Cow Dog Handbag Horse Kite Laptop Motorcycle Pizza Tie"""


@dataclass(frozen=True, kw_only=True)
class DatasetKind:
    """A data set as tasks ask for it."""

    load: Callable[[Folder, str, int | None], list[LabelledImage]]
    label: Literal["classes", "depth", "instances"]
    splits: tuple[str, str]
    "that are trained and evaluated on"
    classes: int | None = None
    "of class masks"
    names: tuple[str, ...] = field(default=(), repr=False)
    "of the classes, where they're known here"


DATASETS: Mapping[str, DatasetKind] = {
    "voc": DatasetKind(
        load=load_voc_seg, label="classes", splits=("train", "val"), classes=21, names=tuple(_VOC.split())
    ),
    "coco_stuff27": DatasetKind(
        load=partial(load_coco_stuff, layout="vit_up", groups="coarse"),
        label="classes",
        splits=("train2017", "val2017"),
        classes=27,
        names=tuple(_COCO_GROUPS.split()),
    ),
    "coco_stuff": DatasetKind(
        load=partial(load_coco_stuff, layout="deap", groups="fine"),
        label="classes",
        splits=("train2017", "val2017"),
        classes=182,
    ),
    "ade20k": DatasetKind(load=load_ade20k, label="classes", splits=("training", "validation"), classes=151),
    "cityscapes": DatasetKind(
        load=load_cityscapes, label="classes", splits=("train", "val"), classes=19, names=tuple(_CITYSCAPES.split())
    ),
    "nyu": DatasetKind(load=load_nyu, label="depth", splits=("train", "val")),
    "coco": DatasetKind(load=load_coco_instances, label="instances", splits=("train2017", "val2017")),
    "photos_open": DatasetKind(
        load=load_photos_open, label="classes", splits=("train", "val"), classes=18, names=tuple(_PHOTOS.split())
    ),
    "photos_open_instances": DatasetKind(
        load=partial(load_photos_open, label="instances"), label="instances", splits=("train", "val")
    ),
}


@dataclass(frozen=True, kw_only=True)
class LabelReading:
    """What a person says of labels that their files don't tell."""

    frame: LabelFrame | None = None
    "which pixels they are of, where an image's EXIF turns it and sizes don't tell"
    depth_scale: float | None = None
    "values per metre; None: the layout's, if that is plausible"


def load_labelled(
    name: str,
    url: str,
    split: str,
    options: Mapping[str, Any] | None = None,
    limit: int | None = None,
    reading: LabelReading = LabelReading(),
) -> list[LabelledImage]:
    """The images of a data set's split, the first `limit` of them. `options`: of the storage. Raises `DatasetError`, also where
    a sample of depth maps isn't plausible."""
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, 1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(DATASETS)}"
        raise DatasetError(f"no data set {name!r}; {hint}")
    if limit is not None and limit < 1:
        raise DatasetError(f"a limit of {limit} leaves no image; give 1 or more, or none")
    found = DATASETS[name].load(Folder(url, options), split, limit)
    if DATASETS[name].label == "depth":
        found = _scaled(found, reading.depth_scale)
    return [replace(each, frame=reading.frame) for each in found]


def _scaled(images: list[LabelledImage], per_metre: float | None) -> list[LabelledImage]:
    """Images with depth read by that scale, or by the layout's once it is found plausible."""
    if per_metre is not None:
        return [replace(each, label=each.label.scaled(per_metre)) for each in images]
    require_plausible([each.label for each in images])
    return images


def require_depth(dataset: str, depth_scale: float | None) -> None:
    """Raises `ConfigError` for a scale that is no scale, or where the data set's labels have none."""
    if depth_scale is None:
        return
    if not (depth_scale > 0 and math.isfinite(depth_scale)):
        raise ConfigError(f"--depth-scale {depth_scale}: must be above 0, the number of values that are a metre")
    if dataset in DATASETS and DATASETS[dataset].label != "depth":
        raise ConfigError(f"--depth-scale: {dataset} has {DATASETS[dataset].label}, no depth; leave it out")
