"""DeAP's tables and figures (Dense Attentive Probing, TMLR) as cells: readouts that are trained and judged, counts and speeds.

Table 3 (backbones and tasks) and Table 5 (ablations) are as our notes on the paper have them; so is that Figure 4 compares
readouts and Figure 7 speeds, without numbers. Table 4 is taken to be the learned parameters, which the notes have without a
number. Of Figures 3, 5 and 6 the notes have neither pictures nor numbers: here 3 shows predictions, 5 what comes of more or fewer
query positions than were trained on, and 6 how scores go with ImageNet accuracies that others publish of the same backbones.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

from operators.readouts.variants import VARIANTS
from pipelines.config import ConfigError
from pipelines.costs.speed import SpeedProtocol
from pipelines.published.deap import (
    DEAP_ABLATED,
    DEAP_ABLATIONS,
    DEAP_FEATUP,
    DEAP_PARAMETERS,
    DEAP_RECIPES,
    DEAP_TASKS,
    deap_values,
)
from pipelines.published.others import IMAGENET_LINEAR, IMAGENET_ZERO_SHOT
from pipelines.tables.backbones import BACKBONES, BY_NAME
from pipelines.tables.grid_cells import without_unused
from pipelines.tables.paper_cells import ScaledCells
from pipelines.tables.papers import LACKS, Correlated, PaperCell, PaperPlan, PapersConfig, PaperTable, Wanted
from pipelines.tables.tasks import PUBLISHED, Column
from storage.documents import JsonValue

OWN = "dinov2-b"
"""The backbone of the figures that don't say another."""

MOCO = "MoCo v3's weights: give --weights moco-v3=URL of the file that its authors released"

SAM2 = "SAM2's neck, whose map is what DeAP reads: timm has the trunk alone"

MODELS = {each.name: each.model for each in BACKBONES}

HERE: Mapping[str, Mapping[str, int]] = {
    "mini": {OWN: 224, "untrained": 224},
    "debug": {OWN: 64, "mae": 64, "siglip-384": 96, "dino": 64, "untrained": 64},
}
"""Backbones that other scales than the paper's have, and the sides of their input."""

FOLDERS = {"voc": "photos_open", "coco": "photos_open"}
"""Of `mini`, below --root."""

STAND_INS: Mapping[str, str] = {"voc": "photos_open", "coco": "photos_open_instances"}
"""mini's data sets in the place of those that --data doesn't name."""

DEMO = {"voc": "demo/evaluate/VOC2012", "coco": "demo/evaluate/coco"}

IMAGES: Mapping[str, int] = {"voc": 1_449, "coco": 5_000, "coco_stuff": 5_000, "nyu": 654}
"""That are judged, of each data set as it is published."""

SMALL: Mapping[str, Mapping[str, JsonValue]] = {
    "mini": {
        "precision": "fp32", "side": 112, "batch": 8, "max_steps": 100, "checkpoint_every": 25, "validate_every": 100,
        "log_every": 25,
    },
    "debug": {
        "precision": "fp32", "side": 64, "batch": 3, "lr": 1e-2, "max_steps": 2, "checkpoint_every": 2, "validate_every": 2,
        "log_every": 1,
    },
}  # fmt: skip
"""Trainings at other scales than the paper's."""

FEW_OBJECTS: Mapping[str, JsonValue] = {"samples": 256, "large_area": 100.0, "many": 1}
"""Of instance discrimination there: which images are judged."""

BASELINES = {"deap": "DeAP", "bicubic": "bicubic", "transposed": "transposed convolution", "linear": "linear", "featup": "FeatUp"}

ABLATIONS = {
    "deap": "DeAP", "deap-8-dim": "8 dimensions", "deap-no-sigma": "no mask", "deap-no-indiv-sigma": "one width for all heads",
    "deap-only-mask": "mask alone",
}  # fmt: skip


SPEED = "speed, relative to the reference"


COLUMNS: Mapping[str, tuple[Column, ...]] = {name: PUBLISHED[name].columns for name in DEAP_TASKS}
"""By task; figures show the last one."""


