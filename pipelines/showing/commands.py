"""What `jobs/show.py` shows: the settings of each command, and the lines that it prints."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from pipelines.config import parse_options
from pipelines.showing.compare import compare as compare_stores
from pipelines.showing.compare import comparison_lines
from pipelines.showing.report import write_report
from pipelines.showing.status import failure_lines, read_status, row_lines, status_lines
from pipelines.showing.status import failures as read_failures
from pipelines.showing.views import pick_rows, similar_panel, view_panel
from pipelines.training.watch import training_lines
from storage.export import export_vectors
from storage.paths import Folder, StorageOptions
from storage.store import FeatureStore


@dataclass(frozen=True, kw_only=True)
class Show:
    """Which store, and how to reach it."""

    store: tyro.conf.Positional[str]
    """The store's path or fsspec URL."""
    storage_options: str = ""
    """JSON for the filesystem, as for jobs/extract.py; also used to read the photographs."""

    @property
    def options(self) -> StorageOptions:
        return parse_options(self.storage_options)

    def open(self, url: str = "") -> FeatureStore:
        """The store, or another one reached in the same way."""
        return FeatureStore.open(url or self.store, self.options)


@dataclass(frozen=True, kw_only=True)
class Status(Show):
    """Counts, rates, stage times, and the bottleneck in words."""

    json: bool = False
    """All of it as JSON."""


@dataclass(frozen=True, kw_only=True)
class Failures(Show):
    """Failed images by reason."""

    json: bool = False
    """Every failed row, a JSON object a line."""


@dataclass(frozen=True, kw_only=True)
class Rows(Show):
    """What a row is, how large, and the first rows."""

    first: int = 10
    """How many rows to list."""


@dataclass(frozen=True, kw_only=True)
class View(Show):
    """Photographs beside the PCA colours of every level."""

    out: str = "view.png"
    """The picture to write."""
    rows: tuple[str, ...] = ()
    """Keys or row numbers; default: some, spread over the store."""
    count: int = 6
    """How many, where --rows names none."""
    levels: tuple[str, ...] = ()
    """Levels to show; default: all maps."""
    foreground: bool = False
    """Only the objects: cells above Otsu's threshold on the first component, coloured by a PCA of their own."""
    colours_from: str = ""
    """Another store whose saved colours to use, so that pictures of both compare."""
    refit: bool = False
    """Fit and save colours anew."""


@dataclass(frozen=True, kw_only=True)
class Similar(Show):
    """Cosine similarity of one pixel with its own and other images, per level, beside the bilinear map."""

    key: str
    """Key or row number of the image."""
    point: tuple[float, float] | None = None
    """x y in pixels of the original photograph; default: the middle."""
    to: tuple[str, ...] = ()
    """Keys or row numbers of other images; default: three, spread over the store."""
    levels: tuple[str, ...] = ()
    """Levels to show; default: all maps."""
    out: str = "similar.png"
    """The picture to write."""


@dataclass(frozen=True, kw_only=True)
class Compare(Show):
    """Cosine per row between two stores, or two levels of one."""

    other: tyro.conf.Positional[str]
    """The second store; may be the first one again."""
    level: str = "x1"
    """Level of the first store."""
    other_level: str = ""
    """Level of the second; default: of the same name."""
    limit: int | None = None
    """Only the first N rows."""
    worst: int = 5
    """How many of the least similar rows to list."""


@dataclass(frozen=True, kw_only=True)
class Export(Show):
    """One vector per image, with key, source and carried columns, as Parquet."""

    out: str
    """The folder to write, a path or fsspec URL; must hold no Parquet yet."""
    level: str = "pooled"
    """Vectors of this level; a map is averaged over its cells."""


@dataclass(frozen=True, kw_only=True)
class Report(Show):
    """One self-contained HTML page: settings, counts, failures, times, sizes, pictures."""

    out: str = "report.html"
    """The page to write."""
    count: int = 6
    """Photographs to show."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What training runs measured on their held-out images, side by side."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """The runs' folders, paths or fsspec URLs."""
    storage_options: str = ""
    """JSON for the filesystem, as for jobs/extract.py."""


def status(config: Status) -> Iterator[str]:
    found = read_status(config.open())
    if config.json:
        yield json.dumps(found.to_json(), indent=1)
    else:
        yield from status_lines(found)


def failures(config: Failures) -> Iterator[str]:
    store = config.open()
    if config.json:
        yield from map(json.dumps, store.failures().to_pylist())
    else:
        yield from failure_lines(read_failures(store), len(store))


def rows(config: Rows) -> Iterator[str]:
    store = config.open()
    yield from row_lines(store, read_status(store), config.first)


def view(config: View) -> Iterator[str]:
    store = config.open()
    picture = view_panel(
        store,
        named_rows(store, config.rows, config.count),
        levels=config.levels,
        foreground=config.foreground,
        refit=config.refit,
        colours_from=config.open(config.colours_from) if config.colours_from else None,
        storage_options=config.options,
    )
    yield _saved(picture.draw(), config.out)


def similar(config: Similar) -> Iterator[str]:
    store = config.open()
    key = int(named_rows(store, [config.key], 1)[0])
    others = named_rows(store, config.to, 4)
    if not config.to:
        others = others[others != key][:3]
    picture = similar_panel(
        store, key, config.point, others.tolist(), levels=config.levels, storage_options=config.options
    )
    yield _saved(picture.draw(), config.out)


def compare(config: Compare) -> Iterator[str]:
    a, b = config.open(), config.open(config.other)
    result = compare_stores(a, b, config.level, config.other_level or config.level, config.limit)
    yield from comparison_lines(result, config.worst)


def export(config: Export) -> Iterator[str]:
    store = config.open()
    done = export_vectors(store, config.level, config.out, config.options)
    left_out = f"; {done.left_out:,} rows without features left out" if done.left_out else ""
    yield f"{config.out}: {done.rows:,} vectors of {store.level(config.level).channels} in {done.files} files{left_out}"


def report(config: Report) -> Iterator[str]:
    size = write_report(config.open(), config.out, count=config.count, storage_options=config.options)
    yield f"{config.out}: {size / 1e6:.1f} MB, opens without a network"


def training(config: Training) -> Iterator[str]:
    yield from training_lines([Folder(url, parse_options(config.storage_options)) for url in config.runs])


def named_rows(store: FeatureStore, names: Sequence[str], count: int) -> np.ndarray:
    """Row numbers of keys or numbers; a key that looks like a number wins. Without any, `count` rows spread over the store."""
    if not names:
        return pick_rows(store, count)
    found = store.index.find(names)
    known = [found[name] if name in found else int(name) if name.lstrip("-").isdigit() else name for name in names]
    return np.concatenate([store.rows(name) for name in known])


def _saved(picture: Image.Image, out: str) -> str:
    Path(out).absolute().parent.mkdir(parents=True, exist_ok=True)
    picture.save(out)
    return out
