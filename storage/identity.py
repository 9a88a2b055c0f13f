"""Whether the input still is what a store was made from.

A source is known by its URL. Where its size and its stamp (ETag, or times) are as they were indexed, it is taken for unchanged.
The headers of any other are scanned again, and the bytes of its samples are held against the digests in the ledger: a copy, a
move or a touch costs one reading, and what really changed is known sample by sample. Further sources come after those there are.
"""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.gathered import GatheredRows
from storage.inputs import InputFile
from storage.ledger import image_digest
from storage.left_out import left_out_json
from storage.paths import InputError, StorageOptions
from storage.redaction import query_free
from storage.sample_images import MAX_IMAGE_BYTES, Unread, try_images, try_some
from storage.samples import PART_ROWS, SampleIndex
from storage.scans import DuplicateKeys, refuse_duplicates, taken
from storage.sources import BY_PLACE, RESTORE, Source, describe_change, gone_and_new, is_unchanged, other_input, pair
from storage.tars import SourceScan

logger = logging.getLogger(__name__)

CHECK_ROWS = 64
"""Images that are read at once to compare them with the ledger; a few such windows are under way."""

SAMPLE_IMAGES = 256
"""Images whose bytes stand for those of a whole input."""

MANY_ALIKE = 1000
"""Images of one size whose reading takes long enough to say so."""

LEDGER_ROWS = 2**13
"""Rows whose ledger entries are read at once."""

Scan = Callable[[Sequence[InputFile]], Iterable[SourceScan]]
"""Scans sources, in order."""

ADD = "Further input is added to a store where all that it was made from is given, too. Give that as well, or use a new --out."
"""What to do where input is another one, and not more."""

LedgerRows = Callable[[np.ndarray], pa.Table]
"""`row`, `status` and `digest` of row numbers, in that order; status is null where nothing is committed yet."""


@dataclass(kw_only=True)
class InputState:
    """The input of a store as it is now, beside what the store's index says. Nothing is changed by making one."""

    files: list[InputFile]
    "by source of the index"
    sources: list[Source]
    "as they are now"
    rows: GatheredRows | None = None
    "all rows as they are now; None where those of the index still hold"
    redo: set[int] = field(default_factory=set)
    "rows with features whose image is another one now, or can't be told to be the same"
    repaired: set[int] = field(default_factory=set)
    "failed rows whose image is another one now"
    added: int = 0
    "samples that a source holds now and didn't before; their rows come after all others"
    new_sources: int = 0
    "the last ones of `sources`, which weren't there before"
    grown: int = 0
    "samples of those; their rows come last"
    displaced: bool = False
    "samples took rows of others, which are gone"
    reordered: bool = False
    "samples took rows of others, or new ones: rows aren't in the order of the sources any more"
    changes: list[str] = field(default_factory=list)
    "what differs, in words, a source each"

    @property
    def urls(self) -> tuple[str, ...]:
        """The sources' URLs with credentials, as this run reads them."""
        return tuple(file.url for file in self.files)

    @property
    def stands(self) -> bool:
        """No image differs."""
        return not (self.redo or self.repaired or self.added) and self.rows is None

    @property
    def grows(self) -> bool:
        """Rows that there are keep their samples, and those with features their images."""
        return not (self.redo or self.displaced)


def input_state(
    index: SampleIndex,
    files: Sequence[InputFile],
    scan: Scan,
    ledger: LedgerRows,
    options: StorageOptions | None = None,
    *,
    limit: int | None = None,
    rescan: bool = False,
    gone_is_unchanged: bool = False,
) -> InputState:
    """Hold `files` against the index of a store. `limit`: samples that are taken at most. `rescan`: the headers of all sources
    are read, not of changed ones only. `gone_is_unchanged`: at the end of a run, which doesn't need its input any more, nor
    what is new.

    Raises `InputError` where sources are gone, or samples with features aren't in the input any more, and `DuplicateKeys` for new
    sources that hold a key once more.
    """
    paired, new = pair(index.sources, files)
    if gone_is_unchanged:
        paired = [
            file or InputFile(url=source.url, size=source.size, etag=source.etag)
            for source, file in zip(index.sources, paired, strict=True)
        ]
        new = []
    if index.order is None:  # an earlier version, which took no other images
        new = [file for file in new if file.is_common]
    moved = _moved(index, paired, new, scan)
    if index.is_cut:  # what lies behind the limit was never looked at
        new = []
    if gone_and_new(index.sources, paired):
        raise other_input(index, gone_and_new(index.sources, paired, new), ADD if new else RESTORE)
    now = [file for file in paired if file is not None]
    doubtful = [i for i, file in enumerate(now) if not is_unchanged(index.sources[i], file)]
    sources = [
        replace(source, url=query_free(file.url), size=file.size, etag=file.etag)
        for source, file in zip(index.sources, now, strict=True)
    ]
    if new:
        _require_same_places(index, now)
    state = InputState(files=now, sources=sources)
    wanted = list(range(len(now))) if rescan else doubtful
    scans = {i: moved[i] for i in wanted if i in moved}
    others = [i for i in wanted if i not in moved]
    scans |= dict(zip(others, scan([now[i] for i in others]), strict=True)) if others else {}
    if doubtful:
        displayed = "; ".join(describe_change(index.sources[i], now[i]) or index.sources[i].url for i in doubtful[:3])
        logger.warning(
            "%d sources may have changed since they were indexed; their images are read again: %s", len(doubtful), displayed
        )
    if scans:
        _Comparison(index, state, scans, set(doubtful), ledger, options, limit).run()
    if new:
        _grow(index, state, zip(new, scan(new), strict=True), limit)
    return state


