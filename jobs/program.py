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
from storage.paths import redact

Parsed = TypeVar("Parsed", bound=tuple[Any, ...])

Errors = tuple[type[Exception], ...]

STOPPED, PIPE_CLOSED = 130, 141
"""Exit codes as a shell gives them to programs that an interrupt (SIGINT) or a closed pipe (SIGPIPE) ends."""


def run_program(
    argv: Sequence[str],
    parse: Callable[[Sequence[str]], Parsed],
    execute: Callable[..., int | None],
    *,
    wrong: Errors,
    failed: Errors = (),
    stopped: str = "stopped",
) -> int:
    """Parse `argv`, execute what was parsed (a tuple that ends with the settings), and return the exit code.

    `execute` returns one, or None for 0. Errors of `wrong` end with 2, those of `failed` with 1, each as one message without
    credentials; an interrupt ends with 130 and the words of `stopped`, and a reader that went away (`| head`) with 141.
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
    except wrong as error:
        return _say(error, options, 2)
    except failed as error:
        return _say(error, options, 1)
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return STOPPED
    except SystemExit:  # of --help, or of a flag that there isn't
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
            raise
        return _closed_pipe()
    return code


def _say(error: Exception, options: dict[str, Any], code: int) -> int:
    print(f"{type(error).__name__}: {redact(str(error), options)}", file=sys.stderr)
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
