"""What `evaluate.py runtime` times, counts and shows; not how long anything takes."""

import ctypes
import dataclasses
import json

import numpy as np
import pytest
import timm
import torch

from operators.timm_models import Undrawn
from operators.upsamplers import build_net
from operators.upsamplers.vit_up.head import ViTUpConfig
from pipelines.config import ConfigError
from pipelines.costs import runtime
from pipelines.costs.clocks import held_bytes
from pipelines.costs.runtime import RuntimeConfig
from pipelines.costs.upsamplers import OperationCounts
from pipelines.costs.vit_up import head_macs
from pipelines.evaluation.run import run_pieces
from pipelines.executors import InlineExecutor
from pipelines.published.vit_up import VIT_UP_RUNTIME
from tests.pipelines.evaluation.test_evaluation import TINY, evaluate
from tests.pipelines.features.test_learned import checkpoint


def config(out, **changes) -> RuntimeConfig:
    settings = {"out": str(out), "size": 64, "grids": (8, 12), "warm_up": 1, "repeat": 2, "pictures": 0, **TINY}
    return RuntimeConfig.of(**{**settings, **changes})


def found_by(settings: RuntimeConfig, *devices: str):
    """The task, and findings of timings that are made up, on each device: each case takes 2 ms and 1 MiB."""
    task, recipe, _ = runtime.prepare(settings)
    made_up = {"seconds": [0.001, 0.003], "macs": 10**9, "bytes_before": 0, "peak_bytes": 2**20}
    found = []
    for device in devices or ("CPU, 1 threads",):
        records = [{"case": case.name, "device": device, **made_up} for case in task.cases]
        found.append(runtime.find(settings, task, recipe, records))
    return task, *found


@pytest.fixture
def undrawn(monkeypatch):
    """Weights of published sizes are what lies in memory: drawing 30 million takes a second, and none of this hangs on them."""
    create = timm.create_model

    def made(*args: object, **kwargs: object) -> torch.nn.Module:
        with Undrawn():
            return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", made)


@pytest.fixture
def uncounted(undrawn, monkeypatch):
    """Operations are made up, too: counting those of real sizes takes a second, and none of this hangs on them."""

    def made_up(*_, nets=(), **__) -> OperationCounts:
        each = dict.fromkeys(("alone", *(str(net["method"]) for net in nets)), 10**9)
        return OperationCounts(tokens=1, parameters={"backbone": 1, **each}, paper_count=each, macs=each)

    monkeypatch.setattr(runtime, "count_operations", made_up)


def test_a_line_for_each_method_grid_and_chunk(tmp_path):
    settings = config(tmp_path / "out", methods=("lift", "vit_up"), chunks=(0, 4, 12), pictures=1)

    records, findings = evaluate(runtime, settings)

    lines = {line.features: line for line in findings.tables[0].lines}
    assert [(name, line.grid) for name, line in lines.items()] == [
        ("low-res", "4x4"),
        ("bilinear x2", "8x8"),
        ("lift x2", "8x8"),
        ("vit_up x2", "8x8"),
        ("vit_up x2, 4 x 4 at once", "8x8"),
        ("bilinear x3", "12x12"),
        ("vit_up x3", "12x12"),
        ("vit_up x3, 4 x 4 at once", "12x12"),
        ("vit_up x3, 12 x 12 at once", "12x12"),
    ]
    assert "lift at 12 (lift gives 2, 4, 8, ... times" in findings.choices["left out"]
    for record, line in zip(records, lines.values(), strict=True):
        assert line.values[:3] == pytest.approx((1e3 * np.mean(record["seconds"]), 1e3 * np.median(record["seconds"]), 2))
        assert (line.input_px, line.stride, record["device"]) == ("64", 16, "CPU, 1 threads")
        assert record["peak_bytes"] is None or record["peak_bytes"] > 5e7  # torch alone is more
    macs = {record["case"]: record["macs"] for record in records}
    head = ViTUpConfig(channels=64, heads=1, layers=(0, 2, 4, 6), hidden_size=64, query_size=512)
    assert macs["vit_up x3"] - macs["vit_up x2"] == head_macs(head, (4, 4), 144) - head_macs(head, (4, 4), 64)
    assert macs["vit_up x3"] == macs["vit_up x3, 4 x 4 at once"] > macs["low-res"]
    assert macs["bilinear x2"] == macs["bilinear x3"] == macs["low-res"] < macs["lift x2"]
    saved = json.loads((tmp_path / "out/results.json").read_text())
    assert saved["details"]["timings"] == records
    assert set(saved["details"]["digests"]) == {"lift", "vit_up"}
    assert (tmp_path / "out/pictures/runtime.png").stat().st_size > 1000


