"""Training x2 upsamplers by LiFT's self-supervision: features of the half image, enlarged, against those of the image.

LiFT, the baselines that its paper trains alike (a resize convolution and a joint bilateral filter; arXiv 2403.14625 eq. 1), and
any method that is `trained_by` it.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from operators.backbone import TimmBackbone, autocast
from operators.image import Geometry
from operators.objectives.lift import averaged, cosine_loss, lower, multi_scale_loss
from operators.upsamplers import AnyMethod, UpsamplerError, build_net, find_method, method_names
from pipelines.config import ConfigError, Counts, Found, Held
from pipelines.features.bundle import ModelBundle
from pipelines.features.config import MapConfig, PlacedConfig, SizedConfig
from pipelines.training.data import JitteredView, Loaded, StoredFeatures, TrainOrder
from pipelines.training.images import ImageObjective, ImageSetup, ImageTraining
from storage.documents import JsonObject, JsonValue
from storage.store import FeatureStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SquareMapConfig(MapConfig, SizedConfig[int], PlacedConfig):
    """The map of a square input."""


LIFT_MAPS = SquareMapConfig(size=448, facet="key", geometry="squash")
"""LiFT's: keys of images whose aspect isn't kept."""


_OF_METHODS = ("image_branch", "wide", "kernel", "radius")
"""Fields of `X2Config` that are settings of some methods."""


@dataclass(frozen=True, kw_only=True)
class X2Config(ImageTraining):
    """Settings of one training run: a x2 upsampler learns a frozen backbone's features of larger images (LiFT's eq. 1)."""

    method: Counts[str] = "lift"
    """The network: lift, resize_conv, jbu, or module:Class of your own (operators/DESIGN.md)."""
    image_branch: Counts[bool] = True
    """lift: False for the ablation without the image."""
    wide: Counts[bool] = False
    """lift: the larger variant."""
    kernel: Counts[int] = 1
    """resize_conv: of its convolutions."""
    radius: Counts[int] = 3
    """jbu: of its filters, in cells."""
    features: Held[SquareMapConfig] = LIFT_MAPS
    interpolation: Counts[Literal["bilinear", "bicubic", "lanczos"]] = "bilinear"
    """Of the photographs to the input's size; LiFT's is bilinear."""
    loss: Counts[Literal["cosine", "l1", "l2"]] = "cosine"
    """Distance between feature maps."""
    jitter: Counts[float] = 0.2
    """Colour jitter: brightness, contrast and saturation by up to 1 +- this, hue by up to this part of the circle."""
    crop: Counts[float] = 1.0
    """Smallest side of a random part of the image, as a part of the image's; below 1, half of the images are mirrored, too.
    LiFT has 1: none of it; for few images."""
    lower: Counts[Literal["sliced", "resized"]] = "sliced"
    """How the half and the quarter image are made: every second and fourth pixel, as LiFT's code, or averaged, as its text."""
    stored: Annotated[Found[str], tyro.conf.arg(name="features")] = ""
    """A store of the images' features at --size, made by jobs/extract.py: read instead of computed. Needs --jitter 0, and
    --interpolation as the store has it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._found()
        if not 0 <= self.jitter <= 0.5:
            raise ConfigError(f"--jitter {self.jitter}: must lie between 0 and 0.5")
        for name, plain in (("jitter", 0), ("crop", 1)):
            if self.stored and (value := getattr(self, name)) != plain:
                raise ConfigError(
                    f"--{name} {value:g}: the stored --features are of the images as they are; use --{name} {plain}, or no store"
                )

    @property
    def backbone_size(self) -> int:
        """Side of the largest image that the backbone is given."""
        return self.features.size

    def network(self, backbone: TimmBackbone) -> dict[str, JsonValue]:
        """The network's settings, as a checkpoint has them. Raises `ConfigError` for a size that can't be halved twice."""
        multiple = 4 * backbone.patch
        size, model = self.features.size, self.features.model
        if size % multiple:
            nearest = max(multiple, round(size / multiple) * multiple)
            raise ConfigError(
                f"--size {size}: the image, its half and its quarter go through {model}, so that the side must be a "
                f"multiple of 4 x {backbone.patch} px; the nearest is {nearest}"
            )
        found, cells = self._found(), size // multiple
        own = {field.name for field in fields(found.settings)}
        given = {name: getattr(self, name) for name in _OF_METHODS if getattr(self, name) != getattr(X2Config, name)}
        if misplaced := [name for name in given if name not in own]:
            raise ConfigError(f"--{misplaced[0].replace('_', '-')} is no setting of {self.method}")
        try:
            settings = found.settings_for(backbone, backbone.channels * len(self.features.layers), **given)
            found.require_grid(settings, (cells, cells), (2 * cells, 2 * cells))
        except UpsamplerError as error:
            flags = "".join(f" --{name} {getattr(self, name)}" for name in _OF_METHODS if name in own)
            raise ConfigError(f"--size {size}{flags}: {error}") from None
        return found.to_json(settings)

    def require_trainable(self, network: JsonObject, order: TrainOrder) -> None:
        """BatchNorm has no statistics of one image whose map is a single cell; the quarter image's is the smallest."""
        if order.fewest > 1:
            return
        net = build_net(network, self.seed)
        if not any(isinstance(layer, _BatchNorm) for layer in net.modules()):
            return
        found = self._found().parse(network)
        channels, patch = getattr(found, "channels", 0), getattr(found, "patch", 0)
        if not channels or not patch:  # a method of the user's own, which says neither
            return
        cells = self.features.size // (4 * patch)
        try:
            with torch.no_grad():
                net(torch.zeros(1, 3, cells * patch, cells * patch), torch.zeros(1, channels, cells, cells))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            micro = f" --micro-batch {self.micro_batch}" if self.micro_batch else ""
            raise ConfigError(
                f"--batch {self.batch}{micro}: of {order.n_rows:,} images to train on, that leaves a forward of a single one, "
                f"and at --size {self.features.size} its quarter has {cells} x {cells} cells of {patch} px: BatchNorm of "
                f"{self.method} needs more than one value. Give a {'--batch and a --micro-batch' if micro else '--batch'} "
                f"that leaves no image alone, a --limit that leaves another number of images, or --size {8 * patch} or more"
            ) from None

    def _found(self) -> AnyMethod:
        """The method. Raises `ConfigError` where there is none, or it isn't trained so."""
        try:
            found = find_method(self.method)
        except UpsamplerError as error:
            raise ConfigError(f"--method {self.method}: {error}") from None
        if found.trained_by != "lift":
            names = ", ".join(method_names(lambda each: each.trained_by == "lift"))
            raise ConfigError(f"--method {self.method} isn't trained by LiFT's self-supervision; these are: {names}")
        return found

    def view(self, backbone: ModelBundle) -> JitteredView:
        return JitteredView(geometry=self.geometry_for(backbone), jitter=self.jitter, crop=self.crop)

    def geometry_for(self, backbone: ModelBundle) -> Geometry:
        """How images become --size."""
        return Geometry(
            mode=self.features.geometry,
            height=self.features.size,
            width=self.features.size,
            interpolation=self.interpolation,
            mean=backbone.spec.mean,
        )

    def stored_features(self, backbone: ModelBundle) -> StoredFeatures | None:
        """The store's level of the backbone's own maps, held against what would be computed."""
        if not self.stored:
            return None
        store = FeatureStore.open(self.stored, self.options)
        spec = store.spec
        here = replace(backbone.spec, interpolation=self.interpolation)
        if found := spec.differences(here, [name for name in spec.to_json() if name not in ("levels", "weights_source")]):
            raise ConfigError(
                f"--features {store.folder.displayed} holds other features than the training's:\n{found.text('store', 'now')}"
            )
        levels = [level for level in spec.levels if level.method == "backbone" and level.dtype != "int8"]
        if not levels:
            raise ConfigError(
                f"--features {store.folder.displayed}: none of its levels is the backbone's own map in float16 or float32; "
                "extract with --levels x1"
            )
        name = levels[0].name
        for line in store.clipped_lines([name]):
            logger.warning("%s", line)
        return StoredFeatures(url=self.stored, options=self.options, level=name, numbers=spec.numbers([name]))

    def objective(self, setup: ImageSetup, device: torch.device) -> "X2Objective":
        return X2Objective(self, setup, device)


