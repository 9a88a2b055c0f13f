"""ViT-Up's backbone: hidden states and the query grid of a timm ViT with LoRA, and the plain model's as teacher.

Shapes: B images, H W pixels, h w the token grid, gh gw the query grid, D channels.
"""

import contextlib
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators.backbone import BackboneError, TimmBackbone
from operators.timm_models import TimmModel
from operators.upsamplers.protocol import UpsamplerError
from operators.upsamplers.vit_up.lora import Lora, patch_convolution


class AdaptedBackbone(nn.Module):
    """A timm ViT without classifier, frozen, with or without LoRA.

    It takes the model over (hooks, position embeddings by grid): give it a copy where others use it. The model stays in eval
    mode whatever `train()` says, only LoRA's dropout follows: the official training leaves it in train mode, where DINOv3
    rescales its rotary embeddings at random for teacher and student apart; the paper doesn't mention it.
    """

    def __init__(self, model: nn.Module, lora: Lora | None = None):
        super().__init__()
        self.model, self.lora = cast(TimmModel, model.requires_grad_(False).eval()), lora
        patch_convolution(model)
        self._timm = TimmBackbone(model, norm=False)
        if self._timm.is_hierarchical:
            raise UpsamplerError(f"ViT-Up needs a plain ViT; {type(model).__name__} is hierarchical")
        self.patch, self.channels, self.depth = self._timm.patch, self._timm.channels, self._timm.n_layers

    def train(self, mode: bool = True) -> "AdaptedBackbone":
        super().train(mode)
        self.model.eval()
        return self

    def unadapted(self) -> contextlib.AbstractContextManager[None]:
        """Within, the backbone is the plain frozen model: the teacher."""
        return contextlib.nullcontext() if self.lora is None else self.lora.disabled()

    def hidden(self, images_BCHW: Tensor, layers: Sequence[int], size: tuple[int, int] | None = None) -> list[Tensor]:
        """Hidden states [B, h, w, D] of normalised images brought to `size` = (height, width) pixels; patches only.

        Layer 0 is the patch embedding before any position embedding. Layer n is what comes out of block n, counted from 1,
        through the first norm of the block after it, and through the final norm after the last. Images are resized
        bilinearly without antialias, whatever their aspect ratio. Raises `UpsamplerError` for layers beyond the model or
        sizes that aren't whole patches.
        """
        grid = self._grid_of(size or (images_BCHW.shape[-2], images_BCHW.shape[-1]))
        if not layers or min(layers) < 0 or max(layers) > self.depth:
            raise UpsamplerError(f"hidden states {tuple(layers)}: this model has 0 to {self.depth}")
        images = images_BCHW if size is None else resize(images_BCHW, size)
        embedded: list[Tensor] = []
        handle = self.model.patch_embed.register_forward_hook(lambda _, __, output: embedded.append(output))
        try:
            # At least one block, for the hook.
            found = self._timm(images, sorted({max(layer, 1) - 1 for layer in layers})).layers
        finally:
            handle.remove()
        return [
            self._normed(layer, found[layer - 1].permute(0, 2, 3, 1)) if layer else embedded[0].reshape(len(images), *grid, -1)
            for layer in layers
        ]

    def _normed(self, layer: int, tokens: Tensor) -> Tensor:
        norm = self.model.norm if layer == self.depth else self.model.blocks[layer].norm1
        return norm(tokens)

    def query_grid(self, images_BCHW: Tensor, size: tuple[int, int], stripe_bytes: int | None = None) -> Tensor:
        """Patch embeddings [B, D, gh, gw] of the images at `size` = (height, width) pixels, without position embeddings.

        `stripe_bytes`: the enlarged image is made and embedded a few rows of patches at a time, so that these stay below so
        many bytes; the result is the same up to rounding. Raises `UpsamplerError` for sizes that aren't whole patches.
        """
        rows, columns = self._grid_of(size)
        if stripe_bytes is None:
            return self._embedded(resize(images_BCHW, size))
        batch, colours = images_BCHW.shape[:2]
        step = max(1, stripe_bytes // (images_BCHW.element_size() * batch * colours * self.patch * size[1]))
        # Filled in place: joining stripes would hold the grid twice.
        grid = images_BCHW.new_empty((batch, self.channels, rows, columns), dtype=torch.float32)
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            stripe = _resize_rows(images_BCHW, size, start * self.patch, stop * self.patch)
            grid[:, :, start:stop] = self._embedded(stripe)
        return grid

    def _embedded(self, images: Tensor) -> Tensor:
        """The patch embedding alone: timm's module may insist on the size the model was made for."""
        patch_embed = self.model.patch_embed
        patches: Tensor = patch_embed.proj(images)
        if isinstance(patch_embed.norm, nn.Identity):
            return patches
        normed: Tensor = patch_embed.norm(patches.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)

    def _grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        try:
            return self._timm.grid_of(size)
        except BackboneError as error:
            raise UpsamplerError(f"ViT-Up can't take images of this size: {error}") from None

    def peak_bytes(self, size: tuple[int, int], layers: int) -> int:
        """Upper bound on what `hidden` takes for one image beyond the weights, with so many hidden states kept."""
        weights = sum(parameter.nbytes for parameter in self.model.parameters())
        cells = size[0] * size[1] // self.patch**2
        return self._timm.peak_bytes(1, size) - weights + 4 * (cells * self.channels * layers + 3 * size[0] * size[1])


def resize(images_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear without antialias, `align_corners` false; the images themselves where they have the size already."""
    if tuple(images_BCHW.shape[-2:]) == tuple(size):
        return images_BCHW
    return F.interpolate(images_BCHW, size=size, mode="bilinear", align_corners=False)


def _resize_rows(images_BCHW: Tensor, size: tuple[int, int], start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of `resize(images, size)`."""
    height = images_BCHW.shape[-2]
    if tuple(images_BCHW.shape[-2:]) == tuple(size):
        return images_BCHW[:, :, start:stop]
    rows = torch.arange(start, stop, device=images_BCHW.device, dtype=torch.float32)
    source = ((rows + 0.5) * (height / size[0]) - 0.5).clamp(min=0)
    above = source.long().clamp(max=height - 1)
    below = (above + 1).clamp(max=height - 1)
    weight = (source - above).to(images_BCHW.dtype)[:, None]
    stripe = torch.lerp(images_BCHW[:, :, above], images_BCHW[:, :, below], weight)
    return resize(stripe, (stop - start, size[1]))
