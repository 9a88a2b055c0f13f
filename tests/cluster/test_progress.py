"""Rates that a run shows while it goes."""

import io

import pytest
from rich.console import Console

from cluster.progress import Progress


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [50.0]
    monkeypatch.setattr("cluster.progress.time.monotonic", lambda: now[0])
    return now


def test_workers_that_finish_together_are_not_taken_for_one_that_is_as_fast_as_all(clock):
    """Four workers take 20 s to start and 10 s for each task of 16 images: 6.4 images/s, whenever one looks."""
    progress, rates = Progress(total=1000, started=50.0), []
    for wave in (1, 2, 3):
        for worker in range(4):
            clock[0] = 70.0 + 10.0 * wave + 0.01 * worker
            progress.add(16, 0, {"decode": 4.0, "forward": 6.0})
        rates.append(progress.rate)

    assert rates == pytest.approx([6.4, 6.4, 6.4], rel=0.01)
    assert progress.eta_s == pytest.approx((1000 - 12 * 16) / 6.4, rel=0.01)


def test_rows_of_earlier_runs_do_not_count(clock):
    progress = Progress(total=100, done=84, started=50.0)
    clock[0] = 60.0
    progress.add(7, 1, {"forward": 300.0})  # threads' time may be longer than the clock's

    assert progress.rate == pytest.approx(0.8)
    assert progress.eta_s == pytest.approx(10.0)


def test_what_is_left_is_counted_from_now(clock):
    """Two tasks of 250 s, one after another: shortly before the end of the second, nobody is told that minutes are left."""
    progress = Progress(total=64, done=32, started=50.0)
    clock[0] = 300.0
    progress.add(16, 0, {"forward": 250.0})
    assert progress.eta_s == pytest.approx(250.0)

    clock[0] = 542.0
    assert progress.eta_s == pytest.approx(8.0)
    assert "48 of 64 images (32 before this run)" in progress.line()
    assert ", 8 s left" in progress.line()

    clock[0] = 560.0
    assert progress.eta_s is None, "it takes longer than the first did, and nobody knows how much"
    assert "left" not in progress.line()


def test_a_slow_start_is_forgotten(clock):
    """60 s until the first of a hundred is done, and one a second from then on."""
    progress = Progress(total=100, started=50.0, unit="items")
    for number in range(92):
        clock[0] = 110.0 + number
        progress.add(1)

    assert progress.eta_s == pytest.approx(8.0, rel=0.1)


def test_what_was_lost_is_to_be_done_again(clock):
    """Steps after the last checkpoint go with their workers."""
    progress = Progress(total=100, done=40, started=50.0, unit="steps")
    clock[0] = 60.0
    progress.reach(60, "loss 0.5000")
    assert "60 of 100 steps (40 before this run)" in progress.line()
    assert progress.line().endswith("| loss 0.5000")
    progress.reach(50)
    assert "50 of 100 steps" in progress.line()
    assert progress.eta_s is None

    clock[0] = 70.0
    progress.reach(60)
    assert progress.eta_s == pytest.approx(40.0)


def test_one_progress_in_another_leaves_the_terminal_to_it(monkeypatch):
    monkeypatch.setattr("cluster.progress.Console", lambda **_: Console(file=io.StringIO(), force_terminal=True))

    with Progress(total=3, unit="cells") as cells:
        with Progress(total=10, unit="steps") as steps:
            assert (cells._is_live, steps._is_live) == (True, False)
        cells.add(1)
    with Progress(total=3) as later:
        assert later._is_live


def test_on_a_terminal_counts_stand_below_the_bar(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr("cluster.progress.Console", lambda **_: Console(file=screen, force_terminal=True, color_system=None))
    progress = Progress(total=1000, done=100)
    progress.add(200, 1, {"forward": 3.0, "write": 1.0})

    progress._console.print(progress._render())

    bar, counts, *_ = screen.getvalue().splitlines()
    assert "done" not in bar
    assert counts.startswith("done  301 of 1,000 images (100 before)  failed  1")
