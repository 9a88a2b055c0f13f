"""Learned upsamplers from where they are kept, held against the backbone that they are to be used with.

A checkpoint is a folder at any URL: `config.json` and `model.safetensors`; a training run's folder stands for its best one.
config.json holds `upsampler` (`method`, and the settings of `operators.upsamplers.recursive.NetConfig` or
`operators.upsamplers.vit_up.ViTUpConfig`) and `backbone` (`FeatureSpec.learned`: what made the features it was
trained on). Official files of LiFT (`.pth`) and ViT-Up hold weights alone; the rest is taken from the backbone that they are used
with.

`backbone` of a training run says `size` as well, the side of its images in pixels. Maps of another size are no mistake, since
the papers have them, too; but how good they are nobody knows, so it is said (`unfamiliar_size`).
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from operators.backbone import TimmBackbone, weights_digest
from operators.upsamplers import LEARNED, LearnedUpsampler, NetConfig, Upsampler, UpsamplerError, learned_upsampler
from operators.upsamplers.vit_up import ViTUp, ViTUpConfig, read_checkpoint
from pipelines.features.weights import WEIGHT_FILES, WeightsUnavailable, read_state_dict
from storage.differences import differences
from storage.documents import JsonObject
from storage.paths import Folder, has_extension, redact
from storage.runs import read_pointers
from storage.spec import FeatureSpec, Use

logger = logging.getLogger(__name__)

Precision: TypeAlias = Literal["bf16", "fp16", "fp32"]

METHODS = (*LEARNED, "vit_up")
"""Upsamplers whose weights come from a checkpoint."""


class UpsamplerWeights(Protocol):
    """A learned upsampler as it is handed to workers: its settings and its arrays."""

    arrays: Mapping[str, np.ndarray]
    trained_sides: tuple[int, ...]

    @property
    def channels(self) -> int:
        """Of one of the maps it takes."""

    def build(self, precision: Precision, fresh: Callable[[], nn.Module]) -> Upsampler:
        """Ready to run, on the CPU; `fresh` makes the backbone anew. Raises `UpsamplerError` where weights don't fit."""

    def check(self, fresh: Callable[[], nn.Module], base: tuple[int, int], grid: tuple[int, int]) -> str:
        """Raises `UpsamplerError` where `base` cells can't be brought to `grid`, or weights don't fit the settings; whether
        they fit the backbone, `build` tells. Gives the digest: sha256 over the weights and the settings that aren't their
        defaults, for both change the features."""


@dataclass(frozen=True, kw_only=True)
class NetWeights:
    """Of a network that enlarges maps."""

    settings: NetConfig
    arrays: Mapping[str, np.ndarray]
    trained_sides: tuple[int, ...] = ()
    "of the images that it knows from training, in pixels; empty where the checkpoint doesn't say"

    @property
    def channels(self) -> int:
        return self.settings.channels

    def build(self, precision: Precision, fresh: Callable[[], nn.Module] | None = None) -> LearnedUpsampler:  # noqa: ARG002
        return learned_upsampler(asdict(self.settings), _tensors(self.arrays), precision)

    def check(self, fresh: Callable[[], nn.Module], base: tuple[int, int], grid: tuple[int, int]) -> str:
        built = self.build("fp32", fresh)
        built.passes(base, grid)
        return _digest(built.digest, self.settings)


@dataclass(frozen=True, kw_only=True)
class ViTUpWeights:
    """Of a ViT-Up: its head's and its adapter's arrays, under the names of the published files."""

    settings: ViTUpConfig
    arrays: Mapping[str, np.ndarray]
    trained_sides: tuple[int, ...] = ()
    "see `NetWeights`"

    @property
    def channels(self) -> int:
        return self.settings.channels

    def build(self, precision: Precision, fresh: Callable[[], nn.Module]) -> ViTUp:
        tensors = _tensors(self.arrays)
        lora = {name: tensors.pop(name) for name in list(tensors) if name.startswith("backbone.")}
        return ViTUp(self.settings, fresh(), tensors, lora, precision=precision)

    def check(self, fresh: Callable[[], nn.Module], base: tuple[int, int], grid: tuple[int, int]) -> str:  # noqa: ARG002
        # Any grid can be had, and what was read with `read_checkpoint` fits its settings: nothing needs to be built.
        return _digest(weights_digest(self.arrays), self.settings)


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _digest(weights: str, settings: NetConfig | ViTUpConfig) -> str:
    chosen = {f.name: value for f in fields(settings) if (value := getattr(settings, f.name)) != f.default}
    return hashlib.sha256(f"{weights} {json.dumps(chosen, sort_keys=True)}".encode()).hexdigest()


def load_upsampler(
    method: str,
    url: str,
    backbone: TimmBackbone,
    spec: FeatureSpec,
    *,
    storage_options: Mapping[str, Any] | None = None,
    force: bool = False,
) -> UpsamplerWeights:
    """The upsampler at `url` for `backbone`; `spec` is of the maps that it would be given.

    Raises `WeightsUnavailable`, and `UpsamplerError` for another method or (unless `force`) another backbone.
    """
    if not has_extension(url, *WEIGHT_FILES):
        pointers = read_pointers(Folder(url, storage_options))
        if pointers:
            url = f"{url.rstrip('/')}/{pointers.best or pointers.last}"
    shown = redact(url, storage_options)
    state = read_state_dict(url, storage_options)
    if has_extension(url, *WEIGHT_FILES):
        weights, made_for = _official(method, state, backbone, shown), None
    else:
        settings, made_for = _read_config(url, storage_options)
        if settings.get("method") != method:
            raise UpsamplerError(f"{shown} holds a {settings.get('method')}, not a {method}")
        weights = _with_settings(settings, state, backbone)
    if made_for is None:
        logger.warning("%s doesn't say which backbone and input size it was trained on; it is taken to be these", shown)
        return weights
    _require_same_features(shown, made_for, spec, force=force)
    return replace(weights, trained_sides=_trained_sides(method, made_for.get("size")))


