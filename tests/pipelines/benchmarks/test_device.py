"""The simulated device: what it is given and when, and what the benchmark says of it."""

import time
from dataclasses import replace

import numpy as np
import pytest

from pipelines.benchmarks.device import BEFORE, DEBUG, SimulatedDevice, Stream, device_report, measure_device
from pipelines.config import ConfigError
from pipelines.costs.clocks import machine
from storage.spec import Level

LEVEL = Level(name="pooled", method="cls", grid=None, channels=3)


def test_a_stream_does_one_piece_after_another():
    stream = Stream()

    assert [stream.add(2.0, not_before) for not_before in (10.0, 11.0, 20.0)] == [12.0, 14.0, 22.0]
    assert stream.busy_s == 6.0


@pytest.mark.parametrize("pageable", [False, True])
def test_copies_of_pinned_memory_do_not_wait_for_what_is_computed(pageable):
    config = replace(DEBUG, forward_ms=100.0, up_ms=10.0, down_ms=20.0)
    device = SimulatedDevice(config, [LEVEL], pageable=pageable)
    t0 = time.monotonic()
    first, second = (device.begin(np.zeros((2, 1, 1, 3), np.uint8), 2) for _ in range(2))
    begun = time.monotonic() - t0
    second.wait()

    # The second batch's copy up is beside the first one's computing, or behind it.
    computed = device.computing.free_at - device.begun_at
    assert computed == pytest.approx(0.21 if pageable else 0.2, abs=1e-6)
    assert (begun >= 0.12) == pageable
    assert time.monotonic() - t0 >= 0.01 + computed + 0.02
    assert first.levels["pooled"].shape == (2, 3)


def test_more_is_written_at_once_within_what_is_declared(tmp_path):
    """A write of three tasks' computing: before the schedule, two tasks at a time left the device idle."""
    times = {"forward_ms": 40.0, "up_ms": 1.0, "down_ms": 1.0, "encode_ms": 1.0, "put_ms": 120.0, "load_ms": 1.0}
    config = replace(DEBUG, block_rows=8, batch=8, tasks=8, **times)
    result = measure_device(config, tmp_path)

    assert result.before.most_rows <= BEFORE.lanes.calls
    assert 3 <= result.now.most_rows <= result.now.lanes.rows
    assert result.now.most_images <= result.now.lanes.images
    assert result.before.bound == "writing"
    text = "\n".join(device_report(config, result, machine()))
    assert f"{result.now.device:.3f}" in text
    assert f"{result.now.most_rows} of 13" in text
    assert "writing" in text


@pytest.mark.parametrize("setting", [{"block_rows": 12}, {"put_ms": -1.0}, {"forward_ms": 0.0}, {"batch": 0}])
def test_contradictory_device_settings_are_refused(setting):
    with pytest.raises(ConfigError, match="--" + next(iter(setting)).replace("_", "-")):
        replace(DEBUG, **setting)
