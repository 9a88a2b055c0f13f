"""Settings of detectors as JSON and as published; images as they take them."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from operators.image import fitted_size
from operators.vitdet.input import padded, resize
from operators.vitdet.settings import DetectorError, DetectorSettings
from tests.goldens import golden_file

SMALL = DetectorSettings(square_pad=32, pixel_mean=(1.0, 2.0, 3.0), pixel_std=(2.0, 4.0, 8.0))


@pytest.mark.parametrize("settings", [DetectorSettings.published("H", cascade=True), SMALL], ids=["published", "small"])
def test_settings_come_back_from_json(settings):
    assert DetectorSettings.parse(json.loads(json.dumps(settings.to_json()))) == settings


def test_what_is_not_said_is_as_published():
    assert DetectorSettings.parse({"topk": None, "cascade": True}) == DetectorSettings.published(cascade=True)


def test_published_blocks_that_attend_to_the_whole_map():
    blocks = {size: DetectorSettings.published(size).global_blocks for size in ("B", "L", "H")}
    assert blocks == {"B": (2, 5, 8, 11), "L": (5, 11, 17, 23), "H": (7, 15, 23, 31)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dim": 770}, "dim must be a multiple of 4 and of the 12 heads, got 770"),
        ({"depth": 2.5}, "depth must be a whole number of at least 1, got 2.5"),
        ({"classes": True}, "classes must be a whole number of at least 1, got True"),
        ({"cascade": 1}, "cascade must be true or false, got 1"),
        ({"square_pad": 1000}, "square_pad must be a multiple of 16 pixels, got 1000"),
        ({"square_pad": 16}, "square_pad must be at least 32 pixels, a cell of p5; got 16"),
        ({"global_blocks": [2, 12]}, "global_blocks must be numbers from 0 to 11, got (2, 12)"),
        ({"global_blocks": [2.0]}, "global_blocks must be whole numbers, got (2.0,)"),
        ({"nms": 1.5}, "nms must be a number from 0 to 1, got 1.5"),
        ({"canonical_size": 0}, "canonical_size must be a number above 0, got 0"),
        ({"pre_topk": [10]}, "pre_topk must be two whole numbers of at least 1, got (10,)"),
        ({"anchor_sizes": [[8], [16]]}, "anchor_sizes must be 5 lists of equally many sizes, got ((8,), (16,))"),
        ({"anchor_sizes": [[8], [16], [32], [64], [128, 256]]}, "anchor_sizes must be 5 lists of equally many sizes"),
        ({"anchor_sizes": [8, 16, 32, 64, 128]}, "anchor_sizes must be lists of numbers above 0, got (8, 16"),
        ({"pixel_std": [1, 2, 0]}, "pixel_std must be three numbers above 0, got (1, 2, 0)"),
        ({"pixel_mean": 3}, "pixel_mean must be three numbers, got 3"),
        ({"patch": 16}, "no such detector settings: patch; there are: square_pad"),
    ],
)
def test_impossible_settings_are_refused(given, message):
    with pytest.raises(DetectorError, match=re.escape(message)):
        DetectorSettings.parse(given)


def test_sizes_of_resized_images_are_the_official_ones():
    rows = json.loads(golden_file("vitdet_training_tables.json").read_text())["test_resize_hw"]
    assert len(rows) > 5
    assert [list(fitted_size(tuple(size), (1024, 1024))) for size, _ in rows] == [expected for _, expected in rows]


def test_a_line_of_pixels_keeps_one():
    assert fitted_size((1, 5000), (1024, 1024)) == (1, 1024)


def test_images_are_normalised_and_zeros_fill_the_square():
    image = resize(Image.fromarray(np.full((10, 20, 3), (3, 6, 11), np.uint8)), 32)
    batch, sizes = padded([np.asarray(image), torch.ones(32, 3, 3, dtype=torch.uint8)], SMALL)
    assert sizes == [(16, 32), (32, 3)]
    assert batch.shape == (2, 3, 32, 32)
    assert (batch[0, :, :16] == 1).all()
    assert not batch[0, :, 16:].any()
    assert not batch[1, :, :, 3:].any()


def test_an_image_beyond_the_square_is_refused():
    with pytest.raises(DetectorError, match="an image of 33 x 8 px doesn't fit into 32 x 32; resize it first"):
        padded([np.zeros((33, 8, 3), np.uint8)], SMALL)