@dataclass(frozen=True, kw_only=True)
class _Cells(ScaledCells):
    """DeAP's."""

    own, models, folders, drawn, lacking = OWN, MODELS, FOLDERS, DEMO, "probe"

    # --- what cells are of --------------------------------------------------------------------------------------------

    def side(self, backbone: str) -> int:
        """Of a backbone's input, in pixels."""
        if self.config.scale == "paper":
            return BY_NAME[backbone].size
        return (self.config.sizes or (HERE[self.config.scale].get(backbone, HERE[self.config.scale][OWN]),))[0]

    def weights(self, backbone: str) -> str:
        if BY_NAME[backbone].weights == "random":
            return "random"
        drawn = self.config.scale == "debug" and backbone not in self.config.pairs("weights")
        return f"random:{[*HERE['debug'], backbone].index(backbone)}" if drawn else super().weights(backbone)

    def features(self, backbone: str) -> dict[str, JsonValue]:
        """Settings of a backbone's map."""
        ragged = self.config.scale == "paper" and BY_NAME[backbone].ragged and backbone not in self.config.pairs("backbone")
        found: dict[str, JsonValue] = {"model": self.model(backbone), "weights": self.weights(backbone)}
        return {**found, **({"ragged": True} if ragged else {})}

    def lacks(self, backbone: str, task: str, method: str = "deap") -> str:
        """What isn't there of a backbone, a task's data set and a method's file."""
        scale, given = self.config.scale, {*self.config.pairs("weights"), *self.config.pairs("backbone")}
        found = []
        if backbone == "sam2" and backbone not in self.config.pairs("backbone"):
            found.append(SAM2)
        elif backbone == "moco-v3" and scale == "paper" and backbone not in given:
            found.append(MOCO)
        elif scale != "paper" and backbone not in HERE[scale]:
            found += filter(None, [self.lacks_backbone(backbone)])
        if method == "featup" and "featup" not in given:
            found.append("FeatUp's file for DINOv2 ViT-S/14: give --weights featup=URL")
        return LACKS.join([*found, *self.lacks_data(DEAP_RECIPES[task].dataset)])

    def tokens(self, backbone: str) -> float:
        """Of one image, times the backbone's parameters."""
        of = BY_NAME[backbone]
        if self.config.scale == "paper":
            return float((of.grid or 0) ** 2 * (of.parameters or 0))
        return 5.7e6 * (self.side(backbone) // 16) ** 2

    def dataset(self, task: str) -> str:
        """What a task is learned on: the paper's, or what stands in its place."""
        name = DEAP_RECIPES[task].dataset
        return STAND_INS.get(name, name) if self.config.scale == "mini" and name not in self.config.pairs("data") else name

    def output(self) -> int:
        """Sides of outputs as they are trained."""
        return int(str(SMALL.get(self.config.scale, {}).get("side", 224)))

    # --- cells --------------------------------------------------------------------------------------------------------

    def readout(self, backbone: str, task: str, method: str = "deap") -> str:
        """The cell that trains."""
        config, recipe = self.config, DEAP_RECIPES[task]
        small: dict[str, JsonValue] = {**SMALL.get(config.scale, {})}
        if small and task == "instances":
            small |= FEW_OBJECTS
        if config.steps:
            small["max_steps"] = config.steps
        if config.limit:
            small |= {"limit": config.limit, "val_limit": config.limit}
        recipes: dict[str, JsonValue] = {**recipe.settings, **VARIANTS[method], **self.features(backbone)}
        if self.dataset(task) != recipe.dataset:  # whose classes are others
            recipes.pop("outputs", None)
        if method == "featup":
            recipes |= {**DEAP_FEATUP, "level": f"x16=featup:{config.pairs('weights').get('featup', '')}"}
        settings: dict[str, JsonValue] = {
            **recipes, "data": self.folder(recipe.dataset), "task": recipe.task, "dataset": self.dataset(task),
            **({"size": self.side(backbone)} if method != "featup" else {}), **small,
        }  # fmt: skip
        training, _ = without_unused(settings)
        images = (training.max_steps or 0) * training.batch + IMAGES[recipe.dataset]
        return self.add(
            PaperCell(
                name="-".join(filter(None, ("readout", backbone, task, method.removeprefix("deap").strip("-")))),
                job="readout",
                settings={name: value for name, value in settings.items() if name in training.given},
                missing=self.lacks(backbone, task, method),
                token_parameters=images * self.tokens(backbone),
                stored_bytes=1e6,
            )
        )

    def probe(self, backbone: str, task: str, method: str = "deap", *, side: int | None = None, pictures: int = 0) -> str:
        """The cell that judges what was trained on the validation part, by outputs of `side` pixels."""
        readout, recipe, config = self.readout(backbone, task, method), DEAP_RECIPES[task], self.config
        limit = pictures or config.limit
        levels = [level] if (level := self.cells[readout].settings.get("level")) else []
        model = {"model": DEAP_FEATUP["model"]} if method == "featup" else {}
        precision = {"precision": "fp32"} if config.scale != "paper" else {}
        settings: dict[str, JsonValue] = {
            **self.features(backbone), **model, **precision, "data": self.folder(recipe.dataset),
            "readouts": (f"{{{readout}}}",), "levels": ("x1", *levels), "pictures": pictures,
            **({"limit": limit} if limit else {}), **({"side": side} if side else {}),
        }  # fmt: skip
        words = ("probe", readout.removeprefix("readout-"), f"{side}px" if side else "", "pictures" if pictures else "")
        images = min(IMAGES[recipe.dataset], limit or IMAGES[recipe.dataset])
        return self.add(
            PaperCell(
                name="-".join(filter(None, words)),
                job="probe",
                settings=settings,
                needs=(readout,),
                missing=self.cells[readout].missing,
                token_parameters=images * self.tokens(backbone),
                stored_bytes=2e3 * images,
            )
        )

    def counts(self) -> str:
        """Learned parameters of DeAP: nothing is trained for it."""
        return self.add(PaperCell(name="counts", job="counts", stored_bytes=1e4))

    def speeds(self) -> str:
        """Of all backbones that are there, with random weights, on one machine."""
        there: dict[str, JsonValue] = {each: [self.model(each), self.side(each)] for each in self.backbones if self.model(each)}
        protocol: dict[str, JsonValue] = {}
        if self.config.scale == "mini":
            protocol = {"precision": "fp32", "batch": 4, "batches": 5}
        elif self.config.scale == "debug":
            protocol = {"precision": "fp32", "batch": 1, "batches": 3, "reference": self.model(OWN), "reference_size": 64}
        full = SpeedProtocol()
        settings: dict[str, JsonValue] = {"backbones": there, "protocol": {**vars(full), **protocol}}
        return self.add(PaperCell(name="speeds", job="speed", settings=settings, stored_bytes=1e5))

    @property
    def backbones(self) -> list[str]:
        """Those of a table: the paper's; of other scales, those that are there or that --backbone gives."""
        if self.config.scale == "paper":
            return [each.name for each in BACKBONES]
        given = {*HERE[self.config.scale], *self.config.pairs("backbone")}
        return [each.name for each in BACKBONES if each.name in given]

    @property
    def ablated(self) -> list[str]:
        """Table 5's, likewise."""
        return [each for each in DEAP_ABLATED if each in self.backbones]

    def wanted(self, column: Column, backbone: str, task: str, method: str = "deap", *, row: str, name: str) -> Wanted:
        """A number of a table."""
        cell = self.probe(backbone, task, method) if column.judged else self.readout(backbone, task, method)
        known = method in ("deap", *DEAP_ABLATIONS.rows)
        published = deap_values(backbone, method, task).get(column.head) if known and task in DEAP_TASKS else None
        return Wanted(
            row=row,
            column=name,
            cell=cell,
            line="",
            value=column.judged or column.metric,
            published=published,
            scale=1.0 if column.judged else column.scale,
            digits=column.digits,
            falls=column.falls,
        )


def plan(config: PapersConfig) -> PaperPlan:
    """All of the paper. Raises `ConfigError` for words that mean nothing."""
    names = {each.name for each in BACKBONES}
    datasets = {recipe.dataset for recipe in DEAP_RECIPES.values()}
    config.require_known(data=datasets, backbone=names, weights={*names, "featup"} - {"untrained"})
    if len(config.sizes) > 1 or (config.sizes and config.scale == "paper"):
        given = " ".join(map(str, config.sizes))
        raise ConfigError(
            f"--sizes {given}: each of DeAP's backbones has one side of its input, the paper's; give one size, for mini and debug"
        )
    make = _Cells(config=config)
    tables: tuple[PaperTable, ...] = (
        _backbones(make), _parameters(make), _ablations(make), _predictions(make), _readouts(make), _resolutions(make),
        _correlations(make), _speeds(make),
    )  # fmt: skip
    return make.plan("DeAP", tables, counted=("4",))


def _label(task: str, column: Column) -> str:
    return f"{DEAP_RECIPES[task].label} {column.head}"


def _backbones(make: _Cells) -> PaperTable:
    wanted = [
        make.wanted(column, backbone, task, row=BY_NAME[backbone].label, name=_label(task, column))
        for backbone, task in product(make.backbones, DEAP_TASKS)
        for column in COLUMNS[task]
    ]
    notes = [f"{BY_NAME[each].label}: {BY_NAME[each].note}" for each in make.backbones if BY_NAME[each].note]
    units = "ARI and IoU in percent; CE is the mean cross-entropy; AP_lg a share of 1; RMSE in metres"
    return PaperTable(number="3", title="backbones, read out by DeAP", wanted=tuple(wanted), notes=(units, *notes))


def _parameters(make: _Cells) -> PaperTable:
    cell = make.counts()
    wanted = [
        Wanted(
            row=row, column=DEAP_RECIPES[task].label, cell=cell, line=row, value=DEAP_RECIPES[task].label, published=value,
            scale=1e-6, digits=3,
        )
        for (row, _), values in DEAP_PARAMETERS.items()
        for task, value in zip(DEAP_TASKS, values, strict=True)
    ]  # fmt: skip
    return PaperTable(number="4", title="learned parameters of DeAP, 10^6", wanted=tuple(wanted))


def _ablations(make: _Cells) -> PaperTable:
    wanted = []
    for method, row in ABLATIONS.items():
        for task, backbone in product(("detection", "voc", "depth"), make.ablated):
            column = COLUMNS[task][-1]
            name = f"{_label(task, column)}, {BY_NAME[backbone].label}"
            wanted.append(make.wanted(column, backbone, task, method, row=row, name=name))
    return PaperTable(number="5", title="parts of DeAP left out or changed", wanted=tuple(wanted))


UNNUMBERED = "the paper prints no numbers"


def _predictions(make: _Cells) -> PaperTable:
    cells = [make.probe(OWN, task, pictures=6) for task in ("voc", "boundaries")]
    return PaperTable(
        number="fig3", title="predictions of held-out images", pictures=dict.fromkeys(cells, "pictures/predictions.png"),
        notes=("what it shows in the paper isn't in our notes",),
    )  # fmt: skip


def _readouts(make: _Cells) -> PaperTable:
    wanted = [
        replace(make.wanted(column, OWN, task, method, row=row, name=_label(task, column)), published=None)
        for method, row in BASELINES.items()
        for task in DEAP_TASKS
        for column in COLUMNS[task][-1:]
    ]
    note = "FeatUp reads DINOv2 ViT-S/14 at 280 px, as the paper's release has it"
    return PaperTable(
        number="fig4", title=f"readouts of {BY_NAME[OWN].label}", wanted=tuple(wanted), drawing="bars", notes=(UNNUMBERED, note)
    )


def _resolutions(make: _Cells) -> PaperTable:
    wanted, trained = [], make.output()
    for task, backbone in (("voc", OWN), *(("voc", each) for each in make.ablated if each != OWN), ("boundaries", OWN)):
        column = COLUMNS[task][-1]
        for side in (trained // 2, trained, 2 * trained):
            cell = make.probe(backbone, task, side=side) if side != trained else make.probe(backbone, task)
            row, name = f"{_label(task, column)}, {BY_NAME[backbone].label}", f"{side} px"
            wanted.append(Wanted(row=row, column=name, cell=cell, line="", value=column.judged, digits=column.digits))
    notes = (
        f"trained with outputs of {trained} px, a query for each 8 x 8; labels are of the output's size, so that only "
        "lines within one size compare",
        "what it shows in the paper isn't in our notes",
    )
    return PaperTable(
        number="fig5", title="outputs of other sizes than were trained, %", wanted=tuple(wanted), drawing="lines", notes=notes
    )


def _correlations(make: _Cells) -> PaperTable:
    correlated = []
    sets: Mapping[str, Mapping[str, float]] = {
        "ImageNet, linear probe": IMAGENET_LINEAR,
        "ImageNet, zero-shot": IMAGENET_ZERO_SHOT,
    }
    for row, others in sets.items():
        names = [each for each in make.backbones if each in others]
        for task in DEAP_TASKS:
            column = COLUMNS[task][-1]
            label = _label(task, column)
            numbers = tuple(make.wanted(column, each, task, row=BY_NAME[each].label, name=label) for each in names)
            labels = tuple(each.row for each in numbers)
            correlated.append(
                Correlated(
                    row=row, column=label, numbers=numbers, others=tuple(others[each] for each in names), names=labels
                )
            )  # fmt: skip
    notes = (
        "Spearman's rank correlation; below it, that of Table 3's printed scores, which the paper doesn't print; of errors "
        "(RMSE), less is better",
        "which scores of others the paper takes isn't in our notes: these are of their authors' and OpenCLIP's repositories",
    )
    return PaperTable(
        number="fig6", title="scores beside ImageNet accuracies that others publish", correlated=tuple(correlated),
        drawing="pairs", notes=notes,
    )  # fmt: skip


def _speeds(make: _Cells) -> PaperTable:
    wanted, cell = [], make.speeds()
    for backbone in make.backbones:
        row = BY_NAME[backbone].label
        here = cell if make.model(backbone) else make.missing(f"speed-{backbone}", SAM2)
        wanted.append(Wanted(row=row, column=SPEED, cell=here, line=backbone, value="relative"))
        for task in DEAP_TASKS:
            column = COLUMNS[task][-1]
            wanted.append(make.wanted(column, backbone, task, row=row, name=_label(task, column)))
    notes = (
        f"{UNNUMBERED} of speeds; scores are Table 3's",
        "the reference is ViT-B/16 at 224 px at the paper's scale and at mini",
    )
    return PaperTable(number="fig7", title="speed and scores", wanted=tuple(wanted), drawing="front", notes=notes)
