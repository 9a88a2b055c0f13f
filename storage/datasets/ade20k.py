"""ADE20K (ADEChallengeData2016): `images/<split>/<id>.jpg` and `annotations/<split>/<id>.png`."""

from storage.datasets.files import Listed, require_plain
from storage.datasets.labels import LabelledImage
from storage.datasets.pairing import masked_images, pairs_of_stems, require_place
from storage.paths import Folder


def load_ade20k(folder: Folder, split: str, limit: int | None = None) -> Listed[LabelledImage]:
    """ADE20K's 150 classes and 0 for others, split `training` or `validation`; the folder may be the one above
    ADEChallengeData2016. Images and masks must match by name. Raises `DatasetError`."""
    require_plain(split, "the split")
    images = require_place(folder, [f"{place}images/{split}" for place in ("", "ADEChallengeData2016/")])
    pairs = pairs_of_stems(folder, images, images.replace("images/", "annotations/"))
    return masked_images(folder, pairs, "ade20k", limit)
