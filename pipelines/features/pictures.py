"""Images as a protocol has them drawn for a model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from operators.image import Geometry, ImageRefused, decode
from pipelines.config import ConfigError
from pipelines.features.photos import MAX_PIXELS, upright_pixels
from pipelines.features.rows import Rendering, Size
from storage.datasets.images import EncodedImage, unreadable
from storage.spec import FeatureSpec

Geometries = Literal["pad", "squash", "crop"] | None
"""How jobs/extract.py places images just as a protocol does; None: in no way."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image as a protocol feeds it to the model."""

    image: EncodedImage
    size: Size
    "of the model's input"
    draw: Callable[[np.ndarray], np.ndarray]
    "uint8 [height, width, 3] of the upright original to uint8 [*size, 3], as the protocol's code does it"
    geometry: Geometries
    "of jobs/extract.py, where it places the image just so; None: none does"


@dataclass(frozen=True, kw_only=True)
class Squash:
    """Draws images at `size`, whatever their aspect, by Pillow's interpolation, which is antialiased."""

    size: Size
    interpolation: Literal["bilinear", "bicubic"]

    def __call__(self, pixels_HW3: np.ndarray) -> np.ndarray:
        method = Image.Resampling[self.interpolation.upper()]
        return np.array(Image.fromarray(pixels_HW3).resize((self.size[1], self.size[0]), method))

    def of(self, image: EncodedImage) -> Picture:
        """The image drawn so."""
        return Picture(image=image, size=self.size, draw=self, geometry="squash")


def draw(picture: Picture, data: bytes, spec: FeatureSpec, rendering: Rendering) -> np.ndarray:
    """The upright picture as the model's input, uint8 [*picture.size, 3]; `data`: the image's bytes.

    Raises `DatasetError` where the image can't be decoded.
    """
    if rendering == "paper":
        return picture.draw(upright_pixels(picture.image, data))
    if picture.geometry is None:
        raise ConfigError(
            "this protocol's images are placed as jobs/extract.py can't: use --drawing paper, and no --stores"
        )
    height, width = picture.size
    geometry = Geometry(
        mode=picture.geometry, height=height, width=width, interpolation=spec.interpolation, mean=spec.mean
    )
    try:
        return decode(data, geometry, max_pixels=MAX_PIXELS).pixels
    except ImageRefused as error:
        raise unreadable(picture.image.shown, error) from None
