"""Objects as points: DeAP's class-agnostic targets, loss and boxes, and the original CenterNet's (arXiv 1904.07850).

DeAP's (`centernet_*`, after its release) work at the resolution of the output, on masks, without offsets: sizes are fractions
of the image's sides, Gaussians add up, and boxes go through NMS. The original's (`points_*`) work in cells of a map four
times smaller than the image, on boxes, with an offset within the cell: Gaussians take the maximum, and peaks are boxes.

Loss terms are `LossSum`s, so that the loss of a batch comes from sums over micro-batches; sizes and offsets are width then
height, x then y.

Shapes: B images, K classes, N objects, H W pixels (`centernet_*`) or cells (`points_*`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms, sigmoid_focal_loss

from operators.objectives.dense import LossSum

SIGMA = 0.12
"""Of DeAP's Gaussians, for an object that fills an image of 224 px."""

NEAR = 0.01
"""A size is written on pixels closer than this to the centre, as a fraction of the image."""

SIZE_WEIGHT = 0.1
"""Of sizes in the original's loss; heat and offsets count 1."""


class Boxes(NamedTuple):
    """Found in one image, best first."""

    boxes_N4: Tensor
    "float32 x1, y1, x2, y2"
    scores_N: Tensor
    "float32, 0 to 1"
    classes_N: Tensor
    "int64"


# --- DeAP's -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CenterNetTargets:
    """Of one image; stacked, of several (`heat_BHW`, `sizes_B2HW`)."""

    heat_HW: Tensor
    "float32, 0 to 1"
    sizes_2HW: Tensor
    "float32 width and height as fractions of the image's sides; 0 where there is no centre"


def centernet_targets(ids_HW: Tensor) -> CenterNetTargets:
    """Centres and sizes of the objects 1, 2, ... of `ids_HW` (0 background; `targets.instance_ids`), from visible pixels.

    An object's centre is its centroid. Its Gaussian's sigma is 0.12 sqrt(its share of the image) 224 / W; sums are clipped
    to 1. Its size is the distance between its outermost pixels' centres, so that one pixel has none. Later objects
    overwrite earlier ones' sizes. Ids without a pixel are left out. Raises `ValueError` unless ids are whole numbers [H, W].
    """
    if ids_HW.ndim != 2 or ids_HW.is_floating_point() or not ids_HW.numel():
        raise ValueError(f"ids must be whole numbers [H, W], got {ids_HW.dtype} {tuple(ids_HW.shape)}")
    height, width = ids_HW.shape
    # Both axes are rounded to multiples of 1 / H, as the golden files have it; DeAP's images are square.
    rows, columns = (_on_grid(torch.linspace(0, 1, side, device=ids_HW.device), height) for side in ids_HW.shape)
    centres_N2, sizes_N2, shares_N = _objects(ids_HW.long())
    centres_N2 = _on_grid(centres_N2, height)
    sigmas_N = SIGMA * shares_N.sqrt() * 224 / width
    heat_HW = torch.zeros(height, width, device=ids_HW.device)
    sizes_2HW = heat_HW.new_zeros(2, height, width)
    for (y, x), size, sigma in zip(centres_N2, sizes_N2, sigmas_N, strict=True):
        dy2, dx2 = (rows - y).square(), (columns - x).square()
        _add_gaussian(heat_HW, dy2, dx2, sigma)
        _write_size(sizes_2HW, dy2, dx2, size)
    return CenterNetTargets(heat_HW=heat_HW.clamp_(max=1), sizes_2HW=sizes_2HW)


def _add_gaussian(heat_HW: Tensor, dy2_H: Tensor, dx2_W: Tensor, sigma: Tensor) -> None:
    falls = [(-each / (2 * sigma**2)).exp() for each in (dy2_H, dx2_W)]
    # What is left out is lost in rounding, but its products would be denormal numbers, which are slow.
    y, x = (_span(fall > 1e-15) for fall in falls)
    # An outer product, which unlike a matrix product is never taken in TF32.
    heat_HW[y, x] += falls[0][y, None] * falls[1][x]


