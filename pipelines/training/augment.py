"""ViT-Up's training images: a random square of a photo, changed in colour and sharpness, and the canvas the student sees.

The teacher sees the whole square; the student sees it smaller, somewhere on a canvas of noise, and is asked for features
inside the box where it lies (arXiv 2606.14024). NumPy and Pillow only: decoding tasks start faster without torch. All
chance comes from the generator that is passed in.

Shapes: H W pixels of the photo, S pixels of the square's and the canvas's side.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

Change: TypeAlias = Callable[[Image.Image, np.random.Generator], Image.Image]

STRIPE = 16
"""Rows that are computed in floating point at a time: what is between then stays in the processor's cache."""


@dataclass(frozen=True, kw_only=True)
class TrainingView:
    """One photo as teacher and student see it."""

    teacher: np.ndarray
    "uint8 [S, S, 3]: the augmented square"
    canvas: np.ndarray
    "uint8 [S, S, 3]: noise, and the square in it"
    box: np.ndarray
    "float32 (x0, y0, width, height) of the square on the canvas, in parts of its side"


def training_view(pixels_HWC: np.ndarray, rng: np.random.Generator, *, size: int = 896, strength: float = 1.0) -> TrainingView:
    """A random view of an RGB photo uint8 [H, W, 3], `size` pixels a side; see `augment` for `strength`.

    Raises `ValueError` for other arrays than such photos.
    """
    if pixels_HWC.dtype != np.uint8 or pixels_HWC.ndim != 3 or pixels_HWC.shape[2] != 3 or 0 in pixels_HWC.shape:
        raise ValueError(f"an image must be uint8 [H, W, 3], got {pixels_HWC.dtype} {list(pixels_HWC.shape)}")
    square = Image.fromarray(square_crop(pixels_HWC, rng)).resize((size, size), Image.Resampling.BILINEAR)
    teacher = augment(np.array(square), rng, strength)
    canvas, box = student_canvas(teacher, rng)
    return TrainingView(teacher=teacher, canvas=canvas, box=box)


