"""NYUv2's depth, in the layouts that it is found in: Matlab's file, tars of HDF5, folders of PNGs."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace

import scipy.io
from scipy.io.matlab import MatReadError

from storage.datasets.depth import DepthMap, DepthPng
from storage.datasets.files import DatasetError, Listed, read, require_plain
from storage.datasets.images import H5Array, H5Image, ImageFile, keys_of, require_h5py, tar_members
from storage.datasets.labels import LabelledImage
from storage.datasets.pairing import joined, pairs_of_stems
from storage.paths import Folder

NYU_PNGS: Mapping[str, float] = {"depth": 5000.0, "annotations": 1000.0}
"""Folders of NYUv2's depth PNGs, and values per metre: multi-task-refinenet's, mmsegmentation's."""

NYU_TARS: Mapping[str, str] = {"train": "train", "val": "val", "validation": "val", "test": "val"}
"""The Hugging Face repository's shards of a split; its validation is the official test set of 654 images."""


def load_nyu(folder: Folder, split: str, limit: int | None = None) -> Listed[LabelledImage]:
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
            return _nyu_tars(folder, [joined(place, tar) for tar in tars], split, limit)
    for place, per_metre in NYU_PNGS.items():
        if folder.sizes(place) or folder.folders(place):
            return _nyu_pngs(folder, place, per_metre, split, limit)
    raise DatasetError(
        f"{folder.displayed} has none of nyu_depth_v2_labeled.mat, data/{split}-*.tar, images/ with depth/ or annotations/; "
        "check --data"
    )


def _nyu_pngs(folder: Folder, place: str, per_metre: float, split: str, limit: int | None) -> Listed[LabelledImage]:
    below = f"/{split}"
    if folder.sizes(place):
        if split != "all":
            raise DatasetError(f"{folder.displayed}/{place} isn't divided into splits; ask for the split all")
        below = ""
    found, pairs = [], pairs_of_stems(folder, f"images{below}", f"{place}{below}")
    for image, depth in pairs[:limit]:
        label = DepthMap(source=DepthPng(folder=folder, name=depth, per_metre=per_metre))
        found.append(LabelledImage(image=ImageFile.at(folder, image), label=label))
    return Listed(tuple(found), len(pairs))


def _nyu_tars(folder: Folder, tars: Sequence[str], split: str, limit: int | None) -> Listed[LabelledImage]:
    require_h5py()
    prefix = NYU_TARS.get(split)
    wanted = [tar for tar in tars if tar.rsplit("/", 1)[-1].startswith(f"{prefix}-")]
    if prefix is None or not wanted:
        raise DatasetError(f"{folder.displayed} has no shards of the split {split}, only {', '.join(tars[:3])}, ...; check it")
    found: list[LabelledImage] = []
    for tar in wanted:
        if limit is not None and len(found) >= limit:
            return Listed(tuple(found[:limit]))
        for member in tar_members(folder, [tar], "h5"):
            rgb, depth = (H5Array(folder=folder, name=tar, array=name, span=member.span) for name in ("rgb", "depth"))
            image = H5Image(array=rgb, keys=keys_of(member.key))
            found.append(LabelledImage(image=image, label=DepthMap(source=depth)))
    return Listed.first(found, limit)


def _nyu_mat(folder: Folder, name: str, split: str, limit: int | None) -> Listed[LabelledImage]:
    images, depths = (H5Array(folder=folder, name=name, array=array) for array in ("images", "depths"))
    count = images.entries()
    found, numbers = [], _mat_numbers(folder, split, count)
    for number in numbers[:limit]:
        image, depth = (replace(each, entry=number - 1) for each in (images, depths))
        keys = (f"{number:06d}", str(number))
        found.append(LabelledImage(image=H5Image(array=image, keys=keys), label=DepthMap(source=depth)))
    return Listed(tuple(found), len(numbers))


def _mat_numbers(folder: Folder, split: str, count: int) -> list[int]:
    """Matlab's numbers (from 1) of a split's images."""
    if split == "all":
        return list(range(1, count + 1))
    where = f"{folder.displayed}/splits.mat"
    try:
        numbers = scipy.io.loadmat(io.BytesIO(read(folder, "splits.mat")))[f"{split}Ndxs"].ravel().tolist()
    except KeyError:
        raise DatasetError(f"{where} has no {split}Ndxs; its splits are train and test") from None
    except (MatReadError, ValueError, TypeError, NotImplementedError) as error:
        raise DatasetError(f"{where} can't be read: {type(error).__name__}: {error}") from None
    if not numbers or min(numbers) < 1 or max(numbers) > count:
        raise DatasetError(f"{where} names images beyond the {count} that there are; fetch both files again")
    return [int(number) for number in numbers]
