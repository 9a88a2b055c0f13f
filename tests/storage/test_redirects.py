"""What a web server learns to which another one sends a request on."""

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from storage.paths import Folder

OWN = {"X-Api-Key": "hunter2", "Authorization": "Bearer hunter2", "User-Agent": "raylift"}


class Handler(BaseHTTPRequestHandler):
    """Answers all but `/on/`, which it sends on to where the server says."""

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers)))
        if self.path.startswith("/on/"):
            self.send_response(302)
            self.send_header("Location", self.server.to + self.path.removeprefix("/on"))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"data")

    def do_HEAD(self) -> None:
        """What is asked once to learn whether the server answers (storage/reachable.py), of nobody in particular."""
        assert self.path == "/"
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.url = [], f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def servers() -> Iterator[tuple[ThreadingHTTPServer, ThreadingHTTPServer]]:
    with serving() as first, serving() as second:
        first.to = second.url
        yield first, second


def test_another_server_gets_the_request_without_credentials(servers):
    first, second = servers

    assert Folder(f"{first.url}/on", {"client_kwargs": {"headers": OWN}}).read("a.tar") == b"data"

    assert all("hunter2" in str(headers) for _, headers in first.seen)
    ((path, headers),) = second.seen
    assert path == "/a.tar"
    assert "hunter2" not in str(headers)
    assert headers["User-Agent"] == "raylift"


def test_the_same_server_gets_them_again(servers):
    first, _ = servers
    first.to = first.url

    assert Folder(f"{first.url}/on", {"client_kwargs": {"headers": OWN}}).read("a.tar") == b"data"

    assert [headers.get("X-Api-Key") for _, headers in first.seen] == ["hunter2", "hunter2"]


def test_what_a_session_sends_to_everyone_is_not_sent_on(servers, caplog):
    first, second = servers

    with pytest.raises(Exception, match="it was not followed"):
        Folder(f"{first.url}/on", {"client_kwargs": {"cookies": {"id": "hunter2"}}}).read("a.tar")

    assert second.seen == []
    assert "not followed" in caplog.text
