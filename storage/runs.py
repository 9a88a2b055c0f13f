"""A training run's folder at any URL: its settings, and numbered checkpoints of which the last and the best are kept.

    run.json                        what was asked for; written once
    steps/00000200/                 model.safetensors, resume.safetensors, resume.json, config.json
    checkpoints.json                which step is the last, which the best
    metrics.jsonl                   what was measured, time included: a JSON object a line with its step

config.json is written last: a step's folder without it doesn't exist. checkpoints.json is replaced as a whole once a step is
there, and only then are older steps removed; a run that dies at any point leaves a complete checkpoint, if it had one.
Nothing but metrics.jsonl depends on when, where, or in how many parts a run was done.
Arrays are NumPy's: this module knows no torch, and nothing is pickled.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np
import safetensors
import safetensors.numpy

from storage.documents import DamagedObject, Document, JsonObject, JsonValue, as_object, decode, parse_json
from storage.paths import Folder, StorageOptions

logger = logging.getLogger(__name__)

POINTERS = "checkpoints.json"
_PARTS = ("config.json", "resume.json", "resume.safetensors", "model.safetensors")
"""In the order in which they are removed: without config.json, the step is gone."""


_UNREADABLE = (safetensors.SafetensorError, ValueError, TypeError, LookupError, AttributeError, RecursionError)
"""What parsers raise where an object isn't what was written."""

T = TypeVar("T")


class CheckpointError(DamagedObject):
    """A checkpoint, or what points to it, is damaged or incomplete."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of a run after `step` steps."""

    step: int
    model: Mapping[str, np.ndarray]
    resume: Mapping[str, np.ndarray]
    "the optimiser's arrays, and those of what is trained beside the model"
    progress: JsonObject
    "what else is needed to continue"
    config: JsonObject
    "what the model is, for those who use it"

    @property
    def name(self) -> str:
        return step_name(self.step)


@dataclass(frozen=True, kw_only=True)
class Pointers:
    """Which checkpoints there are, by name below the run's folder."""

    last: str
    best: str | None = None
    best_loss: float | None = None

    @property
    def last_step(self) -> int:
        """How far the run is."""
        return _number(self.last)


def step_name(step: int) -> str:
    """The folder of a step, below the run's."""
    return f"steps/{step:08d}"


def write_checkpoint(folder: Folder, checkpoint: Checkpoint, loss: float | None = None) -> Pointers:
    """Save a checkpoint, make it the last (and, with the lowest `loss` so far, the best), and remove what neither is.

    A tie goes to the later one. Without a loss, the best stays what it was.
    """
    pointers = read_pointers(folder)
    _write_parts(folder, checkpoint)
    best, best_loss = (pointers.best, pointers.best_loss) if pointers else (None, None)
    if loss is not None and (best_loss is None or loss <= best_loss):
        best, best_loss = checkpoint.name, loss
    pointers = Pointers(last=checkpoint.name, best=best, best_loss=best_loss)
    folder.write(POINTERS, _json(asdict(pointers)))
    _prune(folder, pointers)
    return pointers


def _write_parts(folder: Folder, checkpoint: Checkpoint) -> None:
    name = checkpoint.name
    # A step that is written anew (its first writer died before the pointer moved) must not look whole in between.
    folder.remove([f"{name}/config.json"])
    folder.write(f"{name}/model.safetensors", _tensors(checkpoint.model))
    folder.write(f"{name}/resume.safetensors", _tensors(checkpoint.resume))
    folder.write(f"{name}/resume.json", _json({"step": checkpoint.step, **checkpoint.progress}))
    folder.write(f"{name}/config.json", _json(checkpoint.config))


def tidy(folder: Folder) -> None:
    """Remove what a killed writer left: files half written, steps that it had begun to remove. For when nobody writes."""
    folder.remove_partial()
    if pointers := read_pointers(folder):
        _prune(folder, pointers)


def _prune(folder: Folder, pointers: Pointers) -> None:
    kept = {pointers.last, pointers.best}
    # By a listing, not by what this run wrote: steps of a run that died before its pointers moved go, too.
    for number in folder.folders("steps"):
        name = f"steps/{number}"
        if name not in kept:
            folder.remove([f"{name}/{part}" for part in _PARTS])
            folder.remove_empty(name)


