"""Squares whose upper left part shows an image, as detectors have them: losses and batch statistics of that part alone.

Padding is the same everywhere, so that a network that is trained on it, too, learns least where most of a batch lies: of a
photograph of 4:3, a quarter of the cells are padding.

Shapes: B squares, C channels, H W pixels, h w cells of any map of a whole square.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Shown:
    """How much of each square shows its image; zeros, the mean colour of normalised images, fill the rest."""

    sizes: tuple[tuple[int, int], ...]
    "(height, width) of the images, in pixels of a square"
    side: int
    "of a square, in pixels"

    def cells(self, grid: tuple[int, int]) -> list[tuple[int, int]]:
        """(rows, columns) of a map of the whole square that hold any of each image."""
        return [(-(-height * grid[0] // self.side), -(-width * grid[1] // self.side)) for height, width in self.sizes]

    def mask(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """Those cells, bool [B, 1, *grid]."""
        rows, columns = torch.tensor(self.cells(grid), device=device).unbind(1)
        by_row = torch.arange(grid[0], device=device) < rows[:, None]
        by_column = torch.arange(grid[1], device=device) < columns[:, None]
        return (by_row[:, :, None] & by_column[:, None, :])[:, None]

    def blanked(self, images_BCHW: Tensor) -> Tensor:
        """Normalised images with exact zeros beside them: 8-bit colours have no mean colour but one that is near it."""
        return images_BCHW * self.mask((images_BCHW.shape[-2], images_BCHW.shape[-1]), images_BCHW.device)


def loss_of(loss: Callable[[Tensor, Tensor], Tensor], predicted: Tensor, target: Tensor, shown: Shown | None) -> Tensor:
    """A mean loss of maps [B, C, h, w]; with `shown`, the mean over images of each one's over the cells that hold any of it."""
    if shown is None:
        return loss(predicted, target)
    parts = shown.cells((target.shape[-2], target.shape[-1]))
    each = [loss(p[None, :, :h, :w], t[None, :, :h, :w]) for p, t, (h, w) in zip(predicted, target, parts, strict=True)]
    return torch.stack(each).mean()


class ShownBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose batch statistics, and so the running ones, are of the cells that hold any of an image (`counting`).

    The padding is normalised by them as well. Without word of what is shown, and in eval mode, it is torch's.
    """

    shown: Shown | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        if self.shown is None or not self.training:
            return super().forward(input)
        values, counted = input.float(), self.shown.mask((input.shape[-2], input.shape[-1]), input.device)
        n = counted.sum()
        mean = (values * counted).sum(dim=(0, 2, 3)) / n
        centred = values - mean[:, None, None]
        variance = (centred.square() * counted).sum(dim=(0, 2, 3)) / n
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (n / (n - 1).clamp(min=1)), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)


def count_shown(net: nn.Module) -> nn.Module:
    """`net` with `ShownBatchNorm2d` in the place of its BatchNorms, whose parameters and statistics they take over."""
    for name, child in net.named_children():
        if type(child) is nn.BatchNorm2d:
            norm = ShownBatchNorm2d(child.num_features, child.eps, child.momentum).train(child.training)
            norm.weight, norm.bias = child.weight, child.bias
            norm.running_mean, norm.running_var = child.running_mean, child.running_var
            norm.num_batches_tracked = child.num_batches_tracked
            setattr(net, name, norm)
        else:
            count_shown(child)
    return net


@contextlib.contextmanager
def counting(net: nn.Module, shown: Shown | None) -> Iterator[None]:
    """Forwards of `net` in here are of such squares."""
    norms = [each for each in net.modules() if isinstance(each, ShownBatchNorm2d)]
    for norm in norms:
        norm.shown = shown
    try:
        yield
    finally:
        for norm in norms:
            norm.shown = None
