"""UPLiFT: an encoder's maps of the image, and a x2 step that is applied again and again, to any grid.

State dicts of the published files load as they are. A step gives each finer cell weights over 17 cells round the one that it lies
in, so that its result is a mean of what it was given; the encoder's maps are the same for all steps. Grids that are no power of
two times the map are resized from the next larger one that is.

Everything but the last step is made once an image (`UpliftNet.prepare`), in stripes of rows; the last is made as it is asked for.
All of it is local, so that stripes with a margin change nothing. Of the encoder's maps only those rows and columns are made that
a step reads: for x2 at patch 16, every eighth.

Shapes: B batch, C channels, H W pixels, h w cells of the given map, n neighbours of a cell.
"""

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators.backbone import TimmBackbone
from operators.upsamplers.pixels import in_float32
from operators.upsamplers.protocol import UpsamplerError, require_counts
from operators.upsamplers.queried import Queried, QueriedNet, QueriedSettings, Tile
from operators.upsamplers.reading import Axis, Places, Plan, planned, spacing, window
from operators.upsamplers.sampling import Resampling
from storage.documents import JsonObject

_CELL_PIXELS = 16
"""Of the image that the encoder is given, a cell of the backbone's has so many a side, whatever the patch."""
_READ = 2
"""A block of two 3x3 convolutions reads so many rows beyond those that it makes."""
_SAME_BITS = 512
"""Convolutions of fewer cells are done in another way by oneDNN, whose last bits differ."""
_ROWS = 8
"""Fewer rows than these are no stripe: beside it, its margins would cost more."""

_NEAR: dict[int, Callable[[int, int], bool]] = {
    5: lambda y, x: abs(y) + abs(x) <= 1,
    9: lambda y, x: max(abs(y), abs(x)) <= 1,
    13: lambda y, x: abs(y) + abs(x) <= 2,
    17: lambda y, x: max(abs(y), abs(x)) <= 1 or (y % 2 == 0 and x % 2 == 0),
    25: lambda y, x: max(abs(y), abs(x)) <= 2,
}
"""By their number, which cells within two rows and columns are neighbours."""


def neighbours(count: int) -> list[tuple[int, int]]:
    """Offsets (rows, columns) of so many neighbours, row by row: a cross, 3x3, a diamond, 3x3 and the even ones of 5x5, 5x5."""
    return [(y, x) for y, x in itertools.product(range(-2, 3), repeat=2) if _NEAR[count](y, x)]


@dataclass(frozen=True, kw_only=True)
class UpliftSettings(QueriedSettings):
    """What a state dict doesn't tell about an UPLiFT, and what it does."""

    channels: int
    "of the maps it takes and gives; several layers' maps are stacked"
    widths: tuple[int, ...] = (16, 32, 64, 128, 128)
    "channels of the encoder's maps; a step reads the last two"
    decoder: tuple[int, ...] = (64, 64)
    "channels of a step's two blocks"
    neighbours: int = 17
    "cells that a finer one is a mean of: 5, 9, 13, 17 or 25"
    antialias: bool = True
    "where a grid is no power of two times the map, the larger one is made smaller as the official extractor does; False: as its "
    "fast mode does, bilinearly"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "channels")
        for name, least in (("widths", 2), ("decoder", 2)):
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(values) < least or any(type(v) is not int or v < 1 for v in values):
                raise UpsamplerError(f"{name} must be at least {least} numbers of channels, got {values!r}")
        if len(self.decoder) != 2:
            raise UpsamplerError(f"decoder must be the channels of two blocks, got {self.decoder!r}")
        if self.neighbours not in _NEAR:
            raise UpsamplerError(f"neighbours must be one of {', '.join(map(str, _NEAR))}, got {self.neighbours!r}")


