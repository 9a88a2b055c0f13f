"""The model that workers run: a backbone and its upsamplers, from uint8 images to the maps of all levels."""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from operators.backbone import PatchFeatures, TimmBackbone, autocast, cast_matmul_weights, normalise
from operators.packed import pack_linears, unpack_linears
from operators.transfer import to_device
from operators.upsamplers import Upsampler, create_upsampler
from operators.upsamplers.protocol import WORKING_BYTES, Reload
from pipelines.features.memory import WITHIN, allow_within, free_bytes
from pipelines.features.upsamplers import UpsamplerWeights
from storage.shards import FLOAT16_MAX
from storage.spec import FeatureSpec, Level

logger = logging.getLogger(__name__)

Moment: TypeAlias = float | torch.cuda.Event
"""A moment of a device's work. A GPU is behind the program that gives it work, so that it has to note the moment itself."""


def _now(device: torch.device) -> Moment:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(first: Moment, last: Moment) -> float:
    if isinstance(first, float) or isinstance(last, float):
        return float(last) - float(first)
    last.synchronize()
    return first.elapsed_time(last) / 1000


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Of one call. Asking for seconds waits until the device is done with it."""

    begun: Moment
    forwarded: Moment
    ended: Moment

    @property
    def forward(self) -> float:
        """Seconds of the backbone, and of bringing the images to the device."""
        return _seconds(self.begun, self.forwarded)

    @property
    def upsample(self) -> float:
        """Seconds of making all levels from the backbone's maps."""
        return _seconds(self.forwarded, self.ended)


