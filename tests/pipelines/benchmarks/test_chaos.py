"""Jobs on a cluster whose nodes and drivers are killed lose nothing, and the chaos job would notice if they did."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from cluster.nodes import processes_in
from pipelines.benchmarks.chaos import ChaosBenchmark, ChaosResult, chaos_report, deal, require_nothing_lost
from pipelines.benchmarks.chaos_jobs import ExtractJob, TrainJob
from pipelines.config import ConfigError
from pipelines.costs.clocks import machine
from pipelines.costs.process import BenchmarkFailed
from pipelines.executors import InlineExecutor
from pipelines.extraction.run import extract
from storage.paths import Folder
from storage.runs import Checkpoint, write_checkpoint, write_metrics
from tests.conftest import squeezed

ROOT = Path(__file__).resolve().parents[3]

RESULT = ChaosResult(
    unit="rows", faults={"driver": 5, "node": 31}, completed=9, expected=9216, found=9216, lost=0, doubled=0, compared=900,
    differ=(), undisturbed_s=40.0, chaos_s=900.0, lost_s_per_fault=15.0, launches=15, restarts=6, restarts_after_errors=1,
    exits=[], nodes_that_ended=[], runs=[], events=[],
)  # fmt: skip


# --- what is found --------------------------------------------------------------------------------------------------------


@pytest.fixture
def extracted(make_tars, tiny, tmp_path):
    """A job whose reference is a store of 20 rows, and a copy of that store to damage."""
    config = tiny(make_tars(count=2, each=10))
    extract(config, InlineExecutor())
    job = ExtractJob("unused", rows=20, block_rows=4, size=64, actors=1)
    job.keep(config.out)
    shutil.copytree(config.out, tmp_path / "copy")
    return job, tmp_path / "copy"


def test_an_equal_store_has_lost_and_changed_nothing(extracted):
    job, copy = extracted
    shutil.rmtree(copy / "runs")

    found = job.check(str(copy))

    assert (found.expected, found.found, found.lost, found.doubled, found.differ) == (20, 20, 0, 0, ())
    assert found.compared > 20
    assert job.progress(str(copy)) == 5


def test_changed_missing_and_additional_objects_are_found(extracted):
    job, copy = extracted
    shard = next((copy / "x1/features").rglob("c/0/*/*/0"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    commit = next((copy / "ledger/commits").iterdir())
    commit.rename(commit.with_name("00000099.parquet"))

    differ = job.check(str(copy)).differ

    assert differ == tuple(
        sorted([str(shard.relative_to(copy)), f"ledger/commits/{commit.name}", "ledger/commits/00000099.parquet"])
    )


def test_lost_failed_and_doubled_rows_are_counted(extracted):
    job, copy = extracted
    path = copy / "ledger/samples/part-00000.parquet"
    table = pq.read_table(path).to_pylist()
    table[3]["status"] = "failed"
    pq.write_table(pq.read_table(path).schema.empty_table().from_pylist([*table[:19], table[5]]), path)

    found = job.check(str(copy))

    assert (found.found, found.lost, found.doubled) == (20, 2, 1)


def test_a_store_without_a_merged_ledger_has_lost_all(extracted):
    job, copy = extracted
    shutil.rmtree(copy / "ledger/samples")

    assert (job.check(str(copy)).found, job.check(str(copy)).lost) == (0, 20)


def trained(out: Path, weight: float = 1.0, losses: tuple[float, ...] = (3.0, 2.0, 1.0)) -> str:
    folder = Folder(str(out))
    arrays = {"weight": np.full(3, weight, np.float32)}
    write_checkpoint(folder, Checkpoint(step=3, model=arrays, resume=arrays, progress={"seconds": time.time()}, config={}))
    write_metrics(folder, [{"step": step, "loss": loss, "images_per_s": time.time()} for step, loss in enumerate(losses, 1)])
    return str(out)


def test_trainings_are_compared_by_weights_optimiser_and_losses(tmp_path):
    job = TrainJob("unused", steps=3, checkpoint_every=1)
    job.keep(trained(tmp_path / "reference"))

    same = job.check(trained(tmp_path / "same"))
    other = job.check(trained(tmp_path / "other", weight=1.5, losses=(3.0, 2.5, float("nan"))))
    again = job.check(trained(tmp_path / "again", losses=(3.0, 2.0)))
    none = job.check(str(tmp_path / "none"))

    assert (same.expected, same.found, same.lost, same.doubled, same.compared, same.differ) == (3, 3, 0, 0, 5, ())
    assert other.differ == ("loss at step 2", "loss at step 3", "optimiser weight", "weight")
    assert again.differ == ("loss at step 3",)
    assert (none.found, none.lost, len(none.differ)) == (0, 3, 5)


# --- what is asked ------------------------------------------------------------------------------------------------------


def test_kinds_are_dealt_like_cards_and_by_the_seed():
    kinds = ChaosBenchmark().kinds

    dealt = list(itertools.islice(deal(kinds, random.Random(1)), 2 * len(kinds)))

    assert sorted(dealt[: len(kinds)]) == sorted(dealt[len(kinds) :]) == sorted(kinds)
    assert dealt[: len(kinds)] != dealt[len(kinds) :]
    assert dealt == list(itertools.islice(deal(kinds, random.Random(1)), 2 * len(kinds)))


@pytest.mark.parametrize("seed", range(50))
def test_the_default_kills_thirty_nodes_and_five_drivers(seed):
    default = ChaosBenchmark()

    dealt = list(itertools.islice(deal(default.kinds, random.Random(seed)), default.faults))

    assert default.minutes == 15
    assert dealt.count("node") >= 30
    assert dealt.count("driver") >= 5
    assert set(dealt) == {"node", "driver", "drain", "store", "head"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every": 0}, "--every"),
        ({"early": 1.5}, "--early 1.5"),
        ({"kinds": ()}, "must name a kind"),
        ({"faults": 0, "minutes": 0}, "--faults 0 and --minutes 0"),
        ({"nodes": 0}, "--nodes"),
        ({"store_mb": 50}, "--store-mb 50: must be at least 75"),
        ({"train": True, "nodes": 1}, "needs a node for each"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ChaosBenchmark(**changes)


def test_a_result_with_losses_is_a_failure():
    result = replace(RESULT, lost=2, differ=("run-000: x1/c/0",), compared=40)

    with pytest.raises(BenchmarkFailed, match=r"2 rows lost; 1 of 40 parts differ from the undisturbed: run-000: x1/c/0"):
        require_nothing_lost(result)
    require_nothing_lost(replace(result, lost=0, differ=()))


# --- the job ------------------------------------------------------------------------------------------------------------


def chaos(folder: Path, *arguments: str) -> subprocess.Popen:
    """The job, with all its files below `folder`; its path must be short, for Ray's sockets."""
    return subprocess.Popen(
        [sys.executable, "jobs/benchmark.py", "chaos", *arguments],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def short_folder(tmp_path_factory):
    """A folder for the job; whatever happens, nothing that runs in it is left."""
    folder = Path(tmp_path_factory.mktemp("c"))
    yield folder
    for process in processes_in(folder):
        process.kill()


def nothing_left(folder: Path) -> bool:
    """Whether, within half a minute, no process has a file there open."""
    deadline = time.monotonic() + 30
    while (left := processes_in(folder)) and time.monotonic() < deadline:
        psutil.wait_procs(left, timeout=1)
    return not left


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_nothing_is_lost_while_nodes_and_the_driver_are_killed(short_folder, tmp_path):
    path = tmp_path / "chaos.json"
    process = chaos(short_folder, "debug", "--json", str(path))

    said = squeezed(process.communicate()[0])

    assert process.returncode == 0, said[-3000:]
    result = json.loads(path.read_text())
    assert result["faults"] == {"driver": 1, "node": 2}
    assert result["found"] == result["expected"] == 512 * result["completed"] > 0
    assert (result["lost"], result["doubled"], result["differ"]) == (0, 0, [])
    assert result["compared"] > 32 * result["completed"]  # 32 tasks, three levels
    assert result["restarts"] >= 1
    assert "| rows lost | 0 |" in said
    assert "| time lost per fault, s |" in said
    assert len(result["events"]) == 3
    assert nothing_left(short_folder)
    assert list(short_folder.iterdir()) == []


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_job_leaves_nothing_running(short_folder, how):
    process = chaos(short_folder, "debug")
    while process.poll() is None and len(processes_in(short_folder)) < 4:  # the head, and nodes
        time.sleep(0.5)

    process.send_signal(how)
    said, _ = process.communicate()

    assert process.returncode not in (0, 1, 2), said[-3000:]
    assert nothing_left(short_folder)
    assert how == signal.SIGKILL or list(short_folder.iterdir()) == []


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("arguments", [(), ("--train", "--minutes", "10", "--faults", "0", "--every", "45")])
def test_soak(short_folder, tmp_path, arguments):
    path = tmp_path / "chaos.json"
    process = chaos(short_folder, *arguments, "--json", str(path))

    said, _ = process.communicate()

    print(said)
    assert process.returncode == 0
    result = json.loads(path.read_text())
    assert (result["lost"], result["doubled"], result["differ"]) == (0, 0, [])
    assert arguments or (result["faults"]["node"] >= 30 and result["faults"]["driver"] >= 5)
    assert nothing_left(short_folder)


def test_the_report_says_what_was_injected_and_lost():
    text = squeezed("\n".join(chaos_report(ChaosBenchmark(), RESULT, machine())))

    assert "36 faults in 15.0 minutes of extractions" in text
    assert "| node: SIGKILL to a node's raylet, agents and workers; another joins seconds later | 31 |" in text
    assert "| of them after an error of its own | 1 |" in text
