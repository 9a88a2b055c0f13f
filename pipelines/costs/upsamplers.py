"""What upsampling costs beside the backbone: operations as LiFT's paper counts them and truly, and measured time and memory.

`measure_cost` gives the numbers, `cost_report` their Markdown. All weights are random: nothing here depends on them.
LiFT prints operations in its Tables 5 and 6; the rule by which it counts was found from their numbers.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from operators.backbone import PatchFeatures, TimmBackbone, autocast, cast_matmul_weights
from operators.timm_models import create_model
from operators.upsamplers import AnyMethod, Upsampler, UpsamplerError, build_net, find_method, learned_upsampler, method_names
from operators.upsamplers.protocol import Precision
from pipelines.config import ConfigError
from pipelines.costs.clocks import Machine, NumbersFile, device_name, device_of, peak_bytes, require_device, timed
from pipelines.features.memory import allow_alone
from pipelines.published.lift import LIFT, LIFT_OPERATIONS, Operations
from pipelines.results import table_lines
from storage.documents import JsonObject

BACKBONE = "backbone alone"


@dataclass(frozen=True, kw_only=True)
class CostBenchmark:
    """Operations, time and memory of a backbone alone and with each upsampler. Weights are random: they don't matter here.

    With --vit-up, ViT-Up instead, with --deap, readouts: with settings of their own.
    """

    model: str = "vit_small_patch16_224.dino"
    """timm name of the backbone that is timed; the counted ones are always the paper's."""
    size: int = 224
    """Side of its square input in pixels."""
    facet: Literal["token", "key", "query", "value"] = "key"
    """As for jobs/extract.py; LiFT's is key."""
    batch: int = 4
    """Images per forward."""
    precisions: tuple[Precision, ...] = ("bf16", "fp32")
    """Autocasts that are timed, one table each."""
    upsamplers: tuple[str, ...] = ("lift", "resize_conv", "jbu", "bilinear", "bicubic")
    """Methods, x2: all that work on the backbone's map and give twice its grid, module:Class of your own among them
    (operators/DESIGN.md)."""
    repeat: int = 11
    """Rounds; each runs everything once, in changing order. Times are medians over them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is a GPU where there is one."""
    json: NumbersFile = ""

    def __post_init__(self) -> None:
        if min(self.size, self.batch, self.repeat) < 1 or not self.precisions:
            raise ConfigError("--size, --batch and --repeat must be at least 1, and --precisions at least one")
        for name in self.upsamplers:
            require_enlarging("--upsamplers", name, beside_backbone=True)
        require_device(self.device)


def network_of(model: str) -> str:
    """A timm name without tag and biases of qkv: neither those nor weights change a time."""
    return re.sub(r"(_qkvb)?(\.\w+)?$", "", model)


def require_enlarging(flag: str, name: str, *, beside_backbone: bool = False) -> AnyMethod:
    """The method called `name`, of those that give finer maps. Raises `ConfigError` for another.

    `beside_backbone`: of those that work on the plain backbone's maps.
    """

    def fits(method: AnyMethod) -> bool:
        return method.enlarges and not (beside_backbone and "backbone" in method.needs)

    try:
        if fits(found := find_method(name)):
            return found
    except UpsamplerError as error:
        if ":" in name:
            raise ConfigError(f"{flag} {name}: {error}") from None
    raise ConfigError(f"{flag} {name}: there are {', '.join(method_names(fits))}, and module:Class of your own")


@dataclass(frozen=True, kw_only=True)
class OperationCounts:
    """Of one square image."""

    tokens: int
    parameters: Mapping[str, int]
    "of the `backbone`, and by method of networks that enlarge its map"
    paper_count: Mapping[str, int]
    "by LiFT's rule: of the backbone `alone`, and of it with each network"
    macs: Mapping[str, int]
    "true multiply-accumulates: of the backbone `alone`, and of each network without it"


@dataclass(frozen=True, kw_only=True)
class PublishedCounts(OperationCounts, Operations):
    """A row of LiFT's tables, and our counts of the same."""


