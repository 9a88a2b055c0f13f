"""How many workers fit what nodes, what is refused, and that the cluster then does what was promised."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from cluster import resources
from cluster.resources import Growth, Nodes, WorkerRequest, gpu_slots, growth_of, size_pool
from cluster.session import ClusterError, own_environment
from pipelines.config import ConfigError
from pipelines.evaluation.config import EvaluateConfig
from pipelines.extraction.config import ExtractConfig
from pipelines.training.config import TrainConfig

FIXED = Growth()
HEAD = Nodes(count=1, cpus=0, head=True)
L4 = Nodes(count=16, cpus=8, gpus=1, accelerator="L4")
A100 = Nodes(count=2, cpus=12, gpus=1, accelerator="A100")
DECODE = Nodes(count=8, cpus=16)
GROWS = Growth(nodes=(HEAD, DECODE, L4, A100), most_workers=40)


def pool_on(present, growth=FIXED, device="cuda", **asked):
    """(size, CPUs, GPUs) of the pool."""
    pool = size_pool(WorkerRequest(device=device, **asked), list(present), lambda: growth)
    return pool.size, pool.cpus, pool.gpus


# --- what fits


@pytest.mark.parametrize(
    ("gpus", "each", "slots"),
    [(3, 0.6, 3), (2, 0.5, 4), (1, 0.1, 10), (1, 1 / 3, 3), (4, 1, 4), (5, 2, 2), (1, 2, 0), (0, 0.5, 0)],
)
def test_part_of_a_gpu_is_part_of_one_gpu(gpus, each, slots):
    assert gpu_slots(gpus, each) == slots


@pytest.mark.parametrize(
    ("present", "asked", "expected"),
    [
        # One per GPU, with its node's CPUs shared among them, whatever other nodes have.
        ([Nodes(count=1, cpus=8, gpus=2)], {}, (2, 4, 1)),
        ([Nodes(count=1, cpus=8, gpus=2), Nodes(count=1, cpus=64)], {}, (2, 4, 1)),
        ([Nodes(count=1, cpus=8, gpus=1), Nodes(count=2, cpus=6, gpus=1)], {}, (3, 6, 1)),
        ([Nodes(count=1, cpus=96, gpus=1)], {}, (1, 16, 1)),
        # Whole nodes: two of 3 GPUs have room for two actors with 2, not for three.
        ([Nodes(count=2, cpus=8, gpus=3)], {"gpus": 2}, (2, 8, 2)),
        ([Nodes(count=1, cpus=8, gpus=3)], {"gpus": 0.6}, (3, 2, 0.6)),
        # CPUs may be what is short.
        ([Nodes(count=1, cpus=8, gpus=4)], {"cpus": 3}, (2, 3, 1)),
        ([Nodes(count=1, cpus=8, gpus=4)], {"actors": 3}, (3, 2, 1)),
        # More than there are: they wait, the others work.
        ([Nodes(count=1, cpus=2, gpus=1)], {"actors": 5}, (5, 2, 1)),
    ],
)
def test_gpu_pool_fills_nodes_one_by_one(present, asked, expected):
    assert pool_on(present, **asked) == expected


def test_pool_names_the_kinds_of_gpu_that_its_actors_may_get():
    nodes = [Nodes(count=1, cpus=8, gpus=1, accelerator=kind) for kind in ("T4", "H100")]
    nodes += [Nodes(count=1, cpus=8, gpus=1), Nodes(count=1, cpus=1, gpus=1, accelerator="K80")]

    def kinds(**asked: object) -> tuple[str, ...]:
        return size_pool(WorkerRequest(device="auto", **asked), nodes, lambda: Growth()).kinds

    assert kinds(cpus=2) == ("H100", "T4")
    assert kinds(accelerator="T4") == ("T4",)
    assert kinds(cpus=1) == ("H100", "K80", "T4")


def test_cpu_pool_fills_nodes_one_by_one():
    assert pool_on([Nodes(count=2, cpus=3), Nodes(count=1, cpus=1)], device="cpu") == (7, 1, 0)
    assert pool_on([Nodes(count=2, cpus=3), Nodes(count=1, cpus=1)], device="cpu", cpus=2) == (2, 2, 0)


def test_nodes_that_suffice_need_no_autoscaler():
    def not_needed():
        raise AssertionError("the autoscaler was asked")

    request = WorkerRequest(device="auto", actors=4)

    assert size_pool(request, [Nodes(count=1, cpus=8, gpus=1)], not_needed).device == "cuda"
    assert size_pool(request, [Nodes(count=1, cpus=8)], not_needed).device == "cpu"


# --- what doesn't


@pytest.mark.parametrize(
    ("present", "asked", "message"),
    [
        ([Nodes(count=1, cpus=2, gpus=2)], {"gpus": 4}, r"4 GPUs.*1 x 2 CPUs and 2 GPUs\. Change --actor-gpus"),
        ([Nodes(count=1, cpus=2, gpus=2)], {"cpus": 8}, r"8 CPUs.*1 x 2 CPUs and 2 GPUs\. Change --actor-cpus"),
        ([Nodes(count=4, cpus=2, gpus=1)], {"gpus": 2}, r"2 GPUs.*4 x 2 CPUs and 1 GPUs"),
        ([Nodes(count=1, cpus=64), Nodes(count=1, cpus=2, gpus=1)], {"cpus": 8}, "fits a node"),
        ([Nodes(count=1, cpus=8)], {}, r"1 x 8 CPUs\. Change --device cpu"),
        ([Nodes(count=1, cpus=8, gpus=1, accelerator="L4")], {"accelerator": "T4"}, "kind T4.*GPUs L4.*--acc"),
        ([HEAD], {}, "no node that takes work"),
    ],
)
def test_what_fits_no_node_is_refused(present, asked, message):
    with pytest.raises(ClusterError, match=message):
        pool_on(present, **asked)


def test_cpu_request_that_fits_no_node_is_refused():
    with pytest.raises(ClusterError, match=r"8 CPUs.*3 x 4 CPUs\. Change --actor-cpus, or add such nodes"):
        pool_on([Nodes(count=1, cpus=4), Nodes(count=2, cpus=4)], device="cpu", cpus=8)


def test_training_needs_all_its_workers_at_once():
    asked = {"actors": 3, "cpus": 1, "all_at_once": True, "called": "worker"}
    nodes = [Nodes(count=1, cpus=2, gpus=2)]

    assert pool_on([*nodes, *nodes], **asked) == (3, 1, 1)
    with pytest.raises(ClusterError, match=r"3 times one worker with 1 CPUs and 1 GPUs, but only 2 of them.*--workers"):
        pool_on(nodes, **asked)
    assert pool_on([HEAD], GROWS, **asked) == (3, 1, 1)


# --- clusters that grow


def test_empty_cluster_is_sized_by_what_may_come():
    assert pool_on([HEAD], GROWS) == (18, 8, 1)
    assert pool_on([HEAD], GROWS, actors=4) == (4, 8, 1)
    assert pool_on([HEAD], GROWS, gpus=0.5) == (36, 4, 0.5)
    assert pool_on([HEAD], GROWS, accelerator="A100") == (2, 12, 1)
    assert pool_on([HEAD], GROWS, device="auto") == (18, 8, 1)
    assert pool_on([HEAD], GROWS, device="cpu") == (8 * 16 + 2 * 12 + 16 * 8, 1, 0)


def test_number_of_all_workers_bounds_the_kinds():
    assert pool_on([HEAD], Growth(nodes=(HEAD, L4, A100), most_workers=5)) == (5, 8, 1)


def test_head_that_takes_work_counts_once():
    head = Nodes(count=1, cpus=4, head=True)
    grows = Growth(nodes=(Nodes(count=2, cpus=4), head), most_workers=2)
    asked = {"device": "cpu", "cpus": 4, "all_at_once": True}

    assert pool_on([head], grows, actors=3, **asked) == (3, 4, 0)
    with pytest.raises(ClusterError, match="only 3 of them"):
        pool_on([head], grows, actors=4, **asked)


@pytest.mark.parametrize("asked", [{"gpus": 2}, {"cpus": 16}, {"accelerator": "H100"}])
def test_what_no_kind_of_node_has_is_refused(asked):
    with pytest.raises(ClusterError, match="2 x 12 CPUs and 1 GPUs A100; 16 x 8 CPUs and 1 GPUs L4; 8 x 16 CPUs"):
        pool_on([HEAD], GROWS, **asked)


def test_unknown_autoscaler_is_believed_but_told_how_many():
    assert pool_on([HEAD], None, actors=4, cpus=7) == (4, 7, 1)
    with pytest.raises(ClusterError, match="--actors N"):
        pool_on([HEAD], None)


def test_launch_file_gives_kinds_of_nodes_and_nothing_else():
    config = {
        "max_workers": 5,
        "head_node_type": "head",
        "auth": {"ssh_user": "secret"},
        "available_node_types": {
            "head": {"resources": {"CPU": 0}, "node_config": {}},
            "gpu": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 3, "labels": {"ray.io/accelerator-type": "L4"}},
            "cpu": {"resources": {"CPU": 16}, "node_config": {"password": "secret"}},
        },
    }

    kinds = (Nodes(count=3, cpus=8, gpus=1, accelerator="L4"), Nodes(count=5, cpus=16))
    assert growth_of(json.dumps(config)) == Growth(nodes=kinds, most_workers=5)
    assert growth_of("{}") == FIXED
    # `ray up` on machines at hand: Ray finds out what they have when they are there.
    config["available_node_types"]["cpu"]["resources"] = {}
    assert growth_of(json.dumps(config)) is None


# --- a CPU for decoding


@pytest.mark.parametrize(
    ("present", "asked", "expected"),
    [
        ([Nodes(count=1, cpus=2, gpus=2)], {}, (1, 1, 1)),
        ([Nodes(count=1, cpus=2, gpus=2)], {"actors": 2}, (1, 1, 1)),
        ([Nodes(count=1, cpus=8, gpus=1)], {}, (1, 7, 1)),
        ([Nodes(count=1, cpus=8, gpus=2)], {}, (2, 3, 1)),
        ([Nodes(count=1, cpus=8, gpus=2)], {"cpus": 4}, (1, 4, 1)),
        ([Nodes(count=1, cpus=8, gpus=2), Nodes(count=1, cpus=1)], {"cpus": 4}, (2, 4, 1)),
        ([Nodes(count=1, cpus=2)], {"device": "cpu"}, (1, 1, 0)),
    ],
)
def test_decode_tasks_are_left_a_cpu(present, asked, expected):
    assert pool_on(present, spare_cpu=True, **asked) == expected


def test_decode_tasks_of_a_growing_cluster_dont_hold_it_small():
    up = Nodes(count=1, cpus=8, gpus=1, accelerator="L4")

    assert pool_on([HEAD, up], GROWS, actors=16, spare_cpu=True) == (16, 7, 1)


@pytest.mark.parametrize("asked", [{"device": "cpu"}, {}, {"cpus": 1}])
def test_decode_tasks_without_a_cpu_are_refused(asked):
    with pytest.raises(ClusterError, match=r"--decode-on actor"):
        pool_on([Nodes(count=1, cpus=1, gpus=1)], spare_cpu=True, **asked)


# --- settings


@pytest.mark.parametrize("gpus", [1.5, 0, -1, float("nan"), float("inf")])
@pytest.mark.parametrize("config", [ExtractConfig.of, EvaluateConfig.of])
def test_gpus_that_ray_cant_give_are_refused(config, gpus):
    with pytest.raises(ConfigError, match="--actor-gpus.*whole number"):
        config(actor_gpus=gpus)


@pytest.mark.parametrize("config", [ExtractConfig.of, EvaluateConfig.of, TrainConfig.of])
def test_kind_of_gpu_needs_gpus_of_a_cluster(config):
    assert config(accelerator="L4").cluster.accelerator == "L4"
    for wrong in ({"device": "cpu"}, {"executor": "inline"}):
        with pytest.raises(ConfigError, match="--accelerator L4"):
            config(accelerator="L4", **wrong)
    with pytest.raises(ConfigError, match="one kind of GPU"):
        config(accelerator="in(L4,T4)")


# --- real clusters, in a process of their own: this one may be connected to the Ray of other tests

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What real clusters answered: one with an autoscaler and nothing but a head, one with two kinds of nodes."""
    with tempfile.TemporaryDirectory(prefix="rl", dir="/tmp") as folder:  # sockets' paths must be short
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        program = f"from tests.cluster_runs import try_real_clusters; try_real_clusters({folder!r})"
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={
                **environment,
                **own_environment(Path(folder)),
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_FAKE_CLUSTER": "1",
                "RAY_raylet_start_wait_time_s": "120",
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_head_without_workers_knows_what_its_autoscaler_may_add(real):
    assert real["head only"] == ["cuda", 4, 4]  # two nodes at most, with 2 GPUs and 8 CPUs each
    assert "2 x 8 CPUs and 2 GPUs L4" in real["head only, 4 GPUs"]
    assert "kind T4" in real["head only, T4"]


@pytest.mark.parametrize("what", ["4 GPUs", "4 GPUs, asked by a worker", "8 CPUs", "T4", "3 workers"])
def test_real_cluster_refuses_what_it_cant_meet(real, what):
    assert real[what].startswith("asked for")
    assert "1 x 1 CPUs and 1 GPUs A100; 1 x 1 CPUs and 1 GPUs L4; 1 x 1 CPUs" in real[what]


def test_tasks_decoded_apart_come_to_an_end(real):
    assert real["decoded apart"] == [[n, True] for n in range(4)]


def test_actors_run_where_the_kind_of_gpu_is(real):
    assert real["kinds"] == ["A100"] * 4
    assert real["size"] == 1


def test_that_there_is_no_gpu_is_said_once(caplog):
    resources._say_that_there_is_no_gpu.cache_clear()
    caplog.set_level("INFO")

    pools = [pool_on([DECODE], device="auto") for _ in range(3)]

    assert len(set(pools)) == 1
    assert [record.message for record in caplog.records if "no GPU" in record.message] == [
        "no GPU in the cluster: running on CPUs (--device cuda waits for autoscaled GPUs)"
    ]
