"""FeatUp's joint bilateral upsampler: its own code's kernels, outputs and gradients."""

import json

import pytest
import torch

from operators.backbone import PatchFeatures
from operators.upsamplers import UpsamplerError, build_net, learned_upsampler
from operators.upsamplers.jbu import JointBilateral, JointBilateralStack
from tests.goldens import GOLDEN, tensor_golden, under

# README_upsamplers.md: the official modules in float64 differ by about as much.
SINGLE = {"rtol": 5e-5, "atol": 5e-5}
STACK = {"rtol": 2e-4, "atol": 2e-4}


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Tensors, weights as float32, and settings."""
    tensors, config = tensor_golden(name)
    return {key: tensor.float() for key, tensor in tensors.items()}, config


def single(name: str) -> tuple[dict[str, torch.Tensor], JointBilateral]:
    tensors, config = golden(name)
    net = JointBilateral(config["radius"], config["key_dim"]).eval()
    net.load_state_dict(under(tensors, "w."), strict=True)
    return tensors, net


def features(maps: torch.Tensor) -> PatchFeatures:
    return PatchFeatures(layers={0: maps}, prefix={0: maps.new_zeros(len(maps), 0, maps.shape[1])}, stride=16)


@pytest.mark.parametrize("radius", [1, 2, 3, 5])
def test_kernels_and_output_are_those_of_the_official_module(radius):
    tensors, net = single(f"jbu_learned_range_r{radius}")
    guidance = tensors["in.guidance"]

    torch.testing.assert_close(net.spatial_kernel(), tensors["mid.spatial_kernel"], **SINGLE)
    torch.testing.assert_close(net.range_kernel(guidance), tensors["mid.range_kernel"], **SINGLE)
    torch.testing.assert_close(net.kernel(guidance), tensors["mid.final_kernel"], **SINGLE)
    torch.testing.assert_close(net.filter(guidance, tensors["in.features"]), tensors["out.features"], **SINGLE)


@pytest.mark.parametrize(("temperature", "scale"), [(-20.0, 1e2), (20.0, 1e-2)])
def test_temperature_stays_between_1e_4_and_1e4(temperature, scale):
    net, guidance = JointBilateral().eval(), torch.randn(1, 3, 8, 8)
    expected = net.range_kernel(guidance)

    net.range_temp.data.fill_(temperature)
    for parameter in net.range_proj[3].parameters():
        parameter.data.mul_(scale)  # similarities are products of two keys

    torch.testing.assert_close(net.range_kernel(guidance), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("radius", [1, 2, 3, 5])
def test_gradients_are_those_of_the_official_module(radius):
    tensors, net = single(f"jbu_learned_range_r{radius}")
    maps = tensors["in.features"].requires_grad_()

    (net.filter(tensors["in.guidance"], maps) * tensors["grad.loss_weight"]).sum().backward()

    torch.testing.assert_close(maps.grad, tensors["grad.features"], rtol=5e-4, atol=5e-5)
    for name, parameter in net.named_parameters():
        expected = tensors[f"grad.{name}"]
        torch.testing.assert_close(parameter.grad, expected, rtol=5e-4, atol=5e-4 * expected.abs().max().item(), msg=name)


def test_the_backward_pass_holds_no_map_per_tap():
    net, saved = JointBilateral(), {}
    maps = torch.randn(1, 256, 8, 8, requires_grad=True)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = net(torch.randn(1, 3, 128, 128), maps)

    assert sum(saved.values()) < 3 * out.nbytes + 16 * 49 * 16 * 16 * 4


@pytest.mark.parametrize("name", ["jbu_stack_small", "jbu_stack_published_dim384"])
def test_a_stack_is_that_of_featup(name):
    tensors, config = golden(name)
    settings = {"method": "jbu", "channels": config["feat_dim"], "patch": 16, "stages": 4}
    h, w = tensors["in.features"].shape[-2:]

    upsampler = learned_upsampler(settings, under(tensors, "w."))
    out = upsampler(tensors["in.image"], features(tensors["in.features"]), (0,), (16 * h, 16 * w))

    torch.testing.assert_close(out, tensors["out.features"], **STACK)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_stack_stops_early_and_corrects_what_it_has(steps):
    tensors, _ = golden("jbu_stack_small")
    net = JointBilateralStack(6).eval()
    net.load_state_dict(under(tensors, "w."), strict=True)

    out = net(tensors["in.image"], tensors["in.features"], steps)

    stage = tensors[f"mid.up{steps}"]
    torch.testing.assert_close(out, stage + 0.1 * net.fixup_proj(stage), **STACK)


@pytest.mark.parametrize("channels", [384, 512])
def test_published_stacks_have_their_names_shapes_and_parameters(channels):
    official = json.loads((GOLDEN / "jbu_state_dict_keys.json").read_text())[f"jbu_stack_dim{channels}"]
    net = JointBilateralStack(channels)

    found = {key: [list(v.shape), str(v.dtype)[6:]] for key, v in net.state_dict().items()}

    assert found == official["state_dict"]
    assert sum(p.numel() for p in net.parameters()) == official["params"]
    assert sum(p.numel() for p in JointBilateral().parameters()) == 6_233


def test_several_passes_of_one_step_see_the_original_image():
    config = {"method": "jbu", "channels": 4, "patch": 16}
    net = build_net(config, seed=1).eval()
    images, maps = torch.randn(2, 3, 96, 64), torch.randn(2, 4, 6, 4)

    out = learned_upsampler(config, net.state_dict())(images, features(maps), (0,), (24, 16))

    torch.testing.assert_close(out, net(images, net(images, maps)), rtol=1e-5, atol=1e-5)


def test_grids_that_do_not_exceed_the_radius_are_refused():
    config = {"method": "jbu", "channels": 4, "patch": 16}
    upsampler = learned_upsampler(config, build_net(config).state_dict())

    with pytest.raises(UpsamplerError, match="radius 3 needs more cells than 1x4"):
        upsampler(torch.randn(1, 3, 16, 64), features(torch.randn(1, 4, 1, 4)), (0,), (2, 8))
    with pytest.raises(ValueError, match="radius 3 need more than 2x8 cells"):
        build_net(config)(torch.randn(1, 3, 16, 64), torch.randn(1, 4, 1, 4))
