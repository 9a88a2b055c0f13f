"""JPEGs for a GPU: which they are, and what becomes of them. The decoder runs on the CPU here, where torchcodec has libjpeg's."""

import importlib
import io
import re
import types

import numpy as np
import pytest
import torch
from PIL import Image

from operators import nvjpeg
from operators.codecs.jpeg import is_for_gpu, without_remarks
from operators.codecs.refusal import GpuDecoderFailed, ImageRefused
from operators.image import Geometry, decode
from operators.nvjpeg import NoNvjpeg, Nvjpeg, require_nvjpeg
from tests.conftest import jpeg

MODES = ("crop", "squash", "pad", "corner")


def photograph(width: int = 96, height: int = 72) -> Image.Image:
    return Image.open(io.BytesIO(jpeg(3, width, height)))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(photograph(), exif=exif)


def patched(data: bytes, at: bytes, offset: int, value: int) -> bytes:
    """With another byte, so far behind the first `at`."""
    place = data.index(at) + offset
    return data[:place] + bytes([value]) + data[place + 1 :]


PLAIN = encoded(photograph(), subsampling=2)
FOR_GPU = {
    "baseline": PLAIN,
    "4:4:4": encoded(photograph(), subsampling=0),
    "4:2:2": encoded(photograph(), subsampling=1),
    "progressive": encoded(photograph(), progressive=True),
    "grey": encoded(photograph().convert("L")),
    "grey, progressive": encoded(photograph().convert("L"), progressive=True),
    "restart markers": encoded(photograph(), restart_marker_rows=1),
    "turned": turned(6),
    "colour profile and comment": encoded(photograph(), icc_profile=bytes(3000), comment=b"words"),
    "without a mark of YCbCr": without_remarks(PLAIN),
}
FOR_CPU = {
    "PNG": encoded(photograph(), "PNG"),
    "CMYK": encoded(photograph().convert("CMYK")),
    "RGB by Adobe's mark": encoded(photograph(), keep_rgb=True),
    "components of other numbers": patched(patched(PLAIN, b"\xff\xc0", 10, 7), b"\xff\xda", 5, 7),
    "extended": patched(PLAIN, b"\xff\xc0", 1, 0xC1),
    "arithmetic": patched(PLAIN, b"\xff\xc0", 1, 0xC9),
    "12 bits": patched(PLAIN, b"\xff\xc0", 4, 12),
    "another subsampling": patched(PLAIN, b"\xff\xc0", 11, 0x14),
    "no height": patched(patched(PLAIN, b"\xff\xc0", 5, 0), b"\xff\xc0", 6, 0),
    "cut off": PLAIN[: len(PLAIN) // 2],
    "cut off and closed": PLAIN[: len(PLAIN) // 2] + b"\xff\xd9",
    "progressive without its last scans": encoded(photograph(), progressive=True)[:-400] + b"\xff\xd9",
    "damaged": PLAIN[:-300] + bytes(200) + PLAIN[-100:],
    "two frames": PLAIN[: PLAIN.index(b"\xff\xc0")] + PLAIN[PLAIN.index(b"\xff\xc0") : PLAIN.index(b"\xff\xc4")] + PLAIN[2:],
    "nothing": b"",
}


@pytest.mark.parametrize("kind", FOR_GPU)
def test_usual_jpegs_are_for_the_gpu(kind):
    assert is_for_gpu(FOR_GPU[kind])


@pytest.mark.parametrize("kind", FOR_CPU)
def test_all_else_is_for_the_cpu(kind):
    assert not is_for_gpu(FOR_CPU[kind])


def test_large_jpegs_are_for_the_cpu(monkeypatch):
    monkeypatch.setattr("operators.codecs.jpeg.MAX_GPU_PIXELS", 96 * 72)
    assert is_for_gpu(jpeg(1))

    monkeypatch.setattr("operators.codecs.jpeg.MAX_GPU_PIXELS", 96 * 72 - 1)
    assert not is_for_gpu(jpeg(1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("width", "height"), [(96, 72), (61, 180)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
def test_pixels_are_those_of_the_cpu_but_for_rounding(mode, width, height, interpolation):
    geometry = Geometry(mode=mode, height=40, width=56, interpolation=interpolation, mean=(0.2, 0.5, 0.8))
    data = jpeg(5, width, height)

    here, there = (decode(data, geometry, max_pixels=10**6, gpu=gpu) for gpu in (None, Nvjpeg("cpu")))

    assert (there.width, there.height, there.placement) == (width, height, here.placement)
    assert (here.conversion, there.conversion) == ("", "nvjpeg")
    assert np.abs(here.pixels.astype(int) - there.pixels).max() <= (0 if interpolation == "lanczos" else 2)


@pytest.mark.parametrize("kind", FOR_GPU)
def test_each_kind_has_the_pixels_of_the_cpu_but_for_rounding(kind):
    here, there = (
        decode(FOR_GPU[kind], Geometry(mode="squash", height=40, width=56), max_pixels=10**6, gpu=gpu)
        for gpu in (None, Nvjpeg("cpu"))
    )

    assert np.abs(here.pixels.astype(int) - there.pixels).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_once(orientation):
    geometry = Geometry(mode="squash", height=40, width=56)

    here, there = (decode(turned(orientation), geometry, max_pixels=10**6, gpu=gpu) for gpu in (None, Nvjpeg("cpu")))

    assert (there.width, there.height) == (here.width, here.height)
    assert there.conversion == ("nvjpeg" if orientation == 1 else "exif-rotate, nvjpeg")
    assert np.abs(here.pixels.astype(int) - there.pixels).max() <= 2


def test_much_larger_images_are_resized_as_on_the_cpu():
    geometry = Geometry(mode="squash", height=8, width=8)
    data = jpeg(5, 8 * 17, 72)

    here, there = (decode(data, geometry, max_pixels=10**6, gpu=gpu) for gpu in (None, Nvjpeg("cpu")))

    np.testing.assert_array_equal(there.pixels, here.pixels)


@pytest.mark.parametrize("kind", [*FOR_CPU])
def test_what_is_for_the_cpu_is_decoded_or_refused_as_ever(kind):
    found = []
    for gpu in (None, Nvjpeg("cpu")):
        try:
            image = decode(FOR_CPU[kind], Geometry(mode="squash", height=40, width=56), max_pixels=10**6, gpu=gpu)
            found.append((image.pixels.tobytes(), image.conversion))
        except ImageRefused as error:
            found.append((error.kind, str(error)))

    assert found[0] == found[1]


def said(monkeypatch: pytest.MonkeyPatch, error: Exception) -> Nvjpeg:
    """A decoder that fails so."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("torchcodec.decoders.decode_jpeg", fail)
    return Nvjpeg("cpu")


@pytest.mark.parametrize("words", ["nvjpegDecode failed: 4", "Failed to decode batch: 3", "Failed to get image info: 10"])
def test_what_nvjpeg_refuses_is_decoded_on_the_cpu_and_said(words, monkeypatch):
    geometry = Geometry(mode="squash", height=40, width=56)

    found = decode(PLAIN, geometry, max_pixels=10**6, gpu=said(monkeypatch, RuntimeError(words)))

    assert found.conversion == "libjpeg for nvjpeg"
    np.testing.assert_array_equal(found.pixels, decode(PLAIN, geometry, max_pixels=10**6).pixels)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("nvjpegDecode failed: 5"), RuntimeError("batch: 30")],
    ids=str,
)
def test_what_is_no_fault_of_the_file_is_no_verdict_on_it(error, monkeypatch):
    with pytest.raises(GpuDecoderFailed, match=re.escape(str(error))) as found:
        decode(PLAIN, Geometry(mode="squash", height=8, width=8), max_pixels=10**6, gpu=said(monkeypatch, error))

    assert isinstance(found.value, MemoryError)


def test_installed_torchcodec_has_nvjpeg():
    require_nvjpeg()


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (ModuleNotFoundError("torchcodec"), r"isn't installed here: pip install 'raylift\[nvjpeg\]'"),
        (
            OSError("libtorch_cuda.so: no such file\nand much more"),
            "can't be loaded beside torch .*: libtorch_cuda.so: no such file$",
        ),
        (types.SimpleNamespace(), "0.16 or later"),
        (RuntimeError("torchcodec was not compiled with nvJPEG support, so"), "was built without nvJPEG"),
    ],
    ids=["missing", "not loaded", "old", "of a CPU"],
)
def test_torchcodec_that_can_not_do_it_is_refused_in_a_sentence(module, words, monkeypatch):
    def imported(_: str) -> object:
        if isinstance(module, types.SimpleNamespace):
            return module
        if isinstance(module, RuntimeError):
            return types.SimpleNamespace(decode_jpeg=lambda *_, **__: (_ for _ in ()).throw(module))
        raise module

    monkeypatch.setattr(nvjpeg, "importlib", types.SimpleNamespace(import_module=imported))

    with pytest.raises(NoNvjpeg, match=words):
        require_nvjpeg()

    assert importlib.import_module("torchcodec.decoders").decode_jpeg
