"""The driver of the main job: run pending tasks, account for every sample, finish the store."""

import ctypes
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Literal, TypeVar

from cluster.metrics import TaskReport
from cluster.progress import Progress, stage_shares
from cluster.repeated import every
from cluster.resources import WorkerPool
from pipelines.executors import Executor
from pipelines.extraction.attempts import suspects
from pipelines.extraction.config import ExtractConfig
from pipelines.extraction.continued import changed_meanwhile
from pipelines.extraction.prepare import Prepared, default_batch, prepare, resolve
from pipelines.extraction.schedule import lanes_for
from pipelines.extraction.setup import WorkerSetup
from pipelines.features.model_bundle import ModelBundle
from pipelines.provenance import versions
from storage.errors import RayliftError
from storage.failures import REASON_COLUMNS, commonest_reasons
from storage.inputs import Listing
from storage.ledger import TornTasks
from storage.left_out import LeftOut, left_out_lines
from storage.paths import StorageError
from storage.root import StoreReplaced
from storage.spec import Level, ShardTask
from storage.store import FeatureStore
from storage.totals import Clipped, clipped_lines, clipping_advice, conversion_lines, float16_levels

logger = logging.getLogger(__name__)

Setup = TypeVar("Setup", bound=WorkerSetup)

SAVE_INTERVAL_S = 10.0
"""How often a run says how far it is, where `jobs/show.py status` finds it."""


class RunFailed(RayliftError):
    """The run ended without a complete store, or with more failures than the budget allows."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How a run ended."""

    out: str
    run_id: str
    ok: int
    failed: int
    this_run: int
    "rows finished by this run"
    seconds: float
    start_up_s: float
    "until the first task was finished"
    stage_seconds: Mapping[str, float]
    reasons: Sequence[str]
    bytes_written: int
    left_out: Mapping[str, LeftOut]
    "what the input holds that is no row, by reason"
    clipped: Clipped | None
    "values that float16 couldn't hold; None: an earlier version completed the store"
    conversions: Mapping[str, int]
    "images by what was done to them beyond decoding"
    levels: Sequence[Level]

    def lines(self) -> Iterator[str]:
        """What became of the images, and how fast."""
        yield f"{self.out}: {self.ok:,} images ok, {self.failed:,} failed"
        yield from (f"  {reason}" for reason in self.reasons)
        yield from (f"  left out of the input: {line}" for line in left_out_lines(self.left_out))
        yield from (f"  converted: {line}" for line in conversion_lines(self.conversions))
        yield from (f"  {line}" for line in self._clipped_lines())
        if self.this_run:
            stages = ", ".join(f"{stage} {share:.0%}" for stage, share in stage_shares(self.stage_seconds).items())
            yield (
                f"this run: {self.this_run:,} images in {self.seconds:.1f} s (first task after {self.start_up_s:.1f} s), "
                f"{self.bytes_written / 1e6:.1f} MB written; worker time: {stages}"
            )

    def _clipped_lines(self) -> Iterator[str]:
        if self.clipped is not None:
            yield from clipped_lines(self.clipped, self.ok, self.levels)
        elif float16_levels(self.levels):
            yield "values beyond float16's range weren't counted when the store was completed; jobs/show.py status does it"


def extract(config: ExtractConfig, executor: Executor) -> Summary:
    """Run the extraction that `config` describes, from where an earlier run stopped.

    Raises what `resolve` and `prepare` raise, `ClusterError`, `FingerprintMismatch`, and `RunFailed` when tasks stay
    unfinished or the failure budget is spent.
    """
    return run_prepared(prepare(resolve(config, executor=executor), executor), executor)


def lines(config: ExtractConfig, files: Listing, executor: Executor) -> Iterator[str]:
    """`extract` or its plan, for files that were listed already, and what there is to say of it, line by line."""
    prepared = prepare(resolve(config, files, executor), executor)
    if not config.plan:
        yield from run_prepared(prepared, executor).lines()
        return
    from pipelines.extraction.plan import make_plan  # it imports torch

    plan = make_plan(prepared)
    prepared.keep_index()
    if config.json:
        yield json.dumps(plan.to_json(), indent=1)
    else:
        yield plan.describe()
        yield "nothing was run (the index of the input is kept with the output); drop --plan to start"


