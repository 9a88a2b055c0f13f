"""A job whose work is done already doesn't wait for a cluster."""

from functools import partial

import pytest

from pipelines import executors
from pipelines.evaluation import discovery
from pipelines.evaluation.run import evaluate
from pipelines.extraction.start import main as extraction
from pipelines.tables.grid import main as tables
from pipelines.training.run import train
from tests.second_runs import KINDS


class Asked(Exception):
    """For a cluster."""


@pytest.fixture
def no_cluster(monkeypatch):
    def connect(*_: object, **__: object) -> None:
        raise Asked

    monkeypatch.setattr(executors, "connect", connect)


def on_ray(config):
    return config.changed(executor="ray")


JOBS = {
    "readout: voc": train,
    "x2": train,
    "discovery": partial(evaluate, "discovery", discovery),
    "grid": lambda config: list(tables(config)),
}


@pytest.mark.parametrize("name", JOBS)
def test_what_is_done_needs_no_cluster(name, world, tmp_path, no_cluster):
    run = JOBS[name]
    config = KINDS[name].config(world).changed(out=str(tmp_path / "run"))
    with pytest.raises(Asked):  # or this test couldn't fail
        run(on_ray(config))

    first = run(config)

    assert run(on_ray(config)) == first


def test_a_complete_store_needs_no_cluster(tiny, make_tars, no_cluster):
    config = tiny(make_tars())
    with pytest.raises(Asked):
        list(extraction(on_ray(config)))
    list(extraction(config))

    first, *_ = extraction(on_ray(config))

    assert first.endswith("20 images ok, 0 failed")
