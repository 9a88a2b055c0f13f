"""An extraction on a cluster without nodes: they come, work, and go away again when there is nothing to do."""

import contextlib
import itertools
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.autoscaling import AutoscalingCluster
from cluster.nodes import ROOT
from cluster.session import own_cluster
from pipelines.benchmarks.chaos_jobs import job_command
from pipelines.benchmarks.data import require_fresh, write_photos
from pipelines.config import require_above, require_at_least
from pipelines.costs.clocks import Machine, NumbersFile
from pipelines.costs.process import BenchmarkFailed
from pipelines.results import number_lines
from storage.store import FeatureStore

SAMPLE_S = 0.5
WAIT_S = 240.0
"""How long the head may take to start, and nodes to go away beyond their idle time, on a machine that has much to do."""


@dataclass(frozen=True, kw_only=True)
class AutoscaleBenchmark:
    """Nodes and rows per second over time, on a head-only cluster of this machine with Ray's own autoscaler."""

    images: int = 2000
    """Photos to generate, as for `extract`."""
    size: int = 160
    """Side of the square input in pixels, of timm's test_vit with random weights."""
    block_rows: int = 16
    """Images per task."""
    nodes: int = 3
    """Nodes of one CPU at most, and actors."""
    idle_s: float = 15.0
    """Seconds after which an idle node is taken away."""
    port: int = 6380
    """Of the cluster; it needs the next one, too."""
    picture: str = "autoscale.png"
    """Where the figure goes; empty for none."""
    out: str = ""
    """Folder that keeps photos and store; default: a temporary one that is deleted."""
    json: NumbersFile = ""

    def __post_init__(self) -> None:
        require_at_least(1, self, "images", "block_rows", "nodes")
        require_above(0, self, "idle_s")


# No network. 2 CPU cores: about 1 minute; the defaults take about 3.
DEBUG = AutoscaleBenchmark(images=64, size=64, block_rows=8, nodes=2, idle_s=4.0, picture="")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The cluster at one moment."""

    seconds: float
    "since the head was ready"
    nodes: int
    "worker nodes that are alive"
    busy_cpus: float
    tasks: int
    "commit records in the store"


@dataclass(frozen=True, kw_only=True)
class AutoscaleResult:
    """An extraction, from a head that is ready to one that is alone again."""

    started: float
    "seconds since the head was ready, as `Sample.seconds`"
    ended: float
    counts: Mapping[str, int]
    "rows by status"
    samples: Sequence[Sample]


def measure_autoscaling(config: AutoscaleBenchmark, folder: Path) -> AutoscaleResult:
    """Start a head, extract on it from a process of its own, wait until its nodes are gone, and draw it."""
    require_fresh(folder, "feats.zarr", "photos")
    photos = write_photos(folder / "photos", config.images)
    store = folder / "feats.zarr"
    with _head(config, folder) as cluster:
        watch = _Watch(cluster, store)
        watch.until(lambda: len(watch.samples) >= 4, 60)
        started = watch.samples[-1].seconds
        flags = f"--size {config.size} --levels x1 pooled --block-rows {config.block_rows}".split()
        flags += f"--actors {config.nodes} --actor-cpus 1".split()
        command = job_command("extract.py", photos, str(store), cluster.address, *flags)
        with (folder / "extract.log").open("wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=cluster.environment(), stdout=log, stderr=subprocess.STDOUT)
        try:
            watch.until(lambda: process.poll() is not None, 3600)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            raise BenchmarkFailed((folder / "extract.log").read_text()[-3000:])
        ended = watch.samples[-1].seconds
        watch.until(lambda: watch.samples[-1].nodes == 0, config.idle_s + WAIT_S)
        watch.until(lambda: watch.samples[-1].seconds > ended + config.idle_s + 2, config.idle_s + WAIT_S)
    if config.picture:
        draw(config, watch.samples, config.picture)
    counts = FeatureStore.open(str(store)).root.counts or {}
    return AutoscaleResult(started=started, ended=ended, counts=counts, samples=watch.samples)


@contextlib.contextmanager
def _head(config: AutoscaleBenchmark, folder: Path) -> Iterator[AutoscalingCluster]:
    """A head-only cluster, up; all of it is ended at the end."""
    log = folder / "head.log"
    # Not within `folder`: sockets' paths must be short.
    with tempfile.TemporaryDirectory(prefix="raylift-", ignore_cleanup_errors=True) as own, own_cluster(Path(own)):
        cluster = AutoscalingCluster(port=config.port, nodes=config.nodes, idle_s=config.idle_s, folder=own)
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(cluster).items()]
        command = [sys.executable, "-m", AutoscalingCluster.__module__, *flags]
        with log.open("wb") as out:
            process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        try:
            _wait_for(cluster, process, log)
            yield cluster
        finally:
            _end(process, own)


def _wait_for(cluster: AutoscalingCluster, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while "block forever" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchmarkFailed(f"no head at {cluster.address}:\n{log.read_text()[-3000:]}")
        time.sleep(0.3)


def _end(process: subprocess.Popen[bytes], folder: str) -> None:
    """End the head politely, and by force what is left of it, and of nodes that were being started, by their `folder`."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=40)
    for one in psutil.process_iter(["cmdline"]):
        if any(folder in word for word in one.info["cmdline"] or []):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


