"""What a worker reports of a task, and its counters, exported by Ray's metrics agent as `ray_raylift_*`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ray.util.metrics import Counter


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """How a task ended, and what it took where it is done."""

    block: int
    outcome: Literal["done", "set_aside", "error", "replaced"] = "done"
    """`set_aside`: it is to run again, alone in a worker. `error`: it stays pending. `replaced`: so do all others, since the
    store is gone, or another's."""
    error: str = ""
    ok: int = 0
    "rows with features"
    failed: int = 0
    "rows without"
    clipped: int = 0
    "rows with values that their encoding couldn't hold"
    seconds: Mapping[str, float] = field(default_factory=dict)
    "by stage"
    bytes_read: int = 0
    bytes_written: int = 0
    batch: int = 0
    "images per forward at the end"
    marks: Mapping[str, float] = field(default_factory=dict)
    "what a benchmark's workers add: readings of their clocks, their process"


class WorkerMetrics:
    """Make one per actor, inside it."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter

        self._rows = Counter("raylift_rows", "images that were accounted for", tag_keys=("status",))
        self._bytes = Counter("raylift_bytes", "bytes read and written", tag_keys=("direction",))
        self._seconds = Counter("raylift_stage_seconds", "worker time", tag_keys=("stage",))
        self._tasks = Counter("raylift_tasks", "tasks that ended", tag_keys=("outcome",))

    def count(self, report: TaskReport) -> None:
        self._tasks.inc(1, {"outcome": "error" if report.outcome == "replaced" else report.outcome})
        self._add(self._rows, report.ok, {"status": "ok"})
        self._add(self._rows, report.failed, {"status": "failed"})
        self._add(self._bytes, report.bytes_read, {"direction": "read"})
        self._add(self._bytes, report.bytes_written, {"direction": "written"})
        for stage, value in report.seconds.items():
            self._add(self._seconds, value, {"stage": stage})

    @staticmethod
    def _add(counter: "Counter", value: float, tags: dict[str, str]) -> None:
        if value > 0:
            counter.inc(value, tags)
