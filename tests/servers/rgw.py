"""A real Ceph RGW S3 server on loopback, for tests that need more truth than an S3 simulator gives.

Unlike the in-process simulator of the ordinary suite, this is a separate daemon with a real storage back end: it
rejects bad signatures, decides races between processes, and outlives a killed client. Nothing is installed: the Debian
packages are fetched with ``apt-get download`` (about 60 MB, once), unpacked with ``dpkg -x`` into a cache folder, and
run from there as child processes (one monitor, one in-memory OSD, one gateway). All of them bind to 127.0.0.1 only.
Works as root or as a normal user, on Debian-like Linux with current package lists.

As a script (prints the settings for a shell, then waits for Ctrl-C)::

    python tests/servers/rgw.py

From a test (``tests/`` is no package: load the file by path or put its folder on ``sys.path``)::

    with rgw_server(tmp_path) as s3:
        fs = s3fs.S3FileSystem(endpoint_url=s3.endpoint, key=s3.access_key, secret=s3.secret_key)

``RgwUnavailable`` is raised when the packages cannot be had here (skip the test); ``RgwStartError`` when they can but
the server does not come up (a failure). The cache folder is ``~/.cache/raylift-test/ceph``; set
``RAYLIFT_TEST_CEPH_CACHE`` to move it, and delete it to fetch the packages anew.

Where this server differs from AWS (seen with 16.2): a failed ``If-None-Match: *`` is a 412 without the ``Condition``
element, which s3fs turns into ``OSError(EINVAL)`` instead of ``FileExistsError``; ``If-None-Match`` is ignored when a
multipart upload completes; ``If-Match`` wants the ETag without quotes.
"""

import argparse
import fcntl
import http.client
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

LOG = logging.getLogger(__name__)

CACHE_VARIABLE = "RAYLIFT_TEST_CEPH_CACHE"
# ceph-base and librados2 come as dependencies anyway; naming them unpacks them even where they are installed already,
# so that daemons, plugins and libraries always come from one version.
PACKAGES = ("ceph-mon", "ceph-osd", "radosgw", "ceph-base", "librados2")
# The closure also holds Python bindings and disk tools (lvm2, parted, sudo, ...) that a memory store never runs.
NEEDED_PACKAGE = re.compile(r"^(lib|ceph-|radosgw)")
# A second libc beside the system's loader would break every child process.
NEVER_UNPACK = frozenset({"libc6", "libc-bin"})

APT_TIMEOUT = 600.0
START_TIMEOUT = 120.0
LOG_TAIL_LINES = 25
TOOL_TAIL_LINES = 5
DEFAULT_CAPACITY = 4 << 30


class RgwUnavailable(RuntimeError):
    """The Ceph packages cannot be obtained on this machine."""


class RgwStartError(RuntimeError):
    """The Ceph packages are here, but the server did not start."""


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """How to reach the running server."""

    endpoint: str
    access_key: str
    secret_key: str


@dataclass(frozen=True, kw_only=True)
class _Ceph:
    """The unpacked packages."""

    root: Path

    def program(self, name: str) -> str:
        return str(self.root / "usr" / "bin" / name)

    def folder(self, pattern: str) -> Path:
        """Return the one folder that matches, whatever the architecture's library folder is called."""
        found = sorted(path for path in self.root.glob(pattern) if path.is_dir())
        if not found:
            raise RgwUnavailable(f"no {pattern} under {self.root}; delete {self.root.parent} to unpack it again")
        return found[0]

    def environment(self) -> dict[str, str]:
        patterns = ("lib/*/", "usr/lib/*/", "usr/lib/*/ceph/")
        libraries = [str(path) for pattern in patterns for path in sorted(self.root.glob(pattern)) if path.is_dir()]
        # CEPH_ARGS and CEPH_CONF of a developer's own cluster must not reach these processes.
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("CEPH_")}
        return {**inherited, "LD_LIBRARY_PATH": os.pathsep.join(libraries), "TZ": "UTC", "LC_ALL": "C"}


# --- packages ---------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where the unpacked packages are kept between runs."""
    configured = os.environ.get(CACHE_VARIABLE)
    return Path(configured) if configured else Path.home() / ".cache" / "raylift-test" / "ceph"


def _is_unpacked(root: Path) -> bool:
    # The folder gets its name only after everything is in it, so its presence is enough.
    return (root / "usr" / "bin" / "radosgw").is_file()


