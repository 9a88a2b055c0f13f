"""jobs/show.py over real stores: complete, being written, with failures, local and on S3; and the page in a browser."""

import base64
import html
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.extract import program as extract_program
from jobs.show import run
from operators.visual import Panel, heat
from pipelines.executors import InlineExecutor
from pipelines.extraction.run import RunFailed, extract
from pipelines.extraction.worker import ShardWorker
from pipelines.showing.choice import columns_of, named_rows, pick_rows
from pipelines.showing.report import render_report
from pipelines.showing.status import BOTTLENECKS, MAX_RECORDS, RunStatus, bottleneck, read_status, status_lines
from pipelines.showing.views import colours_for, similar_panel, similarities, view_panel
from storage.paths import StorageError
from storage.store import FeatureStore, MissingRows, OutsideImage
from tests.browser import opens_well
from tests.conftest import jpeg, write_tar
from tests.forks import Fork
from tests.stops import dying_at_task

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(make_tars, tiny) -> FeatureStore:
    """Twenty images, x1, x2, x4 = bicubic, pooled."""
    config = tiny(make_tars(), levels=("x1", "x2", "x4=bicubic", "pooled"), carry=("cls",))
    extract(config, InlineExecutor())
    return FeatureStore.open(config.out)


@pytest.fixture
def stopped(make_tars, tiny) -> FeatureStore:
    """A store that was killed when three of its five tasks were done."""
    config = tiny(make_tars())
    with dying_at_task(3):
        extract(config, InlineExecutor())
    return FeatureStore.open(config.out)


@pytest.fixture
def with_failures(tmp_path, tiny) -> FeatureStore:
    """Ten images, of which three fail for two reasons."""
    members = [(f"{i:02d}.jpg", jpeg(i)) for i in range(7)]
    members += [("empty-1.jpg", b""), ("empty-2.jpg", b""), ("text.jpg", b"<html>not found</html>")]
    write_tar(tmp_path / "in.tar", members)
    config = tiny(str(tmp_path / "in.tar"), max_failed_fraction=1.0)
    extract(config, InlineExecutor())
    return FeatureStore.open(config.out)


def show(*args: str) -> None:
    assert run([str(arg) for arg in args]) == 0


# --- status, failures, rows -------------------------------------------------------------------------------------------


def test_status_of_a_complete_store(store, capsys):
    show("status", store.folder.url)

    text = capsys.readouterr().out
    assert "complete" in text
    assert "20 ok, 0 failed, 0 pending, 20 in all" in text
    assert "5 of 5 done" in text
    assert any(words in text for words in BOTTLENECKS.values())


def test_stored_bytes_are_those_of_the_objects(store):
    root = Path(store.folder.url)

    status = read_status(store)

    on_disk = {
        name: sum(f.stat().st_size for f in (root / name / "features/c").rglob("*") if f.is_file()) for name in store.levels
    }
    assert status.stored_bytes == on_disk
    assert status.objects == 20
    assert not status.is_sampled


def test_status_scales_up_from_a_sample_of_tasks(store, monkeypatch):
    exact = read_status(store)
    monkeypatch.setattr("pipelines.showing.status.MAX_RECORDS", 2)

    status = read_status(store)

    assert MAX_RECORDS > 2
    assert status.is_sampled
    assert status.objects == exact.objects
    assert (status.ok, status.pending) == (20, 0)
    assert status.stored_bytes["x1"] == pytest.approx(exact.stored_bytes["x1"], rel=0.1)
    assert "about" in "\n".join(status_lines(status))


def test_status_of_a_store_that_is_being_written(stopped, capsys):
    show("status", stopped.folder.url)

    text = capsys.readouterr().out
    assert "being written by run" in text
    assert "12 ok, 0 failed, 8 pending, 20 in all" in text
    assert "3 of 5 done" in text


def test_status_says_when_a_run_has_gone_silent(stopped):
    status = read_status(stopped)
    silent = replace(status, runs=[replace(status.runs[-1], silent_s=3700.0)])

    assert "silent for 1 h 01 min" in next(iter(status_lines(silent)))
    assert "the same command continues" in next(iter(status_lines(silent)))


def test_what_else_takes_long_is_said_beside_what_takes_longest():
    seconds = {"read": 14.0, "decode": 13.0, "forward": 37.0, "encode": 12.0, "write": 24.0}
    run = RunStatus(run_id="r", started="2026-01-01T00:00:00+00:00", settings={}, stage_seconds=seconds)

    said = bottleneck(run)
    assert said.startswith("the largest part of the time (37%) goes to the model itself")
    assert "Another 24% goes to writing features" in said
    assert "nothing else" not in said

    said = bottleneck(replace(run, stage_seconds={"forward": 9.0, "write": 1.0}))
    assert said.startswith("most of the time (90%) goes to the model itself")
    assert "writing" not in said


