"""The benchmark runs and its numbers hang together. Nothing here asserts how fast anything is."""

import dataclasses
import importlib.util
import json
import tarfile
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from cluster.metrics import TaskReport
from jobs import benchmark
from operators.upsamplers.vit_up.head import ViTUpConfig
from pipelines.benchmarks import data as benchmark_data
from pipelines.benchmarks import read as read_benchmark
from pipelines.benchmarks.data import write_photos
from pipelines.benchmarks.extract import STAGES, BenchmarkFailed, _steady, in_new_processes
from pipelines.benchmarks.feeding import Feeding, feeding_report, measure_feeding
from pipelines.benchmarks.read import BestRate, PlaceRead, check
from pipelines.benchmarks.stores import Place, write_npy, write_store
from pipelines.config import ConfigError
from pipelines.costs import clocks as measure
from pipelines.costs import upsamplers as cost_benchmark
from pipelines.costs import vit_up as vit_up_benchmark
from pipelines.costs import windows as window_benchmark
from pipelines.costs.vit_up_report import vit_up_report
from pipelines.published.lift import LIFT_OPERATIONS
from tests.conftest import squeezed


@pytest.mark.usefixtures("forked_benchmarks")
def test_extract_measures_all_four_side_by_side_and_their_features_agree(tmp_path, capsys):
    path = tmp_path / "numbers.json"

    code = benchmark.run(["extract", "debug", "--levels", "x1", "x2", "pooled", "--json", str(path)])

    assert code == 0
    printed = squeezed(capsys.readouterr().out)
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


@pytest.mark.usefixtures("forked_benchmarks")
def test_feeding_counts_what_images_cost_in_the_loop_and_alone(tmp_path):
    config = Feeding(loaders=2, batch=4, steps=5, bare_s=0.1, size=64, model="test_vit.r160_in1k")

    fed = measure_feeding(config, tmp_path, write_photos(tmp_path / "photos", 12), ray=False)

    assert list(fed.loops) == ["threads"]
    assert len(fed.bare_each) == 2
    assert min(each.images_per_s for each in (*fed.bare_each, fed.bare, *fed.loops.values())) > 0
    assert fed.bare.cpu_ms > 0
    printed = squeezed("\n".join(feeding_report(config, fed)))
    assert "| threads |" in printed
    assert "| (CPUs alone, " in printed


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


@pytest.mark.usefixtures("forked_benchmarks")
def test_read_compares_contenders_on_the_same_rows_and_leaves_nothing_behind(tmp_path, capsys):
    path = tmp_path / "numbers.json"
    (tmp_path / "work").mkdir()

    code = benchmark.run(["read", "debug", "--out", str(tmp_path / "work"), "--json", str(path)])

    assert code == 0
    printed = squeezed(capsys.readouterr().out)
    for row in (
        "local: random rows | rows/s | MB/s | CPU s / 1,000 rows | rows read | of zarr by row |",
        "S3: random rows | rows/s | MB/s | CPU s / 1,000 rows | server's | rows read | of zarr by row |",
        "S3: shuffled / zarr-python, `array[row]` | 5.0",
        "local: shuffled / whole shards in order | 0.5",
        "local, 2,000 rows: read a row by its key",
        "S3: open the store",
    ):
        assert f"| {row}" in printed
    places = json.loads(path.read_text())["places"]
    assert {place: len(one["reads"]) for place, one in places.items()} == {"local": 5, "S3": 4}
    assert {place: len(one["epochs"]) for place, one in places.items()} == {"local": 7, "S3": 6}
    for place, rows in (("local", 96), ("S3", 48)):
        assert [one["rows"] for one in places[place]["reads"].values()] == [100] * len(places[place]["reads"])
        for one in places[place]["epochs"].values():
            assert (one["rows"], one["times"], one["done"], one["equal"]) == (rows, [1, 1], True, True)
            assert min(one["rows_per_s"], one["mb_per_s"], one["cpu_s_per_1000"]) > 0
    assert [sum(step["requests"].values()) for step in places["local"]["openings"]] == [0] * 6
    assert places["S3"]["openings"][0]["requests"] == {"GetObject": 1}
    assert list((tmp_path / "work").iterdir()) == []
    assert not [child for child in psutil.Process().children() if "moto" in " ".join(child.cmdline())]


