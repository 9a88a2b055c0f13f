"""Targets of masks, held against detectron2's."""

import numpy as np
import pytest

from operators.vitdet.masks import ObjectMasks, is_empty, outline_box
from tests.goldens import tensor_golden


@pytest.mark.parametrize("kind", ["bitmask", "polygon"])
def test_what_of_an_object_lies_in_a_box_is_drawn_as_published(kind):
    given, config = tensor_golden("vitdet_pieces")
    if kind == "bitmask":
        outlines = [*given["in/bitmasks"].numpy().astype(bool)]
    else:
        outlines = [tuple(np.array(each).reshape(-1, 2) for each in polygons) for polygons in config["polygons"]]

    found = ObjectMasks(outlines=outlines).targets(np.arange(3), given["in/bitmask_boxes"].numpy(), 28)

    assert np.array_equal(found.numpy(), given[f"out/{kind}_targets_28"].numpy().astype(bool))
    assert np.array_equal([outline_box(each) for each in outlines], given[f"out/{kind}_boxes"].numpy())


def test_targets_are_of_the_objects_that_boxes_are_of():
    left, right = np.zeros((2, 8, 8), bool)
    left[:, :4] = right[:, 4:] = True
    boxes = np.array([[0, 0, 8, 8]] * 3, np.float32)

    found = ObjectMasks(outlines=[left, right]).targets(np.array([1, 0, 1]), boxes, 4).numpy()

    assert np.array_equal(found[:, 0], [[False, False, True, True], [True, True, False, False], [False, False, True, True]])


@pytest.mark.parametrize("nothing", [(), np.zeros((4, 4), bool)])
def test_what_nothing_is_left_of_is_empty(nothing):
    assert is_empty(nothing)
    assert outline_box(nothing).tolist() == [0, 0, 0, 0]
    assert not ObjectMasks(outlines=[nothing]).targets(np.zeros(1, int), np.array([[0, 0, 4.0, 4.0]]), 4).any()
