"""What every executor promises."""

import functools
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.metrics import TaskReport
from cluster.resources import WorkerPool
from pipelines import executors
from pipelines.actors import WorkersLost
from pipelines.executors import Executor, InlineExecutor, RayExecutor
from storage.datasets.files import DatasetError
from storage.spec import ShardTask

POOL = WorkerPool(device="cpu", size=2, cpus=1, gpus=0)
ONE = WorkerPool(device="cpu", size=1, cpus=1, gpus=0)


@pytest.fixture(params=[InlineExecutor, RayExecutor])
def executor(request) -> Executor:
    if request.param is RayExecutor:
        request.getfixturevalue("ray_session")
    return request.param()


def square(number: int, slow: int = -1) -> int:
    if number == slow:
        time.sleep(1)
    if number < 0:
        raise DatasetError(f"{number} is negative")
    return number * number


def squares() -> Callable[[int], int]:
    return square


def refuses() -> Callable[[int], int]:
    raise DatasetError("no such data")


@pytest.mark.parametrize("loaders", [None, 2])
def test_map_gives_results_in_order_whichever_is_slow(executor, loaders):
    items = iter(range(20))

    assert list(executor.map(functools.partial(square, slow=0), items, loaders=loaders)) == [n * n for n in range(20)]


@pytest.mark.parametrize("loaders", [None, 2])
def test_map_looks_a_bounded_way_ahead_and_ends_when_it_is_closed(executor, loaders):
    taken: list[int] = []

    def items() -> Iterator[int]:
        for n in range(10_000):
            taken.append(n)
            yield n

    found = executor.map(square, items(), loaders=loaders)
    assert [next(found) for _ in range(3)] == [0, 1, 4]
    found.close()

    assert 3 <= len(taken) <= 3 + 2 * max(8, os.cpu_count() or 1)


@pytest.mark.parametrize("loaders", [None, 2])
def test_errors_of_items_are_raised_as_they_are(executor, loaders):
    with pytest.raises(DatasetError, match=r"^-1 is negative$"):
        list(executor.map(square, [1, -1, 2], loaders=loaders))


def test_pieces_are_all_done_and_errors_raised_as_they_are(executor):
    assert sorted(executor.pieces(squares, range(7), POOL)) == [n * n for n in range(7)]
    assert list(executor.pieces(squares, [], POOL)) == []
    with pytest.raises(DatasetError, match=r"^-1 is negative$"):
        list(executor.pieces(squares, [1, -1, 2], ONE))
    with pytest.raises(DatasetError, match=r"^no such data$"):
        list(executor.pieces(refuses, [1, 2], ONE))


def dies(number: int, place: Path, times: int) -> int:
    """The square, but that the process is ended so many times over number 2."""
    with (place / str(number)).open("a") as starts:
        starts.write("1")
    if number == 2 and len((place / "2").read_text()) <= times:
        os._exit(1)
    return number * number


def dying(place: Path, times: int) -> Callable[[int], int]:
    return functools.partial(dies, place=place, times=times)


@pytest.mark.usefixtures("ray_session")
def test_a_piece_whose_worker_is_lost_is_done_again_until_it_is_given_up(tmp_path):
    once, always, told = (functools.partial(dying, tmp_path / name, times) for name, times in NAMED.items())
    for name in NAMED:
        (tmp_path / name).mkdir()
    executor = RayExecutor()

    assert sorted(executor.pieces(once, range(5), POOL)) == [0, 1, 4, 9, 16]
    with pytest.raises(WorkersLost, match="started again too often"):
        list(executor.pieces(always, range(5), POOL, restarts=1))
    results = list(executor.pieces(told, range(5), POOL, restarts=1, lost=lambda piece, _: -piece))

    assert sorted(results) == [-2, 0, 1, 9, 16]
    assert {path.name: path.read_text() for path in (tmp_path / "once").iterdir()} == {
        "0": "1", "1": "1", "2": "11", "3": "1", "4": "1"
    }  # fmt: skip
    assert (tmp_path / "told/2").read_text() == "11"


NAMED = {"once": 1, "always": 9, "told": 9}


@pytest.mark.usefixtures("ray_session")
def test_a_loader_that_is_lost_is_replaced(tmp_path):
    found = RayExecutor().map(dying(tmp_path, 1), range(12), loaders=2)

    assert list(found) == [n * n for n in range(12)]


