"""Examples for detectors: images in squares, and what is left of their annotated objects there.

Images have different numbers of objects, so that an example's arrays hold those of all its images one after the other, with
counts. Outlines travel as they are: masks are drawn where the proposals are, in the training process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from operators.vitdet.augment import LargeScaleJitter, Objects, cropped, resized
from operators.vitdet.input import resize
from pipelines.features.photos import upright_pixels
from pipelines.training.data import Example, at_once
from storage.datasets.files import DatasetError
from storage.datasets.frames import OrientedImage
from storage.datasets.images import orientation_of
from storage.datasets.instances import Outline
from storage.datasets.labels import LabelledImage

PIXELS, SIZES, COUNTS = "pixels", "sizes", "counts"
_CLASSES, _PARTS, _CORNERS, _POINTS, _BITS = "classes", "parts", "corners", "points", "bits"
_IS_PIXELS = -1
"""In the place of the number of an object's polygons: it is pixels."""


@dataclass(frozen=True, kw_only=True)
class ObjectSource:
    """A data set's images with their objects; travels to whoever loads them (pipelines/training/data.py, `ExampleSource`)."""

    items: tuple[LabelledImage, ...]
    contents: tuple[str, ...]
    "digests of the images' bytes"
    categories: tuple[int, ...]
    "the data set's ids by class"
    jitter: LargeScaleJitter
    "its square is that of all images; of those without an epoch, nothing is drawn"
    seed: int
    threads: int = 1

    @property
    def named_contents(self) -> list[tuple[str, str]]:
        """Each image's digest, and its place as it may be printed."""
        return [(content, item.image.displayed) for content, item in zip(self.contents, self.items, strict=True)]

    def load(self, rows: Sequence[int], epoch: int | None) -> Example:
        """Arrays of `rows` as drawn for `epoch`, for `unpacked`; None: images as a detector is given them."""
        found: dict[int, tuple[np.ndarray, Objects]] = {}
        failed: dict[int, str] = {}
        for row, example in zip(rows, at_once(self.threads, lambda row: self._example_or_reason(row, epoch), rows), strict=True):
            if isinstance(example, str):
                failed[row] = example
            else:
                found[row] = example
        return Example(arrays=packed(list(found.values()), self.jitter.side) if found else {}, failed=failed)

    def _example_or_reason(self, row: int, epoch: int | None) -> tuple[np.ndarray, Objects] | str:
        rng = None if epoch is None else np.random.default_rng([self.seed, epoch, row])
        try:
            return self._example(row, rng)
        except DatasetError as error:
            return str(error)[:500]

    def _example(self, row: int, rng: np.random.Generator | None) -> tuple[np.ndarray, Objects]:
        item = self.items[row]
        data = item.image.data()
        pixels = upright_pixels(item.image, data)
        told = item.upright_outlines(OrientedImage(item.image.displayed, orientation_of(data, item.image.displayed)))
        objects = Objects(classes=np.searchsorted(self.categories, told.categories), outlines=told.outlines)
        if rng is not None:
            return self.jitter(pixels, objects, self.jitter.draw(rng))
        return fitted(pixels, objects, self.jitter.side)


def fitted(pixels_HW3: np.ndarray, objects: Objects, side: int) -> tuple[np.ndarray, Objects]:
    """An image as a detector is given it, its longer side at `side` pixels, with its objects."""
    small = np.asarray(resize(Image.fromarray(pixels_HW3), side))
    height, width = small.shape[:2]
    before = pixels_HW3.shape[0], pixels_HW3.shape[1]
    outlines = [cropped(resized(each, before, (height, width)), 0, 0, width, height) for each in objects.outlines]
    return small, Objects(classes=objects.classes, outlines=outlines).with_extent()


# --- as arrays --------------------------------------------------------------------------------------------------------


def packed(examples: Sequence[tuple[np.ndarray, Objects]], side: int) -> dict[str, np.ndarray]:
    """Images of at most `side` pixels a side and their objects, as arrays of numbers alone."""
    pixels = np.zeros((len(examples), side, side, 3), np.uint8)
    for square, (image, _) in zip(pixels, examples, strict=True):
        square[: image.shape[0], : image.shape[1]] = image
    outlines = [outline for _, objects in examples for outline in objects.outlines]
    polygons = [each for outline in outlines if isinstance(outline, tuple) for each in outline]
    bits = [np.packbits(outline) for outline in outlines if not isinstance(outline, tuple)]
    return {
        PIXELS: pixels,
        SIZES: np.array([image.shape[:2] for image, _ in examples], np.int64),
        COUNTS: np.array([len(objects.outlines) for _, objects in examples], np.int64),
        _CLASSES: np.concatenate([objects.classes for _, objects in examples]).astype(np.int64),
        _PARTS: np.array([len(each) if isinstance(each, tuple) else _IS_PIXELS for each in outlines], np.int64),
        _CORNERS: np.array([len(each) for each in polygons], np.int64),
        _POINTS: np.concatenate([np.zeros((0, 2)), *polygons]),
        _BITS: np.concatenate([np.zeros(0, np.uint8), *bits]),
    }


def unpacked(arrays: Mapping[str, np.ndarray]) -> list[tuple[np.ndarray, Objects]]:
    """What `packed` was given."""
    polygons = iter(np.split(arrays[_POINTS], np.cumsum(arrays[_CORNERS])[:-1]) if len(arrays[_CORNERS]) else ())
    bits, first = arrays[_BITS], 0
    found, number = [], 0
    for square, (height, width), count in zip(arrays[PIXELS], arrays[SIZES].tolist(), arrays[COUNTS].tolist(), strict=True):
        outlines: list[Outline] = []
        for parts in arrays[_PARTS][number : number + count].tolist():
            if parts == _IS_PIXELS:
                end = first + -(-height * width // 8)
                outlines.append(np.unpackbits(bits[first:end], count=height * width).reshape(height, width).astype(bool))
                first = end
            else:
                outlines.append(tuple(next(polygons) for _ in range(parts)))
        classes = arrays[_CLASSES][number : number + count]
        found.append((square[:height, :width], Objects(classes=classes, outlines=outlines)))
        number += count
    return found
