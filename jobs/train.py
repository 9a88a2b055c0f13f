"""Train on a frozen backbone's features: upsamplers on the features themselves, readouts on labels.

    python jobs/train.py debug
    python jobs/train.py lift --data 's3://bucket/train-{000000..001281}.tar' --out s3://bucket/lift --weights ...
    python jobs/train.py lift-dino-s16-imagenet --data ... --out ... --workers 4 --micro-batch 64
    python jobs/train.py vit-up-dinov3-splus-imagenet --data ... --out ...
    python jobs/extract.py --levels x1 x2=lift:s3://bucket/lift ...
    python jobs/train.py deap --task segmentation --dataset voc --data VOC2012 --backbone vit_base_patch16_224.mae --out ...
    python jobs/train.py probe --dataset ade20k --data ADE20K --store s3://bucket/ade-448.zarr --out ...

The first word is an upsampler (lift, resize_conv, jbu, vit-up), a readout (deap, bicubic, transposed, strided, linear; probe for
ViT-Up's linear probes) or a preset. The same command continues a run that stopped. Exit codes: 0 finished, 1 not (diverged, too
many unreadable images, too many lost workers), 2 wrong settings.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import tyro

from cluster.session import connect
from jobs.program import pick_word, run_program
from operators.readouts import READOUTS
from operators.upsamplers import method_names
from pipelines.demo import write_photos
from pipelines.demo_datasets import write_demo
from pipelines.executors import InlineExecutor, RayExecutor
from pipelines.extraction.config import ExtractConfig
from pipelines.training.config import TrainConfig
from pipelines.training.images import ImageTraining
from pipelines.training.lift import X2Config
from pipelines.training.loop import TrainSummary, train_inline, train_on_ray
from pipelines.training.readout import ReadoutTraining
from pipelines.training.vit_up import ViTUpTraining
from storage.paths import redact

LIFT_S16 = X2Config(
    method="lift",
    model="vit_small_patch16_224.dino",
    size=448,
    geometry="squash",
    interpolation="bilinear",
    facet="key",
    pos_embed="dino",
    precision="fp32",
    batch=256,
    epochs=5,
    lr=1e-3,
    jitter=0.0,
)

DINOV3_SPLUS = "vit_small_plus_patch16_dinov3.lvd1689m"

PROBE = ReadoutTraining(
    method="linear",
    side=448,
    size=448,
    flip=True,
    batch=4,
    epochs=20,
    lr=2e-3,
    weight_decay=1e-5,
    schedule="cosine",
    seed=42,
)
"""ViT-Up's linear probes (specs/evaluation.md 7): 448 px, AdamW 2e-3 falling to 0, batches of 4, mirrored at random."""

DEAP = ReadoutTraining(epochs=100_000, model="vit_base_patch14_reg4_dinov2.lvd142m", size=518, log_every=50)
"""DeAP (specs/evaluation.md 12.3), DINOv2-B at 518 px: AdamW 1e-3, weight decay 0.01, batches of 32, a number of steps."""

