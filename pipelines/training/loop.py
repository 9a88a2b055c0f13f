"""Training on a frozen backbone's features: the loop, in one process or in each of those that train together.

The only state is the folder `out` (storage/runs.py): whoever starts reads its last checkpoint.

Gradients are summed over all micro-batches of all workers, and divided by what they are the sums of (images, or labelled
pixels): one all-reduce per step. torch's DDP averages over workers instead, which is another mean where they have unequal
numbers of images.
BatchNorm's batch statistics are those of a micro-batch; its running ones are those that worker 0 has seen.
"""

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from operators.timm_models import load_arrays, state_arrays
from pipelines.executors import Executor
from pipelines.training.config import LR_SCALE, TrainSetup, Validation
from pipelines.training.data import Loaded, load
from pipelines.training.watch import EventFile, HeldOutScores
from storage.documents import Document, JsonValue, decode, decode_known
from storage.errors import RayliftError
from storage.runs import Checkpoint, read_last, read_metrics, tidy, write_checkpoint, write_metrics
from storage.totals import KEEP_THEM

logger = logging.getLogger(__name__)


_BESIDE = "beside/"
"""Before the names of what is trained beside the network, where both are kept."""

_TOTALS = 5
"""Sums that processes exchange beside the gradients."""


class TrainFailed(RayliftError):
    """The run can't go on, and wouldn't if it were started again: diverged, or too many unreadable images."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a checkpoint says of the images so far."""

    images: int
    "trained on"
    n_failed: int
    "left out, each as often as it was due"
    failed: Mapping[str, str]
    "those images: row and reason"
    held_out: Mapping[str, str] = field(default_factory=dict)
    "held-out images that the last validation left out: row and reason; earlier versions don't say"
    clipped: int = 0
    "trained on with features that float16 couldn't hold, each as often as it was"
    seconds: float = 0.0
    "of training; earlier versions had it here"


# --- workers that train together --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Group:
    """The processes of a run; where they are several, torch.distributed's default group, which Ray Train sets up."""

    rank: int = 0
    world: int = 1

    def sum(self, values: Tensor) -> None:
        """Replace `values` by the sum over all processes."""
        if self.world > 1:
            torch.distributed.all_reduce(values)

    def gather(self, value: dict[int, str]) -> list[dict[int, str]]:
        """What each process gave, in all of them."""
        found = [value] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(found, value)
        return found


# --- the loop ---------------------------------------------------------------------------------------------------------


Watch: TypeAlias = Callable[[int, str], None]
"""Told after each step its number, and what there is to say of it."""


