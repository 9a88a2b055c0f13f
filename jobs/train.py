"""Train on a frozen backbone's features: upsamplers on the features themselves, readouts on labels; and detectors.

    python jobs/train.py debug
    python jobs/train.py lift --data 's3://bucket/train-{000000..001281}.tar' --out s3://bucket/lift --weights ...
    python jobs/train.py lift-dino-s16-imagenet --data ... --out ... --workers 4 --micro-batch 64
    python jobs/train.py vit-up-dinov3-splus-imagenet --data ... --out ...
    python jobs/extract.py --levels x1 x2=lift:s3://bucket/lift ...
    python jobs/train.py deap --task segmentation --dataset voc --data VOC2012 --backbone vit_base_patch16_224.mae --out ...
    python jobs/train.py featup --task segmentation --dataset voc --data VOC2012 --level x16=featup:dinov2.ckpt --out ...
    python jobs/train.py vitdet --weights mae_pretrain_vit_base.pth --data COCO --out s3://bucket/vitdet ...
    python jobs/train.py probe --dataset ade20k --data ADE20K --store s3://bucket/ade-448.zarr --no-flip --out ...

The first word is an upsampler (lift, resize_conv, jbu, vit_up, jafar, featup-upsampler), a readout (deap, bicubic, transposed,
strided, linear, featup; probe for ViT-Up's linear probes), a detector (vitdet) or a preset. The same command continues a run that
stopped. Exit codes: 0 finished, 1 not (diverged, too many unreadable images, too many lost workers), 2 wrong settings.
"""

import sys
from dataclasses import replace
from functools import partial

from jobs.program import Command, Program
from operators.readouts import READOUTS
from pipelines.config import GpuConfig
from pipelines.demo_datasets import write_demo, write_photos
from pipelines.features.config import BackboneConfig
from pipelines.published.deap import DEAP_FEATUP, DEAP_FEATURES
from pipelines.published.featup import FEATUP_TRAINING
from pipelines.published.jafar import JAFAR_TRAINING
from pipelines.published.lift import LIFT_FEATURES, LIFT_FOR_VITDET, LIFT_TRAINING, LIFT_VITDET_HEADS
from pipelines.published.recipes import RECIPES
from pipelines.published.vit_up import VIT_UP_FEATURES, VIT_UP_PROBE, VIT_UP_SEED, VIT_UP_TRAINING
from pipelines.published.vitdet import VITDET_TRAINING
from pipelines.training import run as training
from pipelines.training.config import TrainConfig
from pipelines.training.featup import FeatUpTraining
from pipelines.training.jafar import JafarTraining
from pipelines.training.lift import LIFT_MAPS, X2Config
from pipelines.training.objectives import trainings
from pipelines.training.readout import ReadConfig, ReadoutTraining
from pipelines.training.short import LIFT_SHORT, VIT_UP_SHORT
from pipelines.training.square import SquareMapConfig
from pipelines.training.vit_up import ViTUpTraining
from pipelines.training.vitdet import ViTDetTraining

LIFT_S16 = X2Config.of(method="lift", **LIFT_FEATURES, **LIFT_TRAINING)

PROBE = ReadoutTraining.of(method="linear", seed=VIT_UP_SEED, **VIT_UP_PROBE)


def deap(name: str) -> ReadoutTraining:
    """DeAP's recipe for a task, on the backbone of its ablations."""
    recipe = RECIPES[name]
    return ReadoutTraining.of(log_every=50, task=recipe.task, dataset=recipe.dataset, **DEAP_FEATURES, **recipe.settings)


