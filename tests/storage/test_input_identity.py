"""A store never holds features of other images than those of its input: after any change it is right, or the run is refused.

Images are bitmaps of one size, so that files can be exchanged without a change of their length. What a row must hold is found
out by code of this test: the bytes of each sample, and the features that a run over these bytes alone gives.
"""

import contextlib
import io
import os
import random
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import s3fs
from PIL import Image

from jobs.extract import run
from pipelines.executors import InlineExecutor
from pipelines.extraction.config import ExtractConfig
from pipelines.extraction.plan import make_plan
from pipelines.extraction.prepare import prepare, resolve
from pipelines.extraction.run import RunFailed, extract, run_prepared
from pipelines.extraction.worker import ShardWorker
from pipelines.features.photos import read_photos
from pipelines.indexing import RunInput
from storage.paths import Folder, InputError
from storage.store import FeatureStore
from tests.conftest import run_input, write_tar
from tests.stops import dying_at_task

POOL = 24
"""Different images there are in these tests."""


def bitmap(n: int) -> bytes:
    """Image `n` of the pool; all are of one size."""
    rng = np.random.default_rng(n)
    small = Image.fromarray(rng.integers(0, 255, (4, 5, 3), np.uint8))
    out = io.BytesIO()
    small.resize((40, 32), Image.Resampling.BICUBIC).save(out, "BMP")
    return out.getvalue()


IMAGES = [bitmap(n) for n in range(POOL)]


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> dict[bytes, np.ndarray]:
    """What the model gives for each image of the pool, by its bytes."""
    folder = tmp_path_factory.mktemp("pool")
    write_tar(folder / "pool.tar", [(f"{n:02d}.bmp", data) for n, data in enumerate(IMAGES)])
    extract(config_of([str(folder / "pool.tar")], folder / "pool.zarr"), InlineExecutor())
    store = FeatureStore.open(str(folder / "pool.zarr"))
    return dict(zip(IMAGES, store.read(slice(None), "x1"), strict=True))


def config_of(data: list[str], out: Path | str, **changes: object) -> ExtractConfig:
    settings: dict[str, object] = {
        "data": tuple(data), "out": str(out), "model": "test_vit.r160_in1k", "weights": "random", "size": "64",
        "levels": ("x1",), "precision": "fp32", "executor": "inline", "block_rows": 4, "max_failed_fraction": 1.0,
    }  # fmt: skip
    return ExtractConfig.of(**{**settings, **changes})


def samples_of(tar: bytes | Path) -> dict[str, bytes]:
    """The images of a tar by key, as Python's own tarfile reads it."""
    source = io.BytesIO(tar) if isinstance(tar, bytes) else io.BytesIO(tar.read_bytes())
    with tarfile.open(fileobj=source) as archive:
        return {member.name.split(".")[0]: archive.extractfile(member).read() for member in archive.getmembers()}


def assert_holds(out: Path | str, samples: dict[str, bytes], features: dict[bytes, np.ndarray], options=None) -> None:
    """Every sample has one row, with the features of its bytes; NaN where the bytes are no image."""
    store = FeatureStore.open(str(out), options)
    assert store.status == "complete"
    ledger = store.records(slice(None)).to_pylist()
    assert sorted(row["key"] for row in ledger) == sorted(samples)
    values = store.read(slice(None), "x1", missing="nan")
    for row, found in zip(ledger, values, strict=True):
        expected = features.get(samples[row["key"]])
        assert (row["status"] == "ok") == (expected is not None), row
        if expected is None:
            assert np.isnan(found).all()
        else:
            np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), atol=2e-3, err_msg=str(row))


def stop_after(monkeypatch: pytest.MonkeyPatch, tasks: int) -> None:
    """Runs end like a killed one once they did so many tasks."""
    original, done = ShardWorker.compute, []

    def compute(self, task, loaded):
        if len(done) == tasks:
            raise KeyboardInterrupt
        done.append(task)
        return original(self, task, loaded)

    monkeypatch.setattr(ShardWorker, "compute", compute)


def write_tars(folder: Path, images: dict[str, list[int]]) -> list[str]:
    """Tars by name, each of the pool's images with these numbers; keys are `<tar>-<position>`."""
    for name, numbers in images.items():
        write_tar(folder / f"{name}.tar", [(f"{name}-{i}.bmp", IMAGES[n]) for i, n in enumerate(numbers)])
    return [str(folder / f"{name}.tar") for name in images]


