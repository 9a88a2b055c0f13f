"""Settings of features beside stores, whose features are there already: those that were given agree with them, or are refused;
those that weren't are the store's, and results say so."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from operators.backbone import TimmBackbone
from operators.timm_models import create_model, state_arrays, weights_digest
from pipelines.config import ConfigError, JobConfig, flag_of, settings_of
from pipelines.features.bundle import load_settings
from pipelines.features.config import BackboneConfig
from pipelines.features.levels import LevelChoice, level_name
from pipelines.features.upsamplers import load_upsampler
from pipelines.features.weights import WeightsChoice
from storage.differences import Difference, Differences
from storage.documents import JsonValue
from storage.paths import StorageOptions
from storage.redaction import redact
from storage.spec import FeatureSpec, Level
from storage.store import FeatureStore

_AS_THEY_ARE = ("facet", "norm", "stride", "pos_embed", "precision")
"""Settings that are fields of a spec."""

_BESIDE_NO_STORE = {
    "revision": "a store has the digest of its weights, and doesn't tell of which revision they were",
    "force_upsampler": "its upsampled maps are finished",
}
"""Settings that can't be held against a store, and why."""


@dataclass(frozen=True, kw_only=True)
class AskedFeatures:
    """What was said of features, as opposed to what has its default."""

    settings: Mapping[str, Any]
    "values by name (pipelines/features/config.py)"
    options: StorageOptions

    @classmethod
    def of(cls, config: JobConfig, **others: object) -> "AskedFeatures":
        """The settings of a job's `features` that were given, and `others` that say the same otherwise."""
        known = settings_of(type(config)).items()
        given = {name: each.of(config) for name, each in known if each.path[0] == "features" and config.is_given(name)}
        return cls(settings={**given, **others}, options=config.options)

    def require(self, store: FeatureStore, flag: str) -> None:
        """Raises `ConfigError` where the store that `flag` names holds other features than these; `BackboneError`,
        `WeightsUnavailable` and `UpsamplerError` where what the settings name can't be had."""
        for name, why in _BESIDE_NO_STORE.items():
            if self.settings.get(name):
                raise ConfigError(f"{flag_of(name)} beside {flag} {store.folder.displayed}: {why}; leave it out")
        if found := self.differences(store.spec):
            text = found.text("store", "asked")
            raise ConfigError(
                f"{flag} {store.folder.displayed} holds other features than were asked for:\n{text}\nLeave these settings out to "
                f"have the store's, or name another store"
            )

    def differences(self, spec: FeatureSpec) -> Differences:
        """Where features of `spec` are others. Raises what `require` raises for settings that name nothing."""
        # Of another model, neither blocks nor weights are the same things.
        return Differences(found=tuple(self._model(spec)) or tuple(self._all_else(spec)))

    def _model(self, spec: FeatureSpec) -> Iterator[Difference]:
        if self.settings.get("model", spec.model) != spec.model:
            yield Difference(field="model", there=spec.model, here=self.settings["model"])

    def _all_else(self, spec: FeatureSpec) -> Iterator[Difference]:
        for name in _AS_THEY_ARE:
            asked, there = self.settings.get(name, ...), getattr(spec, name)
            if asked is None:  # what suits the model
                asked = getattr(_network(spec, **{name: None}), name)
            if asked not in (..., there):
                yield Difference(field=name, there=there, here=asked)
        yield from self._layers(spec)
        yield from self._placed(spec)
        yield from self._levels(spec)
        yield from self._weights(spec)

    def _layers(self, spec: FeatureSpec) -> Iterator[Difference]:
        asked = self.settings.get("layers")
        if asked and min(asked) < 0:
            asked = _network(spec).resolve_layers(asked)
        if asked and tuple(asked) != spec.layers:
            yield Difference(field="layers", there=list(spec.layers), here=list(self.settings["layers"]))

    def _placed(self, spec: FeatureSpec) -> Iterator[Difference]:
        side = self.settings.get("size")
        if side is not None and (side, side) != spec.input_size:
            yield Difference(field="size", there="x".join(map(str, spec.input_size)), here=side)
        if self.settings.get("ragged") is False and _is_ragged(spec):
            yield Difference(field="ragged", there=True, here=False)

    def _levels(self, spec: FeatureSpec) -> Iterator[Difference]:
        there = {level.name: level for level in spec.levels}
        encoding, asked = self.settings.get("encoding"), self.settings.get("levels", ())
        own = {level_name(text) for text in asked if re.search("@[^@/:]*$", text)}
        for level in there.values():
            if encoding and level.grid and level.encoding != encoding and level.name not in own:
                yield Difference(field=f"{level.name}.encoding", there=level.encoding, here=encoding)
        for text in asked:
            name = level_name(text)
            if name not in there:
                yield Difference(field="levels", there=list(there), here=redact(text, self.options))
            elif not self._is_level(LevelChoice.parse(text, there[name].encoding, there), there[name], spec):
                level = there[name]
                stored = f"{level.scale}={level.method}" if level.scale else level.method
                yield Difference(field=name, there=f"{stored}@{level.encoding}", here=redact(text, self.options))

    def _is_level(self, choice: LevelChoice, level: Level, spec: FeatureSpec) -> bool:
        """A name alone stands for whatever the store calls so."""
        if choice.method not in ("", level.method) or choice.encoding != level.encoding or choice.own_scale != level.scale:
            return False
        if not choice.url:
            return True
        network, settings = _network(spec), choice.settings
        learned = load_upsampler(choice.method, choice.url, network, spec, self.options, force=True, settings=settings)
        return learned.digest == level.digest

    def _weights(self, spec: FeatureSpec) -> Iterator[Difference]:
        asked = self.settings.get("weights")
        if asked is None:
            return
        if WeightsChoice.parse(asked).source == "pretrained":  # loading them to compare might mean fetching them
            if spec.weights_source != "pretrained":
                yield Difference(field="weights", there=spec.weights_source, here=asked)
            return
        loaded = load_settings(BackboneConfig(model=spec.model, weights=asked), spec.input_size, self.options)
        digest = weights_digest(state_arrays(loaded.model))
        if digest != spec.weights:
            there, here = f"{spec.weights_source} {spec.weights[:12]}…", f"{redact(asked, self.options)} {digest[:12]}…"
            yield Difference(field="weights", there=there, here=here)


