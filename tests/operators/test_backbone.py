"""Backbones: timm's own numbers and LiFT's, weights from anywhere that run nothing, errors that say what to do."""

import contextlib
import copy
import functools
import os
import pickle
import socket
from pathlib import Path

import fsspec
import numpy as np
import pytest
import safetensors
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch.profiler import ProfilerActivity, profile

from operators import timm_models
from operators.backbone import BackboneError, TimmBackbone, autocast, cast_matmul_weights, lacks_bf16, normalise
from operators.packed import PackedLinear, can_pack, pack_linears, unpack_linears
from operators.timm_models import create_model, load_arrays, preprocessing, share_arrays, state_arrays, weights_digest
from pipelines.features.bundle import LoadedModel, describe_model
from pipelines.features.config import FeatureConfig
from pipelines.features.descriptions import ModelDescription
from pipelines.features.model import FeatureModel
from pipelines.features.model_bundle import ModelBundle
from pipelines.features.weights import WeightsChoice, WeightsUnavailable, load_model, read_state_dict
from tests.goldens import tensor_golden

TINY = "test_vit.r160_in1k"

# Each family's own configuration, with two narrow blocks.
SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 0, "dynamic_img_size": True}
FAMILIES = {
    "dino": "vit_small_patch16_224.dino",
    "clip": "vit_base_patch16_clip_224.openai",
    "dinov2-reg": "vit_small_patch14_reg4_dinov2.lvd142m",
    "siglip": "vit_base_patch16_siglip_224.webli",
    "dinov3": "vit_small_patch16_dinov3.lvd1689m",
    "eva02": "eva02_tiny_patch14_224.mim_in22k",
    "eva02-split": "eva02_base_patch14_224.mim_in22k",
}
PATCH = {"dinov2-reg": 14, "eva02": 14, "eva02-split": 14}
PREFIX = {"siglip": 0, "dinov2-reg": 5, "dinov3": 5}


@functools.cache
def _family(name: str) -> torch.nn.Module:
    torch.manual_seed(2)
    model = timm.create_model(FAMILIES[name], **SMALL).eval().requires_grad_(False)
    for parameter in model.parameters():  # nothing stays at zero or one: biases, scales and tokens must show
        parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def family(name: str) -> torch.nn.Module:
    return copy.deepcopy(_family(name))


def images(height: int, width: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(4))


def tokens_to_map(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)


# --- maps -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("cells", [(4, 4), (3, 5), (14, 14)])
def test_maps_are_those_of_timms_own_forward(name, cells):
    patch, prefix = PATCH.get(name, 16), PREFIX.get(name, 1)
    batch = images(cells[0] * patch, cells[1] * patch)
    tokens = family(name).forward_features(batch)

    features = TimmBackbone(family(name))(batch, [1])

    torch.testing.assert_close(features.layers[1], tokens_to_map(tokens[:, prefix:], cells), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.prefix[1], tokens[:, :prefix], rtol=1e-5, atol=1e-5)
    assert (features.grid, features.stride) == (cells, patch)


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_without_norm_are_the_blocks_outputs_in_the_order_asked(name):
    patch, prefix = PATCH.get(name, 16), PREFIX.get(name, 1)
    batch, reference, seen = images(4 * patch, 5 * patch), family(name), {}
    for i, block in enumerate(reference.blocks):
        block.register_forward_hook(lambda _, __, out, i=i: seen.__setitem__(i, out))
    reference.forward_features(batch)

    features = TimmBackbone(family(name), norm=False)(batch, [1, 0])

    for layer in (0, 1):
        expected = tokens_to_map(seen[layer][:, prefix:], (4, 5))
        torch.testing.assert_close(features.layers[layer], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.stacked((1, 0))[:, 48:], features.layers[0])
    torch.testing.assert_close(features.pooled((1, 0), "mean")[:, :48], features.layers[1].mean(dim=(2, 3)))


def test_pooled_cls_is_the_class_token_after_the_norm():
    batch = images(64, 64)
    tokens = family("dinov2-reg").forward_features(images(56, 56))

    features = TimmBackbone(family("dinov2-reg"))(images(56, 56), [1])

    torch.testing.assert_close(features.pooled((1,), "cls"), tokens[:, 0], rtol=1e-5, atol=1e-5)
    assert TimmBackbone(family("dino")).has_cls
    assert not TimmBackbone(family("siglip")).has_cls
    assert TimmBackbone(family("siglip"))(batch, [1]).prefix[1].shape == (2, 0, 48)


