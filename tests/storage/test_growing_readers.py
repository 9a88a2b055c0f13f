"""A store of six tars grows by a seventh: its runs are killed before operations that are drawn, and all kinds of readers loop.

Each run is a process of its own, slowed so that readers meet every moment of it. By default two kills; `make soak` takes ten
a seed, on a local disk and on S3, and ten of one growth.
"""

import contextlib
import io
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from jobs.show import run as show
from pipelines.feature_datasets import FeatureDataset, FeatureStream
from pipelines.showing.nearest import Query, nearest_cells
from storage.paths import Folder, StorageOptions
from storage.store import FeatureStore
from tests.conftest import jpeg, write_tar
from tests.forks import Fork, Forks, images_computed, operations
from tests.storage.test_every_kill import EXTRACT, Sweep, stored
from tests.storage.test_every_kill import s3_process as s3_process

BLOCK = 4
"""Images of a task."""

LEVELS = ("x1", "x2@int8", "x0.5@float16-raw", "pooled")

SETTINGS = [*EXTRACT, "--levels", *LEVELS, "--block-rows", str(BLOCK)]

OLD, NEW = 22, 29
"""Rows before and after: the last block isn't full in either."""

PAUSE_S = 0.02


@dataclass(frozen=True)
class Rows:
    """What every reader must find, of a growth that nobody disturbed."""

    keys: list[str]
    records: list[dict[str, object]]
    values: dict[str, np.ndarray]
    "by level, NaN where a row failed"
    ok: np.ndarray


@dataclass(frozen=True)
class Case:
    """A finished store of six tars to be grown again and again, and how it ends."""

    forks: Forks
    folder: Path
    base: Folder
    argv: list[str]
    expected: Rows
    objects: dict[str, bytes]
    "of the grown store"
    total: int
    "operations of an undisturbed growth"

    def fresh(self, name: str) -> Folder:
        """A copy of the store of six."""
        return copied(self.base, Folder(f"{self.base.url.rpartition('/')[0]}/{name}.zarr", self.base.options))

    def fork(self, folder: Folder, **changes: object) -> Fork:
        return fork_of(self.argv, folder, self.folder, pause=PAUSE_S, **changes)


def copied(source: Folder, target: Folder) -> Folder:
    for name in source.below(""):
        target.write(name, source.read(name))
    return target


def fork_of(argv: list[str], folder: Folder, logs: Path, **changes: object) -> Fork:
    options = ["--storage-options", json.dumps(folder.options)] if folder.options else []
    place = folder.url if folder.options else str(Path(folder.url).resolve())
    log = str(logs / f"{Path(folder.url).stem}.log")
    return replace(Fork(program="extract", argv=[*argv, "--out", folder.url, *options], place=place, log=log), **changes)


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> list[str]:
    """Seven, the last of which sorts first; one sample of the first and one of the last are no images."""
    folder, number, paths = tmp_path_factory.mktemp("in"), 0, []
    for name, count in {"b": 4, "c": 3, "d": 5, "e": 2, "f": 4, "g": 4, "a": 7}.items():
        members = []
        for i in range(count):
            members.append((f"{name}-{i}.jpg", b"no image" if name in "ba" and i == 1 else jpeg(number, 48, 40)))
            number += 1
        paths.append(str(write_tar(folder / f"{name}.tar", members)))
    return paths


def make_case(forks: Forks, tars: list[str], folder: Path, base: str, options: StorageOptions | None = None) -> Case:
    six, seven = (["--data", *some, *SETTINGS] for some in (tars[:6], tars))
    first, grown = Folder(f"{base}/base.zarr", options), Folder(f"{base}/grown.zarr", options)
    begun = fork_of(six, first, folder)
    assert forks.run(begun) == 0, Path(begun.log).read_text()
    copied(first, grown)
    last = fork_of(seven, grown, folder)
    assert forks.run(last) == 0, Path(last.log).read_text()
    store = FeatureStore.open(grown.url, options)
    assert (len(FeatureStore.open(first.url, options)), len(store)) == (OLD, NEW)
    expected = Rows(
        keys=store.index.keys(0, NEW).to_pylist(),
        records=store.records(slice(None)).to_pylist(),
        values={level: store.read(slice(None), level, missing="nan") for level in store.levels},
        ok=store.valid(),
    )
    return Case(forks, folder, first, seven, expected, stored(grown), operations(last))


