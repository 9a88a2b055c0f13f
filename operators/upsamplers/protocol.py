"""What is asked of upsamplers: of a method before it has weights (`Method`), and of an upsampler that runs (`Upsampler`).

A method is one file and one line of `operators.upsamplers.UPSAMPLERS`; whoever extracts, trains, evaluates or measures asks it,
and tells methods apart in no other way. How to write one is said in operators/DESIGN.md, "Your own upsampler".

Shapes: B batch, C channels, H W pixels, h w cells of the backbone's map.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar, Generic, Literal, Protocol, Self, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from operators.backbone import PatchFeatures, TimmBackbone
from storage.documents import JsonObject, JsonValue
from storage.errors import RayliftError

Precision: TypeAlias = Literal["bf16", "fp16", "fp32"]

Need: TypeAlias = Literal["maps", "image", "backbone"]
"""What a result is made of: the backbone's maps, the image, or hidden states of a copy of the backbone, the method's own."""

TELLING: dict[str, str] = {}
"""Names of tensors that only one method's official files have, and that method; `operators.upsamplers` fills it in."""

Reload: TypeAlias = Callable[[], nn.Module]
"""Makes the backbone's timm model anew, with its own position embeddings, which a backbone in use has replaced."""


WORKING_BYTES = 2**26
"""What an upsampler takes at once unless it's allowed more (`Upsampler.allow`). Measured on a CPU: larger parts of a grid are
slower, since caches don't hold them, and so are much smaller ones."""


class UpsamplerError(RayliftError, ValueError):
    """No such upsampler, or it can't do what was asked."""


