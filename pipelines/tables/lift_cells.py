"""The cells that LiFT's tables are made of: trainings, evaluations and counts, on a scale's data and backbones."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from pipelines.published.lift import LIFT_FEATURES, LIFT_SIDES, LIFT_TRAINING
from pipelines.tables.paper_cells import ScaledCells
from pipelines.tables.papers import LACKS, Job, PaperCell
from pipelines.training.short import LIFT_SHORT
from storage.documents import JsonValue

OWN = "dino-s16"
"""The backbone of all tables that don't say another."""

MODELS: Mapping[str, str] = {
    "dino-s16": "vit_small_patch16_224.dino",
    "dino-b16": "vit_base_patch16_224.dino",
    "dino-s8": "vit_small_patch8_224.dino",
    "dino-b8": "vit_base_patch8_224.dino",
    "moco": "vit_small_patch16_224.dino",
    "vit": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "leopart": "vit_small_patch16_224.dino",
    "selfpatch": "vit_small_patch16_224.dino",
}
"""timm's names; of those in `RELEASED`, the network whose weights their authors' files are."""

RELEASED = {"moco": "MoCo v3's", "leopart": "Leopart's", "selfpatch": "SelfPatch's"}
"""Weights that timm lacks."""

LABELS = {"moco": "MoCo v3", "vit": "supervised ViT", "leopart": "Leopart", "selfpatch": "SelfPatch"}

METHODS = {"bilinear": "bilinear", "resize_conv": "resize-conv", "jbu": "JBU", "lift": "LiFT"}

ALPHAS = ("PCK@0.1", "PCK@0.05", "PCK@0.01")

IMAGES = {"coco": 5_000, "spair": 3_600, "davis": 1_999, "voc07": 5_011, "voc12": 11_540, "coco20k": 19_817}
"""That an evaluation looks at, of each data set as it is published: SPair's are 1,800 pairs that are drawn."""

TRAINED_IMAGES = 25_025 * 256

FOLDERS = {
    "spair": "labelled/spair_layout/SPair-71k", "davis": "labelled/davis/DAVIS", "voc07": "labelled/voc", "voc12": "labelled/voc",
    "coco": "labelled/coco", "photos": "photos_train",
}  # fmt: skip
"""Of `mini`, below --root."""

DEMO = {
    "spair": "demo/evaluate/SPair-71k", "davis": "demo/evaluate/DAVIS", "voc07": "demo/evaluate/VOC2007",
    "coco": "demo/evaluate/coco", "photos": "demo/photos-{000..001}.tar",
}  # fmt: skip

SHORT: Mapping[str, JsonValue] = {
    **LIFT_SHORT, "pairs": 1, "relational_weight": 8.0, "epochs": 100,
    "log_every": 20, "checkpoint_every": 20, "validate_every": 200,
}  # fmt: skip
"""mini's trainings, of 280 steps. Distances stay cosines, which have the same weight beside relations on each backbone."""

DRAWN: Mapping[str, JsonValue] = {
    "batch": 4, "epochs": 10, "val_rows": 4, "size": 128, "log_every": 2, "checkpoint_every": 2, "validate_every": 2
}  # fmt: skip
"""debug's, of 4 steps."""

STRIDE = "LiFT at another stride than the patch's: jobs/train.py has none, and how the paper did it isn't published"
CROSSED = "LiFT of another backbone: a checkpoint is refused with features that it wasn't trained on"


TRAINED_PARAMETERS = 1.2e6
"""Of LiFT; a checkpoint has twice as many more of its optimiser."""


