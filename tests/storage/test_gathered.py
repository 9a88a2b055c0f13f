"""Rows of an input that don't fit into memory: their order, their keys in order, keys that repeat, and the files of an index."""

import errno
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import gathered, samples
from storage.gathered import GatheredRows, cut
from storage.paths import Folder, StorageError
from storage.samples import PART_ROWS, Source, part_files, part_name, table_bytes, write_index
from storage.tars import SCHEMA


@pytest.fixture(autouse=True, scope="module")
def small():
    """Chunks of 8 rows, runs of 32, files on the disk from 100 bytes on."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"CHUNK_ROWS": 8, "RUN_ROWS": 32, "MEMORY_BYTES": 100}.items():
            patch.setattr(gathered, name, value)
        yield


def index_rows(keys: list[str]) -> pa.Table:
    columns = {"key": keys, "source": 0, "member": "jpg", "offset": 512, "size": 9, "problem": None}
    n = len(keys)
    return pa.table({name: value if name == "key" else [value] * n for name, value in columns.items()}, schema=SCHEMA)


def gather(keys: list[str], sizes: list[int]) -> GatheredRows:
    rows, first = GatheredRows(), 0
    for size in itertools.chain(sizes, [len(keys)]):
        rows.append(index_rows(keys[first : first + size]))
        first += size
    return rows


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=3), min_size=1, max_size=300), st.data())
def test_keys_are_in_order_whatever_came_when(keys, data):
    sizes = data.draw(st.lists(st.integers(0, 90), max_size=10))
    rows = gather(keys, sizes)

    assert len(rows) == len(keys)
    assert rows.table() == index_rows(keys)
    found = pa.concat_tables(rows.keys())
    by_bytes = sorted(keys, key=str.encode)
    assert found["key"].to_pylist() == by_bytes
    assert [keys[row] for row in found["row"].to_pylist()] == by_bytes
    assert sorted(found["row"].to_pylist()) == list(range(len(keys)))
    # Those that repeat, in the order in which they first came.
    places: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        places.setdefault(key, []).append(row)
    several = [rows for rows in places.values() if len(rows) > 1]
    assert rows.repeated() == (len(several), [each[:4] for each in several[:5]])
    some = [0, len(keys) - 1, len(keys) // 2]
    assert rows.take(some)["key"].to_pylist() == [keys[row] for row in some]


def test_tables_are_cut_to_one_size():
    table = pa.table({"x": range(50)})
    pieces = [table.slice(0, 1), table.slice(1, 0), table.slice(1, 30), table.slice(31, 19)]

    found = list(cut(pieces, 8))

    assert [len(each) for each in found] == [8] * 6 + [2]
    assert pa.concat_tables(found) == table


@pytest.mark.parametrize("n", [1, 16, 17, 100])
def test_files_of_an_index_are_those_of_the_whole_table(n, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "ROW_GROUP_ROWS", 4)
    monkeypatch.setattr(samples, "PART_ROWS", 16)
    keys = [f"{number * 7 % 101:03d}" for number in range(n)]
    table = index_rows(keys)
    metadata = {"index": "digest"}

    found = [data for data, _ in part_files(gather(keys, [3, 30]).chunks(), metadata)]

    assert found == [table_bytes(table.slice(start, 16), metadata) for start in range(0, n, 16)]
    index = write_index(Folder(str(tmp_path)), gather(keys, [3, 30]), [Source(url="u", size=1, etag="", digest="")])
    assert index.find(keys) == {key: row for row, key in enumerate(keys)}
    assert index.first_keys == sorted(keys)[::16]
    assert (tmp_path / part_name("index/keys", 0)).exists()


def test_a_killed_process_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rows = gather([f"{number:09d}" for number in range(1000)], [])

    assert pa.concat_tables(rows.keys())["row"].to_pylist() == list(range(1000))
    assert list(Path(tmp_path).iterdir()) == []


def test_a_full_disk_is_one_sentence(monkeypatch):
    class Full:
        def seek(self, *_: int) -> int:
            return 0

        def write(self, _: memoryview) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "SpooledTemporaryFile", lambda **_: Full())

    with pytest.raises(StorageError, match="No space left on device; make room.*TMPDIR names another folder"):
        gather(["a"] * 50, [])


def test_a_part_of_an_index_has_whole_row_groups():
    assert PART_ROWS % samples.ROW_GROUP_ROWS == 0
    assert np.log2(PART_ROWS) % 1 == 0
