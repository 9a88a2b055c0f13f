"""A training run's folder at any URL: its settings, and numbered checkpoints of which the last and the best are kept.

    run.json                        what was asked for; written once
    steps/00000200/                 model.safetensors, resume.safetensors, resume.json, config.json
    checkpoints.json                which step is the last, which the best
    metrics.jsonl                   what was measured, a JSON object a line with its step

config.json is written last: a step's folder without it doesn't exist. checkpoints.json is replaced as a whole once a step is
there, and only then are older steps removed; a run that dies at any point leaves a complete checkpoint, if it had one.
Arrays are NumPy's: this module knows no torch, and nothing is pickled.
"""

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from storage.paths import Folder, StorageError, filesystem

logger = logging.getLogger(__name__)

POINTERS = "checkpoints.json"
_PARTS = ("config.json", "resume.json", "resume.safetensors", "model.safetensors")
"""In the order in which they are removed: without config.json, the step is gone."""


class CheckpointError(StorageError):
    """A checkpoint, or what points to it, is damaged or incomplete."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of a run after `step` steps."""

    step: int
    model: Mapping[str, np.ndarray]
    resume: Mapping[str, np.ndarray]
    "the optimiser's arrays"
    progress: Mapping[str, Any]
    "what else is needed to continue, as JSON values"
    config: Mapping[str, Any]
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


def _prune(folder: Folder, pointers: Pointers) -> None:
    kept = {pointers.last, pointers.best}
    for number in folder.folders("steps"):
        name = f"steps/{number}"
        if name not in kept:
            folder.remove([f"{name}/{part}" for part in _PARTS])
            _remove_empty(folder, name)


def _remove_empty(folder: Folder, name: str) -> None:
    """Local disks keep empty folders; object storage has none."""
    fs, root = filesystem(folder.url, folder.options)
    with contextlib.suppress(OSError):
        fs.rmdir(f"{root.rstrip('/')}/{name}")


def read_pointers(folder: Folder) -> Pointers | None:
    """Which checkpoints there are; None before the first. Raises `CheckpointError` where the file is damaged."""
    try:
        return Pointers(**json.loads(folder.read(POINTERS)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        steps = ", ".join(folder.folders("steps")) or "none"
        raise CheckpointError(
            f"{folder.shown}/{POINTERS} is damaged ({error}); steps that are there: {steps}. Restore it as "
            '{"last": "steps/...", "best": null, "best_loss": null}, or use a new --out'
        ) from None


def read_checkpoint(folder: Folder, name: str) -> Checkpoint:
    """The checkpoint `name` (`steps/...`). Raises `CheckpointError` where a part is missing or damaged."""
    shown = f"{folder.shown}/{name}"
    parts = {}
    for part in _PARTS:
        try:
            parts[part] = folder.read(f"{name}/{part}")
        except FileNotFoundError:
            raise CheckpointError(
                f"{shown} has no {part}: it is incomplete. Point {POINTERS} at another step, or use a new --out"
            ) from None
    try:
        progress = json.loads(parts["resume.json"])
        return Checkpoint(
            step=int(progress.pop("step")),
            model=safetensors.numpy.load(parts["model.safetensors"]),
            resume=safetensors.numpy.load(parts["resume.safetensors"]),
            progress=progress,
            config=json.loads(parts["config.json"]),
        )
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{shown} is damaged ({type(error).__name__}: {error}). Point {POINTERS} at another step, or use a new --out"
        ) from None


def read_last(folder: Folder) -> Checkpoint | None:
    """The last checkpoint; None where there is none yet. Raises `CheckpointError`."""
    pointers = read_pointers(folder)
    return read_checkpoint(folder, pointers.last) if pointers else None


def write_run(folder: Folder, run: Mapping[str, Any]) -> None:
    """Save what was asked for."""
    folder.write("run.json", _json(run))


def read_run(folder: Folder) -> dict[str, Any] | None:
    """What the run in this folder was asked for; None where there is none. Raises `CheckpointError`."""
    try:
        run = json.loads(folder.read("run.json"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{folder.shown}/run.json is damaged ({error}); use a new --out") from None
    if not isinstance(run, dict):
        raise CheckpointError(f"{folder.shown}/run.json is no JSON object; use a new --out")
    return run


def read_metrics(folder: Folder) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; none where there is no such file."""
    try:
        return [json.loads(line) for line in folder.read("metrics.jsonl").splitlines()]
    except FileNotFoundError:
        return []


def write_metrics(folder: Folder, lines: Sequence[Mapping[str, Any]]) -> None:
    """Replace metrics.jsonl."""
    folder.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())


def _tensors(arrays: Mapping[str, np.ndarray]) -> bytes:
    return safetensors.numpy.save({name: np.asarray(array, order="C") for name, array in arrays.items()})


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode()
