"""Machines that die, on purpose: a job is run again and again on a cluster whose nodes are killed, and must lose nothing.

Faults come at random times that a seed decides. What is run is in pipelines/benchmarks/chaos_jobs.py, what is killed in
cluster/nodes.py. Ray's head keeps its state in memory (there is no Redis here): when its machine dies, so does its cluster,
and the same command goes on on a new one.
"""

import contextlib
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Literal, TypeAlias

from cluster.nodes import ROOT, LocalCluster, LocalNode, fill_stores, local_ray
from pipelines.benchmarks.chaos_jobs import ExtractJob, Found, Job, TrainJob
from pipelines.benchmarks.data import write_photos
from pipelines.config import ConfigError, require_at_least
from pipelines.costs.clocks import Machine, NumbersFile
from pipelines.costs.process import BenchmarkFailed
from pipelines.executors import NO_PROGRESS_S
from pipelines.results import table_lines

logger = logging.getLogger(__name__)

Kind: TypeAlias = Literal["node", "driver", "drain", "store", "head"]
WHAT: Mapping[Kind, str] = {
    "node": "SIGKILL to a node's raylet, agents and workers; another joins seconds later",
    "driver": "SIGKILL to the driver; the same command again",
    "drain": "a node is drained as before a spot preemption, then killed; another joins",
    "store": "objects half as large again as all object stores are held in them for seconds",
    "head": "SIGKILL to the head, the driver and all nodes; the same command on a new cluster",
}

COUNTS = ("expected", "found", "lost", "doubled")
"""Rows or steps that are found of a job, by field."""

POLL_S = 0.5
REJOIN_S = (2.0, 8.0)
"""Until another node is started in place of one that is gone, drawn from this range."""

NOTICE_S = 5.0
"""From a drained node's notice to its end; clouds give 30 to 120 s."""

STALLED_S = NO_PROGRESS_S + 300.0
"""A job that gets on by nothing for this long hangs, and its own guard didn't see it."""

MAX_EXITS = 12
"""Ends of its own accord, with an error, that a job may have without getting on in between."""


@dataclass(frozen=True, kw_only=True)
class ChaosBenchmark:
    """Extractions, one after another, on a cluster of this machine's own whose nodes are killed; is anything lost?"""

    minutes: float = 15.0
    """Faults are injected for so long at least; the extraction that is under way then is let finish without."""
    faults: int = 54
    """And so many of them at least; of the default --kinds, so many hold 30 of nodes and 8 of drivers in any order."""
    every: float = 15.0
    """Seconds between faults, on average; each time half of it to one and a half times of it."""
    early: float = 0.25
    """Part of the faults that may come while the job starts, too; the others wait until it has got on since its start."""
    kinds: tuple[Kind, ...] = ("node",) * 13 + ("driver",) * 4 + ("drain", "store", "head")
    """Kinds of faults, dealt like cards: each as often as it's named before any comes again."""
    nodes: int = 3
    """Worker nodes of one CPU; the head has none."""
    store_mb: int = 100
    """Size of each node's object store; Ray takes 75 or more."""
    images: int = 1024
    """Photographs to generate."""
    block_rows: int = 16
    """Images per task."""
    size: int = 96
    """Side of the input in pixels."""
    seed: int = 0
    """Of kinds, times and victims."""
    train: bool = False
    """The same for a training by two workers instead of extractions."""
    steps: int = 300
    """Of a training."""
    json: NumbersFile = ""

    def __post_init__(self) -> None:
        if not (self.every > 0 and self.kinds):
            raise ConfigError("--every must be above 0, and --kinds must name a kind")
        if not 0 <= self.early <= 1:
            raise ConfigError(f"--early {self.early}: must lie between 0 and 1")
        if self.faults < 1 and self.minutes <= 0:
            raise ConfigError(f"--faults {self.faults} and --minutes {self.minutes}: one must be above 0")
        require_at_least(1, self, "nodes", "images", "block_rows", "steps")
        require_at_least(75, self, "store_mb")
        if self.train and self.nodes < 2:
            raise ConfigError(f"--nodes {self.nodes}: --train has two workers, and needs a node for each")


