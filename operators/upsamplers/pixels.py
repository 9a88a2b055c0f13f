"""What JAFAR and AnyUp share: they look at every pixel of the image by itself, and average a map's cells by how alike pixels are.

Pixels go through 1x1 convolutions and GroupNorms, whose statistics span the whole image, then through a trained position code.
Averages of pixels over a grid's cells are its queries, averages over the map's cells part of its keys. Heads attend with weights
of their own; their mean weighs the map as it was given, so that a result is a convex combination of the map's cells.

For inference, encoders run strip by strip (`encode`) and attention over a few queries at a time (`average`): on a CPU what passes
between two operations then stays in its cache, and nothing of the size of queries x cells is ever held.

Shapes: B batch, C channels of the map, D of queries and keys, N heads of d = D / N channels, H W pixels, h w cells of the map,
Ho Wo of the grid, K = h * w, n queries of a tile.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators.upsamplers.protocol import UpsamplerError, require_counts
from operators.upsamplers.queried import QueriedSettings, Tile

GROUPS = 8
"""Of channels, in every GroupNorm."""

_STRIP = {"cpu": 2**20}
_SMALL_STRIP, _LARGE_STRIP = 2**16, 2**23
"""Values of a strip at least, and at most; large where each operation costs a launch. Measured on a CPU (1 thread, 448 x 448 px,
128 channels): a convolution, a SiLU and a norm take 0.06 s in strips of 2^17 to 2^21 values, 0.22 s in one piece, for which the
system hands out new pages each time."""

AT_WORK = 5
"""Strips that are held while one goes through a convolution or a position code."""

_WEIGHTS = {"cpu": 2**20}
_MANY_WEIGHTS = 2**26
"""Weights of one head that `average` holds at once, queries times cells. Measured likewise over 28 x 28 cells: 8 us for a cell of
the grid up to 2^20, 21 us where the weights of all heads are made for all cells."""


@dataclass(frozen=True, kw_only=True)
class PixelSettings(QueriedSettings):
    """What JAFAR's and AnyUp's state dicts don't all tell; the names are those of the official constructors."""

    qk_dim: int = 128
    "channels of queries and keys"
    num_heads: int = 4
    kernel_size: int = 1
    "of the image encoder's first convolution"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "qk_dim", "num_heads", "kernel_size")
        if self.qk_dim % GROUPS or self.qk_dim % self.num_heads:
            raise UpsamplerError(f"qk_dim must be a multiple of {GROUPS} and of num_heads ({self.num_heads}), got {self.qk_dim}")
        if self.kernel_size % 2 == 0:
            raise UpsamplerError(f"kernel_size must be odd, got {self.kernel_size}")


# --- encoders of pixels -------------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """x + two times (GroupNorm, SiLU, 1x1 convolution without bias); how its parts are called is for the method to say."""

    def parts(self) -> tuple[nn.GroupNorm, nn.Conv2d, nn.GroupNorm, nn.Conv2d]:
        raise NotImplementedError

    def forward(self, x_BDHW: Tensor) -> Tensor:
        norm1, conv1, norm2, conv2 = self.parts()
        return x_BDHW + conv2(F.silu(norm2(conv1(F.silu(norm1(x_BDHW))))))


