"""A vector for every annotated object: COCO's annotations, and the row of a store that is of each one's image."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.features.join import FeaturesMissing, PlacedRow, Wanted, join
from storage.datasets.boxes import coco_box
from storage.datasets.coco import CocoImage, annotation_errors, read_coco
from storage.datasets.files import ItemLeftOut
from storage.datasets.frames import LabelFrame, OrientedImage, label_turn
from storage.datasets.images import keys_of, orientation_of
from storage.datasets.instances import decode_masks, has_mask
from storage.export import empty_target, made_of, vector_column, write_parts
from storage.ledger import image_digest
from storage.orientation import EXIF_ROTATE, Orientation
from storage.paths import Folder, StorageOptions
from storage.pixels import PixelMap
from storage.regions import pooled, region_areas
from storage.sample_images import read_images
from storage.spec import Level
from storage.store import FeatureStore

READ_TOGETHER = 64
"""Images whose maps are read at once."""


@dataclass(frozen=True, kw_only=True)
class RegionExport:
    """What was written, and what wasn't, by reason."""

    rows: int
    files: int
    left_out: Mapping[str, int]
    "annotations without a vector, by reason"


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """COCO's annotation file `name` of `folder`. `boxes`: an object is its box instead of its mask. `frame`: where sizes don't
    tell, whether they are of the image as stored or as it is seen."""

    folder: Folder
    name: str
    boxes: bool = False
    frame: LabelFrame | None = None


def export_regions(
    store: FeatureStore, level: Level, notes: Annotations, target: str, storage_options: StorageOptions | None = None
) -> RegionExport:
    """Write one vector per annotation to `<target>/part-*.parquet`: the mean of the level's cells under its mask or box.

    Columns: row and key (of the store), image (its id), annotation (its id), category (id), seen (share of the object's area
    that the model's input shows), vector (fixed-size list of float32; NaN where nothing of it is shown). Raises `DatasetError`
    for annotations that are none, `FeaturesMissing` where rows are other images' or none of the images is in the store, and
    `StorageError` if `target` holds parts.
    """
    folder = empty_target(target, storage_options)
    images = [image for image in read_coco(notes.folder, notes.name) if image.objects]
    vectors = _Vectors(store, level, notes, storage_options)
    rows, files = write_parts(folder, vectors.tables(vectors.placed(images)), made_of(store, level.name), level.channels)
    left_out = {reason: count for reason, count in vectors.left_out.items() if count}
    return RegionExport(rows=rows, files=files, left_out=left_out)


