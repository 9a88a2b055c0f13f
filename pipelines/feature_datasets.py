"""Stored features for training: PyTorch datasets (by row, or as a shuffled stream of whole shards) and a Ray Data read.

Rows that failed or aren't written are never given. The order of a stream is computed from numbers alone (`StreamOrder`), so
that an interrupted epoch goes on without reading again what was given. Ray is imported only by `read_rows`.
"""

import copy
import functools
import hashlib
import itertools
import logging
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from pipelines.stream_order import StreamOrder, block_ranges
from storage.errors import RayliftError
from storage.ledger import SCHEMA
from storage.paths import StorageOptions, UnknownName
from storage.store import FeatureStore, MissingRows, Selection

if TYPE_CHECKING:
    import ray.data

logger = logging.getLogger(__name__)

Sample: TypeAlias = dict[str, int | float | str | torch.Tensor | None]
"""A row: `row` int, `key` str, the columns asked for, and a tensor per level, [*row_shape], float16 or float32."""

Given: TypeAlias = Any
"""A sample, or what a `transform` makes of it."""

State: TypeAlias = dict[str, int | str]
"""How far an iteration is, and what it iterates over."""

Asked = TypeVar("Asked")
Made = TypeVar("Made")

LEDGER_COLUMNS = tuple(name for name in SCHEMA.names if name not in ("row", "key", "status", "stage", "error", "message"))
"""Columns that every store has, beside those that `--carry` took from the samples: sizes, pixel transform, origin."""


class StateMismatch(RayliftError, ValueError):
    """A stream's state belongs to a stream that gives other rows, or in another order."""


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Chosen rows of a store, and their labels. Positions (`at`, int64) count within `rows`."""

    store: FeatureStore
    "read through `reopened` only: what a fork inherits must hold no lock and no open file"
    levels: tuple[str, ...]
    rows: np.ndarray
    "int64 [n]"
    labels: pa.Table
    "[n]: `key` and the columns asked for"

    @classmethod
    def choose(
        cls,
        store: str | FeatureStore,
        levels: Sequence[str],
        columns: Sequence[str],
        rows: Selection | None,
        storage_options: StorageOptions | None,
    ) -> "_Rows":
        """Rows in the order asked, by default all that have features. Raises `MissingRows`, `UnknownName`."""
        store = FeatureStore.open(store, storage_options) if isinstance(store, str) else copy.copy(store)
        for level in levels:
            store.level(level)
        clash = set(columns) & {*levels, "row", "key"}
        if clash:
            raise ValueError(f"a sample has {sorted(clash)[0]!r} already; leave it out of the columns")
        chosen = _valid_rows(store, rows)
        for line in store.clipped_lines(levels):
            logger.warning("%s", line)
        return cls(store=copy.copy(store), levels=tuple(levels), rows=chosen, labels=_labels(store, chosen, tuple(columns)))

    def once(self) -> "_Rows":
        """The same in the order of the store. Raises `ValueError` where a row is there twice."""
        order = np.argsort(self.rows, kind="stable")
        rows = self.rows[order]
        twice = rows[1:][rows[1:] == rows[:-1]]
        if len(twice):
            raise ValueError(f"each row is given once, but row {twice[0]} was asked for more than once")
        return replace(self, rows=rows, labels=self.labels.take(order))

    def reopened(self) -> "_Rows":
        """The same, to be read from by one thread or process. Raises `StoreReplaced` where the rows aren't these any more."""
        store = copy.copy(self.store)
        store.require_unreplaced()
        return replace(self, store=store)

    def part(self, at: np.ndarray) -> "_Rows":
        """Some of them, in memory of their own."""
        return replace(self, rows=self.rows[at], labels=self.labels.take(at))

    def samples(self, at: np.ndarray) -> list[Sample]:
        """Rows at `at`, read at once; negative positions count from the end. Raises `IndexError`, `MissingRows`."""
        rows = self.rows[at]
        records = self.labels.take(at % len(self.rows)).to_pylist()
        samples: list[Sample] = [{"row": row, **record} for row, record in zip(rows.tolist(), records, strict=True)]
        for level in self.levels:
            for sample, values in zip(samples, self.store.read(rows, level), strict=True):
                # A view would keep all that was read in memory, and send it to other processes, for one row of it.
                sample[level] = torch.from_numpy(values.copy())
        return samples


