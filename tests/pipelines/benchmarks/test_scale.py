"""Simulated actors in the real pipeline, and a cluster whose nodes come and go."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cluster.metrics import TaskReport
from cluster.nodes import free_port
from pipelines.benchmarks.autoscale import DEBUG, Sample, autoscale_report, draw, measure_autoscaling
from pipelines.benchmarks.scale import ScaleBenchmark, ScaleResult, _steady, measure_run, measure_scale, scale_report
from pipelines.benchmarks.simulated import SimulatedSetup
from pipelines.benchmarks.stages import measure_stages, stages_report
from pipelines.config import ConfigError
from pipelines.costs.clocks import machine
from pipelines.executors import InlineExecutor
from pipelines.extraction.prepare import prepare, resolve
from pipelines.extraction.run import run_prepared
from storage.inputs import expand_inputs
from storage.store import FeatureStore
from storage.tars import MemberRules, scan_source


def test_simulated_workers_fill_a_store_as_real_ones_do(make_tars, tiny):
    config = tiny(make_tars(count=1, each=10), levels=("pooled",))
    prepared = prepare(resolve(config), InlineExecutor())
    store = prepared.create_store()
    worker = SimulatedSetup(out=config.out, options={}, run_id="r", forward_s=0.0)()

    reports = [worker.run(task) for task in store.layout.tasks()]

    assert [report.ok for report in reports] == [4, 4, 2]
    assert store.finalize() == {"ok": 10}
    assert not store.read(slice(None), "pooled").any()
    assert not store.folder.sizes("runs/r/attempts")
    # The driver takes it for its own work.
    assert run_prepared(prepared, InlineExecutor()).ok == 10


@pytest.mark.usefixtures("forked_benchmarks")
def test_a_simulated_run_accounts_for_every_row_and_says_what_it_took(tmp_path):
    run = measure_run(tmp_path / "run", rows=72, block_rows=16, actors=2, forward_s=0.01)

    assert (run.rows, run.tasks) == (72, 5)
    assert 1 <= run.processes <= 2
    assert run.sizes["ledger/commits"] > run.sizes["ledger/samples"] > 0
    assert all(phase["cpu_s"] >= 0 for phase in run.phases.values())
    assert not (tmp_path / "run").exists()
    text = "\n".join(scale_report(ScaleBenchmark(), ScaleResult(runs=[run], fed=run, long=run), machine()))
    assert "5 tasks that take no time" in text
    assert "100,000,000" not in text  # too few rows to tell


def test_scale_measures_every_number_of_actors_and_two_runs_more(tmp_path, monkeypatch):
    asked = []

    def record(folder: Path, rows: int, block_rows: int, actors: int, forward_s: float) -> SimpleNamespace:
        asked.append((rows, actors, forward_s))
        return SimpleNamespace(tasks=1, fed_per_s=1.0)

    monkeypatch.setattr("pipelines.benchmarks.scale.measure_run", record)
    monkeypatch.setattr("pipelines.benchmarks.scale.measure_stages", lambda folder, rows, block_rows: asked.append(rows))
    config = ScaleBenchmark(actors=(1, 3), tasks_each=2, block_rows=4, feed_tasks=5, feed_actors=2, rows=50, stage_rows=(6, 7))
    measure_scale(config, tmp_path)

    assert asked == [6, 7, (8, 1, 2.0), (24, 3, 2.0), (20, 2, 0.0), (50, 2, 0.1)]
    asked.clear()
    assert measure_scale(replace(config, stages_only=True), tmp_path).runs == ()
    assert asked == [6, 7]


def test_every_stage_of_many_rows_is_that_of_an_extraction(tmp_path, monkeypatch):
    def here(do, *calls):
        return [do(*call) for call in calls], None

    monkeypatch.setattr("pipelines.benchmarks.stages.in_new_processes", here)
    monkeypatch.setattr("pipelines.benchmarks.stages.TAR_ROWS", 40)
    monkeypatch.setattr("storage.commits.PACK_BLOCKS", 8)
    for module in ("benchmarks.stages", "indexing"):
        monkeypatch.setattr(f"pipelines.{module}.SMALL_INPUT", 0)

    runs = [measure_stages(tmp_path / str(rows), rows, 16) for rows in (200, 1000)]

    store = FeatureStore.open(str(tmp_path / "1000/out.zarr"))
    assert (store.status, store.root.counts, store.root.conversions) == ("complete", {"ok": 1000}, {"grey->rgb": 1000})
    assert sorted(store.index.keys(0, 1000).to_pylist()) == [f"{row:09d}" for row in range(1000)]
    # What is made up lies where the real tar has it.
    (real,) = (
        scan_source(expand_inputs([str(tmp_path / "1000/tars/tiny-000000.tar")])[0], MemberRules()).rows.slice(3, 1).to_pylist()
    )
    made_up = store.index.take(np.array([3])).to_pylist()[0]
    assert {**made_up, "key": real["key"]} == real
    text = "\n".join(stages_report(runs, 10**8))
    assert "200, 1,000 rows" in text
    assert "On the line through 200 and 1,000 rows, 100,000,000 come to" in text
    assert "CPU a row at 1,000, of that at 200" in text
    # Parts of samples, keys and ledger, the sources, two arrays of two objects each, two groups' documents; packs, records.
    assert [run.objects for run in runs] == [10 + 1 + 5, 10 + 7 + 7]
    assert all(run.stages["finish"].cpu_s > 0 for run in runs)


def test_share_of_linear_is_of_the_time_in_which_all_actors_have_work():
    def turn(process: int, begun: float) -> TaskReport:
        marks = {"process": process, "begun": begun, "ended": begun + 1.0, "arrived": begun + 1.25}
        return TaskReport(block=0, marks=marks)

    # Actor 2 starts 2 s later and waits 1 s between its tasks; both are at work from 2 s to 6 s.
    turns = [turn(1, t) for t in range(6)] + [turn(2, t) for t in (2, 4, 6, 8)]
    found = _steady(sorted(turns, key=lambda turn: turn.marks["ended"]), 2, 1.0)

    assert found.steady_s == 4.0
    np.testing.assert_allclose([found.tasks_per_s, found.linear], [6 / 4, 6 / 8])
    assert found.report_delay_s == 0.25
    # An actor that came in the place of another.
    replaced = _steady([turn(1, 0), turn(1, 9), turn(2, 1), turn(2, 2), turn(3, 3), turn(3, 8)], 2, 1.0)
    assert replaced.steady_s == 6.0
    assert _steady(turns, 3, 1.0).linear is None  # a third actor never came


@pytest.mark.parametrize("setting", [{"actors": (0,)}, {"block_rows": 12}, {"forward_s": -1.0}, {"stage_rows": (2, 1)}])
def test_contradictory_scale_settings_are_refused(setting):
    with pytest.raises(ConfigError, match="--" + next(iter(setting)).replace("_", "-")):
        ScaleBenchmark(**setting)


@pytest.mark.soak
def test_nodes_come_for_an_extraction_and_go_when_idle(tmp_path):
    config = replace(DEBUG, port=free_port())

    result = measure_autoscaling(config, tmp_path)

    nodes = [sample.nodes for sample in result.samples]
    assert nodes[0] == 0
    assert 1 <= max(nodes) <= config.nodes
    assert nodes[-1] == 0
    assert max(sample.busy_cpus for sample in result.samples) >= 1
    assert result.counts == {"ok": config.images}
    assert FeatureStore.open(str(tmp_path / "feats.zarr")).valid().sum() == config.images
    assert "64 images ok" in "\n".join(autoscale_report(config, result, machine()))


def test_autoscale_draws_what_was_seen(tmp_path):
    samples = [Sample(seconds=i / 2, nodes=min(i // 10, 2), busy_cpus=1.0, tasks=i) for i in range(40)]
    draw(DEBUG, samples, str(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
