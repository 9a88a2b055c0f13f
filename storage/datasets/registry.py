"""The labelled data sets by name: what loads each, what its labels are, and so which tasks it serves.

A new data set is a file beside this one with its loader, and its line here (and one in `classes.TABLES` where its labels are
PNGs of class ids). A loader lists a split in the official order (a list's where there is one, COCO's by image id, else sorted
names), so that index ranges of papers hold; it looks at folders, lists and annotations only, and what is missing or
contradictory ends in a `DatasetError`.
"""

import difflib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from storage.datasets.ade20k import load_ade20k
from storage.datasets.boxes import BoxedImage
from storage.datasets.cityscapes import load_cityscapes
from storage.datasets.classes import CITYSCAPES_NAMES, COARSE_NAMES, PHOTOS_NAMES, VOC_NAMES
from storage.datasets.coco import load_coco20k, load_coco_instances, load_coco_stuff
from storage.datasets.davis import Clip, load_davis
from storage.datasets.depth import DepthMap, require_plausible
from storage.datasets.files import DatasetError, Listed
from storage.datasets.frames import LabelFrame
from storage.datasets.labels import Label, LabelledImage
from storage.datasets.navi import NaviView, load_navi
from storage.datasets.nyu import load_nyu
from storage.datasets.photos_open import load_photos_open
from storage.datasets.spair import Pair, load_spair
from storage.datasets.voc import load_voc, load_voc_seg
from storage.datasets.warped import load_warped
from storage.paths import Folder, StorageOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DatasetKind:
    """A data set as readouts' tasks ask for it."""

    load: Callable[..., Listed[LabelledImage]]
    "takes the folder, the split, and then what is the data set's own"
    label: Literal["classes", "depth", "instances"]
    splits: tuple[str, str]
    "that are trained and evaluated on"
    classes: int | None = None
    "of class masks"
    names: tuple[str, ...] = field(default=(), repr=False)
    "of the classes, where they're known here"


DATASETS: Mapping[str, DatasetKind] = {
    "voc": DatasetKind(load=load_voc_seg, label="classes", splits=("train", "val"), classes=21, names=tuple(VOC_NAMES.split())),
    "coco_stuff27": DatasetKind(
        load=partial(load_coco_stuff, layout="vit_up", groups="coarse"),
        label="classes",
        splits=("train2017", "val2017"),
        classes=27,
        names=tuple(COARSE_NAMES.split()),
    ),
    "coco_stuff": DatasetKind(
        load=partial(load_coco_stuff, layout="deap", groups="fine"), label="classes", splits=("train2017", "val2017"), classes=182
    ),
    "ade20k": DatasetKind(load=load_ade20k, label="classes", splits=("training", "validation"), classes=151),
    "cityscapes": DatasetKind(
        load=load_cityscapes, label="classes", splits=("train", "val"), classes=19, names=tuple(CITYSCAPES_NAMES.split())
    ),
    "nyu": DatasetKind(load=load_nyu, label="depth", splits=("train", "val")),
    "coco": DatasetKind(load=load_coco_instances, label="instances", splits=("train2017", "val2017")),
    "photos_open": DatasetKind(
        load=load_photos_open, label="classes", splits=("train", "val"), classes=18, names=tuple(PHOTOS_NAMES.split())
    ),
    "photos_open_instances": DatasetKind(
        load=partial(load_photos_open, label="instances"), label="instances", splits=("train", "val")
    ),
}
"""What readouts are trained and judged on: segmentation on classes, depth, and on instances boundaries, detection, instances."""

PAIRS: Mapping[str, Callable[..., Listed[Pair]]] = {"spair": load_spair, "warped": load_warped}
"""What correspondence is evaluated on: loaders of a folder, and of what is the data set's own."""

VIEWS: Mapping[str, Callable[[Folder], list[tuple[NaviView, ...]]]] = {"navi": load_navi}
"""What geometric correspondence is evaluated on: views with depth and pose, by object."""

CLIPS: Mapping[str, Callable[..., list[Clip]]] = {"davis": load_davis}
"""What label propagation through videos is evaluated on."""

BOXES: Mapping[str, Callable[[Folder, str], list[BoxedImage]]] = {
    "voc07": lambda folder, split: load_voc(folder, "2007", split),
    "voc12": lambda folder, split: load_voc(folder, "2012", split),
    "coco20k": lambda folder, split: load_coco20k(folder),  # noqa: ARG005 - its list is its only split
}
"""What object discovery, which isn't trained, is evaluated on."""


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
    options: StorageOptions | None = None,
    limit: int | None = None,
    reading: LabelReading = LabelReading(),
) -> Listed[LabelledImage]:
    """The images of a data set's split, the first `limit` of them. `options`: of the storage. Raises `DatasetError`, also where
    a sample of depth maps isn't plausible."""
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, 1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(DATASETS)}"
        raise DatasetError(f"no data set {name!r}; {hint}")
    if limit is not None and limit < 1:
        raise DatasetError(f"a limit of {limit} leaves no image; give 1 or more, or none")
    listed = DATASETS[name].load(Folder(url, options), split, limit)
    found = tuple(replace(each, label=_scaled(each.label, reading.depth_scale), frame=reading.frame) for each in listed)
    if limit is not None and len(found) < limit:
        logger.info("a limit of %s: %s of %s has %s images, of which all are taken", f"{limit:,}", split, name, f"{len(found):,}")
    maps = [each.label for each in found if isinstance(each.label, DepthMap)]
    if maps and reading.depth_scale is None:
        require_plausible(maps)
    return replace(listed, items=found)


def _scaled(label: Label, per_metre: float | None) -> Label:
    """A label as it is; one of depth read by the scale, if there is one."""
    return label.scaled(per_metre) if isinstance(label, DepthMap) and per_metre is not None else label
