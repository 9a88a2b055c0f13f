"""Checks of the files in cluster/ that people launch with, without a network: before money is spent on a misspelt key.

What Ray checks in `ray up` (its schema and defaults), what boto3 checks of an EC2 request, KubeRay's structure
(cluster/kuberay/schema.json) and what Ray's autoscaler reads from it; then what makes a cluster of this project a good one: an
idle head, workers that cost nothing when there is no work, one Ray version.
"""

import copy
import functools
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from cluster.session import ClusterError
from storage.documents import JsonObject

Yaml: TypeAlias = dict[str, Any]
"""A mapping of a launch file. Schemas check it first, which say more than types could; what reads it then relies on them."""

ROOT = Path(__file__).parent.parent

IMAGE_PYTHON = "3.11"
"""The Python that requirements.txt is locked for."""

_GCP_NODE: JsonObject = {
    "type": "object",
    "additionalProperties": False,
    "required": ["machineType", "disks"],
    "properties": {
        "machineType": {"type": "string"},
        "minCpuPlatform": {"type": "string"},
        "disks": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "boot": {"type": "boolean"},
                    "autoDelete": {"type": "boolean"},
                    "type": {"enum": ["PERSISTENT", "SCRATCH"]},
                    "interface": {"enum": ["SCSI", "NVME"]},
                    "initializeParams": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {
                            "diskSizeGb": {"type": "integer", "minimum": 10},
                            "diskType": {"type": "string"},
                            "sourceImage": {"type": "string"},
                        },
                    },
                },
            },
        },
        "guestAccelerators": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["acceleratorType", "acceleratorCount"],
                "properties": {"acceleratorType": {"type": "string"}, "acceleratorCount": {"type": "integer", "minimum": 1}},
            },
        },
        "scheduling": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "provisioningModel": {"enum": ["SPOT", "STANDARD"]},
                "instanceTerminationAction": {"enum": ["DELETE", "STOP"]},
                "onHostMaintenance": {"enum": ["TERMINATE", "MIGRATE"]},
                "automaticRestart": {"type": "boolean"},
                "preemptible": {"type": "boolean"},
            },
        },
        "metadata": {"type": "object"},
        "labels": {"type": "object"},
        "tags": {"type": "object"},
        "networkInterfaces": {"type": "array"},
        "serviceAccounts": {"type": "array"},
    },
}
"""What this project uses of Compute Engine's instance resource; the API's own description can't be had offline."""


class LaunchFileError(ClusterError, ValueError):
    """A launch file that wouldn't work, or that would cost more than it should; the message names each place."""


def validate(path: str | Path) -> None:
    """Check a launcher's YAML, KubeRay manifests or a Dockerfile, by what is in it. Raises `LaunchFileError`."""
    if Path(path).name.startswith("Dockerfile"):
        validate_dockerfile(path)
        return
    documents = _documents(path)
    check = _kuberay_problems if any("apiVersion" in document for document in documents) else _launcher_file_problems
    _raise(path, check(documents))


def validate_dockerfile(path: str | Path) -> None:
    """Check that an image has this project's Python, the lock, the package, and another user than root."""
    _raise(path, [*_dockerfile_problems(Path(path).read_text())])


def node_types(path: str | Path) -> dict[str, dict[str, int]]:
    """What one worker node of each type offers, as Ray's autoscaler reads the file: {"gpu-l4": {"CPU": 8, "GPU": 1}}.

    Nothing for machines that are there already: those say what they have when they join.
    """
    config = _documents(path)[0]
    if "apiVersion" in config:
        config = _autoscaling_config(_cluster_spec(config))
    types, head = config.get("available_node_types", {}), config.get("head_node_type")
    return {name: node["resources"] for name, node in types.items() if name != head}


def _documents(path: str | Path) -> list[Yaml]:
    try:
        documents = [document for document in yaml.safe_load_all(Path(path).read_text()) if document is not None]
    except yaml.YAMLError as error:
        raise LaunchFileError(f"{path}: not YAML: {error}") from None
    if not all(isinstance(document, dict) for document in documents):
        raise LaunchFileError(f"{path}: a mapping was expected, not {type(documents[0]).__name__}")
    return documents


def _raise(path: str | Path, problems: list[str]) -> None:
    if problems:
        raise LaunchFileError("\n".join(f"{path}: {problem}" for problem in problems))


