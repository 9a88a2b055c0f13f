"""Photographs under open licences (photos_open): tars of images, with class masks in `seg/` and COCO's `instances.json`."""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from storage.datasets.coco import instances_of, read_coco
from storage.datasets.files import DatasetError, Listed, names_in
from storage.datasets.images import TarImage, TarMember, keys_of, tar_members
from storage.datasets.labels import ClassMask, LabelledImage
from storage.datasets.pairing import by_name
from storage.left_out import LeftOut, leave_out
from storage.paths import Folder

PHOTOS_SPLITS: Mapping[str, slice] = {"all": slice(None), "train": slice(0, 1), "val": slice(1, None)}
"""Of the tars: photos_open has no official splits, so the first is for training."""


def load_photos_open(
    folder: Folder, split: str, limit: int | None = None, label: Literal["classes", "instances"] = "classes"
) -> Listed[LabelledImage]:
    """The photographs in `*.tar` that have a mask in `seg/`, or objects in `instances.json`; sorted by key.

    Raises `DatasetError`.
    """
    tars = sorted(name for name in folder.sizes("") if name.endswith(".tar"))
    if split not in PHOTOS_SPLITS or not tars[PHOTOS_SPLITS[split]]:
        raise DatasetError(
            f"{folder.displayed} has no tars of the split {split}: {len(tars)} tars, the splits {', '.join(PHOTOS_SPLITS)}; "
            "check --data and the split"
        )
    members, wanted = ((member.key, member) for member in tar_members(folder, tars)), tars[PHOTOS_SPLITS[split]]
    photos = by_name(folder, members, lambda member: f"{member.tar}: {member.key}.{member.extension}")
    found = []
    if label == "classes":
        masks = {name.removesuffix(".png"): name for name in names_in(folder, "seg", ("png",))}
        images = _photos_with(folder, photos, masks, "seg", wanted)
        for image in images[:limit]:
            mask = ClassMask(folder=folder, name=f"seg/{masks[image.member.key]}", table="photos_open")
            found.append(LabelledImage(image=image, label=mask))
    else:
        annotated = ((keys_of(each.file_name)[0], each) for each in read_coco(folder, "instances.json"))
        notes = by_name(folder, annotated, lambda each: f"instances.json: {each.file_name}")
        images = _photos_with(folder, photos, notes, "instances.json", wanted)
        for image in images[:limit]:
            note = notes[image.member.key]
            objects = instances_of(folder, "instances.json", note)
            found.append(LabelledImage(image=image.sized((note.width, note.height)), label=objects))
    return Listed(tuple(found), images.of, images.left_out)


def _photos_with(
    folder: Folder, photos: Mapping[str, TarMember], labels: Collection[str], where: str, tars: Sequence[str]
) -> Listed[TarImage]:
    """The images in `tars` that have a label; every label must have an image in some tar."""
    for key in labels:
        if key not in photos:
            raise DatasetError(f"{folder.displayed}/{where} has a label for {key}, but no tar there has such an image")
    members = [photos[key] for key in sorted(labels) if photos[key].tar in tars]
    left_out: dict[str, LeftOut] = {}
    for member in photos.values():
        if member.tar in tars and member.key not in labels:
            leave_out(left_out, f"photograph without a label in {where}", f"{member.tar}: {member.key}")
    found = tuple(TarImage(folder=folder, member=member, keys=(member.key,)) for member in members)
    return Listed(found, len(found), left_out)
