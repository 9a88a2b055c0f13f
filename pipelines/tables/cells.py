"""A grid of readouts: backbones x tasks x methods x seeds; each cell is a training run, side by side on a cluster or in turn.

A cell's state is its run's folder (pipelines/training/loop.py) and `cell.json`, written last: whoever starts the grid again
does what isn't there. A cell that fails ends no other one; the tables (pipelines/tables/deap.py) say why it did.
"""

import functools
import json
import logging
import re
import string
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated

import torch
import tyro

from cluster.progress import Progress
from cluster.resources import WorkerPool, WorkerRequest
from operators.readouts import build_readout
from operators.readouts.variants import VARIANTS
from pipelines.config import ActorsConfig, ConfigError, Free, Held, JobConfig, absolute, require_at_least, require_gpus, said
from pipelines.costs.speed import Speed, SpeedProtocol, TimedBackbone, measure_speed
from pipelines.executors import Executor, InlineExecutor, WorkersLost
from pipelines.features.agreement import AskedFeatures
from pipelines.features.weights import WeightsChoice
from pipelines.published import Settings
from pipelines.tables.backbones import PaperBackbone, find_backbone
from pipelines.tables.tasks import PUBLISHED, TableTask, find_task
from pipelines.training.readout import ReadoutSetup, ReadoutTraining
from pipelines.training.run import train_inline
from pipelines.training.watch import COUNTS
from storage.datasets.registry import DATASETS
from storage.differences import Difference
from storage.documents import JsonObject, JsonValue, as_object, decode, decode_known, parse_json
from storage.errors import RayliftError
from storage.paths import Folder
from storage.redaction import redact
from storage.runs import read_pointers
from storage.spec import FeatureSpec

logger = logging.getLogger(__name__)


class CellsFailed(RayliftError):
    """Some cells have no result; all others are done."""

    exit_code = 1


METHODS: Mapping[str, Settings] = {**VARIANTS, "depth_bins": {"method": "depth_bins"}}
"""Settings of each."""

_GRIDS_OWN = frozenset(
    {
        "out", "model", "weights", "revision", "size", "method", "task", "dataset", "data", "seed", "store", "val_store",
        "storage_options", "executor", "ray_address", "device", "workers", "worker_cpus", "max_failures", "limit",
        "val_limit", "max_steps", "dim", "mask", "shared_sigma", "only_mask", "plan",
    }
)  # fmt: skip
"""Settings of a run that a grid decides."""


