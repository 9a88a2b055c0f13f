"""Panels of self-similarity: how alike all features are to the centre's (LiFT Fig. 5, 6)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from operators.metrics.bootstrap import estimates
from operators.metrics.similarity import centre_cell, self_similarity
from operators.visual import Tile, heat
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
from pipelines.features.rows import Size
from pipelines.features.sources import Recipe, resolve_source
from pipelines.results import Findings, Items, LeftOut, Line, Table, Taken, mean_lines, panel
from storage.datasets.images import ImageFile, load_images
from storage.documents import JsonValue
from storage.paths import Folder
from storage.words import counted


@dataclass(frozen=True, kw_only=True)
class SimilarityConfig(EvaluateConfig):
    """What does the centre of an image look like to the features? One line of maps per image of a folder."""

    sizes: Counts[tuple[int, ...]] = ()
    """Sides of the model's square input; default: the model's own and twice that, or the stores'. All levels are shown of the
    smallest size, of others the low-resolution map."""
    limit: Counts[int | None] = 6
    """Only the first N images."""


@dataclass(frozen=True, kw_only=True)
class SelfSimilarity:
    """Images and sizes."""

    images: tuple[ImageFile, ...]
    sides: tuple[int, ...]
    left_out: tuple[LeftOut, ...] = ()
    "of the folder"
    taken: tuple[Taken, ...] = ()

    def pieces(self) -> list[Piece]:
        return cut(range(len(self.images)), 1, "{number:05d}")

    def run(self, piece: Piece, source: FeatureSource, folder: Folder) -> list[Record]:  # noqa: ARG002
        return records_of(piece.items, lambda number: self._image(number, source))

    def _image(self, number: int, source: FeatureSource) -> list[Record]:
        records: list[Record] = []
        for side in self.sides:
            squash = Squash(size=(side, side), interpolation="bilinear")
            maps = source.maps(squash.of(self.images[number]))
            for name in maps if side == self.sides[0] else ["low-res"]:
                similarity = self_similarity(maps[name]).cpu().numpy()
                records.append({"image": number, "side": side, "row": name, "map": np.round(similarity, 5).tolist()})
        return records


def prepare(config: SimilarityConfig) -> tuple[SelfSimilarity, Recipe, Folder]:
    """The images listed, the model loaded, the folder begun: most that can be wrong is wrong here."""
    listed = load_images(config.required("data"), config.options)
    images, taken = limited(listed, config.limit, "images")
    wanted: Sequence[Size] = [(side, side) for side in config.sizes]
    recipe, sizes = resolve_source(config.source, wanted, "squash")
    if any(h != w for h, w in sizes):
        raise ConfigError(f"self-similarity is shown of square inputs, not of {sizes}; use --sizes")
    sides = tuple(sorted(h for h, _ in sizes))
    if not config.sizes and not config.stores:
        sides = (sides[0], 2 * sides[0])
    recipe = replace(recipe, low_res_of=frozenset((side, side) for side in sides[1:]))
    task = SelfSimilarity(images=images, sides=sides, left_out=left_out_of_listing(listed.left_out), taken=taken)
    of = Evaluated(records=[*images, *sides], images={(side, side): images for side in sides})
    return task, *begin(config, "similarity", recipe, of)


def find(config: SimilarityConfig, task: SelfSimilarity, recipe: Recipe, records: Sequence[Record]) -> Findings:
    """A panel, and which maps are in it, with the share of cells in the upper half of the map's own scale."""
    records, left_out = split_left_out(records)
    maps = {
        name: {record["image"]: np.array(record["map"]) for record in each}
        for name, each in grouped(records, "side", "row").items()
    }
    rows = {(side, row.name): row for side in task.sides for row in recipe.rows((side, side))}
    shares = {name: np.array([(each >= 0.5).mean() for each in of_images.values()]) for name, of_images in maps.items()}
    lines = []
    for side in task.sides:
        of_side = {name: np.stack([each, np.ones_like(each)], axis=1) for (at, name), each in shares.items() if at == side}
        compared = config.comparison.of_rows([rows[side, name] for name in of_side])
        known = estimates(of_side, lambda drawn: 100 * drawn[:, :1] / drawn[:, 1:], compared.against, compared.means)
        of_rows = []
        for name in of_side:
            values = [100 * float(shares[side, name].mean()), len(shares[side, name])]
            of_rows.append(Line.of(rows[side, name], (side, side), values).known(known[name]))
        lines += [*of_rows, *mean_lines(of_rows, compared.means, known)]
    notes = ["LiFT's Fig. 5 and 6 are pictures, with no numbers to print"] if config.paper else []
    table = Table(
        title="Self-similarity of the centre cell, each map stretched to 0..1",
        columns=("cells above 0.5, %", "images"),
        lines=tuple(lines),
        notes=(*notes, *config.comparison.notes),
        drawn=counted(len({record["image"] for record in records}), "images"),
    )
    return Findings(
        tables=(table,),
        items=Items(
            scored={"images": len({record["image"] for record in records})},
            left_out=(*task.left_out, *left_out),
            taken=task.taken,
        ),
        choices={
            "cell": "half the cells a side, as in LiFT's code: right and below of the true centre",
            "scale": "each map its own, so that values of different maps can't be compared",
            "images": f"squashed, {'bilinear' if recipe.rendering == 'paper' else 'drawn as extract'}",
        },
        pictures={"similarity.png": _picture(task, maps)} if config.pictures else {},
    )


def _picture(
    task: SelfSimilarity, maps: Mapping[tuple[JsonValue, ...], Mapping[int, np.ndarray]], tile: int = 160
) -> Image.Image:
    columns = ["photo", *(f"{name}\n{side} px" for side, name in maps)]
    tiles = []
    shown = [(number, image) for number, image in enumerate(task.images) if number in next(iter(maps.values()))]
    for number, image in shown:
        values = [each[number] for each in maps.values()]
        pixels = np.array(Image.fromarray(upright_pixels(image)).resize((tile, tile)))
        photo = Tile(pixels=pixels, is_photo=True, mark=_centre_of(values[0]))
        # Finer maps' central cells lie nearer to the middle: each map shows its own.
        tiles.append([photo, *(Tile(pixels=heat(each, 0, 1), mark=_centre_of(each)) for each in values)])
    names = [image.name.rsplit("/", 1)[-1] for _, image in shown]
    title, scale = "cosine with the ringed cell", ("lowest of each map", "highest")
    return panel(tiles, columns, names, title, (tile, tile), scale=scale)


def _centre_of(map_hw: np.ndarray) -> tuple[float, float]:
    """Where `centre_cell` of a map is, in 0..1 of its tile."""
    (rows, columns), (row, column) = map_hw.shape, centre_cell(map_hw.shape)
    return (column + 0.5) / columns, (row + 0.5) / rows
