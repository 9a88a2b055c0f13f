"""Progress that tells the truth: a live table on a terminal, one line every 30 s elsewhere."""

import contextlib
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from cluster.repeated import every

logger = logging.getLogger(__name__)

LINE_INTERVAL_S = 30.0


@dataclass
class Progress:
    """Counts of one run, in rows (images). `add` after every finished task; use as a context manager."""

    total: int
    done: int = 0
    "rows that were finished before this run"
    failed: int = 0
    ok: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    "worker seconds per stage, summed over workers"
    started: float = field(default_factory=time.monotonic)
    note: str = "starting workers"

    def __post_init__(self) -> None:
        self._console = Console(file=sys.stderr)
        self._begun: float | None = None  # when the first task to be finished was begun

    def __enter__(self) -> "Progress":
        self._shown: contextlib.AbstractContextManager[object]
        if self._console.is_terminal:
            self._shown = Live(get_renderable=self._render, console=self._console, refresh_per_second=2, transient=False)
        else:
            self._shown = every(LINE_INTERVAL_S, self._log_line, "progress lines")
        self._shown.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._shown.__exit__(None, None, None)
        if not self._console.is_terminal:
            self._log_line()

    def add(self, ok: int, failed: int, seconds: Mapping[str, float]) -> None:
        """Count one finished task."""
        if self._begun is None:
            self._begun = max(self.started, time.monotonic() - sum(seconds.values()))
            self.note = "running"
        self.ok += ok
        self.failed += failed
        for stage, value in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value

    @property
    def rate(self) -> float:
        """Rows per second since the first task was begun: without the workers' start, and with what all of them did
        before the first ones were finished, which they are at about the same time."""
        begun = self.started if self._begun is None else self._begun
        return (self.ok + self.failed) / max(time.monotonic() - begun, 1e-9)

    @property
    def eta_s(self) -> float | None:
        left = self.total - self.done - self.ok - self.failed
        return left / self.rate if self.ok + self.failed else None

    def shares(self) -> dict[str, float]:
        """Each stage's part of the workers' time."""
        return stage_shares(self.seconds)

    def line(self) -> str:
        """The state in one line."""
        finished = self.done + self.ok + self.failed
        eta = f", {duration(self.eta_s)} left" if self.eta_s else ""
        stages = " ".join(f"{stage} {share:.0%}" for stage, share in self.shares().items())
        where = f" | {stages}" if stages else f" | {self.note}, {duration(time.monotonic() - self.started)}"
        return f"{finished:,} of {self.total:,} images, {self.failed:,} failed, {self.rate:.1f}/s{eta}{where}"

    def _log_line(self) -> None:
        logger.info("%s", self.line())

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 2))
        finished = self.done + self.ok + self.failed
        table.add_row("done", f"{finished:,} of {self.total:,}", "failed", f"{self.failed:,}")
        eta = duration(self.eta_s) if self.eta_s is not None else self.note
        table.add_row("rate", f"{self.rate:.1f} images/s", "left", eta)
        shares = Table.grid(padding=(0, 1))
        for stage, share in self.shares().items():
            shares.add_row(stage, ProgressBar(total=1.0, completed=share, width=30), f"{share:.0%}")
        return Group(ProgressBar(total=self.total, completed=finished, width=60), table, shares)


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