@pytest.mark.parametrize(("error", "said"), [(KeyboardInterrupt(), "was stopped"), (RuntimeError("bug"), "failed")])
def test_status_says_at_once_that_a_run_was_stopped_or_failed(make_tars, tiny, monkeypatch, capsys, error, said):
    original = ShardWorker.compute

    def compute(self, task, loaded):
        if task.block == 3:
            raise error
        return original(self, task, loaded)

    config = tiny(make_tars())
    with monkeypatch.context() as patch:
        patch.setattr(ShardWorker, "compute", compute)
        with pytest.raises((KeyboardInterrupt, RuntimeError, RunFailed)):
            extract(config, InlineExecutor())
    show("status", config.out)

    text = capsys.readouterr().out
    assert re.search(rf"unfinished; its last run \(.*\) {said} \d s ago. The same command continues", text)
    assert " left " not in text

    extract(config, InlineExecutor())
    show("status", config.out)
    assert "complete" in capsys.readouterr().out.splitlines()[0]


def test_names_that_terminals_obey_are_shown_as_they_are_spelt(tmp_path, tiny, capsys):
    """On the terminal, and in the page; the store has them as the tar has."""
    names = ["\x1b[2Jgone", "two\nlines", "\u202etxt"]
    write_tar(tmp_path / "in.tar", [(f"{name}.jpg", jpeg(i) if i else b"") for i, name in enumerate(names)])
    config = tiny(str(tmp_path / "in.tar"), max_failed_fraction=1.0)
    extract(config, InlineExecutor())
    capsys.readouterr()

    show("rows", config.out)
    show("failures", config.out)
    show("compare", config.out, config.out)
    show("report", config.out, "--out", tmp_path / "report.html")

    out, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    for text in (out, page):
        assert not {"\x1b", "\u202e"} & set(text)
        assert r"\x1b[2Jgone" in text
    assert out.count(r"two\nlines") == 2
    assert FeatureStore.open(config.out).index.find(names).keys() == set(names)


def test_report_is_written_where_it_is_asked_for(store, tmp_path, monkeypatch):
    """Also in the disk's root, which `--out /x.html` names, and in the working folder."""
    written = []
    monkeypatch.setattr("storage.paths.put_file", lambda root, name, data, put: written.append((root, name)))

    for out in ("/x.html", f"{tmp_path}/a/x.html"):
        show("report", store.folder.url, "--out", out)

    assert [each for each in written if each[1] == "x.html"] == [("", "x.html"), (f"{tmp_path}/a", "x.html")]


def test_pictures_of_no_known_kind_are_refused_before_they_are_drawn(store, capsys):
    assert run(["view", store.folder.url, "--out", "x.foo"]) == 2
    assert run(["similar", store.folder.url, "--key", "0", "--out", "x"]) == 2

    assert capsys.readouterr().err.count("end it in .png, .jpg, .webp or .tif") == 2


def test_status_as_json_adds_up(with_failures, capsys):
    show("status", with_failures.folder.url, "--json")

    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["failed"], found["pending"], found["rows"]) == (7, 3, 0, 10)
    assert found["runs"][-1]["settings"]["config"]["model"] == "test_vit.r160_in1k"


def test_failures_are_grouped_by_reason(with_failures, capsys):
    show("failures", with_failures.folder.url)

    text = capsys.readouterr().out
    assert "3 of 10 images failed, for 2 reasons" in text
    assert "2 x decode: ImageRefused: the image has 0 bytes\n            empty-1, empty-2" in text
    assert "1 x decode: ImageRefused: not an image" in text


def test_failures_as_json_are_ledger_rows(with_failures, capsys):
    show("failures", with_failures.folder.url, "--json")

    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["key"] for row in rows] == ["empty-1", "empty-2", "text"]
    assert all(row["stage"] == "decode" for row in rows)


def test_failures_of_a_store_that_is_being_written(tmp_path, tiny, capsys):
    write_tar(tmp_path / "in.tar", [("bad.jpg", b""), *((f"{i}.jpg", jpeg(i)) for i in range(9))])
    config = tiny(str(tmp_path / "in.tar"), max_failed_fraction=1.0)
    with dying_at_task(2):
        extract(config, InlineExecutor())

    show("failures", config.out)

    assert "1 of 10 images failed, for 1 reasons" in capsys.readouterr().out


def test_rows_say_what_a_row_is_and_how_large(store, capsys):
    show("rows", store.folder.url, "--first", "2")

    text = capsys.readouterr().out
    assert re.search(r"x1 +4 x 4 x 64 +float16 +16 x 16 px +backbone +2\.0 KB", text)
    assert re.search(r"pooled +64 +float16 +whole image", text)
    assert re.search(r"1 +96 x 72 +ok +00001", text)
    assert "18 more" in text


