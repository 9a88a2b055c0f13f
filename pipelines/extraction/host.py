"""The way of a batch's rows from the device that made them to the host, which stores them.

On a GPU they are quantised there, where they are to be, and copied into pinned memory on a stream of their own, so that the
next batch is computed meanwhile. On a CPU they are where they have to be, and nothing is copied.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pipelines.features.model import Maps, Timings
from storage.spec import Level

Item = TypeVar("Item")


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
    arrived: torch.cuda.Event | None
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

    def ahead(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The batches; on a GPU each once the one after it was begun."""
        begun: list[Item] = []
        for batch in batches:
            begun.append(batch)
            if self._stream is None or len(begun) > 1:
                yield begun.pop(0)
        yield from begun


def quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 rows [B, ..., C] as int8, and their scales float32 [B, C]: the same bytes as `storage.shards.encode_row` gives.

    Division, rounding half to even and the largest value are exact in IEEE arithmetic, on GPUs as on CPUs.
    """
    values = rows.float()
    # Divided by a tensor: by a number, torch multiplies with its reciprocal on GPUs, which is rounded otherwise.
    scale = values.abs().flatten(1, -2).amax(dim=1) / torch.full((), 127.0, device=rows.device)
    steps = torch.where(scale > 0, scale, 1.0).view(len(rows), *[1] * (rows.ndim - 2), -1)
    return (values / steps).round().to(torch.int8), scale
