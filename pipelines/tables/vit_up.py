"""ViT-Up's tables (arXiv 2606.14024) as cells: probes and correspondence on its maps, rivals' and a bilinear one, and its cost.

Tables 1, 2, 4 and 9 are as our notes on the paper have them. Of 5, 6, 7 and Figure 4 the notes have no numbers, nor what is in
which: here 5 leaves out parts of the network, 6 terms of the loss, and 7 and the figure are named as missing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.config import ConfigError
from pipelines.published.recipes import RECIPES
from pipelines.published.vit_up import (
    VIT_UP_CORRESPONDENCE,
    VIT_UP_DEPTH,
    VIT_UP_FEATURES,
    VIT_UP_LARGER,
    VIT_UP_NAVI,
    VIT_UP_PROBES,
    VIT_UP_RUNTIME,
    VIT_UP_SEED,
    VIT_UP_SEGMENTATION,
    VIT_UP_SIZE,
    VIT_UP_TRAINING,
)
from pipelines.tables.paper_cells import ScaledCells
from pipelines.tables.papers import LACKS, PaperCell, PaperPlan, PapersConfig, PaperTable, Wanted
from pipelines.tables.tasks import PUBLISHED, Column
from pipelines.training.short import VIT_UP_SHORT
from storage.documents import JsonValue

MODELS = {"splus": "vit_small_plus_patch16_dinov3_qkvb.lvd1689m", "base": "vit_base_patch16_dinov3_qkvb.lvd1689m"}

LABELS = {"bilinear": "bilinear", "jafar": "JAFAR", "anyup": "AnyUp", "uplift": "UPLiFT", "naf": "NAF", "vit_up": "ViT-Up"}
"""Methods, in the order of the tables."""

RIVALS = ("jafar", "anyup", "uplift", "naf")

PROBES = {"coco": "COCO", "voc": "VOC", "ade20k": "ADE20K", "cityscapes": "Cityscapes"}
"""Data sets of Table 1, as --data names them."""

PARAMETERS = {"splus": 28.7e6, "base": 85.7e6}

IMAGES = {"coco": 97_702 * 5 + 4_172, "voc": 1_464 * 20 + 1_449, "ade20k": 20_210 * 20 + 2_000, "cityscapes": 2_975 * 20 + 500,
          "spair": 2 * 12_234, "navi": 2 * 575, "photos": 53_381 * 24}  # fmt: skip
"""That a cell looks at: of probes, all epochs and the validation part; of correspondence, pairs of images."""

DEMO = {"spair": "demo/evaluate/SPair-71k", "voc": "demo/evaluate/VOC2012", "photos": "demo/photos-{000..001}.tar"}

FOLDERS = {"spair": "labelled/spair_layout/SPair-71k", "photos": "photos_train"}
"""Of `mini`, below --root: its other sets have no training part."""

SMALL: Mapping[str, Mapping[str, JsonValue]] = {
    "mini": {**VIT_UP_SHORT, "epochs": 10, "checkpoint_every": 20, "validate_every": 200, "log_every": 20},
    "debug": {
        "size": 128, "teacher_sizes": (32, 64, 128), "hidden_size": 64, "query_size": 128, "hidden_states": (0, 3, 6),
        "net_precision": "fp32", "warmup_steps": 1, "val_rows": 2, "batch": 4, "epochs": 5, "max_steps": 3, "checkpoint_every": 2,
        "validate_every": 2, "log_every": 1,
    },
}  # fmt: skip
"""Trainings at other scales than the paper's."""

ABLATIONS: Mapping[str, Mapping[str, Mapping[str, JsonValue]]] = {
    "5": {
        "without FeatX": {"featx": False},
        "without cross-attention": {"cross_attention": False},
        "without LoRA": {"lora": False},
    },
    "6": {
        "without L2": {"l2_weight": 0.0},
        "without cosine": {"cosine_weight": 0.0},
        "without relations": {"relational_weight": 0.0},
    },
}
"""By table: settings of jobs/train.py vit-up."""

