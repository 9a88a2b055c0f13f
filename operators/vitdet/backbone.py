"""ViTDet's backbone (section 3): a plain ViT whose blocks attend in windows, but for some that attend to the whole map, all with
relative positions that are decomposed by axis (MViTv2, arXiv 2112.01526, eq. 4).

There is no CLS token and no final norm: the map is the residual stream after the last block.

Shapes: B images, h w cells of the map, N heads, D channels of one, C = N D channels.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators.vitdet.settings import PATCH, DetectorSettings

EPS = 1e-6
"""Of the LayerNorms."""

BIAS_BYTES = 2**27
"""Of the relative positions of all heads that are held at once, about; all of a 1024-px image would be 805 MB with ViT-B."""


def facts_of(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """What shapes tell of a backbone, by names of settings, and `sides`: cells a side of each block's tables of relative
    positions. None where these aren't a ViTDet's tensors."""
    tables = {
        int(found[1]): value for name, value in state.items() if (found := re.fullmatch(r"blocks\.(\d+)\.attn\.rel_pos_h", name))
    }
    positions = state.get("pos_embed")
    if positions is None or positions.ndim != 3 or any(each.ndim != 2 for each in tables.values()):
        return None
    if not tables or sorted(tables) != list(range(len(tables))):
        return None
    return {
        "dim": positions.shape[-1],
        "depth": len(tables),
        "heads": positions.shape[-1] // tables[0].shape[1],
        "sides": tuple((len(tables[i]) + 1) // 2 for i in range(len(tables))),
        "pretrain_size": PATCH * round((positions.shape[1] - 1) ** 0.5),
    }


def attending(sides: Sequence[int]) -> dict[str, Any]:
    """Which blocks attend in windows and which to the whole map, by `sides` of `facts_of`, as settings: those with the largest
    tables are the global ones; where all have the same, all are taken for windows."""
    window, table = min(sides), max(sides)
    outer = tuple(i for i, side in enumerate(sides) if side == table != window)
    return {"window": window, "global_blocks": outer, "image_size": table * PATCH}


class ViT(nn.Module):
    """Normalised images [B, 3, H, W], whose sides are multiples of 16, to maps [B, C, H / 16, W / 16]."""

    def __init__(self, settings: DetectorSettings):
        super().__init__()
        s = settings
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, s.dim, PATCH, stride=PATCH)})
        # The place of the CLS token comes first, as pre-training had it.
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (s.pretrain_size // PATCH) ** 2, s.dim))
        self.blocks = nn.ModuleList(
            Block(
                s.dim,
                s.heads,
                window=None if i in s.global_blocks else s.window,
                table_side=s.image_size // PATCH if i in s.global_blocks else s.window,
            )
            for i in range(s.depth)
        )
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(_initialise)

    def forward(self, images_BCHW: Tensor, kept_L2B: Tensor | None = None) -> Tensor:
        """`kept`: by what each block's two branches are multiplied, for each image (`kept_paths`); None: as they are."""
        maps = self.embedded(images_BCHW)
        for number, block in enumerate(self.blocks):
            maps = block(maps, None if kept_L2B is None else kept_L2B[number])
        return maps.permute(0, 3, 1, 2)

    def embedded(self, images_BCHW: Tensor) -> Tensor:
        """What the first block is given, [B, h, w, C]."""
        maps = self.patch_embed["proj"](images_BCHW).permute(0, 2, 3, 1)
        return cast(Tensor, maps + self.positions((maps.shape[1], maps.shape[2])))

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The table of absolute positions for a map of `grid` cells, bicubic, [1, *grid, C]."""
        table = self.pos_embed[:, 1:]
        side = round(table.shape[1] ** 0.5)
        table = table.unflatten(1, (side, side))
        if grid == (side, side):
            return table
        return F.interpolate(table.permute(0, 3, 1, 2), size=grid, mode="bicubic", align_corners=False).permute(0, 2, 3, 1)


class Block(nn.Module):
    """A block of the ViT on maps [B, h, w, C], in windows of so many cells a side, or on the whole map."""

    def __init__(self, dim: int, heads: int, *, window: int | None, table_side: int):
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, heads, table_side)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim)

    def forward(self, maps_BhwC: Tensor, kept_2B: Tensor | None = None) -> Tensor:
        normed = self.norm1(maps_BhwC)
        attended = self.attn(normed) if self.window is None else self._in_windows(normed, self.window)
        if kept_2B is None:
            maps = maps_BhwC + attended
            return maps + self.mlp(self.norm2(maps))
        first, second = kept_2B[:, :, None, None, None].to(maps_BhwC.dtype)
        maps = maps_BhwC + first * attended
        return maps + second * self.mlp(self.norm2(maps))

    def _in_windows(self, maps_BhwC: Tensor, side: int) -> Tensor:
        """Attention in windows. Those at the right and at the bottom are filled up with zeros, which are attended to as well."""
        b, h, w, c = maps_BhwC.shape
        rows, columns = -(-h // side), -(-w // side)
        padded = F.pad(maps_BhwC, (0, 0, 0, columns * side - w, 0, rows * side - h))
        windows = padded.view(b, rows, side, columns, side, c).transpose(2, 3).reshape(-1, side, side, c)
        joined = self.attn(windows).view(b, rows, columns, side, side, c).transpose(2, 3)
        return cast(Tensor, joined.reshape(b, rows * side, columns * side, c)[:, :h, :w])


class Mlp(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(F.gelu(self.fc1(tokens))))


class Attention(nn.Module):
    """Attention among all cells of maps [B, h, w, C]; a query's logits have its products with the relative positions added.

    `table_side`: cells a side that the tables of relative positions are made for.
    """

    def __init__(self, dim: int, heads: int, table_side: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * table_side - 1, dim // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * table_side - 1, dim // heads))

    def forward(self, maps_BhwC: Tensor) -> Tensor:
        b, h, w, c = maps_BhwC.shape
        q, k, v = self.qkv(maps_BhwC).view(b, h, w, 3, self.heads, -1).permute(3, 0, 4, 1, 2, 5)  # each [B, N, h, w, D]
        tables = relative_positions(self.rel_pos_h, h), relative_positions(self.rel_pos_w, w)
        keys, values = k.flatten(2, 3), v.flatten(2, 3)
        step = max(1, BIAS_BYTES // (4 * b * self.heads * w * h * w))
        parts = [
            F.scaled_dot_product_attention(
                q[:, :, top : top + step].flatten(2, 3),
                keys,
                values,
                attn_mask=_bias(q[:, :, top : top + step], tables[0][top : top + step], tables[1]),
            )
            for top in range(0, h, step)
        ]
        attended = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        return cast(Tensor, self.proj(attended.transpose(1, 2).reshape(b, h, w, c)))


def kept_paths(settings: DetectorSettings, generators: Sequence[np.random.Generator]) -> Tensor:
    """Stochastic depth, drawn for each image from a generator of its own: float32 [blocks, 2, B], 0 where a branch is left out
    (with a probability that rises linearly to `drop_path` at the last block), else what keeps its mean."""
    rates = settings.drop_path * np.arange(settings.depth) / max(1, settings.depth - 1)
    draws = np.stack([rng.random((settings.depth, 2)) for rng in generators], axis=-1)
    kept = 1 - rates[:, None, None]
    return torch.from_numpy(((draws < kept) / np.maximum(kept, 1e-9)).astype(np.float32))


def _bias(q_BNrwD: Tensor, by_row_rhD: Tensor, by_column_wwD: Tensor) -> Tensor:
    """What relative positions add to the logits of some rows of queries, [B, N, r w, h w]."""
    rows = torch.einsum("bnrwd,rkd->bnrwk", q_BNrwD, by_row_rhD.to(q_BNrwD.dtype))
    columns = torch.einsum("bnrwd,wkd->bnrwk", q_BNrwD, by_column_wwD.to(q_BNrwD.dtype))
    return (rows[..., :, None] + columns[..., None, :]).flatten(4, 5).flatten(2, 3)


def relative_positions(table_TD: Tensor, side: int) -> Tensor:
    """The vector of each query's place to each key's along an axis of `side` cells, [queries, keys, D].

    Tables of other axes are resized linearly to the 2 side - 1 distances that there are.
    """
    distances = 2 * side - 1
    if len(table_TD) != distances:
        table_TD = F.interpolate(table_TD.t()[None], size=distances, mode="linear", align_corners=False)[0].t()
    places = torch.arange(side, device=table_TD.device)
    return table_TD[places[:, None] - places + side - 1]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