def test_rows_of_pending_tasks_have_their_keys(stopped, capsys):
    show("rows", stopped.folder.url, "--first", "20")

    assert re.search(r"19 +pending +00019", capsys.readouterr().out)


# --- pictures ---------------------------------------------------------------------------------------------------------


def viewed(store: FeatureStore, rows: np.ndarray) -> Panel:
    return view_panel(columns_of([store], [rows]))


def similar(
    store: FeatureStore,
    key: str | int,
    point: tuple[float, float] | None,
    to: list[int] | None = None,
    levels: list[str] | None = None,
) -> Panel:
    return similar_panel(columns_of([store], [store.rows([int(store.rows(key)[0]), *(to or [])])], levels or ()), point)


def test_colours_are_fitted_once_and_saved(store):
    first = colours_for(store, store.level("x1"))
    saved = store.folder.read("views/rgb-64.json")

    again = colours_for(FeatureStore.open(store.folder.url), store.level("x2"))

    assert store.folder.read("views/rgb-64.json") == saved
    np.testing.assert_array_equal(again.components, first.components)


def test_colours_of_an_image_do_not_depend_on_the_others_shown(store):
    alone = viewed(store, np.array([7]))
    together = viewed(store, np.array([3, 7, 11]))

    np.testing.assert_array_equal(alone.tiles[0][1].pixels, together.tiles[1][1].pixels)
    np.testing.assert_array_equal(alone.tiles[0][3].pixels, together.tiles[1][3].pixels)


def test_colours_of_another_store_can_be_used(store, make_tars, tiny, tmp_path):
    config = tiny(make_tars(1, 8, "other"), out=str(tmp_path / "other.zarr"))
    extract(config, InlineExecutor())
    other = FeatureStore.open(config.out)
    own = colours_for(store, store.level("x1"))

    borrowed = colours_for(other, other.level("x1"), colours_from=store)

    np.testing.assert_array_equal(borrowed.mean, own.mean)
    assert not other.folder.exists("views/rgb-64.json")


def test_colours_of_other_features_are_not_borrowed(store, make_tars, tiny, tmp_path, capsys):
    config = tiny(make_tars(1, 8, "keys"), facet="key", out=str(tmp_path / "keys.zarr"))
    extract(config, InlineExecutor())
    show("view", config.out, "--out", tmp_path / "keys.png")
    picture = tmp_path / "borrowed.png"

    assert run(["view", store.folder.url, "--colours-from", config.out, "--out", str(picture)]) == 2

    assert re.search(r"components of other features .*\n +facet +there 'key' +here 'token'", capsys.readouterr().err)
    assert not picture.exists()


def test_colours_that_were_never_saved_can_not_be_borrowed(store):
    with pytest.raises(StorageError, match="no saved colours for 64 channels; view it first"):
        colours_for(store, store.level("x1"), colours_from=store)


def test_view_of_a_store_that_can_not_be_written_warns(store, monkeypatch, caplog):
    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr("storage.paths.Folder.write", refuse)

    viewed(store, np.array([0]))

    assert "colours were not saved" in caplog.text


def test_saved_colours_do_not_disturb_the_store(store):
    import zarr

    viewed(store, np.array([0]))

    group = zarr.open_group(store.folder.url, mode="r", use_consolidated=False)
    assert "views" in dict(group.members())


def test_view_shows_photos_and_every_map(store, tmp_path):
    show("view", store.folder.url, "--rows", "00003", "00007", "--out", tmp_path / "v.png")

    panel = viewed(store, store.rows(["00003", "00007"]))
    assert panel.rows == ["00003", "00007"]
    assert [title.split()[0] for title in panel.columns] == ["photo", "x1", "x2", "x4"]
    assert panel.tiles[1][0].pixels.shape == (64, 64, 3)
    assert panel.tiles[1][3].pixels.shape == (16, 16, 3)
    assert Image.open(tmp_path / "v.png").size == panel.draw().size


def test_view_without_the_photographs_goes_on(store, tmp_path, caplog):
    shutil.rmtree(tmp_path / "in")

    panel = viewed(store, np.array([0]))

    assert panel.tiles[0][0].pixels is None
    assert panel.tiles[0][1].pixels is not None
    assert "no photograph for row 0" in caplog.text


def test_view_of_a_store_that_is_being_written(stopped):
    assert set(pick_rows(stopped, 6)) <= set(range(12))

    assert len(viewed(stopped, pick_rows(stopped, 6)).tiles) == 6


def test_view_of_a_failed_row_says_why(with_failures):
    with pytest.raises(MissingRows, match="'empty-1', which failed: decode"):
        viewed(with_failures, with_failures.rows(["empty-1"]))


