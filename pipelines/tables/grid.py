"""What a grid of readouts found: the papers' tables as Markdown, all of it as JSON, and the picture of speed and scores."""

import io
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from pipelines.config import Identity, flag_of, settings_of
from pipelines.costs.speed import Speed
from pipelines.executors import executor_for
from pipelines.provenance import NOTHING_RUN, require_no_run, run_folder, versions
from pipelines.published import Values
from pipelines.published.deap import DEAP_PARAMETERS, DEAP_TASKS
from pipelines.results import sides, table_lines
from pipelines.tables.backbones import BY_NAME, PaperBackbone
from pipelines.tables.doing import CellsFailed
from pipelines.tables.drawings import name_points, scale_across
from pipelines.tables.grid_cells import Cell, CellResult, GridConfig, plan_cells, published_recipe
from pipelines.tables.grid_run import run_cells, state_in_words
from pipelines.tables.seeds import Score
from pipelines.tables.speeds import measure_speeds
from pipelines.tables.tasks import Column, TableTask, published_values
from pipelines.training.readout import FEATURES, ReadoutTraining
from pipelines.training.watch import COUNTS, held_out_words
from storage.differences import Difference, Differences, differences
from storage.documents import JsonObject, JsonValue
from storage.paths import Folder
from storage.totals import KEEP_THEM

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A backbone, a task and a method, over seeds."""

    backbone: PaperBackbone
    task: TableTask
    method: str
    scores: tuple[Score | None, ...]
    "of the task's columns"
    due: int
    "runs"
    parameters: int | None
    grid: tuple[int, int] | None
    input_size: tuple[int, int] | None
    other_settings: Differences
    "between what a paper's numbers of the task are of, and these runs"
    left_out: Mapping[str, str]
    "settings of the task's recipe that nothing here uses, and why"

    @property
    def published(self) -> Values:
        """By the heads of the task's columns; empty where no paper has any."""
        return published_values(self.backbone, self.method, self.task.name)


def entries(cells: Sequence[Cell], results: Sequence[CellResult]) -> list[Entry]:
    """Results over seeds, in the order of the cells."""
    groups: dict[tuple[str, str, str], list[tuple[Cell, CellResult]]] = {}
    for cell, result in zip(cells, results, strict=True):
        groups.setdefault((cell.backbone.name, cell.task.name, cell.method), []).append((cell, result))
    return [_entry(group) for group in groups.values()]


def _entry(group: Sequence[tuple[Cell, CellResult]]) -> Entry:
    cell, done = group[0][0], [result for _, result in group if not result.error]
    first = done[0] if done else group[0][1]  # what failed has neither counts nor sizes
    return Entry(
        backbone=cell.backbone,
        task=cell.task,
        method=cell.method,
        scores=tuple(_score(column, done) for column in cell.task.columns),
        due=len(group),
        parameters=first.parameters,
        grid=first.grid,
        input_size=first.input_size,
        other_settings=_other_settings(cell, first.other_features),
        left_out={n: why for n, why in cell.unused.items() if published_recipe(cell.task, cell.method).is_given(n)},
    )


_RUNS_OWN = ("data", "store", "val_store", "revision", "seed", "micro_batch", "weights", "drawing")
"""Settings that aren't what papers' numbers are of, or are said by what comes of them."""

_NETWORK = ("dim", "width", "outputs", "mask", "shared_sigma", "only_mask")
"""Those that decide how many parameters a readout has."""


def _other_settings(cell: Cell, of_features: Sequence[Difference]) -> Differences:
    """Between the recipe that a paper has for the task, and what the cell's runs are; `of_features`: what is known of those that
    they read."""
    recipe, stored = published_recipe(cell.task, cell.method), bool(cell.training.store)
    own = {"model": cell.backbone.model, "size": cell.backbone.size, "ragged": cell.backbone.ragged}
    published = recipe.changed(**own, weights=cell.backbone.weights or "pretrained")
    found = differences(_what_counts(published), _what_counts(cell.training)).found
    # A store's features are as it says, not as the settings do that nothing used.
    of_settings = [each for each in found if not (stored and each.field in FEATURES)]
    return Differences(found=tuple({each.field: each for each in (*of_settings, *of_features)}.values()))


def _what_counts(training: ReadoutTraining) -> dict[str, JsonValue]:
    """Settings that a score depends on. A file may hold the paper's weights; random ones don't."""
    known, values = settings_of(ReadoutTraining), training.flat()
    counted = [name for name, each in known.items() if each.identity in (Identity.COUNTS, Identity.FOUND)]
    found = {name: values[name] for name in (*counted, "epochs", "max_steps") if name not in _RUNS_OWN}
    weights = "random" if str(values["weights"]).startswith("random") else "pretrained"
    return {**found, "weights": weights, "drawing": training.rendering}


