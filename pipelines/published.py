"""What the papers print and how they train, each number once: tables that reports show beside measured ones, and recipes.

Numbers are in the units of their tables. Reports ask for them with `--paper`; presets of jobs/ take the recipes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from storage.documents import JsonObject

Values: TypeAlias = Mapping[str, float]
"""By the name of the column, as our reports have it: a number belongs to its name, wherever that stands in a table."""

Settings: TypeAlias = Mapping[str, bool | int | float | str]
"""Settings of a job by their flat names, as flags have them (with `_` for `-`)."""


UNSAID = ""
"""The key of numbers whose input size a paper doesn't say: they stand below whichever was measured."""


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A paper whose methods and measurements are here."""

    name: str
    arxiv: str = ""
    "its number; empty where it isn't there"


LIFT = Paper(name="LiFT", arxiv="2403.14625")
VIT_UP = Paper(name="ViT-Up", arxiv="2606.14024")
JAFAR = Paper(name="JAFAR", arxiv="2506.11136")
FEATUP = Paper(name="FeatUp", arxiv="2403.10516")
DEAP = Paper(name="DeAP")
"""Characterizing Vision Backbones for Dense Prediction with Dense Attentive Probing (TMLR)."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """Numbers of one table: rows, each with the values of its columns under one or several keys (input sizes, tasks, ...)."""

    paper: Paper
    table: str
    "as it is called there; `paper` where our notes don't say which it is"
    of: str = ""
    "the backbone"
    rows: Mapping[str, Mapping[str, Values]] = field(default_factory=dict)
    finer: Literal["x2", "pixels", "quarter"] = "x2"
    "the grid of all rows but the backbone's: of its own a multiple, or the input's pixels, or a quarter of these a side"
    settings: JsonObject = field(default_factory=dict)
    "what else they are of, as this code has it: fields of a `FeatureSpec`, and settings of the evaluation with their defaults"

    @property
    def source(self) -> str:
        """What a report calls a line of it."""
        return f"{self.paper.name} {self.table}{', ' if self.of else ''}{self.of}"

    def values(self, row: str, key: str) -> Values:
        """Of the columns; none where the paper has none."""
        found = self.rows.get(row, {})
        return found.get(key, found.get(UNSAID, {}))


VITDET_TRAINING: Settings = {
    "method": "mask_rcnn", "model": "base", "size": 1024, "batch": 64, "micro_batch": 1, "epochs": 101, "max_steps": 184_375,
    "lr": 1e-4, "weight_decay": 0.1, "schedule": "steps", "warmup_steps": 250, "net_precision": "bf16",
}  # fmt: skip
"""ViTDet (arXiv 2203.16527) on COCO, from MAE's weights, as its released configuration has it: 100 epochs, an image a GPU. It has
fp16 with scaled gradients, where this has bf16."""

# --- LiFT -------------------------------------------------------------------------------------------------------------

LIFT_FEATURES: Settings = {"model": "vit_small_patch16_224.dino", "facet": "key", "pos_embed": "dino", "precision": "fp32"}
"""What LiFT's tables are of: keys of DINO ViT-S/16's last block, with DINO's own interpolation of position embeddings."""

_LIFT_MAPS: JsonObject = {
    "model": "vit_small_patch16_224.dino", "weights": "pretrained", "model_args": {}, "layers": [11], "facet": "key",
    "stride": 16, "pos_embed": "dino",
}  # fmt: skip
"""The same, as a `FeatureSpec` has it."""

LIFT_TRAINING: Settings = {"interpolation": "bilinear", "batch": 256, "epochs": 5, "lr": 1e-3, "jitter": 0.0}
"""On ImageNet-1k without labels, 25,025 steps of Adam, cosine distance; images squashed to 448 px. No jitter, as the official
script has it there. The paper says about 8 h on one A6000."""


LIFT_FOR_VITDET: Settings = {
    "model": "vitdet_base", "facet": "token", "geometry": "corner", "size": 1024, "pairs": 1, "lower": "resized",
    "image_width": 200, "image_convs": 1, "batch": 64, "micro_batch": 16, "epochs": 100, "lr": 1e-3,
}  # fmt: skip
"""LiFT for a ViTDet's backbone (section 3.5 and supplement B: 7 M parameters, wider layers and one more block in the image
encoder, the usual loss, 100 epochs of COCO's images). The rest is ours: how wide; images as the detector has them, and the half
of 1,024 px, which is what it will have; a batch of about as many cells as LiFT's own. No duration is published."""

