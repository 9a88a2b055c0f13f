"""Objects' boxes and masks on COCO (LiFT's Table 4): a ViTDet as it is, and with an upsampler between backbone and pyramid."""

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import pycocotools.mask as coco_mask
from PIL import Image

from operators.metrics.bootstrap import Drawn, Estimate, drawn_estimates
from operators.metrics.detection import ClassScores, CocoEntry, CocoScores
from operators.visual import DrawnObject, Tile, draw_objects
from operators.vitdet.settings import PATCH
from pipelines.config import ConfigError, Counts, Found, Free, absolute, require_at_least, used_with
from pipelines.evaluation.config import EvaluationConfig, LabelConfig
from pipelines.evaluation.objects import ObjectDetection, Overlap, class_ids, kinds_of, require_known, results_of, scores_of
from pipelines.evaluation.run import Evaluated, Record, begin, count_of, first_of, listed, split_left_out
from pipelines.features.comparison import Compared, called_rows
from pipelines.features.detectors import (
    STAGES,
    DetectorRecipe,
    DetectorRow,
    DetectorWeights,
    Head,
    UpsamplerNet,
    load_detector,
    load_upsampler_net,
)
from pipelines.features.photos import upright_pixels
from pipelines.features.rows import Row, Size
from pipelines.published.lift import LIFT_DETECTION
from pipelines.results import Findings, Items, Line, Measured, Table, mean_lines, panel, percent, with_published
from storage.datasets.classes import COCO_CATEGORIES
from storage.datasets.coco import load_coco
from storage.documents import JsonObject
from storage.paths import Folder
from storage.spread import spread
from storage.words import counted

SIZE = 512
"""Pixels a side of the input by default. LiFT's paper doesn't say its own; its plain rows lie below the published detectors of
1024 px as a smaller input would."""

_TWELVE = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large", "AR1", "AR10", "AR100", "AR small", "AR medium", "AR large")

_KINDS: Mapping[Overlap, str] = {"bbox": "box", "segm": "mask"}


