"""A grid of readouts: cells are training runs, tables hold what they measured, and what fails ends nothing else."""

import itertools
import json
import re
import shutil
import statistics
import threading
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
import timm

from jobs import tables as job
from operators.backbone import TimmBackbone
from pipelines.config import ConfigError
from pipelines.costs import speed
from pipelines.costs.speed import Speed
from pipelines.executors import InlineExecutor, RayExecutor
from pipelines.published.deap import DEAP_RESULTS, DEAP_TASKS
from pipelines.tables import grid_run as doing
from pipelines.tables.backbones import BACKBONES, BY_NAME, PaperBackbone
from pipelines.tables.doing import CellsFailed
from pipelines.tables.grid import entries, main, report, scatter, write_grid
from pipelines.tables.grid_cells import CellResult, GridConfig, plan_cells
from pipelines.tables.grid_run import run_cell, run_cells
from pipelines.tables.speeds import measure_speeds
from pipelines.tables.tasks import PUBLISHED, find_task, published_values
from pipelines.training.loop import read_metrics
from pipelines.training.readout import ReadoutTraining
from pipelines.training.run import train_inline
from storage.paths import Folder
from tests.conftest import loud_weights, squeezed
from tests.readout_runs import extract, featup_file, held_out, losses
from tests.stops import Died, dies_after

VIT = "test_vit.r160_in1k@64"
SLUG = "test_vit.r160_in1k-64"


def tiny_grid(sets: Path, where: Path, **changes: object) -> GridConfig:
    """Four steps of three images a cell, at 64 px."""
    values: dict[str, object] = {
        "out": str(where),
        "backbones": (VIT,),
        "tasks": ("voc",),
        "methods": ("linear",),
        "data": (f"voc={sets}/VOC2012", f"coco={sets}/coco", f"nyu={sets}/NYU"),
        "weights": "random",
        "max_steps": 4,
        "cell": cells_with(),
        "speed_reference": "test_vit.r160_in1k",
        "speed_reference_size": 32,
        "speed_batch": 1,
        "speed_batches": 2,
        "executor": "inline",
        "device": "cpu",
        **changes,
    }
    return GridConfig.of(**values)


def cells_with(**changes: object) -> ReadoutTraining:
    settings = {"side": 64, "batch": 3, "lr": 1e-2, "precision": "fp32", "checkpoint_every": 2, "validate_every": 4}
    return ReadoutTraining.of(**{**settings, "log_every": 1, **changes})


def run(config: GridConfig) -> list[CellResult]:
    return run_cells(config, plan_cells(config), InlineExecutor())


# --- what cells are ---------------------------------------------------------------------------------------------------


def test_published_settings_reach_the_runs(sets, tmp_path):
    config = tiny_grid(
        sets,
        tmp_path,
        backbones=("siglip-so", "untrained"),
        tasks=("voc", "coco-stuff", "depth"),
        methods=("deap-8-dim", "linear"),
        data=("voc=v", "coco_stuff=c", "nyu=s3://bucket/nyu"),
        max_steps=None,
        weights="s3://bucket/{backbone}.safetensors",
        cell=cells_with(batch=16, epochs=7),
    )

    cells = {cell.name: cell.training for cell in plan_cells(config)}

    assert len(cells) == 2 * 3 * 2
    voc = cells["siglip-so-voc-deap-8-dim-0"]
    assert (voc.features.model, voc.features.size, voc.features.ragged) == ("vit_so400m_patch14_siglip_384.webli", 512, True)
    assert (voc.placement, voc.max_steps, voc.dim, voc.batch, voc.epochs) == ("squash", 10_000, 8, 16, 7)
    weights = voc.features.weights, cells["untrained-voc-linear-0"].features.weights
    assert weights == ("s3://bucket/siglip-so.safetensors", "random")
    stuff = cells["untrained-coco-stuff-deap-8-dim-0"]
    assert (stuff.outputs, stuff.width, stuff.limit) == (200, 32, 100_000)
    assert cells["untrained-coco-stuff-linear-0"].width is None
    assert (cells["untrained-depth-linear-0"].data, voc.data) == ("s3://bucket/nyu", str(Path("v").resolve()))


