"""Frozen backbones: images in, patch features out.

Everything that changes the numbers (layers, facet, norm, stride, position embedding) is an argument here and a field of the
store's FeatureSpec. This module reads no files and knows neither storage nor Ray: weights come in as arrays or a state dict.

Shapes: B batch, C channels, H W pixels, h w grid cells, T prefix tokens (CLS and registers).
"""

import contextlib
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from operators.lean_timm import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, timm
from operators.timm_models import Attention, TimmModel
from operators.timm_models import BackboneError as BackboneError
from operators.transfer import to_device

Facet = Literal["token", "key", "query", "value"]


@dataclass(frozen=True, kw_only=True)
class PatchFeatures:
    """Feature maps of the asked layers.

    `layers` maps a block's number to its map [B, C, h, w]; `prefix` to its prefix tokens [B, T, C] (T may be 0).
    """

    layers: Mapping[int, Tensor]
    prefix: Mapping[int, Tensor]
    stride: int
    "input pixels from one cell to the next"

    @property
    def grid(self) -> tuple[int, int]:
        h, w = next(iter(self.layers.values())).shape[-2:]
        return h, w

    def stacked(self, layers: Sequence[int]) -> Tensor:
        """The maps of `layers` side by side along the channels, [B, sum C, h, w]."""
        maps = [self.layers[layer] for layer in layers]
        return maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)

    def pooled(self, layers: Sequence[int], method: Literal["cls", "mean"]) -> Tensor:
        """One vector per image, [B, sum C]: the CLS token, or the mean over patches."""
        if method == "cls":
            return torch.cat([self.prefix[layer][:, 0] for layer in layers], dim=-1)
        return torch.cat([self.layers[layer].mean(dim=(2, 3)) for layer in layers], dim=-1)


_OTHERS = "use a plain ViT (vit_*, deit*, beit*, eva02*) or a hierarchical transformer (swin*, hiera*)"
"""What to do about models that aren't of those kinds."""


_GRIDS = 4
"""Of so many grids a backbone keeps the position embeddings."""


class _AllSeen(Exception):
    """Ends a forward that has gone far enough."""


