"""A Ray of this machine's own is open to nobody else, and leaves nothing behind that keeps other clusters from being used."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.session import (
    KEPT,
    ClusterError,
    _rays_errors_in_words,
    _session,
    _set_environment,
    own_cluster,
    own_environment,
    private_folder,
)

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534
IS_ROOT = os.geteuid() == 0

SESSION = """
import json, os
from cluster.session import connect

def run():
    import ray

    return ray.get(ray.remote(num_cpus=1)(lambda: "ran").remote())

with connect("local", num_gpus=0) as address:
    said = {"address": address, "token": os.environ["RAY_AUTH_TOKEN"], "folder": os.environ["RAY_TMPDIR"], "ran": run()}
    from cluster.resources import present_nodes, this_machine
    said["nodes"], said["counted"] = str(present_nodes()), str(this_machine(gpus=False))
    print(json.dumps(said), flush=True)
    input()
    print(run())
print(os.environ.get("RAY_AUTH_MODE"), os.environ.get("RAY_AUTH_TOKEN"))
"""
"""A local session with a worker, until it's told to end; says before and after what it is and does."""

TWO_CLUSTERS = """
import os, sys
import ray  # before the session, as in a notebook
from cluster.session import connect

def mine():
    return {name: value for name, value in os.environ.items() if "AUTH" in name or name == "RAY_TMPDIR"}

before = mine()
for _ in range(2):
    with connect("local", num_cpus=1, num_gpus=0) as own:
        assert own.startswith("127.0.0.1:") and own != sys.argv[1], own
        assert mine()["RAY_AUTH_TOKEN"] != before["RAY_AUTH_TOKEN"]
        with connect("local") as same:
            assert same == own
        assert ray.get(ray.remote(lambda: os.environ["RAY_AUTH_TOKEN"]).remote()) == mine()["RAY_AUTH_TOKEN"]
    assert mine() == before
with connect(sys.argv[1]) as other:
    assert other == sys.argv[1]
    print(ray.get(ray.remote(num_cpus=0)(lambda: os.environ["RAY_AUTH_TOKEN"]).remote()) == before["RAY_AUTH_TOKEN"])
"""

ATTACK = """
import encodings.idna, json, os, socket, sys, urllib.error, urllib.request
import grpc, grpc._channel  # all that is needed, before the files that it comes from can't be read any more

asked = json.load(sys.stdin)
if asked["user"]:
    os.setgroups([])
    os.setgid(asked["user"])
    os.setuid(asked["user"])
headers = [("authorization", "Bearer " + asked["token"])] if asked["token"] else []
found = {}
for port, path in asked["http"]:
    url = f"http://127.0.0.1:{port}{path}"
    request = urllib.request.Request(url, data=b"{}", headers=dict(headers), method="POST")
    try:
        found[f"{port}{path}"] = urllib.request.urlopen(request, timeout=10).status
    except urllib.error.HTTPError as error:
        found[f"{port}{path}"] = error.code
for port, method in asked["grpc"]:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary(method)(b"", timeout=10, metadata=headers)
            found[f"{port}{method}"] = "OK"
        except grpc.RpcError as error:
            found[f"{port}{method}"] = error.code().name
for path in asked["files"]:
    try:
        open(path, "rb").read(1)
        found[path] = "read"
    except OSError as error:
        found[path] = type(error).__name__
for path in asked["sockets"]:
    try:
        socket.socket(socket.AF_UNIX).connect(path)
        found[path] = "connected"
    except OSError as error:
        found[path] = type(error).__name__
print(json.dumps(found))
"""
"""Tries what it's asked to as another user; imports nothing of this project."""

HTTP_PATHS = ("/api/job_agent/jobs/", "/api/jobs/", "/get_or_create_runtime_env", "/delete_runtime_env_if_possible", "/")