def _obtain(cache: Path) -> _Ceph:
    """Return the unpacked packages, fetching them first if need be. Safe to call from several processes."""
    root = cache / "root"
    if _is_unpacked(root):
        return _Ceph(root=root)
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_unpacked(root):
            _download_and_unpack(cache, root)
    return _Ceph(root=root)


def _download_and_unpack(cache: Path, root: Path) -> None:
    names = _package_names()
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as scratch:
        packages, unpacked = Path(scratch, "packages"), Path(scratch, "root")
        packages.mkdir()
        unpacked.mkdir()
        LOG.info("downloading %d packages with apt-get into %s", len(names), cache)
        _apt(["download", *names], cwd=packages)
        for package in sorted(packages.glob("*.deb")):
            _tool(["dpkg", "-x", str(package), str(unpacked)], cwd=packages)
        if not _is_unpacked(unpacked):
            raise RgwUnavailable(f"the packages {', '.join(names)} do not contain usr/bin/radosgw")
        unpacked.rename(root)


def _package_names() -> list[str]:
    """List the packages to unpack: what apt would install, without what the daemons do not need."""
    # Simulation (-s) needs no lock and no root; it leaves out what the system has already.
    plan = _apt(["-s", "--no-install-recommends", "--reinstall", "install", *PACKAGES])
    wanted = re.findall(r"^Inst (\S+) ", plan, flags=re.MULTILINE)
    return sorted({name for name in wanted if NEEDED_PACKAGE.match(name)} - NEVER_UNPACK)


def _apt(arguments: Sequence[str], cwd: Path | None = None) -> str:
    # As root, apt drops to its own user, which cannot write to a private cache folder.
    sandbox = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    return _tool(["apt-get", "-q", *sandbox, *arguments], cwd=cwd)


def _tool(command: Sequence[str], cwd: Path | None = None) -> str:
    """Run a packaging tool and return what it prints."""
    advice = "needed: a Debian-like Linux with current package lists (as root: apt-get update) and network"
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=APT_TIMEOUT,
            check=False,
        )
    except FileNotFoundError as error:
        raise RgwUnavailable(f"there is no {command[0]} on this machine; {advice}") from error
    except subprocess.TimeoutExpired as error:
        raise RgwUnavailable(f"{command[0]} took over {APT_TIMEOUT:.0f} s; {advice}") from error
    if done.returncode != 0:
        displayed = " ".join(command[:6])
        raise RgwUnavailable(
            f"'{displayed} ...' ended with {done.returncode}; {advice}\n{_last_lines(done.stderr, TOOL_TAIL_LINES)}"
        )
    return done.stdout


# --- configuration ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Cluster:
    """One throw-away cluster: its packages, its folder, its ports."""

    ceph: _Ceph
    folder: Path
    cluster_id: str
    mon_port: int
    s3_port: int
    capacity: int

    @property
    def mon_address(self) -> str:
        return f"[v2:127.0.0.1:{self.mon_port}]"

    def command(self, program: str, *arguments: str) -> list[str]:
        return [self.ceph.program(program), "--conf", str(self.folder / "ceph.conf"), *arguments]

    def config(self) -> str:
        folder, libraries = self.folder, self.ceph.folder("usr/lib/*/ceph")
        return f"""\
[global]
fsid = {self.cluster_id}
mon host = {self.mon_address}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
# One port per messenger instead of two.
ms bind msgr1 = false
# Nothing but this test can reach the daemons. S3 requests are signed and checked all the same.
auth cluster required = none
auth service required = none
auth client required = none
# The gateway insists on an encrypted monitor connection by default, which needs the keys that 'none' does without.
ms mon client mode = crc
# The built-in paths point at an installed system.
plugin dir = {libraries}
erasure code dir = {libraries / "erasure-code"}
osd class dir = {self.ceph.folder("usr/lib/*/rados-classes")}
# The default lists name only some of the classes that the gateway calls.
osd class load list = *
osd class default list = *
# Unix socket paths are limited to 107 bytes, which a test's temporary folder can exceed; nothing here uses them.
admin socket =
run dir = {folder}
crash dir = {folder}
log to file = false
log to stderr = true
mon cluster log to file = false
debug rocksdb = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
mon allow pool size one = true
# Choose among OSDs, not hosts.
osd crush chooseleaf type = 0
# Batching of map changes is what makes a cluster slow to start (1 s per pool by default).
paxos propose interval = 0.02
paxos min wait = 0.01
# A request sent before its pool is ready is sent again only this often (5 s by default).
objecter tick interval = 0.25
# A monitor stops itself when the disk of its folder is nearly full; it needs a few MB here.
mon data avail warn = 0
mon data avail crit = 0

[mon]
mon data = {folder / "mon"}

[osd]
osd data = {folder / "osd"}
osd objectstore = memstore
# A limit, not a reservation. When it is reached, requests hang.
memstore device bytes = {self.capacity}

[client]
rgw data = {folder / "rgw"}
# Without tcp_nodelay small range reads wait 40 ms for a delayed acknowledgement.
rgw frontends = beast endpoint=127.0.0.1:{self.s3_port} tcp_nodelay=1
# Deleted data is kept 2 h by default, which fills a memory store.
rgw gc obj min wait = 1
rgw gc processor period = 5
"""


