"""Extract dense features of an image dataset into a Zarr store.

    python jobs/extract.py demo
    python jobs/extract.py --data 'photos/{000..127}.tar' --out feats.zarr --plan
    python jobs/extract.py --data s3://bucket/photos/ --out s3://bucket/feats.zarr --levels x1 x2 pooled
    ray job submit --working-dir . -- python jobs/extract.py --data ... --out ...

The same command continues a run that stopped. Exit codes: 0 complete within the failure budget, 1 not, 2 wrong settings.
"""

import sys
from collections.abc import Iterator
from functools import partial

from jobs.program import Command, Program
from pipelines.config import ClusterConfig
from pipelines.demo_datasets import write_photos
from pipelines.extraction import start
from pipelines.extraction.config import ExtractConfig, start_from_run
from pipelines.features.config import FeatureConfig
from pipelines.published.lift import LIFT_FEATURES

PRESETS: dict[str, ExtractConfig] = {
    # Photographs of scikit-image, DINO ViT-S/16 at 448 px, x1 and x2 and pooled. 2 CPU cores: about 1 minute.
    # `python jobs/extract.py demo`
    "demo": ExtractConfig(
        data=("demo/photos-{000..001}.tar",),
        out="demo/feats.zarr",
        features=FeatureConfig(size="448", levels=("x1", "x2", "pooled"), precision="fp32"),
    ),
    # No network, no Ray: timm's test_vit with random weights on the demo's photos. 2 CPU cores: under 10 seconds.
    # `python jobs/extract.py debug`; what the tests run.
    "debug": ExtractConfig(
        data=("demo/photos-{000..001}.tar",),
        out="demo/debug.zarr",
        features=FeatureConfig(
            model="test_vit.r160_in1k", weights="random", size="160", levels=("x1", "x2", "x0.5", "pooled"), precision="fp32"
        ),
        cluster=ClusterConfig(executor="inline"),
    ),
    # LiFT's DINO features, of images squashed to 448 px. Give --data and --out. 28 x 28 cells: 600 KB an image as float16.
    # `python jobs/extract.py lift-dino-s16 --data ... --out ...`
    "lift-dino-s16": ExtractConfig.of(size="448", geometry="squash", levels=("x1",), **LIFT_FEATURES),
}


def run_demo(config: ExtractConfig) -> Iterator[str]:
    """What `make demo` runs; its picture's libraries are for nothing in any other run."""
    from pipelines import demo

    return demo.main(config)


program = Program(
    name="extract",
    doc=__doc__,
    commands={
        "": Command(
            run=start.main,
            default=ExtractConfig(),
            presets=PRESETS,
            before=dict.fromkeys(("demo", "debug"), partial(write_photos, "demo")),
            instead={"demo": run_demo},
            start=start_from_run,
            about=f"{__doc__}\n--from RUN: settings of an earlier run (run.json or store)",
        )
    },
    stopped="stopped; finished tasks are kept, the same command continues",
)
run = program.run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
