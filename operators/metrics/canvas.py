"""Where an image and its key points lie on the square canvas of a correspondence protocol.

Points are x, y in pixels; K of them.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

CanvasMode = Literal["fit_then_pad", "pad_then_resize"]


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """A `width` x `height` image on a black square of `side` pixels.

    `fit_then_pad` (LiFT): the longer side becomes `side`, the other one is rounded half to even, and the result is centred.
    `pad_then_resize` (ViT-Up): the shorter side gets floor(difference / 2) black pixels on both ends, and what may be one
    pixel short of a square is stretched to the canvas.
    """

    mode: CanvasMode
    width: int
    height: int
    side: int

    def __post_init__(self) -> None:
        if min(self.width, self.height, self.side) < 1:
            raise ValueError(f"a {self.width} x {self.height} image can't be put on a canvas of {self.side} pixels")

    @property
    def long_side(self) -> int:
        return max(self.width, self.height)

    @property
    def scale(self) -> float:
        """Canvas pixels per image pixel."""
        return self.side / self.long_side

    @property
    def resized(self) -> tuple[int, int]:
        """Width and height of the image in `fit_then_pad`; a side never vanishes."""
        return max(1, round(self.width * self.scale)), max(1, round(self.height * self.scale))

    @property
    def corner(self) -> tuple[int, int]:
        """(x, y) of the image's upper left corner: in canvas pixels, or for `pad_then_resize` in the padded image's."""
        if self.mode == "fit_then_pad":
            return (self.side - self.resized[0]) // 2, (self.side - self.resized[1]) // 2
        return (self.long_side - self.width) // 2, (self.long_side - self.height) // 2

    def draw(self, pixels_HW3: np.ndarray) -> np.ndarray:
        """The image, uint8 [height, width, 3], on its canvas, uint8 [side, side, 3]: Lanczos for LiFT, else bilinear, both
        by Pillow and so antialiased."""
        if pixels_HW3.shape != (self.height, self.width, 3):
            raise ValueError(f"this canvas is for [{self.height}, {self.width}, 3], not {list(pixels_HW3.shape)}")
        image, (x, y) = Image.fromarray(pixels_HW3), self.corner
        if self.mode == "fit_then_pad":
            canvas = Image.new("RGB", (self.side, self.side))
            canvas.paste(image.resize(self.resized, Image.Resampling.LANCZOS), (x, y))
            return np.array(canvas)
        padded = Image.new("RGB", (self.width + 2 * x, self.height + 2 * y))
        padded.paste(image, (x, y))
        return np.array(padded.resize((self.side, self.side), Image.Resampling.BILINEAR))

    def pixels(self, xy_K2: np.ndarray, grid: int) -> np.ndarray:
        """The cells (x, y), int64, of a `grid` x `grid` map of the canvas that key points fall into.

        Points on the image's right and lower border belong to the last cell.
        """
        if self.mode == "fit_then_pad":
            found = self.compared(xy_K2) * (grid / self.side)
        else:
            # Multiplied first: a point on a cell's border is then on it exactly.
            found = (np.asarray(xy_K2, np.float64) + self.corner) * grid / self.long_side
        return np.floor(found).astype(np.int64).clip(0, grid - 1)

    def compared(self, xy_K2: np.ndarray) -> np.ndarray:
        """Key points where predictions are compared with them, float64: canvas pixels for LiFT, image pixels for ViT-Up.

        LiFT's are rounded to float32 on the way, as its tensors are: that decides where a point is on a pixel's border.
        """
        if self.mode == "pad_then_resize":
            return np.asarray(xy_K2, np.float64)
        points = np.asarray(xy_K2, np.float32) * np.float32(self.scale) + np.array(self.corner, np.float32)
        return points.astype(np.float64)

    def predicted(self, cells_K2: np.ndarray, grid: int) -> np.ndarray:
        """Cells (x, y) of a `grid` x `grid` map in the coordinates of `compared`; not clipped to the image.

        LiFT takes the pixel's index, without half a pixel. Where cells are larger than pixels: the one below its centre.
        """
        cells = np.asarray(cells_K2, np.float64)
        if self.mode == "fit_then_pad":
            return cells if grid == self.side else np.floor((cells + 0.5) * self.side / grid)
        return np.floor((cells + 0.5) * self.long_side / grid) - self.corner

    def length(self, pixels: float) -> float:
        """A length in image pixels, where predictions are compared."""
        return pixels * self.scale if self.mode == "fit_then_pad" else float(pixels)
