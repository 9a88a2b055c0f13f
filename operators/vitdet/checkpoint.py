"""Weights of detectors: the official `.pkl` files without unpickling what they like, which detector some weights are of, and
weights into one, strictly; MAE's backbones to begin with.

A checkpoint of ours is a state dict and a JSON object (`described`). No files are read here.
"""

import _codecs
import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy._core import multiarray
from numpy._core.numeric import _frombuffer  # type: ignore[attr-defined]
from torch import Tensor

from operators.timm_models import whole_numbers
from operators.upsamplers import UpsamplerError, find_method
from operators.upsamplers.protocol import require_fitting
from operators.upsamplers.recursive import DoublingNet
from operators.vitdet.backbone import attending, facts_of
from operators.vitdet.detector import Detector
from operators.vitdet.settings import DetectorError, DetectorSettings
from storage.documents import JsonObject, JsonValue

State: TypeAlias = Mapping[str, Tensor]

_IGNORED = r"pixel_(mean|std)$|proposal_generator\.anchor_generator\.cell_anchors\."
"""Buffers that old files hold; the settings say them."""

_MAE_ONLY = r"cls_token$|norm\.(weight|bias)$|mask_token$|decoder"
"""What MAE has that a detector's backbone hasn't."""


# --- official files -------------------------------------------------------------------------------------------------------


def _latin1(text: str, encoding: str) -> bytes:
    """What protocols 0 to 2 write bytes as."""
    if encoding != "latin1":
        raise _asking(f"_codecs.encode to {encoding}")
    return _codecs.encode(text, encoding)


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _latin1,
    # NumPy's core had another name before version 2.
    **{(f"numpy.{core}.multiarray", "_reconstruct"): multiarray._reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): multiarray.scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}
"""All that a pickle of arrays calls, by module and name, in protocols 0 to 5."""


_BROKEN = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError, OverflowError, MemoryError,
    RecursionError,
)  # fmt: skip
"""What a damaged pickle, or one that isn't meant well, ends with."""


class _ArraysAlone(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _asking(f"{module}.{name}")
        return _ALLOWED[module, name]


def _asking(what: str) -> DetectorError:
    return DetectorError(f"this pickle isn't one of arrays alone, and isn't run: it asks for {what}")


def unpickled(data: bytes) -> dict[str, Tensor]:
    """The arrays of an official `.pkl` file, {"model": {name: array}, ...} or the inner dict alone, as tensors.

    A pickle is a program: nothing of this one is called but what makes arrays. Raises `DetectorError` for pickles that call
    anything else, for other contents and for files that are cut off.
    """
    try:
        # Python 2 wrote the first ones.
        loaded = _ArraysAlone(io.BytesIO(data), encoding="latin1").load()
    except DetectorError:
        raise
    except _BROKEN as error:
        raise DetectorError(f"this is no whole pickle of arrays: {type(error).__name__}: {error}") from None
    model = loaded.get("model", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(model, dict) or not model:
        raise DetectorError('this pickle holds no dict of arrays, such as {"model": {"backbone.net.pos_embed": ...}}')
    return {str(name): _tensor(str(name), value) for name, value in model.items()}


def _tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, np.ndarray | np.generic) or value.dtype.kind not in "fiub":
        what = f"an array of {value.dtype}" if isinstance(value, np.ndarray | np.generic) else f"a {type(value).__name__}"
        raise DetectorError(f"{name} in this pickle is {what}, not one of numbers")
    # Big-endian and read-only arrays are none of torch's.
    return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))


# --- which detector it is -------------------------------------------------------------------------------------------------


def detector_tensors(state: State) -> dict[str, Tensor]:
    """Those of the network: what only old files hold is left out, numbers of other precisions are float32. Raises `DetectorError`
    for weights that are whole numbers."""
    if whole := whole_numbers(state):
        raise DetectorError(f"{len(whole)} weights are whole numbers ({whole[0]}): quantised files aren't read")
    return {
        name: value.float() if value.is_floating_point() else value
        for name, value in state.items()
        if not re.match(_IGNORED, name)
    }


def settings_of(state: State, **others: Any) -> DetectorSettings:
    """What tensors tell of their detector, and what is said in `others`; the rest is as published.

    Blocks with the largest tables of relative positions are the global ones; where all have the same, all are taken for windows.
    Raises `DetectorError` where they are no detector's.
    """
    facts = _facts(state)
    facts |= attending(facts.pop("sides"))
    return DetectorSettings(**(facts | others))


_WORDS = {
    "dim": "channels of the backbone",
    "depth": "blocks",
    "heads": "heads",
    "sides": "cells a side of the tables of relative positions, block by block",
    "pretrain_size": "pixels a side in pre-training",
    "channels": "channels of the pyramid and the heads",
    "fc": "channels of the box head's layer",
    "classes": "classes",
}
"""Of what is told from shapes, in messages."""


def _facts(state: State) -> dict[str, Any]:
    """What shapes tell, by names of settings; `sides`: of the tables of relative positions, by block."""
    cascade = any(name.startswith("roi_heads.box_head.0.") for name in state)
    first = ".0" if cascade else ""
    needed = {
        "positions": "backbone.net.pos_embed",
        "tables": "backbone.net.blocks.0.attn.rel_pos_h",
        "rpn": "proposal_generator.rpn_head.objectness_logits.weight",
        "fc": f"roi_heads.box_head{first}.fc1.weight",
        "masks": "roi_heads.mask_head.predictor.weight",
    }
    _require_detector(state, [name for name in needed.values() if name not in state])
    shape = {what: tuple(state[name].shape) for what, name in needed.items()}
    backbone = facts_of({name.removeprefix("backbone.net."): value for name, value in state.items()})
    if backbone is None:
        raise DetectorError("these weights' blocks aren't those of a ViTDet")
    return {"cascade": cascade, **backbone, "channels": shape["rpn"][1], "fc": shape["fc"][0], "classes": shape["masks"][0]}


