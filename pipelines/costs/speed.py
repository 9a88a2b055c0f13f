"""How fast backbones are, relative to one of them: DeAP's Fig. 7 (specs/evaluation.md 12.7).

Ten batches of eight images in inference mode, random weights, the backbone alone. Each batch has one of the reference beside it:
what else the machine did then was much the same for both.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from operators.backbone import TimmBackbone, autocast, cast_matmul_weights, create_model
from pipelines.costs.clocks import device_name, median_ratio, timed

logger = logging.getLogger(__name__)

MEASURE_S = 120.0
"""Of one backbone: batches that would come later are left out, where it is slow."""


@dataclass(frozen=True, kw_only=True)
class SpeedProtocol:
    """What is measured, and against what."""

    reference: str = "vit_base_patch16_224.mae"
    "timm name"
    reference_size: int = 224
    batch: int = 8
    batches: int = 10
    precision: Literal["bf16", "fp32"] = "bf16"


@torch.inference_mode()
def measure_speed(
    protocol: SpeedProtocol, device: torch.device, model: str, size: int, model_args: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Images per second of a backbone, and of the reference in its time; `relative` is above 1 for faster ones.

    `model_args`: of a network that the name alone doesn't build. Raises `BackboneError`.
    """
    runs = [
        _program(protocol, device, model, size, model_args),
        _program(protocol, device, protocol.reference, protocol.reference_size),
    ]
    for run in runs:
        run()
    own, reference = timed(runs, protocol.batches, MEASURE_S, device)
    found = {
        "images_per_s": protocol.batch / float(np.median(own)),
        "reference_images_per_s": protocol.batch / float(np.median(reference)),
        "relative": 1 / median_ratio(own, reference),
        "batches": len(own),
        "device": device_name(device),
    }
    logger.info("speed of %s at %d px: %.2f of %s", model, size, found["relative"], protocol.reference)
    return found


def _program(
    protocol: SpeedProtocol, device: torch.device, name: str, size: int, model_args: Mapping[str, Any] | None = None
) -> Callable[[], Any]:
    model = create_model(name, (size, size), None, 0, model_args)
    ragged = size % int(model.feature_info[-1]["reduction"]) > 0
    backbone = TimmBackbone(model, ragged=ragged)
    cast_matmul_weights(model, protocol.precision)
    model.to(device)
    images = torch.randn(protocol.batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    layers = (backbone.n_layers - 1,)

    def run() -> Any:
        with autocast(device, protocol.precision):
            return backbone(images, layers)

    return run
