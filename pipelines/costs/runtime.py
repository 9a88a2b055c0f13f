"""Time and peak memory of each method and output grid, in the layout of ViT-Up's Table 9; operations and parameters, as LiFT's
Tables 5 and 6 have them, too.

What it takes to bring one random image to a grid of features, backbone included. Weights are random unless a method names a
checkpoint: the numbers don't depend on them. How things are timed and counted is said in pipelines/costs/upsamplers.py.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Annotated

import torch
import tyro
from matplotlib.figure import Figure

from operators.backbone import PatchFeatures, TimmBackbone
from operators.upsamplers import Upsampler, UpsamplerError, create_upsampler, find_method, method_names, spelled, split_method
from pipelines.config import ClusterConfig, ConfigError, Counts, Held, require_at_least
from pipelines.costs.clocks import device_name, held_bytes, processor_of, timed
from pipelines.costs.upsamplers import (
    OperationCounts,
    count_operations,
    counted_macs,
    image_to_grid,
    network_of,
    require_enlarging,
)
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.run import Evaluated, Piece, Record, begin
from pipelines.features.config import LevelConfig
from pipelines.features.feature_source import CachedSource
from pipelines.features.live_source import LiveRecipe, LiveSource
from pipelines.features.memory import allow_alone
from pipelines.features.model_bundle import ModelBundle
from pipelines.features.rows import Row
from pipelines.features.sources import resolve_source
from pipelines.features.upsamplers import UpsamplerWeights, load_upsampler
from pipelines.plots import png_of, styled
from pipelines.published import Published, Values
from pipelines.published.lift import LIFT, LIFT_OPERATIONS
from pipelines.published.vit_up import RELEASED_PARAMETERS, VIT_UP_RUNTIME, VIT_UP_RUNTIME_SETTINGS
from pipelines.results import Findings, Items, LeftOut, Line, Measured, Table, sides, with_published
from storage.datasets.content import joint_digest
from storage.differences import Differences, differences
from storage.documents import JsonObject, JsonValue, decode
from storage.paths import Folder
from storage.redaction import redact
from storage.spec import FeatureSpec

_UNUSED = ("data", "stores", "drawing", "limit", "against", "means")
"""Settings of every evaluation that mean nothing here."""


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig(EvaluateConfig):
    """How long does each method take from an image to a grid, and how much memory? One random image, nothing to download."""

    features: Held[LevelConfig] = LevelConfig(weights="random", levels=("x1",))
    methods: Counts[tuple[str, ...]] = ("bilinear", "lift")
    """Upsamplers: bilinear (always there), bicubic, nearest; learned ones (lift, vit_up, ..., module:Class of your own) with
    random weights, or with a checkpoint's, as in vit_up:s3://bucket/checkpoint."""
    settings: Counts[tuple[str, ...]] = ()
    """Of methods with random weights, METHOD.NAME=VALUE, where they aren't to be the defaults: lift.wide=true."""
    side: Annotated[Counts[int], tyro.conf.arg(name="size")] = 448
    """Side of the square input in pixels."""
    grids: Counts[tuple[int, ...]] = (56, 112, 224, 448)
    """Sides of the output grids. Those that a method can't give (LiFT: 2, 4, 8, ... times the backbone's) are left out."""
    chunks: Counts[tuple[int, ...]] = (0,)
    """Cells made at once, as the side of their square, of methods that make some at a time; 0 is what extraction takes. None
    larger than the grid."""
    warm_up: Counts[int] = 10
    """Passes before timing, for each line of the table."""
    repeat: Counts[int] = 50
    """Timed passes of each line."""
    row_s: Counts[float] = 60.0
    """No further pass that would bring a line's warm-up, or its timing, beyond so many seconds; each has one at least."""
    cluster: Held[ClusterConfig] = ClusterConfig(actors=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stores:
            raise ConfigError("--stores: a store holds finished maps, which leaves nothing to time; leave it out")
        given, plain = self.features.levels, type(self).features.levels
        changed = [name for name in _UNUSED if getattr(self, name) != getattr(type(self), name)]
        if changed := [*changed, *(["levels"] if given != plain else [])]:
            raise ConfigError(f"--{changed[0]} is not for runtime, which times one random image; see --methods, --grids")
        if self.cluster.actors != 1:
            raise ConfigError(f"--actors {self.cluster.actors}: timings beside each other spoil each other; leave it at 1")
        require_at_least(1, self, "warm_up", "repeat")
        if self.side < 1:
            raise ConfigError(f"--size {self.side}: must be at least 1")
        if not self.grids or min(self.grids) < 1 or not self.chunks or min(self.chunks) < 0 or self.row_s <= 0:
            raise ConfigError("--grids must be at least 1, --chunks at least 0, one of each, and --row-s above 0")
        for name, url in self.named_methods:
            found = require_enlarging("--methods", name)
            if url and not found.learned:
                learned = ", ".join(method_names(lambda method: method.learned))
                raise ConfigError(f"--methods {name}:...: there are no weights of it; {learned} may have a checkpoint's URL")
        if self.chunks != type(self).chunks and not any(find_method(name).chunked for name, _ in self.named_methods):
            chunked = ", ".join(method_names(lambda method: method.chunked))
            raise ConfigError(
                f"--chunks {' '.join(map(str, self.chunks))}: none of --methods makes some cells at a time; there are {chunked}"
            )
        names = [name for name, _ in self.named_methods]
        if len(set(names)) < len(names):
            raise ConfigError(f"--methods {' '.join(names)}: give each once")
        for name in self.given_settings:
            if name not in names or dict(self.named_methods)[name] or not find_method(name).learned:
                raise ConfigError(f"--settings {name}....: no method of --methods that has random weights is called so")

    @property
    def named_methods(self) -> list[tuple[str, str]]:
        """(name, URL of a checkpoint or nothing) of `methods`."""
        return [split_method(text) for text in self.methods]

    @property
    def given_settings(self) -> dict[str, JsonObject]:
        """`settings` by method. Raises `ConfigError`."""
        found: dict[str, dict[str, JsonValue]] = {}
        for text in self.settings:
            name, equals, value = text.partition("=")
            method, dot, setting = name.rpartition(".")
            try:
                parsed: JsonValue = json.loads(value)
            except json.JSONDecodeError:
                parsed = value
            if not (equals and dot and method and setting):
                raise ConfigError(f"--settings {text}: give METHOD.NAME=VALUE, as in lift.wide=true")
            found.setdefault(spelled(method), {})[setting] = parsed
        return dict(found)


# --- the work ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """A line of the table."""

    row: Row
    chunk: int = 0
    "side of the square of cells that are made at once; 0: what extraction takes"

    @property
    def name(self) -> str:
        return f"{self.row.name}, {self.chunk} x {self.chunk} at once" if self.chunk else self.row.name


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What was measured of a case."""

    case: str
    "its name"
    device: str
    seconds: tuple[float, ...]
    macs: int
    bytes_before: int
    "weights above all"
    peak_bytes: int | None
    "with those; None where the system doesn't tell"
    cpu: str = ""
    "the processor, of a timing on a CPU; earlier versions didn't say it"

    @property
    def where(self) -> str:
        """What it holds for."""
        return f"{self.device}, {self.cpu}" if self.cpu else self.device

    @property
    def ms(self) -> float:
        """Mean of all passes, as the papers have it."""
        return 1e3 * statistics.mean(self.seconds)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What is timed, and how."""

    config: RuntimeConfig
    cases: tuple[Case, ...]
    learned: Mapping[str, UpsamplerWeights]
    "by method"
    size: int
    "side of the input that the model takes, in pixels"
    left_out: tuple[LeftOut, ...]
    "lines that can't be had, the method and the grid of each with the reason"

    def pieces(self) -> list[Piece]:
        return [Piece(name=f"{number:03d}", items=(number,)) for number in range(len(self.cases))]

    def run(self, piece: Piece, source: CachedSource, folder: Folder) -> list[Record]:  # noqa: ARG002
        (number,) = piece.items
        case, config = self.cases[number], self.config
        live = source.source  # past the cache: what is timed is done anew
        assert isinstance(live, LiveSource)
        device = torch.device(live.device)
        run = self._program(case, live.recipe, device)
        macs = counted_macs(run)  # the first pass, in which what is done once is done
        timed([run], config.warm_up - 1, config.row_s, device)
        (seconds,) = timed([run], config.repeat, config.row_s, device)
        before, peak = held_bytes(run, device)
        timing = Timing(
            case=case.name,
            device=device_name(device),
            seconds=tuple(seconds),
            macs=macs,
            bytes_before=before,
            peak_bytes=peak,
            cpu=processor_of(device),
        )
        return [asdict(timing)]

    def _program(self, case: Case, recipe: LiveRecipe, device: torch.device) -> Callable[[], object]:
        """From an image on the device to the grid. Only what this needs is on the device: some have a backbone of their own."""
        bundle = recipe.bundle((self.size, self.size))
        model = bundle.build("cpu")
        spec, backbone = bundle.spec, model.backbone
        images = torch.randn(1, 3, *spec.input_size, generator=torch.Generator().manual_seed(0)).to(device)
        upsampler, given = self._upsampler(case, bundle), None
        if upsampler and "backbone" in find_method(case.row.method).needs:
            grid = recipe.rows(spec.input_size)[0].grid
            maps = {layer: torch.empty(1, backbone.channels, *grid) for layer in spec.layers}
            given = PatchFeatures(layers=maps, prefix={}, stride=spec.stride)
        else:
            backbone.model.to(device)
        if upsampler:
            base, channels = recipe.rows(spec.input_size)[0].grid, backbone.channels * len(spec.layers)
            beside = 0 if given else backbone.peak_bytes(1, spec.input_size)
            allow_alone(upsampler, device, (1, channels, base, spec.input_size, case.row.grid), beside)
        return image_to_grid(images, backbone, spec.layers, spec.precision, upsampler, case.row.grid, given)

    def _upsampler(self, case: Case, bundle: ModelBundle) -> Upsampler | None:
        method = case.row.method
        if method == "backbone":
            return None
        if method not in self.learned:
            return create_upsampler(method)
        upsampler = self.learned[method].build(bundle.spec.precision, bundle.reload)
        if case.chunk:
            upsampler.take_at_once(case.chunk**2)
        return upsampler


# --- what there is to time --------------------------------------------------------------------------------------------


def prepare(config: RuntimeConfig) -> tuple[Runtime, LiveRecipe, Folder]:
    """The model made, checkpoints loaded, the folder begun: most that can be wrong is wrong here."""
    recipe, ((side, _),) = resolve_source(config.source, [(config.side, config.side)], "squash")
    assert isinstance(recipe, LiveRecipe)  # since there are no stores
    bundle = recipe.bundle((side, side))
    backbone = bundle.backbone()
    learned = {
        method: _load(config, method, url, bundle, backbone)
        for method, url in config.named_methods
        if find_method(method).learned
    }
    cases, left_out = _cases(config, recipe.rows((side, side))[0], learned)
    task = Runtime(config=config, cases=cases, learned=learned, size=side, left_out=left_out)
    digests = [case.row.digest for case in cases]
    return task, *begin(config, "runtime", recipe, Evaluated(records=digests, contents={"upsamplers": joint_digest(digests)}))


def _load(config: RuntimeConfig, method: str, url: str, bundle: ModelBundle, backbone: TimmBackbone) -> UpsamplerWeights:
    if url:
        force = config.features.force_upsampler
        return load_upsampler(method, url, backbone, bundle.spec, storage_options=config.options, force=force)
    found = find_method(method)
    channels = backbone.channels * len(bundle.spec.layers)
    settings, state = found.untrained(backbone, channels, config.side, bundle.reload)
    if given := config.given_settings.get(method):
        try:
            settings = found.with_backbone(found.parse({**found.to_json(settings), **given}), backbone)
        except UpsamplerError as error:
            raise ConfigError(f"--settings: {error}") from None
        state = found.initialised(settings).state_dict()
    return UpsamplerWeights.of(found, settings, state)


def _cases(
    config: RuntimeConfig, low: Row, learned: Mapping[str, UpsamplerWeights]
) -> tuple[tuple[Case, ...], tuple[LeftOut, ...]]:
    """The backbone alone, then grid by grid bilinear and the methods; and what can't be had."""
    names = dict.fromkeys(["bilinear", *(name for name, _ in config.named_methods)])
    cases, digests = [Case(row=low)], {name: weights.digest for name, weights in learned.items()}
    left_out: list[LeftOut] = []
    for grid in dict.fromkeys((side, side) for side in config.grids):
        for method in names:
            try:
                if method in learned:
                    learned[method].require_grid(low.grid, grid)
            except UpsamplerError as error:
                left_out.append(LeftOut(reason=str(error), count=1, first=f"{method} at {sides(grid)}"))
                continue
            row = Row(
                name=f"{method} {_level_name(grid, low.grid)}",
                method=method,
                level=None,
                grid=grid,
                stride=low.stride,
                digest=digests.get(method, ""),
            )
            chunks = config.chunks if find_method(method).chunked else (0,)
            cases += [Case(row=row, chunk=chunk) for chunk in chunks if chunk <= grid[0]]
            larger = [f"{method} at {sides(grid)}, {chunk} x {chunk} at once" for chunk in chunks if chunk > grid[0]]
            left_out += [LeftOut(reason="more at once than the grid has", count=1, first=each) for each in larger]
    return tuple(cases), tuple(left_out)


def _level_name(grid: tuple[int, int], base: tuple[int, int]) -> str:
    factor = grid[0] // base[0]
    return f"x{factor}" if grid == (factor * base[0], factor * base[1]) else f"{grid[0]}x{grid[1]}"


# --- what was found ---------------------------------------------------------------------------------------------------


def find(config: RuntimeConfig, task: Runtime, recipe: LiveRecipe, records: Sequence[Record]) -> Findings:
    """Time and memory of each case, and operations of the backbone and of networks that enlarge x2."""
    timings = [decode(Timing, record, "a timing") for record in records]
    found, devices = {timing.case: timing for timing in timings}, list(dict.fromkeys(one.where for one in timings))
    if len(devices) > 1:
        raise ConfigError(f"{config.out} has timings of {' and of '.join(devices)}; give --out a new folder")
    on_gpu = not devices[0].startswith("CPU")
    if (asked := config.cluster.device) not in ("auto", "cuda" if on_gpu else "cpu"):
        # An earlier start's: which device takes them is no part of what a run is begun with.
        raise ConfigError(f"--device {asked}: {config.out} has timings of {devices[0]}; give --out a new folder")
    counts = _counts(task, recipe.bundle((task.size, task.size)))
    lines = [_line(case, task.size, found[case.name], counts.parameters) for case in task.cases]
    notes: list[str] = []
    if config.paper and on_gpu:
        lines, notes = _with_table_9(lines, task, recipe.spec((task.size, task.size)))
    memory = "peak MiB" if on_gpu else "peak RSS, MiB"
    times = Table(
        title=f"One image, from pixels to the grid: {devices[0]}, {config.features.precision}",
        columns=("ms", "median ms", "passes", memory, "parameters, M", "10^9 MACs"),
        lines=tuple(lines),
        notes=tuple(notes),
    )
    digests = {case.row.method: case.row.digest for case in task.cases if case.row.digest}
    return Findings(
        tables=(times, _operations(config, task, counts, recipe.spec((task.size, task.size)))),
        items=Items(
            scored={"lines": len(task.cases), "timed passes": sum(len(one.seconds) for one in timings)}, left_out=task.left_out
        ),
        choices=_choices(config, task, on_gpu=on_gpu),
        details={"timings": list(records), "counts": asdict(counts), "digests": digests},
        pictures={"runtime.png": plot(task, found)} if config.pictures else {},
    )


def _counts(task: Runtime, bundle: ModelBundle) -> OperationCounts:
    nets = [weights.settings for method, weights in task.learned.items() if find_method(method).trained_by == "lift"]
    spec = bundle.spec
    counts = count_operations(
        spec.model,
        task.size,
        stride=spec.stride,
        facet=spec.facet,
        pos_embed=spec.pos_embed,
        layers=spec.layers,
        ragged=bool(task.size % spec.stride),
        model_args=spec.model_args,
        nets=nets,
    )
    learned = {method: weights.parameters for method, weights in task.learned.items()}
    return replace(counts, parameters={**counts.parameters, **learned})


def _line(case: Case, size: int, timing: Timing, parameters: Mapping[str, int]) -> Line:
    values = [
        timing.ms,
        1e3 * statistics.median(timing.seconds),
        len(timing.seconds),
        None if timing.peak_bytes is None else timing.peak_bytes / 2**20,
        parameters.get(case.row.method, 0) / 1e6,
        timing.macs / 1e9,
    ]
    return replace(Line.of(case.row, (size, size), values), features=case.name)


_SAME_COST = ("heads", "border_crop", "dropout", "rank", "alpha", "mean", "std")
"""Settings of networks that change neither time nor operations in what is measured here, but for a few parts in a thousand."""


def _is_published(task: Runtime, method: str, of: Mapping[str, object] | None = None) -> bool:
    """Whether a network has the settings that a paper's numbers are `of`: else the defaults. A checkpoint may have others."""
    weights = task.learned[method]
    settings = find_method(method).parse(weights.settings)
    plain = [each for each in fields(settings) if each.default is not MISSING and each.name not in _SAME_COST]
    expected = {each.name: each.default for each in plain} | dict(of or {})
    return all(getattr(settings, name) == value for name, value in expected.items())


_TABLE_9 = f"{VIT_UP_RUNTIME.paper.name} {VIT_UP_RUNTIME.table}"


def _from_table_9(task: Runtime, spec: FeatureSpec) -> Differences:
    """Between what Table 9 is of, and what was timed."""
    here = {"model_args": {}, **spec.to_json(), "model": network_of(spec.model), "size": task.size}
    return differences(VIT_UP_RUNTIME.settings, {name: here[name] for name in VIT_UP_RUNTIME.settings})


def _with_table_9(lines: Sequence[Line], task: Runtime, spec: FeatureSpec) -> tuple[list[Line], list[str]]:
    """Below each line the paper's, and at the end its methods that weren't timed, at the grids that were; and what is to be
    said of it. Nothing where it is of another backbone or input: times and memory of those tell nothing."""
    if different := _from_table_9(task, spec):
        return list(lines), [
            f"{_TABLE_9} has nothing of this, so nothing of it is printed: {different.line('published', 'here')}"
        ]
    out: list[Line] = []
    alone: list[str] = []
    for case, line in zip(task.cases, lines, strict=True):
        found = _of_table_9(case, task)
        out += [line, *([_published(line, line.features, case.row.method, found)] if found else [])]
        alone += [] if found else [line.features]
    timed_methods = {case.row.method for case in task.cases}
    others = {row: method for row in VIT_UP_RUNTIME.rows if (method := row.split(",")[0]) not in timed_methods}
    by_side = {case.row.grid[0]: line for case, line in zip(task.cases[1:], lines[1:], strict=True)}
    for side, line in by_side.items():
        beside = {row: VIT_UP_RUNTIME.values(row, str(side)) for row in others}
        out += [_published(line, row, others[row], values) for row, values in beside.items() if values]
    notes = [f"{_TABLE_9} is of a GPU that the paper doesn't name; parameters beside it are those of released networks"]
    return out, notes + ([f"{_TABLE_9} has nothing of {', '.join(alone)}"] if alone else [])


def _of_table_9(case: Case, task: Runtime) -> Values:
    """The paper's of a case; nothing of what it hasn't, or of a network that isn't the one it is of."""
    method = case.row.method
    if method not in task.learned or not _is_published(task, method, VIT_UP_RUNTIME_SETTINGS.get(method, {})):
        return {}
    row = f"{method}, {case.chunk} x {case.chunk} at once" if case.chunk else method
    return VIT_UP_RUNTIME.values(row, str(case.row.grid[0]))


def _published(line: Line, name: str, method: str, values: Values) -> Line:
    released = RELEASED_PARAMETERS.get(method)
    known = values if released is None else {**values, "parameters, M": released / 1e6}
    cells = tuple(known.get(column) for column in ("ms", "median ms", "passes", "peak MiB", "parameters, M", "10^9 MACs"))
    return replace(line, features=f"{_TABLE_9}: {name}", stride=None, values=cells, published=True)


def _operations(config: RuntimeConfig, task: Runtime, counts: OperationCounts, spec: FeatureSpec) -> Table:
    """The layout of LiFT's Table 5. Counted for x2 whatever grids were timed."""
    size, low = (task.size, task.size), task.cases[0].row
    rows = {low.name: low} | {
        f"{method} x2": replace(low, name=f"{method} x2", method=method, grid=(2 * low.grid[0], 2 * low.grid[1]))
        for method in counts.paper_count
        if method != "alone"
    }
    measured = []
    for row in rows.values():
        name = "alone" if row is low else row.method
        macs = counts.macs["alone"] + (0 if row is low else counts.macs[name])
        values = [counts.parameters[row.method] / 1e6, counts.paper_count[name] / 1e9, macs / 1e9]
        measured.append(Measured(line=Line.of(row, size, values), row=row, low=low, size=size))
    table = Table(
        title="Operations of one image: as LiFT's paper counts them, and multiply-accumulates of the whole model",
        columns=("parameters, M", _LIFTS_COUNT, "10^9 MACs"),
    )
    # Where no method of LiFT's paper is timed, that it has nothing of these says nothing.
    is_lifts = len(rows) > 1 or spec.facet == "key"
    return with_published(table, measured, _lift_published(task, spec) if config.paper and is_lifts else None)


_LIFTS_COUNT = "10^9, LiFT's count"


def _lift_published(task: Runtime, spec: FeatureSpec) -> Published:
    """LiFT's Table 5 where it has this model, size and stride: it counts the last block's keys, and LiFT as it is published."""
    is_keys = spec.facet == "key" and spec.layers == (11,) and not spec.model_args
    rows = {
        method: {str(task.size): {_LIFTS_COUNT: operations}}
        for one in LIFT_OPERATIONS
        if (one.model, one.size, one.stride) == (spec.model, task.size, spec.stride) and is_keys
        for method, operations in (("backbone", one.alone), ("lift", one.lift))
        if operations is not None and (method == "backbone" or (method in task.learned and _is_published(task, method)))
    }
    return Published(paper=LIFT, table="Table 5", of="DINO's keys", rows=rows)


def _choices(config: RuntimeConfig, task: Runtime, *, on_gpu: bool) -> dict[str, str]:
    named = [split_method(redact(text, config.options)) for text in config.methods]
    given = {
        method: " with " + " and ".join(f"{name} {json.dumps(value)}" for name, value in each.items())
        for method, each in config.given_settings.items()
    }
    learned = [f"{method} {url or 'random'}{given.get(method, '')}" for method, url in named if find_method(method).learned]
    choices = {
        "protocol": f"one random image, {config.features.precision} weights and autocast, inference mode; {config.warm_up} "
        f"passes to warm up and {config.repeat} timed, fewer where they would take more than {config.row_s:g} s; one "
        "line at a time",
        "time": "mean, as published, and median; the backbone's pass included. ViT-Up with its own adapted backbone, and "
        "without the plain one",
        "memory": "the most that torch's allocator holds, weights of that line included"
        if on_gpu
        else "the process's resident memory at its highest in one pass, interpreter and torch included: not Table 9's measure",
        "weights": ", ".join([f"backbone {config.public()['weights']}", *learned]),
        "parameters": "of the backbone in the first line, of what is added to it in the others",
        "operations": "MACs by torch's FlopCounterMode: of what ran, in the first table; LiFT's count leaves attention products "
        "out, charges transposed convolutions fourfold and, for facets, the last block's qkv twice",
    }
    released = [f"{name} {count / 1e6:.2f} M" for name, count in RELEASED_PARAMETERS.items() if name in task.learned]
    if config.paper and released:
        choices["parameters"] += f"; of released networks, for 384 channels: {', '.join(released)}"
    if config.paper and not on_gpu:
        choices["published"] = "Table 9 is of a GPU: not shown beside times of a CPU"
    if task.left_out:
        choices["left out"] = "; ".join(f"{each.first} ({each.reason})" for each in task.left_out)
    return choices


def plot(task: Runtime, found: Mapping[str, Timing]) -> bytes:
    """Time against the grid's side, a curve for each method, PNG."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for case in task.cases[1:]:
        name = case.name.replace(case.row.name, case.row.method)
        curves.setdefault(name, []).append((case.row.grid[0], found[case.name].ms))
    grids = sorted({side for curve in curves.values() for side, _ in curve})
    with styled():
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.set(xscale="log", yscale="log", xlabel="side of the grid", ylabel="ms for one image, backbone included")
        for name, curve in curves.items():
            axes.plot(*zip(*sorted(curve), strict=True), marker="o", markersize=3, label=name)
        alone = found[task.cases[0].name].ms
        axes.axhline(alone, color="grey", linewidth=0.8, linestyle="--", label="backbone alone")
        axes.set_xticks(grids, [str(side) for side in grids])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        return png_of(figure)