@pytest.mark.parametrize("size", [(64, 96), (224, 224)])
def test_hiera_gives_its_last_stage(size):
    torch.manual_seed(2)
    kwargs = {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1), "num_classes": 0, "img_size": size}
    model = timm.create_model("hiera_tiny_224.mae", **kwargs).eval().requires_grad_(False)
    batch = images(*size, batch=1)
    stages = copy.deepcopy(model).forward_intermediates(batch, intermediates_only=True)

    backbone = TimmBackbone(model)
    features = backbone(batch, backbone.resolve_layers([-1]))

    assert (backbone.stride, backbone.channels, backbone.has_cls, backbone.norm) == (32, 128, False, False)
    assert features.layers[3].shape == (1, 128, size[0] // 32, size[1] // 32)
    torch.testing.assert_close(features.layers[3], stages[-1], rtol=1e-5, atol=1e-5)
    assert features.prefix[3].shape == (1, 0, 128)


def test_one_backbone_serves_several_sizes_in_any_order():
    backbone = TimmBackbone(family("dino"))
    first = backbone(images(64, 80), [1]).layers[1]

    backbone(images(224, 224), [1])
    backbone(images(96, 32), [1])

    assert torch.equal(backbone(images(64, 80), [1]).layers[1], first)


@pytest.mark.parametrize("name", ["dinov2-reg", "siglip", "dinov3", "eva02"])
@pytest.mark.parametrize("options", [{}, {"overlap": True}, {"facet": "key"}])
def test_another_size_afterwards_gives_what_a_fresh_backbone_gives(name, options):
    patch = PATCH.get(name, 16)
    stride = patch // 2 if "overlap" in options else patch
    make = functools.partial(TimmBackbone, stride=stride, facet=options.get("facet", "token"))
    used = make(family(name))

    for cells in [(4, 4), (6, 3), (2, 5), (4, 4)]:
        batch = images(cells[0] * patch, cells[1] * patch, batch=1)
        assert torch.equal(used(batch, [1]).layers[1], make(family(name))(batch, [1]).layers[1])


def test_an_images_features_do_not_depend_on_its_batch():
    backbone = TimmBackbone(family("dino"))

    together = backbone(images(64, 64, batch=3), [1]).layers[1]
    alone = backbone(images(64, 64, batch=3)[1:2], [1]).layers[1]

    torch.testing.assert_close(together[1:2], alone, rtol=1e-5, atol=1e-5)


def test_normalised_images_are_those_of_torchvision():
    raw = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    expected = (raw / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]

    found = normalise(torch.from_numpy(raw), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    np.testing.assert_allclose(found.numpy(), expected.transpose(0, 3, 1, 2), rtol=0, atol=1e-6)


# --- facets -----------------------------------------------------------------------------------------------------------------

FACETS = ["query", "key", "value"]


@pytest.mark.parametrize("name", ["dino", "clip", "dinov2-reg", "siglip", "dinov3"])
@pytest.mark.parametrize("facet", FACETS)
def test_facets_are_slices_of_the_qkv_layer(name, facet):
    patch, prefix = PATCH.get(name, 16), PREFIX.get(name, 1)
    batch, reference, seen = images(3 * patch, 4 * patch), family(name), []
    reference.blocks[0].attn.qkv.register_forward_hook(lambda _, __, out: seen.append(out))
    reference.forward_features(batch)
    part = FACETS.index(facet) * 48

    features = TimmBackbone(family(name), facet=facet)(batch, [0])

    expected = seen[0][..., part : part + 48]
    torch.testing.assert_close(features.layers[0], tokens_to_map(expected[:, prefix:], (3, 4)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.prefix[0], expected[:, :prefix], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_values_are_those_that_attention_is_given(name, monkeypatch):
    patch, prefix = PATCH.get(name, 16), PREFIX.get(name, 1)
    batch, given, original = images(3 * patch, 4 * patch), [], F.scaled_dot_product_attention

    def listen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        given.append(v)
        return original(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", listen)
    family(name).forward_features(batch)
    expected = given[1].transpose(1, 2).flatten(2)

    features = TimmBackbone(family(name), facet="value")(batch, [1])

    torch.testing.assert_close(features.layers[1], tokens_to_map(expected[:, prefix:], (3, 4)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["eva02", "eva02-split"])
def test_queries_and_keys_have_the_biases_that_eva_keeps_beside_its_weights(name, monkeypatch):
    # Rotary positions turn the queries and keys of patches before attention is given them, but not the class token's.
    batch, given, original = images(42, 56), [], F.scaled_dot_product_attention

    def listen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        given.append((q, k))
        return original(q, k, v, **options)

    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", listen)
        family(name).forward_features(batch)
    q, k = (tensor.transpose(1, 2).flatten(2)[:, :1] for tensor in given[1])

    query, key = (TimmBackbone(family(name), facet=facet)(batch, [1]).prefix[1] for facet in ("query", "key"))

    torch.testing.assert_close(query, q, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(key, k, rtol=1e-5, atol=1e-5)


def test_facets_of_several_layers_come_from_one_forward(monkeypatch):
    backbone = TimmBackbone(family("dino"), facet="key")
    calls = []
    backbone.model.patch_embed.register_forward_hook(lambda *_: calls.append(1))

    both = backbone(images(64, 64), [1, 0])

    assert len(calls) == 1
    for layer in (0, 1):
        torch.testing.assert_close(both.layers[layer], backbone(images(64, 64), [layer]).layers[layer])


# --- stride and position embeddings, against LiFT's extractor ---------------------------------------------------------------

CASES = [
    ("lift_extractor_dino_p16_stride8", (64, 64), (7, 7)),
    ("lift_extractor_dino_p16_stride8", (48, 80), (5, 9)),
    ("lift_extractor_dino_p8", (64, 64), (8, 8)),
    ("lift_extractor_dino_p8", (32, 48), (4, 6)),
    ("lift_extractor_dino_p8", (96, 72), (12, 9)),
]


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, object], VisionTransformer]:
    """Tensors, settings, and timm's model with the golden's weights."""
    tensors, config = tensor_golden(name)
    model = VisionTransformer(
        img_size=config["pos_img_size"],
        patch_size=config["patch"],
        embed_dim=config["dim"],
        depth=config["depth"],
        num_heads=config["heads"],
        qkv_bias=config["qkv_bias"],
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=config["ln_eps"]),
        num_classes=0,
        dynamic_img_size=True,
    )
    model.load_state_dict({key[3:]: tensor for key, tensor in tensors.items() if key.startswith("sd/")}, strict=True)
    return tensors, config, model.eval().requires_grad_(False)


def head_minor(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """Our channels are (head, dimension), LiFT's are (dimension, head)."""
    return tokens.unflatten(-1, (heads, -1)).transpose(-1, -2).flatten(-2)


# float32 noise of the goldens is 4e-6; the position embedding rule shows at 1e-1.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.mark.parametrize(("name", "size", "grid"), CASES)
@pytest.mark.parametrize("facet", ["key", "query", "value", "token"])
def test_features_are_those_of_lifts_extractor(name, size, grid, facet):
    tensors, config, model = golden(name)
    norm = False if facet == "token" else None
    backbone = TimmBackbone(model, facet=facet, norm=norm, stride=config["stride"], pos_embed="dino")
    shape = f"{size[0]}x{size[1]}"

    features = backbone(tensors[f"in/image_{shape}"], [config["layer"]])

    tokens = features.layers[config["layer"]].flatten(2).transpose(1, 2)
    tokens = tokens if facet == "token" else head_minor(tokens, config["heads"])
    assert features.grid == grid
    torch.testing.assert_close(tokens, tensors[f"out/{facet}_{shape}"], **TOLERANCE)


@pytest.mark.parametrize(("name", "size", "grid"), CASES)
def test_position_embeddings_and_class_keys_are_those_of_dino(name, size, grid):
    tensors, config, model = golden(name)
    backbone = TimmBackbone(model, facet="key", stride=config["stride"], pos_embed="dino")
    shape = f"{size[0]}x{size[1]}"

    features = backbone(tensors[f"in/image_{shape}"], [config["layer"]])

    torch.testing.assert_close(model.pos_embed, tensors[f"out/pos_embed_{shape}"], rtol=1e-6, atol=1e-6)
    keys = features.prefix[config["layer"]]
    expected = tensors[f"out/key_with_cls_{shape}"][:, :1]
    torch.testing.assert_close(head_minor(keys, config["heads"]), expected, **TOLERANCE)


def test_timms_position_embeddings_are_not_dinos_at_another_size():
    tensors, _, model = golden("lift_extractor_dino_p8")

    TimmBackbone(model, pos_embed="timm")(tensors["in/image_32x48"], [0])

    assert (model.pos_embed - tensors["out/pos_embed_32x48"]).abs().max() > 0.01


def test_stride_override_takes_dinos_position_embeddings_by_default():
    assert TimmBackbone(family("dino")).pos_embed == "timm"
    assert TimmBackbone(family("dino"), stride=8).pos_embed == "dino"


@pytest.mark.parametrize("name", ["clip", "dinov2-reg", "siglip", "dinov3", "eva02"])
def test_overlapping_patches_contain_the_plain_ones_before_attention(name):
    """With the stride halved, every second cell sees the pixels that a plain cell sees."""
    patch = PATCH.get(name, 16)
    batch = images(4 * patch, 4 * patch)
    plain, dense = family(name), TimmBackbone(family(name), stride=patch // 2)
    dense(batch, [1])

    overlapping = dense.model.patch_embed(batch)

    assert overlapping.shape[1:3] == (7, 7)
    torch.testing.assert_close(overlapping[:, ::2, ::2], plain.patch_embed(batch), rtol=1e-5, atol=1e-5)


# --- errors -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("vit_small_patch16_224.dinoo", "vit_small_patch16_224.dino"),
        ("vit_smal_patch16_224.dino", "vit_small_patch16_224.dino"),
        ("dinov2", "vit_base_patch14_dinov2"),
        ("qqqqqqqq", "vit_small_"),
    ],
)
def test_unknown_model_is_answered_with_near_names(name, near):
    with pytest.raises(BackboneError, match=rf"has no model '{name}'; near names: .*{near}"):
        preprocessing(name)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([2], r"layer 2: VisionTransformer has 2 \(0 to 1, or negative\)"),
        ([-3], "layer -3"),
        ([1, -1], "must be different ones"),
        ([], "at least one"),
    ],
)
def test_layers_that_are_not_there_are_refused(layers, message):
    with pytest.raises(BackboneError, match=message):
        TimmBackbone(family("dino")).resolve_layers(layers)


def test_layers_may_count_from_the_end():
    assert TimmBackbone(family("dino")).resolve_layers([-1, 0]) == (1, 0)


@pytest.mark.parametrize(
    ("stride", "size", "message"),
    [
        (None, (100, 64), "100 is not 16 plus a multiple of 16 .* the nearest that is: 96"),
        (None, (64, 110), "110 is not .* the nearest that is: 112"),
        (None, (8, 64), "8 is not .* the nearest that is: 16"),
        (8, (64, 67), "67 is not 16 plus a multiple of 8 .* the nearest that is: 64"),
    ],
)
def test_size_that_cells_do_not_fit_names_the_nearest_that_they_do(stride, size, message):
    with pytest.raises(BackboneError, match=message):
        TimmBackbone(family("dino"), stride=stride)(images(*size), [1])


def test_ragged_sizes_see_the_whole_patches_only():
    inside = images(64, 80)
    more = torch.cat([torch.cat([inside, images(64, 9)], dim=3), images(3, 89)], dim=2)

    ragged = TimmBackbone(family("dino"), ragged=True)(more, [1])

    assert ragged.grid == (4, 5)
    torch.testing.assert_close(ragged.layers[1], TimmBackbone(family("dino"))(inside, [1]).layers[1])
    with pytest.raises(BackboneError, match="ragged"):
        TimmBackbone(hiera(), ragged=True)


@pytest.mark.parametrize("stride", [5, 32])
def test_stride_that_does_not_divide_the_patch_is_refused(stride):
    with pytest.raises(BackboneError, match=rf"stride {stride} is not possible .* the stride must divide the patch"):
        TimmBackbone(family("dino"), stride=stride)


def hiera() -> torch.nn.Module:
    kwargs = {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1), "num_classes": 0, "img_size": (64, 64)}
    return timm.create_model("hiera_tiny_224.mae", **kwargs).eval()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 16}, "stride 16 is not possible for Hiera"),
        ({"facet": "key"}, "facet key needs a plain ViT, whose blocks have a qkv or q_proj layer; Hiera is none"),
        ({"norm": True}, "the final norm applies to facet token of plain ViTs only"),
    ],
)
def test_what_a_hierarchical_model_cannot_do_is_refused(options, message):
    with pytest.raises(BackboneError, match=message):
        TimmBackbone(hiera(), **options)


