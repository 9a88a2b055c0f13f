"""LoRA on a timm ViT: the patch embedding and every block's query, key, value and output projections, as ViT-Up has it.

Low-rank products are added by forward hooks, so that the model keeps its modules, names and own forward. Projections that
timm fuses (`attn.qkv`) get one product each for q, k and v. Parameters carry the names of PEFT, which made the published ones.

Shapes: D channels, r the rank.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators.timm_models import Attention, TimmModel
from operators.upsamplers.protocol import UpsamplerError, require_fitting

_Size = tuple[int, int]

_PREFIX = "backbone."
"of the published files, before the adapters' names"


class LowRank(nn.Module):
    """alpha / r * B(A(dropout(x))) beside a linear or a patch convolution; zero at first."""

    def __init__(self, base: nn.Linear | nn.Conv2d, outputs: int, rank: int, alpha: float, dropout: float):
        super().__init__()
        down, up = _pair(base, outputs, rank)
        nn.init.kaiming_uniform_(down.weight, a=5**0.5)
        nn.init.zeros_(up.weight)
        self.lora_A, self.lora_B = nn.ModuleDict({"default": down}), nn.ModuleDict({"default": up})
        self.scale, self.dropout = alpha / rank, dropout

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training)
        return self.lora_B["default"](self.lora_A["default"](dropped)) * self.scale

    def delta(self) -> Tensor:
        """What to add to the base's weight instead, [outputs, ...] as that is shaped."""
        down, up = (cast(nn.Linear, each["default"]).weight for each in (self.lora_A, self.lora_B))
        return self.scale * (up.flatten(1) @ down.flatten(1)).view(-1, *down.shape[1:])


def _pair(base: nn.Linear | nn.Conv2d, outputs: int, rank: int) -> tuple[nn.Linear, nn.Linear] | tuple[nn.Conv2d, nn.Conv2d]:
    """The two factors: to `rank` channels as `base` goes about it, and from those to `outputs`."""
    if isinstance(base, nn.Linear):
        return nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, outputs, bias=False)
    kernel, stride, padding = cast("tuple[_Size, _Size, _Size]", (base.kernel_size, base.stride, base.padding))
    down = nn.Conv2d(base.in_channels, rank, kernel, stride, padding, bias=False)
    return down, nn.Conv2d(rank, outputs, 1, bias=False)


class Lora(nn.Module):
    """The adapter of a model: freezes the model, then adds trainable low-rank products to its projections.

    Its parameters are the adapter's alone, under PEFT's names. It takes the model over: give it a copy where others use it.
    Raises `UpsamplerError` for models without a patch convolution or without blocks of attention.
    """

    def __init__(self, model: nn.Module, *, rank: int = 16, alpha: float = 32.0, dropout: float = 0.05):
        super().__init__()
        self._settings = (rank, alpha, dropout)
        self._enabled, self._merged = True, False
        self._sites: list[tuple[nn.Linear | nn.Conv2d, tuple[LowRank, ...]]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._separate_biases: list[Attention] = []
        model.requires_grad_(False)
        self._attach(patch_convolution(model), ("embeddings.patch_embeddings",))
        for number, block in enumerate(cast(TimmModel, model).blocks):
            self._attach_attention(f"layer.{number}.attention", block.attn)

    def _attach_attention(self, path: str, attention: Attention) -> None:
        projections = [f"{path}.{name}_proj" for name in "qkv"]
        if attention.qkv is None:
            for projection, name in zip(projections, "qkv", strict=True):
                self._attach(getattr(attention, f"{name}_proj"), (projection,))
        else:
            self._attach(attention.qkv, tuple(projections))
            if getattr(attention, "q_bias", None) is not None:
                # Else timm reads the weight of qkv without calling it, and hooks don't run.
                attention.qkv_bias_separate = True
                self._separate_biases.append(attention)
        self._attach(attention.proj, (f"{path}.o_proj",))

    def _attach(self, base: nn.Linear | nn.Conv2d, paths: tuple[str, ...]) -> None:
        width = base.weight.shape[0] // len(paths)
        products = tuple(LowRank(base, width, *self._settings).to(base.weight.device) for _ in paths)
        for path, product in zip(paths, products, strict=True):
            _nest(self, f"base_model.model.{path}", product)
        self._sites.append((base, products))
        self._handles.append(base.register_forward_hook(functools.partial(self._add, products)))

    def _add(self, products: tuple[LowRank, ...], _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not self._enabled:
            return None
        parts = [product(args[0]) for product in products]
        return output + (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1))

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within, the model is as it was without the adapter: the teacher. Raises `UpsamplerError` once merged."""
        if self._merged:
            raise UpsamplerError("the adapter is merged into the weights; the model without it is gone")
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    @torch.no_grad()
    def merge(self) -> None:
        """Add the products to the model's weights, for inference; the same numbers up to rounding, and no way back."""
        if self._merged:
            raise UpsamplerError("the adapter is merged already")
        for (base, products), handle in zip(self._sites, self._handles, strict=True):
            base.weight += torch.cat([product.delta() for product in products]).to(base.weight.dtype)
            handle.remove()
        for attention in self._separate_biases:
            attention.qkv_bias_separate = False
        self._merged = True

    def peft_state(self) -> dict[str, Tensor]:
        """The adapter's tensors under the names of published files, `backbone.base_model...`."""
        return {f"{_PREFIX}{name}": tensor for name, tensor in self.state_dict().items()}

    def load_peft_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the tensors of `peft_state`, strictly. Raises `UpsamplerError` where names or shapes differ."""
        require_fitting(self.peft_state(), state, "the adapter")
        self.load_state_dict({name.removeprefix(_PREFIX): tensor for name, tensor in state.items()})


def patch_convolution(model: nn.Module) -> nn.Conv2d:
    """The convolution of a plain ViT's patch embedding. Raises `UpsamplerError` for other models."""
    convolution = getattr(getattr(model, "patch_embed", None), "proj", None)
    plain = all(hasattr(getattr(block, "attn", None), "qkv") for block in getattr(model, "blocks", [None]))
    if not isinstance(convolution, nn.Conv2d) or not plain:
        raise UpsamplerError(
            f"ViT-Up needs a plain timm ViT with patch_embed.proj and blocks with attn.qkv or attn.q_proj; "
            f"{type(model).__name__} is none"
        )
    return convolution


def _nest(root: nn.Module, path: str, leaf: nn.Module) -> None:
    """Register `leaf` under a dotted path, so that its parameters' names begin with that."""
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    root.add_module(name, leaf)
