"""What the page of `browse` asks of a store: cards of rows, photographs, colours, similar and nearest cells, keys, failures.

All of it is slow (it reads, decodes, compares) and safe across threads; what was made last is kept, up to a number of bytes.
"""

import io
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from operators.visual import RgbProjection, cosine_map
from pipelines.features.photos import NoPhoto, try_photos
from pipelines.showing.nearest import Query, nearest_cells
from pipelines.showing.status import read_runs, state_in_words
from pipelines.showing.views import colours_for, store_title
from storage.documents import JsonObject, JsonValue
from storage.failures import REASON_COLUMNS, group_failures
from storage.kept import Kept
from storage.ledger import SCHEMA
from storage.paths import StorageOptions
from storage.pixels import PixelMap
from storage.root import read_attributes
from storage.spec import Level
from storage.store import FeatureStore, NotAStore
from storage.words import printable, printable_name

PHOTO_BYTES, MAP_BYTES, COLOUR_BYTES = 2**26, 2**28, 2**26
"""Of pictures, maps and coloured maps that are kept."""

READ_BYTES = 2**25
"""Of maps, raw, that are read at once: they are kept one by one."""

SEARCH_ROWS = 2**17
"""Keys that are looked through at once; a power of two, so that they lie within a part of the index."""

MOST_FOUND = 2000
"""Rows that a search gives."""

_PLACED = tuple(field.name for field in fields(PixelMap))
_STEP = 65534
"""Steps from cosine -1 to 1: what `cosine_steps` gives fits 16 bits beside 0."""