def test_early_stage_of_a_hierarchical_model_is_refused():
    with pytest.raises(BackboneError, match=r"only its last stage \(3\)"):
        TimmBackbone(hiera()).resolve_layers([0])


def test_norm_of_a_facet_is_refused():
    with pytest.raises(BackboneError, match="drop --norm"):
        TimmBackbone(family("dino"), facet="key", norm=True)


# --- weights ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    return create_model(TINY, (160, 160), None, 11)


@pytest.fixture
def saved(tmp_path, reference) -> Path:
    """The reference weights as every kind of file."""
    state = reference.state_dict()
    (tmp_path / "folder").mkdir()
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    safetensors.torch.save_file(state, tmp_path / "folder/model.safetensors")
    torch.save(state, tmp_path / "w.pth")
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, tmp_path / "nested.pth.tar.pt"
    )
    torch.save({"model": state}, tmp_path / "w.ckpt")
    return tmp_path


@pytest.mark.parametrize("name", ["w.safetensors", "folder", "folder/", "w.pth", "nested.pth.tar.pt", "w.ckpt"])
def test_weights_of_every_kind_of_file_are_the_ones_saved(saved, reference, name):
    model = load_model(TINY, (160, 160), WeightsChoice.parse(f"{saved}/{name}"), None, None)

    assert weights_digest(state_arrays(model)) == weights_digest(state_arrays(reference))


