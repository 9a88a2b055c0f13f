"""ViTDet as one network, stage by stage, with or without an upsampler such as LiFT between backbone and pyramid.

With one, everything after it works in a frame of twice the pixels: an upsampler stands for the backbone's map of an image twice
as large, which is what it is trained for and what the heads know. Boxes are brought to the output's size at the end.
(LiFT, section 3.5, doesn't say which frame; the parameters of its Table 4 fit this one alone.)

Shapes: B images, C channels, H W pixels of the padded input, h w cells of the backbone's map.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators.upsamplers.recursive import DoublingNet
from operators.vitdet.backbone import ViT
from operators.vitdet.boxes import clipped, nonempty, paste, scaled
from operators.vitdet.heads import Found, Heads
from operators.vitdet.proposals import Predicted, ProposalNetwork, Proposals
from operators.vitdet.pyramid import Pyramid
from operators.vitdet.settings import DetectorSettings, Size


class Backbone(Pyramid):
    """The ViT as `net` beside the pyramid's levels: official state dicts have both under one name."""

    def __init__(self, settings: DetectorSettings):
        super().__init__(settings.dim, settings.channels)
        self.net = ViT(settings)


class BilinearNet(DoublingNet):
    """Maps enlarged without regard to the image: what a learned upsampler is held against."""

    def forward(self, images_BCHW: Tensor, maps_BChw: Tensor) -> Tensor:  # noqa: ARG002
        return F.interpolate(maps_BChw, scale_factor=2, mode="bilinear", align_corners=False)


class Detections(NamedTuple):
    """Of one image at the output's size, best first."""

    boxes_N4: Tensor
    "x1, y1, x2, y2 in pixels, float32"
    scores_N: Tensor
    "float32, 0 to 1"
    classes_N: Tensor
    "int64, from 0"
    masks_NHW: Tensor
    "bool"


class Detector(nn.Module):
    """Normalised images, padded to a square at the right and at the bottom (operators/vitdet/input.py), to detections.

    `upsampler` takes (images, maps) to maps of twice the cells: the bare network of LiFT or of another method that doubles. Its
    tensors are called `lift.` in the state dict; the others have the official names. New weights are drawn as the official code
    draws them for training from scratch.

    Sizes are (height, width) of images without their padding; `sizes` in pixels of the input, `frame_sizes` as `in_frame` gives.
    """

    def __init__(self, settings: DetectorSettings, upsampler: nn.Module | None = None):
        super().__init__()
        self.settings = settings
        self.backbone = Backbone(settings)
        self.lift = upsampler
        self.proposal_generator = ProposalNetwork(settings)
        self.roi_heads = Heads(settings)

    # --- the stages -------------------------------------------------------------------------------------------------------

    def features(self, images_BCHW: Tensor, kept_L2B: Tensor | None = None) -> Tensor:
        """The backbone's map, [B, C, h, w]; `kept` is training's stochastic depth (operators/vitdet/backbone.py)."""
        return cast(Tensor, self.backbone.net(images_BCHW, kept_L2B))

    def enlarged(self, images_BCHW: Tensor, maps_BChw: Tensor) -> Tensor:
        """The map as the pyramid takes it: [B, C, 2h, 2w] with an upsampler, else as it is."""
        return maps_BChw if self.lift is None else cast(Tensor, self.lift(images_BCHW, maps_BChw))

    def pyramid(self, maps_BChw: Tensor) -> list[Tensor]:
        """Levels p2 to p6."""
        return cast(list[Tensor], self.backbone(maps_BChw))

    def maps(self, images_BCHW: Tensor) -> list[Tensor]:
        """Levels p2 to p6 of images."""
        return self.pyramid(self.enlarged(images_BCHW, self.features(images_BCHW)))

    def in_frame(self, sizes: Sequence[Size]) -> list[Size]:
        """Sizes in pixels of the frame that anchors, proposals and the heads work in."""
        scale = 1 if self.lift is None else 2
        return [(scale * height, scale * width) for height, width in sizes]

    def predict(self, levels: Sequence[Tensor]) -> Predicted:
        """What the proposal network says of all anchors."""
        return cast(Predicted, self.proposal_generator(levels))

    def propose(self, levels: Sequence[Tensor], frame_sizes: Sequence[Size]) -> list[Proposals]:
        """Proposals of each image for inference; those for training are `proposal_generator.proposals(..., training=True)`."""
        return self.proposal_generator.proposals(self.predict(levels), frame_sizes)

    def find(self, levels: Sequence[Tensor], proposals: Sequence[Proposals], frame_sizes: Sequence[Size]) -> list[Found]:
        """Detections in the frame of the heads, with masks as probabilities over boxes."""
        return cast(list[Found], self.roi_heads(levels, [each.boxes_N4 for each in proposals], frame_sizes))

    # --- all of them ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def detect(self, images_BCHW: Tensor, sizes: Sequence[Size], output_sizes: Sequence[Size]) -> list[Detections]:
        """What is found in each image, at its output size. An upsampler with BatchNorm must be in eval mode."""
        frame_sizes = self.in_frame(sizes)
        levels = self.maps(images_BCHW)
        found = self.find(levels, self.propose(levels, frame_sizes), frame_sizes)
        return [placed(*each) for each in zip(found, frame_sizes, output_sizes, strict=True)]


def placed(found: Found, frame_size: Size, output_size: Size) -> Detections:
    """Detections of an image at another size: boxes that are empty there are left out, masks are drawn."""
    boxes = clipped(scaled(found.boxes_N4, frame_size, output_size), output_size)
    kept = nonempty(boxes)
    boxes = boxes[kept]
    return Detections(boxes, found.scores_N[kept], found.classes_N[kept], paste(found.masks_NSS[kept], boxes, output_size))