LIFT_VITDET_HEADS: Settings = {
    "size": 512, "batch": 64, "micro_batch": 1, "epochs": 1, "lr": 3e-5, "weight_decay": 0.1, "schedule": "steps",
    "warmup_steps": 250, "net_precision": "bf16",
}  # fmt: skip
"""A trained ViTDet's pyramid and heads on the maps of such a LiFT (section 3.5 says that they are finetuned briefly). Ours: 512
px, of which LiFT makes the frame of 1,024 that the heads know; three tenths of ViTDet's learning rate; one epoch."""


def _by_size(columns: Mapping[str, Sequence[float]]) -> dict[str, Values]:
    """The values of each column at 56, 112, 224 and 448 px."""
    sizes = ("56", "112", "224", "448")
    return {size: {name: values[i] for name, values in columns.items()} for i, size in enumerate(sizes)}


def _lift(table: str, columns: Sequence[str], settings: JsonObject, **rows: Sequence[Sequence[float]]) -> Published:
    """Of each row, the columns, each with its values by size."""
    found = {name: _by_size(dict(zip(columns, values, strict=True))) for name, values in rows.items()}
    every = {**_LIFT_MAPS, "drawing": "paper", "limit": None, "left_out": 0}
    return Published(paper=LIFT, table=table, of="DINO ViT-S/16", rows=found, settings={**every, **settings})


_SPAIR = 12_234
"""Pairs of its test split. How many items a data set lists tells it from others in its layout."""

LIFT_CORRESPONDENCE = _lift(
    "Table 1",
    ("PCK@0.1", "PCK@0.05", "PCK@0.01"),
    {
        "items": _SPAIR,
        "split": "test",
        "pairs_per_category": 100,
        "key_points": "pairs",
        "threshold": "box",
        "candidates": "pixels",
    },
    backbone=[[2.04, 12.67, 24.76, 28.6], [0.51, 3.61, 9.54, 15.33], [0.01, 0.2, 0.54, 1.4]],
    bilinear=[[3.81, 13.71, 26.72, 30.48], [1.01, 4.23, 11.37, 16.75], [0.02, 0.14, 0.5, 1.64]],
    resize_conv=[[3.87, 14.02, 26.09, 30.21], [0.94, 4.41, 11.51, 16.76], [0.03, 0.16, 0.51, 1.7]],
    jbu=[[3.08, 12.26, 24.87, 29.11], [0.82, 3.82, 10.6, 16.01], [0.03, 0.17, 0.47, 1.42]],
    lift=[[5.05, 17.72, 28.68, 31.38], [1.19, 6.29, 14.72, 18.90], [0.06, 0.29, 0.91, 2.52]],
)
"""SPair-71k, by method and side of the input."""

LIFT_VIDEO = _lift(
    "paper",
    ("J&F", "J", "F"),
    {
        "items": 30,
        "split": "val",
        "resolution": "480p",
        "frame_step": 1,
        "context": 7,
        "top_k": 5,
        "radius": 12,
        "temperature": 0.1,
    },
    backbone=[[7.4, 17.5, 33.0, 50.9], [9.5, 21.9, 37.8, 52.1], [5.2, 13.1, 28.1, 49.7]],
    bilinear=[[10.8, 23.7, 37.0, 53.0], [13.7, 29.4, 42.8, 54.0], [7.9, 17.9, 31.2, 52.0]],
    resize_conv=[[11.0, 24.0, 37.4, 53.2], [13.8, 29.6, 43.0, 53.9], [8.2, 18.4, 31.9, 52.5]],
    jbu=[[11.2, 26.2, 39.0, 54.5], [13.9, 30.6, 42.8, 54.9], [8.6, 21.7, 35.1, 54.1]],
    lift=[[13.0, 28.0, 44.3, 61.1], [16.27, 33.04, 48.07, 59.43], [9.72, 23.0, 40.56, 62.79]],
)
"""DAVIS-2017, by method and side of the input."""


