"""Networks that enlarge a map x2 with the help of its image, behind the `Upsampler` protocol.

A network is described by a plain dict (`NetConfig`'s fields) and a state dict, both given by the caller: this module reads no
files. Training builds the bare network with `build_net`; extraction runs a folded copy with `learned_upsampler`.

Shapes: B batch, C channels, H W pixels, h w cells of the backbone's map.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from operators.backbone import PatchFeatures, autocast, cast_matmul_weights, state_arrays, weights_digest
from operators.upsamplers.jbu import JointBilateral, JointBilateralStack
from operators.upsamplers.lift import LiftNet
from operators.upsamplers.resize_conv import ResizeConvNet
from storage.errors import RayliftError


class UpsamplerError(RayliftError, ValueError):
    """No such upsampler, or it can't do what was asked."""


_OPTIONS = {
    "lift": {"image_branch", "border_crop", "wide", "heads"},
    "resize_conv": {"kernel", "stages"},
    "jbu": {"radius", "stages"},
}

LEARNED = tuple(_OPTIONS)
"""Methods whose weights come from a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class NetConfig:
    """What a state dict doesn't tell about its network. Raises `UpsamplerError` where settings don't go together."""

    method: Literal["lift", "resize_conv", "jbu"]
    channels: int
    "of the maps it takes and gives; several layers' maps are stacked"
    patch: int
    "the backbone's patch size in pixels"
    image_branch: bool = True
    "lift: False for the ablation without the image"
    border_crop: bool = False
    "lift: the paper's way with 56 px at patch 16"
    wide: bool = False
    "lift: the larger variant"
    heads: int | None = None
    "lift: the weights expect head-minor channels of so many heads, as official checkpoints do; maps stay head-major"
    kernel: int = 1
    "resize_conv: of its convolutions"
    radius: int = 3
    "jbu: of its filters, in cells"
    stages: int = 1
    "resize_conv, jbu: a stack of so many x2 steps with weights of their own; FeatUp's have 4"

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> "NetConfig":
        """From a JSON object; absent and null settings take the defaults."""
        return cls(**given_settings(cls, settings, ("method", "channels", "patch"), "the upsampler"))

    def __post_init__(self) -> None:
        if self.method not in _OPTIONS:
            raise UpsamplerError(f"no learned upsampler is called {self.method!r}; there are: {', '.join(_OPTIONS)}")
        for field in fields(self)[3:]:
            if getattr(self, field.name) != field.default and field.name not in _OPTIONS[self.method]:
                raise UpsamplerError(f"{field.name}={getattr(self, field.name)!r} is no setting of {self.method}")
        for name in ("channels", "patch", "heads", "kernel", "radius", "stages"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UpsamplerError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.kernel % 2 == 0:
            raise UpsamplerError(f"kernel must be odd, got {self.kernel}")
        if self.method == "lift" and self.channels < 2:
            raise UpsamplerError("lift needs at least 2 channels")
        if self.channels % (self.heads or 1):
            raise UpsamplerError(f"{self.channels} channels don't divide into {self.heads} heads")


def given_settings(kind: type, settings: Mapping[str, Any], required: Sequence[str], owner: str) -> dict[str, Any]:
    """Those of a JSON object's settings that aren't null, for the dataclass `kind`.

    Raises `UpsamplerError` where one is unknown, or a `required` one lacks; whose they are (`owner`) is for the message.
    """
    names = [field.name for field in fields(kind)]
    if unknown := sorted(set(settings) - set(names)):
        raise UpsamplerError(
            f"no such {owner.removeprefix('the ')} settings: {', '.join(unknown)}; there are: {', '.join(names)}"
        )
    if missing := [name for name in required if settings.get(name) is None]:
        raise UpsamplerError(f"{owner}'s settings lack {', '.join(missing)}: {json.dumps(dict(settings))}")
    return {name: value for name, value in settings.items() if value is not None}


def build_net(config: Mapping[str, Any] | NetConfig, seed: int = 0) -> nn.Module:
    """A network with PyTorch's default initialisation from `seed`, in train mode.

    Takes (images [B, 3, H, W], maps [B, C, h, w]) and gives [B, C, 2h, 2w], or 2^stages times as many cells a side.
    """
    config = config if isinstance(config, NetConfig) else NetConfig.parse(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.method == "lift":
            return LiftNet(
                config.channels,
                config.patch,
                image_branch=config.image_branch,
                border_crop=config.border_crop,
                wide=config.wide,
            )
        if config.method == "resize_conv":
            return ResizeConvNet(config.channels, config.kernel, config.stages)
        if config.stages > 1:
            return JointBilateralStack(config.channels, config.radius, config.stages)
        return JointBilateral(config.radius)


def learned_upsampler(
    config: Mapping[str, Any], state: Mapping[str, Tensor], precision: Literal["fp32", "bf16", "fp16"] = "fp32"
) -> "LearnedUpsampler":
    """The network of `config` with the weights of `state`, ready to run.

    Keys may begin with `module.`, and BatchNorm's counters may be missing. Raises `UpsamplerError` where anything else is
    missing, left over or of another shape.
    """
    parsed = NetConfig.parse(config)
    net = build_net(parsed)
    net.load_state_dict(_fitting_state(net, state))
    return LearnedUpsampler(parsed, net, precision)


def _fitting_state(net: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    expected = net.state_dict()
    counters = {key: value for key, value in expected.items() if key.endswith("num_batches_tracked")}
    state = counters | {key.removeprefix("module."): value for key, value in state.items()}
    require_fitting(expected, state, "the upsampler's settings")
    return state


def require_fitting(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Raise `UpsamplerError` with the first differences where names or shapes aren't those expected of `what`."""
    differences = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    found = [f"{len(names)} {kind}: {', '.join(names[:5])}" for kind, names in differences.items() if names]
    if found:
        raise UpsamplerError(f"the weights don't fit {what}: {'; '.join(found)}")


