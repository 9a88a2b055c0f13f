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
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONWARNINGS": "ignore",
    }
    found = re.findall(r"^```(bash|python)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len(found) >= 3
    for language, code in found:
        command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
        result = subprocess.run(
            command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, f"{code}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\S+)", "\n".join(blocks("sh")), re.MULTILINE)

    assert targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_file_map_names_files_that_exist_and_misses_no_module():
    named = set(re.findall(r"`((?:jobs|pipelines|operators|storage|cluster)/[\w/]*\.\w+)`", README))
    modules = {
        str(path.relative_to(ROOT))
        for folder in ("jobs", "pipelines", "operators", "storage", "cluster")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    }

    assert all((ROOT / name).exists() for name in named)
    assert modules <= named


def test_it_is_short():
    assert len(README.splitlines()) <= 200
