"""What extraction is held against: the loop a competent user would write, and each stage alone.

Written without the pipeline's own code where that is the point: webdataset, DataLoader, torchvision, timm, zarr-python.
"""

import io
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
import zarr
from numcodecs.zstd import Zstd
from PIL import Image
from timm.models import VisionTransformer
from torch import Tensor
from zarr.codecs import ZstdCodec

from operators.backbone import autocast, cast_matmul_weights, normalise
from operators.image import Geometry
from operators.packed import pack_linears
from pipelines.costs.process import CORES
from pipelines.features.photos import geometry_of
from pipelines.features.weights import WeightsChoice, load_model
from storage.spec import FeatureSpec
from storage.store import FeatureStore

Item = TypeVar("Item")
Made = TypeVar("Made")

STAGES = ("read", "decode", "forward", "upsample", "encode", "write")


@dataclass(frozen=True, kw_only=True)
class BaselineJob:
    """What the loop and the bare stages need to make the same features as a store."""

    spec: FeatureSpec
    store: str
    urls: tuple[str, ...]
    weights: str
    out: str
    batch: int
    stage_s: float

    def model(self) -> VisionTransformer:
        """The timm model, its position embedding brought to the input's size once."""
        model = load_model(self.spec.model, self.spec.input_size, WeightsChoice.parse(self.weights), None, None)
        vit = cast(VisionTransformer, model)
        if hasattr(vit, "set_input_size"):
            vit.set_input_size(img_size=self.spec.input_size)
        return vit


def _level_rows(tokens: Tensor, prefix: int, spec: FeatureSpec) -> dict[str, np.ndarray]:
    """Final tokens [B, T + h*w, C] to the rows of every level, as stored."""
    grid = tuple(side // spec.stride for side in spec.input_size)
    maps = tokens[:, prefix:].transpose(1, 2).unflatten(2, grid)
    out = {}
    for level in spec.levels:
        if level.grid is None:
            rows = tokens[:, 0] if level.method == "cls" else tokens[:, prefix:].mean(dim=1)
        elif level.method == "backbone":
            rows = maps.permute(0, 2, 3, 1)
        elif level.method == "average":
            rows = F.adaptive_avg_pool2d(maps.float(), level.grid).permute(0, 2, 3, 1)
        else:
            mode = {"nearest": "nearest-exact"}.get(level.method, level.method)
            rows = F.interpolate(maps.float(), size=level.grid, mode=mode).permute(0, 2, 3, 1)
        out[level.name] = rows.to(getattr(torch, level.dtype)).contiguous().numpy()
    return out


def _loop_data(job: BaselineJob) -> Iterable[tuple[list[str], Tensor]]:
    """Batches (keys, normalised images), decoded by a DataLoader worker per core."""
    import webdataset as wds
    from torchvision import transforms

    spec = job.spec
    transform = transforms.Compose(
        [
            transforms.Resize(spec.input_size[0], transforms.InterpolationMode(spec.interpolation)),
            transforms.CenterCrop(spec.input_size),
            transforms.ToTensor(),
            transforms.Normalize(spec.mean, spec.std),
        ]
    )
    dataset = wds.WebDataset(list(job.urls), shardshuffle=False).decode("pil").to_tuple("__key__", "jpg;jpeg;png;webp")
    dataset = dataset.map_tuple(str, transform).batched(job.batch)
    # The platform's default, as in a script; in this process it is `spawn`, which would import torch anew in every worker.
    start_method = multiprocessing.get_all_start_methods()[0]
    workers = min(CORES, len(job.urls))
    return wds.WebLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=start_method)


@dataclass(frozen=True, kw_only=True)
class LoopRun:
    """What the user's loop did; `first_batch` and `done` are readings of the monotonic clock."""

    first_batch: float
    "it is stored"
    done: float
    steady_images_per_s: float
    stage_ms: Mapping[str, float]
    "milliseconds per image in the main process"
    keys: Sequence[str]