def test_read_refuses_wrong_features_and_epochs_with_gaps_or_repeats(tmp_path):
    place = Place(name="local", url=str(tmp_path / "feats.zarr"), npy=str(tmp_path / "rows.npy"))
    write_npy(place.npy, (24, 2, 2, 8))
    write_store(place, 24)
    rows = np.arange(24)

    def contender(shift: int):
        return lambda place, order: ((order[i : i + 1], place.memmap()[order[i] - shift]) for i in range(len(order)))

    def found(order: np.ndarray, shift: int = 0):
        rate = BestRate(**vars(read_benchmark._timed(place, contender(shift), order, 60.0)), all=())
        return PlaceRead(rows=24, reads={}, epochs={"it": rate}, openings=())

    check(found(rows))
    with pytest.raises(BenchmarkFailed, match="gave other features than were written"):
        check(found(rows, shift=1))
    with pytest.raises(BenchmarkFailed, match="rows 0 to 1 times"):
        check(found(rows[1:]))
    with pytest.raises(BenchmarkFailed, match="rows 1 to 2 times"):
        check(found(np.append(rows, 3)))


def test_read_without_moto_says_what_to_install(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "moto" else find(name, *a))

    assert benchmark.run(["read", "debug", "--out", str(tmp_path)]) == 2

    assert "pip install 'moto[server]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_read_says_before_it_writes_that_the_disk_is_too_small(tmp_path, capsys):
    assert benchmark.run(["read", "debug", "--rows", "1000000000000", "--out", str(tmp_path)]) == 2

    assert "fewer --rows" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"s3": "minio"}, "use moto, none, or s3://bucket/prefix"),
        ({"rows": 8, "s3_rows": 9}, "--s3-rows must be at most --rows"),
        ({"reads": 0}, "--reads 0: must be at least 1"),
        ({"storage_options": "{"}, "not valid JSON"),
    ],
)
def test_read_refuses_settings_that_cannot_be_meant(settings, message):
    with pytest.raises(ConfigError, match=message):
        read_benchmark.ReadBenchmark(**settings)


def test_read_keeps_credentials_out_of_what_it_saves():
    options = '{"key": "access-name", "secret": "a-secret-value"}'

    saved = json.dumps(read_benchmark.ReadBenchmark(s3="s3://bucket/x", storage_options=options).public())

    assert "s3://bucket/x" in saved
    assert "access-name" not in saved
    assert "a-secret-value" not in saved


def test_cost_debug_counts_times_and_weighs_everything(tmp_path, capfd):
    path = tmp_path / "numbers.json"

    code = benchmark.run(["cost", "debug", "--json", str(path)])

    assert code == 0
    printed = squeezed(capfd.readouterr().out)
    for row in (
        "vit_small at 224 px, stride 16 | 21.7 + 1.19 M | 4.34 | 4.34 | 5.30 | 5.30 |",
        "64 px to 8 x 8 cells, batch 2, bf16 | parameters | ms per image | of alone | peak MB | of alone |",
        "64 px to 8 x 8 cells, batch 2, fp32 |",
        "backbone alone | ",
        *(f"with {name} | " for name in ("lift", "resize_conv", "jbu", "bilinear", "bicubic")),
    ):
        assert f"| {row}" in printed
    assert "random weights" in printed
    assert "+22 %" in printed
    result = json.loads(path.read_text())
    assert [one["precision"] for one in result["measured"]] == ["bf16", "fp32"]
    for one in result["measured"]:
        rows = {row["name"]: row for row in one["rows"]}
        assert list(rows) == ["backbone alone", "lift", "resize_conv", "jbu", "bilinear", "bicubic"]
        assert (rows["backbone alone"]["time_ratio"], rows["backbone alone"]["memory_ratio"]) == (1.0, 1.0)
        assert (rows["bilinear"]["parameters"], rows["resize_conv"]["parameters"]) == (0, 67 * 64 + 64)
        for row in rows.values():
            assert len(row["seconds"]) == 3
            assert row["ms_per_image"] == pytest.approx(1e3 * np.median(row["seconds"]) / 2)
            # At least the result: the map of 16 tokens of 64 channels, or of 64 cells, float32 but for autocast's.
            assert row["peak_bytes"] >= 2 * 64 * 16 * 2
            assert row["memory_ratio"] >= 1.0