def all_samples(tars: list[str]) -> dict[str, bytes]:
    return {key: data for tar in tars for key, data in samples_of(Path(tar)).items()}


# --- the same input, named otherwise ----------------------------------------------------------------------------------


def test_tars_in_another_order_continue_a_stopped_store(tmp_path, features, monkeypatch):
    tars = write_tars(tmp_path, {"a": [0, 1, 2], "b": [3, 4, 5], "c": [6, 7, 8]})
    with dying_at_task(1):
        extract(config_of(tars, tmp_path / "out.zarr"), InlineExecutor())

    extract(config_of([tars[2], tars[0], tars[1]], tmp_path / "out.zarr"), InlineExecutor())

    assert_holds(tmp_path / "out.zarr", all_samples(tars), features)
    keys = pq.read_table(tmp_path / "out.zarr/ledger/samples")["key"].to_pylist()
    assert keys == ["a-0", "a-1", "a-2", "b-0", "b-1", "b-2", "c-0", "c-1", "c-2"]


def test_folders_in_another_order_continue_a_stopped_store(tmp_path, features, monkeypatch):
    for folder, numbers in {"x": [0, 1, 2], "y": [3, 4, 5]}.items():
        (tmp_path / folder).mkdir()
        for n in numbers:
            (tmp_path / folder / f"{folder}{n}.bmp").write_bytes(IMAGES[n])
    x, y = str(tmp_path / "x"), str(tmp_path / "y")
    with dying_at_task(1):
        extract(config_of([x, y], tmp_path / "out.zarr"), InlineExecutor())

    extract(config_of([y, x], tmp_path / "out.zarr"), InlineExecutor())

    samples = {f"{folder}{n}": IMAGES[n] for folder, ns in (("x", (0, 1, 2)), ("y", (3, 4, 5))) for n in ns}
    assert_holds(tmp_path / "out.zarr", samples, features)


@pytest.mark.parametrize("moved", ["move", "copy"])
def test_tars_elsewhere_with_the_same_images_continue_a_stopped_store(tmp_path, features, monkeypatch, moved):
    tars = write_tars(tmp_path / "in", {"a": [0, 1, 2, 3, 4], "b": [5, 6, 7]})
    with dying_at_task(1):
        extract(config_of(tars, tmp_path / "out.zarr"), InlineExecutor())
    (tmp_path / "there").mkdir()
    for tar in tars:
        getattr(shutil, moved)(tar, tmp_path / "there")
    if moved == "copy":
        shutil.rmtree(tmp_path / "in")
    now = [str(tmp_path / "there" / Path(tar).name) for tar in tars]

    extract(config_of(now, tmp_path / "out.zarr"), InlineExecutor())

    assert_holds(tmp_path / "out.zarr", all_samples(now), features)
    sources = set(pq.read_table(tmp_path / "out.zarr/ledger/samples")["source"].to_pylist())
    assert sources == {f"file://{tar}" for tar in now}


def test_tars_elsewhere_with_other_images_of_the_same_names_and_sizes_are_refused(tmp_path):
    out = tmp_path / "out.zarr"
    extract(config_of(write_tars(tmp_path / "in", {"a": [0, 1, 2]}), out), InlineExecutor())
    shutil.rmtree(tmp_path / "in")

    with pytest.raises(InputError, match=r"a\.tar: .*1 of its images differ, for example 'a-1'\nUse --replace-changed"):
        extract(config_of(write_tars(tmp_path / "there", {"a": [0, 9, 2]}), out), InlineExecutor())


def test_less_input_is_refused_by_name(tmp_path):
    tars = write_tars(tmp_path, {"a": [0, 1], "b": [2, 3]})
    extract(config_of(tars, tmp_path / "out.zarr"), InlineExecutor())

    with pytest.raises(InputError, match=r"b\.tar is gone"):
        extract(config_of(tars[:1], tmp_path / "out.zarr"), InlineExecutor())


