"""What FeatUp's joint bilateral stack is trained to do: its map, moved as the image is moved and brought down again by a learned
downsampler, agrees with the backbone's map of the moved image (arXiv 2403.10516).

Numbers are those of the released code. What is drawn is given from outside, so that a run that is continued draws the same.

Shapes: B batch, C channels, S pixels of the square image's side, n m cells of the backbone's map, k pixels of a cell, P projected
channels, N sampled pixels.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators.objectives.blur import gaussian_blur
from operators.transfer import to_device

PAD = 20
"""Mirrored pixels round an image before it is moved."""

ZOOMED, ZOOM = 0.5, (1.0, 2.0)
"""Part of the jitters that enlarge, and by how much."""

FLIPPED = 0.5
"""Part of the jitters that mirror."""

PROJECTED = 30
"""Channels in which maps are compared."""

KEPT = 0.8
"""Part of the places whose logits the attention downsampler keeps in training."""

SAMPLED = 1000
"""Pixels that the CRF's loss is over."""


# --- moved images ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """One change of place of an image and of all maps over it."""

    zoom: float
    top: int
    "row at which the part that is seen begins, in the padded and enlarged image"
    left: int
    flip: bool
    pad: int = PAD

    @classmethod
    def draw(cls, rng: np.random.Generator, size: tuple[int, int], pad: int = PAD) -> Self:
        """For images of `size` (rows, columns)."""
        zoom = float(rng.uniform(*ZOOM)) if rng.random() < ZOOMED else 1.0
        room = [int((side + 2 * pad) * zoom) - side for side in size]
        top, left = (int(rng.integers(0, most, endpoint=True)) for most in room)
        return cls(zoom=zoom, top=top, left=left, flip=bool(rng.random() < FLIPPED), pad=pad)

    def __call__(self, maps_BCHW: Tensor) -> Tensor:
        """Padded by mirroring, enlarged bilinearly, and of that a part as large as before, perhaps mirrored."""
        height, width = maps_BCHW.shape[-2:]
        moved = F.pad(maps_BCHW, [self.pad] * 4, mode="reflect")
        if self.zoom > 1:
            # By the factor itself, as the released code has it: with the ratio of whole sizes samples lie elsewhere.
            moved = F.interpolate(moved, scale_factor=self.zoom, mode="bilinear", align_corners=False)
        moved = moved[..., self.top : self.top + height, self.left : self.left + width]
        return moved.flip(-1) if self.flip else moved


# --- downsamplers ------------------------------------------------------------------------------------------------------------


def patches(maps_BCHW: Tensor, kernel: int, grid: tuple[int, int]) -> Tensor:
    """Squares of `kernel` pixels, spread over the map, for a grid (n, m) of cells: a view [B, C, n, m, k, k].

    Raises `ValueError` where the map is too small for them.
    """
    height, width = maps_BCHW.shape[-2:]
    down, across = (
        (side - kernel) // (cells - 1) if cells > 1 else side for side, cells in zip((height, width), grid, strict=True)
    )
    if min(height, width) < kernel or min(down, across) < 1:
        raise ValueError(f"{height} x {width} pixels are too few for {grid[0]} x {grid[1]} cells of {kernel} pixels")
    return maps_BCHW.unfold(2, kernel, down).unfold(3, kernel, across)[:, :, : grid[0], : grid[1]]


class AttentionDownsampler(nn.Module):
    """A map [B, C, H, W] to `grid` cells: of each square of pixels, blurred, a mean by the softmax of a learned saliency.

    The saliency is linear in the features, then scaled and shifted for each place inside the square. Where `keep_Bnm` is 0, the
    features have no say in it; the released code draws that in inference, too, where we keep all.
    """

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.kernel = kernel
        self.attention_net = nn.Sequential(nn.Dropout(0.2), nn.Linear(channels, 1))
        self.w = nn.Parameter(1 + 0.01 * torch.randn(kernel, kernel))
        self.b = nn.Parameter(0.01 * torch.randn(kernel, kernel))

    def forward(self, maps_BCHW: Tensor, grid: tuple[int, int], keep_Bnm: Tensor | None = None) -> Tensor:
        squares_BnmkkC = patches(gaussian_blur(maps_BCHW), self.kernel, grid).permute(0, 2, 3, 4, 5, 1)
        logits_Bnmkk = self.attention_net(squares_BnmkkC)[..., 0]
        if keep_Bnm is None and self.training:
            keep_Bnm = torch.rand(logits_Bnmkk.shape[:3], device=maps_BCHW.device) < KEPT
        if keep_Bnm is not None:
            logits_Bnmkk = logits_Bnmkk * keep_Bnm[..., None, None]
        logits_Bnmkk = logits_Bnmkk * self.w + self.b
        shares_Bnmkk = logits_Bnmkk.flatten(3).softmax(dim=-1).view_as(logits_Bnmkk)
        return torch.einsum("bnmijc,bnmij->bcnm", squares_BnmkkC, shares_Bnmkk)


