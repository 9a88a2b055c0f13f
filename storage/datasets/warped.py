"""Pairs whose correspondences are exactly known: photographs of any kind, each beside a warp of it under another light.

The source is the photograph, the target what a second camera sees of it: turned, tilted and closer, so that four corners of the
view go to others (a homography, as DeTone et al. draw theirs, arXiv 1606.03798), and for `thin-plate` bent besides by a
thin-plate spline through a grid of 3 x 3 displaced points (Rocco et al., arXiv 1703.05593). Brightness, contrast, colour and
gamma are others, too. Points lie at corners of the photograph by Shi and Tomasi's measure (CVPR 1994); where they are in the
target is computed, not found. All of a pair follows from the seed and the photograph's name and size.

Photographs are files of a folder and those below it, or members of its tars. Listing reads those that are drawn, small: no label
says where corners are.
"""

import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from storage.datasets.files import DatasetError, ItemLeftOut, Listed
from storage.datasets.images import EncodedImage, ImageFile, TarImage, decoded, tar_members
from storage.datasets.spair import Pair
from storage.inputs import expand_inputs
from storage.left_out import LeftOut, leave_out
from storage.orientation import Orientation
from storage.paths import Folder

WarpKind: TypeAlias = Literal["homography", "thin-plate"]

CATEGORY = "warped"

SIDE = 512
"""Shorter side of targets at most, in pixels."""

FINER = 1.5
"""Cells of the photograph in a pixel of the target a side, before it's warped: views are 1.15 to 1.8 times closer."""

SMALL = 288
"""Shorter side at most of what corners are found in."""

POINTS, FEWEST = 24, 6
"""Points of a pair at most, and at least."""

APART, MARGIN, WEAKEST = 20, 16, 20.0
"""Pixels between corners, and from them to the edges, where they are found; and how strong they are at least."""

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Pillow's, of which photographs of 8 bits are made."""

_TRIES = 1_000


@dataclass(frozen=True, kw_only=True)
class Warp:
    """Which place of a photograph each place of the target shows; places are x, y in pixels of the target's size, from its edge.

    Photograph and target have one size here, whatever the photograph's own is.
    """

    size: tuple[int, int]
    "(width, height)"
    view: tuple[tuple[float, float], ...]
    "where the target's corners lie in the photograph, clockwise from the top left"
    bend: tuple[tuple[float, float], ...] = ()
    "displacements of 3 x 3 points of the target, row by row, in its shorter side; none: it's a homography alone"

    @classmethod
    def drawn(cls, random: np.random.Generator, kind: WarpKind, size: tuple[int, int]) -> "Warp":
        """One whose target lies within the photograph."""
        for _ in range(_TRIES):
            warp = cls(size=size, view=_view(random, size), bend=_bend(random) if kind == "thin-plate" else ())
            if warp._is_sound():
                return warp
        raise AssertionError(f"no view of {size} lies within it")

    def shown(self, places_n2: np.ndarray) -> np.ndarray:
        """Where in the photograph the target's places lie: [n, 2] to [n, 2]."""
        return _projected(self._homography, places_n2 + self._bent(places_n2))

    def found(self, places_n2: np.ndarray) -> np.ndarray:
        """Where in the target the photograph's places lie, the inverse of `shown`; NaN of those that are beyond it."""
        straight = _projected(np.linalg.inv(self._homography), places_n2)
        found, sides = straight, np.array(self.size)
        for _ in range(60 if self.bend else 0):  # contracts, see `_is_sound`
            found = straight - self._bent(np.clip(found, 0, sides))
        return np.where(((found >= 0) & (found <= sides)).all(axis=1, keepdims=True), found, np.nan)

    def _is_sound(self) -> bool:
        """Whether all of the target is of the photograph, and no place of the photograph is in the target twice."""
        width, height = self.size
        across, down = np.meshgrid(np.linspace(0, width, 33), np.linspace(0, height, 33))
        places = np.stack([across, down], axis=-1)
        seen = self.shown(places.reshape(-1, 2))
        if (seen < 1).any() or (seen > np.array(self.size) - 1).any():
            return False
        moved = self._bent(places.reshape(-1, 2)).reshape(33, 33, 2)
        steps = [np.diff(moved, axis=axis) / np.diff(places, axis=axis).max() for axis in (0, 1)]
        return bool(max(np.linalg.norm(each, axis=-1).max() for each in steps) < 1 / 3)

    @cached_property
    def _homography(self) -> np.ndarray:
        """[3, 3], of the target's places, as columns (x, y, 1), to the photograph's."""
        width, height = self.size
        rows, right = [], []
        for (x, y), (u, v) in zip([(0, 0), (width, 0), (width, height), (0, height)], self.view, strict=True):
            rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
            right += [u, v]
        return np.append(np.linalg.solve(np.array(rows, float), np.array(right, float)), 1).reshape(3, 3)

    @cached_property
    def _spline(self) -> Callable[[np.ndarray], np.ndarray]:
        """The thin plate through the 9 displacements: of places [n, 2] in the unit square to [n, 2]."""
        from scipy.interpolate import RBFInterpolator  # for this kind of warp alone

        return RBFInterpolator(_GRID, np.array(self.bend), kernel="thin_plate_spline")

    def _bent(self, places_n2: np.ndarray) -> np.ndarray:
        """What the spline adds to places of the target."""
        if not self.bend:
            return np.zeros_like(places_n2)
        return self._spline(places_n2 / np.array(self.size, float)) * min(self.size)


