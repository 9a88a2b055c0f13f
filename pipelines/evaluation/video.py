"""Video object segmentation on DAVIS-2017: labels of the first frame are carried through a clip by its features.

LiFT's protocol (square inputs) and DINO's (aspect kept). Predicted label images are written to
`masks/<side>/<row>/<clip>/`, as the official evaluation takes them.
"""

import io
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from PIL import Image

from operators.metrics.davis import ObjectCurves, Summary, clip_sums, figures_of_clips, score_clip, summarise
from operators.metrics.propagation import Propagation, Propagator, label_image, one_hot
from operators.visual import Tile
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
    grouped,
    limited,
    listed,
    records_of,
    score_table,
    split_left_out,
)
from pipelines.features.feature_source import FeatureSource
from pipelines.features.photos import upright_pixels
from pipelines.features.pictures import Squash
from pipelines.features.rows import Row, Size
from pipelines.features.sources import Recipe, resolve_source
from pipelines.published.lift import LIFT_VIDEO
from pipelines.results import Cell, Findings, Items, LeftOut, Table, Taken, panel, percent, sides
from storage.datasets.classes import VOID
from storage.datasets.davis import Clip
from storage.datasets.files import DatasetError, DatasetFile, ItemLeftOut
from storage.datasets.frames import LabelFrame, OrientedImage, label_turn, require_size
from storage.datasets.labels import COLOURS, label_png, read_labels
from storage.datasets.registry import CLIPS
from storage.documents import JsonValue, decode_known
from storage.orientation import Orientation
from storage.paths import Folder
from storage.spread import spread


