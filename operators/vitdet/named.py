"""ViTDet's backbone as a model of timm's: by names that its registry knows, so that whatever runs a backbone runs this one.

`vitdet_base`, `vitdet_large` and `vitdet_huge` are the published ones; others are built by the same names with arguments, which a
file's shapes tell (`told`). Importing this module registers them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

from torch import Tensor, nn

from operators.lean_timm import timm
from operators.timm_models import BackboneError
from operators.vitdet.backbone import BIAS_BYTES, ViT, attending, facts_of
from operators.vitdet.settings import PATCH, DetectorError, DetectorSettings

NAMES: Mapping[tuple[int, int], str] = {(768, PATCH): "vitdet_base", (1024, PATCH): "vitdet_large", (1280, PATCH): "vitdet_huge"}
"""By width and patch size."""

_SIZES: Mapping[str, Literal["B", "L", "H"]] = {"vitdet_base": "B", "vitdet_large": "L", "vitdet_huge": "H"}

ARGUMENTS = ("dim", "depth", "heads", "window", "global_blocks", "image_size", "pretrain_size")
"""Settings of a detector that make its backbone."""

_WITHOUT_EFFECT = {"num_classes", "in_chans", "global_pool", "dynamic_img_size"}
"""Arguments that timm's models have: there is no classifier, and inputs of any size are taken."""


class ViTDet(ViT):
    """The backbone with what timm's models have. Maps are the residual stream after a block, without a norm."""

    takes_any_size = True
    # Logits of some rows, what relative positions add to them, and their softmax. Measured, with 96 channels at 1,024 px, where
    # hardly anything else is held: 334 MB in all.
    working_bytes = 3 * BIAS_BYTES

    def __init__(self, settings: DetectorSettings):
        super().__init__(settings)
        self.feature_info = [{"num_chs": settings.dim, "reduction": PATCH} for _ in self.blocks]

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int], output_fmt: str = "NCHW", intermediates_only: bool = True
    ) -> list[Tensor]:
        """The maps [B, C, H / 16, W / 16] of normalised images after these blocks, in their order."""
        if output_fmt != "NCHW" or not intermediates_only:
            raise BackboneError("ViTDet's backbone gives maps [B, C, h, w] alone")
        maps, found = self.embedded(x), {}
        for i, block in enumerate(self.blocks[: max(indices) + 1]):
            maps = block(maps)
            if i in indices:
                found[i] = maps.permute(0, 3, 1, 2)
        return [found[i] for i in indices]


def arguments_of(settings: DetectorSettings, name: str) -> dict[str, Any]:
    """The arguments with which the model `name` is a detector's backbone, as JSON values; empty for the published one."""
    plain = DetectorSettings.published(_SIZES[name])
    differing = {each: getattr(settings, each) for each in ARGUMENTS if getattr(settings, each) != getattr(plain, each)}
    return {each: list(value) if isinstance(value, tuple) else value for each, value in differing.items()}


def told(state: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """The arguments that a backbone's tensors tell, for the model `name`. Raises `BackboneError` where they don't tell all."""
    facts = facts_of(state)
    if facts is None:
        raise BackboneError("these look like weights of ViTDet, but not every block has its relative positions")
    facts |= attending(facts.pop("sides"))
    if not facts["global_blocks"]:
        raise BackboneError(
            "these look like weights of ViTDet, but their tables of relative positions don't tell blocks that attend in windows "
            "from those that attend to the whole map; give the folder with their config.json"
        )
    try:
        return arguments_of(replace(DetectorSettings.published(_SIZES[name]), **facts), name)
    except DetectorError as error:
        raise BackboneError(f"these look like weights of ViTDet, but {error}") from None


def _build(size: Literal["B", "L", "H"], **given: Any) -> ViTDet:
    named = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if unknown := sorted(set(named) - {*ARGUMENTS, *_WITHOUT_EFFECT}):
        raise TypeError(f"ViTDet's backbone has no arguments {', '.join(unknown)}")
    if named.get("num_classes") or named.get("in_chans", 3) != 3:
        raise ValueError("ViTDet's backbone takes RGB images and has no classifier")
    own: dict[str, Any] = {name: value for name, value in named.items() if name in ARGUMENTS}
    return ViTDet(replace(DetectorSettings.published(size), **own))


default_cfgs = timm.models.generate_default_cfgs(
    {
        name: {
            "input_size": (3, 1024, 1024),
            "num_classes": 0,
            "interpolation": "bilinear",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "classifier": None,
        }
        for name in NAMES.values()
    }
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return cast(nn.Module, timm.models.build_model_with_cfg(partial(_build, _SIZES[name]), name, pretrained, **kwargs))


@timm.models.register_model
def vitdet_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViTDet's ViT-B."""
    return _create("vitdet_base", pretrained, **kwargs)


@timm.models.register_model
def vitdet_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViTDet's ViT-L."""
    return _create("vitdet_large", pretrained, **kwargs)


@timm.models.register_model
def vitdet_huge(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViTDet's ViT-H."""
    return _create("vitdet_huge", pretrained, **kwargs)
