"""A store copied to another place, resumably: what is there already isn't sent again, and the root document comes last.

A place is an fsspec URL (`FolderPlace`) or whatever else holds objects by name and says what it holds. Until the root is there,
no reader takes a part of a store for one; a mark says whose part it is.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from storage.documents import as_object, parse_json
from storage.paths import Folder, Stat, StorageError
from storage.root import ROOT, read_attributes
from storage.store import FeatureStore

MARK = ".raylift-push"
"""Lies where a copy isn't whole yet, and holds the fingerprint that its store began with."""

CARD = "README.md"

_FOLLOWS = ("index/", "ledger/")
"""What of a copy is removed where the store has it no more: records that were packed or revoked, documents of sample arrays. A
record beside a pack would count before it, in a store that is being written."""

_WELCOME = {CARD, ".gitattributes", "LICENSE", "LICENSE.md"}
"""What may lie in a place before anything is copied there: a hub's new repository has some."""

_BATCH_BYTES = 2**28
"""Of objects that are held in memory at once; a single larger one is held all the same."""

_BATCH_OBJECTS = 256

_THREADS = 16


class Place(Protocol):
    """Where a store is copied to."""

    @property
    def displayed(self) -> str:
        """As it may be printed."""

    def listed(self) -> Mapping[str, Stat]:
        """All objects there, by name."""

    def has(self, name: str) -> bool:
        """Whether there is an object of that name."""

    def read(self, name: str) -> bytes:
        """An object that is there."""

    def holds(self, name: str, data: bytes) -> bool:
        """Whether an object of `listed`, of that size, is these bytes."""

    def send(self, objects: Sequence[tuple[str, bytes]]) -> None:
        """Put whole objects; they may be there for readers only after `settle`."""

    def settle(self) -> None:
        """All that was sent is there for readers."""

    def remove(self, names: Sequence[str]) -> None:
        """Delete objects."""


class FolderPlace:
    """A folder at an fsspec URL. Content is compared by the MD5 that the storage lists (S3, Google); where it lists none, by
    reading."""

    def __init__(self, folder: Folder):
        self.folder = folder
        self._there: dict[str, Stat] = {}

    @property
    def displayed(self) -> str:
        return self.folder.displayed

    def listed(self) -> Mapping[str, Stat]:
        self._there = self.folder.below("")
        return self._there

    def has(self, name: str) -> bool:
        return self.folder.exists(name)

    def read(self, name: str) -> bytes:
        return self.folder.read(name)

    def holds(self, name: str, data: bytes) -> bool:
        md5 = self._there[name].md5
        return hashlib.md5(data, usedforsecurity=False).hexdigest() == md5 if md5 else self.folder.read(name) == data

    def send(self, objects: Sequence[tuple[str, bytes]]) -> None:
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda each: self.folder.write(*each), objects))

    def settle(self) -> None:
        self.folder.remove_partial()

    def remove(self, names: Sequence[str]) -> None:
        self.folder.remove_many(names)


@dataclass(frozen=True, kw_only=True)
class Copied:
    """What became of a part of a store."""

    part: str
    "a level's name, or what else it is"
    sent: int = 0
    sent_bytes: int = 0
    there: int = 0
    "objects that were there already"

    def __add__(self, other: "Copied") -> "Copied":
        return Copied(
            part=self.part,
            sent=self.sent + other.sent,
            sent_bytes=self.sent_bytes + other.sent_bytes,
            there=self.there + other.there,
        )


