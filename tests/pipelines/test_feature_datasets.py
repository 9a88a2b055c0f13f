"""Stored features as PyTorch datasets and a Ray Dataset: every valid row once, the stored numbers, and exact resuming."""

import json
import pickle
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import s3fs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from pipelines.executors import InlineExecutor
from pipelines.extraction.config import ExtractConfig
from pipelines.extraction.run import extract
from pipelines.feature_datasets import FeatureDataset, FeatureStream, StateMismatch, StreamOrder, _Rows, _tables, read_rows
from storage.paths import Folder, StorageError
from storage.root import StoreReplaced
from storage.store import FeatureStore, MissingRows
from tests.conftest import jpeg, write_tar

# torchdata 0.11 with torch 2.15, each time a StatefulDataLoader is made.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")

ROWS, BLOCK, FAILED = 45, 4, 10
VALID = [row for row in range(45) if row != 10]
LEVELS = ["x1", "x2", "x0.5", "pooled"]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FeatureStore:
    """45 rows in 12 blocks, of which row 10 failed; `x0.5` is int8."""
    folder = tmp_path_factory.mktemp("datasets")
    members = []
    for n in range(ROWS):
        members += [(f"{n:05d}.jpg", b"junk" if n == FAILED else jpeg(n)), (f"{n:05d}.cls", str(n % 7).encode())]
    config = ExtractConfig.of(
        data=(str(write_tar(folder / "a.tar", members)),),
        out=str(folder / "out.zarr"),
        model="test_vit.r160_in1k",
        weights="random",
        size="64",
        levels=("x1", "x2", "x0.5@int8", "pooled"),
        precision="fp32",
        executor="inline",
        block_rows=BLOCK,
        carry=("cls",),
        max_failed_fraction=0.2,
    )
    assert extract(config, InlineExecutor()).failed == 1
    return FeatureStore.open(config.out)


@pytest.fixture
def own(store, tmp_path) -> Path:
    """A copy of the store that a test may damage."""
    return Path(shutil.copytree(store.folder.url, tmp_path / "own.zarr"))


@pytest.fixture
def on_s3(store, s3_options) -> tuple[str, dict[str, Any]]:
    """URL and options of a copy of the store on S3."""
    fs = s3fs.S3FileSystem(**s3_options["options"])
    fs.put(store.folder.url, f"{s3_options['bucket']}/out.zarr", recursive=True)
    return f"s3://{s3_options['bucket']}/out.zarr", s3_options["options"]


@pytest.fixture
def reads(monkeypatch) -> Counter[str]:
    """How often each object is asked for, in this process."""
    counts: Counter[str] = Counter()
    original = Folder.read_ranges

    def counted(self, ranges):
        counts.update(name for name, _, _ in ranges)
        return original(self, ranges)

    monkeypatch.setattr(Folder, "read_ranges", counted)
    return counts


def loader(dataset: Any, workers: int = 0, batch: int = 5, context: str = "fork", **options: Any) -> DataLoader:
    together = {"multiprocessing_context": context, "timeout": 120} if workers else {}
    return DataLoader(dataset, batch, num_workers=workers, **together, **options)


def rows_of(batches: Iterable[dict[str, Any]]) -> list[int]:
    return [row for batch in batches for row in batch["row"].tolist()]


def order_of(stream: FeatureStream) -> list[int]:
    return [sample["row"] for sample in stream]


def numbers(order: StreamOrder, rows: np.ndarray, epoch: int = 0) -> list[int]:
    """The rows that a consumer gives, by the order alone."""
    return [int(rows[at]) for _, at in order.steps(order.parts(rows, epoch), epoch)]


def consumers(order: StreamOrder, world: int, workers: int) -> Iterator[StreamOrder]:
    for rank in range(world):
        for worker in range(workers):
            yield replace(order, rank=rank, world_size=world, worker=worker, workers=workers)


def make_order(**changes: Any) -> StreamOrder:
    plain = {"block_rows": BLOCK, "shuffle": True, "seed": 0, "buffer_rows": 6, "even": False}
    return StreamOrder(**{**plain, "rank": 0, "world_size": 1, **changes})


