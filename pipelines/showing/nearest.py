"""The cells of a whole store that are most like one point of one image: exact, in one pass over a level."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from operators.visual import Panel, Tile, cosine_map
from pipelines.executors import in_order
from pipelines.features.photos import read_photos
from pipelines.results import table_lines
from pipelines.showing.views import row_titles, store_title, tile_size
from storage.paths import StorageOptions
from storage.pixels import cell_centres
from storage.spec import Level
from storage.store import FeatureStore, OutsideImage

CHUNK_BYTES = 2**26
"""Of a level as float32 that is compared at once, about."""

CHUNK_ROWS = 2**14
"""Of a level of small maps at most, so that whoever waits hears how far it is."""

ACROSS = 5
"""Photographs beside each other in a picture."""

READ_AHEAD = 2
"""Chunks that are read while one is compared."""


@dataclass(frozen=True, kw_only=True)
class NearCell:
    """A cell that was found."""

    row: int
    cell: tuple[int, int]
    "row and column of the level's grid"
    cosine: float
    "with the query, float32"


@dataclass(frozen=True, kw_only=True)
class Query:
    """What is looked for: the feature at `point_xy`, in pixels of the upright original, of the image `row`."""

    row: int
    point_xy: tuple[float, float]
    vector_C: np.ndarray
    "float32"

    @classmethod
    def at(cls, store: FeatureStore, key: str | int, point_xy: tuple[float, float], level: Level) -> "Query":
        """Raises `OutsideImage`, also for a point that the crop cut away, and `MissingRows`."""
        row = int(store.rows(key)[0])
        vector = store.sample(row, [point_xy], level.name)[0]
        if np.isnan(vector).any():
            name = store.index.take(np.array([row]), ["key"])["key"][0].as_py()
            raise OutsideImage(f"the crop cut {point_xy} of {name!r} away; choose a point nearer to the middle")
        return cls(row=row, point_xy=point_xy, vector_C=vector)


def nearest_cells(
    store: FeatureStore,
    query_C: np.ndarray,
    level: Level,
    count: int,
    *,
    per_image: bool = False,
    without: Sequence[int] = (),
    rows: np.ndarray | None = None,
    looked_at: Callable[[int], object] | None = None,
) -> list[NearCell]:
    """The `count` cells of a level with the largest cosine to `query_C` [C], best first; of equal ones that of the lower row and
    cell. `per_image`: of each image its best cell alone. `without`: rows that are passed over. `rows`: those that are
    looked at, in order; default: all. `looked_at` is told how many rows are done with, again and again; what it raises ends the
    search.

    Cells are compared as they are stored, undone to float32. Rows without features are passed over; all that are there are
    looked at, a chunk at a time, so that memory doesn't grow with the store.
    """
    best = np.zeros(0, [("cosine", np.float32), ("row", np.int64), ("cell", np.int64)])
    for some, maps_NHWC in read_chunks(store, level, rows):
        cosines = cosine_map(query_C, maps_NHWC).reshape(len(some), -1)
        cosines[np.isin(some, list(without))] = -np.inf
        best = _better(best, some, cosines, count, per_image=per_image)
        if looked_at:
            looked_at(int(some[-1]) + 1)
    width = level.grid[1] if level.grid else 1
    return [NearCell(row=int(each["row"]), cell=divmod(int(each["cell"]), width), cosine=float(each["cosine"])) for each in best]


def read_chunks(
    store: FeatureStore, level: Level, rows: np.ndarray | range | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Those of some row numbers, or of all, that have features, and their maps, a chunk at a time, read ahead of who asks.

    Of a store that is being written, those of tasks that are done: before, nobody knows where an image lies.
    """
    chosen = range(len(store)) if rows is None else rows
    if store.status == "writing":
        asked = np.asarray(chosen)
        chosen = asked[store.valid(asked)]
    at_once = max(1, min(CHUNK_ROWS, CHUNK_BYTES // (4 * int(np.prod(level.row_shape)))))

    def read(first: int) -> tuple[np.ndarray, np.ndarray]:
        some = np.asarray(chosen[first : first + at_once])
        values, there = store.read_present(some, level.name)
        return some[there], values[there]

    with ThreadPoolExecutor(READ_AHEAD) as pool:
        starts = range(0, len(chosen), at_once)
        for found in in_order(lambda first: pool.submit(read, first), Future.result, starts, READ_AHEAD):
            if len(found[0]):
                yield found


def _better(best: np.ndarray, rows: np.ndarray, cosines_NM: np.ndarray, count: int, *, per_image: bool) -> np.ndarray:
    """The `count` best of those known and those of some images."""
    if per_image:
        cells = cosines_NM.argmax(axis=1)
        images, values = np.arange(len(rows)), np.take_along_axis(cosines_NM, cells[:, None], axis=1)[:, 0]
    else:
        flat = cosines_NM.ravel()
        # Those that are equal to the last that is taken stay in until they are sorted: the lowest of them counts.
        least = np.partition(flat, -count)[-count] if len(flat) > count else -np.inf
        taken = np.flatnonzero(flat >= least)
        images, cells = np.divmod(taken, cosines_NM.shape[1])
        values = flat[taken]
    new = np.zeros(len(values), best.dtype)
    new["cosine"], new["row"], new["cell"] = values, rows[images], cells
    every = np.concatenate([best, new[np.isfinite(values)]])
    return every[np.lexsort((every["cell"], every["row"], -every["cosine"]))][:count]


def nearest_lines(store: FeatureStore, level: Level, found: Sequence[NearCell]) -> Iterator[str]:
    """The cells as a table: image, centre of the cell in pixels of the original, cosine."""
    if not found:
        yield f"{store.folder.displayed} has no rows with features to compare with"
        return
    keys = store.index.take(np.array([each.row for each in found]), ["key"])["key"].to_pylist()
    centres = [store.coords(level.name, each.row)[each.cell] for each in found]
    yield from table_lines(
        ["key", "row", "cell (row, column)", "x, y in the original", "cosine"],
        [
            [key, str(each.row), f"{each.cell[0]}, {each.cell[1]}", f"{x:.1f}, {y:.1f}", f"{each.cosine:.4f}"]
            for key, each, (x, y) in zip(keys, found, centres, strict=True)
        ],
    )


def nearest_panel(
    store: FeatureStore, level: Level, query: Query, found: Sequence[NearCell], *, storage_options: StorageOptions | None = None
) -> Panel:
    """The query's photograph and those of the cells that were found, each point ringed."""
    height, width = store.spec.input_size
    at = [tuple(store.pixels(query.row).to_input(np.array(query.point_xy))), *(cell_centres(level)[each.cell] for each in found)]
    rows = np.array([query.row, *(each.row for each in found)])
    photos = read_photos(store, rows, storage_options)
    cosines = ["the point", *(f"{each.cosine:.3f}" for each in found)]
    tiles = [
        Tile(pixels=photo, is_photo=True, mark=(x / width, y / height), caption=f"{key}  {cosine}")
        for photo, (x, y), key, cosine in zip(photos, at, row_titles(store, rows), cosines, strict=True)
    ]
    lines = [tiles[i : i + ACROSS] for i in range(0, len(tiles), ACROSS)]
    return Panel(
        tiles=lines,
        columns=[""] * len(lines[0]),
        rows=[""] * len(lines),
        title=f"cells most like the ringed point, by cosine; {level.name}, {store_title(store)}",
        tile_size=tile_size(store),
    )
