"""Doing a paper's cells, side by side on a cluster or in turn, and reading what they came to."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from cluster.progress import Progress
from cluster.resources import WorkerPool
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
from pipelines.executors import Executor
from pipelines.tables.doing import attempted, done_side_by_side
from pipelines.tables.measures import count_readouts, measure_speeds
from pipelines.tables.papers import Job, PaperCell, PaperPlan, PapersConfig, with_replaced
from pipelines.training.config import TrainConfig
from pipelines.training.lift import X2Config
from pipelines.training.readout import ReadoutTraining
from pipelines.training.run import train
from pipelines.training.vit_up import ViTUpTraining
from pipelines.training.vitdet import ViTDetTraining
from storage.documents import JsonValue, parse_json
from storage.paths import Folder
from storage.runs import read_pointers

logger = logging.getLogger(__name__)

DONE = "done.json"

RESULTS = "results.json"


Doing: TypeAlias = Callable[[Mapping[str, JsonValue]], object]
"""Does a job by its settings, or goes on with it."""


def _evaluating(name: str, kind: type[Settings], task: Task[Settings, Evaluating, Making]) -> Doing:
    return lambda settings: evaluate(name, task, kind.of(**settings))


def _training(kind: type[TrainConfig]) -> Doing:
    return lambda settings: train(kind.of(**settings))


_JOBS: Mapping[Job, Doing] = {
    "lift": _training(X2Config),
    "vit-up": _training(ViTUpTraining),
    "readout": _training(ReadoutTraining),
    "vitdet": _training(ViTDetTraining),
    "correspondence": _evaluating("correspondence", CorrespondenceConfig, correspondence),
    "video": _evaluating("video", VideoConfig, video),
    "discovery": _evaluating("discovery", DiscoveryConfig, discovery),
    "cka": _evaluating("cka", CkaConfig, cka),
    "similarity": _evaluating("similarity", SimilarityConfig, similarity),
    "runtime": _evaluating("runtime", RuntimeConfig, runtime),
    "probe": _evaluating("probe", ProbeConfig, readouts),
    "detection": _evaluating("detection", DetectionConfig, detection),
    "speed": measure_speeds,
    "counts": count_readouts,
}


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
        return {**with_replaced(self.cell.settings, folders), **own}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a cell."""

    name: str
    error: str = ""
    "why there is nothing"
    hindered: bool = False
    "by what isn't there, of its own or of a cell that it takes from: it wasn't tried"


def run_papers_cells(config: PapersConfig, plan: PaperPlan, executor: Executor) -> dict[str, Outcome]:
    """All cells, by name; those that can't be done, and those that need them, say why."""
    found: dict[str, Outcome] = {}
    with Progress(total=len(plan.cells), done=0, unit="cells") as progress:
        for wave in plan.waves():
            for cell in wave:
                if (outcome := _untried(plan, cell, found)) is not None:
                    found[cell.name] = outcome
                elif is_done(config.folder, plan, cell):
                    found[cell.name] = Outcome(name=cell.name)
            progress.add(len([cell for cell in wave if cell.name in found]))
            pending = [cell for cell in wave if cell.name not in found]
            for outcome in _done_now(config, plan, pending, executor) if pending else ():
                found[outcome.name] = outcome
                progress.add(0 if outcome.error else 1, 1 if outcome.error else 0)
                logger.info("%d of %d cells: %s: %s", len(found), len(plan.cells), outcome.name, outcome.error or "done")
    return found


def _untried(plan: PaperPlan, cell: PaperCell, found: Mapping[str, Outcome]) -> Outcome | None:
    """What is said of a cell that can't be done; None where it can."""
    if lacks := plan.lacks(cell):
        return Outcome(name=cell.name, error=lacks, hindered=True)
    failed = next((found[need] for need in cell.needs if found[need].error), None)
    return failed and Outcome(name=cell.name, error=f"it needs {failed.name}: {failed.error}")


def is_done(folder: Folder, plan: PaperPlan, cell: PaperCell) -> bool:
    """Whether it is, by these settings, and those of what it takes from."""
    try:
        said = parse_json(folder.read(f"{plan.place(cell)}/{DONE}"))
        return bool(said["identity"] == plan.identity(cell))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def state_in_words(folder: Folder, plan: PaperPlan, cell: PaperCell) -> str:
    """How far a cell is."""
    if lacks := plan.lacks(cell):
        return f"missing: {lacks}"
    if is_done(folder, plan, cell):
        return "done"
    own = Folder(f"{folder.url.rstrip('/')}/{plan.place(cell)}", folder.options)
    pointers = read_pointers(own)
    begun = f"begun, {pointers.last_step:,} steps so far" if pointers else ""
    parts = len(own.sizes("parts"))
    return begun or (f"begun, {parts:,} pieces so far" if parts else "to do")


def _done_now(config: PapersConfig, plan: PaperPlan, pending: Sequence[PaperCell], executor: Executor) -> Iterator[Outcome]:
    """Outcomes as cells end."""

    def orders(pool: WorkerPool) -> list[Order]:
        return [
            Order(
                cell=cell,
                identity=plan.identity(cell),
                places={
                    name: f"{config.folder.url.rstrip('/')}/{plan.place(plan.cells[name])}" for name in (cell.name, *cell.needs)
                },
                storage_options=config.cluster.storage_options,
                device=pool.device,
            )
            for cell in pending
        ]

    def given_up(order: Order, why: str) -> Outcome:
        return Outcome(name=order.cell.name, error=why)

    return done_side_by_side(config, executor, run_cell, orders, given_up)


def run_cell(order: Order) -> Outcome:
    """Do it, or go on with it; an error is an outcome, too."""
    options, name = parse_options(order.storage_options), order.cell.name

    def do() -> Outcome:
        _JOBS[order.cell.job](order.settings())
        said = json.dumps({"identity": order.identity, "job": order.cell.job})
        Folder(order.out, options).write(DONE, said.encode())
        return Outcome(name=name)

    return attempted(name, do, lambda reason: Outcome(name=name, error=reason), options)