def test_weights_are_read_from_any_url(saved, reference):
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/weights/model.safetensors", (saved / "w.safetensors").read_bytes())

    for url in ("memory://weights", "memory://weights/model.safetensors", f"file://{saved}/w.pth"):
        assert weights_digest(state_arrays(load_model(TINY, (160, 160), WeightsChoice.parse(url), None, None))) == (
            weights_digest(state_arrays(reference))
        )
    fs.rm("/weights", recursive=True)


@pytest.mark.parametrize("name", ["none.safetensors", "none.pth", "empty-folder", "none/at/all/"])
def test_missing_weights_are_named(tmp_path, name):
    (tmp_path / "empty-folder").mkdir()

    with pytest.raises(WeightsUnavailable, match=rf"no weights at {tmp_path}/{name}: .* does not exist"):
        read_state_dict(f"{tmp_path}/{name}")


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))], ids=["torch", "pickle"]
)
@pytest.mark.parametrize("name", ["w.pth", "w.bin", "w.ckpt", "w.pt"])
def test_checkpoint_with_code_is_refused_and_the_code_is_not_run(tmp_path, write, name):
    write({"weight": torch.zeros(2), "extra": Evil(tmp_path / "was-run")}, tmp_path / name)

    with pytest.raises(WeightsUnavailable, match=r"can't be read as plain tensors \(weights_only\)"):
        read_state_dict(str(tmp_path / name))

    assert not (tmp_path / "was-run").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("data", [b"", b"<!doctype html><html>404</html>", b"\x80\x04K\x01.", b"PK\x03\x04 cut zip"])
