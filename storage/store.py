"""The output: one Zarr v3 group at any fsspec URL, one subgroup per level, Parquet index and ledger beside it.

Only the driver writes metadata (`create`, `finalize`); a worker writes whole shards of one task through a `BlockWriter` and
then commits it. There is no method that writes part of a shard. Layout and protocol: storage/DESIGN.md.
"""

import functools
from array import array
from collections.abc import Collection
from dataclasses import asdict, fields, replace

import numpy as np
import pyarrow as pa

from storage.begun import Begun
from storage.differences import differences
from storage.documents import JsonObject, JsonValue
from storage.opened import MissingRows as MissingRows
from storage.opened import NoSuchRow as NoSuchRow
from storage.opened import NotAStore as NotAStore
from storage.opened import OpenStore
from storage.opened import OutsideImage as OutsideImage
from storage.opened import Selection as Selection
from storage.paths import Folder, StorageError, StorageOptions
from storage.root import FORMAT, MARKED, PACKED, ROOT, AddedLevel, Generation, StoreReplaced, read_attributes, require_same_store
from storage.sample_arrays import SAMPLE_DOCUMENTS
from storage.samples import SampleIndex, remove_indexes
from storage.sources import sources_digest
from storage.spec import FeatureSpec, FingerprintMismatch, Layout, Level, ShardTask, Tasks, fingerprint
from storage.totals import Totals
from storage.writer import BlockWriter

_PROBE = "runs/.probe"
"""How objects begin that a new store tries create-only writes with."""

_TOTALS = tuple(field.name for field in fields(Totals))
"""Attributes that say what the rows of a complete store come to."""


