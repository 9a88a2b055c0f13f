"""Correspondence: key points on SPair-71k's layout by LiFT's and ViT-Up's protocols; `navi` is pipelines/evaluation/navi.py."""

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal

import numpy as np
from PIL import Image, ImageDraw

from operators.metrics.canvas import Canvas, CanvasMode
from operators.metrics.correspondence import (
    ALPHAS,
    LIFT,
    VIT_UP,
    PairScore,
    Pck,
    Protocol,
    View,
    are_right,
    category_sums,
    match,
    mean_of_categories,
    score_pair,
)
from operators.visual import Tile
from pipelines.config import ConfigError, Counts, Identity, require_at_least, used_with
from pipelines.evaluation import navi
from pipelines.evaluation.config import LabelledConfig
from pipelines.evaluation.run import (
    Evaluated,
    Piece,
    Record,
    Resampled,
    begin,
    count_of,
    cut,
    grouped,
    left_out_of_listing,
    limited,
    listed,
    records_of,
    score_table,
    set_aside,
    split_left_out,
)
from pipelines.features.feature_source import FeatureSource
from pipelines.features.photos import upright_pixels
from pipelines.features.pictures import Geometries, Picture
from pipelines.features.sources import Recipe, resolve_source
from pipelines.published.lift import LIFT_CORRESPONDENCE
from pipelines.published.vit_up import VIT_UP_CORRESPONDENCE
from pipelines.results import RIGHT, WRONG, Findings, Items, LeftOut, Table, Taken, panel, percent
from storage.datasets.files import DatasetError, Listed
from storage.datasets.frames import LabelFrame, OrientedImage, label_turn
from storage.datasets.images import EncodedImage
from storage.datasets.registry import PAIRS
from storage.datasets.spair import Pair
from storage.datasets.warped import WarpKind
from storage.documents import JsonValue, decode_known
from storage.paths import Folder
from storage.spread import spread

PROTOCOLS: dict[str, Protocol] = {"lift": LIFT, "vit-up": VIT_UP}

PIECE_PAIRS = 32

NO_POINTS = "its images have no key point in common"


_KEY_POINTS = used_with(protocol=("lift", "vit-up"))
_ANNOTATED = used_with(protocol=("lift", "vit-up"), dataset=("spair",))


