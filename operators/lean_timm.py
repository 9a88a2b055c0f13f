"""timm, imported without torch's compiler; all that uses timm here takes it from this module.

torchvision (`ops/roi_align.py`) and timm (`models/naflexvit.py`) import `torch._dynamo` while they are imported: the one
for a question that it asks when a function is called, the other to mark functions that aren't to be compiled. With it come sympy,
torch._inductor and 870 modules: of torch 2.15, 1.3 s of CPU time and 145 MB in every process that uses timm. `torch.compile` and
optimizers import it when they need it, as everywhere.
"""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import torch
from torch._compile import _disable_dynamo

__all__ = ["IMAGENET_DEFAULT_MEAN", "IMAGENET_DEFAULT_STD", "timm"]


class _Deferred(ModuleType):
    """Stands for a module of torch's compiler. Whatever else is asked of it is taken from the module itself."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # what Python's own import statement looks for
            raise AttributeError(name)
        _forget()
        return getattr(importlib.import_module(self.__name__), name)


def _is_compile_supported(device: torch.device | str) -> bool:
    """torch's function of this name, imported when it is called."""
    from torch._dynamo.utils import is_compile_supported

    return is_compile_supported(device)


_DYNAMO, _UTILS = "torch._dynamo", "torch._dynamo.utils"


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """Within it, what only names torch's compiler doesn't import it. Does nothing where it's there already."""
    if _DYNAMO in sys.modules:
        yield
        return
    dynamo, utils = _Deferred(_DYNAMO), _Deferred(_UTILS)
    # What torch's own modules are decorated with: it marks a function when that is first called.
    vars(dynamo).update(utils=utils, disable=lambda fn=None, recursive=True, **_: _disable_dynamo(fn, recursive))
    vars(utils).update(is_compile_supported=_is_compile_supported)
    sys.modules.update({_DYNAMO: dynamo, _UTILS: utils})
    try:
        yield
    finally:
        _forget()


def _forget() -> None:
    """Leave nothing that stands for another module."""
    for name in (_DYNAMO, _UTILS):
        if isinstance(sys.modules.get(name), _Deferred):
            del sys.modules[name]


try:
    with _without_compiler():
        import timm
except ImportError:  # another version wants a part of the compiler that nothing stands for here
    import timm

IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
