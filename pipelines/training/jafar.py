"""Training networks that give any grid by JAFAR's objective: maps of a smaller image, brought to the grid of the image's own map.

Also, its maps on a fine grid shouldn't depend on noise in the image that guides (operators/objectives/jafar.py).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from operators.objectives.jafar import GuidanceNoise, map_loss, shrunk_side, shrunk_sides
from operators.objectives.shown import Shown
from pipelines.config import ConfigError, Counts, Free, Held
from pipelines.training.data import Loaded, generator
from pipelines.training.images import ImageSetup
from pipelines.training.square import SquareMapConfig, SquareObjective, SquareTraining, bilinear

_SCALES, _NOISE = 1, 2
"""What is drawn for a step, and for an image of it."""


@dataclass(frozen=True, kw_only=True)
class JafarTraining(SquareTraining):
    """Settings of one training run: a frozen backbone's features of an image, learned from those of the image made smaller."""

    word: ClassVar[str] = "jafar"
    trains: ClassVar[str] = "jafar"
    trained_by: ClassVar[str] = "JAFAR's objective"
    level: ClassVar[str] = "x4"
    enlarged: ClassVar[int] = 4

    method: Counts[str] = "jafar"
    """The network: jafar, or module:Class of your own whose network takes (images, maps, grid) (operators/DESIGN.md)."""
    features: Held[SquareMapConfig] = SquareMapConfig(size=448)
    shrink: Counts[tuple[float, float]] = (0.25, 0.5)
    """Smallest and largest part of --size to which images are made smaller; one is drawn for each step, and rounded to whole
    patches."""
    antialias: Counts[bool] = False
    """Average pixels where images are made smaller, as extraction does; the released code takes the four nearest."""
    consistency: Counts[float] = 0.1
    """What the loss counts between fine maps under a noised and a clean image, beside the first; 0: it isn't computed."""

    batch: Counts[int] = 4
    """Images per optimiser step, over all workers; an epoch's last batch is what is left."""
    epochs: Free[int] = 1
    """Passes over the training images."""
    lr: Counts[float] = 2e-4
    """Adam's learning rate."""
    weight_decay: Counts[float] = 1e-5
    """AdamW's."""
    net_precision: Counts[Literal["bf16", "fp32"]] = "bf16"
    """Autocast of the network's forward; its weights, the loss and the optimiser are always float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least, most = self.shrink
        if not 0 < least <= most <= 1:
            raise ConfigError(f"--shrink {least:g} {most:g}: two parts of the side, above 0 and at most 1, the smaller one first")
        if self.consistency < 0:
            raise ConfigError(f"--consistency {self.consistency:g}: must be at least 0")

    def trained_sides(self, patch: int) -> tuple[int, ...]:
        whole = (self.features.size,) if self.consistency else ()
        return tuple(dict.fromkeys((*whole, *shrunk_sides(self.features.size, patch, *self.shrink))))

    def objective(self, setup: ImageSetup, device: torch.device) -> "JafarObjective":
        return JafarObjective(self, setup, device)


class JafarObjective(SquareObjective):
    """JAFAR's loss of a micro-batch. The image that guides has half of --size, and noise is drawn for each image.

    `val_loss` is the first part's, the mean of the smallest and the largest of the smaller images, without what is drawn.
    """

    def __init__(self, config: JafarTraining, setup: ImageSetup, device: torch.device):
        super().__init__(config, setup, device)
        self.config = config

    def accumulate(self, loaded: Loaded) -> tuple[Tensor, float]:
        """Adds the gradient of the images' summed loss to the network's; gives that sum and their number."""
        images, target = self.given(loaded)
        config, step, n = self.config, loaded.item.step, len(loaded)
        share = generator(_SCALES, config.seed, step).uniform(*config.shrink)
        guide = self._resized(images, config.features.size // 2)
        loss = map_loss(self._enlarged(guide, images, share, target), target) * n
        loss.backward()
        total = loss.detach()
        if config.consistency:
            shape = (guide.shape[-2], guide.shape[-1])
            drawn = [generator(_NOISE, config.seed, step, row) for row in loaded.rows]
            spec = self.setup.backbone.spec
            noised = GuidanceNoise.draw(drawn, shape, self.device)(guide, spec.mean, spec.std)
            with torch.no_grad():
                clean = self.run_net(guide, target, shape)
            loss = config.consistency * map_loss(self.run_net(noised, target, shape), clean) * n
            loss.backward()
            total += loss.detach()
        return total, n

    def _enlarged(self, guide: Tensor, images: Tensor, share: float, target: Tensor) -> Tensor:
        """The maps of the images made smaller to a part of their side, on the grid of `target`."""
        return self.run_net(guide, self._smaller(images, share), (target.shape[-2], target.shape[-1]))

    def _smaller(self, images: Tensor, share: float) -> Tensor:
        return self.features(self._resized(images, shrunk_side(images.shape[-1], self.backbone.patch, share)))

    def _resized(self, images: Tensor, side: int) -> Tensor:
        return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False, antialias=self.config.antialias)

    def enlarge(self, images_BCHW: Tensor, maps_BChw: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.run_net(images_BCHW, maps_BChw, grid)

    def held_out_losses(self, images_BCHW: Tensor, maps_BChw: Tensor, shown: Shown | None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        guide = self._resized(images_BCHW, self.config.features.size // 2)
        ours = [map_loss(self._enlarged(guide, images_BCHW, share, maps_BChw), maps_BChw) for share in self.config.shrink]
        grid = (maps_BChw.shape[-2], maps_BChw.shape[-1])
        plain = [map_loss(bilinear(self._smaller(images_BCHW, share), grid), maps_BChw) for share in self.config.shrink]
        return (ours[0] + ours[1]) / 2, (plain[0] + plain[1]) / 2