@dataclass(frozen=True)
class Packed:
    """An answer of many numbers: what they are, and the bytes of one row after the other."""

    header: JsonObject
    body: Sequence[bytes]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which cards: of some rows; or `count` from the `first` on of all rows, those whose key holds `text`, or the failed ones."""

    rows: Sequence[int] = ()
    first: int = 0
    count: int = 24
    text: str = ""
    failed: bool = False


class OpenStore:
    """A store as it was when it was opened; `newer` is it as it is now."""

    def __init__(self, store: FeatureStore, options: StorageOptions):
        self.store, self.options, self._opened = store, options, store.attributes
        self._photos: Kept[int, bytes] = Kept(PHOTO_BYTES, len)
        self._maps: Kept[tuple[str, int], np.ndarray] = Kept(MAP_BYTES, lambda array: array.nbytes)
        self._colours: Kept[tuple[str, int], bytes] = Kept(COLOUR_BYTES, len)
        self._palettes: dict[int, RgbProjection] = {}
        self._fitting = threading.Lock()
        self._failed_of: dict[int, pa.Table] = {}
        "failed rows of the blocks that are done, of a store that is being written"
        self._all_failed: pa.Table | None = None
        "of one that is complete"
        self._counting = threading.Lock()
        self._found: tuple[str, np.ndarray, bool] = "", np.zeros(0, np.int64), False
        "what was searched for last: text, rows, whether there are more"

    def newer(self) -> "OpenStore":
        """The store as it is now: this one, or another where its root says something else. One request. Raises `NotAStore`."""
        attributes = read_attributes(self.store.folder)
        if attributes is None:
            raise NotAStore(f"{self.store.folder.displayed} is gone since it was opened")
        if attributes == self._opened:  # a store that grew takes later attributes by itself
            return self
        return OpenStore(FeatureStore(self.store.folder, attributes), self.options)

    # --- what there is ------------------------------------------------------------------------------------------------

    def described(self) -> JsonObject:
        """What the page is built of. Nothing is read for it."""
        store = self.store
        return {
            "name": printable_name(store.folder.displayed.rstrip("/").rsplit("/", 1)[-1]),
            "url": printable_name(store.folder.displayed),
            "title": printable_name(store_title(store)),
            "is_random": store.spec.weights_source == "random",
            "fingerprint": store.root.fingerprint,
            "input": list(store.spec.input_size),
            "rows": len(store),
            "levels": [_described(level) for level in self.levels()],
        }

    def levels(self) -> list[Level]:
        """Maps, coarse ones first, and then vectors."""
        return sorted(self.store.spec.levels, key=lambda level: (level.grid is None, level.grid or ()))

    def status(self) -> JsonObject:
        """How far it is, in numbers and in words."""
        store = self.store
        is_complete = store.status == "complete"
        failed, finished = len(self._failed([])), len(store)
        if not is_complete:
            finished = sum(store.layout.task(block).n_rows for block in list(self._failed_of))
        return {
            "is_complete": is_complete,
            "state": printable(state_in_words(store.status, [] if is_complete else read_runs(store))),
            "rows": len(store),
            "finished": finished,
            "failed": failed,
        }

    def failures(self) -> JsonObject:
        """Failed rows by reason, the commonest first."""
        failed = self._failed(REASON_COLUMNS)
        groups: list[JsonValue] = [
            {
                "count": group.count,
                "reason": _reason(group.stage, group.error, group.message),
                "examples": [
                    {"row": int(row), "key": printable_name(key)}
                    for row, key in zip(self.store.index.rows(group.keys), group.keys, strict=True)
                ],
            }
            for group in group_failures([failed])
        ]
        return {"failed": len(failed), "rows": len(self.store), "groups": groups}

    def _failed(self, columns: Sequence[str]) -> pa.Table:
        """Failed rows: `row` and these columns of the ledger. Of a store that is being written, new records alone are read."""
        store, wanted = self.store, ["row", *columns]
        counts = store.root.counts
        if counts is not None and not counts.get("failed"):
            return SCHEMA.empty_table().select(wanted)
        with self._counting:
            if store.status == "complete":
                if self._all_failed is None:
                    self._all_failed = store.failures(["row", *REASON_COLUMNS])
                return self._all_failed.select(wanted)
            done = store.ledger.done()
            for block, table in store.ledger.records(sorted(done - self._failed_of.keys())):
                failed = table.filter(pc.equal(table["status"], "failed")).replace_schema_metadata(None)
                self._failed_of[block] = failed.select(["row", *REASON_COLUMNS])
            for block in self._failed_of.keys() - done:  # made pending again, to be tried once more
                del self._failed_of[block]
            tables = [self._failed_of[block] for block in sorted(done)]
        return (pa.concat_tables(tables) if tables else SCHEMA.empty_table()).select(wanted)

    # --- cards --------------------------------------------------------------------------------------------------------

    def cards(self, wanted: Wanted, gone: threading.Event) -> JsonObject:
        """Of each row: its key, what became of it, and how the image was placed in the model's input.

        Raises `NoSuchRow`. A search ends early once `gone` is set.
        """
        store, total, more = self.store, len(self.store), False
        if wanted.rows:
            rows = store.rows(list(wanted.rows))
        elif wanted.text or wanted.failed:
            rows, more = self._find(wanted.text, gone) if wanted.text else (np.zeros(0, np.int64), False)
            if wanted.failed:
                failed = self._failed([])["row"].to_numpy()
                rows = rows[np.isin(rows, failed)] if wanted.text else failed
            total, rows = len(rows), rows[wanted.first : wanted.first + wanted.count]
        else:
            rows = np.arange(wanted.first, min(wanted.first + wanted.count, total))
        return {"total": total, "has_more": more, "cards": [*self._cards(rows)]}

    def _cards(self, rows: np.ndarray) -> Iterable[JsonObject]:
        if not len(rows):
            return
        records = self.store.records(rows, ["row", "status", "stage", "error", "message", *_PLACED]).to_pylist()
        for record, key in zip(records, self._keys(rows), strict=True):
            card: dict[str, JsonValue] = {"row": record["row"], "key": key, "status": record["status"] or "pending", "reason": ""}
            if record["status"] == "failed":
                card["reason"] = _reason(record["stage"], record["error"], record["message"])
            yield card | {name: record[name] for name in _PLACED}

    def _keys(self, rows: np.ndarray) -> list[str]:
        return [printable_name(key) for key in self.store.index.take(rows, ["key"])["key"].to_pylist()]

    def _find(self, text: str, gone: threading.Event) -> tuple[np.ndarray, bool]:
        """Rows whose key holds `text`, whatever its case, and whether there are more; first that of just this key or number."""
        last, rows, more = self._found
        if last == text:
            return rows, more
        index, found = self.store.index, list(self.store.index.find([text]).values())
        if text.isascii() and text.isdigit() and not found and int(text) < index.n_rows:
            found.append(int(text))
        for first in range(0, index.n_rows, SEARCH_ROWS):
            keys = index.keys(first, min(first + SEARCH_ROWS, index.n_rows))
            found += (first + np.flatnonzero(pc.match_substring(keys, text, ignore_case=True))).tolist()
            if gone.is_set() or len(found) > MOST_FOUND:
                break
        unique = list(dict.fromkeys(found))
        rows, more = np.array(unique[:MOST_FOUND], np.int64), len(unique) > MOST_FOUND
        if not gone.is_set():
            self._found = text, rows, more
        return rows, more

    # --- pictures -----------------------------------------------------------------------------------------------------

    def photos(self, rows: np.ndarray) -> Packed:
        """Photographs as the model saw them, as JPEG; of those that can't be had, the reason."""
        kept = {row: data for row in rows.tolist() if (data := self._photos.get(row))}
        lacking = np.array([row for row in rows.tolist() if row not in kept], np.int64)
        header: list[JsonValue] = [{"row": row, "bytes": len(data)} for row, data in kept.items()]
        for row, found in zip(lacking.tolist(), try_photos(self.store, lacking, self.options), strict=True):
            if isinstance(found, NoPhoto):
                header.append({"row": row, "bytes": 0, "reason": printable(found.reason)})
                continue
            out = io.BytesIO()
            Image.fromarray(found).save(out, "JPEG", quality=88)
            kept[row] = out.getvalue()
            self._photos.put(row, kept[row])
            header.append({"row": row, "bytes": len(kept[row])})
        return Packed({"photos": header}, list(kept.values()))

    def colours(self, level: Level, rows: np.ndarray) -> Packed:
        """The maps of the rows that have one in PCA colours, uint8 [h, w, 3] each."""
        kept = {row: data for row in rows.tolist() if (data := self._colours.get((level.name, row)))}
        for row, values in self._maps_of(level, [row for row in rows.tolist() if row not in kept]):
            kept[row] = self._palette(level)(values).tobytes()
            self._colours.put((level.name, row), kept[row])
        return _by_row(kept, level.grid or (1, 1))

    def _palette(self, level: Level) -> RgbProjection:
        with self._fitting:  # which takes long, and several pictures are asked for at once
            if level.channels not in self._palettes:
                self._palettes[level.channels] = colours_for(self.store, level)
        return self._palettes[level.channels]

    def similar(self, row: int, point_xy: tuple[float, float], level: Level, rows: np.ndarray) -> Packed:
        """Cosines of the feature at a point of the image `row` with the cells of the rows that have some: `cosine_steps` of each.

        `point_xy` is in pixels of the upright original. Of a level of vectors, that of the image with those of others.
        Raises `OutsideImage` and `MissingRows`.
        """
        query_C = self._query(row, point_xy, level)
        # One by one, since a finer level's maps of all rows are too many to be brought to float32 at once.
        found = {other: cosine_steps(cosine_map(query_C, values)) for other, values in self._maps_of(level, rows.tolist())}
        return _by_row(found, level.grid or (1, 1))

    def _query(self, row: int, point_xy: tuple[float, float], level: Level) -> np.ndarray:
        """What others are compared with, [C]: the feature at the point, or the image's vector."""
        return Query.at(self.store, row, point_xy, level).vector_C if level.grid else self.store.read(row, level.name)

    def _maps_of(self, level: Level, rows: Sequence[int]) -> Iterable[tuple[int, np.ndarray]]:
        """The maps of the rows that have one, read some at a time."""
        lacking = []
        for row in rows:
            values = self._maps.get((level.name, row))
            if values is None:
                lacking.append(row)
            else:
                yield row, values
        at_once = max(1, READ_BYTES // level.row_bytes)
        for first in range(0, len(lacking), at_once):
            some = np.array(lacking[first : first + at_once], np.int64)
            read, there = self.store.read_present(some, level.name)
            for row, values, is_there in zip(some.tolist(), read, there, strict=True):
                if is_there:
                    self._maps.put((level.name, row), values.copy())  # of its own, so that it alone is kept
                    yield row, values

    def nearest(
        self,
        row: int,
        point_xy: tuple[float, float],
        level: Level,
        count: int,
        *,
        per_image: bool,
        looked_at: Callable[[int], object],
    ) -> list[JsonObject]:
        """The cells of the whole store that are most like the point, best first, as cards. As `nearest_cells` otherwise."""
        query_C = self._query(row, point_xy, level)
        found = nearest_cells(self.store, query_C, level, count, per_image=per_image, looked_at=looked_at)
        cards = self._cards(np.array([each.row for each in found], np.int64))
        return [{**card, "cell": list(each.cell), "cosine": each.cosine} for card, each in zip(cards, found, strict=True)]


def _by_row(found: Mapping[int, bytes], grid: tuple[int, int]) -> Packed:
    rows = sorted(found)
    return Packed({"rows": [*rows], "grid": list(grid)}, [found[row] for row in rows])


def cosine_steps(cosines: np.ndarray) -> bytes:
    """Cosines as uint16, little-endian: 1 is -1, 65535 is 1, and 0 stands for NaN."""
    steps = np.clip(np.nan_to_num((np.asarray(cosines, np.float64) + 1) / 2 * _STEP).round(), 0, _STEP) + 1
    return np.where(np.isnan(cosines), 0, steps).astype("<u2").tobytes()


def _described(level: Level) -> JsonObject:
    placed = {name: list(value) for name in ("grid", "start", "step") if (value := getattr(level, name)) is not None}
    return {"name": level.name, "method": level.method, "channels": level.channels, "dtype": level.dtype, **placed}


def _reason(stage: str | None, error: str | None, message: str | None) -> str:
    """Why a row failed, in words."""
    return printable(f"{stage}: {error}: {message}")
