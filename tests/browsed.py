"""A store's browse server while a test runs, and requests to it."""

import asyncio
import contextlib
import http.client
import json
import struct
import threading
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlencode

from pipelines.showing.browse import BrowseServer
from storage.paths import StorageOptions
from storage.store import FeatureStore


@contextlib.contextmanager
def browsing(store: FeatureStore, options: StorageOptions | None = None) -> Iterator[BrowseServer]:
    """The server of `store`, answering in a thread."""
    server, begun = BrowseServer(store, options or {}), threading.Event()
    loop, stop = asyncio.new_event_loop(), asyncio.Event()

    async def serve() -> None:
        begun.set()
        await server.serve(stop.wait())

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    begun.wait()
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        loop.close()


def answer(
    server: BrowseServer, path: str, headers: Mapping[str, str] | None = None, method: str = "GET", **query: object
) -> tuple[int, Mapping[str, str], bytes]:
    """Status, headers and body of one request, without a token unless one is given."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request(method, f"{path}?{urlencode(query)}" if query else path, headers=dict(headers or {}))
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def ask(server: BrowseServer, path: str, **query: object) -> Any:
    """What the page is answered: JSON, the last of JSON lines, or a header with the bytes behind it in `body`."""
    status, headers, body = answer(server, path, token=server.token, **query)
    assert status == 200, body
    if headers["Content-Type"].startswith("application/json"):
        return json.loads(body)
    if headers["Content-Type"].startswith("application/x-ndjson"):
        return json.loads(body.splitlines()[-1])
    (length,) = struct.unpack_from("<I", body)
    return {**json.loads(body[4 : 4 + length]), "body": body[4 + length :]}
