"""What is said of a run's held-out images: whose scores they are, and of which step."""

import io
import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from jobs import show
from jobs.train import program
from operators.visual import Panel, cosine_map, heat
from pipelines.config import command_of
from pipelines.showing.curves import curves_figure
from pipelines.showing.training import training_lines
from pipelines.showing.training_page import render_training
from pipelines.training.config import TrainConfig
from pipelines.training.objectives import OBJECTIVES
from pipelines.training.readout import ReadoutTraining
from pipelines.training.run import main
from pipelines.training.watch import Validations, similarity_picture
from storage.documents import JsonValue
from storage.paths import Folder
from storage.runs import write_metrics, write_run
from tests.browser import opens_well
from tests.pipelines.training.test_lift import small  # noqa: F401 - a fixture


def validated(step: int, loss: float, bilinear: float) -> dict[str, JsonValue]:
    return {
        "step": step,
        "val_loss": loss,
        "val_cosine": 1 - loss,
        "val_loss_bilinear": bilinear,
        "val_cosine_bilinear": 1 - bilinear,
    }


def point_at(folder: Folder, best: int | None, last: int) -> None:
    pointers = {"last": f"steps/{last:08d}", "best": None if best is None else f"steps/{best:08d}", "best_loss": None}
    folder.write("checkpoints.json", json.dumps(pointers).encode())


def run_of(path: Path, losses: dict[int, float], bilinear: float, **identity: JsonValue) -> Folder:
    """A run that was validated after these steps, and was best at the smallest loss."""
    folder = Folder(str(path))
    write_run(folder, {"identity": {"size": 64, "held_out": "a" * 64, "seed": 0, **identity}, "config": {}})
    lines = [validated(step, loss, bilinear) for step, loss in losses.items()]
    write_metrics(folder, [line for each in lines for line in ({"step": each["step"], "loss": 9.0}, each)])
    trained = {step: loss for step, loss in losses.items() if step}
    point_at(folder, min(trained, key=trained.__getitem__), max(losses))
    return folder


def rows_of(lines: list[str]) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: row[1:] for row in cells}


def test_a_training_picture_rings_one_point_in_all_its_maps(monkeypatch):
    """Features are the places of cells: the middle of the coarse map's central cell, between cells of the finer one."""
    panels: list[Panel] = []
    monkeypatch.setattr(Panel, "draw", lambda panel: panels.append(panel) or Image.new("RGB", (1, 1)))

    def places(side: int) -> np.ndarray:
        centres = (np.arange(side) + 0.5) / side
        return np.stack([*np.meshgrid(centres, centres), np.ones((side, side))], axis=-1)

    similarity_picture(3, ["photo", "a", "b"], [[np.zeros((8, 8, 3), np.uint8), places(4), places(8)]])

    (panel,) = panels
    assert {tile.mark for tile in panel.tiles[0]} == {(0.625, 0.625)}
    assert panel.scale
    finer = panel.tiles[0][2].pixels
    assert finer is not None
    # The point lies in the corner of four cells: the two beside the diagonal are alike.
    assert (finer[4, 5] == finer[5, 4]).all()
    assert (
        finer[4, 4] == heat(cosine_map(np.array([0.625, 0.625, 1]), places(8)), float(panel.rows[0].split()[0]), 1)[4, 4]
    ).all()


def test_every_run_stands_beside_its_own_bilinear_row(tmp_path):
    """The second one loses to its own bilinear enlargement, and would win against the first one's."""
    first = run_of(tmp_path / "first", {0: 0.9, 4: 0.3}, bilinear=0.4)
    second = run_of(tmp_path / "second", {0: 0.9, 4: 0.2}, bilinear=0.1, size=32)

    rows = rows_of(list(training_lines([first, second])))

    assert rows["run"] == ["step", "val_loss", "val_cosine"]
    assert rows["first, bilinear"] == ["", "0.4000", "0.6000"]
    assert rows["second, bilinear"] == ["", "0.1000", "0.9000"]
    assert rows["second, untrained"] == ["0", "0.9000", "0.1000"]
    assert rows["second, last and best"] == ["4", "0.2000", "0.8000"]


def test_the_best_and_the_last_scores_have_their_names_and_steps(tmp_path):
    lines = list(training_lines([run_of(tmp_path / "run", {0: 0.9, 4: 0.2, 8: 0.5}, bilinear=0.4)]))

    rows = rows_of(lines)
    assert rows["run, best"] == ["4", "0.2000", "0.8000"]
    assert rows["run, last"] == ["8", "0.5000", "0.5000"]
    assert "run, last and best" not in rows


