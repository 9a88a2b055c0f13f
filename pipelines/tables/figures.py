"""The numbers of papers' tables as cells' results have them, measured or missing, with their intervals and differences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from scipy.stats import spearmanr

from operators.metrics.bootstrap import Estimate, Interval
from pipelines.results import Cell, Table
from pipelines.tables.paper_run import RESULTS, Outcome
from pipelines.tables.papers import TRAININGS, Correlated, PaperPlan, PaperTable, Wanted
from pipelines.tables.seeds import Score
from storage.documents import JsonValue, decode, parse_json
from storage.paths import Folder
from storage.runs import read_metrics

FEWEST = 3
"""Numbers that a correlation is taken of."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number of a table, measured or not."""

    wanted: Wanted
    measured: float | None
    estimate: Estimate | None = None
    "how far it is known, and how far it is from the bilinear row of the same evaluation"
    missing: str = ""
    "why nothing is measured, or not by every seed"
    seeds: tuple["Figure", ...] = ()
    "the same by each of several seeds, whose mean is measured"
    points: tuple[tuple[float, float, str], ...] = ()
    "of a correlation: others' number, the measured one, and what they are of"

    @property
    def score(self) -> Score | None:
        """Over the seeds that have it; None of one seed."""
        return Score.of([each.measured for each in self.seeds if each.measured is not None])

    @property
    def ends(self) -> tuple[float, float] | None:
        """Of its interval, or a deviation below and above the mean of seeds."""
        if self.interval:
            return self.interval.low, self.interval.high
        if (score := self.score) and score.deviation is not None:
            return score.mean - score.deviation, score.mean + score.deviation
        return None

    @property
    def interval(self) -> Interval | None:
        return self.estimate.interval if self.estimate else None

    @property
    def difference(self) -> float | None:
        """Measured less published."""
        if self.measured is None or self.wanted.published is None:
            return None
        return round(self.measured - self.wanted.published, 6)


@dataclass(frozen=True, kw_only=True)
class Results:
    """What cells came to: of those that are done, tables by name, or for trainings the last value of each metric."""

    outcomes: Mapping[str, Outcome]
    tables: Mapping[str, tuple[Table, ...]]
    metrics: Mapping[str, Mapping[str, JsonValue]]

    @classmethod
    def read(cls, plan: PaperPlan, outcomes: Mapping[str, Outcome], folder: Folder) -> "Results":
        """Of the cells that tables take numbers from."""
        wanted = {name for table in plan.tables for name in table.needs}
        done = [name for name in plan.cells if name in wanted and not outcomes[name].error]
        trained = [name for name in done if plan.cells[name].job in TRAININGS]
        judged = [name for name in done if name not in trained]
        files = folder.read_many([f"{plan.place(plan.cells[name])}/{RESULTS}" for name in judged])
        tables = {name: parse_json(data)["tables"] for name, data in zip(judged, files, strict=True)}
        metrics: dict[str, dict[str, JsonValue]] = {}
        for name in trained:
            own = Folder(f"{folder.url.rstrip('/')}/{plan.place(plan.cells[name])}", folder.options)
            metrics[name] = {key: value for line in read_metrics(own) for key, value in line.items()}
        return cls(
            outcomes=outcomes,
            tables={name: decode(tuple[Table, ...], found, name) for name, found in tables.items()},
            metrics=metrics,
        )

    def figure(self, wanted: Wanted) -> Figure:
        """A number, or its mean over seeds, or why there is none."""
        found = [self._figure(replace(wanted, cell=cell, again=())) for cell in wanted.cells]
        if len(found) == 1:
            return found[0]
        figure = Figure(
            wanted=wanted, measured=None, seeds=tuple(found), missing="; ".join(filter(None, (e.missing for e in found)))
        )
        return replace(figure, measured=figure.score.mean) if figure.score else figure

    def _figure(self, wanted: Wanted) -> Figure:
        if error := self.outcomes[wanted.cell].error:
            return Figure(wanted=wanted, measured=None, missing=error)
        if wanted.cell in self.metrics:
            value = _number(self.metrics[wanted.cell].get(wanted.value))
            if value is not None:
                return Figure(wanted=wanted, measured=value * wanted.scale)
            return Figure(wanted=wanted, measured=None, missing=f"{wanted.cell} has no {wanted.value}")
        return read_figure(self.tables[wanted.cell], wanted)

    def correlation(self, of: Correlated) -> Figure:
        """Spearman's, of all the numbers that are there; `published` is that of the numbers that the paper prints."""
        numbers = [self.figure(each).measured for each in of.numbers]
        pairs = list(zip(numbers, of.others, strict=True))
        named = zip(of.others, numbers, of.names, strict=True)
        printed = [(each.published, other) for each, other in zip(of.numbers, of.others, strict=True)]
        measured, published = _rank_correlation(pairs), _rank_correlation(printed)
        wanted = Wanted(row=of.row, column=of.column, cell="", line="", value="", published=published)
        there = sum(value is not None for value, _ in pairs)
        missing = "" if measured is not None else f"a correlation is of {FEWEST} backbones or more that differ; there are {there}"
        points = tuple((other, value, name) for other, value, name in named if value is not None)
        return Figure(wanted=wanted, measured=measured, missing=missing, points=points)


def read_figure(tables: Sequence[Table], wanted: Wanted) -> Figure:
    """From the tables of a cell's results.json."""
    for table in tables:
        at = table.columns.index(wanted.value) if wanted.value in table.columns else len(table.columns)
        for line in table.lines if at < len(table.columns) else ():
            is_it = wanted.line in ("", line.features) and (wanted.px is None or line.input_px == str(wanted.px))
            value, known = _number(line.values[at]), line.estimates[at] if line.estimates else None
            if is_it and not line.published and value is not None:
                return Figure(wanted=wanted, measured=wanted.scale * value, estimate=known and _scaled(known, wanted.scale))
    where = " ".join(filter(None, [wanted.line and f"of {wanted.line}", f"at {wanted.px} px" if wanted.px else ""]))
    return Figure(wanted=wanted, measured=None, missing=f"{wanted.cell} has no {wanted.value} {where}".rstrip())


def _scaled(known: Estimate, scale: float) -> Estimate:
    own, apart = (
        each and Interval(low=scale * each.low, high=scale * each.high) for each in (known.interval, known.difference_interval)
    )
    difference = None if known.difference is None else scale * known.difference
    return replace(known, interval=own, difference=difference, difference_interval=apart)


def _number(value: Cell | JsonValue) -> float | None:
    """Of a cell that is one, or the text of one; NaN is none."""
    try:
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _rank_correlation(pairs: Sequence[tuple[float | None, float]]) -> float | None:
    """Spearman's, of those that are there; None of too few, or of ones that are all the same."""
    there = [(value, other) for value, other in pairs if value is not None]
    values, others = [value for value, _ in there], [other for _, other in there]
    if len(there) < FEWEST or min(len({*values}), len({*others})) < 2:
        return None
    return round(float(spearmanr(values, others).statistic), 6)


def figures_of(table: PaperTable, results: Results) -> list[Figure]:
    """All of a table's numbers."""
    return [*map(results.figure, table.wanted), *map(results.correlation, table.correlated)]