class Trainer:
    """The state of a run in one process: network, optimiser, and how far it is."""

    def __init__(self, setup: TrainSetup, group: Group, device: torch.device, watch: Watch | None = None):
        self._watch = watch
        self.setup, self.group, self.device, self.config = setup, group, device, setup.config
        self.objective = setup.objective(device)
        self.net, self.beside = self.objective.net, self.objective.beside
        self.trained = {**_trained(self.net), **{f"{_BESIDE}{name}": each for name, each in _trained(self.beside).items()}}
        self.optimiser = setup.config.optimiser(self.net, self.trained)
        self.step = self.images = 0
        self.seconds = 0.0
        "of training, over all starts, by the clock: waiting for images, validation and checkpoints count"
        self.failed: dict[int, str] = {}
        self.n_failed = 0
        "images left out, each as often as it was due"
        self.held_out: dict[int, str] = {}
        "held-out images that the last validation left out"
        self.n_clipped = 0
        "images trained on with features that float16 couldn't hold, each as often as it was"
        self.lines: list[dict[str, JsonValue]] = []
        self._resume()
        self._started = self._logged = self.images, self.seconds
        "when this process took over; at the last line of metrics"

    def _resume(self) -> None:
        checkpoint = read_last(self.setup.folder)
        if checkpoint is None:
            return
        self.step = checkpoint.step
        advice = "point checkpoints.json at another step, or use a new --out"
        with Document(self.setup.folder, checkpoint.name, advice).parsing():
            load_arrays(self.net, checkpoint.model)
            beside, moments = _parted(checkpoint.resume)
            load_arrays(self.beside, beside)
            _load_optimiser(self.trained, self.optimiser, moments)
            progress = decode_known(Progress, checkpoint.progress)
            self.images, self.n_failed, self.n_clipped = progress.images, progress.n_failed, progress.clipped
            self.failed = {int(row): reason for row, reason in progress.failed.items()}
            self.held_out = {int(row): reason for row, reason in progress.held_out.items()}
        lines = read_metrics(self.setup.folder)
        self.lines = [line for line in lines if decode(int, line["step"]) <= self.step and "stopped" not in line]
        # Time is among what was measured, since a checkpoint is the same bytes however long it took; once it was in there.
        measured = [decode(float, line["seconds"]) for line in self.lines if "seconds" in line]
        self.seconds = max([progress.seconds, *measured])
        logger.info("going on after step %d of %d", self.step, self.setup.order.steps)

    def run(self, executor: Executor) -> None:
        """Train to the end. Raises `TrainFailed`, in every process alike."""
        devices = [self.device] if self.device.type == "cuda" else []
        if self.group.rank == 0:
            tidy(self.setup.folder)
            if self.lines:  # without what an earlier start did after its last checkpoint
                write_metrics(self.setup.folder, self.lines)
        try:
            self._require_budget()
            with torch.random.fork_rng(devices=devices):
                self._train(executor)
        except TrainFailed as error:
            if self.group.rank == 0:
                self.lines.append({"step": self.step, "stopped": str(error)})
                write_metrics(self.setup.folder, self.lines)
            raise

    def _train(self, executor: Executor) -> None:
        order, group = self.setup.order, self.group
        if self.step >= order.steps:
            return
        events = EventFile(self.setup.folder, self.step) if group.rank == 0 else None
        items = order.micro_batches(self.step, group.rank, group.world)
        stream = load(self.setup.images, items, executor, self.config.loaders, group.world)
        try:
            if not self.step:
                self._validate(events)  # what the network does untrained
                self._require_budget()
            self._loop(stream, events)
        finally:
            stream.close()
            if events:
                events.close()

    def _loop(self, stream: Iterator[Loaded], events: EventFile | None) -> None:
        steps, before, started = self.setup.order.steps, self.seconds, time.perf_counter()
        upcoming = next(stream, None)
        while self.step < steps:
            rows: list[int] = []
            totals = torch.zeros(_TOTALS, device=self.device)
            while upcoming is not None and upcoming.item.step == self.step:
                totals += self._accumulate(upcoming)
                rows += upcoming.item.rows
                upcoming = next(stream, None)
            loss, images, failed, clipped = self._update(totals)
            self.seconds = before + time.perf_counter() - started
            self.step, self.images, self.n_failed = self.step + 1, self.images + images, self.n_failed + failed
            self._count_clipped(clipped, images)
            if not np.isfinite(loss):
                raise TrainFailed(f"the loss became {loss} at step {self.step}; lower --lr, or use --net-precision fp32")
            self._log(loss, events)
            if self._watch:
                self._watch(self.step, f"loss {loss:.4f}, {self._rate_since(self._started):.1f} images/s")
            if self.step % self.config.checkpoint_every == 0 or self.step == steps:
                self._checkpoint(events)
            if self.setup.on_step:
                self.setup.on_step(self.step, rows)

    def _accumulate(self, loaded: Loaded) -> Tensor:
        """Add a micro-batch's gradients; [sum of losses, what it is divided by, images, images left out, and with values
        that float16 couldn't hold]."""
        for row, reason in loaded.example.failed.items():
            if row not in self.failed:
                logger.warning("left out: row %d, %s", row, reason)
                self.failed[row] = reason
        example = loaded.example
        loss: Tensor | float = 0.0
        clipped: Tensor | int = example.clipped
        divisor = 0.0
        if len(loaded):
            # Dropout, where a network has it, depends on neither interruptions nor the number of processes.
            seed = np.random.SeedSequence([self.config.seed, loaded.item.step, loaded.item.part]).generate_state(1)
            self._seed(int(seed[0]))
            loss, divisor = self.objective.accumulate(loaded)
            clipped = clipped + self.objective.clipped
        return torch.stack([self._there(each) for each in (loss, divisor, len(loaded), len(example.failed), clipped)])

    def _seed(self, seed: int) -> None:
        """What torch.manual_seed does, which would describe the stack for each kind of device that isn't there: 1 ms."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed_all(seed)

    def _there(self, value: Tensor | float) -> Tensor:
        """A number on the device, which isn't waited for."""
        if isinstance(value, Tensor):
            return value.detach().float()
        return torch.full((), float(value), device=self.device)

    def _update(self, totals: Tensor) -> tuple[float, int, int, int]:
        """One optimiser step on the mean gradient over all processes; (mean loss, images, left out, clipped)."""
        parameters = list(self.trained.values())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        # One message for all of it; counts are exact in float32 up to 16 million.
        flat = torch.cat([totals, *(gradient.flatten() for gradient in gradients)])
        self.group.sum(flat)
        loss, divisor, *counts = flat[:_TOTALS].tolist()
        images, failed, clipped = map(int, counts)
        if divisor:
            parts = flat[_TOTALS:].div_(divisor).split([p.numel() for p in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.grad = part.view_as(parameter)
            if (most := self.config.clipping(self.step)) is not None:
                torch.nn.utils.clip_grad_norm_(parameters, most)
            rate = self.config.learning_rate(self.step, self.setup.order.steps)
            for group in self.optimiser.param_groups:
                group["lr"] = rate * group.get(LR_SCALE, 1.0)
            self.optimiser.step()
        self.optimiser.zero_grad()
        return (loss / divisor if divisor else 0.0), images, failed, clipped

    def _count_clipped(self, clipped: int, images: int) -> None:
        if clipped and not self.n_clipped and self.group.rank == 0:
            said = "%d of the %d images of step %d have features beyond float16's range, which are clamped; %s"
            logger.warning(said, clipped, images, self.step, KEEP_THEM)
        self.n_clipped += clipped

    # --- what is kept -------------------------------------------------------------------------------------------------

    def _log(self, loss: float, events: EventFile | None) -> None:
        """`images_per_s` is since the line before, of all processes; `run_images_per_s` since the run was started, or went on."""
        order = self.setup.order
        if events is None or not (self.step % self.config.log_every == 0 or self.step in (1, order.steps)):
            return
        rate, overall = self._rate_since(self._logged), self._rate_since(self._started)
        self._logged = self.images, self.seconds
        epoch = (self.step - 1) // order.steps_per_epoch + 1
        self._add({"loss": loss, "images_per_s": round(rate, 2), "run_images_per_s": round(overall, 2)}, events)
        self.lines[-1] |= {"epoch": epoch, "images": self.images, "failed": self.n_failed}
        self.lines[-1] |= {"clipped": self.n_clipped} if self.n_clipped else {}
        place = f"step {self.step} of {order.steps}, epoch {epoch}"
        logger.info("%s: loss %.4f, %.1f images/s, %.1f over the run", place, loss, rate, overall)

    def _rate_since(self, then: tuple[int, float]) -> float:
        return (self.images - then[0]) / max(self.seconds - then[1], 1e-9)

    def _add(self, values: Mapping[str, float], events: EventFile) -> None:
        self.lines.append({"step": self.step, **values})
        events.add(self.step, values)

    def _checkpoint(self, events: EventFile | None) -> None:
        """Validate where it's due and save all of it; the checkpoint last, so that what it rests on is there."""
        for failed in self.group.gather(self.failed):
            self.failed |= failed
        is_due = self.step % self.config.validate_every == 0 or self.step == self.setup.order.steps
        loss = self._validate(events) if is_due else None
        if events is not None:
            self.lines.append({"step": self.step, "seconds": round(self.seconds, 3)})
            write_metrics(self.setup.folder, self.lines)
            events.save()
            write_checkpoint(self.setup.folder, self._state(), loss)
        self._require_budget()

    def _require_budget(self) -> None:
        """Raises `TrainFailed` with too many images left out: of an epoch, or early when it's most of them; or of those held
        out."""
        due, part = self.images + self.n_failed, self.config.max_failed_fraction
        if self.n_failed > min(part * max(due, self.setup.order.n_rows), max(part, 0.5) * due):
            raise self._too_many(f"{self.n_failed} of {due} images", self.failed)
        of = len(self.setup.held_out_rows)
        if len(self.held_out) > part * of:
            raise self._too_many(f"{len(self.held_out)} of {of} held-out images", self.held_out)

    def _too_many(self, what: str, failed: Mapping[int, str]) -> TrainFailed:
        reasons = "\n".join(f"  row {row}, {reason}" for row, reason in itertools.islice(failed.items(), 5))
        part = self.config.max_failed_fraction
        return TrainFailed(f"{what} could not be read, more than --max-failed-fraction {part}:\n{reasons}")

    def _validate(self, events: EventFile | None) -> float | None:
        """The loss on the held-out images; None where there is none, and in all processes but worker 0, which alone validates.

        What it had to leave out, all of them know: an error in one would leave the others waiting.
        """
        validation = Validation()
        if events is not None:
            validation = self._measure()
            for row, reason in validation.left_out.items():
                if row not in self.held_out:
                    logger.warning("left out: held-out row %d, %s", row, reason)
            self._report(validation, events)
        self.held_out = dict(self.group.gather(dict(validation.left_out))[0])
        return validation.values.get("val_loss")

    def _measure(self) -> Validation:
        if not self.setup.held_out_rows:
            return Validation()
        both = torch.nn.ModuleList([self.net, self.beside]).eval()
        try:
            with torch.no_grad():
                return self.objective.measure(self.step)
        finally:
            both.train()

    def _report(self, validation: Validation, events: EventFile) -> None:
        if not self.setup.held_out_rows:
            return
        values = {**validation.values, **validation.counts, "val_seen": self.setup.seen}
        self._add(values, events)
        if validation.picture:
            self.setup.folder.write(f"pictures/step-{self.step:08d}.png", validation.picture)
        found = HeldOutScores(step=self.step, values=values)
        logger.info("step %d, held out: %s; %s", self.step, found, found.over)

    def _state(self) -> Checkpoint:
        held_out = {"held_out": {str(row): reason for row, reason in sorted(self.held_out.items())}} if self.held_out else {}
        return Checkpoint(
            step=self.step,
            model=state_arrays(self.net),
            resume={
                **{f"{_BESIDE}{name}": array for name, array in state_arrays(self.beside).items()},
                **_optimiser_arrays(self.trained, self.optimiser),
            },
            progress={
                "images": self.images,
                "n_failed": self.n_failed,
                "failed": {str(row): reason for row, reason in sorted(self.failed.items())},
                **held_out,
                **({"clipped": self.n_clipped} if self.n_clipped else {}),
            },
            config={**self.setup.description, "step": self.step, "images": self.images},
        )


def _trained(net: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that the optimiser changes, by name."""
    return {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}


def _parted(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The state of what is trained beside the network, by its own names, and the optimiser's arrays, whose names have a colon."""
    moments = {name: array for name, array in arrays.items() if ":" in name}
    return {name.removeprefix(_BESIDE): array for name, array in arrays.items() if name not in moments}, moments


def _optimiser_arrays(trained: Mapping[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    """Adam's moments and step counts, by parameter."""
    return {
        f"{name}:{key}": value.detach().cpu().numpy()
        for name, parameter in trained.items()
        for key, value in optimiser.state.get(parameter, {}).items()
    }


def _load_optimiser(
    trained: Mapping[str, torch.nn.Parameter], optimiser: torch.optim.Optimizer, arrays: Mapping[str, np.ndarray]
) -> None:
    """An optimiser numbers its parameters group by group."""
    number_of = {id(each): number for number, each in enumerate(p for group in optimiser.param_groups for p in group["params"])}
    state: dict[int, dict[str, Tensor]] = {}
    for name, array in arrays.items():
        parameter, _, key = name.rpartition(":")
        state.setdefault(number_of[id(trained[parameter])], {})[key] = torch.from_numpy(np.array(array))
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
