"""Published ViT-Up weights: their names, the older ones, and the settings that their shapes tell."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from operators.upsamplers.protocol import UpsamplerError, require_fitting
from operators.upsamplers.vit_up.head import ViTUpConfig, ViTUpHead
from storage.documents import JsonObject, JsonValue

HEAD_CHANNELS = 64
"""Of each head of the published ones' cross-attention."""
_OUTER = re.compile(r"^(?:(?:vit_up_pl_v2|vit_up_pl|vit_up|module|model|_orig_mod)\.)+")
_OLD_NAMES = (
    (re.compile(r"^img_encoder\."), "query_embedding."),
    (re.compile(r"^q_proj\.(\d+)\."), r"vit_up_blocks.\1.transition_mlp."),
    (re.compile(r"^local_feature_decoder\.(\d+)\."), r"vit_up_blocks.\1.featx."),
    (re.compile(r"^global_local_cross_attention\.(\d+)\.global_cross_attention\."), r"vit_up_blocks.\1.cross_attention."),
    (re.compile(r"^global_local_cross_attention\.(\d+)\."), r"vit_up_blocks.\1."),
)


def read_checkpoint(
    tensors: Mapping[str, Tensor], settings: JsonObject | None = None
) -> tuple[ViTUpConfig, dict[str, Tensor], dict[str, Tensor]]:
    """Settings, the head's state and LoRA's state (`Lora.load_peft_state`) of a published file's tensors, as float32.

    Old names and the prefixes of Lightning and compiled modules are taken. What shapes tell is read from them: channels,
    blocks, the MLPs' width, rank, and which parts there are. The rest is as published: heads of 64 channels, layers spread
    evenly over the blocks that LoRA adapts, alpha twice the rank, image sizes. `settings` override all of it. Raises
    `UpsamplerError` where a tensor is missing, left over or of another shape.
    """
    state = {_current_name(name): tensor.float() for name, tensor in tensors.items()}
    if len(state) != len(tensors):
        raise UpsamplerError("the weights hold some tensors twice, under an old and a new name")
    head = {name: tensor for name, tensor in state.items() if not name.startswith("backbone.")}
    lora = {name: tensor for name, tensor in state.items() if name not in head}
    config = ViTUpConfig.parse({**_settings_of(head, lora), **(settings or {})})
    with torch.device("meta"):
        expected = ViTUpHead(config).state_dict()
    require_fitting(expected, head, f"a ViT-Up head of {config.channels} channels and {config.blocks} blocks")
    require_fitting(_lora_names(config, lora), lora, f"LoRA of rank {config.rank}")
    return config, head, lora


def _current_name(name: str) -> str:
    name = _OUTER.sub("", name).replace("_orig_mod.", "")
    for old, new in _OLD_NAMES:
        name = old.sub(new, name)
    return name


def _settings_of(head: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> dict[str, JsonValue]:
    if "decoder_mlp.0.mlp.1.weight" not in head or "vit_up_blocks.0.mlp.mlp.0.weight" not in head:
        raise UpsamplerError(f"these aren't ViT-Up's weights: no decoder or block among {', '.join([*head][:5])}")
    channels = head["decoder_mlp.0.mlp.1.weight"].shape[0]
    down = [tensor for name, tensor in lora.items() if ".lora_A." in name]
    rank = down[0].shape[0] if down else None
    return {
        "channels": channels,
        "heads": max(1, channels // HEAD_CHANNELS),
        "layers": _spread(_count(head, r"vit_up_blocks\.(\d+)\."), _count(lora, r".*\.layer\.(\d+)\.")),
        "mlp_channels": head["vit_up_blocks.0.mlp.mlp.0.weight"].shape[0],
        "featx": any(".featx." in name for name in head),
        "cross_attention": any(".cross_attention." in name for name in head),
        "lora": bool(lora),
        "rank": rank,
        "alpha": rank and 2.0 * rank,
    }


def _count(names: Mapping[str, Tensor], numbered: str) -> int:
    numbers = [int(found[1]) for name in names if (found := re.match(numbered, name))]
    return max(numbers, default=-1) + 1


def _spread(blocks: int, depth: int) -> tuple[int, ...] | None:
    """Every second layer for 6 blocks of 12; None, the default, where nothing tells or they don't divide."""
    if not blocks or not depth or depth % blocks:
        return None
    return tuple(range(0, depth + 1, depth // blocks))


def _lora_names(config: ViTUpConfig, lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What LoRA's tensors must be; the depth and the patch are the file's own and checked again by the backbone."""
    if not config.lora:
        return {}
    path = "backbone.base_model.model"
    embedding = f"{path}.embeddings.patch_embeddings"
    patch = lora[f"{embedding}.lora_A.default.weight"].shape[1:] if f"{embedding}.lora_A.default.weight" in lora else ()
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
        embedding: ((config.rank, *patch), (config.channels, config.rank, 1, 1))
    }
    for number in range(_count(lora, r".*\.layer\.(\d+)\.")):
        for projection in "qkvo":
            linear = ((config.rank, config.channels), (config.channels, config.rank))
            shapes[f"{path}.layer.{number}.attention.{projection}_proj"] = linear
    return {
        f"{site}.lora_{side}.default.weight": torch.empty(shape, device="meta")
        for site, pair in shapes.items()
        for side, shape in zip("AB", pair, strict=True)
    }
