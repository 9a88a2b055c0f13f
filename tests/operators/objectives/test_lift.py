"""Reconstruction losses: LiFT's values, gradients and optimiser steps."""

import math
from dataclasses import replace

import pytest
import torch

from operators.objectives.lift import LOSSES, Relations, cosine_loss, lower, multi_scale_loss
from operators.objectives.vit_up import relational_kl
from operators.upsamplers import build_net
from tests.goldens import tensor_golden as golden

# Mathematically zero gradients that Adam moves by rounding noise.
NOISE = ("image_convs_1.0.bias", "image_convs_1.3.bias", "image_convs_2.0.bias")


@pytest.mark.parametrize("kind", LOSSES)
def test_values_and_gradients_are_those_of_lifts_script(kind):
    tensors, _ = golden("lift_losses")
    fine, coarse = (tensors[f"in/gen_{i}"].requires_grad_() for i in (1, 2))

    half = LOSSES[kind](fine, tensors["in/feat1"])
    quarter = LOSSES[kind](coarse, tensors["in/feat2"])
    (half + quarter).backward()

    torch.testing.assert_close(half, tensors[f"out/{kind}/term_half"], rtol=1e-5, atol=0)
    torch.testing.assert_close(quarter, tensors[f"out/{kind}/term_quarter"], rtol=1e-5, atol=0)
    torch.testing.assert_close(half + quarter, tensors[f"out/{kind}/loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(fine.grad, tensors[f"out/{kind}/grad_gen_1"], rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(coarse.grad, tensors[f"out/{kind}/grad_gen_2"], rtol=2e-3, atol=2e-4)


def test_cosine_is_that_of_torch_where_vectors_vanish():
    predicted, target = torch.zeros(1, 4, 1, 2), torch.ones(1, 4, 1, 2)
    predicted[..., 1] = 1e-6

    expected = torch.nn.functional.cosine_embedding_loss(predicted.flatten(2)[0].t(), target.flatten(2)[0].t(), torch.ones(2))

    torch.testing.assert_close(cosine_loss(predicted, target), expected)


def test_without_the_smallest_map_the_first_part_is_the_loss():
    net = build_net({"method": "lift", "channels": 6, "patch": 8}).eval()
    images, maps = torch.randn(2, 3, 64, 64), [torch.randn(2, 6, side, side) for side in (8, 4, 2)]

    first, both = (multi_scale_loss(net, images, maps[:count]) for count in (2, 3))

    torch.testing.assert_close(first, cosine_loss(net(lower(images, 2), maps[1]), maps[0]))
    torch.testing.assert_close(both - first, cosine_loss(net(lower(images, 4), maps[2]), maps[1]))


def test_relations_are_added_at_each_scale_and_see_what_a_shared_offset_hides():
    net = build_net({"method": "lift", "channels": 6, "patch": 8}).eval()
    images, maps = torch.randn(2, 3, 64, 64), [torch.randn(2, 6, side, side) for side in (8, 4, 2)]
    relations = Relations(weight=3.0, tau=0.2)  # of each image

    with_them, without = (multi_scale_loss(net, images, maps, relations=each) for each in (relations, None))
    made = [net(lower(images, 2), maps[1]), net(lower(images, 4), maps[2])]

    parts = [
        relational_kl(*(each.flatten(2).transpose(1, 2) for each in pair), tau=0.2, itself=True)
        for pair in zip(made, maps[:2], strict=True)
    ]
    torch.testing.assert_close(with_them - without, 3 * sum(parts))
    # Maps that are all but the same everywhere are near any that share their mean, and tell nothing apart.
    offset = 10 * torch.ones(1, 6, 1, 1)
    mean, target = offset.expand(2, 6, 8, 8), offset + torch.randn(2, 6, 8, 8)
    assert cosine_loss(mean, target) < 0.01
    assert Relations(weight=1.0, tau=0.002).loss(mean, target) > 0.1


def test_a_cell_that_sees_itself_tells_maps_whose_cosines_are_all_lower():
    """Two cells of three at cosine 0.5 to each other, and at 0.9: seen without themselves, all others are alike in both."""
    near, far = (torch.full((3, 3), cosine).fill_diagonal_(1.0) for cosine in (0.9, 0.5))
    maps = [torch.linalg.cholesky(each.double()).float()[None] for each in (near, far)]

    without, with_itself = (relational_kl(*maps, tau=0.1, itself=each) for each in (False, True))

    expected = torch.nn.functional.kl_div(
        *((each / 0.1).log_softmax(dim=1) for each in (near, far)), log_target=True, reduction="sum"
    )
    torch.testing.assert_close(without, torch.tensor(0.0), rtol=0, atol=1e-5)
    torch.testing.assert_close(with_itself, expected / (3 * math.log(3)), rtol=1e-3, atol=0)


def test_cells_of_several_images_are_compared_with_each_other_where_asked():
    predicted, target = torch.randn(5, 6, 3, 3), torch.randn(5, 6, 3, 3)

    found = Relations(weight=2.0, tau=0.2, images=2).loss(predicted, target)

    parts = [[each[part].permute(0, 2, 3, 1).reshape(1, -1, 6) for each in (predicted, target)] for part in ([0, 1], [2, 3], [4])]
    losses = [relational_kl(*pair, tau=0.2, itself=True) for pair in parts]
    torch.testing.assert_close(found, 2 * (2 * losses[0] + 2 * losses[1] + losses[2]) / 5)


def test_relations_of_some_cells_are_those_of_all_at_these_places():
    predicted, target = torch.randn(4, 6, 5, 5, requires_grad=True), torch.randn(4, 6, 5, 5)
    relations = Relations(weight=2.0, tau=0.2, images=2, cells=20)

    found = relations.loss(predicted, target)
    found.backward()

    cells = [each.permute(0, 2, 3, 1).reshape(2, 50, 6) for each in (predicted, target, predicted.grad)]
    first, second = cells.pop().any(dim=2)
    assert first.sum() == 20
    assert first.equal(second)
    torch.testing.assert_close(found, 2 * relational_kl(*(each[:, first] for each in cells), tau=0.2, itself=True))
    assert found == relations.loss(predicted, target)  # the same places again
    every = replace(relations, cells=50).loss(predicted, target)
    assert every == replace(relations, cells=None).loss(predicted, target)
    assert every != found


def test_two_training_steps_are_those_of_lifts_script():
    tensors, config = golden("lift_train_steps_cosine_p8")
    net = build_net({"method": "lift", "channels": config["in_channels"], "patch": config["patch_size"]})
    net.load_state_dict({key[8:]: value for key, value in tensors.items() if key.startswith("sd_init/")}, strict=True)
    optimiser = torch.optim.Adam(net.parameters(), lr=config["lr"])
    losses, gradients = [], {}

    for step in range(config["steps"]):
        sides = {1: 8, 2: 4, 3: 2}
        maps = [tensors[f"in/feat{i}_step{step}"].transpose(1, 2).unflatten(2, (n, n)) for i, n in sides.items()]
        loss = multi_scale_loss(net, tensors[f"in/image_step{step}"], maps, config["loss"])
        optimiser.zero_grad()
        loss.backward()
        gradients = gradients or {name: p.grad.clone() for name, p in net.named_parameters()}
        optimiser.step()
        losses.append(loss.detach().double())

    torch.testing.assert_close(torch.stack(losses), tensors["out/losses"], rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, tensors[f"grad_step0/{name}"], rtol=2e-3, atol=2e-4, msg=name)
    for name, value in net.state_dict().items():
        if name not in NOISE:
            torch.testing.assert_close(value, tensors[f"sd_final/{name}"], rtol=5e-4, atol=5e-4, msg=name)


def test_low_resolution_images_are_every_other_pixel_from_the_top_left():
    images = torch.arange(24.0).reshape(1, 1, 4, 6)

    assert lower(images, 2).tolist() == [[[[0, 2, 4], [12, 14, 16]]]]


def test_maps_that_are_not_twice_the_next_are_refused():
    net = build_net({"method": "resize_conv", "channels": 4, "patch": 16})

    with pytest.raises(ValueError, match=r"predicted \(1, 4, 6, 6\) and target \(1, 4, 5, 5\) must be of one shape"):
        multi_scale_loss(net, torch.randn(1, 3, 96, 96), [torch.randn(1, 4, n, n) for n in (5, 3, 2)])
