"""JPEGs with nothing passed over in silence: libjpeg only warns of damage, and Pillow doesn't say that it did.

simplejpeg decodes with the same library (libjpeg-turbo) and raises at its warnings; its pixels are Pillow's.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from operators.codecs.refusal import ImageDamaged, ImageRefused

MAX_SCANNED_PIXELS = 2**32
"""Of pixels x scans: the decoder goes over the whole image once a scan, at about 1 ns a pixel. Real files have 10 scans."""

_DAMAGE = re.compile(
    r"Corrupt JPEG data: (?!\d+ extraneous bytes|bad ICC)|Premature end of JPEG|Inconsistent progression sequence"
)
"""Warnings that mean wrong pixels. Others are of bytes between the parts, or of what is written in headers."""

MAX_GPU_PIXELS = 2**24
"""Of a JPEG that is decoded on a GPU, whose memory models need: 15 bytes a pixel while it is resized."""

_UNKNOWN_SAMPLING = "Could not determine subsampling level"
"""What TurboJPEG says of chroma in other proportions than the usual ones, which it doesn't decode, but Pillow does."""

UNCHECKED = "chroma subsampled in a way of which damage can't be seen"

_NEXT_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
"""Behind entropy-coded data, whose own 0xff is followed by 0, and which holds restart markers."""

_SOI, _EOI, _SOS, _PROGRESSIVE = 0xD8, 0xD9, 0xDA, (0xC2, 0xC6, 0xCA, 0xCE)
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_GPU_FRAMES = (0xC0, 0xC2)
"""Baseline, and progressive by Huffman's codes."""

_GPU_SAMPLINGS = frozenset({(1, 1), (2, 1), (2, 2), (1, 2), (4, 1), (4, 2)})
"""Luma samples for one of chroma, across and down: 4:4:4, 4:2:2, 4:2:0, 4:4:0, 4:1:1 and 4:1:0."""
_WITHOUT_LENGTH = frozenset({0x01, _SOI, *range(0xD0, 0xD8)})


@dataclass(frozen=True)
class Segment:
    """A marker with what belongs to it: bytes `start` to `stop`, of which the parameters end at `data`."""

    marker: int
    start: int
    data: int
    stop: int


def segments(jpeg: bytes) -> Iterator[Segment]:
    """The parts of a JPEG up to its end marker, each scan with its entropy-coded data."""
    position = 0
    while found := _NEXT_MARKER.search(jpeg, position):
        marker, position = found[1][0], found.end()
        if marker == _EOI:
            return
        if marker in _WITHOUT_LENGTH:
            continue
        data = position + int.from_bytes(jpeg[position : position + 2], "big")
        behind = _NEXT_MARKER.search(jpeg, data) if marker == _SOS else None
        stop = data if marker != _SOS else behind.start() if behind else len(jpeg)
        yield Segment(marker, found.end() - 2, data, stop)
        position = max(stop, position + 2)


def check_scans(jpeg: bytes, width: int, height: int) -> None:
    """Raise `ImageRefused` for more scans than can be decoded in seconds."""
    limit = MAX_SCANNED_PIXELS // (width * height)
    # Counting bytes finds too many in some files (thumbnails, appended videos) and never too few.
    if jpeg.count(b"\xff\xda") > limit:
        scans = sum(segment.marker == _SOS for segment in segments(jpeg))
        if scans > limit:
            raise ImageRefused(f"a JPEG of {width} x {height} pixels with {scans:,} scans: more than {limit:,} never end")


def load(image: Image.Image, jpeg: bytes) -> tuple[Image.Image, list[str]]:
    """Decode `jpeg`, which Pillow opened as `image`, at that image's size; also what the decoder warned of.

    Raises `ImageDamaged` where pixels are missing or wrong, and what Pillow raises.
    """
    _check_progression(jpeg)
    colours = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}[image.mode]
    try:
        pixels = simplejpeg.decode_jpeg(jpeg, colours, min_height=image.height, min_width=image.width, strict=True)
    except ValueError as error:
        return _load_with_warning(image, jpeg, str(error))
    if colours == "CMYK" or pixels.shape[:2] != (image.height, image.width):
        image.load()  # which inverts Adobe's CMYK
        return image, []
    return Image.fromarray(pixels[..., 0] if image.mode == "L" else pixels), []


