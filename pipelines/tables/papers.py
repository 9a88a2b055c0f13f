"""A paper's tables: cells that are trained, evaluated or measured, with what others made, and the figures that are taken of them.

A cell is a run of `jobs/train.py` or `jobs/evaluate.py` in a folder of its own, which continues by itself; `done.json`, written
last, says of which settings it is, those of the cells that it takes from included. Whoever starts the tables again does what
isn't there, and cells that several tables take from are done once. A paper is plain data: pipelines/tables/lift.py.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from pipelines.config import ConfigError, Free, require_at_least
from pipelines.tables.doing import CellsConfig, require_folder
from storage.datasets.files import digest
from storage.documents import JsonValue, decode
from storage.redaction import redact

Scale = Literal["paper", "mini", "debug"]
"""The paper's own data and backbones; few real photographs, in the layout of their folder; drawn images, in a minute."""

TRAININGS = ("lift", "vit-up", "readout", "vitdet")
"""What jobs/train.py learns: x2 upsamplers as LiFT does, ViT-Up, readouts, detectors."""

Job = Literal[
    "lift", "vit-up", "readout", "vitdet", "correspondence", "video", "discovery", "cka", "similarity", "runtime", "probe",
    "detection", "speed", "counts",
]  # fmt: skip
"""One of `TRAININGS`, the first word of jobs/evaluate.py, or one of pipelines/tables/measures.py."""


