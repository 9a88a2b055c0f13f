"""Tables of reports, papers' numbers in them, and the items that they are of."""

from dataclasses import replace

import pytest

from operators.metrics.bootstrap import Estimate, Interval
from pipelines.evaluation.run import set_aside
from pipelines.features.rows import Row
from pipelines.published import Paper, Published
from pipelines.results import Items, LeftOut, Line, Measured, Table, Taken, mean_lines, table_lines, with_published
from storage.words import counted


def test_a_table_is_aligned_as_text_and_as_markdown():
    head = ["name", "unit", "ms", "by round", "note"]
    rows = [["a", "s", "12.5", "3 4", "as published"], ["longer", "s", "-3", "", "2nd"], ["c", "", "nan", "**9.1** 2", ""]]

    assert list(table_lines(head, rows)) == [
        "",
        "| name   | unit |   ms |  by round | note         |",
        "| ------ | ---- | ---: | --------: | ------------ |",
        "| a      | s    | 12.5 |       3 4 | as published |",
        "| longer | s    |   -3 |           | 2nd          |",
        "| c      |      |  nan | **9.1** 2 |              |",
    ]
    assert list(table_lines(["n", "n"], [["1", "2"]], left=2))[-2:] == ["| --- | --- |", "| 1   | 2   |"]
    assert list(table_lines(head[:3], [])) == ["", "| name | unit |  ms |", "| ---- | ---: | --: |"]


# --- papers' numbers --------------------------------------------------------------------------------------------------

NUMBERS = Published(
    paper=Paper(name="P"),
    table="T",
    rows={"backbone": {"64": {"loss": 1.0, "score": 2.0}}, "lift": {"64": {"score": 3.0}}},
    settings={"model": "m", "limit": None},
)


def measured(method: str, factor: int, side: int = 64, **settings: object) -> Measured:
    low, grid = (Row(name="low-res", method="backbone", level="x1", grid=(n, n), stride=16) for n in (4, 4 * factor))
    row = replace(grid, name=f"{method} x{factor}", method=method)
    line = Line.of(row, (side, side), (10.0, 20.0, 30))
    return Measured(line=line, row=row, low=low, size=(side, side), settings={"model": "m", "limit": None, **settings})


def test_papers_numbers_are_joined_by_the_names_of_columns():
    table = Table(title="", columns=("score", "loss", "items"))

    found = with_published(table, [measured("backbone", 1), measured("lift", 2)], NUMBERS)

    assert [line.values for line in found.lines if line.published] == [(2.0, 1.0, None), (3.0, None, None)]
    assert found.notes == ()


@pytest.mark.parametrize("other", [measured("lift", 4), measured("lift", 2, side=32), measured("jbu", 2)])
def test_a_line_of_another_grid_size_or_method_has_no_published_one(other):
    found = with_published(Table(title="", columns=("score",)), [other], NUMBERS)

    assert found.lines == (other.line,)
    assert found.notes == (f"P T has nothing of {other.line.features} at {other.line.input_px} px",)


def test_a_line_of_other_settings_says_so_and_in_what():
    table = Table(title="title", columns=("score", "loss", "items"))

    found = with_published(table, [measured("lift", 2, model="n", limit=5)], NUMBERS)

    assert found.lines[1].features == "P T, of other settings"
    assert found.notes == ("P T is of other settings than this run: model published 'm', here 'n'; limit published None, here 5",)
    assert f"\n\n- {found.notes[0]}" in found.markdown()


# --- over how many items ----------------------------------------------------------------------------------------------


def test_items_are_said_in_words_and_as_numbers():
    items = Items(
        scored={"pairs": 1200, "key points": 3},
        left_out=(LeftOut(reason="why", count=2, first="a"), LeftOut(reason="also", count=1, first="b")),
        taken=(Taken(how="the first", count=1203, of=None, unit="pairs", flag="--limit"),),
    )

    assert str(items) == (
        "over 1,200 pairs, 3 key points; the first 1,203 pairs (--limit); 2 left out: why (the first: a); 1 left out: also "
        "(the first: b)"
    )
    assert items.to_json()["left_out_count"] == 3
    with pytest.raises(ValueError, match="over how many items"):
        Items(scored={})


def test_items_of_one_name_are_set_aside_once():
    records = [{"n": 1, "points": 0}, {"n": 2, "points": 4}, {"n": 1, "points": 0}]

    kept, left_out = set_aside(records, lambda each: not each["points"], "no points", lambda each: str(each["n"]))

    assert (kept, left_out) == ([records[1]], (LeftOut(reason="no points", count=1, first="1"),))


def test_names_in_cells_stay_in_their_cells():
    found = list(table_lines(["name"], [["two\nlines\x1b[2J"], ["a|b"]]))

    assert found[-2:] == [r"| two\nlines\x1b[2J |", r"| a\|b              |"]


# --- how far figures are known ----------------------------------------------------------------------------------------


def test_tables_have_intervals_and_say_where_no_difference_is_shown():
    def estimate(low: float, high: float, against: str = "", difference: float | None = None) -> Estimate:
        apart = None if difference is None else Interval(low=difference - 1, high=difference + 1)
        return Estimate(interval=Interval(low=low, high=high), against=against, difference=difference, difference_interval=apart)

    bilinear, lift = measured("bilinear", 2).line, measured("lift", 2).line
    lines = (
        bilinear.known([estimate(9, 11), estimate(18.125, 22)]),
        lift.known([estimate(12, 14, "bilinear x2", 3.0), estimate(19, 23, "bilinear x2", 0.5)]),
    )

    text = Table(title="", columns=("score", "loss", "items"), lines=lines, drawn="30 pairs").markdown()

    assert lines[0].estimates[2] is None  # a count
    assert "95 % intervals: 2,000 draws from the 30 pairs, seed 0" in text
    assert "| bilinear x2 | 64       |  [9.00, 11.00] | [18.12, 22.00] |" in text
    assert "| lift x2  | bilinear x2 | 64       | +3.00 [2.00, 4.00] | +0.50 [-0.50, 1.50], no difference shown |" in text
    assert "95 %" not in Table(title="", columns=("score", "loss", "items"), lines=(bilinear,)).markdown()


def test_a_mean_of_lines_has_their_numbers_mean_and_what_else_they_share():
    first, second, third = (measured("lift", 2).line for _ in range(3))
    lines = [
        replace(first, features="a", values=(1.0, "0.10", 7, "deap", None)),
        replace(second, features="b", values=(2.0, "0.25", 7, "linear", None)),
        replace(third, features="c", grid="1x1", values=(6.0, "0.001", 8, "deap", None)),
    ]
    known = Estimate(interval=Interval(low=1, high=2))

    pair, every = mean_lines(lines, {"pair": ("a", "b"), "all": ("a", "b", "c")}, {"pair": (known,)})

    assert (pair.features, pair.grid, pair.values) == ("pair", first.grid, (1.5, "0.17", 7, None, None))
    assert pair.estimates == (known, None, None, None, None)
    assert (every.grid, every.values) == ("", (3.0, "0.117", None, None, None))


def test_a_table_of_one_item_says_that_nothing_can_be_drawn_from_it():
    line = measured("bilinear", 2).line.known([Estimate(interval=None), Estimate(interval=None)])

    text = Table(title="", columns=("score", "loss", "items"), lines=(line,), drawn=counted(1, "batches")).markdown()

    assert text.endswith("\nNo intervals: too few to draw from (1 batch)")
    assert str(Items(scored={"clips": 1, "objects": 2_000})) == "over 1 clip, 2,000 objects"
