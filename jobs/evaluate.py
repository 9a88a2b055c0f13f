"""Are the features any good? Published evaluations on local files or object storage, from a model or from stores.

    python jobs/evaluate.py correspondence lift-spair --data SPair-71k --out eval/spair --levels x1 x2=lift:s3://bucket/lift
    python jobs/evaluate.py correspondence lift-spair --data SPair-71k --out eval/spair --stores spair-224.zarr --paper
    python jobs/evaluate.py correspondence debug
    python jobs/evaluate.py runtime vit-up-table9 --out eval/runtime --paper
    python jobs/evaluate.py probe --data VOC2012 --readouts runs/deap runs/linear --model vit_base_patch16_224.mae --out eval/voc

The first word is a task, the second one, which may be left out, a preset of it. Every table has the low-resolution row and the
bilinear row beside the method's. The same command continues an evaluation that stopped. Exit codes: 0 done, 1 too many lost
workers, 2 wrong settings or data.
"""

import sys
from dataclasses import replace
from functools import partial

from jobs.program import Command, Program
from pipelines.config import ClusterConfig
from pipelines.costs import runtime
from pipelines.costs.runtime import RuntimeConfig
from pipelines.demo_datasets import write_demo
from pipelines.evaluation import cka, correspondence, discovery, readouts, similarity, video
from pipelines.evaluation.cka import CkaConfig
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.correspondence import CorrespondenceConfig
from pipelines.evaluation.discovery import DiscoveryConfig
from pipelines.evaluation.readouts import ProbeConfig
from pipelines.evaluation.run import main
from pipelines.evaluation.similarity import SimilarityConfig
from pipelines.evaluation.video import VideoConfig
from pipelines.features.config import LevelConfig

LEVELS = EvaluateConfig.features.levels

DINO_S16 = LevelConfig(
    model="vit_small_patch16_224.dino",
    facet="key",
    pos_embed="dino",
    precision="fp32",
    ragged=True,
    levels=LEVELS,
)
"""What LiFT's tables are of."""

DINOV3_SPLUS = LevelConfig(model="vit_small_plus_patch16_dinov3.lvd1689m", precision="bf16", levels=LEVELS)
"""What ViT-Up's tables are of."""

DEBUG = LevelConfig(model="test_vit.r160_in1k", weights="random", precision="fp32", levels=LEVELS)
INLINE = ClusterConfig(executor="inline", device="cpu")
"""No network, no Ray, no GPU: random weights on drawn images. Seconds on 2 CPU cores; what the tests run."""