def _lift_detection(of: str, backbone: Sequence[float], lift: Sequence[float]) -> Published:
    """A half of Table 4: AP, AP50 and AP75 of boxes, and of masks."""
    names = [f"{kind} {name}" for kind in ("box", "mask") for name in ("AP", "AP50", "AP75")]
    rows = {"backbone": backbone, "lift": lift}
    return Published(
        paper=LIFT,
        table="Table 4",
        of=of,
        rows={row: {UNSAID: dict(zip(names, values, strict=True))} for row, values in rows.items()},
        settings={
            "channels": 768, "blocks": 12, "classes": 80, "weights": "trained", "heads trained on these maps": True,
            "items": 5_000, "split": "val2017", "limit": None, "left_out": 0,
        },
    )  # fmt: skip


LIFT_DETECTION: Mapping[str, Published] = {
    "mask_rcnn": _lift_detection(
        "ViTDet-B, Mask R-CNN", [39.50, 61.56, 42.23, 37.81, 60.47, 39.97], [45.98, 66.41, 49.87, 40.78, 63.34, 43.57]
    ),
    "cascade": _lift_detection(
        "ViTDet-B, Cascade R-CNN", [45.65, 64.39, 48.90, 40.93, 62.86, 44.28], [47.92, 65.88, 51.67, 41.42, 63.21, 44.45]
    ),
}
"""COCO's val2017, by method. The paper doesn't say its input size, nor how long heads were finetuned."""

_CORLOC = ("CorLoc",)

LIFT_DISCOVERY: Mapping[str, Published] = {
    "voc07": _lift(
        "paper",
        _CORLOC,
        {"items": 5_011, "split": "trainval", "tau": 0.2, "weighted": False, "solver": "official"},
        backbone=[[20.74, 50.07, 65.60, 68.27]],
        bilinear=[[21.27, 46.96, 64.70, 68.37]],
        resize_conv=[[28.96, 55.00, 66.85, 68.87]],
        jbu=[[26.16, 56.60, 66.75, 69.03]],
        lift=[[36.54, 62.02, 68.79, 69.65]],
    ),
    "voc12": _lift(
        "paper",
        _CORLOC,
        {"items": 11_540, "split": "trainval", "tau": 0.2, "weighted": False, "solver": "official"},
        backbone=[[23.27, 55.33, 69.01, 71.64]],
        bilinear=[[23.46, 52.64, 68.53, 71.55]],
        resize_conv=[[31.63, 59.96, 68.87, 71.47]],
        jbu=[[28.97, 61.67, 69.13, 71.54]],
        lift=[[40.56, 66.21, 70.91, 71.71]],
    ),
    "coco20k": _lift(
        "paper",
        _CORLOC,
        {"items": 19_817, "tau": 0.3, "weighted": False, "solver": "official"},
        backbone=[[16.28, 40.08, 53.98, 57.99]],
        bilinear=[[17.78, 35.62, 51.53, 56.84]],
        resize_conv=[[22.92, 42.53, 54.52, 58.40]],
        jbu=[[21.36, 43.87, 55.45, 58.82]],
        lift=[[27.72, 50.20, 58.03, 60.50]],
    ),
}
"""By data set; of each, by method and side of the input."""


LIFT_RIVALS: Mapping[str, Mapping[str, Sequence[float]]] = {
    "leopart": {
        "PCK@0.1": (2.35, 11.2, 23.33, 26.54), "PCK@0.05": (0.6, 3.22, 8.9, 12.26), "PCK@0.01": (0.05, 0.1, 0.47, 0.79),
        "J&F": (6.9, 16.1, 30.3, 45.1), "J": (9.0, 20.2, 34.9, 47.3), "F": (4.8, 12.1, 25.7, 42.8),
        "voc07": (18.92, 32.59, 51.59, 48.79), "voc12": (22.44, 37.41, 55.74, 54.40), "coco20k": (16.14, 26.78, 43.89, 44.08),
    },
    "selfpatch": {
        "PCK@0.1": (2.13, 12.18, 23.03, 27.34), "PCK@0.05": (0.44, 3.61, 9.32, 14.44), "PCK@0.01": (0.02, 0.17, 0.42, 1.12),
        "J&F": (7.4, 17.2, 33.0, 51.4), "J": (9.7, 21.6, 38.1, 52.5), "F": (5.1, 12.9, 27.9, 50.3),
        "voc07": (18.04, 41.99, 62.40, 63.62), "voc12": (20.19, 47.32, 68.02, 66.48), "coco20k": (14.15, 35.76, 52.18, 55.47),
    },
}  # fmt: skip
"""Other networks' own maps, as `LIFT_SIDES` has them: Tables 1 to 3 and their supplements; of discovery, CorLoc by data set."""

LIFT_SIDES = ("56", "112", "224", "448")