@dataclass(frozen=True, kw_only=True)
class DetectionConfig(LabelConfig, EvaluationConfig):
    """Where are objects, and of which classes? COCO's average precision of boxes and masks, with and without an upsampler."""

    detector: Found[str] = ""
    """The plain detector, which makes the rows low-res and bilinear: a folder of a training run (jobs/train.py vitdet) or of a
    checkpoint, a published file (.pkl, .pth), or `random[:SEED]`, a small one."""
    upsamplers: Found[tuple[str, ...]] = ()
    """A row each: METHOD:URL of an upsampler that doubles the backbone's map (lift:runs/lift), with the plain detector's heads as
    they are; without a URL, one of random weights."""
    finetuned: Found[tuple[str, ...]] = ()
    """A row each: detectors whose heads were trained on an upsampler's maps (jobs/train.py vitdet --upsampler ...), which is in
    them, too."""
    head: Counts[Head | None] = None
    """What the detectors' heads must be; default: what the plain one's are."""
    size: Counts[int | None] = None
    """Pixels a side of the square input: images' longer side is brought to it. Default: 512, or what the detector was trained at
    where that is less."""
    split: Counts[str] = "val2017"
    """Of annotations/instances_SPLIT.json, and the images' folder."""
    per_class: Free[bool] = False
    """A table of each category's numbers, too; results.json has them anyway."""
    shown_from: Annotated[Free[float], used_with(pictures=True)] = 0.3
    """Pictures show what has at least this score, of an image the best 20."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(PATCH, self, "size")
        if self.size and self.size % PATCH:
            raise ConfigError(
                f"--size {self.size}: must be a multiple of {PATCH} px, as patches are; the nearest is {_nearest(self.size)}"
            )
        if not 0 <= self.shown_from <= 1:
            raise ConfigError(f"--shown-from {self.shown_from:g}: a score, from 0 to 1")


def _nearest(size: int) -> int:
    return max(1, round(size / PATCH)) * PATCH


# --- what is asked for ------------------------------------------------------------------------------------------------


def prepare(config: DetectionConfig) -> tuple[ObjectDetection, DetectorRecipe, Folder]:
    """The data read, the detectors loaded, the folder begun: most that can be wrong is wrong here."""
    if not config.detector:
        raise ConfigError("no detector: give --detector a training run's folder, a checkpoint, or a published file (.pkl)")
    data = load_coco(Folder(config.required("data"), config.options), config.split, config.limit, boxes_alone=True)
    recipe = _recipe(config, len(data.categories))
    config.comparison.require(called_rows([each.row for each in recipe.rows]))
    classes = class_ids(recipe.detectors, data.categories)
    require_known(data, classes, recipe.detectors[0])
    images = data.images
    task = ObjectDetection(
        images=images.items,
        numbers=data.numbers,
        names=data.categories,
        classes=classes,
        masks=not data.without_mask,
        without_mask=data.without_mask,
        without_area=data.without_area,
        frame=config.label_frame,
        pictured=tuple(spread(len(images), config.pictures)),
        taken=first_of(len(images), images.of, "images"),
    )
    size = (recipe.size, recipe.size)
    of = Evaluated(
        records=[*images, *data.numbers, list(data.categories.items())], images={size: [each.image for each in images]}
    )
    return task, *begin(config, "detection", recipe, of)


def _recipe(config: DetectionConfig, classes: int) -> DetectorRecipe:
    """The detectors and what rows there are of them."""
    plain = load_detector(_place(config.detector), config.options, classes)
    finetuned = [load_detector(_place(url), config.options) for url in config.finetuned]
    for each in (plain, *finetuned):
        _require_alike(each, plain, config.head or plain.head)
    if without := [each.displayed for each in finetuned if not each.upsampler]:
        raise ConfigError(f"--finetuned {without[0]} has no upsampler: it's a plain detector; evaluate it as --detector")
    asked = [(0, load_upsampler_net(text, plain, config.options)) for text in config.upsamplers]
    own = [(number, each.upsampler) for number, each in enumerate((plain, *finetuned)) if each.upsampler]
    size = config.size or min(SIZE, plain.settings.square_pad)
    return DetectorRecipe(
        detectors=(plain, *finetuned),
        upsamplers=tuple(net for _, net in (*asked, *own)),
        rows=rows_of([*asked, *own], size // PATCH),
        size=size,
    )


def _place(url: str) -> str:
    """A URL that other working directories find, too."""
    return url if url.split(":")[0] == "random" else absolute(url)


def _require_alike(detector: DetectorWeights, plain: DetectorWeights, head: str) -> None:
    """Raises `ConfigError` for a detector whose numbers can't stand beside the plain one's."""
    if detector.head != head:
        raise ConfigError(
            f"{detector.displayed} has the heads of --head {detector.head}, not of {head}; evaluate it by itself, or give a "
            f"{head} checkpoint"
        )
    ours, theirs = (each.settings.classes for each in (detector, plain))
    if ours != theirs:
        raise ConfigError(
            f"{detector.displayed} has {ours} classes, {plain.displayed} has {theirs}: they were trained on other data; evaluate "
            "each by itself"
        )
    if detector.settings.dim != plain.settings.dim:
        raise ConfigError(
            f"{detector.displayed} has a backbone of {detector.settings.dim} channels, {plain.displayed} one of "
            f"{plain.settings.dim}; evaluate each by itself"
        )


def rows_of(upsampled: Sequence[tuple[int, UpsamplerNet]], cells: int) -> tuple[DetectorRow, ...]:
    """The plain detector, bilinear enlargement, and each pair of a detector's number and an upsampler, for maps of so many cells
    a side."""

    def row(name: str, method: str, factor: int, digest: str = "") -> Row:
        side = factor * cells
        return Row(name=name, method=method, level=None, grid=(side, side), stride=PATCH, digest=digest)

    rows = [
        DetectorRow(row=row("low-res", "backbone", 1), detector=0),
        DetectorRow(row=row("bilinear x2", "bilinear", 2), detector=0),
    ]
    for number, (detector, net) in enumerate(upsampled):
        name = f"{net.method} x2"
        if any(each.row.name == name for each in rows):
            name += ", finetuned" if detector else ""
        while any(each.row.name == name for each in rows):
            name += "'"
        rows.append(DetectorRow(row=row(name, net.method, 2, net.digest), detector=detector, upsampler=number))
    return tuple(rows)


# --- what was found ---------------------------------------------------------------------------------------------------


def find(config: DetectionConfig, task: ObjectDetection, recipe: DetectorRecipe, records: Sequence[Record]) -> Findings:
    """COCO's numbers of all images at once, and what an image took."""
    records, left_out = split_left_out(records)
    results = {row.row.name: results_of(task, records, row.row.name) for row in recipe.rows}
    scores = {name: scores_of(task, records, each) for name, each in results.items()}
    totals = {name: _totals(by_kind) for name, by_kind in scores.items()}
    objects = sum(not note["iscrowd"] for record in records for note in record["truth"])
    settings = {
        "items": listed(task.taken, len(task.images)),
        "split": config.split,
        "limit": config.limit,
        "left_out": count_of(left_out),
    }
    tables = [
        _average_precision(config, task, recipe, scores, settings, len(records)),
        *(_twelve(recipe, kind, {name: each[kind] for name, each in totals.items()}) for kind in kinds_of(task)),
    ]
    return Findings(
        tables=(*tables, *([_by_class(task, recipe, records, scores)] if config.per_class else [])),
        items=Items(scored={"images": len(records), "objects": objects}, left_out=left_out, taken=task.taken),
        choices=_choices(config, task, recipe),
        details={"by category": {name: _details(task, each) for name, each in scores.items()}},
        pictures=_pictures(config, task, recipe, records),
        times=(_times(recipe, records),),
        files={
            f"detections/{re.sub('[^A-Za-z0-9_]', '-', name)}.{kind}.json": json.dumps(entries).encode()
            for name, by_kind in results.items()
            for kind, entries in by_kind.items()
        },
    )


