"""How fast backbones are, relative to one of them: DeAP's Fig. 7.

Ten batches of eight images in inference mode, random weights, the backbone alone. Each batch has one of the reference beside it:
what else the machine did then was much the same for both.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import numpy as np
import torch

from operators.backbone import TimmBackbone, cast_matmul_weights
from operators.timm_models import create_model
from pipelines.costs.clocks import device_name, median_ratio, processor_of, timed
from pipelines.costs.upsamplers import image_to_grid
from storage.documents import JsonObject, JsonValue

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
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"


@dataclass(frozen=True)
class TimedBackbone:
    """What is timed."""

    model: str
    "timm name"
    size: int
    "side of the input in pixels"
    model_args: JsonObject = field(default_factory=dict)
    "of a network that the name alone doesn't build"

    @property
    def saved(self) -> tuple[JsonValue, ...]:
        """As a saved speed has it."""
        return self.model, self.size, *([self.model_args] if self.model_args else [])


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Images per second of a backbone, and of the reference in its time."""

    of: tuple[JsonValue, ...]
    "the backbone, as `TimedBackbone.saved` has it"
    images_per_s: float
    reference_images_per_s: float
    relative: float
    "above 1 for what is faster than the reference"
    batches: int
    device: str
    cpu: str = ""
    "the processor, of a speed on a CPU; earlier versions didn't say it"

    @property
    def where(self) -> str:
        """What it holds for."""
        return f"{self.device}, {self.cpu}" if self.cpu else self.device

    def was_measured_on(self, device: torch.device) -> bool:
        """Whether it holds for this process's device."""
        return (self.device, self.cpu) == (device_name(device), processor_of(device))


def measure_speed(protocol: SpeedProtocol, device: torch.device, backbone: TimedBackbone) -> Speed:
    """Of a backbone, and of the reference between its batches. Raises `BackboneError`."""
    reference = TimedBackbone(protocol.reference, protocol.reference_size)
    runs = [_program(protocol, device, each) for each in (backbone, reference)]
    for run in runs:
        run()
    own, others = timed(runs, protocol.batches, MEASURE_S, device)
    found = Speed(
        of=backbone.saved,
        images_per_s=protocol.batch / float(np.median(own)),
        reference_images_per_s=protocol.batch / float(np.median(others)),
        relative=1 / median_ratio(own, others),
        batches=len(own),
        device=device_name(device),
        cpu=processor_of(device),
    )
    logger.info("speed of %s at %d px: %.2f of %s", backbone.model, backbone.size, found.relative, reference.model)
    return found


def speeds_on(
    protocol: SpeedProtocol, device: torch.device, backbones: Mapping[str, tuple[TimedBackbone, Speed | None]]
) -> Iterator[tuple[str, Speed]]:
    """The speed of each, by name, as it comes; those that are known of this very device are as they are. Raises
    `BackboneError`."""
    for name, (backbone, known) in backbones.items():
        fits = known is not None and known.of == backbone.saved and known.was_measured_on(device)
        yield name, known if known and fits else measure_speed(protocol, device, backbone)


def _program(protocol: SpeedProtocol, device: torch.device, of: TimedBackbone) -> Callable[[], object]:
    size = of.size
    model = create_model(of.model, (size, size), None, 0, of.model_args)
    stages = cast("Sequence[Mapping[str, int]]", model.feature_info)
    backbone = TimmBackbone(model, ragged=size % stages[-1]["reduction"] > 0)
    cast_matmul_weights(model, protocol.precision)
    model.to(device)
    images = torch.randn(protocol.batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    return image_to_grid(images, backbone, (backbone.n_layers - 1,), protocol.precision)
