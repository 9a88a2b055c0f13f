"""How much upsamplers take at once: out of a GPU's free memory, and on a CPU always the same."""

from collections.abc import Callable, Collection
from typing import TypeAlias

import psutil
import torch

from operators.upsamplers import Upsampler
from operators.upsamplers.protocol import WORKING_BYTES

WITHIN = 0.6
"""The part of the free memory that bounds are kept to: allocators leave gaps, and others may be on the device."""

_LARGEST = 2**40


def free_bytes(device: torch.device, share: float = 1.0) -> int:
    """What may still be allocated on a device, what torch's allocator holds without using it included.

    `share`: where only that part of a GPU is this process's, no more than that part of all that it has. Not of what is free
    just now: a worker that is started anew beside others would then take another batch than the one before it.
    """
    if device.type != "cuda":
        return psutil.virtual_memory().available
    free, total = torch.cuda.mem_get_info(device)
    mine = torch.cuda.memory_allocated(device)
    unused = torch.cuda.memory_reserved(device) - mine
    return min(free + unused, int(share * total) - mine) if share < 1 else free + unused


def allow_within(upsamplers: Collection[Upsampler], peak: Callable[[], int], limit: float) -> int:
    """Let upsamplers take as much at once as is of use to them while `peak`, which counts that, stays within `limit`.

    The allowance, in bytes, is a power of two, so that workers on devices of one kind have the same although their free memory
    differs a little; at least `WORKING_BYTES`, whether that stays within or not.
    """

    def takes(allowance: int) -> int:
        for upsampler in upsamplers:
            upsampler.allow(allowance)
        return peak()

    allowance = _LARGEST
    while (most := takes(allowance)) > limit and allowance > WORKING_BYTES:
        allowance //= 2
    # Where all is done at once, more is of no use.
    while allowance > WORKING_BYTES and takes(allowance // 2) == most:
        allowance //= 2
    takes(allowance)
    return allowance


Call: TypeAlias = tuple[int, int, tuple[int, int], tuple[int, int], tuple[int, int]]
"""What `Upsampler.call_bytes` is asked of: images, channels, the map's cells, the images' pixels, the grid."""


def allow_alone(upsampler: Upsampler, device: torch.device, call: Call, beside: int = 0) -> None:
    """On a GPU, let an upsampler that is measured by itself take what extraction would let it; `beside`: what else is in use."""
    if device.type == "cuda":
        allow_within([upsampler], lambda: beside + upsampler.call_bytes(*call), WITHIN * free_bytes(device))
