"""How all papers train readouts."""

from collections.abc import Mapping

from pipelines.published import Recipe
from pipelines.published.deap import DEAP_RECIPES
from pipelines.published.vit_up import PROBE_RECIPES

RECIPES: Mapping[str, Recipe] = {**DEAP_RECIPES, **PROBE_RECIPES}
"""By name, in the order of the tables' columns: DeAP's, and ViT-Up's linear probes."""
