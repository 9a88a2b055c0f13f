"""From the names of settings to what workers build a model from: weights read and hashed once, and the `FeatureSpec` of them.

The driver hands the same arrays to every worker: they cross the network once per node, and what was hashed is what runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn

from operators.backbone import (
    Preprocessing,
    TimmBackbone,
    create_model,
    load_arrays,
    state_arrays,
)
from pipelines.config import ConfigError
from pipelines.features.descriptions import ModelDescription
from pipelines.features.levels import LevelChoice, resolve_level
from pipelines.features.model import FeatureModel
from pipelines.features.upsamplers import (
    UpsamplerWeights,
    described_by,
    load_upsampler,
    trained_on,
    unfamiliar_size,
)
from pipelines.features.weights import WeightsChoice, load_model, read_description
from storage.spec import FeatureSpec


@dataclass(frozen=True, kw_only=True)
class ModelBundle:
    """All a worker needs to build the model: the spec and the arrays of its weights."""

    spec: FeatureSpec
    arrays: Mapping[str, np.ndarray]
    upsamplers: Mapping[str, UpsamplerWeights] = field(default_factory=dict)
    "learned ones, by level"

    def build(self, device: str) -> FeatureModel:
        spec = self.spec
        backbone = TimmBackbone(
            self.reload(),
            facet=spec.facet,
            norm=spec.norm,
            stride=spec.stride,
            pos_embed=spec.pos_embed,
            ragged=any(side % spec.stride for side in spec.input_size),
        )
        return FeatureModel(spec, backbone, torch.device(device), self.upsamplers, self.reload)

    def reload(self) -> nn.Module:
        """The timm model with its own position embeddings, which a backbone in use has replaced."""
        return fresh_model(self.spec.model, self.spec.input_size, self.arrays, self.spec.model_args)

    def unfamiliar(self, spec: FeatureSpec, patch: int) -> list[str]:
        """Sentences, one for each learned level of `spec` (this one's, or of other input) whose maps are of a size that its
        upsampler wasn't trained on; `patch` is the backbone's, in pixels."""
        base = cells(spec.input_size, patch, spec.stride)
        told = {lv.name: self.upsamplers[lv.name] for lv in spec.levels if lv.name in self.upsamplers}
        notes = [unfamiliar_size(name, weights, spec.input_size, base, patch) for name, weights in told.items()]
        return [note for note in notes if note]


def fresh_model(
    name: str, size: tuple[int, int], arrays: Mapping[str, np.ndarray], model_args: Mapping[str, Any] | None = None
) -> nn.Module:
    """timm's model with the arrays of its weights, whatever a backbone has made of another one of them."""
    return load_arrays(create_model(name, size, None, None, model_args), arrays)


def cells(size: tuple[int, int], patch: int, stride: int) -> tuple[int, int]:
    """(rows, columns) of a backbone's map."""
    return (size[0] - patch) // stride + 1, (size[1] - patch) // stride + 1


class ModelSettings(Protocol):
    """What settings that name a model have in common: `ExtractConfig`'s and `EvaluateConfig`'s, documented there."""

    model: str
    weights: str
    revision: str | None
    layers: tuple[int, ...]
    facet: Literal["token", "key", "query", "value"]
    norm: bool | None
    stride: int | None
    pos_embed: Literal["timm", "dino"] | None
    precision: Literal["bf16", "fp16", "fp32"]
    levels: tuple[str, ...]
    encoding: str
    force_upsampler: bool

    @property
    def options(self) -> dict[str, Any]: ...


def load_described(
    settings: ModelSettings,
    size: tuple[int, int] | None,
    *,
    ragged: bool = False,
    geometry: Literal["crop", "squash", "pad"] = "squash",
    crop_pct: float = 1.0,
    jpeg_draft: bool = False,
    described: ModelDescription | None = None,
    loaded: nn.Module | None = None,
) -> tuple[ModelBundle, FeatureModel]:
    """The model of some settings for inputs of `size` (None: its own), as `describe_model` gives it.

    `described`, `loaded`: what its weights say, and the model for that size with them, where the caller has them already;
    the model is taken over.
    Raises `BackboneError`, `UpsamplerError`, `WeightsUnavailable` or `ConfigError`.
    """
    levels = [LevelChoice.parse(text, settings.encoding) for text in settings.levels]
    weights = WeightsChoice.parse(settings.weights)
    described = described or read_description(settings.model, weights, settings.options)
    size = size or described.expects.size
    if loaded is None:
        loaded = load_model(settings.model, size, weights, settings.revision, settings.options, described)
    return describe_model(
        name=settings.model,
        model=loaded,
        weights_source=weights.source,
        layers=settings.layers,
        facet=settings.facet,
        norm=settings.norm,
        stride=settings.stride,
        pos_embed=settings.pos_embed,
        ragged=ragged,
        size=size,
        expects=described.expects,
        model_args=described.model_args,
        geometry=geometry,
        crop_pct=crop_pct,
        precision=settings.precision,
        jpeg_draft=jpeg_draft,
        levels=levels,
        storage_options=settings.options,
        force_upsampler=settings.force_upsampler,
    )


def describe_model(
    *,
    name: str,
    model: torch.nn.Module,
    weights_source: Literal["pretrained", "file", "random"],
    layers: Sequence[int],
    facet: Literal["token", "key", "query", "value"],
    norm: bool | None,
    stride: int | None,
    pos_embed: Literal["timm", "dino"] | None,
    ragged: bool,
    size: tuple[int, int],
    expects: Preprocessing,
    geometry: Literal["crop", "squash", "pad"],
    crop_pct: float,
    precision: Literal["bf16", "fp16", "fp32"],
    jpeg_draft: bool,
    levels: Sequence[LevelChoice],
    storage_options: Mapping[str, Any] | None = None,
    force_upsampler: bool = False,
    model_args: Mapping[str, Any] | None = None,
) -> tuple[ModelBundle, FeatureModel]:
    """Resolve every default against the loaded model; returns what workers get, and the model ready on the CPU.

    Raises `BackboneError`, `UpsamplerError` or `ConfigError`."""
    # Before the backbone touches it: stride and grid replace position embeddings.
    arrays = {key: value.copy() for key, value in state_arrays(model).items()}
    backbone = TimmBackbone(model, facet=facet, norm=norm, stride=stride, pos_embed=pos_embed, ragged=ragged)
    found = trained_on(name, arrays, backbone, layers)
    spec = FeatureSpec(
        model=name,
        weights=found["weights"],
        weights_source=weights_source,
        layers=tuple(found["layers"]),
        facet=facet,
        norm=backbone.norm,
        stride=backbone.stride,
        pos_embed=backbone.pos_embed,
        input_size=size,
        geometry=geometry,
        crop_pct=crop_pct,
        interpolation=expects.interpolation,
        mean=expects.mean,
        std=expects.std,
        precision=precision,
        jpeg_draft=jpeg_draft,
        levels=(),
        model_args=dict(model_args or {}),
    )
    learned = _load_upsamplers(levels, backbone, spec, storage_options, force=force_upsampler)
    reload = partial(fresh_model, name, size, arrays, spec.model_args)
    resolved = tuple(
        resolve_level(choice, backbone, size, len(spec.layers), learned.get(choice.name)) for choice in levels
    )
    if len({level.name for level in resolved}) != len(resolved) or not resolved:
        raise ConfigError(
            f"--levels must be different ones, at least one; got {' '.join(level.name for level in resolved)}"
        )
    bundle = ModelBundle(spec=replace(spec, levels=resolved), arrays=arrays, upsamplers=learned)
    return bundle, FeatureModel(bundle.spec, backbone, torch.device("cpu"), learned, reload)


def _load_upsamplers(
    levels: Sequence[LevelChoice],
    backbone: TimmBackbone,
    spec: FeatureSpec,
    options: Mapping[str, Any] | None,
    *,
    force: bool,
) -> dict[str, UpsamplerWeights]:
    """By level; levels of one method and URL share theirs."""
    here = described_by(spec)
    checkpoints = {
        place: load_upsampler(*place, backbone, here, storage_options=options, force=force)
        for place in dict.fromkeys((choice.method, choice.url) for choice in levels if choice.url)
    }
    return {choice.name: checkpoints[choice.method, choice.url] for choice in levels if choice.url}
