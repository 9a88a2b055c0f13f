"""Settings of a training run, and what it is when it is ready.

What is wrong with the settings is wrong before anything is computed. What is trained on what is said by subclasses of
`TrainConfig`, each beside its loss (lift.py, vit_up.py, readout.py).
"""

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from cluster.resources import WorkerRequest
from operators.objectives.schedule import learning_rate, stepped
from pipelines.config import (
    ConfigError,
    Counts,
    Free,
    GpuConfig,
    Held,
    Identity,
    JobConfig,
    absolute,
    command_of,
    require_above,
    require_at_least,
    require_out,
    used_with,
)
from pipelines.executors import Executor
from pipelines.features.config import BackboneConfig
from pipelines.features.join import Join
from pipelines.provenance import begin_run, run_folder
from pipelines.training.data import ExampleSource, Loaded, TrainOrder
from storage.documents import JsonObject, JsonValue
from storage.paths import Folder
from storage.runs import read_pointers

logger = logging.getLogger(__name__)

LR_SCALE = "lr_scale"
"""What an optimiser's group of parameters calls that by which the learning rate is multiplied for it."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(JobConfig):
    """Settings that every training run has; what is trained, and on what, is said by its subclasses."""

    word: ClassVar[str]
    "what `jobs/train.py` calls these settings as they are without flags"

    out: Free[str] = ""
    """The folder to write or continue: a path or fsspec URL."""

    net_precision: Counts[Literal["bf16", "fp32"]] = "fp32"
    """Autocast of the network's forward; its weights, the loss and the optimiser are always float32."""

    epochs: Free[int] = 5
    """Passes over the training images."""
    max_steps: Free[int | None] = None
    """Stop after so many optimiser steps in all, whatever the epochs say."""
    batch: Counts[int] = 256
    """Images per optimiser step, over all workers; an epoch's last batch is what is left."""
    micro_batch: Counts[int | None] = None
    """Images per forward, which BatchNorm's statistics are of; default: --batch. Workers share a batch's micro-batches."""
    lr: Counts[float] = 1e-3
    """Adam's learning rate."""
    weight_decay: Counts[float] = 0.0
    """AdamW's."""
    schedule: Counts[Literal["constant", "cosine", "steps"]] = "constant"
    """Of the learning rate; `cosine` falls to --final-lr at the last step, `steps` to a tenth after 8/9 of them, and again after
    26/27."""
    warmup_steps: Counts[int] = 0
    """cosine, steps: over so many steps the learning rate first rises linearly, from a hundredth or from a thousandth."""
    final_lr: Annotated[Counts[float], used_with(schedule="cosine")] = 1e-6
    """cosine: the learning rate at the end."""
    clip: Counts[float | None] = None
    """Largest norm of the gradient; a larger one is scaled down to it."""
    seed: Counts[int] = 0
    """Of the network's weights, the order of the images, and what is drawn for each."""

    max_failed_fraction: Free[float] = 0.01
    """With a larger part of the images left out as unreadable, or of the held-out ones, the run ends with an error."""

    overlap: Free[bool] = False
    """Train although held-out images are among those to train on, byte for byte; the results say how many. Without it, such a
    run is refused."""

    log_every: Free[int] = 10
    """Steps between lines of metrics."""
    checkpoint_every: Free[int] = 200
    """Steps between checkpoints."""
    validate_every: Free[int] = 1000
    """Steps between validations; a multiple of --checkpoint-every. There is one at the end, too."""

    cluster: Held[GpuConfig] = GpuConfig()
    workers: Free[int] = 1
    """Training processes, one per GPU; at most the number of micro-batches in a batch."""
    worker_cpus: Free[int] = 1
    """CPUs and threads of one training process on Ray."""
    loaders: Free[int | None] = None
    """Micro-batches that are loaded at once, for each training process: actors anywhere in the cluster, or threads inline; by
    default as many as there are CPUs."""
    max_failures: Free[int] = 3
    """Lost workers or nodes after which the run is given up; each time, it goes on from its last checkpoint."""

    plan: Free[bool] = False
    """Print what would be done, and what is done already, then stop: nothing is computed or begun, and no cluster is asked."""

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = "epochs", "batch", "workers", "worker_cpus", "loaders", "log_every", "checkpoint_every", "max_steps"
        require_at_least(1, self, *counts, "micro_batch")
        require_at_least(0, self, "warmup_steps", "max_failures", "weight_decay", "final_lr", "seed")
        require_above(0, self, "lr", "clip")
        if self.warmup_steps and self.schedule == "constant":
            raise ConfigError(f"--warmup-steps {self.warmup_steps} needs --schedule cosine or steps")
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
        if self.cluster.executor == "inline" and self.workers > 1:
            raise ConfigError(f"--workers {self.workers} needs --executor ray; inline is one process")

    @property
    def places(self) -> tuple[str, ...]:
        return (self.out,)

    @property
    def forward_images(self) -> int:
        """Images per forward."""
        return self.micro_batch or self.batch

    @property
    def worker_request(self) -> WorkerRequest:
        """The processes that train together on Ray."""
        return WorkerRequest(
            device=self.cluster.device,
            actors=self.workers,
            cpus=self.worker_cpus,
            accelerator=self.cluster.accelerator,
            all_at_once=True,
            called="worker",
        )

    def begin_folder(self) -> Folder:
        """The folder of `out`. Raises `ConfigError` where there is none, or it is a feature store; and for settings that the
        run would make no use of."""
        self.require_used()
        require_out(self.out, "a path or URL for the training run")
        return run_folder(absolute(self.out), self.options, "training")

    def order(self, n_rows: int) -> TrainOrder:
        """Which of the rows each step takes."""
        return TrainOrder(
            n_rows=n_rows,
            batch=self.batch,
            micro_batch=self.forward_images,
            epochs=self.epochs,
            seed=self.seed,
            max_steps=self.max_steps,
        )

    def learning_rate(self, step: int, steps: int) -> float:
        """Of a step, from 0, of so many."""
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "steps":
            return self.lr * stepped(step, steps=steps, warmup=self.warmup_steps)
        return learning_rate(step, steps=steps, warmup=self.warmup_steps, peak=self.lr, floor=self.final_lr)

    def clipping(self, step: int) -> float | None:  # noqa: ARG002
        """The largest norm of the gradient of a step, from 0; None: any."""
        return self.clip

    def optimiser(
        self,
        net: torch.nn.Module,  # noqa: ARG002
        trained: Mapping[str, torch.nn.Parameter],
    ) -> torch.optim.Optimizer:
        """One whose state is tensors, by parameter, of the `trained` ones by name, most of which are `net`'s. Groups of them may
        have a `LR_SCALE`."""
        return torch.optim.AdamW(trained.values(), lr=self.lr, weight_decay=self.weight_decay)

    def notes(self, order: TrainOrder) -> Iterator[str]:
        """See `TrainSetup.notes`."""
        steps, images = order.steps, order.n_rows
        if self.schedule != "constant" and self.warmup_steps >= steps:
            highest = max(self.learning_rate(step, steps) for step in (0, steps - 1))
            yield (
                f"--warmup-steps {self.warmup_steps:,} of a run of {steps:,} steps: the learning rate rises to {highest:.3g} at "
                f"most and never reaches --lr {self.lr:g}; give fewer --warmup-steps, or train longer."
            )
        if self.max_steps is not None and steps < self.max_steps:
            yield (
                f"--max-steps {self.max_steps:,} aren't reached: --epochs {self.epochs:,} of {images:,} images end after "
                f"{steps:,} steps; give more --epochs."
            )
        if self.batch > images:
            yield f"--batch {self.batch:,}: there are {images:,} images to train on, so that each step has only those."

    def said_once(self, order: TrainOrder) -> Iterator[str]:
        """What of the settings matters while the run goes on, not for what it gives."""
        if self.checkpoint_every > order.steps:
            yield (
                f"the only checkpoint is that after the last of {order.steps:,} steps (--checkpoint-every "
                f"{self.checkpoint_every:,}): a run that is stopped before begins anew"
            )
        if self.validate_every > order.steps:
            yield f"held-out images are judged at the start and the end only (--validate-every {self.validate_every:,})"

    def identity(self, found: JsonObject) -> dict[str, JsonValue]:
        """What makes a run's weights what they are, as JSON values: settings, and what was `found` of model and data."""
        settings = self.counted(Identity.COUNTS)
        settings["micro_batch"] = self.forward_images
        if self.schedule != "constant":  # the learning rate of every step depends on the last one's number
            settings |= {"epochs": self.epochs, "max_steps": self.max_steps}
        return {**settings, **json.loads(json.dumps(found))}

    def begin(
        self,
        folder: Folder,
        found: JsonObject,
        order: TrainOrder,
        joins: Sequence[Join] = (),
        *,
        saved: JsonObject | None = None,
        aside: Collection[str] = (),
    ) -> None:
        """Begin the run's folder, or hold it against what it was begun with: `found` is as for `identity`; `joins` are those of
        stores and images, `saved` the settings as run.json has them where that isn't `public`, `aside` as for `begin_run`. Raises
        `ConfigError`, also where more steps are done than are asked for: the network of fewer isn't there any more."""
        for note in (note for each in joins for note in each.notes()):
            logger.warning("%s", note)
        config = self.public() if saved is None else saved
        command = command_of(f"python jobs/train.py {self.word}", self.public(), type(self)().public())
        said: JsonObject = {"joins": [each.to_json() for each in joins], "command": command}
        begin_run(folder, self.identity(found), config, aside=aside, **said)
        pointers = read_pointers(folder)
        if pointers and pointers.last_step > order.steps:
            raise ConfigError(
                f"{folder.displayed} has gone {pointers.last_step:,} steps, and {order.steps:,} are asked for (--epochs, "
                "--max-steps); use a new --out for fewer"
            )

    def resolve(self) -> "Resolved":
        """Find what the settings name, before any cluster is asked for anything: most that can be wrong is wrong here."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class FeatureTraining(TrainConfig):
    """Settings of a training on the features of a frozen backbone."""

    features: Held[BackboneConfig] = BackboneConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features.precision == "fp16":
            raise ConfigError("--precision fp16: training takes bf16 or fp32")


class Resolved(Protocol):
    """Settings held against what they name."""

    def prepare(self, executor: Executor) -> "TrainSetup":
        """Read what is needed of the data, and begin or continue the folder."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What was found on the held-out images."""

    values: Mapping[str, float] = field(default_factory=dict)
    "metrics, `val_loss` among them; empty where no image could be scored"
    picture: bytes = b""
    "of the first ones, as PNG; empty where there are no values"
    images: int = 0
    "that the metrics are over"
    empty: int = 0
    "that could be read, and whose label holds nothing to be judged: void alone, no depth, no object"
    left_out: Mapping[int, str] = field(default_factory=dict)
    "those that couldn't be read: row and reason"

    @property
    def counts(self) -> dict[str, int]:
        """How many of them are what, as lines of metrics have it."""
        return {"val_images": self.images, "val_left_out": len(self.left_out), "val_empty": self.empty}


