"""NAVI's geometric correspondence (ViT-Up's Table 2): `jobs/evaluate.py correspondence --protocol navi`."""

import functools
import io
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw

from operators.metrics.navi import (
    BINS,
    GRID_STEP,
    METRES,
    PIXELS,
    Camera,
    Crop,
    Matches,
    NaviError,
    PairCounts,
    Recalls,
    View,
    depth_of,
    draw_partners,
    match,
    pair_sums,
    recalls_of_sums,
)
from operators.visual import Tile
from pipelines.config import ConfigError
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.run import (
    Evaluated,
    Piece,
    Record,
    Resampled,
    begin,
    count_of,
    cut,
    grouped,
    limited,
    records_of,
    score_table,
    split_left_out,
)
from pipelines.features.feature_source import FeatureSource
from pipelines.features.photos import upright_pixels
from pipelines.features.pictures import Picture
from pipelines.features.sources import Recipe, resolve_source
from pipelines.published.vit_up import VIT_UP_NAVI
from pipelines.results import RIGHT, WRONG, Findings, Items, LeftOut, Table, Taken, panel, percent
from storage.datasets.content import HasContent
from storage.datasets.files import ItemLeftOut
from storage.datasets.navi import NaviView
from storage.datasets.registry import VIEWS
from storage.documents import decode_known
from storage.paths import Folder
from storage.spread import spread

PIECE_PAIRS = 8

SEED = 8
"""Of the draw of partners, as released."""

_SHORT_SIDE = 1024
"""Of the smaller files that probe3d's script makes, in pixels."""

_DRAWN = 40
"""Matches of a pair that a picture shows."""

NO_PARTNER = "no other view of its object is turned from it by at most 120 degrees"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A view and the one that it is matched with."""

    source: NaviView
    target: NaviView


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Draws a view's photograph as the protocol has it: a square round the object, nearest pixels."""

    view: NaviView
    side: int

    def __call__(self, pixels_HW3: np.ndarray) -> np.ndarray:
        crop = geometry(self.view, self.side)[0]
        try:
            return crop(pixels_HW3 if self.view.prepared else prepare_photo(pixels_HW3))
        except NaviError as error:
            raise ItemLeftOut(self.view.image.displayed, str(error)) from None

    @property
    def picture(self) -> Picture:
        return Picture(image=self.view.image, size=(self.side, self.side), draw=self, geometry=None)


def prepare_photo(pixels_HW3: np.ndarray, short_side: int = _SHORT_SIDE) -> np.ndarray:
    """An upright original as probe3d's script saves it: a short side of so many pixels, as JPEG of Pillow's quality.

    Its interpolation is number 2, which the script calls bicubic and which is Pillow's bilinear.
    """
    image = Image.fromarray(pixels_HW3)
    smaller, file = image.resize(_smaller(image, short_side), Image.Resampling.BILINEAR), io.BytesIO()
    smaller.save(file, "JPEG")
    return np.array(Image.open(file))


def prepare_depth(values_HW: np.ndarray, short_side: int = _SHORT_SIDE) -> np.ndarray:
    """The same of a depth file's values, by the nearest ones."""
    image = Image.fromarray(values_HW.astype(np.uint16))  # as the files have them: Pillow takes other pixels of other types
    return np.array(image.resize(_smaller(image, short_side), Image.Resampling.NEAREST))


def _smaller(image: Image.Image, short_side: int) -> tuple[int, int]:
    factor = short_side / min(image.size)
    return int(image.width * factor), int(image.height * factor)


@functools.lru_cache(maxsize=8)
def geometry(view: NaviView, side: int) -> tuple[Crop, View]:
    """How a view is cut out, and its points. Raises `ItemLeftOut` where its depth says nothing."""
    values = view.depth.read()
    depth = depth_of(values if view.prepared else prepare_depth(values))
    try:
        crop = Crop.round_object(depth, side)
    except NaviError as error:
        raise ItemLeftOut(view.depth.displayed, str(error)) from None
    return crop, View.of(depth, _camera(view), crop)


def _camera(view: NaviView) -> Camera:
    return Camera(
        quaternion=view.quaternion, translation=view.translation, focal_length=view.focal_length, image_size=view.original_size
    )