@contextmanager
def failing_where_replaced() -> Iterator[None]:
    """A store that is replaced by another one while a run writes it ends the run with `RunFailed`."""
    try:
        yield
    except StoreReplaced as error:
        raise RunFailed(str(error)) from None


@failing_where_replaced()
def run_prepared(prepared: Prepared, executor: Executor) -> Summary:
    """`extract` for an input that is already indexed and a model that is loaded."""
    _give_back_memory()
    store = prepared.create_store()
    setup, pool = begin_run(
        WorkerSetup,
        store,
        prepared.config,
        prepared.pool,
        store.spec.row_bytes,
        bundle=prepared.bundle,
        input_digest=prepared.input_digest,
        urls=prepared.urls,
    )
    done = _done(store)
    if prepared.config.retry_failed:
        done -= _revoke_failed(store, prepared.input_digest)
    pending = store.pending(done)
    if pending:
        store.set_writing(prepared.input_digest)
    elif store.status == "complete":
        logger.info("%s is complete; nothing to do", store.folder.displayed)
    setup = replace(setup, suspects=suspects(store.folder, pending.blocks))
    rows_done = sum(store.layout.task(block).n_rows for block in done) + store.ledger.begun_rows()
    run = Run(store, setup, executor, pool, rows_done=rows_done)
    with run.noting_its_end():
        run.do(pending)
        try:
            return run.finish(prepared.left_out, earlier=done)
        except TornTasks as torn:
            logger.warning("%s", torn)
            store.revoke(torn.reasons)
            pending = store.layout.tasks(sorted(torn.reasons))
            run.progress.done -= sum(task.n_rows for task in pending)
            run.do(pending)
            return run.finish(prepared.left_out)


def _give_back_memory() -> None:
    """Give the system what the driver no longer holds, and glibc would keep: the model, and the arrays that workers have."""
    with suppress(AttributeError, OSError):  # of other C libraries
        ctypes.CDLL(None).malloc_trim(0)


def begin_run(
    make_setup: Callable[..., Setup],
    store: FeatureStore,
    config: ExtractConfig,
    pool: WorkerPool,
    row_bytes: int,
    *,
    bundle: ModelBundle,
    input_digest: str,
    urls: tuple[str, ...],
) -> tuple[Setup, WorkerPool]:
    """What a run's workers get, which is written into the store before its first task, and the pool with the calls that overlap
    in each; `row_bytes`: of what they hold of a row until it is written."""
    lanes = lanes_for(pool.device, row_bytes * store.layout.block_rows)
    setup = make_setup(
        config=config,
        bundle=bundle,
        fingerprint=store.root.fingerprint,
        input_digest=input_digest,
        urls=urls,
        # In the order of their names, runs are in that of their times: the last one's settings and rates are looked for.
        run_id=f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{uuid.uuid4().hex[:6]}",
        device=pool.device,
        share=pool.gpu_share,
        threads=pool.cpus,
        batch=default_batch(config, store.layout, pool.device),
        lanes=lanes,
    )
    pool = replace(pool, calls=lanes.calls)
    _write_run_json(store, setup, pool)
    return setup, pool


