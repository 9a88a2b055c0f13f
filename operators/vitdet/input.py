"""Images as the detector takes them: longer side at a size, normalised, in a square whose rest is the mean colour.

Shapes: B images, H W pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from operators.image import fitted_size
from operators.vitdet.settings import DetectorError, DetectorSettings, Size


def resize(image: Image.Image, side: int) -> Image.Image:
    """An RGB image with its longer side at `side` pixels, bilinear with antialias."""
    height, width = fitted_size((image.height, image.width), (side, side))
    return image.resize((width, height), Image.Resampling.BILINEAR)


def padded(images: Sequence[np.ndarray | Tensor], settings: DetectorSettings) -> tuple[Tensor, list[Size]]:
    """Images uint8 [H, W, 3] of at most the square's sides, as `resize` makes them: normalised float32 [B, 3, side, side] on the
    CPU, and each one's height and width.

    Raises `DetectorError` for images that are larger.
    """
    side = settings.square_pad
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (settings.pixel_mean, settings.pixel_std))
    batch, sizes = [], []
    for image in images:
        # Copied, since arrays of Pillow are read-only.
        pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1).float()
        height, width = pixels.shape[1:]
        if max(height, width) > side:
            raise DetectorError(f"an image of {height} x {width} px doesn't fit into {side} x {side}; resize it first")
        batch.append(F.pad((pixels - mean) / std, (0, side - width, 0, side - height)))
        sizes.append((height, width))
    return torch.stack(batch), sizes
