"""Models from timm by their names: what input they expect, how they are built, and how weights come into them.

No files are read here: weights come in as arrays or as a state dict.
"""

import contextlib
import difflib
import hashlib
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from operators.lean_timm import timm
from storage.documents import JsonObject, decode
from storage.errors import RayliftError


class BackboneError(RayliftError, ValueError):
    """The model can't do what was asked of it."""


class TimmModel(nn.Module):
    """What is used of timm's models, which share no base class that has it. For type checkers: none is made of this."""

    feature_info: Sequence[Mapping[str, int]]
    pos_embed: nn.Parameter
    patch_embed: "PatchEmbed"
    blocks: Sequence["Block"]
    norm: nn.Module
    forward_intermediates: Callable[..., Sequence[Tensor]]
    reset_classifier: Callable[[int], None]
    takes_any_size: bool
    "of ours: pixels beyond the last whole patch are left out"
    working_bytes: int
    "of ours: what a forward holds at once whatever its batch is"


class PatchEmbed(nn.Module):
    """The same of a plain ViT's patch embedding."""

    proj: nn.Conv2d
    norm: nn.Module
    img_size: tuple[int, int] | None
    grid_size: tuple[int, int]


class Block(nn.Module):
    """The same of a plain ViT's block."""

    norm1: nn.Module
    attn: "Attention"


class Attention(nn.Module):
    """The same of a block's attention; timm has several, with one projection for all three or one for each."""

    num_heads: int
    qkv: nn.Linear
    proj: nn.Linear
    qkv_bias_separate: bool


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What the model expects of its input, from its own timm config."""

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str

    @classmethod
    def of(cls, config: timm.models.PretrainedCfg) -> "Preprocessing":
        """As timm describes it."""
        _, height, width = config.input_size
        mean, std = (decode(tuple[float, float, float], tuple(map(float, each))) for each in (config.mean, config.std))
        return cls(size=(height, width), mean=mean, std=std, interpolation=config.interpolation)


def preprocessing(name: str) -> Preprocessing:
    """The timm config of `name`. Raises `BackboneError` with near names if timm has no such model."""
    _require_known(name)
    config = timm.get_pretrained_cfg(name)
    if config is None:
        raise BackboneError(f"timm {timm.__version__} says nothing of the input that {name!r} expects")
    return Preprocessing.of(config)


def _require_known(name: str) -> None:
    if ":" in name or "/" in name:
        raise BackboneError(f"{name!r} is a place; name the architecture, and give --weights the file or folder there")
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture) or (tag and not timm.is_model_pretrained(name)):
        raise BackboneError(f"timm {timm.__version__} has no model {name!r}; near names: {', '.join(_near(name))}")


def _near(name: str) -> list[str]:
    names = [*timm.list_models(pretrained=True), *timm.list_models()]
    return (
        difflib.get_close_matches(name, names, n=5, cutoff=0.75)
        or [known for known in names if name.split(".")[0] in known][:5]
        or timm.list_models("vit_small*", pretrained=True)[:5]
    )


def create_model(
    name: str,
    size: tuple[int, int],
    state_dict: Mapping[str, Tensor] | None,
    seed: int | None,
    model_args: JsonObject | None = None,
) -> nn.Module:
    """A timm model without its classifier, in eval mode, for inputs of `size`.

    Weights: a checkpoint in any form that timm converts for this model (strict), or random from `seed`; with neither,
    whatever lies in memory, to be filled by `load_arrays`. `model_args`: timm's, where the network isn't built as its
    name alone says. Raises `BackboneError` where timm has no such model, or weights or arguments don't fit it.
    """
    given = dict(model_args or {})
    _require_known(name)
    drawing = contextlib.nullcontext() if seed is not None else Undrawn()
    with torch.random.fork_rng(devices=[]), drawing:
        torch.manual_seed(seed or 0)
        try:
            if state_dict is None:
                model = _create_any_size(name, size, {**given, "num_classes": 0})
            else:
                model = _create_strictly(name, size, state_dict, given)
        except BackboneError:
            raise
        # timm converts foreign checkpoints by key and shape: what it doesn't expect raises any of these.
        except (RuntimeError, LookupError, AttributeError, AssertionError, ValueError) as error:
            # torch lists every key of a wrong checkpoint; the first ones tell.
            reason = textwrap.shorten(str(error), 600, placeholder=" ...")
            raise BackboneError(f"the weights don't fit {name} at {size[0]}x{size[1]} px: {reason}") from None
    return model.eval().requires_grad_(False)


class Undrawn(TorchFunctionMode):
    """Leaves out the drawing of initial weights, where all of them are replaced: half of the time that a ViT takes to build."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _DRAWING:
            tensor, *more = args or ((kwargs or {})["tensor"],)
            # torch's own trunc_normal_ draws again until all lies within its bounds, which what lies in memory may never do.
            if name == "normal_":
                tensor.detach().fill_(more[0] if more else (kwargs or {}).get("mean", 0.0))
            return tensor
        return func(*args, **(kwargs or {}))


