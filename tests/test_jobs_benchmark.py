"""The benchmark runs and its numbers hang together. Nothing here asserts how fast anything is."""

import json
import tarfile
from pathlib import Path

import pytest

from jobs import benchmark
from pipelines.benchmark import STAGES, BenchmarkFailed, _steady, run_fresh


def test_extract_measures_all_four_side_by_side_and_their_features_agree(tmp_path, capsys):
    path = tmp_path / "numbers.json"

    code = benchmark.run(["extract", "debug", "--levels", "x1", "x2", "pooled", "--json", str(path)])

    assert code == 0
    printed = capsys.readouterr().out
    for row in (
        "(a) this pipeline, steady",
        "(a) this pipeline, whole run",
        "(b) bare forward",
        "(c) bound",
        "(d) the user's loop, steady",
        "(a) steady / (c) bound | 0.90",
        "(a) steady / (d) steady | 1.20",
        "peak memory (PSS)",
        "start-up",
        *STAGES,
    ):
        assert f"| {row}" in printed
    result = json.loads(path.read_text())
    [one] = result["rounds"]
    assert (one["pipeline"]["images"], one["loop"]["images"]) == (32, 32)
    for name in ("images_per_s", "steady_images_per_s", "seconds", "start_up_s"):
        assert one["pipeline"][name] > 0
        assert one["loop"][name] > 0
    assert one["pipeline"]["memory"]["workers"] > one["pipeline"]["memory"]["largest_worker"] > 0
    assert min(one["bare"]["stage_ms"].values()) > 0
    assert list(one["bare"]["stage_ms"]) == list(STAGES)
    assert one["bare"]["forward_threads_images_per_s"] > 0
    assert min(one["loop"]["cosine"][name] for name in ("x1", "x2", "pooled")) > 0.9999
    assert sorted(stage["stage"] for stage in result["gap"]["stages"]) == sorted(STAGES)


def test_index_counts_every_sample_and_leaves_nothing_behind(tmp_path, capsys):
    path = tmp_path / "numbers.json"
    (tmp_path / "work").mkdir()

    code = benchmark.run(["index", "debug", "--out", str(tmp_path / "work"), "--json", str(path)])

    assert code == 0
    assert "2,000 samples in 4 tars" in capsys.readouterr().out
    result = json.loads(path.read_text())
    assert (result["rows"], result["sources"]) == (2000, 4)
    assert result["tasks"] == 125
    assert result["parquet_bytes"] > 0
    assert min(result["memory"][name] for name in ("driver", "workers", "ray", "pss")) > 0
    assert list((tmp_path / "work").iterdir()) == []


def test_tiny_tars_are_what_tarfile_reads(tmp_path):
    benchmark.write_tiny_tars(tmp_path / "tars", samples=1003, tars=3)

    names = []
    for path in sorted((tmp_path / "tars").iterdir()):
        with tarfile.open(path) as tar:
            names += tar.getnames()

    assert names == [f"{number:09d}.jpg" for number in range(1003)]


def test_photos_are_the_same_bytes_every_time(tmp_path):
    for name in ("a", "b"):
        benchmark.write_photos(tmp_path / name, 14)

    first, second = (sorted((tmp_path / name).iterdir()) for name in ("a", "b"))

    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_steady_rate_counts_tasks_under_way_by_the_work_that_lies_in_the_window():
    seconds = {"read": 0.0, "decode": 2.0, "forward": 8.0}
    # Ten tasks of 10 images in one worker; each is decoded while the one before it computes.
    reports = [{"began": 8.0 * n, "ended": 8.0 * n + 16.0, "ok": 10, "seconds": seconds} for n in range(10)]

    steady = _steady(reports)

    assert steady["steady"] == {"start": 16.0, "stop": 88.0, "images": pytest.approx(8 * 10 + 8), "from": "end"}
    assert steady["steady_images_per_s"] == pytest.approx(88 / 72)


def test_process_that_dies_is_an_error_and_not_a_hang():
    with pytest.raises(BenchmarkFailed, match="_exit did not finish"):
        run_fresh(__import__("os")._exit, (3,))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["extrct"], "Did you mean 'extract'"),
        (["index", "debgu"], "Did you mean 'debug'"),
        (["extract", "debug", "--model", "vit_smal"], "no model 'vit_smal'"),
        (["extract", "debug", "--data", "/nowhere/x.tar"], "do not exist"),
        (["extract", "debug", "--model", "hiera_tiny_224.mae"], "hierarchical"),
    ],
)
def test_wrong_settings_end_with_code_2_and_say_what_to_do(argv, message, capsys):
    assert benchmark.run(argv) == 2
    assert message in capsys.readouterr().err


def test_a_folder_with_earlier_stores_is_refused(tmp_path, capsys):
    Path(tmp_path / "pipeline-0.zarr").mkdir()

    code = benchmark.run(["extract", "debug", "--images", "2", "--out", str(tmp_path)])

    assert code == 2
    assert "give another --out" in capsys.readouterr().err
