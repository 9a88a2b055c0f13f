"""An open store, as readers have it: rows of its levels, where their cells lie, and what became of each image.

`FeatureStore` (storage/store.py) is the same with what writes it. Layout and protocol: storage/DESIGN.md.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike

from storage.documents import DamagedObject, Document, JsonObject, MissingObject, decode_known
from storage.html import store_html
from storage.ledger import SCHEMA, Ledger, commits_of
from storage.paths import Folder, StorageError, StorageOptions, UnknownName
from storage.pixels import PixelMap, bilinear, cell_centres, to_cells
from storage.reader import LevelReader
from storage.regions import Regions, is_points, pooled, region_areas
from storage.root import MARKED, RootDocument, StoreReplaced, read_attributes
from storage.samples import INDEX, SampleIndex
from storage.spec import Level
from storage.totals import clipped_lines, float16_levels

Selection = str | int | slice | Sequence[str] | Sequence[int] | np.ndarray
"""Rows by key, number, slice, several of them, or a mask."""


class NotAStore(StorageError, FileNotFoundError):
    """There is no feature store at the URL."""


class NoSuchRow(StorageError, IndexError):
    """The store has fewer rows."""


class OutsideImage(StorageError, ValueError):
    """A point lies outside the image, or was cut away by the crop."""


class MissingRows(StorageError, LookupError):
    """Rows that were asked for have no features: they failed, or aren't written yet."""


