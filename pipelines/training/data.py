"""Images for training: which, in which order, and decoded ahead of the loop.

The order is computed from numbers alone (`TrainOrder`), and so is what is drawn for each image: neither depends on how many
processes there are or on where a run was interrupted. What crosses Ray's object store are uint8 images, and features as they
are stored. No torch here: the decoding processes start faster without.
"""

import functools
import json
import threading
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import Field, asdict, dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
from PIL import Image

from operators.codecs.refusal import ImageRefused
from operators.image import Geometry, fit, limit_pillow, open_rgb
from pipelines.executors import Executor
from pipelines.features.join import Join, Wanted, clipped_images, join
from pipelines.training.augment import colour_jitter, random_part, training_view
from storage.datasets.images import orientation_of
from storage.documents import JsonObject
from storage.ledger import image_digest
from storage.paths import Folder, StorageOptions
from storage.sample_images import Unread, try_images
from storage.samples import SampleIndex
from storage.store import FeatureStore
from storage.tars import AT

# --- order ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Images of one forward: part `part` of the batch of step `step`, both from 0."""

    step: int
    part: int
    epoch: int
    rows: tuple[int, ...]
    "of the index"


@dataclass(frozen=True, kw_only=True)
class TrainOrder:
    """Which images each step takes: every row once an epoch, in an order drawn from (seed, epoch).

    A batch is cut into micro-batches, and those are shared out: what is averaged, and what BatchNorm sees together, is the
    same for any number of workers. An epoch's last batch is what is left, as LiFT has it; with few images in it, some
    workers have none.
    """

    n_rows: int
    batch: int
    micro_batch: int
    epochs: int
    seed: int
    max_steps: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.n_rows // self.batch)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        steps = self.epochs * self.steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    @property
    def fewest(self) -> int:
        """Images of the smallest micro-batch."""
        batches = [self.n_rows - self.batch * at for at in (0, min(self.steps, self.steps_per_epoch) - 1)]
        whole = [min(self.batch, left) for left in batches]
        return min(images % self.micro_batch or self.micro_batch for images in whole)

    def rows(self, step: int) -> np.ndarray:
        """Rows of the batch of a step (from 0), int64."""
        epoch, at = divmod(step, self.steps_per_epoch)
        return _permutation(self.seed, epoch, self.n_rows)[at * self.batch : (at + 1) * self.batch]

    def micro_batches(self, first_step: int, rank: int = 0, world: int = 1) -> Iterator[MicroBatch]:
        """What a worker reads from a step on to the end of the run."""
        for step in range(first_step, self.steps):
            rows, epoch = self.rows(step).tolist(), step // self.steps_per_epoch
            starts = range(0, len(rows), self.micro_batch)
            for part in np.array_split(np.arange(len(starts)), world)[rank].tolist():
                chosen = rows[starts[part] : starts[part] + self.micro_batch]
                yield MicroBatch(step=step, part=part, epoch=epoch, rows=tuple(chosen))


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n_rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n_rows)


# --- decoding ---------------------------------------------------------------------------------------------------------


class View(Protocol):
    """What is made of an image file: the arrays of one training example, the same names and shapes for every image."""

    def __call__(self, blob: bytes, rng: np.random.Generator | None, max_pixels: int) -> dict[str, np.ndarray]:
        """`rng` draws what is random; without one, nothing is. Raises `ImageRefused`."""


@dataclass(frozen=True, kw_only=True)
class JitteredView:
    """The image at a geometry's size, cropped, flipped and its colours jittered: `pixels`, uint8 [H, W, 3]; in a `corner`,
    `shown`, its height and width there, int64 [2].

    `crop`: the smallest side of a random part of the image, of its own aspect; below 1, half of the images are mirrored, too.
    """

    geometry: Geometry
    jitter: float = 0.0
    crop: float = 1.0

    def __call__(self, blob: bytes, rng: np.random.Generator | None, max_pixels: int) -> dict[str, np.ndarray]:
        image, _, _ = open_rgb(blob, max_pixels=max_pixels)
        if rng is not None and self.crop < 1:
            image = random_part(image, rng, self.crop)
        pixels = fit(image, self.geometry)
        if rng is not None and self.jitter:
            pixels = np.asarray(colour_jitter(Image.fromarray(pixels), rng, (self.jitter,) * 4))
        return {"pixels": pixels, **_shown("shown", image, self.geometry)}


@dataclass(frozen=True, kw_only=True)
class SidesView:
    """The image as squares of several sides, placed by one geometry: uint8 [side, side, 3], named by the side; in a `corner`, its
    height and width there, int64 [2], as `shown SIDE`."""

    geometry: Geometry
    sides: tuple[int, ...]

    def __call__(self, blob: bytes, rng: np.random.Generator | None, max_pixels: int) -> dict[str, np.ndarray]:  # noqa: ARG002
        image, _, _ = open_rgb(blob, max_pixels=max_pixels)
        made: dict[str, np.ndarray] = {}
        for side in self.sides:
            geometry = replace(self.geometry, height=side, width=side)
            made |= {str(side): fit(image, geometry), **_shown(f"shown {side}", image, geometry)}
        return made


