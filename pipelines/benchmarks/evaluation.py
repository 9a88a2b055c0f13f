"""Matching and label propagation beside the plainest way to the same results.

`measure_evaluate` times both on random maps in one process and checks that they agree; `evaluate_report` is its Markdown.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from operators.metrics.matching import Normalise, best_pixels
from operators.metrics.propagation import Propagation, Propagator
from pipelines.config import ConfigError, require_at_least
from pipelines.costs.clocks import Machine, NumbersFile, device_name, device_of, median_ratio, peak_bytes, require_device, timed
from pipelines.costs.process import BenchmarkFailed
from pipelines.results import number_lines

_TOLERANCE = 1e-4
"largest difference of similarities and of soft labels, which are at most 1"


@dataclass(frozen=True, kw_only=True)
class EvaluateBenchmark:
    """Where key points lie, and labels carried through a clip, beside the plainest code: all similarities at once."""

    grids: tuple[int, ...] = (28, 56)
    """Sides of the maps in cells."""
    channels: int = 384
    """Of the maps."""
    pixels: int = 448
    """Side of the image that maps are enlarged to for matching."""
    points: int = 12
    """Key points that are matched at once; SPair-71k's pairs have about as many."""
    frames: int = 24
    """Of a clip. DAVIS' validation clips have 69 on average; the context is full from the 8th on."""
    objects: int = 3
    """Labels of a clip, the background included."""
    repeat: int = 3
    """Rounds; each runs everything once. Times and ratios are medians over them."""
    threads: int = 0
    """Of torch, on a CPU; 0: as many as it takes by itself. jobs/evaluate.py has one per worker."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is a GPU where there is one."""
    json: NumbersFile = ""

    def __post_init__(self) -> None:
        require_at_least(1, self, "grids", "channels", "points", "objects", "repeat")
        require_at_least(2, self, "frames")
        require_at_least(0, self, "threads")
        if not self.grids or self.pixels < max(self.grids):
            raise ConfigError("--grids must be at least one, and --pixels at least the largest of them")
        require_device(self.device)


