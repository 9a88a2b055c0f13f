"""Doing a paper's cells, side by side on a cluster or in turn, and reading what they came to."""

import functools
import json
import logging
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from cluster.progress import Progress
from cluster.resources import WorkerPool
from operators.metrics.bootstrap import Interval
from pipelines.config import parse_options
from pipelines.costs import runtime
from pipelines.costs.runtime import RuntimeConfig
from pipelines.evaluation import cka, correspondence, detection, discovery, readouts, similarity, video
from pipelines.evaluation.cka import CkaConfig
from pipelines.evaluation.correspondence import CorrespondenceConfig
from pipelines.evaluation.detection import DetectionConfig
from pipelines.evaluation.discovery import DiscoveryConfig
from pipelines.evaluation.readouts import ProbeConfig
from pipelines.evaluation.run import Evaluating, Making, Settings, Task, evaluate
from pipelines.evaluation.similarity import SimilarityConfig
from pipelines.evaluation.video import VideoConfig
from pipelines.executors import Executor, WorkersLost
from pipelines.results import Table
from pipelines.tables.papers import Job, PaperCell, PaperPlan, PapersConfig, Wanted
from pipelines.training.config import TrainConfig
from pipelines.training.lift import X2Config
from pipelines.training.readout import ReadoutTraining
from pipelines.training.run import train
from pipelines.training.vit_up import ViTUpTraining
from storage.documents import JsonValue, parse_json
from storage.errors import RayliftError
from storage.paths import Folder, StorageOptions
from storage.redaction import redact
from storage.runs import read_pointers

logger = logging.getLogger(__name__)

DONE = "done.json"

RESULTS = "results.json"


def _evaluating(kind: type[Settings], task: Task[Settings, Evaluating, Making]) -> Callable[[str, Mapping[str, JsonValue]], None]:
    """Evaluates by settings of that kind."""

    def run(name: str, settings: Mapping[str, JsonValue]) -> None:
        evaluate(name, task, kind.of(**settings))

    return run


_EVALUATIONS: Mapping[Job, Callable[[str, Mapping[str, JsonValue]], None]] = {
    "correspondence": _evaluating(CorrespondenceConfig, correspondence),
    "video": _evaluating(VideoConfig, video),
    "discovery": _evaluating(DiscoveryConfig, discovery),
    "cka": _evaluating(CkaConfig, cka),
    "similarity": _evaluating(SimilarityConfig, similarity),
    "runtime": _evaluating(RuntimeConfig, runtime),
    "probe": _evaluating(ProbeConfig, readouts),
    "detection": _evaluating(DetectionConfig, detection),
}


_TRAININGS: Mapping[Job, type[TrainConfig]] = {"lift": X2Config, "vit-up": ViTUpTraining, "readout": ReadoutTraining}


@dataclass(frozen=True, kw_only=True)
class Order:
    """A cell, as it travels to who does it."""

    cell: PaperCell
    identity: str
    places: Mapping[str, str]
    "URLs of its folder, and of those of the cells that it takes from, by name"
    storage_options: str | None
    device: str

    @property
    def out(self) -> str:
        return self.places[self.cell.name]

    def settings(self) -> dict[str, JsonValue]:
        """Of the job, with the folders of the cells that it takes from."""
        folders = {f"{{{need}}}": self.places[need] for need in self.cell.needs}
        own = {"out": self.out, "executor": "inline", "device": self.device, "storage_options": self.storage_options}
        return {**{name: _replaced(value, folders) for name, value in self.cell.settings.items()}, **own}


