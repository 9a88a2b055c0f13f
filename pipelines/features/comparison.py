"""Which lines of an evaluation's table are compared with which, and which of them a further line is the mean of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipelines.config import ConfigError
from pipelines.features.rows import Row


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Lines of one table, by their names."""

    against: Mapping[str, str]
    "of a line, the one that its difference is to; none of a line that has no difference"
    means: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    "of a further line, those that it is the mean of"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was asked for. Lines go by their names, or by shorter ones that a table knows them by."""

    against: str = ""
    "the line that all differences are to, which may be one of `means`; empty: as a table has it by itself"
    means: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    "by the name of a further line, those that it is the mean of"

    @classmethod
    def parse(cls, against: str, means: Sequence[str]) -> "Comparison":
        """Of --against and --means. Raises `ConfigError`."""
        found: dict[str, tuple[str, ...]] = {}
        for text in means:
            name, equals, rest = text.partition("=")
            members = tuple(each.strip() for each in rest.split(","))
            if not name or not equals or len(set(members)) < max(2, len(members)) or not all(members):
                raise ConfigError(f"--means {text}: use NAME=LINE,LINE,..., two lines or more, each once")
            if name in found:
                raise ConfigError(f"--means {text}: {name} is the mean of {', '.join(found[name])} already; give another name")
            found[name] = members
        return cls(against=against, means=found)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of a table's further lines."""
        return tuple(f"{name} is the mean of {', '.join(members)}" for name, members in self.means.items())

    def require(self, called: Mapping[str, str]) -> None:
        """Raise `ConfigError` for lines that a table hasn't; `called`: its lines, by all that they may be called."""
        for name, members in self.means.items():
            if name in called:
                raise ConfigError(f"--means {name}=...: a line is called {name} already; give another name")
            for member in members:
                if member not in called:
                    raise ConfigError(f"--means {name}={','.join(members)}: no line is called {member}; {_there_are(called)}")
        if self.against and self.against not in called and self.against not in self.means:
            raise ConfigError(f"--against {self.against}: no line is called so; {_there_are(called)}")

    def of(self, called: Mapping[str, str], default: Mapping[str, str]) -> Compared:
        """Of a table with these lines, or some of those that were asked for: what isn't there isn't compared. `default` has the
        line that each is compared with where nothing else was asked for."""
        means = {
            name: tuple(called[member] for member in members)
            for name, members in self.means.items()
            if all(member in called for member in members)
        }
        if not self.against:
            of_means = {name: default[members[0]] for name, members in means.items() if members[0] in default}
            return Compared(against={**default, **of_means}, means=means)
        other = called.get(self.against, self.against)
        there = [*dict.fromkeys(called.values()), *means]
        return Compared(against={name: other for name in there if name != other and other in there}, means=means)

    def of_rows(self, rows: Sequence[Row]) -> Compared:
        """Of a table with a line for each row: against the bilinear one of its grid, else the first, where nothing else was asked
        for. Bilinear lines then have no difference."""
        bilinear = [row for row in rows if row.method == "bilinear"]
        of_grid = {row.grid: row.name for row in reversed(bilinear)}
        others = {row.name: of_grid.get(row.grid, bilinear[0].name) for row in rows if bilinear and row.method != "bilinear"}
        return self.of(called_rows(rows), others)


def called_rows(rows: Sequence[Row]) -> dict[str, str]:
    """Names of lines for rows, by all that they may be called: so, without the commas that --means has between lines, or as their
    levels."""
    by_level = {row.level: row.name for row in rows if row.level}
    return by_level | {name: row.name for row in rows for name in (row.name, row.name.replace(",", ""))}


def _there_are(called: Mapping[str, str]) -> str:
    return f"there are {', '.join(dict.fromkeys(called.values()))}"