LIFT_BACKBONES: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]] = {
    "dino-b16": {
        "backbone": {
            "PCK@0.1": (1.98, 12.20, 24.90, 28.22), "PCK@0.05": (0.46, 3.61, 9.64, 15.04), "PCK@0.01": (0.01, 0.17, 0.52, 1.15)
        },
        "lift": {
            "PCK@0.1": (5.43, 17.74, 29.35, 31.27), "PCK@0.05": (1.29, 6.56, 14.80, 18.10), "PCK@0.01": (0.04, 0.37, 0.92, 2.43)
        },
    },
    "dino-s8": {
        "backbone": {
            "PCK@0.1": (9.39, 21.30, 31.05, 32.15), "PCK@0.05": (2.35, 8.44, 16.74, 18.96), "PCK@0.01": (0.15, 0.39, 1.19, 2.32)
        },
        "lift": {
            "PCK@0.1": (12.90, 26.73, 34.54, 34.58), "PCK@0.05": (4.35, 11.99, 20.61, 21.01), "PCK@0.01": (0.18, 0.75, 2.21, 3.77)
        },
    },
    "dino-b8": {
        "backbone": {
            "PCK@0.1": (8.88, 20.40, 30.08, 30.89), "PCK@0.05": (2.83, 7.70, 15.81, 17.84), "PCK@0.01": (0.12, 0.39, 1.09, 1.95)
        },
        "lift": {
            "PCK@0.1": (12.21, 25.17, 33.23, 33.17), "PCK@0.05": (4.22, 11.73, 19.39, 20.18), "PCK@0.01": (0.13, 0.69, 2.27, 3.32)
        },
    },
    "moco": {
        "backbone": {
            "PCK@0.1": (1.27, 3.43, 7.37, 12.31), "PCK@0.05": (0.21, 0.84, 2.35, 5.49), "PCK@0.01": (0.0, 0.03, 0.10, 0.31)
        },
        "lift": {
            "PCK@0.1": (6.48, 10.51, 14.13, 16.34), "PCK@0.05": (1.74, 3.36, 6.42, 8.05), "PCK@0.01": (0.04, 0.16, 0.42, 0.73)
        },
        "lift twice": {"PCK@0.1": (8.72, 13.21, 16.12, 17.08)},
    },
    "vit": {
        "backbone": {
            "PCK@0.1": (1.26, 5.72, 13.23, 16.90), "PCK@0.05": (0.27, 1.62, 4.89, 7.34), "PCK@0.01": (0.02, 0.06, 0.30, 0.50)
        },
        "lift": {
            "PCK@0.1": (3.76, 9.21, 16.58, 18.69), "PCK@0.05": (1.02, 2.71, 6.63, 8.81), "PCK@0.01": (0.02, 0.13, 0.45, 0.72)
        },
        "lift twice": {"PCK@0.1": (5.17, 9.89, 16.49, 18.18)},
    },
    "leopart": {
        "lift": {
            "PCK@0.1": (4.24, 15.61, 27.77, 30.06), "PCK@0.05": (1.22, 5.16, 12.81, 15.66), "PCK@0.01": (0.02, 0.25, 0.74, 1.39)
        }
    },
    "dino-s16": {"lift twice": {"PCK@0.1": (7.42, 20.12, 29.45, 31.35)}},
}  # fmt: skip
"""Supplement: SPair-71k by backbone and map, as `LIFT_SIDES` has them."""

LIFT_ABLATIONS: Mapping[str, Sequence[float]] = {
    "random": (1.45, 2.37, 4.21, 6.16),
    "no-image": (4.38, 15.74, 28.49, 31.42),
    "l1": (4.48, 16.64, 27.77, 31.03),
    "l2": (4.82, 17.72, 28.17, 31.13),
}
"""Supplement: PCK@0.1 of LiFT that is trained otherwise, or not at all, as `LIFT_SIDES` has them."""

LIFT_EPOCHS: Mapping[int, tuple[float, float]] = {
    5: (17.47, 28.45), 10: (17.53, 28.50), 30: (17.75, 28.65), 50: (17.97, 29.00), 100: (18.14, 29.11)
}  # fmt: skip
"""Supplement: PCK@0.1 at 112 and 224 px by epochs of training; its 5 epochs are another run than Table 1's."""