def _require_same_places(index: SampleIndex, files: Sequence[InputFile]) -> None:
    """Raise `InputError` where keys would begin with other places, by further files, than those of the rows there are do."""
    if BY_PLACE not in index.rules:
        return
    first = index.read(0, 1).to_pylist()[0]
    place = files[first["source"]].place
    if first["key"] != place and not first["key"].startswith(f"{place}/"):
        raise InputError(
            f"{index.displayed} was indexed with {BY_PLACE}, by which keys begin with a file's place below the folder that all "
            f"files share. With the new ones that is another folder, and {first['key']!r} would begin with {place!r}. Put new "
            "files below the folder that the others share, or use a new --out"
        )


def _grow(index: SampleIndex, state: InputState, scans: Iterable[tuple[InputFile, SourceScan]], limit: int | None) -> None:
    """Take sources that are new, up to `limit` rows in all: their rows come after all others."""
    room = None if limit is None else limit - index.n_rows - state.added
    if room is not None and room <= 0:
        return
    together, columns = GatheredRows(), index.columns
    for part in _whole(index) if state.rows is None else state.rows.chunks():
        together.append(part.select(columns))
    for file, scanned in scans:
        rows, source = taken(file, scanned, len(state.sources))
        rows = rows.slice(0, None if room is None else room - state.grown).select(columns)
        together.append(rows)
        state.files.append(file)
        state.sources.append(source)
        state.new_sources += 1
        state.grown += len(rows)
        state.changes.append(f"{source.url} is new")
        if room is not None and state.grown >= room:
            break
    state.rows = together
    try:
        refuse_duplicates(together, state.sources)
    except DuplicateKeys as error:
        raise DuplicateKeys(
            f"{index.displayed} can't be added to, since it keeps its keys: {error} For that, use a new --out"
        ) from None


def _whole(index: SampleIndex) -> Iterator[pa.Table]:
    """All rows of an index, a part at a time."""
    for first in range(0, index.n_rows, PART_ROWS):
        yield index.read(first, min(first + PART_ROWS, index.n_rows))


def _moved(index: SampleIndex, paired: list[InputFile | None], new: list[InputFile], scan: Scan) -> dict[int, SourceScan]:
    """Pair sources that are gone with new files whose samples are the same; returns their scans, takes them from `new`."""
    gone: dict[str, list[int]] = defaultdict(list)
    for i, each in enumerate(paired):
        if each is None:
            gone[index.sources[i].digest].append(i)
    found: dict[int, SourceScan] = {}
    for file, scanned in zip(list(new), scan(new), strict=True) if gone and new else ():
        if alike := gone.get(scanned.digest):  # several where they are empty
            i = alike.pop(0)
            paired[i], found[i] = file, scanned
            new.remove(file)
    return found


