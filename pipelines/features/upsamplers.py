"""Learned upsamplers from where they are kept, held against the backbone that they are to be used with.

A checkpoint is a folder at any URL: `config.json` and `model.safetensors`; a training run's folder stands for its best one.
config.json holds `upsampler` (`method`, and the method's settings) and `backbone` (`FeatureSpec.learned`: what made the features
it was trained on). Official files hold weights alone; the rest is taken from the backbone that they are used with. A folder with
such a file as `pytorch_model.bin` and a config.json of `upsampler` alone is that file with some settings that aren't the usual.

`backbone` of a training run says `size` as well, the side of its images in pixels, and `sides`, those of all images whose maps
its network was given. Maps of another size are no mistake, since the papers have them, too; but how good they are nobody knows,
so it is said (`unfamiliar`), as is that a checkpoint was forced, or doesn't say what it was trained on.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from operators.backbone import TimmBackbone
from operators.timm_models import tensors_of, weights_digest
from operators.upsamplers import AnyMethod, Settings, Upsampler, UpsamplerError, find_method
from operators.upsamplers.protocol import Precision, Reload
from pipelines.features.weights import WEIGHT_FILES, WeightsUnavailable, read_config, read_state_dict
from storage.differences import differences
from storage.documents import JsonObject, JsonValue
from storage.paths import Folder, StorageOptions, has_extension
from storage.redaction import redact
from storage.runs import NamedCheckpoint, named_checkpoint
from storage.spec import FeatureSpec, Use

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class UpsamplerWeights:
    """A learned upsampler as it is handed to workers, by name and as plain values: a user's module is imported where it runs."""

    method: str
    settings: JsonObject
    "the method's, as a checkpoint has them"
    arrays: Mapping[str, np.ndarray]
    trained_sides: tuple[int, ...] = ()
    "of the images that it knows from training, in pixels; empty where the checkpoint doesn't say"
    step: str = ""
    "in words, which of its run's steps it is, where a run was named"
    instead: str = ""
    "in words, which of its settings are others than its checkpoint's"
    remark: str = ""
    "a sentence on what it was trained on, where that isn't known to be what it is given, or known not to be"

    @classmethod
    def of(cls, method: AnyMethod, settings: Settings, state: Mapping[str, Tensor]) -> "UpsamplerWeights":
        """Of a method's settings and a state dict."""
        arrays = {name: tensor.detach().numpy() for name, tensor in state.items()}
        return cls(method=method.name, settings=method.to_json(settings), arrays=arrays)

    def _found(self) -> tuple[AnyMethod, Settings]:
        method = find_method(self.method)
        return method, method.parse(self.settings)

    def changed(self, backbone: TimmBackbone, given: JsonObject, displayed: str) -> "UpsamplerWeights":
        """With other values of some settings (`Method.changed`). Raises `UpsamplerError`; whose they are, `displayed` says."""
        if not given:
            return self
        method, before = self._found()
        try:
            settings = method.to_json(method.changed(before, backbone, given))
        except UpsamplerError as error:
            raise UpsamplerError(f"{displayed}: {error}") from None
        was = method.to_json(before)
        others = (f"{name} {settings[name]}, not {was[name]}" for name in method.changeable if settings[name] != was[name])
        return replace(self, settings=settings, instead=", ".join(others))

    @property
    def state(self) -> dict[str, Tensor]:
        """The arrays as tensors, which share their memory."""
        return tensors_of(self.arrays)

    @property
    def channels(self) -> int | None:
        """Of the maps it takes, several layers' stacked; None: of any number."""
        return getattr(self._found()[1], "channels", None)

    @property
    def parameters(self) -> int:
        """How many there are beside the backbone's."""
        method, settings = self._found()
        return method.parameters(settings, self.state)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 over the weights and the settings that aren't their defaults, for both change the features."""
        method, settings = self._found()
        chosen = json.dumps(method.identity(settings), sort_keys=True)
        return hashlib.sha256(f"{weights_digest(self.arrays)} {chosen}".encode()).hexdigest()

    def require_grid(self, base: tuple[int, int], grid: tuple[int, int]) -> None:
        """Raise `UpsamplerError` where maps of `base` cells can't be brought to `grid`."""
        method, settings = self._found()
        method.require_grid(settings, base, grid)

    def build(self, precision: Precision, reload: Reload) -> Upsampler:
        """Ready to run, on the CPU; `reload` makes the backbone anew. Raises `UpsamplerError` where weights don't fit."""
        method, settings = self._found()
        return method.build(settings, self.state, precision, reload)


