"""Cityscapes: `leftImg8bit/<split>/<city>/*_leftImg8bit.png` and `gtFine/<split>/<city>/*_gtFine_labelIds.png`."""

from dataclasses import replace

from storage.datasets.files import DatasetError, Listed, require_plain
from storage.datasets.labels import LabelledImage
from storage.datasets.pairing import masked_images, pairs_of_stems
from storage.paths import Folder


def load_cityscapes(folder: Folder, split: str, limit: int | None = None) -> Listed[LabelledImage]:
    """Cityscapes' 19 train ids, made of labelIds; cities and images sorted. The folder may be the one above `cityscapes`.

    instanceIds, which official readers open, too, aren't asked for. Raises `DatasetError`.
    """
    require_plain(split, "the split")
    images = next((p for p in ("leftImg8bit", "cityscapes/leftImg8bit") if folder.folders(f"{p}/{split}")), None)
    if images is None:
        raise DatasetError(f"{folder.displayed} has no leftImg8bit/{split}/<city>; check --data and the split")
    labels = images.replace("leftImg8bit", "gtFine")
    endings = ("_leftImg8bit", "_gtFine_labelIds")
    pairs: list[tuple[str, str]] = []
    for city in folder.folders(f"{images}/{split}"):
        pairs += pairs_of_stems(folder, f"{images}/{split}/{city}", f"{labels}/{split}/{city}", endings)
        if limit is not None and len(pairs) >= limit:
            # What further cities hold isn't looked at.
            return replace(masked_images(folder, pairs, "cityscapes", limit), of=None)
    return masked_images(folder, pairs, "cityscapes", limit)
