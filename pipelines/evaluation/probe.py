"""Trained readouts on a data set: segmentation, depth, boundaries, detection, instances (specs/evaluation.md 7, 8, 12).

The readouts are trained by jobs/train.py, which judges its held-out images by the same code (pipelines/readouts/tasks.py).
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from operators.visual import Tile, spread
from pipelines.config import ConfigError, absolute, require_at_least
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.datasets import digest
from pipelines.evaluation.report import Cell, Findings, Line, Table, panel
from pipelines.evaluation.run import Piece, Record, begin
from pipelines.evaluation.sources import FeatureSource, Recipe, Row, Size, resolve_source
from pipelines.readouts.checkpoints import TrainedReadout, load_readout
from pipelines.readouts.datasets import DATASETS, load_labelled
from pipelines.readouts.labels import LabelledImage
from pipelines.readouts.source import picture_of
from pipelines.readouts.tasks import Task
from pipelines.readouts.train import features_of
from pipelines.train_config import describe_difference
from storage.paths import Folder, redact

PIECE_IMAGES = 32


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(EvaluateConfig):
    """What can be read out of the features? Trained readouts (jobs/train.py) judged on a data set's validation part."""

    readouts: tuple[str, ...] = ()
    """Trained readouts, each a row: folders of training runs, or checkpoints. All of one task."""
    dataset: str | None = None
    """The data set; default: the one that they were trained on."""
    split: str | None = None
    """Its part; default: the one for validation."""
    side: int | None = None
    """Of the outputs and the labels, in pixels; default: as trained. DeAP answers 448 with twice the queries a side."""
    levels: tuple[str, ...] = ("x1",)
    """The maps that the readouts were trained on, named as for jobs/extract.py: x1 x2=lift:s3://bucket/ckpt."""

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
    size: Size
    "of the model's input"
    shown: frozenset[int]
    "images whose predictions are drawn"

    def pieces(self) -> list[Piece]:
        starts = range(0, len(self.images), PIECE_IMAGES)
        return [
            Piece(name=f"{start:07d}", items=tuple(range(start, min(start + PIECE_IMAGES, len(self.images)))))
            for start in starts
        ]

    def run(self, piece: Piece, source: FeatureSource, folder: Folder) -> list[Record]:
        built = {name: readout.build() for name, readout in self.readouts.items()}
        return [record for number in piece.items for record in self._image(number, built, source, folder)]

    def _image(self, number: int, built: Mapping[str, Any], source: FeatureSource, folder: Folder) -> list[Record]:
        item = self.images[number]
        label = item.label.read()
        targets, maps = self.task.targets(label, number), source.maps(picture_of(item.image, self.task, self.size))
        records = []
        for name, readout in built.items():
            features = maps[self.rows[name].name].permute(2, 0, 1)[None]
            output = readout(features, (self.task.side, self.task.side))[0]
            judged = self.task.judge(output, targets, label)
            records.append({"image": number, "readout": name, "judged": judged})
            if number in self.shown:
                self._draw(folder, number, name, *self.task.pictures(output, targets))
        return records

    def _draw(self, folder: Folder, number: int, name: str, prediction: np.ndarray, truth: np.ndarray) -> None:
        for what, pixels in ((name, prediction), ("truth", truth)):
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            folder.write(_prediction(number, what), png.getvalue())


def prepare(config: ProbeConfig) -> tuple[Probe, Recipe, Folder]:
    """The readouts and the data read, the model loaded, the folder begun: most that can be wrong is wrong here."""
    if not config.readouts:
        raise ConfigError("no readouts: give --readouts the folders of training runs, or checkpoints")
    readouts = {name: load_readout(absolute(url), config.options) for name, url in _names(config.readouts).items()}
    first = next(iter(readouts.values()))
    for each in readouts.values():
        if replace(each.task, side=first.task.side) != first.task:
            raise ConfigError(
                f"{each.shown} was trained for {each.task}, {first.shown} for {first.task}; evaluate each alone"
            )
    dataset = config.dataset or first.dataset
    if dataset not in DATASETS:
        raise ConfigError(f"--dataset {dataset}: there are {', '.join(DATASETS)}")
    split = config.split or DATASETS[dataset].splits[1]
    images = tuple(load_labelled(dataset, config.required("data"), split, config.options, config.limit))
    task = replace(first.task, side=config.side or first.task.side)
    images = tuple(task.judged(images))
    trained_at = tuple(first.features["input_size"])
    recipe, (size,) = resolve_source(config, (trained_at,), task.placement)
    rows = {name: _row_of(each, recipe, size) for name, each in readouts.items()}
    probe = Probe(
        images=images,
        readouts=readouts,
        rows=rows,
        task=task,
        size=size,
        shown=frozenset(spread(len(images), config.pictures)),
    )
    told = {name: [each.features, each.task.told(), each.digest] for name, each in readouts.items()}
    return probe, recipe, begin(config, "probe", recipe, digest([*images, tuple(sorted(map(str, told.items())))]))


