"""What weights say of themselves: the config.json that timm writes beside them, held against the model that is asked for.

timm's own loading of such a folder (`local-dir:`) is followed: its statistics, and its arguments of the network. What
contradicts the name, or isn't timm's, is refused, since features of other statistics look right and are wrong.
"""

import inspect
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from operators.backbone import BackboneError
from operators.lean_timm import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, timm
from operators.official_weights import OfficialWeights
from operators.timm_models import Preprocessing, Undrawn, preprocessing
from operators.vitdet import named as vitdet
from operators.vitdet.settings import DetectorError, DetectorSettings
from storage.documents import JsonObject
from storage.paths import Folder, StorageError

logger = logging.getLogger(__name__)

CONFIG = "config.json"

INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "nearest")
"""That images can be brought to a size by (operators/image.py)."""

_WITHOUT_EFFECT = {
    "num_classes", "in_chans", "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "pretrained", "weight_init",
    "fix_init", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate",
}  # fmt: skip
"""Arguments that a frozen network's features don't depend on, or that the run decides: its classifier and its input's size."""

_NOT_THE_NETWORKS = {*inspect.signature(timm.create_model).parameters, "features_only", "out_indices", "feature_cls"}
"""Arguments of timm's factory that read other files, or wrap the network in something else."""


class Unreadable(BackboneError):
    """A file beside the weights says nothing that could be used; the message says why."""


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """A timm model, and the input that its weights expect."""

    name: str
    expects: Preprocessing
    model_args: Mapping[str, Any] = field(default_factory=dict)
    "timm's, JSON values, where the network isn't built as the name alone says"
    source: str = ""
    "the config.json that says so, as it may be printed; empty: timm's own of that name"
    family: str = ""
    "of backbones that the weights are of, where their file tells it"


def describe_weights(name: str, folder: Folder, *, is_file: bool) -> ModelDescription:
    """What the files in `folder` say of the weights there, for the timm model `name`; what timm says where there are none.

    `is_file`: the user named a file, whose folder may hold anything: what can't be used of it is a warning, not an error.
    Raises `BackboneError` for another architecture than `name`'s, statistics or arguments that can't be honoured, files that
    contradict each other, and (`Unreadable`) a config.json that is damaged or not timm's.
    """
    own = ModelDescription(name=name, expects=preprocessing(name))
    try:
        config = _read(folder, CONFIG)
        description = own if config is None else _description_in(name, config, f"{folder.displayed}/{CONFIG}")
        _require_agreement(description, folder)
    except Unreadable as error:
        if not is_file:
            raise Unreadable(
                f"{error}. Put timm's config.json there (timm.models.save_for_hf writes one), or give --weights the file "
                f"itself: then the input is {name}'s own"
            ) from None
        logger.warning("%s; the input is %s's own", error, name)
        return own
    if description.expects != own.expects:
        logger.info("%s says what the input is: %s", description.source, description.expects)
    return description


