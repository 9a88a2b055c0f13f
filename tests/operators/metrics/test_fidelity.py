"""Cosines of maps with the backbone's own of a larger image."""

import numpy as np
import pytest
import torch

from operators.metrics.fidelity import cell_cosines, fidelity, fidelity_of, fidelity_sums


def test_cosines_are_those_of_cells_as_they_are_and_less_the_own_maps_mean():
    random = np.random.default_rng(0)
    found, own = random.normal(size=(4, 6, 5)), random.normal(size=(4, 6, 5)) + 3

    cosines = cell_cosines(found, own)

    def by_hand(a, b):
        return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

    mean = own.mean(axis=(0, 1))
    expected = np.stack([by_hand(found, own), by_hand(found - mean, own - mean)])
    np.testing.assert_allclose(cosines, expected, rtol=0, atol=1e-6)
    image = fidelity_of(cosines)
    assert [image.cosine, image.centred] == pytest.approx(expected.mean(axis=(1, 2)), abs=1e-6)


def test_what_all_cells_share_makes_the_first_cosine_near_one_and_the_second_not():
    own = 20 + torch.randn(8, 8, 16)
    mean = own.mean(dim=(0, 1)).expand(8, 8, 16) + 0.01 * torch.randn(8, 8, 16)

    blurred, itself = fidelity_of(cell_cosines(mean, own)), fidelity_of(cell_cosines(own, own))

    assert blurred.cosine > 0.99
    assert abs(blurred.centred) < 0.1
    assert [itself.cosine, itself.centred] == pytest.approx([1, 1], abs=1e-6)


def test_cells_of_a_coarser_map_are_repeated():
    low, own = torch.randn(2, 3, 4), torch.randn(6, 6, 4)

    torch.testing.assert_close(cell_cosines(low, own), cell_cosines(low.repeat_interleave(3, 0).repeat_interleave(2, 1), own))


@pytest.mark.parametrize("shape", [(4, 4, 3), (3, 4, 4), (8, 4, 4), (4, 4, 2)])
def test_maps_that_can_not_be_compared_are_refused(shape):
    with pytest.raises(ValueError, match=r"must be \[h, w, C\] of a multiple of the map"):
        cell_cosines(torch.randn(shape), torch.randn(4, 4, 4))


def test_images_weigh_alike():
    images = [fidelity_of(torch.full((2, side, side), value)) for side, value in ((2, 0.5), (8, 0.9))]

    assert fidelity(fidelity_sums(images).sum(axis=0, keepdims=True)).tolist() == [pytest.approx([70, 70])]
