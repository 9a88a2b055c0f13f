"""ViT-Up as a method: what its checkpoints hold, what it asks of a backbone, and settings and weights where none are given."""

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from operators.backbone import TimmBackbone
from operators.upsamplers.protocol import Method, Need, Precision, Reload, UpsamplerError
from operators.upsamplers.vit_up.checkpoint import HEAD_CHANNELS, read_checkpoint
from operators.upsamplers.vit_up.head import ViTUpConfig, ViTUpHead
from operators.upsamplers.vit_up.lora import Lora
from operators.upsamplers.vit_up.upsampler import ViTUp
from storage.documents import JsonObject, JsonValue

_QUERY_SCALE = 8
"""The query grid is sampled from an image enlarged so much: 3584 px for 448."""


class ViTUpMethod(Method[ViTUpConfig]):
    """Reads the image through an adapted copy of the backbone, for any grid. A state is its head's, and its adapter's below
    `backbone.`, under the names of the published files."""

    settings = ViTUpConfig
    needs = frozenset[Need]({"image", "backbone"})
    trained_by = "vit_up"
    chunked = True
    changeable = ("hidden_size", "query_size")
    telling = "decoder_mlp.0.mlp.1.weight"

    def identity(self, settings: ViTUpConfig) -> dict[str, JsonValue]:
        return {name: value for name, value in super().identity(settings).items() if name != "method"}

    def with_backbone(self, settings: ViTUpConfig, backbone: TimmBackbone) -> ViTUpConfig:
        self.require_last_tokens(backbone)
        return settings

    def changed(self, settings: ViTUpConfig, backbone: TimmBackbone, given: JsonObject) -> ViTUpConfig:
        """The query grid grows with the hidden states', unless its size is given, too; both must be whole patches."""
        found = super().changed(settings, backbone, given)
        if "query_size" not in given:
            found = replace(found, query_size=round(settings.query_size * found.hidden_size / settings.hidden_size))
        for name in self.changeable:
            if (size := getattr(found, name)) % backbone.patch:
                raise UpsamplerError(f"{name} {size}: must be a multiple of the backbone's patch of {backbone.patch} px")
        return found

    def read(
        self, state: Mapping[str, Tensor], given: JsonObject | None, backbone: TimmBackbone
    ) -> tuple[ViTUpConfig, dict[str, Tensor]]:
        if given is None:
            self.require_own(state)
        settings, head, lora = read_checkpoint(state, given)
        return self.with_backbone(settings, backbone), {**head, **lora}

    def build(self, settings: ViTUpConfig, state: Mapping[str, Tensor], precision: Precision, reload: Reload) -> ViTUp:
        lora = {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}
        head = {name: tensor for name, tensor in state.items() if name not in lora}
        return ViTUp(settings, reload(), head, lora, precision=precision)

    def untrained(
        self, backbone: TimmBackbone, channels: int, size: int, reload: Reload
    ) -> tuple[ViTUpConfig, dict[str, Tensor]]:
        settings = published_settings(backbone.channels, backbone.n_layers, size, _QUERY_SCALE * size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            lora = Lora(reload(), rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout)
        return settings, {**random_head(settings).state_dict(), **lora.peft_state()}

    def parameters(self, settings: ViTUpConfig, state: Mapping[str, Tensor]) -> int:
        # The offset encoding's frequencies are no parameter.
        return sum(tensor.numel() for name, tensor in state.items() if not name.endswith("freqs"))


def published_settings(channels: int, depth: int, size: int, query_size: int) -> ViTUpConfig:
    """Every second layer, up to the last, as published; and a head's channels, where the backbone has that many."""
    return ViTUpConfig(
        channels=channels,
        heads=max(1, channels // HEAD_CHANNELS),
        layers=tuple(range(depth % 2, depth + 1, 2)),
        hidden_size=size,
        query_size=query_size,
    )


def random_head(settings: ViTUpConfig) -> ViTUpHead:
    """A head from a fixed seed whose FiLM does something, as after training; in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = ViTUpHead(settings).eval().requires_grad_(False)
        for number in range(settings.blocks):
            mlp = cast(nn.Sequential, head.get_submodule(f"vit_up_blocks.{number}.featx.gamma_beta_mlp.mlp"))
            nn.init.normal_(cast(nn.Linear, mlp[-1]).weight, std=settings.channels**-0.5)
    return head