def read_pointers(folder: Folder) -> Pointers | None:
    """Which checkpoints there are; None before the first. Raises `CheckpointError` where the file is damaged."""
    try:
        data = folder.read(POINTERS)
    except FileNotFoundError:
        return None
    try:
        pointers = decode(Pointers, parse_json(data))
        for name in (pointers.last, pointers.best):
            if name is not None and not re.fullmatch(r"steps/\d{8,}", name):
                raise ValueError(f"{name!r} is no step")
        return pointers
    except (ValueError, RecursionError) as error:
        steps = ", ".join(folder.folders("steps")) or "none"
        raise CheckpointError(
            f"{folder.displayed}/{POINTERS} is damaged ({error}); steps that are there: {steps}. Restore it as "
            '{"last": "steps/...", "best": null, "best_loss": null}, or use a new --out'
        ) from None


@dataclass(frozen=True, kw_only=True)
class NamedCheckpoint:
    """What a URL stands for where a checkpoint is asked for."""

    url: str
    step: str = ""
    "in words, which of its run's steps it is; empty where the URL isn't a run's folder, and so is the checkpoint itself"


def named_checkpoint(url: str, options: StorageOptions | None = None) -> NamedCheckpoint:
    """A training run's best checkpoint, or its last one before there is a best; of anything else, `url` itself.

    A run may still be under way: the same URL is another checkpoint later. Raises `CheckpointError` as `read_pointers`."""
    pointers = read_pointers(Folder(url, options))
    if pointers is None:
        return NamedCheckpoint(url=url)
    name = pointers.best or pointers.last
    which = (
        f"the best by its held-out loss of a run that is at step {pointers.last_step}"
        if pointers.best
        else "its run's last; none is the best yet"
    )
    return NamedCheckpoint(url=f"{url.rstrip('/')}/{name}", step=f"step {_number(name)}, {which}")


def _number(step: str) -> int:
    """Of a step's folder."""
    return int(step.rpartition("/")[2])


def read_checkpoint(folder: Folder, name: str) -> Checkpoint:
    """The checkpoint `name` (`steps/...`). Raises `CheckpointError` where a part is missing or damaged."""
    progress, config = (_read_part(folder, name, part, parse_json) for part in ("resume.json", "config.json"))
    load = safetensors.numpy.load
    model, resume = (_read_part(folder, name, part, load) for part in ("model.safetensors", "resume.safetensors"))
    step = progress.pop("step", None)
    # A folder that was copied or renamed by hand would continue at the wrong learning rate and data.
    if type(step) is not int or step_name(step) != name:
        raise _damaged(folder, name, "resume.json", f"its step is {step!r}")
    return Checkpoint(step=step, model=model, resume=resume, progress=progress, config=config)


def _read_part(folder: Folder, name: str, part: str, parse: Callable[[bytes], T]) -> T:
    try:
        return parse(folder.read(f"{name}/{part}"))
    except _UNREADABLE as error:
        raise _damaged(folder, name, part, f"{type(error).__name__}: {error}") from None
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder.displayed}/{name} has no {part}: it is incomplete. Point {POINTERS} at another step, or use a new --out"
        ) from None


def _damaged(folder: Folder, name: str, part: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{folder.displayed}/{name} is damaged: {part}: {what}. Point {POINTERS} at another step, or use a new --out"
    )


def read_last(folder: Folder) -> Checkpoint | None:
    """The last checkpoint; None where there is none yet. Raises `CheckpointError`."""
    pointers = read_pointers(folder)
    return read_checkpoint(folder, pointers.last) if pointers else None


def write_run(folder: Folder, run: JsonObject) -> None:
    """Save what was asked for."""
    folder.write("run.json", _json(run))


def read_run(folder: Folder) -> dict[str, JsonValue] | None:
    """What the run in this folder was asked for; None where there is none. Raises `CheckpointError`."""
    document = Document(folder, "run.json", "restore it, or use a new --out", CheckpointError)
    try:
        run = document.json()
    except FileNotFoundError:
        return None
    with document.parsing():
        as_object(run.get("identity", {}), "identity")
    return run


def read_metrics(folder: Folder) -> list[dict[str, JsonValue]]:
    """The lines of metrics.jsonl; none where there is no such file. Raises `CheckpointError`."""
    document = Document(folder, "metrics.jsonl", "remove its damaged lines; nothing but curves rests on them", CheckpointError)
    try:
        data = document.bytes()
    except FileNotFoundError:
        return []
    with document.parsing():
        lines = [parse_json(line) for line in data.splitlines()]
        for line in lines:
            decode(int, line["step"], "step")
    return lines


def write_metrics(folder: Folder, lines: Sequence[JsonObject]) -> None:
    """Replace metrics.jsonl."""
    folder.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())


def _tensors(arrays: Mapping[str, np.ndarray]) -> bytes:
    return safetensors.numpy.save({name: np.asarray(array, order="C") for name, array in arrays.items()})


def _json(value: JsonObject) -> bytes:
    return json.dumps(value, indent=1).encode()
