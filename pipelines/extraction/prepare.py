"""From settings to an extraction that is ready to run: the model loaded, the input indexed, nothing computed.

`resolve` needs no cluster and finds most mistakes; `prepare` scans the input with an executor's help.
"""

import functools
import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipelines.config import ConfigError
from pipelines.extraction.config import ExtractConfig
from pipelines.features.bundle import ModelBundle, load_described
from pipelines.features.model import FeatureModel
from pipelines.provenance import versions
from storage.documents import DamagedObject
from storage.identity import InputState, Scan, input_state, order_digest
from storage.inputs import Listing, expand_inputs
from storage.ledger import SCHEMA
from storage.left_out import LeftOut, log_left_out, merge_left_out
from storage.paths import Folder, InputError, is_memory
from storage.root import StoreReplaced
from storage.samples import (
    INDEX,
    SampleIndex,
    build_index,
    index_digest,
    kept_index,
    move_index,
    update_sources,
    write_index,
)
from storage.scans import collect_index
from storage.sources import (
    is_of_input,
    limit_changes,
    other_input,
    settings_changes,
    sources_digest,
    sources_left_out,
)
from storage.spec import FeatureSpec, FingerprintMismatch, Layout, choose_block_rows
from storage.store import FeatureStore, read_attributes
from storage.tars import MemberRules

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A config held against the input and the model, before any cluster is asked for anything."""

    config: ExtractConfig
    bundle: ModelBundle
    model: FeatureModel
    "the same model in this process, on the CPU"
    files: Listing


@dataclass(frozen=True, kw_only=True)
class InputUpdate:
    """What a store that exists needs before it goes on with the input as it is now; decided, but not done."""

    state: InputState
    index: SampleIndex
    "of the input as it is now; in memory where it isn't the store's"
    before: Layout
    redo: frozenset[int]
    "blocks with rows whose image is another one now"
    done: frozenset[int]
    "blocks that were done when the input was compared with them"
    is_known: bool
    "the files are those that the store's index names"

    def apply(self, store: FeatureStore) -> None:
        """Make blocks pending first, then take over the index: a kill in between leaves a store that is asked again."""
        digest = sources_digest(self.state.sources)
        if not self.is_known and store.status == "writing":
            store.set_writing(digest)  # a driver that reads other files stops here
        done = store.ledger.done()
        again = done & self.redo
        if not self.is_known:
            again |= done - self.done  # such a driver may have done those
        if again:
            store.set_writing(digest)
            store.revoke(sorted(again))
            logger.info("%d tasks hold images that changed, and run again", len(again))
        if self.state.table is not None:
            logger.info(
                "the index is written anew: sources hold their samples at other places, or with other text, than before"
            )
            store.adopt_index(move_index(self.index, store.folder, store.put))
            return
        # One in memory stands for one that was lost.
        index = move_index(self.index, store.folder, store.put) if is_memory(self.index.folder.url) else self.index
        if not self.is_known:
            update_sources(index, self.state.sources)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An extraction that is ready to run: everything but the workers."""

    config: ExtractConfig
    bundle: ModelBundle
    model: FeatureModel
    layout: Layout
    index: SampleIndex
    "below the output, or in memory until there is a store"
    urls: tuple[str, ...]
    "the index's sources with credentials, as this run reads them"
    left_out: Mapping[str, LeftOut]
    "what the input holds that is no row, by reason"
    update: InputUpdate | None = None
    "of a store that exists"

    @property
    def notes(self) -> tuple[str, ...]:
        """What is no mistake, and who reads the features should know; kept in the store's attributes."""
        return tuple(self.bundle.unfamiliar(self.bundle.spec, self.model.backbone.patch))

    def create_store(self) -> FeatureStore:
        """Create or continue the output. Raises `FingerprintMismatch`, `InputError` and `StoreReplaced` for another run's."""
        provenance = {"versions": versions(), "config": self.config.content(), "input": self.input_digest}
        if self.notes:
            provenance["notes"] = list(self.notes)
        try:
            store = FeatureStore.create(
                self.config.out,
                self.bundle.spec,
                self.update.before if self.update else self.layout,
                provenance=provenance,
                storage_options=self.config.options,
            )
        except FingerprintMismatch:
            if self.update is None:
                raise
            shown = Folder(self.config.out, self.config.options).shown
            raise StoreReplaced(f"{shown} was changed by another run just now; run the same command again") from None
        if self.update:
            self.update.apply(store)
        else:
            # After the store: of two runs that begin at once, the one whose store it isn't writes nothing.
            self._require_begun_with_this(store)
            self.keep_index(store.put)
        return store

    @functools.cached_property
    def input_digest(self) -> str:
        """`sources_digest` of the input as this run reads it."""
        return sources_digest(self.update.state.sources if self.update else self.index.sources)

    def _require_begun_with_this(self, store: FeatureStore) -> None:
        """Raise `InputError` where another run was quicker and reads other files, which may have the same names and sizes."""
        begun_with = store.attributes.get("input") or sources_digest(store.index.sources)
        if begun_with != self.input_digest:
            raise InputError(
                f"{store.folder.shown} was begun by another run just now, with other files than those of this --data; run the "
                "same command again, which compares them, or use another --out"
            )

    def keep_index(self, put: Callable[[str, bytes], None] | None = None) -> None:
        """Save a new index with the output; a plan does so, too, for the run that follows it."""
        if self.update is None and is_memory(self.index.folder.url):
            move_index(self.index, Folder(self.config.out, self.config.options), put)