def _replaced(value: JsonValue, folders: Mapping[str, str]) -> JsonValue:
    if isinstance(value, str):
        for name, url in folders.items():
            value = value.replace(name, url)
        return value
    return tuple(_replaced(each, folders) for each in value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a cell."""

    name: str
    error: str = ""
    "why there is nothing"


def run_papers_cells(config: PapersConfig, plan: PaperPlan, executor: Executor) -> dict[str, Outcome]:
    """All cells, by name; those that can't be done, and those that need them, say why."""
    found: dict[str, Outcome] = {}
    with Progress(total=len(plan.cells), done=0, unit="cells") as progress:
        for wave in plan.waves():
            for cell in wave:
                if why := _hindered(cell, found):
                    found[cell.name] = Outcome(name=cell.name, error=why)
                elif is_done(config.folder, plan, cell):
                    found[cell.name] = Outcome(name=cell.name)
            progress.add(len([cell for cell in wave if cell.name in found]))
            pending = [cell for cell in wave if cell.name not in found]
            for outcome in _done_now(config, plan, pending, executor) if pending else ():
                found[outcome.name] = outcome
                progress.add(0 if outcome.error else 1, 1 if outcome.error else 0)
                logger.info("%d of %d cells: %s: %s", len(found), len(plan.cells), outcome.name, outcome.error or "done")
    return found


def _hindered(cell: PaperCell, found: Mapping[str, Outcome]) -> str:
    """Why a cell can't be done; empty where it can."""
    if cell.missing:
        return cell.missing
    return next((f"it needs {need}: {found[need].error}" for need in cell.needs if found[need].error), "")


def is_done(folder: Folder, plan: PaperPlan, cell: PaperCell) -> bool:
    """Whether it is, by these settings, and those of what it takes from."""
    try:
        said = parse_json(folder.read(f"{plan.place(cell)}/{DONE}"))
        return bool(said["identity"] == plan.identity(cell))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def state_in_words(folder: Folder, plan: PaperPlan, cell: PaperCell) -> str:
    """How far a cell is."""
    if cell.missing:
        return f"missing: {cell.missing}"
    if is_done(folder, plan, cell):
        return "done"
    own = Folder(f"{folder.url.rstrip('/')}/{plan.place(cell)}", folder.options)
    pointers = read_pointers(own)
    begun = f"begun, {pointers.last_step:,} steps so far" if pointers else ""
    parts = len(own.sizes("parts"))
    return begun or (f"begun, {parts:,} pieces so far" if parts else "to do")


def _done_now(config: PapersConfig, plan: PaperPlan, pending: Sequence[PaperCell], executor: Executor) -> Iterator[Outcome]:
    """Outcomes as cells end."""

    def lost(order: Order, error: WorkersLost) -> Outcome:
        return Outcome(name=order.cell.name, error=f"given up after {config.max_failures} restarts (--max-failures): {error}")

    pool = executor.pool(config.worker_request())
    orders = [
        Order(
            cell=cell,
            identity=plan.identity(cell),
            places={name: f"{config.folder.url.rstrip('/')}/{plan.place(plan.cells[name])}" for name in (cell.name, *cell.needs)},
            storage_options=config.cluster.storage_options,
            device=pool.device,
        )
        for cell in pending
    ]
    worker = functools.partial(_cell_worker, None if config.is_inline else pool)
    yield from executor.pieces(worker, orders, pool, restarts=config.max_failures, lost=lost)


def _cell_worker(pool: WorkerPool | None) -> Callable[[Order], Outcome]:
    if pool is not None:
        torch.set_num_threads(pool.cpus)
    return run_cell


def run_cell(order: Order) -> Outcome:
    """Do it, or go on with it; an error is an outcome, too."""
    options = parse_options(order.storage_options)
    try:
        settings = order.settings()
        if order.cell.job in _EVALUATIONS:
            _EVALUATIONS[order.cell.job](order.cell.job, settings)
        else:
            train(_TRAININGS[order.cell.job].of(**settings))
        folder = Folder(order.out, options)
        folder.write(DONE, json.dumps({"identity": order.identity, "job": order.cell.job}).encode())
        return Outcome(name=order.cell.name)
    except RayliftError as error:  # in words, which the tables have
        return Outcome(name=order.cell.name, error=_short(error, options))
    except Exception as error:  # the boundary between cells: one that fails must not end the others
        logger.exception("%s failed", order.cell.name)
        return Outcome(name=order.cell.name, error=_short(error, options))


def _short(error: Exception, options: StorageOptions) -> str:
    return textwrap.shorten(redact(f"{type(error).__name__}: {error}", options), 600, placeholder=" ...")


# --- what they came to ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number of a table, measured or not."""

    wanted: Wanted
    measured: float | None
    interval: Interval | None = None
    missing: str = ""
    "why nothing is measured"

    @property
    def difference(self) -> float | None:
        """Measured less published."""
        if self.measured is None or self.wanted.published is None:
            return None
        return round(self.measured - self.wanted.published, 6)


def read_figure(tables: Sequence[Table], wanted: Wanted) -> Figure:
    """From the tables of a cell's results.json."""
    for table in tables:
        at = table.columns.index(wanted.value) if wanted.value in table.columns else len(table.columns)
        for line in table.lines if at < len(table.columns) else ():
            is_it = wanted.line in ("", line.features) and (wanted.px is None or line.input_px == str(wanted.px))
            value, known = line.values[at], line.estimates[at] if line.estimates else None
            if is_it and not line.published and isinstance(value, int | float):
                return Figure(wanted=wanted, measured=value, interval=known.interval if known else None)
    where = f"{wanted.line}{f' at {wanted.px} px' if wanted.px else ''}"
    return Figure(wanted=wanted, measured=None, missing=f"{wanted.cell} has no {wanted.value} of {where}")
