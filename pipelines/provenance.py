"""Where results come from: the software that made them, and whether a run goes on with the settings it was begun with."""

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

from pipelines.config import ConfigError
from storage.differences import differences
from storage.documents import JsonObject, as_object
from storage.paths import Folder, StorageOptions
from storage.root import read_attributes
from storage.runs import read_pointers, read_run, write_run


@functools.cache
def versions() -> dict[str, str]:
    """Software that made the numbers."""
    names = ("ray", "torch", "torchvision", "timm", "zarr", "numcodecs", "pillow", "numpy", "pyarrow", "fsspec")
    found = {name: importlib.metadata.version(name) for name in names}
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {"python": platform.python_version(), **found, "raylift_commit": commit or "unknown"}


def run_folder(out: str, options: StorageOptions) -> Folder:
    """The folder of a run's `out`. Raises `ConfigError` for a feature store."""
    folder = Folder(out, options)
    if read_attributes(folder) is not None:
        raise ConfigError(f"{folder.displayed} is a feature store; give --out a folder of its own")
    return folder


def begin_run(folder: Folder, made_of: JsonObject, config: JsonObject) -> None:
    """Write run.json, or hold it against its continuation: `made_of` is the run's identity, `config` all its settings, both
    JSON values without credentials. Raises `ConfigError`."""
    before = read_run(folder)
    if before is not None:
        # Runs of earlier versions didn't look at the images' bytes.
        content = {name: made_of[name] for name in made_of if name.endswith("_content")}
        known = {**content, **as_object(before.get("identity", {}), "identity")}
        require_same(folder.displayed, {**known, **content}, made_of)
        if changed := [name.removesuffix("_content") for name in content if known[name] != made_of[name]]:
            raise ConfigError(
                f"{folder.displayed} was begun with other images under the same names and sizes ({', '.join(changed)}): the "
                "files of --data or --val-data were replaced since. Restore them, or use a new --out."
            )
        return
    if read_pointers(folder) is not None:
        raise ConfigError(f"{folder.displayed} has checkpoints but no run.json; restore it, or use a new --out")
    write_run(folder, {"identity": made_of, "config": config, "versions": versions()})


def require_same(displayed: str, before: JsonObject, now: JsonObject) -> None:
    """Raises `ConfigError` with what differs between a run and its continuation."""
    if found := differences(before, now):
        text = found.text("run", "now")
        raise ConfigError(f"{displayed} was begun with other settings:\n{text}\nUse a new --out, or the settings above.")
