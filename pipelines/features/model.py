"""From names to live models: weights from wherever they are, a `FeatureSpec` of what they give, and the model that runs it.

The driver loads weights once, hashes them, and hands the same arrays to every worker (`ModelBundle`): they cross the
network once per node, and what was hashed is what runs.
"""

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import psutil
import torch
from torch import nn

from operators.backbone import (
    Preprocessing,
    TimmBackbone,
    autocast,
    cast_matmul_weights,
    create_model,
    load_arrays,
    normalise,
    state_arrays,
)
from operators.upsamplers import Upsampler, create_upsampler
from operators.upsamplers.vit_up import ViTUp
from pipelines.config import ConfigError
from pipelines.features.descriptions import ModelDescription
from pipelines.features.upsamplers import (
    METHODS,
    UpsamplerWeights,
    described_by,
    load_upsampler,
    trained_on,
    unfamiliar_size,
)
from pipelines.features.weights import WeightsChoice, load_model, read_description
from storage.paths import redact
from storage.spec import FeatureSpec, Level

logger = logging.getLogger(__name__)


# --- levels -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LevelChoice:
    """One `--levels` entry: `NAME[=METHOD[:URL]][@DTYPE]`, NAME being xFACTOR, ROWSxCOLUMNS, or pooled."""

    name: str
    method: str
    dtype: str
    url: str = ""
    "of a learned method's checkpoint"

    @classmethod
    def parse(cls, text: str, encoding: str) -> "LevelChoice":
        # Not what lies between an @ and the end of a URL, which may have one of its own.
        body, dtype = re.fullmatch(r"(.*?)(?:@([^@/:]*))?", text).groups()
        name, _, method = body.partition("=")
        method, _, url = method.partition(":")
        if not re.fullmatch(r"pooled|x\d+(\.\d+)?|\d+x\d+", name):
            raise ConfigError(
                f"--levels {redact(text)}: {redact(name)!r} is no level; use x1, x2, x0.5, ..., 112x112 (rows x columns), "
                "or pooled"
            )
        dtype = dtype or encoding
        if dtype not in ("float16", "float32", "int8"):
            raise ConfigError(f"--levels {redact(text)}: {dtype!r} is no encoding; there are float16, float32, int8")
        if name == "pooled" and dtype == "int8":
            dtype = "float16"
        if bool(url) != (method in METHODS):
            raise ConfigError(
                f"--levels {redact(text)}: learned methods ({', '.join(METHODS)}) take the URL of a checkpoint, as in "
                "x2=lift:s3://bucket/checkpoint; others take none"
            )
        return cls(name=name, method=method, dtype=dtype, url=url)


def resolve_level(
    choice: LevelChoice,
    backbone: TimmBackbone,
    size: tuple[int, int],
    n_layers: int,
    learned: UpsamplerWeights | None = None,
    fresh: Callable[[], nn.Module] | None = None,
) -> Level:
    """A `Level` with everything filled in. Raises `ConfigError` or `UpsamplerError` where the grid can't be had."""
    channels = backbone.channels * n_layers
    if choice.name == "pooled":
        method = choice.method or ("cls" if backbone.has_cls else "mean")
        if method not in ("cls", "mean") or (method == "cls" and not backbone.has_cls):
            raise ConfigError(
                f"--levels pooled={method}: use mean{', or cls' if backbone.has_cls else '; this model has no CLS token'}"
            )
        return Level(name="pooled", method=method, grid=None, channels=channels, dtype=choice.dtype)
    base = backbone.grid_of(size)
    grid = _level_grid(choice.name, base)
    method = choice.method
    if grid == base and method in ("", "backbone"):
        method = "backbone"
    elif not method:
        method = "average" if grid[0] < base[0] or grid[1] < base[1] else "bilinear"
    if method == "average" and (base[0] % grid[0] or base[1] % grid[1]):
        raise ConfigError(
            f"--levels {choice.name}=average: {base[0]}x{base[1]} cells don't divide into {grid[0]}x{grid[1]}"
        )
    digest = ""
    if learned:
        if learned.channels != channels:
            raise ConfigError(
                f"--levels {choice.name}={method}: the checkpoint is for maps of {learned.channels} channels; "
                f"{n_layers} layers of this backbone have {channels}"
            )
        digest = learned.check(fresh, base, grid)
    elif method != "backbone":
        digest = create_upsampler(method).digest
    step = tuple(backbone.stride * b / g for b, g in zip(base, grid, strict=True))
    edge = backbone.cell_start() - backbone.stride / 2
    return Level(
        name=choice.name,
        method=method,
        grid=grid,
        channels=channels,
        dtype=choice.dtype,
        start=(edge + step[0] / 2, edge + step[1] / 2),
        step=(step[0], step[1]),
        digest=digest,
    )


