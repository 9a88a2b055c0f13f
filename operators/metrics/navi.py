"""Geometric correspondence on NAVI: views of an object with depth and pose, dense matches between two of them, and recalls.

The rules are probe3d's as ViT-Up's Table 2 uses them: square crops round the object, nearest resampling
throughout, metric points carried along with the pixels, and the best of all matches of a pair judged in space and in the image.
Recalls are kept as counts of errors, so that any split of the pairs adds up exactly.

Shapes: S a view's side in pixels, G the side of the grid of points, h w cells of a map, C channels, M matches.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from storage.errors import RayliftError

METRES, PIXELS = (0.01, 0.02, 0.05), (5.0, 25.0, 50.0)
"""Errors below which a match is right, in space and in the image; the published columns are read as the first, backwards."""

BINS = (0, 30, 60, 90, 120)
"""Borders of the relative rotations, in degrees, by which recalls at 2 cm are given too."""

GRID_STEP = 4
"""A point is taken of every so many pixels: 112 a side of 448."""

_DEPTH_STEPS = 65535 * 10
"""Stored values are so many times the inverse of the depth in mm."""


class NaviError(RayliftError, ValueError):
    """A view that can't be used."""


@dataclass(frozen=True, kw_only=True)
class Camera:
    """Where an object is in a photograph: rotated by a quaternion (w, x, y, z), moved by a translation in mm."""

    quaternion: tuple[float, float, float, float]
    translation: tuple[float, float, float]
    focal_length: float
    "in pixels of the photograph as it was taken"
    image_size: tuple[int, int]
    "of that photograph: height, width"

    @property
    def pose(self) -> Tensor:
        """From the object's coordinates to the camera's, in metres, float32 [4, 4]."""
        pose = torch.eye(4)
        pose[:3, :3], pose[:3, 3] = _rotation(torch.tensor(self.quaternion)), torch.tensor(self.translation) / 1000
        return pose


def _rotation(quaternion: Tensor) -> Tensor:
    w, x, y, z = quaternion
    s = 2 / (quaternion * quaternion).sum()
    rows = [
        [1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w)],
        [s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w)],
        [s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row) for row in rows])


def angle(a: Tensor, b: Tensor) -> float:
    """Degrees of the rotation from one pose [4, 4] to another, in single precision, by the trace: of a pose to itself it may come
    out slightly above 0, which decides whether a view can be paired with itself."""
    trace = (b[:3, :3] @ a[:3, :3].T).diagonal().sum()
    return float(torch.rad2deg(torch.acos(((trace - 1) / 2).clamp(-1, 1))))


def depth_of(values_HW: np.ndarray) -> np.ndarray:
    """Metres of a depth file's 16-bit values, float32; 0 where there is none."""
    disparity = values_HW.astype(np.float32) / np.float32(_DEPTH_STEPS)
    with np.errstate(divide="ignore"):
        millimetres = np.where(values_HW > 0, np.float32(1) / disparity, np.float32(0))
    return millimetres.astype(np.float32) / np.float32(1000)


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A square of a photograph at S x S pixels: brought to a short side of S, cut in the middle, cut again round the object, and
    brought to S once more; pixels are taken as they are each time (nearest)."""

    side: int
    rows: np.ndarray
    "of the square before it was cut round the object, one for each of the S rows"
    columns: np.ndarray
    zoom: float
    "S to the side of the cut"
    of: tuple[int, int]
    "height and width of the depth that it was found by"

    @classmethod
    def round_object(cls, depth_HW: np.ndarray, side: int) -> "Crop":
        """Round what has a depth. Raises `NaviError` where nothing has."""
        square = _square(depth_HW, side)
        found = np.argwhere(square > 0)
        if not len(found):
            raise NaviError("no pixel of its depth has a value")
        low, high = found.min(0), found.max(0)
        longer = int((high - low).max())  # indices of the first and the last pixel, so that the last one is cut off
        if longer < 1:
            raise NaviError("a single pixel of its depth has a value")
        padding = longer - (high - low)
        start = low - padding // 2
        if (start < 0).any() or (start + longer > side).any():
            start = np.maximum(low - padding, 0)
        # OpenCV's rule for nearest pixels, in double precision; torch's differs for some sizes.
        taken = np.minimum(np.floor(np.arange(side) * (1 / (side / longer))).astype(np.int64), longer - 1)
        rows, columns = (np.minimum(first + taken, side - 1) for first in start)
        return cls(side=side, rows=rows, columns=columns, zoom=side / longer, of=(depth_HW.shape[0], depth_HW.shape[1]))

    def __call__(self, values_HW: np.ndarray) -> np.ndarray:
        """[H, W, ...] of the whole photograph, at whatever size, to [S, S, ...]. Raises `NaviError` where its proportions are
        others than the depth's."""
        (height, width), (high, wide) = values_HW.shape[:2], self.of
        if abs(height * wide - width * high) > 0.02 * width * high:
            raise NaviError(
                f"its depth is of {wide} x {high} pixels, and the photograph of {width} x {height}: other proportions"
            )
        return _square(values_HW, self.side)[self.rows[:, None], self.columns]


