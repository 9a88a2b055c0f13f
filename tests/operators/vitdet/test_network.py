"""ViTDet's backbone, pyramid and full size against the official code (vitdet_*, README_vitdet.md)."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from operators.vitdet.backbone import Attention, ViT, relative_positions
from operators.vitdet.detector import Detector
from operators.vitdet.heads import MASK_SIDE
from operators.vitdet.input import padded
from operators.vitdet.pyramid import Pyramid
from operators.vitdet.settings import DetectorSettings
from tests.goldens import Allocations, golden_file, hash_tensor, tensor_golden, under


def close(found: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def on_meta(settings: DetectorSettings) -> Detector:
    with torch.device("meta"):
        return Detector(settings)


@pytest.fixture(scope="module")
def vit():
    tensors, config = tensor_golden("vitdet_vit_a")
    net = ViT(
        DetectorSettings(
            dim=config["dim"],
            depth=config["depth"],
            heads=config["heads"],
            window=config["window"],
            global_blocks=tuple(config["glob"]),
            image_size=config["img"],
            pretrain_size=config["pre"],
        )
    )
    net.load_state_dict(under(tensors, "sd/"))
    return net.eval(), tensors, config


@pytest.mark.parametrize("bias_bytes", [2**27, 1])
def test_backbone_at_native_other_and_oblong_sizes(vit, bias_bytes, monkeypatch):
    monkeypatch.setattr("operators.vitdet.backbone.BIAS_BYTES", bias_bytes)
    net, tensors, config = vit
    blocks: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *args: blocks.append(args[-1])) for block in net.blocks]
    for height, width in config["sizes"]:
        blocks.clear()
        with torch.inference_mode():
            found = net(tensors[f"in/image_{height}x{width}"])
        close(found, tensors[f"out/last_feat_{height}x{width}"])
        close(net.positions((height // 16, width // 16)), tensors[f"mid/pos_{height}x{width}"])
        for i, block in enumerate(blocks):
            close(block, tensors[f"mid/block_{i}_{height}x{width}"])
    for hook in hooks:
        hook.remove()


def test_tables_of_relative_positions_are_resized_to_any_side(vit):
    net, tensors, config = vit
    table = net.blocks[config["glob"][0]].attn.rel_pos_h
    sides = [int(name.rpartition("_")[2]) for name in tensors if name.startswith("mid/rel_pos_h_global_")]
    assert len(sides) > 1
    for side in sides:
        close(relative_positions(table, side), tensors[f"mid/rel_pos_h_global_{side}"])


def test_relative_positions_of_all_queries_are_never_held(monkeypatch):
    monkeypatch.setattr("operators.vitdet.backbone.BIAS_BYTES", 2**20)
    heads, side = 4, 32
    with Allocations() as seen, torch.no_grad():
        Attention(8 * heads, heads, side)(torch.randn(1, side, side, 8 * heads))
    assert seen.largest <= 2**20 < 4 * heads * side**4


def test_pyramid_of_maps_of_stride_16_and_8():
    tensors, config = tensor_golden("vitdet_sfp")
    for suffix, factors, stride in (("", "scale_factors", 16), ("_stride8", "stride8_scale_factors", 8)):
        pyramid = Pyramid(config["dim"], config["channels"], config[factors], stride)
        pyramid.load_state_dict(under(tensors, f"sd{suffix}/"))
        expected = under(tensors, f"out{suffix}/")
        levels = pyramid(tensors["in/feat"])
        assert len(levels) == len(expected)
        for found, level in zip(levels, expected, strict=True):
            close(found, expected[level])


@pytest.mark.parametrize("cascade", [False, True])
def test_names_shapes_and_counts_are_the_official_ones(cascade):
    kept = json.loads(golden_file("vitdet_state_dict_keys.json").read_text())
    expected = kept["cascade_mask_rcnn_vitdet_b" if cascade else "mask_rcnn_vitdet_b"]
    state = on_meta(DetectorSettings.published(cascade=cascade)).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == expected["keys"]
    assert sum(tensor.numel() for tensor in state.values()) == expected["parameters"] == (141_160_990 if cascade else 110_895_792)
    for part, count in expected["by_part"].items():
        assert sum(tensor.numel() for name, tensor in state.items() if name.startswith(f"{part}.")) == count


def test_count_of_the_large_one():
    kept = json.loads(golden_file("vitdet_state_dict_keys.json").read_text())
    found = sum(tensor.numel() for tensor in on_meta(DetectorSettings.published("L")).state_dict().values())
    assert found == kept["mask_rcnn_vitdet_l"]["parameters"]


@torch.inference_mode()
def test_published_size_with_hash_made_weights():
    tensors, config = tensor_golden("vitdet_full_b")
    settings = replace(DetectorSettings.published(cascade=config["cascade"]), square_pad=config["square_pad"])
    shapes = {name: tuple(tensor.shape) for name, tensor in on_meta(settings).state_dict().items()}
    state = {key: hash_tensor(key, config["k0"] + i, shape) for i, (key, shape) in enumerate(sorted(shapes.items()))}
    for key, (total, absolute) in under(tensors, "chk/").items():
        close(torch.stack([state[key].sum(), state[key].abs().sum()]), torch.stack([total, absolute]), 1e-2)
    detector = on_meta(settings).to_empty(device="cpu").eval()
    detector.load_state_dict(state)
    images, _ = padded([tensors["in/image"].permute(1, 2, 0)], settings)

    features = detector.features(images)
    p2, p3, p4, p5, p6 = levels = detector.pyramid(features)
    predicted = [detector.proposal_generator.rpn_head(level) for level in (p4, p6)]
    boxes = [tensors["in/boxes"]]
    logits, deltas = detector.roi_heads.stage(0, detector.roi_heads.pooled(levels, boxes))
    masks = detector.roi_heads.mask_head(detector.roi_heads.pooled(levels, boxes, MASK_SIDE))

    found = {
        "last_feat": features[:, ::4], "p2_slice": p2[:, :4], "p3_slice": p3[:, :16], "p4": p4[:, :64], "p5": p5, "p6": p6,
    }  # fmt: skip
    heads = {
        "rpn_logits_p4": predicted[0][0], "rpn_deltas_p4": predicted[0][1], "rpn_logits_p6": predicted[1][0],
        "class_logits": logits, "box_deltas": deltas, "mask_logits": masks[:, [0, 20, 40, 60]],
    }  # fmt: skip
    for atol, values in ((2e-3, found), (5e-3, heads)):
        for name, value in values.items():
            close(value, tensors[f"out/{name}"], atol)
