"""What an input held that is no row: counted by reason, with examples, so that nothing is left out in silence."""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

logger = logging.getLogger(__name__)

MAX_EXAMPLES = 3
"""Examples that are kept of each reason."""

MAX_EXAMPLE_CHARS = 300
"""Characters of an example that are kept: names in a tar may have a million."""

MAX_REASONS = 50
"""Reasons that are kept apart, since some of them have a name's extension in them; what exceeds that is `FURTHER`."""

FURTHER = "left out for further reasons"


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """What was left out for one reason."""

    count: int
    examples: tuple[str, ...] = ()
    is_usual: bool = False
    "part of a well-formed input, such as the label beside an image: said, but no warning"


def leave_out(left_out: dict[str, LeftOut], reason: str, example: str, *, is_usual: bool = False) -> None:
    """Count one more thing, and keep its name if it is among the first."""
    displayed = example if len(example) <= MAX_EXAMPLE_CHARS else f"{example[:MAX_EXAMPLE_CHARS]}..."
    displayed = displayed if displayed.isprintable() else ascii(displayed)
    _add(left_out, reason, LeftOut(count=1, examples=(displayed,), is_usual=is_usual))


def merge_left_out(*several: Mapping[str, LeftOut]) -> dict[str, LeftOut]:
    """The sum, reasons in the order in which they first came up."""
    merged: dict[str, LeftOut] = {}
    for each in several:
        for reason, more in each.items():
            _add(merged, reason, more)
    return merged


def _add(left_out: dict[str, LeftOut], reason: str, more: LeftOut) -> None:
    if reason not in left_out and len(left_out) >= MAX_REASONS:
        reason, more = FURTHER, replace(more, is_usual=False)
    known = left_out.get(reason)
    if known is not None:
        examples = (*known.examples, *more.examples)[:MAX_EXAMPLES]
        more = LeftOut(count=known.count + more.count, examples=examples, is_usual=known.is_usual)
    left_out[reason] = more


def left_out_json(left_out: Mapping[str, LeftOut]) -> str:
    """As JSON: an object of `count`, `examples` and `is_usual` for each reason; empty for nothing."""
    return json.dumps({reason: asdict(each) for reason, each in left_out.items()}) if left_out else ""


def parse_left_out(text: str) -> dict[str, LeftOut]:
    """What `left_out_json` wrote."""
    parsed = json.loads(text) if text else {}
    return {
        reason: LeftOut(count=each["count"], examples=tuple(each["examples"]), is_usual=each["is_usual"])
        for reason, each in parsed.items()
    }


def left_out_lines(left_out: Mapping[str, LeftOut]) -> Iterator[str]:
    """A line for each reason, what deserves a look first."""
    for reason, each in sorted(left_out.items(), key=lambda item: item[1].is_usual):
        more = ", ..." if each.count > len(each.examples) else ""
        yield f"{each.count:,} x {reason} ({', '.join(each.examples)}{more})"


def log_left_out(left_out: Mapping[str, LeftOut]) -> None:
    """Say what was left out: a warning for each reason, or only information where it is usual."""
    for reason, each in left_out.items():
        for line in left_out_lines({reason: each}):
            logger.log(logging.INFO if each.is_usual else logging.WARNING, "left out of the input: %s", line)
