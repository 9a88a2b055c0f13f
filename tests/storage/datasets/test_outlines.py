"""Objects as they were annotated, for detectors."""

import numpy as np
import pycocotools.mask as coco_mask
import pytest

from storage.datasets.files import DatasetError
from storage.datasets.instances import InstanceArrays, Instances, has_area
from storage.orientation import Orientation
from storage.segmentations import decode_mask

POLYGON = [2.0, 3.0, 8.0, 3.0, 8.0, 7.0, 2.0, 7.0]


def note(number: int, **more: object) -> dict[str, object]:
    plain = {"id": number, "image_id": 1, "category_id": 7, "bbox": [2, 3, 6, 4], "area": 24, "segmentation": [POLYGON]}
    return {**plain, **more}


def runs(height: int, width: int) -> dict[str, object]:
    mask = np.zeros((height, width), bool)
    mask[3:7, 2:8] = True
    flat = mask.T.ravel().astype(int)
    changes = np.flatnonzero(np.diff(flat)) + 1
    return {"size": [height, width], "counts": np.diff([0, *changes, flat.size]).tolist()}


def packed(*notes: dict[str, object]) -> Instances:
    return Instances.pack(notes, "notes.json: a.jpg", 12, 10)


def test_polygons_and_runs_are_given_as_they_are_and_crowds_are_not():
    found = packed(
        note(1), note(2, iscrowd=1, segmentation=runs(10, 12)), note(3, segmentation=runs(10, 12), category_id=9)
    ).outlined()

    assert found.categories.tolist() == [7, 9]
    (polygon,), mask = found.outlines
    assert polygon.ravel().tolist() == POLYGON
    assert mask.shape == (10, 12)
    assert mask[3:7, 2:8].all()
    assert mask.sum() == 24


def test_polygons_of_two_corners_are_passed_over():
    found = packed(note(1, segmentation=[[2, 3, 8, 7]]), note(2, segmentation=[[1, 1, 2, 2], POLYGON])).outlined()

    assert [len(each) for each in found.outlines] == [1]


@pytest.mark.parametrize(
    ("segmentation", "covers"),
    [
        ([[2, 3, 8, 7]], False),
        ([[2, 3], [4, 4, 5, 5]], False),
        ([[2, 3, 8, 7], POLYGON], True),
        (runs(10, 12), True),
        ({"size": [10, 12], "counts": [120]}, False),
        ({"size": [10, 12], "counts": [100, 0, 20]}, False),
        (coco_mask.encode(np.zeros((10, 12), np.uint8, order="F")), False),
        (coco_mask.encode(np.ones((10, 12), np.uint8, order="F")), True),
        (coco_mask.encode(np.zeros((2**14, 2**14), np.uint8, order="F")), False),
    ],
)
def test_whether_an_object_has_an_area_is_told_without_drawing_it(segmentation, covers):
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], bytes):
        segmentation = {**segmentation, "counts": segmentation["counts"].decode()}

    assert has_area({"segmentation": segmentation}) == covers
    size = segmentation["size"] if isinstance(segmentation, dict) else (10, 12)
    assert decode_mask(segmentation, *size).any() == covers


@pytest.mark.parametrize("segmentation", [None, [], [[]], [7], [[1, 2, 3]], 5, {"counts": []}, {"counts": "\u00e9"}, {}])
def test_what_is_malformed_is_left_to_whoever_reads_it(segmentation):
    assert has_area({"segmentation": segmentation})


def test_outlines_turn_as_masks_do():
    instances = packed(note(1), note(2, segmentation=runs(10, 12)))
    for exif in range(1, 9):
        by = Orientation(width=12, height=10, exif=exif)
        polygons, mask = instances.outlined().turned(by).outlines
        arrays: InstanceArrays = instances.read().turned(by)

        assert np.array_equal(mask, arrays.masks[1])
        corners = polygons[0]
        assert np.array_equal([*corners.min(axis=0), *corners.max(axis=0)], arrays.boxes[0])


@pytest.mark.parametrize(
    ("segmentation", "said"),
    [
        ([], "there are no polygons"),
        ([[1, 2, 3]], "a polygon is a list x, y, x, y"),
        ({"size": [4, 4], "counts": [16]}, "its size is \\[4, 4\\]"),
    ],
)
def test_what_is_no_outline_is_an_error(segmentation, said):
    with pytest.raises(DatasetError, match=f"notes.json: a.jpg, annotation 5: its segmentation is malformed: .*{said}"):
        packed(note(5, segmentation=segmentation)).outlined()


def test_outlines_and_boxes_that_dont_fit_are_an_error():
    with pytest.raises(DatasetError, match="which its box \\[0.0, 0.0, 1.0, 1.0\\] doesn't fit"):
        packed(note(5, bbox=[0, 0, 1, 1], segmentation=[[0, 0, 11, 0, 11, 9]])).outlined()
