"""LiFT (ECCV 2024, arXiv 2403.14625): one x2 step from a map and its image, a U-Net's decoder with a light image encoder.

State dicts of the official files load as they are. Their channels are head-minor, ours head-major.

Shapes: B batch, C channels, H W pixels, h w cells of the given map.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators.backbone import TimmBackbone
from operators.upsamplers.protocol import UpsamplerError, require_counts
from operators.upsamplers.recursive import DoublingNet, DoublingSettings, OfLiftsPaper
from storage.documents import JsonObject, JsonValue


@dataclass(frozen=True, kw_only=True)
class LiftSettings(DoublingSettings):
    """What a state dict doesn't tell about a LiFT."""

    image_branch: bool = True
    "False for the ablation without the image"
    border_crop: bool = False
    "the paper's way with 56 px at patch 16"
    image_width: int = 32
    "channels of the image encoder"
    image_convs: int = 0
    "further convolutions in it, beside the released three"
    heads: int | None = None
    "the weights expect head-minor channels of so many heads, as official checkpoints do; maps stay head-major"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "heads", "image_width")
        if type(self.image_convs) is not int or self.image_convs < 0:
            raise UpsamplerError(f"image_convs must be a whole number of at least 0, got {self.image_convs!r}")
        if self.channels < 2:
            raise UpsamplerError("lift needs at least 2 channels")
        if self.channels % (self.heads or 1):
            raise UpsamplerError(f"{self.channels} channels don't divide into {self.heads} heads")


