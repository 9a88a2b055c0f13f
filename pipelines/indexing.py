"""The index of a run's input: made, found again, or held against the input as it is now."""

import functools
import logging
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.executors import Executor, InlineExecutor
from storage.gathered import GatheredRows
from storage.identity import InputState, LedgerRows, input_state
from storage.inputs import InputFile, Listing
from storage.left_out import LeftOut, log_left_out, merge_left_out
from storage.paths import Folder, StorageOptions, is_memory
from storage.samples import INDEX, PART_ROWS, SampleIndex, kept_index, update_sources, write_index
from storage.scans import collect_index
from storage.sources import LIMIT, Source, changes_of, is_of_input, limit_changes, other_input, settings_changes, sources_left_out
from storage.tars import MemberRules, SourceScan, scan_source

logger = logging.getLogger(__name__)

SMALL_INPUT = 2**28
"""Bytes of tars that the driver scans itself, in seconds, where a cluster would first have to start processes for it."""


@dataclass(frozen=True, kw_only=True)
class RunInput:
    """The files of a run, which samples of them it takes, and who scans them."""

    files: Listing
    rules: MemberRules
    limit: int | None
    options: StorageOptions
    executor: Executor
    limited_by: str = LIMIT
    "the flag that says `limit`"

    def scan(self, files: Sequence[InputFile]) -> Iterator[SourceScan]:
        """Scan sources, in order."""
        if all(file.is_image for file in files):  # nothing is read to index plain files
            yield from (scan_source(file, self.rules, self.options) for file in files)
            return
        scan = functools.partial(_scan_group, rules=self.rules, options=self.options)
        together = max(1, min(16, len(files) // 64))
        small = sum(file.size for file in files) <= SMALL_INPUT
        for scans in (InlineExecutor() if small else self.executor).map(
            scan, [files[i : i + together] for i in range(0, len(files), together)]
        ):
            yield from scans

    def collect(self) -> tuple[GatheredRows, list[Source]]:
        """All samples, and the sources that hold them. Raises `InputError`."""
        return collect_index(zip(self.files, self.scan(self.files), strict=False), self.limit)

    def write(
        self, folder: Folder, rows: GatheredRows, sources: Sequence[Source], *, order: str = "", prefix: str = INDEX
    ) -> SampleIndex:
        """Save an index of these samples under `folder`; `order` as for `index_digest`."""
        return write_index(
            folder, rows, sources, rules=self.rules, limit=self.limit, left_out=self.files.left_out, order=order, prefix=prefix
        )

    def index(self, kept_in: Folder, write_to: Folder | None) -> SampleIndex:
        """The index that an earlier start left, where it is of this input; else a new one, written to a folder, or only drafted.
        Raises `InputError`."""
        kept = kept_index(kept_in)
        if kept is not None and is_of_input(kept, self.files, self.limit, self.rules):
            return kept
        rows, sources = self.collect()
        for name in self.rules.carry:
            if rows.null_counts[name] == len(rows):
                logger.warning("--carry %s: not one of the %s samples has a member .%s", name, f"{len(rows):,}", name)
        return self.write(write_to or draft(len(rows)), rows, sources)

    def index_in_use(self, folder: Folder) -> SampleIndex:
        """The index below `folder`, on whose rows something rests: sources may have moved, or been touched while they hold the
        same samples; anything else is an `InputError`. One that was lost is made anew: what rests on it compares digests."""
        kept = kept_index(folder)
        if kept is None:
            return self.write(folder, *self.collect())
        state = self.state(kept, _nothing_committed)
        if not state.stands:
            raise other_input(kept, changes_of(kept, self.files, self.limit, self.rules, self.limited_by))
        return kept if state.sources == kept.sources else update_sources(kept, state.sources)

    def state(self, index: SampleIndex, ledger: LedgerRows) -> InputState:
        """The input as it is now, beside `index`. Raises `InputError` where it was indexed with settings that make other rows."""
        settings = settings_changes(index, self.limit, self.rules, self.limited_by)
        fps = str(self.rules.frames or "")
        if limit_changes(index, self.limit) or index.carried != list(self.rules.carry) or index.fps != fps:
            raise other_input(index, settings)
        state = input_state(index, self.files, self.scan, ledger, self.options, limit=self.limit, rescan=bool(settings))
        if settings and not state.stands:
            raise other_input(index, [*settings, *state.changes])
        return state


_drafts: dict[str, tempfile.TemporaryDirectory[str]] = {}
"""Folders of drafts on the disk, by URL; they go with the process."""


def draft(n_rows: int) -> Folder:
    """For an index of so many rows that isn't to be written yet: in memory, or on the local disk where it has several parts."""
    if n_rows <= PART_ROWS:
        return Folder(f"memory://raylift-index-{uuid.uuid4().hex}")
    folder = tempfile.TemporaryDirectory(prefix="raylift-index-")
    _drafts[folder.name] = folder
    return Folder(folder.name)


def is_draft(index: SampleIndex) -> bool:
    """Whether an index isn't written yet where it is to lie."""
    return is_memory(index.folder.url) or index.folder.url in _drafts


def _scan_group(files: Sequence[InputFile], rules: MemberRules, options: StorageOptions) -> list[SourceScan]:
    return [scan_source(file, rules, options) for file in files]


def _nothing_committed(rows: np.ndarray) -> pa.Table:
    """`LedgerRows` of what has no ledger."""
    nothing = pa.nulls(len(rows), pa.string())
    return pa.table({"row": rows, "status": nothing, "digest": nothing})


def report_left_out(index: SampleIndex, files: Listing) -> dict[str, LeftOut]:
    """Log what is wrong with the sources, and what the input holds that is no row; returns that, by reason."""
    for source in index.sources:
        if source.problems:
            logger.warning("%s: %s", source.url, source.problems)
    left_out = merge_left_out(files.left_out, sources_left_out(index.sources))
    log_left_out(left_out)
    return left_out
