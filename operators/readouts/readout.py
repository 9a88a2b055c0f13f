"""What all readouts share: what each promises, the convolutions that draw pixels, sine codes of grid positions.

The layers are those of DeAP's release ("Dense Attentive Probing"), which says more than its paper and made its tables.

Shapes: B batch, C backbone channels, D query channels, h w cells of the given map, H W pixels.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storage.errors import RayliftError

PIXELS_PER_QUERY = 8
"""Along a side: the decoder doubles the query grid three times."""

CODE = 8
"""Numbers of a position code."""


class ReadoutError(RayliftError, ValueError):
    """No such readout, or it can't do what was asked."""


class Readout(nn.Module):
    """A frozen backbone's map to a dense prediction; abstract: a readout fills in `_predict`.

    `pooled_BC` is the prefix (CLS) vector, read only where `needs_pooled`.
    """

    settings: ClassVar[frozenset[str]] = frozenset()
    "those of `ReadoutConfig` that it takes as they are"
    usual_dim: ClassVar[int] = 48
    "channels of the query map, where none are given"
    appended: ClassVar[int] = 0
    "channels that the convolutions see beside the query map's"
    channel_groups: ClassVar[int] = 1
    "into which the map's channels must divide"
    only_outputs: ClassVar[int | None] = None
    "how many it has, where it is for one purpose"
    needs_pooled = False
    reads: ClassVar[str] = ""
    "the upsampler that has made its map, where it can't be another; it is frozen, as the backbone is"
    resize = "bilinear"
    "how a prediction is brought to other sizes than it was made in"

    def __init__(self, channels: int, outputs: int):
        super().__init__()
        self.channels, self.outputs = channels, outputs

    @classmethod
    def dim_groups(cls, heads: int) -> int:  # noqa: ARG003
        """Into which the query map's channels must divide."""
        return 1

    def forward(self, features_BChw: Tensor, size: tuple[int, int], pooled_BC: Tensor | None = None) -> Tensor:
        """Float32 [B, outputs, *size] from a map of any float type, under any autocast; `size` is height, width in pixels.

        Raises `ReadoutError` for other channels than it was made for, a missing pooled vector, or an empty size.
        """
        self._check(features_BChw, size, pooled_BC)
        out = self._predict(features_BChw.float(), size, None if pooled_BC is None else pooled_BC.float()).float()
        return out if out.shape[-2:] == tuple(size) else resized(out, size, self.resize)

    def _predict(self, features_BChw: Tensor, size: tuple[int, int], pooled_BC: Tensor | None) -> Tensor:
        raise NotImplementedError

    def parameter_count(self) -> int:
        """All parameters, as the published tables count: DeAP's unused LayerNorm is in.

        So are the query and key layers that the only-mask ablation never reads, which its authors don't call learnable. The
        classifier behind instance discrimination's 32 channels is no part of a readout, and not in the tables.
        """
        return sum(parameter.numel() for parameter in self.parameters())

    def _check(self, features: Tensor, size: tuple[int, int], pooled: Tensor | None) -> None:
        if features.ndim != 4 or features.shape[1] != self.channels:
            raise ReadoutError(
                f"this readout was made for maps of {self.channels} channels, [B, {self.channels}, h, w]; "
                f"got {list(features.shape)}"
            )
        if min(size) < 1:
            raise ReadoutError(f"an output of {size[0]}x{size[1]} pixels is empty")
        if not self.needs_pooled:
            return
        expected = [len(features), self.channels]
        if pooled is None or list(pooled.shape) != expected:
            got = "none" if pooled is None else list(pooled.shape)
            raise ReadoutError(f"this readout needs the pooled (CLS) vector {expected}, got {got}")