class _Watch:
    """Samples of a cluster and of what is done in a store, taken from outside: nothing here counts as work for the autoscaler."""

    def __init__(self, cluster: AutoscalingCluster, store: Path):
        from ray._private.state import GlobalState
        from ray._raylet import GcsClientOptions

        self._commits = store / "ledger/commits"
        self._state = GlobalState()
        self._state._initialize_global_state(
            GcsClientOptions.create(cluster.address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
        )
        self._began = time.monotonic()
        self.samples: list[Sample] = []

    def until(self, there: Callable[[], bool], seconds: float) -> None:
        """Sample until `there()`. Raises `BenchmarkFailed` after so many seconds."""
        deadline = time.monotonic() + seconds
        while not there():
            if time.monotonic() > deadline:
                raise BenchmarkFailed(f"after {seconds:g} s still {self.samples[-1:]}")
            self._sample()
            time.sleep(SAMPLE_S)

    def _sample(self) -> None:
        nodes = [node for node in self._state.node_table() if node["Alive"] and node["Resources"].get("CPU")]
        free = self._state.available_resources().get("CPU", 0.0)
        self.samples.append(
            Sample(
                seconds=time.monotonic() - self._began,
                nodes=len(nodes),
                busy_cpus=sum(node["Resources"]["CPU"] for node in nodes) - free,
                tasks=sum(1 for _ in self._commits.iterdir()) if self._commits.exists() else 0,
            )
        )


def autoscale_report(config: AutoscaleBenchmark, result: AutoscaleResult, machine: Machine) -> Iterator[str]:
    """The numbers as Markdown, line by line."""
    counts = result.counts
    yield f"## autoscale: {config.images:,} images on a head without CPUs and up to {config.nodes} nodes"
    yield machine.line(f"{machine.cores} cores")
    rows = [[what, at, now.nodes, now.busy_cpus, now.tasks] for what, at, now in _events(result)]
    yield from number_lines({"": "", "s": ".0f", "worker nodes": "", "CPUs in use": "g", "tasks done": ""}, rows)
    most = max(sample.nodes for sample in result.samples)
    yield f"\n- {counts.get('ok', 0):,} images ok, {counts.get('failed', 0):,} failed; at most {most} nodes at once."
    yield f"- Idle nodes go after {config.idle_s:g} s."
    if config.picture:
        yield f"- Figure: {config.picture}"


def _events(result: AutoscaleResult) -> Iterator[tuple[str, float, Sample]]:
    """What happened when: in words, seconds, and the cluster then."""
    samples, ended = result.samples, result.ended
    yield "head alone", result.started, samples[0]
    most = max(sample.nodes for sample in samples)
    for count in range(1, most + 1):
        up = next(sample for sample in samples if sample.nodes >= count)
        yield f"node {count} up", up.seconds, up
    first = next(sample for sample in samples if sample.tasks)
    yield "first task done", first.seconds, first
    end = next(sample for sample in samples if sample.seconds >= ended)
    yield "extraction ended", ended, end
    after = [sample for sample in samples if sample.seconds >= ended]
    for before, now in itertools.pairwise(after):
        if now.nodes < before.nodes:
            yield f"{now.nodes} worker nodes left", now.seconds, now


def draw(config: AutoscaleBenchmark, samples: Sequence[Sample], path: str) -> None:
    """Nodes, and images per second over 5 s, against time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    left = figure.subplots()
    times = [sample.seconds for sample in samples]
    left.step(times, [sample.nodes for sample in samples], where="post", label="worker nodes", color="tab:blue")
    left.step(times, [sample.busy_cpus for sample in samples], where="post", ls=":", label="CPUs in use", color="tab:green")
    left.set(xlabel="seconds", ylabel="nodes, CPUs", ylim=(0, config.nodes + 0.5))
    right = left.twinx()
    width = round(5 / SAMPLE_S)
    rates = [
        (now.tasks - then.tasks) * config.block_rows / max(now.seconds - then.seconds, 1e-9)
        for then, now in zip(samples, samples[width:], strict=False)
    ]
    right.fill_between(times[width:], rates, alpha=0.25, color="tab:orange", label="images/s over 5 s")
    right.set(ylabel="images/s", ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=150)
