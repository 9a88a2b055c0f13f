"""An index of a level's cells, kept beside the store, that says which of them `nearest` has to compare: no store rests on it.

Cells are scaled to length 1 and lie in lists, each that of its nearest centroid; of what they differ from it by, a product
quantiser's code is kept (IVF-PQ: Jegou, Douze, Schmid, TPAMI 2011). Built by FAISS (`search_build.py`), and kept as plain arrays:
a question reads by range the lists that it looks into, where FAISS would read the whole index, and nothing that comes with a
stranger's store is given to a parser in C++.

    search/x1/index.json            settings, what of the store it is of, its recall; last to be written, first to be removed
    search/x1/codebook.safetensors  `centroids` float32 [L, C], `codebooks` float32 [M, 256, C / M]
    search/x1/cells-00000           where lists begin, int64 [L + 1]; then of each cell its number, int64, and code, uint8 [M]
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import safetensors.numpy

from pipelines.showing.nearest import NearCell, nearest_cells
from storage.documents import DamagedObject, Document, MissingObject, decode_known
from storage.paths import StorageError
from storage.spec import Level
from storage.store import FeatureStore

CODES = 256
"""Centroids of each part of a vector; a code's bytes are their numbers."""


SCORED = np.dtype([("score", np.float32), ("cell", np.int64)])
"""A cell by its number, and how like it is to what was asked for."""


class NoSearchIndex(StorageError):
    """A level has no index, or one of another state of the store."""


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """What index.json holds."""

    format: int = 1
    fingerprint: str
    "the store's"
    counts: Mapping[str, int]
    "the store's rows by status"
    cells: int
    channels: int
    "of a vector in the index: the level's, and zeros up to a multiple of 16"
    lists: int
    code_bytes: int
    parts: int
    part_rows: int
    "rows of the store that a part has the cells of"
    probes: int
    "lists that a question looks into"
    candidates: int
    "cells whose rows are compared exactly"
    recall: float
    "recall@10 with these, measured on the store"
    queries: int
    "cells that it was measured with"
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = (self.channels, self.lists, self.code_bytes, self.parts, self.part_rows, self.probes, self.candidates)
        if min(sizes) < 1 or self.channels % self.code_bytes or self.format != 1:
            raise ValueError(f"no index has these settings: {self}")


@dataclass(frozen=True, kw_only=True)
class Codebook:
    """What cells are encoded by."""

    centroids_LC: np.ndarray
    "float32"
    codebooks_MKD: np.ndarray
    "float32 [M, 256, C / M]"

    def to_bytes(self) -> bytes:
        """As it is kept."""
        return safetensors.numpy.save({"centroids": self.centroids_LC, "codebooks": self.codebooks_MKD})

    @classmethod
    def read(cls, document: Document, settings: IndexSettings) -> "Codebook":
        """Raises `DamagedObject`."""
        data = document.bytes()
        with document.parsing():
            try:
                found = safetensors.numpy.load(data)
            except safetensors.SafetensorError as error:
                raise ValueError(str(error)) from None
            centroids, codebooks = found["centroids"], found["codebooks"]
            m, c = settings.code_bytes, settings.channels
            if centroids.shape != (settings.lists, c) or codebooks.shape != (m, CODES, c // m):
                raise ValueError(f"arrays of {centroids.shape} and {codebooks.shape} aren't those of its index.json")
        return cls(centroids_LC=centroids.astype(np.float32), codebooks_MKD=codebooks.astype(np.float32))


def unit_vectors(values: np.ndarray, channels: int) -> np.ndarray:
    """Vectors [..., C] as the index has them: float32 [N, channels], of length 1, with zeros at their ends."""
    flat = np.asarray(values, np.float32).reshape(-1, values.shape[-1])
    out = np.zeros((len(flat), channels), np.float32)
    out[:, : flat.shape[1]] = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)
    return out


def index_folder(level: str) -> str:
    """Where a level's index lies below the store."""
    return f"search/{level}"


def part_file(level: str, part: int) -> str:
    """The object of a part's cells."""
    return f"{index_folder(level)}/cells-{part:05d}"


def entry_type(code_bytes: int) -> np.dtype[np.void]:
    """A cell's entry in its list."""
    return np.dtype([("cell", "<i8"), ("code", "u1", (code_bytes,))])


