"""Levels as they are asked for (`--levels x2=lift:URL@float16`), and what they come to for a backbone."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from operators.backbone import (
    TimmBackbone,
)
from operators.upsamplers import create_upsampler
from pipelines.config import ConfigError
from pipelines.features.upsamplers import (
    METHODS,
    UpsamplerWeights,
)
from storage.paths import redact
from storage.spec import Level


@dataclass(frozen=True, kw_only=True)
class LevelChoice:
    """One `--levels` entry: `NAME[=METHOD[:URL]][@DTYPE]`, NAME being xFACTOR, ROWSxCOLUMNS, or pooled."""

    name: str
    method: str
    dtype: str
    url: str = ""
    "of a learned method's checkpoint"

    @classmethod
    def parse(cls, text: str, encoding: str) -> "LevelChoice":
        # Not what lies between an @ and the end of a URL, which may have one of its own.
        body, dtype = re.fullmatch(r"(.*?)(?:@([^@/:]*))?", text).groups()
        name, _, method = body.partition("=")
        method, _, url = method.partition(":")
        if not re.fullmatch(r"pooled|x\d+(\.\d+)?|\d+x\d+", name):
            raise ConfigError(
                f"--levels {redact(text)}: {redact(name)!r} is no level; use x1, x2, x0.5, ..., 112x112 (rows x columns), "
                "or pooled"
            )
        dtype = dtype or encoding
        if dtype not in ("float16", "float32", "int8"):
            raise ConfigError(f"--levels {redact(text)}: {dtype!r} is no encoding; there are float16, float32, int8")
        if name == "pooled" and dtype == "int8":
            dtype = "float16"
        if bool(url) != (method in METHODS):
            raise ConfigError(
                f"--levels {redact(text)}: learned methods ({', '.join(METHODS)}) take the URL of a checkpoint, as in "
                "x2=lift:s3://bucket/checkpoint; others take none"
            )
        return cls(name=name, method=method, dtype=dtype, url=url)


def resolve_level(
    choice: LevelChoice,
    backbone: TimmBackbone,
    size: tuple[int, int],
    n_layers: int,
    learned: UpsamplerWeights | None = None,
    fresh: Callable[[], nn.Module] | None = None,
) -> Level:
    """A `Level` with everything filled in. Raises `ConfigError` or `UpsamplerError` where the grid can't be had."""
    channels = backbone.channels * n_layers
    if choice.name == "pooled":
        method = choice.method or ("cls" if backbone.has_cls else "mean")
        if method not in ("cls", "mean") or (method == "cls" and not backbone.has_cls):
            raise ConfigError(
                f"--levels pooled={method}: use mean{', or cls' if backbone.has_cls else '; this model has no CLS token'}"
            )
        return Level(name="pooled", method=method, grid=None, channels=channels, dtype=choice.dtype)
    base = backbone.grid_of(size)
    grid = _level_grid(choice.name, base)
    method = choice.method
    if grid == base and method in ("", "backbone"):
        method = "backbone"
    elif not method:
        method = "average" if grid[0] < base[0] or grid[1] < base[1] else "bilinear"
    if method == "average" and (base[0] % grid[0] or base[1] % grid[1]):
        raise ConfigError(
            f"--levels {choice.name}=average: {base[0]}x{base[1]} cells don't divide into {grid[0]}x{grid[1]}"
        )
    digest = ""
    if learned:
        if learned.channels != channels:
            raise ConfigError(
                f"--levels {choice.name}={method}: the checkpoint is for maps of {learned.channels} channels; "
                f"{n_layers} layers of this backbone have {channels}"
            )
        digest = learned.check(fresh, base, grid)
    elif method != "backbone":
        digest = create_upsampler(method).digest
    step = tuple(backbone.stride * b / g for b, g in zip(base, grid, strict=True))
    edge = backbone.cell_start() - backbone.stride / 2
    return Level(
        name=choice.name,
        method=method,
        grid=grid,
        channels=channels,
        dtype=choice.dtype,
        start=(edge + step[0] / 2, edge + step[1] / 2),
        step=(step[0], step[1]),
        digest=digest,
    )


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