def test_chunks_are_what_is_made_at_once(tmp_path):
    task, recipe, _ = runtime.prepare(config(tmp_path / "out", methods=("vit_up",), chunks=(3, 0)))

    chunks = {}
    for case in task.cases[2:4]:
        chunks[case.chunk] = task._upsampler(case, recipe.bundle((64, 64))).query_chunk()

    assert chunks[3] == 9
    assert chunks[0] > 1000


def test_slow_lines_get_fewer_passes(tmp_path):
    records, _ = evaluate(runtime, config(tmp_path / "out", grids=(8,), repeat=50, warm_up=50, row_s=1e-9))

    assert [len(record["seconds"]) for record in records] == [1, 1, 1]


@pytest.mark.usefixtures("undrawn")
def test_lifts_table_5_is_counted_and_shown_beside(tmp_path):
    dino = {"model": "vit_small_patch16_224.dino", "facet": "key", "pos_embed": "dino", "ragged": True}

    _, findings = found_by(config(tmp_path / "out", size=224, grids=(28,), paper=True, **dino, **without_model()))

    lines = findings.tables[1].lines
    assert [(line.features, line.grid, line.published) for line in lines] == [
        ("low-res", "14x14", False),
        ("LiFT Table 5, DINO's keys", "", True),
        ("lift x2", "28x28", False),
        ("LiFT Table 5, DINO's keys", "", True),
    ]
    counted = [tuple(None if value is None else round(value, 2) for value in line.values) for line in lines]
    assert counted == [(21.67, 4.34, 4.6), (None, 4.34, None), (1.19, 5.3, 5.35), (None, 5.3, None)]
    assert findings.choices["published"].startswith("Table 9 is of a GPU")
    assert not any(line.published for line in findings.tables[0].lines)


def without_model() -> dict[str, object]:
    return {name: value for name, value in TINY.items() if name != "model"} | {"methods": ("lift",)}


@pytest.mark.usefixtures("uncounted")
@pytest.mark.parametrize("changes", [{"facet": "token"}, {"layers": (5,)}, {"size": 208}, {"stride": 4}])
def test_table_5_does_not_stand_beside_what_it_is_not_of(tmp_path, changes):
    dino = {"model": "vit_small_patch16_224.dino", "facet": "key", "pos_embed": "dino", "ragged": True, "size": 224}
    settings = {**dino, **without_model(), "grids": (28,), "paper": True, **changes}

    _, findings = found_by(config(tmp_path / "out", **settings))

    assert not any(line.published for line in findings.tables[1].lines)
    assert findings.tables[1].notes[0].startswith("LiFT Table 5, DINO's keys has nothing of low-res at ")


@pytest.mark.usefixtures("uncounted")
def test_what_has_more_queries_than_its_grid_is_left_out_and_said(tmp_path):
    task, findings = found_by(config(tmp_path / "out", methods=("vit_up",), chunks=(12,)))

    assert findings.items.scored == {"lines": len(task.cases), "timed passes": 2 * len(task.cases)}
    (left_out,) = findings.items.left_out
    assert left_out.first == "vit_up at 8, 12 x 12 at once"
    assert "vit_up at 8, 12 x 12 at once (more at once than the grid has)" in findings.choices["left out"]


SPLUS = {"model": "vit_small_plus_patch16_dinov3.lvd1689m", "precision": "bf16", "size": 448, "device": "auto"}
"""What Table 9 is of."""


@pytest.mark.usefixtures("uncounted")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"size": 224, "precision": "fp32", "layers": (5,)},
            ("size published 448, here 224", "precision published 'bf16', here 'fp32'", "layers published [11], here [5]"),
        ),
        ({"size": 224, "model": "vit_small_plus_patch16_dinov3_qkvb.lvd1689m", "stride": 8}, ("stride published 16, here 8",)),
        ({"model": "test_vit.r160_in1k"}, ("model published 'vit_small_plus_patch16_dinov3', here 'test_vit'",)),
    ],
)
def test_table_9_does_not_stand_beside_what_it_is_not_of(tmp_path, changes, said):
    more = {"methods": (), "grids": (112,), "paper": True}

    _, findings = found_by(config(tmp_path / "out", **{**SPLUS, **more, **changes}), "NVIDIA H200")

    assert not any(line.published for line in findings.tables[0].lines)
    (note,) = findings.tables[0].notes
    assert note.startswith("ViT-Up Table 9 has nothing of this")
    assert [each for each in said if each not in note] == []


