"""NAF, the Neighborhood Attention Filter (arXiv 2511.18452): weights from the image alone, for maps of any channels.

What attends is a code of the image: pixels through 1x1 and 3x3 convolutions, averaged over the cells of the grid that is asked
for (queries) and over the map's (keys), with a rotary position code between the two. A query attends to the 9 x 9 cells round its
own. Each head weighs its own slice of the map's channels. State dicts of the official file load as they are.

The rotary code is written from its description: the published module, which comes under terms of its own, rescales coordinates at
random while it is trained. This one doesn't, in train mode either: it is used with published weights.

Shapes: B batch, C channels, H W pixels, h w cells of the map, Ho Wo of the grid, N heads of D channels, W channels of an encoder.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators.backbone import TimmBackbone
from operators.upsamplers.neighbourhood import Neighbourhoods, block_of, enlargement, query_values
from operators.upsamplers.pixels import AT_WORK, GROUPS, Moments, as_weighed, in_float32, most_strip_rows, strips
from operators.upsamplers.protocol import UpsamplerError, require_counts
from operators.upsamplers.queried import Queried, QueriedNet, QueriedSettings, Tile
from storage.documents import JsonObject

CAP = 4
"""Pixels that an image has at most for each cell of the grid, a side."""


@dataclass(frozen=True, kw_only=True)
class NafSettings(QueriedSettings):
    """What a state dict doesn't tell about a NAF; the names are those of the official constructor."""

    kernel_size: int = 9
    "cells of a neighbourhood, a side; no weight depends on it"
    dim: int = 256
    "channels of queries and keys, half of them from each encoder"
    heads_attn: int = 4
    heads_rope: int = 4
    img_layers: int = 2
    "blocks of each encoder"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "kernel_size", "dim", "heads_attn", "heads_rope", "img_layers")
        if self.kernel_size % 2 == 0:
            raise UpsamplerError(f"kernel_size must be odd, got {self.kernel_size}")
        if self.dim % (2 * GROUPS) or self.dim % self.heads_attn or self.dim % (4 * self.heads_rope):
            raise UpsamplerError(
                f"dim must be a multiple of {2 * GROUPS}, of heads_attn ({self.heads_attn}) and of 4 x heads_rope "
                f"({4 * self.heads_rope}), got {self.dim}"
            )


class Naf(Queried[NafSettings]):
    """One official file for every backbone."""

    settings = NafSettings
    imagenet = True
    telling = "image_encoder.sem_encoder.0.weight"

    def network(self, settings: NafSettings) -> "NafNet":
        return NafNet(
            kernel_size=settings.kernel_size,
            dim=settings.dim,
            heads_attn=settings.heads_attn,
            heads_rope=settings.heads_rope,
            img_layers=settings.img_layers,
        )

    def with_backbone(self, settings: NafSettings, backbone: TimmBackbone) -> NafSettings:
        _require_channels(backbone.channels, settings.heads_attn)
        return super().with_backbone(settings, backbone)

    def require_grid(self, settings: NafSettings, base: tuple[int, int], grid: tuple[int, int]) -> None:
        super().require_grid(settings, base, grid)
        kernel, steps = settings.kernel_size, enlargement(base, grid)
        if grid[0] < kernel * steps[0] or grid[1] < kernel * steps[1]:
            largest = min(base) - (min(base) + 1) % 2
            raise UpsamplerError(
                f"{self.name} attends to {kernel}x{kernel} cells, and a map of {base[0]}x{base[1]} is smaller: give it images of "
                f"at least {kernel * settings.patch} pixels a side (at patch {settings.patch}), or a checkpoint folder whose "
                f"config.json sets kernel_size to {largest} or less, which the same weights allow"
            )

    def official(self, state: Mapping[str, Tensor], backbone: TimmBackbone) -> tuple[JsonObject, dict[str, Tensor]]:
        if not any(name.removeprefix("module.") == self.telling for name in state):
            return super().official(state, backbone)
        return {"patch": backbone.patch}, dict(state)


def _require_channels(channels: int, heads: int) -> None:
    if channels % heads:
        raise UpsamplerError(
            f"NAF's {heads} heads share a map's channels, which must be a multiple of {heads}: these are {channels}"
        )


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a grid's cells are made from."""

    queries: Tensor
    "[B, N, Ho, Wo, D]"
    keys: Tensor
    "[B, N, h, w, D]"
    values: Tensor
    "[B, N, h, w, C / N]"
    near: Neighbourhoods