def test_cost_counts_what_the_paper_prints():
    counts = [cost_benchmark._count(published) for published in LIFT_OPERATIONS]

    found = [tuple(round(one.paper_count[what] / 1e9, 2) for what in ("alone", "lift")) for one in counts]

    # LiFT with stride 8 is 19.65 and 81.18 in the paper (0.06 % and 0.3 % off); it prints no LiFT with ViT-B.
    assert found == [(4.34, 5.30), (16.07, 19.64), (17.28, 21.12), (66.60, 81.42), (17.21, 20.70)]
    assert [(one.alone, one.lift) for one in counts] == [
        (4.34, 5.30),
        (16.07, 19.65),
        (17.28, 21.12),
        (66.60, 81.18),
        (17.21, None),
    ]
    assert [one.parameters["lift"] for one in counts] == [1_187_280] * 4 + [4_417_296]
    assert [one.tokens for one in counts] == [197, 730, 785, 3026, 197]
    # Multiply-accumulates by hand: of LiFT, and of DINO with attention.
    assert [round(counts[i].macs["lift"] / 1e9, 3) for i in (0, 2, 4)] == [0.752, 3.010, 2.735]
    assert [counts[i].macs["alone"] / 1e9 for i in (0, 1, 2, 3)] == pytest.approx([4.6, 20.6, 22.6, 149.5], rel=0.01)


def test_cost_counts_by_the_rule_it_states():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=True), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2)
    )
    images = torch.zeros(1, 3, 4, 4)

    assert cost_benchmark.paper_count(net, images) == 16 * 8 * (27 + 1) + 4 * 16 * 8 + 64 * 4 * (8 * 4 + 1)
    tokens = nn.Sequential(nn.Linear(8, 5), nn.LayerNorm(5), nn.GELU())
    assert cost_benchmark.paper_count(tokens, torch.zeros(1, 7, 8)) == 7 * 5 * 8 + 4 * 7 * 5
    assert not any(module._forward_hooks for module in (*net, *tokens))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--size", "60"], "the nearest that is: 64"), (["--size", "16"], "at 16 px: jbu of radius 3 needs more cells than 1x1")],
)
def test_cost_refuses_sizes_that_cannot_be_had(arguments, message, capsys):
    assert benchmark.run(["cost", "debug", *arguments]) == 2

    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"upsamplers": ("lift", "bilinaer")},
            "--upsamplers bilinaer: there are bilinear, bicubic, nearest, lift, resize_conv, jbu, ",
        ),
        ({"upsamplers": ("average",)}, "--upsamplers average: there are"),
        ({"repeat": 0}, "must be at least 1"),
        ({"precisions": ()}, "--precisions at least one"),
    ],
)
def test_cost_refuses_settings_that_cannot_be_meant(settings, message):
    with pytest.raises(ConfigError, match=message):
        cost_benchmark.CostBenchmark(**settings)


def test_cost_vit_up_debug_times_and_weighs_every_grid_and_chunk(tmp_path, capfd):
    path = tmp_path / "numbers.json"

    code = benchmark.run(["cost", "debug", "--vit-up", "--json", str(path)])

    assert code == 0
    printed = squeezed(capfd.readouterr().out)
    result = json.loads(path.read_text())
    grids = {
        (row["method"], row["grid"], row["queries"]): (row["parameters"], row["call_bytes"], row["declared_bytes"])
        for row in result["rows"]
    }
    assert list(grids) == [
        ("backbone alone", 4, None),
        ("bilinear", 8, None),
        ("lift", 8, None),
        ("ViT-Up", 8, 64),
        ("ViT-Up", 8, 16),
        ("bilinear", 12, None),  # LiFT can't: 12 isn't 4 times a power of two
        ("ViT-Up", 12, 144),
        ("ViT-Up", 12, 16),
    ]
    for (method, grid, queries), (parameters, of_call, declared) in grids.items():
        label = f"| {grid} x {grid}: {method}" + (f", {queries} queries at once |" if queries else " |")
        assert printed.count(label) == 2
        if method != "backbone alone":
            assert 4 * 64 * grid**2 <= of_call <= 1.3 * declared
        if method == "ViT-Up":
            assert parameters == result["parameters"]["head"] + result["parameters"]["lora"]
    for row in result["rows"]:
        assert len(row["seconds"]) == 2
        assert row["ms"] == pytest.approx(1e3 * np.median(row["seconds"]))
        assert row["peak_bytes"] >= result["rows"][0]["parameters"] * 4
    [window] = result["windows"]
    assert (window["window"], window["channels"], window["tokens"], window["grid"]) == (3, 64, [4, 4], 16)
    assert (len(window["seconds"]["head"]), len(window["seconds"]["gather"])) == (2, 2)
    assert 0 < window["largest_difference"] < 1e-4 * window["largest_value"]
    assert "| gather for each query, then attend |" in printed
    assert "all queries at once take" in printed
    assert "Left out" not in printed