class LearnedUpsampler:
    """A network as an `Upsampler`: applied log2(grid / base) times, a few images at a time.

    LiFT is given the image bilinearly enlarged x2 before each further pass, from the one before (specs A8). The others
    pool the image themselves; a stack of several stages stops early instead of being repeated. Maps of overlapping patches
    are given the part of the image that their cells tile.

    What runs is a copy for inference: BatchNorm folded into the convolutions before it, channels last.
    """

    layers: tuple[int, ...] = ()
    working_bytes = 2**28
    "images are taken together as far as their activations stay below this"

    def __init__(self, config: NetConfig, net: nn.Module, precision: Literal["fp32", "bf16", "fp16"] = "fp32"):
        self.config, self.precision = config, precision
        self.digest = weights_digest(state_arrays(net))
        net = copy.deepcopy(net).eval().requires_grad_(False)
        if config.heads:
            # Channel (head, dimension) of ours is channel (dimension, head) of the weights.
            net.reorder_channels(torch.arange(config.channels).view(-1, config.heads).t().flatten())
        _fold_batchnorms(net)
        cast_matmul_weights(net, precision)
        self.net = net.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(
        self, images_BCHW: Tensor, features: PatchFeatures, layers: tuple[int, ...], grid: tuple[int, int]
    ) -> Tensor:
        """Float32 [B, C, *grid]. Raises `UpsamplerError` for other channels than it was made for, or for a grid that is
        not 2, 4, 8, ... times that of the maps."""
        maps = features.stacked(layers)
        channels, passes = maps.shape[1], self.passes(features.grid, grid)
        if channels != self.config.channels:
            raise UpsamplerError(
                f"this {self.config.method} was made for maps of {self.config.channels} channels; layers {tuple(layers)} "
                f"have {channels}"
            )
        images = self._tiled_area(images_BCHW, features)
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

    def passes(self, base: tuple[int, int], grid: tuple[int, int]) -> int:
        """How often the network is applied to bring `base` cells to `grid`. Raises `UpsamplerError` where it can't."""
        factor = grid[0] // base[0]
        passes = factor.bit_length() - 1
        if passes < 1 or factor != 2**passes or tuple(grid) != (base[0] * factor, base[1] * factor):
            raise UpsamplerError(
                f"{self.config.method} gives 2, 4, 8, ... times the backbone's {base[0]}x{base[1]} cells, not {grid[0]}x{grid[1]}"
            )
        if self.net.stages > 1 and passes > self.net.stages:
            raise UpsamplerError(
                f"this {self.config.method} has {self.net.stages} stages: x{2**self.net.stages} at most"
            )
        if self.config.method == "jbu" and 2 * min(base) <= self.config.radius:
            raise UpsamplerError(f"jbu of radius {self.config.radius} needs more cells than {base[0]}x{base[1]}")
        return passes

    def _tiled_area(self, images: Tensor, features: PatchFeatures) -> Tensor:
        """Cells of overlapping patches tile less than the image: it begins (patch - stride) / 2 pixels further in."""
        if features.stride >= self.config.patch:
            return images
        start = (self.config.patch - features.stride) // 2
        height, width = (cells * features.stride for cells in features.grid)
        return images[..., start : start + height, start : start + width]

    def _images_at_once(self, grid: tuple[int, int]) -> int:
        return max(1, self.working_bytes // self._bytes_per_image(grid))

    def _bytes_per_image(self, grid: tuple[int, int]) -> int:
        cells, channels = grid[0] * grid[1], self.config.channels
        # Beside the network: the maps it is given, in two precisions, and the last two enlarged images.
        given = cells // 4 * 2 * channels + cells * self.config.patch**2
        return 4 * (self.net.working_values(grid, channels) + given)

    def peak_bytes(self, batch: int, channels: int, grid: tuple[int, int]) -> int:
        """Upper bound on the device memory that one call takes beyond its arguments: weights, maps, images at work."""
        weights = [parameter.nbytes for parameter in self.net.parameters()]
        working = min(batch, self._images_at_once(grid)) * self._bytes_per_image(grid)
        # The result, and several layers' maps stacked, of at most a quarter as many cells.
        maps = 4 * batch * channels * grid[0] * grid[1] * 5 // 4
        # A convolution may copy its weights into another layout.
        return sum(weights) + max(weights) + maps + working


def _fold_batchnorms(net: nn.Module) -> None:
    """Put each BatchNorm's scale and shift into the convolution before it, in place."""
    for sequence in [module for module in net.modules() if isinstance(module, nn.Sequential)]:
        for i in range(len(sequence) - 1):
            if isinstance(sequence[i], nn.Conv2d) and isinstance(sequence[i + 1], nn.BatchNorm2d):
                sequence[i] = fuse_conv_bn_eval(sequence[i], sequence[i + 1])
                sequence[i + 1] = nn.Identity()
