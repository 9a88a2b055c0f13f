"""Building the index of a level's cells (search.py) by FAISS: trained on a sample, then written in one streamed pass, on Ray or
here, beside which the nearest cells of some are found exactly, so that its recall is known."""

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import tyro

from cluster.progress import size_text
from cluster.resources import WorkerPool
from pipelines.config import ActorsConfig, ConfigError, Free, Held, JobConfig, require_at_least
from pipelines.executors import Executor, InlineExecutor, executor_for
from pipelines.showing.choice import base_level, dense_levels
from pipelines.showing.nearest import read_chunks
from pipelines.showing.search import (
    CODES,
    SCORED,
    CellIndex,
    Codebook,
    IndexSettings,
    best_cells,
    document_of,
    entry_type,
    index_folder,
    part_file,
    unit_vectors,
)
from storage.spec import Level
from storage.spread import spread
from storage.store import FeatureStore

PART_CELLS = 2**21
"""Cells of a part, which a worker holds at once: some 72 bytes each, twice."""

_TRAIN_BYTES = 2**30
"""Of the vectors that are trained on."""

_PER_LIST = 64
"""Vectors that are trained on, for each list; FAISS asks for 39 at least."""

LEAST_CELLS = 39 * CODES
"""Below that a product quantiser can't be trained, and comparing all takes no time."""

NEIGHBOURS = 10
"""recall@10: how many of the 10 nearest cells the index finds."""

_CANDIDATES = (100, 200, 400, 1600, 6400)
"""How many cells are compared exactly, of which the least that gives the recall is taken."""


@dataclass(frozen=True, kw_only=True)
class SearchIndex(JobConfig):
    """Build an index of a level's cells, kept beside the store, for `nearest --index`: that reads a small part of the level, and
    finds most of what comparing all finds. Needs FAISS: the extra `search`."""

    cluster: Held[ActorsConfig] = ActorsConfig()
    store: Free[tyro.conf.Positional[str]] = ""
    """The store's path or fsspec URL."""
    level: Free[str] = ""
    """Default: the backbone's own."""
    recall: Free[float] = 0.95
    """Of the 10 nearest cells, how many are to be found: what a question looks at is chosen so, on some cells of the store."""
    queries: Free[int] = 100
    """So many cells."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "queries")
        if not 0 < self.recall <= 1:
            raise ConfigError(f"--recall {self.recall:g}: must lie above 0, and at most at 1")

    @property
    def places(self) -> tuple[str, ...]:
        return (self.store,)

    def lines(self) -> Iterator[str]:
        if not self.store:
            raise ConfigError("no store: give its path or URL")
        require_faiss()
        store = FeatureStore.open(self.store, self.options)
        level = dense_levels(store, [self.level])[0] if self.level else base_level(store)
        # Ray takes longer to start than one part takes to be written.
        is_small = self.cluster.executor == "auto" and len(_parts(store, level)) == 1
        with executor_for(self.changed(executor="inline") if is_small else self) as executor:
            built = build_index(store, level, executor, recall=self.recall, queries=self.queries, actors=self.cluster.actors)
        size = built.cells * entry_type(built.code_bytes).itemsize
        smaller = built.cells * 4 * level.channels / size
        yield (
            f"{store.folder.displayed}/{index_folder(level.name)}: {built.cells:,} cells in {built.lists:,} lists, "
            f"{size_text(size)} ({smaller:.0f} times less than their vectors in float32)"
        )
        yield (
            f"recall@{NEIGHBOURS} {built.recall:.3f}, of {built.queries} cells of the store; a question looks into "
            f"{built.probes:,} lists and compares {built.candidates:,} cells' images exactly"
        )
        if built.recall < self.recall:
            yield f"which is less than --recall {self.recall:g}: these cells have no nearest ones that stand out"
        yield f"jobs/show.py nearest {store.folder.displayed} --index takes it"


def require_faiss() -> None:
    """Raises `ConfigError` where FAISS isn't installed."""
    try:
        import faiss  # noqa: F401
    except ModuleNotFoundError:
        raise ConfigError(
            "an index is built by FAISS, which isn't installed here; pip install 'raylift[search]' (or faiss-cpu) installs it. "
            "`nearest` without --index needs none"
        ) from None


