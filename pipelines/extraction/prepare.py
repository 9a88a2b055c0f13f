"""From settings to an extraction that is ready to run: the model loaded, the input indexed, nothing computed.

`resolve` needs no cluster and finds most mistakes; `prepare` scans the input with an executor's help.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster.resources import WITHOUT_BF16, WorkerPool
from pipelines.config import ConfigError
from pipelines.executors import Executor, InlineExecutor
from pipelines.extraction.added_levels import with_added_levels
from pipelines.extraction.config import ExtractConfig
from pipelines.extraction.continued import InputUpdate, continue_store, input_of
from pipelines.extraction.first_look import find_input
from pipelines.features.model_bundle import ModelBundle
from pipelines.indexing import is_draft, report_left_out
from pipelines.provenance import versions
from storage.documents import JsonValue
from storage.inputs import Listing
from storage.left_out import LeftOut
from storage.paths import Folder, InputError
from storage.redaction import redact
from storage.root import StoreReplaced, read_attributes
from storage.samples import SampleIndex, move_index
from storage.sources import sources_digest
from storage.spec import FeatureSpec, FingerprintMismatch, Layout, choose_block_rows
from storage.store import FeatureStore

if TYPE_CHECKING:  # it imports torch
    from pipelines.features.model import FeatureModel

logger = logging.getLogger(__name__)


NO_WORKERS = WorkerPool(device="cpu", size=0, cpus=1, gpus=0)
"""Those of a run with nothing to do."""

HERE = InlineExecutor()


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A config held against the input and the model, before any cluster is asked for anything."""

    config: ExtractConfig
    bundle: ModelBundle
    patch: int
    "of the backbone, in pixels"
    files: Listing

    @functools.cached_property
    def model(self) -> "FeatureModel":
        """The same model in this process, on the CPU; a driver whose workers compute needs none."""
        return self.bundle.build("cpu")

    @property
    def notes(self) -> tuple[str, ...]:
        """What is no mistake, and who reads the features should know; kept in the store's attributes."""
        return tuple(self.bundle.unfamiliar(self.bundle.spec, self.patch))


@dataclass(frozen=True, kw_only=True)
class Prepared(Resolved):
    """An extraction that is ready to run: everything but the workers."""

    pool: WorkerPool
    layout: Layout
    index: SampleIndex
    "below the output, or a draft until there is a store"
    urls: tuple[str, ...]
    "the index's sources with credentials, as this run reads them"
    left_out: Mapping[str, LeftOut]
    "what the input holds that is no row, by reason"
    update: InputUpdate | None = None
    "of a store that exists"

    def create_store(self) -> FeatureStore:
        """Create or continue the output. Raises `FingerprintMismatch`, `InputError` and `StoreReplaced` for another run's."""
        settings = self.config.content()
        provenance: dict[str, JsonValue] = {"versions": versions(), "config": settings, "input": self.input_digest}
        if self.notes:
            provenance["notes"] = list(self.notes)
        try:
            store = FeatureStore.create(
                self.config.out,
                self.bundle.spec,
                self.update.before if self.update else self.layout,
                provenance=provenance,
                storage_options=self.config.options,
            )
        except FingerprintMismatch:
            if self.update is None:
                raise
            displayed = Folder(self.config.out, self.config.options).displayed
            raise StoreReplaced(f"{displayed} was changed by another run just now; run the same command again") from None
        if self.update:
            self.update.apply(store)
        else:
            # After the store: of two runs that begin at once, the one whose store it isn't writes nothing.
            self._require_begun_with_this(store)
            self.keep_index(store.put)
        return store

    @functools.cached_property
    def input_digest(self) -> str:
        """`sources_digest` of the input as this run reads it."""
        return sources_digest(self.update.state.sources if self.update else self.index.sources)

    def _require_begun_with_this(self, store: FeatureStore) -> None:
        """Raise `InputError` where another run was quicker and reads other files, which may have the same names and sizes."""
        begun_with = store.root.input or sources_digest(store.index.sources)
        if begun_with != self.input_digest:
            raise InputError(
                f"{store.folder.displayed} was begun by another run just now, with other files than those of this --data; run "
                "the same command again, which compares them, or use another --out"
            )

    def keep_index(self, put: Callable[[str, bytes], None] | None = None) -> None:
        """Save a new index with the output; a plan does so, too, for the run that follows it."""
        if self.update is None and is_draft(self.index):
            move_index(self.index, Folder(self.config.out, self.config.options), put)


