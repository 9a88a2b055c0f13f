"""ViT-Up: the official code's numbers; coordinates, windows and chunks that don't change them; memory as declared."""

import copy
import functools
import itertools
import json
import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from operators.backbone import PatchFeatures
from operators.upsamplers.protocol import UpsamplerError
from operators.upsamplers.vit_up.attention import CrossAttention, Windows, attend
from operators.upsamplers.vit_up.checkpoint import read_checkpoint
from operators.upsamplers.vit_up.geometry import Rope, encode_offsets, grid_coordinates, nearest_tokens, offset_frequencies
from operators.upsamplers.vit_up.head import FeatX, Mlp, Queries, ViTUpBlock, ViTUpConfig, ViTUpHead, sample
from operators.upsamplers.vit_up.hidden import AdaptedBackbone
from operators.upsamplers.vit_up.lora import Lora
from operators.upsamplers.vit_up.start import bilinear_logits, start_enlarging
from operators.upsamplers.vit_up.upsampler import ViTUp
from pipelines.costs.windows import gather_then_attend
from tests.goldens import GOLDEN, hash_tensor, tensor_golden, under

# Of README_lift_vitup.md, with the float32 noise measured there.
SUBMODULE = {"rtol": 1e-4, "atol": 1e-4}  # 4e-6
SMALL = {"rtol": 3e-4, "atol": 3e-4}  # 2.5e-5
END_TO_END = {"rtol": 2e-3, "atol": 2e-3}  # 3e-4: 12 random layers amplify rounding
SAME = {"rtol": 1e-5, "atol": 1e-5}
EXACT = {"rtol": 0, "atol": 0}
MODEL = "base_model.model."


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, object]]:
    return tensor_golden(f"vitup_{name}")


def key_tables(kind: str) -> dict[str, dict[str, dict[str, object]]]:
    return json.loads((GOLDEN / f"vitup_state_dict_keys_dinov3_{kind}.json").read_text())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def hash_state(shapes: dict[str, tuple[int, ...]], k0: int) -> dict[str, Tensor]:
    """Weights at published sizes by the goldens' rule (README_lift_vitup.md, "Hash weights")."""
    state = {key: hash_tensor(key, k0 + k, shapes[key]) for k, key in enumerate(sorted(shapes))}
    return state | ({"rel_pos_enc.freqs": offset_frequencies()} if "rel_pos_enc.freqs" in shapes else {})


def dinov3(channels: int, depth: int, heads: int, patch: int, mlp: int, gated: bool, fused: bool = True) -> Eva:
    """DINOv3's architecture at any size, as timm builds its `_qkvb` variants."""
    return Eva(
        patch_size=patch,
        embed_dim=channels,
        depth=depth,
        num_heads=heads,
        mlp_ratio=mlp / channels,
        swiglu_mlp=gated,
        swiglu_align_to=8 if gated else 0,
        qkv_fused=fused,
        init_values=1e-5,
        num_classes=0,
        num_reg_tokens=4,
        use_abs_pos_emb=False,
        use_rot_pos_emb=True,
        rope_type="dinov3",
        rope_temperature=100,
        rope_rotate_half=True,
        use_fc_norm=False,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-5),
        dynamic_img_size=True,
    ).eval()


_TIMM_NAMES = (
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^embeddings\.register_tokens", "reg_token"),
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^layer\.", "blocks."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.attention\.", ".attn."),
    (r"\.layer_scale(\d)\.lambda1", r".gamma_\1"),
    (r"\.gate_proj\.", ".fc1_g."),
    (r"\.down_proj\.", ".fc2."),
)


def load_hf(model: Eva, tensors: dict[str, Tensor]) -> Eva:
    """Fill timm's DINOv3 with weights under PEFT's or transformers' names, strictly."""
    plain = {key.removeprefix(MODEL).replace(".base_layer", ""): value for key, value in tensors.items()}
    state = {}
    gated = any(".gate_proj." in key for key in plain)
    for name, value in plain.items():
        if "lora_" in name or name.endswith("mask_token"):
            continue
        for pattern, timm_name in (*_TIMM_NAMES, (r"\.up_proj\.", ".fc1_x." if gated else ".fc1.")):
            name = re.sub(pattern, timm_name, name)
        state[name] = value
    if model.blocks[0].attn.qkv is not None:
        state = _fused(state)
    model.load_state_dict(state, strict=True)
    return model


def _fused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {key: value for key, value in state.items() if not re.search(r"attn\.[qkv]_proj", key)}
    for block in {key.partition(".attn.")[0] for key in state if ".attn." in key}:
        out[f"{block}.attn.qkv.weight"] = torch.cat([state[f"{block}.attn.{name}_proj.weight"] for name in "qkv"])
        out |= {f"{block}.attn.{name}_bias": state[f"{block}.attn.{name}_proj.bias"] for name in "qv"}
    return out


def small_official(name: str, fused: bool) -> tuple[AdaptedBackbone, ViTUpHead, dict[str, Tensor], dict]:
    """The small model of a golden file with its adapter, and its head."""
    tensors, c = golden(name)
    model = dinov3(c["D"], c["backbone_layers"], c["heads"], c["patch"], c["intermediate"], c["gated_mlp"], fused)
    load_hf(model, under(tensors, "backbone."))
    lora = Lora(model, rank=c["lora_r"], alpha=c["lora_alpha"])
    lora.load_peft_state({key: value for key, value in tensors.items() if ".lora_" in key})
    head = ViTUpHead(ViTUpConfig(channels=c["D"], heads=c["heads"], layers=tuple(c["layer_indices"]), mlp_channels=c["ff"]))
    head.load_state_dict(under(tensors, "vit_up."))
    return AdaptedBackbone(model, lora).eval(), head.eval(), tensors, c


# --- geometry ---------------------------------------------------------------------------------------------------------


