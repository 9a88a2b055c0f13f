"""Training stacks of joint bilateral filters by FeatUp's objective: maps of pixels that agree with the backbone's from anywhere.

The fine map is moved as its image is moved, and brought down by a learned downsampler to what the backbone gives of the moved
image (operators/objectives/featup.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators.backbone import TimmBackbone
from operators.objectives.featup import (
    PAD,
    SAMPLED,
    AttentionDownsampler,
    Crf,
    Jitter,
    SimpleDownsampler,
    Uncertainty,
    projection,
    sampled_pixels,
    total_variation,
    uncertain_l2,
)
from operators.objectives.shown import Shown
from operators.transfer import to_device
from pipelines.config import ConfigError, Counts, Free, Held, require_at_least, used_with
from pipelines.training.data import Loaded, generator
from pipelines.training.images import ImageSetup
from pipelines.training.square import SquareMapConfig, SquareObjective, SquareTraining, bilinear
from storage.documents import JsonValue

_JITTERS, _HELD_OUT = 3, 4
"""What is drawn for a step, and once and for all for held-out images."""


@dataclass(frozen=True, kw_only=True)
class FeatUpTraining(SquareTraining):
    """Settings of one training run: a map of pixels that agrees with a frozen backbone's features of the image as it is moved."""

    word: ClassVar[str] = "featup-upsampler"
    trains: ClassVar[str] = "featup"
    trained_by: ClassVar[str] = "FeatUp's objective"
    level: ClassVar[str] = "x16"
    of_methods: ClassVar[Mapping[str, str]] = {"radius": "radius", "channel_norm": "norm"}
    smallest: ClassVar[Literal[2, 4]] = 2
    enlarged: ClassVar[int] = 16

    method: Counts[str] = "featup"
    """The network: featup, or module:Class of your own whose network takes (images, maps) to many times the cells
    (operators/DESIGN.md)."""
    radius: Counts[int] = 3
    """featup: of its filters, in cells."""
    channel_norm: Counts[bool] = True
    """featup: a LayerNorm over the channels, which isn't trained, comes before the network and before the features that it
    learns; False for the backbone's features as they are."""
    features: Held[SquareMapConfig] = SquareMapConfig(size=224)
    jitters: Counts[int] = 5
    """So many ways of moving each step's images, of which the loss is the mean."""
    downsampler: Counts[Literal["attention", "simple"]] = "attention"
    """What brings maps of pixels down to cells: learned saliency inside each, or one learned kernel for all."""
    projected: Counts[int] = 30
    """Random directions along which maps are compared, drawn anew for each jitter."""
    crf_weight: Counts[float] = 0.001
    """Of the conditional random field, of a step's first jitter."""
    tv_weight: Counts[float] = 0.0
    """Of the fine map's total variation."""

    batch: Counts[int] = 4
    """Images per optimiser step, over all workers; an epoch's last batch is what is left."""
    epochs: Free[int] = 1
    """Passes over the training images."""
    lr: Counts[float] = 1e-3
    """NAdam's learning rate."""
    weight_decay: Counts[float] = 0.0
    """NAdam's, apart from its gradient."""
    clip: Counts[float | None] = 1e-4
    """Largest norm of the gradient in the first --clip-steps; a larger one is scaled down to it."""
    clip_steps: Annotated[Counts[int | None], used_with(clip=True)] = 10
    """So many steps have their gradient clipped; none: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "jitters", "projected", "clip_steps")
        require_at_least(0, self, "crf_weight", "tv_weight")

    def clipping(self, step: int) -> float | None:
        return self.clip if self.clip_steps is None or step < self.clip_steps else None

    def optimiser(self, net: nn.Module, trained: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:  # noqa: ARG002
        return torch.optim.NAdam(trained.values(), lr=self.lr, weight_decay=self.weight_decay, decoupled_weight_decay=True)

    def trained_sides(self, patch: int) -> tuple[int, ...]:  # noqa: ARG002
        return (self.features.size,)

    def network(self, backbone: TimmBackbone) -> dict[str, JsonValue]:
        found = super().network(backbone)
        if self.features.size <= PAD:
            raise ConfigError(f"--size {self.features.size}: images are mirrored by {PAD} px to be moved, and must be larger")
        return found

    def objective(self, setup: ImageSetup, device: torch.device) -> "FeatUpObjective":
        return FeatUpObjective(self, setup, device)


class Beside(nn.Module):
    """What FeatUp trains with the network, and doesn't use afterwards."""

    def __init__(self, config: FeatUpTraining, channels: int, patch: int):
        super().__init__()
        attention = config.downsampler == "attention"
        self.downsampler = AttentionDownsampler(channels, patch) if attention else SimpleDownsampler(patch)
        self.uncertainty = Uncertainty(channels)


