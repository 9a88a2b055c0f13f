"""A number over the seeds of trainings: papers' tables and grids print it alike."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Score:
    """A number over seeds."""

    mean: float
    deviation: float | None
    "sample standard deviation; None for one seed"
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Score | None":
        """None of no values."""
        if not values:
            return None
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(mean=statistics.fmean(values), deviation=deviation, runs=len(values))

    def in_words(self, digits: int, due: int, sign: str = "") -> str:
        """`due`: how many runs there should be; fewer are said. `sign`: `+` for differences."""
        text = f"{self.mean:{sign}.{digits}f}"
        if self.deviation is not None:
            text += f" ± {self.deviation:.{digits}f}"
        return text + (f" ({self.runs} of {due})" if self.runs < due else "")
