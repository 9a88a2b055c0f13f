"""TIFFs by their own tags: what Pillow passes over, decodes wrongly, or fills with black."""

import zlib
from collections.abc import Callable

from PIL import ImagePalette, TiffImagePlugin

from operators.codecs import jpeg
from operators.codecs.refusal import ImageDamaged, ImageRefused
from operators.codecs.samples import Samples

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_FILL_ORDER, _STRIPS, _ROWS_PER_STRIP, _STRIP_BYTES = 266, 273, 278, 279
_MAX_VALUE, _PLANAR, _COLORMAP, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES = 281, 284, 320, 322, 323, 324, 325
_SAMPLE_FORMAT, _LOW, _HIGH, _JPEG_TABLES = 339, 340, 341, 347

_NATIVE = {
    "I;16S": "I;16NS", "I;16BS": "I;16NS", "I;32S": "I;32NS", "I;32BS": "I;32NS", "F;32F": "F;32NF", "F;32BF": "F;32NF",
}  # fmt: skip

_KINDS = {1: "uint", 2: "int", 3: "float", 4: "uint"}
_GREY = ("1", "L", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_OLD_JPEG, _JPEG, _DEFLATE = 6, 7, (8, 32946)

_LOWEST_FIRST = 2
_REVERSED = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))
"""Bytes with their bits in the other order, by FillOrder."""

TiffImage = TiffImagePlugin.TiffImageFile


def samples(image: TiffImage) -> Samples:
    """What the values of a grey TIFF mean. Raises `ImageRefused` for tags that Pillow can't follow."""
    tags = image.tag_v2
    bits, kind = int(_first(tags.get(_BITS, 1))), _KINDS.get(int(_first(tags.get(_SAMPLE_FORMAT, 1))), "uint")
    used = int(_first(tags.get(_MAX_VALUE, 0))).bit_length()
    low, high = (tags.get(tag) for tag in (_LOW, _HIGH))
    if image.mode not in _GREY:
        if bits == 16 and (8 < used < 16 or (high is not None and _first(high) < 2**15)):
            raise ImageRefused("a 16-bit colour TIFF whose tags say that it uses fewer bits; convert it to 8 or 16 bit")
        return Samples(bits=bits)
    if _PHOTOMETRIC not in tags:
        raise ImageRefused("a grey TIFF that doesn't say whether zero is black or white (PhotometricInterpretation)")
    # Pillow turns values of up to 8 bits itself.
    inverted = tags[_PHOTOMETRIC] == 0 and bits > 8
    if high is not None:
        black = float(_first(low)) if low is not None else -(2.0 ** (bits - 1)) if kind == "int" else 0.0
        if _first(high) > black:
            return Samples(bits=bits, kind=kind, white_is_zero=inverted, low=black, high=float(_first(high)))
    # MaxSampleValue is often the brightest value there is, so that only its number of bits is taken.
    if kind == "uint" and 8 < used < bits:
        return Samples(bits=used, white_is_zero=inverted, in_full=True)
    return Samples(bits=bits, kind=kind, white_is_zero=inverted, in_full=bits == 12 or bits < 8)


def _first(value: float | tuple[float, ...]) -> float:
    """A tag's value, or that of the first channel where each has its own."""
    return value[0] if isinstance(value, tuple) else value


def check(image: TiffImage, data: bytes, max_pixels: int) -> None:
    """Raise `ImageRefused` for parts that are missing (Pillow shows them black), damaged, or far larger than the image."""
    tags = image.tag_v2
    if tags.get(_COMPRESSION, 1) == _OLD_JPEG:
        return  # which lies anywhere in the file
    tiled, width, height = _TILES in tags, tags[_WIDTH], tags[_HEIGHT]
    part_width = tags.get(_TILE_WIDTH, width) if tiled else width
    part_height = tags.get(_TILE_HEIGHT, height) if tiled else min(tags.get(_ROWS_PER_STRIP, height), height)
    if part_width * part_height > max_pixels:
        raise ImageRefused(f"a TIFF in tiles of {part_width} x {part_height} pixels, more than any image may have")
    offsets, sizes = tags.get(_TILES if tiled else _STRIPS, ()), tags.get(_TILE_BYTES if tiled else _STRIP_BYTES, ())
    planes = len(image.getbands()) if tags.get(_PLANAR, 1) == 2 else 1
    needed = -(-width // part_width) * -(-height // part_height) * planes
    if len(offsets) < needed or not all(offsets[:needed]) or not all(sizes[:needed]):
        raise ImageDamaged(f"a TIFF with {sum(map(bool, offsets))} of its {needed} strips or tiles")
    for number, (offset, size) in enumerate(zip(offsets[:needed], sizes, strict=False)):
        problem = _damage(image, data[offset : offset + size], part_width, part_height)
        if problem:
            raise ImageDamaged(f"part {number} of a TIFF: {problem}")


def _damage(image: TiffImage, part: bytes, width: int, height: int) -> str:
    """What is wrong with a compressed strip or tile where libtiff doesn't look, or nothing."""
    compression, tables = image.tag_v2.get(_COMPRESSION, 1), image.tag_v2.get(_JPEG_TABLES, b"")
    if compression == _JPEG:
        jpeg.check_scans(part, width, height)
        return jpeg.damage(tables[:-2] + part[2:] if tables else part)
    if compression not in _DEFLATE:
        return ""
    if image.tag_v2.get(_FILL_ORDER, 1) == _LOWEST_FIRST:
        part = part.translate(_REVERSED)
    return _deflate_damage(part, 16 * width * height)


def _deflate_damage(part: bytes, limit: int) -> str:
    """What zlib's own check of the whole says, of data that has at most `limit` bytes when it's decompressed."""
    reader, count = zlib.decompressobj(), 0
    try:
        while not reader.eof:
            piece = reader.decompress(reader.unconsumed_tail if count else part, 2**20)
            count += len(piece)
            if not piece or count > limit:
                return "compressed data that ends early, or never"
    except zlib.error as error:
        return str(error)
    return ""


def mend(image: TiffImage) -> list[str]:
    """Set right, before it is loaded, what Pillow takes for something else; the conversions in words."""
    tags = image.tag_v2
    if image.tile and image.tile[0].codec_name == "libtiff":
        # libtiff gives values in this machine's order, which Pillow minds for unsigned ones only.
        _change_raw_mode(image, lambda mode: _NATIVE.get(mode, mode))
    elif tags.get(_PLANAR, 1) == 2 and _first(tags.get(_BITS, 8)) == 16:
        # Pillow reads planes of 16 bits as if they had 8.
        order = "L" if tags.prefix[:2] == b"II" else "B"
        _change_raw_mode(image, lambda mode: f"{mode};16{order}")
    colours = tags.get(_COLORMAP)
    if image.mode in ("P", "PA") and colours and 0 < max(colours) < 256:
        # Old programs wrote colours of 8 bits where 16 belong.
        image.palette = ImagePalette.raw("RGB;L", tuple(colours))
        return ["8-bit colormap"]
    return []


def _change_raw_mode(image: TiffImage, change: Callable[[str], str]) -> None:
    """Have Pillow read the strips or tiles of `image` in the raw mode that `change` gives for the one that it chose."""
    image.tile = [
        tile._replace(args=(change(tile.args[0]), *tile.args[1:])) if isinstance(tile.args, tuple) else tile
        for tile in image.tile
    ]
