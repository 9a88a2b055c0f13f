"""Levels as they are asked for (`--levels x2=lift:URL@float16`), and what they come to for a backbone."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast, get_args

from operators.backbone import TimmBackbone
from operators.upsamplers import UpsamplerError, find_method, method_names, split_method, split_settings
from pipelines.config import ConfigError
from pipelines.features.upsamplers import UpsamplerWeights
from storage.documents import JsonValue
from storage.redaction import redact
from storage.spec import Compression, Dtype, Encoding, InvalidSpec, Level, encoding_of, is_scale, require_level_name, spaced

_OF_THE_BACKBONE = ("", "backbone", "mean", "cls")
"""What a level may be without an upsampler; nothing stands for what suits its grid."""

NONE_STORED: Mapping[str, Level] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class LevelChoice:
    """One `--levels` entry: `[NAME:]SCALE[=METHOD[,SETTING=VALUE...][:URL]][@ENCODING]`, SCALE being xFACTOR, ROWSxCOLUMNS, or
    pooled."""

    name: str
    "its own, else its scale"
    scale: str
    method: str
    dtype: Dtype
    compression: Compression
    url: str = ""
    "of a learned method's checkpoint"
    settings: tuple[tuple[str, JsonValue], ...] = ()
    "of the method, that are others than the checkpoint's"

    @classmethod
    def parse(cls, text: str, encoding: str, stored: Mapping[str, Level] = NONE_STORED) -> "LevelChoice":
        """What `text` asks for, stored in `encoding` unless it says otherwise; a name alone stands for one of `stored`, a store's
        levels by name. Raises `ConfigError`."""
        # Not what lies between an @ and the end of a URL, which may have one of its own.
        body, own = re.fullmatch(r"(.*?)(?:@([^@/:]*))?", text).groups()
        place, _, method = body.partition("=")
        name, scale = _named(text, place, stored)
        try:
            method, settings = split_settings(method)
        except UpsamplerError as error:
            raise ConfigError(f"--levels {redact(text)}: {redact(str(error))}") from None
        method, url = split_method(method)
        encoding = own or encoding
        if encoding not in get_args(Encoding):
            raise ConfigError(f"--levels {redact(text)}: {encoding!r} is no encoding; there are {', '.join(get_args(Encoding))}")
        if scale == "pooled":
            encoding = encoding.replace("int8", "float16")
        try:
            learned = method not in _OF_THE_BACKBONE and find_method(method).learned
        except UpsamplerError as error:
            raise ConfigError(f"--levels {redact(text)}: {redact(str(error))}") from None
        if bool(url) != learned:
            names = ", ".join(method_names(lambda each: each.learned))
            raise ConfigError(
                f"--levels {redact(text)}: learned methods ({names}) take the URL of a checkpoint, as in "
                "x2=lift:s3://bucket/checkpoint; others take none"
            )
        if settings and not url:
            raise ConfigError(f"--levels {redact(text)}: {method} has no settings; checkpoints of some learned methods have")
        dtype, _, raw = encoding.partition("-")
        compression: Compression = "none" if raw else "zstd"
        return cls(
            name=name,
            scale=scale,
            method=method,
            dtype=cast(Dtype, dtype),
            compression=compression,
            url=url,
            settings=tuple(settings.items()),
        )

    @property
    def encoding(self) -> str:
        """As it is asked for."""
        return encoding_of(self.dtype, self.compression)

    @property
    def own_scale(self) -> str:
        """The scale, where the name is another one."""
        return "" if self.scale == self.name else self.scale

    @property
    def upsampler(self) -> tuple[str, str, tuple[tuple[str, JsonValue], ...]]:
        """Method, URL and settings: levels of the same share what is loaded."""
        return self.method, self.url, self.settings

    @property
    def displayed(self) -> str:
        """What of it isn't the method's, as it is asked for."""
        return f"{self.name}:{self.scale}" if self.own_scale else self.name


def level_name(text: str) -> str:
    """What the level is called that a `--levels` entry asks for."""
    return re.split("[=@]", text)[0].partition(":")[0]


def parse_levels(texts: Iterable[str], encoding: str) -> list[LevelChoice]:
    """`--levels` entries. Raises `ConfigError` where there is none, or two have one name."""
    choices = [LevelChoice.parse(text, encoding) for text in texts]
    of_name: dict[str, LevelChoice] = {}
    for choice in choices:
        first = of_name.setdefault(choice.name.casefold(), choice)
        if first is not choice:
            said = " ".join(each.displayed for each in choices)
            raise ConfigError(
                f"--levels {said}: {first.displayed} and {choice.displayed} have one name; give one of them a name of its own, "
                f"as in other:{choice.scale}"
            )
    if not choices:
        raise ConfigError("--levels must be at least one")
    return choices


def _named(text: str, place: str, stored: Mapping[str, Level]) -> tuple[str, str]:
    """Name and scale of what stands before an entry's method. Raises `ConfigError`."""
    if place in stored:
        return place, stored[place].scale or place
    name, has_own, scale = place.rpartition(":")
    name = name if has_own else scale
    if not is_scale(scale):
        raise ConfigError(
            f"--levels {redact(text)}: {redact(scale or place)!r} is no scale; use x1, x2, x0.5, ..., 112x112 (rows x columns), "
            "or pooled, behind a name of your own where you like, as in sharp:x2"
        )
    try:
        require_level_name(name, "" if name == scale else scale)
    except InvalidSpec as error:
        raise ConfigError(f"--levels {redact(text)}: {redact(str(error))}") from None
    return name, scale


