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

import sys
from dataclasses import replace
from functools import partial

from jobs.program import Command, Program
from operators.readouts import READOUTS
from operators.upsamplers import method_names
from pipelines.config import GpuConfig
from pipelines.demo import write_photos
from pipelines.demo_datasets import write_demo
from pipelines.features.config import BackboneConfig
from pipelines.training import run as training
from pipelines.training.config import TrainConfig
from pipelines.training.lift import LIFT_MAPS, X2Config
from pipelines.training.readout import ReadConfig, ReadoutTraining
from pipelines.training.vit_up import ViTUpTraining

LIFT_S16 = X2Config(
    method="lift",
    interpolation="bilinear",
    batch=256,
    epochs=5,
    lr=1e-3,
    jitter=0.0,
    features=replace(LIFT_MAPS, model="vit_small_patch16_224.dino", pos_embed="dino", precision="fp32"),
)

DINOV3_SPLUS = "vit_small_plus_patch16_dinov3.lvd1689m"

PROBE = ReadoutTraining(
    method="linear",
    side=448,
    flip=True,
    batch=4,
    epochs=20,
    lr=2e-3,
    weight_decay=1e-5,
    schedule="cosine",
    seed=42,
    features=ReadConfig(size=448),
)
"""ViT-Up's linear probes (specs/evaluation.md 7): 448 px, AdamW 2e-3 falling to 0, batches of 4, mirrored at random."""

DEAP = ReadoutTraining(
    epochs=100_000, features=ReadConfig(model="vit_base_patch14_reg4_dinov2.lvd142m", size=518), log_every=50
)
"""DeAP (specs/evaluation.md 12.3), DINOv2-B at 518 px: AdamW 1e-3, weight decay 0.01, batches of 32, a number of steps."""