@dataclass(frozen=True, kw_only=True)
class GridConfig(JobConfig):
    """Readouts for several backbones, tasks, methods and seeds: DeAP's Tables 3 and 5, ViT-Up's Table 1."""

    out: Free[str] = ""
    """The folder to write or continue: a path or fsspec URL. Each cell's run is a folder in it."""
    backbones: Free[tuple[str, ...]] = ()
    """As `jobs/show.py backbones` names them, or TIMM_NAME[@PIXELS]."""
    tasks: Free[tuple[str, ...]] = ()
    """instances, boundaries, detection, voc, coco-stuff, depth (DeAP's); probe-coco, probe-voc, probe-ade20k,
    probe-cityscapes (ViT-Up's); or any TASK:DATASET, for example segmentation:photos_open."""
    methods: Free[tuple[str, ...]] = ("deap",)
    """deap and its ablations deap-8-dim, deap-no-sigma, deap-no-indiv-sigma, deap-only-mask; bicubic, transposed, strided,
    linear, depth_bins."""
    seeds: Free[tuple[int, ...]] = (0,)
    """Tables have the mean over them, and the standard deviation."""
    data: Free[tuple[str, ...]] = ()
    """DATASET=FOLDER for each data set: voc=VOC2012 coco=s3://bucket/coco."""
    store: Free[str] = ""
    """Feature stores to read instead of running backbones, as a template: s3://bucket/{backbone}-{dataset}.zarr, or with {part}
    one for each part of a data set (train, val, train2017, ...). Made by jobs/extract.py, placed as the task has it. What
    {backbone} is, the cells' folders show."""
    backbone_weights: Annotated[Free[str], tyro.conf.arg(name="weights")] = "pretrained"
    """As for jobs/train.py; a URL may have {backbone} in it: what that is, the cells' folders show (TIMM_NAME@112 is
    TIMM_NAME-112), and the log says it."""
    paper: Free[bool] = False
    """Published numbers below the measured ones."""
    plan: Free[bool] = False
    """Print what would be done, and what is done already, then stop: nothing is computed or begun, and no cluster is asked."""

    max_steps: Free[int | None] = None
    """Optimiser steps of each run; default: the task's published ones."""
    limit: Free[int | None] = None
    """Only the first N images to train on; default: the task's."""
    val_limit: Free[int | None] = None
    """Only the first N images to judge on."""
    cell: Free[ReadoutTraining] = ReadoutTraining()
    """What else all runs have; what is given goes before the published settings of a task."""

    speed: Free[bool] = True
    """Measure each backbone's speed, once all runs are done. The picture of speed and scores needs it."""
    speed_reference: Free[str] = "vit_base_patch16_224.mae"
    """timm name of what speeds are relative to."""
    speed_reference_size: Free[int] = 224
    """Side of its input in pixels."""
    speed_batch: Free[int] = 8
    """Images per forward."""
    speed_batches: Free[int] = 10
    """Forwards that are timed."""

    cluster: Held[ActorsConfig] = ActorsConfig()
    cell_cpus: Free[int | None] = None
    """CPUs and threads of one cell; default: 1 on CPU, the node's share per GPU otherwise."""
    cell_gpus: Free[float | None] = None
    """GPUs of one cell; fractions train several on one."""
    max_failures: Free[int] = 3
    """Lost workers or nodes after which a cell is given up; each time, it goes on from its last checkpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "max_steps", "limit", "val_limit", "speed_batch", "speed_batches", "speed_reference_size")
        require_at_least(1, self, "cell_cpus")
        require_at_least(0, self, "max_failures")
        require_gpus(self.cell_gpus, "--cell-gpus")
        for name in ("backbones", "tasks", "methods", "seeds"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ConfigError(f"--{name} {' '.join(map(str, given))}: must be different ones")
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise ConfigError(f"--methods {' '.join(unknown)}: there are {', '.join(METHODS)}")
        if own := sorted(_given(self.cell).keys() & _GRIDS_OWN):
            flags = ", ".join(f"--cell.{name.replace('_', '-')}" for name in own)
            raise ConfigError(f"{flags}: the grid decides it; see --help for what it takes instead")

    @property
    def folders(self) -> dict[str, str]:
        """`data` by data set. Raises `ConfigError`."""
        found = {}
        for text in self.data:
            name, equals, url = text.partition("=")
            if name not in DATASETS or not equals or not url:
                given = redact(text, self.options)
                raise ConfigError(f"--data {given}: use DATASET=FOLDER; there are {', '.join(DATASETS)}")
            found[name] = absolute(url)
        return found

    @property
    def places(self) -> tuple[str, ...]:
        return self.out, self.store, *self.folders.values()

    @property
    def folder(self) -> Folder:
        """Of `out`. Raises `ConfigError`."""
        if not self.out:
            raise ConfigError("no output: give --out a path or URL for the grid")
        return Folder(absolute(self.out), self.options)

    @property
    def speeds(self) -> SpeedProtocol:
        """How backbones are timed."""
        return SpeedProtocol(
            reference=self.speed_reference,
            reference_size=self.speed_reference_size,
            batch=self.speed_batch,
            batches=self.speed_batches,
            precision=self.cell.features.precision,
        )

    def flat(self) -> dict[str, JsonValue]:
        # Tables have said these two so from the beginning.
        return {**super().flat(), "cell": _given(self.cell), "storage_options": self.cluster.storage_options or "{}"}


def _given(training: ReadoutTraining) -> dict[str, JsonValue]:
    """Settings that were given, be it with their default's value."""
    return {name: value for name, value in training.flat().items() if training.is_given(name)}


