"""ViT-Up (arXiv 2606.14024): features at any coordinates of an image, from a ViT's own hidden states."""

from operators.upsamplers.vit_up.checkpoint import read_checkpoint as read_checkpoint
from operators.upsamplers.vit_up.geometry import grid_coordinates as grid_coordinates
from operators.upsamplers.vit_up.head import TokenCache as TokenCache
from operators.upsamplers.vit_up.head import ViTUpConfig as ViTUpConfig
from operators.upsamplers.vit_up.head import ViTUpHead as ViTUpHead
from operators.upsamplers.vit_up.hidden import AdaptedBackbone as AdaptedBackbone
from operators.upsamplers.vit_up.lora import Lora as Lora
from operators.upsamplers.vit_up.method import ViTUpMethod as ViTUpMethod
from operators.upsamplers.vit_up.method import published_settings as published_settings
from operators.upsamplers.vit_up.method import random_head as random_head
from operators.upsamplers.vit_up.upsampler import ViTUp as ViTUp