class CellIndex:
    """An index that is there. `cell` numbers are `row * cells of a row + cell`."""

    def __init__(self, store: FeatureStore, level: Level, settings: IndexSettings, codebook: Codebook):
        self.store, self.level, self.settings, self._codebook = store, level, settings, codebook
        self._starts: list[np.ndarray] | None = None

    @classmethod
    def open(cls, store: FeatureStore, level: Level) -> "CellIndex":
        """Raises `NoSearchIndex`, and `DamagedObject`."""
        advice = f"jobs/show.py index {store.folder.displayed} --level {level.name} builds it anew"
        document = Document(store.folder, f"{index_folder(level.name)}/index.json", advice)
        try:
            found = document.json()
        except MissingObject:
            raise NoSearchIndex(
                f"{store.folder.displayed} has no index of {level.name}; jobs/show.py index {store.folder.displayed} --level "
                f"{level.name} builds one, and without --index all cells are compared"
            ) from None
        with document.parsing():
            settings = decode_known(IndexSettings, found)
        if (settings.fingerprint, dict(settings.counts)) != (store.root.fingerprint, dict(store.root.counts or {})):
            raise NoSearchIndex(f"{document.displayed} is of the store as it was before; {advice}")
        codebook = Document(store.folder, f"{index_folder(level.name)}/codebook.safetensors", advice)
        return cls(store, level, settings, Codebook.read(codebook, settings))

    def nearest(self, query_C: np.ndarray, count: int, *, per_image: bool = False, without: Sequence[int] = ()) -> list[NearCell]:
        """As `nearest_cells`, with exact cosines, of the rows alone whose cells the index finds near; where they don't give
        `count`, of more."""
        probes, candidates = self.settings.probes, max(self.settings.candidates, 4 * count)
        while True:
            cells = self.candidates(query_C, candidates, probes, without)
            rows = np.unique(cells // self.level.cells)
            found = nearest_cells(self.store, query_C, self.level, count, per_image=per_image, without=without, rows=rows)
            everything = len(cells) < candidates and probes >= self.settings.lists
            if len(found) == count or everything:
                return found
            probes, candidates = 2 * probes, 4 * candidates

    def said(self) -> str:
        """What is known of what it finds."""
        of = f"{self.settings.queries} cells of the store"
        return f"by the index: recall@10 {self.settings.recall:.3f}, measured with {of}; without --index all cells are compared"

    def candidates(self, query_C: np.ndarray, count: int, probes: int, without: Sequence[int] = ()) -> np.ndarray:
        """Numbers of the `count` cells nearest to `query_C` [C] by their codes, best first, int64; of the `probes` lists nearest
        to it. `without`: rows that are passed over."""
        settings, codebook = self.settings, self._codebook
        query = unit_vectors(query_C[None], settings.channels)[0]
        by_list = codebook.centroids_LC @ query
        lists = np.argsort(-by_list, kind="stable")[:probes]
        parts_of_query = query.reshape(settings.code_bytes, -1)
        by_code = np.einsum("md,mkd->mk", parts_of_query, codebook.codebooks_MKD)
        best = np.zeros(0, SCORED)
        for which, entries in self._lists(lists):
            scores = by_list[which] + by_code[np.arange(settings.code_bytes), entries["code"]].sum(axis=1)
            keep = ~np.isin(entries["cell"] // self.level.cells, list(without))
            new = np.zeros(int(keep.sum()), SCORED)
            new["score"], new["cell"] = scores[keep], entries["cell"][keep]
            best = np.concatenate([best, new])
            if len(best) > 4 * count:
                best = best_cells(best, count)
        cells: np.ndarray = best_cells(best, count)["cell"]
        if len(cells) and not 0 <= cells.min() <= cells.max() < len(self.store) * self.level.cells:
            raise self._damaged(index_folder(self.level.name), "is damaged: it has cells that the store hasn't")
        return cells

    def _lists(self, lists: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """The entries of some lists, in all parts, each with its list; those without any are left out."""
        entry = entry_type(self.settings.code_bytes)
        header = 8 * (self.settings.lists + 1)
        names, places = [], []
        for part, starts in enumerate(self._all_starts(header)):
            for each in lists:
                first, last = starts[each : each + 2].tolist()
                if last > first:
                    at, size = header + first * entry.itemsize, (last - first) * entry.itemsize
                    names.append(int(each))
                    places.append((part_file(self.level.name, part), at, size))
        found = self.store.folder.read_ranges(places)
        return [
            (name, np.frombuffer(self._whole(data, place), entry)) for name, data, place in zip(names, found, places, strict=True)
        ]

    def _all_starts(self, header: int) -> list[np.ndarray]:
        """Where lists begin in each part, read once."""
        if self._starts is None:
            places = [(part_file(self.level.name, part), 0, header) for part in range(self.settings.parts)]
            found = zip(self.store.folder.read_ranges(places), places, strict=True)
            self._starts = [np.frombuffer(self._whole(data, place), "<i8") for data, place in found]
            most = self.settings.part_rows * self.level.cells
            for starts, place in zip(self._starts, places, strict=True):
                if starts[0] != 0 or starts[-1] > most or (np.diff(starts) < 0).any():
                    raise self._damaged(place[0], "is damaged: its lists don't begin where each other end")
        return self._starts

    def _whole(self, data: bytes | None, place: tuple[str, int, int]) -> bytes:
        if data is None or len(data) != place[2]:
            raise self._damaged(place[0], "is missing or cut short")
        return data

    def _damaged(self, name: str, what: str) -> DamagedObject:
        advice = f"jobs/show.py index {self.store.folder.displayed} --level {self.level.name} builds the index anew"
        return Document(self.store.folder, name, advice).damaged(what)


def best_cells(found: np.ndarray, count: int) -> np.ndarray:
    """Those of `SCORED` cells with the highest scores, best first; of equal ones the lower cells."""
    return found[np.lexsort((found["cell"], -found["score"]))][:count]


def document_of(settings: IndexSettings) -> bytes:
    """index.json."""
    return json.dumps(asdict(settings), indent=1).encode()
