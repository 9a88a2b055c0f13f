"""ViT-Up's windowed attention beside the plainest way to the same numbers: keys and values gathered for each query.

`compare_window` times both on one image and checks that they agree; `window_report` is its Markdown.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from operators.upsamplers.vit_up.attention import CrossAttention
from operators.upsamplers.vit_up.geometry import Rope, encode_offsets, grid_coordinates, nearest_tokens
from operators.upsamplers.vit_up.head import FeatX, ViTUpBlock, ViTUpConfig, ViTUpHead, sample
from operators.upsamplers.vit_up.method import random_head
from pipelines.costs.clocks import median_ratio, timed
from pipelines.costs.process import BenchmarkFailed
from pipelines.results import table_lines

QUERIES = 3136
"""At once, in both: the official code's default."""
_TOLERANCE = 1e-4
"largest difference of the two, of the largest value"


@dataclass(frozen=True, kw_only=True)
class WindowSeconds:
    """Of each run, in rounds of both."""

    head: tuple[float, ...]
    gather: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class WindowComparison:
    """The head beside gathering, for one window."""

    window: int | None
    channels: int
    blocks: int
    tokens: tuple[int, int]
    grid: int
    queries: int
    "at once"
    seconds: WindowSeconds
    ratio: float
    "time of gathering to the head's"
    largest_difference: float
    largest_value: float


def compare_window(
    settings: ViTUpConfig, tokens: tuple[int, int], grid: int, repeat: int, device: torch.device
) -> WindowComparison:
    """The head of `settings`, and `gather_then_attend`, from `tokens` to a square `grid` of one image, in float32.

    Weights, hidden states and query grid are random. Raises `BenchmarkFailed` where the two disagree.
    """
    head, generator = random_head(settings).to(device), torch.Generator().manual_seed(0)
    shape = (1, *tokens, settings.channels)
    hidden = [torch.randn(shape, generator=generator).to(device) for _ in settings.layers]
    query_grid = torch.randn(1, settings.channels, 8 * tokens[0], 8 * tokens[1], generator=generator).to(device)
    coords = grid_coordinates((grid, grid), device=device)[None]
    outputs: dict[str, Tensor] = {}

    @torch.inference_mode()
    def run_head(coords: Tensor = coords) -> None:
        (outputs["head"],) = head(query_grid, hidden, coords, outputs=[-1], query_chunk=QUERIES)

    @torch.inference_mode()
    def run_gather(coords: Tensor = coords) -> None:
        outputs["gather"] = gather_then_attend(head, query_grid, hidden, coords, QUERIES)

    for run in (run_head, run_gather):
        run(coords[:, :QUERIES])  # to warm up
    of_head, of_gather = timed((run_head, run_gather), repeat, math.inf, device)
    difference = (outputs["head"] - outputs["gather"]).abs().max().item()
    largest = outputs["gather"].abs().max().item()
    if not difference <= _TOLERANCE * largest:
        raise BenchmarkFailed(
            f"with a window of {settings.window} the head and gathering differ by {difference:.2g}, of values up to {largest:.2g}"
        )
    return WindowComparison(
        window=settings.window,
        channels=settings.channels,
        blocks=settings.blocks,
        tokens=tokens,
        grid=grid,
        queries=QUERIES,
        seconds=WindowSeconds(head=tuple(of_head), gather=tuple(of_gather)),
        ratio=median_ratio(of_gather, of_head),
        largest_difference=difference,
        largest_value=largest,
    )


@dataclass(frozen=True, kw_only=True)
class _State:
    """What all queries read of one hidden state: tokens [1, S, D], turned keys and values [heads, S, d]."""

    tokens: Tensor
    keys: Tensor
    values: Tensor


