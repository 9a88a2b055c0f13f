"""Connecting to Ray: a job's own cluster, a named one, or a new local one.

Ray reads some of its environment when it's imported, so it's imported only once that is settled, in `connect`.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

# `uv run` as a driver would make every worker resolve the project again (ray #50961).
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
# Ray Data prints its plan and bars on its own otherwise; progress is cluster/progress.py's job.
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")

logger = logging.getLogger(__name__)


class ClusterError(RuntimeError):
    """The cluster can't be reached or can't run what was asked."""


LOOPBACK = {
    # Ray has this switch for other systems; it decides which address all its processes bind to.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Without the setting, Ray writes a token file into the home folder that then keeps `ray job submit` from reaching other
    # clusters.
    "RAY_AUTH_MODE": "disabled",
}
"""The environment of a cluster that is this machine's own, and gone with who started it."""


@contextmanager
def connect(address: str | None = None, *, num_cpus: int | None = None, num_gpus: int | None = None) -> Iterator[str]:
    """A Ray session for the length of a with-block; yields its address.

    `address`: a cluster's (`auto`, `host:port`, `ray://...`), `local` for a new one on this machine, or None: the job's
    cluster under `ray job submit` (RAY_ADDRESS is set there), else a new local one. Raises `ClusterError`.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        # Ray logs at error level that actor arguments lie in the object store (ray #53727); the driver pins ours.
        for name, value in {**LOOPBACK, "RAY_BACKEND_LOG_LEVEL": "fatal"}.items():
            os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield ray.get_runtime_context().gcs_address
        return
    try:
        if address == "local":
            logger.info("starting a local Ray (about 8 s)")
            ray.init(
                address="local",
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address!r} ({error}); start one with `ray start --head`"
        ) from None
    try:
        found = ray.get_runtime_context().gcs_address
        logger.info("Ray at %s", found)
        yield found
    finally:
        ray.shutdown()