class _Comparison:
    """Rows of rescanned sources beside those of the index and the ledger; the findings go into an `InputState`."""

    def __init__(
        self,
        index: SampleIndex,
        state: InputState,
        scans: Mapping[int, SourceScan],
        doubtful: set[int],
        ledger: LedgerRows,
        options: StorageOptions | None,
        limit: int | None,
    ):
        self.index, self.state, self.scans, self.doubtful = index, state, scans, doubtful
        self.ledger, self.options = ledger, options
        self.limit = index.n_rows if index.is_cut else limit
        self._added: list[pa.Table] = []
        self._differing: dict[int, list[str]] = defaultdict(list)
        "keys by source"
        self._without_digest: set[int] = set()

    def run(self) -> None:
        old = self.index.rows_of(list(self.scans))
        old = old.take(pc.sort_indices(old, [("source", "ascending"), ("row", "ascending")]))
        bounds = np.searchsorted(old["source"].to_numpy(), [*sorted(self.scans), len(self.index.sources)])
        now: list[pa.Table] = []
        restructured = False
        for source, first, last in zip(sorted(self.scans), bounds[:-1], bounds[1:], strict=True):
            before, scanned = old.slice(first, last - first), self.scans[source]
            same = scanned.digest == self.index.sources[source].digest
            restructured |= not same
            now.append(before if same else self._placed(source, before, scanned))
            self.state.sources[source] = replace(
                self.state.sources[source],
                digest=scanned.digest,
                problems="; ".join(scanned.problems),
                left_out=left_out_json(scanned.left_out),
            )
        found = pa.concat_tables(rows.select(old.column_names) for rows in now)
        self._judge(old, found)
        if restructured:
            self._rebuild(found)

    # --- which sample belongs to which row ----------------------------------------------------------------------------

    def _placed(self, source: int, before: pa.Table, scanned: SourceScan) -> pa.Table:
        """The samples of a source on the rows that they had. One that wasn't there takes the row of a lost one, or a new row."""
        found = scanned.rows.set_column(1, "source", pa.array([source] * len(scanned.rows), pa.int32()))
        keys = {key: i for i, key in enumerate(found["key"].to_pylist())}
        place: list[int | None] = [keys.pop(key, None) for key in before["key"].to_pylist()]
        if self.index.is_cut and source == len(self.index.sources) - 1:
            keys = {}  # beyond the limit
        spare = iter(list(keys.values()))
        self.state.reordered |= bool(keys)
        self.state.displaced |= None in place
        place = [next(spare, None) if at is None else at for at in place]
        lost = [key for key, at in zip(before["key"].to_pylist(), place, strict=True) if at is None]
        url = self.index.sources[source].url
        if lost:
            line = f"{url}: {len(lost)} samples are gone from it, for example {lost[0]!r}"
            raise other_input(self.index, [line])
        self._add(url, found.take(pa.array(list(spare), pa.int64())))
        return found.take(pa.array(place, pa.int64())).append_column("row", before["row"])

    def _add(self, url: str, rows: pa.Table) -> None:
        """Take samples that a source didn't hold before, up to the limit."""
        room = len(rows) if self.limit is None else max(0, self.limit - self.index.n_rows - self.state.added)
        if len(rows) > room:
            logger.warning("%s: %d samples more than before are left out (--limit)", url, len(rows) - room)
        rows = rows.slice(0, room)
        if not len(rows):
            return
        self._added.append(rows)
        self.state.added += len(rows)
        first = rows["key"][0].as_py()
        self.state.changes.append(f"{url}: {len(rows)} samples more than when it was indexed, for example {first!r}")

    def _rebuild(self, found: pa.Table) -> None:
        """The whole table, every sample on its row."""
        kept = self.index.rows_of([i for i in range(len(self.index.sources)) if i not in self.scans])
        table = pa.concat_tables([kept, found.select(kept.column_names)])
        table = table.take(pc.sort_indices(table["row"])).drop_columns("row")
        table = pa.concat_tables([table, *(rows.select(table.column_names) for rows in self._added)])
        self.state.rows = GatheredRows.of(table)
        refuse_duplicates(self.state.rows, self.state.sources)

    # --- whether a row's image is the one that it was -----------------------------------------------------------------

    def _judge(self, before: pa.Table, now: pa.Table) -> None:
        """Find the rows whose image isn't what it was; `before` and `now` hold the same rows in the same order."""
        order = pc.sort_indices(before["row"])  # commit records are of neighbouring rows
        before, now = before.take(order), now.take(order)
        for start in range(0, len(before), LEDGER_ROWS):
            self._judge_some(before.slice(start, LEDGER_ROWS), now.slice(start, LEDGER_ROWS))
        for source, keys in self._differing.items():
            self.state.changes.append(self._words(source, keys))

    def _judge_some(self, before: pa.Table, now: pa.Table) -> None:
        ledger = self.ledger(before["row"].to_numpy())
        statuses, digests = ledger["status"].to_pylist(), ledger["digest"].to_pylist()
        old, new = before.to_pylist(), now.to_pylist()
        # What isn't committed has nothing of another image.
        asked = [i for i, status in enumerate(statuses) if status and (old[i]["source"] in self.doubtful or old[i] != new[i])]
        alike = {i for i in asked if all(old[i][name] == new[i][name] for name in ("key", "size", "problem"))}
        again = [i for i in asked if i in alike and digests[i]]
        there = dict(zip(again, self._digests(now, again), strict=True))
        for i in asked:
            was, failed = old[i], statuses[i] == "failed"
            if not failed and not digests[i]:
                self._without_digest.add(was["source"])
            # A failed row without a digest is of an image that wasn't read.
            same = there[i] == digests[i] if i in there else failed and i in alike and not digests[i]
            if not same:
                (self.state.repaired if failed else self.state.redo).add(was["row"])
                self._differing[was["source"]].append(was["key"])

    def _digests(self, rows: pa.Table, positions: Sequence[int]) -> Iterator[str]:
        """Of the images of some rows as they are now."""
        # Of any size: they have digests, so that they were read once.
        return _digests(rows.take(pa.array(positions, pa.int64())), self.state.urls, self.options, max_bytes=2**63)

    def _words(self, source: int, keys: Sequence[str]) -> str:
        was, now = self.index.sources[source], self.state.files[source]
        what = describe_change(was, now) or f"{was.url}: changed since it was indexed"
        if source in self._without_digest:
            what += "; an earlier version extracted it and kept no digests to compare with"
        return f"{what}: {len(keys)} of its images differ, for example {keys[0]!r}"