def _write_size(sizes_2HW: Tensor, dy2_H: Tensor, dx2_W: Tensor, size: Tensor) -> None:
    y, x = (_span(each.sqrt() < NEAR) for each in (dy2_H, dx2_W))
    near = (dy2_H[y, None] + dx2_W[x]).sqrt() < NEAR
    sizes_2HW[:, y, x] = torch.where(near, size[:, None, None], sizes_2HW[:, y, x])


def _span(chosen_N: Tensor) -> slice:
    """From the first to the last."""
    places = chosen_N.nonzero().flatten().tolist()
    return slice(places[0], places[-1] + 1) if places else slice(0)


def _on_grid(positions: Tensor, cells: int) -> Tensor:
    return (positions * cells).round() / cells


def _objects(ids_HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of visible objects, float32: centres [N, 2] (y, x; 0 to 1 between the outermost pixels' centres), sizes [N, 2] (width,
    height) and shares of the image's area [N]."""
    objects, centres, sizes = int(ids_HW.max()), [], []
    for axis, side in enumerate(ids_HW.shape):
        positions = torch.arange(side, device=ids_HW.device)
        # How many pixels each object has in each row, or column.
        places = ids_HW * side + positions.unsqueeze(1 - axis)
        counts_NS = places.flatten().bincount(minlength=(objects + 1) * side).view(-1, side)[1:]
        visible = counts_NS.sum(dim=1) > 0
        counts_NS = counts_NS[visible]
        pixels_N = counts_NS.sum(dim=1)
        centres.append((counts_NS * positions).sum(dim=1).double() / pixels_N / max(1, side - 1))
        held = (counts_NS > 0).int()
        sizes.append((side - 1 - held.flip(1).argmax(dim=1) - held.argmax(dim=1)).double() / side)
    shares = pixels_N.double() / ids_HW.numel()
    return torch.stack(centres, 1).float(), torch.stack(sizes[::-1], 1).float(), shares.float()


class CenterNetLoss(NamedTuple):
    """DeAP's two terms, each to be summed over micro-batches by itself."""

    heat: LossSum
    sizes: LossSum

    @property
    def mean(self) -> Tensor:
        """The batch's published loss: both terms' means, added."""
        return self.heat.mean + self.sizes.mean


def centernet_loss(
    heat_logits_B1HW: Tensor, sizes_B2HW: Tensor, heat_BHW: Tensor, target_sizes_B2HW: Tensor
) -> CenterNetLoss:
    """Sigmoid focal loss (alpha 0.25, gamma 2) against soft targets over all pixels, and L1 of sizes where targets are above 0.

    Targets are stacked `CenterNetTargets`. Raises `ValueError` where shapes differ.
    """
    _require_same(heat_logits_B1HW[:, 0], heat_BHW, "heat")
    _require_same(sizes_B2HW, target_sizes_B2HW, "sizes")
    heat = sigmoid_focal_loss(heat_logits_B1HW[:, 0].float(), heat_BHW, alpha=0.25, gamma=2, reduction="sum")
    counted = target_sizes_B2HW > 0
    errors = (sizes_B2HW.float() - target_sizes_B2HW).abs() * counted
    return CenterNetLoss(heat=LossSum(heat, float(heat_BHW.numel())), sizes=LossSum(errors.sum(), float(counted.sum())))


def centernet_boxes(
    heat_logits_B1HW: Tensor, sizes_B2HW: Tensor, *, best: int = 100, threshold: float = 0.01, overlap: float = 0.5
) -> list[Boxes]:
    """Boxes in pixels of each image, of class 0: peaks of the heat above `threshold`, the `best` left by NMS.

    A box lies round its pixel's index, without half a pixel added, and is cut off at the image's sides. Negative sizes count
    as 0. Raises `ValueError` where shapes differ.
    """
    _require_same(heat_logits_B1HW.expand(-1, 2, -1, -1), sizes_B2HW, "sizes")
    heat_B1HW = heat_logits_B1HW.float().sigmoid()
    chosen_B1HW = _peaks(heat_B1HW) & (heat_B1HW > threshold)
    found = []
    for heat_HW, chosen_HW, sizes_2HW in zip(heat_B1HW[:, 0], chosen_B1HW[:, 0], sizes_B2HW.float(), strict=True):
        y, x = chosen_HW.nonzero(as_tuple=True)
        boxes_N4 = _boxes_in_pixels(x, y, sizes_2HW)
        kept = _best_apart(boxes_N4, heat_HW[y, x], best, overlap)
        found.append(Boxes(boxes_N4[kept], heat_HW[y, x][kept], torch.zeros_like(kept)))
    return found


def _boxes_in_pixels(x: Tensor, y: Tensor, sizes_2HW: Tensor) -> Tensor:
    sides = sizes_2HW.new_tensor([sizes_2HW.shape[2], sizes_2HW.shape[1]])
    half_N2 = sizes_2HW[:, y, x].t().clamp(min=0) * sides / 2
    centres_N2 = torch.stack([x, y], dim=1)
    corners = [(centres_N2 - half_N2), (centres_N2 + half_N2)]
    return torch.cat([corner.clamp(min=0).minimum(sides) for corner in corners], dim=1)


def _best_apart(boxes_N4: Tensor, scores_N: Tensor, best: int, overlap: float) -> Tensor:
    """Indices of the `best` boxes that NMS keeps, best first.

    NMS goes from the best downwards, so the first of all that are kept are those kept of the first. A flat map, where each
    pixel is a peak, would otherwise compare all pairs of 200,000.
    """
    order = scores_N.argsort(descending=True, stable=True)
    taken = 10 * best
    while True:
        first = order[:taken]
        kept = first[nms(boxes_N4[first], scores_N[first], overlap)]
        if len(kept) >= best or taken >= len(order):
            return kept[:best]
        taken *= 4


# --- the original's ---------------------------------------------------------------------------------------------------


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
    """Penalty-reduced focal loss of the heat; L1 of sizes and offsets at the objects' cells, in cells.

    Raises `ValueError` where shapes differ.
    """
    heat_BKHW = torch.stack([each.heat_KHW for each in targets])
    _require_same(heat_logits_BKHW, heat_BKHW, "heat")
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

    Without offsets, centres are those of cells. Raises `ValueError` where shapes differ.
    """
    heat_BKHW = heat_logits_BKHW.float().sigmoid()
    _require_same(heat_BKHW[:, :1].expand(-1, 2, -1, -1), sizes_B2HW, "sizes")
    offsets_B2HW = torch.full_like(sizes_B2HW, 0.5) if offsets_B2HW is None else offsets_B2HW
    _require_same(offsets_B2HW, sizes_B2HW, "offsets")
    height, width = heat_BKHW.shape[2:]
    peaks_BP = (heat_BKHW * _peaks(heat_BKHW)).flatten(1)
    scores_BN, places_BN = peaks_BP.topk(min(best, peaks_BP.shape[1]))
    cells_BN = places_BN % (height * width)
    index = cells_BN[:, None].expand(-1, 2, -1)
    half_B2N, offset_B2N = (each.float().flatten(2).gather(2, index) for each in (sizes_B2HW / 2, offsets_B2HW))
    centres_B2N = torch.stack([cells_BN % width, cells_BN // width], dim=1) + offset_B2N
    boxes_BN4 = torch.cat([centres_B2N - half_B2N, centres_B2N + half_B2N], dim=1).transpose(1, 2)
    return [Boxes(*each) for each in zip(boxes_BN4, scores_BN, places_BN // (height * width), strict=True)]


def _peaks(heat_BKHW: Tensor) -> Tensor:
    return F.max_pool2d(heat_BKHW, 3, stride=1, padding=1) == heat_BKHW


def _require_same(predicted: Tensor, target: Tensor, what: str) -> None:
    if predicted.shape != target.shape:
        raise ValueError(
            f"{what}: {tuple(predicted.shape)} doesn't go with {tuple(target.shape)}; bring maps to one size first"
        )
