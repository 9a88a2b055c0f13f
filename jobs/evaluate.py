"""Are the features any good? Published evaluations on local files or object storage, from a model or from stores.

    python jobs/evaluate.py correspondence lift-spair --data SPair-71k --out eval/spair --levels x1 x2=lift:s3://bucket/lift
    python jobs/evaluate.py correspondence lift-spair --data SPair-71k --out eval/spair --stores spair-224.zarr --paper
    python jobs/evaluate.py correspondence debug
    python jobs/evaluate.py runtime vit-up-table9 --out eval/runtime --paper
    python jobs/evaluate.py probe --data VOC2012 --readouts runs/deap runs/linear --model vit_base_patch16_224.mae --out eval/voc
    python jobs/evaluate.py detection vitdet-lift-coco --data coco --detector vitdet_b.pkl --finetuned vitdet-lift --out eval/coco
    python jobs/evaluate.py fidelity --data photos --sizes 224 448 --levels x1 x2=lift:s3://bucket/lift --out eval/fidelity
    python jobs/evaluate.py sharpness --dataset voc --data VOC2012 --stores voc-224.zarr --out eval/outlines
    python jobs/evaluate.py classify --data train.zarr --test val.zarr --label cls --out eval/classes

The first word is a task, the second one, which may be left out, a preset of it. Every table has the low-resolution row and the
bilinear row beside the method's; `classify` is of whole images, by a store's pooled vectors. The same command continues an
evaluation that stopped. Exit codes: 0 done, 1 too many lost workers, 2 wrong settings or data.
"""

import sys
from functools import partial

from jobs.program import Command, Program
from pipelines.costs import runtime
from pipelines.costs.runtime import RuntimeConfig
from pipelines.demo_datasets import write_demo
from pipelines.evaluation import (
    cka,
    classify,
    correspondence,
    detection,
    discovery,
    fidelity,
    readouts,
    sharpness,
    similarity,
    video,
)
from pipelines.evaluation.cka import CkaConfig
from pipelines.evaluation.classify import ClassifyConfig
from pipelines.evaluation.config import EvaluationConfig
from pipelines.evaluation.correspondence import CorrespondenceConfig
from pipelines.evaluation.detection import DetectionConfig
from pipelines.evaluation.discovery import DiscoveryConfig
from pipelines.evaluation.fidelity import FidelityConfig
from pipelines.evaluation.readouts import ProbeConfig
from pipelines.evaluation.run import main
from pipelines.evaluation.sharpness import SharpnessConfig
from pipelines.evaluation.similarity import SimilarityConfig
from pipelines.evaluation.video import VideoConfig
from pipelines.published.lift import LIFT_FEATURES
from pipelines.published.vit_up import VIT_UP_FEATURES

LIFT = {**LIFT_FEATURES, "ragged": True}
"""What LiFT's tables are of; 56 px aren't a whole number of patches."""

LIFT_SIZES = (56, 112, 224, 448)

KNOWN = (0.1, 0.05, 0.02, 0.01)
"""Thresholds of exactly known points: a hundredth of 400 px is 4 px."""

HERE = {"executor": "inline", "device": "cpu"}
DEBUG = {"model": "test_vit.r160_in1k", "weights": "random", "precision": "fp32", **HERE}
"""No network, no Ray, no GPU: random weights on drawn images. Seconds on 2 CPU cores; what the tests run."""