def copy_store(
    store: FeatureStore, place: Place, *, runs: bool = False, beside: Mapping[str, bytes] | None = None
) -> Iterator[Copied]:
    """Copy what is committed and described to `place`, part by part; the root document last.

    `runs`: also the notes on its runs, which name hosts and paths. `beside`: objects that the store itself hasn't, as a card.
    The copy of a store that is being written can be continued as the store can. Raises `StorageError` where another store, or
    something else, is at the place; where the store lacks objects; and, before the root is copied, where it changed meanwhile.
    """
    there = place.listed()
    _require_room(store, place, there)
    copy = _Copy(store.folder, place, there, store.origin)
    # First, so that the shards of every commit record of a store that is being written are listed after it.
    ledger = store.folder.below("ledger")
    documents: dict[str, Stat] = {}
    stale = {name for name in there if name.startswith(_FOLLOWS)} - ledger.keys()
    for name in (*store.levels, "index"):
        found = store.folder.below(name)
        stale -= found.keys()
        if name in store.levels and store.status == "complete":
            _require_whole(store, name, found)
        documents |= {each: stat for each, stat in found.items() if each.endswith(f"/{ROOT}")}
        yield copy.part(name, {each: stat for each, stat in found.items() if each not in documents})
    documents |= {each: stat for each, stat in ledger.items() if each.endswith(f"/{ROOT}")}
    documents |= {f"runs/{name}": Stat(size) for name, size in store.folder.sizes("runs").items() if name == ROOT}
    yield copy.part("ledger", {each: stat for each, stat in ledger.items() if each not in documents})
    copy.remove(sorted(stale))
    yield copy.beside("card and pictures", beside or {})
    for name in ("views", "search", *(["runs"] if runs else [])):
        if found := {each: stat for each, stat in store.folder.below(name).items() if not _is_hidden(each)}:
            yield copy.part(name, found, counts=False)
    root = {name: stat for name, stat in _top(store.folder).items() if name in (ROOT, CARD)}
    if CARD in root:
        yield copy.part("card", {CARD: root.pop(CARD)}, counts=False)
    yield copy.part("documents", documents)
    if read_attributes(store.folder) != store.attributes:
        raise StorageError(
            f"{store.folder.displayed} changed while it was copied to {place.displayed}; the copy has no root document, and the "
            "same command makes it whole"
        )
    yield copy.part("root document", root)
    copy.finish()


def left_out_names(store: FeatureStore, *, runs: bool = False) -> list[str]:
    """Files and folders in the store's folder that are no part of it, and stay where they are; and its notes on runs."""
    parts = {*store.levels, "index", "ledger", "views", "search", ROOT, CARD, *(["runs"] if runs else [])}
    folders = [f"{name}/" for name in store.folder.folders("") if name not in parts]
    return sorted([*folders, *(name for name in store.folder.sizes("") if name not in parts)])


class _Copy:
    """One copying: what of a part has to be sent, and sending it."""

    def __init__(self, folder: Folder, place: Place, there: Mapping[str, Stat], origin: str):
        self._folder, self._place, self._there, self._origin = folder, place, there, origin
        self._has_mark, self._has_root = MARK in there, ROOT in there

    def part(self, name: str, objects: Mapping[str, Stat], *, counts: bool = True) -> Copied:
        """Send what isn't there. `counts`: the store isn't whole without it."""
        done = Copied(part=name)
        for names in _batches(objects):
            asked = [each for each in names if not self._listed_alike(each, objects[each])]
            try:
                data = list(zip(asked, self._folder.read_many(asked, _THREADS), strict=True))
            except FileNotFoundError as error:  # a run has finished the store since, and packed the records
                raise self._changed(str(error)) from None
            # A pack that is written anew may have records of shards that weren't there when shards were listed.
            if other := next((each for each, content in data if len(content) != objects[each].size), None):
                raise self._changed(f"{other} was written anew")
            done = self._sent(done, data, len(names) - len(asked), counts=counts)
        self._place.settle()
        return done

    def _changed(self, how: str) -> StorageError:
        return StorageError(f"{self._folder.displayed} changed while it was copied: {how}; the same command makes the copy whole")

    def remove(self, names: Sequence[str]) -> None:
        """Take away what the store has no more, and the root of the earlier copy that had it before that."""
        if names:
            self._begin()
            self._place.remove(names)

    def beside(self, name: str, objects: Mapping[str, bytes]) -> Copied:
        """The same for objects that are no part of the store."""
        done = self._sent(Copied(part=name), list(objects.items()), 0, counts=False)
        self._place.settle()
        return done

    def finish(self) -> None:
        """Take the mark away."""
        if self._has_mark:
            self._place.remove([MARK])

    def _listed_alike(self, name: str, here: Stat) -> bool:
        """Whether two listings say that an object is there with these bytes."""
        there = self._there.get(name)
        return there is not None and bool(here.md5) and (there.size, there.md5) == (here.size, here.md5)

    def _sent(self, done: Copied, objects: Sequence[tuple[str, bytes]], alike: int, *, counts: bool) -> Copied:
        with ThreadPoolExecutor(_THREADS) as pool:
            held = list(pool.map(self._is_there, objects))
        missing = [each for each, is_there in zip(objects, held, strict=True) if not is_there]
        if missing:
            if counts:
                self._begin()
            self._place.send(missing)
        size = sum(len(data) for _, data in missing)
        there = alike + len(objects) - len(missing)
        return done + Copied(part=done.part, sent=len(missing), sent_bytes=size, there=there)

    def _is_there(self, each: tuple[str, bytes]) -> bool:
        name, data = each
        there = self._there.get(name)
        return there is not None and there.size == len(data) and self._place.holds(name, data)

    def _begin(self) -> None:
        """Before a first object is sent: say whose it is, and take the root of an earlier copy away, which says of what it has
        that it is whole."""
        if not self._has_mark:
            self._place.send([(MARK, self._origin.encode())])
            self._place.settle()
            self._has_mark = True
        if self._has_root:
            self._place.remove([ROOT])
            self._there = {name: stat for name, stat in self._there.items() if name != ROOT}
            self._has_root = False