class TimmBackbone:
    """A frozen timm ViT, or a hierarchical model's last stage. Not thread-safe: one call at a time.

    What isn't a plain ViT of timm's is asked for maps as they are, `is_hierarchical` or ViTDet (operators/vitdet/named.py).

    `stride` below the patch size makes patches overlap. `pos_embed="dino"` interpolates absolute position embeddings as
    DINO's code does (LiFT's features depend on it): bicubic without antialias, sampled at (h + 0.1) / m; "timm" is
    timm's own antialiased resampling, which its models see at other sizes. `ragged` allows inputs of any size: pixels beyond
    the last whole patch aren't seen (plain ViTs; the papers' 56 px at patch 16). `mean` and `std` are those that its images are
    normalised by, for networks that want them by others.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        facet: Facet = "token",
        norm: bool | None = None,
        stride: int | None = None,
        pos_embed: Literal["timm", "dino"] | None = None,
        ragged: bool = False,
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
    ):
        self.model = cast(TimmModel, model)
        self.ragged = ragged
        self.mean, self.std = mean, std
        self.facet = facet
        self._forward_options = inspect.signature(self.model.forward_intermediates).parameters
        self.is_hierarchical = "output_dict" not in self._forward_options and not hasattr(model, "pos_drop")
        info = self.model.feature_info
        if isinstance(getattr(model, "patch_embed", None), nn.ModuleList):
            raise BackboneError(f"{type(model).__name__} cuts an image into patches of several sizes at once; {_OTHERS}")
        self.patch = int(info[-1]["reduction"])
        self.stride = stride or self.patch
        self.channels = int(info[-1]["num_chs"])
        self.n_layers = len(info)
        self.n_prefix = 0 if self.is_hierarchical else int(getattr(model, "num_prefix_tokens", 0) or 0)
        self.has_cls = not self.is_hierarchical and getattr(model, "cls_token", None) is not None
        self.norm = self._resolve_norm(norm)
        self._trained_pos_embed = getattr(model, "pos_embed", None)
        if pos_embed == "dino" and self._trained_pos_embed is None:
            raise BackboneError(f"pos_embed dino: {type(model).__name__} has no absolute position embeddings here; leave it out")
        overlaps = self.stride != self.patch and self._trained_pos_embed is not None
        self.pos_embed = pos_embed or ("dino" if overlaps else "timm")
        self._trained_grid: tuple[int, int] = getattr(getattr(model, "patch_embed", None), "grid_size", (0, 0))
        self._grid: tuple[int, int] | None = None
        self._resampled: dict[tuple[int, int], nn.Parameter] = {}
        "position embeddings of the last few grids"
        if facet != "token":
            self._attention(self.n_layers - 1)
        if self.stride != self.patch or ragged:
            self._free_patches()

    def _resolve_norm(self, norm: bool | None) -> bool:
        possible = self.facet == "token" and not self.is_hierarchical and "norm" in self._forward_options
        if norm and not possible:
            raise BackboneError(
                f"the final norm applies to facet token of plain ViTs only, not to facet {self.facet} of "
                f"{type(self.model).__name__}; drop --norm"
            )
        return possible if norm is None else norm

    def _free_patches(self) -> None:
        patch_embed = getattr(self.model, "patch_embed", None)
        if self.stride == self.patch and getattr(self.model, "takes_any_size", False):
            return
        if self.is_hierarchical or not isinstance(getattr(patch_embed, "proj", None), nn.Conv2d) or self.patch % self.stride:
            raise BackboneError(
                f"stride {self.stride}{', ragged,' * self.ragged} is not possible for {type(self.model).__name__} with patch "
                f"{self.patch}: plain ViTs only, and the stride must divide the patch"
            )
        if not getattr(self.model, "dynamic_img_size", False):
            raise BackboneError(
                f"{'ragged sizes' if self.ragged else 'stride override'} need a timm model with dynamic_img_size, "
                f"{type(self.model).__name__} has none"
            )
        self.model.patch_embed.proj.stride = (self.stride, self.stride)
        # The check that H and W are multiples of the patch happens in `grid_of`, with the stride.
        self.model.patch_embed.img_size = None

    def resolve_layers(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Block numbers counted from 0; negative ones count from the end. Raises `BackboneError` beyond the model's depth."""
        out = []
        for layer in layers:
            if not -self.n_layers <= layer < self.n_layers:
                raise BackboneError(
                    f"layer {layer}: {type(self.model).__name__} has {self.n_layers} (0 to {self.n_layers - 1}, or negative)"
                )
            out.append(layer % self.n_layers)
        if len(set(out)) != len(out) or not out:
            raise BackboneError(f"layers {tuple(layers)} must be different ones, at least one")
        if self.is_hierarchical and any(self._shape(layer) != self._shape(-1) for layer in out):
            raise BackboneError(
                f"{type(self.model).__name__} is hierarchical: only its last stage ({self.n_layers - 1}) is a map of one stride"
            )
        return tuple(out)

    def _shape(self, layer: int) -> tuple[int, int]:
        """The stride in pixels and the channels of a layer's map."""
        info = self.model.feature_info[layer]
        return int(info["reduction"]), int(info["num_chs"])

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of cells for an input of `size` pixels. Raises `BackboneError` where cells don't fit the input."""
        grid = []
        for side in size:
            if side < self.patch or ((side - self.patch) % self.stride and not self.ragged):
                fits = max(self.patch, round((side - self.patch) / self.stride) * self.stride + self.patch)
                raise BackboneError(
                    f"input size {size[0]}x{size[1]} px: {side} is not {self.patch} plus a multiple of {self.stride} "
                    f"(patch {self.patch}, stride {self.stride}); the nearest that is: {fits}. --ragged takes other sizes"
                )
            grid.append((side - self.patch) // self.stride + 1)
        return grid[0], grid[1]

    def __call__(self, images_BCHW: Tensor, layers: Sequence[int]) -> PatchFeatures:
        """Normalised images [B, 3, H, W] to maps of `layers` (0-based numbers)."""
        grid = self.grid_of((images_BCHW.shape[-2], images_BCHW.shape[-1]))
        if self._grid != grid:
            self._set_grid(grid)
        layers = list(layers)
        if self.facet != "token":
            tokens = self._facet_tokens(images_BCHW, layers)
        elif self.is_hierarchical:
            maps = self.model.forward_intermediates(images_BCHW, indices=layers, output_fmt="NCHW", intermediates_only=True)
            empty = maps[0].new_zeros((len(images_BCHW), 0, self.channels))
            return PatchFeatures(
                layers=dict(zip(layers, maps, strict=True)), prefix=dict.fromkeys(layers, empty), stride=self.stride
            )
        else:
            tokens = self._block_tokens(images_BCHW, layers)
        cells = {n: t[:, self.n_prefix :].unflatten(1, grid).permute(0, 3, 1, 2) for n, t in tokens.items()}
        prefix = {n: t[:, : self.n_prefix] for n, t in tokens.items()}
        return PatchFeatures(layers=cells, prefix=prefix, stride=self.stride)

    @torch.no_grad()
    def try_out(self, name: str, size: tuple[int, int], layers: Sequence[int]) -> None:
        """Make maps of a black image of `size`. Raises `BackboneError` where the model `name`, as it was built, can't.

        Of timm's models, many are built for any size and many have `forward_intermediates`, and some of them fail in it, or give
        other maps than their description says."""
        grid, device = self.grid_of(size), next(self.model.parameters()).device
        try:
            found = self(torch.zeros(1, 3, *size, device=device), layers)
        except BackboneError:
            raise
        except (RuntimeError, AssertionError, LookupError, AttributeError, TypeError, ValueError) as error:
            reason = textwrap.shorten(str(error), 200, placeholder=" ...")
            raise BackboneError(f"{name} can be built, but its maps can't be read as a ViT's ({reason}); {_OTHERS}") from None
        for layer, cells in found.layers.items():
            if cells.shape[1:] != (self.channels, *grid):
                raise BackboneError(
                    f"{name} gives {tuple(cells.shape[1:])} at layer {layer} for {size[0]}x{size[1]} px, where its description "
                    f"says {(self.channels, *grid)}; {_OTHERS}"
                )

    def compile(self, mode: str | None, layers: Sequence[int]) -> None:
        """Have torch compile the blocks, in place, for inputs of one shape; all of them by one compilation, at the first call.

        Those of `layers` stay as they are where a facet of them is taken, which asks for what goes into their attention. Raises
        `BackboneError` for models that aren't a row of blocks.
        """
        for number, block in enumerate(self.require_blocks()):
            if self.facet == "token" or number not in layers:
                block.compile(mode=mode, dynamic=False)

    def require_blocks(self) -> nn.Sequential | nn.ModuleList:
        """What `compile` is for. Raises `BackboneError`."""
        blocks = getattr(self.model, "blocks", None)
        if self.is_hierarchical or not isinstance(blocks, nn.Sequential | nn.ModuleList):
            raise BackboneError(f"--compile is for plain ViTs, whose blocks are alike; {type(self.model).__name__} is none")
        return blocks

    def _block_tokens(self, images: Tensor, layers: list[int]) -> dict[int, Tensor]:
        """Tokens after each of `layers`, [B, T + h*w, C]."""
        options = {"return_prefix_tokens": True} if "return_prefix_tokens" in self._forward_options else {}
        ordered = sorted(layers)
        out = self.model.forward_intermediates(
            images, indices=ordered, norm=self.norm, stop_early=True, output_fmt="NLC", intermediates_only=True, **options
        )
        by_layer = dict(zip(ordered, map(_with_prefix, out), strict=True))
        return {layer: by_layer[layer] for layer in layers}

    @property
    def heads(self) -> int:
        """Attention heads of the last block. Raises `BackboneError` for models without blocks of attention."""
        return int(self._attention(self.n_layers - 1).num_heads)

    def _attention(self, layer: int) -> Attention:
        blocks = getattr(self.model, "blocks", None)
        attention = getattr(blocks[layer], "attn", None) if blocks is not None and not self.is_hierarchical else None
        if attention is None or all(getattr(attention, name, None) is None for name in ("qkv", "q_proj")):
            name = type(self.model).__name__
            raise BackboneError(f"facet {self.facet} needs a plain ViT, whose blocks have a qkv or q_proj layer; {name} is none")
        return attention

    def _facet_tokens(self, images: Tensor, layers: list[int]) -> dict[int, Tensor]:
        """The asked projection of each layer's attention input, [B, T + h*w, C]; channels head-major."""
        inputs: dict[int, Tensor] = {}
        handles = []
        for layer in layers:

            def keep(_: nn.Module, args: tuple[Tensor, ...], layer: int = layer) -> None:
                inputs[layer] = args[0]
                if len(inputs) == len(layers):
                    raise _AllSeen

            handles.append(self._attention(layer).register_forward_pre_hook(keep))
        try:
            # The last block's own attention and MLP aren't needed.
            with contextlib.suppress(_AllSeen):
                self.model.forward_intermediates(
                    images, indices=[max(layers)], stop_early=True, output_fmt="NLC", intermediates_only=True
                )
        finally:
            for handle in handles:
                handle.remove()
        return {layer: _project(self._attention(layer), inputs[layer], self.facet) for layer in layers}

    def _set_grid(self, grid: tuple[int, int]) -> None:
        """Bring absolute position embeddings to `grid` once, instead of in every forward."""
        trained = self._trained_pos_embed
        if isinstance(trained, nn.Parameter) and trained.ndim == 3 and getattr(self.model, "dynamic_img_size", False):
            # Training alternates between grids; evaluations have some of each image's own.
            found, device = self._resampled.pop(grid, None), self.model.pos_embed.device
            if found is None or found.device != device:
                n_prefix = 0 if getattr(self.model, "no_embed_class", False) else self.n_prefix
                resample = _dino_pos_embed if self.pos_embed == "dino" else _timm_pos_embed
                resampled = resample(trained.detach(), grid, self._trained_grid, n_prefix)
                found = nn.Parameter(to_device(resampled, device), requires_grad=False)
            self.model.pos_embed = self._resampled[grid] = found
            for oldest in list(self._resampled)[:-_GRIDS]:
                del self._resampled[oldest]
            self.model.patch_embed.grid_size = grid
        elif self.pos_embed == "dino" and trained is not None and grid != self._trained_grid:
            raise BackboneError(f"pos_embed dino is not possible for {type(self.model).__name__}; leave it out")
        self._grid = grid

    def peak_bytes(self, batch: int, size: tuple[int, int]) -> int:
        """Upper bound on device memory for one call: weights, and per token the residual stream, norms, qkv, MLP and kept
        maps: 24 float32 values a channel."""
        weights = sum(p.numel() * p.element_size() for p in (*self.model.parameters(), *self.model.buffers()))
        if self.is_hierarchical:
            # Early stages have 4 x more tokens of half the channels, at a stride of 4.
            working = getattr(self.model, "working_bytes", 0)
            return weights + working + batch * (size[0] // 4) * (size[1] // 4) * self.channels * 24
        h, w = self.grid_of(size)
        return weights + batch * (h * w + self.n_prefix) * self.channels * 24 * 4


def _with_prefix(tokens: Tensor | Sequence[Tensor]) -> Tensor:
    """All tokens in the model's order; timm returns (patches, prefix) pairs only where the model has prefix tokens."""
    if isinstance(tokens, Tensor):
        return tokens
    patches, prefix = tokens
    return torch.cat([prefix, patches], dim=1)


def _timm_pos_embed(trained: Tensor, grid: tuple[int, int], trained_grid: tuple[int, int], n_prefix: int) -> Tensor:
    return timm.layers.pos_embed.resample_abs_pos_embed(
        trained, new_size=list(grid), old_size=list(trained_grid), num_prefix_tokens=n_prefix
    )


def _dino_pos_embed(trained: Tensor, grid: tuple[int, int], trained_grid: tuple[int, int], n_prefix: int) -> Tensor:
    """DINO's `interpolate_pos_encoding`, which LiFT's official code runs its backbones with.

    The interpolation is given the scale (n + 0.1) / m for n cells from m, where DINO's 0.1 keeps rounding from n - 1 cells, and
    samples by that scale, not by n / m.
    """
    if grid == trained_grid:
        return trained
    prefix, patches = trained[:, :n_prefix], trained[:, n_prefix:].float()
    maps = patches.unflatten(1, trained_grid).permute(0, 3, 1, 2)
    scale = tuple((n + 0.1) / m for n, m in zip(grid, trained_grid, strict=True))
    maps = F.interpolate(maps, scale_factor=scale, mode="bicubic", align_corners=False, recompute_scale_factor=False)
    if maps.shape[-2:] != grid:
        raise BackboneError(f"DINO's position embedding rule gives {tuple(maps.shape[-2:])} for a grid of {grid}")
    return torch.cat([prefix, maps.flatten(2).transpose(1, 2).to(trained.dtype)], dim=1)


def _project(attention: Attention, x: Tensor, facet: Facet) -> Tensor:
    """Query, key or value of an attention layer's input, recomputed from its weights."""
    name = facet[0]
    if getattr(attention, "qkv", None) is None:
        projection: nn.Linear = getattr(attention, f"{name}_proj")
        return projection(x)
    part, joined = "qkv".index(name), attention.qkv
    # EVA's attention keeps its biases beside the joined projection, and has none for keys.
    bias = getattr(attention, f"{name}_bias", None) if joined.bias is None else joined.bias.chunk(3)[part]
    return F.linear(x, joined.weight.chunk(3)[part], bias)


# --- running on a device ----------------------------------------------------------------------------------------------

_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """torch autocast for `precision`; nothing for fp32, which is float32 in convolutions, too, from then on.

    Raises `BackboneError` for bf16 on a GPU that hasn't any.
    """
    dtype = _PRECISIONS[precision]
    if device.type == "cuda" and dtype is torch.float32:
        # By default torch rounds what convolutions multiply to TF32's 10 bits. For all of the process, since upsamplers and
        # backward passes come behind this.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if dtype is torch.bfloat16 and lacks_bf16(device):
        raise BackboneError(f"{torch.cuda.get_device_name(device)}: {NO_BF16}")
    return contextlib.nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype)


NO_BF16 = "this kind of GPU doesn't compute in bf16; use --precision fp16, whose numbers are nearer to fp32, or fp32"


def lacks_bf16(device: torch.device) -> bool:
    """Whether it's a GPU before NVIDIA's Ampere: torch emulates bf16 there, several times slower than float32."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device)[0] < 8


def cast_matmul_weights(model: nn.Module, precision: str) -> None:
    """Cast the weights that autocast would cast anew in every forward; the numbers stay those of autocast."""
    if precision != "fp32":
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(_PRECISIONS[precision])


def fold_batchnorms(net: nn.Module) -> None:
    """Put each BatchNorm's scale and shift into the convolution before it, in place."""
    for sequence in [module for module in net.modules() if isinstance(module, nn.Sequential)]:
        for i in range(len(sequence) - 1):
            conv, norm = sequence[i], sequence[i + 1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                sequence[i] = fuse_conv_bn_eval(conv, norm)
                sequence[i + 1] = nn.Identity()


def normalise(images_BHWC: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [B, H, W, 3] to normalised float32 [B, 3, H, W] on the same device."""
    # Filled there: a copy of `torch.tensor` waits until a GPU is done with all that it was given.
    scale, shift = (torch.stack([torch.full((), each, device=images_BHWC.device) for each in of]) * 255 for of in (std, mean))
    return ((images_BHWC.float() - shift) / scale).permute(0, 3, 1, 2).contiguous()
