"""Training ViTDet (arXiv 2203.16527) on annotated objects: Mask R-CNN's or Cascade R-CNN's boxes and masks, from a backbone that
was trained otherwise, from another detector, or from nothing; or its pyramid and heads alone, on the maps of a trained upsampler
(LiFT, section 3.5).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from operators.backbone import autocast
from operators.upsamplers import split_method
from operators.vitdet.augment import LargeScaleJitter
from operators.vitdet.backbone import kept_paths
from operators.vitdet.detector import Detector
from operators.vitdet.groups import parameter_groups
from operators.vitdet.input import padded
from operators.vitdet.losses import Sampling, Truth, detector_losses
from operators.vitdet.masks import ObjectMasks
from operators.vitdet.settings import DetectorError, DetectorSettings
from pipelines.config import ConfigError, Counts, Found, Free, absolute, require_at_least, said, used_with
from pipelines.executors import Executor
from pipelines.features.detectors import DetectorWeights, Head, load_detector, load_upsampler_net, require_doubling
from pipelines.features.weights import WeightsChoice
from pipelines.training.beginnings import Beginning, backbone_at, require_same_classes
from pipelines.training.config import LR_SCALE, Objective, TrainConfig, TrainSetup, Validation
from pipelines.training.data import Loaded, generator
from pipelines.training.objects import ObjectSource, unpacked
from pipelines.training.overlap import require_apart, same_contents
from storage.datasets.coco import CocoSet, load_coco
from storage.datasets.content import content_digests, joint_digest
from storage.datasets.files import DatasetError, digest
from storage.datasets.frames import LabelFrame
from storage.datasets.instances import Instances, has_area
from storage.datasets.labels import LabelledImage
from storage.documents import JsonValue
from storage.paths import Folder
from storage.redaction import redact

logger = logging.getLogger(__name__)

_PATHS = 11
"""What stochastic depth is drawn by, for an image of a step."""


def _of_published(name: Literal["B", "L", "H"]) -> DetectorSettings:
    return DetectorSettings.published(name)


MODELS: Mapping[str, DetectorSettings] = {
    "base": _of_published("B"),
    "large": _of_published("L"),
    "huge": _of_published("H"),
    "tiny": DetectorSettings(
        dim=96,
        depth=4,
        heads=4,
        window=7,
        global_blocks=(1, 3),
        drop_path=0.0,
        channels=64,
        fc=256,
        anchor_sizes=((8,), (16,), (32,), (64,), (128,)),
        pre_topk=(500, 500),
        post_topk=(200, 200),
        canonical_size=56,
    ),
}
"""Sizes by name: the published ones, and one for CPUs and images of about 256 pixels, whose boxes are a quarter as large."""

LAYER_DECAY = {12: 0.7, 24: 0.8, 32: 0.9}
"""As published, by the number of blocks."""

OWN_SIZES = ("model", "dim", "depth", "heads", "window", "global_blocks", "channels", "fc")
"""Settings of a detector that begins; one that was trained has its own."""

_BACKBONE = used_with("the backbone isn't trained beside a trained --upsampler", trains_backbone=True)


@dataclass(frozen=True, kw_only=True)
class ViTDetTraining(TrainConfig):
    """Settings of one training run: a detector learns boxes, classes and masks of annotated objects."""

    word: ClassVar[str] = "vitdet"

    method: Counts[Head] = "mask_rcnn"
    """The heads."""
    data: Found[str] = ""
    """COCO's folder in its official layout, with annotations/instances_SPLIT.json: a path or fsspec URL."""
    split: Counts[str] = "train2017"
    """What is trained on."""
    val_split: Counts[str] = "val2017"
    """Held-out images."""
    limit: Counts[int | None] = None
    """Only the first N images of --split."""
    val_limit: Found[int | None] = None
    """Only the first N images of --val-split."""
    label_frame: Counts[LabelFrame | None] = None
    """Of images that their EXIF mirrors or turns by half, and of square ones that it turns: whether annotations are of the
    `stored` pixels or of the `upright` image. Default: such images are left out, and counted. Where sizes tell, they decide."""

    weights: Found[str] = "random"
    """What training starts from: `random[:SEED]`, a backbone's file as MAE's authors release it, or a detector: a training run's
    folder, or a published file (.pkl)."""
    model: Counts[Literal["base", "large", "huge", "tiny"]] = "base"
    """The backbone's size: ViT-B, L or H, or a small one for CPUs, with a narrower pyramid and heads."""
    size: Counts[int] = 1024
    """Pixels a side of the square that images are put into."""
    dim: Counts[int | None] = None
    """Channels of the backbone; default, here and for the next ones: the model's."""
    depth: Counts[int | None] = None
    """Blocks of the backbone."""
    heads: Counts[int | None] = None
    """Heads of its attention."""
    window: Counts[int | None] = None
    """Cells a side of its windows."""
    global_blocks: Counts[tuple[int, ...] | None] = None
    """Numbers of the blocks without windows, from 0."""
    channels: Counts[int | None] = None
    """Of the pyramid, and of the heads' convolutions."""
    fc: Counts[int | None] = None
    """Channels of the box head's layer."""
    drop_path: Annotated[Counts[float | None], _BACKBONE] = None
    """Part of the images for which the last block is left out while training; it rises to that linearly from the first."""
    upsampler: Found[str] = ""
    """lift:URL, a trained upsampler that doubles this backbone's map: pyramid and heads alone are trained then, in a frame of
    twice the pixels. `lift` alone: one that is drawn anew, and trained with all the rest."""

    scales: Counts[tuple[float, float]] = (0.1, 2.0)
    """Smallest and largest size of images while training, as parts of the one that fits the square; what is larger is cropped."""
    mirror: Counts[float] = 0.5
    """Part of the images that are mirrored."""
    anchors: Counts[int] = 256
    """Anchors of an image that its proposals' losses are of."""
    proposals: Counts[int] = 512
    """Proposals of an image that its boxes' losses are of."""
    layer_decay: Annotated[Counts[float | None], _BACKBONE] = None
    """What the learning rate of a block is of the next one's; default: 0.7, 0.8 and 0.9 of 12, 24 and 32 blocks, else 1."""
    decays_norms: Annotated[Counts[bool], _BACKBONE] = False
    """Whether --weight-decay is for the backbone's norms, too, as published for huge."""

    batch: Counts[int] = 64
    """Images per optimiser step, over all workers; an epoch's last batch is what is left."""
    micro_batch: Counts[int | None] = 1
    """Images per forward, whose losses are divided by what they have of them together, as one GPU's are in the published code.
    Workers share a batch's micro-batches."""
    epochs: Free[int] = 101
    """Passes over the training images."""
    lr: Counts[float] = 1e-4
    """AdamW's learning rate, of pyramid and heads."""
    weight_decay: Counts[float] = 0.1
    """AdamW's."""
    schedule: Counts[Literal["constant", "cosine", "steps"]] = "steps"
    """Of the learning rate; `cosine` falls to --final-lr at the last step, `steps` to a tenth after 8/9 of them, and again after
    26/27."""
    warmup_steps: Counts[int] = 250
    """cosine, steps: over so many steps the learning rate first rises linearly, from a hundredth or from a thousandth."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "limit", "val_limit", "size", "anchors", "proposals")
        least, most = self.scales
        if not 0 < least <= most:
            raise ConfigError(f"--scales {least:g} {most:g}: two sizes above 0, the smaller one first")
        for name in ("mirror", "drop_path"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value:g}: must lie between 0 and 1")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ConfigError(f"--layer-decay {self.layer_decay:g}: must be above 0 and at most 1")

    @property
    def places(self) -> tuple[str, ...]:
        return self.data, self.out

    @property
    def trains_backbone(self) -> bool:
        """Whether no trained upsampler is asked for, which would keep it as it is."""
        return not (self.upsampler and split_method(self.upsampler)[1])

    @property
    def sampling(self) -> Sampling:
        return Sampling(anchors=self.anchors, proposals=self.proposals)

    def optimiser(self, net: nn.Module, trained: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        blocks = net.settings.depth if isinstance(net, Detector) else 0
        decay = LAYER_DECAY.get(blocks, 1.0) if self.layer_decay is None else self.layer_decay
        groups = parameter_groups(net, trained, weight_decay=self.weight_decay, layer_decay=decay, decays_norms=self.decays_norms)
        described = [
            {"params": [*group.values()], LR_SCALE: kind.lr_scale, "weight_decay": kind.weight_decay}
            for kind, group in groups.items()
        ]
        return torch.optim.AdamW(described, lr=self.lr)

    # --- what is trained ----------------------------------------------------------------------------------------------

    def beginning(self, categories: Mapping[int, str]) -> Beginning:
        """What training begins from. Raises `ConfigError`, `DetectorError`, `UpsamplerError`, `WeightsUnavailable`."""
        if self.upsampler:
            require_doubling(split_method(self.upsampler)[0])
        choice = WeightsChoice.parse(self.weights)
        if choice.source == "pretrained":
            raise ConfigError("--weights pretrained: give the file of a backbone, of a detector, or random")
        backbone = backbone_at(choice.url, self.options) if choice.source == "file" else None
        if choice.source == "file" and backbone is None:
            found = load_detector(choice.url, self.options)
            self._require_fitting(found, categories)
            upsampler = load_upsampler_net(self.upsampler, found, self.options) if self.upsampler else None
            new = bool(self.upsampler) and self.trains_backbone
            return Beginning.of(found, upsampler, categories, new=new).resized(self.size, self.drop_path)
        if not self.trains_backbone:
            raise ConfigError("--upsampler needs as --weights the detector whose maps it was trained to enlarge")
        try:
            return Beginning.new(self.network(len(categories)), choice.seed, categories, backbone, self.upsampler)
        except DetectorError as error:
            raise DetectorError(f"--weights {redact(self.weights, self.options)}: {error}") from None

    def _require_fitting(self, found: DetectorWeights, categories: Mapping[int, str]) -> None:
        """Raises `ConfigError` or `DetectorError` where the settings or the data are of another detector."""
        plain = type(self)()
        if given := [name for name in OWN_SIZES if getattr(self, name) != getattr(plain, name)]:
            asked, back = (said(given[0], getattr(config, given[0])) for config in (self, plain))
            raise ConfigError(
                f"{asked} would change nothing: the detector of --weights {found.displayed} has its own sizes. Leave it out; "
                f"where a preset sets it, say {back}"
            )
        if found.head != self.method:
            raise ConfigError(
                f"--method {self.method}: --weights {found.displayed} is a {found.head}; give --method {found.head}, or weights "
                "of the other kind"
            )
        require_same_classes(found, categories)

    def network(self, classes: int) -> DetectorSettings:
        """Of a detector that isn't one yet. Raises `ConfigError`."""
        names = (*OWN_SIZES[1:], "drop_path")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        sides = {"square_pad": self.size, "image_size": self.size}
        try:
            return replace(MODELS[self.model], **sides, classes=classes, cascade=self.method == "cascade", **given)
        except DetectorError as error:
            raise ConfigError(f"--model {self.model} at --size {self.size}: {error}") from None

    # --- what it is trained on ----------------------------------------------------------------------------------------

    def resolve(self) -> "ViTDetSetup":
        """List the data set and load the weights.

        Raises `ConfigError`, `DatasetError`, `DetectorError`, `WeightsUnavailable`, `StorageError`.
        """
        folder = self.begin_folder()
        if not self.data:
            raise ConfigError("no data: give --data COCO's folder")
        place = Folder(absolute(self.data), self.options)
        train, held_out = (
            Objects.of(load_coco(place, split, limit), split, self.label_frame)
            for split, limit in ((self.split, self.limit), (self.val_split, self.val_limit))
        )
        if tuple(train.categories) != tuple(held_out.categories):
            raise DatasetError(
                f"{place.displayed}: the annotations of {self.split} and of {self.val_split} have other categories; a detector's "
                "classes are all of one list"
            )
        beginning = self.beginning(train.categories)
        jitter = LargeScaleJitter(side=self.size, scales=self.scales, mirror=self.mirror)
        sources = [each.source(jitter, self.seed) for each in (train, held_out)]
        return ViTDetSetup(
            config=self,
            folder=folder,
            description=beginning.description(),
            order=self.order(len(sources[0].items)),
            images=sources[0],
            held_out=sources[1],
            held_out_rows=tuple(range(len(sources[1].items))),
            beginning=beginning,
            left_out=(*train.left_out, *held_out.left_out),
        )


