"""How an extraction starts: paths are looked at before anything large is imported, and that happens while Ray starts."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

from cluster.resources import WorkerPool
from cluster.session import starts_one
from pipelines.actors import importing
from pipelines.config import ConfigError
from pipelines.executors import RayExecutor, executor_for
from pipelines.extraction.config import ExtractConfig
from pipelines.extraction.first_look import is_named_by_timm, look_at, open_finished
from pipelines.extraction.schedule import lanes_for
from storage.inputs import Listing
from storage.spec import FEWEST_ROWS

WORKER, LEVEL_WORKER = (f"{__package__}.{name}" for name in ("worker", "level_worker"))
"""Modules that do tasks, with torch behind them."""

PHOTOGRAPH_BYTES = 100_000
"""Of a photograph in a tar, where that is all that can be said."""


def main(config: ExtractConfig) -> Iterator[str]:
    """Run the extraction, or only plan it, and give what there is to say of it, line by line. Raises what `extract` raises."""
    if config.json and not config.plan:
        raise ConfigError("--json is how --plan is printed; give --plan, too, or leave --json out")
    if config.add_level:
        yield from _add_levels(config)
        return
    files, complete = look_at(config)  # before a cluster is started: many mistakes end here
    if not config.is_inline and not is_named_by_timm(config.features.model):
        from pipelines.extraction.prepare import resolve

        resolve(config, files)  # which says what is wrong with the name; where nothing is, no harm is done
    # Of a finished store perhaps nothing is left to do, and no cluster is needed for that.
    # Where workers are started ahead, one of them loads the model, and the driver needs no torch.
    alone = config.decode_on != "cluster" and starts_one(config.cluster.ray_address)
    meanwhile = None if complete else import_lean_driver if alone else import_driver
    ahead = workers_ahead(config, likely_tasks(config, files))
    with executor_for(config, plan=config.plan, meanwhile=meanwhile, ahead=ahead) as executor:
        from pipelines.extraction.run import lines

        yield from lines(config, files, executor)


def _add_levels(config: ExtractConfig) -> Iterator[str]:
    """`main` for levels that are to be added to a store that is there."""
    config.require_used()
    if not config.out:
        raise ConfigError("no store: give --out the store that the levels are to be added to")
    store = open_finished(config)  # before a cluster is started
    ahead = workers_ahead(config, store.layout.n_blocks, LEVEL_WORKER)
    with executor_for(config, plan=config.plan, meanwhile=import_driver, ahead=ahead) as executor:
        from pipelines.extraction.adding import lines

        yield from lines(config, executor)


def workers_ahead(config: ExtractConfig, tasks: int, module: str = WORKER) -> Callable[[RayExecutor], None]:
    """What has an executor start the workers of so many tasks, which import `module` while the driver prepares the run."""

    def start(executor: RayExecutor) -> None:
        def size() -> WorkerPool:
            pool = executor.pool(config.cluster.request())
            # How many calls will overlap depends on the size of rows, which nobody knows yet.
            return replace(pool, size=min(pool.size, tasks), calls=lanes_for(pool.device, 1).calls)

        if config.decode_on != "cluster":
            executor.start_ahead(size, module)

    return start


def likely_tasks(config: ExtractConfig, files: Listing) -> int:
    """About how many tasks there will be, before anything is read of the files: 1 at least."""
    images = sum(1 if file.is_image else file.size / PHOTOGRAPH_BYTES for file in files)
    return math.ceil(min(images, config.limit or math.inf) / (config.block_rows or FEWEST_ROWS)) or 1


def import_lean_driver() -> None:
    """The module that drives a run, and zarr-python, by which a store is begun: 0.4 s of CPU time."""
    with importing():
        from pipelines.extraction import run  # noqa: F401
        from storage import metadata  # noqa: F401


def import_driver() -> None:
    """The module that drives a run, and what loads a model, with torch and timm behind it: 2.5 s of CPU time.

    From then on torch has a thread for every other core. They wait for each other by spinning: where workers import on the same
    cores, loading a model took four times the CPU time.
    """
    import_lean_driver()
    with importing():
        from pipelines.features import bundle  # noqa: F401
    import torch

    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // 2)))