def _write_run_json(store: FeatureStore, setup: WorkerSetup, pool: WorkerPool) -> None:
    document = {
        "run_id": setup.run_id,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": setup.config.public(),
        "workers": asdict(pool) | {"batch": setup.batch},
        "fingerprint": store.root.fingerprint,
        "weights_sha256": store.spec.weights,
        "versions": versions(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    store.folder.write(f"runs/{setup.run_id}/run.json", json.dumps(document, indent=1).encode())


def _done(store: FeatureStore) -> set[int]:
    """Blocks that have a commit record. Whether those are whole is seen when they are merged, once all are there."""
    names = store.ledger.commits.names()
    if strangers := store.ledger.commits.strangers(names):
        logger.warning("ledger/commits holds what is no record of this store; it is left alone: %s", strangers[:10])
    return store.ledger.done(store.ledger.commits.listed(names))


def _revoke_failed(store: FeatureStore, input_digest: str) -> set[int]:
    """Make tasks with failed rows pending again; returns their blocks."""
    blocks = store.ledger.unfinished(sorted(store.ledger.listed()))
    if blocks:
        # First, so that a crash in between leaves a store that says it's unfinished.
        store.set_writing(input_digest)
        store.revoke(sorted(blocks))
        logger.info("%d tasks have failed rows and run again", len(blocks))
    return blocks


class Run:
    """A run over pending tasks of a store, to its finish."""

    def __init__(self, store: FeatureStore, setup: WorkerSetup, executor: Executor, pool: WorkerPool, rows_done: int):
        self.config, self.store, self.setup, self.executor, self.pool = setup.config, store, setup, executor, pool
        self.progress = Progress(total=store.layout.n_rows, done=rows_done)
        self.errors: list[str] = []
        self.replaced = ""
        "how the heartbeat found the store gone or replaced"
        self.ended: Literal["", "stopped", "failed"] = ""
        self.has_begun = False
        "there was a task to be done"
        self.bytes_written = 0
        self.start_up_s = 0.0
        self.finished_tasks = 0
        self.has_clipped = False
        "a warning of clamped values was given"

    def do(self, pending: Sequence[ShardTask]) -> None:
        """`execute`, and hold the input against what was read. Raises `RunFailed` where it changed meanwhile."""
        self.execute(pending)
        if pending and not self.errors and (changes := changed_meanwhile(self.config, self.store, self.executor)):
            raise RunFailed(
                f"{self.store.folder.displayed}: the input changed while it was read:\n  " + "\n  ".join(changes[:10]) + "\n"
                "Finished tasks are kept; the same command with --replace-changed extracts again what differs."
            )

    def execute(self, pending: Sequence[ShardTask]) -> None:
        """Run `pending`; tasks whose workers died, hung or ran out of memory run again, alone."""
        if not pending:
            return
        self.has_begun = True
        # Also while no task is finished: a slow task must not look like a dead run.
        with self.progress, every(SAVE_INTERVAL_S, self._beat, "progress"):
            try:
                if aside := self._drain(pending, solo=False):
                    said = "%d tasks run again, one at a time: their workers died, hung, or had no memory"
                    logger.warning(said, len(aside))
                    stuck = self._drain([self.store.layout.task(block) for block in aside], solo=True)
                    self.errors += [f"task {block}: set aside twice" for block in stuck]
            except Exception:
                # Whatever it was goes on from here; but a store that was removed makes errors of all kinds, and is their reason.
                self.store.require_in_place()
                raise
        self._save_progress()

    def _drain(self, tasks: Sequence[ShardTask], *, solo: bool) -> list[int]:
        setup = replace(self.setup, solo=solo)
        aside: list[int] = []
        for report in self.executor.stream(setup, tasks, self.pool, "solo" if solo else self.config.decode_on):
            if self.replaced or report.outcome == "replaced":
                raise StoreReplaced(self.replaced or report.error)
            if report.outcome == "set_aside":
                aside.append(report.block)
            elif report.outcome == "error":
                self.errors.append(f"task {report.block}: {report.error}")
                if len(self.errors) >= max(3, 0.05 * self.finished_tasks):
                    raise RunFailed(self._errors_text("stopping, since tasks keep failing"))
            else:
                self._count(report)
        return aside

    def _count(self, report: TaskReport) -> None:
        if not self.finished_tasks:
            self.start_up_s = time.monotonic() - self.progress.started
        self.finished_tasks += 1
        self.bytes_written += report.bytes_written
        self.progress.add(report.ok, report.failed, report.seconds)
        if report.clipped and not self.has_clipped:
            self.has_clipped = True
            task = f"{report.clipped} of the {report.ok} images of task {report.block}"
            said = "%s have values beyond float16's range, which are clamped; all are counted at the end. %s"
            logger.warning(said, task, clipping_advice(self.store.spec.levels))
        seen, failed = self.progress.ok + self.progress.failed, self.progress.failed
        budget = self.config.max_failed_fraction * self.store.layout.n_rows
        if failed > budget and (failed > budget + 256 or (seen >= 256 and failed > seen / 2)):
            raise RunFailed(self._budget_text(f"{failed:,} of the first {seen:,} images failed"))

    def _beat(self) -> None:
        try:
            self._save_progress()
        except StoreReplaced as error:
            self.replaced = str(error)
        except (OSError, StorageError) as error:
            logger.warning("progress was not saved: %s", error)

    @contextmanager
    def noting_its_end(self) -> Iterator[None]:
        """Where the run ends before its store is complete, say so, so that nobody takes it for one that writes."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if self.has_begun:
                self.ended = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
                self._beat()
            raise

    def _save_progress(self) -> None:
        """Rates and stage times where `show` finds them, also from another machine. Raises `StoreReplaced`."""
        self.store.require_in_place()
        p = self.progress
        document = {
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
            "rows_total": p.total,
            "rows_before": p.done,
            "ok": p.ok,
            "failed": p.failed,
            "images_per_s": p.rate,
            "stage_seconds": p.seconds,
            "bytes_written": self.bytes_written,
            "errors": self.errors[-20:],
            "ended": self.ended,
        }
        self.store.folder.write(f"runs/{self.setup.run_id}/progress.json", json.dumps(document, indent=1).encode())

    def finish(self, left_out: Mapping[str, LeftOut], earlier: Collection[int] = ()) -> Summary:
        """Merge the ledger and check that everything adds up. Raises `RunFailed`, and `TornTasks` for tasks that have to run
        again, those of `earlier` runs whose shards aren't whole among them."""
        if self.errors:
            raise RunFailed(self._errors_text(f"{len(self.errors)} tasks did not finish"))
        counts = self.store.finalize(earlier)
        ok, failed = counts.get("ok", 0), counts.get("failed", 0)
        if ok + failed != self.store.layout.n_rows:
            raise RunFailed(
                f"{self.store.folder.displayed}: {ok} ok + {failed} failed rows, but {self.store.layout.n_rows} samples"
            )
        if failed > self.config.max_failed_fraction * self.store.layout.n_rows:
            raise RunFailed(self._budget_text(f"{failed:,} of {ok + failed:,} images failed"))
        return Summary(
            out=self.store.folder.displayed,
            run_id=self.setup.run_id,
            ok=ok,
            failed=failed,
            this_run=self.progress.ok + self.progress.failed,
            seconds=time.monotonic() - self.progress.started,
            start_up_s=self.start_up_s,
            stage_seconds=dict(self.progress.seconds),
            reasons=commonest_reasons(self.store.failed_rows(REASON_COLUMNS)) if failed else [],
            bytes_written=self.bytes_written,
            left_out=left_out,
            clipped=self.store.root.clipped,
            conversions=self.store.root.conversions or {},
            levels=self.store.spec.levels,
        )

    def _budget_text(self, what: str) -> str:
        reasons = "\n  ".join(commonest_reasons(self.store.failed_rows(REASON_COLUMNS)))
        return (
            f"{what}, more than the budget of {self.config.max_failed_fraction:.2%} (--max-failed-fraction). The commonest "
            f"reasons:\n  {reasons}\nWhat is written stays; the same command continues, --retry-failed tries the failed again."
        )

    def _errors_text(self, what: str) -> str:
        listed = "\n  ".join(self.errors[:5])
        return f"{what}:\n  {listed}\nFinished tasks are kept; run the same command again to continue."
