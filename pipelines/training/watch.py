"""Watching training runs: a picture of similarity maps, events for TensorBoard, and a table of several runs."""

import io
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from operators.visual import Panel, Tile, cosine_map, heat
from pipelines.config import ConfigError
from pipelines.results import table_lines
from storage.paths import Folder
from storage.runs import read_metrics, read_run

COUNTS = ("val_images", "val_left_out", "val_empty", "val_seen")
"""Numbers of held-out images among the metrics: that the others are over, that couldn't be read, whose label holds nothing to be
judged, and that are trained on, too."""

_SHOWN = 4
"""Held-out images in a picture."""


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


class EventFile:
    """Metrics for TensorBoard: written locally, copied to `tensorboard/` with each checkpoint.

    A run that was continued has several files; what was logged after the checkpoint is purged by the next one's.
    """

    def __init__(self, folder: Folder, step: int):
        from tensorboardX import SummaryWriter

        self._folder, self._local = folder, tempfile.mkdtemp(prefix="raylift-events-")
        self._writer = SummaryWriter(self._local, purge_step=step + 1 if step else None, filename_suffix=f".{step:08d}")

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def save(self) -> None:
        """Copy what there is."""
        self._writer.flush()
        for path in Path(self._local).iterdir():
            self._folder.write(f"tensorboard/{path.name}", path.read_bytes())

    def close(self) -> None:
        self._writer.close()
        shutil.rmtree(self._local, ignore_errors=True)


def similarity_picture(step: int, columns: Sequence[str], displayed: Sequence[Sequence[np.ndarray]]) -> bytes:
    """A PNG: for each of the first `displayed`, a photo uint8 [H, W, 3] and maps [h, w, C] as the similarity of each cell with
    the central one, on one scale in a row."""
    tiles = []
    for photo, *maps in displayed[:_SHOWN]:
        heights = [cosine_map(m[m.shape[0] // 2, m.shape[1] // 2], m) for m in maps]
        low = float(min(h.min() for h in heights))
        tiles.append([Tile(pixels=photo, is_photo=True, mark=(0.5, 0.5)), *(Tile(pixels=heat(h, low, 1.0)) for h in heights)])
    return _png(f"step {step}: similarity with the cell in the middle", columns, tiles)


def panel_picture(title: str, columns: Sequence[str], displayed: Sequence[Sequence[np.ndarray]]) -> bytes:
    """A PNG of rows of pictures, uint8 [H, W, 3]."""
    return _png(title, columns, [[Tile(pixels=each, is_photo=True) for each in row] for row in displayed])


def _png(title: str, columns: Sequence[str], tiles: Sequence[Sequence[Tile]]) -> bytes:
    panel = Panel(tiles=tiles, columns=list(columns), rows=[""] * len(tiles), title=title, tile_size=(192, 192))
    png = io.BytesIO()
    panel.draw().save(png, "PNG")
    return png.getvalue()


def training_lines(folders: Sequence[Folder]) -> Iterator[str]:
    """Markdown: what each run measured last on its held-out images, and before it began; bilinear enlargement of the same.

    Raises `ConfigError` for a folder without metrics.
    """
    rows, names, over = [], [], []
    for folder in folders:
        run, lines = read_run(folder), [line for line in read_metrics(folder) if "val_loss" in line]
        if run is None or not lines:
            raise ConfigError(f"{folder.displayed} is no training run, or has not validated yet")
        first, last = lines[0], lines[-1]
        ours = [name for name in last if name.startswith("val_") and not name.endswith("_bilinear") and name not in COUNTS]
        names += [name for name in ours if name not in names]
        if not rows:
            plain = {name.removesuffix("_bilinear"): value for name, value in last.items() if name.endswith("_bilinear")}
            rows.append(["bilinear", "", plain])
        name = folder.url.rstrip("/").rsplit("/", 1)[-1]
        if first["step"] == 0:
            rows.append([f"{name}, untrained", "0", first])
        rows.append([name, f"{last['step']:,}", last])
        if words := held_out_words(last):
            over.append(f"- {name}: {words}.")
    cells = [[run, steps, *(f"{values[name]:.4f}" if name in values else "" for name in names)] for run, steps, values in rows]
    _, *lines = table_lines(["run", "steps", *names], cells)
    yield from lines
    yield from ["", *over] if over else []
