"""kill -9 before every single storage operation of a run, in turn; then the same command ends with 0 and as if undisturbed.

By default a few points of each kind of run, spread over it; `make soak` takes all of them.
"""

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import s3fs

from storage.local_files import PARTIAL
from storage.paths import Folder
from tests.conftest import jpeg, write_tar
from tests.forks import ROOT, Fork, Forks, operations
from tests.pipelines.extraction.test_s3 import tree

EXTRACT = shlex.split(
    "--model test_vit.r160_in1k --weights random --size 64 --levels x1 pooled --precision fp32 --executor inline --device cpu "
    "--actor-cpus 1 --block-rows 2 --max-failed-fraction 0.5"
)
TRAIN = shlex.split(
    "resize_conv --model test_vit.r160_in1k --weights random --size 64 --val-rows 1 --precision fp32 --batch 2 --epochs 2 "
    "--log-every 1 --checkpoint-every 2 --validate-every 4 --executor inline --device cpu --max-failed-fraction 0.5"
)

CONSTANTS: dict[str, int] = {}
"""What forks have for constants of the code, by module.NAME."""

MEASURED = ("images_per_s", "run_images_per_s", "seconds")
"""What lines of metrics.jsonl say of time: the only thing that two equal runs may differ in."""


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    """A tar of four samples, of which one is no image."""
    members = [(f"{i}.jpg", jpeg(i, 48, 40) if i != 2 else b"not an image") for i in range(4)]
    return str(write_tar(tmp_path_factory.mktemp("in") / "a.tar", members))


@dataclass(frozen=True)
class Sweep:
    """A command to be killed before each of its storage operations, each time in a new place."""

    parent: Forks
    program: str
    argv: list[str]
    place: Callable[[int], Folder]
    "of a number: made ready for the run that is to be killed"
    result: Callable[[Folder], object]
    "what must be equal in the end"
    logs: Path

    def fork(self, number: int, kill_before: int) -> Fork:
        folder = self.place(number)
        watched = folder.url if folder.options else str(Path(folder.url).resolve())
        argv = [*self.argv, "--out", folder.url]
        if folder.options:
            argv += ["--storage-options", json.dumps(folder.options)]
        log = str(self.logs / f"{number}.log")
        return Fork(program=self.program, argv=argv, place=watched, log=log, number=kill_before, constants=dict(CONSTANTS))

    def run(self, at_most: int = 10**6) -> int:
        """Kill before each operation, or before `at_most` of them; returns how many times. The first and the last are included
        where there are more than two: else, what is killed has done something, and leaves something to do."""
        undisturbed = self.fork(0, -1)
        assert self.parent.run(undisturbed) == 0, Path(undisturbed.log).read_text()
        folder = self.folder(undisturbed)
        expected, total = self.result(folder), operations(undisturbed)
        ends = (0, total - 1) if at_most > 2 else ((total - 1) / 3, 2 * (total - 1) / 3)
        points = sorted({round(point) for point in np.linspace(*ends, min(at_most, total))})
        for point in points:
            fork = self.fork(point + 1, point)
            assert self.parent.run(fork) == -9, (point, Path(fork.log).read_text())
            code = self.parent.run(replace(fork, number=-1))
            assert code == 0, (point, Path(fork.log).read_text())
            assert self.result(self.folder(fork)) == expected, point
            self.require_tidy(self.folder(fork))
        return len(points)

    @staticmethod
    def folder(fork: Fork) -> Folder:
        argv = list(fork.argv)
        options = json.loads(argv[argv.index("--storage-options") + 1]) if "--storage-options" in argv else None
        return Folder(argv[argv.index("--out") + 1], options)

    @staticmethod
    def require_tidy(folder: Folder) -> None:
        """What killed runs leave: their folders below runs/, which say what died. No half files, no probes."""
        assert not any(name.startswith(PARTIAL) for name in folder.sizes(""))
        assert not folder.folders(".partial")
        assert set(folder.sizes("runs")) <= {"zarr.json"}
        for run in folder.folders("runs"):
            assert set(folder.sizes(f"runs/{run}")) <= {"run.json", "progress.json"}
            assert folder.folders(f"runs/{run}") in ([], ["attempts"])