class SplitReadout(Readout):
    """Readouts that share nothing but the backbone, their outputs joined: DeAP's detection has one for heat, one for sizes."""

    def __init__(self, parts: list[Readout]):
        super().__init__(parts[0].channels, sum(part.outputs for part in parts))
        self.parts = nn.ModuleList(parts)
        self.needs_pooled = any(part.needs_pooled for part in parts)

    def _predict(self, features_BChw: Tensor, size: tuple[int, int], pooled_BC: Tensor | None) -> Tensor:
        return torch.cat([part(features_BChw, size, pooled_BC) for part in self.parts], dim=1)


class PixelDecoder(nn.Module):
    """Query maps [B, D, h, w] to float32 [B, outputs, 8h, 8w]: convolutions that double three times, plus a skip.

    `bias` is added to the initial biases of both, so that outputs begin at twice as much.
    """

    def __init__(self, dim: int, outputs: int, width: int, bias: float = 0.0):
        super().__init__()
        layers: list[nn.Module] = []
        # A transposed convolution whose stride is its kernel draws each cell as 2 x 2 pixels that don't overlap.
        for channels in (dim, width, width):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            layers += [nn.ConvTranspose2d(width, width, 2, stride=2), nn.ReLU(inplace=True)]
        last = nn.Conv2d(width, outputs, 1)
        self.cnn = nn.Sequential(*layers, last)
        self.skip = nn.Conv2d(dim, outputs, 1)
        for convolution in (last, self.skip):
            assert convolution.bias is not None
            with torch.no_grad():
                convolution.bias += bias

    def forward(self, queries_BDhw: Tensor) -> Tensor:
        return self.cnn(queries_BDhw).float() + self.skipped(queries_BDhw)

    def skipped(self, queries_BDhw: Tensor) -> Tensor:
        """The skip branch [B, outputs, 8h, 8w]. Its 1x1 convolution comes first: they commute, and it is 64 times cheaper."""
        out = self.skip(queries_BDhw).float()
        return F.interpolate(out, scale_factor=PIXELS_PER_QUERY, mode="bilinear", align_corners=False)


def decoder_width(dim: int, outputs: int, rule: str = "released") -> int:
    """Channels of the decoder's convolutions. "paper": max(D / 4, outputs).

    The paper's text gives 59,000 parameters for VOC where its table has 47,000; the release halves the outputs, and has them.
    """
    return max(dim // 4, outputs if rule == "paper" else outputs // 2)


def feed_forward(channels: int, dim: int) -> nn.Sequential:
    """Expanded by two, then brought to `dim` and normalised."""
    return nn.Sequential(
        nn.Linear(channels, 2 * channels), nn.ReLU(inplace=True), nn.Linear(2 * channels, dim), nn.LayerNorm(dim)
    )


def query_grid(size: tuple[int, int]) -> tuple[int, int]:
    """Queries per axis for so many pixels, rounded up."""
    return -(-size[0] // PIXELS_PER_QUERY), -(-size[1] // PIXELS_PER_QUERY)


def position_code(grid: tuple[int, int], scale: tuple[float, float] = (1.0, 1.0), device: torch.device | None = None) -> Tensor:
    """Sines and cosines of the cells' (column, row) indices times `scale` (rows, columns): [h * w, 8].

    Columns first, four numbers for each axis. Float32 whatever the autocast.
    """
    # Not from a list, whose copy a GPU would be waited for.
    frequencies = torch.stack([torch.full((), each, device=device) for each in (1.0, 0.01)])
    codes = []
    for cells, factor in zip(grid, scale, strict=True):
        angles = torch.arange(cells, device=device)[:, None] * factor * frequencies
        codes.append(torch.cat([angles.sin(), angles.cos()], dim=1))
    rows, columns = codes
    return torch.cat([columns.repeat(grid[0], 1), rows.repeat_interleave(grid[1], dim=0)], dim=1)


def resized(maps_BDhw: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """At other sizes; cells tile the same area."""
    aligned = {} if mode == "nearest" else {"align_corners": False}  # torch refuses the argument for "nearest"
    return F.interpolate(maps_BDhw, size=tuple(size), mode=mode, **aligned)
