"""Vectors of masks and boxes: a mean of cells by the area that a region covers, held against areas counted one by one."""

import numpy as np
import pycocotools.mask as coco_mask
import pytest

from storage.regions import RegionError
from storage.store import FeatureStore, OutsideImage
from tests.storage.test_points import SIZES, by_hand, placed

INPUTS = [(64, 64), (96, 64)]


def overlaps(low: np.ndarray, high: np.ndarray, cells: int, side: int) -> np.ndarray:
    """How much of each [low, high] lies in each of the cells that share `side` pixels."""
    edges = np.arange(cells + 1) * side / cells
    return np.clip(np.minimum(high[:, None], edges[1:]) - np.maximum(low[:, None], edges[:-1]), 0, None)


def mean_by_hand(store: FeatureStore, row: int, level: str, mode: str, x: np.ndarray, y: np.ndarray, mask: np.ndarray):
    """The mean of the cells under those of the boxes between `x` and between `y` (pairs) that `mask` [len(y), len(x)] has,
    each cut with each cell in the input's pixels."""
    height, width = store.spec.input_size
    rows, columns = store.levels[level].grid
    (x_scale, x_offset), (y_scale, y_offset) = placed(mode, SIZES[row], (height, width))
    across = overlaps(*(x * x_scale + x_offset).T, columns, width)
    down = overlaps(*(y * y_scale + y_offset).T, rows, height)
    areas = np.einsum("yx,yi,xj->ij", mask.astype(np.float64), down, across)
    features = store.read(row, level).astype(np.float64)
    total = areas.sum()
    return (features * areas[..., None]).sum(axis=(0, 1)) / total if total > 1e-9 else np.full(features.shape[-1], np.nan)


def pixels_of(side: int) -> np.ndarray:
    """From where to where each pixel reaches."""
    return np.stack([np.arange(side), np.arange(side) + 1], axis=1)


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
@pytest.mark.parametrize("input_size", INPUTS)
def test_boxes_are_means_by_area(tmp_path, mode, input_size):
    store = by_hand(tmp_path / "a.zarr", mode, input_size)
    rng = np.random.default_rng(1)
    cut_away = 0
    for row, (width, height) in enumerate(SIZES):
        corners = np.sort(rng.uniform(0, 1, (20, 2, 2)), axis=1).reshape(20, 4) * [width, height, width, height]
        for level in ("x1", "5x3"):
            expected = [
                mean_by_hand(store, row, level, mode, box[None, ::2], box[None, 1::2], np.ones((1, 1))) for box in corners
            ]

            found = store.pool(row, corners, level)

            assert (found.dtype, found.shape) == (np.float32, (20, 2))
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
            cut_away += np.isnan(found).any(axis=1).sum()
    assert (cut_away > 0) == (mode == "crop")


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
def test_masks_and_their_run_lengths_are_means_by_area(tmp_path, mode):
    store = by_hand(tmp_path / "a.zarr", mode, (64, 96))
    rng = np.random.default_rng(2)
    for row, (width, height) in enumerate(SIZES[:3]):
        masks = rng.random((4, height, width)) < rng.uniform(0.01, 0.3, (4, 1, 1))
        masks[3] = False
        runs = [coco_mask.encode(np.asfortranarray(mask)) for mask in masks]
        as_text = [{**each, "counts": each["counts"].decode()} for each in runs]
        for level in ("x1", "x2"):
            expected = [mean_by_hand(store, row, level, mode, pixels_of(width), pixels_of(height), mask) for mask in masks]

            found = store.pool(row, masks, level)

            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
            assert np.isnan(found[3]).all()
            for same in (masks.astype(np.uint8), runs, as_text):
                np.testing.assert_array_equal(store.pool(row, same, level), found)
            np.testing.assert_array_equal(store.pool(row, masks[0], level), found[:1])
            np.testing.assert_array_equal(store.pool(row, as_text[1], level), found[1:2])


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FeatureStore:
    return by_hand(tmp_path_factory.mktemp("regions") / "a.zarr", "crop", (64, 64))


def test_points_are_sampled(store):
    points = np.random.default_rng(3).uniform(0, (96, 72), (20, 2))

    np.testing.assert_array_equal(store.pool(0, points, "x2"), store.sample(0, points, "x2"))
    np.testing.assert_array_equal(store.pool(0, points.tolist(), "x2"), store.sample(0, points, "x2"))


def test_a_box_that_leaves_the_image_counts_inside_it(store):
    inside = store.pool(0, [[10, 5, 96, 72]], "x1")

    np.testing.assert_array_equal(store.pool(0, [[10, 5, 97.5, 300]], "x1"), inside)


def test_no_region_is_no_vector(store):
    for none in ([], np.zeros((0, 4)), np.zeros((0, 72, 96), bool)):
        assert store.pool(0, none, "x1").shape == (0, 2)


@pytest.mark.parametrize(
    ("regions", "said"),
    [
        (np.zeros((96, 72), bool), "the image has 72 rows and 96 columns"),
        (np.full((1, 72, 96), 7), "these hold other numbers"),
        ([[1, 2, 3]], "got an array of shape (1, 3)"),
        ([[50, 5, 10, 20]], "not a width and a height"),
        ([[0, 0, np.nan, 1]], "boxes are x1, y1, x2, y2"),
        ([[100, 5, 120, 9]], "lies outside the image of 96 x 72 pixels"),
        ({"size": [96, 72], "counts": [6912]}, "its size is [96, 72]"),
        ({"size": [72, 96], "counts": [1]}, "its runs cover 1 pixels"),
        ([{"size": [72, 96]}], "its runs (counts) are None, neither a list nor text"),
    ],
)
def test_what_is_no_region_of_the_image_is_refused(store, regions, said):
    with pytest.raises(RegionError) as caught:
        store.pool(0, regions, "x1")

    assert said in str(caught.value)


def test_a_point_outside_and_a_level_without_cells_are_refused(store, tmp_path):
    with pytest.raises(OutsideImage):
        store.pool(0, [[200.0, 5.0]], "x1")
