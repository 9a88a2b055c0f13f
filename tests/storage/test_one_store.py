"""One store has one maker: drivers with different settings on one --out, and stores that are removed under a running driver."""

import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.executors import InlineExecutor
from pipelines.extraction.run import RunFailed, extract
from pipelines.extraction.worker import ShardWorker
from storage.ledger import SampleRecord, committed_objects
from storage.paths import Folder
from storage.root import StoreReplaced
from storage.store import FeatureStore
from tests.conftest import jpeg, write_tar
from tests.forks import Fork, Forks, operations
from tests.storage.test_every_kill import EXTRACT, stored

MAKERS = {
    "one": ["--weights", "random:1", "--levels", "x1", "pooled"],
    "other": ["--weights", "random:2", "--levels", "x1@int8", "x2", "pooled"],
}
"""Settings of two makers, whose objects have the same names in part."""


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    members = [(f"{i}.jpg", jpeg(i, 48, 40)) for i in range(4)]
    return str(write_tar(tmp_path_factory.mktemp("in") / "a.tar", members))


def fork(maker: str, images: str, out: Path, **changes: object) -> Fork:
    argv = [*EXTRACT, *MAKERS[maker], "--data", images, "--out", str(out)]
    return replace(Fork(program="extract", argv=argv, place=str(out), log=f"{out}-{maker}.log"), **changes)