def _valid_rows(store: FeatureStore, selection: Selection | None) -> np.ndarray:
    rows = store.rows(slice(None) if selection is None else selection)
    valid = store.valid(rows) if len(rows) else np.zeros(0, bool)
    if selection is not None and not valid.all():
        raise MissingRows(
            f"{store.folder.displayed}: {np.count_nonzero(~valid)} of the rows asked for failed or aren't written yet, the first "
            f"is row {rows[~valid][0]}. `FeatureStore.records` says why; leave `rows` out for all that have features"
        )
    if not valid.any():
        raise MissingRows(f"{store.folder.displayed}: nothing to read, {len(rows)} rows are chosen and none has features")
    return rows[valid]


def _labels(store: FeatureStore, rows: np.ndarray, columns: tuple[str, ...]) -> pa.Table:
    carried = [name for name in columns if name in store.index.carried]
    recorded = [name for name in columns if name not in carried]
    unknown = [name for name in recorded if name not in LEDGER_COLUMNS]
    if unknown:
        there = ", ".join([*store.index.carried, *LEDGER_COLUMNS])
        raise UnknownName(f"{store.folder.displayed} has no column {unknown[0]!r}; it has {there}")
    table = store.index.take(rows, ["key", *carried])
    if recorded:
        records = store.records(rows, recorded)
        for name in recorded:
            table = table.append_column(name, records[name])
    return table.select(["key", *columns]).combine_chunks()


class FeatureDataset(Dataset[Sample]):
    """Rows of a feature store by position: a map-style dataset.

    `rows` are given in the order asked; by default they are all rows that have features. `columns` are those that
    `--carry` took from the samples (strings), or of `LEDGER_COLUMNS`; a value that a sample lacks is None, which PyTorch's
    default collate refuses. They and the keys are kept in memory, as Arrow. `transform` is applied to each sample.

    Where the store's root says that it has values beyond float16's range, which are clamped, a warning is logged; the column
    `clipped` has their number in each row.

    Raises `NotAStore`, `MissingRows` for rows without features, `UnknownName` (a `KeyError`) for levels and columns that
    aren't there; and once a process begins to read, `StoreReplaced` where another store lies at the URL by then, whose rows the
    keys and columns aren't of. Safe in forked and spawned DataLoader workers. Reading many rows at random is what
    `FeatureStream` avoids.
    """

    def __init__(
        self,
        store: str | FeatureStore,
        levels: Sequence[str],
        *,
        columns: Sequence[str] = (),
        rows: Selection | None = None,
        storage_options: StorageOptions | None = None,
        transform: Callable[[Sample], Given] | None = None,
    ):
        self.transform = transform
        self._rows = _Rows.choose(store, levels, columns, rows, storage_options)
        self._opened: tuple[int, _Rows] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": None}

    def __len__(self) -> int:
        return len(self._rows.rows)

    def __getitem__(self, index: int) -> Given:
        """The sample at a position. Raises `IndexError`."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Given]:
        """Samples at several positions, with one concurrent read per level; what DataLoader calls for a batch."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), self._rows.reopened())
        samples = self._opened[1].samples(np.asarray(indices, np.int64))
        return samples if self.transform is None else [self.transform(sample) for sample in samples]


@dataclass(kw_only=True)
class _Progress:
    """How far an iteration is."""

    epoch: int
    given: int = 0