def test_rotary_tables_and_rotation_are_the_official_ones():
    tensors, config = golden("rope")
    grid, head_dim = (config["h_tokens"], config["w_tokens"]), config["dim"]

    queries = Rope.of_queries(tensors["in/q_xy_normalized"], grid, head_dim)
    tokens = Rope.of_tokens(grid, head_dim, torch.device("cpu"))

    for rope, kind in ((queries, "q"), (tokens, "g")):
        for function, part in (("cos", rope.turns.real), ("sin", rope.turns.imag)):
            twice = part[:, 0].repeat_interleave(2, dim=-1)
            torch.testing.assert_close(twice, tensors[f"out/{kind}_{function}"], **SUBMODULE)
    torch.testing.assert_close(queries.rotate(tensors["in/x_q"]), tensors["out/x_q_rot"], **SUBMODULE)
    torch.testing.assert_close(tokens.rotate(tensors["in/x_k"]), tensors["out/x_k_rot"], **SUBMODULE)


def test_offsets_are_encoded_as_officially():
    tensors, _ = golden("fourier")

    torch.testing.assert_close(offset_frequencies(), tensors["sd/freqs"], rtol=1e-6, atol=0)
    encoding = encode_offsets(tensors["in/rel_xy"], offset_frequencies())
    torch.testing.assert_close(encoding, tensors["out/enc"], **SUBMODULE)


def test_nearest_tokens_are_the_official_ones_on_borders_and_outside_too():
    tensors, config = golden("nearest_token")
    grid, side = (config["h_tokens"], config["w_tokens"]), config["grid_side"]

    nearest, offsets = nearest_tokens(tensors["in/q_xy"], grid)
    centres = grid_coordinates((side, side)).expand(2, -1, -1)
    nearest_of_grid, offsets_of_grid = nearest_tokens(centres, grid)

    assert torch.equal(nearest[..., 1] * grid[1] + nearest[..., 0], tensors["out/closest_idx"])
    torch.testing.assert_close(offsets, tensors["out/rel_xy"], **SAME)
    torch.testing.assert_close(centres, tensors["in/grid_q_xy"], **EXACT)
    assert torch.equal(nearest_of_grid[..., 1] * grid[1] + nearest_of_grid[..., 0], tensors["out/grid_closest_idx"])
    torch.testing.assert_close(offsets_of_grid, tensors["out/grid_rel_xy"], **SAME)


def test_a_grid_over_a_box_has_its_cells_centres():
    coords = grid_coordinates((2, 4), (0.2, 0.5, 1.0, 0.9))

    torch.testing.assert_close(coords[0], torch.tensor([0.3, 0.6]))
    torch.testing.assert_close(coords[-1], torch.tensor([0.9, 0.8]))
    assert coords.shape == (8, 2)


# --- the official modules' numbers ------------------------------------------------------------------------------------


def cross_attention(tensors: dict[str, Tensor], config: dict, case: dict, windows: bool = True) -> Tensor:
    net = CrossAttention(config["dim"], config["heads"])
    net.load_state_dict(under(tensors, "sd/"))
    given, grid = under(tensors, f"{case['tag']}/in/"), (case["h_tokens"], case["w_tokens"])
    head_dim = config["dim"] // config["heads"]
    of_queries = Rope.of_queries(given["q_xy"], grid, head_dim)
    of_tokens = Rope.of_tokens(grid, head_dim, torch.device("cpu"))
    if not case["rope"]:
        of_queries, of_tokens = (Rope(turns=torch.ones_like(r.turns)) for r in (of_queries, of_tokens))
    # Without its lattice the official code falls back to all tokens (B8).
    window = case["window_size_arg"] if windows and case["lattice_queries"] else None
    around = Windows.around(nearest_tokens(given["q_xy"], grid)[0], grid, window)
    return net(given["query"], *net.keys_values(given["hidden"], of_tokens), of_queries, around)


@pytest.mark.parametrize("case", golden("cross_attention")[1]["cases"], ids=lambda case: case["tag"])
def test_cross_attention_is_the_official_one(case):
    tensors, config = golden("cross_attention")

    torch.testing.assert_close(cross_attention(tensors, config, case), tensors[f"{case['tag']}/out"], **SUBMODULE)
    if case["window_size_arg"]:
        everywhere = tensors[f"{case['tag']}/out_global_for_comparison"]
        torch.testing.assert_close(cross_attention(tensors, config, case, windows=False), everywhere, **SUBMODULE)


def test_featx_is_the_official_one():
    tensors, config = golden("featx")
    net = FeatX(config["D"], config["ff"])
    net.load_state_dict(under(tensors, "sd/"))
    normalised = net.norm_input(tensors["in/token"])

    torch.testing.assert_close(net.gamma_beta_mlp(tensors["in/rel_enc"]), tensors["mid/gamma_beta"], **SUBMODULE)
    torch.testing.assert_close(net._film(normalised, tensors["in/rel_enc"]), tensors["mid/after_film"], **SUBMODULE)
    torch.testing.assert_close(net(normalised, tensors["in/rel_enc"]), tensors["out"], **SUBMODULE)


def test_mlps_are_the_official_ones():
    tensors, config = golden("mlps")
    d, x = config["D"], tensors["in/x"]
    transition, decoder = Mlp(d, 2 * d, d, norm=True), Mlp(d, d, norm=True)
    fusion, norm = Mlp(d, config["ff"], d, norm=False), nn.LayerNorm(d)
    for net, name in ((transition, "transition"), (decoder, "decoder"), (fusion, "fusion"), (norm, "norm_post")):
        net.load_state_dict(under(tensors, f"{name}/"))

    torch.testing.assert_close(decoder(x), tensors["out/decoder"], **SUBMODULE)
    torch.testing.assert_close(x + fusion(norm(x)), tensors["out/fusion_residual"], **SUBMODULE)
    torch.testing.assert_close(x + transition(x), tensors["out/transition"], **SUBMODULE)


