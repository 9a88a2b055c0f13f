"""What Pillow warns of while one image is decoded, kept apart for each thread.

Filters of Python's warnings belong to the whole process, so that `warnings.catch_warnings` in several threads at once leaves
them in any state. Here the first decode installs one hook for Pillow's modules, which puts a warning into the list of the
thread that caused it, and the last one takes the hook away.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MOST = 1000
"""Warnings of one image that are kept: a file of 0.7 MB can cause 60,000."""

_lock = threading.Lock()
_users = 0
_saved = warnings.catch_warnings()
_here = threading.local()


@contextmanager
def decoder_warnings() -> Iterator[list[str]]:
    """Collects the texts of Pillow's warnings in this thread, in order, each once, and the first `MOST`. They are not printed.

    Not `DecompressionBombWarning`, which says nothing about the pixels that come.
    """
    texts: list[str] = []
    _enter()
    _here.texts, _here.seen = texts, set()
    try:
        yield texts
    finally:
        _here.texts = None
        _leave()


def _enter() -> None:
    global _users, _saved
    with _lock:
        if not _users:
            _saved = warnings.catch_warnings()
            _saved.__enter__()
            warnings.filterwarnings("always", category=UserWarning, module=r"PIL\.")
            show = warnings.showwarning

            def keep(message: Warning | str, *rest: Any, **named: Any) -> None:
                texts: list[str] | None = getattr(_here, "texts", None)
                if texts is None:
                    show(message, *rest, **named)
                elif len(texts) < MOST and str(message) not in _here.seen:
                    _here.seen.add(str(message))
                    texts.append(str(message))

            warnings.showwarning = keep
        _users += 1


def _leave() -> None:
    global _users
    with _lock:
        _users -= 1
        if not _users:
            _saved.__exit__(None, None, None)