@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_file_that_holds_no_weights_is_an_error_that_names_it(tmp_path, data, name):
    (tmp_path / name).write_bytes(data)

    with pytest.raises(WeightsUnavailable, match=rf"{tmp_path}/{name}"):
        read_state_dict(str(tmp_path / name))


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"a": torch.zeros(2), "module.a": torch.ones(2)}, "holds a twice, once as a wrapped module; save one of them"),
        ({0: torch.zeros(2)}, "holds no state dict of tensors, .*; it holds 0$"),
        ({"student": {"a": torch.zeros(2)}, "epoch": 1}, "it holds student, epoch$"),
        ([1], "it holds a list$"),
        ({}, None),
    ],
)
def test_contents_that_are_no_state_dict_are_refused_with_what_is_there(tmp_path, state, said):
    torch.save(state, tmp_path / "w.pth")

    with pytest.raises(WeightsUnavailable, match=said) if said else contextlib.nullcontext():
        read_state_dict(str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is no file of torch's: it is empty; download it again"),
        (b"<!DOCTYPE html><html>", "is no file of torch's: it begins with b'<!DOCTYPE html><html>'; download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS, not the file itself"),
    ],
)
def test_files_that_are_none_of_torchs_are_told_by_how_they_begin(tmp_path, data, said):
    (tmp_path / "w.pth").write_bytes(data)

    with pytest.raises(WeightsUnavailable, match=said):
        read_state_dict(str(tmp_path / "w.pth"))


def test_quantised_weights_are_refused():
    state = create_model(TINY, (64, 64), None, 0).state_dict()
    state["norm.weight"] = state["norm.weight"].to(torch.int8)

    with pytest.raises(BackboneError, match=rf"1 of the weights for {TINY} are whole numbers \(norm.weight\): quantised"):
        create_model(TINY, (64, 64), state, None)


def test_names_of_wrapped_modules_are_unwrapped_in_every_kind_of_file(tmp_path):
    state = {"module.a": torch.zeros(2), "module._orig_mod.b.module.c": torch.ones(2)}
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")

    for name in ("w.pth", "w.safetensors"):
        assert sorted(read_state_dict(str(tmp_path / name))) == ["a", "b.module.c"]


def test_weights_of_another_model_are_refused(saved):
    with pytest.raises(BackboneError, match="the weights don't fit test_vit2"):
        load_model("test_vit2.r160_in1k", (160, 160), WeightsChoice.parse(f"{saved}/w.pth"), None, None)


@pytest.mark.parametrize("other", ["resnet18", "test_vit2", "test_vit3"])
def test_weights_that_timm_would_leave_out_are_not_replaced_by_random_ones(other):
    weights = timm.create_model(other).state_dict()
    with pytest.raises(BackboneError, match="the weights don't fit test_vit at 64x64 px: "):
        create_model("test_vit", (64, 64), weights, None)


@pytest.mark.parametrize("key", ["pos_embed", "blocks.3.mlp.fc1.bias", "norm.weight"])
def test_weights_with_a_tensor_missing_or_unknown_are_refused(key, reference):
    weights = reference.state_dict()
    unknown = {**weights, "blocks.0.ls1.gamma": torch.ones(64)}
    del weights[key]

    with pytest.raises(BackboneError, match=rf'Missing key\(s\) in state_dict: "{key}"'):
        create_model(TINY, (160, 160), weights, None)
    with pytest.raises(BackboneError, match=r'Unexpected key\(s\) in state_dict: "blocks.0.ls1.gamma"'):
        create_model(TINY, (160, 160), unknown, None)


def test_no_tensors_at_all_are_refused():
    with pytest.raises(BackboneError, match=r"the weights for test_vit\S* hold no tensors"):
        create_model(TINY, (64, 64), {}, None)


def test_weights_with_a_classifier_are_taken_without_it(tmp_path, reference):
    head = {"head.weight": torch.zeros(1000, 64), "head.bias": torch.zeros(1000)}
    safetensors.torch.save_file({**reference.state_dict(), **head}, tmp_path / "w.safetensors")

    model = load_model(TINY, (160, 160), WeightsChoice.parse(f"{tmp_path}/w.safetensors"), None, None)

    assert weights_digest(state_arrays(model)) == weights_digest(state_arrays(reference))


