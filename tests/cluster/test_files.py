"""The files that people launch with hold, and name what exists; broken copies of them are refused, with the place named."""

import copy
import functools
import json
import re
import shlex
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.autoscaling import AutoscalingCluster
from cluster.metrics import WorkerMetrics
from cluster.resources import Growth, Nodes, WorkerRequest, size_pool
from jobs import extract, show
from tests.launch_files import LaunchFileError, dev_packages, locked, node_types, validate

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
YAMLS = ["aws.yaml", "gcp.yaml", "local.yaml", "kuberay/raycluster.yaml", "kuberay/rayjob.yaml"]
AUTOSCALED = [name for name in YAMLS if name != "local.yaml"]
DASHBOARD = json.loads((CLUSTER / "grafana.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]

Config = dict[str, Any]


@functools.cache
def load(name: str) -> Config:
    return yaml.safe_load((CLUSTER / name).read_text())


@pytest.mark.parametrize("name", [*YAMLS, "Dockerfile"])
def test_file_is_valid(name):
    validate(CLUSTER / name)


# --- broken copies

GROUP = "workerGroupSpecs[0]"
POD = f"{GROUP}.template.spec"


def put(*keys: str | int) -> Callable[..., Callable[[Config], None]]:
    """An edit of a config: `put("a", "b")(value)` sets config["a"]["b"]."""

    def with_value(value: Any) -> Callable[[Config], None]:
        def edit(config: Config) -> None:
            for key in keys[:-1]:
                config = config[key]
            config[keys[-1]] = value

        return edit

    return with_value


def drop(*keys: str | int) -> Callable[[Config], None]:
    def edit(config: Config) -> None:
        for key in keys[:-1]:
            config = config[key]
        del config[keys[-1]]

    return edit


AWS_NODE = ("available_node_types", "gpu-l4")
AWS_HEAD = ("available_node_types", "head")
LAUNCHER_FAULTS = {
    "wrong type": ("aws.yaml", put("max_workers")("many"), "max_workers: 'many' is not of type 'integer'"),
    "wrong type in a node type": ("aws.yaml", put(*AWS_NODE, "resources", "GPU")("1"), "gpu-l4.resources.GPU: '1'"),
    "misspelt key": ("aws.yaml", put("idle_timeout_minute")(5), "file: .*idle_timeout_minute"),
    "misspelt key of a node type": ("gcp.yaml", put(*AWS_NODE, "min_worker")(0), "gpu-l4: .*min_worker"),
    "no min_workers": ("aws.yaml", drop(*AWS_NODE, "min_workers"), "gpu-l4.min_workers: missing"),
    "no max_workers": ("gcp.yaml", drop(*AWS_NODE, "max_workers"), "gpu-l4.max_workers: missing"),
    "max below min": (
        "aws.yaml",
        lambda c: c["available_node_types"]["cpu-decode"].update(min_workers=2, max_workers=1),
        "cpu-decode.max_workers: 1",
    ),
    "max above the file's": ("aws.yaml", put(*AWS_NODE, "max_workers")(99), "gpu-l4.max_workers: 99"),
    "no nodes allowed": ("aws.yaml", put(*AWS_NODE, "max_workers")(0), "gpu-l4.max_workers: 0"),
    "GPU nodes that stay": ("gcp.yaml", put(*AWS_NODE, "min_workers")(1), "gpu-l4.min_workers: 1"),
    "head with a GPU": ("aws.yaml", put(*AWS_HEAD, "resources")({"CPU": 0, "GPU": 1}), "head.resources.GPU"),
    "head with work": ("gcp.yaml", put(*AWS_HEAD, "resources", "CPU")(8), "head.resources.CPU"),
    "spot head": (
        "aws.yaml",
        put(*AWS_HEAD, "node_config", "InstanceMarketOptions")({"MarketType": "spot"}),
        "head.node_config: a spot head",
    ),
    "unknown head": ("aws.yaml", put("head_node_type")("haed"), "head_node_type"),
    "misspelt EC2 setting": (
        "aws.yaml",
        put(*AWS_NODE, "node_config", "InstanceTyp")("g6.2xlarge"),
        'gpu-l4.node_config: .*"InstanceTyp"',
    ),
    "wrong type of an EC2 setting": (
        "aws.yaml",
        put(*AWS_NODE, "node_config", "BlockDeviceMappings", 0, "Ebs", "VolumeSize")("200"),
        "gpu-l4.node_config: .*VolumeSize",
    ),
    "no image of the machine": ("aws.yaml", drop(*AWS_NODE, "node_config", "ImageId"), "gpu-l4.node_config.ImageId"),
    "wrong market": (
        "aws.yaml",
        put(*AWS_NODE, "node_config", "InstanceMarketOptions", "MarketType")("spott"),
        "InstanceMarketOptions.MarketType: 'spott'",
    ),
    "misspelt GCP setting": (
        "gcp.yaml",
        put(*AWS_NODE, "node_config", "scheduling", "provisioning")("SPOT"),
        "gpu-l4.node_config.scheduling: .*provisioning",
    ),
    "GPU that would migrate": (
        "gcp.yaml",
        drop(*AWS_NODE, "node_config", "scheduling", "onHostMaintenance"),
        "gpu-l4.node_config.scheduling.onHostMaintenance",
    ),
    "another Ray's image": ("aws.yaml", put("docker", "image")("x/raylift:ray-2.59.0"), "docker.image: .*2.59.0"),
    "nodes without Raylift": ("local.yaml", drop("setup_commands"), "docker.image: missing"),
    "no idle timeout": ("gcp.yaml", drop("idle_timeout_minutes"), "idle_timeout_minutes"),
    "unknown GPU": ("aws.yaml", put(*AWS_NODE, "labels", "ray.io/accelerator-type")("L5"), "gpu-l4.labels: .*'L5'"),
    "unknown provider": ("aws.yaml", put("provider", "type")("awz"), "provider.type: 'awz'"),
    "local without a head": ("local.yaml", drop("provider", "head_ip"), "ray up: "),
    "local that keeps all": ("local.yaml", drop("min_workers"), "min_workers: missing"),
    "local with too many": ("local.yaml", put("max_workers")(3), "max_workers: 3"),
    "local head with work": ("local.yaml", put("head_start_ray_commands")(["ray start --head"]), "head_start_ray_commands"),
}
KUBERAY_FAULTS = {
    "wrong apiVersion": (put("apiVersion")("ray.io/v2"), "apiVersion: 'ray.io/v1' was expected"),
    "wrong kind": (put("kind")("RayClutser"), "kind: 'RayClutser'"),
    "misspelt field": (put("spec", "enableInTreeAutoscalling")(True), "spec: .*enableInTreeAutoscalling"),
    "wrong type": (put("spec", "workerGroupSpecs", 0, "maxReplicas")("16"), f"spec.{re.escape(GROUP)}.maxReplicas: '16'"),
    "number for a start parameter": (
        put("spec", "headGroupSpec", "rayStartParams", "num-cpus")(0),
        "headGroupSpec.rayStartParams.num-cpus: 0",
    ),
    "unknown field of a pod": (
        put("spec", "workerGroupSpecs", 0, "template", "spec", "tolerance")([]),
        f"spec.{re.escape(POD)}: .*tolerance",
    ),
    "unknown field of a container": (
        put("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resource")({}),
        rf"spec.{re.escape(POD)}.containers\[0\]: .*resource",
    ),
    "wrong toleration": (
        put("spec", "workerGroupSpecs", 0, "template", "spec", "tolerations", 0, "effect")("NoSchedul"),
        rf"{re.escape(POD)}.tolerations\[0\].effect: 'NoSchedul'",
    ),
    "wrong quantity": (
        put("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources", "limits", "memory")("26GB"),
        r"resources.limits.memory: '26GB'",
    ),
    "no minReplicas": (drop("spec", "workerGroupSpecs", 0, "minReplicas"), f"{re.escape(GROUP)}: 'minReplicas'"),
    "replicas out of bounds": (put("spec", "workerGroupSpecs", 0, "replicas")(17), f"{re.escape(GROUP)}.replicas: 17"),
    "max below min": (
        lambda c: c["spec"]["workerGroupSpecs"][2].update(labels={}, minReplicas=3, maxReplicas=2),
        r"workerGroupSpecs\[2\].maxReplicas: 2",
    ),
    "GPU pods that stay": (
        lambda c: c["spec"]["workerGroupSpecs"][0].update(minReplicas=1, replicas=1),
        f"{re.escape(GROUP)}.minReplicas: 1",
    ),
    "two groups of one name": (put("spec", "workerGroupSpecs", 1, "groupName")("gpu-l4"), "workerGroupSpecs: "),
    "head with a GPU": (
        put("spec", "headGroupSpec", "template", "spec", "containers", 0, "resources", "limits", "nvidia.com/gpu")("1"),
        r"headGroupSpec.template.spec.containers\[0\].resources",
    ),
    "head with work": (drop("spec", "headGroupSpec", "rayStartParams", "num-cpus"), "rayStartParams.num-cpus"),
    "GPU request unlike its limit": (
        put("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources", "limits", "nvidia.com/gpu")("2"),
        "resources.requests.nvidia.com/gpu",
    ),
    "no CPU limit": (
        drop("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources", "limits", "cpu"),
        "resources.limits.cpu",
    ),
    "spot without tolerations": (drop("spec", "workerGroupSpecs", 2, "template", "spec", "tolerations"), "tolerations: missing"),
    "old autoscaler": (put("spec", "autoscalerOptions", "version")("v1"), "autoscalerOptions.version"),
    "no autoscaler": (put("spec", "enableInTreeAutoscaling")(False), "enableInTreeAutoscaling"),
    "no idle timeout": (drop("spec", "autoscalerOptions", "idleTimeoutSeconds"), "autoscalerOptions.idleTimeoutSeconds"),
    "another Ray": (put("spec", "rayVersion")("2.59.0"), "spec.rayVersion: '2.59.0'"),
    "another Ray's image": (
        put("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "image")("x/raylift:latest"),
        r"containers\[0\].image: 'x/raylift:latest'",
    ),
    "container with capabilities": (
        drop("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "securityContext", "capabilities"),
        r"workerGroupSpecs\[0\].*securityContext.capabilities: must be \{drop: \[ALL\]\}",
    ),
    "container without a seccomp profile": (
        drop("spec", "headGroupSpec", "template", "spec", "containers", 0, "securityContext", "seccompProfile"),
        r"headGroupSpec.*securityContext.seccompProfile: must be",
    ),
    "container as root": (
        drop("spec", "headGroupSpec", "template", "spec", "containers", 0, "securityContext", "runAsNonRoot"),
        r"headGroupSpec.*securityContext: must have runAsNonRoot",
    ),
    "autoscaler with capabilities": (
        drop("spec", "autoscalerOptions", "securityContext", "capabilities"),
        r"autoscalerOptions.securityContext.capabilities",
    ),
    "label that Ray refuses": (put("spec", "workerGroupSpecs", 0, "labels", "a b")("c"), "autoscaler can't read it"),
}
JOB_FAULTS = {
    "no entry point": (drop("spec", "entrypoint"), "spec.entrypoint: missing"),
    "unknown way to submit": (put("spec", "submissionMode")("HttpMode"), "spec.submissionMode: 'HttpMode'"),
    "a head that stays": (put("spec", "shutdownAfterJobFinishes")(False), "spec.shutdownAfterJobFinishes"),
    "no cluster": (drop("spec", "rayClusterSpec"), "spec.rayClusterSpec: give it or clusterSelector"),
    "wrong runtime_env": (put("spec", "runtimeEnvYAML")("pip: 3"), "spec.runtimeEnvYAML: "),
    "wrong cluster": (put("spec", "rayClusterSpec", "workerGroupSpecs", 0, "replicas")(17), "spec.rayClusterSpec.worker"),
}
FAULTS = {
    **{f"launcher: {fault}": case for fault, case in LAUNCHER_FAULTS.items()},
    **{f"cluster: {fault}": ("kuberay/raycluster.yaml", *case) for fault, case in KUBERAY_FAULTS.items()},
    **{f"job: {fault}": ("kuberay/rayjob.yaml", *case) for fault, case in JOB_FAULTS.items()},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_copy_is_refused_with_the_place_named(fault, tmp_path):
    name, break_it, message = FAULTS[fault]
    config = copy.deepcopy(load(name))
    break_it(config)
    path = tmp_path / Path(name).name
    path.write_text(yaml.safe_dump(config))

    with pytest.raises(LaunchFileError, match=message) as error:
        validate(path)

    assert all(line.startswith(f"{path}: ") for line in str(error.value).splitlines() if not line.startswith(" "))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("COPY cluster/requirements.txt /tmp/requirements.txt", "", "--requirement requirements.txt: missing"),
        ("--requirement /tmp/requirements.txt", "ray torch", "--requirement requirements.txt: missing"),
        ("RUN uv pip install --system --no-cache --compile-bytecode", "RUN pip install", "requirements.txt: missing"),
        ("--no-deps --editable .", "numpy", "--no-deps --editable .: missing"),
        ("USER ray", "", "USER: "),
        ("USER ray", "USER root", "USER: "),
        ("FROM python:3.11.14-slim-bookworm", "FROM python:3.13.1-slim-bookworm", "FROM: "),
        ("FROM python:3.11.14-slim-bookworm", "FROM python:3.11-slim-bookworm", "FROM: "),
        ("uv==0.13.9", "uv", "RUN pip install uv: "),
        (
            "COPY cluster/requirements.txt",
            "COPY requirements.txt",
            "COPY requirements.txt: what is installed holds test packages",
        ),
        ("uv pip install --system", "uv pip install --index-url file:///nowhere --system", "RUN: names a package index"),
    ],
)
def test_broken_dockerfile_is_refused(old, new, message, tmp_path):
    text = (CLUSTER / "Dockerfile").read_text()
    assert old in text
    path = tmp_path / "Dockerfile"
    path.write_text(text.replace(old, new))

    with pytest.raises(LaunchFileError, match=re.escape(message)):
        validate(path)


@pytest.mark.parametrize(
    ("text", "message"), [("- 1\n", "mapping was expected"), ("a: [", "not YAML"), ("", "one YAML document")]
)
def test_what_is_not_a_launch_file_is_refused(tmp_path, text, message):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(LaunchFileError, match=message):
        validate(path)


# --- what the files name


def commands(text: str) -> list[list[str]]:
    """Arguments of every `python jobs/extract.py` in a text, blanks filled in."""
    text = text.replace("\\\n", " ").replace("/home/ray/raylift/jobs", "jobs")
    found = re.findall(r"^.*?python jobs/extract\.py (.*)$", text, re.MULTILINE)
    return [shlex.split(line.replace("FILL_IN_BUCKET", "bucket")) for line in found]


GUIDE = (CLUSTER / "GUIDE.md").read_text()
ENTRY_POINT = load("kuberay/rayjob.yaml")["spec"]["entrypoint"]


def parse(args):
    """The settings of a command line of `jobs/extract.py`."""
    return extract.program.parse(args).config


FLEET = GUIDE.split("\n## 8. ")[0]
"""Without the section on one machine."""


@pytest.mark.parametrize("args", [*commands(FLEET), *commands(ENTRY_POINT)], ids=" ".join)
def test_entry_points_parse(args):
    call = extract.program.parse(args)
    config = call.config

    assert not call.preset
    assert config.data == ("s3://bucket/train-{000000..001281}.tar",)
    assert config.out == "s3://bucket/feats.zarr"


def test_there_are_entry_points_and_misspelt_flags_would_be_seen():
    assert len(commands(FLEET)) == 3
    assert len(commands(ENTRY_POINT)) == 1
    with pytest.raises(SystemExit):
        parse(commands(ENTRY_POINT.replace("--actor-cpus", "--actor-cpu-s"))[0])


def test_the_guide_uses_all_nodes_of_the_cluster_on_one_machine():
    cluster = AutoscalingCluster()
    (args,) = commands(GUIDE.removeprefix(FLEET))
    config = parse(args)

    assert config.cluster.ray_address == cluster.address
    assert config.cluster.actors * config.cluster.actor_cpus == cluster.nodes * cluster.cpus
    assert config.limit is None
    assert config.block_rows * config.cluster.actors <= 12  # the photographs: every actor gets some
    assert cluster.launch_file()["idle_timeout_minutes"] * 60 == 15 < 40  # as the guide waits


def test_entry_point_is_where_the_image_has_it():
    dockerfile = (CLUSTER / "Dockerfile").read_text()

    assert "WORKDIR /home/ray/raylift\n" in dockerfile
    assert ENTRY_POINT.startswith("python /home/ray/raylift/jobs/extract.py ")


def test_image_has_every_package():
    folders = {
        package.split(".")[0]
        for package in re.findall(r'"(\w[\w.]*)"', (ROOT / "pyproject.toml").read_text().split("packages = [")[1].split("]")[0])
    }
    copied = set(re.findall(r"^COPY --chown=ray (\w+) \1$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE))

    assert copied == folders


def test_guide_names_programs_files_and_metrics_that_exist():
    subcommands = re.findall(r"^\$ python jobs/show\.py (\w+)", GUIDE, re.MULTILINE)
    assert {"status", "failures", "view", "browse"} == set(subcommands)
    assert set(subcommands) <= set(show.program.commands)
    files = re.findall(r"`((?:cluster/|tests/|jobs/|kuberay/)?[\w/]+\.(?:yaml|json|py))`", GUIDE)
    assert len(files) > 8
    assert all((CLUSTER / file).exists() or (ROOT / file).exists() for file in files)
    assert set(re.findall(r"ray_raylift_\w+", GUIDE)) == set(own_metrics())


def test_the_images_lock_is_the_part_of_the_repositorys_that_runs():
    whole, image = locked(ROOT / "requirements.txt"), locked(CLUSTER / "requirements.txt")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [each for name, extra in project["optional-dependencies"].items() if name != "dev" for each in extra]
    needed = [each for each in [*project["dependencies"], *extras] if not each.startswith("raylift[")]

    assert {name: whole.get(name) for name in image} == image
    assert {re.split(r"[\[<>=]", each)[0].lower().replace("_", "-") for each in needed} <= image.keys()
    assert not dev_packages(CLUSTER / "requirements.txt")
    assert dev_packages(ROOT / "requirements.txt") >= {"pytest", "mypy", "moto"}
    assert {"opencensus", "aiohttp"} <= image.keys()  # ray[default]: dashboard, metrics and launcher


def test_one_ray_version_everywhere():
    (locked,) = re.findall(r"^ray==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    named = re.findall(
        r"(?:raylift:ray-|rayVersion: \")(\d+\.\d+\.\d+)",
        "".join((CLUSTER / name).read_text() for name in [*YAMLS, "Dockerfile", "GUIDE.md"]),
    )

    assert version("ray") == locked
    assert len(named) > 10
    assert set(named) == {locked}


def test_job_has_the_cluster_of_the_cluster_file():
    assert load("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"] == load("kuberay/raycluster.yaml")["spec"]


@pytest.mark.parametrize("name", AUTOSCALED)
def test_what_workers_ask_for_fits_a_node(name):
    types = node_types(CLUSTER / name)
    assert {resource for node in types.values() for resource in node} <= {"CPU", "GPU", "memory"}
    assert sum("GPU" in node for node in types.values()) >= 2
    # A cluster of one head and no worker, as it is when the first job comes; and what the guide asks it for.
    head = Nodes(count=1, cpus=0, head=True)
    kinds = [Nodes(count=1, cpus=node["CPU"], gpus=node.get("GPU", 0)) for node in types.values()]
    grows = Growth(nodes=(head, *kinds), most_workers=len(kinds))
    asked = [parse(args).cluster for args in commands(GUIDE) if "--device" in args]

    for config in asked if "kuberay" not in name else [asked[-1], parse(commands(ENTRY_POINT)[0]).cluster]:
        request = WorkerRequest(device=config.device, actors=config.actors, cpus=config.actor_cpus, gpus=config.actor_gpus)
        pool = size_pool(request, [head], lambda: grows)
        assert any(node["CPU"] >= pool.cpus and node.get("GPU", 0) >= pool.gpus > 0 for node in types.values())
    assert any(node["CPU"] >= 1 and "GPU" not in node for node in types.values())


# --- metrics


def own_metrics() -> dict[str, tuple[str, ...]]:
    """Names as Prometheus sees them, with their labels: Ray puts `ray_` before a counter's name and `_total` behind it."""
    metrics = WorkerMetrics()
    return {f"ray_{m.info['name']}_total": m.info["tag_keys"] for m in vars(metrics).values()}


RAY_METRICS = {
    # Scraped from a node's metrics port, the autoscaler's and the dashboard's of Ray 2.60.0.
    "autoscaler_pending_nodes": {"SessionName", "NodeType"},
    "ray_actors": {"SessionName", "State", "Name"},
    "ray_cluster_active_nodes": {"SessionName", "node_type"},
    "ray_component_rss_bytes": {"SessionName", "Component", "ip"},
    "ray_internal_num_infeasible_scheduling_classes": {"SessionName", "NodeAddress"},
    "ray_node_cpu_utilization": {"SessionName", "ip"},
    "ray_node_mem_total": {"SessionName", "ip"},
    "ray_node_mem_used": {"SessionName", "ip"},
    "ray_object_store_memory": {"SessionName", "Location"},
    "ray_scheduler_unscheduleable_tasks": {"SessionName", "Reason"},
    "ray_unintentional_worker_failures_total": {"SessionName", "NodeAddress"},
    # Only where there is a GPU: from ray/dashboard/modules/reporter/reporter_agent.py.
    "ray_node_gpus_utilization": {"SessionName", "ip"},
    "ray_node_gram_used": {"SessionName", "ip"},
}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_dashboard_asks_for_metrics_and_labels_that_are_exported(expression):
    own = {name: {*labels, "SessionName", "NodeAddress"} for name, labels in own_metrics().items()}
    names = re.findall(r"\b(?:ray|autoscaler)_\w+", expression)
    labels = set(re.findall(r"(\w+)=~?\"", expression)) | set(
        re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", expression)))
    )

    assert names
    for name in names:
        assert labels <= {**own, **RAY_METRICS}[name]


def test_dashboard_shows_all_of_our_counters():
    assert set(own_metrics()) <= {name for expression in EXPRESSIONS for name in re.findall(r"ray_\w+", expression)}


def test_dashboard_panels_have_ids_and_places_of_their_own():
    panels = DASHBOARD["panels"]

    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in panels)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_prometheus_reads_the_list_that_ray_writes():
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    (job,) = load("prometheus.yaml")["scrape_configs"]
    assert job["file_sd_configs"] == [{"files": [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]}]
