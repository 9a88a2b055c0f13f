"""Upsamplers as their papers and first implementations have them: everything at once, nothing shared, in a few lines each.

They take their weights from our networks, so that results can be held against ours: `jobs/benchmark.py upsamplers`.

Shapes: B batch, C channels, D of queries and keys, N heads, H W pixels, h w cells of the map, Ho Wo of the grid.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from operators.upsamplers.queried import Tile
from storage.documents import JsonObject

Plain: TypeAlias = Callable[[Any, Tensor, Tensor, tuple[int, int]], Tensor]
"""Our network, normalised images [B, 3, H, W], maps [B, C, h, w] and a grid, to [B, C, *grid]."""


@dataclass(frozen=True, kw_only=True)
class Formulation:
    """A method, and the plain way to what it gives."""

    method: str
    "of `UPSAMPLERS`"
    plain: Plain
    holds: str
    "what it has in memory at once, in words"
    large: int | None = 0
    "side of a grid from which on that is most of its work: there ours is to be twice as fast, else no slower; None: never"
    settings: JsonObject = field(default_factory=dict)


def bilateral(net: Any, images: Tensor, maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """FeatUp's joint bilateral filter, again and again: both neighbourhoods unfolded, and an einsum over taps."""
    for _ in range(math.ceil(math.log2(grid[0] / maps.shape[2]))):
        maps = _filtered(net, images, maps)
    return maps


