"""Does an evaluation's pieces of work, here or on Ray actors, and keeps what each one gave: the only file that knows Ray.

A piece writes its records as one object in `parts/` when it is done, so that an evaluation which was killed goes on from
there. Records are merged from those files, whoever wrote them: the score depends neither on the number of workers nor on the
order in which they finish.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch

from cluster.resources import WorkerPool, choose_pool
from pipelines.config import ConfigError
from pipelines.evaluation.config import EvaluateConfig
from pipelines.executors import InlineExecutor, executor_for
from pipelines.features.sources import CachedSource, FeatureSource, Recipe, describe
from pipelines.provenance import require_same, versions
from pipelines.results import Findings, LeftOut, write_results
from storage.datasets.files import DatasetError
from storage.datasets.frames import CANNOT_TELL, FrameUnknown
from storage.documents import Document, parse_json
from storage.errors import RayliftError
from storage.paths import Folder, redact
from storage.runs import read_run, write_run
from storage.store import read_attributes

logger = logging.getLogger(__name__)


class WorkersLost(RayliftError):
    """Workers were lost again and again."""

    exit_code = 1


Record = dict[str, Any]
"""What one item gave, as JSON values."""

LEFT_OUT = "left_out"
"""Of a record: why its item isn't scored."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A unit of work. Pieces don't depend on the number of workers."""

    name: str
    "of its file in parts/"
    items: tuple[int, ...]
    "numbers of what it is made of, in the evaluation's own order"
    side: int = 0
    "of the model's input in pixels, where pieces have one each; 0: as the evaluation has it"


class Evaluation(Protocol):
    """One task on one data set; sent to every worker once."""

    def pieces(self) -> Sequence[Piece]:
        """All the work."""

    def run(self, piece: Piece, source: FeatureSource, folder: Folder) -> list[Record]:
        """Do a piece. Larger results (label images) are written below `folder`, each name once."""


def records_of(items: Sequence[int], do: Callable[[int], list[Record]]) -> list[Record]:
    """What `do` gives of each item; of one whose labels can't be placed, a record that says why it was left out."""
    records: list[Record] = []
    for number in items:
        try:
            records += do(number)
        except FrameUnknown as error:
            records.append({LEFT_OUT: CANNOT_TELL, "item": number, "image": error.shown})
    return records


def split_left_out(records: Sequence[Record]) -> tuple[list[Record], tuple[LeftOut, ...]]:
    """The records of what was scored, and what was left out, by reason: each item once, whatever sizes it was tried at.

    Raises `DatasetError` where nothing was scored.
    """
    scored = [record for record in records if LEFT_OUT not in record]
    images: dict[str, dict[int, str]] = {}
    for record in records:
        if LEFT_OUT in record:
            images.setdefault(record[LEFT_OUT], {})[record["item"]] = record["image"]
    found = tuple(LeftOut(reason=reason, count=len(items), first=items[min(items)]) for reason, items in images.items())
    if found and not scored:
        raise DatasetError(f"nothing is left to be scored: {'; '.join(map(str, found))}")
    return scored, found


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a worker is given."""

    evaluation: Evaluation
    recipe: Recipe
    folder: Folder
    device: str
    threads: int


class Worker:
    """Does pieces, one at a time."""

    def __init__(self, work: Work):
        torch.set_num_threads(work.threads)
        self.work, self.source = work, CachedSource(work.recipe.open(work.device))

    def start(self) -> None:
        """Nothing; on Ray, what can be waited for until the worker is up."""

    def run(self, piece: Piece) -> str:
        """Do a piece and write its records; returns its name."""
        records = self.work.evaluation.run(piece, self.source, self.work.folder)
        lines = "".join(f"{json.dumps(record)}\n" for record in records)
        self.work.folder.write(_part(piece.name), lines.encode())
        return piece.name


def begin(config: EvaluateConfig, task: str, recipe: Recipe, data_digest: str) -> Folder:
    """The output folder, begun, or held against the settings it was begun with. Raises `ConfigError`."""
    folder = Folder(config.required("out"), config.options)
    if read_attributes(folder) is not None:
        raise ConfigError(f"{folder.shown} is a feature store; give --out a folder of its own")
    identity = {"task": task, **config.counted(), **recipe.identity()}
    identity["data"] = data_digest  # where it lies may change, what it holds may not
    before = read_run(folder)
    if before is None:
        write_run(folder, {"identity": identity, "config": config.public(), "versions": versions()})
    else:
        require_same(folder.shown, before.get("identity", {}), json.loads(json.dumps(identity)))
    return folder


def run_pieces(config: EvaluateConfig, evaluation: Evaluation, recipe: Recipe, folder: Folder) -> list[Record]:
    """Do what isn't done yet; returns all records, in the order of the pieces. On Ray, a session must be connected."""
    pieces = evaluation.pieces()
    done = folder.sizes("parts")
    pending = [piece for piece in pieces if f"{piece.name}.jsonl" not in done]
    if done:
        logger.info("%d of %d pieces are done already", len(pieces) - len(pending), len(pieces))
    if pending:
        started = time.monotonic()
        run = _run_inline if config.is_inline else _run_on_ray
        for finished, name in enumerate(run(config, evaluation, recipe, folder, pending), 1):
            logger.info("%s done, %d of %d, %.0f s", name, finished, len(pending), time.monotonic() - started)
    return _records(folder, pieces)


