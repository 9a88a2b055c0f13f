"""Calls of a worker overlap within declared lanes; what fails leaves its places to others; a GPU that is lost ends its worker."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines.executors import InlineExecutor, WorkerBroken
from pipelines.extraction.host import ModelDevice
from pipelines.extraction.prepare import prepare, resolve
from pipelines.extraction.run import RunFailed, run_prepared
from pipelines.extraction.schedule import MOST_WRITING, WRITING_BYTES, Lanes, Schedule, lanes_for
from pipelines.extraction.worker import ShardWorker
from storage.store import FeatureStore
from tests.pipelines.extraction.test_s3 import tree
from tests.pretended_gpu import pretended_gpu


def arrived(batch: int) -> None:
    """Waits for nothing."""


def test_a_gpus_worker_writes_as_many_tasks_at_once_as_its_memory_holds():
    assert [lanes_for("cuda", block).rows for block in (1, 150 * 10**6, WRITING_BYTES)] == [MOST_WRITING, 14, 2]
    assert lanes_for("cpu", 1) == Lanes()
    assert lanes_for("cuda", WRITING_BYTES // 5).calls == 7


def test_tasks_are_written_while_others_compute_and_no_lane_is_overfull():
    """Three tasks are written at once, which none of them is before the third was computed; a fourth one waits for them."""
    lanes = Lanes(images=2, rows=3, batches=2)
    schedule, together, order = Schedule(lanes), threading.Barrier(3, timeout=20), []

    def task(number: int) -> list[int]:
        with schedule.call():

            def batches():
                for batch in range(3):
                    order.append(number)
                    yield 10 * number + batch

            found = schedule.compute(batches(), arrived, lambda batch: batch)
            together.wait()
            return found

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(task, range(6)))

    assert found == [[10 * number + batch for batch in range(3)] for number in range(6)]
    assert all(len(set(order[start : start + 3])) == 1 for start in range(0, 18, 3))  # a task's batches follow each other
    assert (schedule.rows.most, schedule.images.most) == (3, 2)
    assert schedule.batches.most <= 2
    assert schedule.rows.taken == schedule.images.taken == schedule.batches.taken == 0


def test_what_fails_leaves_its_places_and_nothing_under_way():
    schedule = Schedule(Lanes(images=1, rows=1, batches=2))

    def broken_device():
        yield 1
        raise RuntimeError("in the device")

    def broken_storage(batch: int) -> int:
        raise OSError("while encoding")

    with pytest.raises(RuntimeError, match="in the device"), schedule.call():
        schedule.compute(broken_device(), arrived, lambda batch: batch)
    with pytest.raises(OSError, match="while encoding"), schedule.call():
        schedule.compute(iter([1, 2, 3]), arrived, broken_storage)

    with schedule.call():
        assert schedule.compute(iter([1, 2]), arrived, lambda batch: batch) == [1, 2]


class Overlapping(InlineExecutor):
    """Has calls overlap as on a GPU."""

    def stream(self, make_worker, tasks, pool, how="actor"):
        yield from super().stream(make_worker, tasks, replace(pool, device="cuda", calls=5), how)


def test_the_store_is_the_same_however_calls_overlap(make_tars, tiny, tmp_path):
    one, other = (tiny(make_tars(), out=str(tmp_path / name)) for name in ("one.zarr", "other.zarr"))
    for config, executor in ((one, InlineExecutor()), (other, Overlapping())):
        run_prepared(prepare(resolve(config), executor), executor)
    trees = [tree(FeatureStore.open(config.out).folder) for config in (one, other)]

    assert trees[0].keys() == trees[1].keys()
    assert [name for name, data in trees[0].items() if data != trees[1][name] and not name.startswith("runs/")] == []


class Poisoned:
    """A device that fails once, and then at everything; as CUDA's do after an illegal access."""

    def __init__(self, device: ModelDevice, sound: int):
        self.device, self.left, self.lost = device, sound, False

    def begin(self, images: np.ndarray, batch: int):
        self.left -= 1
        self.lost |= self.left < 0
        if self.lost:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return self.device.begin(images, batch)

    def is_lost(self) -> bool:
        return self.lost

    def fit_batch(self, batch: int) -> int:
        return batch


def test_a_gpu_that_is_lost_ends_the_worker_and_leaves_its_marker(make_tars, tiny, monkeypatch):
    config, original = tiny(make_tars()), ShardWorker.__init__
    monkeypatch.setattr(ShardWorker, "__init__", lambda self, setup, device: original(self, setup, Poisoned(device, sound=2)))

    with pytest.raises(WorkerBroken, match=r"can't be used by this process any more, after task 2 .*illegal memory access"):
        run_prepared(prepare(resolve(config), InlineExecutor()), InlineExecutor())

    store = FeatureStore.open(config.out)
    (run,) = store.folder.folders("runs")
    assert store.folder.folders(f"runs/{run}/attempts") == ["00000002"]
    assert store.ledger.done() == {0, 1}
    monkeypatch.undo()
    assert run_prepared(prepare(resolve(config), InlineExecutor()), InlineExecutor()).ok == 20


def test_an_error_of_a_sound_gpu_is_a_task_that_did_not_finish(make_tars, tiny, monkeypatch):
    config, original = tiny(make_tars()), ShardWorker.__init__

    class Fails(Poisoned):
        def is_lost(self) -> bool:
            return False

    monkeypatch.setattr(ShardWorker, "__init__", lambda self, setup, device: original(self, setup, Fails(device, sound=2)))
    with pytest.raises(RunFailed, match="tasks keep failing"):
        run_prepared(prepare(resolve(config), InlineExecutor()), InlineExecutor())


def test_a_gpu_is_lost_where_it_gives_an_error_when_it_is_waited_for(make_tars, tiny, monkeypatch):
    bundle = resolve(tiny(make_tars())).bundle
    assert not ModelDevice(bundle.build("cpu")).is_lost()
    with pretended_gpu():
        device = ModelDevice(bundle.build("cuda"))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        assert not device.is_lost()

        def sticky(device):
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")

        monkeypatch.setattr(torch.cuda, "synchronize", sticky)
        assert device.is_lost()