def _batches(objects: Mapping[str, Stat]) -> Iterator[list[str]]:
    """Names in order, as many as are held at once."""
    batch: list[str] = []
    size = 0
    for name in sorted(objects):
        if batch and (len(batch) == _BATCH_OBJECTS or size + objects[name].size > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += objects[name].size
    if batch:
        yield batch


def _top(folder: Folder) -> dict[str, Stat]:
    """The objects directly inside."""
    return {name: Stat(size=size) for name, size in folder.sizes("").items()}


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _require_whole(store: FeatureStore, level: str, found: Iterable[str]) -> None:
    """Raise `StorageError` where a complete store lacks objects of a level."""
    layout, wanted = store.layout, store.levels[level]
    names = itertools.chain.from_iterable(layout.shard_names(wanted, block) for block in range(layout.n_blocks))
    if lacking := sorted(set(names).difference(found)):
        raise StorageError(
            f"{store.folder.displayed} lacks {len(lacking):,} objects of {level}, the first is {lacking[0]}; restore them, or "
            "extract their tasks again: delete their records in ledger/commits and run the extraction"
        )


def _require_room(store: FeatureStore, place: Place, there: Mapping[str, Stat]) -> None:
    """Raise `StorageError` unless the place is empty or holds a copy of this store, whole or not."""
    if ROOT in there:
        found = _origin_of(place.read(ROOT))
    elif MARK in there:
        found = place.read(MARK).decode(errors="replace")
    elif "" in there:
        raise StorageError(f"{place.displayed} is a file; give the copy a folder of its own")
    elif others := sorted(set(there) - _WELCOME):
        raise StorageError(
            f"{place.displayed} holds other files ({', '.join(others[:3])}{', ...' if len(others) > 3 else ''}); give the copy a "
            "folder of its own"
        )
    else:
        return
    if found != store.origin:
        raise StorageError(
            f"{place.displayed} holds another store, or a part of one (fingerprint {found[:12] or 'none'}, and not "
            f"{store.origin[:12]}); remove it, or choose another place"
        )


def _origin_of(root: bytes) -> str:
    """The fingerprint that a store began with, of its root document; nothing where it's no store's."""
    try:
        attributes = as_object(as_object(as_object(parse_json(root), "root")["attributes"], "attributes")["raylift"], "raylift")
        return str(attributes.get("origin") or attributes["fingerprint"])
    except (ValueError, KeyError):
        return ""
