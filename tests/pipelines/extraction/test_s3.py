"""The pipeline over S3: same bytes as on local disk, also when the server errs and stalls; no credentials anywhere."""

import json
import random
import threading
import time
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import s3fs

from pipelines.executors import InlineExecutor
from pipelines.extraction.run import extract
from pipelines.extraction.start import main
from storage.paths import Folder


def upload(local: Path, bucket: str, options: dict) -> None:
    fs = s3fs.S3FileSystem(**options)
    for path in sorted(local.glob("*.tar")):
        fs.pipe_file(f"{bucket}/in/{path.name}", path.read_bytes())


def tree(folder: Folder, prefix: str = "") -> dict[str, bytes]:
    """Every object of a store but those below runs/."""
    names = {f"{prefix}{name}": folder.read(f"{prefix}{name}") for name in folder.sizes(prefix.rstrip("/"))}
    for name in folder.folders(prefix.rstrip("/")):
        if f"{prefix}{name}" not in ("runs", ".partial"):
            names |= tree(folder, f"{prefix}{name}/")
    return names


@pytest.fixture
def s3_inputs(make_tars, tmp_path, s3_options):
    make_tars(count=2, each=10)
    upload(tmp_path / "in", s3_options["bucket"], s3_options["options"])
    return s3_options


def s3_config(tiny, s3_inputs, endpoint: str | None = None, **changes):
    options = dict(s3_inputs["options"])
    if endpoint:
        options["endpoint_url"] = endpoint
    bucket = s3_inputs["bucket"]
    settings = {"out": f"s3://{bucket}/feats.zarr", "storage_options": json.dumps({"s3": options})}
    return tiny(f"s3://{bucket}/in/s-{{000..001}}.tar", **{**settings, **changes})


def same_but_sources(a: dict[str, bytes], b: dict[str, bytes]) -> bool:
    """Feature shards and metadata are equal; index and ledger name their sources, which lie elsewhere."""
    features = {name for name in a if "/features/" in name or name.endswith("zarr.json")}
    return a.keys() == b.keys() and all(a[name] == b[name] for name in features)


def test_store_on_s3_has_the_bytes_of_the_local_one(tiny, s3_inputs, tmp_path):
    local = tiny(str(tmp_path / "in/s-{000..001}.tar"))
    remote = s3_config(tiny, s3_inputs)

    extract(local, InlineExecutor())
    summary = extract(remote, InlineExecutor())

    assert (summary.ok, summary.failed) == (20, 0)
    assert same_but_sources(tree(Folder(local.out)), tree(Folder(remote.out, remote.options)))


def test_what_a_start_asks_for_of_the_index_and_of_commit_records_is_asked_once(tiny, s3_inputs, api_calls):
    """A listing of commit records is a request for each thousand tasks, an object of the index one for each million images."""
    config = s3_config(tiny, s3_inputs, block_rows=8).changed(executor="inline")
    read = ("GetObject index/sources.parquet", "ListObjectsV2 ledger/commits/")
    once = ("HeadObject index/samples", "HeadObject index/keys", "GetObject index/keys")

    def asked(**changes) -> dict[str, int]:
        """Before the first task begins, or to the end; its worker, which is in this process, asks for the index on its own."""
        api_calls.clear()
        list(main(config.changed(**changes)))
        made = [call.replace("feats.zarr/", "") for call in api_calls]
        first = next((i for i, call in enumerate(made) if "/attempts/0" in call), len(made))
        return {name: sum(call.startswith(name) for call in made[:first]) for name in (*read, *once)}

    fresh = asked()
    Folder(config.out, config.options).remove(["ledger/commits/00000001.parquet"])
    continued = asked()
    planned = asked(plan=True)

    # Whether there is an index, and the worker; tasks that are done.
    assert fresh == dict(zip((*read, *once), (2, 1, 0, 0, 0), strict=True))
    # The index, and the worker; what is done when the input is compared, and when the store is there; both parts are whole.
    assert continued == dict(zip((*read, *once), (2, 2, 1, 1, 1), strict=True))
    assert planned == dict(zip((*read, *once), (1, 1, 1, 1, 1), strict=True))


