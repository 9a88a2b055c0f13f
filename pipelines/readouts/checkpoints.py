"""Trained readouts from where they are kept: a folder with `config.json` and `model.safetensors`, or a training run's.

config.json holds `readout` (`operators.readouts.ReadoutConfig`), `task` (pipelines/readouts/task.py, with its data set), and
`features` (what it was trained on).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter

import torch

from operators.readouts import Readout, ReadoutConfig, ReadoutError, build_readout
from operators.timm_models import weights_digest
from pipelines.features.weights import WeightsUnavailable, read_config, read_state_dict
from pipelines.readouts.instances import CLASSIFIER
from pipelines.readouts.task import Task
from pipelines.readouts.tasks import parse_task
from storage.documents import JsonValue
from storage.paths import Folder, StorageOptions
from storage.runs import named_checkpoint


@dataclass(frozen=True, kw_only=True)
class TrainedReadout:
    """A readout as it is handed to workers."""

    displayed: str
    "where it was, as it may be printed"
    config: ReadoutConfig
    task: Task
    dataset: str
    features: Mapping[str, JsonValue]
    state: Mapping[str, torch.Tensor]
    step: str = ""
    "in words, which of its run's steps it is, where a run was named"

    @property
    def digest(self) -> str:
        """sha256 of its weights."""
        return weights_digest({name: value.numpy() for name, value in self.state.items()})

    def build(self) -> Readout:
        """Ready to run, on the CPU."""
        readout = build_readout(self.config)
        readout.load_state_dict(self.state)
        return readout.eval().requires_grad_(False)


def load_readout(url: str, storage_options: StorageOptions | None = None) -> TrainedReadout:
    """The readout at `url`; of a training run, its best. Raises `WeightsUnavailable` where there is none, or it doesn't fit."""
    named = named_checkpoint(url, storage_options)
    url = named.url
    folder = Folder(url, storage_options)
    state = read_state_dict(url, storage_options)
    found = read_config(folder, "readout")
    try:
        config, task = ReadoutConfig.parse(found["readout"]), dict(found["task"])
        trained = TrainedReadout(
            displayed=folder.displayed,
            config=config,
            dataset=task.pop("dataset"),
            task=parse_task(task),
            features=found["features"],
            step=named.step,
            state={name: value for name, value in state.items() if not name.startswith(f"{CLASSIFIER}.")},
        )
        trained.build()
        # What an evaluation needs to know of the features.
        itemgetter("input_size", "mean", "std", "drawing")(trained.features)
        itemgetter("name", "method")(trained.features["level"])
    except (ValueError, KeyError, TypeError, RuntimeError, ReadoutError) as error:
        raise WeightsUnavailable(f"{folder.displayed} is no trained readout: {type(error).__name__}: {error}") from None
    return trained
