"""What the cluster has, and how many workers of what size fit it."""

import logging
from dataclasses import dataclass

from cluster.session import ClusterError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorkerPool:
    """How many actors of what size a run uses."""

    device: str
    "`cuda` or `cpu`"
    size: int
    cpus: int
    "CPUs, and threads, of one actor"
    gpus: float
    "GPUs of one actor; 0 on CPU"


def choose_pool(device: str, actors: int | None, cpus: int | None, gpus: float | None) -> WorkerPool:
    """Size the actor pool for the connected cluster.

    One actor per GPU with the node's CPUs shared among them; without GPUs one single-threaded actor per CPU (on CPUs, more
    threads per actor lose a fifth of the throughput: see `benchmark.py extract`). `actors` asks for a number, which an
    autoscaling cluster brings up. Raises `ClusterError` if GPUs are asked for and a fixed cluster has none.
    """
    import ray

    total = ray.cluster_resources()
    have_cpus, have_gpus = int(total.get("CPU", 0)), total.get("GPU", 0.0)
    if device == "auto":
        device = "cuda" if have_gpus else "cpu"
        if device == "cpu":
            logger.info(
                "no GPU in the cluster: running on %d CPUs (--device cuda waits for autoscaled GPUs)", have_cpus
            )
    if device == "cpu":
        per_actor = cpus or 1
        size = actors or max(1, have_cpus // per_actor)
        return WorkerPool(device="cpu", size=size, cpus=per_actor, gpus=0)
    per_actor_gpus = gpus or 1
    if not have_gpus and actors is None:
        raise ClusterError(
            "--device cuda, but the cluster has no GPU now. On an autoscaling cluster say how many GPU workers to bring up "
            "with --actors N; otherwise use --device cpu"
        )
    size = actors or max(1, int(have_gpus / per_actor_gpus))
    per_actor_cpus = cpus or max(1, min(16, int(have_cpus / max(size, 1))) if have_cpus else 1)
    return WorkerPool(device="cuda", size=size, cpus=per_actor_cpus, gpus=per_actor_gpus)