class Uplift(Queried[UpliftSettings]):
    """UPLiFT's method. It isn't trained here."""

    settings = UpliftSettings
    telling = "attender.conv1.weight"

    def network(self, settings: UpliftSettings) -> "UpliftNet":
        return UpliftNet(settings)

    def prepared(self, net: QueriedNet[object], settings: UpliftSettings) -> None:
        net.to(memory_format=torch.channels_last)

    def official(self, state: Mapping[str, Tensor], backbone: TimmBackbone) -> tuple[JsonObject, dict[str, Tensor]]:
        """Shapes tell the settings. Published files were trained on what a ViT gives after its final norm."""
        first, logits = state.get("decoder.block_0.blocks.0.conv.0.weight"), state.get("attender.conv1.weight")
        names = [name for name in state if name.startswith("encoder.") and name.endswith(".blocks.0.conv.0.weight")]
        if any("refine" in name or "noise" in name for name in state):
            raise UpsamplerError(
                f"these are weights of {self.name} for a diffusion model's VAE, with parts that its ViT versions don't have; "
                "use those of a ViT"
            )
        if first is None or logits is None or first.ndim != 4 or not names:
            return super().official(state, backbone)
        widths = [len(state[f"encoder.block_{i}.blocks.0.conv.0.weight"]) for i in range(len(names))]
        channels = first.shape[1] - widths[-1]
        self.require_last_tokens(backbone, channels)
        last = state.get("decoder.block_1.blocks.0.conv.0.weight", first)
        return {
            "channels": channels,
            "patch": backbone.patch,
            "widths": [*widths],
            "decoder": [len(first), len(last)],
            "neighbours": len(logits),
        }, dict(state)


def _stretched(maps: Tensor, made: slice) -> Tensor:
    """Rows `made` of the maps bilinearly x2 with aligned corners."""
    rows = maps.shape[2]
    places = torch.arange(made.start, made.stop, dtype=torch.float32, device=maps.device) * ((rows - 1) / (2 * rows - 1))
    above = places.floor()
    below = (above + 1).clamp(max=rows - 1)
    near, far = (maps.index_select(2, lines.long()) for lines in (above, below))
    tall = torch.lerp(near, far, (places - above)[:, None])
    return F.interpolate(tall, size=(len(places), 2 * maps.shape[3]), mode="bilinear", align_corners=True)


# --- the network ------------------------------------------------------------------------------------------------------


class SingleConv(nn.Module):
    """Conv3x3, BatchNorm, ReLU, Conv1x1, and what it was given, of whose channels as many are added as there are."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, maps: Tensor, level: int, rows: Axis, columns: Axis) -> Tensor:
        """The rows and columns of a level's result that are made, of the level's of what it is given."""
        places = rows.blocks[level], columns.blocks[level]
        (top, bottom), (left, right) = rows.borders(level + 1), columns.borders(level + 1)
        padded = F.pad(maps, (left, right, top, bottom)) if top or bottom or left or right else maps
        # Where the window of three lines round each of them begins.
        begins = [place.part(0, len(place.numbers), 1 - first) for place, first in zip(places, (top, left), strict=True)]
        spacings = [spacing(begin.numbers) for begin in begins]
        for dim, (begin, even) in enumerate(zip(begins, spacings, strict=True), start=2):
            if even:
                padded = padded.narrow(dim, begin.numbers[0], begin.numbers[-1] - begin.numbers[0] + 3)
        first = cast(nn.Conv2d, self.conv[0])
        out = F.conv2d(padded, first.weight, first.bias, stride=(spacings[0] or 1, spacings[1] or 1))
        for dim, (begin, even) in enumerate(zip(begins, spacings, strict=True), start=2):
            if not even:
                out = begin.taken(out, dim)
        return _plus(self.conv[1:](out), places[1].taken(places[0].taken(maps, 2), 3))


def _like(maps: Tensor, rows: int) -> Tensor:
    """Room for so many rows of such maps, channels last."""
    batch, channels, _, columns = maps.shape
    return maps.new_empty((batch, rows, columns, channels)).permute(0, 3, 1, 2)


class DoubleConv(nn.Module):
    """Twice Conv3x3, BatchNorm, ReLU; Conv1x1; and what it was given, as `SingleConv` adds it."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        layers: list[nn.Module] = []
        for given in (channels, width):
            conv = nn.Conv2d(given, width, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*layers, nn.Conv2d(width, width, 1))

    def forward(self, maps: Tensor) -> Tensor:
        return _plus(self.conv(maps), maps)


def _plus(out: Tensor, given: Tensor) -> Tensor:
    """`out`, to whose first channels those of `given` are added in place, as many as both have."""
    both = min(out.shape[1], given.shape[1])
    out[:, :both] += given[:, :both]
    return out