# --- by row -----------------------------------------------------------------------------------------------------------


def test_dataset_gives_the_stored_numbers_of_the_rows_that_have_features(store):
    dataset = FeatureDataset(store.folder.url, LEVELS)

    samples = [dataset[i] for i in range(len(dataset))]

    assert [sample["row"] for sample in samples] == VALID
    assert [sample["key"] for sample in samples] == [f"{row:05d}" for row in VALID]
    for level in LEVELS:
        np.testing.assert_array_equal(np.stack([s[level].numpy() for s in samples]), store.read(VALID, level))


@pytest.mark.parametrize(
    ("level", "dtype", "shape"),
    [
        ("x1", torch.float16, (4, 4, 64)),
        ("x2", torch.float16, (8, 8, 64)),
        ("x0.5", torch.float32, (2, 2, 64)),
        ("pooled", torch.float16, (64,)),
    ],
)
def test_tensors_are_the_callers_own(store, level, dtype, shape):
    dataset = FeatureDataset(store, [level])
    sample, other = dataset.__getitems__([3, 4])

    sample[level].zero_()

    assert (sample[level].dtype, tuple(sample[level].shape)) == (dtype, shape)
    assert sample[level].untyped_storage().nbytes() == sample[level].nbytes
    assert other[level].any()
    assert dataset[3][level].any()


def test_batch_equals_its_rows_one_by_one_in_any_order(store):
    dataset = FeatureDataset(store, LEVELS, columns=["cls"])

    batch = dataset.__getitems__([40, 0, 9, 10, -1, 0])

    assert [sample["row"] for sample in batch] == [41, 0, 9, 11, 44, 0]
    for sample, index in zip(batch, [40, 0, 9, 10, -1, 0], strict=True):
        one = dataset[index]
        assert [one[name] for name in ("row", "key", "cls")] == [sample[name] for name in ("row", "key", "cls")]
        assert all(torch.equal(one[level], sample[level]) for level in LEVELS)


def test_batch_asks_for_each_shard_once(store, reads):
    FeatureDataset(store, ["x1"]).__getitems__([0, 1, 2, 3, 4, 5, 6, 7])

    assert reads == {"x1/features/c/0/0/0/0": 1, "x1/features/c/1/0/0/0": 1}


@pytest.mark.parametrize("index", [44, -45])
def test_position_beyond_the_end_is_an_index_error(store, index):
    with pytest.raises(IndexError):
        FeatureDataset(store, ["x1"])[index]


@pytest.mark.parametrize(
    ("rows", "given"),
    [([7, 3, 7], [7, 3, 7]), (["00012", "00002"], [12, 2]), (slice(40, None), [40, 41, 42, 43, 44]), (np.arange(ROWS) == 5, [5])],
)
def test_chosen_rows_come_in_the_order_asked(store, rows, given):
    dataset = FeatureDataset(store, ["pooled"], rows=rows)

    assert [dataset[i]["row"] for i in range(len(dataset))] == given


@pytest.mark.parametrize("kind", [FeatureDataset, FeatureStream, read_rows])
def test_choosing_a_failed_row_is_refused_before_anything_is_read(store, kind):
    with pytest.raises(MissingRows, match=r"1 of the rows asked for failed .* the first is row 10\."):
        kind(store.folder.url, ["x1"], rows=[9, 10, 11])


def test_rows_that_are_not_written_yet_are_left_out(own):
    unfinished = FeatureStore.open(str(own))
    unfinished.set_writing()
    unfinished.ledger.revoke([0, 11])

    assert order_of(FeatureStream(str(own), ["x1"], shuffle=False)) == VALID[4:-1]
    with pytest.raises(MissingRows, match=r"2 of the rows asked for .* aren't written yet, the first is row 0\."):
        FeatureDataset(str(own), ["x1"], rows=[5, 0, 10])