def _schema_problems(value: object, schema: JsonObject, prefix: str = "") -> list[str]:
    import jsonschema

    found = jsonschema.Draft7Validator(schema).iter_errors(value)
    return [f"{_place(prefix, error.absolute_path)}: {error.message}" for error in found]


def _place(prefix: str, keys: Iterable[str | int]) -> str:
    """`a.b[0].c`; `file` for the whole of it."""
    place = prefix + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    return place.removeprefix(".") or "file"


# --- Ray's cluster launcher


def _launcher_file_problems(documents: list[Yaml]) -> list[str]:
    if len(documents) != 1:
        return [f"one YAML document was expected, not {len(documents)}"]
    return _ray_problems(documents[0]) or [*_launcher_problems(documents[0])]


def _ray_problems(config: Yaml) -> list[str]:
    """What `ray up` would refuse before it calls a cloud."""
    import click
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    raw = {key: value for key, value in config.items() if key != "min_workers" or not _is_local(config)}
    if problems := _schema_problems(raw, schema):
        return problems
    kind = config["provider"]["type"]
    if kind not in ("aws", "gcp", "local"):
        return [f"provider.type: {kind!r}; this project has files for aws, gcp and local"]
    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except (ValueError, RuntimeError, AssertionError, click.ClickException) as error:
        return [f"ray up: {error or type(error).__name__}"]
    return []


def _is_local(config: Yaml) -> bool:
    return isinstance(config.get("provider"), dict) and config["provider"].get("type") == "local"


def _launcher_problems(config: Yaml) -> Iterator[str]:
    if not config.get("idle_timeout_minutes", 0) > 0:
        yield "idle_timeout_minutes: must be given and above 0, or idle nodes stay"
    image = config.get("docker", {}).get("image")
    if image:
        yield from _image_problems("docker.image", image)
    elif not config.get("setup_commands"):
        yield "docker.image: missing, and setup_commands installs nothing: the nodes would have no Raylift"
    if _is_local(config):
        yield from _local_problems(config)
        return
    types = config.get("available_node_types")
    if not types:
        yield "available_node_types: missing; Ray's defaults would be small CPU machines"
        return
    yield from _head_problems(config["head_node_type"], types[config["head_node_type"]])
    for name, node in types.items():
        where = f"available_node_types.{name}"
        if name != config["head_node_type"]:
            yield from _worker_problems(where, node, config["max_workers"])
        check = {"aws": _ec2_problems, "gcp": _gcp_problems}[config["provider"]["type"]]
        yield from check(f"{where}.node_config", node["node_config"])


def _local_problems(config: Yaml) -> Iterator[str]:
    machines = len(config["provider"].get("worker_ips", []))
    low, high = config.get("min_workers"), config.get("max_workers")
    if low is None:
        yield "min_workers: missing; Ray would then hold all machines, whether there is work or not"
    if high is None or not max(1, low or 0) <= high <= machines:
        yield f"max_workers: {high}, must be from min_workers (1 at least) to the {machines} worker_ips"
    start = " ".join(config.get("head_start_ray_commands", []))
    if not ("--num-cpus=0" in start and "--num-gpus=0" in start):
        yield "head_start_ray_commands: the head must take no work: --num-cpus=0 --num-gpus=0"


def _head_problems(name: str, node: Yaml) -> Iterator[str]:
    where = f"available_node_types.{name}"
    if node["resources"].get("CPU") != 0:
        yield f"{where}.resources.CPU: must be 0, so that no work runs on the head"
    if node["resources"].get("GPU") or node["node_config"].get("guestAccelerators"):
        yield f"{where}.resources.GPU: the head takes no work, a GPU in it is paid for nothing"
    if _is_spot(node["node_config"]):
        yield f"{where}.node_config: a spot head ends every job when it's taken away; use on-demand"
    if node.get("max_workers", 0):
        yield f"{where}.max_workers: {node['max_workers']}, but there is one head"


