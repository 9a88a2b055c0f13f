"""`make gpu`: what a GPU makes of it, within minutes: extraction beside the bare forward, memory beside its bound, float32 beside
a CPU's, upsamplers beside their published times, training beside a plain loop.
"""

import logging
import math
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from operators.image import ON_GPU, DecodedImage, Geometry, GpuDecoder, decode
from operators.nvjpeg import NoNvjpeg, Nvjpeg, require_nvjpeg
from pipelines.benchmarks import train
from pipelines.benchmarks.data import write_photos
from pipelines.benchmarks.train import TrainBenchmark, TrainResult, measure_training, train_report
from pipelines.config import ConfigError, require_at_least
from pipelines.costs import runtime
from pipelines.costs.clocks import Machine, NumbersFile, device_name, device_of, peak_bytes, seconds_of
from pipelines.costs.process import CORES, BenchmarkFailed
from pipelines.costs.runtime import RuntimeConfig
from pipelines.evaluation.run import evaluate
from pipelines.executors import InlineExecutor
from pipelines.extraction.config import ExtractConfig
from pipelines.extraction.decoding import DecodeThreads
from pipelines.extraction.run import extract
from pipelines.features.bundle import load_bundle
from pipelines.features.config import FeatureConfig
from pipelines.features.model import FeatureModel
from pipelines.published.vit_up import VIT_UP_FEATURES
from pipelines.results import number_lines

logger = logging.getLogger(__name__)

WITHIN = 1e-4
"""Largest difference of a GPU's float32 rows from a CPU's, as a part of the largest value."""

COMPARED = 2
"""Images that are computed on the CPU, too."""


@dataclass(frozen=True, kw_only=True)
class GpuBenchmark:
    """Extraction, memory, precision, upsamplers and training on a GPU, in at most so many minutes."""

    device: Literal["cuda", "cpu"] = "cuda"
    """`cpu` is for trying it."""
    cases: tuple[str, ...] = ("vit_base_patch16_224.augreg_in21k@448", "vit_small_patch16_224.dino@224")
    """MODEL@SIZE: timm's name and the side of the square input in pixels; weights are random."""
    images: int = 1024
    """Photographs to extract, a power of two."""
    batch: int = 64
    """Images per forward, a power of two."""
    repeat: int = 20
    """Batches of the bare forward."""
    compiled: bool = True
    """Compile the model and measure again."""
    grid: int = 448
    """Side of the grid that LiFT and ViT-Up make of --grid px."""
    minutes: float = 8.0
    """No part is begun that is likely not to end within them; what is left out is said."""
    training: TrainBenchmark = field(default=TrainBenchmark(repeat=1, steps=24, ray=False, precision="bf16", fed_steps=40))
    """The training that is compared with a plain loop."""
    json: NumbersFile = ""

    def __post_init__(self) -> None:
        require_at_least(1, self, "images", "batch", "repeat", "grid")
        for name in ("images", "batch"):
            if (value := getattr(self, name)) & (value - 1):
                raise ConfigError(f"--{name} {value}: must be a power of two")
        for case in self.cases:
            if not case.partition("@")[2].isdecimal():
                raise ConfigError(f"--cases {case}: give MODEL@SIZE, for example vit_small_patch16_224.dino@224")


# No network. On 2 CPU cores half a minute, most of it in training.
DEBUG = GpuBenchmark(
    device="cpu", cases=("test_vit.r160_in1k@64",), images=8, batch=2, repeat=2, compiled=False, grid=64, training=train.DEBUG
)


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """Images per second of one model."""

    case: str
    mode: str
    "of --compile"
    bare: float
    "the model alone, with its images on the device"
    pipeline: float
    "from the second task to the last commit, decoding and writing to a local disk included"
    peak: int
    "bytes beside the weights that a batch took"
    bound: int
    "that were declared"


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """JPEGs by --jpeg-decoder nvjpeg beside the CPU's, with as many threads each."""

    threads: int
    by_cpu: float
    "images/s"
    by_gpu: float
    taken: float
    "part of the images that the GPU decoded"
    mean: float
    "difference of its pixels, of 255"
    largest: int


@dataclass(frozen=True, kw_only=True)
class GpuResult:
    """What was measured."""

    device: str
    extractions: Sequence[Extraction]
    decoding: Decoding | None
    "None: there was no time, or torchcodec can't do it here"
    errors: dict[str, float]
    "float32 against the CPU, by case"
    upsamplers: str
    "the report of `jobs/evaluate.py runtime`"
    training: TrainResult | None
    left_out: Sequence[str]
    "parts, for lack of time"
    seconds: float


