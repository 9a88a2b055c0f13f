"""A store that goes on with its input: what differs from what was extracted, and what is to be done about it."""

import logging
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import ConfigError
from pipelines.executors import Executor
from pipelines.extraction.config import ExtractConfig
from pipelines.indexing import RunInput, draft, is_draft
from storage.documents import DamagedObject
from storage.identity import InputState, input_state, order_digest
from storage.inputs import Listing
from storage.ledger import SCHEMA
from storage.paths import InputError
from storage.root import read_attributes
from storage.samples import INDEX, SampleIndex, index_digest, move_index, update_sources
from storage.sources import other_input, sources_digest
from storage.spec import FeatureSpec, Layout
from storage.store import FeatureStore
from storage.tars import MemberRules
from storage.videos import is_video

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class InputUpdate:
    """What a store that exists needs before it goes on with the input as it is now; decided, but not done."""

    state: InputState
    index: SampleIndex
    "of the input as it is now; a draft where it isn't the store's"
    before: Layout
    redo: frozenset[int]
    "blocks with rows whose image is another one now"
    begun: frozenset[int]
    "blocks that get further rows, beside those that are done"
    listed: frozenset[int]
    "blocks that had a commit record when the input was compared with them"
    is_known: bool
    "the files are those that the store's index names"

    @property
    def done(self) -> frozenset[int]:
        """Blocks that stay as they are."""
        return self.listed - self.redo - self.begun

    @property
    def new(self) -> str:
        """What comes to the store, in words; empty where no source does."""
        state, first = self.state, self.before.n_rows + self.state.added
        if not state.new_sources:
            return ""
        names = [source.url.rsplit("/", 1)[-1] for source in state.sources[-state.new_sources :][:3]]
        more = ", ..." if state.new_sources > len(names) else ""
        sources = f"{state.new_sources:,} new source{'s' * (state.new_sources > 1)} ({', '.join(names)}{more})"
        if not state.grown:
            return f"{sources} without images"
        return f"{state.grown:,} images of {sources}, on rows {first:,} to {first + state.grown - 1:,}"

    def apply(self, store: FeatureStore) -> None:
        """Make blocks pending first, then take over the index: a kill in between leaves a store that is asked again."""
        digest = sources_digest(self.state.sources)
        if not self.is_known and store.status == "writing":
            store.set_writing(digest)  # a driver that reads other files stops here
        listed = store.ledger.listed() if self.redo or not self.is_known else frozenset[int]()
        again = listed & self.redo
        if not self.is_known:
            again |= listed - self.listed  # such a driver may have done those
        if again:
            store.set_writing(digest)
            store.revoke(sorted(again))
            logger.info("%d tasks hold images that changed, and run again", len(again))
        if self.state.rows is not None:
            logger.info(
                "%s", self.new or "the index is written anew: sources hold their samples at other places, or with other text"
            )
            move_index(self.index, store.folder, store.put)
            store.adopt_index(SampleIndex(store.folder, self.index.prefix), grows=self.state.grows)
            return
        # A draft stands for one that was lost.
        index = self.index
        if is_draft(index):
            move_index(index, store.folder, store.put)
        if not self.is_known:
            update_sources(SampleIndex(store.folder, index.prefix) if is_draft(index) else index, self.state.sources)


def member_rules(config: ExtractConfig) -> MemberRules:
    """Which members of a sample are taken. Raises `ConfigError`."""
    rules = config.input.rules(config.image_member, config.carry, config.frames)
    if taken := [name for name in rules.carry if name in SCHEMA.names]:
        raise ConfigError(f"--carry {taken[0]}: the ledger has a column of that name; rename the members, or drop it")
    if not rules.frames and is_video(f".{rules.image}"):
        raise ConfigError(f"--image-member {rules.image}: that is a video; --fps 2 takes two frames of each second of it")
    return rules


def input_of(config: ExtractConfig, files: Listing, executor: Executor) -> RunInput:
    """The input of an extraction."""
    return RunInput(files=files, rules=member_rules(config), limit=config.limit, options=config.options, executor=executor)


def continue_store(store: FeatureStore, spec: FeatureSpec, given: RunInput, config: ExtractConfig) -> InputUpdate:
    """What a store needs to go on. Raises `FingerprintMismatch`, and `InputError` for changes that weren't allowed for."""
    # What was repaired may hold more rows by now, of which there would be larger blocks.
    store.require(spec, replace(store.layout, block_rows=config.block_rows or store.layout.block_rows))
    _require_within_limits(store, config)
    try:
        index = store.index if store.has_index() else _restored_index(store, given)
        return _input_update(store, index, given, config)
    except (InputError, DamagedObject):
        now = read_attributes(store.folder)
        if now is None or now["fingerprint"] == store.root.fingerprint:
            raise
    # Another run took over changed input meanwhile.
    return continue_store(FeatureStore(store.folder, now), spec, given, config)


