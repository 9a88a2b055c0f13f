"""What became of a store, from its own files: counts, rates, stage times, sizes, failures. Any store, also one being written.

Text and plain data for `jobs/show.py` and the report; pictures are in pipelines/showing/views.py.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime

import numpy as np

from cluster.progress import duration, size_text, stage_shares
from storage.added import LevelAddition, additions
from storage.documents import Document, JsonObject, MissingObject, decode_known
from storage.failures import REASON_COLUMNS, FailureGroup, group_failures
from storage.left_out import LeftOut, left_out_lines
from storage.root import AddedLevel
from storage.spec import Level
from storage.spread import spread
from storage.store import FeatureStore
from storage.totals import Clipped, Totals, clipped_lines, conversion_lines, float16_levels
from storage.words import printable_name

MAX_RECORDS = 1024
"""Commit records that are read for sizes and failures; of more tasks, a sample of this many."""

SILENT_AFTER_S = 120.0
"""A run that has said nothing for longer is taken for dead or stuck; it saves its progress every 10 s."""

_NOTES = "remove it: it holds notes on a run, nothing rests on it"

BOTTLENECKS = {
    "read": "fetching images: run nearer to the data, or with more actors",
    "decode": "decoding images: more CPUs per actor (--actor-cpus), CPU nodes (--decode-on cluster), or --jpeg-draft",
    "forward": "the model itself, which is as it should be: more or faster devices help most",
    "upsample": "upsampling: store fewer or coarser levels",
    "encode": "compressing features: more CPUs per actor, or fewer levels",
    "write": "writing features: a faster or nearer object store, fewer levels, or a smaller encoding",
}
"""By stage: what takes the time, and what would help."""


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """One run of the extraction, from its run.json and, once it has written that, progress.json."""

    run_id: str
    started: str
    updated: str | None = None
    "ISO time of the last sign of life; None before the first task is finished"
    silent_s: float = 0.0
    "seconds since then, or since the start"
    ok: int = 0
    failed: int = 0
    rows_before: int = 0
    "rows that earlier runs had finished"
    images_per_s: float = 0.0
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    bytes_written: int = 0
    errors: tuple[str, ...] = ()
    ended: str = ""
    "`stopped` (by an interrupt or SIGTERM) or `failed`, where it said so before its store was complete"
    settings: JsonObject
    "run.json: config, workers, versions, host"

    @property
    def workers(self) -> "Workers":
        return decode_known(Workers, self.settings["workers"], "workers")


@dataclass(frozen=True, kw_only=True)
class StoreStatus:
    """The state of a store. `is_sampled`: bytes and failures are scaled up from MAX_RECORDS tasks."""

    out: str
    status: str
    rows: int
    finished: int
    failed: int
    tasks: int
    tasks_done: int
    stored_bytes: Mapping[str, int]
    "by level, for the tasks that are done"
    objects: int
    is_sampled: bool
    left_out: Mapping[str, LeftOut]
    "what the input held that is no row, by reason"
    runs: Sequence[RunStatus]
    clipped: Clipped | None
    "values that float16 couldn't hold; None: a sample has none, and of the others it isn't known"
    conversions: Mapping[str, int]
    "images by what was done to them beyond decoding"
    is_counted: bool
    "both are of all rows that are finished, and not scaled up"
    levels: Sequence[Level]
    notes: Sequence[str] = ()
    "what was said when it was begun: no mistake, but worth knowing"
    added: Sequence[str] = ()
    "levels that came later, of what they were made; and those that are being added, and how far"

    @property
    def ok(self) -> int:
        return self.finished - self.failed

    @property
    def pending(self) -> int:
        return self.rows - self.finished

    def to_json(self) -> JsonObject:
        return asdict(self) | {"ok": self.ok, "pending": self.pending}


def read_status(store: FeatureStore) -> StoreStatus:
    """The state of `store`, in a few requests and at most MAX_RECORDS small ones."""
    # Of a store that grows, one is of rows of a task that has further ones now.
    listed, done = sorted(store.ledger.listed()), store.ledger.done()
    layout = store.layout
    picked = [listed[i] for i in spread(len(listed), MAX_RECORDS)]
    stored, objects, found = dict.fromkeys(store.levels, 0), 0, Totals()
    for block, table in store.ledger.records(picked):
        found += Totals.of(table)
        written = store.ledger.objects(block, table)
        objects += len(written)
        for name, size in written.items():
            stored[name.split("/", 1)[0]] += size
    scale, root = len(listed) / max(1, len(picked)), store.root
    is_sampled = len(picked) < len(listed)
    found = found.scaled(scale)
    # Where a sample has none, others may have some.
    clipped = found.clipped if found.clipped.rows or not is_sampled else None
    return StoreStatus(
        out=store.folder.displayed,
        status=store.status,
        rows=layout.n_rows,
        finished=sum(layout.task(block).n_rows for block in done) + store.ledger.begun_rows(),
        failed=(root.counts or found.counts).get("failed", 0),
        tasks=layout.n_blocks,
        tasks_done=len(done),
        stored_bytes={name: round(size * scale) for name, size in stored.items()},
        objects=round(objects * scale),
        is_sampled=is_sampled,
        clipped=clipped if root.clipped is None else root.clipped,
        conversions=found.conversions if root.conversions is None else root.conversions,
        is_counted=not is_sampled or root.clipped is not None,
        levels=store.spec.levels,
        left_out=_left_out(store),
        runs=read_runs(store),
        notes=store.root.notes or (),
        added=[*map(_added, store.root.added), *map(_being_added, additions(store))],
    )


def read_runs(store: FeatureStore) -> list[RunStatus]:
    """The runs that have written to it, in the order in which they began."""
    return [run for run_id in store.folder.folders("runs") if (run := _read_run(store, run_id))]


def _added(level: AddedLevel) -> str:
    lacking = f"; {level.failed:,} rows that have the others lack it" if level.failed else ""
    return f"level {level.level} was added, made of {level.made_of}{lacking}"


def _being_added(level: LevelAddition) -> str:
    done, of = len(level.ledger.done()), level.layout.n_blocks
    return f"level {level.new.name} is being added: {done:,} of {of:,} tasks done; readers see it once it is whole"


def _left_out(store: FeatureStore) -> Mapping[str, LeftOut]:
    try:
        return store.index.left_out
    except MissingObject:
        if store.status == "complete":
            raise
        return {}  # a run that has just begun: the index follows the root


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Of a run."""

    size: int
    device: str
    batch: int


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """What is read of run.json."""

    started: str
    host: str
    workers: JsonObject