def _lay_out(workdir: Path, capacity: int, ceph: _Ceph) -> _Cluster:
    """Write a new cluster's folder and configuration."""
    workdir.mkdir(parents=True, exist_ok=True)
    # A fresh folder each time: monitor data of an earlier run would bring back its map and its ports.
    folder = Path(tempfile.mkdtemp(prefix="rgw-", dir=workdir.resolve()))
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir()
    mon_port, s3_port = _free_ports(2)
    cluster = _Cluster(
        ceph=ceph, folder=folder, cluster_id=str(uuid.uuid4()), mon_port=mon_port, s3_port=s3_port, capacity=capacity
    )
    (folder / "ceph.conf").write_text(cluster.config())
    return cluster


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        # All are held until the last is chosen, so that they differ.
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


# --- processes --------------------------------------------------------------------------------------------------------


@contextmanager
def rgw_server(workdir: Path, *, capacity: int = DEFAULT_CAPACITY) -> Iterator[S3Server]:
    """Run an S3 server with one user; everything is stopped and forgotten at the end.

    ``workdir`` gets a sub-folder with the configuration and the daemons' logs. ``capacity`` is the most bytes of
    objects that the server will hold, in memory. Where the system has ``setpriv``, the daemons also die with the
    thread that called this, should it be killed: enter it from the main thread.
    """
    started = time.monotonic()
    cluster = _lay_out(workdir, capacity, _obtain(cache_folder()))
    server = S3Server(
        endpoint=f"http://127.0.0.1:{cluster.s3_port}", access_key=secrets.token_hex(10).upper(), secret_key=secrets.token_hex(20)
    )
    with ExitStack() as stack:
        _start_storage(cluster, stack)
        _create_user(cluster, server)
        gateway = stack.enter_context(_daemon(cluster, "radosgw", "--name", "client.rgw"))
        _wait_for_http(cluster, gateway)
        LOG.info("RGW serves %s after %.1f s; logs in %s", server.endpoint, time.monotonic() - started, cluster.folder)
        yield server


def _start_storage(cluster: _Cluster, stack: ExitStack) -> None:
    """Start the monitor and the OSD. They find each other; the next command waits until they have."""
    monmap = str(cluster.folder / "monmap")
    create_map = ("--create", "--fsid", cluster.cluster_id, "--addv", "a", cluster.mon_address, monmap)
    _run(cluster, "monmaptool", *create_map)
    _run(cluster, "ceph-mon", "--mkfs", "--id", "a", "--monmap", monmap)
    stack.enter_context(_daemon(cluster, "ceph-mon", "--id", "a"))
    # The settings are all in the file; asking the monitor for more would only wait for it.
    _run(cluster, "ceph-osd", "--mkfs", "--id", "0", "--no-mon-config")
    stack.enter_context(_daemon(cluster, "ceph-osd", "--id", "0", "--no-mon-config"))


def _create_user(cluster: _Cluster, server: S3Server) -> None:
    keys = ("--access-key", server.access_key, "--secret-key", server.secret_key)
    user = ("--uid", "test", "--display-name", "test")
    _run(cluster, "radosgw-admin", "--no-mon-config", "user", "create", *user, *keys)


def _run(cluster: _Cluster, program: str, *arguments: str) -> None:
    """Run one of the short-lived programs to its end."""
    log = cluster.folder / f"{program}-setup.log"
    try:
        with log.open("wb") as output:
            done = subprocess.run(
                cluster.command(program, *arguments),
                cwd=cluster.folder,
                env=cluster.ceph.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=START_TIMEOUT,
                check=False,
            )
    except subprocess.TimeoutExpired as error:
        raise _start_error(cluster, f"{program} did not finish within {START_TIMEOUT:.0f} s", log) from error
    except OSError as error:
        raise _start_error(cluster, f"{program} cannot be run: {error}", log) from error
    if done.returncode != 0:
        raise _start_error(cluster, f"{program} ended with {done.returncode}", log)


