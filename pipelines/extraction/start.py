"""How an extraction starts: what is wrong with paths is said before torch is imported, and that happens while Ray starts."""

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from cluster.resources import WorkerPool
from pipelines.config import ConfigError, require_out
from pipelines.executors import RayExecutor, executor_for
from pipelines.extraction.config import ExtractConfig
from pipelines.extraction.continued import member_rules
from pipelines.extraction.schedule import lanes_for
from pipelines.provenance import require_no_run
from storage.inputs import Listing
from storage.paths import Folder
from storage.redaction import redact
from storage.root import read_attributes
from storage.spec import FEWEST_ROWS
from storage.store import FeatureStore
from storage.videos import require_decoder

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
    files, complete = _looked_at(config)  # before a cluster is started: many mistakes end here
    if not config.is_inline and not _is_named_by_timm(config.features.model):
        from pipelines.extraction.prepare import resolve

        resolve(config, files)  # which says what is wrong with the name; where nothing is, no harm is done
    # Of a finished store perhaps nothing is left to do, and no cluster is needed for that.
    meanwhile = None if complete else import_driver
    ahead = workers_ahead(config, likely_tasks(config, files))
    with executor_for(config, plan=config.plan, meanwhile=meanwhile, ahead=ahead) as executor:
        from pipelines.extraction.run import lines

        yield from lines(config, files, executor)


def _is_named_by_timm(model: str) -> bool:
    """Whether the text of timm's files defines a model of this name, and its tag: asked without importing it, which takes
    seconds. Detectors' backbones, which aren't timm's, have names of their own."""
    name, _, tag = model.partition(".")
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations or name.startswith("vitdet"):
        return True
    text = b"".join(path.read_bytes() for path in Path(spec.submodule_search_locations[0], "models").glob("*.py"))
    tagged = (f"{quote}{model}{quote}".encode() for quote in ("'", '"'))
    return f"def {name}(pretrained".encode() in text and (not tag or any(each in text for each in tagged))


def _add_levels(config: ExtractConfig) -> Iterator[str]:
    """`main` for levels that are to be added to a store that is there."""
    config.require_used()
    if not config.out:
        raise ConfigError("no store: give --out the store that the levels are to be added to")
    store = open_finished(config)  # before a cluster is started
    if store.index.fps:
        require_decoder()
    ahead = workers_ahead(config, store.layout.n_blocks, LEVEL_WORKER)
    with executor_for(config, plan=config.plan, meanwhile=import_driver, ahead=ahead) as executor:
        from pipelines.extraction.adding import lines

        yield from lines(config, executor)


def open_finished(config: ExtractConfig) -> FeatureStore:
    """The store that levels are added to. Raises `ConfigError` where it isn't finished."""
    store = FeatureStore.open(config.out, config.options)
    if store.status != "complete":
        raise ConfigError(f"--add-level: {store.folder.displayed} isn't finished; the command that began it goes on")
    return store


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


def import_driver() -> None:
    """The module that drives a run, with torch and timm behind it: 2.5 s of CPU time."""
    from pipelines.extraction import run  # noqa: F401


def find_input(config: ExtractConfig) -> Listing:
    """The input's files. What can be wrong with the settings and needs no model to be told is wrong here.

    Raises `InputError` and `ConfigError`.
    """
    return _looked_at(config)[0]


def _looked_at(config: ExtractConfig) -> tuple[Listing, bool]:
    """`find_input`, and whether the store is there and finished: its root is read once for both."""
    config.require_used()
    require_out(config.out, "a path or URL for the Zarr store")
    member_rules(config)  # raises for columns that can't be carried
    if config.fps is not None:
        require_decoder()
    # Refuses what is there and isn't ours, before anything is written.
    folder = Folder(config.out, config.options)
    attributes = read_attributes(folder)
    if attributes is None:
        require_no_run(folder, "store")
    if itself := [url for url in config.data if Folder(url, config.options).url == folder.url]:
        raise ConfigError(
            f"--out {redact(itself[0], config.options)} is also the input (--data); give the store a folder of its own"
        )
    files = config.input.files(config.data, config.options, config.image_member, videos=config.fps is not None)
    return files, attributes is not None and attributes["status"] == "complete"
