"""Formats that Pillow decodes in Python: decoded by arrays and runs, to the same pixels, and refused where it refuses."""

import io
import random
import struct

import numpy as np
import pytest
from PIL import Image

from operators.codecs import slow
from operators.codecs.refusal import ImageRefused
from operators.image import open_rgb


def bmp(width: int, height: int, runs: bytes, bits: int = 8) -> bytes:
    """A run-length encoded BMP, a palette of colours."""
    palette = b"".join(bytes((i, 255 - i, i // 2, 0)) for i in range(1 << bits))
    offset = 14 + 40 + len(palette)
    compression = 1 if bits == 8 else 2
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(runs), 0, 0, 1 << bits, 0)
    return b"BM" + struct.pack("<IHHI", offset + len(runs), 0, 0, offset) + head + palette + runs


def decoded(data: bytes, *, by_pillow: bool) -> np.ndarray | None:
    """The pixels; None for damage."""
    image = Image.open(io.BytesIO(data))
    try:
        if not by_pillow:
            slow.prepare(image, data)
            assert image.tile[0].codec_name == "raw"
        image.load()
    except (ValueError, OSError, IndexError):
        return None
    return np.array(image.convert("RGB") if image.mode != "I" else image)


def same(data: bytes) -> bool:
    """Whether both give the same; True also counts for equal refusals."""
    one, other = (decoded(data, by_pillow=each) for each in (True, False))
    assert (one is None) == (other is None)
    return one is None or (one.shape == other.shape and bool((one == other).all()))


def command(chance: random.Random) -> bytes:
    kind = chance.random()
    if kind < 0.5:
        return bytes((chance.randrange(1, 12), chance.randrange(256)))
    if kind < 0.7:
        return b"\0\0"
    if kind < 0.8:
        return bytes((0, 2, chance.randrange(4), chance.randrange(2)))
    n = chance.randrange(3, 9)
    return bytes((0, n)) + chance.randbytes(n)


@pytest.mark.parametrize("bits", [4, 8])
def test_runs_of_a_bmp_are_pillows(bits):
    chance, whole = random.Random(bits), 0
    for _ in range(300):
        runs = b"".join(command(chance) for _ in range(chance.randrange(60)))
        data = bmp(chance.randrange(1, 9), chance.randrange(1, 9), runs + b"\0\1", bits)
        assert same(data)
        whole += decoded(data, by_pillow=False) is not None
    assert whole > 50


@pytest.mark.parametrize("kind", [b"P5", b"P6"])
@pytest.mark.parametrize("largest", [1, 7, 200, 254, 256, 1000, 40_000])
def test_values_of_other_ranges_are_pillows(kind, largest):
    size = 35 * (3 if kind == b"P6" else 1) * (2 if largest > 255 else 1)
    data = b"%s\n7 5\n%d\n" % (kind, largest) + random.Random(largest).randbytes(size)

    assert decoded(data, by_pillow=False) is not None
    assert same(data)
    assert same(data[:-1])


@pytest.mark.parametrize(
    "data",
    [
        b"P3\n2 1\n9\n1 2 3\n 4\t5 9",
        b"P3\n2 1\n9\n1 2 3 4 5 9 junk",
        b"P3\n2 1\n9\n1 2 3 4 5",
        b"P3\n2 1\n9\n1 2 3 4 5 10",
        b"P3\n2 1\n9\n1 2 3 4 5 -1",
        b"P3\n2 1\n9\n1 2 3 4 5 x",
        b"P3\n2 1\n9\n1 2 3 4 5 00000000001",
        b"P2\n3 1\n255\n1 # a comment 7\n 200 255",
        b"P2\n3 1\n1000\n1 500 1000\n",
        b"P2\n3 1\n65535\n1 500 65535\n",
        b"P1\n3 2\n1 0 1\n# 0\n010",
        b"P1\n3 2\n101010101",
        b"P1\n3 2\n10101",
        b"P1\n3 2\n10102 ",
    ],
)
def test_text_forms_are_pillows(data):
    assert same(data)


def test_text_of_several_blocks_is_read_across_them(monkeypatch):
    monkeypatch.setattr(slow, "_TEXT_BLOCK", 7)
    values = [random.Random(1).randrange(256) for _ in range(60)]
    data = b"P3\n5 4\n255\n" + b"\n ".join(b"%d" % value for value in values)

    assert decoded(data, by_pillow=False).ravel().tolist() == values


def test_rows_of_one_run_are_filled_at_once():
    """A file of a kilobyte, of which Pillow makes 16 million pixels one by one."""
    image, size, conversion = open_rgb(bmp(65_000, 256, b"\1\5\0\0" * 256 + b"\0\1"), max_pixels=10**8)

    assert (size, conversion) == ((65_000, 256), "palette->rgb")
    assert image.getpixel((0, 0)) != image.getpixel((1, 0)) == image.getpixel((64_999, 255))


def test_runs_without_pixels_end_somewhere():
    data = bmp(4, 4, b"\0\0" * 10**6)

    with pytest.raises(ImageRefused, match="not enough image data"):
        open_rgb(data, max_pixels=10**6)