def test_what_a_template_of_weights_names_is_said(sets, tmp_path, caplog):
    caplog.set_level("INFO")
    config = tiny_grid(sets, tmp_path, backbones=("test_vit.r160_in1k@112",), weights=str(tmp_path / "{backbone}.safetensors"))

    plan_cells(config)

    assert f"--weights of test_vit.r160_in1k@112: {tmp_path}/test_vit.r160_in1k-112.safetensors" in caplog.text


def test_stores_are_named_by_backbone_data_set_and_part(sets, tmp_path):
    config = tiny_grid(sets, tmp_path, tasks=("probe-voc", "boundaries"), store="s3://bucket/{backbone}-{dataset}-{part}.zarr")

    voc, coco = (cell.training for cell in plan_cells(config))

    assert (voc.store, voc.val_store) == (f"s3://bucket/{SLUG}-voc-train.zarr", f"s3://bucket/{SLUG}-voc-val.zarr")
    assert (coco.store, coco.val_store) == tuple(f"s3://bucket/{SLUG}-coco-{part}2017.zarr" for part in ("train", "val"))
    assert not voc.flip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbones": ()}, "--backbones: give at least one"),
        ({"backbones": ("sam2",)}, "timm lacks its neck"),
        ({"seeds": (1, 1)}, "different ones"),
        ({"methods": ("depe",)}, "--methods depe: there are deap"),
        ({"tasks": ("vox",)}, "Did you mean voc"),
        ({"tasks": ("segmentation:imagenet",)}, "no data set is called 'imagenet'"),
        ({"tasks": ("depth:voc",)}, "--task depth needs depth"),
        ({"tasks": ("voc",), "methods": ("depth_bins",)}, "depth_bins predicts depth"),
        ({"tasks": ("coco-stuff",)}, "--data lacks coco_stuff"),
        ({"data": ("voc",)}, "use DATASET=FOLDER"),
        ({"out": ""}, "no output"),
        ({"store": "{backbone}.zarr", "tasks": ("voc", "boundaries")}, "with several datasets"),
        ({"store": "{model}.zarr"}, "{model} means nothing"),
        ({"weights": "{model}.pth"}, "--weights {model}.pth: {model} means nothing; use {backbone}"),
        ({"store": "{backbone.zarr"}, "expected '}'"),
        ({"cell": ReadoutTraining.of(model="x", max_steps=3)}, "--cell.max-steps, --cell.model: the grid decides it"),
        ({"cell": ReadoutTraining.of(seed=0)}, "--cell.seed: the grid decides it"),
        ({"cell_gpus": 0.0}, "--cell-gpus 0: must be a part of one GPU"),
        ({"cell_gpus": 1.5}, "--cell-gpus 1.5: must be a part of one GPU, or a whole number of them"),
        (
            {"cell": cells_with(flip=True), "store": "{backbone}-{dataset}.zarr", "tasks": ("probe-voc", "boundaries")},
            "--cell.flip would change nothing here: features of a store aren't those of the mirrored image. Leave it out",
        ),
        ({"cell": cells_with(samples=9)}, "--cell.samples 9 would change nothing here: it is used with --task instances only"),
        ({"executor": "ray", "out": "memory://grid"}, "one process only"),
    ],
)
def test_mistakes_are_found_before_anything_runs(sets, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan_cells(tiny_grid(sets, tmp_path, **changes))


# --- cells in turn ----------------------------------------------------------------------------------------------------


def test_every_task_fills_its_columns(sets, tmp_path):
    config = tiny_grid(
        sets,
        tmp_path,
        tasks=("instances", "boundaries", "detection", "voc", "depth"),
        max_steps=1,
        cell=cells_with(side=112, samples=64, large_area=100.0, many=1),
    )

    found = entries(plan_cells(config), run(config))

    assert [(entry.task.name, len(entry.scores)) for entry in found] == [
        ("instances", 1), ("boundaries", 2), ("detection", 1), ("voc", 2), ("depth", 1)
    ]  # fmt: skip
    assert all(score is not None for entry in found for score in entry.scores)


def test_tables_hold_what_the_runs_measured(sets, tmp_path):
    config = tiny_grid(sets, tmp_path, methods=("deap", "linear"), seeds=(3, 4), weights="random:7")
    cells = plan_cells(config)
    results = run_cells(config, cells, InlineExecutor())
    speeds = measure_speeds(config, cells, results, InlineExecutor())

    text = write_grid(config.folder, config, cells, results, speeds)

    runs = [held_out(str(tmp_path / f"{SLUG}-voc-deap-{seed}")) for seed in (3, 4)]
    shares = [100 * each["miou"] for each in runs]
    iou = f"{statistics.fmean(shares):.1f} ± {statistics.stdev(shares):.1f}"
    error = [each["loss"] for each in runs]
    entropy = f"{statistics.fmean(error):.4f} ± {statistics.stdev(error):.4f}"
    row = next(line for line in text.splitlines() if line.startswith(f"| {VIT}"))
    speed = f"{speeds[VIT].relative:.2f}"
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [VIT, "64", "4", entropy, iou, "0.012", speed]
    assert f"## Methods on {VIT}" in text
    assert re.search(rf"\| {re.escape(VIT)}, deap +\| 12,072 \|", text)
    saved = json.loads((tmp_path / "grid.json").read_text())
    assert [cell["metrics"]["val_miou"] for cell in saved["cells"][:2]] == [each["miou"] for each in runs]
    assert saved["speed"][VIT]["batches"] == 2
    assert saved["config"]["cell"]["batch"] == 3
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "grid.md").read_text() == text


