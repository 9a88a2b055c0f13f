"""Image bytes to the uint8 array a backbone takes, and the exact map from original pixels to that array.

An image is data from a stranger: whatever Pillow can decode becomes upright 8-bit RGB with every conversion stated; the
rest raises, with a reason, and costs no more memory than `max_pixels` allows. What is particular to a format is in `codecs/`.
"""

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from operators.codecs import jpeg, jpeg2000, png, slow, tiff
from operators.codecs.memory import DecodeMemory
from operators.codecs.refusal import ImageDamaged, ImageRefused
from operators.codecs.rgb import stored_bits, to_rgb
from operators.codecs.samples import Samples
from operators.codecs.warned import decoder_warnings
from storage.orientation import EXIF_ROTATE, TURNS, Orientation, Turn, exif_orientation

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO")
"""What Pillow may open. It knows more, and starts Ghostscript on the program that an EPS file is."""

MAX_RLE_PIXELS = 2**24
"""Of a run-length encoded BMP, which Pillow decodes in Python: a few bytes can mean a second for each million pixels."""

MAX_RESIZED_PIXELS = 2**24
"""Above this, only the visible part of a resized image is computed: a 3 x 4000 image never becomes 224 x 298,667."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where an image of one size lands in the model's input: (x, y) -> (x_scale * x + x_offset, y_scale * y + y_offset).

    The image is resized to `resized` (width, height), and its upper left corner lies at `corner` (x, y) of the input,
    negative where the image reaches beyond it.
    """

    x_scale: float
    x_offset: float
    y_scale: float
    y_offset: float
    resized: tuple[int, int]
    corner: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How any image becomes `height` x `width` pixels.

    `crop`: resized, aspect kept, until it covers the input divided by `crop_pct` (for a square: short side =
    floor(size / crop_pct), long side rounded down), then the centre is cut out, as torchvision's Resize and CenterCrop do.
    `squash`: resized to the input, aspect not kept. `pad`: resized, aspect kept, until it fits; centred on the mean colour.
    `corner`: as `pad`, but in the upper left corner and by `fitted_size`, as detectors have it (ViTDet).
    """

    mode: Literal["crop", "squash", "pad", "corner"]
    height: int
    width: int
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def place(self, width: int, height: int) -> Placement:
        """The placement of a `width` x `height` image."""
        if self.mode == "squash":
            return _placement(width, height, (self.width, self.height), (0, 0))
        if self.mode == "corner":
            h, w = fitted_size((height, width), (self.height, self.width))
            return _placement(width, height, (w, h), (0, 0))
        if self.mode == "pad":
            scale = min(self.width / width, self.height / height)
            w, h = max(1, round(width * scale)), max(1, round(height * scale))
            return _placement(width, height, (w, h), ((self.width - w) // 2, (self.height - h) // 2))
        cover_w, cover_h = math.floor(self.width / self.crop_pct), math.floor(self.height / self.crop_pct)
        # The side that binds is exact, the other one rounds down: torchvision's rule for a short side.
        if cover_w * height >= cover_h * width:
            w, h = cover_w, max(cover_h, cover_w * height // width)
        else:
            w, h = max(cover_w, cover_h * width // height), cover_h
        return _placement(width, height, (w, h), (-round((w - self.width) / 2), -round((h - self.height) / 2)))


def fitted_size(size: tuple[int, int], into: tuple[int, int]) -> tuple[int, int]:
    """The largest (height, width) of an image's aspect that fits into another; halves are rounded up.

    Into a square as detectron2's ResizeShortestEdge reckons, the shorter side first, so that rounding is the same.
    """
    scale = min(inside / side for inside, side in zip(into, size, strict=True))
    sides = [scale * side for side in size]
    if into[0] == into[1]:
        shorter = min(size)
        enlarged = [float(into[0]) if side == shorter else into[0] / shorter * side for side in size]
        sides = [side * (into[0] / max(enlarged)) for side in enlarged]
    height, width = (max(1, int(side + 0.5)) for side in sides)
    return height, width


def _placement(width: int, height: int, resized: tuple[int, int], corner: tuple[int, int]) -> Placement:
    x, y = ((resized[i] / side, float(corner[i])) for i, side in enumerate((width, height)))
    return Placement(x_scale=x[0], x_offset=x[1], y_scale=y[0], y_offset=y[1], resized=resized, corner=corner)


@dataclass(frozen=True, kw_only=True)
class DecodedImage:
    """`pixels` uint8 [height, width, 3] of the model's input, and how they came about."""

    pixels: np.ndarray
    width: int
    "of the upright original, in pixels"
    height: int
    placement: Placement
    conversion: str
    "what was done beyond decoding, or empty"


