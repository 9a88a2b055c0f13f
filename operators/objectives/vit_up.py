"""What ViT-Up is trained to do: where student and teacher are compared, and by which losses.

The teacher's token maps at several resolutions supervise the student's predictions on the finest of their grids, block by
block, so that a training step needs memory for one chunk of blocks only. Teacher and student are one frozen backbone, the
student with LoRA and ViT-Up's head. Numbers that the paper leaves open are those of the released code.

Shapes: B batch, g cells of a grid's side, n blocks, s tokens of one scale in a chunk, N queries in a chunk, D channels.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from operators.transfer import to_device

EPS = 1e-5
"""Floor of norms, and what is added to the teacher's variance."""

TEMPERATURE = 0.5
"""Of the relational loss: cosines are divided by it."""


# --- where ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """The teacher's grids over the query box, and how their cells are shared out.

    A block is what one cell of the coarsest grid covers; blocks are counted row by row. Queries and tokens of a chunk come
    block after block, row by row inside a block, so that predictions and targets of a scale match one to one.
    """

    grids: tuple[int, ...] = (14, 28, 56)
    "cells a side of the teacher's maps, coarse to fine; the student is asked on the last"
    chunk_blocks: int = 49
    "blocks that one forward and backward takes; the last chunk may have fewer"

    def __post_init__(self) -> None:
        if not self.grids or min(self.grids) < 1:
            raise ValueError(f"grids must be whole numbers of at least 1, got {self.grids}")
        ratios = [(fine, coarse) for coarse, fine in itertools.pairwise(self.grids)]
        if any(fine <= coarse or fine % coarse or (fine // coarse).bit_count() != 1 for fine, coarse in ratios):
            raise ValueError(f"each of the grids must be the one before times 2, 4, 8, ...; got {self.grids}")
        if self.chunk_blocks < 1:
            raise ValueError(f"chunk_blocks must be at least 1, got {self.chunk_blocks}")

    @property
    def block(self) -> int:
        """Queries along a block's side."""
        return self.grids[-1] // self.grids[0]

    @property
    def chunks(self) -> tuple[slice, ...]:
        """The blocks of each chunk. A step's loss is the mean over chunks: a shorter one counts as much as the others."""
        blocks, step = self.grids[0] ** 2, self.chunk_blocks
        return tuple(slice(first, min(first + step, blocks)) for first in range(0, blocks, step))

    def queries(self, boxes_B4: Tensor, chunk: slice) -> Tensor:
        """Centres of the finest grid's cells inside each box, as (x, y) [B, N, 2], of the blocks of `chunk`.

        Boxes are (x0, y0, width, height) in parts of the canvas, as the queries are: 0 is its left or top edge, 1 the other.
        """
        n = self.grids[-1]
        centres = (torch.arange(n, dtype=boxes_B4.dtype, device=boxes_B4.device) + 0.5) / n
        xy = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), dim=-1)
        inside_N2 = to_blocks(xy[None], self.block)[0, chunk].flatten(0, 2)
        return boxes_B4[:, None, :2] + inside_N2 * boxes_B4[:, None, 2:]

    def predictions(self, student_BND: Tensor) -> list[Tensor]:
        """The student's answers to a chunk's queries as [B, s, D] of each scale, coarse to fine: means over its cells."""
        side = self.block
        queries_BnyxD = student_BND.unflatten(1, (-1, side, side))
        return [_pool(queries_BnyxD, self.grids[-1] // grid).flatten(1, 3) for grid in self.grids]

    def targets(self, teacher: Sequence[Tensor], chunk: slice) -> list[Tensor]:
        """A chunk's tokens [B, s, D] of the teacher's maps [B, g, g, D], one map for each grid, coarse to fine.

        Raises `ValueError` where the maps aren't those of the grids.
        """
        found = tuple(tuple(map_BggD.shape[1:3]) for map_BggD in teacher)
        if found != tuple((grid, grid) for grid in self.grids):
            raise ValueError(f"the teacher's maps have the grids {found}, but supervision is set up for {self.grids}")
        return [
            to_blocks(map_BggD, grid // self.grids[0])[:, chunk].flatten(1, 3)
            for map_BggD, grid in zip(teacher, self.grids, strict=True)
        ]


def to_blocks(map_BggD: Tensor, side: int) -> Tensor:
    """Cut a map [B, g, g, D] into blocks of `side` x `side` cells: [B, (g / side)^2, side, side, D], row by row."""
    split = map_BggD.unflatten(1, (-1, side)).unflatten(3, (-1, side))
    return split.transpose(2, 3).flatten(1, 2)


def _pool(blocks_BnyxD: Tensor, factor: int) -> Tensor:
    """Means over `factor` x `factor` cells of each block."""
    if factor == 1:
        return blocks_BnyxD
    return blocks_BnyxD.unflatten(2, (-1, factor)).unflatten(4, (-1, factor)).mean(dim=(3, 5))


# --- losses -----------------------------------------------------------------------------------------------------------


def standardised_l2(predicted_BsD: Tensor, teacher_BsD: Tensor) -> Tensor:
    """Mean squared difference over all elements, in units of each teacher token's deviation over its channels.

    The teacher's mean cancels out. The deviation is that of the population, with `EPS` added to the variance. float32.
    """
    predicted, teacher = _as_pair(predicted_BsD, teacher_BsD)
    deviation = (teacher.var(dim=-1, keepdim=True, correction=0) + EPS).sqrt()
    return ((predicted - teacher) / deviation).square().mean()


def cosine(predicted_BsD: Tensor, teacher_BsD: Tensor) -> Tensor:
    """1 - cosine, averaged over tokens, each norm at least `EPS`; gradients are those of torch's cosine similarity. float32."""
    predicted, teacher = _as_pair(predicted_BsD, teacher_BsD)
    return 1 - F.cosine_similarity(predicted, teacher, dim=-1, eps=EPS).mean()


def relational_kl(predicted_BsD: Tensor, teacher_BsD: Tensor, tau: float = TEMPERATURE, *, itself: bool = False) -> Tensor:
    """How far the student's relations between a chunk's tokens are from the teacher's: a KL divergence, teacher first.

    A token's relations are the softmax of its cosines to all others, divided by `tau`; with `itself`, to all. The sum over
    tokens is divided by B * s * max(ln s, 1). float32, under autocast too (the official code then multiplies in bfloat16).
    """
    predicted, teacher = _as_pair(predicted_BsD, teacher_BsD)
    batch, tokens, _ = predicted.shape
    with torch.autocast(predicted.device.type, enabled=False):
        student_Bss, expected_Bss = (_log_relations(each, tau, itself=itself) for each in (predicted, teacher))
        divergence = F.kl_div(student_Bss, expected_Bss, reduction="sum", log_target=True)
    return divergence / batch / (tokens * max(math.log(tokens), 1))


def _log_relations(tokens_BsD: Tensor, tau: float, *, itself: bool) -> Tensor:
    """Log-softmax of each token's cosines to the others, and to `itself` or not."""
    unit = F.normalize(tokens_BsD, dim=-1, eps=EPS)
    similarity_Bss = unit @ unit.transpose(1, 2) / tau
    if not itself:
        diagonal = torch.eye(unit.shape[1], dtype=torch.bool, device=unit.device)
        similarity_Bss = similarity_Bss.masked_fill(diagonal, -1e4)
    return similarity_Bss.log_softmax(dim=-1)


def _as_pair(predicted: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if predicted.shape != teacher.shape or predicted.ndim != 3:
        raise ValueError(
            f"predicted {tuple(predicted.shape)} and teacher {tuple(teacher.shape)} must both be [batch, tokens, channels]"
        )
    return predicted.float(), teacher.float()


# --- their sum --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """What each loss counts. The defaults are the published run's; a loss of weight 0 isn't computed (ablations)."""

    l2: float = 1.0
    cosine: float = 1.0
    relational: float = 1.0
    layers: tuple[float, ...] | None = None
    "of each layer's predictions, or None for equal ones; only their ratios matter"
    scales: tuple[float, ...] | None = None
    "of each grid, coarse to fine, or None for equal ones; only their ratios matter"
    relational_layers: Literal["all", "last"] = "all"
    "which layers the relational loss looks at"
    tau: float = TEMPERATURE
    "temperature of the relational loss"
    itself: bool = False
    "whether the relational loss compares a token with itself, too"

    def __post_init__(self) -> None:
        losses = (self.l2, self.cosine, self.relational)
        for name, weights in (("losses", losses), ("layers", self.layers), ("scales", self.scales)):
            if weights is not None and (not weights or min(weights) < 0 or sum(weights) <= 0):
                raise ValueError(f"weights of {name} must be at least 0, and one of them above; got {weights}")
        if self.relational_layers not in ("all", "last"):
            raise ValueError(f"relational_layers must be 'all' or 'last', got {self.relational_layers!r}")
        if self.relational_layers == "last" and self.layers and self.layers[-1] == 0:
            raise ValueError(f"relational_layers='last' needs a last layer that counts, got weights {self.layers}")
        if self.tau <= 0:
            raise ValueError(f"tau must be above 0, got {self.tau}")


@dataclass(frozen=True, kw_only=True)
class ObjectiveValue:
    """A chunk's loss, and what it is made of. All are scalars in float32."""

    total: Tensor
    "to be differentiated"
    parts: Mapping[str, Tensor]
    "means over layers and scales before the losses' own weights, by name ('l2', 'cosine', 'relational'); detached"
    last: Mapping[str, Tensor]
    "the same of the last layer on the finest grid alone, as in the official logs; detached"


def objective(
    predictions: Sequence[Sequence[Tensor]], targets: Sequence[Sequence[Tensor]], weights: LossWeights
) -> ObjectiveValue:
    """The weighted sum of the losses, each a weighted mean over layers and scales.

    The paper's text has plain sums; the released code, whose weights are published, takes means.

    `predictions` and `targets` hold a [B, s, D] for each layer and, inside it, for each scale: `Supervision.predictions` and
    `.targets` of every layer. Raises `ValueError` where layers, scales or shapes don't match each other or the weights.
    """
    if [len(of_layer) for of_layer in predictions] != [len(targets[0])] * len(targets):
        raise ValueError(
            f"predictions of {len(predictions)} layers x {[len(of_layer) for of_layer in predictions]} scales don't match "
            f"targets of {len(targets)} layers x {len(targets[0])} scales"
        )
    layers = _weights(weights.layers, len(targets), "layers")
    scales = _weights(weights.scales, len(targets[0]), "scales")
    total = torch.zeros((), device=targets[0][0].device)
    parts, last = {}, {}
    for name, (weight, loss) in _losses(weights).items():
        first = len(layers) - 1 if name == "relational" and weights.relational_layers == "last" else 0
        # Means, not sums, so that a loss counts the same whatever the number of layers and grids.
        pairs = list(zip(predictions, targets, strict=True))[first:]
        values_LS = torch.stack([torch.stack([*map(loss, *of_layer)]) for of_layer in pairs])
        shares_LS = to_device(torch.outer(layers[first:], scales), values_LS.device)
        mean = (values_LS * shares_LS).sum() / shares_LS.sum()
        total = total + weight * mean
        parts[name], last[name] = mean.detach(), values_LS[-1, -1].detach()
    return ObjectiveValue(total=total, parts=parts, last=last)


def _losses(weights: LossWeights) -> dict[str, tuple[float, Callable[[Tensor, Tensor], Tensor]]]:
    losses: dict[str, tuple[float, Callable[[Tensor, Tensor], Tensor]]] = {
        "l2": (weights.l2, standardised_l2),
        "cosine": (weights.cosine, cosine),
        "relational": (weights.relational, partial(relational_kl, tau=weights.tau, itself=weights.itself)),
    }
    return {name: loss for name, loss in losses.items() if loss[0]}


def _weights(weights: tuple[float, ...] | None, count: int, what: str) -> Tensor:
    if weights is not None and len(weights) != count:
        raise ValueError(f"{len(weights)} weights of {what} for {count} {what}")
    return torch.ones(count) if weights is None else torch.tensor(weights)
