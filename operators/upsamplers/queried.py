"""Networks that give the cells of any grid, each from its own query: JAFAR, AnyUp, NAF, LoftUp.

Such a method is a `QueriedNet` and a `Queried`. What statistics of the whole image go into is made once for an image (`prepare`);
the cells are then made tile by tile (`query`), which doesn't change them, so that a grid of any size fits into memory.

Shapes: B batch, C channels, H W pixels, h w cells of the backbone's map, Ho Wo of the grid that is asked for.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from operators.backbone import PatchFeatures, TimmBackbone, autocast, cast_matmul_weights, fold_batchnorms
from operators.lean_timm import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from operators.transfer import to_device
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

P = TypeVar("P")
"""What a network makes of images and maps before it makes cells."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Part of a grid: rows and columns, counted from its upper left corner."""

    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


class QueriedNet(nn.Module, Generic[P]):
    """A network that takes normalised images [B, 3, H, W] and maps [B, C, h, w] to [B, C, Ho, Wo].

    Images of a batch don't depend on each other, nor do the cells of a grid.
    """

    float32: ClassVar[bool] = False
    "whether its weights stay float32 under any autocast, because it turns that off for what decides about attention"
    values_at_once: int = WORKING_BYTES // 4
    "what `prepare` may hold at work, where it works in parts, beside what it keeps; `QueriedUpsampler` sets it"

    def prepare(self, images_BCHW: Tensor, maps_BChw: Tensor, grid: tuple[int, int]) -> P:
        """What the cells of `grid` are made from."""
        raise NotImplementedError

    def query(self, prepared: P, tile: Tile) -> Tensor:
        """The cells of a tile, [B, C, *tile.shape]."""
        raise NotImplementedError

    def unit(self, base: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns that tiles had best be multiples of, where a grid is made of `base` cells."""
        return 1, 1

    def prepare_values(self, channels: int, base: tuple[int, int], image: tuple[int, int], grid: tuple[int, int]) -> int:
        """Upper bound on the values held at once while one image is prepared, what is kept included."""
        raise NotImplementedError

    def cell_values(self, channels: int, base: tuple[int, int], grid: tuple[int, int]) -> int:
        """Upper bound on the values held while one cell of a tile is made, the cell included."""
        raise NotImplementedError

    def bases(self, grid: tuple[int, int]) -> Iterable[tuple[int, int]]:
        """Cells of maps, of which some take as much memory as any when they are brought to `grid`."""
        return [grid]

    def forward(self, images_BCHW: Tensor, maps_BChw: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.query(self.prepare(images_BCHW, maps_BChw, grid), Tile(rows=slice(0, grid[0]), columns=slice(0, grid[1])))


@dataclass(frozen=True, kw_only=True)
class QueriedSettings(Settings):
    """Of a network that gives any grid. Those that were made for maps of so many channels have `channels`, too."""

    patch: int
    "the backbone's patch size in pixels"
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    "that the images it is given are normalised by"
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD

    def __post_init__(self) -> None:
        require_counts(self, "patch")


Q = TypeVar("Q", bound=QueriedSettings)


class Queried(Method[Q]):
    """A method whose network gives any grid. A subclass has `settings` and `network`."""

    chunked = True
    imagenet: ClassVar[bool] = False
    "whether its images are normalised by ImageNet's statistics, whatever the backbone's are"

    def network(self, settings: Q) -> QueriedNet[Any]:
        raise NotImplementedError

    def prepared(self, net: QueriedNet[object], settings: Q) -> None:
        """Make a network, in place, what runs best, where that takes more than folding its BatchNorms."""

    def with_backbone(self, settings: Q, backbone: TimmBackbone) -> Q:
        return replace(settings, mean=backbone.mean, std=backbone.std) if self.imagenet else settings

    def build(self, settings: Q, state: Mapping[str, Tensor], precision: Precision, reload: Reload) -> "QueriedUpsampler[Q]":
        net = cast("QueriedNet[object]", self.loaded(settings, state))
        return QueriedUpsampler(self, settings, net, precision)

    def require_grid(self, settings: Q, base: tuple[int, int], grid: tuple[int, int]) -> None:
        if grid[0] < base[0] or grid[1] < base[1]:
            raise UpsamplerError(
                f"{self.name} gives grids of at least the backbone's {base[0]}x{base[1]} cells, not {grid[0]}x{grid[1]}; use "
                "average for coarser ones"
            )


class QueriedUpsampler(Upsampler, Generic[Q]):
    """A network as an `Upsampler`: a few images at a time, and of these a tile at a time."""

    working_bytes: int = WORKING_BYTES
    "images are prepared together, and cells made together, as far as that takes no more"

    def __init__(self, method: Queried[Q], settings: Q, net: QueriedNet[object], precision: Precision = "fp32"):
        self.method, self.settings, self.precision = method, settings, precision
        self.net = net.eval().requires_grad_(False)
        fold_batchnorms(self.net)
        method.prepared(self.net, settings)
        if not net.float32:
            cast_matmul_weights(self.net, precision)
        self._cells: int | None = None

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor, features: PatchFeatures, layers: tuple[int, ...], grid: tuple[int, int]) -> Tensor:
        """Float32 [B, C, *grid]. Raises `UpsamplerError` for other channels than it was made for, or for grids it can't give."""
        maps = features.stacked(layers)
        channels = maps.shape[1]
        self.method.require_channels(getattr(self.settings, "channels", None), tuple(layers), channels)
        self.method.require_grid(self.settings, features.grid, grid)
        images = self._guides(tiled_area(images_BCHW, features, self.settings.patch))
        self.net.to(maps.device)
        # Rows of cells are what is stored, and what networks of tokens make.
        out = torch.empty((len(maps), *grid, channels), device=maps.device, dtype=torch.float32).permute(0, 3, 1, 2)
        sizes = channels, features.grid, (images.shape[-2], images.shape[-1]), grid
        step = self._images_at_once(*sizes)
        for start in range(0, len(maps), step):
            part = slice(start, start + step)
            with autocast(maps.device, self.precision):
                prepared = self.net.prepare(images[part], maps[part].float(), grid)
                for tile in self._tiles(len(maps[part]), channels, features.grid, grid):
                    out[part, :, tile.rows, tile.columns] = self.net.query(prepared, tile)
        return out

    def allow(self, working_bytes: int) -> None:
        self.working_bytes, self.net.values_at_once = working_bytes, working_bytes // 4

    def take_at_once(self, cells: int) -> None:
        self._cells = cells

    def peak_bytes(self, batch: int, channels: int, grid: tuple[int, int]) -> int:
        """As `call_bytes` has it of the maps that take most, and images as fine as these take."""
        patch = self.settings.patch
        return max(
            self.call_bytes(batch, channels, base, (patch * base[0], patch * base[1]), grid) for base in self.net.bases(grid)
        )

    def call_bytes(self, batch: int, channels: int, base: tuple[int, int], image: tuple[int, int], grid: tuple[int, int]) -> int:
        images = min(batch, self._images_at_once(channels, base, image, grid))
        tile = next(self._tiles(images, channels, base, grid))
        working = images * (
            self._image_bytes(channels, base, image, grid) + math.prod(tile.shape) * self._cell_bytes(channels, base, grid)
        )
        # The result; all layers' maps stacked; the images, where they are normalised anew.
        anew = 3 * math.prod(image) * self.method.imagenet
        given = 4 * batch * (channels * (math.prod(grid) + math.prod(base)) + anew)
        return self.kept_bytes(batch) + largest_weight_bytes(self.net) + given + working

    def parts(
        self, batch: int, channels: int, base: tuple[int, int], image: tuple[int, int], grid: tuple[int, int]
    ) -> tuple[int, int]:
        images = min(batch, self._images_at_once(channels, base, image, grid))
        return images, sum(1 for _ in self._tiles(images, channels, base, grid))

    def kept_bytes(self, batch: int) -> int:
        return weights_bytes(self.net)

    def _guides(self, images: Tensor) -> Tensor:
        settings = self.settings
        if not self.method.imagenet or (settings.mean, settings.std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD):
            return images
        ours = torch.tensor([settings.mean, settings.std])
        theirs = torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD])
        scale, shift = ours[1] / theirs[1], (ours[0] - theirs[0]) / theirs[1]
        shift, scale = to_device(torch.stack([shift, scale]).view(2, 3, 1, 1), images.device)
        return torch.addcmul(shift, images, scale)

    def _tiles(self, images: int, channels: int, base: tuple[int, int], grid: tuple[int, int]) -> Iterator[Tile]:
        """Of whole rows where these fit, else of a part of some; of whole units, but for the last ones."""
        fit = self.working_bytes // (images * self._cell_bytes(channels, base, grid))
        tall, wide = self.net.unit(base, grid)
        fit = max(tall * wide, self._cells or fit)
        rows = min(grid[0], max(1, fit // (tall * grid[1])) * tall)
        columns = min(grid[1], max(1, fit // (rows * wide)) * wide)
        for top in range(0, grid[0], rows):
            for left in range(0, grid[1], columns):
                yield Tile(rows=slice(top, min(top + rows, grid[0])), columns=slice(left, min(left + columns, grid[1])))

    def _images_at_once(self, channels: int, base: tuple[int, int], image: tuple[int, int], grid: tuple[int, int]) -> int:
        return max(1, self.working_bytes // self._image_bytes(channels, base, image, grid))

    def _image_bytes(self, channels: int, base: tuple[int, int], image: tuple[int, int], grid: tuple[int, int]) -> int:
        return 4 * (self.net.prepare_values(channels, base, image, grid) + channels * math.prod(base))

    def _cell_bytes(self, channels: int, base: tuple[int, int], grid: tuple[int, int]) -> int:
        return 4 * self.net.cell_values(channels, base, grid)
