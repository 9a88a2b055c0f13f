"""From the host to a device, without waiting for what that has to do."""

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """`values` of the host on a device; on the CPU they may share memory.

    A GPU copies memory that isn't pinned only when it is done with all that it was given, and the host waits for that: so do
    `to(device)` and `torch.tensor(..., device=device)`, of however few numbers. Pinned memory it copies in its turn.
    """
    here = values if isinstance(values, Tensor) else torch.from_numpy(values if values.flags.writeable else values.copy())
    if device.type != "cuda" or here.device.type == "cuda":
        return here.to(device)
    pinned = torch.empty(here.shape, dtype=here.dtype, pin_memory=True)
    pinned.copy_(here)
    return pinned.to(device, non_blocking=True)
