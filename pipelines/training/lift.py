"""Training x2 upsamplers by LiFT's self-supervision: features of the half image, enlarged, against those of the image.

LiFT, the baselines that its paper trains alike (a resize convolution and a joint bilateral filter; arXiv 2403.14625 eq. 1), and
any method that is `trained_by` it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from operators.objectives.lift import Relations, averaged, lower, multi_scale_loss
from operators.objectives.shown import Shown, count_shown, counting
from operators.upsamplers import build_net
from operators.upsamplers.lift import LiftNet, LiftSettings
from pipelines.config import ConfigError, Counts, Held, require_above, require_at_least, used_with
from pipelines.training.data import Loaded, TrainOrder
from pipelines.training.images import ImageSetup
from pipelines.training.square import SquareMapConfig, SquareObjective, SquareTraining, bilinear
from storage.documents import JsonObject

LIFT_MAPS = SquareMapConfig(size=448, facet="key", geometry="squash")
"""LiFT's: keys of images whose aspect isn't kept."""


@dataclass(frozen=True, kw_only=True)
class X2Config(SquareTraining):
    """Settings of one training run: a x2 upsampler learns a frozen backbone's features of larger images (LiFT's eq. 1)."""

    word: ClassVar[str] = "lift"
    trains: ClassVar[str] = "lift"
    trained_by: ClassVar[str] = "LiFT's self-supervision"
    judges_shown: ClassVar[bool] = True
    later: ClassVar[Sequence[str]] = (
        "image_width", "image_convs", "pairs", "start", "keep_maps", "relational_weight", "relational_tau", "relational_images",
        "relational_cells",
    )  # fmt: skip
    of_methods: ClassVar[Mapping[str, str]] = {
        name: name for name in ("image_branch", "image_width", "image_convs", "wide", "kernel", "radius")
    }

    method: Counts[str] = "lift"
    """The network: lift, resize_conv, jbu, or module:Class of your own (operators/DESIGN.md)."""
    image_branch: Counts[bool] = True
    """lift: False for the ablation without the image."""
    image_width: Annotated[Counts[int], used_with(image_branch=True)] = LiftSettings.image_width
    """lift: channels of the image encoder; the variant of 7 M parameters for ViTDet has 200."""
    image_convs: Annotated[Counts[int], used_with(image_branch=True)] = LiftSettings.image_convs
    """lift: further convolutions in the image encoder; that variant has 1."""
    wide: Counts[bool] = False
    """lift: short for --image-convs 1 and an --image-width of a quarter of the channels."""
    kernel: Counts[int] = 1
    """resize_conv: of its convolutions."""
    radius: Counts[int] = 3
    """jbu: of its filters, in cells."""
    features: Held[SquareMapConfig] = LIFT_MAPS
    pairs: Counts[Literal[1, 2]] = 2
    """Of maps that are compared, of an image and of it made twice as small: 2 are the image with its half, and the half with the
    quarter, as LiFT's paper has it; 1 is the image with its half alone."""
    start: Annotated[Counts[Literal["drawn", "enlargement"]], used_with(method="lift")] = "drawn"
    """lift: weights before the first step. `drawn` at random, as the paper's; `enlargement` is the same network with weights by
    which it enlarges maps of some of the images bilinearly, so that a short run has only to learn what is better than that."""
    loss: Counts[Literal["cosine", "l1", "l2"]] = "cosine"
    """Distance between feature maps."""
    relational_weight: Counts[float] = 0.0
    """Of a loss that is added: ViT-Up's divergence between the cells' similarities. The paper's LiFT hasn't it."""
    relational_tau: Annotated[Counts[float], used_with(relational_weight=True)] = 0.05
    """What cosines are divided by in it: the smaller, the more the most similar cells count."""
    relational_images: Annotated[Counts[int], used_with(relational_weight=True)] = 1
    """Images of a micro-batch whose cells are compared with each other in it."""
    relational_cells: Annotated[Counts[int | None], used_with(relational_weight=True)] = None
    """Cells of these images that are compared, at places chosen once; default: all. The cost grows with the square of their
    number: four images of 32 x 32 cells have 4,096."""
    jitter: Counts[float] = 0.2
    """Colour jitter: brightness, contrast and saturation by up to 1 +- this, hue by up to this part of the circle."""
    lower: Counts[Literal["sliced", "resized"]] = "sliced"
    """How the half and the quarter image are made: every second and fourth pixel, as LiFT's code, or averaged, as its text."""
    keep_maps: Counts[bool] = False
    """Keep the backbone's maps in memory, in float32, so that each image goes through it once, and alone, for all epochs. Needs
    --jitter 0 and --crop 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relational_weight < 0:
            raise ConfigError(f"--relational-weight {self.relational_weight:g}: must be at least 0")
        require_above(0, self, "relational_tau")
        require_at_least(1, self, "relational_images")
        require_at_least(2, self, "relational_cells")
        if self.relational_images > 1 and self.features.geometry == "corner":
            raise ConfigError(
                f"--relational-images {self.relational_images}: with --geometry corner each image's cells are judged alone; use 1"
            )
        for name, plain in (("jitter", 0), ("crop", 1)):
            if self.keep_maps and (value := getattr(self, name)) != plain:
                raise ConfigError(f"--keep-maps: with --{name} {value:g} an image has other maps each time; use --{name} {plain}")

    def trained_sides(self, patch: int) -> tuple[int, ...]:  # noqa: ARG002
        return tuple(self.features.size // factor for factor in (1, *self.factors))

    @property
    def factors(self) -> tuple[int, ...]:
        """By how much a side images are made smaller."""
        return (2, 4)[: self.pairs]

    def require_trainable(self, network: JsonObject, order: TrainOrder) -> None:
        """BatchNorm has no statistics of one image whose map is a single cell; that of the smallest image may be."""
        if order.fewest > 1:
            return
        net = build_net(network, self.seed)
        if not any(isinstance(layer, _BatchNorm) for layer in net.modules()):
            return
        found = self.found_method().parse(network)
        channels, patch = getattr(found, "channels", 0), getattr(found, "patch", 0)
        if not channels or not patch:  # a method of the user's own, which says neither
            return
        smallest = self.factors[-1]
        cells = self.features.size // (smallest * patch)
        try:
            with torch.no_grad():
                net(torch.zeros(1, 3, cells * patch, cells * patch), torch.zeros(1, channels, cells, cells))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            micro = f" --micro-batch {self.micro_batch}" if self.micro_batch else ""
            part, enough = "quarter" if smallest == 4 else "half", 2 * smallest * patch
            raise ConfigError(
                f"--batch {self.batch}{micro}: of {order.n_rows:,} images to train on, that leaves a forward of a single one, "
                f"and at --size {self.features.size} its {part} has {cells} x {cells} cells of {patch} px: BatchNorm of "
                f"{self.method} needs more than one value. Give a {'--batch and a --micro-batch' if micro else '--batch'} "
                f"that leaves no image alone, a --limit that leaves another number of images, or --size {enough} or more"
            ) from None

    def objective(self, setup: ImageSetup, device: torch.device) -> "X2Objective":
        return X2Objective(self, setup, device)


class X2Objective(SquareObjective):
    """LiFT's loss of a micro-batch; `val_loss` is that, at the scales that are trained on.

    `val_cosine` is of the largest scale that was trained on, but resized, not sliced; for `val_cosine_twice` the network is
    applied twice, and what `val_cosine_beyond` is of was not trained on.
    """

    def __init__(self, config: X2Config, setup: ImageSetup, device: torch.device):
        super().__init__(config, setup, device)
        self.config = config
        self._kept: dict[tuple[int, int], Tensor] = {}
        "the backbone's map of a row, by how much a side its image was made smaller"
        if config.features.geometry == "corner":
            self.net = count_shown(self.net)
        if config.start == "enlargement" and not setup.steps_done():
            self._start_enlarging()

    def _start_enlarging(self) -> None:
        side = self._size // self.config.factors[0]
        found = self.starting_images(self._geometry, [side])
        shown = self.shown(found.arrays, side)
        images = self.normalised(found.arrays[str(side)], shown)
        with counting(self.net, shown):
            cast(LiftNet, self.net).start_enlarging(images, self.features(images))

    def accumulate(self, loaded: Loaded) -> tuple[Tensor, float]:
        """Adds the gradient of the images' summed loss to the network's; gives that sum and their number."""
        shown = self.shown(loaded.example.arrays)
        images, maps = self._given_maps(loaded, shown)
        with counting(self.net, shown):
            loss = self._loss(self.run_net, images, maps, shown) * len(loaded)
        loss.backward()
        return loss.detach(), len(loaded)

    def _given_maps(self, loaded: Loaded, shown: Shown | None) -> tuple[Tensor, list[Tensor]]:
        """The images of a micro-batch, and the backbone's maps of them and of smaller ones."""
        if not self.config.keep_maps:
            images, target = self.given(loaded)
            return images, [target, *self._of_smaller(images)]
        arrays = loaded.example.arrays
        images, *stored = self.given(loaded) if "features" in arrays else (self.normalised(arrays["pixels"], shown),)
        factors = (1, *self.config.factors)[len(stored) :]
        return images, [*stored, *(self._kept_maps(factor, loaded.rows, images) for factor in factors)]

    def _kept_maps(self, factor: int, rows: Sequence[int], images: Tensor) -> Tensor:
        """Each made of its own image alone: the others of a batch would count for the last bits."""
        for number, row in enumerate(rows):
            if (factor, row) not in self._kept:
                self._kept[factor, row] = self.features(self._lower(images[number : number + 1], factor))
        return torch.cat([self._kept[factor, row] for row in rows])

    def _loss(
        self, net: Callable[[Tensor, Tensor], Tensor], images: Tensor, maps: Sequence[Tensor], shown: Shown | None
    ) -> Tensor:
        config, relations = self.config, None
        if config.relational_weight:
            relations = Relations(
                weight=config.relational_weight,
                tau=config.relational_tau,
                images=config.relational_images,
                cells=config.relational_cells,
            )
        return multi_scale_loss(net, images, maps, config.loss, self._lower, shown, relations)

    def _of_smaller(self, images: Tensor) -> list[Tensor]:
        return [self.features(self._lower(images, factor)) for factor in self.config.factors]

    def _lower(self, images: Tensor, factor: int) -> Tensor:
        return (lower if self.config.lower == "sliced" else averaged)(images, factor)

    def enlarge(self, images_BCHW: Tensor, maps_BChw: Tensor, grid: tuple[int, int]) -> Tensor:
        maps = self.run_net(images_BCHW, maps_BChw)
        if maps.shape[-2:] == grid:
            return maps
        # x4: the image is enlarged for the second pass, as in LiFT's released code.
        height, width = images_BCHW.shape[-2:]
        return self.enlarge(bilinear(images_BCHW, (2 * height, 2 * width)), maps, grid)

    def held_out_losses(self, images_BCHW: Tensor, maps_BChw: Tensor, shown: Shown | None) -> tuple[Tensor, Tensor]:
        maps = [maps_BChw, *self._of_smaller(images_BCHW)]
        ours, plain = (self._loss(net, images_BCHW, maps, shown) for net in (self.run_net, _doubled))
        return ours, plain


def _doubled(_: Tensor, maps: Tensor) -> Tensor:
    return bilinear(maps, (2 * maps.shape[-2], 2 * maps.shape[-1]))
