"""How programs end: errors of one base, exit codes, readers that go away."""

import ast
import errno
import importlib
import inspect
import io
import os
import pkgutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs.program import Command, Program
from pipelines import provenance
from pipelines.config import ConfigError
from storage import __version__
from storage.errors import RayliftError

ROOT = Path(__file__).parents[2]
JOBS = ("extract", "train", "evaluate", "tables", "show", "benchmark")

OTHERS = {
    "_AllSeen": "ends a model's forward that has gone far enough; caught where it was begun",
    "_PageGone": "ends what is computed for a page that nobody waits for any more; caught where it was asked for",
}
"""Exceptions without the base, and why: nobody outside their module sees them."""


def exceptions():
    for package in ("cluster", "jobs", "operators", "pipelines", "storage"):
        for found in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
            module = importlib.import_module(found.name)
            for name, kind in inspect.getmembers(module, inspect.isclass):
                if issubclass(kind, BaseException) and kind.__module__ == module.__name__:
                    yield name, kind


def test_all_errors_have_one_base_and_say_how_a_program_ends():
    found = dict(exceptions())

    assert {name for name, kind in found.items() if not issubclass(kind, RayliftError)} == set(OTHERS)
    failures = {name for name, kind in found.items() if issubclass(kind, RayliftError) and kind.exit_code == 1}
    assert failures == {
        "BenchmarkFailed",
        "CellsFailed",
        "DecodeStuck",
        "DecoderDied",
        "GpuDecoderFailed",
        "RunFailed",
        "TrainFailed",
        "WorkerBroken",
        "WorkersLost",
    }


@pytest.mark.parametrize("words", [(), ("status",)])
def test_help_ends_quietly_when_its_reader_goes_away(words):
    """As in `--help | head -3`, of a list of commands and of a command's flags; all jobs are one `Program`."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "jobs/show.py", *words, "--help"]
        done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    finally:
        os.close(writer)

    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("name", JOBS)
def test_help_says_what_there_is_to_choose_from(name, capsys):
    program = importlib.import_module(f"jobs.{name}").program

    with pytest.raises(SystemExit) as ended:
        program.run(["--help"])

    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert [word for word in program.commands if word not in out] == []
    assert "--data" in out or len(program.commands) > 1


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_its_docstring_its_presets_and_one_program(name):
    """What it does lies in pipelines/; what all have in common in jobs/program.py."""
    docstring, *nodes = ast.parse((ROOT / "jobs" / f"{name}.py").read_text()).body

    assert isinstance(docstring, ast.Expr)
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    assert sum(node.end_lineno - node.lineno + 1 for node in functions) <= 20  # those that make presets
    assert {type(node) for node in nodes} - {ast.FunctionDef} <= {
        ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Expr, ast.If
    }  # fmt: skip
    assert [ast.unparse(node) for node in nodes[-2:]] == [
        "run = program.run",
        "if __name__ == '__main__':\n    sys.exit(run(sys.argv[1:]))",
    ]


@pytest.mark.parametrize("name", JOBS)
def test_version_is_said_wherever_it_stands(name, capsys):
    program = importlib.import_module(f"jobs.{name}").program
    word = next(iter(program.commands)).split()[:1]

    assert program.run(["--version"]) == 0
    assert program.run([*word, "--version"]) == 0

    assert capsys.readouterr().out == 2 * f"{provenance.full_version()}\n"


def test_commit_is_of_what_was_built_or_of_our_own_checkout(tmp_path, monkeypatch):
    """Where Raylift is installed below somebody's repository (.venv/), that one's commit says nothing of it."""
    root = tmp_path / "lib" / "raylift"
    (root / "pipelines").mkdir(parents=True)
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(provenance, "__file__", str(root / "pipelines" / "provenance.py"))

    assert provenance.full_version() == f"raylift {__version__} (commit unknown)"
    (root / "COMMIT").write_text("1234abc\n")
    assert provenance.full_version() == f"raylift {__version__} (commit 1234abc)"


def test_a_word_a_preset_and_flags_make_the_settings():
    program = importlib.import_module("jobs.train").program

    assert program.parse(["deap-voc", "--backbone=vit_base_patch16_224.mae"]).config.features.model == (
        "vit_base_patch16_224.mae"
    )
    benchmark = importlib.import_module("jobs.benchmark").program
    call = benchmark.parse(["cost", "debug", "--repeat", "1", "--vit-up"])
    assert call.command is benchmark.commands["cost --vit-up"]
    assert (call.preset, call.config.repeat) == ("debug", 1)
    with pytest.raises(ConfigError, match="no preset of cost --vit-up is called 'debgu'. Did you mean 'debug'"):
        benchmark.parse(["cost", "--vit-up", "debgu"])


@dataclass(frozen=True, kw_only=True)
class Nothing:
    """No settings."""


def ends(do: Callable[[], Iterator[str]]) -> int:
    """How a program ends that does so."""
    return Program(name="none", doc="", commands={"go": Command(run=lambda _: do(), default=Nothing)}).run(["go"])


def raising(error: BaseException) -> Callable[[], Iterator[str]]:
    def do() -> Iterator[str]:
        yield "first"
        raise error

    return do


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EROFS, "Read-only file system", "/ro/x"),
        OSError(errno.ENAMETOOLONG, "File name too long", "/x"),
        NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x/y"),
    ],
)
def test_what_a_disk_says_is_one_sentence(error, capsys):
    assert ends(raising(error)) == 2

    out, err = capsys.readouterr()
    assert out == "first\n"
    assert err.count("\n") == 1
    assert f"{error.strerror}; " in err


def test_errors_of_the_network_and_bugs_keep_their_traceback():
    for error in (OSError(errno.ECONNRESET, "Connection reset"), RuntimeError("bug")):
        with pytest.raises(type(error)):
            ends(raising(error))


def test_sigterm_ends_the_work_as_an_interrupt_does(capsys):
    """Schedulers send it, some of them several times: what is held is let go of first."""
    before, let_go = signal.getsignal(signal.SIGTERM), []

    def work() -> Iterator[str]:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None  # as Ray does in the place of ours
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            let_go.append(True)
        yield "never"

    assert ends(work) == 143

    assert let_go
    assert capsys.readouterr() == ("", "stopped\n")
    assert signal.getsignal(signal.SIGTERM) == before
    assert ends(raising(KeyboardInterrupt())) == 130
    assert ends(raising(SystemExit(signal.SIGTERM))) == 143  # Ray's answer


def test_a_lost_terminal_ends_the_work_unless_it_is_to_go_on(monkeypatch, capsys):
    """As a connection does that breaks off; `nohup` has the signal ignored before the program begins."""

    def work() -> Iterator[str]:
        os.kill(os.getpid(), signal.SIGHUP)
        yield "went on"

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        assert ends(work) == 129
        assert capsys.readouterr() == ("", "stopped\n")
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert ends(work) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        full = io.FileIO(os.open("/dev/full", os.O_WRONLY), "w")
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(full, write_through=True))
        assert ends(work) == 129  # where its last words go nowhere, too
    finally:
        signal.signal(signal.SIGHUP, before)


def test_streams_that_are_closed_are_no_files_of_ours(tmp_path):
    """The next file that is opened would be standard output, and hold what libraries print."""
    code = """
