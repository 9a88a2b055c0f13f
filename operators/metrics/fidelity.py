"""How near a map's cells come to the backbone's own cells of the same image, given at a larger size.

The self-supervised trainings of LiFT (arXiv 2403.14625, eq. 1) and ViT-Up look at such pairs of maps; no paper's table does. Most
of a cosine between features is what all cells share, which a blurred map has, too; so it is also taken of what is left when the
own map's mean cell is subtracted from both.

Shapes: h w cells, C channels; n images, B draws.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from operators.metrics.similarity import finite_map


@dataclass(frozen=True, kw_only=True)
class MapFidelity:
    """Of one image, means over the cells."""

    cosine: float
    centred: float
    "the cosine of what differs from the own map's mean cell"


def cell_cosines(map_hwC: Tensor | np.ndarray, own_hwC: Tensor | np.ndarray) -> Tensor:
    """Cosines of the cells of a map with those of the backbone's own, as they are and less the own map's mean cell: float32
    [2, h, w] on the map's device, of the own map's grid. A map of a grid that is so many times smaller has its cells repeated. A
    cell of zeros has a cosine of 0 to all.

    Raises `ValueError` where channels differ or grids are no multiples, for an empty map, NaN or infinity.
    """
    found, own = finite_map(map_hwC), finite_map(own_hwC)
    times = [whole // part for whole, part in zip(own.shape, found.shape, strict=True)]
    if tuple(n * part for n, part in zip(times, found.shape, strict=True)) != tuple(own.shape) or times[2] != 1:
        raise ValueError(
            f"the backbone's own map {tuple(own.shape)} must be [h, w, C] of a multiple of the map {tuple(found.shape)}"
        )
    found = found.repeat_interleave(times[0], 0).repeat_interleave(times[1], 1)
    mean = own.mean(dim=(0, 1))
    return torch.stack([F.cosine_similarity(found, own, dim=-1), F.cosine_similarity(found - mean, own - mean, dim=-1)])


def fidelity_of(cosines_2hw: Tensor) -> MapFidelity:
    """What `cell_cosines` of an image come to."""
    cosine, centred = cosines_2hw.double().mean(dim=(1, 2)).tolist()
    return MapFidelity(cosine=cosine, centred=centred)


def fidelity_sums(images: list[MapFidelity]) -> np.ndarray:
    """[n, 3] of images: both cosines, and 1 for the image, which weighs as much as any other."""
    return np.array([[each.cosine, each.centred, 1.0] for each in images])


def fidelity(sums_B3: np.ndarray) -> np.ndarray:
    """Both cosines [B, 2] of sums over images, times 100."""
    return 100 * sums_B3[:, :2] / sums_B3[:, 2:]
