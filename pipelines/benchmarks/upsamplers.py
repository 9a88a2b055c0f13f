"""Upsamplers beside bilinear enlargement, and beside the plain formulation of each (pipelines/benchmarks/formulations.py).

`measure_upsamplers` times all in one process, in changing order, and holds results and memory against what they must be;
`upsamplers_report` is its Markdown.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from operators.backbone import PatchFeatures, TimmBackbone
from operators.lean_timm import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from operators.timm_models import create_model
from operators.upsamplers import Upsampler, UpsamplerError, create_upsampler, find_method
from pipelines.benchmarks.formulations import FORMULATIONS, Formulation
from pipelines.config import ConfigError, require_at_least
from pipelines.costs.clocks import (
    Machine,
    NumbersFile,
    device_name,
    device_of,
    median_ratio,
    needed_bytes,
    peak_bytes,
    require_device,
    timed,
)
from pipelines.costs.process import BenchmarkFailed
from pipelines.features.memory import Call, allow_alone, free_bytes
from pipelines.results import number_lines

_TOLERANCE = 1e-4
"of results in float32, relative to the largest value"

_PATCH = 16


@dataclass(frozen=True, kw_only=True)
class UpsamplersBenchmark:
    """Each upsampler beside bilinear, and beside its paper's plain formulation with the same weights: time, memory, results."""

    methods: tuple[str, ...] = tuple(FORMULATIONS)
    """What is compared; all there are by default."""
    grids: tuple[int, ...] = (56, 112)
    """Sides of the output grids; those that a method can't give are left out. Published are 112 224 448: on GPUs."""
    cells: int = 28
    """Side of the backbone's map. Images have 16 pixels a cell."""
    channels: int = 384
    """Of the map."""
    batch: int = 1
    """Images at once."""
    repeat: int = 5
    """Rounds; each runs everything of a method and grid once, in changing order. Times and ratios are medians over them."""
    row_s: float = 60.0
    """No further run of a row that would bring it beyond so many seconds."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is a GPU where there is one."""
    json: NumbersFile = ""

    def __post_init__(self) -> None:
        require_at_least(1, self, "grids", "cells", "channels", "batch", "repeat")
        if unknown := [name for name in self.methods if name not in FORMULATIONS]:
            raise ConfigError(f"--methods {unknown[0]}: there are plain formulations of {', '.join(FORMULATIONS)}")
        if not self.methods or not self.grids or self.row_s <= 0:
            raise ConfigError("--methods and --grids must be at least one each, and --row-s above 0")
        require_device(self.device)


# No network. 2 CPU cores: some seconds; the times mean nothing at this size.
DEBUG = UpsamplersBenchmark(grids=(18,), cells=9, channels=32, repeat=1)


@dataclass(frozen=True, kw_only=True)
class UpsamplerComparison:
    """A method on a grid, by both ways."""

    name: str
    "of `FORMULATIONS`"
    grid: int
    "its side in cells"
    seconds: Mapping[str, Sequence[float]]
    "of every round: `ours`, `bilinear`, and `plain` where there is memory for it"
    of_bilinear: float
    "our time to bilinear's: median of the rounds' ratios"
    times_faster: float | None
    "plain by ours, likewise"
    asked: float
    "what that is to be at least"
    peak_bytes: Mapping[str, int]
    "`ours` and `plain`, with our weights; of a plain one that wasn't run what it would take"
    declared_bytes: int
    "our bound on `ours`"
    difference: float | None
    "largest one of the results, relative to the largest value"

    @property
    def is_short(self) -> bool:
        """Whether ours is slower than it is asked to be."""
        return self.times_faster is not None and self.times_faster < self.asked


@dataclass(frozen=True, kw_only=True)
class UpsamplersResult:
    """All that was measured."""

    device: str
    compared: tuple[UpsamplerComparison, ...]
    left_out: tuple[str, ...]
    "grids that methods can't give, in words"


def measure_upsamplers(config: UpsamplersBenchmark) -> UpsamplersResult:
    """Times, memory and differences of every method and grid."""
    device, compared, left_out = device_of(config.device), list[UpsamplerComparison](), list[str]()
    for name in config.methods:
        for grid in config.grids:
            try:
                compared.append(_compare(config, name, FORMULATIONS[name], grid, device))
            except UpsamplerError as error:
                left_out.append(f"{name} at {grid} x {grid}: {error}")
    if not compared:
        raise ConfigError(f"nothing is left to compare: {left_out[0]}")
    return UpsamplersResult(device=device_name(device), compared=tuple(compared), left_out=tuple(left_out))