def test_choosing_no_row_is_refused(store):
    with pytest.raises(MissingRows, match="nothing to read, 0 rows are chosen"):
        FeatureDataset(store, ["x1"], rows=[])


def test_labels_and_ledger_columns_are_joined(store):
    dataset = FeatureDataset(store, ["pooled"], columns=["cls", "width", "height", "x_scale"], rows=[12, 44])

    first, last = dataset.__getitems__([0, 1])

    assert list(first) == ["row", "key", "cls", "width", "height", "x_scale", "pooled"]
    assert [first["cls"], last["cls"]] == ["5", "2"]
    assert [first["width"], first["height"]] == [96, 72]
    assert first["x_scale"] == store.records(12)["x_scale"][0].as_py()


def test_unknown_columns_and_levels_are_key_errors_with_those_there_are(store):
    with pytest.raises(KeyError, match=r"no column 'label'; it has cls, source, member, .*width, height"):
        FeatureDataset(store, ["x1"], columns=["cls", "label"])
    with pytest.raises(KeyError, match=r"no level 'x4'; it has x1, x2, x0\.5, pooled"):
        FeatureDataset(store, ["x4"])


def test_column_that_a_sample_has_anyway_is_refused(store):
    with pytest.raises(ValueError, match="has 'key' already"):
        FeatureDataset(store, ["x1"], columns=["key"])


def test_transform_is_applied_to_each_sample(store):
    dataset = FeatureDataset(store, ["pooled"], transform=lambda sample: sample["row"] * 2)
    stream = FeatureStream(store, ["pooled"], transform=lambda sample: sample["row"] * 2, shuffle=False, rows=[3, 4])

    assert (dataset[9], dataset.__getitems__([9, 10])) == (18, [18, 22])
    assert list(stream) == [6, 8]


@pytest.mark.parametrize(("workers", "context"), [(0, ""), (2, "fork"), (1, "spawn")])
def test_dataloader_gives_the_stored_numbers(store, workers, context):
    dataset = FeatureDataset(store, ["x1", "pooled"], columns=["cls"])
    dataset[0]

    batches = list(loader(dataset, workers, batch=16, context=context))

    assert rows_of(batches) == VALID
    assert [label for batch in batches for label in batch["cls"]] == [str(row % 7) for row in VALID]
    for level in ("x1", "pooled"):
        np.testing.assert_array_equal(torch.cat([b[level] for b in batches]).numpy(), store.read(VALID, level))


def test_shard_that_vanished_is_an_error_in_both_datasets(own):
    (own / "x1/features/c/3/0/0/0").unlink()

    with pytest.raises(MissingRows, match=r"row 13, '00013', though the ledger says ok"):
        FeatureDataset(str(own), ["x1"]).__getitems__([0, 12])
    with pytest.raises(MissingRows, match=r"row 12, '00012', though the ledger says ok"):
        list(FeatureStream(str(own), ["x1"]))


# --- the order of a stream --------------------------------------------------------------------------------------------


@pytest.fixture
def replaced(own, store, tmp_path) -> Callable[[], None]:
    """Puts a store of other photographs under the same keys in the place of `own`."""

    def replace_it() -> None:
        members = [(f"{n:05d}.jpg", jpeg(1000 + n)) for n in range(ROWS)]
        settings = {**store.root.config, "data": (str(write_tar(tmp_path / "b.tar", members)),), "out": str(own), "carry": ()}
        shutil.rmtree(own)
        extract(ExtractConfig.of(**settings, executor="inline"), InlineExecutor())

    return replace_it


