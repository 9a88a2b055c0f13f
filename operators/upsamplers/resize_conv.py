"""Resize-convolution (RC): bilinear x2 plus a convolution's correction, guided by the image.

LiFT compares with an RC whose layers aren't published; this is FeatUp's `LayeredResizeConv`, a stage of which is the
natural reading of it. Shapes: B batch, C channels, H W pixels, h w cells of the given map.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators.upsamplers.protocol import UpsamplerError, require_counts
from operators.upsamplers.recursive import DOUBLED_BESIDE, DoublingSettings, OfLiftsPaper, StripedNet, doubled, near


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


class ResizeConvNet(StripedNet):
    """Features [B, C, h, w] and their normalised images [B, 3, H, W] to [B, C, 2^n h, 2^n w], n = `steps` of `stages`.

    A stage: e is the map, bilinearly x2; out = e + activation(conv([e, image resized to e])), ReLU but in the last stage.
    FeatUp's published upsampler has four stages and kernel 1.
    """

    def __init__(self, channels: int, kernel: int = 1, stages: int = 1):
        super().__init__()
        self.stages, self.reach = stages, kernel // 2
        for i in range(1, stages + 1):
            setattr(self, f"conv{i}", nn.Conv2d(channels + 3, channels, kernel, padding=kernel // 2))

    def guidance(self, images_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
        return F.interpolate(images_BCHW, size=grid, mode="bilinear", align_corners=False)

    def rows(self, step: int, guidance_BCHW: Tensor, maps_BChw: Tensor, rows: slice) -> Tensor:
        conv = cast(nn.Conv2d, self.get_submodule(f"conv{step}"))
        seen = near(rows, self.reach, guidance_BCHW.shape[-2])
        maps, before = doubled(maps_BChw, seen, "bilinear"), rows.start - seen.start
        joined = torch.cat([maps, guidance_BCHW[:, :, seen]], dim=1)
        if self.reach:
            # As the convolution pads with zeros, but above and below where the map ends alone.
            joined = F.pad(joined, [0, 0, self.reach - before, self.reach - (seen.stop - rows.stop)])
        correction = F.conv2d(joined, conv.weight, conv.bias, padding=(0, self.reach))
        return maps[:, :, before : before + rows.stop - rows.start] + (F.relu(correction) if step < self.stages else correction)

    def stripe_values(self, rows: int, width: int, channels: int) -> int:
        seen = rows + 2 * self.reach
        # The given rows, enlarged; the same with the image, and padded; the correction before and after ReLU, and the sum.
        joined = 2 if self.reach else 1
        return width * (channels * ((seen + DOUBLED_BESIDE) * 5 // 4 + joined * seen + 3 * rows) + 6 * joined * seen)
