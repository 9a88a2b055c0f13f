"""The command line of training: presets, mistakes, and what a run prints."""

import json
import re

import pytest

from jobs import train
from pipelines.config import ConfigError


def test_debug_trains_and_its_checkpoint_extracts(tmp_path, monkeypatch, capsys):
    from jobs import extract

    monkeypatch.chdir(tmp_path)

    assert train.run(["debug"]) == 0
    printed = capsys.readouterr().out
    assert "20 steps, 80 images, 0 left out" in printed
    best = re.search(r"^best +(\S+)$", printed, re.MULTILINE).group(1)
    assert "extract.py --model test_vit.r160_in1k --size 128 --weights random --geometry squash --facet key" in printed
    level = f"x2=lift:{best}"
    assert extract.run(["debug", "--size", "128", "--facet", "key", "--levels", "x1", level, "--out", "a.zarr"]) == 0
    assert extract.run(["debug", "--size", "128", "--levels", "x1", level, "--out", "b.zarr"]) == 2
    assert "facet" in capsys.readouterr().err

    assert train.run(["debug"]) == 0
    assert train.run(["debug", "--lr", "0.1"]) == 2
    assert "lr               run 0.001   now 0.1" in capsys.readouterr().err


def test_every_first_word_has_settings_of_its_own():
    assert train.program.parse(["jbu", "--radius", "2"]).config.method == "jbu"
    assert train.program.parse(["resize_conv"]).config.method == "resize_conv"
    published = train.program.parse(["lift-dino-s16-imagenet"]).config
    assert (published.method, published.features.facet, published.features.size) == ("lift", "key", 448)
    assert (published.batch, published.epochs, published.lr, published.loss) == (256, 5, 1e-3, "cosine")
    assert train.program.parse(["lift-dino-b16-imagenet"]).config.features.model == "vit_base_patch16_224.dino"


def test_unknown_words_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'lift-dino-s16-imagenet'"):
        train.program.parse(["lift-dino-s16"])


def test_no_word_prints_what_there_is(capsys):
    with pytest.raises(SystemExit) as end:
        train.program.parse([])
    assert end.value.code == 2
    assert "lift-vit-tiny-photos" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lift"], "no output"),
        (["lift", "--out", "x", "--data", "nothing-*.tar", "--weights", "random"], "nothing-"),
        (["debug", "--model", "vit_smal_patch16_224"], "near names"),
        (["debug", "--size", "100"], "the nearest is 128"),
    ],
)
def test_mistakes_end_with_2_and_say_what_to_do(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)

    assert train.run(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_run_over_its_failure_budget_ends_with_1(tmp_path, monkeypatch, capsys):
    from tests.conftest import jpeg, write_tar

    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "bad.tar", [(f"{n:02d}.jpg", jpeg(n) if n < 9 else b"not an image") for n in range(12)])

    assert train.run(["debug", "--data", "bad.tar", "--out", "run", "--val-rows", "1"]) == 1
    assert "--max-failed-fraction" in capsys.readouterr().err


def test_credentials_are_neither_stored_nor_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = json.dumps({"s3": {"key": "k", "secret": "very-secret-value"}})

    assert train.run(["debug", "--storage-options", options, "--max-steps", "1"]) == 0

    run = (tmp_path / "demo" / "train-debug" / "run.json").read_text()
    assert "very-secret-value" not in run
    assert "very-secret-value" not in "".join(capsys.readouterr())
