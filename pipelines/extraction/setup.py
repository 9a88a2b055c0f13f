"""What every worker of a run gets. Needs torch once it makes one, so that a driver can hand it on without."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.extraction.config import ExtractConfig
from pipelines.extraction.schedule import Lanes
from pipelines.features.model_bundle import ModelBundle
from storage.paths import Folder
from storage.root import require_same_store
from storage.store import FeatureStore

if TYPE_CHECKING:  # they import torch
    from pipelines.extraction.host import ModelDevice
    from pipelines.extraction.worker import ShardWorker


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """What every worker of a run gets; travels once per node."""

    config: ExtractConfig
    bundle: ModelBundle
    fingerprint: str
    "of the store that the driver continues"
    input_digest: str
    "of the sources as the driver reads them; see `storage.sources.sources_digest`"
    urls: tuple[str, ...]
    run_id: str
    device: str
    share: float
    "of a GPU, that is the worker's"
    threads: int
    batch: int
    lanes: Lanes
    suspects: frozenset[int] = frozenset()
    "blocks that were under way when an earlier run died"
    solo: bool = False
    "one task at a time; what can be found out about a task is found out"

    def __call__(self, *, model: bool = True) -> "ShardWorker":
        from pipelines.extraction.worker import ShardWorker

        return ShardWorker(self, self.model_device() if model else None)

    def model_device(self) -> "ModelDevice":
        """What computes."""
        import torch

        from pipelines.extraction.host import ModelDevice

        torch.set_num_threads(self.threads)
        built = self.bundle.build(self.device, self.share)
        if self.config.compile != "off":
            built.compile(self.config.compile)
        return ModelDevice(built)

    def open_store(self) -> FeatureStore:
        """The store, as its tasks see it. Raises `StoreReplaced`."""
        folder = Folder(self.config.out, self.config.options)
        return FeatureStore(folder, require_same_store(folder, self.fingerprint, self.input_digest))
