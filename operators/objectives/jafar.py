"""What JAFAR is trained to do: maps of a smaller image, enlarged to the grid of the image's own map, and little moved by noise
in the image that guides.

Numbers are those of the released code. What is drawn is given from outside, so that a run that is continued draws the same.

Shapes: B batch, C channels, h w cells of the compared maps, H W pixels of the image that guides.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from operators.objectives.blur import gaussian_blur
from operators.objectives.lift import cosine_loss
from operators.transfer import to_device

EPS = 1e-6
"""Added to the range of a target's channels."""

BLURRED, NOISY = 0.5, 0.3
"""Parts of the images that are blurred (5 x 5, sigma 1), and that have noise added."""

DEVIATION = 0.02
"""Of that noise, in units of the normalised image."""


def scaled_l2(predicted_BChw: Tensor, target_BChw: Tensor) -> Tensor:
    """Mean squared difference, both brought to the range of each target cell's channels: its smallest is 0, its largest 1."""
    low, high = target_BChw.aminmax(dim=1, keepdim=True)
    return ((predicted_BChw - target_BChw) / (high - low + EPS)).square().mean()


def map_loss(predicted_BChw: Tensor, target_BChw: Tensor) -> Tensor:
    """JAFAR's distance of two maps, AnyUp's as well: `cosine_loss` and `scaled_l2`. Raises `ValueError` where shapes differ."""
    if predicted_BChw.shape != target_BChw.shape:
        raise ValueError(f"predicted {tuple(predicted_BChw.shape)} and target {tuple(target_BChw.shape)} must be of one shape")
    return cosine_loss(predicted_BChw, target_BChw) + scaled_l2(predicted_BChw, target_BChw)


def shrunk_side(side: int, patch: int, share: float) -> int:
    """Pixels of an image's side made smaller to `share` of it: a multiple of the patch, at least one."""
    return max(1, round(side * share / patch)) * patch


def shrunk_sides(side: int, patch: int, least: float, most: float) -> tuple[int, ...]:
    """All that shares between `least` and `most` come to, largest first."""
    first, last = (shrunk_side(side, patch, share) for share in (most, least))
    return tuple(range(first, last - 1, -patch))


@dataclass(frozen=True, kw_only=True)
class GuidanceNoise:
    """What changes the image that guides, as it was drawn: each image's own."""

    blurred_B: Tensor
    "bool: whether it is blurred"
    added_B3HW: Tensor
    "what is added after that, zero for most"

    @classmethod
    def draw(cls, generators: list[np.random.Generator], shape: tuple[int, int], device: torch.device) -> Self:
        """One of each generator, for images of a shape (H, W)."""
        blurred = [bool(rng.random() < BLURRED) for rng in generators]
        noisy = [bool(rng.random() < NOISY) for rng in generators]
        noise = [
            DEVIATION * rng.standard_normal((3, *shape), np.float32) if each else np.zeros((3, *shape), np.float32)
            for rng, each in zip(generators, noisy, strict=True)
        ]
        return cls(blurred_B=to_device(torch.tensor(blurred), device), added_B3HW=to_device(np.stack(noise), device))

    def __call__(self, images_B3HW: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        """Normalised images, blurred and with noise, within what pixels can be: 0 to 1 before they were normalised.

        The released code clamps the *normalised* image to [0, 1], which cuts most of what is darker than the mean, and where it
        only adds noise adds it in place, to the clean image as well, so that the two branches are the same; neither is done here.
        """
        images = torch.where(self.blurred_B[:, None, None, None], gaussian_blur(images_B3HW), images_B3HW)
        images = images + self.added_B3HW
        middle, unit = to_device(torch.tensor([mean, std]).view(2, 3, 1, 1), images.device)
        return torch.clamp(images, -middle / unit, (1 - middle) / unit)