def test_view_of_a_row_that_is_not_written_yet_says_so(stopped):
    with pytest.raises(MissingRows, match="not written yet"):
        viewed(stopped, np.array([19]))


def test_pick_rows_leaves_failed_ones_out(with_failures):
    assert pick_rows(with_failures, 100).tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_similarity_is_one_at_the_point_itself(store):
    point = tuple(store.coords("x1", "00004")[1, 2])

    panel = similar(store, "00004", point, levels=["x1"])

    yellow = (panel.tiles[0][1].pixels == [253, 231, 37]).all(axis=-1)
    assert np.argwhere(yellow).tolist() == [[1, 2]]
    assert panel.rows[0].endswith("to 1.00")


def test_similarity_shows_bilinear_beside_what_is_finer(store):
    panel = similar(store, 0, None, [1, 2])

    assert [" ".join(title.split()) for title in panel.columns] == [
        "photo",
        "x1 backbone 4 x 4 cells",
        "x2 bilinear 8 x 8 cells",
        "x1 bilinear 16 x 16 cells",
        "x4 bicubic 16 x 16 cells",
    ]
    assert len(panel.tiles) == 3
    assert {tile.mark for tile in panel.tiles[0]} == {(0.5, 0.5)}  # on the maps, too
    assert {tile.mark for tile in panel.tiles[1]} == {None}
    bar = np.asarray(panel.draw())[-20:]
    for end in (0.0, 1.0):
        assert (bar == heat(np.array([end]), 0, 1)).all(axis=-1).any()


def test_bilinear_map_beside_a_level_is_the_stored_bilinear_level(make_tars, tiny):
    config = tiny(make_tars(), levels=("x1", "x2", "8x8=bicubic"))
    extract(config, InlineExecutor())

    store = FeatureStore.open(config.out)

    # At the centre of an x2 cell both maps have the same query.
    point = tuple(store.coords("x2", 0)[3, 4])
    made, stored = (dict(similarities(columns_of([store], [np.array([0])], names), point)) for names in (["8x8"], ["x2"]))

    assert [list(found) for found in (made, stored)] == [
        ["x1 bilinear\n8 x 8 cells", "8x8  bicubic\n8 x 8 cells"],
        ["x2  bilinear\n8 x 8 cells"],
    ]
    np.testing.assert_allclose(made["x1 bilinear\n8 x 8 cells"], stored["x2  bilinear\n8 x 8 cells"], atol=1e-3)
    assert words(similar(store, 0, point)).count("x1 bilinear 8 x 8 cells") == 0  # x2 is there


def test_point_that_the_crop_cut_away_is_refused(store):
    with pytest.raises(OutsideImage, match="the crop cut"):
        similar(store, "00000", (2.0, 30.0))
    with pytest.raises(OutsideImage, match="'00000' has 96 x 72 pixels, .200, 30. lies outside"):
        similar(store, "00000", (200.0, 30.0))


# --- several stores side by side --------------------------------------------------------------------------------------


@pytest.fixture
def beside(store, tiny, tmp_path) -> FeatureStore:
    """Ten of the twenty images of `store`, in another order, with nearest levels."""
    members = [(f"{i:05d}.jpg", jpeg(i)) for i in range(18, -1, -2)]
    tar = str(write_tar(tmp_path / "beside.tar", members))
    config = tiny(tar, levels=("x1", "x2=nearest", "x4=nearest"), out=str(tmp_path / "beside.zarr"))
    extract(config, InlineExecutor())
    return FeatureStore.open(config.out)


def words(panel: Panel) -> list[str]:
    return [" ".join(title.split()) for title in panel.columns]


def shown_by(monkeypatch, *args: str) -> Panel:
    """The panel that a command draws."""
    drawn = []
    draw = Panel.draw
    monkeypatch.setattr(Panel, "draw", lambda panel: drawn.append(panel) or draw(panel))
    show(*args)
    (panel,) = drawn
    return panel


def test_stores_side_by_side_show_what_both_have_once(store, beside, tmp_path, monkeypatch):
    places = [store.folder.url, beside.folder.url]
    panel = shown_by(monkeypatch, "view", *places, "--rows", "00006", "00002", "--out", tmp_path / "v.png")

    assert words(panel) == [
        "photo",
        "x1 backbone 4 x 4 cells",
        "x2 bilinear 8 x 8 cells",
        "x2 nearest 8 x 8 cells",
        "x4 bicubic 16 x 16 cells",
        "x4 nearest 16 x 16 cells",
    ]
    assert panel.rows == ["00006", "00002"]
    for tiles, key in zip(panel.tiles, panel.rows, strict=True):
        photo, low, _, nearest, _, nearest4 = (tile.pixels for tile in tiles)
        np.testing.assert_array_equal(low.repeat(2, 0).repeat(2, 1), nearest)  # one store's colours, and one image's
        np.testing.assert_array_equal(low.repeat(4, 0).repeat(4, 1), nearest4)
        np.testing.assert_array_equal(photo, viewed(store, store.rows([key])).tiles[0][0].pixels)
    assert store.folder.exists("views/rgb-64.json")
    assert not beside.folder.exists("views/rgb-64.json")