class NafNet(QueriedNet[Prepared]):
    """Images [B, 3, H, W] normalised by ImageNet's statistics, and maps [B, C, h, w], to [B, C, Ho, Wo] of at least h x w."""

    float32 = True

    def __init__(self, *, kernel_size: int = 9, dim: int = 256, heads_attn: int = 4, heads_rope: int = 4, img_layers: int = 2):
        super().__init__()
        self.kernel, self.heads = kernel_size, heads_attn
        self._near: tuple[tuple[object, ...], Neighbourhoods] | None = None
        self.image_encoder = ImageEncoder(dim, heads_rope, img_layers)

    def prepare(self, images_BCHW: Tensor, maps_BChw: Tensor, grid: tuple[int, int]) -> Prepared:
        _require_channels(maps_BChw.shape[1], self.heads)
        base = maps_BChw.shape[2], maps_BChw.shape[3]
        with in_float32(maps_BChw):
            code = self.image_encoder(capped(images_BCHW, grid), grid, self.values_at_once)
        keys = F.adaptive_avg_pool2d(code.permute(0, 3, 1, 2), base).permute(0, 2, 3, 1)
        values = as_weighed(maps_BChw).permute(0, 2, 3, 1)
        return Prepared(
            queries=self._by_head(code),
            keys=self._by_head(keys).contiguous(),
            values=self._by_head(values).contiguous(),
            near=self._neighbourhoods(base, grid, maps_BChw.device),
        )

    def _neighbourhoods(self, base: tuple[int, int], grid: tuple[int, int], device: torch.device) -> Neighbourhoods:
        """Those of the last sizes are kept, since they are brought to the device."""
        if self._near is None or self._near[0] != (base, grid, device):
            self._near = (base, grid, device), Neighbourhoods.of(base, grid, (self.kernel, self.kernel), device)
        return self._near[1]

    def query(self, prepared: Prepared, tile: Tile) -> Tensor:
        queries = prepared.queries[:, :, tile.rows, tile.columns]
        return prepared.near.attend(queries, prepared.keys, prepared.values, tile.rows, tile.columns).permute(0, 3, 1, 2)

    def _by_head(self, x_BHWC: Tensor) -> Tensor:
        return x_BHWC.unflatten(3, (self.heads, -1)).permute(0, 3, 1, 2, 4)

    def unit(self, base: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
        return block_of(enlargement(base, grid))

    def prepare_values(self, channels: int, base: tuple[int, int], image: tuple[int, int], grid: tuple[int, int]) -> int:
        dim, height, width = self.image_encoder.dim, *capped_size(image, grid)
        rows = most_strip_rows(dim // 2 * width, self.values_at_once)
        strips = AT_WORK * dim // 2 * width * (min(height, rows) + 2)
        pixels = height * width * (dim + 3) + strips
        cells = math.prod(base) * 2 * (dim + channels)
        return pixels + dim * math.prod(grid) + cells

    def cell_values(self, channels: int, base: tuple[int, int], grid: tuple[int, int]) -> int:
        depth, width = self.image_encoder.dim // self.heads, channels // self.heads
        return query_values(base, grid, (self.kernel, self.kernel), self.heads, depth, width, shared=False)


def capped_size(image: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Pixels that an image is looked at with: both bounds hold for both sides, as published, so that for a long grid it is
    squashed towards a square."""
    height, width = image
    if height <= CAP * grid[0] and width <= CAP * grid[1]:
        return image
    return min(height, CAP * min(grid)), min(width, CAP * min(grid))


def capped(images_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Images of `capped_size`, enlarged or shrunk without antialiasing, as published."""
    image = images_BCHW.shape[2], images_BCHW.shape[3]
    size = capped_size(image, grid)
    return images_BCHW if size == image else F.interpolate(images_BCHW, size, mode="bilinear")


class ImageEncoder(nn.Module):
    """Images to the code of each cell of a grid, [B, Ho, Wo, 2 W]: W from pixels by themselves (`encoder`), W from their
    surroundings (`sem_encoder`), turned by where the cell lies."""

    def __init__(self, dim: int, heads: int, layers: int):
        super().__init__()
        self.dim = dim
        self.encoder, self.sem_encoder = _encoder(dim // 2, layers, 1), _encoder(dim // 2, layers, 3)
        self.rope = Rope(dim // heads)

    def forward(self, images_BCHW: Tensor, grid: tuple[int, int], at_once: int) -> Tensor:
        layers = self.encoder, self.sem_encoder
        if torch.is_grad_enabled():
            code = torch.cat([F.adaptive_avg_pool2d(each(images_BCHW), grid) for each in layers], dim=1).permute(0, 2, 3, 1)
            return torch.stack(self.rope(code, slice(0, grid[0])), dim=-2).flatten(-3)
        code = images_BCHW.new_empty(len(images_BCHW), *grid, self.dim)
        maps: list[Tensor] = []
        for each, part in zip(layers, code.chunk(2, dim=-1), strict=True):
            pixels = _encode(each, images_BCHW, maps, at_once)
            pooled = pixels if tuple(pixels.shape[2:]) == grid else F.adaptive_avg_pool2d(pixels, grid)
            part.copy_(pooled.permute(0, 2, 3, 1))
        del pixels, pooled, maps
        for rows in strips(code.permute(0, 3, 1, 2), at_once):
            for part, turned in zip(self.rope.halves(code[:, rows]), self.rope(code, rows), strict=True):
                part.copy_(turned)
        return code


class Block(nn.Module):
    """Two times (GroupNorm, SiLU, convolution); unlike in JAFAR and AnyUp, nothing goes past it."""

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, width), nn.GroupNorm(GROUPS, width)
        self.conv1, self.conv2 = _convolution(width, width, kernel), _convolution(width, width, kernel)

    def forward(self, x_BWHW: Tensor) -> Tensor:
        return cast(Tensor, self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x_BWHW)))))))


