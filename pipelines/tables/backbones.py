"""The backbones that DeAP compares: its Table 2 by timm's names, and any other of timm's by the same rules.

Nothing is built here, and nothing downloaded: grids, channels and parameters are written down, and held against the models by
tests/pipelines/tables/test_backbones.py; means and deviations are in timm's own configs. What is read out is the last block's
map after the final norm, without prefix tokens.
"""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import tyro

from pipelines.config import ConfigError
from pipelines.results import table_lines
from storage.paths import StorageOptions


@dataclass(frozen=True, kw_only=True)
class PaperBackbone:
    """A backbone and the input that it is given."""

    name: str
    "as `--backbones` has it"
    label: str
    "as tables have it"
    model: str
    "timm's name, tag included; empty where timm can't make it"
    size: int
    "side of the square input in pixels"
    grid: int | None = None
    "cells a side"
    channels: int | None = None
    "of the map"
    parameters: int | None = None
    "of the trunk, whose map is read: without a classifier, and without the head by which SigLIP pools"
    weights: str | None = None
    "None: those that the run is given"
    absent: str = ""
    "what timm lacks of it"
    note: str = ""

    @property
    def ragged(self) -> bool:
        """Whether patches don't fill the input."""
        return self.grid is not None and self.size % self.grid > 0


def _vit(
    name: str, label: str, model: str, size: int, parameters: int, patch: int = 16, channels: int = 768, **more: str
) -> PaperBackbone:
    grid = size // patch
    return PaperBackbone(
        name=name, label=label, model=model, size=size, grid=grid, channels=channels, parameters=parameters, **more
    )


_MAE = "vit_base_patch16_224.mae"

BACKBONES: tuple[PaperBackbone, ...] = (
    _vit("untrained", "untrained", _MAE, 224, 85_798_656, weights="random"),
    _vit(
        "supervised", "ImageNet sup.", "vit_base_patch16_224.orig_in21k", 224, 85_798_656,
        note="ImageNet-21k in the release; the paper's table says ImageNet",
    ),
    PaperBackbone(
        name="sam2", label="SAM2 B+", model="", size=1024, grid=64, channels=256,
        absent="its neck, whose map is what DeAP reads; sam2_hiera_base_plus.fb_r896 is the trunk alone",
    ),
    _vit(
        "moco-v3", "MoCo v3", _MAE, 224, 85_798_656,
        absent=f"its weights; {_MAE} takes them as --weights URL, a state dict with timm's names",
    ),
    _vit("dino", "DINO", "vit_base_patch8_224.dino", 224, 85_807_872, 8),
    _vit("dinov2-b", "DINOv2 B", "vit_base_patch14_reg4_dinov2.lvd142m", 518, 86_582_016, 14),
    _vit("dinov2-l", "DINOv2 L", "vit_large_patch14_reg4_dinov2.lvd142m", 518, 304_370_688, 14, 1024),
    _vit("mae", "MAE", _MAE, 224, 85_798_656),
    _vit(
        "hiera", "Hiera B+", "hiera_base_plus_224.mae", 224, 68_999_616, 32, 896,
        note="the last stage as it is: its norm comes after pooling",
    ),
    _vit("clip-b", "CLIP B", "vit_base_patch16_clip_224.openai", 224, 85_799_424),
    _vit("clip-l", "CLIP L", "vit_large_patch14_clip_336.openai", 336, 303_507_456, 14, 1024),
    _vit("metaclip", "MetaCLIP", "vit_base_patch16_clip_224.metaclip_2pt5b", 224, 85_799_424),
    _vit("siglip-224", "SigLIP 224", "vit_base_patch16_siglip_224.webli", 224, 85_797_120),
    _vit("siglip-384", "SigLIP 384", "vit_base_patch16_siglip_384.webli", 384, 86_088_960),
    _vit("siglip-512", "SigLIP 512", "vit_base_patch16_siglip_512.webli", 512, 86_433_024),
    _vit(
        "siglip-so", "SigLIP SO", "vit_so400m_patch14_siglip_384.webli", 512, 412_987_248, 14, 1152,
        note="made for 384 px and run at 512, where the last 8 px aren't seen",
    ),
    _vit("aim2", "Aim2", "aimv2_large_patch14_336.apple_pt", 336, 309_525_504, 14, 1024),
    _vit("vitamin", "ViTamin", "vitamin_large2_384.datacomp1b_clip", 384, 332_920_736, 16, 1024),
)  # fmt: skip
"""In the order of the paper's results."""

BY_NAME = {each.name: each for each in BACKBONES}


@dataclass(frozen=True, kw_only=True)
class Backbones:
    """The backbones of DeAP's Table 2: timm's names, input, grid, channels, normalisation, parameters."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Only these."""


def find_backbone(word: str, weights: str = "pretrained", options: StorageOptions | None = None) -> PaperBackbone:
    """One of the table's, or `TIMM_NAME[@PIXELS]`, by default at the size that its `weights` (as for jobs/train.py) expect.

    Raises `ConfigError` for what timm lacks, and `BackboneError` for names that it hasn't.
    """
    from pipelines.features.weights import WeightsChoice, read_description  # timm, as in `_scale`

    if (found := BY_NAME.get(word)) is not None:
        if found.absent and not (found.model and WeightsChoice.parse(weights).source == "file"):
            raise ConfigError(f"--backbones {word}: timm lacks {found.absent}")
        return found
    model, _, size = word.partition("@")
    if size and not re.fullmatch(r"[1-9]\d*", size):
        raise ConfigError(f"--backbones {word}: use TIMM_NAME@PIXELS, for example vit_tiny_patch16_224@448")
    if "_" not in model:  # as all of timm's names of ViTs have
        near = difflib.get_close_matches(word, BY_NAME, 1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise ConfigError(f"--backbones {word}: {hint}There are {', '.join(BY_NAME)}, and timm's own names")
    side = int(size) if size else read_description(model, WeightsChoice.parse(weights), options).expects.size[0]
    return PaperBackbone(name=word, label=word, model=model, size=side)


def main(config: Backbones) -> Iterator[str]:
    """Markdown: what each of the table's backbones is and expects. Raises `ConfigError`."""
    names = config.names
    if unknown := [name for name in names if name not in BY_NAME]:
        raise ConfigError(f"no backbone is called {', '.join(unknown)}; there are {', '.join(BY_NAME)}")
    found = [each for each in BACKBONES if not names or each.name in names]
    rows = []
    for each in found:
        millions = f"{each.parameters / 1e6:.1f} M" if each.parameters else "missing"
        grid = f"{each.grid}x{each.grid}" if each.grid else ""
        cells = (each.name, each.label, each.model, each.size, grid, each.channels, *_scale(each), millions)
        rows.append([str(cell) for cell in cells])
    head = ["name", "paper", "timm", "px", "grid", "channels", "mean", "deviation", "parameters"]
    _, *lines = table_lines(head, rows, left=3)
    yield from lines
    yield ""
    for each in found:
        if each.absent:
            yield f"- {each.name}: timm lacks {each.absent}."
        if each.note:
            yield f"- {each.name}: {each.note}."
        if each.weights:
            yield f"- {each.name}: {each.weights} weights."


def _scale(backbone: PaperBackbone) -> tuple[str, str]:
    """Mean and deviation that its input is normalised with."""
    from operators.timm_models import preprocessing

    if not backbone.model:
        return "", ""
    expects = preprocessing(backbone.model)
    mean, std = (" ".join(f"{value:.3f}" for value in values) for values in (expects.mean, expects.std))
    return mean, std
