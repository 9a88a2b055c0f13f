"""What `jobs/train.py` does: a run from its settings to its last checkpoint, in this process or in Ray Train's workers."""

import contextlib
import json
import logging
import signal
import textwrap
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from cluster import progress as shown
from cluster.repeated import every
from cluster.resources import WorkerRequest, accelerator_selector
from operators.vitdet import named as vitdet
from pipelines.config import absolute
from pipelines.executors import InlineExecutor, RayExecutor, executor_for
from pipelines.features.config import FeatureConfig
from pipelines.provenance import NOTHING_RUN, planned
from pipelines.training.config import TrainConfig, TrainSetup
from pipelines.training.images import ImageTraining
from pipelines.training.loop import Group, Progress, Trainer, TrainFailed
from pipelines.training.vitdet import ViTDetTraining
from pipelines.training.watch import Validations
from storage.documents import decode, decode_known, parse_json
from storage.paths import Folder, StorageError, filesystem
from storage.redaction import redact
from storage.runs import read_last, read_metrics, read_pointers
from storage.totals import KEEP_THEM

if TYPE_CHECKING:
    import pyarrow.fs
    import ray
    from fsspec import AbstractFileSystem
    from ray.train.torch import TorchTrainer

logger = logging.getLogger(__name__)

FOLLOW_S = 5.0
"""Seconds between looks at a run's metrics."""

_PROGRESS = "progress.json"


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """What became of a run, from its folder."""

    out: str
    step: int
    last: str
    best: str | None
    metrics: Mapping[str, float]
    "the last values of each; of held-out images, those of the last validation alone"
    validations: Validations | None
    "of the last step and of the best checkpoint; None: there was none yet"
    failed: Mapping[str, str]
    "images left out: row and reason"
    held_out: Mapping[str, str] = field(default_factory=dict)
    "held-out images that the last validation left out: row and reason"
    notes: tuple[str, ...] = ()
    "see `TrainSetup.notes`"


def train(config: TrainConfig) -> TrainSummary:
    """Train, or continue, to the end. Raises what `config.resolve` raises, `ClusterError` and `TrainFailed`."""
    resolved = config.resolve()  # before a cluster is started: most mistakes end here
    with executor_for(config) as executor:
        if config.is_inline:
            return train_inline(resolved.prepare(executor))
        if read_pointers(Folder(absolute(config.out), config.options)) is not None:  # perhaps nothing is left to do
            setup = resolved.prepare(executor)
            if setup.steps_done() >= setup.order.steps:
                return train_inline(setup, "cpu")
            return train_on_ray(setup, executor.pool(config.worker_request).device)
        pool = executor.pool(config.worker_request)  # what the cluster can't meet, before the input is indexed
        return train_on_ray(resolved.prepare(executor), pool.device)


def plan_lines(config: TrainConfig) -> Iterator[str]:
    """What a run will do, and what of it is done, in words. The data is listed and held against the run that is there, if one is.
    Raises what `config.resolve` raises, and `ConfigError`."""
    with planned(config, config.out) as drafted:
        setup = drafted.resolve().prepare(InlineExecutor())
    order, done = setup.order, setup.steps_done()
    left = order.steps - done
    batch, again = min(config.batch, order.n_rows), f", from step {done:,} on" if done else ""
    yield f"run        {redact(config.out, config.options)}: {done:,} of {order.steps:,} steps done, {left:,} to go"
    yield f"images     {order.n_rows:,} to train on, {batch:,} a step, {order.steps_per_epoch:,} steps an epoch"
    yield f"held out   {len(setup.held_out_rows):,} images, every {config.validate_every:,} steps and at the end"
    checkpoints = len({*range(config.checkpoint_every, order.steps, config.checkpoint_every), order.steps} - set(range(done + 1)))
    yield f"checkpoints {checkpoints:,} more, every {config.checkpoint_every:,} steps and at the end{again}"
    yield from (f"note       {note}" for note in setup.notes)
    yield NOTHING_RUN


