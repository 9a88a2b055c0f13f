"""A labelled image read as training does it: pixels by extraction's decoder, the label turned onto them."""

import numpy as np

from pipelines.features.photos import upright_pixels
from storage.datasets.instances import InstanceArrays
from storage.datasets.labels import LabelledImage


def read_labelled(item: LabelledImage) -> tuple[np.ndarray, np.ndarray | InstanceArrays]:
    """Pixels uint8 [H, W, 3] and label, both upright."""
    return upright_pixels(item.image), item.upright_label()
