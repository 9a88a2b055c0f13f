"""The photographs behind stored rows, read again from their sources and placed as the model saw them."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from operators.image import Geometry, ImageRefused, decode
from storage.ledger import image_digest
from storage.paths import StorageError
from storage.samples import read_images
from storage.spec import FeatureSpec
from storage.store import FeatureStore

logger = logging.getLogger(__name__)


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


def read_photos(
    store: FeatureStore, rows: np.ndarray, storage_options: Mapping[str, Any] | None = None
) -> list[np.ndarray | None]:
    """The model's input of each row, uint8 [height, width, 3]; None, with a warning, where the source can't be read or holds
    another image by now."""
    digests = store.records(rows, ["digest"])["digest"].to_pylist()
    urls, geometry = [source.url for source in store.index.sources], geometry_of(store.spec)
    table = store.index.take(rows)
    photos: list[np.ndarray | None] = []
    for i, row in enumerate(rows):
        try:
            blob = read_images(table.slice(i, 1), urls, storage_options)[0]
            if digests[i] not in (None, image_digest(blob or b"")):
                raise StorageError("its source holds another image than the one that was extracted")
            # The ledger says whether it was accepted once; the limit on pixels was that run's.
            photos.append(decode(blob or b"", geometry, max_pixels=2**40).pixels)
        except (OSError, ImageRefused, StorageError) as error:
            logger.warning("no photograph for row %d: %s: %s", row, type(error).__name__, error)
            photos.append(None)
    return photos
