"""What a chaos run runs, and what must come out of it: an extraction or a training, as programs that a user would start.

Each says how far it is while it runs, and, once it has ended, what was lost, doubled or changed against an undisturbed one.
"""

import hashlib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cluster.nodes import ROOT
from storage.paths import Folder
from storage.runs import read_last, read_metrics
from storage.store import FeatureStore, NotAStore

MODEL = ("--model", "test_vit.r160_in1k", "--weights", "random", "--precision", "fp32", "--device", "cpu")


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a finished job left, beside what it should have."""

    expected: int
    "rows of an extraction, steps of a training"
    found: int
    lost: int
    doubled: int
    compared: int
    "objects of a store; arrays and losses of a training"
    differ: tuple[str, ...]
    "those that aren't what the undisturbed job left, or that only one of them has"


class Job(Protocol):
    """A program that is started again until it has finished."""

    unit: str

    def command(self, out: str, address: str) -> list[str]:
        """The command line; the same continues."""

    def progress(self, out: str) -> int:
        """Something that grows while the job gets on."""

    def keep(self, out: str) -> None:
        """Make what is in `out` the reference."""

    def check(self, out: str) -> Found:
        """Hold `out` against the reference."""


def job_command(name: str, data: str, out: str, address: str, *flags: str) -> list[str]:
    """What a person would type to have a job done on a cluster, by timm's test_vit with random weights."""
    place = ["--data", data, "--out", out, "--executor", "ray", "--ray-address", address]
    return [sys.executable, str(ROOT / "jobs" / name.split()[0]), *name.split()[1:], *place, *MODEL, *flags]


class ExtractJob:
    """An extraction of `rows` photographs by timm's test_vit, `block_rows` a task, on `actors` workers."""

    unit = "rows"

    def __init__(self, data: str, rows: int, block_rows: int, size: int, actors: int):
        self._data, self._rows = data, rows
        # Without their number, a driver that starts while nodes are missing would do without those for good, or refuse.
        self._flags = ["--actors", str(actors), "--levels", "x1", "x2", "pooled"]
        self._flags += ["--block-rows", str(block_rows), "--size", str(size)]
        self._reference: dict[str, str] = {}

    def command(self, out: str, address: str) -> list[str]:
        return job_command("extract.py", self._data, out, address, *self._flags)

    def progress(self, out: str) -> int:
        try:
            return len(FeatureStore.open(out).ledger.done())
        except NotAStore:
            return 0

    def keep(self, out: str) -> None:
        self._reference = store_digests(Folder(out))

    def check(self, out: str) -> Found:
        """Every row once in the merged ledger, as `ok`; every object the bytes of the reference's."""
        digests = store_digests(Folder(out))
        try:
            ledger = FeatureStore.open(out).ledger.table(["row", "status"]).to_pylist()
        except FileNotFoundError:
            ledger = []
        rows = [record["row"] for record in ledger]
        good = {record["row"] for record in ledger if record["status"] == "ok"} & set(range(self._rows))
        return Found(
            expected=self._rows,
            found=len(rows),
            lost=self._rows - len(good),
            doubled=len(rows) - len(set(rows)),
            compared=len(self._reference),
            differ=_differing(digests, self._reference),
        )


def store_digests(folder: Folder, prefix: str = "") -> dict[str, str]:
    """sha256 of each object of a store but those below runs/, which say when and where a run was."""
    here = prefix.rstrip("/")
    names = [f"{prefix}{name}" for name in folder.sizes(here)]
    digests = {name: hashlib.sha256(folder.read(name)).hexdigest() for name in names}
    for name in folder.folders(here):
        if f"{prefix}{name}" not in ("runs", ".partial"):
            digests |= store_digests(folder, f"{prefix}{name}/")
    return digests


class TrainJob:
    """A training of LiFT's network for `steps` steps, by two workers that share its batches."""

    unit = "steps"

    def __init__(self, data: str, steps: int, checkpoint_every: int):
        self._data, self._steps = data, steps
        self._flags = ["--workers", "2", "--batch", "8", "--micro-batch", "4", "--size", "64", "--val-rows", "4"]
        self._flags += ["--epochs", "10000", "--max-steps", str(steps), "--log-every", "5"]
        self._flags += ["--checkpoint-every", str(checkpoint_every), "--validate-every", str(5 * checkpoint_every)]
        self._reference: dict[str, object] = {}

    def command(self, out: str, address: str) -> list[str]:
        return job_command("train.py lift", self._data, out, address, *self._flags)

    def progress(self, out: str) -> int:
        last = read_last(Folder(out))
        return last.step if last else 0

    def keep(self, out: str) -> None:
        self._reference = _weights_and_losses(Folder(out))

    def check(self, out: str) -> Found:
        """At the last step, every logged step once, with the reference's losses, weights and state of the optimiser."""
        folder = Folder(out)
        last, steps = read_last(folder), [line["step"] for line in read_metrics(folder) if "loss" in line]
        found = last.step if last else 0
        return Found(
            expected=self._steps,
            found=found,
            lost=max(0, self._steps - found),
            doubled=len(steps) - len(set(steps)),
            compared=len(self._reference),
            differ=_differing(_weights_and_losses(folder), self._reference),
        )


def _weights_and_losses(folder: Folder) -> dict[str, object]:
    """Bytes of each array of the last checkpoint, and each loss; one that isn't finite is NaN, which equals nothing."""
    last = read_last(folder)
    arrays: Mapping[str, np.ndarray] = {}
    if last:
        arrays = {**last.model, **{f"optimiser {name}": array for name, array in last.resume.items()}}
    losses = {
        f"{name} at step {line['step']}": loss if math.isfinite(loss) else math.nan
        for line in read_metrics(folder)
        for name in ("loss", "val_loss")
        if isinstance(loss := line.get(name), int | float)
    }
    return {**{name: array.tobytes() for name, array in arrays.items()}, **losses}


def _differing(found: Mapping[str, object], reference: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(sorted(name for name in {*found, *reference} if found.get(name) != reference.get(name)))
