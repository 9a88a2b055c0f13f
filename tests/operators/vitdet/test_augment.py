"""Large-scale jitter, held against detectron2's."""

import json

import numpy as np
import pycocotools.mask as coco_mask
import pytest

from operators.vitdet.augment import Jitter, LargeScaleJitter, Objects, crop_offset, cropped, mirrored, resized, resized_size
from operators.vitdet.masks import outline_box
from tests.goldens import golden_file, tensor_golden

TABLES = json.loads(golden_file("vitdet_training_tables.json").read_text())


def test_sizes_and_crops_are_rounded_as_published():
    assert [resized_size(size, scale, 1024) for size, scale, _ in TABLES["lsj_resize"]] == [
        tuple(expected) for *_, expected in TABLES["lsj_resize"]
    ]
    assert [crop_offset(size, place, 1024) for size, place, *_ in TABLES["lsj_crop"]] == [
        tuple(expected) for *_, expected, _ in TABLES["lsj_crop"]
    ]


@pytest.mark.parametrize("case", range(3))
def test_images_outlines_and_boxes_are_placed_as_published(case):
    given, config = tensor_golden("vitdet_lsj")
    drawn = config["cases"][case]
    objects = Objects(classes=np.array([7]), outlines=[(given[f"in/polygon_{case}"].numpy().astype(np.float64),)])
    jitter = Jitter(mirrored=drawn["flip"], scale=drawn["scale"], place=drawn["crop_u"])

    pixels, found = LargeScaleJitter(side=drawn["target"])(given[f"in/image_{case}"].numpy(), objects, jitter)

    assert np.abs(pixels.astype(int) - given[f"out/image_{case}"].numpy()).max() <= 1
    assert found.classes.tolist() == [7]
    assert np.allclose(found.boxes, given[f"out/box_recomputed_{case}"].numpy(), atol=1e-4)
    assert len(found.outlines[0]) == drawn["n_polygons"]
    for number, polygon in enumerate(found.outlines[0]):
        expected = given[f"out/polygon_{case}_{number}"].numpy()
        assert np.allclose(sorted(polygon.tolist()), sorted(expected.tolist()), atol=1e-4)


def test_what_is_drawn_is_a_function_of_the_generator():
    lsj = LargeScaleJitter(side=64)
    drawn = [lsj.draw(np.random.default_rng(seed)) for seed in range(200)]

    assert drawn == [lsj.draw(np.random.default_rng(seed)) for seed in range(200)]
    assert 0.3 < np.mean([each.mirrored for each in drawn]) < 0.7
    scales = [each.scale for each in drawn]
    assert 0.1 <= min(scales) < 0.3
    assert 1.8 < max(scales) <= 2
    assert LargeScaleJitter(side=64, scales=(1, 1), mirror=0).draw(np.random.default_rng(0)).scale == 1


def raster(polygons, height, width) -> np.ndarray:
    """What all of them cover, 16 pixels for one of theirs."""
    flat = [(16 * each).ravel().tolist() for each in polygons]
    if not flat:
        return np.zeros((16 * height, 16 * width), bool)
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(flat, 16 * height, 16 * width))).astype(bool)


@pytest.mark.parametrize("seed", range(6))
def test_a_crop_of_an_outline_covers_what_the_crop_of_its_pixels_does(seed):
    rng = np.random.default_rng(seed)
    for _ in range(20):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 14))
        reach = rng.uniform(1, 15, 14)  # a star, which a crop may leave in many pieces
        star = 16 + reach[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        star = star.round() if rng.random() < 0.5 else star  # corners on the crop's sides
        left, top = rng.integers(0, 16, 2)
        right, bottom = left + rng.integers(4, 16), top + rng.integers(4, 16)

        found = cropped((star,), left, top, right, bottom)

        expected = raster((star,), 32, 32)[16 * top : 16 * bottom, 16 * left : 16 * right]
        differs = raster(found, bottom - top, right - left) != expected
        assert differs.mean() < 0.01  # pixels of outlines are drawn half a pixel off
        if found:
            assert outline_box(found).min() >= 0
            assert (outline_box(found)[2:] <= (right - left, bottom - top)).all()


def test_pieces_that_the_crop_takes_apart_are_apart():
    comb = np.array([[0, 0], [10, 0], [10, 8], [8, 8], [8, 2], [6, 2], [6, 8], [4, 8], [4, 2], [2, 2], [2, 8], [0, 8]], float)

    found = cropped((comb,), 0, 4, 10, 8)

    assert sorted(tuple(outline_box((each,)).tolist()) for each in found) == [(0, 0, 2, 4), (4, 0, 6, 4), (8, 0, 10, 4)]


def test_what_only_touches_a_crop_or_lies_beside_it_is_gone():
    square = np.array([[2, 2], [6, 2], [6, 6], [2, 6]], float)

    assert cropped((square,), 6, 0, 9, 9) == ()
    assert cropped((square,), 0, 7, 9, 9) == ()
    objects = Objects(classes=np.array([1, 2]), outlines=[(), (square,)])
    assert objects.with_extent().classes.tolist() == [2]


def test_pixels_are_mirrored_resized_and_cropped_like_outlines():
    mask = np.zeros((6, 8), bool)
    mask[1:3, 5:8] = True
    polygon = np.array([[5, 1], [8, 1], [8, 3], [5, 3]], float)

    def placed(outline):
        return cropped(resized(mirrored(outline, 8), (6, 8), (12, 16)), 2, 1, 16, 12)

    assert outline_box(placed(mask)).tolist() == outline_box(placed((polygon,))).tolist() == [0, 1, 4, 5]
