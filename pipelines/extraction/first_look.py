"""What can be wrong with an extraction's settings and paths, found before torch is imported and before a cluster is started."""

import importlib.util
from pathlib import Path

from pipelines.config import ConfigError, require_out
from pipelines.extraction.config import ExtractConfig
from pipelines.extraction.continued import member_rules
from pipelines.provenance import require_no_run
from storage.inputs import Listing
from storage.paths import Folder
from storage.redaction import redact
from storage.root import read_attributes
from storage.store import FeatureStore
from storage.videos import require_decoder


def is_named_by_timm(model: str) -> bool:
    """Whether the text of timm's files defines a model of this name, and its tag: asked without importing it, which takes
    seconds. Detectors' backbones, which aren't timm's, have names of their own."""
    name, _, tag = model.partition(".")
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations or name.startswith("vitdet"):
        return True
    text = b"".join(path.read_bytes() for path in Path(spec.submodule_search_locations[0], "models").glob("*.py"))
    tagged = (f"{quote}{model}{quote}".encode() for quote in ("'", '"'))
    return f"def {name}(pretrained".encode() in text and (not tag or any(each in text for each in tagged))


def open_finished(config: ExtractConfig) -> FeatureStore:
    """The store that levels are added to. Raises `ConfigError` where it isn't finished, and what `require_decoder` does."""
    store = FeatureStore.open(config.out, config.options)
    if store.status != "complete":
        raise ConfigError(f"--add-level: {store.folder.displayed} isn't finished; the command that began it goes on")
    if store.index.fps:
        require_decoder()
    return store


def find_input(config: ExtractConfig) -> Listing:
    """The input's files. What can be wrong with the settings and needs no model to be told is wrong here.

    Raises `InputError` and `ConfigError`.
    """
    return look_at(config)[0]


def look_at(config: ExtractConfig) -> tuple[Listing, bool]:
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
