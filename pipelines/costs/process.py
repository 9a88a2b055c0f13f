"""What can be measured of this process without torch: its cores and its memory. Workers that load no model import it."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from storage.errors import RayliftError

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class BenchmarkFailed(RayliftError):
    """A measured process died, or results that must agree don't."""

    exit_code = 1


def peak_rss(run: Callable[[], object]) -> int | None:
    """The most resident memory of this process during a call, in bytes, all that was there before included.

    By Linux's own high-water mark, which is reset first; None where there is none, or it can't be reset.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    run()
    return high_water()


def high_water() -> int | None:
    """The most resident memory of this process since its start, or since the mark was reset; None where there is no mark."""
    with contextlib.suppress(OSError):
        marks = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
        return next((1024 * int(words[1]) for words in marks if words[0] == "VmHWM:"), None)
    return None