class FeatureStream(IterableDataset[Sample]):
    """Every chosen row once an epoch, shuffled, from shards that are read whole: an iterable dataset.

    Arguments and samples are those of `FeatureDataset`; a row can be chosen once only. Blocks come in an order drawn from
    (seed, epoch), their rows through a buffer: each row is drawn from `buffer_rows` or more. `shuffle=False` gives the order
    of the store. A process holds about `buffer_rows` and two blocks of rows (`store.layout.block_rows`): one that enters the
    buffer, and the next one, which a thread reads meanwhile.

    **Ranks and workers** share the rows (`StreamOrder`); counts differ by one at most. By default, rank and world size are
    those of torch.distributed when the stream is made, or 0 and 1. `even=True` leaves out the last few rows of the epoch's
    order, so that all ranks give equally many; DDP waits forever for a rank that gives fewer.

    **Epochs**: call `set_epoch` before each, as with DistributedSampler; the order is the same again otherwise. Persistent
    workers hear of it.

    **Speed**: without DataLoader workers, the threads with which torch stacks a batch compete with those that read; give it
    workers, or one torch thread.

    **Resuming**: `state_dict` is taken in the process that iterates. For DataLoader workers that's what torchdata's
    StatefulDataLoader does. A state that is loaded decides about the next iteration only, its epoch included.
    """

    def __init__(
        self,
        store: str | FeatureStore,
        levels: Sequence[str],
        *,
        shuffle: bool = True,
        seed: int = 0,
        buffer_rows: int = 1024,
        rank: int | None = None,
        world_size: int | None = None,
        even: bool = False,
        columns: Sequence[str] = (),
        rows: Selection | None = None,
        storage_options: StorageOptions | None = None,
        transform: Callable[[Sample], Given] | None = None,
    ):
        rank, world_size = _place(rank, world_size)
        if buffer_rows < 1 or seed < 0:
            raise ValueError(f"buffer_rows is 1 or more and seed 0 or more; got {buffer_rows} and {seed}")
        self.transform = transform
        self._rows = _Rows.choose(store, levels, columns, rows, storage_options).once()
        self._order = StreamOrder(
            shuffle=shuffle,
            seed=seed,
            buffer_rows=buffer_rows,
            block_rows=self._rows.store.layout.block_rows,
            even=even,
            rank=rank,
            world_size=world_size,
        )
        digest = hashlib.sha256(self._rows.rows.tobytes()).hexdigest()[:16]
        self._chosen = f"{len(self._rows.rows)} with digest {digest}"
        # Shared memory: persistent workers keep the dataset they were started with.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._progress = _Progress(epoch=0)
        self._loaded: State | None = None

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._epoch.share_memory_()  # plain pickle copies it

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration gives, unless a state was loaded."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (0 and up) that iterations give from now on; a loaded state of another one is dropped."""
        self._epoch.fill_(epoch)
        if self._loaded and self._loaded["epoch"] != epoch:
            self._loaded = None
        if self._progress.epoch != epoch:
            self._progress = _Progress(epoch=epoch)

    def __iter__(self) -> Iterator[Given]:
        # Not a generator itself: StatefulDataLoader may drop this iterator unused and ask for the next epoch's.
        state, self._loaded = self._loaded, None
        if state is None:
            self._progress = _Progress(epoch=self.epoch)
        else:
            self._check(state)  # again: it may have been loaded before workers were forked
            self._progress = _Progress(epoch=int(state["epoch"]), given=int(state["given"]))
        return self._give(self._here(), self._progress)

    def _give(self, order: StreamOrder, progress: _Progress) -> Iterator[Given]:
        rows = self._rows.reopened()
        parts = order.parts(rows.rows, progress.epoch)
        steps = order.steps(parts, progress.epoch)
        left = np.ones(len(rows.rows), bool)
        left[np.fromiter((at for _, at in itertools.islice(steps, progress.given)), np.int64)] = False
        reads = _ahead(
            lambda at: dict(zip(at.tolist(), rows.samples(at), strict=True)),
            (first + np.flatnonzero(left[first:last]) for first, last in parts),
        )
        buffer: dict[int, Sample] = {}
        taken = 0
        for entered, at in steps:
            for read in itertools.islice(reads, entered - taken):
                buffer.update(read)
            taken = entered
            sample = buffer.pop(at)
            progress.given += 1
            yield sample if self.transform is None else self.transform(sample)

    def _here(self) -> StreamOrder:
        """The order of this process: in a DataLoader worker, that worker's."""
        info = get_worker_info()
        return self._order if info is None else replace(self._order, worker=info.id, workers=info.num_workers)

    def state_dict(self) -> State:
        """How far the iteration started last is, and what it iterates over: plain numbers and strings."""
        if self._loaded is not None:
            return dict(self._loaded)
        return {**asdict(self._progress), **self._identity()}

    def load_state_dict(self, state: Mapping[str, int | str]) -> None:
        """Let the next iteration give the rows that were to come. Raises `StateMismatch` that says what differs."""
        self._check(state)
        self._loaded = dict(state)

    def _identity(self) -> State:
        return {**asdict(self._here()), "rows": self._chosen, "store": self._rows.store.root.fingerprint}

    def _check(self, state: Mapping[str, int | str]) -> None:
        wrong = [
            f"{name} {state.get(name)!r} in the state, {value!r} here"
            for name, value in self._identity().items()
            if state.get(name) != value
        ]
        if wrong:
            raise StateMismatch(f"the state is of another stream: {'; '.join(wrong)}. Make the stream as it was made then")


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ValueError(f"give both rank and world_size, or neither; got {rank} and {world_size}")
    if rank is None or world_size is None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size}: they count from 0")
    return rank, world_size