def test_what_is_done_is_not_done_again(sets, tmp_path, monkeypatch):
    config = tiny_grid(sets, tmp_path, methods=("deap", "linear"))
    cells, first = plan_cells(config), run(config)
    speeds = measure_speeds(config, cells, first, InlineExecutor())
    monkeypatch.setattr(doing, "train_inline", lambda setup: pytest.fail("trained again"))
    monkeypatch.setattr(speed, "measure_speed", lambda *args: pytest.fail("measured again"))

    second = run(config)

    assert [each.metrics for each in second] == [each.metrics for each in first]
    assert measure_speeds(config, cells, second, InlineExecutor()) == speeds


@pytest.mark.parametrize("change", [{"cpu": "another one"}, {"device": "CPU, 64 threads"}])
def test_speeds_of_a_table_are_of_one_machine(sets, tmp_path, change):
    """A backbone that comes to those of another machine, or of an earlier version, has them measured again."""
    config, both = tiny_grid(sets, tmp_path), ("test_vit.r160_in1k@32", VIT)
    measure_speeds(config, plan_cells(config), run(config), InlineExecutor())
    path = tmp_path / "speed.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | {"found": {VIT: {**written["found"][VIT], **change, "images_per_s": 1e9}}}))
    config = config.changed(backbones=both)

    speeds = measure_speeds(config, plan_cells(config), run(config), InlineExecutor())

    assert list(speeds) == list(both)
    assert len({each.where for each in speeds.values()}) == 1
    assert speeds[VIT].images_per_s < 1e9
    assert speeds[VIT].cpu
    again = measure_speeds(config, plan_cells(config), run(config), InlineExecutor())
    assert again == speeds


