"""What a ledger's rows come to: how many ended how, in which ones float16 couldn't hold a value, what was converted.

Small enough for a store's root: nobody reads a ledger of 10^8 rows to learn it.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc

from storage.shards import FLOAT16_MAX
from storage.spec import Level

KEEP_THEM = "--encoding float32 keeps them, live or in a store"

FIRST_KEYS = 3
"""Keys that are kept of the rows with clamped values."""

MAX_KINDS = 50
"""Kinds of conversions that are counted apart, since warnings of decoders are among them; what exceeds that is `FURTHER`."""

FURTHER = "further kinds"

# Numbers in warnings and ranges differ from image to image; those of a type's name (`grey16`) say what it is.
_NUMBERS = re.compile(r"(?<![A-Za-z\d])\d+(\.\d+)?")


@dataclass(frozen=True, kw_only=True)
class Clipped:
    """Rows with feature values beyond float16's range, of which its largest value is stored instead."""

    rows: int = 0
    values: int = 0
    "in all levels of those rows"
    first: tuple[str, ...] = ()
    "keys of the first few rows"

    @classmethod
    def of(cls, table: pa.Table) -> "Clipped":
        """Of ledger rows with the columns `key` and `clipped`."""
        some = table.filter(pc.greater(table["clipped"], 0))
        first = tuple(some["key"].slice(0, FIRST_KEYS).to_pylist())
        return cls(rows=len(some), values=pc.sum(some["clipped"]).as_py() or 0, first=first)

    def __add__(self, other: "Clipped") -> "Clipped":
        first = (*self.first, *other.first)[:FIRST_KEYS]
        return Clipped(rows=self.rows + other.rows, values=self.values + other.values, first=first)

    def text(self, n_rows: int, levels: Sequence[Level], about: str = "") -> str:
        """In words, of so many rows with features; `about` stands before numbers that aren't exact."""
        in_all = self.rows * sum(math.prod(level.row_shape) for level in levels if level.dtype == "float16")
        more = ", ..." if self.rows > len(self.first) else ""
        first = f"{', '.join(self.first)}{more}"
        return clipped_text(f"{self.rows:,} of {n_rows:,} images", self.values, in_all, first, about)


def clipped_text(images: str, values: int, of: int, first: str, about: str = "") -> str:
    """In words: these `images` have so many `values` beyond float16's range `of` their float16 values; `about` stands before
    numbers that aren't exact."""
    share = values / max(1, of)
    percent = f"{share:.2%}" if share >= 1e-4 else "less than 0.01%"
    return (
        f"{about}{images} have values beyond float16's range: {about}{values:,} of their {of:,} float16 values ({percent}) are "
        f"clamped to {FLOAT16_MAX:,.0f} or -{FLOAT16_MAX:,.0f} ({first})"
    )


def float16_levels(levels: Sequence[Level]) -> list[str]:
    """Names of the levels that can't hold every value."""
    return [level.name for level in levels if level.dtype == "float16"]


def clipping_advice(levels: Sequence[Level]) -> str:
    """What to do about clamped values of a store with these levels."""
    names = " ".join(f"{level.asked}@float32" for level in levels if level.dtype == "float16")
    return f"To keep them, extract again with --encoding float32 (by level: --levels {names}) and another --out"


def clipped_lines(found: Clipped, n_rows: int, levels: Sequence[Level], about: str = "") -> Iterator[str]:
    """What a store with these levels, and so many rows that have features, has clamped, and what to do; no line for nothing."""
    if found.rows:
        yield found.text(n_rows, levels, about)
        yield clipping_advice(levels)


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over ledger rows."""

    counts: Mapping[str, int] = field(default_factory=dict)
    "rows by status"
    clipped: Clipped = Clipped()
    conversions: Mapping[str, int] = field(default_factory=dict)
    "rows by what was done to the image beyond decoding, numbers in the words left out"

    @classmethod
    def of(cls, table: pa.Table) -> "Totals":
        """Of ledger rows."""
        converted = {text: n for text, n in _counted(table["conversion"]).items() if text}
        return cls(counts=_counted(table["status"]), clipped=Clipped.of(table), conversions=_by_kind(converted))

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(
            counts=_added(self.counts, other.counts),
            clipped=self.clipped + other.clipped,
            conversions=_by_kind(_added(self.conversions, other.conversions)),
        )

    def scaled(self, factor: float) -> "Totals":
        """What they come to of `factor` times as many rows, about."""
        counts, conversions = ({n: round(v * factor) for n, v in each.items()} for each in (self.counts, self.conversions))
        rows, values = (round(n * factor) for n in (self.clipped.rows, self.clipped.values))
        return Totals(counts=counts, clipped=replace(self.clipped, rows=rows, values=values), conversions=conversions)


def conversion_lines(conversions: Mapping[str, int], about: str = "") -> Iterator[str]:
    """A line for each kind of conversion, the commonest first."""
    for kind, count in sorted(conversions.items(), key=lambda item: (item[0] == FURTHER, -item[1])):
        yield f"{about}{count:,} x {kind}"


def _counted(column: pa.ChunkedArray) -> dict[str, int]:
    return {item["values"]: item["counts"] for item in pc.value_counts(column).to_pylist()}


def _added(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}


def _by_kind(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts of texts that differ in numbers only as one, and of at most `MAX_KINDS`, those that came up first."""
    kinds: dict[str, int] = {}
    for text, count in counts.items():
        kind = _NUMBERS.sub("#", text)
        kind = kind if kind in kinds or len(kinds) < MAX_KINDS else FURTHER
        kinds[kind] = kinds.get(kind, 0) + count
    return kinds
