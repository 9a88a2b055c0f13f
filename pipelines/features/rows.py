"""What an evaluation has a line of in its tables: the levels of a model or a store, and bilinear ones beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipelines.config import ConfigError
from storage.spec import Level

Size = tuple[int, int]
"""(height, width) in pixels, or (rows, columns) of cells."""


Rendering = Literal["paper", "extract"]
"""How images become the model's input: as the protocol's code does it, or as jobs/extract.py does it (the model's own
interpolation, and its mean colour around a padded image), which is what a store holds."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table: a kind of map."""

    name: str
    "`low-res`, or method and level, as in `lift x2`"
    method: str
    "`backbone`, or an upsampler's name"
    level: str | None
    "that the map is; None: made of the low-resolution map"
    grid: Size
    stride: int
    "of the backbone, in input pixels"
    digest: str = ""
    "of a learned upsampler"


def pooled_level(levels: Sequence[Level]) -> str | None:
    """The level that is the CLS vector."""
    return next((level.name for level in levels if level.grid is None and level.method == "cls"), None)


def rows_of(levels: Sequence[Level], stride: int, displayed: str) -> tuple[Row, ...]:
    """The rows for a model's or store's dense levels. Raises `ConfigError` where the low-resolution map isn't among them."""
    dense = [level for level in levels if level.grid]
    base = next((level for level in dense if level.method == "backbone"), None)
    if base is None or base.grid is None:
        raise ConfigError(f"{displayed}: no level is the backbone's own map, which every table shows; add x1 to --levels")
    low = Row(name="low-res", method="backbone", level=base.name, grid=base.grid, stride=stride)
    others = [
        Row(
            name=f"{level.method} {level.name}",
            method=level.method,
            level=level.name,
            grid=level.grid or base.grid,
            stride=stride,
            digest=level.digest,
        )
        for level in dense
        if level is not base
    ]
    bilinear = [row for row in others if row.method == "bilinear"]
    finer = [row for row in others if row.grid[0] * row.grid[1] > base.grid[0] * base.grid[1]]
    scales = {level.name: level.scale or level.name for level in dense}
    grids = {row.grid: scales[row.level or ""] for row in finer if row.method != "bilinear"}
    if not finer:
        grids = {(2 * base.grid[0], 2 * base.grid[1]): "x2"}
    made = [
        Row(name=f"bilinear {name}", method="bilinear", level=None, grid=grid, stride=stride)
        for grid, name in grids.items()
        if grid not in {row.grid for row in bilinear}
    ]
    return (low, *bilinear, *made, *(row for row in others if row.method != "bilinear"))