def load_upsampler(
    method: str,
    url: str,
    backbone: TimmBackbone,
    spec: FeatureSpec,
    storage_options: StorageOptions | None = None,
    *,
    force: bool = False,
    settings: Sequence[tuple[str, JsonValue]] = (),
) -> UpsamplerWeights:
    """The upsampler at `url` for `backbone`; `spec` is of the maps that it would be given, `settings` those that are to be
    others than the checkpoint's.

    Raises `WeightsUnavailable`, and `UpsamplerError` for another method or (unless `force`) another backbone.
    """
    named = NamedCheckpoint(url=url) if has_extension(url, *WEIGHT_FILES) else named_checkpoint(url, storage_options)
    url = named.url
    displayed = redact(url, storage_options)
    state = read_state_dict(url, storage_options)
    saved = made_for = None
    if not has_extension(url, *WEIGHT_FILES):
        folder = Folder(url, storage_options)
        config = read_config(folder, "upsampler")
        saved, made_for = config["upsampler"], _made_for(config, folder)
    if saved is not None and saved.get("method") != method:
        raise UpsamplerError(f"{displayed} holds a {saved.get('method')}, not a {method}")
    weights = _read_weights(method, saved, state, backbone, displayed, official=made_for is None)
    weights = replace(weights.changed(backbone, dict(settings), displayed), step=named.step)
    if made_for is None:
        logger.warning("%s doesn't say which backbone and input size it was trained on; it is taken to be these", displayed)
        return replace(weights, remark="its upsampler's file doesn't say what it was trained on; taken to be these features")
    weights = replace(weights, remark=_require_same_features(displayed, made_for, spec, force=force))
    return replace(weights, trained_sides=_trained_sides(made_for, find_method(method)))


def _trained_sides(made_for: JsonObject, method: AnyMethod) -> tuple[int, ...]:
    """Of the images whose maps the network knows from training, in pixels; earlier versions have the largest alone, as `size`."""
    size = made_for.get("size")
    sides = made_for.get("sides", [size // factor for factor in method.trained_factors] if type(size) is int else [])
    return tuple(sides) if isinstance(sides, list) and all(type(side) is int and side > 0 for side in sides) else ()


def _read_weights(
    name: str, given: JsonObject | None, state: Mapping[str, Tensor], backbone: TimmBackbone, displayed: str, *, official: bool
) -> UpsamplerWeights:
    # NumPy has no bfloat16, and what runs is cast anyway.
    plain = {key: value.float() if value.dtype == torch.bfloat16 else value for key, value in state.items()}
    method = find_method(name)
    try:
        if official and given is not None:  # says what is to be otherwise than the file does
            method.require_own(plain)
            told, plain = method.official(plain, backbone)
            given = {**told, **given}
        return UpsamplerWeights.of(method, *method.read(plain, given, backbone))
    except UpsamplerError as error:
        raise UpsamplerError(f"{displayed}: {error}") from None


def unfamiliar(level: str, weights: UpsamplerWeights, size: tuple[int, int], base: tuple[int, int], patch: int) -> list[str]:
    """Sentences where `weights` are given features, or maps of `base` cells, of inputs of `size` pixels, that they weren't, or
    may not have been, trained on. `patch` is the backbone's, in pixels: in training, patches don't overlap."""
    said = [f"{level}: {weights.remark}"] if weights.remark else []
    if weights.instead:
        said.append(f"{level}: its upsampler has other settings than its checkpoint was trained with: {weights.instead}")
    known = {side: side // patch for side in weights.trained_sides}
    if not known or base in {(n, n) for n in known.values()}:
        return said
    trained = ", ".join(f"{side} x {side} px ({n} x {n} cells)" for side, n in known.items())
    return [
        *said,
        f"{level}: its upsampler was trained on images of {trained}; here it is given {size[0]} x {size[1]} px ({base[0]} x "
        f"{base[1]} cells), where it may be worse than bilinear enlargement",
    ]


def _made_for(config: JsonObject, folder: Folder) -> JsonObject | None:
    """`backbone` of a folder's config.json; None where it is beside an official file, which doesn't say. Raises
    `WeightsUnavailable`."""
    made_for = config.get("backbone")
    if "backbone" not in config and not folder.exists("model.safetensors"):
        return None
    if not isinstance(made_for, Mapping):
        raise WeightsUnavailable(
            f"{folder.displayed} is no trained upsampler: its config.json doesn't say under `backbone` what it was trained on"
        )
    return made_for


def _require_same_features(displayed: str, made_for: JsonObject, here: FeatureSpec, *, force: bool) -> str:
    """A sentence where the features aren't those, and it was forced; else empty. Raises `UpsamplerError`."""
    # Until weights' own config.json was read, networks were built as their name says.
    made_for = {"model_args": {}, **made_for}
    if unsaid := [name for name in FeatureSpec.names(Use.LEARNED_LATER) if name not in made_for]:
        logger.warning("%s doesn't say %s of what it was trained on; taken to be as here", displayed, ", ".join(unsaid))
    known = {name: value for name, value in here.learned().items() if name not in unsaid}
    found = differences({name: made_for.get(name) for name in known}, known)
    if not found:
        return ""
    text = f"{displayed} was trained on other features than it would be given:\n" + found.text("trained on", "used with")
    if not force:
        raise UpsamplerError(f"{text}\nUse the features it was trained on, or --force-upsampler.")
    logger.warning("%s", text)
    return f"its upsampler was trained on other features (--force-upsampler): {found.line('then', 'here')}"