@pytest.fixture
def no_network(monkeypatch) -> None:
    """No host is known, no proxy is set, and nothing is in the hub's cache."""

    def unknown_host(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown_host)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)


@pytest.mark.usefixtures("no_network")
def test_no_network_is_said_in_plain_words():
    with pytest.raises(
        WeightsUnavailable, match=r"no network to \S+ \(.*\)\. Fetch it where there is a network .* --weights random"
    ):
        load_model(TINY, (160, 160), WeightsChoice.parse("pretrained"), None, None)


@pytest.mark.usefixtures("no_network")
def test_pretrained_weights_that_cannot_be_had_are_named_with_their_repository():
    with pytest.raises(
        WeightsUnavailable,
        match=r"^pretrained weights of vit_small_patch16_dinov3\.lvd1689m can't be reached: .*"
        r"\(hf download timm/vit_small_patch16_dinov3\.lvd1689m\) and give --weights the folder",
    ):
        load_model("vit_small_patch16_dinov3.lvd1689m", (64, 64), WeightsChoice.parse("pretrained"), None, None)


def test_random_weights_follow_the_seed_and_leave_the_global_one_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)

    digests = [weights_digest(state_arrays(create_model(TINY, (64, 64), None, seed))) for seed in (0, 0, 7)]

    assert digests[0] == digests[1] != digests[2]
    assert torch.rand(1) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pretrained", WeightsChoice(source="pretrained")),
        ("random", WeightsChoice(source="random", seed=0)),
        ("random:12", WeightsChoice(source="random", seed=12)),
        ("s3://b/w.pth", WeightsChoice(source="file", url="s3://b/w.pth")),
        ("random-weights.pth", WeightsChoice(source="file", url="random-weights.pth")),
    ],
)
def test_weights_are_chosen_by_name(text, expected):
    assert WeightsChoice.parse(text) == expected


def test_digest_changes_with_any_value_name_shape_and_type():
    base = {"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float32)}
    value = np.zeros((2, 3), np.float32)
    value[1, 2] = 1e-30

    others = [
        {**base, "a": value},
        {"a2": base["a"], "b": base["b"]},
        {**base, "a": base["a"].reshape(3, 2)},
        {**base, "a": base["a"].astype(np.int32)},
        {"a": base["a"]},
    ]

    assert len({weights_digest(arrays) for arrays in [base, *others]}) == 6
    assert weights_digest(dict(reversed(base.items()))) == weights_digest(base)


def test_arrays_fill_a_model_strictly():
    arrays = state_arrays(create_model(TINY, (64, 64), None, 3))
    model = load_arrays(create_model(TINY, (64, 64), None, 4), arrays)

    assert weights_digest(state_arrays(model)) == weights_digest(arrays)
    with pytest.raises(RuntimeError, match=r"Missing key.*norm\.weight"):
        load_arrays(model, {key: value for key, value in arrays.items() if key != "norm.weight"})


# --- precision and memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAMILIES, "hiera"])
@pytest.mark.parametrize("facet", ["token", "key"])
def test_weights_cast_ahead_and_packed_give_the_numbers_of_plain_autocast(name, facet):
    if name == "hiera" and facet == "key":
        pytest.skip("Hiera has no facets")
    model = hiera() if name == "hiera" else family(name)
    batch = images(4 * PATCH.get(name, 16), 4 * PATCH.get(name, 16))
    plain, ahead = (TimmBackbone(copy.deepcopy(model), facet=facet) for _ in range(2))
    layers = plain.resolve_layers([-1])

    def rows(backbone: TimmBackbone, some: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), autocast(torch.device("cpu"), "bf16"):
            return backbone(some, layers).stacked(layers)

    expected = rows(plain, batch)
    cast_matmul_weights(ahead.model, "bf16")
    assert torch.equal(rows(ahead, batch), expected)

    takes = ahead.peak_bytes(2, batch.shape[-2:])
    pack_linears(ahead.model)
    if can_pack():  # not on a machine that doesn't multiply in bfloat16
        assert any(isinstance(module, PackedLinear) for module in ahead.model.modules())
        assert torch.equal(rows(ahead, batch), expected)
        assert torch.equal(rows(ahead, batch[:1]), rows(plain, batch[:1]))
        assert ahead.peak_bytes(2, batch.shape[-2:]) == takes
        unpack_linears(ahead.model)
        assert not any(isinstance(module, PackedLinear) for module in ahead.model.modules())
        assert torch.equal(rows(ahead, batch), expected)


def test_fp32_casts_nothing():
    model = family("dino")

    cast_matmul_weights(model, "fp32")

    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("name", "layers"), [("dino", [0, 1]), ("dinov2-reg", [1]), ("dinov3", [1]), ("hiera", [3])])