_FROM_RUN = ("run_id", "started", "silent_s", "settings")
"""What progress.json doesn't say of a run."""


def _read_run(store: FeatureStore, run_id: str) -> RunStatus | None:
    """A run's own files; None for what isn't a run's folder. Raises `DamagedObject`."""
    begun = Document(store.folder, f"runs/{run_id}/run.json", _NOTES)
    try:
        settings = begun.json()
    except MissingObject:
        return None
    with begun.parsing():
        started = decode_known(_Begun, settings)
        decode_known(Workers, started.workers, "workers")
        silent_since = _seconds(started.started)
    run = RunStatus(run_id=run_id, started=started.started, settings=settings)
    progress = Document(store.folder, f"runs/{run_id}/progress.json", _NOTES)
    with contextlib.suppress(MissingObject), progress.parsing():
        run = decode_known(RunStatus, {**progress.json(), **{name: getattr(run, name) for name in _FROM_RUN}})
        silent_since = _seconds(run.updated or run.started)
    return replace(run, silent_s=max(0.0, time.time() - silent_since))


def _seconds(iso: str) -> float:
    return datetime.fromisoformat(iso).timestamp()


def status_lines(status: StoreStatus) -> Iterator[str]:
    """The state in words, a line each."""
    about = "about " if status.is_sampled else ""
    yield f"{status.out}: {state_in_words(status.status, status.runs)}"
    yield f"images   {status.ok:,} ok, {about}{status.failed:,} failed, {status.pending:,} pending, {status.rows:,} in all"
    for line in left_out_lines(status.left_out):
        yield f"left out {line}"
    for line in conversion_lines(status.conversions, "" if status.is_counted else about):
        yield f"converted {line}"
    for line in clamped_lines(status):
        yield f"clamped  {line}"
    yield f"tasks    {status.tasks_done:,} of {status.tasks:,} done"
    yield f"stored   {about}{size_text(sum(status.stored_bytes.values()))} in {about}{status.objects:,} objects"
    for line in status.added:
        yield f"added    {line}"
    for note in status.notes:
        yield f"note     {note}"
    if status.runs:
        yield from _run_lines(status, status.runs[-1])