@dataclass(frozen=True, kw_only=True)
class Cells(ScaledCells):
    """LiFT's."""

    own, models, folders, drawn, lacking = OWN, MODELS, FOLDERS, DEMO, "correspondence"

    @property
    def sides(self) -> tuple[int, ...]:
        default = {"paper": tuple(map(int, LIFT_SIDES)), "mini": (112, 224), "debug": (64,)}
        return self.config.sizes or default[self.config.scale]

    def side(self, side: int) -> int:
        """A size of the paper's, or the scale's in its place."""
        return side if self.config.scale == "paper" else min(self.sides, key=lambda each: abs(each - side))

    # --- what cells are of --------------------------------------------------------------------------------------------

    def features(self, backbone: str) -> dict[str, JsonValue]:
        """Settings of a backbone's maps."""
        found: dict[str, JsonValue] = {**LIFT_FEATURES, "model": self.model(backbone), "weights": self.weights(backbone)}
        if self.config.scale != "paper":  # not DINO's
            found.pop("pos_embed")
        return found

    def lacks(self, backbone: str, *datasets: str) -> str:
        """What isn't there of a backbone and data sets."""
        given = {*self.config.pairs("weights"), *self.config.pairs("backbone")}
        found = self.lacks_backbone(backbone)
        if not found and backbone in RELEASED and backbone not in given:
            found = f"{RELEASED[backbone]} weights: give --weights {backbone}=URL of the file that its authors released"
        return LACKS.join([*filter(None, [found]), *self.lacks_data(*datasets)])

    def tokens(self, backbone: str, side: int, stride: int | None = None) -> float:
        """Of one image, times the backbone's parameters."""
        model = self.model(backbone)
        patch = int(found[1]) if (found := re.search(r"patch(\d+)", model)) else 16
        parameters = 85.8e6 if "base" in model else 5.7e6 if "tiny" in model else 21.6e6
        return parameters * (side // (stride or patch)) ** 2

    # --- cells --------------------------------------------------------------------------------------------------------

    def training(self, method: str = "lift", backbone: str = OWN, name: str = "", **changes: JsonValue) -> str:
        """The cell that trains."""
        scale, model = self.config.scale, self.model(backbone)
        side, batch, epochs = 448, 256, changes.get("epochs", 5)
        more: dict[str, JsonValue] = {**LIFT_TRAINING, "val_rows": 512}
        if scale == "mini":
            # A quarter of the image is whole patches.
            side, batch, more = 224 if "patch14" in model else 256, 16, {**SHORT}
            if method == "lift":
                more["start"] = "enlargement"
        elif scale == "debug":
            side, batch, more = 128, 4, {**DRAWN}
        most = self.config.steps or {"paper": None, "mini": 280, "debug": 4}[scale]
        steps = changes.get("max_steps", most)
        images = steps * batch if isinstance(steps, int) else TRAINED_IMAGES / 5 * epochs if isinstance(epochs, int) else 0
        own: dict[str, JsonValue] = {"method": method, "data": (self.folder("photos"),), **self.features(backbone)}
        settings = {**own, **more, "size": side, "batch": batch, "geometry": "squash", "max_steps": most, **changes}
        return self.add(
            PaperCell(
                name=f"train-{method}-{backbone}{name and f'-{name}'}",
                job="lift",
                settings={key: value for key, value in settings.items() if value is not None},
                missing=self.lacks(backbone, "photos"),
                token_parameters=images * sum(self.tokens(backbone, side // factor) for factor in (1, 2, 4)),
                stored_bytes=5 * 3 * 4 * TRAINED_PARAMETERS,
            )
        )

    def evaluation(
        self,
        job: Job,
        images_of: str,
        backbone: str = OWN,
        trained: str = "",
        *,
        levels: Sequence[str] = ("x2",),
        name: str = "",
        sides: Sequence[int] = (),
        stride: int | None = None,
        changes: Mapping[str, JsonValue] = MappingProxyType({}),
    ) -> str:
        """The cell that evaluates the backbone's own map, a bilinear one, and `levels` by what the cell `trained` made."""
        sides = tuple(sides or self.sides)
        method = self.cells[trained].settings["method"] if trained else ""
        settings: dict[str, JsonValue] = {
            **self.features(backbone),
            "data": self.folder(images_of),
            "sizes": sides,
            "levels": ("x1", *(f"{level}={method}:{{{trained}}}" for level in levels if trained)),
            "ragged": True,
            "limit": self.config.limit,
            "pictures": 0,
            "stride": stride,
            **changes,
        }
        words = (job if job != "discovery" else images_of, backbone, trained.removeprefix("train-"), name)
        images = min(IMAGES[images_of], self.config.limit or IMAGES[images_of])
        return self.add(
            PaperCell(
                name="-".join(filter(None, words)),
                job=job,
                settings={key: value for key, value in settings.items() if value is not None},
                needs=(trained,) if trained else (),
                missing=self.lacks(backbone, images_of),
                token_parameters=images * sum(self.tokens(backbone, side, stride) for side in sides),
                stored_bytes=images * len(sides) * (30e3 if job == "video" else 1e3),
            )
        )

    def correspondence(
        self, backbone: str = OWN, trained: str = "", *, name: str = "", sides: Sequence[int] = (), stride: int | None = None
    ) -> str:
        """SPair-71k."""
        return self.evaluation("correspondence", "spair", backbone, trained, name=name, sides=sides, stride=stride)

    def video(
        self, backbone: str = OWN, trained: str = "", *, name: str = "", sides: Sequence[int] = (), stride: int | None = None
    ) -> str:
        """DAVIS; of the few clips of `mini`, every fourth frame."""
        step: dict[str, JsonValue] = {"frame_step": 4} if self.config.scale == "mini" else {}
        return self.evaluation("video", "davis", backbone, trained, name=name, sides=sides, stride=stride, changes=step)

    def operations(self, backbone: str, side: int, stride: int | None = None) -> str:
        """What a backbone takes, alone and with LiFT: counted, on random weights."""
        settings: dict[str, JsonValue] = {
            **self.features(backbone), "weights": "random", "size": side, "methods": ("bilinear", "lift"), "ragged": True,
            "grids": (2 * (1 + (side - 16) // (stride or 16)),), "warm_up": 1, "repeat": 1, "pictures": 0,
            **({"stride": stride} if stride else {}),
        }  # fmt: skip
        lacks = self.lacks(backbone) if self.config.scale != "paper" else ""
        name = f"runtime-{backbone}-{side}px{f'-stride{stride}' if stride else ''}"
        return self.add(PaperCell(name=name, job="runtime", settings=settings, missing=lacks, stored_bytes=1e4))