def test_images_that_all_stores_have_are_picked(store, beside, tmp_path, monkeypatch):
    panel = shown_by(monkeypatch, "view", store.folder.url, beside.folder.url, "--count", "4", "--out", tmp_path / "v.png")
    other = shown_by(monkeypatch, "similar", beside.folder.url, store.folder.url, "--key", "00004", "--out", tmp_path / "s.png")

    assert len(panel.rows) == len(other.rows) == 4
    assert {int(key) % 2 for key in panel.rows} == {0}
    assert other.rows[0].startswith("00004")
    assert words(other) == [
        "photo",
        "x1 backbone 4 x 4 cells",
        "x2 nearest 8 x 8 cells",
        "x2 bilinear 8 x 8 cells",
        "x1 bilinear 16 x 16 cells",
        "x4 nearest 16 x 16 cells",
        "x4 bicubic 16 x 16 cells",
    ]
    alone = similar(store, "00004", None)
    np.testing.assert_array_equal(other.tiles[0][3].pixels.argmax(), alone.tiles[0][2].pixels.argmax())


def test_levels_are_looked_for_in_all_stores(store, beside, tmp_path, monkeypatch, capsys):
    both, out = [store.folder.url, beside.folder.url], ["--out", str(tmp_path / "v.png")]
    panel = shown_by(monkeypatch, "view", *both, "--levels", "x4", *out)

    assert words(panel) == ["photo", "x4 bicubic 16 x 16 cells", "x4 nearest 16 x 16 cells"]
    assert run(["view", *both, "--levels", "x9", *out]) == 2
    assert "has no level 'x9'" in capsys.readouterr().err


def test_two_stores_of_one_method_have_their_names(store, make_tars, tiny, tmp_path):
    config = tiny(make_tars(), levels=("x1", "x2"), precision="bf16", out=str(tmp_path / "again.zarr"))
    extract(config, InlineExecutor())
    both = [store, FeatureStore.open(config.out)]

    titles = [column.title for column in columns_of(both, [np.array([0])] * 2, ["x2"])]

    assert titles == ["x2  bilinear\n8 x 8 cells\nout.zarr", "x2  bilinear\n8 x 8 cells\nagain.zarr"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"facet": "key"}, r"out.zarr and .*other.zarr hold other features, .*\n +facet +first 'token' +second 'key'"),
        ({"geometry": "squash"}, r"place images otherwise, .*\n(.*\n)? *geometry +first 'crop' +second 'squash'"),
        ({"size": "96"}, r"place images otherwise, .*\n +input_size"),
    ],
)
def test_stores_of_other_features_are_not_shown_together(store, make_tars, tiny, tmp_path, capsys, changes, message):
    config = tiny(make_tars(), out=str(tmp_path / "other.zarr"), **changes)
    extract(config, InlineExecutor())
    both, out = [store.folder.url, config.out], ["--out", str(tmp_path / "v.png")]

    assert run(["view", *both, *out]) == run(["similar", *both, "--key", "0", *out]) == 2

    said = capsys.readouterr().err
    assert len(re.findall(message, said)) == 2
    assert not (tmp_path / "v.png").exists()


def test_stores_of_other_images_are_not_shown_together(store, beside, tiny, tmp_path, capsys):
    tar = str(write_tar(tmp_path / "strange.tar", [(f"{i:05d}.jpg", jpeg(100 + i)) for i in range(6)]))
    strange = tiny(tar, out=str(tmp_path / "strange.zarr"))
    extract(strange, InlineExecutor())
    out = ["--out", str(tmp_path / "v.png")]

    assert run(["view", store.folder.url, strange.out, *out]) == 2
    assert "none is in all of" in capsys.readouterr().err
    assert run(["view", store.folder.url, strange.out, "--rows", "00003", *out]) == 2
    assert "has another image called '00003' than" in capsys.readouterr().err
    assert run(["view", store.folder.url, beside.folder.url, "--rows", "00002", "00003", *out]) == 2
    assert re.search(r"beside.zarr has no sample '00003', which .*out.zarr has", capsys.readouterr().err)
    assert run(["view", store.folder.url, store.folder.url, *out]) == 2
    assert "is there twice" in capsys.readouterr().err


# --- compare, export --------------------------------------------------------------------------------------------------