@pytest.mark.parametrize(
    ("identity", "difference"),
    [
        ({"size": 32}, "size a 64, b 32"),
        ({"held_out": "b" * 64}, f"held_out a '{'a' * 12}…', b '{'b' * 12}…'"),
        ({"seed": 5}, None),
    ],
)
def test_runs_that_were_judged_otherwise_are_named(tmp_path, identity, difference):
    folders = [run_of(tmp_path / "a", {4: 0.3}, 0.4), run_of(tmp_path / "b", {4: 0.2}, 0.4, **identity)]

    said = [line for line in training_lines(folders) if "don't compare" in line]

    assert said == ([f"- b wasn't judged as a was, so that their numbers don't compare: {difference}."] if difference else [])


def test_a_readout_beside_an_upsampler_is_something_else(tmp_path):
    folders = [run_of(tmp_path / "a", {4: 0.3}, 0.4), run_of(tmp_path / "b", {4: 0.2}, 0.4, task="depth")]

    assert list(training_lines(folders))[-1] == "- b is trained for something else than a, so that their numbers don't compare."


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [run_of(tmp_path / place / "run", {4: 0.3}, 0.4) for place in ("a", "b")]

    assert {f"{tmp_path}/a/run, last and best", f"{tmp_path}/b/run, last and best"} <= rows_of(
        list(training_lines(folders))
    ).keys()


def lines_of(axes: Axes, style: str = "-") -> list[tuple[list[float], list[float]]]:
    return [tuple(list(each) for each in line.get_data()) for line in axes.lines if line.get_linestyle() == style]


def test_curves_have_losses_and_scores_the_best_and_bilinears(tmp_path):
    first = run_of(tmp_path / "first", {0: 0.9, 4: 0.2, 8: 0.5}, bilinear=0.4)
    second = run_of(tmp_path / "_second", {4: 0.3}, bilinear=0.1)

    figure = curves_figure({"first": first, "_second": second})

    panels = {axes.get_title(): axes for axes in figure.axes}
    assert list(panels) == ["loss of the training", "val_loss", "val_cosine"]
    assert lines_of(panels["loss of the training"]) == [([0, 4, 8], [9.0, 9.0, 9.0]), ([4], [9.0])]
    # Curves, and the best checkpoint's star.
    assert lines_of(panels["val_loss"]) == [([0, 4, 8], [0.9, 0.2, 0.5]), ([4], [0.2]), ([4], [0.3]), ([4], [0.3])]
    assert lines_of(panels["val_loss"], "--") == [([0, 4, 8], [0.4, 0.4, 0.4]), ([4], [0.1])]
    assert lines_of(panels["val_cosine"])[1] == ([4], [0.8])
    (legend,) = figure.legends
    assert [text.get_text().strip() for text in legend.get_texts()][:2] == ["first", "_second"]


def test_a_long_loss_is_drawn_smoothed_before_itself(tmp_path):
    folder = run_of(tmp_path / "run", {600: 0.5}, bilinear=0.4)
    write_metrics(folder, [*({"step": n, "loss": float(n % 2)} for n in range(1, 601)), validated(600, 0.5, 0.4)])

    raw, mean = lines_of(curves_figure({"run": folder}).axes[0])

    assert len(raw[0]) == 600
    assert np.abs(np.array(mean[1]) - 0.5).max() < 0.06
    assert mean[0][0] > 1
    assert mean[0][-1] < 600


