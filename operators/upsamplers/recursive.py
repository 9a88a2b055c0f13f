"""Networks that enlarge a map x2 with the help of its image, applied again for x4, x8, ... (LiFT, section 3.3 of its paper).

Such a method is an `DoublingNet` and a `Recursive`: training has the bare network, extraction a folded copy (`LearnedUpsampler`).

Shapes: B batch, C channels, H W pixels, h w cells of the backbone's map.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Generic, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators.backbone import PatchFeatures, autocast, cast_matmul_weights, fold_batchnorms
from operators.upsamplers.protocol import (
    WORKING_BYTES,
    Method,
    Precision,
    Reload,
    Settings,
    Upsampler,
    UpsamplerError,
    require_counts,
    tiled_area,
)
from storage.documents import JsonObject, JsonValue


class DoublingNet(nn.Module):
    """A network that takes normalised images [B, 3, H, W] and maps [B, C, h, w] to [B, C, 2h, 2w].

    One of several stages with weights of their own, which isn't repeated, takes `steps` as a third argument: 2^steps times
    as many cells a side.
    """

    stages: int = 1
    enlarges_image: bool = False
    "whether each further pass is given the image bilinearly enlarged x2; else the network resizes the image itself"

    def working_values(self, grid: tuple[int, int], channels: int) -> int:
        """Upper bound on the values held at once while one image is brought to `grid`, the result included."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class DoublingSettings(Settings):
    """Of a network that enlarges x2. Raises `UpsamplerError` where settings don't go together."""

    channels: int
    "of the maps it takes and gives; several layers' maps are stacked"
    patch: int
    "the backbone's patch size in pixels"

    def __post_init__(self) -> None:
        require_counts(self, "channels", "patch")


N = TypeVar("N", bound=DoublingSettings)


class Recursive(Method[N]):
    """A method whose network enlarges x2. A subclass has `settings` and `network`, and `prepared` where inference needs it."""

    trained_by = "lift"
    trained_factors = (1, 2, 4)
    "maps of images are learned from those of their halves, and those from the quarters' (LiFT's eq. 1)"

    def network(self, settings: N) -> DoublingNet:
        raise NotImplementedError

    def prepared(self, net: DoublingNet, settings: N) -> None:
        """Make a trained network, in place, one that takes and gives channels as the maps have them."""

    def build(self, settings: N, state: Mapping[str, Tensor], precision: Precision, reload: Reload) -> "LearnedUpsampler[N]":
        return LearnedUpsampler(self, settings, cast(DoublingNet, self.loaded(settings, state)), precision)

    def require_grid(self, settings: N, base: tuple[int, int], grid: tuple[int, int]) -> None:
        self.passes(settings, base, grid)

    def passes(self, settings: N, base: tuple[int, int], grid: tuple[int, int]) -> int:
        """How often the network is applied to bring `base` cells to `grid`. Raises `UpsamplerError` where it can't."""
        factor, stages = grid[0] // base[0], getattr(settings, "stages", 1)
        passes = factor.bit_length() - 1
        if passes < 1 or factor != 2**passes or tuple(grid) != (base[0] * factor, base[1] * factor):
            raise UpsamplerError(
                f"{self.name} gives 2, 4, 8, ... times the backbone's {base[0]}x{base[1]} cells, not {grid[0]}x{grid[1]}"
            )
        if 1 < stages < passes:
            raise UpsamplerError(f"this {self.name} has {stages} stages: x{2**stages} at most")
        return passes


_SHARED: dict[str, JsonValue] = {
    "image_branch": True, "border_crop": False, "wide": False, "heads": None, "kernel": 1, "radius": 3, "stages": 1,
}  # fmt: skip
"""Settings that checkpoints of the methods of LiFT's paper hold of each other, too, at the values that say nothing."""