def measure_gpu(config: GpuBenchmark, folder: Path) -> GpuResult:
    """All parts that there is time for. Raises `ConfigError` where there is no GPU."""
    device, begun = device_of(config.device), time.monotonic()
    photos = write_photos(folder / "photos", config.images)
    found = _Found()
    parts: dict[str, Callable[[], None]] = {}
    for case in config.cases:
        parts[f"float32 of {case}"] = partial(found.compare, case, device)
        for mode in _MODES[: 1 + config.compiled]:
            parts[f"{case}, compile {mode}"] = partial(found.extract, config, case, mode, device, photos, folder)
    try:
        require_nvjpeg()
    except NoNvjpeg as error:
        logger.warning("%s", error)
    else:
        parts["decoding"] = partial(found.decode, config, device, photos)
    parts["upsamplers"] = partial(found.upsample, config, folder)
    parts["training"] = partial(found.train, replace(config.training, device=config.device), folder / "training")
    left_out, longest = [], 0.0
    for name, part in parts.items():
        t0 = time.monotonic()
        # As long as the longest so far, it would have to fit.
        if t0 - begun + longest > 60 * config.minutes:
            left_out.append(name)
            continue
        part()
        longest = max(longest, time.monotonic() - t0)
        logger.info("%s: %.0f s", name, time.monotonic() - t0)
    return GpuResult(
        device=device_name(device),
        extractions=found.extractions,
        decoding=found.decoding,
        errors=found.errors,
        upsamplers=found.upsamplers,
        training=found.training,
        left_out=left_out,
        seconds=time.monotonic() - begun,
    )


_MODES: tuple[Literal["off", "on"], ...] = ("off", "on")


@dataclass
class _Found:
    """What the parts found so far."""

    extractions: list[Extraction] = field(default_factory=list)
    decoding: Decoding | None = None
    errors: dict[str, float] = field(default_factory=dict)
    upsamplers: str = ""
    training: TrainResult | None = None

    def compare(self, case: str, device: torch.device) -> None:
        self.errors[case] = _error(case, device)

    def extract(
        self, config: GpuBenchmark, case: str, mode: Literal["off", "on"], device: torch.device, photos: str, folder: Path
    ) -> None:
        self.extractions.append(_extraction(config, case, mode, device, photos, folder))

    def decode(self, config: GpuBenchmark, device: torch.device, photos: str) -> None:
        self.decoding = _decoding(int(config.cases[0].partition("@")[2]), device, photos)

    def upsample(self, config: GpuBenchmark, folder: Path) -> None:
        self.upsamplers = evaluate("runtime", runtime, _runtime(config, folder))

    def train(self, config: TrainBenchmark, folder: Path) -> None:
        folder.mkdir()
        self.training = measure_training(config, folder)


def _features(case: str, precision: Literal["bf16", "fp32"]) -> FeatureConfig:
    model, _, size = case.partition("@")
    return FeatureConfig(model=model, weights="random", size=size, levels=("x1",), precision=precision)


def _pixels(count: int, case: str) -> np.ndarray:
    side = int(case.partition("@")[2])
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


def _error(case: str, device: torch.device) -> float:
    """Largest difference of the device's float32 map from the CPU's, as a part of its largest value."""
    bundle, model = load_bundle(_features(case, "fp32"))
    pixels = _pixels(COMPARED, case)
    here, there = (each(pixels).levels["x1"].float().cpu() for each in (model, bundle.build(str(device))))
    return float((here - there).abs().max() / here.abs().max())


