"""A paper's tables and figures as they came out: Markdown, JSON and pictures, with the published numbers and the differences."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict

from operators.metrics.bootstrap import RESAMPLES, Estimate
from pipelines.executors import executor_for
from pipelines.provenance import NOTHING_RUN, require_no_run, run_folder, versions
from pipelines.results import NOT_SHOWN, bounds, difference_in_words, table_lines
from pipelines.tables.doing import CellsFailed
from pipelines.tables.drawings import draw, fronts
from pipelines.tables.figures import Figure, Results, figures_of
from pipelines.tables.paper_run import Outcome, run_papers_cells, state_in_words
from pipelines.tables.papers import PaperPlan, PapersConfig, PaperTable
from pipelines.tables.seeds import Score
from storage.documents import JsonValue
from storage.paths import Folder
from storage.words import printable

TOKEN_PARAMETERS_AN_HOUR = 25_025 * 256 * (28**2 + 14**2 + 7**2) * 21.6e6 / 8
"""Of the backbone's forward passes, on one A6000: LiFT's paper has its training, whose passes these are, at about 8 hours."""


def report(plan: PaperPlan, found: Mapping[str, Sequence[Figure]], pictures: Mapping[str, str]) -> str:
    """As Markdown."""
    parts = [f"# {plan.paper}", *_how_far_known(found)]
    for table in plan.tables:
        parts.append(f"## {_name(table)}: {table.title}\n" + "\n".join(_lines(found[table.number])))
        if table.number in pictures:
            parts.append(f"![{_name(table)}]({pictures[table.number]})")
        if notes := [*table.notes, *fronts(table, found[table.number]), *_missing(plan, found[table.number])]:
            parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def _how_far_known(found: Mapping[str, Sequence[Figure]]) -> Iterator[str]:
    """What brackets and deviations are, where there are any."""
    figures = [each for of in found.values() for each in of]
    if any(each.interval for each in figures):
        yield (
            f"In brackets: 95 % intervals, {RESAMPLES:,} draws of a figure's pairs, clips or images; `less` another row: of the "
            f"same draws, and '{NOT_SHOWN}' where the interval holds 0."
        )
    if any(each.score for each in figures):
        yield (
            "Mean ± sample deviation over seeds of the trainings; `shown by`: so many of them have an interval of the "
            "difference, of 95 %, that doesn't hold 0."
        )


def _name(table: PaperTable) -> str:
    number = table.number
    if number.startswith("fig"):
        return f"Figure {number.removeprefix('fig')}"
    return f"Supplement, Table {number.removeprefix('s')}" if number.startswith("s") else f"Table {number}"


def _lines(found: Sequence[Figure]) -> Iterator[str]:
    """Of each row what was measured, how far that is from the row that its evaluation compares it with, what the paper has, and
    the difference to that."""
    rows = list(dict.fromkeys(each.wanted.row for each in found))
    columns = list(dict.fromkeys(each.wanted.column for each in found))
    at = {(each.wanted.row, each.wanted.column): each for each in found}
    lines: list[list[str]] = []
    for row in rows:
        of_row = [at.get((row, column)) for column in columns]
        lines.append([row, *(_measured(each) for each in of_row)])
        lines += [[f"{row}, less {other}", *(_apart(each, other) for each in of_row)] for other in _compared(of_row)]
        if any(each and each.wanted.published is not None for each in of_row):
            lines.append([f"{row}, published", *(_number(each, lambda figure: figure.wanted.published) for each in of_row)])
        if any(each and each.difference is not None for each in of_row):
            lines.append([f"{row}, less published", *(_number(each, lambda figure: figure.difference, "+") for each in of_row)])
    if lines:
        yield from table_lines(["", *columns], lines)


def _measured(figure: Figure | None) -> str:
    if figure is None:
        return ""
    if figure.measured is None:
        return "missing"
    digits = figure.wanted.digits
    if figure.score:
        return figure.score.in_words(digits, len(figure.seeds))
    return f"{figure.measured:.{digits}f}{f' {bounds(figure.interval, digits)}' if figure.interval else ''}"


def _compared(found: Sequence[Figure | None]) -> list[str]:
    """The rows of their evaluations that figures are compared with, where it can be said how far that is known."""
    known = [known for each in found if each for known in _estimates(each)]
    return list(dict.fromkeys(each.against for each in known if each.difference_interval))


def _estimates(figure: Figure) -> list[Estimate]:
    """By seed."""
    return [each.estimate for each in figure.seeds or (figure,) if each.estimate]


def _apart(figure: Figure | None, other: str) -> str:
    """How far a figure is from another row's, and whether that is shown: by its interval, or by those of so many seeds."""
    known = [each for each in _estimates(figure) if each.against == other and each.difference_interval] if figure else []
    if figure is None or not known:
        return ""
    if not figure.seeds:
        return difference_in_words(known[0], figure.wanted.digits)
    score = Score.of([each.difference for each in known if each.difference is not None])
    shown = sum(not each.difference_interval.holds_zero for each in known if each.difference_interval)
    return f"{score.in_words(figure.wanted.digits, len(figure.seeds), '+')}, shown by {shown} of {len(known)}" if score else ""


def _number(figure: Figure | None, value: Callable[[Figure], float | None], sign: str = "") -> str:
    number = value(figure) if figure else None
    if figure is None or number is None:
        return ""
    digits = figure.wanted.digits
    return f"{round(number, digits) + 0.0:{sign}.{digits}f}"  # nothing is no less than nothing