def stored(folder: Folder) -> dict[str, bytes]:
    """All objects but those below runs/ and views/."""
    return {name: data for name, data in tree(folder).items() if not name.startswith("views/rgb")}


def trained(folder: Folder) -> dict[str, object]:
    """All objects of a training run, without the time that it took: TensorBoard's files are of one start each."""
    found: dict[str, object] = dict(tree(folder))
    found["run.json"] = found["run.json"].replace(folder.url.encode(), b"")
    lines = [json.loads(line) for line in found.pop("metrics.jsonl").splitlines()]
    found["metrics"] = [{name: line[name] for name in line if name not in MEASURED} for line in lines]
    return {name: value for name, value in found.items() if not name.startswith("tensorboard/")}


def extraction(parent: Forks, images: str, tmp_path: Path) -> Sweep:
    def place(number: int) -> Folder:
        return Folder(str(tmp_path / f"{number}.zarr"))

    return Sweep(parent, "extract", ["--data", images, *EXTRACT], place, stored, tmp_path)


def again(parent: Forks, images: str, tmp_path: Path, *flags: str) -> Sweep:
    """A finished extraction, run again with further flags."""
    first = extraction(parent, images, tmp_path).fork(10**6, -1)
    assert parent.run(first) == 0, Path(first.log).read_text()

    def place(number: int) -> Folder:
        out = tmp_path / f"again-{number}.zarr"
        if not out.exists():
            shutil.copytree(Sweep.folder(first).url, out)
        return Folder(str(out))

    return Sweep(parent, "extract", ["--data", images, *EXTRACT, *flags], place, stored, tmp_path)


def retry(parent: Forks, images: str, tmp_path: Path) -> Sweep:
    return again(parent, images, tmp_path, "--retry-failed")


def further_level(parent: Forks, images: str, tmp_path: Path) -> Sweep:
    """A level of the stored maps is added."""
    return again(parent, images, tmp_path, "--add-level", "x2")


def level_again(parent: Forks, images: str, tmp_path: Path) -> Sweep:
    """A level for which the backbone runs again, over the photographs."""
    return again(parent, images, tmp_path, "--add-level", "fine:x2@int8", "--added-from", "backbone")


def repair(parent: Forks, images: str, tmp_path: Path) -> Sweep:
    """The tar was cut behind its third sample, and is whole now: a row is repaired, and there is one more."""
    whole = Path(images).read_bytes()
    with tarfile.open(images) as tar:
        third = tar.getmembers()[2]
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[: third.offset_data + 3])
    sweep = again(parent, str(cut), tmp_path, "--retry-failed")
    cut.write_bytes(whole)
    return sweep


def replacement(parent: Forks, images: str, tmp_path: Path) -> Sweep:
    """The first image is another one, of another size."""
    data = shutil.copy(images, tmp_path / "a.tar")
    sweep = again(parent, str(data), tmp_path, "--replace-changed")
    with tarfile.open(images) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar.getmembers()]
    write_tar(tmp_path / "a.tar", [("0.jpg", jpeg(9, 64, 40)), *members[1:]])
    return sweep


def growth(parent: Forks, images: str, tmp_path: Path) -> Sweep:
    """The tar was cut; it's whole now, holds another image in the place of the first, and two more."""
    whole, data = Path(images).read_bytes(), tmp_path / "a.tar"
    with tarfile.open(images) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
        data.write_bytes(whole[: tar.getmember("2.jpg").offset_data + 3])
    sweep = again(parent, str(data), tmp_path, "--replace-changed")
    write_tar(data, [*{**members, "0.jpg": jpeg(9, 64, 40), "4.jpg": jpeg(4), "5.jpg": jpeg(5)}.items()])
    return sweep