class Lift(OfLiftsPaper[LiftSettings]):
    """LiFT's method."""

    settings = LiftSettings
    telling = "up1.conv_1.double_conv.0.weight"

    def network(self, settings: LiftSettings) -> "LiftNet":
        return LiftNet(
            settings.channels,
            settings.patch,
            image_branch=settings.image_branch,
            border_crop=settings.border_crop,
            image_width=settings.image_width,
            image_convs=settings.image_convs,
        )

    @property
    def setting_names(self) -> frozenset[str]:
        return super().setting_names | {"wide"}

    def parse(self, given: JsonObject) -> LiftSettings:
        """`wide` stands for an `image_width` of C/4 and one of `image_convs`, as it did before there were these."""
        named = {name: value for name, value in given.items() if name != "wide"}
        channels = given.get("channels")
        if given.get("wide") and isinstance(channels, int):
            if said := [name for name in _encoder(0, 0) if named.get(name) is not None]:
                raise UpsamplerError(f"wide says what {said[0]} is, too; give one of them")
            named |= _encoder(channels // 4, 1)
        return super().parse(named)

    def to_json(self, settings: LiftSettings) -> dict[str, JsonValue]:
        return _in_first_words(settings, super().to_json(settings))

    def identity(self, settings: LiftSettings) -> dict[str, JsonValue]:
        return _in_first_words(settings, super().identity(settings))

    def with_backbone(self, settings: LiftSettings, backbone: TimmBackbone) -> LiftSettings:
        return replace(settings, border_crop=True) if backbone.ragged else settings

    def official(self, state: Mapping[str, Tensor], backbone: TimmBackbone) -> tuple[JsonObject, dict[str, Tensor]]:
        """The channels of facets are head-minor in official files, those of tokens aren't split into heads."""
        last = state.get("outc.weight")
        if last is None or last.ndim != 4:
            return super().official(state, backbone)
        heads = None if backbone.facet == "token" else backbone.heads
        convs = [value for name, value in state.items() if re.fullmatch(r"image_convs_1\.\d+\.weight", name) and value.ndim == 4]
        encoder = _encoder(len(convs[0]), max(0, len(convs) - _CONVS)) if convs else {}
        return {"channels": len(last), "patch": backbone.patch, "heads": heads, **encoder}, dict(state)

    def prepared(self, net: DoublingNet, settings: LiftSettings) -> None:
        if settings.heads:
            # Channel (head, dimension) of ours is channel (dimension, head) of the weights.
            order = torch.arange(settings.channels).view(-1, settings.heads).t().flatten()
            cast(LiftNet, net).reorder_channels(order)


_LIFTED = 3.0
"""Deviations by which a start as the enlargement lifts what ReLU is to let pass."""

_CONVS = 2
"""Of the image encoder's first part, as released."""


def _encoder(width: int, convs: int) -> dict[str, JsonValue]:
    """The settings of an image encoder."""
    return {"image_width": width, "image_convs": convs}


def _in_first_words(settings: LiftSettings, said: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Settings as the first checkpoints have them, which say of an encoder whether it is `wide`, where that says all of it."""
    found = _encoder(settings.image_width, settings.image_convs)
    others = {name: value for name, value in said.items() if name not in found}
    if found == _encoder(LiftSettings.image_width, LiftSettings.image_convs):
        return others
    return {**others, **({"wide": True} if found == _encoder(settings.channels // 4, 1) else found)}


class LiftNet(DoublingNet):
    """Features [B, C, h, w] and their normalised images [B, 3, H, W] to [B, C, 2h, 2w].

    The image encoder halves the image twice and max-pools by k = ceil(patch / 8), which must give 2h x 2w: nothing for patch
    8, 2x2 for patch 16, so that official sizes are official results. Where it doesn't give 2h x 2w (the official code raises),
    the image is first brought to 8k cells a side, 8kh x 8kw pixels, bilinearly: overlapping patches, ragged sizes, patches of
    14 or 32. `border_crop`: where 2 pixels less on each border fit at patch 16, that is done instead, which is what
    the paper's 56 px columns need.

    `image_branch=False` is the ablation without the image; its channels are left out (no source says what replaced them).
    The supplement's variant for ViTDet has wider layers and one more convolution block in the image encoder, 7 M parameters; its
    layout isn't published. `image_width` and `image_convs` are our reading: 200 channels and one more convolution of stride 1 at
    the end of the encoder's first part have 6,950,556 parameters at C = 768, 6.3 % of ViTDet's, as the paper says.
    """

    enlarges_image = True

    def __init__(
        self,
        channels: int,
        patch: int,
        *,
        image_branch: bool = True,
        border_crop: bool = False,
        image_width: int = LiftSettings.image_width,
        image_convs: int = LiftSettings.image_convs,
    ):
        super().__init__()
        self.channels, self.patch, self.border_crop = channels, patch, border_crop
        self.pool = -(-patch // 8)
        self.image_channels = image = image_width * image_branch
        joined, out = (channels + image) // 2, channels // 2
        self.up1 = nn.ModuleDict(
            {
                "up": nn.ConvTranspose2d(channels + image, joined, 2, stride=2),
                "conv_1": nn.ModuleDict({"double_conv": _convs(joined + image, [out, out], stride=1, bias=False)}),
            }
        )
        self.outc = nn.Conv2d(out, channels, 1)
        if image_branch:
            self.image_convs_1 = _convs(3, [image] * _CONVS, stride=2, bias=True)
            self.image_convs_1.extend(_convs(image, [image] * image_convs, stride=1, bias=True))
            self.image_convs_2 = _convs(image, [image], stride=2, bias=True)

    def forward(self, images_BCHW: Tensor, maps_BChw: Tensor) -> Tensor:
        return cast(Tensor, self.outc(self._hidden(images_BCHW, maps_BChw)))

    def _hidden(self, images_BCHW: Tensor, maps_BChw: Tensor) -> Tensor:
        """What the last layer makes the map of, [B, C/2, 2h, 2w]."""
        if not self.image_channels:
            return self._decode(self.up1["up"](maps_BChw))
        h, w = maps_BChw.shape[-2:]
        fine = self.image_convs_1(self._fitted(images_BCHW, h, w))
        if self.pool > 1:
            fine = F.max_pool2d(fine, self.pool)
        up = self.up1["up"](torch.cat([maps_BChw, self.image_convs_2(fine)], dim=1))
        return self._decode(torch.cat([up, fine], dim=1))

    def _decode(self, joined: Tensor) -> Tensor:
        return cast(Tensor, cast(nn.ModuleDict, self.up1["conv_1"])["double_conv"](joined))

    def _fitted(self, images: Tensor, h: int, w: int) -> Tensor:
        height, width = images.shape[-2:]
        if self._fits(height, h) and self._fits(width, w):
            return images
        if self.border_crop and self.patch == 16 and self._fits(height - 4, h) and self._fits(width - 4, w):
            return images[..., 2:-2, 2:-2]
        cell = 8 * self.pool
        return F.interpolate(images, size=(h * cell, w * cell), mode="bilinear", align_corners=False)

    def _fits(self, pixels: int, cells: int) -> bool:
        return (pixels + 3) // 4 // self.pool == 2 * cells

    @torch.no_grad()
    def start_enlarging(self, images_BCHW: Tensor, maps_BChw: Tensor) -> None:
        """Set weights by which the network enlarges such maps bilinearly, as far as its C/2 channels hold them. The image adds
        nothing to that yet; its encoder keeps the weights that were drawn.

        The maps' principal components at variance 1, enlarged by the nearest cell and weighed by 1/4, 1/2, 1/4 along each axis,
        are enlarged bilinearly. ReLU leaves them nearly as they are, lifted by `_LIFTED`; the last layer, by least squares,
        makes channels of them again. All of it, BatchNorm's running statistics too, is of this batch, which needs two cells.
        """
        up = cast(nn.ConvTranspose2d, self.up1["up"])
        first, first_norm, _, second, second_norm, _ = cast(Any, self.up1["conv_1"])["double_conv"]
        cells = maps_BChw.permute(0, 2, 3, 1).flatten(0, 2).double()
        mean = cells.mean(dim=0)
        variances, axes = torch.linalg.eigh((cells - mean).T @ (cells - mean) / len(cells))  # the largest last
        kept = min(self.channels // 2, len(cells) - 1)
        whitened = (axes / variances.clamp(min=1e-6 * variances[-1]).sqrt()).flip(1)[:, :kept]
        up.weight[:, :kept] = 0
        up.weight[: self.channels, :kept] = whitened[:, :, None, None].to(up.weight)
        assert up.bias is not None
        up.bias[:kept] = -(mean @ whitened).to(up.bias)
        tent, itself = torch.tensor([0.25, 0.5, 0.25]), torch.tensor([0.0, 1.0, 0.0])
        for conv, weights, norm in ((first, tent, first_norm), (second, itself, second_norm)):
            nn.init.zeros_(conv.weight)
            conv.weight[range(kept), range(kept)] = torch.outer(weights, weights).to(conv.weight)
            nn.init.ones_(norm.weight)
            nn.init.constant_(norm.bias, _LIFTED)
        wanted = F.interpolate(maps_BChw, scale_factor=2, mode="bilinear", align_corners=False)
        hidden, made = (
            each.permute(0, 2, 3, 1).flatten(0, 2).double() for each in (self._settled(images_BCHW, maps_BChw), wanted)
        )
        mid, end = hidden.mean(dim=0), made.mean(dim=0)
        gram = (hidden - mid).T @ (hidden - mid)
        gram.diagonal().add_(1e-6 * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)
        last = torch.linalg.solve(gram, (hidden - mid).T @ (made - end))
        self.outc.weight.copy_(last.T[:, :, None, None])
        assert self.outc.bias is not None
        self.outc.bias.copy_(end - mid @ last)

    def _settled(self, images_BCHW: Tensor, maps_BChw: Tensor) -> Tensor:
        """What the last layer is given, and BatchNorm's running statistics are those of this batch from then on."""
        norms = [layer for layer in self.modules() if isinstance(layer, nn.BatchNorm2d)]
        usual = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        hidden = self._hidden(images_BCHW, maps_BChw)
        for norm, momentum in zip(norms, usual, strict=True):
            norm.momentum = momentum
        return hidden

    def reorder_channels(self, order: Tensor) -> None:
        """Make the network take and give channel `order[i]` of what it was trained on as channel i."""
        with torch.no_grad():
            up = cast(nn.ConvTranspose2d, self.up1["up"]).weight
            up[: self.channels] = up[: self.channels][order]
            for last in self.outc.parameters():
                last.copy_(last[order])

    def working_values(self, grid: tuple[int, int], channels: int) -> int:
        c, image, cells = channels, self.image_channels, grid[0] * grid[1]
        joined, out = (c + image) // 2, c // 2
        decoder = (c + image) // 4 + 2 * joined + image + 2 * out + c
        # 4k pixels a cell, and up to 4 more where official sizes are ragged; each halving in twice for its padding.
        pixels = (4 * self.pool * grid[0] + 4) * (4 * self.pool * grid[1] + 4) * (image > 0)
        return cells * (decoder + 2 * image) + pixels * (3 + image // 2 + image // 8 + 2)


def _convs(channels: int, widths: list[int], *, stride: int, bias: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in widths:
        conv = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=bias)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*layers)
