"""DeAP, its ablations, and what it is held against, by the names that tables have for them."""

from collections.abc import Mapping

VARIANTS: Mapping[str, Mapping[str, bool | int | str]] = {
    "deap": {"method": "deap"},
    "deap-8-dim": {"method": "deap", "dim": 8},
    "deap-no-sigma": {"method": "deap", "mask": "none"},
    "deap-no-indiv-sigma": {"method": "deap", "shared_sigma": True},
    "deap-only-mask": {"method": "deap", "only_mask": True},
    "bicubic": {"method": "bicubic"},
    "transposed": {"method": "transposed"},
    "strided": {"method": "strided"},
    "linear": {"method": "linear"},
    "featup": {"method": "featup"},
}
"""DeAP, its ablations (Table 5), what it is held against (Fig. 4; `strided` is the release's transposed convolution, `featup`
reads a map that FeatUp has enlarged), and the linear probe: settings of `ReadoutConfig`, and of jobs/train.py."""