def _score(column: Column, done: Sequence[CellResult]) -> Score | None:
    return Score.of([column.scale * result.metrics[column.metric] for result in done if column.metric in result.metrics])


# --- tables -----------------------------------------------------------------------------------------------------------


def report(config: GridConfig, found: Sequence[Entry], speeds: Mapping[str, Speed], results: Sequence[CellResult]) -> str:
    """The tables as Markdown."""
    failed = [result for result in results if result.error]
    parts = ["# Readouts on frozen features"]
    for method in config.methods:
        rows = _by_backbone([entry for entry in found if entry.method == method], speeds, paper=config.paper)
        parts.append(_section(method, rows))
    if len(config.methods) > 1:
        for name in config.backbones:
            rows = _by_method([entry for entry in found if entry.backbone.name == name], paper=config.paper)
            parts.append(_section(f"Methods on {name}", rows))
    parts.append(_section("Learned parameters", _parameters(found, paper=config.paper)))
    published = _notes_of_published(found) if config.paper else ()
    notes = _notes(config, speeds), _notes_of_left_out(found), published, _cell_notes(results)
    parts.append("\n".join(itertools.chain(*notes)))
    if failed:
        lines = "\n".join(f"- {each.name}: {each.error}" for each in failed)
        parts.append(f"## Failed: {len(failed)}\n\n{lines}")
    if speeds:
        parts.append("![speed and scores](grid.png)")
    return "\n\n".join(parts) + "\n"


Rows = list[list[str]]
"""A table's cells; the first row is the head."""


def _tasks(found: Sequence[Entry]) -> list[TableTask]:
    return list({entry.task.name: entry.task for entry in found}.values())


def _heads(tasks: Sequence[TableTask]) -> list[str]:
    return [f"{task.label} {column.head}" for task in tasks for column in task.columns]


def _by_backbone(found: Sequence[Entry], speeds: Mapping[str, Speed], *, paper: bool) -> Rows:
    """DeAP's Table 3: rows are backbones."""
    tasks = _tasks(found)
    rows = [["backbone", "px", "grid", *_heads(tasks), "learned, M", "speed"]]
    for name in dict.fromkeys(entry.backbone.name for entry in found):
        of = {entry.task.name: entry for entry in found if entry.backbone.name == name}
        first = next((entry for entry in of.values() if entry.grid), next(iter(of.values())))
        speed = f"{speeds[name].relative:.2f}" if name in speeds else ""
        rows += _rows(first.backbone.label, [of[task.name] for task in tasks], _input_of(first), [speed], paper=paper)
    return rows


def _by_method(found: Sequence[Entry], *, paper: bool) -> Rows:
    """ViT-Up's Table 1, DeAP's Table 5: rows are methods of one backbone."""
    tasks = _tasks(found)
    rows = [["method", *_heads(tasks), "learned, M"]]
    for method in dict.fromkeys(entry.method for entry in found):
        of = {entry.task.name: entry for entry in found if entry.method == method}
        rows += _rows(method, [of[task.name] for task in tasks], [], [], paper=paper)
    return rows


def _rows(label: str, found: Sequence[Entry], before: list[str], after: list[str], *, paper: bool) -> Rows:
    """A row of scores and learned parameters between other cells; below it the published one, if there is any."""
    counts = [entry.parameters for entry in found if entry.parameters]
    learned = f"{sum(counts) / 1e6:.3f}" if len(counts) == len(found) else ""
    rows = [[label, *before, *(cell for entry in found for cell in _cells(entry)), learned, *after]]
    printed = [cell for entry in found for cell in _published_cells(entry)]
    if paper and any(printed):
        others = any(entry.published and entry.other_settings for entry in found)
        name = f"{label}, published, of other settings" if others else f"{label}, published"
        rows.append([name, *before, *printed, "", *([""] * len(after))])
    return rows


def _parameters(found: Sequence[Entry], *, paper: bool) -> Rows:
    """Counts of every readout; DeAP's published ones are in millions."""
    tasks = _tasks(found)
    rows = [["backbone, method", *(task.label for task in tasks)]]
    known = {channels: dict(zip(DEAP_TASKS, each, strict=True)) for (_, channels), each in DEAP_PARAMETERS.items()}
    for name, method in dict.fromkeys((entry.backbone.name, entry.method) for entry in found):
        of = {e.task.name: e for e in found if (e.backbone.name, e.method) == (name, method)}
        counts = [f"{of[task.name].parameters:,}" if of[task.name].parameters else "" for task in tasks]
        rows.append([f"{name}, {method}", *counts])
        published = known.get(BY_NAME[name].channels or 0, {}) if name in BY_NAME else {}
        millions = [None if _is_other_network(of[task.name]) else published.get(task.name) for task in tasks]
        if paper and method == "deap" and any(millions):
            rows.append([f"{name}, published", *(f"{each:.3f} M" if each else "" for each in millions)])
    return rows