def user_loop(job: BaselineJob) -> LoopRun:
    """WebDataset and DataLoader workers, timm under autocast with torch's default threads, whole shards to zarr-python."""
    loader, model, writer = _loop_data(job), job.model(), _LoopWriter(job)
    seconds = dict.fromkeys(("wait for data", "forward", "upsample", "write"), 0.0)
    keys: list[str] = []
    arrived, first_done = 0.0, 0.0
    with torch.inference_mode():
        clock = time.monotonic()
        for batch_keys, images in loader:
            t0 = time.monotonic()
            arrived = arrived or t0
            with autocast(torch.device("cpu"), job.spec.precision):
                tokens = model.forward_features(images)
            t1 = time.monotonic()
            rows = _level_rows(tokens, model.num_prefix_tokens, job.spec)
            t2 = time.monotonic()
            writer.add(rows)
            keys += batch_keys
            t3 = time.monotonic()
            for name, spent in zip(seconds, (t0 - clock, t1 - t0, t2 - t1, t3 - t2), strict=True):
                seconds[name] += spent
            clock, first_done = t3, first_done or t3
        writer.flush()
    done = time.monotonic()
    return LoopRun(
        first_batch=first_done,
        done=done,
        # Kinder to the loop than opening the window at the end of its first batch: the first images' decoding is left out.
        steady_images_per_s=len(keys) / (done - arrived),
        stage_ms={name: 1e3 * spent / len(keys) for name, spent in seconds.items()},
        keys=keys,
    )


