"""ViT-Up: its numbers and its recipes."""

from collections.abc import Mapping, Sequence

from pipelines.published import SPAIR_PAIRS, Paper, Published, Recipe, Settings, Values
from storage.documents import JsonObject

VIT_UP = Paper(name="ViT-Up", arxiv="2606.14024")

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


def _probe(label: str, dataset: str, **settings: bool | int | float | str) -> Recipe:
    settings = {**VIT_UP_PROBE, **settings}
    return Recipe(paper=VIT_UP, label=label, task="segmentation", dataset=dataset, settings=settings)


PROBE_RECIPES: Mapping[str, Recipe] = {
    "probe-coco": _probe("COCO, 27 groups", "coco_stuff27", epochs=5),
    "probe-voc": _probe("VOC, 448 px", "voc"),
    "probe-ade20k": _probe("ADE20K", "ade20k"),
    "probe-cityscapes": _probe("Cityscapes", "cityscapes"),
}
"""Table 1's linear probes by name, in the order of its columns."""

PROBE_TASKS = tuple(PROBE_RECIPES)

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
        "items": SPAIR_PAIRS,
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
