"""A run that is asked for again with another value of one setting: every setting of every job, as they are declared.

A new setting is in here by itself: where its type doesn't say another value, it has to be given one in `OTHERS`.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from jobs import evaluate, extract, tables, train
from pipelines.config import ConfigError, Identity, JobConfig, Setting, settings_of
from storage.spec import FeatureSpec, Use
from tests.second_runs import KINDS, VIT, Held, Outcome, Refused, complaint

pytestmark = pytest.mark.usefixtures("narrow")

TRIED = (
    "x2", "vit_up", "jafar", "featup", "readout: voc", "readout: nyu", "vitdet", "grid", "correspondence: lift",
    "correspondence: navi", "video", "discovery", "cka", "similarity", "fidelity", "sharpness", "probe", "detection", "runtime",
    "extract",
)  # fmt: skip
"""A kind of run for each class of settings, and one that trains on depth."""


def test_all_classes_of_settings_are_tried():
    tried = {type(KINDS[kind].config(Path("WORLD"))) for kind in TRIED}
    jobs = [*extract.PRESETS.values(), *train.NAMES.values(), *tables.PRESETS.values()]
    jobs += [preset for presets in evaluate.PRESETS.values() for preset in presets.values()]

    assert tried == {type(each) for each in jobs}


ELSEWHERE = {
    "out": "the folder is what is asked for again",
    "executor": "Ray comes to what one process comes to: tests of each job",
    "store": "tests/test_continued_stores.py",
    "val_store": "tests/test_continued_stores.py",
    "stores": "tests/test_continued_stores.py",
    "features": "tests/test_continued_stores.py",
    "cell": "each of the settings that it holds",
    "add_level": "tests/pipelines/extraction/test_add_level.py",
    "plan": "nothing is run: tests/pipelines/test_plans.py",
    "data": "tests/test_continued_inputs.py, and below: where they lie doesn't count",
    "val_data": "likewise",
}
"""Settings that aren't changed here, and why."""

OTHERS: Mapping[str, tuple[object, ...]] = {
    "accelerator": ("L4",),
    "actor_cpus": (1,),
    "actor_gpus": (1.0,),
    "actors": (1,),
    "runtime: actors": (2,),
    "runtime: settings": (("jbu.radius=2",),),
    "against": ("low-res",),
    "probe: against": ("readout",),
    "alphas": ((0.2,),),
    "backbones": ((f"{VIT}@128",),),
    "batch": (3,),
    "block_rows": (4,),
    "carry": (("cls",),),
    "cell_cpus": (1,),
    "cell_gpus": (0.5,),
    "clip": (0.5,),
    "loaders": (1,),
    "clip_steps": (1, None),
    "crop": (0.5,),
    "crop_pct": (0.875,),
    "dataset": ("photos_open",),
    "depth_scale": (4000.0,),
    "detector": ("WORLD/detector_b", "random"),
    "channels": (8,),
    "depth": (3,),
    "dim": (8,),
    "drawing": ("extract",),
    "drop_path": (0.5,),
    "fc": (16,),
    "global_blocks": ((0,),),
    "grids": ((4,),),
    "chunks": ((4,),),
    "head": ("mask_rcnn",),
    "heads": (1,),
    "hidden": (16,),
    "hidden_size": (128,),
    "hidden_states": ((0, 6),),
    "image_member": ("png",),
    "key_points": ("images",),
    "label_frame": ("stored",),
    "layer_decay": (0.9,),
    "layers": ((0,),),
    "level": ("x2",),
    "levels": (("x1", "x2"), ("x1", "x2=resize_conv:WORLD/upsampler_b")),
    "limit": (2,),
    "cka: limit": (4,),
    "max_steps": (1, 5),
    "method": ("jbu",),
    "method_levels": (("linear=x2",),),
    "means": (("both=low-res,bilinear x2",),),
    "probe: means": (("both=readout,other",),),
    "methods": (("deap",),),
    "runtime: methods": (("jbu",), ("resize_conv:WORLD/upsampler_b",)),
    "micro_batch": (1,),
    "model": ("test_vit2.r160_in1k",),
    "norm": (False,),
    "outputs": (30,),
    "pairs_per_category": (3,),
    "pos_embed": ("dino",),
    "query_size": (256,),
    "ray_address": ("127.0.0.1:1",),
    "readouts": (("WORLD/readout_b",),),
    "finetuned": (("WORLD/lifted",),),
    "fps": (2.0,),
    "resolution": ("240p",),
    "relational_cells": (3,),
    "revision": ("other",),
    "seeds": ((1,),),
    "side": (128,),
    "size": (128,),
    "scales": ((0.5, 1.0),),
    "vit_up: size": (256,),
    "detection: size": (96,),
    "upsamplers": (("resize_conv",), ()),
    "shrink": ((0.5, 0.5),),
    "sizes": ((32, 96),),
    "speed_reference": ("test_vit2.r160_in1k",),
    "split": ("val",),
    "video: split": ("train",),
    "detection: split": ("train2017",),
    "storage_options": ('{"file": {}}',),
    "stride": (8,),
    "tasks": (("probe-voc",),),
    "tau": (0.3,),
    "teacher_sizes": ((64, 128),),
    "val_limit": (1,),
    "val_split": ("train",),
    "upsampler": ("lift:WORLD/upsampler_b",),
    "vitdet: model": ("base",),
    "vitdet: size": (96,),
    "vitdet: weights": ("random:1", "WORLD/weights_b"),
    "weights": ("WORLD/weights_b", "random"),
    "width": (8,),
    "window": (3,),
}
"""Other values of settings whose type doesn't say any, or none that goes with the others: for a kind of run or for all."""


