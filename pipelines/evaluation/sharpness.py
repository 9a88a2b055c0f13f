"""Sharpness at outlines: how many times as far apart neighbouring cells are where an outline of the labels passes between them.

Our own measure, of class masks; no paper has it (operators/metrics/sharpness.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from operators.image import Geometry, fit
from operators.metrics.sharpness import OutlineSums, image_sums, neighbour_distances, outline_sums, outlines, sharpness
from operators.visual import heat
from pipelines.config import ConfigError, Counts
from pipelines.evaluation.config import LabelledConfig
from pipelines.evaluation.run import (
    Evaluated,
    Piece,
    Record,
    Resampled,
    begin,
    cut,
    first_of,
    grouped,
    left_out_of_listing,
    records_of,
    score_table,
    set_aside,
    split_left_out,
)
from pipelines.features.feature_source import FeatureSource
from pipelines.features.photos import upright_pixels
from pipelines.features.pictures import Picture
from pipelines.features.rows import Size
from pipelines.features.sources import Recipe, resolve_source
from pipelines.readouts.task import Placement, Square
from pipelines.results import WRONG, Cell, Findings, Items, LeftOut, MapPictures, Table, Taken
from storage.datasets.files import DatasetError
from storage.datasets.labels import LabelledImage
from storage.datasets.registry import DATASETS, LabelReading, load_labelled
from storage.documents import decode_known
from storage.paths import Folder
from storage.pixels import PixelMap, cell_centres
from storage.spec import Level, spaced
from storage.spread import spread

PIECE_IMAGES = 16

NO_OUTLINE = "no outline passes between two of its cells"

BRIGHTEST = 8
"""Of pictures: how many times the mean elsewhere."""


@dataclass(frozen=True, kw_only=True)
class SharpnessConfig(LabelledConfig):
    """Are outlines sharp in the features? How many times as far apart neighbouring cells are where an outline passes between
    them as elsewhere (1 - cosine), on a data set with class masks."""

    dataset: Counts[Literal["voc", "coco_stuff27", "coco_stuff", "ade20k", "cityscapes", "photos_open"]] = "voc"
    """Layout of --data."""
    split: Counts[str | None] = None
    """Its part; default: the one for validation."""
    placement: Counts[Placement] = "crop"
    """How images and labels become square: the centre, or with other proportions."""
    sizes: Counts[tuple[int, ...]] = ()
    """Sides of the model's square input in pixels; default: the model's own, or the stores'."""


@dataclass(frozen=True, kw_only=True)
class OutlineSharpness:
    """Images with class masks, and the cells between which outlines pass."""

    images: tuple[LabelledImage, ...]
    cells: Mapping[int, Level]
    "by side of the model's input: where the cells of the finest row lie, which all rows are asked for"
    placement: Placement
    pictured: frozenset[int]
    "images that are drawn, at the largest side"
    left_out: tuple[LeftOut, ...] = ()
    "of the data set's images that were asked for"
    taken: tuple[Taken, ...] = ()

    def pieces(self) -> list[Piece]:
        return cut(range(len(self.images)), PIECE_IMAGES, "{side}-{start:07d}", tuple(self.cells))

    def run(self, piece: Piece, source: FeatureSource, folder: Folder) -> list[Record]:
        return records_of(piece.items, lambda number: self._image(number, piece.side, source, folder))

    def _image(self, number: int, side: int, source: FeatureSource, folder: Folder) -> list[Record]:
        item, size, cells = self.images[number], (side, side), self.cells[side]
        label = item.upright_label(source.oriented(item.image, size))
        assert isinstance(label, np.ndarray)
        assert cells.grid
        labels = torch.from_numpy(self.labels(label, cells, side)).to(source.device)
        draws = Square(geometry=self.geometry(side), size=size)
        maps = source.maps(Picture(image=item.image, size=size, draw=draws, geometry=self.placement))
        distances = {name: neighbour_distances(each, cells.grid) for name, each in maps.items()}
        sums = {name: outline_sums(each, labels) for name, each in distances.items()}
        if number in self.pictured and side == max(self.cells):
            pictures = {name: _heat(each, sums[name]) for name, each in distances.items()}
            MapPictures(folder).write(number, self._photo(item, label, side), pictures)
        return [{"image": number, "side": side, "row": name, **asdict(each)} for name, each in sums.items()]

    def geometry(self, side: int) -> Geometry:
        """How an image becomes square."""
        return Geometry(mode=self.placement, height=side, width=side, interpolation="bilinear")

    def labels(self, label_HW: np.ndarray, at: Level, side: int) -> np.ndarray:
        """The labels [rows, columns] of an upright image at the centres of cells: of the pixels that those lie in."""
        height, width = label_HW.shape
        place = self.geometry(side).place(width, height)
        scales = {"x_scale": place.x_scale, "x_offset": place.x_offset, "y_scale": place.y_scale, "y_offset": place.y_offset}
        pixels = PixelMap(width=width, height=height, **scales)
        x, y = np.moveaxis(pixels.to_original(cell_centres(at)), -1, 0).astype(np.int64)
        return label_HW[y.clip(0, height - 1), x.clip(0, width - 1)]

    def _photo(self, item: LabelledImage, label_HW: np.ndarray, side: int) -> np.ndarray:
        """The photograph as the model is given it, with the outlines of its labels: uint8 [side, side, 3]."""
        photo = fit(Image.fromarray(upright_pixels(item.image)), self.geometry(side))
        start, step = spaced((0, 0), (side, side), (side, side))
        pixels = replace(self.cells[side], grid=(side, side), start=start, step=step)
        (right, _), (below, _) = outlines(torch.from_numpy(self.labels(label_HW, pixels, side)))
        photo[_of_cells(right, below).numpy()] = WRONG
        return photo


