"""`jobs/show.py index` and `nearest --index`: the index finds what comparing all cells finds, by the recall that it states."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from ray import cloudpickle

from jobs.show import run
from pipelines.benchmarks.stores import LEVEL, Place, write_store
from pipelines.executors import InlineExecutor
from pipelines.extraction.run import extract
from pipelines.showing import search_build
from pipelines.showing.nearest import nearest_cells
from pipelines.showing.search import CellIndex, IndexSettings
from pipelines.showing.search_build import build_index
from storage.paths import StorageError
from storage.store import FeatureStore
from tests.conftest import jpeg, tiny_config, write_tar

ROWS, GRID, CHANNELS = 96, (12, 12), 48


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A store of 13,824 cells, near to 200 directions as real ones are, in parts of 40 rows."""
    path = tmp_path_factory.mktemp("search")
    draw = np.random.default_rng(0)
    kinds = draw.standard_normal((200, CHANNELS))
    chosen = draw.integers(200, size=(ROWS, *GRID))
    np.save(path / "x1.npy", (kinds[chosen] + 0.5 * draw.standard_normal((ROWS, *GRID, CHANNELS))).astype(np.float16))
    write_store(Place(name="made up", url=str(path / "feats.zarr"), npy=str(path / "x1.npy")), ROWS)
    return path / "feats.zarr"


@pytest.fixture(scope="module")
def indexed(made) -> FeatureStore:
    pytest.importorskip("faiss", reason="faiss-cpu is the extra `search`")
    store = FeatureStore.open(str(made))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_build, "PART_CELLS", 40 * GRID[0] * GRID[1])
        build_index(store, store.level(LEVEL), InlineExecutor(), recall=0.95, queries=40)
    return store


def settings_of(store: FeatureStore) -> dict:
    return json.loads(store.folder.read(f"search/{LEVEL}/index.json"))


def test_its_recall_is_what_brute_force_says(indexed):
    settings, level = settings_of(indexed), indexed.level(LEVEL)
    assert settings["cells"] == ROWS * GRID[0] * GRID[1]
    assert settings["parts"] == 3
    assert settings["recall"] >= 0.95
    index = CellIndex.open(indexed, level)
    draw, found = np.random.default_rng(5), []
    for row in draw.permutation(ROWS)[:30]:
        query = indexed.read(int(row), LEVEL)[3:5, 7].mean(axis=0, dtype=np.float32)  # between two cells
        exact = {(each.row, each.cell) for each in nearest_cells(indexed, query, level, 10)}
        near = index.nearest(query, 10)
        assert len(near) == 10
        found.append(len(exact & {(each.row, each.cell) for each in near}) / 10)
    assert np.mean(found) >= 0.9


def test_cosines_are_exact_and_the_choices_hold(indexed):
    level, index = indexed.level(LEVEL), CellIndex.open(indexed, indexed.level(LEVEL))
    query = indexed.read(7, LEVEL)[3, 4].astype(np.float32)

    first = index.nearest(query, 5)
    others = index.nearest(query, 90, per_image=True, without=[7])

    assert (first[0].row, first[0].cell) == (7, (3, 4))
    maps = indexed.read(slice(None), LEVEL).astype(np.float64)
    cosines = (maps @ query) / (np.linalg.norm(maps, axis=-1) * np.linalg.norm(query))
    np.testing.assert_allclose([each.cosine for each in first], [cosines[each.row][each.cell] for each in first], atol=1e-6)
    # So many images are asked for that the first candidates can't give them: more are looked at until they do.
    assert len({each.row for each in others}) == 90
    assert 7 not in {each.row for each in others}
    assert len(nearest_cells(indexed, query, level, 5, rows=np.array([7]))) == 5


class _Crossing(InlineExecutor):
    """Workers and pieces are made of what crosses a network, as on Ray."""

    def pieces(self, make_worker, pieces, pool, **_):
        for piece in pieces:
            make, sent = cloudpickle.loads(cloudpickle.dumps((make_worker, piece)))
            yield cloudpickle.loads(cloudpickle.dumps(make()(sent)))


def test_written_by_a_worker_for_each_part_it_is_the_same_bytes(indexed, tmp_path, monkeypatch):
    store = FeatureStore.open(str(shutil.copytree(indexed.folder.url, tmp_path / "feats.zarr")))
    before = {path.name: path.read_bytes() for path in Path(store.folder.url, f"search/{LEVEL}").iterdir()}
    monkeypatch.setattr(search_build, "PART_CELLS", 40 * GRID[0] * GRID[1])

    build_index(store, store.level(LEVEL), _Crossing(), recall=0.95, queries=40)

    assert {path.name: path.read_bytes() for path in Path(store.folder.url, f"search/{LEVEL}").iterdir()} == before