def test_store_equals_itself(store, capsys):
    show("compare", store.folder.url, store.folder.url)

    text = capsys.readouterr().out
    assert "20 rows compared, 0 left out" in text
    assert "mean 1.000000" in text
    assert "20 rows bit for bit" in text


def test_compare_finds_the_row_that_differs_and_matches_by_key(tmp_path, tiny, capsys):
    a = tiny(str(write_tar(tmp_path / "a.tar", [(f"{i}.jpg", jpeg(i)) for i in range(8)])), out=str(tmp_path / "a.zarr"))
    members = [(f"{i}.jpg", jpeg(i if i != 5 else 99)) for i in (7, 5, 3, 1, 2)]
    b = tiny(str(write_tar(tmp_path / "b.tar", members)), out=str(tmp_path / "b.zarr"))
    for config in (a, b):
        extract(config, InlineExecutor())

    show("compare", a.out, b.out, "--worst", "1", "--other-images")

    text = capsys.readouterr().out
    assert "5 rows compared, 3 left out" in text
    assert "1 rows of those compared: the second store has another image under their key" in text
    assert "4 rows bit for bit" in text
    assert text.rstrip().endswith("  5")

    show("compare", a.out, b.out)

    text = capsys.readouterr().out
    assert "4 rows compared, 3 left out" in text
    assert "1 rows more left out: the second store has another image under their key" in text
    assert "least 1.000000" in text


def test_compare_refuses_other_photographs_under_the_same_keys(tmp_path, tiny, capsys):
    out = []
    for name, first in (("a", 0), ("b", 100)):
        tar = write_tar(tmp_path / f"{name}.tar", [(f"{i:06d}.jpg", jpeg(first + i)) for i in range(4)])
        out.append(tiny(str(tar), out=str(tmp_path / f"{name}.zarr"), **({"facet": "key"} if first else {})))
        extract(out[-1], InlineExecutor())

    assert run(["compare", out[0].out, out[1].out, "--level", "pooled"]) == 2
    assert "are of other images: 4 rows have a key in common, and none of them is of the same bytes" in capsys.readouterr().err

    show("compare", out[0].out, out[1].out, "--other-images")

    text = capsys.readouterr().out
    assert "4 rows of those compared" in text
    assert re.search(r"facet +first 'token' +second 'key'", text)


def test_compare_brings_levels_to_one_grid(store, capsys):
    show("compare", store.folder.url, store.folder.url, "--level", "x1", "--other-level", "x2")

    assert re.search(r"least 0\.99999|least 1\.0", capsys.readouterr().out)


def test_compare_refuses_what_has_no_cosine(store, make_tars, tiny, tmp_path, capsys):
    config = tiny(make_tars(1, 4, "squashed"), geometry="squash", out=str(tmp_path / "squash.zarr"))
    extract(config, InlineExecutor())

    assert run(["compare", store.folder.url, config.out]) == 2
    assert "show other parts of the images (geometry crop and squash)" in capsys.readouterr().err
    assert run(["compare", store.folder.url, store.folder.url, "--level", "x1", "--other-level", "pooled"]) == 2
    assert "one is a map" in capsys.readouterr().err


def test_export_holds_every_vector_with_its_key_and_label(store, tmp_path, capsys):
    show("export", store.folder.url, "--out", tmp_path / "vectors")

    table = pq.read_table(tmp_path / "vectors")
    assert table.column_names == ["row", "key", "source", "vector", "cls"]
    assert table["key"].to_pylist() == [f"{i:05d}" for i in range(20)]
    assert table["cls"].to_pylist() == [str(i % 7) for i in range(20)]
    assert table["source"][0].as_py().endswith("s-000.tar")
    np.testing.assert_array_equal(np.stack(table["vector"].to_numpy()), store.read(slice(None), "pooled").astype(np.float32))
    assert "20 vectors of 64 in 1 files" in capsys.readouterr().out
    said = json.loads(table.schema.metadata[b"raylift"])
    assert (said["level"]["name"], said["fingerprint"]) == ("pooled", store.root.fingerprint)
    assert said["features"]["weights"] == store.spec.weights


def test_export_of_a_map_is_its_mean_and_leaves_failed_rows_out(with_failures, tmp_path, capsys):
    show("export", with_failures.folder.url, "--level", "x1", "--out", tmp_path / "vectors")

    table = pq.read_table(tmp_path / "vectors")
    expected = with_failures.read(slice(0, 7), "x1").astype(np.float32).mean(axis=(1, 2))
    np.testing.assert_allclose(np.stack(table["vector"].to_numpy()), expected, rtol=1e-5, atol=1e-5)
    assert "3 rows without features left out" in capsys.readouterr().out


