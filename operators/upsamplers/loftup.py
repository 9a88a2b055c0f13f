"""LoftUp: pixels with their places and colours as waves ask the whole map what they are, to any grid.

State dicts of the published files load as they are. The image is first brought to the grid that is asked for; each of its pixels,
after two convolutions, is a query of full attention to the map's cells. Memory is bounded by making queries tile by tile: their
convolutions read two pixels more on each side, and nothing else of them depends on other queries.

Shapes: B batch, C channels, h w cells of the given map, n of them in all, D the width inside, Ho Wo of the grid asked for.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators.backbone import TimmBackbone
from operators.upsamplers.pixels import in_float32
from operators.upsamplers.protocol import UpsamplerError, require_counts
from operators.upsamplers.queried import Queried, QueriedNet, QueriedSettings, Tile
from storage.documents import JsonObject

_PLACE_FREQUENCIES = 5
"""Of the code of a cell's place: sine and cosine of two coordinates at each."""
_TILE = 24
"""Pixels a side of the least that is made at once: oneDNN does convolutions of fewer otherwise, whose last bits differ."""
_MARGIN = 2
"""Pixels that two 3x3 convolutions read beyond a tile."""


@dataclass(frozen=True, kw_only=True)
class LoftUpSettings(QueriedSettings):
    """What a state dict doesn't tell about a LoftUp, and what it does."""

    channels: int
    "of the maps it takes and gives; several layers' maps are stacked"
    frequencies: int = 20
    "of the waves that pixels' places and colours become"
    heads: int = 4
    blocks: int = 2
    position: Literal["sine", "learnable"] = "sine"
    "how cells say where they are: by waves, as 20 channels more; or by a learned table that is added"
    table: int = 16
    "cells a side of the learned table"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "channels", "frequencies", "heads", "blocks", "table")
        if self.position not in ("sine", "learnable"):
            raise UpsamplerError(f"position must be sine or learnable, got {self.position!r}")
        if self.width % self.heads:
            raise UpsamplerError(
                f"loftup's width of {self.width} for maps of {self.channels} channels must divide into its {self.heads} heads"
            )

    @property
    def width(self) -> int:
        return self.channels + (4 * _PLACE_FREQUENCIES if self.position == "sine" else 0)


class LoftUp(Queried[LoftUpSettings]):
    """LoftUp's method. It isn't trained here."""

    settings = LoftUpSettings
    telling = "ca_transformer.norm.weight"

    def network(self, settings: LoftUpSettings) -> "LoftUpNet":
        return LoftUpNet(settings)

    def prepared(self, net: QueriedNet[object], settings: LoftUpSettings) -> None:
        net.to(memory_format=torch.channels_last)
        cast(LoftUpNet, net).each_image = True

    def official(self, state: Mapping[str, Tensor], backbone: TimmBackbone) -> tuple[JsonObject, dict[str, Tensor]]:
        """Shapes tell the settings, but for the number of heads. The older files hold the backbone, too, as `model.0.*`."""
        state = {
            name.replace("model.1.norm.", "channelnorm.norm."): tensor
            for name, tensor in state.items()
            if not name.startswith("model.0.")
        }
        norm, phases = state.get("channelnorm.norm.weight"), state.get("upsampler.fourier_feat.1.biases")
        if norm is None or phases is None:
            return super().official(state, backbone)
        self.require_last_tokens(backbone, len(norm))
        table = state.get("upsampler.lr_pe")
        numbers = {name.split(".")[3] for name in state if name.startswith("upsampler.ca_transformer.layers.")}
        found: JsonObject = {
            "channels": len(norm),
            "patch": backbone.patch,
            "frequencies": phases.shape[-1],
            "blocks": len(numbers),
            "position": "sine" if table is None else "learnable",
            "table": None if table is None else math.isqrt(table.shape[1]),
        }
        return found, state


# --- waves ------------------------------------------------------------------------------------------------------------


def _coordinates(cells: int, device: torch.device) -> Tensor:
    """Of rows or columns, from -1 at the first to 1 at the last."""
    return torch.linspace(-1, 1, cells, device=device)


class Waves(nn.Module):
    """Sines and cosines of signals at frequencies from e^-2 to e^10, with learned phases."""

    def __init__(self, signals: int, frequencies: int):
        super().__init__()
        self.biases = nn.Parameter(torch.zeros(2, signals, frequencies))

    def forward(self, signals: Tensor) -> Tensor:
        """[..., S] to [..., 2 F S]: sines, then cosines, frequency by frequency."""
        _, count, frequencies = self.biases.shape
        scale = torch.linspace(-2, 10, frequencies, device=signals.device).exp()
        # The phases' memory is read as [2, F, S], as the published networks were trained: they aren't transposed.
        sine, cosine = self.biases.reshape(2, frequencies, count)
        angles = signals.unsqueeze(-2) * scale[:, None]
        return torch.cat([(angles + sine).sin().flatten(-2), (angles + cosine).cos().flatten(-2)], dim=-1)


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of [B, C, H, W]."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, maps: Tensor) -> Tensor:
        return self.norm(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# --- attention --------------------------------------------------------------------------------------------------------


class Projections(nn.Module):
    """The weights of multi-head attention, under PyTorch's names."""

    def __init__(self, width: int):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)