TASKS = [ShardTask(block=block, first=4 * block, last=4 * block + 4) for block in range(9)]
TWO_CALLS = WorkerPool(device="cpu", size=2, cpus=1, gpus=0, calls=2)


class Reporter:
    """A worker that says in which process a task was done."""

    def run(self, task: ShardTask, loaded: object = None) -> TaskReport:
        time.sleep(0.05)
        return TaskReport(block=task.block, ok=task.n_rows, marks={"process": os.getpid()})


def reporter(*, model: bool = True) -> Reporter:
    assert model
    return Reporter()


def refused(*, model: bool = True) -> Reporter:
    raise DatasetError("no such store")


def test_every_task_is_done_once(executor):
    reports = list(executor.stream(reporter, TASKS, TWO_CALLS))

    assert sorted(report.block for report in reports) == list(range(9))
    assert all(report.ok == 4 for report in reports)


@pytest.mark.usefixtures("ray_session")
def test_tasks_are_done_on_ray_data_likewise():
    assert sorted(report.block for report in RayExecutor(as_cluster=True).stream(reporter, TASKS, TWO_CALLS)) == list(range(9))


def test_a_worker_that_cannot_be_made_is_told_as_it_is(executor):
    with pytest.raises(DatasetError, match=r"^no such store$"):
        list(executor.stream(refused, TASKS, TWO_CALLS))


@pytest.mark.usefixtures("ray_session")
def test_actors_that_were_started_ahead_do_the_tasks_and_none_of_them_is_left(monkeypatch):
    import ray

    executor, started = RayExecutor(), []
    executor.start_ahead(lambda: TWO_CALLS, "json")
    ahead = list(executor._ahead)
    monkeypatch.setattr(executors, "start_actors", lambda count, _: started.append(count) or [])

    (report,) = executor.stream(reporter, TASKS[:1], TWO_CALLS)

    assert (report.block, started) == (0, [0])

    def asked_until_it_is_gone(actor):
        for _ in range(200):  # Ray ends it in its own time
            ray.get(actor.load.remote("json"))
            time.sleep(0.05)

    for actor in ahead:
        with pytest.raises(ray.exceptions.RayActorError):
            asked_until_it_is_gone(actor)


def test_what_is_asked_of_nobody_else_is_done_here(executor):
    assert executor.ask(os.getpid) == os.getpid()
    with pytest.raises(DatasetError, match=r"^-1 is negative$"):
        executor.ask(functools.partial(square, -1))


def speaks() -> int:
    logging.getLogger("raylift.speaks").info("%s of %d", "one", 2)
    logging.getLogger("raylift.speaks").debug("not asked for")
    warnings.warn("something is odd", stacklevel=1)
    return os.getpid()


@pytest.mark.usefixtures("ray_session")
def test_actors_that_were_started_ahead_are_asked_and_keep_no_other_work_waiting(caplog, tmp_path):
    executor = RayExecutor()
    executor.start_ahead(lambda: TWO_CALLS, "json")  # which hold both CPUs

    with caplog.at_level(logging.INFO):
        assert executor.ask(speaks) != os.getpid()
        assert executor.ask(os.getcwd) == os.getcwd(), "where a relative path of weights leads"
    said = [(each.name, each.levelname, each.getMessage().splitlines()[0]) for each in caplog.records]
    assert ("raylift.speaks", "INFO", "one of 2") in said
    assert any(name == "py.warnings" and text.endswith("UserWarning: something is odd") for name, _, text in said)
    assert not any(level == "DEBUG" for _, level, _ in said)
    with pytest.raises(DatasetError, match=r"^-1 is negative$"):
        executor.ask(functools.partial(square, -1))
    assert executor.ask(functools.partial(dies, 2, tmp_path, 1)) == 4, "again, where its process was lost"
    assert list(executor.map(square, range(3))) == [0, 1, 4]


class Hangs(Reporter):
    """Never comes back from one of its tasks."""

    def run(self, task: ShardTask, loaded: object = None) -> TaskReport:
        time.sleep(3600 if task.block == 3 else 0)
        return super().run(task)


def hanging(*, model: bool = True) -> Hangs:
    return Hangs()


@pytest.mark.usefixtures("ray_session")
def test_a_run_in_which_nothing_ends_is_ended(monkeypatch):
    monkeypatch.setattr(executors, "NO_PROGRESS_S", 4.0)

    with pytest.raises(WorkersLost, match="no task has ended for 4 s"):
        list(RayExecutor().stream(hanging, TASKS[:4], TWO_CALLS))
