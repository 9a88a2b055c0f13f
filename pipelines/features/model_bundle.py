"""What workers build a model from: a spec, and arrays. Needs torch once it's built, so that a driver can hand it on without.

The driver hands the same arrays to every worker: they cross the network once per node, and what was hashed is what runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from storage.spec import FeatureSpec

if TYPE_CHECKING:  # they import torch
    import torch
    from torch import Tensor, nn

    from operators.backbone import TimmBackbone
    from operators.timm_models import Preprocessing
    from pipelines.features.config import FeatureConfig
    from pipelines.features.model import FeatureModel
    from pipelines.features.upsamplers import UpsamplerWeights


@dataclass(frozen=True, kw_only=True)
class ModelBundle:
    """All a worker needs to build the model: the spec and the arrays of its weights."""

    spec: FeatureSpec
    arrays: Mapping[str, np.ndarray]
    upsamplers: "Mapping[str, UpsamplerWeights]" = field(default_factory=dict)
    "learned ones, by level"

    def build(self, device: str, share: float = 1.0) -> "FeatureModel":
        """The model; `share`: the part of a GPU that is its own."""
        import torch

        from pipelines.features.model import FeatureModel

        return FeatureModel(self.spec, self.backbone(), torch.device(device), self.upsamplers, self.reload, share)

    def backbone(self) -> "TimmBackbone":
        """The backbone as it gives the features, on the CPU; its weights are the bundle's, and not to be written to."""
        from operators.timm_models import share_arrays

        ragged = any(side % self.spec.stride for side in self.spec.input_size)
        return backbone_of(share_arrays(self._undrawn(), self.arrays), self.spec, self.spec, ragged=ragged)

    def input(self, pixels_BHW3: np.ndarray, device: "torch.device") -> "Tensor":
        """uint8 images as the model's normalised input, float32 [B, 3, H, W]."""
        from operators.backbone import normalise
        from operators.transfer import to_device

        return normalise(to_device(pixels_BHW3, device), self.spec.mean, self.spec.std)

    def reload(self) -> "nn.Module":
        """The timm model with its own position embeddings, which a backbone in use has replaced, and weights of its own."""
        from operators.timm_models import load_arrays

        return load_arrays(self._undrawn(), self.arrays)

    def _undrawn(self) -> "nn.Module":
        from operators.timm_models import create_model

        return create_model(self.spec.model, self.spec.input_size, None, None, self.spec.model_args)

    def unfamiliar(self, spec: FeatureSpec, patch: int) -> list[str]:
        """Sentences on learned levels of `spec` (this one's, or of other input) whose upsamplers weren't, or may not have been,
        trained on such features, or on maps of such a size; `patch` is the backbone's, in pixels."""
        if not self.upsamplers:
            return []
        from pipelines.features.upsamplers import unfamiliar

        base = cells(spec.input_size, patch, spec.stride)
        names = [level.name for level in spec.levels if level.name in self.upsamplers]
        return [note for name in names for note in unfamiliar(name, self.upsamplers[name], spec.input_size, base, patch)]


def cells(size: tuple[int, int], patch: int, stride: int) -> tuple[int, int]:
    """(rows, columns) of a backbone's map."""
    return (size[0] - patch) // stride + 1, (size[1] - patch) // stride + 1


def backbone_of(
    model: "nn.Module", asked: "FeatureConfig | FeatureSpec", expects: "Preprocessing | FeatureSpec", *, ragged: bool
) -> "TimmBackbone":
    """A loaded model as features are taken from it: as `asked`, of inputs as it `expects` them. Takes the model over."""
    from operators.backbone import TimmBackbone

    options = {name: getattr(asked, name) for name in ("facet", "norm", "stride", "pos_embed")}
    return TimmBackbone(model, ragged=ragged, mean=expects.mean, std=expects.std, **options)