def _worker_problems(where: str, node: Yaml, total: int) -> Iterator[str]:
    missing = [name for name in ("min_workers", "max_workers") if name not in node]
    for name in missing:
        yield f"{where}.{name}: missing; say how many nodes are kept and how many there may be"
    if missing:
        return
    low, high = node["min_workers"], node["max_workers"]
    if low and (node["resources"].get("GPU") or _is_spot(node["node_config"])):
        yield f"{where}.min_workers: {low}, must be 0 for GPU and spot nodes: they'd be paid for while nothing runs"
    if not max(1, low) <= high <= total:
        yield f"{where}.max_workers: {high}, must be from min_workers (1 at least) to the file's max_workers {total}"
    if not node["resources"].get("CPU"):
        yield f"{where}.resources.CPU: missing; every worker of Raylift needs CPUs"
    yield from _label_problems(f"{where}.labels", node.get("labels", {}))


def _label_problems(where: str, labels: Mapping[str, str]) -> Iterator[str]:
    from ray.util import accelerators

    known = {value for value in vars(accelerators).values() if isinstance(value, str)}
    kind = labels.get("ray.io/accelerator-type")
    if kind is not None and kind not in known:
        yield f"{where}: ray.io/accelerator-type {kind!r} isn't a name that Ray gives; see ray.util.accelerators"


def _is_spot(node: Yaml) -> bool:
    """Of a cloud's node_config."""
    scheduling = node.get("scheduling", {})
    return (
        node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        or scheduling.get("provisioningModel") == "SPOT"
        or bool(scheduling.get("preemptible"))
    )


def _ec2_problems(where: str, node: Yaml) -> Iterator[str]:
    """Ray passes a node_config on to RunInstances."""
    from botocore.validate import ParamValidator

    # Ray takes several subnets and picks one of them.
    request = {key: value for key, value in node.items() if key != "SubnetIds"}
    report = ParamValidator().validate({**request, "MinCount": 1, "MaxCount": 1}, _run_instances_shape())
    if report.has_errors():
        yield from (f"{where}: {line}" for line in report.generate_report().splitlines())
    for name in ("InstanceType", "ImageId"):
        if not node.get(name):
            yield f"{where}.{name}: missing; Ray's own choice is a small machine or an image too old for this project"
    market = node.get("InstanceMarketOptions", {})
    if isinstance(market, dict) and market.get("MarketType", "spot") != "spot":
        yield f"{where}.InstanceMarketOptions.MarketType: {market['MarketType']!r}, must be spot"


@functools.cache
def _run_instances_shape() -> object:
    """The description of EC2's RunInstances that boto3 carries; reading it takes seconds."""
    import botocore.session

    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _gcp_problems(where: str, node: Yaml) -> Iterator[str]:
    problems = _schema_problems(node, _GCP_NODE, where)
    yield from problems
    if problems:
        return
    has_gpu = bool(node.get("guestAccelerators")) or node["machineType"].startswith(("a2-", "a3-", "a4-", "g2-", "g4-"))
    if has_gpu and node.get("scheduling", {}).get("onHostMaintenance") != "TERMINATE":
        yield f"{where}.scheduling.onHostMaintenance: must be TERMINATE for machines with GPUs: they can't migrate"


# --- KubeRay


def _kuberay_problems(documents: list[Yaml]) -> list[str]:
    if not documents:
        return ["no manifest in it"]
    return [problem for each in documents for problem in _structure_problems(each) or _manifest_problems(each)]


def _structure_problems(document: Yaml) -> list[str]:
    kind = document.get("kind")
    if kind not in ("RayCluster", "RayJob"):
        return [f"kind: {kind!r}, must be RayCluster or RayJob"]
    schema = json.loads((ROOT / "cluster" / "kuberay" / "schema.json").read_text())
    return _schema_problems(document, {"$ref": f"#/definitions/{kind}", "definitions": schema["definitions"]})


def _manifest_problems(document: Yaml) -> list[str]:
    if document["kind"] == "RayCluster":
        return [*_cluster_problems("spec", document["spec"])]
    spec = document["spec"]
    problems = [*_job_problems(spec)]
    if "rayClusterSpec" in spec:
        problems += _cluster_problems("spec.rayClusterSpec", spec["rayClusterSpec"])
    return problems


def _job_problems(spec: Yaml) -> Iterator[str]:
    from ray.runtime_env import RuntimeEnv

    if not spec.get("entrypoint"):
        yield "spec.entrypoint: missing"
    if ("rayClusterSpec" in spec) == ("clusterSelector" in spec):
        yield "spec.rayClusterSpec: give it or clusterSelector, one of the two"
    if "rayClusterSpec" in spec and not spec.get("shutdownAfterJobFinishes"):
        yield "spec.shutdownAfterJobFinishes: must be true, or the head stays after the job"
    try:
        RuntimeEnv(**(yaml.safe_load(spec.get("runtimeEnvYAML", "")) or {}))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        yield f"spec.runtimeEnvYAML: {error}"


