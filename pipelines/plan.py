"""The promise before the run: which settings, which tasks, how many bytes, objects, how much memory and time.

`ExtractConfig` is what a user sets; `resolve` and `prepare` hold it against the model and the input; `Plan` says what that costs.
Nothing here computes features, except the micro-batch that the time is extrapolated from.
"""

import importlib.metadata
import json
import logging
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from operators.backbone import preprocessing
from operators.image import Geometry, decode
from pipelines.models import (
    ConfigError,
    FeatureModel,
    LevelChoice,
    ModelBundle,
    WeightsChoice,
    describe_model,
    load_model,
)
from storage.paths import Folder, InputFile, expand_inputs, public_options, redact
from storage.samples import MemberRules, SampleIndex, build_index, read_images
from storage.shards import compress, encode_row
from storage.spec import FeatureSpec, Layout, Level, choose_block_rows
from storage.store import FeatureStore, read_attributes

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Settings of one extraction."""

    data: tuple[str, ...] = ()
    """WebDataset tars (URLs; braces and globs allowed) or folders of tars or images."""
    out: str = ""
    """The Zarr store to write or continue: a path or fsspec URL."""

    model: str = "vit_small_patch16_224.dino"
    """timm name of the backbone, tag included."""
    weights: str = "pretrained"
    """`pretrained` (the hub, or its local cache), a file or folder at a path or URL, or `random[:SEED]`."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    size: str | None = None
    """Input pixels, `SIDE` or `HEIGHTxWIDTH`; default: the model's own."""
    geometry: Literal["crop", "squash", "pad"] = "crop"
    """Centre crop, aspect not kept, or letterbox."""
    crop_pct: float = 1.0
    """With `crop`: the image is resized to cover size / crop_pct before the centre is cut out."""
    layers: tuple[int, ...] = (-1,)
    """Blocks whose maps are stored, from 0 or negative from the end; several are concatenated along the channels."""
    facet: Literal["token", "key", "query", "value"] = "token"
    """What is taken of a block: its output, or a projection of its attention."""
    norm: bool | None = None
    """Apply the backbone's final norm to token maps; default: where the model has one."""
    stride: int | None = None
    """Input pixels between cells; below the patch size, patches overlap."""
    pos_embed: Literal["timm", "dino"] | None = None
    """Interpolation of position embeddings; default: timm's, and DINO's with a stride override."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Autocast of the backbone's forward."""
    jpeg_draft: bool = False
    """Decode large JPEGs at reduced scale: faster, slightly other pixels."""

    levels: tuple[str, ...] = ("x1", "pooled")
    """`NAME[=METHOD][@ENCODING]`: x1, x2, x0.5, 112x112, pooled; methods bilinear, bicubic, nearest, average, cls, mean."""
    encoding: Literal["float16", "float32", "int8"] = "float16"
    """How features are stored, unless a level says otherwise."""

    image_member: str | None = None
    """Extension of the image inside a sample, where it isn't the first of jpg, jpeg, png, webp, bmp, tif."""
    carry: tuple[str, ...] = ()
    """Text members that become columns of the index, for example `cls json`."""
    limit: int | None = None
    """Only the first N samples."""
    max_image_pixels: int = 89_478_485
    """Images with more pixels fail instead of filling the memory; the default is Pillow's."""
    max_failed_fraction: float = 0.01
    """The failure budget: with a larger part of the images failed, the run ends with an error."""
    retry_failed: bool = False
    """Run tasks with failed rows again."""

    storage_options: str | None = None
    """JSON for the filesystem, for example '{"endpoint_url": "http://host:9000"}', or one object per scheme. Better for
    secrets: a profile, environment variables, or fsspec's own configuration file."""
    executor: Literal["auto", "ray", "inline"] = "auto"
    """`inline` runs in this process, without Ray; `auto` is Ray, except for memory:// which only one process can see."""
    ray_address: str | None = None
    """A Ray cluster; default: the job's own under `ray job submit`, else a new local one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes GPUs where the cluster has any."""
    actors: int | None = None
    """Number of model actors; default: one per GPU, or per CPU where there is none."""
    actor_cpus: int | None = None
    """CPUs and threads of one actor; default: 1 on CPU, the node's share per GPU otherwise."""
    actor_gpus: float | None = None
    """GPUs of one actor; fractions pack several small models onto one."""
    decode_on: Literal["actor", "cluster"] = "actor"
    """`cluster` decodes in separate tasks on any CPU, for GPU nodes whose own CPUs can't keep up."""
    batch: int | None = None
    """Images per forward; default: 16 on CPU, 64 on GPU, less where memory is short."""
    block_rows: int | None = None
    """Images per task, a power of two; default: by input size and row size. Part of the store's layout."""

    plan: bool = False
    """Print what would be done and what it would cost, then stop."""
    json: bool = False
    """With --plan: as JSON."""

    def __post_init__(self) -> None:
        if not 0 < self.crop_pct <= 1:
            raise ConfigError(f"--crop-pct {self.crop_pct}: must be above 0 and at most 1")
        if not 0 <= self.max_failed_fraction <= 1:
            raise ConfigError(f"--max-failed-fraction {self.max_failed_fraction}: must lie between 0 and 1")
        for name in ("limit", "batch", "block_rows", "actors", "actor_cpus", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if self.block_rows is not None and self.block_rows & (self.block_rows - 1):
            raise ConfigError(f"--block-rows {self.block_rows}: must be a power of two")
        if self.executor == "ray" and any("memory://" in url for url in (*self.data, self.out)):
            raise ConfigError("memory:// can be seen by one process only; use --executor inline, or another URL")

    @property
    def options(self) -> dict[str, Any]:
        """`storage_options` parsed. Raises `ConfigError`, without repeating the text: it may hold secrets."""
        try:
            options = json.loads(self.storage_options or "{}")
        except json.JSONDecodeError as error:
            raise ConfigError(f"--storage-options is not valid JSON: {error.msg} at character {error.pos}") from None
        if not isinstance(options, dict):
            raise ConfigError("--storage-options must be a JSON object")
        return options

    @property
    def input_size(self) -> tuple[int, int] | None:
        """(height, width), or None for the model's own."""
        if self.size is None:
            return None
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", self.size)
        if not match:
            raise ConfigError(f"--size {self.size}: use SIDE or HEIGHTxWIDTH in pixels, for example 448 or 384x512")
        return int(match.group(1)), int(match.group(2) or match.group(1))

    def public(self) -> dict[str, Any]:
        """All settings without credentials, for files and logs."""
        shown = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.storage_options:
            shown["storage_options"] = json.dumps(public_options(self.options))
        shown["data"] = [redact(url, self.options) for url in self.data]
        for name in ("out", "weights"):
            shown[name] = redact(shown[name], self.options)
        return json.loads(json.dumps(shown))


CONTENT_FIELDS = (
    "model",
    "weights",
    "revision",
    "size",
    "geometry",
    "crop_pct",
    "layers",
    "facet",
    "norm",
    "stride",
    "pos_embed",
    "precision",
    "jpeg_draft",
    "levels",
    "encoding",
    "image_member",
    "carry",
    "limit",
    "max_image_pixels",
    "block_rows",
)
"""Settings that decide what is in a store, as opposed to where and how it is made; these go into its attributes."""


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A config held against the input and the model, before any cluster is asked for anything."""

    config: ExtractConfig
    bundle: ModelBundle
    model: FeatureModel
    "the same model in this process, on the CPU"
    files: tuple[InputFile, ...]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An extraction that is ready to run: everything but the workers."""

    config: ExtractConfig
    bundle: ModelBundle
    model: FeatureModel
    layout: Layout
    index: SampleIndex
    urls: tuple[str, ...]
    "the index's sources with credentials, as this run reads them"

    def create_store(self) -> FeatureStore:
        """Create or continue the output. Raises `FingerprintMismatch`."""
        public = self.config.public()
        provenance = {"versions": versions(), "config": {name: public[name] for name in CONTENT_FIELDS}}
        return FeatureStore.create(
            self.config.out,
            self.bundle.spec,
            self.layout,
            provenance=provenance,
            storage_options=self.config.options,
        )


def resolve(config: ExtractConfig) -> Resolved:
    """Find the input's files and load the model: what can be wrong with the settings is wrong here.

    Raises `InputError`, `ConfigError`, `BackboneError`, `UpsamplerError`, `WeightsUnavailable`.
    """
    if not config.out:
        raise ConfigError("no output: give --out a path or URL for the Zarr store")
    expects = preprocessing(config.model)
    size = config.input_size or expects.size
    levels = [LevelChoice.parse(text, config.encoding) for text in config.levels]
    weights = WeightsChoice.parse(config.weights)
    # Refuses what is there and isn't ours, before anything is written.
    read_attributes(Folder(config.out, config.options))
    files = expand_inputs(config.data, config.options)
    loaded = load_model(config.model, size, weights, config.revision, config.options)
    bundle, model = describe_model(
        name=config.model,
        model=loaded,
        weights_source=weights.source,
        layers=config.layers,
        facet=config.facet,
        norm=config.norm,
        stride=config.stride,
        pos_embed=config.pos_embed,
        size=size,
        expects=expects,
        geometry=config.geometry,
        crop_pct=config.crop_pct if config.geometry == "crop" else 1.0,
        precision=config.precision,
        jpeg_draft=config.jpeg_draft,
        levels=levels,
    )
    return Resolved(config=config, bundle=bundle, model=model, files=tuple(files))


def prepare(resolved: Resolved, executor: Any) -> Prepared:
    """Index the input, or check the index that is there. Raises `InputError`."""
    config, spec = resolved.config, resolved.bundle.spec
    index = _index(config, Folder(config.out, config.options), list(resolved.files), executor)
    block_rows = config.block_rows or choose_block_rows(index.n_rows, spec)
    return Prepared(
        config=config,
        bundle=resolved.bundle,
        model=resolved.model,
        layout=Layout(n_rows=index.n_rows, block_rows=block_rows, index=index.digest),
        index=index,
        urls=tuple(file.url for file in resolved.files[: len(index.sources)]),
    )


def _index(config: ExtractConfig, folder: Folder, files: list[InputFile], executor: Any) -> SampleIndex:
    rules = MemberRules(image=config.image_member, carry=config.carry)
    index = build_index(folder, files, lambda some: executor.scan(some, rules, config.options), config.limit)
    for source in index.sources:
        if source.problems:
            logger.warning("%s: %s", source.url, source.problems)
    return index


def versions() -> dict[str, str]:
    """Software that made the numbers."""
    names = ("ray", "torch", "timm", "zarr", "numcodecs", "pillow", "numpy", "pyarrow", "fsspec")
    found = {name: importlib.metadata.version(name) for name in names}
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {"python": platform.python_version(), **found, "raylift_commit": commit or "unknown"}


def geometry_of(spec: FeatureSpec) -> Geometry:
    return Geometry(
        mode=spec.geometry,
        height=spec.input_size[0],
        width=spec.input_size[1],
        crop_pct=spec.crop_pct,
        interpolation=spec.interpolation,
        mean=spec.mean,
    )


# --- what it costs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LevelCost:
    level: Level
    raw_bytes: int
    objects: int
    shard_bytes: int
    "raw bytes of the largest object"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do and cost. All sizes in bytes, all times in seconds."""

    inputs: tuple[str, ...]
    images: int
    unreadable: int
    "samples that the index already knows to have no readable image"
    sources: int
    model: str
    weights: str
    input_size: tuple[int, int]
    out: str
    state: str
    "`new`, or how many of its tasks are done"
    tasks: int
    pending: int
    block_rows: int
    levels: tuple[LevelCost, ...]
    device: str
    actors: int
    batch: int
    device_bytes: int
    host_bytes: int
    "of one actor"
    timed_images: int
    stage_seconds: Mapping[str, float]
    "per image on one worker of this machine"

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

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        data |= {"total_bytes": self.total_bytes, "total_objects": self.total_objects, "estimate_s": self.estimate_s}
        return json.loads(json.dumps(data))

    def describe(self) -> str:
        """The plan as text for people."""
        lines = [
            _line(
                "input",
                " ".join(self.inputs),
                f"{self.images:,} images (index of {self.sources:,} sources, {self.unreadable} unreadable)",
            ),
            _line(
                "model", f"timm {self.model}", f"{self.input_size[0]} x {self.input_size[1]} px, weights {self.weights}"
            ),
        ]
        for i, cost in enumerate(self.levels):
            level = cost.level
            shape = " x ".join(str(n) for n in level.row_shape)
            lines.append(
                _line(
                    "levels" if i == 0 else "",
                    f"{level.name:<6} {shape:<18} {level.dtype:<8} {level.method}",
                    f"{_size(cost.raw_bytes):>10} in {cost.objects:,} objects of up to {_size(cost.shard_bytes)}",
                )
            )
        lines += [
            _line(
                "store",
                f"{self.out}  ({self.state})",
                f"{_size(self.total_bytes)}, {self.tasks:,} tasks of {self.block_rows} images, {self.total_objects:,} objects",
            ),
            _line(
                "memory",
                f"{self.device} {_size(self.device_bytes)} for batches of {self.batch}",
                f"host {_size(self.host_bytes)} per actor",
            ),
            _line(
                "time",
                f"timed on {self.timed_images} images: {1 / self.seconds_per_image:.1f} images/s per worker",
                f"{_hours(self.estimate_s)} on {self.actors} {self.device} workers for {self.pending:,} pending tasks",
            ),
            _line(
                "",
                "per image: " + ", ".join(f"{name} {value * 1e3:.2f} ms" for name, value in self.stage_seconds.items()),
                "",
            ),
        ]
        return "\n".join(line.rstrip() for line in lines)


def _line(head: str, left: str, right: str) -> str:
    return f"{head:<10} {left:<58} {right}"


def _size(n: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return ""


def _hours(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def default_batch(config: ExtractConfig, layout: Layout, device: str) -> int:
    """Images per forward that workers start from; they take fewer where memory is short."""
    return min(config.batch or (64 if device == "cuda" else 16), layout.block_rows)


def make_plan(prepared: Prepared, *, device: str, actors: int, threads: int) -> Plan:
    """Count and time. `threads` is what one worker will have."""
    config, spec, layout = prepared.config, prepared.bundle.spec, prepared.layout
    folder = Folder(config.out, config.options)
    existing = read_attributes(folder)
    if existing is not None:
        store = FeatureStore(folder, existing)
        store.require(spec, layout)
        pending = len(store.pending())
        state = f"{layout.n_blocks - pending:,} of {layout.n_blocks:,} tasks done"
    else:
        pending, state = layout.n_blocks, "new"
    on_gpu = device == "cuda" and torch.cuda.is_available()
    model = prepared.bundle.build("cuda") if on_gpu else prepared.model
    batch = default_batch(config, layout, device)
    batch = batch if config.batch else model.fit_batch(batch)
    timed, seconds = _time_microbatch(prepared, model, min(batch, 16), threads)
    block_bytes = spec.row_bytes * layout.block_rows
    image_bytes = layout.block_rows * spec.input_size[0] * spec.input_size[1] * 3
    weights_bytes = sum(array.nbytes for array in prepared.bundle.arrays.values())
    return Plan(
        inputs=tuple(redact(url, config.options) for url in config.data),
        images=layout.n_rows,
        unreadable=prepared.index.n_unreadable,
        sources=len(prepared.index.sources),
        model=spec.model,
        weights=f"{spec.weights_source}, sha256 {spec.weights[:8]}…",
        input_size=spec.input_size,
        out=folder.shown,
        state=state,
        tasks=layout.n_blocks,
        pending=pending,
        block_rows=layout.block_rows,
        levels=tuple(_level_cost(level, layout) for level in spec.levels),
        device=device,
        actors=actors,
        batch=batch,
        device_bytes=model.peak_bytes(batch),
        # Two tasks overlap in an actor: their images and encoded rows, next to the weights.
        host_bytes=2 * (block_bytes + image_bytes) + weights_bytes,
        timed_images=timed,
        stage_seconds=seconds,
    )


def _level_cost(level: Level, layout: Layout) -> LevelCost:
    rows = layout.shard_rows(level) if level.grid else layout.block_rows
    arrays = 2 if level.dtype == "int8" else 1
    return LevelCost(
        level=level,
        raw_bytes=layout.n_rows * level.row_bytes,
        objects=-(-layout.n_rows // rows) + (arrays - 1) * layout.n_blocks,
        shard_bytes=min(rows, layout.n_rows) * level.row_bytes,
    )


def _time_microbatch(prepared: Prepared, model: Any, n: int, threads: int) -> tuple[int, dict[str, float]]:
    """How many of the first `n` readable images were timed, and seconds per image and stage with `threads` threads."""
    spec, geometry = prepared.bundle.spec, geometry_of(prepared.bundle.spec)
    rows = prepared.index.read(0, min(prepared.layout.n_rows, 8192))
    keep = [i for i, problem in enumerate(rows["problem"].to_pylist()) if problem is None][:n]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        t0 = time.perf_counter()
        blobs = read_images(rows.take(keep), prepared.urls, prepared.config.options)
        t1 = time.perf_counter()
        images = []
        for blob in blobs:
            try:
                images.append(
                    decode(
                        blob or b"", geometry, max_pixels=prepared.config.max_image_pixels, draft=spec.jpeg_draft
                    ).pixels
                )
            except (OSError, ValueError, SyntaxError):
                continue  # the run itself will say why; here it only leaves the sample
        t2 = time.perf_counter()
        if not images:
            raise ConfigError(
                f"none of the first {len(blobs)} images can be decoded; look at them, or at --image-member"
            )
        model(np.stack(images[:1]), {})
        seconds: dict[str, float] = {}
        out, _ = model(np.stack(images), seconds)
        t3 = time.perf_counter()
        for level in spec.levels:
            for row in out[level.name]:
                compress(encode_row(row, level.dtype)[0])
        t4 = time.perf_counter()
    finally:
        torch.set_num_threads(before)
    count = len(images)
    # Host stages run on all threads of a worker; the timing above used one.
    host = max(threads, 1) * count
    return count, {
        "read": (t1 - t0) / count,
        "decode": (t2 - t1) / host,
        "forward": seconds["forward"] / count,
        "upsample": seconds["upsample"] / count,
        "encode": (t4 - t3) / host,
    }


def config_from_run(url: str, options: Mapping[str, Any] | None = None) -> ExtractConfig:
    """The config of an earlier run: a run.json, or a store, whose latest run is taken."""
    if not url.endswith(".json"):
        folder = Folder(url, options)
        runs = folder.folders("runs")
        if not runs:
            raise ConfigError(f"{folder.shown} has no runs; give a store or a run.json")
        data = folder.read(f"runs/{runs[-1]}/run.json")
    else:
        base, _, name = url.rpartition("/")
        data = Folder(base or ".", options).read(name)
    saved = json.loads(data)["config"]
    unknown = set(saved) - {f.name for f in fields(ExtractConfig)}
    if unknown:
        raise ConfigError(f"{redact(url)} has settings that this version does not know: {', '.join(sorted(unknown))}")
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    if "***" in str(settings.get("storage_options")):
        logger.warning("credentials were not saved in %s; give --storage-options again", redact(url))
        settings["storage_options"] = None
    return replace(ExtractConfig(), **settings)