def _names(urls: Sequence[str]) -> dict[str, str]:
    """Short names of folders: the last part that isn't a step's, made different where two are the same."""
    names: dict[str, str] = {}
    for url in urls:
        parts = [part for part in redact(url).rstrip("/").split("/") if part]
        name = parts[-3] if len(parts) > 2 and parts[-2] == "steps" else parts[-1]
        while name in names:
            name += "'"
        names[name] = url
    return names


def _row_of(readout: TrainedReadout, recipe: Recipe, size: Size) -> Row:
    """The map that a readout was trained on. Raises `ConfigError` where it isn't there."""
    spec, trained = recipe.spec(size), dict(readout.features)
    level = trained.pop("level")
    trained.pop("drawing")
    found = next((each for each in spec.levels if each.name == level["name"]), None)
    if found is None:
        raise ConfigError(f"{readout.shown} reads {level['name']} ({level['method']}), which isn't among --levels")
    here = features_of(spec, found)
    if differences := describe_difference("trained on", {**trained, "level": level}, here):
        raise ConfigError(f"{readout.shown} was trained on other features:\n{differences}")
    return next(row for row in recipe.rows(size) if row.level == found.name)


# --- what was found ---------------------------------------------------------------------------------------------------


def find(config: ProbeConfig, probe: Probe, recipe: Recipe, records: Sequence[Record]) -> Findings:
    """Scores of each readout, from all images at once."""
    by_readout: dict[str, list[Record]] = {name: [] for name in probe.readouts}
    for record in records:
        by_readout[record["readout"]].append(record["judged"])
    scores = {name: probe.task.scores(judged) for name, judged in by_readout.items()}
    columns = tuple(next(iter(scores.values())))
    lines = [
        Line.of(probe.rows[name], probe.size, _cells(probe, name, values, columns)) for name, values in scores.items()
    ]
    named = [replace(line, features=f"{name} on {line.features}") for name, line in zip(scores, lines, strict=True)]
    table = Table(
        title=f"{probe.task.name} on {config.dataset or next(iter(probe.readouts.values())).dataset}, {len(probe.images)} images",
        columns=("readout", "parameters", *(f"{each}, %" if each in probe.task.shares else each for each in columns)),
        lines=tuple(named),
    )
    return Findings(
        tables=(table,),
        choices={
            "task": str(probe.task),
            "images": "as the paper's code draws them" if recipe.how_drawn == "paper" else "drawn as extract",
            "scores": "counts and sums of all images, divided once",
        },
        details={"scores": scores, "trained on": {name: dict(r.features) for name, r in probe.readouts.items()}},
        pictures=_pictures(config, probe),
    )


def _cells(probe: Probe, name: str, values: Mapping[str, float], columns: Sequence[str]) -> list[Cell]:
    """The readout, its size, and its scores: shares in percent, others with four digits."""
    readout, shares = probe.readouts[name], probe.task.shares
    shown = [100 * values[each] if each in shares else f"{values[each]:.4f}" for each in columns]
    return [readout.config.method, readout.build().parameter_count(), *shown]


def _pictures(config: ProbeConfig, probe: Probe, tile: int = 200) -> dict[str, Image.Image]:
    if not probe.shown:
        return {}
    folder, names = Folder(config.required("out"), config.options), list(probe.readouts)
    tiles = []
    for number in sorted(probe.shown):
        photo = probe.task.photo(probe.images[number].image.pixels())
        files = [folder.read(_prediction(number, what)) for what in (*names, "truth")]
        drawn = [photo, *(np.array(Image.open(io.BytesIO(data))) for data in files)]
        tiles.append([Tile(pixels=each, is_photo=True) for each in drawn])
    rows = [probe.images[number].image.keys[-1] for number in sorted(probe.shown)]
    title = f"{probe.task.name}, {probe.task.side} px"
    return {"predictions.png": panel(tiles, ["photo", *names, "truth"], rows, title, (tile, tile))}


def _prediction(number: int, what: str) -> str:
    return f"predictions/{what}/{number:07d}.png"