def test_a_block_is_the_official_one():
    tensors, config = golden("block")
    grid, coords = (config["h_tokens"], config["w_tokens"]), tensors["in/q_xy"]
    block = ViTUpBlock(ViTUpConfig(channels=config["D"], heads=config["heads"]))
    block.load_state_dict(under(tensors, "sd/"))
    head_dim = config["D"] // config["heads"]
    nearest, offsets = nearest_tokens(coords, grid)
    first = torch.tensor([[0], [grid[0] * grid[1]]])
    queries = Queries(
        nearest=first + nearest[..., 1] * grid[1] + nearest[..., 0],
        encoding=encode_offsets(offsets, offset_frequencies()),
        rope=Rope.of_queries(coords, grid, head_dim),
        windows=None,
    )

    tokens = block.prepare(tensors["in/hidden_hwc"], Rope.of_tokens(grid, head_dim, coords.device))
    out = block(tensors["in/q_fts"], tokens, queries)

    torch.testing.assert_close(queries.encoding, tensors["mid/rel_enc"], **SUBMODULE)
    torch.testing.assert_close(out, tensors["out"], **SUBMODULE)


def test_queries_are_sampled_as_officially():
    tensors, _ = golden("query_embedding")

    sampled = sample(tensors["a/in/grid_hwc"].permute(0, 3, 1, 2), tensors["in/q_xy"])

    torch.testing.assert_close(sampled, tensors["a/out/q0"], **SUBMODULE)


@pytest.mark.parametrize("stripe_bytes", [None, 1, 50_000])
def test_the_query_grid_is_the_official_one_in_stripes_too(stripe_bytes):
    tensors, c = golden("query_embedding")
    size = (c["img_in_size"], c["img_in_size"])
    model = dinov3(c["bb_dim"], 1, 2, c["patch"], 32, gated=False)
    embedding = {key: value for key, value in under(tensors, "b/sd/").items() if "base_layer" in key}
    model.patch_embed.proj.load_state_dict({key.rpartition(".")[2]: value for key, value in embedding.items()})
    lora = Lora(model, rank=c["lora_r"], alpha=c["lora_alpha"])
    adapter = {key: value for key, value in under(tensors, "b/sd/").items() if "lora_" in key}
    lora.load_state_dict(adapter, strict=False)
    backbone = AdaptedBackbone(model, lora).eval()

    with torch.no_grad():
        grid = backbone.query_grid(tensors["b/in/pixel_values"], size, stripe_bytes)
        with backbone.unadapted():
            plain = backbone.query_grid(tensors["b/in/pixel_values"], size, stripe_bytes)

    torch.testing.assert_close(grid.permute(0, 2, 3, 1), tensors["b/out/grid_hwc"], **SUBMODULE)
    torch.testing.assert_close(plain.permute(0, 2, 3, 1), tensors["b/out/grid_hwc_no_lora"], **SUBMODULE)
    torch.testing.assert_close(sample(grid, tensors["in/q_xy"]), tensors["b/out/q0"], **SUBMODULE)


def rect_head(**changes: object) -> tuple[ViTUpHead, Tensor, list[Tensor], dict[str, Tensor]]:
    """The golden head over tokens that are no square, with its query grid and hidden states."""
    tensors, c = golden("head_rect_grid")
    settings = {"channels": c["D"], "heads": c["heads"], "layers": tuple(c["layer_indices"]), **changes}
    head = ViTUpHead(ViTUpConfig(**settings)).eval()
    head.load_state_dict(under(tensors, "sd/"))
    hidden = [tensors[f"in/hidden_{i}"] for i in range(3)]
    return head, tensors["in/query_grid_hwc"].permute(0, 3, 1, 2), hidden, tensors


def test_the_head_is_the_official_one_over_a_grid_that_is_no_square():
    head, query_grid, hidden, tensors = rect_head()

    out = head(query_grid, hidden, tensors["in/q_xy"])

    for i, of_layer in enumerate(out):
        torch.testing.assert_close(of_layer, tensors[f"out/layer_{i}"], **SUBMODULE)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["full_small_gated", "full_small_gelu"])
def test_small_models_give_the_official_values_from_image_to_every_layer(name, fused):
    backbone, head, tensors, c = small_official(name, fused)
    images, sides = tensors["in/pixel_values"], range(c["backbone_layers"] + 1)
    size, query_size = (c["hidden_layer_img_size"],) * 2, (c["query_img_in_size"],) * 2

    with torch.no_grad():
        query_grid, hidden = backbone.query_grid(images, query_size), backbone.hidden(images, sides, size)
        with backbone.unadapted():
            teacher = backbone.hidden(images, sides, size)
        out = head(query_grid, [hidden[i] for i in c["layer_indices"]], tensors["in/q_xy"])

    torch.testing.assert_close(query_grid.permute(0, 2, 3, 1), tensors["out/query_grid_hwc"], **SMALL)
    for i in sides:
        torch.testing.assert_close(hidden[i], tensors[f"out/backbone_hidden_lora_{i}"], **SMALL)
        torch.testing.assert_close(teacher[i], tensors[f"out/backbone_hidden_teacher_{i}"], **SMALL)
    for i, of_layer in enumerate(out):
        torch.testing.assert_close(of_layer, tensors[f"out/layer_{i}"], **SMALL)


# --- published sizes --------------------------------------------------------------------------------------------------


def published_shapes(kind: str, section: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(entry["shape"]) for key, entry in key_tables(kind)[section].items()}


def published(kind: str) -> ViTUpConfig:
    return ViTUpConfig(channels=384, heads=6) if kind == "splus" else ViTUpConfig(channels=768, heads=12)


@pytest.mark.parametrize("kind", ["splus", "base"])
def test_published_names_shapes_and_parameters(kind):
    table = key_tables(kind)
    name = {"splus": "vit_small_plus", "base": "vit_base"}[kind]
    with torch.device("meta"):
        head = ViTUpHead(published(kind))
        lora = Lora(timm.create_model(f"{name}_patch16_dinov3_qkvb", num_classes=0))

    ours = {key: tuple(value.shape) for key, value in head.state_dict().items()}
    adapter = {key: tuple(value.shape) for key, value in lora.peft_state().items()}

    assert (len(ours), len(adapter)) == (257, 98)
    assert ours == published_shapes(kind, "extracted_file_vit_up")
    assert adapter == published_shapes(kind, "extracted_file_backbone_lora")
    assert sum(p.numel() for p in head.parameters()) == table["vit_up_params"]
    assert sum(p.numel() for p in lora.parameters()) == table["lora_params"]