def clamped_lines(status: StoreStatus) -> Iterator[str]:
    """Values that float16 couldn't hold, in words; no line for none."""
    if status.clipped is not None:
        yield from clipped_lines(status.clipped, status.ok, status.levels, "" if status.is_counted else "about ")
    elif float16_levels(status.levels):
        yield f"no value beyond float16's range in a sample of {MAX_RECORDS:,} tasks; of the others it isn't known"


def state_in_words(status: str, runs: Sequence[RunStatus]) -> str:
    """Complete, being written, or stopped, and how to go on."""
    if status == "complete":
        return "complete"
    if not runs:
        return "not started: it has metadata, and no run"
    run = runs[-1]
    if run.ended:
        was = "was stopped" if run.ended == "stopped" else "failed"
        return (
            f"unfinished; its last run ({run.run_id}, on {run.settings['host']}) {was} {duration(run.silent_s)} ago. "
            "The same command continues"
        )
    if run.silent_s <= SILENT_AFTER_S:
        return f"being written by run {run.run_id}"
    return (
        f"unfinished; its last run ({run.run_id}, on {run.settings['host']}) has been silent for {duration(run.silent_s)}. "
        "If it is dead, the same command continues"
    )


def _run_lines(status: StoreStatus, run: RunStatus) -> Iterator[str]:
    workers = run.workers
    yield (
        f"last run {run.run_id} on {run.settings['host']}: {run.ok + run.failed:,} images, {run.images_per_s:.1f} images/s, "
        f"{workers.size} {workers.device} workers, batches of {workers.batch}"
    )
    if status.pending and run.images_per_s and not run.ended and run.silent_s <= SILENT_AFTER_S:
        yield f"left     {duration(status.pending / run.images_per_s)} at this rate"
    if run.stage_seconds:
        yield "workers  " + ", ".join(f"{stage} {share:.0%}" for stage, share in stage_shares(run.stage_seconds).items())
        yield f"         {bottleneck(run)}"
    for error in run.errors:
        yield f"error    {error}"


def bottleneck(run: RunStatus) -> str:
    """What took most of the workers' time, in words; empty before the first task is finished."""
    shares = stage_shares(run.stage_seconds)
    if not shares:
        return ""
    stage = max(shares, key=shares.__getitem__)
    most = "most" if shares[stage] > 0.5 else "the largest part"
    said = f"{most} of the time ({shares[stage]:.0%}) goes to {BOTTLENECKS.get(stage, stage)}"
    second = max((name for name in shares if name != stage), key=shares.__getitem__, default=stage)
    if second != stage and shares[second] >= 0.15:
        said += f". Another {shares[second]:.0%} goes to {BOTTLENECKS.get(second, second)}"
    return said


