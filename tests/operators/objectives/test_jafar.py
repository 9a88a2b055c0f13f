"""JAFAR's objective: the released loss and its gradient, the sizes of smaller images, and noise in what guides."""

import numpy as np
import pytest
import torch

from operators.objectives.jafar import BLURRED, NOISY, GuidanceNoise, map_loss, shrunk_side, shrunk_sides
from tests.goldens import tensor_golden

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_the_loss_and_its_gradient_are_the_released_ones():
    tensors, _ = tensor_golden("jafar_loss_cosine_mse")
    predicted = tensors["in.pred"].requires_grad_()

    loss = map_loss(predicted, tensors["in.target"])
    (gradient,) = torch.autograd.grad(loss, predicted)

    torch.testing.assert_close(loss[None], tensors["out.loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, tensors["out.grad_pred"], rtol=1e-4, atol=1e-9)


def test_maps_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="of one shape"):
        map_loss(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 1))


@pytest.mark.parametrize(
    ("side", "patch", "expected"),
    [(448, 14, tuple(range(224, 111, -14))), (448, 16, tuple(range(224, 111, -16))), (64, 16, (32, 16)), (32, 16, (16,))],
)
def test_smaller_images_have_whole_patches(side, patch, expected):
    found = {shrunk_side(side, patch, share) for share in np.random.default_rng(0).uniform(0.25, 0.5, 3000)}

    assert shrunk_sides(side, patch, 0.25, 0.5) == expected
    assert found == set(expected)


def drawn(count: int, shape: tuple[int, int] = (9, 7), first: int = 0) -> GuidanceNoise:
    generators = [np.random.default_rng(first + n) for n in range(count)]
    return GuidanceNoise.draw(generators, shape, torch.device("cpu"))


def test_noise_is_each_images_own_whatever_others_are_there():
    both, second = drawn(2), drawn(1, first=1)

    assert torch.equal(both.added_B3HW[1:], second.added_B3HW)
    assert torch.equal(both.blurred_B[1:], second.blurred_B)


def test_parts_of_the_images_are_blurred_and_have_noise_of_the_released_size():
    found = drawn(600)

    noisy = found.added_B3HW.flatten(1).any(dim=1)
    assert float(found.blurred_B.float().mean()) == pytest.approx(BLURRED, abs=0.06)
    assert float(noisy.float().mean()) == pytest.approx(NOISY, abs=0.06)
    assert float((noisy & found.blurred_B).float().mean()) == pytest.approx(BLURRED * NOISY, abs=0.05)
    assert float(found.added_B3HW[noisy].std()) == pytest.approx(0.02, rel=0.02)


def test_noised_images_stay_within_what_pixels_can_be_and_clean_ones_as_they_are():
    pixels = torch.rand(
        6, 3, 9, 7, generator=torch.Generator().manual_seed(0)
    ).round()  # black and white: noise would leave the range
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    images = (pixels - mean) / std
    before = images.clone()
    noise = drawn(6)

    found = noise(images, MEAN, STD)

    back = found * std + mean
    assert torch.equal(images, before)
    assert float(back.min()) > -1e-5
    assert float(back.max()) < 1 + 1e-5
    assert float(found.min()) < -1  # the released code cuts here, at 0
    changed = (found - images).abs().flatten(1).amax(dim=1) > 1e-5
    assert torch.equal(changed, noise.blurred_B | noise.added_B3HW.flatten(1).any(dim=1))


def test_a_blur_keeps_flat_images_and_sums():
    from operators.objectives.blur import gaussian_blur

    spot = torch.zeros(1, 2, 9, 9)
    spot[..., 4, 4] = 1
    flat = torch.full((1, 2, 4, 5), 3.0)

    found = gaussian_blur(spot)

    torch.testing.assert_close(gaussian_blur(flat), flat)
    assert float(found[0, 0].sum()) == pytest.approx(1)
    assert float(found[0, 0, 4, 4] / found[0, 0, 4, 5]) == pytest.approx(float(np.exp(0.5)), rel=1e-5)
    with pytest.raises(ValueError, match="more than 2 cells"):
        gaussian_blur(torch.zeros(1, 1, 2, 9))
