"""Pictures of features: PCA to RGB fitted once and applied to any map, foreground masks, similarity maps, panels.

NumPy and Pillow only: what is drawn comes from a store as often as from a model.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from storage.documents import JsonObject, JsonValue, as_object, decode

if TYPE_CHECKING:
    from matplotlib.colors import Colormap

BACKGROUND = (232, 232, 232)
"""Colour of cells that are not foreground, or have no features."""


_COLOUR_ARRAYS = ("mean", "components", "low", "high")


@dataclass(frozen=True, kw_only=True)
class Foreground:
    """Which cells show the objects: those whose projection on the first principal component is above `threshold`.

    The recipe of DINOv2's PCA figures (arXiv 2304.07193, Fig. 1): threshold the first component, then colour what is left
    by a second PCA. Here the threshold is Otsu's, and the side that touches the images' borders less is the foreground.
    """

    mean: np.ndarray
    direction: np.ndarray
    threshold: float

    @classmethod
    def fit(cls, maps: Sequence[np.ndarray]) -> "Foreground":
        """Fit on maps [rows, columns, C] of any images."""
        from skimage.filters import threshold_otsu  # slow to import, and few need it

        mean, components = _principal(_cells(maps), 1)
        projected = [(np.asarray(m, np.float64) - mean) @ components[0] for m in maps]
        values = np.concatenate([p.ravel() for p in projected])
        border = np.concatenate([np.concatenate([p[0], p[-1], p[:, 0], p[:, -1]]) for p in projected])
        threshold = float(threshold_otsu(values))
        # The mean over all cells counts the border, too; that only blurs the comparison.
        sign = 1.0 if (border > threshold).mean() <= (values > threshold).mean() else -1.0
        return cls(mean=mean, direction=sign * components[0], threshold=sign * threshold)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Features [..., C] to a mask [...]."""
        return (np.asarray(features, np.float64) - self.mean) @ self.direction > self.threshold


@dataclass(frozen=True, kw_only=True)
class RgbProjection:
    """Three principal components as colours: `mean` [C], `components` [3, C], `low` and `high` [3] (2nd, 98th percentile)."""

    mean: np.ndarray
    components: np.ndarray
    low: np.ndarray
    high: np.ndarray
    foreground: Foreground | None = None

    @classmethod
    def fit(cls, maps: Sequence[np.ndarray], *, foreground: bool = False) -> "RgbProjection":
        """Fit on maps [rows, columns, C] of any images, or on their foreground.

        Signs are fixed so that a refit on the same maps gives the same colours.
        """
        mask = Foreground.fit(maps) if foreground else None
        cells = _cells(maps)
        if mask:
            cells = cells[mask(cells)]
        mean, components = _principal(cells, 3)
        low, high = np.percentile((cells - mean) @ components.T, [2, 98], axis=0)
        return cls(mean=mean, components=components, low=low, high=high, foreground=mask)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Features [..., C] to uint8 colours [..., 3]; background and NaN are light grey."""
        features = np.asarray(features, np.float64)
        there = ~np.isnan(features).any(axis=-1)
        projected = (np.where(there[..., None], features, self.mean) - self.mean) @ self.components.T
        scaled = (projected - self.low) / np.maximum(self.high - self.low, 1e-12)
        colours = (np.clip(scaled, 0, 1) * 255).round().astype(np.uint8)
        coloured = there & self.foreground(features) if self.foreground else there
        return np.where(coloured[..., None], colours, np.array(BACKGROUND, np.uint8))

    def to_json(self) -> dict[str, JsonValue]:
        """Plain lists; `from_json` is the way back."""
        data: dict[str, JsonValue] = {name: getattr(self, name).tolist() for name in _COLOUR_ARRAYS}
        if mask := self.foreground:
            arrays = {"mean": mask.mean.tolist(), "direction": mask.direction.tolist()}
            data["foreground"] = {**arrays, "threshold": mask.threshold}
        return data

    @classmethod
    def from_json(cls, data: JsonObject) -> "RgbProjection":
        foreground = None
        if data.get("foreground"):
            mask = as_object(data["foreground"])
            mean, direction = np.array(mask["mean"]), np.array(mask["direction"])
            threshold = decode(float, mask["threshold"], "threshold")
            foreground = Foreground(mean=mean, direction=direction, threshold=threshold)
        return cls(**{name: np.array(data[name]) for name in _COLOUR_ARRAYS}, foreground=foreground)


def _cells(maps: Sequence[np.ndarray], at_most: int = 50_000) -> np.ndarray:
    """Cells of all maps, float64 [N, C], evenly thinned out to `at_most`."""
    cells = np.concatenate([np.asarray(m).reshape(-1, m.shape[-1]) for m in maps])
    return cells[:: -(-len(cells) // at_most)].astype(np.float64)


def _principal(cells: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean [C] and the first components [count, C], signs fixed by their largest entry."""
    mean = cells.mean(axis=0)
    _, vectors = np.linalg.eigh(np.cov(cells - mean, rowvar=False))
    components = vectors[:, ::-1][:, :count].T
    signs = np.sign(components[np.arange(count), np.abs(components).argmax(axis=1)])
    return mean, components * signs[:, None]


