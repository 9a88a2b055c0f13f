"""What an installation is: one package, `raylift`, that leaves a user's own modules alone and needs what its extras say."""

import ast
import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from storage import __version__

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = (".py", ".jinja", ".html", ".css", ".js")
FOLDERS = ("cluster", "jobs", "operators", "pipelines", "storage")
STORE = ROOT / "tests" / "data" / "format2" / "finished.zarr"


def copy_of_checkout(folder: Path) -> Path:
    """So that nothing is built in the real one."""
    for name in (*FOLDERS, "raylift"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def build(checkout: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """As pip builds a wheel, but with this environment's setuptools."""
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    return subprocess.run([sys.executable, "-c", code, str(out)], cwd=checkout, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with what the wheel installs."""
    checkout, out = copy_of_checkout(tmp_path_factory.mktemp("checkout")), tmp_path_factory.mktemp("site")
    # Of an earlier build, before a module was renamed.
    (checkout / "build" / "lib" / "raylift" / "storage").mkdir(parents=True)
    (checkout / "build" / "lib" / "raylift" / "storage" / "gone.py").touch()
    built = build(checkout, out)
    assert built.returncode == 0, built.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out)
    wheel.unlink()
    return out


@pytest.fixture
def beside(tmp_path) -> Path:
    """A user's folder, whose modules have the names of our folders."""
    for name in FOLDERS:
        (tmp_path / f"{name}.py").write_text("mine = True\n")
    shutil.copytree(STORE, tmp_path / STORE.name)  # pictures of a store are kept in it
    return tmp_path


def python(code: str, site: Path, beside: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(beside), str(site)]), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=beside, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_one_package_is_installed_with_its_licence_and_its_types(site):
    info = site / f"raylift-{__version__}.dist-info"
    said = email.message_from_string((info / "METADATA").read_text())

    assert {path.name for path in site.iterdir()} == {"raylift", info.name}
    assert said["License-Expression"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (info / "licenses" / "LICENSE").read_text()
    assert (site / "raylift" / "py.typed").is_file()
    for folder in FOLDERS:
        ours = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES}
        installed = {str(path.relative_to(site / "raylift")) for path in (site / "raylift" / folder).rglob("*") if path.is_file()}
        assert installed == ours


def test_nothing_installed_names_modules_as_a_checkout_has_them(site):
    """Also not in code that other processes are given."""
    names = "|".join(FOLDERS)
    plain = re.compile(rf"(?:^|;)\s*(?:from|import) (?:{names})\b|^(?:{names})(?:\.\w+)+$|\bjobs/(?:extract|show|train)\.py")
    found = [
        f"{path.relative_to(site)}:{node.lineno}: {node.value[:80]}"
        for path in (site / "raylift").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and plain.search(node.value)
    ]

    assert found == []


def test_a_users_own_modules_stay_what_they_are(site, beside):
    code = """
import importlib, pkgutil, sys
import raylift
for found in pkgutil.walk_packages(raylift.__path__, "raylift."):
    importlib.import_module(found.name)
assert not {"cluster", "jobs", "operators", "pipelines", "storage"} & set(sys.modules), sorted(sys.modules)
import storage
assert storage.mine
print(raylift.__version__, len([name for name in sys.modules if name.startswith("raylift.")]))
"""
    result = python(code, site, beside)

    assert result.returncode == 0, result.stderr
    version, modules = result.stdout.split()
    assert version == __version__
    assert int(modules) >= sum(len(list((ROOT / name).rglob("*.py"))) for name in FOLDERS)


def with_extra(site: Path, extra: str) -> set[str]:
    """Names of the distributions that `pip install raylift[extra]` brings, as far as they are installed here."""
    brought, asked = set(), set()
    left: list[tuple[str, frozenset[str]]] = [("raylift", frozenset({extra}))]
    while left:
        name, extras = left.pop()
        if (name, extras) in asked:
            continue
        asked.add((name, extras))
        brought.add(name)
        for line in requirements(site, name):
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": each}) for each in extras | {""}):
                left.append((canonicalize_name(needed.name), frozenset(needed.extras)))
    return brought


def requirements(site: Path, name: str) -> list[str]:
    if name == "raylift":
        return importlib.metadata.Distribution.at(site / f"raylift-{__version__}.dist-info").requires or []
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def modules_beyond(distributions: set[str]) -> Iterator[str]:
    for module, owners in importlib.metadata.packages_distributions().items():
        if not distributions & {canonicalize_name(owner) for owner in owners}:
            yield module


ONLY = """
import sys
from importlib.machinery import PathFinder

beyond, found = set(sys.argv.pop(1).split()), PathFinder.find_spec
PathFinder.find_spec = lambda name, *args: None if name in beyond else found(name, *args)
"""
"""What comes first in a program that is to find no module of the names in its first argument."""


@pytest.mark.parametrize(
    ("extra", "arguments", "says"),
    [
        ("", ["show", "status", STORE.name], "1 failed"),
        ("", ["show", "view", STORE.name, "--out", "view.png"], "view.png"),
        ("extract", ["extract", "debug"], "12 images ok, 0 failed"),
        ("train", ["train", "lift", "--help"], "raylift train lift"),
        ("eval", ["evaluate", "correspondence", "--help"], "raylift evaluate correspondence"),
    ],
)
def test_an_extra_brings_what_its_program_needs(extra, arguments, says, site, beside):
    brought = with_extra(site, extra)
    assert "ray" not in brought
    assert ("torch" in brought) == bool(extra)

    code = f"{ONLY}\nfrom raylift.__main__ import main; sys.exit(main())"
    result = python(code, site, beside, " ".join(modules_beyond(brought)), *arguments)

    assert result.returncode == 0, result.stderr
    assert says in result.stdout


def test_what_lacks_is_said_in_one_sentence(site, beside):
    """Of a program that can't be imported, and of Ray, which is imported when work begins."""
    code = f"{ONLY}\nfrom raylift.__main__ import main; sys.exit(main())"
    torch = python(code, site, beside, "torch timm", "extract", "debug")
    ray = python(code, site, beside, "ray", "extract", "debug", "--executor", "ray")

    for lacks, result in (("torch", torch), ("ray", ray)):
        assert result.returncode == 2
        assert result.stderr.endswith(
            f"ModuleNotFoundError: {lacks} isn't installed here; pip install 'raylift[all]' installs all that Raylift uses\n"
        )
        assert "Traceback" not in result.stderr


def test_a_plain_import_that_would_bind_another_name_is_refused(tmp_path):
    checkout = copy_of_checkout(tmp_path)
    (checkout / "storage" / "new.py").write_text("import storage.words\n")
    built = build(checkout, tmp_path)

    assert built.returncode != 0
    assert "storage/new.py:1: write `from x import y`" in built.stderr


def test_reading_takes_neither_torch_nor_ray_nor_the_programs(site, beside):
    code = f"""
import sys
from raylift.storage.store import FeatureStore
store = FeatureStore.open({str(STORE)!r})
print(store.read(store.valid().nonzero()[0][:2], "x1").shape)
assert not {{"torch", "ray", "timm", "tyro", "matplotlib"}} & set(sys.modules)
"""
    result = python(ONLY + code, site, beside, " ".join(modules_beyond(with_extra(site, ""))))

    assert result.returncode == 0, result.stderr
    assert result.stdout == "(2, 4, 4, 64)\n"