# No network. About 75 seconds on 2 CPU cores that do nothing else. With the defaults at least 30 nodes and 5 drivers are killed,
# which takes a few minutes longer than --minutes.
DEBUG = ChaosBenchmark(minutes=0, faults=3, every=6, early=0, kinds=("node", "node", "driver"), nodes=2, images=512)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What was done to a job."""

    kind: Kind
    run: str
    progress: int
    "of the job then"


@dataclass(frozen=True, kw_only=True)
class Exit:
    """A driver that ended with an error, not by our hand."""

    run: str
    code: int
    said: str
    "the end of its log"


@dataclass(frozen=True, kw_only=True)
class Run(Found):
    """A job that was run to its end."""

    seconds: float


@dataclass(frozen=True, kw_only=True)
class ChaosResult(Found):
    """Faults, and what they did to the jobs: what was found of all of them together."""

    unit: str
    "what is counted: rows, or steps"
    faults: Mapping[Kind, int]
    "by kind"
    completed: int
    undisturbed_s: float
    chaos_s: float
    lost_s_per_fault: float
    launches: int
    restarts: int
    restarts_after_errors: int
    exits: Sequence[Exit]
    nodes_that_ended: Sequence[str]
    "not by our hand"
    runs: Sequence[Run]
    events: Sequence[Fault]


def measure_chaos(config: ChaosBenchmark, folder: Path) -> ChaosResult:
    """Run jobs under faults and hold what they leave against an undisturbed one. Raises `BenchmarkFailed` for one that hangs."""
    data = write_photos(folder / "photos", config.images)
    job: Job = ExtractJob(data, config.images, config.block_rows, config.size, actors=config.nodes)
    if config.train:
        job = TrainJob(data, config.steps, checkpoint_every=20)
    with (
        _stopped_politely(),
        local_ray(folder / "ray") as environment,
        LocalCluster(folder / "ray", store_bytes=config.store_mb * 10**6) as cluster,
        _Runner(config, job, cluster, environment, folder) as runner,
    ):
        cluster.start(config.nodes)
        return runner.measure()


@contextlib.contextmanager
def _stopped_politely() -> Iterator[None]:
    """SIGTERM ends the program as Ctrl-C does: with all that it has started."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def deal(kinds: Sequence[Kind], draw: random.Random) -> Iterator[Kind]:
    """Kinds of faults without end: shuffled, and each as often as it's named before any comes again."""
    while True:
        yield from draw.sample(kinds, len(kinds))


