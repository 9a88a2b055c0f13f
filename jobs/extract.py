"""Extract dense features of an image dataset into a Zarr store.

    python jobs/extract.py demo
    python jobs/extract.py --data 'photos/{000..127}.tar' --out feats.zarr --plan
    python jobs/extract.py --data s3://bucket/photos/ --out s3://bucket/feats.zarr --levels x1 x2 pooled
    ray job submit --working-dir . -- python jobs/extract.py --data ... --out ...

The same command continues a run that stopped. Exit codes: 0 complete within the failure budget, 1 not, 2 wrong settings.
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any

import tyro

from cluster.session import connect
from jobs.program import pick_word, run_program
from pipelines.config import ConfigError, runs_inline
from pipelines.demo import write_photos
from pipelines.executors import InlineExecutor, RayExecutor
from pipelines.extraction.config import ExtractConfig, config_from_run
from pipelines.extraction.plan import make_plan
from pipelines.extraction.prepare import prepare, resolve
from pipelines.extraction.run import Summary, pool_for, run_prepared
from pipelines.features.weights import WeightsUnavailable
from pipelines.showing.views import pick_rows, view_panel
from storage.left_out import left_out_lines
from storage.store import FeatureStore

DEMO_OUT = "demo/feats.zarr"

PRESETS: dict[str, ExtractConfig] = {
    # Photographs of scikit-image, DINO ViT-S/16 at 448 px, x1 and x2 and pooled. 2 CPU cores: about 1 minute.
    # `python jobs/extract.py demo`
    "demo": ExtractConfig(
        data=("demo/photos-{000..001}.tar",),
        out=DEMO_OUT,
        size="448",
        levels=("x1", "x2", "pooled"),
        precision="fp32",
    ),
    # No network, no Ray: timm's test_vit with random weights on the demo's photos. 2 CPU cores: under 10 seconds.
    # `python jobs/extract.py debug`; what the tests run.
    "debug": ExtractConfig(
        data=("demo/photos-{000..001}.tar",),
        out="demo/debug.zarr",
        model="test_vit.r160_in1k",
        weights="random",
        size="160",
        levels=("x1", "x2", "x0.5", "pooled"),
        precision="fp32",
        executor="inline",
    ),
    # LiFT's DINO features (arXiv 2403.14625; specs/lift_vitup.md A5): keys of the last block, DINO's position embeddings,
    # images squashed to 448 px. Give --data and --out. ViT-S/16, 28 x 28 cells: 600 KB an image as float16.
    # `python jobs/extract.py lift-dino-s16 --data ... --out ...`
    "lift-dino-s16": ExtractConfig(
        size="448", geometry="squash", facet="key", pos_embed="dino", levels=("x1",), precision="fp32"
    ),
}


def parse(argv: Sequence[str]) -> tuple[str | None, ExtractConfig]:
    """The preset's name, if one is named, and the settings. Exits with a suggestion on unknown names and flags."""
    args = list(argv)
    name = pick_word(args, PRESETS, "no preset")
    default = PRESETS[name] if name else ExtractConfig()
    if "--from" in args:
        at = args.index("--from")
        if at + 1 == len(args):
            raise ConfigError("--from needs a run.json or a store")
        default = config_from_run(args[at + 1], _options_in(args))
        del args[at : at + 2]
    description = (
        (__doc__ or "")
        + "\nPresets: "
        + ", ".join(PRESETS)
        + "\n--from RUN: settings of an earlier run (run.json or store)"
    )
    config = tyro.cli(
        Annotated[ExtractConfig, tyro.conf.arg(name="")],
        default=default,
        args=args,
        prog="python jobs/extract.py [PRESET]",
        description=description,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return name, config


def _options_in(args: Sequence[str]) -> dict[str, Any] | None:
    """--storage-options among `args`: --from may have to read a run.json with them."""
    if "--storage-options" in args[:-1]:
        return replace(ExtractConfig(), storage_options=args[list(args).index("--storage-options") + 1]).options
    return None


@contextlib.contextmanager
def executor_for(config: ExtractConfig) -> Iterator[Any]:
    """The executor that `config` asks for, with a Ray session round it where it needs one."""
    if runs_inline(config.executor, *config.data, config.out):
        yield InlineExecutor()
        return
    gpus = 0 if config.device == "cpu" else None
    with connect(config.ray_address, num_gpus=gpus):
        yield RayExecutor()


def main(config: ExtractConfig) -> Summary | None:
    """Plan or run the extraction; returns None after --plan."""
    resolved = resolve(config)  # before a cluster is started: most mistakes end here
    with executor_for(config) as executor:
        pool = pool_for(config, executor)  # what the cluster can't meet, before the input is indexed
        prepared = prepare(resolved, executor)
        if config.plan:
            plan = make_plan(prepared, device=pool.device, actors=pool.size, threads=pool.cpus)
            prepared.keep_index()
            if config.json:
                print(json.dumps(plan.to_json(), indent=1))
            else:
                print(
                    plan.describe()
                    + "\nnothing was run (the index of the input is kept with the output); drop --plan to start"
                )
            return None
        summary = run_prepared(prepared, executor)
    _report(summary)
    return summary


def _report(summary: Summary) -> None:
    total = sum(summary.stage_seconds.values()) or 1
    stages = ", ".join(f"{stage} {value / total:.0%}" for stage, value in summary.stage_seconds.items())
    print(f"{summary.out}: {summary.ok:,} images ok, {summary.failed:,} failed")
    for reason in summary.reasons:
        print(f"  {reason}")
    for line in left_out_lines(summary.left_out):
        print(f"  left out of the input: {line}")
    if summary.this_run:
        print(
            f"this run: {summary.this_run:,} images in {summary.seconds:.1f} s (first task after {summary.start_up_s:.1f} s), "
            f"{summary.bytes_written / 1e6:.1f} MB written; worker time: {stages}"
        )


def demo(config: ExtractConfig) -> None:
    """The first run: photographs, features, a picture, and what to try next."""
    try:
        summary = main(config)
    except WeightsUnavailable as error:
        print(f"\nNo pretrained weights: {error}")
        print("The demo goes on with RANDOM weights, and the store says so: the picture shows that the pipeline works,")
        print("not what good features look like.\n")
        config = replace(config, weights="random", out=config.out.replace(".zarr", "-random.zarr"))
        summary = main(config)
    if summary is None:
        return
    store, picture = FeatureStore.open(config.out), config.out.replace(".zarr", ".png")
    view_panel(store, pick_rows(store, len(store))).draw().save(picture)
    print(f"\npicture    {picture}")
    print(f"store      {config.out}")
    print("try next   " + f"python -c \"import zarr; print(zarr.open_group('{config.out}', mode='r').tree())\"")
    print("           python jobs/extract.py --data <folder of images or tars> --out feats.zarr --plan")


def execute(name: str | None, config: ExtractConfig) -> None:
    """What was parsed; the demos' photographs are made first."""
    if name in ("demo", "debug"):
        write_photos("demo")
    (demo if name == "demo" else main)(config)


def run(argv: Sequence[str]) -> int:
    """The exit code of a command line."""
    stopped = "stopped; finished tasks are kept, the same command continues"
    return run_program(argv, parse, execute, stopped=stopped)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