class GpuDecoder(Protocol):
    """What decodes, turns and places JPEGs on a GPU: `operators.nvjpeg.Nvjpeg`, which needs torch."""

    def __call__(
        self, opened: Image.Image, data: bytes, turn: Turn | None, placement: Placement, geometry: Geometry
    ) -> np.ndarray | None:
        """`data`, which Pillow opened, as uint8 [height, width, 3] of the model's input; None where it doesn't take it."""


ON_GPU, NOT_ON_GPU = "nvjpeg", "libjpeg for nvjpeg"
"""What a ledger's conversion says of a JPEG that a GPU decoded, and of one that it refused."""


def decode(
    data: bytes,
    geometry: Geometry,
    *,
    max_pixels: int,
    draft: bool = False,
    gpu: GpuDecoder | None = None,
    memory: DecodeMemory | None = None,
) -> DecodedImage:
    """Decode image bytes and bring them to the input's size.

    `draft` lets JPEG decode at 1/2, 1/4 or 1/8 scale while that stays at least twice the needed size: several times faster
    on large photos, not the same pixels. `gpu` decodes the JPEGs that are for it (`codecs.jpeg.is_for_gpu`). `memory` is waited
    for. Raises what `open_rgb` raises, and `GpuDecoderFailed`.
    """
    at_least = (2 * geometry.width, 2 * geometry.height) if draft else None
    with decoder_warnings() as warned:
        opened = _open(data, max_pixels)
        with memory.hold(opened) if memory else nullcontext():
            pixels, (width, height), placement, conversions = _placed(opened, data, geometry, at_least, gpu)
    conversion = ", ".join([*conversions, *_warnings(warned, opened)])
    return DecodedImage(pixels=pixels, width=width, height=height, placement=placement, conversion=conversion)


_Placed: TypeAlias = tuple[np.ndarray, tuple[int, int], Placement, list[str]]
"""Pixels of the model's input, (width, height) of the upright image, where it was placed, and conversions in words."""


def _placed(
    opened: ImageFile.ImageFile, data: bytes, geometry: Geometry, at_least: tuple[int, int] | None, gpu: GpuDecoder | None
) -> _Placed:
    is_for_gpu = opened.format == "JPEG" and gpu is not None and jpeg.is_for_gpu(data)
    if gpu and is_for_gpu and (found := _placed_by(gpu, opened, data, geometry)):
        return found
    image, size, conversions = _load_rgb(opened, data, at_least)
    placement = geometry.place(*size)
    return resample(image, placement, geometry), size, placement, [*conversions, *([NOT_ON_GPU] if is_for_gpu else [])]


def _placed_by(gpu: GpuDecoder, opened: Image.Image, data: bytes, geometry: Geometry) -> _Placed | None:
    """What a GPU makes of a JPEG, which is given it without EXIF, so that it's turned once; None where it doesn't take it."""
    turn, size = TURNS.get(exif_orientation(opened)), Orientation.of(opened).upright_size
    placement = geometry.place(*size)
    pixels = gpu(opened, jpeg.without_remarks(data), turn, placement, geometry)
    return None if pixels is None else (pixels, size, placement, [*([EXIF_ROTATE] if turn else []), ON_GPU])


def limit_pillow(max_pixels: int) -> None:
    """Set Pillow's own guard in this process, which by default only warns up to twice its limit; have it give memory back."""
    Image.MAX_IMAGE_PIXELS = max_pixels
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    # Blocks of at most 32 MB, as Pillow's are, stay with glibc when they are freed: for each thread, those of its largest image.
    Image.core.set_block_size(2**26)  # type: ignore[attr-defined]  # documented, but not in the module's list of names


def fit(image: Image.Image, geometry: Geometry) -> np.ndarray:
    """An RGB image at the input's size, uint8 [H, W, 3]."""
    return resample(image, geometry.place(*image.size), geometry)


def open_rgb(data: bytes, *, max_pixels: int) -> tuple[Image.Image, tuple[int, int], str]:
    """Decode image bytes: upright 8-bit RGB, its (width, height), and what was converted, in words.

    Raises `ImageRefused` for whatever is wrong with the bytes, and `MemoryError`, which says nothing about them.
    """
    with decoder_warnings() as warned:
        opened = _open(data, max_pixels)
        rgb, size, conversions = _load_rgb(opened, data, None)
    return rgb, size, ", ".join([*conversions, *_warnings(warned, opened)])


@contextmanager
def _refusing() -> Iterator[None]:
    """Pillow raises a dozen types on damaged files; out of here comes one."""
    try:
        yield
    except (ImageRefused, MemoryError):
        raise
    except Exception as error:  # what plugins raise on damaged headers isn't limited
        raise ImageDamaged.by(error) from error