@pytest.fixture(scope="module")
def undisturbed(parent, images, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """What each maker makes alone."""
    found, folder = {}, tmp_path_factory.mktemp("alone")
    for maker in MAKERS:
        alone = fork(maker, images, folder / f"{maker}.zarr")
        assert parent.run(alone) == 0, Path(alone.log).read_text()
        found[maker] = stored(Folder(str(folder / f"{maker}.zarr")))
        found[f"{maker}, operations"] = operations(alone)
    return found


def race(parent: Forks, images: str, undisturbed: dict, out: Path, lead_s: float) -> None:
    """Start both makers at about once: one wins, the other is refused, and the store is the winner's."""
    begin = time.time() + 0.05
    racing = [fork("one", images, out, at=begin + lead_s), fork("other", images, out, at=begin)]
    pids = [parent.start(each) for each in racing]
    codes = [parent.wait(pid) for pid in pids]

    logs = [Path(each.log).read_text() for each in racing]
    assert sorted(codes) == [0, 2], logs
    assert "FingerprintMismatch: " in logs[codes.index(2)]
    assert stored(Folder(str(out))) == undisturbed[list(MAKERS)[codes.index(0)]]


def test_of_two_makers_at_once_one_wins_and_the_other_is_refused(parent, images, undisturbed, tmp_path):
    for number, lead_s in enumerate((0.0, -0.02, 0.02)):
        race(parent, images, undisturbed, tmp_path / f"{number}.zarr", lead_s)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_of_two_makers_at_once_one_wins_fifty_times(parent, images, undisturbed, tmp_path):
    draw = random.Random(3)
    for number in range(50):
        race(parent, images, undisturbed, tmp_path / f"{number}.zarr", draw.uniform(-0.1, 0.1))


def test_two_equal_makers_at_once_both_end_well(parent, images, undisturbed, tmp_path):
    racing = [fork("one", images, tmp_path / "out.zarr", log=str(tmp_path / f"{n}.log")) for n in range(2)]
    pids = [parent.start(each) for each in racing]

    assert [parent.wait(pid) for pid in pids] == [0, 0], [Path(each.log).read_text() for each in racing]
    assert stored(Folder(str(tmp_path / "out.zarr"))) == undisturbed["one"]


def replace_under(parent: Forks, images: str, undisturbed: dict, out: Path, number: int) -> None:
    """Hold a driver before one of its operations, remove its store, make another in its place, and let the driver go on."""
    old = fork("one", images, out, number=number, held=True)
    pid = parent.start(old)
    held, deadline = Path(f"{old.log}.held"), time.monotonic() + 60
    while not held.exists():
        assert time.monotonic() < deadline, Path(old.log).read_text()
        time.sleep(0.01)
    before, was_complete = held.read_text(), _is_complete(out)
    shutil.rmtree(out, ignore_errors=True)
    assert parent.run(fork("other", images, out)) == 0
    Path(f"{old.log}.go").touch()
    code = parent.wait(pid)

    if before in (f"os.rename {out}/zarr.json", f"os.remove {out}/zarr.json"):
        return  # between the look at the root and its replacement there is no lock
    assert code in ((0,) if was_complete else (1, 2)), (number, before, code, Path(old.log).read_text())
    assert stored(Folder(str(out))) == undisturbed["other"], (number, before)


def _is_complete(out: Path) -> bool:
    return (out / "zarr.json").exists() and FeatureStore.open(str(out)).status == "complete"


def test_driver_whose_store_was_replaced_stops_and_changes_nothing_of_the_new_one(parent, images, undisturbed, tmp_path):
    total = undisturbed["one, operations"]
    for number in sorted({round(n) for n in np.linspace(1, total - 1, 5)}):
        replace_under(parent, images, undisturbed, tmp_path / f"{number}.zarr", number)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_driver_whose_store_was_replaced_before_any_of_its_operations(parent, images, undisturbed, tmp_path):
    for number in range(1, undisturbed["one, operations"]):
        replace_under(parent, images, undisturbed, tmp_path / f"{number}.zarr", number)


def test_what_a_removed_store_left_does_not_count_in_the_new_one(parent, images, undisturbed, tmp_path):
    """A removal that was interrupted, or a late worker's objects: records and shards of other settings, without a root."""
    out = tmp_path / "out.zarr"
    assert parent.run(fork("one", images, out)) == 0
    (out / "zarr.json").unlink()

    new = fork("other", images, out)
    assert parent.run(new) == 0, Path(new.log).read_text()

    assert stored(Folder(str(out))) == undisturbed["other"]
    assert "ledger/commits/00000000.parquet" in Path(new.log).read_text()
    assert "belongs to another store" in Path(new.log).read_text()


def test_worker_that_meets_another_stores_commit_record_replaces_it(make_tars, tiny, tmp_path):
    config = tiny(make_tars(count=1, each=4))
    foreign = tiny(config.data, weights="random:7", out=str(tmp_path / "foreign.zarr"))
    reference = tiny(config.data, out=str(tmp_path / "reference.zarr"))
    for each in (config, foreign, reference):
        extract(each, InlineExecutor())
    store, other = FeatureStore.open(config.out), FeatureStore.open(foreign.out)
    record = "ledger/commits/00000000.parquet"
    store.set_writing()
    store.folder.write(record, other.folder.read(record))
    writer = store.writer(store.layout.task(0))
    mine = FeatureStore.open(reference.out).ledger.record(0)
    records = [SampleRecord(**row) for row in mine.to_pylist()]

    assert writer.commit(records, committed_objects(mine))

    assert store.folder.read(record) == Folder(reference.out).read(record)
    assert not writer.commit(records, committed_objects(mine))


def test_worker_of_a_store_that_is_gone_says_so_and_the_driver_stops_at_once(make_tars, tiny, monkeypatch):
    config, computed = tiny(make_tars(count=1, each=12)), []
    original = ShardWorker.compute

    def removed_meanwhile(self, task, loaded):
        computed.append(task.block)
        shutil.rmtree(config.out)
        return original(self, task, loaded)

    monkeypatch.setattr(ShardWorker, "compute", removed_meanwhile)
    with pytest.raises(RunFailed, match=r"out\.zarr is gone: it was removed while this run wrote it"):
        extract(config, InlineExecutor())

    assert computed == [0]
    assert not (Path(config.out) / "zarr.json").exists()
    assert not (Path(config.out) / "x1").exists()


def test_heartbeat_of_a_driver_whose_store_was_replaced_writes_nothing(make_tars, tiny, monkeypatch):
    """While a task takes long, or workers write nothing more."""
    config = tiny(make_tars(count=1, each=8))
    monkeypatch.setattr("pipelines.extraction.run.SAVE_INTERVAL_S", 0.02)

    def slow(self, task, loaded):
        shutil.rmtree(config.out)
        time.sleep(0.3)
        return {"block": task.block, "ok": task.n_rows, "failed": 0, "seconds": {}, "bytes_written": 0}

    monkeypatch.setattr(ShardWorker, "compute", slow)
    with pytest.raises(RunFailed, match="is gone"):
        extract(config, InlineExecutor())

    assert not list(Path(config.out).rglob("progress.json"))


def test_store_that_is_written_again_is_looked_at_first(make_tars, tiny, tmp_path):
    config, other = tiny(make_tars(count=1, each=4)), tiny(str(tmp_path / "in/*.tar"), weights="random:5")
    extract(config, InlineExecutor())
    store = FeatureStore.open(config.out)
    shutil.rmtree(config.out)
    extract(other, InlineExecutor())
    before = stored(Folder(config.out))

    with pytest.raises(StoreReplaced, match="is another store now"):
        store.set_writing()

    assert stored(Folder(config.out)) == before