def failure_lines(groups: Sequence[FailureGroup], rows: int) -> Iterator[str]:
    """Failed images by reason, a few keys each."""
    failed = sum(group.count for group in groups)
    yield (f"{failed:,} of {rows:,} images failed, for {len(groups)} reasons" if groups else f"none of {rows:,} images failed")
    for group in groups:
        more = ", ..." if group.count > len(group.keys) else ""
        yield f"{group.count:>9,} x {group.stage}: {group.error}: {group.message}"
        yield f"{'':>12}{', '.join(map(printable_name, group.keys))}{more}"


def failures(store: FeatureStore) -> list[FailureGroup]:
    """What failed so far, grouped by reason, the commonest first."""
    return group_failures(store.failed_rows(REASON_COLUMNS))


@dataclass(frozen=True, kw_only=True)
class LevelStatus:
    """What is stored of a level, and how much of it."""

    name: str
    shape: str
    dtype: str
    method: str
    cell: str
    "how many input pixels lie between cells"
    row_bytes: int
    stored_bytes: int
    ratio: float
    "of what is stored to what it would be without compression"


def level_rows(store: FeatureStore, status: StoreStatus) -> list[LevelStatus]:
    """One for each level."""
    return [
        LevelStatus(
            name=level.name,
            shape=" x ".join(str(n) for n in level.row_shape),
            dtype=level.dtype,
            method=level.method,
            cell=f"{level.step[0]:g} x {level.step[1]:g} px" if level.step else "whole image",
            row_bytes=level.row_bytes,
            stored_bytes=status.stored_bytes[level.name],
            ratio=status.stored_bytes[level.name] / max(1, level.row_bytes * status.ok),
        )
        for level in store.spec.levels
    ]


def row_lines(store: FeatureStore, status: StoreStatus, first: int) -> Iterator[str]:
    """What a row is, and the first few rows."""
    spec = store.spec
    size = f"{spec.input_size[0]} x {spec.input_size[1]} px"
    yield f"{status.out}: {status.rows:,} rows, {state_in_words(status.status, status.runs)}"
    yield f"model    {spec.model}, {spec.weights_source} weights, sha256 {spec.weights[:12]}..."
    yield f"input    {size}, {spec.geometry}, {spec.interpolation}, {spec.precision}"
    blocks = ", ".join(map(str, spec.layers))
    yield f"features {spec.facet} of block {blocks}{', normed' if spec.norm else ''}, stride {spec.stride} px"
    yield ""
    levels = level_rows(store, status)
    wide = max(8, *(len(row.name) for row in levels))
    head = f"{'row':<16} {'stored as':<9} {'cell':<14} {'method':<10} {'a row':>10} {'all rows':>10} {'of raw':>7}"
    yield f"{'level':<{wide}} {head}"
    for row in levels:
        yield (
            f"{row.name:<{wide}} {row.shape:<16} {row.dtype:<9} {row.cell:<14} {row.method:<10} "
            f"{size_text(row.row_bytes):>10} {size_text(row.stored_bytes):>10} {row.ratio:>7.0%}"
        )
    yield ""
    yield f"{'row':>8}  {'photo px':<12} {'status':<8} key"
    rows = np.arange(min(first, status.rows))
    records = store.records(rows, ["row", "status", "width", "height", "conversion", "clipped"])
    # A row that is not written yet has a key in the index only.
    keys = store.index.take(rows, ["key"])["key"]
    for record, key in zip(records.to_pylist(), keys.to_pylist(), strict=True):
        pixels = f"{record['width']} x {record['height']}" if record["width"] else ""
        clamped = f"{record['clipped']:,} values clamped" if record["clipped"] else ""
        said = ", ".join(filter(None, (record["conversion"], clamped)))
        note = f"  ({said})" if said else ""
        yield f"{record['row']:>8}  {pixels:<12} {record['status'] or 'pending':<8} {printable_name(key)}{note}"
    if len(rows) < status.rows:
        yield f"     ...  {status.rows - len(rows):,} more"
