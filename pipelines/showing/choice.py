"""What a picture shows: rows and maps of a store, or of several stores of the same features, where methods are side by side.

Stores go together where their maps are of one backbone and of images that are placed alike; their rows where they are of one
image.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipelines.config import ConfigError
from storage.paths import StorageError, UnknownName
from storage.spec import FeatureSpec, Level, Use
from storage.spread import spread
from storage.store import FeatureStore
from storage.words import printable_name


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A column of a picture: a map of a store, of the images that the picture shows."""

    store: FeatureStore
    level: Level
    rows: np.ndarray
    "of the store; those of other columns are of the same images"
    title: str

    @property
    def grid(self) -> tuple[int, int]:
        assert self.level.grid
        return self.level.grid

    def maps(self) -> np.ndarray:
        """[rows, h, w, C]. Raises `MissingRows`."""
        return self.store.read(self.rows, self.level.name)


# --- of one store -----------------------------------------------------------------------------------------------------


def pick_rows(store: FeatureStore, count: int) -> np.ndarray:
    """At most `count` rows that have features, spread over the tasks that are done; the same for the same tasks."""
    done = sorted(store.ledger.done())
    blocks = [done[i] for i in spread(len(done), count)]
    rows: list[int] = []
    for _, table in store.ledger.records(blocks):
        rows += [row for row, status in zip(*table.select(["row", "status"]).to_pydict().values(), strict=True) if status == "ok"]
    if not rows:
        raise StorageError(f"{store.folder.displayed} has no features to show yet: {len(done)} of its tasks are done")
    return np.array(rows)[spread(len(rows), count)]


def named_rows(store: FeatureStore, names: Sequence[str]) -> np.ndarray:
    """Row numbers of keys or numbers; a key that looks like a number wins."""
    found = store.index.find(names)
    known = [found[name] if name in found else int(name) if name.lstrip("-").isdigit() else name for name in names]
    return np.concatenate([store.rows(name) for name in known])


def dense_levels(store: FeatureStore, names: Sequence[str] = ()) -> list[Level]:
    """The levels called `names`, or all, that are maps; coarse ones first. Raises `KeyError`, and `StorageError` if none is."""
    levels = [store.level(name) for name in names] if names else list(store.spec.levels)
    dense = sorted((level for level in levels if level.grid), key=lambda level: level.grid or ())
    if not dense:
        raise StorageError(f"{store.folder.displayed} has no maps among {', '.join(level.name for level in levels)}")
    return dense


def base_level(store: FeatureStore) -> Level:
    """The backbone's own map, which others were made from; else the coarsest."""
    levels = dense_levels(store)
    return next((level for level in levels if level.method == "backbone"), levels[0])


# --- of several -------------------------------------------------------------------------------------------------------


def require_alike(stores: Sequence[FeatureStore]) -> None:
    """Raise `ConfigError` where stores aren't of one backbone's features, or place images otherwise, or one is there twice."""
    first, *others = stores
    if again := [url for url, count in Counter(store.folder.url.rstrip("/") for store in stores).items() if count > 1]:
        raise ConfigError(f"{again[0]} is there twice; give each store once")
    for other in others:
        pair = f"{first.folder.displayed} and {other.folder.displayed}"
        if different := first.spec.differences(other.spec, FeatureSpec.names(Use.LEARNED, Use.LEARNED_LATER)):
            raise ConfigError(f"{pair} hold other features, which don't compare:\n{different.text('first', 'second')}")
        if different := first.spec.differences(other.spec, FeatureSpec.names(Use.PLACED)):
            raise ConfigError(
                f"{pair} place images otherwise, so that their cells don't match:\n{different.text('first', 'second')}"
            )


def same_images(a: FeatureStore, b: FeatureStore, rows_a: np.ndarray, rows_b: np.ndarray) -> np.ndarray:
    """Which rows are of one image, bool [n], by what both ledgers say: the bytes' digest, else the size in pixels."""
    if not len(rows_a):
        return np.zeros(0, bool)
    columns = ["digest", "width", "height"]
    pairs = zip(*(store.records(rows, columns).to_pylist() for store, rows in ((a, rows_a), (b, rows_b))), strict=True)
    alike = []
    for one, other in pairs:
        told = ["digest"] if one["digest"] and other["digest"] else ["width", "height"]
        alike.append(all(one[name] == other[name] for name in told))
    return np.array(alike)