def test_memory_of_a_call_stays_under_peak_bytes(name, layers):
    backbone = TimmBackbone(hiera() if name == "hiera" else family(name))
    side = 64 if name == "hiera" else 14 * backbone.patch
    batch = images(side, side, batch=4)
    weights = sum(p.numel() * p.element_size() for p in backbone.model.parameters())
    with torch.inference_mode():
        backbone(batch, layers)

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            kept = backbone(batch, layers)

    held = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert kept.stacked(layers).nbytes <= peak <= backbone.peak_bytes(4, (side, side)) - weights


# --- the model that workers run ---------------------------------------------------------------------------------------------


def described(
    size: tuple[int, int] = (64, 64), network: torch.nn.Module | None = None, **changes: object
) -> tuple[ModelBundle, FeatureModel]:
    """test_vit with random weights, as the driver describes it."""
    features = FeatureConfig(**{"model": TINY, "weights": "random", "precision": "fp32", "levels": ("x1",), **changes})
    said = ModelDescription(name=features.model, expects=preprocessing(features.model))
    network = network or create_model(features.model, size, None, 0)
    return describe_model(features, LoadedModel(model=network, size=size, source="random", description=said))


def photos(batch: int, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (batch, *size, 3), np.uint8)


def test_levels_have_the_shapes_and_types_of_the_spec():
    levels = ("x1", "x2@float32", "x0.5", "3x5=nearest@int8", "pooled@float32")
    bundle, model = described(layers=(-1, 2), levels=levels)

    found = model(photos(3))

    assert {name: (tuple(rows.shape), rows.dtype) for name, rows in found.levels.items()} == {
        "x1": ((3, 4, 4, 128), torch.float16),
        "x2": ((3, 8, 8, 128), torch.float32),
        "x0.5": ((3, 2, 2, 128), torch.float16),
        "3x5": ((3, 3, 5, 128), torch.float32),  # int8 is quantised when it is written
        "pooled": ((3, 128), torch.float32),
    }
    assert [found.levels[level.name].shape[1:] for level in bundle.spec.levels] == [x.row_shape for x in bundle.spec.levels]
    assert found.bad.tolist() == [False, False, False]
    assert min(found.seconds.forward, found.seconds.upsample) > 0


def test_coarser_levels_are_means_of_the_backbones_cells():
    rows = described(levels=("x1@float32", "x0.5@float32"))[1](photos(2)).levels

    means = rows["x1"].numpy().reshape(2, 2, 2, 2, 2, 64).mean(axis=(2, 4))
    np.testing.assert_allclose(rows["x0.5"], means, atol=1e-5)


def test_a_bundle_builds_the_model_that_was_described():
    bundle, model = described(levels=("x1@float32", "pooled@float32"), stride=8)

    here, there = model(photos(2)).levels, bundle.build("cpu")(photos(2)).levels

    assert bundle.spec.weights == weights_digest(bundle.arrays)
    np.testing.assert_array_equal(here["x1"], there["x1"])
    np.testing.assert_array_equal(here["pooled"], there["pooled"])


def test_rows_in_bf16_are_those_of_plain_autocast():
    _, model = described(precision="bf16", layers=(1, -1), levels=("x1@float32",))
    plain, expects = TimmBackbone(create_model(TINY, (64, 64), None, 0)), preprocessing(TINY)
    with torch.inference_mode(), autocast(torch.device("cpu"), "bf16"):
        maps = plain(normalise(torch.from_numpy(photos(2)), expects.mean, expects.std), [1, 5]).stacked([1, 5])

    rows = model(photos(2)).levels

    assert model.backbone.model.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert plain.model.blocks[0].attn.qkv.weight.dtype == torch.float32
    np.testing.assert_array_equal(rows["x1"], maps.permute(0, 2, 3, 1).float().numpy())


@pytest.mark.parametrize(("layer", "expected"), [(-1, [True, True, True]), (1, [False, False, False])])
def test_nan_in_the_weights_flags_the_rows_of_layers_that_it_reaches(layer, expected):
    model = create_model(TINY, (64, 64), None, 0)
    model.blocks[2].mlp.fc1.weight[3, 4] = float("nan")

    found = described(network=model, layers=(layer,))[1](photos(3))

    assert found.bad.tolist() == expected


def test_the_bound_on_memory_grows_by_the_same_for_each_image_and_with_layers_and_levels():
    _, model = described(levels=("x1", "x2"))
    weights = sum(p.numel() * p.element_size() for p in model.backbone.model.parameters())

    one, two, five = (model.peak_bytes(batch) for batch in (1, 2, 5))

    assert weights < one < two
    assert five - one == 4 * (two - one)
    assert described(levels=("x1", "x2"), layers=(0, -1))[1].peak_bytes(2) > two
    assert described(levels=("x1", "x4"))[1].peak_bytes(2) > two


