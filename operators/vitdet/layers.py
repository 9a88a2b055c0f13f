"""Layers that the pyramid and the heads share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of each pixel of [B, C, H, W], eps 1e-6.

    It is no `nn.LayerNorm` to optimisers, too: the published recipe decays its weights, and not the backbone's.
    """

    eps = 1e-6

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        last = maps_BCHW.permute(0, 2, 3, 1)
        return F.layer_norm(last, self.weight.shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class NormedConv(nn.Conv2d):
    """A convolution of odd `kernel` without bias, its size kept, then `ChannelNorm`, then ReLU where it is `active`."""

    def __init__(self, channels: int, out: int, kernel: int, *, active: bool = False):
        super().__init__(channels, out, kernel, padding=kernel // 2, bias=False)
        self.norm = ChannelNorm(out)
        self.active = active

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        out = self.norm(super().forward(maps_BCHW))
        return F.relu(out, inplace=True) if self.active else out


def kaiming_(layer: nn.Conv2d | nn.ConvTranspose2d) -> None:
    """Draw weights as the heads' convolutions begin (He et al., 2015, by the output's channels); biases are 0."""
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def normal_(layer: nn.Conv2d | nn.Linear, std: float) -> None:
    """Draw weights from a normal distribution; biases are 0."""
    nn.init.normal_(layer.weight, std=std)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
