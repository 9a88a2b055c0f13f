"""LiFT's tables and figures (arXiv 2403.14625) as cells: one LiFT is trained, and serves ten of them.

Tables 1, 4, 5 and 7 and the figures are numbered as our notes on the paper have them. Of the others, the notes say what is in
them and no number: here 2 is DAVIS, 3 COCO20k, 6 the larger backbone, 8 LiFT twice, and the supplement has ablations, epochs,
backbones, J and F, and VOC07 with VOC12, in that order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from pipelines.published import UNSAID, Published
from pipelines.published.lift import (
    LIFT_ABLATIONS,
    LIFT_BACKBONES,
    LIFT_COMPUTE,
    LIFT_CORRESPONDENCE,
    LIFT_CROSSED,
    LIFT_DETECTION,
    LIFT_DISCOVERY,
    LIFT_EPOCHS,
    LIFT_OPERATIONS,
    LIFT_RIVALS,
    LIFT_SIDES,
    LIFT_VIDEO,
)
from pipelines.tables.lift_cells import ALPHAS, CROSSED, IMAGES, LABELS, METHODS, MODELS, OWN, STRIDE, Cells
from pipelines.tables.lift_detectors import DETECTORS, DetectorCells
from pipelines.tables.papers import Job, PaperPlan, PapersConfig, PaperTable, Wanted
from storage.documents import JsonValue


def plan(config: PapersConfig) -> PaperPlan:
    """All of the paper. Raises `ConfigError` for words that mean nothing."""
    config.require_known(data={*IMAGES, "photos"}, backbone={*MODELS}, weights={*MODELS, *DETECTORS})
    make = Cells(config=config)
    tables: tuple[PaperTable, ...] = (
        _rows(make, "1", "SPair-71k, PCK, %", make.correspondence, {each: (LIFT_CORRESPONDENCE, each) for each in ALPHAS}),
        _rows(make, "2", "DAVIS-2017, J&F, %", make.video, {"J&F": (LIFT_VIDEO, "J&F")}),
        _discovery(make, "3", "objects in COCO20k, CorLoc, %", "coco20k"),
        _detection(make),
        _compute(make, "5", "operations and scores"),
        _larger(make),
        _crossed(make),
        _twice(make),
        _compute(make, "fig3", "operations and PCK@0.1", curve=True),
        _picture(make, "fig4", "CKA between sizes", "cka", "cka.png", "x2"),
        _picture(make, "fig5", "self-similarity of the centre", "similarity", "similarity.png", "x2"),
        _picture(make, "fig6", "self-similarity, LiFT again and again", "similarity", "similarity.png", "x2", "x4", "x8"),
        _ablations(make),
        _epochs(make),
        _backbones(make),
        _rows(make, "s4", "DAVIS-2017, J and F, %", make.video, {each: (LIFT_VIDEO, each) for each in ("J", "F")}),
        _discovery(make, "s5", "objects in VOC07 and VOC12, CorLoc, %", "voc07", "voc12"),
    )  # fmt: skip
    return make.plan("LiFT", tables)


def _line(method: str) -> str:
    return {"backbone": "low-res", "bilinear": "bilinear x2"}.get(method, f"{method} x2")


class Evaluate(Protocol):
    """Names the cell that evaluates a backbone and what the cell `trained` made."""

    def __call__(self, backbone: str = OWN, trained: str = "", /) -> str: ...


def _rows(make: Cells, number: str, title: str, evaluate: Evaluate, columns: Mapping[str, tuple[Published, str]]) -> PaperTable:
    """A table of the methods on DINO, and of other networks' own maps, by size; of each column, where its numbers are: those of
    methods, and by which name in `LIFT_RIVALS`."""
    wanted = []
    cells = {"backbone": evaluate(OWN)} | {each: evaluate(OWN, make.training(each)) for each in ("resize_conv", "jbu", "lift")}
    cells["bilinear"] = cells["backbone"]
    for method in ("backbone", "bilinear", "resize_conv", "jbu", "lift"):
        row = "DINO" if method == "backbone" else f"+ {METHODS[method]}"
        for column, (published, _) in columns.items():
            for side in make.sides:
                value = published.values(method, str(side)).get(column)
                wanted.append(_wanted(row, column, side, cells[method], _line(method), value))
    for rival, numbers in LIFT_RIVALS.items():
        for column, (_, name) in columns.items():
            values = {side: _by_side(numbers[name], side) for side in make.sides}
            wanted += [_wanted(LABELS[rival], column, side, evaluate(rival), "low-res", each) for side, each in values.items()]
    return PaperTable(number=number, title=title, wanted=tuple(wanted))


def _wanted(row: str, column: str, side: int, cell: str, line: str, published: float | None, called: str = "") -> Wanted:
    return Wanted(
        row=row, column=f"{called or column}, {side} px", cell=cell, line=line, value=column, px=side, published=published
    )


def _by_side(values: Sequence[float], side: int) -> float | None:
    return dict(zip(LIFT_SIDES, values, strict=True)).get(str(side))


def _discovery(make: Cells, number: str, title: str, *datasets: str) -> PaperTable:
    wanted: list[Wanted] = []
    for dataset in datasets:

        def evaluate(backbone: str = OWN, trained: str = "", /, dataset: str = dataset) -> str:
            return make.evaluation("discovery", dataset, backbone, trained, changes={"dataset": dataset})

        rows = _rows(make, number, title, evaluate, {"CorLoc": (LIFT_DISCOVERY[dataset], dataset)}).wanted
        wanted += [replace(each, column=f"{dataset}, {each.px} px") for each in rows]
    return PaperTable(number=number, title=title, wanted=tuple(wanted))


def _detection(make: Cells) -> PaperTable:
    """A plain detector, and one whose heads were trained on the maps of a LiFT of its backbone."""
    wanted, detectors = [], DetectorCells(make)
    for head, label in (("mask_rcnn", "Mask R-CNN"), ("cascade", "Cascade R-CNN")):
        for method in ("backbone", "lift"):
            cell, row = detectors.detection(head, lift=method == "lift"), f"{label}{', LiFT' if method == 'lift' else ''}"
            for column, published in LIFT_DETECTION[head].values(method, UNSAID).items():
                line = _line(method)
                wanted.append(Wanted(row=row, column=column, cell=cell, line=line, value=column, published=published))
    return PaperTable(number="4", title="COCO with ViTDet, %", wanted=tuple(wanted))


_COUNT = "10^9, LiFT's count"


def _compute(make: Cells, number: str, title: str, *, curve: bool = False) -> PaperTable:
    """Operations, and the scores that they buy; a curve has the first score alone."""
    wanted = []
    for side, stride in LIFT_COMPUTE:
        here, other = make.side(side), stride if stride != 16 else None
        called = f"{here}px{f'-stride{other}' if other else ''}"
        known = next(each for each in LIFT_OPERATIONS if (each.size, each.stride) == (side, stride) and "small" in each.model)
        for method in ("backbone", "lift"):
            row = f"{side} px, stride {stride}{', LiFT' if method == 'lift' else ''}"
            operations = make.operations(OWN, here, other)
            if other and method == "lift":
                cells = [make.missing(f"lift-stride{other}", STRIDE)] * 2
            else:
                trained = make.training() if method == "lift" else ""
                both = (make.correspondence, make.video)
                cells = [each(OWN, trained, name=called, sides=(here,), stride=other) for each in both]
            macs = known.lift if method == "lift" else known.alone
            wanted.append(Wanted(row=row, column=_COUNT, cell=operations, line=_line(method), value=_COUNT, published=macs))
            columns = ("PCK@0.1", "J&F")[: 1 if curve else 2]
            for column, cell, value in zip(columns, cells, LIFT_COMPUTE[side, stride][method], strict=False):
                wanted.append(
                    Wanted(row=row, column=column, cell=cell, line=_line(method), value=column, px=here, published=value)
                )
    note = "the published totals of LiFT at stride 8, 19.65 and 81.18, follow from no rule of counting that we know"
    return PaperTable(number=number, title=title, wanted=tuple(wanted), drawing="scatter" if curve else "", notes=(note,))


def _larger(make: Cells) -> PaperTable:
    side, wanted = make.side(224), []
    known = {each.model: each for each in LIFT_OPERATIONS if (each.size, each.stride) == (224, 16)}
    for row, backbone, method, score in (
        ("ViT-S/16", OWN, "backbone", LIFT_CORRESPONDENCE.values("backbone", "224")["PCK@0.1"]),
        ("ViT-S/16, LiFT", OWN, "lift", LIFT_CORRESPONDENCE.values("lift", "224")["PCK@0.1"]),
        ("ViT-B/16", "dino-b16", "backbone", _by_side(LIFT_BACKBONES["dino-b16"]["backbone"]["PCK@0.1"], 224)),
    ):
        numbers = known[MODELS[backbone]]
        macs, trained = (numbers.lift, make.training()) if method == "lift" else (numbers.alone, "")
        cell = make.correspondence(backbone, trained)
        wanted += [
            Wanted(
                row=row, column=_COUNT, cell=make.operations(backbone, side), line=_line(method), value=_COUNT, published=macs
            ),
            Wanted(row=row, column="PCK@0.1", cell=cell, line=_line(method), value="PCK@0.1", px=side, published=score),
        ]
    return PaperTable(number="6", title=f"a larger backbone, at {side} px", wanted=tuple(wanted))


def _crossed(make: Cells) -> PaperTable:
    side, wanted, names = make.side(448), [], {"dino-s16": "DINO", "moco": "MoCo v3", "vit": "supervised ViT"}
    for backbone, (without, own) in LIFT_CROSSED.items():
        cell, row = make.correspondence(backbone), names[backbone]
        wanted.append(Wanted(row=row, column="no LiFT", cell=cell, line="low-res", value="PCK@0.1", px=side, published=without))
        for trained in LIFT_CROSSED:
            one = trained == backbone
            lift = (
                make.correspondence(backbone, make.training("lift", backbone))
                if one
                else make.missing(f"correspondence-{backbone}-lift-of-{trained}", CROSSED)
            )
            column, value = f"LiFT of {names[trained]}", own if one else None
            wanted.append(Wanted(row=row, column=column, cell=lift, line="lift x2", value="PCK@0.1", px=side, published=value))
    return PaperTable(number="7", title=f"LiFT of one backbone on another, PCK@0.1 at {side} px", wanted=tuple(wanted))


def _twice(make: Cells) -> PaperTable:
    wanted = []
    for backbone, label in (("dino-s16", "DINO"), ("moco", "MoCo v3"), ("vit", "supervised ViT")):
        trained = make.training("lift", backbone)
        cell = make.evaluation("correspondence", "spair", backbone, trained, levels=("x4",), name="twice")
        for side in make.sides:
            value = _by_side(LIFT_BACKBONES[backbone]["lift twice"]["PCK@0.1"], side)
            wanted.append(_wanted(f"{label}, LiFT twice", "PCK@0.1", side, cell, "lift x4", value))
    return PaperTable(number="8", title="LiFT applied twice, PCK@0.1", wanted=tuple(wanted))


def _picture(make: Cells, number: str, title: str, job: Job, file: str, *levels: str) -> PaperTable:
    """A figure that a cell draws; the paper prints no numbers."""
    trained, scale, side = make.training(), make.config.scale, make.side(224)
    sides: Sequence[int] = (side, 2 * side)
    changes: dict[str, JsonValue] = {"pictures": 6, "limit": 6}
    if job == "cka":
        sides = range(56, 449, 56) if scale == "paper" else (64, 128, 192)
        changes = {"pictures": 6, **({"batch": 4} if scale == "debug" else {})}
    cell = make.evaluation(job, "spair", OWN, trained, levels=levels, name="".join(levels[1:]), sides=sides, changes=changes)
    return PaperTable(number=number, title=title, pictures={cell: f"pictures/{file}"}, notes=("the paper prints no numbers",))


def _ablations(make: Cells) -> PaperTable:
    variants: Mapping[str, Mapping[str, JsonValue]] = {
        "random": {
            "start": "drawn", "max_steps": 1, "lr": 1e-12, "schedule": "constant", "warmup_steps": 0, "checkpoint_every": 1,
            "validate_every": 1,
        },
        "no-image": {"image_branch": False},
        "l1": {"loss": "l1"},
        "l2": {"loss": "l2"},
    }  # fmt: skip
    wanted = []
    for name, changes in {**variants, "lift": {}}.items():
        trained = make.training("lift", OWN, "" if name == "lift" else name, **changes)
        cell, row = make.correspondence(OWN, trained), {"lift": "LiFT", "no-image": "no image"}.get(name, name)
        for side in make.sides:
            value = (
                LIFT_CORRESPONDENCE.values("lift", str(side)).get("PCK@0.1")
                if name == "lift"
                else _by_side(LIFT_ABLATIONS[name], side)
            )
            wanted.append(_wanted(row, "PCK@0.1", side, cell, "lift x2", value))
    note = "random: one step at a learning rate of 1e-12, which fills BatchNorm's statistics and leaves the weights"
    return PaperTable(number="s1", title="ablations, PCK@0.1", wanted=tuple(wanted), notes=(note,))


def _epochs(make: Cells) -> PaperTable:
    wanted, scale = [], make.config.scale
    of_five = make.config.steps or {"mini": 280, "debug": 4}.get(scale)
    for epochs, values in LIFT_EPOCHS.items():
        length: dict[str, JsonValue] = {"max_steps": of_five * epochs // 5} if of_five else {"epochs": epochs}
        # Another run than Table 1's, as in the paper.
        cell = make.correspondence(OWN, make.training("lift", OWN, f"{epochs}-epochs", seed=1, **length))
        for side in make.sides:
            published = {112: values[0], 224: values[1]}.get(side)
            wanted.append(_wanted(f"{epochs} epochs", "PCK@0.1", side, cell, "lift x2", published))
    notes = (f"5 epochs stand for {of_five:,} steps",) if of_five else ()
    return PaperTable(number="s2", title="length of training, PCK@0.1", wanted=tuple(wanted), notes=notes)


def _backbones(make: Cells) -> PaperTable:
    labels = {"dino-b16": "DINO B/16", "dino-s8": "DINO S/8", "dino-b8": "DINO B/8", **LABELS}
    wanted = []
    for backbone, methods in LIFT_BACKBONES.items():
        for method in ("backbone", "lift"):
            cell = make.correspondence(backbone, make.training("lift", backbone) if method == "lift" else "")
            row = f"{labels[backbone]}{', LiFT' if method == 'lift' else ''}" if backbone in labels else ""
            for column, values in methods.get(method, {}).items():
                wanted += [_wanted(row, column, side, cell, _line(method), _by_side(values, side)) for side in make.sides]
    return PaperTable(number="s3", title="backbones on SPair-71k, PCK, %", wanted=tuple(wanted))
