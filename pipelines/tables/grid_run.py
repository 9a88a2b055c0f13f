"""Doing a grid's cells: side by side on a cluster or in turn, each a training run that is begun, continued, or read.

A cell's state is its run's folder (pipelines/training/loop.py) and `cell.json`, written last: whoever starts the grid again
does what isn't there. A cell that fails ends no other one; the tables (pipelines/tables/grid.py) say why it did.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace

from cluster.progress import Progress
from cluster.resources import WorkerPool
from operators.readouts import build_readout
from pipelines.config import ConfigError
from pipelines.executors import Executor, InlineExecutor
from pipelines.features.agreement import AskedFeatures
from pipelines.features.weights import WeightsChoice
from pipelines.tables.doing import attempted, done_side_by_side
from pipelines.tables.grid_cells import Cell, CellResult, GridConfig, published_recipe
from pipelines.tables.tasks import PUBLISHED
from pipelines.training.readout import ReadoutSetup
from pipelines.training.run import train_inline
from pipelines.training.watch import COUNTS
from storage.differences import Difference
from storage.documents import decode_known, parse_json
from storage.paths import Folder
from storage.runs import read_pointers
from storage.spec import FeatureSpec

logger = logging.getLogger(__name__)

RESULT = "cell.json"


# --- one cell ---------------------------------------------------------------------------------------------------------


def run_cell(cell: Cell) -> CellResult:
    """Train it, go on with it, or read what it came to; an error is a result, too."""

    def do() -> CellResult:
        # Whether it is done is asked of what it would be now: settings, weights, images, labels, stores.
        setup = _prepared(cell)
        return _read_result(cell, setup) or _train(cell, setup)

    return attempted(cell.name, do, lambda reason: replace(_empty(cell), error=reason), cell.training.options)


def _empty(cell: Cell) -> CellResult:
    return CellResult(name=cell.name, backbone=cell.backbone.name, task=cell.task.name, method=cell.method, seed=cell.seed)


def _prepared(cell: Cell) -> ReadoutSetup:
    """Its run, begun or held against what it was begun with. Raises what `ReadoutTraining.resolve` and `prepare` raise."""
    return cell.training.resolve().prepare(InlineExecutor())


def _read_result(cell: Cell, setup: ReadoutSetup) -> CellResult | None:
    """Of a cell that is done, all its steps; its run is known to be of these settings and data. A damaged file counts as none:
    the run itself knows how far it is."""
    result = _said_result(cell)
    if result is None:
        return None
    if result.name != cell.name or result.steps != setup.order.steps:
        return None
    # Of what it is asked for now: --max-steps beyond the epochs may be others.
    return replace(result, notes=setup.notes, other_features=_other_features(cell, setup.images.spec), train_seconds=None)


def _train(cell: Cell, setup: ReadoutSetup) -> CellResult:
    started, training = time.monotonic(), cell.training
    summary = train_inline(setup)
    values = {name: value for name, value in summary.metrics.items() if name.startswith("val_")}
    if not values.keys() - set(COUNTS):
        raise ConfigError(f"no held-out image of {training.dataset} could be read")
    result = replace(
        _empty(cell),
        metrics=values,
        parameters=build_readout(setup.readout).parameter_count(),
        grid=tuple(setup.features["level"]["grid"]),
        input_size=tuple(setup.features["input_size"]),
        model_args=setup.features.get("model_args", {}),
        other_features=_other_features(cell, setup.images.spec),
        steps=summary.step,
        clipped=int(summary.metrics.get("clipped", 0)),
        notes=summary.notes,
        train_seconds=round(time.monotonic() - started, 3),
    )
    setup.folder.write(RESULT, json.dumps({"result": asdict(result)}, indent=1).encode())
    return result


def _other_features(cell: Cell, spec: FeatureSpec) -> tuple[Difference, ...]:
    """Settings of features in which a run isn't as the task's recipe has it (there)."""
    if cell.task.name not in PUBLISHED:
        return ()
    features = published_recipe(cell.task, cell.method).features
    # Of a model, they are its settings.
    names = ("layers", "facet", "norm", "stride", "pos_embed", "precision", "encoding") if cell.training.store else ()
    asked = AskedFeatures(settings={name: getattr(features, name) for name in names}, options=cell.training.options)
    found = [Difference(field=each.field, there=each.here, here=each.there) for each in asked.differences(spec).found]
    published = cell.backbone.weights or features.weights
    # A file may be the published one.
    if spec.weights_source not in ("file", WeightsChoice.parse(published).source):
        found.append(Difference(field="weights", there=published, here=spec.weights_source))
    return tuple(found)


def state_in_words(cell: Cell) -> str:
    """How far a cell is, by its folder alone: whether that is of these settings and data, is asked when it is run."""
    result, folder = _said_result(cell), Folder(cell.training.out, cell.training.options)
    if result is not None and result.steps is not None:
        return f"done, {result.steps:,} steps"
    pointers = read_pointers(folder)
    return f"begun, {pointers.last_step:,} steps so far" if pointers else "to do"


# --- all of them ------------------------------------------------------------------------------------------------------


def run_cells(config: GridConfig, cells: Sequence[Cell], executor: Executor) -> list[CellResult]:
    """Results of all cells, in their order. Of a cell whose worker is lost, the next one goes on from its last checkpoint."""

    found = _done_already(cells)
    pending = [cell for cell in cells if cell.name not in found]
    if not pending:
        logger.info("all %d cells are done already", len(cells))
        return [found[cell.name] for cell in cells]

    def orders(pool: WorkerPool) -> list[Cell]:
        return [replace(cell, training=cell.training.changed(device=pool.device)) for cell in pending]

    def given_up(cell: Cell, why: str) -> CellResult:
        return replace(_empty(cell), error=why)

    with Progress(total=len(cells), done=len(found), unit="cells") as progress:
        for result in done_side_by_side(config, executor, run_cell, orders, given_up):
            found[result.name] = result
            progress.add(0 if result.error else 1, 1 if result.error else 0)
            outcome = result.error or ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
            logger.info("%d of %d cells: %s: %s", len(found), len(cells), result.name, outcome)
    return [found[cell.name] for cell in cells]


def _done_already(cells: Sequence[Cell]) -> dict[str, CellResult]:
    """Results by name where every cell has one, so that a grid with nothing left to do needs no workers; else none: those who do
    cells ask each whether it is done."""
    if not all(_said_result(cell) for cell in cells):
        return {}
    found: dict[str, CellResult] = {}
    for cell in cells:
        try:
            result = _read_result(cell, _prepared(cell))
        except Exception:  # noqa: BLE001 - the boundary between cells, as in `run_cell`, which says it
            continue
        if result is not None:
            found[cell.name] = result
    return found


def _said_result(cell: Cell) -> CellResult | None:
    """What a cell's folder says that it came to, of whatever it was begun with."""
    try:
        return decode_known(CellResult, parse_json(Folder(cell.training.out, cell.training.options).read(RESULT))["result"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
