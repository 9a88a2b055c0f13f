"""Pixels by the files' own tags: files written by hand, or by other programs; damage that decoders pass over."""

import contextlib
import io
import struct
import sys
import threading
import time
import warnings
import zlib

import numpy as np
import pytest
import simplejpeg
import tifffile
from PIL import Image

from operators.codecs.jpeg import segments
from operators.codecs.warned import decoder_warnings
from operators.image import ImageDamaged, ImageRefused, open_rgb
from tests.conftest import jpeg

RAMP = np.linspace(0, 1, 64 * 48).reshape(48, 64)
GREY = np.floor(RAMP * 255.999).astype(np.uint8)
RGB = np.stack([GREY, GREY[::-1], np.roll(GREY, 20, 1)], -1)


def rgb(data: bytes) -> tuple[np.ndarray, str]:
    image, _, conversion = open_rgb(data, max_pixels=10**8)
    return np.asarray(image), conversion


def same(found: np.ndarray, grey: np.ndarray, tolerance: int = 1) -> bool:
    """Whether `found` [H, W, 3] is `grey` [H, W] within the rounding of scales."""
    return bool((np.abs(found.astype(int) - grey[..., None]) <= tolerance).all())


def tiff(values: np.ndarray, photometric: str = "minisblack", **options: object) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, values, photometric=photometric, **options)
    return out.getvalue()


def over(dtype: str) -> np.ndarray:
    """The ramp over the whole range of an integer type."""
    limits = np.iinfo(dtype)
    return np.floor(RAMP * (2.0**limits.bits - 1) + limits.min).astype(dtype)


def bits(count: int) -> np.ndarray:
    return np.floor(RAMP * (2**count - 1)).astype(np.uint16)


def values_tag(number: int, kind: str, *values: float) -> tuple[int, str, int, object, bool]:
    return (number, kind, len(values), values if len(values) > 1 else values[0], True)


# --- grey values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int8", "int16", "int32"])
def test_values_of_any_type_cover_black_to_white(dtype, order, compression):
    found, _ = rgb(tiff(over(dtype), byteorder=order, compression=compression))

    assert same(found, GREY)


def test_unsigned_32_bits_are_not_taken_for_negative():
    assert same(rgb(tiff(over("uint32")))[0], GREY)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_white_is_zero(dtype, compression):
    found, conversion = rgb(tiff(over(dtype), "miniswhite", compression=compression))

    assert same(found, 255 - GREY)
    assert conversion == {"uint8": "grey->rgb", "uint16": "grey16 white is zero->rgb"}[dtype]


@pytest.mark.parametrize("count", [10, 12, 14])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("tag", ["MaxSampleValue", "SMaxSampleValue"])
def test_fewer_bits_in_16_by_the_tags(count, photometric, tag):
    top = 2**count - 1
    tags = [values_tag(281, "H", top)] if tag == "MaxSampleValue" else [values_tag(340, "H", 0), values_tag(341, "H", top)]

    found, conversion = rgb(tiff(bits(count), photometric, extratags=tags))

    assert same(found, GREY if photometric == "minisblack" else 255 - GREY)
    assert conversion.startswith(f"grey{count}" if tag == "MaxSampleValue" else f"grey16 0..{top}")


