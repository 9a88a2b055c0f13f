"""What a worker's overlapping calls do when: images are loaded ahead, one task's batches after another's go to the device, and
rows are encoded and written behind it. How much of each there may be at once is declared (`Lanes`). Needs no torch.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

Batch = TypeVar("Batch")
Done = TypeVar("Done")

WRITING_BYTES = 2 * 2**30
"""Rows that the worker of a GPU may hold until they are written: at 80 MB/s for a stream to S3, 13 tasks of 150 MB are 1 GB/s."""

MOST_WRITING = 16
"""Tasks that may hold rows, however small these are: each is a connection to the storage."""


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """How much of a worker's work may be at a stage at once, which is what bounds its memory."""

    images: int = 2
    "tasks that hold images: the one that is on the device, and those that are read and decoded meanwhile"
    rows: int = 2
    "tasks that hold rows: the one that is on the device, and those that are encoded and written meanwhile"
    batches: int = 2
    "batches that were given to the device and whose rows haven't come back: one is computed while another is on its way"
    encoding: int = 3
    "batches whose rows are encoded, in so many threads"
    calls: int = 2
    "tasks that overlap"


def lanes_for(device: str, block_bytes: int) -> Lanes:
    """Those of a worker whose tasks have so many bytes of rows.

    On a GPU as many tasks are written at once as `WRITING_BYTES` hold, since to write one takes several times as long there as to
    compute it; a CPU computes longer than anyone writes.
    """
    if device != "cuda":
        return Lanes()
    # Three tasks' images: one's are decoded while the next one's are still on their way from the storage.
    images, rows = 3, min(max(2, WRITING_BYTES // block_bytes), MOST_WRITING)
    # The task on the device holds both.
    return Lanes(images=images, rows=rows, calls=images + rows - 1)


class Lane:
    """Places at a stage, which counts how many were taken at most."""

    def __init__(self, places: int):
        self._free = threading.Semaphore(places)
        self._lock = threading.Lock()
        self.taken = self.most = 0

    def take(self) -> None:
        """Wait for a place."""
        self._free.acquire()
        with self._lock:
            self.taken += 1
            self.most = max(self.most, self.taken)

    def give(self) -> None:
        """Leave one's place to others."""
        with self._lock:
            self.taken -= 1
        self._free.release()


class Schedule:
    """Lets the calls of a worker through: each is a thread that does a task within `call`, and its batches in `compute`."""

    def __init__(self, lanes: Lanes):
        self.images, self.rows, self.batches = Lane(lanes.images), Lane(lanes.rows), Lane(lanes.batches)
        self._device = threading.Lock()
        self._mine = threading.local()
        self._followers = ThreadPoolExecutor(lanes.encoding, "follower")

    @contextmanager
    def call(self) -> Iterator[None]:
        """One task from its images to its commit. Waits until it may hold images."""
        self._mine.lanes = set()
        self._take(self.images)
        try:
            yield
        finally:
            for lane in list(self._mine.lanes):
                self._give(lane)

    def _take(self, lane: Lane) -> None:
        lane.take()
        self._mine.lanes.add(lane)

    def _give(self, lane: Lane) -> None:
        self._mine.lanes.discard(lane)
        lane.give()

    def compute(
        self, batches: Iterator[Batch], wait_for: Callable[[Batch], object], finish: Callable[[Batch], Done]
    ) -> list[Done]:
        """What `finish` gives of each of a task's batches, once it was waited for; both in other threads, while the next batches
        are given to the device: `batches` does so as it is asked for one. Afterwards the task holds rows, and no images.

        Of several calls one at a time gives batches, which costs the device nothing: it is behind, and works on what it has.
        Raises what any of them raises; then nothing of the task's is under way any more.
        """
        following: list[Future[Done]] = []
        try:
            with self._device:
                self._take(self.rows)
                while True:
                    self.batches.take()
                    try:
                        batch = next(batches)
                    except StopIteration:
                        self.batches.give()
                        break
                    except BaseException:
                        self.batches.give()
                        raise
                    following.append(self._followers.submit(self._follow, batch, wait_for, finish))
            self._give(self.images)
            return [each.result() for each in following]
        finally:
            wait(following)

    def _follow(self, batch: Batch, wait_for: Callable[[Batch], object], finish: Callable[[Batch], Done]) -> Done:
        try:
            wait_for(batch)
        finally:
            self.batches.give()
        return finish(batch)
