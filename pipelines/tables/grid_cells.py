"""A grid of readouts: backbones x tasks x methods x seeds; its settings, and its cells, each of which is a training run."""

import logging
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from operators.readouts import READOUTS
from operators.readouts.variants import VARIANTS
from pipelines.config import ConfigError, Free, absolute, require_at_least, said
from pipelines.costs.speed import SpeedProtocol
from pipelines.published import Settings
from pipelines.tables.backbones import PaperBackbone, find_backbone
from pipelines.tables.doing import CellsConfig
from pipelines.tables.tasks import TableTask, find_task
from pipelines.training.readout import ReadoutTraining
from storage.datasets.registry import DATASETS
from storage.differences import Difference
from storage.documents import JsonObject, JsonValue
from storage.redaction import redact

logger = logging.getLogger(__name__)


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
class GridConfig(CellsConfig):
    """Readouts of your own choice: backbones x tasks x methods x seeds, on models or stores."""

    backbones: Free[tuple[str, ...]] = ()
    """As `jobs/show.py backbones` names them, or TIMM_NAME[@PIXELS]."""
    tasks: Free[tuple[str, ...]] = ()
    """instances, boundaries, detection, voc, coco-stuff, depth (DeAP's); probe-coco, probe-voc, probe-ade20k,
    probe-cityscapes (ViT-Up's); or any TASK:DATASET, for example segmentation:photos_open."""
    methods: Free[tuple[str, ...]] = ("deap",)
    """deap and its ablations deap-8-dim, deap-no-sigma, deap-no-indiv-sigma, deap-only-mask; bicubic, transposed, strided,
    linear, featup, depth_bins."""
    method_levels: Free[tuple[str, ...]] = ()
    """METHOD=LEVEL for methods that read another map than the others: featup=x16=featup:URL, linear=448x448=vit_up:URL."""
    store: Free[str] = ""
    """Feature stores to read instead of running backbones, as a template: s3://bucket/{backbone}-{dataset}.zarr, or with {part}
    one for each part of a data set (train, val, train2017, ...). Made by jobs/extract.py, placed as the task has it. What
    {backbone} is, the cells' folders show."""
    backbone_weights: Annotated[Free[str], tyro.conf.arg(name="weights")] = "pretrained"
    """As for jobs/train.py; a URL may have {backbone} in it: what that is, the cells' folders show (TIMM_NAME@112 is
    TIMM_NAME-112), and the log says it."""
    paper: Free[bool] = False
    """Published numbers below the measured ones."""

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

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "max_steps", "limit", "val_limit", "speed_batch", "speed_batches", "speed_reference_size")
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise ConfigError(f"--methods {' '.join(unknown)}: there are {', '.join(METHODS)}")
        if own := sorted(_given(self.cell).keys() & _GRIDS_OWN):
            flags = ", ".join(f"--cell.{name.replace('_', '-')}" for name in own)
            raise ConfigError(f"{flags}: the grid decides it; see --help for what it takes instead")

    @property
    def level_of(self) -> dict[str, str]:
        """`method_levels` by method. Raises `ConfigError`."""
        form = f"METHOD=LEVEL, of --methods {' '.join(self.methods)}; for example featup=x16=featup:URL"
        found = self.pairs("method_levels", form)
        if unknown := next((name for name in found if name not in self.methods), ""):
            raise ConfigError(f"--method-levels {unknown}={redact(found[unknown], self.options)}: use {form}")
        return found

    @property
    def places(self) -> tuple[str, ...]:
        return self.out, self.store, *self.folders.values()

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
    config.require_different("backbones", "tasks", "methods")
    config.require_known(data=DATASETS)
    backbones = [_find_backbone(config, word) for word in config.backbones]
    tasks = [find_task(word) for word in config.tasks]
    if lacking := sorted({task.dataset for task in tasks} - config.folders.keys()):
        raise ConfigError(f"--data lacks {', '.join(lacking)}: give {lacking[0]}=FOLDER")
    _check_template("--store", config.store, backbones, {task.dataset for task in tasks})
    if unknown := sorted(set(re.findall(r"\{([a-z_]+)\}", config.backbone_weights)) - {"backbone"}):
        shown = redact(config.backbone_weights, config.options)
        raise ConfigError(f"--weights {shown}: {{{unknown[0]}}} means nothing; use {{backbone}}")
    _require_levels(config)
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


def _require_levels(config: GridConfig) -> None:
    """Raises `ConfigError` where `--method-levels` aren't of the methods, or a method that can't read any map has none."""
    given = config.level_of
    for name in config.methods:
        reads = READOUTS[str(METHODS[name]["method"])].reads
        if reads and name not in given and not config.cell.is_given("level"):
            raise ConfigError(
                f"--methods {name} reads a map that {reads} has enlarged: give --method-levels {name}=x16={reads}:URL, or with "
                "--store the name of such a level of it"
            )


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
    settings |= {"level": level} if (level := config.level_of.get(method)) else {}
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
    training, unused = without_unused(settings)
    return Cell(name=name, backbone=backbone, task=task, method=method, seed=seed, training=training, unused=unused)


def published_settings(task: TableTask, method: str) -> dict[str, JsonValue]:
    """Of the task's recipe, with the method that is asked for."""
    return {**task.settings, **METHODS[method], "task": task.task, "dataset": task.dataset}


def published_recipe(task: TableTask, method: str) -> ReadoutTraining:
    """The same as settings of a run, without what the method makes no use of."""
    recipe, _ = without_unused(published_settings(task, method))
    return recipe


def without_unused(settings: Mapping[str, JsonValue]) -> tuple[ReadoutTraining, dict[str, str]]:
    """A run of the settings that it makes use of; the others, and why it doesn't."""
    unused = {name: str(why) for name, why in ReadoutTraining.of(**settings).unused().items()}
    return ReadoutTraining.of(**{name: value for name, value in settings.items() if name not in unused}), unused


def _stores(config: GridConfig, backbone: PaperBackbone, task: TableTask) -> dict[str, str]:
    """Settings that name the stores of both parts."""
    if not config.store:
        return {}
    kind, given = DATASETS[task.dataset], _given(config.cell)
    parts = given.get("split") or kind.splits[0], given.get("val_split") or kind.splits[1]
    urls = [absolute(config.store.format(backbone=slug(backbone.name), dataset=task.dataset, part=part)) for part in parts]
    return {"store": urls[0], "val_store": urls[1]}