class _Runner:
    """Runs a job to its end over and over, and injects faults meanwhile."""

    def __init__(self, config: ChaosBenchmark, job: Job, cluster: LocalCluster, environment: Mapping[str, str], folder: Path):
        self.config, self.job, self.cluster, self.environment, self.folder = config, job, cluster, environment, folder
        self.random = random.Random(config.seed)
        self.kinds = deal(config.kinds, self.random)
        self._next_fault()
        self.at_launch, self.is_working = 0, False
        "progress when the driver was started, and whether there was any since"
        self.later: list[tuple[float, Callable[[], object]]] = []
        "what is to be done at which time: nodes that join, drained ones that go"
        self.faults: list[Fault] = []
        self.exits: list[Exit] = []
        self.died: list[str] = []
        "nodes that ended, not by our hand"
        self.launches = 0
        self.driver: subprocess.Popen[bytes]
        self.started: list[subprocess.Popen[bytes]] = []
        "drivers, and what else is to end with the benchmark"
        self.out, self.log = "", folder / "driver.log"

    def __enter__(self) -> "_Runner":
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
                process.wait()

    def measure(self) -> ChaosResult:
        undisturbed_s = self._run("reference")
        self.job.keep(self.out)
        began, self.launches = time.monotonic(), 0
        until = began + 60 * self.config.minutes
        self._next_fault()
        runs: list[Run] = []
        while self._goes_on(until):
            seconds = self._run(f"run-{len(runs):03d}", until)
            found = self.job.check(self.out)
            runs.append(Run(seconds=seconds, **vars(found)))
            logger.info("%s: %s; %d faults so far", Path(self.out).name, found, len(self.faults))
        return self._result(undisturbed_s, runs)

    def _goes_on(self, until: float) -> bool:
        return time.monotonic() < until or len(self.faults) < self.config.faults

    def _run(self, name: str, until: float | None = None) -> float:
        """A job from its first launch to its end, faults until `until`, if that is given; seconds."""
        started = changed = time.monotonic()
        self.out, progress, exits = str(self.folder / name), 0, 0
        self._launch()
        while (code := self.driver.poll()) != 0:
            now = time.monotonic()
            if code is not None:
                self._ended(code)
                exits += 1
                self._launch()
            if (done := self.job.progress(self.out)) != progress:
                progress, changed, exits = done, now, 0
            self._note_work(done)
            if until and self._goes_on(until) and now >= self.due and (self.is_working or self.is_early):
                self._inject()
            self._look_after(now)
            if now - changed > STALLED_S or exits > MAX_EXITS:
                raise BenchmarkFailed(
                    f"{name} stays at {progress} after {now - changed:.0f} s and {exits} ends of its own; the last of its log:\n"
                    f"{self._said()}"
                )
            time.sleep(POLL_S)
        return time.monotonic() - started

    def _launch(self) -> None:
        self.launches += 1
        self.at_launch, self.is_working = self.job.progress(self.out), False
        with self.log.open("wb") as log:
            self.driver = self._start(self.job.command(self.out, self.cluster.address), log)

    def _start(self, command: Sequence[str], log: IO[bytes] | int) -> subprocess.Popen[bytes]:
        """A process that uses the cluster, and ends with the benchmark."""
        # Without git, stores don't say which commit made them: one that is made meanwhile isn't a fault.
        environment = {**self.environment, "GIT_DIR": os.devnull}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        self.started.append(process)
        return process

    def _ended(self, code: int) -> None:
        logger.warning("the driver ended with %d: %s", code, self._said())
        self.exits.append(Exit(run=Path(self.out).name, code=code, said=self._said()))

    def _said(self) -> str:
        return self.log.read_text(errors="replace")[-1500:]

    def _next_fault(self) -> None:
        self.kind, self.is_early = next(self.kinds), self.random.random() < self.config.early
        self.due = time.monotonic() + self.config.every * self.random.uniform(0.5, 1.5)

    def _note_work(self, done: int) -> None:
        """A fault that has waited for the first sign of work doesn't come right with it."""
        if done > self.at_launch and not self.is_working:
            self.is_working = True
            self.due = max(self.due, time.monotonic() + self.config.every * self.random.uniform(0, 0.3))

    def _inject(self) -> None:
        """The fault that is due, or nothing while there is nothing to do it to."""
        if not getattr(self, f"_fault_{self.kind}")():
            return
        fault = Fault(kind=self.kind, run=Path(self.out).name, progress=self.job.progress(self.out))
        logger.info("fault %d: %s", len(self.faults) + 1, fault)
        self.faults.append(fault)
        self._next_fault()

    def _victim(self) -> LocalNode | None:
        """A worker node that is up; one that is on its way is none yet."""
        alive = self.cluster.alive()
        there = [node for node in self.cluster.workers if node.name in alive]
        return self.random.choice(there) if there else None

    def _fault_node(self) -> bool:
        victim = self._victim()
        if victim:
            self._replace(victim)
        return victim is not None

    def _fault_drain(self) -> bool:
        victim = self._victim()
        if victim is None or not self.cluster.drain(victim, NOTICE_S):
            return False
        self.later.append((time.monotonic() + NOTICE_S, partial(self._replace, victim)))
        return True

    def _fault_driver(self) -> bool:
        if self.driver.poll() is not None:
            return False
        self._kill_driver()
        self._launch()
        return True

    def _fault_store(self) -> bool:
        module = fill_stores.__module__
        code = f"import sys; from {module} import fill_stores; fill_stores(sys.argv[1], *map(float, sys.argv[2:]))"
        arguments = [self.cluster.address, str(1.5e6 * self.config.store_mb), str(self.config.every)]
        self._start([sys.executable, "-c", code, *arguments], subprocess.DEVNULL)
        return True

    def _fault_head(self) -> bool:
        self.cluster.stop()
        self._kill_driver()
        self.later.clear()
        time.sleep(self.random.uniform(*REJOIN_S))
        self.cluster.start(self.config.nodes)
        self._launch()
        return True

    def _kill_driver(self) -> None:
        self.driver.kill()
        self.driver.wait()

    def _replace(self, node: LocalNode) -> None:
        """Kill a node, where it wasn't yet, and have another one join."""
        if node in self.cluster.workers:
            self.cluster.kill(node)
            self.later.append((time.monotonic() + self.random.uniform(*REJOIN_S), self.cluster.add))

    def _look_after(self, now: float) -> None:
        """Do what is due, and replace nodes that ended by themselves: a drained one when its work is done, for example."""
        due = [do for at, do in self.later if at <= now]
        self.later = [(at, do) for at, do in self.later if at > now]
        for do in due:
            do()
        for node in [node for node in self.cluster.workers if not node.is_up]:
            logger.warning("%s ended", node.name)
            self.died.append(node.name)
            self._replace(node)
        if self.cluster.head and not self.cluster.head.is_up:
            raise BenchmarkFailed("the head ended by itself; see the log of Ray's gcs_server")

    def _result(self, undisturbed_s: float, runs: Sequence[Run]) -> ChaosResult:
        chaos_s = sum(run.seconds for run in runs)
        return ChaosResult(
            unit=self.job.unit,
            faults=dict(sorted(Counter(fault.kind for fault in self.faults).items())),
            completed=len(runs),
            **{name: sum(getattr(run, name) for run in runs) for name in (*COUNTS, "compared")},
            differ=tuple(f"run-{n:03d}: {name}" for n, run in enumerate(runs) for name in run.differ),
            undisturbed_s=undisturbed_s,
            chaos_s=chaos_s,
            lost_s_per_fault=(chaos_s - undisturbed_s * len(runs)) / max(1, len(self.faults)),
            launches=self.launches,
            restarts=self.launches - len(runs),
            restarts_after_errors=len(self.exits),
            exits=self.exits,
            nodes_that_ended=self.died,
            runs=runs,
            events=self.faults,
        )