CALLED: Mapping[str, tuple[str, ...]] = {
    "weights": FeatureSpec.names(*Use),
    "dataset": ("--data",),
    "upsamplers": ("detectors",),
    "finetuned": ("detectors",),
    "levels": ("x2",),
    "method_levels": ("x2",),
    "methods": ("upsamplers",),
    "val_limit": ("held_out", "held-out"),
}
"""What a refusal may call a setting, beside its name and its value."""


def other_values(kind_of_run: str, setting: Setting, now: object) -> list[object]:
    """Values that aren't `now`. Raises `LookupError` where nothing says any."""
    kind, own = setting.kind, f"{kind_of_run}: {setting.name}"
    if kind is bool:
        return [not now]
    if get_origin(kind) is Literal:
        return [value for value in get_args(kind) if value != now][:1]
    if own in OTHERS or setting.name in OTHERS:
        found = OTHERS[own if own in OTHERS else setting.name]
        is_text = kind is str or str in get_args(kind)
        others = [str(value) if is_text and isinstance(value, int) else value for value in found]
    elif kind is float and isinstance(now, float):
        others = [now * 0.5 if now else 0.25]
    elif kind is int and isinstance(now, int):
        others = [now + 1]
    else:
        others = []
    if not (others := [value for value in others if value != now]):
        raise LookupError(f"{kind_of_run}: nothing says another value of {setting.name} than {now!r}; give OTHERS one")
    return others


WHERE = (
    "accelerator", "actor_cpus", "actor_gpus", "actors", "device", "loaders", "max_failures", "ray_address", "storage_options",
    "worker_cpus", "workers",
)  # fmt: skip
"""Settings of where work is done, which all jobs of one base have from it."""

WHERE_TRIED = ("x2", "vitdet", "grid", "correspondence: lift", "runtime", "extract")
"""The kinds of runs that these are changed in: of each base one, and those that have some of them otherwise."""

