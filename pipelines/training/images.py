"""Training on images without labels: the frozen backbone loaded, the images indexed.

What is trained on them is said by subclasses of `ImageTraining` (lift.py, vit_up.py).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from operators.backbone import TimmBackbone
from operators.image import Geometry
from operators.timm_models import preprocessing
from operators.upsamplers import AnyMethod, UpsamplerError, find_method, method_names, spelled
from pipelines.config import ConfigError, Counts, Found, Held, InputConfig, require_at_least
from pipelines.executors import Executor
from pipelines.features.bundle import load_bundle
from pipelines.features.config import completed
from pipelines.features.join import Join
from pipelines.features.model_bundle import ModelBundle
from pipelines.indexing import RunInput, report_left_out
from pipelines.training.config import FeatureTraining, Objective, TrainSetup, Validation
from pipelines.training.data import Example, ImageSource, StoredFeatures, TrainOrder, View
from pipelines.training.overlap import require_apart, same_rows
from pipelines.training.watch import similarity_picture
from storage.datasets.content import joint_digest
from storage.documents import JsonObject, JsonValue
from storage.identity import content_of, sample_images
from storage.inputs import InputFile, Listing
from storage.paths import Folder, StorageOptions, filesystem
from storage.redaction import redact
from storage.runs import read_run
from storage.samples import SampleIndex
from storage.sources import LIMIT
from storage.spec import FeatureSpec

logger = logging.getLogger(__name__)

START_IMAGES = 64
"""That a start as the enlargement is made of, at most."""


@dataclass(frozen=True, kw_only=True)
class ImageTraining(FeatureTraining):
    """Settings of a training run on images without labels."""

    trains: ClassVar[str]
    "the objective's name, which methods say in `Method.trained_by`"
    trained_by: ClassVar[str]
    "what that is, in words"
    later: ClassVar[Sequence[str]] = ()
    "settings that the first runs don't say"
    level: ClassVar[str] = "x2"
    "that a finished run says to try next"

    data: Found[tuple[str, ...]] = ()
    """WebDataset tars (URLs; braces and globs allowed) or folders of tars or images; labels are not needed."""
    val_data: Found[tuple[str, ...]] = ()
    """Held-out images, named as --data."""
    val_rows: Counts[int] = 64
    """Images to validate on: the first of --val-data, or without it the last of --data, which are then not trained on."""
    image_member: Found[str | None] = None
    """Extension of the image inside a sample, where it isn't the first of jpg, jpeg, png, webp, bmp, tif, gif, avif and so on."""
    input: Held[InputConfig] = InputConfig()
    limit: Found[int | None] = None
    """Only the first N samples of --data."""
    max_image_pixels: Counts[int] = 89_478_485
    """Images with more pixels are left out instead of filling the memory; the default is Pillow's."""
    method: Counts[str] = ""
    """The network."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", spelled(self.method))
        super().__post_init__()
        require_at_least(1, self, "val_rows", "limit")

    @property
    def places(self) -> tuple[str, ...]:
        return *self.data, *self.val_data, self.out

    @property
    def backbone_size(self) -> int:
        """Side of the largest image that the backbone is given, in pixels."""
        raise NotImplementedError

    def trained_sides(self, patch: int) -> tuple[int, ...]:
        """Sides of all images whose maps the network is given while training, in pixels; `patch` is the backbone's."""
        raise NotImplementedError

    def found_method(self) -> AnyMethod:
        """The method. Raises `ConfigError` where there is none, or it isn't trained so."""
        try:
            found = find_method(self.method)
        except UpsamplerError as error:
            raise ConfigError(f"--method {self.method}: {error}") from None
        if found.trained_by != self.trains:
            names = ", ".join(method_names(lambda each: each.trained_by == self.trains))
            raise ConfigError(f"--method {self.method} isn't trained by {self.trained_by}; these are: {names}")
        return found

    def identity(self, found: JsonObject) -> dict[str, JsonValue]:
        """As for all runs; runs from before there were the `later` settings go on, where these say nothing."""
        plain, made_of = type(self)(), super().identity(found)
        return {name: value for name, value in made_of.items() if name not in self.later or value != plain.value(name)}

    def network(self, backbone: TimmBackbone) -> dict[str, JsonValue]:
        """The network's settings, as a checkpoint has them. Raises `ConfigError` for sizes that don't go together."""
        raise NotImplementedError

    def require_trainable(self, network: JsonObject, order: TrainOrder) -> None:
        """Raises `ConfigError` where the `network` can't learn from the fewest images that a forward has."""

    def view(self, backbone: ModelBundle) -> View:
        """What is made of an image file."""
        raise NotImplementedError

    def stored_features(self, backbone: ModelBundle) -> StoredFeatures | None:  # noqa: ARG002
        """Features that are read instead of computed. Raises `ConfigError` where stored ones are others."""
        return None

    def objective(self, setup: "ImageSetup", device: torch.device) -> Objective:
        """What a training process computes."""
        raise NotImplementedError

    def resolve(self) -> "ResolvedImages":
        """Find the input's files and load the model.

        Raises `ConfigError`, `InputError`, `BackboneError`, `UpsamplerError`, `WeightsUnavailable`.
        """
        folder = self.begin_folder()
        files = self.input.files(self.data, self.options, self.image_member)
        held_out = self.input.files(self.val_data, self.options, self.image_member) if self.val_data else Listing()
        _require_apart(folder, [*files, *held_out], self.options)
        # Whether the network can be trained on such inputs, it says itself.
        wanted = completed(self.features, size=str(self.backbone_size), levels=("x1",), ragged=True)
        backbone, model = load_bundle(wanted, self.options)
        upsampler = self.network(model.backbone)
        return ResolvedImages(
            config=self,
            folder=folder,
            backbone=backbone,
            patch=model.backbone.patch,
            upsampler=upsampler,
            files=files,
            held_out_files=held_out,
            features=self.stored_features(backbone),
        )