# --- cells ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a grid."""

    name: str
    "of its folder"
    backbone: PaperBackbone
    task: TableTask
    method: str
    seed: int
    training: ReadoutTraining
    unused: Mapping[str, str] = field(default_factory=dict)
    "settings of the task's recipe or of `--cell` that the run makes no use of and doesn't have, and why"


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """What became of a cell."""

    name: str
    backbone: str
    task: str
    method: str
    seed: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    "of the held-out images, after the last step"
    parameters: int | None = None
    "that were learned, as DeAP's tables count them"
    grid: tuple[int, int] | None = None
    "cells of the map"
    input_size: tuple[int, int] | None = None
    "in pixels"
    model_args: JsonObject = field(default_factory=dict)
    "of a network that the backbone's name alone doesn't build"
    steps: int | None = None
    train_seconds: float | None = None
    "of this start; nothing where it was done before"
    clipped: int = 0
    "images, each as often as it was trained on, with features that float16 couldn't hold"
    notes: tuple[str, ...] = ()
    "what of its settings had no effect, or another than one may think"
    other_features: tuple[Difference, ...] = ()
    "settings of features in which the run isn't as the task's recipe has it (there)"
    error: str = ""
    "why there is nothing"


def plan_cells(config: GridConfig) -> list[Cell]:
    """All cells, in the order of backbones, tasks, methods, seeds.

    Raises `ConfigError` and `BackboneError`: what is wrong with words and settings is wrong before anything is trained.
    """
    for name in ("backbones", "tasks", "methods", "seeds"):
        if not getattr(config, name):
            raise ConfigError(f"--{name}: give at least one")
    backbones = [_find_backbone(config, word) for word in config.backbones]
    tasks = [find_task(word) for word in config.tasks]
    if lacking := sorted({task.dataset for task in tasks} - config.folders.keys()):
        raise ConfigError(f"--data lacks {', '.join(lacking)}: give {lacking[0]}=FOLDER")
    _check_template("--store", config.store, backbones, {task.dataset for task in tasks})
    cells = [
        _cell(config, backbone, task, method, seed)
        for backbone in backbones
        for task in tasks
        for method in config.methods
        for seed in config.seeds
    ]
    for name, value in _given(config.cell).items():
        if all(name in cell.unused for cell in cells):
            raise ConfigError(f"{said(f'cell.{name}', value)} would change nothing here: {cells[0].unused[name]}. Leave it out")
    return cells


def _find_backbone(config: GridConfig, word: str) -> PaperBackbone:
    """The backbone with its weights; the log says which file a template names. Raises what `find_backbone` raises."""
    weights = config.backbone_weights.replace("{backbone}", slug(word))
    found = find_backbone(word, weights, config.options)
    if weights != config.backbone_weights and not found.weights:
        logger.info("--weights of %s: %s", word, redact(weights, config.options))
    return found


def _check_template(flag: str, text: str, backbones: Sequence[PaperBackbone], datasets: set[str]) -> None:
    """Raises `ConfigError` where a store would be that of several."""
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError as error:
        raise ConfigError(f"{flag} {redact(text)}: {error}; use {{backbone}}, {{dataset}} and {{part}}") from None
    if unknown := sorted(names - {"backbone", "dataset", "part"}):
        raise ConfigError(f"{flag} {redact(text)}: {{{unknown[0]}}} means nothing; use {{backbone}}, {{dataset}}, {{part}}")
    for name, several in (("backbone", len(backbones) > 1), ("dataset", len(datasets) > 1)):
        if text and several and name not in names:
            raise ConfigError(f"{flag} {redact(text)}: with several {name}s, a store of each is needed; use {{{name}}}")