class Upsampler(Protocol):
    """Brings patch features to another grid. Subclass it; not thread-safe: one call at a time."""

    layers: tuple[int, ...] = ()
    "blocks whose maps it reads besides those that are stored; the backbone is asked for them too"

    def __call__(self, images_BCHW: Tensor, features: PatchFeatures, layers: tuple[int, ...], grid: tuple[int, int]) -> Tensor:
        """Normalised images and the maps of `layers` to float32 [B, C, *grid]. Cells tile the same area as the backbone's."""
        ...

    def peak_bytes(self, batch: int, channels: int, grid: tuple[int, int]) -> int:
        """Upper bound on the device memory that one call takes beyond its arguments; keeps to it by tiling."""
        ...

    def call_bytes(self, batch: int, channels: int, base: tuple[int, int], image: tuple[int, int], grid: tuple[int, int]) -> int:
        """`peak_bytes` of maps of `base` cells and images of `image` pixels, for methods whose memory depends on those too."""
        return self.peak_bytes(batch, channels, grid)

    def parts(
        self, batch: int, channels: int, base: tuple[int, int], image: tuple[int, int], grid: tuple[int, int]
    ) -> tuple[int, int]:
        """How many images a call takes together, and in how many parts, one after another, it makes the grid of these; the rest
        as `call_bytes`."""
        return batch, 1

    def allow(self, working_bytes: int) -> None:
        """Take as many images or cells at once as fit into so many bytes, where the method works on some at a time.

        The weights, the result and what is kept of an image aren't counted.
        """
        return

    def kept_bytes(self, batch: int) -> int:
        """How much of `call_bytes` stays on the device after the call: weights, and until `forget` what is kept of images."""
        return 0

    def forget(self) -> None:
        """Free what is kept of the images seen last, where several grids share it."""
        return

    def take_at_once(self, cells: int) -> None:
        """Make so many cells of a grid at once, whatever memory that takes. Only methods that are `chunked` can."""
        raise UpsamplerError(f"{type(self).__name__} makes a grid as it is, not {cells} cells at once")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a state dict doesn't tell about its network: JSON values and tuples of them. Methods that have any subclass this.

    `channels`, where there is one, is that of the maps it takes and gives, several layers' stacked; else it takes any number.
    `patch` is the backbone's, in pixels.
    """

    owner: ClassVar[str] = "the upsampler"
    "whose settings they are, in messages"

    @classmethod
    def parse(cls, given: JsonObject) -> Self:
        """From a JSON object, which may name the method; absent and null settings take the defaults.

        Raises `UpsamplerError` where settings are unknown, lacking or impossible.
        """
        return cls(**given_settings(cls, {name: each for name, each in given.items() if name != "method"}, cls.owner))


S = TypeVar("S", bound=Settings)


class Method(Generic[S]):
    """A way of bringing maps to another grid, whatever its weights. Made from the name that it is asked for by."""

    settings: type[S]
    needs: ClassVar[frozenset[Need]] = frozenset({"maps", "image"})
    learned: ClassVar[bool] = True
    "whether its weights come from a checkpoint"
    trained_by: ClassVar[str | None] = None
    "the objective that jobs/train.py has for it, by its name in pipelines/training/objectives.py; what it asks of the network:"
    "`lift`: (images, maps) to twice the cells; `featup`: to 2^n times as many a side; `jafar`: (images, maps, grid) to that grid"
    trained_factors: ClassVar[tuple[int, ...]] = (1,)
    "of checkpoints that don't say it: training gave it the maps of images, and of these made smaller by so much a side"
    enlarges: ClassVar[bool] = True
    "whether it gives finer grids than the maps'"
    chunked: ClassVar[bool] = False
    "whether the cells of a grid are made some at a time, and how many may be chosen (`Upsampler.take_at_once`)"
    changeable: ClassVar[tuple[str, ...]] = ()
    "settings that may be others than a checkpoint was trained with (`changed`)"
    telling: ClassVar[str] = ""
    "the name of a tensor, or its end, that official files have of this method alone: what tells whose file one is"

    def __init__(self, name: str):
        self.name = name

    def network(self, settings: S) -> nn.Module:
        """The bare network with PyTorch's default initialisation, in train mode; its state dict is what checkpoints hold."""
        raise NotImplementedError

    def build(self, settings: S, state: Mapping[str, Tensor], precision: Precision, reload: Reload) -> Upsampler:
        """Ready to run, on the CPU. Raises `UpsamplerError` where weights, settings and backbone don't go together."""
        raise NotImplementedError

    def require_grid(self, settings: S, base: tuple[int, int], grid: tuple[int, int]) -> None:
        """Raise `UpsamplerError` where maps of `base` cells can't be brought to `grid`."""

    def official(self, state: Mapping[str, Tensor], backbone: TimmBackbone) -> tuple[JsonObject, dict[str, Tensor]]:
        """Settings, and the network's state, of a file as the method's authors publish it, used with `backbone`.

        Raises `UpsamplerError` for other files: those that a subclass doesn't know it leaves to this. `read` has refused those
        that are plainly another method's.
        """
        raise UpsamplerError(
            f"weights without settings, which aren't understood as an official file of {self.name}; give a folder with "
            "config.json and model.safetensors"
        )

    def with_backbone(self, settings: S, backbone: TimmBackbone) -> S:
        """The settings for use with `backbone`. Raises `UpsamplerError` where the method can't be."""
        return settings

    def changed(self, settings: S, backbone: TimmBackbone, given: JsonObject) -> S:
        """A checkpoint's settings with the values that are `given` to some of those that are `changeable`, for the same weights.

        Raises `UpsamplerError` for others, and for values that there aren't.
        """
        if unknown := sorted(given.keys() - {*self.changeable}):
            there = f"those that can are {', '.join(self.changeable)}" if self.changeable else "it has none that can"
            raise UpsamplerError(f"{', '.join(unknown)} of a trained {self.name} can't be changed: {there}")
        return self.parse({**asdict(settings), **given})

    # --- the same for all, as a rule ----------------------------------------------------------------------------------

    def parse(self, given: JsonObject) -> S:
        """`Settings.parse`, where checkpoints of the method hold anything else too."""
        return self.settings.parse(given)

    @property
    def setting_names(self) -> frozenset[str]:
        """What `parse` takes."""
        return frozenset(each.name for each in fields(self.settings))

    def settings_for(self, backbone: TimmBackbone, channels: int, **given: JsonValue) -> S:
        """The defaults, but for what is `given`, for maps of so many channels of `backbone`."""
        known = {"channels": channels, "patch": backbone.patch}
        taken = {f.name: known[f.name] for f in fields(self.settings) if f.name in known}
        return self.parse({**taken, **given})

    def to_json(self, settings: S) -> dict[str, JsonValue]:
        """As checkpoints have them."""
        return {"method": self.name, **asdict(settings)}

    def identity(self, settings: S) -> dict[str, JsonValue]:
        """The settings that aren't the defaults, as JSON values: beside the weights they go into the digest of a level, since the
        same weights make other features under others."""
        values = {f.name: (f.default, getattr(settings, f.name)) for f in fields(settings)}
        return {"method": self.name} | {name: value for name, (usual, value) in values.items() if value != usual}

    def initialised(self, settings: S, seed: int = 0) -> nn.Module:
        """`network`, its weights drawn from `seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.network(settings)

    def loaded(self, settings: S, state: Mapping[str, Tensor]) -> nn.Module:
        """`network` with the weights of `state`, strictly: names may begin with `module.`, and BatchNorm's counters may be
        missing. Raises `UpsamplerError` where anything else is missing, left over or of another shape."""
        net = self.initialised(settings)
        expected = net.state_dict()
        counters = {key: value for key, value in expected.items() if key.endswith("num_batches_tracked")}
        state = counters | {key.removeprefix("module."): value for key, value in state.items()}
        require_fitting(expected, state, "the upsampler's settings")
        net.load_state_dict(state)
        return net

    def read(self, state: Mapping[str, Tensor], given: JsonObject | None, backbone: TimmBackbone) -> tuple[S, dict[str, Tensor]]:
        """Settings and the network's state of a checkpoint's; `given`: its settings, None for a file of weights alone.

        Raises `UpsamplerError` where they don't go together, or with the backbone.
        """
        if given is None:
            self.require_own(state)
            given, state = self.official(state, backbone)
        settings = self.with_backbone(self.parse(given), backbone)
        return settings, self.loaded(settings, state).state_dict()

    def require_own(self, state: Mapping[str, Tensor]) -> None:
        """Raise `UpsamplerError` where the names of a file of weights alone tell that it is another method's."""
        owners = {owner for name in state for telling, owner in TELLING.items() if f".{name}".endswith(f".{telling}")}
        if owners and TELLING.get(self.telling) not in owners:
            raise UpsamplerError(f"this looks like a file of {' or '.join(sorted(owners))}, not of {self.name}")

    def require_channels(self, made_for: int | None, layers: tuple[int, ...], found: int) -> None:
        """Raise `UpsamplerError` where the maps of `layers` have other channels than a network was made for (None: any)."""
        if made_for not in (None, found):
            raise UpsamplerError(f"this {self.name} was made for maps of {made_for} channels; layers {layers} have {found}")

    def require_last_tokens(self, backbone: TimmBackbone, channels: int | None = None) -> None:
        """Raise `UpsamplerError` unless features are the tokens after the model's final norm, and of so many channels."""
        if backbone.facet != "token" or not backbone.norm:
            raise UpsamplerError(
                f"{self.name} takes what the model gives after its final norm: use --facet token, and no --norm False"
            )
        if channels not in (None, backbone.channels):
            raise UpsamplerError(
                f"this {self.name} was made for a backbone of {channels} channels; this one has {backbone.channels}"
            )

    def untrained(self, backbone: TimmBackbone, channels: int, size: int, reload: Reload) -> tuple[S, dict[str, Tensor]]:
        """Settings and weights from a seed, for images of `size` pixels a side: of what is timed, or counted."""
        settings = self.with_backbone(self.settings_for(backbone, channels), backbone)
        return settings, self.initialised(settings).state_dict()

    def parameters(self, settings: S, state: Mapping[str, Tensor]) -> int:
        """How many there are beside the backbone's."""
        return sum(parameter.numel() for parameter in self.initialised(settings).parameters())


