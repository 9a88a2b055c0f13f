"""Detectors from where they are kept, and what runs them: a row of an evaluation each, stage by stage.

A checkpoint is a folder at any URL: `config.json` and `model.safetensors`; a training run's folder stands for its best one.
config.json holds `detector` (`DetectorSettings`), `categories` (pairs of id and name, in the order of the classes) and, where the
heads were trained on the maps of one, `upsampler` (method and settings). Official files (.pkl, .pth) hold weights alone, which
tell the settings, and no categories.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from operators.timm_models import state_arrays, tensors_of, weights_digest
from operators.upsamplers import UpsamplerError, find_method, method_names, split_method
from operators.upsamplers.protocol import require_fitting
from operators.upsamplers.recursive import Recursive
from operators.vitdet.checkpoint import build, described, doubling_net, load, settings_of
from operators.vitdet.detector import BilinearNet, Detections, Detector, placed
from operators.vitdet.input import padded, resize
from operators.vitdet.settings import PATCH, DetectorError, DetectorSettings
from pipelines.config import JobConfig
from pipelines.features.clipping import ClippedCounts
from pipelines.features.rows import Row, Size
from pipelines.features.weights import WEIGHT_FILES, WeightsChoice, WeightsUnavailable, read_config, read_state_dict
from storage.datasets.images import EncodedImage
from storage.documents import JsonObject, JsonValue
from storage.paths import Folder, StorageError, StorageOptions, has_extension
from storage.redaction import redact
from storage.runs import NamedCheckpoint, named_checkpoint

logger = logging.getLogger(__name__)

LIFT = "lift."
"""What an upsampler's tensors are called in a detector's state dict."""

NET = "backbone.net."
"""What the backbone's are called."""

RANDOM = DetectorSettings(
    dim=48, depth=2, heads=3, window=4, global_blocks=(1,), drop_path=0.0, channels=32, fc=64, square_pad=128, image_size=128
)
"""Of a detector with random weights: what programs are tried with."""


Head = Literal["mask_rcnn", "cascade"]
"""Whose boxes and masks a detector's heads are: Mask R-CNN's or Cascade R-CNN's."""


@dataclass(frozen=True, kw_only=True)
class UpsamplerNet:
    """An upsampler that stands between a detector's backbone and its pyramid."""

    displayed: str
    config: JsonObject
    "method and settings, as checkpoints have them"
    arrays: Mapping[str, np.ndarray]
    step: str = ""
    "in words, which of its run's steps it is, where a run was named"

    @property
    def method(self) -> str:
        return str(self.config["method"])

    @cached_property
    def digest(self) -> str:
        """sha256 of its weights."""
        return weights_digest(self.arrays)

    def identity(self) -> JsonObject:
        """What makes its maps, as JSON values."""
        return {**self.config, "weights": self.digest}

    @cached_property
    def parameters(self) -> int:
        """How many there are, BatchNorm's running statistics apart."""
        method = find_method(self.method)
        state = tensors_of(self.arrays)
        return method.parameters(method.parse(self.config), state)

    def build(self, settings: DetectorSettings) -> nn.Module:
        """Ready to run, on the CPU. Raises `DetectorError` where it isn't one for the maps of such a detector."""
        net = doubling_net(self.config, settings)
        net.load_state_dict(tensors_of(self.arrays))
        return net.eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class DetectorWeights:
    """A detector as it is handed to workers."""

    displayed: str
    "where it was, as it may be printed"
    settings: DetectorSettings
    arrays: Mapping[str, np.ndarray]
    "without its upsampler's"
    upsampler: UpsamplerNet | None = None
    "on whose maps the heads were trained"
    categories: tuple[tuple[int, str], ...] = ()
    "ids and names by class; empty where its file doesn't say"
    step: str = ""
    "in words, which of its run's steps it is, where a run was named"

    @property
    def head(self) -> Head:
        """What the heads are called, as --head has it."""
        return "cascade" if self.settings.cascade else "mask_rcnn"

    @cached_property
    def digest(self) -> str:
        """sha256 of the weights, without the upsampler's."""
        return weights_digest(self.arrays)

    @cached_property
    def net_digest(self) -> str:
        """sha256 of the backbone's weights, as a model of its own has them."""
        return weights_digest({name.removeprefix(NET): array for name, array in self.arrays.items() if name.startswith(NET)})

    def build(self) -> Detector:
        """Ready to run, on the CPU, without its upsampler."""
        detector = build(described(self.settings))
        load(detector, tensors_of(self.arrays))
        return detector.eval().requires_grad_(False)


