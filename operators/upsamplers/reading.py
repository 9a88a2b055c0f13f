"""Which rows and columns of an image, and of the maps that 3x3 convolutions make of it, are needed for what is read of the last.

UPLiFT's encoder keeps the image's size, and its steps read its maps by torch's `nearest`: for x2 at patch 16, every eighth row
and column. Only those are made, and of each map before them those round them. Plain numbers, worked out once for a size.
"""

import functools
import itertools
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from operators.transfer import to_device


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Rows (or columns) of one of the encoder's maps: those that any step reads, in order, and where each step's lie there."""

    kept: Sequence[int]
    steps: Sequence[Sequence[int]]

    @classmethod
    def of(cls, pixels: int, sides: Sequence[int]) -> Self:
        """Of a map of so many pixels a side, brought to each of `sides` by torch's `nearest`, which takes the first of each."""
        read = [
            np.minimum(np.floor(np.arange(side, dtype=np.float32) * (np.float32(pixels) / np.float32(side))), pixels - 1)
            for side in sides
        ]
        kept, places = np.unique(np.concatenate(read or [np.zeros(0)]).astype(int), return_inverse=True)
        ends = np.cumsum(sides, dtype=int)
        return cls(kept=kept.tolist(), steps=[places[end - side : end].tolist() for side, end in zip(sides, ends, strict=True)])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How maps of `base` cells are brought to a grid: after step i (from 0) there are `sides[i + 1]` cells."""

    sides: Sequence[tuple[int, int]]
    image: tuple[int, int]
    "pixels of the image that the encoder is given"
    coarse: tuple[Reading, Reading]
    "of the encoder's last map, which is read at the grid that a step is given: rows and columns"
    fine: tuple[Reading, Reading]
    "of the one before, which is read at the grid that a step makes"

    @property
    def steps(self) -> int:
        return len(self.sides) - 1


@functools.lru_cache(maxsize=16)
def planned(base: tuple[int, int], image: tuple[int, int], grid: tuple[int, int]) -> Plan:
    """The steps that give at least `grid`, and what they read of an encoder's maps of `image` pixels."""
    steps = max(0, *(math.ceil(math.log2(to / side)) for side, to in zip(base, grid, strict=True)))
    sides = [(base[0] << i, base[1] << i) for i in range(steps + 1)]
    coarse = [Reading.of(image[axis], [each[axis] for each in sides[:-1]]) for axis in (0, 1)]
    fine = [Reading.of(image[axis], [each[axis] for each in sides[1:]]) for axis in (0, 1)]
    return Plan(sides=sides, image=image, coarse=(coarse[0], coarse[1]), fine=(fine[0], fine[1]))


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where some lines (rows or columns) lie among others, in order."""

    numbers: Sequence[int]
    there: Tensor | None
    "the same on a device; None where they are evenly spaced, and needn't be there"

    @classmethod
    def of(cls, have: Sequence[int], want: Sequence[int], device: torch.device) -> Self:
        places = {line: place for place, line in enumerate(have)}
        numbers = [places[line] for line in want]
        return cls(numbers=numbers, there=None if spacing(numbers) else to_device(torch.tensor(numbers), device))

    def part(self, first: int, last: int, less: int = 0) -> "Places":
        """Those of the lines `first` to `last`, each less by so much."""
        there = None if self.there is None else self.there[first:last] - less
        return Places(numbers=[number - less for number in self.numbers[first:last]], there=there)

    def taken(self, maps: Tensor, dim: int) -> Tensor:
        """The lines of `maps` that lie there, a view where they are evenly spaced."""
        if not self.numbers:
            return maps.narrow(dim, 0, 0)
        if step := spacing(self.numbers):
            return maps[(slice(None),) * dim + (slice(self.numbers[0], self.numbers[-1] + 1, step),)]
        assert self.there is not None
        return maps.index_select(dim, self.there)


def spacing(numbers: Sequence[int]) -> int:
    """From one to the next, 0 where that varies."""
    between = {b - a for a, b in itertools.pairwise(numbers)} or {1}
    return between.pop() if len(between) == 1 else 0


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Rows (or columns) of the image and of each map that the encoder makes of it, where only those are made that are read."""

    size: int
    levels: Sequence[Sequence[int]]
    "the lines that are made of the image, and of each block's result"
    image: Places
    "the image's lines among its pixels"
    blocks: Sequence[Places]
    "those of a block's result among those of what it is given"
    fine: Places
    "those that steps read of the map before the last, among its lines"
    coarse_steps: Sequence[Places]
    fine_steps: Sequence[Places]
    "what each step reads, among all that are read"

    @classmethod
    def of(cls, coarse: Reading, fine: Reading, size: int, depth: int, device: torch.device) -> Self:
        levels: list[Sequence[int]] = [coarse.kept, sorted({*_widened(coarse.kept, size), *fine.kept})]
        while len(levels) <= depth:
            levels.append(_widened(levels[-1], size))
        levels.reverse()

        def placed(reading: Reading) -> list[Places]:
            return [Places.of(range(len(reading.kept)), numbers, device) for numbers in reading.steps]

        return cls(
            size=size,
            levels=levels,
            image=Places.of(range(size), levels[0], device),
            blocks=[Places.of(have, want, device) for have, want in itertools.pairwise(levels)],
            fine=Places.of(levels[-2], fine.kept, device),
            coarse_steps=placed(coarse),
            fine_steps=placed(fine),
        )

    def between(self, begin: int, end: int) -> "Axis":
        """What is made where of the last map the lines from `begin` to `end` are, and of the one before."""
        depth = len(self.levels) - 1
        spans = [
            (bisect_left(lines, begin - depth + i), bisect_left(lines, end + depth - i)) for i, lines in enumerate(self.levels)
        ]
        fine = [bisect_left(self.fine.numbers, bisect_left(self.levels[-2], line)) for line in (begin, end)]
        return replace(
            self,
            levels=[lines[first:last] for lines, (first, last) in zip(self.levels, spans, strict=True)],
            image=self.image.part(*spans[0]),
            blocks=[part.part(*here, there[0]) for part, here, there in zip(self.blocks, spans[1:], spans, strict=False)],
            fine=self.fine.part(fine[0], fine[1], spans[-2][0]),
        )

    def borders(self, level: int) -> tuple[int, int]:
        """Whether a level's lines begin and end with the map's own, as 0 or 1."""
        lines = self.levels[level]
        return int(lines[0] == 0), int(lines[-1] == self.size - 1)


def window(first: int, last: int, size: int, least: int) -> tuple[int, int]:
    """The lines `first` to `last`, where these are among `size`, and others beside them while there are fewer than `least`."""
    last = min(size, last)
    first = max(0, min(first, last - least))
    return first, min(size, max(last, first + least))


def _widened(lines: Sequence[int], size: int) -> list[int]:
    """With those on either side."""
    return sorted({line + by for line in lines for by in (-1, 0, 1)} & {*range(size)})
