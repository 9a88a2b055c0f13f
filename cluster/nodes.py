"""A Ray cluster of several nodes on this machine, whose nodes can be killed and drained as machines are. For chaos tests only.

Every node is a raylet with agents and workers of its own, below a process of its own (`python -m cluster.nodes`); the head has
no CPUs, as a cluster's on-demand head has none. All of it is on loopback, which `ray start` can't do for more than one node,
and ends with this process, however that ends: nodes wait for the end of their input, and the kernel kills Ray's daemons with
their parents.
"""

import contextlib
import json
import logging
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.session import ClusterError, own_cluster

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
START_S = 180.0
"""Seconds in which a new cluster's nodes must be there; about 10 on two cores that do nothing else."""


def local_ray(folder: Path) -> AbstractContextManager[dict[str, str]]:
    """`own_cluster` with what many nodes on one machine need besides; it gives programs that use the cluster their environment.

    `folder` holds Ray's sockets and logs: its path must be short, and nobody else may enter it.
    """
    return own_cluster(
        folder,
        RAY_USAGE_STATS_ENABLED="0",
        # A node that starts on a busy machine isn't a dead one.
        RAY_raylet_start_wait_time_s=str(round(START_S)),
    )


@dataclass(eq=False)
class LocalNode:
    """A node, by the process that started it."""

    name: str
    process: subprocess.Popen[bytes]

    def family(self) -> list[psutil.Process]:
        """Its raylet, agents, workers, and what started them."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        return []

    @property
    def is_up(self) -> bool:
        """Whether its daemons run, or are being started."""
        return self.process.poll() is None


class LocalCluster:
    """A head and worker nodes; a context manager, to be used within `local_ray`."""

    def __init__(self, folder: Path, *, cpus: int = 1, store_bytes: int = 100_000_000):
        self._folder, self._cpus, self._store_bytes = folder, cpus, store_bytes
        self._port, self._started = free_port(), 0
        self.head: LocalNode | None = None
        self.workers: list[LocalNode] = []
        "worker nodes that weren't killed, the oldest first"

    def __enter__(self) -> "LocalCluster":
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """The same for every head."""
        return f"{HOST}:{self._port}"

    def start(self, workers: int) -> None:
        """Start a head and worker nodes, and wait for them. Raises `ClusterError`."""
        self.head = self._launch(head=True)
        deadline = time.monotonic() + START_S
        self._wait(1, deadline)
        for _ in range(workers):
            self.add()
        self._wait(1 + workers, deadline)

    def _wait(self, nodes: int, deadline: float) -> None:
        while len(alive := self.alive()) < nodes:
            if time.monotonic() > deadline:
                raise ClusterError(f"of {nodes} Ray nodes on this machine, {len(alive)} are up after {START_S:g} s")
            time.sleep(0.3)

    def add(self) -> LocalNode:
        """Another worker node, which joins when it's up."""
        node = self._launch(head=False)
        self.workers.append(node)
        return node

    def _launch(self, *, head: bool) -> LocalNode:
        self._started += 1
        name = f"node-{self._started}"
        settings = {"name": name, "head": head, "port": self._port}
        settings |= {"cpus": 0 if head else self._cpus, "store_bytes": self._store_bytes}
        with (self._folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.nodes", json.dumps(settings)],
                cwd=ROOT,
                stdin=subprocess.PIPE,  # never written to; it ends with this process
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return LocalNode(name, process)

    def alive(self) -> dict[str, str]:
        """Nodes that the head takes for alive, itself included: Ray's id by name."""
        from ray._raylet import GcsClient
        from ray.core.generated.gcs_pb2 import GcsNodeInfo
        from ray.exceptions import RpcError

        try:
            found = GcsClient(address=self.address).get_all_node_info(timeout=5).values()
        except (RpcError, RuntimeError):  # no head, or not yet
            return {}
        return {node.node_name: node.node_id.hex() for node in found if node.state == GcsNodeInfo.ALIVE}

    def drain(self, node: LocalNode, seconds: float) -> bool:
        """Tell Ray what a cloud tells of a spot machine: it will be gone in `seconds`. False where Ray doesn't accept it."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        ray_id = self.alive().get(node.name)
        if ray_id is None:
            return False
        deadline_ms = int((time.time() + seconds) * 1000)
        accepted, why = GcsClient(address=self.address).drain_node(ray_id, reason, "spot preemption", deadline_ms)
        if not accepted:
            logger.warning("Ray did not accept that %s is drained: %s", node.name, why)
        return accepted

    def kill(self, node: LocalNode) -> None:
        """SIGKILL to all of a node at once."""
        _kill(node.family())
        node.process.wait()
        if node.process.stdin:
            node.process.stdin.close()
        if node in self.workers:
            self.workers.remove(node)

    def stop(self) -> None:
        """Kill the head, and then all other nodes: what is left when the head's machine dies can't join another head."""
        if self.head:
            self.kill(self.head)
            self.head = None
        for node in list(self.workers):
            self.kill(node)
        # Agents of nodes that ended by themselves outlive them by minutes.
        _kill(processes_in(self._folder))


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def processes_in(folder: Path) -> list[psutil.Process]:
    """Processes, but for this one, that have files below `folder` open: all of Ray's have logs there."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and any(Path(f.path).is_relative_to(folder) for f in process.open_files()):
                found.append(process)
    return found


def fill_stores(address: str, size: float, seconds: float) -> None:
    """Hold `size` bytes of objects in each node's object store for a while: beyond its size, Ray spills to the disk."""
    import numpy as np
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def hold() -> None:
        pieces = [ray.put(np.zeros(10_000_000, np.uint8)) for _ in range(int(size // 10_000_000))]
        time.sleep(seconds)
        del pieces

    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    task = ray.remote(num_cpus=0, max_retries=0)(hold)
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in ray.nodes() if node["Alive"]]
    held = [task.options(scheduling_strategy=place).remote() for place in places]
    ray.wait(held, num_returns=len(held), timeout=10 * seconds)


def free_port() -> int:
    """A port of the loopback that nobody has now."""
    with socket.socket() as s:
        s.bind((HOST, 0))
        return s.getsockname()[1]


def run_node(name: str, head: bool, port: int, cpus: int, store_bytes: int) -> None:
    """Be a node until one of its daemons, or whoever started this process, is gone."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    folder = Path(os.environ["RAY_TMPDIR"])
    where = {"gcs_server_port": port} if head else {"gcs_address": f"{HOST}:{port}"}
    settings = RayParams(
        **where,
        node_name=name,
        node_ip_address=HOST,
        # Of the names that Ray would give them, two nodes that start at the same time would take the same.
        plasma_store_socket_name=str(folder / f"{name}.store"),
        raylet_socket_name=str(folder / f"{name}.raylet"),
        num_cpus=cpus,
        num_gpus=0,
        object_store_memory=store_bytes,
        # Any free port: the default one may be another Ray's.
        dashboard_agent_listen_port=0,
        min_worker_port=0,
        max_worker_port=0,
        node_manager_port=0,
        include_dashboard=False,
        include_log_monitor=False,
        no_monitor=True,
    )
    node = Node(settings, head=head, shutdown_at_exit=True, spawn_reaper=True)
    while not node.dead_processes() and not select.select([sys.stdin], [], [], 0)[0]:  # until the input ends
        time.sleep(0.5)
    _kill(psutil.Process().children(recursive=True))  # agents and workers, too
    node.kill_all_processes(check_alive=False, allow_graceful=False)


if __name__ == "__main__":
    run_node(**json.loads(sys.argv[1]))