class Objective(Protocol):
    """What is trained, and how its loss is computed."""

    net: torch.nn.Module
    "its parameters that need gradients are trained, and its state dict is what a checkpoint holds"
    beside: torch.nn.Module
    "trained with it, and kept to continue with, but no part of what a checkpoint is for; empty for most"
    clipped: Tensor | int
    "images of the last micro-batch of whose features, as a model made them, float16 couldn't hold some values"

    def accumulate(self, loaded: Loaded) -> tuple[Tensor, float]:
        """Add the gradient of a micro-batch's summed loss; gives that sum, and what it is to be divided by: the number of
        images, or of pixels. A step's loss is the sum of the sums over that of the divisors."""

    def measure(self, step: int) -> Validation:
        """Judge the held-out images."""


@dataclass(frozen=True, kw_only=True)
class TrainSetup:
    """A run that is ready: everything a training process needs."""

    config: TrainConfig
    folder: Folder
    description: Mapping[str, Any]
    "what a checkpoint's config.json says of the network and the features it was trained on"
    order: TrainOrder
    images: ExampleSource
    held_out_rows: tuple[int, ...]
    seen: int = 0
    "held-out images that are trained on, too"
    on_step: Callable[[int, list[int]], None] | None = None
    "called after each step with its number from 1 and the rows that this process read for it: for tests"

    def steps_done(self) -> int:
        """By earlier starts, up to their last checkpoint."""
        pointers = read_pointers(self.folder)
        return pointers.last_step if pointers else 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the settings has no effect on so many images and steps, or another than one may think; a sentence each."""
        of = len(self.held_out_rows)
        notes = list(self.config.notes(self.order))
        if self.seen:
            many = "is" if self.seen == 1 else "are"
            notes.append(
                f"{self.seen} of the {of} held-out images {many} among those to train on: scores on them say nothing of others."
            )
        return tuple(notes)

    def objective(self, device: torch.device) -> Objective:
        """What a training process computes."""
        raise NotImplementedError
