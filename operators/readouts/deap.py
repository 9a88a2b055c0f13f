"""DeAP, dense attentive probing: queries at image positions attend to a frozen backbone's tokens through Gaussian masks.

Where the release and the paper differ, the release is the default: it made the published tables.

Shapes: B batch, C backbone channels, h w the map's grid, S = h * w tokens, N queries, D query channels, K heads.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from operators.readouts.readout import CODE, PixelDecoder, Readout, feed_forward, position_code, query_grid

_MIN_SIGMA = 1e-3
"""Far below the 0.05 that masks begin with; 0.0014 is the squared distance of neighbours among 28 queries."""


class DeAP(Readout):
    """The readout. `output` is the size in pixels (height, width) for which it is trained.

    Other sizes are other query grids. `positions="trained"` keeps their codes in the range of those trained on;
    "index" counts cells and leaves it. Codes of the tokens are always their indices: maps should have the trained grid.

    Sizes that aren't multiples of 8 are drawn on the next larger grid and resized.

    Ablations (Table 5): `mask="none"` (no-sigma), `shared_sigma` (no-indiv-sigma), `only_mask` (attention that sees no contents),
    `dim=8` (8-dim).
    """

    settings = frozenset(
        {"output", "dim", "output_bias", "heads", "mask", "positions", "shared_sigma", "only_mask", "unused_norm"}
    )
    usual_dim = 16
    working_bytes = 2**28
    "queries attend together as far as their attention stays below this"

    def __init__(
        self,
        channels: int,
        outputs: int,
        width: int,
        *,
        output: tuple[int, int] = (224, 224),
        dim: int = 16,
        heads: int = 8,
        mask: Literal["released", "paper", "none"] = "released",
        positions: Literal["trained", "index"] = "trained",
        shared_sigma: bool = False,
        only_mask: bool = False,
        unused_norm: bool = True,
        output_bias: float = 0.0,
    ):
        super().__init__(channels, outputs)
        self.trained = query_grid(output)
        self.heads, self.mask, self.positions, self.only_mask = heads, mask, positions, only_mask
        if unused_norm:
            # The release makes it and never applies it, but published counts hold it; frozen, or DDP waits for its gradients.
            self.unused_norm = nn.LayerNorm(channels + CODE).requires_grad_(False)
        if mask != "none":
            self.sigma = nn.Parameter(torch.full((1 if shared_sigma else heads,), 0.05))
        self.q_proj = nn.Linear(CODE, dim).requires_grad_(not only_mask)
        self.k = nn.Linear(channels + CODE, dim).requires_grad_(not only_mask)
        self.v = nn.Linear(channels + CODE, 2 * dim)
        self.ffn = feed_forward(2 * dim, dim)
        self.decoder = PixelDecoder(dim, outputs, width, output_bias)

    @classmethod
    def dim_groups(cls, heads: int) -> int:
        return heads

    def _predict(self, features_BChw: Tensor, size: tuple[int, int], _pooled_BC: Tensor | None) -> Tensor:
        grid = query_grid(size)
        queries = self.ffn(self.attend(features_BChw, grid))
        return self.decoder(queries.transpose(1, 2).unflatten(2, grid))

    def attend(self, features_BChw: Tensor, grid: tuple[int, int]) -> Tensor:
        """What each query of a grid gathers, float32 [B, N, 2D]: softmax(q k / sqrt(d) + mask) v with heads joined.

        Logits, masks and weights are float32 under any autocast, since a mask of bfloat16 is off by up to 0.03. They are
        made for as many queries at once as `working_bytes` holds, which doesn't change the results.
        """
        tokens = self._tokens(features_BChw)
        keys = None if self.only_mask else self._by_head(self.k(tokens)).float()
        values = self._by_head(self.v(tokens)).float()
        with torch.autocast(features_BChw.device.type, enabled=False):
            queries = self._by_head(self.q_proj(self.query_code(grid, tokens.device)))
            places = coordinates(grid, tokens.device)
            token_places = coordinates(cells_of(features_BChw), tokens.device)
            step = self._queries_at_once(*tokens.shape[:2])
            parts = []
            for start in range(0, len(places), step):
                part = slice(start, start + step)
                mask = self.masks(squared_distances(places[part], token_places))
                parts.append(self._weights(queries[:, part], keys, mask) @ values)
        return torch.cat(parts, dim=2).transpose(1, 2).flatten(-2)

    def masks(self, squared_NS: Tensor) -> Tensor | None:
        """What is added to the logits for squared distances: [K, N, S], [1, N, S] with one sigma for all, or None.

        sigma is kept above 0, where the published formulas change sign.
        """
        if self.mask == "none":
            return None
        sigma = self.sigma.clamp(min=_MIN_SIGMA)[:, None, None]
        # The release takes the Gaussian of the squared distance; eq. 2 that of the distance.
        power = squared_NS.square() if self.mask == "released" else squared_NS
        return torch.exp(power * (-0.5 / sigma.square())) * (1 / (sigma * math.sqrt(2 * math.pi)))

    def query_code(self, grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
        """Position codes [N, 8] of a query grid, of which the trained one may be another."""
        if self.positions == "index":
            return position_code(grid, device=device)
        return position_code(grid, (self.trained[0] / grid[0], self.trained[1] / grid[1]), device)

    def _tokens(self, features: Tensor) -> Tensor:
        code = position_code(cells_of(features), device=features.device)
        return torch.cat([features.flatten(2).transpose(1, 2), code.expand(len(features), -1, -1)], dim=2)

    def _by_head(self, x_ND: Tensor) -> Tensor:
        return x_ND.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def _weights(self, queries_KNd: Tensor, keys_BKSd: Tensor | None, mask: Tensor | None) -> Tensor:
        if keys_BKSd is None:
            assert mask is not None, "`only_mask` without a mask would see nothing"
            return mask.softmax(dim=-1)
        logits = (queries_KNd / math.sqrt(queries_KNd.shape[-1])) @ keys_BKSd.transpose(-1, -2)
        if mask is not None:
            logits += mask
        return logits.softmax(dim=-1)

    def _queries_at_once(self, batch: int, tokens: int) -> int:
        # Logits and weights of each image; a mask with what it is made of.
        bytes_per_query = 4 * tokens * self.heads * (2 * batch + 4)
        return max(1, self.working_bytes // bytes_per_query)


def cells_of(map_BChw: Tensor) -> tuple[int, int]:
    """(rows, columns)"""
    rows, columns = map_BChw.shape[-2:]
    return rows, columns


def coordinates(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """(row, column) of each cell, [h * w, 2], from 0 to 1 with both ends included, whatever the grid."""
    axes = [torch.linspace(0, 1, cells, device=device) for cells in grid]
    return torch.cartesian_prod(*axes)


def squared_distances(places_N2: Tensor, token_places_S2: Tensor) -> Tensor:
    """[N, S]"""
    return (places_N2[:, None] - token_places_S2).square().sum(dim=-1)