def test_cost_vit_up_counts_what_the_paper_prints():
    config = vit_up_benchmark.ViTUpBenchmark(size=32, query_size=32)
    parameters = vit_up_benchmark._build(config, torch.device("cpu"), "fp32").parameters

    # ViT-Up's Table 9 has 24.9 M for both.
    assert (parameters["head"], parameters["lora"]) == (24_273_792, 608_256)
    assert parameters["backbone alone"] == 28_692_480
    # ViT-S+ and ViT-B at 448 px: M for each query, and G for each image and at 56, 112, 224 and 448 cells a side.
    for channels, of_query, once, totals in (
        (384, 26.03, 1.387, (83, 328, 1308, 5226)),
        (768, 96.59, 5.549, (308, 1217, 4852, 19392)),
    ):
        each, fixed = vit_up_benchmark.published_macs(channels, 28 * 28)
        assert (round(each / 1e6, 2), round(fixed / 1e9, 3)) == (of_query, once)
        assert [round((each * side**2 + fixed) / 1e9) for side in (56, 112, 224, 448)] == pytest.approx(totals, abs=1)


def test_cost_vit_up_counts_what_runs_as_the_formula_but_for_decoders_it_leaves_out():
    settings = ViTUpConfig(channels=384, heads=6)

    counted = vit_up_benchmark.head_macs(settings, (28, 28), 112**2)

    each, once = vit_up_benchmark.published_macs(384, 28 * 28)
    assert counted == 112**2 * (each - 6 * 384**2) + once


def test_cost_vit_up_leaves_slow_grids_out_on_a_cpu_and_says_so(monkeypatch):
    debug = vit_up_benchmark.DEBUG
    config = dataclasses.replace(debug, grids=(), chunks=(0,), repeat=1, windows=(), device="cpu")
    monkeypatch.setattr(vit_up_benchmark, "CPU_GRIDS", (8,))

    result = vit_up_benchmark.measure_vit_up(config)

    assert result.left_out == (56, 112, 224, 448)
    assert {row.grid for row in result.rows} == {4, 8}
    printed = "\n".join(vit_up_report(config, result, measure.machine()))
    assert "Left out: 56 x 56, 112 x 112, 224 x 224, 448 x 448 (--grids 56 112 224 448 has all" in printed
    assert "gather" not in printed


def test_cost_gives_slow_rows_fewer_runs(monkeypatch):
    monkeypatch.setattr(measure, "seconds_of", lambda run, device: run())

    seconds = measure.timed((lambda: 1.0, lambda: 4.0, lambda: 60.0), 5, 10.0, torch.device("cpu"))

    assert seconds == [[1.0] * 5, [4.0] * 2, [60.0]]
    assert measure.median_ratio(seconds[1], seconds[0]) == 4.0


