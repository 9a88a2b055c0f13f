"""The README is true: its bash and python blocks run, in order, in one folder; its make targets and file map exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_blocks_run_in_order(checkout):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONWARNINGS": "ignore"}
    found = re.findall(r"^```(bash|python)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len(found) >= 3
    for language, code in found:
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
