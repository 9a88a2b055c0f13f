"""A paper's tables and figures as they came out: Markdown, JSON and pictures, with the published numbers and the differences."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict

from matplotlib.figure import Figure as Drawing

from pipelines.executors import executor_for
from pipelines.plots import png_of, styled
from pipelines.provenance import NOTHING_RUN, require_no_run, run_folder, versions
from pipelines.results import Table, table_lines
from pipelines.tables.paper_run import RESULTS, Figure, Outcome, read_figure, run_papers_cells, state_in_words
from pipelines.tables.papers import TRAININGS, PaperPlan, PapersConfig, PaperTable
from pipelines.tables.run import CellsFailed
from storage.documents import JsonValue, decode, parse_json
from storage.paths import Folder
from storage.words import printable

TOKEN_PARAMETERS_AN_HOUR = 25_025 * 256 * (28**2 + 14**2 + 7**2) * 21.6e6 / 8
"""Of the backbone's forward passes, on one A6000: LiFT's paper has its training, whose passes these are, at about 8 hours."""


def figures(plan: PaperPlan, outcomes: Mapping[str, Outcome], folder: Folder) -> dict[str, list[Figure]]:
    """Of each table, by its number."""
    names = [name for name in plan.cells if not outcomes[name].error and plan.cells[name].job not in TRAININGS]
    files = folder.read_many([f"{plan.place(plan.cells[name])}/{RESULTS}" for name in names])
    found = {name: parse_json(data)["tables"] for name, data in zip(names, files, strict=True)}
    results = {name: decode(tuple[Table, ...], tables, name) for name, tables in found.items()}
    return {
        table.number: [
            Figure(wanted=each, measured=None, missing=outcomes[each.cell].error)
            if outcomes[each.cell].error
            else read_figure(results[each.cell], each)
            for each in table.wanted
        ]
        for table in plan.tables
    }


def report(plan: PaperPlan, found: Mapping[str, Sequence[Figure]], pictures: Mapping[str, str]) -> str:
    """As Markdown."""
    parts = [f"# {plan.paper}"]
    for table in plan.tables:
        parts.append(f"## {_name(table)}: {table.title}\n" + "\n".join(_lines(found[table.number])))
        if table.number in pictures:
            parts.append(f"![{_name(table)}]({pictures[table.number]})")
        if notes := [*table.notes, *_missing(found[table.number])]:
            parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def _name(table: PaperTable) -> str:
    number = table.number
    if number.startswith("fig"):
        return f"Figure {number.removeprefix('fig')}"
    return f"Supplement, Table {number.removeprefix('s')}" if number.startswith("s") else f"Table {number}"


def _lines(found: Sequence[Figure]) -> Iterator[str]:
    """Of each row what was measured, what the paper has, and the difference."""
    rows = list(dict.fromkeys(each.wanted.row for each in found))
    columns = list(dict.fromkeys(each.wanted.column for each in found))
    at = {(each.wanted.row, each.wanted.column): each for each in found}
    lines: list[list[str]] = []
    for row in rows:
        of_row = [at.get((row, column)) for column in columns]
        lines.append([row, *(_measured(each) for each in of_row)])
        if any(each and each.wanted.published is not None for each in of_row):
            lines.append([f"{row}, published", *(_number(each.wanted.published if each else None) for each in of_row)])
        if any(each and each.difference is not None for each in of_row):
            lines.append(["difference", *(_number(each.difference if each else None, signed=True) for each in of_row)])
    if lines:
        yield from table_lines(["", *columns], lines)


def _measured(figure: Figure | None) -> str:
    if figure is None:
        return ""
    if figure.measured is None:
        return "missing"
    bounds = f" [{figure.interval.low:.2f}, {figure.interval.high:.2f}]" if figure.interval else ""
    return f"{figure.measured:.2f}{bounds}"


def _number(value: float | None, *, signed: bool = False) -> str:
    return "" if value is None else f"{value:+.2f}" if signed else f"{value:.2f}"


def _missing(found: Sequence[Figure]) -> Iterator[str]:
    """What isn't there, and why: a sentence a reason."""
    reasons: dict[str, dict[str, None]] = {}
    for each in found:
        if each.missing:
            reasons.setdefault(each.missing, {})[each.wanted.row] = None
    for reason, rows in reasons.items():
        yield f"missing, {', '.join(rows)}: {reason}"


