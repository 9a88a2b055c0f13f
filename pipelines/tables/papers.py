"""A paper's tables: cells that are trained, evaluated or measured, with what others made, and the figures that are taken of them.

A cell is a run of `jobs/train.py` or `jobs/evaluate.py` in a folder of its own, which continues by itself; `done.json`, written
last, says of which settings it is, those of the cells that it takes from included. Whoever starts the tables again does what
isn't there, and cells that several tables take from are done once. A paper is plain data: pipelines/tables/lift.py.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cluster.resources import WorkerRequest
from pipelines.config import (
    ActorsConfig,
    ConfigError,
    Free,
    Held,
    JobConfig,
    absolute,
    require_at_least,
    require_gpus,
    require_out,
)
from storage.datasets.files import digest
from storage.documents import JsonValue
from storage.paths import Folder
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
class PapersConfig(JobConfig):
    """A paper's tables and curves: every cell trained or evaluated, with the published number and the difference beside it."""

    out: Free[str] = ""
    """The folder to write or continue: a path or fsspec URL. Each cell is a folder in it; tables.md, tables.json, pictures."""
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

    cluster: Held[ActorsConfig] = ActorsConfig()
    cell_cpus: Free[int | None] = None
    """CPUs and threads of one cell; default: 1 on CPU, the node's share per GPU otherwise."""
    cell_gpus: Free[float | None] = None
    """GPUs of one cell; fractions do several on one."""
    max_failures: Free[int] = 3
    """Lost workers or nodes after which a cell is given up; each time, it goes on from what it has kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "sizes", "steps", "limit", "cell_cpus")
        require_at_least(0, self, "max_failures")
        require_gpus(self.cell_gpus, "--cell-gpus")
        if self.root and self.scale != "mini":
            raise ConfigError(f"--root {redact(self.root, self.options)}: only mini's layout is known; name folders with --data")

    @property
    def places(self) -> tuple[str, ...]:
        return self.out, self.root, *self.pairs("data").values()

    @property
    def folder(self) -> Folder:
        """Of `out`. Raises `ConfigError`."""
        require_out(self.out, "a path or URL for the tables")
        return Folder(absolute(self.out), self.options)

    def pairs(self, name: str) -> dict[str, str]:
        """`data`, `backbone` or `weights`, which are NAME=VALUE, by name. Raises `ConfigError`."""
        found = {}
        for text in getattr(self, name):
            key, equals, value = text.partition("=")
            if not key or not equals or not value:
                raise ConfigError(f"--{name} {redact(text, self.options)}: use NAME=VALUE")
            found[key] = value
        return found

    def require_known(self, **known: Collection[str]) -> None:
        """Raises `ConfigError` for names of NAME=VALUE settings that a paper doesn't have; `known`: its names by setting."""
        for name, names in known.items():
            if unknown := self.pairs(name).keys() - names:
                raise ConfigError(f"--{name} {redact(', '.join(sorted(unknown)))}: there are {', '.join(sorted(names))}")

    def require_places(self) -> None:
        """Raises `ConfigError` where --root or a data set's folder isn't there, as far as this machine sees it."""
        named = {"--root": self.root} | {f"--data {name}": url for name, url in self.pairs("data").items() if name != "photos"}
        for flag, url in named.items():
            path = absolute(url) if url else ""
            if path and "://" not in path and not Path(path).is_dir():
                raise ConfigError(f"{flag} {redact(url, self.options)}: there is no such folder")

    def worker_request(self) -> WorkerRequest:
        """Workers that do a cell each."""
        return WorkerRequest(
            device=self.cluster.device, actors=self.cluster.actors, cpus=self.cell_cpus, gpus=self.cell_gpus, called="cell"
        )


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
        correlated = [wanted.cell for each in self.correlated for wanted in each.numbers]
        return list(dict.fromkeys([*(each.cell for each in self.wanted), *correlated, *self.pictures]))


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
