"""Connecting to Ray: a job's own cluster, a named one, or a new local one.

Ray reads some of its environment when it's imported, so it's imported only once that is settled, in `connect`.
"""

import functools
import logging
import os
import re
import secrets
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

from cluster.lost import ending_with
from storage.errors import RayliftError
from storage.reachable import speaks_http2, why_unreachable

# `uv run` as a driver would make every worker resolve the project again (ray #50961).
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
# Ray Data prints its plan and bars on its own otherwise; progress is cluster/progress.py's job.
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")

logger = logging.getLogger(__name__)


class ClusterError(RayliftError):
    """The cluster can't be reached or can't run what was asked."""


LOOPBACK = {
    # Ray has this switch for other systems; it decides which address all its processes bind to.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # The loopback is open to every user of the machine, and Ray runs whatever is sent to its ports.
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_K8S_TOKEN_AUTH": "0",
}
"""The environment of a cluster that is this machine's own, and gone with who started it; a token comes with it."""

MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**28),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""How glibc keeps what networks free: in one pool for all threads, and what is below 32 MiB for the next batch. A worker
(ViT-S/16 at 224 px, batches of 16, two tasks at once) takes 664 MB of its own in place of 878, and has fewer page faults. In
pages of 2 MiB, where the kernel has them for who asks: a forward pass in bf16 takes 7 % less CPU time than beside it in 4 KiB."""

KEPT = (*LOOPBACK, "RAY_AUTH_TOKEN")
"""What Ray reads once in a process, and keeps."""

SOCKET = "ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""Ray's longest path below its folder."""

LONGEST_SOCKET = 107
"""Bytes that the path of a Unix socket may have."""


@functools.cache
def _token() -> str:
    """One for all clusters that this process starts: Ray keeps one in a process, which may use several of them."""
    return secrets.token_hex(32)


def own_environment(folder: Path | None = None) -> dict[str, str]:
    """What all processes of a cluster of this machine's own have in their environment, and programs that use it, too.

    With the token in it: never to be written to a file, a log or a command line, which other users can read. `folder` is for
    Ray's sockets, logs and spilled objects; it's made if it isn't there. Raises `ClusterError` if others may enter it.
    """
    return {
        **LOOPBACK,
        "RAY_AUTH_TOKEN": _token(),
        "RAY_TMPDIR": str(private_folder(folder or _folder_of_this_user())),
        # Ray logs at error level that actor arguments lie in the object store (ray #53727); the driver pins ours.
        "RAY_BACKEND_LOG_LEVEL": os.environ.get("RAY_BACKEND_LOG_LEVEL", "fatal"),
        # Of Ray's 15, workers would hardly get a core beside any other program.
        "RAY_worker_niceness": "0",
        **{name: os.environ.get(name, value) for name, value in MEMORY.items()},
    }


def private_folder(folder: Path) -> Path:
    """`folder`, made if it isn't there. Raises `ClusterError` unless it's this user's, and nobody else may enter it.

    Ray gives everyone the right to write to what it makes below: to exchange its sockets, or the code that workers load.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ClusterError(f"no folder for Ray's files: {error}; set RAY_TMPDIR to another one") from None
    if not _is_private(folder):
        raise ClusterError(
            f"Ray's sockets can't be in {folder}, since other users may enter it or it isn't this user's own folder; "
            f"`chmod 700 {folder}` if it is, or set RAY_TMPDIR to another one"
        )
    return folder


def _is_private(folder: Path) -> bool:
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def _folder_of_this_user() -> Path:
    """Where Ray's files of local sessions are: in Ray's usual place, but below a folder that only this user can enter."""
    usual = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()).absolute()
    folder = usual if _is_private(usual) else usual / f"ray-{os.geteuid()}"
    if len(os.fsencode(folder / SOCKET)) > LONGEST_SOCKET:
        folder = Path("/tmp", f"ray-{os.geteuid()}")
        logger.info("the path of %s is too long for Ray's sockets; its files are in %s", usual, folder)
    return folder


@contextmanager
def own_cluster(folder: Path | None = None, **settings: str) -> Iterator[dict[str, str]]:
    """Within it, this process starts and uses clusters of this machine's own; yields the environment for other programs.

    Sets `own_environment(folder)` and `settings` in `os.environ`, whatever was there, and puts that back at the end, so that
    other clusters can be used afterwards. A session that is open already isn't disturbed.
    """
    new = own_environment(folder) | settings
    before = {name: os.environ.get(name) for name in new}
    _set_environment(new)
    try:
        yield {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    """Set environment variables, or remove those that are None, and have Ray read again what it keeps of them."""
    before = [os.environ.get(name) for name in KEPT]
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if "ray" in sys.modules and before != [os.environ.get(name) for name in KEPT]:
        from ray._private import ray_constants
        from ray._raylet import AuthenticationTokenLoader, Config

        ray_constants.ENABLE_RAY_CLUSTER = ray_constants.env_bool(
            ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, not ray_constants.IS_WINDOWS_OR_OSX
        )
        # In this order: a thread of a session that is ending aborts the process if it wants a token and finds none.
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def connect(address: str | None = None, *, num_cpus: int | None = None, num_gpus: int | None = None) -> Iterator[str]:
    """A Ray session for the length of a with-block; yields its address.

    `address`: a cluster's (`auto`, `host:port`, `ray://...`), `local` for a new one on this machine, or None: the job's
    cluster under `ray job submit` (RAY_ADDRESS is set there), else a new local one. A local one always asks for a token that only
    its own processes know, also where RAY_AUTH_MODE says otherwise. Raises `ClusterError`.
    """
    address = _named(address)
    if _is_open():
        yield _gcs_address()
    elif address == "local":
        logger.info("starting a local Ray (about 8 s)")
        with own_cluster(), _session(address, num_cpus=num_cpus, num_gpus=num_gpus, include_dashboard=False):
            yield _gcs_address()
    else:
        with _session(address):
            yield _gcs_address()


def starts_one(address: str | None = None) -> bool:
    """Whether `connect` would start a local Ray, there being neither a session nor a cluster to ask."""
    return not _is_open() and _named(address) == "local"


def is_own() -> bool:
    """Whether the session is with a Ray that this process started: of one node that nobody else uses, and that doesn't grow."""
    return _is_open() and bool(_own_processes())