def attack(token: str = "", user: int = NOBODY if IS_ROOT else 0, **asked: list[Any]) -> dict[str, Any]:
    """What became of each request, by port and what was asked for."""
    asked = {"http": [], "grpc": [], "files": [], "sockets": [], **asked}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", ATTACK],
        input=json.dumps({**asked, "token": token, "user": user}),
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def ray_methods() -> list[str]:
    """Every gRPC method in Ray's own descriptions, and those of the service that it has none for in Python."""
    import ray

    files = Path(ray.__file__).parent.glob("core/generated/*_pb2_grpc.py")
    found = {name for file in files for name in re.findall(r"'(/ray\.rpc[\w.]*/\w+)'", file.read_text())}
    assert {"/ray.rpc.CoreWorkerService/PushTask", "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"} <= found
    return [*sorted(found), *(f"/ray.rpc.ObjectManagerService/{name}" for name in ("Push", "Pull", "FreeObjects"))]


def speaks_grpc(port: int) -> bool:
    """Whether HTTP/2's opening is answered with its settings."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as s, contextlib.suppress(OSError):
        s.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
        return s.recv(9)[3:4] == b"\4"
    return False


class Session:
    """A local session in a process of its own."""

    def __init__(self, home: Path, folder: str):
        # A mode that a user may have in his shell; and a folder in which no other session is the latest.
        environment = {**os.environ, "HOME": str(home), "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SESSION],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(home / "stderr").open("w"),
            text=True,
        )
        self.said = json.loads(self.process.stdout.readline())
        parent = psutil.Process(self.process.pid)
        self.family = [parent, *parent.children(recursive=True)]
        self._wait_for_the_agent()
        listening = [c for p in self.family for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
        self.addresses = {c.laddr.ip.removeprefix("::ffff:") for c in listening}
        self.ports = sorted({c.laddr.port for c in listening})

    def _wait_for_the_agent(self) -> None:
        """Until it listens: a session is there before."""
        (raylet,) = (process for process in self.family if process.name() == "raylet")
        port = int(re.search(r"--runtime_env_agent_port=(\d+)", " ".join(raylet.cmdline()))[1])
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return
            time.sleep(0.1)
        raise AssertionError("no agent of runtime environments")

    def end(self) -> list[str]:
        """Its last words; it must end well."""
        out, _ = self.process.communicate("\n", timeout=60)
        assert self.process.returncode == 0
        return out.splitlines()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def session(home: Path) -> Iterator[Session]:
    """A session that these tests attack; the one that tests its end ends it."""
    with tempfile.TemporaryDirectory(prefix="rl", dir="/tmp", ignore_cleanup_errors=True) as folder:  # a short path
        found = Session(home, folder)
        yield found
        found.process.kill()
        found.process.communicate()


def test_no_port_takes_a_request_without_the_token(session):
    assert session.said["ran"] == "ran"
    assert session.addresses == {"127.0.0.1"}
    grpc_ports = [port for port in session.ports if speaks_grpc(port)]
    http_ports = [port for port in session.ports if port not in grpc_ports]

    http = attack(http=[[port, path] for port in http_ports for path in HTTP_PATHS])
    grpc = attack(grpc=[[port, method] for port in grpc_ports for method in ray_methods()])

    # The runtime environment's agent alone: nothing serves metrics, or takes jobs.
    assert list(http.values()) == [401] * len(HTTP_PATHS)
    assert set(grpc.values()) == {"UNAUTHENTICATED", "UNIMPLEMENTED"}
    for port in grpc_ports:
        assert "UNAUTHENTICATED" in {answer for asked, answer in grpc.items() if asked.startswith(f"{port}/")}


def test_nothing_runs_beside_what_runs_work(session):
    """Neither what watches clusters nor what makes them grow: each takes a second of CPU time at the start, and 50 to 90 MB."""
    lines = [" ".join(process.cmdline()) for process in session.family[1:] if process.is_running()]
    programs = {word.rpartition("/")[2] for line in lines for word in line.split()[:5] if "/" in word and "=" not in word}

    assert {"gcs_server", "raylet", "silent_agent.py"} <= programs
    assert not {"monitor.py", "log_monitor.py", "dashboard.py"} & programs
    assert not [line for line in lines if "DashboardAgent" in line]


def test_the_token_opens_what_is_closed_without(session):
    gcs = int(session.said["address"].split(":")[1])
    method = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"
    http = [[port, HTTP_PATHS[0]] for port in session.ports if not speaks_grpc(port)]

    wrong = attack(token="0" * 64, http=http, grpc=[[gcs, method]])
    right = attack(token=session.said["token"], http=http, grpc=[[gcs, method]])

    assert wrong.pop(f"{gcs}{method}") == "UNAUTHENTICATED"
    assert set(wrong.values()) == {403}
    assert right.pop(f"{gcs}{method}") == "OK"
    assert not {401, 403} & set(right.values())


def test_the_token_is_in_no_file_and_no_command_line(session, home):
    token = session.said["token"].encode()
    assert len(token) == 64

    for process in session.family:
        assert token not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    files = [p for folder in (home, Path(session.said["folder"])) for p in folder.rglob("*") if p.is_file()]
    assert any("gcs_server" in file.name for file in files)
    assert not [file for file in files if token in file.read_bytes()]
    assert not (home / ".ray" / "auth_token").exists()


@pytest.mark.skipif(not IS_ROOT, reason="only root can act as another user")
def test_another_user_reaches_neither_sockets_nor_environment(session):
    folder = Path(session.said["folder"])
    sockets = [str(path) for path in folder.glob("ray/session_latest/sockets/*")]
    files = [f"/proc/{process.pid}/environ" for process in session.family] + [str(next(folder.rglob("gcs_server*")))]
    assert {Path(path).name for path in sockets} == {"plasma_store", "raylet"}

    assert set(attack(sockets=sockets, files=files).values()) == {"PermissionError"}
    assert set(attack(user=0, sockets=sockets, files=files).values()) == {"connected", "read"}


def test_a_process_uses_local_sessions_and_a_cluster_of_another_token(session):
    done = subprocess.run(
        [sys.executable, "-c", TWO_CLUSTERS, session.said["address"]],
        cwd=ROOT,
        env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": session.said["token"]},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr[-3000:]


def test_a_machine_is_counted_as_ray_counts_it(session):
    assert session.said["counted"] == session.said["nodes"]


def test_the_session_says_nothing_of_its_log_level(session, home):
    assert "RAY_BACKEND_LOG_LEVEL" in os.environ
    assert "logging.cc" not in (home / "stderr").read_text()


def test_after_all_that_the_session_ends_well_and_gives_the_environment_back(session):
    assert session.end() == ["ran", f"disabled {os.environ.get('RAY_AUTH_TOKEN')}"]


# --- its folder and environment


@pytest.fixture
def read_again() -> Iterator[None]:
    """Ray reads at the end what it read at the beginning: another test's session may be open in this process."""
    before = {name: os.environ.get(name) for name in KEPT}
    yield
    _set_environment({"RAY_AUTH_MODE": "disabled"})
    _set_environment(before)


