"""The promise before the run: how many tasks, bytes, objects, how much memory and time.

Nothing here computes features, except the micro-batch that the time is extrapolated from.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch

from cluster.progress import size_text
from operators.codecs.memory import DecodeMemory
from operators.codecs.refusal import ImageRefused
from operators.image import decode
from operators.nvjpeg import MEMORY_BYTES, Nvjpeg
from pipelines.config import ConfigError
from pipelines.extraction.prepare import Prepared, default_batch, wanted_batch
from pipelines.extraction.schedule import lanes_for
from pipelines.features.model import FeatureModel
from pipelines.features.photos import geometry_of
from storage.documents import JsonObject
from storage.left_out import LeftOut, left_out_lines
from storage.paths import Folder
from storage.redaction import redact
from storage.sample_images import FRAME_BYTES, try_images
from storage.shards import compress, encode_row
from storage.spec import FeatureSpec, Layout, Level
from storage.words import counted


@dataclass(frozen=True, kw_only=True)
class LevelCost:
    level: Level
    raw_bytes: int
    objects: int
    shard_bytes: int
    "raw bytes of the largest object"
    device_bytes: int = 0
    "upper bound on what a batch's call of its learned upsampler takes, weights and result included"
    images_at_once: int = 0
    "of a batch, by its learned upsampler"
    parts: int = 0
    "one after another, in which the grid of these images is made"


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What --compile comes to."""

    start_s: float
    "longer for an actor's first batch, on this machine"
    error: float
    "relative L2 of the timed images' rows against the model's that isn't compiled"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do and cost. All sizes in bytes, all times in seconds."""

    inputs: tuple[str, ...]
    images: int
    unreadable: int
    "samples that the index already knows to have no readable image"
    sources: int
    videos: int
    "of which some of the images are frames"
    frames: int
    "how many of the images"
    left_out: Mapping[str, LeftOut]
    "what the input holds that is no image of these, by reason"
    model: str
    weights: str
    input_size: tuple[int, int]
    statistics: str
    "what the input is normalised with, and resized by, where weights of a file or folder may say so"
    jpeg_decoder: str
    notes: tuple[str, ...]
    "what is no mistake, and should be known"
    out: str
    state: str
    "`new`, or how many of its tasks are done"
    new_images: int
    "of sources that a store that exists doesn't have yet"
    new: str
    "them in words"
    tasks: int
    pending: int
    block_rows: int
    levels: tuple[LevelCost, ...]
    device: str
    actors: int
    batch: int
    usual_batch: int
    "what `batch` would be with more of the device's memory free"
    wanted_batch: int
    "images per forward that would be taken if tasks and memory allowed it"
    device_bytes: int
    host_bytes: int
    "of one actor, beside the interpreter and its libraries"
    decode_bytes: int
    "of them, what images may take while they are decoded"
    timed_images: int
    stage_seconds: Mapping[str, float]
    "per image on one worker of this machine"
    compiled: Compiled | None = None

    @property
    def total_bytes(self) -> int:
        return sum(cost.raw_bytes for cost in self.levels)

    @property
    def total_objects(self) -> int:
        return sum(cost.objects for cost in self.levels) + self.tasks

    @property
    def seconds_per_image(self) -> float:
        return sum(self.stage_seconds.values())

    @property
    def estimate_s(self) -> float:
        """Time for the pending tasks on `actors` workers like the timed one."""
        return self.pending * self.block_rows * self.seconds_per_image / max(self.actors, 1)

    @property
    def _halved(self) -> str:
        return "" if self.batch == self.usual_batch else f", not of {self.usual_batch}: too little is free"

    @property
    def _counted(self) -> str:
        """How many samples there are, in words."""
        if not self.videos:
            return f"{self.images:,} images"
        frames = f"{self.frames:,} frames of {counted(self.videos, 'videos')}"
        others = self.images - self.frames - self.unreadable
        return f"{frames}, {others:,} images" if others > 0 else frames

    def _steps(self, cost: LevelCost) -> str:
        """How many images are taken together, and in how many parts their grid is made, in words."""
        at_once = "all at once" if cost.images_at_once >= self.batch else f"{cost.images_at_once} at a time"
        return f"{at_once}, each grid {'whole' if cost.parts == 1 else f'in {cost.parts:,} parts'}"

    def to_json(self) -> JsonObject:
        sums = {name: getattr(self, name) for name in ("total_bytes", "total_objects", "estimate_s")}
        return json.loads(json.dumps(asdict(self) | sums))

    def describe(self) -> str:
        """The plan as text for people."""
        height, width = self.input_size
        lines = [
            (
                "input",
                " ".join(self.inputs),
                f"{self._counted} (index of {self.sources:,} sources, {self.unreadable} unreadable)",
            ),
            *([("new", self.new, "")] if self.new else []),
            *(("left out", line, "") for line in left_out_lines(self.left_out)),
            ("model", f"timm {self.model}", f"{height} x {width} px, weights {self.weights}"),
        ]
        if self.jpeg_decoder != "cpu":
            lines.append(("", f"JPEGs of the usual kinds decoded and resized by {self.jpeg_decoder} on the GPU", ""))
        if self.statistics:
            lines.append(("", self.statistics, ""))
        wide = max(6, *(len(cost.level.name) for cost in self.levels))
        for i, cost in enumerate(self.levels):
            level, shape = cost.level, " x ".join(str(n) for n in cost.level.row_shape)
            size = f"{size_text(cost.raw_bytes):>10} in {cost.objects:,} objects of up to {size_text(cost.shard_bytes)}"
            what = f"{level.name:<{wide}} {shape:<18} {level.encoding:<8} {level.method}"
            lines.append(("" if i else "levels", what, size))
            if cost.device_bytes:
                held = f"{size_text(cost.device_bytes)} of the {self.device}'s memory for {self.batch} images"
                lines.append(("", f"{'':<{wide}} made by {level.method}", f"{held}: {self._steps(cost)}"))
        lines += [("note", note, "") for note in self.notes]
        stages = ", ".join(f"{name} {value * 1e3:.2f} ms" for name, value in self.stage_seconds.items())
        lines += [
            (
                "store",
                f"{self.out}  ({self.state})",
                f"{size_text(self.total_bytes)}, {self.tasks:,} tasks of {self.block_rows} images, "
                f"{self.total_objects:,} objects",
            ),
            (
                "memory",
                f"{self.device} {size_text(self.device_bytes)} for batches of {self.batch}{self._halved}",
                f"host {size_text(self.host_bytes - self.decode_bytes)} per actor, and up to {size_text(self.decode_bytes)} "
                "to decode large images",
            ),
            *self._bounded_batch(),
            *self._compiled(),
            (
                "time",
                f"timed on {self.timed_images} images: {1 / self.seconds_per_image:.1f} images/s per worker",
                f"{_hours(self.estimate_s)} on {self.actors} {self.device} workers for {self.pending:,} pending tasks",
            ),
            ("", f"per image: {stages}", ""),
        ]
        return "\n".join(f"{head:<10} {left:<58} {right}".rstrip() for head, left, right in lines)

    def _compiled(self) -> Iterator[tuple[str, str, str]]:
        if self.compiled:
            what = f"{self.compiled.start_s:.0f} s longer for each actor's first batch"
            yield "compiled", what, f"rows differ by {self.compiled.error:.1e} (relative L2 of the timed images)"

    def _bounded_batch(self) -> Iterator[tuple[str, str, str]]:
        """A line where tasks are so small that batches are, too."""
        if self.block_rows < min(self.wanted_batch, self.images):
            why = f"a task is {self.block_rows} images, and so is a batch at most, where {self.wanted_batch} were to be tried"
            yield "", why, "--block-rows makes larger tasks, in a new store"


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def make_plan(prepared: Prepared) -> Plan:
    """Count and time."""
    config, spec, layout, pool = prepared.config, prepared.bundle.spec, prepared.layout, prepared.pool
    folder = Folder(config.out, config.options)
    pending, state = _state(prepared)
    on_gpu = pool.device == "cuda" and torch.cuda.is_available()
    model = prepared.bundle.build("cuda", pool.gpu_share) if on_gpu else prepared.model
    batch = usual_batch = default_batch(config, layout, pool.device)
    if config.batch:
        model.fit_upsamplers(batch)
    else:
        batch = model.fit_batch(batch)
    timed, seconds, compiled = _time_microbatch(prepared, model, min(batch, 16), pool.cpus)
    block_bytes = spec.row_bytes * layout.block_rows
    image_bytes = layout.block_rows * spec.input_size[0] * spec.input_size[1] * 3
    # What is read at a time, and the images cut out of it.
    input_bytes = 2 * prepared.index.largest_block_bytes(layout.block_rows, config.max_image_bytes)
    input_bytes += FRAME_BYTES * bool(prepared.index.fps)
    decode_bytes = DecodeMemory(config.max_image_pixels).capacity
    videos, frames = prepared.index.videos()
    bundle = prepared.bundle
    networks = (bundle.arrays, *(each.arrays for each in bundle.upsamplers.values()))
    lanes = lanes_for(pool.device, block_bytes)
    weights_bytes = sum(array.nbytes for arrays in networks for array in arrays.values())
    return Plan(
        inputs=tuple(redact(url, config.options) for url in config.data),
        images=layout.n_rows,
        unreadable=prepared.index.n_unreadable,
        sources=len(prepared.index.sources),
        videos=videos,
        frames=frames,
        left_out=dict(prepared.left_out),
        model=spec.model,
        weights=f"{spec.weights_source}, sha256 {spec.weights[:8]}…",
        input_size=spec.input_size,
        statistics=_statistics(spec) if spec.weights_source == "file" else "",
        jpeg_decoder=spec.jpeg_decoder,
        notes=prepared.notes,
        out=folder.displayed,
        state=state,
        new_images=prepared.update.state.grown if prepared.update else 0,
        new=prepared.update.new if prepared.update else "",
        tasks=layout.n_blocks,
        pending=pending,
        block_rows=layout.block_rows,
        levels=tuple(_level_cost(each, layout, model.level_cost(each, batch)) for each in spec.levels),
        device=pool.device,
        actors=pool.size,
        batch=batch,
        usual_batch=usual_batch,
        wanted_batch=wanted_batch(config, pool.device),
        device_bytes=model.peak_bytes(batch) + (MEMORY_BYTES if spec.jpeg_decoder == "nvjpeg" else 0),
        # Tasks overlap in an actor: their images and encoded rows, next to the weights.
        host_bytes=lanes.images * (image_bytes + input_bytes) + lanes.rows * block_bytes + weights_bytes + decode_bytes,
        decode_bytes=decode_bytes,
        timed_images=timed,
        stage_seconds=seconds,
        compiled=compiled,
    )


def _state(prepared: Prepared) -> tuple[int, str]:
    """How many tasks are to be done, and what there is already, in words."""
    update, n_blocks = prepared.update, prepared.layout.n_blocks
    if update is None:
        return n_blocks, "new"
    begun = update.begun - update.redo
    again = len(update.listed & update.redo)
    words = f", {again:,} run again for changed images" if again else ""
    words += f", {len(begun):,} in part" if begun else ""
    return n_blocks - len(update.done), f"{len(update.listed - begun):,} of {n_blocks:,} tasks done{words}"


def _statistics(spec: FeatureSpec) -> str:
    mean, std = (" ".join(f"{value:g}" for value in values) for values in (spec.mean, spec.std))
    args = "".join(f", {name} {value}" for name, value in spec.model_args.items())
    return f"mean {mean}, std {std}, {spec.interpolation}{args}"


def _level_cost(level: Level, layout: Layout, made: tuple[int, int, int]) -> LevelCost:
    """`made`: what `FeatureModel.level_cost` says of it."""
    device_bytes, images_at_once, parts = made
    rows = layout.shard_rows(level) if level.grid else layout.block_rows
    arrays = 2 if level.dtype == "int8" else 1
    return LevelCost(
        level=level,
        raw_bytes=layout.n_rows * level.row_bytes,
        objects=-(-layout.n_rows // rows) + (arrays - 1) * layout.n_blocks,
        shard_bytes=min(rows, layout.n_rows) * level.row_bytes,
        device_bytes=device_bytes,
        images_at_once=images_at_once,
        parts=parts,
    )


def _time_microbatch(
    prepared: Prepared, model: FeatureModel, n: int, threads: int
) -> tuple[int, dict[str, float], Compiled | None]:
    """How many of the first `n` readable images were timed, seconds per image and stage with `threads` threads, and what
    compiling takes, which is done with the model."""
    spec, geometry = prepared.bundle.spec, geometry_of(prepared.bundle.spec)
    rows = prepared.index.read(0, min(prepared.layout.n_rows, 8192))
    keep = [i for i, problem in enumerate(rows["problem"].to_pylist()) if problem is None][:n]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        t0 = time.perf_counter()
        blobs = try_images(rows.take(keep), prepared.urls, prepared.config.options, max_bytes=prepared.config.max_image_bytes)
        t1 = time.perf_counter()
        images, limit = [], prepared.config.max_image_pixels
        # Where the workers have GPUs and this machine none, the time is that of its CPU.
        gpu = Nvjpeg("cuda") if spec.jpeg_decoder == "nvjpeg" and model.device.type == "cuda" else None
        for blob in blobs:
            # The run itself will say why an image is refused; here it only leaves the sample.
            with contextlib.suppress(ImageRefused):
                data = blob if isinstance(blob, bytes) else b""
                images.append(decode(data, geometry, max_pixels=limit, draft=spec.jpeg_draft, gpu=gpu).pixels)
        t2 = time.perf_counter()
        if not images:
            raise ConfigError(f"none of the first {len(blobs)} images can be decoded; look at them, or at --image-member")
        model(np.stack(images[:1]))
        compiled = _compile(model, prepared.config.compile, np.stack(images))
        maps = model(np.stack(images))
        by_level = [(level, maps.levels[level.name].cpu().numpy()) for level in spec.levels]
        t3 = time.perf_counter()
        for level, made in by_level:
            for row in made:
                compress(encode_row(row, level.dtype)[0], level.compression)
        t4 = time.perf_counter()
    finally:
        torch.set_num_threads(before)
    count = len(images)
    # Host stages run on all threads of a worker; the timing above used one.
    host = max(threads, 1) * count
    stages = {
        "read": (t1 - t0) / count,
        "decode": (t2 - t1) / host,
        "forward": maps.seconds.forward / count,
        "upsample": maps.seconds.upsample / count,
        "encode": (t4 - t3) / host,
    }
    return count, stages, compiled


def _compile(model: FeatureModel, mode: str, images: np.ndarray) -> Compiled | None:
    """Compile the model, where that is asked for; what that takes, and changes in its rows of some images."""
    if mode == "off":
        return None

    def rows() -> dict[str, np.ndarray]:
        return {name: made.float().cpu().numpy() for name, made in model(images).levels.items()}

    plain = rows()
    model.compile(mode)
    t0 = time.perf_counter()
    found = rows()
    seconds = time.perf_counter() - t0
    errors = [float(np.linalg.norm(found[name] - each) / np.linalg.norm(each)) for name, each in plain.items()]
    return Compiled(start_s=seconds, error=max(errors))
