"""A small Gaussian blur of tensors, which two upsamplers' trainings use."""

import torch
import torch.nn.functional as F
from torch import Tensor

_REACH = 2
"""Cells to each side: 5 x 5."""


def gaussian_blur(maps_BCHW: Tensor, sigma: float = 1.0) -> Tensor:
    """Maps [B, C, H, W] under a 5 x 5 Gaussian whose weights sum to 1, mirrored at the border without repeating its cells.

    Raises `ValueError` for maps of less than 3 cells a side, which can't be mirrored so.
    """
    if min(maps_BCHW.shape[-2:]) <= _REACH:
        raise ValueError(f"a 5 x 5 blur needs more than {_REACH} cells a side, got {tuple(maps_BCHW.shape[-2:])}")
    offsets = torch.arange(-_REACH, _REACH + 1, device=maps_BCHW.device, dtype=maps_BCHW.dtype)
    weights = torch.exp(-0.5 * (offsets / sigma).square())
    weights = weights / weights.sum()
    channels = maps_BCHW.shape[1]
    padded = F.pad(maps_BCHW, [_REACH] * 4, mode="reflect")
    # Each channel for itself: as planes of one channel, the same numbers take a CPU ten times as long.
    down, across = (weights.view(shape).expand(channels, -1, -1, -1) for shape in ((1, 1, -1, 1), (1, 1, 1, -1)))
    return F.conv2d(F.conv2d(padded, down, groups=channels), across, groups=channels)