UNKNOWN = "what it shows: our notes on the paper have neither its rows nor its numbers"
DEPTH = "the depth probe's targets: Depth Anything V2, which predicts them, isn't here"


@dataclass(frozen=True, kw_only=True)
class _Cells(ScaledCells):
    """ViT-Up's."""

    own, models, folders, drawn, lacking = "splus", MODELS, FOLDERS, DEMO, "probe"

    @property
    def side(self) -> int:
        return (self.config.sizes or ({"paper": VIT_UP_SIZE, "mini": 224, "debug": 64}[self.config.scale],))[0]

    def features(self, backbone: str) -> dict[str, JsonValue]:
        """Settings of a backbone's maps."""
        precision = VIT_UP_FEATURES["precision"] if self.config.scale == "paper" else "fp32"
        return {"model": self.model(backbone), "weights": self.weights(backbone), "precision": precision}

    def lacks(self, backbone: str, dataset: str, method: str = "") -> str:
        """What isn't there of a backbone, a data set and a rival's file."""
        found = [*filter(None, [self.lacks_backbone(backbone)])]
        if method in RIVALS and method not in self.config.pairs("weights"):
            found.append(f"{LABELS[method]}'s weights for this backbone: give --weights {method}=URL")
        return LACKS.join([*found, *self.lacks_data(dataset)])

    def training(self, backbone: str = "splus", name: str = "", **changes: JsonValue) -> str:
        """The cell that trains ViT-Up."""
        scale = self.config.scale
        more = SMALL.get(scale, {**VIT_UP_TRAINING, "val_rows": 512})
        steps = {"max_steps": self.config.steps} if self.config.steps else {}
        images = IMAGES["photos"] if scale == "paper" else 1_000
        settings = {"data": (self.folder("photos"),), **self.features(backbone), **more, **steps, **changes}
        if not settings.get("cross_attention", True):
            settings.pop("start", None)  # it's the attention that enlarges
        return self.add(
            PaperCell(
                name=f"train-vit-up-{backbone}{name and f'-{name}'}",
                job="vit-up",
                settings=settings,
                missing=self.lacks(backbone, "photos"),
                token_parameters=images * PARAMETERS[backbone] * (14**2 + 28**2 + 2 * 56**2),
                stored_bytes=5 * 3 * 4 * 24.9e6,
            )
        )

    def level(self, method: str, backbone: str, grid: int, trained: str = "") -> tuple[str, tuple[str, ...]]:
        """A level by a method, and the cells that it needs; none of the backbone's own map."""
        if method == "bilinear":
            return "", ()
        if method == "vit_up":
            trained = trained or self.training(backbone)
            return f"{grid}x{grid}=vit_up:{{{trained}}}", (trained,)
        return f"{grid}x{grid}={method}:{self.config.pairs('weights').get(method, '')}", ()

    def correspondence(self, method: str, backbone: str = "splus", protocol: str = "vit-up", trained: str = "") -> str:
        """SPair-71k, or NAVI at a quarter of the pixels."""
        dataset = "navi" if protocol == "navi" else "spair"
        grid = self.side // 4 if protocol == "navi" else self.side
        level, needs = self.level(method, backbone, grid, trained)
        levels = ("x1", level or f"{grid}x{grid}=bilinear")
        settings: dict[str, JsonValue] = {
            **self.features(backbone), "data": self.folder(dataset), "sizes": (self.side,), "protocol": protocol,
            "levels": levels, "pictures": 0, **({"limit": self.config.limit} if self.config.limit else {}),
        }  # fmt: skip
        words = (dataset, backbone, method, trained.removeprefix(f"train-vit-up-{backbone}").strip("-"))
        return self.add(
            PaperCell(
                name="-".join(filter(None, words)),
                job="correspondence",
                settings=settings,
                needs=needs,
                missing=self.lacks(backbone, dataset, method),
                token_parameters=IMAGES[dataset] * PARAMETERS[backbone] * (self.side // 16) ** 2,
                stored_bytes=1e3 * IMAGES[dataset],
            )
        )

    def probe(self, dataset: str, method: str, backbone: str = "splus", trained: str = "") -> str:
        """A linear probe trained, and its validation part judged with intervals: the second cell's name."""
        level, needs = self.level(method, backbone, self.side, trained)
        lacks, recipe = self.lacks(backbone, dataset, method), RECIPES[f"probe-{dataset}"]
        words = (dataset, backbone, method, trained.removeprefix(f"train-vit-up-{backbone}").strip("-"))
        name = "-".join(filter(None, words))
        small: dict[str, JsonValue] = {} if self.config.scale == "paper" else {
            "max_steps": 4, "checkpoint_every": 2, "validate_every": 2, "side": self.side
        }  # fmt: skip
        if self.config.steps:
            small["max_steps"] = self.config.steps
        own: dict[str, JsonValue] = {**self.features(backbone), "data": self.folder(dataset)}
        readout = self.add(
            PaperCell(
                name=f"readout-{name}",
                job="readout",
                settings={
                    **recipe.settings, **own, "method": "linear", "task": recipe.task, "dataset": recipe.dataset,
                    "size": self.side, "seed": VIT_UP_SEED, **small, **({"level": level} if level else {}),
                },
                needs=needs,
                missing=lacks,
                token_parameters=IMAGES[dataset] * PARAMETERS[backbone] * (self.side // 16) ** 2,
                stored_bytes=1e7,
            )
        )  # fmt: skip
        limit = {"limit": self.config.limit} if self.config.limit else {}
        levels = ("x1", *([level] if level else []))
        return self.add(
            PaperCell(
                name=f"probe-{name}",
                job="probe",
                settings={**own, "readouts": (f"{{{readout}}}",), "levels": levels, "pictures": 0, **limit},
                needs=(readout, *needs),
                missing=lacks,
                stored_bytes=1e8,
            )
        )

    def runtime(self) -> str:
        """All methods on a random image, by random weights."""
        paper = self.config.scale == "paper"
        settings: dict[str, JsonValue] = {
            **self.features("splus"), "weights": "random", "size": self.side,
            "methods": ("bilinear", *RIVALS, "vit_up") if paper else ("bilinear", "jafar", "vit_up"),
            "grids": tuple(self.side // factor for factor in ((4, 2, 1) if paper else (4, 2))),
            "pictures": 0,
            **({"settings": ("anyup.natten=true",), "chunks": (0, 112, 224, 448)} if paper else {"warm_up": 1, "repeat": 1}),
        }  # fmt: skip
        return self.add(PaperCell(name="runtime", job="runtime", settings=settings, stored_bytes=1e4))


def plan(config: PapersConfig) -> PaperPlan:
    """All of the paper. Raises `ConfigError` for words that mean nothing."""
    config.require_known(data={*PROBES, "spair", "navi", "photos"}, backbone={*MODELS}, weights={*MODELS, *RIVALS})
    if len(config.sizes) > 1:
        raise ConfigError(f"--sizes {' '.join(map(str, config.sizes))}: ViT-Up's tables have one side of the input; give one")
    make = _Cells(config=config)
    tables = [_probes(make), _matches(make), _larger(make), *(_ablated(make, number) for number in ABLATIONS)]
    tables += [_unknown(make, "7"), _costs(make), _unknown(make, "fig4")]
    return make.plan("ViT-Up", tables)


def _line(method: str, grid: int) -> str:
    return f"{method} {grid}x{grid}"


def _probes(make: _Cells) -> PaperTable:
    wanted = []
    for method, row in LABELS.items():
        for dataset, label in PROBES.items():
            own, rival = VIT_UP_PROBES.values(method, f"probe-{dataset}"), VIT_UP_SEGMENTATION.get(method, {}).get(label, ())
            published = tuple(own.values()) or tuple(rival)
            cell = make.probe(dataset, method)
            for probed, number in zip(PUBLISHED[f"probe-{dataset}"].columns, published, strict=True):
                wanted.append(_probed(row, label, cell, probed, number))
        cell = make.missing("depth", DEPTH)
        for column, number in zip(("depth δ1", "depth RMSE x 100"), VIT_UP_DEPTH[method], strict=True):
            wanted.append(Wanted(row=row, column=column, cell=cell, line="", value=column, published=number))
    return PaperTable(number="1", title="linear probes, %", wanted=tuple(wanted))


def _probed(row: str, label: str, cell: str, column: Column, published: float | None = None) -> Wanted:
    return Wanted(row=row, column=f"{label} {column.head}", cell=cell, line="", value=column.judged, published=published)


def _pck(make: _Cells, row: str, method: str, cell: str, published: Mapping[str, float]) -> list[Wanted]:
    line = _line(method, make.side)
    return [
        Wanted(row=row, column=f"SPair {each}", cell=cell, line=line, value=each, px=make.side, published=published.get(each))
        for each in ("PCK@0.1", "PCK@0.05", "PCK@0.01")
    ]


def _matches(make: _Cells) -> PaperTable:
    wanted, side = [], str(VIT_UP_SIZE)
    for method, row in LABELS.items():
        wanted += _pck(make, row, method, make.correspondence(method), VIT_UP_CORRESPONDENCE.values(method, side))
        cell, line, navi = make.correspondence(method, protocol="navi"), _line(method, make.side // 4), VIT_UP_NAVI
        for each, number in navi.values(method, side).items():
            wanted.append(
                Wanted(row=row, column=f"NAVI {each}", cell=cell, line=line, value=each, px=make.side, published=number)
            )
    return PaperTable(number="2", title="correspondence: PCK on SPair-71k, recall on NAVI, %", wanted=tuple(wanted))


def _larger(make: _Cells) -> PaperTable:
    wanted = []
    for method, numbers in VIT_UP_LARGER.items():
        row = LABELS[method]
        for dataset in ("voc", "cityscapes"):
            cell, label = make.probe(dataset, method, "base"), PROBES[dataset]
            wanted.append(_probed(row, label, cell, PUBLISHED[f"probe-{dataset}"].columns[0], numbers[label]))
        wanted += _pck(make, row, method, make.correspondence(method, "base"), numbers)
    return PaperTable(number="4", title="DINOv3-B, %", wanted=tuple(wanted))


def _ablated(make: _Cells, number: str) -> PaperTable:
    wanted = []
    for row, changes in {"ViT-Up": {}, **ABLATIONS[number]}.items():
        trained = make.training("splus", row.replace(" ", "-") if changes else "", **changes)
        cell = make.probe("voc", "vit_up", trained=trained)
        wanted.append(_probed(row, PROBES["voc"], cell, PUBLISHED["probe-voc"].columns[0]))
        wanted += _pck(make, row, "vit_up", make.correspondence("vit_up", trained=trained), {})
    title = "parts of the network left out" if number == "5" else "terms of the loss left out"
    return PaperTable(number=number, title=title, wanted=tuple(wanted), notes=("our notes lack the paper's numbers",))


def _unknown(make: _Cells, number: str) -> PaperTable:
    wanted = Wanted(row="all of it", column="", cell=make.missing(f"table-{number}", UNKNOWN), line="", value="")
    return PaperTable(number=number, title="not known", wanted=(wanted,))


def _costs(make: _Cells) -> PaperTable:
    wanted, cell, patch = [], make.runtime(), 16
    names = VIT_UP_RUNTIME.rows if make.config.scale == "paper" else ("jafar", "vit_up")
    for row in names:
        method, _, chunk = row.partition(", ")
        for factor in (4, 2, 1) if make.config.scale == "paper" else (4, 2):
            grid = make.side // factor
            published: Mapping[str, float] = VIT_UP_RUNTIME.values(row, str(grid))
            if make.config.scale == "paper" and not published:
                continue
            line = f"{method} x{grid * patch // make.side}{chunk and f', {chunk}'}"
            columns = {f"{value}, {grid} x {grid}": value for value in ("ms", "peak MiB")}
            wanted += [
                Wanted(row=row, column=column, cell=cell, line=line, value=value, published=published.get(value))
                for column, value in columns.items()
            ]
    note = "memory as the paper has it is a GPU's; a GPU's times are another's where the paper doesn't name its own"
    return PaperTable(number="9", title="time and memory", wanted=tuple(wanted), notes=(note,))