def _cluster_spec(document: Yaml) -> Yaml:
    return document["spec"] if document["kind"] == "RayCluster" else document["spec"]["rayClusterSpec"]


def _autoscaling_config(spec: Yaml) -> Yaml:
    """What Ray's autoscaler, in the head's pod, makes of a RayCluster."""
    from ray.autoscaler._private.kuberay import autoscaling_config

    cluster = {"metadata": {"name": "raylift", "namespace": "default"}, "spec": spec}
    return autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster)


def _cluster_problems(where: str, spec: Yaml) -> Iterator[str]:
    import ray

    if spec.get("rayVersion") != ray.__version__:
        yield f"{where}.rayVersion: {spec.get('rayVersion')!r}, but the installed and locked Ray is {ray.__version__}"
    if not spec.get("enableInTreeAutoscaling"):
        yield f"{where}.enableInTreeAutoscaling: must be true, or no worker ever comes up"
    options = spec.get("autoscalerOptions", {})
    if options.get("version") != "v2":
        yield f"{where}.autoscalerOptions.version: must be v2: groups' idleTimeoutSeconds and labels need it"
    if not options.get("idleTimeoutSeconds", 0) > 0:
        yield f"{where}.autoscalerOptions.idleTimeoutSeconds: must be given and above 0"
    yield from _security_problems(f"{where}.autoscalerOptions.securityContext", options.get("securityContext", {}))
    yield from _head_group_problems(f"{where}.headGroupSpec", spec["headGroupSpec"])
    groups = spec.get("workerGroupSpecs", [])
    names = [group["groupName"] for group in groups]
    if not groups or len(set(names)) != len(names):
        yield f"{where}.workerGroupSpecs: needs groups, each with its own groupName; there are {names}"
    for i, group in enumerate(groups):
        yield from _group_problems(f"{where}.workerGroupSpecs[{i}]", group)
    try:
        _autoscaling_config(spec)
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        yield f"{where}: Ray's autoscaler can't read it: {error}"


def _head_group_problems(where: str, group: Yaml) -> Iterator[str]:
    if group["rayStartParams"].get("num-cpus") != "0":
        yield f'{where}.rayStartParams.num-cpus: must be "0", so that no work runs on the head'
    if _gpus(group):
        yield f"{where}.template.spec.containers[0].resources: the head takes no work, a GPU in it is paid for nothing"
    yield from _pod_problems(where, group)


def _group_problems(where: str, group: Yaml) -> Iterator[str]:
    low, high = group["minReplicas"], group["maxReplicas"]
    if not max(1, low) <= high:
        yield f"{where}.maxReplicas: {high}, must be at least minReplicas {low}, and 1"
    if not low <= group.get("replicas", low) <= high:
        yield f"{where}.replicas: {group['replicas']}, must be from minReplicas {low} to maxReplicas {high}"
    spot = group.get("labels", {}).get("ray.io/market-type") == "spot"
    if low and (_gpus(group) or spot):
        yield f"{where}.minReplicas: {low}, must be 0 for GPU and spot groups: they'd be paid for while nothing runs"
    if spot and not group["template"]["spec"].get("tolerations"):
        yield f"{where}.template.spec.tolerations: missing; pods of a spot group wouldn't get onto spot nodes"
    yield from _label_problems(f"{where}.labels", group.get("labels", {}))
    yield from _pod_problems(where, group)


def _pod_problems(where: str, group: Yaml) -> Iterator[str]:
    container = group["template"]["spec"]["containers"][0]
    where = f"{where}.template.spec.containers[0]"
    yield from _image_problems(f"{where}.image", container.get("image", ""))
    yield from _security_problems(f"{where}.securityContext", container.get("securityContext", {}))
    resources = container.get("resources", {})
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    for name in ("cpu", "memory"):
        if name not in limits:
            yield f"{where}.resources.limits.{name}: missing; Ray would take the whole node for its own"
    for name in {*limits, *requests}:
        if "/" in name and limits.get(name) != requests.get(name, limits.get(name)):
            yield f"{where}.resources.requests.{name}: must equal the limit; Kubernetes doesn't overcommit devices"