def _ahead(function: Callable[[Asked], Made], arguments: Iterable[Asked]) -> Iterator[Made]:
    """What `function` makes of each argument, in order, one call ahead of what was taken; or the error there was.

    A daemon thread for each call, so that there is nothing to stop: an iterator that is dropped leaves none behind.
    """
    calls = map(functools.partial(_start, function), arguments)
    call = next(calls, None)
    while call is not None:
        made = call.result()
        call = next(calls, None)
        yield made


def _start(function: Callable[[Asked], Made], argument: Asked) -> Future[Made]:
    future: Future[Made] = Future()
    threading.Thread(target=_fulfil, args=(future, function, argument), name="read-ahead", daemon=True).start()
    return future


def _fulfil(future: Future[Made], function: Callable[[Asked], Made], argument: Asked) -> None:
    try:
        future.set_result(function(argument))
    except BaseException as error:  # noqa: BLE001 - of any kind: who takes the result raises it, and would else wait for ever
        future.set_exception(error)


def read_rows(
    url: str,
    levels: Sequence[str],
    *,
    columns: Sequence[str] = (),
    rows: Selection | None = None,
    storage_options: StorageOptions | None = None,
    override_num_blocks: int | None = None,
) -> "ray.data.Dataset":
    """Stored rows as a Ray Dataset: `row`, `key`, the columns asked for, and a tensor column per level.

    Arguments and errors are those of `FeatureStream`. A read task covers whole blocks of the store and yields one Arrow
    table for each; workers need nothing but the URL and the options, which travel with the tasks.
    `iter_torch_batches` takes no strings: `select_columns` first.
    """
    import ray.data

    chosen = _Rows.choose(url, levels, columns, rows, storage_options).once()
    return ray.data.read_datasource(_datasource(chosen), override_num_blocks=override_num_blocks)


def _datasource(chosen: _Rows) -> "ray.data.Datasource":
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    features = sum(_row_bytes(chosen.store, level) for level in chosen.levels)
    row_bytes = features + chosen.labels.nbytes // len(chosen.rows)
    blocks = np.stack(block_ranges(chosen.rows, chosen.store.layout.block_rows), axis=1)

    class FeatureRows(Datasource):
        def estimate_inmemory_data_size(self) -> int:
            return len(chosen.rows) * row_bytes

        def get_read_tasks(
            self,
            parallelism: int,
            per_task_row_limit: int | None = None,
            data_context: object = None,  # noqa: ARG002 - Ray's interface
        ) -> list[ReadTask]:
            groups = np.array_split(blocks, min(parallelism, len(blocks)))
            return [self._task(group, per_task_row_limit) for group in groups]

        def _task(self, group: np.ndarray, per_task_row_limit: int | None) -> ReadTask:
            parts = [chosen.part(np.arange(first, last)) for first, last in group]
            n_rows = int(group[-1, 1] - group[0, 0])
            metadata = BlockMetadata(num_rows=n_rows, size_bytes=n_rows * row_bytes, input_files=None, exec_stats=None)
            return ReadTask(functools.partial(_tables, parts), metadata, per_task_row_limit=per_task_row_limit)

    return FeatureRows()  # type: ignore[no-untyped-call] # Ray's


def _row_bytes(store: FeatureStore, level: str) -> int:
    """Bytes of a row in memory, where int8 is float32."""
    stored = store.level(level)
    return math.prod(stored.row_shape) * (2 if stored.dtype == "float16" else 4)


def _tables(parts: Sequence[_Rows]) -> Iterator[pa.Table]:
    """One Arrow table per part; runs in Ray's workers."""
    from ray.data.extensions import ArrowTensorArray

    parts[0].store.require_unreplaced()
    for part in parts:
        table = part.labels.add_column(0, "row", pa.array(part.rows))
        for level in part.levels:
            table = table.append_column(level, ArrowTensorArray.from_numpy(part.store.read(part.rows, level)))
        yield table
