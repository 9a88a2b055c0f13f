"""`make gpu` at debug size on the CPU: all of its parts run, and what isn't kept is said."""

from dataclasses import replace

import pytest

from jobs import benchmark
from pipelines.benchmarks.gpu import DEBUG, GpuBenchmark, gpu_report, measure_gpu, require_kept
from pipelines.config import ConfigError
from pipelines.costs.clocks import machine
from pipelines.costs.process import BenchmarkFailed


@pytest.mark.usefixtures("forked_benchmarks")
def test_all_parts_run_and_promises_are_held(tmp_path):
    result = measure_gpu(DEBUG, tmp_path)

    require_kept(result)
    assert result.left_out == []
    [one] = result.extractions
    assert min(one.bare, one.pipeline) > 0
    assert 0 < one.peak < one.bound
    assert 0 <= result.errors["test_vit.r160_in1k@64"] < 1e-6
    assert result.training.rates
    assert min(result.decoding.by_cpu, result.decoding.by_gpu) > 0
    assert result.decoding.taken == 1
    assert 0 < result.decoding.mean < result.decoding.largest <= 8
    text = "\n".join(gpu_report(DEBUG, result, machine()))
    for said in ("bare forward, images/s", "float32 beside a CPU's", "decoded and resized", "lift", "vit_up", "plain loop"):
        assert said in text
    with pytest.raises(BenchmarkFailed, match="bytes, where 1 were declared"):
        require_kept(replace(result, extractions=[replace(one, bound=1)]))
    with pytest.raises(BenchmarkFailed, match="float32 differs"):
        require_kept(replace(result, errors={"a": float("nan")}))


def test_what_there_is_no_time_for_is_named(tmp_path):
    result = measure_gpu(replace(DEBUG, minutes=0.0), tmp_path)

    assert len(result.left_out) == 5
    assert "Left out, within 8 minutes: float32 of test_vit" in "\n".join(gpu_report(DEBUG, result, machine()))


def test_without_a_gpu_it_is_refused(capsys):
    assert benchmark.run(["gpu"]) == 2
    assert "torch finds no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize("setting", [{"cases": ("vit",)}, {"batch": 3}, {"images": 10}])
def test_contradictory_gpu_settings_are_refused(setting):
    with pytest.raises(ConfigError, match="--" + next(iter(setting))):
        GpuBenchmark(**setting)