def _level_grid(name: str, base: tuple[int, int]) -> tuple[int, int]:
    if not name.startswith("x"):
        rows, columns = name.split("x")
        return int(rows), int(columns)
    factor = float(name[1:])
    grid = tuple(n * factor for n in base)
    if factor <= 0 or any(n != int(n) for n in grid):
        raise ConfigError(
            f"--levels {name}: {base[0]}x{base[1]} cells times {factor:g} are not whole; use another factor, or ROWSxCOLUMNS"
        )
    return int(grid[0]), int(grid[1])


# --- the model that workers run ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelBundle:
    """All a worker needs to build the model: the spec and the arrays of its weights."""

    spec: FeatureSpec
    arrays: Mapping[str, np.ndarray]
    upsamplers: Mapping[str, UpsamplerWeights] = field(default_factory=dict)
    "learned ones, by level"

    def build(self, device: str) -> "FeatureModel":
        spec = self.spec
        backbone = TimmBackbone(
            self.fresh(),
            facet=spec.facet,
            norm=spec.norm,
            stride=spec.stride,
            pos_embed=spec.pos_embed,
            ragged=any(side % spec.stride for side in spec.input_size),
        )
        return FeatureModel(spec, backbone, torch.device(device), self.upsamplers, self.fresh)

    def fresh(self) -> nn.Module:
        """The timm model with its own position embeddings, which a backbone in use has replaced."""
        return fresh_model(self.spec.model, self.spec.input_size, self.arrays, self.spec.model_args)

    def unfamiliar(self, spec: FeatureSpec, patch: int) -> list[str]:
        """Sentences, one for each learned level of `spec` (this one's, or of other input) whose maps are of a size that its
        upsampler wasn't trained on; `patch` is the backbone's, in pixels."""
        base = cells(spec.input_size, patch, spec.stride)
        told = {lv.name: self.upsamplers[lv.name] for lv in spec.levels if lv.name in self.upsamplers}
        notes = [unfamiliar_size(name, weights, spec.input_size, base, patch) for name, weights in told.items()]
        return [note for note in notes if note]


def fresh_model(
    name: str, size: tuple[int, int], arrays: Mapping[str, np.ndarray], model_args: Mapping[str, Any] | None = None
) -> nn.Module:
    """timm's model with the arrays of its weights, whatever a backbone has made of another one of them."""
    return load_arrays(create_model(name, size, None, None, model_args), arrays)


def cells(size: tuple[int, int], patch: int, stride: int) -> tuple[int, int]:
    """(rows, columns) of a backbone's map."""
    return (size[0] - patch) // stride + 1, (size[1] - patch) // stride + 1


class ModelSettings(Protocol):
    """What settings that name a model have in common: `ExtractConfig`'s and `EvaluateConfig`'s, documented there."""

    model: str
    weights: str
    revision: str | None
    layers: tuple[int, ...]
    facet: Literal["token", "key", "query", "value"]
    norm: bool | None
    stride: int | None
    pos_embed: Literal["timm", "dino"] | None
    precision: Literal["bf16", "fp16", "fp32"]
    levels: tuple[str, ...]
    encoding: str
    force_upsampler: bool

    @property
    def options(self) -> dict[str, Any]: ...


def load_described(
    settings: ModelSettings,
    size: tuple[int, int] | None,
    *,
    ragged: bool = False,
    geometry: Literal["crop", "squash", "pad"] = "squash",
    crop_pct: float = 1.0,
    jpeg_draft: bool = False,
    described: ModelDescription | None = None,
    loaded: nn.Module | None = None,
) -> tuple[ModelBundle, "FeatureModel"]:
    """The model of some settings for inputs of `size` (None: its own), as `describe_model` gives it.

    `described`, `loaded`: what its weights say, and the model for that size with them, where the caller has them already;
    the model is taken over.
    Raises `BackboneError`, `UpsamplerError`, `WeightsUnavailable` or `ConfigError`.
    """
    levels = [LevelChoice.parse(text, settings.encoding) for text in settings.levels]
    weights = WeightsChoice.parse(settings.weights)
    described = described or read_description(settings.model, weights, settings.options)
    size = size or described.expects.size
    if loaded is None:
        loaded = load_model(settings.model, size, weights, settings.revision, settings.options, described)
    return describe_model(
        name=settings.model,
        model=loaded,
        weights_source=weights.source,
        layers=settings.layers,
        facet=settings.facet,
        norm=settings.norm,
        stride=settings.stride,
        pos_embed=settings.pos_embed,
        ragged=ragged,
        size=size,
        expects=described.expects,
        model_args=described.model_args,
        geometry=geometry,
        crop_pct=crop_pct,
        precision=settings.precision,
        jpeg_draft=jpeg_draft,
        levels=levels,
        storage_options=settings.options,
        force_upsampler=settings.force_upsampler,
    )


