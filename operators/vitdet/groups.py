"""ViTDet's optimiser: earlier blocks of the backbone learn slower, norms and positions of it don't decay."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that are treated alike."""

    lr_scale: float
    weight_decay: float


def parameter_groups(
    net: nn.Module,
    trained: Mapping[str, nn.Parameter],
    *,
    weight_decay: float,
    layer_decay: float = 1.0,
    decays_norms: bool = False,
) -> dict[Group, dict[str, nn.Parameter]]:
    """The `trained` parameters of a `Detector` or another module with its names, in groups.

    The learning rate is multiplied by `layer_decay`^(depth + 1) for the embeddings of patches and positions, and by
    `layer_decay`^(depth - i) for block i. Positions don't decay, nor do the backbone's LayerNorms unless `decays_norms`; the
    norms of pyramid and heads are others, and do, as all biases and relative positions do.
    """
    norms = {
        id(parameter)
        for layer in net.modules()
        if isinstance(layer, nn.LayerNorm)
        for parameter in layer.parameters(recurse=False)
    }
    depth = 1 + max((_block(name) or 0 for name, _ in net.named_parameters()), default=0)
    found: dict[Group, dict[str, nn.Parameter]] = {}
    for name, parameter in trained.items():
        kept = name.endswith("pos_embed") or (id(parameter) in norms and not decays_norms)
        scale = layer_decay ** (depth + 1 - _layer(name, depth))
        group = Group(lr_scale=scale, weight_decay=0.0 if kept else weight_decay)
        found.setdefault(group, {})[name] = parameter
    return found


def _block(name: str) -> int | None:
    """The number of the backbone's block that a parameter is of."""
    match = re.match(r"backbone\.net\.blocks\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def _layer(name: str, depth: int) -> int:
    """0 of the embeddings, i + 1 of block i, `depth` + 1 of what follows."""
    if name.startswith(("backbone.net.pos_embed", "backbone.net.patch_embed.")):
        return 0
    block = _block(name)
    return depth + 1 if block is None else block + 1
