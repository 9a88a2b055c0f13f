"""How the folders become one package: what is installed is `raylift.storage`, `raylift.pipelines`, ..., never a `storage` that
stands where a user's own storage.py should. Why it is done here: pipelines/DESIGN.md, "Installed, and as a checkout"."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PACKAGE = "raylift"
PROGRAM = re.compile(r"(?:python )?\bjobs/(\w+|\{self\.name\})\.py\b")
"""A program as a checkout runs it, in help and messages."""


class BuildOnePackage(build_py):
    """Moves the folders below `raylift`, and has their imports say so. Editable installs don't come here: they're a checkout."""

    def run(self) -> None:
        if self.editable_mode:
            super().run()
            return
        built, folders = Path(self.build_lib), sorted({name.split(".")[0] for name in self.packages} - {PACKAGE})
        for name in (PACKAGE, *folders):  # of an earlier build, with modules that may be gone since
            shutil.rmtree(built / name, ignore_errors=True)
        super().run()
        for name in folders:
            (built / name).rename(built / PACKAGE / name)
        for path in sorted((built / PACKAGE).rglob("*.py")):
            path.write_text(installed(path.read_text(encoding="utf-8"), folders, str(path)), encoding="utf-8")
        if commit := commit_of(Path(__file__).resolve().parent):
            (built / PACKAGE / "COMMIT").write_text(f"{commit}\n")


def installed(source: str, folders: list[str], where: str) -> str:
    """A module's text with imports below `raylift`, and programs by the command that an installation has."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] in folders for alias in node.names):
            raise SystemExit(f"{where}:{node.lineno}: write `from x import y`; `import x` binds another name when installed")
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in folders:
            line = lines[node.lineno - 1]
            start = line.index("from ", node.col_offset) + len("from ")
            lines[node.lineno - 1] = f"{line[:start]}{PACKAGE}.{line[start:]}"
    return PROGRAM.sub(r"raylift \1", "".join(lines))


def commit_of(root: Path) -> str:
    """What is being built; empty outside a checkout of ours, or without git."""
    if not (root / ".git").exists():
        return ""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


setup(cmdclass={"build_py": BuildOnePackage})