def test_windows_that_do_not_give_what_gathering_gives_are_no_result(monkeypatch):
    gather = window_benchmark.gather_then_attend
    monkeypatch.setattr(window_benchmark, "gather_then_attend", lambda *args: gather(*args) + 0.01)
    settings = ViTUpConfig(channels=32, heads=2, layers=(0, 1, 2), window=3)

    with pytest.raises(BenchmarkFailed, match="with a window of 3 the head and gathering differ by 0.01"):
        window_benchmark.compare_window(settings, (4, 4), 16, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--size", "60"], "the nearest that is: 64"), (["--model", "resnet18"], "timm's resnet18 isn't built for a size of input")],
)
def test_cost_vit_up_refuses_models_and_sizes_that_cannot_be_had(arguments, message, capsys):
    assert benchmark.run(["cost", "debug", "--vit-up", *arguments]) == 2

    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grids": (56, 0)}, "--grids, --windows and --window-... must be at least 1"),
        ({"windows": (0,)}, "--windows and --window-... must be at least 1"),
        ({"chunks": (-1,)}, "--chunks .at least one. and --repeat must be at least 0"),
        ({"chunks": ()}, "--chunks .at least one."),
        ({"row_s": 0.0}, "--row-s above 0"),
    ],
)
def test_cost_vit_up_refuses_settings_that_cannot_be_meant(settings, message):
    with pytest.raises(ConfigError, match=message):
        vit_up_benchmark.ViTUpBenchmark(**settings)


def test_tiny_tars_are_what_tarfile_reads(tmp_path):
    benchmark_data.write_tiny_tars(tmp_path / "tars", samples=1003, tars=3)

    names = []
    for path in sorted((tmp_path / "tars").iterdir()):
        with tarfile.open(path) as tar:
            names += tar.getnames()

    assert names == [f"{number:09d}.jpg" for number in range(1003)]


def test_photos_are_the_same_bytes_every_time(tmp_path):
    for name in ("a", "b"):
        benchmark_data.write_photos(tmp_path / name, 14)

    first, second = (sorted((tmp_path / name).iterdir()) for name in ("a", "b"))

    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_steady_rate_counts_tasks_under_way_by_the_work_that_lies_in_the_window():
    seconds = {"read": 0.0, "decode": 2.0, "forward": 8.0}
    # Ten tasks of 10 images in one worker; each is decoded while the one before it computes.
    tasks = [TaskReport(block=n, ok=10, seconds=seconds, marks={"began": 8.0 * n, "ended": 8.0 * n + 16.0}) for n in range(10)]

    steady = _steady(tasks)

    assert (steady.start, steady.stop, steady.images, steady.opens) == (16.0, 88.0, pytest.approx(8 * 10 + 8), "end")
    assert steady.images / steady.seconds == pytest.approx(88 / 72)


def test_process_that_dies_is_an_error_and_not_a_hang():
    with pytest.raises(BenchmarkFailed, match="_exit did not finish"):
        in_new_processes(__import__("os")._exit, (3,))


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


def test_numbers_that_could_not_be_written_are_not_measured(tmp_path, capsys):
    for path in (tmp_path, tmp_path / "no" / "a.json", Path(__file__) / "a.json"):
        assert benchmark.run(["extract", "debug", "--json", str(path)]) == 2
        assert f"--json {path} can't be written; give a file in a folder that is there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("benchmark_of", "left"),
    [
        *(("extract", left) for left in ("pipeline-0.zarr", "pipeline-1.zarr", "loop-1.zarr", "photos")),
        *(("autoscale", left) for left in ("feats.zarr", "photos")),
    ],
)
def test_a_folder_with_what_an_earlier_benchmark_left_is_refused(tmp_path, capsys, benchmark_of, left):
    """Also of a later round: one that was stopped would be continued, and its finished part counted as done in no time."""
    Path(tmp_path / left).mkdir()

    code = benchmark.run([benchmark_of, "debug", "--images", "2", "--out", str(tmp_path)])

    assert code == 2
    assert f"holds an earlier benchmark's {left}; remove them, or give another --out" in capsys.readouterr().err


def test_readout_trains_the_same_from_a_store_and_says_how_much_faster(tmp_path, capsys):
    path = tmp_path / "numbers.json"

    assert benchmark.run(["readout", "debug", "--methods", "linear", "--json", str(path)]) == 0
    assert "| linear |" in squeezed(capsys.readouterr().out)
    result = json.loads(path.read_text())
    assert result["largest difference of losses"] < 1e-6
    assert all(rate > 0 for rates in result["rates"]["linear"].values() for rate in rates)
    with pytest.raises(SystemExit):
        benchmark.run(["readout", "--steps", "2"])
    assert "--steps 2: must be at least 3" in capsys.readouterr().err
