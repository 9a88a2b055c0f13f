"""What an evaluation reads features from: the interface of a live model and of stores, and what both share.

Maps are made one image at a time, so that an image's features don't depend on which others are evaluated beside it, nor on
how many workers there are. The low-resolution row and the bilinear rows are made here, by the same code for both sources.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.features.clipping import ClippedCounts
from pipelines.features.pictures import Picture
from pipelines.features.rows import Row, Size
from storage.datasets.frames import OrientedImage
from storage.datasets.images import EncodedImage
from storage.paths import StorageError
from storage.spec import FeatureSpec, Level

CACHE_BYTES = 2**29
"""Maps that one worker keeps for images that come again."""


class FeatureSource(Protocol):
    """Features of images, from wherever they are."""

    device: torch.device
    "where its tensors are, and what is done with them is to be done"
    clipped: ClippedCounts
    "what float16 couldn't hold, of the maps and vectors that were asked for"

    def rows(self, size: Size) -> tuple[Row, ...]:
        """What is evaluated for inputs of `size`; the low-resolution map first, then bilinear ones, then the methods'."""

    def require(self, image: EncodedImage, size: Size) -> None:
        """Raises `ItemLeftOut` where there are no features of the image for inputs of `size`: its extraction failed, or it can't
        be read."""

    def oriented(self, image: EncodedImage, size: Size) -> OrientedImage:
        """How the image was turned for the maps of inputs of `size`: what `label_turn` needs. Raises `DatasetError`,
        `StorageError`."""

    def maps(self, picture: Picture) -> dict[str, Tensor]:
        """Float32 [h, w, C] by row name, of the upright image, on `device`."""

    def pooled(self, picture: Picture) -> Tensor | None:
        """The CLS vector, float32 [C] on `device`; None where no level is one. Cheap right after `maps` of the same picture."""


def maps_by_row(rows: Sequence[Row], by_level: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Float32 maps by row name: levels as they are, and the low-resolution map enlarged bilinearly. Raises `StorageError` for NaN
    and infinity; `name` is what they are of."""
    maps: dict[str, Tensor] = {}
    for row in rows:
        if row.level is not None:
            maps[row.name] = by_level[row.level].float()
        else:
            low = maps["low-res"].permute(2, 0, 1)[None]
            enlarged = F.interpolate(low, size=row.grid, mode="bilinear", align_corners=False)
            maps[row.name] = enlarged[0].permute(1, 2, 0).contiguous()
    _require_finite(maps.values(), name)
    return maps


def finite_vector(values_C: Tensor, name: str) -> Tensor:
    """In float32. Raises `StorageError` for NaN and infinity."""
    _require_finite([values_C.float()], name)
    return values_C.float()


def _require_finite(features: Iterable[Tensor], name: str) -> None:
    # Their extremes are NaN or infinite where any value is.
    extremes = [extreme for each in features for extreme in each.aminmax()]
    if not torch.stack(extremes).isfinite().all():
        raise StorageError(f"{name}: its features hold NaN or infinity")


def own_maps(levels: Sequence[Level]) -> Sequence[Level]:
    """The backbone's own."""
    return [level for level in levels if level.method == "backbone" and level.grid]


def distinct(images: Sequence[EncodedImage]) -> list[EncodedImage]:
    """Each image once."""
    return list({image.displayed: image for image in images}.values())


def in_words(spec: FeatureSpec) -> str:
    """What the features are, for people: all that `FeatureSpec` says, but for how images are placed and the levels."""
    what = {"token": "tokens", "key": "keys", "query": "queries", "value": "values"}[spec.facet]
    layers, norm = " ".join(map(str, spec.layers)), ", normalised" if spec.norm else ""
    made = f"{spec.model}, {spec.weights_source} weights {spec.weights[:12]}"
    return f"{made}, {what} of block {layers}{norm}, stride {spec.stride}, {spec.precision}"


class CachedSource:
    """A source that keeps the maps used last, where they are, at most `max_bytes` of them, or of one image."""

    def __init__(self, source: FeatureSource, max_bytes: int = CACHE_BYTES):
        self.source, self.max_bytes, self.device, self.clipped = source, max_bytes, source.device, source.clipped
        self._kept: OrderedDict[tuple[str, Size], dict[str, Tensor]] = OrderedDict()
        self._oriented: dict[tuple[str, Size], OrientedImage] = {}

    def rows(self, size: Size) -> tuple[Row, ...]:
        return self.source.rows(size)

    def require(self, image: EncodedImage, size: Size) -> None:
        self.source.require(image, size)

    def oriented(self, image: EncodedImage, size: Size) -> OrientedImage:
        name = image.displayed, size
        if name not in self._oriented:
            self._oriented[name] = self.source.oriented(image, size)
        return self._oriented[name]

    def maps(self, picture: Picture) -> dict[str, Tensor]:
        name = picture.image.displayed, picture.size
        if name not in self._kept:
            self._kept[name] = self.source.maps(picture)
            while len(self._kept) > 1 and self._bytes() > self.max_bytes:
                self._kept.popitem(last=False)
        self._kept.move_to_end(name)
        self.clipped.use(picture, "maps")
        return self._kept[name]

    def _bytes(self) -> int:
        return sum(each.nbytes for maps in self._kept.values() for each in maps.values())

    def pooled(self, picture: Picture) -> Tensor | None:
        self.clipped.use(picture, "pooled")
        return self.source.pooled(picture)
