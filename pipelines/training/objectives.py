"""What upsamplers are trained to do, by the name that methods say in `trained_by`. An objective is a file here and a line of
`OBJECTIVES`: settings, which say what is made of an image and of the backbone, and an `ImageObjective`.
"""

from operators.upsamplers import UPSAMPLERS, find_method
from pipelines.training.featup import FeatUpTraining
from pipelines.training.images import ImageTraining
from pipelines.training.jafar import JafarTraining
from pipelines.training.lift import X2Config
from pipelines.training.vit_up import ViTUpTraining

OBJECTIVES: dict[str, type[ImageTraining]] = {
    kind.trains: kind for kind in (X2Config, ViTUpTraining, JafarTraining, FeatUpTraining)
}
"""What there is, by name."""


def trainings() -> dict[str, ImageTraining]:
    """The settings to train each upsampler that is trained, by its name."""
    trained = {name: find_method(name).trained_by for name in UPSAMPLERS}
    return {name: OBJECTIVES[by].of(method=name) for name, by in trained.items() if by is not None}
