"""Unsupervised discovery of one object per image with TokenCut, on VOC07, VOC12 and COCO20k: CorLoc."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from operators.metrics.discovery import CorLoc, Discovery, TokenCut, discover
from operators.visual import Tile, heat
from pipelines.config import ConfigError, Counts
from pipelines.evaluation.config import LabelledConfig
from pipelines.evaluation.run import (
    Evaluated,
    Piece,
    Record,
    Resampled,
    begin,
    by_size,
    count_of,
    cut,
    first_of,
    grouped,
    listed,
    records_of,
    score_table,
    split_left_out,
)
from pipelines.features.feature_source import FeatureSource
from pipelines.features.live_source import LiveRecipe
from pipelines.features.photos import upright_pixels
from pipelines.features.pictures import Picture, Squash
from pipelines.features.rows import Size
from pipelines.features.sources import Recipe, resolve_source
from pipelines.published.lift import LIFT_DISCOVERY
from pipelines.results import Findings, Items, LeftOut, Table, Taken, panel
from storage.datasets.boxes import BoxedImage
from storage.datasets.files import DatasetError
from storage.datasets.frames import LabelFrame, OrientedImage, label_turn
from storage.datasets.registry import BOXES
from storage.documents import decode_known
from storage.paths import Folder
from storage.spread import spread

PIECE_IMAGES = 16

NO_OBJECT = "its annotation has no object; crowds don't count"

ORIGINAL = "original"
"""A line's input where images keep their own size."""


@dataclass(frozen=True, kw_only=True)
class DiscoveryConfig(LabelledConfig):
    """Is there an object, and where? TokenCut without any training; the share of images whose box fits an object (CorLoc)."""

    dataset: Counts[Literal["voc07", "voc12", "coco20k"]] = "voc07"
    """Layout of --data: the folder above VOCdevkit, or that of coco_20k_filenames.txt."""
    protocol: Counts[Literal["lift", "tokencut"]] = "lift"
    """`lift`: images squashed to squares of --sizes; `tokencut`: at their own size, padded to whole patches."""
    sizes: Counts[tuple[int, ...]] = ()
    """lift: sides of the model's square input; default: the model's own, or the stores'."""
    split: Counts[str] = "trainval"
    """List of a VOC data set in ImageSets/Main."""
    tau: Counts[float | None] = None
    """Cosines above it are edges. Default: 0.2, and 0.3 for coco20k with lift, as in LiFT's commands."""
    weighted: Counts[bool] = False
    """Edges keep their cosine as weight: TokenCut's ablation."""
    solver: Counts[Literal["official", "fast"]] = "official"
    """`fast`: Lanczos' method instead of LAPACK's dense solver; several times faster on large grids."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protocol == "tokencut" and self.sizes:
            raise ConfigError("--sizes are for --protocol lift; tokencut takes images at their own size")
        if self.dataset == "coco20k" and self.split != type(self).split:
            raise ConfigError(f"--split {self.split}: coco20k is one list, coco_20k_filenames.txt; leave --split out")

    @property
    def settings(self) -> TokenCut:
        """TokenCut's settings, defaults resolved."""
        default = 0.3 if self.dataset == "coco20k" and self.protocol == "lift" else 0.2
        return TokenCut(tau=default if self.tau is None else self.tau, weighted=self.weighted, solver=self.solver)


@dataclass(frozen=True, kw_only=True)
class PadToPatches:
    """Draws an image at its own size, `size` with what is missing on the right and below to whole patches."""

    size: Size
    colour: tuple[int, int, int]
    "the model's mean: zero, once it is normalised"

    def __call__(self, pixels_HW3: np.ndarray) -> np.ndarray:
        canvas = np.empty((*self.size, 3), np.uint8)
        canvas[:] = self.colour
        canvas[: pixels_HW3.shape[0], : pixels_HW3.shape[1]] = pixels_HW3
        return canvas


