"""kill -9 of the driver, of a worker, of the whole cluster; then the same command: the bytes of an uninterrupted run.

Real processes and a real local Ray per launch. The three kinds run by default on local disk; `make soak` does ten random
ones on local disk and ten on S3.
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import s3fs

from jobs import extract as job
from storage.paths import Folder
from tests.conftest import jpeg, write_tar
from tests.pipelines.extraction.test_s3 import tree

ROOT = Path(__file__).resolve().parents[3]
N_IMAGES = 64
MODEL = ["--model", "vit_tiny_patch16_224.augreg_in21k_ft_in1k", "--weights", "random", "--precision", "fp32"]


LEVELS = ("--levels", "x1", "x2", "pooled")


def arguments(data: str, out: str, options: dict | None, *where: str, more: Sequence[str] = LEVELS) -> list[str]:
    found = ["--data", data, "--out", out, *MODEL, *more, "--block-rows", "4", *where]
    return [*found, "--storage-options", json.dumps(options)] if options else found


def launch(data: str, out: str, options: dict | None, log: Path, more: Sequence[str] = LEVELS) -> subprocess.Popen:
    where = ("--executor", "ray", "--ray-address", "local")
    command = [sys.executable, "jobs/extract.py", *arguments(data, out, options, *where, more=more)]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log.open("a"), stderr=subprocess.STDOUT)


def wait_for_commits(process: subprocess.Popen, folder: Folder, count: int, commits: str) -> bool:
    """True once `count` tasks are committed, False if the process ended before."""
    while process.poll() is None:
        if len(folder.sizes(commits)) >= count:
            return True
        time.sleep(0.1)
    return False


def family(process: subprocess.Popen) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def kill(process: subprocess.Popen, kind: str) -> None:
    if kind == "driver":
        os.kill(process.pid, signal.SIGKILL)
        return
    victims = family(process)
    if kind == "worker":
        victims = [p for p in victims if any("_Actor" in part for part in _cmdline(p))][:1]
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    if kind == "cluster":
        os.kill(process.pid, signal.SIGKILL)


def has_torch(process: subprocess.Popen) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return any("libtorch" in each.path for each in psutil.Process(process.pid).memory_maps())
    return False


def _cmdline(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return process.cmdline()
    return []


@contextlib.contextmanager
def ended(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """Whatever happens, nothing of `process` is left."""
    children = family(process)
    try:
        yield process
    finally:
        children += family(process)
        for p in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                p.kill()
        if process.poll() is None:
            process.kill()
        process.wait()


def digest(objects: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in objects.items()}


def run_with_kills(
    data: str,
    out: str,
    options: dict | None,
    kinds: list[str],
    log: Path,
    seed: int,
    more: Sequence[str] = LEVELS,
    commits: str = "ledger/commits",
) -> dict[str, int]:
    """Launch, kill at a random number of commits, again for each kind; then until it is complete. Returns what happened."""
    folder = Folder(out, options)
    draw = random.Random(seed)
    happened = {"driver": 0, "worker": 0, "cluster": 0, "launches": 0, "drivers with torch": 0}
    left = list(kinds)
    n_tasks = N_IMAGES // 4
    for _ in range(3 * len(kinds) + 3):
        process = launch(data, out, options, log, more=more)
        happened["launches"] += 1
        with ended(process):
            while left:
                done = len(folder.sizes(commits))
                target = min(n_tasks - 1, done + draw.randint(1, max(1, (n_tasks - done) // (len(left) + 1))))
                if not wait_for_commits(process, folder, target, commits):
                    break
                time.sleep(draw.random() * 0.5)
                happened["drivers with torch"] += has_torch(process)
                kind = left.pop(0)
                kill(process, kind)
                happened[kind] += 1
                if kind != "worker":
                    break
            code = process.wait(timeout=240)
        if code == 0 and not left:
            return happened
    raise AssertionError(f"not complete after {happened}: {log.read_text()[-3000:]}")


@pytest.fixture
def images(tmp_path) -> str:
    for t in range(2):
        members = [(f"{t}-{i:03d}.jpg", jpeg(100 * t + i, 320, 240)) for i in range(N_IMAGES // 2)]
        write_tar(tmp_path / f"in/s-{t}.tar", members)
    return str(tmp_path / "in/s-{0..1}.tar")


def uninterrupted(data: str, out: str, options: dict | None, more: Sequence[str] = LEVELS) -> dict[str, str]:
    """By this process."""
    assert job.run(arguments(data, out, options, "--executor", "inline", "--actor-cpus", "1", more=more)) == 0
    return digest(tree(Folder(out, options)))


def test_killed_driver_worker_and_cluster_leave_the_bytes_of_an_uninterrupted_run(images, tmp_path):
    log = tmp_path / "log"
    reference = uninterrupted(images, str(tmp_path / "reference.zarr"), None)

    happened = run_with_kills(images, str(tmp_path / "out.zarr"), None, ["driver", "worker", "cluster"], log, seed=1)

    assert happened["launches"] >= 3
    assert not happened["drivers with torch"], "2.5 s of CPU time, which a worker has spent already"
    assert digest(tree(Folder(str(tmp_path / "out.zarr")))) == reference


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("where", ["local", "s3"])
def test_ten_random_kills_leave_the_bytes_of_an_uninterrupted_run(images, tmp_path, where, s3_options):
    log = tmp_path / "log"
    options, base, data = None, str(tmp_path), images
    if where == "s3":
        options, base = s3_options["options"], f"s3://{s3_options['bucket']}"
        fs = s3fs.S3FileSystem(**options)
        for path in (tmp_path / "in").glob("*.tar"):
            fs.pipe_file(f"{s3_options['bucket']}/in/{path.name}", path.read_bytes())
        data = f"{base}/in/s-{{0..1}}.tar"
    draw = random.Random(5)
    kinds = [draw.choice(["driver", "worker", "cluster"]) for _ in range(10)]
    reference = uninterrupted(data, f"{base}/reference.zarr", options)

    happened = run_with_kills(data, f"{base}/out.zarr", options, kinds, log, seed=2)

    print(happened)
    assert sum(happened[kind] for kind in ("driver", "worker", "cluster")) == 10
    assert digest(tree(Folder(f"{base}/out.zarr", options))) == reference


ADDED = ("--add-level", "x4@int8", "--added-from", "backbone")


@pytest.mark.soak
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_level_that_is_added_by_ray_with_ten_random_kills(images, tmp_path, where, s3_options):
    log = tmp_path / "log"
    options, base = (s3_options["options"], f"s3://{s3_options['bucket']}") if where == "s3" else (None, str(tmp_path))
    uninterrupted(images, f"{base}/reference.zarr", options)
    reference, out = Folder(f"{base}/reference.zarr", options), Folder(f"{base}/out.zarr", options)
    for name in reference.below(""):
        out.write(name, reference.read(name))
    expected = uninterrupted(images, reference.url, options, more=ADDED)
    draw = random.Random(6)
    kinds = [draw.choice(["driver", "worker", "cluster"]) for _ in range(10)]

    happened = run_with_kills(images, out.url, options, kinds, log, seed=3, more=ADDED, commits="ledger/added/x4")

    print(happened)
    assert sum(happened[kind] for kind in ("driver", "worker", "cluster")) == 10
    assert digest(tree(out)) == expected