class Blocks(nn.Module):
    """One block, under the name that official state dicts have it by."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList([block])


class Attender(nn.Module):
    """Each finer cell as a mean of the cells round the one that it lies in, with weights from a guide."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, count, 1)
        self.offsets = neighbours(count)
        self.radius = max(y for y, _ in self.offsets)

    def weights(self, guide_BdHW: Tensor) -> Tensor:
        """Of each cell's neighbours, float32 [B, n, H, W]."""
        return _plus(self.conv1(guide_BdHW), guide_BdHW).softmax(dim=1)

    def mean(self, weights_BnHW: Tensor, maps_BChw: Tensor, top: int = 0) -> Tensor:
        """Float32 [B, C, H, W], each cell of the maps being cut into as many a side as columns are. `top` is the cell that the
        weights' rows begin with. Beyond the border lie the border's cells. One shifted multiply-add for each neighbour."""
        cells, w = maps_BChw.shape[-2:]
        parts, r = weights_BnHW.shape[3] // w, self.radius
        h = weights_BnHW.shape[2] // parts
        first, last = top - r, top + h + r
        near = maps_BChw[:, :, max(0, first) : min(cells, last)].float()
        near = F.pad(near, [r, r, max(0, -first), max(0, last - cells)], mode="replicate")
        near = near.permute(0, 2, 3, 1).contiguous()  # a cell's channels lie side by side, so that they are read as one
        apart = weights_BnHW.permute(0, 2, 3, 1).unflatten(2, (w, parts)).unflatten(1, (h, parts))
        out = torch.zeros((len(near), h, parts, w, parts, near.shape[3]), device=near.device)
        for i, (y, x) in enumerate(self.offsets):
            out.addcmul_(apart[..., i : i + 1], near[:, r + y : r + y + h, None, r + x : r + x + w, None])
        return out.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)

    def forward(self, guide_BdHW: Tensor, maps_BChw: Tensor) -> Tensor:
        return self.mean(self.weights(guide_BdHW), maps_BChw)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What an image's last step is made from."""

    plan: Plan
    grid: tuple[int, int]
    maps: Tensor
    "what the last step is given"
    weights: Tensor | None
    "of the neighbours of each cell that it makes; None where there is no step"


