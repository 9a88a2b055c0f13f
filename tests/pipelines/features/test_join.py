"""Stores and data sets joined: by names and bytes, never by names alone."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.config import ConfigError
from pipelines.demo_datasets import scene
from pipelines.evaluation import cka, similarity
from pipelines.evaluation.cka import CkaConfig
from pipelines.evaluation.run import evaluate
from pipelines.evaluation.similarity import SimilarityConfig
from pipelines.features.join import FeaturesMissing, PlacedRow, Wanted, join
from pipelines.features.store_source import StoreRecipe
from storage.datasets.content import content_digests
from storage.datasets.images import ImageFile, load_images
from storage.store import FeatureStore
from tests.readout_runs import TINY, extract

INLINE = {"executor": "inline", "device": "cpu"}


def photo(path: Path, seed: int, size: tuple[int, int] = (80, 60)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene(*size, [(10 + seed, 12, 40 + seed, 42)], seed)).save(path)


def two_parts(root: Path) -> Path:
    """Images of the same names in two folders."""
    for part, first in (("train", 0), ("val", 10)):
        for i in range(4):
            photo(root / part / f"{i:05d}.png", first + i)
    return root


def joined(url: str, folder: Path):
    images = load_images(str(folder))
    wanted = [Wanted.of(image, digest) for image, digest in zip(images, content_digests(images), strict=True)]
    return images, join(FeatureStore.open(url), wanted)


@pytest.fixture
def without_digests(monkeypatch):
    """Makes stores be as the first versions wrote them."""

    def forget() -> None:
        read = PlacedRow.read.__func__
        monkeypatch.setattr(
            PlacedRow, "read", classmethod(lambda *args: [dataclasses.replace(row, digest=None) for row in read(*args)])
        )

    return forget


def test_images_of_one_name_in_two_folders_have_rows_of_their_own(tmp_path, tiny):
    data = two_parts(tmp_path / "d")
    store = extract(tiny, tmp_path / "both.zarr", data)

    images, found = joined(store, data)

    keys = FeatureStore.open(store).index.take(np.array([row.row for row in found.rows]), ["key"])["key"].to_pylist()
    assert keys == [image.name.removesuffix(".png") for image in images]
    assert len({row.row for row in found.rows}) == 8
    assert (found.counts.images, found.counts.by_digest, found.counts.chosen) == (8, 8, 0)
    with pytest.raises(FeaturesMissing, match="4 of 4 images are not in it"):  # whose rows' keys only end like theirs
        joined(store, data / "val")


def test_a_row_of_another_folder_under_the_same_name_is_refused(tmp_path, tiny, without_digests):
    data = two_parts(tmp_path / "d")
    store = extract(tiny, tmp_path / "train.zarr", data / "train")

    joined(store, data / "train")
    with pytest.raises(
        FeaturesMissing, match=r"4 of 4 images have another image's row under their names; the first: .*val/00000"
    ):
        joined(store, data / "val")
    with pytest.raises(FeaturesMissing, match="4 of 8 images have another image's row"):
        joined(store, data)
    without_digests()
    with pytest.raises(FeaturesMissing, match="4 of 8 images can't be told apart; the first: .*00000.png: both are row 0"):
        joined(store, data)


def test_where_several_rows_have_names_of_an_image_the_bytes_choose(tmp_path, tiny):
    data = two_parts(tmp_path / "d")
    for i in range(4):  # also at the top, where the key is the bare name
        photo(data / f"{i:05d}.png", 20 + i)
    store = extract(tiny, tmp_path / "all.zarr", data)
    lone = tmp_path / "elsewhere/val"
    for i in range(4):
        photo(lone / f"{i:05d}.png", 20 + i)  # the bytes of those at the top

    _, found = joined(store, tmp_path / "elsewhere")

    keys = FeatureStore.open(store).index.take(np.array([row.row for row in found.rows]), ["key"])["key"].to_pylist()
    assert keys == [f"{i:05d}" for i in range(4)]
    assert found.counts.chosen == 4


def test_rows_without_a_digest_are_of_the_same_size_at_least(tmp_path, tiny, without_digests):
    data = two_parts(tmp_path / "d")
    store = extract(tiny, tmp_path / "val.zarr", data / "val")
    without_digests()

    _, found = joined(store, data / "val")
    photo(data / "val/00002.png", 12, (60, 80))

    assert (found.counts.by_digest, found.counts.by_size) == (0, 4)
    assert any("found by name and size alone" in note for note in found.notes())
    with pytest.raises(
        FeaturesMissing, match="1 of 4 images have another image's row .*00002.png: row 2 was made of an image of 80 x"
    ):
        joined(store, data / "val")


def test_an_image_that_no_digest_tells_is_read_once_for_all_stores(tmp_path, tiny, without_digests, monkeypatch):
    data = two_parts(tmp_path / "d") / "val"
    urls = [extract(tiny, tmp_path / f"{side}.zarr", data, size=str(side), geometry="squash") for side in (48, 64)]
    stores = {store.spec.input_size: store for store in map(FeatureStore.open, urls)}
    without_digests()
    images = list(load_images(str(data)))
    contents = dict(zip([image.displayed for image in images], content_digests(images), strict=True))
    read: list[str] = []
    orientation = ImageFile.orientation
    monkeypatch.setattr(ImageFile, "orientation", lambda image: read.append(image.name) or orientation(image))

    recipe = StoreRecipe(stores=stores).joined(dict.fromkeys(stores, images), contents)

    assert [each.counts.by_size for each in recipe.joins.values()] == [4, 4]
    assert read == [image.name for image in images]


def test_images_that_a_store_lacks_are_named_with_what_they_may_be_called(tmp_path, tiny):
    data = two_parts(tmp_path / "d")
    store = extract(tiny, tmp_path / "few.zarr", data / "val", limit=3)

    with pytest.raises(
        FeaturesMissing, match=r"1 of 4 images are not in it; the first: .*00003.png: none of its keys is JPEGImages/"
    ):
        joined(store, data / "val")


def test_images_whose_extraction_failed_are_left_out_of_scores_and_counted(tmp_path, tiny):
    data = two_parts(tmp_path / "d") / "train"
    for i in range(4, 7):
        photo(data / f"{i:05d}.png", i)
    whole = data / "00001.png"
    whole.write_bytes(whole.read_bytes()[:200])
    small, large = (
        extract(tiny, tmp_path / f"{side}.zarr", data, size=side, geometry="squash", levels=("x1", "x2"), max_failed_fraction=1.0)
        for side in ("64", "96")
    )
    settings = {**TINY, "data": str(data), "stores": (small, large)}

    evaluate("cka", cka, CkaConfig.of(**settings, out=str(tmp_path / "cka"), pictures=0))
    evaluate("similarity", similarity, SimilarityConfig.of(**settings, out=str(tmp_path / "similarity")))

    for name in ("cka", "similarity"):
        results = json.loads((tmp_path / name / "results.json").read_text())
        (left_out,) = results["left_out"]
        assert (left_out["count"], left_out["reason"].split(":")[:2]) == (1, ["its extraction failed", " decode"])
        assert [each["without_features"] for each in results["features"]["joins"]] == [1, 1]
        assert "has no features of 1 of " in results["choices"]["stores"]


def test_stores_of_other_features_do_not_stand_in_one_table(tmp_path, tiny):
    data = two_parts(tmp_path / "d") / "train"
    made = {"geometry": "squash", "levels": ("x1", "x2")}
    small = extract(tiny, tmp_path / "small.zarr", data, **made)
    for changes, name in (
        ({"facet": "key"}, "facet"),
        ({"weights": "random:1"}, "weights"),
        ({"encoding": "float32"}, "x1.dtype"),
    ):
        large = extract(tiny, tmp_path / f"{name}.zarr", data, size="96", **made, **changes)
        with pytest.raises(ConfigError, match=rf"holds other features than .*small.zarr:\n  {name} "):
            cka.prepare(CkaConfig.of(**INLINE, data=str(data), stores=(small, large), out=str(tmp_path / "out")))
