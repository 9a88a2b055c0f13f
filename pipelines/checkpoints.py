"""Learned upsamplers from where they are kept, held against the backbone that they are to be used with.

A checkpoint is a folder at any URL: `config.json` and `model.safetensors`; a training run's folder stands for its best one.
config.json holds `upsampler` (the settings of `operators.upsamplers.learned.NetConfig`) and `backbone` (TRAINED_ON: what made
the features it was trained on). Official LiFT files (`.pth`) hold weights alone; the rest is taken from the backbone they are
used with.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch

from operators.backbone import TimmBackbone
from operators.upsamplers import LearnedUpsampler, NetConfig, UpsamplerError, learned_upsampler
from pipelines.weights import WEIGHT_FILES, WeightsUnavailable, read_state_dict
from storage.checkpoints import read_pointers
from storage.paths import Folder, has_extension, redact

logger = logging.getLogger(__name__)

TRAINED_ON = ("model", "weights", "layers", "facet", "norm")
"""What must be the same of the backbone for an upsampler to make sense (LiFT, arXiv 2403.14625, Table 7)."""


@dataclass(frozen=True, kw_only=True)
class UpsamplerWeights:
    """A learned upsampler as it is handed to workers: its settings and its arrays."""

    settings: NetConfig
    arrays: Mapping[str, np.ndarray]

    def build(self, precision: Literal["bf16", "fp16", "fp32"]) -> LearnedUpsampler:
        """Ready to run, on the CPU. Raises `UpsamplerError` where weights and settings don't fit."""
        state = {name: torch.from_numpy(array) for name, array in self.arrays.items()}
        return learned_upsampler(asdict(self.settings), state, precision)

    def digest(self, built: LearnedUpsampler) -> str:
        """sha256 over the weights and the settings that aren't their defaults: both change the features."""
        chosen = {f.name: value for f in fields(NetConfig) if (value := getattr(self.settings, f.name)) != f.default}
        return hashlib.sha256(f"{built.digest} {json.dumps(chosen, sort_keys=True)}".encode()).hexdigest()


def load_upsampler(
    method: str,
    url: str,
    backbone: TimmBackbone,
    described: Mapping[str, Any],
    *,
    storage_options: Mapping[str, Any] | None = None,
    force: bool = False,
) -> UpsamplerWeights:
    """The upsampler at `url` for `backbone`; `described` are the values of TRAINED_ON here.

    Raises `WeightsUnavailable`, and `UpsamplerError` for another method or (unless `force`) another backbone.
    """
    if not has_extension(url, *WEIGHT_FILES):
        pointers = read_pointers(Folder(url, storage_options))
        if pointers:
            url = f"{url.rstrip('/')}/{pointers.best or pointers.last}"
    shown = redact(url, storage_options)
    state = read_state_dict(url, storage_options)
    if has_extension(url, *WEIGHT_FILES):
        settings, trained_on = _official_settings(method, state, backbone, shown), None
    else:
        settings, trained_on = _read_config(url, storage_options)
    if settings.method != method:
        raise UpsamplerError(f"{shown} holds a {settings.method}, not a {method}")
    if trained_on is None:
        logger.warning("%s doesn't say which backbone it was trained on; it is taken to be this one", shown)
    else:
        _require_same_backbone(shown, trained_on, described, force=force)
    if backbone.ragged and method == "lift":
        settings = replace(settings, border_crop=True)
    # NumPy has no bfloat16, and what runs is cast anyway.
    plain = {name: value.float() if value.dtype == torch.bfloat16 else value for name, value in state.items()}
    return UpsamplerWeights(settings=settings, arrays={name: value.numpy() for name, value in plain.items()})


def _official_settings(method: str, state: Mapping[str, torch.Tensor], backbone: TimmBackbone, shown: str) -> NetConfig:
    """Settings of a file that holds weights alone: of LiFT, whose facets are head-minor (specs/lift_vitup.md A5)."""
    if method != "lift" or "outc.weight" not in state or state["outc.weight"].ndim != 4:
        raise UpsamplerError(
            f"{shown} holds weights without settings, which is understood of official LiFT files only (x2=lift:...pth); "
            "give a folder with config.json and model.safetensors"
        )
    heads = None if backbone.facet == "token" else backbone.heads
    return NetConfig(method="lift", channels=len(state["outc.weight"]), patch=backbone.patch, heads=heads)


def _read_config(url: str, options: Mapping[str, Any] | None) -> tuple[NetConfig, dict[str, Any]]:
    """`upsampler` and `backbone` of a folder's config.json."""
    folder = Folder(url, options)
    try:
        config = json.loads(folder.read("config.json"))
        return NetConfig.parse({**config["upsampler"]}), {**config["backbone"]}
    except FileNotFoundError:
        raise WeightsUnavailable(f"{folder.shown} has weights but no config.json, which says what they are") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise WeightsUnavailable(
            f"{folder.shown}/config.json is no upsampler's: {type(error).__name__}: {error}; it needs `upsampler` and `backbone`"
        ) from None


def _require_same_backbone(shown: str, trained_on: Mapping[str, Any], here: Mapping[str, Any], *, force: bool) -> None:
    differences = [
        f"  {name:<8} trained on {trained_on.get(name)}, used with {here[name]}"
        for name in TRAINED_ON
        if trained_on.get(name) != here[name]
    ]
    if not differences:
        return
    text = f"{shown} was trained on other features than it would be given:\n" + "\n".join(differences)
    if not force:
        raise UpsamplerError(f"{text}\nUse the features it was trained on, or --force-upsampler.")
    logger.warning("%s", text)