@dataclass(frozen=True, kw_only=True)
class Objects:
    """A split's images that have objects which are told apart."""

    categories: Mapping[int, str]
    items: tuple[LabelledImage, ...]
    left_out: tuple[str, ...]
    "sentences on what isn't trained on"

    @classmethod
    def of(cls, found: CocoSet, split: str, frame: LabelFrame | None) -> "Objects":
        """Raises `DatasetError` where no image has any."""
        crowds, flat, kept = 0, list[str](), []
        for item in found.images:
            notes = item.label.objects() if isinstance(item.label, Instances) else []
            told_apart = [each for each in notes if not each["iscrowd"]]
            crowds += len(notes) - len(told_apart)
            without_area = [f"{item.image.displayed}, annotation {each['id']}" for each in told_apart if not has_area(each)]
            flat += without_area
            if len(told_apart) > len(without_area):
                kept.append(replace(item, frame=frame))
        beside = "crowds and objects without an area" if flat else "crowds"
        if not kept:
            raise DatasetError(f"none of the {len(found.images):,} images of {split} has an annotated object beside {beside}")
        without = len(found.images) - len(kept)
        said = (
            [f"{without:,} of {split}'s {len(found.images):,} images have no annotated object beside {beside}"] if without else []
        )
        said += [f"{crowds:,} crowds of {split} are no objects"] if crowds else []
        said += (
            [f"{len(flat):,} objects of {split} cover no pixel: polygons of two corners, empty runs ({flat[0]})"] if flat else []
        )
        return cls(categories=found.categories, items=tuple(kept), left_out=tuple(f"left out: {each}" for each in said))

    def source(self, jitter: LargeScaleJitter, seed: int) -> ObjectSource:
        contents = content_digests([item.image for item in self.items])
        return ObjectSource(
            items=self.items, contents=tuple(contents), categories=tuple(self.categories), jitter=jitter, seed=seed
        )


