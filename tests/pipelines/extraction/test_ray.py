"""The pipeline on a real local Ray, and as a submitted job on a real head."""

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from cluster.metrics import TaskReport
from cluster.nodes import free_port
from cluster.resources import WorkerPool
from cluster.session import own_environment
from pipelines.executors import InlineExecutor, RayExecutor, WorkerBroken
from pipelines.extraction.run import extract
from pipelines.indexing import RunInput
from storage.paths import Folder
from storage.spec import ShardTask
from storage.store import FeatureStore
from storage.tars import MemberRules, scan_source
from tests.pipelines.extraction.test_s3 import tree
from tests.pipelines.features.test_learned import official_file

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("decode_on", ["actor", "cluster"])
def test_ray_writes_the_bytes_of_the_inline_run(make_tars, tiny, tmp_path, decode_on):
    """Where actors decode, with a learned upsampler, whose weights travel to them."""
    data, lift = make_tars(count=2, each=10), f"lift:{official_file(tmp_path / 'lift.pth')}"
    learned = {"facet": "key", "levels": ("x1", f"x2={lift}", f"x4={lift}")} if decode_on == "actor" else {}
    inline = tiny(data, out=str(tmp_path / "inline.zarr"), actor_cpus=1, **learned)
    on_ray = tiny(data, out=str(tmp_path / "ray.zarr"), executor="ray", decode_on=decode_on, **learned)
    extract(inline, InlineExecutor())

    summary = extract(on_ray, RayExecutor())

    assert (summary.ok, summary.failed, summary.this_run) == (20, 0, 20)
    assert tree(Folder(on_ray.out)) == tree(Folder(inline.out))


@dataclass(frozen=True)
class BreaksOnce:
    """Makes itself: a worker whose process can't go on after its first try at task 1, as after CUDA's illegal accesses."""

    tried: str

    def __call__(self, *, model: bool = True) -> "BreaksOnce":
        return self

    def run(self, task: ShardTask, loaded: object = None) -> TaskReport:
        if task.block == 1 and not Path(self.tried).exists():
            Path(self.tried).write_text(str(os.getpid()))
            raise WorkerBroken("CUDA error: an illegal memory access was encountered")
        return TaskReport(block=task.block, ok=task.n_rows, marks={"process": os.getpid()})


@pytest.mark.usefixtures("ray_session")
def test_a_worker_that_is_broken_is_replaced_and_its_tasks_run_again(tmp_path):
    tasks = [ShardTask(block=block, first=4 * block, last=4 * block + 4) for block in range(4)]
    pool = WorkerPool(device="cpu", size=1, cpus=1, gpus=0, calls=2)
    tried = tmp_path / "tried"

    reports = {report.block: report for report in RayExecutor().stream(BreaksOnce(str(tried)), tasks, pool)}

    assert sorted(reports) == [0, 1, 2, 3]
    assert all(report.outcome == "done" for report in reports.values())
    assert reports[1].marks["process"] != int(tried.read_text())


@pytest.mark.usefixtures("ray_session")
def test_scan_on_ray_keeps_the_order_of_the_sources(make_tars, monkeypatch):
    from storage.inputs import expand_inputs

    monkeypatch.setattr("pipelines.indexing.SMALL_INPUT", 0)
    files = expand_inputs([make_tars(count=9, each=3)])

    given = RunInput(files=files, rules=MemberRules(), limit=None, options={}, executor=RayExecutor())
    scans = list(given.scan(files))

    assert [scan.digest for scan in scans] == [scan_source(file, MemberRules()).digest for file in files]


def test_memory_urls_are_refused_on_ray(tiny):
    from pipelines.config import ConfigError

    with pytest.raises(ConfigError, match="one process only"):
        tiny("memory://in/a.tar", executor="ray")


@pytest.fixture
def head(tmp_path):
    """`ray start --head` on loopback; yields the addresses of its job server and of its metrics, and its users' environment."""
    port, dashboard, metrics = free_port(), free_port(), free_port()
    users = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | own_environment()
    environment = {**users, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment["RAY_metrics_report_interval_ms"] = "200"
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=2", "--num-gpus=0",
               "--node-ip-address=127.0.0.1", f"--port={port}", f"--dashboard-port={dashboard}", "--disable-usage-stats",
               f"--metrics-export-port={metrics}",
               # The default port may be taken by another Ray on this machine, such as that of `ray_session`.
               f"--dashboard-agent-listen-port={free_port()}",
               "--dashboard-host=127.0.0.1", "--object-store-memory=300000000"]  # fmt: skip
    log = (tmp_path / "head.log").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path)
    children: list[psutil.Process] = []
    try:
        address, token = f"http://127.0.0.1:{dashboard}", {"Authorization": f"Bearer {users['RAY_AUTH_TOKEN']}"}
        for _ in range(120):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(urllib.request.Request(f"{address}/api/version", headers=token), timeout=2)
                break
            if process.poll() is not None:
                pytest.fail((tmp_path / "head.log").read_text()[-2000:])
            time.sleep(1)
        else:
            pytest.fail(f"no job server after 120 s: {(tmp_path / 'head.log').read_text()[-2000:]}")
        yield address, f"http://127.0.0.1:{metrics}/metrics", users
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children(recursive=True)
        for p in [*children, process]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                p.kill()
        process.wait()
        log.close()


@contextlib.contextmanager
def scraped(url: str) -> Iterator[dict[str, float]]:
    """What of our metrics is seen at `url` meanwhile, as Prometheus would: the latest value by name and own labels."""
    seen: dict[str, float] = {}
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(0.2):
            with contextlib.suppress(OSError):
                text = urllib.request.urlopen(url, timeout=2).read().decode()
                for name, labels, value in re.findall(r"^(ray_raylift_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
                    own = re.findall(r'\b(?:status|direction|stage|outcome)="(\w+)"', labels)
                    seen[" ".join([name, *own])] = float(value)

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def test_submitted_job_extracts_on_the_cluster_and_its_counters_reach_prometheus(head, make_tars, tmp_path):
    head, metrics, environment = head
    data, out = make_tars(count=2, each=10), tmp_path / "job.zarr"
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", head, "--working-dir", ".", "--",
               "python", "jobs/extract.py", "--data", data, "--out", str(out), "--model", "test_vit.r160_in1k",
               "--weights", "random", "--size", "64", "--precision", "fp32"]  # fmt: skip

    with scraped(metrics) as counters:
        for _ in range(12):
            result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
            if "No available agent" not in result.stderr + result.stdout:
                break
            time.sleep(5)  # the head answers before its job agent does

    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert "20 images ok, 0 failed" in result.stdout
    assert FeatureStore.open(str(out)).status == "complete"
    assert pq.read_table(out / "ledger/samples/part-00000.parquet").num_rows == 20
    # Of each of two workers, the latest; one may have ended before it told its last.
    assert counters["ray_raylift_tasks_total done"] >= 1
    assert 1 <= counters["ray_raylift_rows_total ok"] <= 20
    assert counters["ray_raylift_bytes_total written"] > 0
    assert counters["ray_raylift_stage_seconds_total forward"] > 0


def test_working_dir_that_travels_is_small():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")

    stays = tuple((ROOT / ".rayignore").read_text().split())
    travels = [name for name in listed.stdout.splitlines() if not name.startswith(stays) and (ROOT / name).is_file()]
    sizes = {name: (ROOT / name).stat().st_size for name in travels}

    assert stays == ("tests/golden/",)
    assert sum(sizes.values()) < 8e6, sorted(sizes.items(), key=lambda item: -item[1])[:5]
