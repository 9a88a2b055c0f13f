"""Fidelity: how near the maps that a method makes of an image come to the backbone's own of the same image at a larger size.

What self-supervised upsamplers are trained for, on images that none of them was trained on (operators/metrics/fidelity.py). The
image is squashed to squares, as LiFT trains.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from PIL import Image
from torch import Tensor

from operators.metrics.bootstrap import estimates
from operators.metrics.fidelity import MapFidelity, cell_cosines, fidelity, fidelity_of, fidelity_sums
from operators.visual import heat
from pipelines.config import ConfigError, Counts
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.run import (
    Evaluated,
    Piece,
    Record,
    begin,
    cut,
    grouped,
    left_out_of_listing,
    limited,
    records_of,
    split_left_out,
)
from pipelines.features.feature_source import FeatureSource
from pipelines.features.photos import upright_pixels
from pipelines.features.pictures import Squash
from pipelines.features.rows import Row, Size
from pipelines.features.sources import Recipe, resolve_source
from pipelines.results import Findings, Items, LeftOut, Line, MapPictures, Table, Taken, mean_lines
from storage.datasets.images import ImageFile, load_images
from storage.documents import decode_known
from storage.paths import Folder
from storage.spread import spread
from storage.words import counted

PIECE_IMAGES = 8

FARTHEST = 2
"""Of pictures: how many times as far as the low-resolution map is in the mean."""


@dataclass(frozen=True, kw_only=True)
class FidelityConfig(EvaluateConfig):
    """Do maps hold what the backbone sees in a larger image? The mean cosine of their cells with the backbone's own of the same
    image at a larger size, on a folder of images."""

    sizes: Counts[tuple[int, ...]] = ()
    """Sides of the model's square input. A level is held against the backbone's own map where a larger one of these sizes has its
    grid: with 112 224 448, x2 of 112 and 224 px and x4 of 112 px; and the low-resolution map beside them, by its nearest cells.
    Default: the model's own and twice that, or the stores'."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A row of one size, and the larger size at which the backbone's own map has its grid."""

    row: str
    side: int
    own: int


@dataclass(frozen=True, kw_only=True)
class OwnMaps:
    """Images, and which maps of them are held against which."""

    images: tuple[ImageFile, ...]
    compared: tuple[Compared, ...]
    pictured: frozenset[int]
    "images that are drawn, at the largest side that is compared"
    alone: tuple[str, ...] = ()
    "rows that no larger size has the grid of, but for those of sizes that others are held against alone"
    left_out: tuple[LeftOut, ...] = ()
    "of the folder"
    taken: tuple[Taken, ...] = ()

    def pieces(self) -> list[Piece]:
        return cut(range(len(self.images)), PIECE_IMAGES, "{start:07d}")

    def run(self, piece: Piece, source: FeatureSource, folder: Folder) -> list[Record]:
        return records_of(piece.items, lambda number: self._image(number, source, folder))

    def _image(self, number: int, source: FeatureSource, folder: Folder) -> list[Record]:
        image = self.images[number]
        for side in self.sides:
            source.require(image, (side, side))
        maps = {side: source.maps(squash(side).of(image)) for side in self.sides}
        cosines = {each: cell_cosines(maps[each.side][each.row], maps[each.own]["low-res"]) for each in self.compared}
        if number in self.pictured:
            self._draw(number, {each.row: found[0] for each, found in cosines.items() if each.side == self.drawn_side}, folder)
        return [{"image": number, **asdict(each), **asdict(fidelity_of(found))} for each, found in cosines.items()]

    @property
    def sides(self) -> tuple[int, ...]:
        """Of the inputs that maps are asked of."""
        return tuple(sorted({side for each in self.compared for side in (each.side, each.own)}))

    @property
    def drawn_side(self) -> int:
        """The one that pictures are of."""
        return max(each.side for each in self.compared)

    def _draw(self, number: int, cosines: Mapping[str, Tensor], folder: Folder) -> None:
        photo, far = squash(self.drawn_side)(upright_pixels(self.images[number])), 1 - float(next(iter(cosines.values())).mean())
        maps = {name: heat(1 - each.cpu().numpy(), 0, FARTHEST * far) for name, each in cosines.items()}
        MapPictures(folder).write(number, photo, maps)


def squash(side: int) -> Squash:
    """How images become square."""
    return Squash(size=(side, side), interpolation="bicubic")


def prepare(config: FidelityConfig) -> tuple[OwnMaps, Recipe, Folder]:
    """The images listed, the model loaded, the folder begun: most that can be wrong is wrong here."""
    listed = load_images(config.required("data"), config.options)
    images, taken = limited(listed, config.limit, "images")
    recipe, sizes = resolve_source(config.source, [(side, side) for side in config.sizes], "squash")
    if not config.sizes and not config.stores:
        sizes = (*sizes, (2 * sizes[0][0], 2 * sizes[0][1]))
    if any(h != w for h, w in sizes):
        raise ConfigError(f"fidelity is measured on square inputs, not on {sizes}; use --sizes")
    compared = compare(recipe, sizes)
    if not compared:
        grids = "; ".join(f"{h} px: {', '.join(_named(row) for row in recipe.rows((h, w)))}" for h, w in sorted(sizes))
        raise ConfigError(
            f"no level has the grid of the backbone's own map at a larger size ({grids}); x2 at 224 px is held against 448 px: "
            "use --sizes 224 448, or a store for each"
        )
    only_own = {each.own for each in compared} - {each.side for each in compared}
    task = OwnMaps(
        images=images,
        compared=compared,
        pictured=frozenset(spread(len(images), config.pictures)),
        alone=_alone(recipe, sorted({h for h, _ in sizes} - only_own), compared),
        left_out=left_out_of_listing(listed.left_out),
        taken=taken,
    )
    recipe = replace(recipe, low_res_of=frozenset((side, side) for side in only_own))
    of = Evaluated(records=images, images={(side, side): images for side in task.sides})
    return task, *begin(config, "fidelity", recipe, of)