@pytest.mark.parametrize("change", [{"device": "cuda"}, {"threads": 64}, None])
def test_speeds_of_another_device_are_measured_again(sets, tmp_path, change):
    config = tiny_grid(sets, tmp_path)
    cells, results = plan_cells(config), run(config)
    measure_speeds(config, cells, results, InlineExecutor())
    path = tmp_path / "speed.json"
    written = json.loads(path.read_text())
    if change is None:  # as an earlier version wrote it
        del written["protocol"]["device"], written["protocol"]["threads"]
    written["protocol"] |= change or {}
    written["found"][VIT]["images_per_s"] = 1e9
    path.write_text(json.dumps(written))

    assert measure_speeds(config, cells, results, InlineExecutor())[VIT].images_per_s < 1e9


def test_a_picture_of_earlier_scores_does_not_stay(sets, tmp_path):
    list(main(tiny_grid(sets, tmp_path)))
    assert (tmp_path / "grid.png").exists()

    *_, last = main(tiny_grid(sets, tmp_path, speed=False))

    assert not (tmp_path / "grid.png").exists()
    assert "grid.png" not in last + (tmp_path / "grid.md").read_text()


def test_what_an_earlier_version_did_counts(sets, tmp_path, monkeypatch):
    """Whose run says less of what it was made of."""
    config = tiny_grid(sets, tmp_path)
    (cell,) = plan_cells(config)
    (first,) = run(config)
    path = Path(cell.training.out) / "run.json"
    written = json.loads(path.read_text())
    for name in ("label_frame", "depth_scale", "numbers", "images_content", "labels_content"):
        del written["identity"][name]
    path.write_text(json.dumps(written))
    monkeypatch.setattr(doing, "_train", lambda *_: pytest.fail("entered again"))

    (second,) = run(config)

    assert (second.metrics, second.error) == (first.metrics, "")


def test_a_network_that_its_weights_describe_is_the_one_that_is_timed(sets, tmp_path, monkeypatch):
    network = timm.create_model("test_vit", patch_size=8)
    timm.models.save_for_hf(network, str(tmp_path / "weights"), safe_serialization=True)
    config = tiny_grid(sets, tmp_path / "grid", weights=str(tmp_path / "weights"))
    results, patches = run(config), []
    monkeypatch.setattr(
        speed, "TimmBackbone", lambda model, **_: patches.append(model.patch_embed.patch_size[0]) or TimmBackbone(model)
    )

    speeds = measure_speeds(config, plan_cells(config), run(config), InlineExecutor())

    assert [each.grid for each in results] == [(8, 8)]
    assert patches == [8, 16]
    assert speeds[VIT].of == ("test_vit.r160_in1k", 64, {"patch_size": 8})


def test_an_interrupted_cell_goes_on_from_its_checkpoint(sets, tmp_path, monkeypatch):
    config = tiny_grid(sets, tmp_path / "grid", max_steps=8)
    (cell,) = plan_cells(config)
    with monkeypatch.context() as patched:
        patched.setattr(doing, "train_inline", lambda setup: train_inline(replace(setup, on_step=dies_after(5))))
        with pytest.raises(Died):
            run_cell(cell)
    written = losses(cell.training.out)
    assert len(written) == 4
    (whole,) = run(tiny_grid(sets, tmp_path / "whole", max_steps=8))

    (result,) = run(config)

    assert losses(cell.training.out)[:4] == written
    assert result.metrics == whole.metrics
    assert result.steps == 8


def test_more_steps_go_on_and_other_settings_are_refused(sets, tmp_path):
    run(tiny_grid(sets, tmp_path))

    (longer,) = run(tiny_grid(sets, tmp_path, max_steps=6))
    (other,) = run(tiny_grid(sets, tmp_path, cell=cells_with(lr=0.5)))

    assert (longer.steps, len(losses(str(tmp_path / f"{SLUG}-voc-linear-0")))) == (6, 6)
    assert "was begun with other settings" in other.error
    assert "lr" in other.error


