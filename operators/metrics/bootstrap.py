"""Intervals of scores, and of differences between scores, by a bootstrap over the items that a score was taken from.

Most scores are functions of sums over items: shares of right key points, IoU, means. Items (pairs, clips, images) are drawn
with replacement, as many as there are, and their sums are added again; so a figure of the whole data set is resampled by items,
not by pixels or points, which an item's neighbours share. COCO's average precision is no such function, and is told how often
a draw has each item (operators/metrics/coco_draws.py). All rows of a table are taken from the same draws, which makes the
difference of two rows a paired one. Intervals are percentiles of the draws (Efron and Tibshirani, 1993, chapter 13).

Shapes: n items, k sums, m figures, B draws.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np

RESAMPLES = 2_000
"""Draws: the standard error of an interval's end is then 1.5 % of its width, where draws are normal."""

SEED = 0

_AT_ONCE = 250
"""Draws whose counts [B, n] are in memory at once."""

_DIGITS = 6
"""Of intervals and differences: sums in another order differ behind them."""

Figures: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""Figures [B, m] of sums [B, k]; NaN where the sums are of nothing."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The middle 95 % of the draws."""

    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        return self.low <= 0 <= self.high


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """How far a figure is known; intervals are None where there are too few items to tell."""

    interval: Interval | None
    against: str = ""
    "the row that the difference is to; empty: to none"
    difference: float | None = None
    "this figure less that row's"
    difference_interval: Interval | None = None
    "of the difference, both rows being of the same items in each draw"


Drawn: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""Figures [B, m] of draws which have each of the n items so many times, float64 [n, B]; NaN where they are of nothing."""


def estimates(
    sums: Mapping[str, np.ndarray],
    figures: Figures,
    against: Mapping[str, str],
    means: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> dict[str, tuple[Estimate, ...]]:
    """Of each row's `sums` [n, k], which are of the same items in the same order, an estimate of each of its figures.

    `against` names the row that another one is compared with; `means` has further rows, whose figures are the means of those of
    several rows. The same sums give the same digits. Raises `ValueError` where rows are of other numbers of items.
    """
    counts = {len(each) for each in sums.values()}
    if len(counts) > 1:
        raise ValueError(f"rows are of {sorted(counts)} items; compare rows of the same ones")
    return drawn_estimates({name: of_sums(each, figures) for name, each in sums.items()}, max(counts, default=0), against, means)


def drawn_estimates(
    rows: Mapping[str, Drawn], items: int, against: Mapping[str, str], means: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> dict[str, tuple[Estimate, ...]]:
    """As `estimates`, of figures that are taken from draws of the items in another way than by sums."""
    whole = {name: figures(np.ones((items, 1)))[0] for name, figures in rows.items()}
    # All draws of one item are alike, which says nothing of how far a figure is known.
    drawn = _drawn(rows, items) if items > 1 else {name: np.full((1, len(each)), np.nan) for name, each in whole.items()}
    for name, members in means.items():
        whole[name], drawn[name] = (np.mean([each[member] for member in members], axis=0) for each in (whole, drawn))
    found = {}
    for name, values in whole.items():
        other = against.get(name, "")
        differences = [None] * len(values) if not other else [_rounded(value) for value in values - whole[other]]
        apart = [None] * len(values) if not other else _intervals(drawn[name] - drawn[other])
        of_figures = zip(_intervals(drawn[name]), differences, apart, strict=True)
        found[name] = tuple(
            Estimate(interval=own, against=other, difference=difference, difference_interval=between)
            for own, difference, between in of_figures
        )
    return found


def of_sums(sums_nk: np.ndarray, figures: Figures) -> Drawn:
    """Figures that are functions of what items add to sums."""
    from scipy.sparse import csr_array  # most of an item's sums are 0: other categories' and classes'

    # A sparse product adds in one order, whatever the machine's threads.
    by_sum = csr_array(sums_nk.T)
    return lambda times_nB: figures((by_sum @ times_nB).T)


def _drawn(rows: Mapping[str, Drawn], items: int) -> dict[str, np.ndarray]:
    """Figures [B, m] of every draw, by row."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in rows}
    for times_nB in _draws(items):
        for name, figures in rows.items():
            parts[name].append(figures(times_nB))
    return {name: np.concatenate(each) for name, each in parts.items()}


def _draws(items: int) -> Iterator[np.ndarray]:
    """How often each draw has each item, float64 [n, B]."""
    random = np.random.default_rng(SEED)
    for start in range(0, RESAMPLES, _AT_ONCE):
        count = min(_AT_ONCE, RESAMPLES - start)
        chosen = random.integers(0, max(1, items), (count, items)) + np.arange(count)[:, None] * items
        yield np.bincount(chosen.ravel(), minlength=count * items).reshape(count, items).T.astype(np.float64)


def _intervals(drawn_Bm: np.ndarray) -> list[Interval | None]:
    """Of each figure; None where one draw in two has none."""
    return [_interval(each[~np.isnan(each)], len(each)) for each in drawn_Bm.T]


def _interval(known: np.ndarray, draws: int) -> Interval | None:
    if len(known) <= draws / 2:
        return None
    low, high = (_rounded(value) for value in np.percentile(known, [2.5, 97.5]))
    return Interval(low=low, high=high)


def _rounded(value: float) -> float:
    return round(float(value), _DIGITS) + 0.0  # never -0.0
