"""How much memory decoding takes, estimated from an image's header, and kept below a bound while many are decoded."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from operators.codecs.refusal import ImageRefused

BYTES_PER_PIXEL = 16
"""What the largest accepted image may take while it is decoded: four copies of 4 bytes a pixel."""

_PIXEL_BYTES = {
    "JPEG": 14, "MPO": 14, "PNG": 12, "BMP": 9, "DIB": 9, "PPM": 9, "TGA": 9, "GIF": 13, "TIFF": 12,
    "JPEG2000": 32,  # OpenJPEG computes in 32-bit integers, on a copy for the tiles
}  # fmt: skip
"""Bytes a pixel at the peak: the decoder's own (coefficients of a progressive JPEG), its result, and the RGB of that."""

_OTHER_PIXEL_BYTES = 24
"""WebP, AVIF and others decode onto canvases of their own first."""


def decode_bytes(image: Image.Image) -> int:
    """An estimate from above of what decoding an opened, not yet loaded image to RGB takes, in bytes."""
    per_pixel = _PIXEL_BYTES.get(image.format or "", _OTHER_PIXEL_BYTES)
    if image.has_transparency_data:
        per_pixel += 4
    return image.width * image.height * per_pixel


class DecodeMemory:
    """At most `max_pixels` x `BYTES_PER_PIXEL` bytes for all images that one process decodes at a time."""

    def __init__(self, max_pixels: int):
        self.capacity = max_pixels * BYTES_PER_PIXEL
        self._used = 0
        self._freed = threading.Condition()
        self._turn = threading.Lock()

    @contextmanager
    def hold(self, image: Image.Image) -> Iterator[None]:
        """Wait until there is room to decode an opened image. Raises `ImageRefused` for one that never has room."""
        needed = decode_bytes(image)
        if needed > self.capacity:
            raise ImageRefused(
                f"{image.width} x {image.height} pixels of {image.format} take about {needed:,} bytes to decode, more than "
                f"{self.capacity:,}; raise --max-image-pixels (each pixel is {BYTES_PER_PIXEL} bytes)"
            )
        with self._turn, self._freed:  # in turn, so that small images don't pass a large one for ever
            self._freed.wait_for(lambda: self._used + needed <= self.capacity)
            self._used += needed
        try:
            yield
        finally:
            with self._freed:
                self._used -= needed
                self._freed.notify_all()
