"""Resize-convolution (RC): bilinear x2 plus a convolution's correction, guided by the image.

LiFT compares with an RC whose layers aren't published; this is FeatUp's `LayeredResizeConv`, a stage of which is the
natural reading of it. Shapes: B batch, C channels, H W pixels, h w cells of the given map.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators.upsamplers.protocol import UpsamplerError, require_counts
from operators.upsamplers.recursive import DoublingNet, DoublingSettings, OfLiftsPaper


@dataclass(frozen=True, kw_only=True)
class ResizeConvSettings(DoublingSettings):
    """What a state dict doesn't tell about a resize convolution."""

    kernel: int = 1
    "of its convolutions"
    stages: int = 1
    "a stack of so many x2 steps with weights of their own; FeatUp's have 4"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "kernel", "stages")
        if self.kernel % 2 == 0:
            raise UpsamplerError(f"kernel must be odd, got {self.kernel}")


class ResizeConv(OfLiftsPaper[ResizeConvSettings]):
    """The method of `ResizeConvNet`."""

    settings = ResizeConvSettings

    def network(self, settings: ResizeConvSettings) -> "ResizeConvNet":
        return ResizeConvNet(settings.channels, settings.kernel, settings.stages)


class ResizeConvNet(DoublingNet):
    """Features [B, C, h, w] and their normalised images [B, 3, H, W] to [B, C, 2^n h, 2^n w], n = `steps` of `stages`.

    A stage: e is the map, bilinearly x2; out = e + activation(conv([e, image resized to e])), ReLU but in the last stage.
    FeatUp's published upsampler has four stages and kernel 1.
    """

    def __init__(self, channels: int, kernel: int = 1, stages: int = 1):
        super().__init__()
        self.stages = stages
        for i in range(1, stages + 1):
            setattr(self, f"conv{i}", nn.Conv2d(channels + 3, channels, kernel, padding=kernel // 2))

    def forward(self, images_BCHW: Tensor, maps_BChw: Tensor, steps: int | None = None) -> Tensor:
        maps = maps_BChw
        for i in range(1, (steps or self.stages) + 1):
            maps = F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False)
            guidance = F.interpolate(images_BCHW, size=maps.shape[-2:], mode="bilinear", align_corners=False)
            correction = getattr(self, f"conv{i}")(torch.cat([maps, guidance], dim=1))
            maps = maps + (F.relu(correction) if i < self.stages else correction)
        return maps

    def working_values(self, grid: tuple[int, int], channels: int) -> int:
        # The enlarged map, the same with the image, the correction before and after ReLU, and the sum.
        return grid[0] * grid[1] * (5 * channels + 6)
