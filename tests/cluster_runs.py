"""Real clusters of several nodes for tests/cluster/test_resources.py, in a process that ends with them."""

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
from ray.autoscaler._private.monitor import BASE_READONLY_CONFIG as DEFAULTS
from ray.cluster_utils import Cluster

from cluster.metrics import TaskReport
from cluster.resources import WorkerRequest, choose_pool
from cluster.session import ClusterError
from pipelines.executors import Loaded, RayExecutor
from storage.spec import ShardTask

FAKE = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
KINDS = {
    "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
    "l4": {
        "resources": {"CPU": 8, "GPU": 2},
        "labels": {"ray.io/accelerator-type": "L4"},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 3,
    },
}


def make_worker(model: bool = True) -> SimpleNamespace:
    """A worker for `RayExecutor` that says where it ran, and whether it was given its images."""

    def load(task: ShardTask) -> Loaded:
        return Loaded(np.zeros((2, 4, 4, 3), np.uint8), [])

    def run(task: ShardTask, loaded: Loaded | None = None) -> TaskReport:
        node = ray.get_runtime_context().get_node_id()
        (labels,) = [each["Labels"] for each in ray.nodes() if each["NodeID"] == node]
        kind = labels.get("ray.io/accelerator-type")
        given = loaded is not None and loaded.pixels.shape == (2, 4, 4, 3)
        return TaskReport(block=task.block, error=json.dumps({"kind": kind, "given": given}))

    return SimpleNamespace(load=load, run=run)


@contextlib.contextmanager
def cluster_of(head: dict[str, Any], *others: dict[str, Any]) -> Iterator[None]:
    """Nodes of this process's own, on loopback, and a connection to them."""
    own = {"node_ip_address": "127.0.0.1", "include_dashboard": False, "include_log_monitor": False}
    sizes = {"object_store_memory": 400_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**own, **sizes, **head})
    try:
        for other in others:
            cluster.add_node(**own, **sizes, **other)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.WARNING)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def refusal(**asked: Any) -> str:
    """What `choose_pool` says against it."""
    try:
        return f"taken: {choose_pool(WorkerRequest(**asked))}"
    except ClusterError as error:
        return str(error)


def try_real_clusters(folder: str) -> None:
    """What the subprocess does; prints what it saw as JSON."""
    # Sent by value: workers can't import the tests.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    seen: dict[str, Any] = {}
    config = {
        "cluster_name": "fake",
        "max_workers": 2,
        "available_node_types": KINDS,
        "head_node_type": "ray.head.default",
        "provider": {"type": "external", "module": FAKE, "gcs_address": "127.0.0.1:1", "disable_node_updaters": True},
    }
    path = Path(folder, "autoscaling.json")
    path.write_text(json.dumps({**DEFAULTS, **config}))
    with cluster_of({"num_cpus": 0, "autoscaling_config": str(path)}):
        pool = choose_pool(WorkerRequest(device="auto"))
        seen["head only"] = [pool.device, pool.size, pool.cpus]
        seen["head only, 4 GPUs"] = refusal(device="cuda", actors=4, gpus=4)
        seen["head only, T4"] = refusal(device="cuda", actors=4, accelerator="T4")
    kinds = [{"num_cpus": 1, "num_gpus": 1, "labels": {"ray.io/accelerator-type": kind}} for kind in ("L4", "A100")]
    with cluster_of({"num_cpus": 1}, *kinds):
        seen["4 GPUs"] = refusal(device="cuda", gpus=4)
        seen["8 CPUs"] = refusal(device="auto", cpus=8)
        seen["T4"] = refusal(device="cuda", accelerator="T4")
        seen["3 workers"] = refusal(device="cuda", actors=3, cpus=1, all_at_once=True, called="worker")
        elsewhere = ray.remote(num_cpus=0, label_selector={"ray.io/accelerator-type": "A100"})(refusal)
        seen["4 GPUs, asked by a worker"] = ray.get(elsewhere.remote(device="cuda", gpus=4))
        tasks = [ShardTask(block=n, first=2 * n, last=2 * n + 2) for n in range(4)]
        pool = choose_pool(WorkerRequest(device="cuda", cpus=1, spare_cpu=True))
        seen["decoded apart"] = sorted(
            (report.block, json.loads(report.error)["given"])
            for report in RayExecutor().stream(make_worker, tasks, pool, "cluster")
        )
        pool = choose_pool(WorkerRequest(device="auto", accelerator="A100"))
        seen["kinds"] = [json.loads(report.error)["kind"] for report in RayExecutor().stream(make_worker, tasks, pool)]
        seen["size"] = pool.size
    print(json.dumps(seen))
