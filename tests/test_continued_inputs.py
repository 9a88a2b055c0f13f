"""A run that is asked for again after an object of its input was replaced: by content of the same size, name and time.

Objects are found by looking, not listed: of every kind of run, all that lies in the folders that it is given.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from pipelines.training.readout import ReadoutTraining
from storage.datasets.registry import DATASETS
from storage.spec import FeatureSpec, Use
from tests.other_bytes import InputObject, objects_in
from tests.second_runs import KINDS, Held, Refused, complaint

pytestmark = pytest.mark.usefixtures("narrow")

CALLED: Mapping[str, tuple[str, ...]] = {
    "data": ("data", "images", "labels", "held_out"),
    "val_data": ("val_data", "val-data", "held_out", "held-out"),
    "weights": ("weights", *FeatureSpec.names(*Use)),
    "levels": ("levels", "x2"),
    "methods": ("methods", "upsamplers"),
}
"""What a refusal may call what a setting names; default: as the setting."""


UNREAD = {"readout: photos_open_instances": {".png"}}
"""What lies beside the data set and is another one's."""

READ_ALIKE: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("vit_up", "jafar", "featup"), (".cls", "weights/")),
    **{name: ("weights/",) for name in KINDS if name.startswith("readout: ") and name != "readout: voc"},
    **dict.fromkeys(("correspondence: vit-up", "correspondence: navi", "video", "discovery"), ("weights/",)),
    **dict.fromkeys(("cka", "similarity", "fidelity", "sharpness", "probe"), ("weights/",)),
}
"""Of kinds of runs: what another kind reads by the same code, and is tried with alone. Other members of tars, and weights, are
x2's; weights of a readout's backbone are those of the first, and an evaluation's those of the first correspondence."""

TWO_USES = ("VOC2012/", "photos_open/seg/", "coco/annotations/", "DAVIS/", "navi_v1/")
"""Folders with what is trained on and what is held out, or what is given and what is scored."""


def test_all_labelled_sets_are_tried(world):
    configs = [kind.config(world) for kind in KINDS.values()]

    assert {each.dataset for each in configs if isinstance(each, ReadoutTraining)} == DATASETS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_replaced_object_is_refused_by_name_or_counts(name, world, tmp_path):
    """The first of each kind, and the last where the two have not the same use; `make soak` tries them all."""
    require_that_each_is_refused_or_counts(name, world, tmp_path, _ends)


@pytest.mark.soak
@pytest.mark.parametrize("name", KINDS)
def test_every_replaced_object_is_refused_by_name_or_counts(name, world, tmp_path):
    require_that_each_is_refused_or_counts(name, world, tmp_path, lambda name, folder, objects: objects)


def _ends(name: str, folder: str, objects: Sequence[InputObject]) -> list[InputObject]:
    """The first of each kind, and of those of `TWO_USES` the last, without those that are `READ_ALIKE`."""
    of_kind: dict[str, list[InputObject]] = {}
    alike = READ_ALIKE.get(name, ())
    for each in objects:
        if not f"{folder}/{each.name}".startswith(alike) and not each.name.endswith(alike):
            of_kind.setdefault(each.kind, []).append(each)
    ends = {found[0]: None for found in of_kind.values()}
    ends |= {found[-1]: None for found in of_kind.values() if f"{folder}/{found[-1].name}".startswith(TWO_USES)}
    return list(ends)


def require_that_each_is_refused_or_counts(
    name: str, world: Path, tmp_path: Path, chosen: Callable[[str, str, Sequence[InputObject]], Sequence[InputObject]]
) -> None:
    kind = KINDS[name]
    config = kind.config(world)
    held = Held(kind, config, tmp_path)
    wrong, counting = [], Counter[str]()
    for folder in kind.reads:
        words = [word for flag in _given_by(config.public(), world / folder) for word in CALLED.get(flag, (flag,))]
        for each in chosen(name, folder, objects_in(world / folder)):
            found = _replaced(held, each, [str(world / folder), *words], counting)
            if found:
                wrong.append(f"{name}: {folder}/{each.name} {found}")

    assert not wrong, "\n".join(wrong)
    # The test itself: what is replaced has an influence on the result. Of notes, lists and weights, not all have.
    suffixes = {Path(each.name).suffix for folder in kind.reads for each in objects_in(world / folder)}
    assert (suffixes & {".jpg", ".png", ".xml"}) - UNREAD.get(name, set()) <= counting.keys(), counting


def _given_by(settings: Mapping[str, object], folder: Path) -> list[str]:
    """The settings that name a folder, or what lies in it."""
    return [name for name, value in settings.items() if str(folder) in str(value)]


def _replaced(held: Held, found: InputObject, words: list[str], counting: Counter[str]) -> str:
    """What is wrong with a second run after an object was replaced. What kinds of objects count is counted: of those, other
    contents have other results."""
    others = list(found.others())
    assert others, f"{found.name}: no other content of {found.size} bytes"
    for data in others:
        with found.holding(data):
            again = [held.again(), *([held.again(stopped=True)] if held.kind.ends_with else [])]
            known = all(isinstance(each, Refused) for each in again) and counting[Path(found.name).suffix]
            fresh = None if known else held.fresh()
        texts = [complaint(each, lambda fresh=fresh: fresh, words) for each in again]
        if text := next(filter(None, texts), ""):
            return text
        if fresh is None:
            return ""
        if fresh != held.first and not isinstance(fresh, Refused):
            counting[Path(found.name).suffix] += 1
            return ""
    return ""