def test_the_head_at_its_published_size_gives_the_official_values():
    tensors, c = golden("fullsize_head_splus")
    head = ViTUpHead(published("splus")).eval()
    state = hash_state(published_shapes("splus", "extracted_file_vit_up"), c["k0"])
    head.load_state_dict(state)
    hidden = [tensors[f"in/hidden_{max(i, 1)}"] for i in range(7)]

    with torch.no_grad():
        out = head(tensors["in/query_grid_hwc"].permute(0, 3, 1, 2), hidden, tensors["in/q_xy"])

    for key, sums in under(tensors, "chk/").items():
        torch.testing.assert_close(state[key].double().sum(), sums[0])
    for i, of_layer in enumerate(out):
        torch.testing.assert_close(of_layer, tensors[f"out/layer_{i}"], **SUBMODULE)


def test_the_published_model_gives_the_official_values_from_image_to_every_layer():
    """A published file, loaded strictly, at the published query size."""
    tensors, c = golden("fullsize_e2e_splus")
    weights = hash_state(published_shapes("splus", "extracted_file_vit_up"), c["k0"])
    backbone_weights = hash_state(published_shapes("splus", "peft_backbone_all"), c["k0"] + 20000)
    adapter = {f"backbone.{key}": value for key, value in backbone_weights.items() if "lora_" in key}
    model = timm.create_model("vit_small_plus_patch16_dinov3_qkvb", num_classes=0)
    config, head_state, lora_state = read_checkpoint({**weights, **adapter}, {"hidden_size": c["hidden_layer_img_size"]})
    lora = Lora(load_hf(model, backbone_weights), rank=config.rank, alpha=config.alpha)
    lora.load_peft_state(lora_state)
    head, backbone = ViTUpHead(config).eval(), AdaptedBackbone(model, lora).eval()
    head.load_state_dict(head_state)

    with torch.no_grad():
        with backbone.unadapted():
            teacher = backbone.hidden(tensors["in/pixel_values"], [0, 2, 12], (config.hidden_size,) * 2)
        lora.merge()
        hidden = backbone.hidden(tensors["in/pixel_values"], config.layers, (config.hidden_size,) * 2)
        query_grid = backbone.query_grid(tensors["in/pixel_values"], (config.query_size,) * 2, 2**24)
        out = head(query_grid, hidden, tensors["in/q_xy"])

    for layer, state in zip((0, 2, 12), teacher, strict=True):
        torch.testing.assert_close(state, tensors[f"out/hidden_teacher_layer{layer}"], **END_TO_END)
    for layer in (0, 2, 6, 12):
        found = hidden[config.layers.index(layer)]
        torch.testing.assert_close(found, tensors[f"out/hidden_lora_layer{layer}"], **END_TO_END)
    corner = query_grid[:, :, :4, :4].permute(0, 2, 3, 1)
    torch.testing.assert_close(corner, tensors["out/query_grid_corner_4x4"], **END_TO_END)
    torch.testing.assert_close(sample(query_grid, tensors["in/q_xy"]), tensors["out/q0"], **END_TO_END)
    for i, of_layer in enumerate(out):
        torch.testing.assert_close(of_layer, tensors[f"out/layer_{i}"], **END_TO_END)


# --- the same equations, written plainly ------------------------------------------------------------------------------


def vit_up_of(channels: int = 32, heads: int = 2, seed: int = 0, **changes: object) -> ViTUpHead:
    """A head whose FiLM does something, as after training; in eval mode."""
    settings = {"layers": (0, 1, 2, 3), **changes}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = ViTUpHead(ViTUpConfig(channels=channels, heads=heads, **settings)).eval()
    for i, block in enumerate(head.vit_up_blocks):
        if block.featx is not None:
            block.featx.gamma_beta_mlp.mlp[-1].weight.data = 0.3 * random(2 * channels, channels, seed=i)
    return head


def inputs(channels: int = 32, grid: tuple[int, int] = (7, 9), batch: int = 1, states: int = 4) -> tuple[Tensor, list[Tensor]]:
    hidden = [random(batch, *grid, channels, seed=i) for i in range(states)]
    return random(batch, channels, 16, 20, seed=9), hidden


@pytest.mark.parametrize("window", [None, 1, 3, 4, 8, 100])
@pytest.mark.parametrize("queries", ["dense", "sparse"])
def test_windows_are_those_of_gathering_for_each_query(window, queries):
    """Grouped by window where queries are dense, with a mask where they are sparse; beyond the image too."""
    head, (query_grid, hidden) = vit_up_of(window=window), inputs()
    coords = grid_coordinates((40, 30))[None] if queries == "dense" else 1.2 * uniform(1, 50, 2) - 0.1

    with torch.no_grad():
        (out,) = head(query_grid, hidden, coords, outputs=[-1])
        expected = gather_then_attend(head, query_grid, hidden, coords)

    torch.testing.assert_close(out, expected, **SAME)


# --- what must not change the results ---------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 3])
def test_chunks_order_and_company_of_queries_do_not_matter(window):
    head, (query_grid, hidden) = vit_up_of(window=window), inputs()
    coords = grid_coordinates((12, 8))[None]
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        (whole,) = head(query_grid, hidden, coords, outputs=[-1])
        (chunked,) = head(query_grid, hidden, coords, outputs=[-1], query_chunk=7)
        (shuffled,) = head(query_grid, hidden, coords[:, order], outputs=[-1], query_chunk=50)
        alone = [head(query_grid, hidden, coords[:, i : i + 1], outputs=[-1])[0] for i in range(96)]

    torch.testing.assert_close(chunked, whole, **SAME)
    torch.testing.assert_close(shuffled, whole[:, order], **SAME)
    torch.testing.assert_close(torch.cat(alone, dim=1), whole, **SAME)