class X2Objective(ImageObjective):
    """The network, its frozen backbone, and the loss of a micro-batch.

    `val_loss` is the training's, at its scales. `val_cosine` is that of the network's x2 map of an image of half the size
    with the backbone's own map of the image: the largest scale that was trained on, but resized, not sliced.
    `val_cosine_twice` is the same from a quarter of the size, the network applied twice; `val_cosine_beyond` from the
    image to one of twice the size, which was not trained on. Beside each, `..._bilinear` is bilinear enlargement's.
    """

    metrics = tuple(
        f"val_{name}{suffix}" for name in ("loss", "cosine", "cosine_twice", "cosine_beyond") for suffix in ("", "_bilinear")
    )
    larger = "twice"

    def __init__(self, config: X2Config, setup: ImageSetup, device: torch.device):
        super().__init__(config, setup, device)
        self.config = config
        self.backbone = setup.backbone.backbone()
        self.backbone.model.to(device)
        self.net = build_net(setup.upsampler, config.seed).to(device)

    def accumulate(self, loaded: Loaded) -> tuple[Tensor, float]:
        """Adds the gradient of the images' summed loss to the network's; gives that sum and their number."""
        arrays = loaded.example.arrays
        images = self.input(arrays["pixels"])
        maps = [self._features(self._lower(images, factor)) for factor in (2, 4)]
        if "features" in arrays:
            stored = torch.from_numpy(np.array(arrays["features"])).to(self.device)
            target = stored.float().permute(0, 3, 1, 2)
        else:
            target = self._features(images)
        loss = multi_scale_loss(self._upsample, images, [target, *maps], self.config.loss, self._lower) * len(loaded)
        loss.backward()
        return loss.detach(), len(loaded)

    def _features(self, images: Tensor) -> Tensor:
        """The frozen backbone's maps, float32 [B, C, h, w]."""
        layers = self.setup.backbone.spec.layers
        with torch.no_grad(), autocast(self.device, self.config.features.precision):
            return self.backbone(images.contiguous(), layers).stacked(layers).float()

    def _lower(self, images: Tensor, factor: int) -> Tensor:
        return (lower if self.config.lower == "sliced" else averaged)(images, factor)

    def _upsample(self, images: Tensor, maps: Tensor) -> Tensor:
        """The network's result, float32: the loss is computed in full precision."""
        with autocast(self.device, self.config.net_precision):
            return self.net(images, maps).float()

    # --- held-out images ----------------------------------------------------------------------------------------------

    def measure_some(self, rows: Sequence[int], panels: list[list[np.ndarray]]) -> tuple[np.ndarray, Mapping[int, str]]:
        size, geometry = self.config.features.size, self.config.geometry_for(self.setup.backbone)
        sides = (size // 4, size // 2, size, 2 * size)
        found = self.setup.held_out.at_sides(rows, geometry, sides)
        if not found.arrays:
            return np.zeros(len(self.metrics)), found.failed
        pixels = found.arrays[str(size)]
        quarter, half, images, double = (self.input(found.arrays[str(side)]) for side in sides)
        target, small, smaller = (self._features(self._lower(images, factor)) for factor in (1, 2, 4))
        tiny, coarse, beyond = (self._features(octave) for octave in (quarter, half, double))
        ours, plain = self._upsample(half, coarse), _bilinear(half, coarse)
        panels.extend(
            [pixels[i], *(m[i].permute(1, 2, 0).cpu().numpy() for m in (coarse, plain, ours, target))] for i in range(len(pixels))
        )
        # x4: the image is enlarged for the second pass, as in LiFT's released code.
        twice = self._upsample(_bilinear(quarter, quarter), self._upsample(quarter, tiny))
        scales, kind = [target, small, smaller], self.config.loss
        means = [
            multi_scale_loss(self._upsample, images, scales, kind, self._lower),
            multi_scale_loss(_bilinear, images, scales, kind, self._lower),
            1 - cosine_loss(ours, target),
            1 - cosine_loss(plain, target),
            1 - cosine_loss(twice, target),
            1 - cosine_loss(_bilinear(quarter, tiny, 4), target),
            1 - cosine_loss(self._upsample(images, target), beyond),
            1 - cosine_loss(_bilinear(images, target), beyond),
        ]
        return len(pixels) * np.array([float(mean) for mean in means]), found.failed


def _bilinear(_: Tensor, maps: Tensor, factor: int = 2) -> Tensor:
    return F.interpolate(maps, scale_factor=factor, mode="bilinear", align_corners=False)