PRESETS: dict[str, dict[str, EvaluateConfig]] = {
    "correspondence": {
        "debug": CorrespondenceConfig(
            data="demo/evaluate/SPair-71k", out="demo/eval-spair", sizes=(64,), features=DEBUG, cluster=INLINE
        ),
        # LiFT Table 1, DINO ViT-S/16. PCK@0.1 at 56 / 112 / 224 / 448 px: 2.04 / 12.67 / 24.76 / 28.60 as it is, 3.81 / 13.71 /
        # 26.72 / 30.48 bilinear, 5.05 / 17.72 / 28.68 / 31.38 with LiFT (x2=lift:CHECKPOINT). Not run here: no SPair-71k.
        # `python jobs/evaluate.py correspondence lift-spair --data SPair-71k --levels x1 x2=lift:CHECKPOINT --out ... --paper`
        "lift-spair": CorrespondenceConfig(sizes=(56, 112, 224, 448), features=DINO_S16),
        # ViT-Up Table 2, DINOv3-S+ at 448 px. PCK@0.1 / 0.05 / 0.01: 51.27 / 33.74 / 3.83 bilinear, 55.44 / 39.07 / 7.30 with
        # ViT-Up (448x448=vit_up:CHECKPOINT). Not run here: neither SPair-71k nor the weights.
        "vit-up-spair": CorrespondenceConfig(protocol="vit-up", sizes=(448,), features=DINOV3_SPLUS),
    },
    "video": {
        "debug": VideoConfig(
            data="demo/evaluate/DAVIS", out="demo/eval-davis", sizes=(64,), features=DEBUG, cluster=INLINE
        ),
        # LiFT paper, DINO ViT-S/16. J&F at 56 / 112 / 224 / 448 px: 7.4 / 17.5 / 33.0 / 50.9 as it is, 10.8 / 23.7 / 37.0 /
        # 53.0 bilinear, 13.0 / 28.0 / 44.3 / 61.1 with LiFT (x2=lift:CHECKPOINT). Not run here: one clip of DAVIS-2017 only.
        "lift-davis": VideoConfig(sizes=(56, 112, 224, 448), features=DINO_S16),
        # DINO's own protocol (arXiv 2104.14294): block output, 480 px, aspect kept. Its paper's numbers aren't in the specs;
        # bilinear rows aren't published. Not run here.
        "dino-davis": VideoConfig(protocol="dino", sizes=(480,), features=replace(DINO_S16, facet="token")),
    },
    "discovery": {
        "debug": DiscoveryConfig(
            data="demo/evaluate/VOC2007", out="demo/eval-voc07", sizes=(64,), features=DEBUG, cluster=INLINE
        ),
        # LiFT paper, DINO ViT-S/16. CorLoc at 56 / 112 / 224 / 448 px: 20.74 / 50.07 / 65.60 / 68.27 as it is, 21.27 / 46.96 /
        # 64.70 / 68.37 bilinear, 36.54 / 62.02 / 68.79 / 69.65 with LiFT. Not run here: four images of VOC07 only.
        "lift-voc07": DiscoveryConfig(dataset="voc07", sizes=(56, 112, 224, 448), features=DINO_S16),
        # As it is 23.27 / 55.33 / 69.01 / 71.64, bilinear 23.46 / 52.64 / 68.53 / 71.55, LiFT 40.56 / 66.21 / 70.91 / 71.71.
        "lift-voc12": DiscoveryConfig(dataset="voc12", sizes=(56, 112, 224, 448), features=DINO_S16),
        # As it is 16.28 / 40.08 / 53.98 / 57.99, bilinear 17.78 / 35.62 / 51.53 / 56.84, LiFT 27.72 / 50.20 / 58.03 / 60.50.
        "lift-coco20k": DiscoveryConfig(dataset="coco20k", sizes=(56, 112, 224, 448), features=DINO_S16),
        # TokenCut's own protocol: images at their own size. Its paper's numbers aren't in the specs.
        "tokencut-voc07": DiscoveryConfig(dataset="voc07", protocol="tokencut", features=DINO_S16),
    },
    "cka": {
        "debug": CkaConfig(
            data="demo/evaluate/SPair-71k", out="demo/eval-cka", sizes=(32, 48, 64), features=DEBUG, cluster=INLINE
        ),
        # LiFT Fig. 4 on the 1,800 images of SPair-71k: curves only, no numbers. Not run here.
        "lift-spair": CkaConfig(sizes=(56, 112, 168, 224, 280, 336, 392, 448), features=DINO_S16),
    },
    "similarity": {
        "debug": SimilarityConfig(
            data="demo/evaluate/SPair-71k", out="demo/eval-similarity", sizes=(64, 128), features=DEBUG, cluster=INLINE
        ),
        # LiFT Fig. 5 and 6; --levels x1 x2=lift:URL x4=lift:URL x8=lift:URL x16=lift:URL shows repeated passes.
        "lift-figures": SimilarityConfig(sizes=(224, 448), features=DINO_S16),
    },
    "runtime": {
        "debug": RuntimeConfig(
            out="demo/eval-runtime",
            side=64,
            grids=(8, 16),
            methods=("bilinear", "lift", "resize_conv", "jbu"),
            warm_up=1,
            repeat=3,
            features=replace(DEBUG, levels=("x1",)),
            cluster=replace(INLINE, actors=1),
        ),
        # ViT-Up Table 9, bf16, on a GPU that its paper doesn't name: ms and MiB at 112 / 224 / 448 cells a side. With 112 x 112
        # queries at once 14.2 / 24.1 / 62.6 and 503.7 / 503.9 / 626.7; with 224 x 224 22.1 / 55.4 and 1069.6 / 1143.6 from 224
        # on; with 448 x 448 52.0 and 3709.3. JAFAR, AnyUp, UPLiFT and NAF: --paper. Not run on a GPU here; random weights.
        # `python jobs/evaluate.py runtime vit-up-table9 --out eval/runtime --paper`
        "vit-up-table9": RuntimeConfig(
            methods=("bilinear", "lift", "vit_up"),
            chunks=(112, 224, 448),
            features=replace(DINOV3_SPLUS, weights="random", levels=("x1",)),
        ),
        # LiFT Table 5, DINO ViT-S/16 at 224 px, 10^9 by its count: 4.34 alone, 5.30 with LiFT; 17.28 and 21.12 with --size 448
        # --grids 56. LiFT has 1.19 M parameters. About 1 minute on 2 CPU cores.
        "lift-table5": RuntimeConfig(
            side=224,
            grids=(28,),
            methods=("bilinear", "lift"),
            features=replace(DINO_S16, weights="random", levels=("x1",)),
        ),
    },
    "probe": {
        # Of what `jobs/train.py debug-readout` trained.
        "debug": ProbeConfig(
            data="demo/evaluate/VOC2012",
            out="demo/eval-probe",
            readouts=("demo/train-readout",),
            features=replace(DEBUG, levels=("x1",)),
            cluster=INLINE,
        ),
    },
}

TASKS = {
    "correspondence": correspondence,
    "video": video,
    "discovery": discovery,
    "cka": cka,
    "similarity": similarity,
    "runtime": runtime,
    "probe": readouts,
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
    },
    stopped="stopped; what is done is kept, the same command continues",
)
run = program.run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