def _totals(scores: Mapping[Overlap, ClassScores]) -> dict[Overlap, CocoScores]:
    return {kind: each.total for kind, each in scores.items()}


def _main_values(numbers: Mapping[Overlap, CocoScores]) -> list[float]:
    """AP, AP50 and AP75 of boxes and of masks, in percent; NaN of masks that aren't scored."""
    found = [numbers.get(kind) for kind in _KINDS]
    return percent([value for each in found for value in ((each.ap, each.ap_50, each.ap_75) if each else (math.nan,) * 3)])


_MAIN = tuple(f"{kind} {name}" for kind in _KINDS.values() for name in _TWELVE[:3])


def _average_precision(
    config: DetectionConfig,
    task: ObjectDetection,
    recipe: DetectorRecipe,
    scores: Mapping[str, Mapping[Overlap, ClassScores]],
    settings: JsonObject,
    images: int,
) -> Table:
    size, low = (recipe.size, recipe.size), recipe.rows[0].row
    compared = config.comparison.of_rows([each.row for each in recipe.rows])
    measured, known = [], _estimates(compared, scores, images)
    for each in recipe.rows:
        weights = recipe.detectors[each.detector]
        values = [_heads(recipe, each), _parameters(recipe, each) / 1e6, *_main_values(_totals(scores[each.row.name]))]
        here = {**settings, **_network(weights), "heads trained on these maps": _is_own(recipe, each)}
        line = Line.of(each.row, size, values).known(known[each.row.name])
        measured.append(Measured(line=line, row=each.row, low=low, size=size, settings=here))
    table = Table(
        title=f"Average precision on {config.split}, %",
        columns=("heads", "parameters, M", *_MAIN),
        notes=(*_notes(task), *config.comparison.notes),
        drawn=counted(images, "images"),
    )
    found = with_published(table, measured, LIFT_DETECTION[recipe.detectors[0].head] if config.paper else None)
    means = mean_lines([each.line for each in measured], compared.means, known)
    return replace(found, lines=(*found.lines, *means))


def _notes(task: ObjectDetection) -> tuple[str, ...]:
    """What of the annotations' masks isn't scored, or can't be found."""
    if not task.masks:
        return (f"masks aren't scored: {task.without_mask:,} annotations have a box alone",)
    if not task.without_area:
        return ()
    return (
        f"the masks of {task.without_area:,} annotated objects cover no pixel (polygons of two corners, empty runs), and count "
        "as not found; COCO's own tools take a first polygon of four numbers for a box",
    )


def _estimates(
    compared: Compared, scores: Mapping[str, Mapping[Overlap, ClassScores]], images: int
) -> dict[str, tuple[Estimate | None, ...]]:
    """By row, how far its numbers are known, for the table's columns: heads and parameters have no such thing."""
    rows = {name: _of_draws(by_kind) for name, by_kind in scores.items()}
    known = drawn_estimates(rows, images, compared.against, compared.means)
    return {name: (None, None, *each) for name, each in known.items()}


def _of_draws(scores: Mapping[Overlap, ClassScores]) -> Drawn:
    """AP, AP50 and AP75 of draws of images, of boxes and of masks, in percent."""
    kinds = [each.drawn(("ap", "ap_50", "ap_75")) for each in scores.values()]
    return lambda times_nB: 100 * np.concatenate([figures(times_nB) for figures in kinds], axis=1)


