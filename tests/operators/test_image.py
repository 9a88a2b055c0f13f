"""Decoding: pixel-equal to the usual transforms, an exact map from original pixels, and every odd image stated or refused."""

import io
import math
import struct
import subprocess
import zlib

import numpy as np
import pytest
import torchvision.transforms as T
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from PIL.Image import Transpose

from operators import image as image_module
from operators.image import DecodedImage, Geometry, ImageRefused, decode, fitted_size
from tests.conftest import jpeg

RNG = np.random.default_rng(7)
INTERPOLATION = {"bicubic": T.InterpolationMode.BICUBIC, "bilinear": T.InterpolationMode.BILINEAR}


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))


def geometry(mode: str = "squash", height: int = 64, width: int = 64, **options: object) -> Geometry:
    return Geometry(mode=mode, height=height, width=width, **options)


def decoded(data: bytes, to: Geometry | None = None, **options: object) -> DecodedImage:
    return decode(data, to or geometry(), **{"max_pixels": 10**8, **options})


# --- geometry -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(96, 72), (72, 96), (65, 64), (301, 77), (33, 500), (64, 64), (17, 13), (1, 9)])
@pytest.mark.parametrize(("side", "crop_pct"), [(64, 1.0), (70, 0.875), (63, 0.9), (56, 0.95)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crop_is_resize_and_centre_crop_of_torchvision(width, height, side, crop_pct, interpolation):
    image = noise(width, height)
    fit = T.Compose([T.Resize(math.floor(side / crop_pct), INTERPOLATION[interpolation]), T.CenterCrop(side)])

    found = decoded(encoded(image), geometry("crop", side, side, crop_pct=crop_pct, interpolation=interpolation))

    np.testing.assert_array_equal(found.pixels, np.array(fit(image)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(8, 90), st.sampled_from([1.0, 0.9, 0.875, 0.7]))
def test_crop_of_any_size_is_that_of_torchvision(width, height, side, crop_pct):
    image = noise(width, height)
    fit = T.Compose([T.Resize(math.floor(side / crop_pct), INTERPOLATION["bicubic"]), T.CenterCrop(side)])

    found = decoded(encoded(image), geometry("crop", side, side, crop_pct=crop_pct))

    np.testing.assert_array_equal(found.pixels, np.array(fit(image)))


@pytest.mark.parametrize(
    ("size", "resized", "corner"),
    [
        ((300, 100), (192, 64), (-48, 0)),
        ((100, 300), (96, 288), (0, -112)),
        ((96, 64), (96, 64), (0, 0)),
        ((97, 64), (97, 64), (0, 0)),
        ((95, 64), (96, 64), (0, 0)),
    ],
)
def test_crop_to_an_oblong_input_covers_it_and_cuts_the_centre(size, resized, corner):
    place = geometry("crop", 64, 96).place(*size)

    assert (place.resized, place.corner) == (resized, corner)


@pytest.mark.parametrize(("width", "height"), [(96, 72), (301, 77), (5, 3)])
def test_squash_is_a_plain_resize(width, height):
    image = noise(width, height)

    found = decoded(encoded(image), geometry("squash", 48, 80))

    np.testing.assert_array_equal(found.pixels, np.array(image.resize((80, 48), Image.Resampling.BICUBIC)))


def test_pad_keeps_the_aspect_on_the_mean_colour():
    image = noise(200, 100)

    found = decoded(encoded(image), geometry("pad", 64, 96, mean=(0.485, 0.456, 0.406)))

    np.testing.assert_array_equal(found.pixels[8:56], np.array(image.resize((96, 48), Image.Resampling.BICUBIC)))
    assert (found.pixels[:8] == [124, 116, 104]).all()
    assert (found.pixels[56:] == [124, 116, 104]).all()


def test_corner_keeps_the_aspect_in_the_upper_left_on_the_mean_colour():
    image = noise(200, 100)

    found = decoded(encoded(image), geometry("corner", 64, 64, mean=(0.485, 0.456, 0.406), interpolation="bilinear"))

    np.testing.assert_array_equal(found.pixels[:32], np.array(image.resize((64, 32), Image.Resampling.BILINEAR)))
    assert (found.pixels[32:] == [124, 116, 104]).all()


def test_images_in_a_corner_are_rounded_as_detectors_round_them():
    """The published sizes: tests/operators/vitdet/test_settings.py."""
    assert fitted_size((100, 300), (64, 96)) == (32, 96)
    # A half, which 105 * 64 / 640 would round up.
    assert geometry("corner", 64, 64).place(640, 105).resized == (64, 10)


@pytest.mark.parametrize("mode", ["crop", "squash", "pad", "corner"])
@pytest.mark.parametrize(("width", "height"), [(200, 120), (120, 200), (131, 97)])
@pytest.mark.parametrize("at", [(0.5, 0.5), (0.4, 0.6), (0.62, 0.37)])
def test_placement_says_where_a_dot_of_the_original_lands(mode, width, height, at):
    x, y = round(width * at[0]), round(height * at[1])
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[y - 4 : y + 4, x - 4 : x + 4] = 255  # centred on the corner between four pixels, (x, y)
    to = geometry(mode, 96, 112, mean=(0, 0, 0), interpolation="bilinear")

    found = decoded(encoded(Image.fromarray(canvas)), to)

    light = found.pixels[..., 0].astype(float)
    rows, columns = np.mgrid[:96, :112] + 0.5
    place = found.placement
    assert (light * columns).sum() / light.sum() == pytest.approx(place.x_scale * x + place.x_offset, abs=0.05)
    assert (light * rows).sum() / light.sum() == pytest.approx(place.y_scale * y + place.y_offset, abs=0.05)


@pytest.mark.parametrize(("width", "height"), [(3, 4000), (4000, 3), (1, 1), (1, 3000), (2, 2)])
@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
def test_tiny_and_extreme_images_are_fitted_without_large_intermediates(mode, width, height, monkeypatch):
    made, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda *given, **more: made.append(resize(*given, **more)) or made[-1])

    found = decoded(encoded(Image.new("RGB", (width, height), (9, 99, 199))), geometry(mode, 224, 224, mean=(0, 0, 0)))

    assert found.pixels.shape == (224, 224, 3)
    assert (found.pixels[111:113, 111:113] == [9, 99, 199]).all(axis=-1).any()
    assert made
    assert max(each.width * each.height for each in made) <= 10 * 224 * 224  # whole, the largest would be 224 x 298,667


@pytest.mark.parametrize(("width", "height"), [(9, 400), (400, 9), (37, 211)])
def test_image_resampled_where_visible_equals_the_whole_one_but_for_rounding(width, height, monkeypatch):
    # Of middling values: what Pillow clips between its two passes depends on their order.
    pixels = RNG.integers(80, 176, (height, width, 3), np.uint8)
    data, to = encoded(Image.fromarray(pixels)), geometry("crop", 64, 80, crop_pct=0.9)
    whole = decoded(data, to).pixels.astype(int)
    monkeypatch.setattr(image_module, "MAX_RESIZED_PIXELS", 0)

    visible = decoded(data, to).pixels.astype(int)

    assert np.abs(visible - whole).max() <= 2


# --- kinds of images ----------------------------------------------------------------------------------------------------------

RED, GREEN = (200, 30, 40), (20, 180, 60)


def test_rgb_is_taken_as_it_is():
    found = decoded(encoded(Image.new("RGB", (64, 64), RED)))

    assert (found.pixels == RED).all()
    assert (found.width, found.height, found.conversion) == (64, 64, "")


def test_cmyk_jpeg_keeps_its_colours():
    found = decoded(encoded(Image.new("RGB", (64, 64), RED).convert("CMYK"), "JPEG", quality=95))

    assert np.abs(found.pixels.astype(int) - RED).max() <= 4
    assert found.conversion == "cmyk->rgb"


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B")])
def test_sixteen_bit_grey_keeps_its_high_byte(kind, mode):
    grey = Image.new(mode, (64, 64))
    grey.putdata([0xABCD] * 64 * 64)

    found = decoded(encoded(grey, kind))

    assert (found.pixels == 0xAB).all()
    assert found.conversion == "grey16->rgb"


def test_float_image_is_refused_with_the_remedy():
    with pytest.raises(ImageRefused, match="32-bit float image has no defined range; convert it to 8 or 16 bit"):
        decoded(encoded(Image.new("F", (8, 8)), "TIFF"))


def test_greyscale_becomes_three_equal_channels():
    found = decoded(encoded(Image.new("L", (64, 64), 77)))

    assert (found.pixels == 77).all()
    assert found.conversion == "grey->rgb"


def test_bilevel_becomes_black_and_white():
    found = decoded(encoded(Image.new("1", (64, 64), 1)))

    assert (found.pixels == 255).all()
    assert found.conversion == "bilevel->rgb"


def test_palette_gives_its_colours():
    found = decoded(encoded(Image.new("RGB", (64, 64), GREEN).convert("P", palette=Image.Palette.ADAPTIVE)))

    assert np.abs(found.pixels.astype(int) - GREEN).max() <= 1
    assert found.conversion == "palette->rgb"


def half_transparent(mode: str) -> Image.Image:
    """The left half opaque, the right half transparent."""
    rgba = Image.new("RGBA", (64, 64), (*RED, 255))
    rgba.paste((0, 0, 0, 0), (32, 0, 64, 64))
    return rgba.convert(mode)


def test_transparent_palette_goes_onto_white():
    palette = Image.new("P", (64, 64), 1)
    palette.putpalette([0, 0, 0, *RED, *GREEN])
    palette.paste(2, (32, 0, 64, 64))

    found = decoded(encoded(palette, transparency=bytes([255, 255, 0])))

    assert (found.pixels[:, :32] == RED).all()
    assert (found.pixels[:, 32:] == 255).all()
    assert found.conversion == "p+alpha->rgb on white"


@pytest.mark.parametrize(("mode", "left"), [("RGBA", RED), ("LA", (82, 82, 82))])
def test_alpha_goes_onto_white(mode, left):
    found = decoded(encoded(half_transparent(mode)))

    assert (found.pixels[:, :31] == left).all()
    assert (found.pixels[:, 33:] == 255).all()
    assert found.conversion == f"{mode.lower()}+alpha->rgb on white"


def test_transparent_colour_of_an_rgb_png_goes_onto_white():
    rgb = Image.new("RGB", (64, 64), RED)
    rgb.paste(GREEN, (32, 0, 64, 64))

    found = decoded(encoded(rgb, transparency=GREEN))

    assert (found.pixels[:, :32] == RED).all()
    assert (found.pixels[:, 32:] == 255).all()


UNDONE_BY = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_90,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_all_exif_orientations_are_upright(orientation, kind):
    upright = noise(60, 40)
    stored = upright.transpose(UNDONE_BY[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}

    found = decoded(encoded(stored, kind, exif=exif, **options), geometry("squash", 40, 60))

    np.testing.assert_array_equal(found.pixels, np.array(upright))
    assert (found.width, found.height) == (60, 40)
    assert found.conversion == ("exif-rotate" if orientation > 1 else "")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0\0\0\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x02A\0\0\0\0\0\0\0",
    ],
    ids=["garbage", "offset", "orientation 9", "orientation A"],
)
def test_broken_exif_is_no_rotation(kind, exif):
    found = decoded(encoded(Image.new("RGB", (60, 40), RED), kind, exif=exif, quality=95))

    assert (found.width, found.height, found.conversion) == (60, 40, "")


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})])
def test_animations_give_their_first_frame(kind, options):
    frames = [Image.new("RGB", (64, 64), RED), Image.new("RGB", (64, 64), GREEN)]

    found = decoded(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))

    assert np.abs(found.pixels.astype(int) - RED).max() <= 1
    assert found.conversion.split(", ")[0] == "first-frame"