def _require_within_limits(store: FeatureStore, config: ExtractConfig) -> None:
    """Raise `ConfigError` where the store holds images that this run would refuse as too large: what is there stays there."""
    begun_with = store.root.config or {}
    limits = {name: (begun_with.get(name), getattr(config, name)) for name in ("max_image_pixels", "max_image_bytes")}
    lowered = {name: each for name, each in limits.items() if isinstance(each[0], int) and each[1] < each[0]}
    if not lowered:
        return
    rows = store.records(slice(None), ["key", "status", "size", "width", "height", "time"])
    rows = rows.filter(pc.fill_null(pc.equal(rows["status"], "ok"), False))
    sizes = {
        "max_image_pixels": pc.multiply(pc.cast(rows["width"], pa.int64()), rows["height"]),
        "max_image_bytes": _of_images(rows),
    }
    for name, (before, now) in lowered.items():
        larger = rows["key"].filter(pc.greater(sizes[name], now))
        if len(larger):
            raise ConfigError(
                f"--{name.replace('_', '-')} {now}: {len(larger)} rows of {store.folder.displayed} are of larger images, for "
                f"example {larger[0].as_py()!r}; it was begun with {before}. Use that, or a new --out"
            )


def _of_images(rows: pa.Table) -> pa.ChunkedArray:
    """The sizes of ledger rows' images in bytes; 0 of frames, whose rows have that of a video, of any size."""
    return pc.if_else(pc.is_valid(rows["time"]), 0, rows["size"])


def _restored_index(store: FeatureStore, given: RunInput) -> SampleIndex:
    """A draft of the index of a store that lost it, or whose run was killed before it had one. Raises `InputError` where the
    input is another one."""
    rows, sources = given.collect()
    if index_digest(len(rows), sources) != store.layout.index:
        raise InputError(
            f"{store.folder.displayed} has no index of its input, and was begun with other input than this: give --data in the "
            "same order as then, restore its index from a copy, or use a new --out"
        )
    if sources_digest(sources) != store.root.input:
        # Samples of equal names and sizes may be other ones: without a stamp, they are held against the ledger.
        sources = [replace(source, etag="") for source in sources]
    index = given.write(draft(len(rows)), rows, sources, prefix=store.index_prefix)
    index.displayed = store.folder.displayed
    return index


def _input_update(store: FeatureStore, index: SampleIndex, given: RunInput, config: ExtractConfig) -> InputUpdate:
    """What the store needs for the input as it is now. Raises `InputError` for changes that weren't allowed for."""
    listed = store.ledger.listed()
    done = store.ledger.done(listed)
    state = given.state(index, store.input_rows)
    _require_allowed(index, state, config)
    block_rows = store.layout.block_rows
    redo = {row // block_rows for row in state.redo | state.repaired}
    begun = listed - done
    if (state.added or state.grown) and index.n_rows % block_rows:
        begun.add(index.n_rows // block_rows)  # the last block wasn't full, and takes the first of the new rows
    if not state.grows:
        redo |= begun
    return InputUpdate(
        state=state,
        index=_index_now(index, state, given),
        before=store.layout,
        redo=frozenset(redo),
        begun=frozenset(begun),
        listed=frozenset(listed),
        is_known=list(state.sources) == index.sources,
    )


def _index_now(index: SampleIndex, state: InputState, given: RunInput) -> SampleIndex:
    """The index of the input as it is now: the store's own where its rows still hold, else a draft of a new one."""
    if state.rows is None:
        return index
    order = order_digest(state.rows) if index.order or state.reordered else ""
    digest = index_digest(len(state.rows), state.sources, order)
    return given.write(draft(len(state.rows)), state.rows, state.sources, order=order, prefix=f"{INDEX}/{digest[:12]}")


def _require_allowed(index: SampleIndex, state: InputState, config: ExtractConfig) -> None:
    """Raise `InputError` for images that changed, unless the settings say that they are to be extracted again."""
    if state.redo and not config.replace_changed:
        advice = "Use --replace-changed to extract what differs again, a new --out, or restore what changed."
        raise other_input(index, state.changes, advice)
    if (state.repaired or state.added) and not (config.retry_failed or config.replace_changed):
        advice = "Only images that had failed differ: use --retry-failed to extract them, a new --out, or restore what changed."
        raise other_input(index, state.changes, advice)


def changed_meanwhile(config: ExtractConfig, store: FeatureStore, executor: Executor) -> list[str]:
    """Hold the input against the finished rows once more: what differs, in words, where files were replaced while they were read.

    Sources that are gone by now were needed no more. Repaired images of failed rows are logged only.
    """
    index = store.index
    try:
        files = config.input.files(config.data, config.options, config.image_member, videos=config.fps is not None)
    except InputError as error:
        logger.warning("whether the input changed while it was read can't be told any more: %s", error)
        return []
    scan = input_of(config, files, executor).scan
    state = input_state(index, files, scan, store.input_rows, config.options, limit=config.limit, gone_is_unchanged=True)
    if state.redo:
        return state.changes
    for change in state.changes:
        logger.warning("%s; --retry-failed extracts them", change)
    if state.rows is None and list(state.sources) != index.sources:
        update_sources(index, state.sources)
    return []