class UpliftNet(QueriedNet[Prepared]):
    """Features [B, C, h, w] and their normalised images [B, 3, H, W] to any grid of at least h x w cells; in eval mode.

    The image is brought to 16 pixels a cell first, for patch 14 to (16 H // 14, 16 W // 14). All of it decides about weights, so
    that it is float32 under any autocast.
    """

    float32 = True

    def __init__(self, settings: UpliftSettings):
        super().__init__()
        self.settings = settings
        widths, (low, high) = settings.widths, settings.decoder
        self.encoder = nn.ModuleDict(
            {f"block_{i}": Blocks(SingleConv(given, width)) for i, (given, width) in enumerate(itertools.pairwise((3, *widths)))}
        )
        self.decoder = nn.ModuleDict(
            {
                "block_0": Blocks(DoubleConv(settings.channels + widths[-1], low)),
                "up_1": nn.ModuleDict({"up": nn.ConvTranspose2d(low, low, 2, stride=2)}),
                "block_1": Blocks(DoubleConv(low + widths[-2], high)),
            }
        )
        self.attender = Attender(high, settings.neighbours)
        self._kept: tuple[tuple[Plan, torch.device], tuple[Axis, Axis]] | None = None

    def prepare(self, images_BCHW: Tensor, maps_BChw: Tensor, grid: tuple[int, int]) -> Prepared:
        with in_float32(images_BCHW):
            return self._prepared(images_BCHW, maps_BChw, grid)

    def _prepared(self, images_BCHW: Tensor, maps_BChw: Tensor, grid: tuple[int, int]) -> Prepared:
        images = self._resized(images_BCHW)
        plan = planned((maps_BChw.shape[-2], maps_BChw.shape[-1]), (images.shape[-2], images.shape[-1]), grid)
        maps, weights = maps_BChw, None
        if plan.steps:
            rows, columns = self._axes(plan, maps.device)
            coarse, fine = self.encoded(images, plan, rows, columns)
        for step in range(plan.steps):
            if weights is not None:
                maps = self.attender.mean(weights, maps)
            low = self._low(maps, coarse, rows.coarse_steps[step], columns.coarse_steps[step])
            weights = self._weights(low, fine, rows.fine_steps[step], columns.fine_steps[step])
        return Prepared(plan=plan, grid=grid, maps=maps, weights=weights)

    def query(self, prepared: Prepared, tile: Tile) -> Tensor:
        if prepared.weights is None:
            return prepared.maps[:, :, tile.rows, tile.columns]
        rows, columns = self._resampling(prepared.plan, prepared.grid)
        top, bottom = rows.read(tile.rows)
        top, bottom = top // 2, -(-bottom // 2)
        out = self.attender.mean(prepared.weights[:, :, 2 * top : 2 * bottom], prepared.maps, top)
        out = columns.applied(out, 3, 0, tile.columns)
        return rows.applied(out, 2, 2 * top, tile.rows)

    def unit(self, base: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
        return min(_ROWS, grid[0]), grid[1]

    def encoded(self, images_BCHW: Tensor, plan: Plan, rows: Axis, columns: Axis) -> tuple[Tensor, Tensor]:
        """Of the encoder's last map and of the one before, what the plan's steps read."""
        kept, (fine_rows, _), last = plan.coarse[0].kept, plan.fine, len(self.encoder) - 1
        at_once = self._encoder_stripe(plan, len(images_BCHW))[0]
        coarse = fine = images_BCHW[:0]
        for first in range(0, len(kept), at_once):
            begin, end = kept[first], kept[first + at_once] if first + at_once < len(kept) else rows.size
            part = rows.between(begin, end)
            maps = columns.image.taken(part.image.taken(images_BCHW, 2), 3)
            for level, block in enumerate(self.encoder.values()):
                maps = cast(SingleConv, cast(Blocks, block).blocks[0])(maps, level, part, columns)
                if level == last - 1:
                    read = columns.fine.taken(part.fine.taken(maps, 2), 3)
                    fine = fine if first else _like(read, len(fine_rows.kept))
                    done = bisect_left(fine_rows.kept, begin)
                    fine[:, :, done : done + read.shape[2]] = read
            coarse = coarse if first else _like(maps, len(kept))
            coarse[:, :, first : first + maps.shape[2]] = maps
        return coarse, fine

    def _low(self, maps: Tensor, coarse: Tensor, rows: Places, columns: Places) -> Tensor:
        """A step's first block of what it is given and of these lines of the encoder's last map, [B, d, h, w]."""
        batch, channels, h, w = maps.shape
        out = maps.new_empty((batch, h, w, self.settings.decoder[0])).permute(0, 3, 1, 2)
        at_once = self._low_stripe(channels, (h, w), batch)[0]
        for first in range(0, h, at_once):
            last = min(h, first + at_once)
            top, bottom = window(first - _READ, last + _READ, h, -(-_SAME_BITS // w))
            read = columns.taken(rows.part(top, bottom).taken(coarse, 2), 3)
            made = self._block(0, torch.cat([maps[:, :, top:bottom], read], dim=1))
            out[:, :, first:last] = made[:, :, first - top : last - top]
        return out

    def _weights(self, low: Tensor, fine: Tensor, rows: Places, columns: Places) -> Tensor:
        """Of the neighbours of each cell that a step makes, from its first block's result and these lines of the encoder's map
        before the last, [B, n, 2h, 2w]."""
        batch, _, h, w = low.shape
        up = cast(nn.ConvTranspose2d, cast(nn.ModuleDict, self.decoder["up_1"])["up"])
        out = low.new_empty((batch, 2 * h, 2 * w, self.settings.neighbours)).permute(0, 3, 1, 2)
        at_once = self._fine_stripe((h, w), batch)[0]
        for first in range(0, 2 * h, at_once):
            last = min(2 * h, first + at_once)
            top, bottom = window(first - _READ, last + _READ, 2 * h, -(-_SAME_BITS // (2 * w)))
            cells = slice(top // 2, -(-bottom // 2))
            made = up(low[:, :, cells])[:, :, top - 2 * cells.start : bottom - 2 * cells.start]
            made = made + _stretched(low, slice(top, bottom))
            read = columns.taken(rows.part(top, bottom).taken(fine, 2), 3)
            guide = self._block(1, torch.cat([made, read], dim=1))
            out[:, :, first:last] = self.attender.weights(guide[:, :, first - top : last - top])
        return out

    def _axes(self, plan: Plan, device: torch.device) -> tuple[Axis, Axis]:
        """Rows and columns on a device, kept for the next images of such sizes: what is brought there is waited for."""
        if self._kept is None or self._kept[0] != (plan, device):
            rows, columns = (Axis.of(plan.coarse[i], plan.fine[i], plan.image[i], len(self.encoder), device) for i in (0, 1))
            self._kept = (plan, device), (rows, columns)
        return self._kept[1]

    def _block(self, number: int, maps: Tensor) -> Tensor:
        return cast(Blocks, self.decoder[f"block_{number}"]).blocks[0](maps)

    def _resized(self, images: Tensor) -> Tensor:
        size = self._encoder_size((images.shape[-2], images.shape[-1]))
        if images.shape[-2:] == size:
            return images
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False)

    def _encoder_size(self, image: tuple[int, int]) -> tuple[int, int]:
        patch = self.settings.patch
        return image[0] * _CELL_PIXELS // patch, image[1] * _CELL_PIXELS // patch

    # --- memory -------------------------------------------------------------------------------------------------------

    def _stripe(self, images: int, line_values: int, margin: int, least: int, lines: int) -> tuple[int, int]:
        """How many lines are made at once, each of which takes so many values, and values of one image's."""
        at_once = min(lines, max(least, self.values_at_once // (images * line_values) - margin))
        return at_once, (at_once + margin) * line_values

    def _encoder_stripe(self, plan: Plan, images: int) -> tuple[int, int]:
        """Lines are rows of the last map."""
        widths, lines = sorted(self.settings.widths), len(plan.coarse[0].kept)
        pixel_rows = -(-plan.image[0] // lines)
        # The image; a block's input and that padded, two convolutions' results, and what is kept of the map before the last.
        values = pixel_rows * plan.image[1] * (6 + 2 * widths[-1] + 2 * widths[-2] + self.settings.widths[-2])
        margin = -(-2 * len(widths) // pixel_rows)
        least = max(_ROWS, -(-8 * _SAME_BITS // plan.image[1])) // pixel_rows
        return self._stripe(images, values, margin, max(1, least), lines)

    def _low_stripe(self, channels: int, given: tuple[int, int], images: int) -> tuple[int, int]:
        """Lines are rows of the cells that a step is given."""
        low, last = self.settings.decoder[0], self.settings.widths[-1]
        # What is stacked, and in another precision; where of it is from; the convolutions' results.
        values = 2 * (channels + last) + 2 * last + 5 * low
        return self._stripe(images, values * given[1], 2 * _READ, max(_ROWS, -(-_SAME_BITS // given[1])), given[0])

    def _fine_stripe(self, given: tuple[int, int], images: int) -> tuple[int, int]:
        """Lines are rows of the cells that a step makes."""
        (low, high), before = self.settings.decoder, self.settings.widths[-2]
        values = 5 * low + 2 * (low + before) + 2 * before + 5 * high + 4 * self.settings.neighbours
        return self._stripe(images, values * 2 * given[1], 2 * _READ, max(_ROWS, -(-_SAME_BITS // (2 * given[1]))), 2 * given[0])

    def bases(self, grid: tuple[int, int]) -> Iterable[tuple[int, int]]:
        # Each number of steps, with the most that is resampled, and with none.
        counts = range(max(grid).bit_length())
        halves = [(-(-grid[0] // 2**i), -(-grid[1] // 2**i)) for i in counts]
        return {(max(1, rows - less), max(1, columns - less)) for rows, columns in halves for less in (0, 1)}

    def prepare_values(self, channels: int, base: tuple[int, int], image: tuple[int, int], grid: tuple[int, int]) -> int:
        plan, settings = planned(base, self._encoder_size(image), grid), self.settings
        if not plan.steps:
            return 0
        read = ((plan.coarse, settings.widths[-1]), (plan.fine, settings.widths[-2]))
        encoded = sum(math.prod(len(lines.kept) for lines in of) * width for of, width in read)
        work = [self._encoder_stripe(plan, 1)[1]]
        for h, w in plan.sides[:-1]:
            stripe = max(self._low_stripe(channels, (h, w), 1)[1], self._fine_stripe((h, w), 1)[1])
            # What the step is given, its first block's result and the weights; then what these make of what it's given, padded.
            work.append(h * w * (channels + settings.decoder[0] + 4 * settings.neighbours) + stripe)
            if (h, w) != plan.sides[-2]:
                work.append(h * w * (7 * channels + 4 * settings.neighbours))
        # The last step is made tile by tile, and reads rows beside these.
        beside = 2 * self.attender.radius + 2 + 2 * math.ceil(max(axis.reach for axis in self._resampling(plan, grid)))
        resized = 3 * math.prod(plan.image) * (plan.image != image)
        return resized + encoded + max(work) + beside * plan.sides[-2][1] * 6 * channels

    def cell_values(self, channels: int, base: tuple[int, int], grid: tuple[int, int]) -> int:
        rows, columns = self._resampling(planned(base, base, grid), grid)
        # A mean, and a quarter as many cells that it is of, twice.
        made = rows.scale * columns.scale * 3 / 2 * channels
        # Rows of the grid's columns, and cells, twice each: the sum, and what is added to it.
        return math.ceil(made + 2 * channels * rows.scale + 3 * channels)

    def _resampling(self, plan: Plan, grid: tuple[int, int]) -> tuple[Resampling, Resampling]:
        made = plan.sides[-1]
        rows, columns = (Resampling(size=made[i], cells=grid[i], antialias=self.settings.antialias) for i in (0, 1))
        return rows, columns