def test_training_images_in_another_order_are_read_by_their_names(tmp_path):
    """What training reads of a row after the tars were listed in another order (pipelines/training/images.py)."""
    from storage.inputs import expand_inputs
    from storage.sample_images import read_images

    tars = write_tars(tmp_path, {"a": [0, 1], "b": [2, 3]})
    folder = Folder(str(tmp_path / "run"))
    run_input(expand_inputs(tars)).index(folder, folder)
    files = expand_inputs(tars[::-1])

    index = run_input(files).index_in_use(folder)

    assert read_images(index.read(0, 4), index.urls(files)) == IMAGES[:4]


# --- content that changed ---------------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path) -> dict:
    """Where input and store lie: `base` URL, `options`, and `put(name, data)`, which keeps the time of a file it replaces."""
    if request.param == "s3":
        found = request.getfixturevalue("s3_options")
        fs = s3fs.S3FileSystem(**found["options"])
        bucket = found["bucket"]
        return {
            "base": f"s3://{bucket}",
            "options": found["options"],
            "put": lambda name, data: fs.pipe_file(f"{bucket}/{name}", data),
        }

    def put(name: str, data: bytes) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.stat() if path.exists() else None
        fresh = path.with_name("fresh")
        fresh.write_bytes(data)
        fresh.replace(path)
        if before:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    return {"base": str(tmp_path), "options": None, "put": put}


def in_places(name: str, values: Sequence[str], on_s3: str) -> pytest.MarkDecorator:
    """Each of `values` on local disk, and one of them on S3, too; `make soak` tries all of them there."""
    there = [("s3", each) if each == on_s3 else pytest.param("s3", each, marks=pytest.mark.soak) for each in values]
    return pytest.mark.parametrize(("place", name), [*(("local", each) for each in values), *there], indirect=["place"])