PRESETS: dict[str, TrainConfig] = {
    # No network, no Ray: timm's test_vit with random weights on the demo's photos. 2 CPU cores: about 10 seconds, imports
    # included. `python jobs/train.py debug`; what the tests run. A random backbone's features teach nothing.
    "debug": X2Config(
        method="lift",
        data=("demo/photos-{000..001}.tar",),
        out="demo/train-debug",
        val_rows=4,
        model="test_vit.r160_in1k",
        weights="random",
        size=128,
        precision="fp32",
        batch=4,
        epochs=10,
        log_every=5,
        checkpoint_every=10,
        validate_every=20,
        executor="inline",
    ),
    # LiFT's published recipe (arXiv 2403.14625; specs/lift_vitup.md A7): DINO ViT-S/16 keys at 448 px, ImageNet-1k without
    # labels, batch 256, 5 epochs, Adam 1e-3, cosine; no jitter, as the official script has it there. 25,025 steps. The paper
    # says about 8 h on one A6000; not run here. BatchNorm sees 256 images, as there, on one GPU; `--micro-batch 64 --workers 4`
    # shares them out, and --precision bf16 is faster.
    # `python jobs/train.py lift-dino-s16-imagenet --data 'imagenet1k-train-{0000..1023}.tar' --out lift-s16 --val-rows 512`
    "lift-dino-s16-imagenet": LIFT_S16,
    # The same for ViT-B/16. No published duration; the backbone takes 4 times the compute of ViT-S/16. Not run here.
    "lift-dino-b16-imagenet": replace(LIFT_S16, model="vit_base_patch16_224.dino"),
    # A supervised ViT-Ti/16 on 600 photographs. Few of them, so: half the published sizes and a quarter of that (128 px: 8 x 8
    # cells from 4 x 4), random parts and mirrored ones, a larger learning rate that falls. pipelines/TRAINING.md has the results.
    # `python jobs/train.py lift-vit-tiny-photos --weights DIR --data 'imagenet-sample-{000000..000005}.tar' --out lift-tiny`
    "lift-vit-tiny-photos": X2Config(
        method="lift",
        model="vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        size=128,
        facet="key",
        precision="fp32",
        crop=0.5,
        lower="resized",
        batch=16,
        epochs=30,
        lr=4e-3,
        schedule="cosine",
        warmup_steps=30,
        val_rows=60,
        log_every=100,
        checkpoint_every=100,
        validate_every=200,
        executor="inline",
    ),
    # ViT-Up's published recipe (arXiv 2606.14024; specs/lift_vitup.md B12 to B15): DINOv3 ViT-S+/16, one epoch of ImageNet-1k
    # in batches of 24, 53,381 steps. No published duration; not run here. The official order isn't shuffled, ours is, and the
    # backbone stays in eval mode, where the official code rescales its rotary embeddings at random (B15, "trap").
    "vit-up-dinov3-splus-imagenet": ViTUpTraining(
        model="vit_small_plus_patch16_dinov3_qkvb.lvd1689m", max_steps=53_381
    ),
    # The same for ViT-B/16.
    "vit-up-dinov3-b-imagenet": ViTUpTraining(model="vit_base_patch16_dinov3_qkvb.lvd1689m", max_steps=53_381),
    # A supervised ViT-Ti/16 on 600 photographs: canvases of 256 px instead of 896, three blocks instead of six.
    # pipelines/TRAINING.md has the results.
    "vit-up-vit-tiny-photos": ViTUpTraining(
        model="vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        size=256,
        teacher_sizes=(64, 128, 256),
        hidden_size=128,
        query_size=512,
        hidden_states=(0, 4, 8, 12),
        precision="fp32",
        net_precision="fp32",
        strength=0.0,
        batch=4,
        epochs=5,
        lr=1e-3,
        warmup_steps=20,
        val_rows=60,
        log_every=25,
        checkpoint_every=100,
        validate_every=200,
        executor="inline",
    ),
    # No network, no Ray: DeAP on six drawn images with timm's test_vit, random weights. 2 CPU cores: about 15 seconds, imports
    # included. `python jobs/train.py debug-readout`; what the tests run.
    "debug-readout": ReadoutTraining(
        data="demo/evaluate/VOC2012",
        out="demo/train-readout",
        model="test_vit.r160_in1k",
        weights="random",
        size=64,
        side=64,
        precision="fp32",
        batch=3,
        epochs=10,
        lr=1e-2,
        log_every=5,
        checkpoint_every=10,
        validate_every=20,
        executor="inline",
    ),
    # DeAP Table 3, DINOv2-B: VOC 2012 at 224 px, cross-entropy 0.1259, IoU 83.4. The paper's duration is its own choice of
    # steps; under 16 minutes on an RTX 2080. Not run here: five images of VOC's masks only.
    "deap-voc": replace(DEAP, dataset="voc", placement="squash", max_steps=10_000),
    # COCO-Stuff, 200 outputs: cross-entropy 1.0468, IoU 42.8. Not run here.
    "deap-coco-stuff": replace(
        DEAP, dataset="coco_stuff", outputs=200, width=32, limit=100_000, max_steps=20_000, method="deap"
    ),
    # Boundaries on COCO: cross-entropy 0.1297, IoU 32.4. Not run here: 80 images of COCO only.
    "deap-boundaries": replace(DEAP, task="boundaries", dataset="coco", limit=5_000, max_steps=10_000),
    # Class-agnostic CenterNet: AP_large 0.2666. Not run here.
    "deap-detection": replace(DEAP, task="detection", dataset="coco", limit=100_000, max_steps=20_000),
    # Instance discrimination, about 60,000 classes: ARI 46.8. Steps aren't published. Not run here.
    "deap-instances": replace(DEAP, task="instances", dataset="coco", limit=8_000, max_steps=20_000),
    # NYUv2: RMSE 0.449 m. Not run here: two frames only.
    "deap-depth": replace(DEAP, task="depth", dataset="nyu", placement="squash", limit=42_000, max_steps=3_000),
    # ViT-Up Table 1, DINOv3-S+: mIoU and accuracy 84.88 / 96.45 of the plain map (bilinear), 87.47 / 97.14 with ViT-Up
    # (--level 448x448=vit_up:CHECKPOINT). Not run here.
    "probe-voc": replace(PROBE, dataset="voc", model=DINOV3_SPLUS),
    # 43.27 / 76.17 and 44.73 / 77.06. Not run here: three images of ADE20K only.
    "probe-ade20k": replace(PROBE, dataset="ade20k", model=DINOV3_SPLUS),
    # 61.36 / 93.44 and 65.41 / 94.73. Not run here.
    "probe-cityscapes": replace(PROBE, dataset="cityscapes", model=DINOV3_SPLUS),
    # COCO's 27 groups: 63.10 / 81.85 and 64.09 / 82.49; 5 epochs. Not run here.
    "probe-coco": replace(PROBE, dataset="coco_stuff27", model=DINOV3_SPLUS, epochs=5),
    # The probe's head and losses for depth, on images that aren't normalised, as its code has them (section 8). Its targets are a
    # depth model's, which isn't here: this is NYUv2's depth, so its numbers (61.52 / 62.80) are of something else.
    "probe-depth": replace(
        PROBE,
        method="depth_bins",
        task="depth",
        dataset="nyu",
        depth_loss="vit-up",
        normalise=False,
        model=DINOV3_SPLUS,
    ),
}

