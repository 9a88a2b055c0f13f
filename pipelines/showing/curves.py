"""Curves of training runs: the loss, and what was measured on held-out images, against the steps."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipelines.plots import png_of, styled
from pipelines.training.watch import PLAIN, Validations
from storage.documents import decode
from storage.paths import Folder
from storage.runs import read_metrics
from storage.words import printable_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_SMOOTHED = 60
"""Points of a loss beyond which its running mean is drawn, over so many a part, and the loss itself faintly behind it."""


def curves_png(runs: Mapping[str, Folder], *, wide: int = 3) -> bytes:
    """`curves_figure` as a PNG."""
    return png_of(curves_figure(runs, wide=wide))


def curves_figure(runs: Mapping[str, Folder], *, wide: int = 3) -> "Figure":
    """A panel of the runs' losses in training, and one for each score of held-out images; a colour for each run.

    Up to `wide` panels are beside each other. The best checkpoint is marked, bilinear enlargement's scores are dashed. Raises
    `CheckpointError` where metrics are damaged.
    """
    from matplotlib.figure import Figure

    losses = {name: _losses(folder) for name, folder in runs.items()}
    validated = {name: found for name, folder in runs.items() if (found := Validations.read(folder))}
    scores = dict.fromkeys(
        score for found in validated.values() for each in found.every for score in each.scores if not score.endswith(PLAIN)
    )
    count = 1 + len(scores)
    rows, wide = math.ceil(count / wide), min(count, wide)
    with styled(parse_math=False):
        figure = Figure(figsize=(4.2 * wide, 2.9 * rows + 0.5), layout="constrained")
        panels = figure.subplots(rows, wide, squeeze=False).ravel()
        for panel, title in zip(panels, ["loss of the training", *scores], strict=False):
            panel.set(title=title, xlabel="step")
            panel.grid(alpha=0.25)
        for panel in panels[count:]:
            panel.remove()
        for number, name in enumerate(runs):
            colour = f"C{number % 10}"
            _draw_loss(panels[0], losses[name], colour)
            if name in validated:
                for panel, score in zip(panels[1:], scores, strict=False):
                    _draw_score(panel, validated[name], score, colour)
        figure.legend(
            *_legend(list(runs), validated), loc="outside lower center", ncols=wide + 1 if wide > 1 else 1, frameon=False
        )
    return figure


def _losses(folder: Folder) -> dict[int, float]:
    """By step."""
    lines = [line for line in read_metrics(folder) if isinstance(line.get("loss"), int | float)]
    return {decode(int, line["step"]): decode(float, line["loss"], "loss") for line in lines}


def _draw_loss(panel: "Axes", losses: Mapping[int, float], colour: str) -> None:
    steps, values = np.array(sorted(losses)), np.array([losses[step] for step in sorted(losses)])
    if len(steps) <= _SMOOTHED:
        panel.plot(steps, values, color=colour, marker="." if len(steps) == 1 else None)
        return
    panel.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
    width = len(steps) // _SMOOTHED + 1
    mean = np.convolve(values, np.full(width, 1 / width), mode="valid")
    panel.plot(steps[(width - 1) // 2 :][: len(mean)], mean, color=colour)


def _draw_score(panel: "Axes", found: Validations, score: str, colour: str) -> None:
    for name, style in ((score, {"marker": "."}), (score + PLAIN, {"linestyle": "--", "linewidth": 1})):
        points = [(each.step, each.scores[name]) for each in found.every if name in each.scores]
        if len(points) == 1:  # a line of one point isn't seen
            style = {**style, "marker": "."}
        if points:
            panel.plot(*zip(*points, strict=True), color=colour, **style)
    if found.best and score in found.best.scores:
        panel.plot(found.best.step, found.best.scores[score], marker="*", markersize=11, color=colour, markeredgecolor="black")


def _legend(names: Sequence[str], validated: Mapping[str, Validations]) -> tuple[list["Line2D"], list[str]]:
    """The runs' colours, and what marks and dashes mean where there are any."""
    from matplotlib.lines import Line2D

    entries = [(Line2D([], [], color=f"C{number % 10}"), printable_name(name)) for number, name in enumerate(names)]
    if any(found.best for found in validated.values()):
        star = Line2D([], [], color="white", marker="*", markersize=11, markeredgecolor="black")
        entries.append((star, "the best checkpoint, by val_loss"))
    if any(name.endswith(PLAIN) for found in validated.values() for name in found.last.scores):
        entries.append((Line2D([], [], color="grey", linestyle="--"), "bilinear enlargement of the same images"))
    # matplotlib leaves out what begins with an underscore.
    return [line for line, _ in entries], [f" {text}" for _, text in entries]
