"""Evaluations that are shared out, killed and continued, on local disk and on S3: the numbers of one undisturbed process."""

import dataclasses
import functools
import json
import os
import pickle
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import s3fs

from jobs import evaluate as job
from pipelines.evaluation import cka, correspondence, discovery, run, similarity, video
from pipelines.evaluation.run import Piece, Record, run_pieces
from pipelines.evaluation.similarity import SimilarityConfig
from pipelines.executors import InlineExecutor, RayExecutor
from pipelines.features.feature_source import FeatureSource
from storage.datasets.files import DatasetError, ItemLeftOut
from storage.datasets.images import unreadable as unreadable_image
from storage.paths import Folder
from tests.conftest import unreadable
from tests.forks import Fork
from tests.pipelines.evaluation.test_evaluation import (
    TINY,
    cka_config,
    discovery_config,
    evaluate,
    extract,
    make_davis,
    make_spair,
    make_voc,
    spair_config,
    video_config,
)
from tests.pipelines.extraction.test_s3 import tree


def parts(out: object, options: dict | None = None) -> dict[str, bytes]:
    """What each piece gave."""
    return tree(Folder(str(out), options), "parts/")


# --- shared out -------------------------------------------------------------------------------------------------------


def evaluate_by_four(module, config):
    """As `evaluate`, but by four workers in this process, which take pieces in a random order."""
    task, recipe, folder = module.prepare(config)
    work = run.Work(evaluation=task, recipe=recipe, folder=folder, device="cpu", threads=1)
    workers = [work() for _ in range(4)]
    pieces = random.Random(3).sample(task.pieces(), len(task.pieces()))
    for number, piece in enumerate(pieces):
        workers[number % 4](piece)
    records = run_pieces(config, task, recipe, folder, InlineExecutor())
    return pieces, records, module.find(config, task, recipe, records)


CASES = {
    "correspondence": (correspondence, make_spair, spair_config, "JPEGImages", "pad"),
    "video": (video, make_davis, video_config, "JPEGImages/480p", "squash"),
    "discovery": (discovery, make_voc, discovery_config, "VOCdevkit/VOC2007/JPEGImages", "squash"),
}


@pytest.mark.parametrize("task", CASES)
def test_one_worker_on_a_model_and_four_on_a_store_give_the_same_numbers(task, tmp_path, tiny, monkeypatch):
    module, make, config, images, geometry = CASES[task]
    data = make(tmp_path / "d")
    stores = tuple(extract(tmp_path, f"s{side}", data / images, tiny, geometry=geometry, size=str(side)) for side in (48, 64))
    one, findings = evaluate(module, config(data, tmp_path / "one", sizes=(48, 64), drawing="extract"))
    monkeypatch.setattr(correspondence, "PIECE_PAIRS", 2)
    monkeypatch.setattr(discovery, "PIECE_IMAGES", 1)

    pieces, four, found = evaluate_by_four(module, config(data, tmp_path / "four", sizes=(), stores=stores))

    assert len(pieces) >= 4
    assert four == one
    assert found.tables == findings.tables
    assert found.details == findings.details


# --- killed -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Together:
    """An evaluation whose pieces begin when two workers are there; the first that has done `victim` is killed over it."""

    evaluation: object
    place: Path
    victim: str

    def pieces(self) -> list[Piece]:
        return self.evaluation.pieces()

    def run(self, piece: Piece, source: FeatureSource, folder: Folder) -> list[Record]:
        (self.place / f"worker-{os.getpid()}").touch()
        deadline = time.monotonic() + 500
        while len(list(self.place.glob("worker-*"))) < 2:
            assert time.monotonic() < deadline, "two workers didn't come"
            time.sleep(0.05)
        records = self.evaluation.run(piece, source, folder)
        with (self.place / f"did-{piece.name}").open("a") as file:
            file.write("1")
        if piece.name == self.victim and not (self.place / "killed").exists():
            (self.place / "killed").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return records