@pytest.fixture(scope="module")
def on_disk(parent, tars, tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp("grow")
    return make_case(parent, tars, folder, str(folder))


# --- readers ----------------------------------------------------------------------------------------------------------


class Readers:
    """All kinds of readers of a store that grows, each of which raises where a row isn't right. Some are opened before."""

    def __init__(self, case: Case, out: Folder):
        self.expected, self.out, self.scratch = case.expected, out, case.folder / f"read-{Path(out.url).stem}"
        self.options = ["--storage-options", json.dumps(out.options)] if out.options else []
        self.loops = 0
        self.seen: set[int] = set()
        "how many rows with features a reader that looks again found"
        self._opened, self._refreshed = self._open(), self._open()
        self._dataset, self._stream = self._data(FeatureDataset), self._data(FeatureStream)

    def _open(self) -> FeatureStore:
        return FeatureStore.open(self.out.url, self.out.options)

    def _data(self, kind):
        return kind(self.out.url, ["x1", "pooled"], columns=["width"], storage_options=self.out.options)

    def kinds(self) -> list[Callable[[], None]]:
        return [self.opened, self.refreshed, self.opened_now, self.nearest, self.dataset, self.stream, self.loaders, self.shown]

    def look(self) -> None:
        """Each kind once."""
        for kind in self.kinds():
            kind()
        self.loops += 1

    def opened(self) -> None:
        self.require_rows(self._opened)
        assert len(self._opened) == OLD

    def refreshed(self) -> None:
        before = len(self._refreshed)
        self._refreshed.refresh()
        assert len(self._refreshed) >= before
        self.seen.add(self.require_rows(self._refreshed))

    def opened_now(self) -> None:
        self.require_rows(self._open())

    def require_rows(self, store: FeatureStore) -> int:
        """All rows of a store are right: the old ones there, new ones there or not yet; returns how many are there."""
        n, want = len(store), self.expected
        assert n in (OLD, NEW)
        assert store.index.keys(0, n).to_pylist() == want.keys[:n]
        drawn = random.Random(self.loops).sample(range(OLD), 4)
        assert store.rows([want.keys[row] for row in drawn]).tolist() == drawn
        # What is there now stays there: states first, then the rows.
        records = store.records(slice(None)).to_pylist()
        for row, (found, right) in enumerate(zip(records, want.records[:n], strict=True)):
            assert found == right or (row >= OLD and found == {**dict.fromkeys(found), "row": row}), (found, right)
        written = np.array([each["status"] is not None for each in records])
        there = np.zeros(n, bool)
        for level, values in want.values.items():
            found, there = store.read_present(np.arange(n), level)
            assert not (there & ~want.ok[:n]).any()
            assert there[written & want.ok[:n]].all()
            np.testing.assert_array_equal(found[there], values[:n][there], err_msg=level)
            at = drawn[0]
            np.testing.assert_array_equal(store.read(at, level, missing="nan"), values[at])
        assert set(np.flatnonzero(~want.ok[:OLD])) == {row for row in store.failures(["row"])["row"].to_pylist() if row < OLD}
        return int(there.sum())

    def require_samples(self, samples: Iterator[dict], rows: set[int]) -> None:
        found = []
        for sample in samples:
            row = int(sample["row"])
            found.append(row)
            assert (sample["key"], sample["width"]) == (self.expected.keys[row], self.expected.records[row]["width"])
            for level in ("x1", "pooled"):
                np.testing.assert_array_equal(sample[level].numpy(), self.expected.values[level][row])
        assert len(found) == len(set(found))
        assert rows <= set(found) <= set(np.flatnonzero(self.expected.ok)), (rows, found)

    @property
    def old(self) -> set[int]:
        return set(np.flatnonzero(self.expected.ok[:OLD]).tolist())

    def dataset(self) -> None:
        self.require_samples((self._dataset[i] for i in range(len(self._dataset))), self.old)
        assert len(self._dataset) == len(self.old)
        now = self._data(FeatureDataset)
        self.require_samples(iter(now.__getitems__(range(len(now)))), self.old)

    def stream(self) -> None:
        self._stream.set_epoch(self.loops)
        self.require_samples(iter(self._stream), self.old)
        self.require_samples(iter(self._data(FeatureStream)), self.old)

    def loaders(self) -> None:
        """Epochs of DataLoaders, whose workers read in processes of their own."""
        if self.loops % 4:  # they take longer to start than the others to read
            return
        for data in (self._dataset, self._stream, self._data(FeatureStream)):
            self.require_samples(iter(DataLoader(data, batch_size=None, num_workers=2)), self.old)

    def nearest(self) -> None:
        store = self._open()
        level, row = store.level("x1"), min(self.old)
        query = Query.at(store, self.expected.keys[row], (24.0, 20.0), level)
        maps = self.expected.values["x1"].astype(np.float32)
        cosines = maps @ query.vector_C / (np.linalg.norm(maps, axis=-1) * np.linalg.norm(query.vector_C))
        found = nearest_cells(store, query.vector_C, level, 30)
        assert len({(each.row, each.cell) for each in found}) == 30
        for each in found:
            assert abs(each.cosine - cosines[each.row, *each.cell]) < 1e-5
        # No old cell is left out that is nearer than the last one.
        first = np.sort(cosines[sorted(self.old)].ravel())[::-1][:30]
        assert found[-1].cosine >= first[-1] - 1e-5

    def shown(self) -> None:
        """Programs: what they write while the store grows."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=self.scratch))
        key = self.expected.keys[min(self.old)]
        for argv in (
            ["view", self.out.url, "--count", "3", "--out", str(scratch / "view.png")],
            ["nearest", self.out.url, "--key", key, "--point", "24", "20", "--out", str(scratch / "near.png")],
            ["export", self.out.url, "--out", str(scratch / "vectors")],
            ["status", self.out.url],
            ["rows", self.out.url, "--first", "3"],
        ):
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                code = show([*argv, *self.options])
            assert code == 0, (argv, said.getvalue())
        table = pq.read_table(scratch / "vectors")
        rows = table["row"].to_pylist()
        assert table["key"].to_pylist() == [self.expected.keys[row] for row in rows]
        assert self.old <= set(rows) <= set(np.flatnonzero(self.expected.ok))
        vectors = np.stack(table["vector"].to_numpy())
        np.testing.assert_array_equal(vectors, self.expected.values["pooled"][rows].astype(np.float32))


# --- kills ------------------------------------------------------------------------------------------------------------


def watched(case: Case, fork: Fork, readers: Readers) -> int:
    """Run a fork while all readers loop; its exit code."""
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(case.forks.wait, case.forks.start(fork))
        while not ended.done():
            readers.look()
    readers.look()
    return ended.result()


def require_grown(case: Case, out: Folder) -> None:
    """The store is as if nothing had been: old objects as they were but for the last block, each key once."""
    before, after = stored(case.base), stored(out)
    assert after == case.objects
    last = OLD // BLOCK
    shards = {name: data for name, data in before.items() if "/c/" in name and not name.startswith("index/")}
    records = {name: data for name, data in before.items() if name.startswith("ledger/commits/")}
    changed = {name for name in {**shards, **records} if after[name] != before[name]}
    assert changed == {name for name in shards if name.split("/")[3] == str(last)} | {f"ledger/commits/{last:08d}.parquet"}
    keys = FeatureStore.open(out.url, out.options).records(slice(None), ["key"])["key"].to_pylist()
    assert keys == case.expected.keys
    assert len(set(keys)) == NEW
    Sweep.require_tidy(out)


def killed_once(case: Case, number: int) -> int:
    """Grow, killed before one operation, then by the same command to the end; returns how often readers looked."""
    out = case.fresh(f"at-{number}")
    fork, readers = case.fork(out, number=number), Readers(case, out)
    assert watched(case, fork, readers) == -9, Path(fork.log).read_text()
    code = watched(case, replace(fork, number=-1), readers)
    assert code == 0, Path(fork.log).read_text()
    require_grown(case, out)
    assert images_computed(fork) <= NEW - OLD + BLOCK
    assert max(readers.seen) == case.expected.ok.sum()
    return readers.loops


def killed_in_turn(case: Case, seed: int, kills: int) -> None:
    """One growth whose every run is killed, until so many were; then it ends."""
    draw, out = random.Random(seed), case.fresh(f"turn-{seed}")
    fork, readers, killed = case.fork(out), Readers(case, out), 0
    while killed < kills:
        # A run that goes on has fewer operations: it may end.
        code = watched(case, replace(fork, number=draw.randrange(case.total // 3)), readers)
        assert code in (-9, 0), Path(fork.log).read_text()
        killed += code == -9
        if code == 0:
            break
    assert watched(case, fork, readers) == 0, Path(fork.log).read_text()
    require_grown(case, out)
    assert images_computed(fork) <= NEW - OLD + BLOCK * killed
    assert killed > 1


def test_two_kills_at_random_beside_readers_of_every_kind(on_disk):
    loops = [killed_once(on_disk, number) for number in random.Random(0).sample(range(on_disk.total), 2)]
    assert min(loops) >= 2


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(1, 4))
def test_ten_kills_at_random_beside_readers_of_every_kind(on_disk, seed):
    for number in random.Random(seed).sample(range(on_disk.total), 10):
        killed_once(on_disk, number)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(1, 4))
def test_ten_kills_of_one_growth(on_disk, seed):
    killed_in_turn(on_disk, seed, 10)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_ten_kills_at_random_on_s3(parent, tars, tmp_path, s3_process):
    case = make_case(parent, tars, tmp_path, "s3://kills/growing", s3_process)
    for number in random.Random(4).sample(range(case.total), 10):
        killed_once(case, number)
    killed_in_turn(case, 4, 10)