def resolve_level(
    choice: LevelChoice, backbone: TimmBackbone, size: tuple[int, int], n_layers: int, learned: UpsamplerWeights | None = None
) -> Level:
    """A `Level` with everything filled in. Raises `ConfigError` or `UpsamplerError` where the grid can't be had."""
    channels = backbone.channels * n_layers
    if choice.scale == "pooled":
        method = choice.method or ("cls" if backbone.has_cls else "mean")
        if method not in ("cls", "mean") or (method == "cls" and not backbone.has_cls):
            others = ", or cls" if backbone.has_cls else "; this model has no CLS token"
            raise ConfigError(f"--levels {choice.displayed}={method}: use mean{others}")
        return Level(
            name=choice.name,
            method=method,
            grid=None,
            channels=channels,
            dtype=choice.dtype,
            compression=choice.compression,
            scale=choice.own_scale,
        )
    base = backbone.grid_of(size)
    grid = _level_grid(choice, base)
    method = choice.method
    if grid == base and method in ("", "backbone"):
        method = "backbone"
    elif not method:
        method = "average" if grid[0] < base[0] or grid[1] < base[1] else "bilinear"
    digest = _held_against(choice.displayed, method, learned, channels, base, grid) if method != "backbone" else ""
    edge = (backbone.patch - backbone.stride) / 2
    start, step = spaced((edge, edge), (backbone.stride * base[0], backbone.stride * base[1]), grid)
    return Level(
        name=choice.name,
        method=method,
        grid=grid,
        channels=channels,
        dtype=choice.dtype,
        compression=choice.compression,
        start=start,
        step=step,
        digest=digest,
        scale=choice.own_scale,
    )


def _held_against(
    place: str, method: str, learned: UpsamplerWeights | None, channels: int, base: tuple[int, int], grid: tuple[int, int]
) -> str:
    """The digest of a level's upsampler, where that can bring maps of `base` cells to `grid`; empty without weights."""
    if learned is None:
        found = find_method(method)
        try:
            found.require_grid(found.parse({}), base, grid)
        except UpsamplerError as error:
            raise ConfigError(f"--levels {place}={method}: {error}") from None
        return ""
    if learned.channels not in (None, channels):
        raise ConfigError(
            f"--levels {place}={method}: the checkpoint is for maps of {learned.channels} channels; the layers that are taken "
            f"of this backbone have {channels}"
        )
    learned.require_grid(base, grid)
    return learned.digest


def _level_grid(choice: LevelChoice, base: tuple[int, int]) -> tuple[int, int]:
    if not choice.scale.startswith("x"):
        rows, columns = map(int, choice.scale.split("x"))
        if not rows or not columns:
            raise ConfigError(f"--levels {choice.displayed}: a map has at least one row and one column; give ROWSxCOLUMNS")
        return rows, columns
    factor = float(choice.scale[1:])
    grid = tuple(n * factor for n in base)
    if factor <= 0 or any(n != int(n) for n in grid):
        raise ConfigError(
            f"--levels {choice.displayed}: {base[0]}x{base[1]} cells times {factor:g} are not whole; use another factor, or "
            "ROWSxCOLUMNS"
        )
    return int(grid[0]), int(grid[1])
