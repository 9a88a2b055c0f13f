"""Has an evaluation's pieces of work done, and keeps what each one gave.

A piece writes its records as one object in `parts/` when it is done, so that an evaluation which was killed goes on from
there. Records are merged from those files, whoever wrote them: the score depends neither on the number of workers nor on the
order in which they finish.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import torch

from cluster.progress import Progress
from operators.metrics.bootstrap import Estimate, Figures, estimates
from pipelines.config import JobConfig
from pipelines.evaluation.config import EvaluationConfig
from pipelines.executors import Executor, executor_for
from pipelines.features.clipping import ClippedCounts, ClippedFeatures, ClippedImage
from pipelines.features.comparison import Compared, Comparison
from pipelines.features.feature_source import distinct
from pipelines.features.rows import Size
from pipelines.features.sources import Recipe
from pipelines.provenance import NOTHING_RUN, begin_run, planned, run_folder
from pipelines.published import Published
from pipelines.results import Cell, Findings, LeftOut, Line, Measured, Table, Taken, mean_lines, with_published, write_results
from storage.datasets.content import HasContent, content_digests, joint_digest
from storage.datasets.files import DatasetError, ItemLeftOut, digest
from storage.datasets.images import EncodedImage
from storage.documents import Document, JsonObject, JsonValue, decode, parse_json
from storage.left_out import LeftOut as NotListed
from storage.paths import Folder
from storage.redaction import redact
from storage.words import counted

logger = logging.getLogger(__name__)


class Source(Protocol):
    """What pieces are done with: features, or a detector."""

    clipped: ClippedCounts
    "what float16 couldn't hold, of the maps and vectors that were asked for"


S = TypeVar("S", bound=Source)
In = TypeVar("In", bound=Source, contravariant=True)
Out = TypeVar("Out", bound=Source, covariant=True)


class SourceRecipe(Protocol[Out]):
    """What a source is made of, as it is sent to workers."""

    def source(self, device: str) -> Out:
        """What a worker does its pieces with."""

    def identity(self) -> dict[str, JsonValue]:
        """What it is, as JSON values."""

    def described(self) -> dict[str, JsonValue]:
        """The same for a report."""

    def planned(self) -> Sequence[str]:
        """Lines on it for a plan."""

    def recorded(self, config: JobConfig) -> dict[str, JsonValue]:
        """A job's settings as its documents have them."""

    def said(self) -> dict[str, str]:
        """What results say of it, in words."""

    def joined(self, images: Mapping[Size, Sequence[EncodedImage]], contents: Mapping[str, str]) -> Self:
        """Itself, with these images' features at hand; `images` by input size, `contents` digests of their bytes by displayed
        names. Raises `FeaturesMissing`."""


R = TypeVar("R", bound=SourceRecipe[Source])

Record = JsonObject
"""What one item gave, as JSON values."""


@dataclass(frozen=True, kw_only=True)
class Unscored:
    """The record of an item that isn't scored, as its names are in the file."""

    left_out: str
    "why"
    item: int
    image: str


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A unit of work. Pieces don't depend on the number of workers."""

    name: str
    "of its file in parts/"
    items: tuple[int, ...]
    "numbers of what it is made of, in the evaluation's own order"
    side: int = 0
    "of the model's input in pixels, where pieces have one each; 0: as the evaluation has it"