def resolve(config: ExtractConfig) -> Resolved:
    """Find the input's files and load the model: what can be wrong with the settings is wrong here.

    Raises `InputError`, `ConfigError`, `BackboneError`, `UpsamplerError`, `WeightsUnavailable`.
    """
    if not config.out:
        raise ConfigError("no output: give --out a path or URL for the Zarr store")
    _rules(config)  # raises for columns that can't be carried
    # Refuses what is there and isn't ours, before anything is written.
    read_attributes(Folder(config.out, config.options))
    files = expand_inputs(config.data, config.options, config.image_member)
    bundle, model = load_described(config.features, config.options)
    for note in bundle.unfamiliar(bundle.spec, model.backbone.patch):
        logger.warning("%s", note)
    return Resolved(config=config, bundle=bundle, model=model, files=files)


def prepare(resolved: Resolved, executor: Any) -> Prepared:
    """Index the input, or hold it against the store that is there. Nothing is written. Raises `InputError`."""
    config, spec = resolved.config, resolved.bundle.spec
    folder = Folder(config.out, config.options)
    scan = _scanner(config, executor)
    attributes = read_attributes(folder)
    update = None
    if attributes is None:
        index = _new_index(folder, resolved.files, scan, config)
        block_rows = config.block_rows or choose_block_rows(index.n_rows, spec)
        layout = Layout(n_rows=index.n_rows, block_rows=block_rows, index=index.digest)
        urls = index.urls(resolved.files)
    else:
        update = _continued(FeatureStore(folder, attributes), spec, resolved.files, scan, config)
        index, urls = update.index, update.state.urls
        layout = replace(update.before, n_rows=index.n_rows, index=index.digest)
    left_out = _say(index, resolved.files)
    return Prepared(
        config=config,
        bundle=resolved.bundle,
        model=resolved.model,
        layout=layout,
        index=index,
        urls=urls,
        left_out=left_out,
        update=update,
    )


def _rules(config: ExtractConfig) -> MemberRules:
    rules = MemberRules(image=config.image_member, carry=config.carry)
    if taken := [name for name in rules.carry if name in SCHEMA.names]:
        raise ConfigError(f"--carry {taken[0]}: the ledger has a column of that name; rename the members, or drop it")
    return rules


def _scanner(config: ExtractConfig, executor: Any) -> Scan:
    return lambda files: executor.scan(files, _rules(config), config.options)


def _new_index(folder: Folder, files: Listing, scan: Scan, config: ExtractConfig) -> SampleIndex:
    """The index that a plan left, where it is of this input; else a new one, in memory until there is a store."""
    kept = kept_index(folder)
    if kept is not None and is_of_input(kept, files, config.limit, _rules(config)):
        return kept
    table, sources = collect_index(zip(files, scan(files), strict=False), config.limit)
    return write_index(_draft(), table, sources, rules=_rules(config), limit=config.limit, left_out=files.left_out)


def _continued(
    store: FeatureStore, spec: FeatureSpec, files: Listing, scan: Scan, config: ExtractConfig
) -> InputUpdate:
    """What a store needs to go on. Raises `FingerprintMismatch`, and `InputError` for changes that weren't allowed for."""
    # What was repaired may hold more rows by now, of which there would be larger blocks.
    store.require(spec, replace(store.layout, block_rows=config.block_rows or store.layout.block_rows))
    try:
        index = store.index if store.has_index() else _restored_index(store, files, scan, config)
        return _input_update(store, index, files, scan, config)
    except (InputError, DamagedObject):
        now = read_attributes(store.folder)
        if now is None or now["fingerprint"] == store.attributes["fingerprint"]:
            raise
    # Another run took over changed input meanwhile.
    return _continued(FeatureStore(store.folder, now), spec, files, scan, config)


def _restored_index(store: FeatureStore, files: Listing, scan: Scan, config: ExtractConfig) -> SampleIndex:
    """The index, in memory, of a store that lost it, or whose run was killed before it had one. Raises `InputError` where the
    input is another one."""
    table, sources = collect_index(zip(files, scan(files), strict=False), config.limit)
    if index_digest(len(table), sources) != store.layout.index:
        raise InputError(
            f"{store.folder.shown} has no index of its input, and was begun with other input than this: give --data in the "
            "same order as then, restore its index from a copy, or use a new --out"
        )
    if sources_digest(sources) != store.attributes.get("input"):
        # Samples of equal names and sizes may be other ones: without a stamp, they are held against the ledger.
        sources = [replace(source, etag="") for source in sources]
    index = write_index(
        _draft(),
        table,
        sources,
        rules=_rules(config),
        limit=config.limit,
        left_out=files.left_out,
        prefix=store.index_prefix,
    )
    index.shown = store.folder.shown
    return index


