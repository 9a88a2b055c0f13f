"""What of URLs, storage options and headers may be shown and stored: no secret leaves `redact` in a message.

What is known to be harmless is listed; all else is blanked.
"""

import re
import urllib.parse
from collections.abc import Iterator, Mapping

PUBLIC_HEADERS = frozenset({
    "accept", "accept-encoding", "accept-language", "cache-control", "connection", "content-length", "content-type", "host",
    "if-match", "if-modified-since", "if-none-match", "range", "user-agent",
})  # fmt: skip
"""Headers that hold no credentials."""

_PUBLIC_PARAMETERS = frozenset({
    "alt", "delimiter", "dl", "download", "expires", "format", "generation", "limit", "list-type", "offset", "page", "partnumber",
    "prefix", "raw", "ref", "rev", "revision", "se", "sp", "spr", "sr", "srt", "ss", "st", "sv", "version", "versionid",
    "x-amz-algorithm", "x-amz-date", "x-amz-expires", "x-amz-signedheaders", "x-goog-algorithm", "x-goog-date", "x-goog-expires",
    "x-goog-signedheaders",
})  # fmt: skip
"""Parameters of URLs whose values are shown; those of all others are blanked, for nobody can list what secrets are called."""

_PUBLIC_OPTIONS = PUBLIC_HEADERS | frozenset({
    "access", "account_name", "addressing_style", "anon", "asynchronous", "auto_mkdir", "block_size", "cache_regions",
    "cache_type", "connect_timeout", "consistency", "default_block_size", "default_cache_type", "default_fill_cache",
    "default_location", "encoded", "endpoint_url", "host", "listings_expiry_time", "max_attempts", "max_concurrency", "max_paths",
    "max_pool_connections", "mode", "payload_signing_enabled", "port", "profile", "project", "protocol", "read_timeout", "region",
    "region_name", "requester_pays", "retries", "same_names", "signature_version", "simple_links", "skip_instance_cache",
    "timeout", "total", "use_accelerate_endpoint", "use_dualstack_endpoint", "use_listings_cache", "use_ssl", "username",
    "verify", "version_aware",
})  # fmt: skip
"""The same for storage options, and for the names that are grouped below them."""


def redact(text: str, storage_options: Mapping[str, object] | None = None) -> str:
    """Blank credentials in `text`: user info of URLs and the values of their parameters, but for those that are known to be
    harmless, and every value of `storage_options` that isn't."""
    # Secret keys may hold slashes, at which a path seems to begin; a port doesn't begin one.
    text = re.sub(r"(\w+://)(?:[^/\s?#]*|[^/\s?#:@]+:(?!\d+(?:/|$))[^\s?#@]*)@", r"\1***@", text)
    text = re.sub(r"([?&#]([^=&#\s?'\"]+)=)[^&#\s'\"]+", _blank_parameter, text)
    for secret in sorted(_secret_texts(storage_options or {}), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def _blank_parameter(found: re.Match[str]) -> str:
    return found[0] if found[2].lower() in _PUBLIC_PARAMETERS else f"{found[1]}***"


def public_options(options: Mapping[str, object]) -> dict[str, object]:
    """`options` with the values of all that aren't known to be harmless replaced by `***`, for files and logs."""
    return {name: _public_value(name, value) for name, value in options.items()}


def _public_value(name: str, value: object) -> object:
    if isinstance(value, Mapping):
        return public_options(value)
    if value is None or isinstance(value, bool):
        return value
    if name.lower() not in _PUBLIC_OPTIONS:
        return "***"
    if isinstance(value, list | tuple):
        return [_public_value(name, each) for each in value]
    return redact(value) if isinstance(value, str) else value


def _secret_texts(options: Mapping[str, object]) -> Iterator[str]:
    """Values that must not be shown, as messages may have them. Shorter ones than 4 characters are parts of words."""
    for value in _secret_values(options):
        text = str(value)
        if len(text) >= 4:
            yield from {text, urllib.parse.quote(text, safe="")}


def _secret_values(options: Mapping[str, object]) -> Iterator[object]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _secret_values(value)
        elif not isinstance(value, bool) and value is not None and name.lower() not in _PUBLIC_OPTIONS:
            yield from _each(value)


def _each(value: object) -> Iterator[object]:
    """A value, or all those in lists and mappings."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            yield from _each(each)
    else:
        yield value


def query_free(url: str) -> str:
    """`url` as it may be stored: credentials redacted, the query of a signed web URL dropped."""
    if url.startswith(("http://", "https://")):
        parts = urllib.parse.urlsplit(url)
        url = urllib.parse.urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))
    return redact(url)