@dataclass(frozen=True, kw_only=True)
class Maps:
    """What a model made of B images; tensors on its device, which may still be at work on them."""

    levels: Mapping[str, Tensor]
    "rows [B, *row_shape] of each level: float16 where the level is stored so, else float32; infinite beyond float16's range"
    bad: Tensor
    "bool [B]: whether an image's features hold NaN or infinity, before they are cast"
    seconds: Timings

    def first(self, count: int) -> "Maps":
        """Of the first images only."""
        if count == len(self.bad):
            return self
        return replace(self, levels={name: rows[:count] for name, rows in self.levels.items()}, bad=self.bad[:count])

    def as_stored(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`levels` as they are read from a store, float16's largest value in place of those beyond it, NaN in images that are
        `bad`, which no store has; and by float16 level, how many values were beyond it in each image, int64 [B]."""
        halves = {name: rows for name, rows in self.levels.items() if rows.dtype == torch.float16}
        counts = {name: rows.isinf().flatten(1).sum(dim=1) for name, rows in halves.items()}
        clamped = {name: rows.clamp(-FLOAT16_MAX, FLOAT16_MAX) for name, rows in halves.items()}
        for rows in clamped.values():
            rows.masked_fill_(self.bad.view(-1, *[1] * (rows.ndim - 1)), math.nan)
        return {**self.levels, **clamped}, counts


class FeatureModel:
    """uint8 images to the rows of every level. Not thread-safe: callers hold a lock round it."""

    def __init__(
        self,
        spec: FeatureSpec,
        backbone: TimmBackbone,
        device: torch.device,
        learned: Mapping[str, UpsamplerWeights],
        reload: Reload,
        share: float = 1.0,
    ):
        """`learned`: weights by level, one object where levels share them; `reload` makes the backbone's model anew; `share`: the
        part of a GPU that is its own, where several processes use one."""
        self.spec, self.backbone, self.device, self._share = spec, backbone, device, share
        cast_matmul_weights(backbone.model, spec.precision)
        backbone.model.to(device)
        pack_linears(backbone.model)
        built = {id(weights): weights.build(spec.precision, reload) for weights in learned.values()}
        self.upsamplers: dict[str, Upsampler] = {
            level.name: built[id(learned[level.name])] if level.name in learned else create_upsampler(level.method)
            for level in spec.levels
            if level.grid and level.method != "backbone"
        }
        self.is_compiled = False
        self._fitted, self._allowance = 0, WORKING_BYTES
        "images of the largest batch that upsamplers' memory was chosen for; and how much that is"
        extra = {layer for upsampler in self.upsamplers.values() for layer in upsampler.layers}
        self._asked = (*spec.layers, *sorted(extra - set(spec.layers)))

    def compile(self, mode: str) -> None:
        """Have torch compile the backbone's blocks: `on`, or a mode of `torch.compile`. Batches should be of one shape from then
        on. Raises `BackboneError` where it can't."""
        unpack_linears(self.backbone.model)  # the compiler packs by itself what it compiles
        self.backbone.compile(None if mode == "on" else mode, self._asked)
        self.is_compiled = True

    # Not inference_mode(), whose tensors no readout could be trained on.
    @torch.no_grad()
    def __call__(self, images_BHWC: np.ndarray | Tensor) -> Maps:
        """uint8 [B, H, W, 3] to the rows of every level."""
        if len(images_BHWC) > self._fitted:
            self.fit_upsamplers(len(images_BHWC))
        begun = _now(self.device)
        images = normalise(to_device(images_BHWC, self.device), self.spec.mean, self.spec.std)
        with autocast(self.device, self.spec.precision):
            features = self.backbone(images, self._asked)
        maps = features.stacked(self.spec.layers)
        bad = _not_finite(maps)
        forwarded = _now(self.device)
        levels: dict[str, Tensor] = {}
        for level in self.spec.levels:
            given, own = features, maps
            if level.made_from:
                given = self._as_stored(levels[level.made_from])
                own = given.stacked(self.spec.layers)
            levels[level.name], bad = self._level(level, images, given, own, bad)
        return self._finished(levels, bad, begun, forwarded)

    @torch.no_grad()
    def from_stored(self, maps_BhwC: np.ndarray, images_BHWC: np.ndarray | None) -> Maps:
        """The same of the backbone's maps as they are stored, float16 or float32 (NaN where there are none), for levels that need
        no more of the backbone, and where they need no image without images. The backbone doesn't run."""
        if len(maps_BhwC) > self._fitted:
            self.fit_upsamplers(len(maps_BhwC))
        begun = _now(self.device)
        features = self._as_stored(to_device(np.nan_to_num(maps_BhwC, posinf=np.inf, neginf=-np.inf), self.device))
        maps = features.stacked(self.spec.layers)
        images = maps.new_empty((len(maps), 3, 0, 0))
        if images_BHWC is not None:
            images = normalise(to_device(images_BHWC, self.device), self.spec.mean, self.spec.std)
        bad, forwarded, levels = _not_finite(maps), _now(self.device), {}
        for level in self.spec.levels:
            levels[level.name], bad = self._level(level, images, features, maps, bad)
        return self._finished(levels, bad, begun, forwarded)

    def _as_stored(self, rows_BhwC: Tensor) -> PatchFeatures:
        """A map as who reads it from a store has it: its rows' values, beyond float16's range its largest one."""
        values = rows_BhwC.float()
        if rows_BhwC.dtype == torch.float16:
            values = values.clamp(-FLOAT16_MAX, FLOAT16_MAX)
        parts = values.permute(0, 3, 1, 2).chunk(len(self.spec.layers), dim=1)
        layers = dict(zip(self.spec.layers, parts, strict=True))
        return PatchFeatures(layers=layers, prefix={}, stride=self.backbone.stride)

    def _level(
        self, level: Level, images: Tensor, features: PatchFeatures, maps_BChw: Tensor, bad_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A level's rows in the type that they are given in, and which images are bad by now."""
        rows = self._rows(level, images, features, maps_BChw)
        if level.digest:  # a network can make what isn't finite of what is
            bad_B = bad_B | _not_finite(rows)
        return rows.to(torch.float16 if level.dtype == "float16" else torch.float32).contiguous(), bad_B

    def _finished(self, levels: dict[str, Tensor], bad: Tensor, begun: Moment, forwarded: Moment) -> Maps:
        for upsampler in self.upsamplers.values():
            upsampler.forget()
        timings = Timings(begun=begun, forwarded=forwarded, ended=_now(self.device))
        return Maps(levels=levels, bad=bad, seconds=timings)

    def _rows(self, level: Level, images: Tensor, features: PatchFeatures, maps_BChw: Tensor) -> Tensor:
        """A level's rows [B, *row_shape], as they were computed; `maps_BChw` are those of the spec's layers."""
        if level.grid is None:
            return features.pooled(self.spec.layers, "cls" if level.method == "cls" else "mean")
        if level.method == "backbone":
            return maps_BChw.permute(0, 2, 3, 1)
        return self.upsamplers[level.name](images, features, self.spec.layers, level.grid).permute(0, 2, 3, 1)

    def fit_batch(self, batch: int) -> int:
        """`batch`, halved until `peak_bytes` takes at most 0.6 of the device's free memory; upsamplers are fitted to it.

        On a GPU, what upsamplers take at once comes first, out of two thirds of that: a fine grid in a thousand pieces costs more
        than a small batch does.
        """
        limit = WITHIN * free_bytes(self.device, self._share)
        self.fit_upsamplers(1, limit * 2 / 3)
        while batch > 1 and self.peak_bytes(batch) > limit:
            batch //= 2
        self.fit_upsamplers(batch, limit)
        return batch

    def fit_upsamplers(self, batch: int, limit: float | None = None) -> None:
        """On a GPU, let upsamplers take as much at once as keeps `peak_bytes` within `limit`, by default 0.6 of its free memory.

        On a CPU they always take the same, so that stored bytes don't depend on what else the machine does.
        """
        self._fitted = batch
        if self.device.type == "cuda" and self.upsamplers:
            limit = WITHIN * free_bytes(self.device, self._share) if limit is None else limit
            self._allowance = allow_within(self._distinct, lambda: self.peak_bytes(batch), limit)

    def restrain(self) -> bool:
        """Where memory didn't suffice: let upsamplers take as little at once as they can do with. Whether they took more."""
        took, self._allowance = self._allowance, WORKING_BYTES
        for upsampler in self._distinct:
            upsampler.allow(WORKING_BYTES)
        return took > WORKING_BYTES

    @property
    def _distinct(self) -> list[Upsampler]:
        """The upsamplers, those that several levels share once."""
        return list({id(each): each for each in self.upsamplers.values()}.values())

    def level_cost(self, level: Level, batch: int) -> tuple[int, int, int]:
        """Of making a level with learned weights: an upper bound on the device memory that it takes beside the backbone, how many
        images of a batch are taken together, and in how many parts their grid is made; else zeros."""
        if not level.digest or level.grid is None:
            return 0, 0, 0
        upsampler, size = self.upsamplers[level.name], self.spec.input_size
        call = (batch, level.channels, self.backbone.grid_of(size), size, level.grid)
        return (upsampler.call_bytes(*call), *upsampler.parts(*call))

    def peak_bytes(self, batch: int) -> int:
        """Upper bound on device memory for a batch: the backbone, its images, what upsamplers keep, the largest one's call, and
        the rows of all levels: those that are made, and those of the batch before, which are still on their way to the host."""
        spec = self.spec
        images = batch * spec.input_size[0] * spec.input_size[1] * 3 * 8
        base = self.backbone.grid_of(spec.input_size)
        ups = [
            upsampler.call_bytes(batch, level.channels, base, spec.input_size, level.grid) - upsampler.kept_bytes(batch)
            for level in spec.levels
            if level.grid and (upsampler := self.upsamplers.get(level.name))
        ]
        staying = sum(upsampler.kept_bytes(batch) for upsampler in self._distinct)
        # Each further layer: its map as kept, stacked with the others, and as rows.
        kept = 3 * 4 * batch * math.prod(base) * self.backbone.channels * (len(self._asked) - 1)
        # int8 is float32 until it is quantised, which takes absolute values, quotients and the result of one level at a time.
        values = {level.name: batch * math.prod(level.row_shape) for level in spec.levels}
        quantising = [(4 + 4 + 1) * values[level.name] for level in spec.levels if level.dtype == "int8"]
        widths = {"float16": 2, "float32": 4, "int8": 4}
        rows = 2 * sum(values[level.name] * widths[level.dtype] for level in spec.levels)
        once = max([*ups, *quantising], default=0)
        return self.backbone.peak_bytes(batch, spec.input_size) + images + kept + rows + staying + once


def not_finite(spec: FeatureSpec) -> str:
    """What is wrong with an image that is `bad`."""
    return f"the model gave NaN or infinity in {spec.precision}; try --precision fp32"


def _not_finite(values_B: Tensor) -> Tensor:
    """Which of [B, ...] hold NaN or infinity, bool [B]."""
    return ~values_B.isfinite().flatten(1).all(dim=1)