def test_curves_are_written_where_they_are_asked_for(tmp_path, capsys):
    run_of(tmp_path / "run", {0: 0.9, 4: 0.2}, bilinear=0.4)

    assert show.run(["training", f"{tmp_path}/run", "--out", f"{tmp_path}/curves.png"]) == 0
    assert Image.open(tmp_path / "curves.png").width > 1000
    assert "Curves: --out" not in capsys.readouterr().out
    assert show.run(["training", f"{tmp_path}/run"]) == 0
    assert "TensorBoard's files are in tensorboard/ of each." in capsys.readouterr().out
    assert show.run(["training", f"{tmp_path}/run", "--out", f"{tmp_path}/curves.foo"]) == show.run(["training"]) == 2
    assert "no run: give the folder of a training run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "config",
    [
        *OBJECTIVES.values(),
        *[OBJECTIVES["lift"].of(method="resize_conv", crop=0.5, data=("a b/{0..1}.tar",), layers=(3, -1), norm=False)],
        OBJECTIVES["featup"].of(clip=None, clip_steps=None, channel_norm=False),
        ReadoutTraining,
        ReadoutTraining.of(method="depth_bins", task="depth", dataset="nyu", depth_loss="vit-up", normalise=False),
    ],
)
def test_a_runs_command_gives_its_settings(config):
    config = config() if isinstance(config, type) else config
    command = command_of(f"train {config.word}", config.public(), type(config)().public())

    _, *words = shlex.split(command)
    given: list[TrainConfig] = []
    parsed = replace(program, commands={"": replace(program.commands[""], run=lambda each: given.append(each) or iter(()))})

    assert parsed.run(words) == 0
    assert given[0].public() == config.public()


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """Of an upsampler with its pictures, and made-up ones, whose names HTML must escape."""
    folder = tmp_path_factory.mktemp("pages")
    said = {"versions": {"torch": "2"}, "command": "python jobs/train.py lift '<b>'"}
    begun = {"identity": {"val_rows": 4}, "config": {"lr": 0.5}, **said}
    data = io.BytesIO()
    Image.new("RGB", (300, 200)).save(data, "png")
    (folder / "<i>one</i>/pictures").mkdir(parents=True)
    (folder / "<i>one</i>/pictures/zoomed.png").write_bytes(b"someone's own")
    runs = [run_of(folder / name, {0: 0.9, 4: 0.2, 8: 0.5}, bilinear=0.4) for name in ("<i>one</i>", "two" * 60)]
    for run in runs:
        run.write("run.json", json.dumps(begun).encode())
        run.write("pictures/step-00000004.png", data.getvalue())
        run.write("pictures/step-00000008.png", data.getvalue())
    return runs


def test_a_page_tells_all_of_training_runs(two_runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert show.run(["training", *(run.url for run in two_runs), two_runs[0].url + "/", "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("opens without a network")

    text = out.read_text()
    assert "<i>one" not in text
    assert "&lt;i&gt;one" in text
    assert "python jobs/train.py lift &#39;&lt;b&gt;&#39;" in text
    assert "torch 2" in text
    assert text.count("data:image/png;base64,") == 2 + 2  # curves for two widths, and each run's last picture
    assert "after 8 steps" in text
    for cell in ("0.9000", "0.2000", "0.5000", "0.4000"):
        assert cell in text
    assert show.run(["training", two_runs[0].url, "--out", str(tmp_path / "page.foo")]) == 2
    assert "or .html for a page" in capsys.readouterr().err


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_opens_in_a_browser(two_runs, tmp_path, chromium, width):
    opens_well(render_training(two_runs), tmp_path, chromium, width)


def test_the_end_of_a_training_says_of_which_step_its_scores_are(small):  # noqa: F811
    config = small(max_steps=4)
    folder = Folder(config.out)
    first = list(main(config))
    done = Validations.read(folder)
    assert f"held out   step 4, the last and, by val_loss, the best: {done.last}" in first
    assert f"best       {config.out}/steps/00000004" in first

    write_metrics(folder, [validated(2, 0.125, 0.5), validated(4, 0.75, 0.5), {"step": 4, "seconds": 1.0}])
    point_at(folder, best=2, last=4)
    printed = list(main(config))

    assert [line for line in printed if "val_loss 0." in line] == [
        "held out   step 4, the last: val_loss 0.7500, val_cosine 0.2500, val_loss_bilinear 0.5000, val_cosine_bilinear 0.5000",
        "           step 2, the best by val_loss: val_loss 0.1250, val_cosine 0.8750, val_loss_bilinear 0.5000, "
        "val_cosine_bilinear 0.5000",
    ]
    assert f"best       {config.out}/steps/00000002" in printed


def test_a_training_without_validations_has_no_best_checkpoint(small):  # noqa: F811
    config = small(max_steps=2)
    list(main(config))
    folder = Folder(config.out)
    write_metrics(folder, [{"step": 2, "loss": 1.0}])
    point_at(folder, best=None, last=2)

    printed = list(main(config))

    assert "held out   nothing was judged, so that there is no best checkpoint" in printed
    assert f"last       {config.out}/steps/00000002" in printed
    assert not any(line.startswith("best") for line in printed)
