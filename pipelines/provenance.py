"""Where results come from: the software that made them, and whether a run goes on with the settings it was begun with."""

import contextlib
import functools
import importlib.metadata
import os
import platform
import subprocess
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal, TypeVar

from pipelines.config import ConfigError, JobConfig, absolute
from storage import __version__
from storage.differences import differences
from storage.documents import JsonObject, JsonValue, as_object
from storage.paths import Folder, StorageOptions, filesystem
from storage.root import read_attributes
from storage.runs import read_pointers, read_run, write_run

C = TypeVar("C", bound=JobConfig)


@functools.cache
def versions() -> dict[str, str]:
    """Software that made the numbers."""
    names = ("ray", "torch", "torchvision", "timm", "zarr", "numcodecs", "pillow", "av", "numpy", "pyarrow", "fsspec")
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # of an extra that isn't installed, and wasn't used
            found[name] = importlib.metadata.version(name)
    return {"python": platform.python_version(), **found, "raylift": __version__, "raylift_commit": _commit() or "unknown"}


def full_version() -> str:
    """What --version says."""
    return f"raylift {__version__} (commit {_commit() or 'unknown'})"


def _commit() -> str:
    """What was built, or that of the checkout that this program runs from; empty where there is none, or no git to ask."""
    root = Path(__file__).resolve().parent.parent
    built = root / "COMMIT"  # by setup.py
    if built.is_file():
        return built.read_text().strip()
    if not (root / ".git").exists():  # an installation within a checkout of something else, whose commit says nothing of us
        return ""
    command = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git in PATH, or one that may not be run
        return ""


_CONTENTS = {
    "images_content": "images",
    "labels_content": "labels",
    "held_out_content": "held-out images",
    "held_out_labels_content": "labels of held-out images",
    "rows_content": "rows of the store",
    "held_out_rows_content": "rows of the held-out images' store",
    "readouts_content": "trained readouts",
    "upsamplers_content": "upsamplers",
}
"""What a run's identity calls what files hold, in words."""


def run_folder(out: str, options: StorageOptions, what: Literal["", "training", "evaluation"] = "") -> Folder:
    """The folder of a run's `out`, which is `what`. Raises `ConfigError` for a feature store, a run of the other kind, and a file
    or what would lie below one, which only a disk refuses, and only once something is written."""
    folder = Folder(out, options)
    if folder.is_local:
        path = Path(filesystem(out, options)[1])
        if file := next((each for each in (path, *path.parents) if os.path.isfile(each)), None):  # noqa: PTH113 - of no access: no
            wrong = "is a file" if file == path else f"lies below {file}, which is a file"
            raise ConfigError(f"--out {folder.displayed} {wrong}; give a folder that is there or can be made")
    if read_attributes(folder) is not None:
        raise ConfigError(f"{folder.displayed} is a feature store; give --out a folder of its own")
    if what and (identity := as_object((read_run(folder) or {}).get("identity", {}))):
        there = "training" if "lr" in identity else "evaluation"  # a learning rate is part of what every training is
        if there != what:
            raise ConfigError(f"{folder.displayed} was begun as another kind of run ({there}); give this {what} its own folder")
    return folder


def require_no_run(folder: Folder, what: str) -> None:
    """Raise `ConfigError` where a folder that is to be a store's or a grid's (`what`) is a training's or an evaluation's."""
    if folder.exists("run.json"):
        raise ConfigError(
            f"--out {folder.displayed} holds a training or an evaluation (run.json); give the {what} a folder of its own"
        )


NOTHING_RUN = "nothing was run; drop --plan to start"
"""The last line of a plan."""


@contextlib.contextmanager
def planned(config: C, out: str) -> Iterator[C]:
    """Settings that can be prepared as those of a run, for its plan: where `out` holds one, to be held against it; else with an
    output in memory, so that nothing is begun. Raises as `run_folder`."""
    if not out:
        yield config  # whose preparation says so
        return
    there = run_folder(absolute(out), config.options)
    if read_run(there) is not None or read_pointers(there) is not None:
        yield config
        return
    draft = f"memory://raylift-plan-{uuid.uuid4().hex}"
    executor = {"executor": "auto"} if config.cluster.executor == "ray" else {}  # to which memory is nothing
    try:
        yield config.changed(out=draft, **executor)
    finally:
        fs, path = filesystem(draft)
        with contextlib.suppress(FileNotFoundError):
            fs.rm(path, recursive=True)


def begin_run(folder: Folder, made_of: JsonObject, config: JsonObject, *, aside: Collection[str] = (), **said: JsonValue) -> None:
    """Write run.json, or hold it against its continuation: `made_of` is the run's identity, `config` all its settings, and `said`
    what else it says of its beginning; JSON values without credentials. `aside`: settings that are compared where both say them,
    since what comes of them is compared anyway. Raises `ConfigError`."""
    before = read_run(folder)
    if before is not None:
        # Runs of earlier versions didn't look at what files hold, nor at all that makes the numbers of features.
        later = {name: made_of[name] for name in made_of if name.endswith("_content") or name == "numbers"}
        known = {**later, **as_object(before.get("identity", {}), "identity")}
        one_sided = {name for name in aside if (name in known) != (name in made_of)}
        known, made_of = ({n: value for n, value in each.items() if n not in one_sided} for each in (known, made_of))
        content = {name: made_of[name] for name in later if name != "numbers"}
        what = ", ".join(_CONTENTS.get(name, name) for name in content if known[name] != made_of[name])
        require_same(folder.displayed, {**known, **content}, made_of, f"Other {what}, too." if what else "")
        if what:
            raise ConfigError(
                f"{folder.displayed} was begun with other {what} under the same names: what the data's files or the store's rows "
                "hold was changed since. Restore it, or use a new --out."
            )
        return
    if read_pointers(folder) is not None:
        raise ConfigError(f"{folder.displayed} has checkpoints but no run.json; restore it, or use a new --out")
    write_run(folder, {"identity": made_of, "config": config, **said, "versions": versions()})


def require_same(displayed: str, before: JsonObject, now: JsonObject, also: str = "") -> None:
    """Raises `ConfigError` with what differs between a run and its continuation; `also`: what else does, in words."""
    if found := differences(before, now):
        text = "\n".join(filter(None, [found.text("run", "now"), also]))
        raise ConfigError(f"{displayed} was begun with other settings:\n{text}\nUse a new --out, or the settings above.")
