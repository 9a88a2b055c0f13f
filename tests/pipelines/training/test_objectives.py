"""Objectives of upsamplers, by the names that methods have for them."""

from jobs.train import NAMES
from operators.upsamplers import UPSAMPLERS, find_method
from pipelines.training.objectives import OBJECTIVES, trainings


def test_every_method_that_is_trained_is_a_word_and_its_objective_is_there():
    trained = {name: by for name in UPSAMPLERS if (by := find_method(name).trained_by)}

    assert set(trained.values()) == OBJECTIVES.keys()
    assert {name: type(config) for name, config in trainings().items()} == {n: OBJECTIVES[by] for n, by in trained.items()}
    assert all(NAMES[name].method == name for name in trained)
