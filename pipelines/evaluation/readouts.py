"""Trained readouts on a data set: segmentation, depth, boundaries, detection, instances: DeAP's, and ViT-Up's linear probes.

The readouts are trained by jobs/train.py, which judges its held-out images by the same code (pipelines/readouts/tasks.py).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from PIL import Image

from operators.metrics.bootstrap import Drawn, Estimate, drawn_estimates
from operators.readouts import Readout
from operators.visual import Tile
from pipelines.config import ConfigError, Counts, Held, absolute, require_at_least
from pipelines.evaluation.config import LabelledConfig
from pipelines.evaluation.run import (
    Evaluated,
    Piece,
    Record,
    begin,
    cut,
    first_of,
    left_out_of_listing,
    records_of,
    split_left_out,
)
from pipelines.features.comparison import Compared, Comparison
from pipelines.features.config import LevelConfig
from pipelines.features.feature_source import FeatureSource
from pipelines.features.levels import level_name
from pipelines.features.live_source import LiveRecipe
from pipelines.features.photos import upright_pixels
from pipelines.features.rows import Row, Size, pooled_level
from pipelines.features.sources import Recipe, resolve_source
from pipelines.readouts.checkpoints import TrainedReadout, load_readout
from pipelines.readouts.depth import require_depth
from pipelines.readouts.task import Scored, Task
from pipelines.results import Cell, Findings, ItemPictures, Items, LeftOut, Line, Table, Taken, mean_lines, panel
from pipelines.training.readout import features_of
from storage.datasets.content import joint_digest
from storage.datasets.files import DatasetError, Listed
from storage.datasets.labels import LabelledImage
from storage.datasets.registry import DATASETS, LabelReading, load_labelled
from storage.differences import differences
from storage.documents import decode
from storage.paths import Folder
from storage.redaction import redact
from storage.spread import spread
from storage.words import counted

PIECE_IMAGES = 32

PREDICTIONS, TRUTH = "predictions", "truth"
"""Folders of pictures; of labels', beside those of readouts."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(LabelledConfig):
    """What can be read out of the features? Trained readouts (jobs/train.py) judged on a data set's validation part."""

    readouts: Counts[tuple[str, ...]] = ()
    """Trained readouts, each a row: folders of training runs, or checkpoints. All of one task."""
    dataset: Counts[str | None] = None
    """The data set; default: the one that they were trained on."""
    split: Counts[str | None] = None
    """Its part; default: the one for validation."""
    side: Counts[int | None] = None
    """Of the outputs and the labels, in pixels; default: as trained. DeAP answers 448 with twice the queries a side."""
    depth_scale: Counts[float | None] = None
    """depth: how many of the stored values are a metre. Default: the layout's, if a sample of maps is plausible by it."""
    features: Held[LevelConfig] = LevelConfig(levels=("x1",))

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "side")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Images with labels, and readouts."""

    images: tuple[LabelledImage, ...]
    readouts: Mapping[str, TrainedReadout]
    rows: Mapping[str, Row]
    "the map that each reads"
    task: Task
    drawn: Task
    "the task as it was trained: images are drawn at its side, whatever the outputs' is"
    size: Size
    "of the model's input"
    pictured: frozenset[int]
    "images whose predictions are drawn"
    left_out: tuple[LeftOut, ...] = ()
    "of the data set's images that were asked for"
    taken: tuple[Taken, ...] = ()

    def pieces(self) -> list[Piece]:
        return cut(range(len(self.images)), PIECE_IMAGES, "{start:07d}")

    def run(self, piece: Piece, source: FeatureSource, folder: Folder) -> list[Record]:
        built = {name: readout.build().to(source.device) for name, readout in self.readouts.items()}
        return records_of(piece.items, lambda number: self._image(number, built, source, folder))

    def _image(self, number: int, built: Mapping[str, Readout], source: FeatureSource, folder: Folder) -> list[Record]:
        item = self.images[number]
        label = item.upright_label(source.oriented(item.image, self.size))
        arrays, picture = self.task.targets(label, number), self.drawn.input_picture(item.image, self.size)
        targets = {name: torch.tensor(values, device=source.device) for name, values in arrays.items()}
        maps, pooled = source.maps(picture), None
        if any(readout.needs_pooled for readout in built.values()):
            pooled = source.pooled(picture)[None]
        records = []
        for name, readout in built.items():
            features = maps[self.rows[name].name][None].permute(0, 3, 1, 2)
            output = readout(features, (self.task.side, self.task.side), pooled)[0]
            judged = self.task.judge(output, targets, label)
            records.append({"image": number, "readout": name, "judged": asdict(judged)})
            if number in self.pictured:
                for what, pixels in zip((name, TRUTH), self.task.pictures(output, targets), strict=True):
                    ItemPictures(folder, PREDICTIONS).write(number, what, pixels)
        return records


def prepare(config: ProbeConfig) -> tuple[Probe, Recipe, Folder]:
    """The readouts and the data read, the model loaded, the folder begun: most that can be wrong is wrong here."""
    if not config.readouts:
        raise ConfigError("no readouts: give --readouts the folders of training runs, or checkpoints")
    readouts = {name: load_readout(absolute(url), config.options) for name, url in _names(config.readouts).items()}
    config.comparison.require({name: name for name in readouts})
    _require_alike(config, readouts)
    first = next(iter(readouts.values()))
    recipe, size = _features(config, readouts)
    rows = {name: _row_of(each, recipe, size) for name, each in readouts.items()}
    task = replace(first.task, side=config.side or first.task.side)
    listed = _images(config, first)
    images = tuple(task.judged(listed))
    probe = Probe(
        images=images,
        readouts=readouts,
        rows=rows,
        task=task,
        drawn=first.task,
        size=size,
        pictured=frozenset(spread(len(images), config.pictures)),
        left_out=(*left_out_of_listing(listed.left_out), *_not_judged(task, listed, images)),
        taken=first_of(len(listed), listed.of, "images"),
    )
    trained = sorted(str((name, [each.features, each.task.as_json(), each.digest])) for name, each in readouts.items())
    of = Evaluated(
        records=[*images, tuple(trained)],
        images={size: [each.image for each in images]},
        labels=[each.label for each in images],
        contents={"readouts": joint_digest(trained)},
    )
    return probe, *begin(config, "probe", recipe, of)


def _names(urls: Sequence[str]) -> dict[str, str]:
    """Short names of folders: the last part that isn't a step's, made different where two are the same."""
    names: dict[str, str] = {}
    for url in urls:
        parts = [part for part in redact(absolute(url)).rstrip("/").split("/") if part]
        name = parts[-3] if len(parts) > 2 and parts[-2] == "steps" else parts[-1]
        while name in (*names, TRUTH):
            name += "'"
        names[name] = url
    return names


def _not_judged(task: Task, listed: Sequence[LabelledImage], judged: Sequence[LabelledImage]) -> tuple[LeftOut, ...]:
    kept = {each.image.displayed for each in judged}
    return LeftOut.of(task.judged_only, [each.image.displayed for each in listed if each.image.displayed not in kept])


def _images(config: ProbeConfig, readout: TrainedReadout) -> Listed[LabelledImage]:
    """Those of the data set. Raises `ConfigError` where its labels aren't what the readout was trained for."""
    dataset, task = config.dataset or readout.dataset, readout.task
    if dataset not in DATASETS:
        raise ConfigError(f"--dataset {dataset}: there are {', '.join(DATASETS)}")
    kind, classes = DATASETS[dataset], getattr(task, "classes", None)
    if (kind.label, kind.classes) != (task.label, classes):
        raise ConfigError(
            f"--dataset {dataset} has {_labels(kind.label, kind.classes)}, but {readout.displayed} was trained for "
            f"{_labels(task.label, classes)}, on {readout.dataset}"
        )
    require_depth(dataset, config.depth_scale)
    reading = LabelReading(frame=config.label_frame, depth_scale=config.depth_scale)
    split = config.split or kind.splits[1]
    return load_labelled(dataset, config.required("data"), split, config.options, config.limit, reading)


