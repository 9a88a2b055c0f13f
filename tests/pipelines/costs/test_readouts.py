"""What readouts cost: published counts reproduced, operations counted as by hand."""

import json

import pytest

from jobs import benchmark
from pipelines.config import ConfigError
from pipelines.costs.readouts import DeapCost, measure_deap
from tests.conftest import squeezed


def test_cost_deap_prints_the_thirty_published_counts_beside_ours(tmp_path, capsys):
    path = tmp_path / "cost.json"

    assert benchmark.run(["cost", "--deap", "debug", "--json", str(path)]) == 0

    printed = squeezed(capsys.readouterr().out)
    assert "30 of 30 round to what is published." in printed
    assert "| Hiera B+ | 896 | 0.060 / 59,752 | 0.050 / 49,686 | 0.099 / 99,394 | 0.054 / 53,672 |" in printed
    assert "| SAM2 B+ | 256 | 0.028 / 27,752 |" in printed
    saved = json.loads(path.read_text())
    assert len(saved["published"]) == 30
    assert saved["settings"]["channels"] == 64


def test_parameters_and_operations_are_those_of_the_papers_configuration():
    found = {one.name: one for one in measure_deap(DeapCost()).readouts}

    counts = {name: one.parameters for name, one in found.items()}
    assert (counts["deap"], counts["deap-8-dim"], counts["bicubic"]) == (47_272, 25_304, 57_246)
    assert counts["linear"] == 768 * 21 + 21
    assert found["linear"].macs == 37 * 37 * 768 * 21
    # Keys and values, queries, attention, FFN; the convolutions, c = 10 channels at 28, 56, 112 and 224 px; the skip at 28.
    cells, queries, c = 37 * 37, 28 * 28, 10
    attention = cells * 776 * 48 + queries * 8 * 16 + 8 * queries * cells * (2 + 4)
    ffn = queries * (32 * 64 + 64 * 16)
    drawn = sum(queries * 4**n * (9 * (16 if n == 0 else c) * c + 4 * c * c) for n in range(3))
    outputs = queries * 64 * c * 21 + queries * 16 * 21
    assert found["deap"].macs == pytest.approx(attention + ffn + drawn + outputs, rel=1e-3)
    assert found["deap-only-mask"].macs < found["deap"].macs


def test_featup_counts_what_enlarges_its_map():
    config = DeapCost(channels=64, grid=4, side=32)
    found = {one.name: one for one in measure_deap(config).readouts}

    fine = sum((4 << step) ** 2 for step in range(1, 5))
    # A pixel's key and its products with 49 others; corrections of its filter; the filtered sum of every channel.
    kernel = 3 * 32 + 32 * 32 + 49 * 32 + 52 * 49 + 49 * 49
    assert found["featup"].macs == fine * (kernel + 49 * 64) + 64**2 * (64 * 64 + 64 * 21)
    assert (found["featup"].parameters, found["featup"].frozen) == (65 * 21, 4 * 6_233 + 65 * 64 + 128)
    assert {one.frozen for name, one in found.items() if name != "featup"} == {0}


def test_channels_that_one_of_them_cannot_group_are_refused():
    with pytest.raises(ConfigError, match="multiple of 16"):
        DeapCost(channels=100)