def _security_problems(where: str, context: Yaml) -> Iterator[str]:
    """What Kubernetes' "restricted" pod security standard asks of a container."""
    if context.get("runAsNonRoot") is not True or context.get("allowPrivilegeEscalation") is not False:
        yield f"{where}: must have runAsNonRoot: true and allowPrivilegeEscalation: false"
    capabilities = context.get("capabilities", {})
    if capabilities.get("drop") != ["ALL"] or capabilities.get("add"):
        yield f"{where}.capabilities: must be {{drop: [ALL]}}; nothing here needs one"
    if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield f"{where}.seccompProfile: must be {{type: RuntimeDefault}}, or the kernel's calls are open to it"


def _gpus(group: Yaml) -> bool:
    limits = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
    return group.get("resources", {}).get("GPU", "0") != "0" or any(name.endswith("/gpu") for name in limits)


# --- Images


def _image_problems(where: str, image: str) -> Iterator[str]:
    import ray

    if not image.endswith(f":ray-{ray.__version__}"):
        yield f"{where}: {image!r}, its tag must say the Ray in it: ray-{ray.__version__}"


_DOCKERFILE_RULES: dict[str, tuple[str, Callable[[list[str]], bool]]] = {
    "FROM": (
        f"must be a Python {IMAGE_PYTHON} image by its whole version ({IMAGE_PYTHON}.14): requirements.txt is locked for it",
        lambda lines: any(
            re.match(rf"FROM python:{re.escape(IMAGE_PYTHON)}\.\d+-\w+-\w+(@sha256:\w+)?$", line) for line in lines
        ),
    ),
    "RUN pip install uv": (
        "must name the version, uv==...: another one may install otherwise",
        lambda lines: not any(re.search(r"\bpip install\b(?: -\S+)* uv(?!==\d)", line) for line in lines),
    ),
    "COPY requirements.txt": (
        "what is installed holds test packages; copy cluster/requirements.txt",
        lambda lines: not any(dev_packages(ROOT / name) for name in _copied_locks(lines)),
    ),
    "RUN uv pip install --requirement requirements.txt": (
        "missing; the image must have the locked requirements, copied before",
        lambda lines: _installs_lock(lines),
    ),
    "RUN uv pip install --no-deps --editable .": (
        "missing; the image must have the package itself, without resolving again",
        lambda lines: any(re.match(r"RUN .*\buv pip install\b.*--no-deps --editable \.$", line) for line in lines),
    ),
    "USER": (
        "the last one must be another user than root",
        lambda lines: [line for line in lines if line.startswith("USER ")][-1:] not in ([], ["USER root"], ["USER 0"]),
    ),
    "RUN": (
        "names a package index; leave that to the environment in which the image is built",
        lambda lines: not any(re.search(r"https?://|--(extra-|default-)?index", line) for line in lines),
    ),
}


def _dockerfile_problems(text: str) -> Iterator[str]:
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)
    lines = [" ".join(line.split()) for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    for where, (message, holds) in _DOCKERFILE_RULES.items():
        if not holds(lines):
            yield f"{where}: {message}"


def _copied_locks(lines: list[str]) -> list[str]:
    return [name for line in lines for name in re.findall(r"^COPY (\S*requirements\.txt) ", line)]


def dev_packages(lock: Path) -> set[str]:
    """The packages in a file of locked requirements that only tests and checks need."""
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    return (locked(lock).keys() & {_package(each) for each in extra}) - {"ray", "tifffile"}  # which scikit-image needs


def locked(lock: Path) -> dict[str, str]:
    """The lines of a file of locked requirements by package; one that is there for several Pythons has them all."""
    found: dict[str, str] = {}
    for line in lock.read_text().splitlines():
        found[_package(line)] = f"{found.get(_package(line), '')}{line}\n"
    return found


def _package(requirement: str) -> str:
    return re.split(r"[\[<>=! ;]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def _installs_lock(lines: list[str]) -> bool:
    copied = next((i for i, line in enumerate(lines) if re.match(r"COPY .*\brequirements\.txt\b", line)), len(lines))
    install = re.compile(r"RUN .*\buv pip (install|sync)\b.*\brequirements\.txt\b")
    return any(install.match(line) for line in lines[copied:])