def describe_official(
    description: ModelDescription, official: OfficialWeights
) -> tuple[ModelDescription, Mapping[str, torch.Tensor]]:
    """With what a released file tells, and its state for that model: arguments without which timm's model would be another
    network, and the family's statistics, unless a config.json beside it says others.

    Raises `BackboneError` for a model that it isn't for."""
    family, said = official.family, description.expects
    arguments, state = official.fitting(description.name, description.model_args, told=not description.source)
    expects = said if description.source else replace(said, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    added = {name: value for name, value in arguments.items() if description.model_args.get(name) != value}
    notes = [f"weights of {family.name}, of which {family.holds} is taken"]
    notes += [f"built with {', '.join(f'{name}={value}' for name, value in added.items())}"] if added else []
    notes += [f"input normalised by ImageNet's mean and deviation, not by those of {description.name}"] if expects != said else []
    if family.pos_embed == "dino":
        notes.append("at other sizes than its own, --pos-embed dino is its authors' way of bringing position embeddings there")
    logger.info("%s: %s", description.name, "; ".join(notes))
    return replace(description, expects=expects, model_args=arguments, family=family.name), state


def warn_of_statistics(description: ModelDescription, state: Mapping[str, torch.Tensor]) -> None:
    """A word where weights without a classifier, as self-supervised ones are released, are given the statistics that timm has
    for a name without a tag, though those families all have ImageNet's. Their names alone don't tell whose they are."""
    plain = not description.source and "." not in description.name and "cls_token" in state and "head.weight" not in state
    if plain and description.expects.mean != IMAGENET_DEFAULT_MEAN:
        logger.warning(
            "these weights don't say what their input is normalised by; taken: mean %s, as timm has it for %s. Files of DINO and "
            "iBOT look so and have ImageNet's: name a tag with those (vit_small_patch16_224.dino, vit_large_patch16_224.mae)",
            description.expects.mean,
            description.name,
        )


def _read(folder: Folder, name: str) -> Any:
    """The JSON value of a file; None where there is none. Raises `Unreadable`."""
    try:
        return json.loads(folder.read(name))
    except FileNotFoundError:
        return None
    except (PermissionError, StorageError) as error:
        # Object stores answer so for what isn't there, too, where folders may not be listed.
        logger.warning("%s/%s can't be read, and is taken for absent: %s", folder.displayed, name, error)
        return None
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{folder.displayed}/{name} is damaged: {error}") from None


def _description_in(name: str, config: object, displayed: str) -> ModelDescription:
    if isinstance(config, dict) and isinstance(config.get("detector"), dict):
        return _of_detector(name, config["detector"], displayed)
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise Unreadable(f"{displayed} isn't timm's: {_whose(config)}")
    wanted, found = name.partition(".")[0], config["architecture"].partition(".")[0]
    if found != wanted:
        raise BackboneError(f"{displayed} says that the weights are of {found}; --model is {name}. Use --model {found}")
    input_config, given = config.get("pretrained_cfg", config), config.get("model_args") or {}
    if not isinstance(input_config, dict) or not isinstance(given, dict):
        raise Unreadable(f"{displayed} is damaged: pretrained_cfg and model_args must be objects")
    timms = _pretrained_config(input_config, given, displayed)
    return ModelDescription(
        name=name, expects=Preprocessing.of(timms), model_args=_model_args(wanted, timms, given, displayed), source=displayed
    )


def _of_detector(name: str, config: JsonObject, displayed: str) -> ModelDescription:
    """Of a ViTDet that was trained here, whose backbone is taken."""
    if name not in vitdet.NAMES.values():
        raise BackboneError(
            f"{displayed} is a detector's, whose backbone is a ViTDet; --model is {name}. Use --model vitdet_base"
        )
    try:
        settings = DetectorSettings.parse(config)
    except DetectorError as error:
        raise Unreadable(f"{displayed} is damaged: {error}") from None
    own, plain = preprocessing(name), DetectorSettings()
    expects = replace(own, size=(settings.square_pad, settings.square_pad))
    if (settings.pixel_mean, settings.pixel_std) != (plain.pixel_mean, plain.pixel_std):
        mean, std = ((r / 255, g / 255, b / 255) for r, g, b in (settings.pixel_mean, settings.pixel_std))
        expects = replace(expects, mean=mean, std=std)
    return ModelDescription(name=name, expects=expects, model_args=vitdet.arguments_of(settings, name), source=displayed)


def _whose(config: object) -> str:
    """In words, for a config.json without an architecture."""
    if not isinstance(config, dict):
        return f"it holds a {type(config).__name__}"
    if "model_type" in config:
        return f"it is of a transformers model (model_type {config['model_type']!r}), whose weights have other names"
    kind = next((kind for kind in ("upsampler", "readout") if kind in config), None)
    return f"it is of a trained {kind}" if kind else "it names no architecture"


# --- timm's config.json -----------------------------------------------------------------------------------------------


def _pretrained_config(config: Mapping[str, Any], given: Mapping[str, Any], displayed: str) -> timm.models.PretrainedCfg:
    """The statistics and the input's size, timm's defaults for what isn't there. Raises `BackboneError`."""
    names = ("input_size", "fixed_input_size", "interpolation", "mean", "std")
    defaults = {each.name: each.default for each in fields(timm.models.PretrainedCfg)}
    values = {name: defaults[name] if config.get(name) is None else config[name] for name in names}
    rules: dict[str, Callable[[Any], bool]] = {
        "mean": _are_three,
        "std": lambda std: _are_three(std) and min(std) > 0,
        "interpolation": INTERPOLATIONS.__contains__,
        "input_size": lambda size: len(size) == 3 and size[0] == 3 and _side(size[1]) and _side(size[2]),
    }
    for name, holds in rules.items():
        if not _holds(holds, values[name]):
            raise BackboneError(
                f"{displayed}: {name} {values[name]!r} can't be used; there are RGB inputs [3, height, width], means and "
                f"deviations of three channels, and {', '.join(INTERPOLATIONS)}"
            )
    # As timm has it: a network that may be given any size has a nominal one.
    fixed = bool(values["fixed_input_size"]) and not given.get("dynamic_img_size")
    fixed = fixed and given.get("strict_img_size") is not False
    if fixed and given.get("img_size") is not None:
        values["input_size"] = (3, *_image_size(given["img_size"], displayed))
    return timm.models.PretrainedCfg(**{**values, "fixed_input_size": fixed})


def _model_args(architecture: str, config: timm.models.PretrainedCfg, given: Mapping[str, Any], displayed: str) -> dict[str, Any]:
    """The arguments without which the network would be another one. Raises `BackboneError`."""
    if given.get("in_chans") not in (None, 3):
        raise BackboneError(f"{displayed}: the network takes {given['in_chans']} channels; images have 3")
    kept = {name: value for name, value in given.items() if value is not None and name not in _WITHOUT_EFFECT}
    if foreign := sorted(_NOT_THE_NETWORKS & set(kept)):
        raise BackboneError(f"{displayed}: model_args {', '.join(foreign)} can't be honoured; save the network without")
    size = kept.pop("img_size", config.input_size[1:] if config.fixed_input_size else None)
    plain = timm.get_pretrained_cfg(architecture)
    if size is not None and not (plain.fixed_input_size and tuple(plain.input_size[1:]) == _image_size(size, displayed)):
        kept["img_size"] = list(_image_size(size, displayed))
    return _other_than_default(architecture, kept)


def _other_than_default(architecture: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Without what the architecture has anyway (timm writes down the pooling of every network)."""
    if not set(given) - {"img_size"}:
        return dict(given)
    with torch.device("meta"), Undrawn():
        model = timm.create_model(architecture)
    usual = {name: getattr(model, name, None) for name in given}
    return {n: value for n, value in given.items() if type(usual[n]) is not type(value) or usual[n] != value}


def _image_size(size: object, displayed: str) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list | tuple) else ()
    if len(sides) != 2 or not all(map(_side, sides)):
        raise BackboneError(f"{displayed}: img_size {size!r} is no height and width in pixels")
    return sides


def _holds(rule: Callable[[Any], bool], value: object) -> bool:
    try:
        return rule(value)
    except (TypeError, LookupError):
        return False


def _side(value: object) -> bool:
    return type(value) is int and value > 0


def _are_three(values: Any) -> bool:
    return len(values) == 3 and all(isinstance(value, int | float) and math.isfinite(value) for value in values)


# --- other files that say what the input is ---------------------------------------------------------------------------


def _transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of transformers' image processors."""
    found = {"mean": config.get("image_mean"), "std": config.get("image_std")}
    if config.get("do_normalize") is False:
        found = {"mean": [0.0] * 3, "std": [1.0] * 3}
    numbers = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's
    return {**found, "interpolation": numbers.get(config.get("resample"))}


def _open_clip(config: Mapping[str, Any]) -> dict[str, Any]:
    preprocess = config.get("preprocess_cfg")
    names = ("mean", "std", "interpolation")
    return {name: preprocess.get(name) for name in names} if isinstance(preprocess, dict) else {}


_OTHERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "preprocessor_config.json": _transformers,
    "open_clip_config.json": _open_clip,
}


def _require_agreement(description: ModelDescription, folder: Folder) -> None:
    """Raises `Unreadable` where another file beside the weights says another mean or deviation; warns of another
    interpolation, in which such files often differ from what the weights were trained with."""
    for file, read in _OTHERS.items():
        config = _read(folder, file)
        said = read(config) if isinstance(config, dict) else {}
        for name, value in said.items():
            ours = getattr(description.expects, name)
            if value is None or value == ours or (name != "interpolation" and _are_close(ours, value)):
                continue
            text = (
                f"{folder.displayed}/{file} says {name} {value}, but {description.source or f'timm, of {description.name},'}"
                f" says {ours if name == 'interpolation' else list(ours)}"
            )
            if name != "interpolation":
                raise Unreadable(f"{text}: remove what isn't about these weights")
            logger.warning("%s, which is used", text)


def _are_close(ours: tuple[float, ...], value: Any) -> bool:
    return _holds(_are_three, value) and all(math.isclose(a, b, abs_tol=1e-3) for a, b in zip(ours, value, strict=True))