@pytest.mark.usefixtures("uncounted")
def test_table_9_stands_beside_what_a_gpu_took_and_never_beside_a_cpu(tmp_path):
    settings = config(tmp_path / "out", methods=("vit_up",), grids=(56, 112), chunks=(0, 112), paper=True, **SPLUS)

    _, on_gpu, on_cpu = found_by(settings, "NVIDIA H200", "CPU, 1 threads")

    names = [line.features for line in on_gpu.tables[0].lines if line.published]
    assert names == [
        "ViT-Up Table 9: vit_up x4, 112 x 112 at once",
        *(f"ViT-Up Table 9: {name}" for name in ("jafar", "anyup", "uplift", "naf")),
    ]
    lines = {line.features: line for line in on_gpu.tables[0].lines}
    assert lines[names[0]].values == (14.2, None, None, 503.7, 24.9, None)
    assert lines[names[4]].values == (29.1, None, None, 602.6, 0.662528, None)
    assert lines[names[4]].grid == "112x112"
    assert lines["vit_up x4"].values[:4] == (2.0, 2.0, 2, 1.0)
    assert on_gpu.tables[0].columns[3] == "peak MiB"
    assert on_cpu.tables[0].columns[3] == "peak RSS, MiB"
    assert not any(line.published for line in on_cpu.tables[0].lines)
    assert not any("LiFT" in note for note in on_cpu.tables[1].notes)
    assert {grid for values in VIT_UP_RUNTIME.rows.values() for grid in values} == {"112", "224", "448"}


@pytest.mark.usefixtures("undrawn")
def test_a_published_line_stands_below_the_settings_it_is_of(tmp_path, monkeypatch):
    monkeypatch.setitem(runtime.VIT_UP_RUNTIME.rows, "lift", {"112": {"ms": 7.0}})
    monkeypatch.setitem(runtime.VIT_UP_RUNTIME_SETTINGS, "lift", {"image_width": 96})
    plain = config(tmp_path / "out", methods=("lift",), grids=(112,), paper=True, **SPLUS)
    wide = plain.changed(settings=("lift.image_width=96",), out=str(tmp_path / "wide"))

    findings, as_published = (found_by(each, "NVIDIA H200")[1] for each in (plain, wide))

    assert "ViT-Up Table 9: lift x4" not in [line.features for line in findings.tables[0].lines]
    assert "nothing of low-res, bilinear x4, lift x4" in findings.tables[0].notes[1]
    (line,) = [line for line in as_published.tables[0].lines if line.features == "ViT-Up Table 9: lift x4"]
    assert line.values[0] == 7.0
    assert as_published.choices["weights"] == "backbone random, lift random with image_width 96"
    net = build_net({"method": "lift", "channels": 384, "patch": 16, "image_width": 96})
    (line,) = [line for line in as_published.tables[0].lines if line.features == "lift x4"]
    assert line.values[4] * 1e6 == sum(each.numel() for each in net.parameters())
    with pytest.raises(ConfigError, match="--settings: no such .* settings: wider"):
        runtime.prepare(plain.changed(settings=("lift.wider=true",), out=str(tmp_path / "wider")))


@pytest.mark.usefixtures("uncounted")
def test_timings_of_two_devices_are_no_table(tmp_path):
    settings = config(tmp_path / "out", methods=())
    task, recipe, folder = runtime.prepare(settings)
    records = run_pieces(settings, task, recipe, folder, InlineExecutor())
    records[1] |= {"device": "NVIDIA H200", "cpu": ""}

    with pytest.raises(ConfigError, match=r"timings of CPU, 1 threads, .* and of NVIDIA H200; give --out a new folder"):
        runtime.find(settings, task, recipe, records)

    records[1] |= {"device": "CPU, 1 threads", "cpu": "another one"}
    with pytest.raises(ConfigError, match=r"and of CPU, 1 threads, another one; give --out a new folder"):
        runtime.find(settings, task, recipe, records)