@dataclass(frozen=True, kw_only=True)
class ViTDetSetup(TrainSetup):
    """A detector's run: settings held against the data set and the weights."""

    config: ViTDetTraining
    images: ObjectSource
    held_out: ObjectSource
    beginning: Beginning
    left_out: tuple[str, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        return (*super().notes, *self.left_out)

    def prepare(self, executor: Executor) -> Self:  # noqa: ARG002 - nothing is left to be read
        """Begin or continue the folder. Raises `CheckpointError`, and `ConfigError` where it was begun with other settings."""
        found: dict[str, JsonValue] = {"detector": dict(self.description), "weights": self.beginning.digest}
        for name, labels, source in (
            ("images", "labels_content", self.images),
            ("held_out", "held_out_labels_content", self.held_out),
        ):
            found |= {name: digest(source.items), f"{name}_content": joint_digest(source.contents)}
            found[labels] = joint_digest(content_digests([item.label for item in source.items]))
        same = same_contents(self.images.named_contents, self.held_out.named_contents)
        instead = "Give another --split or --val-split"
        seen = require_apart(same, self.held_out, len(self.held_out.items), allowed=self.config.overlap, instead=instead)
        self.config.begin(self.folder, found, self.order)
        return replace(self, seen=seen)

    def objective(self, device: torch.device) -> Objective:
        return ViTDetObjective(self, device)


class ViTDetObjective:
    """A detector and its published losses (pipelines/training/config.py, `Objective`).

    Each forward's losses are divided by what it has of its images together, as one GPU's are upstream, and count by its images:
    so they depend on --micro-batch, and not on the number of workers. What is drawn for an image (anchors, proposals, branches
    that are left out) is drawn from the seed, the step and the image's row alone.
    """

    clipped = 0  # no features are stored

    def __init__(self, setup: ViTDetSetup, device: torch.device):
        self.setup, self.config, self.device = setup, setup.config, device
        self.net = setup.beginning.build().to(device)
        self.beside = nn.Module()
        kept = setup.beginning.keeps_maps and self.net.lift
        self.frozen: tuple[nn.Module, ...] = (self.net.backbone.net, kept) if kept else ()
        for module in self.frozen:
            module.requires_grad_(False)

    def accumulate(self, loaded: Loaded) -> tuple[Tensor, float]:
        """Adds the gradient of the images' summed loss to the network's; gives that sum and their number."""
        for module in self.frozen:
            module.eval()  # LiFT's norms have their statistics
        seeds = [(self.config.seed, loaded.item.step, row) for row in loaded.rows]
        try:
            total = torch.stack([*self._losses(loaded.example.arrays, seeds).values()]).sum() * len(loaded)
        except DetectorError:  # proposals aren't finite; all processes hear of it by the loss
            return torch.tensor(float("nan")), len(loaded)
        total.backward()
        return total.detach(), len(loaded)

    def _losses(self, arrays: Mapping[str, np.ndarray], seeds: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
        """By name, of a forward's images; `seeds`: what is drawn for each."""
        examples = unpacked(arrays)
        images, sizes = padded([pixels for pixels, _ in examples], self.net.settings)
        images, scale = images.to(self.device), 1 if self.net.lift is None else 2
        truths = [
            Truth(
                boxes_G4=torch.from_numpy(scale * objects.boxes).to(self.device),
                classes_G=torch.from_numpy(objects.classes).to(self.device),
                masks=ObjectMasks(outlines=objects.outlines),
                seed=seed,
            )
            for (_, objects), seed in zip(examples, seeds, strict=True)
        ]
        with autocast(self.device, self.config.net_precision):
            levels = self.net.pyramid(self._maps(images, seeds))
            return detector_losses(self.net, levels, sizes, truths, self.config.sampling)

    def _maps(self, images_BCHW: Tensor, seeds: Sequence[tuple[int, ...]]) -> Tensor:
        if self.frozen:
            with torch.no_grad():
                return self.net.enlarged(images_BCHW, self.net.features(images_BCHW))
        kept = None
        if self.net.training and self.net.settings.drop_path:
            kept = kept_paths(self.net.settings, [generator(_PATHS, *seed) for seed in seeds]).to(self.device)
        return self.net.enlarged(images_BCHW, self.net.features(images_BCHW, kept))

    def measure(self, step: int) -> Validation:  # noqa: ARG002
        """The losses of the held-out images as a detector is given them, the same anchors and proposals of each at every step."""
        source, rows = self.setup.held_out, self.setup.held_out_rows
        sums: dict[str, float] = {}
        n, left_out = 0, {}
        at_once = min(self.config.forward_images, 16)
        for start in range(0, len(rows), at_once):
            asked = rows[start : start + at_once]
            example = source.load(asked, None)
            left_out |= example.failed
            there = [row for row in asked if row not in example.failed]
            if not there:
                continue
            n += len(there)
            for name, loss in self._losses(example.arrays, [(self.config.seed, row) for row in there]).items():
                sums[name] = sums.get(name, 0.0) + loss.item() * len(there)
        if not n:
            return Validation(left_out=left_out)
        values = {f"val_{name.removeprefix('loss_')}": total / n for name, total in sums.items()}
        return Validation(values={"val_loss": sum(values.values()), **values}, images=n, left_out=left_out)
