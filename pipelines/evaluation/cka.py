"""Scale invariance: CKA between features of the same images at a range of sizes (LiFT Fig. 4).

The paper's code isn't released, nor are its sizes, images and batches; those here are our choice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from operators.metrics.bootstrap import estimates
from operators.metrics.cka import Estimator, HsicTerms, batch_sums, cka, cka_of_sums, gram, terms_of_grams
from pipelines.config import ConfigError, Counts
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.run import (
    Evaluated,
    Piece,
    Record,
    Unscored,
    begin,
    cut,
    grouped,
    left_out_of_listing,
    limited,
    records_of,
    split_left_out,
)
from pipelines.features.feature_source import FeatureSource
from pipelines.features.pictures import Squash
from pipelines.features.sources import Recipe, resolve_source
from pipelines.plots import png_of, styled
from pipelines.results import Findings, Items, LeftOut, Line, Table, Taken, mean_lines
from storage.datasets.files import DatasetError
from storage.datasets.images import ImageFile, load_images
from storage.documents import decode_known
from storage.paths import Folder
from storage.spread import spread
from storage.words import counted

LEAST = 4
"""Images of a batch; the unbiased estimate needs so many."""

TOO_FEW = f"too few images are left of its batch, which needs {LEAST}"


@dataclass(frozen=True, kw_only=True)
class CkaConfig(EvaluateConfig):
    """How much do features depend on the input's size? CKA between all pairs of sizes, on a folder of images."""

    sizes: Counts[tuple[int, ...]] = ()
    """Sides of the model's square input; default with a model: 56 112 168 224 280 336 392 448; with stores: theirs."""
    batch: Counts[int] = 64
    """Images that are compared with each other; part of the measure. A last batch of fewer than 4 is left out."""
    estimator: Counts[Estimator] = "unbiased"
    """torch_cka's, or `biased`, which gives far higher values; the two don't mix."""
    rescale: Counts[bool] = False
    """Map each Gram matrix to 0..1 first, as vit_analysis does; it weighs batches otherwise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch < LEAST:
            raise ConfigError(f"--batch {self.batch}: must be at least {LEAST}")


@dataclass(frozen=True, kw_only=True)
class ScaleInvariance:
    """Images in fixed batches, and the sizes to compare."""

    images: tuple[ImageFile, ...]
    sides: tuple[int, ...]
    batch: int
    estimator: Estimator
    rescale: bool
    left_out: tuple[LeftOut, ...] = ()
    "of the folder"
    taken: tuple[Taken, ...] = ()

    def pieces(self) -> list[Piece]:
        return [piece for piece in self._batches() if len(piece.items) >= LEAST]

    def too_few(self) -> tuple[LeftOut, ...]:
        """The images of a last batch that isn't compared."""
        few = [self.images[number].displayed for piece in self._batches() if len(piece.items) < LEAST for number in piece.items]
        return LeftOut.of(f"the last batch has fewer than {LEAST} images (--batch {self.batch})", few)

    def _batches(self) -> list[Piece]:
        return cut(range(len(self.images)), self.batch, "{number:05d}")

    def run(self, piece: Piece, source: FeatureSource, folder: Folder) -> list[Record]:  # noqa: ARG002
        left_out = records_of(piece.items, lambda number: self._require(number, source))
        numbers = sorted({*piece.items} - {record["item"] for record in left_out})
        if len(numbers) < LEAST:
            few = [Unscored(left_out=TOO_FEW, item=number, image=self.images[number].displayed) for number in numbers]
            return [*left_out, *map(asdict, few)]
        grams: dict[str, list[Tensor]] = {}
        for side in self.sides:
            for name, matrix in self._grams(numbers, side, source).items():
                grams.setdefault(name, []).append(matrix)
        number = int(piece.name)
        terms = {
            name: terms_of_grams(number, each, estimator=self.estimator, rescale=self.rescale) for name, each in grams.items()
        }
        return [*left_out, *({"row": name, **asdict(each)} for name, each in terms.items())]

    def _require(self, number: int, source: FeatureSource) -> list[Record]:
        """Nothing. Raises `ItemLeftOut` for an image that has no features at one of the sizes."""
        for side in self.sides:
            source.require(self.images[number], (side, side))
        return []

    def _grams(self, numbers: Sequence[int], side: int, source: FeatureSource) -> dict[str, Tensor]:
        """Gram matrices of the batch at one size, by row name: only one size's maps are held."""
        squash = Squash(size=(side, side), interpolation="bicubic")
        maps: dict[str, list[Tensor]] = {}
        for number in numbers:
            for name, each in source.maps(squash.of(self.images[number])).items():
                maps.setdefault(name, []).append(each.flatten())
        # A row at a time, emptied as it is stacked.
        return {name: gram(_stacked(maps.pop(name))) for name in list(maps)}


