"""How every program here runs: a sentence and an exit code for what a person can act on, and a quiet end where nobody reads on.

A program is its docstring, its presets, and one `Program` of them.
"""

import contextlib
import difflib
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NoReturn, TypeAlias, TypeVar

import tyro

from pipelines.config import ConfigError, JobConfig, require_numbers, settings_of
from pipelines.provenance import full_version
from storage.errors import RayliftError
from storage.lean_arrow import forget_pandas
from storage.redaction import redact
from storage.words import is_of_disk, printable, what_the_disk_says

Config = TypeVar("Config")

PIPE_CLOSED = 128 + signal.SIGPIPE
"""The exit code as a shell gives it to a program that a signal ends: here that of a reader that went away."""

ENDING = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end the work as an interrupt does: of schedulers, and of a terminal or connection that is gone."""


@dataclass(frozen=True, kw_only=True)
class Command(Generic[Config]):
    """What a program does with settings of one kind."""

    run: Callable[[Config], Iterable[str]]
    "does it, and gives what is to be printed, line by line as it comes"
    default: Config | type[Config] | None = None
    "the settings without a preset; their class where some must be given; None: one of the presets must be named"
    presets: Mapping[str, Config] = field(default_factory=dict)
    before: Mapping[str, Callable[[], None]] = field(default_factory=dict)
    "by preset: what makes the data that it needs"
    instead: Mapping[str, Callable[[Config], Iterable[str]]] = field(default_factory=dict)
    "by preset: what is done instead of `run`"
    start: Callable[[list[str], Config], Config] = lambda _, default: default
    "settings to start from, where flags name others than the default's; takes those flags away"
    about: str = ""
    "the text of --help; default: what the settings' class says of itself"


AnyCommand: TypeAlias = Command[Any]
"""One of several, each with settings of its own type."""


@dataclass(frozen=True, kw_only=True)
class Call(Generic[Config]):
    """A command line that was understood."""

    command: Command[Config]
    preset: str
    "its name, or nothing"
    config: Config

    def lines(self) -> Iterable[str]:
        """Do it; gives what is to be printed."""
        if self.preset in self.command.before:
            self.command.before[self.preset]()
        return self.command.instead.get(self.preset, self.command.run)(self.config)


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program of jobs/: its commands, by the first word of a command line, or one without such a word."""

    name: str
    doc: str
    commands: Mapping[str, AnyCommand]
    "by name: a word, and perhaps flags that make it another command wherever they stand; or one, called nothing"
    stopped: str = "stopped"
    "what an interrupt is answered with"
    aliases: Mapping[str, str] = field(default_factory=dict)
    "flags by other names that they may be given"
    earlier: Mapping[str, str] = field(default_factory=dict)
    "words with which command lines began in earlier versions, or none, and what they begin with now"
    pairs: bool = False
    "switches have both forms, --flag and --no-flag, whatever their default"

    def run(self, argv: Sequence[str]) -> int:
        """Do what `argv` says; returns the exit code.

        A `RayliftError` ends with the code of its class, and what the operating system says of a path or a disk with 2, each as
        one message without credentials, and so does a library that isn't installed; an interrupt ends with 130, SIGTERM with 143,
        SIGHUP with 129, and a reader that went away (`| head`) with 141.
        """
        open_closed_streams()
        forget_pandas()
        for stream in (sys.stdout, sys.stderr):
            # A name that the terminal's encoding lacks is no reason to end after hours of work.
            with contextlib.suppress(AttributeError):  # of what stands in for a stream in tests and notebooks
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        log_to_stderr()
        options: dict[str, object] = {}
        with _terminable() as ended_by:
            try:
                return self._run(argv, options)
            except RayliftError as error:
                return _say(f"{type(error).__name__}: {redact(str(error), options)}", error.exit_code)
            except OSError as error:
                if not is_of_disk(error):
                    raise
                return _say(redact(what_the_disk_says(error), options), RayliftError.exit_code)
            except ModuleNotFoundError as error:
                return _say(what_lacks(error), ConfigError.exit_code)
            except KeyboardInterrupt as interrupt:
                number = next((each for each in (*ended_by, *interrupt.args) if each in ENDING), signal.SIGINT)
                return _say(self.stopped, 128 + number)

    def _run(self, argv: Sequence[str], options: dict[str, object]) -> int:
        """Do what `argv` says, and print what comes of it. `options` become those of the storage, for messages of errors."""
        try:
            if "--version" in argv:
                lines: Iterable[str] = [full_version()]
            else:
                call = self.parse(argv)
                options |= getattr(call.config, "options", {})
                lines = call.lines()
            for line in lines:
                print(printable(line))
            sys.stdout.flush()
        except BrokenPipeError:
            _drop_output()
            return PIPE_CLOSED
        except SystemExit as ended:  # of --help, or of a flag that there isn't
            if ended.code == signal.SIGTERM:  # Ray's answer to it, wherever it was initialised again
                raise KeyboardInterrupt(signal.SIGTERM) from None
            try:
                sys.stdout.flush()
            except BrokenPipeError:
                _drop_output()
                return PIPE_CLOSED
            raise
        return 0

    def parse(self, argv: Sequence[str]) -> Call[Any]:
        """What `argv` asks for. Exits with a suggestion on unknown flags; raises `ConfigError` on unknown words."""
        args = [self._named(word) for word in argv]
        word, command = self._command(args)
        preset = ""
        if command.presets:
            preset = pick_word(args, command.presets, f"no preset of {word}" if word else "no preset") or ""
        named = command.presets.get(preset, command.default)
        if named is None:
            self._end_with_usage(args)
        default = command.start(args, named)
        kind = default if isinstance(default, type) else type(default)
        about, choice = command.about or kind.__doc__ or "", preset
        if command.presets and not preset:
            about, choice = f"{about}\nPresets: {', '.join(command.presets)}", "[PRESET]"
        config = tyro.cli(
            kind,
            args=args,
            prog=" ".join(filter(None, [f"python jobs/{self.name}.py", word, choice])),
            description=f"{about}\n--version says which Raylift this is.",
            config=() if self.pairs else (tyro.conf.FlagCreatePairsOff,),
            **({} if default is kind else {"default": default}),
        )
        if isinstance(config, JobConfig):
            config = config.noting(set(_given(args, type(config))))
        else:
            require_numbers(config)
        return Call(command=command, preset=preset, config=config)

    def _named(self, word: str) -> str:
        flag, equals, value = word.partition("=")
        return f"{self.aliases.get(flag, flag)}{equals}{value}"

    def _command(self, args: list[str]) -> tuple[str, AnyCommand]:
        """The command that `args` begin with, whose name is taken off them."""
        if "" in self.commands and args and args[0] not in self.commands:
            return "", self.commands[""]
        self._require_no_earlier(args)
        word = pick_word(args, self.commands)
        if word is None:
            self._end_with_usage(args)
        for name in filter(None, self.commands):
            first, *flags = name.split()
            if first == word and flags and set(flags) <= set(args):
                args[:] = [each for each in args if each not in flags]
                return name, self.commands[name]
        return word, self.commands[word]

    def _require_no_earlier(self, args: Sequence[str]) -> None:
        """Raises `ConfigError` with the words of today."""
        first = "" if not args or args[0].startswith("-") else args[0]
        if first in self.earlier and args and args[0] not in ("--help", "-h"):
            said = first or "a command line without a word"
            raise ConfigError(f"{said} is `python jobs/{self.name}.py {self.earlier[first]}` now, whose flags --help lists")

    def _end_with_usage(self, args: Sequence[str]) -> NoReturn:
        """Print what there is to choose from; it was asked for, or something lacks."""
        print(f"{self.doc}\nCommands and presets, each with --help; --version says which Raylift this is:")
        for name, command in self.commands.items():
            print(f"  {': '.join(filter(None, [name, ', '.join(command.presets)]))}")
        raise SystemExit(0 if "--help" in args or "-h" in args else 2)


