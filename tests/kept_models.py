"""Networks of timm's that were made before, copied: a third of the time, and small runs make two each."""

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.overrides import _get_current_function_mode

SMALL = "test_"
"""How the names of timm's networks for tests begin."""

MOST = 32
"""Networks that are kept: 1.5 MB each."""


def kept(create_model: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """`timm.create_model`, which gives the same as it did for the same arguments and the same state of the random numbers, and
    leaves these as it did."""
    made: dict[bytes, tuple[nn.Module, torch.Tensor]] = {}

    def create(name: str, *args: object, **kwargs: object) -> nn.Module:
        if not name.startswith(SMALL):
            return create_model(name, *args, **kwargs)
        # What is drawn with, and whether at all: `operators.timm_models` leaves it out where all weights are replaced.
        drawing = type(_get_current_function_mode()).__name__, str(torch.get_default_device())
        key = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
        with torch._C.DisableTorchFunction():  # which would see each tensor that is read or copied
            try:
                _add(key, (name, args, kwargs, drawing))
            except TypeError:
                key = None
        if key is None:
            return create_model(name, *args, **kwargs)
        if (asked := key.digest()) in made:
            model, state = made[asked] = made.pop(asked)
            torch.set_rng_state(state)
            with torch._C.DisableTorchFunction():
                return copied(model)
        model = create_model(name, *args, **kwargs)
        made[asked] = copied(model), torch.get_rng_state()
        if len(made) > MOST:
            del made[next(iter(made))]
        return model

    return create


def _add(key: "hashlib._Hash", value: object) -> None:
    """Make a digest depend on arguments, of which some are tensors. Raises `TypeError` for what its text doesn't tell."""
    if isinstance(value, torch.Tensor):
        key.update(f"{value.dtype} {tuple(value.shape)}".encode())
        key.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy() if value.numel() else b"")
    elif isinstance(value, Mapping):
        key.update(b"{")
        for name, each in value.items():
            _add(key, (name, each))
    elif isinstance(value, list | tuple):
        key.update(f"[{len(value)}".encode())
        for each in value:
            _add(key, each)
    elif value is None or isinstance(value, str | int | float):
        key.update(f"{value!r};".encode())
    else:
        raise TypeError(type(value))


def copied(module: nn.Module) -> nn.Module:
    """A module with weights of its own. `copy.deepcopy` takes longer than making it anew."""
    new = module.__class__.__new__(module.__class__)
    own = {name: value.copy() if isinstance(value, dict | list | set) else value for name, value in vars(module).items()}
    own["_parameters"] = {
        name: None if value is None else nn.Parameter(value.detach().clone(), value.requires_grad)
        for name, value in module._parameters.items()
    }
    own["_buffers"] = {name: None if value is None else value.clone() for name, value in module._buffers.items()}
    own["_modules"] = {name: None if each is None else copied(each) for name, each in module._modules.items()}
    vars(new).update(own)
    return new