def _labels(label: str, classes: int | None) -> str:
    return label if classes is None else f"{classes} {label}"


def _features(config: ProbeConfig, readouts: Mapping[str, TrainedReadout]) -> tuple[Recipe, Size]:
    """Features as the first readout was trained on them, wherever that isn't said by settings."""
    first = next(iter(readouts.values()))
    choice = replace(config.source, comparison=Comparison())  # tables have lines of readouts, not of the maps' rows
    if not config.stores:
        wants_pooled = any(each.config.kind.needs_pooled for each in readouts.values())
        levels = config.features.levels
        pooled = ("pooled",) if wants_pooled and "pooled" not in map(level_name, levels) else ()
        rendering = config.drawing or first.features["drawing"]
        choice = replace(choice, features=replace(config.features, levels=(*levels, *pooled)), rendering=rendering)
    recipe, (size,) = resolve_source(choice, (tuple(first.features["input_size"]),), first.task.placement)
    if isinstance(recipe, LiveRecipe):
        # Readouts may have been trained without the model's normalisation.
        given = {name: tuple(first.features[name]) for name in ("mean", "std")}
        bundles = {ragged: replace(each, spec=replace(each.spec, **given)) for ragged, each in recipe.bundles.items()}
        recipe = replace(recipe, bundles=bundles)
    return recipe, size


