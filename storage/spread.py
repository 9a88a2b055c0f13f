"""A few of many, evenly spread."""

import numpy as np


def spread(count: int, at_most: int) -> list[int]:
    """`at_most` of the numbers 0 to `count` - 1, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(at_most, count)).round().astype(int)).tolist()