def test_no_credential_is_written_to_the_store_or_shown_in_errors(tiny, s3_inputs, capfd):
    from jobs.extract import run

    config = s3_config(tiny, s3_inputs)
    extract(config, InlineExecutor())
    folder = Folder(config.out, config.options)
    runs = [f"runs/{run_id}/{name}" for run_id in folder.folders("runs") for name in folder.sizes(f"runs/{run_id}")]
    everything = b"".join([*tree(folder).values(), *folder.read_many(runs)])

    wrong = json.dumps({"key": "AKIAWRONG1", "secret": "s3cr3t-value-x", "endpoint_url": s3_inputs["options"]["endpoint_url"]})
    code = run(["--data", "s3://no-such-bucket/x.tar", "--out", "s3://no-such-bucket/o.zarr", "--storage-options", wrong,
                "--executor", "inline", "--model", "test_vit.r160_in1k", "--weights", "random"])  # fmt: skip
    displayed = "".join(capfd.readouterr())

    assert b"test-secret-value" not in everything
    assert b"test-access" not in everything
    assert code == 2
    assert "no-such-bucket" in displayed
    assert "s3cr3t-value-x" not in displayed
    assert "AKIAWRONG1" not in displayed


class FaultyProxy(ThreadingHTTPServer):
    """Forwards to an S3 server; answers some requests with 500 or 503 and stalls others."""

    daemon_threads = True

    def __init__(self, upstream: str, error_rate: float, stall_rate: float):
        super().__init__(("127.0.0.1", 0), FaultyHandler)
        self.upstream = urlsplit(upstream)
        self.random = random.Random(7)
        self.error_rate, self.stall_rate = error_rate, stall_rate
        self.faults = {"500": 0, "503": 0, "stall": 0, "passed": 0}


class FaultyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def log_message(self, *args: object) -> None:
        return

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        draw = self.server.random.random()
        if draw < self.server.stall_rate:
            self.server.faults["stall"] += 1
            time.sleep(2)  # longer than the client's read timeout in these tests
            self.close_connection = True
            return
        if draw < self.server.stall_rate + self.server.error_rate:
            status = 503 if self.server.random.random() < 0.5 else 500
            self.server.faults[str(status)] += 1
            code = "SlowDown" if status == 503 else "InternalError"
            self.reply(status, [], f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode())
            return
        self.server.faults["passed"] += 1
        upstream = HTTPConnection(self.server.upstream.hostname or "", self.server.upstream.port)
        upstream.request(self.command, self.path, body=body or None, headers=dict(self.headers))
        answer = upstream.getresponse()
        data = answer.read()
        skip = ("transfer-encoding", "connection", "content-length", "date", "server")
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in skip]
        if self.command == "HEAD":
            headers.append(("Content-Length", answer.getheader("Content-Length") or "0"))
        self.reply(answer.status, headers, data)
        upstream.close()

    def reply(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = forward


@pytest.fixture
def faulty_s3(s3_server):
    proxy = FaultyProxy(s3_server, error_rate=0.1, stall_rate=0.02)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    yield proxy
    proxy.shutdown()
    proxy.server_close()


def test_run_completes_identically_over_s3_that_errs_and_stalls(tiny, s3_inputs, faulty_s3):
    clean = s3_config(tiny, s3_inputs)
    s3_inputs["options"]["config_kwargs"] = {"read_timeout": 1}
    ten = {"block_rows": 1, "limit": 10}
    endpoint = f"http://127.0.0.1:{faulty_s3.server_address[1]}"
    bucket = s3_inputs["bucket"]
    faulty = s3_config(tiny, s3_inputs, endpoint, out=f"s3://{bucket}/faulty.zarr", **ten)
    reference = s3_config(tiny, s3_inputs, out=f"s3://{bucket}/reference.zarr", **ten)
    extract(reference, InlineExecutor())

    summary = extract(faulty, InlineExecutor())

    assert (summary.ok, summary.failed) == (10, 0)
    assert faulty_s3.faults["500"] + faulty_s3.faults["503"] >= 5
    assert faulty_s3.faults["stall"] >= 1
    assert tree(Folder(faulty.out, clean.options)) == tree(Folder(reference.out, clean.options))
