"""What a detector's training begins from: random weights, a backbone that was trained otherwise, a detector, or one with an
upsampler put between backbone and pyramid."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from operators.timm_models import load_arrays, state_arrays, weights_digest
from operators.vitdet.checkpoint import build, described, load_backbone
from operators.vitdet.detector import Detector
from operators.vitdet.settings import DetectorError, DetectorSettings
from pipelines.features.detectors import LIFT, NET, DetectorWeights, UpsamplerNet, new_upsampler
from pipelines.features.weights import WEIGHT_FILES, read_state_dict
from storage.documents import JsonObject, JsonValue
from storage.paths import Folder, StorageOptions, has_extension


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """A detector before its training, as it is handed to the processes."""

    settings: DetectorSettings
    arrays: Mapping[str, np.ndarray]
    "its state dict, with an upsampler's tensors where there is one"
    categories: Mapping[int, str]
    "names by the data set's ids, in the order of the classes"
    upsampler: JsonObject | None = None
    "method and settings, as checkpoints have them"
    keeps_maps: bool = False
    "backbone and upsampler, which were trained, stay as they are: pyramid and heads alone learn"

    @classmethod
    def of(
        cls, detector: DetectorWeights, upsampler: UpsamplerNet | None, categories: Mapping[int, str], *, new: bool = False
    ) -> "Beginning":
        """From a detector, with its own upsampler or another one, which is drawn anew where it is `new`."""
        found = upsampler or detector.upsampler
        between = {f"{LIFT}{name}": array for name, array in found.arrays.items()} if found else {}
        return cls(
            settings=detector.settings,
            arrays={**detector.arrays, **between},
            categories=categories,
            upsampler=found and found.config,
            keeps_maps=found is not None and not new,
        )

    @classmethod
    def new(
        cls,
        settings: DetectorSettings,
        seed: int,
        categories: Mapping[int, str],
        backbone: Mapping[str, Tensor] | None = None,
        method: str = "",
    ) -> "Beginning":
        """Drawn from a seed, with an upsampler of `method` where one is named, but for a backbone's tensors where there are some.
        Raises `DetectorError` where these don't fit."""
        upsampler = new_upsampler(method, settings) if method else None
        net = build(described(settings, upsampler), seed)
        if backbone is not None:
            load_backbone(net, backbone)
        return cls(settings=settings, arrays=state_arrays(net), categories=categories, upsampler=upsampler)

    def resized(self, side: int, drop_path: float | None) -> "Beginning":
        """For images in squares of `side` pixels, and with another rate of stochastic depth where one is given."""
        drop = self.settings.drop_path if drop_path is None else drop_path
        return replace(self, settings=replace(self.settings, square_pad=side, drop_path=drop))

    @property
    def digest(self) -> str:
        """sha256 of the weights."""
        return weights_digest(self.arrays)

    def description(self) -> dict[str, JsonValue]:
        """What a checkpoint's config.json says; pipelines/features/detectors.py reads it."""
        categories: list[JsonValue] = [[number, name] for number, name in self.categories.items()]
        return {**described(self.settings, self.upsampler), "categories": categories}

    def build(self) -> Detector:
        """The network on the CPU."""
        net = build(described(self.settings, self.upsampler))
        load_arrays(net, self.arrays)
        return net


def backbone_at(url: str, options: StorageOptions | None = None) -> dict[str, Tensor] | None:
    """The tensors of a backbone's file or folder; None where a detector's are there. Raises `WeightsUnavailable`."""
    if not has_extension(url, *WEIGHT_FILES) and not _is_backbones(Folder(url, options)):
        return None
    state = read_state_dict(url, options)
    return None if any(name.startswith(NET) for name in state) else state


def _is_backbones(folder: Folder) -> bool:
    """Whether a folder, such as timm's, holds weights and is neither a training run nor one of its checkpoints."""
    return not folder.exists("checkpoints.json") and not folder.exists("resume.json")


def require_same_classes(detector: DetectorWeights, categories: Mapping[int, str]) -> None:
    """Raises `DetectorError` unless a data set's categories are what the detector finds."""
    if detector.settings.classes != len(categories):
        raise DetectorError(
            f"{detector.displayed} finds {detector.settings.classes} classes, and the annotations have {len(categories)} "
            "categories; they must be of the same data set"
        )
    for (mine, name), there in zip(detector.categories, categories, strict=False):  # published files don't say any
        if mine != there:
            raise DetectorError(
                f"{detector.displayed} finds the category {mine} ({name}) where the annotations have {there} "
                f"({categories[there]}); they must be of the same data set"
            )
