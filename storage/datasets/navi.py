"""NAVI: photographs of objects with depth maps and camera poses, in scenes; the views that ViT-Up's Table 2 pairs.

`<object>/<scene>/{images/<id>.jpg, depth/<id>.png, annotations.json}`. Scenes are `wild_set`, which are tested on, and
`multiview_...` or `multiview-...`; objects that lack either kind are skipped. Beside the originals, `downsampled_<id>` files may
lie, which probe3d's script makes with a short side of 1,024 pixels: they are read where they are there.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from storage.datasets.boxes import as_number
from storage.datasets.depth import DepthPng
from storage.datasets.files import DatasetError, RawObject, parsed, read, require_files
from storage.datasets.images import ImageFile
from storage.paths import Folder

logger = logging.getLogger(__name__)

WILD = "wild_set"

_PREPARED = "downsampled_"


@dataclass(frozen=True, kw_only=True)
class NaviView:
    """A photograph of an object."""

    object: str
    scene: str
    id: str
    image: ImageFile
    depth: DepthPng
    "values that are 655,350 times the inverse of the depth in mm; 0: none"
    prepared: bool
    "whether both files are the smaller ones that lie beside the originals"
    quaternion: tuple[float, float, float, float]
    "the object's rotation in the camera, w first"
    translation: tuple[float, float, float]
    "in mm"
    focal_length: float
    "in pixels of the original"
    original_size: tuple[int, int]
    "of the original: height, width"

    @property
    def name(self) -> str:
        return f"{self.object}/{self.scene}/{self.id}"


def load_navi(folder: Folder) -> list[tuple[NaviView, ...]]:
    """The views of the test split, by object: those of `wild_set`, sorted, of the objects that have another scene as well.

    A folder that holds `navi_v1` stands for that. Raises `DatasetError`.
    """
    if "navi_v1" in folder.folders(""):
        folder = Folder(f"{folder.url}/navi_v1", folder.options)
    found = []
    for name in sorted(folder.folders("")):
        scenes = folder.folders(name)
        if WILD not in scenes or not any(scene.startswith("multiview") for scene in scenes):
            logger.info("%s/%s has no %s", folder.displayed, name, "multiview scene" if WILD in scenes else WILD)
            continue
        found.append(_scene(folder, name, WILD))
    if not found:
        raise DatasetError(f"{folder.displayed} holds no object with a {WILD} and a multiview scene; check --data")
    return found


def _scene(folder: Folder, name: str, scene: str) -> tuple[NaviView, ...]:
    root = f"{name}/{scene}"
    there = {kind: set(folder.sizes(f"{root}/{kind}")) for kind in ("images", "depth")}
    ids = sorted(each[:-4] for each in there["images"] if each.endswith(".jpg") and "_" not in each)
    path = f"{root}/annotations.json"
    entries, views = parsed(
        folder, path, read(folder, path), lambda data: (found := _by_id(data), _views(folder, (name, scene), ids, found, there))
    )
    if lacking := sorted(set(ids) - {view.id for view in views}):
        raise DatasetError(f"{folder.displayed}/{path} says nothing of {lacking[0]}.jpg ({len(lacking)} such images)")
    if gone := sorted(entries.keys() - set(ids)):
        logger.warning("%s/%s: %d views have no image and are left out, such as %s", folder.displayed, path, len(gone), gone[0])
    require_files(folder, (view.depth for view in views), "but there is an image of it")
    return views


def _by_id(entries: Any) -> dict[str, RawObject]:
    """By what the files are called; the document is a list. Raises `ValueError` where it isn't one of views, each there once."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "filename" in entry for entry in entries):
        raise ValueError("it is no list of views, each with its filename, camera and image_size")
    found = {str(entry["filename"]).rpartition(".")[0]: entry for entry in entries}
    if len(found) < len(entries):
        ((twice, _),) = Counter(str(entry["filename"]) for entry in entries).most_common(1)
        raise ValueError(f"{twice} is there twice")
    return found


def _views(
    folder: Folder, scene: tuple[str, str], ids: Sequence[str], entries: Mapping[str, RawObject], there: Mapping[str, set[str]]
) -> tuple[NaviView, ...]:
    root, found = "/".join(scene), []
    for each in filter(entries.__contains__, ids):
        camera, size = entries[each]["camera"], entries[each]["image_size"]
        prepared = f"{_PREPARED}{each}.jpg" in there["images"] and f"{_PREPARED}{each}.png" in there["depth"]
        name = f"{_PREPARED * prepared}{each}"
        quaternion, translation = (tuple(map(as_number, camera[part])) for part in "qt")
        are_finite = all(map(math.isfinite, (*quaternion, *translation)))
        if len(quaternion) != 4 or len(translation) != 3 or not any(quaternion) or not are_finite:
            raise ValueError(f"{each}.jpg: q {camera['q']} and t {camera['t']} are no rotation (w, x, y, z) and translation")
        focal_length, sides = as_number(camera["focal_length"]), [as_number(side) for side in size]
        if not 0 < focal_length < math.inf:
            raise ValueError(f"{each}.jpg: the focal length is {camera['focal_length']}; it should be a number of pixels above 0")
        if len(sides) != 2 or not all(1 <= side < math.inf for side in sides):
            raise ValueError(f"{each}.jpg: its size is {size}; it should be height, width in pixels")
        found.append(
            NaviView(
                object=scene[0],
                scene=scene[1],
                id=each,
                image=ImageFile.at(folder, f"{root}/images/{name}.jpg"),
                depth=DepthPng(folder=folder, name=f"{root}/depth/{name}.png", per_metre=1),
                prepared=prepared,
                quaternion=quaternion,
                translation=translation,
                focal_length=focal_length,
                original_size=(int(sides[0]), int(sides[1])),
            )
        )
    return tuple(found)
