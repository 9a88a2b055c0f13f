"""A level that is added to a finished store, as its tasks see that store.

Readers see the level once it is whole: until then the root document is as it was. Each task of the level has a commit record of
its own below `ledger/added/<level>/`, beside those of the store, which stay as they are.
"""

import json
from collections.abc import Collection
from dataclasses import replace

from storage.differences import differences
from storage.documents import Document, JsonObject, as_object, decode
from storage.ledger import Ledger, commits_of
from storage.paths import Folder, StorageError
from storage.root import AddedLevel
from storage.spec import Level, fingerprint
from storage.store import FeatureStore

_BEGUN = "the command that began it continues it; to give it up, remove this object and begin anew"


class BegunOtherwise(StorageError):
    """Another level of the same name is being added to the store."""


class LevelAddition(FeatureStore):
    """A finished store as the tasks of a level see it that is added: `spec` is of that level alone, and the ledger's records are
    the level's own."""

    def __init__(self, folder: Folder, attributes: JsonObject, level: Level):
        """Raises `InvalidSpec` where the store has a level of that name."""
        self.new = level
        super().__init__(folder, attributes)

    def _take_attributes(self, attributes: JsonObject) -> None:
        super()._take_attributes(attributes)
        whole = replace(self.spec, levels=(*self.spec.levels, self.new))
        self.spec, self.fingerprint_then = replace(whole, levels=(self.new,)), fingerprint(whole, self.layout)
        "`fingerprint_then`: of the store once it has the level"
        self.ledger = Ledger(self.folder, self.layout, [self.new], self.fingerprint_then, commits=commits_of(self.new.name))

    def __reduce__(self) -> tuple[type["LevelAddition"], tuple[Folder, JsonObject, Level]]:  # type: ignore[override] # one more
        return type(self), (self.folder, self.attributes, self.new)

    @property
    def status(self) -> str:
        """Of the level."""
        return "writing"

    def begin(self, asked: str, made_of: str) -> None:
        """Say that the level is being added, or go on with it. Raises `BegunOtherwise`."""
        document = Document(self.folder, _begun_name(self.new.name), _BEGUN)
        mine: JsonObject = {"fingerprint": self.fingerprint_then, "level": self.new.to_json(), "asked": asked, "made_of": made_of}
        if self.folder.write_new(document.name, json.dumps(mine, indent=1).encode()):
            return
        found = document.json()
        # Weights may lie elsewhere by now; and where the store has grown since, the tasks that were done run again.
        there, here = ({name: each.get(name) for name in ("level", "made_of")} for each in (found, mine))
        if different := differences(there, here):
            raise BegunOtherwise(
                f"{document.displayed} says that level {self.new.name} was begun otherwise:\n{different.text('begun', 'now')}\n"
                f"{_BEGUN}"
            )
        if found.get("fingerprint") != self.fingerprint_then:
            self.folder.write(document.name, json.dumps(mine, indent=1).encode())

    def finalize(self, earlier: Collection[int] = ()) -> dict[str, int]:  # noqa: ARG002 - they were looked at before
        """Make the level part of the store, once none of its tasks is pending (`StorageError` otherwise); returns the store's row
        counts. Raises `StoreReplaced`."""
        if missing := self.pending():
            raise StorageError(f"{self.folder.displayed}: {len(missing)} tasks of level {self.new.name} are pending")
        document = Document(self.folder, _begun_name(self.new.name), _BEGUN)
        begun = document.json()
        with document.parsing():
            asked, made_of = (decode(str, begun[name], name) for name in ("asked", "made_of"))
        store = FeatureStore(self.folder, self.attributes)
        failed = sum(len(each) for each in self.ledger.failed(sorted(self.ledger.done()))) - len(store.failures(["row"]))
        added = AddedLevel(
            level=self.new.name, asked=asked, made_of=made_of, fingerprint=self.fingerprint_then, failed=max(0, failed)
        )
        store.take_level(self.new, added)
        store.finalize()  # what killed runs left
        self.root, self.spec = store.root, store.spec  # what is said of a finished run is of the store
        return dict(store.root.counts or {})


def _begun_name(level: str) -> str:
    return f"ledger/added/{level}.json"


def additions(store: FeatureStore) -> list[LevelAddition]:
    """Levels that are being added to a complete store, as far as they are."""
    found = []
    for name in sorted(store.folder.sizes("ledger/added")) if store.status == "complete" else ():
        if name.endswith(".json") and name.removesuffix(".json") not in store.levels:
            document = Document(store.folder, f"ledger/added/{name}", _BEGUN)
            begun = document.json()
            with document.parsing():
                found.append(LevelAddition(store.folder, store.attributes, decode(Level, as_object(begun["level"]), "level")))
    return found
