"""Watching a training run: a picture of similarity maps, and events for TensorBoard."""

import io
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from operators.visual import Panel, Tile, cosine_map, heat
from storage.paths import Folder

_SHOWN = 4
"""Held-out images in a picture."""


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


def similarity_picture(step: int, columns: Sequence[str], shown: Sequence[Sequence[np.ndarray]]) -> bytes:
    """A PNG: for each of the first `shown`, a photo uint8 [H, W, 3] and maps [h, w, C] as the similarity of each cell with the
    central one, on one scale in a row."""
    tiles = []
    for photo, *maps in shown[:_SHOWN]:
        heights = [cosine_map(m[m.shape[0] // 2, m.shape[1] // 2], m) for m in maps]
        low = float(min(h.min() for h in heights))
        tiles.append(
            [Tile(pixels=photo, is_photo=True, mark=(0.5, 0.5)), *(Tile(pixels=heat(h, low, 1.0)) for h in heights)]
        )
    panel = Panel(
        tiles=tiles,
        columns=list(columns),
        rows=[""] * len(tiles),
        title=f"step {step}: similarity with the cell in the middle",
        tile_size=(192, 192),
    )
    png = io.BytesIO()
    panel.draw().save(png, "PNG")
    return png.getvalue()