def _square(values: np.ndarray, side: int) -> np.ndarray:
    """Short side to `side`, by torch's rule for nearest pixels, and the middle of the longer one."""
    height, width = values.shape[:2]
    short = min(height, width)
    size = [side if n == short else int(side * n / short) for n in (height, width)]
    rows, columns = (_nearest(n, m) for n, m in zip((height, width), size, strict=True))
    top, left = (round((m - side) / 2) for m in size)
    return values[rows[top : top + side, None], columns[left : left + side]]


def _nearest(pixels: int, wanted: int) -> np.ndarray:
    numbers = torch.arange(pixels, dtype=torch.float64)[None, None]
    return F.interpolate(numbers, size=wanted, mode="nearest")[0, 0].long().numpy()


@dataclass(frozen=True, kw_only=True)
class View:
    """A view of an object as it is matched."""

    points_GG3: Tensor
    "where the object is at every fourth pixel of the crop, in the camera's metres, float32 [G, G, 3]; depth 0: nothing there"
    pose: Tensor
    "float32 [4, 4]"
    focal_length: float
    "in pixels of the crop"

    @classmethod
    def of(cls, depth_HW: np.ndarray, camera: Camera, crop: Crop) -> "View":
        """Of a depth map in metres, of any size."""
        side = crop.side
        focal = np.float32(camera.focal_length * side / min(camera.image_size))
        # Points are those of the square before it was cut, whose middle the principal point is.
        x, y = ((at.astype(np.float32) + np.float32(0.5) - np.float32(side / 2)) / focal for at in (crop.columns, crop.rows))
        depth = crop(depth_HW)
        points = np.stack([depth * x[None], depth * y[:, None], depth], axis=-1)
        return cls(
            points_GG3=torch.from_numpy(np.ascontiguousarray(points[::GRID_STEP, ::GRID_STEP])),
            pose=camera.pose,
            focal_length=float(focal * crop.zoom),
        )


@dataclass(frozen=True, kw_only=True)
class Matches:
    """The best matches of a pair, the best first, M of them, and how far off each is."""

    source: Tensor
    "numbers of the source's points, row by row, int64 [M]"
    target: Tensor
    in_space: Tensor
    "metres between the target's point and the source's, moved into the target's camera; float64 [M]"
    in_image: Tensor
    "pixels of the target's crop between the same two; float64 [M]"
    degrees: float
    "between the two views"

    def counts(self, wanted: int) -> "PairCounts":
        """How many are right; where fewer than `wanted` were found, the others are wrong."""
        return PairCounts(
            matches=wanted,
            found=len(self.source),
            by_metres=tuple(int((self.in_space < limit).sum()) for limit in METRES),
            by_pixels=tuple(int((self.in_image < limit).sum()) for limit in PIXELS),
            degrees=self.degrees,
        )


@dataclass(frozen=True, kw_only=True)
class PairCounts:
    """Of a pair's best matches, how many are right by each threshold."""

    matches: int
    "that are judged, found or not"
    found: int
    by_metres: tuple[int, ...]
    by_pixels: tuple[int, ...]
    degrees: float


