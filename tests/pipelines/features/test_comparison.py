"""Which lines of a table are compared, and which are averaged, as --against and --means have them."""

import re
from collections.abc import Sequence

import pytest

from pipelines.config import ConfigError
from pipelines.features.comparison import Comparison, called_rows
from pipelines.features.rows import Row


def row(name: str, method: str, side: int, level: str | None = None) -> Row:
    return Row(name=name, method=method, level=level, grid=(side, side), stride=16)


ROWS = (
    row("low-res", "backbone", 4, "x1"),
    row("bilinear x2", "bilinear", 8),
    row("bilinear x4", "bilinear", 16),
    row("lift a", "lift", 8, "a"),
    row("lift b", "lift", 16, "b"),
    row("lift x2, finetuned", "lift", 8),
)


def compared(against: str = "", means: Sequence[str] = (), rows: Sequence[Row] = ROWS) -> dict[str, str]:
    return dict(Comparison.parse(against, means).of_rows(rows).against)


def test_lines_are_compared_with_the_bilinear_one_of_their_grid():
    of_grid = {"low-res": "bilinear x2", "lift a": "bilinear x2", "lift b": "bilinear x4", "lift x2, finetuned": "bilinear x2"}

    assert compared() == of_grid
    assert compared(means=["m=b,a", "n=low-res,a"]) == {**of_grid, "m": "bilinear x4", "n": "bilinear x2"}
    assert compared(rows=[ROWS[0], ROWS[3]]) == {}  # there is none


@pytest.mark.parametrize("called", ["a", "lift a"])
def test_all_others_are_compared_with_the_line_that_is_asked_for(called):
    others = {each.name for each in ROWS} - {"lift a"}

    assert compared(called) == dict.fromkeys(others, "lift a")
    assert compared("m", ["m=a,b"]) == dict.fromkeys({*others, "lift a"}, "m")
    assert compared(called, rows=ROWS[:3]) == {}  # a size at which it isn't


def test_means_are_of_lines_by_any_of_their_names():
    asked = Comparison.parse("", ["m=a, lift b", "n=lift x2 finetuned,low-res"])

    asked.require(called_rows(ROWS))
    assert asked.of_rows(ROWS).means == {"m": ("lift a", "lift b"), "n": ("lift x2, finetuned", "low-res")}
    assert asked.of_rows(ROWS[:4]).means == {}
    assert asked.notes == ("m is the mean of a, lift b", "n is the mean of lift x2 finetuned, low-res")


@pytest.mark.parametrize("text", ["m", "=a,b", "m=", "m=a", "m=a,a", "m=a,", "m=a,,b"])
def test_a_mean_is_of_two_lines_at_least(text):
    with pytest.raises(ConfigError, match=re.escape(f"--means {text}: use NAME=LINE,LINE,...")):
        Comparison.parse("", [text])


@pytest.mark.parametrize(
    ("against", "means", "message"),
    [
        ("c", (), "--against c: no line is called so; there are low-res, lift a, lift b, bilinear x2, "),
        ("", ("m=a,c",), "--means m=a,c: no line is called c; there are low-res, lift a, "),
        ("", ("a=a,b",), "--means a=...: a line is called a already; give another name"),
    ],
)
def test_lines_that_there_are_not_are_refused(against, means, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Comparison.parse(against, means).require(called_rows(ROWS))


def test_a_name_is_of_one_mean():
    with pytest.raises(ConfigError, match=re.escape("--means m=b,c: m is the mean of a, b already")):
        Comparison.parse("", ["m=a,b", "m=b,c"])