def test_a_cell_that_fails_is_told_and_ends_nothing(sets, tmp_path):
    secret = {"s3": {"secret": "very-secret-value"}}
    (tmp_path / "very-secret-value").mkdir()
    config = tiny_grid(
        sets,
        tmp_path,
        tasks=("boundaries", "voc"),
        data=(f"coco={tmp_path}/very-secret-value", f"voc={sets}/VOC2012"),
        storage_options=json.dumps(secret),
        speed=False,
    )

    lines = []
    with pytest.raises(CellsFailed, match="1 of 2 runs failed"):
        lines.extend(main(config))

    text = (tmp_path / "grid.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith(f"| {VIT}"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[3:5] == ["failed", "failed"]
    assert float(cells[5]) > 0
    assert f"- {SLUG}-boundaries-linear-0: DatasetError: " in text
    assert "very-secret-value" not in text + "".join([(tmp_path / "grid.json").read_text(), *lines])
    assert not (tmp_path / "grid.png").exists()


def test_stores_are_read_instead_of_the_model(sets, tiny, tmp_path):
    images = sets / "VOC2012/VOCdevkit/VOC2012/JPEGImages"
    extract(tiny, tmp_path / f"{SLUG}-voc.zarr", images, geometry="squash")
    config = tiny_grid(sets, tmp_path / "grid", methods=("deap", "linear"), store=str(tmp_path / "{backbone}-{dataset}.zarr"))

    done = run(config)

    assert [each.error for each in done] == ["", ""]
    assert [each.grid for each in done] == [(4, 4), (4, 4)]


def test_a_store_of_another_backbone_is_refused(sets, tiny, tmp_path):
    images = sets / "VOC2012/VOCdevkit/VOC2012/JPEGImages"
    extract(tiny, tmp_path / "other.zarr", images, geometry="squash")

    (result,) = run(tiny_grid(sets, tmp_path / "grid", backbones=("test_vit2.r160_in1k@64",), store=str(tmp_path / "other.zarr")))

    assert "model store 'test_vit.r160_in1k' asked 'test_vit2.r160_in1k'" in result.error


# --- reports ----------------------------------------------------------------------------------------------------------


def test_papers_numbers_are_complete():
    assert set(DEAP_RESULTS.rows) == {each.name for each in BACKBONES}
    for backbone in DEAP_RESULTS.rows:
        for task in DEAP_TASKS:
            heads = [column.head for column in PUBLISHED[task].columns]
            assert list(published_values(BY_NAME[backbone], "deap", task)) == heads
    assert published_values(BY_NAME["mae"], "deap-no-sigma", "voc") == {"IoU": 35.1}
    assert published_values(BY_NAME["siglip-384"], "deap-only-mask", "depth") == {"RMSE": 0.6378}
    assert published_values(BY_NAME["dino"], "deap-only-mask", "depth") == {}


def test_probes_are_published_at_448_px_alone():
    name = "vit_small_plus_patch16_dinov3.lvd1689m"

    at_448, at_224 = (PaperBackbone(name=f"{name}@{size}", label=name, model=name, size=size) for size in (448, 224))

    assert published_values(at_448, "linear", "probe-voc") == {"mIoU": 84.88, "acc": 96.45}
    assert published_values(at_224, "linear", "probe-voc") == {}
    assert [column.head for column in PUBLISHED["probe-voc"].columns] == ["mIoU", "acc"]


def test_a_run_by_the_papers_recipe_is_of_its_settings(sets, tmp_path):
    changes = {"backbones": ("mae", "untrained"), "methods": ("deap", "deap-8-dim"), "weights": "pretrained", "max_steps": None}
    config = tiny_grid(sets, tmp_path, **changes, cell=ReadoutTraining(), paper=True)
    cells = plan_cells(config)

    found = entries(cells, [CellResult(**{**asdict(doing._empty(cell)), "error": "not run"}) for cell in cells])

    assert [bool(entry.other_settings) for entry in found] == [False] * 4
    text = report(config, found, {}, [])
    assert "of other settings" not in text
    assert "- Nothing is published of untrained, deap-8-dim, VOC." in text


def test_published_rows_stand_below_measured_ones(sets, tmp_path):
    config = tiny_grid(sets, tmp_path, backbones=("mae",), methods=("deap",), paper=True, seeds=(0, 1))
    cells = plan_cells(config)
    given = {"name": "", "backbone": "mae", "task": "voc", "method": "deap"}
    metrics = {"val_loss": 0.3512345, "val_miou": 0.60449}
    results = [
        CellResult(**given, seed=0, metrics=metrics, parameters=47_272, grid=(14, 14), input_size=(224, 224)),
        CellResult(**given, seed=1, error="lost"),
    ]

    text = report(config, entries(cells, results), {}, results[1:])

    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| MAE")]
    assert rows == [
        ["MAE", "224", "14", "0.3512 (1 of 2)", "60.4 (1 of 2)", "0.047", ""],
        ["MAE, published, of other settings", "224", "14", "0.3471", "60.2", "", ""],
    ]
    (note,) = [line for line in text.splitlines() if line.startswith("- Published of mae, deap, VOC")]
    for difference in (
        "max_steps published 10000, here 4",
        "side published 224, here 64",
        "weights published 'pretrained', here 'random'",
    ):
        assert difference in note
    assert "model " not in note
    assert re.search(r"\| mae, published +\| 0.047 M \|", text)


def test_stores_that_are_not_as_published_and_what_they_turn_off_are_said(sets, tiny, tmp_path):
    images = sets / "VOC2012/VOCdevkit/VOC2012/JPEGImages"
    extract(tiny, tmp_path / "voc.zarr", images, geometry="crop", facet="key")
    config = tiny_grid(sets, tmp_path / "grid", tasks=("probe-voc",), store=str(tmp_path / "voc.zarr"), paper=True)
    (cell,), results = plan_cells(config), run(config)
    assert results[0].error == ""
    published = replace(cell, backbone=replace(cell.backbone, model="vit_small_plus_patch16_dinov3.lvd1689m", size=448))

    text = write_grid(config.folder, config, [published], results, {})

    assert "- Turned off, which the recipe has: --flip, since features of a store aren't those of the mirrored image" in text
    (note,) = [line for line in text.splitlines() if line.startswith("- Published of")]
    for difference in (
        "facet published 'token', here 'key'",
        "precision published 'bf16', here 'fp32'",
        "weights published 'pretrained', here 'random'",
        "drawing published 'paper', here 'extract'",
        "flip published True, here False",
    ):
        assert difference in note
    (entry,) = json.loads((tmp_path / "grid/grid.json").read_text())["entries"]
    assert list(entry["left_out"]) == ["flip"]
    assert {"field": "facet", "there": "token", "here": "key"} in entry["published_differs"]


def test_cells_that_left_held_out_images_out_say_so(sets, tmp_path):
    data = tmp_path / "damaged"
    shutil.copytree(sets / "VOC2012", data)
    (data / "VOCdevkit/VOC2012/JPEGImages/000007.jpg").write_bytes(b"no image")
    cell = cells_with(max_failed_fraction=0.25, schedule="cosine", warmup_steps=99)
    config = tiny_grid(sets, tmp_path / "grid", data=(f"voc={data}",), max_steps=1, cell=cell)
    cells, results = plan_cells(config), run(config)

    text = write_grid(config.folder, config, cells, results, {})

    assert f"- {cells[0].name}: scores over 3 of 4 held-out images, 1 left out." in text
    assert f"- {cells[0].name}: --warmup-steps 99 of a run of 1 steps" in text
    saved = json.loads((tmp_path / "grid/grid.json").read_text())["cells"][0]
    assert (saved["metrics"]["val_images"], saved["metrics"]["val_left_out"]) == (3, 1)
    assert run(config)[0].notes == results[0].notes


def relative_speed(relative: float) -> Speed:
    return Speed(of=(VIT, 64), images_per_s=relative, reference_images_per_s=1.0, relative=relative, batches=2, device="CPU")


def test_cells_that_learned_from_clamped_features_say_so(sets, tmp_path):
    weights = loud_weights(tmp_path / "w.safetensors")
    config = tiny_grid(sets, tmp_path / "grid", weights=str(weights))

    (first,) = run(config)
    (again,) = run(config)

    assert first.clipped == again.clipped == 12
    text = write_grid(config.folder, config, plan_cells(config), [again], {})
    assert f"- {again.name}: trained 12 times on an image with features beyond float16's range, which are clamped" in text


def test_the_scatter_draws_each_backbone_and_turns_errors_round(monkeypatch):
    from matplotlib.axes import Axes

    points, turned = [], []
    monkeypatch.setattr(Axes, "errorbar", lambda self, x, y, **more: points.append((x, y)))
    monkeypatch.setattr(Axes, "invert_yaxis", lambda self: turned.append(self.get_title()))
    config = GridConfig.of(out="x", backbones=("mae", "dino"), tasks=("voc", "depth"), data=("voc=v", "nyu=n"))
    cells = plan_cells(config)
    metrics = {"val_loss": 0.5, "val_miou": 0.25, "val_rmse_pooled": 0.75}
    results = [
        CellResult(name=c.name, backbone=c.backbone.name, task=c.task.name, method=c.method, seed=c.seed, metrics=metrics)
        for c in cells
    ]

    png = scatter(entries(cells, results), {"mae": relative_speed(1.0), "dino": relative_speed(0.2)}, "mae at 224 px")

    assert png.startswith(b"\x89PNG")
    assert points == [((1.0, 0.2), [25.0, 25.0]), ((1.0, 0.2), [0.75, 0.75])]
    assert turned == ["depth"]


def test_the_scatters_names_do_not_cover_each_other_and_its_axis_has_no_negative_scores(monkeypatch):
    from matplotlib.figure import Figure

    kept: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **how: kept.append(figure) or file.write(b""))
    names = "mae", "dino", "clip-b", "metaclip", "siglip-224"
    config = GridConfig.of(out="x", backbones=names, tasks=("voc",), data=("voc=v",), seeds=(0, 1))
    cells = plan_cells(config)
    results = [
        CellResult(
            name=c.name, backbone=c.backbone.name, task=c.task.name, method=c.method, seed=c.seed,
            metrics={"val_loss": 0.5, "val_miou": 0.002 * c.seed},
        )
        for c in cells
    ]  # fmt: skip

    scatter(entries(cells, results), {name: relative_speed(1 + n / 100) for n, name in enumerate(names)}, "mae at 224 px")

    (figure,) = kept
    (panel,) = figure.axes
    boxes = {text.get_text(): text.get_window_extent() for text in panel.texts}
    assert set(boxes) == set(names)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes.values(), 2))
    assert panel.get_ylim()[0] == 0
    assert "mae at 224 px" in panel.get_xlabel()