def gather_then_attend(
    head: ViTUpHead, query_grid: Tensor, hidden: Sequence[Tensor], coords: Tensor, query_chunk: int | None = None
) -> Tensor:
    """The last layer for coordinates [1, N, 2] of one image: every query gathers keys and values of its own.

    The equations of `ViTUpHead`, written plainly; its results are the same up to rounding.
    """
    grid, heads = (hidden[0].shape[1], hidden[0].shape[2]), head.config.heads
    turn = Rope.of_tokens(grid, head.config.channels // heads, coords.device)
    states = []
    for (block, attention, _), state in zip(_parts(head), hidden[1:], strict=True):
        normed = block.norm_h_global(state.flatten(1, 2))
        keys = turn.rotate(_by_head(attention.k_proj(normed), heads))[0]
        values = _by_head(attention.v_proj(normed), heads)[0]
        states.append(_State(tokens=state.flatten(1, 2), keys=keys, values=values))
    chunks = coords.split(query_chunk or coords.shape[1], dim=1)
    return torch.cat([_refined(head, sample(query_grid, chunk), chunk, states, grid) for chunk in chunks], dim=1)


def _parts(head: ViTUpHead) -> Iterator[tuple[ViTUpBlock, CrossAttention, FeatX]]:
    """Blocks, and of each its attention and its view of the nearest token, which the heads compared here all have."""
    for block in cast("Sequence[ViTUpBlock]", head.vit_up_blocks):
        assert block.cross_attention is not None
        assert block.featx is not None
        yield block, block.cross_attention, block.featx


def _refined(head: ViTUpHead, x: Tensor, coords: Tensor, states: Sequence[_State], grid: tuple[int, int]) -> Tensor:
    heads, d = head.config.heads, head.config.channels // head.config.heads
    nearest, offsets = nearest_tokens(coords, grid)
    own, at = nearest[0, :, 1] * grid[1] + nearest[0, :, 0], _tokens_seen(nearest[0], head.config.window, grid)
    encoding, turn = encode_offsets(offsets, head.rel_pos_enc.freqs), Rope.of_queries(coords, grid, d)
    for (block, attention, featx), state in zip(_parts(head), states, strict=True):
        x = x + block.transition_mlp(x)
        queries = turn.rotate(_by_head(attention.q_proj(block.norm_q_global(x)), heads))[0]
        weights = torch.einsum("hnd,hnkd->hnk", queries, state.keys[:, at]).div(d**0.5).softmax(dim=-1)
        seen = torch.einsum("hnk,hnkd->nhd", weights, state.values[:, at]).flatten(1)[None]
        x = x + attention.out_proj(seen)
        gamma, beta = featx.gamma_beta_mlp(encoding).chunk(2, dim=-1)
        film = (1 + gamma) * featx.norm_input(state.tokens[:, own]) + beta
        x = x + block.norm_h_local(featx.post_mlp(film))
        x = x + block.mlp(block.norm_post(x))
    out: Tensor = head.decoder_mlp[-1](x)
    return out


def _tokens_seen(nearest_N2: Tensor, window: int | None, grid: tuple[int, int]) -> Tensor:
    """Raster numbers of the tokens round the nearest one (column, row) of each query, [N, K * K]; all without a window."""
    sides = [min(2 * (window // 2) + 1, side) if window else side for side in grid]
    rows, columns = (
        (nearest_N2[:, axis, None] - side // 2).clamp(0, tokens - side) + torch.arange(side, device=nearest_N2.device)
        for axis, side, tokens in ((1, sides[0], grid[0]), (0, sides[1], grid[1]))
    )
    return (rows[:, :, None] * grid[1] + columns[:, None]).flatten(1)


def _by_head(x_BND: Tensor, heads: int) -> Tensor:
    return x_BND.unflatten(-1, (heads, -1)).transpose(1, 2)


def window_report(windows: Sequence[WindowComparison]) -> Iterator[str]:
    """The comparisons as Markdown, line by line."""
    for one in windows:
        grid, (h, w) = one.grid, one.tokens
        what = f"{one.channels} channels, {one.blocks} blocks, {h} x {w} tokens to {grid} x {grid}, fp32"
        yield f"\nThe head alone with a window of {one.window}, {what}, {one.queries:,} queries at once:"
        lines = [
            [name, f"{statistics.median(seconds):.2f}", f"{len(seconds)}", ratio]
            for seconds, name, ratio in (
                (one.seconds.head, "as here", "1.00"),
                (one.seconds.gather, "gather for each query, then attend", f"{one.ratio:.2f}"),
            )
        ]
        yield from table_lines(["", "s", "runs", "of as here"], lines)
        yield f"\nLargest difference of the two: {one.largest_difference:.1e}, of values up to {one.largest_value:.1f}."
