"""Intervals of scores by a bootstrap over items, held against draws that are made and scored one by one."""

from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
import pytest

from operators.metrics import bootstrap, cka, correspondence, davis, navi, segmentation
from operators.metrics.bootstrap import RESAMPLES, SEED, Interval, estimates
from operators.metrics.correspondence import PairScore, Pck
from operators.metrics.davis import ObjectCurves, Summary, summarise


def shares(drawn: np.ndarray) -> np.ndarray:
    return drawn[:, :1] / drawn[:, 1:]


def test_intervals_are_those_of_draws_made_one_by_one():
    random = np.random.default_rng(3)
    sums = {name: np.stack([random.binomial(9, chance, 40), np.full(40, 9)], axis=1).astype(float) for name, chance in
            (("low", 0.4), ("high", 0.6))}  # fmt: skip

    found = estimates(sums, shares, {"high": "low"})

    again = np.random.default_rng(SEED)
    drawn = np.concatenate([again.integers(0, 40, (bootstrap._AT_ONCE, 40)) for _ in range(RESAMPLES // bootstrap._AT_ONCE)])
    scores = {name: each[drawn, 0].sum(axis=1) / each[drawn, 1].sum(axis=1) for name, each in sums.items()}
    (low,), (high,) = found["low"], found["high"]
    for interval, values in ((low.interval, scores["low"]), (high.difference_interval, scores["high"] - scores["low"])):
        assert interval is not None
        assert (interval.low, interval.high) == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=1e-6)
    assert (high.against, low.against, low.difference) == ("low", "", None)
    assert high.difference == pytest.approx((sums["high"][:, 0].sum() - sums["low"][:, 0].sum()) / 360, abs=1e-6)
    assert estimates(sums, shares, {"high": "low"}) == found  # to the digit


def test_a_difference_is_of_the_same_items():
    """Rows that differ by the same in every item differ by no chance at all, however much the items do."""
    values = np.random.default_rng(0).normal(size=30)
    sums = {name: np.stack([values + more, np.ones(30)], axis=1) for name, more in (("a", 0.0), ("b", 0.25))}

    (found,) = estimates(sums, shares, {"b": "a"})["b"]

    assert found.difference_interval == Interval(low=0.25, high=0.25)
    assert found.interval is not None
    assert found.interval.high - found.interval.low > 0.3


def test_the_mean_of_rows_is_taken_draw_by_draw():
    """Two rows that err in opposite ways have a mean that is known, though neither is."""
    values = np.random.default_rng(0).normal(size=30)
    sums = {name: np.stack([each, np.ones(30)], axis=1) for name, each in (("a", values), ("b", 0.5 - values), ("c", values))}

    found = estimates(sums, shares, {"mean": "c", "a": "mean"}, {"mean": ("a", "b")})

    (mean,), (a,), (c,) = found["mean"], found["a"], found["c"]
    assert mean.interval == Interval(low=0.25, high=0.25)
    assert mean.difference == pytest.approx(0.25 - values.mean(), abs=1e-6)
    assert a.against == "mean"
    assert a.difference_interval is not None
    assert c.interval is not None
    assert a.difference_interval.low == pytest.approx(c.interval.low - 0.25, abs=2e-6)


def test_the_interval_of_a_mean_is_as_wide_as_its_standard_error_says():
    values = np.random.default_rng(1).normal(size=400)

    (found,) = estimates({"a": np.stack([values, np.ones(400)], axis=1)}, shares, {})["a"]

    assert found.interval is not None
    assert found.interval.high - found.interval.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)


def test_what_few_items_cannot_tell_has_no_interval():
    one = {"a": np.array([[1.0, 2.0]]), "b": np.array([[2.0, 2.0]])}
    assert [each.interval for each in estimates(one, shares, {})["a"]] == [None]
    (alone,) = estimates(one, shares, {"b": "a"})["b"]
    assert (alone.difference, alone.difference_interval) == (0.5, None)
    # Of five items, the first is in two draws of three.
    rare = np.array([[1.0, 1.0], *[[0.0, 0.0]] * 4])
    with np.errstate(invalid="ignore"):
        assert estimates({"a": rare}, shares, {})["a"][0].interval == Interval(low=1.0, high=1.0)
        assert estimates({"a": np.zeros((5, 2))}, shares, {})["a"][0].interval is None


def test_rows_of_other_items_are_not_compared():
    with pytest.raises(ValueError, match=r"rows are of \[2, 3\] items"):
        estimates({"a": np.ones((2, 2)), "b": np.ones((3, 2))}, shares, {"b": "a"})


# --- sums of each score, held against the score -----------------------------------------------------------------------

RANDOM = np.random.default_rng(7)

PAIRS = [
    PairScore(category="abc"[i % 3], points=p, correct=tuple(sorted(RANDOM.integers(0, p + 1, 2).tolist())), nearest=(0, 0))
    for i, p in enumerate(RANDOM.integers(1, 9, 12).tolist())
]
CURVES = [
    ObjectCurves(clip=f"clip {i // 2}", object_id=1 + i % 2, **{each: tuple(RANDOM.random(9).tolist()) for each in "jf"})
    for i in range(9)
]
MATCHES = [
    navi.PairCounts(matches=100, found=90, by_metres=(1 + i, 5 + i, 9 + i), by_pixels=(i, 2 * i, 3 * i), degrees=11.0 * i)
    for i in range(10)
]
BATCHES = [
    cka.HsicTerms(batch=i, images=8, terms=tuple(map(tuple, (np.eye(3) + 0.1 * RANDOM.random((3, 3))).tolist())))
    for i in range(4)
]
CLASSES = [RANDOM.integers(0, [[4], [4], [99]], (3, 6)).T.tolist() for _ in range(5)]
"""Label, prediction and pixels; class 4 of five is in none."""


def of_summary(found: Summary) -> list[float]:
    j, f = found.j, found.f
    return [found.j_and_f, j.mean, f.mean, j.recall, f.recall, j.decay, f.decay]


def of_classes(images: Sequence[Sequence[Sequence[int]]]) -> list[float]:
    matrix = segmentation.matrix_of((pair for image in images for pair in image), 5)
    found = segmentation.Segmentation.of(matrix)
    foreground = matrix[1:, 1:].sum() / (matrix.sum() - matrix[0, 0])
    return [found.mean_iou, found.pixel_accuracy, found.mean_accuracy, foreground]


@pytest.mark.parametrize(
    ("sums", "figures", "score"),
    [
        (
            correspondence.category_sums(PAIRS, [1, 2] * 6),
            lambda each: correspondence.mean_of_categories(each, 2),
            Pck.of([pair for pair, times in zip(PAIRS, [1, 2] * 6, strict=True) for _ in range(times)]).mean(),
        ),
        (davis.clip_sums(CURVES), davis.figures_of_clips, of_summary(summarise(CURVES))),
        (
            navi.pair_sums(MATCHES),
            navi.recalls_of_sums,
            [value for part in asdict(navi.Recalls.of(MATCHES)).values() for value in part],
        ),
        (cka.batch_sums(BATCHES), cka.cka_of_sums, cka.cka(BATCHES).flatten().tolist()),
        (
            segmentation.pair_sums(CLASSES, 5),
            lambda each: np.stack(list(segmentation.scores_of_sums(each).values()), axis=1),
            of_classes(CLASSES),
        ),
    ],
    ids=["PCK", "J and F", "NAVI", "CKA", "IoU"],
)
def test_figures_of_all_items_sums_are_the_score(
    sums: np.ndarray, figures: Callable[[np.ndarray], np.ndarray], score: Sequence[float]
):
    assert figures(sums.sum(axis=0, keepdims=True))[0].tolist() == pytest.approx(list(score), nan_ok=True)