def test_all_lists_and_candidates_give_what_comparing_all_gives(indexed):
    index = CellIndex.open(indexed, indexed.level(LEVEL))
    query = indexed.read(3, LEVEL)[5, 5].astype(np.float32)

    cells = index.candidates(query, 10**6, index.settings.lists)

    assert sorted(cells) == list(range(ROWS * GRID[0] * GRID[1]))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    """Ten images in 10,240 cells."""
    path = tmp_path_factory.mktemp("photos")
    tar = str(write_tar(path / "in.tar", [(f"{i:02d}.jpg", jpeg(i)) for i in range(10)]))
    config = tiny_config(path, tar, levels=("x1", "32x32"))
    extract(config, InlineExecutor())
    return config.out


def test_the_command_builds_and_takes_it(photos, capsys):
    pytest.importorskip("faiss", reason="faiss-cpu is the extra `search`")
    point = ["nearest", photos, "--key", "04", "--point", "48", "40", "--level", "32x32"]
    assert run([*point, "--index"]) == 2
    assert "has no index of 32x32; jobs/show.py index" in capsys.readouterr().err

    assert run(["index", photos, "--level", "32x32", "--executor", "inline", "--queries", "10"]) == 0
    said = capsys.readouterr().out
    assert "10,240 cells in 128 lists" in said
    assert "recall@10" in said
    assert run(point) == 0
    exact = capsys.readouterr().out
    assert run([*point, "--index"]) == 0
    by_index = capsys.readouterr().out
    assert by_index.splitlines()[:3] == exact.splitlines()[:3]
    assert "by the index: recall@10" in by_index


def test_an_index_of_another_state_is_refused(indexed, tmp_path):
    store = FeatureStore.open(str(shutil.copytree(indexed.folder.url, tmp_path / "feats.zarr")))
    path = Path(store.folder.url, f"search/{LEVEL}/index.json")
    good = json.loads(path.read_text())

    for changed, said in (
        ({"fingerprint": "0" * 64}, "is of the store as it was before"),
        ({"counts": {"ok": ROWS - 1, "failed": 1}}, "is of the store as it was before"),
        ({"lists": 7}, "aren't those of its index.json"),
        ({"code_bytes": 5}, "no index has these settings"),
    ):
        path.write_text(json.dumps(good | changed))
        with pytest.raises(StorageError, match=said):
            CellIndex.open(store, store.level(LEVEL))
    path.write_text(json.dumps(good))
    CellIndex.open(store, store.level(LEVEL))

    store.set_writing()  # as whoever changes rows begins
    with pytest.raises(StorageError, match="is of the store as it was before"):
        CellIndex.open(store, store.level(LEVEL))


def test_damage_is_named(indexed, tmp_path, capsys):
    store = FeatureStore.open(str(shutil.copytree(indexed.folder.url, tmp_path / "feats.zarr")))
    path = Path(store.folder.url, f"search/{LEVEL}/cells-00001")
    path.write_bytes(path.read_bytes()[:-1000])

    with pytest.raises(Exception, match="cells-00001 is missing or cut short; jobs/show.py index"):
        CellIndex.open(store, store.level(LEVEL)).candidates(np.ones(CHANNELS, np.float32), 10, 128)


def test_what_no_index_is_built_of_is_one_sentence(made, capsys):
    pytest.importorskip("faiss", reason="faiss-cpu is the extra `search`")
    assert run(["index", str(made), "--level", "pooled"]) == 2
    assert "has no maps among pooled" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(["index", str(made), "--recall", "1.5"])
    assert "must lie above 0, and at most at 1" in capsys.readouterr().err


def test_without_faiss_the_extra_is_named(made, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)

    assert run(["index", str(made), "--executor", "inline"]) == 2
    assert "pip install 'raylift[search]'" in capsys.readouterr().err


def test_settings_that_no_index_has_are_refused():
    with pytest.raises(ValueError, match="no index has these settings"):
        IndexSettings(
            fingerprint="", counts={}, cells=1, channels=16, lists=0, code_bytes=8, parts=1, part_rows=1, probes=1, candidates=1,
            recall=1.0, queries=1,
        )  # fmt: skip