@pytest.mark.parametrize("read", ["dataset", "stream", "second epoch", "ray"])
def test_rows_of_a_store_that_was_replaced_since_are_not_given_with_its_labels(own, replaced, read):
    """Keys and columns were read when the data set was made; of that place's rows by now they aren't."""
    dataset = {
        "dataset": lambda: FeatureDataset(str(own), ["x1"], columns=["cls"]),
        "ray": lambda: _Rows.choose(str(own), ["x1"], ["cls"], None, None),
    }.get(read, lambda: FeatureStream(str(own), ["x1"], columns=["cls"]))()
    if read == "second epoch":
        assert len(list(dataset)) == len(VALID)
    replaced()

    with pytest.raises(StoreReplaced, match=r"own\.zarr is another store now, .* since it was opened.* Open it again"):
        next(_tables([dataset]) if read == "ray" else iter(DataLoader(dataset, batch_size=None)))
    shutil.rmtree(own)
    with pytest.raises(StoreReplaced, match=r"own\.zarr is gone since it was opened"):
        next(_tables([dataset]) if read == "ray" else iter(DataLoader(dataset, batch_size=None)))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 50])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_consumers_give_every_row_once_and_equally_many(shuffle, world, workers):
    rows = np.array(VALID)

    shares = [numbers(order, rows) for order in consumers(make_order(shuffle=shuffle), world, workers)]

    assert sorted(row for share in shares for row in share) == VALID
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("world", "count"), [(1, 44), (2, 22), (3, 14), (5, 8), (50, 0)])
def test_even_gives_each_rank_the_same_count(world, count):
    shares = [numbers(order, np.array(VALID)) for order in consumers(make_order(even=True), world, 1)]

    assert {len(share) for share in shares} == {count}
    assert len({row for share in shares for row in share}) == world * count


@settings(max_examples=200, deadline=None)
@given(
    chosen=st.sets(st.integers(0, 80), min_size=1),
    block_rows=st.sampled_from([1, 2, 4, 16]),
    buffer_rows=st.integers(1, 40),
    world=st.integers(1, 4),
    workers=st.integers(1, 4),
    seed=st.integers(0, 2**70),
    shuffle=st.booleans(),
)
def test_any_order_gives_every_row_once_within_the_buffer(chosen, block_rows, buffer_rows, world, workers, seed, shuffle):
    rows = np.array(sorted(chosen))
    one = make_order(block_rows=block_rows, buffer_rows=buffer_rows, seed=seed, shuffle=shuffle)
    counts, readers = Counter(), Counter()
    for order in consumers(one, world, workers):
        parts = order.parts(rows, 3)
        readers.update(int(rows[first]) // block_rows for first, _ in parts)
        entered_rows = np.cumsum([last - first for first, last in parts])
        for n, (entered, at) in enumerate(order.steps(parts, 3)):
            counts[int(rows[at])] += 1
            assert any(first <= at < last for first, last in parts[:entered])
            assert entered_rows[entered - 1] - n <= buffer_rows - 1 + block_rows
    assert counts == dict.fromkeys(rows.tolist(), 1)
    assert sum(readers.values()) - len(readers) <= world * workers - 1


def test_order_is_shuffled_over_blocks_and_within_the_buffer():
    rows = np.arange(4000)

    order = np.array(numbers(make_order(block_rows=16, buffer_rows=200), rows))

    assert abs(np.corrcoef(order, rows)[0, 1]) < 0.1
    assert np.mean(order[1:] // 16 == order[:-1] // 16) < 0.15


def test_epochs_and_seeds_differ_and_equal_ones_are_equal(store):
    def order(epoch: int = 0, seed: int = 0) -> list[int]:
        stream = FeatureStream(store, ["pooled"], buffer_rows=6, seed=seed)
        stream.set_epoch(epoch)
        return order_of(stream)

    assert order() == order()
    assert sorted(order()) == sorted(order(epoch=1)) == sorted(order(seed=1)) == VALID
    assert len({tuple(order()), tuple(order(epoch=1)), tuple(order(seed=1))}) == 3


def test_stream_gives_the_rows_that_its_order_says(store):
    stream = FeatureStream(store, ["pooled"], buffer_rows=6, rank=1, world_size=3)

    assert order_of(stream) == numbers(make_order(rank=1, world_size=3), np.array(VALID))


# --- reading a stream -------------------------------------------------------------------------------------------------


def test_stream_without_shuffle_gives_the_stored_numbers_in_order(store):
    samples = list(FeatureStream(store, LEVELS, columns=["cls"], shuffle=False))

    assert [sample["row"] for sample in samples] == VALID
    assert [sample["cls"] for sample in samples] == [str(row % 7) for row in VALID]
    for level in LEVELS:
        np.testing.assert_array_equal(np.stack([s[level].numpy() for s in samples]), store.read(VALID, level))


def test_shuffled_samples_are_those_of_the_dataset(store):
    dataset = FeatureDataset(store, LEVELS, columns=["cls"], rows=slice(11, 30))

    samples = list(FeatureStream(store, LEVELS, columns=["cls"], rows=slice(11, 30), buffer_rows=6))

    assert sorted(sample["row"] for sample in samples) == list(range(11, 30))
    for sample in samples:
        one = dataset[sample["row"] - 11]
        assert list(one) == list(sample)
        assert [one["key"], one["cls"]] == [sample["key"], sample["cls"]]
        assert all(torch.equal(one[level], sample[level]) for level in LEVELS)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 5 worker processes:UserWarning")
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 5), (3, 2)])
def test_dataloaders_of_all_ranks_give_every_row_once(store, world, workers):
    given = []
    for rank in range(world):
        given += rows_of(loader(FeatureStream(store, ["pooled"], rank=rank, world_size=world), workers))

    assert sorted(given) == VALID