class _LoopWriter:
    """Arrays as the pipeline's store has them, written by zarr-python a whole number of shards at a time."""

    def __init__(self, job: BaselineJob):
        layout = FeatureStore.open(job.store).layout
        self._block, self._done = layout.block_rows, 0
        group = zarr.create_group(job.out)
        self._arrays = {
            level.name: group.create_array(
                level.name,
                shape=(layout.n_rows, *level.row_shape),
                chunks=(1 if level.grid else self._block, *level.row_shape),
                shards=(layout.shard_rows(level), *level.row_shape) if level.grid else None,
                dtype=level.dtype,
                compressors=ZstdCodec(level=1, checksum=True),
                fill_value=np.nan,
            )
            for level in job.spec.levels
        }
        self._rows: dict[str, list[np.ndarray]] = {name: [] for name in self._arrays}

    def add(self, rows: Mapping[str, np.ndarray]) -> None:
        """Take the rows of a batch; write what fills whole shards."""
        for name, part in rows.items():
            self._rows[name].append(part)
        held = sum(len(part) for part in next(iter(self._rows.values())))
        self._write(held // self._block * self._block)

    def flush(self) -> None:
        """Write the rest."""
        self._write(sum(len(part) for part in next(iter(self._rows.values()))))

    def _write(self, count: int) -> None:
        for name, parts in self._rows.items():
            joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
            if count:
                self._arrays[name][self._done : self._done + count] = joined[:count]
            self._rows[name] = [joined[count:]]
        self._done += count


# --- (b, c) bare stages -----------------------------------------------------------------------------------------------


class _Bare:
    """The stages with the least code that does the work: each takes what the one before it gives, for one batch."""

    def __init__(self, job: BaselineJob, scratch: Path):
        self.spec, self.geometry, self.zstd = job.spec, geometry_of(job.spec), Zstd(level=1, checksum=True)
        self.model, self.scratch = job.model(), scratch
        cast_matmul_weights(self.model, job.spec.precision)
        pack_linears(self.model)
        self.files = [os.open(url.removeprefix("file://"), os.O_RDONLY) for url in job.urls]

    def read(self, rows: list[dict[str, int]]) -> list[bytes]:
        return [os.pread(self.files[row["source"]], row["size"], row["offset"]) for row in rows]

    def decode(self, blobs: list[bytes]) -> np.ndarray:
        return np.stack([_bare_decode(blob, self.geometry) for blob in blobs])

    def tensor(self, pixels: np.ndarray) -> Tensor:
        return normalise(torch.from_numpy(pixels), self.spec.mean, self.spec.std)

    def tokens(self, images: Tensor) -> Tensor:
        with autocast(torch.device("cpu"), self.spec.precision):
            return self.model.forward_features(images)

    def forward(self, pixels: np.ndarray) -> Tensor:
        return self.tokens(self.tensor(pixels))

    def upsample(self, tokens: Tensor) -> dict[str, np.ndarray]:
        return _level_rows(tokens, self.model.num_prefix_tokens, self.spec)

    def encode(self, levels: dict[str, np.ndarray]) -> list[bytes]:
        parts = [part for rows in levels.values() for part in (rows if rows.ndim > 2 else [rows])]
        return [self.zstd.encode(part) for part in parts]

    def write(self, chunks: list[bytes]) -> None:
        self.scratch.write_bytes(b"".join(chunks))


@dataclass(frozen=True, kw_only=True)
class BareTimes:
    """Milliseconds per image of each stage, alone, in one process of several that run it together."""

    batch: int
    stage_ms: Mapping[str, float]
    tokens_ms: float
    "of the model alone, a part of `forward`"
    tokens_all_threads_ms: float
    "in one process with a thread per core while the others wait; 0 in those"


@torch.inference_mode()
def bare_stages(job: BaselineJob, rank: int, barrier: Barrier) -> BareTimes:
    """The stages one after another, with one thread."""
    torch.set_num_threads(1)
    bare, store = _Bare(job, Path(job.out, f"{rank}.bin")), FeatureStore.open(job.store)
    n = store.layout.n_rows
    batch = max(1, min(job.batch, n // CORES))
    units = max(1, min(4, n // (CORES * batch)))
    first = rank * units * batch % n
    rows = store.index.read(first, first + units * batch).to_pylist()
    stage_ms: dict[str, float] = {}

    def ms(stage: Callable[[Item], object], items: Sequence[Item], wait: Callable[[], object] = barrier.wait) -> float:
        return _timed(stage, items, batch, job.stage_s, wait)

    def measured(stage: Callable[[Item], Made], items: Sequence[Item]) -> list[Made]:
        stage_ms[stage.__name__] = ms(stage, items)
        return [stage(item) for item in items]

    blobs = measured(bare.read, [rows[unit * batch : (unit + 1) * batch] for unit in range(units)])
    pixels = measured(bare.decode, blobs)
    images = [bare.tensor(each) for each in pixels]
    tokens_ms, all_threads_ms = ms(bare.tokens, images), 0.0
    levels = measured(bare.upsample, measured(bare.forward, pixels))
    measured(bare.write, measured(bare.encode, levels))
    barrier.wait()
    if rank == 0:
        torch.set_num_threads(CORES)
        all_threads_ms = ms(bare.tokens, images, lambda: None)
    return BareTimes(batch=batch, stage_ms=stage_ms, tokens_ms=tokens_ms, tokens_all_threads_ms=all_threads_ms)


def _timed(
    stage: Callable[[Item], object], items: Sequence[Item], batch: int, stage_s: float, wait: Callable[[], object]
) -> float:
    """Milliseconds per image of `stage` over `items`, again and again for `stage_s`, after one warm-up."""
    stage(items[0])
    wait()
    start, count = time.perf_counter(), 0
    # At most 2048 images: what the fast stages read and write then stays small beside the page cache.
    while not count or (time.perf_counter() - start < stage_s and count * batch < 2048):
        stage(items[count % len(items)])
        count += 1
    return 1e3 * (time.perf_counter() - start) / (count * batch)


def _bare_decode(blob: bytes, geometry: Geometry) -> np.ndarray:
    image = Image.open(io.BytesIO(blob)).convert("RGB")
    place = geometry.place(*image.size)
    (x, y), method = place.corner, Image.Resampling[geometry.interpolation.upper()]
    return np.asarray(image.resize(place.resized, method).crop((-x, -y, geometry.width - x, geometry.height - y)))