import os, sys
from pathlib import Path
from jobs.program import Command, Program
from tests.jobs.test_program import Nothing
def work(_):
    with Path(sys.argv[1]).open("wb") as file:
        os.write(1, b"printed")
        os.write(2, b"printed")
        file.write(b"data")
    yield "done"
sys.exit(Program(name="none", doc="", commands={"go": Command(run=work, default=Nothing)}).run(["go"]))
"""
    shell = ["sh", "-c", 'exec "$0" -c "$1" "$2" <&- >&- 2>&-', sys.executable, code, tmp_path / "a"]

    assert subprocess.run(shell, cwd=ROOT, timeout=120, check=False).returncode == 0
    assert (tmp_path / "a").read_bytes() == b"data"


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        *((name, [*words, value], f"{value}: must be a finite") for value in ("nan", "inf") for name, *words in [
            ["train", "lift", "--lr"],
            ["train", "deap", "--weight-decay"],
            ["evaluate", "classify", "--temperature"],
            ["tables", "grid", "--cell.lr"],
            ["show", "nearest", "a", "--key", "a", "--point", "1"],
            ["benchmark", "scale", "--forward-s"],
        ]),
        ("extract", ["--batch", str(2**63)], f"--batch {2**63}: must be below"),
        ("extract", ["--max-image-pixels", "0"], "--max-image-pixels 0: must be at least 1"),
        ("train", ["lift", "--seed", "-1"], "--seed -1: must be at least 0"),
    ],
)  # fmt: skip
def test_a_number_must_be_one(name, words, message, capsys):
    try:
        code = importlib.import_module(f"jobs.{name}").run(words)
    except SystemExit as ended:  # the flags' parser says it
        code = ended.code

    assert code == 2
    assert message in capsys.readouterr().err


def test_names_that_a_terminal_lacks_or_obeys_are_escaped(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)

    assert ends(lambda: iter(["ü \x1b[31m \udce9"])) == 0

    assert stream.buffer.getvalue() == rb"\xfc \x1b[31m \udce9" + b"\n"


def test_output_on_a_full_disk_is_one_sentence():
    """And the interpreter, which flushes once more at its end, adds nothing."""
    code = """
import sys
from jobs.program import Command, Program
from tests.jobs.test_program import Nothing
sys.exit(Program(name="none", doc="", commands={"go": Command(run=lambda _: iter(["a"]), default=Nothing)}).run(["go"]))
"""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)

    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "No space left on device" in done.stderr


def test_settings_know_which_of_them_were_given():
    """In every form that flags have, with their default's value too; a preset's count."""
    train, tables = (importlib.import_module(f"jobs.{name}").program for name in ("train", "tables"))

    probe = train.parse(["probe-voc", "--no-flip", "--net_precision=fp32", "--backbone", "vit_small_patch16_224.dino"]).config
    cell = tables.parse(["grid", "debug", "--cell.batch", "32", "--cell.no-flip", "--cell.normalise", "--max-steps", "3"]).config
    flags = train.parse(["lift", "--features", "x", "--jitter", "0"]).config

    assert {name: probe.is_given(name) for name in ("flip", "net_precision", "model", "lr", "weights", "layers")} == {
        "flip": True, "net_precision": True, "model": True, "lr": True, "weights": False, "layers": False
    }  # fmt: skip
    assert (cell.given, cell.cell.given) == ({"max_steps"}, {"batch", "flip", "normalise"})
    assert cell.flat()["cell"]["batch"] == 32
    assert {"features", "jitter"} <= flags.given
    assert "given" not in {**probe.public(), **probe.flat()}
    assert probe == probe.noting({"seed"})