class FeatUpObjective(SquareObjective):
    """FeatUp's loss of a micro-batch. What is drawn is a step's, so that all of its images are moved alike.

    `val_loss` is the training's, under jitters that are drawn once and for all; `val_loss_bilinear` is that of the map enlarged
    bilinearly to pixels, by the same downsampler. For the cosines, the network's map of pixels is averaged over cells.
    """

    metrics = tuple(name for name in SquareObjective.metrics if "twice" not in name)

    def __init__(self, config: FeatUpTraining, setup: ImageSetup, device: torch.device):
        super().__init__(config, setup, device)
        self.config, norm = config, getattr(self.net, "norm", None)
        self._norm = norm.requires_grad_(False) if isinstance(norm, nn.LayerNorm) else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.beside = Beside(config, self.backbone.channels * len(setup.backbone.spec.layers), self.backbone.patch).to(device)

    def given(self, loaded: Loaded) -> tuple[Tensor, Tensor]:
        images, maps = super().given(loaded)
        return images, self._normed(maps) if "features" in loaded.example.arrays else maps

    def features(self, images_BCHW: Tensor) -> Tensor:
        """The frozen backbone's maps after the network's own first LayerNorm, if it has one: what it gives is to be so, too. To
        the network that makes no difference: normalised twice is normalised."""
        return self._normed(super().features(images_BCHW))

    def _normed(self, maps: Tensor) -> Tensor:
        if self._norm is None:
            return maps
        with torch.no_grad():
            normed: Tensor = self._norm(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return normed

    def accumulate(self, loaded: Loaded) -> tuple[Tensor, float]:
        """Adds the gradient of the images' summed loss to the network's; gives that sum and their number.

        The network runs once for all jitters, whose gradients meet at its map; the released code runs it again for each, which
        is other dropout, and the same gradient on average.
        """
        images, maps = self.given(loaded)
        fine = self._pixels(images, maps)
        leaf = fine.detach().requires_grad_()
        rng, total = generator(_JITTERS, self.config.seed, loaded.item.step), torch.zeros((), device=self.device)
        for first in self._firsts:
            loss = self._loss(images, leaf, rng, first=first) * len(loaded)
            loss.backward()
            total += loss.detach()
        fine.backward(leaf.grad)
        return total, len(loaded)

    @property
    def _firsts(self) -> list[bool]:
        return [n == 0 for n in range(self.config.jitters)]

    def _pixels(self, images: Tensor, maps: Tensor) -> Tensor:
        """The network's map, brought to the images' pixels."""
        fine, size = self.run_net(images, maps), (images.shape[-2], images.shape[-1])
        return fine if fine.shape[-2:] == size else bilinear(fine, size)

    def _loss(self, images: Tensor, fine: Tensor, rng: np.random.Generator, *, first: bool) -> Tensor:
        """One jitter's part of the mean loss; the first one's has what isn't of jitters, too."""
        config, beside = self.config, self.beside
        size = (images.shape[-2], images.shape[-1])
        jitter = Jitter.draw(rng, size)
        shared = to_device(projection(rng, fine.shape[1], config.projected), self.device)
        pixels = to_device(sampled_pixels(rng, size, SAMPLED), self.device)
        seen, moved = jitter(images), jitter(fine)
        target = self.features(seen)
        predicted = beside.downsampler(moved, (target.shape[-2], target.shape[-1]))
        loss = uncertain_l2(predicted, target, beside.uncertainty(target), shared) / config.jitters
        if first and config.crf_weight:
            # The released code has the image as it was here, beside features that were moved.
            loss = loss + config.crf_weight * Crf().loss(seen, moved, pixels)
        if first and config.tv_weight:
            loss = loss + config.tv_weight * total_variation(fine)
        return loss

    # --- held-out images ----------------------------------------------------------------------------------------------

    def enlarge(self, images_BCHW: Tensor, maps_BChw: Tensor, grid: tuple[int, int]) -> Tensor:
        return F.adaptive_avg_pool2d(self.run_net(images_BCHW, maps_BChw), grid)

    def held_out_losses(self, images_BCHW: Tensor, maps_BChw: Tensor, shown: Shown | None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        plain = bilinear(maps_BChw, (images_BCHW.shape[-2], images_BCHW.shape[-1]))
        return self._held_out(images_BCHW, self._pixels(images_BCHW, maps_BChw)), self._held_out(images_BCHW, plain)

    def _held_out(self, images: Tensor, fine: Tensor) -> Tensor:
        rng = generator(_HELD_OUT, self.config.seed)
        return torch.stack([self._loss(images, fine, rng, first=first) for first in self._firsts]).sum()