@dataclass(frozen=True, kw_only=True)
class CorrespondenceConfig(LabelledConfig):
    """Where do points of one image lie in another? PCK on SPair-71k, a data set in its layout, or warps of any photographs;
    recalls on NAVI."""

    protocol: Counts[Literal["lift", "vit-up", "navi"]] = "lift"
    """`lift`: LiFT's eval_spair; `vit-up`: ViT-Up's correspondence kit. The settings below default to the protocol's. `navi`: the
    same kit's geometric correspondence of views with depth and pose."""
    dataset: Annotated[Counts[Literal["spair", "warped"]], _KEY_POINTS] = "spair"
    """What --data is: SPair-71k's layout; or any photographs, in files or in tars, of which pairs are made whose points are
    exactly known: each photograph beside a warp of it under another light."""
    warps: Annotated[Counts[int], used_with(dataset=("warped",))] = 200
    """Photographs that are drawn, each once."""
    warp: Annotated[Counts[WarpKind], used_with(dataset=("warped",))] = "homography"
    """`homography`: what a camera sees that turned, tilted and came closer; `thin-plate`: bent by a thin-plate spline besides."""
    sizes: Counts[tuple[int, ...]] = ()
    """Sides of the model's square input in pixels; default: the model's own, or the stores'."""
    split: Annotated[Counts[str], _ANNOTATED] = "test"
    """Folder of PairAnnotation."""
    pairs_per_category: Annotated[Counts[int | None], _ANNOTATED] = None
    """Drawn at random with replacement; 0: all pairs, each once. Default: 100 for lift, 0 for vit-up."""
    seed: Annotated[Counts[int], used_with("all pairs are taken, none is drawn (--pairs-per-category 0)", is_random=True)] = 0
    """Of the draw, which depends on the category's pairs alone, not on the order in which a disk lists categories; of photographs
    and their warps."""
    alphas: Annotated[Counts[tuple[float, ...]], _KEY_POINTS] = ALPHAS
    """A prediction is right within alpha times the threshold's length."""
    threshold: Annotated[Counts[Literal["box", "image"]], _KEY_POINTS] = "box"
    """The longer side of the target's bounding box (SPair-71k), or of the target image (PF-PASCAL)."""
    candidates: Annotated[Counts[Literal["pixels", "cells"]], _KEY_POINTS] = "pixels"
    """What is searched: each pixel of the enlarged map, or its cells (the other reading of ViT-Up's bilinear row)."""
    key_points: Annotated[Counts[Literal["pairs", "images"] | None], _ANNOTATED] = None
    """Of the pairs' files (lift) or of the images' (vit-up)."""
    matches: Annotated[Counts[int], used_with(protocol="navi")] = 1000
    """navi: of each pair, how many are judged, the best ones."""
    every: Annotated[Counts[int], used_with(protocol="navi")] = 4
    """navi: every so many-th view is matched with another."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alphas or min(self.alphas) <= 0:
            raise ConfigError(f"--alphas {self.alphas}: must be above 0, at least one")
        if len(set(map(_column, self.alphas))) < len(self.alphas):
            raise ConfigError(f"--alphas {' '.join(map(str, self.alphas))}: give each once, six digits of it count")
        require_at_least(1, self, "matches", "every", "warps")
        if self.dataset == "warped" and self.stores:
            raise ConfigError("--dataset warped: no store has the warps, which are made as they are read; give a --model")
        if self.protocol == "navi" and len(set(self.sizes)) > 1:
            raise ConfigError(f"--sizes {' '.join(map(str, self.sizes))}: --protocol navi has one; give one of them")
        require_at_least(0, self, "seed")
        if self.pairs_per_category is not None and self.pairs_per_category < 0:
            raise ConfigError(f"--pairs-per-category {self.pairs_per_category}: must be at least 0")

    @property
    def rules(self) -> Protocol:
        """The protocol with what was changed of it."""
        return replace(PROTOCOLS[self.protocol], threshold=self.threshold, candidates=self.candidates)

    @property
    def draws(self) -> int:
        """`pairs_per_category`, its default resolved."""
        if self.dataset == "warped":
            return 0
        if self.pairs_per_category is not None:
            return self.pairs_per_category
        return 100 if self.protocol == "lift" else 0  # navi draws partners of its own

    def counted(self, *features: Identity) -> dict[str, JsonValue]:
        """As for all evaluations; those from before there was a `dataset` go on, which are of SPair-71k's layout."""
        return {name: value for name, value in super().counted(*features).items() if (name, value) != ("dataset", "spair")}

    @property
    def is_random(self) -> bool:
        return self.dataset == "warped" or self.draws > 0

    def listed(self, folder: Folder) -> tuple[Listed[Pair], tuple[Taken, ...]]:
        """The pairs of the data set that there are, or that are made, and of how many. Raises `DatasetError`."""
        if self.dataset == "spair":
            return PAIRS["spair"](folder, split=self.split, key_points=self.annotation), ()
        found = PAIRS["warped"](folder, count=self.warps, seed=self.seed, kind=self.warp)
        count = len(found) + sum(each.count for each in found.left_out.values())
        return found, (Taken(how="drawn", count=count, of=found.of, unit="photographs", flag=f"--warps {self.warps}"),)

    @property
    def annotation(self) -> Literal["pairs", "images"]:
        """`key_points`, its default resolved."""
        return self.key_points or ("pairs" if self.protocol == "lift" else "images")


def _column(alpha: float) -> str:
    """The name of a score, by which the paper's stands below it."""
    return f"PCK@{alpha:g}"


_PUBLISHED = {"lift": LIFT_CORRESPONDENCE, "vit-up": VIT_UP_CORRESPONDENCE}
"by protocol"


def draw_pairs(pairs: Sequence[Pair], per_category: int, seed: int) -> dict[int, int]:
    """How often each pair counts, by its number: `per_category` draws with replacement, or each pair once for 0."""
    if not per_category:
        return dict.fromkeys(range(len(pairs)), 1)
    by_category: dict[str, list[int]] = {}
    for number, pair in enumerate(pairs):
        by_category.setdefault(pair.category, []).append(number)
    times: Counter[int] = Counter()
    for category, numbers in by_category.items():
        random = np.random.default_rng([seed, zlib.crc32(category.encode())])
        times.update(numbers[i] for i in random.integers(0, len(numbers), per_category))
    return dict(sorted(times.items()))


