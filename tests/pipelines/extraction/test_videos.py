"""Frames of videos as samples: which rows there are, what a store says of them, and what is refused."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.extract import run
from jobs.show import run as show
from pipelines.executors import InlineExecutor
from pipelines.extraction.plan import make_plan
from pipelines.extraction.prepare import prepare, resolve
from pipelines.extraction.run import extract
from pipelines.feature_datasets import FeatureDataset
from pipelines.features.photos import NoPhoto, try_photos
from storage import ranges, videos
from storage.paths import Folder, InputError
from storage.store import FeatureStore
from tests.browsed import ask, browsing
from tests.conftest import jpeg, write_tar
from tests.stops import dying_at_task
from tests.storage.test_samples import _Ranged
from tests.storage.test_samples import serve as serve
from tests.videos import drawn, pretended, video
from tests.videos import pretend as pretend

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def clips(tmp_path) -> str:
    """A tar of two videos with text, and a photograph between them."""
    members = [("a.mp4", pretended("a", 2.05)), ("a.txt", b"a dog runs"), ("b.jpg", jpeg(1)), ("b.txt", b"a cat")]
    return str(write_tar(tmp_path / "in/clips-000.tar", [*members, ("c.webm", pretended("c", 0.3)), ("c.jpg", jpeg(2))]))


KEYS = [*(f"a#{t:010.3f}" for t in (0, 0.5, 1, 1.5, 2)), "b", "c#000000.000"]


def read(out: str, *columns: str) -> list[tuple[object, ...]]:
    table = FeatureStore.open(out).records(slice(None), columns)
    return [tuple(row[name] for name in columns) for row in table.to_pylist()]


def test_each_frame_is_a_row_with_its_key_and_time(clips, tiny, pretend):
    config = tiny(clips, fps=2, carry=("txt",))

    summary = extract(config, InlineExecutor())

    assert (summary.ok, summary.failed) == (7, 0)
    assert read(config.out, "key", "time") == list(zip(KEYS, [0, 0.5, 1, 1.5, 2, None, 0], strict=True))
    assert {row[0] for row in read(config.out, "txt")[:5]} == {"a dog runs"}
    ledger = pq.read_table(Path(config.out) / "ledger/samples/part-00000.parquet")
    assert ledger.schema.field("time").type == "double"
    assert ledger["digest"].to_pylist()[0] != ledger["digest"].to_pylist()[1]
    maps = FeatureStore.open(config.out).read(KEYS[:2], "x1")
    assert not np.array_equal(maps[0], maps[1])


def test_a_task_opens_a_video_once(clips, tiny, pretend):
    config = tiny(clips, fps=10, block_rows=32)

    extract(config, InlineExecutor())

    assert len(FeatureStore.open(config.out)) == 21 + 1 + 3
    assert len(pretend) == 2


def test_stores_of_photographs_say_nothing_of_videos(make_tars, tiny):
    config = tiny(make_tars())
    extract(config, InlineExecutor())

    for part in ("index/samples", "ledger/samples", "ledger/commits"):
        for path in (Path(config.out) / part).glob("*.parquet"):
            assert not {"at", "time"} & set(pq.read_schema(path).names)


def test_plan_counts_videos_and_frames(clips, tiny, pretend, tmp_path):
    plan = make_plan(prepare(resolve(tiny(clips, fps=2)), InlineExecutor()))

    assert (plan.videos, plan.frames, plan.images) == (2, 6, 7)
    assert "6 frames of 2 videos, 1 images (index of 1 sources, 0 unreadable)" in plan.describe()


def test_other_rate_is_refused_by_name(clips, tiny, pretend):
    config = tiny(clips, fps=2)
    extract(config, InlineExecutor())
    before = tree_of(config)

    for fps in (4, None):
        with pytest.raises(InputError, match=r"(?s)it was indexed with .* --fps 2, this run has"):
            extract(config.changed(fps=fps), InlineExecutor())
    assert tree_of(config) == before


def tree_of(config) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(config.out).rglob("*") if path.is_file()}


def test_store_grows_by_videos(clips, tiny, pretend, tmp_path):
    config = tiny(clips, fps=2)
    extract(config, InlineExecutor())
    before = read(config.out, "row", "key", "time", "digest")
    more = write_tar(tmp_path / "in/clips-001.tar", [("d.mp4", pretended("d", 1))])

    summary = extract(config.changed(data=(clips, str(more))), InlineExecutor())

    assert summary.this_run == 2
    assert read(config.out, "row", "key", "time", "digest")[:7] == before
    assert read(config.out, "key")[7:] == [("d#000000.000",), ("d#000000.500",)]


def test_touched_video_is_compared_by_what_its_frames_are_made_of(clips, tiny, pretend, tmp_path):
    config = tiny(clips, fps=2)
    extract(config, InlineExecutor())
    members = [("a.mp4", pretended("a", 2.05)), ("a.txt", b"a dog runs"), ("b.jpg", jpeg(1)), ("b.txt", b"a cat")]
    write_tar(Path(clips), [*members, ("c.webm", pretended("c", 0.3)), ("c.jpg", jpeg(2))])

    assert extract(config, InlineExecutor()).this_run == 0

    members[0] = ("a.mp4", pretended("z", 2.05))
    write_tar(Path(clips), [*members, ("c.webm", pretended("c", 0.3)), ("c.jpg", jpeg(2))])
    with pytest.raises(InputError, match="5 of its images differ"):
        extract(config, InlineExecutor())


def test_frames_that_cannot_be_decoded_fail_with_a_reason(tmp_path, tiny, pretend):
    data = write_tar(tmp_path / "in.tar", [("a.mp4", pretended("a", 2, good=1.1)), ("b.mp4", b"nothing"), ("c.jpg", jpeg(1))])
    config = tiny(str(data), fps=2, max_failed_fraction=1)

    summary = extract(config, InlineExecutor())

    assert (summary.ok, summary.failed) == (4, 2)
    failures = FeatureStore.open(config.out).failures(["key", "stage", "error", "message"]).to_pylist()
    assert [tuple(row.values()) for row in failures] == [
        ("a#000001.500", "decode", "Truncated", "none can be decoded at 1.500 s"),
        ("b", "index", "Unreadable", "no frames: not pretended to be a video"),
    ]


def test_pictures_and_data_sets_have_the_frames(clips, tiny, pretend, tmp_path, capsys):
    config = tiny(clips, fps=2)
    extract(config, InlineExecutor())
    store = FeatureStore.open(config.out)

    photos = try_photos(store, np.array([1, 5]))

    assert not any(isinstance(each, NoPhoto) for each in photos)
    assert len(np.unique(photos[0].reshape(-1, 3), axis=0)) == 1  # a pretended frame has one colour
    samples = FeatureDataset(config.out, ["x1"], columns=["time"], rows=[1, 4])
    assert [samples[i]["time"] for i in range(2)] == [0.5, 2.0]
    assert show(["view", config.out, "--out", str(tmp_path / "view.png"), "--count", "2"]) == 0
    assert show(["similar", config.out, "--key", KEYS[1], "--point", "30", "20", "--out", str(tmp_path / "similar.png")]) == 0
    assert show(["nearest", config.out, "--key", KEYS[1], "--point", "30", "20"]) == 0
    assert KEYS[1] in capsys.readouterr().out


def test_folder_of_videos(tmp_path, tiny, pretend):
    folder = tmp_path / "clips"
    (folder / "day").mkdir(parents=True)
    (folder / "a.mov").write_bytes(pretended("a", 1))
    (folder / "a.jpg").write_bytes(jpeg(1))  # its poster
    (folder / "day" / "b.MP4").write_bytes(pretended("b", 0.5))
    config = tiny(str(folder), fps=2)

    extract(config, InlineExecutor())

    assert [key for (key,) in read(config.out, "key")] == ["a#000000.000", "a#000000.500", "day/b#000000.000"]


def command(tmp_path: Path, data: str, *more: str) -> list[str]:
    out = ["--out", str(tmp_path / "out.zarr"), "--executor", "inline", "--model", "test_vit.r160_in1k", "--weights", "random"]
    return ["--data", data, *out, "--size", "64", *more]


@pytest.mark.parametrize("given", ["folder", "folder/*.mp4", "folder/a.mp4", "in.tar"])
def test_without_a_rate_videos_are_left_out_and_the_flag_is_named(tmp_path, capsys, given):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.mp4").write_bytes(pretended("a", 1))
    write_tar(tmp_path / "in.tar", [("a.mp4", pretended("a", 1)), ("a.txt", b"text")])

    assert run(command(tmp_path, str(tmp_path / given))) == 2

    assert "--fps" in capsys.readouterr().err


def test_videos_beside_images_are_counted(tmp_path, capsys):
    data = write_tar(tmp_path / "in.tar", [("a.jpg", jpeg(1)), ("a.mp4", pretended("a", 1))])

    assert run(command(tmp_path, str(data), "--plan")) == 0

    assert "1 x other member of a sample (.mp4; --fps takes frames) (in.tar: a.mp4)" in capsys.readouterr().out


def test_nothing_begins_without_a_decoder(tmp_path, capsys, monkeypatch):
    data = write_tar(tmp_path / "in.tar", [("a.mp4", pretended("a", 1))])
    videos._library.cache_clear()
    monkeypatch.setitem(sys.modules, "av", None)

    assert run(command(tmp_path, str(data), "--fps", "2")) == 2

    assert "--fps) needs PyAV, which isn't installed: pip install 'raylift[video]'" in capsys.readouterr().err
    assert not (tmp_path / "out.zarr").exists()


def test_decoder_whose_libraries_are_missing_is_one_sentence(tmp_path, capsys, monkeypatch):
    data = write_tar(tmp_path / "in.tar", [("a.mp4", pretended("a", 1))])

    def broken(name: str, *_: object) -> object:
        if name == "av":
            raise ImportError("libavcodec.so.62: cannot open shared object file\n" + 40 * "a traceback\n")
        return real(name)

    real = importlib.import_module
    videos._library.cache_clear()
    monkeypatch.setattr(videos.importlib, "import_module", broken)

    assert run(command(tmp_path, str(data), "--fps", "2")) == 2

    said = capsys.readouterr().err
    assert "can't be loaded (libavcodec.so.62: cannot open shared object file): pip install" in said
    assert "traceback" not in said


@pytest.mark.parametrize("fps", ["0", "-1", "1e9", "0.0001"])
def test_rates_that_there_are_not(tmp_path, capsys, fps):
    with pytest.raises(SystemExit):
        run(command(tmp_path, str(tmp_path), "--fps", fps))

    assert "frames a second, from 0.001 to 1000" in capsys.readouterr().err


def test_flags_without_use(tmp_path, capsys):
    assert run(command(tmp_path, str(tmp_path), "--max-video-frames", "9")) == 2
    assert "it is used with --fps only" in capsys.readouterr().err
    assert run(command(tmp_path, str(tmp_path), "--image-member", "mp4")) == 2
    assert "that is a video; --fps 2" in capsys.readouterr().err


def test_limit_on_images_bytes_is_none_on_videos(clips, tiny, pretend):
    config = tiny(clips, fps=2, image_member="mp4", max_failed_fraction=1, max_image_bytes=1)

    assert extract(config.changed(max_image_bytes=10**6), InlineExecutor()).ok == 5
    assert extract(config, InlineExecutor()).this_run == 0


def test_guide_is_true(tmp_path, pretend, monkeypatch, capsys):
    section = (ROOT / "pipelines/GUIDE.md").read_text().split("## Videos")[1].split("\n## ")[0]
    (line,) = re.findall(r"```bash\npython jobs/extract.py (.*?)\n```", section, re.DOTALL)
    for t in range(2):
        write_tar(tmp_path / f"clips-{t:03d}.tar", [(f"{t}.mp4", pretended("a", 1))])
    monkeypatch.chdir(tmp_path)

    assert run([*shlex.split(line.replace("\\\n", " ")), "--executor", "inline", "--size", "64", "--weights", "random"]) == 0

    (code,) = re.findall(r"```py\n(.*?)```", section, re.DOTALL)
    exec(code, {})
    assert "[0.0, 0.5, 0.0, 0.5]" in capsys.readouterr().out


def test_every_word_of_show_knows_frames_by_their_keys(tmp_path, tiny, pretend, capsys):
    """Whose keys have a #, and here what else addresses and pages must quote."""
    name = "<q>&1%23 \"q'"
    tar = write_tar(tmp_path / "in.tar", [(f"{name}.mp4", pretended("a", 1))])
    config = tiny(str(tar), fps=2)
    extract(config, InlineExecutor())
    first, key = f"{name}#000000.000", f"{name}#000000.500"
    boxes = [{"id": i, "image_id": i, "category_id": 3, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0} for i in range(2)]
    images = [{"id": i, "file_name": file, "width": 64, "height": 48} for i, file in enumerate((first, f"frames/{key}.jpg"))]
    (tmp_path / "coco.json").write_text(
        json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 3, "name": "x"}]})
    )
    point = ["--key", key, "--point", "30", "20"]
    for argv in (
        ["export", "--out", str(tmp_path / "vectors")],
        ["export", "--out", str(tmp_path / "regions"), "--level", "x1", "--regions", str(tmp_path / "coco.json"), "--boxes"],
        ["nearest", *point, "--out", str(tmp_path / "nearest.png")],
        ["similar", *point, "--out", str(tmp_path / "similar.png")],
        ["view", "--rows", key, "--out", str(tmp_path / "view.png")],
        ["report", "--out", str(tmp_path / "report.html")],
        ["card"],
    ):
        assert show([argv[0], config.out, *argv[1:]]) == 0, capsys.readouterr().err

    store = FeatureStore.open(config.out)
    vector = pq.read_table(tmp_path / "regions")
    assert vector["key"].to_pylist() == [first, key]
    np.testing.assert_array_equal(vector["vector"][1].as_py(), store.pool(key, [(10, 10, 30, 30)], "x1")[0])
    assert set(pq.read_table(tmp_path / "vectors")["key"].to_pylist()) == {first, key}
    assert "<q>" not in (tmp_path / "report.html").read_text()
    assert "<q>" not in (Path(config.out) / "README.md").read_text()
    with browsing(store) as server:
        assert [card["key"] for card in ask(server, "/cards", find=key)["cards"]] == [key]