def resolve(config: ExtractConfig, files: Listing | None = None, executor: Executor = HERE) -> Resolved:
    """Find the input's files, where they aren't given, and have the model loaded: what can be wrong with the settings is wrong
    here.

    Raises `InputError`, `ConfigError`, `BackboneError`, `UpsamplerError`, `WeightsUnavailable`.
    """
    if files is None:
        files = find_input(config)
    logger.info("loading %s (weights %s)", config.features.model, redact(config.features.weights, config.options))
    bundle, patch = executor.ask(functools.partial(_load, config))
    found = Resolved(config=config, bundle=bundle, patch=patch, files=files)
    for note in found.notes:
        logger.warning("%s", note)
    return found


def _load(config: ExtractConfig) -> tuple[ModelBundle, int]:
    """What workers get of the model, and the backbone's patch in pixels."""
    from pipelines.features.bundle import load_bundle  # here, and not in a driver that has others load it

    bundle, model = load_bundle(config.features, config.options)
    if config.compile != "off":
        model.backbone.require_blocks()
        bundle = replace(bundle, spec=replace(bundle.spec, compiled=True))
    return bundle, model.backbone.patch


def prepare(resolved: Resolved, executor: Executor) -> Prepared:
    """Index the input, or hold it against the store that is there. Nothing is written.

    Raises `ClusterError` for workers that the cluster can't have, before a new input is read, and `InputError`. Where nothing is
    left to do, no workers are asked for.
    """
    config, spec = resolved.config, resolved.bundle.spec
    request = config.cluster.request(spare_cpu=config.decode_on == "cluster")
    folder, given = Folder(config.out, config.options), input_of(config, resolved.files, executor)
    attributes = read_attributes(folder)
    update, bundle = None, resolved.bundle
    if attributes is None:
        pool = executor.pool(request)
        index = given.index(folder, None)
        block_rows = config.block_rows or choose_block_rows(index.n_rows, spec)
        layout = Layout(n_rows=index.n_rows, block_rows=block_rows, index=index.digest)
        urls = index.urls(resolved.files)
    else:
        store = FeatureStore(folder, attributes)
        pool = NO_WORKERS if store.status == "complete" else executor.pool(request)
        bundle = with_added_levels(bundle, store, config.options, load=False)
        update = continue_store(store, bundle.spec, given, config)
        index, urls = update.index, update.state.urls
        layout = replace(update.before, n_rows=index.n_rows, index=index.digest)
        if not pool.size and (config.retry_failed or len(update.done) < layout.n_blocks):
            pool = executor.pool(request)
        bundle = with_added_levels(bundle, store, config.options, load=bool(pool.size) or config.plan)
    require_precision(spec.precision, pool)
    require_decoder(spec, config, pool)
    if pool.size:
        bundle = replace(bundle, arrays=executor.share(bundle.arrays))
    return Prepared(
        config=config,
        bundle=bundle,
        patch=resolved.patch,
        files=resolved.files,
        pool=pool,
        layout=layout,
        index=index,
        urls=urls,
        left_out=report_left_out(index, resolved.files),
        update=update,
    )


def require_precision(precision: str, pool: WorkerPool) -> None:
    """Raises `ConfigError` for bf16 on GPUs that haven't any, of this machine or as the cluster's nodes name them."""
    if precision != "bf16" or pool.device != "cuda":
        return
    import torch

    from operators.backbone import NO_BF16, lacks_bf16

    lacking = [kind for kind in pool.kinds if kind in WITHOUT_BF16]
    if lacking:
        raise ConfigError(f"the cluster has {' and '.join(lacking)}: {NO_BF16}, or other GPUs by --accelerator")
    if not pool.kinds and lacks_bf16(torch.device("cuda")):
        raise ConfigError(f"{torch.cuda.get_device_name()}: {NO_BF16}")


def require_decoder(spec: FeatureSpec, config: ExtractConfig, pool: WorkerPool) -> None:
    """Raises `ConfigError` where JPEGs are decoded on GPUs, and workers that are asked for have none, and `NoNvjpeg`."""
    if spec.jpeg_decoder == "cpu" or not pool.size:
        return
    if pool.device != "cuda" or config.decode_on == "cluster":
        lacking = "these workers have none" if pool.device != "cuda" else "--decode-on cluster decodes where there is none"
        raise ConfigError(
            f"--jpeg-decoder nvjpeg decodes on the GPU of the actor that computes, and {lacking}; a store that is made by it "
            "needs such actors to the end, or --jpeg-decoder cpu in a store of its own"
        )
    from operators.nvjpeg import require_nvjpeg

    require_nvjpeg()


def wanted_batch(config: ExtractConfig, device: str) -> int:
    """Images per forward where neither tasks nor memory are too small for them."""
    return config.batch or (64 if device == "cuda" else 16)


def default_batch(config: ExtractConfig, layout: Layout, device: str) -> int:
    """Images per forward that workers start from; they take fewer where memory is short."""
    return min(wanted_batch(config, device), layout.block_rows)