def probe(name: str) -> ReadoutTraining:
    """ViT-Up's recipe for a linear probe, on the map of its backbone."""
    recipe = RECIPES[name]
    return PROBE.changed(dataset=recipe.dataset, model=VIT_UP_FEATURES["model"], **recipe.settings)


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
    # LiFT's recipe: 25,025 steps, no labels. Not run here. BatchNorm sees 256 images, as there, on one GPU; `--micro-batch 64
    # --workers 4` shares them out, and --precision bf16 is faster.
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
    # DINOv2's keys of block 9 on 2,500 photographs in half an hour of a core: LiFT starts as the bilinear enlargement, learns
    # relations beside distances, and the backbone sees each photograph once. It learns both to 448 px and to 224 px: by the
    # latter alone it is below bilinear at 448 px. pipelines/TRAINING.md has the results, and what each of these is worth.
    # `python jobs/train.py lift-dinov2-small-photos --weights DIR --data 'photos-train-{000000..000004}.tar' --out lift-dinov2`
    "lift-dinov2-small-photos": X2Config.of(
        method="lift",
        start="enlargement",
        loss="l2",
        relational_weight=20.0,
        relational_cells=1024,
        epochs=8,
        val_rows=32,
        log_every=50,
        checkpoint_every=400,
        validate_every=4000,
        **LIFT_SHORT,
        model="vit_small_patch14_dinov2.lvd142m",
        layers=(9,),
        size=448,
        precision="fp32",
        executor="inline",
    ),
    # ViT-Up's recipe. No published duration; not run here. The official order isn't shuffled, ours is, and the backbone stays
    # in eval mode, where the official code rescales its rotary embeddings at random.
    "vit-up-dinov3-splus-imagenet": ViTUpTraining.of(model="vit_small_plus_patch16_dinov3_qkvb.lvd1689m", **VIT_UP_TRAINING),
    # The same for ViT-B/16.
    "vit-up-dinov3-b-imagenet": ViTUpTraining.of(model="vit_base_patch16_dinov3_qkvb.lvd1689m", **VIT_UP_TRAINING),
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
    # DINOv2's tokens on 600 photographs in about 20 minutes of a core: ViT-Up starts as the bilinear enlargement and learns
    # relations above all. pipelines/TRAINING.md has the results.
    # `python jobs/train.py vit-up-dinov2-small-photos --weights DIR --data 'photos-train-{000000..000004}.tar' --out vit-up`
    "vit-up-dinov2-small-photos": ViTUpTraining.of(
        log_every=10,
        checkpoint_every=50,
        validate_every=1000,
        **VIT_UP_SHORT,
        model="vit_small_patch14_dinov2.lvd142m",
        precision="fp32",
        executor="inline",
    ),
    # JAFAR's recipe: 100,000 steps, no labels. No published duration; not run here.
    # `python jobs/train.py jafar-dinov2-s14-imagenet --data 'imagenet1k-train-{0000..1023}.tar' --out jafar-s14 --val-rows 512`
    "jafar-dinov2-s14-imagenet": JafarTraining.of(**JAFAR_TRAINING),
    # A supervised ViT-Ti/16 on 600 photographs: images of 128 px instead of 448, made smaller without aliasing, random parts of
    # them, a larger learning rate that falls.
    # `python jobs/train.py jafar-vit-tiny-photos --weights DIR --data 'imagenet-sample-{000000..000005}.tar' --out jafar-tiny`
    "jafar-vit-tiny-photos": JafarTraining(
        crop=0.5,
        antialias=True,
        batch=8,
        epochs=2,
        lr=1e-3,
        schedule="cosine",
        warmup_steps=10,
        net_precision="fp32",
        val_rows=60,
        log_every=20,
        checkpoint_every=20,
        validate_every=200,
        features=SquareMapConfig(model="vit_tiny_patch16_224.augreg_in21k_ft_in1k", size=128, precision="fp32"),
        cluster=GpuConfig(executor="inline"),
    ),
    # FeatUp's recipe for its joint bilateral stack: one pass over COCO's photographs. No published duration; not run here.
    # `python jobs/train.py featup-dinov2-s14-coco --data 'coco-train2017-{000..117}.tar' --out featup-s14`
    "featup-dinov2-s14-coco": FeatUpTraining.of(**FEATUP_TRAINING),
    # A supervised ViT-Ti/16 on 600 photographs: images of 64 px instead of 224, two jitters instead of five.
    # pipelines/TRAINING.md has the results.
    "featup-vit-tiny-photos": FeatUpTraining(
        crop=0.5,
        jitters=2,
        val_rows=60,
        log_every=10,
        checkpoint_every=10,
        validate_every=100,
        features=SquareMapConfig(model="vit_tiny_patch16_224.augreg_in21k_ft_in1k", size=64, precision="fp32"),
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
    # No network, no Ray: a tiny ViTDet on six drawn images. 2 CPU cores: about 15 seconds, imports included.
    # `python jobs/train.py debug-vitdet`; what the tests run.
    "debug-vitdet": ViTDetTraining(
        model="tiny",
        depth=2,
        global_blocks=(1,),
        size=96,
        data="demo/evaluate/coco",
        out="demo/train-vitdet",
        batch=3,
        micro_batch=3,
        epochs=10,
        lr=1e-3,
        warmup_steps=4,
        proposals=32,
        log_every=5,
        checkpoint_every=10,
        validate_every=20,
        cluster=GpuConfig(executor="inline"),
    ),
    # A small ViTDet from random weights that learns a few images by heart, as they are: what two cores can check of it.
    # pipelines/TRAINING.md has the results.
    # `python jobs/train.py vitdet-tiny-few --data COCO --split val2017 --limit 16 --val-limit 16 --overlap --out vitdet-tiny`
    "vitdet-tiny-few": ViTDetTraining(
        model="tiny",
        size=256,
        scales=(1.0, 1.0),
        mirror=0.0,
        proposals=64,
        batch=2,
        micro_batch=2,
        epochs=200,
        lr=1e-3,
        weight_decay=0.0,
        warmup_steps=50,
        log_every=50,
        checkpoint_every=100,
        validate_every=400,
        cluster=GpuConfig(executor="inline"),
    ),
    # ViTDet's recipe for Mask R-CNN with ViT-B: 184,375 steps of 64 images from MAE's weights, a forward for each image, which
    # --workers share. --method cascade for Cascade R-CNN, --model large for ViT-L. Not run here.
    # `python jobs/train.py vitdet-coco --weights mae_pretrain_vit_base.pth --data COCO --out vitdet-b --workers 64`
    "vitdet-coco": ViTDetTraining.of(**VITDET_TRAINING),
    # LiFT's Table 4 is made of runs of three kinds: a detector's (vitdet-coco, or a published file), LiFT's on its backbone, and
    # the finetuning of its heads on LiFT's maps. pipelines/published/lift.py says what of it is the paper's. Not run here.
    # `python jobs/train.py lift-vitdet-coco --weights model_final.pkl --data COCO/train2017 --val-data COCO/val2017 --out lift-b`
    "lift-vitdet-coco": X2Config.of(method="lift", **LIFT_FOR_VITDET),
    # `python jobs/train.py vitdet-lift-coco --weights model_final.pkl --upsampler lift:lift-b --data COCO --out vitdet-lift`
    "vitdet-lift-coco": ViTDetTraining.of(method="mask_rcnn", **LIFT_VITDET_HEADS),
    # The same for Cascade R-CNN; its detector's backbone is another, which has a LiFT of its own.
    "vitdet-cascade-lift-coco": ViTDetTraining.of(method="cascade", **LIFT_VITDET_HEADS),
    # DeAP's Table 3, DINOv2-B. None was run here: of VOC, COCO and NYUv2 there are few images. Segmentation of VOC 2012:
    "deap-voc": deap("voc"),
    # Segmentation with 200 outputs.
    "deap-coco-stuff": deap("coco-stuff"),
    "deap-boundaries": deap("boundaries"),
    # Class-agnostic CenterNet.
    "deap-detection": deap("detection"),
    # Instance discrimination; its number of steps is ours.
    "deap-instances": deap("instances"),
    "deap-depth": deap("depth"),
    # The first row of ViT-Up's Table 1, and with --level 448x448=vit_up:CHECKPOINT the last. Not run here.
    "probe-voc": probe("probe-voc"),
    "probe-ade20k": probe("probe-ade20k"),
    "probe-cityscapes": probe("probe-cityscapes"),
    # COCO's 27 groups.
    "probe-coco": probe("probe-coco"),
    # The probe's head and losses for depth, on images that aren't normalised, as its code has them. The paper's targets are a
    # depth model's, which isn't here: this is NYUv2's depth, so that the paper's numbers are of something else.
    "probe-depth": PROBE.changed(
        method="depth_bins", task="depth", dataset="nyu", depth_loss="vit-up", normalise=False, model=VIT_UP_FEATURES["model"]
    ),
}

NAMES: dict[str, TrainConfig] = {
    # A readout may have an upsampler's name.
    **{f"{name}-upsampler" if name in READOUTS else name: config for name, config in trainings().items()},
    "vitdet": ViTDetTraining(),
    **{name: ReadoutTraining().changed(method=name) for name, kind in READOUTS.items() if kind.only_outputs is None},
    "featup": ReadoutTraining.of(method="featup", **DEAP_FEATUP),
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
            before={
                "debug": partial(write_photos, "demo"),
                "debug-readout": partial(write_demo, "demo/evaluate"),
                "debug-vitdet": partial(write_demo, "demo/evaluate"),
            },
            about=__doc__,
        )
    },
    stopped="stopped; the same command goes on from the last checkpoint",
    aliases={"--backbone": "--model"},  # what papers call it
)
run = program.run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
