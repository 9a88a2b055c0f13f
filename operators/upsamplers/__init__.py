"""Upsamplers: one protocol, two ways to get one.

Parameter-free methods are made by name (`create_upsampler`, a line in `UPSAMPLERS`). Learned ones are made from settings and
a state dict (`learned_upsampler`); each has a file of its own here and a line in `learned.build_net`.
"""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from operators.backbone import PatchFeatures
from operators.upsamplers.interpolate import AveragePool, Interpolate
from operators.upsamplers.recursive import (
    LEARNED,
    LearnedUpsampler,
    NetConfig,
    UpsamplerError,
    build_net,
    learned_upsampler,
)

__all__ = [
    "LEARNED",
    "UPSAMPLERS",
    "LearnedUpsampler",
    "NetConfig",
    "Upsampler",
    "UpsamplerError",
    "build_net",
    "create_upsampler",
    "learned_upsampler",
]


class Upsampler(Protocol):
    """Brings patch features to another grid, with or without the image's help. Not thread-safe: one call at a time."""

    layers: tuple[int, ...]
    "hidden states it reads besides the maps that are stored; the backbone is asked for them too"
    digest: str
    "sha256 of its weights; empty for parameter-free methods"

    def __call__(
        self, images_BCHW: Tensor, features: PatchFeatures, layers: tuple[int, ...], grid: tuple[int, int]
    ) -> Tensor:
        """Normalised images and the maps of `layers` to [B, C, *grid]. Cells tile the same area as the backbone's."""

    def peak_bytes(self, batch: int, channels: int, grid: tuple[int, int]) -> int:
        """Upper bound on the device memory that one call takes beyond its arguments; keeps to it by tiling."""


UPSAMPLERS: dict[str, Callable[..., Any]] = {
    "bilinear": lambda: Interpolate("bilinear"),
    "bicubic": lambda: Interpolate("bicubic"),
    "nearest": lambda: Interpolate("nearest-exact"),
    "average": AveragePool,
}


def create_upsampler(name: str) -> Upsampler:
    """The upsampler called `name`. Raises `UpsamplerError` with the names there are."""
    if name not in UPSAMPLERS:
        raise UpsamplerError(f"no upsampler is called {name!r}; there are: {', '.join(UPSAMPLERS)}")
    return UPSAMPLERS[name]()