def tag_at(data: bytes, number: int) -> int:
    """Where the directory entry of a tag lies."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        return file.pages[0].tags[number].offset


def test_twelve_bits_packed():
    first, second = bits(12)[:, ::2], bits(12)[:, 1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).reshape(48, 96).astype(np.uint8)
    data = bytearray(tiff(packed, byteorder="<"))
    for number, value in ((256, 64), (258, 12)):
        struct.pack_into("<HHII", data, tag_at(data, number), number, 4, 1, value)

    found, conversion = rgb(bytes(data))

    assert same(found, GREY)
    assert conversion == "grey12->rgb"


@pytest.mark.parametrize(
    ("values", "low", "high", "kind"),
    [
        (RAMP.astype(np.float32), 0.0, 1.0, "f"),
        ((RAMP * 4095 - 1000).astype(np.int16), -1000, 3095, "h"),
        ((RAMP * 10**6).astype(np.uint32), 0, 10**6, "I"),
    ],
    ids=["float", "int16", "uint32"],
)
def test_range_that_the_tags_say(values, low, high, kind):
    tags = [values_tag(340, kind, low), values_tag(341, kind, high)]

    assert same(rgb(tiff(values, extratags=tags))[0], GREY)
    with pytest.raises(ImageRefused, match="range|black and white"):
        rgb(tiff(values))


@pytest.mark.parametrize(
    "values",
    [bits(12), np.stack([bits(12)] * 3, -1), bits(10), (RAMP * 255).astype(np.int16), bits(12).astype(np.uint32)],
    ids=["12 in 16", "12 in 16, colours", "10 in 16", "8 in int16", "12 in 32"],
)
def test_what_is_black_or_has_fewer_bits_is_refused(values):
    with pytest.raises(ImageRefused, match="MaxSampleValue"):
        rgb(tiff(values, "rgb" if values.ndim == 3 else "minisblack"))


def test_black_is_black_and_dark_is_said():
    assert same(rgb(tiff(np.zeros((8, 8), np.uint16)))[0], np.zeros((8, 8)))
    assert rgb(tiff(np.full((8, 8), 9000, np.uint16)))[1] == "grey16 (brightest 9000 of 65535)->rgb"


def test_colours_whose_tags_say_fewer_bits_are_refused():
    with pytest.raises(ImageRefused, match="16-bit colour TIFF whose tags say that it uses fewer bits"):
        rgb(tiff(np.stack([bits(12)] * 3, -1), "rgb", extratags=[values_tag(281, "H", 4095, 4095, 4095)]))


def test_grey_that_does_not_say_which_end_is_white_is_refused():
    data = tiff(over("uint8"), byteorder="<")
    tag = struct.pack("<HHI", 262, 3, 1)

    with pytest.raises(ImageRefused, match="PhotometricInterpretation"):
        rgb(data.replace(tag, struct.pack("<HHI", 263, 3, 1)))


@pytest.mark.parametrize("top", [65535, 4095, 1023, 255, 100, 15])
@pytest.mark.parametrize("channels", [1, 3])
def test_portable_maps_by_their_own_maximum(top, channels):
    values = np.floor(RAMP * (top + 0.999)).astype(np.int64)
    stored = np.stack([values] * channels, -1).astype(">u2" if top > 255 else np.uint8)

    found, _ = rgb(b"P%d 64 48 %d\n" % (5 if channels == 1 else 6, top) + stored.tobytes())

    assert same(found, np.round(values * 255 / top))


# --- colours --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bit_colours_keep_their_high_bytes(order, planar, compression):
    deep = RGB.astype(np.uint16) * 256 + 0x7F
    values = np.moveaxis(deep, -1, 0) if planar == "separate" else deep

    found, conversion = rgb(tiff(values, "rgb", planarconfig=planar, byteorder=order, compression=compression))

    np.testing.assert_array_equal(found, RGB)
    assert conversion == "rgb16->rgb"


@pytest.mark.parametrize("scale", [1, 257], ids=["8 bits", "16 bits"])
def test_colormap_of_8_or_16_bits(scale):
    colours = np.stack([np.arange(256), 255 - np.arange(256), np.arange(256) // 2]).astype(np.uint16)

    found, _ = rgb(tiff(GREY, "palette", colormap=colours * scale))

    np.testing.assert_array_equal(found, np.moveaxis(colours, 0, -1)[GREY])


def test_transparent_grey_of_16_bits_is_white():
    deep = over("uint16")
    out = io.BytesIO()
    Image.fromarray(deep).save(out, "PNG", transparency=int(deep[20, 30]))

    found, conversion = rgb(out.getvalue())

    assert (found[20, 30] == 255).all()
    assert (found[0, 0] == 0).all()
    assert conversion == "grey16->rgb, transparency on white"


def jpeg2000(values: np.ndarray, depth: int) -> bytes:
    """As Pillow writes it, the header's depth then lowered or raised: the wavelets of the values don't depend on it."""
    out = io.BytesIO()
    Image.fromarray(values).save(out, "JPEG2000", no_jp2=True)
    data = bytearray(out.getvalue())
    components = 1 if values.ndim == 2 else 3
    for i in range(components):
        data[42 + 3 * i] = depth - 1
    return bytes(data)


def test_grey_jpeg_2000_of_16_bits_keeps_white():
    found, conversion = rgb(jpeg2000(over("uint16"), 16))

    assert same(found, GREY)
    assert conversion == "grey16->rgb"


@pytest.mark.parametrize("depth", [9, 12, 16])
def test_deep_colour_jpeg_2000_is_refused(depth):
    """Pillow rounds its brightest values up to 256, which becomes 0."""
    with pytest.raises(ImageRefused, match=f"{depth}-bit RGB JPEG 2000, of which white can't be told from black"):
        rgb(jpeg2000(RGB, depth))


def test_jpeg_2000_in_tiles_beyond_number_is_refused():
    data = bytearray(jpeg2000(GREY, 8))
    data[8:16] = struct.pack(">II", 9000, 9000)
    data[24:32] = struct.pack(">II", 1, 1)

    with pytest.raises(ImageRefused, match="81,000,000 tiles"):
        rgb(bytes(data))


# --- damage ---------------------------------------------------------------------------------------------------------------

PHOTO = Image.open(io.BytesIO(jpeg(5, 320, 240)))


def encoded(kind: str = "JPEG", image: Image.Image = PHOTO, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


KINDS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(320, 240), (33, 17), (1, 1)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_good_jpegs_have_the_pixels_of_pillow(kind, size, mode):
    data = encoded(image=PHOTO.resize(size).convert(mode), **KINDS[kind])

    found, conversion = rgb(data)

    np.testing.assert_array_equal(found, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert conversion == ("" if mode == "RGB" else "grey->rgb")


def test_adobe_cmyk_is_as_another_program_reads_it():
    data = encoded(image=PHOTO.convert("CMYK"))
    inverted = simplejpeg.decode_jpeg(data, "CMYK").astype(float) / 255

    found, _ = rgb(data)

    assert np.abs(found - 255 * inverted[..., :3] * inverted[..., 3:]).max() <= 2


@pytest.mark.parametrize("kind", ["baseline", "progressive", "restarts"])
@pytest.mark.parametrize("at", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("end", [b"", b"\xff\xd9"])
def test_cut_jpegs_are_refused_also_with_an_end_marker(kind, at, end):
    data = encoded(**KINDS[kind])

    with pytest.raises(ImageDamaged, match="truncated|premature end|ends before its last scans"):
        rgb(data[: int(len(data) * at)] + end)


def test_progressive_jpeg_without_its_last_scan_is_refused():
    data = encoded(progressive=True)
    scans = [part for part in segments(data) if part.marker == 0xDA]
    assert len(scans) > 5

    for scan in scans[:-1]:
        with pytest.raises(ImageDamaged, match="ends before its last scans"):
            rgb(data[: scan.stop] + b"\xff\xd9")


def scan_data(data: bytes) -> int:
    """Where the middle of a baseline JPEG's entropy-coded data is."""
    scan = next(part for part in segments(data) if part.marker == 0xDA)
    return (scan.data + scan.stop) // 2


