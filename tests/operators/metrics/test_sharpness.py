"""Sharpness at outlines, beside a loop over pairs of cells and maps whose distances are known."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from operators.metrics.bootstrap import estimates
from operators.metrics.sharpness import OutlineSums, image_sums, neighbour_distances, outline_sums, sharpness


def sums_of(map_hwC: torch.Tensor, labels_HW: torch.Tensor) -> OutlineSums:
    return outline_sums(neighbour_distances(map_hwC, tuple(labels_HW.shape)), labels_HW)


def by_pairs(map_hwC: np.ndarray, labels_HW: np.ndarray) -> list[float]:
    """The sums of an image, a pair at a time; of a map that is coarser by whole factors."""
    (h, w, _), (rows, columns) = map_hwC.shape, labels_HW.shape
    sums = [0.0, 0, 0.0, 0]
    for y, x in np.ndindex(rows, columns):
        for below, right in ((y, x + 1), (y + 1, x)):
            if below == rows or right == columns or 255 in (labels_HW[y, x], labels_HW[below, right]):
                continue
            one, other = map_hwC[y * h // rows, x * w // columns], map_hwC[below * h // rows, right * w // columns]
            at = 0 if labels_HW[y, x] != labels_HW[below, right] else 2
            sums[at] += 1 - float(one @ other) / (math.hypot(*one) * math.hypot(*other))
            sums[at + 1] += 1
    return sums


@pytest.mark.parametrize("grid", [(6, 9), (2, 3), (6, 3)])
def test_sums_are_those_of_all_pairs(grid):
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(*grid, 5)) + 1, random.choice([0, 1, 2, 255], (6, 9)).astype(np.uint8)

    found = sums_of(torch.from_numpy(features), torch.from_numpy(labels))

    assert image_sums([found])[0] == pytest.approx(by_pairs(features, labels), rel=1e-5)
    assert 0 < found.pairs < found.pairs + found.pairs_elsewhere < 6 * 8 + 5 * 9


def test_grids_that_are_no_multiples_are_asked_for_their_nearest_cell():
    right, below = neighbour_distances(torch.eye(3)[None], (1, 5))

    # Centres 0.3, 0.9, 1.5, 2.1 and 2.7 of three cells.
    assert right.tolist() == [[0, 1, 1, 0]]
    assert below.shape == (0, 5)


HALVES = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.uint8).expand(4, 8)
SIDES = torch.eye(2)[None]
"""A map of two cells side by side, as unlike as can be."""


def test_a_map_that_is_constant_on_each_side_has_no_distance_elsewhere():
    found = sums_of(SIDES * 0.3, HALVES)

    assert found == OutlineSums(apart=4.0, pairs=4, apart_elsewhere=0.0, pairs_elsewhere=4 * 6 + 3 * 8)
    np.testing.assert_array_equal(sharpness(image_sums([found])), [[math.nan, 1, 0]])


def test_a_bilinear_ramp_is_as_sharp_as_its_angles():
    """Shares of the right vector are 0, 0, 1/8, 3/8, 5/8, 7/8, 1 and 1, the outline is in the middle."""
    ramp = F.interpolate(SIDES.permute(2, 0, 1)[None], size=(4, 8), mode="bilinear")[0].permute(1, 2, 0)

    (found,) = sharpness(image_sums([sums_of(ramp, HALVES)]))

    at = 1 - 30 / 34
    elsewhere = 4 * 2 * ((1 - 7 / math.sqrt(50)) + (1 - 38 / math.sqrt(50 * 34))) / (4 * 6 + 3 * 8)
    assert found == pytest.approx([at / elsewhere, at, elsewhere], rel=1e-5)
    # A steeper one is sharper.
    steeper = ramp + 0.6 * (ramp - 0.5)
    assert sharpness(image_sums([sums_of(steeper.clamp(0), HALVES)]))[0, 0] > 2 * found[0]


def test_of_void_nothing_is_known():
    labels = HALVES.clone()
    labels[:, 3] = 255

    found = sums_of(SIDES, labels)

    assert (found.pairs, found.pairs_elsewhere) == (0, 4 * 5 + 3 * 7)
    assert math.isnan(sharpness(image_sums([found]))[0, 1])


def test_vectors_of_zeros_are_like_each_other_alone():
    right, _ = neighbour_distances(torch.tensor([[[0.0, 0], [0, 0], [0, 3]]]), (1, 3))

    assert right.tolist() == [[0, 0.5]]


def test_what_can_not_be_compared_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        neighbour_distances(torch.full((2, 2, 2), math.nan), (2, 2))
    with pytest.raises(ValueError, match=r"distances \(2, 1\) aren't of the pairs of labels \(4, 8\)"):
        outline_sums(neighbour_distances(torch.ones(2, 2, 2), (2, 2)), HALVES)


def test_figures_are_of_the_sums_of_all_images():
    images = [
        OutlineSums(apart=3.0, pairs=2, apart_elsewhere=1.0, pairs_elsewhere=4),
        OutlineSums(apart=1.0, pairs=6, apart_elsewhere=2.0, pairs_elsewhere=12),
    ]

    assert sharpness(image_sums(images).sum(axis=0, keepdims=True))[0].tolist() == [0.5 / 0.1875, 0.5, 0.1875]
    interval = estimates({"a": image_sums(images)}, sharpness, {})["a"][0].interval
    assert interval
    assert (interval.low, interval.high) == (1.0, 6.0)
