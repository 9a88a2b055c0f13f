"""Linear layers whose weights lie in memory as oneDNN multiplies them, for inference in bfloat16 on a CPU.

`torch.nn.functional.linear` has oneDNN bring the weights into its blocked layout in every call. That takes a tenth to a fifth of
a ViT's forward of 16 images at 224 px. Results are the same bits: the layout changes neither what is multiplied nor the order in
which it is summed up (tests/operators/test_backbone.py).
"""

import torch
from torch import Tensor, nn


def can_pack() -> bool:
    """Whether this machine and this build of torch have what `pack_linears` needs: calls that torch's compiler uses, and that
    aren't documented. Only with AVX-512, where it was held against plain layers."""
    if not torch.backends.mkldnn.enabled or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    needed = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
    return all(hasattr(torch.ops.mkldnn, name) for name in needed) and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedLinear(nn.Module):
    """An `nn.Linear` with bfloat16 weights, for inference on a CPU, which packs them when it's first called.

    Not before, since some models take a layer's `weight` and never call it.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.plain: Tensor | None = linear.weight
        "[out, in], until it is packed"
        self.bias = linear.bias
        self.register_buffer("packed", None, persistent=False)

    @property
    def weight(self) -> Tensor:
        """bfloat16 [out, in]; unpacked anew each time, once it is packed."""
        return self.packed.to_dense() if self.plain is None else self.plain

    def forward(self, x: Tensor) -> Tensor:
        """[..., in], rounded to bfloat16, to bfloat16 [..., out]."""
        if self.plain is not None:
            rows = x.numel() // self.in_features
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.plain.detach(), rows)
            self.plain = None
        return torch.ops.mkldnn._linear_pointwise(x.to(torch.bfloat16), self.packed, self.bias, "none", [], "")


def pack_linears(model: nn.Module) -> None:
    """Replace the linear layers that are in bfloat16 and on a CPU, if it `can_pack`. Nothing can be trained through them."""
    if not can_pack():
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and child.weight.dtype is torch.bfloat16 and child.weight.device.type == "cpu":
                setattr(module, name, PackedLinear(child))


def unpack_linears(model: nn.Module) -> None:
    """Take back what `pack_linears` did."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, PackedLinear):
                linear = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
                linear.weight, linear.bias = nn.Parameter(child.weight, requires_grad=False), child.bias
                setattr(module, name, linear)
