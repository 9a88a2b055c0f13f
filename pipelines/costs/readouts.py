"""What dense readouts cost: DeAP's published parameter counts beside ours, and operations of DeAP and of what it is held against.

`measure_deap` gives the numbers, `deap_report` their Markdown. Nothing is timed; each readout runs once, on zeros.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch

from operators.readouts import READOUTS, ReadoutConfig, build_readout
from operators.readouts.variants import VARIANTS
from operators.upsamplers import find_method
from operators.upsamplers.recursive import DoublingNet
from pipelines.config import ConfigError, require_at_least
from pipelines.costs.clocks import Machine, NumbersFile
from pipelines.costs.upsamplers import count_parameters, counted_macs
from pipelines.published.deap import DEAP_PARAMETERS, DEAP_TASKS
from pipelines.published.recipes import RECIPES
from pipelines.results import table_lines
from storage.documents import JsonValue


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """A published parameter count, and ours."""

    backbones: str
    channels: int
    task: str
    "its label"
    published_millions: float
    ours: int
    ours_millions: float


def _deap(outputs: int, *, split: tuple[int, ...] = (), width: int | None = None) -> ReadoutConfig:
    return ReadoutConfig(method="deap", channels=768, outputs=outputs, split=split, width=width)


_COUNTED: Mapping[str, ReadoutConfig] = {
    "instances": _deap(32),
    "boundaries": _deap(1),
    "detection": _deap(3, split=(1, 2)),
    "voc": _deap(21),
    "coco-stuff": _deap(200, width=32),
    "depth": _deap(1),
}
"""DeAP's settings for the paper's tasks, on maps of 768 channels."""


def published_counts() -> list[ParameterCount]:
    """The 30 counts that DeAP's paper prints, beside those of DeAP as built here.

    All of them agree to the printed digits, which tells what the text doesn't: that the unused LayerNorm is counted, that
    COCO-Stuff has 200 outputs, and that the released rule gives the decoder's width.
    """
    rows = []
    for (backbones, channels), printed in DEAP_PARAMETERS.items():
        for task, millions in zip(DEAP_TASKS, printed, strict=True):
            with torch.device("meta"):
                ours = build_readout(replace(_COUNTED[task], channels=channels)).parameter_count()
            rows.append(
                ParameterCount(
                    backbones=backbones,
                    channels=channels,
                    task=RECIPES[task].label,
                    published_millions=millions,
                    ours=ours,
                    ours_millions=ours / 1e6,
                )
            )
    return rows


FEATUP_CHANNELS = 384
"""Of the backbone that DeAP's release has FeatUp on, a ViT-S."""


def featup_counts() -> dict[str, int]:
    """Learned parameters of the FeatUp baseline by task, as released: 385 for each output."""
    with torch.device("meta"):
        configs = {
            task: ReadoutConfig(method="featup", channels=FEATUP_CHANNELS, outputs=each.outputs, split=each.split)
            for task, each in _COUNTED.items()
        }
        return {RECIPES[task].label: build_readout(each).parameter_count() for task, each in configs.items()}


@dataclass(frozen=True, kw_only=True)
class DeapCost:
    """Parameters of DeAP as published and as built here; parameters and operations of all readouts for one map."""

    channels: int = 768
    """Of the map; ViT-B has 768."""
    grid: int = 37
    """Cells of the map a side; DINOv2's is 37 at 518 px."""
    outputs: int = 21
    """Channels of the prediction; VOC has 21."""
    side: int = 224
    """Of the prediction, in pixels; DeAP asks a query for each 8 x 8."""
    json: NumbersFile = ""

    def __post_init__(self) -> None:
        require_at_least(1, self, "channels", "grid", "outputs", "side")
        if self.channels % 16:
            raise ConfigError(f"--channels {self.channels}: must be a multiple of 16, the release's groups of channels")


# No network, no timing: seconds, as with the defaults, most of them for imports.
DEBUG = DeapCost(channels=64, grid=4, side=32)


@dataclass(frozen=True, kw_only=True)
class ReadoutCost:
    """Of one readout and one map."""

    name: str
    parameters: int
    macs: int
    "multiply-accumulates, those of an upsampler that it reads too"
    frozen: int = 0
    "parameters of that upsampler"


