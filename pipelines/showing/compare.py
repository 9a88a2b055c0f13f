"""Two stores, or two levels, held against each other: cosine per row, and the rows that differ most."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipelines.config import ConfigError
from pipelines.showing.choice import rows_in, same_images
from pipelines.showing.views import enlarged
from storage.differences import Differences
from storage.samples import ROW_GROUP_ROWS
from storage.spec import Level
from storage.store import FeatureStore
from storage.words import printable_name


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Cosines of the rows that both stores have features of, in the order of the first one."""

    keys: list[str]
    cosines: np.ndarray
    "float64 [n]: the mean over a row's cells"
    smallest: np.ndarray
    "float64 [n]: the least similar cell"
    left_out: int
    "rows of the first store that failed, or that the second one lacks"
    other_images: int
    "rows that both have under one key, of images that aren't the same"
    with_other_images: bool
    "whether those are compared, or left out"
    same_numbers: int
    "rows that are equal bit for bit"
    differing: Differences
    "what made the features of the second store otherwise than the first one's"


def compare(
    a: FeatureStore, b: FeatureStore, level_a: str, level_b: str, limit: int | None = None, *, other_images: bool = False
) -> Comparison:
    """Cosine between level `level_a` of `a` and `level_b` of `b`, row by row, matched by key.

    Keys recur (WebDataset's `000000`), so that images count, too: rows whose images aren't the same bytes, or where no digest
    tells, the same size, are left out and counted; with `other_images` they are compared and counted.
    Maps of other grids are brought to the finer one's bilinearly. Holds one block of each at a time. Raises `ConfigError` if
    the levels can't be compared, or if no image is the same.
    """
    first, second = a.level(level_a), b.level(level_b)
    _require_comparable(a, b, first, second)
    keys: list[str] = []
    cosines, smallest, left_out, others, same = [], [], 0, 0, 0
    for rows, names, other in _matched(a, b, len(a) if limit is None else min(limit, len(a))):
        values_a, there_a = a.read_present(rows, level_a)
        values_b, there_b = b.read_present(np.maximum(other, 0), level_b)
        both = np.flatnonzero(there_a & there_b & (other >= 0))
        left_out += len(rows) - len(both)
        alike = same_images(a, b, rows[both], other[both])
        others += int(np.count_nonzero(~alike))
        for i in both if other_images else both[alike]:
            same += values_a[i].shape == values_b[i].shape and bool((values_a[i] == values_b[i]).all())
            cells = _cosines(*_on_one_grid(first, second, values_a[i], values_b[i]))
            keys.append(names[i])
            cosines.append(cells.mean())
            smallest.append(cells.min())
    if others and not keys:
        raise ConfigError(
            f"{a.folder.displayed} and {b.folder.displayed} are of other images: {others:,} rows have a key in common, and none "
            "of them is of the same bytes. Copies that were encoded anew are compared with --other-images"
        )
    return Comparison(
        keys=keys,
        cosines=np.array(cosines),
        smallest=np.array(smallest),
        left_out=left_out,
        other_images=others,
        with_other_images=other_images,
        same_numbers=same,
        differing=a.spec.differences(b.spec, set(a.spec.to_json()) - {"levels"}),
    )


def _matched(a: FeatureStore, b: FeatureStore, count: int) -> Iterator[tuple[np.ndarray, list[str], np.ndarray]]:
    """Rows of `a` a block at a time, their keys, and their rows in `b`, -1 where it has none."""
    for first in range(0, count, ROW_GROUP_ROWS):
        group = np.arange(first, min(first + ROW_GROUP_ROWS, count))
        names = a.index.take(group, ["key"])["key"].to_pylist()
        other = rows_in(b, a, group)
        for start in range(0, len(group), a.layout.block_rows):
            part = slice(start, start + a.layout.block_rows)
            yield group[part], names[part], other[part]


def _require_comparable(a: FeatureStore, b: FeatureStore, first: Level, second: Level) -> None:
    places = f"{first.name} of {a.folder.displayed} and {second.name} of {b.folder.displayed}"
    if first.channels != second.channels:
        raise ConfigError(f"{places} have {first.channels} and {second.channels} channels: no cosine between them")
    if (first.grid is None) != (second.grid is None):
        raise ConfigError(f"{places}: one is a map, the other a vector per image")
    if first.grid is None:
        return
    for name in ("geometry", "crop_pct", "input_size"):
        if getattr(a.spec, name) != getattr(b.spec, name):
            raise ConfigError(
                f"{places} show other parts of the images ({name} {getattr(a.spec, name)} and {getattr(b.spec, name)}), "
                "so their cells don't match; compare the pooled vectors"
            )


def _on_one_grid(first: Level, second: Level, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if first.grid == second.grid or not (first.grid and second.grid):
        return a, b
    if first.grid > second.grid:
        return a, enlarged(b, second, first)
    return enlarged(a, first, second), b


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of every cell, float64 [cells]."""
    a, b = (np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in (a, b))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(axis=1) / np.maximum(lengths, 1e-30)


def comparison_lines(result: Comparison, worst: int) -> Iterator[str]:
    """The result in words, a line each."""
    n, cosines = len(result.cosines), result.cosines
    yield f"{n:,} rows compared, {result.left_out:,} left out (failed, not written, or not in both)"
    if result.other_images:
        what = "of those compared" if result.with_other_images else "more left out"
        yield f"{result.other_images:,} rows {what}: the second store has another image under their key"
    if result.differing:
        yield "the stores' features were made otherwise:"
        yield result.differing.text("first", "second")
    if not n:
        return
    low, middle = np.percentile(cosines, [1, 50])
    yield f"cosine   mean {cosines.mean():.6f}, median {middle:.6f}, 1 % below {low:.6f}, least {cosines.min():.6f}"
    yield f"equal    {result.same_numbers:,} rows bit for bit"
    yield "worst rows: cosine, least similar cell, key"
    for i in np.argsort(cosines, kind="stable")[:worst]:
        yield f"  {cosines[i]:9.6f} {result.smallest[i]:9.6f}  {printable_name(result.keys[i])}"
