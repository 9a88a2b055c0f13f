"""JPEG 2000 by its own header: Pillow scales other depths than 8 bits by shifting, which loses black or white."""

import struct
from dataclasses import dataclass

from PIL import Image

from operators.codecs.refusal import ImageRefused

MAX_TILE_COMPONENTS = 2**16
"""OpenJPEG sets up a few kilobytes for each tile and component before it decodes any."""


@dataclass(frozen=True)
class CodestreamHeader:
    """Of a codestream: `depths` in bits, by component, and the number of tiles."""

    depths: tuple[int, ...]
    tiles: int


def read_header(data: bytes) -> CodestreamHeader:
    """Raises `ImageRefused` for data without a codestream's header."""
    start = data.find(b"\xff\x4f\xff\x51")
    if start < 0 or len(data) < start + 42:
        raise ImageRefused("a JPEG 2000 without a codestream")
    _, _, width, height, _, _, tile_width, tile_height, tile_left, tile_top, count = struct.unpack_from(
        ">HHIIIIIIIIH", data, start + 4
    )
    depths = tuple((data[start + 42 + 3 * i] & 0x7F) + 1 for i in range(count) if start + 42 + 3 * i < len(data))
    if not tile_width or not tile_height or len(depths) < count:
        raise ImageRefused("a JPEG 2000 with a damaged header")
    tiles = -(-(width - tile_left) // tile_width) * -(-(height - tile_top) // tile_height)
    return CodestreamHeader(depths, tiles)


def check(image: Image.Image, header: CodestreamHeader) -> None:
    """Raise `ImageRefused` for what Pillow decodes to wrong pixels, and for tiles beyond number."""
    if header.tiles * len(header.depths) > MAX_TILE_COMPONENTS:
        raise ImageRefused(f"a JPEG 2000 in {header.tiles:,} tiles")
    depth = max(header.depths, default=8)
    if image.mode == "I;16" and depth <= 16:
        return
    if depth > 8:
        raise ImageRefused(f"a {depth}-bit {image.mode} JPEG 2000, of which white can't be told from black; convert it to PNG")
    if depth < 8 and (image.mode == "P" or len(set(header.depths)) > 1):
        raise ImageRefused(f"a JPEG 2000 of {depth} bits and mode {image.mode}; convert it to PNG")


def widened(image: Image.Image, header: CodestreamHeader) -> Image.Image:
    """A loaded image of fewer than 8 bits, which lie in the upper ones, over the whole range."""
    depth = max(header.depths, default=8)
    if depth >= 8:
        return image
    full = 255 & ~(2 ** (8 - depth) - 1)
    return image.point([min(255, round(255 * value / full)) for value in range(256)] * len(image.getbands()))
