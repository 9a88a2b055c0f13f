"""What the cluster has, what its autoscaler may add, and how many workers of what size fit; what can't fit is refused at once.

Ray itself lets a request that no node can meet wait for ever. `ray.nodes()` says what is there. What an autoscaler may add
is in no answer of Ray 2.60's (`get_cluster_config()` is None, with either autoscaler): it is read from the file that the
head's monitor process was started with. Where that process is elsewhere (KubeRay), what is asked for is believed.
"""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NotRequired, TypedDict

from cluster.session import ClusterError, is_own

logger = logging.getLogger(__name__)

ACCELERATOR_LABEL = "ray.io/accelerator-type"
"""Ray's own label of a GPU node; launch files give it to node types, too."""

MOST_CPUS = 16
"""CPUs of one GPU actor where none were asked for: more don't make decoding for one GPU faster."""

WITHOUT_BF16 = ("K80", "P100", "P4", "V100", "T4")
"""Kinds of NVIDIA's GPUs, as Ray calls them, that were made before Ampere and don't compute in bf16."""

ANSWER_S = 60.0
"""How long the head may take to say what its autoscaler may add: it starts a process for that, unless we run there."""


class Placement(TypedDict):
    """Keyword arguments by which Ray places an actor or a task."""

    num_cpus: int
    num_gpus: NotRequired[float]
    label_selector: NotRequired[dict[str, str]]


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
    accelerator: str | None = None
    "the kind of GPU that actors must have"
    calls: int = 1
    "tasks that overlap in an actor: some read and write while another computes"
    kinds: tuple[str, ...] = field(default=(), compare=False)
    "kinds of GPU, as Ray calls them, that actors may get, as far as nodes say so"

    @property
    def gpu_share(self) -> float:
        """The part of a GPU's memory that an actor may take."""
        return self.gpus if 0 < self.gpus < 1 else 1.0

    @property
    def placement(self) -> "Placement":
        """Options of Ray for one actor, as `ray.remote` and `map_batches` take them."""
        options = Placement(num_cpus=self.cpus)
        if self.gpus:
            options["num_gpus"] = self.gpus
        if self.accelerator:
            options["label_selector"] = accelerator_selector(self.accelerator)
        return options


def accelerator_selector(kind: str) -> dict[str, str]:
    """Ray's label selector for nodes with this kind of GPU."""
    return {ACCELERATOR_LABEL: kind}


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """Nodes that are alike: some that are there, or a kind that an autoscaler may bring up."""

    count: int
    cpus: int
    gpus: int = 0
    accelerator: str | None = None
    head: bool = False

    def __str__(self) -> str:
        kind = f" {self.accelerator}" if self.accelerator else ""
        return f"{self.count} x {self.cpus} CPUs" + (f" and {self.gpus} GPUs{kind}" if self.gpus else "")


@dataclass(frozen=True, kw_only=True)
class Growth:
    """All that a cluster may become; on one without autoscaler there are no nodes in it."""

    nodes: tuple[Nodes, ...] = ()
    most_workers: int = 0
    "nodes besides the head, of all kinds together"


@dataclass(frozen=True, kw_only=True)
class WorkerRequest:
    """What a run asks of the cluster; None leaves it to `size_pool`."""

    device: str
    actors: int | None = None
    cpus: int | None = None
    gpus: float | None = None
    accelerator: str | None = None
    spare_cpu: bool = False
    "leave a CPU for tasks beside the actors"
    all_at_once: bool = False
    "fewer than `actors` are of no use"
    called: str = "actor"
    "in the settings that errors name: --actor-cpus"

    @property
    def count_flag(self) -> str:
        """The setting for the number of workers."""
        return "--workers" if self.called == "worker" else "--actors"


def choose_pool(request: WorkerRequest) -> WorkerPool:
    """Size the actor pool for the connected cluster. Raises `ClusterError` for what the cluster can't meet."""
    return size_pool(request, present_nodes(), read_growth)


def size_pool(request: WorkerRequest, present: Sequence[Nodes], read: Callable[[], Growth | None]) -> WorkerPool:
    """How many actors of what size to use.

    One actor per GPU with its node's CPUs shared among them; without GPUs one single-threaded actor per CPU (on CPUs, more
    threads per actor lose a fifth of the throughput: see `benchmark.py extract`). Where the nodes that are there don't
    suffice, `read` is asked what the autoscaler may make of them; it gives None where that can't be known. Raises
    `ClusterError` if no node has room for one actor, or for what the request needs besides.
    """
    read = functools.cache(read)  # it may start a process on the head, and is asked up to twice
    device = _device(request, present, read)
    nodes, pool = present, _fill(request, device, present)
    least = request.actors or 1 if request.all_at_once else 1
    if pool.size < (request.actors or 1 if request.spare_cpu else least):
        growth = read()
        if growth is None:
            return _believed(request, pool)
        reachable = _reachable(growth, lambda kind: _room(kind, pool.cpus, pool.gpus, pool.accelerator))
        grown = _fill(request, device, reachable)
        # Even where nothing fits at all, the refusal names what the autoscaler may add.
        if grown.size > pool.size or (reachable and not pool.size):
            nodes, pool = reachable, grown
    if pool.size < least:
        raise ClusterError(_refusal(request, pool, nodes))
    if request.spare_cpu:
        return _leave_a_cpu(request, pool, nodes)
    return replace(pool, size=request.actors or pool.size)