def test_overwritten_scans_are_refused_or_said():
    data = encoded(restart_marker_rows=1)
    rng = np.random.default_rng(0)
    for _ in range(20):
        broken = bytearray(data)
        at = scan_data(data) + int(rng.integers(-500, 500))
        broken[at : at + 60] = b"\xff\x00" * 30
        try:
            found, conversion = rgb(bytes(broken))
        except ImageDamaged:
            continue
        assert conversion.startswith("warned: Corrupt JPEG data: "), found.shape


def test_harmless_warnings_are_conversions_and_keep_the_pixels():
    data = encoded()
    whole = rgb(data)[0]
    padded = data[:-2] + bytes(36) + data[-2:]
    revision = data.replace(b"JFIF\0\x01", b"JFIF\0\x05")
    assert revision != data

    for changed, word in ((padded, "extraneous bytes before marker 0xd9"), (revision, "unknown JFIF revision")):
        found, conversion = rgb(changed)

        np.testing.assert_array_equal(found, whole)
        assert conversion.startswith("warned: ")
        assert word in conversion


def test_jpeg_that_cannot_be_checked_for_damage_says_so():
    """Luma as 2 x 2 beside three planes of 1 x 1: TurboJPEG has no name for that."""
    data = encoded(image=PHOTO.convert("CMYK"), subsampling=2)

    found, conversion = rgb(data)

    np.testing.assert_array_equal(found, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert conversion == "cmyk->rgb, warned: chroma subsampled in a way of which damage can't be seen"


def test_damage_is_found_behind_a_harmless_warning():
    data = encoded().replace(b"JFIF\0\x01", b"JFIF\0\x05")

    with pytest.raises(ImageDamaged, match="premature end of data segment"):
        rgb(data[: scan_data(data)] + b"\xff\xd9")


@pytest.mark.parametrize("compression", ["tiff_adobe_deflate", "jpeg"])
def test_damaged_parts_of_compressed_tiffs_are_refused(compression):
    data = bytearray(encoded("TIFF", compression=compression))
    rgb(bytes(data))
    with Image.open(io.BytesIO(data)) as image:
        offset, size = image.tag_v2[273][1], image.tag_v2[279][1]
    if compression == "jpeg":
        data[offset + size // 2 : offset + size - 2] = b"\xff\xd9" + bytes(size - 4 - size // 2)
    else:
        data[offset + size // 2] ^= 0x10

    with pytest.raises(ImageDamaged, match="part 1 of a TIFF|decoder error"):
        rgb(bytes(data))


def test_png_with_other_data_than_its_checksum_says_is_refused():
    """A row too many: the image is full before zlib compares its own checksum, and Pillow compares none."""
    data = encoded("PNG", Image.fromarray(RGB))
    at = data.index(b"IDAT")
    rows = zlib.decompress(data[at + 4 : -16])
    longer = zlib.compress(rows[:-100] + bytes(100 + 1 + 3 * 64))
    broken = data[: at - 4] + len(longer).to_bytes(4, "big") + b"IDAT" + longer + data[-16:]
    assert (np.asarray(Image.open(io.BytesIO(broken)))[:-1] == RGB[:-1]).all()

    np.testing.assert_array_equal(rgb(data)[0], RGB)
    with pytest.raises(ImageDamaged, match="checksum"):
        rgb(broken)


def test_deflate_with_reversed_bits_is_checked_as_it_is_read():
    """FillOrder 2, by which libtiff turns each byte of a strip."""
    data = bytearray(encoded("TIFF", Image.fromarray(RGB), compression="tiff_adobe_deflate", tiffinfo={266: 2}))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        offset, size = file.pages[0].dataoffsets[0], file.pages[0].databytecounts[0]
    assert data[offset] == 0b00011110  # of 0x78, zlib's first byte

    np.testing.assert_array_equal(rgb(bytes(data))[0], RGB)
    data[offset + size // 2] ^= 0x10
    with pytest.raises(ImageDamaged):
        rgb(bytes(data))


def test_tiff_without_some_of_its_strips_is_refused():
    data = tiff(RGB, "rgb", rowsperstrip=8)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        tag = file.pages[0].tags[273]
    sparse = bytearray(data)
    sparse[tag.valueoffset + 8 : tag.valueoffset + 12] = bytes(4)

    np.testing.assert_array_equal(rgb(data)[0], RGB)
    with pytest.raises(ImageDamaged, match="5 of its 6 strips"):
        rgb(bytes(sparse))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA", "AVIF", "ICO"])
@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
def test_cut_files_of_other_kinds_are_refused(kind, at):
    data = encoded(kind)

    with pytest.raises(ImageRefused):
        rgb(data[: int(len(data) * at)])


def test_every_flipped_byte_ends_in_pixels_or_in_a_refusal():
    rng = np.random.default_rng(1)
    kinds = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA", "ICO"]
    small = PHOTO.resize((40, 30))
    for kind in kinds:
        data = encoded(kind, small)
        for _ in range(60):
            broken = bytearray(data)
            for at in rng.integers(0, len(data), 3):
                broken[at] = rng.integers(256)
            with contextlib.suppress(ImageRefused):
                assert rgb(bytes(broken))[0].dtype == np.uint8, kind


# --- warnings -------------------------------------------------------------------------------------------------------------


def test_pillows_warnings_are_conversions():
    data = bytearray(tiff(GREY, byteorder="<"))
    tag = data.index(struct.pack("<HHI", 277, 3, 1))
    data[tag + 4] = 2  # two values where the tag has one

    found, conversion = rgb(bytes(data))

    assert same(found, GREY)
    assert conversion.startswith("grey->rgb, warned: Metadata Warning, tag 277")


def warn_as_pillow(text: str) -> None:
    warnings.warn_explicit(text, UserWarning, "plugin.py", 1, module="PIL.Plugin")


def test_file_that_causes_thousands_of_warnings_says_a_few():
    """A TIFF of 0.7 MB made 3 MB of them in a row of the ledger, in a minute."""
    data = tiff(GREY, byteorder="<")
    start = struct.unpack("<I", data[4:8])[0]
    count = struct.unpack("<H", data[start : start + 2])[0]
    entries = data[start + 2 : start + 2 + 12 * count]
    bogus = b"".join(struct.pack("<HHII", tag, 2, 10**6 + tag, 10**8) for tag in range(40_000, 42_000))
    moved = data[:4] + struct.pack("<I", len(data)) + data[8:] + struct.pack("<H", count + 2000) + entries + bogus + bytes(4)

    found, conversion = rgb(moved)

    assert same(found, GREY)
    assert conversion.count("warned: ") == 5
    assert conversion.endswith(", warned: and more")


def test_warnings_are_kept_apart_by_thread_and_others_stay_as_they_were():
    before = warnings.filters[:]
    seen: dict[int, list[str]] = {}

    def work(number: int) -> None:
        for _ in range(30):
            with decoder_warnings() as texts:
                warn_as_pillow(f"of {number}")
                time.sleep(0)
            seen.setdefault(number, []).extend(texts)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert seen == {number: [f"of {number}"] * 30 for number in range(6)}
    assert warnings.filters == before


def test_warnings_of_threads_that_decode_nothing_are_shown():
    def elsewhere() -> None:
        other = threading.Thread(target=lambda: warn_as_pillow("mine"))
        other.start()
        other.join()

    with decoder_warnings() as texts, pytest.warns(UserWarning, match="mine"):
        elsewhere()

    assert texts == []


# --- too much -------------------------------------------------------------------------------------------------------------


def test_jpeg_of_60000_scans_is_refused_at_once():
    data = encoded(progressive=True, image=PHOTO.resize((1600, 1200)))
    scans = [part for part in segments(data) if part.marker == 0xDA]
    last = data[scans[-1].start : scans[-1].stop]

    with pytest.raises(ImageRefused, match=r"with 60,\d+ scans"):
        rgb(data[:-2] + last[:40] * 60_000 + data[-2:])


def test_bytes_that_look_like_scans_are_no_scans():
    """An appended video, say: what lies behind the end marker isn't counted."""
    assert rgb(encoded(image=PHOTO.resize((1600, 1200))) + b"\xff\xda" * 60_000)[1] == ""


def test_tiff_of_tiles_far_larger_than_the_image_is_refused():
    data = bytearray(tiff(RGB, "rgb", tile=(16, 16), byteorder="<"))
    for number in (322, 323):
        struct.pack_into("<HHII", data, tag_at(data, number), number, 4, 1, 2**20)

    with pytest.raises(ImageRefused, match="tiles of 1048576 x 1048576 pixels"):
        rgb(bytes(data))


def test_text_that_decompresses_to_gigabytes_is_refused():
    packed = zlib.compress(bytes(10**8))
    text = b"Comment\0\0" + packed
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    data = encoded("PNG", PHOTO.resize((8, 8)))

    with pytest.raises(ImageDamaged, match="too large"):
        rgb(data[:33] + chunk + data[33:])


def test_no_decoder_starts_where_the_header_says_too_much(monkeypatch):
    monkeypatch.setattr(sys.modules["operators.image"], "_load", lambda *_: pytest.fail("decoded"))
    data = bytearray(encoded("BMP", PHOTO.convert("L")))
    data[30:34] = struct.pack("<I", 1)  # run-length encoded
    data[18:26] = struct.pack("<ii", 8000, 8000)

    with pytest.raises(ImageRefused, match="run-length encoded BMP of 8000 x 8000 pixels"):
        rgb(bytes(data))
