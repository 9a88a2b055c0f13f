"""What cells of papers and of grids have in common: settings, doing them side by side or in turn, the boundary between them, and
what is said of those that fail."""

import functools
import logging
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from cluster.resources import WorkerPool, WorkerRequest
from pipelines.actors import WorkersLost
from pipelines.config import (
    ActorsConfig,
    ConfigError,
    Free,
    Held,
    JobConfig,
    absolute,
    flag_of,
    require_at_least,
    require_gpus,
    require_out,
)
from pipelines.executors import Executor
from storage.errors import RayliftError
from storage.paths import Folder, StorageOptions
from storage.redaction import redact

logger = logging.getLogger(__name__)

Order = TypeVar("Order")
Result = TypeVar("Result")


_FORMS = {"data": "DATASET=FOLDER", "backbone": "NAME=TIMM_NAME", "weights": "NAME=WEIGHTS"}


@dataclass(frozen=True, kw_only=True)
class CellsConfig(JobConfig):
    """Runs that tables are made of."""

    out: Free[str] = ""
    """The folder to write or continue: a path or fsspec URL. Each cell is a folder in it, beside the tables and pictures."""
    seeds: Free[tuple[int, ...]] = (0,)
    """Of the trainings, which are done once by each; where a paper has a seed, this is added to it. Tables have the mean over
    them, and the standard deviation."""
    data: Free[tuple[str, ...]] = ()
    """DATASET=FOLDER for each data set: voc=VOC2012 coco=s3://bucket/coco."""
    plan: Free[bool] = False
    """Print what would be done, and what is done already, then stop: nothing is computed or begun, and no cluster is asked."""

    cluster: Held[ActorsConfig] = ActorsConfig()
    cell_cpus: Free[int | None] = None
    """CPUs and threads of one cell; default: 1 on CPU, the node's share per GPU otherwise."""
    cell_gpus: Free[float | None] = None
    """GPUs of one cell; fractions do several on one."""
    max_failures: Free[int] = 3
    """Lost workers or nodes after which a cell is given up; each time, it goes on from what it has kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "cell_cpus")
        require_at_least(0, self, "max_failures", "seeds")
        require_gpus(self.cell_gpus, "--cell-gpus")
        self.require_different("seeds")

    @property
    def folder(self) -> Folder:
        """Of `out`. Raises `ConfigError`."""
        require_out(self.out, "a path or URL for the tables")
        return Folder(absolute(self.out), self.options)

    @property
    def folders(self) -> dict[str, str]:
        """`data` by data set. Raises `ConfigError`."""
        return {name: absolute(url) for name, url in self.pairs("data").items()}

    def require_different(self, *names: str) -> None:
        """Raises `ConfigError` for settings that must be given, each value once."""
        for name in names:
            given = getattr(self, name)
            if not given:
                raise ConfigError(f"{flag_of(name)}: give at least one")
            if len(set(given)) < len(given):
                raise ConfigError(f"{flag_of(name)} {' '.join(map(str, given))}: must be different ones")

    def pairs(self, name: str, form: str = "") -> dict[str, str]:
        """A setting whose values are NAME=VALUE, by name; `form`: how they are written. Raises `ConfigError`."""
        found: dict[str, str] = {}
        for text in getattr(self, name):
            key, equals, value = text.partition("=")
            shown = f"{flag_of(name)} {redact(text, self.options)}"
            if not key or not equals or not value:
                raise ConfigError(f"{shown}: use {form or _FORMS[name]}")
            if found.setdefault(key, value) != value:
                raise ConfigError(f"{shown}: {key} is {redact(found[key], self.options)} already; give each once")
        return found

    def require_known(self, **known: Mapping[str, object] | set[str] | list[str]) -> None:
        """Raises `ConfigError` for names of NAME=VALUE settings that there aren't; `known`: those there are, by setting."""
        for name, names in known.items():
            if unknown := self.pairs(name).keys() - set(names):
                shown = redact(", ".join(sorted(unknown)), self.options)
                raise ConfigError(f"{flag_of(name)} {shown}: there are {', '.join(sorted(names))}")

    def require_places(self) -> None:
        """Raises `ConfigError` where a data set's folder isn't there, as far as this machine sees it."""
        for name, url in self.pairs("data").items():
            if name != "photos":  # which are tars
                require_folder(f"--data {name}", url, self.options)

    def worker_request(self, actors: int | None, gpus: float | None) -> WorkerRequest:
        """Workers that do a cell each."""
        return WorkerRequest(device=self.cluster.device, actors=actors, cpus=self.cell_cpus, gpus=gpus, called="cell")


def require_folder(flag: str, url: str, options: StorageOptions) -> None:
    """Raises `ConfigError` where a path that was given is no folder here."""
    path = absolute(url) if url else ""
    if path and "://" not in path and not Path(path).is_dir():
        raise ConfigError(f"{flag} {redact(url, options)}: there is no such folder")


def done_side_by_side(
    config: CellsConfig,
    executor: Executor,
    do: Callable[[Order], Result],
    orders: Callable[[WorkerPool], Sequence[Order]],
    given_up: Callable[[Order, str], Result],
) -> Iterator[Result]:
    """Results of `do` as cells end, on the workers that the settings ask for; `orders`: the cells, as a pool is to do them;
    `given_up`: what becomes of one whose workers were lost too often, in words."""

    def lost(order: Order, error: WorkersLost) -> Result:
        return given_up(order, f"given up after {config.max_failures} restarts (--max-failures): {error}")

    pool = executor.pool(config.worker_request(config.cluster.actors, config.cell_gpus))
    worker = functools.partial(_worker, do, None if config.is_inline else pool.cpus)
    yield from executor.pieces(worker, orders(pool), pool, restarts=config.max_failures, lost=lost)


def _worker(do: Callable[[Order], Result], threads: int | None) -> Callable[[Order], Result]:
    """`do` with the threads that a pool has for each cell; without a number, with those of this process."""
    if threads is not None:
        torch.set_num_threads(threads)
    return do


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