def main(config: TrainConfig) -> Iterator[str]:
    """`train`, and what came of it, line by line; with --plan, what it would do."""
    if config.plan:
        yield from plan_lines(config)
        return
    summary = train(config)
    metrics = summary.metrics
    rate = f", {metrics['run_images_per_s']:.1f} images/s" if "run_images_per_s" in metrics else ""
    images = f"{metrics.get('images', 0):,} images, {len(summary.failed)} left out{rate}"
    yield f"{summary.out}: {summary.step:,} steps, {images}"
    for row, reason in list(summary.failed.items())[:5]:
        yield f"  row {row}, {reason}"
    if clipped := metrics.get("clipped"):
        trained = f"{clipped:,} of {metrics.get('images', 0):,} images, each as often as it was trained on"
        yield f"clamped    {trained}, have features beyond float16's range; {KEEP_THEM}"
    yield from _held_out_lines(summary)
    yield from (f"note       {note}" for note in summary.notes)
    best = f"{summary.out}/{summary.best or summary.last}"
    yield f"{'best' if summary.best else 'last'}       {best}"
    if isinstance(config, ViTDetTraining):
        asked = (
            f"--detector {best}"
            if config.trains_backbone
            else f"--detector {redact(config.weights, config.options)} --finetuned {best}"
        )
        yield f"try next   python jobs/evaluate.py detection {asked} --data ... --out ..."
        return
    if not isinstance(config, ImageTraining):
        yield f"try next   python jobs/evaluate.py probe --readouts {best} --data ... --out ..."
        return
    yield f"try next   python jobs/extract.py {_same_features(config)} \\"
    yield f"               --levels x1 {config.level}={config.method}:{best} --data ... --out ..."
    if config.trains == "lift" and config.features.model in vitdet.NAMES.values():
        weights = redact(config.features.weights, config.options)
        yield f"or         python jobs/train.py vitdet-lift-coco --weights {weights} --upsampler {config.method}:{best} \\"
        yield "               --data ... --out ..."


def _held_out_lines(summary: TrainSummary) -> Iterator[str]:
    """The scores of the last validation and, where that is another one, of the best checkpoint's, each with its step; and over
    how many images they are."""
    found = summary.validations
    if found is None:
        yield "held out   nothing was judged, so that there is no best checkpoint"
        return
    last = "the last and, by val_loss, the best" if found.best == found.last else "the last"
    yield f"held out   step {found.last.step:,}, {last}: {found.last}"
    if found.last.over:
        yield f"           {found.last.over}"
    for row, reason in list(summary.held_out.items())[:5]:
        yield f"  held-out row {row}, {reason}"
    if found.best and found.best != found.last:
        yield f"           step {found.best.step:,}, the best by val_loss: {found.best}"


def _same_features(config: ImageTraining) -> str:
    """Flags of jobs/extract.py for the features that were trained on."""
    plain = FeatureConfig()
    flags = [f"--model {config.features.model} --size {config.backbone_size}"]
    for name in ("weights", "revision", "geometry", "facet", "layers", "norm", "pos_embed"):
        value = getattr(config.features, name, getattr(plain, name))
        if value != getattr(plain, name):
            words = " ".join(str(each) for each in value) if isinstance(value, tuple) else value
            flags.append(f"--{name.replace('_', '-')} {words}")
    return redact(" ".join(flags), config.options)


# --- in one process, or in several ------------------------------------------------------------------------------------


def train_inline(setup: TrainSetup, device: Literal["auto", "cpu", "cuda"] | None = None) -> TrainSummary:
    """Train in this process, on the settings' device or another one. Raises `TrainFailed`."""
    _log_notes(setup)
    executor = InlineExecutor()
    found = executor.pool(WorkerRequest(device=device or setup.config.cluster.device)).device
    with _progress(setup) as progress:
        Trainer(setup, Group(), torch.device(found), progress.reach).run(executor)
    return replace(summarise(setup.folder), notes=setup.notes)


def _progress(setup: TrainSetup) -> shown.Progress:
    return shown.Progress(total=setup.order.steps, done=setup.steps_done(), unit="steps", note="before the first step")


def _log_notes(setup: TrainSetup) -> None:
    for note in setup.notes:
        logger.warning("%s", note)
    for note in setup.config.said_once(setup.order):
        logger.info("%s", note)


def train_on_ray(setup: TrainSetup, device: str) -> TrainSummary:
    """Train in Ray Train's workers; lost ones are replaced, and all go on from the last checkpoint.

    Needs a connected session. Raises `TrainFailed`, also once --max-failures are used up.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    _log_notes(setup)
    config, scratch = setup.config, f"{setup.folder.url}/ray_train/{uuid.uuid4().hex}"
    fs, path = filesystem(scratch, config.options)
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"setup": [ray.put(setup)]},
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=device == "cuda",
            resources_per_worker={"CPU": config.worker_cpus, **({"GPU": 1} if device == "cuda" else {})},
            # What types it has are those of an earlier version.
            label_selector=accelerator_selector(config.cluster.accelerator) if config.cluster.accelerator else None,  # type: ignore[call-arg]
        ),
        run_config=RunConfig(
            name="run",
            failure_config=FailureConfig(max_failures=config.max_failures),
            storage_path=path,
            storage_filesystem=_ray_storage(fs, path),
        ),
    )
    try:
        setup.folder.remove([_PROGRESS])  # of a start that was killed
        follower = _Follower(setup.folder, len(read_metrics(setup.folder)))
        with _progress(setup) as follower.progress, every(FOLLOW_S, follower, "follow-metrics"):
            _fit(trainer)
    except TrainingFailedError as error:
        reason = textwrap.shorten(str(error), 2000, placeholder=" ...")
        raise TrainFailed(
            f"given up after {config.max_failures} restarts (--max-failures); the same command goes on from the last "
            f"checkpoint. The last failure: {reason}"
        ) from error
    finally:
        _remove_scratch(fs, path)
        with contextlib.suppress(OSError, StorageError):  # never worth a finished run
            setup.folder.remove([_PROGRESS])
    stopped = [line["stopped"] for line in read_metrics(setup.folder) if "stopped" in line]
    if stopped:
        raise TrainFailed(str(stopped[-1]))
    return replace(summarise(setup.folder), notes=setup.notes)


def _fit(trainer: "TorchTrainer") -> None:
    """`fit`, in which an interrupt and SIGTERM are those of the program.

    Ray Train answers one with an exit whose code says that all went well; Ray, where it is initialised again, the other with an
    exit of code 15.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        trainer.fit()
    except SystemExit as ended:
        if ended.code != signal.SIGTERM:
            raise KeyboardInterrupt from None
        before[signal.SIGTERM] = signal.SIG_IGN  # schedulers send several, and one is answered
        raise KeyboardInterrupt(signal.SIGTERM) from None
    finally:
        if is_main:
            for number, answer in before.items():
                signal.signal(number, answer)