def _is_other_network(entry: Entry) -> bool:
    return any(each.field in _NETWORK for each in entry.other_settings.found)


def _input_of(entry: Entry) -> list[str]:
    """Pixels and cells, measured where something was."""
    if entry.input_size and entry.grid:
        return [sides(entry.input_size), sides(entry.grid)]
    return [str(entry.backbone.size), str(entry.backbone.grid or "")]


def _cells(entry: Entry) -> Iterator[str]:
    for column, score in zip(entry.task.columns, entry.scores, strict=True):
        yield "failed" if score is None else score.in_words(column.digits, entry.due)


def _published_cells(entry: Entry) -> Iterator[str]:
    for column in entry.task.columns:
        value = entry.published.get(column.head)
        yield "" if value is None else f"{value:.{column.digits}f}"


def _section(title: str, rows: Rows) -> str:
    return "\n".join([f"## {title}", *table_lines(rows[0], rows[1:])])


def _notes(config: GridConfig, speeds: Mapping[str, Speed]) -> Iterator[str]:
    over = f"mean ± sample deviation over {len(config.seeds)} seeds" if len(config.seeds) > 1 else "one seed"
    yield f"- Scores: of held-out images after the last step; {over}."
    yield "- IoU, accuracy and ARI in percent; CE is the mean cross-entropy; AP_lg a share of 1; RMSE in metres."
    yield "- learned, M: the readouts of a row's tasks together, 10^6."
    if speeds:
        one = next(iter(speeds.values()))
        yield (
            f"- speed: images per second of the backbone alone, of those of {config.speed_reference} at "
            f"{config.speed_reference_size} px beside it; {one.batches} batches of {config.speed_batch}, {one.where}."
        )
    yield from (f"- {name}: {BY_NAME[name].note}." for name in config.backbones if name in BY_NAME and BY_NAME[name].note)


def _notes_of_left_out(found: Sequence[Entry]) -> Iterator[str]:
    """What of the tasks' recipes the runs do without."""
    groups: dict[tuple[str, str], dict[str, None]] = {}
    for entry in found:
        for each in entry.left_out.items():
            groups.setdefault(each, {})[f"{entry.task.label}, {entry.method}"] = None
    for (name, why), runs in groups.items():
        yield f"- Turned off, which the recipe has: {flag_of(name)}, since {why} ({'; '.join(runs)})."


def _cell_notes(results: Sequence[CellResult]) -> Iterator[str]:
    """What of a cell's run isn't as a reader would think."""
    for result in results:
        if any(result.metrics.get(name) for name in COUNTS if name != "val_images"):
            yield f"- {result.name}: scores {held_out_words(result.metrics)}."
        if result.clipped:
            times = f"trained {result.clipped:,} times on an image with features beyond float16's range"
            yield f"- {result.name}: {times}, which are clamped; {KEEP_THEM}."
        yield from (f"- {result.name}: {note}" for note in result.notes)


def _notes_of_published(found: Sequence[Entry]) -> Iterator[str]:
    """In what the papers' runs are others than these, and of what they have nothing."""
    names = {f"{entry.backbone.name}, {entry.method}, {entry.task.label}": entry for entry in found}
    for name, entry in names.items():
        if entry.published and entry.other_settings:
            yield f"- Published of {name}: of other settings than this run: {entry.other_settings.line('published', 'here')}."
    if alone := [name for name, entry in names.items() if not entry.published]:
        yield f"- Nothing is published of {'; '.join(alone)}."


# --- the picture ------------------------------------------------------------------------------------------------------


