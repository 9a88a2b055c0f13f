"""Warped pairs: points follow pixels, everything follows from the seed, and what makes no pair is left out by name."""

import importlib.util
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import evaluate
from pipelines.config import ConfigError
from pipelines.evaluation.correspondence import CorrespondenceConfig
from storage.datasets.files import DatasetError
from storage.datasets.images import ImageFile
from storage.datasets.warped import MARGIN, WarpedImage, load_warped
from storage.paths import Folder

KINDS = ("homography", "thin-plate")


def textured(path: Path, size: tuple[int, int], seed: int = 0, exif: int = 1) -> None:
    """A photograph with corners: rectangles of random grey. `size`: (width, height) of the stored pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    said = Image.Exif()
    said[0x0112] = exif
    Image.fromarray(cells).resize(size, Image.Resampling.NEAREST).save(path, exif=said)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for number in range(5):
        textured(root / f"below/{number}.png", (320, 240), number)
    return root


def dots(size: tuple[int, int], middles: np.ndarray, radius: float) -> Image.Image:
    """White spots on black, whose middles are numbers of pixels."""
    y, x = np.mgrid[: size[1], : size[0]]
    spots = [np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * radius**2)) for cx, cy in middles]
    grey = np.round(255 * np.clip(sum(spots), 0, 1)).astype(np.uint8)
    return Image.fromarray(np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize(
    ("kind", "size", "exif"),
    [("homography", (320, 240), 1), ("thin-plate", (320, 240), 1), ("thin-plate", (700, 560), 6), ("homography", (300, 300), 3)],
)
def test_a_drawn_dot_lands_where_the_point_says(tmp_path, kind, size, exif):
    """On upright photographs, on one that is larger than its target, and on ones that EXIF turns."""
    textured(tmp_path / "photo.png", size, exif=exif)
    (pair,) = load_warped(Folder(str(tmp_path)), kind=kind)
    upright = (size[1], size[0]) if exif == 6 else size
    assert (pair.source.width, pair.source.height) == upright
    assert len(pair.source_xy) == len(pair.target_xy) >= 6
    # The same photograph, but for dots in the places of its points.
    (tmp_path / "dots").mkdir()
    dots(upright, np.array(pair.source_xy), radius=3 * upright[0] / pair.target.width).save(tmp_path / "dots/photo.png")
    drawn = replace(pair.target, photo=ImageFile.at(Folder(str(tmp_path / "dots")), "photo.png"))

    shown = np.asarray(Image.open(io.BytesIO(drawn.data())).convert("L"), float)

    assert shown.shape == (pair.target.height, pair.target.width)
    apart = np.array(pair.target_xy)[:, None] - np.array(pair.target_xy)[None]
    alone = (np.linalg.norm(apart, axis=2) + 1e9 * np.eye(len(apart))).min(axis=1) > 40
    assert alone.sum() > 3
    for x, y in np.array(pair.target_xy)[alone]:
        left, top = round(x) - 12, round(y) - 12
        around = shown[top : top + 25, left : left + 25] ** 2
        rows, columns = np.mgrid[top : top + 25, left : left + 25]
        middle = (columns * around).sum() / around.sum(), (rows * around).sum() / around.sum()
        assert middle == pytest.approx((x, y), abs=0.5)


def test_points_are_those_of_another_program(photos, shared_data):
    """What ../shared/tools/warped_pairs.py makes of the same four corners, which it solves and inverts by itself."""
    path = shared_data.parent / "tools/warped_pairs.py"
    if not path.exists():
        pytest.skip("../shared/tools/warped_pairs.py is not here")
    spec = importlib.util.spec_from_file_location("other_pairs", path)
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    for pair in load_warped(Folder(str(photos))):
        width, height = pair.target.width, pair.target.height
        corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], float)
        into_source = other.homography(corners, np.array(pair.target.warp.view))

        expected = other.apply(np.linalg.inv(into_source), np.array(pair.source_xy) + 0.5) - 0.5

        np.testing.assert_allclose(np.array(pair.target_xy), expected, atol=2e-3)
        found = other.corners(Image.open(io.BytesIO(pair.source.data())).convert("RGB"))
        nearest = np.linalg.norm(np.array(pair.source_xy)[:, None] - found[None], axis=2).min(axis=1)
        assert nearest.max() <= 2  # where it finds corners, too


def test_pairs_follow_from_seed_and_photograph_alone(photos, tmp_path):
    folder, tars = Folder(str(photos)), tmp_path / "tars"
    tars.mkdir()
    for at, numbers in enumerate([(3, 0), (4, 1, 2)]):
        with tarfile.open(tars / f"{at}.tar", "w") as tar:
            for number in numbers:
                tar.add(photos / f"below/{number}.png", f"below/{number}.png")

    pairs = load_warped(folder, seed=7)

    said = [(each.name, each.source_xy, each.target_xy) for each in pairs]
    assert [(each.name, each.source_xy, each.target_xy) for each in load_warped(folder, seed=7)] == said
    assert [(each.name, each.source_xy, each.target_xy) for each in load_warped(Folder(str(tars)), seed=7)] == said
    few = load_warped(folder, count=2, seed=7)
    assert ([each.name for each in few], few.of) == ([name for name, _, _ in said[:2]], 5)
    others = {each.name: each.target_xy for each in load_warped(folder, seed=8)}
    assert all(others[name] != target for name, _, target in said)
    assert pairs[0].target.data() == load_warped(folder, seed=7)[0].target.data()
    bent = {each.name: each.target_xy for each in load_warped(folder, seed=7, kind="thin-plate")}
    assert all(bent[name] != target for name, _, target in said)


@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_inside_and_nothing_is_there_twice(photos, kind):
    for pair in load_warped(Folder(str(photos)), kind=kind):
        target = pair.target
        assert isinstance(target, WarpedImage)
        x, y = np.array(pair.target_xy).T
        edge = MARGIN * 240 / 288 - 0.5
        assert x.min() >= edge
        assert x.max() <= target.width - 1 - edge
        assert y.min() >= edge
        assert y.max() <= target.height - 1 - edge
        places = np.random.default_rng(0).uniform(0, 1, (200, 2)) * (target.width, target.height)
        np.testing.assert_allclose(target.warp.found(target.warp.shown(places)), places, atol=1e-6)


def test_what_makes_no_pair_is_left_out_by_reason(tmp_path):
    textured(tmp_path / "good.png", (320, 240))
    Image.new("RGB", (320, 240), "grey").save(tmp_path / "flat.png")
    Image.fromarray(np.zeros((240, 320), np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGB", (20, 240)).save(tmp_path / "narrow.png")
    (tmp_path / "damaged.png").write_bytes(b"no image")

    found = load_warped(Folder(str(tmp_path)))

    assert [pair.name for pair in found] == ["good:warped"]
    assert sorted((each.count, *each.examples[0].rsplit("/", 1)[1:]) for each in found.left_out.values()) == [
        (1, "damaged.png"), (1, "deep.png"), (1, "flat.png"), (1, "narrow.png")
    ]  # fmt: skip
    (tmp_path / "good.png").unlink()
    with pytest.raises(DatasetError, match="of 4 photographs that were drawn, none makes a pair: .*fewer than 6 corners"):
        load_warped(Folder(str(tmp_path)))


# --- the evaluation ---------------------------------------------------------------------------------------------------

MODEL = [
    "--model", "test_vit.r160_in1k", "--weights", "random", "--precision", "fp32", "--executor", "inline", "--device", "cpu",
    "--sizes", "64",
]  # fmt: skip


def test_they_are_judged_as_other_pairs_are(photos, tmp_path, capsys):
    words = ["correspondence", "warped", "--data", str(photos), "--warps", "4", *MODEL, "--out", str(tmp_path / "out")]

    assert evaluate.run(words) == 0

    text = capsys.readouterr().out
    assert "drawn 4 of 5 photographs (--warps 4)" in text
    assert "95 % intervals: 2,000 draws from the 4 pairs" in text
    results = json.loads((tmp_path / "out/results.json").read_text())
    (table,) = results["tables"]
    assert table["columns"] == ["PCK@0.1", "PCK@0.05", "PCK@0.02", "PCK@0.01", "pairs"]
    assert [line["features"] for line in table["lines"]] == ["low-res", "bilinear x2"]
    assert table["lines"][0]["estimates"][0]["against"] == "bilinear x2"
    assert results["items"]["scored"]["pairs"] == 4
    assert (tmp_path / "out/pictures/matches.png").exists()
    before = (tmp_path / "out/results.md").read_bytes()
    assert evaluate.run(words) == 0
    assert (tmp_path / "out/results.md").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--split", "val"], "--split val would change nothing"),
        (["--dataset", "spair", "--warp", "thin-plate"], "--warp thin-plate would change nothing"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_end_with_2(photos, tmp_path, capsys, words, said):
    start = ["correspondence", "warped", "--data", str(photos), "--out", str(tmp_path / "out"), *MODEL]

    assert evaluate.run([*start, *words]) == 2

    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stores": ("a.zarr",)}, "no store has the warps, which are made as they are read; give a --model"),
        ({"warps": 0}, "--warps 0: must be at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        CorrespondenceConfig.of(dataset="warped", **changes)