def _row_of(readout: TrainedReadout, recipe: Recipe, size: Size) -> Row:
    """The map that a readout was trained on. Raises `ConfigError` where it, or the CLS vector, isn't there."""
    spec, trained = recipe.spec(size), dict(readout.features)
    level = trained.pop("level")
    trained.pop("drawing")
    rows = {row.level: row for row in recipe.rows(size)}
    there = {each.name: features_of(spec, each) for each in spec.levels if each.name in rows}
    # Whatever it is called: a store may have it beside others of its scale.
    alike = [name for name, each in there.items() if {**each["level"], "name": level["name"]} == level]
    name = next((name for name in (level["name"], *alike) if name in (alike or there)), None)
    if name is None:
        raise ConfigError(f"{readout.displayed} reads {level['name']} ({level['method']}), which isn't among --levels")
    if different := differences({**trained, "level": {**level, "name": name}}, there[name]):
        lines = different.text("trained on", "now")
        raise ConfigError(f"{readout.displayed} was trained on other features:\n{lines}")
    if readout.config.kind.needs_pooled and pooled_level(spec.levels) is None:
        raise ConfigError(f"{readout.displayed} reads the CLS vector, too, which isn't there; extract with --levels pooled=cls")
    return rows[name]


def _require_alike(config: ProbeConfig, readouts: Mapping[str, TrainedReadout]) -> None:
    """Raises `ConfigError` unless one data set, one label and one drawing of the image serve all readouts: what settings don't
    say is taken from the readouts, and must not depend on which of them is named first."""
    first = next(iter(readouts.values()))
    drawing = config.drawing or ("extract" if config.stores else None)
    for each in readouts.values():
        if replace(each.task, side=first.task.side) != first.task:
            raise ConfigError(
                f"{each.displayed} was trained for {each.task}, {first.displayed} for {first.task}; evaluate each alone"
            )
        for flag, given, theirs, ours in (
            ("--dataset", config.dataset, each.dataset, first.dataset),
            ("--drawing", drawing, each.features["drawing"], first.features["drawing"]),
            ("--side", config.side, each.task.side, first.task.side),
        ):
            if given is None and theirs != ours:
                raise ConfigError(
                    f"{each.displayed} was trained with {flag} {theirs}, {first.displayed} with {flag} {ours}; say by which "
                    f"all are judged with {flag}, or evaluate each alone"
                )
        if (drawing or first.features["drawing"]) == "paper" and each.task.side != first.task.side:
            raise ConfigError(
                f"{each.displayed} was trained on images drawn at {each.task.side} px, {first.displayed} at "
                f"{first.task.side} px; evaluate each alone, or with --drawing extract"
            )


