"""The tasks of the papers' tables, with the settings and the numbers that were published.

DeAP's Tables 3 and 5: specs/evaluation.md 12.3, 12.4 and 16. ViT-Up's Table 1: sections 7 and 16. Numbers are in the units of
their tables: IoU, accuracy and ARI in percent, AP as a share, depth in metres.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.config import ConfigError
from pipelines.readouts.tasks import TASKS
from storage.datasets.registry import DATASETS


@dataclass(frozen=True, kw_only=True)
class Column:
    """A number of a table."""

    head: str
    metric: str
    "of a training run, as metrics.jsonl has it"
    scale: float = 1.0
    digits: int = 4


@dataclass(frozen=True, kw_only=True)
class PublishedTask:
    """A task on a data set, and what tables say of it."""

    name: str
    label: str
    task: str
    dataset: str
    columns: tuple[Column, ...]
    "the last one is what pictures show"
    settings: Mapping[str, Any] = field(default_factory=dict)
    "of jobs/train.py"
    counted: str = ""
    "as `operators.readouts.published_counts` calls it"


_CE = Column(head="CE", metric="val_loss")
_IOU = Column(head="IoU", metric="val_miou", scale=100, digits=1)
_ACCURACY = Column(head="acc", metric="val_pixel_accuracy", scale=100, digits=2)

COLUMNS: Mapping[str, tuple[Column, ...]] = {
    "instances": (Column(head="ARI", metric="val_ari", digits=1),),
    "boundaries": (
        Column(head="CE", metric="val_cross_entropy"),
        Column(head="IoU", metric="val_iou", scale=100, digits=1),
    ),
    "detection": (Column(head="AP_lg", metric="val_ap_large"),),
    "segmentation": (_CE, _IOU),
    "depth": (Column(head="RMSE", metric="val_rmse_pooled", digits=3),),
}
"""By task, as DeAP's Table 3 has them."""


def _deap(name: str, label: str, task: str, dataset: str, counted: str, **settings: Any) -> PublishedTask:
    # Steps are what is published, not passes.
    settings = {"epochs": 100_000, **settings}
    return PublishedTask(
        name=name, label=label, task=task, dataset=dataset, columns=COLUMNS[task], settings=settings, counted=counted
    )


def _probe(name: str, label: str, dataset: str, epochs: int = 20) -> PublishedTask:
    settings = {
        "side": 448, "flip": True, "batch": 4, "epochs": epochs, "lr": 2e-3, "weight_decay": 1e-5, "schedule": "cosine"
    }  # fmt: skip
    return PublishedTask(
        name=name,
        label=label,
        task="segmentation",
        dataset=dataset,
        columns=(Column(head="mIoU", metric="val_miou", scale=100, digits=2), _ACCURACY),
        settings=settings,
    )


PUBLISHED: Mapping[str, PublishedTask] = {
    each.name: each
    for each in (
        # The steps of instance discrimination aren't published.
        _deap("instances", "instances", "instances", "coco", "instance discrimination", limit=8_000, max_steps=20_000),
        _deap("boundaries", "boundaries", "boundaries", "coco", "boundaries", limit=5_000, max_steps=10_000),
        _deap("detection", "detection", "detection", "coco", "detection", limit=100_000, max_steps=20_000),
        _deap("voc", "VOC", "segmentation", "voc", "VOC", placement="squash", max_steps=10_000),
        _deap(
            "coco-stuff",
            "COCO-Stuff",
            "segmentation",
            "coco_stuff",
            "COCO-Stuff",
            outputs=200,
            width=32,
            limit=100_000,
            max_steps=20_000,
        ),
        _deap("depth", "depth", "depth", "nyu", "depth", placement="squash", limit=42_000, max_steps=3_000),
        _probe("probe-coco", "COCO, 27 groups", "coco_stuff27", epochs=5),
        _probe("probe-voc", "VOC, 448 px", "voc"),
        _probe("probe-ade20k", "ADE20K", "ade20k"),
        _probe("probe-cityscapes", "Cityscapes", "cityscapes"),
    )
}
"""By name, in the order of the tables' columns."""

DEAP_TASKS = ("instances", "boundaries", "detection", "voc", "coco-stuff", "depth")
"""Of DeAP's Table 3."""


def find_task(word: str) -> PublishedTask:
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
    return PublishedTask(name=word, label=f"{task}, {dataset}", task=task, dataset=dataset, columns=COLUMNS[task])


# --- numbers ----------------------------------------------------------------------------------------------------------


def _row(
    ari: float, bd: tuple[float, float], ap: float, voc: tuple[float, float], stuff: tuple[float, float], rmse: float
) -> dict[str, tuple[float, ...]]:
    values = ((ari,), bd, (ap,), voc, stuff, (rmse,))
    return dict(zip(DEAP_TASKS, values, strict=True))


