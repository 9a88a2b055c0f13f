"""Checkpoints of a run: whole or not there, the last and the best kept, on disk and on S3."""

import json

import numpy as np
import pytest

from storage.paths import Folder
from storage.runs import (
    Checkpoint,
    CheckpointError,
    Pointers,
    named_checkpoint,
    read_checkpoint,
    read_last,
    read_metrics,
    read_pointers,
    read_run,
    tidy,
    write_checkpoint,
    write_metrics,
    write_run,
)


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request, tmp_path):
    if request.param == "s3":
        s3 = request.getfixturevalue("s3_options")
        return Folder(f"s3://{s3['bucket']}/runs/one", s3["options"])
    return Folder(str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}/run")


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(
        step=step,
        model={"conv.weight": np.full((2, 3), step, np.float32), "count": np.array(step)},
        resume={"conv.weight.exp_avg": np.full((2, 3), -step, np.float32)},
        progress={"images": 4 * step},
        config={"upsampler": {"method": "lift"}},
    )


def test_the_last_checkpoint_reads_back_as_it_was_written(folder):
    write_checkpoint(folder, checkpoint(3))

    found = read_last(folder)

    assert (found.step, found.progress, found.config) == (3, {"images": 12}, {"upsampler": {"method": "lift"}})
    np.testing.assert_array_equal(found.model["conv.weight"], np.full((2, 3), 3, np.float32))
    assert found.model["count"].shape == ()
    np.testing.assert_array_equal(found.resume["conv.weight.exp_avg"], np.full((2, 3), -3, np.float32))


def test_only_the_last_and_the_best_are_kept(folder):
    for step, loss in ((1, 0.5), (2, 0.3), (3, None), (4, 0.4)):
        write_checkpoint(folder, checkpoint(step), loss)

    assert read_pointers(folder) == Pointers(last="steps/00000004", best="steps/00000002", best_loss=0.3)
    assert read_checkpoint(folder, "steps/00000002").step == 2
    assert folder.folders("steps") == ["00000002", "00000004"]


def test_a_run_stands_for_its_best_checkpoint_and_says_which_that_is(folder):
    assert (named_checkpoint(folder.url, folder.options).url, named_checkpoint(folder.url, folder.options).step) == (
        folder.url,
        "",
    )
    write_checkpoint(folder, checkpoint(2))
    assert named_checkpoint(folder.url, folder.options).step == "step 2, its run's last; none is the best yet"
    for step, loss in ((4, 0.3), (40, 0.4)):
        write_checkpoint(folder, checkpoint(step), loss)

    named = named_checkpoint(f"{folder.url}/", folder.options)

    assert named.url == f"{folder.url}/steps/00000004"
    assert named.step == "step 4, the best by its held-out loss of a run that is at step 40"
    assert named_checkpoint(named.url, folder.options).step == ""


def test_a_folder_without_checkpoints_has_none(folder):
    assert read_last(folder) is None
    assert read_run(folder) is None


def test_run_settings_read_back(folder):
    write_run(folder, {"config": {"batch": 4}})

    assert read_run(folder) == {"config": {"batch": 4}}


class Died(Exception):
    pass


class DyingFolder(Folder):
    """Dies before its n-th write."""

    writes_left = 0

    def write(self, name: str, data: bytes) -> None:
        if not self.writes_left:
            raise Died(name)
        self.writes_left -= 1
        super().write(name, data)


@pytest.mark.parametrize("writes", [0, 1, 2, 3, 4])
def test_a_writer_that_dies_leaves_the_checkpoint_before(tmp_path, writes):
    folder = DyingFolder(str(tmp_path / "run"))
    folder.writes_left = 5 + writes  # four parts and the pointer of the first one
    write_checkpoint(folder, checkpoint(1), 0.5)

    with pytest.raises(Died):
        write_checkpoint(folder, checkpoint(2), 0.4)

    assert read_last(Folder(folder.url)).step == 1
    write_checkpoint(Folder(folder.url), checkpoint(2), 0.4)
    assert read_last(Folder(folder.url)).step == 2


@pytest.mark.parametrize("part", ["model.safetensors", "resume.safetensors", "resume.json", "config.json"])
def test_missing_and_damaged_parts_are_named(tmp_path, part):
    folder = Folder(str(tmp_path / "run"))
    write_checkpoint(folder, checkpoint(1))
    whole = folder.read(f"steps/00000001/{part}")

    folder.write(f"steps/00000001/{part}", whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="steps/00000001 is damaged"):
        read_last(folder)

    folder.remove([f"steps/00000001/{part}"])
    with pytest.raises(CheckpointError, match=f"has no {part}"):
        read_last(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", json.dumps({"latest": "x"}).encode()])
def test_damaged_pointers_name_the_steps_that_are_there(tmp_path, content):
    folder = Folder(str(tmp_path / "run"))
    write_checkpoint(folder, checkpoint(7))
    folder.write("checkpoints.json", content)

    with pytest.raises(CheckpointError, match="00000007"):
        read_last(folder)


@pytest.mark.parametrize("part", ["model.safetensors", "resume.safetensors", "resume.json", "config.json"])
@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe{}", b"{" * 10_000, b"\xff" * 100, b'{"step": "1"}'])
def test_parts_that_hold_something_else_are_named(tmp_path, part, content):
    folder = Folder(str(tmp_path / "run"))
    write_checkpoint(folder, checkpoint(1))
    folder.write(f"steps/00000001/{part}", content)
    if part == "config.json" and content.startswith(b'{"'):
        assert read_last(folder).step == 1  # any object may describe a model; who uses it says what lacks
        return

    with pytest.raises(CheckpointError, match=f"steps/00000001 is damaged: {part}: "):
        read_last(folder)


@pytest.mark.parametrize("last", ["../../elsewhere", "steps/../..", "/steps/00000001", "steps/one", 1])
def test_pointers_lead_to_steps_of_the_run_only(tmp_path, last):
    folder = Folder(str(tmp_path / "run"))
    write_checkpoint(folder, checkpoint(1))
    folder.write("checkpoints.json", json.dumps({"last": last}).encode())

    with pytest.raises(CheckpointError, match="checkpoints.json is damaged"):
        read_last(folder)


def test_metrics_may_be_no_number_but_must_be_of_a_step(tmp_path):
    folder = Folder(str(tmp_path / "run"))
    write_metrics(folder, [{"step": 1, "loss": float("nan")}])
    assert np.isnan(read_metrics(folder)[0]["loss"])

    for content in (b"[1]\n", b'{"loss": 1}\n', b'{"step": 1'):
        folder.write("metrics.jsonl", content)
        with pytest.raises(CheckpointError, match="metrics.jsonl is damaged"):
            read_metrics(folder)


def test_what_a_killed_writer_left_is_removed_and_nothing_else(folder):
    for step, loss in ((1, 0.1), (2, None)):
        write_checkpoint(folder, checkpoint(step), loss)
    folder.write("steps/00000003/model.safetensors", b"of a step that was being removed")

    tidy(folder)

    assert folder.folders("steps") == ["00000001", "00000002"]
    assert read_last(folder).step == 2


def test_damaged_run_settings_are_an_error(tmp_path):
    folder = Folder(str(tmp_path / "run"))
    folder.write("run.json", b"{")

    with pytest.raises(CheckpointError, match="run.json is damaged"):
        read_run(folder)