def _extraction(
    config: GpuBenchmark, case: str, mode: Literal["off", "on"], device: torch.device, photos: str, folder: Path
) -> Extraction:
    # A CPU's kernels for bf16 copy weights into a layout of their own (with AMX), which a batch's bound has no place for.
    features = _features(case, "bf16" if config.device == "cuda" else "fp32")
    model = load_bundle(features)[0].build(str(device))
    if mode != "off":
        model.compile(mode)
    images = torch.from_numpy(_pixels(config.batch, case)).to(device)
    weights = sum(each.nbytes for each in model.backbone.model.parameters())
    peak = peak_bytes(lambda: model(images), device)
    bare = _bare(model, images, config.repeat, device)
    bound = model.peak_bytes(config.batch) - weights
    # Four tasks at least, of which the first one is for starting.
    block = max(config.batch, config.images // 16) if config.images >= 4 * config.batch else config.images // 4
    asked = ExtractConfig.of(
        data=(photos,), out=str(folder / f"{case}-{mode}.zarr"), executor="inline", device=config.device, batch=config.batch,
        block_rows=block, compile=mode,
        **{name: getattr(features, name) for name in ("model", "weights", "size", "levels", "precision")},
    )  # fmt: skip
    summary = extract(asked, InlineExecutor())
    rate = (summary.this_run - block) / max(summary.seconds - summary.start_up_s, 1e-9)
    return Extraction(case=case, mode=mode, bare=bare, pipeline=rate, peak=peak, bound=bound)


def _decoding(side: int, device: torch.device, photos: str) -> Decoding:
    """Of the photographs, to squares of so many pixels."""
    jpegs = []
    for path in sorted(Path(photos).parent.glob(Path(photos).name)):
        with tarfile.open(path) as tar:
            jpegs += [tar.extractfile(each).read() for each in tar]  # type: ignore[union-attr]  # they are files
    geometry, pool = Geometry(mode="crop", height=side, width=side), DecodeThreads(CORES)

    def images(gpu: GpuDecoder | None) -> tuple[list[DecodedImage], float]:
        def one(jpeg: bytes) -> DecodedImage:
            return decode(jpeg, geometry, max_pixels=10**8, gpu=gpu)

        pool.map(one, jpegs[:CORES], 600.0)
        start = time.perf_counter()
        found = pool.map(one, jpegs, 600.0)
        return found, len(found) / (time.perf_counter() - start)

    (here, by_cpu), (there, by_gpu) = images(None), images(Nvjpeg(str(device)))
    apart = np.stack([np.abs(a.pixels.astype(int) - b.pixels) for a, b in zip(here, there, strict=True)])
    taken = sum(ON_GPU in each.conversion.split(", ") for each in there) / len(there)
    return Decoding(threads=CORES, by_cpu=by_cpu, by_gpu=by_gpu, taken=taken, mean=float(apart.mean()), largest=int(apart.max()))


def _bare(model: FeatureModel, images: torch.Tensor, repeat: int, device: torch.device) -> float:
    """Images per second of batches that are given one after another, as extraction gives them."""

    def run() -> None:
        for _ in range(repeat):
            model(images)

    model(images)
    return repeat * len(images) / seconds_of(run, device)


def _runtime(config: GpuBenchmark, folder: Path) -> RuntimeConfig:
    """LiFT's and ViT-Up's finest grids, as ViT-Up's Table 9 times them."""
    features = {**VIT_UP_FEATURES} if config.device == "cuda" else {"model": "test_vit.r160_in1k", "precision": "fp32"}
    return RuntimeConfig.of(
        out=str(folder / "runtime"), methods=("bilinear", "lift", "vit_up"), size=config.grid, grids=(config.grid,),
        weights="random", executor="inline", device=config.device, warm_up=min(5, config.repeat), repeat=config.repeat,
        row_s=20.0, **features,
    )  # fmt: skip


def require_kept(result: GpuResult) -> None:
    """Raises `BenchmarkFailed` where a promise isn't kept."""
    for case, error in result.errors.items():
        if not error <= WITHIN:
            raise BenchmarkFailed(f"{case}: float32 differs from a CPU's by {error:.1e}, more than {WITHIN:g}")
    for each in result.extractions:
        if each.peak > each.bound:
            raise BenchmarkFailed(f"{each.case}: a batch took {each.peak:,} bytes, where {each.bound:,} were declared")


def gpu_report(config: GpuBenchmark, result: GpuResult, machine: Machine) -> Iterator[str]:
    """The numbers as Markdown, line by line."""
    yield f"## gpu: {result.device}, batches of {config.batch}, {result.seconds / 60:.1f} minutes"
    yield machine.usual_line()
    columns = {"model": "", "compile": "", "bare forward, images/s": ".0f", "extraction": ".0f", "of it": ".2f"}
    columns |= {"batch's peak, MB": ".0f", "of its bound": ".2f"}
    rows = [
        [each.case, each.mode, each.bare, each.pipeline, each.pipeline / each.bare, each.peak / 1e6, each.peak / each.bound]
        for each in result.extractions
    ]
    yield from number_lines(columns, rows)
    errors = [[case, error] for case, error in result.errors.items()]
    yield from number_lines({"float32 beside a CPU's": "", "largest difference": ".1e"}, errors)
    if found := result.decoding:
        columns = {"JPEGs decoded and resized, images/s": "", "CPU": ".0f", "nvJPEG": ".0f", "of them by it": ".2f"}
        columns |= {"pixels differ by": ".2f", "at most": ".0f"}
        row = [f"{found.threads} threads", found.by_cpu, found.by_gpu, found.taken, found.mean, found.largest]
        yield from number_lines(columns, [row])
    if result.upsamplers:
        yield f"\n{result.upsamplers}"
    if result.training:
        yield ""
        yield from train_report(config.training, result.training, machine)
    if result.left_out:
        yield f"\nLeft out, within {math.ceil(config.minutes)} minutes: {'; '.join(result.left_out)}"