LIFT_COMPUTE: Mapping[tuple[int, int], Mapping[str, tuple[float, float]]] = {
    (224, 16): {"backbone": (24.76, 33.0), "lift": (28.68, 44.3)},
    (224, 8): {"backbone": (29.92, 43.9), "lift": (31.91, 52.6)},
    (448, 16): {"backbone": (28.60, 50.9), "lift": (31.38, 61.1)},
    (448, 8): {"backbone": (31.92, 61.9), "lift": (32.20, 69.7)},
}
"""Table 5: PCK@0.1 and J&F by side of the input and stride; operations are `LIFT_OPERATIONS`."""

LIFT_CROSSED: Mapping[str, tuple[float | None, float]] = {"dino-s16": (28.6, 31.38), "moco": (12.31, 16.34), "vit": (16.9, 18.69)}
"""Table 7's diagonal: PCK@0.1 at 448 px without LiFT, and with that trained on the same backbone. Our copy of its other cells is
damaged; all of them are below the first."""


@dataclass(frozen=True, kw_only=True)
class Operations:
    """A row of LiFT's Tables 5 and 6: 10^9 "FLOPs" (multiply-accumulates, by its count) of DINO's keys alone and with LiFT."""

    model: str
    size: int
    stride: int
    alone: float
    lift: float | None


LIFT_OPERATIONS = (
    Operations(model="vit_small_patch16_224.dino", size=224, stride=16, alone=4.34, lift=5.30),
    Operations(model="vit_small_patch16_224.dino", size=224, stride=8, alone=16.07, lift=19.65),
    Operations(model="vit_small_patch16_224.dino", size=448, stride=16, alone=17.28, lift=21.12),
    Operations(model="vit_small_patch16_224.dino", size=448, stride=8, alone=66.60, lift=81.18),
    Operations(model="vit_base_patch16_224.dino", size=224, stride=16, alone=17.21, lift=None),
)

# --- ViT-Up -----------------------------------------------------------------------------------------------------------

VIT_UP_FEATURES: Settings = {"model": "vit_small_plus_patch16_dinov3.lvd1689m", "precision": "bf16"}
"""What ViT-Up's tables are of, at 448 px: DINOv3 ViT-S+/16."""

VIT_UP_SIZE = 448

_VIT_UP_MAPS: JsonObject = {
    "model": VIT_UP_FEATURES["model"], "weights": "pretrained", "model_args": {}, "layers": [11], "facet": "token", "norm": True,
    "stride": 16,
}  # fmt: skip
"""The same, as a `FeatureSpec` has it."""

VIT_UP_TRAINING: Settings = {"max_steps": 53_381}
"""One epoch of ImageNet-1k in batches of 24; what else there is to set has the published value by default."""

VIT_UP_PROBE: Settings = {
    "size": 448, "side": 448, "flip": True, "batch": 4, "epochs": 20, "lr": 2e-3, "weight_decay": 1e-5, "schedule": "cosine"
}  # fmt: skip
"""Linear probes of 448 px: AdamW falling to 0, batches of 4, mirrored at random; the published seed is 42."""

VIT_UP_SEED = 42

VIT_UP_CORRESPONDENCE = Published(
    paper=VIT_UP,
    table="Table 2",
    of="DINOv3-S+",
    rows={
        "bilinear": {"448": {"PCK@0.1": 51.27, "PCK@0.05": 33.74, "PCK@0.01": 3.83}},
        "jafar": {"448": {"PCK@0.1": 36.82, "PCK@0.05": 18.59, "PCK@0.01": 1.89}},
        "anyup": {"448": {"PCK@0.1": 37.63, "PCK@0.05": 19.31, "PCK@0.01": 1.97}},
        "uplift": {"448": {"PCK@0.1": 46.87, "PCK@0.05": 29.15, "PCK@0.01": 3.43}},
        "naf": {"448": {"PCK@0.1": 48.68, "PCK@0.05": 33.96, "PCK@0.01": 2.89}},
        "vit_up": {"448": {"PCK@0.1": 55.44, "PCK@0.05": 39.07, "PCK@0.01": 7.30}},
    },
    finer="pixels",
    settings={
        **_VIT_UP_MAPS,
        "items": _SPAIR,
        "split": "test", "pairs_per_category": 0, "key_points": "images", "threshold": "box", "candidates": "pixels",
        "drawing": "paper", "limit": None, "left_out": 0,
    },
)  # fmt: skip
"""SPair-71k, by method and side of the input."""