def describe_model(
    *,
    name: str,
    model: torch.nn.Module,
    weights_source: Literal["pretrained", "file", "random"],
    layers: Sequence[int],
    facet: Literal["token", "key", "query", "value"],
    norm: bool | None,
    stride: int | None,
    pos_embed: Literal["timm", "dino"] | None,
    ragged: bool,
    size: tuple[int, int],
    expects: Preprocessing,
    geometry: Literal["crop", "squash", "pad"],
    crop_pct: float,
    precision: Literal["bf16", "fp16", "fp32"],
    jpeg_draft: bool,
    levels: Sequence[LevelChoice],
    storage_options: Mapping[str, Any] | None = None,
    force_upsampler: bool = False,
    model_args: Mapping[str, Any] | None = None,
) -> tuple[ModelBundle, "FeatureModel"]:
    """Resolve every default against the loaded model; returns what workers get, and the model ready on the CPU.

    Raises `BackboneError`, `UpsamplerError` or `ConfigError`."""
    # Before the backbone touches it: stride and grid replace position embeddings.
    arrays = {key: value.copy() for key, value in state_arrays(model).items()}
    backbone = TimmBackbone(model, facet=facet, norm=norm, stride=stride, pos_embed=pos_embed, ragged=ragged)
    found = trained_on(name, arrays, backbone, layers)
    spec = FeatureSpec(
        model=name,
        weights=found["weights"],
        weights_source=weights_source,
        layers=tuple(found["layers"]),
        facet=facet,
        norm=backbone.norm,
        stride=backbone.stride,
        pos_embed=backbone.pos_embed,
        input_size=size,
        geometry=geometry,
        crop_pct=crop_pct,
        interpolation=expects.interpolation,
        mean=expects.mean,
        std=expects.std,
        precision=precision,
        jpeg_draft=jpeg_draft,
        levels=(),
        model_args=dict(model_args or {}),
    )
    learned = _load_upsamplers(levels, backbone, spec, storage_options, force=force_upsampler)
    fresh = partial(fresh_model, name, size, arrays, spec.model_args)
    resolved = tuple(
        resolve_level(choice, backbone, size, len(spec.layers), learned.get(choice.name), fresh) for choice in levels
    )
    if len({level.name for level in resolved}) != len(resolved) or not resolved:
        raise ConfigError(
            f"--levels must be different ones, at least one; got {' '.join(level.name for level in resolved)}"
        )
    bundle = ModelBundle(spec=replace(spec, levels=resolved), arrays=arrays, upsamplers=learned)
    return bundle, FeatureModel(bundle.spec, backbone, torch.device("cpu"), learned, fresh)


def _load_upsamplers(
    levels: Sequence[LevelChoice],
    backbone: TimmBackbone,
    spec: FeatureSpec,
    options: Mapping[str, Any] | None,
    *,
    force: bool,
) -> dict[str, UpsamplerWeights]:
    """By level; levels of one method and URL share theirs."""
    here = described_by(spec)
    checkpoints = {
        place: load_upsampler(*place, backbone, here, storage_options=options, force=force)
        for place in dict.fromkeys((choice.method, choice.url) for choice in levels if choice.url)
    }
    return {choice.name: checkpoints[choice.method, choice.url] for choice in levels if choice.url}


class FeatureModel:
    """uint8 images to the rows of every level. Not thread-safe: callers hold a lock round it."""

    def __init__(
        self,
        spec: FeatureSpec,
        backbone: TimmBackbone,
        device: torch.device,
        learned: Mapping[str, UpsamplerWeights],
        fresh: Callable[[], nn.Module],
    ):
        """`learned`: weights by level, one object where levels share them; `fresh` makes the backbone's model anew."""
        self.spec, self.backbone, self.device = spec, backbone, device
        cast_matmul_weights(backbone.model, spec.precision)
        backbone.model.to(device)
        built = {id(weights): weights.build(spec.precision, fresh) for weights in learned.values()}
        self.upsamplers: dict[str, Upsampler] = {
            level.name: built[id(learned[level.name])] if level.name in learned else create_upsampler(level.method)
            for level in spec.levels
            if level.grid and level.method != "backbone"
        }
        self._remembering = [upsampler for upsampler in built.values() if isinstance(upsampler, ViTUp)]
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
        for upsampler in self._remembering:
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
