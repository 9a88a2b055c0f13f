"""Depth maps of data sets in metres, and whether the values of their files were read by the right scale."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from storage.datasets.files import DatasetError, DatasetFile
from storage.datasets.images import H5Array, decoded
from storage.spread import spread


@dataclass(frozen=True, kw_only=True)
class DepthPng(DatasetFile):
    """A grey PNG of 16 bits; or of 8, where a metre is fewer than 256 values."""

    per_metre: float
    "values per metre"

    def read(self) -> np.ndarray:
        """Metres, float64 [H, W]. Raises `DatasetError`."""

        def deep(image: Image.Image) -> Image.Image:
            of_8_bits = image.mode == "L" and self.per_metre < 256
            if image.mode != "I" and not image.mode.startswith("I;16") and not of_8_bits:
                raise DatasetError(
                    f"{self.displayed} is a {image.mode} image; depth is 16-bit grey. If it is grey of 8 bits, and 255 stands "
                    "for 10 m, give --depth-scale 25.5"
                )
            image.load()
            return image

        return np.array(decoded(self.data(), self.displayed, deep)) / self.per_metre

    def identity(self) -> object:
        """What `digest` counts."""
        return [self.name, self.per_metre]


@dataclass(frozen=True, kw_only=True)
class DepthMap:
    """Depth in metres, wherever it lies."""

    source: DepthPng | H5Array
    array_per_metre: float = 1.0
    "values per metre of an array; PNGs have their own"

    @property
    def displayed(self) -> str:
        """Its place as it may be printed."""
        return self.source.displayed

    def read(self) -> np.ndarray:
        """Metres, float32 [H, W]; 0 where nothing was measured (stored as 0, NaN or infinity). Raises `DatasetError`."""
        depth = self.source.read() / self.array_per_metre
        if depth.ndim != 2:
            raise DatasetError(f"{self.displayed} has the shape {depth.shape}; a depth map has rows and columns only")
        depth = np.where(np.isfinite(depth), depth, 0).astype(np.float32)
        if (depth < 0).any():
            raise DatasetError(f"{self.displayed} holds {depth.min():g} m; depth can't be negative, and 0 stands for none")
        return depth

    @property
    def per_metre(self) -> float:
        """How many of the stored values are a metre."""
        return self.source.per_metre if isinstance(self.source, DepthPng) else self.array_per_metre

    def scaled(self, per_metre: float) -> "DepthMap":
        """The same map, its values read otherwise."""
        if isinstance(self.source, DepthPng):
            return replace(self, source=replace(self.source, per_metre=float(per_metre)))
        return replace(self, array_per_metre=float(per_metre))

    def content(self) -> bytes:
        """What `content_digests` counts. Raises `DatasetError`."""
        return self.source.content()

    def identity(self) -> object:
        """What `digest` counts."""
        return {"source": self.source} | ({} if self.array_per_metre == 1 else {"per_metre": self.array_per_metre})


# --- is it plausible? -------------------------------------------------------------------------------------------------

CONVENTIONS: Mapping[float, str] = {
    1.0: "metres",
    25.5: "8 bits for 10 m",
    256.0: "KITTI's",
    1000.0: "millimetres",
    5000.0: "TUM's",
    6553.5: "16 bits for 10 m",
    10000.0: "tenths of a millimetre",
}
"""Values per metre that depth files come in."""

RIVALS = (1.0, 1000.0, 5000.0)
"""Those that NYUv2 comes in, far enough apart for a median to tell which it is."""

TYPICAL_M = 2.7
"""Median depth of NYUv2's rooms."""

SAMPLE = 16


def require_plausible(maps: Sequence[DepthMap]) -> None:
    """Hold a sample of NYUv2's maps, all read by one scale, against what rooms and its sensor have.

    Raises `DatasetError`, with the medians that other scales would give, where the median is nearer to a room's by another of
    NYUv2's scales, or where PNGs have a median below 0.8 m, or more than 5% below 0.5 m or above the sensor's 10 m; and where no
    map of the sample can be read.
    """
    chosen = [maps[i] for i in spread(len(maps), SAMPLE)]
    scale, values = chosen[0].per_metre, _sampled(chosen)
    if not len(values):
        return
    low, median, high = np.percentile(values, (5, 50, 95))
    likeliest = min(RIVALS, key=lambda each: abs(math.log(median / each / TYPICAL_M)))
    of_sensor = scale == 1 or (low / scale >= 0.5 and median / scale >= 0.8 and high / scale <= 10.5)
    if of_sensor and likeliest == (scale if scale in RIVALS else likeliest):
        return
    others = ", ".join(f"{name} (value / {each:g}) {median / each:.3g} m" for each, name in CONVENTIONS.items())
    raise DatasetError(
        f"{chosen[0].displayed} and {len(chosen) - 1} others of {len(maps)}: as value / {scale:g}, depth has a median of "
        f"{median / scale:.3g} m, 5% are below {low / scale:.3g} m and 5% above {high / scale:.3g} m, which NYUv2's rooms don't "
        f"have. The median would be, in {others}. Say how many values are a metre with --depth-scale"
    )


def _sampled(maps: Sequence[DepthMap]) -> np.ndarray:
    """Stored values, not 0, of all maps that can be read, equally many of each but for rounding."""
    values, errors = [], []
    for each in maps:
        try:
            depth = each.read()
        except DatasetError as error:
            errors.append(error)
            continue
        there = depth[depth > 0].astype(np.float64) * each.per_metre
        values.append(there[:: max(1, len(there) // 4096)])
    if not values:
        raise errors[0]
    return np.concatenate(values)
