"""Objects as points: DeAP's class-agnostic targets, loss and boxes, after its release.

They work at the resolution of the output, on masks, without CenterNet's offsets (arXiv 1904.07850): sizes are fractions of the
image's sides, width then height, Gaussians add up, and boxes go through NMS. Loss terms are `LossSum`s, so that the loss of a
batch comes from sums over micro-batches.

Shapes: B images, N objects, H W pixels.
"""

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


class Boxes(NamedTuple):
    """Found in one image, best first."""

    boxes_N4: Tensor
    "float32 x1, y1, x2, y2"
    scores_N: Tensor
    "float32, 0 to 1"


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
        found.append(Boxes(boxes_N4[kept], heat_HW[y, x][kept]))
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


def _peaks(heat_B1HW: Tensor) -> Tensor:
    return F.max_pool2d(heat_B1HW, 3, stride=1, padding=1) == heat_B1HW


def _require_same(predicted: Tensor, target: Tensor, what: str) -> None:
    if predicted.shape != target.shape:
        raise ValueError(
            f"{what}: {tuple(predicted.shape)} doesn't go with {tuple(target.shape)}; bring maps to one size first"
        )