@dataclass(frozen=True, kw_only=True)
class UpsamplerCost:
    """A line of the tables: the backbone alone, or with an upsampler."""

    name: str
    parameters: int
    ms_per_image: float
    time_ratio: float
    "to the backbone alone in the same round, median of the rounds"
    time_ratio_quartiles: tuple[float, float]
    peak_bytes: int
    memory_ratio: float
    seconds: tuple[float, ...]
    "of each round"


@dataclass(frozen=True, kw_only=True)
class PrecisionCost:
    """What was timed under one autocast."""

    precision: Precision
    grid: tuple[int, int]
    "cells of the backbone's map"
    rows: tuple[UpsamplerCost, ...]


@dataclass(frozen=True, kw_only=True)
class CostResult:
    """Counts of the paper's models, and measurements of the configured one."""

    device: str
    counts: tuple[PublishedCounts, ...]
    measured: tuple[PrecisionCost, ...]


# No network. 2 CPU cores: about 10 seconds, half of them for counting; the times mean nothing at this size. The defaults take
# about 2 minutes, most of them for bf16 where it is emulated.
DEBUG = CostBenchmark(model="test_vit.r160_in1k", size=64, batch=2, repeat=3)


def measure_cost(config: CostBenchmark) -> CostResult:
    """Counts of the paper's models, and times and peak memory of the configured one. Raises `BackboneError`, `ConfigError`."""
    device = device_of(config.device)
    try:
        measured = [_measure(config, device, precision) for precision in config.precisions]
    except UpsamplerError as error:
        raise ConfigError(f"{config.model} at {config.size} px: {error}") from None
    counts = tuple(_count(published) for published in LIFT_OPERATIONS)
    return CostResult(device=device_name(device), counts=counts, measured=tuple(measured))


# --- operations -------------------------------------------------------------------------------------------------------

_COUNTED = (nn.Linear, nn.LayerNorm, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)


def _count(published: Operations) -> PublishedCounts:
    """Both counts of one row."""
    counts = count_operations(published.model, published.size, stride=published.stride, nets=({"method": "lift"},))
    return PublishedCounts(**vars(published), **vars(counts))


def count_operations(
    name: str,
    size: int,
    *,
    stride: int | None = None,
    facet: Literal["token", "key", "query", "value"] = "key",
    pos_embed: Literal["timm", "dino"] | None = "dino",
    layers: Sequence[int] = (-1,),
    ragged: bool = False,
    model_args: JsonObject | None = None,
    nets: Sequence[JsonObject] = (),
) -> OperationCounts:
    """Both counts, and parameters, of a backbone and of networks that enlarge its map x2, by method; of one square image.

    `model_args`: of a network that the name alone doesn't build. `nets`: settings as checkpoints have them, channels and
    patch by default the backbone's. All is on the meta device, where nothing is computed. The paper's counts are with the
    backbone's, true ones without.
    """
    model = create_model(name, (size, size), None, None, model_args).to("meta")
    parameters = {"backbone": count_parameters(model)}  # before the backbone resamples position embeddings
    backbone = TimmBackbone(model, facet=facet, stride=stride, pos_embed=pos_embed, ragged=ragged)
    images, layers = torch.empty(1, 3, size, size, device="meta"), backbone.resolve_layers(layers)
    features = backbone(images, layers)
    # The whole model, as the paper's extractor runs it; ours stops at the last block's keys, which is 8 % less.
    whole = cast("Callable[[Tensor], Tensor]", model.forward_features)
    macs = {"alone": counted_macs(lambda: whole(images))}
    tokens = math.prod(features.grid) + backbone.n_prefix
    # The paper's extractor runs the whole model, and its hook the last block's qkv a second time.
    again = 0 if facet == "token" else tokens * 3 * backbone.channels**2
    paper = {"alone": paper_count(model, images) + again}
    # As our LiFT runs it: cells of overlapping patches tile less than the image, which is enlarged to 16 pixels a cell.
    overlap = backbone.stride < backbone.patch
    pixels = torch.empty(1, 3, *(cells * backbone.patch for cells in features.grid), device="meta") if overlap else images
    grid = (2 * features.grid[0], 2 * features.grid[1])
    for given in nets:
        settings = {"channels": backbone.channels, "patch": backbone.patch, **given}
        method, net = str(settings["method"]), build_net(settings)
        upsampler = learned_upsampler(settings, net.state_dict())
        parameters[method] = count_parameters(net)
        macs[method] = counted_macs(partial(upsampler, images, features, layers, grid))
        paper[method] = paper["alone"] + paper_count(net.to("meta").eval(), pixels, features.stacked(layers))
    return OperationCounts(tokens=tokens, parameters=parameters, paper_count=paper, macs=macs)