class FeatureStore(OpenStore):
    """An open store that can be written. `create` makes one or continues an equal one, `open` takes what is there; reading is
    `OpenStore`'s."""

    @classmethod
    def create(
        cls, url: str, spec: FeatureSpec, layout: Layout, *, provenance: JsonObject, storage_options: StorageOptions | None = None
    ) -> "FeatureStore":
        """Create the store's metadata, or continue a store of the same fingerprint.

        `provenance` (software versions, resolved config, `input`) is kept from the first run. Raises `FingerprintMismatch` with a
        line per differing field, and `StorageError` on storage without create-only writes.
        """
        folder = Folder(url, storage_options)
        store = cls(folder, read_attributes(folder) or cls._begin(folder, spec, layout, provenance))
        store.require(spec, layout)
        if store.status == "writing":
            store._restore_documents()
        return store

    @classmethod
    def _begin(cls, folder: Folder, spec: FeatureSpec, layout: Layout, provenance: JsonObject) -> JsonObject:
        """Write the root of a new store, create-only; returns its attributes, or those of a store that was quicker."""
        folder.check_create_only(_PROBE)
        attributes: JsonObject = {
            "format": FORMAT,
            "status": "writing",
            "fingerprint": fingerprint(spec, layout),
            "spec": spec.to_json(),
            "layout": asdict(layout),
            **provenance,
        }
        # First, since of several makers the root has one, and only that one writes the other documents.
        if folder.write_new(ROOT, cls(folder, attributes)._documents(complete=False)[ROOT]):
            return attributes
        found = read_attributes(folder)
        if found is None:
            raise StoreReplaced(f"{folder.displayed} was begun by another run, and removed; run the same command again")
        return found

    def _restore_documents(self) -> None:
        """Write the levels' metadata where it isn't what spec and layout give: not yet, damaged, or another maker's. Of a store
        that is being written; removes what a killed run left of the sample arrays."""
        self._remove_sample_documents()
        files = self._documents(complete=False)
        files.pop(ROOT)
        # One byte more than expected, so that a longer document isn't taken for an equal one.
        there = self.folder.read_ranges([(name, 0, len(data) + 1) for name, data in files.items()])
        for (name, data), found in zip(files.items(), there, strict=True):
            if found != data:
                self.put(name, data)

    def require(self, spec: FeatureSpec, layout: Layout) -> None:
        """Raise `FingerprintMismatch` unless this store holds exactly what `spec` and `layout` describe."""
        if self.root.fingerprint == fingerprint(spec, layout):
            return
        there, here = ({**each.to_json(), **asdict(cut)} for each, cut in ((self.spec, self.layout), (spec, layout)))
        lines = differences(there, here).text("store", "run")
        raise FingerprintMismatch(
            f"{self.folder.displayed} was written with different features than this run would write.\n{lines}\n"
            "Choose another --out, or change the settings above to match the store."
        )

    def pending(self, done: Collection[int] | None = None) -> Tasks:
        """Tasks without a commit record, or those that aren't among `done`."""
        there = self.ledger.done() if done is None else done
        return self.layout.tasks(array("q", (block for block in range(self.layout.n_blocks) if block not in there)))

    def input_rows(self, rows: np.ndarray) -> pa.Table:
        """`row`, `status` and `digest` of row numbers, from the commit records; null where nothing is committed."""
        return self.ledger.take_committed(rows, ["row", "status", "digest"])

    def require_in_place(self) -> None:
        """Raise `StoreReplaced` unless this store still lies where it was opened."""
        require_same_store(self.folder, self.root.fingerprint, self.root.input)

    def adopt_index(self, index: SampleIndex, *, grows: bool) -> None:
        """Go on with an index of other input, which is written: the root names it. Driver only. Raises `StoreReplaced`.

        Further rows make the arrays longer. `grows`: that is all; the rows that there are keep their samples, and readers go on
        with them. Otherwise rows that changed must be pending by now, and the last block, if it wasn't full. Commit records keep
        the fingerprint that the store began with.
        """
        layout = replace(self.layout, n_rows=index.n_rows, index=index.digest)
        own: dict[str, JsonValue] = {
            "status": "writing",
            "layout": asdict(layout),
            "fingerprint": fingerprint(self.spec, layout),
            "index": index.prefix,
            "input": sources_digest(index.sources),
            "origin": self.origin,
        }
        kept = {name: value for name, value in self._kept().items() if name != "generations"}
        if grows:
            own["generations"] = self._generations()
        self._write_root({**kept, **own}, complete=False)
        self._restore_documents()

    def _generations(self) -> list[JsonValue]:
        """What the store was before, and what it is now, for the root of what comes of it."""
        now = Generation(n_rows=self.layout.n_rows, fingerprint=self.root.fingerprint)
        return [asdict(each) for each in (*self.root.generations, now)]

    def take_level(self, level: Level, added: AddedLevel) -> None:
        """Make a level, all of whose shards are there, part of this complete store: its documents first, then the root, which
        readers go by. Driver only. Raises `StoreReplaced`."""
        spec = replace(self.spec, levels=(*self.spec.levels, level))
        own: JsonObject = {
            "spec": spec.to_json(),
            "fingerprint": added.fingerprint,
            "origin": self.origin,
            "generations": self._generations(),
            "added": [asdict(each) for each in (*self.root.added, added)],
        }
        # As one that is being written: the level's own records aren't packed yet.
        whole = FeatureStore(self.folder, {**self._kept(), **own, "status": "writing"})
        for name, data in whole._documents(complete=True).items():
            if name.startswith(f"{level.name}/"):
                self.put(name, data)
        totals = asdict(whole.ledger.merge(self.index, self.put))
        self._write_root(whole._completed(totals), complete=True)

    def put(self, name: str, data: bytes) -> None:
        """Write an object of this store: one request where there is none of that name. Raises `StoreReplaced`.

        Between a look at the root and a write, this store may have been removed and another begun: what that one has
        written by then must not be lost, so an object that is there is replaced only after another look.
        """
        if not self.folder.write_new(name, data) and self.folder.read_ranges([(name, 0, len(data) + 1)])[0] != data:
            self.require_in_place()
            self.folder.write(name, data)

    def set_writing(self, input_digest: str | None = None) -> None:
        """Mark the store as being written (again), in today's format. Driver only. Raises `StoreReplaced`.

        `input_digest`: `sources_digest` of the files as this run reads them. Drivers that read others stop.
        """
        marked = self.root.status == "writing" and input_digest in (None, self.root.input)
        if not marked or self.root.format < MARKED:
            wanted = {"status": "writing"} | ({} if input_digest is None else {"input": input_digest})
            self._write_root({**self._kept(), **wanted}, complete=False)

    def _kept(self) -> dict[str, JsonValue]:
        """The attributes that say no more than what was begun."""
        return {name: value for name, value in self.attributes.items() if name not in (*_TOTALS, "input")}

    def revoke(self, blocks: Collection[int]) -> None:
        """Make tasks pending again. Driver only. Raises `StoreReplaced`: another store's records are not to be removed."""
        self.require_in_place()
        self.ledger.revoke(blocks, self.put)

    def finalize(self, earlier: Collection[int] = ()) -> dict[str, int]:
        """Merge the ledger, mark the store complete, consolidate metadata; returns row counts by status. Idempotent.

        Driver only, once no task is pending (`StorageError` otherwise). `earlier`: blocks that an earlier run did, whose shards
        are looked at. Raises `StoreReplaced`, and `TornTasks` where what was committed isn't there, which has to be done again.
        """
        if self.status != "complete":
            self._complete(earlier)
        self._sweep()
        return dict(self.root.counts or {})

    def _complete(self, earlier: Collection[int]) -> None:
        # Before the ledger is merged, and once more after it, which may take long.
        self.require_in_place()
        missing = self.pending()
        if missing:
            raise StorageError(
                f"{self.folder.displayed}: {len(missing)} tasks have no commit record, the first is {missing[0].block}"
            )
        self._restore_documents()
        totals = asdict(self.ledger.merge(self.index, self.put, earlier))
        self.require_in_place()
        self._write_root(self._completed(totals), complete=True)

    def _completed(self, totals: JsonObject) -> JsonObject:
        """The attributes once all is merged, and packed where there are whole stretches of tasks."""
        packed = {"format": PACKED} if self.ledger.commits.n_packs else {}
        return {**self._kept(), "status": "complete", **packed, **totals}

    def _write_root(self, attributes: JsonObject, *, complete: bool) -> None:
        """Write the root document with these attributes, and go by them. Raises `StoreReplaced`.

        Of a store that is complete, the sample arrays' metadata comes first, and goes last once it isn't any more: who finds
        them finds those of its rows.
        """
        older = {} if self.root.format >= MARKED else {"format": MARKED, "upgraded_from": attributes["format"]}
        look = functools.partial(require_same_store, self.folder, self.root.fingerprint)
        look()
        if not complete:
            self._remove_packed()  # while packs still count before what lies alone
        self._take_attributes({**attributes, **older})
        documents = self._documents(complete=complete)
        for name in SAMPLE_DOCUMENTS if complete and self.root.has_sample_arrays else ():
            self.put(name, documents[name])
        self.folder.write(ROOT, documents[ROOT], look=look)
        if not complete:
            self._remove_sample_documents()

    def _remove_packed(self) -> None:
        """Of a finished store: remove commit records that packs stand for."""
        if self.root.packs == "all":
            self.ledger.remove_packed(self.require_in_place)

    def _remove_sample_documents(self) -> None:
        """Take the arrays of an earlier finish, whose rows may change now, out of readers' sight."""
        if self.root.has_sample_arrays:
            there = self.folder.read_ranges([(name, 0, 1) for name in SAMPLE_DOCUMENTS])
            if stale := [name for name, data in zip(SAMPLE_DOCUMENTS, there, strict=True) if data is not None]:
                self.require_in_place()
                self.folder.remove(stale)

    def _sweep(self) -> None:
        """Remove what killed runs left beside the store's objects, files half written and probes, and what the finish packed."""
        self._remove_packed()
        self.folder.remove_partial()
        remove_indexes(self.folder, self.index_prefix)
        probes = [name for name in self.folder.sizes("runs") if f"runs/{name}".startswith(_PROBE)]
        self.folder.remove(f"runs/{name}" for name in probes)

    def _documents(self, *, complete: bool) -> dict[str, bytes]:
        from storage.metadata import zarr_documents  # with zarr-python, which workers don't need: 0.3 s and 20 MB each

        return zarr_documents(
            self.spec,
            self.layout,
            self.attributes,
            index_location=self.root.index_location,
            sample_arrays=complete and self.root.has_sample_arrays,
            consolidated=complete,
        )

    def writer(self, task: ShardTask, begun: Begun | None = None) -> BlockWriter:
        """The writer of one task's shards; `begun`: what there is of it, where that was read already."""
        return BlockWriter(self, task, begun)