@dataclass(frozen=True, kw_only=True)
class Navi:
    """The pairs that were drawn, and how many of each one's matches are judged."""

    pairs: tuple[Pair, ...]
    side: int
    matches: int
    every: int
    "of the views, every so many-th is the source of a pair"
    pictured: frozenset[int]
    "pairs whose matches are kept for pictures"
    taken: tuple[Taken, ...] = ()
    without_partner: tuple[LeftOut, ...] = ()

    def pieces(self) -> list[Piece]:
        return cut(range(len(self.pairs)), PIECE_PAIRS, "{side}-{number:05d}", (self.side,))

    def run(self, piece: Piece, source: FeatureSource, folder: Folder) -> list[Record]:  # noqa: ARG002
        return records_of(piece.items, lambda number: self._pair(number, source))

    def _pair(self, number: int, source: FeatureSource) -> list[Record]:
        pair, side = self.pairs[number], self.side
        views = [geometry(view, side)[1] for view in (pair.source, pair.target)]
        maps = [source.maps(Drawing(view=view, side=side).picture) for view in (pair.source, pair.target)]
        records = []
        for row in source.rows((side, side)):
            try:
                found = match(views[0], views[1], (maps[0][row.name], maps[1][row.name]), self.matches)
            except NaviError as error:
                raise ItemLeftOut(pair.source.image.displayed, str(error)) from None
            record = {"pair": pair.source.name, "row": row.name, **asdict(found.counts(self.matches))}
            records.append({**record, **({"drawn": _drawn(found)} if number in self.pictured else {})})
        return records


def _drawn(found: Matches) -> list[list[float]]:
    """Some matches, spread over all that were found: numbers of points in both views, and the error in metres."""
    at = spread(len(found.source), _DRAWN)
    columns = (each[at].tolist() for each in (found.source, found.target, found.in_space))
    return [list(each) for each in zip(*columns, strict=True)]


def draw_pairs(objects: Sequence[Sequence[NaviView]], every: int) -> tuple[list[Pair], tuple[LeftOut, ...]]:
    """A partner for each view, drawn for all of them, of which every `every`-th is then taken; and views without any."""
    random, pairs, alone = torch.Generator().manual_seed(SEED), [], []
    for views in objects:
        for view, partner in zip(views, draw_partners([_camera(view).pose for view in views], random), strict=True):
            pairs.append(None if partner is None else Pair(source=view, target=views[partner]))
            alone += [view.name] if partner is None else []
    return [pair for pair in pairs[::every] if pair], LeftOut.of(NO_PARTNER, alone)


def prepare(config: EvaluateConfig, sizes: Sequence[int], matches: int, every: int) -> tuple[Navi, Recipe, Folder]:
    """The data read, the model loaded, the folder begun: most that can be wrong is wrong here."""
    folder = Folder(config.required("data"), config.options)
    recipe, found = resolve_source(config.source, [(side, side) for side in sizes], None)
    if len(found) != 1 or found[0][0] != found[0][1]:
        raise ConfigError(f"navi is done on one square input, not on {found}; use --sizes")
    side = found[0][0]
    drawn, without_partner = draw_pairs(VIEWS["navi"](folder), every)
    pairs, taken = limited(drawn, config.limit, "pairs")
    task = Navi(
        pairs=pairs,
        side=side,
        matches=matches,
        every=every,
        pictured=frozenset(spread(len(pairs), config.pictures)),
        taken=taken,
        without_partner=without_partner,
    )
    views = list(dict.fromkeys(view for pair in pairs for view in (pair.source, pair.target)))
    labels: list[HasContent] = [view.depth for view in views]
    of = Evaluated(records=[*pairs, matches], images={(side, side): [view.image for view in views]}, labels=labels)
    return task, *begin(config, "navi", recipe, of)


def resampled(records: Sequence[Record], side: int) -> Resampled:
    """All recalls in percent, drawn from pairs, whose matches are right or wrong together."""
    sums = {
        (row, side): pair_sums([decode_known(PairCounts, record) for record in each])
        for (row,), each in grouped(records, "row").items()
    }
    return Resampled(unit="pairs", sums=sums, figures=lambda drawn: 100 * recalls_of_sums(drawn))