ALIKE: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("checkpoint_every", "epochs", "log_every", "max_failed_fraction", "max_steps", "overlap", "validate_every"),
        ("vit_up", "jafar", "featup", "readout: nyu"),
    ),
    **dict.fromkeys(("against", "means"), ("correspondence: navi", "video", "discovery", "sharpness")),
    **dict.fromkeys(
        ("paper", "pictures"), ("correspondence: navi", "discovery", "cka", "similarity", "fidelity", "sharpness", "probe")
    ),
    **dict.fromkeys(
        (
            "encoding", "facet", "force_upsampler", "layers", "levels", "model", "norm", "pos_embed", "precision", "ragged",
            "revision", "stride", "weights",
        ),
        (
            "jafar", "featup", "readout: nyu", "correspondence: navi", "video", "discovery", "cka", "similarity", "fidelity",
            "sharpness",
        ),
    ),
}  # fmt: skip
"""Settings of the one loop of all trainings and of the one report of all evaluations that results don't depend on (each such run
is done to its end, twice), and settings of features, which jobs hold in one class: the kinds of runs that they are changed in by
`make soak` alone. Others of each base are tried here, and those whose other settings are their own."""


def cases() -> Iterator[tuple[str, str, object]]:
    """Kind of run, setting, other value."""
    for kind in TRIED:
        config = KINDS[kind].config(Path("WORLD"))
        held = {"": config, **({"cell.": config.cell} if kind == "grid" else {})}
        for prefix, each in held.items():
            for name, setting in settings_of(type(each)).items():
                if name not in ELSEWHERE:
                    others = other_values(kind, setting, setting.of(each))
                    if name not in WHERE or kind in WHERE_TRIED:
                        yield from ((kind, f"{prefix}{name}", value) for value in others)


CASES = list(cases())


def parameters() -> Iterator[object]:
    """The cases of a test."""
    for kind, name, value in CASES:
        marks = [pytest.mark.soak] if kind in ALIKE.get(name, ()) else []
        yield pytest.param(kind, name, value, id=f"{kind}: {name} {value}", marks=marks)


def changed(config: JobConfig, name: str, value: object) -> JobConfig:
    """The settings with another value; `cell.lr` is one of those that a grid's cells have."""
    if name.startswith("cell."):
        return config.changed(cell=config.cell.changed(**{name.removeprefix("cell."): value}))
    return config.changed(**{name: value})


@pytest.fixture(scope="module")
def held(world, tmp_path_factory):
    """The first run of a kind, done once."""
    found: dict[str, Held] = {}

    def of(kind: str) -> Held:
        if kind not in found:
            found[kind] = Held(KINDS[kind], KINDS[kind].config(world), tmp_path_factory.mktemp("runs"))
        return found[kind]

    return of


@pytest.mark.parametrize(("kind", "name", "value"), parameters())
def test_other_value_is_refused_by_name_or_counts(kind, name, value, held, world):
    first = held(kind)
    value = _placed(value, world)
    plain = name.rpartition(".")[2]
    words = [plain, plain.replace("_", "-"), *CALLED.get(plain, ()), *_words(value)]
    try:
        config = changed(first.config, name, value)
    except ConfigError as error:
        again: Outcome = Refused(str(error))
    else:
        again = first.again(config)

    assert complaint(again, lambda: first.fresh(config), words) == ""


def _placed(value: object, world: Path) -> object:
    if isinstance(value, tuple):
        return tuple(_placed(each, world) for each in value)
    return value.replace("WORLD", str(world)) if isinstance(value, str) else value


def _words(value: object) -> list[str]:
    """The texts in a value."""
    if isinstance(value, tuple):
        return [word for each in value for word in _words(each)]
    return [value] if isinstance(value, str) else []


@pytest.fixture(scope="module")
def moved(world, tmp_path_factory) -> Path:
    return shutil.copytree(world, tmp_path_factory.mktemp("elsewhere") / "moved")


@pytest.mark.parametrize("kind", KINDS)
def test_input_that_lies_elsewhere_changes_nothing(kind, held, moved):
    first = held(kind)
    known = settings_of(type(first.config)).values()
    # Checkpoints in levels, methods and readouts are told by where they are.
    told = {each.name: each.of(first.config) for each in known if each.identity is Identity.COUNTS}
    again = first.again(KINDS[kind].config(moved).changed(**told))

    assert again == first.first