PRESETS: dict[str, dict[str, EvaluationConfig]] = {
    # No preset but `debug` was run here: data sets, weights or GPUs lack. What the papers have for them, --paper prints.
    "correspondence": {
        "debug": CorrespondenceConfig.of(data="demo/evaluate/SPair-71k", out="demo/eval-spair", sizes=(64,), **DEBUG),
        # LiFT's Table 1.
        # `python jobs/evaluate.py correspondence lift-spair --data SPair-71k --levels x1 x2=lift:CHECKPOINT --out ... --paper`
        "lift-spair": CorrespondenceConfig.of(sizes=LIFT_SIZES, **LIFT),
        # Pairs whose correspondences are exactly known (a photograph and a warp of it, say), in SPair-71k's layout with the whole
        # image as box: every pair, and precision beside the usual thresholds. Run on 24 warps of photos_open with ViT-Ti/16.
        "known-points": CorrespondenceConfig.of(pairs_per_category=0, alphas=KNOWN),
        # ViT-Up's Table 2, with --levels x1 448x448=vit_up:CHECKPOINT.
        "vit-up-spair": CorrespondenceConfig.of(protocol="vit-up", sizes=(448,), **VIT_UP_FEATURES),
        # The same table's NAVI columns, with --levels x1 112x112=vit_up:CHECKPOINT.
        "vit-up-navi": CorrespondenceConfig.of(protocol="navi", sizes=(448,), **VIT_UP_FEATURES),
        # The same thresholds, of warps that are made of the photographs in --data.
        "warped": CorrespondenceConfig.of(dataset="warped", alphas=KNOWN),
    },
    "video": {
        "debug": VideoConfig.of(data="demo/evaluate/DAVIS", out="demo/eval-davis", sizes=(64,), **DEBUG),
        "lift-davis": VideoConfig.of(sizes=LIFT_SIZES, **LIFT),
        # DINO's own protocol (arXiv 2104.14294): block output, 480 px, aspect kept. Nothing is published of bilinear rows.
        "dino-davis": VideoConfig.of(protocol="dino", sizes=(480,), **{**LIFT, "facet": "token"}),
    },
    "discovery": {
        "debug": DiscoveryConfig.of(data="demo/evaluate/VOC2007", out="demo/eval-voc07", sizes=(64,), **DEBUG),
        "lift-voc07": DiscoveryConfig.of(dataset="voc07", sizes=LIFT_SIZES, **LIFT),
        "lift-voc12": DiscoveryConfig.of(dataset="voc12", sizes=LIFT_SIZES, **LIFT),
        "lift-coco20k": DiscoveryConfig.of(dataset="coco20k", sizes=LIFT_SIZES, **LIFT),
        # TokenCut's own protocol: images at their own size.
        "tokencut-voc07": DiscoveryConfig.of(dataset="voc07", protocol="tokencut", **LIFT),
    },
    "cka": {
        "debug": CkaConfig.of(data="demo/evaluate/SPair-71k", out="demo/eval-cka", sizes=(32, 48, 64), **DEBUG),
        # LiFT's Fig. 4 on the 1,800 images of SPair-71k: curves only, no numbers.
        "lift-spair": CkaConfig.of(sizes=tuple(range(56, 449, 56)), **LIFT),
    },
    "similarity": {
        "debug": SimilarityConfig.of(data="demo/evaluate/SPair-71k", out="demo/eval-similarity", sizes=(64, 128), **DEBUG),
        # LiFT's Fig. 5 and 6; --levels x1 x2=lift:URL x4=lift:URL x8=lift:URL x16=lift:URL shows repeated passes.
        "lift-figures": SimilarityConfig.of(sizes=(224, 448), **LIFT),
    },
    # The two of no paper, which pipelines/TRAINING.md has of DINOv2's keys.
    "fidelity": {"debug": FidelityConfig.of(data="demo/evaluate/SPair-71k", out="demo/eval-fidelity", sizes=(32, 64), **DEBUG)},
    "sharpness": {"debug": SharpnessConfig.of(data="demo/evaluate/VOC2012", out="demo/eval-sharpness", sizes=(64,), **DEBUG)},
    "runtime": {
        "debug": RuntimeConfig.of(
            out="demo/eval-runtime",
            size=64,
            grids=(8, 16),
            methods=("bilinear", "lift", "resize_conv", "jbu"),
            warm_up=1,
            repeat=3,
            **DEBUG,
        ),
        # ViT-Up's Table 9, with random weights.
        # `python jobs/evaluate.py runtime vit-up-table9 --out eval/runtime --paper`
        "vit-up-table9": RuntimeConfig.of(
            methods=("bilinear", "jafar", "anyup", "uplift", "naf", "vit_up"),
            settings=("anyup.natten=true",),
            grids=(112, 224, 448),
            chunks=(0, 112, 224, 448),
            weights="random",
            **VIT_UP_FEATURES,
        ),
        # LiFT's Table 5 at 224 px; at 448 with --size 448 --grids 56. About 1 minute on 2 CPU cores.
        "lift-table5": RuntimeConfig.of(size=224, grids=(28,), methods=("bilinear", "lift"), weights="random", **LIFT),
    },
    "probe": {
        # Of what `jobs/train.py debug-readout` trained.
        "debug": ProbeConfig.of(data="demo/evaluate/VOC2012", out="demo/eval-probe", readouts=("demo/train-readout",), **DEBUG)
    },
    "detection": {
        "debug": DetectionConfig.of(
            data="demo/evaluate/coco", out="demo/eval-detection", detector="random", upsamplers=("lift",), size=64, **HERE
        ),
        # LiFT's Table 4, Mask R-CNN and Cascade R-CNN.
        # `python jobs/evaluate.py detection vitdet-lift-coco --data coco --detector vitdet_b.pkl --finetuned RUN --out ...`
        "vitdet-lift-coco": DetectionConfig.of(head="mask_rcnn", size=512),
        "vitdet-cascade-lift-coco": DetectionConfig.of(head="cascade", size=512),
    },
}

TASKS = {
    "correspondence": correspondence,
    "video": video,
    "discovery": discovery,
    "cka": cka,
    "similarity": similarity,
    "fidelity": fidelity,
    "sharpness": sharpness,
    "runtime": runtime,
    "probe": readouts,
    "detection": detection,
}

program = Program(
    name="evaluate",
    doc=__doc__,
    commands={
        name: Command(
            run=partial(main, name, task),
            default=type(PRESETS[name]["debug"])(),
            presets=PRESETS[name],
            before={"debug": partial(write_demo, "demo/evaluate")},
        )
        for name, task in TASKS.items()
    }
    | {"classify": Command(run=classify.main, default=ClassifyConfig())},
    stopped="stopped; what is done is kept, the same command continues",
)
run = program.run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