def _pictures(
    plan: PaperPlan, found: Mapping[str, Sequence[Figure]], outcomes: Mapping[str, Outcome], folder: Folder
) -> dict[str, str]:
    """Drawn, or taken from a cell; names of their files by table."""
    names = {}
    for table in plan.tables:
        data = next(
            (
                folder.read(f"{plan.place(plan.cells[cell])}/{file}")
                for cell, file in table.pictures.items()
                if not outcomes[cell].error
            ),
            None,
        )
        if table.scatter:
            data = scatter(table, found[table.number])
        if data:
            names[table.number] = f"pictures/{table.number}.png"
            folder.write(names[table.number], data)
    return names


def scatter(table: PaperTable, found: Sequence[Figure]) -> bytes | None:
    """A point a row, its first column across and its second one up, measured and published; None without any."""
    rows: dict[str, list[Figure]] = {}
    for each in found:
        rows.setdefault(each.wanted.row, []).append(each)
    kinds: tuple[tuple[str, str, Callable[[Figure], float | None]], ...] = (
        ("measured", "o", lambda each: each.measured),
        ("published", "x", lambda each: each.wanted.published),
    )
    drawn = False
    with styled():
        drawing = Drawing(figsize=(5, 3.6), layout="constrained")
        axes = drawing.subplots()
        for label, marker, value in kinds:
            points = [(row, value(x), value(y)) for row, (x, y) in rows.items()]
            there = [(row, x, y) for row, x, y in points if x is not None and y is not None]
            axes.scatter([x for _, x, _ in there], [y for _, _, y in there], marker=marker, label=label)
            for row, x, y in there:
                axes.annotate(row, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7)
            drawn |= bool(there)
        across, up = (each.wanted.column for each in next(iter(rows.values())))
        axes.set(xlabel=across, ylabel=up, title=table.title)
        axes.legend(frameon=False)
        return png_of(drawing) if drawn else None


def write_tables(folder: Folder, config: PapersConfig, plan: PaperPlan, outcomes: Mapping[str, Outcome]) -> str:
    """tables.md, tables.json and pictures; returns the Markdown. Of the same cells, the same bytes."""
    found = figures(plan, outcomes, folder)
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
                        "interval": asdict(each.interval) if each.interval else None,
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
    to_go, stored = sum(hours[cell.name] for cell in left), sum(cell.stored_bytes for cell in left)
    yield f"time       about {to_go:,.1f} GPU hours for those to go, {sum(hours.values()):,.1f} for all, missing ones included:"
    yield "           the backbones' passes, on an A6000 that trains LiFT on ImageNet in the 8 hours that its paper says"
    yield f"storage    about {stored / 1e9:,.2f} GB for those to go: checkpoints, records and masks; features aren't stored"
    yield NOTHING_RUN


def main(make: Callable[[PapersConfig], PaperPlan], config: PapersConfig) -> Iterator[str]:
    """Do all cells, and write the tables. Raises `CellsFailed` at the end where one failed; what is missing is no failure."""
    folder, plan = run_folder(config.folder.url, config.options), make(config).only(config.table)
    require_no_run(folder, "tables")
    config.require_places()
    if config.plan:
        yield from plan_lines(config, plan)
        return
    with executor_for(config) as executor:
        outcomes = run_papers_cells(config, plan, executor)
    yield write_tables(folder, config, plan, outcomes)
    yield f"{folder.displayed}: tables.md, tables.json; each cell in a folder of its own"
    hindered = {name for name, cell in plan.cells.items() if cell.missing}
    failed = [name for name, each in outcomes.items() if each.error and not _is_hindered(plan, name, hindered)]
    if failed:
        raise CellsFailed(f"{len(failed)} of {len(plan.cells)} cells failed: {', '.join(failed)}; the tables say why")


def _is_hindered(plan: PaperPlan, name: str, hindered: set[str]) -> bool:
    """Whether a cell, or one that it takes from, is of what isn't there."""
    return name in hindered or any(_is_hindered(plan, need, hindered) for need in plan.cells[name].needs)