@pytest.mark.parametrize("window", [None, 3])
def test_images_of_a_batch_have_coordinates_of_their_own(window):
    head, (query_grid, hidden) = vit_up_of(window=window), inputs(batch=2)
    coords = torch.stack([grid_coordinates((30, 40), box) for box in ((0, 0, 0.5, 1), (0.4, 0.1, 0.9, 0.3))])

    with torch.no_grad():
        (together,) = head(query_grid, hidden, coords, outputs=[-1])
        (second,) = head(query_grid[1:], [state[1:] for state in hidden], coords[1:], outputs=[-1])

    torch.testing.assert_close(together[1:], second, **SAME)


def test_asking_for_some_layers_gives_those_of_asking_for_all():
    head, query_grid, hidden, tensors = rect_head()

    every = head(query_grid, hidden, tensors["in/q_xy"])
    some = head(query_grid, hidden, tensors["in/q_xy"], outputs=[1, 0])

    torch.testing.assert_close(some[0], every[1], **EXACT)
    torch.testing.assert_close(some[1], every[0], **EXACT)


def test_grouped_queries_get_what_masked_ones_get():
    nearest = nearest_tokens(grid_coordinates((24, 24))[None], (6, 5))[0]
    grouped = Windows.around(nearest, (6, 5), 3)
    masked = Windows(rows=grouped.rows, columns=grouped.columns, sides=(3, 3), grid=(6, 5), groups=None)
    q, k, v = random(1, 2, 576, 8), random(1, 2, 30, 8, seed=1), random(1, 2, 30, 8, seed=2)

    torch.testing.assert_close(attend(q, k, v, grouped), attend(q, k, v, masked), **SAME)
    assert masked.mask().sum(dim=-1).unique().tolist() == [9]
    assert grouped.groups is not None


def test_coordinates_and_angles_stay_float32_under_bf16():
    """In bfloat16 the 448 centres of an axis collapse to 353 (B11), and neighbours would get one value."""
    head, (query_grid, hidden) = vit_up_of(), inputs(grid=(28, 28))
    coords = grid_coordinates((1, 448))[None]

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (out,) = head(query_grid, hidden, coords, outputs=[-1])
    with torch.no_grad():
        (exact,) = head(query_grid, hidden, coords, outputs=[-1])

    assert (out[0, 1:] != out[0, :-1]).any(dim=-1).all()
    assert F.cosine_similarity(out.float(), exact, dim=-1).min() > 0.999


def test_all_blocks_start_alike_and_film_as_nothing():
    torch.manual_seed(0)
    head = ViTUpHead(ViTUpConfig(channels=32, heads=2, layers=(0, 1, 2)))
    first, second = (block.state_dict() for block in head.vit_up_blocks)

    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(head.decoder_mlp[0].mlp[1].weight, head.decoder_mlp[1].mlp[1].weight)
    assert first["featx.gamma_beta_mlp.mlp.2.weight"].count_nonzero() == 0
    assert first["featx.gamma_beta_mlp.mlp.2.bias"].count_nonzero() == 0


@pytest.mark.parametrize("part", ["featx", "cross_attention"])
def test_an_ablation_leaves_out_the_part_and_its_norms(part):
    head = vit_up_of(**{part: False})
    query_grid, hidden = inputs()

    out = head(query_grid, hidden, uniform(1, 5, 2))

    gone = {"featx": ("featx", "norm_h_local"), "cross_attention": ("cross_attention", "norm_q", "norm_h_global")}
    assert not [name for name in head.state_dict() if any(word in name for word in gone[part])]
    assert [tuple(of_layer.shape) for of_layer in out] == [(1, 5, 32)] * 4