def compare(recipe: Recipe, sizes: Sequence[Size]) -> tuple[Compared, ...]:
    """Each row of a size whose grid is the backbone's own at a larger one, if both cover the same part of the image; before them
    the low-resolution map, with the smallest of these larger ones."""
    own = {(recipe.rows(size)[0].grid, _area(recipe, size)): size[0] for size in sizes}
    found: list[Compared] = []
    for size in sorted(sizes):
        low, *rows = recipe.rows(size)
        larger = [(row.name, own.get((row.grid, _area(recipe, size)), 0)) for row in rows]
        here = [Compared(row=name, side=size[0], own=side) for name, side in larger if side > size[0]]
        if here:
            found += [Compared(row=low.name, side=size[0], own=min(each.own for each in here)), *here]
    return tuple(found)


def _alone(recipe: Recipe, sides: Sequence[int], compared: Sequence[Compared]) -> tuple[str, ...]:
    rows = {(each.row, each.side) for each in compared}
    return tuple(
        f"{row.name} of {side} px" for side in sides for row in recipe.rows((side, side)) if (row.name, side) not in rows
    )


def _area(recipe: Recipe, size: Size) -> tuple[float, ...]:
    """The part of the input that the backbone's cells cover, in shares of its sides: ragged inputs have pixels beyond them."""
    low, *_ = recipe.rows(size)
    base = next(level for level in recipe.spec(size).levels if level.name == low.level)
    assert base.start
    assert base.step
    edges = [
        (start - step / 2 + step * cells) / side
        for start, step, count, side in zip(base.start, base.step, low.grid, size, strict=True)
        for cells in (0, count)
    ]
    return tuple(round(edge, 6) for edge in edges)


def _named(row: Row) -> str:
    return f"{row.name} {row.grid[0]}x{row.grid[1]}"


def find(config: FidelityConfig, task: OwnMaps, recipe: Recipe, records: Sequence[Record]) -> Findings:
    """A line per row and size."""
    records, left_out = split_left_out(records)
    groups = grouped(records, "row", "side")
    sums = {key: fidelity_sums([decode_known(MapFidelity, record) for record in each]) for key, each in groups.items()}
    lines = []
    for side in sorted({each.side for each in task.compared}):
        held = {each.row: each.own for each in task.compared if each.side == side}
        rows = [row for row in recipe.rows((side, side)) if row.name in held]
        compared = config.comparison.of_rows(rows)
        known = estimates({row.name: sums[row.name, side] for row in rows}, fidelity, compared.against, compared.means)
        of_side = []
        for row in rows:
            values = fidelity(sums[row.name, side].sum(axis=0, keepdims=True))[0]
            line = Line.of(row, (side, side), [*map(float, values), f"{held[row.name]} px"])
            of_side.append(line.known(known[row.name]))
        lines += [*of_side, *mean_lines(of_side, compared.means, known)]
    scored = len({record["image"] for record in records})
    notes = ["no paper has numbers of this measure"] if config.paper else []
    table = Table(
        title="Fidelity: mean cosine, times 100, of cells with the backbone's own of the same images at a larger size",
        columns=("cosine", "less the mean cell", "held against"),
        lines=tuple(lines),
        notes=(*notes, *config.comparison.notes),
        drawn=counted(scored, "images"),
    )
    return Findings(
        tables=(table,),
        items=Items(scored={"images": scored}, left_out=(*task.left_out, *left_out), taken=task.taken),
        choices={
            "protocol": "our own",
            "images": f"squashed, {'bicubic' if recipe.rendering == 'paper' else 'drawn as extract'}",
            "less the mean cell": "of the backbone's own map, image by image, subtracted from both maps",
            "scores": "means over cells, then over images",
            **({"held against nothing": f"{', '.join(task.alone)}: no larger size has their grid"} if task.alone else {}),
        },
        pictures=_pictures(config, task),
    )


def _pictures(config: FidelityConfig, task: OwnMaps) -> dict[str, Image.Image]:
    rows = [each.row for each in task.compared if each.side == task.drawn_side]
    title, scale = (
        f"1 - cosine with the backbone's own map, {task.drawn_side} px",
        ("0", f"{FARTHEST} times the mean of {rows[0]}"),
    )
    pictures = MapPictures(Folder(config.required("out"), config.options))
    found = pictures.panel(task.pictured, rows, lambda number: task.images[number].name.rsplit("/", 1)[-1], title, scale)
    return {"fidelity.png": found} if found else {}