def test_any_task_of_any_data_set_has_its_columns():
    task = find_task("boundaries:photos_open_instances")

    assert [column.head for column in task.columns] == ["CE", "IoU"]
    assert task.settings == {}


# --- the program ------------------------------------------------------------------------------------------------------


def test_debug_runs_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    assert job.run(["grid", "debug", "--max-steps", "2", "--cell.lr", "0.001", "--tasks", "voc"]) == 0

    assert "## Methods on test_vit.r160_in1k@128" in capsys.readouterr().out
    assert sorted(path.name for path in Path("demo/grid").iterdir() if path.is_file()) == [
        "grid.json", "grid.md", "grid.png", "speed.json"
    ]  # fmt: skip
    assert job.run(["grid", "debug", "--cell.lr", "0.1", "--tasks", "voc", "--max-steps", "2"]) == 1
    assert "was begun with other settings" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["grid", "--tasks", "voc", "depth", "--backbones", "mae"], "--data lacks nyu, voc"),
        (
            ["grid", "--tasks", "voc", "--backbones", "mae", "--data", "voc=nowhere", "--out", "x"],
            "--data voc nowhere: there is no",
        ),
        (["grid", "deap-table3"], "no preset of grid is called 'deap-table3'"),
        (["grad"], "Did you mean 'grid'?"),
        (["deap-table3", "--seeds", "0", "1"], "deap-table3 is `python jobs/tables.py deap --table 3` now"),
        (["debug"], "debug is `python jobs/tables.py grid debug` now"),
        (["--backbones", "mae"], "a command line without a word is `python jobs/tables.py grid` now"),
    ],
)
def test_mistakes_and_words_of_earlier_versions_end_with_2(capsys, words, said):
    assert job.run(words) == 2
    assert said in capsys.readouterr().err


