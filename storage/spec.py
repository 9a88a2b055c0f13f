"""What is stored and what made it: `FeatureSpec`, `Level`, `Layout`, and the fingerprint over them.

Two stores of one fingerprint hold the same features of the same samples in the same place; a store is never continued
under another one. Everything here is plain data with a JSON round trip.
"""

import enum
import hashlib
import json
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Annotated, Literal, TypeVar, get_args, get_type_hints, overload

from storage.differences import Differences, differences
from storage.documents import JsonObject, JsonValue, decode
from storage.paths import StorageError

Dtype = Literal["float16", "float32", "int8"]

Compression = Literal["zstd", "none"]
"""Of chunks: zstd level 1 with checksum, or the bytes as they are and their crc32c."""

Encoding = Literal["float16", "float32", "int8", "float16-raw", "float32-raw", "int8-raw"]
"""How a level's numbers are stored: their type, `-raw` where they aren't compressed."""

MAX_SHARD_BYTES = 96 * 2**20
"""Raw bytes of one Zarr shard: one PUT on S3 (s3fs goes multipart at 100 MB), at most twice that in memory."""

MAX_BLOCK_BYTES = 256 * 2**20
"""Raw bytes of one task over all levels, of which a worker holds several: they overlap in it."""

FEWEST_ROWS = 16
"""Of a task, where rows aren't large: however small the input."""

MANY_TASKS = 2**17
"""Tasks above which they become larger, where memory allows it: 20 minutes of a driver that hands out 120 a second. Up to 33
million rows, blocks are of 256."""

MAX_ROW_BYTES = 0x7E000000
"""Raw bytes of one row of one level, which are one chunk: more than this (2.1 GB) zstd's encoder here doesn't take."""

MAX_BLOCK_ROWS = 2**20
"""Rows of one task at most, and of one Parquet part of the index and the ledger, so that no task spans two parts."""

MAX_ROWS = 2**40

SIDE_GROUPS = ("index", "ledger", "runs", "views")
"""Folders beside the levels."""

_TAKEN = (*SIDE_GROUPS, "search", "zarr.json", "readme.md", "row", "key")
"""What no level can be called: what lies beside them, and what samples of a data set have beside their maps."""

_SCALE = re.compile(r"x\d{1,9}(\.\d+)?|\d{1,9}x\d{1,9}|pooled")


