"""What trainings share whose network learns the frozen backbone's maps of square images, from those of smaller ones or of the
images themselves: settings, stored maps, and how held-out images are judged.
"""

import copy
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from operators.backbone import TimmBackbone, autocast
from operators.image import Geometry
from operators.objectives.lift import cosine_loss
from operators.objectives.shown import Shown, loss_of
from operators.transfer import to_device
from operators.upsamplers import UpsamplerError, build_net
from pipelines.config import ConfigError, Counts, Found, Held, flag_of, said
from pipelines.features.config import MapConfig, PlacedConfig, SizedConfig
from pipelines.features.model_bundle import ModelBundle
from pipelines.training.data import JitteredView, Loaded, StoredFeatures
from pipelines.training.images import ImageObjective, ImageSetup, ImageTraining
from storage.documents import JsonValue
from storage.store import FeatureStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SquareMapConfig(MapConfig, SizedConfig[int], PlacedConfig):
    """The map of a square input."""


@dataclass(frozen=True, kw_only=True)
class SquareTraining(ImageTraining):
    """Settings of one training run on the maps of square images."""

    of_methods: ClassVar[Mapping[str, str]] = {}
    "fields that are settings of some methods, with the names that these have for them"
    smallest: ClassVar[Literal[2, 4]] = 4
    "the backbone is given images made smaller by as much a side, so that --size must be a multiple of so many patches"
    enlarged: ClassVar[int] = 2
    "by how much a side the map of the smallest image is enlarged"
    judges_shown: ClassVar[bool] = False
    "whether padding in the corner of a square can be left out of the loss"

    features: Held[SquareMapConfig] = SquareMapConfig(size=448)
    interpolation: Counts[Literal["bilinear", "bicubic", "lanczos"]] = "bilinear"
    """Of the photographs to the input's size; the papers' is bilinear."""
    jitter: Counts[float] = 0.0
    """Colour jitter: brightness, contrast and saturation by up to 1 +- this, hue by up to this part of the circle."""
    crop: Counts[float] = 1.0
    """Smallest side of a random part of the image, as a part of the image's; below 1, half of the images are mirrored, too.
    The papers have 1: none of it; for few images."""
    stored: Annotated[Found[str], tyro.conf.arg(name="features")] = ""
    """A store of the images' features at --size, made by jobs/extract.py: read instead of computed. Needs --jitter 0, and
    --interpolation as the store has it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.found_method()
        if self.features.geometry == "corner" and not self.judges_shown:
            raise ConfigError(
                f"--geometry corner: {self.trained_by} doesn't leave padding out of its loss; use crop, squash or pad with "
                f"--method {self.method}"
            )
        if not 0 <= self.jitter <= 0.5:
            raise ConfigError(f"--jitter {self.jitter}: must lie between 0 and 0.5")
        for name, plain in (("jitter", 0), ("crop", 1)):
            if self.stored and (value := getattr(self, name)) != plain:
                raise ConfigError(
                    f"--{name} {value:g}: the stored --features are of the images as they are; use --{name} {plain}, or no store"
                )

    @property
    def backbone_size(self) -> int:
        """Side of the largest image that the backbone is given while training."""
        return self.features.size

    def network(self, backbone: TimmBackbone) -> dict[str, JsonValue]:
        """The network's settings, as a checkpoint has them. Raises `ConfigError` for a size that can't be halved so often."""
        multiple = self.smallest * backbone.patch
        size, model = self.features.size, self.features.model
        if size % multiple or size < multiple:
            nearest = max(multiple, round(size / multiple) * multiple)
            parts = "the image, its half and its quarter" if self.smallest == 4 else "the image and its half"
            raise ConfigError(
                f"--size {size}: {parts} go through {model}, so that the side must be a multiple of {self.smallest} x "
                f"{backbone.patch} px; the nearest is {nearest}"
            )
        found, cells = self.found_method(), size // multiple
        own = found.setting_names
        asked = {name: theirs for name, theirs in self.of_methods.items() if getattr(self, name) != getattr(type(self), name)}
        if misplaced := [name for name, theirs in asked.items() if theirs not in own]:
            raise ConfigError(f"{flag_of(misplaced[0])} is no setting of {self.method}")
        given = {theirs: getattr(self, name) for name, theirs in asked.items()}
        try:
            settings = found.settings_for(backbone, backbone.channels * len(self.features.layers), **given)
            whole = copy.copy(backbone)
            whole.ragged = False  # patches fill all images that are trained on
            settings = found.with_backbone(settings, whole)
            found.require_grid(settings, (cells, cells), (self.enlarged * cells, self.enlarged * cells))
        except UpsamplerError as error:
            values = {name: getattr(self, name) for name, theirs in self.of_methods.items() if theirs in own}
            flags = [said(name, value) for name, value in values.items() if not isinstance(value, bool)]
            raise ConfigError(f"{' '.join([f'--size {size}', *flags])}: {error}") from None
        return found.to_json(settings)

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


_OCTAVES = {"cosine": (2, 1), "cosine_twice": (4, 1), "cosine_beyond": (1, 0.5)}
"""Scores of held-out images: by how much a side the image is smaller that is enlarged, and the one whose own map is the truth."""


def _metrics(*octaves: str) -> tuple[str, ...]:
    return tuple(f"val_{name}{suffix}" for name in ("loss", *octaves) for suffix in ("", "_bilinear"))


class SquareObjective(ImageObjective):
    """The network, its frozen backbone, and held-out images.

    `val_loss` is the training's, as each objective says. `val_cosine` is that of the network's map of an image of half the size,
    brought to the grid of the backbone's own map of the image; `val_cosine_twice`, where --size can be halved twice, is the same
    from a quarter of the size; `val_cosine_beyond` from the image to one of twice the size. All of these images are resized
    properly, whatever the training does. Beside each, `..._bilinear` is bilinear enlargement's.
    """

    metrics = _metrics(*_OCTAVES)
    larger = "twice"

    def __init__(self, config: SquareTraining, setup: ImageSetup, device: torch.device):
        super().__init__(config, setup, device)
        self._size, self._precision, self._net_precision = config.features.size, config.features.precision, config.net_precision
        self._geometry = config.geometry_for(setup.backbone)
        self.backbone = setup.backbone.backbone()
        self.backbone.model.to(device)
        self.net = build_net(setup.upsampler, config.seed).to(device)

    def given(self, loaded: Loaded) -> tuple[Tensor, Tensor]:
        """The images of a micro-batch, and the backbone's maps of them, of a store where there is one."""
        arrays = loaded.example.arrays
        images = self.normalised(arrays["pixels"], self.shown(arrays))
        if "features" not in arrays:
            return images, self.features(images)
        stored = to_device(arrays["features"], self.device)
        return images, stored.float().permute(0, 3, 1, 2)

    def shown(self, arrays: Mapping[str, np.ndarray], side: int | None = None) -> Shown | None:
        """What the squares show of their images, where these lie in a corner; those of --size, or of another side."""
        name = "shown" if side is None else f"shown {side}"
        if name not in arrays:
            return None
        return Shown(sizes=tuple((int(height), int(width)) for height, width in arrays[name]), side=side or self._size)

    def normalised(self, pixels_BHW3: np.ndarray, shown: Shown | None) -> Tensor:
        """`input`, with zeros beside what is shown."""
        images = self.input(pixels_BHW3)
        return images if shown is None else shown.blanked(images)

    def features(self, images_BCHW: Tensor) -> Tensor:
        """The frozen backbone's maps, float32 [B, C, h, w]."""
        layers = self.setup.backbone.spec.layers
        with torch.no_grad(), autocast(self.device, self._precision):
            return self.backbone(images_BCHW.contiguous(), layers).stacked(layers).float()

    def run_net(self, *arguments: object) -> Tensor:
        """The network's result, float32: losses are computed in full precision."""
        with autocast(self.device, self._net_precision):
            found: Tensor = self.net(*arguments)
            return found.float()

    @abstractmethod
    def enlarge(self, images_BCHW: Tensor, maps_BChw: Tensor, grid: tuple[int, int]) -> Tensor:
        """The network's map of images on a grid of 2 or 4 times the maps' cells a side."""

    @abstractmethod
    def held_out_losses(self, images_BCHW: Tensor, maps_BChw: Tensor, shown: Shown | None) -> tuple[Tensor, Tensor]:
        """The images' mean loss, by which the best checkpoint is chosen, and that of bilinear enlargement; `maps` are the
        backbone's of the images."""

    # --- held-out images ----------------------------------------------------------------------------------------------

    def measure_some(self, rows: Sequence[int], panels: list[list[np.ndarray]]) -> tuple[np.ndarray, Mapping[int, str]]:
        octaves = {name: pair for name, pair in _OCTAVES.items() if f"val_{name}" in self.metrics}
        sides = {factor: round(self._size / factor) for pair in octaves.values() for factor in pair}
        found = self.setup.held_out.at_sides(rows, self._geometry, sorted(sides.values()))
        if not found.arrays:
            return np.zeros(len(self.metrics)), found.failed
        shown = {factor: self.shown(found.arrays, side) for factor, side in sides.items()}
        images = {factor: self.normalised(found.arrays[str(side)], shown[factor]) for factor, side in sides.items()}
        maps = {factor: self.features(each) for factor, each in images.items()}
        means = list(self.held_out_losses(images[1], maps[1], shown[1]))
        for name, (small, large) in octaves.items():
            wanted = maps[large]
            grid = (wanted.shape[-2], wanted.shape[-1])
            ours, plain = self.enlarge(images[small], maps[small], grid), bilinear(maps[small], grid)
            means += [1 - loss_of(cosine_loss, each, wanted, shown[large]) for each in (ours, plain)]
            if name == "cosine":
                seen = [each.permute(0, 2, 3, 1).cpu().numpy() for each in (maps[small], plain, ours, wanted)]
                panels.extend([list(row) for row in zip(found.arrays[str(sides[large])], *seen, strict=True)])
        return len(images[1]) * np.array([float(mean) for mean in means]), found.failed


def bilinear(maps_BChw: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps on another grid, or images in another size, without antialias."""
    return F.interpolate(maps_BChw, size=grid, mode="bilinear", align_corners=False)
