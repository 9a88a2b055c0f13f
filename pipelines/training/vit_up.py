"""Training ViT-Up: a head and an adapter learn, from a small image on a canvas, the frozen model's features of the large one.

arXiv 2606.14024. No sentence or line is taken from its repository, which carries no licence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from operators.backbone import TimmBackbone, autocast
from operators.image import Geometry
from operators.objectives.lift import cosine_loss
from operators.objectives.vit_up import TEMPERATURE, LossWeights, Supervision, objective
from operators.transfer import to_device
from operators.upsamplers import UpsamplerError, find_method
from operators.upsamplers.vit_up.geometry import grid_coordinates
from operators.upsamplers.vit_up.head import TokenCache, ViTUpConfig, ViTUpHead
from operators.upsamplers.vit_up.hidden import AdaptedBackbone
from operators.upsamplers.vit_up.lora import Lora
from operators.upsamplers.vit_up.start import start_enlarging
from pipelines.config import ConfigError, Counts, Free, require_above, used_with
from pipelines.features.model_bundle import ModelBundle
from pipelines.training.data import CanvasView, Loaded
from pipelines.training.images import ImageObjective, ImageSetup, ImageTraining
from storage.documents import JsonValue

ENLARGED = 4
"""Cells of the validation's grid to one of the backbone's, a side."""

MAX_QUERIES = 4096
"""At work at once in validation."""


@dataclass(frozen=True, kw_only=True)
class ViTUpTraining(ImageTraining):
    """Settings of one training run: ViT-Up learns a frozen backbone's features at any coordinates of an image."""

    word: ClassVar[str] = "vit_up"
    trains: ClassVar[str] = "vit_up"
    trained_by: ClassVar[str] = "ViT-Up's distillation"
    level: ClassVar[str] = "x4"
    later: ClassVar[Sequence[str]] = ("start", "relational_tau", "relational_itself")

    method: Counts[Literal["vit_up", "vit-up"]] = "vit_up"
    """The network."""
    canvas: Annotated[Counts[int], tyro.conf.arg(name="size")] = 896
    """Side of the square that the teacher sees and of the canvas that the student sees, in pixels."""
    teacher_sizes: Counts[tuple[int, ...]] = (224, 448, 896)
    """Sides at which the teacher looks at the square; each 2, 4, 8, ... times the one before."""
    hidden_size: Counts[int] = 448
    """Side at which the student's backbone looks at its image: while training, at the canvas."""
    query_size: Counts[int] = 3584
    """Side at which the student's image is embedded for the queries."""
    hidden_states: Counts[tuple[int, ...]] = (0, 2, 4, 6, 8, 10, 12)
    """Hidden states that are read and learned: 0 the patch embedding, n what comes out of n blocks."""
    window: Annotated[Counts[int | None], used_with(cross_attention=True)] = None
    """Tokens a side that a query sees round its nearest one; default: all, as published."""
    strength: Counts[float] = 1.0
    """Of the augmentation; 0 for none."""
    chunk_blocks: Counts[int] = 49
    """Blocks of queries (one for each token of the smallest teacher image) that one forward and backward takes."""

    featx: Counts[bool] = True
    """False for the ablation without FeatX."""
    cross_attention: Counts[bool] = True
    """False for the ablation without cross-attention."""
    lora: Counts[bool] = True
    """False for the ablation with the backbone as it is."""
    rank: Annotated[Counts[int], used_with(lora=True)] = 16
    """Of LoRA; its products are scaled by 2."""
    start: Counts[Literal["drawn", "enlargement"]] = "drawn"
    """Weights before the first step. `drawn` at random, as the paper's; `enlargement` is the same network with weights by which
    it enlarges hidden states bilinearly, so that a short run has only to learn what is better than that."""
    l2_weight: Counts[float] = 1.0
    """Of the standardised squared difference."""
    cosine_weight: Counts[float] = 1.0
    """Of the cosine distance."""
    relational_weight: Counts[float] = 1.0
    """Of the divergence between the tokens' similarities; 0 for the ablation without it."""
    relational_tau: Annotated[Counts[float], used_with(relational_weight=True)] = TEMPERATURE
    """What cosines are divided by in it: the smaller, the more the most similar tokens count."""
    relational_itself: Annotated[Counts[bool], used_with(relational_weight=True)] = False
    """Whether a token is among those that it is compared with; the paper's isn't."""

    batch: Counts[int] = 24
    """Images per optimiser step, over all workers."""
    epochs: Free[int] = 1
    """Passes over the training images."""
    lr: Counts[float] = 2e-4
    """Adam's learning rate at its peak, without weight decay."""
    schedule: Counts[Literal["constant", "cosine"]] = "cosine"
    """Of the learning rate; `cosine` falls to --final-lr at the last step."""
    warmup_steps: Counts[int] = 2669
    """cosine: steps over which the learning rate first rises linearly from a hundredth."""
    clip: Counts[float | None] = 1.0
    """Largest norm of the gradient; a larger one is scaled down to it."""
    net_precision: Counts[Literal["bf16", "fp32"]] = "bf16"
    """Autocast of the student's forward; weights, coordinates, the loss and the optimiser are always float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("strength", "l2_weight", "cosine_weight", "relational_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 0")
        if self.start == "enlargement" and not self.cross_attention:
            raise ConfigError(
                "--start enlargement: it's the attention that enlarges; drop --no-cross-attention, or use --start drawn"
            )
        require_above(0, self, "relational_tau")
        if not self.l2_weight + self.cosine_weight + self.relational_weight:
            raise ConfigError("--l2-weight, --cosine-weight and --relational-weight: one must be above 0")

    @property
    def backbone_size(self) -> int:
        """Side of the image that the student's backbone is given."""
        return self.hidden_size

    def trained_sides(self, patch: int) -> tuple[int, ...]:  # noqa: ARG002
        return (self.hidden_size,)

    def network(self, backbone: TimmBackbone) -> dict[str, JsonValue]:
        """The network's settings, as a checkpoint has them. Raises `ConfigError` for sizes that don't go together."""
        sides = {"--hidden-size": self.hidden_size, "--query-size": self.query_size}
        sides |= {f"--teacher-sizes {' '.join(map(str, self.teacher_sizes))}": side for side in self.teacher_sizes}
        for flag, side in sides.items():
            if side % backbone.patch or side < backbone.patch:
                raise ConfigError(f"{flag}: {side} is no multiple of {self.features.model}'s patches of {backbone.patch} px")
        if self.hidden_states[-1] != backbone.n_layers:
            raise ConfigError(
                f"--hidden-states {' '.join(map(str, self.hidden_states))}: the last must be {backbone.n_layers}, what comes "
                f"out of {self.features.model}"
            )
        try:
            Supervision(grids=tuple(side // backbone.patch for side in self.teacher_sizes))
            config = ViTUpConfig(
                channels=backbone.channels,
                heads=backbone.heads,
                layers=self.hidden_states,
                window=self.window,
                query_size=self.query_size,
                hidden_size=self.hidden_size,
                featx=self.featx,
                cross_attention=self.cross_attention,
                lora=self.lora,
                rank=self.rank,
                alpha=2.0 * self.rank,
            )
        except (UpsamplerError, ValueError) as error:
            raise ConfigError(f"{self.features.model}: {error}") from None
        return find_method(self.method).to_json(config)

    def view(self, backbone: ModelBundle) -> CanvasView:  # noqa: ARG002
        return CanvasView(size=self.canvas, strength=self.strength)

    def objective(self, setup: ImageSetup, device: torch.device) -> "ViTUpObjective":
        return ViTUpObjective(self, setup, device)


class ViTUpNet(nn.Module):
    """What is trained, under the names of the published files: the head's, and the adapter's below `backbone`."""

    def __init__(self, head: ViTUpHead, lora: Lora | None):
        super().__init__()
        for name, module in head.named_children():
            self.add_module(name, module)
        if lora is not None:
            self.backbone = lora


@dataclass
class Distillation:
    """A student with an adapted backbone, and the plain backbone as its teacher.

    Raises `ValueError` for teacher sizes that are no ladder (`Supervision`).
    """

    backbone: AdaptedBackbone
    head: ViTUpHead
    teacher_sizes: Sequence[int]
    chunk_blocks: int
    weights: LossWeights
    precision: str = "fp32"
    net_precision: str = "fp32"

    def __post_init__(self) -> None:
        grids = tuple(side // self.backbone.patch for side in self.teacher_sizes)
        self.supervision = Supervision(grids=grids, chunk_blocks=self.chunk_blocks)

    def backward(self, square_BCHW: Tensor, canvas_BCHW: Tensor, boxes_B4: Tensor) -> Tensor:
        """The gradient of the images' summed loss is added to the parameters'; gives that sum.

        One backward for each chunk of queries, as far as what all of them read, then one for that.
        """
        targets, cache = self._targets(square_BCHW), self.prepare(canvas_BCHW)
        leaves, total = cache.detached(), boxes_B4.new_zeros(())
        for chunk in self.supervision.chunks:
            loss = self._chunk_loss(targets, leaves, boxes_B4, chunk) * len(boxes_B4) / len(self.supervision.chunks)
            loss.backward()
            total += loss.detach()
        cache.backward(leaves)
        return total

    def loss(self, square_BCHW: Tensor, canvas_BCHW: Tensor, boxes_B4: Tensor) -> Tensor:
        """The images' mean loss, without gradients."""
        with torch.no_grad():
            targets, cache = self._targets(square_BCHW), self.prepare(canvas_BCHW)
            chunks = self.supervision.chunks
            return torch.stack([self._chunk_loss(targets, cache, boxes_B4, chunk) for chunk in chunks]).mean()

    def teacher(self, images_BCHW: Tensor, side: int, layers: Sequence[int]) -> list[Tensor]:
        """The plain model's hidden states of the images at a size, float32 [B, h, w, D]."""
        with torch.no_grad(), self.backbone.unadapted(), autocast(images_BCHW.device, self.precision):
            return [state.float() for state in self.backbone.hidden(images_BCHW, layers, (side, side))]

    def prepare(self, images_BCHW: Tensor) -> TokenCache:
        """What of the student's images all queries read."""
        with autocast(images_BCHW.device, self.net_precision):
            return self.head.prepare(*self.student(images_BCHW))

    def student(self, images_BCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The query grid [B, D, gh, gw] and the hidden states [B, h, w, D] of the student's images."""
        config = self.head.config
        query_grid = self.backbone.query_grid(images_BCHW, (config.query_size,) * 2)
        return query_grid, self.backbone.hidden(images_BCHW, config.layers, (config.hidden_size,) * 2)

    def grid(self, cache: TokenCache, grid: tuple[int, int]) -> Tensor:
        """The student's last layer on a grid over the whole image, float32 [B, D, *grid]."""
        device, parts = cache.query_grid.device, []
        coords = grid_coordinates(grid, device=device).expand(len(cache.query_grid), -1, -1)
        for some in coords.split(MAX_QUERIES, dim=1):
            with torch.no_grad(), autocast(device, self.net_precision):
                parts.append(self.head.query(cache, some, [-1])[0].float())
        return torch.cat(parts, dim=1).unflatten(1, grid).permute(0, 3, 1, 2)

    def _targets(self, square: Tensor) -> list[list[Tensor]]:
        """The teacher's maps [size][layer]."""
        return [self.teacher(square, side, self.head.config.layers) for side in self.teacher_sizes]

    def _chunk_loss(self, targets: Sequence[Sequence[Tensor]], cache: TokenCache, boxes: Tensor, chunk: slice) -> Tensor:
        with autocast(boxes.device, self.net_precision):
            found = self.head.query(cache, self.supervision.queries(boxes, chunk))
        predicted = [self.supervision.predictions(layer.float()) for layer in found]
        wanted = [self.supervision.targets([maps[i] for maps in targets], chunk) for i in range(len(found))]
        return objective(predicted, wanted, self.weights).total


class ViTUpObjective(ImageObjective):
    """Head, adapter and frozen backbone on a run's images.

    `val_loss` is the training's, of views that are drawn once and for all and not augmented. `val_cosine` is that of the
    network's map of an image of --hidden-size, at four times the backbone's cells a side, with the backbone's own map of
    the image four times as large. `val_cosine_bilinear` is bilinear enlargement's.
    """

    metrics = ("val_loss", "val_cosine", "val_cosine_bilinear")
    larger = f"{ENLARGED} times"

    def __init__(self, config: ViTUpTraining, setup: ImageSetup, device: torch.device):
        super().__init__(config, setup, device)
        self.side, self.at_once = config.hidden_size, 1
        settings = find_method(config.method).parse(setup.upsampler)
        model = setup.backbone.reload()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            head = ViTUpHead(settings)
            lora = Lora(model, rank=config.rank, alpha=settings.alpha) if config.lora else None
        self.net = ViTUpNet(head, lora).to(device)
        self.task = Distillation(
            AdaptedBackbone(model, lora).to(device),
            head,
            teacher_sizes=config.teacher_sizes,
            chunk_blocks=config.chunk_blocks,
            weights=LossWeights(
                l2=config.l2_weight,
                cosine=config.cosine_weight,
                relational=config.relational_weight,
                tau=config.relational_tau,
                itself=config.relational_itself,
            ),
            precision=config.features.precision,
            net_precision=config.net_precision,
        )
        if config.start == "enlargement" and not setup.steps_done():
            self._start_enlarging()

    @torch.no_grad()
    def _start_enlarging(self) -> None:
        images = self.starting_images(self._geometry, [self.side]).arrays[str(self.side)]
        given = [self.task.student(self.input(image[None])) for image in images]
        query_grids, hidden = zip(*given, strict=True)
        start_enlarging(self.task.head, torch.cat(query_grids), [torch.cat(states) for states in zip(*hidden, strict=True)])

    @property
    def _geometry(self) -> Geometry:
        mean = self.setup.backbone.spec.mean
        return Geometry(mode="crop", height=self.side, width=self.side, interpolation="bilinear", mean=mean)

    def accumulate(self, loaded: Loaded) -> tuple[Tensor, float]:
        """Adds the gradient of the images' summed loss to the network's; gives that sum and their number."""
        return self.task.backward(*self._batch(loaded.example.arrays)), len(loaded)

    def _batch(self, arrays: Mapping[str, np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
        """What the teacher and the student see, and the boxes."""
        boxes = to_device(arrays["box"], self.device)
        return self.input(arrays["teacher"]), self.input(arrays["canvas"]), boxes

    # --- held-out images ----------------------------------------------------------------------------------------------

    def measure_some(self, rows: Sequence[int], panels: list[list[np.ndarray]]) -> tuple[np.ndarray, Mapping[int, str]]:
        view, sides = self.setup.held_out.load(rows, None), (self.side, ENLARGED * self.side)
        found = self.setup.held_out.at_sides(rows, self._geometry, sides)
        if failed := {**found.failed, **view.failed}:  # of one row
            return np.zeros(len(self.metrics)), failed
        small, large = (found.arrays[str(side)] for side in sides)
        loss, last = float(self.task.loss(*self._batch(view.arrays))), self.task.head.config.layers[-1:]
        wanted, coarse = (
            self.task.teacher(self.input(image), image.shape[1], last)[0].permute(0, 3, 1, 2) for image in (large, small)
        )
        plain = F.interpolate(coarse, scale_factor=ENLARGED, mode="bilinear", align_corners=False)
        ours = self.task.grid(self.task.prepare(self.input(small)), tuple(wanted.shape[-2:]))
        panels.append([small[0], *(m[0].permute(1, 2, 0).cpu().numpy() for m in (coarse, plain, ours, wanted))])
        cosines = [1 - float(cosine_loss(found, wanted)) for found in (ours, plain)]
        return np.array([loss, *cosines]), {}
