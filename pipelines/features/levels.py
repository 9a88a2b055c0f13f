"""Levels as they are asked for (`--levels x2=lift:URL@float16`), and what they come to for a backbone."""

import re
from dataclasses import dataclass
from typing import cast, get_args

from operators.backbone import TimmBackbone
from operators.upsamplers import UpsamplerError, find_method, method_names, split_method
from pipelines.config import ConfigError
from pipelines.features.upsamplers import UpsamplerWeights
from storage.redaction import redact
from storage.spec import Compression, Dtype, Encoding, Level, encoding_of

_OF_THE_BACKBONE = ("", "backbone", "mean", "cls")
"""What a level may be without an upsampler; nothing stands for what suits its grid."""


@dataclass(frozen=True, kw_only=True)
class LevelChoice:
    """One `--levels` entry: `NAME[=METHOD[:URL]][@ENCODING]`, NAME being xFACTOR, ROWSxCOLUMNS, or pooled."""

    name: str
    method: str
    dtype: Dtype
    compression: Compression
    url: str = ""
    "of a learned method's checkpoint"

    @classmethod
    def parse(cls, text: str, encoding: str) -> "LevelChoice":
        # Not what lies between an @ and the end of a URL, which may have one of its own.
        body, own = re.fullmatch(r"(.*?)(?:@([^@/:]*))?", text).groups()
        name, _, method = body.partition("=")
        method, url = split_method(method)
        if not re.fullmatch(r"pooled|x\d+(\.\d+)?|\d+x\d+", name):
            raise ConfigError(
                f"--levels {redact(text)}: {redact(name)!r} is no level; use x1, x2, x0.5, ..., 112x112 (rows x columns), "
                "or pooled"
            )
        encoding = own or encoding
        if encoding not in get_args(Encoding):
            raise ConfigError(f"--levels {redact(text)}: {encoding!r} is no encoding; there are {', '.join(get_args(Encoding))}")
        if name == "pooled":
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
        dtype, _, raw = encoding.partition("-")
        return cls(name=name, method=method, dtype=cast(Dtype, dtype), compression="none" if raw else "zstd", url=url)

    @property
    def encoding(self) -> str:
        """As it is asked for."""
        return encoding_of(self.dtype, self.compression)


def resolve_level(
    choice: LevelChoice, backbone: TimmBackbone, size: tuple[int, int], n_layers: int, learned: UpsamplerWeights | None = None
) -> Level:
    """A `Level` with everything filled in. Raises `ConfigError` or `UpsamplerError` where the grid can't be had."""
    channels = backbone.channels * n_layers
    if choice.name == "pooled":
        method = choice.method or ("cls" if backbone.has_cls else "mean")
        if method not in ("cls", "mean") or (method == "cls" and not backbone.has_cls):
            raise ConfigError(
                f"--levels pooled={method}: use mean{', or cls' if backbone.has_cls else '; this model has no CLS token'}"
            )
        return Level(
            name="pooled", method=method, grid=None, channels=channels, dtype=choice.dtype, compression=choice.compression
        )
    base = backbone.grid_of(size)
    grid = _level_grid(choice.name, base)
    method = choice.method
    if grid == base and method in ("", "backbone"):
        method = "backbone"
    elif not method:
        method = "average" if grid[0] < base[0] or grid[1] < base[1] else "bilinear"
    digest = _held_against(choice.name, method, learned, channels, base, grid) if method != "backbone" else ""
    step = tuple(backbone.stride * b / g for b, g in zip(base, grid, strict=True))
    edge = (backbone.patch - backbone.stride) / 2
    return Level(
        name=choice.name,
        method=method,
        grid=grid,
        channels=channels,
        dtype=choice.dtype,
        compression=choice.compression,
        start=(edge + step[0] / 2, edge + step[1] / 2),
        step=(step[0], step[1]),
        digest=digest,
    )


def _held_against(
    name: str, method: str, learned: UpsamplerWeights | None, channels: int, base: tuple[int, int], grid: tuple[int, int]
) -> str:
    """The digest of a level's upsampler, where that can bring maps of `base` cells to `grid`; empty without weights."""
    if learned is None:
        found = find_method(method)
        try:
            found.require_grid(found.parse({}), base, grid)
        except UpsamplerError as error:
            raise ConfigError(f"--levels {name}={method}: {error}") from None
        return ""
    if learned.channels not in (None, channels):
        raise ConfigError(
            f"--levels {name}={method}: the checkpoint is for maps of {learned.channels} channels; the layers that are taken "
            f"of this backbone have {channels}"
        )
    learned.require_grid(base, grid)
    return learned.digest


def _level_grid(name: str, base: tuple[int, int]) -> tuple[int, int]:
    if not name.startswith("x"):
        rows, columns = name.split("x")
        return int(rows), int(columns)
    factor = float(name[1:])
    grid = tuple(n * factor for n in base)
    if factor <= 0 or any(n != int(n) for n in grid):
        raise ConfigError(
            f"--levels {name}: {base[0]}x{base[1]} cells times {factor:g} are not whole; use another factor, or ROWSxCOLUMNS"
        )
    return int(grid[0]), int(grid[1])
