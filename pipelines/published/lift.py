"""LiFT: its numbers and its recipes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.published import SPAIR_PAIRS, UNSAID, Paper, Published, Settings, Values
from storage.documents import JsonObject

LIFT = Paper(name="LiFT", arxiv="2403.14625")

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


LIFT_CORRESPONDENCE = _lift(
    "Table 1",
    ("PCK@0.1", "PCK@0.05", "PCK@0.01"),
    {
        "items": SPAIR_PAIRS,
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


def _scores(side: str) -> Mapping[str, tuple[float, float]]:
    """By method, PCK@0.1 of Table 1 and J&F, which Table 5 prints again."""
    pck, video = LIFT_CORRESPONDENCE, LIFT_VIDEO
    return {row: (pck.values(row, side)["PCK@0.1"], video.values(row, side)["J&F"]) for row in ("backbone", "lift")}


LIFT_COMPUTE: Mapping[tuple[int, int], Mapping[str, tuple[float, float]]] = {
    (224, 16): _scores("224"),
    (224, 8): {"backbone": (29.92, 43.9), "lift": (31.91, 52.6)},
    (448, 16): _scores("448"),
    (448, 8): {"backbone": (31.92, 61.9), "lift": (32.20, 69.7)},
}
"""Table 5: PCK@0.1 and J&F by side of the input and stride; operations are `LIFT_OPERATIONS`."""


def _at_448(backbone: str) -> tuple[float, float]:
    of = LIFT_BACKBONES[backbone]
    return of["backbone"]["PCK@0.1"][-1], of["lift"]["PCK@0.1"][-1]


LIFT_CROSSED: Mapping[str, tuple[float, float]] = {
    "dino-s16": (LIFT_COMPUTE[448, 16]["backbone"][0], LIFT_COMPUTE[448, 16]["lift"][0]),
    "moco": _at_448("moco"),
    "vit": _at_448("vit"),
}
"""Table 7's diagonal: PCK@0.1 at 448 px without LiFT, and with that trained on the same backbone, which other tables print, too.
Our copy of its other cells is damaged; all of them are below the first."""


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