@dataclass(frozen=True, kw_only=True)
class PapersConfig(CellsConfig):
    """A paper's tables and curves: every cell trained or evaluated, with the published number and the difference beside it."""

    table: Free[tuple[str, ...]] = ()
    """Only these, by number: 1, fig4, s2. Default: all."""
    scale: Free[Scale] = "paper"
    """`paper`: the published sizes, backbones and schedules. `mini`: short trainings on few photographs, on one backbone, at
    --sizes. `debug`: drawn images and random weights."""
    data: Free[tuple[str, ...]] = ()
    """DATASET=FOLDER for each data set: spair, davis, voc07, voc12, coco20k, coco, voc, coco_stuff, nyu, ...; photos=TARS to
    train upsamplers on (ImageNet-1k). --plan names those of a paper that aren't there."""
    root: Free[str] = ""
    """mini: a folder that holds labelled/ (spair_layout, davis, voc, coco), photos_train/ and photos_open/, for what --data
    doesn't name."""
    backbone: Free[tuple[str, ...]] = ()
    """NAME=TIMM_NAME: another network for one of the paper's, for example dino-s16=vit_small_patch14_dinov2.lvd142m."""
    weights: Free[tuple[str, ...]] = ()
    """NAME=WEIGHTS of a backbone, as for jobs/train.py, where timm's pretrained ones aren't it: leopart=URL moco=URL."""
    sizes: Free[tuple[int, ...]] = ()
    """Sides of the input in pixels, of tables that have several. Default: the paper's (LiFT's 56 112 224 448); mini: 112 224, or
    224 where tables have one."""
    steps: Free[int | None] = None
    """Optimiser steps of each training; default: the scale's."""
    limit: Free[int | None] = None
    """Only the first N items of each data set."""
    plan: Free[bool] = False
    """Print cells, GPU-hours and storage, and what is done already, then stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "sizes", "steps", "limit")
        if self.root and self.scale != "mini":
            raise ConfigError(f"--root {redact(self.root, self.options)}: only mini's layout is known; name folders with --data")

    @property
    def places(self) -> tuple[str, ...]:
        return self.out, self.root, *self.pairs("data").values()

    def require_places(self) -> None:
        """Raises `ConfigError` where --root or a data set's folder isn't there, as far as this machine sees it."""
        require_folder("--root", self.root, self.options)
        super().require_places()


LACKS = "; "
"""Between the sentences of what a cell lacks."""


@dataclass(frozen=True, kw_only=True)
class PaperCell:
    """A run: its settings, and what it takes from other cells."""

    name: str
    job: Job
    settings: Mapping[str, JsonValue] = field(default_factory=dict)
    "flat, as flags have them; texts may hold {NAME}, which is the folder of the cell called so"
    needs: tuple[str, ...] = ()
    "names of the cells that it takes from"
    missing: str = ""
    "what isn't there of its data, weights or method, so that it can't be done, joined by `LACKS`"
    token_parameters: float = 0.0
    "of the backbone's forward passes: images times tokens times parameters, which are about their multiply-accumulates"
    stored_bytes: float = 0.0
    "that it keeps, about"

    def by_seed(self, seed: int | None, learnt: Collection[str]) -> "PaperCell":
        """The same by another seed, taking from the cells of that seed where those are `learnt`; of None, as it is."""
        if seed is None:
            return self
        names = {name: _of_seed(name, seed) if name in learnt else name for name in self.needs}
        settings = with_replaced(self.settings, {f"{{{name}}}": f"{{{other}}}" for name, other in names.items()})
        if seed and self.job in TRAININGS:
            settings["seed"] = seed + decode(int, self.settings.get("seed", 0), "seed")
        return replace(self, name=_of_seed(self.name, seed), settings=settings, needs=tuple(names.values()))


def _of_seed(name: str, seed: int) -> str:
    return f"{name}-seed{seed}" if seed else name


def with_replaced(settings: Mapping[str, JsonValue], texts: Mapping[str, str]) -> dict[str, JsonValue]:
    """Settings in whose texts others stand for some, also within lists."""
    return {name: _replaced(value, texts) for name, value in settings.items()}


def _replaced(value: JsonValue, texts: Mapping[str, str]) -> JsonValue:
    if isinstance(value, str):
        for name, other in texts.items():
            value = value.replace(name, other)
        return value
    return tuple(_replaced(each, texts) for each in value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A number of a table: where it is found, and what the paper has."""

    row: str
    column: str
    cell: str
    line: str
    "of the cell's results: low-res, lift x2, ...; empty: its first one"
    value: str
    "the column of that line"
    px: int | None = None
    "the line's input; None: that of any"
    published: float | None = None
    scale: float = 1.0
    "of the table's unit in that of the cell's results"
    digits: int = 2
    "behind the point, as the paper prints them"
    falls: bool = False
    "whether less is better"
    again: tuple[str, ...] = ()
    "cells that come to the same number by other seeds"

    @property
    def cells(self) -> tuple[str, ...]:
        """By seed, or one."""
        return self.cell, *self.again

    def by_seeds(self, names: Mapping[str, Sequence[str]]) -> "Wanted":
        """The number by every seed; `names` has the cells of each cell."""
        first, *again = names[self.cell]
        return replace(self, cell=first, again=tuple(again))


@dataclass(frozen=True, kw_only=True)
class Correlated:
    """A number of a table that is the rank correlation of several cells' numbers with what others have published."""

    row: str
    column: str
    numbers: tuple[Wanted, ...]
    others: tuple[float, ...]
    "theirs, of the same things"
    names: tuple[str, ...]
    "of these things"


Drawing = Literal["", "scatter", "front", "lines", "bars", "pairs"]
"""How a table is drawn: a point a row, its first column across and its second one up; such a panel for every further column, with
the rows that none beats in both; a line a row; bars of each column by row; a panel for each correlation."""


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """A table or a curve of a paper."""

    number: str
    "as --table has it: 1, fig4, s2"
    title: str
    wanted: tuple[Wanted, ...] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)
    "of a figure: file by the cell whose picture it is, as CELL: pictures/FILE"
    correlated: tuple[Correlated, ...] = ()
    drawing: Drawing = ""
    notes: tuple[str, ...] = ()

    @property
    def needs(self) -> list[str]:
        """Names of its cells."""
        wanted = [*self.wanted, *(each for of in self.correlated for each in of.numbers)]
        return list(dict.fromkeys([*(cell for each in wanted for cell in each.cells), *self.pictures]))

    def by_seeds(self, names: Mapping[str, Sequence[str]]) -> "PaperTable":
        """Its numbers by every seed, its pictures by the first."""
        return replace(
            self,
            wanted=tuple(each.by_seeds(names) for each in self.wanted),
            pictures={names[cell][0]: file for cell, file in self.pictures.items()},
            correlated=tuple(replace(of, numbers=tuple(each.by_seeds(names) for each in of.numbers)) for of in self.correlated),
        )


