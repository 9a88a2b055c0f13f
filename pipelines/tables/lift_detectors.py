"""The cells of LiFT's Table 4: a ViTDet, LiFT on its backbone, its heads on LiFT's maps, and what COCO says of either."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.published.lift import LIFT_FOR_VITDET, LIFT_VITDET_HEADS
from pipelines.published.vitdet import VITDET_TRAINING
from pipelines.tables.lift_cells import IMAGES, Cells
from pipelines.tables.papers import LACKS, PaperCell
from storage.documents import JsonValue

DETECTORS = ("mae", "mask_rcnn", "mask_rcnn-lift", "cascade", "cascade-lift")
"""Names that --weights may have for Table 4: MAE's file, from which detectors are trained; plain detectors; and those whose heads
jobs/train.py vitdet trained on LiFT's maps."""

VITDET_PARAMETERS = 111e6
"""Of ViTDet-B with Mask R-CNN."""

LEARNT: Mapping[str, JsonValue] = {
    "model": "tiny", "scales": (1.0, 1.0), "mirror": 0.0, "weight_decay": 0.0, "lr": 1e-3, "epochs": 1_000
}  # fmt: skip
"""What detectors of few images by heart have in common."""

FEW: Mapping[str, JsonValue] = {"split": "val2017", "limit": 16, "val_limit": 16, "overlap": True, "batch": 2, "micro_batch": 2}
"""mini's images, of which there is one part: 16, on which detectors are trained and judged."""

PLAIN: Mapping[str, Mapping[str, JsonValue]] = {
    "paper": VITDET_TRAINING,
    "mini": {
        **LEARNT, **FEW, "size": 256, "proposals": 64, "max_steps": 240, "warmup_steps": 50, "log_every": 20,
        "checkpoint_every": 40, "validate_every": 240,
    },
    "debug": {
        **LEARNT, "depth": 2, "global_blocks": (1,), "size": 128, "proposals": 32, "batch": 3, "micro_batch": 3, "max_steps": 4,
        "warmup_steps": 1, "log_every": 1, "checkpoint_every": 2, "validate_every": 4,
    },
}  # fmt: skip
"""Plain detectors, by scale."""

_SMALL_LIFT: Mapping[str, JsonValue] = {
    **LIFT_FOR_VITDET, "image_width": 16, "precision": "fp32", "micro_batch": None, "epochs": 1_000, "log_every": 10
}  # fmt: skip

ON_DETECTOR: Mapping[str, Mapping[str, JsonValue]] = {
    "paper": {**LIFT_FOR_VITDET, "val_rows": 512},
    "mini": {
        **_SMALL_LIFT, "size": 256, "batch": 8, "max_steps": 60, "val_rows": 8, "checkpoint_every": 20, "validate_every": 60
    },
    "debug": {
        **_SMALL_LIFT, "size": 128, "batch": 3, "max_steps": 2, "val_rows": 2, "checkpoint_every": 2, "validate_every": 2
    },
}  # fmt: skip
"""LiFT on a detector's backbone, by scale."""

HEADS: Mapping[str, Mapping[str, JsonValue]] = {
    "paper": LIFT_VITDET_HEADS,
    "mini": {
        **LEARNT, **FEW, "size": 128, "proposals": 64, "lr": 3e-4, "max_steps": 60, "warmup_steps": 10, "log_every": 20,
        "checkpoint_every": 20, "validate_every": 60,
    },
    "debug": {
        **LEARNT, "size": 64, "proposals": 32, "batch": 3, "micro_batch": 3, "max_steps": 2, "warmup_steps": 1, "log_every": 1,
        "checkpoint_every": 2, "validate_every": 2,
    },
}  # fmt: skip
"""Pyramid and heads on LiFT's maps, by scale: at half the side that the detector knows."""