# --- refused ----------------------------------------------------------------------------------------------------------------


def png(width: int, height: int, rows: int, row_bytes: int, depth: int, kind: int) -> bytes:
    """A PNG of zeros written by hand; `rows` of it are there."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(bytes(1 + row_bytes)) for _ in range(rows)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "bomb",
    [(50_000, 50_000, 50_000, 6_250, 1, 0), (50_000, 50_000, 1, 150_000, 8, 2), (2**31 - 1, 2**31 - 1, 0, 0, 8, 2)],
    ids=["whole, 1 bit", "header and a row", "largest there can be"],
)
def test_bombs_are_refused_at_once_by_their_header(bomb, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # decode's own limit holds without Pillow's
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("pixels are read"))

    with pytest.raises(ImageRefused, match=r"pixels are more than max_image_pixels = 89478485; raise --max-image-pixels"):
        decoded(png(*bomb), max_pixels=89_478_485)


def test_bombs_that_pillow_meets_first_are_refused_alike():
    with pytest.raises(ImageRefused, match=r"2500000000 pixels are more than max_image_pixels = 1000000"):
        decoded(png(50_000, 50_000, 1, 150_000, 8, 2), max_pixels=10**6)


def test_limit_is_exact():
    data = encoded(Image.new("RGB", (100, 50)))

    assert decoded(data, max_pixels=5000).width == 100
    with pytest.raises(ImageRefused, match="100 x 50 pixels are more than max_image_pixels = 4999"):
        decoded(data, max_pixels=4999)


def test_truncated_jpeg_is_an_error_that_says_so():
    data = jpeg(1)

    with pytest.raises(OSError, match="truncated"):
        decoded(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "the image has 0 bytes"),
        (b"just some text in a .jpg", r"not an image .*the first bytes are b'just some te'"),
        (b"\xff\xd8\xff", "not an image"),
        (b"\x80\x04\x95 pickled", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    ],
)
def test_what_is_no_image_is_refused(data, why):
    with pytest.raises(ImageRefused, match=why):
        decoded(data)


def test_postscript_is_refused_and_no_program_is_started(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n(/tmp/x) (w) file\nshowpage\n"

    with pytest.raises(ImageRefused, match="not an image"):
        decoded(eps)


# --- draft ------------------------------------------------------------------------------------------------------------------


def test_draft_is_close_to_the_full_decode_and_keeps_the_placement():
    data, to = jpeg(3, 1200, 900), geometry("crop", 64, 64)
    full = decoded(data, to)

    fast = decoded(data, to, draft=True)

    difference = np.abs(fast.pixels.astype(int) - full.pixels)
    assert 0 < difference.max() <= 6
    assert difference.mean() < 1
    assert (fast.placement, fast.width, fast.height) == (full.placement, 1200, 900)


def test_draft_does_nothing_to_small_photos_and_other_formats():
    for data in (jpeg(3, 120, 90), encoded(noise(1200, 900))):
        np.testing.assert_array_equal(decoded(data, draft=True).pixels, decoded(data).pixels)


def test_draft_of_a_rotated_photo_is_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = Image.open(io.BytesIO(jpeg(3, 1200, 900)))
    data = encoded(photo, "JPEG", exif=exif, quality=92)

    fast, full = decoded(data, draft=True), decoded(data)

    assert (fast.width, fast.height) == (900, 1200)
    assert np.abs(fast.pixels.astype(int) - full.pixels).mean() < 1