@pytest.mark.usefixtures("uncounted")
def test_timings_of_another_device_than_asked_for_are_refused(tmp_path):
    asked = config(tmp_path / "out", methods=(), device="cpu")

    with pytest.raises(ConfigError, match=r"--device cpu: \S+ has timings of NVIDIA H200; give --out a new folder"):
        found_by(asked, "NVIDIA H200")
    assert found_by(asked.changed(device="auto"), "NVIDIA H200")[1].tables[0].title.count("H200")


def test_checkpoints_are_timed_as_they_are(tmp_path):
    net = {"method": "lift", "channels": 64, "patch": 16, "wide": True}
    url = checkpoint(tmp_path / "wide", net)
    settings = config(tmp_path / "out", methods=(f"lift:{url}",), facet="key", grids=(8,))

    task, findings = found_by(settings)

    parameters = {line.features: line.values[4] for line in findings.tables[0].lines}
    assert parameters["lift x2"] * 1e6 == sum(each.numel() for each in build_net(net).parameters())
    random = runtime.prepare(dataclasses.replace(settings, methods=("lift",), out=str(tmp_path / "random")))[0]
    assert task.cases[2].row.digest != random.cases[2].row.digest
    assert findings.choices["weights"] == f"backbone random, lift {url}"


def test_the_network_that_weights_describe_is_counted(tmp_path):
    network = timm.create_model("test_vit", patch_size=8, depth=2, num_classes=0)
    timm.models.save_for_hf(network, str(tmp_path / "weights"), safe_serialization=True)

    _, findings = found_by(config(tmp_path / "out", weights=str(tmp_path / "weights"), grids=(16,)))

    timed, counted = (table.lines[0] for table in findings.tables)
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert (timed.grid, timed.values[4], counted.values[0]) == ("8x8", pytest.approx(millions), pytest.approx(millions))


def test_inputs_that_patches_do_not_fill(tmp_path):
    _, findings = found_by(config(tmp_path / "out", size=56, ragged=True, grids=(6,), methods=("lift",)))

    assert [line.grid for line in findings.tables[1].lines] == ["3x3", "6x6"]
    with pytest.raises(ConfigError, match="use another size, or --ragged"):
        runtime.prepare(config(tmp_path / "other", size=56))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stores": ("a.zarr",)}, "--stores: a store holds finished maps, which leaves nothing to time"),
        ({"levels": ("x1", "x2")}, "--levels is not for runtime"),
        ({"data": "photos"}, "--data is not for runtime"),
        ({"actors": 2}, "--actors 2: timings beside each other"),
        ({"methods": ("lanczos",)}, "--methods lanczos: there are bilinear"),
        ({"methods": ("bilinear:s3://key@bucket/a",)}, r"--methods bilinear:...: there are .* may have a checkpoint"),
        ({"methods": ("lift", "lift:a")}, "give each once"),
        ({"grids": ()}, "--grids must be at least 1"),
        ({"chunks": (-1,)}, "--chunks at least 0"),
        ({"settings": ("lift.wide",)}, "--settings lift.wide: give METHOD.NAME=VALUE"),
        ({"settings": ("jbu.radius=2",), "methods": ("lift",)}, "--settings jbu....: no method of --methods"),
        ({"settings": ("lift.wide=1",), "methods": ("lift:s3://bucket/lift",)}, "--settings lift....: no method"),
        ({"warm_up": 0}, "--warm-up 0: must be at least 1"),
    ],
)
def test_settings_that_cannot_be_meant(changes, message):
    with pytest.raises(ConfigError, match=message):
        RuntimeConfig.of(**changes)


def test_memory_is_that_of_the_call_alone():
    give_back = ctypes.CDLL(None).malloc_trim  # else arrays lie where this process had others before
    give_back(0)
    before, large = held_bytes(lambda: np.ones(2**27, np.uint8), torch.device("cpu"))
    if large is None:
        pytest.skip("this system doesn't tell a process's peak memory, or can't reset it")
    give_back(0)
    _, small = held_bytes(lambda: np.ones(2**10, np.uint8), torch.device("cpu"))

    assert large > before + 2**26  # the kernel counts in batches, and what was free is used first
    assert small < large - 2**26
