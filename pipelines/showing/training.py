"""Training runs beside each other: what each measured on its held-out images."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipelines.config import ConfigError
from pipelines.results import table_lines
from pipelines.training.watch import PLAIN, Validations
from storage.differences import differences
from storage.documents import JsonObject, JsonValue, as_object
from storage.paths import Folder
from storage.runs import read_run

_MEASURE = (
    *("val_rows", "max_image_pixels", "backbone", "features", "dataset", "task", "val_split", "label_frame", "depth_scale"),
    *("size", "side", "placement", "geometry", "interpolation", "crop", "drawing", "normalise"),
    *("loss", "lower", "teacher_sizes", "l2_weight", "cosine_weight", "relational_weight", "shrink", "antialias"),
    *("jitters", "downsampler", "projected", "channel_norm", "crf_weight", "tv_weight"),
    *("depth_loss", "gradient_loss", "outputs", "large_area", "many"),
)
"""What numbers of held-out images depend on beside the network, of a run's identity; and all that begins with `held_out`."""


@dataclass(frozen=True, kw_only=True)
class TrainingTable:
    """What runs measured on their held-out images: before they began, at their best checkpoints, last; and bilinear enlargement
    of the same images, for each run its own."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]
    "over what, and which runs weren't judged on the same images by the same measure"


def training_lines(folders: Sequence[Folder]) -> Iterator[str]:
    """`training_table` as Markdown."""
    found = training_table(folders)
    _, *lines = table_lines(found.head, found.rows)
    yield from lines
    yield ""
    yield from (f"- {note}" for note in found.notes)


def training_table(folders: Sequence[Folder]) -> TrainingTable:
    """Raises `ConfigError` for a folder without metrics."""
    rows: list[tuple[str, int | None, Mapping[str, float]]] = []
    judged: dict[str, dict[str, JsonValue]] = {}
    notes: list[str] = []
    for folder, name in zip(folders, run_names(folders), strict=True):
        run, found = read_run(folder), Validations.read(folder)
        if run is None or found is None:
            raise ConfigError(f"{folder.displayed} is no training run, or has not validated yet")
        judged[name] = _measure(as_object(run["identity"], "identity"))
        plain = {each.removesuffix(PLAIN): value for each, value in found.last.scores.items() if each.endswith(PLAIN)}
        if plain:
            rows.append((f"{name}, bilinear", None, plain))
        if found.untrained and found.last.step:
            rows.append((f"{name}, untrained", 0, found.untrained.scores))
        if found.best and found.best.step != found.last.step:
            rows.append((f"{name}, best", found.best.step, found.best.scores))
        last = f"{name}, last and best" if found.best == found.last else f"{name}, last"
        rows.append((last, found.last.step, found.last.scores))
        if found.last.over:
            notes.append(f"{name}, last: {found.last.over}.")
    names = dict.fromkeys(name for *_, values in rows for name in values if not name.endswith(PLAIN))
    cells = [
        [run, "" if step is None else f"{step:,}", *(f"{values[name]:.4f}" if name in values else "" for name in names)]
        for run, step, values in rows
    ]
    notes.append("best: the checkpoint of the smallest val_loss, among those that were validated.")
    first, *others = judged
    for name in others:
        if ("task" in judged[first]) != ("task" in judged[name]):
            notes.append(f"{name} is trained for something else than {first}, so that their numbers don't compare.")
        elif different := differences(judged[first], judged[name]):
            notes.append(
                f"{name} wasn't judged as {first} was, so that their numbers don't compare: {different.line(first, name)}."
            )
    return TrainingTable(head=["run", "step", *names], rows=cells, notes=notes)


def _measure(identity: JsonObject) -> dict[str, JsonValue]:
    return {name: value for name, value in identity.items() if name in _MEASURE or name.startswith("held_out")}


def run_names(folders: Sequence[Folder]) -> list[str]:
    """Of runs, as tables have them: the folder's own, or all of its place where others are called so, too."""
    short = [folder.url.rstrip("/").rsplit("/", 1)[-1] for folder in folders]
    often = Counter(short)
    return [name if often[name] == 1 else folder.displayed for name, folder in zip(short, folders, strict=True)]
