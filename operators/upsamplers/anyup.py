"""AnyUp (ICLR 2026, arXiv 2510.12764): JAFAR's attention for maps of any backbone, each cell of a grid within a window.

A layer that is told nothing of the channels' number makes keys of features. State dicts of the official files load as they are.
The released networks summarise channels in another order than the paper's formula says (`Unification`), and so does this one.

Shapes: B batch, C channels of the map, D of queries and keys, N heads of d channels, M filters, H W pixels, h w cells of the map,
Ho Wo of the grid.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators.backbone import TimmBackbone
from operators.upsamplers.neighbourhood import Neighbourhoods, block_of, enlargement, neighbour_counts, query_values
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
    in_float32,
    pooled,
    values_of,
)
from operators.upsamplers.protocol import UpsamplerError, require_counts
from operators.upsamplers.queried import Queried, QueriedNet, Tile
from storage.documents import JsonObject

_AT_WORK = 4
"""Tensors like a part's responses that `Unification` holds at once."""

_RESPONSES = {"cpu": 2**24}
"""Values that it holds at once at most, where there is no cost of a launch."""


@dataclass(frozen=True, kw_only=True)
class AnyUpSettings(PixelSettings):
    """What a state dict doesn't tell about an AnyUp; it takes maps of any number of channels."""

    kernel_size_lfu: int = 5
    "side of the filters that features are compared with"
    window_ratio: float = 0.1
    "a cell of the grid attends to the map within this part of its height and width, on either side; 0: to all of it"
    natten: bool = False
    "windows as the official NATTEN variant has them: as many cells for all, shifted at borders"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "kernel_size_lfu")
        if self.kernel_size_lfu % 2 == 0:
            raise UpsamplerError(f"kernel_size_lfu must be odd, got {self.kernel_size_lfu}")
        if not isinstance(self.window_ratio, int | float) or not math.isfinite(self.window_ratio):
            raise UpsamplerError(f"window_ratio must be a number, got {self.window_ratio!r}")
        if type(self.natten) is not bool:
            raise UpsamplerError(f"natten must be true or false, got {self.natten!r}")