def _convolution(channels: int, width: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(channels, width, kernel, padding=kernel // 2, padding_mode="reflect")


def _encoder(width: int, layers: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(_convolution(3, width, kernel), *(Block(width, kernel) for _ in range(layers)))


class Rope(nn.Module):
    """Turns a cell's code, head by head of D channels, by angles 2 pi coordinate / period: of its row, then of its column.

    Coordinates are those of cells' centres, -1 to 1 from edge to edge. Channels i and i + D / 2 are a pair that one angle turns.
    """

    periods: Tensor

    def __init__(self, depth: int):
        super().__init__()
        self.register_buffer("periods", 100.0 ** (4 * torch.arange(depth // 4) / depth))

    def forward(self, code_BHWC: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The turned code of these rows of cells: first and second halves of each head, [B, R, W, heads, D / 2]."""
        first, second = self.halves(code_BHWC[:, rows])
        down, across = (self._angles(cells) for cells in code_BHWC.shape[1:3])
        down, across = down[rows, None].expand(-1, len(across), -1), across.expand(rows.stop - rows.start, -1, -1)
        angles = torch.cat([down, across], dim=-1)[:, :, None]
        cos, sin = angles.cos(), angles.sin()
        return torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)

    def halves(self, code_BHWC: Tensor) -> tuple[Tensor, ...]:
        """Views of the first and second half of each head."""
        return code_BHWC.unflatten(-1, (-1, 2, 2 * len(self.periods))).unbind(-2)

    def _angles(self, cells: int) -> Tensor:
        """[cells, D / 4]"""
        centres = 2 * (torch.arange(cells, device=self.periods.device) + 0.5) / cells - 1
        return 2 * math.pi * centres[:, None] / self.periods


# --- encoders, strip by strip -------------------------------------------------------------------------------------------


def _encode(layers: nn.Sequential, images_BCHW: Tensor, maps: list[Tensor], at_once: int) -> Tensor:
    """What an encoder makes of images: one of two `maps` [B, W, H, W] that its layers fill by turns, made where none are."""
    first, *blocks = layers
    steps: list[tuple[nn.GroupNorm | None, nn.Conv2d]] = [(None, cast(nn.Conv2d, first))]
    for block in cast(list[Block], blocks):
        steps += [(block.norm1, block.conv1), (block.norm2, block.conv2)]
    x, moments = images_BCHW.contiguous(memory_format=torch.channels_last), Moments()
    for turn, (norm, conv) in enumerate(steps):
        affine = moments.affine(norm) if norm is not None else None
        moments = Moments()
        for rows in strips(x, at_once, conv.out_channels):
            made = _convolved(conv, x, rows, affine)
            moments.add(made.flatten(2))
            if len(maps) <= turn % 2:
                size = (len(x), *x.shape[2:], conv.out_channels)
                maps.append(made.new_empty(size).permute(0, 3, 1, 2))
            maps[turn % 2][:, :, rows] = made
        x = maps[turn % 2]
    return x


def _convolved(conv: nn.Conv2d, x_BWHW: Tensor, rows: slice, affine: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rows of conv(SiLU(scale x + shift)), or of conv(x)."""
    height, halo = x_BWHW.shape[2], conv.kernel_size[0] // 2
    part = x_BWHW[:, :, max(0, rows.start - halo) : rows.stop + halo]
    if affine is not None:
        part = F.silu(torch.addcmul(affine[1][..., None], part, affine[0][..., None]), inplace=True)
    if halo:
        ends = [halo if at_end else 0 for at_end in (rows.start == 0, rows.stop == height)]
        part = F.pad(part, (halo, halo, *ends), mode="reflect")
    return F.conv2d(part, conv.weight, conv.bias)
