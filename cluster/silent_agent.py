"""A process in the place of the agent of Ray's dashboard, without which no raylet starts; for a Ray of this machine's own.

That agent serves pages, jobs and metrics, and takes 2 s of CPU time and 90 MB, for which every start waits. This one says of its
ports what Ray's own says where Ray is installed without its extra `default`: that there are none. Run as a program; imports
nothing but Python's.
"""

import os
import sys
import time
from pathlib import Path

PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")
"""Files in which a raylet looks for its agent's ports."""


def main(arguments: list[str]) -> None:
    """Say that there are no ports, and stay for as long as the raylet does, which ends with its agents."""
    raylet = os.getppid()
    named = dict(word.split("=", 1) for word in arguments if word.startswith("--") and "=" in word)
    for port in PORTS:
        path = Path(named["--session-dir"], f"{port}_{named['--node-id']}")
        new = path.with_suffix(".new")
        new.write_text("-1")
        new.rename(path)  # it is there at once, or not at all
    while os.getppid() == raylet:
        time.sleep(0.5)


if __name__ == "__main__":
    main(sys.argv[1:])
