"""Colours, masks, similarity maps and panels, on maps whose right answer is plain."""

import json
from dataclasses import replace

import numpy as np
import pytest

from operators.visual import BACKGROUND, DrawnObject, Foreground, Panel, RgbProjection, Tile, cosine_map, draw_objects, heat
from storage.spread import spread


def maps(seed: int = 0, count: int = 4) -> list[np.ndarray]:
    """Maps of 12 x 12 cells, 8 channels: noise, and a 4 x 4 object in the middle that is far away in channel 0."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        cells = rng.normal(size=(12, 12, 8)) * [0.1, 1, 0.5, 0.2, 0.1, 0.1, 0.1, 0.1]
        cells[4:8, 4:8, 0] += 10
        out.append(cells.astype(np.float16))
    return out


def test_first_component_is_red_second_green_third_blue():
    projection = RgbProjection.fit(maps())

    assert [int(np.abs(c).argmax()) for c in projection.components] == [0, 1, 2]
    colours = projection(maps()[0])
    assert colours[5, 5, 0] > 250
    assert colours[0, 0, 0] < 30


def test_refit_on_the_same_maps_gives_the_same_colours():
    np.testing.assert_array_equal(RgbProjection.fit(maps())(maps(1)[0]), RgbProjection.fit(maps())(maps(1)[0]))


def test_colours_of_a_map_do_not_depend_on_its_company():
    projection, several = RgbProjection.fit(maps()), np.stack(maps(2))

    np.testing.assert_array_equal(projection(several)[3], projection(several[3]))


@pytest.mark.parametrize("foreground", [False, True])
def test_projection_survives_json(foreground):
    projection = RgbProjection.fit(maps(), foreground=foreground)

    again = RgbProjection.from_json(json.loads(json.dumps(projection.to_json())))

    np.testing.assert_array_equal(again(maps(3)[0]), projection(maps(3)[0]))


def test_foreground_is_the_side_that_touches_the_border_less():
    mask = Foreground.fit(maps())(maps(1)[0])

    expected = np.zeros((12, 12), bool)
    expected[4:8, 4:8] = True
    np.testing.assert_array_equal(mask, expected)


def test_foreground_does_not_depend_on_the_sign_of_the_component():
    np.testing.assert_array_equal(Foreground.fit([-m for m in maps()])(-maps(1)[0]), Foreground.fit(maps())(maps(1)[0]))


def test_background_and_missing_cells_are_grey():
    features = maps(1)[0]
    features[5, 5] = np.nan

    colours = RgbProjection.fit(maps(), foreground=True)(features)

    assert tuple(colours[0, 0]) == BACKGROUND
    assert tuple(colours[5, 5]) == BACKGROUND
    assert tuple(colours[6, 6]) != BACKGROUND


def test_cosine_map_has_literal_values():
    features = np.array([[[3, 4], [-3, -4]], [[4, -3], [0, 0]]], np.float16)

    np.testing.assert_allclose(cosine_map(np.array([6, 8]), features), [[1, -1], [0, 0]], atol=1e-6)


def test_heat_runs_from_dark_blue_to_yellow():
    colours = heat(np.array([[-1.0, 0.0, 1.0, 2.0]]), 0, 1)

    np.testing.assert_array_equal(colours[0], [[68, 1, 84], [68, 1, 84], [253, 231, 37], [253, 231, 37]])


def test_map_tiles_stay_squares():
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, 1] = 255

    image = np.asarray(Tile(pixels=pixels).image(40, 20))

    assert (image[:10, 20:] == 255).all()
    assert (image[10:] == 0).all()


def test_mark_rings_the_point():
    image = np.asarray(Tile(pixels=np.zeros((8, 8, 3), np.uint8), mark=(0.25, 0.75), is_photo=True).image(100, 100))

    lit = np.argwhere(image.any(axis=-1))
    np.testing.assert_allclose(lit.mean(axis=0), [75, 25], atol=1)


def test_panel_places_tiles_under_their_titles():
    red, blue = (np.full((2, 2, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    panel = Panel(
        tiles=[[Tile(pixels=red), Tile(pixels=blue)], [Tile(pixels=None), Tile(pixels=red)]],
        columns=["one", "two\nlines"],
        rows=["a", "a longer name"],
        title="title",
        tile_size=(50, 40),
    )

    image = np.asarray(panel.draw()).astype(int)

    def pixels(colour: tuple[int, int, int]) -> int:
        return int((image == colour).all(axis=-1).sum())

    assert pixels((255, 0, 0)) == 2 * 50 * 40
    assert pixels((0, 0, 255)) == 50 * 40
    assert pixels(BACKGROUND) >= 50 * 40  # the titles' smoothed letters have some of this grey, too


def test_numbers_are_spread_evenly_from_the_first_to_the_last():
    assert spread(5, 9) == spread(5, 5) == [0, 1, 2, 3, 4]
    assert spread(9, 3) == [0, 4, 8]
    assert spread(100, 1) == spread(1, 6) == [0]
    assert spread(0, 6) == spread(6, 0) == []
    gaps = np.diff(spread(1000, 64))
    assert (len(gaps), spread(1000, 64)[-1], gaps.max() - gaps.min()) == (63, 999, 1)


def test_a_panels_legend_and_colour_bar_stand_below_its_tiles():
    tile = Tile(pixels=np.full((4, 4, 3), 128, np.uint8))
    plain = Panel(tiles=[[tile]], columns=["a"], rows=["r"], title="t", tile_size=(60, 60))
    colours = [(10 * n, 0, 200) for n in range(6)]
    legend = [(f"name {n}", colour) for n, colour in enumerate(colours)]
    drawn = np.asarray(replace(plain, legend=legend, scale=("low", "high")).draw())
    above = plain.draw()

    np.testing.assert_array_equal(drawn[: above.height - 2, : above.width], np.asarray(above)[:-2])
    assert all((drawn[above.height :] == colour).all(axis=-1).sum() >= 100 for colour in colours)
    for end in (0, 1):
        assert (drawn[above.height :] == heat(np.array([end]), 0, 1)).all(axis=-1).any()


# --- objects ----------------------------------------------------------------------------------------------------------


def test_objects_have_a_frame_a_tint_and_a_name_inside_the_picture():
    photo = np.full((80, 120, 3), 100, np.uint8)
    mask = np.zeros((80, 120), bool)
    mask[40:60, 40:80] = True
    one = DrawnObject(box=(40, 40, 80, 60), mask=mask, text="cat 0.90", kind=1)
    cut_off = DrawnObject(box=(100, -20, 140, 10), mask=None, text="a name wider than its box", kind=2)

    drawn = draw_objects(photo, [one, cut_off])

    assert (drawn[40, 50] == one.colour).all()
    assert (drawn[59, 50] == one.colour).all()
    assert (drawn[50, 60] == np.round(0.55 * 100 + 0.45 * np.array(one.colour))).all()
    assert (drawn[70, 20] == 100).all()
    grounds = [(drawn == np.array(each.colour, np.uint8)).all(axis=2) for each in (one, cut_off)]
    assert grounds[0][26:40, 41:60].mean() > 0.3  # above its box
    assert grounds[1][:12, :100].mean() > 0.1  # as far to the left as its name needs
    assert (photo == 100).all()


def test_names_of_objects_in_one_place_do_not_cover_each_other():
    photo = np.zeros((100, 100, 3), np.uint8)
    objects = [DrawnObject(box=(20, 40, 60, 80), mask=None, text=f"dog {n}", kind=n) for n in range(3)]

    drawn = draw_objects(photo, objects)

    for each in objects:
        assert (drawn == np.array(each.colour, np.uint8)).all(axis=2).sum() > 250


def test_boxes_without_extent_and_pictures_without_objects_are_drawn():
    photo = np.zeros((20, 20, 3), np.uint8)

    assert (draw_objects(photo, []) == 0).all()
    assert draw_objects(photo, [DrawnObject(box=(5, 5, 5, 5), mask=None, text="")]).any()
