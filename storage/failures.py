"""Why rows failed, in words: reasons that differ in numbers or quoted text only are one."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True, kw_only=True)
class FailureGroup:
    """Failed rows of one reason: messages that differ in numbers or quoted text only are one."""

    stage: str
    error: str
    message: str
    "of the first of them"
    count: int
    keys: tuple[str, ...]
    "the first few"

    def __str__(self) -> str:
        return f"{self.count:,} x {self.stage}: {self.error}: {self.message} (e.g. {self.keys[0]!r})"


REASON_COLUMNS = ("key", "stage", "error", "message")
"""What `group_failures` needs of a ledger row."""


def group_failures(failed: Iterable[pa.Table]) -> list[FailureGroup]:
    """The reasons of failed rows, which come some at a time, the commonest first."""
    groups: dict[str, list[dict[str, str]]] = {}
    counts: Counter[str] = Counter()
    for row in (row for table in failed for batch in table.select(REASON_COLUMNS).to_batches() for row in batch.to_pylist()):
        kind = re.sub(r"\d+|'.*?'|b\".*?\"", "#", f"{row['stage']}: {row['error']}: {row['message']}")
        counts[kind] += 1
        if counts[kind] <= 5:
            groups.setdefault(kind, []).append(row)
    return [
        FailureGroup(
            **{name: groups[kind][0][name] for name in ("stage", "error", "message")},
            count=count,
            keys=tuple(row["key"] for row in groups[kind]),
        )
        for kind, count in counts.most_common()
    ]


def commonest_reasons(failed: Iterable[pa.Table], top: int = 5) -> list[str]:
    """The `top` reasons of failed rows, in words, with an example key each."""
    return [str(group) for group in group_failures(failed)[:top]]
