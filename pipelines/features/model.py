"""The model that workers run: a backbone and its upsamplers, from uint8 images to the maps of all levels."""

import logging
import time
from collections.abc import Mapping

import numpy as np
import psutil
import torch

from operators.backbone import (
    TimmBackbone,
    autocast,
    cast_matmul_weights,
    normalise,
)
from operators.upsamplers import Upsampler, create_upsampler
from operators.upsamplers.protocol import Reload
from pipelines.features.upsamplers import UpsamplerWeights
from storage.spec import FeatureSpec

logger = logging.getLogger(__name__)


class FeatureModel:
    """uint8 images to the rows of every level. Not thread-safe: callers hold a lock round it."""

    def __init__(
        self,
        spec: FeatureSpec,
        backbone: TimmBackbone,
        device: torch.device,
        learned: Mapping[str, UpsamplerWeights],
        reload: Reload,
    ):
        """`learned`: weights by level, one object where levels share them; `reload` makes the backbone's model anew."""
        self.spec, self.backbone, self.device = spec, backbone, device
        cast_matmul_weights(backbone.model, spec.precision)
        backbone.model.to(device)
        built = {id(weights): weights.build(spec.precision, reload) for weights in learned.values()}
        self.upsamplers: dict[str, Upsampler] = {
            level.name: built[id(learned[level.name])] if level.name in learned else create_upsampler(level.method)
            for level in spec.levels
            if level.grid and level.method != "backbone"
        }
        extra = {layer for upsampler in self.upsamplers.values() for layer in upsampler.layers}
        self._asked = (*spec.layers, *sorted(extra - set(spec.layers)))

    @torch.inference_mode()
    def __call__(self, images_BHWC: np.ndarray, seconds: dict[str, float]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """uint8 [B, H, W, 3] to (rows of each level [B, *row_shape] float16 or float32, which rows are not finite [B] bool).

        Adds device time to `seconds["forward"]` and `seconds["upsample"]`.
        """
        t0 = time.perf_counter()
        images = normalise(torch.from_numpy(images_BHWC).to(self.device), self.spec.mean, self.spec.std)
        with autocast(self.device, self.spec.precision):
            features = self.backbone(images, self._asked)
        maps = features.stacked(self.spec.layers)
        bad = (~torch.isfinite(maps)).flatten(1).any(dim=1).cpu().numpy()
        t1 = time.perf_counter()
        out = {}
        for level in self.spec.levels:
            if level.grid is None:
                rows = features.pooled(self.spec.layers, "cls" if level.method == "cls" else "mean")
            elif level.method == "backbone":
                rows = maps.permute(0, 2, 3, 1)
            else:
                rows = self.upsamplers[level.name](images, features, self.spec.layers, level.grid).permute(0, 2, 3, 1)
                if level.digest:  # a network can make what isn't finite of what is
                    bad |= (~torch.isfinite(rows)).flatten(1).any(dim=1).cpu().numpy()
            out[level.name] = (
                rows.to(torch.float16 if level.dtype == "float16" else torch.float32).contiguous().cpu().numpy()
            )
        for upsampler in self.upsamplers.values():
            upsampler.forget()
        seconds["forward"] = seconds.get("forward", 0.0) + t1 - t0
        seconds["upsample"] = seconds.get("upsample", 0.0) + time.perf_counter() - t1
        return out, bad

    def fit_batch(self, batch: int) -> int:
        """`batch`, halved until `peak_bytes` takes at most 0.6 of the device's free memory."""
        free = (
            torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else psutil.virtual_memory().available
        )
        while batch > 1 and self.peak_bytes(batch) > 0.6 * free:
            batch //= 2
        return batch

    def peak_bytes(self, batch: int) -> int:
        """Upper bound on device memory for a batch: the backbone, its images, and the largest upsampler's call."""
        spec = self.spec
        images = batch * spec.input_size[0] * spec.input_size[1] * 3 * 8
        ups = [
            self.upsamplers[level.name].peak_bytes(batch, level.channels, level.grid)
            for level in spec.levels
            if level.grid and level.name in self.upsamplers
        ]
        rows, columns = self.backbone.grid_of(spec.input_size)
        # Each further layer: its map as kept, stacked with the others, and as rows.
        kept = 3 * 4 * batch * rows * columns * self.backbone.channels * (len(self._asked) - 1)
        return self.backbone.peak_bytes(batch, spec.input_size) + images + kept + max(ups, default=0)