@pytest.mark.usefixtures("ray_session")
def test_two_actors_one_of_them_killed_mid_piece_give_the_numbers_of_one_process(tmp_path):
    data, sizes, place = make_spair(tmp_path / "d"), (32, 48, 64, 80, 96), tmp_path / "place"
    place.mkdir()
    one, findings = evaluate(correspondence, spair_config(data, tmp_path / "one", sizes=sizes))
    config = spair_config(data, tmp_path / "two", sizes=sizes, executor="ray", actors=2)
    task, recipe, folder = correspondence.prepare(config)

    records = run_pieces(config, Together(task, place, "80-00000"), recipe, folder, RayExecutor())

    assert records == one
    assert correspondence.find(config, task, recipe, records).tables == findings.tables
    workers = {path.name.removeprefix("worker-") for path in place.glob("worker-*")}
    assert (place / "killed").read_text() in workers
    assert len(workers) == 3  # two, and the one started for the one that was killed
    assert (place / "did-80-00000").read_text() == "11"
    assert parts(tmp_path / "two") == parts(tmp_path / "one")


def hold(argv: list[str]) -> int:
    """What a fork runs: the program, which stands still within its second piece, when its label images are written."""
    plain, did = video.Video.run, []

    def stands_still(self, piece, source, folder):
        records = plain(self, piece, source, folder)
        did.append(piece.name)
        if len(did) > 1:
            threading.Event().wait()
        return records

    video.Video.run = stands_still
    return job.run(argv)


def command(data: Path, out: Path) -> list[str]:
    return [
        *("video", "--data", str(data), "--out", str(out), "--sizes", "64", "--pictures", "1"),
        *("--model", "test_vit.r160_in1k", "--weights", "random", "--precision", "fp32"),
        *("--executor", "inline", "--device", "cpu"),
    ]


