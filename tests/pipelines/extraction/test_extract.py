"""The pipeline in one process: what a run writes, and how it continues."""

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr

from cluster.resources import WorkerPool
from operators.backbone import BackboneError
from pipelines.config import ConfigError
from pipelines.executors import InlineExecutor
from pipelines.extraction import worker as worker_module
from pipelines.extraction.config import config_from_run
from pipelines.extraction.plan import make_plan
from pipelines.extraction.prepare import prepare, resolve
from pipelines.extraction.run import RunFailed, extract
from pipelines.extraction.start import main
from pipelines.extraction.worker import ShardWorker
from pipelines.features.model import FeatureModel
from pipelines.provenance import versions
from storage import sample_images
from storage.paths import Folder
from storage.ranges import try_ranges
from storage.runs import write_run
from storage.spec import FingerprintMismatch
from storage.store import FeatureStore, NotAStore
from tests.conftest import jpeg, unreadable, write_tar
from tests.pipelines.extraction.test_s3 import tree
from tests.stops import dying_at_task


def test_every_row_of_every_level_is_written_and_accounted_for(make_tars, tiny):
    config = tiny(make_tars(count=2, each=10))

    summary = extract(config, InlineExecutor())

    assert (summary.ok, summary.failed) == (20, 0)
    group = zarr.open_group(config.out, mode="r")
    assert group["x1/features"].shape == (20, 4, 4, 64)
    assert group["x2/features"].shape == (20, 8, 8, 64)
    assert group["pooled/features"].shape == (20, 64)
    for name in ("x1", "x2", "pooled"):
        assert np.isfinite(group[f"{name}/features"][:]).all()
    ledger = pq.read_table(Path(config.out) / "ledger/samples/part-00000.parquet")
    assert ledger["row"].to_pylist() == list(range(20))
    assert ledger["key"].to_pylist() == [f"{n:05d}" for n in range(20)]
    assert set(ledger["status"].to_pylist()) == {"ok"}


def test_second_run_of_a_complete_store_does_nothing(make_tars, tiny, monkeypatch):
    config = tiny(make_tars())
    extract(config, InlineExecutor())
    monkeypatch.setattr(ShardWorker, "compute", lambda *_: pytest.fail("computed again"))

    summary = extract(config, InlineExecutor())

    assert (summary.ok, summary.this_run) == (20, 0)


def test_interrupted_run_continues_without_gap_or_repeat(make_tars, tiny, monkeypatch):
    config = tiny(make_tars())
    with dying_at_task(2):
        extract(config, InlineExecutor())
    assert FeatureStore.open(config.out).status == "writing"

    computed, original = [], ShardWorker.compute
    monkeypatch.setattr(
        ShardWorker, "compute", lambda self, task, loaded: (computed.append(task.block), original(self, task, loaded))[1]
    )
    summary = extract(config, InlineExecutor())

    assert computed == [2, 3, 4]
    assert (summary.ok, summary.this_run) == (20, 12)
    assert FeatureStore.open(config.out).status == "complete"


def test_shard_that_lost_bytes_after_its_commit_is_written_again(make_tars, tiny):
    config = tiny(make_tars())
    reference = tiny(config.data, out=config.out.replace("out", "reference"))
    extract(reference, InlineExecutor())
    with dying_at_task(3):
        extract(config, InlineExecutor())
    shard = Path(config.out) / "x1/features/c/1/0/0/0"
    shard.write_bytes(shard.read_bytes()[:100])

    extract(config, InlineExecutor())

    assert shard.read_bytes() == (Path(reference.out) / "x1/features/c/1/0/0/0").read_bytes()


def test_store_of_other_features_is_refused_with_the_differing_fields(make_tars, tiny):
    config = tiny(make_tars())
    extract(config, InlineExecutor())

    with pytest.raises(FingerprintMismatch) as caught:
        extract(tiny(config.data, layers=(3, 5), levels=("x1", "x2=bicubic", "pooled")), InlineExecutor())

    message = str(caught.value)
    assert "layers" in message
    assert "[5]" in message
    assert "x2.method" in message
    assert "bicubic" in message
    assert "precision" not in message


