"""The nearest cells of a store: all compared, found by an index, and by NumPy alone; in one run, of the same questions."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import zarr

from pipelines.benchmarks.stores import LEVEL, Place, write_store
from pipelines.config import require_at_least
from pipelines.costs.clocks import Machine, NumbersFile
from pipelines.executors import InlineExecutor
from pipelines.results import table_lines
from pipelines.showing.nearest import NearCell, nearest_cells
from pipelines.showing.search import CellIndex, IndexSettings
from pipelines.showing.search_build import NEIGHBOURS, build_index, require_faiss
from storage.spread import spread
from storage.store import FeatureStore

Places: TypeAlias = set[tuple[int, int, int]]
"""Rows and cells."""

DIRECTIONS = 2000
"""That cells made up lie near to, as those of images do."""


@dataclass(frozen=True, kw_only=True)
class NearestBenchmark:
    """`nearest` with and without an index."""

    store: str = ""
    """A complete store on this machine, whose index is built anew; default: one made up of cells near to some directions."""
    level: str = LEVEL
    """Of that store."""
    rows: int = 1276
    """Of the store that is made up, of 28 x 28 cells: 10^6 of them."""
    channels: int = 384
    """Values of a cell made up."""
    questions: int = 20
    """Places between two cells."""
    out: str = ""
    """Folder in which a temporary one is made (1.2 MB a row) and deleted; default: the system's."""
    json: NumbersFile = ""

    def __post_init__(self) -> None:
        require_at_least(1, self, "rows", "channels", "questions")


DEBUG = NearestBenchmark(rows=24, channels=32, questions=4)


@dataclass(frozen=True, kw_only=True)
class Way:
    """What a way of finding cells took, in seconds a question: by the clock, and of CPUs in this process."""

    name: str
    wall: float
    cpu: float
    recall: float
    "of the nearest ones that NumPy finds"


@dataclass(frozen=True, kw_only=True)
class NearestResult:
    """What was measured."""

    cells: int
    channels: int
    build_wall: float
    build_cpu: float
    index_bytes: int
    settings: IndexSettings
    ways: Sequence[Way]


def measure_nearest(config: NearestBenchmark, folder: Path) -> NearestResult:
    """Build the index, and ask all ways the same questions."""
    require_faiss()
    store = FeatureStore.open(config.store or _made_up(config, folder))
    level = store.level(config.level)
    wall, cpu = time.monotonic(), time.process_time()
    settings = build_index(store, level, InlineExecutor())
    built = time.monotonic() - wall, time.process_time() - cpu
    rows = np.flatnonzero(store.valid())
    maps = [store.read(int(rows[i]), level.name) for i in spread(len(rows), config.questions)]
    queries = [np.asarray(each[len(each) // 2, :2].mean(axis=0), np.float32) for each in maps]
    index = CellIndex.open(store, level)
    truth, numpy = _timed("NumPy, zarr-python", lambda query: _brute_force(store, config.level, query), queries, None)
    _, exact = _timed("nearest", lambda query: nearest_cells(store, query, level, NEIGHBOURS), queries, truth)
    _, indexed = _timed("nearest --index", lambda query: index.nearest(query, NEIGHBOURS), queries, truth)
    files = (Path(store.folder.url) / "search" / level.name).iterdir()
    return NearestResult(
        cells=settings.cells,
        channels=level.channels,
        build_wall=built[0],
        build_cpu=built[1],
        index_bytes=sum(path.stat().st_size for path in files),
        settings=settings,
        ways=[numpy, exact, indexed],
    )


def _made_up(config: NearestBenchmark, folder: Path) -> str:
    draw, path = np.random.default_rng(0), folder / "x1.npy"
    directions = draw.standard_normal((DIRECTIONS, config.channels), np.float32)
    features = np.lib.format.open_memmap(path, "w+", np.float16, (config.rows, 28, 28, config.channels))
    for row in features:
        noise = draw.standard_normal(row.shape, np.float32)
        row[...] = directions[draw.integers(DIRECTIONS, size=row.shape[:2])] + noise
    features.flush()
    url = str(folder / "feats.zarr")
    write_store(Place(name="made up", url=url, npy=str(path)), config.rows)
    return url


def _brute_force(store: FeatureStore, level: str, query: np.ndarray) -> list[NearCell]:
    """Written without this package's reader: cosines of all cells, and the largest."""
    array: Any = zarr.open_array(f"{store.folder.url}/{level}/features", mode="r")
    scale: Any = zarr.open_array(f"{store.folder.url}/{level}/scale", mode="r") if array.dtype == np.int8 else None
    cosines = []
    for first in range(0, array.shape[0], 64):
        maps = np.asarray(array[first : first + 64], np.float32)
        if scale is not None:
            maps *= np.asarray(scale[first : first + 64])[:, None, None]
        cosines.append(maps @ query / (np.linalg.norm(maps, axis=-1) * np.linalg.norm(query)))
    every = np.nan_to_num(np.concatenate(cosines), nan=-2)
    best = np.argsort(-every.ravel(), kind="stable")[:NEIGHBOURS]
    places = zip(*np.unravel_index(best, every.shape), strict=True)
    return [NearCell(row=int(r), cell=(int(y), int(x)), cosine=float(every[r, y, x])) for r, y, x in places]


def _timed(
    name: str, find: Callable[[np.ndarray], list[NearCell]], queries: Sequence[np.ndarray], truth: Sequence[Places] | None
) -> tuple[list[Places], Way]:
    """The cells that each question gives, and what it took; the first question is asked twice, and its first time left out."""
    find(queries[0])
    wall, cpu = time.monotonic(), time.process_time()
    found: list[Places] = [{(each.row, *each.cell) for each in find(query)} for query in queries]
    took = (time.monotonic() - wall) / len(queries), (time.process_time() - cpu) / len(queries)
    recall = float(np.mean([len(a & b) / len(b) for a, b in zip(found, truth or found, strict=True)]))
    return found, Way(name=name, wall=took[0], cpu=took[1], recall=recall)


def nearest_report(_: NearestBenchmark, result: NearestResult, machine: Machine) -> Iterator[str]:
    """The numbers as Markdown, line by line."""
    settings = result.settings
    yield f"## nearest: {result.cells:,} cells of {result.channels} values, {machine.cores} cores"
    yield (
        f"index: {settings.lists:,} lists, of which {settings.probes:,} are looked into, {settings.candidates:,} candidates, "
        f"{result.index_bytes / 1e6:.1f} MB; built in {result.build_wall:.1f} s ({result.build_cpu:.1f} s of CPU time); its own "
        f"recall@{NEIGHBOURS} {settings.recall:.3f} of {settings.queries} cells"
    )
    yield ""
    yield from table_lines(
        ["", "s a question", "s of CPU time", f"recall@{NEIGHBOURS}"],
        [[way.name, f"{way.wall:.3f}", f"{way.cpu:.3f}", f"{way.recall:.3f}"] for way in result.ways],
    )
