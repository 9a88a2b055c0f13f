"""Training steps on a GPU that isn't there (`pretended_gpu`): all tensors are where they must be, losses are the CPU's, and the
host waits once a step, for the loss that it logs.

torch's backward pass wants a driver; here it does nothing, so that gradients are zero.
"""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from operators.upsamplers.vit_up.head import TokenCache
from pipelines.executors import InlineExecutor
from pipelines.training.data import load
from pipelines.training.loop import Group, Trainer
from pipelines.training.objectives import OBJECTIVES
from tests.pretended_gpu import pretended_gpu
from tests.readout_runs import OF_TASK, prepared, training

pytestmark = pytest.mark.usefixtures("without_gradients")

OWN: dict[str, dict[str, object]] = {
    "lift": {"size": 64},
    "jafar": {"size": 64},
    "featup": {"size": 64, "jitters": 2, "radius": 1},
    "vit_up": {
        "size": 128, "teacher_sizes": (32, 64, 128), "hidden_size": 64, "query_size": 128, "hidden_states": (0, 3, 6),
        "warmup_steps": 2,
    },
}  # fmt: skip

LOGGED = "pipelines/training/loop.py: loss, divisor, *counts = flat[:_TOTALS].tolist()"
"""Which also says whether to go on."""

LABELS = "operators/objectives/dense.py: for value in torch.stack(labels.aminmax()).tolist():"
"""A label without a class is named, where a GPU would lose its process over it."""

BESIDE: dict[str, list[str]] = {
    "segmentation": [LABELS, "operators/objectives/dense.py: return LossSum(total, float(counted.sum()))"],
    "depth": 2 * ["operators/objectives/dense.py: ratio = _log_ratio(predicted_B1HW[:, 0][valid], depth_BHW[valid])"],
    "boundaries": [],
    "detection": [
        "operators/readouts/centernet.py: return CenterNetLoss(heat=LossSum(heat, float(heat_BHW.numel())), "
        "sizes=LossSum(errors.sum(), float(counted.sum())))"
    ],
    "instances": [LABELS],
}
"""What else readouts' losses wait for, by task: how many pixels count, and which."""


@pytest.fixture
def without_gradients(monkeypatch):
    monkeypatch.setattr(Tensor, "backward", lambda *_, **__: None)
    monkeypatch.setattr(TokenCache, "backward", lambda *_: None)
    with torch.no_grad():
        yield


def images(tmp_path, make_tars, name: str):
    settings: dict[str, object] = {
        "data": (make_tars(count=1, each=5),), "out": str(tmp_path / name), "val_rows": 1, "model": "test_vit.r160_in1k",
        "weights": "random", "precision": "fp32", "net_precision": "fp32", "batch": 2, "epochs": 3, "executor": "inline",
        "device": "cpu",
    }  # fmt: skip
    return prepared(OBJECTIVES[name].of(**settings, **OWN[name]))


def two_steps(setup, device: str, gpu=None) -> list[float]:
    """Losses of the first two steps; with `gpu`, the second one's waits are left in it."""
    stream = load(setup.images, setup.order.micro_batches(0), InlineExecutor(), 1)
    steps = [next(stream) for _ in range(2)]
    stream.close()
    trainer, losses = Trainer(setup, Group(), torch.device(device)), []
    for loaded in steps:
        if gpu is not None:
            gpu.where.clear()
        losses.append(trainer._update(trainer._accumulate(loaded))[0])
    return losses


def held(setup) -> list[str]:
    """What the second step waited for beside what is logged."""
    with sdpa_kernel(SDPBackend.MATH):
        expected = two_steps(setup, "cpu")
    with pretended_gpu() as gpu:
        found = two_steps(setup, "cuda", gpu)

    np.testing.assert_allclose(found, expected, rtol=1e-5)
    *found_beside, last = gpu.where
    assert last == LOGGED
    return found_beside


@pytest.mark.parametrize("name", OWN)
def test_a_step_of_an_upsampler_waits_once(tmp_path, make_tars, name):
    assert held(images(tmp_path, make_tars, name)) == []


@pytest.mark.parametrize("task", OF_TASK)
def test_a_step_of_a_readout_waits_for_what_counts(sets, tmp_path, task):
    assert held(prepared(training(sets, tmp_path / "run", task, side=112, batch=2))) == BESIDE[task]


def test_every_objective_is_tried():
    assert OWN.keys() == OBJECTIVES.keys()
    assert BESIDE.keys() == OF_TASK.keys()