def test_a_killed_driver_is_continued_without_doing_what_is_done(parent, tmp_path):
    data, whole, out = make_davis(tmp_path / "d"), tmp_path / "whole", tmp_path / "out"
    assert job.run(command(data, whole)) == 0
    log = tmp_path / "log"
    held = Fork(program=f"{__name__}:{hold.__name__}", argv=command(data, out), place=str(out), log=str(log))
    pid, deadline = parent.start(held), time.monotonic() + 200
    # Clip a is the longer one, and comes first; clip b's label images, the last of which ends its piece but for the part.
    while not (out / "masks/64/bilinear-x2/clip-b/00004.png").exists():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    assert parent.wait(pid) == -signal.SIGKILL, log.read_text()
    before = {path.name: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    assert [*before] == ["64-0000.jsonl"]
    assert not (out / "results.json").exists()

    assert job.run(command(data, out)) == 0

    after = {path.name: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    assert sorted(after) == ["64-0000.jsonl", "64-0001.jsonl"]
    assert before.items() <= after.items()
    assert parts(out) == parts(whole)
    assert tree(Folder(str(out)), "masks/") == tree(Folder(str(whole)), "masks/")
    assert (out / "results.md").read_bytes() == (whole / "results.md").read_bytes()


# --- on object storage ------------------------------------------------------------------------------------------------


def test_data_stores_and_results_may_be_on_s3(tmp_path, tiny, s3_options):
    data = make_spair(tmp_path / "d")
    store = extract(tmp_path, "pad", data / "JPEGImages", tiny, geometry="pad")
    options, bucket = s3_options["options"], f"s3://{s3_options['bucket']}"
    fs = s3fs.S3FileSystem(**options)
    for source, name in ((str(data), "d"), (store, "pad.zarr")):
        fs.put(f"{source}/", f"{bucket}/{name}/", recursive=True)
    text = json.dumps({"s3": options})
    local, _ = evaluate(correspondence, spair_config(data, tmp_path / "local", sizes=(64,), drawing="extract", pictures=1))

    def on_s3(name: str, **changes: object) -> list[Record]:
        changes = {"sizes": (64,), "pictures": 1, "storage_options": text, **changes}
        return evaluate(correspondence, spair_config(f"{bucket}/d", f"{bucket}/{name}", **changes))[0]

    assert on_s3("live", drawing="extract") == local
    assert on_s3("stored", stores=(f"{bucket}/pad.zarr",)) == local

    live = tree(Folder(f"{bucket}/live", options))
    assert parts(f"{bucket}/live", options) == parts(f"{bucket}/stored", options) == parts(tmp_path / "local")
    assert {"results.md", "results.json", "run.json", "pictures/matches.png"} <= set(live)
    assert live["results.md"] == (tmp_path / "local/results.md").read_bytes()
    assert b"test-secret-value" not in b"".join(live.values())
    before = fs.info(f"{bucket}/live/parts/64-00000.jsonl")["LastModified"]
    assert on_s3("live", drawing="extract") == local
    assert fs.info(f"{bucket}/live/parts/64-00000.jsonl")["LastModified"] == before


def test_clips_on_s3_score_as_on_disk(tmp_path, s3_options):
    data = make_davis(tmp_path / "d")
    options, bucket = s3_options["options"], f"s3://{s3_options['bucket']}"
    s3fs.S3FileSystem(**options).put(f"{data}/", f"{bucket}/d/", recursive=True)
    local, findings = evaluate(video, video_config(data, tmp_path / "local", pictures=1))

    settings = video_config(f"{bucket}/d", f"{bucket}/out", pictures=1, storage_options=json.dumps({"s3": options}))
    records, found = evaluate(video, settings)

    assert records == local
    assert found.tables == findings.tables
    here, there = Folder(str(tmp_path / "local")), Folder(f"{bucket}/out", options)
    assert tree(there, "masks/") == tree(here, "masks/")
    assert tree(there, "pictures/") == tree(here, "pictures/")


def similarity_config(data: object, out: Path) -> SimilarityConfig:
    return SimilarityConfig.of(data=str(data), out=str(out), sizes=(64,), **TINY)


CLIP = "JPEGImages/480p/clip-a/0000{}.jpg"
OBJECTS = "Annotations/480p/clip-a/0000{}.png"

UNREADABLE = [
    ("correspondence", "JPEGImages/cat/2008_000001.jpg", "no image"),
    ("correspondence", "JPEGImages/cat/2008_000001.jpg", "no permission"),
    *[("video", name, "no image") for name in (CLIP.format(0), CLIP.format(3), OBJECTS.format(0))],
    ("video", OBJECTS.format(4), "no permission"),
    ("discovery", "JPEGImages/000002.jpg", "no image"),
    ("cka", "JPEGImages/cat/2008_000001.jpg", "no permission"),
    ("similarity", "JPEGImages/cat/2008_000001.jpg", "no image"),
]
"""Of each evaluation what it reads; both faults of images and of labels."""

READS = {
    "correspondence": (correspondence, make_spair, spair_config),
    "video": (video, make_davis, video_config),
    "discovery": (discovery, make_voc, discovery_config),
    "cka": (cka, make_spair, cka_config),
    "similarity": (similarity, make_spair, similarity_config),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The records of an evaluation of its whole data set, which is made and evaluated once."""

    @functools.cache
    def of(task: str) -> list[Record]:
        (module, make, config), place = READS[task], tmp_path_factory.mktemp(task)
        make(place / "d")
        return evaluate(module, config(place / "d", place / "out"))[0]

    return of


@pytest.mark.parametrize(("task", "name", "fault"), UNREADABLE)
def test_what_can_not_be_read_costs_its_own_items_alone(tmp_path, monkeypatch, whole, task, name, fault):
    """The others' records are those of the whole data set, and the results say what was left out, and why."""
    module, make, config = READS[task]
    data, undamaged = make(tmp_path / "d"), [] if module is cka else whole(task)
    if module is discovery:
        data = data / "VOCdevkit/VOC2007"
    reason = "can't be read: Permission denied"
    if fault == "no image":
        (data / name).write_text("no image")
        reason = "can't be read as an image: "
    else:
        unreadable(monkeypatch, name)

    records, found = evaluate(module, config(tmp_path / "d", tmp_path / "damaged"))

    ((said, count),) = [(each.reason, each.count) for each in found.items.left_out if each.first.endswith(name)]
    assert said.startswith(reason)
    scored = [record for record in records if "left_out" not in record]
    assert scored
    assert count >= 1
    if module is not cka:  # a batch's terms are of all its images
        assert all(record in undamaged for record in scored)
        assert 0 < len(scored) < len(undamaged)


def test_a_data_set_of_which_nothing_can_be_read_is_refused(tmp_path):
    for path in (make_davis(tmp_path / "d") / "JPEGImages/480p").rglob("*.jpg"):
        path.write_text("no image")

    with pytest.raises(DatasetError, match="no clip can be scored: 2 left out: can't be read as an image"):
        evaluate(video, video_config(tmp_path / "d", tmp_path / "out"))


def test_an_item_that_is_left_out_says_why_across_processes():
    errors = [ItemLeftOut("a.png", "why"), unreadable_image("a.png", OSError("cut"))]

    assert [str(each) for each in map(pickle.loads, map(pickle.dumps, errors))] == [
        "a.png: why",
        "a.png can't be read as an image: OSError: cut",
    ]
