"""What ViT-Up costs beside bilinear and LiFT (its Table 9); its windows, too, through pipelines/costs/windows.py.

All weights are random: nothing here depends on them. The numbers' Markdown is in pipelines/costs/vit_up_report.py.
"""

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from operators.backbone import PatchFeatures, TimmBackbone, autocast, cast_matmul_weights
from operators.timm_models import create_model
from operators.upsamplers import Upsampler, UpsamplerError, create_upsampler
from operators.upsamplers.lift import Lift, LiftSettings
from operators.upsamplers.protocol import Precision
from operators.upsamplers.recursive import LearnedUpsampler
from operators.upsamplers.vit_up.head import ViTUpConfig, ViTUpHead
from operators.upsamplers.vit_up.hidden import AdaptedBackbone
from operators.upsamplers.vit_up.lora import Lora
from operators.upsamplers.vit_up.method import published_settings, random_head
from operators.upsamplers.vit_up.upsampler import ViTUp
from pipelines.config import ConfigError
from pipelines.costs.clocks import NumbersFile, device_name, device_of, median_ratio, peak_bytes, require_device, timed
from pipelines.costs.upsamplers import BACKBONE, count_parameters, counted_macs, image_to_grid
from pipelines.costs.windows import WindowComparison, compare_window
from pipelines.features.memory import allow_alone

ALL_GRIDS = (56, 112, 224, 448)
CPU_GRIDS = (56, 112)
VIT_UP = "ViT-Up"


@dataclass(frozen=True, kw_only=True)
class ViTUpBenchmark:
    """Time and memory of ViT-Up for several output grids and chunks of queries, beside bilinear and LiFT. Random weights."""

    model: str = "vit_small_plus_patch16_dinov3_qkvb"
    """timm name of a plain ViT; the default is the paper's."""
    size: int = 448
    """Side of the square input in pixels, for the hidden states, too."""
    query_size: int = 3584
    """Side in pixels of the enlarged image that queries are sampled from."""
    grids: tuple[int, ...] = ()
    """Sides of the output grids. Default: 56 112 224 448, of which a CPU leaves the last two out (minutes for each row)."""
    chunks: tuple[int, ...] = (0, 112, 224, 448)
    """Queries at once, as the side of their square; 0 is what extraction takes. Those above a grid's side are left out."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast; `auto` is bf16, as published, on a GPU and fp32 on a CPU."""
    repeat: int = 0
    """Timed runs of each row at most; 0: 50 on a GPU, as published, 5 on a CPU."""
    row_s: float = 40.0
    """No further run of a row that would bring it beyond so many seconds."""
    windows: tuple[int, ...] = (9,)
    """Windows in tokens for which the head is compared with one that gathers keys and values for each query; or none."""
    window_grid: int = 224
    """Side of the output grid of that comparison."""
    window_channels: int = 192
    """Channels of that comparison's head, of six blocks; the default is a ViT-Tiny's."""
    window_repeat: int = 2
    """Rounds of that comparison."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is a GPU where there is one."""
    json: NumbersFile = ""

    def __post_init__(self) -> None:
        if min(self.size, self.query_size, *self.grids, *self.windows, self.window_grid, self.window_repeat) < 1:
            raise ConfigError("--size, --query-size, --grids, --windows and --window-... must be at least 1")
        if not self.chunks or min(self.repeat, *self.chunks) < 0 or self.row_s <= 0:
            raise ConfigError("--chunks (at least one) and --repeat must be at least 0, and --row-s above 0")
        require_device(self.device)


# No network. 2 CPU cores: about 20 seconds; the times mean nothing at this size. The defaults take about 6 minutes alone, 16 with
# a load of 6, and about half an hour more with all grids.
DEBUG = ViTUpBenchmark(
    model="test_vit.r160_in1k",
    size=64,
    query_size=128,
    grids=(8, 12),
    chunks=(0, 4, 12),
    repeat=2,
    windows=(3,),
    window_grid=16,
    window_channels=64,
)


