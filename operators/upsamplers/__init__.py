"""Upsamplers: methods by name, built in or a user's own, and what makes an upsampler of one.

A method is a file here and a line in `UPSAMPLERS`, or an importable `module:Class` (operators/DESIGN.md, "Your own upsampler").
"""

import importlib
import inspect
import json
import re
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from operators.upsamplers.anyup import AnyUp
from operators.upsamplers.featup import FeatUp
from operators.upsamplers.interpolate import Average, Interpolation
from operators.upsamplers.jafar import Jafar
from operators.upsamplers.jbu import Jbu
from operators.upsamplers.lift import Lift
from operators.upsamplers.loftup import LoftUp
from operators.upsamplers.naf import Naf
from operators.upsamplers.protocol import TELLING, Precision
from operators.upsamplers.protocol import AnyMethod as AnyMethod
from operators.upsamplers.protocol import Method as Method
from operators.upsamplers.protocol import Settings as Settings
from operators.upsamplers.protocol import Upsampler as Upsampler
from operators.upsamplers.protocol import UpsamplerError as UpsamplerError
from operators.upsamplers.protocol import WithoutWeights as WithoutWeights
from operators.upsamplers.resize_conv import ResizeConv
from operators.upsamplers.uplift import Uplift
from operators.upsamplers.vit_up.method import ViTUpMethod
from storage.documents import JsonObject, JsonValue

UPSAMPLERS: dict[str, Callable[[str], AnyMethod]] = {
    "bilinear": Interpolation,
    "bicubic": Interpolation,
    "nearest": Interpolation,
    "average": Average,
    "lift": Lift,
    "resize_conv": ResizeConv,
    "jbu": Jbu,
    "jafar": Jafar,
    "featup": FeatUp,
    "anyup": AnyUp,
    "naf": Naf,
    "vit_up": ViTUpMethod,
    "uplift": Uplift,
    "loftup": LoftUp,
}
"""What there is, by name."""

_IMPORTABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def spelled(name: str) -> str:
    """A name as `UPSAMPLERS` has it, where it is there with hyphens for underscores (vit-up); any other one as it is."""
    found = name.replace("-", "_")
    return found if found in UPSAMPLERS else name


def find_method(name: str) -> AnyMethod:
    """The method called `name`: of `UPSAMPLERS`, or `module:Class`, which is imported.

    Raises `UpsamplerError` with the names there are, or with the module that can't be imported.
    """
    name = spelled(name)
    if name in UPSAMPLERS:
        return UPSAMPLERS[name](name)
    if not _IMPORTABLE.fullmatch(name):
        raise UpsamplerError(f"no upsampler is called {name!r}; there are: {', '.join(UPSAMPLERS)}, and module:Class of your own")
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise UpsamplerError(
            f"no upsampler is called {name!r}: {module} can't be imported here ({error}). There are: "
            f"{', '.join(UPSAMPLERS)}; a module of your own must lie in a folder of PYTHONPATH, on every node"
        ) from error
    if not (inspect.isclass(found) and issubclass(found, Method)):
        raise UpsamplerError(f"{name}: {module} has no class {attribute} that is a Method of operators.upsamplers")
    return found(name)


def split_method(text: str) -> tuple[str, str]:
    """(name, URL of a checkpoint or nothing) of `METHOD[:URL]`, METHOD being a name of `UPSAMPLERS` or `module:Class`."""
    name, _, url = text.partition(":")
    name = spelled(name)
    own = _IMPORTABLE.match(text)
    if name in UPSAMPLERS or not own or text[own.end() : own.end() + 1] not in ("", ":"):
        return name, url
    return own[0], text[own.end() + 1 :]


def split_settings(text: str) -> tuple[str, dict[str, JsonValue]]:
    """`METHOD[:URL]` of `METHOD[,SETTING=VALUE...][:URL]`, and the settings: JSON values, or texts where they are none.

    They stand before the URL, which may hold commas, and parameters that are secret. Raises `UpsamplerError`.
    """
    name, own = re.split("[,:]", text)[0], _IMPORTABLE.match(text)
    if spelled(name) not in UPSAMPLERS and own:
        name = own[0]
    if text[len(name) : len(name) + 1] != ",":
        return text, {}
    said, colon, url = text[len(name) + 1 :].partition(":")
    given: dict[str, JsonValue] = {}
    for each in said.split(","):
        setting, equals, value = each.partition("=")
        if not (setting and equals and value) or setting in given:
            raise UpsamplerError(f"{each!r}: settings of {name} are said once each, as SETTING=VALUE, with commas between them")
        try:
            given[setting] = json.loads(value)
        except json.JSONDecodeError:
            given[setting] = value
    return f"{name}{colon}{url}", given


TELLING.update({telling: name for name in reversed(UPSAMPLERS) if (telling := find_method(name).telling)})


def method_names(fits: Callable[[AnyMethod], bool]) -> tuple[str, ...]:
    """The names of `UPSAMPLERS` whose methods fit."""
    return tuple(name for name in UPSAMPLERS if fits(find_method(name)))


def create_upsampler(name: str) -> Upsampler:
    """An upsampler that needs no weights. Raises `UpsamplerError` with the names there are."""
    method = find_method(name)
    if method.learned:
        raise UpsamplerError(f"{name} needs a checkpoint's weights")
    return method.build(method.parse({}), {}, "fp32", _no_backbone)


def build_net(config: JsonObject, seed: int = 0) -> nn.Module:
    """The bare network of a learned method's settings (JSON, with `method`), its weights drawn from `seed`, in train mode."""
    method = find_method(str(config["method"]))
    return method.initialised(method.parse(config), seed)


def learned_upsampler(config: JsonObject, state: Mapping[str, Tensor], precision: Precision = "fp32") -> Upsampler:
    """The network of `config` with the weights of `state`, ready to run. Raises `UpsamplerError` where they don't fit."""
    method = find_method(str(config["method"]))
    return method.build(method.parse(config), state, precision, _no_backbone)


def _no_backbone() -> nn.Module:
    raise UpsamplerError("this upsampler runs a backbone of its own, which isn't given here")