def require_nothing_lost(result: ChaosResult) -> None:
    """Raises `BenchmarkFailed` where a job lost, doubled or changed something."""
    counts = {"lost": result.lost, "doubled": result.doubled}
    wrong = [f"{count} {result.unit} {name}" for name, count in counts.items() if count]
    if result.differ:
        first = ", ".join(result.differ[:5])
        wrong.append(f"{len(result.differ)} of {result.compared} parts differ from the undisturbed: {first}")
    if wrong:
        raise BenchmarkFailed("; ".join(wrong))


def chaos_report(config: ChaosBenchmark, result: ChaosResult, machine: Machine) -> Iterator[str]:
    """The numbers as Markdown, line by line."""
    what, parts = ("trainings", "arrays and losses") if config.train else ("extractions", "objects")
    yield f"## chaos: {sum(result.faults.values())} faults in {result.chaos_s / 60:.1f} minutes of {what}"
    yield f"{machine.line()} Nodes: {config.nodes}, seed {config.seed}."
    yield from table_lines(["fault", "injected"], [[f"{k}: {WHAT[k]}", str(n)] for k, n in result.faults.items()])
    rows = [
        [f"{what} completed", f"{result.completed:,}"],
        *([f"{result.unit} {name}", f"{getattr(result, name):,}"] for name in COUNTS),
        [f"{parts} compared", f"{result.compared:,}"],
        ["of them other bytes", f"{len(result.differ):,}"],
        ["undisturbed, s", f"{result.undisturbed_s:.1f}"],
        ["time lost per fault, s", f"{result.lost_s_per_fault:.1f}"],
        ["starts of the same command again", f"{result.restarts:,}"],
        ["of them after an error of its own", f"{result.restarts_after_errors:,}"],
    ]
    yield from table_lines(["", ""], rows)
