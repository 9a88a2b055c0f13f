"""The upsamplers there are keep their contract. A new one is a line of `UPSAMPLERS`, and here where it has variants."""

import sys

import pytest
import torch

from operators.backbone import TimmBackbone
from operators.upsamplers import UPSAMPLERS, UpsamplerError, create_upsampler, find_method, method_names, split_method
from operators.upsamplers.protocol import TELLING
from tests.contracts.upsampler import Case, UpsamplerContract, small_vit

RESIDUAL = ("resize_conv", "jbu")
CONVEX = ("jafar", "anyup", "naf", "uplift")
SETTINGS: dict[str, dict[str, object]] = {"naf": {"kernel_size": 3}}
"Of methods that need larger maps than the tests' by default."
SMALLEST = {"naf": 3}

VARIANTS = (
    Case(method="lift", settings={"image_branch": False}),
    Case(method="lift", settings={"image_width": 200, "image_convs": 1}),
    Case(method="lift", settings={"patch": 14}),
    Case(method="lift", factor=4),
    Case(method="resize_conv", settings={"kernel": 3}, residual=True),
    Case(method="resize_conv", factor=4, residual=True),
    Case(method="jbu", settings={"radius": 2}, factor=4, residual=True),
    Case(method="jbu", settings={"stages": 2}, factor=4, residual=True),
    Case(method="jafar", settings={"qk_dim": 16, "num_heads": 2, "kernel_size": 3, "patch": 14}, factor=2.5, convex=True),
    Case(
        method="naf",
        settings={"kernel_size": 1, "dim": 32, "heads_attn": 2, "heads_rope": 1, "img_layers": 1, "patch": 14},
        factor=2.5,
        convex=True,
    ),
    Case(method="featup", settings={"norm": False}, residual=True),
    Case(method="featup", settings={"norm": False}, factor=16, residual=True),
    Case(method="featup", settings={"norm": False, "radius": 2, "key_dim": 8}, factor=7, residual=True),
    Case(method="loftup", settings={"position": "learnable"}, factor=2.5),
    Case(method="uplift", settings={"patch": 14}, factor=4, convex=True),
    Case(method="uplift", settings={"neighbours": 9}, factor=2.5, convex=True),
    Case(method="uplift", settings={"antialias": False}, factor=3.5, convex=True),
    Case(method="anyup", settings={"window_ratio": 0.3, "num_heads": 2, "kernel_size_lfu": 3}, factor=3.5, convex=True),
    Case(method="anyup", settings={"window_ratio": 0.0, "patch": 14}, convex=True),
)


class TestUpsamplers(UpsamplerContract):
    cases = (
        *(
            Case(
                method=name,
                settings=SETTINGS.get(name, {}),
                smallest=SMALLEST.get(name, 1),
                factor=2 if find_method(name).enlarges else 0.5,
                residual=name in RESIDUAL,
                convex=name in CONVEX,
                smooth=name != "nearest",
            )
            for name in UPSAMPLERS
        ),
        *VARIANTS,
    )


def test_unknown_name_is_answered_with_those_there_are():
    with pytest.raises(UpsamplerError, match="no upsampler is called 'bilinaer'; there are: bilinear, bicubic"):
        create_upsampler("bilinaer")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:Toy", r"no_such_module can't be imported here \(No module named 'no_such_module'\).*PYTHONPATH"),
        ("json:Toy", "json has no class Toy that is a Method"),
        ("json:JSONDecoder", "json has no class JSONDecoder that is a Method"),
        ("lift", "lift needs a checkpoint's weights"),
    ],
)
def test_what_is_no_method_is_refused(name, message):
    with pytest.raises(UpsamplerError, match=message):
        create_upsampler(name)


def test_a_module_that_lacks_another_says_which(tmp_path, monkeypatch):
    (tmp_path / "needs_another.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(UpsamplerError, match="needs_another can't be imported here .*No module named 'no_such_module'"):
        find_method("needs_another:Toy")
    assert "needs_another" not in sys.modules


@pytest.mark.parametrize("name", method_names(lambda method: method.learned))
def test_a_file_of_another_method_is_refused_with_its_name(name):
    method, backbone = find_method(name), TimmBackbone(small_vit(8))

    for telling, owner in TELLING.items():
        if telling != method.telling:
            with pytest.raises(UpsamplerError, match=f"looks like a file of {owner}, not of {name}"):
                method.read({f"upsampler.{telling}": torch.zeros(1)}, None, backbone)


@pytest.mark.parametrize(
    ("text", "name", "url"),
    [
        ("lift", "lift", ""),
        ("lift:s3://key:pw@bucket/lift", "lift", "s3://key:pw@bucket/lift"),
        ("lift:folder:Class", "lift", "folder:Class"),
        ("my_module:Toy", "my_module:Toy", ""),
        ("my.module:Toy:s3://key:pw@bucket/toy", "my.module:Toy", "s3://key:pw@bucket/toy"),
        ("my_module:Toy:/data/toy.pth", "my_module:Toy", "/data/toy.pth"),
        ("lfit:/data/lift.pth", "lfit", "/data/lift.pth"),
        ("lfit:weights.pth", "lfit", "weights.pth"),
    ],
)
def test_a_method_is_told_from_the_url_of_its_checkpoint(text, name, url):
    assert split_method(text) == (name, url)