def _network(weights: DetectorWeights) -> JsonObject:
    """What a paper's numbers are of, by the names that `Published.settings` have."""
    found = weights.settings
    weights_of = "random" if weights.step.startswith("random") else "trained"
    return {"channels": found.dim, "blocks": found.depth, "classes": found.classes, "weights": weights_of}


def _is_own(recipe: DetectorRecipe, row: DetectorRow) -> bool:
    """Whether the heads were trained on such maps."""
    own = recipe.detectors[row.detector].upsampler
    if row.upsampler is None:
        return own is None and row.row.method == "backbone"
    return own is not None and own.digest == recipe.upsamplers[row.upsampler].digest


def _heads(recipe: DetectorRecipe, row: DetectorRow) -> str:
    own = recipe.detectors[row.detector].upsampler
    if row.detector:
        return "finetuned"
    return "the detector's" if own is None else f"trained with {own.method}"


def _parameters(recipe: DetectorRecipe, row: DetectorRow) -> int:
    arrays = [*recipe.detectors[row.detector].arrays.values()]
    net = 0 if row.upsampler is None else recipe.upsamplers[row.upsampler].parameters
    return sum(array.size for array in arrays) + net


def _twelve(recipe: DetectorRecipe, kind: Overlap, numbers: Mapping[str, CocoScores]) -> Table:
    size = (recipe.size, recipe.size)
    return Table(
        title=f"COCO's twelve numbers of {'boxes' if kind == 'bbox' else 'masks'}, %",
        columns=_TWELVE,
        lines=tuple(Line.of(each.row, size, percent(list(vars(numbers[each.row.name]).values()))) for each in recipe.rows),
    )


def _by_class(
    task: ObjectDetection, recipe: DetectorRecipe, records: Sequence[Record], scores: Mapping[str, Mapping[Overlap, ClassScores]]
) -> Table:
    counts: dict[int, int] = {}
    for record in records:
        for note in record["truth"]:
            counts[note["category_id"]] = counts.get(note["category_id"], 0) + (not note["iscrowd"])
    size: Size = (recipe.size, recipe.size)
    lines = [
        Line.of(
            each.row,
            size,
            [
                task.names[number],
                count,
                *_main_values({kind: s.by_category[number] for kind, s in scores[each.row.name].items()}),
            ],
        )
        for number, count in sorted(counts.items())
        for each in recipe.rows
    ]
    return Table(title="By category, %", columns=("category", "objects", *_MAIN), lines=tuple(lines))


def _details(task: ObjectDetection, scores: Mapping[Overlap, ClassScores]) -> JsonObject:
    """COCO's numbers of each category, 0 to 1, by kind and name."""
    return {
        _KINDS[kind]: {f"{number} {task.names[number]}": vars(each) for number, each in found.by_category.items()}
        for kind, found in scores.items()
    }


def _times(recipe: DetectorRecipe, records: Sequence[Record]) -> Table:
    """Medians, which the first image of a worker, slower than the others, doesn't move."""
    size, lines = (recipe.size, recipe.size), []
    for each in recipe.rows:
        took = [record["seconds"][each.row.name] for record in records]
        stages = [1e3 * statistics.median(seconds[stage] for seconds in took) for stage in STAGES]
        whole = 1e3 * statistics.median(sum(seconds.values()) for seconds in took)
        lines.append(Line.of(each.row, size, [*stages, whole, f"{whole / stages[0]:.2f}"]))
    return Table(
        title=f"An image's time by stage, ms, median of {len(records):,}",
        columns=(*STAGES, "all", "of the bare backbone's"),
        lines=tuple(lines),
        notes=("one image at a time, float32; the backbone's is its forward alone; reading and resizing an image aren't in it",),
    )


