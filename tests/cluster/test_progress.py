"""Rates that a run shows while it goes."""

import pytest

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