@dataclass(frozen=True, kw_only=True)
class ObjectDiscovery:
    """Images with objects, and how those are looked for."""

    images: tuple[BoxedImage, ...]
    sides: tuple[int, ...]
    "of square inputs; empty: images keep their size"
    patch: int
    colour: tuple[int, int, int]
    settings: TokenCut
    pictured: frozenset[int]
    "images whose eigenvectors are kept for pictures"
    frame: LabelFrame | None = None
    "of boxes, where their image's size doesn't tell"
    left_out: tuple[LeftOut, ...] = ()
    "of the images that the data set lists, up to the last that is taken"
    taken: tuple[Taken, ...] = ()

    def pieces(self) -> list[Piece]:
        return cut(range(len(self.images)), PIECE_IMAGES, "{side}-{start:06d}", self.sides or (0,))

    def size(self, number: int, side: int) -> Size:
        """The model's input, of the image as annotated; `side` 0 stands for the image's own size."""
        return self._size(self.images[number], side)

    def _size(self, boxed: BoxedImage, side: int) -> Size:
        if side:
            return side, side
        width, height = boxed.image_size
        return -(-height // self.patch) * self.patch, -(-width // self.patch) * self.patch

    def upright(self, boxed: BoxedImage, image: OrientedImage) -> BoxedImage:
        """The image with its boxes upright. Raises what `label_turn` raises."""
        return boxed.turned(label_turn(image, boxed.image_size, self.frame))

    def run(self, piece: Piece, source: FeatureSource, folder: Folder) -> list[Record]:  # noqa: ARG002
        return records_of(piece.items, lambda number: self._image(number, piece.side, source))

    def _image(self, number: int, side: int, source: FeatureSource) -> list[Record]:
        noted = self.images[number]
        boxed = self.upright(noted, source.oriented(noted.image, self.size(number, side)))
        size = self._size(boxed, side)
        picture = Squash(size=size, interpolation="bilinear").of(boxed.image)
        if not side:
            pad = PadToPatches(size=size, colour=self.colour)
            picture = Picture(image=boxed.image, size=size, draw=pad, geometry=None)
        truth = _scaled(boxed, side)
        records = []
        for name, features in source.maps(picture).items():
            found = discover(features, size, self.settings)
            box = found.box if side else (*found.box[:2], *np.minimum(found.box[2:], boxed.image_size).tolist())
            hit = CorLoc.of(box, truth)
            record = {"image": number, "side": side, "row": name, "box": box, "hits": hit.hits, "images": hit.images}
            records.append({**record, "found": found.found, **(_eigenvector(found) if number in self.pictured else {})})
        return records


def _scaled(boxed: BoxedImage, side: int) -> list[tuple[float, ...]]:
    """The objects' boxes in pixels of the input: LiFT's are truncated to whole ones."""
    if not side:
        return list(boxed.boxes)
    width, height = boxed.image_size
    return [
        (int(x1 * side / width), int(y1 * side / height), int(x2 * side / width), int(y2 * side / height))
        for x1, y1, x2, y2 in boxed.boxes
    ]


def _eigenvector(found: Discovery) -> Record:
    return {"eigenvector": np.round(found.eigenvector_hw, 6).tolist()}


def prepare(config: DiscoveryConfig) -> tuple[ObjectDiscovery, Recipe, Folder]:
    """The data read, the model loaded, the folder begun: most that can be wrong is wrong here."""
    folder = Folder(config.required("data"), config.options)
    images, left_out, taken = _with_objects(BOXES[config.dataset](folder, config.split), config.limit)
    if not images:
        raise DatasetError(f"{folder.displayed}: no image has an object")
    own_size = config.protocol == "tokencut"
    recipe, sizes = resolve_source(config.source, [(side, side) for side in config.sizes], None if own_size else "squash")
    if any(h != w for h, w in sizes) and not own_size:
        raise ConfigError(f"discovery is done on square inputs, not on {sizes}; use --sizes")
    red, green, blue = (round(255 * value) for value in recipe.spec(sizes[0]).mean)
    task = ObjectDiscovery(
        images=images,
        sides=() if own_size else tuple(h for h, _ in sizes),
        patch=recipe.patch if isinstance(recipe, LiveRecipe) else 1,
        colour=(red, green, blue),
        settings=config.settings,
        pictured=frozenset(spread(len(images), config.pictures)),
        frame=config.label_frame,
        left_out=left_out,
        taken=taken,
    )
    asked = by_size((task.size(i, side), boxed.image) for side in task.sides or (0,) for i, boxed in enumerate(images))
    return task, *begin(config, "discovery", recipe, Evaluated(records=images, images=asked))


def _with_objects(
    every: Sequence[BoxedImage], limit: int | None
) -> tuple[tuple[BoxedImage, ...], tuple[LeftOut, ...], tuple[Taken, ...]]:
    """The first images with objects, those before the last of them that have none, and how many of all that is."""
    numbers = [number for number, each in enumerate(every) if each.boxes][:limit]
    seen = every[: numbers[-1] + 1] if limit is not None and len(numbers) == limit else every
    left_out = LeftOut.of(NO_OBJECT, [each.image.displayed for each in seen if not each.boxes])
    return tuple(every[number] for number in numbers), left_out, first_of(len(seen), len(every), "images")


def scores(records: Sequence[Record]) -> dict[tuple[str, int], CorLoc]:
    """CorLoc by row and side."""
    groups = grouped(records, "row", "side").items()
    return {name: sum((decode_known(CorLoc, record) for record in each), CorLoc()) for name, each in groups}


def resampled(records: Sequence[Record]) -> Resampled:
    """CorLoc in percent, drawn from images."""
    sums = {
        name: np.array([(record["hits"], record["images"]) for record in each], np.float64)
        for name, each in grouped(records, "row", "side").items()
    }
    return Resampled(unit="images", sums=sums, figures=lambda drawn: 100 * drawn[:, :1] / drawn[:, 1:])


def find(config: DiscoveryConfig, task: ObjectDiscovery, recipe: Recipe, records: Sequence[Record]) -> Findings:
    """CorLoc per row and size, in percent."""
    records, left_out = split_left_out(records)
    found = scores(records)
    published = LIFT_DISCOVERY[config.dataset] if config.paper and task.sides else None
    notes = (f"no paper has numbers of --protocol {config.protocol} here",) if config.paper and not published else ()
    table = score_table(
        Table(title=f"CorLoc on {config.dataset}, %", columns=("CorLoc", "images"), notes=notes),
        recipe,
        config.comparison,
        {side: task.size(0, side) for side in task.sides or (0,)},
        lambda row, side: [100 * found[row, side].share, found[row, side].images],
        published,
        {
            "items": listed(task.taken, len(task.images) + count_of(task.left_out)),
            "split": config.split,
            **asdict(task.settings),
            "limit": config.limit,
            "left_out": count_of(left_out),
        },
        varied={0: ORIGINAL},
        resampled=resampled(records),
    )
    scored = {record["image"] for record in records}
    return Findings(
        tables=(table,),
        items=Items(
            scored={"images": len(scored), "objects": sum(len(task.images[number].boxes) for number in scored)},
            left_out=(*task.left_out, *left_out),
            taken=task.taken,
        ),
        choices=_choices(config, task, recipe),
        details={"without an object's box": sum(not record["found"] for record in records)},
        pictures=_pictures(task, records),
    )


def _choices(config: DiscoveryConfig, task: ObjectDiscovery, recipe: Recipe) -> dict[str, str]:
    images = "squashed to squares, bilinear" if task.sides else "own size, padded with the mean colour to whole patches"
    return {
        "protocol": config.protocol,
        "images": images if recipe.rendering == "paper" else "squashed, drawn as extract",
        "turned photographs": config.turned_photographs,
        "tokencut": str(task.settings),
        "objects": "difficult and truncated ones count; crowds and images without objects don't",
        "hit": "IoU of at least 0.5 with any object, as in the code; TokenCut's paper says greater than",
    }


def _pictures(task: ObjectDiscovery, records: Sequence[Record], tile: int = 200) -> dict[str, Image.Image]:
    """Boxes and eigenvectors of the pictured images at the largest size."""
    side = max(task.sides or (0,))
    kept = [record for record in records if record["side"] == side and "eigenvector" in record]
    images = grouped(kept, "image")
    if not images:
        return {}
    tiles = [_tiles(task, each, side, tile) for each in images.values()]
    columns = [f"{name}\n{what}" for (name,) in grouped(kept, "row") for what in ("boxes", "eigenvector")]
    names = [task.images[number].image.name.rsplit("/", 1)[-1] for (number,) in images]
    return {"boxes.png": panel(tiles, columns, names, "red: what was found; green: objects", (tile, tile))}


def _tiles(task: ObjectDiscovery, records: Sequence[Record], side: int, tile: int) -> list[Tile]:
    """An image's tiles, two for each record."""
    noted = task.images[records[0]["image"]]
    boxed = task.upright(noted, OrientedImage(noted.image.displayed, noted.image.orientation()))
    photo = Image.fromarray(upright_pixels(boxed.image)).resize((tile, tile))
    return [drawn for record in records for drawn in _found(boxed, record, side, photo.copy())]


def _found(boxed: BoxedImage, record: Record, side: int, photo: Image.Image) -> tuple[Tile, Tile]:
    """A record's box, drawn into `photo`, and its eigenvector."""
    pen = ImageDraw.Draw(photo)
    width, height = (side, side) if side else boxed.image_size
    scale = np.array([photo.width / width, photo.height / height] * 2)
    for boxes, colour in ((_scaled(boxed, side), (60, 220, 90)), ([record["box"]], (240, 50, 40))):
        for box in boxes:
            pen.rectangle((np.array(box) * scale - [0, 0, 1, 1]).clip(0).tolist(), outline=colour, width=2)
    vector = np.array(record["eigenvector"])
    return Tile(pixels=np.array(photo), is_photo=True), Tile(pixels=heat(vector, vector.min(), vector.max()))
