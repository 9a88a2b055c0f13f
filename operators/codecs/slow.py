"""What Pillow decodes in Python, a value at a time, decoded here by whole runs and arrays: to the same bytes.

PPM and PGM of other ranges than 8 and 16 bits, their text forms, and run-length encoded BMP. A small file could otherwise mean
many seconds.
"""

import io
import re

import numpy as np
from PIL import Image, ImageFile

_TEXT_BLOCK = 2**22
"""Bytes of a text form that are parsed at a time."""

_LONGEST = 10
"""Characters of a value in a text form, as Pillow has it."""


def prepare(opened: ImageFile.ImageFile, data: bytes) -> None:
    """Have an opened image that Pillow would decode in Python load what is decoded here. Raises `ValueError` for damage."""
    if len(opened.tile) != 1:
        return
    tile = opened.tile[0]
    args = tile.args if isinstance(tile.args, tuple) else (tile.args,)
    step = 1  # rows from the top
    if tile.codec_name == "ppm":
        rawmode, values = _binary(opened, data, tile.offset, int(args[-1]))
    elif tile.codec_name == "ppm_plain" and opened.mode == "1":
        rawmode, values = _bits(opened, data, tile.offset)
    elif tile.codec_name == "ppm_plain":
        rawmode, values = _text(opened, data, tile.offset, int(args[-1]))
    elif tile.codec_name == "bmp_rle":
        rawmode = "L" if opened.mode in ("1", "L") else "P"
        values, step = _runs(opened.size, data, tile.offset, is_4_bit=bool(args[1])), int(args[-1])
    else:
        return
    opened.fp = io.BytesIO(values)
    opened.tile = [ImageFile._Tile("raw", tile.extents, 0, (rawmode, 0, step))]


def _count(opened: ImageFile.ImageFile) -> int:
    return opened.width * opened.height * Image.getmodebands(opened.mode)


def _scaled(opened: ImageFile.ImageFile, largest: int) -> np.ndarray:
    """What each value from 0 to `largest` becomes: int32 for mode I, whose range is 16 bits, else uint8."""
    full, kind = (65535, "<i4") if opened.mode == "I" else (255, np.uint8)
    return np.array([min(full, round(value / largest * full)) for value in range(largest + 1)], kind)


def _binary(opened: ImageFile.ImageFile, data: bytes, offset: int, largest: int) -> tuple[str, bytes]:
    count, kind = _count(opened), np.dtype(np.uint8 if largest < 256 else ">u2")
    if len(data) - offset < count * kind.itemsize:
        raise ValueError("not enough image data")
    table = _scaled(opened, largest)
    # A value beyond the range is as bright as can be.
    values = table[np.minimum(np.frombuffer(data, kind, count, offset), largest)]
    return _rawmode(opened), values.tobytes()


def _rawmode(opened: ImageFile.ImageFile) -> str:
    return "I;32" if opened.mode == "I" else opened.mode


def _without_comments(data: bytes, offset: int) -> bytes:
    text = data[offset:]
    return re.sub(rb"#[^\r\n]*[\r\n]?", b"", text) if b"#" in text else text


def _bits(opened: ImageFile.ImageFile, data: bytes, offset: int) -> tuple[str, bytes]:
    bits = b"".join(_without_comments(data, offset).split())[: _count(opened)]
    if bits.strip(b"01"):
        raise ValueError("a text bitmap with other characters than 0 and 1")
    if len(bits) < _count(opened):
        raise ValueError("not enough image data")
    return "1;8", bits.translate(bytes.maketrans(b"01", b"\xff\0"))


def _text(opened: ImageFile.ImageFile, data: bytes, offset: int, largest: int) -> tuple[str, bytes]:
    text, table, count = _without_comments(data, offset), _scaled(opened, largest), _count(opened)
    out, at, done = bytearray(), 0, 0
    space = re.compile(rb"\s|$")
    while done < count and at < len(text):
        end = at + _TEXT_BLOCK
        found = space.search(text, end) if end < len(text) else None
        end = found.start() if found else len(text)
        tokens = text[at:end].split()[: count - done]
        if max(map(len, tokens), default=0) > _LONGEST:  # which would make an array of as many bytes for each
            raise ValueError(f"a value of more than {_LONGEST} characters")
        values = np.array(tokens, np.bytes_).astype(np.int64) if tokens else np.empty(0, np.int64)
        if len(values) and not 0 <= values.min() <= values.max() <= largest:
            raise ValueError(f"a value beyond the range of 0 to {largest}")
        out += table[values].tobytes()
        at, done = end, done + len(values)
    if done < count:
        raise ValueError("not enough image data")
    return _rawmode(opened), bytes(out)


_PAIRS = [bytes((byte >> 4, byte & 15)) for byte in range(256)]


def _runs(size: tuple[int, int], data: bytes, at: int, *, is_4_bit: bool) -> bytes:
    """Rows from the bottom, a byte a pixel. The rules for what runs over a row's end are Pillow's."""
    width, whole = size[0], size[0] * size[1]
    # Each pixel may have a run of its own, each row an end: more is there to keep a decoder busy.
    last = min(len(data), at + 4 * (whole + size[1]) + 1024)
    out, x = bytearray(), 0
    while len(out) < whole and at + 1 < last:
        count, value = data[at], data[at + 1]
        at += 2
        if count:
            count = min(count, max(0, width - x))
            out += (_PAIRS[value] * (count // 2 + 1))[:count] if is_4_bit else data[at - 1 : at] * count
            x += count
        elif value == 0:
            out += bytes(-len(out) % width)
            x = 0
        elif value == 1:
            break
        elif value == 2:
            if at + 2 > last:
                break
            out += bytes(min(whole - len(out), data[at] + data[at + 1] * width))
            at, x = at + 2, len(out) % width
        else:
            count = min(whole - len(out), value)
            n_bytes = (count + 1) // 2 if is_4_bit else count
            literal = data[at : at + n_bytes]
            out += b"".join(_PAIRS[byte] for byte in literal)[:count] if is_4_bit else literal
            at += n_bytes
            if len(literal) < n_bytes:
                break
            x += value
            at += at % 2
    if len(out) < whole:
        raise ValueError("not enough image data")
    return bytes(out[:whole])
