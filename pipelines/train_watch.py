"""Watching a training run: metrics on held-out images, a picture of similarity maps, and events for TensorBoard."""

import io
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from operators.losses import cosine_loss, multi_scale_loss
from operators.visual import Panel, Tile, cosine_map, heat
from pipelines.training_data import ImageSource
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


METRICS = ("val_loss", "val_cosine", "val_cosine_beyond")


@torch.no_grad()
def measure(trainer: Any, source: ImageSource, rows: Sequence[int]) -> tuple[dict[str, float], bytes] | None:
    """Metrics on held-out images, in eval mode, and a picture of the first ones as PNG; None if none can be read.

    `val_loss` is the training's, at its scales. `val_cosine` is that of the network's x2 map of an image of half the size with
    the backbone's own map of the image: the largest scale that was trained on, but resized, not sliced. `val_cosine_beyond` is
    the same one octave up, which was not trained on. Beside each, `..._bilinear` is bilinear enlargement's.
    """
    trainer.net.eval()
    try:
        sums, shown = np.zeros(1 + 2 * len(METRICS)), []
        step = min(trainer.config.forward_images, 16)
        for start in range(0, len(rows), step):
            sums += _measure_some(trainer, source, rows[start : start + step], shown)
    finally:
        trainer.net.train()
    if not sums[0]:
        return None
    names = [f"{name}{suffix}" for name in METRICS for suffix in ("", "_bilinear")]
    values = dict(zip(names, (sums[1:] / sums[0]).tolist(), strict=True))
    return values, _picture(trainer.step, trainer.config.method, values, shown)


def _measure_some(trainer: Any, source: ImageSource, rows: Sequence[int], shown: list[list[np.ndarray]]) -> np.ndarray:
    """Number of images, and the sums over them of what `measure` gives; adds photos and maps to `shown`."""
    size = trainer.config.size
    octaves = [
        replace(source, geometry=replace(source.geometry, height=side, width=side)).load(rows, None)
        for side in (size // 2, size, 2 * size)
    ]
    keep = [i for i, row in enumerate(rows) if row not in octaves[1][1]]
    if not keep:
        return np.zeros(1 + 2 * len(METRICS))
    half, images, double = (trainer.pixels(pixels[keep]) for pixels, _ in octaves)
    scales = trainer.maps(images)
    coarse, maps, target = trainer.features(half), scales[0], trainer.features(double)
    ours = trainer.upsample(half, coarse)
    shown.extend(
        [
            octaves[1][0][keep[i]],
            *(m[i].permute(1, 2, 0).cpu().numpy() for m in (coarse, _bilinear(half, coarse), ours, maps)),
        ]
        for i in range(min(len(keep), _SHOWN - len(shown)))
    )
    kind = trainer.config.loss
    means = [
        multi_scale_loss(trainer.upsample, images, scales, kind),
        multi_scale_loss(_bilinear, images, scales, kind),
        1 - cosine_loss(ours, maps),
        1 - cosine_loss(_bilinear(half, coarse), maps),
        1 - cosine_loss(trainer.upsample(images, maps), target),
        1 - cosine_loss(_bilinear(images, maps), target),
    ]
    return len(keep) * np.array([1.0, *(float(mean) for mean in means)])


def _bilinear(_: Tensor, maps: Tensor) -> Tensor:
    return F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False)


def _picture(step: int, method: str, values: Mapping[str, float], shown: Sequence[Sequence[np.ndarray]]) -> bytes:
    """Similarity of each cell with the image's central one, on one scale in a row."""
    tiles = []
    for photo, *maps in shown:
        heights = [cosine_map(m[m.shape[0] // 2, m.shape[1] // 2], m) for m in maps]
        low = float(min(h.min() for h in heights))
        tiles.append(
            [Tile(pixels=photo, is_photo=True, mark=(0.5, 0.5)), *(Tile(pixels=heat(h, low, 1.0)) for h in heights)]
        )
    grid, double = shown[0][1].shape[:2], shown[0][4].shape[:2]
    panel = Panel(
        tiles=tiles,
        columns=[
            "photo",
            f"backbone\n{grid[0]} x {grid[1]}",
            f"bilinear\ncosine {values['val_cosine_bilinear']:.4f}",
            f"{method}\ncosine {values['val_cosine']:.4f}",
            f"backbone, image twice as large\n{double[0]} x {double[1]}",
        ],
        rows=[""] * len(tiles),
        title=f"step {step}: similarity with the cell in the middle",
        tile_size=(192, 192),
    )
    png = io.BytesIO()
    panel.draw().save(png, "PNG")
    return png.getvalue()