NAMES: dict[str, TrainConfig] = {
    **{name: X2Config(method=name) for name in method_names(lambda method: method.trained_by == "lift")},
    "vit-up": ViTUpTraining(),
    **{name: ReadoutTraining(method=name) for name in READOUTS if name != "depth_bins"},
    "probe": PROBE,
    **PRESETS,
}
"""What the first word may be, and what it stands for."""


def parse(argv: Sequence[str]) -> tuple[str, TrainConfig]:
    """The first word and the settings. Exits with a suggestion on unknown flags; raises `ConfigError` on unknown words."""
    args = list(argv)
    name = pick_word(args, NAMES)
    if name is None:
        print(f"{__doc__}\nFirst words: {', '.join(NAMES)}; each with --help")
        raise SystemExit(0 if "--help" in args or "-h" in args else 2)
    # What papers call it.
    args = [re.sub(r"^--backbone(?=$|=)", "--model", word) for word in args]
    config = tyro.cli(
        Annotated[type(NAMES[name]), tyro.conf.arg(name="")],
        default=NAMES[name],
        args=args,
        prog=f"python jobs/train.py {name}",
        description=__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return name, config


def main(config: TrainConfig) -> TrainSummary:
    """Train, or continue, to the end."""
    resolved = config.resolve()  # before a cluster is started: most mistakes end here
    if config.is_inline:
        return train_inline(resolved.prepare(InlineExecutor()))
    with connect(config.ray_address, num_gpus=0 if config.device == "cpu" else None):
        executor = RayExecutor()
        pool = executor.pool(
            config.device,
            config.workers,
            config.worker_cpus,
            None,
            accelerator=config.accelerator,
            all_at_once=True,
            called="worker",
        )
        return train_on_ray(resolved.prepare(executor), pool.device)


def _report(config: TrainConfig, summary: TrainSummary) -> None:
    metrics = summary.metrics
    rate = f", {metrics['run_images_per_s']:.1f} images/s" if "run_images_per_s" in metrics else ""
    images = f"{metrics.get('images', 0):,} images, {len(summary.failed)} left out{rate}"
    print(f"{summary.out}: {summary.step:,} steps, {images}")
    for row, reason in list(summary.failed.items())[:5]:
        print(f"  row {row}, {reason}")
    held_out = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name.startswith("val_"))
    if held_out:
        print(f"held out   {held_out}")
    best = f"{summary.out}/{summary.best or summary.last}"
    print(f"best       {best}")
    if isinstance(config, ReadoutTraining):
        print(f"try next   python jobs/evaluate.py probe --readouts {best} --data ... --out ...")
        return
    print(f"try next   python jobs/extract.py {_same_features(config)} \\")
    print(f"               --levels x1 {config.level}={config.method}:{best} --data ... --out ...")


def _same_features(config: ImageTraining) -> str:
    """Flags of jobs/extract.py for the features that were trained on."""
    plain = ExtractConfig()
    flags = [f"--model {config.model} --size {config.backbone_size}"]
    for name in ("weights", "revision", "geometry", "facet", "layers", "norm", "pos_embed"):
        value = getattr(config, name, getattr(plain, name))
        if value != getattr(plain, name):
            words = " ".join(str(each) for each in value) if isinstance(value, tuple) else value
            flags.append(f"--{name.replace('_', '-')} {words}")
    return redact(" ".join(flags), config.options)


def execute(name: str, config: TrainConfig) -> None:
    """Train, and say what came of it; the debug presets' data is made first."""
    if name == "debug":
        write_photos("demo")
    if name == "debug-readout":
        write_demo("demo/evaluate")
    _report(config, main(config))


def run(argv: Sequence[str]) -> int:
    """The exit code of a command line."""
    stopped = "stopped; the same command goes on from the last checkpoint"
    return run_program(argv, parse, execute, stopped=stopped)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