def _shown(name: str, image: Image.Image, geometry: Geometry) -> dict[str, np.ndarray]:
    if geometry.mode != "corner":
        return {}
    width, height = geometry.place(*image.size).resized
    return {name: np.array([height, width], np.int64)}


@dataclass(frozen=True, kw_only=True)
class CanvasView:
    """ViT-Up's view (pipelines/training/augment.py): `teacher` and `canvas`, uint8 [S, S, 3], and `box`, float32 [4].

    Without a generator, nothing is changed in the square, and what must be chosen is drawn from the file's own bytes.
    """

    size: int
    strength: float = 1.0

    def __call__(self, blob: bytes, rng: np.random.Generator | None, max_pixels: int) -> dict[str, np.ndarray]:
        image, _, _ = open_rgb(blob, max_pixels=max_pixels)
        strength = 0.0 if rng is None else self.strength
        rng = np.random.default_rng(zlib.crc32(blob)) if rng is None else rng
        return asdict(training_view(np.asarray(image), rng, size=self.size, strength=strength))


@dataclass(frozen=True, kw_only=True)
class StoredFeatures:
    """One level of a feature store, looked up by the keys and the bytes of the images."""

    url: str
    options: StorageOptions
    level: str
    numbers: JsonObject
    "all that makes the features' numbers"

    def read(self, blobs: Mapping[str, bytes]) -> tuple[np.ndarray, dict[str, str], int]:
        """Rows [keys, h, w, C] of images by key, NaN where there are none; why there are none, by key; and how many of the
        images have values that float16 couldn't hold.

        Raises `FeaturesMissing` where a key's row is another image's.
        """
        keys, store = list(blobs), open_store(self.url, self.options)
        joined = self.join(blobs)
        places = {key: keys.index(key) for key in joined.by_image}
        values, there = store.read_present(np.array([row.row for row in joined.rows], np.int64), self.level)
        out = np.full((len(keys), *values.shape[1:]), np.nan, values.dtype)
        out[list(places.values())] = values
        found = {key for key, is_there in zip(places, there, strict=True) if is_there}
        missing = {key: f"no features in {store.folder.displayed}" for key in keys if key not in found}
        return out, missing, clipped_images(joined.rows, [store.level(self.level)])

    def join(self, blobs: Mapping[str, bytes]) -> Join:
        """Of those images that the store has a row of. Raises `FeaturesMissing` where one of these is another image's."""
        store = open_store(self.url, self.options)
        numbers = store.index.find(list(blobs))
        return join(store, [_wanted(key, blob) for key, blob in blobs.items() if key in numbers], numbers)


def _wanted(key: str, blob: bytes) -> Wanted:
    return Wanted(displayed=key, keys=(key,), digest=image_digest(blob), size=lambda: orientation_of(blob, key).upright_size)


def open_store(url: str, options: StorageOptions) -> FeatureStore:
    """The store, opened once in each process."""
    return _open_store(url, json.dumps(dict(options), sort_keys=True))


@functools.lru_cache(maxsize=4)
def _open_store(url: str, options: str) -> FeatureStore:
    return FeatureStore.open(url, json.loads(options))


@dataclass(frozen=True, kw_only=True)
class Example:
    """Arrays of several images, stacked, and why some are missing from them."""

    arrays: Mapping[str, np.ndarray]
    "empty where no image could be read"
    failed: Mapping[int, str]
    "by row"
    clipped: int = 0
    "images of whose stored features float16 couldn't hold some values"

    @classmethod
    def of(cls, examples: Mapping[int, Mapping[str, np.ndarray]], failed: Mapping[int, str], clipped: int = 0) -> "Example":
        """Of each image's arrays, by row."""
        names = next(iter(examples.values()), {})
        return cls(arrays={n: np.stack([e[n] for e in examples.values()]) for n in names}, failed=failed, clipped=clipped)


