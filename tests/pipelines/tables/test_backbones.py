"""DeAP's backbones by timm's names: what the table says of each is what the model is."""

import pytest
import timm
import torch

from jobs import show
from operators.backbone import BackboneError, TimmBackbone
from operators.timm_models import create_model
from pipelines.config import ConfigError
from pipelines.tables.backbones import BACKBONES, BY_NAME, find_backbone
from tests.conftest import squeezed

RUNNABLE = [each for each in BACKBONES if not each.absent]


def distinct() -> list[str]:
    """One name of each architecture and size; weights don't matter here."""
    return list({(each.model.split(".")[0], each.size): each.name for each in RUNNABLE}.values())


@pytest.mark.parametrize("name", distinct())
def test_each_gives_the_map_that_the_table_says(name):
    entry = BY_NAME[name]
    with torch.device("meta"), torch.inference_mode():
        model = create_model(entry.model, (entry.size, entry.size), None, None)
        # SigLIP's head that pools isn't of what makes maps.
        trunk = [each for name, each in model.named_parameters() if not name.startswith("attn_pool.")]
        parameters = sum(parameter.numel() for parameter in trunk)
        backbone = TimmBackbone(model, ragged=entry.ragged)
        features = backbone(torch.empty(2, 3, entry.size, entry.size), (backbone.n_layers - 1,))

    assert features.layers[backbone.n_layers - 1].shape == (2, entry.channels, entry.grid, entry.grid)
    assert parameters == entry.parameters
    assert backbone.norm is (name != "hiera")


def test_those_of_one_architecture_have_one_description():
    of = {}
    for each in RUNNABLE:
        of.setdefault((each.model.split(".")[0], each.size), set()).add((each.grid, each.channels, each.parameters))

    assert all(len(descriptions) == 1 for descriptions in of.values())


def test_timm_has_the_weights_and_their_normalisation():
    known = set(timm.list_pretrained())
    assert [each.model for each in RUNNABLE if each.model not in known] == []

    clip = [0.48145466, 0.4578275, 0.40821073]
    means = {each.name: list(timm.get_pretrained_cfg(each.model).mean) for each in RUNNABLE}
    assert [name for name, mean in means.items() if mean == clip] == ["clip-b", "clip-l", "metaclip", "aim2", "vitamin"]
    half = ["supervised", "siglip-224", "siglip-384", "siglip-512", "siglip-so"]
    assert [name for name, mean in means.items() if mean == [0.5, 0.5, 0.5]] == half


@pytest.mark.parametrize(("name", "size"), [("hiera_tiny_224", 224), ("vitamin_small_224", 224)])
def test_small_ones_of_unusual_families_give_timms_own_map(name, size):
    model = create_model(name, (size, size), None, 0)
    backbone = TimmBackbone(model)
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))

    with torch.inference_mode():
        features = backbone(images, (backbone.n_layers - 1,))
        own = model.forward_features(images)

    found = features.layers[backbone.n_layers - 1].flatten(2).transpose(1, 2)
    if own.ndim == 4:
        own = own.flatten(1, 2)
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)


def test_what_timm_lacks_is_refused_by_name():
    with pytest.raises(ConfigError, match="its neck"):
        find_backbone("sam2", "s3://bucket/sam2.safetensors")
    with pytest.raises(ConfigError, match="its weights; vit_base_patch16_224.mae takes them"):
        find_backbone("moco-v3")

    assert find_backbone("moco-v3", "s3://bucket/moco.safetensors").model == "vit_base_patch16_224.mae"


def test_words_are_names_of_the_table_or_timms():
    tiny = find_backbone("test_vit.r160_in1k")
    assert (tiny.size, tiny.ragged) == (160, False)
    assert find_backbone("test_vit.r160_in1k@64").size == 64
    assert BY_NAME["siglip-so"].ragged
    with pytest.raises(ConfigError, match="Did you mean metaclip"):
        find_backbone("metaclp")
    with pytest.raises(ConfigError, match="TIMM_NAME@PIXELS"):
        find_backbone("test_vit.r160_in1k@big")
    with pytest.raises(BackboneError, match="near names"):
        find_backbone("vit_bse_patch16_224")


def test_show_lists_them(capsys):
    assert show.run(["backbones"]) == 0

    lines = squeezed(capsys.readouterr().out).splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == 2 + 18
    expected = "| siglip-so | SigLIP SO | vit_so400m_patch14_siglip_384.webli | 512 | 36x36 | 1152 | 0.500 0.500 0.500 "
    assert expected + "| 0.500 0.500 0.500 | 413.0 M |" in lines
    assert "| sam2 | SAM2 B+ | | 1024 | 64x64 | 256 | | | missing |" in lines
    assert any(line.startswith("- sam2: timm lacks its neck") for line in lines)
    assert show.run(["backbones", "resnet"]) == 2
    assert "no backbone is called resnet" in capsys.readouterr().err