def test_gradients_through_the_detached_cache_are_those_of_one_graph():
    """Training goes through chunks with a backward for each; the backbone's graph is walked once."""
    head, (query_grid, hidden) = vit_up_of(window=3), inputs()
    images = [query_grid.requires_grad_(), *(state.requires_grad_() for state in hidden)]
    coords = uniform(1, 60, 2)

    sum(layer.square().sum() for layer in head(query_grid, hidden, coords)).backward()
    expected = [tensor.grad for tensor in (*images[:1], *images[2:], *head.parameters())]
    for tensor in (*images, *head.parameters()):
        tensor.grad = None
    cache = head.prepare(query_grid, hidden)
    leaves = cache.detached()
    for chunk in coords.split(25, dim=1):
        sum(layer.square().sum() for layer in head.query(leaves, chunk)).backward()
    cache.backward(leaves)

    for tensor, gradient in zip((*images[:1], *images[2:], *head.parameters()), expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("stripe_bytes", [None, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_reaches_the_head_and_every_adapter(dtype, stripe_bytes):
    config, model, head_state, lora_state = trained()
    lora = Lora(model, rank=2, alpha=4.0)
    lora.load_peft_state(lora_state)
    backbone, head = AdaptedBackbone(model, lora).train(), ViTUpHead(config).train()
    head.load_state_dict(head_state)
    images = random(2, 3, 40, 56)

    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        query_grid = backbone.query_grid(images, (128, 128), stripe_bytes)
        out = head(query_grid, backbone.hidden(images, config.layers, (64, 64)), uniform(2, 30, 2))
    sum(layer.float().square().mean() for layer in out).backward()

    for name, parameter in (*head.named_parameters(), *lora.named_parameters()):
        assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in model.parameters())


# --- hidden states of other models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_hidden_states_follow_the_next_norm_and_leave_out_prefix_and_positions(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, dynamic_img_size=True, depth=3).eval()
    plain, (rows, columns) = copy.deepcopy(model), (3, 5)
    patch = plain.patch_embed.patch_size[0]
    images = random(2, 3, rows * patch, columns * patch)

    with torch.no_grad():
        raw = plain.forward_intermediates(images, indices=[0, 1, 2], output_fmt="NLC", intermediates_only=True)
        hidden = AdaptedBackbone(model).hidden(images, [0, 1, 2, 3])

    convolved = plain.patch_embed.proj(images).permute(0, 2, 3, 1)
    torch.testing.assert_close(hidden[0], convolved, **SAME)
    for i, norm in ((1, plain.blocks[1].norm1), (2, plain.blocks[2].norm1), (3, plain.norm)):
        torch.testing.assert_close(hidden[i].flatten(1, 2), norm(raw[i - 1]), rtol=1e-4, atol=1e-4)
        assert hidden[i].shape == (2, rows, columns, plain.embed_dim)


def test_several_grids_of_one_backbone_have_position_embeddings_of_their_own():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, depth=1).eval()
    backbone, images = AdaptedBackbone(copy.deepcopy(model)), random(1, 3, 64, 64)

    with torch.no_grad():
        first = backbone.hidden(images, [1])[0]
        backbone.hidden(images, [1], (96, 32))
        again = backbone.hidden(images, [1])[0]

    torch.testing.assert_close(again, first, **EXACT)


def test_the_frozen_model_stays_in_eval_mode_when_training():
    model = dinov3(32, 2, 2, 8, 64, gated=True)
    backbone = AdaptedBackbone(model, Lora(model, rank=2, alpha=4)).train()

    assert not model.training
    assert backbone.lora.training
    assert {name.split(".")[0] for name, p in backbone.named_parameters() if p.requires_grad} == {"lora"}


def test_impossible_sizes_layers_and_models_are_refused():
    backbone = AdaptedBackbone(dinov3(32, 2, 2, 8, 64, gated=True))
    images = random(1, 3, 32, 32)

    with pytest.raises(UpsamplerError, match=r"hidden states \(3,\): this model has 0 to 2"):
        backbone.hidden(images, [3])
    with pytest.raises(UpsamplerError, match="input size 36x32 px: 36"):
        backbone.hidden(images, [1], (36, 32))
    with pytest.raises(UpsamplerError, match="input size 100x96 px: 100"):
        backbone.query_grid(images, (100, 96))
    with pytest.raises(UpsamplerError, match="plain timm ViT"):
        AdaptedBackbone(timm.create_model("resnet18", num_classes=0))


# --- checkpoints ------------------------------------------------------------------------------------------------------

_OLD_NAMES = (
    (r"^vit_up_blocks\.(\d+)\.transition_mlp\.", r"q_proj.\1."),
    (r"^vit_up_blocks\.(\d+)\.featx\.", r"local_feature_decoder.\1."),
    (r"^vit_up_blocks\.(\d+)\.cross_attention\.", r"global_local_cross_attention.\1.global_cross_attention."),
    (r"^vit_up_blocks\.(\d+)\.", r"global_local_cross_attention.\1."),
)


def old_name(name: str) -> str:
    for pattern, old in _OLD_NAMES:
        name = re.sub(pattern, old, name)
    return name


def published_zeros(kind: str) -> dict[str, Tensor]:
    shapes = {**published_shapes(kind, "extracted_file_vit_up"), **published_shapes(kind, "extracted_file_backbone_lora")}
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("kind", ["splus", "base"])
def test_published_files_tell_their_settings(kind):
    config, head, lora = read_checkpoint(published_zeros(kind))

    assert config == ViTUpConfig(channels=config.channels, heads=config.heads, mlp_channels=4 * config.channels)
    assert (config.channels, config.heads) == (published(kind).channels, published(kind).heads)
    assert (len(head), len(lora)) == (257, 98)


@pytest.mark.parametrize("prefix", ["", "vit_up.", "model.vit_up.", "module.vit_up_pl_v2.vit_up._orig_mod."])
def test_old_names_and_prefixes_are_taken(prefix):
    published = published_zeros("splus")
    outer = prefix.removesuffix("_orig_mod.").removesuffix("vit_up.")
    renamed = {
        (outer + name if name.startswith("backbone.") else prefix + old_name(name)): value for name, value in published.items()
    }

    _, head, lora = read_checkpoint(renamed)

    assert {**head, **lora}.keys() == published.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vit_up_blocks.3.norm_post.bias": None}, "1 missing: vit_up_blocks.3.norm_post.bias"),
        ({"backbone.norm.bias": torch.zeros(1)}, "LoRA of rank 16: 1 unexpected: backbone.norm.bias"),
        ({"decoder_mlp.2.mlp.1.bias": torch.zeros(3)}, r"decoder_mlp.2.mlp.1.bias \(3,\) instead of \(384,\)"),
        ({"backbone.base_model.model.layer.4.attention.q_proj.lora_B.default.weight": None}, "LoRA of rank 16: 1 missing"),
        ({"decoder_mlp.0.mlp.1.weight": None}, "these aren't ViT-Up's weights"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message):
    tensors = {name: value for name, value in {**published_zeros("splus"), **change}.items() if value is not None}

    with pytest.raises(UpsamplerError, match=message):
        read_checkpoint(tensors)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 32}, "lack heads"),
        ({"channels": 32, "heads": 2, "T": 3}, "no such ViT-Up settings: T"),
        ({"channels": 36, "heads": 6}, "multiple of 4"),
        ({"channels": 32, "heads": 2, "layers": [0, 4, 2]}, r"rising numbers from 0, got \(0, 4, 2\)"),
        ({"channels": 32, "heads": 2, "window": 0}, "window must be a whole number of at least 1, got 0"),
        ({"channels": 32, "heads": 2, "dropout": 1.0}, "dropout"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UpsamplerError, match=message):
        ViTUpConfig.parse(settings)


# --- the upsampler ----------------------------------------------------------------------------------------------------