def _named(address: str | None) -> str:
    return address or os.environ.get("RAY_ADDRESS") or "local"


def _is_open() -> bool:
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def _gcs_address() -> str:
    import ray

    return ray.get_runtime_context().gcs_address


@contextmanager
def _session(address: str, **options: int | None) -> Iterator[None]:
    import ray
    from ray.exceptions import AuthenticationError

    try:
        _require_answer(address)
        with _keeping_sigterm(), _without_rays_line(), _without_watchers():
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **options)
    except AuthenticationError:
        raise ClusterError(
            f"the Ray cluster at {address!r} doesn't take this program's token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH to the cluster's"
        ) from None
    except (ConnectionError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address!r} ({error}); start one with `ray start --head`, or set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN where it asks for a token"
        ) from None
    except Exception as error:
        if type(error) is not Exception:  # which is what Ray raises of a node that doesn't come up in time
            raise
        raise ClusterError(
            f"Ray didn't start on this machine in time, which may have too much else to do: {error} Run the same command again, "
            "or with --executor inline, which needs no Ray"
        ) from None
    try:
        logger.info("Ray at %s", _gcs_address())
        with ending_with(_own_processes()), _rays_errors_in_words():
            yield
    finally:
        ray.shutdown()


@contextmanager
def _without_watchers() -> Iterator[None]:
    """Within it, a Ray that is started here is without what watches clusters and makes them grow: the dashboard's server, which
    without its page only sends usage statistics, and its agent; the autoscaler's monitor, and that of workers' logs, which
    nobody is shown. For the agent of runtime environments, a second of Python, it doesn't wait: it's told that agent's port.

    `ray.init` has no settings for these. Where another version has other names for them, they are started.
    """
    from ray._private import node, parameter, ray_constants, services

    real: Callable[..., list[str]] = getattr(services, _PYTHON, lambda *_, **__: [])

    def python(component: str, *args: object, **settings: object) -> list[str]:
        if component == ray_constants.PROCESS_TYPE_DASHBOARD_AGENT:
            return [sys.executable, "-I", "-S", str(Path(__file__).with_name("silent_agent.py"))]
        return real(component, *args, **settings)

    with _kept_port() as port:
        unwatched = {"no_monitor": True, "include_log_monitor": False, "runtime_env_agent_port": port}
        instead: list[tuple[object, str, object]] = [
            (parameter, "RayParams", functools.partial(parameter.RayParams, **unwatched)),
            (node.Node, "start_api_server", lambda _, **__: None),
            (services, _PYTHON, python),
        ]
        with _replaced(instead):
            yield


@contextmanager
def _kept_port() -> Iterator[int]:
    """A port of the loopback that systems give to no connection, kept for a server of this machine; 0 where none was found."""
    with socket.socket() as kept:
        port = next((each for each in secrets.SystemRandom().sample(range(20_000, 30_000), 100) if _binds(kept, each)), 0)
        # Bound without this option and given it now, it's shared with those alone who ask for it, as asyncio's servers do.
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        yield port


def _binds(kept: socket.socket, port: int) -> bool:
    try:
        kept.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True