def scatter(found: Sequence[Entry], speeds: Mapping[str, Speed], reference: str) -> bytes:
    """DeAP's Fig. 7 as a PNG: speed across, relative to the `reference`'s (a backbone in words), score up (errors point down), a
    panel for each task."""
    from matplotlib.figure import Figure

    tasks = _tasks(found)
    columns = min(3, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.8 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    points = [
        _draw_panel(panel, task, [entry for entry in found if entry.task.name == task.name], speeds, reference)
        for panel, task in zip(panels, tasks, strict=False)
    ]
    for panel in panels[len(tasks) :]:
        panel.set_axis_off()
    methods = {label: mark for panel in panels for mark, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    if len(methods) > 1:
        figure.legend(methods.values(), methods.keys(), loc="outside lower center", ncols=len(methods), fontsize=8)
    figure.draw_without_rendering()  # where points lie is known once it's laid out
    for panel, of_panel in zip(panels, points, strict=False):
        name_points(panel, of_panel)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()


def _draw_panel(
    panel: "Axes", task: TableTask, found: Sequence[Entry], speeds: Mapping[str, Speed], reference: str
) -> list[tuple[float, float, str]]:
    """Gives what was drawn: speed, score and backbone of each point."""
    methods = list(dict.fromkeys(entry.method for entry in found))
    points_of: list[tuple[float, float, str]] = []
    for method in methods:
        points = [
            (speeds[e.backbone.name].relative, e.scores[-1], e.backbone.name)
            for e in found
            if e.method == method and e.scores[-1] is not None and e.backbone.name in speeds
        ]
        if not points:
            continue
        across, scores, names = zip(*points, strict=True)
        up, spread = [score.mean for score in scores], [score.deviation or 0.0 for score in scores]
        panel.errorbar(across, up, yerr=spread, fmt="o", capsize=3, label=method)
        points_of.extend(zip(across, up, names, strict=True))
    scale_across(panel, [speeds[entry.backbone.name].relative for entry in found if entry.backbone.name in speeds])
    panel.set(title=task.label, xlabel=f"images/s of the backbone, as a multiple of\n{reference}", ylabel=task.columns[-1].head)
    # No score is below 0 but ARI; error bars and margins would show an axis there.
    if points_of and min(up for _, up, _ in points_of) >= 0:
        panel.set_ylim(bottom=max(0.0, panel.get_ylim()[0]))
    if task.columns[-1].falls:
        panel.invert_yaxis()
    return points_of


# --- files ------------------------------------------------------------------------------------------------------------


def _entry_report(entry: Entry) -> JsonObject:
    """An entry, as grid.json has it: scores and published numbers by their columns' heads."""
    heads = [column.head for column in entry.task.columns]
    return {
        "backbone": entry.backbone.name,
        "task": entry.task.name,
        "method": entry.method,
        "scores": {head: asdict(score) if score else None for head, score in zip(heads, entry.scores, strict=True)},
        "published": {head: entry.published.get(head) for head in heads} if entry.published else {},
        "published_differs": [asdict(each) for each in entry.other_settings.found] if entry.published else [],
        "left_out": dict(entry.left_out),
        "parameters": entry.parameters,
    }


def write_grid(
    folder: Folder, config: GridConfig, cells: Sequence[Cell], results: Sequence[CellResult], speeds: Mapping[str, Speed]
) -> str:
    """Write grid.json, grid.md and, with speeds, grid.png, of which none is left otherwise; returns the Markdown."""
    found = entries(cells, results)
    text = report(config, found, speeds, results)
    document = {
        "config": config.public(),
        "cells": [asdict(result) for result in results],
        "entries": [_entry_report(entry) for entry in found],
        "speed": {name: asdict(speed) for name, speed in speeds.items()},
        "versions": versions(),
    }
    folder.write("grid.json", json.dumps(document, indent=1).encode())
    if speeds:
        folder.write("grid.png", scatter(found, speeds, f"{config.speed_reference} at {config.speed_reference_size} px"))
    else:
        folder.remove(["grid.png"])  # an earlier start's, of other scores
    folder.write("grid.md", text.encode())
    return text


def plan_lines(config: GridConfig, cells: Sequence[Cell]) -> Iterator[str]:
    """What a grid will do: a line for each cell, and how far that is. Nothing is begun, and no data is read."""
    states = [state_in_words(cell) for cell in cells]
    done = sum(state.startswith("done") for state in states)
    yield f"{config.folder.displayed}: {len(cells):,} cells, {done:,} done, {len(cells) - done:,} to go"
    width = max(len(cell.name) for cell in cells)
    yield from (f"  {cell.name:<{width}}  {state}" for cell, state in zip(cells, states, strict=True))
    if config.speed:
        count = len({cell.backbone.name for cell in cells})
        yield f"then the speed of {count} backbone{'s' if count > 1 else ''}, unless it is known"
    yield "done: whether with these settings and this data, is asked when it is run"
    yield NOTHING_RUN


def main(config: GridConfig) -> Iterator[str]:
    """Run all cells, then measure speeds; writes what was found and gives it line by line. Raises `CellsFailed` at the end."""
    cells, folder = plan_cells(config), run_folder(config.folder.url, config.options)  # before a cluster is started
    require_no_run(folder, "grid")
    if config.plan:
        yield from plan_lines(config, cells)
        return
    config.require_places()
    with executor_for(config) as executor:
        results = run_cells(config, cells, executor)
        failed = sum(bool(result.error) for result in results)
        text, speeds = write_grid(folder, config, cells, results, {}), {}
        if config.speed and failed < len(cells):
            speeds = measure_speeds(config, cells, results, executor)
            text = write_grid(folder, config, cells, results, speeds)
    yield text
    yield f"{folder.displayed}: grid.md, grid.json{', grid.png' if speeds else ''}; each run in a folder of its own"
    if failed:
        raise CellsFailed(f"{failed} of {len(cells)} runs failed; the tables say which and why")