def _load_with_warning(image: Image.Image, jpeg: bytes, warning: str) -> tuple[Image.Image, list[str]]:
    image.load()
    if _UNKNOWN_SAMPLING in warning:
        return image, [UNCHECKED]
    if not _DAMAGE.match(warning):
        # libjpeg gives its first warning only: this one may stand before another.
        warning = damage(jpeg) or warning
    if _DAMAGE.match(warning):
        raise ImageDamaged(warning)
    return image, [warning]


def damage(jpeg: bytes) -> str:
    """What the decoder says of damage in the scans, whatever the other parts hold, or nothing."""
    warning = _warning(without_remarks(jpeg))
    return warning if _DAMAGE.match(warning) else ""


def _warning(jpeg: bytes) -> str:
    """The decoder's first one, or nothing: all of the coefficients are read, and hardly any pixels made."""
    try:
        simplejpeg.decode_jpeg(jpeg, "GRAY", min_height=1, min_width=1, strict=True)
    except ValueError as error:
        return str(error)
    return ""


def without_remarks(jpeg: bytes) -> bytes:
    """The JPEG without what is written beside its pixels: EXIF, colour profiles, thumbnails, comments, what follows its end."""
    kept = [s for s in segments(jpeg) if s.marker not in range(0xE0, 0xF0) and s.marker != 0xFE]
    return b"".join([b"\xff\xd8", *(jpeg[s.start : s.stop] for s in kept), b"\xff\xd9"])


def is_for_gpu(jpeg: bytes) -> bool:
    """Whether nvJPEG is documented to decode the file, and libjpeg reads it to its end without a warning.

    By NVIDIA's "nvJPEG", section 1.1: baseline or progressive, of 8 bits, by Huffman's codes, in the six usual subsamplings. Of
    colours it says nothing, so that only grey and what is YCbCr without doubt count. The file's bytes alone decide.
    """
    parts = list(segments(jpeg))
    frames = [part for part in parts if part.marker in _FRAMES]
    if len(frames) != 1 or frames[0].marker not in _GPU_FRAMES:
        return False
    frame = jpeg[frames[0].start + 4 : frames[0].data]
    if len(frame) < 9 or len(frame) != 6 + 3 * frame[5] or frame[0] != 8:
        return False
    if not 0 < int.from_bytes(frame[1:3], "big") * int.from_bytes(frame[3:5], "big") <= MAX_GPU_PIXELS:
        return False
    components, factors = frame[6::3], [(each >> 4, each & 15) for each in frame[7::3]]
    adobe = [jpeg[part.start + 4 : part.data] for part in parts if part.marker == 0xEE]
    if len(components) == 3:
        # Adobe's mark says RGB by 0; without any, libjpeg goes by the components' numbers.
        is_known = bytes(components) == b"\1\2\3" and all(said[:5] == b"Adobe" and said[11:12] == b"\1" for said in adobe)
        is_known &= factors[0] in _GPU_SAMPLINGS and factors[1:] == [(1, 1), (1, 1)]
    else:
        is_known = len(components) == 1 and factors == [(1, 1)] and not adobe
    if not is_known:
        return False
    try:
        _check_progression(jpeg)
    except ImageDamaged:
        return False
    return not _warning(jpeg)


def _check_progression(jpeg: bytes) -> None:
    """Raise `ImageDamaged` where the last scans of a progressive JPEG are missing: a valid, coarser file to libjpeg."""
    parts = iter(segments(jpeg))
    frame = next((part for part in parts if part.marker in _FRAMES), None)
    if frame is None or frame.marker not in _PROGRESSIVE:
        return
    count = jpeg[frame.start + 9]
    missing = {jpeg[frame.start + 10 + 3 * i]: np.full(64, 16) for i in range(count)}
    "by component: bits of each coefficient that are still to come"
    for scan in parts:
        if scan.marker == _SOS:
            n = jpeg[scan.start + 4]
            first, last, low = jpeg[scan.data - 3], jpeg[scan.data - 2], jpeg[scan.data - 1] & 15
            for i in range(n):
                component = jpeg[scan.start + 5 + 2 * i]
                if component in missing:
                    missing[component][first : last + 1] = low
    if any(bits.any() for bits in missing.values()):
        raise ImageDamaged("a progressive JPEG that ends before its last scans")