def cut(items: Sequence[int], each: int, name: str, sides: Sequence[int] = (0,)) -> list[Piece]:
    """Pieces of up to so many items, for each side. `name` is a format of `side`, of the piece's `number`, and of the place where
    it starts (`start`) and the `item` there."""
    return [
        Piece(
            name=name.format(side=side, start=start, number=start // each, item=items[start]),
            items=tuple(items[start : start + each]),
            side=side,
        )
        for side in sides
        for start in range(0, len(items), each)
    ]


class Evaluation(Protocol[In]):
    """One task on one data set; sent to every worker once."""

    def pieces(self) -> Sequence[Piece]:
        """All the work."""

    def run(self, piece: Piece, source: In, folder: Folder) -> list[Record]:
        """Do a piece. Larger results (label images) are written below `folder`, each name once."""


def records_of(items: Sequence[int], do: Callable[[int], list[Record]]) -> list[Record]:
    """What `do` gives of each item; of one that can't be scored (its labels can't be placed, its store has no features of it), a
    record that says why it was left out."""
    records: list[Record] = []
    for number in items:
        try:
            records += do(number)
        except ItemLeftOut as error:
            records.append(asdict(Unscored(left_out=error.reason, item=number, image=error.displayed)))
    return records


def split_left_out(records: Sequence[Record]) -> tuple[list[Record], tuple[LeftOut, ...]]:
    """The records of what was scored, and what was left out, by reason: each item once, whatever sizes it was tried at.

    Raises `DatasetError` where nothing was scored.
    """
    scored = [record for record in records if "left_out" not in record]
    images: dict[str, dict[int, str]] = {}
    for each in [decode(Unscored, record) for record in records if "left_out" in record]:
        images.setdefault(each.left_out, {})[each.item] = each.image
    found = tuple(LeftOut(reason=reason, count=len(items), first=items[min(items)]) for reason, items in images.items())
    if found and not scored:
        raise DatasetError(f"nothing is left to be scored: {'; '.join(map(str, found))}")
    return scored, found


def set_aside(
    records: Sequence[Record], is_empty: Callable[[Record], bool], reason: str, name: Callable[[Record], str]
) -> tuple[list[Record], tuple[LeftOut, ...]]:
    """The records without those that say nothing of any score, and how many items those are of: each `name` once."""
    names = list(dict.fromkeys(name(record) for record in records if is_empty(record)))
    return [record for record in records if not is_empty(record)], LeftOut.of(reason, names)


T = TypeVar("T")


def limited(items: Sequence[T], limit: int | None, unit: str) -> tuple[tuple[T, ...], tuple[Taken, ...]]:
    """The first items, as --limit has it, and what is to be said of it."""
    first = tuple(items[:limit])
    return first, first_of(len(first), len(items), unit)


def first_of(count: int, of: int | None, unit: str) -> tuple[Taken, ...]:
    """What is to be said of --limit; nothing where it takes all."""
    return () if count == of else (Taken(how="the first", count=count, of=of, unit=unit, flag="--limit"),)


def listed(taken: Sequence[Taken], items: int) -> int | None:
    """How many items the data set has, of which so many are left after `taken`, the first of which is of all."""
    return taken[0].of if taken else items


def left_out_of_listing(found: Mapping[str, NotListed]) -> tuple[LeftOut, ...]:
    """What was found beside a data set's files and may have been meant as some of them."""
    return tuple(
        LeftOut(reason=reason, count=each.count, first=next(iter(each.examples), ""))
        for reason, each in found.items()
        if not each.is_usual
    )


def grouped(records: Sequence[Record], *names: str) -> dict[tuple[JsonValue, ...], list[Record]]:
    """Records that have the same values under `names`, by those values, in the order of the first of each."""
    groups: dict[tuple[JsonValue, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in names), []).append(record)
    return groups


@dataclass(frozen=True, kw_only=True)
class Resampled:
    """What the items of an evaluation add to the sums that its figures are taken from."""

    unit: str
    "of items: pairs, clips, images"
    sums: Mapping[tuple[str, int], np.ndarray]
    "by row and side: [n, k], of the same items in the same order"
    figures: Figures
    "of sums; the table's first columns, in its units"

    def over(self) -> str:
        """From how many items figures are drawn."""
        least, most = min(map(len, self.sums.values())), max(map(len, self.sums.values()))
        return counted(most, self.unit) if least == most else f"{least:,} to {counted(most, self.unit)}"

    def estimates(self, rows: Sequence[str], side: int, compared: Compared) -> dict[str, tuple[Estimate, ...]]:
        """Of each row at a side, and of means of them."""
        return estimates({row: self.sums[row, side] for row in rows}, self.figures, compared.against, compared.means)


def score_table(
    table: Table,
    recipe: Recipe,
    comparison: Comparison,
    sizes: Mapping[int, Size],
    values: Callable[[str, int], Sequence[Cell]],
    published: Published | None = None,
    settings: JsonObject | None = None,
    varied: Mapping[int, str] | None = None,
    resampled: Resampled | None = None,
) -> Table:
    """`table` with a line of `values` for each side and each row of features, and the paper's below it.

    `comparison`: with what rows are compared, and which are averaged. `sizes`: the input's, by side. `settings`: the
    evaluation's, defaults resolved, by which the paper's numbers are told from those of other settings. `varied`: what tables say
    of the input where other items' sizes are others. `resampled`: what tells how far the first columns' figures are known, and
    how far they differ from those that they are compared with.
    """
    measured, means = [], list[Line]()
    for side, size in sizes.items():
        low, *_ = rows = recipe.rows(size)
        here = {**_features_of(recipe, size), **(settings or {})}
        compared = comparison.of_rows(rows)
        known = resampled.estimates([row.name for row in rows], side, compared) if resampled else {}
        lines = []
        for row in rows:
            line = Line.of(row, size, values(row.name, side)).known(known.get(row.name, ()))
            line = line.like(varied[side], f"{line.grid}, ...") if varied and side in varied else line
            lines.append(line)
            measured.append(Measured(line=line, row=row, low=low, size=size, settings=here))
        means += mean_lines(lines, compared.means, known)
    table = replace(table, drawn=resampled.over() if resampled else "", notes=(*table.notes, *comparison.notes))
    found = with_published(table, measured, published)
    return replace(found, lines=(*found.lines, *means))


def _features_of(recipe: Recipe, size: Size) -> dict[str, JsonValue]:
    """What made the maps, by the names that `Published.settings` have. A file may hold the paper's weights; random ones don't."""
    spec = recipe.spec(size)
    weights = "random" if spec.weights_source == "random" else "pretrained"
    return {"model_args": {}, **spec.to_json(), "weights": weights, "drawing": recipe.rendering}


def count_of(left_out: Sequence[LeftOut]) -> int:
    """Items, for whichever reason."""
    return sum(each.count for each in left_out)


@dataclass(frozen=True, kw_only=True)
class Work(Generic[S]):
    """What a worker is given, and makes itself of."""

    evaluation: Evaluation[S]
    recipe: SourceRecipe[S]
    folder: Folder
    device: str
    threads: int

    def __call__(self) -> Callable[[Piece], str]:
        torch.set_num_threads(self.threads)
        source = self.recipe.source(self.device)
        return lambda piece: self.run(piece, source)

    def run(self, piece: Piece, source: S) -> str:
        """Do a piece and write its records, and before them what float16 couldn't hold; returns its name."""
        records = self.evaluation.run(piece, source, self.folder)
        lines = "".join(f"{json.dumps(record)}\n" for record in records)
        if clipped := source.clipped.take():
            self.folder.write(_clipped(piece.name), "".join(f"{json.dumps(asdict(each))}\n" for each in clipped).encode())
        self.folder.write(_part(piece.name), lines.encode())
        return piece.name


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What an evaluation is of, as its identity has it, wherever it lies."""

    records: Sequence[object]
    "what was read of lists and annotations, and what is computed once for all items"
    images: Mapping[Size, Sequence[EncodedImage]] = field(default_factory=dict)
    "by the model's input size: those whose features are asked for"
    labels: Sequence[HasContent] = ()
    "files that are read beside them"
    contents: Mapping[str, str] = field(default_factory=dict)
    "digests of what else is read, by name: what a refusal is to name of its own"


def by_size(asked: Iterable[tuple[Size, EncodedImage]]) -> dict[Size, list[EncodedImage]]:
    """Images by the size of the input that they are drawn at."""
    found: dict[Size, list[EncodedImage]] = {}
    for size, image in asked:
        found.setdefault(size, []).append(image)
    return found


def begin(config: EvaluationConfig, task: str, recipe: R, of: Evaluated) -> tuple[R, Folder]:
    """Features joined with the images that they are asked of; and the output folder, begun, or held against the settings and the
    data that it was begun with. Raises `ConfigError`, and `FeaturesMissing` where a store doesn't fit the data."""
    folder = run_folder(config.required("out"), config.options, "evaluation")
    images = distinct([image for each in of.images.values() for image in each])
    contents = dict(zip((image.displayed for image in images), content_digests(images), strict=True))
    recipe = recipe.joined(of.images, contents)
    identity = {"task": task, **config.counted(), **recipe.identity()}
    identity["data"] = digest(of.records)  # where it lies may change, what it holds may not
    identity["images_content"] = joint_digest(contents.values())
    identity["labels_content"] = joint_digest(content_digests(of.labels))
    identity |= {f"{name}_content": content for name, content in of.contents.items()}
    # Settings that mean nothing beside the others: earlier versions may not have had them.
    begin_run(folder, json.loads(json.dumps(identity)), recipe.recorded(config), aside=config.without_use())
    return recipe, folder


def run_pieces(
    config: EvaluationConfig, evaluation: Evaluation[S], recipe: SourceRecipe[S], folder: Folder, executor: Executor
) -> list[Record]:
    """Do what isn't done yet; returns all records, in the order of the pieces."""
    pieces = evaluation.pieces()
    if pending := _pending(folder, pieces):
        pool = executor.pool(config.cluster.request())
        work = Work(evaluation=evaluation, recipe=recipe, folder=folder, device=pool.device, threads=pool.cpus)
        items = {piece.name: _items([piece]) for piece in pending}
        with Progress(total=_items(pieces), done=_items(pieces) - _items(pending), unit="items") as progress:
            for finished, name in enumerate(executor.pieces(work, pending, pool), 1):
                progress.add(items[name])
                progress.said = f"{name} done, {finished} of {len(pending)} pieces"
    return _records(folder, pieces)


Settings = TypeVar("Settings", bound=EvaluationConfig, contravariant=True)
Evaluating = TypeVar("Evaluating", bound=Evaluation[Any])
Making = TypeVar("Making", bound=SourceRecipe[Any])


class Task(Protocol[Settings, Evaluating, Making]):
    """A module of this folder, or another like them: one word of `jobs/evaluate.py`."""

    def prepare(self, config: Settings, /) -> tuple[Evaluating, Making, Folder]:
        """The work, the features it is done on, and the output folder, begun or continued."""

    def find(self, config: Settings, evaluation: Evaluating, recipe: Making, records: Sequence[Record], /) -> Findings:
        """What the records of all pieces come to."""


def evaluate(name: str, task: Task[Settings, Evaluating, Making], config: Settings) -> str:
    """Evaluate, or go on with it, to the end, and write what was found; returns the tables as Markdown."""
    config.require_used()
    evaluation, recipe, folder = task.prepare(config)  # before a cluster is started: most mistakes end here
    with executor_for(config) as executor:
        records = run_pieces(config, evaluation, recipe, folder, executor)
    findings, clipped = task.find(config, evaluation, recipe, records), clipped_features(folder, evaluation.pieces())
    if clipped.images:
        logger.warning("%s", clipped)
    # What pictures need is kept when an item is scored.
    asked = f"--pictures {config.pictures}: none, since an earlier start scored these items and kept fewer; use a new --out"
    undrawn = {"pictures": asked} if config.pictures and not findings.pictures else {}
    findings = replace(findings, choices={**findings.choices, **recipe.said(), **undrawn}, clipped=clipped)
    return write_results(folder, name, recipe.recorded(config), recipe.described(), findings)


def plan_lines(task: Task[Settings, Evaluating, Making], config: Settings) -> Iterator[str]:
    """What an evaluation will do, and what of it is done, in words. The data is listed and held against the evaluation that is
    there, if one is. Raises what `Task.prepare` raises."""
    config.require_used()
    with planned(config, config.out) as drafted:
        evaluation, recipe, folder = task.prepare(drafted)
        pieces = evaluation.pieces()
        left = _pending(folder, pieces)
    yield f"evaluation {redact(config.out, config.options)}: {len(pieces) - len(left):,} of {len(pieces):,} pieces done"
    yield f"items      {_items(pieces):,}, {_items(left):,} to go ({len(left):,} of {len(pieces):,} pieces)"
    yield from recipe.planned()
    yield NOTHING_RUN


def _pending(folder: Folder, pieces: Sequence[Piece]) -> list[Piece]:
    """Those that aren't done."""
    done = folder.sizes("parts")
    return [piece for piece in pieces if f"{piece.name}.jsonl" not in done]


def _items(pieces: Sequence[Piece]) -> int:
    """Of pieces, each as often as it is asked for (at several sizes, for example)."""
    return sum(max(1, len(piece.items)) for piece in pieces)


def main(name: str, task: Task[Settings, Evaluating, Making], config: Settings) -> Iterator[str]:
    """`evaluate`, and what there is to say of it; with --plan, what it would do."""
    if config.plan:
        yield from plan_lines(task, config)
        return
    yield evaluate(name, task, config)
    yield f"written to {redact(config.out, config.options)}"


def clipped_features(folder: Folder, pieces: Sequence[Piece]) -> ClippedFeatures:
    """What float16 couldn't hold in the features of these pieces."""
    there = folder.sizes("clipped")
    names = [_clipped(piece.name) for piece in pieces if f"{piece.name}.jsonl" in there]
    return ClippedFeatures.of_images(decode(ClippedImage, each) for each in _lines(folder, names))


def _records(folder: Folder, pieces: Sequence[Piece]) -> list[Record]:
    return _lines(folder, [_part(piece.name) for piece in pieces])


def _lines(folder: Folder, names: Sequence[str]) -> list[Record]:
    records: list[Record] = []
    for name, data in zip(names, folder.read_many(names), strict=True):
        with Document(folder, name, "delete it and run the same command").parsing():
            records += [parse_json(line) for line in data.decode().splitlines()]
    return records


def _clipped(name: str) -> str:
    return f"clipped/{name}.jsonl"


def _part(name: str) -> str:
    return f"parts/{name}.jsonl"