def addition(parent: Forks, images: str, tmp_path: Path) -> Sweep:
    """A second tar comes, which sorts before the first: its images go on in the last block, which wasn't full."""
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in/b.tar", [("b-0.jpg", jpeg(10)), ("b-1.jpg", jpeg(11)), ("b-2.jpg", jpeg(12))])
    sweep = again(parent, str(tmp_path / "in"), tmp_path)
    write_tar(tmp_path / "in/a.tar", [("a-0.jpg", jpeg(13)), ("a-1.jpg", jpeg(14)), ("a-2.jpg", b"not an image")])
    return sweep


def training(parent: Forks, images: str, tmp_path: Path) -> Sweep:
    def place(number: int) -> Folder:
        return Folder(str(tmp_path / f"run-{number}"))

    return Sweep(parent, "train", [*TRAIN, "--data", images], place, trained, tmp_path)


@pytest.mark.parametrize(
    ("kind", "points"), [(extraction, 4), (repair, 2), (growth, 3), (addition, 2), (further_level, 2), (training, 3)]
)
def test_killed_before_an_operation_the_same_command_ends_as_if_undisturbed(parent, images, tmp_path, kind, points):
    """A repair tries again what failed, and a growth replaces what changed; `make soak` takes each of the two alone as well."""
    assert kind(parent, images, tmp_path).run(points) == points


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", [extraction, retry, repair, replacement, growth, addition, further_level, level_again, training])
def test_killed_before_every_operation_the_same_command_ends_as_if_undisturbed(parent, images, tmp_path, kind):
    assert kind(parent, images, tmp_path).run() >= 30


@pytest.mark.parametrize(("kind", "points"), [(extraction, 2), (addition, 2)])
def test_the_same_with_records_in_packs(parent, images, tmp_path, kind, points, monkeypatch):
    """Of a run that makes the packs, and one that finds them there; `make soak` takes all kinds."""
    monkeypatch.setitem(CONSTANTS, "storage.commits.PACK_BLOCKS", 2)
    sweep = kind(parent, images, tmp_path)
    assert sweep.run(points) == points
    assert Folder(sweep.place(0).url).names("ledger/commits/packed")


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", [extraction, retry, repair, replacement, growth, addition, further_level])
def test_the_same_with_records_in_packs_at_every_point(parent, images, tmp_path, kind, monkeypatch):
    monkeypatch.setitem(CONSTANTS, "storage.commits.PACK_BLOCKS", 2)
    assert kind(parent, images, tmp_path).run() >= 30


# --- S3 ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3_process(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Options of an S3 server in a process of its own, which forks don't share, with a bucket `kills`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("moto") / "log"
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.servers.s3", "-H", "127.0.0.1", "-p", str(port)],
        cwd=ROOT,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    options = {"key": "test-access", "secret": "test-secret-value", "endpoint_url": f"http://127.0.0.1:{port}"}
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", port)):
                    break
            time.sleep(0.05)
        s3fs.S3FileSystem(**options, skip_instance_cache=True).mkdir("kills")
        yield options
    finally:
        server.kill()
        server.wait()


def on_s3(sweep: Sweep, options: dict[str, str]) -> Sweep:
    """The same commands with their output on S3, in places of this test's own."""
    base = f"s3://kills/{re.sub(r'[^a-z0-9]', '-', sweep.logs.name)}"

    def place(number: int) -> Folder:
        made_ready, there = sweep.place(number), Folder(f"{base}/{sweep.program}-{number}", options)
        for name in made_ready.below(""):
            there.write(name, made_ready.read(name))
        return there

    return replace(sweep, place=place)


@pytest.mark.parametrize(("kind", "points"), [(extraction, 2), (training, 1)])
def test_the_same_on_s3(parent, images, tmp_path, s3_process, kind, points):
    assert on_s3(kind(parent, images, tmp_path), s3_process).run(points) == points


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", [extraction, training, retry, replacement, growth, addition, further_level, level_again])
def test_the_same_on_s3_at_every_point(parent, images, tmp_path, s3_process, kind):
    assert on_s3(kind(parent, images, tmp_path), s3_process).run() >= 20