TABLE_3: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "untrained": _row(23.5, (0.2544, 0.8), 0.0015, (2.7364, 3.5), (5.0889, 0.1), 1.253),
    "supervised": _row(36.3, (0.1787, 16.0), 0.1126, (0.3924, 61.0), (1.5140, 28.1), 0.769),
    "sam2": _row(50.0, (0.1394, 30.2), 0.1759, (0.6005, 33.9), (2.0630, 12.6), 0.754),
    "moco-v3": _row(41.8, (0.1613, 21.4), 0.2078, (0.3274, 63.3), (1.4417, 27.3), 0.680),
    "dino": _row(41.5, (0.1433, 28.3), 0.2344, (0.3397, 63.8), (1.3423, 30.2), 0.672),
    "dinov2-b": _row(46.8, (0.1297, 32.4), 0.2666, (0.1259, 83.4), (1.0468, 42.8), 0.449),
    "dinov2-l": _row(46.4, (0.1450, 33.8), 0.2811, (0.1173, 85.3), (1.0347, 43.8), 0.429),
    "mae": _row(49.8, (0.1500, 25.3), 0.2662, (0.3471, 60.2), (1.4822, 25.3), 0.631),
    "hiera": _row(44.8, (0.1717, 17.1), 0.2315, (0.3344, 61.5), (1.5007, 25.7), 0.556),
    "clip-b": _row(39.5, (0.1665, 19.0), 0.1391, (0.2710, 68.3), (1.3367, 32.0), 0.646),
    "clip-l": _row(40.6, (0.1543, 24.3), 0.2005, (0.2228, 74.9), (1.2623, 35.5), 0.590),
    "metaclip": _row(38.4, (0.1669, 19.1), 0.1667, (0.2580, 69.4), (1.3427, 31.9), 0.648),
    "siglip-224": _row(37.8, (0.1718, 17.2), 0.1677, (0.2898, 67.1), (1.3355, 33.0), 0.674),
    "siglip-384": _row(39.1, (0.1564, 23.3), 0.1836, (0.2137, 73.9), (1.2565, 35.4), 0.627),
    "siglip-512": _row(38.9, (0.1496, 26.2), 0.1910, (0.2203, 75.7), (1.2435, 36.3), 0.620),
    "siglip-so": _row(40.7, (0.1496, 25.7), 0.1952, (0.1908, 77.9), (1.1737, 38.8), 0.556),
    "aim2": _row(40.0, (0.1556, 23.5), 0.2011, (0.2244, 75.2), (1.1957, 37.5), 0.562),
    "vitamin": _row(42.1, (0.1535, 24.4), 0.1648, (0.1843, 77.9), (1.1757, 37.9), 0.541),
}
"""DeAP's results by backbone and task, in the order of each task's columns."""

_TABLE_5_BACKBONES = ("dinov2-b", "siglip-384", "mae")
_TABLE_5 = {
    "deap-8-dim": ((0.2448, 0.1722, 0.2529), (82.8, 70.4, 55.6), (0.4697, 0.6626, 0.6111)),
    "deap-no-sigma": ((0.1791, 0.1196, 0.1712), (50.5, 38.1, 35.1), (0.6660, 0.8362, 0.7360)),
    "deap-no-indiv-sigma": ((0.2409, 0.1520, 0.2429), (83.8, 70.2, 58.6), (0.4797, 0.6552, 0.6657)),
    "deap-only-mask": ((0.2606, 0.1934, 0.2673), (82.7, 73.0, 60.0), (0.4712, 0.6378, 0.5887)),
}
"""Ablations: AP_lg, VOC's IoU and RMSE of the three backbones."""

_TABLE_1_MODEL = "vit_small_plus_patch16_dinov3.lvd1689m"
_TABLE_1 = {
    "probe-coco": (63.10, 81.85),
    "probe-voc": (84.88, 96.45),
    "probe-ade20k": (43.27, 76.17),
    "probe-cityscapes": (61.36, 93.44),
}
"""ViT-Up's, of the backbone's own map with bilinear logits: mIoU and accuracy."""


def published_values(backbone: str, model: str, method: str, task: str) -> tuple[float | None, ...]:
    """What a paper has for the task's columns; () where it has nothing. `backbone` as pipelines/tables/backbones.py has it."""
    if method == "deap":
        return TABLE_3.get(backbone, {}).get(task, ())
    if method == "linear" and model == _TABLE_1_MODEL:
        return _TABLE_1.get(task, ())
    if method in _TABLE_5 and backbone in _TABLE_5_BACKBONES and task in ("detection", "voc", "depth"):
        values = dict(zip(("detection", "voc", "depth"), _TABLE_5[method], strict=True))
        value = values[task][_TABLE_5_BACKBONES.index(backbone)]
        return (None, value) if task == "voc" else (value,)
    return ()