def trained(channels: int = 32, **options: object) -> tuple[ViTUpConfig, nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """Settings, a small DINOv3, and weights of a head and an adapter that do something."""
    torch.manual_seed(0)
    model = dinov3(channels, 3, 2, 8, 2 * channels, gated=True)
    for block in model.blocks:
        block.gamma_1.data.fill_(1.0)
        block.gamma_2.data.fill_(1.0)
    settings = {"layers": (0, 2, 3), "rank": 2, "alpha": 4.0, "query_size": 128, "hidden_size": 64, **options}
    head = vit_up_of(channels, **settings)
    adapter = Lora(copy.deepcopy(model), rank=2).peft_state()
    lora_state = {name: 0.2 * random(*value.shape, seed=i) for i, (name, value) in enumerate(adapter.items())}
    return head.config, model, head.state_dict(), lora_state


def upsampler(precision: str = "fp32", working_bytes: int = 2**20, **options: object) -> ViTUp:
    return ViTUp(*trained(**options), precision=precision, working_bytes=working_bytes)


def maps(batch: int, channels: int = 32, grid: tuple[int, int] = (6, 6), stride: int = 8) -> PatchFeatures:
    features = torch.zeros(batch, channels, *grid)
    return PatchFeatures(layers={1: features, 2: features}, prefix={}, stride=stride)


@pytest.mark.parametrize("grid", [(12, 12), (5, 31)])
def test_any_grid_is_the_heads_values_at_its_centres(grid):
    vit_up, images = upsampler(), random(2, 3, 48, 72)
    config, backbone = vit_up.config, vit_up._backbone

    out = vit_up(images, maps(2, grid=(6, 9)), (2,), grid)

    with torch.no_grad():
        query_grid = backbone.query_grid(images, (128, 128))
        hidden = backbone.hidden(images, config.layers, (64, 64))
        coords = grid_coordinates(grid).expand(2, -1, -1)
        expected = vit_up._head(query_grid, hidden, coords, outputs=[-1])[0]
    assert (out.shape, out.dtype) == ((2, 32, *grid), torch.float32)
    torch.testing.assert_close(out.flatten(2).transpose(1, 2), expected, **SAME)


def test_what_runs_is_the_adapted_model_and_the_given_one_is_left_alone():
    config, model, head_state, lora_state = trained()
    plain, images, size = copy.deepcopy(model), random(1, 3, 48, 48), (64, 64)
    vit_up = ViTUp(config, model, head_state, lora_state)
    lora = Lora(plain, rank=2, alpha=4.0)
    lora.load_peft_state(lora_state)
    backbone = AdaptedBackbone(plain, lora).eval()

    with torch.no_grad():
        for merged, unmerged in zip(
            vit_up._backbone.hidden(images, [0, 2, 3], size), backbone.hidden(images, [0, 2, 3], size), strict=True
        ):
            torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-4)
        with backbone.unadapted():
            teacher = backbone.hidden(images, [3], size)[0]
        torch.testing.assert_close(AdaptedBackbone(model).hidden(images, [3], size)[0], teacher, **SAME)
    assert (teacher - unmerged).abs().max() > 0.1


def test_several_grids_share_one_backbone_pass(monkeypatch):
    vit_up, images = upsampler(), random(2, 3, 48, 48)
    passes = []
    hidden = AdaptedBackbone.hidden
    monkeypatch.setattr(AdaptedBackbone, "hidden", lambda self, *args: passes.append(1) or hidden(self, *args))

    first = vit_up(images, maps(2), (2,), (12, 12))
    vit_up(images, maps(2), (2,), (24, 24))
    assert len(passes) == 2  # one image at a time
    images += 1
    second = vit_up(images, maps(2), (2,), (12, 12))
    assert len(passes) == 4
    vit_up.forget()
    vit_up(images, maps(2), (2,), (12, 12))

    assert len(passes) == 6
    assert not torch.allclose(first, second)


def test_layers_are_stacked_and_those_without_decoder_refused():
    vit_up, images = upsampler(), random(1, 3, 48, 48)

    both = vit_up(images, maps(1), (1, 2), (8, 8))

    torch.testing.assert_close(both[:, 32:], vit_up(images, maps(1), (2,), (8, 8)), **SAME)
    with pytest.raises(UpsamplerError, match=r"gives the layers \[1, 2\] \(blocks counted from 0\), not \[0\]"):
        vit_up(images, PatchFeatures(layers={0: maps(1).layers[1]}, prefix={}, stride=8), (0,), (8, 8))
    with pytest.raises(UpsamplerError, match="made for maps of 32 channels; layers .* have 16"):
        vit_up(images, maps(1, channels=16), (2,), (8, 8))


def test_maps_of_overlapping_patches_are_queried_over_what_their_cells_tile():
    vit_up, images = upsampler(), random(1, 3, 48, 48)

    # 11 cells of 4 px, from 2 px on.
    out = vit_up(images, maps(1, grid=(11, 11), stride=4), (2,), (11, 11))
    whole = vit_up(images, maps(1), (2,), (12, 12))

    assert not torch.allclose(out, whole[..., :11, :11])
    with torch.no_grad():
        centres = grid_coordinates((11, 11), (2 / 48, 2 / 48, 46 / 48, 46 / 48))[None]
        expected = vit_up._head.query(vit_up._prepared(images)[0], centres, [-1])[0]
    torch.testing.assert_close(out.flatten(2).transpose(1, 2), expected, **SAME)


def test_half_precision_comes_close():
    images = random(1, 3, 48, 48)

    exact, half = (upsampler(precision=p)(images, maps(1), (2,), (16, 16)) for p in ("fp32", "bf16"))

    assert half.dtype == torch.float32
    assert F.cosine_similarity(exact, half, dim=1).min() > 0.99


def test_weights_of_another_backbone_are_refused():
    head = vit_up_of(layers=(0, 2, 4), lora=False)

    with pytest.raises(UpsamplerError, match="doesn't fit a backbone of 32 channels and 3 blocks"):
        ViTUp(head.config, dinov3(32, 3, 2, 8, 64, gated=True), head.state_dict(), {})
    with pytest.raises(UpsamplerError, match="the weights don't fit the adapter"):
        ViTUp(vit_up_of().config, dinov3(32, 3, 2, 8, 64, gated=True), vit_up_of().state_dict(), {})


