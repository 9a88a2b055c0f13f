"""ViT-Up's head: a query embedding sampled at coordinates, refined by one block for each hidden state.

What depends on the tokens alone is computed once an image (`prepare`), what depends on the queries once a chunk (`query`).
State dicts of the published files load as they are.

Shapes: B images, N queries, h w the token grid, D channels.
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators.upsamplers.protocol import Settings, UpsamplerError, require_counts
from operators.upsamplers.vit_up.attention import CrossAttention, Windows
from operators.upsamplers.vit_up.geometry import ENCODING, Rope, encode_offsets, nearest_tokens, offset_frequencies


@dataclass(frozen=True, kw_only=True)
class ViTUpConfig(Settings):
    """What a ViT-Up is made of. The defaults are the published ones; raises `UpsamplerError` where settings are impossible."""

    owner = "ViT-Up"
    channels: int
    "of the backbone's tokens"
    heads: int
    "of the cross-attention; the published ones have 64 channels each"
    layers: tuple[int, ...] = (0, 2, 4, 6, 8, 10, 12)
    "hidden states: 0 the patch embedding, n the tokens after n blocks; the first is only decoded, each other has a block"
    window: int | None = None
    "tokens a side, rounded down to odd, that a query sees round its nearest token; null: all, as published"
    query_size: int = 3584
    "side in pixels of the image whose patch embeddings the queries are sampled from"
    hidden_size: int = 448
    "side in pixels of the image that gives the hidden states"
    mlp_channels: int | None = None
    "hidden channels of the two large MLPs of a block; null: 4 x channels"
    featx: bool = True
    "False for the ablation without FeatX"
    cross_attention: bool = True
    "False for the ablation without cross-attention"
    lora: bool = True
    "False for the ablation with the backbone as it is"
    rank: int = 16
    "of LoRA"
    alpha: float = 32.0
    "of LoRA: its products are multiplied by alpha / rank"
    dropout: float = 0.05
    "of LoRA's inputs, in training"

    def __post_init__(self) -> None:
        require_counts(self, "channels", "heads", "window", "query_size", "hidden_size", "mlp_channels", "rank")
        if self.channels % (4 * self.heads):
            raise UpsamplerError(
                f"{self.channels} channels in {self.heads} heads: a head's channels must be a multiple of 4 for its rotary "
                f"embeddings"
            )
        rising = all(below < above for below, above in zip(self.layers, self.layers[1:], strict=False))
        if len(self.layers) < 2 or not rising or self.layers[0] < 0:
            raise UpsamplerError(f"layers must be two or more rising numbers from 0, got {self.layers}")
        if not 0 <= self.dropout < 1:
            raise UpsamplerError(f"dropout must be from 0 to below 1, got {self.dropout}")

    @property
    def blocks(self) -> int:
        return len(self.layers) - 1


@dataclass(frozen=True, kw_only=True)
class BlockTokens:
    """What a block reads of its hidden state; None where an ablation leaves it out."""

    normalised: Tensor | None
    "FeatX's normalised tokens [B, h*w, D]"
    keys: Tensor | None
    "turned [B, heads, h*w, d]"
    values: Tensor | None
    "[B, heads, h*w, d]"


@dataclass(frozen=True, kw_only=True)
class TokenCache:
    """What `ViTUpHead.query` reads of an image, whatever the queries."""

    query_grid: Tensor
    "patch embeddings of the enlarged image [B, D, gh, gw]"
    blocks: tuple[BlockTokens, ...]
    grid: tuple[int, int]
    "of the tokens"

    def tensors(self) -> Iterator[Tensor]:
        yield self.query_grid
        for block in self.blocks:
            yield from (t for t in (block.normalised, block.keys, block.values) if t is not None)

    def detached(self) -> "TokenCache":
        """A copy whose tensors are leaves that collect gradients.

        With many chunks and a `backward` after each, so that the graph before the cache is walked once, by `backward`.
        """

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().requires_grad_(tensor.requires_grad)

        def leaves(block: BlockTokens) -> BlockTokens:
            found = {f.name: getattr(block, f.name) for f in fields(block)}
            return BlockTokens(**{name: None if tensor is None else leaf(tensor) for name, tensor in found.items()})

        return TokenCache(query_grid=leaf(self.query_grid), blocks=tuple(map(leaves, self.blocks)), grid=self.grid)

    def backward(self, leaves: "TokenCache") -> None:
        """Send the gradients that `leaves`, this cache's `detached` copy, collected on to the backbone and the head."""
        both = zip(self.tensors(), leaves.tensors(), strict=True)
        pairs = [(own, leaf.grad) for own, leaf in both if leaf.grad is not None]
        if pairs:
            torch.autograd.backward([own for own, _ in pairs], [gradient for _, gradient in pairs])


@dataclass(frozen=True, kw_only=True)
class Queries:
    """What all blocks share of a chunk of queries."""

    nearest: Tensor
    "raster number of the nearest token among all of the batch, int64 [B, N]"
    encoding: Tensor
    "of the offset to it, float32 [B, N, 66]"
    rope: Rope
    windows: Windows | None