def test_failed_images_are_nan_rows_with_a_reason_and_the_rest_is_unharmed(tmp_path, tiny):
    good = [(f"{n}.jpg", jpeg(n)) for n in range(7)]
    write_tar(tmp_path / "in/a.tar", good)
    write_tar(tmp_path / "bad/a.tar", [*good[:3], ("bad.jpg", b"not an image"), *good[4:]])
    clean = tiny(str(tmp_path / "in/a.tar"), out=str(tmp_path / "clean.zarr"))
    config = tiny(str(tmp_path / "bad/a.tar"), max_failed_fraction=0.2)
    extract(clean, InlineExecutor())

    summary = extract(config, InlineExecutor())

    assert (summary.ok, summary.failed) == (6, 1)
    assert "not an image" in summary.reasons[0]
    a, b = (zarr.open_group(out, mode="r")["x1/features"][:] for out in (clean.out, config.out))
    assert np.isnan(b[3]).all()
    keep = [0, 1, 2, 4, 5, 6]
    np.testing.assert_array_equal(a[keep], b[keep])


def test_more_failures_than_the_budget_end_the_run_with_the_reasons(tmp_path, tiny):
    members = [(f"{n}.jpg", jpeg(n) if n % 2 else b"junk") for n in range(8)]
    config = tiny(str(write_tar(tmp_path / "in/a.tar", members)))

    with pytest.raises(RunFailed, match=r"4 of 8 images failed.*budget of 1.00%.*\n.*4 x decode: ImageRefused"):
        extract(config, InlineExecutor())


def test_retry_failed_runs_only_tasks_with_failed_rows(tmp_path, tiny, monkeypatch):
    members = [(f"{n:02d}.jpg", jpeg(n)) for n in range(12)]
    config = tiny(str(write_tar(tmp_path / "in/a.tar", members)), max_failed_fraction=0.2)
    original = worker_module.decode

    def fail_one(data, geometry, **options):
        if data == jpeg(6):
            raise OSError("flaky decoder")
        return original(data, geometry, **options)

    monkeypatch.setattr(worker_module, "decode", fail_one)
    assert extract(config, InlineExecutor()).failed == 1
    monkeypatch.setattr(worker_module, "decode", original)

    summary = extract(tiny(config.data, max_failed_fraction=0.2, retry_failed=True), InlineExecutor())

    assert (summary.ok, summary.failed, summary.this_run) == (12, 0, 4)


def test_run_json_repeats_the_run_and_holds_no_secret(make_tars, tiny):
    from pipelines.extraction.config import config_from_run

    config = tiny(make_tars(), storage_options='{"s3": {"key": "AKIDEXAMPLE", "secret": "hunter2hunter2"}}')
    summary = extract(config, InlineExecutor())
    path = Path(config.out) / f"runs/{summary.run_id}/run.json"

    text = path.read_text()
    again = config_from_run(config.out)

    assert "hunter2" not in text
    assert "AKIDEXAMPLE" not in text
    assert json.loads(text)["config"]["size"] == "64"
    assert (again.data, again.features) == (config.data, config.features)


def test_limit_takes_the_first_samples(make_tars, tiny):
    config = tiny(make_tars(), limit=5)

    assert extract(config, InlineExecutor()).ok == 5
    assert zarr.open_group(config.out, mode="r")["x1/features"].shape[0] == 5


def test_task_that_storage_fails_stays_pending_and_the_same_command_continues(make_tars, tiny, monkeypatch):
    config = tiny(make_tars())
    original = Folder.write_new

    def full_disk(self, name, data):
        if name == "x1/features/c/2/0/0/0":
            raise OSError(28, "No space left on device")
        return original(self, name, data)

    monkeypatch.setattr(Folder, "write_new", full_disk)
    with pytest.raises(
        RunFailed, match=r"1 tasks did not finish:\n.*task 2: OSError: .*No space left(.|\n)*run the same command"
    ):
        extract(config, InlineExecutor())
    monkeypatch.setattr(Folder, "write_new", original)

    summary = extract(config, InlineExecutor())

    assert (summary.ok, summary.this_run) == (20, 4)