@dataclass(frozen=True, kw_only=True)
class PaperPlan:
    """A paper's tables and all the cells that they take from."""

    paper: str
    tables: tuple[PaperTable, ...]
    cells: Mapping[str, PaperCell]

    def only(self, numbers: Sequence[str]) -> "PaperPlan":
        """Those tables, with the cells that they need. Raises `ConfigError`."""
        known = {table.number: table for table in self.tables}
        if unknown := [number for number in numbers if number not in known]:
            raise ConfigError(f"--table {' '.join(unknown)}: there are {', '.join(known)}")
        tables = tuple(known[number] for number in dict.fromkeys(numbers)) if numbers else self.tables
        asked = list(dict.fromkeys(name for table in tables for name in table.needs))
        for name in asked:  # grows while it is read
            asked += [need for need in self.cells[name].needs if need not in asked]
        return PaperPlan(paper=self.paper, tables=tables, cells={name: self.cells[name] for name in self.cells if name in asked})

    def by_seeds(self, seeds: Sequence[int]) -> "PaperPlan":
        """Trainings and all that takes from them once for each seed, which is added to the training's own: of 0, cells are what
        they are without seeds."""
        learnt = {name for name, cell in self.cells.items() if self._learns(cell)}
        names = {name: [_of_seed(name, seed) for seed in seeds] if name in learnt else [name] for name in self.cells}
        cells = [
            cell.by_seed(seed, learnt) for cell in self.cells.values() for seed in (seeds if cell.name in learnt else (None,))
        ]
        return PaperPlan(
            paper=self.paper,
            tables=tuple(table.by_seeds(names) for table in self.tables),
            cells={cell.name: cell for cell in cells},
        )

    def _learns(self, cell: PaperCell) -> bool:
        """Whether it trains something, or takes from what is trained."""
        return cell.job in TRAININGS or any(self._learns(self.cells[name]) for name in cell.needs)

    def waves(self) -> list[list[PaperCell]]:
        """Cells that can be done beside each other, in the order of what they need."""
        left, done, waves = dict(self.cells), set[str](), []
        while left:
            wave = [cell for cell in left.values() if done.issuperset(cell.needs)]
            waves.append(wave)
            done |= {cell.name for cell in wave}
            left = {name: cell for name, cell in left.items() if name not in done}
        return waves

    def lacks(self, cell: PaperCell) -> str:
        """What isn't there of a cell, or of one that it takes from; empty where it can be tried."""
        of_needs = ((name, self.lacks(self.cells[name])) for name in cell.needs)
        return cell.missing or next((f"it needs {name}: {lacks}" for name, lacks in of_needs if lacks), "")

    def reasons(self, cell: PaperCell) -> set[str]:
        """All that isn't there of a cell, and of those that it takes from."""
        own = set(cell.missing.split(LACKS)) if cell.missing else set[str]()
        return own.union(*(self.reasons(self.cells[name]) for name in cell.needs))

    def place(self, cell: PaperCell) -> str:
        """The name of its folder, which is another one where its settings are others."""
        return f"{cell.name}-{self.identity(cell)[:8]}"

    def identity(self, cell: PaperCell) -> str:
        """Of what a cell is, and all that it takes from."""
        needed = [self.identity(self.cells[name]) for name in cell.needs]
        return digest((json.dumps([cell.job, dict(cell.settings), needed], sort_keys=True),))