class OfLiftsPaper(Recursive[N]):
    """One of the three methods that LiFT's paper compares. Their checkpoints were the first, and keep their layout."""

    def to_json(self, settings: N) -> dict[str, JsonValue]:
        said = super().to_json(settings)
        return {"method": self.name, "channels": settings.channels, "patch": settings.patch, **_SHARED} | said

    def parse(self, given: JsonObject) -> N:
        foreign = _SHARED.keys() & given.keys() - {field.name for field in fields(self.settings)}
        if said := sorted(name for name in foreign if given[name] not in (None, _SHARED[name])):
            raise UpsamplerError(f"{said[0]}={given[said[0]]!r} is no setting of {self.name}")
        return super().parse({name: value for name, value in given.items() if name not in foreign})


class LearnedUpsampler(Upsampler, Generic[N]):
    """A network as an `Upsampler`: applied log2(grid / base) times, a few images at a time.

    A stack of several stages stops early instead of being repeated. Maps of overlapping patches are given the part of the
    image that their cells tile.

    The network is taken over and made ready for inference: BatchNorm folded into the convolutions before it, channels last.
    """

    working_bytes: int = WORKING_BYTES
    "images are taken together as far as their activations stay below this"

    def __init__(self, method: Recursive[N], settings: N, net: DoublingNet, precision: Precision = "fp32"):
        self.method, self.settings, self.precision = method, settings, precision
        net = net.eval().requires_grad_(False)
        method.prepared(net, settings)
        fold_batchnorms(net)
        cast_matmul_weights(net, precision)
        self.net: DoublingNet = net.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor, features: PatchFeatures, layers: tuple[int, ...], grid: tuple[int, int]) -> Tensor:
        """Float32 [B, C, *grid]. Raises `UpsamplerError` for other channels than it was made for, or for a grid that is
        not 2, 4, 8, ... times that of the maps."""
        maps = features.stacked(layers)
        channels, passes = maps.shape[1], self.method.passes(self.settings, features.grid, grid)
        if channels != self.settings.channels:
            raise UpsamplerError(
                f"this {self.method.name} was made for maps of {self.settings.channels} channels; layers {tuple(layers)} "
                f"have {channels}"
            )
        images = tiled_area(images_BCHW, features, self.settings.patch)
        self.net.to(maps.device)
        out = torch.empty(
            (len(maps), channels, *grid), device=maps.device, memory_format=torch.channels_last, dtype=torch.float32
        )
        step = self._images_at_once(grid)
        for start in range(0, len(maps), step):
            part = slice(start, start + step)
            with autocast(maps.device, self.precision):
                out[part] = self._enlarged(images[part], maps[part].float(), passes)
        return out

    def _enlarged(self, images: Tensor, maps: Tensor, passes: int) -> Tensor:
        if self.net.stages > 1:
            return self.net(images, maps, passes)
        for i in range(passes):
            if i and self.net.enlarges_image:
                images = F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
            maps = self.net(images, maps).float()
        return maps

    def allow(self, working_bytes: int) -> None:
        self.working_bytes = working_bytes

    def _images_at_once(self, grid: tuple[int, int]) -> int:
        return max(1, self.working_bytes // self._bytes_per_image(grid))

    def _bytes_per_image(self, grid: tuple[int, int]) -> int:
        cells, channels = grid[0] * grid[1], self.settings.channels
        # Beside the network: the maps it is given, in two precisions, and the last two enlarged images.
        given = cells // 4 * 2 * channels + cells * self.settings.patch**2
        return 4 * (self.net.working_values(grid, channels) + given)

    def peak_bytes(self, batch: int, channels: int, grid: tuple[int, int]) -> int:
        """Upper bound on the device memory that one call takes beyond its arguments: weights, maps, images at work."""
        largest = max(parameter.nbytes for parameter in self.net.parameters())
        working = min(batch, self._images_at_once(grid)) * self._bytes_per_image(grid)
        # The result, and several layers' maps stacked, of at most a quarter as many cells.
        maps = 4 * batch * channels * grid[0] * grid[1] * 5 // 4
        # A convolution may copy its weights into another layout.
        return self.kept_bytes(batch) + largest + maps + working

    def kept_bytes(self, batch: int) -> int:
        return sum(parameter.nbytes for parameter in self.net.parameters())