class _Vectors:
    """Makes the vectors; counts the annotations that get none, by reason."""

    def __init__(self, store: FeatureStore, level: Level, notes: Annotations, storage_options: StorageOptions | None):
        self.store, self.level, self.notes, self.storage_options = store, level, notes, storage_options
        self.left_out: Counter[str] = Counter()

    def placed(self, images: Sequence[CocoImage]) -> list[tuple[CocoImage, PlacedRow]]:
        """Images and their rows that have features, by row. Raises `FeaturesMissing`."""
        numbers = self.store.index.find([key for image in images for key in keys_of(image.file_name)])
        there = []
        for image in images:
            if any(key in numbers for key in keys_of(image.file_name)):
                there.append(image)
            else:
                self.left_out["the image isn't in the store"] += len(image.objects)
        if images and not there:
            raise FeaturesMissing(
                f"{self.store.folder.displayed} has none of the {len(images)} annotated images; the first is "
                f"{images[0].file_name}, and the store's first key is {self.store.index.keys(0, 1)[0]}"
            )
        every = sorted({numbers[key] for image in there for key in keys_of(image.file_name) if key in numbers})
        rows = dict(zip(every, PlacedRow.read(self.store, every), strict=True))
        wanted = [_wanted(image, [rows[numbers[key]] for key in keys_of(image.file_name) if key in numbers]) for image in there]
        both = list(zip(there, join(self.store, wanted, numbers).rows, strict=True))
        self.left_out["the image has no features"] += sum(len(image.objects) for image, row in both if row.lack)
        return sorted((each for each in both if not each[1].lack), key=lambda each: each[1].row)

    def tables(self, placed: Sequence[tuple[CocoImage, PlacedRow]]) -> Iterator[pa.Table]:
        """The vectors of each image's objects."""
        for first in range(0, len(placed), READ_TOGETHER):
            some = placed[first : first + READ_TOGETHER]
            numbers = np.array([row.row for _, row in some])
            maps, places = self.store.read(numbers, self.level.name), self.store.pixel_maps(numbers)
            keys = self.store.index.take(numbers, ["key"])["key"].to_pylist()
            for (image, row), key, map_HWC, place in zip(some, keys, maps, places, strict=True):
                try:
                    turn = self._turn(image, row)
                except ItemLeftOut as error:
                    self.left_out[error.reason] += len(image.objects)
                    continue
                yield self._table(image, row, key, turn, map_HWC, place)

    def _table(
        self, image: CocoImage, row: PlacedRow, key: str, turn: Orientation, map_HWC: np.ndarray, place: PixelMap
    ) -> pa.Table:
        regions, sizes = _regions(self.notes, image, turn)
        with annotation_errors(self.notes.folder, self.notes.name, image):
            categories = [each["category_id"] for each in image.objects]
        areas = region_areas(regions, self.level, place, self.store.spec.input_size)
        seen = np.divide(areas.sum(axis=(1, 2)), sizes, out=np.zeros(len(sizes)), where=sizes > 0)
        n = len(image.objects)
        columns = {
            "row": np.full(n, row.row),
            "key": [key] * n,
            "image": np.full(n, image.number),
            "annotation": pa.array([each.get("id") for each in image.objects], pa.int64()),
            "category": np.array(categories, np.int64),
            "seen": np.minimum(seen, 1).astype(np.float32),
        }
        return pa.table({**columns, "vector": vector_column(pooled(map_HWC, areas))})

    def _turn(self, image: CocoImage, row: PlacedRow) -> Orientation:
        """How the image's annotations are turned onto the upright image. The store doesn't know how it was turned, if it was:
        then its bytes are read. Raises `FrameUnknown`, and `ItemLeftOut` where they aren't there any more."""
        if EXIF_ROTATE not in (row.conversion or ""):
            return Orientation(width=image.width, height=image.height)
        urls = [source.url for source in self.store.index.sources]
        data = read_images(self.store.index.take(np.array([row.row])), urls, self.storage_options)[0] or b""
        if row.digest not in (None, image_digest(data)):
            raise ItemLeftOut(image.file_name, "its EXIF turns it, and its source, which would tell how, holds another image now")
        found = OrientedImage(image.file_name, orientation_of(data, image.file_name))
        return label_turn(found, (image.width, image.height), self.notes.frame)


def _wanted(image: CocoImage, rows: Sequence[PlacedRow]) -> Wanted:
    """What is looked for: the annotated size, or that of the image turned by its EXIF, which annotations may not know of."""
    turned = (image.height, image.width)
    is_turned = any(EXIF_ROTATE in (row.conversion or "") and row.size == turned for row in rows)
    size = turned if is_turned else (image.width, image.height)
    return Wanted(displayed=image.file_name, keys=keys_of(image.file_name), digest=None, size=lambda: size)


def _regions(notes: Annotations, image: CocoImage, turn: Orientation) -> tuple[np.ndarray, np.ndarray]:
    """The objects on the upright image, masks bool [N, height, width] or boxes [N, 4], and the area of each in pixels."""
    sides = np.array([image.width, image.height] * 2, np.float64)
    with annotation_errors(notes.folder, notes.name, image) as displayed:
        if lacking := [each for each in image.objects if not (notes.boxes or has_mask(each))]:
            raise ValueError(f"annotation {lacking[0].get('id', '')} has no segmentation; --boxes takes the boxes")
        if notes.boxes:
            boxes = np.clip([coco_box(each, image.width, image.height) for each in image.objects], 0, sides)
            return turn.boxes(boxes), (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    masks = decode_masks(image.objects, image.height, image.width, displayed)
    return turn.array(masks, axis=1), masks.sum(axis=(1, 2)).astype(np.float64)