def slug(text: str) -> str:
    """As part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)


def _cell(config: GridConfig, backbone: PaperBackbone, task: TableTask, method: str, seed: int) -> Cell:
    name = "-".join(map(slug, (backbone.name, task.name, method, str(seed))))
    settings = {**published_settings(task, method), **_given(config.cell), **_stores(config, backbone, task)}
    limits = {each: getattr(config, each) for each in ("max_steps", "limit", "val_limit")}
    settings |= {each: value for each, value in limits.items() if value is not None}
    if not config.store:  # whose features have been made
        settings = {"ragged": backbone.ragged, **settings}
    if not config.store or backbone.weights or config.is_given("weights"):
        settings["weights"] = backbone.weights or config.backbone_weights.replace("{backbone}", slug(backbone.name))
    settings |= {
        "out": f"{config.folder.url.rstrip('/')}/{name}",
        "model": backbone.model,
        "size": backbone.size,
        "data": config.folders[task.dataset],
        "seed": seed,
        "storage_options": config.cluster.storage_options,
        "executor": "inline",  # a cell is one process
        "device": config.cluster.device,
    }
    # A table's methods and tasks don't all take what some of them do.
    unused = {name: str(why) for name, why in ReadoutTraining.of(**settings).unused().items()}
    training = ReadoutTraining.of(**{name: value for name, value in settings.items() if name not in unused})
    return Cell(name=name, backbone=backbone, task=task, method=method, seed=seed, training=training, unused=unused)


def published_settings(task: TableTask, method: str) -> dict[str, JsonValue]:
    """Of the task's recipe, with the method that is asked for."""
    return {**task.settings, **METHODS[method], "task": task.task, "dataset": task.dataset}


def published_recipe(task: TableTask, method: str) -> ReadoutTraining:
    """The same as settings of a run, without what the method makes no use of."""
    settings = published_settings(task, method)
    unused = ReadoutTraining.of(**settings).unused()
    return ReadoutTraining.of(**{name: value for name, value in settings.items() if name not in unused})


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


def _stores(config: GridConfig, backbone: PaperBackbone, task: TableTask) -> dict[str, str]:
    """Settings that name the stores of both parts."""
    if not config.store:
        return {}
    kind, given = DATASETS[task.dataset], _given(config.cell)
    parts = given.get("split") or kind.splits[0], given.get("val_split") or kind.splits[1]
    urls = [absolute(config.store.format(backbone=slug(backbone.name), dataset=task.dataset, part=part)) for part in parts]
    return {"store": urls[0], "val_store": urls[1]}


# --- one cell ---------------------------------------------------------------------------------------------------------

RESULT = "cell.json"


def run_cell(cell: Cell) -> CellResult:
    """Train it, go on with it, or read what it came to; an error is a result, too."""
    try:
        # Whether it is done is asked of what it would be now: settings, weights, images, labels, stores.
        setup = _prepared(cell)
        return _read_result(cell, setup) or _train(cell, setup)
    except RayliftError as error:  # in words, which the tables have
        return failed(cell, f"{type(error).__name__}: {error}")
    except Exception as error:  # the boundary between cells: one that fails must not end the others
        logger.exception("%s failed", cell.name)
        return failed(cell, f"{type(error).__name__}: {error}")


def failed(cell: Cell, reason: str) -> CellResult:
    """A cell without numbers."""
    error = textwrap.shorten(redact(reason, cell.training.options), 600, placeholder=" ...")
    return replace(_empty(cell), error=error)


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

    def lost(cell: Cell, error: WorkersLost) -> CellResult:
        return failed(cell, f"given up after {config.max_failures} restarts (--max-failures): {error}")

    found = _done_already(cells)
    pending = [cell for cell in cells if cell.name not in found]
    if not pending:
        logger.info("all %d cells are done already", len(cells))
        return [found[cell.name] for cell in cells]
    pool = executor.pool(_request(config, config.cluster.actors, config.cell_gpus))
    worker = functools.partial(_cell_worker, None if config.is_inline else pool)
    with Progress(total=len(cells), done=len(found), unit="cells") as progress:
        for result in executor.pieces(worker, pending, pool, restarts=config.max_failures, lost=lost):
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


def _request(config: GridConfig, actors: int | None, gpus: float | None) -> WorkerRequest:
    return WorkerRequest(device=config.cluster.device, actors=actors, cpus=config.cell_cpus, gpus=gpus, called="cell")


