"""Where an evaluation reads features from: which of the two sources a job's settings name."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.features.agreement import AskedFeatures
from pipelines.features.comparison import Comparison, called_rows
from pipelines.features.config import LevelConfig
from pipelines.features.live_source import LiveRecipe, load_model
from pipelines.features.pictures import Geometries
from pipelines.features.rows import Rendering, Size
from pipelines.features.store_source import StoreRecipe, open_stores
from storage.paths import StorageOptions

logger = logging.getLogger(__name__)

Recipe = LiveRecipe | StoreRecipe


@dataclass(frozen=True, kw_only=True)
class SourceChoice:
    """Where features are to come from."""

    features: LevelConfig
    "of a model"
    stores: tuple[str, ...] = ()
    "read instead of running a model, one per input size"
    asked: AskedFeatures | None = None
    "what stores must agree with"
    rendering: Rendering
    options: StorageOptions
    comparison: Comparison = Comparison()
    "what lines of tables, one for each row, are to be compared with"


def resolve_source(choice: SourceChoice, sizes: Sequence[Size], geometry: Geometries) -> tuple[Recipe, tuple[Size, ...]]:
    """The model loaded, or the stores opened; and the input sizes: `sizes`, else the model's own, else the stores'.

    `geometry`: how jobs/extract.py would place the protocol's images (`Picture.geometry`).
    Raises `ConfigError`, `BackboneError`, `UpsamplerError`, `WeightsUnavailable`, `StorageError`.
    """
    recipe: Recipe
    if choice.stores:
        recipe, sizes = open_stores(choice.stores, choice.asked, sizes, geometry, choice.options)
    else:
        recipe, sizes = load_model(choice.features, choice.rendering, sizes, geometry, choice.options)
    for size in sizes:
        choice.comparison.require(called_rows(recipe.rows(size)))
    for note in recipe.notes():
        logger.warning("%s", note)
    return recipe, sizes