@dataclass
class _Follower:
    """Logs a run's metrics as they appear, with each checkpoint: what workers log stays on their nodes."""

    folder: Folder
    seen: int
    progress: shown.Progress | None = None

    def __call__(self) -> None:
        try:
            self._look_how_far()
            lines = read_metrics(self.folder)
        except (OSError, StorageError) as error:  # training goes on without being watched
            logger.warning("metrics can't be read: %s", error)
            return
        for line in lines[self.seen :]:
            logger.info("%s", ", ".join(f"{name} {value}" for name, value in line.items()))
        self.seen = len(lines)

    def _look_how_far(self) -> None:
        with contextlib.suppress(FileNotFoundError, ValueError):  # not yet, or being written
            far = decode(_Far, parse_json(self.folder.read(_PROGRESS)))
            if self.progress is not None:
                self.progress.reach(far.step, far.said)


@dataclass(frozen=True, kw_only=True)
class _Far:
    """What progress.json says while a run goes on in other processes: metrics come with checkpoints only."""

    step: int
    said: str


class _Teller:
    """Says to the driver how far worker 0 is, every few seconds."""

    def __init__(self, folder: Folder):
        self._folder, self._next = folder, 0.0

    def __call__(self, step: int, said: str) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + FOLLOW_S
        try:
            self._folder.write(_PROGRESS, json.dumps(asdict(_Far(step=step, said=said))).encode())
        except (OSError, StorageError) as error:  # training goes on without being watched
            logger.warning("progress was not saved: %s", error)


def _ray_storage(fs: "AbstractFileSystem", path: str) -> "pyarrow.fs.FileSystem | None":
    """For Ray Train's own notes, which every node must be able to reach, and which lie beside ours; the state isn't in them."""
    from fsspec.implementations.local import LocalFileSystem

    if isinstance(fs, LocalFileSystem):
        Path(path).mkdir(parents=True, exist_ok=True)
        return None
    import pyarrow.fs

    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))


def _remove_scratch(fs: "AbstractFileSystem", path: str) -> None:
    try:
        fs.rm(path.rsplit("/", 1)[0], recursive=True)
    except FileNotFoundError:
        return
    except OSError as error:  # never worth a finished run
        logger.warning("Ray Train's notes could not be removed: %s", error)


def _train_worker(settings: "Mapping[str, list[ray.ObjectRef[TrainSetup]]]") -> None:
    """Ray Train's function: one of the processes."""
    import ray
    import ray.train.torch

    setup = ray.get(settings["setup"][0])
    torch.set_num_threads(setup.config.worker_cpus)
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where NCCL puts gathered objects
    group = Group(rank=torch.distributed.get_rank(), world=torch.distributed.get_world_size())
    try:
        Trainer(setup, group, device, None if group.rank else _Teller(setup.folder)).run(RayExecutor())
    except TrainFailed as error:
        # Starting again would end the same way. The driver finds the reason among the metrics.
        logger.error("%s", error)


def summarise(folder: Folder) -> TrainSummary:
    """What became of the run in `folder`. Raises `TrainFailed` where it has no checkpoint."""
    pointers, last = read_pointers(folder), read_last(folder)
    if pointers is None or last is None:
        raise TrainFailed(f"{folder.displayed} has no checkpoint")
    metrics: dict[str, float] = {}
    for line in read_metrics(folder):
        if any(name.startswith("val_") for name in line):  # nothing of an earlier validation beside it
            metrics = {name: value for name, value in metrics.items() if not name.startswith("val_")}
        metrics |= {name: value for name, value in line.items() if isinstance(value, int | float)}
    progress = decode_known(Progress, last.progress)
    return TrainSummary(
        out=folder.displayed,
        step=last.step,
        last=pointers.last,
        best=pointers.best,
        metrics=metrics,
        validations=Validations.read(folder),
        failed=progress.failed,
        held_out=progress.held_out,
    )