def test_each_shard_is_read_once_but_for_those_at_borders(store, reads):
    per_rank = []
    for rank in range(3):
        reads.clear()
        list(FeatureStream(store, ["x1"], buffer_rows=6, rows=slice(12, 44), rank=rank, world_size=3))
        per_rank.append(reads.copy())

    ranks = Counter(name for counts in per_rank for name in counts)
    assert set(ranks) == {f"x1/features/c/{block}/0/0/0" for block in range(3, 11)}
    assert sorted(ranks.values()) == [1, 1, 1, 1, 1, 1, 2, 2]
    assert {n for counts in per_rank for name, n in counts.items() if ranks[name] == 1} == {1}


def test_persistent_workers_hear_of_the_epoch(store):
    stream = FeatureStream(store, ["pooled"], buffer_rows=6)
    batches = loader(stream, workers=1, persistent_workers=True)
    first = rows_of(batches)

    stream.set_epoch(1)
    second = rows_of(batches)

    expected = [numbers(make_order(), np.array(VALID), epoch) for epoch in (0, 1)]
    assert [first, second] == expected


def test_row_chosen_twice_is_refused(store):
    with pytest.raises(ValueError, match="row 7 was asked for more than once"):
        FeatureStream(store, ["x1"], rows=[7, 3, 7])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": 1}, "both rank and world_size"),
        ({"rank": 2, "world_size": 2}, "rank 2 is not one of 2"),
        ({"buffer_rows": 0}, "buffer_rows is 1 or more"),
        ({"seed": -1}, "seed 0 or more"),
    ],
)
def test_impossible_settings_are_refused(store, wrong, message):
    with pytest.raises(ValueError, match=message):
        FeatureStream(store, ["x1"], **wrong)


def test_rank_and_world_size_are_those_of_torch_distributed(store, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)

    assert len(list(FeatureStream(store, ["pooled"]))) == 11
    assert FeatureStream(store, ["pooled"]).state_dict()["rank"] == 1


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def test_iterator_that_is_dropped_leaves_no_thread_and_reads_no_further(store, monkeypatch):
    release, asked = threading.Event(), []
    original = FeatureStore.read

    def slow(self, rows, level):
        asked.append(rows[0])
        assert len(asked) < 3 or release.wait(60)
        return original(self, rows, level)

    monkeypatch.setattr(FeatureStore, "read", slow)
    iterator = iter(FeatureStream(store, ["x1"], shuffle=False))
    for _ in range(5):
        next(iterator)
    assert len(reading_threads()) == 1

    del iterator
    release.set()

    deadline = time.monotonic() + 30
    while reading_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert reading_threads() == []
    assert asked == [0, 4, 8]