class ExampleSource(Protocol):
    """Where examples come from; a dataclass that travels to whoever loads them."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def threads(self) -> int:
        """Images of a micro-batch that are decoded at once."""

    def load(self, rows: Sequence[int], epoch: int | None) -> Example:
        """Arrays of `rows`, in their order, as drawn for `epoch` (None: with nothing random)."""


Asked = TypeVar("Asked")
Made = TypeVar("Made")


def at_once(threads: int, make: Callable[[Asked], Made], images: Sequence[Asked]) -> list[Made]:
    """What `make` gives of each image, in their order, in so many threads of this process, which all that it loads share."""
    return list(map(make, images) if threads == 1 else _threads(threads).map(make, images))


@functools.lru_cache(maxsize=2)
def _threads(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "decoder")


_COLUMNS = ("key", "source", "offset", "size", "problem", AT.name)
"""Of the index, what loading needs."""

_KEPT_BYTES = 2**26
"""Of the index, in each process that loads: batches take rows from anywhere in it."""

_indexes: dict[tuple[str, str], SampleIndex] = {}
_indexes_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """Where images come from and how they become arrays; travels to whoever decodes."""

    folder: Folder
    "holds the index"
    digest: str
    "of the index"
    urls: tuple[str, ...]
    "the index's sources, with credentials"
    options: StorageOptions
    max_image_pixels: int
    seed: int
    view: View
    features: StoredFeatures | None = None
    "adds the array `features` of the images, from a store"
    threads: int = 1

    def load(self, rows: Sequence[int], epoch: int | None) -> Example:
        """Faults of the storage are raised: an image that can't be had today is no damaged image. One that can't be read while
        others can is."""
        limit_pillow(self.max_image_pixels)
        index = self.index
        table = index.take(np.array(rows, np.int64), [name for name in index.columns if name in _COLUMNS])
        found = try_images(table, self.urls, self.options)
        unread = {row: blob.message for row, blob in zip(rows, found, strict=True) if isinstance(blob, Unread)}
        blobs = [blob if isinstance(blob, bytes) else b"" for blob in found]
        records = dict(zip(rows, table.to_pylist(), strict=True))
        examples: dict[int, dict[str, np.ndarray]] = {}
        failed: dict[int, str] = {}

        def one(image: tuple[int, bytes]) -> dict[str, np.ndarray] | str:
            row, blob = image
            rng = None if epoch is None else np.random.default_rng([self.seed, epoch, row])
            return records[row]["problem"] or unread.get(row) or self._view(blob, records[row]["size"], rng)

        for row, example in zip(records, at_once(self.threads, one, list(zip(records, blobs, strict=True))), strict=True):
            if isinstance(example, str):
                failed[row] = f"{records[row]['key']}: {example}"[:500]
            else:
                examples[row] = example
        clipped = 0
        if self.features is not None:
            keys = {row: records[row]["key"] for row in examples}
            there = dict(zip(records, blobs, strict=True))
            values, missing, clipped = self.features.read({key: there[row] for row, key in keys.items()})
            for value, (row, key) in zip(values, keys.items(), strict=True):
                if key in missing:
                    failed[row] = f"{key}: {missing[key]}"
                    del examples[row]
                else:
                    examples[row]["features"] = value
        return Example.of(examples, failed, clipped)

    @property
    def index(self) -> SampleIndex:
        """Opened once in each process: by its digest, for another run may have replaced it."""
        name = (self.folder.url, self.digest)
        with _indexes_lock:
            if name not in _indexes:
                _indexes[name] = SampleIndex(self.folder, kept_bytes=_KEPT_BYTES)
            return _indexes[name]

    def at_sides(self, rows: Sequence[int], geometry: Geometry, sides: Sequence[int]) -> Example:
        """The images at several sizes, each decoded once, as `SidesView` has them."""
        view = SidesView(geometry=geometry, sides=tuple(sides))
        return replace(self, view=view, features=None).load(rows, None)

    def _view(self, blob: bytes, size: int, rng: np.random.Generator | None) -> dict[str, np.ndarray] | str:
        if len(blob) < size:
            return f"{len(blob)} of {size} bytes: the source is shorter than when indexed"
        try:
            return self.view(blob, rng, self.max_image_pixels)
        except ImageRefused as error:
            return f"{error.kind}: {error}"


# --- ahead of the loop ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A micro-batch and what could be read of it."""

    item: MicroBatch
    example: Example

    def __len__(self) -> int:  # images that could be read
        return len(self.item.rows) - len(self.example.failed)

    @property
    def rows(self) -> list[int]:
        """Of the images that could be read, in the arrays' order."""
        return [row for row in self.item.rows if row not in self.example.failed]


def generator(purpose: int, *numbers: int) -> np.random.Generator:
    """Random numbers of, say, a run's seed and a step: each `purpose` has its own, and none are those of images as they are
    read."""
    return np.random.default_rng(np.random.SeedSequence(numbers, spawn_key=(purpose,)))


MOST_LOADERS = 32
"""Micro-batches that are loaded at once by default, for one training process."""


def load(
    source: ExampleSource, items: Iterable[MicroBatch], executor: Executor, loaders: int | None, processes: int = 1
) -> Generator[Loaded, None, None]:
    """Micro-batches in order, loaded ahead by so many threads or, anywhere in a cluster, processes; to be closed.

    By default there are as many as there are CPUs for each of the `processes` that train together, but for the one that it has
    itself; where there are fewer, each decodes several images of its micro-batch at once.
    """
    cpus = max(1, executor.cpus() // processes)
    count = loaders or max(2, min(MOST_LOADERS, cpus - 1))
    # Threads of one process share what is there.
    threads = cpus if executor.loads_here else max(1, cpus // count)
    return executor.map(functools.partial(_load, replace(source, threads=threads)), items, loaders=count)


def _load(source: ExampleSource, item: MicroBatch) -> Loaded:
    return Loaded(item=item, example=source.load(item.rows, item.epoch))
