"""How programs end: errors of one base, exit codes, readers that go away."""

import ast
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.config import ConfigError
from storage.errors import RayliftError

ROOT = Path(__file__).parents[2]
JOBS = ("extract", "train", "evaluate", "tables", "show", "benchmark")

OTHERS = {"_AllSeen": "ends a model's forward that has gone far enough; caught where it was begun"}
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
    assert failures == {"BenchmarkFailed", "CellsFailed", "DecodeStuck", "DecoderDied", "RunFailed", "TrainFailed", "WorkersLost"}


def test_help_ends_quietly_when_its_reader_goes_away():
    """As in `--help | head -3`. All programs in forks of one process that has imported them."""
    code = f"""
import importlib, os, sys
runs = {{name: importlib.import_module(f"jobs.{{name}}").run for name in {JOBS!r}}}
for name, run in runs.items():
    reader, writer = os.pipe()
    os.close(reader)
    if not (child := os.fork()):
        os.dup2(writer, 1)
        sys.exit(run(["--help"]))
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300, check=True)

    assert done.stdout.splitlines() == [f"{name} 141" for name in JOBS]
    assert done.stderr == ""


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