def _choices(config: DetectionConfig, task: ObjectDetection, recipe: DetectorRecipe) -> dict[str, str]:
    plain = recipe.detectors[0]
    heads = "; ".join(f"{each.row.name}: {_heads(recipe, each)}" for each in recipe.rows)
    return {
        "detector": f"ViTDet, {plain.head}, {plain.settings.dim} channels, {plain.settings.depth} blocks, from {plain.displayed}",
        "input": f"the longer side at {recipe.size} px, Pillow's bilinear, zeros (the mean colour) to a square. LiFT's paper "
        f"doesn't say its own; {SIZE} is read from its plain rows, which lie below the published detectors as those of "
        "a smaller one would",
        "frame": "with an enlarged map, all that follows the backbone works in a frame of twice the pixels, as it was trained; "
        "LiFT's paper doesn't say it, and its 118 M parameters fit no other reading",
        "heads": heads,
        **({"upsamplers": _upsamplers(recipe)} if recipe.upsamplers else {}),
        "categories": "ids as the detector's checkpoint says them"
        if any(each.categories for each in recipe.detectors)
        else "classes in the ascending order of ids, as the file doesn't say them",
        "scores": "pycocotools: 100 detections an image, crowds ignored, images without objects counted; results with their own "
        "area: of masks the mask's, as detectron2 has it, where pycocotools takes the box's of results that have both",
        "masks": "scored"
        if task.masks
        else f"not scored: {task.without_mask:,} annotations have a box alone; boxes of all are scored",
        "turned photographs": config.turned_photographs,
        "precision": "float32",
    }


def _upsamplers(recipe: DetectorRecipe) -> str:
    known = [f"{each.displayed}: {each.method}, {each.parameters:,} parameters" for each in recipe.upsamplers]
    if any(each.method == "lift" for each in recipe.upsamplers):
        known.append(
            "LiFT's paper has one of 7 M with wider layers and one more block in its image encoder, and no layout; "
            "--image-width 200 --image-convs 1 is our reading, and so are the sizes of the images that it learns from"
        )
    return "; ".join(known)


# --- pictures ---------------------------------------------------------------------------------------------------------

_TILE = 400

_SHOWN = 20
"""Found objects of a tile at most: the best ones, which come first."""


def _pictures(
    config: DetectionConfig, task: ObjectDetection, recipe: DetectorRecipe, records: Sequence[Record]
) -> dict[str, Image.Image]:
    """Annotated objects, and those of each row beside them."""
    by_number = {record["image"]: record for record in records}
    shown = [by_number[number] for number in task.pictured if number in by_number]
    if not shown:
        return {}
    names = [each.row.name for each in recipe.rows]
    tiles = []
    for record in shown:
        photo = upright_pixels(task.images[record["image"]].image)
        found = [[e for e in record["found"][name] if e["score"] >= config.shown_from][:_SHOWN] for name in names]
        tiles.append([_tile(task, photo, entries) for entries in (record["truth"], *found)])
    title = f"beside annotated objects, those found at {recipe.size} px with a score of {config.shown_from:g} or more"
    rows = [task.images[record["image"]].image.keys[-1] for record in shown]
    return {"detections.png": panel(tiles, ["annotated", *names], rows, title, (_TILE, _TILE))}


def _tile(task: ObjectDetection, photo_HW3: np.ndarray, entries: Sequence[CocoEntry]) -> Tile:
    """A square tile, its image centred; the best entries are drawn last."""
    height, width = photo_HW3.shape[:2]
    scale = _TILE / max(height, width)
    small = Image.fromarray(photo_HW3).resize(
        (max(1, round(scale * width)), max(1, round(scale * height))), Image.Resampling.BILINEAR
    )
    ordered = sorted(entries, key=lambda entry: entry.get("score", 0.0))
    objects = [_drawn(task, entry, scale, small.size) for entry in ordered]
    square = Image.new("RGB", (_TILE, _TILE), "white")
    square.paste(
        Image.fromarray(draw_objects(np.asarray(small), objects)), ((_TILE - small.width) // 2, (_TILE - small.height) // 2)
    )
    return Tile(pixels=np.asarray(square), is_photo=True)


def _drawn(task: ObjectDetection, entry: CocoEntry, scale: float, size: tuple[int, int]) -> DrawnObject:
    x, y, width, height = (scale * value for value in entry["bbox"])
    mask = None
    if "segmentation" in entry:
        whole = Image.fromarray(255 * coco_mask.decode(entry["segmentation"]))
        mask = np.asarray(whole.resize(size, Image.Resampling.BILINEAR)) >= 128
    number, score = entry["category_id"], entry.get("score")
    text = task.names.get(number) or dict(COCO_CATEGORIES).get(number, str(number))
    text += " (crowd)" if entry.get("iscrowd") else ""
    return DrawnObject(
        box=(x, y, x + width, y + height),
        mask=mask,
        text=text if score is None else f"{text} {score:.2f}",
        kind=task.classes.index(number) if number in task.classes else 0,
    )
