"""A store in a web browser: the server of one page and of what it asks for (`open_store.py`). Loopback only, with a token.

Whoever may open a port on this machine can ask this server, other people's programs and pages of the web included. So a request
needs the token of the address that was printed (a page keeps it as a cookie, which no other site's requests carry) and a Host
that is this machine, which that of a name from elsewhere that was made to lead here isn't. The page may load nothing of others.
"""

import asyncio
import hmac
import json
import logging
import secrets
import signal
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import numpy as np
from aiohttp import web

from operators.visual import heat
from pipelines.config import ConfigError
from pipelines.showing.open_store import OpenStore, Packed, Wanted
from storage.documents import JsonObject
from storage.errors import RayliftError
from storage.paths import StorageOptions
from storage.redaction import redact
from storage.spec import Level
from storage.store import FeatureStore
from storage.words import printable

logger = logging.getLogger(__name__)

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

FILES = {"/": "browse.html", "/browse.css": "browse.css", "/browse.js": "browse.js"}
"""The page, by path; files of this folder."""

KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}

HEADERS = {
    # `blob:` pictures are made of bytes that the page itself asked for; `data:` is the empty icon.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}
"""Of every answer."""

HOSTS = ("127.0.0.1", "localhost")
"""What a Host header may say, with any port: one may have been forwarded here from another machine."""

MOST_ROWS, MOST_CELLS = 200, 200
"""Rows that one request may ask for; cells that `nearest` gives at most."""

MOST_TEXT = 2**17
"""Bytes of a request's first line: keys may be long."""

TOLD_EVERY_S = 0.25
"""How often the page hears how far a search is."""


class _PageGone(Exception):
    """Nobody waits any more for what is computed."""


class BrowseServer:
    """Serves the page of one store on a socket that is bound, until it is stopped."""

    def __init__(self, store: FeatureStore, options: StorageOptions, port: int = 0):
        """Binds `port` of the loopback address, or a free one. Raises `ConfigError` where that one is taken."""
        self.open, self.options = OpenStore(store, options), options
        self.token = secrets.token_urlsafe(32)
        self.socket = _bound(port)
        self.port: int = self.socket.getsockname()[1]
        self._workers = ThreadPoolExecutor(4, "browse")
        # One at a time: each takes all that the disk or the network gives.
        self._searcher = ThreadPoolExecutor(1, "browse-nearest")

    @property
    def address(self) -> str:
        """What opens the page."""
        return f"http://127.0.0.1:{self.port}/?token={self.token}"

    # --- running ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until an interrupt, which ends it quietly. SIGTERM and SIGHUP raise `KeyboardInterrupt` as they do elsewhere."""
        by = asyncio.run(self._until_signalled())
        if by != signal.SIGINT:
            raise KeyboardInterrupt(by)

    async def _until_signalled(self) -> signal.Signals:
        loop = asyncio.get_running_loop()
        signalled: asyncio.Future[signal.Signals] = loop.create_future()

        def stop(by: signal.Signals) -> None:
            if not signalled.done():
                signalled.set_result(by)

        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if each != signal.SIGHUP or signal.getsignal(each) is not signal.SIG_IGN:  # as under nohup
                loop.add_signal_handler(each, stop, each)
        await self.serve(signalled)
        return signalled.result()

    async def serve(self, stopped: Awaitable[object]) -> None:
        """Answer until `stopped` is done."""
        # A reader that goes away ends what is computed for it; an access log would hold the token.
        runner = web.AppRunner(
            self.application(), access_log=None, handler_cancellation=True, shutdown_timeout=1.0, max_line_size=MOST_TEXT
        )
        await runner.setup()
        try:
            await web.SockSite(runner, self.socket).start()
            # The first look into index and ledger takes a quarter of a second, while the person goes to the browser.
            self._workers.submit(self.open.cards, Wanted(), threading.Event())
            await stopped
        finally:
            await runner.cleanup()
            for pool in (self._workers, self._searcher):
                pool.shutdown(wait=False, cancel_futures=True)

    def application(self) -> web.Application:
        """What answers requests, with the checks before."""
        app = web.Application(middlewares=[self._checked])
        app.on_response_prepare.append(_with_headers)
        app.router.add_routes([web.get(path, self._file) for path in FILES])
        answers: dict[str, Handler] = {
            "store": self._store,
            "status": self._status,
            "heat": self._heat,
            "cards": self._cards,
            "failures": self._failures,
            "photos": self._photos,
            "colours": self._colours,
            "similar": self._similar,
            "nearest": self._nearest,
        }
        app.router.add_routes([web.get(f"/{name}", handler) for name, handler in answers.items()])
        return app

    # --- checks -------------------------------------------------------------------------------------------------------

    @web.middleware
    async def _checked(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse who doesn't know the token; turn what a person can act on into words for the page."""
        if _host_name(request.host) not in HOSTS:
            return _refused(f"this server answers at 127.0.0.1 only, not at {printable(request.host)[:100]}")
        if not self._knows_token(request):
            return _refused("the token lacks or is another run's; open the address that jobs/show.py browse printed")
        try:
            return await handler(request)
        except (RayliftError, OSError) as error:
            # With status 200: browsers report others as errors of the page, and a photograph that is gone is none.
            return web.json_response({"problem": self._in_words(error)})

    def _knows_token(self, request: web.Request) -> bool:
        given = request.query.get("token") or request.cookies.get(self._cookie) or ""
        return hmac.compare_digest(given.encode(errors="replace"), self.token.encode())

    @property
    def _cookie(self) -> str:
        # Cookies are a host's, whatever the port: two servers need two names.
        return f"raylift-browse-{self.port}"

    def _in_words(self, error: Exception) -> str:
        return printable(redact(str(error), self.options))

    # --- answers ------------------------------------------------------------------------------------------------------

    async def _file(self, request: web.Request) -> web.Response:
        name = FILES[request.path]
        text = Path(__file__).with_name(name).read_text(encoding="utf-8")
        response = web.Response(text=text, content_type=KINDS[name.rsplit(".", 1)[1]])
        if request.path == "/":
            response.set_cookie(self._cookie, self.token, httponly=True, samesite="Strict", path="/")
        return response

    async def _store(self, _: web.Request) -> web.Response:
        return web.json_response(self.open.described())

    async def _status(self, _: web.Request) -> web.Response:
        """Also looks whether the store is another one by now, which later answers are of."""
        newer = await self._in_thread(lambda _: self.open.newer())
        if newer is not self.open:
            self.open = newer
        status = await self._in_thread(lambda _: newer.status())
        return web.json_response({**status, "fingerprint": newer.store.root.fingerprint})

    async def _heat(self, _: web.Request) -> web.Response:
        # In a thread, since matplotlib takes a while to be imported.
        colours = await self._in_thread(lambda _: heat(np.linspace(0, 1, 256), 0, 1))
        return web.json_response(colours.tolist())

    async def _cards(self, request: web.Request) -> web.Response:
        query = request.query
        wanted = Wanted(
            rows=_numbers(request) if "rows" in query else (),
            first=_number(request, "from", 0),
            count=min(_number(request, "count", 24), MOST_ROWS),
            text=query.get("find", ""),
            failed=query.get("only") == "failed",
        )
        return web.json_response(await self._in_thread(partial(self.open.cards, wanted)))

    async def _failures(self, _: web.Request) -> web.Response:
        return web.json_response(await self._in_thread(lambda _: self.open.failures()))

    async def _photos(self, request: web.Request) -> web.Response:
        open_store, rows = self.open, self._rows(request)
        return _packed(await self._in_thread(lambda _: open_store.photos(rows)))

    async def _colours(self, request: web.Request) -> web.Response:
        open_store, level, rows = self.open, self._level(request), self._rows(request)
        if level.grid is None:
            raise ConfigError(f"level {level.name} is one vector per image, which has no map to colour")
        return _packed(await self._in_thread(lambda _: open_store.colours(level, rows)))

    async def _similar(self, request: web.Request) -> web.Response:
        open_store, level, rows, point = self.open, self._level(request), self._rows(request), _point(request)
        row = _number(request, "row")
        return _packed(await self._in_thread(lambda _: open_store.similar(row, point, level, rows)))

    async def _nearest(self, request: web.Request) -> web.StreamResponse:
        """JSON lines: how many rows have been looked at, again and again, and at the end the cells or the problem."""
        open_store, level, point, row = self.open, self._level(request), _point(request), _number(request, "row")
        count = max(1, min(_number(request, "count", 24), MOST_CELLS))
        per_image, looked_at = "per_image" in request.query, [0]

        def search(gone: threading.Event) -> list[JsonObject]:
            def note(rows: int) -> None:
                if gone.is_set():
                    raise _PageGone
                looked_at[0] = rows

            return open_store.nearest(row, point, level, count, per_image=per_image, looked_at=note)

        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        searching = asyncio.ensure_future(self._in_thread(search, self._searcher))
        try:
            while not (await asyncio.wait([searching], timeout=TOLD_EVERY_S))[0]:
                await _say(response, {"looked_at": looked_at[0], "of": len(open_store.store)})
            try:
                await _say(response, {"cells": [*searching.result()]})
            except (RayliftError, OSError) as error:
                await _say(response, {"problem": self._in_words(error)})
        finally:
            searching.cancel()
        return response

    # --- helpers ------------------------------------------------------------------------------------------------------

    async def _in_thread(self, work: Callable[[threading.Event], T], pool: ThreadPoolExecutor | None = None) -> T:
        """What `work` gives, which is told by an event that nobody waits for it any more."""
        gone = threading.Event()
        try:
            return await asyncio.get_running_loop().run_in_executor(pool or self._workers, work, gone)
        finally:
            gone.set()

    def _level(self, request: web.Request) -> Level:
        return self.open.store.level(request.query.get("level", ""))

    def _rows(self, request: web.Request) -> np.ndarray:
        return np.unique(self.open.store.rows(_numbers(request)))


def _bound(port: int) -> socket.socket:
    """A socket that listens at the loopback address. Raises `ConfigError`."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port}: ports are 1 to 65535; 0, the default, is any that is free")
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
    except OSError as error:
        listening.close()
        raise ConfigError(f"--port {port}: {error.strerror}; choose another one, or leave it out for one that is free") from None
    listening.listen(128)
    return listening


def _host_name(host: str) -> str:
    """What a Host header names, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:  # of what is no host at all
        return ""


def _refused(why: str) -> web.Response:
    return web.Response(status=403, text=f"{why}\n")


async def _with_headers(_: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)
    response.headers.popall("Server", None)


def _number(request: web.Request, name: str, default: int | None = None) -> int:
    """A whole number from 0 on. Raises `web.HTTPBadRequest`: the page doesn't send anything else."""
    text = request.query.get(name, "" if default is None else str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise web.HTTPBadRequest(text=f"{name} must be a whole number\n")
    return int(text)


def _numbers(request: web.Request) -> list[int]:
    words = request.query.get("rows", "").split(",")
    if len(words) > MOST_ROWS or not all(word.isascii() and word.isdigit() and len(word) < 16 for word in words):
        raise web.HTTPBadRequest(text=f"rows must be at most {MOST_ROWS} whole numbers with commas between them\n")
    return [int(word) for word in words]


def _point(request: web.Request) -> tuple[float, float]:
    try:
        x, y = (float(request.query.get(name, "")) for name in ("x", "y"))
    except ValueError:
        raise web.HTTPBadRequest(text="x and y must be numbers\n") from None
    return x, y


def _packed(packed: Packed) -> web.Response:
    """Four bytes that say how long the header is, the header as JSON, and the rows' bytes."""
    header = json.dumps(packed.header).encode()
    body = b"".join([struct.pack("<I", len(header)), header, *packed.body])
    return web.Response(body=body, content_type="application/octet-stream")


async def _say(response: web.StreamResponse, said: JsonObject) -> None:
    await response.write(f"{json.dumps(said)}\n".encode())
