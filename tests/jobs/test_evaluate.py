"""The command line of evaluations: presets, mistakes, and what is printed and written."""

import json

import pytest

from jobs import evaluate, train
from pipelines.config import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("task", [task for task in evaluate.TASKS if task != "probe"])
def test_debug_evaluates_and_goes_on(task, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    assert evaluate.run([task, "debug"]) == 0
    printed = capsys.readouterr().out
    assert "| low-res" in printed
    assert "| bilinear x2" in printed
    out = tmp_path / evaluate.PRESETS[task]["debug"].out
    found = json.loads((out / "results.json").read_text())
    assert found["task"] == task
    assert found["config"]["model"] == "test_vit.r160_in1k"
    assert (out / "results.md").read_text() in printed
    before = {path.name: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}

    assert evaluate.run([task, "debug", "--pictures", "0"]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (out / "parts").iterdir()} == before
    assert evaluate.run([task, "debug", "--facet", "key"]) == 2
    assert "was begun with other settings" in capsys.readouterr().err


def test_debug_probes_what_debug_readout_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    assert evaluate.run(["probe", "debug"]) == 2
    assert "no weights at" in capsys.readouterr().err
    assert train.run(["debug-readout"]) == 0
    assert evaluate.run(["probe", "debug"]) == 0
    assert "| train-readout on low-res" in capsys.readouterr().out
    assert (tmp_path / "demo/eval-probe/pictures/predictions.png").exists()


def test_mistakes_end_in_one_line(tmp_path, capsys):
    assert evaluate.run(["video"]) == 2
    assert "no data: give --data" in capsys.readouterr().err
    data, out = str(tmp_path / "nothing"), str(tmp_path / "out")
    settings = ["--model", "test_vit.r160_in1k", "--weights", "random", "--data", data, "--out", out]
    for task in ("correspondence", "video", "discovery"):
        assert evaluate.run([task, *settings, "--executor", "inline"]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("DatasetError: ")
        assert data in error
    assert not (tmp_path / "out").exists()


def test_published_settings():
    call = evaluate.program.parse(["correspondence", "lift-spair", "--sizes", "224"])
    preset, config = call.preset, call.config

    assert call.command is evaluate.program.commands["correspondence"]
    assert (preset, config.sizes, config.features.facet) == ("lift-spair", (224,), "key")
    assert (config.draws, config.annotation, config.rules.strict) == (100, "pairs", True)
    config = evaluate.program.parse(["correspondence", "vit-up-spair"]).config
    assert (config.draws, config.annotation, config.rules.strict) == (0, "images", False)
    assert evaluate.program.parse(["video", "dino-davis"]).config.features.facet == "token"
    assert evaluate.program.parse(["discovery", "lift-coco20k"]).config.settings.tau == 0.3
    assert evaluate.program.parse(["cka", "--batch", "8"]).config.batch == 8


def test_unknown_words_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'video'"):
        evaluate.program.parse(["vidio"])
    with pytest.raises(ConfigError, match="no preset of correspondence is called 'lift-spare'. Did you mean 'lift-spair'"):
        evaluate.program.parse(["correspondence", "lift-spare"])


def test_no_word_prints_what_there_is(capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.program.parse([])
    assert end.value.code == 2
    assert "correspondence: debug, lift-spair, vit-up-spair" in capsys.readouterr().out
