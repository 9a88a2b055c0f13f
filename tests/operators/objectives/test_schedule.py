"""ViTDet's learning rate; the cosine is in test_vit_up.py."""

import json

import pytest

from operators.objectives.schedule import stepped
from tests.goldens import golden_file


def test_the_rate_rises_and_falls_as_in_the_published_run():
    table = json.loads(golden_file("vitdet_training_tables.json").read_text())["lr_multiplier"]

    assert [stepped(step) for step, _ in table] == pytest.approx([factor for _, factor in table], rel=1e-12)


def test_shorter_runs_fall_after_the_same_parts():
    assert [round(stepped(step, steps=27, warmup=0), 6) for step in (0, 23, 24, 25, 26)] == [1, 1, 0.1, 0.1, 0.01]