def _trained_sides(method: str, size: Any) -> tuple[int, ...]:
    """x2 networks learn the maps of images from those of their halves, and those from the quarters' (LiFT's eq. 1)."""
    if type(size) is not int or size < 1:
        return ()
    return (size,) if method == "vit_up" else (size, size // 2, size // 4)


def unfamiliar_size(
    level: str, weights: UpsamplerWeights, size: tuple[int, int], base: tuple[int, int], patch: int
) -> str:
    """A sentence where `weights` are given maps of `base` cells, of inputs of `size` pixels, that they weren't trained on; else
    empty. `patch` is the backbone's, in pixels: in training, patches don't overlap."""
    known = {side: side // patch for side in weights.trained_sides}
    if not known or base in {(n, n) for n in known.values()}:
        return ""
    trained = ", ".join(f"{side} x {side} px ({n} x {n} cells)" for side, n in known.items())
    return (
        f"{level}: its upsampler was trained on images of {trained}; here it is given {size[0]} x {size[1]} px ({base[0]} x "
        f"{base[1]} cells), where it may be worse than bilinear enlargement"
    )


def _official(method: str, state: Mapping[str, Tensor], backbone: TimmBackbone, shown: str) -> UpsamplerWeights:
    """Of a file that holds weights alone: ViT-Up's (B9), or LiFT's, whose facets are head-minor (specs/lift_vitup.md A5)."""
    if method == "vit_up":
        return _vit_up(state, None, backbone)
    if method != "lift" or "outc.weight" not in state or state["outc.weight"].ndim != 4:
        raise UpsamplerError(
            f"{shown} holds weights without settings, which is understood of official files of LiFT (x2=lift:...pth) and "
            "ViT-Up only; give a folder with config.json and model.safetensors"
        )
    heads = None if backbone.facet == "token" else backbone.heads
    settings = {"method": "lift", "channels": len(state["outc.weight"]), "patch": backbone.patch, "heads": heads}
    return _with_settings(settings, state, backbone)


def _with_settings(
    settings: Mapping[str, Any], state: Mapping[str, Tensor], backbone: TimmBackbone
) -> UpsamplerWeights:
    """Raises `UpsamplerError` where settings are unknown or lacking."""
    if settings["method"] == "vit_up":
        return _vit_up(state, {name: value for name, value in settings.items() if name != "method"}, backbone)
    parsed = NetConfig.parse(settings)
    if backbone.ragged and parsed.method == "lift":
        parsed = replace(parsed, border_crop=True)
    return NetWeights(settings=parsed, arrays=_arrays(state))


def _vit_up(state: Mapping[str, Tensor], settings: Mapping[str, Any] | None, backbone: TimmBackbone) -> ViTUpWeights:
    if backbone.facet != "token" or not backbone.norm:
        raise UpsamplerError(
            "vit_up gives what the model gives after its final norm: use --facet token, and no --norm False"
        )
    config, head, lora = read_checkpoint(state, settings)
    return ViTUpWeights(settings=config, arrays=_arrays({**head, **lora}))


def _arrays(state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    # NumPy has no bfloat16, and what runs is cast anyway.
    plain = {name: value.float() if value.dtype == torch.bfloat16 else value for name, value in state.items()}
    return {name: value.numpy() for name, value in plain.items()}


def _read_config(url: str, options: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """`upsampler` and `backbone` of a folder's config.json."""
    folder = Folder(url, options)
    try:
        config = json.loads(folder.read("config.json"))
        return {**config["upsampler"]}, {**config["backbone"]}
    except FileNotFoundError:
        raise WeightsUnavailable(f"{folder.shown} has weights but no config.json, which says what they are") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise WeightsUnavailable(
            f"{folder.shown}/config.json is no upsampler's: {type(error).__name__}: {error}; it needs `upsampler` and `backbone`"
        ) from None


def _require_same_features(shown: str, made_for: JsonObject, here: FeatureSpec, *, force: bool) -> None:
    # Until weights' own config.json was read, networks were built as their name says.
    made_for = {"model_args": {}, **made_for}
    if unsaid := [name for name in FeatureSpec.names(Use.LEARNED_LATER) if name not in made_for]:
        logger.warning("%s doesn't say %s of what it was trained on; taken to be as here", shown, ", ".join(unsaid))
    known = {name: value for name, value in here.learned().items() if name not in unsaid}
    found = differences({name: made_for.get(name) for name in known}, known)
    if not found:
        return
    text = f"{shown} was trained on other features than it would be given:\n" + found.text("trained on", "used with")
    if not force:
        raise UpsamplerError(f"{text}\nUse the features it was trained on, or --force-upsampler.")
    logger.warning("%s", text)
