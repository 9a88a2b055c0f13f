"""The learning rate of trainings that ask for a schedule: a linear warm-up, then a cosine or steps."""

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


VITDET_DROPS = (163_889 / 184_375, 177_546 / 184_375)
"""Parts of ViTDet's published run after which the learning rate is divided by 10, 8/9 and 26/27 of its steps."""


def stepped(step: int, *, steps: int = 184_375, warmup: int = 250, start: float = 0.001) -> float:
    """What the learning rate is multiplied by at an optimiser step, counted from 0: a line from `start` up to 1 at step `warmup`,
    and a tenth from each of `VITDET_DROPS` on. The defaults are those of ViTDet's published run."""
    rise = start + (1 - start) * step / warmup if step < warmup else 1.0
    return rise * 0.1 ** sum(step >= round(part * steps) for part in VITDET_DROPS)
