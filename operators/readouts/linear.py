"""Linear probes: a 1x1 convolution to classes, on any map or on one that FeatUp has enlarged; the depth bins of ViT-Up's probe.

Shapes: B batch, C channels, h w cells of the given map, which an upsampler may have enlarged to the output's size.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators.readouts.readout import Readout

BINS = 256
NEAREST, FARTHEST = 1e-3, 10.0
"""Ends of the range that depth bins divide evenly, in the target's unit."""


class LinearReadout(Readout):
    """One 1x1 convolution; logits are resized to the output where the map isn't as large. Bilinear resizing commutes with it."""

    settings = frozenset({"resize"})

    def __init__(self, channels: int, outputs: int, *, resize: Literal["bilinear", "nearest"] = "bilinear"):
        super().__init__(channels, outputs)
        self.resize = resize
        self.conv = nn.Conv2d(channels, outputs, 1)

    def _predict(self, features_BChw: Tensor, _size: tuple[int, int], _pooled_BC: Tensor | None) -> Tensor:
        return self.conv(features_BChw)


class FeatUpReadout(Readout):
    """What DeAP's release compares with as FeatUp: one 1x1 convolution to the outputs, on the frozen backbone's map that FeatUp
    has enlarged x16. Logits come to the output's size by the nearest, and no bias is given to depth.

    `hidden`: the release's other mode, 1x1 to so many channels (there 32), ReLU, 3x3 to the outputs.
    """

    settings = frozenset({"hidden"})
    reads = "featup"
    resize = "nearest"

    def __init__(self, channels: int, outputs: int, *, hidden: int | None = None):
        super().__init__(channels, outputs)
        first = nn.Conv2d(channels, hidden or outputs, 1)
        self.decoder = nn.Sequential(first, nn.ReLU(), nn.Conv2d(hidden, outputs, 3, padding=1)) if hidden else first

    def _predict(self, features_BChw: Tensor, _size: tuple[int, int], _pooled_BC: Tensor | None) -> Tensor:
        return self.decoder(features_BChw)


class DepthBins(Readout):
    """Depth [B, 1, H, W] as the expectation over bins, from each cell's features and the image's normalised CLS vector."""

    needs_pooled = True
    only_outputs = 1

    def __init__(self, channels: int, outputs: int = 1):
        super().__init__(channels, outputs)
        self.conv = nn.Conv2d(2 * channels, BINS, 1)
        self.register_buffer("depths", torch.linspace(NEAREST, FARTHEST, BINS), persistent=False)

    def _predict(self, features_BChw: Tensor, _size: tuple[int, int], pooled_BC: Tensor | None) -> Tensor:
        # The convolution of features joined with a vector that is the same everywhere, without joining them.
        assert pooled_BC is not None, "needs_pooled, so that it was checked"
        of_cells, of_image = self.conv.weight.split(self.channels, dim=1)
        image = F.linear(F.normalize(pooled_BC, dim=1), of_image.flatten(1), self.conv.bias)
        scores = (F.conv2d(features_BChw, of_cells) + image[..., None, None]).float()
        weights = scores.relu() + 0.1
        # Bins that are nearly alike need more digits than bfloat16 has.
        with torch.autocast(features_BChw.device.type, enabled=False):
            depth = torch.einsum("bkhw,k->bhw", weights, self.depths)
        return (depth / weights.sum(dim=1)).unsqueeze(1)
