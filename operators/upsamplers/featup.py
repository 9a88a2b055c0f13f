"""FeatUp's upsampler (arXiv 2403.10516) as its users know it: a LayerNorm, four joint bilateral steps, a 1x1 correction.

`JointBilateralStack` does the work. Official files are Lightning's, with the backbone beside the upsampler.

Shapes: B batch, C channels, H W pixels, h w cells of the backbone's map.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from operators.backbone import TimmBackbone
from operators.upsamplers.jbu import JointBilateralStack
from operators.upsamplers.protocol import Reload, UpsamplerError, require_counts
from operators.upsamplers.recursive import DoublingSettings, Recursive
from storage.documents import JsonObject, JsonValue


@dataclass(frozen=True, kw_only=True)
class FeatUpSettings(DoublingSettings):
    """What a state dict doesn't tell about a FeatUp."""

    norm: bool = True
    "a LayerNorm over the channels comes first, as in the files that are published as with norm"
    radius: int = 3
    "of its filters, in cells"
    key_dim: int = 32
    "channels in which pixels of the image are compared"
    stages: int = 4
    "x2 steps, with weights of their own"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "radius", "key_dim", "stages")


class FeatUp(Recursive[FeatUpSettings]):
    """Any grid up to x16: the stack stops after as many steps as that takes, and a grid between two steps follows bilinearly."""

    settings = FeatUpSettings
    telling = "range_temp"
    trained_by = "featup"
    overshoots = True

    def network(self, settings: FeatUpSettings) -> "FeatUpNet":
        given = settings.radius, settings.stages, settings.key_dim
        return FeatUpNet(settings.channels, *given, norm=settings.norm)

    def passes(self, settings: FeatUpSettings, base: tuple[int, int], grid: tuple[int, int]) -> int:
        most = 2**settings.stages
        if any(not cells < asked <= most * cells for cells, asked in zip(base, grid, strict=True)):
            raise UpsamplerError(
                f"{self.name} gives grids of more than the backbone's {base[0]}x{base[1]} cells, up to {most} times as many a "
                f"side, not {grid[0]}x{grid[1]}"
            )
        passes = max(math.ceil(math.log2(asked / cells)) for cells, asked in zip(base, grid, strict=True))
        if any(2 * asked < 2**passes * cells for cells, asked in zip(base, grid, strict=True)):
            raise UpsamplerError(
                f"{self.name} enlarges both sides alike; {grid[0]}x{grid[1]} has another shape than the backbone's "
                f"{base[0]}x{base[1]} cells"
            )
        if 2 * min(base) <= settings.radius:
            raise UpsamplerError(f"{self.name} of radius {settings.radius} needs more cells than {base[0]}x{base[1]}")
        return passes

    def with_backbone(self, settings: FeatUpSettings, backbone: TimmBackbone) -> FeatUpSettings:
        self.require_last_tokens(backbone)
        return settings

    def untrained(
        self, backbone: TimmBackbone, channels: int, size: int, reload: Reload
    ) -> tuple[FeatUpSettings, dict[str, Tensor]]:
        settings = self.settings_for(backbone, channels)  # what random weights are given doesn't matter
        return settings, self.initialised(settings).state_dict()

    def official(self, state: Mapping[str, Tensor], backbone: TimmBackbone) -> tuple[JsonObject, dict[str, Tensor]]:
        """Of a file with `upsampler.*`, those; with `model.1.norm.*`, its LayerNorm; `model.0.*` (`model.*` without a LayerNorm)
        is the backbone, of which there is one here already. Parts that only training had are dropped, anything else is refused.
        A bare stack, as published modules save it, has no LayerNorm."""
        kept = {key: value for key, value in state.items() if not any(word in key for word in _TRAINING)}
        if not any(key.startswith(_STACK) for key in kept):
            if "up1.range_temp" not in kept:
                return super().official(state, backbone)
            return _read_settings(kept, backbone), kept
        norm = any(key.startswith(_NORM) for key in kept)
        theirs = _WITH_NORM if norm else _WITHOUT_NORM
        ours, others = {}, []
        for key, value in kept.items():
            if key.startswith(_STACK):
                ours[key.removeprefix(_STACK)] = value
            elif key.startswith(_NORM):
                ours[key.removeprefix(_PREFIX_OF_NORM)] = value
            elif not key.startswith(theirs):
                others.append(key)
        if others:
            raise UpsamplerError(
                f"{len(others)} weights are neither {_STACK}* nor {_NORM}* nor the backbone's {theirs}*: {', '.join(others[:5])}"
            )
        self._require_same_patches(kept, backbone)
        return _read_settings(ours, backbone) | {"norm": norm}, ours

    def _require_same_patches(self, state: Mapping[str, Tensor], backbone: TimmBackbone) -> None:
        """The file's backbone is of the same kind as far as its patches tell. Raises `UpsamplerError`."""
        for key, weight in state.items():
            if key.endswith("patch_embed.proj.weight") and weight.shape[-1] != backbone.patch:
                raise UpsamplerError(
                    f"this {self.name} was trained with a backbone of patch {weight.shape[-1]}, not {backbone.patch}: use that"
                )


class FeatUpNet(JointBilateralStack):
    """Maps [B, C, h, w] and their normalised images [B, 3, H, W] to [B, C, 2^n h, 2^n w], n = `steps` of `stages`."""

    def __init__(self, channels: int, radius: int = 3, stages: int = 4, key_dim: int = 32, *, norm: bool = True):
        super().__init__(channels, radius, stages, key_dim)
        if norm:
            self.norm = nn.LayerNorm(channels)
        self.has_norm = norm

    def begun(self, maps_BChw: Tensor) -> Tensor:
        if not self.has_norm:
            return maps_BChw
        return self.norm(maps_BChw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


_TRAINING = ("scale_net", "downsampler")
"""Parts of the training objective, by what their keys contain."""

_STACK, _NORM, _WITH_NORM, _WITHOUT_NORM = "upsampler.", "model.1.norm.", "model.0.", "model."
_PREFIX_OF_NORM = "model.1."


def _read_settings(state: Mapping[str, Tensor], backbone: TimmBackbone) -> dict[str, JsonValue]:
    """What the shapes of a stack's weights tell. Raises `UpsamplerError` where they are no stack's."""
    try:
        taps, channels = len(state["up1.fixup_proj.0.weight"]), len(state["fixup_proj.1.weight"])
        key_dim = len(state["up1.range_proj.0.weight"])
    except (KeyError, TypeError) as error:
        raise UpsamplerError(f"no whole stack of joint bilateral filters: {error} is missing") from None
    stages = sum(key.endswith(".range_temp") for key in state)
    settings: dict[str, JsonValue] = {"channels": channels, "patch": backbone.patch, "norm": "norm.weight" in state}
    return settings | {"radius": (math.isqrt(taps) - 1) // 2, "key_dim": key_dim, "stages": stages}