def test_the_environment_is_given_back(read_again, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:8265")
    monkeypatch.delenv("RAY_EXTRA", raising=False)
    before = dict(os.environ)

    def fail() -> None:
        with own_cluster(tmp_path / "ray", RAY_EXTRA="1") as environment:
            assert environment == {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
            assert (environment["RAY_AUTH_MODE"], environment["RAY_EXTRA"]) == ("token", "1")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert dict(os.environ) == before


def test_tokens_differ_between_processes_only():
    program = "from cluster.session import own_environment; print(own_environment()['RAY_AUTH_TOKEN'])"
    others = {subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True).strip() for _ in range(2)}

    assert len({*others, own_environment()["RAY_AUTH_TOKEN"], own_environment()["RAY_AUTH_TOKEN"]}) == 3


@pytest.mark.parametrize("kind", ["open to all", "of the group", "a link", "another user's", "a file"])
def test_a_folder_that_others_may_enter_is_refused(tmp_path, kind):
    folder = tmp_path / "ray"
    if kind == "a link":
        (tmp_path / "real").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "real")
    elif kind == "a file":
        folder.touch()
    else:
        folder.mkdir(mode=0o700)
        folder.chmod({"open to all": 0o777, "of the group": 0o750}.get(kind, 0o700))
    if kind == "another user's":
        if not IS_ROOT:
            pytest.skip("only root can give a folder away")
        os.chown(folder, NOBODY, NOBODY)

    with pytest.raises(ClusterError, match=f"{folder}.*RAY_TMPDIR"):
        private_folder(folder)


