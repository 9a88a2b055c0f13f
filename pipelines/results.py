"""What an evaluation found: tables as Markdown and JSON, and pictures, in the output folder."""

import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from PIL import Image, ImageFont

from operators.metrics.bootstrap import RESAMPLES, SEED, Estimate, Interval
from operators.visual import Panel, Tile
from pipelines.features.clipping import ClippedFeatures
from pipelines.features.rows import Row, Size
from pipelines.provenance import versions
from pipelines.published import Published, Values
from storage.differences import Differences, differences
from storage.documents import JsonObject, JsonValue
from storage.paths import Folder
from storage.words import counted, printable, printable_name

Cell = str | float | int | None


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a table."""

    features: str
    "low-res, bilinear x2, lift x2, ...; or what a published line is of"
    input_px: str
    stride: int | None
    grid: str
    values: tuple[Cell, ...]
    published: bool = False
    estimates: tuple[Estimate | None, ...] = ()
    "how far each value is known, in its unit; none of counts, nor of what a paper prints"

    @classmethod
    def of(cls, row: Row, size: Size, values: Sequence[Cell]) -> "Line":
        return cls(
            features=row.name, input_px=sides(size), stride=row.stride, grid=f"{row.grid[0]}x{row.grid[1]}", values=tuple(values)
        )

    def known(self, estimates: Sequence[Estimate | None]) -> "Line":
        """The line with estimates of its first values."""
        return replace(self, estimates=(*estimates, *[None] * (len(self.values) - len(estimates))))

    def like(self, input_px: str, grid: str) -> "Line":
        """The line with other words for input and grid."""
        return replace(self, input_px=input_px, grid=grid)


def mean_lines(
    lines: Sequence[Line], means: Mapping[str, Sequence[str]], known: Mapping[str, Sequence[Estimate | None]]
) -> list[Line]:
    """Further lines, which are `means` of some of a table's lines of one input; `known` has their estimates.

    Of cells that aren't numbers, and of counts, a mean has what all have in common.
    """
    by_name = {line.features: line for line in lines}
    found = []
    for name, members in means.items():
        first, *others = (by_name[member] for member in members)
        values = tuple(map(_mean, zip(*(line.values for line in (first, *others)), strict=True)))
        grid = first.grid if all(line.grid == first.grid for line in others) else ""
        found.append(replace(first, features=name, grid=grid, values=values, estimates=()).known(known.get(name, ())))
    return found


def _mean(cells: Sequence[Cell]) -> Cell:
    if all(isinstance(cell, float) for cell in cells):
        return float(np.mean([cell for cell in cells if isinstance(cell, float)]))
    if all(isinstance(cell, str) and _DECIMAL.fullmatch(cell) for cell in cells):
        digits = max(len(str(cell).partition(".")[2]) for cell in cells)
        return f"{np.mean([float(str(cell)) for cell in cells]):.{digits}f}"
    return cells[0] if len(set(cells)) == 1 else None


_DECIMAL = re.compile(r"-?\d+\.\d+")
"""A number as a table prints it."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Lines under the names of their values. Shares are in percent."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...] = ()
    notes: tuple[str, ...] = ()
    "what is to be known of its lines, in sentences"
    drawn: str = ""
    "how many items of which unit estimates are drawn from: 200 pairs"

    def markdown(self) -> str:
        """With a line for the title, its notes below it, and what is known of its figures."""
        head = ["features", "input px", "stride", "grid", *self.columns]
        rows = [[line.features, line.input_px, _text(line.stride), line.grid, *map(_text, line.values)] for line in self.lines]
        notes = ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join([self.title, *table_lines(head, rows), *notes, *self._known()])

    def _known(self) -> Iterator[str]:
        """The intervals of figures, and of their differences to another row."""
        estimated = [line for line in self.lines if any(line.estimates)]
        measured = [line for line in estimated if any(each and each.interval for each in line.estimates)]
        compared = [line for line in measured if any(each and each.difference_interval for each in line.estimates)]
        columns = [n for n in range(len(self.columns)) if any(line.estimates[n] for line in measured)]
        names = [self.columns[n] for n in columns]
        if estimated and not measured:
            yield f"\nNo intervals: too few to draw from ({self.drawn})"
        if measured:
            yield f"\n95 % intervals: {RESAMPLES:,} draws from the {self.drawn}, seed {SEED}"
            rows = [[line.features, line.input_px, *(_interval(line, n) for n in columns)] for line in measured]
            yield from table_lines(["features", "input px", *names], rows, left=2)
        if compared:
            yield "\nDifferences of the same draws, with their 95 % intervals; those that hold 0 show none"
            rows = [[line.features, _against(line), line.input_px, *(_difference(line, n) for n in columns)] for line in compared]
            yield from table_lines(["features", "less", "input px", *names], rows, left=3)