def tar_of(images: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in images:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def settings_of(place: dict, **changes: object) -> ExtractConfig:
    import json

    options = json.dumps(place["options"]) if place["options"] else None
    data = [f"{place['base']}/in/a.tar", f"{place['base']}/in/b.tar"]
    return config_of(data, f"{place['base']}/out.zarr", storage_options=options, **changes)


def bmps(key: str, *numbers: int) -> list[tuple[str, bytes]]:
    return [(f"{key}-{i}.bmp", IMAGES[n]) for i, n in enumerate(numbers)]


def test_replaced_images_of_equal_size_are_refused_and_done_again_where_asked(place, features, monkeypatch):
    a, b = tar_of(bmps("a", 0, 1, 2, 3, 4)), tar_of(bmps("b", 5, 6, 7))
    place["put"]("in/a.tar", a)
    place["put"]("in/b.tar", b)
    extract(settings_of(place), InlineExecutor())
    changed = tar_of(bmps("a", 0, 1, 2, 3, 20))
    assert len(changed) == len(a)
    place["put"]("in/a.tar", changed)

    with pytest.raises(InputError, match=r"a\.tar.*1 of its images differ, for example 'a-4'\nUse --replace-changed"):
        extract(settings_of(place), InlineExecutor())
    assert_holds(f"{place['base']}/out.zarr", samples_of(a) | samples_of(b), features, place["options"])
    computed = []
    original = ShardWorker.compute
    monkeypatch.setattr(
        ShardWorker, "compute", lambda self, task, loaded: (computed.append(task.block), original(self, task, loaded))[1]
    )
    extract(settings_of(place, replace_changed=True), InlineExecutor())

    assert computed == [1]
    assert_holds(f"{place['base']}/out.zarr", samples_of(changed) | samples_of(b), features, place["options"])
    assert extract(settings_of(place), InlineExecutor()).this_run == 0


def test_images_of_another_size_are_done_again_where_asked(place, features):
    big = io.BytesIO()
    Image.open(io.BytesIO(IMAGES[9])).convert("RGBA").save(big, "BMP")  # the same pixels, in a larger file
    b = tar_of(bmps("b", 5, 6, 7))
    place["put"]("in/a.tar", tar_of(bmps("a", 0, 1, 2, 3, 4)))
    place["put"]("in/b.tar", b)
    extract(settings_of(place), InlineExecutor())
    place["put"]("in/a.tar", tar_of([*bmps("a", 0, 1), ("a-2.bmp", big.getvalue()), *bmps("a", 0, 1, 2, 3, 4)[3:]]))

    with pytest.raises(InputError, match=r"a\.tar: .*: 1 of its images differ, for example 'a-2'"):
        extract(settings_of(place), InlineExecutor())
    extract(settings_of(place, replace_changed=True), InlineExecutor())

    expected = samples_of(tar_of(bmps("a", 0, 1, 9, 3, 4))) | samples_of(b)
    store = FeatureStore.open(f"{place['base']}/out.zarr", place["options"])
    for key, data in expected.items():
        np.testing.assert_allclose(store.read(key, "x1"), features[data], atol=2e-3, err_msg=key)


def test_images_that_were_only_touched_are_read_once_and_accepted(tmp_path, caplog, monkeypatch):
    tars = write_tars(tmp_path, {"a": [0, 1, 2]})
    extract(config_of(tars, tmp_path / "out.zarr"), InlineExecutor())
    os.utime(tars[0], (1, 1))

    assert extract(config_of(tars, tmp_path / "out.zarr"), InlineExecutor()).this_run == 0

    monkeypatch.setattr(RunInput, "scan", lambda *_: pytest.fail("scanned again"))
    extract(config_of(tars, tmp_path / "out.zarr"), InlineExecutor())


@in_places("broken", ["cut image", "cut tar", "damaged header", "cut tar of several"], on_s3="cut tar of several")
def test_repaired_input_is_let_through_by_retry_failed(place, features, monkeypatch, broken):
    whole = tar_of(bmps("a", 0, 1, 2, 3, 4, 5))
    at = {"a-2": 2 * 512 * (2 + len(IMAGES[0]) // 512)}["a-2"]
    damaged = {
        "cut image": tar_of([*bmps("a", 0, 1), ("a-2.bmp", IMAGES[2][:900]), *bmps("a", 0, 1, 2, 3, 4, 5)[3:]]),
        "cut tar": whole[: 5 * (512 * (2 + len(IMAGES[0]) // 512)) + 700],
        "cut tar of several": whole[: 3 * (512 * (2 + len(IMAGES[0]) // 512)) + 700],
        "damaged header": whole[:at] + b"\xff" * 512 + whole[at + 512 :],
    }[broken]
    b = tar_of(bmps("b", *range(10, 18)))
    place["put"]("in/a.tar", damaged)
    place["put"]("in/b.tar", b)
    summary = extract(settings_of(place), InlineExecutor())
    assert summary.failed == 1
    done = []
    original = ShardWorker.compute
    monkeypatch.setattr(
        ShardWorker, "compute", lambda self, task, loaded: (done.append(task.block), original(self, task, loaded))[1]
    )
    place["put"]("in/a.tar", whole)

    with pytest.raises(InputError, match="Only images that had failed differ: use --retry-failed"):
        extract(settings_of(place), InlineExecutor())
    extract(settings_of(place, retry_failed=True), InlineExecutor())

    assert len(done) <= 2
    assert_holds(f"{place['base']}/out.zarr", samples_of(whole) | samples_of(b), features, place["options"])
    assert extract(settings_of(place), InlineExecutor()).this_run == 0


def test_repair_that_changes_good_images_as_well_is_refused(place):
    place["put"]("in/a.tar", tar_of([*bmps("a", 0, 1), ("a-2.bmp", IMAGES[2][:900])]))
    place["put"]("in/b.tar", tar_of(bmps("b", 10, 11, 12)))
    extract(settings_of(place), InlineExecutor())
    place["put"]("in/a.tar", tar_of(bmps("a", 0, 20, 2)))

    with pytest.raises(InputError, match="2 of its images differ, for example 'a-1'\nUse --replace-changed"):
        extract(settings_of(place, retry_failed=True), InlineExecutor())


def test_input_replaced_while_it_is_read_ends_the_run_with_an_error(place, features, monkeypatch):
    a, b = tar_of(bmps("a", 0, 1, 2, 3, 4)), tar_of(bmps("b", 5, 6, 7))
    place["put"]("in/a.tar", a)
    place["put"]("in/b.tar", b)
    changed = tar_of(bmps("a", 20, 21, 22, 23, 19))
    original = ShardWorker.compute

    def compute(self, task, loaded):
        report = original(self, task, loaded)
        if task.block == 0:
            place["put"]("in/a.tar", changed)
        return report

    with monkeypatch.context() as patch:
        patch.setattr(ShardWorker, "compute", compute)
        with pytest.raises(RunFailed, match=r"changed while it was read:\n.*4 of its images differ, for example 'a-0'"):
            extract(settings_of(place), InlineExecutor())
    with pytest.raises(InputError, match="Use --replace-changed"):
        extract(settings_of(place), InlineExecutor())

    extract(settings_of(place, replace_changed=True), InlineExecutor())

    assert_holds(f"{place['base']}/out.zarr", samples_of(changed) | samples_of(b), features, place["options"])


def test_input_that_is_deleted_once_it_is_read_is_no_fault(tmp_path, features, monkeypatch, caplog):
    tars = write_tars(tmp_path, {"a": [0, 1, 2]})
    samples = all_samples(tars)
    original = ShardWorker.compute

    def compute(self, task, loaded):
        Path(tars[0]).unlink()
        return original(self, task, loaded)

    monkeypatch.setattr(ShardWorker, "compute", compute)
    extract(config_of(tars, tmp_path / "out.zarr"), InlineExecutor())

    assert_holds(tmp_path / "out.zarr", samples, features)
    assert "can't be told any more" in caplog.text


def test_the_program_refuses_with_2_and_says_what_to_do(tmp_path, capfd):
    tars = write_tars(tmp_path, {"a": [0, 1, 2]})
    arguments = ["--data", tars[0], "--out", str(tmp_path / "out.zarr"), "--model", "test_vit.r160_in1k", "--weights", "random",
                 "--size", "64", "--levels", "x1", "--precision", "fp32", "--executor", "inline"]  # fmt: skip
    assert run(arguments) == 0
    write_tars(tmp_path, {"a": [0, 21, 2]})

    assert run(arguments) == 2

    assert "1 of its images differ, for example 'a-1'\nUse --replace-changed" in capfd.readouterr().err
    assert run([*arguments, "--replace-changed"]) == 0


def test_plan_says_what_would_run_again_and_changes_nothing(tmp_path):
    tars = write_tars(tmp_path, {"a": [0, 1, 2, 3, 4]})
    extract(config_of(tars, tmp_path / "out.zarr"), InlineExecutor())
    write_tars(tmp_path, {"a": [0, 1, 2, 3, 20]})
    before = {path: path.read_bytes() for path in (tmp_path / "out.zarr").rglob("*") if path.is_file()}
    config = config_of(tars, tmp_path / "out.zarr", replace_changed=True)

    plan = make_plan(prepare(resolve(config), InlineExecutor()))

    assert (plan.pending, plan.state) == (1, "2 of 2 tasks done, 1 run again for changed images")
    assert {path: path.read_bytes() for path in (tmp_path / "out.zarr").rglob("*") if path.is_file()} == before


def test_photograph_that_was_replaced_is_not_shown_beside_the_features_of_the_old_one(tmp_path, caplog):
    tars = write_tars(tmp_path, {"a": [0, 1, 2]})
    extract(config_of(tars, tmp_path / "out.zarr"), InlineExecutor())
    write_tars(tmp_path, {"a": [0, 20, 2]})

    photos = read_photos(FeatureStore.open(str(tmp_path / "out.zarr")), np.arange(3))

    assert [photo is None for photo in photos] == [False, True, False]
    assert "no photograph for row 1" in caplog.text
    assert "holds another image" in caplog.text


def test_image_that_was_too_large_to_be_read_is_no_change_when_its_tar_is_touched(tmp_path, features):
    large = io.BytesIO()
    Image.open(io.BytesIO(IMAGES[0])).resize((200, 200)).save(large, "BMP")
    tar = write_tar(tmp_path / "a.tar", [*bmps("a", 0, 1), ("a-2.bmp", large.getvalue())])
    config = config_of([str(tar)], tmp_path / "out.zarr", max_image_bytes=10_000)
    assert extract(config, InlineExecutor()).failed == 1
    os.utime(tar, (1, 1))

    assert extract(config, InlineExecutor()).this_run == 0


def test_other_carried_members_are_refused_by_name(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [*bmps("a", 0), ("a-0.cls", b"1"), ("a-0.txt", b"x")])
    extract(config_of([str(tar)], tmp_path / "out.zarr", carry=("cls",)), InlineExecutor())

    for other in ((), ("txt",), ("cls", "txt")):
        with pytest.raises(InputError, match="indexed with .* --carry cls, this run has"):
            extract(config_of([str(tar)], tmp_path / "out.zarr", carry=other), InlineExecutor())


def test_image_members_that_give_the_same_rows_cost_no_reading(tmp_path, monkeypatch):
    tars = write_tars(tmp_path, {"a": [0, 1, 2]})
    extract(config_of(tars, tmp_path / "out.zarr"), InlineExecutor())
    read = []
    monkeypatch.setattr("storage.identity.try_images", lambda rows, *_: read.extend(rows["key"].to_pylist()) or [])

    assert extract(config_of(tars, tmp_path / "out.zarr", image_member="bmp"), InlineExecutor()).this_run == 0

    assert read == []


def test_retry_of_a_repaired_image_that_is_killed_before_the_index_is_taken_over_goes_on(tmp_path, features, monkeypatch):
    tar = tmp_path / "a.tar"
    write_tar(tar, [*bmps("a", 0, 1), ("a-2.bmp", IMAGES[2][:900]), *bmps("a", 0, 1, 2, 3, 4)[3:]])
    config = config_of([str(tar)], tmp_path / "out.zarr", retry_failed=True)
    assert extract(config, InlineExecutor()).failed == 1
    write_tar(tar, bmps("a", 0, 1, 2, 3, 4))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.extraction.continued.move_index", killed)
        with pytest.raises(KeyboardInterrupt):
            extract(config, InlineExecutor())
    extract(config, InlineExecutor())

    assert_holds(config.out, samples_of(tar), features)


def test_store_that_lost_its_index_is_held_against_its_ledger(tmp_path, features):
    tars = write_tars(tmp_path, {"a": [0, 1, 2, 3, 4]})
    out = tmp_path / "out.zarr"
    extract(config_of(tars, out), InlineExecutor())
    whole = (out / "index/sources.parquet").read_bytes()
    (out / "index/sources.parquet").unlink()

    make_plan(prepare(resolve(config_of(tars, out)), InlineExecutor()))
    assert not (out / "index/sources.parquet").exists()
    assert extract(config_of(tars, out), InlineExecutor()).this_run == 0
    assert (out / "index/sources.parquet").read_bytes() == whole

    (out / "index/sources.parquet").unlink()
    write_tars(tmp_path, {"a": [0, 9, 2, 3, 4]})
    with pytest.raises(InputError, match=r"out\.zarr was made from other input:\n.*1 of its images differ"):
        extract(config_of(tars, out), InlineExecutor())
    extract(config_of(tars, out, replace_changed=True), InlineExecutor())
    assert_holds(out, all_samples(tars), features)


def test_damaged_index_that_a_plan_left_is_made_anew(tmp_path, features):
    tars = write_tars(tmp_path, {"a": [0, 1, 2]})
    prepare(resolve(config_of(tars, tmp_path / "out.zarr")), InlineExecutor()).keep_index()
    sources = tmp_path / "out.zarr/index/sources.parquet"
    sources.write_bytes(sources.read_bytes()[:100])

    extract(config_of(tars, tmp_path / "out.zarr"), InlineExecutor())

    assert_holds(tmp_path / "out.zarr", all_samples(tars), features)


def cut_behind(tar: Path, samples: int) -> bytes:
    """Cut a tar of bitmaps in the middle of the image behind so many samples; returns the whole one."""
    whole = tar.read_bytes()
    tar.write_bytes(whole[: samples * 512 * (2 + len(IMAGES[0]) // 512) + 700])
    return whole


def test_repaired_store_keeps_its_block_size_and_its_limit(tmp_path, features, monkeypatch):
    monkeypatch.setattr("pipelines.extraction.prepare.choose_block_rows", lambda n_rows, spec: 2 if n_rows < 8 else 4)
    tar = write_tar(tmp_path / "a.tar", bmps("a", *range(12)))
    config = config_of([str(tar)], tmp_path / "out.zarr", block_rows=None, limit=9, retry_failed=True)
    whole = cut_behind(tar, 5)
    assert extract(config, InlineExecutor()).failed == 1
    tar.write_bytes(whole)

    assert extract(config, InlineExecutor()).failed == 0

    assert extract(config, InlineExecutor()).this_run == 0
    first = dict(list(samples_of(whole).items())[:9])
    assert_holds(config.out, first, features)
    assert FeatureStore.open(config.out).layout.block_rows == 2


# --- two drivers with other images of the same names and sizes --------------------------------------------------------


def test_of_two_drivers_that_begin_at_once_with_other_images_of_equal_names_one_is_refused(tmp_path, features):
    first, second = (write_tars(tmp_path / name, {"a": numbers}) for name, numbers in (("x", [0, 1]), ("y", [2, 3])))
    out = tmp_path / "out.zarr"
    prepared = [prepare(resolve(config_of(data, out)), InlineExecutor()) for data in (first, second)]
    run_prepared(prepared[0], InlineExecutor())

    with pytest.raises(InputError, match="begun by another run just now, with other files"):
        run_prepared(prepared[1], InlineExecutor())
    with pytest.raises(InputError, match="2 of its images differ"):
        extract(config_of(second, out), InlineExecutor())

    assert_holds(out, all_samples(first), features)


@pytest.mark.parametrize("ends", ["finished", "killed"])
def test_driver_whose_store_is_continued_with_other_images_of_equal_names_stops(tmp_path, features, monkeypatch, ends):
    first, second = (write_tars(tmp_path / name, {"a": [*range(n, n + 8)]}) for name, n in (("x", 0), ("y", 10)))
    out, original, tasks = tmp_path / "out.zarr", ShardWorker.compute, []

    def compute(self, task, loaded):
        tasks.append(task.block)
        if len(tasks) == 1:  # nothing is committed yet
            with contextlib.suppress(KeyboardInterrupt):
                extract(config_of(second, out), InlineExecutor())
        elif len(tasks) == 3 and ends == "killed":
            raise KeyboardInterrupt
        return original(self, task, loaded)

    monkeypatch.setattr(ShardWorker, "compute", compute)
    with pytest.raises(RunFailed, match="continued by another run, with input that lies elsewhere, or was changed"):
        extract(config_of(first, out), InlineExecutor())
    extract(config_of(second, out), InlineExecutor())

    assert_holds(out, all_samples(second), features)


def test_store_that_another_run_takes_over_with_repaired_input_is_prepared_anew(tmp_path, features, monkeypatch):
    tar = write_tar(tmp_path / "a.tar", bmps("a", *range(7)))
    whole = cut_behind(tar, 5)
    config = config_of([str(tar)], tmp_path / "out.zarr", retry_failed=True)
    assert extract(config, InlineExecutor()).failed == 1
    tar.write_bytes(whole)
    late = prepare(resolve(config), InlineExecutor())
    original, calls = RunInput.scan, []

    def scan(*arguments):
        """The other run, as long as this one scans the input."""
        calls.append(arguments)
        if len(calls) == 1:
            extract(config, InlineExecutor())
        return original(*arguments)

    monkeypatch.setattr(RunInput, "scan", scan)
    assert extract(config, InlineExecutor()).this_run == 0
    with pytest.raises(RunFailed, match="changed by another run just now; run the same command again"):
        run_prepared(late, InlineExecutor())

    assert_holds(config.out, samples_of(whole), features)


# --- any history ------------------------------------------------------------------------------------------------------


class History:
    """Tars that are changed at random between runs of one store."""

    def __init__(self, folder: Path, draw: random.Random):
        self.folder, self.draw, self.log = folder, draw, []
        self.tars = write_tars(folder / "in", {name: draw.sample(range(POOL), draw.randint(2, 5)) for name in "abc"})
        self.whole = {tar: Path(tar).read_bytes() for tar in self.tars}

    def rewrite(self, tar: str, change: Callable[[list[tuple[str, bytes]]], None]) -> None:
        members = [(f"{key}.bmp", data) for key, data in samples_of(self.whole[tar]).items()]
        change(members)
        path, before = Path(tar), Path(tar).stat()
        path.unlink()
        path.write_bytes(tar_of(members))
        if self.draw.random() < 0.5:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        self.whole[tar] = path.read_bytes()

    def change(self) -> None:
        kinds = [
            "nothing",
            "reorder",
            "other",
            "swap",
            "rename",
            "cut",
            "repair",
            "move",
            "touch",
            "drop",
            "add",
            "grow",
            "shrink",
        ]
        kind = self.draw.choice(kinds)
        tar = self.draw.choice(self.tars)
        self.log.append(kind)
        if kind == "reorder":
            self.draw.shuffle(self.tars)
        elif kind == "other":
            at, data = self.draw.random(), IMAGES[self.draw.randrange(POOL)]
            self.rewrite(tar, lambda m: m.__setitem__(int(at * len(m)), (m[int(at * len(m))][0], data)))
        elif kind == "swap":
            self.rewrite(tar, lambda m: m.__setitem__(slice(None), [(k, d) for (k, _), (_, d) in zip(m, m[::-1], strict=True)]))
        elif kind == "rename":
            # Sometimes to the name that a sample of another tar has.
            name = self.draw.choice([f"{Path(tar).stem}-new", *self.samples()])
            self.rewrite(tar, lambda m: m.__setitem__(0, (f"{name}.bmp", m[0][1])))
        elif kind == "grow":
            self.rewrite(tar, lambda m: m.append((f"{Path(tar).stem}-more{len(m)}.bmp", IMAGES[self.draw.randrange(POOL)])))
        elif kind == "shrink":
            self.rewrite(tar, lambda m: m.pop() if len(m) > 1 else None)
        elif kind == "cut":
            Path(tar).write_bytes(self.whole[tar][: len(IMAGES[0]) // 2 + 1024 + 512 * self.draw.randrange(8)])
        elif kind == "repair":
            Path(tar).write_bytes(self.whole[tar])
        elif kind == "move":
            new = self.folder / f"moved-{len(self.log)}" / Path(tar).name
            new.parent.mkdir()
            shutil.move(tar, new)
            self.tars[self.tars.index(tar)] = str(new)
            self.whole[str(new)] = self.whole.pop(tar)
        elif kind == "touch":
            os.utime(tar, (len(self.log), len(self.log)))
        elif kind == "drop" and len(self.tars) > 1:
            self.tars.remove(tar)
        elif kind == "add":
            name = f"n{len(self.log)}"
            [new] = write_tars(self.folder / "in", {name: self.draw.sample(range(POOL), 2)})
            self.tars.append(new)
            self.whole[new] = Path(new).read_bytes()

    def samples(self) -> dict[str, bytes]:
        """What the tars hold now, cut ones as far as they go; a cut image's bytes are no image."""
        found: dict[str, bytes] = {}
        for tar in self.tars:
            now = Path(tar).read_bytes()
            with tarfile.open(fileobj=io.BytesIO(self.whole[tar])) as archive:
                for member in archive.getmembers():
                    if member.offset + 512 <= len(now):
                        found[member.name.split(".")[0]] = now[member.offset_data : member.offset_data + member.size]
        return found


def live(history: History, features: dict[bytes, np.ndarray], patch: Callable[[], pytest.MonkeyPatch]) -> dict[str, int]:
    """Runs and changes in turn; what became of the runs."""
    happened = {"right": 0, "refused": 0, "killed": 0}
    out, draw = history.folder / "out.zarr", history.draw
    for _ in range(5):
        flags = {name: draw.random() < 0.4 for name in ("retry_failed", "replace_changed")}
        history.log.append(flags)
        monkeypatch = patch()
        if draw.random() < 0.35:
            stop_after(monkeypatch, draw.randrange(3))
        try:
            extract(config_of(history.tars, out, **flags), InlineExecutor())
        except KeyboardInterrupt:
            happened["killed"] += 1
        except (InputError, RunFailed):
            happened["refused"] += 1
        else:
            happened["right"] += 1
            assert_holds(out, history.samples(), features)
        finally:
            monkeypatch.undo()
        history.change()
    return happened


@pytest.mark.parametrize("seeds", [range(6), pytest.param(range(6, 225), marks=[pytest.mark.soak, pytest.mark.timeout(3000)])])
def test_any_history_of_the_input_ends_in_a_right_store_or_a_refusal(tmp_path, features, seeds):
    total = {"right": 0, "refused": 0, "killed": 0}
    for seed in seeds:
        history = History(tmp_path / str(seed), random.Random(seed))
        try:
            for name, count in live(history, features, pytest.MonkeyPatch).items():
                total[name] += count
        except BaseException as error:
            error.add_note(f"seed {seed}: {history.log}")
            raise
    print(total)
    assert min(total.values()) > 0