def cosine_map(query: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Cosine similarity of `query` [C] with every cell of `features` [..., C], float32 [...]."""
    query, features = np.asarray(query, np.float32), np.asarray(features, np.float32)
    lengths = np.linalg.norm(features, axis=-1) * np.linalg.norm(query)
    return features @ query / np.maximum(lengths, 1e-12)


def heat(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """A map of numbers as uint8 colours [..., 3], from `low` (dark blue) to `high` (yellow)."""
    scaled = (np.asarray(values, np.float64) - low) / max(high - low, 1e-12)
    return (_viridis()(np.clip(scaled, 0, 1))[..., :3] * 255).round().astype(np.uint8)


@functools.cache  # matplotlib gives a copy, which makes its table of colours anew: a millisecond
def _viridis() -> "Colormap":
    import matplotlib  # 0.3 s, and most of what looks at a store draws no heat

    return matplotlib.colormaps["viridis"]


_KINDS = (
    (230, 60, 50), (60, 140, 250), (40, 180, 90), (250, 170, 30), (170, 80, 220), (20, 190, 200), (240, 100, 170), (140, 190, 40),
    (120, 110, 240), (200, 120, 60),
)  # fmt: skip
"""Colours of kinds of objects, used again from the 11th on: names are beside them."""


@dataclass(frozen=True, kw_only=True)
class DrawnObject:
    """An object of a picture."""

    box: tuple[float, float, float, float]
    "x1, y1, x2, y2 in the picture's pixels"
    mask: np.ndarray | None
    "bool [H, W] of the picture's pixels"
    text: str
    kind: int = 0
    "number of its class, which its colour is of"

    @property
    def colour(self) -> tuple[int, int, int]:
        return _KINDS[self.kind % len(_KINDS)]


def draw_objects(pixels_HW3: np.ndarray, objects: Sequence[DrawnObject]) -> np.ndarray:
    """A picture, uint8 [H, W, 3], with its objects' masks as tints, their boxes as frames, and their texts on grounds of their
    colour, inside the picture and beside each other where there is room; what comes later lies above."""
    tinted = pixels_HW3.astype(np.float32)
    for each in objects:
        if each.mask is not None:
            tinted[each.mask] = 0.55 * tinted[each.mask] + 0.45 * np.array(each.colour)
    image = Image.fromarray(tinted.round().astype(np.uint8))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=12)
    for each in objects:
        x1, y1, x2, y2 = each.box
        # Pillow refuses frames that end before they begin.
        pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=each.colour, width=2)
    taken: list[tuple[float, float, float, float]] = []
    for each in reversed(objects):
        size = pen.textlength(each.text, font=font) + 4, 15.0
        taken.append(_text_place(each.box, size, image.size, taken))
    for each, (left, top, right, bottom) in zip(objects, reversed(taken), strict=True):
        pen.rectangle((left, top, right, bottom), fill=each.colour)
        dark = np.dot(each.colour, (0.299, 0.587, 0.114)) < 150
        pen.text((left + 2, top), each.text, fill="white" if dark else "black", font=font)
    return np.asarray(image)


def _text_place(
    box: tuple[float, float, float, float],
    size: tuple[float, float],
    picture: tuple[int, int],
    taken: Sequence[tuple[float, float, float, float]],
) -> tuple[float, float, float, float]:
    """Where a box's text goes: above its upper side, below it or at its lower side, and further down; what covers least."""
    (x1, y1, _, y2), (width, height) = box, size
    left = min(max(0.0, x1), max(0.0, picture[0] - width))
    tops = [y1 - height, y1, y2 - height, y2, *(y1 + n * height for n in range(1, 6))]
    inside = [min(max(0.0, top), max(0.0, picture[1] - height)) for top in tops]
    places = [(left, top, left + width, top + height) for top in inside]
    return min(places, key=lambda place: sum(_overlap(place, other) for other in taken))


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> float:
    """Pixels that two places share."""
    across, down = (min(one[axis + 2], other[axis + 2]) - max(one[axis], other[axis]) for axis in (0, 1))
    return max(0.0, across) * max(0.0, down)


_BAR_PX = 160
"""Length of a colour bar."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One picture of a panel: uint8 `pixels` [h, w, 3], or None for a grey field."""

    pixels: np.ndarray | None
    mark: tuple[float, float] | None = None
    "a point (x, y) to ring, in 0..1 of the tile"
    is_photo: bool = False
    "enlarged with interpolation; cells of a map stay sharp squares"
    caption: str = ""
    "written into the tile's lower left corner"

    def image(self, width: int, height: int) -> Image.Image:
        """The tile at a size in pixels."""
        if self.pixels is None:
            return Image.new("RGB", (width, height), BACKGROUND)
        method = Image.Resampling.BICUBIC if self.is_photo else Image.Resampling.NEAREST
        image = Image.fromarray(self.pixels).resize((width, height), method)
        if self.mark:
            x, y = self.mark[0] * width, self.mark[1] * height
            draw = ImageDraw.Draw(image)
            for radius, colour in ((9, "white"), (8, "red"), (7, "red"), (6, "white")):
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour)
        if self.caption:
            draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=13)
            draw.rectangle((0, height - 18, font.getlength(self.caption) + 8, height), fill="white")
            draw.text((4, height - 17), self.caption, fill="black", font=font)
        return image


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Tiles in rows and columns, each `tile_size` (width, height) pixels, with titles."""

    tiles: Sequence[Sequence[Tile]]
    columns: Sequence[str]
    "titles above the columns; may have several lines"
    rows: Sequence[str]
    "titles before the rows"
    title: str
    tile_size: tuple[int, int]
    scale: tuple[str, str] | None = None
    "what `heat`'s lowest and highest colour stand for: a colour bar below the tiles"
    legend: Sequence[tuple[str, tuple[int, int, int]]] = ()
    "names of colours, below the tiles"

    def draw(self) -> Image.Image:
        """The panel as one picture."""
        (width, height), gap = self.tile_size, 6
        font = ImageFont.load_default(size=13)
        left = 16 + max((round(font.getlength(line)) for text in self.rows for line in text.split("\n")), default=0)
        head = 17 * max(text.count("\n") + 1 for text in self.columns)
        top = 28 + head
        wide = max(left + len(self.columns) * (width + gap) + 2, round(font.getlength(self.title)) + 16)
        below = top + len(self.tiles) * (height + gap) + 2
        if self.scale:
            wide = max(wide, left + _BAR_PX + 20 + sum(round(font.getlength(text)) for text in self.scale))
        under_scale = below + (20 if self.scale else 0)
        places = self._legend_places(left, under_scale, wide, font)
        canvas = Image.new("RGB", (wide, max([under_scale, *(y + 20 for _, y in places)])), "white")
        draw = ImageDraw.Draw(canvas)
        draw.text((8, 5), self.title, fill="black", font=font)
        for c, text in enumerate(self.columns):
            draw.multiline_text((left + c * (width + gap), top - head), text, fill="black", font=font, spacing=3)
        for r, tiles in enumerate(self.tiles):
            y = top + r * (height + gap)
            draw.multiline_text((8, y + height // 2 - 16), self.rows[r], fill="black", font=font, spacing=3)
            for c, tile in enumerate(tiles):
                canvas.paste(tile.image(width, height), (left + c * (width + gap), y))
        if self.scale:
            low, high = self.scale
            x = left + round(font.getlength(low)) + 6
            bar = Image.fromarray(heat(np.linspace(0, 1, _BAR_PX)[None].repeat(12, 0), 0, 1))
            draw.text((left, below), low, fill="black", font=font)
            canvas.paste(bar, (x, below + 2))
            draw.text((x + _BAR_PX + 6, below), high, fill="black", font=font)
        for (x, y), (name, colour) in zip(places, self.legend, strict=True):
            draw.rectangle((x, y + 3, x + 11, y + 14), fill=colour, outline="grey")
            draw.text((x + 17, y), name, fill="black", font=font)
        return canvas

    def _legend_places(
        self, left: int, top: int, wide: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
    ) -> list[tuple[int, int]]:
        """Left upper corners of the legend's entries, in lines as wide as the picture."""
        places, x, y = [], left, top
        for name, _ in self.legend:
            takes = 33 + round(font.getlength(name))
            if x > left and x + takes > wide:
                x, y = left, y + 20
            places.append((x, y))
            x += takes
        return places
