"""What doing cells has in common, a paper's or a grid's: the boundary between them, and what is said of those that fail."""

import logging
import textwrap
from collections.abc import Callable
from typing import TypeVar

import torch

from cluster.resources import WorkerPool
from pipelines.actors import WorkersLost
from storage.errors import RayliftError
from storage.paths import StorageOptions
from storage.redaction import redact

logger = logging.getLogger(__name__)

Order = TypeVar("Order")
Result = TypeVar("Result")


class CellsFailed(RayliftError):
    """Some cells have no result; all others are done."""

    exit_code = 1


def attempted(name: str, do: Callable[[], Result], failed: Callable[[str], Result], options: StorageOptions) -> Result:
    """What `do` gives; of an error, what `failed` makes of its words: a cell that fails ends no other one."""
    try:
        return do()
    except RayliftError as error:  # in words, which the tables have
        return failed(in_words(error, options))
    except Exception as error:  # the boundary between cells
        logger.exception("%s failed", name)
        return failed(in_words(error, options))


def in_words(error: Exception, options: StorageOptions) -> str:
    """An error as tables have it: without secrets, and not too long for a line."""
    return textwrap.shorten(redact(f"{type(error).__name__}: {error}", options), 600, placeholder=" ...")


def given_up(error: WorkersLost, restarts: int) -> str:
    """What is said of a cell whose workers were lost too often."""
    return f"given up after {restarts} restarts (--max-failures): {error}"


def with_threads_of(pool: WorkerPool | None, do: Callable[[Order], Result]) -> Callable[[Order], Result]:
    """`do` with the threads that a pool has for each cell; without a pool, with those of this process."""
    if pool is not None:
        torch.set_num_threads(pool.cpus)
    return do