def square_crop(pixels_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random square, a view: at least half the long side where the short side has that, and any place."""
    height, width = pixels_HWC.shape[:2]
    short, long = min(height, width), max(height, width)
    share = rng.uniform(min(0.5 * long, short) / short, 1.0)
    side = max(1, int(short * share))
    x, y = rng.integers(0, width - side, endpoint=True), rng.integers(0, height - side, endpoint=True)
    return pixels_HWC[y : y + side, x : x + side]


def random_part(image: Image.Image, rng: np.random.Generator, smallest: float) -> Image.Image:
    """A random part of an image's own aspect, its sides `smallest` to 1 of the image's, mirrored in half of the cases."""
    share = rng.uniform(smallest, 1.0)
    width, height = (max(1, int(side * share)) for side in image.size)
    x, y = rng.integers(0, image.width - width, endpoint=True), rng.integers(0, image.height - height, endpoint=True)
    part = image.crop((int(x), int(y), int(x) + width, int(y) + height))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part


# --- the student's canvas ---------------------------------------------------------------------------------------------

SCALES = (0.1, 1.0)
"""Smallest and largest side of the square on the canvas, in parts of the canvas."""


def student_canvas(square_SSC: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A canvas uint8 [S, S, 3] of noise with the square in it, at a random scale and place; and the box (`place`)."""
    size = square_SSC.shape[0]
    scale = rng.uniform(*SCALES)
    side = shrunk_side(size, scale)
    corner = rng.integers(0, size - side, 2, endpoint=True)
    # The official noise is uniform in [0, 1), times 255, truncated: never 255.
    noise = rng.integers(0, 255, (size, size, 3), np.uint8)
    return place(square_SSC, noise, scale, (int(corner[0]), int(corner[1])))


def place(square_HWC: np.ndarray, noise_SSC: np.ndarray, scale: float, corner: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Shrink the square, put it on the noise with its upper left pixel at `corner` (x, y), in place.

    Returns the canvas and the box (x0, y0, width, height), float32. As in the official code, the box's side is `scale`
    itself, less than a pixel more than what was pasted, cut off at the canvas's edge.
    """
    size = noise_SSC.shape[0]
    side = shrunk_side(size, scale)
    x, y = corner
    noise_SSC[y : y + side, x : x + side] = resize_aliased(square_HWC, side)
    x0, y0 = x / size, y / size
    return noise_SSC, np.array([x0, y0, min(x0 + scale, 1.0) - x0, min(y0 + scale, 1.0) - y0], np.float32)


def shrunk_side(size: int, scale: float) -> int:
    """Pixels of a side at a scale of the canvas."""
    return max(1, int(size * scale))


def resize_aliased(pixels_HWC: np.ndarray, side: int) -> np.ndarray:
    """Resize uint8 [H, W, 3] to `side` x `side`, bilinear from the four nearest pixels (no antialias), truncated to uint8.

    What `F.interpolate(align_corners=False)` computes in float32.
    """
    if pixels_HWC.shape[:2] == (side, side):
        return pixels_HWC
    above, below, down = _neighbours(pixels_HWC.shape[0], side)
    left, right, across = _neighbours(pixels_HWC.shape[1], side)
    out = np.empty((side, side, 3), np.uint8)
    for first in range(0, side, STRIPE):
        rows = slice(first, first + STRIPE)
        upper, lower = (pixels_HWC[which[rows]].astype(np.float32) for which in (above, below))
        between = _towards(upper, lower, down[rows, None, None])
        # take is three times as fast as an index here.
        start, end = (np.take(between, which, axis=1) for which in (left, right))
        out[rows] = _towards(start, end, across[:, None])  # casting truncates
    return out


def _towards(start: np.ndarray, end: np.ndarray, share: np.ndarray) -> np.ndarray:
    """start + (end - start) * share, without new arrays: both are overwritten."""
    end -= start
    end *= share
    start += end
    return start


def _neighbours(n: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `side` pixels: the two of `n` it lies between, and how far it is towards the second, float32."""
    step = np.float32(n / side)
    at = np.maximum((np.arange(side, dtype=np.float32) + np.float32(0.5)) * step - np.float32(0.5), 0)
    first = np.minimum(at.astype(np.int64), n - 1)
    return first, np.minimum(first + 1, n - 1), at - first.astype(np.float32)


# --- augmentation -----------------------------------------------------------------------------------------------------


def augment(pixels_HWC: np.ndarray, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """ViT-Up's changes of uint8 [H, W, 3] in their order; `pixels_HWC` itself at strength 0, as in validation.

    Strength a raises each change's probability p to p^(1/a): 1 is the published run's, less is milder. The noise is added in
    floating point and the result truncated to uint8, of which the teacher sees the 8-bit values (officially, the noise's
    fractions). Raises `ValueError` for a negative strength.
    """
    if strength < 0:
        raise ValueError(f"strength must be at least 0, got {strength}")
    if strength == 0:
        return pixels_HWC
    image = Image.fromarray(pixels_HWC)
    for probability, probability_inside, change in CHANGES.values():
        if rng.random() < probability ** (1 / strength) and rng.random() < probability_inside:
            image = change(image, rng)
    return np.array(image)


JITTER = (0.2, 0.2, 0.3, 0.05)
"""ViT-Up's amounts of `colour_jitter`."""


def colour_jitter(image: Image.Image, rng: np.random.Generator, amounts: tuple[float, float, float, float]) -> Image.Image:
    """torchvision's ColorJitter: brightness, contrast and saturation by a factor, hue by a part of the circle, in any order."""
    limits = np.array(amounts[:3])
    factors = (*rng.uniform(1 - limits, 1 + limits), rng.uniform(-amounts[3], amounts[3]))
    for i in rng.permutation(4):
        image = _COLOURS[i](image, factors[i])
    return image


def photometric_distort(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """torchvision's RandomPhotometricDistort with its own settings: each change, and a permutation of channels, with p .5."""
    factors = rng.uniform((0.875, 0.5, 0.5, -0.05), (1.125, 1.5, 1.5, 0.05))
    wanted = rng.random(4) < 0.5
    order = (0, 1, 2, 3) if rng.random() < 0.5 else (0, 2, 3, 1)
    for i in order:
        if wanted[i]:
            image = _COLOURS[i](image, factors[i])
    if rng.random() < 0.5:
        channels = image.split()
        image = Image.merge("RGB", [channels[i] for i in rng.permutation(3)])
    return image


def _hue(image: Image.Image, part: float) -> Image.Image:
    h, s, v = image.convert("HSV").split()
    shift = int(part * 255)
    # Hue is a byte that wraps.
    turned = h.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, s, v)).convert("RGB")


_COLOURS: tuple[Callable[[Image.Image, float], Image.Image], ...] = (
    lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    _hue,
)


def gaussian_blur(pixels_HWC: np.ndarray, sigma: float) -> np.ndarray:
    """Blur uint8 [H, W, 3] by a 5 x 5 Gaussian; beyond the border the image is mirrored. (Pillow's is an approximation.)"""
    weights = np.exp(-0.5 * (np.arange(3) / sigma) ** 2)
    weights = (weights / (weights[0] + 2 * weights[1:].sum())).astype(np.float32)
    padded = np.pad(pixels_HWC, ((2, 2), (2, 2), (0, 0)), "reflect")
    out = np.empty_like(pixels_HWC)
    for first in range(0, len(out), STRIPE):
        rows = padded[first : first + STRIPE + 4].astype(np.float32)
        blurred = _blur_rows(_blur_rows(rows, weights).swapaxes(0, 1), weights).swapaxes(0, 1)
        blurred += 0.5  # casting truncates
        out[first : first + STRIPE] = blurred
    return out


def _blur_rows(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Each row with two on either side, by the weights of distances 0, 1 and 2; four rows fewer."""
    near, far = rows[1:-3] + rows[3:-1], rows[:-4] + rows[4:]
    near *= weights[1]
    far *= weights[2]
    near += far
    near += rows[2:-2] * weights[0]
    return near


def _jpeg(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(rng.choice((95, 80, 60, 40), p=(0.25, 0.35, 0.25, 0.15))))
    return Image.open(file).convert("RGB")


def _noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    levels = rng.standard_normal((image.height, image.width, 3), np.float32)
    levels *= 0.03 * 255
    levels += np.asarray(image)
    return Image.fromarray(truncate(levels))


def truncate(levels: np.ndarray) -> np.ndarray:
    """Floating-point levels to uint8 as the official code does it: clipped, fractions dropped. `levels` is overwritten."""
    return np.clip(levels, 0, 255, out=levels).astype(np.uint8)


CHANGES: dict[str, tuple[float, float, Change]] = {
    "colours": (0.5, 1.0, lambda image, rng: photometric_distort(colour_jitter(image, rng, JITTER), rng)),
    "grey": (0.1, 1.0, lambda image, _: image.convert("L").convert("RGB")),
    "blur": (0.35, 1.0, lambda image, rng: Image.fromarray(gaussian_blur(np.asarray(image), rng.uniform(0.3, 1.5)))),
    "jpeg": (1.0, 1.0, _jpeg),
    "autocontrast": (0.2, 0.5, lambda image, _: ImageOps.autocontrast(image)),
    "equalize": (0.15, 0.5, lambda image, _: ImageOps.equalize(image)),
    "sharpen": (0.2, 0.5, lambda image, _: ImageEnhance.Sharpness(image).enhance(1.5)),
    "posterize": (0.1, 0.5, lambda image, _: ImageOps.posterize(image, 5)),
    # Officially 0.9 on a scale up to 255: all but black is inverted.
    "solarize": (0.05, 0.5, lambda image, _: ImageOps.solarize(image, 1)),
    "invert": (0.02, 0.5, lambda image, _: ImageOps.invert(image)),
    "noise": (0.6, 1.0, _noise),
}
"""ViT-Up's changes in order: the probability that strength alters, one that it doesn't (torchvision's own), the change."""