@dataclass(frozen=True, kw_only=True)
class Correspondence:
    """The pairs that were drawn, and how they are matched."""

    pairs: tuple[Pair, ...]
    times: tuple[int, ...]
    "how often each pair was drawn"
    sizes: tuple[int, ...]
    rules: Protocol
    alphas: tuple[float, ...]
    pictured: frozenset[int]
    "pairs whose predictions are kept for pictures"
    frame: LabelFrame | None = None
    "of labels, where their size doesn't tell"
    taken: tuple[Taken, ...] = ()
    "which of the split's pairs"
    left_out: tuple[LeftOut, ...] = ()
    "as pairs were listed"

    def pieces(self) -> list[Piece]:
        """Pairs with common images beside each other."""
        order = sorted(range(len(self.pairs)), key=lambda i: (self.pairs[i].category, self.pairs[i].name))
        return cut(order, PIECE_PAIRS, "{side}-{number:05d}", self.sizes)

    def run(self, piece: Piece, source: FeatureSource, folder: Folder) -> list[Record]:  # noqa: ARG002
        return records_of(piece.items, lambda number: self._pair(number, piece.side, source))

    def upright(self, pair: Pair, source: OrientedImage, target: OrientedImage) -> Pair:
        """The pair with its labels on the upright images. Raises what `label_turn` raises."""
        of_source = label_turn(source, (pair.source.width, pair.source.height), self.frame)
        of_target = label_turn(target, (pair.target.width, pair.target.height), self.frame)
        return pair.turned(of_source, of_target)

    def _pair(self, number: int, size: int, source: FeatureSource) -> list[Record]:
        rules, noted = self.rules, self.pairs[number]
        pair = self.upright(noted, *(source.oriented(image, (size, size)) for image in (noted.source, noted.target)))
        canvases = [rules.place(image.width, image.height, size) for image in (pair.source, pair.target)]
        images = zip((pair.source, pair.target), canvases, strict=True)
        maps = [source.maps(picture(image, canvas)) for image, canvas in images]
        records = []
        for row in source.rows((size, size)):
            views = [View(features=each[row.name], canvas=canvas) for each, canvas in zip(maps, canvases, strict=True)]
            predicted = match(*views, np.array(pair.source_xy), rules)
            truth, kind = np.array(pair.target_xy), pair.category
            score = score_pair(predicted, truth, canvases[1], pair.box, rules, category=kind, alphas=self.alphas)
            record = {"pair": pair.name, "size": size, "row": row.name, "times": self.times[number], **asdict(score)}
            records.append({**record, **({"predicted": predicted.tolist()} if number in self.pictured else {})})
        return records


def picture(image: EncodedImage, canvas: Canvas) -> Picture:
    """An image as its canvas has it."""
    return Picture(image=image, size=(canvas.side, canvas.side), draw=canvas.draw, geometry=_geometry(canvas.mode))


def _geometry(mode: CanvasMode) -> Geometries:
    """LiFT's canvas has images where --geometry pad has them, ViT-Up's where no extraction has them."""
    return "pad" if mode == "fit_then_pad" else None


def scores(records: Sequence[Record]) -> dict[tuple[str, int], Pck]:
    """PCK by row and size."""
    groups = grouped(records, "row", "size").items()
    # A pair counts as often as it was drawn.
    return {name: Pck.of([s for r in each for s in [decode_known(PairScore, r)] * r["times"]]) for name, each in groups}


def resampled(records: Sequence[Record], alphas: int) -> Resampled:
    """PCK in percent, drawn from pairs: one that was drawn twice is one pair that counts twice."""
    sums = {
        name: category_sums([decode_known(PairScore, record) for record in each], [record["times"] for record in each])
        for name, each in grouped(records, "row", "size").items()
    }
    return Resampled(unit="pairs", sums=sums, figures=lambda drawn: 100 * mean_of_categories(drawn, alphas))


