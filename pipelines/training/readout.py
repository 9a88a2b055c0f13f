"""Training readouts on a frozen backbone's features: DeAP, its baselines, linear probes (ViT-Up's tables); live, or from an
extracted store."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from operators.backbone import autocast
from operators.readouts import READOUTS, ReadoutConfig, ReadoutError, build_readout
from operators.transfer import to_device
from pipelines.config import ConfigError, Counts, Found, Free, Held, absolute, require_at_least, settings_of, used_with
from pipelines.executors import Executor
from pipelines.features.agreement import AskedFeatures, recorded
from pipelines.features.config import DenseConfig, SizedConfig, completed
from pipelines.features.levels import level_name
from pipelines.features.model_bundle import ModelBundle
from pipelines.features.rows import Rendering, pooled_level
from pipelines.features.sources import SourceChoice, resolve_source
from pipelines.features.store_source import require_geometry
from pipelines.readouts.depth import require_depth
from pipelines.readouts.task import Placement, Task
from pipelines.readouts.tasks import TASKS
from pipelines.training.config import FeatureTraining, Objective, TrainSetup, Validation
from pipelines.training.data import Loaded
from pipelines.training.labelled import PIXELS, LabelledSource, StoredMaps, stored_array
from pipelines.training.overlap import require_apart, same_contents
from pipelines.training.watch import panel_picture
from storage.datasets.content import content_digests, joint_digest
from storage.datasets.files import digest
from storage.datasets.frames import LabelFrame
from storage.datasets.labels import LabelledImage
from storage.datasets.registry import DATASETS, LabelReading, load_labelled
from storage.differences import differences
from storage.documents import JsonObject, JsonValue
from storage.spec import FeatureSpec, Level, Use
from storage.store import FeatureStore

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

logger = logging.getLogger(__name__)

LONG_AFTER = 2**30
"""A step at which no loss is warming up."""


@dataclass(frozen=True, kw_only=True)
class ReadConfig(DenseConfig, SizedConfig[int | None]):
    """The maps of a square input."""


def _names_taking(setting: str) -> tuple[str, ...]:
    return tuple(name for name, kind in READOUTS.items() if setting in kind.settings)


_DRAWN = used_with(method=_names_taking("dim"))
"Of readouts that draw pixels from a query map."
_DEAP = used_with(method="deap")
_INSTANCES = used_with(task="instances")


@dataclass(frozen=True, kw_only=True)
class ReadoutTraining(FeatureTraining):
    """Settings of one training run: a readout learns a dense task from a frozen backbone's features."""

    word: ClassVar[str] = "deap"

    method: Counts[Literal["deap", "bicubic", "transposed", "strided", "linear", "featup", "depth_bins"]] = "deap"
    """The readout."""
    task: Counts[Literal["segmentation", "depth", "boundaries", "detection", "instances"]] = "segmentation"
    """What it learns."""
    dataset: Counts[str] = "voc"
    """The data set: voc, coco_stuff, coco_stuff27, ade20k, cityscapes, nyu, coco, photos_open, photos_open_instances."""
    data: Found[str] = ""
    """The data set's folder in its official layout: a path or fsspec URL."""
    split: Counts[str] = ""
    """What is trained on; default: the data set's own name of its training part."""
    val_split: Counts[str] = ""
    """What is judged on; default: the data set's own name of its validation part."""
    limit: Counts[int | None] = None
    """Only the first N images of --split."""
    val_limit: Found[int | None] = None
    """Only the first N images of --val-split."""

    label_frame: Counts[LabelFrame | None] = None
    """Of images that their EXIF mirrors or turns by half, and of square ones that it turns: whether labels are of the `stored`
    pixels or of the `upright` image. Default: such images are left out, and counted. Where sizes tell, they decide."""
    depth_scale: Annotated[Counts[float | None], used_with(task="depth")] = None
    """depth: how many of the stored values are a metre. Default: the layout's, if a sample of maps is plausible by it."""

    placement: Counts[Placement] = "crop"
    """How images and labels become square: the centre, or with other proportions."""
    side: Counts[int] = 224
    """Of the readout's output and of the labels, in pixels. DeAP asks a query for each 8 x 8."""
    drawing: Found[Rendering | None] = None
    """`paper`: images are drawn at --side, then enlarged by the nearest pixel, as DeAP's code does it; `extract`: as
    jobs/extract.py does it. Default: paper with a model, extract with a store (which can't be otherwise)."""
    flip: Annotated[Counts[bool], used_with("features of a store aren't those of the mirrored image", store=False)] = False
    """Mirror whole batches, half of them: the linear probes' only augmentation. Not with a store."""
    normalise: Annotated[Counts[bool], used_with("the images of a store were normalised", store=False)] = True
    """False: the model is given images from 0 to 1, without its mean and deviation, as ViT-Up's depth probe has it. Not with a
    store."""

    store: Found[str] = ""
    """A feature store of the images, made by jobs/extract.py with --geometry as --placement: read instead of running the model,
    whose settings are then the store's."""
    val_store: Annotated[Found[str], used_with(store=True)] = ""
    """The same for --val-split; default: --store."""
    level: Counts[str] = "x1"
    """The map that is read out, as for jobs/extract.py: x1, x2=lift:s3://bucket/ckpt; of a store, its name. Of featup,
    x16=featup:URL, made of each image anew: 39 million numbers at 280 px."""
    features: Held[ReadConfig] = ReadConfig()

    dim: Annotated[Counts[int | None], _DRAWN] = None
    """Channels of the query map; default: 16 for deap (8 is an ablation), 48 for the others."""
    mask: Annotated[Counts[Literal["released", "paper", "none"]], _DEAP] = "released"
    """deap: Gaussian of the squared distance as the code has it, of the distance as in eq. 2, or the ablation without."""
    shared_sigma: Annotated[Counts[bool], _DEAP] = False
    """deap: one mask width for all heads, an ablation."""
    only_mask: Annotated[Counts[bool], _DEAP] = False
    """deap: attention by masks alone, an ablation."""
    width: Annotated[Counts[int | None], _DRAWN] = None
    """Channels of the convolutions that draw pixels; default: max(dim / 4, outputs / 2). COCO-Stuff's published one has 32."""
    outputs: Annotated[Counts[int | None], used_with(task="segmentation")] = None
    """segmentation: more outputs than there are classes; COCO-Stuff's published readout has 200."""
    hidden: Annotated[Counts[int | None], used_with(method=_names_taking("hidden"))] = None
    """featup: channels between two convolutions, as the release's other mode has 32; default: a single convolution."""
    depth_loss: Annotated[Counts[Literal["deap", "vit-up"]], used_with(task="depth")] = "deap"
    """depth: the loss."""
    gradient_loss: Annotated[Counts[Literal["released", "spatial"]], used_with(task="depth", depth_loss="vit-up")] = "released"
    """depth, vit-up: differences between images of the batch, as its code has them, or between pixels."""
    samples: Annotated[Counts[int], _INSTANCES] = 1024
    """instances: pixels of each image that are classified."""
    large_area: Annotated[Counts[float], _INSTANCES] = 15_000.0
    """instances: held-out images are judged that have more than --many objects of more pixels, in the original."""
    many: Annotated[Counts[int], _INSTANCES] = 2
    """instances: see --large-area."""

    batch: Counts[int] = 32
    """Images per optimiser step, over all workers; an epoch's last batch is what is left."""
    epochs: Free[int] = 20
    """Passes over the training images."""
    weight_decay: Counts[float] = 0.01
    """AdamW's."""
    final_lr: Annotated[Counts[float], used_with(schedule="cosine")] = 0.0
    """cosine: the learning rate at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "limit", "val_limit", "side", "samples")
        require_at_least(1, self.features, "size")
        if self.features.encoding == "int8":
            raise ConfigError("--encoding int8: a model's maps aren't quantised; use float16 or float32")
        if self.dataset not in DATASETS:
            raise ConfigError(f"--dataset {self.dataset}: there are {', '.join(DATASETS)}")
        wanted, has = TASKS[self.task].label, DATASETS[self.dataset].label
        if wanted != has:
            fitting = [name for name, kind in DATASETS.items() if kind.label == wanted]
            raise ConfigError(f"--task {self.task} needs {wanted}; --dataset {self.dataset} has {has}. Use {', '.join(fitting)}")
        require_depth(self.dataset, self.depth_scale)
        if self.store and self.drawing == "paper":
            raise ConfigError("--drawing paper needs a model: the images of a store are drawn as jobs/extract.py does it")
        if self.method == "depth_bins" and self.task != "depth":
            raise ConfigError(f"--method depth_bins predicts depth; --task {self.task} needs another")

    @property
    def places(self) -> tuple[str, ...]:
        return self.data, self.store, self.val_store, self.out

    @property
    def rendering(self) -> Rendering:
        """`drawing`, its default resolved."""
        return self.drawing or ("extract" if self.store else "paper")

    @property
    def level_name(self) -> str:
        """Of `level`, without what makes it."""
        return level_name(self.level)

    @property
    def levels(self) -> tuple[str, ...]:
        """The levels that are computed, as an evaluation names them."""
        base = () if self.level_name == "x1" else ("x1",)
        return (*base, self.level, *(("pooled",) if READOUTS[self.method].needs_pooled else ()))

    def build_task(self, train: Sequence[LabelledImage]) -> Task:
        """The task on the images that are trained on. Raises `ConfigError` for settings that aren't its own."""
        return TASKS[self.task].of(self, DATASETS[self.dataset], train)

    def readout(self, task: Task, level: Level) -> ReadoutConfig:
        """The readout for maps of a level. Raises `ConfigError`."""
        settings = {"method": self.method, "channels": level.channels, "outputs": task.outputs, "split": task.split}
        settings["output"] = (self.side, self.side)
        taken = READOUTS[self.method].settings
        if "grid" in taken:
            settings["grid"] = level.grid
        if self.task == "depth" and "output_bias" in taken:
            settings["output_bias"] = 1.0
        given = {name: getattr(self, name) for name in ("dim", "mask", "shared_sigma", "only_mask", "width", "hidden")}
        plain = ReadoutTraining()
        settings |= {name: value for name, value in given.items() if value != getattr(plain, name)}
        try:
            return ReadoutConfig(**settings)
        except ReadoutError as error:
            raise ConfigError(str(error)) from None

    def identity(self, found: JsonObject) -> dict[str, JsonValue]:
        """As for all runs; of features that a store holds, what is `found` of them, not the settings that nothing used."""
        made_of = super().identity(found)
        return {name: value for name, value in made_of.items() if not (self.store and name in FEATURES)}

    def resolve(self) -> "ReadoutSetup":
        """List the data set, load the model or open the stores.

        Raises `ConfigError`, `DatasetError`, `BackboneError`, `UpsamplerError`, `WeightsUnavailable`, `StorageError`.
        """
        folder, kind = self.begin_folder(), DATASETS[self.dataset]
        if not self.data:
            raise ConfigError("no data: give --data the data set's folder")
        reading = LabelReading(frame=self.label_frame, depth_scale=self.depth_scale)
        train, held_out = (
            load_labelled(self.dataset, absolute(self.data), split, self.options, limit, reading)
            for split, limit in ((self.split or kind.splits[0], self.limit), (self.val_split or kind.splits[1], self.val_limit))
        )
        task = self.build_task(train)
        # Once each: opening reads a store's root, and its index is read when samples are looked up.
        opened = functools.cache(lambda url: FeatureStore.open(url, self.options))
        spec, bundle = self._features(task, opened)
        level = _level(spec, self.level_name, self.store)
        _require_made_for(self.method, level)
        pooled = _pooled(spec, self.store) if READOUTS[self.method].needs_pooled else None
        read = [name for name in (level.name, pooled) if name]
        sources = [
            self._source(items, task, spec, opened(url) if url else None, read)
            for items, url in ((train, self.store), (task.judged(held_out), self.val_store or self.store))
        ]
        readout, features = self.readout(task, level), features_of(spec, level)
        description = {
            "readout": readout.to_json(),
            "task": {"name": self.task, "dataset": self.dataset, **task.as_json()},
            "features": {**features, "drawing": self.rendering},
        }
        return ReadoutSetup(
            config=self,
            folder=folder,
            description=description,
            order=self.order(len(train)),
            images=sources[0],
            held_out_rows=tuple(range(len(sources[1].items))),
            held_out=sources[1],
            readout=readout,
            features=features,
            numbers={name: value for name, value in spec.numbers(read).items() if name not in features},
            saved=recorded(self, [opened(self.store)] if self.store else []),
            level=level.name,
            pooled=pooled,
            bundle=bundle,
        )

    def _features(self, task: Task, opened: Callable[[str], FeatureStore]) -> tuple[FeatureSpec, ModelBundle | None]:
        """What the features are, and the model where it runs."""
        size = self.features.size
        if self.store:
            store = opened(self.store)
            named = {} if self.level == self.level_name else {"levels": (self.level,)}
            AskedFeatures.of(self, **named).require(store, "--store")
            require_geometry(store, task.placement)
            return store.spec, None
        features = completed(self.features, size=None, levels=self.levels)
        choice = SourceChoice(features=features, rendering=self.rendering, options=self.options)
        recipe, (found,) = resolve_source(choice, ((size, size),) if size else (), task.placement)
        bundle = recipe.bundle(found)
        if not self.normalise:
            bundle = replace(bundle, spec=replace(bundle.spec, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
        return bundle.spec, bundle

    def _source(
        self, items: Sequence[LabelledImage], task: Task, spec: FeatureSpec, store: FeatureStore | None, levels: Sequence[str]
    ) -> LabelledSource:
        """Examples of `items`, of `levels` of the store if there is one. Raises `ConfigError` where it isn't of `spec`."""
        contents, stored = content_digests([item.image for item in items]), None
        if store is not None:
            if found := differences(store.spec.numbers(levels), spec.numbers(levels)):
                lines = found.text("--val-store", "--store")
                raise ConfigError(f"--val-store {store.folder.displayed} holds other features than --store:\n{lines}")
            stored = StoredMaps.of(store, levels, items, contents)
        return LabelledSource(
            items=tuple(items), contents=tuple(contents), task=task, spec=spec, rendering=self.rendering, stored=stored
        )


def _level(spec: FeatureSpec, name: str, store: str) -> Level:
    found = next((level for level in spec.levels if level.name == name and level.grid), None)
    if found is None:
        have = ", ".join(level.name for level in spec.levels if level.grid)
        raise ConfigError(f"--level {name}: {store or spec.model} has the maps {have}")
    return found


def _require_made_for(method: str, level: Level) -> None:
    if (reads := READOUTS[method].reads) not in ("", level.method):
        raise ConfigError(
            f"--method {method} reads a map that {reads} has enlarged, and --level {level.name} is {level.method}'s; give "
            f"--level x16={reads}:URL, or the name of such a level of --store"
        )


def _pooled(spec: FeatureSpec, store: str) -> str:
    found = pooled_level(spec.levels)
    if found is None:
        raise ConfigError(f"--method depth_bins reads the CLS vector, which {store or spec.model} doesn't have")
    return found


FEATURES = frozenset(name for name, each in settings_of(ReadoutTraining).items() if each.path[0] == "features")
"""Settings that make features: with a store, its own."""

READ = (*FeatureSpec.names(Use.LEARNED, Use.LEARNED_LATER), "input_size")
"""The fields of a spec that a readout's features depend on, beside the level that it reads."""


def features_of(spec: FeatureSpec, level: Level) -> dict[str, JsonValue]:
    """What a readout's features are: it makes sense on the same ones only."""
    found = {name: value for name, value in spec.to_json().items() if name in READ}
    grid = level.grid and list(level.grid)
    return found | {"level": {"name": level.name, "method": level.method, "grid": grid, "digest": level.digest}}


@dataclass(frozen=True, kw_only=True)
class ReadoutSetup(TrainSetup):
    """A readout's run: settings held against the data set and the features, before any cluster is asked for anything."""

    config: ReadoutTraining
    images: LabelledSource
    held_out: LabelledSource
    readout: ReadoutConfig
    features: Mapping[str, Any]
    numbers: JsonObject
    "what else makes the features' numbers, and be it that it only rounds them"
    saved: JsonObject
    "the settings as run.json has them"
    level: str
    pooled: str | None
    bundle: ModelBundle | None
    "None: features come from a store"

    def prepare(self, executor: Executor) -> Self:  # noqa: ARG002 - nothing is left to be read
        """Begin or continue the folder. Raises `CheckpointError`, and `ConfigError` where it was begun with other settings."""
        # A live model's images may be drawn as a store's aren't.
        found = {"features": self.features, "drawing": self.config.rendering, "numbers": self.numbers}
        for name, labels, rows, source in (
            ("images", "labels_content", "rows_content", self.images),
            ("held_out", "held_out_labels_content", "held_out_rows_content", self.held_out),
        ):
            found |= {name: digest(source.items), f"{name}_content": joint_digest(source.contents)}
            found[labels] = joint_digest(content_digests([item.label for item in source.items]))
            found[rows] = source.stored.join.content if source.stored else ""
        same = same_contents(self.images.named_contents, self.held_out.named_contents)
        of, instead = len(self.held_out.items), "Give another --split or --val-split"
        seen = require_apart(same, self.held_out, of, allowed=self.config.overlap, instead=instead)
        joins = [source.stored.join for source in (self.images, self.held_out) if source.stored is not None]
        # What the settings of features come to is in `found`, of a model and of a store alike.
        self.config.begin(self.folder, found, self.order, joins, saved=self.saved, aside=FEATURES)
        return replace(self, seen=seen)

    def objective(self, device: torch.device) -> Objective:
        return ReadoutObjective(self, device)


class ReadoutObjective:
    """A readout, its features, and the loss of a micro-batch (pipelines/training/config.py, `Objective`)."""

    def __init__(self, setup: ReadoutSetup, device: torch.device):
        self.setup, self.config, self.device, self.task = setup, setup.config, device, setup.images.task
        self.net = self.task.network(build_readout(setup.readout, setup.config.seed), setup.config.seed).to(device)
        self.beside = nn.Module()
        self.model = setup.bundle and setup.bundle.build(str(device))
        self.clipped: Tensor | int = 0

    def accumulate(self, loaded: Loaded) -> tuple[Tensor, float]:
        """Adds the gradient of the task's summed loss to the readout's; gives that sum, and its divisor."""
        arrays = dict(loaded.example.arrays)
        if self.config.flip and np.random.default_rng([self.config.seed, loaded.item.step]).random() < 0.5:
            # Of an image [B, H, W, 3], and of targets [B, ..., H, W].
            arrays = {n: np.flip(a, 2 if n == PIXELS else -1).copy() for n, a in arrays.items()}
        total, divisor = self._loss(self._outputs(arrays), self._targets(arrays), loaded.item.step)
        total.backward()
        return total.detach(), divisor

    def _outputs(self, arrays: Mapping[str, np.ndarray]) -> Tensor:
        """The readout's, float32 [B, outputs, side, side]."""
        read = [name for name in (self.setup.level, self.setup.pooled) if name]
        if self.model:
            # Infinite where they aren't as a store has them, and the readout would be NaN from then on.
            rows, beyond = self.model(arrays[PIXELS]).as_stored()
            counts = [beyond[name] for name in read if name in beyond]
            self.clipped = torch.stack(counts).any(dim=0).sum() if counts else 0
        else:
            rows = {name: self._there(arrays[stored_array(name)]) for name in read}
        maps = rows[self.setup.level].float().permute(0, 3, 1, 2)
        pooled = rows[self.setup.pooled].float() if self.setup.pooled else None
        with autocast(self.device, self.config.net_precision):
            return self.net(maps, (self.task.side, self.task.side), pooled).float()

    def _targets(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        return {name: self._there(arrays[name]) for name in self.task.target_names}

    def _there(self, values: np.ndarray) -> Tensor:
        return to_device(values, self.device)

    def _loss(self, outputs: Tensor, targets: Mapping[str, Tensor], step: int) -> tuple[Tensor, float]:
        return self.task.loss(self.net, outputs, targets, step)

    # --- held-out images ----------------------------------------------------------------------------------------------

    def measure(self, step: int) -> Validation:
        """The task's scores on the held-out images, and `val_loss`."""
        records, losses, panels, left_out = self._judge()
        try:
            scores, divisor = self.task.scores(records), sum(weight for _, weight in losses)
        except ValueError as error:
            if records:
                logger.warning("held-out images can't be scored: %s", error)
            return Validation(empty=len(records), left_out=left_out)
        # The best checkpoint is that of the smallest.
        loss = sum(total for total, _ in losses) / divisor if divisor else -scores[self.task.better]
        values = {"val_loss": loss, **{f"val_{name}": value for name, value in scores.items()}}
        legend = self.task.legend([each for _, *drawn in panels for each in drawn], DATASETS[self.config.dataset].names)
        picture = panel_picture(f"step {step}: {self.task.name}", ["photo", self.config.method, "truth"], panels, legend)
        empty = sum(map(self.task.is_empty, records))
        return Validation(values=values, picture=picture, images=len(records) - empty, empty=empty, left_out=left_out)

    def _judge(self) -> tuple[list["DataclassInstance"], list[tuple[float, float]], list[list[np.ndarray]], dict[int, str]]:
        """Records of the held-out images, losses as (total, divisor), the first images with what was made of them, and why
        others are left out, by row."""
        source, rows = self.setup.held_out, self.setup.held_out_rows
        records: list[DataclassInstance] = []
        losses: list[tuple[float, float]] = []
        panels: list[list[np.ndarray]] = []
        failed: dict[int, str] = {}
        at_once = min(self.config.forward_images, 16)
        for start in range(0, len(rows), at_once):
            asked = rows[start : start + at_once]
            example = source.load(asked, None)
            failed |= example.failed
            there = [row for row in asked if row not in example.failed]
            if not there:
                continue
            outputs, of_all = self._outputs(example.arrays), self._targets(example.arrays)
            if self.task.has_held_out_loss:
                total, divisor = self._loss(outputs, of_all, LONG_AFTER)
                losses.append((float(total), divisor))
            for position, row in enumerate(there):
                targets = {name: each[position] for name, each in of_all.items()}
                label = source.label(row) if self.task.judges_label else None
                records.append(self.task.judge(outputs[position], targets, label))
                if len(panels) < 4:
                    panels.append([source.photo(row), *self.task.pictures(outputs[position], targets)])
        return records, losses, panels, failed
