"""What a ledger's rows come to, as the store's root holds it."""

from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest

from storage.ledger import SCHEMA, SampleRecord
from storage.shards import FLOAT16_MAX, count_clipped, encode_row
from storage.spec import Level
from storage.totals import FURTHER, MAX_KINDS, Clipped, Totals, clipped_lines, conversion_lines

LEVELS = (
    Level(name="x1", method="backbone", grid=(2, 2), channels=5, start=(8.0, 8.0), step=(16.0, 16.0)),
    Level(name="x2", method="bilinear", grid=(4, 4), channels=5, dtype="float32", start=(4.0, 4.0), step=(8.0, 8.0)),
    Level(name="pooled", method="cls", grid=None, channels=5),
)


def rows(*records: dict[str, object]) -> pa.Table:
    found = [
        SampleRecord(**{"row": i, "key": f"k{i}", "source": "s", "member": "m", "offset": 0, "size": 1, **each})
        for i, each in enumerate(records)
    ]
    return pa.Table.from_pylist([asdict(record) for record in found], schema=SCHEMA)


def test_sums_over_parts_are_those_of_the_whole():
    records = [{"clipped": 3 * (i % 4 == 1), "conversion": ("grey->rgb", None)[i % 2]} for i in range(20)]
    records[2] |= {"status": "failed", "conversion": None}
    whole = rows(*records)

    totals = Totals.of(whole.slice(0, 7)) + Totals.of(whole.slice(7, 9)) + Totals.of(whole.slice(16))

    assert totals == Totals.of(whole)
    assert totals.counts == {"ok": 19, "failed": 1}
    assert totals.clipped == Clipped(rows=5, values=15, first=("k1", "k5", "k9"))
    assert totals.conversions == {"grey->rgb": 9}


def test_rows_that_are_not_written_yet_count_for_nothing():
    unwritten = pa.Table.from_pylist([{"row": 0}, {"row": 1}], schema=SCHEMA)

    assert Clipped.of(unwritten) == Clipped()


def test_conversions_are_one_kind_where_numbers_alone_differ():
    texts = [
        "grey16 (brightest 9000 of 65535)->rgb",
        "grey16 (brightest 12001 of 65535)->rgb",
        "grey16->rgb",
        "grey8 0.5..1->rgb",
    ]

    found = Totals.of(rows(*({"conversion": text} for text in texts))).conversions

    assert found == {"grey16 (brightest # of #)->rgb": 2, "grey16->rgb": 1, "grey8 #..#->rgb": 1}


def test_kinds_of_conversions_have_an_end():
    letters = ["".join(chr(97 + int(digit)) for digit in f"{i:03d}") for i in range(MAX_KINDS + 30)]

    one = Totals.of(rows(*({"conversion": f"warned: {each}"} for each in letters[:60])))
    both = one + Totals.of(rows(*({"conversion": f"warned: {each}"} for each in letters[60:])))

    assert len(both.conversions) == MAX_KINDS + 1
    assert both.conversions[FURTHER] == 30
    assert list(conversion_lines(both.conversions))[-1] == f"30 x {FURTHER}"


def test_words_say_how_many_values_of_how_many_and_what_to_do():
    (what, advice) = clipped_lines(Clipped(rows=2, values=5, first=("a", "b")), 10, LEVELS)

    assert what == (
        "2 of 10 images have values beyond float16's range: 5 of their 50 float16 values (10.00%) are clamped to 65,504 or "
        "-65,504 (a, b)"
    )
    assert "--encoding float32" in advice
    assert "--levels x1@float32 pooled@float32" in advice
    assert list(clipped_lines(Clipped(), 10, LEVELS)) == []


@pytest.mark.parametrize("on_the_device", [False, True], ids=["clamped by the host", "infinite on the device"])
def test_clamped_values_are_found_again_in_what_is_read(on_the_device):
    values = np.random.default_rng(0).normal(0, 1e5, (6, 4, 4, 3)).astype(np.float32)
    values[0] = 7
    with np.errstate(over="ignore"):
        given = values.astype(np.float16) if on_the_device else values
    encoded = [encode_row(row, "float16") for row in given]

    counted = count_clipped(np.stack([row for row, _, _ in encoded]))

    # What lies between 65488 and the limit is rounded to it.
    rounded = ((np.abs(values) >= 65488) & (np.abs(values) <= (65520 if on_the_device else 65504))).sum(axis=(1, 2, 3))
    assert counted.tolist() == [n + more for (_, _, n), more in zip(encoded, rounded, strict=True)]
    assert counted[0] == 0
    assert counted[1:].min() > 0
    assert count_clipped(np.full((2, 3), FLOAT16_MAX, np.float32)).tolist() == [0, 0]
