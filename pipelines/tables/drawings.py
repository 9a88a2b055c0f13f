"""Papers' figures that are drawn of measured and published numbers, as PNGs, and how points get names that can be read."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from pipelines.plots import png_of, styled
from pipelines.tables.figures import Figure
from pipelines.tables.papers import Correlated, Drawing, PaperTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

Point = tuple[float, float, str]
"""Across, up, and what it is of."""


def draw(table: PaperTable, found: Sequence[Figure]) -> bytes | None:
    """A table's figure; None where nothing is there to be drawn, or no figure is asked for."""
    if not table.drawing or all(each.measured is None and each.wanted.published is None for each in found):
        return None
    with styled(parse_math=False):
        canvas = _DRAWN[table.drawing](table, found)
        return png_of(canvas) if canvas else None


def front(points: Sequence[Point], *, falls: bool = False) -> list[Point]:
    """Those that no other one beats or equals in one thing and beats in the other, from left to right."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda each: (-each[0], each[1] if falls else -each[1])):
        if not kept or (point[1] < kept[-1][1] if falls else point[1] > kept[-1][1]):
            kept.append(point)
    return kept[::-1]


def fronts(table: PaperTable, found: Sequence[Figure]) -> list[str]:
    """A sentence for each panel of a figure with fronts: who is on it."""
    if table.drawing != "front":
        return []
    panels = _panels(found, _measured)
    names = {column: [name for _, _, name in front(points, falls=_falls(found, column))] for column, points in panels.items()}
    return [
        f"none is both faster and better in {column} than {', '.join(best)}, as measured"
        for column, best in names.items()
        if best
    ]


# --- kinds of figures -------------------------------------------------------------------------------------------------

Value = Callable[[Figure], float | None]


def _measured(figure: Figure) -> float | None:
    return figure.measured


def _published(figure: Figure) -> float | None:
    return figure.wanted.published


_KINDS: Mapping[str, tuple[str, Value]] = {"measured": ("o", _measured), "published": ("x", _published)}


def _rows(found: Sequence[Figure]) -> dict[str, dict[str, Figure]]:
    """By row and column."""
    rows: dict[str, dict[str, Figure]] = {}
    for each in found:
        rows.setdefault(each.wanted.row, {})[each.wanted.column] = each
    return rows


def _columns(found: Sequence[Figure]) -> list[str]:
    return list(dict.fromkeys(each.wanted.column for each in found))


def _falls(found: Sequence[Figure], column: str) -> bool:
    return any(each.wanted.falls for each in found if each.wanted.column == column)


def _panels(found: Sequence[Figure], value: Value, across: Value | None = None) -> dict[str, list[Point]]:
    """Of each column but the first, its points, with the first column across."""
    first, *others = _columns(found)
    panels: dict[str, list[Point]] = {}
    for column in others:
        panels[column] = []
        for row, of in _rows(found).items():
            x = (across or value)(of[first]) if first in of else None
            y = value(of[column]) if column in of else None
            if x is not None and y is not None:
                panels[column].append((x, y, row))
    return panels


def _canvas(panels: int, columns: int = 3, size: tuple[float, float] = (4.2, 3.4)) -> "tuple[Canvas, list[Axes]]":
    from matplotlib.figure import Figure as Canvas

    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    canvas = Canvas(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = list(canvas.subplots(rows, columns, squeeze=False).flat)
    for each in axes[panels:]:
        each.set_axis_off()
    return canvas, axes[:panels]


def _from_zero(panel: "Axes") -> None:
    """No axis below 0, where no score is."""
    low, high = panel.get_ylim()
    if low < 0 <= high:
        panel.set_ylim(bottom=0)


def _one_legend(canvas: "Canvas", axes: "Sequence[Axes]", columns: int = 4) -> None:
    marks = {label: mark for each in axes for mark, label in zip(*each.get_legend_handles_labels(), strict=True)}
    if marks:
        canvas.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=min(columns, len(marks)), frameon=False)


def _with_names(canvas: "Canvas", axes: "Sequence[Axes]", points: Sequence[Sequence[Point]]) -> None:
    canvas.draw_without_rendering()  # where points lie is known once it's laid out
    for each, of_panel in zip(axes, points, strict=True):
        name_points(each, of_panel)


def _scatter(table: PaperTable, found: Sequence[Figure]) -> "Canvas":
    """A point a row, measured and published."""
    across, up = _columns(found)[:2]
    canvas, axes = _canvas(1, size=(5.2, 4.0))
    named: list[Point] = []
    for label, (marker, value) in _KINDS.items():
        points = _panels(found, value)[up]
        axes[0].scatter([x for x, _, _ in points], [y for _, y, _ in points], marker=marker, label=label)
        named += [each for each in points if each[2] not in {name for _, _, name in named}]
    axes[0].set(xlabel=across, ylabel=up, title=table.title)
    axes[0].margins(x=0.2, y=0.15)
    _one_legend(canvas, axes)
    _with_names(canvas, axes, [named])
    return canvas


def _fronts(table: PaperTable, found: Sequence[Figure]) -> "Canvas | None":
    """A panel a column, with its front; published scores stand at measured speeds, where no others are published."""
    measured, printed = _panels(found, _measured), _panels(found, _published, across=_measured)
    drawn = [column for column in measured if measured[column] or printed[column]]
    if not drawn:
        return None
    canvas, axes = _canvas(len(drawn))
    named = []
    for each, column in zip(axes, drawn, strict=True):
        points, falls = measured[column], _falls(found, column)
        each.scatter([x for x, _, _ in points], [y for _, y, _ in points], label="measured", zorder=3)
        each.scatter(
            [x for x, _, _ in printed[column]],
            [y for _, y, _ in printed[column]],
            marker="x",
            label="published, at measured speed",
        )
        best = front(points, falls=falls)
        each.step([x for x, _, _ in best], [y for _, y, _ in best], where="pre", lw=1, label="none is faster and better")
        scale_across(each, [x for x, _, _ in points or printed[column]])
        each.set(title=column, xlabel=_columns(found)[0])
        _from_zero(each)
        if falls:
            each.invert_yaxis()
        named.append(points or printed[column])
    canvas.suptitle(table.title)
    _one_legend(canvas, axes)
    _with_names(canvas, axes, named)
    return canvas


def _lines(table: PaperTable, found: Sequence[Figure]) -> "Canvas":
    """A line a row, over the columns."""
    columns = _columns(found)
    canvas, axes = _canvas(1, size=(5.2, 3.8))
    for row, of in _rows(found).items():
        there = [(columns.index(name), each) for name, each in of.items() if each.measured is not None]
        values = [each.measured or 0.0 for _, each in there]
        ends = [each.ends or (v, v) for (_, each), v in zip(there, values, strict=True)]
        spread = [
            [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)],
            [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)],
        ]
        if there:
            axes[0].errorbar([x for x, _ in there], values, yerr=spread, marker="o", capsize=3, label=row)
    axes[0].set_xticks(range(len(columns)), columns)
    axes[0].set(title=table.title)
    _one_legend(canvas, axes, 2)
    return canvas


def _bars(table: PaperTable, found: Sequence[Figure]) -> "Canvas":
    """A panel a column, bars by row; what is published is a cross."""
    columns = [each for each in _columns(found) if any(f.measured is not None for f in found if f.wanted.column == each)]
    if not columns:
        columns = _columns(found)
    canvas, axes = _canvas(len(columns), size=(3.4, 3.0))
    rows = _rows(found)
    for each, column in zip(axes, columns, strict=True):
        there = [(at, of[column]) for at, of in enumerate(rows.values()) if column in of]
        done = [(at, figure) for at, figure in there if figure.measured is not None]
        each.bar([at for at, _ in done], [figure.measured or 0.0 for _, figure in done], label="measured")
        for at, figure in done:
            if figure.ends:
                each.vlines(at, *figure.ends, color="black", lw=1)
        crosses = [(at, figure.wanted.published) for at, figure in there if figure.wanted.published is not None]
        if crosses:
            each.scatter([at for at, _ in crosses], [value for _, value in crosses], marker="x", color="black", label="published")
        each.set_xticks(range(len(rows)), list(rows), rotation=30, ha="right")
        each.set(title=f"{column}{', less is better' if _falls(found, column) else ''}")
    canvas.suptitle(table.title)
    _one_legend(canvas, axes)
    return canvas


def _pairs(table: PaperTable, found: Sequence[Figure]) -> "Canvas | None":
    """A panel for each correlation: what others publish across, the score up."""
    of = {(each.wanted.row, each.wanted.column): each for each in found}
    drawn = [each for each in table.correlated if len(each.numbers) > 1]
    if not drawn:
        return None
    canvas, axes = _canvas(len(drawn), columns=len({each.column for each in drawn}), size=(3.2, 2.9))
    named = []
    for panel, each in zip(axes, drawn, strict=True):
        named.append(_pair(panel, each, of[each.row, each.column]))
    canvas.suptitle(table.title)
    _one_legend(canvas, axes)
    _with_names(canvas, axes, named)
    return canvas


def _pair(panel: "Axes", of: Correlated, figure: Figure) -> list[Point]:
    printed = [
        (other, wanted.published, name)
        for wanted, other, name in zip(of.numbers, of.others, of.names, strict=True)
        if wanted.published is not None
    ]
    for label, marker, points in (("measured", "o", figure.points), ("published", "x", printed)):
        panel.scatter([x for x, _, _ in points], [y for _, y, _ in points], marker=marker, label=label)
    words = [
        f"{name} {value:+.2f}"
        for name, value in (("measured", figure.measured), ("published", figure.wanted.published))
        if value is not None
    ]
    panel.set(title=of.column, xlabel=f"{of.row}\nrank correlation: {', '.join(words) or 'none'}")
    panel.margins(x=0.25, y=0.25)
    _from_zero(panel)
    if any(each.falls for each in of.numbers):
        panel.invert_yaxis()
    return [*figure.points] or printed


_DRAWN: "Mapping[Drawing, Callable[[PaperTable, Sequence[Figure]], Canvas | None]]" = {
    "scatter": _scatter,
    "front": _fronts,
    "lines": _lines,
    "bars": _bars,
    "pairs": _pairs,
}


# --- names of points --------------------------------------------------------------------------------------------------


def name_points(panel: "Axes", points: Sequence[Point]) -> None:
    """Each backbone's name once, over its highest point (at the panel's top, under it), moved from names that it would cover."""
    unit = panel.figure.dpi / 72
    box = panel.get_window_extent()
    highest: dict[str, tuple[float, float, tuple[float, float]]] = {}
    for across, up, name in points:
        x, y = panel.transData.transform((across, up)) / unit
        if name not in highest or y > highest[name][1]:
            highest[name] = x, y, (across, up)
    line, taken = 10.0, list[tuple[float, float, float]]()
    for name, (x, y, place) in sorted(highest.items(), key=lambda each: each[1][1]):
        half = 2.4 * len(name)  # of letters of 8 points
        middle = min(max(x, box.x0 / unit + half), max(box.x1 / unit - half, box.x0 / unit + half))
        rises = y + 5 + line <= box.y1 / unit
        bottom = y + 5 if rises else y - 5 - line
        for left, right, at in sorted(taken, key=lambda each: each[2] if rises else -each[2]):
            if middle - half < right and left < middle + half and abs(at - bottom) < line:
                bottom = at + line if rises else at - line
        taken.append((middle - half, middle + half, bottom))
        words = panel.annotate(
            name, place, (middle - x, bottom - y), textcoords="offset points", fontsize=8, ha="center", va="bottom"
        )
        words.set_in_layout(False)


def scale_across(panel: "Axes", relative: Sequence[float]) -> None:
    """Logarithmic where speeds differ much; room for names at the sides."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    panel.margins(x=0.3, y=0.25)
    if max(relative, default=1) > 4 * min(relative, default=1):
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