def spaced(
    edge: tuple[float, float], extent: tuple[float, float], grid: tuple[int, int]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """`start` and `step` of a level whose cells part an area of the model's input into `grid`: (y, x), in pixels; `edge` is the
    area's upper left corner."""
    (edge_y, edge_x), (step_y, step_x) = edge, (extent[0] / grid[0], extent[1] / grid[1])
    return (edge_y + step_y / 2, edge_x + step_x / 2), (step_y, step_x)


def is_scale(text: str) -> bool:
    """Whether a level may be asked for so without a name of its own: x2, 112x112, pooled."""
    return bool(_SCALE.fullmatch(text))


def encoding_of(dtype: Dtype, compression: Compression) -> str:
    """As `Encoding` names it."""
    return f"{dtype}-raw" if compression == "none" else dtype


class InvalidSpec(StorageError, ValueError):
    """A spec, level or layout that no store can have."""


class FingerprintMismatch(StorageError):
    """The store was made by another spec; the message lists the fields that differ."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """One resolution of the features.

    `grid` is (rows, columns) of cells, None for the pooled vector. `start` and `step` place cell centres in pixels of the
    model's input: centre of cell i is `start + i * step`, per axis (y, x).
    """

    name: str
    "its scale (x2, 112x112, pooled), or a name of its own"
    method: str
    "`backbone`, an upsampler's name, or `cls` / `mean` for the pooled vector"
    grid: tuple[int, int] | None
    channels: int
    dtype: Dtype = "float16"
    start: tuple[float, float] | None = None
    step: tuple[float, float] | None = None
    digest: str = ""
    "sha256 of the upsampler's weights; empty for parameter-free methods"
    compression: Compression = "zstd"
    scale: str = ""
    "as it was asked for, where the name is another one"
    made_from: str = ""
    "the stored level of whose rounded numbers it was made; empty: of the backbone's map as it was computed"

    def __post_init__(self) -> None:
        require_level_name(self.name, self.scale)
        if self.dtype not in get_args(Dtype):
            raise InvalidSpec(f"level {self.name}: stored as {self.dtype!r}, which isn't one of {get_args(Dtype)}")
        if any(size < 1 for size in self.row_shape) or self.row_bytes > MAX_ROW_BYTES:
            raise InvalidSpec(f"level {self.name}: rows of shape {self.row_shape} can't be stored")
        placed = [each for each in (self.start, self.step) if each is not None]
        if any(len(each) != 2 or not all(map(math.isfinite, each)) for each in placed):
            raise InvalidSpec(f"level {self.name}: start {self.start} and step {self.step} must be two numbers each")
        if self.compression not in get_args(Compression):
            raise InvalidSpec(
                f"level {self.name}: compressed by {self.compression!r}, which isn't one of {get_args(Compression)}"
            )
        axes = 0 if self.grid is None else len(self.grid)
        if axes != len(placed) or any(size <= 0 for size in self.step or ()):
            raise InvalidSpec(
                f"level {self.name}: a grid of two axes has a start and a step above 0 for each, a vector has none; got "
                f"{self.grid}, {self.start} and {self.step}"
            )

    def to_json(self) -> dict[str, JsonValue]:
        """What it says, but for what stores didn't say from the beginning and what is as it was then."""
        said = json.loads(json.dumps(asdict(self)))
        if self.compression == "zstd":
            del said["compression"]
        for name in ("scale", "made_from"):
            if not said[name]:
                del said[name]
        return said

    @property
    def asked(self) -> str:
        """How one asks for its place: the scale, behind the name where that is another one."""
        return f"{self.name}:{self.scale}" if self.scale else self.name

    @property
    def cells(self) -> int:
        """Of a row's map; a vector is one."""
        return math.prod(self.grid or (1,))

    @property
    def is_relative(self) -> bool:
        """Whether its grid is the backbone's times a factor, whatever that one's is."""
        return (self.scale or self.name).startswith("x")

    @property
    def encoding(self) -> str:
        """As `Encoding` names it."""
        return encoding_of(self.dtype, self.compression)

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (*self.grid, self.channels) if self.grid else (self.channels,)

    @property
    def row_bytes(self) -> int:
        """Raw bytes of one row as stored, scales of int8 included."""
        width = {"float16": 2, "float32": 4, "int8": 1}[self.dtype]
        return math.prod(self.row_shape) * width + (4 * self.channels if self.dtype == "int8" else 0)


def require_level_name(name: str, scale: str = "") -> None:
    """Raise `InvalidSpec` where no level can be called so; `scale`: as it is asked for, where the name is another one."""
    # Its name is a folder's: one that leads elsewhere would be written there. Some disks take capitals for small letters.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", name) or name.casefold() in _TAKEN:
        raise InvalidSpec(
            f"a level can't be called {name!r}: letters, digits and . _ + - are allowed, {', '.join(_TAKEN)} are taken"
        )
    if scale and not is_scale(scale):
        raise InvalidSpec(f"level {name}: {scale!r} is no scale; there are x2 and other factors, 112x112 and pooled")
    if scale and is_scale(name.casefold()):
        raise InvalidSpec(f"a level of scale {scale} can't be called {name!r}, which is another scale; give it another name")


class Use(enum.Enum):
    """What a field of `FeatureSpec` is to those who use features. A store holds those of exactly one spec: there, all count."""

    LEARNED = "who learned from features, an upsampler or a readout, makes sense with the same only (LiFT's Table 7)"
    LEARNED_LATER = "as LEARNED; the first checkpoints don't say it"
    PLACED = "how images become the input, which an evaluation's protocol decides"
    NUMBERS = "changes the numbers, not what they mean"


T = TypeVar("T")
Learned = Annotated[T, Use.LEARNED]
LearnedLater = Annotated[T, Use.LEARNED_LATER]
Placed = Annotated[T, Use.PLACED]
Numbers = Annotated[T, Use.NUMBERS]


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """All that changes the numbers."""

    model: Learned[str]
    "timm name, tag included"
    weights: Learned[str]
    "sha256 of the weights that were loaded"
    weights_source: Numbers[Literal["pretrained", "file", "random"]]
    layers: Learned[tuple[int, ...]]
    "0-based blocks (stages for hierarchical models); their maps are concatenated along the channels, in this order"
    facet: Learned[Literal["token", "key", "query", "value"]]
    "`token`: the block's output. Others: that projection of the block's attention, channels head-major, before any norm or RoPE"
    norm: Learned[bool]
    "the backbone's final norm is applied to `token` maps"
    stride: LearnedLater[int]
    "input pixels from one cell to the next"
    pos_embed: LearnedLater[Literal["timm", "dino"]]
    "how absolute position embeddings are brought to another grid"
    input_size: Placed[tuple[int, int]]
    "(height, width) of the model's input in pixels"
    geometry: Placed[Literal["crop", "squash", "pad", "corner"]]
    crop_pct: Placed[float]
    interpolation: Numbers[str]
    mean: LearnedLater[tuple[float, float, float]]
    std: LearnedLater[tuple[float, float, float]]
    precision: Numbers[Literal["bf16", "fp16", "fp32"]]
    jpeg_draft: Placed[bool]
    levels: Numbers[tuple[Level, ...]]
    model_args: LearnedLater[JsonObject] = field(default_factory=dict, hash=False)
    "timm's arguments where the network isn't built as its name alone says"
    compiled: Numbers[bool] = False
    "its blocks are compiled, which rounds otherwise: in half precision fewer values, in float32 in another order"
    jpeg_decoder: Numbers[Literal["cpu", "nvjpeg"]] = "cpu"
    "`nvjpeg`: JPEGs of the usual kinds are decoded and resized on the GPU, which gives slightly other pixels"

    def __post_init__(self) -> None:
        names = [level.name for level in self.levels]
        if len({name.casefold() for name in names}) != len(names):
            raise InvalidSpec(f"levels must have different names, in small letters, too; got {' '.join(names)}")
        if len(self.input_size) != 2 or any(size < 1 for size in self.input_size):
            raise InvalidSpec(f"the model's input can't be of {self.input_size} pixels")

    def to_json(self) -> dict[str, JsonValue]:
        """As a store's attributes hold it: lists where there are tuples, the fields in this order."""
        data = json.loads(json.dumps({**asdict(self), "levels": [level.to_json() for level in self.levels]}))
        # What has a default came later: stores from before it keep their fingerprint.
        defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(self)}
        return {name: value for name, value in data.items() if value != defaults[name]}

    @classmethod
    def from_json(cls, data: JsonObject) -> "FeatureSpec":
        """Raises `ValueError` for what `to_json` can't have given."""
        return decode(cls, data, "spec")

    @classmethod
    def names(cls, *uses: Use) -> tuple[str, ...]:
        """The fields with one of these uses."""
        hints = get_type_hints(cls, include_extras=True)
        return tuple(f.name for f in fields(cls) if get_args(hints[f.name])[1] in uses)

    def learned(self) -> dict[str, JsonValue]:
        """What a network that learned from such features must be given again, as its checkpoint says it."""
        data = {"model_args": {}, **self.to_json()}
        return {name: data[name] for name in self.names(Use.LEARNED, Use.LEARNED_LATER)}

    def numbers(self, levels: Collection[str]) -> dict[str, JsonValue]:
        """All that makes the numbers of some of its levels, what only rounds them included, as JSON values."""
        some = (replace(level, compression="zstd") for level in self.levels if level.name in levels)
        said = replace(self, levels=tuple(some)).to_json()
        return {name: value for name, value in said.items() if name != "weights_source"}

    def differences(self, other: "FeatureSpec", names: Collection[str] | None = None) -> Differences:
        """Fields, all or some, in which `other` isn't as this one."""
        there, here = (
            {name: value for name, value in each.to_json().items() if names is None or name in names} for each in (self, other)
        )
        return differences(there, here)

    @property
    def row_bytes(self) -> int:
        """Raw bytes of one row over all levels."""
        return sum(level.row_bytes for level in self.levels)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which rows there are and how they are cut into blocks. One block = one task = whole shards of every level."""

    n_rows: int
    block_rows: int
    "a power of two"
    index: str
    "sha256 of the sample index"

    def __post_init__(self) -> None:
        if not 1 <= self.n_rows <= MAX_ROWS:
            raise InvalidSpec(f"a store can't have {self.n_rows} rows")
        if not 1 <= self.block_rows <= MAX_BLOCK_ROWS or self.block_rows & (self.block_rows - 1):
            raise InvalidSpec(f"{self.block_rows} rows a task: must be a power of two, at most {MAX_BLOCK_ROWS}")

    @property
    def n_blocks(self) -> int:
        return -(-self.n_rows // self.block_rows)

    def tasks(self, blocks: Sequence[int] | None = None) -> "Tasks":
        """Those of some blocks, or of all."""
        return Tasks(self, range(self.n_blocks) if blocks is None else blocks)

    def task(self, block: int) -> "ShardTask":
        first = block * self.block_rows
        return ShardTask(block=block, first=first, last=min(first + self.block_rows, self.n_rows))

    def shard_rows(self, level: Level) -> int:
        """Rows of one shard of `level`: the largest power of two within a block whose raw bytes fit MAX_SHARD_BYTES."""
        fit = max(1, MAX_SHARD_BYTES // level.row_bytes)
        # Powers of two divide the block, whose size is one, so that every task's shards are whole.
        return min(self.block_rows, 2 ** int(math.log2(fit)))

    def shard_names(self, level: Level, block: int) -> list[str]:
        """Names of a task's objects of `level`, below the store, in the order of their rows; scales of int8 come last."""
        if level.grid is None:
            names = [f"{level.name}/features/c/{block}/0"]
        else:
            each, task = self.shard_rows(level), self.task(block)
            shards = range(task.first // each, -(-task.last // each))
            names = [f"{level.name}/features/c/{shard}/0/0/0" for shard in shards]
        return [*names, f"{level.name}/scale/c/{block}/0"] if level.dtype == "int8" else names


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """The unit of work: rows `first` to `last` (exclusive) of the index, which are whole shards of every level."""

    block: int
    first: int
    last: int

    @property
    def n_rows(self) -> int:
        return self.last - self.first


class Tasks(Sequence[ShardTask]):
    """Tasks that are made when they are asked for: a list of those of 10^8 rows would be most of a driver's memory."""

    def __init__(self, layout: Layout, blocks: Sequence[int]):
        self.layout, self.blocks = layout, blocks

    def __len__(self) -> int:
        return len(self.blocks)

    @overload
    def __getitem__(self, index: int) -> ShardTask: ...
    @overload
    def __getitem__(self, index: slice) -> "Tasks": ...
    def __getitem__(self, index: int | slice) -> "ShardTask | Tasks":
        if isinstance(index, slice):
            return Tasks(self.layout, self.blocks[index])
        return self.layout.task(self.blocks[index])


def choose_block_rows(n_rows: int, spec: FeatureSpec) -> int:
    """Rows per task: 256, fewer for small inputs (so that workers share them evenly) and for large rows (memory), more where one
    driver would have more than `MANY_TASKS` to hand out.

    Depends on the data alone, never on the machine: a run may continue on a cluster of any size.
    """
    by_count = max(FEWEST_ROWS, 2 ** math.floor(math.log2(max(1, n_rows / 64))))
    by_bytes = 2 ** math.floor(math.log2(max(1, MAX_BLOCK_BYTES / spec.row_bytes)))
    # Decoded images take memory as features do; up to 256 of any size were always taken together.
    by_pixels = 2 ** math.floor(math.log2(max(256, MAX_BLOCK_BYTES / (3 * math.prod(spec.input_size)))))
    by_tasks = 2 ** math.ceil(math.log2(max(1, n_rows / MANY_TASKS)))
    return max(1, min(max(256, min(by_tasks, by_pixels)), by_count, by_bytes))


def fingerprint(spec: FeatureSpec, layout: Layout) -> str:
    """sha256 of everything that decides the bytes of a store."""
    return fingerprint_of(spec.to_json(), asdict(layout))


def fingerprint_of(spec: JsonObject, layout: JsonObject) -> str:
    """`fingerprint` of a spec and a layout as a store's attributes hold them."""
    data = {"spec": spec, "layout": layout}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
