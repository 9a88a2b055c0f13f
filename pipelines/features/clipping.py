"""Values that float16 couldn't hold in what an evaluation reads, counted by image: the same live and from a store."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipelines.features.pictures import Picture
from pipelines.features.rows import Size
from storage.spec import Level
from storage.totals import KEEP_THEM, clipped_text

if TYPE_CHECKING:
    from torch import Tensor

What = Literal["maps", "pooled"]
"""What is asked for of a picture: all its maps, or its CLS vector."""


@dataclass(frozen=True, kw_only=True)
class ClippedImage:
    """An image, at one size of the input, of whose features float16 couldn't hold some values."""

    image: str
    size: Size
    "of the model's input"
    values: int
    "that have float16's largest value instead"
    of: int
    "float16 values in all"


@dataclass(frozen=True, kw_only=True)
class ClippedFeatures:
    """All such images of an evaluation."""

    images: int
    values: int
    of: int
    "float16 values of those images in all"
    first: str | None
    "the first of them"

    @classmethod
    def of_images(cls, found: Iterable[ClippedImage]) -> "ClippedFeatures":
        """The sum, each image at each size once."""
        each = {(image.image, image.size): image for image in found}
        values, of = (sum(getattr(image, name) for image in each.values()) for name in ("values", "of"))
        images = sorted({image for image, _ in each})
        return cls(images=len(images), values=values, of=of, first=next(iter(images), None))

    def __str__(self) -> str:
        return f"{clipped_text(f'{self.images:,} images', self.values, self.of, f'the first: {self.first}')}; {KEEP_THEM}"


class ClippedCounts:
    """Counts, by image, of values that float16 couldn't hold in what a source gave."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, Size, What], list[tuple[Tensor | int, int]]] = {}
        self._used: set[tuple[str, Size, What]] = set()

    def add(self, picture: Picture, what: What, counts: "Mapping[str, Tensor | int]", levels: Sequence[Level]) -> None:
        """`counts` by float16 level, maybe still on their device, in the picture's maps or vector."""
        sizes = {level.name: math.prod(level.row_shape) for level in levels}
        self._found[picture.image.displayed, picture.size, what] = [(n, sizes[name]) for name, n in counts.items()]

    def use(self, picture: Picture, what: What) -> None:
        """Note that what is being done rests on the picture's maps or vector."""
        self._used.add((picture.image.displayed, picture.size, what))

    def take(self) -> list[ClippedImage]:
        """The images with such values among those that were used since the last call, also where they were kept from before."""
        sums: dict[tuple[str, Size], list[tuple[int, int]]] = {}
        for image, size, what in sorted(self._used):
            counts = [(int(n), of) for n, of in self._found.get((image, size, what), ())]
            self._found[image, size, what] = list(counts)
            sums.setdefault((image, size), []).extend(counts)
        self._used = set()
        found = {name: tuple(map(sum, zip(*counts, strict=True))) for name, counts in sums.items() if counts}
        return [ClippedImage(image=image, size=size, values=n, of=of) for (image, size), (n, of) in found.items() if n]
