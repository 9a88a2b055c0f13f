"""The tasks of the papers' tables: which numbers of a training run are shown of each, and what was published of them.

Numbers are in the units of the papers' tables: IoU, accuracy and ARI in percent, AP as a share, depth in metres.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipelines.config import ConfigError
from pipelines.published import Settings, Values
from pipelines.published.deap import deap_values
from pipelines.published.recipes import RECIPES
from pipelines.published.vit_up import PROBE_TASKS, VIT_UP_FEATURES, VIT_UP_PROBES, VIT_UP_SIZE
from pipelines.readouts.tasks import TASKS
from pipelines.tables.backbones import BY_NAME, PaperBackbone
from storage.datasets.registry import DATASETS


@dataclass(frozen=True, kw_only=True)
class Column:
    """A number of a table."""

    head: str
    "as papers' numbers have it, too (pipelines/published/)"
    metric: str
    "of a training run, as metrics.jsonl has it"
    scale: float = 1.0
    "of the table's unit in the metric's"
    judged: str = ""
    "the same in the results of jobs/evaluate.py probe, in the table's unit; empty: they don't have it"
    digits: int = 4
    falls: bool = False
    "whether less is better"


@dataclass(frozen=True, kw_only=True)
class TableTask:
    """A task on a data set, and what tables say of it."""

    name: str
    label: str
    task: str
    dataset: str
    columns: tuple[Column, ...]
    "the last one is what pictures show"
    settings: Settings = field(default_factory=dict)
    "of jobs/train.py"


COLUMNS: Mapping[str, tuple[Column, ...]] = {
    "instances": (Column(head="ARI", metric="val_ari", judged="ari", digits=1),),
    "boundaries": (
        Column(head="CE", metric="val_cross_entropy", judged="cross_entropy", falls=True),
        Column(head="IoU", metric="val_iou", scale=100, judged="iou, %", digits=1),
    ),
    "detection": (Column(head="AP_lg", metric="val_ap_large", judged="ap_large"),),
    "segmentation": (
        Column(head="CE", metric="val_loss", falls=True),
        Column(head="IoU", metric="val_miou", scale=100, judged="miou, %", digits=1),
    ),
    "depth": (Column(head="RMSE", metric="val_rmse_pooled", judged="rmse_pooled", digits=3, falls=True),),
}
"""By task, as DeAP's Table 3 has them; pictures and figures show the last one."""

_PROBE_COLUMNS = (
    Column(head="mIoU", metric="val_miou", scale=100, judged="miou, %", digits=2),
    Column(head="acc", metric="val_pixel_accuracy", scale=100, judged="pixel_accuracy, %", digits=2),
)
"""As ViT-Up's Table 1 has them."""

PUBLISHED: Mapping[str, TableTask] = {
    name: TableTask(
        name=name,
        label=recipe.label,
        task=recipe.task,
        dataset=recipe.dataset,
        columns=_PROBE_COLUMNS if name in PROBE_TASKS else COLUMNS[recipe.task],
        settings=recipe.settings,
    )
    for name, recipe in RECIPES.items()
}
"""By name, in the order of the tables' columns."""


def find_task(word: str) -> TableTask:
    """A published task by name, or any task on any data set as `TASK:DATASET`. Raises `ConfigError`."""
    if word in PUBLISHED:
        return PUBLISHED[word]
    task, colon, dataset = word.partition(":")
    if not colon:
        near = difflib.get_close_matches(word, PUBLISHED, 1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise ConfigError(f"--tasks {word}: {hint}There are {', '.join(PUBLISHED)}, and TASK:DATASET")
    for kind, given, known in (("task", task, TASKS), ("data set", dataset, DATASETS)):
        if given not in known:
            raise ConfigError(f"--tasks {word}: no {kind} is called {given!r}; there are {', '.join(known)}")
    return TableTask(name=word, label=f"{task}, {dataset}", task=task, dataset=dataset, columns=COLUMNS[task])


def published_values(backbone: PaperBackbone, method: str, task: str) -> Values:
    """What a paper has of the task, by its columns' heads; empty where it has nothing of this backbone at this size."""
    if method == "linear" and (backbone.model, backbone.size) == (VIT_UP_FEATURES["model"], VIT_UP_SIZE):
        return VIT_UP_PROBES.values("bilinear", task)
    return deap_values(backbone.name, method, task) if BY_NAME.get(backbone.name) == backbone else {}
