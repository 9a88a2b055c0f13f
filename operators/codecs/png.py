"""PNGs by their own checksums, which Pillow doesn't compare; zlib compares its own only where no pixels are too many."""

import struct
import zlib

from operators.codecs.refusal import ImageDamaged

_SIGNATURE_BYTES = 8


def check(data: bytes) -> None:
    """Raise `ImageDamaged` where the compressed pixels are not those that were written."""
    position, view = _SIGNATURE_BYTES, memoryview(data)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        stop = position + 8 + length
        if kind == b"IEND":
            return
        if kind == b"IDAT" and stop + 4 <= len(data):
            (written,) = struct.unpack_from(">I", data, stop)
            if zlib.crc32(view[position + 4 : stop]) != written:
                raise ImageDamaged(f"bytes {position} to {stop + 4} of a PNG don't have the checksum that stands behind them")
        position = stop + 4