def _given(args: Sequence[str], kind: type) -> Iterator[str]:
    """Names of the settings that flags say: `batch` of --batch 4 or --batch=4, `flip` of --no-flip, `cell.lr` of --cell.lr."""
    known = set(_names(kind))
    for word in args:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            switch = re.sub(r"(^|\.)no_(?=[^.]*$)", r"\1", name)
            if name in known:
                yield name
            elif switch in known:
                yield switch


def _names(kind: type) -> Iterator[str]:
    for name, setting in settings_of(kind).items():
        yield name
        if isinstance(setting.kind, type) and issubclass(setting.kind, JobConfig):
            yield from (f"{name}.{each}" for each in _names(setting.kind))


def open_closed_streams() -> None:
    """Give those of the three standard streams that the caller closed (`>&-`, a daemon's) to the null device: without it the next
    file that is opened takes the number, and what a library prints there is written into that file."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        mode = "w" if number else "r"
        null = open(os.devnull, mode)  # noqa: PTH123, SIM115 - open for good
        try:
            os.fstat(number)
        except OSError:
            os.dup2(null.fileno(), number)
        setattr(sys, name, null)


@contextlib.contextmanager
def _terminable() -> Iterator[list[int]]:
    """Within it, `ENDING` signals (of Slurm, Kubernetes, systemd, a lost connection) end the work as an interrupt does, so that
    what holds folders, workers and sessions lets go of them. A second one changes nothing: `timeout` and Slurm send several.
    One that is ignored (`nohup`) stays so.

    Yields which one came, if any: Ray makes an interrupt of its own of ours."""
    ended_by: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield ended_by  # only the main one may
        return

    def end(number: int, _: object) -> NoReturn:
        for each in ENDING:
            signal.signal(each, signal.SIG_IGN)
        ended_by.append(number)
        raise KeyboardInterrupt(number)

    before = {each: answer for each in ENDING if (answer := signal.getsignal(each)) is not signal.SIG_IGN}
    for each in before:
        signal.signal(each, end)
    try:
        yield ended_by
    finally:
        for each, answer in before.items():
            signal.signal(each, answer)


def _say(message: str, code: int) -> int:
    """Print why the program ends; returns `code`. What is still to be printed goes first, or nowhere on a full disk."""
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
    with contextlib.suppress(OSError):  # where the terminal is gone, too
        print(printable(message), file=sys.stderr)
    return code


def what_lacks(error: ModuleNotFoundError) -> str:
    """In one sentence: a library is missing, which an extra would have installed."""
    return f"ModuleNotFoundError: {error.name} isn't installed here; pip install 'raylift[all]' installs all that Raylift uses"


def _drop_output() -> None:
    # The interpreter flushes once more when it ends; what is left goes nowhere.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Printable(logging.Formatter):
    """Names from data sets may hold what terminals obey."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def log_to_stderr() -> None:
    """What the programs log, with the time."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in (
        "botocore",
        "aiobotocore",
        "boto3",
        "faiss",
    ):  # say, again and again, where credentials were found, what was loaded
        logging.getLogger(name).setLevel(logging.WARNING)


def pick_word(args: list[str], names: Collection[str], missing: str = "nothing") -> str | None:
    """Take the leading word, one of `names`, off `args`; None if there is none. Hyphens and underscores are alike: what some
    methods' names have, words have.

    Raises `ConfigError` with the nearest name; `missing` is what there isn't of another (`no preset`).
    """
    if not args or args[0].startswith("-"):
        return None
    word = args.pop(0)
    alike = {name.replace("-", "_"): name for name in names}
    word = word if word in names else alike.get(word.replace("-", "_"), word)
    if word not in names:
        near = difflib.get_close_matches(word, names, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"{missing} is called {word!r}. {hint}There are: {', '.join(names)}")
    return word