# --- reading ----------------------------------------------------------------------------------------------------------


def load_detector(url: str, options: StorageOptions | None = None, classes: int = 80) -> DetectorWeights:
    """The detector at `url`; of a training run, its best; `random[:SEED]`: a small one of so many `classes`.

    Raises `WeightsUnavailable`, and `DetectorError` for weights that aren't a detector's.
    """
    choice = WeightsChoice.parse(url)
    if choice.source == "random":
        settings = replace(RANDOM, classes=classes)
        return DetectorWeights(
            displayed=url, settings=settings, arrays=state_arrays(build(described(settings), choice.seed)), step="random weights"
        )
    is_file = has_extension(url, *WEIGHT_FILES)
    named = NamedCheckpoint(url=url) if is_file else named_checkpoint(url, options)
    displayed = redact(named.url, options)
    state = read_state_dict(named.url, options)
    try:
        config = {"detector": settings_of(state).to_json()} if is_file else read_config(Folder(named.url, options), "detector")
        upsampler = config.get("upsampler")
        parts = {name: config[name] for name in ("detector", "upsampler") if config.get(name) is not None}
        detector = build(parts)
        load(detector, state)
        arrays = state_arrays(detector)
        return DetectorWeights(
            displayed=displayed,
            settings=detector.settings,
            arrays={name: array for name, array in arrays.items() if not name.startswith(LIFT)},
            upsampler=None
            if upsampler is None
            else UpsamplerNet(displayed=displayed, config=upsampler, arrays=_without_prefix(arrays), step=named.step),
            categories=tuple((int(number), str(name)) for number, name in config.get("categories") or ()),
            step=named.step,
        )
    except DetectorError as error:
        raise DetectorError(f"{displayed}: {error}") from None
    except (TypeError, ValueError, KeyError) as error:
        raise WeightsUnavailable(f"{displayed}/config.json is no detector's: {type(error).__name__}: {error}") from None


def _without_prefix(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(LIFT): array for name, array in arrays.items() if name.startswith(LIFT)}


def new_upsampler(method: str, settings: DetectorSettings) -> JsonObject:
    """What a checkpoint says of an untrained upsampler for a detector's maps: method and settings."""
    known = {"channels": settings.dim, "patch": PATCH}
    return {"method": method, **{name: value for name, value in known.items() if name in find_method(method).setting_names}}