_DRAWING = frozenset(
    (
        "uniform_",
        "normal_",
        "trunc_normal_",
        "erfinv_",
        "xavier_uniform_",
        "xavier_normal_",
        "kaiming_uniform_",
        "kaiming_normal_",
        "clamp_",
    )
)
"""Of `torch.Tensor` and `torch.nn.init`: those that fill a tensor with random numbers, or change their distribution. timm uses
`clamp_` for nothing else while it builds; of a tensor without memory, it would import torch's compiler."""


def whole_numbers(state: Mapping[str, Tensor]) -> list[str]:
    """The weights and biases that are whole numbers, as in quantised files, which load as if they were others."""
    return [name for name, value in state.items() if name.endswith((".weight", ".bias")) and not value.is_floating_point()]


def _create_strictly(name: str, size: tuple[int, int], state_dict: Mapping[str, Tensor], given: JsonObject) -> nn.Module:
    """Every tensor of the model comes from `state_dict`, and all of that but the classifier is used.

    timm loads without checking either where it drops a classifier, so that another model's weights would pass as random
    ones. Here the classifier's keys are left out first; where a conversion brings it forth (CLIP), it is loaded and removed.
    """
    if not state_dict:
        raise BackboneError(f"the weights for {name} hold no tensors")
    config = timm.get_pretrained_cfg(name)
    classifier = getattr(config, "classifier", None) or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    body = {key: value for key, value in state_dict.items() if key.rpartition(".")[0] not in heads}
    if whole := whole_numbers(body):
        raise BackboneError(
            f"{len(whole)} of the weights for {name} are whole numbers ({whole[0]}): quantised files aren't read, give one of "
            "floating-point numbers"
        )
    overlay: dict[str, object] = {"state_dict": body, "classifier": None}
    if "img_size" in given:  # timm takes the grid of the checkpoint's position embeddings from it
        overlay["input_size"] = (3, *decode(tuple[int, int], given["img_size"], "img_size"))
    kwargs = {**given, "pretrained": True, "pretrained_cfg_overlay": overlay}
    try:
        return _create_any_size(name, size, {**kwargs, "num_classes": 0})
    except RuntimeError as error:
        if not heads:
            raise
        without = error
    overlay["state_dict"] = dict(state_dict)
    try:
        model = _create_any_size(name, size, kwargs)
    except RuntimeError:
        raise without from None
    cast(TimmModel, model).reset_classifier(0)
    return model


def _create_any_size(name: str, size: tuple[int, int], kwargs: Mapping[str, Any]) -> nn.Module:
    """Position embeddings that follow the input where the family can, else those of `size`."""
    with contextlib.suppress(TypeError):
        return timm.create_model(name, **{**kwargs, "dynamic_img_size": True})
    try:
        return timm.create_model(name, **{**kwargs, "img_size": size})
    except (TypeError, AssertionError, ValueError) as error:
        if "img_size" in str(error):  # "unexpected keyword argument"
            raise BackboneError(
                f"timm's {name} isn't built for a size of input, as plain ViTs (vit_*, deit*, beit*, eva02*) and hierarchical "
                "transformers (swin*, hiera*) are; use one of these"
            ) from None
        raise BackboneError(f"{name} can't be built for inputs of {size[0]}x{size[1]} px: {error}") from None


def state_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """The model's parameters and buffers as arrays, for broadcasting and hashing."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}


def load_arrays(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> nn.Module:
    """Fill `model` with copies of `arrays`, strictly."""
    model.load_state_dict(tensors_of(arrays), strict=True)
    return model


def share_arrays(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> nn.Module:
    """Have `model` compute with `arrays` themselves, strictly: nothing may write to its weights, nor to the arrays.

    Workers of a machine that have them out of Ray's object store then hold them once together.
    """
    model.load_state_dict(tensors_of(arrays), strict=True, assign=True)
    return model


def tensors_of(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """`arrays` themselves as tensors, which nothing may write to: a worker has them out of Ray's object store."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def weights_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """sha256 over names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()
