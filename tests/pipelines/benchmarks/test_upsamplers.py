"""jobs/benchmark.py upsamplers: plain formulations give what ours give, and what doesn't ends the benchmark."""

import json
from dataclasses import replace

import pytest

from jobs import benchmark
from operators.upsamplers import method_names
from operators.upsamplers.jbu import JointBilateral
from pipelines.benchmarks import upsamplers
from pipelines.benchmarks.formulations import FORMULATIONS
from pipelines.benchmarks.upsamplers import UpsamplersBenchmark
from pipelines.config import ConfigError
from pipelines.costs.clocks import device_of, needed_bytes
from tests.conftest import squeezed


def test_debug_compares_every_method_with_its_plain_formulation(tmp_path, capsys):
    path = tmp_path / "numbers.json"

    assert benchmark.run(["upsamplers", "debug", "--json", str(path)]) == 0

    printed = squeezed(capsys.readouterr().out)
    assert "| method | grid | ms | of bilinear | plain, ms | times faster | asked | peak MB | declared | plain, MB |" in printed
    result = json.loads(path.read_text())
    assert [(one["name"], one["grid"]) for one in result["compared"]] == [(name, 18) for name in FORMULATIONS]
    assert result["left_out"] == []
    for one in result["compared"]:
        assert one["difference"] <= 1e-5
        assert one["peak_bytes"]["ours"] <= one["declared_bytes"]
        assert {len(seconds) for seconds in one["seconds"].values()} == {1}
        assert min(min(seconds) for seconds in one["seconds"].values()) > 0


def test_every_guided_method_with_official_files_has_a_plain_formulation():
    """LiFT and the resize-convolution are their own, and ViT-Up is compared by `cost --vit-up`."""
    names = method_names(lambda method: method.learned and "maps" in method.needs)

    assert set(names) - {each.method for each in FORMULATIONS.values()} == {"lift", "resize_conv"}


def test_results_that_differ_and_bounds_that_do_not_hold_end_the_benchmark(monkeypatch, capsys):
    arguments = ["upsamplers", "debug", "--methods", "jbu", "--grids", "18"]
    with monkeypatch.context() as patch:
        patch.setattr(JointBilateral, "kernel", JointBilateral.range_kernel)
        assert benchmark.run(arguments) == 1
    shown = capsys.readouterr()
    assert "jbu" in squeezed(shown.out)
    assert "jbu at 18 x 18 differs from its plain formulation by" in shown.err

    compare = upsamplers._compare
    monkeypatch.setattr(upsamplers, "_compare", lambda *given: replace(compare(*given), declared_bytes=10))
    assert benchmark.run(arguments) == 1
    assert "bytes, but declares 10" in capsys.readouterr().err


def test_a_plain_formulation_that_the_memory_does_not_hold_is_not_run(monkeypatch, tmp_path, capsys):
    path = tmp_path / "numbers.json"
    monkeypatch.setattr(upsamplers, "free_bytes", lambda device: 2**20)

    assert benchmark.run(["upsamplers", "debug", "--methods", "naf", "--json", str(path)]) == 0

    (one,) = json.loads(path.read_text())["compared"]
    assert set(one["seconds"]) == {"ours", "bilinear"}
    assert one["times_faster"] is None
    assert one["difference"] is None
    assert one["peak_bytes"]["plain"] > 0.6 * 2**20
    assert "- Plain naf at 18 x 18 wasn't run: its tensors alone would take" in squeezed(capsys.readouterr().out)


def test_the_memory_that_a_plain_formulation_needs_is_known_beforehand():
    """NAF's einsums copy what they are given."""
    config = replace(upsamplers.DEBUG, methods=("naf", "jafar"))
    seen = {}
    for name in config.methods:
        found: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(upsamplers, "needed_bytes", lambda run, found=found: found.append(needed_bytes(run)) or 0)
            one = upsamplers._compare(config, name, FORMULATIONS[name], 18, device_of("cpu"))
        seen[name] = found[0] / one.peak_bytes["plain"]
    assert all(0.5 < ratio < 1.1 for ratio in seen.values()), seen


def test_grids_that_a_method_cannot_give_are_named(capsys):
    assert benchmark.run(["upsamplers", "debug", "--methods", "jbu", "--grids", "18", "30"]) == 0
    assert "- Left out: jbu at 30 x 30: jbu gives 2, 4, 8, ... times" in capsys.readouterr().out

    assert benchmark.run(["upsamplers", "debug", "--methods", "jbu", "--grids", "30"]) == 2
    assert "nothing is left to compare: jbu at 30 x 30" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("bilinear",)}, "--methods bilinear: there are plain formulations of"),
        ({"methods": ()}, "at least one each"),
        ({"cells": 0}, "must be at least 1"),
        ({"row_s": 0.0}, "--row-s above 0"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        UpsamplersBenchmark(**changes)
