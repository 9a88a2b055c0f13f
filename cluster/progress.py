"""Progress that tells the truth: a live table on a terminal, one line every 30 s elsewhere."""

import contextlib
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from cluster.repeated import every

logger = logging.getLogger(__name__)

LINE_INTERVAL_S = 30.0

_TOGETHER = 0.05
"""Tasks that end within this part of the running time count as having ended together."""


@dataclass
class Progress:
    """Counts of one run, in rows (images) or what `unit` says. `add` after every finished task, or `reach`; use as a context
    manager. One in another (a grid's cell) says its lines, and leaves the terminal to that."""

    total: int
    done: int = 0
    "rows that were finished before this run"
    failed: int = 0
    ok: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    "worker seconds per stage, summed over workers"
    started: float = field(default_factory=time.monotonic)
    note: str = "none finished yet"
    unit: str = "images"
    said: str = ""
    "what else there is to say just now: the loss, another rate"

    _live: ClassVar[bool] = False
    "a terminal is in use"

    def __post_init__(self) -> None:
        self._console = Console(file=sys.stderr)
        self._begun = self.started  # once there are marks: when the first task to be finished was begun
        self._marks: list[_Mark] = []

    def __enter__(self) -> "Progress":
        self._shown: contextlib.AbstractContextManager[object]
        self._is_live = self._console.is_terminal and not Progress._live
        if self.done:
            left = self.total - self.done
            logger.info("%s", f"{self.done:,} of {self.total:,} {self.unit} are done already, {left:,} to go")
        if self._is_live:
            Progress._live = True
            self._shown = Live(get_renderable=self._render, console=self._console, refresh_per_second=2, transient=False)
        else:
            self._shown = every(LINE_INTERVAL_S, self._log_line, "progress lines")
        self._shown.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._shown.__exit__(None, None, None)
        if self._is_live:
            Progress._live = False
        else:
            self._log_line()

    def add(self, ok: int, failed: int = 0, seconds: Mapping[str, float] | None = None) -> None:
        """Count one finished task; `seconds` is how long it took, by stage, where that is known."""
        now, seconds = time.monotonic(), seconds or {}
        if not self._marks:
            self._begin(max(self.started, now - sum(seconds.values())) if seconds else self.started)
        self.ok += ok
        self.failed += failed
        for stage, value in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value
        self._mark(now)

    def reach(self, finished: int, said: str = "") -> None:
        """`finished` of the total are done now, those of earlier runs among them: fewer than before, where a part was lost."""
        self.said = said
        count = finished - self.finished
        if count < 0:
            self.done, self.ok, self.failed = finished, 0, 0
            self._begun = self.started = time.monotonic()
            self._marks = []
        elif count:
            self.add(count)

    def _begin(self, when: float) -> None:
        self._begun, self.note, self._marks = when, "running", [_Mark(when, when, 0)]

    def _mark(self, now: float) -> None:
        count, last = self.ok + self.failed, self._marks[-1]
        if last.count and now - last.first <= _TOGETHER * (now - self._begun):
            self._marks[-1] = _Mark(last.first, now, count)
        else:
            self._marks.append(_Mark(now, now, count))
        while len(self._marks) > 2 and self._marks[1].count <= count / 2:
            del self._marks[0]

    @property
    def finished(self) -> int:
        """Rows of the total that are finished, by this run and by earlier ones."""
        return self.done + self.ok + self.failed

    @property
    def rate(self) -> float:
        """Rows per second since the first task was begun: without the workers' start, and with what all of them did
        before the first ones were finished, which they are at about the same time."""
        return (self.ok + self.failed) / max(time.monotonic() - self._begun, 1e-9)

    @property
    def eta_s(self) -> float | None:
        """Seconds left, by the rate of the second half of what this run finished, and by when that ended: while a long task is
        under way, they become fewer. None before a task is finished, and where it takes longer than that."""
        if not self._marks:
            return None
        before, last = self._marks[0], self._marks[-1]
        left = self.total - self.finished
        seconds = left * (last.last - before.last) / max(1, last.count - before.count) - (time.monotonic() - last.last)
        return seconds if seconds >= 0 else None

    def line(self) -> str:
        """The state in one line."""
        before = f" ({self.done:,} before this run)" if self.done else ""
        eta = f", {duration(self.eta_s)} left" if self.eta_s else ""
        stages = " ".join(f"{stage} {share:.0%}" for stage, share in stage_shares(self.seconds).items())
        failed = f", {self.failed:,} failed" if self.failed or self.unit == "images" else ""
        where = self.said or stages or f"{self.note}, {duration(time.monotonic() - self.started)}"
        return f"{self.finished:,} of {self.total:,} {self.unit}{before}{failed}, {self._rate_text()}{eta} | {where}"

    def _rate_text(self) -> str:
        return f"{self.rate:.1f}/s" if self.rate >= 1 or not self.rate else f"{self.rate * 60:.1f}/min"

    def _log_line(self) -> None:
        logger.info("%s", self.line())

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 2))
        before = f" ({self.done:,} before)" if self.done else ""
        table.add_row("done", f"{self.finished:,} of {self.total:,} {self.unit}{before}", "failed", f"{self.failed:,}")
        late = "longer than expected" if self._marks else self.note
        eta = duration(self.eta_s) if self.eta_s is not None else late
        table.add_row("rate", self._rate_text(), "left", eta)
        shares = Table.grid(padding=(0, 1))
        for stage, share in stage_shares(self.seconds).items():
            shares.add_row(stage, ProgressBar(total=1.0, completed=share, width=30), f"{share:.0%}")
        bar = Table.grid()  # alone, it ends without a new line, and what follows sticks to it
        bar.add_row(ProgressBar(total=self.total, completed=self.finished, width=60))
        return Group(bar, table, *([self.said] if self.said else []), shares)


@dataclass(frozen=True)
class _Mark:
    """Tasks that ended at about the same time, and how many rows were finished then by this run."""

    first: float
    last: float
    count: int


def stage_shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Each stage's part of the time of all."""
    total = sum(seconds.values()) or 1.0
    return {stage: value / total for stage, value in seconds.items()}


def duration(seconds: float | None) -> str:
    """Seconds for people."""
    if seconds is None:
        return "?"
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02d} min" if hours else f"{m} min {s:02d} s" if m else f"{s} s"


def size_text(size: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return ""
