"""The original CenterNet's targets, loss and boxes (arXiv 1904.07850), held against the official code's golden files.

No task uses them: DeAP's are its own (operators/readouts/centernet.py). They work in cells of a map four times smaller than the
image, on boxes, with an offset within the cell: Gaussians take the maximum, and peaks are boxes.

Shapes: B images, K classes, N objects, H W cells; sizes and offsets are width then height, x then y.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from operators.objectives.dense import LossSum


class Boxes(NamedTuple):
    """Found in one image, best first."""

    boxes_N4: Tensor
    scores_N: Tensor
    classes_N: Tensor


SIZE_WEIGHT = 0.1
"""Of sizes in the loss; heat and offsets count 1."""


@dataclass(frozen=True, kw_only=True)
class PointTargets:
    """Of one image; sizes and offsets in cells, at each object's cell."""

    heat_KHW: Tensor
    "float32, 1 at centres"
    cells_N: Tensor
    "int64, row * W + column"
    sizes_N2: Tensor
    offsets_N2: Tensor
    "from the cell's index to the centre, 0 to 1"


def gaussian_radius(height: float, width: float, overlap: float = 0.7) -> float:
    """How far, in cells, the published code lets corners move while a box keeps IoU `overlap` with the object's.

    The smallest of three quadratics' roots, for a corner each inside and outside, both inside, or both outside. The code
    divides all of them by 2 instead of twice the leading coefficient; so does this.
    """
    total, area = height + width, height * width
    equations = (
        (1, total, area * (1 - overlap) / (1 + overlap)),
        (4, 2 * total, area * (1 - overlap)),
        (4 * overlap, -2 * overlap * total, area * (overlap - 1)),
    )
    return min((b + math.sqrt(b * b - 4 * a * c)) / 2 for a, b, c in equations)


def points_targets(boxes_N4: Tensor, classes_N: Tensor, grid: tuple[int, int], classes: int = 1) -> PointTargets:
    """Targets of boxes x1, y1, x2, y2 in cells, cut off at the last cell's index; those without extent are left out.

    `classes_N` are 0 to `classes` - 1. Gaussians have sigma (2 r + 1) / 6 and end at r cells along either axis, r being
    `gaussian_radius` of the sides rounded up, rounded down; where they meet, the larger counts. Raises `ValueError` for
    other shapes or classes.
    """
    if boxes_N4.shape != (len(classes_N), 4):
        raise ValueError(
            f"boxes must be [N, 4] and classes [N], got {tuple(boxes_N4.shape)} and {tuple(classes_N.shape)}"
        )
    if len(classes_N) and not 0 <= int(classes_N.min()) <= int(classes_N.max()) < classes:
        raise ValueError(f"classes must be 0 to {classes - 1}, got {sorted(set(classes_N.tolist()))}")
    boxes = boxes_N4.double().clamp(min=0).minimum(boxes_N4.new_tensor([grid[1] - 1, grid[0] - 1] * 2).double())
    sizes_N2 = boxes[:, 2:] - boxes[:, :2]
    present = (sizes_N2 > 0).all(dim=1)
    centres_N2, sizes_N2 = (boxes[:, :2] + boxes[:, 2:])[present] / 2, sizes_N2[present]
    cells_N2 = centres_N2.long()
    heat_KHW = torch.zeros(classes, *grid, device=boxes.device)
    for k, cell, (width, height) in zip(classes_N[present].tolist(), cells_N2.tolist(), sizes_N2.tolist(), strict=True):
        radius = int(gaussian_radius(math.ceil(height), math.ceil(width)))
        _draw(heat_KHW[k], cell, radius)
    return PointTargets(
        heat_KHW=heat_KHW,
        cells_N=cells_N2[:, 1] * grid[1] + cells_N2[:, 0],
        sizes_N2=sizes_N2.float(),
        offsets_N2=(centres_N2 - cells_N2).float(),
    )