class Mlp(nn.Module):
    """[LayerNorm,] linears with GELU (erf) between them, under the official names `mlp.<i>`."""

    def __init__(self, *widths: int, norm: bool):
        super().__init__()
        layers: list[nn.Module] = [nn.LayerNorm(widths[0])] if norm else []
        for i, width in enumerate(widths[1:]):
            layers += [nn.GELU()] * (i > 0) + [nn.Linear(widths[i], width)]
        self.mlp = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class FeatX(nn.Module):
    """A token at an offset: FiLM of the normalised token by the encoded offset, then an MLP.

    Whatever the offset, it begins as that MLP of the token: the last layer of the modulation is zero.
    """

    def __init__(self, channels: int, mlp_channels: int):
        super().__init__()
        self.norm_input = nn.LayerNorm(channels)
        self.gamma_beta_mlp = Mlp(ENCODING, channels, 2 * channels, norm=False)
        self.post_mlp = Mlp(channels, mlp_channels, channels, norm=True)
        last = self.gamma_beta_mlp.mlp[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, normalised_BND: Tensor, encoding_BNE: Tensor) -> Tensor:
        """Of tokens that went through `norm_input` already, for it doesn't depend on the query."""
        return self.post_mlp(self._film(normalised_BND, encoding_BNE))

    def _film(self, normalised: Tensor, encoding: Tensor) -> Tensor:
        gamma, beta = self.gamma_beta_mlp(encoding).chunk(2, dim=-1)
        return torch.addcmul(normalised + beta, gamma, normalised)


class ViTUpBlock(nn.Module):
    """Refines queries by one hidden state: a transition, attention to all tokens, FeatX of the nearest one, an MLP; each added.

    `norm_h_local`, by its official name, normalises what FeatX gives, which the paper's equations don't show.
    """

    def __init__(self, config: ViTUpConfig):
        super().__init__()
        channels, wide = config.channels, config.mlp_channels or 4 * config.channels
        self.transition_mlp = Mlp(channels, 2 * channels, channels, norm=True)
        self.cross_attention = CrossAttention(channels, config.heads) if config.cross_attention else None
        self.featx = FeatX(channels, wide) if config.featx else None
        if config.cross_attention:
            self.norm_q_global, self.norm_h_global = nn.LayerNorm(channels), nn.LayerNorm(channels)
        if config.featx:
            self.norm_h_local = nn.LayerNorm(channels)
        self.norm_post = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, wide, channels, norm=False)

    def prepare(self, hidden_BhwD: Tensor, rope: Rope) -> BlockTokens:
        """What `forward` reads of a hidden state."""
        tokens, keys, values = hidden_BhwD.flatten(1, 2), None, None
        if self.cross_attention is not None:
            keys, values = self.cross_attention.keys_values(self.norm_h_global(tokens), rope)
        # FeatX takes the raw token, not the one that attention sees.
        normalised = None if self.featx is None else self.featx.norm_input(tokens)
        return BlockTokens(normalised=normalised, keys=keys, values=values)

    def forward(self, x_BND: Tensor, tokens: BlockTokens, queries: Queries) -> Tensor:
        """The refined queries; without gradients, `x_BND` itself is overwritten."""
        x = _plus(x_BND, self.transition_mlp(x_BND))
        if self.cross_attention is not None:
            tokens_seen = (tokens.keys, tokens.values, queries.rope, queries.windows)
            x = _plus(x, self.cross_attention(self.norm_q_global(x), *tokens_seen))
        if self.featx is not None and tokens.normalised is not None:
            nearest = tokens.normalised.flatten(0, 1)[queries.nearest]
            x = _plus(x, self.norm_h_local(self.featx(nearest, queries.encoding)))
        return _plus(x, self.mlp(self.norm_post(x)))


def _plus(x: Tensor, change: Tensor) -> Tensor:
    """The residual sum in the precision of `x`; in place where no graph needs `x`."""
    return x + change if torch.is_grad_enabled() else x.add_(change)


class _OffsetEncoding(nn.Module):
    """A place for the frequencies under their official name."""

    freqs: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("freqs", offset_frequencies())


