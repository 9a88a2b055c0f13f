"""Watching a training run: pictures, events for TensorBoard, and what it measured on its held-out images."""

import io
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from operators.visual import Panel, Tile, cosine_map, heat
from storage.documents import JsonObject, decode
from storage.paths import Folder, StorageError
from storage.pixels import bilinear
from storage.runs import read_metrics, read_pointers, step_name

logger = logging.getLogger(__name__)

COUNTS = ("val_images", "val_left_out", "val_empty", "val_seen")
"""Numbers of held-out images among the metrics: that the others are over, that couldn't be read, whose label holds nothing to be
judged, and that are trained on, too."""

PLAIN = "_bilinear"
"""How the names of scores end that bilinear enlargement of the same images has."""

_SHOWN = 4
"""Held-out images in a picture."""

_TILE = 192
"""Pixels of each, a side."""


def held_out_words(values: Mapping[str, object]) -> str:
    """Over how many held-out images the metrics of a line are, and what became of the others; empty where it doesn't say so."""
    images, left_out, empty, seen = (values.get(name, 0) for name in COUNTS)
    if "val_left_out" not in values or not all(isinstance(each, int | float) for each in (images, left_out, empty, seen)):
        return ""
    of = images + left_out + empty
    words = [f"over {images:g} of {of:g} held-out images"]
    words += [f"{left_out:g} left out"] if left_out else []
    words += [f"{empty:g} with nothing to judge in their labels"] if empty else []
    words += [f"{seen:g} of the {of:g} are trained on"] if seen else []
    return ", ".join(words)


