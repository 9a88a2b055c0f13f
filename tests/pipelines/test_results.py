"""Tables of reports."""

from pipelines.results import table_lines


def test_a_table_has_numbers_to_the_right_or_is_padded():
    head, rows = ["name", "unit", "ms"], [["a", "s", "12.5"], ["longer", "s", "3"]]

    assert list(table_lines(head, rows, left=2)) == [
        "",
        "| name | unit | ms |",
        "|---|---|---:|",
        "| a | s | 12.5 |",
        "| longer | s | 3 |",
    ]
    assert list(table_lines(head, rows, padded=True)) == [
        "",
        "| name   | unit | ms   |",
        "| ------ | ---- | ---- |",
        "| a      | s    | 12.5 |",
        "| longer | s    | 3    |",
    ]
    assert list(table_lines(head, [])) == ["", "| name | unit | ms |", "|---|---:|---:|"]
