"""Readouts: small trained networks from a frozen backbone's map to a dense prediction.

A readout is made of settings (`ReadoutConfig`, `build_readout`); each has a class in a file of its kind and a line in `READOUTS`.
"""

import math
from dataclasses import Field, asdict, dataclass, fields
from typing import Literal, get_args

import torch

from operators.readouts.baselines import Bicubic, StridedConv, TransposedConv
from operators.readouts.deap import DeAP
from operators.readouts.linear import DepthBins, FeatUpReadout, LinearReadout
from operators.readouts.readout import Readout, ReadoutError, SplitReadout, decoder_width
from operators.upsamplers.protocol import UpsamplerError, given_settings
from storage.documents import JsonObject, JsonValue

__all__ = ["READOUTS", "Readout", "ReadoutConfig", "ReadoutError", "SplitReadout", "build_readout"]

READOUTS: dict[str, type[Readout]] = {
    "deap": DeAP,
    "bicubic": Bicubic,
    "transposed": TransposedConv,
    "strided": StridedConv,
    "linear": LinearReadout,
    "featup": FeatUpReadout,
    "depth_bins": DepthBins,
}
"""Methods by name; each says which settings it takes."""


@dataclass(frozen=True, kw_only=True)
class ReadoutConfig:
    """What a state dict doesn't tell about its readout. The defaults are those of the releases that made the published tables.

    Raises `ReadoutError` where settings are impossible or don't go together.
    """

    method: str
    channels: int
    "of the backbone's maps"
    outputs: int
    "channels of the prediction: classes, or 1 for depth"
    split: tuple[int, ...] = ()
    "readouts of their own for so many outputs each, joined; CenterNet's are 1 and 2"
    output: tuple[int, int] = (224, 224)
    "pixels (height, width) that it is trained for, one number for a square; DeAP asks a query for each 8 x 8"
    grid: tuple[int, int] = (37, 37)
    "transposed, strided: cells of the maps that it is trained on, one number for a square"
    dim: int | None = None
    "channels of the query map; null: 16 for deap, 48 for the others"
    width: int | None = None
    "channels of the convolutions that draw pixels; null: by width_rule. The published COCO-Stuff readout has 32"
    width_rule: Literal["released", "paper"] = "released"
    "max(dim / 4, outputs / 2), or the paper's max(dim / 4, outputs), which contradicts its own tables"
    output_bias: float = 0.0
    "added to the initial biases of the last convolution and of the skip, so that outputs begin at twice as much; depth has 1"
    heads: int = 8
    "deap: of its attention"
    mask: Literal["released", "paper", "none"] = "released"
    "deap: Gaussian of the squared distance, of the distance as in eq. 2, or the ablation without masks"
    positions: Literal["trained", "index"] = "trained"
    "deap: query positions at other sizes stay on the trained scale, or are cell indices"
    shared_sigma: bool = False
    "deap: one mask width for all heads, an ablation"
    only_mask: bool = False
    "deap: attention by masks alone, an ablation"
    unused_norm: bool = True
    "deap: keep the LayerNorm that is never applied, but counted"
    resize: Literal["bilinear", "nearest"] = "bilinear"
    "linear: how logits come to the output's size"
    hidden: int | None = None
    "featup: channels between two convolutions, 1x1 and 3x3, the release's other mode, with 32; null: a single one, 1x1"

    def to_json(self) -> dict[str, JsonValue]:
        """As checkpoints have it; `hidden`, which the first ones hadn't, where there are any."""
        return {name: value for name, value in asdict(self).items() if name != "hidden" or value is not None}

    @classmethod
    def parse(cls, settings: JsonObject) -> "ReadoutConfig":
        """From a JSON object; absent and null settings take the defaults."""
        try:
            given = given_settings(cls, settings, "the readout")
        except UpsamplerError as error:
            raise ReadoutError(str(error)) from None
        return cls(**given)

    def __post_init__(self) -> None:
        for name in ("output", "grid"):
            if _is_count(side := getattr(self, name)):
                object.__setattr__(self, name, (side, side))
        if self.method not in READOUTS:
            raise ReadoutError(f"no readout is called {self.method!r}; there are: {', '.join(READOUTS)}")
        for field in fields(self)[1:]:
            _check_value(field, getattr(self, field.name))
        self._check_options()
        self._check_fit()

    @property
    def parts(self) -> tuple[int, ...]:
        """Outputs of each readout."""
        return self.split or (self.outputs,)

    @property
    def query_channels(self) -> int:
        """`dim` with its default."""
        return self.dim or self.kind.usual_dim

    @property
    def kind(self) -> type[Readout]:
        """The method's class."""
        return READOUTS[self.method]

    def _check_options(self) -> None:
        taken = self.kind.settings
        allowed = taken | {"split", "output"} | ({"width", "width_rule"} if "dim" in taken else set())
        for field in fields(self)[3:]:
            value = getattr(self, field.name)
            if value != field.default and field.name not in allowed:
                raise ReadoutError(f"{field.name}={value!r} is no setting of {self.method}")

    def _check_fit(self) -> None:
        if sum(self.parts) != self.outputs:
            raise ReadoutError(f"split {self.split} makes {sum(self.split)} outputs, not {self.outputs}")
        kind, only = self.kind, self.kind.only_outputs
        if only is not None and self.parts != (only,):
            raise ReadoutError(f"{self.method} has {only} output{'s' * (only > 1)}, not {self.outputs}")
        divisor = kind.dim_groups(self.heads)
        if self.query_channels % divisor or self.query_channels < 4:
            raise ReadoutError(
                f"dim must be a multiple of {divisor} for {self.method}, and at least 4; got {self.query_channels}"
            )
        if self.channels % kind.channel_groups:
            raise ReadoutError(
                f"{self.method} normalises {kind.channel_groups} groups of channels; {self.channels} don't divide into them"
            )
        if self.only_mask and self.mask == "none":
            raise ReadoutError("only_mask without a mask would see nothing; choose one of the two ablations")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def _check_value(field: Field[object], value: object) -> None:
    """Raise `ReadoutError` where a value isn't of its field's kind."""
    default, choices = field.default, get_args(field.type) if isinstance(field.default, str) else ()
    if isinstance(default, bool):
        fits, rule = isinstance(value, bool), "true or false"
    elif choices:
        fits, rule = value in choices, f"one of {', '.join(choices)}"
    elif isinstance(default, float):
        # Python counts True as the number 1.
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        rule = "a finite number"
    elif isinstance(default, tuple):
        fits = isinstance(value, tuple) and (not default or len(value) == 2) and all(map(_is_count, value))
        rule = ("two " if default else "") + "whole numbers of at least 1"
    else:
        fits, rule = _is_count(value) or (default is None and value is None), "a whole number of at least 1"
    if not fits:
        raise ReadoutError(f"{field.name} must be {rule}, got {value!r}")


def build_readout(config: JsonObject | ReadoutConfig, seed: int = 0) -> Readout:
    """A readout with PyTorch's default initialisation from `seed`, in train mode."""
    config = config if isinstance(config, ReadoutConfig) else ReadoutConfig.parse(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = [_build_part(config, outputs) for outputs in config.parts]
    return SplitReadout(parts) if config.split else parts[0]


def _build_part(config: ReadoutConfig, outputs: int) -> Readout:
    options = {name: getattr(config, name) for name in config.kind.settings}
    if "dim" in options:
        dim = config.query_channels
        width = config.width or decoder_width(dim + config.kind.appended, outputs, config.width_rule)
        options |= {"dim": dim, "width": width}
    return config.kind(config.channels, outputs, **options)
