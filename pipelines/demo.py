"""What the demo needs: photographs that are already on the machine, and a picture of their features."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from operators.visual import RgbProjection
from storage.store import FeatureStore

PHOTOS = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "camera",
    "coins",
    "moon",
    "motorcycle_left",
    "grass",
    "gravel",
    "brick",
    "hubble_deep_field",
)
"""Photographs inside the scikit-image wheel."""

_TILE_PX = 224


def write_photos(folder: str) -> None:
    """Write `photos-000.tar` and `photos-001.tar` into `folder`; the same bytes every time."""
    import skimage

    Path(folder).mkdir(parents=True, exist_ok=True)
    source = Path(skimage.__file__).parent / "data"
    for shard in (0, 1):
        path = Path(folder) / f"photos-{shard:03d}.tar"
        if path.exists():
            continue
        partial = path.with_suffix(".partial")
        with tarfile.open(partial, "w") as tar:
            for name in PHOTOS[shard::2]:
                file = next(p for p in source.glob(f"{name}.*") if p.suffix in (".png", ".jpg"))
                for member, data in ((f"{name}{file.suffix}", file.read_bytes()), (f"{name}.txt", name.encode())):
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        partial.rename(path)


def draw_picture(store_url: str, target: str) -> str:
    """One PNG: each photo beside the PCA colours of every dense level, one colour basis for all."""
    import zarr

    from operators.image import decode
    from pipelines.prepare import geometry_of
    from storage.samples import read_images

    store = FeatureStore.open(store_url)
    levels = [level for level in store.spec.levels if level.grid]
    group = zarr.open_group(store_url, mode="r")
    index = store.index
    rows = index.read(0, index.n_rows)
    blobs = read_images(rows, [source.url for source in index.sources])
    base = np.asarray(group[f"{levels[0].name}/features"][:], np.float32)
    valid = ~np.isnan(base).any(axis=(1, 2, 3))
    colours = RgbProjection.fit(base[valid].reshape(-1, base.shape[-1]))
    geometry = geometry_of(store.spec)
    h, w = store.spec.input_size
    height = round(_TILE_PX * h / w)
    keep = [i for i in np.flatnonzero(valid) if blobs[i] is not None]
    per_line = 2
    columns = 1 + len(levels)
    lines = -(-len(keep) // per_line)
    canvas = Image.new("RGB", (per_line * columns * (_TILE_PX + 4) + 16, lines * (height + 4) + 20), "white")
    draw = ImageDraw.Draw(canvas)
    for n in range(per_line):
        for c, title in enumerate(
            ["photo", *(f"{lv.name}  {lv.grid[0]} x {lv.grid[1]} cells, {lv.method}" for lv in levels if lv.grid)]
        ):
            draw.text((_left(n, c, columns) + 2, 3), title, fill="black")
    for n, i in enumerate(keep):
        top = 20 + (n // per_line) * (height + 4)
        photo = decode(blobs[i] or b"", geometry, max_pixels=10**9).pixels
        tiles = [photo, *(colours(np.asarray(group[f"{level.name}/features"][i], np.float32)) for level in levels)]
        for c, tile in enumerate(tiles):
            shown = Image.fromarray(tile).resize(
                (_TILE_PX, height), Image.Resampling.BICUBIC if c == 0 else Image.Resampling.NEAREST
            )
            canvas.paste(shown, (_left(n % per_line, c, columns), top))
    canvas.save(target)
    return target


def _left(side: int, column: int, columns: int) -> int:
    return side * (columns * (_TILE_PX + 4) + 16) + column * (_TILE_PX + 4)
