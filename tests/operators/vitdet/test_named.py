"""ViTDet's backbone by names of timm: the official maps through what runs any backbone; what it can't do is refused."""

import pytest
import torch

from operators.backbone import BackboneError, TimmBackbone
from operators.official_weights import recognise
from operators.timm_models import create_model, load_arrays, preprocessing, state_arrays
from operators.vitdet.detector import Detector
from tests.goldens import tensor_golden, under
from tests.vitdet_goldens import TINY

ARGUMENTS = {
    "dim": 48, "depth": 3, "heads": 3, "window": 3, "global_blocks": [1], "image_size": 96, "pretrain_size": 64,
}  # fmt: skip
"""Of the golden file's backbone."""


def golden_backbone(**options: object) -> tuple[TimmBackbone, dict[str, torch.Tensor]]:
    tensors, _ = tensor_golden("vitdet_vit_a")
    official = recognise(under(tensors, "sd/"))
    arguments, state = official.fitting("vitdet_base", {})
    assert arguments == ARGUMENTS
    return TimmBackbone(create_model("vitdet_base", (96, 96), state, None, arguments), **options), tensors


@pytest.mark.parametrize("size", ["96x96", "80x112", "48x64"])
def test_maps_are_the_official_ones_after_any_block_and_at_any_size(size):
    backbone, tensors = golden_backbone()

    found = backbone(tensors[f"in/image_{size}"], [2, 0])

    torch.testing.assert_close(found.layers[2], tensors[f"out/last_feat_{size}"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.layers[0], tensors[f"mid/block_0_{size}"].permute(0, 3, 1, 2), rtol=1e-4, atol=1e-4)
    assert found.prefix[2].shape[1] == 0
    assert not backbone.norm


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"facet": "key"}, "facet key needs a plain ViT, whose blocks have a qkv or q_proj layer; ViTDet is none"),
        ({"norm": True}, "the final norm applies to facet token of plain ViTs only, not to facet token of ViTDet"),
        ({"stride": 8}, "stride 8 is not possible for ViTDet"),
        ({"pos_embed": "dino"}, "pos_embed dino is not possible for ViTDet"),
    ],
)
def test_what_the_backbone_of_a_detector_cannot_do_is_refused(options, said):
    with pytest.raises(BackboneError, match=said):
        golden_backbone(**options)[0].try_out("vitdet_base", (96, 96), [2])


def test_sizes_that_patches_do_not_fill_are_taken_where_that_is_asked_for():
    with pytest.raises(BackboneError, match="the nearest that is: 96"):
        golden_backbone()[0].try_out("vitdet_base", (100, 96), [2])

    backbone, tensors = golden_backbone(ragged=True)
    image = tensors["in/image_96x96"]
    wider = torch.cat([image, image[:, :, :4]], dim=2)

    torch.testing.assert_close(backbone(wider, [2]).layers[2], backbone(image, [2]).layers[2])


def test_of_a_whole_detector_the_backbone_is_taken():
    torch.manual_seed(3)
    detector = Detector(TINY).eval()
    official = recognise({**detector.state_dict(), "pixel_mean": torch.zeros(3, 1, 1)})
    image = torch.randn(1, 3, 64, 64)

    arguments, state = official.fitting("vitdet_base", {})
    model = create_model("vitdet_base", (64, 64), state, None, arguments)

    assert official.family.name == "ViTDet"
    torch.testing.assert_close(TimmBackbone(model)(image, [1]).layers[1], detector.features(image))
    again = load_arrays(create_model("vitdet_base", (64, 64), None, None, arguments), state_arrays(model))
    torch.testing.assert_close(TimmBackbone(again)(image, [1]).layers[1], detector.features(image))


def test_weights_of_a_detector_are_refused_for_other_models():
    tensors = {name: value for name, value in Detector(TINY).state_dict().items() if name.startswith("backbone.net.")}

    with pytest.raises(BackboneError, match=r"weights of ViTDet, width 16\. Use --model vitdet_base"):
        recognise(tensors).fitting("vit_base_patch16_224", {})
    with pytest.raises(BackboneError, match="belong neither to its backbone nor to its training: backbone.bottom_up"):
        recognise({**tensors, "backbone.bottom_up.res2": torch.zeros(1)})
    same = {name: torch.zeros(3, 8) if "rel_pos" in name else value for name, value in tensors.items()}
    with pytest.raises(BackboneError, match="don't tell blocks that attend in windows"):
        recognise(same).fitting("vitdet_base", {})


def test_published_sizes_have_their_parameters_memory_and_statistics():
    with torch.device("meta"):
        model = create_model("vitdet_base", (1024, 1024), None, None)

    assert sum(each.numel() for each in model.parameters()) == 85_889_024
    measured = 412.9e6, 333.5e6  # beyond the weights, of one image with 3 and 4 blocks on a CPU
    for dim, least in zip((768, 96), measured, strict=True):
        with torch.device("meta"):
            backbone = TimmBackbone(create_model("vitdet_base", (1024, 1024), None, None, {"dim": dim, "heads": dim // 64 or 1}))
        weights = sum(each.nbytes for each in backbone.model.parameters())
        assert least < backbone.peak_bytes(1, (1024, 1024)) - weights < 5 * least
    expects = preprocessing("vitdet_base")
    assert (expects.size, expects.interpolation, expects.mean) == ((1024, 1024), "bilinear", (0.485, 0.456, 0.406))