def prepare(config: CorrespondenceConfig) -> tuple[Correspondence | navi.Navi, Recipe, Folder]:
    """The data read, the model loaded, the folder begun: most that can be wrong is wrong here."""
    if config.protocol == "navi":
        return navi.prepare(config, config.sizes, config.matches, config.every)
    folder = Folder(config.required("data"), config.options)
    geometry = _geometry(config.rules.canvas)
    recipe, sizes = resolve_source(config.source, [(side, side) for side in config.sizes], geometry)
    if any(h != w for h, w in sizes):
        raise ConfigError(f"correspondence is done on square inputs, not on {sizes}; use --sizes")
    found, drawn = config.listed(folder)
    everything, taken = limited(found, config.limit, "pairs")
    taken = (*drawn, *taken)
    times = draw_pairs(everything, config.draws, config.seed)
    pairs = tuple(everything[number] for number in times)
    if config.draws:
        flag = f"--pairs-per-category {config.draws}"
        taken += (Taken(how="drawn", count=len(pairs), of=len(everything), unit="pairs", flag=flag),)
    task = Correspondence(
        pairs=pairs,
        times=tuple(times.values()),
        sizes=tuple(h for h, _ in sizes),
        rules=config.rules,
        alphas=config.alphas,
        pictured=frozenset(spread(len(pairs), config.pictures)),
        frame=config.label_frame or ("upright" if config.dataset == "warped" else None),
        taken=taken,
        left_out=left_out_of_listing(found.left_out),
    )
    images = [image for pair in pairs for image in (pair.source, pair.target)]
    of = Evaluated(records=[*pairs, *times.values()], images=dict.fromkeys(sizes, images))
    return task, *begin(config, "correspondence", recipe, of)


def find(config: CorrespondenceConfig, task: Correspondence | navi.Navi, recipe: Recipe, records: Sequence[Record]) -> Findings:
    """PCK per row and size, in percent: the mean of the categories, as both papers have it; or what `navi` finds."""
    if isinstance(task, navi.Navi):
        return navi.find(config, task, recipe, records)
    records, left_out = split_left_out(records)
    records, without = set_aside(records, lambda each: not each["points"], NO_POINTS, lambda each: each["pair"])
    if not records:
        raise DatasetError(f"no pair can be scored: {'; '.join(map(str, (*left_out, *without)))}")
    found = scores(records)
    columns = (*map(_column, task.alphas), "pairs")
    published = _PUBLISHED[config.protocol] if config.paper and config.dataset == "spair" else None
    table = score_table(
        Table(title="PCK, %, mean of the categories", columns=columns),
        recipe,
        config.comparison,
        {side: (side, side) for side in task.sizes},
        lambda row, size: [*percent(found[row, size].mean()), _pairs(found[row, size])],
        published,
        {
            "items": listed(task.taken, len(task.pairs)),
            "split": config.split,
            "pairs_per_category": config.draws,
            "key_points": config.annotation,
            "threshold": config.threshold,
            "candidates": config.candidates,
            "limit": config.limit,
            "left_out": count_of(left_out),
        },
        resampled=resampled(records, len(task.alphas)),
    )
    points = {record["pair"]: record["points"] for record in records}
    return Findings(
        tables=(table,),
        items=Items(
            scored={"pairs": len(points), "key points": sum(points.values())},
            left_out=(*task.left_out, *left_out, *without),
            taken=task.taken,
        ),
        choices=_choices(config, recipe),
        details={f"{name} at {size} px": _details(pck) for (name, size), pck in found.items()},
        pictures=_pictures(task, records),
    )


def _pairs(pck: Pck) -> int:
    return sum(counts.pairs for counts in pck.categories.values())


def _details(pck: Pck) -> dict[str, JsonValue]:
    return {
        "mean_of_categories": percent(pck.mean()),
        "all_key_points": percent(pck.per_point()),
        "mean_of_pairs": percent(pck.per_pair()),
        "pck_plus": percent(pck.plus()),
        "by_category": {name: percent(shares) for name, shares in pck.by_category().items()},
        "key_points": {name: counts.points for name, counts in pck.categories.items()},
        "pairs": {name: counts.pairs for name, counts in pck.categories.items()},
    }


_KNOWN = {
    "homography": "Shi and Tomasi's corners of the photographs; the targets are homographies of them under another light",
    "thin-plate": "Shi and Tomasi's corners of the photographs; the targets are homographies of them under another light, bent "
    "by thin-plate splines of 3 x 3 points",
}