def _device(request: WorkerRequest, present: Sequence[Nodes], read: Callable[[], Growth | None]) -> str:
    """`cuda` where the cluster has GPUs; where it has nothing yet, where it may have them."""
    if request.device != "auto":
        return request.device
    if request.accelerator or any(kind.gpus for kind in present):
        return "cuda"
    if not any(kind.cpus for kind in present) and any(kind.gpus for kind in (read() or Growth()).nodes):
        return "cuda"
    _say_that_there_is_no_gpu()
    return "cpu"


@functools.cache
def _say_that_there_is_no_gpu() -> None:
    """Once, however many pools are asked for."""
    logger.info("no GPU in the cluster: running on CPUs (--device cuda waits for autoscaled GPUs)")


def _fill(request: WorkerRequest, device: str, nodes: Sequence[Nodes]) -> WorkerPool:
    """As many actors as fit; size 0 where none does."""
    gpus = 0 if device == "cpu" else request.gpus or 1
    cpus = request.cpus or (_share(nodes, gpus, request.accelerator, request.spare_cpu) if gpus else 1)
    size = sum(kind.count * _room(kind, cpus, gpus, request.accelerator) for kind in nodes)
    named = {kind.accelerator for kind in nodes if gpus and kind.accelerator and _room(kind, cpus, gpus, request.accelerator)}
    kinds = tuple(sorted(named))
    return WorkerPool(device=device, size=size, cpus=cpus, gpus=gpus, accelerator=request.accelerator, kinds=kinds)


