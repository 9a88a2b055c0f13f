"""Boxes: anchors, their code, matching with ground truth, pooling, selection by class, and masks drawn where boxes are.

Boxes are x1, y1, x2, y2 in pixels, float32; widths are x2 - x1. torchvision has the code, the IoU, NMS and RoIAlign; the rest
differs from its detectors in roundings, offsets and thresholds (operators/DESIGN.md).

Shapes: N boxes, G ground truths, K classes, C channels, H W pixels, h w cells.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import batched_nms, roi_align

from operators.vitdet.settings import CANONICAL_LEVEL, LEVELS, RATIOS, STRIDES, DetectorSettings, Size

PROPOSAL_CODER = BoxCoder((1.0, 1.0, 1.0, 1.0))
"""Of a box by its anchor. A side grows to at most 1000 / 16 times the anchor's."""

STAGE_CODERS = tuple(BoxCoder((weight, weight, weight / 2, weight / 2)) for weight in (10.0, 20.0, 30.0))
"""Of a box by its proposal, by stage of Cascade R-CNN; Mask R-CNN has the first alone."""


# --- anchors --------------------------------------------------------------------------------------------------------------


def cell_anchors(sizes: Sequence[float], ratios: Sequence[float] = RATIOS) -> Tensor:
    """Boxes round (0, 0) of each area `size`^2 and each height over width, not rounded, [sizes x ratios, 4], in that order."""
    sides = [(math.sqrt(size**2 / ratio), math.sqrt(size**2 / ratio) * ratio) for size in sizes for ratio in ratios]
    return torch.tensor([(-w / 2, -h / 2, w / 2, h / 2) for w, h in sides], dtype=torch.float32)


def anchors(grid: tuple[int, int], stride: int, sizes: Sequence[float], device: torch.device | str = "cpu") -> Tensor:
    """A level's anchors [h x w x A, 4] in raster order: those of a cell lie round its upper left corner, not its middle."""
    y, x = (torch.arange(cells, device=device, dtype=torch.float32) * stride for cells in grid)
    y, x = torch.meshgrid(y, x, indexing="ij")
    corners = torch.stack([x, y, x, y], dim=-1).flatten(0, 1)
    return (corners[:, None] + cell_anchors(sizes).to(device)).flatten(0, 1)


def level_anchors(settings: DetectorSettings, levels: Sequence[Tensor]) -> list[Tensor]:
    """Of the pyramid's levels, p2 first; the settings' sizes are pixels of the frame that strides are counted in."""
    return [
        anchors((level.shape[-2], level.shape[-1]), stride, sizes, level.device)
        for level, stride, sizes in zip(levels, STRIDES, settings.anchor_sizes, strict=True)
    ]


# --- boxes in general -----------------------------------------------------------------------------------------------------


def decoded(coder: BoxCoder, deltas_ND: Tensor, boxes_N4: Tensor) -> Tensor:
    """The boxes that deltas say of boxes, [N, D]: one for each four deltas, D = 4, or 4 K where classes have their own.

    In float32, under any autocast.
    """
    return coder.decode_single(deltas_ND.float(), boxes_N4.float())


def clipped(boxes: Tensor, size: Size) -> Tensor:
    """Boxes [..., 4 n] cut off at an image's sides."""
    height, width = size
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack([x, y], dim=-1).flatten(-2)


def nonempty(boxes_N4: Tensor) -> Tensor:
    """Whether each box has any width and any height, [N]."""
    return (boxes_N4[:, 2] > boxes_N4[:, 0]) & (boxes_N4[:, 3] > boxes_N4[:, 1])


def scaled(boxes_N4: Tensor, size: Size, to: Size) -> Tensor:
    """Boxes of an image of `size` as they lie when it is brought to another."""
    x, y = to[1] / size[1], to[0] / size[0]
    return torch.stack([boxes_N4[:, 0] * x, boxes_N4[:, 1] * y, boxes_N4[:, 2] * x, boxes_N4[:, 3] * y], dim=1)


# --- matching -------------------------------------------------------------------------------------------------------------


class Matches(NamedTuple):
    """Of each box with ground truth."""

    indices_N: Tensor
    "int64, of the ground truth of the largest overlap; 0 where there is none"
    labels_N: Tensor
    "int8: 1 where the box is that object, 0 where it is background, -1 where training leaves it out"


def matched(iou_GN: Tensor, low: float, high: float, *, best_for_each: bool = False) -> Matches:
    """Boxes are objects from an overlap of `high` on, background below `low`, and left out between.

    `best_for_each`: also those that overlap most with any ground truth, all of them where several do equally; they keep the
    index of their own best one. Without ground truth all are background.
    """
    if not len(iou_GN):
        indices = torch.zeros(iou_GN.shape[1], dtype=torch.int64, device=iou_GN.device)
        return Matches(indices, indices.to(torch.int8))
    overlaps_N, indices_N = iou_GN.max(dim=0)
    labels_N = (overlaps_N >= high).to(torch.int8) - ((overlaps_N >= low) & (overlaps_N < high)).to(torch.int8)
    if best_for_each and iou_GN.shape[1]:
        best_N = (iou_GN == iou_GN.max(dim=1, keepdim=True).values).any(dim=0)
        labels_N = torch.where(best_N, torch.ones_like(labels_N), labels_N)
    return Matches(indices_N, labels_N)