class CrossAttention(nn.Module):
    """Queries [B, m, D] that ask tokens [B, n, D], both normalised."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_kv = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Projections(width)

    def keys_and_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tokens, [B, heads, n, d] each."""
        tokens = self.norm_kv(tokens)
        return self._projected(tokens, 1), self._projected(tokens, 2)

    def forward(self, queries: Tensor, kept: tuple[Tensor, Tensor]) -> Tensor:
        width = queries.shape[-1]
        asked = self._projected(self.norm_q(queries), 0)
        # The scale is that of heads as they are, without what fills them up.
        out = F.scaled_dot_product_attention(asked, *kept, scale=(width // self.heads) ** -0.5)
        return self.attention.out_proj(out[..., : width // self.heads].transpose(1, 2).flatten(2))

    def _projected(self, tokens: Tensor, part: int) -> Tensor:
        """[B, heads, m, d]: heads of 101 channels, as the published ones have, are filled up with zeros to a multiple of 8, which
        the fast kernels want."""
        weight, bias = (each.chunk(3)[part] for each in (self.attention.in_proj_weight, self.attention.in_proj_bias))
        head = len(bias) // self.heads
        fill = -head % 8
        weight = F.pad(weight.view(self.heads, head, -1), (0, 0, 0, fill)).flatten(0, 1)
        bias = F.pad(bias.view(self.heads, head), (0, fill)).flatten()
        return F.linear(tokens, weight, bias).unflatten(-1, (self.heads, head + fill)).transpose(1, 2)


class FeedForward(nn.Module):
    """LayerNorm, then two layers of a hidden width that is the map's."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Dropout(0.0), nn.Linear(hidden, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)


class Transformer(nn.Module):
    """Blocks of attention to the same tokens and of a feed-forward network, each added to the queries."""

    def __init__(self, settings: LoftUpSettings):
        super().__init__()
        width = settings.width
        self.layers = nn.ModuleList(
            nn.ModuleList([CrossAttention(width, settings.heads), FeedForward(width, settings.channels)])
            for _ in range(settings.blocks)
        )
        self.norm = nn.LayerNorm(width)

    def keys_and_values(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [attention.keys_and_values(tokens) for attention, _ in self._blocks()]

    def forward(self, queries: Tensor, kept: list[tuple[Tensor, Tensor]]) -> Tensor:
        for (attention, feed_forward), each in zip(self._blocks(), kept, strict=True):
            queries = queries + attention(queries, each)
            queries = queries + feed_forward(queries)
        return self.norm(queries)

    def _blocks(self) -> list[tuple[CrossAttention, FeedForward]]:
        return [cast("tuple[CrossAttention, FeedForward]", tuple(cast(nn.ModuleList, each))) for each in self.layers]


# --- the network ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What cells are made from: the image's colours at the grid [B, 3, Ho, Wo], and each block's keys and values of the map."""

    colours: Tensor
    kept: list[tuple[Tensor, Tensor]]


class LoftUpNet(QueriedNet[Prepared]):
    """Features [B, C, h, w] and their normalised images [B, 3, H, W] to any grid; in eval mode.

    The image is brought to the grid first, bilinearly, with antialias where it becomes smaller. Almost all of it decides about
    weights, so that it is float32 under any autocast.
    """

    float32 = True

    each_image: bool = False
    "whether colours are scaled by each image's range; False: by that of all in the batch, as the official code does"

    def __init__(self, settings: LoftUpSettings):
        super().__init__()
        self.settings = settings
        self.upsampler = QueriesAndTokens(settings)
        self.channelnorm = ChannelNorm(settings.channels)

    def prepare(self, images_BCHW: Tensor, maps_BChw: Tensor, grid: tuple[int, int]) -> Prepared:
        with in_float32(images_BCHW):
            return self._prepared(images_BCHW, maps_BChw, grid)

    def _prepared(self, images_BCHW: Tensor, maps_BChw: Tensor, grid: tuple[int, int]) -> Prepared:
        colours = images_BCHW
        if colours.shape[-2:] != grid:
            colours = F.interpolate(colours, size=grid, mode="bilinear", align_corners=False, antialias=True)
        over = (2, 3) if self.each_image else (0, 2, 3)
        least, most = colours.amin(over, keepdim=True), colours.amax(over, keepdim=True)
        colours = (colours - least) / (most - least).clamp(min=1e-4) - 0.5
        tokens = self.upsampler.tokens(self.channelnorm(maps_BChw))
        return Prepared(colours=colours, kept=self.upsampler.ca_transformer.keys_and_values(tokens))

    def query(self, prepared: Prepared, tile: Tile) -> Tensor:
        with in_float32(prepared.colours):
            asked = self.upsampler.asked(prepared.colours, tile)
            queries = self.upsampler.ca_transformer(asked.permute(0, 2, 3, 1).flatten(1, 2), prepared.kept)
            return self.upsampler.final_conv(queries.transpose(1, 2).unflatten(2, tile.shape))

    def unit(self, base: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
        return _TILE, _TILE

    def prepare_values(self, channels: int, base: tuple[int, int], image: tuple[int, int], grid: tuple[int, int]) -> int:
        # Tokens normalised, with their places, normalised again; keys and values of each block, filled up.
        width = self.settings.width + 8 * self.settings.heads
        tokens = math.prod(base) * (4 * channels + (6 + 2 * self.settings.blocks) * width)
        colours = 12 * math.prod(grid) + 3 * grid[0] * image[1]
        margin = 2 * _MARGIN * (grid[1] + _TILE + 2 * _MARGIN) * self._asked_values()
        return tokens + colours + margin

    def cell_values(self, channels: int, base: tuple[int, int], grid: tuple[int, int]) -> int:
        # Besides asking: the residual stream, normalised, queries, what they found, projected; or the hidden ones, twice.
        return max(self._asked_values(), 7 * self.settings.width + 24 * self.settings.heads)

    def _asked_values(self) -> int:
        waves = 10 * self.settings.frequencies
        return 3 * waves + 20 + 3 * self.settings.width


class QueriesAndTokens(nn.Module):
    """All but the norm of the map, under the names that official state dicts have."""

    def __init__(self, settings: LoftUpSettings):
        super().__init__()
        channels, width, waves = settings.channels, settings.width, 10 * settings.frequencies + 3
        if settings.position == "sine":
            self.lr_pe: nn.Module | nn.Parameter = Waves(2, _PLACE_FREQUENCIES)
        else:
            self.lr_pe = nn.Parameter(torch.randn(1, settings.table**2, channels) * 0.02)
        self.fourier_feat = nn.ModuleDict({"1": Waves(5, settings.frequencies)})
        layers: list[nn.Module] = [ChannelNorm(waves)]
        for given in (waves, width):
            layers += [nn.Conv2d(given, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.first_conv = nn.Sequential(*layers)
        self.ca_transformer = Transformer(settings)
        last = LayerNormOfChannels(channels)
        self.final_conv = nn.Sequential(nn.Conv2d(width, channels, 1), last) if settings.position == "sine" else last

    def tokens(self, maps_BChw: Tensor) -> Tensor:
        """The map's cells with their places, [B, n, D]."""
        h, w = maps_BChw.shape[-2:]
        cells = maps_BChw.flatten(2).transpose(1, 2)
        if isinstance(self.lr_pe, Waves):
            axes = _coordinates(h, maps_BChw.device), _coordinates(w, maps_BChw.device)
            places = self.lr_pe(torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)).flatten(0, 1)
            return torch.cat([cells, places.expand(len(cells), -1, -1)], dim=-1)
        table = cast(Tensor, self.lr_pe)
        side = math.isqrt(table.shape[1])
        table = table.transpose(1, 2).unflatten(2, (side, side))
        if (h, w) != (side, side):
            table = F.interpolate(table, size=(h, w), mode="bicubic", align_corners=False)
        return cells + table.flatten(2).transpose(1, 2)

    def asked(self, colours_BCHW: Tensor, tile: Tile) -> Tensor:
        """The queries of a tile, [B, D, *tile.shape]."""
        size = colours_BCHW.shape[-2:]
        rows, columns = (
            slice(max(0, part.start - _MARGIN), min(side, part.stop + _MARGIN))
            for part, side in zip((tile.rows, tile.columns), size, strict=True)
        )
        colours = colours_BCHW[:, :, rows, columns].permute(0, 2, 3, 1)
        axes = (_coordinates(side, colours.device)[part] for side, part in zip(size, (rows, columns), strict=True))
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        signals = torch.cat([places.expand(len(colours), -1, -1, -1), colours], dim=-1)
        waves = torch.cat([self.fourier_feat["1"](signals), colours], dim=-1)
        out = self.first_conv(waves.permute(0, 3, 1, 2))
        top, left = tile.rows.start - rows.start, tile.columns.start - columns.start
        return out[:, :, top : top + tile.shape[0], left : left + tile.shape[1]]


class LayerNormOfChannels(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W], under names of its own, with LoftUp's last epsilon."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