@contextmanager
def _replaced(instead: Sequence[tuple[object, str, object]]) -> Iterator[None]:
    """Names of Ray's that mean something else within it: what they are of, the name, what it means. Those that another version
    doesn't have stay away, and that version does as it ever does."""
    there = [each for each in instead if hasattr(*each[:2])]
    before = [(of, name, getattr(of, name)) for of, name, _ in there]
    try:
        for of, name, value in there:
            setattr(of, name, value)
        yield
    finally:
        for of, name, value in before:
            setattr(of, name, value)


@contextmanager
def _rays_errors_in_words() -> Iterator[None]:
    """What Ray tells a driver of the cluster's errors, and would print to standard output, as warnings of this program's log: of
    the lost workers' tasks, which run again, in words that don't need Ray's. Another version may print in another way.
    """
    from ray._private import worker

    def tell(said: Mapping[str, object], *_: object, **__: object) -> None:
        for line in cast("Iterable[object]", said.get("lines") or ()):
            if _RETRIED.search(str(line)):
                logger.warning("a worker was lost (killed, out of memory, or its machine is gone); its task runs again")
                logger.debug("Ray: %s", line)
            else:
                logger.warning("Ray: %s", line)

    with _replaced([(worker, _PRINT, tell)]):
        yield


_PRINT = "print_to_stdstream"
"""Ray's function that prints what a driver is told."""

_RETRIED = re.compile(r"^Task \S+ failed\. There are .* retries remaining, so the task will be retried\.")


_PYTHON = "_build_python_executable_command_memory_profileable"
"""Ray's function of the command that starts one of its Python programs."""


def _own_processes() -> dict[int, str]:
    """Processes without which a session can't go on, of those that this one started: ids, and what they are called."""
    from ray._private.worker import global_worker

    names = {"raylet": "Ray's raylet, which runs workers on this machine,", "gcs_server": "Ray's GCS, which knows the cluster,"}
    node = global_worker.node
    found = node.all_processes if node is not None else {}
    return {info.process.pid: name for kind, name in names.items() for info in found.get(kind, [])}


def _require_answer(address: str) -> None:
    """Raise `ClusterError` where no Ray is at `address` (`host:port`, `ray://host:port`, `auto`).

    Ray itself would try for minutes, and may abort the process."""
    from ray._private.services import canonicalize_bootstrap_address

    if address == "local":
        return
    where = address.removeprefix("ray://").rstrip("/")
    if "://" in where:
        return  # of those that Ray takes from plug-ins
    if address == "auto":
        # As Ray does: RAY_ADDRESS, or what `ray start` noted on this machine.
        where = canonicalize_bootstrap_address("auto") or ""
    host, colon, port = where.rpartition(":")
    if where and not (colon and port.isdecimal() and 0 < int(port) < 2**16 and host):
        raise ClusterError(
            f"no Ray cluster can be at {address!r}; give host:port (of `ray start --head`), ray://host:port, or auto"
        )
    # Ray's processes speak gRPC, which is HTTP/2; a port of something else would keep it waiting, too.
    asked = [speaks_http2] if os.environ.get("RAY_USE_TLS", "0") == "0" else []
    if where and (reason := why_unreachable(host.strip("[]"), int(port), *asked)):
        raise ClusterError(
            f"no Ray cluster answers at {address!r}: {reason}; start one with `ray start --head`, or correct --ray-address or "
            "RAY_ADDRESS"
        )


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Keep the program's own answer to SIGTERM: Ray's driver prints C stacks and aborts, before anything is put in order."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


_PASS_ON = """
import os
with open(0, "rb") as lines:
    for line in lines:
        if b"Set ray log level from environment variable RAY_BACKEND_LOG_LEVEL to" not in line:
            os.write(2, line)
"""
"""Passes standard input on to standard error, line by line, but for Ray's word on the level that `own_environment` sets."""


@contextmanager
def _without_rays_line() -> Iterator[None]:
    """What is written to standard error meanwhile, by Python or not, goes through a process that leaves that one line out.

    A process and no thread: where Ray aborts this program, its last words are on their way still.
    """
    try:
        shown = os.dup(2)
        passing = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PASS_ON],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for this program, which may have something to say of it
        )
    except OSError as error:  # standard error is closed, or nothing more can be started: then the line is shown
        logger.debug("Ray's word on its log level isn't left out: %s", error)
        yield
        return
    try:
        if passing.stdin is not None:
            os.dup2(passing.stdin.fileno(), 2)
            passing.stdin.close()
        yield
    finally:
        sys.stderr.flush()
        os.dup2(shown, 2)
        os.close(shown)
        with suppress(subprocess.TimeoutExpired):  # where a process that was started meanwhile goes on to write there
            passing.wait(1)