def peak_of(call: object) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    changes = [event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize(
    ("settings", "grid", "tight"),
    [
        ({"channels": 192, "working_bytes": 2**22}, (96, 48), True),
        ({"channels": 192, "window": 3, "working_bytes": 2**22}, (96, 48), True),
        ({"channels": 64, "query_size": 1024, "working_bytes": 2**24}, (128, 64), True),
        # Here most goes to the backbone, whose bound holds for any timm model.
        ({"channels": 64, "hidden_size": 256, "query_size": 512, "working_bytes": 2**22}, (16, 16), False),
    ],
)
def test_memory_stays_under_peak_bytes_and_close_to_it(settings, grid, tight):
    vit_up, images = upsampler(**settings), random(2, 3, 64, 64)
    channels = vit_up.config.channels
    weights = sum(p.nbytes for module in (vit_up._backbone, vit_up._head) for p in module.parameters())
    vit_up(images, maps(2, channels), (2,), grid)
    vit_up.forget()

    # On a CPU the weights are where they are used already.
    peak = weights + peak_of(lambda: vit_up(images, maps(2, channels), (2,), grid))

    assert peak <= vit_up.peak_bytes(2, channels, grid) <= (1.3 if tight else 2) * peak


def test_chunks_bound_what_a_large_grid_takes():
    images, grid = random(1, 3, 64, 64), (128, 128)
    peaks = []
    for working_bytes in (2**20, 2**40):
        vit_up = upsampler(channels=64, working_bytes=working_bytes)
        vit_up(images, maps(1, 64), (2,), (8, 8))
        peaks.append(peak_of(lambda vit_up=vit_up: vit_up(images, maps(1, 64), (2,), grid)))

    assert 3 * peaks[0] < peaks[1]


@pytest.mark.parametrize("name", ["full_small_gated", "full_small_gelu"])
def test_twice_the_grid_pooled_stays_close_to_the_grid(name):
    """The map is sampled, not cells averaged: close, not equal."""
    backbone, head, tensors, c = small_official(name, fused=True)
    images, size = tensors["in/pixel_values"], (c["hidden_layer_img_size"],) * 2

    with torch.no_grad():
        cache = head.prepare(
            backbone.query_grid(images, (c["query_img_in_size"],) * 2), backbone.hidden(images, c["layer_indices"], size)
        )
        coarse, fine = (
            head.query(cache, grid_coordinates((n, n))[None].expand(len(images), -1, -1), [-1])[0].unflatten(1, (n, n))
            for n in (12, 24)
        )

    pooled = fine.unflatten(1, (12, 2)).unflatten(3, (12, 2)).mean(dim=(2, 4))
    close = F.cosine_similarity(pooled, coarse, dim=-1)
    other = F.cosine_similarity(pooled, coarse.flip(1), dim=-1)
    assert close.mean() > 0.95
    assert 1 - close.mean() < 0.5 * (1 - other.mean())


# --- a start as the enlargement ---------------------------------------------------------------------------------------


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def started(**changes: object) -> tuple[ViTUpHead, torch.Tensor, list[torch.Tensor]]:
    """A head of two blocks with 16 rotary bands, started by states as a norm leaves them, and what it was started by."""
    config = ViTUpConfig(**{"channels": 128, "heads": 2, "layers": (0, 2, 4), **changes})  # type: ignore[arg-type]
    head, scale = ViTUpHead(config), 0.5 + drawn(128, seed=1).abs()
    maps = (F.interpolate(drawn(3, 128, 4, 5, seed=seed), size=(11, 14), mode="bicubic") for seed in range(3))
    states = [F.layer_norm(each.permute(0, 2, 3, 1), (128,)) * scale + drawn(128, seed=2) for each in maps]
    grid = F.interpolate(0.3 * states[0].permute(0, 3, 1, 2), size=(44, 56), mode="bilinear")
    start_enlarging(head, grid, states)
    return head, grid, states


@pytest.mark.parametrize("changes", [{}, {"featx": False}, {"window": 5}], ids=str)
def test_a_start_as_the_enlargement_enlarges_every_state_bilinearly(changes):
    head, grid, states = started(**changes)

    with torch.no_grad():
        found = head(grid, states, grid_coordinates((33, 42)).expand(3, -1, -1))

    for answer, state in zip(found[1:], states[1:], strict=True):
        wanted = F.interpolate(state.permute(0, 3, 1, 2), size=(33, 42), mode="bilinear").flatten(2).transpose(1, 2)
        assert (answer - wanted).square().mean() < 0.04 * (wanted - wanted.mean(dim=(0, 1))).square().mean()


def test_what_starts_as_the_enlargement_learns_with_every_weight():
    head, grid, states = started()
    optimiser = torch.optim.SGD(head.parameters(), lr=0.1)

    for _ in range(3):  # FeatX's modulation begins at 0 below a norm that does
        optimiser.zero_grad()
        sum(answer.square().mean() for answer in head(grid, states, grid_coordinates((5, 7)).expand(3, -1, -1))).backward()
        optimiser.step()

    assert all(each.grad.abs().max() > 0 for name, each in head.named_parameters() if name.endswith("weight"))


@pytest.mark.parametrize(("bands", "off"), [(16, 0.05), (8, 0.06)])
def test_rotary_bands_make_bilinear_weights(bands, off):
    distances = torch.tensor([-0.5, -0.2, 0.0, 0.35])[:, None] - torch.arange(-40, 41)
    cosines = torch.cos(2 * math.pi * distances.double()[..., None] * 100.0 ** (-torch.arange(bands) / bands))

    found = (cosines @ bilinear_logits(bands)).softmax(dim=1)

    assert (found - (1 - distances.abs()).clamp(min=0)).abs().sum(dim=1).mean() < off


def test_a_start_as_the_enlargement_is_refused_without_attention():
    with pytest.raises(UpsamplerError, match="without cross-attention"):
        started(cross_attention=False)
