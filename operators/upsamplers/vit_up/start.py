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
    logits = bilinear_logits(head.config.channels // head.config.heads // 4)
    for block in cast("Sequence[ViTUpBlock]", head.vit_up_blocks):
        _interpolate(block, logits)
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


def _interpolate(block: ViTUpBlock, logits_K: Tensor) -> None:
    """What the block adds to its queries: its normalised tokens, enlarged bilinearly; `bilinear_logits` of its bands."""
    attention = cast(CrossAttention, block.cross_attention)
    # Turned pairs (u, 0) and (v, 0) have u v cos(angle) as their product, of which attention takes a root of d-th.
    factors = logits_K.repeat(2) * math.sqrt(4 * len(logits_K))
    nothing, halves = torch.zeros(()), factors.abs().sqrt()
    for layer, of_pairs in ((attention.q_proj, halves), (attention.k_proj, halves * factors.sign())):
        pairs = torch.stack([of_pairs, torch.zeros_like(of_pairs)], dim=-1)
        _set(layer, nothing, pairs.flatten().repeat(attention.heads))
    for layer in (attention.v_proj, attention.out_proj):
        _set(layer, torch.eye(layer.out_features))
    if block.featx is not None:
        _set(block.norm_h_local, nothing)
    _set(_last(block.mlp), nothing)


def _forget(block: ViTUpBlock, deviation: float) -> None:
    """The block's transition: minus `deviation` times the normalised query, by GELU(x) - GELU(-x) = x."""
    first, last = cast(nn.Linear, block.transition_mlp.mlp[1]), _last(block.transition_mlp)
    both = torch.cat([torch.eye(last.out_features), -torch.eye(last.out_features)])
    _set(first, both)
    _set(last, -deviation * both.T)


def _decode(decoder: Mlp, queries_BND: Tensor, state_BND: Tensor) -> None:
    """The decoder: for each channel the line by least squares from the normalised query to the state at its place."""
    norm = cast(nn.LayerNorm, decoder.mlp[0])
    given, wanted = norm(queries_BND).flatten(0, 1).double(), state_BND.flatten(0, 1).double()
    variance, mean = torch.var_mean(given, dim=0, correction=0)
    slope = ((given - mean) * (wanted - wanted.mean(dim=0))).mean(dim=0) / variance.clamp(min=1e-6)
    _set(_last(decoder), torch.diag(slope), wanted.mean(dim=0) - slope * mean)


def _last(mlp: Mlp) -> nn.Linear:
    return cast(nn.Linear, mlp.mlp[-1])


def _set(layer: nn.Linear | nn.LayerNorm, weight: Tensor, bias: Tensor | None = None) -> None:
    """Put these into a layer's weights and biases, which a single number fills; no biases are 0."""
    layer.weight.copy_(weight)
    layer.bias.copy_(torch.zeros(()) if bias is None else bias)
