"""Settings of depth labels, as training and evaluating readouts both have them."""

import math

from pipelines.config import ConfigError
from storage.datasets.registry import DATASETS


def require_depth(dataset: str, depth_scale: float | None) -> None:
    """Raises `ConfigError` for a scale that is no scale, or where the data set's labels have none."""
    if depth_scale is None:
        return
    if not (depth_scale > 0 and math.isfinite(depth_scale)):
        raise ConfigError(f"--depth-scale {depth_scale}: must be above 0, the number of values that are a metre")
    if dataset in DATASETS and DATASETS[dataset].label != "depth":
        raise ConfigError(f"--depth-scale: {dataset} has {DATASETS[dataset].label}, no depth; leave it out")
