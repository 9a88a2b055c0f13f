"""EXIF orientation: how an image's stored pixels are turned until it is upright, and labels with them."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

EXIF_ROTATE = "exif-rotate"
"""What a ledger's conversion says of an image that was turned."""

_ORIENTATION_TAG = 0x0112


@dataclass(frozen=True)
class Turn:
    """One of the eight orientations: rows and columns are exchanged first, then the result is mirrored."""

    pillow: Image.Transpose
    exchanges: bool
    mirrors_x: bool
    mirrors_y: bool

    def mirrored_axes(self, axis: int) -> tuple[int, ...]:
        """Those of an array [height, width] from `axis` on that are mirrored."""
        return (axis,) * self.mirrors_y + (axis + 1,) * self.mirrors_x


TURNS: Mapping[int, Turn] = {
    2: Turn(Image.Transpose.FLIP_LEFT_RIGHT, False, True, False),
    3: Turn(Image.Transpose.ROTATE_180, False, True, True),
    4: Turn(Image.Transpose.FLIP_TOP_BOTTOM, False, False, True),
    5: Turn(Image.Transpose.TRANSPOSE, True, False, False),
    6: Turn(Image.Transpose.ROTATE_270, True, True, False),
    7: Turn(Image.Transpose.TRANSVERSE, True, True, True),
    8: Turn(Image.Transpose.ROTATE_90, True, False, True),
}
"""By EXIF orientation; 1, and what EXIF doesn't define, is upright as it is."""


def exif_orientation(image: Image.Image) -> int:
    """As EXIF has it; 1 where there is no EXIF, or none that can be read (browsers show such images, too)."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG)
    except (SyntaxError, ValueError, OSError, struct.error):
        return 1
    return value if isinstance(value, int) else 1


@dataclass(frozen=True, kw_only=True)
class Orientation:
    """How an image file of `width` x `height` stored pixels is turned until it is upright."""

    width: int
    height: int
    exif: int = 1
    "1 to 8"

    @classmethod
    def of(cls, image: Image.Image) -> "Orientation":
        """Of an image that was opened and not yet loaded."""
        exif = exif_orientation(image)
        width, height = image.size
        # Pillow turns TIFFs when it loads them, and gives the size that they will have then.
        if image.format == "TIFF" and exif in TURNS and TURNS[exif].exchanges:
            width, height = height, width
        return cls(width=width, height=height, exif=exif if exif in TURNS else 1)

    @property
    def stored_size(self) -> tuple[int, int]:
        """(width, height) of the file's pixels."""
        return self.width, self.height

    @property
    def upright_size(self) -> tuple[int, int]:
        """(width, height) of the image as it is seen."""
        return (self.height, self.width) if self._turn and self._turn.exchanges else (self.width, self.height)

    def array(self, values: np.ndarray, axis: int = 0) -> np.ndarray:
        """An array of stored pixels, [height, width] from `axis` on, turned upright."""
        if self._turn is None:
            return values
        turned = values.swapaxes(axis, axis + 1) if self._turn.exchanges else values
        return np.ascontiguousarray(np.flip(turned, self._turn.mirrored_axes(axis)))

    def undone(self, values: np.ndarray) -> np.ndarray:
        """An upright array [height, width, ...] as the file stores it: the inverse of `array`."""
        if self._turn is None:
            return values
        mirrored = np.flip(values, self._turn.mirrored_axes(0))
        return np.ascontiguousarray(mirrored.swapaxes(0, 1) if self._turn.exchanges else mirrored)

    def points(self, points_K2: np.ndarray) -> np.ndarray:
        """Points (x, y) that number stored pixels from 0, so that the last one is `width` - 1: the upright image's, float64."""
        return self._moved(points_K2, [side - 1 for side in self.upright_size])

    def edges(self, points_K2: np.ndarray) -> np.ndarray:
        """Points (x, y) measured from the edges of the stored image, which ends at x = `width`: the upright image's, float64."""
        return self._moved(points_K2, self.upright_size)

    def boxes(self, boxes_N4: np.ndarray) -> np.ndarray:
        """Boxes x1, y1, x2, y2 between the edges of stored pixels, so that the whole image ends at `width`: the upright
        image's, float64."""
        corners = self.edges(np.asarray(boxes_N4, np.float64).reshape(-1, 2, 2))
        return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)

    @property
    def _turn(self) -> Turn | None:
        return TURNS.get(self.exif)

    def _moved(self, points_xy: np.ndarray, ends: tuple[int, int] | list[int]) -> np.ndarray:
        """Points [..., 2] turned; `ends`: the largest x and y of the upright image."""
        points = np.asarray(points_xy, np.float64)
        if self._turn is None:
            return points
        moved = points[..., ::-1] if self._turn.exchanges else points
        mirrors = [self._turn.mirrors_x, self._turn.mirrors_y]
        return np.where(mirrors, np.array(ends, np.float64) - moved, moved)