class AnyUp(Queried[AnyUpSettings]):
    """One network for all backbones, which sees images by ImageNet's statistics whatever the backbone's are."""

    settings = AnyUpSettings
    imagenet = True
    telling = "key_features_encoder.0.basis"

    def network(self, settings: AnyUpSettings) -> "AnyUpNet":
        return AnyUpNet(
            settings.qk_dim,
            settings.num_heads,
            settings.kernel_size,
            kernel_size_lfu=settings.kernel_size_lfu,
            window_ratio=settings.window_ratio,
            natten=settings.natten,
        )

    def official(self, state: Mapping[str, Tensor], backbone: TimmBackbone) -> tuple[JsonObject, dict[str, Tensor]]:
        image, basis = state.get("image_encoder.0.weight"), state.get(self.telling)
        if image is None or basis is None or image.ndim != 4 or basis.ndim != 4:
            return super().official(state, backbone)
        told = {"qk_dim": len(image), "kernel_size": image.shape[-1], "kernel_size_lfu": basis.shape[-1]}
        return {"patch": backbone.patch, **told}, dict(state)

    def require_grid(self, settings: AnyUpSettings, base: tuple[int, int], grid: tuple[int, int]) -> None:
        super().require_grid(settings, base, grid)
        if min(base) < 2:
            raise UpsamplerError(f"{self.name} needs maps of at least 2x2 cells, not {base[0]}x{base[1]}")
        try:
            windows(base, grid, settings.window_ratio, natten=settings.natten)
        except UpsamplerError as error:
            raise UpsamplerError(f"{self.name}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a grid's cells are made from."""

    queries: Tensor
    "[B, D, Ho, Wo]"
    keys: Tensor
    "[B, N, h * w, d]"
    values: Tensor
    "[B, h * w, C]"
    windows: Neighbourhoods | None
    "None: all attend to all"
    base: tuple[int, int]
    "h, w"


class AnyUpNet(QueriedNet[Prepared]):
    """Normalised images [B, 3, H, W] and maps [B, C, h, w] to [B, C, Ho, Wo]; H W needs no relation to the grids."""

    float32 = True

    def __init__(
        self,
        qk_dim: int = 128,
        num_heads: int = 4,
        kernel_size: int = 1,
        *,
        kernel_size_lfu: int = 5,
        window_ratio: float = 0.1,
        natten: bool = False,
    ):
        super().__init__()
        self.width, self.heads, self.window_ratio, self.natten = qk_dim, num_heads, window_ratio, natten
        self.image_encoder = encoder(3, qk_dim, Block, kernel_size)
        self.key_encoder, self.query_encoder = encoder(qk_dim, qk_dim, Block), encoder(qk_dim, qk_dim, Block)
        self.key_features_encoder = nn.Sequential(Unification(qk_dim, kernel_size_lfu), Block(qk_dim), Block(qk_dim))
        self.aggregation = encoder(2 * qk_dim, qk_dim, Block, 3)
        self.cross_decode = CrossDecode(qk_dim, num_heads)
        self.rope = PixelRope(qk_dim)

    def prepare(self, images_BCHW: Tensor, maps_BChw: Tensor, grid: tuple[int, int]) -> Prepared:
        values, base = values_of(maps_BChw), (maps_BChw.shape[2], maps_BChw.shape[3])
        with in_float32(images_BCHW):
            pixels = self.rope(encode(self.image_encoder, images_BCHW, self.values_at_once), self.values_at_once)
            queries = pooled(encode(self.query_encoder, pixels, self.values_at_once), grid)
            keys = self.cross_decode.keys(self.keys(pixels, maps_BChw))
        found = windows(base, grid, self.window_ratio, natten=self.natten)
        near = found and Neighbourhoods.counted(*found, enlargement(base, grid), maps_BChw.device)
        return Prepared(queries=queries, keys=keys, values=values, windows=near, base=base)

    def keys(self, pixels_BDHW: Tensor, maps_BChw: Tensor) -> Tensor:
        """Of each cell of the map, [B, D, h, w]. Without gradients the pixels are overwritten."""
        base = maps_BChw.shape[2], maps_BChw.shape[3]
        seen = pooled(encode(self.key_encoder, pixels_BDHW, self.values_at_once, in_place=True), base)
        unification, *blocks = self.key_features_encoder
        features = unification(F.normalize(maps_BChw, dim=1), self.values_at_once)
        for block in blocks:
            features = block(features)
        return encode(self.aggregation, torch.cat([seen, features], dim=1), self.values_at_once)

    def query(self, prepared: Prepared, tile: Tile) -> Tensor:
        with in_float32(prepared.queries):
            queries = self.cross_decode.queries(prepared.queries, tile)
            if prepared.windows is None:
                cells = average(queries, prepared.keys, prepared.values).unflatten(1, tile.shape)
            else:
                keys, values = prepared.keys.unflatten(2, prepared.base), prepared.values.unflatten(1, prepared.base)
                queries = queries.unflatten(2, tile.shape)
                cells = prepared.windows.attend(queries, keys, values.unsqueeze(1), tile.rows, tile.columns).float()
        return cells.permute(0, 3, 1, 2)

    def unit(self, base: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
        return block_of(enlargement(base, grid))

    def prepare_values(self, channels: int, base: tuple[int, int], image: tuple[int, int], grid: tuple[int, int]) -> int:
        unified = max(self.values_at_once, _AT_WORK * channels * self.width * base[1])
        cells = math.prod(base) * (3 * channels + 16 * self.width)
        return encode_values(self.width, image, self.values_at_once) + self.width * math.prod(grid) + cells + unified

    def cell_values(self, channels: int, base: tuple[int, int], grid: tuple[int, int]) -> int:
        ratio = self.window_ratio
        if ratio <= 0 or (self.natten and ratio >= 0.5):
            return average_values(self.width, channels, math.prod(base))
        # No window is larger, NATTEN's included; 8 widths are of the convolution and the projection.
        rows, columns = (min(n, max(3, math.ceil(2 * ratio * n) + 2)) for n in base)
        near = query_values(base, grid, (rows, columns), self.heads, self.width // self.heads, channels, shared=True)
        return near + 8 * self.width + channels


class Block(ResidualBlock):
    """A residual block under AnyUp's names."""

    def __init__(self, width: int):
        super().__init__()
        norms, convs = [], []
        for _ in range(2):
            norms.append(nn.GroupNorm(GROUPS, width))
            convs.append(nn.Conv2d(width, width, 1, bias=False))
        self.block = nn.Sequential(norms[0], nn.SiLU(), convs[0], norms[1], nn.SiLU(), convs[1])

    def parts(self) -> tuple[nn.GroupNorm, nn.Conv2d, nn.GroupNorm, nn.Conv2d]:
        norm1, _, conv1, norm2, _, conv2 = self.block
        return norm1, conv1, norm2, conv2  # type: ignore[return-value]


class Unification(nn.Module):
    """Normalised features of any number of channels to M maps: how alike each is to which of M filters.

    A response is a correlation with the map, zero-padded, over the number of taps that lie in it. The paper takes the softmax
    over a channel's M responses and the mean over channels. The released code reads the C x M responses, a channel's one after
    another, as if they were M x C: map m is of the C responses from m * C on, the softmax being over those that stand at the same
    place. Its weights were trained so; hence the order of the channels matters.
    """

    def __init__(self, filters: int, kernel: int = 5):
        super().__init__()
        self.basis = nn.Parameter(torch.randn(filters, 1, kernel, kernel))

    def forward(self, features_BChw: Tensor, at_once: int) -> Tensor:
        """[B, M, h, w]; a few rows at a time, of which about `at_once` values are held."""
        batch, channels, height, width = features_BChw.shape
        filters, pad = len(self.basis), self.basis.shape[-1] // 2
        padded = F.pad(features_BChw, [pad] * 4)
        taps = F.conv2d(F.pad(padded.new_ones(1, 1, height, width), [pad] * 4), torch.ones_like(self.basis[:1]))
        values = min(at_once, _RESPONSES.get(padded.device.type, at_once)) // _AT_WORK
        rows = max(1, values // (batch * channels * filters * width))
        out = []
        for top in range(0, height, rows):
            part = padded[:, :, top : top + rows + 2 * pad].flatten(0, 1).unsqueeze(1)
            responses = F.conv2d(part, self.basis) / taps[:, :, top : top + rows]
            out.append(responses.reshape(batch, filters, channels, -1, width).softmax(1).mean(2))
        return torch.cat(out, dim=2)


def windows(
    base: tuple[int, int], grid: tuple[int, int], ratio: float, *, natten: bool = False
) -> tuple[np.ndarray, np.ndarray] | None:
    """How often rows of the grid count rows of the map, and columns columns, [positions, cells]; None: all count all once.

    NATTEN's kernel is the window's size in cells, made odd, of at least 3. Raises `UpsamplerError` where a window holds nothing,
    or the map is smaller than the kernel.
    """
    if not natten:
        return None if ratio <= 0 else (window_counts(base[0], grid[0], ratio), window_counts(base[1], grid[1], ratio))
    within = 0 < ratio < 0.5
    if not within and grid[0] % base[0] == 0 == grid[1] % base[1]:
        return None
    kernel = tuple(max(3, round(2 * ratio * n)) | 1 if within else n for n in base)
    steps = enlargement(base, grid)
    return (neighbour_counts(base[0], grid[0], kernel[0], steps[0]), neighbour_counts(base[1], grid[1], kernel[1], steps[1]))


def window_counts(cells: int, positions: int, ratio: float) -> np.ndarray:
    """1 where the window of a position, along one axis, holds a cell, else 0: [positions, cells].

    The window is the position's centre plus and minus `ratio`, cut at the borders, and all cells that it touches, reckoned in
    single precision.
    """
    centres = (np.arange(positions, dtype=np.float32) + np.float32(0.5)) / np.float32(positions)
    low, high = (np.clip(centres + np.float32(side), 0, 1) * np.float32(cells) for side in (-ratio, ratio))
    counts = np.arange(cells) >= np.floor(low)[:, None]
    counts &= np.arange(cells) < np.ceil(high)[:, None]
    if not counts.any(1).all():
        raise UpsamplerError(
            f"a window of {ratio:g} of {cells} cells holds none at some of {positions} positions; give a larger ratio, or 0"
        )
    return counts.astype(np.int64)
