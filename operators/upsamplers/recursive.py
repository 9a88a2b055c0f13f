"""Networks that enlarge a map x2 with the help of its image, applied again for x4, x8, ... (LiFT, section 3.3 of its paper).

Such a method is an `DoublingNet` and a `Recursive`: training has the bare network, extraction a folded copy (`LearnedUpsampler`).

Shapes: B batch, C channels, H W pixels, h w cells of the backbone's map.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Generic, Literal, TypeVar, cast

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
    largest_weight_bytes,
    require_counts,
    tiled_area,
    weights_bytes,
)
from operators.upsamplers.sampling import Resampling
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

    def summed_macs(self, grid: tuple[int, int], channels: int) -> int:
        """Multiply-accumulates of one pass to `grid` that aren't matrix products or convolutions: no counter sees them."""
        return 0


class StripedNet(DoublingNet):
    """A network whose cells are made of what lies near them, so that a step's rows can be made some at a time, and are the same.

    What is made of the whole image is its `guidance` for a step, of three channels. Steps are counted from 1.
    """

    def begun(self, maps_BChw: Tensor) -> Tensor:
        """The maps as the first step takes them."""
        return maps_BChw

    def guidance(self, images_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
        """The images as a step to `grid` sees them, [B, 3, *grid]."""
        raise NotImplementedError

    def rows(self, step: int, guidance_BCHW: Tensor, maps_BChw: Tensor, rows: slice) -> Tensor:
        """These of the 2h rows that a step makes of the maps, [B, C, rows, 2w]."""
        raise NotImplementedError

    def finished(self, maps_BChw: Tensor) -> Tensor:
        """Cells of the last step, whichever that is, as the network gives them: each made of itself alone."""
        return maps_BChw

    def stripe_values(self, rows: int, width: int, channels: int) -> int:
        """Upper bound on the values held while so many rows of `width` cells are made and finished; linear in `rows`."""
        raise NotImplementedError

    def working_values(self, grid: tuple[int, int], channels: int) -> int:
        return self.stripe_values(grid[0], grid[1], channels)

    def forward(self, images_BCHW: Tensor, maps_BChw: Tensor, steps: int | None = None) -> Tensor:
        maps = self.begun(maps_BChw)
        for step in range(1, (steps or self.stages) + 1):
            grid = (2 * maps.shape[-2], 2 * maps.shape[-1])
            maps = self.rows(step, self.guidance(images_BCHW, grid), maps, slice(0, grid[0]))
        return self.finished(maps)


def near(rows: slice, reach: int, height: int) -> slice:
    """The rows that lie within `reach` of some, of `height` that there are."""
    return slice(max(0, rows.start - reach), min(height, rows.stop + reach))


_SEEN = 2
"""Cells on either side that bicubic enlargement reads; bilinear reads one."""

DOUBLED_BESIDE = 2 + 4 * _SEEN
"""Rows that `doubled` makes beside those that it gives, at most."""


def doubled(maps_BChw: Tensor, rows: slice, mode: Literal["bilinear", "bicubic"]) -> Tensor:
    """These rows of the maps enlarged x2, [B, C, rows, 2w], to the bit as if all were made: weights repeat from cell to cell."""
    h, w = maps_BChw.shape[-2:]
    source = near(slice(rows.start // 2, -(-rows.stop // 2)), _SEEN, h)
    size = (2 * (source.stop - source.start), 2 * w)
    maps = F.interpolate(maps_BChw[:, :, source], size=size, mode=mode, align_corners=False)
    return maps[:, :, rows.start - 2 * source.start : rows.stop - 2 * source.start]


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

    trained_by: ClassVar[str | None] = "lift"
    trained_factors = (1, 2, 4)
    "maps of images are learned from those of their halves, and those from the quarters' (LiFT's eq. 1)"
    overshoots: ClassVar[bool] = False
    "whether grids may lie between two passes': the finer one is made, and brought to the grid bilinearly"

    def network(self, settings: N) -> DoublingNet:
        raise NotImplementedError

    def prepared(self, net: DoublingNet, settings: N) -> None:
        """Make a trained network, in place, one that takes and gives channels as the maps have them."""

    def build(self, settings: N, state: Mapping[str, Tensor], precision: Precision, reload: Reload) -> "LearnedUpsampler[N]":
        net = cast(DoublingNet, self.loaded(settings, state))
        kind = StripedUpsampler if isinstance(net, StripedNet) else LearnedUpsampler
        return kind(self, settings, net, precision)

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
        """Float32 [B, C, *grid]. Raises `UpsamplerError` for other channels than it was made for, or for a grid that the method
        doesn't make of the maps'."""
        maps = features.stacked(layers)
        channels, passes = maps.shape[1], self.method.passes(self.settings, features.grid, grid)
        self.method.require_channels(self.settings.channels, tuple(layers), channels)
        images = tiled_area(images_BCHW, features, self.settings.patch)
        self.net.to(maps.device)
        out = torch.empty(
            (len(maps), channels, *grid), device=maps.device, memory_format=torch.channels_last, dtype=torch.float32
        )
        with autocast(maps.device, self.precision):
            self._fill(out, images, maps, passes)
        return out

    def _fill(self, out: Tensor, images: Tensor, maps: Tensor, passes: int) -> None:
        """Write the maps after so many passes into `out` [B, C, *grid]."""
        step = self._images_at_once((out.shape[-2], out.shape[-1]))
        for start in range(0, len(maps), step):
            part = slice(start, start + step)
            out[part] = self._enlarged(images[part], maps[part].float(), passes)

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
        working = min(batch, self._images_at_once(grid)) * self._bytes_per_image(grid)
        # The result, and several layers' maps stacked, of at most a quarter as many cells.
        maps = 4 * batch * channels * grid[0] * grid[1] * 5 // 4
        return self.kept_bytes(batch) + largest_weight_bytes(self.net) + maps + working

    def parts(
        self, batch: int, channels: int, base: tuple[int, int], image: tuple[int, int], grid: tuple[int, int]
    ) -> tuple[int, int]:
        return min(batch, self._images_at_once(grid)), 1

    def kept_bytes(self, batch: int) -> int:
        return weights_bytes(self.net)


class StripedUpsampler(LearnedUpsampler[N]):
    """A `StripedNet` as an `Upsampler`: several images at a time, or one, a stripe of rows at a time.

    Of a pass, the map before it is whole, and what it makes is written where it belongs, so that beside the result there is a
    quarter of it and one stripe. A grid between two passes is brought about from the finer one stripe by stripe, too.
    """

    net: StripedNet
    working_bytes: int = 2**28
    "what is near a stripe is made with it: many narrow ones are slow (measured: 448 x 448 x 768 in 13 s, in 42 s by 2**26)"

    def _fill(self, out: Tensor, images: Tensor, maps: Tensor, passes: int) -> None:
        sizes = _Sizes.of((maps.shape[-2], maps.shape[-1]), passes, (images.shape[-2], images.shape[-1]))
        step, rows = self._at_once(len(maps), maps.shape[1], sizes)
        for start in range(0, len(maps), step):
            part = slice(start, start + step)
            self._fill_some(out[part], images[part], self.net.begun(maps[part].float()), passes, rows)

    def _fill_some(self, out: Tensor, images: Tensor, maps: Tensor, passes: int, stripe: int) -> None:
        for number in range(1, passes + 1):
            height, width = 2 * maps.shape[-2], 2 * maps.shape[-1]
            guidance = self.net.guidance(images, (height, width))
            step, last = min(number, self.net.stages), number == passes
            to = out
            if not last:
                size = (*maps.shape[:2], height, width)
                to = torch.empty(size, device=out.device, memory_format=torch.channels_last)
            sampling = Resampling(size=height, cells=to.shape[-2], antialias=False)
            for top in range(0, to.shape[-2], stripe):
                rows = slice(top, min(top + stripe, to.shape[-2]))
                seen = slice(*sampling.read(rows))
                made = self.net.rows(step, guidance, maps, seen)
                if last:
                    made = self.net.finished(made).float()
                if to.shape[-1] != width:
                    made = F.interpolate(made, size=(made.shape[-2], to.shape[-1]), mode="bilinear", align_corners=False)
                made = sampling.applied(made, 2, seen.start, rows)
                to[:, :, rows] = made
            maps = to

    def peak_bytes(self, batch: int, channels: int, grid: tuple[int, int]) -> int:
        """As `call_bytes` has it for the finest maps and the largest images that such a grid is made of."""
        base = tuple(side if self.method.overshoots else -(-side // 2) for side in grid)
        image = self.settings.patch * base[0], self.settings.patch * base[1]
        return self._bytes(batch, channels, _Sizes.of((base[0], base[1]), 1, image), grid)

    def call_bytes(self, batch: int, channels: int, base: tuple[int, int], image: tuple[int, int], grid: tuple[int, int]) -> int:
        return self._bytes(batch, channels, _Sizes.of(base, self.method.passes(self.settings, base, grid), image), grid)

    def parts(
        self, batch: int, channels: int, base: tuple[int, int], image: tuple[int, int], grid: tuple[int, int]
    ) -> tuple[int, int]:
        sizes = _Sizes.of(base, self.method.passes(self.settings, base, grid), image)
        images, rows = self._at_once(batch, channels, sizes)
        return images, -(-grid[0] // rows)

    def _bytes(self, batch: int, channels: int, sizes: "_Sizes", grid: tuple[int, int]) -> int:
        images, rows = self._at_once(batch, channels, sizes)
        working = images * (self._image_bytes(channels, sizes) + self._stripe_bytes(rows, channels, sizes))
        # The result, and several layers' maps stacked.
        given = 4 * batch * channels * (math.prod(grid) + math.prod(sizes.base))
        return self.kept_bytes(batch) + largest_weight_bytes(self.net) + given + working

    def _at_once(self, batch: int, channels: int, sizes: "_Sizes") -> tuple[int, int]:
        """How many images are taken together, and how many rows of each."""
        whole = self._image_bytes(channels, sizes) + self._stripe_bytes(sizes.fine[0], channels, sizes)
        if images := self.working_bytes // whole:
            return min(batch, images), sizes.fine[0]
        beside, one = self._stripe_bytes(0, channels, sizes), self._stripe_bytes(1, channels, sizes)
        return 1, min(sizes.fine[0], max(1, (self.working_bytes - beside) // (one - beside)))

    def _image_bytes(self, channels: int, sizes: "_Sizes") -> int:
        """Of what is kept of an image: the given map as float32 and as it is begun with, the two finest maps but the last, its
        guidance, and a copy of it where it doesn't lie in order."""
        base, fine = math.prod(sizes.base), math.prod(sizes.fine)
        return 4 * (channels * (3 * base + fine * 5 // 16) + 2 * 3 * fine + 3 * math.prod(sizes.image))

    def _stripe_bytes(self, rows: int, channels: int, sizes: "_Sizes") -> int:
        width = sizes.fine[1]
        if not self.method.overshoots:
            return 4 * self.net.stripe_values(rows, width, channels)
        # Rows may be sampled from twice as many finer ones: these, narrowed, and what sampling makes of them.
        return 4 * (self.net.stripe_values(2 * rows + 3, width, channels) + 5 * rows * width * channels)


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """What the memory of a call depends on: cells of the maps, and of the finest that are made of them; pixels."""

    base: tuple[int, int]
    fine: tuple[int, int]
    image: tuple[int, int]

    @classmethod
    def of(cls, base: tuple[int, int], passes: int, image: tuple[int, int]) -> "_Sizes":
        return cls(base=base, fine=(base[0] << passes, base[1] << passes), image=image)
