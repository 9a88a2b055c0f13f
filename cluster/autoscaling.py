"""A cluster on this machine that grows and shrinks: a head without CPUs, and Ray's own autoscaler; its nodes are processes here.

    python -m cluster.autoscaling --port 6380 --nodes 3

RAY_AUTH_TOKEN must be set, to a secret that programs which use the cluster have, too. It stays in the foreground, Ctrl-C or
SIGTERM ends all of it. `ray.cluster_utils.AutoscalingCluster` does the same, but needs a file that Ray 2.60's wheel lacks,
and ends every other Ray on the machine first.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
import yaml

from cluster.session import LOOPBACK, private_folder

if TYPE_CHECKING:  # loading it takes half a second, of a process that only starts Ray
    from storage.documents import JsonValue

HOST = "127.0.0.1"
HEAD_ID = "f" * 51 + "00000"
"""Ray's own id of the head with this node provider."""


@dataclass(frozen=True, kw_only=True)
class AutoscalingCluster:
    """A head that has no work, and nodes that come when there is some."""

    port: int = 6380
    """Where the cluster is: --ray-address 127.0.0.1:PORT."""
    nodes: int = 3
    """Worker nodes at most."""
    cpus: int = 1
    """CPUs of each, as Ray counts them."""
    idle_s: float = 15.0
    """Seconds after which a node that does nothing is taken away."""
    folder: str = "/tmp/raylift-autoscaling"
    """Sockets and logs; the path must be short, and nobody else may enter it."""

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def launch_file(self) -> "dict[str, JsonValue]":
        """What `ray up` would send to the head, with processes for machines."""
        lists = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
        return {
            "cluster_name": "raylift-autoscaling",
            "max_workers": self.nodes,
            "upscaling_speed": 4.0,
            "idle_timeout_minutes": self.idle_s / 60,
            "provider": {
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                "gcs_address": self.address,
                "head_node_id": HEAD_ID,
                "launch_multiple": True,
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "auth": {},
            "head_node_type": "ray.head.default",
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                "worker": {
                    "resources": {"CPU": self.cpus, "object_store_memory": 100_000_000},
                    "node_config": {},
                    "min_workers": 0,
                    "max_workers": self.nodes,
                },
            },
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            **{f"{name}_commands": [] for name in lists},
        }

    def environment(self) -> dict[str, str]:
        """What programs on this machine need to use the cluster, beside the RAY_AUTH_TOKEN that it was started with."""
        return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | LOOPBACK

    def head_environment(self) -> dict[str, str]:
        """What the head's Ray reads when it starts, and the nodes inherit."""
        return self.environment() | {
            "RAY_TMPDIR": self.folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            # The autoscaler that `ray up` uses, and its nodes that are processes.
            "RAY_enable_autoscaler_v2": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            # For busy machines: workers at Ray's default of 15 hardly ever start beside other programs, and a node whose agent
            # starts late is given up. (Not raylet_start_wait_time_s: for as long, no other node would come in its place.)
            "RAY_worker_niceness": "0",
            "RAY_agent_register_timeout_ms": "120000",
        }

    def command(self, launch_file: Path) -> list[str]:
        """`ray start` for the head. Every port that isn't given would be a fixed one, of another Ray perhaps."""
        settings = {
            "port": self.port,
            "node-ip-address": HOST,
            "num-cpus": 0,
            "num-gpus": 0,
            "include-dashboard": "false",
            "object-store-memory": 100_000_000,
            "min-worker-port": 0,
            "max-worker-port": 0,
            "ray-client-server-port": self.port + 1,
            "dashboard-agent-listen-port": 0,
            "autoscaling-config": launch_file,
        }
        flags = [f"--{name}={value}" for name, value in settings.items()]
        return [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *flags]

    def become(self) -> None:
        """Turn this process into the head."""
        launch_file = private_folder(Path(self.folder)) / "autoscaling.yaml"
        launch_file.write_text(yaml.safe_dump(self.launch_file()))
        command = self.command(launch_file)
        os.execve(command[0], command, self.head_environment())


if __name__ == "__main__":
    tyro.cli(AutoscalingCluster, description=__doc__).become()
