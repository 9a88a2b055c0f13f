"""A store's root document, `zarr.json`: the one object whose existence is the store's, with the fingerprint of what it holds."""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from storage.commits import Packs
from storage.documents import Document, JsonObject, JsonValue, MissingObject, as_object, decode, decode_known, parse_json
from storage.paths import Folder, StorageError
from storage.samples import INDEX, SampleIndex
from storage.shards import IndexLocation
from storage.sources import sources_digest
from storage.spec import FeatureSpec, Layout, fingerprint_of
from storage.totals import Clipped

ROOT = "zarr.json"

FORMAT = 4
"""4: shards have their index at the end; a complete store has its samples' keys and validity as Zarr arrays, too."""

MARKED = 3
"""3: every commit record has the store's fingerprint; ledger rows have the digest of the image's bytes. Such a store stays 3."""

PACKED = 5
"""5: as 4, and commit records of whole stretches of tasks lie in packs. The finish of a store that has such makes it 5."""

READABLE = (2, MARKED, FORMAT, PACKED)
"""2: keys in order beside the index, counts among the attributes. Whoever continues such a store makes it 3."""


class StoreReplaced(StorageError):
    """The store that is being written is gone, or another one lies in its place."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What a store was before it grew: its first `n_rows` rows are of the same samples still."""

    n_rows: int
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class AddedLevel:
    """What a store says of a level that was added when it was complete."""

    level: str
    asked: str
    "as it was asked for, without credentials"
    made_of: str
    "in words"
    fingerprint: str
    "of the store when it had it, which the level's own commit records have"
    failed: int = 0
    "rows that have the other levels, and not this one"


@dataclass(frozen=True, kw_only=True)
class RootDocument:
    """What every store's `raylift` attributes hold, as they must be. Stores may hold more, which is kept and not looked at."""

    format: int
    status: Literal["writing", "complete"]
    fingerprint: str
    spec: FeatureSpec
    layout: Layout
    counts: Mapping[str, int] | None = None
    clipped: Clipped | None = None
    "as `conversions`, of a complete store; None also where an earlier version completed it"
    conversions: Mapping[str, int] | None = None
    "rows by what was done to their images beyond decoding"
    upgraded_from: int | None = None
    index: str | None = None
    "the index's folder, where it isn't the first one: input was repaired"
    origin: str | None = None
    "the fingerprint that the store began with, and that its commit records have, where input was repaired or came since"
    generations: tuple[Generation, ...] = ()
    "what it was each time that it grew, the first one first; empty again where other samples took rows since"
    input: str | None = None
    "`sources_digest` of the input as the run reads it that writes the store; complete stores have none"
    versions: Mapping[str, str] | None = None
    config: JsonObject | None = None
    notes: tuple[str, ...] | None = None
    added: tuple[AddedLevel, ...] = ()
    "levels that came later, in the order of `spec.levels`, whose last ones they are"

    @property
    def index_location(self) -> IndexLocation:
        """Where shards have their index, which stays where it was begun: shards of both kinds can't be of one array."""
        return "end" if self.format >= FORMAT else "start"

    @property
    def packs(self) -> Packs:
        """Whether commit records may lie in packs."""
        if self.format < FORMAT:
            return "none"
        return "all" if self.status == "complete" and self.format >= PACKED else "some"

    def came_from(self, fingerprint: str) -> bool:
        """Whether this is the store of that fingerprint, or it has grown from it: then the rows of that one are of the same
        samples."""
        return fingerprint in (self.fingerprint, *(each.fingerprint for each in self.generations))

    @property
    def has_sample_arrays(self) -> bool:
        """Whether the finish writes `storage.sample_arrays`."""
        return self.format >= FORMAT


def read_attributes(folder: Folder) -> dict[str, JsonValue] | None:
    """The `raylift` attributes of the store in `folder`; None if there is no store.

    Raises `StorageError` if something else is there, or a format that this version doesn't read, and `DamagedObject` where
    the document is damaged or was edited: the fingerprint is computed anew from spec and layout.
    """
    found = _read(folder)
    return None if found is None else found[0]