# No network. 2 CPU cores: a second, and the times mean nothing at this size. The defaults take about 4 minutes and 3 GB, nearly
# all for the plain propagation on 56 x 56 cells.
DEBUG = EvaluateBenchmark(grids=(4, 9), channels=8, pixels=36, points=3, frames=11, repeat=2)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Both ways to one result, `ours` and `plain`."""

    grid: int
    "side of the maps in cells"
    seconds: Mapping[str, Sequence[float]]
    "of every round, by way"
    peak_bytes: Mapping[str, int]
    "by way"
    ratio: float
    "median of the rounds' ratios, plain by ours"
    largest_difference: float

    @property
    def cells(self) -> str:
        """Of a map."""
        return f"{self.grid} x {self.grid} cells"


@dataclass(frozen=True, kw_only=True)
class MatchingComparison(Comparison):
    normalise: Normalise


@dataclass(frozen=True, kw_only=True)
class PropagationComparison(Comparison):
    frames: int
    "of the clip"


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """All that was measured."""

    device: str
    matching: Sequence[MatchingComparison]
    propagation: Sequence[PropagationComparison]


def measure_evaluate(config: EvaluateBenchmark) -> EvaluateResult:
    """Times and peak memory of both ways. Raises `BenchmarkFailed` where their results differ."""
    device = device_of(config.device)
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads or before)
    try:
        with torch.inference_mode():
            kinds: tuple[Normalise, ...] = ("cells", "pixels")
            pairs = itertools.product(config.grids, kinds)
            matching = [_compare_matching(config, grid, normalise, device) for grid, normalise in pairs]
            propagation = [_compare_propagation(config, grid, device) for grid in config.grids]
        return EvaluateResult(device=device_name(device), matching=matching, propagation=propagation)
    finally:
        torch.set_num_threads(before)


def _compare_matching(config: EvaluateBenchmark, grid: int, normalise: Normalise, device: torch.device) -> MatchingComparison:
    generator = torch.Generator().manual_seed(0)
    map_hwC = _clip(1, grid, config.channels, generator)[0].to(device)
    near = map_hwC.flatten(0, 1)[torch.randint(grid * grid, (config.points,), generator=generator).to(device)]
    queries = near + 0.5 * torch.randn(near.shape, generator=generator).to(device)
    size = (config.pixels, config.pixels)

    def difference(ours: Tensor, plain: Tensor) -> float:
        """Of the similarities found, and not of the pixels: float32 may prefer a neighbour that is as similar up to rounding."""
        similarity = similarities(queries, map_hwC, size, normalise).flatten(1)
        scores = [similarity.gather(1, xy[:, 1:] * size[1] + xy[:, :1]) for xy in (ours, plain)]
        return (scores[0] - scores[1]).abs().max().item() / similarity.abs().max().item()

    compared = _compare(
        config,
        f"the pixels found in {grid} x {grid} cells",
        grid,
        lambda: best_pixels(queries, map_hwC, size, normalise=normalise).xy_K2,
        lambda: enlarge_then_match(queries, map_hwC, size, normalise),
        difference,
    )
    return MatchingComparison(**vars(compared), normalise=normalise)


def enlarge_then_match(queries_KC: Tensor, map_hwC: Tensor, size: tuple[int, int], normalise: Normalise) -> Tensor:
    """Pixels [K, 2] (column, row) most similar to the queries, in the map enlarged to `size` (H, W)."""
    best = similarities(queries_KC, map_hwC, size, normalise).flatten(1).argmax(dim=1)
    return torch.stack([best % size[1], best // size[1]], dim=1)


def similarities(queries_KC: Tensor, map_hwC: Tensor, size: tuple[int, int], normalise: Normalise) -> Tensor:
    """Of the queries with all pixels of the enlarged map, [K, H, W]."""
    if normalise == "cells":
        map_hwC = F.normalize(map_hwC, dim=-1)
    enlarged = F.interpolate(map_hwC.permute(2, 0, 1)[None], size=size, mode="bilinear", align_corners=False)[0]
    if normalise == "pixels":
        enlarged, queries_KC = F.normalize(enlarged, dim=0), F.normalize(queries_KC, dim=1)
    return (queries_KC @ enlarged.flatten(1)).unflatten(1, size)


def _compare_propagation(config: EvaluateBenchmark, grid: int, device: torch.device) -> PropagationComparison:
    generator, settings = torch.Generator().manual_seed(0), Propagation()
    maps = _clip(config.frames, grid, config.channels, generator).to(device)
    cells = torch.arange(grid * grid).view(grid, grid)
    labels = F.one_hot(cells * config.objects // cells.numel(), config.objects).permute(2, 0, 1).float().to(device)

    def ours() -> Tensor:
        propagator = Propagator(maps[0], labels, settings)
        return torch.stack([propagator.step(each) for each in maps[1:]])

    compared = _compare(
        config,
        f"the soft labels of {grid} x {grid} cells",
        grid,
        ours,
        lambda: propagate_with_all_affinities(maps, labels, settings),
        lambda ours, plain: (ours - plain).abs().max().item(),
    )
    return PropagationComparison(**vars(compared), frames=config.frames)


def propagate_with_all_affinities(maps_ThwC: Tensor, labels_Ohw: Tensor, settings: Propagation) -> Tensor:
    """Soft labels [T - 1, O, h, w] of all frames but the first, step by step as the official code gets them: a frame and its
    context are normalised, all their affinities exponentiated, windowed by a product, cut at the k-th and normalised."""
    _, h, w, _ = maps_ThwC.shape
    features = maps_ThwC.flatten(1, 2)
    cells = torch.arange(h * w, device=features.device)
    y, x = cells // w, cells % w
    near = ((y[:, None] - y).abs() <= settings.radius) & ((x[:, None] - x).abs() <= settings.radius)
    window = near.float() if settings.radius else torch.ones_like(near, dtype=torch.float32)
    first, soft = (features[0], labels_Ohw.flatten(1)), list[Tensor]()
    latest: list[tuple[Tensor, Tensor]] = []
    for target in features[1:]:
        context = [first, *latest]
        sources = F.normalize(torch.stack([source for source, _ in context]), dim=-1)
        similarity = F.normalize(target, dim=-1) @ sources.transpose(1, 2)
        affinity = torch.exp(similarity / settings.temperature) * window
        affinity = affinity.transpose(1, 2).reshape(-1, h * w)
        kth = affinity.topk(min(settings.top_k, len(affinity)), dim=0).values[-1]
        affinity[affinity < kth] = 0
        affinity = affinity / affinity.sum(dim=0)
        soft.append(torch.cat([known for _, known in context], dim=1) @ affinity)
        latest = [*latest, (target, soft[-1])][-settings.context :] if settings.context else []
    return torch.stack(soft).unflatten(2, (h, w))


def _clip(frames: int, grid: int, channels: int, generator: torch.Generator) -> Tensor:
    """Random maps [frames, grid, grid, channels] that are smooth from cell to cell, and alike from frame to frame."""
    coarse = torch.randn(1, channels, -(-grid // 4), -(-grid // 4), generator=generator)
    smooth = F.interpolate(coarse, size=(grid, grid), mode="bicubic")[0].permute(1, 2, 0)
    return smooth + 0.7 * torch.randn(frames, grid, grid, channels, generator=generator)


def _compare(
    config: EvaluateBenchmark,
    what: str,
    grid: int,
    ours: Callable[[], Tensor],
    plain: Callable[[], Tensor],
    difference: Callable[[Tensor, Tensor], float],
) -> Comparison:
    """What both ways took, and the `difference` of what they gave. Raises `BenchmarkFailed` if it is one."""
    device, found = device_of(config.device), dict[str, Tensor]()
    runs = (lambda: found.update(ours=ours()), lambda: found.update(plain=plain()))
    peaks = [peak_bytes(run, device, warm_up=False) for run in runs]  # and so they are warm
    of_ours, of_plain = timed(runs, config.repeat, math.inf, device)
    if not (apart := difference(found["ours"], found["plain"])) <= _TOLERANCE:
        raise BenchmarkFailed(f"{what} differ by {apart:.2g} between the two ways")
    return Comparison(
        grid=grid,
        seconds={"ours": of_ours, "plain": of_plain},
        peak_bytes=dict(zip(("ours", "plain"), peaks, strict=True)),
        ratio=median_ratio(of_plain, of_ours),
        largest_difference=apart,
    )


def evaluate_report(config: EvaluateBenchmark, result: EvaluateResult, machine: Machine) -> Iterator[str]:
    """The numbers as Markdown, line by line."""
    yield f"## evaluate: matching and propagation beside plain code, {config.channels} channels, float32"
    yield machine.usual_line(device=result.device)
    size = f"{config.points} points in {config.pixels} x {config.pixels} pixels, similarity"
    matching = {f"{one.cells}, {one.normalise}": one for one in result.matching}
    yield from _comparison_lines(f"matching: {size}", matching)
    propagation = {one.cells: one for one in result.propagation}
    yield from _comparison_lines(f"propagation: clip of {config.frames} frames", propagation)
    yield f"""
- Medians of {config.repeat} rounds, in which everything runs once; "times faster": the median of each round's ratio.
- Plain matching enlarges the map and takes all dot products; plain propagation has all affinities of a frame at once.
- Peak: what torch's allocator holds at once beyond the input, with the result."""


def _comparison_lines(title: str, found: Mapping[str, Comparison]) -> Iterator[str]:
    columns = {title: "", "ms": ",.1f", "plain, ms": ",.1f", "times faster": ".2f", "peak MB": ",.1f", "plain, MB": ",.1f"}
    rows = []
    for name, one in found.items():
        milliseconds = [1e3 * statistics.median(seconds) for seconds in one.seconds.values()]
        megabytes = [peak / 2**20 for peak in one.peak_bytes.values()]
        rows.append([name, *milliseconds, one.ratio, *megabytes, one.largest_difference])
    return number_lines({**columns, "largest difference": ".1e"}, rows)
