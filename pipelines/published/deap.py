"""DeAP: its numbers and its recipes."""

from collections.abc import Mapping, Sequence

from pipelines.published import Paper, Published, Recipe, Settings, Values

DEAP = Paper(name="DeAP")
"""Characterizing Vision Backbones for Dense Prediction with Dense Attentive Probing (TMLR)."""

DEAP_FEATURES: Settings = {"model": "vit_base_patch14_reg4_dinov2.lvd142m", "size": 518}
"""DINOv2-B, of which the ablations are."""

DEAP_FEATUP: Settings = {"model": "vit_small_patch14_dinov2.lvd142m", "size": 280, "side": 280}
"""What its release compares with as FeatUp reads, beside FeatUp's file with its LayerNorm, and gives: 320 x 320 cells, 280 px."""

DEAP_TRAINING: Settings = {"epochs": 100_000}
"""AdamW 1e-3, weight decay 0.01, batches of 32, as by default; a number of steps is published, not of passes."""


def _deap(label: str, task: str, dataset: str, **settings: bool | int | float | str) -> Recipe:
    return Recipe(paper=DEAP, label=label, task=task, dataset=dataset, settings={**DEAP_TRAINING, **settings})


DEAP_RECIPES: Mapping[str, Recipe] = {
    # About 60,000 classes; its steps aren't published.
    "instances": _deap("instances", "instances", "coco", limit=8_000, max_steps=20_000),
    "boundaries": _deap("boundaries", "boundaries", "coco", limit=5_000, max_steps=10_000),
    "detection": _deap("detection", "detection", "coco", limit=100_000, max_steps=20_000),
    # Under 16 minutes on an RTX 2080.
    "voc": _deap("VOC", "segmentation", "voc", placement="squash", max_steps=10_000),
    "coco-stuff": _deap("COCO-Stuff", "segmentation", "coco_stuff", outputs=200, width=32, limit=100_000, max_steps=20_000),
    "depth": _deap("depth", "depth", "nyu", placement="squash", limit=42_000, max_steps=3_000),
}
"""By name, in the order of the tables' columns."""

DEAP_TASKS = tuple(DEAP_RECIPES)
"""Of Table 3."""


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
