"""ViT-Up (arXiv 2606.14024): features at any coordinates of an image, from a ViT's own hidden states."""

from operators.upsamplers.vit_up.checkpoint import read_checkpoint
from operators.upsamplers.vit_up.geometry import grid_coordinates
from operators.upsamplers.vit_up.head import TokenCache, ViTUpConfig, ViTUpHead
from operators.upsamplers.vit_up.hidden import AdaptedBackbone
from operators.upsamplers.vit_up.lora import Lora
from operators.upsamplers.vit_up.method import ViTUpMethod, published_settings, random_head
from operators.upsamplers.vit_up.upsampler import ViTUp

__all__ = [
    "AdaptedBackbone",
    "Lora",
    "TokenCache",
    "ViTUp",
    "ViTUpConfig",
    "ViTUpHead",
    "ViTUpMethod",
    "grid_coordinates",
    "published_settings",
    "random_head",
    "read_checkpoint",
]
