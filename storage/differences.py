"""What differs between two descriptions of what makes features or a run: the one text that every refusal prints."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from storage.documents import JsonObject, JsonValue


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A field in which two descriptions aren't the same."""

    field: str
    "with dots where one lies within another: `x2.digest`, `backbone.facet`"
    there: JsonValue
    here: JsonValue


@dataclass(frozen=True, kw_only=True)
class Differences:
    """All of them; false where there is none."""

    found: tuple[Difference, ...]

    def __bool__(self) -> bool:
        return bool(self.found)

    def text(self, there: str, here: str) -> str:
        """A line each; `there` and `here` say whose the values are."""
        return "\n".join(f"  {each.field:<16} {there} {_short(each.there)}   {here} {_short(each.here)}" for each in self.found)

    def line(self, there: str, here: str) -> str:
        """As `text`, in one line."""
        said = (f"{each.field} {there} {_short(each.there)}, {here} {_short(each.here)}" for each in self.found)
        return "; ".join(said)


def differences(there: JsonObject, here: JsonObject) -> Differences:
    """The fields that differ, in the order of `there`; a field that isn't said is None."""
    return Differences(found=tuple(_walk(there, here)))


def _walk(there: JsonObject, here: JsonObject, prefix: str = "") -> Iterator[Difference]:
    for name in {**there, **here}:
        a, b = _by_name(there.get(name)), _by_name(here.get(name))
        if a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping) and a and b:
            # Levels have names of their own.
            yield from _walk(a, b, prefix if name == "levels" else f"{prefix}{name}.")
        else:
            yield Difference(field=f"{prefix}{name}", there=there.get(name), here=here.get(name))


def _by_name(value: JsonValue) -> JsonValue:
    """Levels by their names; anything else as it is, lists as JSON has them."""
    if isinstance(value, list | tuple):
        named = [each for each in value if isinstance(each, Mapping) and "name" in each]
        return {str(each["name"]): each for each in named} if value and len(named) == len(value) else list(value)
    return value


def _short(value: JsonValue) -> str:
    """As Python writes it; a digest by its beginning, and of what has a name, as levels have, what it says."""
    if isinstance(value, Mapping) and "name" in value:
        said = {name: each for name, each in value.items() if each not in (None, "") and name != "name"}
        return f"({', '.join(f'{name} {_short(each)}' for name, each in said.items())})"
    return re.sub(r"'([0-9a-f]{12})[0-9a-f]{52}'", r"'\1…'", repr(value))