@contextmanager
def _daemon(cluster: _Cluster, program: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Keep a daemon running in the foreground of its own session, its output in a log file."""
    # Without this, a test run killed with SIGKILL would leave the daemons behind.
    die_with_parent = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
    log = _log_of(cluster, program)
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*die_with_parent, *cluster.command(program, "-f", *arguments)],
                cwd=cluster.folder,
                env=cluster.ceph.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C goes to the whole session; the daemons are to be stopped by us, in order.
                start_new_session=True,
            )
    except OSError as error:
        raise _start_error(cluster, f"{program} cannot be run: {error}", log) from error
    LOG.debug("%s runs as process %d", program, process.pid)
    try:
        yield process
    finally:
        _stop(process, program)


def _stop(process: subprocess.Popen[bytes], program: str) -> None:
    # SIGKILL at once: there is nothing to save, and a young gateway takes over 10 s to heed SIGTERM.
    process.kill()
    process.wait()
    LOG.debug("%s (process %d) is stopped", program, process.pid)


def _wait_for_http(cluster: _Cluster, gateway: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while not _answers(cluster.s3_port):
        if gateway.poll() is not None:
            reason = f"radosgw ended with {gateway.returncode} before it answered on port {cluster.s3_port}"
            raise _start_error(cluster, reason, _log_of(cluster, "radosgw"))
        if time.monotonic() > deadline:
            reason = f"radosgw did not answer on port {cluster.s3_port} within {START_TIMEOUT:.0f} s"
            raise _start_error(cluster, reason, _log_of(cluster, "radosgw"))
        time.sleep(0.05)


def _answers(port: int) -> bool:
    # http.client, unlike urllib, never goes through a configured proxy.
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


# --- reporting --------------------------------------------------------------------------------------------------------


def _log_of(cluster: _Cluster, program: str) -> Path:
    return cluster.folder / f"{program}.log"


def _start_error(cluster: _Cluster, reason: str, log: Path) -> RgwStartError:
    """Say what failed, with the end of its log and of the daemons that it depends on."""
    logs = [log, *(_log_of(cluster, name) for name in ("ceph-mon", "ceph-osd"))]
    tails = [f"--- end of {one}\n{_last_lines(_read(one))}" for one in dict.fromkeys(logs) if one.exists()]
    advice = (
        "If a port was taken meanwhile, run it again. If a library or plugin is missing, or the system was upgraded, "
        f"delete {cluster.ceph.root.parent} so that the packages are fetched anew. Configuration: "
        f"{cluster.folder / 'ceph.conf'}"
    )
    return RgwStartError("\n".join([f"Ceph RGW did not start: {reason}.", advice, *tails]))


def _read(log: Path) -> str:
    return log.read_text(errors="replace")


def _last_lines(text: str, count: int = LOG_TAIL_LINES) -> str:
    lines = [line[:400] for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-count:]) or "(empty)"


# --- script -----------------------------------------------------------------------------------------------------------


def _exports(server: S3Server) -> Mapping[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
        "AWS_ENDPOINT_URL": server.endpoint,
    }


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _serve(workdir: Path, capacity: int) -> None:
    with rgw_server(workdir, capacity=capacity) as server:
        print(f"# S3 endpoint: {server.endpoint}")
        for name, value in _exports(server).items():
            print(f"export {name}={value}")
        print("# Ctrl-C stops it", flush=True)
        while True:
            signal.pause()


def main() -> int:
    """Run the server until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(description="Run a throw-away Ceph RGW S3 server on loopback until Ctrl-C.")
    parser.add_argument("--workdir", type=Path, help="keep configuration and logs here (default: a temporary folder)")
    parser.add_argument("--capacity", type=int, default=DEFAULT_CAPACITY, help="most bytes of objects, held in memory")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="# %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if arguments.workdir is not None:
            _serve(arguments.workdir, arguments.capacity)
        else:
            with tempfile.TemporaryDirectory(prefix="rgw-") as workdir:
                _serve(Path(workdir), arguments.capacity)
    except KeyboardInterrupt:
        LOG.info("stopped")
    except (RgwUnavailable, RgwStartError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
