"""Whether a server answers, found out within seconds: the libraries that talk to it may try for minutes, and say nothing."""

import logging
import math
import os
import re
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable

logger = logging.getLogger(__name__)

PATIENCE_S = 12.0
"""How long a server may take to answer for the first time; one that is being started may refuse at first."""

_CONNECT_S = 4.0
_ANSWER_S = 10.0
_PAUSE_S = 1.0

_SILENT = "it accepts connections, and answers nothing"

_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What a client of HTTP/2 says first: the preface, and empty settings."""


def why_unreachable(host: str, port: int, answers: Callable[[socket.socket], bool] = lambda _: True) -> str:
    """What was tried, and how it failed; empty where something accepts a connection, and `answers` as it should."""
    began, tries = time.monotonic(), 0
    while True:
        tries += 1
        try:
            with socket.create_connection((host, port), timeout=_CONNECT_S) as connection:
                if answers(connection):
                    return ""
                reason = "it accepts connections, and answers nothing that it should"
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
        if tries == 1:
            logger.info("waiting for %s:%d, which doesn't answer: %s", host, port, reason)
        # One that accepts and keeps silent had its time.
        if reason == _SILENT or time.monotonic() - began + _PAUSE_S + _CONNECT_S > PATIENCE_S:
            times = f"{tries} times" if tries > 1 else "once"
            return f"{host}:{port} was tried {times} in {time.monotonic() - began:.0f} s: {reason}"
        time.sleep(_PAUSE_S)


def speaks_http2(connection: socket.socket) -> bool:
    """Whether it does, as every gRPC server."""
    connection.settimeout(_CONNECT_S)
    connection.sendall(_HTTP2)
    answer = b""
    while len(answer) < 4:
        received = connection.recv(4 - len(answer))
        if not received:
            return False
        answer += received
    return answer[3] == 4  # settings, the first frame of every server


def _answers_http(parts: urllib.parse.SplitResult) -> Callable[[socket.socket], bool]:
    """Whether anything comes back of a request for nothing in particular, which anybody may ask: also that it's refused."""
    asked = f"HEAD / HTTP/1.1\r\nHost: {parts.netloc.rpartition('@')[2]}\r\nConnection: close\r\n\r\n".encode()

    def answers(connection: socket.socket) -> bool:
        connection.settimeout(_ANSWER_S)
        try:
            if parts.scheme == "https":
                # Nothing is told to it, and nothing believed.
                context = ssl._create_unverified_context()
                with context.wrap_socket(connection, server_hostname=parts.hostname) as secured:
                    secured.sendall(asked)
                    answer = secured.recv(64)
            else:
                connection.sendall(asked)
                answer = connection.recv(64)
        except TimeoutError:
            raise TimeoutError(_SILENT) from None
        except OSError:
            return True  # what breaks off answers; whoever asks for something is told why
        if re.match(rb"HTTP/1\.[01] 50[0234] ", answer):
            # It may be well for those who are known to it: no reason to end, and one to say what is waited for.
            status = answer.split()[1].decode()
            logger.info("%s answers %s; what it's asked is tried again for a while where it goes on so", parts.hostname, status)
        return True

    return answers


_lock = threading.Lock()
_Place = tuple[int, str, int]
"""Process, host and port: a fork asks anew."""

_answered: set[_Place] = set()
_silent: dict[_Place, tuple[float, str]] = {}
"""Why a place was found unreachable, and when."""


def why_endpoint_unreachable(url: str) -> str:
    """`why_unreachable` of a web server, asked once in a process as long as it answers. Empty behind a proxy, which this module
    can't tell from what lies behind it."""
    parts = urllib.parse.urlsplit(url)
    if not parts.hostname or (urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname)):
        return ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    place, began = (os.getpid(), parts.hostname, port), time.monotonic()
    with _lock:  # many threads begin at once, and one shall wait for all
        if place in _answered:
            return ""
        when, reason = _silent.get(place, (-math.inf, ""))
        if when < began:
            reason = why_unreachable(parts.hostname, port, _answers_http(parts))
            _silent[place] = time.monotonic(), reason
        if not reason:
            _answered.add(place)
        return reason