NOT_SHOWN = "no difference shown"
"""What tables say of a difference whose interval holds 0."""


def _interval(line: Line, number: int) -> str:
    found = line.estimates[number]
    return bounds(found.interval, _digits(line, number)) if found and found.interval else ""


def _difference(line: Line, number: int) -> str:
    return difference_in_words(line.estimates[number], _digits(line, number))


def difference_in_words(found: Estimate | None, digits: int) -> str:
    """From another row, with its interval; nothing where there is none."""
    if found is None or found.difference is None or found.difference_interval is None:
        return ""
    text = f"{found.difference:+.{digits}f} {bounds(found.difference_interval, digits)}"
    return f"{text}, {NOT_SHOWN}" if found.difference_interval.holds_zero else text


def _against(line: Line) -> str:
    return next(each.against for each in line.estimates if each and each.against)


def bounds(interval: Interval, digits: int) -> str:
    """Of an interval, in brackets."""
    return f"[{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _digits(line: Line, number: int) -> int:
    """Behind the point, as the value itself is printed."""
    return len(_text(line.values[number]).partition(".")[2])


def table_lines(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> Iterator[str]:
    """A Markdown table of cells, line by line, after the empty line that separates it from text; its columns are as wide as their
    longest cells, so that it reads well on a terminal, too.

    The first `left` columns are aligned to the left, and those behind them that hold numbers to the right.
    """
    # A cell is one line and one cell, whatever the name in it holds.
    lines = [[printable_name(cell).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    columns = list(zip(*lines, strict=True))
    right = [number >= left and all(map(_NUMBER.match, column[1:])) for number, column in enumerate(columns)]
    widths = [max(3, *map(len, column)) for column in columns]
    rule = ["-" * (width - 1) + (":" if to_right else "-") for width, to_right in zip(widths, right, strict=True)]
    yield ""
    for row in (lines[0], rule, *lines[1:]):
        cells = (
            cell.rjust(width) if to_right else cell.ljust(width) for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        yield f"| {' | '.join(cells)} |"


_NUMBER = re.compile(r"$|\W*(\d|nan\b|inf\b|n/a)|-$")
"""How a cell begins that stands among numbers: as one, or empty, or with a word for none."""


def number_lines(columns: Mapping[str, str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """`table_lines` of cells in the format that is given for each column's name. Text stays as it is, and None is empty."""
    formats = columns.values()
    cells = [[_formatted(cell, form) for cell, form in zip(row, formats, strict=True)] for row in rows]
    return table_lines(list(columns), cells)


def _formatted(cell: object, form: str) -> str:
    return "" if cell is None else cell if isinstance(cell, str) else format(cell, form)


def percent(shares: Sequence[float]) -> list[float]:
    """Shares of 1 in percent."""
    return [100 * share for share in shares]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A measured line, and what a paper's numbers must be of to stand below it."""

    line: Line
    row: Row
    low: Row
    "the backbone's own map of the same input"
    size: Size
    "of the input"
    settings: JsonObject = field(default_factory=dict)
    "what else it is of, by the names that `Published.settings` have"

    def published(self, numbers: Published) -> Values:
        """The paper's of the same method, input size and grid, by column."""
        rows, columns = self.low.grid
        quarter = self.size[0] // 4, self.size[1] // 4
        finer = {"x2": (2 * rows, 2 * columns), "pixels": self.size, "quarter": quarter}[numbers.finer]
        if self.row.grid != (self.low.grid if self.row.method == self.low.method else finer):
            return {}
        return numbers.values(self.row.method, sides(self.size))

    def differences(self, numbers: Published) -> Differences:
        """Between what the paper's are of, and this line."""
        return differences(numbers.settings, {name: self.settings.get(name) for name in numbers.settings})


def with_published(table: Table, measured: Sequence[Measured], numbers: Published | None) -> Table:
    """The table with all that was measured, and the paper's line below each that has one, its numbers under their names.

    Columns that the paper hasn't stay empty. A line of other settings than this run's says so, and the table's notes say in
    what they differ, and of which lines the paper has nothing.
    """
    if numbers is None:
        return replace(table, lines=tuple(each.line for each in measured))
    lines, alone, others = [], [], []
    for each in measured:
        lines.append(each.line)
        values = each.published(numbers)
        cells = tuple(values.get(column) for column in table.columns)
        if all(cell is None for cell in cells):
            alone.append(f"{each.line.features} at {each.line.input_px} px")
            continue
        different = each.differences(numbers)
        name = f"{numbers.source}, of other settings" if different else numbers.source
        others += [different.line("published", "here")] if different else []
        lines.append(replace(each.line, features=name, stride=None, grid="", values=cells, published=True))
    notes = [f"{numbers.source} is of other settings than this run: {each}" for each in dict.fromkeys(others)]
    if alone:
        notes.append(f"{numbers.source} has nothing of {', '.join(alone)}")
    return replace(table, lines=tuple(lines), notes=(*table.notes, *notes))


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Items of the data set (pairs, clips, images) that no score is of, for one reason."""

    reason: str
    count: int
    first: str
    "the image of the first of them"

    @classmethod
    def of(cls, reason: str, names: Sequence[str]) -> "tuple[LeftOut, ...]":
        """Of items with these names, those of their images; nothing where there are none."""
        return (cls(reason=reason, count=len(names), first=names[0]),) if names else ()

    def __str__(self) -> str:
        return f"{self.count:,} left out: {self.reason} (the first: {self.first})"


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A part of the data set's items that was asked for; those beyond it aren't left out."""

    how: str
    "`the first`, `drawn`"
    count: int
    of: int | None
    "that there are; None where they weren't counted, since listing ends with the last one that is taken"
    unit: str
    flag: str
    "that asked for it"

    def __str__(self) -> str:
        of = "" if self.of is None else f" of {self.of:,}"
        return f"{self.how} {self.count:,}{of} {self.unit} ({self.flag})"


@dataclass(frozen=True, kw_only=True)
class Items:
    """What a result was computed over. Raises `ValueError` where that isn't said."""

    scored: Mapping[str, int]
    "by unit, the data set's items first, then what there is of it in them: pairs, key points"
    left_out: tuple[LeftOut, ...] = ()
    taken: tuple[Taken, ...] = ()

    def __post_init__(self) -> None:
        if not self.scored:
            raise ValueError("a result says over how many items of which unit it was computed")

    def __str__(self) -> str:
        over = ", ".join(counted(count, unit) for unit, count in self.scored.items())
        return "; ".join([f"over {over}", *map(str, self.taken), *map(str, self.left_out)])

    def to_json(self) -> JsonObject:
        """As results.json has it."""
        return {
            "scored": dict(self.scored),
            "taken": [asdict(each) for each in self.taken],
            "left_out": [asdict(each) for each in self.left_out],
            "left_out_count": sum(each.count for each in self.left_out),
        }


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that an evaluation found. `details` are further numbers as JSON values; pictures are by file name."""

    tables: tuple[Table, ...]
    items: Items
    choices: Mapping[str, str]
    "what was chosen where paper and code, or papers, differ"
    details: JsonObject = field(default_factory=dict)
    pictures: Mapping[str, Image.Image | bytes] = field(default_factory=dict)
    clipped: ClippedFeatures | None = None
    "values that float16 couldn't hold"
    times: tuple[Table, ...] = ()
    "what the work took: the same evaluation takes another time elsewhere"
    files: Mapping[str, bytes] = field(default_factory=dict)
    "further objects of the output folder, by name"


def write_results(folder: Folder, task: str, config: JsonObject, features: JsonObject, findings: Findings) -> str:
    """Write results.md, results.json and pictures/; returns the Markdown."""
    for name, picture in findings.pictures.items():
        folder.write(f"pictures/{name}", picture if isinstance(picture, bytes) else png_bytes(picture))
    for name, data in findings.files.items():
        folder.write(name, data)
    report: JsonObject = {
        "task": task,
        "tables": [asdict(table) for table in findings.tables],
        **({"times": [asdict(table) for table in findings.times]} if findings.times else {}),
        "items": findings.items.to_json(),
        "left_out": [asdict(each) for each in findings.items.left_out],
        "clipped": asdict(findings.clipped) if findings.clipped else None,
        "choices": findings.choices,
        "details": findings.details,
        "features": features,
        "config": config,
        "versions": versions(),
    }
    folder.write("results.json", json.dumps(_finite(report), indent=1, allow_nan=False).encode())
    text = printable(_markdown(task, findings))
    folder.write("results.md", text.encode())
    return text


def _markdown(task: str, findings: Findings) -> str:
    parts = [f"# {task}", *(table.markdown() for table in (*findings.tables, *findings.times))]
    # What was left out shouldn't be overlooked.
    parts.append(f"**{findings.items}**" if findings.items.left_out else str(findings.items))
    parts.append("\n".join(f"- {name}: {value}" for name, value in findings.choices.items()))
    parts += [f"**{findings.clipped}**"] if findings.clipped and findings.clipped.images else []
    parts += [f"![{name}](pictures/{name})" for name in findings.pictures]
    return "\n\n".join(parts) + "\n"


def _finite(value: JsonValue) -> JsonValue:
    """JSON has no NaN: null instead."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def png_bytes(picture: Image.Image) -> bytes:
    """As a small PNG."""
    data = io.BytesIO()
    picture.save(data, "PNG", optimize=True)
    return data.getvalue()


@dataclass(frozen=True)
class ItemPictures:
    """Pictures that workers draw while they score an item: objects `within`/NAME/0000012.png of an evaluation's folder."""

    folder: Folder
    within: str

    def write(self, item: int, name: str, pixels_HW3: np.ndarray) -> None:
        """One, of an item by its number."""
        self.folder.write(self._object(item, name), png_bytes(Image.fromarray(pixels_HW3)))

    def read(self, items: Iterable[int], names: Sequence[str]) -> dict[int, list[np.ndarray]]:
        """Those of the names, in their order, of items that have them all: an evaluation may have been begun with fewer
        --pictures."""
        there = {name: self.folder.sizes(f"{self.within}/{name}") for name in names}
        drawn = [item for item in sorted(items) if all(_file(item) in there[name] for name in names)]
        found = {item: self.folder.read_many([self._object(item, name) for name in names]) for item in drawn}
        return {item: [np.array(Image.open(io.BytesIO(data))) for data in files] for item, files in found.items()}

    def _object(self, item: int, name: str) -> str:
        return f"{self.within}/{name}/{_file(item)}"


def _file(item: int) -> str:
    return f"{item:07d}.png"


PHOTO = "photo"
"""The folder of photographs, beside those of rows."""


class MapPictures:
    """What an evaluation draws of an item's maps, beside its photograph: objects maps/photo/0000012.png, maps/ROW/0000012.png."""

    def __init__(self, folder: Folder):
        self._pictures = ItemPictures(folder, "maps")

    def write(self, item: int, photo_HW3: np.ndarray, maps: Mapping[str, np.ndarray]) -> None:
        """Those of an item by its number; `maps` by row, uint8 [h, w, 3]."""
        for name, pixels in {PHOTO: photo_HW3, **maps}.items():
            self._pictures.write(item, name, pixels)

    def panel(
        self, items: Iterable[int], rows: Sequence[str], name: Callable[[int], str], title: str, scale: tuple[str, str]
    ) -> Image.Image | None:
        """A line of tiles for each item that has all of them; None where none has. `name`: of an item by its number."""
        drawn = self._pictures.read(items, [PHOTO, *rows])
        tiles = [[Tile(pixels=photo, is_photo=True), *(Tile(pixels=each) for each in maps)] for photo, *maps in drawn.values()]
        return panel(tiles, [PHOTO, *rows], [name(item) for item in drawn], title, (200, 200), scale=scale) if drawn else None


def _text(value: Cell) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def sides(size: Size) -> str:
    """`448`, or `480x832` where sides differ."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


RIGHT, WRONG = (60, 220, 90), (240, 60, 50)
"""Colours of matches in pictures."""


def panel(
    tiles: Sequence[Sequence[Tile]],
    columns: Sequence[str],
    rows: Sequence[str],
    title: str,
    tile: Size,
    *,
    scale: tuple[str, str] | None = None,
    legend: Sequence[tuple[str, tuple[int, int, int]]] = (),
) -> Image.Image:
    """Tiles with titles as one picture; `tile` is (width, height), `scale` and `legend` are as `Panel` has them."""
    short = [row if len(row) <= 24 else f"...{row[-21:]}" for row in rows]
    # A title wider than its column would run into the next one's.
    widest = max(ImageFont.load_default(size=13).getlength(line) for text in columns for line in text.split("\n"))
    width = max(tile[0], math.ceil(widest) + 4)
    size = (width, round(tile[1] * width / tile[0]))
    shown = Panel(tiles=tiles, columns=columns, rows=short, title=title, tile_size=size, scale=scale, legend=legend)
    return shown.draw()
