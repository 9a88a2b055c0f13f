"""Backbone files as their authors release them, against what their own code makes of them (ckpt_*, README_ckpt.md)."""

import argparse
import copy
import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from operators.backbone import BackboneError, TimmBackbone, normalise
from operators.official_weights import FAMILIES, recognise
from operators.timm_models import create_model
from pipelines.features.bundle import LoadedModel, load_settings
from pipelines.features.config import BackboneConfig
from pipelines.features.weights import WeightsUnavailable, read_state_dict
from tests.goldens import golden_file, hash_tensor, tensor_golden

FILES = {
    "dino_backbone": ("dino", ""), "dino_full": ("dino", "DINO"), "leopart_flat": ("leopart", "Leopart"),
    "leopart_lightning": ("leopart", "Leopart"), "selfpatch_full": ("selfpatch", "SelfPatch"),
    "selfpatch_backbone": ("selfpatch", "SelfPatch"), "mocov3": ("mocov3", "MoCo v3"), "mocov3_deit": ("mocov3", "MoCo v3"),
    "mae_encoder": ("mae", "MAE"), "mae_full": ("mae", "MAE"), "ibot_teacher": ("ibot", ""), "ibot_full": ("ibot", "iBOT"),
    "dinov2": ("dinov2", "DINOv2"), "dinov2_teacher_chunked": ("dinov2", "DINOv2"),
    "dinov2_reg": ("dinov2_reg", "DINOv2 with registers"), "dinov2_swiglu": ("dinov2_swiglu", "DINOv2"),
    "dinov3": ("dinov3", "DINOv3"), "dinov3_plus": ("dinov3_plus", "DINOv3"), "dinov3_zero_bias": ("dinov3_zero_bias", "DINOv3"),
}  # fmt: skip
"""By file: what its numbers are in, and the family that it is told to be of; none for names of any plain ViT."""

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def loaded(folder: Path, file: str, model: str = "", **others: object) -> LoadedModel:
    """What the job's own loading makes of a released file: beside it, timm's config.json says how small it is."""
    _, config = tensor_golden(f"ckpt_{FILES[file][0]}")
    name, args = model or config["timm"], {**config["kwargs"], **others}
    (folder / "weights.pth").symlink_to(golden_file(f"ckpt_{file}.pth"))
    (folder / "config.json").write_text(json.dumps({"architecture": name, "model_args": args}))
    side = args.get("img_size", 64)
    return load_settings(BackboneConfig(model=name, weights=str(folder / "weights.pth")), (side, side))


def tokens(model: nn.Module, image: Tensor, pos_embed: str | None = None, **options: object) -> Tensor:
    """The last block's tokens, CLS and registers first, [B, T, C]."""
    backbone = TimmBackbone(copy.deepcopy(model), pos_embed=pos_embed, **options)
    features = backbone(image, [backbone.n_layers - 1])
    (layer,) = features.layers
    return torch.cat([features.prefix[layer], features.layers[layer].flatten(2).transpose(1, 2)], dim=1)