def _choices(config: CorrespondenceConfig, recipe: Recipe) -> dict[str, str]:
    rules = config.rules
    drawn = "all, each once" if not config.draws else f"{config.draws} a category with replacement, seed {config.seed}"
    return {
        "protocol": config.protocol,
        "pairs": f"{drawn}; the published draw depends on how a disk lists categories and can't be had"
        if config.draws
        else drawn,
        "key points": _KNOWN[config.warp] if config.dataset == "warped" else f"of the {config.annotation}' files",
        "canvas": f"{rules.canvas}, drawn as {recipe.rendering}",
        "features": "enlarged bilinearly, as LiFT's code does; its paper says Lanczos, which the code takes for images",
        "similarity": "dot product with cells of length 1, not renormalised after enlargement"
        if rules.normalise == "cells"
        else "cosine of enlarged features",
        "turned photographs": config.turned_photographs if config.dataset == "spair" else "upright, as their points are",
        "candidates": rules.candidates,
        "threshold": f"error {'<' if rules.strict else '<='} alpha x longer side of the target's {rules.threshold}",
    }


def _pictures(task: Correspondence, records: Sequence[Record], side: int = 224) -> dict[str, Image.Image]:
    """Matches of the pictured pairs at the largest size: source beside target, right ones green, wrong ones red."""
    size = max(task.sizes)
    kept = [record for record in records if record["size"] == size and "predicted" in record]
    drawn, pairs = grouped(kept, "pair"), {pair.name: pair for pair in task.pairs}
    if not drawn:
        return {}
    title = f"matches at {size} px: key points left, found right, right at alpha {task.alphas[0]:g}; ring: the true place"
    legend = [("right, joined with its key point", RIGHT), ("wrong, joined with its true place", WRONG)]
    tiles = [_matches(task, pairs[name], each, side) for (name,), each in drawn.items()]
    columns = [row for (row,) in grouped(kept, "row")]
    return {"matches.png": panel(tiles, columns, [name for (name,) in drawn], title, (2 * side, side), legend=legend)}


def _matches(task: Correspondence, pair: Pair, records: Sequence[Record], side: int) -> list[Tile]:
    """A pair's tiles, one for each record."""
    images = (OrientedImage(image.displayed, image.orientation()) for image in (pair.source, pair.target))
    pair = task.upright(pair, *images)
    canvases = [task.rules.place(image.width, image.height, side) for image in (pair.source, pair.target)]
    drawn = np.concatenate([c.draw(upright_pixels(i)) for c, i in zip(canvases, (pair.source, pair.target), strict=True)], axis=1)
    return [_matched(task, pair, record, side, canvases[0], Image.fromarray(drawn)) for record in records]


def _matched(task: Correspondence, pair: Pair, record: Record, side: int, canvas: Canvas, image: Image.Image) -> Tile:
    """A record's matches, drawn into `image`: the upright pair side by side, the source as `canvas` places it."""
    pen = ImageDraw.Draw(image)
    scored = task.rules.place(pair.target.width, pair.target.height, record["size"])
    predicted = np.array(record["predicted"]).reshape(-1, 2)
    truth = scored.compared(np.array(pair.target_xy).reshape(-1, 2))
    right = are_right(np.linalg.norm(predicted - truth, axis=1), task.alphas[0], scored, pair.box, task.rules)
    starts = _on_canvas(canvas, canvas.compared(np.array(pair.source_xy).reshape(-1, 2)), side)
    ends, places = (_on_canvas(scored, points, side) for points in (predicted, truth))
    ends[:, 0] += side  # the target's picture is right of the source's
    places[:, 0] += side
    for start, end, place, ok in zip(starts, ends, places, right, strict=True):
        colour = RIGHT if ok else WRONG
        # A line to each wrong one would cover the picture: those have a short one, to where they should be.
        pen.line([*start, *end] if ok else [*place, *end], fill=colour, width=1)
        pen.ellipse([*(start - 2), *(start + 2)], fill=colour)
        pen.ellipse([*(end - 2), *(end + 2)], fill=colour)
        pen.ellipse([*(place - 4), *(place + 4)], outline="white")
    return Tile(pixels=np.array(image), is_photo=True)


def _on_canvas(canvas: Canvas, compared: np.ndarray, side: int) -> np.ndarray:
    """Points of `Canvas.compared` in pixels of a canvas of `side` pixels."""
    if canvas.mode == "fit_then_pad":
        return compared * side / canvas.side
    return (compared + canvas.corner) * side / canvas.long_side