# --- pooling --------------------------------------------------------------------------------------------------------------


def pooling_levels(boxes_N4: Tensor, canonical_size: float) -> Tensor:
    """Numbers, 2 to 5, of the levels that boxes are pooled from (FPN, arXiv 1612.03144, eq. 1), int64 [N]."""
    area = (boxes_N4[:, 2] - boxes_N4[:, 0]) * (boxes_N4[:, 3] - boxes_N4[:, 1])
    numbers = (CANONICAL_LEVEL + torch.log2(area.sqrt() / canonical_size + 1e-8)).floor()
    return numbers.clamp(LEVELS[0], LEVELS[-1]).to(torch.int64)


def pooled(levels: Sequence[Tensor], boxes: Sequence[Tensor], side: int, canonical_size: float) -> Tensor:
    """RoIAlign of each image's boxes, [boxes of all images, C, side, side], in their order.

    Of the pyramid's `levels`, p2 first, those from p6 on aren't read. Bins are sampled as densely as the box is large.
    """
    counts = [len(each) for each in boxes]
    images = torch.arange(len(boxes), device=levels[0].device).repeat_interleave(
        torch.tensor(counts).to(levels[0].device), output_size=sum(counts)
    )
    all_boxes = torch.cat([*boxes]).float()
    rois = torch.cat([images[:, None].float(), all_boxes], dim=1)
    numbers = pooling_levels(all_boxes, canonical_size)
    order = numbers.argsort(stable=True)
    # In float32 under any autocast: half precision has no pixels above 256.
    parts = [
        roi_align(level.float(), rois[numbers == number], side, 1 / stride, sampling_ratio=0, aligned=True)
        for number, level, stride in zip(LEVELS, levels, STRIDES, strict=False)
    ]
    return torch.cat(parts)[order.argsort()]


# --- selection ------------------------------------------------------------------------------------------------------------


class Selected(NamedTuple):
    """Detections of one image, best first."""

    boxes_N4: Tensor
    scores_N: Tensor
    classes_N: Tensor
    "int64, from 0"
    rois_N: Tensor
    "int64, which of the given rows that are finite each comes from"


def select(boxes_RD: Tensor, scores_RK1: Tensor, size: Size, settings: DetectorSettings) -> Selected:
    """The best detections of an image of `size` pixels by score, after NMS by class.

    Boxes [R, 4], or [R, 4 K] where classes have their own; scores [R, K + 1] have background last. Rows that hold NaN or infinity
    are left out.
    """
    boxes_RD, scores_RK1 = boxes_RD.float(), scores_RK1.float()
    finite = boxes_RD.isfinite().all(dim=1) & scores_RK1.isfinite().all(dim=1)
    boxes_RX4, scores_RK = clipped(boxes_RD[finite], size).unflatten(1, (-1, 4)), scores_RK1[finite, :-1]
    rows, classes = (scores_RK > settings.score_threshold).nonzero(as_tuple=True)
    boxes = boxes_RX4[rows, classes if boxes_RX4.shape[1] > 1 else torch.zeros_like(classes)]
    scores = scores_RK[rows, classes]
    kept = batched_nms(boxes, scores, classes, settings.nms)[: settings.topk]
    return Selected(boxes[kept], scores[kept], classes[kept], rows[kept])


# --- masks ----------------------------------------------------------------------------------------------------------------


def drawn(probabilities_NSS: Tensor, boxes_N4: Tensor, size: Size) -> Iterator[tuple[slice, slice, Tensor]]:
    """Each box's mask at the pixels of an image of `size`: rows, columns, and the probabilities there; they are 0 elsewhere.

    The mask is read bilinearly at the pixels' centres, with zeros round it; half a cell beyond the box they aren't 0.
    """
    for probabilities_SS, (x1, y1, x2, y2) in zip(probabilities_NSS, boxes_N4.tolist(), strict=True):
        rows, columns = (
            _reached(*ends, cells, pixels)
            for ends, cells, pixels in zip(((y1, y2), (x1, x2)), probabilities_SS.shape, size, strict=True)
        )
        y, x = (
            (torch.arange(part.start, part.stop, device=boxes_N4.device, dtype=torch.float32) + 0.5 - start) / (end - start) * 2
            - 1
            for part, start, end in ((rows, y1, y2), (columns, x1, x2))
        )
        grid_HW2 = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)
        sampled = F.grid_sample(probabilities_SS[None, None].float(), grid_HW2[None], mode="bilinear", align_corners=False)
        yield rows, columns, sampled[0, 0]


def _reached(start: float, end: float, cells: int, pixels: int) -> slice:
    """The pixels along an axis where a mask of so many cells from `start` to `end` isn't 0."""
    beyond = (end - start) / cells + 1
    first, last = math.floor(start - beyond), math.ceil(end + beyond)
    return slice(min(max(0, first), pixels), min(max(0, last), pixels))


def paste(probabilities_NSS: Tensor, boxes_N4: Tensor, size: Size) -> Tensor:
    """Masks of the whole image, bool [N, H, W]: where probabilities are 0.5 or more. Boxes must not be empty."""
    out = torch.zeros(len(boxes_N4), *size, dtype=torch.bool, device=boxes_N4.device)
    for mask, (rows, columns, probabilities) in zip(out, drawn(probabilities_NSS, boxes_N4, size), strict=True):
        mask[rows, columns] = probabilities >= 0.5
    return out