class _File:
    """A file in memory, with what tensorboardX asks of one; it has no number, of which a disk could be asked to sync it."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        self._parts.append(data)

    def flush(self) -> None:
        """All is there at once."""

    def close(self) -> None:
        """Nothing is held."""

    def content(self) -> bytes:
        return b"".join(self._parts)


class _Memory:
    """What tensorboardX takes for a kind of storage: files in memory, which a killed run leaves nowhere."""

    prefix = "raylift-memory"

    def __init__(self) -> None:
        self.files: dict[str, _File] = {}

    def directory_check(self, path: str) -> None:
        """There are no folders."""

    def open(self, path: str) -> _File:
        self.files[path] = _File()
        return self.files[path]


_memory = _Memory()


class EventFile:
    """Metrics for TensorBoard: kept in memory, copied to `tensorboard/` with each checkpoint.

    A run that was continued has several files; what was logged after the checkpoint is purged by the next one's.
    """

    def __init__(self, folder: Folder, step: int):
        from tensorboardX import SummaryWriter
        from tensorboardX.record_writer import register_writer_factory

        register_writer_factory(_memory.prefix, _memory)
        self._folder, self._place = folder, f"{_memory.prefix}:{uuid.uuid4().hex}/"
        self._writer = SummaryWriter(self._place, purge_step=step + 1 if step else None, filename_suffix=f".{step:08d}")

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def save(self) -> None:
        """Copy what there is."""
        self._writer.flush()
        self._copy()

    def _copy(self) -> None:
        for path in self._paths():
            self._folder.write(f"tensorboard/{path.rsplit('/', 1)[-1]}", _memory.files[path].content())

    def close(self) -> None:
        """Copy it once more: only now tensorboardX has written the last lines."""
        self._writer.close()
        try:
            self._copy()
        except (OSError, StorageError) as error:  # never worth a run, nor the error that ended it
            logger.warning("TensorBoard's events were not saved: %s", error)
        for path in self._paths():
            del _memory.files[path]

    def _paths(self) -> list[str]:
        return [path for path in _memory.files if path.startswith(self._place)]


def similarity_picture(step: int, columns: Sequence[str], displayed: Sequence[Sequence[np.ndarray]]) -> bytes:
    """A PNG: for each of the first `displayed`, a photo uint8 [H, W, 3] and maps [h, w, C] as the similarity of each cell with
    a point, on one scale in a row. The point is the middle of the first map's central cell, between the cells of finer ones."""
    tiles, rows = [], []
    for photo, *maps in displayed[:_SHOWN]:
        height, width = maps[0].shape[:2]
        point = (width // 2 + 0.5) / width, (height // 2 + 0.5) / height
        queries = [bilinear(m, np.array([[point[0] * m.shape[1] - 0.5, point[1] * m.shape[0] - 0.5]]))[0] for m in maps]
        heights = [cosine_map(query, m) for query, m in zip(queries, maps, strict=True)]
        low = float(min(h.min() for h in heights))
        shown = (Tile(pixels=heat(h, low, 1.0), mark=point) for h in heights)
        tiles.append([Tile(pixels=photo, is_photo=True, mark=point), *shown])
        rows.append(f"{low:.2f} to 1.00")
    title, scale = f"step {step}: cosine with the features at the ring", ("lowest cosine beside the row", "1")
    return _png(title, columns, tiles, rows, scale)


def panel_picture(
    title: str,
    columns: Sequence[str],
    displayed: Sequence[Sequence[np.ndarray]],
    legend: Sequence[tuple[str, tuple[int, int, int]]] = (),
) -> bytes:
    """A PNG of rows of pictures, uint8 [H, W, 3], and names of colours."""
    tiles = [[Tile(pixels=each, is_photo=True) for each in row] for row in displayed]
    return _png(title, columns, tiles, [""] * len(tiles), legend=legend)


def _png(
    title: str,
    columns: Sequence[str],
    tiles: Sequence[Sequence[Tile]],
    rows: Sequence[str],
    scale: tuple[str, str] | None = None,
    legend: Sequence[tuple[str, tuple[int, int, int]]] = (),
) -> bytes:
    panel = Panel(
        tiles=tiles, columns=list(columns), rows=rows, title=title, tile_size=(_TILE, _TILE), scale=scale, legend=legend
    )
    png = io.BytesIO()
    panel.draw().save(png, "PNG", compress_level=1)  # with 6, a validation of few images is mostly this
    return png.getvalue()


# --- what was measured on held-out images -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class HeldOutScores:
    """What a run measured on its held-out images after some step, by the names that metrics.jsonl has."""

    step: int
    values: Mapping[str, float]
    "`COUNTS` among them, and no scores where no image could be judged"

    @property
    def scores(self) -> dict[str, float]:
        """Those that aren't `COUNTS`."""
        return {name: value for name, value in self.values.items() if name not in COUNTS}

    @property
    def over(self) -> str:
        """Over how many images they are, in words; empty where the run doesn't say it."""
        return held_out_words(self.values)

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.4f}" for name, value in self.scores.items()) or "no scores"


@dataclass(frozen=True, kw_only=True)
class Validations:
    """A run's validations."""

    untrained: HeldOutScores | None
    last: HeldOutScores
    best: HeldOutScores | None
    "of the best checkpoint, which has the smallest `val_loss`; None before there is one"
    every: tuple[HeldOutScores, ...] = ()
    "all, by step"

    @classmethod
    def read(cls, folder: Folder) -> "Validations | None":
        """None where nothing was validated yet. Raises `CheckpointError` where metrics or pointers are damaged."""
        lines = [(decode(int, line["step"]), _of_held_out(line)) for line in read_metrics(folder)]
        scores = [HeldOutScores(step=step, values=values) for step, values in lines if values]
        if not scores:
            return None
        pointers, by_name = read_pointers(folder), {step_name(each.step): each for each in scores}
        return cls(
            untrained=scores[0] if scores[0].step == 0 else None,
            last=scores[-1],
            best=by_name.get(pointers.best) if pointers and pointers.best else None,
            every=tuple(sorted(scores, key=lambda each: each.step)),
        )


def _of_held_out(line: JsonObject) -> dict[str, float]:
    return {name: decode(float, value, name) for name, value in line.items() if name.startswith("val_")}