def load_upsampler_net(text: str, detector: DetectorWeights, options: StorageOptions | None = None) -> UpsamplerNet:
    """The upsampler of `METHOD:URL`, a checkpoint's folder or a training run's, or of `METHOD` with random weights, for a
    detector's maps. Raises `WeightsUnavailable`, and `UpsamplerError` or `DetectorError` where it isn't one for them."""
    name, url = split_method(text)
    require_doubling(name)
    if not url:
        config = new_upsampler(name, detector.settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            arrays = state_arrays(doubling_net(config, detector.settings))
        return UpsamplerNet(displayed=f"{name} with random weights", config=config, arrays=arrays)
    named = named_checkpoint(url, options)
    displayed = redact(named.url, options)
    if has_extension(url, *WEIGHT_FILES):
        raise DetectorError(
            f"{displayed}: a file of weights alone doesn't say its settings; give a checkpoint's folder, or a run's"
        )
    found = read_config(Folder(named.url, options), "upsampler")
    config = found["upsampler"]
    if config.get("method") != name:
        raise DetectorError(f"{displayed} holds a {config.get('method')}, not a {name}")
    _require_trained_on(detector, found.get("backbone"), displayed)
    try:
        net = doubling_net(config, detector.settings)
        state = read_state_dict(named.url, options)
        require_fitting(net.state_dict(), state, "the upsampler's settings")
    except (DetectorError, UpsamplerError) as error:
        raise DetectorError(f"{displayed}: {error}") from None
    return UpsamplerNet(
        displayed=displayed, config=config, arrays={key: value.numpy() for key, value in state.items()}, step=named.step
    )


def require_doubling(name: str) -> None:
    """Raises `UpsamplerError` for a method that isn't known, `DetectorError` for one whose network doesn't double a map."""
    if not isinstance(find_method(name), Recursive):
        doubling = ", ".join(method_names(lambda method: isinstance(method, Recursive)))
        raise DetectorError(f"{name} can't stand in a detector: it takes a network that doubles a map, as those of {doubling} do")


def _require_trained_on(detector: DetectorWeights, made_for: JsonValue, displayed: str) -> None:
    """Raises `DetectorError` where an upsampler says that it learned other features than a detector's maps (upsamplers.py)."""
    if not isinstance(made_for, Mapping) or made_for.get("weights") is None:
        logger.warning("%s doesn't say what it was trained on; taken to be the backbone of %s", displayed, detector.displayed)
        return
    here: JsonObject = {"weights": detector.net_digest, "layers": [detector.settings.depth - 1], "facet": "token"}
    if differing := [name for name, value in here.items() if made_for.get(name, value) != value]:
        raise DetectorError(
            f"{displayed} was trained on other maps than those of {detector.displayed}, whose backbone has other "
            f"{' and '.join(differing)}; give the detector that it was trained on, or train one on this (jobs/train.py "
            "lift-vitdet-coco)"
        )


# --- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DetectorRow:
    """A line of an evaluation's tables: a detector's heads on a kind of map."""

    row: Row
    detector: int
    "number of the heads"
    upsampler: int | None = None
    "number of what makes the map; None, for a row of another grid: bilinear enlargement"


@dataclass(frozen=True, kw_only=True)
class DetectorRecipe:
    """Detectors and upsamplers as they are sent to workers, and the rows that are made of them; the plain one first."""

    detectors: tuple[DetectorWeights, ...]
    upsamplers: tuple[UpsamplerNet, ...]
    rows: tuple[DetectorRow, ...]
    size: int
    "pixels a side of the square input"

    def source(self, device: str) -> "RunningDetectors":
        """What a worker runs."""
        return RunningDetectors(self, device)

    def identity(self) -> dict[str, JsonValue]:
        """What makes the detections, as JSON values."""
        return {
            "detectors": {
                each.row.name: {
                    "detector": self.detectors[each.detector].digest,
                    "settings": self.detectors[each.detector].settings.to_json(),
                    "upsampler": {} if each.upsampler is None else self.upsamplers[each.upsampler].identity(),
                }
                for each in self.rows
            },
            "input": self.size,
        }

    def described(self) -> dict[str, JsonValue]:
        """What makes the detections, for a report."""
        return self.identity()

    def planned(self) -> list[str]:
        """Lines on it for a plan."""
        made_of = {
            each.row.name: " + ".join(
                [self.detectors[each.detector].displayed]
                + ([] if each.upsampler is None else [self.upsamplers[each.upsampler].displayed])
            )
            for each in self.rows
        }
        rows = [f"row        {name}: {text}" for name, text in made_of.items()]
        return [*rows, f"memory     about {self.cpu_bytes / 1e9:.1f} GB a process on a CPU, an image of {self.size} px at a time"]

    @property
    def cpu_bytes(self) -> int:
        """About what a process takes that runs them on a CPU: its own, weights as they are sent and as they run, and an image in
        the largest frame. Measured with ViT-B and 100 masks, at 256 to 1024 px."""
        weights = sum(array.nbytes for each in (*self.detectors, *self.upsamplers) for array in each.arrays.values())
        frame = self.size * (1 if all(each.row.method == "backbone" for each in self.rows) else 2)
        return _PROCESS_BYTES + 2 * weights + _FRAME_BYTES * frame**2

    def recorded(self, config: JobConfig) -> dict[str, JsonValue]:
        """A job's settings as its documents have them."""
        return config.public()

    def said(self) -> dict[str, str]:
        """What results say of the detectors, in words."""
        named = [*self.detectors, *self.upsamplers]
        steps = "; ".join(dict.fromkeys(f"{each.displayed}: {each.step}" for each in named if each.step))
        others = [each.displayed for each in self.detectors[1:] if each.net_digest != self.detectors[0].net_digest]
        backbones = (
            f"that of {' and '.join(others)} isn't the plain detector's: rows differ by more than their maps" if others else ""
        )
        return {name: text for name, text in (("checkpoints", steps), ("backbones", backbones)) if text}

    def joined(self, images: Mapping[Size, Sequence[EncodedImage]], contents: Mapping[str, str]) -> "DetectorRecipe":  # noqa: ARG002
        """Itself: detectors run on the very images."""
        return self


_PROCESS_BYTES = 1_000_000_000
"""Of interpreter, libraries, and what doesn't depend on the input: regions' pooled maps, above all."""

_FRAME_BYTES = 350
"""Of a pixel of the frame: the pyramid's levels and what they are made of."""

BACKBONE, UPSAMPLER, PYRAMID, PROPOSALS, HEADS = STAGES = ("backbone", "upsampler", "pyramid", "proposals", "heads")


@dataclass(frozen=True, kw_only=True)
class Detected:
    """What a row found in an image."""

    found: Detections
    "on the CPU"
    seconds: Mapping[str, float]
    "by stage"


class RunningDetectors:
    """Runs the rows' detectors on one image at a time; backbones that are the same run once. Not thread-safe."""

    def __init__(self, recipe: DetectorRecipe, device: str):
        self.recipe, self.device, self.clipped = recipe, torch.device(device), ClippedCounts()
        self._detectors: list[Detector] = []
        nets: dict[str, nn.Module] = {}
        for weights in recipe.detectors:
            detector = weights.build()
            detector.backbone.net = nets.setdefault(weights.net_digest, detector.backbone.net)
            self._detectors.append(detector.to(self.device))
        settings = recipe.detectors[0].settings
        self._upsamplers = [each.build(settings).to(self.device) for each in recipe.upsamplers]
        self._nets = [weights.net_digest for weights in recipe.detectors]

    @torch.inference_mode()
    def detect(self, pixels_HW3: np.ndarray, displayed: str) -> dict[str, Detected]:
        """By row, what is found in an upright image, uint8, at its own size. Raises `StorageError` where features are infinite or
        no numbers: weights of a training that went astray."""
        height, width = pixels_HW3.shape[:2]
        settings = replace(self.recipe.detectors[0].settings, square_pad=self.recipe.size)
        images, sizes = padded([np.array(resize(Image.fromarray(pixels_HW3), self.recipe.size))], settings)
        images = images.to(self.device)
        maps: dict[str, tuple[torch.Tensor, float]] = {}
        found = {}
        for row in self.recipe.rows:
            detector, net = self._detectors[row.detector], self._nets[row.detector]
            if net not in maps:
                clock = _Clock(self.device)
                made = clock.stage(BACKBONE, lambda detector=detector: detector.features(images))
                if not made.isfinite().all():
                    raise StorageError(f"{displayed}: the backbone of {self._name(row)} gives NaN or infinity")
                maps[net] = made, clock.seconds[BACKBONE]
            detector.lift = self._upsampler(row)
            found[row.row.name] = self._row(detector, images, *maps[net], sizes, (height, width))
        return found

    def _name(self, row: DetectorRow) -> str:
        return self.recipe.detectors[row.detector].displayed

    def _upsampler(self, row: DetectorRow) -> nn.Module | None:
        if row.upsampler is not None:
            return self._upsamplers[row.upsampler]
        return None if row.row.method == "backbone" else BilinearNet()

    def _row(
        self,
        detector: Detector,
        images: torch.Tensor,
        maps: torch.Tensor,
        seconds: float,
        sizes: Sequence[Size],
        output_size: Size,
    ) -> Detected:
        clock, frame = _Clock(self.device), detector.in_frame(sizes)
        larger = clock.stage(UPSAMPLER, lambda: detector.enlarged(images, maps))
        levels = clock.stage(PYRAMID, lambda: detector.pyramid(larger))
        proposals = clock.stage(PROPOSALS, lambda: detector.propose(levels, frame))
        (found,) = clock.stage(
            HEADS, lambda: [placed(each, frame[0], output_size) for each in detector.find(levels, proposals, frame)]
        )
        return Detected(found=Detections(*(each.cpu() for each in found)), seconds={BACKBONE: seconds, **clock.seconds})


T = TypeVar("T")


class _Clock:
    """What stages took, once the device has done them."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, dict[str, float]()

    def stage(self, name: str, do: Callable[[], T]) -> T:
        start = time.perf_counter()
        done = do()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = time.perf_counter() - start
        return done
