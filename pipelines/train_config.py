"""Settings of a training run, and a run that is ready: the model loaded, the input indexed, the folder begun or continued.

What is wrong with the settings is wrong here, before anything is computed. What is trained on what is said by subclasses of
`TrainConfig`, each beside its loss (pipelines/train_x2.py).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from operators.backbone import (
    Preprocessing,
    TimmBackbone,
    create_model,
    load_arrays,
    preprocessing,
    state_arrays,
    weights_digest,
)
from pipelines.config import ConfigError, parse_options
from pipelines.prepare import index_input, versions
from pipelines.training_data import ImageSource, TrainOrder
from pipelines.weights import WeightsChoice, load_model
from storage.checkpoints import read_pointers, read_run, write_run
from storage.paths import Folder, InputFile, expand_inputs, is_memory, public_options, redact
from storage.samples import SampleIndex
from storage.store import read_attributes
from storage.tars import MemberRules


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings that every training run has; what is trained, and on what, is said by its subclasses, one for each loop body.

    A subclass also has `facet`, `layers`, `norm` and `pos_embed`, which make the features that are learned.
    """

    method: str
    """The network."""
    data: tuple[str, ...] = ()
    """WebDataset tars (URLs; braces and globs allowed) or folders of tars or images; labels are not needed."""
    out: str = ""
    """The folder to write or continue: a path or fsspec URL. Extraction takes it, or one of its steps/<number>."""
    val_data: tuple[str, ...] = ()
    """Held-out images, named as --data."""
    val_rows: int = 64
    """Images to validate on: the first of --val-data, or without it the last of --data, which are then not trained on."""

    model: str = "vit_small_patch16_224.dino"
    """timm name of the frozen backbone, tag included."""
    weights: str = "pretrained"
    """`pretrained` (the hub, or its local cache), a file or folder at a path or URL, or `random[:SEED]`."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Autocast of the frozen backbone's forward."""
    net_precision: Literal["bf16", "fp32"] = "fp32"
    """Autocast of the network's forward; its weights, the loss and the optimiser are always float32."""

    epochs: int = 5
    """Passes over the training images."""
    max_steps: int | None = None
    """Stop after so many optimiser steps in all, whatever the epochs say."""
    batch: int = 256
    """Images per optimiser step, over all workers; an epoch's last batch is what is left."""
    micro_batch: int | None = None
    """Images per forward, which BatchNorm's statistics are of; default: --batch. Workers share a batch's micro-batches."""
    lr: float = 1e-3
    """Adam's learning rate, without weight decay."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Of the learning rate; `cosine` falls to --final-lr at the last step."""
    warmup_steps: int = 0
    """cosine: steps over which the learning rate first rises linearly from a hundredth."""
    final_lr: float = 1e-6
    """cosine: the learning rate at the end."""
    clip: float | None = None
    """Largest norm of the gradient; a larger one is scaled down to it."""
    seed: int = 0
    """Of the network's weights, the order of the images, and what is drawn for each."""

    image_member: str | None = None
    """Extension of the image inside a sample, where it isn't the first of jpg, jpeg, png, webp, bmp, tif."""
    limit: int | None = None
    """Only the first N samples of --data."""
    max_image_pixels: int = 89_478_485
    """Images with more pixels are left out instead of filling the memory; the default is Pillow's."""
    max_failed_fraction: float = 0.01
    """With a larger part of the images left out as unreadable, the run ends with an error."""

    log_every: int = 10
    """Steps between lines of metrics."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    validate_every: int = 1000
    """Steps between validations; a multiple of --checkpoint-every. There is one at the end, too."""

    storage_options: str | None = None
    """JSON for the filesystem, as for jobs/extract.py."""
    executor: Literal["auto", "ray", "inline"] = "auto"
    """`ray` is Ray Train; `inline` trains in this process, without Ray; `auto` is Ray, except for memory://."""
    ray_address: str | None = None
    """A Ray cluster; default: the job's own under `ray job submit`, else a new local one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes GPUs where the cluster has any."""
    workers: int = 1
    """Training processes, one per GPU; at most the number of micro-batches in a batch."""
    worker_cpus: int = 1
    """CPUs and threads of one training process on Ray."""
    loaders: int = 2
    """Micro-batches that are decoded at once, for each training process: tasks anywhere in the cluster, or threads inline."""
    max_failures: int = 3
    """Lost workers or nodes after which the run is given up; each time, it goes on from its last checkpoint."""

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "batch",
            "workers",
            "worker_cpus",
            "loaders",
            "log_every",
            "checkpoint_every",
            "val_rows",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        for name in ("limit", "max_steps", "micro_batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        for name in ("lr", "final_lr", "clip"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be above 0")
        for name in ("warmup_steps", "max_failures"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 0")
        if self.warmup_steps and self.schedule == "constant":
            raise ConfigError(f"--warmup-steps {self.warmup_steps} needs --schedule cosine")
        if not 0 <= self.max_failed_fraction <= 1:
            raise ConfigError(f"--max-failed-fraction {self.max_failed_fraction}: must lie between 0 and 1")
        if self.validate_every % self.checkpoint_every or self.validate_every < 1:
            raise ConfigError(
                f"--validate-every {self.validate_every} must be a multiple of --checkpoint-every {self.checkpoint_every}: "
                "the best checkpoint is one that was validated"
            )
        self._check_workers()

    def _check_workers(self) -> None:
        if self.forward_images > self.batch:
            raise ConfigError(f"--micro-batch {self.micro_batch} is larger than --batch {self.batch}")
        shares = -(-self.batch // self.forward_images)
        if self.workers > shares:
            raise ConfigError(
                f"--workers {self.workers}: a batch of {self.batch} has {shares} micro-batches of {self.forward_images} to "
                f"share; use --micro-batch {max(1, self.batch // self.workers)}, or fewer workers"
            )
        if self.executor == "inline" and self.workers > 1:
            raise ConfigError(f"--workers {self.workers} needs --executor ray; inline is one process")
        if self.executor == "ray" and any(is_memory(url) for url in (*self.data, *self.val_data, self.out)):
            raise ConfigError("memory:// can be seen by one process only; use --executor inline, or another URL")

    @property
    def options(self) -> dict[str, Any]:
        """`storage_options` parsed. Raises `ConfigError`."""
        return parse_options(self.storage_options)

    @property
    def forward_images(self) -> int:
        """Images per forward."""
        return self.micro_batch or self.batch

    @property
    def is_inline(self) -> bool:
        """Whether this process trains."""
        urls = (*self.data, *self.val_data, self.out)
        return self.executor == "inline" or (self.executor == "auto" and any(is_memory(url) for url in urls))

    @property
    def folder_url(self) -> str:
        """`out` so that other processes on this machine, with other working directories, find it."""
        return self.out if "://" in self.out else str(Path(self.out).expanduser().resolve())

    def public(self) -> dict[str, Any]:
        """All settings without credentials, for files and logs."""
        shown = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.storage_options:
            shown["storage_options"] = json.dumps(public_options(self.options))
        for name in ("data", "val_data"):
            shown[name] = [redact(url, self.options) for url in getattr(self, name)]
        for name in ("out", "weights"):
            shown[name] = redact(shown[name], self.options)
        return json.loads(json.dumps(shown))


_FREE = {
    "data", "out", "val_data", "weights", "features", "revision", "image_member", "limit", "epochs", "max_steps",
    "max_failed_fraction",
    "log_every", "checkpoint_every", "validate_every", "storage_options", "executor", "ray_address", "device", "workers",
    "worker_cpus", "loaders", "max_failures",
}  # fmt: skip
"""May change when a run is continued: how it is run and how far, or (data, weights) recorded by what is found there."""


def identity(config: TrainConfig, found: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a run's weights what they are, as JSON values: settings, and what was `found` of model and data."""
    settings = {name: value for name, value in config.public().items() if name not in _FREE}
    settings["micro_batch"] = config.forward_images
    if config.schedule != "constant":  # the learning rate of every step depends on the last one's number
        settings |= {"epochs": config.epochs, "max_steps": config.max_steps}
    return {**settings, **json.loads(json.dumps(found))}


def require_same(shown: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises `ConfigError` with what differs between a run and its continuation."""
    if differences := describe_difference("run", before, now):
        raise ConfigError(
            f"{shown} was begun with other settings:\n{differences}\nUse a new --out, or the settings above."
        )


def describe_difference(what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between `what` there was before and now, a line each; empty where nothing does."""
    return "\n".join(
        f"  {name:<16} {what} {before.get(name)!r}   now {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    )


# --- preparing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FrozenBackbone:
    """The backbone whose features are learned; `weights` of `described` is their digest."""

    arrays: Mapping[str, np.ndarray]
    described: Mapping[str, Any]
    "what a checkpoint says of it; see pipelines/checkpoints.py"
    pos_embed: Any
    patch: int
    expects: Preprocessing

    def build(self) -> TimmBackbone:
        size = (self.described["size"], self.described["size"])
        model = load_arrays(create_model(self.described["model"], size, None, None), self.arrays)
        return self.wrap(model)

    def wrap(self, model: torch.nn.Module) -> TimmBackbone:
        return TimmBackbone(model, facet=self.described["facet"], norm=self.described["norm"], pos_embed=self.pos_embed)


@dataclass(frozen=True, kw_only=True)
class TrainSetup:
    """A run that is ready: everything a training process needs."""

    config: TrainConfig
    folder: Folder
    backbone: FrozenBackbone
    upsampler: Mapping[str, Any]
    "the network's settings"
    order: TrainOrder
    images: ImageSource
    held_out: ImageSource
    held_out_rows: tuple[int, ...]
    on_step: Callable[[int, list[int]], None] | None = None
    "called after each step with its number from 1 and the rows that this process read for it: for tests"


@dataclass(frozen=True, kw_only=True)
class ResolvedTraining:
    """Settings held against the model and the input's files, before any cluster is asked for anything."""

    config: TrainConfig
    folder: Folder
    backbone: FrozenBackbone
    upsampler: Mapping[str, Any]
    files: tuple[InputFile, ...]
    held_out_files: tuple[InputFile, ...]


def resolve_training(config: TrainConfig) -> ResolvedTraining:
    """Find the input's files and load the model: most that can be wrong with the settings is wrong here.

    Raises `ConfigError`, `InputError`, `BackboneError`, `UpsamplerError`, `WeightsUnavailable`.
    """
    if not config.out:
        raise ConfigError("no output: give --out a path or URL for the training run")
    folder = Folder(config.folder_url, config.options)
    if read_attributes(folder) is not None:
        raise ConfigError(f"{folder.shown} is a feature store; give --out a folder of its own")
    files = expand_inputs(config.data, config.options)
    held_out = expand_inputs(config.val_data, config.options) if config.val_data else []
    backbone, upsampler = _load_backbone(config)
    return ResolvedTraining(
        config=config,
        folder=folder,
        backbone=backbone,
        upsampler=upsampler,
        files=tuple(files),
        held_out_files=tuple(held_out),
    )


def prepare_training(resolved: ResolvedTraining, executor: Any) -> TrainSetup:
    """Index the input, and begin or continue the folder; `executor` scans tars (pipelines/executors.py).

    Raises `InputError`, `CheckpointError`, and `ConfigError` where a run was begun with other settings.
    """
    config, folder = resolved.config, resolved.folder
    images, index = _image_source(resolved, folder, resolved.files, config.limit, executor)
    held_out, rows = images, range(index.n_rows - config.val_rows, index.n_rows)
    n_rows = rows.start
    if resolved.held_out_files:
        below = Folder(f"{folder.url}/validation", config.options)
        held_out, found = _image_source(resolved, below, resolved.held_out_files, config.val_rows, executor)
        rows, n_rows = range(found.n_rows), index.n_rows
    if n_rows < 1:
        raise ConfigError(
            f"--val-rows {config.val_rows} leaves none of the {index.n_rows} images of --data to train on; use fewer, or "
            "give --val-data"
        )
    digests = {"images": images.digest, "held_out": held_out.digest}
    _begin(folder, config, identity(config, {"backbone": resolved.backbone.described, **digests}))
    order = TrainOrder(
        n_rows=n_rows,
        batch=config.batch,
        micro_batch=config.forward_images,
        epochs=config.epochs,
        seed=config.seed,
        max_steps=config.max_steps,
    )
    return TrainSetup(
        config=config,
        folder=folder,
        backbone=resolved.backbone,
        upsampler=resolved.upsampler,
        order=order,
        images=images,
        held_out=held_out,
        held_out_rows=tuple(rows),
    )


def _load_backbone(config: TrainConfig) -> tuple[FrozenBackbone, dict[str, Any]]:
    """The backbone, and the settings of the network for it."""
    expects = preprocessing(config.model)
    size = (config.backbone_size, config.backbone_size)
    model = load_model(config.model, size, WeightsChoice.parse(config.weights), config.revision, config.options)
    # Before the backbone touches it: position embeddings are replaced for each grid.
    arrays = {key: value.copy() for key, value in state_arrays(model).items()}
    backbone = TimmBackbone(model, facet=config.facet, norm=config.norm, pos_embed=config.pos_embed)
    described = {
        "model": config.model,
        "weights": weights_digest(arrays),
        "layers": list(backbone.resolve_layers(config.layers)),
        "facet": config.facet,
        "norm": backbone.norm,
        "size": config.backbone_size,
        "pos_embed": backbone.pos_embed,
    }
    frozen = FrozenBackbone(
        arrays=arrays, described=described, pos_embed=config.pos_embed, patch=backbone.patch, expects=expects
    )
    return frozen, config.network(backbone)


def _image_source(
    resolved: ResolvedTraining, folder: Folder, files: Sequence[InputFile], limit: int | None, executor: Any
) -> tuple[ImageSource, SampleIndex]:
    config = resolved.config
    rules, in_use = MemberRules(image=config.image_member), read_run(resolved.folder) is not None
    index = index_input(folder, files, rules, limit, executor, config.options, in_use=in_use)
    plain = ImageSource(
        folder=folder,
        digest=index.digest,
        urls=tuple(file.url for file in files[: len(index.sources)]),
        options=config.options,
        max_image_pixels=config.max_image_pixels,
        seed=config.seed,
    )
    return config.source(resolved, plain), index


def _begin(folder: Folder, config: TrainConfig, made_of: Mapping[str, Any]) -> None:
    """Write run.json, or hold it against the settings of its continuation."""
    before = read_run(folder)
    if before is not None:
        require_same(folder.shown, before.get("identity", {}), made_of)
        return
    if read_pointers(folder) is not None:
        raise ConfigError(f"{folder.shown} has checkpoints but no run.json; restore it, or use a new --out")
    write_run(folder, {"identity": made_of, "config": config.public(), "versions": versions()})