def _read(folder: Folder) -> tuple[dict[str, JsonValue], RootDocument] | None:
    """As `read_attributes`, which are typed beside."""
    document = Document(folder, ROOT, "restore it from a copy, or use a new --out")
    try:
        data = document.bytes()
    except MissingObject:
        return None
    with document.parsing():
        attributes = as_object(parse_json(data, nan=False).get("attributes", {}), "attributes")
    if attributes.get("raylift") is None:
        raise StorageError(f"{folder.displayed} is a Zarr store, but not one of Raylift's; choose another --out")
    with document.parsing():
        own = as_object(attributes["raylift"], "raylift")
        number = decode(int, own["format"], "format")
    if number not in READABLE:
        advice = "update Raylift" if number > PACKED else "extract it again, with a new --out"
        readable = f"{', '.join(map(str, READABLE[:-1]))} and {READABLE[-1]}"
        raise StorageError(f"{document.displayed} has format {number}, this version reads {readable}; {advice}")
    with document.parsing():
        root, expected = _decoded(data)
    if root.fingerprint != expected:
        raise document.damaged("was edited or damaged: its fingerprint doesn't match its spec and layout")
    return own, root


@functools.lru_cache(maxsize=16)  # who writes a store looks at its root before each object, and finds the same bytes
def _decoded(data: bytes) -> tuple[RootDocument, str]:
    """A root document, and the fingerprint of its spec and layout. Raises what `decode` and `_check` do."""
    own = as_object(as_object(parse_json(data, nan=False)["attributes"])["raylift"])
    root = decode_known(RootDocument, own)
    _check(root)
    # Of the JSON as it is, not of what it was decoded to: fields that later versions add must not change it.
    return root, fingerprint_of(as_object(own["spec"]), as_object(own["layout"]))


def _check(found: RootDocument) -> None:
    """Raise `ValueError` where the numbers don't go together."""
    if found.index is not None and not re.fullmatch(r"index(/[0-9a-f]{12})?", found.index):
        raise ValueError(f"{found.index!r} is no place of an index")
    if not found.spec.levels:
        raise ValueError("a store without levels holds nothing")
    sizes = [1, *(each.n_rows for each in found.generations), found.layout.n_rows]
    if sizes != sorted(sizes):
        raise ValueError(f"a store of {found.layout.n_rows} rows can't have had {', '.join(map(str, sizes[1:-1]))}")
    names, added = [level.name for level in found.spec.levels], [each.level for each in found.added]
    if added != names[max(1, len(names) - len(added)) :]:
        raise ValueError(f"{' '.join(added)} can't be those of the levels {' '.join(names)} that were added")
    if lacking := [level.made_from for level in found.spec.levels if level.made_from not in ("", *names)]:
        raise ValueError(f"a level is made from {lacking[0]}, which isn't among {' '.join(names)}")
    counts = found.counts or {}
    if set(counts) - {"ok", "failed"} or any(count < 0 for count in counts.values()):
        raise ValueError(f"counts can't be {dict(counts)}")
    if found.clipped is not None and not 0 <= found.clipped.rows <= found.clipped.values:
        raise ValueError(f"clipped can't be {found.clipped}")
    if found.status == "complete" and sum(counts.values()) != found.layout.n_rows:
        raise ValueError(f"counts {dict(counts)} don't add up to {found.layout.n_rows} rows")


def require_same_store(folder: Folder, fingerprint: str, input_digest: str | None = None) -> dict[str, JsonValue]:
    """The attributes of the store of this fingerprint, read again. Raises `StoreReplaced` where it isn't there any more, or
    where another run goes on with it from files that aren't those of `input_digest`.

    Files are the same where their places and stamps are. Two drivers that read different copies of the input would
    otherwise both commit tasks, and the store would hold a mixture.
    """
    found = _read(folder)
    if found is None:
        raise StoreReplaced(f"{folder.displayed} is gone: it was removed while this run wrote it; nothing more is written")
    attributes, root = found
    if root.fingerprint != fingerprint:
        if root.came_from(fingerprint):
            raise StoreReplaced(
                f"{folder.displayed} has grown: another run adds further input to it; this run writes nothing more"
            )
        raise StoreReplaced(
            f"{folder.displayed} is another store now: it was removed and begun anew with other settings while this run wrote "
            "it; nothing more is written"
        )
    if input_digest is not None and _input_of(folder, root) not in (None, input_digest):
        raise StoreReplaced(
            f"{folder.displayed} is continued by another run, with input that lies elsewhere, or was changed; this run writes "
            "nothing more"
        )
    return attributes


def _input_of(folder: Folder, root: RootDocument) -> str | None:
    """`sources_digest` of what a store is, or was, made from; None where an earlier version is writing it."""
    if root.status == "writing":
        return root.input
    return sources_digest(SampleIndex(folder, root.index or INDEX).sources)