@pytest.mark.parametrize(
    ("name", "layers", "levels", "precision"),
    [
        (TINY, (-1,), ("x1", "x4"), "fp32"),
        (TINY, range(6), ("x1", "x4"), "bf16"),
        ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", (-1,), ("x1", "x4"), "fp32"),
        ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", range(12), ("x1",), "fp32"),
    ],
)
def test_memory_of_all_levels_stays_under_peak_bytes(name, layers, levels, precision):
    size = (224, 224)
    _, model = described(size, model=name, layers=layers, levels=levels, precision=precision)
    weights = sum(p.numel() * p.element_size() for p in model.backbone.model.parameters())
    model(photos(4, size))

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        rows = model(photos(4, size)).levels

    changes = [event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = int(np.cumsum(changes).max())
    # At least the float32 images and the rows that came back, or nothing was measured.
    assert max(4 * 224 * 224 * 3 * 4, rows["x1"].nbytes) < peak < model.peak_bytes(4) - weights


def test_the_batch_is_halved_until_its_bound_takes_six_tenths_of_free_memory(monkeypatch):
    _, model = described()
    free = int(model.peak_bytes(8) / 0.6) + 1
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": free}))

    assert [model.fit_batch(batch) for batch in (8, 64, 9)] == [8, 8, 4]


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("xcit_nano_12_p16_224", 64, "xcit_nano_12_p16_224 can be built, but its maps can't be read as a ViT's"),
        ("pit_ti_224", 64, "pit_ti_224 can be built, but"),
        ("crossvit_9_240", 240, "CrossVit cuts an image into patches of several sizes at once"),
        ("convnext_atto", 64, "timm's convnext_atto isn't built for a size of input"),
        ("sam2_hiera_tiny", 64, "timm's sam2_hiera_tiny isn't built for a size of input"),
    ],
)
def test_models_that_give_no_maps_are_refused_before_anything_is_made(name, size, said):
    with pytest.raises(BackboneError, match=f"{said}.*plain ViT") as caught:
        TimmBackbone(create_model(name, (size, size), None, 0)).try_out(name, (size, size), [-1])

    assert "img_size" not in str(caught.value)


def test_maps_of_other_sizes_than_described_are_refused():
    backbone = TimmBackbone(create_model("test_vit.r160_in1k", (64, 64), None, 0))
    backbone.try_out("test_vit", (64, 64), [-1])
    backbone.channels = 63

    with pytest.raises(BackboneError, match=r"test_vit gives \(64, 4, 4\) at layer -1 for 64x64 px, where .* \(63, 4, 4\)"):
        backbone.try_out("test_vit", (64, 64), [-1])


def test_fp32_is_float32_in_convolutions_too(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with autocast(torch.device("cpu"), "fp32"):
        assert torch.backends.cudnn.allow_tf32
    with autocast(torch.device("cuda"), "fp32"):
        pass  # what comes behind it, too: upsamplers, and backward passes

    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(("capability", "lacking"), [((7, 5), True), ((8, 0), False), ((9, 0), False)])
def test_bf16_is_refused_on_gpus_that_emulate_it(capability, lacking, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    gpu = torch.device("cuda")

    assert lacks_bf16(gpu) == lacking
    assert not lacks_bf16(torch.device("cpu"))
    if lacking:
        with pytest.raises(BackboneError, match=r"Tesla T4: .* use --precision fp16"):
            autocast(gpu, "bf16")


@pytest.mark.parametrize("name", [TINY, "swin_tiny_patch4_window7_224.ms_in1k", "eva02_tiny_patch14_224.mim_in22k"])
def test_a_model_computes_with_arrays_that_nobody_may_write_to_without_a_copy(name):
    """As Ray's object store gives them: what was drawn, or lay in memory, before they came plays no part."""
    size = preprocessing(name).size
    drawn = create_model(name, size, None, seed=3)
    arrays = {key: array.copy() for key, array in state_arrays(drawn).items()}
    for array in arrays.values():
        array.setflags(write=False)

    shared = share_arrays(create_model(name, size, None, None), arrays)

    held = {key: tensor.data_ptr() for key, tensor in shared.state_dict().items()}
    assert held == {key: array.ctypes.data for key, array in arrays.items()}
    assert not any(parameter.requires_grad for parameter in shared.parameters())
    x = torch.randn(1, 3, *size)
    torch.testing.assert_close(shared(x), drawn(x), rtol=0, atol=0)


@pytest.mark.timeout(60)
def test_what_lies_in_memory_does_not_keep_a_network_from_being_built():
    """torch's trunc_normal_, of ViTDet among others, draws again until all is within its bounds."""
    left = torch.full((64,), 1e9)

    with timm_models.Undrawn():
        torch.nn.init.trunc_normal_(left, std=0.02)
        torch.nn.init.trunc_normal_(torch.full((64,), 1e9), mean=1.0, std=0.1, a=0.5, b=1.5)

    assert not left.any()


def test_a_network_that_draws_with_gradients_on_is_built_undrawn():
    with timm_models.Undrawn():
        parameter = torch.nn.Parameter(torch.empty(3))
        parameter.data.normal_()
        with torch.no_grad():
            parameter.normal_(1.0)

    assert parameter.tolist() == [1.0] * 3