def find(config: EvaluateConfig, task: Navi, recipe: Recipe, records: Sequence[Record]) -> Findings:
    """Recalls in percent, over all pairs and matches."""
    records, left_out = split_left_out(records)
    left_out = (*task.without_partner, *left_out)
    found = {row: Recalls.of([decode_known(PairCounts, r) for r in each]) for (row,), each in grouped(records, "row").items()}
    columns = (*(_metres(each) for each in METRES), *(f"{each:g} px" for each in PIXELS), *_bins(), "pairs")
    pairs = len({record["pair"] for record in records})
    table = score_table(
        Table(title="Recall of the best matches, %, mean of all pairs", columns=columns),
        recipe,
        config.comparison,
        {task.side: (task.side, task.side)},
        lambda row, _: [*percent(found[row].by_metres), *percent(found[row].by_pixels), *percent(found[row].by_degrees), pairs],
        VIT_UP_NAVI if config.paper else None,
        {"matches": task.matches, "every": task.every, "limit": config.limit, "left_out": count_of(left_out)},
        resampled=resampled(records, task.side),
    )
    return Findings(
        tables=(table,),
        items=Items(scored={"pairs": pairs}, left_out=left_out, taken=task.taken),
        choices=_choices(task, recipe),
        pictures=_pictures(task, records),
    )


def _metres(limit: float) -> str:
    return f"{100 * limit:g} cm"


def _bins() -> list[str]:
    return [f"2 cm, {low}-{high}°" for low, high in itertools.pairwise(BINS)]


def _choices(task: Navi, recipe: Recipe) -> dict[str, str]:
    originals = sum(not pair.source.prepared for pair in task.pairs)
    return {
        "protocol": "navi: probe3d's reader and matcher as ViT-Up's Table 2 has them; its columns are read as 5, 2 and 1 cm",
        "pairs": f"one partner a view at 0 to 120 degrees, seed {SEED}, of sorted objects and views (the published order is a "
        "disk's; a view is its own where rounding turns it from itself, as released); of which "
        + ("every one is matched" if task.every == 1 else f"every {task.every}th is matched"),
        "matches": f"the best {task.matches} of a pair; those that lack are wrong",
        "canvas": f"a square round the object, {task.side} px, nearest pixels, drawn as {recipe.rendering}",
        "features": f"bicubic to {task.side // GRID_STEP} x {task.side // GRID_STEP} points where a map has others",
        "files": "downsampled_ files beside the originals"
        if not originals
        else f"made from the originals as probe3d's script does it, for {originals} of {len(task.pairs)} sources",
        "diamond variant": "left out: the released code projects it with a principal point of 0",
    }


def _pictures(task: Navi, records: Sequence[Record], side: int = 224) -> dict[str, Image.Image]:
    """Matches of the pictured pairs: source beside target, each match in one place of both."""
    kept = [record for record in records if "drawn" in record]
    if not kept:
        return {}
    pairs, drawn = {pair.source.name: pair for pair in task.pairs}, grouped(kept, "pair")
    tiles = [[_tile(task, pairs[str(name)], record, side) for record in each] for (name,), each in drawn.items()]
    columns = [str(row) for (row,) in grouped(kept, "row")]
    legend = [("within 2 cm", RIGHT), ("farther off", WRONG)]
    title = f"some of the best {task.matches} matches at {task.side} px: source left, target right"
    rows = [str(name) for (name,) in drawn]
    return {"matches.png": panel(tiles, columns, rows, title, (2 * side, side), legend=legend)}


def _tile(task: Navi, pair: Pair, record: Record, side: int) -> Tile:
    crops = [Drawing(view=view, side=task.side)(upright_pixels(view.image)) for view in (pair.source, pair.target)]
    image = Image.fromarray(np.concatenate(crops, axis=1)).resize((2 * side, side), Image.Resampling.BILINEAR)
    pen, points = ImageDraw.Draw(image), task.side // GRID_STEP
    for source, target, error in record["drawn"]:
        places = [divmod(int(at), points) for at in (source, target)]
        ends = [
            ((column + 0.5) * side / points + i * side, (row + 0.5) * side / points) for i, (row, column) in enumerate(places)
        ]
        colour = RIGHT if error < METRES[1] else WRONG
        pen.line([*ends[0], *ends[1]], fill=colour, width=1)
        for x, y in ends:
            pen.ellipse([x - 2, y - 2, x + 2, y + 2], fill=colour)
    return Tile(pixels=np.array(image), is_photo=True)