def _digests(
    rows: pa.Table, urls: Sequence[str], options: StorageOptions | None, max_bytes: int = MAX_IMAGE_BYTES
) -> Iterator[str]:
    """Of the images of index rows, in order; a few windows are read at once."""

    def digests(window: pa.Table) -> list[str]:
        found: dict[int, str] = {}
        for some in try_some(window, urls, options, max_bytes=max_bytes):
            for i, blob in some.items():
                if isinstance(blob, Unread):  # it can't be told to be the same
                    logger.warning("an image can't be read any more: %s", blob.message)
                found[i] = image_digest(blob if isinstance(blob, bytes) else b"")
        return [found[i] for i in range(len(window))]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(digests, (rows.slice(i, CHECK_ROWS) for i in range(0, len(rows), CHECK_ROWS))):
            yield from found


def same_images(
    index: SampleIndex,
    urls: Sequence[str],
    n_rows: int,
    others: SampleIndex,
    other_urls: Sequence[str],
    other_rows: Sequence[int],
    options: StorageOptions | None = None,
) -> dict[int, int]:
    """Those of the few `other_rows` whose images have the bytes of one of the first `n_rows` of an index, and which that is.

    Images are read of equal sizes alone, so that millions cost little; rows without an image, or of an empty file, have none.
    """
    few = _with_images(others.take(np.array(other_rows, np.int64)).append_column("row", pa.array(other_rows, pa.int64())))
    alike = _rows_of_size(index, n_rows, np.unique(few["size"].to_numpy()))
    few = few.filter(pc.is_in(few["size"], pc.unique(alike["size"])))
    if len(alike) > MANY_ALIKE:
        logger.info("reading %d images that are as large as held-out ones, to see whether they are the same", len(alike))
    first: dict[str, int] = {}
    for row, digest in zip(alike["row"].to_pylist(), _digests(alike, urls, options), strict=True):
        first.setdefault(digest, row)
    found = zip(few["row"].to_pylist(), _digests(few, other_urls, options), strict=True)
    return {row: first[digest] for row, digest in found if digest in first and digest != image_digest(b"")}


def _rows_of_size(index: SampleIndex, n_rows: int, sizes: np.ndarray) -> pa.Table:
    """Those of the first `n_rows` whose images have one of the sizes in bytes, with their numbers in the column `row`."""
    starts = range(0, n_rows, PART_ROWS)
    found = [first + np.flatnonzero(np.isin(index.sizes(first, min(first + PART_ROWS, n_rows)), sizes)) for first in starts]
    rows = np.concatenate([np.zeros(0, np.int64), *found])
    return _with_images(index.take(rows).append_column("row", pa.array(rows)))


def _with_images(rows: pa.Table) -> pa.Table:
    return rows.filter(pc.and_(pc.is_null(rows["problem"]), pc.greater(rows["size"], 0)))


def sample_images(index: SampleIndex, urls: Sequence[str], options: StorageOptions | None = None) -> dict[str, bytes]:
    """Up to `SAMPLE_IMAGES` images, spread evenly, by key: they tell other images under the same names and sizes where there is
    no ledger to tell it of each."""
    rows = np.unique(np.linspace(0, index.n_rows - 1, min(SAMPLE_IMAGES, index.n_rows)).astype(np.int64))
    table = index.take(rows)
    blobs = [blob if isinstance(blob, bytes) else b"" for blob in try_images(table, urls, options)]
    return dict(zip(table["key"].to_pylist(), blobs, strict=True))


def content_of(images: Mapping[str, bytes]) -> str:
    """sha256 over the digests of some images."""
    return hashlib.sha256("".join(map(image_digest, images.values())).encode()).hexdigest()


def order_digest(rows: GatheredRows) -> str:
    """sha256 of which sample is on which row, for an index whose rows aren't in the order of its sources any more."""
    digest = hashlib.sha256()
    for batch in (batch for chunk in rows.chunks() for batch in chunk.select(["source", "key"]).to_batches()):
        for source, key in zip(batch["source"].to_pylist(), batch["key"].to_pylist(), strict=True):
            digest.update(f"{source} {key}\n".encode())
    return digest.hexdigest()