class ViTUpHead(nn.Module):
    """Query grid, hidden states and coordinates to features of each of `config.layers` at the coordinates."""

    def __init__(self, config: ViTUpConfig):
        super().__init__()
        self.config = config
        self.rel_pos_enc = _OffsetEncoding()
        # The official code copies one block, so that all start with the same weights.
        block = ViTUpBlock(config)
        self.vit_up_blocks = nn.ModuleList([block, *(copy.deepcopy(block) for _ in range(config.blocks - 1))])
        self.decoder_mlp = nn.ModuleList(Mlp(config.channels, config.channels, norm=True) for _ in config.layers)

    def forward(
        self,
        query_grid_BDgg: Tensor,
        hidden_BhwD: Sequence[Tensor],
        coords_BN2: Tensor,
        *,
        outputs: Sequence[int] | None = None,
        query_chunk: int | None = None,
    ) -> list[Tensor]:
        """Features [B, N, D] of the layers at `outputs`, positions in `config.layers`; all by default, [-1] for the last.

        Hidden states [B, h, w, D] in the order of `config.layers`; coordinates (x, y) [B, N, 2]. `query_chunk`: how many
        queries are at work at once, which doesn't change the results. Raises `UpsamplerError` where shapes don't fit.
        """
        cache = self.prepare(query_grid_BDgg, hidden_BhwD)
        chunks = coords_BN2.split(query_chunk or max(1, coords_BN2.shape[1]), dim=1)
        parts = [self.query(cache, chunk, outputs) for chunk in chunks]
        return [torch.cat(of_layer, dim=1) for of_layer in zip(*parts, strict=True)]

    def prepare(self, query_grid_BDgg: Tensor, hidden_BhwD: Sequence[Tensor]) -> TokenCache:
        """What doesn't depend on the queries. The first hidden state isn't read: its output is the decoded query itself."""
        self._check(query_grid_BDgg, hidden_BhwD)
        grid = (hidden_BhwD[-1].shape[1], hidden_BhwD[-1].shape[2])
        rope = Rope.of_tokens(grid, self._head_dim, query_grid_BDgg.device)
        of_layers = cast("Sequence[ViTUpBlock]", self.vit_up_blocks)
        blocks = [block.prepare(h, rope) for block, h in zip(of_layers, hidden_BhwD[1:], strict=True)]
        return TokenCache(query_grid=query_grid_BDgg.float(), blocks=tuple(blocks), grid=grid)

    def query(self, cache: TokenCache, coords_BN2: Tensor, outputs: Sequence[int] | None = None) -> list[Tensor]:
        """Features [B, N, D] at some coordinates of prepared images; `outputs` as in `forward`."""
        asked = range(len(self.config.layers)) if outputs is None else outputs
        wanted = [range(len(self.config.layers))[position] for position in asked]
        decoded: dict[int, Tensor] = {}
        for position, x in enumerate(itertools.islice(self.stream(cache, coords_BN2), max(wanted) + 1)):
            if position in wanted:
                decoded[position] = self.decoder_mlp[position](x)
        return [decoded[position] for position in wanted]

    def stream(self, cache: TokenCache, coords_BN2: Tensor) -> Iterator[Tensor]:
        """The queries [B, N, D] after 0, 1, ... blocks, undecoded; without gradients, each overwrites the one before."""
        coords = coords_BN2.float()
        queries = self._queries(coords, cache.grid)
        x = sample(cache.query_grid, coords)
        yield x
        for block, tokens in zip(self.vit_up_blocks, cache.blocks, strict=True):
            x = block(x, tokens, queries)
            yield x

    @property
    def _head_dim(self) -> int:
        return self.config.channels // self.config.heads

    def _queries(self, coords_BN2: Tensor, grid: tuple[int, int]) -> Queries:
        nearest, offsets = nearest_tokens(coords_BN2, grid)
        images = torch.arange(len(coords_BN2), device=coords_BN2.device)[:, None] * (grid[0] * grid[1])
        windowed = self.config.cross_attention and self.config.window is not None
        return Queries(
            nearest=images + nearest[..., 1] * grid[1] + nearest[..., 0],
            encoding=encode_offsets(offsets, self.rel_pos_enc.freqs),
            rope=Rope.of_queries(coords_BN2, grid, self._head_dim),
            windows=Windows.around(nearest, grid, self.config.window) if windowed else None,
        )

    def _check(self, query_grid: Tensor, hidden: Sequence[Tensor]) -> None:
        channels = self.config.channels
        if len(hidden) != len(self.config.layers):
            raise UpsamplerError(f"{len(hidden)} hidden states for layers {self.config.layers}: one for each is needed")
        shapes = {tuple(state.shape) for state in hidden}
        (shape,) = shapes if len(shapes) == 1 else (None,)
        if shape is None or len(shape) != 4 or shape[-1] != channels or shape[0] != len(query_grid):
            raise UpsamplerError(f"hidden states must all be [{len(query_grid)}, h, w, {channels}], got {sorted(shapes)}")
        if query_grid.ndim != 4 or query_grid.shape[1] != channels:
            raise UpsamplerError(f"the query grid must be [B, {channels}, h, w], got {tuple(query_grid.shape)}")


def sample(maps_BDhw: Tensor, coords_BN2: Tensor) -> Tensor:
    """Bilinear values [B, N, D] of maps at coordinates; beyond the outer cells' centres those of the border."""
    at = (2 * coords_BN2 - 1).unsqueeze(2)
    sampled = F.grid_sample(maps_BDhw, at, padding_mode="border", align_corners=False)[..., 0]
    # Or all that is added to it later would be laid out as maps are.
    return sampled.transpose(1, 2).contiguous()
