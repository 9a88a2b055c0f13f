"""In which order a stream of stored rows gives them, and which consumer which: numbers alone. Needs neither torch nor a store."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class StreamOrder:
    """Which rows one consumer of a stream gives, and in which order: numbers alone, nothing is read.

    The chosen rows of all blocks, in the epoch's order of blocks, are one sequence. Each rank has a range of it, and each of
    its workers a range of that; so only blocks at the borders are read by two consumers, a part each.
    """

    block_rows: int
    shuffle: bool
    seed: int
    buffer_rows: int
    even: bool
    rank: int
    world_size: int
    worker: int = 0
    workers: int = 1

    def parts(self, rows: np.ndarray, epoch: int) -> list[tuple[int, int]]:
        """What this consumer reads: ranges (first, last) of positions in the sorted `rows`, each within one block."""
        first, last = block_ranges(rows, self.block_rows)
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(first))
            first, last = first[order], last[order]
        ends = np.cumsum(last - first)
        begins = ends - (last - first)
        mine = self.share(len(rows))
        lower, upper = np.maximum(begins, mine[0]), np.minimum(ends, mine[1])
        some = lower < upper
        return list(zip((first + lower - begins)[some].tolist(), (first + upper - begins)[some].tolist(), strict=True))

    def share(self, n_rows: int) -> tuple[int, int]:
        """This consumer's range of a sequence of `n_rows`; the sizes of two consumers' differ by one at most."""
        if self.even:
            n_rows -= n_rows % self.world_size
        first, last = (n_rows * rank // self.world_size for rank in (self.rank, self.rank + 1))
        begin, end = ((last - first) * worker // self.workers for worker in (self.worker, self.worker + 1))
        return first + begin, first + end

    def steps(self, parts: Sequence[tuple[int, int]], epoch: int) -> Iterator[tuple[int, int]]:
        """For each row in the order given: how many of `parts` have entered the buffer by then, and its position."""
        if not self.shuffle:
            yield from ((entered, at) for entered, part in enumerate(parts, 1) for at in range(*part))
            return
        # A spawn key: entropy alone is padded with zeros, and consumer 0 would draw the numbers of the blocks' order.
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, epoch], spawn_key=(self.rank, self.worker)))
        held: list[int] = []
        for entered, part in enumerate(parts, 1):
            held += range(*part)
            spare = len(held) if entered == len(parts) else max(0, len(held) - self.buffer_rows + 1)
            for draw in rng.random(spare).tolist():
                chosen = int(draw * len(held))
                held[chosen], held[-1] = held[-1], held[chosen]
                yield entered, held.pop()


def block_ranges(rows: np.ndarray, block_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the rows of each block begin and end in the sorted `rows`."""
    first = np.flatnonzero(np.diff(rows // block_rows, prepend=-1))
    return first, np.append(first[1:], len(rows))