# --- on Ray -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_session")
def test_ray_runs_cells_replaces_lost_workers_and_tells_failures(sets, tmp_path):
    config = tiny_grid(
        sets,
        tmp_path / "ray",
        tasks=("voc", "boundaries"),
        data=(f"voc={sets}/VOC2012", f"coco={tmp_path}/nothing"),
        max_steps=40,
        executor="ray",
        actors=1,  # so that the one worker there is trains the first cell
        cell=cells_with(checkpoint_every=2, validate_every=40),
    )
    cells = plan_cells(config)
    killed, ended = [], threading.Event()
    sign = Path(cells[0].training.out) / "checkpoints.json"
    killer = threading.Thread(target=kill_once, args=(sign, killed, ended))
    killer.start()

    try:
        done, failed = run_cells(config, cells, RayExecutor())
    finally:
        ended.set()
        killer.join()

    (undisturbed,) = run(tiny_grid(sets, tmp_path / "inline", max_steps=40, cell=config.cell))
    assert len(killed) == 1
    assert (done.steps, done.metrics) == (40, undisturbed.metrics)
    steps = [line["step"] for line in read_metrics(Folder(cells[0].training.out)) if "loss" in line]
    assert steps == list(range(1, 41))
    assert failed.error.startswith("DatasetError: ")
    assert measure_speeds(config, cells, [done, failed], RayExecutor())[VIT].relative > 0


