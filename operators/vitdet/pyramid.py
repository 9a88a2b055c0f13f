"""ViTDet's simple feature pyramid (section 3): each level is made of the backbone's last map by itself."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from operators.vitdet.layers import ChannelNorm, NormedConv

FACTORS = (4.0, 2.0, 1.0, 0.5)
"""Cells a side of the levels p2 to p5 for one of a map of stride 16."""


class Pyramid(nn.Module):
    """Maps [B, C, h, w] to levels [B, channels, f h, f w] for each factor f of 4, 2, 1 and 0.5, and a last one of every second
    cell of the level of stride 32, where there is one.

    Levels are called `simfp_2`, ... by log2 of their stride in pixels, of which the map has `stride`.
    """

    def __init__(self, dim: int, channels: int, factors: Sequence[float] = FACTORS, stride: int = 16):
        super().__init__()
        self.numbers = [round(math.log2(stride / factor)) for factor in factors]
        for number, factor in zip(self.numbers, factors, strict=True):
            self.add_module(f"simfp_{number}", _level(dim, channels, factor))

    def forward(self, maps_BChw: Tensor) -> list[Tensor]:
        levels = [self.get_submodule(f"simfp_{number}")(maps_BChw) for number in self.numbers]
        return [*levels, F.max_pool2d(levels[-1], kernel_size=1, stride=2)] if self.numbers[-1] == 5 else levels


def _level(dim: int, channels: int, factor: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    if factor == 4:
        layers = [_doubling(dim, dim // 2), ChannelNorm(dim // 2), nn.GELU(), _doubling(dim // 2, dim // 4)]
    elif factor == 2:
        layers = [_doubling(dim, dim // 2)]
    elif factor == 0.5:
        layers = [nn.MaxPool2d(2, stride=2)]
    elif factor != 1:
        raise ValueError(f"the pyramid has levels of 4, 2, 1 and 0.5 times the map, not {factor}")
    width = dim if factor <= 1 else int(dim // factor)
    return nn.Sequential(*layers, NormedConv(width, channels, 1), NormedConv(channels, channels, 3))


def _doubling(channels: int, out: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels, out, 2, stride=2)