def test_error_while_reading_ahead_is_raised_where_the_rows_were_to_come(own):
    (own / "x1/features/c/2/0/0/0").write_bytes(b"damaged")
    given = []

    with pytest.raises(StorageError, match=r"x1/features/c/2/0/0/0 is damaged"):
        given += (sample["row"] for sample in FeatureStream(str(own), ["x1"], shuffle=False))

    assert given == [0, 1, 2, 3, 4, 5, 6, 7]


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("given", [0, 1, 7, 22, 43, 44])
def test_loaded_state_gives_exactly_the_rest(store, given, shuffle):
    def make() -> FeatureStream:
        return FeatureStream(store, ["x1", "pooled"], buffer_rows=6, shuffle=shuffle)

    stream = make()
    stream.set_epoch(2)
    everything = list(stream)
    iterator = iter(stream)
    for _ in range(given):
        next(iterator)
    state = json.loads(json.dumps(stream.state_dict()))

    resumed = make()
    resumed.load_state_dict(state)
    rest = list(resumed)

    assert resumed.state_dict() == {**state, "given": 44}
    assert [sample["row"] for sample in rest] == [sample["row"] for sample in everything[given:]]
    for one, other in zip(rest, everything[given:], strict=True):
        assert all(torch.equal(one[level], other[level]) for level in ("x1", "pooled"))


def test_resuming_reads_only_what_was_not_given(store, reads):
    stream = FeatureStream(store, ["x1"], shuffle=False)
    iterator = iter(stream)
    for _ in range(33):
        next(iterator)
    state = stream.state_dict()
    del iterator
    while reading_threads():
        time.sleep(0.01)
    reads.clear()

    stream.load_state_dict(state)

    assert order_of(stream) == [34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44]
    assert set(reads) == {f"x1/features/c/{block}/0/0/0" for block in (8, 9, 10, 11)}


def test_state_is_for_one_iteration_and_another_epoch_drops_it(store):
    stream = FeatureStream(store, ["pooled"], buffer_rows=6)
    whole = order_of(stream)
    finished = stream.state_dict()

    stream.load_state_dict(finished)
    assert stream.state_dict() == finished
    assert (order_of(stream), order_of(stream)) == ([], whole)
    stream.load_state_dict(finished)
    stream.set_epoch(1)
    assert (stream.state_dict()["epoch"], stream.state_dict()["given"]) == (1, 0)
    assert len(order_of(stream)) == 44


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 5}, "seed 0 in the state, 5 here"),
        ({"rank": 0, "world_size": 2}, "world_size 1 in the state, 2 here"),
        ({"buffer_rows": 7}, "buffer_rows 6 in the state, 7 here"),
        ({"even": True}, "even False in the state, True here"),
        ({"shuffle": False}, "shuffle True in the state, False here"),
        ({"rows": slice(11, 40)}, "rows '44 with digest .* in the state, '29 with digest .* here"),
    ],
)
def test_state_of_another_stream_is_refused_with_what_differs(store, changes, named):
    state = FeatureStream(store, ["pooled"], buffer_rows=6).state_dict()

    with pytest.raises(StateMismatch, match=named):
        FeatureStream(store, ["pooled"], **{"buffer_rows": 6, **changes}).load_state_dict(state)


def test_state_loaded_before_workers_are_forked_is_refused_by_them(store, monkeypatch):
    stream = FeatureStream(store, ["pooled"])
    stream.load_state_dict(stream.state_dict())
    monkeypatch.setattr("pipelines.feature_datasets.get_worker_info", lambda: SimpleNamespace(id=0, num_workers=2))

    with pytest.raises(StateMismatch, match="workers 1 in the state, 2 here"):
        list(stream)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("given", [0, 3, 8])