def _stacked(maps: list[Tensor]) -> Tensor:
    out = maps[0].new_empty((len(maps), len(maps[0])))
    for i in reversed(range(len(maps))):
        out[i] = maps.pop()
    return out


def prepare(config: CkaConfig) -> tuple[ScaleInvariance, Recipe, Folder]:
    """The images listed, the model loaded, the folder begun: most that can be wrong is wrong here."""
    listed = load_images(config.required("data"), config.options)
    images, taken = limited(listed, config.limit, "images")
    if len(images) < LEAST:
        raise DatasetError(f"{images[0].folder.displayed} has {len(images)} images; at least {LEAST} are compared")
    sides = config.sizes or (() if config.stores else tuple(range(56, 449, 56)))
    recipe, sizes = resolve_source(config.source, [(side, side) for side in sides], "squash")
    if len(sizes) < 2 or any(h != w for h, w in sizes):
        raise ConfigError(f"CKA compares at least two square sizes, got {sizes}; use --sizes, or a store for each")
    rows = [[row.name for row in recipe.rows(size)] for size in sizes]
    if any(each != rows[0] for each in rows):
        raise ConfigError("not all sizes have the same rows; name levels by factor (x2), and give stores the same levels")
    task = ScaleInvariance(
        images=images,
        sides=tuple(sorted(h for h, _ in sizes)),
        batch=config.batch,
        estimator=config.estimator,
        rescale=config.rescale,
        left_out=left_out_of_listing(listed.left_out),
        taken=taken,
    )
    return task, *begin(config, "cka", recipe, Evaluated(records=images, images=dict.fromkeys(sizes, images)))


def scores(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """CKA [S, S] by row."""
    groups = grouped(records, "row").items()
    return {name: cka([decode_known(HsicTerms, record) for record in each]).numpy() for (name,), each in groups}


def find(config: CkaConfig, task: ScaleInvariance, recipe: Recipe, records: Sequence[Record]) -> Findings:
    """A line per row and size: CKA with every size."""
    records, left_out = split_left_out(records)
    found, count = scores(records), len(task.sides)
    sums = {name: batch_sums([decode_known(HsicTerms, r) for r in each]) for (name,), each in grouped(records, "row").items()}
    compared = config.comparison.of_rows(recipe.rows((task.sides[0],) * 2))
    known = estimates(sums, cka_of_sums, compared.against, compared.means)
    by_side = []
    for i, side in enumerate(task.sides):
        of_side = {name: each[i * count :][:count] for name, each in known.items()}
        lines = [
            Line.of(row, (side, side), [float(value) for value in found[row.name][i]]).known(of_side[row.name])
            for row in recipe.rows((side, side))
        ]
        by_side.append([*lines, *mean_lines(lines, compared.means, of_side)])
    notes = ["LiFT's Fig. 4 has curves, no numbers to print"] if config.paper else []
    table = Table(
        title="CKA with the same images' features at other sizes (1: alike)",
        columns=tuple(f"{side} px" for side in task.sides),
        lines=tuple(line for lines in zip(*by_side, strict=True) for line in lines),
        notes=(*notes, *config.comparison.notes),
        drawn=counted(len(records) // len(found), "batches"),
    )
    used = sum(record["images"] for record in records) // len(found)
    return Findings(
        tables=(table,),
        items=Items(
            scored={"images": used, "batches": len(records) // len(found)},
            left_out=(*task.left_out, *left_out, *task.too_few()),
            taken=task.taken,
        ),
        choices={
            "protocol": "our choice; LiFT's Fig. 4 has no published code, sizes or batches",
            "images": f"{used} of {len(task.images)}, squashed, {_drawn(recipe)}; batches of {config.batch} in sorted order",
            "estimator": config.estimator,
            "rescaled Gram matrices": str(config.rescale),
        },
        details={"cka": {name: matrix.tolist() for name, matrix in found.items()}, "sizes": list(task.sides)},
        pictures={"cka.png": plot(found, task.sides)} if config.pictures else {},
    )


def _drawn(recipe: Recipe) -> str:
    return "bicubic" if recipe.rendering == "paper" else "drawn as extract"


def plot(found: Mapping[str, np.ndarray], sides: Sequence[int]) -> bytes:
    """Curves of each row for up to four source sizes, PNG."""
    chosen = spread(len(sides), 4)
    with styled():
        figure = Figure(figsize=(3.1 * len(chosen), 3.2), layout="constrained")
        axes = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
        for axis, index in zip(axes, chosen, strict=True):
            for name, matrix in found.items():
                axis.plot(sides, matrix[index], marker="o", markersize=3, label=name)
            axis.set_title(f"with {sides[index]} px")
            axis.set_xticks(sides, [str(side) for side in sides], rotation=45)
            axis.set_xlabel("input px")
            axis.grid(alpha=0.25)
        axes[0].set_ylabel("CKA")
        axes[0].legend(frameon=False)
        return png_of(figure)
