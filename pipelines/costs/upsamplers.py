"""What upsampling costs beside the backbone: operations as LiFT's paper counts them and truly, and measured time and memory.

`measure_cost` returns plain data, `cost_report` its Markdown. All weights are random: nothing here depends on them.
LiFT prints operations in its Tables 5 and 6; the rule by which it counts was found from their numbers.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from operators.backbone import TimmBackbone, autocast, cast_matmul_weights, create_model
from operators.upsamplers import (
    LEARNED,
    UPSAMPLERS,
    Upsampler,
    UpsamplerError,
    build_net,
    create_upsampler,
    learned_upsampler,
)
from pipelines.config import ConfigError
from pipelines.costs.clocks import Machine, NumbersFile, device_name, device_of, peak_bytes, seconds_of, table
from pipelines.published import LIFT, LIFT_OPERATIONS, Operations

Precision: TypeAlias = Literal["bf16", "fp16", "fp32"]
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
    """Methods, x2: lift, resize_conv, jbu, bilinear, bicubic, nearest."""
    repeat: int = 11
    """Rounds; each runs everything once, in changing order. Times are medians over them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is a GPU where there is one."""
    json: NumbersFile = ""

    def __post_init__(self) -> None:
        if min(self.size, self.batch, self.repeat) < 1 or not self.precisions:
            raise ConfigError("--size, --batch and --repeat must be at least 1, and --precisions at least one")
        known = [*LEARNED, *(name for name in UPSAMPLERS if name != "average")]
        if unknown := [name for name in self.upsamplers if name not in known]:
            raise ConfigError(f"--upsamplers {' '.join(unknown)}: there are {', '.join(known)}")
        device_of(self.device)


COST_PRESETS = {
    # No network. 2 CPU cores: about 2 minutes, most of them for bf16 where it is emulated.
    "default": CostBenchmark(),
    # 2 CPU cores: about 10 seconds, half of them for counting; the times mean nothing at this size.
    "debug": CostBenchmark(model="test_vit.r160_in1k", size=64, batch=2, repeat=3),
}


def measure_cost(config: CostBenchmark) -> dict[str, Any]:
    """Counts of the paper's models, and times and peak memory of the configured one. Raises `BackboneError`, `ConfigError`."""
    device = device_of(config.device)
    try:
        measured = [_measure(config, device, precision) for precision in config.precisions]
    except UpsamplerError as error:
        raise ConfigError(f"{config.model} at {config.size} px: {error}") from None
    return {
        "device": device_name(device),
        "counts": [_count(published) for published in LIFT_OPERATIONS],
        "measured": measured,
    }


# --- operations -------------------------------------------------------------------------------------------------------


_COUNTED = (nn.Linear, nn.LayerNorm, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)


def _count(published: Operations) -> dict[str, Any]:
    """Both counts of one row."""
    counts = count_operations(published.model, published.size, stride=published.stride, nets=({"method": "lift"},))
    return {**asdict(published), **counts}