def test_stateful_dataloader_resumes_exactly(store, workers, given):
    def make() -> StatefulDataLoader:
        stream = FeatureStream(store, ["pooled"], buffer_rows=6)
        stream.set_epoch(4)
        return StatefulDataLoader(stream, 5, num_workers=workers)

    whole = [batch["row"].tolist() for batch in make()]
    interrupted = make()
    iterator = iter(interrupted)
    for _ in range(given):
        next(iterator)
    state = pickle.loads(pickle.dumps(interrupted.state_dict()))
    del iterator

    resumed = make()
    resumed.load_state_dict(state)

    assert [batch["row"].tolist() for batch in resumed] == whole[given:]
    assert [batch["row"].tolist() for batch in resumed] == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_state_of_a_finished_epoch_goes_on_with_the_next_one(store, workers):
    def make() -> StatefulDataLoader:
        return StatefulDataLoader(FeatureStream(store, ["pooled"], buffer_rows=6), 5, num_workers=workers)

    first = make()
    list(first)
    state = first.state_dict()
    first.dataset.set_epoch(1)
    expected = [batch["row"].tolist() for batch in first]

    resumed = make()
    resumed.load_state_dict(state)
    resumed.dataset.set_epoch(1)

    assert [batch["row"].tolist() for batch in resumed] == expected


def test_stateful_dataloader_refuses_another_seed(store):
    state = StatefulDataLoader(FeatureStream(store, ["pooled"]), 5).state_dict()
    other = StatefulDataLoader(FeatureStream(store, ["pooled"], seed=1), 5)
    other.load_state_dict(state)

    with pytest.raises(StateMismatch, match="seed 0 in the state, 1 here"):
        list(other)


# --- elsewhere --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "context"), [(0, ""), (2, "fork"), (1, "spawn")])
def test_workers_read_from_s3_after_their_parent_has(store, on_s3, workers, context):
    url, options = on_s3
    dataset = FeatureDataset(url, ["x1"], columns=["cls"], storage_options=options)
    stream = FeatureStream(url, ["x1"], columns=["cls"], storage_options=options)
    dataset[0]
    next(iter(stream))

    by_row = list(loader(dataset, workers, context=context)) if context != "spawn" else []
    streamed = list(loader(stream, workers, context=context))

    for batches in filter(None, (by_row, streamed)):
        assert sorted(rows_of(batches)) == VALID
        values = torch.cat([batch["x1"] for batch in batches]).numpy()
        np.testing.assert_array_equal(values, store.read(rows_of(batches), "x1"))


def test_failed_read_in_a_worker_says_why_after_its_parent_has_read_the_ledger(on_s3):
    url, options = on_s3
    store = FeatureStore.open(url, options)
    store.records([0])
    stream = FeatureStream(store, ["x1"])
    store.folder.remove(["x1/features/c/3/0/0/0"])

    with pytest.raises(MissingRows, match="though the ledger says ok"):
        list(loader(stream, workers=1))


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("blocks", [None, 3, pytest.param(100, marks=pytest.mark.soak)])
def test_ray_dataset_holds_every_valid_row(store, blocks):
    dataset = read_rows(store.folder.url, LEVELS, columns=["cls", "width"], override_num_blocks=blocks)

    rows = sorted(dataset.take_all(), key=lambda row: row["row"])

    assert dataset.count() == 44
    assert [row["row"] for row in rows] == VALID
    assert [row["key"] for row in rows] == [f"{row:05d}" for row in VALID]
    assert [row["cls"] for row in rows] == [str(row % 7) for row in VALID]
    assert {row["width"] for row in rows} == {96}
    for level in LEVELS:
        values = np.stack([row[level] for row in rows])
        assert values.dtype == store.read(0, level).dtype
        np.testing.assert_array_equal(values, store.read(VALID, level))


@pytest.mark.usefixtures("ray_session")
def test_ray_reads_chosen_rows_from_s3(store, on_s3):
    url, options = on_s3

    batches = list(read_rows(url, ["x1"], rows=["00040", "00003"], storage_options=options).iter_batches(batch_size=None))

    values = {int(row): x1 for batch in batches for row, x1 in zip(batch["row"], batch["x1"], strict=True)}
    assert sorted(values) == [3, 40]
    np.testing.assert_array_equal(values[40], store.read(40, "x1"))
