"""A GPU that isn't there, for tests of what is computed where.

torch's fake mode makes `cuda` a device that tensors can be on without a driver; `Gpu` gives such tensors values, which it
computes on the CPU. So all code runs as on a GPU, branches that look at values included, and its results can be held against
the CPU's. As on a GPU, a tensor there has no `numpy()`, and can't be computed with one that is on the CPU; whatever comes to the
host is noted. There is no backward pass: torch's engine wants a driver.
"""

import contextlib
import itertools
import math
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

ROOT = Path(__file__).resolve().parent.parent

INDEXED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)
"""What takes numbers of places from the host, too."""


SIZED_BY_VALUES = (
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
)


class There(Tensor):
    """A tensor on the GPU."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "There":
        return Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device("cuda", 0),
        )

    def __init__(self, held: Tensor):
        self.held = held

    def __repr__(self) -> str:
        return f"There({tuple(self.shape)}, {self.dtype})"

    def numpy(self, *, force: bool = False):
        raise TypeError("can't convert a tensor on the GPU to numpy")

    def tolist(self):
        return self.cpu().tolist()

    def record_stream(self, stream):
        """Its memory isn't used again before the stream is done with it."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} of a GPU's tensor, after the GPU was gone")


def _held(value):
    return value.held if isinstance(value, There) else value


@dataclass
class Gpu(TorchDispatchMode):
    """What runs under it may use the device `cuda`."""

    to_host: list[tuple[int, ...]] = field(default_factory=list)
    "shapes of what was brought to the host, numbers that were asked for one by one included: ()"
    waits: int = 0
    """how often the host waited for the GPU: what is copied from or to it, but for pinned memory where nobody was to wait, and
    results whose size depends on values"""
    where: list[str] = field(default_factory=list)
    "our lines that waited"
    pinned: list[Tensor] = field(default_factory=list)
    "host memory that a GPU can copy by itself"

    def __post_init__(self):
        super().__init__()

    @property
    def largest(self) -> int:
        """Values of the largest tensor that was brought to the host."""
        return max(map(math.prod, self.to_host), default=0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        device = kwargs.get("device")
        there = any(isinstance(each, There) for each in tensors) if device is None else torch.device(device).type == "cuda"
        if func is aten._fused_sdp_choice.default:
            return SDPBackend.MATH.value
        if func is aten._local_scalar_dense.default and there:
            self.to_host.append(())
            self._wait()
        elif func in (aten._to_copy.default, aten.copy_.default):
            there = self._copied(func, args, kwargs, there)
        elif func not in INDEXED or not isinstance(args[0], There):
            _require_one_device(func, tensors)
        if there and (func in SIZED_BY_VALUES or (func in INDEXED and _by_mask(args[1]))):
            self._wait()
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        pinned = kwargs.pop("pin_memory", None)
        with unset_fake_temporarily():
            out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if pinned:
            self.pinned.append(out)
        if any(each.alias_info is not None and each.alias_info.is_write for each in func._schema.arguments):
            return kwargs["out"] if "out" in kwargs else args[0]
        return tree_map(lambda each: There(each) if there and isinstance(each, Tensor) else each, out)

    def _copied(self, func, args, kwargs, there: bool) -> bool:
        """Notes what comes to the host; whether the result is on the GPU."""
        source, host = args[0], args[0]
        asked = kwargs.get("non_blocking", False)
        if func is aten.copy_.default:
            there, source = isinstance(args[0], There), args[1]
            host, asked = (source if there else args[0]), asked or args[2:] == (True,)
        if isinstance(source, There) and not there:
            self.to_host.append(tuple(source.shape))
        if isinstance(source, There) != there and not (asked and self._is_pinned(host)):
            self._wait()
        return there

    def _is_pinned(self, host: Tensor) -> bool:
        return any(host.untyped_storage().data_ptr() == each.untyped_storage().data_ptr() for each in self.pinned)

    def _wait(self) -> None:
        self.waits += 1
        own = [f"{ROOT / folder}/" for folder in ("cluster", "jobs", "operators", "pipelines", "storage")]
        ours = [each for each in traceback.extract_stack() if each.filename.startswith(tuple(own))]
        self.where += [f"{Path(ours[-1].filename).relative_to(ROOT)}: {ours[-1].line}"] if ours else []


def _by_mask(indices) -> bool:
    return any(isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in indices)


def _require_one_device(func, tensors: list[Tensor]) -> None:
    here = [each for each in tensors if each.ndim and not isinstance(each, There)]
    if here and len(here) < len([each for each in tensors if each.ndim]):
        raise RuntimeError(f"{func}: tensors on the GPU, and {[tuple(each.shape) for each in here]} on the CPU")


class _Event:
    """Stands for a moment of the GPU's work; its clock ticks once for each."""

    ticks = itertools.count(1)

    def __init__(self, enable_timing: bool = False):
        self.at = 0

    def record(self, stream: object = None) -> None:
        self.at = next(self.ticks)

    def synchronize(self) -> None:
        assert self.at, "nobody recorded it"

    def elapsed_time(self, other: "_Event") -> float:
        return 1000.0 * (other.at - self.at)


class _Stream:
    """Stands for a queue of the GPU's work."""

    def __init__(self, device: object = None):
        self.waited = 0

    def wait_stream(self, other: object) -> None:
        self.waited += 1

    def record_event(self) -> _Event:
        event = _Event()
        event.record()
        return event


@contextlib.contextmanager
def _without_driver(free: int) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))  # its operations are for GPUs alone
        patch.setattr(torch.cuda, "Event", _Event)
        patch.setattr(torch.cuda, "Stream", _Stream)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: _Stream())
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, free))
        # BatchNorm would be one of cuDNN's operators, which the CPU hasn't.
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        # Else a module keeps its parameters' class, which isn't the GPU's.
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        yield


@contextlib.contextmanager
def shapes_on_a_gpu(free: int) -> Iterator[None]:
    """A GPU with so many bytes free whose tensors have no values: nothing is computed, so that sizes may be those of real use."""
    with _without_driver(free), FakeTensorMode(allow_non_fake_inputs=True):
        yield


@contextlib.contextmanager
def pretended_gpu(free: int = 80 * 2**30) -> Iterator[Gpu]:
    """So many bytes of its memory are free. Attention is plain sums within, as it must be on the CPU that is compared with it."""
    with _without_driver(free), sdpa_kernel(SDPBackend.MATH), FakeTensorMode(allow_non_fake_inputs=True), Gpu() as gpu:
        yield gpu
