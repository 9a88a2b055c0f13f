"""Training runs as one HTML page."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.showing.curves import curves_png
from pipelines.showing.page import data_url, page, versions_in_words
from pipelines.showing.training import run_names, training_table
from storage.documents import JsonObject, as_object
from storage.paths import Folder
from storage.runs import read_run


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What a page says of one run."""

    name: str
    displayed: str
    said: dict[str, str]
    settings: str
    picture: str = ""
    "the last one that validations drew, as a data URL; empty without any"
    drawn_at: int = 0


def render_training(folders: Sequence[Folder]) -> str:
    """The page as text: scores, curves, and of each run its last picture, command, versions and settings. Raises `ConfigError` as
    `training_table` does."""
    table, names = training_table(folders), run_names(folders)
    named = dict(zip(names, folders, strict=True))
    return page(
        "training.html.jinja",
        {},
        title=", ".join(folder.displayed for folder in folders),
        table=table,
        curves={wide: data_url(curves_png(named, wide=wide), "png") for wide in (1, 3)},  # for telephones, and else
        runs=[_run(folder, name) for name, folder in named.items()],
    )


def _run(folder: Folder, name: str) -> _Run:
    run = read_run(folder) or {}
    said = {"folder": folder.displayed}
    if command := run.get("command"):  # since there are pages of trainings
        said["command"] = str(command)
    if versions := as_object(run.get("versions") or {}, "versions"):
        said["versions"] = versions_in_words(versions)
    pictures = sorted(each for each in folder.sizes("pictures") if re.fullmatch(r"step-\d+\.png", each))
    settings: JsonObject = {key: value for key, value in run.items() if key not in ("command", "versions")}
    found = _Run(name=name, displayed=folder.displayed, said=said, settings=json.dumps(settings, indent=1))
    if not pictures:
        return found
    step = int(pictures[-1].removeprefix("step-").removesuffix(".png"))
    picture = data_url(folder.read(f"pictures/{pictures[-1]}"), "png")
    return _Run(**{**vars(found), "picture": picture, "drawn_at": step})
