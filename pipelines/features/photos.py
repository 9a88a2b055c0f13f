"""Photographs as pixels: of data sets, upright; and those behind stored rows, read again and placed as the model saw them."""

import logging
from dataclasses import dataclass

import numpy as np

from operators.image import Geometry, ImageRefused, decode, open_rgb
from storage.datasets.frames import require_size
from storage.datasets.images import EncodedImage, orientation_of, unreadable
from storage.ledger import image_digest
from storage.paths import StorageError, StorageOptions
from storage.redaction import redact
from storage.sample_images import read_images
from storage.spec import FeatureSpec
from storage.store import FeatureStore

logger = logging.getLogger(__name__)

MAX_PIXELS = 2**40
"""Of a data set's image, or one that was extracted: Pillow's own limit holds."""


def upright_pixels(image: EncodedImage, data: bytes | None = None) -> np.ndarray:
    """The image's pixels as extraction decodes them, upright: uint8 [height, width, 3]. `data`: its bytes, where they were read.

    Raises `DatasetError`, also where its annotation says another size.
    """
    data = image.data() if data is None else data
    if image.width:
        require_size(image.displayed, orientation_of(data, image.displayed), (image.width, image.height))
    try:
        pixels, _, _ = open_rgb(data, max_pixels=MAX_PIXELS)
    except ImageRefused as error:
        raise unreadable(image.displayed, error) from None
    return np.array(pixels)


def geometry_of(spec: FeatureSpec) -> Geometry:
    """How images become the model's input under `spec`."""
    return Geometry(
        mode=spec.geometry,
        height=spec.input_size[0],
        width=spec.input_size[1],
        crop_pct=spec.crop_pct,
        interpolation=spec.interpolation,
        mean=spec.mean,
    )


@dataclass(frozen=True)
class NoPhoto:
    """Why there is no photograph of a row, in words for people, without credentials."""

    reason: str


def read_photos(store: FeatureStore, rows: np.ndarray, storage_options: StorageOptions | None = None) -> list[np.ndarray | None]:
    """The model's input of each row, uint8 [height, width, 3]; None, with a warning, where the source can't be read or holds
    another image by now."""
    photos: list[np.ndarray | None] = []
    for row, found in zip(rows, try_photos(store, rows, storage_options), strict=True):
        if isinstance(found, NoPhoto):
            logger.warning("no photograph for row %d: %s", row, found.reason)
        photos.append(None if isinstance(found, NoPhoto) else found)
    return photos


def try_photos(
    store: FeatureStore, rows: np.ndarray, storage_options: StorageOptions | None = None
) -> list[np.ndarray | NoPhoto]:
    """`read_photos`, with the reason where there is none."""
    digests = store.records(rows, ["digest"])["digest"].to_pylist()
    urls, geometry = [source.url for source in store.index.sources], geometry_of(store.spec)
    table = store.index.take(rows)
    photos: list[np.ndarray | NoPhoto] = []
    for i, digest in enumerate(digests):
        try:
            blob = read_images(table.slice(i, 1), urls, storage_options)[0]  # a frame at a time: they aren't compressed
            if digest not in (None, image_digest(blob or b"")):
                raise StorageError("its source holds another image than the one that was extracted")
            # The ledger says whether it was accepted once; the limit on pixels was that run's.
            photos.append(decode(blob or b"", geometry, max_pixels=MAX_PIXELS).pixels)
        except (OSError, ImageRefused, StorageError) as error:
            photos.append(NoPhoto(redact(f"{type(error).__name__}: {error}", storage_options)))
    return photos