class SimpleDownsampler(nn.Module):
    """A map [B, C, H, W] to `grid` cells: of each square of pixels a mean by learned weights, the same for all squares."""

    def __init__(self, kernel: int):
        super().__init__()
        self.kernel = kernel
        self.kernel_params = nn.Parameter(torch.ones(kernel, kernel))

    def forward(self, maps_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
        weights = self.kernel_params.abs()
        return torch.einsum("bcnmij,ij->bcnm", patches(maps_BCHW, self.kernel, grid), weights / weights.sum())


# --- losses ------------------------------------------------------------------------------------------------------------------


class Uncertainty(nn.Module):
    """How far a cell's prediction may be off, learned from its target: [B, C, n, m] to [B, 1, n, m], at least 1e-4."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.Conv2d(channels, 1, 1)
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.mul_(0.1)

    def forward(self, target_BCnm: Tensor) -> Tensor:
        return torch.exp(self.net(target_BCnm) + 0.1).clamp(min=1e-4)


def projection(rng: np.random.Generator, channels: int, projected: int = PROJECTED) -> Tensor:
    """A random matrix [C, P] whose columns have length 1."""
    matrix = rng.standard_normal((channels, projected), np.float32)
    return torch.from_numpy(matrix / np.linalg.norm(matrix, axis=0, keepdims=True))


def uncertain_l2(predicted_BCnm: Tensor, target_BCnm: Tensor, scale_B1nm: Tensor, projection_CP: Tensor) -> Tensor:
    """The mean of error^2 / (2 s^2) + log s over cells and projected channels: a Gaussian's of deviation s, `scale_B1nm`."""
    error_BPnm = torch.einsum("bcnm,cp->bpnm", predicted_BCnm - target_BCnm, projection_CP)
    return (error_BPnm.square() / (2 * scale_B1nm.square()) + scale_B1nm.log()).mean()


@dataclass(frozen=True, kw_only=True)
class Crf:
    """A conditional random field over sampled pixels: what lies near and looks alike should have like features."""

    alpha: float = 0.1
    "of the distance in place, beside that in colour"
    beta: float = 0.15
    "of the distance in colour"
    gamma: float = 0.005
    "of the distance in place alone"
    w1: float = 10.0
    "weight of what is near and looks alike"
    w2: float = 3.0
    "weight of what is near"
    shift: float = 0.0
    "taken off"

    def loss(self, guidance_B3HW: Tensor, maps_BCHW: Tensor, pixels_2N: Tensor) -> Tensor:
        """The mean of likeness times squared distance of features, over all pairs of the pixels (row, column).

        Image and map must show the same thing: the released code pairs the image as it was with features that were moved.
        """
        if guidance_B3HW.shape[-2:] != maps_BCHW.shape[-2:]:
            raise ValueError(
                f"the CRF's image of {tuple(guidance_B3HW.shape[-2:])} pixels and map of {tuple(maps_BCHW.shape[-2:])} must have "
                "one size"
            )
        rows, columns = pixels_2N
        sides = to_device(torch.tensor(maps_BCHW.shape[-2:]), pixels_2N.device)[:, None]
        apart_NN = _distances((pixels_2N / sides)[None])
        colours_BNN = _distances(guidance_B3HW[..., rows, columns])
        likeness_BNN = self.w1 * torch.exp(-apart_NN / (2 * self.alpha) - colours_BNN / (2 * self.beta))
        likeness_BNN = likeness_BNN + self.w2 * torch.exp(-apart_NN / (2 * self.gamma)) - self.shift
        # Of sum(K_ij |f_i - f_j|^2), K symmetric: no differences of all pairs in all channels are held.
        maps_BCN = maps_BCHW[..., rows, columns]
        towards_BCN = maps_BCN * likeness_BNN.sum(dim=-1)[:, None] - maps_BCN @ likeness_BNN
        return 2 * (maps_BCN * towards_BCN).sum() / likeness_BNN.numel()


def sampled_pixels(rng: np.random.Generator, size: tuple[int, int], count: int) -> Tensor:
    """Rows and columns [2, count] of pixels of an image of `size`, drawn with replacement."""
    return torch.from_numpy(np.stack([rng.integers(0, side, count) for side in size]))


def _distances(vectors_BCN: Tensor) -> Tensor:
    """Squared, of all pairs: [B, N, N]."""
    return (vectors_BCN[..., None] - vectors_BCN[..., None, :]).square().sum(dim=1)


def total_variation(maps_BCHW: Tensor) -> Tensor:
    """Squared differences between neighbours along both axes, summed, over the number of values."""
    changes = [maps_BCHW.diff(dim=axis).square().sum() for axis in (-2, -1)]
    return (changes[0] + changes[1]) / maps_BCHW.numel()
