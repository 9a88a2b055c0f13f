"""JAFAR (NeurIPS 2025, arXiv 2506.11136): queries from pixels, keys from pixels modulated by features, values as given.

State dicts of the official files load as they are; the tensors among them that no result depends on are kept.

Shapes: B batch, C channels, D of queries and keys, N heads of d channels, H W pixels, h w cells of the map, Ho Wo of the grid.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from operators.backbone import TimmBackbone
from operators.upsamplers.pixels import (
    GROUPS,
    CrossDecode,
    PixelRope,
    PixelSettings,
    ResidualBlock,
    average,
    average_values,
    encode,
    encode_values,
    encoder,
    group_normalised,
    in_float32,
    pooled,
    values_of,
)
from operators.upsamplers.protocol import require_counts
from operators.upsamplers.queried import Queried, QueriedNet, Tile
from storage.documents import JsonObject


@dataclass(frozen=True, kw_only=True)
class JafarSettings(PixelSettings):
    """What a state dict doesn't tell about a JAFAR. `channels` is v_dim of its constructor."""

    channels: int
    "of the maps it takes and gives"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "channels")


class Jafar(Queried[JafarSettings]):
    """Official files are made for one backbone each, and for what it gives after its last block and its final norm."""

    settings = JafarSettings
    telling = "sft_key.gamma.weight"
    trained_by = "jafar"

    def network(self, settings: JafarSettings) -> "JafarNet":
        return JafarNet(settings.channels, settings.qk_dim, settings.num_heads, settings.kernel_size)

    def official(self, state: Mapping[str, Tensor], backbone: TimmBackbone) -> tuple[JsonObject, dict[str, Tensor]]:
        image, features = state.get("image_encoder.0.weight"), state.get("key_features_encoder.0.weight")
        if self.telling not in state or image is None or features is None or image.ndim != 4 or features.ndim != 4:
            return super().official(state, backbone)
        channels = features.shape[1]
        self.require_last_tokens(backbone, channels)
        return {"channels": channels, "patch": backbone.patch, "qk_dim": len(image), "kernel_size": image.shape[-1]}, dict(state)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a grid's cells are made from."""

    queries: Tensor
    "[B, D, Ho, Wo]"
    keys: Tensor
    "[B, N, h * w, d]"
    values: Tensor
    "[B, h * w, C]"


class JafarNet(QueriedNet[Prepared]):
    """Normalised images [B, 3, H, W] and maps [B, C, h, w] to [B, C, Ho, Wo]; H W needs no relation to the grids."""

    float32 = True

    def __init__(self, channels: int, qk_dim: int = 128, num_heads: int = 4, kernel_size: int = 1):
        super().__init__()
        self.width = qk_dim
        self.image_encoder = encoder(3, qk_dim, Block, kernel_size)
        self.key_encoder, self.query_encoder = encoder(qk_dim, qk_dim, Block), encoder(qk_dim, qk_dim, Block)
        self.key_features_encoder = encoder(channels, qk_dim, Block)
        self.cross_decode = CrossDecode(qk_dim, num_heads, channels)
        self.sft_key = Modulation(qk_dim)
        self.rope = PixelRope(qk_dim)

    def prepare(self, images_BCHW: Tensor, maps_BChw: Tensor, grid: tuple[int, int]) -> Prepared:
        values = values_of(maps_BChw)
        with in_float32(images_BCHW):
            pixels = self.pixels(images_BCHW)
            queries = self.queries(pixels, grid)
            keys = self.cross_decode.keys(self.keys(pixels, maps_BChw))
        return Prepared(queries=queries, keys=keys, values=values)

    def pixels(self, images_BCHW: Tensor) -> Tensor:
        """Of the image, with their positions, [B, D, H, W]."""
        return self.rope(encode(self.image_encoder, images_BCHW, self.values_at_once), self.values_at_once)

    def queries(self, pixels_BDHW: Tensor, grid: tuple[int, int]) -> Tensor:
        """Of each cell of the grid, [B, D, Ho, Wo]."""
        queries = pooled(encode(self.query_encoder, pixels_BDHW, self.values_at_once), grid)
        return group_normalised(queries, self.values_at_once)

    def keys(self, pixels_BDHW: Tensor, maps_BChw: Tensor) -> Tensor:
        """Of each cell of the map, [B, D, h, w]. Without gradients the pixels are overwritten."""
        base = maps_BChw.shape[2], maps_BChw.shape[3]
        keys = pooled(encode(self.key_encoder, pixels_BDHW, self.values_at_once, in_place=True), base)
        return self.sft_key(keys, encode(self.key_features_encoder, F.normalize(maps_BChw, dim=1), self.values_at_once))

    def query(self, prepared: Prepared, tile: Tile) -> Tensor:
        with in_float32(prepared.queries):
            queries = self.cross_decode.queries(prepared.queries, tile)
            cells = average(queries, prepared.keys, prepared.values)
        return cells.unflatten(1, tile.shape).permute(0, 3, 1, 2)

    def prepare_values(self, channels: int, base: tuple[int, int], image: tuple[int, int], grid: tuple[int, int]) -> int:
        cells = math.prod(base) * (2 * channels + 8 * self.width)
        return encode_values(self.width, image, self.values_at_once) + self.width * math.prod(grid) + cells

    def cell_values(self, channels: int, base: tuple[int, int], grid: tuple[int, int]) -> int:
        return average_values(self.width, channels, math.prod(base))


class Block(ResidualBlock):
    """A residual block under JAFAR's names."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, width), nn.GroupNorm(GROUPS, width)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 1, bias=False), nn.Conv2d(width, width, 1, bias=False)

    def parts(self) -> tuple[nn.GroupNorm, nn.Conv2d, nn.GroupNorm, nn.Conv2d]:
        return self.norm1, self.conv1, self.norm2, self.conv2


class Modulation(nn.Module):
    """Spatial feature transform: features scale and shift the normalised keys."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma, self.beta = nn.Conv2d(width, width, 1, bias=False), nn.Conv2d(width, width, 1, bias=False)

    def forward(self, keys_BDhw: Tensor, features_BDhw: Tensor) -> Tensor:
        return self.gamma(features_BDhw) * F.group_norm(keys_BDhw, GROUPS) + self.beta(features_BDhw)
