"""One attempt at a task, but for the computing: its marker, its ledger rows, its shards and commit. Needs no torch."""

import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pyarrow as pa

from cluster.metrics import TaskReport
from pipelines.executors import Loaded, WorkerBroken
from storage.ledger import SampleRecord
from storage.paths import Folder
from storage.samples import SampleIndex
from storage.spec import ShardTask
from storage.writer import BlockWriter


@contextmanager
def attempt(folder: Folder, run_id: str, task: ShardTask) -> Iterator[int]:
    """Leave a marker while the task runs; yields how many starts of it ended without removing theirs, this one included.

    Markers belong to one run: a killed driver's tasks are counted anew in the next one. `WorkerBroken` is the worker's death, and
    leaves them.
    """
    markers = f"runs/{run_id}/attempts/{task.block:08d}"
    name = f"{markers}/{uuid.uuid4().hex}"
    folder.write(name, b"")
    survives = True
    try:
        yield len(folder.sizes(markers))
    except WorkerBroken:
        survives = False
        raise
    finally:
        if survives:
            folder.remove([name])
            folder.remove_empty(markers)


EARLIER_RUNS = 3
"""Runs before this one whose markers are looked at."""


def suspects(folder: Folder, pending: Iterable[int]) -> frozenset[int]:
    """Blocks among `pending` that were under way when an earlier run died.

    That condemns none of them, since whoever killed that run did so to all; but one may hold the image that did it.
    """
    found = set()
    for run in folder.folders("runs")[-EARLIER_RUNS:]:
        blocks = {int(name) for name in folder.folders(f"runs/{run}/attempts") if name.isdecimal()}
        found |= {block for block in blocks.intersection(pending) if folder.sizes(f"runs/{run}/attempts/{block:08d}")}
    return frozenset(found)


def ledger_records(index: SampleIndex, task: ShardTask, rows: pa.Table) -> list[SampleRecord]:
    """Ledger rows of a task before its images are read; those without a readable image already failed."""
    records = []
    for number, row in enumerate(rows.to_pylist(), task.first):
        source = index.sources[row["source"]].url
        record = SampleRecord(
            row=number, key=row["key"], source=source, member=row["member"], offset=row["offset"], size=row["size"]
        )
        records.append(failed(record, "index", "Unreadable", row["problem"]) if row["problem"] else record)
    return records


def failed(record: SampleRecord, stage: str, error: str, message: str) -> SampleRecord:
    """The record of a sample that failed."""
    return replace(record, status="failed", stage=stage, error=error, message=message[:500])


def write_and_commit(task: ShardTask, writer: BlockWriter, loaded: Loaded) -> TaskReport:
    """Write a task's shards whole and declare it done; returns its report, which leaves out the rows that were done before."""
    t0 = time.perf_counter()
    records = [
        replace(record, clipped=int(writer.clipped[i])) if writer.clipped[i] else record
        for i, record in enumerate(loaded.records)
    ]
    records[: len(writer.begun)] = writer.begun.records
    objects = writer.write()
    writer.commit(records, objects)
    loaded.seconds["write"] = time.perf_counter() - t0
    records = records[len(writer.begun) :]
    n_failed = sum(record.status == "failed" for record in records)
    return TaskReport(
        block=task.block,
        ok=len(records) - n_failed,
        failed=n_failed,
        clipped=sum(record.clipped > 0 for record in records),
        seconds=loaded.seconds,
        bytes_read=loaded.bytes_read,
        bytes_written=sum(objects.values()),
    )