def encoder(channels: int, width: int, block: type[ResidualBlock], kernel: int = 1) -> nn.Sequential:
    """A convolution without bias, reflect-padded, and two residual blocks of the method's own kind, made as block(width)."""
    first = nn.Conv2d(channels, width, kernel, padding=kernel // 2, padding_mode="reflect", bias=False)
    return nn.Sequential(first, block(width), block(width))


def encode(layers: nn.Sequential, x_BCHW: Tensor, at_once: int, *, in_place: bool = False) -> Tensor:
    """What an `encoder` makes of an image or map, [B, D, H, W]; `in_place`: in the memory of a map of as many channels.

    Without gradients it goes strip by strip, over each of which statistics are gathered as it is made; about `at_once` values are
    then held beside two maps.
    """
    if torch.is_grad_enabled():
        return cast(Tensor, layers(x_BCHW))
    first, *blocks = layers
    x, moments = _first(cast(nn.Conv2d, first), x_BCHW, at_once, in_place=in_place)
    hidden = torch.empty_like(x)
    for block in blocks:
        norm1, conv1, norm2, conv2 = cast(ResidualBlock, block).parts()
        scale, shift = moments.affine(norm1)
        moments = Moments()
        for strip, made in zip(_strips(x, at_once), _strips(hidden, at_once), strict=True):
            moments.add(made.copy_(_pointwise(conv1, F.silu(torch.addcmul(shift, strip, scale), inplace=True))))
        scale, shift = moments.affine(norm2)
        moments = Moments()
        for strip, made in zip(_strips(x, at_once), _strips(hidden, at_once), strict=True):
            moments.add(strip.add_(_pointwise(conv2, F.silu(torch.addcmul(shift, made, scale), inplace=True))))
    return x


def _first(conv: nn.Conv2d, x: Tensor, at_once: int, *, in_place: bool) -> tuple[Tensor, "Moments"]:
    moments = Moments()
    if conv.kernel_size != (1, 1):
        out = conv(x)
        for made in _strips(out, at_once):
            moments.add(made)
        return out, moments
    out = x if in_place else x.new_empty(len(x), conv.out_channels, *x.shape[2:])
    channels = max(conv.in_channels, conv.out_channels)
    for strip, made in zip(_strips(x, at_once, channels), _strips(out, at_once, channels), strict=True):
        moments.add(made.copy_(_pointwise(conv, strip)))
    return out, moments


def _pointwise(conv: nn.Conv2d, strip_BCS: Tensor) -> Tensor:
    return torch.bmm(conv.weight.flatten(1).expand(len(strip_BCS), -1, -1), strip_BCS)


def strips(x_BDHW: Tensor, at_once: int, channels: int = 0) -> Iterator[slice]:
    """A few rows at a time, as many as if there were `channels`: `AT_WORK` strips are held at once, in about `at_once` values."""
    batch, depth, height, width = x_BDHW.shape
    rows = _strip_rows(batch * (channels or depth) * width, at_once, _STRIP.get(x_BDHW.device.type, _LARGE_STRIP))
    for top in range(0, height, rows):
        yield slice(top, min(top + rows, height))


def _strips(x_BDHW: Tensor, at_once: int, channels: int = 0) -> Iterator[Tensor]:
    """The same as views, [B, D, S]."""
    for rows in strips(x_BDHW, at_once, channels):
        yield x_BDHW[:, :, rows].flatten(2)


def most_strip_rows(row_values: int, at_once: int) -> int:
    """Upper bound on the rows of a strip, on any device."""
    return _strip_rows(row_values, at_once, _LARGE_STRIP)


def _strip_rows(row_values: int, at_once: int, largest: int) -> int:
    return max(1, max(_SMALL_STRIP, min(at_once // AT_WORK, largest)) // row_values)


@dataclass
class Moments:
    """Mean and variance of GroupNorm's groups, from those of each strip's channels."""

    parts: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    "pixels, means and variances [B, D]"

    def add(self, strip_BDS: Tensor) -> None:
        pixels, mean = strip_BDS.shape[-1], strip_BDS.mean(-1)
        squares = torch.linalg.vector_norm(strip_BDS, dim=-1).square() / pixels
        self.parts.append((pixels, mean, squares - mean.square()))

    def affine(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """Scale and shift of each channel that `norm` comes to, both [B, D, 1]."""
        total = sum(pixels for pixels, _, _ in self.parts)
        shares = [pixels / total for pixels, _, _ in self.parts]
        means = torch.stack([mean for _, mean, _ in self.parts]).unflatten(2, (norm.num_groups, -1))
        variances = torch.stack([variance for _, _, variance in self.parts]).unflatten(2, (norm.num_groups, -1))
        mean = _weighted(means.mean(-1), shares)
        variance = _weighted((variances + (means - mean[..., None]).square()).mean(-1), shares)
        each = norm.num_channels // norm.num_groups
        scale = (variance + norm.eps).rsqrt().repeat_interleave(each, dim=1)
        shift = -mean.repeat_interleave(each, dim=1) * scale
        if norm.affine:
            scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
        return scale[..., None], shift[..., None]


def _weighted(parts: Tensor, shares: list[float]) -> Tensor:
    """The sum over the first dimension, without a tensor of weights: that would have to be copied to the device."""
    return torch.stack([part * share for part, share in zip(parts, shares, strict=True)]).sum(0)


def group_normalised(x_BDHW: Tensor, at_once: int) -> Tensor:
    """GroupNorm without weights; in place where no gradients are wanted."""
    if torch.is_grad_enabled():
        return F.group_norm(x_BDHW, GROUPS)
    moments = Moments()
    for strip in _strips(x_BDHW, at_once):
        moments.add(strip)
    scale, shift = moments.affine(nn.GroupNorm(GROUPS, x_BDHW.shape[1], affine=False))
    for strip in _strips(x_BDHW, at_once):
        strip.copy_(torch.addcmul(shift, strip, scale))
    return x_BDHW


def pooled(x_BDHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Averages over the cells of a grid; the map itself where it is as fine."""
    return x_BDHW if tuple(x_BDHW.shape[2:]) == tuple(grid) else F.adaptive_avg_pool2d(x_BDHW, grid)


class PixelRope(nn.Module):
    """A position code that was a rotary one when training began, `freqs` [2, D] being trained with the rest.

    The angle of a channel is row * freqs[0] + column * freqs[1], rows and columns going from 0 to 1, both ends included. The two
    channels that a rotation would turn by one angle have angles of their own.
    """

    def __init__(self, width: int):
        super().__init__()
        quarter = width // 4
        periods = 2 * math.pi * 100 ** (-torch.arange(quarter) / max(1, quarter - 1))
        freqs = torch.zeros(2, width)
        freqs[0, : 2 * quarter] = freqs[1, 2 * quarter : 4 * quarter] = periods.repeat(2)
        self.freqs = nn.Parameter(freqs)

    def forward(self, x_BDHW: Tensor, at_once: int) -> Tensor:
        """The coded map; in place where no gradients are wanted, strip by strip."""
        height, width = x_BDHW.shape[2:]
        rows, columns = (
            torch.linspace(0, 1, n, device=x_BDHW.device) * freqs[:, None]
            for n, freqs in zip((height, width), self.freqs, strict=True)
        )
        if torch.is_grad_enabled():
            return _turned(x_BDHW, rows, columns)
        top = 0
        for strip in _strips(x_BDHW, at_once):
            part = strip.unflatten(2, (-1, width))
            part.copy_(_turned(part, rows[:, top : top + part.shape[2]], columns))
            top += part.shape[2]
        return x_BDHW


def _turned(x_BDHW: Tensor, rows_DH: Tensor, columns_DW: Tensor) -> Tensor:
    """x cos(a) + (-second half, first half) sin(a), a = row + column; sines of sums by those of the terms, which are few."""
    sin_row, cos_row = rows_DH.sin()[..., None], rows_DH.cos()[..., None]
    sin_column, cos_column = columns_DW.sin()[:, None], columns_DW.cos()[:, None]
    first, second = x_BDHW.chunk(2, dim=1)
    turned = x_BDHW * (cos_row * cos_column - sin_row * sin_column)
    return turned + torch.cat([-second, first], dim=1) * (sin_row * cos_column + cos_row * sin_column)


def encode_values(width: int, image: tuple[int, int], at_once: int) -> int:
    """Upper bound on the values that the pixels' encoders hold at once: three maps, and a strip on its way."""
    row, rows = width * image[1], image[0]
    return row * (3 * rows + AT_WORK * min(rows, most_strip_rows(row, at_once)))


# --- attention ----------------------------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """The published modules' parameters: a norm and a projection for queries and keys each.

    Those of values, and of the output, are in every published file, but nothing goes through them.
    """

    def __init__(self, width: int, heads: int, channels: int | None = None):
        super().__init__()
        self.norm_q, self.norm_k = nn.RMSNorm(width), nn.RMSNorm(width)
        if channels is not None:
            self.norm_v = nn.RMSNorm(channels)
        self.attention = nn.MultiheadAttention(width, heads, vdim=channels, batch_first=True)

    def heads_of(self, x_BDL: Tensor, which: int) -> Tensor:
        """Normalised and projected as queries (0) or keys (1), [B, N, L, d]."""
        attention, norm = self.attention, (self.norm_q, self.norm_k)[which]
        fused = attention.in_proj_weight
        weight = (attention.q_proj_weight, attention.k_proj_weight)[which] if fused is None else fused.chunk(3)[which]
        x = F.linear(norm(x_BDL.transpose(1, 2)), weight, attention.in_proj_bias.chunk(3)[which])
        return x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)


def in_float32(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Without autocast, whatever runs outside."""
    return torch.autocast(tensor.device.type, enabled=False)


def values_of(maps_BChw: Tensor) -> Tensor:
    """A map's cells as they are weighed, [B, K, C], in autocast's precision where that is on.

    Everything that decides about weights is float32: in bfloat16, sharp attention is off by up to 0.07 of features around 1.
    """
    return as_weighed(maps_BChw).flatten(2).transpose(1, 2).contiguous()


def as_weighed(maps: Tensor) -> Tensor:
    """In autocast's precision where that is on."""
    kind = maps.device.type
    return maps.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else maps


class CrossDecode(nn.Module):
    """A 3x3 convolution on the queries, and attention."""

    def __init__(self, width: int, heads: int, channels: int | None = None):
        super().__init__()
        self.cross_attn = CrossAttention(width, heads, channels)
        self.conv2d = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def keys(self, keys_BDhw: Tensor) -> Tensor:
        """Of all cells of the map, [B, N, K, d]."""
        return self.cross_attn.heads_of(keys_BDhw.flatten(2), 1)

    def queries(self, queries_BDHW: Tensor, tile: Tile) -> Tensor:
        """Those of a tile, [B, N, n, d]: from the pooled pixels round it, and zeros beyond the grid."""
        pads, parts = [], []
        for part, size in zip((tile.columns, tile.rows), (queries_BDHW.shape[3], queries_BDHW.shape[2]), strict=True):
            start, stop = max(0, part.start - 1), min(size, part.stop + 1)
            pads += [start - part.start + 1, part.stop + 1 - stop]
            parts.append(slice(start, stop))
        near = F.pad(queries_BDHW[:, :, parts[1], parts[0]], pads)
        found = F.conv2d(near, self.conv2d.weight)
        return self.cross_attn.heads_of(found.flatten(2), 0)


def average(queries_BNLd: Tensor, keys_BNKd: Tensor, values_BKC: Tensor) -> Tensor:
    """The values weighed by the mean of the heads' softmax over all keys, [B, L, C]."""
    batch, heads, cells, depth = keys_BNKd.shape
    keys_BNKd = keys_BNKd * depth**-0.5
    limit = _WEIGHTS.get(values_BKC.device.type, _MANY_WEIGHTS)
    out = []
    for queries in queries_BNLd.split(max(64, limit // (batch * cells)), dim=2):
        weights = queries.new_zeros(batch, queries.shape[2], cells)
        for head in range(heads):
            logits = torch.bmm(queries[:, head], keys_BNKd[:, head].transpose(1, 2))
            weights = weights.add_(logits.softmax(-1), alpha=1 / heads)
        out.append(torch.bmm(weights.to(values_BKC.dtype), values_BKC).float())
    return torch.cat(out, dim=1)


def average_values(width: int, channels: int, cells: int) -> int:
    """Upper bound on the values held for one query of a tile: round its convolution, of two heads' weights, of its result."""
    return 8 * width + 3 * channels + 4 * cells