@pytest.mark.parametrize("where", ["s3", "http"])
def test_real_videos_are_read_by_ranges_wherever_they_lie(tmp_path, tiny, s3_options, serve, monkeypatch, where):
    """Names that URLs must quote; a plan, a run that stops, the one that goes on: the rows of a run on local files."""
    name = "a b#1%4"
    clip = video([drawn(i) for i in range(40)], rate=1, options={"crf": "1"})
    tar, plain = write_tar(tmp_path / "in/c#0.tar", [(f"{name}.mp4", clip), ("z.jpg", jpeg(1))]), tmp_path / "in/d é#2%.mov"
    plain.write_bytes(clip)
    local = tiny((str(tar), str(plain)), fps=0.1, levels=("x1",), block_rows=4)
    extract(local, InlineExecutor())
    base, options, data = "", {}, (str(tar), str(plain))
    if where == "s3":
        base, options = f"s3://{s3_options['bucket']}", s3_options["options"]
        for path in (tar, plain):
            Folder(f"{base}/in", options).write(path.name, path.read_bytes())
        data = tuple(f"{base}/in/{path.name}" for path in (tar, plain))
    else:
        base, _ = serve(_Ranged)
        data = tuple(f"{base}/in/{quote(path.name)}" for path in (tar, plain))
    out = f"{base}/far.zarr" if where == "s3" else str(tmp_path / "far.zarr")
    config = local.changed(data=data, out=out, storage_options=json.dumps(options))
    read: list[int] = []
    original = ranges.read_range

    def counting(options, url, start, end, *more):
        read.append(end - start)
        return original(options, url, start, end, *more)

    monkeypatch.setattr(ranges, "read_range", counting)
    monkeypatch.setattr(ranges.RangedFile, "FIRST", 2**12)
    monkeypatch.setattr(ranges.RangedFile, "LARGEST", 2**14)

    plan = make_plan(prepare(resolve(config), InlineExecutor()))
    assert (plan.videos, plan.frames, plan.images) == (2, 8, 9)
    read.clear()
    with dying_at_task(1):
        extract(config, InlineExecutor())
    assert extract(config, InlineExecutor()).this_run < 9

    assert 0 < max(read) <= 2**14 < len(clip) / 3
    here, there = FeatureStore.open(local.out), FeatureStore.open(config.out, options)
    assert read_all(there) == read_all(here)
    assert there.rows([f"{name}#000010.000"]).tolist() == [1]


def read_all(store: FeatureStore) -> list[object]:
    rows = store.records(slice(None), ["row", "key", "time", "digest", "status"]).to_pylist()
    # A file at a web address is called as that writes it.
    return [[row | {"key": unquote(row["key"])} for row in rows], store.read(slice(None), "x1").tobytes()]


def test_plan_as_json(clips, tmp_path, pretend, capsys):
    assert run(command(tmp_path, clips, "--fps", "0.5", "--plan", "--json")) == 0

    found = json.loads(capsys.readouterr().out)
    assert (found["videos"], found["frames"]) == (2, 3)