JUDGED: Mapping[str, Mapping[str, JsonValue]] = {"mini": {"size": 128, "limit": 16}, "debug": {"size": 64}}
"""How detectors of other scales than the paper's are judged."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """A detector: a URL, or the cell that makes it."""

    url: str
    cell: str = ""
    lacks: str = ""
    "of what is given; a cell says itself what it lacks"


@dataclass(frozen=True)
class DetectorCells:
    """What Table 4's detectors are made by, for those that --weights doesn't give."""

    make: Cells

    def detection(self, head: str, *, lift: bool) -> str:
        """COCO by a plain detector, or beside it by one whose heads were trained on LiFT's maps."""
        make, config = self.make, self.make.config
        made = [self.plain(head), *([self.on_lift(head)] if lift else [])]
        urls, images = [each.url for each in made], min(IMAGES["coco"], config.limit or IMAGES["coco"])
        own: dict[str, JsonValue] = {**JUDGED.get(config.scale, {})}
        limit: dict[str, JsonValue] = {"limit": config.limit} if config.limit else {}
        return make.add(
            PaperCell(
                name=f"detection-{head}{'-lift' if lift else ''}",
                job="detection",
                settings={
                    "data": make.folder("coco"), "detector": urls[0], "finetuned": tuple(urls[1:]), "head": head, "pictures": 0,
                    **own, **limit,
                },
                needs=tuple(each.cell for each in made if each.cell),
                missing=LACKS.join(dict.fromkeys(filter(None, [*(each.lacks for each in made), *make.lacks_data("coco")]))),
                token_parameters=len(made) * images * VITDET_PARAMETERS * (512 // 16) ** 2,
                stored_bytes=images * 2e4,
            )
        )  # fmt: skip

    def plain(self, head: str) -> Made:
        """A detector, trained from MAE's weights, or at small scales from random ones."""
        make, scale = self.make, self.make.config.scale
        if given := make.config.pairs("weights").get(head):
            return Made(url=given)
        settings: dict[str, JsonValue] = {**PLAIN[scale], "method": head, "data": make.folder("coco")}
        lacks = make.lacks_data("coco")
        if scale == "paper":
            settings["weights"] = make.config.pairs("weights").get("mae", "")
            if not settings["weights"]:
                what = "MAE's weights, from which a detector is trained: give --weights mae=URL"
                lacks = [f"{what}, or a trained detector: --weights {head}=URL", *lacks]
        return self._trained(f"train-vitdet-{head}", settings, LACKS.join(lacks), side=1024, passes=3)

    def on_lift(self, head: str) -> Made:
        """One whose pyramid and heads are trained on the maps of a LiFT of its backbone."""
        make, plain, scale = self.make, self.plain(head), self.make.config.scale
        if given := make.config.pairs("weights").get(f"{head}-lift"):
            return Made(url=given)
        own: dict[str, JsonValue] = {name: value for name, value in HEADS[scale].items() if name != "model"}
        settings: dict[str, JsonValue] = {
            **own, "method": head, "data": make.folder("coco"), "weights": plain.url, "upsampler": f"lift:{{{self.lift(head)}}}"
        }  # fmt: skip
        needs = (*filter(None, [plain.cell]), self.lift(head))
        return self._trained(f"train-vitdet-{head}-lift", settings, LACKS.join(make.lacks_data("coco")), needs, side=512)

    def lift(self, head: str) -> str:
        """The cell that trains LiFT on a detector's backbone, on the images of its data."""
        make, plain, scale = self.make, self.plain(head), self.make.config.scale
        folder, steps = make.folder("coco"), {"max_steps": make.config.steps} if make.config.steps else {}
        apart = {"data": (f"{folder}/train2017",), "val_data": (f"{folder}/val2017",)}
        data: dict[str, JsonValue] = {"data": (f"{folder}/val2017",)} if scale == "mini" else {**apart}
        settings = {**ON_DETECTOR[scale], "method": "lift", "weights": plain.url, **data, **steps}
        return make.add(
            PaperCell(
                name=f"train-lift-on-{head}",
                job="lift",
                settings={name: value for name, value in settings.items() if value is not None},
                needs=tuple(filter(None, [plain.cell])),
                missing=LACKS.join(make.lacks_data("coco")),
                token_parameters=100 * 118_287 * VITDET_PARAMETERS * (64**2 + 32**2) if scale == "paper" else 0.0,
                stored_bytes=5 * 3 * 4 * 7e6,
            )
        )

    def _trained(
        self,
        name: str,
        settings: Mapping[str, JsonValue],
        missing: str,
        needs: tuple[str, ...] = (),
        *,
        side: int,
        passes: int = 1,
    ) -> Made:
        """By a cell; `passes` of the backbone's cost for each image, three where it learns."""
        config = self.make.config
        steps: dict[str, JsonValue] = {"max_steps": config.steps} if config.steps else {}
        images = 184_375 * 64 if passes > 1 else 118_287
        cell = self.make.add(
            PaperCell(
                name=name,
                job="vitdet",
                settings={**settings, **steps},
                needs=needs,
                missing=missing,
                token_parameters=passes * images * VITDET_PARAMETERS * (side // 16) ** 2 if config.scale == "paper" else 0.0,
                stored_bytes=5 * 3 * 4 * VITDET_PARAMETERS if config.scale == "paper" else 1e8,
            )
        )
        return Made(url=f"{{{cell}}}", cell=cell)
