"""How a readout's task draws images as the model's input."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from operators.image import Geometry, fit
from pipelines.features.pictures import Picture
from pipelines.features.rows import Size
from pipelines.readouts.task import Placement, Task
from storage.datasets.images import EncodedImage


@dataclass(frozen=True, kw_only=True)
class Square:
    """Draws images as DeAP's code does: at the task's side, bilinearly, then at the model's by the nearest pixel."""

    placement: Placement
    side: int
    size: Size

    def __call__(self, pixels_HW3: np.ndarray) -> np.ndarray:
        geometry = Geometry(mode=self.placement, height=self.side, width=self.side, interpolation="bilinear")
        small = Image.fromarray(fit(Image.fromarray(pixels_HW3), geometry))
        return np.array(small.resize((self.size[1], self.size[0]), Image.Resampling.NEAREST))


def picture_of(image: EncodedImage, task: Task, size: Size) -> Picture:
    """The image as the task places it, `size` being the model's input."""
    draws = Square(placement=task.placement, side=task.side, size=size)
    return Picture(image=image, size=size, draw=draws, geometry=task.placement)