VIT_UP_NAVI = Published(
    paper=VIT_UP,
    table="Table 2",
    of="DINOv3-S+",
    rows={
        "bilinear": {"448": {"5 cm": 80.16, "2 cm": 51.18, "1 cm": 33.58}},
        "jafar": {"448": {"5 cm": 79.04, "2 cm": 47.02, "1 cm": 26.60}},
        "anyup": {"448": {"5 cm": 80.31, "2 cm": 48.78, "1 cm": 28.37}},
        "uplift": {"448": {"5 cm": 79.35, "2 cm": 49.05, "1 cm": 30.49}},
        "naf": {"448": {"5 cm": 80.03, "2 cm": 50.29, "1 cm": 31.62}},
        "vit_up": {"448": {"5 cm": 80.81, "2 cm": 51.59, "1 cm": 33.83}},
    },
    finer="quarter",
    settings={**_VIT_UP_MAPS, "matches": 1000, "every": 4, "drawing": "paper", "limit": None, "left_out": 0},
)
"""NAVI's geometric correspondence. The table heads its columns 0.10, 0.05 and 0.01, which its code doesn't produce."""

VIT_UP_PROBES = Published(
    paper=VIT_UP,
    table="Table 1",
    of="DINOv3-S+",
    rows={
        "bilinear": {
            "probe-coco": {"mIoU": 63.10, "acc": 81.85},
            "probe-voc": {"mIoU": 84.88, "acc": 96.45},
            "probe-ade20k": {"mIoU": 43.27, "acc": 76.17},
            "probe-cityscapes": {"mIoU": 61.36, "acc": 93.44},
        },
        "vit_up": {
            "probe-coco": {"mIoU": 64.09, "acc": 82.49},
            "probe-voc": {"mIoU": 87.47, "acc": 97.14},
            "probe-ade20k": {"mIoU": 44.73, "acc": 77.06},
            "probe-cityscapes": {"mIoU": 65.41, "acc": 94.73},
        },
    },
)
"""By method and task; `bilinear` is the backbone's own map, whose logits are enlarged."""


VIT_UP_SEGMENTATION: Mapping[str, Mapping[str, Sequence[float]]] = {
    "jafar": {"COCO": (62.50, 81.50), "VOC": (83.88, 96.16), "ADE20K": (42.48, 75.81), "Cityscapes": (57.78, 92.47)},
    "anyup": {"COCO": (63.03, 81.83), "VOC": (84.54, 96.34), "ADE20K": (42.77, 76.02), "Cityscapes": (58.96, 92.93)},
    "uplift": {"COCO": (63.79, 82.28), "VOC": (85.69, 96.72), "ADE20K": (44.24, 76.71), "Cityscapes": (63.08, 93.94)},
    "naf": {"COCO": (63.86, 82.33), "VOC": (85.84, 96.72), "ADE20K": (44.17, 76.69), "Cityscapes": (63.34, 94.13)},
}
"""Table 1, of the methods that `VIT_UP_PROBES` lacks: mIoU and accuracy in percent."""

VIT_UP_DEPTH: Mapping[str, tuple[float, float]] = {
    "bilinear": (61.52, 62.80), "jafar": (60.64, 64.92), "anyup": (61.66, 62.62), "uplift": (61.84, 61.79), "naf": (62.17, 61.15),
    "vit_up": (62.72, 59.82),
}  # fmt: skip
"""Table 1's depth: delta 1 in percent, and RMSE times 100, of targets that Depth Anything V2 predicts."""

VIT_UP_LARGER: Mapping[str, Mapping[str, float]] = {
    "bilinear": {"VOC": 87.20, "Cityscapes": 64.21, "PCK@0.1": 50.01, "PCK@0.05": 34.03, "PCK@0.01": 3.89},
    "naf": {"VOC": 88.07, "Cityscapes": 66.45, "PCK@0.1": 47.19, "PCK@0.05": 29.09, "PCK@0.01": 3.41},
    "vit_up": {"VOC": 89.18, "Cityscapes": 69.81, "PCK@0.1": 58.10, "PCK@0.05": 42.00, "PCK@0.01": 7.93},
}
"""Table 4, of DINOv3-B: mIoU, and PCK on SPair-71k, in percent."""


def _cost(ms: float, mebibytes: float) -> Values:
    return {"ms": ms, "peak MiB": mebibytes}


