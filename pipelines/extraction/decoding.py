"""Threads that decode a task's images, and may be left behind by those who wait for them."""

import threading
from collections.abc import Callable, Sequence
from multiprocessing import TimeoutError as PoolTimeout
from multiprocessing.pool import ThreadPool
from typing import TypeVar

from storage.errors import RayliftError

T = TypeVar("T")
R = TypeVar("R")


class DecodeStuck(RayliftError):
    """An image's decoding doesn't end."""

    exit_code = 1


class DecodeThreads:
    """A pool of threads, shared by the calls that overlap in a worker.

    A thread in native code can't be ended. One that hangs is left behind with its pool; being a daemon, it doesn't keep the
    process from ending.
    """

    def __init__(self, threads: int):
        self._threads = threads
        self._lock = threading.Lock()
        self._pool = ThreadPool(threads)

    def map(self, function: Callable[[T], R], items: Sequence[T], seconds: float) -> list[R]:
        """`function` of all `items`, in order. Raises `DecodeStuck` where a result isn't there `seconds` after the one before."""
        left = threading.Event()
        pool = self._pool
        results = pool.imap(lambda item: None if left.is_set() else function(item), items)
        done: list[R] = []
        try:
            for _ in items:
                done.append(results.next(timeout=seconds))  # noqa: PERF401 - each has a time limit
        except PoolTimeout:
            left.set()
            with self._lock:
                if self._pool is pool:
                    self._pool = ThreadPool(self._threads)
            raise DecodeStuck(f"image {len(done)} of {len(items)} has been decoded for {seconds:g} s") from None
        return done
