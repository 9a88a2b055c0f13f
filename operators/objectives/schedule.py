"""The learning rate of trainings that ask for a schedule: a linear warm-up, then a cosine."""

import math


def learning_rate(
    step: int, *, steps: int = 53_381, warmup: int = 2_669, peak: float = 2e-4, start: float = 0.01, floor: float = 1e-6
) -> float:
    """Learning rate of an optimiser step, counted from 0: a line from `start` * `peak` up to `peak`, then a cosine to `floor`.

    The peak is reached at step `warmup`, the floor at step `steps`, one after the last; later steps stay there. The defaults
    are those of ViT-Up's published run.
    """
    if step < warmup:
        return peak * (start + (1 - start) * step / warmup)
    if step >= steps:
        return floor
    return floor + (peak - floor) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
