"""ViT-Up (arXiv 2606.14024): features at any coordinates of an image, from a ViT's own hidden states."""

from operators.upsamplers.vit_up.checkpoint import read_checkpoint
from operators.upsamplers.vit_up.geometry import grid_coordinates
from operators.upsamplers.vit_up.head import TokenCache, ViTUpConfig, ViTUpHead
from operators.upsamplers.vit_up.hidden import AdaptedBackbone
from operators.upsamplers.vit_up.lora import Lora
from operators.upsamplers.vit_up.upsampler import ViTUp

__all__ = [
    "AdaptedBackbone",
    "Lora",
    "TokenCache",
    "ViTUp",
    "ViTUpConfig",
    "ViTUpHead",
    "grid_coordinates",
    "read_checkpoint",
]