@dataclass(frozen=True, kw_only=True)
class VideoConfig(LabelledConfig):
    """Is an object found again in later frames? J, F and J&F of label propagation on DAVIS-2017."""

    protocol: Counts[Literal["lift", "dino"]] = "lift"
    """`lift`: frames squashed to squares, bicubic; `dino`: the short side is --sizes, the other one keeps the aspect, rounded
    down to a multiple of 64, bilinear."""
    sizes: Counts[tuple[int, ...]] = ()
    """Sides of the model's input in pixels; default: the model's own, or the stores'; 480 for dino."""
    split: Counts[str] = "val"
    """List in ImageSets/2017."""
    resolution: Counts[str] = "480p"
    """Folder in JPEGImages and Annotations."""
    frame_step: Counts[int] = 1
    """Only every N-th frame is looked at and scored; the published numbers are of all."""
    context: Counts[int] = 7
    """Latest frames that are looked at, beside the first one."""
    top_k: Counts[int] = 5
    """Affinities that count per cell."""
    radius: Counts[int] = 12
    """Of the window around a cell, in cells; 0 for none. LiFT keeps 12 on its doubled grid, which halves the window."""
    temperature: Counts[float] = 0.1
    """Of the affinities."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frame_step < 1:
            raise ConfigError(f"--frame-step {self.frame_step}: must be at least 1")
        try:
            self.propagation  # noqa: B018 - checks its settings
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @property
    def propagation(self) -> Propagation:
        return Propagation(context=self.context, top_k=self.top_k, radius=self.radius, temperature=self.temperature)


def input_size(protocol: str, side: int, height: int, width: int) -> Size:
    """(height, width) of the model's input for frames of `height` x `width` pixels."""
    if protocol == "lift":
        return side, side
    # DINO's rule; a clip that is nearly square keeps at least the short side's multiple.
    long = max(64, int(side * max(height, width) / min(height, width) // 64 * 64))
    return (long, side) if height > width else (side, long)


@dataclass(frozen=True, kw_only=True)
class Video:
    """Clips, and how labels are carried through them."""

    clips: tuple[Clip, ...]
    shapes: tuple[Size, ...]
    "(height, width) of each clip's frames, upright"
    sides: tuple[int, ...]
    protocol: Literal["lift", "dino"]
    propagation: Propagation
    frame: LabelFrame | None = None
    "of label images, where their size doesn't tell"
    taken: tuple[Taken, ...] = ()
    "which of the list's clips"
    left_out: tuple[LeftOut, ...] = ()
    "clips whose shape can't be told"

    def pieces(self) -> list[Piece]:
        """A clip at one size each; the longest ones first, so that none is waited for at the end."""
        order = sorted(range(len(self.clips)), key=lambda i: (-len(self.clips[i].frames), i))
        return cut(order, 1, "{side}-{item:04d}", sorted(self.sides, reverse=True))

    def size(self, number: int, side: int) -> Size:
        """The model's input for a clip."""
        return input_size(self.protocol, side, *self.shapes[number])

    def run(self, piece: Piece, source: FeatureSource, folder: Folder) -> list[Record]:
        return records_of(piece.items, lambda number: self._clip(number, piece.side, source, folder))

    def _clip(self, number: int, side: int, source: FeatureSource, folder: Folder) -> list[Record]:
        clip, size = self.clips[number], self.size(number, side)
        frames = [source.oriented(frame, size) for frame in clip.frames]
        shape = self.shapes[number]
        found = [upright_labels(clip, t, shape, frame, self.frame) for t, frame in enumerate(frames)]
        truth, turns = [labels for labels, _ in found], [turn for _, turn in found]
        _require_objects(clip, truth[0])
        records = []
        for row, predicted in self._predict(clip, size, truth[0], source).items():
            for name, labels, turn in zip(clip.masks, predicted, turns, strict=True):
                stem = name.rsplit("/", 1)[-1]
                # As the data set has its own, for the official evaluation.
                folder.write(f"{mask_folder(side, row, clip.name)}/{stem}", label_png(turn.undone(labels)))
            curves = score_clip(clip.name, truth, predicted)
            records += [{"side": side, "row": row, **asdict(each)} for each in curves]
        return records

    def _predict(self, clip: Clip, size: Size, first: np.ndarray, source: FeatureSource) -> dict[str, list[np.ndarray]]:
        """Label images of all frames, by row name; the first one is given."""
        squash = Squash(size=size, interpolation="bicubic" if self.protocol == "lift" else "bilinear")
        rows = source.rows(size)
        predicted: dict[str, list[np.ndarray]] = {row.name: [first] for row in rows}
        propagators: dict[str, Propagator] = {}
        for t, frame in enumerate(clip.frames):
            maps = source.maps(squash.of(frame))
            for row in rows:
                if t == 0:
                    labels = one_hot(first, row.grid)
                    propagators[row.name] = Propagator(maps[row.name], labels, self.propagation)
                else:
                    soft = propagators[row.name].step(maps[row.name])
                    predicted[row.name].append(label_image(soft, enlargement(row, rows[0]), first.shape))
        return predicted


def enlargement(row: Row, low: Row) -> int:
    """How often soft labels are enlarged before they harden: the patch, also on LiFT's doubled grid, whose label images are twice
    as large as the input; on finer grids less, so that those are never larger."""
    return max(1, 2 * row.stride * low.grid[0] // max(row.grid[0], 2 * low.grid[0]))


MOST_OBJECTS = 64
"""Of a clip; DAVIS-2017 has at most 10. Larger numbers are grey levels or colours, not objects."""


def upright_labels(
    clip: Clip, t: int, shape: Size, image: OrientedImage, frame: LabelFrame | None
) -> tuple[np.ndarray, Orientation]:
    """The true label image of a frame, void as background, on the upright frame, `shape`; and how it was turned.

    Raises `DatasetError`, also where it has another size than the clip or its frame, and `FrameUnknown`.
    """
    folder = clip.frames[t].folder
    labels = read_labels(folder, clip.masks[t])
    height, width = labels.shape
    turn = Orientation(width=width, height=height)
    if sorted(labels.shape) == sorted(shape):
        turn = label_turn(image, (width, height), frame, f"but its label {folder.displayed}/{clip.masks[t]} has")
    if turn.upright_size != (shape[1], shape[0]):
        raise DatasetError(
            f"{folder.displayed}/{clip.masks[t]} has {width} x {height} pixels, the clip's first mask {shape[1]} x {shape[0]}"
        )
    return turn.array(np.where(labels == VOID, 0, labels).astype(np.uint8)), turn


def _require_objects(clip: Clip, first: np.ndarray) -> None:
    """Raises `DatasetError` unless a clip's first label image shows objects by their numbers."""
    displayed, largest = f"{clip.frames[0].folder.displayed}/{clip.masks[0]}", int(first.max())
    if not largest:
        raise DatasetError(f"{displayed} shows no object")
    if largest > MOST_OBJECTS:
        raise DatasetError(
            f"{displayed} has the value {largest}; values are numbers of objects from 1, not grey levels or colours; use the "
            "data set's own label images"
        )


def mask_folder(side: int, row: str, clip: str) -> str:
    """Where predicted label images are."""
    return f"masks/{side}/{row.replace(' ', '-')}/{clip}"


def prepare(config: VideoConfig) -> tuple[Video, Recipe, Folder]:
    """The data read, the model loaded, the folder begun: most that can be wrong is wrong here."""
    folder = Folder(config.required("data"), config.options)
    all_clips = CLIPS["davis"](folder, config.split, config.resolution, config.frame_step)
    asked, taken = limited(all_clips, config.limit, "clips")
    _require_scored(asked)
    clips, shapes, left_out = _upright_shapes(asked)
    sides = config.sizes or ((480,) if config.protocol == "dino" and not config.stores else ())
    wanted = [input_size(config.protocol, side, *shape) for side in sides for shape in shapes]
    recipe, sizes = resolve_source(config.source, wanted, "squash")
    task = Video(
        clips=clips,
        shapes=shapes,
        sides=sides or tuple(dict.fromkeys(min(size) for size in sizes)),
        protocol=config.protocol,
        propagation=config.propagation,
        frame=config.label_frame,
        taken=taken,
        left_out=left_out,
    )
    for side in task.sides:
        for number in range(len(clips)):
            recipe.rows(task.size(number, side))  # a store of just that size, or a model that takes it
    at = [(clip, task.size(number, side)) for side in task.sides for number, clip in enumerate(clips)]
    of = Evaluated(
        records=[*clips, *shapes],
        images=by_size((size, frame) for clip, size in at for frame in clip.frames),
        labels=[DatasetFile(folder=folder, name=name) for clip in clips for name in clip.masks],
    )
    return task, *begin(config, "video", recipe, of)


def _require_scored(clips: Sequence[Clip]) -> None:
    """Raises `DatasetError` for a clip of which no frame would be scored: the first one is given, the last one isn't scored."""
    for clip in clips:
        if len(clip.frames) < 3:
            raise DatasetError(
                f"{clip.frames[0].folder.displayed}: {len(clip.frames)} frames of the clip {clip.name} are looked at, and the "
                "first and the last of them aren't scored; use a smaller --frame-step, or leave the clip out of the list"
            )


def _upright_shapes(clips: Sequence[Clip]) -> tuple[tuple[Clip, ...], tuple[Size, ...], tuple[LeftOut, ...]]:
    """The clips, their shapes, and those whose first frame or label image can't be read. Raises `DatasetError`, also where that
    is all of them."""
    shapes: list[tuple[Clip, Size]] = []
    unread: dict[str, list[str]] = {}
    for clip in clips:
        try:
            shapes.append((clip, _upright_shape(clip)))
        except ItemLeftOut as error:
            unread.setdefault(error.reason, []).append(error.displayed)
    left_out = tuple(each for reason, names in unread.items() for each in LeftOut.of(reason, names))
    if not shapes:
        raise DatasetError(f"no clip can be scored: {'; '.join(map(str, left_out))}")
    return tuple(clip for clip, _ in shapes), tuple(shape for _, shape in shapes), left_out


def _upright_shape(clip: Clip) -> Size:
    """(height, width) of a clip's first frame. Raises `DatasetError` where its label image isn't of its size."""
    frame, labels = clip.frames[0], read_labels(clip.frames[0].folder, clip.masks[0])
    says = f"but its label {frame.folder.displayed}/{clip.masks[0]} has"
    orientation = frame.orientation()
    require_size(frame.displayed, orientation, (labels.shape[1], labels.shape[0]), says)
    width, height = orientation.upright_size
    return height, width


def scores(records: Sequence[Record]) -> dict[tuple[str, int], Summary]:
    """J and F by row and side: each object counts once."""
    groups = grouped(records, "row", "side").items()
    return {name: summarise([decode_known(ObjectCurves, record) for record in each]) for name, each in groups}


def resampled(records: Sequence[Record]) -> Resampled:
    """All figures in percent, drawn from clips, whose objects move together."""
    sums = {
        name: clip_sums([decode_known(ObjectCurves, record) for record in each])
        for name, each in grouped(records, "row", "side").items()
    }
    return Resampled(unit="clips", sums=sums, figures=lambda drawn: 100 * figures_of_clips(drawn))


def find(config: VideoConfig, task: Video, recipe: Recipe, records: Sequence[Record]) -> Findings:
    """J&F and its parts, in percent, and each object's own."""
    records, left_out = split_left_out(records)
    left_out = (*task.left_out, *left_out)
    found = scores(records)
    sizes = {side: task.size(0, side) for side in task.sides}
    columns = ("J&F", "J", "F", "J recall", "F recall", "J decay", "F decay", "objects")
    published = LIFT_VIDEO if config.paper and config.protocol == "lift" else None
    notes = (f"no paper has numbers of --protocol {config.protocol} here",) if config.paper and not published else ()
    table = score_table(
        Table(title="DAVIS-2017 semi-supervised, %, mean of the objects", columns=columns, notes=notes),
        recipe,
        config.comparison,
        sizes,
        lambda row, side: _values(found[row, side]),
        published,
        {
            "items": listed(task.taken, len(task.clips) + count_of(task.left_out)),
            **{name: getattr(config, name) for name in ("split", "resolution", "frame_step", "limit")},
            **asdict(config.propagation),
            "left_out": count_of(left_out),
        },
        # Clips of other shapes have other inputs; the first one's are printed.
        varied={
            side: f"{sides(size)}, ..."
            for side, size in sizes.items()
            if any(task.size(number, side) != size for number in range(len(task.clips)))
        },
        resampled=resampled(records),
    )
    frames = {(record["clip"], record["object_id"]): len(record["j"]) for record in records}
    of_clips = {clip: count for (clip, _), count in frames.items()}
    return Findings(
        tables=(table,),
        items=Items(
            scored={"clips": len(of_clips), "objects": len(frames), "frames": sum(of_clips.values())},
            left_out=left_out,
            taken=task.taken,
        ),
        choices=_choices(config, task, recipe),
        details={"objects": [_object(record) for record in records]},
        pictures=_pictures(config, task, recipe, {record["clip"] for record in records}),
    )


def _values(summary: Summary) -> list[Cell]:
    j, f = summary.j, summary.f
    shares = [summary.j_and_f, j.mean, f.mean, j.recall, f.recall, j.decay, f.decay]
    return [*percent(shares), summary.objects]


def _object(record: Record) -> dict[str, JsonValue]:
    means = {name: 100 * float(np.mean(record[name])) for name in ("j", "f")}
    return {**{name: record[name] for name in ("clip", "object_id", "row", "side")}, **means, "frames": len(record["j"])}


def _choices(config: VideoConfig, task: Video, recipe: Recipe) -> dict[str, str]:
    shape = "squashed to a square, bicubic" if config.protocol == "lift" else "aspect kept, bilinear (Pillow's, antialiased)"
    return {
        "protocol": config.protocol,
        "frames": f"{shape if recipe.rendering == 'paper' else 'squashed, drawn as extract'}; every {config.frame_step}.",
        "turned photographs": config.turned_photographs,
        "propagation": str(task.propagation),
        "first mask": "nearest neighbour to the grid, void as background; an object that vanishes there scores 0",
        "scored": "all frames but the first and the last; void is background; ids 1 to the first frame's largest",
    }


def _pictures(config: VideoConfig, task: Video, recipe: Recipe, scored: Collection[str]) -> dict[str, Image.Image | bytes]:
    """Of the first clips that were scored at the largest size: four frames as a panel, and all of them as an animation."""
    side = max(task.sides)
    folder = Folder(config.required("out"), config.options)
    pictures: dict[str, Image.Image | bytes] = {}
    numbers = [number for number, clip in enumerate(task.clips) if clip.name in scored]
    for number in numbers[: config.pictures]:
        clip = task.clips[number]
        rows = [row.name for row in recipe.rows(task.size(number, side))]
        times = spread(len(clip.frames), 40)
        strips = [_strip(task, number, t, folder, [mask_folder(side, row, clip.name) for row in rows]) for t in times]
        pictures[f"{clip.name}.webp"] = _animation(strips)
        chosen = spread(len(times), 4)
        tiles = [[Tile(pixels=pixels, is_photo=True) for pixels in strips[i]] for i in chosen]
        height, width = strips[0][0].shape[:2]
        names = [f"frame {times[i]}" for i in chosen]
        pictures[f"{clip.name}.png"] = panel(tiles, ["truth", *rows], names, f"{clip.name}, {side} px", (width, height))
    return pictures


def _strip(task: Video, number: int, t: int, folder: Folder, places: Sequence[str], height: int = 160) -> list[np.ndarray]:
    """A frame of a clip with its true labels, and with those in each of the places."""
    clip = task.clips[number]
    stem = clip.masks[t].rsplit("/", 1)[-1]
    image = OrientedImage(clip.frames[t].displayed, clip.frames[t].orientation())
    truth, turn = upright_labels(clip, t, task.shapes[number], image, task.frame)
    labels = [truth, *(turn.array(read_labels(folder, f"{place}/{stem}")) for place in places)]
    width = max(1, round(height * truth.shape[1] / truth.shape[0]))
    photo = Image.fromarray(upright_pixels(clip.frames[t])).resize((width, height))
    return [overlay(np.array(photo), np.array(Image.fromarray(each).resize((width, height), 0))) for each in labels]


def overlay(pixels_HW3: np.ndarray, labels_HW: np.ndarray) -> np.ndarray:
    """The photograph with its objects coloured, uint8 [H, W, 3]."""
    colours = COLOURS[np.where(labels_HW > 0, 1 + (labels_HW.astype(int) - 1) % (len(COLOURS) - 1), 0)]
    mixed = 0.45 * pixels_HW3 + 0.55 * colours
    return np.where(labels_HW[..., None] > 0, mixed, pixels_HW3).astype(np.uint8)


def _animation(strips: Sequence[Sequence[np.ndarray]]) -> bytes:
    frames = [Image.fromarray(np.concatenate(list(strip), axis=1)) for strip in strips]
    data = io.BytesIO()
    frames[0].save(data, "WEBP", save_all=True, append_images=frames[1:], duration=120, loop=0, quality=60)
    return data.getvalue()
