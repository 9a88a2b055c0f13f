"""Web servers that send a request on to another one, which is not told what the first was trusted with.

aiohttp follows redirects, and leaves `Authorization` and `Cookie` behind where the next origin (scheme, host, port) is another;
not other headers of the options (`X-Api-Key`, `PRIVATE-TOKEN`), nor a session's own `auth` and `cookies`.
"""

import logging
from types import SimpleNamespace
from typing import Any

import aiohttp
import yarl

from storage.errors import StorageError
from storage.redaction import PUBLIC_HEADERS

logger = logging.getLogger(__name__)


_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=30.0)
"""As for S3. aiohttp's own is of a whole answer, which a large file takes longer for, and lets a silent server have 300 s."""


async def get_client(**settings: Any) -> aiohttp.ClientSession:
    """A session for fsspec that follows a redirect to another origin without credentials, or not at all."""
    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(_leave_credentials)
    return aiohttp.ClientSession(
        **{"timeout": _TIMEOUT, **settings, "trace_configs": [*settings.get("trace_configs", ()), trace]}
    )


async def _leave_credentials(
    session: aiohttp.ClientSession, _: SimpleNamespace, params: aiohttp.TraceRequestRedirectParams
) -> None:
    """Take from the next request's headers what isn't for another origin. Raises `StorageError` where the session has more."""
    location = params.response.headers.get("Location") or params.response.headers.get("URI") or ""
    try:
        following = params.url.join(yarl.URL(location))
        if following.origin() == params.url.origin():
            return
    except ValueError:
        return  # aiohttp says so
    for name in [each for each in params.headers if each.lower() not in PUBLIC_HEADERS]:
        params.headers.popall(name, None)
    shared = [cookie.key for cookie in session.cookie_jar if not cookie["domain"]]
    if session.auth is not None or shared:
        said = (
            f"{params.url.host} sends a request on to {following.host}, which the `auth` and `cookies` of --storage-options "
            "aren't for; it was not followed: name the other place itself, or give the credentials as `headers`"
        )
        logger.warning("%s", said)  # fsspec makes "does not exist" of it
        raise StorageError(said)
