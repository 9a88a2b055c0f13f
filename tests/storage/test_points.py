"""Points of a photograph and its features: no half pixel and no half cell off, whatever the placement and the level."""

import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr
from PIL import Image

from operators.backbone import PatchFeatures, TimmBackbone
from pipelines.executors import InlineExecutor
from pipelines.extraction.run import extract
from storage.ledger import SampleRecord
from storage.paths import Folder
from storage.samples import write_index
from storage.spec import Layout, Level
from storage.store import FeatureStore
from tests.conftest import jpeg, write_tar
from tests.storage.test_reader import SOURCE, index_table, key, spec_of

PATCH = 16
SIZES = [(96, 72), (45, 120), (13, 9), (1000, 300), (64, 64)]
"""(width, height) of the photographs."""


def placed(mode: str, size: tuple[int, int], input_size: tuple[int, int], crop_pct: float = 1.0) -> np.ndarray:
    """[[x_scale, x_offset], [y_scale, y_offset]] of an image of `size` (width, height) in `input_size` (height, width).

    Written down from the rules, for an oracle: torchvision's Resize and CenterCrop, a plain resize, or a letterbox.
    """
    (w, h), (rows, columns) = size, input_size
    if mode == "squash":
        resized, corner = (columns, rows), (0, 0)
    elif mode == "pad":
        factor = min(columns / w, rows / h)
        resized = max(1, round(w * factor)), max(1, round(h * factor))
        corner = (columns - resized[0]) // 2, (rows - resized[1]) // 2
    else:
        cover = math.floor(columns / crop_pct), math.floor(rows / crop_pct)
        wide = cover[1] * w / h >= cover[0]
        resized = (cover[1] * w // h, cover[1]) if wide else (cover[0], cover[0] * h // w)
        corner = -round((resized[0] - columns) / 2), -round((resized[1] - rows) / 2)
    return np.array([[resized[0] / w, corner[0]], [resized[1] / h, corner[1]]])


def interpolated(features: np.ndarray, input_xy: np.ndarray, base: tuple[int, int], stride: int) -> tuple[np.ndarray, np.ndarray]:
    """torch's grid_sample of a level [rows, columns, C] at points of the input, whatever the level's own grid: all of them
    cover the same pixels, half a stride beyond the first and last centres of the backbone's `base` grid."""
    edge = PATCH / 2 - stride / 2
    grid = 2 * (input_xy - edge) / (np.array(base[::-1]) * stride) - 1
    maps = torch.from_numpy(features.astype(np.float64)).permute(2, 0, 1)[None]
    values = F.grid_sample(maps, torch.from_numpy(grid)[None, None], mode="bilinear", padding_mode="border", align_corners=False)
    return values[0, :, 0].T.numpy()


CASES = {
    "crop": {"geometry": "crop"},
    "crop at 0.875": {"geometry": "crop", "crop_pct": 0.875},
    "crop to portrait": {"geometry": "crop", "size": "96x64"},
    "squash": {"geometry": "squash"},
    "squash to portrait": {"geometry": "squash", "size": "96x64"},
    "pad": {"geometry": "pad"},
    "pad to landscape": {"geometry": "pad", "size": "64x96"},
    "stride 8": {"geometry": "crop", "stride": 8, "levels": ("x1@float32", "x2", "14x5=bicubic")},
    "stride 8 padded": {"geometry": "pad", "stride": 8, "size": "64x96", "levels": ("x1", "x2@int8")},
}
LEVELS = ("x1@float32", "x2", "x0.5@int8", "5x3=bicubic")


@pytest.mark.parametrize("case", CASES)
def test_sample_is_torchs_interpolation_at_the_place_of_the_point(tmp_path, tiny, case):
    settings = {"levels": LEVELS, "crop_pct": 1.0, "size": "64", "stride": PATCH, **CASES[case]}
    members = [(f"{w}-{h}.jpg", jpeg(w, w, h)) for w, h in SIZES]
    config = tiny(str(write_tar(tmp_path / "in/a.tar", members)), **settings)
    extract(config, InlineExecutor())
    store = FeatureStore.open(config.out)
    input_size, stride = store.spec.input_size, settings["stride"]
    base = tuple((side - PATCH) // stride + 1 for side in input_size)
    rng = np.random.default_rng(len(case))
    seen = 0

    for w, h in SIZES:
        (x_scale, x_offset), (y_scale, y_offset) = placed(settings["geometry"], (w, h), input_size, settings["crop_pct"])
        points = rng.uniform(0, (w, h), (200, 2))
        at = points * [x_scale, y_scale] + [x_offset, y_offset]
        cut = ((at < 0) | (at > input_size[::-1])).any(axis=1)
        for level in store.levels:
            expected = interpolated(store.read(f"{w}-{h}", level), at, base, stride)
            expected[cut] = np.nan

            found = store.sample(f"{w}-{h}", points, level)

            assert (found.dtype, found.shape) == (np.float32, (200, 64))
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
            seen += int((~cut).sum())
    assert seen > 1000


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FeatureStore:
    return by_hand(tmp_path_factory.mktemp("points") / "a.zarr", "crop", (64, 64))


def maps_of(input_size: tuple[int, int]) -> tuple[Level, ...]:
    """The grids of a patch of 16 pixels without overlap, at four resolutions and as an odd one."""
    rows, columns = input_size
    grids = [(rows // 16, columns // 16), (rows // 8, columns // 8), (rows // 32, columns // 32), (rows, columns), (5, 3)]
    return tuple(
        Level(
            name=name,
            method="backbone",
            grid=grid,
            channels=2,
            dtype="float32",
            start=(rows / grid[0] / 2, columns / grid[1] / 2),
            step=(rows / grid[0], columns / grid[1]),
        )
        for name, grid in zip(("x1", "x2", "x0.5", "x16", "5x3"), grids, strict=True)
    )


def by_hand(path: Path, mode: str, input_size: tuple[int, int], sizes: Sequence[tuple[int, int]] = SIZES) -> FeatureStore:
    """A store in which the feature of a cell is where its centre lies in the original: (x, y)."""
    n, levels = len(sizes), maps_of(input_size)
    index = write_index(Folder(str(path)), index_table(n), [SOURCE])
    layout = Layout(n_rows=n, block_rows=8, index=index.digest)
    store = FeatureStore.create(str(path), spec_of(levels, geometry=mode, input_size=input_size), layout, provenance={})
    writer, records = store.writer(layout.task(0)), []
    for row, (width, height) in enumerate(sizes):
        x, y = placed(mode, (width, height), input_size)
        for level in levels:
            rows, columns = level.grid
            xs = ((np.arange(columns) + 0.5) * input_size[1] / columns - x[1]) / x[0]
            ys = ((np.arange(rows) + 0.5) * input_size[0] / rows - y[1]) / y[0]
            writer.put(level, row, np.stack(np.meshgrid(xs, ys), axis=-1).astype(np.float32))
        place = {"x_scale": x[0], "x_offset": x[1], "y_scale": y[0], "y_offset": y[1]}
        common = {"row": row, "key": key(row), "source": SOURCE.url, "member": "jpg", "offset": 0, "size": 9}
        records.append(SampleRecord(**common, width=width, height=height, **place))
    writer.commit(records, writer.write())
    store.finalize()
    return FeatureStore.open(str(path))


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
@pytest.mark.parametrize("input_size", [(64, 64), (96, 64), (64, 96)])
def test_features_that_are_positions_are_sampled_at_their_positions(tmp_path, mode, input_size):
    """Between the outermost centres, where linear functions are interpolated without error."""
    store = by_hand(tmp_path / "a.zarr", mode, input_size)
    rng = np.random.default_rng(3)

    for row, (width, height) in enumerate(SIZES):
        (x_scale, x_offset), (y_scale, y_offset) = placed(mode, (width, height), input_size)
        for name, level in store.levels.items():
            margin = np.array(level.step[::-1]) / 2
            at = rng.uniform(margin, np.array(input_size[::-1]) - margin, (200, 2))
            points = (at - [x_offset, y_offset]) / [x_scale, y_scale]
            points = points[((points >= 0) & (points <= [width, height])).all(axis=1)]

            found = store.sample(row, points, name)

            np.testing.assert_allclose(found, points, rtol=1e-5, atol=2e-4)
            assert len(points) > 20


def ramp(width: int, height: int) -> bytes:
    """A PNG whose red grows from 40 to 210 with x and green with y, exact at pixel centres but for rounding."""
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    red, green = np.meshgrid(40 + 170 * x, 40 + 170 * y)
    out = io.BytesIO()
    Image.fromarray(np.stack([red, green, np.full_like(red, 90)], -1).round().astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def mean_colour(self: TimmBackbone, images_BCHW: torch.Tensor, layers: Sequence[int]) -> PatchFeatures:
    """Stands in for the network: a cell is the mean colour of its patch, in the first three of its channels."""
    colours = F.avg_pool2d(images_BCHW, PATCH, self.stride)
    maps = F.pad(colours, (0, 0, 0, 0, 0, self.channels - 3))
    prefix = torch.zeros(len(maps), 1, self.channels)
    return PatchFeatures(layers=dict.fromkeys(layers, maps), prefix=dict.fromkeys(layers, prefix), stride=self.stride)


@pytest.mark.parametrize("stride", [16, 8])
@pytest.mark.parametrize(
    ("mode", "sizes"),
    [
        ("crop", [(60, 40), (40, 60), (331, 223), (1000, 300)]),
        ("squash", [(60, 40), (40, 60), (331, 223), (1000, 300), (31, 331)]),
        ("pad", [(60, 40), (40, 60), (331, 223), (192, 192)]),
    ],
)
def test_colour_ramp_comes_back_through_the_whole_extraction(tmp_path, tiny, monkeypatch, mode, sizes, stride):
    """Away from the image's edges, where neither the resize nor the patches see anything but the ramp.

    Half a pixel of the smallest photographs is 1.4 to 2.7 levels of 255, half a pixel of the input's 0.4, half a cell 3.5;
    the two roundings to 8 bits leave up to 0.4.
    """
    monkeypatch.setattr(TimmBackbone, "__call__", mean_colour)
    levels = ("x1@float32", "x2@float32", "x4@float32", *(("x0.5@float32",) if stride == 16 else ()))
    members = [(f"{w}-{h}.png", ramp(w, h)) for w, h in sizes]
    config = tiny(str(write_tar(tmp_path / "in/a.tar", members)), geometry=mode, size="192", stride=stride, levels=levels)
    extract(config, InlineExecutor())
    store = FeatureStore.open(config.out)
    mean, std = np.array(store.spec.mean), np.array(store.spec.std)

    for w, h in sizes:
        for name, level in store.levels.items():
            points = np.random.default_rng(w).uniform(0, (w, h), (1500, 2))
            scale, offset = placed(mode, (w, h), (192, 192)).T
            margin = 1.5 * max(level.step[0], 16) + 2 * max(1, *scale)
            first, last = np.maximum(offset, 0) + margin, np.minimum(offset + scale * (w, h), 192) - margin
            inside = ((points * scale + offset >= first) & (points * scale + offset <= last)).all(axis=1)
            points = points[inside]

            found = (store.sample(f"{w}-{h}", points, name)[:, :3] * std + mean) * 255

            assert len(points) >= 10
            error = found[:, :2] - (40 + 170 * points / (w, h))
            assert np.abs(error.mean(axis=0)).max() < 0.02
            assert np.abs(error).max() < 0.5
            np.testing.assert_allclose(found[:, 2], 90, atol=0.01)


# --- borders and refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["squash", "pad"])
def test_points_on_the_images_border_have_features(tmp_path, mode):
    store = by_hand(tmp_path / "a.zarr", mode, (64, 96))

    for row, (w, h) in enumerate(SIZES):
        for level in store.levels:
            found = store.sample(row, [(0, 0), (w, 0), (0, h), (w, h), (w / 2, h)], level)

            assert np.isfinite(found).all()


def test_points_that_the_crop_cut_away_are_nan_and_those_on_its_edge_are_not(store):
    """1000 x 300 to 213 x 64, of which columns 74 to 138 are kept: pixels 347.4 to 647.9 of the original."""
    x = [0, 347, 348, 500, 647, 648, 1000]

    found = store.sample(key(3), [(at, 150) for at in x], "x1")

    assert np.isnan(found).all(axis=1).tolist() == np.isnan(found).any(axis=1).tolist()
    assert np.isnan(found[:, 0]).tolist() == [True, True, False, False, False, True, True]
    assert np.isfinite(store.sample(key(3), [(74 * 1000 / 213, 0), (138 * 1000 / 213, 300)], "x1")).all()


@pytest.mark.parametrize("wrong", [(-0.01, 5), (96.01, 5), (5, -1e-3), (5, 72.001), (np.nan, 5), (5, np.inf), (-np.inf, 0)])
def test_point_outside_the_image_is_refused_with_the_images_size(store, wrong):
    with pytest.raises(ValueError, match=r"has 96 x 72 pixels, .*; points are \(x, y\)"):
        store.sample(key(0), [(1, 1), wrong], "x1")


def test_no_points_give_no_features_and_one_gives_one(store):
    assert store.sample(0, np.zeros((0, 2)), "x1").shape == (0, 2)
    assert store.sample(0, [], "x1").shape == (0, 2)
    assert store.sample(0, (3, 4), "x1").shape == (1, 2)


@pytest.mark.parametrize("wrong", [[[1, 2, 3, 4]], [[1, 2, 3], [4, 5, 6]], [1, 2, 3, 4]])
def test_points_that_are_no_pairs_are_refused(store, wrong):
    """[2, P] instead of [P, 2] must not be taken for other points."""
    with pytest.raises(ValueError, match=r"points"):
        store.sample(0, wrong, "x1")


def test_pooled_level_has_no_places(tmp_path, tiny, make_tars):
    config = tiny(make_tars(1, 2))
    extract(config, InlineExecutor())
    pooled = FeatureStore.open(config.out)

    for ask in (
        lambda: pooled.sample("00000", [(1, 1)], "pooled"),
        lambda: pooled.coords("pooled"),
        lambda: pooled.cells([(1, 1)], "pooled"),
    ):
        with pytest.raises(ValueError, match="level pooled is one vector per image: it has no cells; name a dense level"):
            ask()


# --- coords and cells -----------------------------------------------------------------------------------------------


def test_coords_of_a_squashed_image_are_the_literal_ones(tmp_path):
    store = by_hand(tmp_path / "a.zarr", "squash", (64, 64), [(128, 32)])

    found = store.coords("x1", key(0))

    assert found[:, :, 0].tolist() == [[16, 48, 80, 112]] * 4
    assert found[:, :, 1].T.tolist() == [[4, 12, 20, 28]] * 4
    assert store.coords("x0.5").tolist() == [[[16, 16], [48, 16]], [[16, 48], [48, 48]]]
    assert store.cells([(16, 4), (32, 8), (0, 0)], "x1", key(0)).tolist() == [[0, 0], [0.5, 0.5], [-0.5, -0.5]]


def test_coords_are_the_coordinate_arrays_of_the_zarr_store(store):
    group = zarr.open_group(store.folder.url, mode="r")

    for name in store.levels:
        x, y = np.meshgrid(group[name]["x"][:], group[name]["y"][:])
        np.testing.assert_array_equal(store.coords(name).astype(np.float32), np.stack([x, y], axis=-1))


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
def test_coords_and_cells_are_each_others_inverse(tmp_path, mode):
    store = by_hand(tmp_path / "a.zarr", mode, (96, 64))

    for name, level in store.levels.items():
        rows, columns = level.grid
        whole = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1)
        for image in (None, 0, 1, 2, 3, 4):
            cells = store.cells(store.coords(name, image), name, image)

            np.testing.assert_allclose(cells, whole, atol=1e-9)


def test_coords_of_an_image_are_where_its_features_say(store):
    for row in range(len(SIZES)):
        for level in store.levels:
            np.testing.assert_allclose(store.coords(level, row), store.read(row, level), rtol=1e-5, atol=1e-4)


def test_feature_at_a_cells_centre_is_the_cells(store):
    centres = store.coords("x1", key(4)).reshape(-1, 2)

    found = store.sample(key(4), centres, "x1")

    np.testing.assert_allclose(found, store.read(key(4), "x1").reshape(-1, 2), rtol=1e-6)


def test_pixels_say_how_the_image_was_placed(store):
    pixels = store.pixels(key(3))

    assert asdict(pixels) == {
        "width": 1000,
        "height": 300,
        "x_scale": 0.213,
        "x_offset": -74.0,
        "y_scale": 64 / 300,
        "y_offset": 0.0,
    }
    assert pixels.to_input(np.array([[1000, 300]])).tolist() == [[139, 64]]
