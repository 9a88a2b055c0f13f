"""jobs/benchmark.py evaluate: what is compared gives the same, and what doesn't ends the benchmark."""

import json

import pytest
import torch

from jobs import benchmark
from operators.metrics.propagation import Propagator
from pipelines.benchmarks import evaluation as evaluation_benchmark
from pipelines.benchmarks.evaluation import EvaluateBenchmark, enlarge_then_match, similarities
from pipelines.config import ConfigError
from tests.conftest import squeezed


def test_evaluate_debug_compares_matching_and_propagation(tmp_path, capsys):
    path = tmp_path / "numbers.json"

    assert benchmark.run(["evaluate", "debug", "--json", str(path)]) == 0

    printed = squeezed(capsys.readouterr().out)
    for part in (
        "| matching: 3 points in 36 x 36 pixels, similarity | ms | plain, ms | times faster | peak MB | plain, MB |",
        "| 4 x 4 cells, cells |",
        "| 9 x 9 cells, pixels |",
        "| propagation: clip of 11 frames | ms |",
        "| 9 x 9 cells | ",
    ):
        assert part in printed
    result = json.loads(path.read_text())
    assert [(one["grid"], one["normalise"]) for one in result["matching"]] == [
        (4, "cells"),
        (4, "pixels"),
        (9, "cells"),
        (9, "pixels"),
    ]
    assert [one["grid"] for one in result["propagation"]] == [4, 9]
    for one in [*result["matching"], *result["propagation"]]:
        assert one["largest_difference"] <= 1e-5
        assert min(*one["seconds"]["ours"], *one["seconds"]["plain"], *one["peak_bytes"].values()) > 0
        assert len(one["seconds"]["ours"]) == len(one["seconds"]["plain"]) == 2


def test_plain_matching_finds_the_most_similar_pixel():
    features = torch.zeros(2, 2, 3)
    features[0, 0, 0] = features[0, 1, 1] = features[1, 0, 2] = features[1, 1, 0] = 2
    queries = torch.eye(3)[1:] * 5

    assert enlarge_then_match(queries, features, (4, 4), "pixels").tolist() == [[3, 0], [0, 3]]
    # Cells of length 1: the enlarged corner is that cell itself.
    assert similarities(queries, features, (4, 4), "cells")[0, 0, 3] == 5
    assert similarities(queries, features, (4, 4), "pixels")[0, 0, 3] == 1


def test_results_that_differ_end_the_benchmark(monkeypatch, capsys):
    plain = Propagator.step
    monkeypatch.setattr(Propagator, "step", lambda self, features: plain(self, features) + 0.01)

    assert benchmark.run(["evaluate", "debug"]) == 1
    assert "the soft labels of 4 x 4 cells differ by 0.01" in capsys.readouterr().err

    found = evaluation_benchmark.best_pixels
    monkeypatch.setattr(evaluation_benchmark, "best_pixels", lambda *a, **k: found(-a[0], *a[1:], **k))
    assert benchmark.run(["evaluate", "debug"]) == 1
    assert "the pixels found in 4 x 4 cells differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 1}, "--frames 1: must be at least 2"),
        ({"grids": (0,)}, "must be at least 1"),
        ({"grids": (28, 500)}, "--pixels at least the largest of them"),
        ({"repeat": 0}, "must be at least 1"),
        ({"threads": -1}, "--threads -1: must be at least 0"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        EvaluateBenchmark(**changes)


def test_threads_are_as_before_afterwards():
    before = torch.get_num_threads()

    found = evaluation_benchmark.measure_evaluate(
        EvaluateBenchmark(grids=(2,), channels=4, pixels=8, points=1, frames=2, repeat=1, threads=2, device="cpu")
    )

    assert found.device == "CPU, 2 threads"
    assert torch.get_num_threads() == before