@dataclass(frozen=True, kw_only=True)
class ImageMacs:
    """Multiply-accumulates that ViT-Up takes for an image whatever the grid."""

    backbone: int
    query_grid: int
    keys_values: int


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of the tables; what is measured has its values last."""

    method: str
    grid: int
    queries: int | None = None
    "at once"
    parameters: int
    seconds: tuple[float, ...] = ()
    ms: float = 0
    of_alone: float = 1
    "time to the backbone's alone, median of the rounds"
    of_bilinear: float | None = None
    peak_bytes: int = 0
    "of the image to the grid, with weights"
    call_bytes: int = 0
    "of the part that `declared_bytes` holds for"
    declared_bytes: int
    macs: int
    "of that part; for ViT-Up the head's"
    published_macs: int | None = None

    @property
    def label(self) -> str:
        cells = f"{self.grid} x {self.grid}: {self.method}"
        return cells if self.queries is None else f"{cells}, {self.queries:,} queries at once"


@dataclass(frozen=True, kw_only=True)
class ViTUpResult:
    """All that was measured."""

    device: str
    precision: Precision
    left_out: tuple[int, ...]
    "sides of grids that take minutes here"
    parameters: Mapping[str, int]
    macs: ImageMacs
    rows: tuple[Line, ...]
    windows: tuple[WindowComparison, ...]


def measure_vit_up(config: ViTUpBenchmark) -> ViTUpResult:
    """Operations, times and peak memory of every row. Raises `BackboneError`, `ConfigError`, `UpsamplerError`, and
    `BenchmarkFailed` where windows don't give what gathering gives."""
    device = device_of(config.device)
    on_gpu = device.type == "cuda"
    grids = config.grids or (ALL_GRIDS if on_gpu else CPU_GRIDS)
    automatic: Precision = "bf16" if on_gpu else "fp32"
    precision = automatic if config.precision == "auto" else config.precision
    repeat = config.repeat or (50 if on_gpu else 5)
    rig = _build(config, device, precision)
    macs = _count_once(config, rig)
    tokens = rig.features.grid
    small = published_settings(config.window_channels, 12, config.size, config.query_size)
    return ViTUpResult(
        device=device_name(device),
        precision=precision,
        left_out=tuple(grid for grid in ALL_GRIDS if not config.grids and grid not in grids),
        parameters=rig.parameters,
        macs=macs,
        rows=tuple(_measure(_rows(config, rig, grids, macs.backbone), repeat, config.row_s, device)),
        windows=tuple(
            compare_window(replace(small, window=window), tokens, config.window_grid, config.window_repeat, device)
            for window in config.windows
        ),
    )


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rig:
    """Models with random weights, an image, and the plain backbone's map of it."""

    settings: ViTUpConfig
    backbone: TimmBackbone
    vit_up: ViTUp
    lift: LearnedUpsampler[LiftSettings]
    images: Tensor
    features: PatchFeatures
    parameters: dict[str, int]
    weights: dict[str, int]
    "bytes as they lie on the device"
    precision: Precision

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.backbone.n_layers - 1,)

    def image_to_grid(
        self, upsampler: Upsampler | None = None, side: int = 0, given: PatchFeatures | None = None
    ) -> Callable[[], object]:
        """From the image, or from features `given` of it, to a square grid, or to the backbone's own."""
        return image_to_grid(self.images, self.backbone, self.layers, self.precision, upsampler, (side, side), given)