def _missing(plan: PaperPlan, found: Sequence[Figure]) -> Iterator[str]:
    """What isn't there, and why: a sentence a reason."""
    rows: dict[str, dict[str, None]] = {}
    for each in found:
        cells = [plan.cells[name] for name in each.wanted.cells if name in plan.cells]
        reasons = set[str]().union(*map(plan.reasons, cells)) if each.missing else set[str]()
        for reason in sorted(reasons) or filter(None, [each.missing]):
            rows.setdefault(reason, {})[each.wanted.row] = None
    for reason, of in rows.items():
        yield f"missing, {', '.join(of)}: {reason}"


def _pictures(
    plan: PaperPlan, found: Mapping[str, Sequence[Figure]], outcomes: Mapping[str, Outcome], folder: Folder
) -> dict[str, str]:
    """Drawn, or taken from a cell; names of their files by table."""
    names = {}
    for table in plan.tables:
        taken = (
            folder.read(f"{plan.place(plan.cells[cell])}/{file}")
            for cell, file in table.pictures.items()
            if not outcomes[cell].error
        )
        if data := draw(table, found[table.number]) or next(taken, None):
            names[table.number] = f"pictures/{table.number}.png"
            folder.write(names[table.number], data)
    return names


def _known(figure: Figure) -> dict[str, JsonValue]:
    """How far a figure is known, and how far it is from another row of its evaluation."""
    known = figure.estimate
    compared = (
        known
        and known.against
        and {
            "to": known.against,
            "difference": known.difference,
            "interval": asdict(known.difference_interval) if known.difference_interval else None,
        }
    )
    return {"interval": asdict(figure.interval) if figure.interval else None, "compared": compared or None}


def write_tables(folder: Folder, config: PapersConfig, plan: PaperPlan, outcomes: Mapping[str, Outcome]) -> str:
    """tables.md, tables.json and pictures; returns the Markdown. Of the same cells, the same bytes."""
    results = Results.read(plan, outcomes, folder)
    found = {table.number: figures_of(table, results) for table in plan.tables}
    pictures = _pictures(plan, found, outcomes, folder)
    text = printable(report(plan, found, pictures))
    document: dict[str, JsonValue] = {
        "paper": plan.paper,
        "tables": [
            {
                "number": table.number,
                "title": table.title,
                "figures": [
                    {
                        **asdict(each.wanted),
                        "measured": each.measured,
                        **_known(each),
                        **({"seeds": [{"measured": of.measured, **_known(of)} for of in each.seeds]} if each.seeds else {}),
                        "difference": each.difference,
                        "missing": each.missing,
                    }
                    for each in found[table.number]
                ],
            }
            for table in plan.tables
        ],
        "cells": {name: {"job": cell.job, "error": outcomes[name].error} for name, cell in plan.cells.items()},
        "config": config.public(),
        "versions": versions(),
    }
    folder.write("tables.json", json.dumps(document, indent=1).encode())
    folder.write("tables.md", text.encode())
    return text


def plan_lines(config: PapersConfig, plan: PaperPlan) -> Iterator[str]:
    """Cells, GPU-hours and storage. No data is read."""
    states = {name: state_in_words(config.folder, plan, cell) for name, cell in plan.cells.items()}
    missing = [name for name, state in states.items() if state.startswith("missing")]
    done = [name for name, state in states.items() if state == "done"]
    left = [cell for name, cell in plan.cells.items() if name not in {*missing, *done}]
    hours = {cell.name: cell.token_parameters / TOKEN_PARAMETERS_AN_HOUR for cell in plan.cells.values()}
    yield (
        f"{config.folder.displayed}: {len(plan.tables)} tables and figures, {len(plan.cells)} cells, {len(done)} done, "
        f"{len(missing)} missing, {len(left)} to go"
    )
    width = max(len(name) for name in plan.cells)
    for name, state in states.items():
        yield f"  {name:<{width}}  {plan.cells[name].job:<14}  {hours[name]:8.2f} GPU h  {state}"
    for reason, count in Counter(lacks for cell in plan.cells.values() for lacks in plan.reasons(cell)).items():
        yield f"missing    {reason} ({count} cells)"
    to_go, stored = sum(hours[cell.name] for cell in left), sum(cell.stored_bytes for cell in left)
    yield f"time       about {to_go:,.1f} GPU hours for those to go, {sum(hours.values()):,.1f} for all, missing ones included:"
    yield "           the backbones' passes, on an A6000 that trains LiFT on ImageNet in the 8 hours that its paper says"
    yield f"storage    about {stored / 1e9:,.2f} GB for those to go: checkpoints, records and masks; features aren't stored"
    yield NOTHING_RUN


def main(make: Callable[[PapersConfig], PaperPlan], config: PapersConfig) -> Iterator[str]:
    """Do all cells, and write the tables. Raises `CellsFailed` at the end where one failed; what is missing is no failure."""
    folder, plan = run_folder(config.folder.url, config.options), make(config).only(config.table).by_seeds(config.seeds)
    require_no_run(folder, "tables")
    if config.plan:  # which may be made on a machine that doesn't see what the cluster does
        yield from plan_lines(config, plan)
        return
    config.require_places()
    with executor_for(config) as executor:
        outcomes = run_papers_cells(config, plan, executor)
    yield write_tables(folder, config, plan, outcomes)
    yield f"{folder.displayed}: tables.md, tables.json; each cell in a folder of its own"
    if failed := [name for name, each in outcomes.items() if each.error and not each.hindered]:
        raise CellsFailed(f"{len(failed)} of {len(plan.cells)} cells failed: {', '.join(failed)}; the tables say why")
