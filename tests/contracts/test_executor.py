"""What every executor promises."""

import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.resources import WorkerPool
from pipelines.executors import Executor, InlineExecutor, RayExecutor, WorkersLost
from storage.datasets.files import DatasetError

POOL = WorkerPool(device="cpu", size=2, cpus=1, gpus=0)


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
        list(executor.pieces(squares, [1, -1, 2], POOL))
    with pytest.raises(DatasetError, match=r"^no such data$"):
        list(executor.pieces(refuses, [1, 2], POOL))


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
