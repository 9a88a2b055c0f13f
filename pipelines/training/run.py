"""What `jobs/train.py` does: a run from its settings to its last checkpoint, and what there is to say of it."""

from collections.abc import Iterator

from pipelines.executors import InlineExecutor, executor_for
from pipelines.features.config import FeatureConfig
from pipelines.training.config import TrainConfig
from pipelines.training.images import ImageTraining
from pipelines.training.loop import TrainSummary, train_inline, train_on_ray
from storage.paths import redact


def train(config: TrainConfig) -> TrainSummary:
    """Train, or continue, to the end. Raises what `config.resolve` raises, `ClusterError` and `TrainFailed`."""
    resolved = config.resolve()  # before a cluster is started: most mistakes end here
    with executor_for(
        inline=config.is_inline, address=config.cluster.ray_address, device=config.cluster.device
    ) as executor:
        if isinstance(executor, InlineExecutor):
            return train_inline(resolved.prepare(executor))
        pool = executor.pool(
            config.cluster.device,
            config.workers,
            config.worker_cpus,
            None,
            accelerator=config.cluster.accelerator,
            all_at_once=True,
            called="worker",
        )
        return train_on_ray(resolved.prepare(executor), pool.device)


def main(config: TrainConfig) -> Iterator[str]:
    """`train`, and what came of it, line by line."""
    summary = train(config)
    metrics = summary.metrics
    rate = f", {metrics['run_images_per_s']:.1f} images/s" if "run_images_per_s" in metrics else ""
    images = f"{metrics.get('images', 0):,} images, {len(summary.failed)} left out{rate}"
    yield f"{summary.out}: {summary.step:,} steps, {images}"
    for row, reason in list(summary.failed.items())[:5]:
        yield f"  row {row}, {reason}"
    held_out = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name.startswith("val_"))
    if held_out:
        yield f"held out   {held_out}"
    best = f"{summary.out}/{summary.best or summary.last}"
    yield f"best       {best}"
    if not isinstance(config, ImageTraining):
        yield f"try next   python jobs/evaluate.py probe --readouts {best} --data ... --out ..."
        return
    yield f"try next   python jobs/extract.py {_same_features(config)} \\"
    yield f"               --levels x1 {config.level}={config.method}:{best} --data ... --out ..."


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