def _network(spec: FeatureSpec, **others: None) -> TimmBackbone:
    """The backbone without weights, to ask it of its shape, and of what suits it where one of `others` is None."""
    with torch.device("meta"):
        model = create_model(spec.model, spec.input_size, None, None, spec.model_args)
    settings = {name: getattr(spec, name) for name in _AS_THEY_ARE if name != "precision"}
    return TimmBackbone(model, ragged=_is_ragged(spec), **{**settings, **others})


def _is_ragged(spec: FeatureSpec) -> bool:
    """Whether patches leave pixels of the input over."""
    for level in spec.levels:
        if level.grid is None or level.start is None or level.step is None:
            continue
        axes = zip(level.start, level.grid, level.step, spec.input_size, strict=True)
        # The first and the last centre of what patches cover lie as far from its sides.
        return any(2 * start + (cells - 1) * step < side - 1e-6 for start, cells, step, side in axes)
    return False


def recorded(config: JobConfig, stores: Sequence[FeatureStore]) -> dict[str, JsonValue]:
    """A job's settings as documents have them: where features are read from `stores`, the settings that make features are those
    that made the first one's (the model's own defaults resolved), not what nothing used."""
    public = config.public()
    if not stores:
        return public
    made = {**(stores[0].root.config or {}), **_said_by(stores[0].spec)}
    return public | {name: made.get(name) for name, each in settings_of(type(config)).items() if each.path[0] == "features"}


def _said_by(spec: FeatureSpec) -> dict[str, JsonValue]:
    said = spec.to_json()
    height, width = spec.input_size
    return {
        **{name: said[name] for name in ("model", "layers", *_AS_THEY_ARE)},
        "size": height if height == width else f"{height}x{width}",
    }