def _input_update(
    store: FeatureStore, index: SampleIndex, files: Listing, scan: Scan, config: ExtractConfig
) -> InputUpdate:
    """What the store needs for the input as it is now. Raises `InputError` for changes that weren't allowed for."""
    rules, done = _rules(config), store.ledger.done()
    settings = settings_changes(index, config.limit, rules)
    if limit_changes(index, config.limit) or index.carried != list(rules.carry):
        raise other_input(index, settings)
    state = input_state(index, files, scan, store.input_rows, config.options, limit=config.limit, rescan=bool(settings))
    if settings and not state.stands:
        raise other_input(index, [*settings, *state.changes])
    _require_allowed(index, state, config)
    rows = state.redo | state.repaired
    if state.added and index.n_rows % store.layout.block_rows:
        rows = rows | {index.n_rows - 1}  # the last block wasn't full, and takes the first of the new rows
    redo = frozenset(row // store.layout.block_rows for row in rows)
    return InputUpdate(
        state=state,
        index=_index_now(index, state, config, files.left_out),
        before=store.layout,
        redo=redo,
        done=frozenset(done),
        is_known=list(state.sources) == index.sources,
    )


def _index_now(
    index: SampleIndex, state: InputState, config: ExtractConfig, left_out: Mapping[str, LeftOut]
) -> SampleIndex:
    """The index of the input as it is now: the store's own where its rows still hold, else a new one in memory."""
    if state.table is None:
        return index
    order = order_digest(state.table) if index.order or state.reordered else ""
    digest = index_digest(len(state.table), state.sources, order)
    return write_index(
        _draft(),
        state.table,
        state.sources,
        rules=_rules(config),
        limit=config.limit,
        left_out=left_out,
        order=order,
        prefix=f"{INDEX}/{digest[:12]}",
    )


def _draft() -> Folder:
    """For an index that isn't to be written yet."""
    return Folder(f"memory://raylift-index-{uuid.uuid4().hex}")


def _require_allowed(index: SampleIndex, state: InputState, config: ExtractConfig) -> None:
    """Raise `InputError` for images that changed, unless the settings say that they are to be extracted again."""
    if state.redo and not config.replace_changed:
        advice = "Use --replace-changed to extract what differs again, a new --out, or restore what changed."
        raise other_input(index, state.changes, advice)
    if (state.repaired or state.added) and not (config.retry_failed or config.replace_changed):
        advice = "Only images that had failed differ: use --retry-failed to extract them, a new --out, or restore what changed."
        raise other_input(index, state.changes, advice)


def changed_meanwhile(prepared: Prepared, store: FeatureStore, executor: Any) -> list[str]:
    """Hold the input against the finished rows once more: what differs, in words, where files were replaced while they were read.

    Sources that are gone by now were needed no more. Repaired images of failed rows are logged only.
    """
    config, index = prepared.config, store.index
    try:
        files = expand_inputs(config.data, config.options, config.image_member)
    except InputError as error:
        logger.warning("whether the input changed while it was read can't be told any more: %s", error)
        return []
    scan = _scanner(config, executor)
    state = input_state(
        index, files, scan, store.input_rows, config.options, limit=config.limit, gone_is_unchanged=True
    )
    if state.redo:
        return state.changes
    for change in state.changes:
        logger.warning("%s; --retry-failed extracts them", change)
    if state.table is None and list(state.sources) != index.sources:
        update_sources(index, state.sources)
    return []


def index_input(
    folder: Folder,
    files: Listing,
    rules: MemberRules,
    limit: int | None,
    executor: Any,
    options: Mapping[str, Any],
    *,
    in_use: bool,
) -> SampleIndex:
    """Index the input below `folder`, or check the index that is there against it if that is in use. Raises `InputError`.

    `executor` scans tars (pipelines/executors.py).
    """
    scan = lambda some: executor.scan(some, rules, options)  # noqa: E731
    index = build_index(folder, files, scan, limit, rules, in_use=in_use, left_out=files.left_out)
    _say(index, files)
    return index


def _say(index: SampleIndex, files: Listing) -> dict[str, LeftOut]:
    """Log what is wrong with the sources, and what the input holds that is no row; returns that, by reason."""
    for source in index.sources:
        if source.problems:
            logger.warning("%s: %s", source.url, source.problems)
    left_out = merge_left_out(files.left_out, sources_left_out(index.sources))
    log_left_out(left_out)
    return left_out


def default_batch(config: ExtractConfig, layout: Layout, device: str) -> int:
    """Images per forward that workers start from; they take fewer where memory is short."""
    return min(config.batch or (64 if device == "cuda" else 16), layout.block_rows)
