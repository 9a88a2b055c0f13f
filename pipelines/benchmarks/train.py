"""Throughput of training: this loop, inline and on Ray Train, beside the loop that one would write without it.

The plain loop is PyTorch, torchvision and timm alone, in one process: its own dataset over the tars, a DataLoader, a hook for
the keys, LiFT's loss through `cosine_embedding_loss`. Only the network is the same code (operators/upsamplers/lift.py).
"""

import contextlib
import io
import logging
import tarfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cluster.session import connect
from operators.upsamplers import build_net
from pipelines.benchmarks.data import write_photos
from pipelines.benchmarks.feeding import Fed, Feeding, feeding_report, measure_feeding
from pipelines.config import require_at_least
from pipelines.costs.clocks import WARM_UP, Machine, NumbersFile, device_of, rated_steps, steady_rate
from pipelines.costs.process import CORES
from pipelines.executors import InlineExecutor, RayExecutor
from pipelines.results import number_lines
from pipelines.training.lift import X2Config
from pipelines.training.run import train_inline, train_on_ray
from storage.paths import Folder

logger = logging.getLogger(__name__)

PLAIN = "plain loop, no DataLoader workers"


@dataclass(frozen=True, kw_only=True)
class TrainBenchmark:
    """Images per second of LiFT's training, against a plain loop on the same photographs."""

    images: int = 256
    """Photos to generate, as for `extract`."""
    model: str = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    """timm name of a plain ViT with absolute position embeddings; its weights are random."""
    size: int = 256
    """Side of the square input in pixels."""
    batch: int = 16
    """Images per step."""
    steps: int = 16
    """Steps of each contender in each round; the first two aren't counted."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """Autocast of the backbone's forward, in everything that is compared."""
    repeat: int = 3
    """Rounds; each runs every contender once. Rates are the best of them."""
    ray: bool = True
    """Run Ray Train, too: one worker per core, one thread each, half of a batch for each of two."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where all but the network that sleeps is trained."""
    loaders: int = 16
    """Loaders that feed a network that sleeps."""
    fed_steps: int = 100
    """Steps of it that are counted; as many as loaders are ahead come before and after."""
    decode_s: float = 5.0
    """Seconds for which the CPUs decode alone, before and after each loop."""
    json: NumbersFile = ""

    @property
    def feeding(self) -> Feeding:
        shared = {name: getattr(self, name) for name in ("loaders", "batch", "size", "model")}
        return Feeding(steps=self.fed_steps, bare_s=self.decode_s, **shared)

    def __post_init__(self) -> None:
        require_at_least(1, self, "images", "batch", "repeat", "loaders", "fed_steps")
        require_at_least(WARM_UP + 1, self, "steps")


# No network. 2 CPU cores: about 15 seconds, and the numbers mean nothing at this size; the defaults take about 5 minutes.
DEBUG = TrainBenchmark(
    images=16, model="test_vit.r160_in1k", size=64, batch=4, steps=4, repeat=1, ray=False, loaders=2, fed_steps=5, decode_s=0.2
)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Images per second by contender."""

    rates: Mapping[str, Sequence[float]]
    "of every round"
    best: Mapping[str, float]
    ratios: Mapping[str, float]
    "of the best to that of the plain loop"
    fed: Fed


def measure_training(config: TrainBenchmark, folder: Path) -> TrainResult:
    """Every contender in every round."""
    photos, rates = write_photos(folder / "photos", config.images), defaultdict[str, list[float]](list)
    with connect(None, num_gpus=0) if config.ray else contextlib.nullcontext():
        for n in range(config.repeat):
            for name, rate in _round(config, folder / f"round-{n}", photos):
                logger.info("round %d of %d: %s, %.2f images/s", n + 1, config.repeat, name, rate)
                rates[name].append(rate)
    fed = measure_feeding(config.feeding, folder / "fed", photos, ray=config.ray)
    best = {name: max(found) for name, found in rates.items()}
    return TrainResult(rates=dict(rates), best=best, ratios={name: rate / best[PLAIN] for name, rate in best.items()}, fed=fed)


def _round(config: TrainBenchmark, folder: Path, photos: str) -> Iterator[tuple[str, float]]:
    yield PLAIN, _plain_loop(config, photos, 0)
    yield "this loop, inline", _this_loop(config, str(folder / "inline"), photos, 1)
    yield f"plain loop, {CORES} DataLoader workers", _plain_loop(config, photos, CORES)
    if config.ray:
        yield f"this loop on Ray Train, {CORES} workers", _this_loop(config, str(folder / "ray"), photos, CORES)


def _this_loop(config: TrainBenchmark, out: str, photos: str, workers: int) -> float:
    run = X2Config.of(
        data=(photos,),
        out=out,
        val_rows=1,
        model=config.model,
        weights="random",
        size=config.size,
        precision=config.precision,
        batch=config.batch,
        micro_batch=-(-config.batch // workers),
        epochs=config.steps,  # more than enough
        max_steps=config.steps,
        log_every=1,
        executor="inline" if workers == 1 else "ray",
        workers=workers,
        device=config.device,
    )
    setup = run.resolve().prepare(InlineExecutor() if workers == 1 else RayExecutor())
    train_inline(setup) if workers == 1 else train_on_ray(setup, config.device)
    return steady_rate(rated_steps(Folder(out)))


def train_report(config: TrainBenchmark, result: TrainResult, machine: Machine) -> Iterator[str]:
    """The numbers as Markdown, line by line."""
    yield f"## train: LiFT on {config.model} at {config.size} px, {config.precision}, batches of {config.batch}"
    yield machine.usual_line()
    rounds = {name: " ".join(f"{rate:.1f}" for rate in rates) for name, rates in result.rates.items()}
    rows = [[name, result.best[name], result.ratios[name], text] for name, text in rounds.items()]
    yield from number_lines({"": "", "images/s, best": ".2f", "of the plain loop": ".2f", "by round": ""}, rows)
    yield from feeding_report(config.feeding, result.fed)
    yield f"""
