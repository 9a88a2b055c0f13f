"""ViT-Up's training images: the canvas of its official code, torchvision's changes, and what chance decides."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image

from pipelines.training import augment
from pipelines.training.augment import (
    CHANGES,
    colour_jitter,
    gaussian_blur,
    photometric_distort,
    place,
    resize_aliased,
    square_crop,
    student_canvas,
    training_view,
    truncate,
)
from tests.goldens import GOLDEN


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


class FixedRng:
    """Gives what it was told, in that order, and remembers the limits it was asked for."""

    def __init__(self, *values: object) -> None:
        self.values = list(values)
        self.asked: list[tuple[object, ...]] = []

    def uniform(self, *limits: object) -> object:
        self.asked.append(limits)
        return self.values.pop(0)

    def integers(self, *limits: object, endpoint: bool = False) -> object:
        self.asked.append(limits)
        return self.values.pop(0)


# --- canvas -----------------------------------------------------------------------------------------------------------


def test_the_canvas_is_that_of_the_official_code():
    tensors = safetensors.numpy.load_file(GOLDEN / "vitup_canvas.safetensors")
    noise = truncate(tensors["in/noise_chw"].transpose(1, 2, 0) * np.float32(255))
    x0, y0, x1, y1 = tensors["out/bbox_x1y1x2y2"][0]

    canvas, box = place(
        tensors["in/image_hwc_u8"], noise, float(tensors["in/rel_size"][0]), tuple(tensors["in/offset_xy"].tolist())
    )

    np.testing.assert_array_equal(canvas, tensors["out/canvas_hwc_u8"])
    assert box.dtype == np.float32
    np.testing.assert_allclose(box, [x0, y0, x1 - x0, y1 - y0], rtol=0, atol=6e-8)


def test_levels_are_clipped_and_truncated_as_officially():
    tensors = safetensors.numpy.load_file(GOLDEN / "vitup_canvas.safetensors")
    mean, deviation = (np.array(v, np.float32) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    image = tensors["norm/in/pixel_values_chw"].transpose(1, 2, 0) * deviation + mean

    np.testing.assert_array_equal(truncate(image * np.float32(255)), tensors["norm/out/u8_hwc"])


@pytest.mark.parametrize(("height", "width", "side"), [(96, 96, 10), (97, 61, 23), (64, 64, 63), (5, 9, 1), (1, 1, 1)])
def test_shrinking_is_that_of_torch_without_antialias(height, width, side):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    channels = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(channels, (side, side), mode="bilinear", align_corners=False)
    exact = expected[0].permute(1, 2, 0).numpy()

    got = resize_aliased(pixels, side).astype(np.float32)

    # Positions are rounded to 4e-6 pixels, levels thus to 1e-3: near a whole level, truncation may give either neighbour.
    assert (got > exact - 1.002).all()
    assert (got < exact + 0.002).all()
    assert (got != np.floor(exact)).mean() < 1e-3


def test_the_box_has_the_drawn_scale_and_the_pasted_corner():
    square = photo(100, 100)
    rng = FixedRng(0.257, np.array([30, 74]), np.zeros((100, 100, 3), np.uint8))

    canvas, box = student_canvas(square, rng)

    assert rng.asked[:2] == [(0.1, 1.0), (0, 75, 2)]
    np.testing.assert_array_equal(box, np.array([0.30, 0.74, 0.257, 0.257], np.float32))
    np.testing.assert_array_equal(canvas[74:99, 30:55], resize_aliased(square, 25))
    assert canvas.sum() == canvas[74:99, 30:55].sum(dtype=np.int64)


def test_the_box_ends_at_the_canvas_edge():
    noise = np.zeros((100, 100, 3), np.uint8)

    _, box = place(photo(100, 100), noise, 0.257, (75, 0))

    np.testing.assert_array_equal(box, np.array([0.75, 0, 0.25, 0.257], np.float32))


@pytest.mark.parametrize(("scale", "side"), [(0.1, 10), (0.9999, 99), (1.0, 100)])
def test_the_smallest_and_the_largest_square_fit(scale, side):
    square = photo(100, 100)
    rng = FixedRng(scale, np.array([100 - side] * 2), np.zeros((100, 100, 3), np.uint8))

    canvas, box = student_canvas(square, rng)

    np.testing.assert_array_equal(canvas[100 - side :, 100 - side :], resize_aliased(square, side))
    assert rng.asked[1] == (0, 100 - side, 2)
    assert (box >= 0).all()
    assert (box[:2] + box[2:] <= 1).all()


def test_the_noise_is_uniform_and_never_white():
    canvas, _ = student_canvas(np.full((200, 200, 3), 255, np.uint8), np.random.default_rng(1))

    noise = canvas[(canvas != 255).any(axis=2)]  # the square is white

    counts = np.bincount(noise.ravel(), minlength=255)
    assert len(counts) == 255
    assert counts.min() > 0.6 * counts.mean()
    assert counts.max() < 1.4 * counts.mean()


# --- crop -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "smallest"), [(60, 60, 0.5), (60, 90, 0.75), (60, 120, 1.0), (10, 100, 1.0), (1, 1, 0.5)]
)
def test_a_crop_has_at_least_half_the_long_side_where_it_can(height, width, smallest):
    pixels = photo(height, width)
    shares = FixedRng(smallest, 0, 0)

    square_crop(pixels, shares)
    sides = {square_crop(pixels, np.random.default_rng(seed)).shape for seed in range(200)}

    assert shares.asked[0] == (smallest, 1.0)
    assert all(h == w and max(1, int(smallest * min(height, width))) <= h <= min(height, width) for h, w, _ in sides)


def test_a_crop_lies_anywhere_and_keeps_its_pixels():
    pixels = np.arange(40 * 60 * 3, dtype=np.int64).reshape(40, 60, 3)
    rng = FixedRng(0.75, 30, 10)

    crop = square_crop(pixels, rng)

    np.testing.assert_array_equal(crop, pixels[10:40, 30:60])
    assert rng.asked[1:] == [(0, 30), (0, 10)]


# --- changes ----------------------------------------------------------------------------------------------------------

INTENDED = {
    "colours": 0.5,
    "grey": 0.1,
    "blur": 0.35,
    "jpeg": 1.0,
    "autocontrast": 0.1,
    "equalize": 0.075,
    "sharpen": 0.1,
    "posterize": 0.05,
    "solarize": 0.025,
    "invert": 0.01,
    "noise": 0.6,
}
MILD = {
    "colours": 0.25,
    "grey": 0.01,
    "blur": 0.1225,
    "jpeg": 1.0,
    "autocontrast": 0.02,
    "equalize": 0.01125,
    "sharpen": 0.02,
    "posterize": 0.005,
    "solarize": 0.00125,
    "invert": 0.0002,
    "noise": 0.36,
}


@pytest.mark.parametrize(("strength", "expected"), [(1.0, INTENDED), (0.5, MILD)])
def test_changes_come_as_often_as_intended_and_in_order(monkeypatch, strength, expected):
    log: list[str] = []

    def spy(name):
        return lambda image, rng: log.append(name) or image

    monkeypatch.setattr(augment, "CHANGES", {name: (p, q, spy(name)) for name, (p, q, _) in CHANGES.items()})
    pixels, rng, runs = photo(2, 2), np.random.default_rng(0), 4000
    for _ in range(runs):
        seen = len(log)
        augment.augment(pixels, rng, strength)
        assert log[seen:] == [name for name in expected if name in log[seen:]]

    for name, probability in expected.items():
        tolerance = 4.5 * np.sqrt(probability * (1 - probability) / runs) + 1e-9
        assert log.count(name) / runs == pytest.approx(probability, abs=tolerance), name


def test_strength_zero_changes_nothing():
    pixels = photo(48, 48)
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state

    assert augment.augment(pixels, rng, 0.0) is pixels
    assert rng.bit_generator.state == before


def test_a_negative_strength_is_refused():
    with pytest.raises(ValueError, match="strength must be at least 0, got -1"):
        augment.augment(photo(4, 4), np.random.default_rng(0), -1)


def change(name: str):
    return CHANGES[name][2]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grey", lambda image: TF.rgb_to_grayscale(image, num_output_channels=3)),
        ("autocontrast", TF.autocontrast),
        ("equalize", TF.equalize),
        ("sharpen", lambda image: TF.adjust_sharpness(image, 1.5)),
        ("posterize", lambda image: TF.posterize(image, 5)),
        ("invert", TF.invert),
    ],
)
def test_changes_are_those_of_torchvision(name, expected):
    image = Image.fromarray(photo(48, 64))

    got = change(name)(image, np.random.default_rng(0))

    np.testing.assert_array_equal(np.asarray(got), np.asarray(expected(image)))


def test_solarize_inverts_all_but_black():
    pixels = np.array([[[0, 1, 2], [128, 254, 255]]], np.uint8)
    expected = TF.solarize(torch.from_numpy(pixels).permute(2, 0, 1), 0.9).permute(1, 2, 0).numpy()

    got = np.asarray(change("solarize")(Image.fromarray(pixels), np.random.default_rng(0)))

    np.testing.assert_array_equal(got, [[[0, 254, 253], [127, 1, 0]]])
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(("height", "width", "sigma"), [(48, 61, 0.3), (33, 17, 1.1), (16, 16, 1.5)])
def test_blur_is_that_of_torchvision(height, width, sigma):
    pixels = photo(height, width)
    expected = TF.gaussian_blur(torch.from_numpy(pixels).permute(2, 0, 1), [5, 5], [sigma, sigma]).permute(1, 2, 0)

    got = gaussian_blur(pixels, sigma)

    difference = np.abs(got.astype(int) - expected.numpy().astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_jpeg_has_the_four_qualities_as_often_as_intended(monkeypatch):
    qualities: list[int] = []
    save = Image.Image.save

    def spy(image, file, kind, quality):
        qualities.append(quality)
        save(image, file, kind, quality=quality)

    monkeypatch.setattr(Image.Image, "save", spy)
    image, rng = Image.fromarray(photo(16, 16)), np.random.default_rng(0)
    for _ in range(1000):
        change("jpeg")(image, rng)

    shares = {quality: qualities.count(quality) / 1000 for quality in sorted(set(qualities))}
    assert shares == pytest.approx({40: 0.15, 60: 0.25, 80: 0.35, 95: 0.25}, abs=0.06)


def test_noise_has_its_deviation_and_is_truncated():
    image = Image.fromarray(np.full((200, 200, 3), 128, np.uint8))

    levels = np.asarray(change("noise")(image, np.random.default_rng(0))).astype(float)

    assert levels.std() == pytest.approx(7.65, rel=0.01)
    assert levels.mean() == pytest.approx(127.5, abs=0.1)


def test_jitter_is_that_of_torchvision():
    rng = np.random.default_rng(7)
    brightness, contrast, saturation = rng.uniform(0.8, 1.2, 3)
    hue, order = rng.uniform(-0.1, 0.1), rng.permutation(4)
    steps = [
        lambda image: TF.adjust_brightness(image, brightness),
        lambda image: TF.adjust_contrast(image, contrast),
        lambda image: TF.adjust_saturation(image, saturation),
        lambda image: TF.adjust_hue(image, hue),
    ]
    expected = image = Image.fromarray(photo(24, 32))
    for i in order:
        expected = steps[i](expected)

    got = colour_jitter(image, np.random.default_rng(7), (0.2, 0.2, 0.2, 0.1))

    np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


def test_distortion_changes_colours_but_in_one_of_32_cases():
    image = Image.fromarray(photo(16, 16))
    rng = np.random.default_rng(0)

    results = [np.asarray(photometric_distort(image, rng)) for _ in range(600)]

    unchanged = sum(np.array_equal(result, np.asarray(image)) for result in results) / len(results)
    # No change of colour, and no permutation or (one in six) the one that changes nothing: 1/16 * (1/2 + 1/12).
    assert unchanged == pytest.approx(7 / 192, abs=0.03)


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 40), (10, 100), (100, 10), (50, 37), (3, 3)])
@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_any_photo_becomes_a_view(height, width, strength):
    pixels = photo(height, width)

    for seed in range(12):
        view = training_view(pixels, np.random.default_rng(seed), size=32, strength=strength)
        assert view.teacher.shape == view.canvas.shape == (32, 32, 3)
        assert view.teacher.dtype == view.canvas.dtype == np.uint8
        assert view.teacher.flags.writeable
        assert view.canvas.flags.writeable
        assert view.box.dtype == np.float32
        assert (view.box[2:] > 0).all()
        assert (view.box >= 0).all()
        assert (view.box[:2] + view.box[2:] <= 1 + 1e-7).all()


def test_a_grey_photo_goes_through_all_changes():
    pixels = np.repeat(photo(40, 40)[..., :1], 3, axis=2)

    for _, _, apply in CHANGES.values():
        got = apply(Image.fromarray(pixels), np.random.default_rng(0))
        assert got.mode == "RGB"
        assert got.size == (40, 40)


def test_a_view_depends_on_the_generator_alone():
    pixels = photo(60, 80)

    first, again, other = (training_view(pixels, np.random.default_rng([3, 0, row]), size=64) for row in (5, 5, 6))

    for name in ("teacher", "canvas", "box"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
        assert not np.array_equal(getattr(first, name), getattr(other, name))
    np.testing.assert_array_equal(pixels, photo(60, 80))


def test_at_strength_zero_the_teacher_sees_the_resized_crop():
    pixels = photo(60, 80)
    crop = square_crop(pixels, np.random.default_rng(4))

    view = training_view(pixels, np.random.default_rng(4), size=64, strength=0.0)

    expected = Image.fromarray(crop).resize((64, 64), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(view.teacher, np.asarray(expected))


@pytest.mark.parametrize("pixels", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)])
def test_other_arrays_are_refused(pixels):
    with pytest.raises(ValueError, match=r"an image must be uint8 \[H, W, 3\], got"):
        training_view(pixels, np.random.default_rng(0), size=8)


def test_decoding_needs_no_torch():
    code = "import sys, pipelines.training.augment; assert 'torch' not in sys.modules"

    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_random_parts_keep_the_aspect_and_mirror_half_of_the_time():
    image = Image.fromarray(np.arange(40 * 80 * 3, dtype=np.uint8).reshape(40, 80, 3))
    rng = np.random.default_rng(0)

    parts = [augment.random_part(image, rng, 0.5) for _ in range(400)]

    widths = [part.width for part in parts]
    assert (min(widths), max(widths)) == pytest.approx((40, 80), abs=2)
    assert all(part.width == pytest.approx(2 * part.height, abs=2) for part in parts)
    mirrored = [np.asarray(part)[0, 0].tolist() > np.asarray(part)[0, -1].tolist() for part in parts]
    assert 0 < sum(mirrored) < 400
