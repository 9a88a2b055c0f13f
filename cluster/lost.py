"""Noticing that a process of this machine's own Ray has died, which Ray answers by aborting the driver, without a word."""

import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

logger = logging.getLogger(__name__)

EXIT_CODE = 1

_LET_IT_END_S = 1.0
"""How long SIGTERM to all processes of a job may take to reach this one, too, which then ends in order."""


@contextmanager
def ending_with(processes: Mapping[int, str]) -> Iterator[None]:
    """Within the block, the death of one of `processes` (ids and what they are called) ends this program, with a sentence and
    `EXIT_CODE`: nothing that waits for Ray comes back then, and some of it aborts. What is written of stores stays as after any
    kill."""
    with ExitStack() as opened:
        watched: dict[int, str] = {}
        for pid, name in processes.items():
            try:
                file = os.pidfd_open(pid)
            except (AttributeError, OSError):  # no Linux, or gone already, of which Ray itself will speak
                logger.debug("process %d (%s) isn't watched", pid, name)
                continue
            opened.callback(os.close, file)
            watched[file] = name
        if not watched:
            yield
            return
        stop, stopped = os.pipe()
        opened.callback(os.close, stop)
        thread = threading.Thread(target=_watch, args=(watched, stop), name="ray-processes", daemon=True)
        thread.start()
        try:
            yield
        finally:
            os.close(stopped)
            thread.join()


def _watch(watched: Mapping[int, str], stop: int) -> None:
    ready = _readable([*watched, stop])
    if stop in ready:
        return
    if _readable([stop], _LET_IT_END_S) or signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        return
    sys.stderr.write(
        f"ClusterError: {watched[ready[0]]} has died (killed, perhaps for memory), and nothing goes on without it. Finished work "
        "is kept; the same command continues.\n"
    )
    sys.stderr.flush()
    # Not through the main thread, which may be inside of what waits for that process.
    os._exit(EXIT_CODE)


def _readable(files: Sequence[int], seconds: float | None = None) -> list[int]:
    """Wait until there are some. `select.select` refuses numbers above 1023, which a program with many open files gives."""
    poll = select.poll()
    for file in files:
        poll.register(file, select.POLLIN)
    return [file for file, _ in poll.poll(None if seconds is None else 1000 * seconds)]
