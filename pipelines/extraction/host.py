"""The way of a batch's images from the host to the device that computes, and of its rows back to the host, which stores them.

On a GPU both are copied through pinned memory, each on a stream of its own, while other batches are computed; rows are quantised
there, where they are to be. On a CPU they are where they have to be, and nothing is copied.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from operators.transfer import to_device
from pipelines.features.model import FeatureModel, Maps, Timings
from storage.spec import Level


class Arrival(Protocol):
    """What can be waited for; `torch.cuda.Event` is one."""

    def synchronize(self) -> None:
        """Until it has come."""


@dataclass(frozen=True, kw_only=True)
class HostRows:
    """Rows of B images. Arrays may be looked at after `wait`."""

    levels: Mapping[str, np.ndarray]
    "rows by level, [B, *row_shape]: float16 or float32, or int8 where `scales` has the level"
    scales: Mapping[str, np.ndarray]
    "float32 [B, C] of the levels that were quantised on the device"
    bad: np.ndarray
    "bool [B]: features that hold NaN or infinity"
    seconds: Timings
    arrived: Arrival | None
    "when all of it is there; None: it is"

    def wait(self) -> "HostRows":
        """Until all of it is there; gives itself."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self


class HostCopy:
    """Brings rows from a device to the host. Calls may overlap."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, maps: Maps, levels: Sequence[Level]) -> HostRows:
        """Queue the copy behind what makes the maps. Their tensors needn't be kept: their memory is free once it is copied."""
        if self._stream is None:
            arrays = {name: rows.numpy() for name, rows in maps.levels.items()}
            return HostRows(levels=arrays, scales={}, bad=maps.bad.numpy(), seconds=maps.seconds, arrived=None)
        rows, scales = dict(maps.levels), {}
        # Only here: on a CPU the writer's threads do it, a row each.
        for level in levels:
            if level.dtype == "int8":
                rows[level.name], scales[level.name] = quantised(rows[level.name])
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            arrays, of_scales = ({name: self._pinned(each) for name, each in found.items()} for found in (rows, scales))
            bad = self._pinned(maps.bad)
        arrived = self._stream.record_event()
        return HostRows(levels=arrays, scales=of_scales, bad=bad, seconds=maps.seconds, arrived=arrived)

    def _pinned(self, there: Tensor) -> np.ndarray:
        # torch keeps pinned memory for the next one that is as large.
        here = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
        here.copy_(there, non_blocking=True)
        there.record_stream(self._stream)
        return here.numpy()


class Device(Protocol):
    """What computes batches. A simulated one takes the place of a model in `jobs/benchmark.py device`."""

    def begin(self, images: np.ndarray, batch: int) -> HostRows:
        """Give it images, uint8 [B, H, W, 3]; their rows may be waited for in another thread. One call at a time. A task's last
        ones are fewer than its `batch`."""

    def fit_batch(self, batch: int) -> int:
        """`batch`, or as many images as its memory suffices for."""

    def restrain(self) -> bool:
        """Where memory didn't suffice: have it take less at once beside the batch. Whether it took more."""

    def is_lost(self) -> bool:
        """Whether no process can use it any more that has used it so far: after an illegal access, a failed assertion, or an
        error of its memory, each call gives that same error."""


class ModelDevice:
    """A model on its device, with the copies to it and from it."""

    def __init__(self, model: FeatureModel):
        self.model = model
        self._up = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        self._down = HostCopy(model.device)

    def begin(self, images: np.ndarray, batch: int) -> HostRows:
        count = len(images)
        if self.model.is_compiled and count < batch:  # for one shape
            images = np.concatenate([images, np.zeros((batch - count, *images.shape[1:]), images.dtype)])
        return self._down.begin(self.model(self._there(images)).first(count), self.model.spec.levels)

    def begin_stored(self, maps: np.ndarray, images: np.ndarray | None) -> HostRows:
        """As `begin`, of stored maps [B, h, w, C] instead of the backbone's, which doesn't run; with images, where levels need
        them."""
        return self._down.begin(self.model.from_stored(maps, images), self.model.spec.levels)

    def fit_batch(self, batch: int) -> int:
        return self.model.fit_batch(batch)

    def restrain(self) -> bool:
        return self.model.restrain()

    def is_lost(self) -> bool:
        if self._up is None:
            return False
        try:
            torch.cuda.synchronize(self.model.device)
        except RuntimeError:
            return True
        return False

    def _there(self, images: np.ndarray) -> Tensor:
        """The images on the device, whose work on earlier batches isn't waited for."""
        if self._up is None:
            return torch.from_numpy(images)
        with torch.cuda.stream(self._up):
            there = to_device(images, self.model.device)
        computing = torch.cuda.current_stream()
        computing.wait_stream(self._up)
        there.record_stream(computing)
        return there


def quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 rows [B, ..., C] as int8, and their scales float32 [B, C]: the same bytes as `storage.shards.encode_row` gives.

    Division, rounding half to even and the largest value are exact in IEEE arithmetic, on GPUs as on CPUs.
    """
    values = rows.float()
    # Divided by a tensor: by a number, torch multiplies with its reciprocal on GPUs, which is rounded otherwise.
    scale = values.abs().flatten(1, -2).amax(dim=1) / torch.full((), 127.0, device=rows.device)
    steps = torch.where(scale > 0, scale, 1.0).view(len(rows), *[1] * (rows.ndim - 2), -1)
    return (values / steps).round().to(torch.int8), scale