def by_head(keys_BTC: Tensor, heads: int) -> Tensor:
    return keys_BTC.unflatten(2, (heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("file", FILES)
def test_features_are_those_of_the_authors_code(file, tmp_path):
    expected, config = tensor_golden(f"ckpt_{FILES[file][0]}")
    found, image = loaded(tmp_path, file), expected["in/image"]
    last = expected[f"out/block_{config['kwargs']['depth'] - 1}"]
    has_norm = config["kwargs"].get("final_norm", True)

    torch.testing.assert_close(tokens(found.model, image), expected["out/norm"], rtol=0, atol=2e-6)
    torch.testing.assert_close(tokens(found.model, image, norm=False) if has_norm else last, last, rtol=0, atol=2e-6)
    keys = by_head(tokens(found.model, image, facet="key"), config["kwargs"]["num_heads"])
    torch.testing.assert_close(keys, expected["out/last_keys"], rtol=0, atol=2e-6)
    assert found.description.family == FILES[file][1]
    assert (found.description.expects.mean, found.description.expects.std) == IMAGENET


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith(("mae", "mocov3", "dinov2_swiglu"))])
def test_at_other_sizes_the_family_says_whose_rule_for_positions_is_its_authors(file, tmp_path):
    expected, _ = tensor_golden(f"ckpt_{FILES[file][0]}")
    rules = {family.name: family.pos_embed for family in FAMILIES}
    rule = rules.get(FILES[file][1], "dino")

    found = tokens(loaded(tmp_path, file).model, expected["in/image_other"], None if rule == "timm" else rule)

    torch.testing.assert_close(found, expected["out_other/norm"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("golden", ["mocov3_small", "selfpatch_small", "dinov2_small_reg4", "dinov3_splus"])
def test_published_sizes_load_by_their_name_alone(golden, tmp_path):
    """Weights by the goldens' rule, under the official names; heads, CLS token and norm are known from the family."""
    expected, config = tensor_golden(f"ckpt_full_{golden}")
    keys = json.loads(golden_file("ckpt_state_dict_keys.json").read_text())
    listed = {"mocov3_small": "mocov3_vits16", "selfpatch_small": "selfpatch_vits16.teacher"}
    listed |= {"dinov2_small_reg4": "dinov2_vits14_reg", "dinov3_splus": "dinov3_vits16plus"}
    prefix = {"mocov3_small": "module.base_encoder.", "selfpatch_small": "backbone."}.get(golden, "")
    torch.save(official_state(keys[listed[golden]]["keys"], prefix, config), tmp_path / "weights.pth.tar")
    weights = f"{tmp_path}/weights.pth.tar"

    found = load_settings(BackboneConfig(model=config["timm"], weights=weights), (224, 224))

    image = normalise(expected["in/image_u8"].permute(0, 2, 3, 1), config["mean"], config["std"])
    assert (found.description.expects.mean, found.description.expects.std) == IMAGENET
    norm = tokens(found.model, image)[:, ::7, ::8]
    torch.testing.assert_close(norm, expected["out/norm"], rtol=0, atol=1e-5)
    keys_found = by_head(tokens(found.model, image, facet="key"), config["heads"])[0, :, ::7, ::8]
    torch.testing.assert_close(keys_found, expected["out/last_keys"], rtol=0, atol=1e-5)


def official_state(names: dict[str, object], prefix: str, config: dict[str, object]) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in names.items():
        if isinstance(shape, dict):
            shapes |= {name.replace(".N.", f".{number}."): tuple(shape["shape"]) for number in range(shape["count"])}
        else:
            shapes[name] = tuple(shape)
    backbone = sorted(name.removeprefix(prefix) for name in shapes if name.startswith(prefix) and ".head." not in name)
    state = {}
    for position, name in enumerate(backbone):
        shape = shapes[prefix + name]
        state[prefix + name] = hash_tensor(name, position + config["k0"], shape)
        if name.endswith("bias_mask"):
            third = shape[0] // 3
            state[prefix + name] = torch.cat([torch.ones(third), torch.zeros(third), torch.ones(third)])
    return state


@pytest.mark.parametrize("file", ["dinov3", "dinov2_reg"])
def test_of_a_training_checkpoint_the_teachers_backbone_is_taken(file):
    """DINOv2's and DINOv3's training has it beside heads; DINOv3's norm of local crops belongs to training, too."""
    state = read_state_dict(str(golden_file(f"ckpt_{file}.pth")))
    heads = {"dino_head.mlp.0.weight": torch.zeros(2), "ibot_head.last_layer.weight": torch.zeros(2)}
    heads |= {"backbone.local_cls_norm.weight": torch.zeros(2)} if file == "dinov3" else {}

    found = recognise({**{f"backbone.{name}": value for name, value in state.items()}, **heads})

    expected = recognise(state)
    assert (found.family, found.state.keys()) == (expected.family, expected.state.keys())
    assert all(torch.equal(found.state[name], value) for name, value in expected.state.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("file", FILES)
def test_files_that_were_rounded_to_16_bits_are_of_the_same_family(file, dtype):
    """MAE's and MoCo v3's are told from the values of their position embeddings."""
    state = read_state_dict(str(golden_file(f"ckpt_{file}.pth")))

    found = recognise({name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()})

    assert (found.family.name if found else "") == FILES[file][1]


def test_the_table_of_official_files_has_every_family():
    text = (Path(__file__).parents[2] / "operators/DESIGN.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \|", text.partition("| family | what is read |")[2].partition("\n\n")[0], re.MULTILINE)

    assert {family.name.partition(" with ")[0] for family in FAMILIES} == {
        name for row in rows for name in row.split(", ") if name not in ("with registers", "giant")
    }


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_model_without_biases_is_refused_weights_that_have_them(tmp_path):
    with pytest.raises(BackboneError, match=r"have biases of q and v \(2 blocks\), which vit_small_patch16_dinov3 would drop"):
        loaded(tmp_path, "dinov3", "vit_small_patch16_dinov3")


def test_biases_of_zero_fit_either_model(tmp_path):
    expected, _ = tensor_golden("ckpt_dinov3_zero_bias")

    found = loaded(tmp_path, "dinov3_zero_bias", "vit_small_patch16_dinov3_qkvb")

    torch.testing.assert_close(tokens(found.model, expected["in/image"]), expected["out/norm"], rtol=0, atol=2e-6)


def test_masks_of_nan_are_of_a_model_that_was_never_initialised():
    state = dict(read_state_dict(str(golden_file("ckpt_dinov3.pth"))))
    state["blocks.0.attn.qkv.bias_mask"] = state["blocks.0.attn.qkv.bias_mask"] * torch.nan

    with pytest.raises(BackboneError, match=r"blocks\.0\.attn\.qkv\.bias_mask is NaN: .* never initialised"):
        recognise(state)


@pytest.mark.parametrize(
    ("file", "args", "message"),
    [
        ("dinov2_reg", {"reg_tokens": 0}, "DINOv2 with registers: .* with register tokens; .* without register tokens"),
        ("dinov2", {"reg_tokens": 4}, "DINOv2: .* without register tokens; .* with register tokens"),
        ("dino_full", {"depth": 3}, "DINO: width 24, patch 16, 2 blocks.* has width 24, patch 16, 3 blocks"),
        ("leopart_flat", {"embed_dim": 48}, "Leopart: width 24, .* has width 48"),
        ("dinov2", {"patch_size": 7, "img_size": 28}, "DINOv2: width 24, patch 14, .* patch 7"),
    ],
)
def test_another_model_than_the_weights_are_for_is_refused(file, args, message, tmp_path):
    with pytest.raises(BackboneError, match=message):
        loaded(tmp_path, file, **args)


def test_another_model_is_named(tmp_path):
    state = {name: torch.empty(shape) for name, shape in (("cls_token", (1, 1, 384)), ("mask_token", (1, 384)))}
    state |= {"patch_embed.proj.weight": torch.empty(384, 3, 14, 14), "register_tokens": torch.empty(1, 4, 384)}
    state |= {f"blocks.{number}.norm1.weight": torch.empty(384) for number in range(12)}

    with pytest.raises(BackboneError, match=r"Use --model vit_small_patch14_reg4_dinov2\.lvd142m"):
        recognise(state).fitting("vit_small_patch14_dinov2.lvd142m", {})


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("mocov3", {"base_encoder.patch_embed.proj.0.weight": (8, 3, 3, 3)}, "stack of convolutions .* timm has no model for"),
        ("dino_full", {"backbone.extra": (1,), "strange.weight": (2,)}, "belong neither to its backbone nor .*: strange.weight"),
        ("mae_encoder", {"fc_norm.weight": (24,), "norm.weight": None}, "MAE fine-tuned .* use the pretrained file"),
    ],
)
def test_what_is_no_backbone_that_can_be_had_is_refused(file, change, message):
    state = dict(read_state_dict(str(golden_file(f"ckpt_{file}.pth"))))
    for name, shape in change.items():
        state.pop(name, None)
        if shape is not None:
            state[name] = torch.zeros(shape)

    with pytest.raises(BackboneError, match=message):
        recognise(state)


@pytest.mark.parametrize(
    ("file", "without", "lacking"),
    [
        ("dinov3", "blocks", r"DINOv3, but tensors lack: blocks\.\*"),
        ("dinov3", "blocks.0.attn.qkv.bias", r"DINOv3, but tensors lack: blocks\.0\.attn\.qkv\.bias$"),
        ("dinov2", "cls_token", "DINOv2, but tensors lack: cls_token"),
        ("mocov3", "base_encoder.patch_embed.proj.weight", r"MoCo v3, but tensors lack: patch_embed\.proj\.weight"),
    ],
)
def test_a_file_that_lacks_what_tells_its_network_is_refused(file, without, lacking):
    state = dict(read_state_dict(str(golden_file(f"ckpt_{file}.pth"))))
    gone = [name for name in state if name == without or name.startswith(f"{without}.")]
    assert gone

    with pytest.raises(BackboneError, match=lacking):
        recognise({name: value for name, value in state.items() if name not in gone})


@pytest.mark.parametrize("file", ["mae_encoder", "selfpatch_backbone"])
def test_position_embeddings_of_another_form_tell_no_family(file):
    assert recognise({**read_state_dict(str(golden_file(f"ckpt_{file}.pth"))), "pos_embed": torch.zeros(3)}) is None


def test_a_vit_without_a_family_is_left_as_it_is():
    plain = create_model("vit_tiny_patch16_224", (224, 224), None, 0).state_dict()

    assert recognise(plain) is None
    assert recognise({**plain, "head.weight": torch.zeros(1000, 192)}) is None


class Unknown:
    """What a pickle could hold instead of tensors."""


def test_arguments_of_the_authors_programs_are_read_and_nothing_else_is_unpickled(tmp_path):
    tensors = {"teacher": {"weight": torch.zeros(2)}}
    torch.save({**tensors, "args": argparse.Namespace(arch="vit_small")}, tmp_path / "good.pth")
    torch.save({**tensors, "args": Unknown()}, tmp_path / "bad.pth")

    assert list(read_state_dict(str(tmp_path / "good.pth"))) == ["weight"]
    with pytest.raises(WeightsUnavailable, match="can't be read as plain tensors"):
        read_state_dict(str(tmp_path / "bad.pth"))


def test_statistics_that_nothing_says_are_said(tmp_path, caplog):
    plain = create_model("vit_tiny_patch16_224", (224, 224), None, 0).state_dict()
    torch.save(plain, tmp_path / "weights.pth")
    weights = str(tmp_path / "weights.pth")

    for name, said in (("vit_tiny_patch16_224", True), ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", False)):
        caplog.clear()
        load_settings(BackboneConfig(model=name, weights=weights), (224, 224))
        assert ("don't say what their input is normalised by" in caplog.text) == said


def test_the_family_is_said(tmp_path, caplog):
    caplog.set_level("INFO")

    loaded(tmp_path, "leopart_lightning")

    assert "weights of Leopart, of which the student's backbone is taken" in caplog.text
    assert "--pos-embed dino is its authors' way" in caplog.text