def test_export_is_cut_into_parts(store, tmp_path, monkeypatch):
    monkeypatch.setattr("storage.export.PART_BYTES", 4 * 64 * 8)

    show("export", store.folder.url, "--out", tmp_path / "vectors")

    assert [len(pq.read_table(part)) for part in sorted((tmp_path / "vectors").glob("*.parquet"))] == [8, 8, 4]
    assert pq.read_table(tmp_path / "vectors")["row"].to_pylist() == list(range(20))


def test_export_refuses_a_folder_with_parquet_in_it(store, tmp_path, capsys):
    show("export", store.folder.url, "--out", tmp_path / "vectors")

    assert run(["export", store.folder.url, "--out", str(tmp_path / "vectors")]) == 2
    assert "holds Parquet files already" in capsys.readouterr().err


# --- the report -------------------------------------------------------------------------------------------------------


def test_report_holds_everything_and_no_address(with_failures, tmp_path):
    show("report", with_failures.folder.url, "--out", tmp_path / "r.html")

    text = (tmp_path / "r.html").read_text()
    assert "ImageRefused: the image has 0 bytes" in text
    assert "The weights are random" in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "<script" not in text
    pictures = re.findall(r"data:image/(?:jpeg|png);base64,([^\"]+)", text)
    assert len(pictures) == 6 * 3 + 4 * 3
    assert all(base64.b64decode(picture) for picture in pictures)


@pytest.mark.parametrize("change", [{}, {"norm": False}])
def test_report_says_the_command_and_the_software(make_tars, tiny, change):
    config = tiny(make_tars(), **change)
    extract(config, InlineExecutor())

    text = html.unescape(render_report(FeatureStore.open(config.out), count=1))

    (command,) = re.findall(r"<td>(python jobs/extract\.py [^<]*)</td>", text)
    again = extract_program.parse(shlex.split(command)[2:]).config
    assert again.public() == config.public()
    assert f"torch {version('torch')}, " in text


def test_report_escapes_what_strangers_wrote(tmp_path, tiny):
    members = [("<script>alert(1)</script>.jpg", jpeg(1)), ("ok.jpg", jpeg(2)), ("bad<b>.jpg", b"")]
    write_tar(tmp_path / "in.tar", members)
    config = tiny(str(tmp_path / "in.tar"), max_failed_fraction=1.0)
    extract(config, InlineExecutor())

    text = render_report(FeatureStore.open(config.out), count=6)

    assert "<script" not in text
    assert "bad<b>" not in text


def test_report_of_a_store_that_is_being_written(stopped):
    text = render_report(stopped, count=4)

    assert "being written by run" in text
    assert "None so far." in text


def test_report_of_a_store_without_features_says_so(make_tars, tiny):
    config = tiny(make_tars())
    with dying_at_task(0):
        extract(config, InlineExecutor())

    assert "has no features to show yet" in render_report(FeatureStore.open(config.out), count=4)


@pytest.mark.parametrize("width", [1280, 390])
def test_report_opens_in_a_browser_without_requests_errors_or_cut_off_parts(
    with_failures, tmp_path, chromium, width: int, monkeypatch
):
    monkeypatch.setattr(type(with_failures.folder), "displayed", "s3://a-bucket/" + "a-very-long-name-without-spaces" * 8)
    opens_well(render_report(with_failures, count=4), tmp_path, chromium, width)


# --- remote, and without torch ----------------------------------------------------------------------------------------


def test_everything_works_on_s3(make_tars, tiny, s3_options, tmp_path, capsys):
    url, options = f"s3://{s3_options['bucket']}/f.zarr", json.dumps(s3_options["options"])
    config = tiny(make_tars(), out=url, storage_options=options)
    extract(config, InlineExecutor())

    for command in ("status", "failures", "rows"):
        show(command, url, "--storage-options", options)
    show("view", url, "--storage-options", options, "--out", tmp_path / "v.png")
    show("similar", url, "--key", "00003", "--storage-options", options, "--out", tmp_path / "s.png")
    show("export", url, "--storage-options", options, "--out", f"s3://{s3_options['bucket']}/vectors")
    show("report", url, "--storage-options", options, "--out", tmp_path / "r.html")

    displayed = capsys.readouterr().out + (tmp_path / "r.html").read_text()
    assert "test-secret-value" not in displayed
    assert "20 ok" in displayed


