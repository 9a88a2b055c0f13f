"""What each choice of speed or size costs in accuracy: encodings, autocast, reduced-scale JPEG decoding.

Everything is compared with float32 features of fully decoded images, on the images and the model that the user names.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from operators.image import decode
from pipelines.costs.clocks import Machine, NumbersFile
from pipelines.executors import InlineExecutor
from pipelines.extraction.config import ExtractConfig
from pipelines.extraction.prepare import Resolved, prepare, resolve
from pipelines.features.photos import geometry_of
from pipelines.results import table_lines
from storage.sample_images import read_images
from storage.shards import compress, encode_row

BATCH = 16


@dataclass(frozen=True, kw_only=True)
class PrecisionBenchmark:
    """What encodings, autocast and reduced-scale JPEG decoding cost in accuracy, against float32."""

    data: tuple[str, ...] = ("demo/photos-{000..001}.tar",)
    """As for jobs/extract.py; at most the first 1,024 images are used."""
    model: str = "vit_small_patch16_224.dino"
    """timm name."""
    weights: str = "pretrained"
    """As for jobs/extract.py. Random weights have none of the outlier channels that make int8 hard."""
    size: str | None = None
    """As for jobs/extract.py."""
    json: NumbersFile = ""


DEBUG = PrecisionBenchmark(model="test_vit.r160_in1k", weights="random", size="64")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What one choice costs: the difference from float32 features of the same images."""

    relative_l2: float
    mean_1_minus_cosine: float
    "over cells, as the worst one"
    worst_1_minus_cosine: float
    kind: str
    "encoding, precision or decode"
    name: str
    bytes_per_value: float | None = None
    "as stored; of encodings"


@dataclass(frozen=True, kw_only=True)
class PrecisionResult:
    """All choices."""

    rows: tuple[Choice, ...]


def measure_precision(config: PrecisionBenchmark, folder: Path) -> PrecisionResult:
    """Of the images and the model that are named, a row per choice."""
    run = ExtractConfig.of(
        data=config.data,
        out=str(folder / "feats.zarr"),
        model=config.model,
        weights=config.weights,
        size=config.size,
        precision="fp32",
        levels=("x1",),
        encoding="float32",
        executor="inline",
    )
    return PrecisionResult(rows=tuple(_rows(run)))


def _rows(config: ExtractConfig) -> Iterator[Choice]:
    resolved = resolve(config)
    prepared = prepare(resolved, InlineExecutor())
    rows = prepared.index.read(0, min(prepared.index.n_rows, 1024))
    blobs = [blob for blob in read_images(rows, prepared.urls, config.options) if blob]
    exact = _pixels(blobs, config, resolved)
    reference = np.concatenate(list(_features(resolved, exact)))
    for name in ("float32", "float16", "int8"):
        yield _encoded(reference, name)
    for precision in ("bf16", "fp16"):
        cast = resolve(config.changed(precision=precision))
        yield _compared("precision", precision, reference, np.concatenate(list(_features(cast, exact))))
    draft = _pixels(blobs, config, resolved, draft=True)
    yield _compared("decode", "jpeg_draft", reference, np.concatenate(list(_features(resolved, draft))))


def _pixels(blobs: list[bytes], config: ExtractConfig, resolved: Resolved, *, draft: bool = False) -> np.ndarray:
    geometry = geometry_of(resolved.bundle.spec)
    return np.stack([decode(blob, geometry, max_pixels=config.max_image_pixels, draft=draft).pixels for blob in blobs])


def _features(resolved: Resolved, pixels: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(pixels), BATCH):
        yield resolved.model(pixels[start : start + BATCH]).levels["x1"].numpy()


def _encoded(reference: np.ndarray, dtype: str) -> Choice:
    decoded, stored = np.empty_like(reference), 0
    for i, row in enumerate(reference):
        values, scale, _ = encode_row(row, dtype)
        stored += len(compress(values)) + (scale.nbytes if scale is not None else 0)
        decoded[i] = values.astype(np.float32) * (1 if scale is None else scale)
    return _compared("encoding", dtype, reference, decoded, bytes_per_value=stored / reference.size)


def _compared(kind: str, name: str, reference: np.ndarray, other: np.ndarray, bytes_per_value: float | None = None) -> Choice:
    a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (reference, other))
    cosine = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return Choice(
        kind=kind,
        name=name,
        bytes_per_value=bytes_per_value,
        relative_l2=float(np.linalg.norm(a - b) / np.linalg.norm(a)),
        mean_1_minus_cosine=float((1 - cosine).mean()),
        worst_1_minus_cosine=float((1 - cosine).max()),
    )


def precision_report(config: PrecisionBenchmark, result: PrecisionResult, _: Machine) -> Iterator[str]:
    """The numbers as Markdown, line by line."""
    yield f"## precision: {config.model}, weights {config.weights}"
    head = ["choice", "bytes a value", "relative L2", "1 - cosine, mean", "1 - cosine, worst cell"]
    rows = []
    for row in result.rows:
        numbers = (row.bytes_per_value, row.relative_l2, row.mean_1_minus_cosine, row.worst_1_minus_cosine)
        rows.append([f"{row.kind} {row.name}", *("" if number is None else f"{number:.2g}" for number in numbers)])
    yield from table_lines(head, rows)
