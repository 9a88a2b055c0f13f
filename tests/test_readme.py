"""The README is true: its bash and python blocks run, in order, in one folder; its make targets and file map exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forks import Fork

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder that looks like the checkout, so that nothing is written into the real one."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("jobs", "pipelines", "operators", "storage", "cluster", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_blocks_run_in_order(checkout, parent, tmp_path):
    """Programs after the first block's in forks, which needn't import all of it anew."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONWARNINGS": "ignore"}
    found = re.findall(r"^```(bash|python)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len(found) >= 3
    assert found[0][0] == "bash"
    for number, (language, code) in enumerate(found):
        if number and language == "bash":
            commands = [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines()]
            for python, program, *argv in filter(None, commands):
                name = re.fullmatch(r"jobs/(\w+)\.py", program)
                assert (python, bool(name)) == ("python", True), f"run {code} as the shell does"
                log = tmp_path / "log"
                log.unlink(missing_ok=True)
                fork = Fork(program=name[1], argv=argv, place=str(checkout), log=str(log), cwd=str(checkout))
                assert parent.run(fork) == 0, f"{program} {shlex.join(argv)}\n{log.read_text()[-4000:]}"
            continue
        command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
        result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, f"{code}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\S+)", "\n".join(blocks("sh")), re.MULTILINE)

    assert targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


@pytest.mark.parametrize("folder", ["pipelines", "operators", "storage", "cluster"])
def test_design_page_has_a_line_for_every_module_and_names_none_that_is_gone(folder):
    named = set(re.findall(r"`([\w/]+\.(?:py|jinja))`", (ROOT / folder / "DESIGN.md").read_text()))
    modules = {str(path.relative_to(ROOT / folder)) for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py"}

    assert modules <= named
    # Those with a folder in front are other folders' (`tests/x.py`), or files of a store.
    assert all((ROOT / folder / name).exists() or (ROOT / name).exists() for name in named)


def test_every_program_is_named():
    assert all(f"jobs/{path.name}" in README for path in (ROOT / "jobs").glob("[!_]*.py"))


def test_it_is_short():
    assert len(README.splitlines()) <= 200
