"""Weights by which a ViT-Up that hasn't learned anything yet enlarges each hidden state bilinearly.

The paper starts from drawn weights, and a short run spends its time on passing the backbone's features on. The published
network can do that exactly enough by weights alone: rotary embeddings let cross-attention look by place, so that one
attention is one bilinear interpolation.

Shapes: B images, h w the token grid, D channels, d those of a head, K = d / 4 rotary bands of an axis.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators.upsamplers.protocol import UpsamplerError
from operators.upsamplers.vit_up.attention import CrossAttention
from operators.upsamplers.vit_up.geometry import grid_coordinates, rope_frequencies
from operators.upsamplers.vit_up.head import Mlp, ViTUpBlock, ViTUpHead

_REACH = 64
"""Tokens to each side among which an attention's logits are fitted to bilinear weights."""

_RIDGE = 1e-3
"""Of that fit: logits stay small enough for what is learned on top of them to count."""

_FORGOTTEN = 0.75
"""Of the queries' own embedding by the first block: what is left of it is small beside the tokens, and tells of the pixels."""


@torch.no_grad()
def start_enlarging(head: ViTUpHead, query_grid_BDgg: Tensor, hidden_BhwD: Sequence[Tensor]) -> None:
    """Set weights by which every layer's answer is its hidden state enlarged bilinearly, by the statistics of these images.

    Each block forgets what the one before it answered (its transition subtracts the normalised query), attends to the tokens
    by their distance alone, and adds nothing else; the decoders bring the normalised answer back to the mean and deviation that
    each channel of the hidden state has. FeatX and a block's last MLP keep the weights that were drawn but for a last factor of
    0, so that they learn.

    Takes what `ViTUpHead.forward` takes. Raises `UpsamplerError` for a head without cross-attention, which can't interpolate.
    """
    if not head.config.cross_attention:
        raise UpsamplerError("a ViT-Up without cross-attention can't start as the enlargement: it sees the nearest token alone")
    grid = (hidden_BhwD[-1].shape[1], hidden_BhwD[-1].shape[2])
    for block in cast("Sequence[ViTUpBlock]", head.vit_up_blocks):
        _interpolate(block, head.config.channels, head.config.heads)
    coords = grid_coordinates(grid, device=query_grid_BDgg.device).expand(len(query_grid_BDgg), -1, -1)
    stream = head.stream(head.prepare(query_grid_BDgg, hidden_BhwD), coords)
    for position, state in enumerate(hidden_BhwD):
        queries = next(stream)
        _decode(cast(Mlp, head.decoder_mlp[position]), queries, state.flatten(1, 2))
        if position < head.config.blocks:
            forgotten = 1.0 if position else _FORGOTTEN
            _forget(cast(ViTUpBlock, head.vit_up_blocks[position]), forgotten * float(queries.std(dim=-1, correction=0).mean()))


@torch.enable_grad()
def bilinear_logits(bands: int) -> Tensor:
    """Factors [K] of the rotary bands' cosines of a distance along an axis, in tokens, whose sum's softmax over tokens is nearest
    to bilinear weights: of the least cross-entropy, which is convex, with tokens up to `_REACH` away. float64.

    With the published 16 bands a query's weights are 0.03 away from bilinear ones in sum; with fewer than 8 they blur.
    """
    inside = torch.linspace(-0.5, 0.5, 33, dtype=torch.float64)
    distances_QT = inside[:, None] - torch.arange(-_REACH, _REACH + 1, dtype=torch.float64)
    cosines_QTK = torch.cos(2 * math.pi * distances_QT[..., None] * rope_frequencies(bands, dtype=torch.float64))
    wanted_QT = (1 - distances_QT.abs()).clamp(min=0)
    factors_K = torch.zeros(bands, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([factors_K], max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> float:
        solver.zero_grad()
        value = F.cross_entropy(cosines_QTK @ factors_K, wanted_QT) + _RIDGE / 2 * factors_K.square().sum()
        value.backward()
        return float(value.detach())

    solver.step(loss)
    return factors_K.detach()


def _interpolate(block: ViTUpBlock, channels: int, heads: int) -> None:
    """What the block adds to its queries: its normalised tokens, enlarged bilinearly."""
    attention = cast(CrossAttention, block.cross_attention)
    head_dim = channels // heads
    # Turned pairs (u, 0) and (v, 0) have u v cos(angle) as their product, of which attention takes a root of d-th.
    factors = bilinear_logits(head_dim // 4).repeat(2) * math.sqrt(head_dim)
    for layer, halves in ((attention.q_proj, factors.abs().sqrt()), (attention.k_proj, factors.abs().sqrt() * factors.sign())):
        nn.init.zeros_(layer.weight)
        layer.bias.copy_(torch.stack([halves, torch.zeros_like(halves)], dim=-1).flatten().repeat(heads))
    for layer in (attention.v_proj, attention.out_proj):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    if block.featx is not None:
        nn.init.zeros_(block.norm_h_local.weight)
        nn.init.zeros_(block.norm_h_local.bias)
    _last(block.mlp).weight.zero_()
    _last(block.mlp).bias.zero_()


def _forget(block: ViTUpBlock, deviation: float) -> None:
    """The block's transition: minus `deviation` times the normalised query, by GELU(x) - GELU(-x) = x."""
    first, last = cast(nn.Linear, block.transition_mlp.mlp[1]), _last(block.transition_mlp)
    both = torch.cat([torch.eye(last.out_features), -torch.eye(last.out_features)])
    first.weight.copy_(both)
    last.weight.copy_(-deviation * both.T)
    first.bias.zero_()
    last.bias.zero_()


def _decode(decoder: Mlp, queries_BND: Tensor, state_BND: Tensor) -> None:
    """The decoder: for each channel the line by least squares from the normalised query to the state at its place."""
    norm, linear = cast(nn.LayerNorm, decoder.mlp[0]), _last(decoder)
    given, wanted = norm(queries_BND).flatten(0, 1).double(), state_BND.flatten(0, 1).double()
    variance, mean = torch.var_mean(given, dim=0, correction=0)
    slope = ((given - mean) * (wanted - wanted.mean(dim=0))).mean(dim=0) / variance.clamp(min=1e-6)
    linear.weight.copy_(torch.diag(slope))
    linear.bias.copy_(wanted.mean(dim=0) - slope * mean)


def _last(mlp: Mlp) -> nn.Linear:
    return cast(nn.Linear, mlp.mlp[-1])