@torch.inference_mode()
def counted_macs(run: Callable[[], object]) -> int:
    """Multiply-accumulates of matrix products, convolutions and attention in a call, by torch's FlopCounterMode."""
    with FlopCounterMode(display=False) as flops:
        run()
    return flops.get_total_flops() // 2


def paper_count(net: nn.Module, *given: Tensor) -> int:
    """Operations of one call by the rule that gives the paper's numbers at the patch's stride. It isn't that of `thop`, which
    leaves biases of convolutions out; and no rule that we know gives its totals of LiFT at stride 8, 19.65 and 81.18.

    Multiply-accumulates of Linear layers and convolutions, one more per value for a convolution's bias, 4 per value of a norm,
    nothing else: no attention products, no softmax, no GELU. A transposed convolution is charged for its whole kernel at every
    output, at stride 2 four times what it takes.
    """
    found = []

    def count(module: nn.Module, _: object, out: Tensor) -> None:
        if isinstance(module, nn.Linear):
            each = module.in_features
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            each = math.prod(module.kernel_size) * module.in_channels // module.groups + (module.bias is not None)
        else:
            each = 4
        found.append(out.numel() * each)

    handles = [module.register_forward_hook(count) for module in net.modules() if isinstance(module, _COUNTED)]
    try:
        net(*given)
    finally:
        for handle in handles:
            handle.remove()
    return sum(found)


def count_parameters(net: nn.Module) -> int:
    """All of them, trained or frozen."""
    return sum(parameter.numel() for parameter in net.parameters())


# --- time and memory --------------------------------------------------------------------------------------------------


def image_to_grid(
    images: Tensor,
    backbone: TimmBackbone,
    layers: tuple[int, ...],
    precision: Precision,
    upsampler: Upsampler | None = None,
    grid: tuple[int, int] = (0, 0),
    given: PatchFeatures | None = None,
) -> Callable[[], PatchFeatures | Tensor]:
    """What is timed of every method: from images on a device to the backbone's map and, with an upsampler, to its finer `grid`.

    With features `given`, the backbone's pass is left out.
    """

    @torch.inference_mode()
    def run() -> PatchFeatures | Tensor:
        features = given
        if features is None:
            with autocast(images.device, precision):
                features = backbone(images, layers)
        if upsampler is None:
            return features
        out = upsampler(images, features, layers, grid)
        upsampler.forget()  # else the next call would find what this one did
        return out

    return run


def _measure(config: CostBenchmark, device: torch.device, precision: Precision) -> PrecisionCost:
    size = (config.size, config.size)
    reload = partial(create_model, config.model, size, None, 0)
    backbone = TimmBackbone(reload(), facet=config.facet)
    cast_matmul_weights(backbone.model, precision)
    backbone.model.to(device)
    layers, grid = (backbone.n_layers - 1,), backbone.grid_of(size)
    upsamplers, parameters = {}, {BACKBONE: count_parameters(backbone.model)}
    for name in config.upsamplers:
        method = find_method(name)
        settings, state = method.untrained(backbone, backbone.channels, config.size, reload)
        upsamplers[name] = method.build(settings, state, precision, reload)
        parameters[name] = method.parameters(settings, state)
    images = torch.randn(config.batch, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)

    finer = (2 * grid[0], 2 * grid[1])
    for upsampler in upsamplers.values():
        call = (config.batch, backbone.channels, grid, size, finer)
        allow_alone(upsampler, device, call, backbone.peak_bytes(config.batch, size))
    runs = {BACKBONE: image_to_grid(images, backbone, layers, precision)} | {
        name: image_to_grid(images, backbone, layers, precision, upsampler, finer) for name, upsampler in upsamplers.items()
    }
    peaks = {name: peak_bytes(run, device) for name, run in runs.items()}
    seconds = dict(zip(runs, timed(list(runs.values()), config.repeat, math.inf, device), strict=True))
    rows = []
    for name in runs:
        # Of the same round: what else the machine did then was much the same for both.
        low, middle, high = np.percentile(np.divide(seconds[name], seconds[BACKBONE]), (25, 50, 75)).tolist()
        rows.append(
            UpsamplerCost(
                name=name,
                parameters=parameters[name],
                ms_per_image=1e3 * float(np.median(seconds[name])) / config.batch,
                time_ratio=middle,
                time_ratio_quartiles=(low, high),
                peak_bytes=peaks[name],
                memory_ratio=peaks[name] / peaks[BACKBONE],
                seconds=tuple(seconds[name]),
            )
        )
    return PrecisionCost(precision=precision, grid=grid, rows=tuple(rows))