_GRID = np.stack(np.meshgrid([0.0, 0.5, 1.0], [0.0, 0.5, 1.0]), axis=-1).reshape(9, 2)


def _projected(homography: np.ndarray, places_n2: np.ndarray) -> np.ndarray:
    mapped = places_n2 @ homography[:, :2].T + homography[:, 2]
    return mapped[:, :2] / mapped[:, 2:]


def _view(random: np.random.Generator, size: tuple[int, int]) -> tuple[tuple[float, float], ...]:
    """What another camera sees: turned by up to 25 degrees, 1.15 to 1.8 times closer, each corner moved by up to 18 %."""
    turn, closer = np.radians(random.uniform(-25, 25)), random.uniform(1.15, 1.8)
    half = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * np.array(size) / 2 / closer
    half *= 1 + random.uniform(-0.18, 0.18, (4, 2))
    spin = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    view = half @ spin.T + np.array(size) * random.uniform(0.35, 0.65, 2)
    return tuple((float(x), float(y)) for x, y in view)


def _bend(random: np.random.Generator) -> tuple[tuple[float, float], ...]:
    """Each of the 3 x 3 points by up to 8 % of the shorter side."""
    return tuple((float(x), float(y)) for x, y in random.uniform(-0.08, 0.08, (9, 2)))


# --- images -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class WarpedImage(EncodedImage):
    """The target of a pair, which is made as it is read; `width` and `height` are its own. No store has it."""

    photo: EncodedImage
    kind: WarpKind
    seed: int

    @property
    def displayed(self) -> str:
        return f"{self.photo.displayed}, warped"

    def data(self) -> bytes:
        """As a PNG. Raises `DatasetError`."""
        pixels = decoded(self.photo.data(), self.photo.displayed, lambda image: self._drawn(_photograph(image)))
        out = io.BytesIO()
        pixels.save(out, "PNG", compress_level=1)
        return out.getvalue()

    def content(self) -> bytes:
        return self.photo.content()

    def identity(self) -> object:
        return [self.photo.identity(), self.kind, self.seed, self.width, self.height]

    def orientation(self) -> Orientation:
        return Orientation(width=self.width, height=self.height)

    @property
    def warp(self) -> Warp:
        return Warp.drawn(self._random(0), self.kind, (self.width, self.height))

    def _random(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(self.photo.keys[0].encode()), purpose])

    def _drawn(self, photograph: Image.Image) -> Image.Image:
        """The warp of an upright RGB image, under another light."""
        width, height = self.width, self.height
        finer = photograph.resize((round(FINER * width), round(FINER * height)), Image.Resampling.LANCZOS)
        across, down = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
        places = self.warp.shown(np.stack([across, down], axis=-1).reshape(-1, 2)) / (width, height) * finer.size
        pixels = _sampled(np.asarray(finer, np.float32), places - 0.5).reshape(height, width, 3)
        return _relit(Image.fromarray(np.round(pixels).astype(np.uint8)), self._random(1))