def test_status_tells_of_a_run_that_another_process_writes_to_s3(parent, make_tars, s3_options, tmp_path, capsys):
    """It is held in the midst of its 40 tasks, each of which writes several objects."""
    url, options = f"s3://{s3_options['bucket']}/f.zarr", s3_options["options"]
    settings = f"--out {url} --model test_vit.r160_in1k --weights random --size 64 --precision fp32 --executor inline"
    argv = ["--data", make_tars(count=4), "--block-rows", "1", *settings.split(), "--storage-options", json.dumps(options)]
    log = tmp_path / "log"
    writer = Fork(program="extract", argv=argv, place="s3://", log=str(log), number=60, held=True)
    pid, deadline = parent.start(writer), time.monotonic() + 120
    while not Path(f"{log}.held").exists():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    show("status", url, "--storage-options", json.dumps(options))
    Path(f"{log}.go").touch()
    assert parent.wait(pid) == 0, log.read_text()
    displayed = capsys.readouterr().out

    assert "being written by run" in displayed
    assert not re.search(r"\b0 pending", displayed)
    assert "of 40 done" in displayed
    assert read_status(FeatureStore.open(url, options)).status == "complete"


def test_it_runs_without_torch_and_ray(store, tmp_path):
    code = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "timm", "ray"):
            raise ImportError(name + " is not needed to look at a store")

sys.meta_path.insert(0, Blocker())
from jobs.show import run
assert run(["status", {store.folder.url!r}]) == 0
assert not {{"matplotlib", "pandas"}} & sys.modules.keys()  # half a second, and nothing of status needs them
for command in (["rows"], ["view", "--out", "v.png"], ["report", "--out", "r.html"]):
    assert run([command[0], {store.folder.url!r}, *command[1:]]) == 0
"""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment, timeout=120)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["stat", "x"], "Did you mean 'status'?"),
        (["status", "nowhere.zarr"], "there is no feature store at nowhere.zarr"),
        (["view"], "no store: give a store's path or URL"),
        (["view", "STORE", "--count", "0"], "a picture has at least one row"),
        (["view", "STORE", "--rows", "nobody"], "has no sample 'nobody'"),
        (["view", "STORE", "--rows", "99"], "there is no row 99"),
        (["view", "STORE", "--levels", "x9"], "has no level 'x9'; it has x1, x2, x4, pooled"),
        (["view", "STORE", "--levels", "pooled"], "no maps among pooled"),
        (["status", "STORE", "--storage-options", "{"], "not valid JSON"),
        (["status", ""], "an empty path, as of a variable that isn't set"),
        (["status", "FILE"], "a file is there; give the folder that jobs/extract.py --out wrote"),
        (["rows", "STORE", "--first", "-1"], "--first -1: must be at least 0"),
        (["compare", "STORE", ""], "an empty path, as of a variable that isn't set"),
        (["compare", "STORE", "STORE", "--limit", "0"], "--limit 0: must be at least 1"),
        (["compare", "STORE", "STORE", "--worst", "-1"], "--worst -1: must be at least 0"),
        (["export", "STORE", "--out", "STORE"], "is a Zarr store; give what is exported a folder of its own"),
        (["export", "STORE", "--out", ""], "an empty path, as of a variable that isn't set"),
        (["export", "STORE", "--out", "x", "--regions", "no.json"], "--regions no.json: there is no such file"),
        (["report", "STORE", "--count", "-1"], "--count -1: must be at least 0"),
        (["report", "STORE", "--out", "x.pdf"], "--out x.pdf: a report is a page; end the name in .html"),
        (["push", "STORE", "FILE"], "is a file; give the copy a folder of its own"),
    ],
)
def test_mistakes_end_with_a_message_and_exit_code_2(store, args, words, capsys):
    places = {"STORE": store.folder.url, "FILE": __file__}
    assert run([places.get(arg, arg) for arg in args]) == 2
    assert words in capsys.readouterr().err


def test_the_type_of_a_row_selection_is_a_key_before_it_is_a_number(tmp_path, tiny):
    """Keys such as `5` are common; the number is only meant where no key is called so."""
    write_tar(tmp_path / "in.tar", [(f"{i}.jpg", jpeg(i)) for i in (5, 4, 3, 2)])
    config = tiny(str(tmp_path / "in.tar"))
    extract(config, InlineExecutor())

    assert named_rows(FeatureStore.open(config.out), ["5", "0", "-1"]).tolist() == [0, 0, 3]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--colours-from", "other.zarr", "--refit"), "--refit fits this store's own colours, and --colours-from takes another"),
        (("--rows", "0", "1", "--count", "4"), "--count 4: --rows names the 2 that are shown"),
    ],
)
def test_flags_that_contradict_each_other_change_nothing(store, tmp_path, capsys, flags, message):
    show("view", store.folder.url, "--out", str(tmp_path / "view.png"))
    before = {path: path.read_bytes() for path in Path(store.folder.url, "views").iterdir()}
    assert before

    assert run(["view", store.folder.url, *flags, "--out", str(tmp_path / "other.png")]) == 2

    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path(store.folder.url, "views").iterdir()} == before
    assert not (tmp_path / "other.png").exists()