def _room(kind: Nodes, cpus: int, gpus: float, accelerator: str | None) -> int:
    """How many workers of this size fit one of these nodes."""
    if accelerator and kind.accelerator != accelerator:
        return 0
    return min(kind.cpus // cpus, gpu_slots(kind.gpus, gpus)) if gpus else kind.cpus // cpus


def gpu_slots(gpus: int, each: float) -> int:
    """How many workers with `each` GPUs fit `gpus`: Ray gives a worker a part of one GPU, or whole ones."""
    # The margin is for shares such as 0.3333333: three of them are meant to fill a GPU.
    return gpus * math.floor(1 / each + 1e-6) if each <= 1 else gpus // math.ceil(each)


def _share(nodes: Sequence[Nodes], gpus: float, accelerator: str | None, spare: bool) -> int:
    """CPUs of an actor so that every node with such GPUs takes as many actors as its GPUs do."""
    slots = {kind: gpu_slots(kind.gpus, gpus) for kind in nodes if not accelerator or kind.accelerator == accelerator}
    shares = [(kind.cpus - spare) // fit for kind, fit in slots.items() if fit]
    return max(1, min([MOST_CPUS, *shares])) if shares else 1


def _leave_a_cpu(request: WorkerRequest, pool: WorkerPool, nodes: Sequence[Nodes]) -> WorkerPool:
    """Fewer actors, where they would hold every CPU. Raises `ClusterError`."""
    cpus = sum(kind.count * kind.cpus for kind in nodes)
    size = min(pool.size, request.actors or pool.size, (cpus - 1) // pool.cpus)
    if size < 1:
        raise ClusterError(
            f"tasks beside the actors (--decode-on cluster) need a CPU of their own, but one actor with {pool.cpus} CPUs "
            f"leaves none. The cluster has {_listed(nodes)}. Use --decode-on actor, or --{request.called}-cpus with fewer"
        )
    if size < (request.actors or pool.size):
        logger.info("%d actors, so that a CPU is left for decoding", size)
    return replace(pool, size=size)


def _believed(request: WorkerRequest, pool: WorkerPool) -> WorkerPool:
    """The number asked for, on a cluster that may grow in unknown ways. Raises `ClusterError` where none was."""
    if request.actors is None:
        raise ClusterError(
            f"no node has room for {_described(request, pool)} now, and what the cluster's autoscaler may add can't be known "
            f"from here: say how many workers to bring up with {request.count_flag} N"
        )
    return replace(pool, size=request.actors)


def _refusal(request: WorkerRequest, pool: WorkerPool, nodes: Sequence[Nodes]) -> str:
    many = request.all_at_once and pool.size
    what = f"{request.actors} times " if many else ""
    flags = [f"{request.count_flag}"] if many else []
    flags += [f"--{request.called}-cpus"] if request.cpus else []
    flags += [f"--{request.called}-gpus"] if request.gpus else []
    flags += ["--accelerator"] if request.accelerator else []
    flags += ["--device cpu"] if pool.device == "cuda" else []
    room = f"only {pool.size} of them fit" if many else "none fits a node"
    return (
        f"asked for {what}{_described(request, pool)}, but {room}: the cluster has, with what its autoscaler may add, "
        f"{_listed(nodes)}. " + (f"Change {' or '.join(flags)}, or add such nodes" if flags else "Add such nodes")
    )


def _described(request: WorkerRequest, pool: WorkerPool) -> str:
    gpus = f" and {pool.gpus:g} GPUs" if pool.gpus else ""
    kind = f" of kind {pool.accelerator}" if pool.accelerator else ""
    return f"one {request.called} with {pool.cpus} CPUs{gpus}{kind}"


def _listed(nodes: Sequence[Nodes]) -> str:
    """Kinds of nodes in words, the largest first."""
    merged: dict[Nodes, int] = {}
    for kind in nodes:
        if kind.cpus or kind.gpus:
            key = replace(kind, count=1, head=False)
            merged[key] = merged.get(key, 0) + kind.count
    kinds = sorted(merged, key=lambda kind: (-kind.gpus, -kind.cpus, kind.accelerator or ""))
    listed = "; ".join(str(replace(kind, count=merged[kind])) for kind in kinds[:8])
    return (listed + ("; and smaller ones" if len(kinds) > 8 else "")) or "no node that takes work"


# --- what there is, and may be ----------------------------------------------------------------------------------------


def present_nodes() -> list[Nodes]:
    """The connected cluster's nodes."""
    import ray

    return [
        Nodes(
            count=1,
            cpus=int(node["Resources"].get("CPU", 0)),
            gpus=int(node["Resources"].get("GPU", 0)),
            accelerator=node["Labels"].get(ACCELERATOR_LABEL),
            head=_IS_HEAD in node["Resources"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def this_machine(*, gpus: bool = True) -> list[Nodes]:
    """The one node of a local Ray as Ray would count it here, if it were started; `gpus`: whether it may have this machine's."""
    from ray._private.resource_and_label_spec import ResourceAndLabelSpec

    found = ResourceAndLabelSpec(num_gpus=None if gpus else 0).resolve(is_head=True, node_ip_address="127.0.0.1")
    kind = found.labels.get(ACCELERATOR_LABEL)
    return [Nodes(count=1, cpus=int(found.num_cpus), gpus=int(found.num_gpus), accelerator=kind, head=True)]


_IS_HEAD = "node:__internal_head__"


def read_growth() -> Growth | None:
    """What the connected cluster may become; None where its head doesn't know."""
    if is_own():
        return Growth()
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    (head,) = [node["NodeID"] for node in ray.nodes() if node["Alive"] and _IS_HEAD in node["Resources"]]
    there = NodeAffinitySchedulingStrategy(node_id=head, soft=False)
    ask = ray.remote(num_cpus=0)(_autoscaler_growth).options(scheduling_strategy=there)
    try:
        is_here = ray.get_runtime_context().get_node_id() == head
        growth = _autoscaler_growth() if is_here else ray.get(ask.remote(), timeout=ANSWER_S)
    except ray.exceptions.RayError as error:
        logger.warning("the cluster's head doesn't say what its autoscaler may add: %s", error)
        return None
    if growth is None or not growth.nodes:
        return growth
    return replace(growth, nodes=(*growth.nodes, *(kind for kind in present_nodes() if kind.head)))


def _reachable(growth: Growth, room: Callable[[Nodes], int]) -> list[Nodes]:
    """The nodes that make the most of what the autoscaler may add in all."""
    # The file limits each kind and all kinds together; the kinds that hold most actors are brought up first.
    nodes, left = [], growth.most_workers
    for kind in sorted(growth.nodes, key=room, reverse=True):
        count = kind.count if kind.head else min(kind.count, left)
        left -= 0 if kind.head else count
        nodes.append(replace(kind, count=count))
    return [kind for kind in nodes if kind.count]


def _autoscaler_growth() -> Growth | None:
    """Runs on the head: `growth_of` the file with which its monitor runs, empty without a file; None without a monitor."""
    import psutil
    import ray

    port = ray.get_runtime_context().gcs_address.rpartition(":")[2]
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        options = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
        monitors = any(word.endswith(("_private/monitor.py", "v2/monitor.py")) for word in words)
        if monitors and options.get("--gcs-address", "").endswith(f":{port}"):
            path = options.get("--autoscaling-config")
            return growth_of(Path(path).expanduser().read_text()) if path else Growth()
    return None


def growth_of(text: str) -> Growth | None:
    """What the autoscaler of this launch file may add; None where the file leaves to the nodes what they have.

    Nothing else of the file leaves the head: the rest of it holds credentials.
    """
    import yaml

    config = yaml.safe_load(text)
    most, head = config.get("max_workers", 0), config.get("head_node_type")
    types = [kind for name, kind in config.get("available_node_types", {}).items() if name != head]
    # Ray fills in what a cloud's machine type has; without a cloud, each node says it when it joins.
    if any("CPU" not in kind.get("resources", {}) for kind in types):
        return None
    nodes = tuple(
        Nodes(
            count=kind.get("max_workers", most),
            cpus=int(kind["resources"]["CPU"]),
            gpus=int(kind["resources"].get("GPU", 0)),
            accelerator=(kind.get("labels") or {}).get(ACCELERATOR_LABEL),
        )
        for kind in types
    )
    return Growth(nodes=nodes, most_workers=most)