def _photograph(image: Image.Image) -> Image.Image:
    """Upright, in RGB. Raises `ValueError`."""
    if image.mode not in MODES:
        raise ValueError(f"its pixels are {image.mode}, of which no photograph is warped; convert it to 8 bits")
    return ImageOps.exif_transpose(image).convert("RGB")


def _sampled(pixels_HW3: np.ndarray, places_n2: np.ndarray) -> np.ndarray:
    """Bilinearly between pixels, whose middles are whole numbers: float [n, 3]."""
    height, width = pixels_HW3.shape[:2]
    places = np.clip(places_n2, 0, np.array([width, height]) - 1.001)
    x, y = np.floor(places).astype(int).T
    right, below = (places - np.floor(places)).astype(np.float32).T[:, :, None]
    upper = pixels_HW3[y, x] * (1 - right) + pixels_HW3[y, x + 1] * right
    lower = pixels_HW3[y + 1, x] * (1 - right) + pixels_HW3[y + 1, x + 1] * right
    return upper * (1 - below) + lower * below


def _relit(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Brightness, contrast and colour by 0.7 to 1.35, then a gamma of 0.75 to 1.3."""
    for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = kind(image).enhance(random.uniform(0.7, 1.35))
    gamma = random.uniform(0.75, 1.3)
    return image.point([round(255 * (value / 255) ** gamma) for value in range(256)] * 3)


# --- points -----------------------------------------------------------------------------------------------------------


def _corners(image: Image.Image) -> tuple[tuple[int, int], np.ndarray]:
    """The upright size (width, height), and corners [n, 2] as shares of it, strongest first. Raises `ValueError`."""
    size = Orientation.of(image).upright_size
    scale = min(1.0, SMALL / min(size))
    if min(size) * scale <= 2 * MARGIN or max(size) > 4 * min(size):
        raise ValueError(f"{size[0]} x {size[1]} pixels are too few or too narrow for warps")
    image.draft("RGB", (round(size[0] * scale), round(size[1] * scale)))  # JPEGs are decoded small
    small = _photograph(image).resize([round(side * scale) for side in size], Image.Resampling.LANCZOS).convert("L")
    grey = np.asarray(small, float)
    down, across = np.gradient(grey)
    xx, yy, xy = (_smoothed(product) for product in (across * across, down * down, across * down))
    strength = (xx + yy) / 2 - np.sqrt(((xx - yy) / 2) ** 2 + xy**2)
    strength[:MARGIN], strength[-MARGIN:], strength[:, :MARGIN], strength[:, -MARGIN:] = 0, 0, 0, 0
    found = list(_peaks(strength))
    return size, (np.array(found, float).reshape(-1, 2) + 0.5) / small.size


def _peaks(strength: np.ndarray) -> Iterator[tuple[int, int]]:
    """x, y of the strongest, until `APART` pixels round each leave none; four times as many as a pair has, since views differ."""
    for _ in range(4 * POINTS):
        y, x = np.unravel_index(strength.argmax(), strength.shape)
        if strength[y, x] < WEAKEST:
            return
        yield int(x), int(y)
        strength[max(0, y - APART) : y + APART + 1, max(0, x - APART) : x + APART + 1] = 0


def _smoothed(values: np.ndarray) -> np.ndarray:
    """By 1 4 6 4 1 along both axes, edges repeated."""
    for axis in (0, 1):
        padded = np.pad(values, [(2, 2) if axis == each else (0, 0) for each in (0, 1)], "edge")
        parts = [np.take(padded, range(at, at + values.shape[axis]), axis) for at in range(5)]
        values = np.tensordot(np.array([1, 4, 6, 4, 1]) / 16, np.stack(parts), 1)
    return values


# --- pairs ------------------------------------------------------------------------------------------------------------


def load_warped(folder: Folder, count: int = 200, seed: int = 0, kind: WarpKind = "homography") -> Listed[Pair]:
    """Pairs of `count` photographs that are drawn, or of all where there are fewer, in the order of the draw.

    Points number pixels, the first one's middle being 0, 0; the target's box is all of it. What can't be decoded, or has fewer
    than `FEWEST` corners in both, is left out. Raises `DatasetError` and `InputError`.
    """
    photos = _photographs(folder)
    drawn = [photos[number] for number in np.random.default_rng(seed).permutation(len(photos))[:count]]
    pairs: list[Pair] = []
    left_out: dict[str, LeftOut] = {}
    for photo in drawn:
        try:
            pairs.append(_pair(photo, seed, kind))
        except ItemLeftOut as error:
            leave_out(left_out, error.reason, error.displayed)
    if not pairs:
        why = ", ".join(left_out)
        raise DatasetError(f"{folder.displayed}: of {len(drawn):,} photographs that were drawn, none makes a pair: {why}")
    return Listed(tuple(pairs), len(photos), left_out)


def _photographs(folder: Folder) -> list[EncodedImage]:
    """Sorted by name."""
    files = expand_inputs([folder.url], folder.options)
    if any(file.url.endswith(folder.url.rstrip("/")) for file in files):
        raise DatasetError(f"{folder.displayed} is no folder; give the one that holds the photographs, or tars of them")
    if all(file.is_image for file in files):
        return [ImageFile.at(folder, name) for name in sorted(file.name for file in files)]
    members = tar_members(folder, sorted(file.name for file in files))
    in_order = sorted(members, key=lambda member: (member.key, member.tar))
    return [TarImage(folder=folder, member=each, keys=(each.key,)) for each in in_order]


def _pair(photo: EncodedImage, seed: int, kind: WarpKind) -> Pair:
    """Raises `ItemLeftOut`, and `DatasetError` where the photograph isn't there."""
    size, corners_n2 = decoded(photo.data(), photo.displayed, _corners)
    scale = min(1.0, SIDE / min(size))
    width, height = (round(side * scale) for side in size)
    target = WarpedImage(keys=(f"{photo.keys[0]}, warped",), photo=photo, kind=kind, seed=seed, width=width, height=height)
    found_n2 = target.warp.found(corners_n2 * np.array([width, height]))
    margin = MARGIN * min(width, height) / SMALL
    far = (found_n2 >= margin) & (found_n2 <= np.array([width, height]) - margin)
    inside = np.flatnonzero(far.all(axis=1))[:POINTS]
    if len(inside) < FEWEST:
        raise ItemLeftOut(photo.displayed, f"fewer than {FEWEST} corners lie in the photograph and in its warp")
    return Pair(
        name=f"{photo.keys[0]}:{CATEGORY}",
        category=CATEGORY,
        source=photo.sized(size),
        target=target,
        source_xy=_numbered(corners_n2[inside] * np.array(size)),
        target_xy=_numbered(found_n2[inside]),
        box=(0.0, 0.0, float(width), float(height)),
    )


def _numbered(places_n2: np.ndarray) -> tuple[tuple[float, float], ...]:
    """Places from the edge as numbers of pixels, to a thousandth: other processors give other last bits."""
    return tuple((round(float(x), 3), round(float(y), 3)) for x, y in places_n2 - 0.5)