def _cell_worker(pool: WorkerPool | None) -> Callable[[Cell], CellResult]:
    """Does cells with what a pool has for each; without a pool, with what this process has."""
    if pool is None:
        return run_cell
    torch.set_num_threads(pool.cpus)
    device = pool.device
    return lambda cell: run_cell(replace(cell, training=cell.training.changed(device=device)))


# --- speed ------------------------------------------------------------------------------------------------------------

SPEEDS = "speed.json"


def measure_speeds(
    config: GridConfig, cells: Sequence[Cell], results: Sequence[CellResult], executor: Executor
) -> dict[str, Speed]:
    """Of each backbone that has a result, by name; measured one after another on one machine, or read from an earlier start
    that measured on such a device. All are of one machine: where some were measured on another, they are measured again. Where
    nothing else needs a cluster, those of an earlier start stand on any device that the settings leave open.

    The grid's own cells must be done. Raises `BackboneError`.
    """
    models = {cell.backbone.name: cell.backbone.model for cell in cells}
    wanted = {}
    for each in results:
        height, width = each.input_size or (0, 1)
        if not each.error and height == width:
            wanted[each.backbone] = TimedBackbone(models[each.backbone], height, each.model_args)
    needs_none = not config.is_inline and all(result.train_seconds is None for result in results)
    if needs_none and (kept := _of_all(_read_speeds(config, None), wanted)):
        return kept  # without asking for workers
    pool = executor.pool(_request(config, 1, None))  # a whole GPU
    protocol = {**asdict(config.speeds), "device": pool.device, "threads": pool.cpus if pool.device == "cpu" else None}
    known = _read_speeds(config, protocol)
    if kept := _of_all(known, wanted):
        return kept
    kept = {name: known[name] for name, of in wanted.items() if name in known and known[name].of == of.saved}
    worker = functools.partial(_speed_worker, config.speeds, pool.device, None if config.is_inline else pool.cpus)
    (found,) = executor.pieces(
        worker, [{name: (of, kept.get(name)) for name, of in wanted.items()}], pool, restarts=config.max_failures
    )
    document = {"protocol": protocol, "found": {name: asdict(speed) for name, speed in {**known, **found}.items()}}
    config.folder.write(SPEEDS, json.dumps(document, indent=1).encode())
    return {name: found[name] for name in wanted}


def _of_all(known: Mapping[str, Speed], wanted: Mapping[str, TimedBackbone]) -> dict[str, Speed]:
    """Speeds of all that are wanted, of one machine; else none."""
    found = {name: known[name] for name, of in wanted.items() if name in known and known[name].of == of.saved}
    is_whole = len(found) == len(wanted) and len({(speed.device, speed.cpu) for speed in found.values()}) <= 1
    return found if is_whole else {}


def _read_speeds(config: GridConfig, protocol: JsonObject | None) -> dict[str, Speed]:
    """Those of an earlier start that were measured in the same way; a damaged file counts as none. Without a protocol: on any
    device, and with any number of threads, that the settings leave open."""
    try:
        document = parse_json(config.folder.read(SPEEDS))
        there = as_object(document["protocol"])
        if protocol is None:
            asked = {"device": config.cluster.device, "threads": config.cell_cpus}
            protocol = {**asdict(config.speeds), **{n: there[n] if v in (None, "auto") else v for n, v in asked.items()}}
        if there != protocol:
            return {}
        return {name: decode(Speed, each, name) for name, each in as_object(document["found"]).items()}
    except (FileNotFoundError, ValueError, KeyError):
        return {}


def _speed_worker(
    protocol: SpeedProtocol, device: str, threads: int | None
) -> Callable[[Mapping[str, tuple[TimedBackbone, Speed | None]]], dict[str, Speed]]:
    """Measures the speeds of some backbones, by name; those that are known of this very machine are as they are."""
    if threads:
        torch.set_num_threads(threads)
    where = torch.device(device)

    def speed_of(backbone: TimedBackbone, known: Speed | None) -> Speed:
        return known if known and known.was_measured_on(where) else measure_speed(protocol, where, backbone)

    return lambda backbones: {name: speed_of(*each) for name, each in backbones.items()}