Settings = TypeVar("Settings", bound=EvaluateConfig, contravariant=True)
Evaluated = TypeVar("Evaluated", bound=Evaluation)


class Task(Protocol[Settings, Evaluated]):
    """A module of this folder, or another like them: one word of `jobs/evaluate.py`."""

    def prepare(self, config: Settings, /) -> tuple[Evaluated, Recipe, Folder]:
        """The work, the features it is done on, and the output folder, begun or continued."""

    def find(self, config: Settings, evaluation: Evaluated, recipe: Recipe, records: Sequence[Record], /) -> Findings:
        """What the records of all pieces come to."""


def evaluate(name: str, task: Task[Settings, Evaluated], config: Settings) -> str:
    """Evaluate, or go on with it, to the end, and write what was found; returns the tables as Markdown."""
    evaluation, recipe, folder = task.prepare(config)  # before a cluster is started: most mistakes end here
    with executor_for(inline=config.is_inline, address=config.cluster.ray_address, device=config.cluster.device):
        records = run_pieces(config, evaluation, recipe, folder)
    findings = task.find(config, evaluation, recipe, records)
    if notes := recipe.notes():
        findings = replace(findings, choices={**findings.choices, "upsamplers": "; ".join(notes)})
    return write_results(folder, name, config.public(), describe(recipe), findings)


def main(name: str, task: Task[Settings, Evaluated], config: Settings) -> Iterator[str]:
    """`evaluate`, and what there is to say of it."""
    yield evaluate(name, task, config)
    yield f"written to {redact(config.out, config.options)}"


def _records(folder: Folder, pieces: Sequence[Piece]) -> list[Record]:
    records = []
    names = [_part(piece.name) for piece in pieces]
    for name, data in zip(names, folder.read_many(names), strict=True):
        with Document(folder, name, "delete it and run the same command").parsing():
            records += [parse_json(line) for line in data.decode().splitlines()]
    return records


def _part(name: str) -> str:
    return f"parts/{name}.jsonl"


def _run_inline(
    config: EvaluateConfig, evaluation: Evaluation, recipe: Recipe, folder: Folder, pending: Sequence[Piece]
) -> Any:
    pool = InlineExecutor().pool(config.cluster.device, None, config.cluster.actor_cpus, None)
    worker = Worker(_work(evaluation, recipe, folder, pool))
    for piece in pending:
        yield worker.run(piece)


def _work(evaluation: Evaluation, recipe: Recipe, folder: Folder, pool: WorkerPool) -> Work:
    return Work(evaluation=evaluation, recipe=recipe, folder=folder, device=pool.device, threads=pool.cpus)


def _run_on_ray(
    config: EvaluateConfig, evaluation: Evaluation, recipe: Recipe, folder: Folder, pending: Sequence[Piece]
) -> Any:
    """Names of pieces as they finish. A lost actor is started again, and its piece done again; errors end the evaluation."""
    import ray

    cluster = config.cluster
    pool = choose_pool(cluster.device, cluster.actors, cluster.actor_cpus, cluster.actor_gpus, cluster.accelerator)
    # The model crosses the network once per node.
    work = ray.put(_work(evaluation, recipe, folder, pool))
    actor = ray.remote(**pool.placement, max_restarts=3, max_task_retries=3)(Worker)
    actors = [actor.remote(work) for _ in range(min(pool.size, len(pending)))]
    waiting = list(reversed(pending))
    # An actor gets work once it is up: one that the cluster has no room for keeps nobody waiting.
    running = {each.start.remote(): each for each in actors}
    left = len(pending)
    try:
        while left:
            (ready, *_), _ = ray.wait(list(running), num_returns=1)
            free, name = running.pop(ready), _result(ready)
            if name is not None:
                left -= 1
                yield name
            # Two pieces at a time for each, so that none waits for the driver.
            for piece in [waiting.pop() for _ in range(min(len(waiting), 1 if name else 2))]:
                running[free.run.remote(piece)] = free
    finally:
        for each in actors:
            ray.kill(each)


def _result(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # as it would be raised here
    except ray.exceptions.RayActorError as error:
        raise WorkersLost(f"a worker was lost and started again too often: {error}. The same command goes on") from None