def bilateral_stack(net: Any, images: Tensor, maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """FeatUp's LayerNorm, its filters, each with weights of its own, and the correction at their end."""
    maps = net.norm(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    for step in range(1, math.ceil(math.log2(grid[0] / maps.shape[2])) + 1):
        maps = _filtered(net.get_submodule(f"up{step}"), images, maps)
    maps = maps + 0.1 * net.fixup_proj(maps)
    return maps if maps.shape[2:] == grid else F.interpolate(maps, grid, mode="bilinear")


def _filtered(step: Any, images: Tensor, maps: Tensor) -> Tensor:
    radius, side = step.radius, 2 * step.radius + 1

    def neighbours(x: Tensor) -> Tensor:
        return F.unfold(F.pad(x, [radius] * 4, mode="reflect"), side).view(len(x), x.shape[1], side**2, *x.shape[2:])

    finer = (2 * maps.shape[2], 2 * maps.shape[3])
    guide = F.adaptive_avg_pool2d(images, finer)
    keys = step.range_proj(guide)
    products = torch.einsum("bdtyx,bdyx->btyx", neighbours(keys), keys)
    axis = torch.linspace(-1, 1, side, device=maps.device)
    gaussian = torch.exp(-(axis[:, None] ** 2 + axis**2) / (2 * step.sigma_spatial**2)).view(1, -1, 1, 1)
    kernel = (products * step.range_temp.exp().clamp(1e-4, 1e4)).softmax(dim=1) * gaussian
    kernel = kernel / kernel.sum(dim=1, keepdim=True).clamp(min=1e-7)
    kernel = kernel + 0.1 * step.fixup_proj(torch.cat([kernel, guide], dim=1))
    enlarged = F.interpolate(maps, finer, mode="bicubic", align_corners=False)
    return torch.einsum("bctyx,btyx->bcyx", neighbours(enlarged), kernel)


def dense_attention(net: Any, images: Tensor, maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """JAFAR: logits of all queries and cells for all heads."""
    pixels = _coded(net.rope.freqs, net.image_encoder(images))
    queries = F.group_norm(F.adaptive_avg_pool2d(net.query_encoder(pixels), grid), 8)
    keys = F.group_norm(F.adaptive_avg_pool2d(net.key_encoder(pixels), (maps.shape[2], maps.shape[3])), 8)
    features = net.key_features_encoder(F.normalize(maps, dim=1))
    keys = net.sft_key.gamma(features) * keys + net.sft_key.beta(features)
    return _averaged(net.cross_decode, queries, keys, maps, grid)


def _coded(freqs: Tensor, pixels: Tensor) -> Tensor:
    """The trained position code of JAFAR and AnyUp."""
    axes = [torch.linspace(0, 1, n, device=pixels.device) for n in pixels.shape[2:]]
    angles = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1) @ freqs
    cos, sin = angles.cos().permute(2, 0, 1), angles.sin().permute(2, 0, 1)
    first, second = pixels.chunk(2, dim=1)
    return pixels * cos + torch.cat([-second, first], dim=1) * sin


def _averaged(
    decode: Any, queries: Tensor, keys: Tensor, maps: Tensor, grid: tuple[int, int], allowed: Tensor | None = None
) -> Tensor:
    """Attention whose weights [B, N, Ho * Wo, h * w] are averaged over the heads."""
    q = decode.cross_attn.heads_of(decode.conv2d(queries).flatten(2), 0)
    k = decode.cross_attn.heads_of(keys.flatten(2), 1)
    logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -math.inf)
    weights = logits.softmax(dim=-1).mean(dim=1)
    return (weights @ maps.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, grid)


def masked_attention(net: Any, images: Tensor, maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """AnyUp: logits of all queries and cells for all heads, of which most are then left out."""
    near = [_within(n, cells, net.window_ratio, maps.device) for n, cells in zip(grid, maps.shape[2:], strict=True)]
    allowed = near[0][:, None, :, None] & near[1][None, :, None, :]
    queries, keys = _any_backbones(net, images, maps, grid)
    return _averaged(net.cross_decode, queries, keys, maps, grid, allowed.flatten(2).flatten(0, 1))


def shared_neighbourhoods(net: Any, images: Tensor, maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """AnyUp's NATTEN variant: keys and values enlarged to the grid, and of these every query's neighbours."""
    attention, base = net.cross_decode.cross_attn, (maps.shape[2], maps.shape[3])
    queries, keys = _any_backbones(net, images, maps, grid)
    q = attention.heads_of(net.cross_decode.conv2d(queries).flatten(2), 0).transpose(2, 3).unflatten(3, grid)
    k = attention.heads_of(keys.flatten(2), 1).transpose(2, 3).unflatten(3, base)
    kernel = (_odd(base[0], net.window_ratio), _odd(base[1], net.window_ratio))
    dilation = (grid[0] // base[0], grid[1] // base[1])
    k, v = (_enlarged(each.flatten(1, -3), grid).unflatten(1, each.shape[1:-2]) for each in (k, maps[:, None]))
    logits = torch.einsum("bndyx,bndyxij->bnyxij", q, _neighbours(k, kernel, dilation)) / math.sqrt(q.shape[2])
    weights = logits.flatten(4).softmax(dim=-1).view_as(logits).mean(dim=1)
    return torch.einsum("byxij,bcyxij->bcyx", weights, _neighbours(v, kernel, dilation)[:, 0])


def _any_backbones(net: Any, images: Tensor, maps: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """AnyUp's queries and keys."""
    base = (maps.shape[2], maps.shape[3])
    pixels = _coded(net.rope.freqs, net.image_encoder(images))
    unify, *blocks = net.key_features_encoder
    basis = unify.basis
    normalised = F.normalize(maps, dim=1).flatten(0, 1)[:, None]
    taps = F.conv2d(torch.ones_like(normalised[:1]), torch.ones_like(basis[:1]), padding=basis.shape[2] // 2)
    responses = F.conv2d(normalised, basis, padding=basis.shape[2] // 2) / taps
    features = responses.reshape(len(maps), len(basis), maps.shape[1], *base).softmax(dim=1).mean(dim=2)
    for block in blocks:
        features = block(features)
    seen = F.adaptive_avg_pool2d(net.key_encoder(pixels), base)
    return F.adaptive_avg_pool2d(net.query_encoder(pixels), grid), net.aggregation(torch.cat([seen, features], dim=1))


def _within(queries: int, cells: int, ratio: float, device: torch.device) -> Tensor:
    """Which cells each query of an axis may attend to, [queries, cells]."""
    centres, at = (torch.arange(queries, device=device) + 0.5) / queries, torch.arange(cells, device=device)
    first, last = (centres - ratio).clamp(0, 1) * cells, (centres + ratio).clamp(0, 1) * cells
    return (first.floor()[:, None] <= at) & (at < last.ceil()[:, None])


def _odd(cells: int, ratio: float) -> int:
    kernel = max(3, round(2 * ratio * cells))
    return kernel + (kernel % 2 == 0)


def neighbourhoods(net: Any, images: Tensor, maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """NAF: keys and values enlarged to the grid, and of these every query's neighbours."""
    cap = 4 * min(grid)
    size = (min(images.shape[2], cap), min(images.shape[3], cap))
    pixels = images if images.shape[2:] == size else F.interpolate(images, size, mode="bilinear")
    code = torch.cat([net.image_encoder.encoder(pixels), net.image_encoder.sem_encoder(pixels)], dim=1)
    queries = _turned(net.image_encoder.rope.periods, F.adaptive_avg_pool2d(code, grid))
    keys = F.adaptive_avg_pool2d(queries, (maps.shape[2], maps.shape[3]))
    q, k, v = (each.unflatten(1, (net.heads, -1)) for each in (queries, _enlarged(keys, grid), _enlarged(maps, grid)))
    kernel, dilation = (net.kernel, net.kernel), (grid[0] // maps.shape[2], grid[1] // maps.shape[3])
    logits = torch.einsum("bndyx,bndyxij->bnyxij", q, _neighbours(k, kernel, dilation)) / math.sqrt(q.shape[2])
    weights = logits.flatten(4).softmax(dim=-1).view_as(logits)
    return torch.einsum("bnyxij,bndyxij->bndyx", weights, _neighbours(v, kernel, dilation)).flatten(1, 2)


def _turned(periods: Tensor, code: Tensor) -> Tensor:
    """NAF's rotary code, of heads of four channels for each period."""
    centres = [2 * (torch.arange(n, device=code.device) + 0.5) / n - 1 for n in code.shape[2:]]
    angles = 2 * math.pi * torch.stack(torch.meshgrid(*centres, indexing="ij"))[:, None] / periods[:, None, None]
    angles = angles.flatten(0, 1).repeat(2, 1, 1)
    heads = code.unflatten(1, (-1, len(angles)))
    first, second = heads.chunk(2, dim=2)
    return (heads * angles.cos() + torch.cat([-second, first], dim=2) * angles.sin()).flatten(1, 2)


def _enlarged(x: Tensor, grid: tuple[int, int]) -> Tensor:
    return F.interpolate(x, grid, mode="nearest-exact")


def _neighbours(x: Tensor, kernel: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """Of [B, N, D, H, W] every position's, by NATTEN's rule: [B, N, D, H, W, rows, columns]."""
    rows, columns = (_window(n, k, d, x.device) for n, k, d in zip(x.shape[3:], kernel, dilation, strict=True))
    return x[:, :, :, rows[:, None, :, None], columns[None, :, None, :]]


def _window(positions: int, kernel: int, dilation: int, device: torch.device) -> Tensor:
    """The positions that each attends to along an axis, [positions, kernel]: shifted at borders, never fewer."""
    at = torch.arange(positions, device=device)
    group, index = at % dilation, at // dilation
    last = (positions - group + dilation - 1) // dilation - kernel
    first = torch.minimum((index - kernel // 2).clamp(min=0), last)
    return group[:, None] + dilation * (first[:, None] + torch.arange(kernel, device=device))


def local_attender(net: Any, images: Tensor, maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """UPLiFT: all of the encoder's maps, and for each step every cell's neighbours, enlarged."""
    encoded = [images]
    for block in net.encoder.values():
        encoded.append(_with_given(block.blocks[0].conv, encoded[-1]))
    low, high = (block.blocks[0].conv for block in (net.decoder["block_0"], net.decoder["block_1"]))
    for _ in range(math.ceil(math.log2(grid[0] / maps.shape[2]))):
        finer = (2 * maps.shape[2], 2 * maps.shape[3])
        x = _with_given(low, torch.cat([maps, F.interpolate(encoded[-1], maps.shape[2:])], dim=1))
        x = net.decoder["up_1"]["up"](x) + F.interpolate(x, finer, mode="bilinear", align_corners=True)
        guide = _with_given(high, torch.cat([x, F.interpolate(encoded[-2], finer)], dim=1))
        weights = _with_given(net.attender.conv1, guide).softmax(dim=1)
        (h, w), padded = maps.shape[2:], F.pad(maps, [2] * 4, mode="replicate")
        near = [padded[:, :, 2 + y : 2 + y + h, 2 + x : 2 + x + w] for y, x in net.attender.offsets]
        enlarged = torch.stack([F.interpolate(each, finer) for each in near], dim=1)
        maps = (weights[:, :, None] * enlarged).sum(dim=1)
    return maps if maps.shape[2:] == grid else F.interpolate(maps, grid, mode="bilinear", antialias=True)


def _with_given(layers: Any, given: Tensor) -> Tensor:
    """What layers give, and what they were given added to it, cut or filled up with zeros to as many channels."""
    out = layers(given)
    return out + F.pad(given[:, : out.shape[1]], (0, 0, 0, 0, 0, max(0, out.shape[1] - given.shape[1])))


def full_attention(net: Any, images: Tensor, maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """LoftUp: all pixels of the image at the grid's size ask all cells, block by block, and attention gives its weights, too."""
    colours = images if images.shape[2:] == grid else F.interpolate(images, grid, mode="bilinear", antialias=True)
    least, most = colours.amin((2, 3), keepdim=True), colours.amax((2, 3), keepdim=True)
    colours = (colours - least) / (most - least).clamp(min=1e-4) - 0.5
    inner = net.upsampler
    whole = Tile(rows=slice(0, grid[0]), columns=slice(0, grid[1]))
    queries = inner.asked(colours, whole).flatten(2).permute(2, 0, 1)
    tokens = inner.tokens(net.channelnorm(maps)).transpose(0, 1)
    for block, feed_forward in inner.ca_transformer.layers:
        given, weights = block.norm_kv(tokens), block.attention
        found, _ = F.multi_head_attention_forward(
            block.norm_q(queries), given, given, given.shape[2], block.heads, weights.in_proj_weight, weights.in_proj_bias,
            None, None, False, 0.0, weights.out_proj.weight, weights.out_proj.bias, training=False,
        )  # fmt: skip
        queries = queries + found
        queries = queries + feed_forward(queries)
    return inner.final_conv(inner.ca_transformer.norm(queries).permute(1, 2, 0).unflatten(2, grid))


FORMULATIONS: Mapping[str, Formulation] = {
    "jafar": Formulation(method="jafar", plain=dense_attention, holds="weights of all heads, queries and cells", large=224),
    "anyup": Formulation(
        method="anyup", plain=masked_attention, holds="weights of all heads, queries and cells, masked or not", large=224
    ),
    "anyup natten": Formulation(
        method="anyup",
        plain=shared_neighbourhoods,
        holds="the neighbours' keys and values of each cell of the grid",
        large=224,
        settings={"natten": True},
    ),
    "naf": Formulation(method="naf", plain=neighbourhoods, holds="81 keys and values of each cell of the grid"),
    "uplift": Formulation(method="uplift", plain=local_attender, holds="17 neighbours of each finer cell"),
    "loftup": Formulation(method="loftup", plain=full_attention, holds="weights of all heads, queries and cells", large=None),
    "featup": Formulation(method="featup", plain=bilateral_stack, holds="49 neighbours of each finer cell"),
    "jbu": Formulation(method="jbu", plain=bilateral, holds="49 neighbours of each finer cell"),
}
"""By the name that reports have; several where a method has several ways."""