def build_index(
    store: FeatureStore, level: Level, executor: Executor, *, recall: float = 0.95, queries: int = 100, actors: int | None = None
) -> IndexSettings:
    """Train, write, and measure; one that is there is replaced. Raises `ConfigError` for a store that isn't complete, or is too
    small."""
    if store.status != "complete":
        raise ConfigError(f"{store.folder.displayed} is unfinished; an index is of a complete store")
    rows = np.flatnonzero(store.valid())
    of_row = level.cells
    if len(rows) * of_row < LEAST_CELLS:
        raise ConfigError(
            f"{store.folder.displayed} has {len(rows) * of_row:,} cells of {level.name}; an index takes {LEAST_CELLS:,} to be "
            "trained, and below that comparing all of them takes no time"
        )
    # Until the new one is whole there is none.
    store.folder.remove([f"{index_folder(level.name)}/index.json"])
    channels = -(-level.channels // 16) * 16
    book = train(_sample(store, level, rows, channels), _list_count(len(rows) * of_row, channels))
    store.folder.write(f"{index_folder(level.name)}/codebook.safetensors", book.to_bytes())
    asked = _queries(store, level, rows, channels, queries)
    parts = _parts(store, level)
    make = functools.partial(_Encoder, store, level, book, asked)
    cells, nearest = 0, [np.zeros(0, SCORED)] * len(asked.cells)
    for done in executor.pieces(make, list(enumerate(parts)), _pool(executor, actors)):
        cells += done.cells
        nearest = [best_cells(np.concatenate(pair), NEIGHBOURS) for pair in zip(nearest, done.nearest, strict=True)]
    settings = IndexSettings(
        fingerprint=store.root.fingerprint,
        counts=dict(store.root.counts or {}),
        cells=cells,
        channels=channels,
        lists=len(book.centroids_LC),
        code_bytes=len(book.codebooks_MKD),
        parts=len(parts),
        part_rows=len(parts[0]),
        probes=1,
        candidates=1,
        recall=0.0,
        queries=len(asked.cells),
        versions={"faiss": _faiss_version()},
    )
    settings = _settled(CellIndex(store, level, settings, book), asked, [each["cell"] for each in nearest], recall)
    _remove_other_parts(store, level, len(parts))
    store.folder.write(f"{index_folder(level.name)}/index.json", document_of(settings))
    store.folder.remove_partial()
    return settings


def _parts(store: FeatureStore, level: Level) -> list[range]:
    """Rows that a worker has the cells of at once."""
    rows = max(1, PART_CELLS // level.cells)
    return [range(first, min(first + rows, len(store))) for first in range(0, len(store), rows)]


def _pool(executor: Executor, actors: int | None) -> WorkerPool:
    size = 1 if isinstance(executor, InlineExecutor) else actors or executor.cpus()
    return WorkerPool(device="cpu", size=size, cpus=1, gpus=0)


def _faiss_version() -> str:
    import faiss

    return str(faiss.__version__)


def _remove_other_parts(store: FeatureStore, level: Level, parts: int) -> None:
    """Of an earlier index with more of them."""
    known = {part_file(level.name, part).rsplit("/", 1)[-1] for part in range(parts)} | {"codebook.safetensors"}
    there = store.folder.sizes(index_folder(level.name))
    store.folder.remove(f"{index_folder(level.name)}/{name}" for name in there if name not in known)


# --- training ---------------------------------------------------------------------------------------------------------


def _list_count(cells: int, channels: int) -> int:
    """About the root of the cells' number, which makes as many lists as a list has cells; a power of two, as far as the vectors
    that are trained on suffice."""
    most = min(cells, _TRAIN_BYTES // (4 * channels)) // 39
    return int(2 ** max(0, min(round(math.log2(math.sqrt(cells))), math.floor(math.log2(max(1, most))))))


def _sample(store: FeatureStore, level: Level, rows: np.ndarray, channels: int) -> np.ndarray:
    """Vectors to train on, float32 [N, channels]: a quarter of the cells of rows spread over the store, or more where there are
    few."""
    of_row = level.cells
    lists = _list_count(len(rows) * of_row, channels)
    wanted = min(len(rows) * of_row, _TRAIN_BYTES // (4 * channels), max(2**16, _PER_LIST * lists))
    chosen = rows[spread(len(rows), max(1, math.ceil(wanted / max(1, of_row // 4))))]
    each = min(of_row, math.ceil(wanted / len(chosen)))
    draw, found = np.random.default_rng(0), []
    for some, maps in read_chunks(store, level, chosen):
        flat = maps.reshape(len(some), of_row, -1)
        found += [unit_vectors(cells[draw.permutation(of_row)[:each]], channels) for cells in flat]
    sample = np.concatenate(found)
    return sample[np.isfinite(sample).all(axis=1)]


def train(sample_NC: np.ndarray, lists: int) -> Codebook:
    """Centroids of lists by spherical k-means, and a product quantiser of what vectors differ from them by."""
    import faiss

    channels = sample_NC.shape[1]
    kmeans = faiss.Kmeans(channels, lists, niter=10, spherical=True, seed=0, max_points_per_centroid=_PER_LIST)
    kmeans.train(sample_NC)
    centroids = np.ascontiguousarray(kmeans.centroids, np.float32).reshape(lists, channels)
    bytes_each = max(size for size in range(1, 65) if channels % size == 0 and channels // size >= 2)
    quantiser = faiss.ProductQuantizer(channels, bytes_each, 8)
    quantiser.train(sample_NC - centroids[_nearest_lists(centroids, sample_NC)])
    codebooks = faiss.vector_to_array(quantiser.centroids).reshape(bytes_each, CODES, -1)
    return Codebook(centroids_LC=centroids, codebooks_MKD=codebooks)


def _nearest_lists(centroids_LC: np.ndarray, vectors_NC: np.ndarray) -> np.ndarray:
    import faiss

    flat = faiss.IndexFlatIP(centroids_LC.shape[1])
    flat.add(centroids_LC)
    found: np.ndarray = flat.search(vectors_NC, 1)[1][:, 0]
    return found


# --- the pass over the store ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Queries:
    """Cells of the store whose nearest other cells are looked for."""

    cells: np.ndarray
    "their numbers, int64 [Q]"
    vectors_QC: np.ndarray


def _queries(store: FeatureStore, level: Level, rows: np.ndarray, channels: int, count: int) -> _Queries:
    of_row = level.cells
    chosen = rows[spread(len(rows), count)]
    draw = np.random.default_rng(1)
    cells, vectors = [], []
    for some, maps in read_chunks(store, level, chosen):
        for row, each in zip(some, maps.reshape(len(some), of_row, -1), strict=True):
            cell = int(draw.integers(of_row))
            cells.append(int(row) * of_row + cell)
            vectors.append(unit_vectors(each[cell], channels)[0])
    return _Queries(cells=np.array(cells, np.int64), vectors_QC=np.stack(vectors))


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    """What came of a part."""

    cells: int
    nearest: list[np.ndarray]
    "of each query, among the part's cells"


class _Encoder:
    """Encodes a part's cells and writes them; made once per worker."""

    def __init__(self, store: FeatureStore, level: Level, book: Codebook, queries: _Queries):
        import faiss

        self._store, self._level, self._book, self._queries = store, level, book, queries
        m, _, d = book.codebooks_MKD.shape
        self._quantiser: faiss.ProductQuantizer = faiss.ProductQuantizer(m * d, m, 8)
        faiss.copy_array_to_vector(book.codebooks_MKD.ravel(), self._quantiser.centroids)

    def __call__(self, piece: tuple[int, range]) -> _Encoded:
        part, rows = piece
        of_row = self._level.cells
        channels, code_bytes = self._book.centroids_LC.shape[1], len(self._book.codebooks_MKD)
        lists: list[np.ndarray] = []
        entries: list[np.ndarray] = []
        nearest = [np.zeros(0, SCORED)] * len(self._queries.cells)
        for some, maps in read_chunks(self._store, self._level, rows):
            vectors = unit_vectors(maps, channels)
            cells = (some[:, None] * of_row + np.arange(of_row)).ravel()
            if not (there := np.isfinite(vectors).all(axis=1)).all():
                vectors, cells = vectors[there], cells[there]
            found = _nearest_lists(self._book.centroids_LC, vectors)
            entry = np.zeros(len(cells), entry_type(code_bytes))
            entry["cell"] = cells
            entry["code"] = self._quantiser.compute_codes(vectors - self._book.centroids_LC[found])
            lists.append(found)
            entries.append(entry)
            nearest = [
                best_cells(np.concatenate(pair), NEIGHBOURS) for pair in zip(nearest, self._nearest(cells, vectors), strict=True)
            ]
        which = np.concatenate(lists) if lists else np.zeros(0, np.int64)
        every = np.concatenate(entries) if entries else np.zeros(0, entry_type(code_bytes))
        starts = np.concatenate([[0], np.cumsum(np.bincount(which, minlength=len(self._book.centroids_LC)))]).astype("<i8")
        ordered = every[np.argsort(which, kind="stable")]
        self._store.folder.write(part_file(self._level.name, part), starts.tobytes() + ordered.tobytes())
        return _Encoded(cells=len(every), nearest=nearest)

    def _nearest(self, cells: np.ndarray, vectors: np.ndarray) -> Iterator[np.ndarray]:
        """Of each query its nearest cells but itself."""
        cosines = self._queries.vectors_QC @ vectors.T
        for own, row in zip(self._queries.cells, cosines, strict=True):
            row[cells == own] = -np.inf
            best = np.argpartition(-row, NEIGHBOURS)[:NEIGHBOURS] if len(row) > NEIGHBOURS else np.arange(len(row))
            new = np.zeros(len(best), SCORED)
            new["score"], new["cell"] = row[best], cells[best]
            yield new[np.isfinite(new["score"])]


# --- how much of it a question looks at -------------------------------------------------------------------------------


def _settled(index: CellIndex, queries: _Queries, truth: list[np.ndarray], wanted: float) -> IndexSettings:
    """With the fewest lists and candidates that give the recall; else with the most."""
    lists = index.settings.lists
    probes = [min(lists, 2**n) for n in range(2, 2 + math.ceil(math.log2(max(4, lists))) - 1)] or [lists]
    best = replace(index.settings, probes=lists, candidates=_CANDIDATES[-1], recall=-1.0)
    for few, each in itertools.product((True, False), probes):
        sizes = _CANDIDATES[:3] if few else _CANDIDATES[3:]
        found = [
            _others(index.candidates(vector, sizes[-1] + 1, each), own)
            for own, vector in zip(queries.cells, queries.vectors_QC, strict=True)
        ]
        for size in sizes:
            recall = float(np.mean([np.isin(true, cells[:size]).mean() for true, cells in zip(truth, found, strict=True)]))
            here = replace(index.settings, probes=each, candidates=size, recall=recall)
            if recall >= wanted:
                return here
            if recall > best.recall:
                best = here
    return best


def _others(cells: np.ndarray, own: np.int64) -> np.ndarray:
    return cells[cells != own]
