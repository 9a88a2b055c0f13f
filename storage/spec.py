"""What is stored and what made it: `FeatureSpec`, `Level`, `Layout`, and the fingerprint over them.

Two stores of one fingerprint hold the same features of the same samples in the same place; a store is never continued
under another one. Everything here is plain data with a JSON round trip.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from storage.paths import StorageError

Dtype = Literal["float16", "float32", "int8"]

MAX_SHARD_BYTES = 96 * 2**20
"""Raw bytes of one Zarr shard: one PUT on S3 (s3fs goes multipart at 100 MB), at most twice that in memory."""

MAX_BLOCK_BYTES = 256 * 2**20
"""Raw bytes of one task over all levels: what a worker may hold twice, since two tasks overlap in it."""


class FingerprintMismatch(StorageError):
    """The store was made by another spec; the message lists the fields that differ."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """One resolution of the features.

    `grid` is (rows, columns) of cells, None for the pooled vector. `start` and `step` place cell centres in pixels of the
    model's input: centre of cell i is `start + i * step`, per axis (y, x).
    """

    name: str
    method: str
    "`backbone`, an upsampler's name, or `cls` / `mean` for the pooled vector"
    grid: tuple[int, int] | None
    channels: int
    dtype: Dtype = "float16"
    start: tuple[float, float] | None = None
    step: tuple[float, float] | None = None
    digest: str = ""
    "sha256 of the upsampler's weights; empty for parameter-free methods"

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (*self.grid, self.channels) if self.grid else (self.channels,)

    @property
    def row_bytes(self) -> int:
        """Raw bytes of one row as stored, scales of int8 included."""
        width = {"float16": 2, "float32": 4, "int8": 1}[self.dtype]
        return math.prod(self.row_shape) * width + (4 * self.channels if self.dtype == "int8" else 0)


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """All that changes the numbers."""

    model: str
    "timm name, tag included"
    weights: str
    "sha256 of the weights that were loaded"
    weights_source: Literal["pretrained", "file", "random"]
    layers: tuple[int, ...]
    "0-based blocks (stages for hierarchical models); their maps are concatenated along the channels, in this order"
    facet: Literal["token", "key", "query", "value"]
    "`token`: the block's output. Others: that projection of the block's attention, channels head-major, before any norm or RoPE"
    norm: bool
    "the backbone's final norm is applied to `token` maps"
    stride: int
    "input pixels from one cell to the next"
    pos_embed: Literal["timm", "dino"]
    "how absolute position embeddings are brought to another grid"
    input_size: tuple[int, int]
    "(height, width) of the model's input in pixels"
    geometry: Literal["crop", "squash", "pad"]
    crop_pct: float
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    precision: Literal["bf16", "fp16", "fp32"]
    jpeg_draft: bool
    levels: tuple[Level, ...]
    model_args: Mapping[str, Any] = field(default_factory=dict, hash=False)
    "timm's arguments, JSON values, where the network isn't built as its name alone says"

    def to_json(self) -> dict[str, Any]:
        data = json.loads(json.dumps(asdict(self)))
        if not self.model_args:  # stores from before there were any keep their fingerprint
            del data["model_args"]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "FeatureSpec":
        levels = tuple(Level(**{name: _tuples(value) for name, value in level.items()}) for level in data["levels"])
        return cls(**{**{name: _tuples(value) for name, value in data.items()}, "levels": levels})

    @property
    def row_bytes(self) -> int:
        """Raw bytes of one row over all levels."""
        return sum(level.row_bytes for level in self.levels)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which rows there are and how they are cut into blocks. One block = one task = whole shards of every level."""

    n_rows: int
    block_rows: int
    "a power of two"
    index: str
    "sha256 of the sample index"

    @property
    def n_blocks(self) -> int:
        return -(-self.n_rows // self.block_rows)

    def tasks(self) -> list["ShardTask"]:
        return [self.task(block) for block in range(self.n_blocks)]

    def task(self, block: int) -> "ShardTask":
        first = block * self.block_rows
        return ShardTask(block=block, first=first, last=min(first + self.block_rows, self.n_rows))

    def shard_rows(self, level: Level) -> int:
        """Rows of one shard of `level`: the largest power of two within a block whose raw bytes fit MAX_SHARD_BYTES."""
        fit = max(1, MAX_SHARD_BYTES // level.row_bytes)
        return min(self.block_rows, 2 ** int(math.log2(fit)))


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """The unit of work: rows `first` to `last` (exclusive) of the index, which are whole shards of every level."""

    block: int
    first: int
    last: int

    @property
    def n_rows(self) -> int:
        return self.last - self.first


def choose_block_rows(n_rows: int, spec: FeatureSpec) -> int:
    """Rows per task: 256, fewer for small inputs (so that workers share them evenly) and for large rows (memory).

    Depends on the data alone, never on the machine: a run may continue on a cluster of any size.
    """
    by_count = 2 ** max(4, math.floor(math.log2(max(1, n_rows / 64))))
    by_bytes = 2 ** math.floor(math.log2(max(1, MAX_BLOCK_BYTES / spec.row_bytes)))
    return max(1, min(256, by_count, by_bytes))


def fingerprint(spec: FeatureSpec, layout: Layout) -> str:
    """sha256 of everything that decides the bytes of a store."""
    data = {"spec": spec.to_json(), "layout": asdict(layout)}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def differences(store: FeatureSpec, store_layout: Layout, run: FeatureSpec, run_layout: Layout) -> list[str]:
    """One line per field in which the store and the run differ."""
    lines = []
    for old, new in ((store, run), (store_layout, run_layout)):
        for f in fields(old):
            a, b = getattr(old, f.name), getattr(new, f.name)
            if f.name == "levels":
                lines += _level_differences(a, b)
            elif a != b:
                lines.append(f"  {f.name:<15} store {_short(a)}   run {_short(b)}")
    return lines


def _level_differences(store: tuple[Level, ...], run: tuple[Level, ...]) -> list[str]:
    old, new = {level.name: level for level in store}, {level.name: level for level in run}
    if list(old) != list(new):
        return [f"  {'levels':<15} store {' '.join(old)}   run {' '.join(new)}"]
    lines = []
    for name in old:
        for f in fields(Level):
            a, b = getattr(old[name], f.name), getattr(new[name], f.name)
            if a != b:
                lines.append(f"  {name + '.' + f.name:<15} store {_short(a)}   run {_short(b)}")
    return lines


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text
