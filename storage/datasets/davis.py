"""DAVIS-2017: the frames of videos with a label image each; 0 is background, other values number the objects.

`ImageSets/2017/<split>.txt`, `JPEGImages/<resolution>/<clip>/<frame>.jpg`, `Annotations/<resolution>/<clip>/<frame>.png`.
"""

from dataclasses import dataclass

from storage.datasets.files import DatasetError, listed_names
from storage.datasets.images import ImageFile, keys_of
from storage.datasets.pairing import by_stem
from storage.paths import Folder


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A video: its frames, and the label image of each."""

    name: str
    frames: tuple[ImageFile, ...]
    masks: tuple[str, ...]
    "paths inside the frames' folder"


def load_davis(folder: Folder, split: str = "val", resolution: str = "480p", step: int = 1) -> list[Clip]:
    """The clips of a split's list, every `step`-th frame. Raises `DatasetError`, also where a mask or a frame is missing."""
    return [_clip(folder, name, resolution, step) for name in listed_names(folder, f"ImageSets/2017/{split}.txt")]


def _clip(folder: Folder, name: str, resolution: str, step: int) -> Clip:
    images, labels = f"JPEGImages/{resolution}/{name}", f"Annotations/{resolution}/{name}"
    there, of_number = set(folder.sizes(labels)), by_stem(folder, images, ("jpg", "jpeg"))
    frames, masks = [], []
    for number, frame in list(of_number.items())[::step]:
        mask = f"{number}.png"
        if mask not in there:
            raise DatasetError(f"{folder.displayed}/{labels}/{mask} is missing, but its frame is not")
        # A frame's number alone is in every clip, so that no store may call it so.
        frames.append(ImageFile(folder=folder, name=frame, keys=keys_of(frame)[:-1]))
        masks.append(f"{labels}/{mask}")
    # A clip with holes is another video: what lies between two frames is what labels are carried over.
    if lost := sorted(mask for mask in there if mask.endswith(".png") and mask.removesuffix(".png") not in of_number):
        raise DatasetError(
            f"{folder.displayed}/{labels}/{lost[0]} has no frame in {images}, nor have {len(lost) - 1} other masks"
        )
    return Clip(name=name, frames=tuple(frames), masks=tuple(masks))