@torch.inference_mode()
def _compare(
    config: UpsamplersBenchmark, name: str, formulation: Formulation, side: int, device: torch.device
) -> UpsamplerComparison:
    """Raises `UpsamplerError` where the method can't give the grid."""
    grid, base = (side, side), (config.cells, config.cells)
    pixels = (_PATCH * config.cells, _PATCH * config.cells)
    upsampler = _upsampler(formulation, config.channels, base, grid)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(config.batch, 3, *pixels, generator=generator).to(device)
    maps = torch.randn(config.batch, config.channels, *base, generator=generator).to(device)
    features = PatchFeatures(layers={0: maps}, prefix={}, stride=_PATCH)

    call: Call = (config.batch, config.channels, base, pixels, grid)
    allow_alone(upsampler, device, call)
    found: dict[str, Tensor] = {}

    def run(way: str, call: Callable[[], Tensor]) -> None:
        found[way] = call()

    net = getattr(upsampler, "net")  # noqa: B009 - of those that have a formulation
    ways: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: upsampler(images, features, (0,), grid),
        "plain": lambda: formulation.plain(net, images, maps, grid),
        "bilinear": lambda: create_upsampler("bilinear")(images, features, (0,), grid),
    }
    weights, peaks = upsampler.kept_bytes(config.batch), {}
    if (needed := needed_bytes(ways["plain"])) > free_bytes(device) / 2:  # and operations' own memory as much again
        del ways["plain"]
        peaks["plain"] = needed
    runs = {way: partial(run, way, call) for way, call in ways.items()}
    for way, each in runs.items():
        each()
        found.clear()
        peaks[way] = peak_bytes(each, device, warm_up=False)
    seconds = dict(zip(runs, timed(list(runs.values()), config.repeat, config.row_s, device), strict=True))
    plain = found.get("plain")
    return UpsamplerComparison(
        name=name,
        grid=side,
        seconds=seconds,
        of_bilinear=median_ratio(seconds["ours"], seconds["bilinear"]),
        times_faster=None if plain is None else median_ratio(seconds["plain"], seconds["ours"]),
        asked=2.0 if formulation.large is not None and side >= formulation.large else 1.0,
        peak_bytes={way: weights + peaks[way] for way in ("ours", "plain")},
        declared_bytes=upsampler.call_bytes(*call),
        difference=None if plain is None else float((found["ours"] - plain).abs().max() / plain.abs().max()),
    )


def _upsampler(formulation: Formulation, channels: int, base: tuple[int, int], grid: tuple[int, int]) -> Upsampler:
    """With random weights, for images as ImageNet's statistics normalise them."""
    reload = partial(create_model, "test_vit.r160_in1k", (_PATCH * 4,) * 2, None, 0)
    backbone = TimmBackbone(reload(), mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    method = find_method(formulation.method)
    settings = method.with_backbone(method.settings_for(backbone, channels, **formulation.settings), backbone)
    method.require_grid(settings, base, grid)
    return method.build(settings, method.initialised(settings).state_dict(), "fp32", reload)


def require_agreement(result: UpsamplersResult) -> None:
    """Raises `BenchmarkFailed` where results differ, or a bound didn't hold."""
    for one in result.compared:
        what = f"{one.name} at {one.grid} x {one.grid}"
        if one.difference is not None and not one.difference <= _TOLERANCE:
            raise BenchmarkFailed(f"{what} differs from its plain formulation by {one.difference:.2g} of the largest value")
        if one.peak_bytes["ours"] > one.declared_bytes:
            raise BenchmarkFailed(f"{what} took {one.peak_bytes['ours']:,} bytes, but declares {one.declared_bytes:,}")


def upsamplers_report(config: UpsamplersBenchmark, result: UpsamplersResult, machine: Machine) -> Iterator[str]:
    """The numbers as Markdown, line by line."""
    size = f"{config.cells} x {config.cells} cells of {config.channels} channels, batch {config.batch}"
    yield f"## upsamplers: {size}, float32, random weights"
    yield machine.usual_line(device=result.device)
    columns = {
        "method": "",
        "grid": "d",
        "ms": ",.1f",
        "of bilinear": ".1f",
        "plain, ms": ",.1f",
        "times faster": ".2f",
        "asked": ".0f",
        "peak MB": ",.1f",
        "declared": ",.1f",
        "plain, MB": ",.1f",
        "largest difference": ".1e",
    }
    rows = []
    for one in result.compared:
        ours, plain = (1e3 * statistics.median(one.seconds[way]) if way in one.seconds else None for way in ("ours", "plain"))
        peak, declared, of_plain = (
            count / 1e6 for count in (one.peak_bytes["ours"], one.declared_bytes, one.peak_bytes["plain"])
        )
        times = [ours, one.of_bilinear, plain, one.times_faster, one.asked]
        rows.append([one.name, one.grid, *times, peak, declared, of_plain, one.difference])
    yield from number_lines(columns, rows)
    yield f"""
- From the backbone's map and the image to the grid, the backbone left out. Medians of up to {config.repeat} rounds, in which
  everything of a line runs once, in changing order; ratios: medians of each round's.
- Peak: what torch's allocator holds at once, with weights and result; declared: `call_bytes`. Largest difference: of the two
  results, relative to the largest value."""
    for name in config.methods:
        yield f"- Plain {name} holds {FORMULATIONS[name].holds} at once."
    for one in result.compared:
        if one.times_faster is None:
            yield (
                f"- Plain {one.name} at {one.grid} x {one.grid} wasn't run: its tensors alone would take "
                f"{one.peak_bytes['plain'] / 1e9:,.1f} GB, more than half of the free memory."
            )
    for line in result.left_out:
        yield f"- Left out: {line}."
    short = [f"{one.name} at {one.grid}" for one in result.compared if one.is_short]
    if short:
        yield f"- **Slower than asked: {', '.join(short)}.**"
