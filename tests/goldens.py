"""What several tests need of golden files (tests/golden/README.md) and of memory."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from torch.utils._python_dispatch import TorchDispatchMode

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


def evaluation_golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of `eval_<name>.npz`."""
    with np.load(GOLDEN / f"eval_{name}.npz", allow_pickle=False) as file:
        return dict(file)


def golden_file(name: str) -> Path:
    """The golden file called so: small ones lie in tests/golden, large ones beside the checkout alone; skips where it isn't."""
    found = [folder / name for folder in (GOLDEN, SHARED / "golden") if (folder / name).is_file()]
    return found[0] if found else pytest.skip(f"../shared/golden/{name} is not here")


def tensor_golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """The tensors of `<name>.safetensors`, and the settings that they were made with."""
    with safetensors.safe_open(golden_file(f"{name}.safetensors"), "pt") as file:
        config = json.loads((file.metadata() or {}).get("config", "{}"))
        return {key: file.get_tensor(key) for key in file.keys()}, config  # noqa: SIM118


def under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Those whose names begin with `prefix`, by the rest of their names."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def hash_tensor(key: str, position: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The goldens' rule for weights at published sizes (README_lift_vitup.md, "Hash weights")."""
    if not shape:
        return torch.tensor(7)
    wrap = 2**32 - 1
    x = 2654435761 * torch.arange(torch.Size(shape).numel()) + 40503 * position + 12345 & wrap
    x = (x ^ x >> 16) * 2246822519 & wrap
    x = (x ^ x >> 13) * 3266489917 & wrap
    u = (x ^ x >> 16).double() / 2**32 - 0.5
    if len(shape) > 1:
        values = u * (12 / torch.Size(shape[1:]).numel()) ** 0.5
    elif key.endswith(("running_mean", "bias")):
        values = 0.4 * u
    else:
        values = 1 + (0.8 if key.endswith("running_var") else 0.4) * u
    return values.float().reshape(shape)


class Allocations(TorchDispatchMode):
    """The largest tensor that an operation gave, in bytes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out