class OpenStore:
    """A store at a URL, as it was when it was opened.

    `read` (rows of a level), `sample` and `pool` (features at points and of regions of an image), `coords` and `cells`
    (where cells lie), `row`, `rows`, `records` and `valid` (which image is where, and what became of it). Opening costs one
    request; the index and the ledger are opened when they are first asked for. Pickles to its URL, options and attributes; safe
    across threads, fork and spawn.
    """

    def __init__(self, folder: Folder, attributes: JsonObject):
        self.folder = folder
        self._take_attributes(attributes)

    def _take_attributes(self, attributes: JsonObject) -> None:
        """Be the store that `attributes` describe; open files and cached shard indexes of its state before are dropped."""
        self.attributes = dict(attributes)
        self.root = decode_known(RootDocument, self.attributes)
        "`attributes`, typed"
        self.spec = self.root.spec
        # Of a complete store, every record is of all rows.
        sizes = [each.n_rows for each in self.root.generations] if self.root.status == "writing" else []
        added = [
            Ledger(
                self.folder,
                self.root.layout,
                [self.level(each.level)],
                each.fingerprint,
                commits=commits_of(each.level),
                packs=self.root.packs,
                sizes=sizes,
            )
            for each in self.root.added
        ]
        self.ledger = Ledger(
            self.folder,
            self.root.layout,
            self.spec.levels,
            self.origin,
            # Records of a store that format 2 began have no fingerprint, also after it was upgraded.
            unmarked=self.root.format < MARKED or self.root.upgraded_from is not None,
            sample_arrays=self.root.has_sample_arrays,
            sizes=sizes,
            packs=self.root.packs,
            added=added,
        )
        self.__dict__.pop("index", None)  # the cached property holds the index before
        self._readers: dict[tuple[str, int], LevelReader] = {}
        # Last: whoever asks for a further row in another thread has all that is needed for it.
        self.layout = self.root.layout

    @property
    def origin(self) -> str:
        """The fingerprint that the commit records have."""
        return self.root.origin or self.root.fingerprint

    def __reduce__(self) -> tuple[type[Self], tuple[Folder, JsonObject]]:
        # What is cached stays behind: open files and locks don't pickle.
        return type(self), (self.folder, self.attributes)

    def __len__(self) -> int:
        return self.layout.n_rows

    def __repr__(self) -> str:
        levels = ", ".join(f"{level.name} {level.row_shape}" for level in self.spec.levels)
        return f"{type(self).__name__}({self.folder.displayed!r}, {len(self):,} rows, {self.status}: {levels})"

    def _repr_html_(self) -> str:
        return store_html(self)

    @classmethod
    def open(cls, url: str, storage_options: StorageOptions | None = None) -> Self:
        """Open an existing store. Raises `NotAStore`."""
        folder = Folder(url, storage_options)
        attributes = read_attributes(folder)
        if attributes is None:
            advice = f"make one with jobs/extract.py --out {folder.displayed}"
            if folder.is_file():
                advice = "a file is there; give the folder that jobs/extract.py --out wrote"
            elif folder.exists("run.json"):
                advice = f"a training or an evaluation is there; jobs/show.py training {folder.displayed} shows a training"
            raise NotAStore(f"there is no feature store at {folder.displayed}; {advice}")
        return cls(folder, attributes)

    @property
    def status(self) -> str:
        """`writing` or `complete`."""
        return self.root.status

    @functools.cached_property
    def index(self) -> SampleIndex:
        """The samples. Raises `DamagedObject` where they aren't those that the store was made of."""
        root, prefix = self.root, self.index_prefix
        try:
            index = SampleIndex(self.folder, prefix, self._later_index)
        except MissingObject:
            # Of a store that grew, the index before is removed when it's complete.
            if (later := self._later_index()) is None:
                raise
            return later
        if (index.n_rows, index.digest) != (root.layout.n_rows, root.layout.index):
            raise Document(self.folder, f"{prefix}/sources.parquet").damaged(
                f"is another index's: {index.n_rows} rows, digest {index.digest[:12]}, where the store has "
                f"{root.layout.n_rows} rows, digest {root.layout.index[:12]}"
            )
        return index

    def _later_index(self) -> SampleIndex | None:
        """The index that the store has by now, if it has another one than when it was opened: of the same rows, and further."""
        later = self._later()
        return None if later is None or later.index_prefix == self.index_prefix else later.index

    def has_index(self) -> bool:
        """Whether the whole index is there, and is the one that the store was made of."""
        try:
            return self.index.is_whole()
        except DamagedObject:
            return False

    @property
    def index_prefix(self) -> str:
        """Where the index lies below the store."""
        return self.root.index or INDEX

    @property
    def levels(self) -> dict[str, Level]:
        return {level.name: level for level in self.spec.levels}

    def level(self, name: str) -> Level:
        """The level called `name`. Raises `UnknownName` (a `KeyError`) with those there are."""
        if name not in self.levels:
            raise UnknownName(f"{self.folder.displayed} has no level {name!r}; it has {', '.join(self.levels)}")
        return self.levels[name]

    # --- reading ------------------------------------------------------------------------------------------------------

    def row(self, key: str) -> int:
        """The row of the sample called `key`. Raises `UnknownName` (a `KeyError`)."""
        return int(self.rows(key)[0])

    def rows(self, selection: Selection) -> np.ndarray:
        """Row numbers, int64 [n], of a slice, row numbers (negative ones count from the end), keys, or a mask over all rows.

        Raises `NoSuchRow` (an `IndexError`) and `UnknownName` (a `KeyError`) for those that don't exist: not when the store was
        opened, and not now.
        """
        try:
            return self._rows(selection)
        except (NoSuchRow, UnknownName):
            later = self._later()
            if later is None or len(later) == len(self):
                raise
            self._take_attributes(later.attributes)
            return self._rows(selection)

    def _rows(self, selection: Selection) -> np.ndarray:
        if isinstance(selection, slice):
            return np.arange(*selection.indices(len(self)), dtype=np.int64)
        items = np.asarray([selection] if isinstance(selection, str | int | np.integer) else selection)
        if not items.size:  # an empty list becomes a float array, which would be refused below
            return np.zeros(0, np.int64)
        # pandas and Arrow give strings as objects.
        if items.dtype.kind == "U" or (items.dtype.kind == "O" and all(isinstance(item, str) for item in items.flat)):
            return self._rows(self.index.rows(items.tolist()))  # a later index has further ones
        if items.dtype == bool and items.shape == (len(self),):
            return np.flatnonzero(items)
        if items.dtype.kind not in "iu" or items.ndim != 1:
            raise TypeError(f"rows are a slice, row numbers, keys, or a mask of {len(self)}; got {selection!r}")
        wrong = items[(items < -len(self)) | (items >= len(self))]
        if len(wrong):
            raise NoSuchRow(f"{self.folder.displayed} has {len(self)} rows, there is no row {wrong[0]}")
        items = items.astype(np.int64)
        return np.where(items < 0, items + len(self), items)

    def read(self, rows: Selection, level: str, *, missing: Literal["raise", "nan"] = "raise") -> np.ndarray:
        """Features of one row [*row_shape], or of several [n, *row_shape], in the order asked.

        `rows`: a row number or key, or what `rows()` takes. float16 or float32 as stored; int8 comes back as float32.
        Rows that failed or aren't written yet raise `MissingRows`, or are NaN with `missing="nan"`. Chunks of many rows are
        fetched concurrently; reading whole blocks (`layout.block_rows`) is fastest.
        """
        values, there = self.read_present(self.rows(rows), level)
        if missing == "raise" and not there.all():
            raise MissingRows(self._why_missing(self.rows(rows)[~there], level))
        return values[0] if isinstance(rows, str | int | np.integer) else values

    def read_present(self, rows: np.ndarray, level: str) -> tuple[np.ndarray, np.ndarray]:
        """Features of row numbers, NaN where there are none, and which are there, bool [n]."""
        layout = self.layout
        reader = self._readers.get((level, layout.n_rows))
        if reader is None:  # kept, since it caches the indexes of shards
            grows = self.status == "writing"
            reader = LevelReader(self.folder, layout, self.level(level), self.root.index_location, grows=grows)
            self._readers[level, layout.n_rows] = reader
        return reader.read(rows)

    def sample(self, key: str | int, points_xy: ArrayLike, level: str) -> np.ndarray:
        """Bilinear features float32 [P, C] at points [P, 2] (x, y) of the original image, whatever its placement.

        Coordinates are continuous, in pixels of the upright original: (0.5, 0.5) is the centre of its first pixel. Points
        that the crop cut away have no features: NaN. Raises `OutsideImage` for points outside the image, and `MissingRows`.
        """
        points = np.asarray(points_xy, np.float64)
        if points.size and (points.shape[-1:] != (2,) or points.ndim > 2):
            raise ValueError(f"points are (x, y) pairs, [P, 2]; got an array of shape {points.shape}")
        points, row = points.reshape(-1, 2), int(self.rows(key)[0])
        pixels, dense = self.pixels(row), self.level(level)
        outside = ~((points >= 0) & (points <= [pixels.width, pixels.height])).all(axis=1)
        if outside.any():
            x, y = points[outside][0].tolist()
            name = str(self.index.keys(row, row + 1)[0])
            size = f"{pixels.width} x {pixels.height} pixels"
            raise OutsideImage(f"{name!r} has {size}, ({x:g}, {y:g}) lies outside; points are (x, y)")
        placed = pixels.to_input(points)
        height, width = self.spec.input_size
        # A hair of tolerance: the image's own border must not fall to rounding.
        cut = ((placed < -1e-6) | (placed > [width + 1e-6, height + 1e-6])).any(axis=1)
        values = bilinear(self.read(row, level), to_cells(dense, placed))
        values[cut] = np.nan
        return values

    def pool(self, key: str | int, regions: Regions | ArrayLike, level: str) -> np.ndarray:
        """A vector for each region of an image, float32 [N, C]: the mean of the level's cells, weighted by the area of each that
        the region covers.

        `regions`: masks bool [N, height, width] or one [height, width]; COCO's run lengths, one or several; boxes [N, 4] (x1, y1,
        x2, y2), cut to the image; or points [N, 2], which are `sample`d. All in pixels of the upright original, whatever its
        placement. Regions that the crop cut away, or that are empty, are NaN. Raises `RegionError` (a `ValueError`) for what is
        no region of the image, `OutsideImage`, and `MissingRows`.
        """
        if is_points(regions):
            return self.sample(key, np.asarray(regions), level)
        row = int(self.rows(key)[0])
        areas = region_areas(regions, self.level(level), self.pixels(row), self.spec.input_size)
        return pooled(self.read(row, level), areas)

    def coords(self, level: str, key: str | int | None = None) -> np.ndarray:
        """Cell centres (x, y), float64 [rows, columns, 2]: in pixels of the original image `key`, or of the model's input.

        Cells of a padded image may lie outside the original. `cells` is the way back.
        """
        centres = cell_centres(self.level(level))
        return centres if key is None else self.pixels(key).to_original(centres)

    def cells(self, points_xy: ArrayLike, level: str, key: str | int | None = None) -> np.ndarray:
        """Where points [..., 2] (x, y) lie among a level's cells: (column, row), float64 [..., 2]; whole numbers are centres.

        Points are in pixels of the original image `key`, or of the model's input.
        """
        points = np.asarray(points_xy, np.float64)
        return to_cells(self.level(level), points if key is None else self.pixels(key).to_input(points))

    def pixels(self, key: str | int) -> PixelMap:
        """How the image was placed in the model's input. Raises `MissingRows`."""
        return self.pixel_maps(key)[0]

    def pixel_maps(self, rows: Selection) -> list[PixelMap]:
        """`pixels` of several rows, in the order asked. Raises `MissingRows`."""
        numbers = self.rows(rows)
        records = self.records(numbers, [field.name for field in fields(PixelMap)]).to_pylist()
        lacking = [row for row, record in zip(numbers, records, strict=True) if record["width"] is None]
        if lacking:
            raise MissingRows(self._why_missing(np.array(lacking)))
        return [PixelMap(**record) for record in records]

    def records(self, rows: Selection, columns: Sequence[str] | None = None) -> pa.Table:
        """Ledger rows (`storage.ledger.SCHEMA`), in the order asked; all null but `row` where a row isn't written yet.

        `columns`: of the ledger, or carried ones (`index.carried`), which the index knows before a row is written. Raises
        `UnknownName` for others.
        """
        wanted, columns = self.rows(rows), list(SCHEMA.names if columns is None else columns)
        own = self._ledger_columns(columns)
        # The merged ledger is written at the end; before, only commit records say what became of a row.
        take = self.ledger.take if self.status == "complete" else self.ledger.take_committed
        try:
            return self._with_carried(take(wanted, own), wanted, columns)
        except (DamagedObject, OSError):
            # Another one by now, since the store has grown?
            if (later := self._later()) is None:
                raise
            return later.records(wanted, columns)

    def _ledger_columns(self, columns: Sequence[str]) -> list[str]:
        """Those of `columns` that the ledger has, and `row`. Raises `UnknownName` for what neither it nor the index carries."""
        further = [name for name in columns if name not in SCHEMA.names]
        if further and (unknown := [name for name in further if name not in self.index.carried]):
            known = ", ".join([*SCHEMA.names, *self.index.carried])
            raise UnknownName(f"{self.folder.displayed} has no column {unknown[0]!r}; it has {known}")
        return [name for name in dict.fromkeys(["row", *columns]) if name in SCHEMA.names]

    def _with_carried(self, table: pa.Table, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """`columns` of `table`, ledger rows of numbers `rows`, and of the index what the ledger hasn't."""
        carried = [name for name in columns if name not in SCHEMA.names]
        more = self.index.take(rows, carried) if carried else table
        return pa.table({name: (more if name in carried else table)[name] for name in columns})

    def valid(self, rows: Selection = slice(None)) -> np.ndarray:
        """Which rows have features, bool [n]: those whose ledger row says `ok`."""
        wanted = self.rows(rows)
        # A complete store says how many rows failed; where none did, the ledger needn't be opened.
        if self.root.counts is not None and not self.root.counts.get("failed"):
            return np.ones(len(wanted), bool)
        statuses = self.records(wanted, ["status"])["status"]
        return pc.fill_null(pc.equal(statuses, "ok"), False).to_numpy(zero_copy_only=False)

    def clipped_lines(self, levels: Sequence[str]) -> Iterator[str]:
        """What the root says of values that float16 couldn't hold, in words, where one of these levels is float16. The ledger
        isn't read for it."""
        known, counts = self.root.clipped, self.root.counts
        if known is not None and counts is not None and float16_levels([self.level(name) for name in levels]):
            for line in clipped_lines(known, counts.get("ok", 0), self.spec.levels):
                yield f"{self.folder.displayed}: {line}"

    def failures(self, columns: Sequence[str] = SCHEMA.names) -> pa.Table:
        """Ledger rows of all that failed so far: `columns` of the ledger, or carried ones. Raises `UnknownName` for others."""
        try:
            tables = list(self.failed_rows(self._ledger_columns(columns)))
        except (DamagedObject, OSError):
            if (later := self._later()) is None:
                raise
            tables = list(later.failed_rows(self._ledger_columns(columns)))
            tables = [table.filter(pa.array(table["row"].to_numpy() < len(self))) for table in tables]
        table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
        return self._with_carried(table, table["row"].to_numpy(), columns)

    def failed_rows(self, columns: Sequence[str] = SCHEMA.names) -> Iterator[pa.Table]:
        """The same, some at a time, of the ledger's columns alone."""
        return self.ledger.failed(None if self.status == "complete" else sorted(self.ledger.listed()), columns)

    def refresh(self) -> bool:
        """Take what has come since the store was opened; whether anything has: further rows, or that it's complete. Rows keep
        their numbers. Raises `StoreReplaced` where another store lies there by now."""
        self.require_unreplaced()
        later = self._later()
        if later is not None:
            self._take_attributes(later.attributes)
        return later is not None

    def _later(self) -> "OpenStore | None":
        """The store as it is now, where it isn't as it was opened, and has its rows still: it has grown, or is complete."""
        attributes = read_attributes(self.folder)
        if attributes is None or attributes == self.attributes:
            return None
        later = OpenStore(self.folder, attributes)
        return later if later.root.came_from(self.root.fingerprint) else None

    def require_unreplaced(self) -> None:
        """For those who keep rows, keys or labels of it: raise `StoreReplaced` where by now there is another store, or none, or
        the same with its samples on other rows. One that has grown has them where they were. One request."""
        now = read_attributes(self.folder)
        if now is None or not decode_known(RootDocument, now).came_from(self.root.fingerprint):
            what = "is gone" if now is None else "is another store now, or has its samples on other rows"
            raise StoreReplaced(
                f"{self.folder.displayed} {what} since it was opened: keys and labels that were read then aren't those of its "
                "rows. Open it again"
            )

    def _why_missing(self, rows: np.ndarray, level: str = "") -> str:
        columns = ["row", "key", "status", "stage", "error", "message"]
        first = self.records(rows[:1], columns).to_pylist()[0]
        many = f"{len(rows)} of the rows have no features; the first is row" if len(rows) > 1 else "no features: row"
        if first["status"] is None:
            reason = "which is not written yet"
        elif first["status"] == "failed":
            reason = f"{first['key']!r}, which failed: {first['stage']}: {first['error']}: {first['message']}"
        elif any(each.level == level and each.failed for each in self.root.added):
            reason = f"{first['key']!r}, which lacks {level} alone: its upsampler gave NaN or infinity when it was added"
        else:
            reason = f"{first['key']!r}, though the ledger says ok: shards are missing"
            reason += "; delete the task's record in ledger/commits and continue the extraction"
        what_to_do = "`valid` tells which have; missing='nan' reads the others as NaN"
        return f"{self.folder.displayed}: {many} {rows[0]}, {reason}. {what_to_do}"