def _require_detector(state: State, missing: list[str]) -> None:
    """Raise `DetectorError` where tensors that each detector has are missing, with what they look like."""
    if not missing:
        return
    if any(name.startswith("blocks.") for name in state):
        looks = "they look like a ViT alone, such as MAE's, which a detector may begin from"
    elif any(name.startswith("backbone.bottom_up.") for name in state):
        looks = "they look like a detector with another backbone than a plain ViT"
    else:
        looks = f"there are {', '.join(sorted(state)[:3]) or 'none'}"
    raise DetectorError(f"these aren't weights of a ViTDet: {missing[0]} is missing; {looks}")


# --- into a detector ------------------------------------------------------------------------------------------------------


def load(detector: Detector, state: State) -> None:
    """Weights into the detector, with its upsampler's where it has one.

    Raises `DetectorError` where they are of another detector, with what differs.
    """
    state = detector_tensors(state)
    own = detector.state_dict()
    expected, found = _facts(own), _facts(state)
    if found["cascade"] != expected["cascade"]:
        kinds = ("Mask R-CNN", "Cascade R-CNN")
        raise DetectorError(f"these are weights of a {kinds[found['cascade']]}; the detector is a {kinds[expected['cascade']]}")
    if differences := [
        f"{found[name]} {words}, not {expected[name]}" for name, words in _WORDS.items() if found[name] != expected[name]
    ]:
        raise DetectorError(f"these are weights of another ViTDet: {'; '.join(differences)}")
    has, wants = (any(name.startswith("lift.") for name in each) for each in (state, own))
    if has != wants:
        which = "with an upsampler (lift.); the detector has none" if has else "without an upsampler; the detector has one"
        raise DetectorError(f"these are weights of a ViTDet {which}")
    _fit(own, state, "the detector")
    detector.load_state_dict(state)


def load_backbone(detector: Detector, state: State) -> None:
    """MAE's weights into the detector's backbone, which begins with its own relative positions, as the published ones did.

    MAE's CLS token, final norm and decoder aren't used. Raises `DetectorError` where tensors are others.
    """
    if any(name.startswith("backbone.net.") for name in state):
        raise DetectorError("these are weights of a whole detector, not of a ViT that one begins from, such as MAE's")
    own = {name: value for name, value in detector.backbone.net.state_dict().items() if ".rel_pos_" not in name}
    taken = {name: value.float() for name, value in state.items() if not re.match(_MAE_ONLY, name)}
    _fit(own, taken, "the detector's backbone")
    detector.backbone.net.load_state_dict(taken, strict=False)


def _fit(expected: State, state: State, what: str) -> None:
    try:
        require_fitting(expected, state, what)
    except UpsamplerError as error:
        raise DetectorError(str(error)) from None


# --- our own checkpoints --------------------------------------------------------------------------------------------------


def described(settings: DetectorSettings, upsampler: JsonObject | None = None) -> dict[str, JsonValue]:
    """A detector as JSON; `upsampler`: its method and settings, as the method's `to_json` has them."""
    described: dict[str, JsonValue] = {"detector": settings.to_json()}
    return described | ({"upsampler": dict(upsampler)} if upsampler else {})


def build(description: JsonObject, seed: int = 0) -> Detector:
    """The detector of `described`, its weights drawn from `seed`, in train mode.

    Raises `DetectorError` where settings are impossible, or its upsampler can't stand between backbone and pyramid.
    """
    if unknown := description.keys() - {"detector", "upsampler"}:
        raise DetectorError(f"no such entry of a detector: {', '.join(sorted(unknown))}; there are: detector, upsampler")
    found, upsampler = description.get("detector"), description.get("upsampler")
    if not isinstance(found, Mapping) or not isinstance(upsampler, Mapping | None):
        raise DetectorError("a detector is described by {detector: SETTINGS, upsampler: SETTINGS or nothing}")
    settings = DetectorSettings.parse(found)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Detector(settings, None if upsampler is None else doubling_net(upsampler, settings))


def doubling_net(config: JsonObject, settings: DetectorSettings) -> DoublingNet:
    """The bare network of an upsampler (JSON, with `method`) for a detector's maps. Raises `DetectorError` where it isn't one."""
    try:
        method = find_method(str(config.get("method")))
        parsed = method.parse(config)
        net = method.network(parsed)
    except UpsamplerError as error:
        raise DetectorError(str(error)) from None
    if not isinstance(net, DoublingNet) or net.stages != 1:
        raise DetectorError(f"{method.name} can't stand in a detector: a network that gives twice the cells can, such as lift")
    channels = getattr(parsed, "channels", None)
    if channels not in (None, settings.dim):
        raise DetectorError(f"this {method.name} is for maps of {channels} channels; the backbone's have {settings.dim}")
    if getattr(parsed, "heads", None):
        raise DetectorError(f"this {method.name} is for keys or queries of {parsed.heads} heads; a detector's maps are tokens")
    return net
