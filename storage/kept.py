"""What was read or made last, kept in memory up to a number of bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Kept(Generic[K, V]):
    """The values used last by name, up to `at_most` bytes, each of `size(value)`; the last one also where it alone has more.

    Safe across threads.
    """

    def __init__(self, at_most: int, size: Callable[[V], int]):
        self._at_most, self._size = at_most, size
        self._kept: OrderedDict[K, V] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, name: K) -> V | None:
        """None where there is none, or none any more."""
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
            return self._kept.get(name)

    def put(self, name: K, value: V) -> None:
        """Keep `value`, in the place of one of that name."""
        with self._lock:
            self._drop(name)
            self._kept[name] = value
            self._bytes += self._size(value)
            while self._bytes > self._at_most and len(self._kept) > 1:
                self._drop(next(iter(self._kept)))

    def drop(self, name: K) -> None:
        """Forget a value, if there is one."""
        with self._lock:
            self._drop(name)

    def _drop(self, name: K) -> None:
        if name in self._kept:
            self._bytes -= self._size(self._kept.pop(name))
