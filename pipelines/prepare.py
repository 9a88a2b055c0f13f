"""From settings to an extraction that is ready to run: the model loaded, the input indexed, nothing computed.

`resolve` needs no cluster and finds most mistakes; `prepare` scans the input with an executor's help.
"""

import importlib.metadata
import logging
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.session import ClusterError
from operators.backbone import BackboneError
from operators.upsamplers import UpsamplerError
from pipelines.config import CONTENT_FIELDS, ConfigError, ExtractConfig
from pipelines.models import FeatureModel, ModelBundle, load_described
from pipelines.weights import WeightsUnavailable
from storage.inputs import InputFile, expand_inputs
from storage.paths import Folder, StorageError
from storage.samples import SampleIndex, build_index
from storage.spec import Layout, choose_block_rows
from storage.store import FeatureStore, read_attributes
from storage.tars import MemberRules

logger = logging.getLogger(__name__)

USER_ERRORS = (
    ConfigError,
    StorageError,
    BackboneError,
    UpsamplerError,
    WeightsUnavailable,
    ClusterError,
    FileNotFoundError,
    PermissionError,
)
"""What a person can act on: a program shows the message alone."""


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A config held against the input and the model, before any cluster is asked for anything."""

    config: ExtractConfig
    bundle: ModelBundle
    model: FeatureModel
    "the same model in this process, on the CPU"
    files: tuple[InputFile, ...]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An extraction that is ready to run: everything but the workers."""

    config: ExtractConfig
    bundle: ModelBundle
    model: FeatureModel
    layout: Layout
    index: SampleIndex
    urls: tuple[str, ...]
    "the index's sources with credentials, as this run reads them"

    @property
    def notes(self) -> tuple[str, ...]:
        """What is no mistake, and who reads the features should know; kept in the store's attributes."""
        return tuple(self.bundle.unfamiliar(self.bundle.spec, self.model.backbone.patch))

    def create_store(self) -> FeatureStore:
        """Create or continue the output. Raises `FingerprintMismatch`."""
        public = self.config.public()
        provenance = {"versions": versions(), "config": {name: public[name] for name in CONTENT_FIELDS}}
        if self.notes:
            provenance["notes"] = list(self.notes)
        return FeatureStore.create(
            self.config.out,
            self.bundle.spec,
            self.layout,
            provenance=provenance,
            storage_options=self.config.options,
        )


def resolve(config: ExtractConfig) -> Resolved:
    """Find the input's files and load the model: what can be wrong with the settings is wrong here.

    Raises `InputError`, `ConfigError`, `BackboneError`, `UpsamplerError`, `WeightsUnavailable`.
    """
    if not config.out:
        raise ConfigError("no output: give --out a path or URL for the Zarr store")
    # Refuses what is there and isn't ours, before anything is written.
    read_attributes(Folder(config.out, config.options))
    files = expand_inputs(config.data, config.options)
    bundle, model = load_described(
        config,
        config.input_size,
        ragged=config.ragged,
        geometry=config.geometry,
        crop_pct=config.crop_pct if config.geometry == "crop" else 1.0,
        jpeg_draft=config.jpeg_draft,
    )
    for note in bundle.unfamiliar(bundle.spec, model.backbone.patch):
        logger.warning("%s", note)
    return Resolved(config=config, bundle=bundle, model=model, files=tuple(files))


def prepare(resolved: Resolved, executor: Any) -> Prepared:
    """Index the input, or check the index that is there. Raises `InputError`."""
    config, spec = resolved.config, resolved.bundle.spec
    folder, rules = Folder(config.out, config.options), MemberRules(image=config.image_member, carry=config.carry)
    # A plan leaves an index without a store; settings may change between it and the run.
    in_use = read_attributes(folder) is not None
    index = index_input(folder, resolved.files, rules, config.limit, executor, config.options, in_use=in_use)
    block_rows = config.block_rows or choose_block_rows(index.n_rows, spec)
    return Prepared(
        config=config,
        bundle=resolved.bundle,
        model=resolved.model,
        layout=Layout(n_rows=index.n_rows, block_rows=block_rows, index=index.digest),
        index=index,
        urls=tuple(file.url for file in resolved.files[: len(index.sources)]),
    )


def index_input(
    folder: Folder,
    files: Sequence[InputFile],
    rules: MemberRules,
    limit: int | None,
    executor: Any,
    options: Mapping[str, Any],
    *,
    in_use: bool,
) -> SampleIndex:
    """Index the input below `folder`, or check the index that is there against it if that is in use. Raises `InputError`.

    `executor` scans tars (pipelines/executors.py).
    """
    index = build_index(folder, files, lambda some: executor.scan(some, rules, options), limit, rules, in_use=in_use)
    for source in index.sources:
        if source.problems:
            logger.warning("%s: %s", source.url, source.problems)
    return index


def versions() -> dict[str, str]:
    """Software that made the numbers."""
    names = ("ray", "torch", "torchvision", "timm", "zarr", "numcodecs", "pillow", "numpy", "pyarrow", "fsspec")
    found = {name: importlib.metadata.version(name) for name in names}
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {"python": platform.python_version(), **found, "raylift_commit": commit or "unknown"}


def default_batch(config: ExtractConfig, layout: Layout, device: str) -> int:
    """Images per forward that workers start from; they take fewer where memory is short."""
    return min(config.batch or (64 if device == "cuda" else 16), layout.block_rows)
