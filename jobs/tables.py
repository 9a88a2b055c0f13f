"""Run papers' tables from training on, with the published numbers beside the measured ones; or a grid of readouts of your own.

    python jobs/tables.py lift --plan --out s3://bucket/lift
    python jobs/tables.py lift --table 1 3 --data spair=SPair-71k coco20k=COCO photos=IMAGENET_TARS --out s3://bucket/lift
    python jobs/tables.py lift mini --root DATA --table 1 --seeds 0 1 2 --out lift-mini
    python jobs/tables.py deap --table 3 fig7 --data voc=VOC2012 coco=COCO coco_stuff=STUFF nyu=NYU --out s3://bucket/deap
    python jobs/tables.py deap debug
    python jobs/tables.py grid --backbones dinov2-b mae vit_tiny_patch16_224.augreg_in21k_ft_in1k@224 --tasks voc boundaries \\
        --data voc=VOC2012 coco=COCO --seeds 0 1 2 --out grid --paper
    python jobs/tables.py grid --store 's3://bucket/{backbone}-{dataset}-{part}.zarr' ...

`lift`, `vit-up` and `deap` are all of those papers; the word behind them is a scale (paper, mini, debug). `grid` is what you
name: backbones x tasks x methods x seeds of readouts, on models or stores. `python jobs/show.py backbones` lists backbones. The
same command continues what stopped: what is done isn't done again. Exit codes: 0 all cells done, 1 some failed (the tables say
which and why), 2 wrong settings.
"""

import sys
from functools import partial

from jobs.program import Command, Program
from pipelines.config import ActorsConfig
from pipelines.demo_datasets import write_demo, write_photos
from pipelines.tables import deap, lift, paper_report, vit_up
from pipelines.tables.grid import main
from pipelines.tables.grid_cells import GridConfig
from pipelines.tables.papers import PapersConfig
from pipelines.training.readout import ReadConfig, ReadoutTraining

PRESETS: dict[str, GridConfig] = {
    # No network, no Ray: timm's test_vit at two sizes, random weights, on drawn images. 2 CPU cores: about 30 seconds; random
    # features of ten images say nothing. `python jobs/tables.py grid debug`; what the tests run.
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
    )
}

PAPERS: dict[str, PapersConfig] = {
    # The published data and schedules; it needs ImageNet, the data sets and GPUs. Not run here; `--plan` says what it takes.
    "paper": PapersConfig(),
    # Few real photographs, at --root as FOLDERS of pipelines/tables/lift_cells.py, vit_up.py and deap.py have them.
    "mini": PapersConfig(scale="mini", out="tables-mini"),
    # No network, no Ray, drawn images and random weights, which say nothing; what the tests run.
    "debug": PapersConfig(scale="debug", out="demo/tables", cluster=ActorsConfig(executor="inline", device="cpu")),
}


EARLIER: dict[str, str] = {
    "": "grid",
    "debug": "grid debug",
    "deap-table3": "deap --table 3",
    "deap-table5": "deap --table 5",
    "deap-fig4": "deap --table fig4",
    "vit-up-table1": "vit-up --table 1",
}
"""How command lines began, and how they do now."""


def write_debug() -> None:
    """What `PAPERS["debug"]` needs."""
    write_demo("demo/evaluate")
    write_photos("demo")


program = Program(
    name="tables",
    doc=__doc__,
    commands={
        **{
            name: Command(
                run=partial(paper_report.main, plan), default=PAPERS["paper"], presets=PAPERS, before={"debug": write_debug}
            )
            for name, plan in {"lift": lift.plan, "vit-up": vit_up.plan, "deap": deap.plan}.items()
        },
        "grid": Command(run=main, default=GridConfig(), presets=PRESETS, before={"debug": partial(write_demo, "demo/evaluate")}),
    },
    earlier=EARLIER,
    stopped="stopped; the same command goes on from what is done",
    pairs=True,  # so that --cell.no-flip can be said, where a task's published settings mirror images
)
run = program.run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