def test_index_that_a_plan_left_is_replaced_when_settings_change(make_tars, tiny):
    from pipelines.extraction.prepare import prepare, resolve

    data = make_tars()
    prepare(resolve(tiny(data, limit=8)), InlineExecutor())

    summary = extract(tiny(data, carry=("cls",), limit=6), InlineExecutor())

    assert summary.ok == 6
    assert FeatureStore.open(tiny(data).out).index.read(0, 6)["cls"].to_pylist() == ["0", "1", "2", "3", "4", "5"]


def test_finished_run_leaves_no_markers_and_no_empty_folders(make_tars, tiny):
    config = tiny(make_tars())
    extract(config, InlineExecutor())

    left = [path for path in Path(config.out).rglob("*") if path.is_dir() and not any(path.iterdir())]
    assert [str(path.relative_to(config.out)).split("/", 2)[2:] for path in left] == [["attempts"]]
    assert not [name for name in os.listdir(config.out) if name.startswith(".")]


def test_task_that_kills_its_worker_is_set_aside_and_then_recorded_as_failed(make_tars, tiny, monkeypatch):
    """The worker's death is played by markers that nobody removes, as a SIGKILL leaves them."""
    config = tiny(make_tars(), max_failed_fraction=0.5)
    original = ShardWorker.run

    class Dies(InlineExecutor):
        def stream(self, make_worker, tasks, pool, how="actor"):
            worker = make_worker()
            for task in tasks:
                starts = 0
                while task.block == 1 and starts < 10:
                    starts += 1
                    folder = f"runs/{worker.setup.run_id}/attempts/{task.block:08d}"
                    n = len(worker.store.folder.sizes(folder))
                    limit = 6 if worker.setup.solo else 3
                    if n >= limit:
                        break
                    worker.store.folder.write(f"{folder}/{starts}-{worker.setup.solo}", b"")
                yield original(worker, task)

    summary = extract(config, Dies())

    assert (summary.ok, summary.failed) == (16, 4)
    assert "worker: WorkerDied: the worker died" in summary.reasons[0]


