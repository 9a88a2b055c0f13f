"""LoRA on timm ViTs: PEFT's arithmetic and names, for projections that are fused, split, or with biases of their own."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from operators.upsamplers.protocol import UpsamplerError
from operators.upsamplers.vit_up.lora import Lora

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
EXACT = {"rtol": 0, "atol": 0}
MODELS = {
    "fused": ("vit_tiny_patch16_224", {}),
    "fused, biases apart": ("vit_small_patch16_dinov3_qkvb", {}),
    "fused, no biases": ("vit_small_patch16_dinov3", {}),
    "split": ("vit_small_patch16_dinov3_qkvb", {"qkv_fused": False}),
}


def model_of(kind: str) -> nn.Module:
    name, options = MODELS[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, dynamic_img_size=True, depth=2, **options).eval()
    for block in model.blocks:
        if getattr(block, "gamma_1", None) is not None:
            block.gamma_1.data.fill_(1.0)
            block.gamma_2.data.fill_(1.0)
        if getattr(block.attn, "q_bias", None) is not None:
            nn.init.normal_(block.attn.q_bias)
            nn.init.normal_(block.attn.v_bias)
    return model


def images() -> Tensor:
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


def adapted(kind: str, **options: object) -> tuple[nn.Module, Lora]:
    """A model with an adapter that does something, as after training."""
    model = model_of(kind)
    lora = Lora(model, rank=4, alpha=8, **options).eval()
    for product in lora.modules():
        if hasattr(product, "lora_B"):
            nn.init.normal_(product.lora_B["default"].weight, std=0.1)
    return model, lora


@pytest.mark.parametrize("kind", MODELS)
class TestEveryKindOfProjection:
    def test_a_new_adapter_changes_nothing(self, kind):
        plain, model = model_of(kind), model_of(kind)
        Lora(model).eval()

        torch.testing.assert_close(model.forward_features(images()), plain.forward_features(images()), **CLOSE)

    def test_disabled_it_is_the_plain_model_and_after_that_adapted_again(self, kind):
        plain, (model, lora) = model_of(kind), adapted(kind)
        before = model.forward_features(images())

        with lora.disabled():
            torch.testing.assert_close(model.forward_features(images()), plain.forward_features(images()), **CLOSE)

        torch.testing.assert_close(model.forward_features(images()), before, **EXACT)
        assert (before - plain.forward_features(images())).abs().max() > 0.1

    def test_merged_it_gives_the_same(self, kind):
        model, lora = adapted(kind)
        before = model.forward_features(images())

        lora.merge()

        torch.testing.assert_close(model.forward_features(images()), before, rtol=1e-3, atol=1e-4)

    def test_each_projection_has_its_own_product(self, kind):
        """q, k, v of a block and its output, each W x + b + alpha / r B A x."""
        plain, (model, lora) = model_of(kind), adapted(kind)
        lora.merge()
        state = lora.peft_state()

        for number, (block, before) in enumerate(zip(model.blocks, plain.blocks, strict=True)):
            expected = [
                2 * state[f"{path}.lora_B.default.weight"] @ state[f"{path}.lora_A.default.weight"]
                for name in "qkvo"
                for path in [f"backbone.base_model.model.layer.{number}.attention.{name}_proj"]
            ]
            found = [new - old for new, old in zip(weights(block.attn), weights(before.attn), strict=True)]
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, **CLOSE)

    def test_only_the_adapter_learns_and_all_of_it(self, kind):
        model, lora = adapted(kind)

        model.forward_features(images()).square().sum().backward()

        assert all(p.grad is None and not p.requires_grad for p in model.parameters())
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lora.parameters())

    def test_a_copy_of_both_is_independent(self, kind):
        model, lora = adapted(kind)
        both = nn.ModuleList([model, lora])
        before = model.forward_features(images())

        model_copy, lora_copy = copy.deepcopy(both)
        for parameter in lora_copy.parameters():
            parameter.data.zero_()

        torch.testing.assert_close(model.forward_features(images()), before, **EXACT)
        plain = model_of(kind).forward_features(images())
        torch.testing.assert_close(model_copy.forward_features(images()), plain, **CLOSE)


def weights(attention: nn.Module) -> list[Tensor]:
    if attention.qkv is None:
        return [getattr(attention, name).weight for name in ("q_proj", "k_proj", "v_proj", "proj")]
    return [*attention.qkv.weight.chunk(3), attention.proj.weight]


def test_the_patch_convolution_is_adapted():
    plain, (model, lora) = model_of("fused"), adapted("fused")
    product = lora.base_model.model.embeddings.patch_embeddings

    out = model.patch_embed.proj(images())

    down = F.conv2d(images(), product.lora_A["default"].weight, stride=16)
    expected = plain.patch_embed.proj(images()) + 2 * F.conv2d(down, product.lora_B["default"].weight)
    torch.testing.assert_close(out, expected, **CLOSE)


def test_it_starts_at_zero_with_kaiming_uniform_inputs():
    product = Lora(model_of("fused"), rank=16).base_model.model.layer.get_submodule("0.attention.o_proj")

    down, up = product.lora_A["default"].weight, product.lora_B["default"].weight

    assert up.count_nonzero() == 0
    bound = 1 / 192**0.5  # kaiming-uniform with a = sqrt 5
    assert 0.98 * bound < down.abs().max() <= bound


def test_dropout_is_on_the_adapters_input_in_train_mode_only():
    model, lora = adapted("fused", dropout=0.5)
    linear, x = model.blocks[0].attn.proj, torch.randn(4000, 192)
    base = F.linear(x, linear.weight, linear.bias)
    still = linear(x) - base

    lora.train()
    torch.manual_seed(0)
    dropped = torch.stack([linear(x) - base for _ in range(2)])

    assert not torch.allclose(dropped[0], dropped[1])
    # Dropping inputs keeps the mean and doubles what the inputs add to the variance.
    assert dropped.var().item() == pytest.approx(2 * still.var().item(), rel=0.1)


def test_names_are_pefts_and_loading_is_strict():
    _, lora = adapted("fused")
    state = lora.peft_state()
    other = Lora(model_of("fused"), rank=4)

    other.load_peft_state(state)

    assert len(state) == 2 * (1 + 2 * 4)
    assert "backbone.base_model.model.layer.1.attention.k_proj.lora_A.default.weight" in state
    for name, tensor in other.peft_state().items():
        torch.testing.assert_close(tensor, state[name], **EXACT)
    name = next(iter(state))
    with pytest.raises(UpsamplerError, match="1 missing"):
        other.load_peft_state({key: value for key, value in state.items() if key != name})
    with pytest.raises(UpsamplerError, match="1 unexpected: extra"):
        other.load_peft_state({**state, "extra": state[name]})
    with pytest.raises(UpsamplerError, match="of another shape"):
        Lora(model_of("fused"), rank=8).load_peft_state(state)


def test_a_merged_adapter_can_be_neither_disabled_nor_merged_again():
    _, lora = adapted("fused")
    lora.merge()

    with pytest.raises(UpsamplerError, match="merged already"):
        lora.merge()
    with pytest.raises(UpsamplerError, match="merged into the weights"), lora.disabled():
        pass


def test_other_models_are_refused():
    with pytest.raises(UpsamplerError, match="ResNet is none"):
        Lora(timm.create_model("resnet18"))
