"""Counters of a worker, exported by Ray's metrics agent as `ray_raylift_*`."""

from collections.abc import Mapping
from typing import Any


class WorkerMetrics:
    """Make one per actor, inside it."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter

        self._rows = Counter("raylift_rows", "images that were accounted for", tag_keys=("status",))
        self._bytes = Counter("raylift_bytes", "bytes read and written", tag_keys=("direction",))
        self._seconds = Counter("raylift_stage_seconds", "worker time", tag_keys=("stage",))
        self._tasks = Counter("raylift_tasks", "tasks that ended", tag_keys=("outcome",))

    def count(self, report: Mapping[str, Any]) -> None:
        outcome = "error" if "error" in report else "set_aside" if "set_aside" in report else "done"
        self._tasks.inc(1, {"outcome": outcome})
        if outcome != "done":
            return
        for status in ("ok", "failed"):
            self._add(self._rows, report[status], {"status": status})
        self._add(self._bytes, report["bytes_read"], {"direction": "read"})
        self._add(self._bytes, report["bytes_written"], {"direction": "written"})
        for stage, value in report["seconds"].items():
            self._add(self._seconds, value, {"stage": stage})

    @staticmethod
    def _add(counter: Any, value: float, tags: dict[str, str]) -> None:
        if value > 0:
            counter.inc(value, tags)