def test_image_that_cannot_be_read_is_a_failed_row_and_its_neighbours_are_written(tmp_path, tiny, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, name in enumerate(("a", "b::b", "c", "d", "e")):
        (folder / f"{name}.jpg").write_bytes(jpeg(i))
    unreadable(monkeypatch, "/c.jpg")
    config = tiny(str(folder), max_failed_fraction=0.5)
    summary = extract(config, InlineExecutor())
    store = FeatureStore.open(config.out)
    assert (summary.ok, summary.failed) == (4, 1)
    (failure,) = store.failures().to_pylist()
    assert (failure["key"], failure["stage"], failure["error"]) == ("c", "read", "PermissionError")
    assert "Permission denied" in failure["message"]
    monkeypatch.undo()
    assert extract(config.changed(retry_failed=True), InlineExecutor()).ok == 5


def test_without_git_the_commit_is_unknown_and_nothing_is_lost(make_tars, tiny, monkeypatch):
    versions.cache_clear()
    monkeypatch.setenv("PATH", "")
    try:
        assert versions()["raylift_commit"] == "unknown"
        assert extract(tiny(make_tars(1, 2)), InlineExecutor()).ok == 2
    finally:
        versions.cache_clear()


def test_a_trainings_folder_is_no_place_for_a_store_and_holds_none(make_tars, tiny):
    config = tiny(make_tars(1, 2))
    write_run(Folder(config.out), {"identity": {}, "config": {}})

    with pytest.raises(ConfigError, match=r"out.zarr holds a training or an evaluation \(run.json\); give the store a folder"):
        extract(config, InlineExecutor())
    assert os.listdir(config.out) == ["run.json"]
    with pytest.raises(NotAStore, match=r"no feature store at .*; a training or an evaluation is there; jobs/show.py training"):
        FeatureStore.open(config.out)


def test_json_is_how_a_plan_is_printed(make_tars, tiny):
    config = tiny(make_tars(), json=True)

    with pytest.raises(ConfigError, match="--json is how --plan is printed"):
        list(main(config))
    assert not Path(config.out).exists()


# --- a device whose memory is short -------------------------------------------------------------------------------------


@pytest.fixture
def short_of_memory(monkeypatch):
    """A device that holds so many images at once."""
    whole = FeatureModel.__call__

    def make(fits: int) -> None:
        def call(model: FeatureModel, pixels: np.ndarray, *args: object, **kwargs: object) -> object:
            if len(pixels) > fits:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return whole(model, pixels, *args, **kwargs)

        monkeypatch.setattr(FeatureModel, "__call__", call)

    return make


@pytest.mark.parametrize(("fits", "batch"), [(1, 1), (3, 2), (4, 4)])
def test_short_memory_halves_the_batch_down_to_single_images_and_nothing_else_changes(
    make_tars, tiny, tmp_path, short_of_memory, caplog, fits, batch
):
    data = make_tars(1, 10)
    alike = tiny(data, out=str(tmp_path / "alike.zarr"), block_rows=8, batch=batch)
    extract(alike, InlineExecutor())
    short_of_memory(fits)
    config = tiny(data, out=str(tmp_path / "short.zarr"), block_rows=8, batch=8)

    extract(config, InlineExecutor())

    assert tree(Folder(config.out)) == tree(Folder(alike.out))
    steps = [(8, 4), (4, 2), (2, 1)]
    said = [f"out of memory with batches of {a}; going on with {b}" for a, b in steps if a > fits]
    # The next task begins where the first one ended.
    assert [record.getMessage() for record in caplog.records if "out of memory" in record.message] == [
        f"task 0: {x}" for x in said
    ]


def test_upsamplers_that_take_less_may_be_all_that_a_single_image_needs(make_tars, tiny, short_of_memory, caplog, monkeypatch):
    short_of_memory(0)

    def restrain(_: FeatureModel) -> bool:
        short_of_memory(1)
        return True

    monkeypatch.setattr(FeatureModel, "restrain", restrain)

    assert extract(tiny(make_tars(1, 3), batch=1), InlineExecutor()).ok == 3

    assert "out of memory with batches of 1; going on with 1, and with upsamplers that take less at once" in caplog.text


def test_memory_that_does_not_hold_one_image_ends_the_run_with_what_to_do(make_tars, tiny, short_of_memory, caplog):
    short_of_memory(0)

    with pytest.raises(RunFailed, match=r"CUDA out of memory\. That is with one image at a time: use fewer actors on a GPU"):
        extract(tiny(make_tars(1, 3)), InlineExecutor())

    assert "Traceback" not in caplog.text


# --- the same store, other settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("setting", "limit"), [("max_image_pixels", 96 * 72 - 1), ("max_image_bytes", 100)])
@pytest.mark.parametrize("stopped", [False, True])
def test_a_lower_limit_is_refused_by_a_store_of_larger_images(make_tars, tiny, setting, limit, stopped):
    config = tiny(make_tars())
    with dying_at_task(3) if stopped else contextlib.nullcontext():
        extract(config, InlineExecutor())
    flag, rows = f"--{setting.replace('_', '-')}", 12 if stopped else 20

    with pytest.raises(ConfigError, match=rf"{flag} {limit}: {rows} rows of \S+ are of larger images, for example '00000'"):
        extract(config.changed(**{setting: limit}), InlineExecutor())
    # One that none of its images is above changes nothing.
    assert extract(config.changed(**{setting: 96 * 72}), InlineExecutor()).ok == 20


def test_runs_of_one_second_are_in_the_order_of_their_names(make_tars, tiny):
    config = tiny(make_tars(1, 4))
    for batch in range(1, 9):
        extract(config.changed(batch=batch), InlineExecutor())

    runs = Folder(config.out).folders("runs")

    batches = [json.loads(Folder(config.out).read(f"runs/{run}/run.json"))["config"]["batch"] for run in runs]
    assert batches == list(range(1, 9))
    assert config_from_run(config.out).batch == 8


def test_file_of_many_gigabytes_costs_its_sample_and_is_never_read(tmp_path, tiny, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    with (folder / "a.jpg").open("wb") as file:
        file.truncate(30 * 2**30)  # a hole, which takes no room on the disk
    for i in range(4):
        (folder / f"b{i}.jpg").write_bytes(jpeg(i))
    config, asked = tiny(str(folder), max_failed_fraction=0.5), []
    monkeypatch.setattr(sample_images, "try_ranges", lambda ranges, options: asked.extend(ranges) or try_ranges(ranges, options))

    assert make_plan(prepare(resolve(config), InlineExecutor())).images == 5
    summary = extract(config, InlineExecutor())

    assert (summary.ok, summary.failed) == (4, 1)
    (failure,) = FeatureStore.open(config.out).failures().to_pylist()
    assert (failure["key"], failure["error"]) == ("a", "TooLarge")
    assert "--max-image-bytes" in failure["message"]
    assert len(asked) == 3 + 4  # of the plan, and of the run
    assert max(size for _, _, size in asked) < 2**20


@pytest.mark.parametrize(
    ("kinds", "precision", "refused"), [(("H100", "T4"), "bf16", True), (("H100",), "bf16", False), (("T4",), "fp16", False)]
)
def test_bf16_is_refused_where_the_clusters_gpus_have_none(make_tars, tiny, kinds, precision, refused):
    class OnGpus(InlineExecutor):
        def pool(self, request):
            return WorkerPool(device="cuda", size=1, cpus=1, gpus=1, kinds=kinds)

    config = tiny(make_tars(), precision=precision)
    with pytest.raises(ConfigError, match="the cluster has T4: .* --precision fp16") if refused else contextlib.nullcontext():
        prepare(resolve(config), OnGpus())
    assert not refused or not os.path.exists(config.out)


def test_a_plan_says_where_tasks_bound_the_batch(make_tars, tiny):
    said = "a task is 4 images, and so is a batch at most, where 16 were to be tried"
    small, whole = (make_plan(prepare(resolve(tiny(make_tars(), block_rows=rows)), InlineExecutor())) for rows in (4, 16))

    assert said in small.describe()
    assert "--block-rows makes larger tasks" in small.describe()
    assert "is a batch at most" not in whole.describe()


@pytest.fixture
def traced(monkeypatch):
    """Blocks are traced as for compiling, but run as they are: to compile them takes most of a minute."""
    original, shapes = torch.nn.Module.compile, set()

    def traced_only(self, *, mode, dynamic):
        original(self, backend="eager", dynamic=dynamic)
        self.register_forward_pre_hook(lambda _, given: shapes.add(tuple(given[0].shape)))

    monkeypatch.setattr(torch.nn.Module, "compile", traced_only)
    yield shapes
    torch._dynamo.reset()


def test_compiled_blocks_see_one_shape_and_give_the_same_rows(make_tars, tiny, tmp_path, traced):
    data = make_tars(count=1, each=10)  # tasks of 4, 4 and 2
    plain, compiled = (tiny(data, out=str(tmp_path / f"{mode}.zarr"), compile=mode, batch=3) for mode in ("off", "on"))
    for config in (plain, compiled):
        extract(config, InlineExecutor())

    assert {shape[0] for shape in traced} == {3}
    one, other = (FeatureStore.open(config.out) for config in (plain, compiled))
    for level in ("x1", "x2", "pooled"):
        np.testing.assert_allclose(one.read(slice(None), level), other.read(slice(None), level), rtol=0, atol=2e-3)
    assert one.root.fingerprint != other.root.fingerprint


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_compiling_counts(make_tars, tiny, traced, precision):
    config = tiny(make_tars(), precision=precision, compile="on")
    extract(config, InlineExecutor())
    store = FeatureStore.open(config.out)

    assert store.spec.compiled
    with pytest.raises(FingerprintMismatch, match="compiled"):
        extract(config.changed(compile="off"), InlineExecutor())
    assert "compiled" not in replace(store.spec, compiled=False).to_json()


def test_a_plan_says_what_compiling_takes_and_changes(make_tars, tiny, traced):
    plan = make_plan(prepare(resolve(tiny(make_tars(), compile="on")), InlineExecutor()))

    assert plan.compiled.error < 1e-5
    assert "s longer for each actor's first batch" in plan.describe()
    assert make_plan(prepare(resolve(tiny(make_tars())), InlineExecutor())).compiled is None


def test_models_without_a_row_of_blocks_are_not_compiled(make_tars, tiny):
    config = tiny(make_tars(), model="hiera_tiny_224.mae", size="224", levels=("x1",), compile="on")
    with pytest.raises(BackboneError, match="--compile is for plain ViTs, whose blocks are alike; Hiera is none"):
        resolve(config)