VIT_UP_RUNTIME = Published(
    paper=VIT_UP,
    table="Table 9",
    of="DINOv3-S+",
    rows={
        "jafar": {"112": _cost(41.3, 541.0), "224": _cost(43.5, 1721.6), "448": _cost(52.9, 6448.5)},
        "anyup": {"112": _cost(6.8, 485.9), "224": _cost(15.3, 774.1), "448": _cost(59.8, 2760.7)},
        "uplift": {"112": _cost(6.4, 606.6), "224": _cost(7.2, 765.7), "448": _cost(10.1, 1391.5)},
        "naf": {"112": _cost(29.1, 602.6), "224": _cost(30.7, 602.9), "448": _cost(37.4, 1780.5)},
        "vit_up, 112 x 112 at once": {"112": _cost(14.2, 503.7), "224": _cost(24.1, 503.9), "448": _cost(62.6, 626.7)},
        "vit_up, 224 x 224 at once": {"224": _cost(22.1, 1069.6), "448": _cost(55.4, 1143.6)},
        "vit_up, 448 x 448 at once": {"448": _cost(52.0, 3709.3)},
    },
    settings={
        "model": "vit_small_plus_patch16_dinov3", "model_args": {}, "layers": [11], "stride": 16, "precision": "bf16",
        "size": VIT_UP_SIZE,
    },
)  # fmt: skip
"""bf16, on a GPU that the paper doesn't name: by method and side of the output grid. ViT-Up's, by its queries at once."""

VIT_UP_RUNTIME_SETTINGS: Mapping[str, JsonObject] = {"anyup": {"natten": True}}
"""What it is of where that isn't a method's default: AnyUp's variant with NATTEN's neighbourhoods."""

RELEASED_PARAMETERS: Mapping[str, float] = {
    "jafar": 628_480, "anyup": 878_080, "uplift": 789_521, "naf": 662_528, "vit_up": 24.9e6
}  # fmt: skip
"""Of the networks that their authors released, for maps of 384 channels; ViT-Up's is Table 9's."""

# --- JAFAR and FeatUp -------------------------------------------------------------------------------------------------

JAFAR_TRAINING: Settings = {"model": "vit_small_patch14_dinov2.lvd142m", "max_steps": 100_000}
"""On ImageNet-1k in batches of 4, images of 448 px; what else there is to set has the published value by default."""

FEATUP_TRAINING: Settings = {"model": "vit_small_patch14_dinov2.lvd142m"}
"""One pass over COCO-Stuff's photographs in batches of 4, images of 224 px; likewise."""

# --- DeAP -------------------------------------------------------------------------------------------------------------

DEAP_FEATURES: Settings = {"model": "vit_base_patch14_reg4_dinov2.lvd142m", "size": 518}
"""DINOv2-B, of which the ablations are."""

DEAP_FEATUP: Settings = {"model": "vit_small_patch14_dinov2.lvd142m", "size": 280, "side": 280}
"""What its release compares with as FeatUp reads, beside FeatUp's file with its LayerNorm, and gives: 320 x 320 cells, 280 px."""

DEAP_TRAINING: Settings = {"epochs": 100_000}
"""AdamW 1e-3, weight decay 0.01, batches of 32, as by default; a number of steps is published, not of passes."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a paper trains readouts for a task, as settings of jobs/train.py."""

    paper: Paper
    label: str
    "as tables have it"
    task: str
    dataset: str
    settings: Settings


def _deap(label: str, task: str, dataset: str, **settings: bool | int | float | str) -> Recipe:
    return Recipe(paper=DEAP, label=label, task=task, dataset=dataset, settings={**DEAP_TRAINING, **settings})


def _probe(label: str, dataset: str, **settings: bool | int | float | str) -> Recipe:
    settings = {**VIT_UP_PROBE, **settings}
    return Recipe(paper=VIT_UP, label=label, task="segmentation", dataset=dataset, settings=settings)