def _draw(heat_HW: Tensor, cell: Sequence[int], radius: int) -> None:
    sigma = (2 * radius + 1) / 6
    window, falls = [], []
    for centre, side in zip(cell[::-1], heat_HW.shape, strict=True):
        reach = range(max(0, centre - radius), min(side, centre + radius + 1))
        window.append(slice(reach.start, reach.stop))
        positions = torch.arange(reach.start, reach.stop, device=heat_HW.device)
        falls.append((-(positions - centre).square() / (2 * sigma**2)).exp())
    part = heat_HW[tuple(window)]
    torch.maximum(part, falls[0][:, None] * falls[1], out=part)


class PointsLoss(NamedTuple):
    """The original's three terms, each to be summed over micro-batches by itself."""

    heat: LossSum
    sizes: LossSum
    offsets: LossSum

    @property
    def mean(self) -> Tensor:
        """The batch's published loss."""
        return self.heat.mean + SIZE_WEIGHT * self.sizes.mean + self.offsets.mean


def points_loss(
    heat_logits_BKHW: Tensor, sizes_B2HW: Tensor, offsets_B2HW: Tensor, targets: Sequence[PointTargets]
) -> PointsLoss:
    """Penalty-reduced focal loss of the heat; L1 of sizes and offsets at the objects' cells, in cells."""
    heat_BKHW = torch.stack([each.heat_KHW for each in targets])
    cells = [each.cells_N for each in targets]
    return PointsLoss(
        heat=penalty_reduced_focal(heat_logits_BKHW, heat_BKHW),
        sizes=l1_at_cells(sizes_B2HW, cells, [each.sizes_N2 for each in targets]),
        offsets=l1_at_cells(offsets_B2HW, cells, [each.offsets_N2 for each in targets]),
    )


def penalty_reduced_focal(logits: Tensor, heat: Tensor) -> LossSum:
    """The original's focal loss (alpha 2, beta 4) of any shape, and the number of places where the heat is 1.

    Places near a centre count as background less the hotter they are. Where there is no centre, the loss is the sum.
    """
    probability = logits.float().sigmoid().clamp(1e-4, 1 - 1e-4)
    centres = heat == 1
    at_centres = (1 - probability).square() * probability.log()
    elsewhere = (1 - heat) ** 4 * probability.square() * (1 - probability).log()
    return LossSum(-torch.where(centres, at_centres, elsewhere).sum(), float(centres.sum()))


def l1_at_cells(predicted_B2HW: Tensor, cells: Sequence[Tensor], targets: Sequence[Tensor]) -> LossSum:
    """Absolute differences at each image's `cells` [N] from its `targets` [N, 2], and how many numbers that are.

    The published code adds 1e-4 to their number.
    """
    found = torch.cat([image.flatten(1)[:, at].t() for image, at in zip(predicted_B2HW.float(), cells, strict=True)])
    target = torch.cat(list(targets))
    return LossSum((found - target).abs().sum(), target.numel() + 1e-4)


def points_boxes(
    heat_logits_BKHW: Tensor, sizes_B2HW: Tensor, offsets_B2HW: Tensor | None = None, *, best: int = 100
) -> list[Boxes]:
    """Boxes in cells of each image: the `best` peaks of all classes, however low; neither NMS nor limits.

    Without offsets, centres are those of cells.
    """
    heat_BKHW = heat_logits_BKHW.float().sigmoid()
    offsets_B2HW = torch.full_like(sizes_B2HW, 0.5) if offsets_B2HW is None else offsets_B2HW
    height, width = heat_BKHW.shape[2:]
    peaks_BP = (heat_BKHW * (F.max_pool2d(heat_BKHW, 3, stride=1, padding=1) == heat_BKHW)).flatten(1)
    scores_BN, places_BN = peaks_BP.topk(min(best, peaks_BP.shape[1]))
    cells_BN = places_BN % (height * width)
    index = cells_BN[:, None].expand(-1, 2, -1)
    half_B2N, offset_B2N = (each.float().flatten(2).gather(2, index) for each in (sizes_B2HW / 2, offsets_B2HW))
    centres_B2N = torch.stack([cells_BN % width, cells_BN // width], dim=1) + offset_B2N
    boxes_BN4 = torch.cat([centres_B2N - half_B2N, centres_B2N + half_B2N], dim=1).transpose(1, 2)
    return [Boxes(*each) for each in zip(boxes_BN4, scores_BN, places_BN // (height * width), strict=True)]