def test_files_are_where_ray_was_told_to_put_them_unless_the_path_is_too_long(tmp_path, monkeypatch):
    mine, all_users = tmp_path / "mine", tmp_path / "all"
    mine.mkdir(mode=0o700)
    monkeypatch.setattr("cluster.session.LONGEST_SOCKET", 200)
    for usual, expected in ((mine, mine), (all_users, all_users / f"ray-{os.geteuid()}")):
        monkeypatch.setenv("RAY_TMPDIR", str(usual))
        assert own_environment()["RAY_TMPDIR"] == str(expected)
        assert expected.stat().st_mode & 0o777 == 0o700

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 40)))
    assert own_environment()["RAY_TMPDIR"] == f"/tmp/ray-{os.geteuid()}"


def test_a_cluster_that_asks_for_a_token_says_so(tmp_path):
    """What Ray says of tokens is said in our words, where a cluster answers at all."""
    program = (
        "import cluster.session\n"
        "cluster.session.why_unreachable = lambda *_, **__: ''\n"
        "with cluster.session.connect('127.0.0.1:1'): pass"
    )
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
    environment.pop("RAY_AUTH_TOKEN", None)

    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    assert "cluster at '127.0.0.1:1' doesn't take this program's token: set RAY_AUTH_MODE=token" in done.stderr


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "auto"])
def test_cluster_that_is_not_there_is_named_within_seconds(address, monkeypatch):
    """Ray itself tries for minutes, and may abort the process."""
    monkeypatch.setattr("storage.reachable.PATIENCE_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")

    with (
        pytest.raises(ClusterError, match=rf"no Ray cluster answers at '{address.format(port=port)}': [0-9.]+:{port} was tried"),
        _session(address.format(port=port)),
    ):
        pass


@pytest.mark.parametrize("address", ["nowhere", "host:", ":6379", "host:port", "host:99999"])
def test_address_that_is_none_is_refused(address):
    with pytest.raises(ClusterError, match="give host:port"), _session(address):
        pass


LEAVING_OUT = """
import ctypes, os, sys
from cluster.session import _without_rays_line

def native(text):  # as C++ does: by the file's number
    ctypes.CDLL(None).dprintf(2, text.encode())

native("before\\n")
with _without_rays_line():
    native("[00:00:00 I 1 1] logging.cc:303: Set ray log level from environment variable RAY_BACKEND_LOG_LEVEL to 3\\n")
    print("from Python", file=sys.stderr)
    native("[2026-01-01 00:00:00,000 C 1 1] core.cc:1: Check failed\\n")
    native("without an end")
    {end}
native("; after\\n")
"""


@pytest.mark.parametrize(
    ("end", "code", "after"),
    [("pass", 0, "; after\n"), ("os.abort()", -6, ""), ("raise SystemExit(3)", 3, ""), ("os.close(2)", 0, "; after\n")],
)
def test_all_but_rays_line_is_shown_also_where_ray_aborts(end, code, after):
    done = subprocess.run(
        [sys.executable, "-c", LEAVING_OUT.replace("{end}", end)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )

    assert done.stderr == "before\nfrom Python\n[2026-01-01 00:00:00,000 C 1 1] core.cc:1: Check failed\nwithout an end" + after
    assert done.returncode == code


def test_a_program_without_standard_error_goes_on():
    program = 'import os; os.close(2)\nfrom cluster.session import _without_rays_line\nwith _without_rays_line(): print("on")'
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stdout) == (0, "on\n")


def test_what_ray_says_of_a_lost_worker_is_told_in_words(caplog, capsys):
    from ray._private import worker

    lost = (
        "Task _Actor.do failed. There are infinite retries remaining, so the task will be retried. Error: The actor is "
        "temporarily unavailable: RpcError: RPC error: Socket closed rpc_code: 14"
    )
    before = worker.print_to_stdstream
    with caplog.at_level("WARNING"), _rays_errors_in_words():
        # As `listen_error_messages` calls it.
        worker.print_to_stdstream({"lines": [lost], "pid": "raylet", "is_err": False}, ignore_prefix=False)
        worker.print_to_stdstream({"lines": ["the disk is full"], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    assert worker.print_to_stdstream is before
    assert caplog.messages == [
        "a worker was lost (killed, out of memory, or its machine is gone); its task runs again",
        "Ray: the disk is full",
    ]
    assert capsys.readouterr() == ("", "")