def _build(config: ViTUpBenchmark, device: torch.device, precision: Precision) -> Rig:
    size = (config.size, config.size)
    reload = partial(create_model, config.model, size, None, 0)
    model = reload()
    lora = Lora(copy.deepcopy(model))
    parameters = {BACKBONE: count_parameters(model), "lora": count_parameters(lora)}
    backbone = TimmBackbone(model)
    settings = published_settings(backbone.channels, backbone.n_layers, config.size, config.query_size)
    head = random_head(settings)
    vit_up = ViTUp(settings, model, head.state_dict(), lora.peft_state(), precision=precision)
    method = Lift("lift")
    lift_settings, state = method.untrained(backbone, backbone.channels, config.size, reload)
    lift = method.build(lift_settings, state, precision, reload)
    parameters |= {"head": count_parameters(head), "lift": method.parameters(lift_settings, state)}
    for module in (model, head):
        cast_matmul_weights(module, precision)
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    model.to(device)
    with torch.inference_mode(), autocast(device, precision):
        features = backbone(images, (backbone.n_layers - 1,))
    nets: dict[str, nn.Module] = {BACKBONE: model, "head": head, "lift": lift.net}
    weights = {name: sum(parameter.nbytes for parameter in net.parameters()) for name, net in nets.items()}
    return Rig(
        settings=settings,
        backbone=backbone,
        vit_up=vit_up,
        lift=lift,
        images=images,
        features=features,
        parameters=parameters,
        weights=weights,
        precision=precision,
    )


# --- operations -------------------------------------------------------------------------------------------------------


def published_macs(channels: int, tokens: int, blocks: int = 6) -> tuple[int, int]:
    """Multiply-accumulates of the head for each query, all its decoders included, and once for each image."""
    of_query = blocks * (24 * channels**2 + 2 * tokens * channels + 66 * channels) + (blocks + 1) * channels**2
    return of_query, blocks * 2 * tokens * channels**2


def head_macs(settings: ViTUpConfig, tokens: tuple[int, int], queries: int) -> int:
    """What torch counts for the last layer of so many queries of one image, keys and values included."""
    with torch.device("meta"):
        head = ViTUpHead(settings).eval()
        query_grid = torch.empty(1, settings.channels, 8, 8)
        hidden = [torch.empty(1, *tokens, settings.channels)] * len(settings.layers)
        coords = torch.empty(1, queries, 2)
    return counted_macs(lambda: head(query_grid, hidden, coords, outputs=[-1]))


def _count_once(config: ViTUpBenchmark, rig: Rig) -> ImageMacs:
    """What ViT-Up takes for an image whatever the grid: its backbone, the query grid, and keys and values."""
    size = (config.size, config.size)
    backbone = AdaptedBackbone(create_model(config.model, size, None, None).to("meta"))
    images = torch.empty(1, 3, *size, device="meta")
    settings = rig.settings
    return ImageMacs(
        backbone=counted_macs(lambda: backbone.hidden(images, settings.layers)),
        query_grid=counted_macs(lambda: backbone.query_grid(images, (config.query_size, config.query_size))),
        keys_values=published_macs(settings.channels, math.prod(rig.features.grid), settings.blocks)[1],
    )


def _lift_macs(rig: Rig, grid: int) -> int:
    lift = copy.deepcopy(rig.lift)
    lift.precision = "fp32"
    lift.net.float()
    maps = {layer: features.float().to("meta") for layer, features in rig.features.layers.items()}
    features = PatchFeatures(layers=maps, prefix={}, stride=rig.features.stride)
    return counted_macs(lambda: lift(rig.images.to("meta"), features, rig.layers, (grid, grid)))


# --- time and memory --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is run for a line of the tables."""

    line: Line
    "without what is measured"
    run: Callable[[], object]
    "what is timed: the image to the output grid"
    call: Callable[[], object]
    "of it what the line's `declared_bytes` hold for"
    weights: int
    "bytes behind `run`"
    call_weights: int


def _rows(config: ViTUpBenchmark, rig: Rig, grids: Sequence[int], backbone_macs: int) -> list[Row]:
    """The backbone alone, then bilinear, LiFT where it can, and ViT-Up for every grid."""
    (side, _), alone = rig.features.grid, rig.weights[BACKBONE]
    run = rig.image_to_grid()
    line = Line(
        method=BACKBONE,
        grid=side,
        declared_bytes=rig.backbone.peak_bytes(1, (config.size, config.size)),
        parameters=rig.parameters[BACKBONE],
        macs=backbone_macs,
    )
    rows = [Row(line=line, run=run, call=run, weights=alone, call_weights=alone)]
    for grid in grids:
        rows.append(_beside_backbone(rig, "bilinear", create_upsampler("bilinear"), grid))
        if _enlarges(rig, grid):
            rows.append(_beside_backbone(rig, "lift", rig.lift, grid, _lift_macs(rig, grid)))
        macs = head_macs(rig.settings, rig.features.grid, grid**2)
        of_grid = [_vit_up_row(rig, grid, chunk, macs) for chunk in config.chunks if chunk <= grid]
        # Small grids fit the default: another chunk may be the same.
        rows += {row.line.queries: row for row in of_grid}.values()
    return rows