def kill_once(sign: Path, killed: list[int], ended: threading.Event) -> None:
    """SIGKILL of the worker that trains the first cell, once it has a checkpoint."""
    while not (killed or ended.wait(0.02)):
        if sign.exists():
            training = [each for each in psutil.Process().children(recursive=True) if each.name().startswith("ray::_Actor.do")]
            for process in training[:1]:
                process.kill()
                killed.append(process.pid)


def test_methods_may_read_maps_of_their_own(sets, tmp_path):
    level = f"x4=featup:{featup_file(tmp_path / 'test_jbu_stack.ckpt')}"
    config = tiny_grid(sets, tmp_path / "grid", methods=("linear", "featup"), method_levels=(f"featup={level}",), speed=False)

    linear, featup = plan_cells(config)

    assert (linear.training.level, featup.training.level, featup.training.method) == ("x1", level, "featup")
    text = squeezed("\n".join(main(config)))
    assert re.search(r"\| linear \|.* \| 0\.001 ", text)
    assert re.search(r"\| featup \|.* \| 0\.001 ", text)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (("deap=x2",), "--method-levels deap=x2: use METHOD=LEVEL, of --methods linear featup; for example featup=x16"),
        (("x16=featup:file.ckpt",), "--method-levels x16=featup:file.ckpt: use METHOD=LEVEL"),
        ((), "--methods featup reads a map that featup has enlarged: give --method-levels featup=x16=featup:URL"),
    ],
)
def test_levels_that_no_method_reads_are_refused(sets, tmp_path, levels, message):
    with pytest.raises(ConfigError, match=message):
        plan_cells(tiny_grid(sets, tmp_path / "grid", methods=("linear", "featup"), method_levels=levels))
