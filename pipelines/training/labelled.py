"""Examples for readouts: targets from labels, beside them the images for a live model or the maps of a store.

What crosses to the training processes are uint8 images or maps as they are stored, and targets.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.features.join import FeaturesMissing, Join, Wanted, clipped_images, join
from pipelines.features.photos import upright_pixels
from pipelines.features.pictures import draw
from pipelines.features.rows import Rendering
from pipelines.readouts.task import Task
from pipelines.training.data import Example, at_once, open_store
from storage.datasets.files import DatasetError
from storage.datasets.frames import OrientedImage
from storage.datasets.images import orientation_of
from storage.datasets.instances import InstanceArrays
from storage.datasets.labels import LabelledImage
from storage.paths import StorageOptions
from storage.spec import FeatureSpec
from storage.store import FeatureStore

logger = logging.getLogger(__name__)

PIXELS = "pixels"
"""The example's image, uint8 [H, W, 3]."""


def stored_array(level: str) -> str:
    """What an example calls its map of a stored level, whatever the targets beside it are called."""
    return f"stored/{level}"


NOT_THERE = "its features in the store are not there, or not finite"


@dataclass(frozen=True, kw_only=True)
class StoredMaps:
    """Levels of a feature store, and which of its rows is of which item."""

    url: str
    options: StorageOptions
    levels: tuple[str, ...]
    join: Join
    "rows of the items, in their order"

    @classmethod
    def of(
        cls, store: FeatureStore, levels: Sequence[str], items: Sequence[LabelledImage], contents: Sequence[str]
    ) -> "StoredMaps":
        """`contents`: digests of the images' bytes. Raises `FeaturesMissing` where the store doesn't fit the items."""
        wanted = [Wanted.of(item.image, content) for item, content in zip(items, contents, strict=True)]
        joined = join(store, wanted)
        for line in joined.clipped_lines(store.spec.levels, levels):
            logger.warning("%s", line)
        return cls(url=store.folder.url, options=store.folder.options, levels=tuple(levels), join=joined)

    def oriented(self, number: int, item: LabelledImage) -> OrientedImage:
        """How the image of an item was turned when it was extracted. Raises `DatasetError` for one that wasn't."""
        return self.join.rows[number].oriented(open_store(self.url, self.options), item.image)

    def read(self, items: Sequence[int]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Maps [items, h, w, C] by level, and which of the items have them."""
        store, rows = open_store(self.url, self.options), np.array([self.join.rows[i].row for i in items], np.int64)
        maps, there = {}, np.ones(len(rows), bool)
        for level in self.levels:
            maps[level], found = store.read_present(rows, level)
            there &= found & np.isfinite(maps[level]).reshape(len(rows), -1).all(axis=1)
        return maps, there

    def clipped(self, items: Sequence[int], spec: FeatureSpec) -> int:
        """How many of the items have values that float16 couldn't hold, in a store of `spec`."""
        return clipped_images([self.join.rows[i] for i in items], [level for level in spec.levels if level.name in self.levels])


@dataclass(frozen=True, kw_only=True)
class LabelledSource:
    """A data set's images for a task; travels to whoever loads them (pipelines/training/data.py, `ExampleSource`)."""

    items: tuple[LabelledImage, ...]
    contents: tuple[str, ...]
    "digests of the images' bytes"
    task: Task
    spec: FeatureSpec
    rendering: Rendering
    stored: StoredMaps | None
    "None: images for a live model"
    threads: int = 1

    @property
    def named_contents(self) -> list[tuple[str, str]]:
        """Each image's digest, and its place as it may be printed."""
        return [(content, item.image.displayed) for content, item in zip(self.contents, self.items, strict=True)]

    def load(self, rows: Sequence[int], epoch: int | None) -> Example:  # noqa: ARG002 - nothing is random here
        """Arrays of `rows`, in their order: the task's targets, and `pixels` or the stored levels."""
        examples, failed = {}, {}
        for row, example in zip(rows, at_once(self.threads, self._example_or_reason, rows), strict=True):
            if isinstance(example, str):
                failed[row] = example
            else:
                examples[row] = example
        if self.stored is not None and examples:
            maps, there = self.stored.read(list(examples))
            for position, row in enumerate(list(examples)):
                examples[row] |= {stored_array(level): values[position] for level, values in maps.items()}
                if not there[position]:
                    del examples[row]
                    failed[row] = f"{self.items[row].image.displayed}: {NOT_THERE}"
        clipped = 0 if self.stored is None else self.stored.clipped(list(examples), self.spec)
        return Example.of(examples, failed, clipped)

    def _example_or_reason(self, row: int) -> dict[str, np.ndarray] | str:
        try:
            return self._example(row)
        except (DatasetError, FeaturesMissing) as error:
            return str(error)[:500]

    def _example(self, row: int) -> dict[str, np.ndarray]:
        if self.stored is not None:
            return self.task.targets(self.label(row), row)
        item = self.items[row]
        data = item.image.data()
        picture = self.task.input_picture(item.image, self.spec.input_size)
        pixels = draw(picture, data, self.spec, self.rendering)
        label = item.upright_label(OrientedImage(item.image.displayed, orientation_of(data, item.image.displayed)))
        return {PIXELS: pixels, **self.task.targets(label, row)}

    def label(self, row: int) -> np.ndarray | InstanceArrays:
        """A row's label, upright. Raises `DatasetError`."""
        item = self.items[row]
        return item.upright_label(self.stored.oriented(row, item) if self.stored else None)

    def photo(self, row: int) -> np.ndarray:
        """The image as the task places it, for people: uint8 [side, side, 3]."""
        return self.task.photo(upright_pixels(self.items[row].image))
