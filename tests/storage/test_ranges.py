"""Ranges of files, however they are joined into requests."""

from pathlib import Path

import pytest

from storage.ranges import read_ranges


def test_ranges_are_cut_out_in_order_and_short_at_the_end(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(range(200)))
    ranges = [(str(path), 10, 5), (str(path), 20, 3), (str(path), 0, 2), (str(path), 190, 50), (str(path), 7, 0)]

    found = read_ranges(ranges, None)

    assert [list(data) for data in found] == [[10, 11, 12, 13, 14], [20, 21, 22], [0, 1], list(range(190, 200)), []]


@pytest.mark.parametrize(("max_gap", "max_bytes"), [(0, 2**25), (2**18, 1), (2**18, 2**25)])
def test_ranges_are_the_same_however_they_are_merged(tmp_path, max_gap, max_bytes):
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode() * 3 + bytes(range(250)))
    ranges = [(str(tmp_path / name), start, 7) for name in "ab" for start in (0, 10, 17, 100)]

    found = read_ranges(ranges, None, max_gap=max_gap, max_bytes=max_bytes)

    assert found == [Path(url).read_bytes()[start : start + size] for url, start, size in ranges]
