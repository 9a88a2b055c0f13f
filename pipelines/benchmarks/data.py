"""Input for benchmarks, made on the spot: the same bytes every time."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.config import ConfigError
from pipelines.costs.process import CORES
from pipelines.demo_datasets import PHOTOS


def require_fresh(folder: Path, *patterns: str) -> None:
    """Raise `ConfigError` where an earlier benchmark left what this one would go on with, and take for its own work."""
    if left := sorted(path.name for pattern in patterns for path in folder.glob(pattern)):
        raise ConfigError(f"{folder} holds an earlier benchmark's {', '.join(left)}; remove them, or give another --out")


def _sources() -> list[Image.Image]:
    """The demo's photographs, which scikit-image brings along."""
    import skimage

    data = Path(skimage.__file__).parent / "data"
    files = [next(p for p in data.glob(f"{name}.*") if p.suffix in (".png", ".jpg")) for name in PHOTOS]
    return [Image.open(file).convert("RGB") for file in files]


def write_photos(folder: Path, images: int) -> str:
    """Tars of up to 100 photos, one per core at least; returns their pattern. The same bytes every time."""
    sources = _sources()
    folder.mkdir(parents=True)
    each = min(100, -(-images // CORES))
    for first in range(0, images, each):
        with tarfile.open(folder / f"photos-{first // each:06d}.tar", "w") as tar:
            for i in range(first, min(first + each, images)):
                jpeg = _photo(sources[i % len(sources)], np.random.default_rng(i))
                info = tarfile.TarInfo(f"{i:08d}.jpg")
                info.size = len(jpeg)
                tar.addfile(info, io.BytesIO(jpeg))
    return str(folder / "*.tar")


def write_masks(folder: Path, images: int) -> str:
    """Photos with masks of rectangles of 20 classes, in VOC's layout, all for training and the first to judge."""
    sources, root = _sources(), folder / "VOCdevkit/VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    for i in range(images):
        rng = np.random.default_rng(i)
        jpeg = _photo(sources[i % len(sources)], rng)
        width, height = Image.open(io.BytesIO(jpeg)).size
        labels = np.zeros((height, width), np.uint8)
        for _ in range(3):
            x, y = rng.integers(0, width // 2), rng.integers(0, height // 2)
            labels[y : y + height // 3, x : x + width // 3] = rng.integers(1, 21)
        (root / f"JPEGImages/{i:06d}.jpg").write_bytes(jpeg)
        Image.fromarray(labels).save(root / f"SegmentationClass/{i:06d}.png")
    names = [f"{i:06d}\n" for i in range(images)]
    (root / "ImageSets/Segmentation/train.txt").write_text("".join(names))
    (root / "ImageSets/Segmentation/val.txt").write_text(names[0])
    return str(folder)


def _photo(source: Image.Image, rng: np.random.Generator) -> bytes:
    """A random half or more of each side, about 500 x 375 pixels."""
    part = rng.uniform(0.5, 1.0, 2) * source.size
    x, y = rng.uniform(0, 1, 2) * (source.size - part)
    size = (round(500 * rng.uniform(0.9, 1.1)), round(375 * rng.uniform(0.9, 1.1)))
    image = source.resize(size, Image.Resampling.BICUBIC, box=(x, y, x + part[0], y + part[1]))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


def tiny_jpeg() -> bytes:
    """Of one grey pixel."""
    jpeg = io.BytesIO()
    Image.new("L", (1, 1)).save(jpeg, "JPEG", optimize=True)
    return jpeg.getvalue()


def write_tiny_tars(folder: Path, samples: int, tars: int) -> str:
    """Tars of one-pixel JPEGs, written as whole arrays of tar blocks; returns their pattern."""
    jpeg, info = tiny_jpeg(), tarfile.TarInfo("000000000.jpg")
    info.size = len(jpeg)
    member = info.tobuf(tarfile.USTAR_FORMAT) + jpeg + bytes(-info.size % 512)
    zeros_sum = int(member[148:154], 8)
    folder.mkdir(parents=True)
    for t in range(tars):
        numbers = np.arange(samples * t // tars, samples * (t + 1) // tars)
        digits = numbers[:, None] // 10 ** np.arange(8, -1, -1) % 10
        blocks = np.tile(np.frombuffer(member, np.uint8), (len(numbers), 1))
        blocks[:, :9] += digits.astype(np.uint8)
        sums = zeros_sum + digits.sum(axis=1)
        blocks[:, 148:154] = ord("0") + sums[:, None] // 8 ** np.arange(5, -1, -1) % 8
        (folder / f"tiny-{t:06d}.tar").write_bytes(blocks.tobytes() + bytes(1024))
    return str(folder / "*.tar")