def count_operations(
    name: str,
    size: int,
    *,
    stride: int | None = None,
    facet: Literal["token", "key", "query", "value"] = "key",
    pos_embed: Literal["timm", "dino"] | None = "dino",
    layers: Sequence[int] = (-1,),
    ragged: bool = False,
    model_args: Mapping[str, Any] | None = None,
    nets: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Both counts, and parameters, of a backbone and of networks that enlarge its map x2, by method; of one square image.

    `model_args`: of a network that the name alone doesn't build. `nets`: settings of `NetConfig`, channels and patch by default
    the backbone's. All is on the meta device, where nothing is computed. The paper's counts are with the backbone's, true ones
    without.
    """
    model = create_model(name, (size, size), None, None, model_args).to("meta")
    parameters = {"backbone": count_parameters(model)}  # before the backbone resamples position embeddings
    backbone = TimmBackbone(model, facet=facet, stride=stride, pos_embed=pos_embed, ragged=ragged)
    images, layers = torch.empty(1, 3, size, size, device="meta"), backbone.resolve_layers(layers)
    features = backbone(images, layers)
    # The whole model, as the paper's extractor runs it; ours stops at the last block's keys, which is 8 % less.
    macs = {"alone": counted_macs(lambda: model.forward_features(images))}
    tokens = math.prod(features.grid) + backbone.n_prefix
    # The paper's extractor runs the whole model, and its hook the last block's qkv a second time.
    again = 0 if facet == "token" else tokens * 3 * backbone.channels**2
    paper = {"alone": paper_count(model, images) + again}
    # As our LiFT runs it: cells of overlapping patches tile less than the image, which is enlarged to 16 pixels a cell.
    overlap = backbone.stride < backbone.patch
    pixels = (
        torch.empty(1, 3, *(cells * backbone.patch for cells in features.grid), device="meta") if overlap else images
    )
    grid = (2 * features.grid[0], 2 * features.grid[1])
    for given in nets:
        settings = {"channels": backbone.channels, "patch": backbone.patch, **given}
        method, net = settings["method"], build_net(settings)
        upsampler = learned_upsampler(settings, net.state_dict())
        parameters[method] = count_parameters(net)
        macs[method] = counted_macs(partial(upsampler, images, features, layers, grid))
        paper[method] = paper["alone"] + paper_count(net.to("meta").eval(), pixels, features.stacked(layers))
    return {"tokens": tokens, "parameters": parameters, "paper_count": paper, "macs": macs}


@torch.inference_mode()
def counted_macs(run: Callable[[], Any]) -> int:
    """Multiply-accumulates of matrix products, convolutions and attention in a call, by torch's FlopCounterMode."""
    with FlopCounterMode(display=False) as flops:
        run()
    return flops.get_total_flops() // 2


def paper_count(net: nn.Module, *given: Tensor) -> int:
    """Operations of one call by the rule that gives the paper's numbers, which is that of `thop`.

    Multiply-accumulates of Linear layers and convolutions, one more per value for a convolution's bias, 4 per value of a norm,
    nothing else: no attention products, no softmax, no GELU. A transposed convolution is charged for its whole kernel at every
    output, at stride 2 four times what it takes.
    """
    found = []

    def count(module: nn.Module, _: Any, out: Tensor) -> None:
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


def _measure(config: CostBenchmark, device: torch.device, precision: Precision) -> dict[str, Any]:
    size = (config.size, config.size)
    backbone = TimmBackbone(create_model(config.model, size, None, 0), facet=config.facet)
    cast_matmul_weights(backbone.model, precision)
    backbone.model.to(device)
    layers, grid = (backbone.n_layers - 1,), backbone.grid_of(size)
    nets = {name: _net(name, backbone) for name in config.upsamplers if name in LEARNED}
    upsamplers = {name: _upsampler(name, backbone, nets.get(name), precision) for name in config.upsamplers}
    images = torch.randn(config.batch, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)

    def program(upsampler: Upsampler | None) -> Callable[[], Any]:
        @torch.inference_mode()
        def run() -> Any:
            with autocast(device, precision):
                features = backbone(images, layers)
            return upsampler(images, features, layers, (2 * grid[0], 2 * grid[1])) if upsampler else features

        return run

    programs = {BACKBONE: program(None)} | {name: program(one) for name, one in upsamplers.items()}
    peaks = {name: peak_bytes(run, device) for name, run in programs.items()}
    seconds = _interleaved(programs, config.repeat, device)
    parameters = {BACKBONE: count_parameters(backbone.model)} | {
        name: count_parameters(net) for name, net in nets.items()
    }
    rows = []
    for name in programs:
        # Of the same round: what else the machine did then was much the same for both.
        low, middle, high = np.percentile(np.divide(seconds[name], seconds[BACKBONE]), (25, 50, 75)).tolist()
        rows.append(
            {
                "name": name,
                "parameters": parameters.get(name, 0),
                "ms_per_image": 1e3 * float(np.median(seconds[name])) / config.batch,
                "time_ratio": middle,
                "time_ratio_quartiles": [low, high],
                "peak_bytes": peaks[name],
                "memory_ratio": peaks[name] / peaks[BACKBONE],
                "seconds": seconds[name],
            }
        )
    return {"precision": precision, "grid": list(grid), "rows": rows}


def _net(name: str, backbone: TimmBackbone) -> nn.Module:
    return build_net({"method": name, "channels": backbone.channels, "patch": backbone.patch})


def _upsampler(name: str, backbone: TimmBackbone, net: nn.Module | None, precision: Precision) -> Upsampler:
    if net is None:
        return create_upsampler(name)
    settings = {"method": name, "channels": backbone.channels, "patch": backbone.patch}
    return learned_upsampler(settings, net.state_dict(), precision)


def _interleaved(programs: dict[str, Callable[[], Any]], repeat: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every program in every round; each round begins with another one."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for first in range(repeat):
        names = itertools.islice(
            itertools.cycle(programs), first % len(programs), first % len(programs) + len(programs)
        )
        for name in names:
            seconds[name].append(seconds_of(programs[name], device))
    return seconds


# --- report -----------------------------------------------------------------------------------------------------------


def cost_report(config: CostBenchmark, result: dict[str, Any], machine: Machine) -> Iterator[str]:
    """The numbers as Markdown, line by line."""
    yield f"## cost: upsampling x2 beside {config.model}, random weights"
    yield machine.usual_line(device=result["device"])
    yield from _count_report(result["counts"])
    for one in result["measured"]:
        yield from _measured_report(config, one)
    if "bf16" in config.precisions and result["device"].startswith("CPU") and not machine.native_bf16:
        yield "\n**This CPU has no bf16 instructions: bf16 is emulated here, and slow.**"
    yield f"""
- Times: medians of {config.repeat} rounds, in which everything runs once, in changing order; ratios: medians of each round's,
  and their middle half. The backbone runs anew for every upsampler.
- Peak memory: what torch's allocator holds at once, with the result, without weights and input.
- LiFT's paper gives +22 % for 224 px at stride 16, in operations by its own count (5.30 / 4.34)."""


def _count_report(counts: Sequence[dict[str, Any]]) -> Iterator[str]:
    def giga(value: int) -> str:
        return f"{value / 1e9:.2f}"

    rows = []
    for one in counts:
        paper, macs, parameters = one["paper_count"], one["macs"], one["parameters"]
        name = f"{one['model'].split('_patch')[0]} at {one['size']} px, stride {one['stride']}"
        millions = f"{parameters['backbone'] / 1e6:.1f} + {parameters['lift'] / 1e6:.2f} M"
        published = [f"{one['alone']:.2f}", "" if one["lift"] is None else f"{one['lift']:.2f}"]
        ours = [giga(paper["alone"]), published[0], giga(paper["lift"]), published[1]]
        true = [giga(macs["alone"]), giga(macs["alone"] + macs["lift"]), f"{macs['lift'] / macs['alone']:+.1%}"]
        rows.append([name, millions, *ours, *true])
    yield f"\nOperations for one image, 10^9, as LiFT's paper counts them (arXiv {LIFT.arxiv}, Tables 5 and 6) and truly:"
    head = ["DINO, keys", "parameters", "alone", "published", "+ LiFT", "published"]
    yield from table([*head, "true: alone", "+ LiFT", "LiFT adds"], rows)
    yield """
- The paper's "FLOPs" are multiply-accumulates without those of attention, and charge LiFT's transposed convolution fourfold.
  True ones are multiply-accumulates too, by torch's FlopCounterMode, of what runs here.
- Stride 8 with LiFT: no released code runs it. Ours enlarges the image to 16 pixels a cell; how the paper did isn't known."""


def _measured_report(config: CostBenchmark, measured: dict[str, Any]) -> Iterator[str]:
    grid = " x ".join(str(2 * cells) for cells in measured["grid"])
    head = f"{config.size} px to {grid} cells, batch {config.batch}, {measured['precision']}"
    rows = [
        [
            one["name"] if one["name"] == BACKBONE else f"with {one['name']}",
            f"{one['parameters'] / 1e6:.2f} M",
            f"{one['ms_per_image']:.2f}",
            "{:.2f} ({:.2f} to {:.2f})".format(one["time_ratio"], *one["time_ratio_quartiles"]),
            f"{one['peak_bytes'] / 1e6:,.1f}",
            f"{one['memory_ratio']:.2f}",
        ]
        for one in measured["rows"]
    ]
    yield from table([head, "parameters", "ms per image", "of alone", "peak MB", "of alone"], rows)