RECIPES: Mapping[str, Recipe] = {
    # About 60,000 classes; its steps aren't published.
    "instances": _deap("instances", "instances", "coco", limit=8_000, max_steps=20_000),
    "boundaries": _deap("boundaries", "boundaries", "coco", limit=5_000, max_steps=10_000),
    "detection": _deap("detection", "detection", "coco", limit=100_000, max_steps=20_000),
    # Under 16 minutes on an RTX 2080.
    "voc": _deap("VOC", "segmentation", "voc", placement="squash", max_steps=10_000),
    "coco-stuff": _deap("COCO-Stuff", "segmentation", "coco_stuff", outputs=200, width=32, limit=100_000, max_steps=20_000),
    "depth": _deap("depth", "depth", "nyu", placement="squash", limit=42_000, max_steps=3_000),
    "probe-coco": _probe("COCO, 27 groups", "coco_stuff27", epochs=5),
    "probe-voc": _probe("VOC, 448 px", "voc"),
    "probe-ade20k": _probe("ADE20K", "ade20k"),
    "probe-cityscapes": _probe("Cityscapes", "cityscapes"),
}
"""By name, in the order of the tables' columns: DeAP's, and ViT-Up's linear probes."""

DEAP_TASKS = tuple(name for name, recipe in RECIPES.items() if recipe.paper is DEAP)
"""Of DeAP's Table 3."""

PROBE_TASKS = tuple(name for name, recipe in RECIPES.items() if recipe.paper is VIT_UP)
"""Of ViT-Up's Table 1."""


def _row(
    ari: float, bd: tuple[float, float], ap: float, voc: tuple[float, float], stuff: tuple[float, float], rmse: float
) -> dict[str, Values]:
    both = [dict(zip(("CE", "IoU"), each, strict=True)) for each in (bd, voc, stuff)]
    return dict(zip(DEAP_TASKS, ({"ARI": ari}, both[0], {"AP_lg": ap}, both[1], both[2], {"RMSE": rmse}), strict=True))


DEAP_RESULTS = Published(
    paper=DEAP,
    table="Table 3",
    rows={
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
    },
)
"""By backbone (pipelines/tables/backbones.py) and task: ARI in percent; cross-entropy and IoU in percent; AP_lg, of 1; twice
cross-entropy and IoU in percent; RMSE in metres."""

DEAP_ABLATED = ("dinov2-b", "siglip-384", "mae")
"""The backbones of its Table 5."""


def _ablation(detection: Sequence[float], voc: Sequence[float], depth: Sequence[float]) -> Mapping[str, Values]:
    """By task, of `DEAP_ABLATED`."""
    tasks = {"detection": detection, "voc": voc, "depth": depth}
    return {task: dict(zip(DEAP_ABLATED, values, strict=True)) for task, values in tasks.items()}


DEAP_ABLATIONS = Published(
    paper=DEAP,
    table="Table 5",
    rows={
        "deap-8-dim": _ablation((0.2448, 0.1722, 0.2529), (82.8, 70.4, 55.6), (0.4697, 0.6626, 0.6111)),
        "deap-no-sigma": _ablation((0.1791, 0.1196, 0.1712), (50.5, 38.1, 35.1), (0.6660, 0.8362, 0.7360)),
        "deap-no-indiv-sigma": _ablation((0.2409, 0.1520, 0.2429), (83.8, 70.2, 58.6), (0.4797, 0.6552, 0.6657)),
        "deap-only-mask": _ablation((0.2606, 0.1934, 0.2673), (82.7, 73.0, 60.0), (0.4712, 0.6378, 0.5887)),
    },
)
"""By method and task, AP_lg, VOC's IoU in percent or RMSE in metres of each backbone."""


DEAP_PARAMETERS: Mapping[tuple[str, int], tuple[float, ...]] = {
    ("ViT-B", 768): (0.053, 0.043, 0.087, 0.047, 0.088, 0.043),
    ("ViT-L, Aim2, ViTamin", 1024): (0.066, 0.056, 0.112, 0.060, 0.101, 0.056),
    ("SAM2 B+", 256): (0.028, 0.018, 0.035, 0.022, 0.062, 0.018),
    ("Hiera B+", 896): (0.060, 0.050, 0.099, 0.054, 0.094, 0.050),
    ("SigLIP-SO", 1152): (0.073, 0.062, 0.125, 0.066, 0.107, 0.062),
}
"""By backbones and channels of their maps: millions of learned parameters that the paper prints, by task, as `DEAP_TASKS`."""


def deap_values(backbone: str, method: str, task: str) -> Values:
    """What Table 3 or 5 has of the task, by the columns of DeAP's tables (of VOC, Table 5 has IoU alone)."""
    if method == "deap":
        return DEAP_RESULTS.values(backbone, task)
    found = DEAP_ABLATIONS.values(method, task)
    head = {"detection": "AP_lg", "voc": "IoU", "depth": "RMSE"}
    return {head[task]: found[backbone]} if backbone in found else {}