- From the {WARM_UP + 1}th step on; waiting for images counts, checkpoints and validation don't (the plain loop has none).
- Colour jitter and all three scales of the backbone are computed in each."""


# --- the plain loop ---------------------------------------------------------------------------------------------------


class _Photos(Dataset[Tensor]):
    """All photographs of some tars, kept as JPEG bytes."""

    def __init__(self, paths: Sequence[Path], config: TrainBenchmark):
        from torchvision import transforms

        self.jpegs: list[bytes] = []
        for path in paths:
            with tarfile.open(path) as tar:
                self.jpegs += [file.read() for member in tar if (file := tar.extractfile(member))]
        self.transform = transforms.Compose(
            [
                transforms.Resize((config.size, config.size)),
                transforms.ColorJitter(0.2, 0.2, 0.2, 0.2),
                transforms.ToTensor(),
                transforms.Normalize((0.5,) * 3, (0.5,) * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.jpegs)

    def __getitem__(self, i: int) -> Tensor:
        return self.transform(Image.open(io.BytesIO(self.jpegs[i])).convert("RGB"))


class _Keys(nn.Module):
    """The keys of a timm ViT's last block, as maps."""

    def __init__(self, config: TrainBenchmark):
        super().__init__()
        model = timm.create_model(config.model, dynamic_img_size=True, num_classes=0).eval().requires_grad_(False)
        self.vit = cast(VisionTransformer, model)
        self.patch: int = self.vit.patch_embed.patch_size[0]
        self.vit.blocks[-1].get_submodule("attn.qkv").register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, __: tuple[Tensor, ...], qkv: Tensor) -> None:
        self.keys = qkv.chunk(3, dim=-1)[1][:, self.vit.num_prefix_tokens :]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        self.vit.forward_features(images)
        side = images.shape[-1] // self.patch
        return self.keys.transpose(1, 2).unflatten(2, (side, side)).float()


def _plain_loop(config: TrainBenchmark, photos: str, workers: int) -> float:
    paths = sorted(Path(photos).parent.glob(Path(photos).name))
    loader = DataLoader(_Photos(paths, config), config.batch, shuffle=True, num_workers=workers, drop_last=True)
    device = device_of(config.device)
    backbone = _Keys(config).to(device)
    net = build_net({"method": "lift", "channels": backbone.vit.num_features, "patch": backbone.patch}).to(device)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    step, counted, begun = 0, 0, 0.0
    while step < config.steps:
        for images in loader:
            if step == WARM_UP:
                begun, counted = time.perf_counter(), 0
            if step == config.steps:
                break
            _plain_step(backbone, net, optimiser, images.to(device), config.precision)
            step, counted = step + 1, counted + len(images)
    return counted / (time.perf_counter() - begun)


def _plain_step(backbone: nn.Module, net: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, precision: str) -> None:
    half, quarter = images[..., ::2, ::2].contiguous(), images[..., ::4, ::4].contiguous()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        full, coarse, coarser = backbone(images), backbone(half), backbone(quarter)
    loss = _distance(net(half, coarse), full) + _distance(net(quarter, coarser), coarse)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    loss.item()  # as one would log it


def _distance(ours: Tensor, target: Tensor) -> Tensor:
    ours, target = (maps.flatten(2).transpose(1, 2).flatten(0, 1) for maps in (ours, target))
    return F.cosine_embedding_loss(ours, target, torch.ones(len(ours), device=ours.device))