@_refusing()
def _open(data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """The image, not loaded yet, its header held against what may be decoded."""
    if not data:
        raise ImageRefused("the image has 0 bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        kind = "a TIFF" if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") else "an image"
        raise ImageRefused(f"not {kind} that Pillow can read (the first bytes are {data[:12]!r})") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageRefused(_too_large(re.sub(r".*\((\d+) pixels\).*", r"\1", str(error)), max_pixels)) from None
    _check_size(image, max_pixels)
    if isinstance(image, JpegImageFile):
        jpeg.check_scans(data, *image.size)
    elif isinstance(image, TiffImageFile):
        tiff.check(image, data, max_pixels)
    elif image.format == "PNG":
        png.check(data)
    elif image.format == "JPEG2000":
        jpeg2000.check(image, jpeg2000.read_header(data))
    return image


def _check_size(image: ImageFile.ImageFile, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise ImageRefused(_too_large(f"{image.width} x {image.height}", max_pixels))
    if any(tile.codec_name == "bmp_rle" for tile in image.tile) and image.width * image.height > MAX_RLE_PIXELS:
        raise ImageRefused(f"a run-length encoded BMP of {image.width} x {image.height} pixels; convert it to PNG")


@_refusing()
def _load_rgb(
    opened: ImageFile.ImageFile, data: bytes, at_least: tuple[int, int] | None
) -> tuple[Image.Image, tuple[int, int], list[str]]:
    """Upright 8-bit RGB of an opened image, its (width, height), and the conversions in words.

    With `at_least` = (width, height), a JPEG may come at 1/2, 1/4 or 1/8 of its size while it stays larger than that.
    """
    width, height = opened.size
    if at_least and opened.format == "JPEG":
        opened.draft("RGB", at_least)
    # Not n_frames, which walks through all of them.
    conversions = ["first-frame"] if getattr(opened, "is_animated", False) else []
    turned_by_pillow = opened.format == "TIFF" and exif_orientation(opened) in TURNS
    image, samples, said = _load(opened, data)
    turn = TURNS.get(exif_orientation(opened))
    if turn:
        image = image.transpose(turn.pillow)
        if turn.exchanges:
            width, height = height, width
    if turn or turned_by_pillow:
        conversions.append(EXIF_ROTATE)
    rgb, conversion = to_rgb(image, samples)
    return rgb, (width, height), [*conversions, *([conversion] if conversion else []), *said]


def _load(opened: ImageFile.ImageFile, data: bytes) -> tuple[Image.Image, Samples, list[str]]:
    """The decoded image, what its values mean, and what is to be said of it."""
    if isinstance(opened, JpegImageFile):
        image, warned = jpeg.load(opened, data)
        return image, Samples(), [f"warned: {text}" for text in warned]
    if isinstance(opened, TiffImageFile):
        samples, said = tiff.samples(opened), tiff.mend(opened)
        opened.load()
        return opened, samples, said
    # Pillow brings the values of a PGM to 16 bits by the file's own maximum.
    samples = Samples(bits=stored_bits(opened), in_full=opened.format in ("JPEG2000", "PPM"))
    slow.prepare(opened, data)
    opened.load()
    if opened.format == "JPEG2000":
        return jpeg2000.widened(opened, jpeg2000.read_header(data)), samples, []
    return opened, samples, []


def _warnings(texts: Sequence[str], image: Image.Image) -> list[str]:
    """Pillow's warnings as conversions. Those of EXIF say nothing about pixels, but in a TIFF, whose tags are like EXIF."""
    said = [text for text in texts if image.format == "TIFF" or "EXIF" not in text]
    more = [] if len(said) <= _SAID else ["and more"]
    return [f"warned: {text}" for text in [*said[:_SAID], *more]]


_SAID = 4
"""Warnings that are said of one image."""


def _too_large(size: str, limit: int) -> str:
    return f"{size} pixels are more than max_image_pixels = {limit}; raise --max-image-pixels if that is no attack"


def resample(image: Image.Image, placement: Placement, geometry: Geometry) -> np.ndarray:
    """An upright RGB image, brought to where `placement` has it: uint8 [height, width, 3] of the model's input."""
    (w, h), (x, y) = placement.resized, placement.corner
    method = Image.Resampling[geometry.interpolation.upper()]
    if x >= 0 and y >= 0:
        part = image.resize((w, h), method)
        if (w, h) == (geometry.width, geometry.height):
            return np.array(part)
        mean = tuple(round(255 * value) for value in geometry.mean)
        canvas = Image.new("RGB", (geometry.width, geometry.height), mean)
        canvas.paste(part, (x, y))
        return np.array(canvas)
    window = (-x, -y, geometry.width - x, geometry.height - y)
    if w * h <= MAX_RESIZED_PIXELS:
        return np.array(image.resize((w, h), method).crop(window))
    # Kernels read past the box, so this differs from the line above only in rounding and clipping between Pillow's two passes.
    scale_x, scale_y = w / image.width, h / image.height
    box = (window[0] / scale_x, window[1] / scale_y, window[2] / scale_x, window[3] / scale_y)
    box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))
    return np.array(image.resize((geometry.width, geometry.height), method, box=box))