def _require_apart(folder: Folder, files: Sequence[InputFile], options: StorageOptions) -> None:
    """Raise `ConfigError` where the pictures of a run in `folder` would be images of its input, which isn't the same then."""
    (there, out) = filesystem(folder.url, options)
    for base in {file.base for file in files if file.base}:
        fs, path = filesystem(base, options)
        if fs.protocol == there.protocol and f"{out}/".startswith(f"{path.rstrip('/')}/"):
            raise ConfigError(
                f"--out {folder.displayed} is in {redact(base)}, whose images are --data: the run's own pictures would be among "
                "them when it goes on; give --out a place outside"
            )


@dataclass(frozen=True, kw_only=True)
class ImageSetup(TrainSetup):
    """A run on images without labels."""

    config: ImageTraining
    backbone: ModelBundle
    held_out: ImageSource

    @property
    def upsampler(self) -> JsonObject:
        """The network's settings."""
        return self.description["upsampler"]

    def objective(self, device: torch.device) -> Objective:
        return self.config.objective(self, device)


class ImageObjective:
    """What objectives on images without labels share: how they validate (pipelines/training/config.py, `Objective`)."""

    metrics: ClassVar[tuple[str, ...]]
    "`val_loss` first; `val_cosine` and `val_cosine_bilinear` are among them"
    larger: ClassVar[str]
    "how much larger the image is whose own map is the truth, in words"
    net: nn.Module
    beside: nn.Module
    clipped: int = 0  # a model's maps aren't rounded here

    def __init__(self, config: ImageTraining, setup: ImageSetup, device: torch.device):
        self.setup, self.device, self.beside = setup, device, nn.Module()
        self.title, self.at_once = config.method, min(config.forward_images, 16)

    def input(self, pixels_BHW3: np.ndarray) -> Tensor:
        """uint8 images as the model's input, on the device."""
        return self.setup.backbone.input(pixels_BHW3, self.device)

    def starting_images(self, geometry: Geometry, sides: Sequence[int]) -> Example:
        """Images that --start enlargement is made of: spread over all that there are to train on, so that each process of a run
        comes to the same weights. Raises `ConfigError` where none can be read."""
        rows = sorted(set(np.linspace(0, self.setup.order.n_rows - 1, START_IMAGES).astype(int).tolist()))
        found = self.setup.images.at_sides(rows, geometry, sides)
        if not found.arrays:
            row, reason = next(iter(found.failed.items()))
            raise ConfigError(
                f"--start enlargement: none of {len(rows)} images can be read (row {row}, {reason}); use --start drawn"
            )
        return found

    def measure(self, step: int) -> Validation:
        """Means of `metrics` over those held-out images that can be read."""
        rows, sums, n = self.setup.held_out_rows, np.zeros(len(self.metrics)), 0
        panels: list[list[np.ndarray]] = []
        left_out: dict[int, str] = {}
        for start in range(0, len(rows), self.at_once):
            asked = rows[start : start + self.at_once]
            added, failed = self.measure_some(asked, panels)
            sums, n, left_out = sums + added, n + len(asked) - len(failed), left_out | dict(failed)
        if not n:
            return Validation(left_out=left_out)
        values = dict(zip(self.metrics, (sums / n).tolist(), strict=True))
        low, high = (" x ".join(map(str, panels[0][i].shape[:2])) for i in (1, 4))
        columns = [
            "photo",
            f"backbone\n{low}",
            f"bilinear\ncosine {values['val_cosine_bilinear']:.4f}",
            f"{self.title}\ncosine {values['val_cosine']:.4f}",
            f"backbone, image {self.larger} as large\n{high}",
        ]
        return Validation(values=values, picture=similarity_picture(step, columns, panels), images=n, left_out=left_out)

    def measure_some(self, rows: Sequence[int], panels: list[list[np.ndarray]]) -> tuple[np.ndarray, Mapping[int, str]]:
        """Sums of `metrics` over the images that can be read, and why others can't, by row; adds photos and maps to `panels`:
        of the backbone, enlarged bilinearly, enlarged by the network, and of the backbone on the larger image."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ResolvedImages:
    """Settings held against the model and the input's files, before any cluster is asked for anything."""

    config: ImageTraining
    folder: Folder
    backbone: ModelBundle
    patch: int
    "the backbone's, in pixels"
    upsampler: JsonObject
    files: Listing
    held_out_files: Listing
    features: StoredFeatures | None

    def prepare(self, executor: Executor) -> ImageSetup:
        """Index the input, and begin or continue the folder; `executor` scans tars.

        Raises `InputError`, `CheckpointError`, and `ConfigError` where a run was begun with other settings.
        """
        config, folder = self.config, self.folder
        images, index = self._images(folder, self.files, config.limit, executor, self.features)
        held_out, rows = images, range(index.n_rows - config.val_rows, index.n_rows)
        n_rows = rows.start
        if self.held_out_files:
            below = Folder(f"{folder.url}/validation", config.options)
            held_out, own = self._images(below, self.held_out_files, config.val_rows, executor, limited_by="--val-rows")
            rows, n_rows = range(own.n_rows), index.n_rows
            _say_fewer("--val-data", own.n_rows, "--val-rows", config.val_rows)
        _say_fewer("--data", index.n_rows, "--limit", config.limit)
        if n_rows < 1:
            raise ConfigError(
                f"--val-rows {config.val_rows} leaves none of the {index.n_rows} images of --data to train on; use fewer, or "
                "give --val-data"
            )
        # The index knows names and sizes; other pixels under them would be learned on without a word.
        some = sample_images(images.index, images.urls, config.options)
        others = some if held_out is images else sample_images(held_out.index, held_out.urls, config.options)
        joins: list[Join] = []
        rows_content: dict[str, JsonValue] = {}
        if self.features is not None:
            # All are held against the store when they're read; a store of others is found before a cluster works.
            joins.append(self.features.join(some))
            # Those without a row are left out of the training.
            lacking = [key for key in some if key not in joins[-1].by_image]
            rows_content = {"rows_content": joint_digest([joins[-1].content, *lacking])}
        found: dict[str, JsonValue] = {
            "backbone": _identity(self.backbone.spec),
            "numbers": {"stored": self.features.numbers if self.features else None},
            "images": images.digest,
            "images_content": content_of(some),
            **rows_content,
            "held_out": held_out.digest,
            "held_out_content": content_of(others),
        }
        instead = "Give other --val-data" if self.held_out_files else "Remove the copies from --data, or give --val-data"
        same = same_rows(images, n_rows, held_out, rows)
        seen = require_apart(same, held_out, len(rows), allowed=config.overlap, instead=instead)
        order = config.order(n_rows)
        config.require_trainable(self.upsampler, order)
        config.begin(folder, found, order, joins)
        return ImageSetup(
            config=config,
            folder=folder,
            backbone=self.backbone,
            description={
                "upsampler": dict(self.upsampler),
                "backbone": {**_description(self.backbone.spec), **self._sides(config)},
            },
            order=order,
            images=images,
            held_out=held_out,
            held_out_rows=tuple(rows),
            seen=seen,
        )

    def _sides(self, config: "ImageTraining") -> dict[str, JsonValue]:
        """The sides of the images whose maps the network is given, where its method doesn't tell them."""
        factors, size = find_method(str(self.upsampler["method"])).trained_factors, self.backbone.spec.input_size[0]
        sides = config.trained_sides(self.patch)
        return {} if sides == tuple(size // factor for factor in factors) else {"sides": list(sides)}

    def _images(
        self,
        folder: Folder,
        files: Listing,
        limit: int | None,
        executor: Executor,
        features: StoredFeatures | None = None,
        limited_by: str = LIMIT,
    ) -> tuple[ImageSource, SampleIndex]:
        config = self.config
        rules = config.input.rules(config.image_member)
        options = config.options
        given = RunInput(files=files, rules=rules, limit=limit, options=options, executor=executor, limited_by=limited_by)
        in_use = read_run(self.folder) is not None
        index = given.index_in_use(folder) if in_use else given.index(folder, folder)
        report_left_out(index, files)
        source = ImageSource(
            folder=folder,
            digest=index.digest,
            urls=index.urls(files),
            options=config.options,
            max_image_pixels=config.max_image_pixels,
            seed=config.seed,
            view=config.view(self.backbone),
            features=features,
        )
        return source, index


def _say_fewer(where: str, images: int, flag: str, limit: int | None) -> None:
    if limit is not None and images < limit:
        logger.info("%s %s: %s holds %s images, of which all are taken", flag, f"{limit:,}", where, f"{images:,}")


def _identity(spec: FeatureSpec) -> dict[str, JsonValue]:
    """What makes a run's features what they are. Runs from before the weights' own config.json was read go on where that says
    nothing else than timm does of the name; the stride is the patch, always."""
    plain = preprocessing(spec.model)
    usual = {"stride": spec.stride, "model_args": {}, "mean": list(plain.mean), "std": list(plain.std)}
    return {name: value for name, value in _description(spec).items() if name not in usual or usual[name] != value}


def _description(spec: FeatureSpec) -> dict[str, JsonValue]:
    """What a checkpoint says of the features that it learned from; see pipelines/features/upsamplers.py."""
    return {**spec.learned(), "size": spec.input_size[0]}