AnyMethod: TypeAlias = Method[Any]
"""A method whose settings are its own affair."""


class WithoutWeights(Method[Settings]):
    """A method that has neither weights nor settings: `make` gives its upsampler."""

    settings = Settings
    learned = False

    def make(self) -> Upsampler:
        """Ready to run."""
        raise NotImplementedError

    def network(self, settings: Settings) -> nn.Module:
        return nn.Identity()

    def build(self, settings: Settings, state: Mapping[str, Tensor], precision: Precision, reload: Reload) -> Upsampler:
        return self.make()


# --- for memory ----------------------------------------------------------------------------------------------------------


def weights_bytes(net: nn.Module) -> int:
    """Of a network's parameters."""
    return sum(parameter.nbytes for parameter in net.parameters())


def largest_weight_bytes(net: nn.Module) -> int:
    """Of the largest parameter, which a convolution may copy into another layout."""
    return max((parameter.nbytes for parameter in net.parameters()), default=0)


# --- for images that guide -----------------------------------------------------------------------------------------------


def tiled_area(images_BCHW: Tensor, features: PatchFeatures, patch: int | None = None) -> Tensor:
    """The part of the images that the maps' cells tile, a view: cells of overlapping patches tile less than the image, and
    begin (patch - stride) / 2 pixels further in.

    `patch` is the backbone's, in pixels; where it isn't given, patches are taken to end where the image does.
    """
    height, width = (cells * features.stride for cells in features.grid)
    if patch is None:
        patch = images_BCHW.shape[-1] - width + features.stride
    if features.stride >= patch:
        return images_BCHW
    start = (patch - features.stride) // 2
    return images_BCHW[..., start : start + height, start : start + width]


# --- for settings and weights from elsewhere --------------------------------------------------------------------------


def given_settings(kind: type, settings: JsonObject, owner: str) -> dict[str, Any]:
    """Those of a JSON object's settings that aren't null, for the dataclass `kind`; lists, and lists in them, become tuples.

    Raises `UpsamplerError` where one is unknown, or one without default lacks; whose they are (`owner`) is for the message.
    """
    names = [field.name for field in fields(kind)]
    required = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if unknown := sorted(set(settings) - set(names)):
        raise UpsamplerError(
            f"no such {owner.removeprefix('the ')} settings: {', '.join(unknown)}; there are: {', '.join(names)}"
        )
    if missing := [name for name in required if settings.get(name) is None]:
        raise UpsamplerError(f"{owner}'s settings lack {', '.join(missing)}: {json.dumps(dict(settings))}")
    return {name: _without_lists(value) for name, value in settings.items() if value is not None}


def _without_lists(value: JsonValue) -> object:
    return tuple(map(_without_lists, value)) if isinstance(value, list) else value


def require_counts(settings: Settings, *names: str) -> None:
    """Raise `UpsamplerError` unless these are whole numbers of at least 1, or None."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and (type(value) is not int or value < 1):
            raise UpsamplerError(f"{name} must be a whole number of at least 1, got {value!r}")


def require_fitting(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Raise `UpsamplerError` with the first differences where names or shapes aren't those expected of `what`."""
    differences = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    found = [f"{len(names)} {kind}: {', '.join(names[:5])}" for kind, names in differences.items() if names]
    if found:
        raise UpsamplerError(f"the weights don't fit {what}: {'; '.join(found)}")
