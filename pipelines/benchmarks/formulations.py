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
    needless: bool
    "whether that need not be held: ours is to be twice as fast at least, else no slower"
    settings: JsonObject = field(default_factory=dict)


def bilateral(net: Any, images: Tensor, maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """FeatUp's joint bilateral filter: both neighbourhoods unfolded, and an einsum over taps."""
    radius, side = net.radius, 2 * net.radius + 1

    def neighbours(x: Tensor) -> Tensor:
        return F.unfold(F.pad(x, [radius] * 4, mode="reflect"), side).view(len(x), x.shape[1], side**2, *x.shape[2:])

    axis = torch.linspace(-1, 1, side, device=maps.device)
    gaussian = torch.exp(-(axis[:, None] ** 2 + axis**2) / (2 * net.sigma_spatial**2)).view(1, -1, 1, 1)
    for _ in range(int(math.log2(grid[0] // maps.shape[2]))):
        finer = (2 * maps.shape[2], 2 * maps.shape[3])
        guide = F.adaptive_avg_pool2d(images, finer)
        keys = net.range_proj(guide)
        products = torch.einsum("bdtyx,bdyx->btyx", neighbours(keys), keys)
        kernel = (products * net.range_temp.exp().clamp(1e-4, 1e4)).softmax(dim=1) * gaussian
        kernel = kernel / kernel.sum(dim=1, keepdim=True).clamp(min=1e-7)
        kernel = kernel + 0.1 * net.fixup_proj(torch.cat([kernel, guide], dim=1))
        enlarged = F.interpolate(maps, finer, mode="bicubic", align_corners=False)
        maps = torch.einsum("bctyx,btyx->bcyx", neighbours(enlarged), kernel)
    return maps


FORMULATIONS: Mapping[str, Formulation] = {
    "jbu": Formulation(method="jbu", plain=bilateral, holds="49 neighbours of each cell", needless=True)
}
"""By the name that reports have; several where a method has several ways."""