PRESETS: dict[str, TrainConfig] = {
    # No network, no Ray: timm's test_vit with random weights on the demo's photos. 2 CPU cores: about 10 seconds, imports
    # included. `python jobs/train.py debug`; what the tests run. A random backbone's features teach nothing.
    "debug": X2Config(
        method="lift",
        data=("demo/photos-{000..001}.tar",),
        out="demo/train-debug",
        val_rows=4,
        batch=4,
        epochs=10,
        log_every=5,
        checkpoint_every=10,
        validate_every=20,
        features=replace(LIFT_MAPS, model="test_vit.r160_in1k", weights="random", size=128, precision="fp32"),
        cluster=GpuConfig(executor="inline"),
    ),
    # LiFT's published recipe (arXiv 2403.14625; specs/lift_vitup.md A7): DINO ViT-S/16 keys at 448 px, ImageNet-1k without
    # labels, batch 256, 5 epochs, Adam 1e-3, cosine; no jitter, as the official script has it there. 25,025 steps. The paper
    # says about 8 h on one A6000; not run here. BatchNorm sees 256 images, as there, on one GPU; `--micro-batch 64 --workers 4`
    # shares them out, and --precision bf16 is faster.
    # `python jobs/train.py lift-dino-s16-imagenet --data 'imagenet1k-train-{0000..1023}.tar' --out lift-s16 --val-rows 512`
    "lift-dino-s16-imagenet": LIFT_S16,
    # The same for ViT-B/16. No published duration; the backbone takes 4 times the compute of ViT-S/16. Not run here.
    "lift-dino-b16-imagenet": LIFT_S16.changed(model="vit_base_patch16_224.dino"),
    # A supervised ViT-Ti/16 on 600 photographs. Few of them, so: half the published sizes and a quarter of that (128 px: 8 x 8
    # cells from 4 x 4), random parts and mirrored ones, a larger learning rate that falls. pipelines/TRAINING.md has the results.
    # `python jobs/train.py lift-vit-tiny-photos --weights DIR --data 'imagenet-sample-{000000..000005}.tar' --out lift-tiny`
    "lift-vit-tiny-photos": X2Config(
        method="lift",
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
        features=replace(LIFT_MAPS, model="vit_tiny_patch16_224.augreg_in21k_ft_in1k", size=128, precision="fp32"),
        cluster=GpuConfig(executor="inline"),
    ),
    # ViT-Up's published recipe (arXiv 2606.14024; specs/lift_vitup.md B12 to B15): DINOv3 ViT-S+/16, one epoch of ImageNet-1k
    # in batches of 24, 53,381 steps. No published duration; not run here. The official order isn't shuffled, ours is, and the
    # backbone stays in eval mode, where the official code rescales its rotary embeddings at random (B15, "trap").
    "vit-up-dinov3-splus-imagenet": ViTUpTraining(
        features=BackboneConfig(model="vit_small_plus_patch16_dinov3_qkvb.lvd1689m"), max_steps=53_381
    ),
    # The same for ViT-B/16.
    "vit-up-dinov3-b-imagenet": ViTUpTraining(
        features=BackboneConfig(model="vit_base_patch16_dinov3_qkvb.lvd1689m"), max_steps=53_381
    ),
    # A supervised ViT-Ti/16 on 600 photographs: canvases of 256 px instead of 896, three blocks instead of six.
    # pipelines/TRAINING.md has the results.
    "vit-up-vit-tiny-photos": ViTUpTraining(
        canvas=256,
        teacher_sizes=(64, 128, 256),
        hidden_size=128,
        query_size=512,
        hidden_states=(0, 4, 8, 12),
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
        features=BackboneConfig(model="vit_tiny_patch16_224.augreg_in21k_ft_in1k", precision="fp32"),
        cluster=GpuConfig(executor="inline"),
    ),
    # No network, no Ray: DeAP on six drawn images with timm's test_vit, random weights. 2 CPU cores: about 15 seconds, imports
    # included. `python jobs/train.py debug-readout`; what the tests run.
    "debug-readout": ReadoutTraining(
        data="demo/evaluate/VOC2012",
        out="demo/train-readout",
        side=64,
        batch=3,
        epochs=10,
        lr=1e-2,
        log_every=5,
        checkpoint_every=10,
        validate_every=20,
        features=ReadConfig(model="test_vit.r160_in1k", weights="random", size=64, precision="fp32"),
        cluster=GpuConfig(executor="inline"),
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
    "probe-voc": PROBE.changed(dataset="voc", model=DINOV3_SPLUS),
    # 43.27 / 76.17 and 44.73 / 77.06. Not run here: three images of ADE20K only.
    "probe-ade20k": PROBE.changed(dataset="ade20k", model=DINOV3_SPLUS),
    # 61.36 / 93.44 and 65.41 / 94.73. Not run here.
    "probe-cityscapes": PROBE.changed(dataset="cityscapes", model=DINOV3_SPLUS),
    # COCO's 27 groups: 63.10 / 81.85 and 64.09 / 82.49; 5 epochs. Not run here.
    "probe-coco": PROBE.changed(dataset="coco_stuff27", model=DINOV3_SPLUS, epochs=5),
    # The probe's head and losses for depth, on images that aren't normalised, as its code has them (section 8). Its targets are a
    # depth model's, which isn't here: this is NYUv2's depth, so its numbers (61.52 / 62.80) are of something else.
    "probe-depth": PROBE.changed(
        method="depth_bins",
        task="depth",
        dataset="nyu",
        depth_loss="vit-up",
        normalise=False,
        model=DINOV3_SPLUS,
    ),
}

NAMES: dict[str, TrainConfig] = {
    **{name: X2Config().changed(method=name) for name in method_names(lambda method: method.trained_by == "lift")},
    "vit-up": ViTUpTraining(),
    **{name: ReadoutTraining().changed(method=name) for name in READOUTS if name != "depth_bins"},
    "probe": PROBE,
    **PRESETS,
}
"""What the first word may be, and what it stands for."""

program = Program(
    name="train",
    doc=__doc__,
    commands={
        "": Command(
            run=training.main,
            presets=NAMES,
            before={"debug": partial(write_photos, "demo"), "debug-readout": partial(write_demo, "demo/evaluate")},
            about=__doc__,
        )
    },
    stopped="stopped; the same command goes on from the last checkpoint",
    aliases={"--backbone": "--model"},  # what papers call it
)
run = program.run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
