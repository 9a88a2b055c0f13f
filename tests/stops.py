"""Runs that stop in their middle, as if they were killed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from pipelines.extraction.worker import ShardWorker


class Died(BaseException):
    """Nothing in a run catches it."""


def dies_after(step: int) -> Callable[[int, list[int]], None]:
    """What a training calls after each step: dies after that one."""

    def on_step(now: int, rows: list[int]) -> None:
        if now == step:
            raise Died

    return on_step


@contextmanager
def dying_at_task(block: int) -> Iterator[None]:
    """Whoever extracts in this process dies when this task is to be computed."""
    original = ShardWorker.compute

    def compute(self, task, loaded):
        if task.block == block:
            raise Died
        return original(self, task, loaded)

    with pytest.raises(Died), pytest.MonkeyPatch.context() as patch:  # noqa: PT012
        patch.setattr(ShardWorker, "compute", compute)
        yield
