"""Run papers' tables from training on, with the published numbers beside the measured ones; or a grid of readouts of your own.

    python jobs/tables.py lift --plan --out s3://bucket/lift
    python jobs/tables.py lift --table 1 3 --data spair=SPair-71k coco20k=COCO photos=IMAGENET_TARS --out s3://bucket/lift
    python jobs/tables.py lift mini --root DATA --table 1 --out lift-mini
    python jobs/tables.py deap --table 3 fig7 --data voc=VOC2012 coco=COCO coco_stuff=STUFF nyu=NYU --out s3://bucket/deap
    python jobs/tables.py deap debug
    python jobs/tables.py --backbones dinov2-b mae vit_tiny_patch16_224.augreg_in21k_ft_in1k@224 --tasks voc boundaries \\
        --data voc=VOC2012 coco=COCO --seeds 0 1 2 --out grid --paper
    python jobs/tables.py deap-table3 --data voc=... coco=... coco_stuff=... nyu=... --seeds 0 1 2 --out s3://bucket/table3
    python jobs/tables.py --store 's3://bucket/{backbone}-{dataset}-{part}.zarr' ...

`lift`, `vit-up` and `deap` are all of those papers; the word behind them is a scale (paper, mini, debug). Without such a
word it's a grid: backbones x tasks x methods x seeds of readouts, on models or stores; its first word is a preset, or left out.
`python jobs/show.py backbones` lists backbones. The same command continues what stopped: what is done isn't done again. Exit
codes: 0 all cells done, 1 some failed (the tables say which and why), 2 wrong settings.
"""

import sys
from functools import partial

from jobs.program import Command, Program
from pipelines.config import ActorsConfig
from pipelines.demo_datasets import write_demo, write_photos
from pipelines.published.deap import DEAP_ABLATED, DEAP_ABLATIONS, DEAP_TASKS
from pipelines.published.vit_up import PROBE_TASKS, VIT_UP_FEATURES, VIT_UP_SEED, VIT_UP_SIZE
from pipelines.tables import deap, lift, paper_report, vit_up
from pipelines.tables.backbones import BACKBONES
from pipelines.tables.grid import main
from pipelines.tables.grid_cells import GridConfig
from pipelines.tables.papers import PapersConfig
from pipelines.training.readout import ReadConfig, ReadoutTraining

PRESETS: dict[str, GridConfig] = {
    # No network, no Ray: timm's test_vit at two sizes, random weights, on drawn images. 2 CPU cores: about 30 seconds; random
    # features of ten images say nothing. `python jobs/tables.py debug`; what the tests run.
    "debug": GridConfig(
        out="demo/grid",
        backbones=("test_vit.r160_in1k@64", "test_vit.r160_in1k@128"),
        tasks=("voc", "boundaries"),
        methods=("deap", "linear"),
        data=("voc=demo/evaluate/VOC2012", "coco=demo/evaluate/coco"),
        backbone_weights="random",
        max_steps=10,
        cell=ReadoutTraining(
            side=64, batch=3, lr=1e-2, features=ReadConfig(precision="fp32"), checkpoint_every=10, validate_every=20
        ),
        speed_reference="test_vit.r160_in1k",
        speed_reference_size=64,
        speed_batches=3,
        cluster=ActorsConfig(executor="inline", device="cpu"),
    ),
    # DeAP Table 3: 16 of its 18 backbones (timm lacks SAM2's neck and MoCo v3's weights), six tasks; the numbers are printed by
    # --paper. 96 runs, 64,000 to 73,000 steps of 32 images a backbone; the paper has VOC's at under 16 minutes on an RTX 2080.
    # Not run here: it needs COCO, VOC 2012, NYUv2, the weights and GPUs.
    "deap-table3": GridConfig(backbones=tuple(each.name for each in BACKBONES if not each.absent), tasks=DEAP_TASKS),
    # DeAP Table 5, the ablations. Not run here.
    "deap-table5": GridConfig(
        backbones=DEAP_ABLATED, tasks=("detection", "voc", "depth"), methods=("deap", *DEAP_ABLATIONS.rows)
    ),
    # DeAP Fig. 4, which has no numbers: DeAP against what it replaces. Not run here.
    "deap-fig4": GridConfig(backbones=("dinov2-b",), tasks=DEAP_TASKS, methods=("deap", "bicubic", "transposed", "linear")),
    # ViT-Up Table 1's first row: linear probes of the plain map. Not run here.
    "vit-up-table1": GridConfig(
        backbones=(f"{VIT_UP_FEATURES['model']}@{VIT_UP_SIZE}",), tasks=PROBE_TASKS, methods=("linear",), seeds=(VIT_UP_SEED,)
    ),
}

PAPERS: dict[str, PapersConfig] = {
    # The published data and schedules; it needs ImageNet, the data sets and GPUs. Not run here; `--plan` says what it takes.
    "paper": PapersConfig(),
    # Few real photographs, at --root as FOLDERS of pipelines/tables/lift_cells.py, vit_up.py and deap.py have them.
    "mini": PapersConfig(scale="mini", out="tables-mini"),
    # No network, no Ray, drawn images and random weights, which say nothing; what the tests run.
    "debug": PapersConfig(scale="debug", out="demo/tables", cluster=ActorsConfig(executor="inline", device="cpu")),
}


def write_debug() -> None:
    """What `PAPERS["debug"]` needs."""
    write_demo("demo/evaluate")
    write_photos("demo")


program = Program(
    name="tables",
    doc=__doc__,
    commands={
        "": Command(
            run=main, default=GridConfig(), presets=PRESETS, before={"debug": partial(write_demo, "demo/evaluate")}, about=__doc__
        ),
        **{
            name: Command(
                run=partial(paper_report.main, plan), default=PAPERS["paper"], presets=PAPERS, before={"debug": write_debug}
            )
            for name, plan in {"lift": lift.plan, "vit-up": vit_up.plan, "deap": deap.plan}.items()
        },
    },
    stopped="stopped; the same command goes on from what is done",
    pairs=True,  # so that --cell.no-flip can be said, where a task's published settings mirror images
)
run = program.run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