def rows_in(other: FeatureStore, store: FeatureStore, rows: np.ndarray) -> np.ndarray:
    """The rows of `other` with the keys that `rows` of `store` have; -1 where it has none."""
    if store.layout.index == other.layout.index:
        return rows
    keys = store.index.take(rows, ["key"])["key"].to_pylist()
    found = other.index.find(keys)
    return np.array([found.get(key, -1) for key in keys], np.int64)


def picked_together(stores: Sequence[FeatureStore], count: int) -> list[np.ndarray]:
    """At most `count` images that all stores have features of, as rows of each. Raises `StorageError` where there is none."""
    if len(stores) == 1:
        return [pick_rows(stores[0], count)]
    smallest = min(stores, key=len)  # whose images the others have rather than the other way round
    rows = pick_rows(smallest, 16 * count)
    found = [rows_in(store, smallest, rows) for store in stores]
    there = np.all([each >= 0 for each in found], axis=0)
    found, rows = [each[there] for each in found], rows[there]
    alike = [store.valid(each) & same_images(smallest, store, rows, each) for store, each in zip(stores, found, strict=True)]
    common = np.flatnonzero(np.all(alike, axis=0))
    if not len(common):
        raise StorageError(
            f"of {there.size:,} images that {smallest.folder.displayed} has features of, none is in all of "
            f"{', '.join(store.folder.displayed for store in stores)}, by its key and its bytes"
        )
    chosen = common[spread(len(common), count)]
    return [each[chosen] for each in found]


def named_together(stores: Sequence[FeatureStore], names: Sequence[str]) -> list[np.ndarray]:
    """The images that are called so in the first store, as rows of each. Raises `UnknownName`, also for another image of that
    name."""
    first, *others = stores
    rows = named_rows(first, names)
    found = [rows]
    for other in others:
        there = rows_in(other, first, rows)
        if len(lacking := np.flatnonzero(there < 0)):
            raise UnknownName(f"{other.folder.displayed} has no sample {names[lacking[0]]!r}, which {first.folder.displayed} has")
        if len(strange := np.flatnonzero(first.valid(rows) & other.valid(there) & ~same_images(first, other, rows, there))):
            raise UnknownName(
                f"{other.folder.displayed} has another image called {names[strange[0]]!r} than {first.folder.displayed}"
            )
        found.append(there)
    return found


def columns_of(stores: Sequence[FeatureStore], rows: Sequence[np.ndarray], names: Sequence[str] = ()) -> list[Shown]:
    """The maps of all stores called `names`, or all maps, coarse ones first; those of one method, grid and weights once.

    Raises `KeyError` for a name that no store has, and `StorageError` where none is a map.
    """
    for name in names:
        if not any(name in store.levels for store in stores):
            stores[0].level(name)
    found: dict[str, tuple[FeatureStore, np.ndarray, Level]] = {}
    for store, each in zip(stores, rows, strict=True):
        had = [name for name in names if name in store.levels]
        for level in dense_levels(store, had) if had or not names else []:
            found.setdefault(_numbers(store, level), (store, each, level))
    columns = sorted(found.values(), key=lambda column: column[2].grid or ())
    titles = [f"{level.name}  {level.method}\n{cells(level)}" for _, _, level in columns]
    often, called = Counter(titles), dict(zip([id(store) for store in stores], place_names(stores), strict=True))
    return [
        Shown(store=store, level=level, rows=each, title=title if often[title] == 1 else f"{title}\n{called[id(store)]}")
        for (store, each, level), title in zip(columns, titles, strict=True)
    ]


def _numbers(store: FeatureStore, level: Level) -> str:
    """All that makes a level's numbers, whatever it is called."""
    spec = replace(store.spec, levels=(replace(level, name="x1", scale=""),))
    return json.dumps(spec.numbers(["x1"]), sort_keys=True)


def place_names(stores: Sequence[FeatureStore]) -> list[str]:
    """Of stores, as pictures have them: the last part of its place, or all of it where others end so, too."""
    short = [store.folder.displayed.rstrip("/").rsplit("/", 1)[-1] for store in stores]
    often = Counter(short)
    names = [name if often[name] == 1 else store.folder.displayed for name, store in zip(short, stores, strict=True)]
    return [shortened(name, 30) for name in names]


def cells(level: Level) -> str:
    """How many a map has, in words."""
    assert level.grid
    return f"{level.grid[0]} x {level.grid[1]} cells"


def shortened(name: str, length: int) -> str:
    """A name for a picture, its end where it is longer than that."""
    name = printable_name(name)
    return name if len(name) <= length else f"...{name[3 - length :]}"