def _enlarges(rig: Rig, grid: int) -> bool:
    try:
        rig.lift.method.require_grid(rig.lift.settings, rig.features.grid, (grid, grid))
    except UpsamplerError:
        return False
    return True


def _beside_backbone(rig: Rig, method: str, upsampler: Upsampler, grid: int, macs: int = 0) -> Row:
    """An upsampler of the plain backbone's map."""
    weights = rig.weights.get(method, 0)
    line = Line(
        method=method,
        grid=grid,
        declared_bytes=upsampler.peak_bytes(1, rig.backbone.channels, (grid, grid)),
        parameters=rig.parameters.get(method, 0),
        macs=macs,
    )
    return Row(
        line=line,
        run=rig.image_to_grid(upsampler, grid),
        call=rig.image_to_grid(upsampler, grid, rig.features),
        weights=rig.weights[BACKBONE] + weights,
        call_weights=weights,
    )


def _vit_up_row(rig: Rig, grid: int, chunk: int, macs: int) -> Row:
    """ViT-Up with so many queries at once, a square's; 0: as extraction. Its backbone is adapted, and its own."""
    vit_up, channels, tokens = copy.copy(rig.vit_up), rig.settings.channels, rig.features.grid
    if chunk:
        vit_up.take_at_once(chunk**2)
    size = (rig.images.shape[2], rig.images.shape[3])
    allow_alone(vit_up, rig.images.device, (1, channels, tokens, size, (grid, grid)))
    of_query, once = published_macs(channels, math.prod(tokens), rig.settings.blocks)
    weights, run = rig.weights[BACKBONE] + rig.weights["head"], rig.image_to_grid(vit_up, grid, rig.features)
    line = Line(
        method=VIT_UP,
        grid=grid,
        declared_bytes=vit_up.peak_bytes(1, channels, (grid, grid)),
        parameters=rig.parameters["head"] + rig.parameters["lora"],
        macs=macs,
        published_macs=grid**2 * of_query + once,
        queries=min(vit_up.query_chunk(), grid**2),
    )
    return Row(line=line, run=run, call=run, weights=weights, call_weights=weights)


@torch.inference_mode()
def _measure(rows: Sequence[Row], repeat: int, row_s: float, device: torch.device) -> list[Line]:
    """The rows' numbers: peak memory first, then the time."""
    for row in {row.line.method: row for row in reversed(rows)}.values():
        row.run()  # what is done once (layouts, position embeddings) would count as memory
    memory = [_memory(row, device) for row in rows]
    seconds = timed([row.run for row in rows], repeat, row_s, device)
    bilinear = {row.line.grid: times for row, times in zip(rows, seconds, strict=True) if row.line.method == "bilinear"}
    return [
        replace(
            row.line,
            seconds=tuple(times),
            ms=1e3 * statistics.median(times),
            of_alone=median_ratio(times, seconds[0]),
            of_bilinear=median_ratio(times, bilinear[row.line.grid]) if row.line.grid in bilinear else None,
            peak_bytes=peak,
            call_bytes=of_call,
        )
        for row, times, (peak, of_call) in zip(rows, seconds, memory, strict=True)
    ]


def _memory(row: Row, device: torch.device) -> tuple[int, int]:
    """Peak bytes of `run` and of `call`, with their weights."""
    peak = row.weights + peak_bytes(row.run, device, warm_up=False)
    return peak, peak if row.call is row.run else row.call_weights + peak_bytes(row.call, device, warm_up=False)