def match(source: View, target: View, maps: tuple[Tensor, Tensor], wanted: int = 1000, *, max_bytes: int = 2**27) -> Matches:
    """The best matches of two views by their maps [h, w, C] of the crops, at most `wanted`.

    Every point of the source is matched with the target's point of the most similar feature; the best are those whose second
    best is the farthest (one minus the ratio of cosine distances). Raises `NaviError` for fewer than two points.
    """
    grid = source.points_GG3.shape[0]
    (i0, f0), (i1, f1) = (_features(view, each, grid) for view, each in zip((source, target), maps, strict=True))
    if len(i1) < 2 or not len(i0):
        raise NaviError(f"{len(i0)} points of the source and {len(i1)} of the target have a depth; two are needed to choose from")
    weights, chosen = [], []
    for part in f0.split(max(1, max_bytes // (8 * len(f1)))):
        cosines, places = (part @ f1.T).topk(2, dim=1)
        distances = (1 - cosines).clamp(min=1e-9)
        weights.append((1 - distances[:, 0] / distances[:, 1]).cpu())
        chosen.append(places[:, 0].cpu())
    best = torch.cat(weights).topk(min(wanted, len(i0))).indices
    sources, targets = i0[best], i1[torch.cat(chosen)[best]]
    ours, theirs = (view.points_GG3.flatten(0, 1)[at].double() for view, at in ((source, sources), (target, targets)))
    moved = _moved(ours, source.pose.double(), target.pose.double())
    return Matches(
        source=sources,
        target=targets,
        in_space=(moved - theirs).norm(dim=1),
        in_image=(_projected(moved, target) - _projected(theirs, target)).norm(dim=1),
        degrees=angle(source.pose, target.pose),
    )


def _features(view: View, map_hwC: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """The numbers of the points that have a depth, on the CPU, and their features as unit vectors, float32."""
    there = (view.points_GG3[..., 2] > 0).flatten().nonzero()[:, 0]
    maps = map_hwC.float().permute(2, 0, 1)[None]
    if maps.shape[-2:] != (grid, grid):
        maps = F.interpolate(maps, size=(grid, grid), mode="bicubic", align_corners=False)
    return there, F.normalize(maps[0].flatten(1).T[there.to(maps.device)], dim=1)


def _moved(points: Tensor, source: Tensor, target: Tensor) -> Tensor:
    relative = target @ torch.linalg.inv(source)
    return points @ relative[:3, :3].T + relative[:3, 3]


def _projected(points: Tensor, view: View) -> Tensor:
    """In pixels of the crop, but for where it begins, which a difference doesn't depend on."""
    return view.focal_length * points[:, :2] / points[:, 2:]


@dataclass(frozen=True, kw_only=True)
class Recalls:
    """Shares of right matches, 0 to 1, over all pairs."""

    by_metres: tuple[float, ...]
    by_pixels: tuple[float, ...]
    by_degrees: tuple[float, ...]
    "at 2 cm, by bins of the relative rotation; NaN for a bin without a pair"

    @classmethod
    def of(cls, pairs: Sequence[PairCounts]) -> "Recalls":
        total = sum(each.matches for each in pairs)
        middle = METRES.index(0.02)
        bins = []
        for low, high in itertools.pairwise(BINS):
            shares = [each.by_metres[middle] / each.matches for each in pairs if low <= each.degrees < high]
            bins.append(sum(shares) / len(shares) if shares else math.nan)
        return cls(
            by_metres=tuple(sum(each.by_metres[i] for each in pairs) / total for i in range(len(METRES))),
            by_pixels=tuple(sum(each.by_pixels[i] for each in pairs) / total for i in range(len(PIXELS))),
            by_degrees=tuple(bins),
        )


def pair_sums(pairs: Sequence[PairCounts]) -> np.ndarray:
    """What each pair adds to the sums of `Recalls`, float64 [n, k]: right matches by each threshold in space, then in the image,
    then the share at 2 cm in the bin of its rotation; and what these are divided by: matches, and pairs of each bin."""
    middle, rows = METRES.index(0.02), []
    for each in pairs:
        in_bin = [float(low <= each.degrees < high) for low, high in itertools.pairwise(BINS)]
        share = each.by_metres[middle] / each.matches
        rows.append([*each.by_metres, *each.by_pixels, *(share * one for one in in_bin), each.matches, *in_bin])
    return np.array(rows, np.float64)


def recalls_of_sums(sums_Bk: np.ndarray) -> np.ndarray:
    """`Recalls` [B, 10] of sums of `pair_sums`: by metres, pixels and degrees; NaN for a bin without a pair."""
    matched, bins = len(METRES) + len(PIXELS), len(BINS) - 1
    right, shares = sums_Bk[:, :matched], sums_Bk[:, matched : matched + bins]
    matches, pairs = sums_Bk[:, matched + bins, None], sums_Bk[:, matched + bins + 1 :]
    by_bin = np.divide(shares, pairs, out=np.full_like(shares, np.nan), where=pairs > 0)
    return np.concatenate([right / matches, by_bin], axis=1)


def draw_partners(poses: Sequence[Tensor], random: torch.Generator) -> list[int | None]:
    """A partner for each view of an object's scene: one of those turned from it by more than 0 and at most 120 degrees, drawn
    uniformly; None where there is none. One draw of `random` for each view that has any."""
    partners: list[int | None] = []
    for pose in poses:
        degrees = [angle(pose, other) for other in poses]
        weights = torch.tensor([float(0 < each <= BINS[-1]) for each in degrees])
        partners.append(int(torch.multinomial(weights, 1, generator=random)) if weights.any() else None)
    return partners
