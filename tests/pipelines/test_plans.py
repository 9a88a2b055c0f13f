"""`--plan`: what would be done and what is done, without doing or beginning any of it, and without starting a cluster."""

import contextlib
import json

import pytest

from cluster.resources import WorkerPool, this_machine
from cluster.session import ClusterError
from pipelines import executors
from pipelines.config import ConfigError
from pipelines.evaluation.run import main as evaluation
from pipelines.extraction.start import main as extraction
from pipelines.tables import grid as grids
from pipelines.training.run import main as training
from storage.paths import Folder
from storage.runs import read_pointers
from tests.pipelines.evaluation.test_evaluation import correspondence, make_spair, spair_config
from tests.pipelines.tables.test_grid import tiny_grid
from tests.readout_runs import training as readout


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.setattr(executors, "connect", lambda *_, **__: pytest.fail("a cluster was asked"))


def test_a_training_says_its_steps_and_begins_nothing(sets, tmp_path):
    config = readout(sets, tmp_path / "run", max_steps=3, checkpoint_every=2, validate_every=2)

    first, *lines, last = training(config.changed(plan=True, executor="ray"))

    assert first.endswith("0 of 3 steps done, 3 to go")
    assert any(line.startswith("checkpoints 2 more") for line in lines)
    assert last == "nothing was run; drop --plan to start"
    assert not (tmp_path / "run").exists()

    list(training(config))
    before = read_pointers(Folder(config.out))
    first, *_ = training(config.changed(plan=True, max_steps=5, executor="ray"))
    assert first.endswith("3 of 5 steps done, 2 to go")
    assert read_pointers(Folder(config.out)) == before
    with pytest.raises(ConfigError, match="lr"):
        list(training(config.changed(plan=True, lr=0.5)))


def test_an_evaluation_says_its_items_and_what_is_done(tmp_path):
    config = spair_config(make_spair(tmp_path / "spair"), tmp_path / "out")

    first, items, *_ = evaluation("correspondence", correspondence, config.changed(plan=True))

    assert first.endswith("pieces done")
    assert ": 0 of " in first
    assert not (tmp_path / "out").exists()

    list(evaluation("correspondence", correspondence, config))
    parts = sorted((tmp_path / "out/parts").iterdir())
    parts[0].unlink()
    first, items, *_ = evaluation("correspondence", correspondence, config.changed(plan=True))
    assert first.endswith(f"{len(parts) - 1} of {len(parts)} pieces done")
    assert items.endswith(f"to go (1 of {len(parts)} pieces)")
    assert not parts[0].exists()


def test_a_table_says_its_cells(sets, tmp_path):
    config = tiny_grid(sets, tmp_path / "grid", methods=("deap",), speed=False)
    first, *_ = grids.main(config.changed(plan=True))
    assert first.endswith("1 cells, 0 done, 1 to go")
    assert not (tmp_path / "grid").exists()

    list(grids.main(config))
    first, cell, *_ = grids.main(config.changed(plan=True, seeds=(0, 1), executor="ray"))
    assert first.endswith("2 cells, 1 done, 1 to go")
    assert "done, " in cell


@pytest.mark.parametrize(
    ("holds", "message"), [("run.json", "holds a training or an evaluation"), ("zarr.json", "is a feature store")]
)
def test_a_table_is_refused_where_something_else_is(sets, make_tars, tiny, tmp_path, holds, message):
    if holds == "zarr.json":
        list(extraction(tiny(make_tars(1, 2), out=str(tmp_path / "grid"))))
    else:
        Folder(str(tmp_path / "grid")).write(holds, b"{}")

    for plan in (True, False):
        with pytest.raises(ConfigError, match=f"grid {message}"):
            list(grids.main(tiny_grid(sets, tmp_path / "grid", methods=("deap",), plan=plan)))


def test_an_extraction_is_planned_for_this_machine_without_ray(make_tars, tiny, tmp_path, monkeypatch):
    # Other tests of this process may have a session, or have named a cluster.
    monkeypatch.setattr(executors, "starts_one", lambda address: address is None)
    given = tiny(make_tars(1, 3), out=str(tmp_path / "out.zarr"), plan=True, json=True, executor="ray")

    (text,) = extraction(given)

    assert json.loads(text)["actors"] == this_machine()[0].cpus
    with pytest.raises(ClusterError, match="asked for one actor with 9999 CPUs, but none fits a node"):
        list(extraction(given.changed(actor_cpus=9999)))


@pytest.mark.parametrize("named", ["flag", "environment"])
def test_an_extraction_is_planned_for_the_cluster_that_is_named(make_tars, tiny, tmp_path, monkeypatch, named):
    asked = []
    monkeypatch.setattr(executors, "connect", lambda address, **_: contextlib.nullcontext(asked.append(address)))
    monkeypatch.setattr(executors, "choose_pool", lambda _: WorkerPool(device="cpu", size=70, cpus=1, gpus=0))
    monkeypatch.setenv("RAY_ADDRESS", "head:6379" if named == "environment" else "")
    given = tiny(make_tars(1, 3), out=str(tmp_path / "out.zarr"), plan=True, json=True, executor="ray")
    monkeypatch.setattr(executors.RayExecutor, "map", executors.InlineExecutor.map)

    (text,) = extraction(given.changed(ray_address="head:6379") if named == "flag" else given)

    assert json.loads(text)["actors"] == 70
    assert asked == ["head:6379" if named == "flag" else None]
