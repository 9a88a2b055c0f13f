"""How every program here runs: a sentence and an exit code for what a person can act on, and a quiet end where nobody reads on.

A program is its settings, its presets, and one call of `run_program`.
"""

import contextlib
import difflib
import logging
import os
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

from pipelines.config import ConfigError
from storage.errors import RayliftError
from storage.paths import redact

Parsed = TypeVar("Parsed", bound=tuple[Any, ...])

PATH_ERRORS = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
"""Of the operating system, for a path that a person gave. Others (a full disk, a network that fails) aren't a setting's fault."""

STOPPED, PIPE_CLOSED = 130, 141
"""Exit codes as a shell gives them to programs that an interrupt (SIGINT) or a closed pipe (SIGPIPE) ends."""


def run_program(
    argv: Sequence[str],
    parse: Callable[[Sequence[str]], Parsed],
    execute: Callable[..., int | None],
    *,
    stopped: str = "stopped",
) -> int:
    """Parse `argv`, execute what was parsed (a tuple that ends with the settings), and return the exit code.

    `execute` returns one, or None for 0. A `RayliftError` ends with the code of its class, and a path that can't be used with
    2, each as one message without credentials; an interrupt ends with 130 and the words of `stopped`, and a reader that went
    away (`| head`) with 141.
    """
    log_to_stderr()
    options: dict[str, Any] = {}
    try:
        parsed = parse(argv)
        options = getattr(parsed[-1], "options", {})
        code = execute(*parsed) or 0
        sys.stdout.flush()
    except BrokenPipeError:
        return _closed_pipe()
    except (RayliftError, *PATH_ERRORS) as error:
        print(f"{type(error).__name__}: {redact(str(error), options)}", file=sys.stderr)
        return error.exit_code if isinstance(error, RayliftError) else RayliftError.exit_code
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return STOPPED
    except SystemExit:  # of --help, or of a flag that there isn't
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
            raise
        return _closed_pipe()
    return code


def _closed_pipe() -> int:
    # The interpreter flushes once more when it ends; what is left goes nowhere.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return PIPE_CLOSED


def log_to_stderr() -> None:
    """What the programs log, with the time."""
    form = "%(asctime)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, datefmt="%H:%M:%S", stream=sys.stderr)


def pick_word(args: list[str], names: Collection[str], missing: str = "nothing") -> str | None:
    """Take the leading word, one of `names`, off `args`; None if there is none.

    Raises `ConfigError` with the nearest name; `missing` is what there isn't of another (`no preset`).
    """
    if not args or args[0].startswith("-"):
        return None
    word = args.pop(0)
    if word not in names:
        near = difflib.get_close_matches(word, names, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"{missing} is called {word!r}. {hint}There are: {', '.join(names)}")
    return word