@dataclass(frozen=True, kw_only=True)
class DeapResult:
    """Published counts beside ours, and what each readout takes."""

    published: tuple[ParameterCount, ...]
    readouts: tuple[ReadoutCost, ...]


def measure_deap(config: DeapCost) -> DeapResult:
    """Counts, of which nothing is timed."""
    readouts = tuple(_measure(config, name) for name in VARIANTS)
    return DeapResult(published=tuple(published_counts()), readouts=readouts)


def _measure(config: DeapCost, name: str) -> ReadoutCost:
    size = (config.side, config.side)
    settings: dict[str, JsonValue] = {"channels": config.channels, "outputs": config.outputs, "output": size}
    if "grid" in READOUTS[str(VARIANTS[name]["method"])].settings:
        settings["grid"] = (config.grid, config.grid)
    readout = build_readout(ReadoutConfig.parse({**settings, **VARIANTS[name]})).eval()
    grid, frozen, macs = config.grid, 0, 0
    device = "meta" if readout.reads else "cpu"  # enlarged maps are large, and nothing need be computed
    if readout.reads:
        grid, frozen, macs = _enlarged(readout.reads, config)
    maps = torch.zeros(1, config.channels, grid, grid, device=device)
    macs += counted_macs(partial(readout.to(device), maps, size))
    return ReadoutCost(name=name, parameters=readout.parameter_count(), macs=macs, frozen=frozen)


def _enlarged(name: str, config: DeapCost) -> tuple[int, int, int]:
    """Cells a side of what an upsampler of several x2 steps makes of the map; its parameters, and operations."""
    method = find_method(name)
    net = cast(DoublingNet, method.initialised(method.parse({"channels": config.channels, "patch": _PATCH})).eval().to("meta"))
    sides = [config.grid << step for step in range(net.stages + 1)]
    image = torch.zeros(1, 3, _PATCH * config.grid, _PATCH * config.grid, device="meta")
    maps = torch.zeros(1, config.channels, config.grid, config.grid, device="meta")
    macs = counted_macs(partial(net, image, maps)) + sum(net.summed_macs((side, side), config.channels) for side in sides[1:])
    return sides[-1], count_parameters(net), macs


_PATCH = 14
"""Of the backbone whose image guides, in pixels: it changes no count."""


def deap_report(config: DeapCost, result: DeapResult, _: Machine) -> Iterator[str]:
    """The numbers as Markdown, line by line."""
    yield "## cost: DeAP, and what it is held against"
    yield "\nDeAP's learnable parameters, published (10^6) and as built here:"
    rows = result.published
    tasks = list(dict.fromkeys(row.task for row in rows))
    body = []
    for backbones in dict.fromkeys(row.backbones for row in rows):
        of = {row.task: row for row in rows if row.backbones == backbones}
        cells = [f"{of[task].published_millions:.3f} / {of[task].ours:,}" for task in tasks]
        body.append([backbones, str(of[tasks[0]].channels), *cells])
    yield from table_lines(["backbones", "channels", *tasks], body)
    equal = sum(round(row.ours / 1e6, 3) == row.published_millions for row in rows)
    yield f"\n{equal} of {len(rows)} round to what is published."
    yield (
        f"\nFor a map of {config.grid} x {config.grid} x {config.channels}, {config.outputs} outputs, {config.side} px, one "
        "image, without the backbone:"
    )
    first, reading = result.readouts[0].macs, [one for one in result.readouts if one.frozen]
    body = [[one.name, f"{one.parameters:,}", f"{one.macs / 1e6:,.1f}", f"{one.macs / first:.2f}"] for one in result.readouts]
    yield from table_lines(["readout", "parameters", "multiply-accumulates, 10^6", "of DeAP's"], body)
    yield """
- Multiply-accumulates of matrix products and convolutions, by torch's FlopCounterMode, and of joint bilateral filters' sums;
  masks and softmax have none.
- DeAP's counts include a LayerNorm that its code makes and never applies; only-mask's, queries and keys that it doesn't read."""
    for one in reading:
        yield (
            f"- {one.name} reads a map of 16 times as many cells a side: what makes it counts, too, and has {one.frozen:,} "
            "frozen parameters. The paper has it at about four times DeAP's time, on a ViT-S at 280 px."
        )
    if reading:
        counts = ", ".join(f"{task} {count:,}" for task, count in featup_counts().items())
        yield f"- As released, on {FEATUP_CHANNELS} channels, it learns: {counts}."
