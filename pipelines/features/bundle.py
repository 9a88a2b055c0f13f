"""From the names of settings to what workers build a model from: weights read and hashed once, and the `FeatureSpec` of them."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from operators.backbone import TimmBackbone
from operators.timm_models import state_arrays, weights_digest
from pipelines.features.config import BackboneConfig, FeatureConfig
from pipelines.features.descriptions import ModelDescription
from pipelines.features.levels import parse_levels, resolve_level
from pipelines.features.model import FeatureModel
from pipelines.features.model_bundle import ModelBundle, backbone_of
from pipelines.features.upsamplers import load_upsampler
from pipelines.features.weights import WeightsChoice, best_of_run, load_described, read_description
from storage.paths import StorageOptions
from storage.spec import FeatureSpec


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """What settings name, loaded: the model with its weights, and what these say."""

    model: nn.Module
    size: tuple[int, int]
    "of the input that it was made for"
    source: Literal["pretrained", "file", "random"]
    description: ModelDescription


def load_settings(
    features: BackboneConfig,
    size: tuple[int, int] | None,
    options: StorageOptions | None = None,
    description: ModelDescription | None = None,
) -> LoadedModel:
    """The model for inputs of `size` (None: its own); `description` where the caller has it already.

    Raises `BackboneError`, `WeightsUnavailable` or `ConfigError`.
    """
    weights = best_of_run(features.model, WeightsChoice.parse(features.weights), options)
    description = description or read_description(features.model, weights, options)
    size = size or description.expects.size
    model, description = load_described(features.model, size, weights, features.revision, options, description)
    return LoadedModel(model=model, size=size, source=weights.source, description=description)


def load_bundle(features: FeatureConfig, options: StorageOptions | None = None) -> tuple[ModelBundle, FeatureModel]:
    """What workers build the model from that settings name, and the model. Raises `BackboneError`, `UpsamplerError`,
    `WeightsUnavailable` or `ConfigError`."""
    parse_levels(features.levels, features.encoding)  # what is wrong there is wrong before anything is fetched
    return describe_model(features, load_settings(features, features.input_size, options), options)


def describe_model(
    features: FeatureConfig, loaded: LoadedModel, options: StorageOptions | None = None
) -> tuple[ModelBundle, FeatureModel]:
    """Resolve every default against the loaded model, which is taken over; returns what workers get, and the model ready on the
    CPU. `features.size` is for nothing here: the model was made for its size.

    Raises `BackboneError`, `UpsamplerError` or `ConfigError`."""
    levels = parse_levels(features.levels, features.encoding)
    # Before the backbone touches it: stride and grid replace position embeddings.
    arrays = {key: value.copy() for key, value in state_arrays(loaded.model).items()}
    backbone = backbone_of(loaded.model, features, loaded.description.expects, ragged=features.ragged)
    spec = _spec(features, loaded, backbone, weights_digest(arrays))
    backbone.try_out(features.model, spec.input_size, spec.layers)
    # Levels of one method, URL and settings share theirs.
    places = dict.fromkeys(choice.upsampler for choice in levels if choice.url)
    force = features.force_upsampler
    loaded_once = {
        (method, url, settings): load_upsampler(method, url, backbone, spec, options, force=force, settings=settings)
        for method, url, settings in places
    }
    learned = {each.name: loaded_once[each.upsampler] for each in levels if each.url}
    resolved = tuple(
        resolve_level(choice, backbone, spec.input_size, len(spec.layers), learned.get(choice.name)) for choice in levels
    )
    bundle = ModelBundle(spec=replace(spec, levels=resolved), arrays=arrays, upsamplers=learned)
    return bundle, FeatureModel(bundle.spec, backbone, torch.device("cpu"), learned, bundle.reload)


def _spec(features: FeatureConfig, loaded: LoadedModel, backbone: TimmBackbone, digest: str) -> FeatureSpec:
    """What the features are, but for the levels. Raises `BackboneError` for layers that the backbone hasn't."""
    expects = loaded.description.expects
    return FeatureSpec(
        model=features.model,
        weights=digest,
        weights_source=loaded.source,
        layers=tuple(backbone.resolve_layers(features.layers)),
        facet=features.facet,
        norm=backbone.norm,
        stride=backbone.stride,
        pos_embed=backbone.pos_embed,
        input_size=loaded.size,
        geometry=features.geometry,
        crop_pct=features.crop_pct if features.geometry == "crop" else 1.0,
        interpolation=expects.interpolation,
        mean=expects.mean,
        std=expects.std,
        precision=features.precision,
        jpeg_draft=features.jpeg_draft,
        levels=(),
        model_args=dict(loaded.description.model_args),
        jpeg_decoder=features.jpeg_decoder,
    )