def _of_cells(right: Tensor, below: Tensor) -> Tensor:
    """The larger of what is between a cell and those to its right and below it, [H, W]."""
    out = torch.zeros(len(right), below.shape[1], dtype=right.dtype, device=right.device)
    out[:, :-1] = right
    out[:-1] = torch.maximum(out[:-1], below)
    return out


def _heat(distances: tuple[Tensor, Tensor], sums: OutlineSums) -> np.ndarray:
    """Distances as colours, from 0 to `BRIGHTEST` times the image's own mean elsewhere."""
    ((_, _, elsewhere),) = sharpness(image_sums([sums]))
    return heat(_of_cells(*distances).cpu().numpy(), 0, BRIGHTEST * float(np.nan_to_num(elsewhere)))


def prepare(config: SharpnessConfig) -> tuple[OutlineSharpness, Recipe, Folder]:
    """The data listed, the model loaded, the folder begun: most that can be wrong is wrong here."""
    split = config.split or DATASETS[config.dataset].splits[1]
    reading = LabelReading(frame=config.label_frame)
    images = load_labelled(config.dataset, config.required("data"), split, config.options, config.limit, reading)
    recipe, sizes = resolve_source(config.source, [(side, side) for side in config.sizes], config.placement)
    if any(h != w for h, w in sizes):
        raise ConfigError(f"sharpness is measured on square inputs, not on {sizes}; use --sizes")
    task = OutlineSharpness(
        images=tuple(images),
        cells={size[0]: _finest(recipe, size) for size in sizes},
        placement=config.placement,
        pictured=frozenset(spread(len(images), config.pictures)),
        left_out=left_out_of_listing(images.left_out),
        taken=first_of(len(images), images.of, "images"),
    )
    of = Evaluated(
        records=images, images={size: [each.image for each in images] for size in sizes}, labels=[each.label for each in images]
    )
    return task, *begin(config, "sharpness", recipe, of)


def _finest(recipe: Recipe, size: Size) -> Level:
    """Where the cells of the finest row lie. All rows are of the area that the backbone's cells cover."""
    low, *_ = rows = recipe.rows(size)
    base = next(level for level in recipe.spec(size).levels if level.name == low.level)
    grid = max((row.grid for row in rows), key=lambda grid: grid[0] * grid[1])
    assert base.start
    assert base.step
    (start_y, start_x), (step_y, step_x) = base.start, base.step
    edge, extent = (start_y - step_y / 2, start_x - step_x / 2), (step_y * low.grid[0], step_x * low.grid[1])
    start, step = spaced(edge, extent, grid)
    return replace(base, grid=grid, start=start, step=step)


def find(config: SharpnessConfig, task: OutlineSharpness, recipe: Recipe, records: Sequence[Record]) -> Findings:
    """Sharpness per row and size, and what it is the ratio of."""
    records, left_out = split_left_out(records)
    # At any size: all lines are of the same images.
    blank = {record["image"] for record in records if not record["pairs"]}
    records, without = set_aside(
        records, lambda each: each["image"] in blank, NO_OUTLINE, lambda each: task.images[each["image"]].image.displayed
    )
    if not records:
        raise DatasetError(f"none of {len(task.images)} images can be scored: {NO_OUTLINE}")
    sums = {
        key: image_sums([decode_known(OutlineSums, record) for record in each])
        for key, each in grouped(records, "row", "side").items()
    }

    def cells(row: str, side: int) -> list[Cell]:
        ((times, at, elsewhere),) = sharpness(sums[row, side].sum(axis=0, keepdims=True))
        return [float(times), f"{at:.4f}", f"{elsewhere:.4f}"]

    table = score_table(
        Table(
            title=f"Sharpness at outlines of {config.dataset}: how many times as far apart neighbouring cells are as elsewhere",
            columns=("sharpness", "1 - cosine at outlines", "elsewhere"),
            notes=("no paper has numbers of this measure",) if config.paper else (),
        ),
        recipe,
        config.comparison,
        {side: (side, side) for side in task.cells},
        cells,
        resampled=Resampled(unit="images", sums=sums, figures=sharpness),
    )
    scored = {record["image"] for record in records}
    grids = " and ".join(f"{each.grid[0]} x {each.grid[1]}" for each in task.cells.values() if each.grid)
    return Findings(
        tables=(table,),
        items=Items(scored={"images": len(scored)}, left_out=(*task.left_out, *left_out, *without), taken=task.taken),
        choices={
            "protocol": "our own",
            "pairs": f"a cell with those to its right and below, of {grids}, the finest row's; coarser maps by the nearest cell",
            "outlines": "where labels at the cells' centres differ; pairs with a void label count on neither side",
            "images": f"{config.placement}, {'bilinear' if recipe.rendering == 'paper' else 'drawn as extract'}",
            "turned photographs": config.turned_photographs,
            "scores": "sums of all images, divided once",
        },
        pictures=_pictures(config, task, recipe),
    )


def _pictures(config: SharpnessConfig, task: OutlineSharpness, recipe: Recipe) -> dict[str, Image.Image]:
    side = max(task.cells)
    title = f"1 - cosine with the cells to the right and below, {side} px; red: outlines"
    rows, scale = [row.name for row in recipe.rows((side, side))], ("0", f"{BRIGHTEST} times each map's mean elsewhere")
    pictures = MapPictures(Folder(config.required("out"), config.options))
    found = pictures.panel(task.pictured, rows, lambda number: task.images[number].image.keys[-1], title, scale)
    return {"outlines.png": found} if found else {}
