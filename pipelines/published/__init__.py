"""What the papers print and how they train, each number once, a file a paper: tables that reports show beside measured ones, and
recipes. What all papers' files are made of is here.

Numbers are in the units of their tables. Reports ask for them with `--paper`; presets of jobs/ take the recipes. Our notes on the
papers have their tables' numbers, and not their pages.
"""

from collections.abc import Mapping
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


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a paper trains readouts for a task, as settings of jobs/train.py."""

    paper: Paper
    label: str
    "as tables have it"
    task: str
    dataset: str
    settings: Settings


SPAIR_PAIRS = 12_234
"""Of SPair-71k's test split. How many items a data set lists tells it from others in its layout."""