def find(config: ProbeConfig, probe: Probe, recipe: Recipe, records: Sequence[Record]) -> Findings:
    """Scores of each readout, from all images at once."""
    records, left_out = split_left_out(records)
    judged = [(record, decode(probe.task.record, record["judged"])) for record in records]
    by_readout = {name: [each for record, each in judged if record["readout"] == name] for name in probe.readouts}
    try:
        scored = {name: probe.task.scored(each) for name, each in by_readout.items()}
    except ValueError as error:
        raise DatasetError(f"none of {len(probe.images)} images can be scored: {error}") from None
    scores = {name: each.scores for name, each in scored.items()}
    # Images that were judged and say nothing of any score.
    empty = sorted({record["image"] for record, each in judged if probe.task.is_empty(each)})
    told = {record["image"] for record in records} - {*empty}
    columns = tuple(dict.fromkeys(name for values in scores.values() for name in values))
    compared = config.comparison.of({name: name for name in probe.readouts}, _against_first(probe))
    known = _estimates(probe, compared, scored, columns, len(records) // len(scored))
    lines = [
        Line.of(probe.rows[name], probe.size, _cells(probe, name, values, columns)).known(known.get(name, ()))
        for name, values in scores.items()
    ]
    by_name = [replace(line, features=name) for name, line in zip(scores, lines, strict=True)]
    named = [replace(line, features=f"{name} on {line.features}") for name, line in zip(scores, lines, strict=True)]
    first = next(iter(probe.readouts))
    notes = ["what papers publish of readouts is printed by jobs/tables.py grid --paper"] if config.paper else []
    table = Table(
        title=f"{probe.task.name} on {config.dataset or probe.readouts[first].dataset}, {len(told)} images",
        columns=("readout", "parameters", *(f"{each}, %" if each in probe.task.shares else each for each in columns)),
        lines=(*named, *mean_lines(by_name, compared.means, known)),
        notes=(*notes, *config.comparison.notes),
        drawn=counted(len(records) // len(scores), "images"),
    )
    left_out += LeftOut.of(probe.task.empty, [probe.images[number].image.displayed for number in empty])
    return Findings(
        tables=(table,),
        items=Items(scored={"images": len(told)}, left_out=(*probe.left_out, *left_out), taken=probe.taken),
        choices={
            "task": str(probe.task),
            "readouts": "; ".join(
                f"{name}: {each.step or 'the checkpoint that was named'}" for name, each in probe.readouts.items()
            ),
            "images": _drawing(probe, recipe),
            "turned photographs": config.turned_photographs,
            "scores": "counts and sums of all images, divided once",
        },
        details={"scores": scores, "trained on": {name: dict(r.features) for name, r in probe.readouts.items()}},
        pictures=_pictures(config, probe),
    )


def _against_first(probe: Probe) -> dict[str, str]:
    """With what readouts are compared where nothing else was asked for: the first one on a bilinear map, else the first one."""
    first = next((name for name in probe.readouts if probe.rows[name].method == "bilinear"), next(iter(probe.readouts)))
    return {name: first for name in probe.readouts if name != first}


def _estimates(
    probe: Probe, compared: Compared, scored: Mapping[str, Scored], columns: Sequence[str], images: int
) -> dict[str, tuple[Estimate | None, ...]]:
    """Of each readout and of means of them, for their name and size, which have none, and the columns."""
    names = next(iter(scored.values())).names
    units = np.array([100 if name in probe.task.shares else 1 for name in names])

    def in_units(drawn: Drawn) -> Drawn:
        return lambda times_nB: units * drawn(times_nB)

    rows = {name: in_units(each.drawn) for name, each in scored.items()}
    known = drawn_estimates(rows, images, compared.against, compared.means)
    by_name = {readout: dict(zip(names, each, strict=True)) for readout, each in known.items()}
    return {readout: (None, None, *(each.get(column) for column in columns)) for readout, each in by_name.items()}


def _drawing(probe: Probe, recipe: Recipe) -> str:
    """How images became the model's input, here and in training where that was otherwise."""
    words = {"paper": "as the paper's code draws them", "extract": "drawn as jobs/extract.py does it"}
    others = [n for n, each in probe.readouts.items() if each.features["drawing"] != recipe.rendering]
    trained = f"; {', '.join(others)} trained on images drawn otherwise" if others else ""
    return words[recipe.rendering] + trained


def _cells(probe: Probe, name: str, values: Mapping[str, float], columns: Sequence[str]) -> list[Cell]:
    """The readout, its size, and its scores: shares in percent, others with four digits."""
    readout, shares = probe.readouts[name], probe.task.shares
    # One readout may have no such score: without foreground, there is none to be right about.
    known = [values.get(each, math.nan) for each in columns]
    cells = [100 * value if each in shares else f"{value:.4f}" for each, value in zip(columns, known, strict=True)]
    return [readout.config.method, readout.build().parameter_count(), *cells]


def _pictures(config: ProbeConfig, probe: Probe, tile: int = 200) -> dict[str, Image.Image]:
    folder, names = Folder(config.required("out"), config.options), [*probe.readouts, TRUTH]
    drawn = ItemPictures(folder, PREDICTIONS).read(probe.pictured, names)
    if not drawn:
        return {}
    tiles, shown = [], []
    for number, pictures in drawn.items():
        photo = probe.task.photo(upright_pixels(probe.images[number].image))
        tiles.append([Tile(pixels=each, is_photo=True) for each in (photo, *pictures)])
        shown += pictures
    dataset = config.dataset or next(iter(probe.readouts.values())).dataset
    legend = probe.task.legend(shown, DATASETS[dataset].names)
    rows = [probe.images[number].image.keys[-1] for number in drawn]
    title = f"{probe.task.name}, {probe.task.side} px"
    return {"predictions.png": panel(tiles, ["photo", *names], rows, title, (tile, tile), legend=legend)}
