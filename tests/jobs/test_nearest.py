"""`jobs/show.py nearest`: what NumPy finds by comparing a point with all cells of a store at once."""

import numpy as np
import pytest
from PIL import Image

from jobs.show import run
from pipelines.executors import InlineExecutor
from pipelines.extraction.run import extract
from pipelines.showing import nearest
from pipelines.showing.nearest import NearCell, nearest_cells
from storage.store import FeatureStore
from tests.conftest import jpeg, tiny_config, write_tar

BROKEN = 5
"""The row without features."""


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FeatureStore:
    path = tmp_path_factory.mktemp("nearest")
    # The last two are the same image, so that cells are equal.
    seeds = [0, 1, 2, 3, 4, None, 6, 7, 8, 9, 9]
    members = [(f"{i:02d}.jpg", b"none" if seed is None else jpeg(seed)) for i, seed in enumerate(seeds)]
    tar, levels = str(write_tar(path / "in.tar", members)), ("x1", "x2@int8", "pooled")
    config = tiny_config(path, tar, levels=levels, max_failed_fraction=1.0)
    extract(config, InlineExecutor())
    return FeatureStore.open(config.out)


def brute_force(store: FeatureStore, query: np.ndarray, level: str, count: int, without: int | None = None) -> list[tuple]:
    maps = store.read(slice(None), level, missing="nan").astype(np.float64)
    cosines = (maps @ query) / (np.linalg.norm(maps, axis=-1) * np.linalg.norm(query))
    cosines[np.isnan(cosines)] = -2
    if without is not None:
        cosines[without] = -2
    order = np.argsort(-cosines.ravel(), kind="stable")[:count]
    return [tuple(int(i) for i in np.unravel_index(each, cosines.shape)) for each in order]


def places(found: list[NearCell]) -> list[tuple]:
    return [(each.row, *each.cell) for each in found]


@pytest.mark.parametrize("level", ["x1", "x2"])
@pytest.mark.parametrize("chunk_bytes", [1, 2**18, 2**30])
def test_the_nearest_cells_are_those_of_brute_force(store, monkeypatch, level, chunk_bytes):
    monkeypatch.setattr(nearest, "CHUNK_BYTES", chunk_bytes)
    query = store.sample(3, [(40.0, 30.0)], level)[0]

    found = nearest_cells(store, query, store.level(level), 25)

    assert places(found) == brute_force(store, query, level, 25)
    assert [each.cosine for each in found] == sorted((each.cosine for each in found), reverse=True)
    assert BROKEN not in {each.row for each in found}


def test_of_equal_cells_the_lower_row_comes_first(store):
    query = store.read(9, "x1")[1, 2].astype(np.float32)

    found = nearest_cells(store, query, store.level("x1"), 2)

    assert places(found) == [(9, 1, 2), (10, 1, 2)]
    assert found[0].cosine == found[1].cosine


def test_of_each_image_its_best_cell(store):
    query = store.sample(3, [(40.0, 30.0)], "x1")[0]

    found = nearest_cells(store, query, store.level("x1"), 100, per_image=True, without=[3])

    every = brute_force(store, query, "x1", 10**6, without=3)
    best = {}
    for row, y, x in every:
        best.setdefault(row, (row, y, x))
    assert places(found) == [best[row] for row in best if row not in (3, BROKEN)]


def test_the_command_says_where_and_draws(store, tmp_path, capsys):
    out = tmp_path / "near.png"

    assert run(["nearest", store.folder.url, "--key", "03", "--point", "40", "30", "--others", "--out", str(out)]) == 0

    query = store.sample(3, [(40.0, 30.0)], "x1")[0]
    row, y, x = brute_force(store, query, "x1", 1, without=3)[0]
    cx, cy = store.coords("x1", row)[y, x]
    first = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {row:02d} "))
    assert f"{y}, {x}" in first
    assert f"{cx:.1f}, {cy:.1f}" in first
    with Image.open(out) as picture:
        assert picture.width > 500


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--key", "03", "--point", "500", "30"], "lies outside"),
        (["--key", "03", "--point", "1", "30"], "the crop cut (1.0, 30.0) of '03' away"),
        (["--key", "05", "--point", "40", "30"], "which failed"),
        (["--key", "nope", "--point", "40", "30"], "nope"),
        (["--key", "03", "--point", "40", "30", "--level", "pooled"], "has no maps among pooled"),
        (["--key", "03", "--point", "40", "30", "--count", "0"], "at least 1"),
        (["--key", "03", "--point", "40", "30", "--out", "x.foo"], "what kind of picture"),
    ],
)
def test_what_cannot_be_looked_for_is_one_sentence(store, capsys, flags, said):
    assert run(["nearest", store.folder.url, *flags]) == 2

    assert said in capsys.readouterr().err
