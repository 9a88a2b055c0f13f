"""How an extraction starts: what is wrong with paths is said before torch is imported, and that happens while Ray starts."""

from collections.abc import Iterator

from pipelines.config import ConfigError, require_out
from pipelines.executors import executor_for
from pipelines.extraction.config import ExtractConfig
from pipelines.extraction.continued import member_rules
from pipelines.provenance import require_no_run
from storage.inputs import Listing
from storage.paths import Folder
from storage.redaction import redact
from storage.root import read_attributes
from storage.store import FeatureStore
from storage.videos import require_decoder


def main(config: ExtractConfig) -> Iterator[str]:
    """Run the extraction, or only plan it, and give what there is to say of it, line by line. Raises what `extract` raises."""
    if config.json and not config.plan:
        raise ConfigError("--json is how --plan is printed; give --plan, too, or leave --json out")
    if config.add_level:
        yield from _add_levels(config)
        return
    files, complete = _looked_at(config)  # before a cluster is started: many mistakes end here
    # Of a finished store perhaps nothing is left to do, and no cluster is needed for that.
    meanwhile = None if complete else import_driver
    with executor_for(config, plan=config.plan, meanwhile=meanwhile) as executor:
        from pipelines.extraction.run import lines

        yield from lines(config, files, executor)


def _add_levels(config: ExtractConfig) -> Iterator[str]:
    """`main` for levels that are to be added to a store that is there."""
    config.require_used()
    if not config.out:
        raise ConfigError("no store: give --out the store that the levels are to be added to")
    if open_finished(config).index.fps:  # before a cluster is started
        require_decoder()
    with executor_for(config, plan=config.plan, meanwhile=import_driver) as executor:
        from pipelines.extraction.adding import lines

        yield from lines(config, executor)


def open_finished(config: ExtractConfig) -> FeatureStore:
    """The store that levels are added to. Raises `ConfigError` where it isn't finished."""
    store = FeatureStore.open(config.out, config.options)
    if store.status != "complete":
        raise ConfigError(f"--add-level: {store.folder.displayed} isn't finished; the command that began it goes on")
    return store


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