# --- report -----------------------------------------------------------------------------------------------------------


def cost_report(config: CostBenchmark, result: CostResult, machine: Machine) -> Iterator[str]:
    """The numbers as Markdown, line by line."""
    yield f"## cost: upsampling x2 beside {config.model}, random weights"
    yield machine.usual_line(device=result.device)
    yield from _count_report(result.counts)
    for one in result.measured:
        yield from _measured_report(config, one)
    if "bf16" in config.precisions and result.device.startswith("CPU") and not machine.native_bf16:
        yield "\n**This CPU has no bf16 instructions: bf16 is emulated here, and slow.**"
    yield f"""
- Times: medians of {config.repeat} rounds, in which everything runs once, in changing order; ratios: medians of each round's,
  and their middle half. The backbone runs anew for every upsampler.
- Peak memory: what torch's allocator holds at once, with the result, without weights and input.
- LiFT's paper gives +22 % for DINO ViT-S/16's keys of 224 px at stride 16, in operations by its own count (5.30 / 4.34)."""


def _count_report(counts: Sequence[PublishedCounts]) -> Iterator[str]:
    def giga(value: int) -> str:
        return f"{value / 1e9:.2f}"

    rows = []
    for one in counts:
        paper, macs, parameters = one.paper_count, one.macs, one.parameters
        name = f"{one.model.split('_patch')[0]} at {one.size} px, stride {one.stride}"
        millions = f"{parameters['backbone'] / 1e6:.1f} + {parameters['lift'] / 1e6:.2f} M"
        published = [f"{one.alone:.2f}", "" if one.lift is None else f"{one.lift:.2f}"]
        ours = [giga(paper["alone"]), published[0], giga(paper["lift"]), published[1]]
        true = [giga(macs["alone"]), giga(macs["alone"] + macs["lift"]), f"{macs['lift'] / macs['alone']:+.1%}"]
        rows.append([name, millions, *ours, *true])
    yield f"\nOperations for one image, 10^9, as LiFT's paper counts them (arXiv {LIFT.arxiv}, Tables 5 and 6) and truly:"
    head = ["DINO, keys", "parameters", "alone", "published", "+ LiFT", "published"]
    yield from table_lines([*head, "true: alone", "+ LiFT", "LiFT adds"], rows)
    yield """
- The paper's "FLOPs" are multiply-accumulates without those of attention, and charge LiFT's transposed convolution fourfold.
  True ones are multiply-accumulates too, by torch's FlopCounterMode, of what runs here.
- Stride 8 with LiFT: no released code runs it. Ours enlarges the image to 16 pixels a cell; how the paper did isn't known."""


def _measured_report(config: CostBenchmark, measured: PrecisionCost) -> Iterator[str]:
    grid = " x ".join(str(2 * cells) for cells in measured.grid)
    head = f"{config.size} px to {grid} cells, batch {config.batch}, {measured.precision}"
    rows = [
        [
            one.name if one.name == BACKBONE else f"with {one.name}",
            f"{one.parameters / 1e6:.2f} M",
            f"{one.ms_per_image:.2f}",
            "{:.2f} ({:.2f} to {:.2f})".format(one.time_ratio, *one.time_ratio_quartiles),
            f"{one.peak_bytes / 1e6:,.1f}",
            f"{one.memory_ratio:.2f}",
        ]
        for one in measured.rows
    ]
    yield from table_lines([head, "parameters", "ms per image", "of alone", "peak MB", "of alone"], rows)
